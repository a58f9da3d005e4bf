"""Runs for hours, in one process: python tests/soak.py [SECONDS]

Again and again a run with all that a run may have (batches made ahead in a thread, dropout, evaluations,
metrics, samples, guard, monitor, checkpoints) is begun, stopped twice by SIGTERM, resumed twice, loaded,
sampled from, evaluated, inspected and deleted. After each one the process is measured. Prints about 30 of
the measurements, and how far they grew after the first fifth of the time; the exit status is 1 when that is
more than `GROWTH` allows: no file handle, no thread, no buffer of the pool, and next to no memory.
"""

import gc
import io
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from cllm import contents, records, saved, train
from cllm._core import pool
from cllm.generate import generate
from cllm.lifecycle import memory_mb
from cllm.progress import Lines

WARM_UP = 0.2  # of the time
# How much the median of the last quarter of the measurements may be above that of the first quarter.
GROWTH = {"memory_mb": 4.0, "objects": 1000, "pool_kb": 0, "files": 0, "threads": 0}
STEPS, STOPS = 200, (66, 134)
CONFIG = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 32, "model.dropout": 0.1,
    "train.batch_size": 4, "train.grad_accum": 2, "train.eval_interval": 25,
    "train.sample_interval": 50, "train.checkpoint_interval": 20, "train.metrics": ["accuracy", "f1"],
    "train.threads": 1, "train.prefetch": 2, "guard.policy": "skip", "guard.spike": 4.0, "monitor.layers": 10,
}  # fmt: skip


def stop(trainer, record):
    if trainer.step in STOPS and record["split"] == "train":
        os.kill(os.getpid(), signal.SIGTERM)


def live(config, run_dir):
    """All of a run's life."""
    options = {"callbacks": [stop], "progress": Lines(io.StringIO())}
    ends = 0
    try:
        train.Trainer({**config, "run.dir": str(run_dir)}, **options).fit()
    except SystemExit:
        ends += 1
    while ends <= len(STOPS):
        try:
            summary = train.resume(run_dir, **options)
            break
        except SystemExit:
            ends += 1
    assert (summary["state"], summary["step"], ends) == ("finished", STEPS, len(STOPS)), (summary, ends)
    model, tokenizer = saved.load(run_dir, "best")
    generate(model, tokenizer.encode("line"), 20, seed=1)
    saved.evaluate(run_dir)
    assert contents.lines(run_dir)[1]
    assert len(records.load(run_dir)[0].series("train", "loss")[1]) == STEPS
    shutil.rmtree(run_dir)


def measure():
    gc.collect()
    threads = "/proc/self/task"  # those of OpenMP too, where the system lists them
    return {
        "memory_mb": memory_mb(),
        "objects": sys.getallocatedblocks(),
        "pool_kb": pool.usage()[0] / 1e3,
        "files": len(os.listdir("/dev/fd")),
        "threads": len(os.listdir(threads)) if os.path.isdir(threads) else threading.active_count(),
    }


def run(seconds, say=print):
    """By how much each measurement grew in this time; `say` is told about them on the way."""
    began, seen, told = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="cllm-soak-") as folder:
        text, run_dir = Path(folder, "text.txt"), Path(folder, "run")
        text.write_text("".join(f"line {i} of a text that is read for hours\n" for i in range(500)))
        config = {**CONFIG, "data.source": str(text), "train.max_steps": STEPS}
        while (now := time.monotonic() - began) < seconds or len(seen) < 8:
            live(config, run_dir)
            if now >= WARM_UP * seconds:
                seen.append(measure())
            if now >= told * seconds / 30:
                told += 1
                say(f"{now:6.0f} s: " + _line(measure()))
    quarter = len(seen) // 4
    first, last = (
        {key: statistics.median(one[key] for one in part) for key in GROWTH}
        for part in (seen[:quarter], seen[-quarter:])
    )
    growth = {key: last[key] - first[key] for key in GROWTH}
    say(f"grew in {len(seen)} runs: {_line(growth)}")
    return growth


def _line(values):
    return ", ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in values.items())  # fmt: skip


def too_much(growth):
    """What grew more than it may."""
    return [key for key, most in GROWTH.items() if growth[key] > most]


if __name__ == "__main__":
    grown = too_much(run(float(sys.argv[1]) if len(sys.argv) > 1 else 1800))
    if grown:
        print(f"TOO MUCH: {', '.join(grown)} (at most {GROWTH})")
    sys.exit(bool(grown))
