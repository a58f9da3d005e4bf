"""Where the time of training steps goes, by kernel: [train] profile.

One step in `EVERY` runs with timing wrappers in place of the functions of `cllm.kernels`, which all of CLLM
calls as ``kernels.name(...)``, and of the Trainer's parts. Between these steps the originals are back.
A kernel's time includes the checks at its door; what the wrappers themselves cost counts nowhere.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import isfunction
from math import prod
from threading import Lock, get_ident
from time import perf_counter

import numpy as np

from cllm import kernels

__all__ = ["KERNELS", "Profile", "table"]

# A timed step takes longer, at L2 H2 C64 T32 B8 12 %, at L4 H4 C128 T64 B12 2 %: one in 32 is 0.4 and 0.1 %.
# The first steps are not typical: buffers and tables are made.
WARM_UP, EVERY = 3, 32
# No work on numbers; what gathering windows takes is the share of "data".
_OTHERS = ("alibi_slopes", "gap", "gather_windows", "get_num_threads", "set_num_threads", "span")
#: The functions that are timed.
KERNELS = tuple(name for name, f in vars(kernels).items() if isfunction(f) and name not in _OTHERS)
_timing = Lock()  # held while a step is timed


# Work ------------------------------------------------------------------------------------------------
# What an operation needs, as a function of the result and of the arguments under the door's names. A kernel
# that computes something again, as attention's backward pass its scores, does more. An exponential is one.


def _elements(n):
    """n operations for each element of the first argument."""
    return lambda result, *args, **options: n * np.size([*args, *options.values()][0])


def _matmul(result, a, b, *others, **options):
    return 2 * np.size(result) * np.shape(a)[-1]


def _linear(result, x, weight, *others, **options):
    return 2 * np.size(x) * len(weight)


def _linear_backward(result, dy, x, weight, *others, **options):
    return 4 * np.size(x) * len(weight)


def _linear_both(result, dlosses, x, weight, *others, needs=(True, True), **options):
    return 2 * (1 + sum(needs)) * np.size(x) * len(weight)


def _feed_forward(result, x, w1, b1, w2, *others, **options):
    return 2 * prod(np.shape(x)[:-1]) * (np.size(w1) + np.size(w2))


def _feed_forward_backward(result, dy, x, pre, w1, w2, **options):
    return 2 * _feed_forward(result, x, w1, None, w2)


def _pairs(T, S, is_causal):
    """How many pairs of a query and a key that it sees there are."""
    hidden = max(T - S, 0)
    return (T * (T + 1) - hidden * (hidden + 1)) // 2 if is_causal else T * S


def _attention(result, q, k, v, is_causal=False, *others, **options):
    B, H, T, D = np.shape(q)
    S, E = np.shape(v)[2:]
    return 2 * B * H * _pairs(T, S, is_causal) * (D + E)


def _attention_backward(result, dout, q, k, v, out, lse, is_causal=False, *others, **options):
    return 2 * _attention(result, q, k, v, is_causal)


def _packed_attention(result, qkv, n_head, *, n_kv_head=None, is_causal=True, **options):
    B, T, C = np.shape(qkv)
    D = C // (n_head + 2 * (n_kv_head or n_head))
    return 4 * B * n_head * _pairs(T, T, is_causal) * D


def _packed_attention_backward(result, dout, qkv, out, lse, n_head, **options):
    return 2 * _packed_attention(result, qkv, n_head, **options)


def _muon(result, param, grad, *others, ns_steps=5, **options):
    rows, columns = sorted(np.shape(param))
    return ns_steps * (4 * rows * rows * columns + 2 * rows**3)


FLOPS = {
    "matmul": _matmul,
    "linear_forward": _linear,
    "linear_backward": _linear_backward,
    "feed_forward_forward": _feed_forward,
    "feed_forward_backward": _feed_forward_backward,
    "attention_forward": _attention,
    "attention_backward": _attention_backward,
    "packed_attention_forward": _packed_attention,
    "packed_attention_backward": _packed_attention_backward,
    "linear_cross_entropy_forward": _linear,
    "linear_cross_entropy_backward": _linear_backward,
    "linear_cross_entropy_both": _linear_both,
    "cross_entropy_backward": lambda result, *args, **options: 4 * np.size(result),
    "cross_entropy_both": lambda result, *args, **options: 6 * np.size(result[1]),
    "soft_cross_entropy_backward": lambda result, *args, **options: 5 * np.size(result),
    "muon_update": _muon,
    "array_statistics": lambda result, arrays: 8 * sum(map(np.size, arrays)),
} | {
    name: _elements(n)
    for n, names in {
        0: "embedding_forward",
        1: "embedding_backward relu_forward relu_backward scale_",
        2: "relu_squared_forward dropout_forward dropout_backward mse_forward mse_backward l1_forward "
        "l1_backward clip_ sum_of_squares",
        3: "relu_squared_backward tanh_backward sigmoid_forward sigmoid_backward rotary_forward "
        "rotary_backward smooth_l1_forward smooth_l1_backward huber_forward huber_backward softmax_backward",
        4: "tanh_forward silu_forward softmax_forward log_softmax_forward log_softmax_backward "
        "cross_entropy_forward sgd_update",
        5: "swiglu_forward soft_cross_entropy_forward rms_norm_forward",
        6: "silu_backward bce_with_logits_forward bce_with_logits_backward layer_norm_forward lion_update",
        8: "swiglu_backward rms_norm_backward adagrad_update",
        10: "gelu_forward layer_norm_backward rmsprop_update adafactor_update",
        12: "gelu_backward adam_update adamw_update",
    }.items()
    for name in names.split()
}


def _arrays(values):
    """The arrays among values and in the tuples and lists among them, by id: each of them once."""
    found = {}
    for value in values:
        if isinstance(value, np.ndarray):
            found[id(value)] = value.nbytes
        elif isinstance(value, tuple | list):
            found |= _arrays(value)
    return found


def _bytes(name, result, args, options):
    """The bytes that must move at least: each array read once, or written once, or both."""
    if name == "embedding_forward":  # not the whole table
        return 2 * result.nbytes
    given = _arrays((*args, *options.values()))
    moved = sum((given | _arrays((result,))).values())
    if options.get("accumulate"):
        moved += sum(_arrays((options["out"],)).values())
    if result is None:  # changed in place, but for the gradient of an update
        moved += sum(given.values())
        if name.endswith("_update"):
            moved -= (args[1] if len(args) > 1 else options["grad"]).nbytes
    return moved


# Timing ----------------------------------------------------------------------------------------------


@dataclass
class _Row:
    """What was counted of a kernel or a part."""

    calls: int = 0
    own: float = 0.0  # seconds, without the timed calls inside
    whole: float = 0.0  # and with them
    flops: float = 0
    bytes: float = 0


class Profile:
    """Times one step in `EVERY` after the first ones.

    Parameters
    ----------
    trainer : object
        Whose methods the parts are.
    parts : dict of str to str
        Name of a method to the part of the step that it is; several may be one part.
    """

    def __init__(self, trainer, parts):
        self.trainer, self.parts = trainer, parts
        self.rows = {name: _Row() for name in (*KERNELS, *parts.values(), "other")}
        self.seen = self.steps = 0
        self.inside = [0.0]  # seconds of timed calls, in each that has not returned, with what timing costs
        self.overhead = 0.0  # seconds that timing costs

    def step(self, update):
        """update(), timed when its turn has come, unless one of another Trainer is."""
        self.seen += 1
        if self.seen <= WARM_UP or (self.seen - WARM_UP - 1) % EVERY or not _timing.acquire(blocking=False):
            return update()
        with ExitStack() as stack:
            stack.callback(_timing.release)
            stack.enter_context(self._wrapped())
            self.inside[:] = [0.0]
            overhead, began = self.overhead, perf_counter()
            try:
                return update()
            finally:
                seconds, other = perf_counter() - began, self.rows["other"]
                other.own += seconds - self.inside[0]
                other.whole += seconds - (self.overhead - overhead)
                self.steps += 1

    @contextmanager
    def _wrapped(self):
        kept = {name: getattr(kernels, name) for name in KERNELS}
        try:
            for name, function in kept.items():
                setattr(kernels, name, self._timed(function, name, self.rows[name]))
            for method, part in self.parts.items():
                timed = self._timed(getattr(self.trainer, method), None, self.rows[part])
                setattr(self.trainer, method, timed)
            yield
        finally:
            for name, function in kept.items():
                setattr(kernels, name, function)
            for method in self.parts:
                vars(self.trainer).pop(method, None)

    def _timed(self, function, kernel, row):
        """The function with its time, and a kernel's work, added to the row."""
        inside, flops_of, thread = self.inside, FLOPS.get(kernel), get_ident()

        def timed(*args, **options):
            if get_ident() != thread:  # no part of this step
                return function(*args, **options)
            inside.append(0.0)
            returned = False
            overhead, began = self.overhead, perf_counter()
            try:
                result = function(*args, **options)
                returned = True
                return result
            finally:
                ended = perf_counter()
                row.calls += 1
                row.own += ended - began - inside.pop()
                row.whole += ended - began - (self.overhead - overhead)
                if returned and flops_of is not None:
                    row.flops += flops_of(result, *args, **options)
                    row.bytes += _bytes(kernel, result, args, options)
                now = perf_counter()
                self.overhead += now - ended
                inside[-1] += now - began

        return timed

    def results(self):
        """What a run's summary holds: steps timed, milliseconds of one, and the shares.

        Returns
        -------
        dict
            ``parts``: each part's share of the step with its kernels. ``rows``: name, share, calls and ms a
            step, gflops and gb_per_s (None where nothing is counted), largest share first; those of the parts
            and of other without the kernels. The shares of the rows add up to 1, as do the parts'.
        """
        if not self.steps:
            return {"steps": 0}
        total = self.rows["other"].whole
        parts = {part: self.rows[part].whole / total for part in dict.fromkeys(self.parts.values())}
        rows = [
            {
                "name": name if name in KERNELS or name in ("data", "other") else f"{name}, outside kernels",
                "share": row.own / total,
                "calls": row.calls / self.steps if name in KERNELS else None,
                "ms": 1e3 * row.own / self.steps,
                "gflops": row.flops / row.own / 1e9 if row.flops else None,
                "gb_per_s": row.bytes / row.own / 1e9 if row.bytes else None,
            }
            for name, row in self.rows.items()
            if row.calls or name == "other"
        ]
        return {
            "steps": self.steps,
            "ms": 1e3 * total / self.steps,
            "parts": parts | {"other": 1 - sum(parts.values())},
            "rows": sorted(rows, key=lambda row: -row["share"]),
        }


def table(profile):
    """The lines that show what `Profile.results` gave, at most 78 characters wide."""
    if not profile["steps"]:
        return [f"profile: no step was timed, the first is step {WARM_UP + 1}"]
    steps = f"{profile['steps']} step{'s' * (profile['steps'] > 1)}"
    parts = ", ".join(f"{part} {100 * share:.1f} %" for part, share in profile["parts"].items())
    lines = [
        f"profile of {steps}, {_number(profile['ms'])} ms each:",
        f"  {parts}",
        f"{'':32}{'share':>8}{'calls':>7}{'ms':>10}{'GFLOP/s':>10}{'GB/s':>8}",
    ]
    for row in profile["rows"]:
        calls = "" if row["calls"] is None else f"{row['calls']:g}"
        rates = "".join(
            f"{'' if rate is None else f'{rate:.1f}':>{width}}"
            for rate, width in ((row["gflops"], 10), (row["gb_per_s"], 8))
        )
        lines.append(
            f"  {row['name']:30}{100 * row['share']:6.1f} %{calls:>7}{_number(row['ms']):>10}{rates}".rstrip()
        )
    return lines


def _number(value):
    """With three digits, but all that stand before the point."""
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"
