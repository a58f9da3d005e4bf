"""A sweep whose workers and own process are killed again and again: python tests/sweep_kills.py [N [SEED]]

Every kill is SIGKILL: of the sweep's process, of one of its workers, or of both. It comes at a random instant
while processes start, while they train, or just after the sweep has said something, such as that a trial has
ended or a rung begins. Then the same command is given again, until all trials have ended well.

It has rungs, a confirmation and a test split. Its table, summary and trials must be those of the sweep that
was left alone: the same bytes, but for what they say of time and memory. Prints the counts; the exit status
is 1 if something differs.
"""

import collections
import csv
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import kills

from cllm import checkpoint, records

SWEEP = """
[sweep]
seeds = [0, 1]
[base.data]
source = "text.txt"
test_fraction = 0.1
[base.model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
dropout = 0.1
[base.optim]
betas = [0.9, 0.99]
[base.schedule]
warmup_steps = 5
[base.train]
batch_size = 2
max_steps = {steps}
eval_interval = {interval}
checkpoint_interval = 20
[[space]]
"optim.lr" = [1e-3, 2e-3, 4e-3, 8e-3]
"schedule.min_lr" = [0.0, 1e-4]
[prune]
method = "halving"
steps = [{interval}, {twice}]
[confirm]
top = 2
seeds = [10, 11]
"""
STEPS = 20  # of the longest trials, for each kill: about as many as are trained between two kills
WORKERS = 2
WHILE_TRAINING = 0.4  # seconds from the first step to a kill, at most
AFTER_WORDS = 0.02  # and from something said
VICTIMS = ("sweep", "worker", "both")


class Process:
    """The sweep's process, and what it says."""

    def __init__(self, folder, name):
        command = [
            sys.executable,
            "-m",
            "cllm",
            "sweep",
            "sweep.toml",
            "--run.dir",
            name,
            "--workers",
            str(WORKERS),
        ]
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines, self.errors, self.died = queue.Queue(), [], 0
        self.threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines.put)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors.append)),
        ]
        for thread in self.threads:
            thread.start()

    def _read(self, pipe, tell):
        for line in pipe:
            self.died += ": failed: worker died" in line
            tell(line.rstrip())

    def said(self, seconds):
        """The next line; "" when none comes in that time or the process has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(queue.Empty):
                return self.lines.get(timeout=0.01)
            if self.process.poll() is not None:
                break
        return ""

    def workers(self):
        """The workers' process ids; Python's own helper process is none."""
        found = []
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{self.process.pid}/task"):
                children = Path(f"/proc/{self.process.pid}/task/{thread}/children").read_text()
                found += map(int, children.split())
        return [pid for pid in found if b"spawn_main" in _command_line(pid)]

    def end(self):
        """Whether it ended by itself, and not by a kill; an error if it did not end well."""
        status = self.process.wait(timeout=300)
        for thread in self.threads:
            thread.join()
        # A worker that was just starting may complain when it is left alone.
        if status not in (0, -signal.SIGKILL) or (status == 0 and self.errors):
            raise RuntimeError(f"exit status {status}: " + "\n".join(self.errors))
        return status == 0


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(process, rng, startup):
    """Kill something at a random instant; where and what, or None when the process has ended before."""
    kind = rng.choice(("starting", "training", "talking"))
    if kind == "starting":
        time.sleep(rng.uniform(0, startup))
    elif kind == "training":
        process.said(60)  # "sweep: ...": workers begin
        time.sleep(rng.uniform(0, startup + WHILE_TRAINING))
    else:
        for _ in range(rng.randint(1, 6)):
            process.said(60)
        time.sleep(rng.uniform(0, AFTER_WORDS))
    victim = rng.choice(VICTIMS)
    workers = process.workers()
    if process.process.poll() is not None or (victim == "worker" and not workers):
        return None
    if victim != "sweep" and workers:
        with suppress(ProcessLookupError):
            os.kill(rng.choice(workers), signal.SIGKILL)
    if victim != "worker":
        process.process.kill()
    return f"{victim} while {kind}"


def run(n_kills, seed=0, say=print):
    """Whether a sweep that is killed so often ends as one that is left alone; `say` is told the counts."""
    rng, began = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cllm-sweep-kills-") as folder:
        folder = Path(folder)
        words = ["a", "sweep", "that", "is", "killed", "goes", "on"]
        (folder / "text.txt").write_text(" ".join(rng.choices(words, k=3000)))
        steps = max(40, STEPS * n_kills)
        text = SWEEP.format(steps=steps, interval=steps // 4, twice=2 * (steps // 4))
        (folder / "sweep.toml").write_text(text)
        alone = Process(folder, "alone")
        while alone.process.poll() is None and not alone.said(60).startswith("["):
            pass
        startup = time.monotonic() - began
        alone.end()
        places, found, calls, sweeps, died = collections.Counter(), [], 0, 1, 0
        while places.total() < n_kills or calls == 0:
            process = Process(folder, f"killed-{sweeps}")
            calls += 1
            while places.total() < n_kills and (place := kill(process, rng, startup)):
                places[place] += 1
                if not place.startswith("worker"):
                    break
            ended = process.end()
            died += process.died
            whole = ended and not states(folder / f"killed-{sweeps}")["failed"]
            if whole and places.total() < n_kills:  # another sweep takes the kills that are left
                found += differences(folder / "alone", folder / f"killed-{sweeps}")
                sweeps += 1
        while True:
            calls += 1
            if (
                Process(folder, f"killed-{sweeps}").end()
                and not states(folder / f"killed-{sweeps}")["failed"]
            ):
                break
        found += differences(folder / "alone", folder / f"killed-{sweeps}")
        n = len(table(folder / "alone"))
        say(
            f"{places.total()} kills of {sweeps} sweep{'s' * (sweeps > 1)} of {n} trials to {steps} steps: "
            + ", ".join(f"{count} {place}" for place, count in sorted(places.items()))
        )
        say(f"{calls} calls of the command; {died} times a trial failed with its worker, and was tried again")
        for line in found:
            say(f"DIFFERS: {line}")
        if not found:
            seconds = time.monotonic() - began
            say(f"the same table, summary, and trials to their bits ({seconds:.0f} s)")
        return not found


def table(directory):
    """results.csv without seconds."""
    with open(directory / "results.csv", newline="", encoding="utf-8") as file:
        return [row[:-1] for row in csv.reader(file)][1:]


def states(directory):
    return collections.Counter(row[-4] for row in table(directory))


def differences(alone, killed):
    """Sentences on what differs between two sweeps that have ended, but for time and memory."""
    found = []
    for one, other in zip(table(alone), table(killed)):
        if one != other:
            found.append(f"results.csv: {','.join(one)} became {','.join(other)}")
    if len(table(alone)) != len(table(killed)):
        found.append(f"results.csv has {len(table(killed))} trials, not {len(table(alone))}")
    summaries = [json.loads((sweep / "summary.json").read_text()) for sweep in (alone, killed)]
    for key in summaries[0] | summaries[1]:
        if key != "seconds" and summaries[0].get(key) != summaries[1].get(key):
            found.append(f"summary.json: {key} is {summaries[1].get(key)}, not {summaries[0].get(key)}")
    for row in table(alone):
        name = f"s{int(row[0]):03d}-seed{row[1]}"
        pair = [sweep / "trials" / name for sweep in (alone, killed)]
        if row[-4] == "finished":
            differ = kills.differences(*pair)
        else:  # before it was dropped for good, it may have gone on
            step = int(row[-3])
            there = [[untimed(r) for r in records.Run(path).records if r["step"] <= step] for path in pair]
            differ = [f"its records up to step {step} differ"] if there[0] != there[1] else []
            if checkpoint.newest(pair[1]) is None:
                differ.append("it has no checkpoint")
        found += [f"{name}: {line}" for line in differ]
    return found


def untimed(record):
    return {key: value for key, value in record.items() if not records.is_timing(key)}


if __name__ == "__main__":
    sys.exit(not run(*map(int, (sys.argv[1:] + ["50", "0"][len(sys.argv) - 1 :]))))
