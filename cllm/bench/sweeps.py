"""Whole sweeps: beside processes of torch, how busy they keep the cores, how soon they train, their tools."""

import contextlib
import csv
import io
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np

from cllm.bench import records
from cllm.errors import InputError

__all__ = ["rows"]

RATES, SEEDS, STEPS = (3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 1e-2), (0, 1, 2, 3), 300
TEXT_BYTES = 1_000_000
SAMPLE_SECONDS = 0.25
MANY = 2000  # trials in a directory
STARTS = 5
MB = 1e6
CLLM = (sys.executable, "-m", "cllm")
TORCH_TRIAL = Path(__file__).with_name("torch_gpt.py")

CHAR = """
[sweep]
seeds = {seeds}
objective = "val.loss"
threads = 1
[base.data]
source = "{source}"
val_fraction = 0.01
[base.model]
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
[base.optim]
betas = [0.9, 0.99]
[base.schedule]
min_lr = 0.0
[base.train]
batch_size = 12
max_steps = {steps}
eval_interval = 0
[[space]]
"optim.lr" = {rates}
"""
SMALLEST = """
[sweep]
seeds = [0, 1]
objective = "val.loss"
threads = 1
[base.data]
source = "{source}"
val_fraction = 0.001
[base.model]
n_layer = 1
n_head = 1
n_embd = 8
block_size = 8
[base.schedule]
warmup_steps = 0
[base.train]
batch_size = 1
max_steps = 2
[[space]]
"optim.lr" = {rates}
"""


def rows(torch, say):
    """Rows of the group "sweep".

    Parameters
    ----------
    torch : module or None
    say : callable
        Takes a line for the user.
    """
    n_workers = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = _text()
        (folder / "text.txt").write_bytes(text)
        yield from _grid(folder, text, n_workers, torch, say)
        yield _start(folder)
        yield from _tools(folder, n_workers)


def _text():
    """Python's own library, so far as a megabyte goes: pure ASCII."""
    parts, n = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        part = path.read_bytes()
        if part.isascii():
            parts.append(part)
            n += len(part)
        if n >= TEXT_BYTES:
            break
    return b"".join(parts)[:TEXT_BYTES]


def _grid(folder, text, n_workers, torch, say):
    """The same trials as a sweep and, with torch, as one process each, as many at once."""
    file = folder / "char.toml"
    grid = {"source": folder / "text.txt", "seeds": list(SEEDS), "rates": list(RATES), "steps": STEPS}
    file.write_text(CHAR.format(**grid), encoding="utf-8")
    command = [*CLLM, "sweep", file, "--run.dir", folder / "char", "--workers", n_workers]
    ours = _watched([command], 1)
    losses = [float(row["val.loss"]) for row in csv.DictReader(io.StringIO(_table(folder / "char")))]
    samples = {records.OURS: ours}
    if torch:
        values, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
        np.save(folder / "tokens.npy", codes.astype(np.int64))
        trials = [(rate, seed) for rate in RATES for seed in SEEDS]
        script = [sys.executable, TORCH_TRIAL, folder / "tokens.npy", len(values)]
        samples["torch"] = _watched([[*script, rate, seed, STEPS] for rate, seed in trials], n_workers)
        theirs = [float(line) for line in samples["torch"]["out"]]
        say(f"mean loss on the last hundredth: CLLM {np.mean(losses):.3f}, torch {np.mean(theirs):.3f}")
    n = len(losses)
    seconds = {side: [found["seconds"]] for side, found in samples.items()}
    memory = {side: [found["memory"] / MB] for side, found in samples.items()}
    wanted = {"torch": 1.5} if torch else {}
    yield records.row("sweep", f"{n} trials of char, {STEPS} steps", n_workers, seconds, targets=wanted)
    wanted = {"torch": 3.0} if torch else {}
    yield records.row("sweep", f"{n} trials, memory", n_workers, memory, unit="MB", targets=wanted)
    cores = ours["seconds"] * n_workers
    busy, own = (ours["busy"] - ours["own"]) / cores, ours["own"] / cores
    limits = {"unit": "of the cores", "targets": {records.OURS: 0.95}}
    yield records.row("sweep", "trials' processor time", n_workers, {records.OURS: [busy]}, **limits)
    limits = {"unit": "of the cores", "most": True, "targets": {records.OURS: 0.01}}
    yield records.row("sweep", "the sweep's own", n_workers, {records.OURS: [own]}, **limits)


def _start(folder):
    """Seconds from the start of a worker's process to the end of its first step."""
    from cllm import sweep
    from cllm.sweep.engine import Processes
    from cllm.sweep.worker import Order

    file, samples = folder / "start.toml", []
    grid = {"source": folder / "text.txt", "seeds": [0], "rates": [1e-3], "steps": 2}
    file.write_text(CHAR.format(**grid), encoding="utf-8")
    for number in range(STARTS):
        plan = sweep.Sweep.load(file)
        trial = plan.trials()[0]
        run_dir = folder / "starts" / str(number)
        order = Order(trial, plan.trial_config(trial, str(run_dir)), plan.config)
        first = []

        def tell(order, message, first=first):
            if isinstance(message, dict) and message["step"] == 1 and not first:
                first.append(time.perf_counter())

        began = time.perf_counter()
        with Processes(1, 1) as engine:
            engine.run([order], tell)
        samples.append(first[0] - began)
    limits = {"most": True, "targets": {records.OURS: 0.5}, "unit": "seconds"}
    return records.row("sweep", "a worker's first step", 1, {records.OURS: samples}, **limits)


def _tools(folder, n_workers):
    """Status and report of a directory with 2,000 trials, which are the smallest that there are."""
    file, directory = folder / "many.toml", folder / "many"
    rates = [float(f"{rate:.6g}") for rate in np.geomspace(1e-4, 1e-2, MANY // 2)]
    file.write_text(SMALLEST.format(source=folder / "text.txt", rates=rates), encoding="utf-8")
    sweep = _watched([[*CLLM, "sweep", file, "--run.dir", directory, "--workers", n_workers]], 1)
    samples = {records.OURS: [1e3 * sweep["seconds"] * n_workers / MANY]}
    yield records.row("sweep", "a trial that takes no time", n_workers, samples, unit="ms of a core")
    for tool in ("status", "report"):
        samples = {records.OURS: [_watched([[*CLLM, tool, directory]], 1)["seconds"] for _ in range(3)]}
        limits = {"most": True, "targets": {records.OURS: 3.0}, "unit": "seconds"}
        yield records.row("sweep", f"{tool} of {MANY:,} trials", 1, samples, **limits)


def _table(directory):
    return (directory / "results.csv").read_text(encoding="utf-8")


def _watched(commands, at_once):
    """Run processes, so many at once; their time, processor time and memory, and what they printed.

    Memory is the sum over them and their children of what each would free if it ended (its proportional set
    size), at its highest of looks every quarter of a second. `own` is the processor time of one of them.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    waiting, running, out = deque(commands), [], []
    own, memory = 0.0, 0
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    due = began
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                file = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe would be full after 64 kB)
                pipes = {"stdout": file, "stderr": subprocess.STDOUT, "env": environment}
                running.append((subprocess.Popen([*map(str, waiting.popleft())], **pipes), file))
            own = _processor_seconds(running[0][0].pid) or own
            if time.perf_counter() >= due:
                due = time.perf_counter() + SAMPLE_SECONDS
                memory = max(memory, sum(map(_memory, _family([process.pid for process, _ in running]))))
            for process, file in list(running):
                if process.poll() is not None:
                    running.remove((process, file))
                    file.seek(0)
                    with file:
                        words = file.read()
                    out.append(words)
                    if process.returncode:
                        last = (words.strip().splitlines() or ["no message"])[-1]
                        code = process.returncode
                        raise InputError(f"a process that is measured ended with {code}: {last}")
            time.sleep(0.02)
    finally:  # of an error or Ctrl-C: nothing goes on without us
        for process, file in running:
            process.terminate()
            process.wait()
            file.close()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "busy": busy, "own": own, "memory": memory, "out": out}


def _family(pids):
    """Processes and all their descendants."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            pid, parent = int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(pid)
    found = list(pids)
    for pid in found:
        found += children.get(pid, ())
    return found


def _memory(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _processor_seconds(pid):
    """What a process itself has used; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
