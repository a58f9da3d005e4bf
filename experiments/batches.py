"""What pool and background thread (train.prefetch) are worth: step time and page faults with and without.

Question: for which data does a step get faster when its batch comes from the pool, or was made ahead?
    python experiments/batches.py [--rounds 5] [--threads 2] [--only NAME,...]

Each row is several training runs of some steps, in turns with the others of its kind: first decile and median
of a step's time, the median of its wait for the batch, the processor time of all threads, and page faults
(minor: memory that is new; major: read from disk). "cold" is a token file of 2 GB that the system is told to
forget before each run, which reads other places in it than those before.
"""

import argparse
import os
import resource
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import cllm
from cllm.data import Batch, Examples
from cllm.progress import Silent

WARM, STEPS = 10, 40
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32}
CHAR = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}


class Clock(Silent):
    """Notes when each step ended and what the process had faulted in by then."""

    def __init__(self):
        self.seen, self.waits = [], []

    def step(self, record):
        self.waits.append(record["time_data"] * 1000)
        use = resource.getrusage(resource.RUSAGE_SELF)
        self.seen.append((time.perf_counter(), time.process_time(), use.ru_minflt, use.ru_majflt))


class Slow:
    """A dataset of one's own whose batch takes some milliseconds, in Python or waiting (as for a disk)."""

    def __init__(self, dataset, milliseconds, waiting):
        self.dataset, self.seconds, self.waiting = dataset, milliseconds / 1000, waiting

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, indices):
        if self.waiting:
            time.sleep(self.seconds)
        else:
            until = time.perf_counter() + self.seconds
            while time.perf_counter() < until:
                sum(range(100))
        return self.dataset[indices]


class Crops:
    """Images cropped, flipped and scaled by NumPy, row by row: a few milliseconds for 64 of 64 x 64."""

    def __init__(self, images, classes):
        self.images, self.classes = images, classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        out = np.empty((len(indices), 56, 56), np.float32)
        for row, i in zip(out, indices):
            x, y = i % 8, i // 8 % 8
            crop = self.images[i, x : x + 56, y : y + 56].astype(np.float32)
            crop = crop[:, ::-1] if i % 2 else crop
            row[...] = (crop - crop.mean()) / (crop.std() + 1e-6)
        return Batch(out.reshape(len(indices), -1), self.classes[indices])


def sequences(n=4000, length=64):
    rng = np.random.default_rng(0)
    return Examples(rng.integers(0, 65, (n, length)), rng.integers(0, 65, (n, length)))


def gpt(shape):
    return cllm.GPT(cllm.GPTConfig(vocab_size=65, **shape), seed=0)


def slow(milliseconds, waiting):
    return lambda: cllm.Task(gpt(CHAR), Slow(sequences(), milliseconds, waiting))


def ready():
    """Images that only need to be gathered: 800 kB a batch."""
    rng = np.random.default_rng(0)
    images, classes = rng.random((4000, 784), np.float32), rng.integers(0, 10, 4000)
    model = cllm.nn.Sequential(cllm.nn.Linear(784, 32), cllm.nn.Linear(32, 10))
    return cllm.Task(model, Examples(images, classes))


def crops():
    rng = np.random.default_rng(0)
    images, classes = rng.integers(0, 256, (2000, 64, 64), np.uint8), rng.integers(0, 10, 2000)
    model = cllm.nn.Sequential(cllm.nn.Linear(56 * 56, 256), cllm.nn.Linear(256, 10))
    return cllm.Task(model, Crops(images, classes))


def folder_of_texts(folder):
    rng = np.random.default_rng(0)
    place = folder / "texts"
    place.mkdir()
    for i in range(300):
        words = rng.choice(["order", "a", "window", "of", "tokens", "is", "pure"], rng.integers(5, 400))
        (place / f"{i}.txt").write_text(" ".join(words))
    return place


def large_file(folder, size=2 << 30):
    path = folder / "large.bin"
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for _ in range(size >> 24):
            rng.integers(0, 65, 1 << 23, np.uint16).tofile(file)
    return path


def cases(folder):
    """Name -> (what to build the task, config, a file to forget)."""
    texts = {"data.source": str(folder_of_texts(folder))}
    tiny = {f"model.{key}": value for key, value in TINY.items()} | {"train.batch_size": 8}
    char = {f"model.{key}": value for key, value in CHAR.items()} | {"train.batch_size": 12}
    yield "windows, tiny", None, {**tiny, **texts}, None
    yield "windows, char", None, {**char, **texts}, None
    yield "documents, char", None, {**char, **texts, "data.packing": "documents"}, None
    yield "padded, char", None, {**char, **texts, "data.packing": "padded"}, None
    yield "images, ready", ready, {"train.batch_size": 256}, None
    yield "images, cropped", crops, {"train.batch_size": 64}, None
    for milliseconds in (1, 5):
        for waiting in (False, True):
            what = "waiting" if waiting else "Python"
            build = slow(milliseconds, waiting)
            yield f"{milliseconds} ms {what}, char", build, {"train.batch_size": 12}, None
    path = large_file(folder)
    yield "2 GB cold, tiny", None, {**tiny, "data.source": str(path)}, path
    yield "2 GB cold, char", None, {**char, "data.source": str(path)}, path


@contextmanager
def no_pool():
    """Batches from NumPy's own memory."""
    before = cllm.data.BatchPool.empty, cllm.data.batch.pool

    def empty(self, shape, dtype=np.int64, targets_shape=None, targets_dtype=None, mask=False):
        targets_shape = shape if targets_shape is None else targets_shape
        targets_dtype = dtype if targets_dtype is None else targets_dtype
        arrays = np.empty(shape, dtype), np.empty(targets_shape, targets_dtype)
        return *arrays, np.empty(targets_shape, bool) if mask else None

    cllm.data.BatchPool.empty, cllm.data.batch.pool = empty, SimpleNamespace(empty=np.empty)
    try:
        yield
    finally:
        cllm.data.BatchPool.empty, cllm.data.batch.pool = before


def forget(path):
    """Let the system drop a file's pages from memory."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one(folder, build, config, path, threads, prefetch, seed):
    """Milliseconds of each step, and of its data; processor milliseconds, minor and major faults for each."""
    clock = Clock()
    fixed = {
        "train.max_steps": WARM + STEPS, "train.eval_interval": 0, "train.checkpoint_interval": 0,
        "train.threads": threads, "train.prefetch": prefetch, "data.val_fraction": 0.0, "train.seed": seed,
        "monitor.layers": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        values = {**config, **fixed, "run.dir": str(Path(run_dir, "run"))}
        task = build() if build else None
        trainer = cllm.Trainer(values, task, progress=clock)
        if path is not None:
            forget(path)
        trainer.fit()
    times = [(b[0] - a[0]) * 1000 for a, b in zip(clock.seen[WARM - 1 :], clock.seen[WARM:])]
    first, last = np.array(clock.seen[WARM - 1]), np.array(clock.seen[-1])
    return times, clock.waits[WARM:], (last - first)[1:] / STEPS * (1000, 1, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cllm.get_num_threads())
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    variants = {"plain": 0, "no pool": 0, "prefetch 2": 2}
    print(f"{options.threads} threads; ms: first decile, median, data, processor; faults: minor, major")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, build, config, path in cases(folder):
            if options.only and not any(part in name for part in options.only.split(",")):
                continue
            if path is not None:
                cllm.data.load(path, val_fraction=0.0)  # reads all of it once, for its hash
            found = {variant: [] for variant in variants}
            for i in range(options.rounds):
                for variant in variants if i % 2 == 0 else reversed(variants):
                    seed = sum(map(len, found.values()))
                    with no_pool() if variant == "no pool" else nullcontext():
                        found[variant].append(
                            one(folder, build, config, path, options.threads, variants[variant], seed)
                        )
            for variant, runs in found.items():
                times, waits = (np.concatenate([run[i] for run in runs]) for i in (0, 1))
                cpu, minor, major = np.min([used for *_, used in runs], axis=0)
                shown = (*np.quantile(times, (0.1, 0.5)), np.median(waits), cpu)
                shown = "  ".join(f"{x:7.2f}" for x in shown)
                print(f"{name:20} {variant:10}  {shown}  {minor:7.1f}  {major:6.2f}", flush=True)


if __name__ == "__main__":
    main()
