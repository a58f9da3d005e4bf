"""One step of a run again, in its own precision and in float64: which layer went wrong first.

What a guard kept of the step (`cllm.guard`), its weights and its batch, is all that this needs.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from cllm import checkpoint, guard, rng, saved
from cllm import task as tasks
from cllm.data import Batch
from cllm.errors import InputError
from cllm.nn import watching
from cllm.tensor import Tensor

__all__ = ["Replay", "Row", "replay"]

# A relative difference to float64 above this is no rounding any more; a sound layer's is about 1e-6.
WRONG = 1e-2


@dataclass(frozen=True)
class Row:
    """A module's output or input, or a parameter's gradient, in both precisions.

    Attributes
    ----------
    what : "output", "input" or "gradient"
    name : str
        Of the module or parameter, without a leading "transformer.".
    largest, exact : float
        Largest magnitude in the run's precision and in float64; NaN where there is one. `exact` and
        `difference` are None when the step does not run in float64.
    nonfinite : float
        Share of elements that are infinite or NaN in the run's precision, 0 to 1.
    difference : float
        |x - exact| / |exact|, of the 2-norms.
    """

    what: str
    name: str
    largest: float
    exact: float | None
    nonfinite: float
    difference: float | None

    @property
    def wrong(self):
        off = self.difference is not None and not self.difference <= WRONG
        return off or self.nonfinite > 0


@dataclass(frozen=True)
class Replay:
    """What `replay` found.

    Attributes
    ----------
    facts : dict
        What the guard noted: step, why, loss, lr, grad_norm.
    micro : int
        The micro-batch that the rows are of: the first in which something is wrong, else the first.
    loss, exact : float
        Its loss, in the run's precision and in float64; `exact` is None when it does not run in that.
    forward, backward : list of Row
        Outputs of modules in the order in which they ended, and the first input that was wrong although all
        outputs before it were sound; parameters' gradients, those of the last layers first.
    note : str
        Why it does not run in float64; empty when it does.
    """

    facts: dict
    micro: int
    loss: float
    exact: float | None
    forward: list
    backward: list
    note: str

    @property
    def verdict(self):
        """Which layer went wrong first, in a sentence."""
        for rows, of in (self.forward, "forward"), (self.backward, "backward"):
            for row in rows:
                if row.wrong:
                    return f"first wrong in the {of} pass: the {row.what} of {row.name} is {_described(row)}"
            if of == "forward" and not math.isfinite(self.loss):
                exact = "" if self.exact is None else f" (float64: {self.exact:g})"
                return f"all modules are sound, the loss itself is {self.loss:g}{exact}"
        if self.note:
            return "nothing is infinite or NaN"
        return "no layer differs from float64: the weights and this batch do give this loss and gradient"

    def lines(self):
        """The whole finding as lines of text."""
        yield f"step {self.facts['step']}: {self.facts['why']}"
        place = ", ".join(f"{name} {value}" for name, value in self.facts["position"].items())
        yield f"batch at {place} of the training data"
        exact = "" if self.exact is None else f", in float64 {self.exact:.6g}"
        yield f"micro-batch {self.micro}: loss {self.loss:.6g}{exact}"
        if self.note:
            yield self.note
        for title, rows in (("output of", self.forward), ("gradient of", self.backward)):
            names = [f"{row.name} (input)" if row.what == "input" else row.name for row in rows]
            width = max(map(len, (*names, title)))
            yield ""
            yield f"{title:<{width}}  {'largest':>8}  {'float64':>8}  inf/NaN  difference"
            for name, row in zip(names, rows):
                share = f"{row.nonfinite:.1%}" if row.nonfinite else ""
                mark = "  <- wrong" if row.wrong else ""
                exact = "" if row.exact is None else f"{row.exact:.2g}"
                off = "" if row.difference is None else f"{row.difference:.1e}"
                yield f"{name:<{width}}  {row.largest:>8.2g}  {exact:>8}  {share:>7}  {off:>10}{mark}"
        yield ""
        yield self.verdict


def _described(row):
    if not row.nonfinite:
        return f"finite, but off by {row.difference:.0%} from that in float64"
    part = "" if row.nonfinite == 1 else f" in {row.nonfinite:.1%} of its elements"
    if row.exact is None:
        return f"infinite or NaN{part}"
    return f"infinite or NaN{part}; in float64 it is {'not' if math.isfinite(row.exact) else 'so too'}"


def replay(run_dir, step=None, task=None):
    """Run a step that a guard kept again, in the run's precision and in float64.

    Parameters
    ----------
    run_dir : path-like
    step : int, optional
        Which step, as the records count, from 1; the last one unless given.
    task : cllm.Task, optional
        For a run whose task was given in Python: the same one again.

    Returns
    -------
    Replay

    Raises
    ------
    InputError
        When there is no run, it kept no such step, or a file of that is damaged.
    """
    run_dir = Path(run_dir)
    saved.check(run_dir)
    weights, batches, facts = guard.load_incident(_chosen(run_dir, step))
    config, found = saved.parts(run_dir, facts, task)
    model, loss = found.model, found.loss
    options = {
        f.name: getattr(config.loss, f.name) for f in fields(config.loss) if getattr(config.loss, f.name)
    }

    def run(micro, dtype):
        """Loss, outputs and gradients of a micro-batch in a precision."""
        model.flatten(dtype)
        model.load_state_dict(weights)
        model.train()
        model.zero_grad()
        batch = Batch(**{name: _cast(array, dtype) for name, array in batches[micro].items()})
        rng.set_stream(facts["seed"], facts["step"] - 1, micro)
        watch = _Outputs(model)
        with watching(model, watch):
            if loss is None:
                total, count = tasks.language_loss(model, batch, **options)
            else:
                total, count = tasks.checked_loss(loss(model, batch))
        (total * (1.0 / (count or 1))).backward()
        gradients = {name: p.grad.copy() for name, p in model.named_parameters() if p.grad is not None}
        return total.item() / (count or 1), watch.found, gradients

    found = []
    for micro in range(len(batches)):
        mean, seen, gradients = run(micro, weights[next(iter(weights))].dtype)
        exact, exact_seen, exact_gradients, note = None, {}, {}, ""
        try:
            exact, exact_seen, exact_gradients = run(micro, np.float64)
        except TypeError as error:  # of code of the user's own that makes float32 arrays
            note = f"it does not run in float64, so that only what is infinite or NaN is found: {error}"
        backward = [
            _row("gradient", _short(name), gradients[name], exact_gradients.get(name))
            for name in reversed(gradients)
        ]
        found.append(Replay(facts, micro, mean, exact, _forward(seen, exact_seen), backward, note))
        if any(row.wrong for row in found[-1].forward + found[-1].backward):
            return found[-1]
    return found[0]


def _chosen(run_dir, step):
    kept = guard.incidents(run_dir)
    if not kept:
        raise InputError(f"{run_dir} kept no step that went wrong, so there is none to replay")
    if step is None:
        return kept[-1]
    steps = {checkpoint.step_of(path): path for path in kept}
    if step not in steps:
        raise InputError(f"step is {step}, {run_dir} kept {' and '.join(map(str, steps))}")
    return steps[step]


def _cast(array, dtype):
    return array.astype(dtype) if array.dtype.kind == "f" else array


def _short(name):
    return name.removeprefix("transformer.")


def _forward(seen, exact):
    rows = []
    for key, (given, output) in seen.items():
        exact_given, exact_output = exact.get(key, (None, None))
        name = _short(key[0]) + f" (call {key[1] + 1})" * (key[1] > 0)
        if given is not None and not any(row.wrong for row in rows):
            before = _row("input", name, given, exact_given)
            rows += [before] * before.wrong
        rows.append(_row("output", name, output, exact_output))
    return rows


def _row(what, name, x, exact):
    largest, difference = float(np.abs(x).max(initial=0)), None
    nonfinite = float(np.mean(~np.isfinite(x))) if x.size else 0.0
    if exact is not None:
        with np.errstate(all="ignore"):
            size, off = float(np.linalg.norm(exact)), float(np.linalg.norm(x - exact))
            difference = off / size if size else off
        exact = float(np.abs(exact).max(initial=0))
    return Row(what, name, largest, exact, nonfinite, difference)


class _Outputs:
    """Keeps what each module was given and its output, in order; one that is called twice has two."""

    def __init__(self, model):
        self.names = {id(module): name or "the model" for name, module in model.named_modules()}
        self.found = {}  # (name, which call) -> first argument, None if those are no real numbers, and output
        self.calls = {}

    def wants(self, module, name):
        return False  # what was fused in the run stays so

    def offer(self, module, name, value):
        pass

    def output(self, module, value, given):
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, Tensor):
            name = self.names[id(module)]
            call = self.calls[name] = self.calls.get(name, -1) + 1
            given = given[0] if given else None
            given = given.data if isinstance(given, Tensor) else given
            real = isinstance(given, np.ndarray) and given.dtype.kind == "f"
            self.found[name, call] = given.copy() if real else None, value.data.copy()
