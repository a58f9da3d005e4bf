"""What a run's checkpoints hold, in words: `cllm inspect`."""

import textwrap
from pathlib import Path

import numpy as np

from cllm import arrays, checkpoint, files, guard, records
from cllm.errors import InputError
from cllm.progress import duration, thousands

__all__ = ["lines"]


def lines(run_dir, which="last"):
    """A run's checkpoints, each verified, and one of them in full.

    Parameters
    ----------
    run_dir : path-like
    which : "last", "best" or int
        The newest that is whole, the one with the lowest validation loss, or that of a step.

    Returns
    -------
    lines : list of str
    intact : bool
        Whether all of the checkpoints are whole.

    Raises
    ------
    InputError
        When there is no run, no checkpoint, or not the one that was asked for.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.toml").is_file():
        raise InputError(f"{run_dir} holds no run: it has no config.toml")
    paths = checkpoint.listed(run_dir)
    if not paths:
        raise InputError(f"{run_dir} has no checkpoint yet; continue it with: cllm resume {run_dir}")
    if isinstance(which, int) and which not in map(checkpoint.step_of, paths):
        there = ", ".join(str(checkpoint.step_of(path)) for path in paths)
        raise InputError(f"{run_dir} has no checkpoint of step {which}, it has {there}")
    whole, rows = {}, []
    best = None
    for path in paths:
        row = f"  step {checkpoint.step_of(path):<9} {_megabytes(path):>9}  "
        try:
            found = whole[path] = checkpoint.entry(checkpoint.verify(path))
            losses = _losses(found["state"]).items()
            losses = [f"{key} {value:.4f}" for key, value in losses if key != "train loss"]
            if (found["state"].get("best") or {}).get("step") == found["step"]:
                best = path
            rows.append([row + ", ".join(["verified", *losses]), path])
        except (InputError, OSError) as error:
            rows.append([f"{row}damaged: {files.why(error) if isinstance(error, OSError) else error}", path])
    out = [f"{run_dir}: {records.Run(run_dir).state}"]
    if wrong := [str(checkpoint.step_of(path)) for path in guard.incidents(run_dir)]:
        steps = f"step{'s' * (len(wrong) > 1)} {', '.join(wrong)}"
        out.append(f"went wrong in {steps}; for a closer look: cllm replay {run_dir} --step {wrong[-1]}")
    out.append("checkpoints")
    out += [row + ", the best" * (path == best) for row, path in rows]
    chosen = best if which == "best" else next(
        (path for path in reversed(paths) if path in whole and which in ("last", checkpoint.step_of(path))),
        None,
    )  # fmt: skip
    if chosen is None and which != "last":
        raise InputError(f"{run_dir} has no whole checkpoint that is {'of step ' * (which != 'best')}{which}")
    if chosen is not None:
        out += ["", str(chosen), *_details(chosen, whole[chosen]["state"])]
    return out, len(whole) == len(paths)


def _details(path, state):
    """One checkpoint: its state in words, the arrays by name."""
    model, optimizer = (arrays.header(path / name) for name in checkpoint.ARRAY_FILES)
    rows = [(key, f"{value:.6g}") for key, value in _losses(state).items()]
    if position := state.get("position"):
        rows.append(("position", _said(position)))
    if state.get("best"):
        rows.append(("best", _said(state["best"])))
    rows.append(("trained for", duration(state.get("seconds", 0.0))))
    for part in state.get("environments", []):
        rows.append((f"from step {part['step']}", _said({k: v for k, v in part.items() if k != "step"})))
    single = ("threads", "units", "vocab_size", "data_hash", "examples")
    rows += [(key.replace("_", " "), str(state[key])) for key in single if key in state]
    rows += [("file", f"{name}, SHA-256 {sha256}") for name, sha256 in (state.get("files") or {}).items()]
    for number, group in enumerate(state.get("optimizer", [])):
        rows.append((f"group {number}", _said(group)))
    rows.append(("random", ", ".join(state.get("random", ())) or "not kept"))
    for key in ("callbacks", "metrics"):
        if state.get(key):
            rows.append((key, f"the states of {len(state[key])}"))
    if state.get("state") is not None:
        rows.append(("state", f"of the loop's own: {', '.join(state['state']) or 'empty'}"))
    out = [line for row in rows for line in _wrapped(*row)]
    out += ["", f"model: {_sum(model.values())}", *_table(model)]
    kinds = {}
    for name, (dtype, shape) in optimizer.items():
        kinds.setdefault(name.rpartition(".")[0] or name, []).append((dtype, shape))
    out += ["", f"optimizer: {_sum(optimizer.values())}" if optimizer else "optimizer: nothing"]
    return out + [f"  {name:14} {_sum(found)}" for name, found in kinds.items()]


def _wrapped(label, text, width=80):
    head = f"  {label:12} "
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))


def _table(found):
    width = max(map(len, found), default=0)
    return [
        f"  {name:{width}}  {dtype.name:8} {' x '.join(map(str, shape)) or 'one number'}"
        for name, (dtype, shape) in sorted(found.items(), key=lambda item: _natural(item[0]))
    ]


def _natural(name):
    """h.2 before h.10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _sum(found):
    found = list(found)
    count = sum(int(np.prod(shape, dtype=object)) for _, shape in found)
    kinds = ", ".join(sorted({dtype.name for dtype, _ in found}))
    return f"{len(found)} array{'s' * (len(found) != 1)} of {kinds}, {thousands(count)} numbers"


def _losses(state):
    found = {key: value for key, value in state.items() if key.endswith("_loss")}
    found |= {f"{split}_loss": value for split, value in (state.get("losses") or {}).items()}
    return {key.replace("_", " "): value for key, value in found.items() if isinstance(value, float | int)}


def _said(values):
    shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def _megabytes(path):
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
