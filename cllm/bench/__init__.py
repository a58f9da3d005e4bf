"""`cllm bench`: how fast CLLM is on this machine, beside torch and NumPy and against the machine's limits.

Ratios are measured in one process, the sides taking turns, with the same threads; medians of rounds. torch
is at the better of eager and torch.compile, with its fused optimizer and its fused attention.

    cllm bench --against torch            all rows, with figures, into runs/bench
    cllm bench --only step --sizes tiny   some of them
"""

from pathlib import Path

import cllm
from cllm.bench import kernels, records, steps, table, timing
from cllm.bench.records import cpu_model, environment
from cllm.bench.steps import SIZES, flops_of, shape_of
from cllm.bench.timing import Effort, measure
from cllm.errors import InputError, nearest

__all__ = [
    "GROUPS", "SIZES", "Effort", "cpu_model", "environment", "flops_of", "load", "measure", "run", "shape_of",
]  # fmt: skip

#: What `only` may name, in the table's order.
GROUPS = tuple(table.GROUPS)
SIZED = ("step", "gemm", "memory")  # groups with a row for each size
# Seconds of each group on two cores that multiply and add at 128 GFLOP/s each: CLLM alone, and with torch.
SECONDS = {
    "ceilings": (4, 4), "step": (60, 150), "gemm": (35, 60), "attention": (30, 50), "gelu": (4, 5),
    "ffn": (6, 12), "optimizer": (12, 30), "loss": (12, 35), "norm": (3, 4), "import": (3, 15),
    "memory": (45, 90), "sweep": (240, 480), "growth": (20, 20),
}  # fmt: skip
COMPILE_SECONDS = 25  # of a size with a number of threads, the first time


def run(
    only=None, sizes=None, *, against=None, threads=None, out="runs/bench", quick=False, compile=True,
    rounds=None, file=None,
):  # fmt: skip
    """Measure, print the table as it grows, write records and figures.

    Parameters
    ----------
    only : list of str, optional
        Names in `GROUPS`; all of them by default.
    sizes : list of str, optional
        Names in `SIZES`, for the groups that have sizes; all by default.
    against : "torch" or None
        What to run beside CLLM. Without torch the kernels are timed beside NumPy, and the table says so.
    threads : int, optional
        Threads of all sides. By default a training step is timed with one thread and with as many as CLLM
        uses, kernels with one, memory and growth with as many as CLLM uses.
    out : path-like or None
        Folder for records, table and figures; rows that are there already are kept. None writes nothing.
    quick : bool
        Few rounds, and without what takes long.
    compile : bool
        Whether to try torch.compile beside eager torch.
    rounds : int, optional
        Blocks of each side; by default 7, and 5 for training steps.
    file : text file, optional
        Where the table goes; standard output by default.

    Returns
    -------
    list of dict
        The rows that were measured; see `cllm.bench.records`.

    Raises
    ------
    InputError
        When a name is unknown or a number too small.
    """
    only, sizes = _known("group", only, GROUPS), _known("size", sizes, SIZES)
    if against not in (None, "torch"):
        raise InputError(f"cannot measure against {against!r}; allowed is torch")
    for name, number in (("threads", threads), ("rounds", rounds)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}, it must be at least 1")
    if quick:
        sizes = [size for size in sizes if size not in steps.LARGE]
        if not sizes:
            raise InputError(f"quick leaves out {', '.join(steps.LARGE)}, so no size is left to measure")
    path = None
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        path = Path(out, records.FILE)
    torch = _import_torch() if against else None

    shown = table.Table(file)
    for label, text in environment(torch).items():
        shown.note(text, label)
    if against and torch is None:
        shown.note("not installed, so CLLM is timed beside NumPy alone: pip install torch==2.13.0", "torch")
    elif torch is None:
        shown.note("left out, so CLLM is timed beside NumPy alone: --against torch takes it in", "torch")
    every = threads or cllm.get_num_threads()
    several = [threads] if threads else sorted({1, every})
    shown.note(" and ".join(map(str, several)), "threads")
    shown.note(_duration(only, sizes, torch, compile, quick), "this takes")
    if path:
        records.append(path, {"environment": environment(torch)})

    effort = Effort(rounds or (3 if quick else 7), 0.02 if quick else 0.04)
    long = Effort(rounds or (3 if quick else 5), 0.1 if quick else 0.4)
    few = Effort(rounds or (2 if quick else 3), 0.1)
    compile = compile and not quick and torch is not None
    measurements = {
        "ceilings": lambda: _ceilings(several, effort),
        "step": lambda: _steps(sizes, several, torch, long, compile, shown.note),
        "import": lambda: _process().import_rows(torch, few),
        "memory": lambda: _memory(sizes, every, torch, quick),
        "sweep": lambda: _sweeps(torch, quick, shown.note),
        "growth": lambda: steps.growth(every, few),
    }
    rows = []
    with timing.threads_of_all():
        for group in only:
            if group in kernels.GROUPS:
                found = kernels.rows(group, threads or 1, torch, effort, sizes, quick, shown.note)
            else:
                found = measurements[group]()
            for row in found:
                rows.append(row)
                if path:
                    records.append(path, row)
                shown.row(row)
            shown.finish()
    _finish(rows, out, shown)
    return rows


def load(directory):
    """The records in a directory, `cllm.bench.records.load`, with the rows in the table's order."""
    known, rows = records.load(directory)
    sizes = list(SIZES)

    def place(row):
        size = row.get("size")
        return GROUPS.index(row["group"]), sizes.index(size) if size in sizes else len(sizes)

    return known, sorted((row for row in rows if row["group"] in GROUPS), key=place)


def _known(kind, names, known):
    """The names in the order of `known`; all when there are none."""
    for name in names or ():
        if name not in known:
            raise InputError(f"unknown {kind} {name!r}{nearest(name, known)}; {kind}s are {', '.join(known)}")
    return [name for name in known if names is None or name in names]


def _import_torch():
    try:
        import torch
    except ImportError:
        return None
    return torch


def _duration(only, sizes, torch, compile, quick):
    if quick:
        return "under two minutes"
    share = {group: len(sizes) / len(SIZES) if group in SIZED else 1 for group in only}
    seconds = sum(SECONDS[group][torch is not None] * share[group] for group in only)
    words = f"about {_minutes(seconds)} on two cores of 128 GFLOP/s each"
    if torch is not None and compile and "step" in only:
        more = _minutes(2 * COMPILE_SECONDS * len(sizes))
        words += f", and {more} to compile when torch has no cache of it (not with --no-compile)"
    return words


def _minutes(seconds):
    n = max(1, round(seconds / 60))
    return "a minute" if n == 1 else f"{n} minutes"


def _ceilings(threads, effort):
    from cllm.bench import ceilings

    return ceilings.rows(threads, effort)


def _steps(sizes, threads, torch, effort, compile, say):
    for size in sizes:
        yield from steps.rows(size, threads, torch, effort, compile, say)


def _process():
    from cllm.bench import process

    return process


def _memory(sizes, threads, torch, quick):
    for size in sizes:
        yield from _process().step_rows(size, threads, torch)
    if not quick:
        yield from _process().head_rows(threads)
        yield from _process().attention_rows(threads)


def _sweeps(torch, quick, say):
    from cllm.bench import sweeps

    return () if quick else sweeps.rows(torch, say)


def _finish(rows, out, shown):
    """The end of the table; with `out` the whole table so far and the figures."""
    shown.say()
    shown.note(table.LEGEND)
    for line in table.summary(rows):
        shown.note(line)
    if out is None or not rows:
        return
    known, every = load(out)
    with open(Path(out, "table.txt"), "w", encoding="utf-8") as text:
        _write_table(known, every, text)
    from cllm.bench import figures

    shown.say()
    for written in [Path(out, records.FILE), Path(out, "table.txt"), *figures.draw(known, every, out)]:
        shown.say(str(written))


def _write_table(known, rows, text):
    whole = table.Table(text, 120)
    for label, words in known.items():
        whole.note(words, label)
    for row in rows:
        whole.row(row)
    whole.finish()
    whole.say()
    for line in (table.LEGEND, *table.summary(rows)):
        whole.note(line)
