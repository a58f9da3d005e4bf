"""One run killed again and again, and one left alone: python tests/kills.py [KILLS [SEED]]

Every kill is SIGKILL, and every process a fresh one that goes on where the last one left off. A third of the
kills come from outside, at random instants from the interpreter's start on; in the others the process ends
itself in the midst of an operation on a file: before it, after it, or with half of the bytes written. The
first fifth of the kills aim at what comes before the first checkpoint. Then the same again, with a quarter
of the kills, where a spike of the loss takes the run back to a checkpoint instead of skipping a step.

Both must end with the same bytes: arrays, state, records and summary, but for what they say of time and
memory; and with the same files, none left over. Prints the counts; the exit status is 1 if something differs.
"""

import collections
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np

from cllm import checkpoint, files, records, train
from cllm.progress import Silent

CONFIG = {
    "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 16, "model.dropout": 0.1,
    "optim.lr": 0.02, "schedule.warmup_steps": 5, "train.batch_size": 2, "train.grad_accum": 3,
    "train.eval_interval": 7, "train.checkpoint_interval": 5, "train.metrics": ["accuracy", "f1"],
    "train.threads": 1, "train.prefetch": 2, "guard.spike": 2.5, "guard.window": 10, "guard.limit": 100_000,
}  # fmt: skip
STEPS = 10  # for each kill: more than a process gets done on average, so that the run outlives its kills
WHILE_TRAINING = 0.1  # seconds from the first step to a kill, at most
# How far operations are counted. On files a start makes about 20 and a checkpoint 30; a record makes one.
FIRST, LATER = {"files": 45, "records": 5}, {"files": 250, "records": 40}
OPERATIONS = ("open", "write", "fsync", "close", "replace", "mkdir", "unlink", "rmdir", "ftruncate", "pwrite")
MOMENTS = ("before", "half", "after")


# The process that is killed --------------------------------------------------------------------------


class Deadly:
    """`os`, as a module of cllm knows it, that ends the process in its n-th operation on a file."""

    def __init__(self, n, moment):
        self.left, self.moment, self.names = n, moment, {}

    def __getattr__(self, name):
        call = getattr(os, name)
        return self._counted(name, call) if name in OPERATIONS else call

    def _counted(self, name, call):
        def operation(file, *others):
            self.left -= 1
            if self.left == 0:
                if name == "write" and self.moment == "half":
                    others = (others[0][: len(others[0]) // 2],)
                if self.moment != "before":
                    with suppress(OSError):
                        call(file, *others)
                say(f"{self.moment} {name} {self.names.get(file, file)}")
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(file, *others)
            if name == "open":
                self.names[result] = file
            return result

        return operation


class Telling(Silent):
    def start(self, trainer):
        say(f"from {trainer.step}")


def draw(trainer, record):
    """A callback whose numbers repeat only if the state of the shared generators comes back."""
    record["drawn"] = [random.random(), np.random.random()]  # noqa: NPY002


def say(line):
    os.write(1, f"{line}\n".encode())


def work(config, run_dir, module=None, n=0, moment=None):
    """Train, or go on; until the n-th operation of a module of cllm, if one is named."""
    warnings.simplefilter("error")  # nothing that a kill leaves is worth a warning
    if module is not None:
        {"files": files, "records": records}[module].os = Deadly(n, moment)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    options = {"callbacks": [draw], "progress": Telling()}
    if Path(run_dir, "config.toml").is_file():
        train.resume(run_dir, **options)
    else:
        train.Trainer({**config, "run.dir": run_dir}, **options).fit()


# The one that kills ----------------------------------------------------------------------------------


def start(config, run_dir, *place):
    command = [sys.executable, __file__, json.dumps([config, str(run_dir), *place])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process, said=""):
    """What a process said, in lines, and whether it came to its end; it may not fail."""
    out, err = process.communicate(timeout=300)
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"exit status {process.returncode}: {err}")
    return (said + out).splitlines(), process.returncode == 0


def kill_from_outside(config, run_dir, rng, first, startup):
    process, said = start(config, run_dir), ""
    if first:  # at the first step at the latest
        select.select([process.stdout], [], [], rng.uniform(0, startup))
    elif rng.random() < 0.5:
        time.sleep(rng.uniform(0, startup))
    else:
        said = process.stdout.readline()
        time.sleep(rng.uniform(0, WHILE_TRAINING))
    process.kill()
    lines, done = ended(process, said)
    return lines, done, "while training" if lines else "while starting"


def kill_inside(config, run_dir, rng, first):
    module = rng.choice(("files", "files", "records"))
    n = rng.randint(1, (FIRST if first else LATER)[module])
    lines, done = ended(start(config, run_dir, module, n, rng.choice(MOMENTS)))
    path = "" if done else lines.pop()
    for folder, kind in (("checkpoints/", "in a checkpoint"), ("incidents/", "in a step that went wrong")):
        if folder in path:
            return lines, done, kind
    recording = module == "records" or "metrics.jsonl" in path
    return lines, done, "in the records" if recording else "in another file"


def run(kills, seed=0, policy="skip", say=print):
    """Whether a run that is killed so often ends as one that is left alone; `say` is told the counts."""
    rng, began = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cllm-kills-") as folder:
        text, alone, run_dir = (Path(folder, name) for name in ("text.txt", "alone", "killed-1"))
        text.write_text(" ".join(rng.choices(["a", "run", "that", "is", "killed", "goes", "on"], k=2000)))
        config = {**CONFIG, "data.source": str(text), "guard.policy": policy}
        config["train.max_steps"] = STEPS * kills
        process = start(config, alone)
        said = process.stdout.readline()
        startup = time.monotonic() - began
        ended(process, said)
        places, steps, found, fresh, halves, runs = collections.Counter(), [], [], 0, 0, 1
        while places.total() < kills:
            first = places.total() < kills // 5
            if rng.random() < 1 / 3:
                lines, done, place = kill_from_outside(config, run_dir, rng, first, startup)
            else:
                lines, done, place = kill_inside(config, run_dir, rng, first)
            steps += [int(line.removeprefix("from ")) for line in lines]
            if done:  # before it was killed: another run takes the kills that are left
                found += differences(alone, run_dir)
                runs += 1
                run_dir = Path(folder, f"killed-{runs}")
                continue
            places[place] += 1
            fresh += not checkpoint.listed(run_dir)
            halves += any(run_dir.glob("checkpoints/.*"))
        ended(start(config, run_dir))
        found += differences(alone, run_dir)
        written = records.Run(alone)
        say(
            f"{places.total()} kills of {runs} run{'s' * (runs > 1)} of {STEPS * kills} steps, "
            f"{written.summary.get('incidents', 0)} spikes ({policy}): "
            + ", ".join(f"{n} {place}" for place, n in sorted(places.items()))
        )
        say(
            f"{fresh} before the first checkpoint was there, {halves} left half of one; began at the first "
            f"step: {steps.count(0)}, after a later one: {len(steps) - steps.count(0)} (at "
            f"{len({*steps} - {0})} places up to step {max(steps)})"
        )
        for line in found[:20]:
            say(f"DIFFERS: {line}")
        if not found:
            seconds = time.monotonic() - began
            say(f"the same arrays, state, {len(written.records)} records, summary, files ({seconds:.0f} s)")
        return not found


def differences(alone, killed, but=()):
    """Sentences on what differs between two runs that have ended, but for time, memory and these keys."""
    pair, found = (alone, killed), []
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in pair]
    if names[0] != names[1] - {files.LOCK}:  # a dead owner's means nothing, also beside a summary
        found.append(f"files: {sorted(names[0] ^ names[1])} are in one of the two only")
    last = [checkpoint.newest(run) for run in pair]
    for name in checkpoint.ARRAY_FILES:
        if (last[0] / name).read_bytes() != (last[1] / name).read_bytes():
            found.append(f"{name}: differs")
    runs = [records.Run(run) for run in pair]
    if len(runs[0].records) != len(runs[1].records):
        found.append(f"records: {len(runs[0].records)} and {len(runs[1].records)}")
    states = ("state", *(checkpoint.entry(path)["state"] for path in last))
    for what, one, other in (
        states,
        ("summary", *(run.summary for run in runs)),
        *((f"record {n + 1}", *both) for n, both in enumerate(zip(*(run.records for run in runs)))),
    ):
        keys = [key for key in {**one, **other} if not (records.is_timing(key) or key in but)]
        keys = [key for key in keys if one.get(key) != other.get(key)]
        found += [f"{what}: differs in {', '.join(keys)}"] if keys else []
    return found


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("["):
        work(*json.loads(sys.argv[1]))
    else:
        kills, seed = map(int, (sys.argv[1:] + ["100", "0"][len(sys.argv) - 1 :]))
        same = [run(kills, seed), run(kills // 4, seed, "rollback")]
        sys.exit(not all(same))
