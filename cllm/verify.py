"""Does a run of one's own survive a kill? `cllm verify-resume` trains it twice for a few steps.

Once without a stop; once killed (SIGKILL) before its first checkpoint and again after one, and resumed each
time. Then the last checkpoints must agree, arrays byte for byte, and all records, but for what these say of
time and memory. Each process is a fresh one, as after a crash.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import monotonic

import numpy as np

from cllm import arrays, checkpoint, parallel, records, train
from cllm import config as configs
from cllm.errors import InputError
from cllm.progress import Silent, duration

__all__ = ["resume_is_exact"]

STEPS, MINUTES = 20, 10.0
CHILD = "from cllm.verify import _child; _child()"


def resume_is_exact(config, steps=STEPS, minutes=MINUTES, say=print):
    """Kill and resume a short run of a configuration, and compare it with one that was left alone.

    Parameters
    ----------
    config : cllm.Config
        Its run.dir, max_steps and intervals are not used: checkpoints are written, and evaluations made, at
        a third, two thirds and the end of `steps`.
    steps : int
        At least 3.
    minutes : float
        What all of it may take.
    say : callable
        Told in sentences what was done and found.

    Returns
    -------
    bool
        Whether all bits agree.

    Raises
    ------
    InputError
        When the configuration cannot be trained, or not in that time, or mpirun has started this.
    """
    if parallel.here().size > 1:
        raise InputError("mpirun started this, but verifying starts its own processes: call it without")
    if steps < 3:
        raise InputError(f"steps is {steps}, it must be at least 3: before, at and after a checkpoint")
    deadline = monotonic() + 60 * minutes
    third = steps // 3
    own = config.task.run is not None
    changes = {"eval_interval": third, "checkpoint_interval": third, "sample_interval": 0, "max_minutes": 0.0}
    changes |= {"profile": False, "keep_checkpoints": steps}
    changes |= {"max_steps": steps} if own else {}
    config = replace(config, train=replace(config.train, **changes))
    with tempfile.TemporaryDirectory(prefix="cllm-verify-") as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        say(f"training {steps} steps without a stop")
        began = monotonic()
        _process(config, alone, steps, None, deadline)
        seconds = monotonic() - began
        for kill_at in (max(1, third - 1), max(third + 1, 2 * third - 1)):
            _process(config, killed, steps, kill_at, deadline)
            newest = checkpoint.newest(killed)
            kept = f"of step {checkpoint.step_of(newest)}" if newest else "there is none yet"
            say(f"killed in step {kill_at}; resuming from the newest checkpoint: {kept}")
        _process(config, killed, steps, None, deadline)
        found = [*_checkpoints_differ(alone, killed), *_records_differ(alone, killed)]
        if not found:
            last = checkpoint.newest(alone)
            n = sum(len(arrays.header(last / name)) for name in checkpoint.ARRAY_FILES)
            n_records = len(records.Run(alone).records)
            say(f"the bits agree: {n} arrays, {n_records} records ({duration(seconds)} for {steps} steps)")
            return True
        for line in found:
            say(line)
        say(
            "the bits differ: a resumed run of this configuration is not the one that was never stopped; "
            "what is drawn at random or remembered must follow from arguments and seeds, or be part of a "
            "state_dict()"
        )
        return False


def _process(config, run_dir, steps, kill_at, deadline):
    """Train or resume in a process of its own, which kills itself at step `kill_at`."""
    nested = configs.to_dict(replace(config, run=configs.RunConfig(str(run_dir))))
    order = json.dumps({"config": nested, "run_dir": str(run_dir), "steps": steps, "kill_at": kill_at})
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    try:
        _, errors = process.communicate(order, timeout=max(0.1, deadline - monotonic()))
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{steps} steps, twice over, take longer than --minutes allows; choose fewer --steps, or more"
        ) from None
    finally:
        process.kill()
        process.wait()
    if kill_at is not None and process.returncode == 0:
        raise InputError(f"the run made no train record from step {kill_at} on, so it was not killed")
    expected = 0 if kill_at is None else -signal.SIGKILL
    if process.returncode != expected:
        said = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        raise InputError(f"the run cannot be verified, it does not train: {said[-1].removeprefix('cllm: ')}")


def _child():
    """In a process of its own: train, or go on, as standard input says."""
    order = json.loads(sys.stdin.read())
    # A process begins these two at random; how they go on after a kill is what is looked at.
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    shown = _Until(order["steps"], order["kill_at"])
    try:
        if Path(order["run_dir"], "config.toml").is_file():
            summary = train.resume(order["run_dir"], progress=shown)
        else:
            summary = train.Trainer(configs.from_dict(order["config"]), progress=shown).fit()
    except InputError as error:
        sys.exit(f"cllm: {' '.join(str(error).split())}")
    if summary["state"] != "finished":
        sys.exit(f"cllm: {summary.get('error', summary['state'])}")


class _Until(Silent):
    """Ends a run after some step, or the process in the midst of it."""

    def __init__(self, last, kill_at):
        self.last, self.kill_at = last, kill_at

    def start(self, trainer):
        self.trainer = trainer

    def step(self, record):
        if self.kill_at is not None and record["step"] >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if record["step"] >= self.last:
            self.trainer.stop = True


def _checkpoints_differ(a, b):
    """Sentences about what differs in two runs' last checkpoints."""
    there = [{checkpoint.step_of(path): path for path in checkpoint.listed(run)} for run in (a, b)]
    steps = [max(found, default=None) for found in there]
    if steps[0] is None or steps[0] != steps[1]:
        return [f"the last checkpoint is of step {steps[0]} without a stop, of step {steps[1]} with kills"]
    found = []
    for name in checkpoint.ARRAY_FILES:
        files = [part[steps[0]] / name for part in there]
        if files[0].read_bytes() == files[1].read_bytes():
            continue
        one, other = (arrays.read(file)[0] for file in files)
        names = [key for key in one if key not in other or one[key].tobytes() != other[key].tobytes()]
        names += [key for key in other if key not in one]
        found.append(f"{name} differs in {len(names)} of {len(one)} arrays, the first is {names[0]}")
    one, other = (checkpoint.entry(part[steps[0]])["state"] for part in there)
    names = [key for key in _untimed({**one, **other}) if one.get(key) != other.get(key)]
    return found + [f"state.json differs in {', '.join(names)}"] * bool(names)


def _records_differ(a, b):
    """A sentence about the first record in which two runs differ, if there is one."""
    one, other = ([_untimed(record) for record in records.Run(run).records] for run in (a, b))
    for here, there in zip(one, other):
        if here != there:
            keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]
            return [f"the {here['split']} record of step {here['step']} differs first, in {', '.join(keys)}"]
    if len(one) != len(other):
        return [f"there are {len(one)} records without a stop, and {len(other)} with kills"]
    return []


def _untimed(record):
    return {key: value for key, value in record.items() if not records.is_timing(key)}
