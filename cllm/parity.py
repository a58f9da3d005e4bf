"""Every kernel against float64 and against torch: one table of cases, which the tests share.

An `Operation` says how its inputs look, how the kernels compute its results from them, and how torch
does. The same `compute` runs on `cllm.kernels` and on `cllm.reference`, whose functions have the same
names and arguments; torch's results come from its own functions and its own backward pass.

``python -m cllm.parity`` prints a row an operation: the largest error of float32 and of float64 against
the float64 reference and against torch, each with the case that gave it. The exit status is 1 when an
error is over its bound.
"""

import argparse
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import numpy as np

from cllm import kernels, reference
from cllm.errors import nearest

__all__ = ["BOUNDS", "TABLE", "TORCH_BOUND", "Case", "Operation", "cases", "error", "measure"]

#: Largest error against float64, by dtype.
BOUNDS = {"float32": 1e-5, "float64": 1e-12}
#: Largest difference from torch, in either dtype.
TORCH_BOUND = 2e-5
# An element counts as at least this large in the norm that an error is divided by: a result that is 0 in
# exact arithmetic is rounding alone, of operands near 1.
FLOOR = 0.1


@dataclass(frozen=True)
class Operation:
    """One row of the table."""

    name: str
    #: The door's functions that `compute` calls, as "gelu_forward gelu_backward".
    calls: str
    #: Letter -> smallest and largest size that tests draw.
    sizes: dict[str, tuple[int, int]]
    #: Name -> shape, as "B G*R T D" (normal random numbers), or a function (rng, sizes) -> array. Names that
    #: begin with d are gradients of the outputs.
    inputs: dict[str, str | Callable]
    #: (door, inputs, **options) -> results by name; the door is `cllm.kernels` or `cllm.reference`.
    compute: Callable
    #: Sizes at which several threads share the work.
    large: dict[str, int]
    #: (torch, inputs, **options) -> outputs by name, or None when torch has no such thing.
    torch: Callable | None = None
    #: What is varied; each entry goes to `compute` and `torch`.
    options: tuple[dict, ...] = ({},)
    #: Name of an input -> factors that its drawn values are also multiplied by; None: into the subnormals.
    hard: dict[str, tuple] = field(default_factory=dict)
    #: The elements' least size in the norm of the result.
    floor: float = FLOOR


@dataclass(frozen=True)
class Case:
    """One computation of an operation."""

    operation: Operation
    sizes: dict[str, int]
    options: dict
    dtype: str
    hard: tuple | None = None
    seed: int = 0

    def __str__(self):
        words = [f"{letter}={n}" for letter, n in self.sizes.items()]
        words += [f"{name}={value}" for name, value in self.options.items()]
        if self.hard:
            words.append(f"{self.hard[0]} {'subnormal' if self.hard[1] is None else f'x {self.hard[1]:g}'}")
        return " ".join([*words, self.dtype])

    def inputs(self):
        """The input arrays, in the case's dtype; integers and booleans keep theirs."""
        rng = np.random.default_rng(self.seed)
        arrays = {}
        for name, drawn in self.operation.inputs.items():
            if isinstance(drawn, str):
                array = rng.standard_normal(shape_of(drawn, self.sizes))
            else:
                array = np.asarray(drawn(rng, self.sizes))
            if self.hard and self.hard[0] == name:
                tiny = float(np.finfo(self.dtype).smallest_normal) / 4
                array = array * (tiny if self.hard[1] is None else self.hard[1])
            arrays[name] = array.astype(self.dtype) if array.dtype.kind == "f" else array
        return arrays

    def results(self, arrays, door=kernels):
        """What the kernels, or another door to functions of the same names, make of arrays like `inputs`."""
        return self.operation.compute(door, SimpleNamespace(**arrays, sizes=self.sizes), **self.options)

    def reference_results(self, arrays):
        """What the float64 reference makes of the same numbers."""
        wide = {name: x.astype(np.float64) if x.dtype.kind == "f" else x for name, x in arrays.items()}
        with np.errstate(all="ignore"):
            return self.results(wide, reference)

    def torch_results(self, arrays, results):
        """What torch makes of them, with the gradients that `results` has; None: it has no such operation."""
        if self.operation.torch is None:
            return None
        import torch

        tensors = {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}
        for name, tensor in tensors.items():
            tensor.requires_grad_(f"d{name}" in results)
        outputs = self.operation.torch(torch, SimpleNamespace(**tensors, sizes=self.sizes), **self.options)
        if outputs is None:
            return None
        ends = [name for name in outputs if f"d{name}" in tensors]
        if ends:
            torch.autograd.backward([outputs[name] for name in ends], [tensors[f"d{name}"] for name in ends])
        results = {name: tensor.detach().numpy() for name, tensor in outputs.items()}
        return results | {f"d{name}": x.grad.numpy() for name, x in tensors.items() if x.grad is not None}


def shape_of(letters, sizes):
    """The shape that "B G*R T" names, for sizes by letter."""
    return tuple(
        int(np.prod([sizes[letter] if letter.isalpha() else int(letter) for letter in word.split("*")]))
        for word in letters.split()
    )


def cases(operation):
    """The operation's cases: the smallest sizes, ones, three drawn ones and large ones, each with each of the
    options; the hard inputs; all in both dtypes."""
    rng = np.random.default_rng(zlib.crc32(operation.name.encode()))
    smallest = {letter: low for letter, (low, _) in operation.sizes.items()}
    ones = {letter: max(low, 1) for letter, low in smallest.items()}
    drawn = [
        {letter: int(rng.integers(low, operation.sizes[letter][1] + 1)) for letter, low in ones.items()}
        for _ in range(3)
    ]
    for dtype in BOUNDS:
        for options in operation.options:
            for sizes in (smallest, ones, *drawn, operation.large):
                yield Case(operation, sizes, options, dtype)
            for name, factors in operation.hard.items():
                for factor in factors:
                    yield Case(operation, drawn[0], options, dtype, (name, factor))


def error(result, expected, floor=FLOOR):
    """Norm of the difference / norm of the expected array, whose elements count as at least `floor`.

    The same infinity or NaN in both is no difference; in one of them, it is infinite.
    """
    if np.shape(result) != np.shape(expected):
        return np.inf
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    same = (result == expected) | (np.isnan(result) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0, result - expected)
    size = np.maximum(np.where(np.isfinite(expected), np.abs(expected), 0), floor)
    ratio = np.sqrt(np.square(difference).sum() / max(np.square(size).sum(), floor**2))
    return np.inf if np.isnan(ratio) else float(ratio)


def largest_error(operation, results, expected):
    """The largest error of the results that `expected` has as well."""
    return max(
        (
            error(result, expected[name], operation.floor)
            for name, result in results.items()
            if result is not None and expected.get(name) is not None
        ),
        default=0.0,
    )


def measure(operation, with_torch=True):
    """The operation's largest errors.

    Returns
    -------
    dict
        "float32" and "float64" (against the reference) and "torch" -> (error, case); "torch" only where torch
        has the operation.
    """
    worst = {}
    for case in cases(operation):
        arrays = case.inputs()
        results = case.results(arrays)
        found = {case.dtype: largest_error(operation, results, case.reference_results(arrays))}
        theirs = case.torch_results(arrays, results) if with_torch else None
        if theirs is not None:
            found["torch"] = largest_error(operation, results, theirs)
        for column, value in found.items():
            if column not in worst or value > worst[column][0]:
                worst[column] = (value, case)
    return worst


# Drawing ---------------------------------------------------------------------------------------------


def _tokens(letters, below, ignored=None):
    """A function that draws integers under the size `below`; of each eight, about one is `ignored`."""

    def draw(rng, sizes):
        tokens = rng.integers(0, sizes[below], shape_of(letters, sizes))
        return tokens if ignored is None else np.where(rng.random(tokens.shape) < 1 / 8, ignored, tokens)

    return draw


def _uniform(letters, low=0.0, high=1.0):
    return lambda rng, sizes: rng.uniform(low, high, shape_of(letters, sizes))


def _booleans(letters, share=0.7):
    return lambda rng, sizes: rng.random(shape_of(letters, sizes)) < share


def _distributions(rng, sizes):
    """Each row's probabilities of V classes."""
    p = rng.random((sizes["N"], sizes["V"]))
    return p / p.sum(1, keepdims=True)


def _scores(rng, sizes):
    """A float mask (H, T, S): numbers to add, some minus infinity."""
    bias = rng.standard_normal(shape_of("G*R T S", sizes))
    return np.where(rng.random(bias.shape) < 0.2, -np.inf, bias)


def _qkv(rng, sizes):
    """Packed queries, keys and values, (B, T, (H + 2 G) D) with H = G R heads."""
    n = sizes["G"] * (sizes["R"] + 2)
    return rng.standard_normal((sizes["B"], sizes["T"], n * sizes["D"]))


# Computing: the kernels' way and torch's -------------------------------------------------------------


def _named(names, values):
    """Results by name: ("dq dk", (a, b)) -> {"dq": a, "dk": b}."""
    return dict(zip(names.split(), values if isinstance(values, tuple) else (values,)))


def _matmul(door, a, transposed=False):
    return {"y": door.matmul(a.a, a.b.swapaxes(-1, -2) if transposed else a.c)}


def _torch_matmul(torch, a, transposed=False):
    return {"y": a.a @ (a.b.transpose(-1, -2) if transposed else a.c)}


def _linear(door, a, bias=True):
    y = door.linear_forward(a.x, a.weight, a.bias if bias else None)
    return {"y": y} | _named("dx dweight dbias", door.linear_backward(a.dy, a.x, a.weight, bias=bias))


def _torch_linear(torch, a, bias=True):
    return {"y": torch.nn.functional.linear(a.x, a.weight, a.bias if bias else None)}


def _gelu(door, a, **options):
    y = door.gelu_forward(a.x, **options)
    return {"y": y, "dx": door.gelu_backward(a.dy, a.x, **options)}


def _torch_gelu(torch, a, approximate="none"):
    return {"y": torch.nn.functional.gelu(a.x, approximate=approximate)}


def _from_input(name):
    """A function of x whose backward pass takes x."""

    def compute(door, a):
        y = getattr(door, f"{name}_forward")(a.x)
        return {"y": y, "dx": getattr(door, f"{name}_backward")(a.dy, a.x)}

    return compute


def _from_output(name):
    """A function of x whose backward pass takes what the forward pass returned."""

    def compute(door, a):
        y = getattr(door, f"{name}_forward")(a.x)
        return {"y": y, "dx": getattr(door, f"{name}_backward")(a.dy, y)}

    return compute


def _torch_relu_squared(torch, a):
    return {"y": torch.relu(a.x).square()}


def _swiglu(door, a):
    y = door.swiglu_forward(a.gate, a.up)
    return {"y": y} | _named("dgate dup", door.swiglu_backward(a.dy, a.gate, a.up))


def _torch_swiglu(torch, a):
    return {"y": torch.nn.functional.silu(a.gate) * a.up}


def _feed_forward(door, a, bias=True, **options):
    y, pre = door.feed_forward_forward(
        a.x, a.w1, a.b1 if bias else None, a.w2, a.b2 if bias else None, **options
    )
    gradients = door.feed_forward_backward(a.dy, a.x, pre, a.w1, a.w2, bias=bias, **options)
    return {"y": y, "pre": pre} | _named("dx dw1 db1 dw2 db2", gradients)


def _torch_feed_forward(torch, a, activation="gelu_tanh", bias=True):
    F = torch.nn.functional
    pre = F.linear(a.x, a.w1, a.b1 if bias else None)
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    elif activation.startswith("gelu"):
        hidden = F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation == "relu_squared":
        hidden = torch.relu(pre).square()
    else:
        hidden = getattr(F, activation)(pre)
    return {"pre": pre, "y": F.linear(hidden, a.w2, a.b2 if bias else None)}


KEY = 0x1234_5678_9ABC_DEF0


def _dropout(door, a, p):
    return {"y": door.dropout_forward(a.x, p, KEY), "dx": door.dropout_backward(a.dy, p, KEY)}


def _layer_norm(door, a, eps=1e-5, bias=True):
    y, mean, rstd = door.layer_norm_forward(a.x, a.weight, a.bias if bias else None, eps)
    gradients = door.layer_norm_backward(a.dy, a.x, a.weight, mean, rstd, bias=bias)
    return {"y": y, "mean": mean, "rstd": rstd} | _named("dx dweight dbias", gradients)


def _torch_layer_norm(torch, a, eps=1e-5, bias=True):
    y, mean, rstd = torch.native_layer_norm(a.x, a.x.shape[-1:], a.weight, a.bias if bias else None, eps)
    return {"y": y, "mean": mean[..., 0], "rstd": rstd[..., 0]}


def _rms_norm(door, a, eps=1e-6, weight=True):
    weight = a.weight if weight else None
    y, rstd = door.rms_norm_forward(a.x, weight, eps)
    return {"y": y, "rstd": rstd} | _named("dx dweight", door.rms_norm_backward(a.dy, a.x, weight, rstd))


def _torch_rms_norm(torch, a, eps=1e-6, weight=True):
    return {"y": torch.nn.functional.rms_norm(a.x, a.x.shape[-1:], a.weight if weight else None, eps)}


def _rotary(door, a, offset=0, **options):
    offset = a.offsets if offset == "each" else offset
    y = door.rotary_forward(a.x, offset=offset, **options)
    return {"y": y, "dx": door.rotary_backward(a.dy, offset=offset, **options)}


def _attention(door, a, mask=None, slopes=False, offsets=False, **options):
    options["mask"] = {"boolean": a.seen, "float": a.bias, None: None}[mask]
    options["slopes"] = a.slopes if slopes else None
    options["offsets"] = a.offsets if offsets else None
    if "dropout_p" in options:
        options["key"] = KEY
    out, lse = door.attention_forward(a.q, a.k, a.v, **options)
    gradients = door.attention_backward(a.dout, a.q, a.k, a.v, out, lse, **options)
    return {"out": out, "lse": lse} | _named("dq dk dv", gradients)


def _torch_attention(
    torch, a, mask=None, slopes=False, offsets=False, is_causal=False, dropout_p=0.0, scale=None
):
    """Causal masks, slopes and offsets as one float mask, since torch takes either a mask or is_causal."""
    if dropout_p:
        return None
    (B, _, T, _), S = a.q.shape, a.k.shape[2]
    place = torch.arange(T) + (a.offsets if offsets else torch.zeros(B, dtype=torch.int64))[:, None]
    distance = (place[:, :, None] - torch.arange(S))[:, None]
    bias = torch.zeros((), dtype=a.q.dtype)
    if slopes:
        bias = bias - a.slopes[:, None, None] * distance.abs()
    if mask == "float":
        bias = bias + a.bias
    seen = torch.ones((), dtype=torch.bool)
    if is_causal:
        seen = seen & (distance >= 0)
    if mask == "boolean":
        seen = seen & a.seen
    bias = bias.masked_fill(~seen, -torch.inf).expand(*a.q.shape[:3], S)
    out = torch.nn.functional.scaled_dot_product_attention(
        a.q, a.k, a.v, attn_mask=bias, scale=scale, enable_gqa=True
    )
    return {"out": out}


def _packed_attention(door, a, slopes=False, **options):
    n_head = a.sizes["G"] * a.sizes["R"]
    options |= {"n_kv_head": a.sizes["G"], "slopes": a.slopes if slopes else None}
    if "dropout_p" in options:
        options["key"] = KEY
    out, lse = door.packed_attention_forward(a.qkv, n_head, **options)
    dqkv = door.packed_attention_backward(a.dout, a.qkv, out, lse, n_head, **options)
    return {"out": out, "lse": lse, "dqkv": dqkv}


def _torch_packed_attention(torch, a, is_causal=True, slopes=False, dropout_p=0.0, scale=None):
    if dropout_p or slopes:
        return None
    G, R, D = (a.sizes[letter] for letter in "GRD")
    B, T, _ = a.qkv.shape
    q, k, v = a.qkv.reshape(B, T, G * (R + 2), D).transpose(1, 2).split([G * R, G, G], dim=1)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return {"out": out.transpose(1, 2).reshape(B, T, G * R * D)}


def _embedding(door, a):
    y = door.embedding_forward(a.tokens, a.weight)
    return {"y": y, "dweight": door.embedding_backward(a.dy, a.tokens, len(a.weight))}


def _torch_embedding(torch, a):
    return {"y": torch.nn.functional.embedding(a.tokens, a.weight)}


def _targets(a, options):
    """Targets of which some are -100; with another ignore_index, none."""
    return a.tokens if "ignore_index" in options else a.targets


def _cross_entropy(door, a, weight=False, **options):
    targets, options["weight"] = _targets(a, options), a.class_weight if weight else None
    losses, lse = door.cross_entropy_forward(a.logits, targets, **options)
    dlogits = door.cross_entropy_backward(a.dlosses, a.logits, targets, lse, **options)
    return {"losses": losses, "lse": lse, "dlogits": dlogits}


def _torch_hard_losses(torch, logits, targets, weight, z_loss=0.0, ignore_index=-100, **options):
    losses = torch.nn.functional.cross_entropy(
        logits, targets, weight=weight, ignore_index=ignore_index, reduction="none", **options
    )
    lse = torch.logsumexp(logits, -1)
    if z_loss:  # torch has no such term: added from its own functions
        counted = targets != ignore_index
        share = counted * (1 if weight is None else weight[targets.where(counted, 0)])
        losses = losses + z_loss * share * lse.square()
    return {"losses": losses, "lse": lse}


def _torch_cross_entropy(torch, a, weight=False, **options):
    weight = a.class_weight if weight else None
    return _torch_hard_losses(torch, a.logits, _targets(a, options), weight, **options)


def _soft_cross_entropy(door, a, weight=False, mask=False, **options):
    options |= {"weight": a.class_weight if weight else None, "mask": a.counted if mask else None}
    losses, lse = door.soft_cross_entropy_forward(a.logits, a.probabilities, **options)
    dlogits = door.soft_cross_entropy_backward(a.dlosses, a.logits, a.probabilities, lse, **options)
    return {"losses": losses, "lse": lse, "dlogits": dlogits}


def _torch_soft_cross_entropy(torch, a, weight=False, mask=False, z_loss=0.0, **options):
    weight = a.class_weight if weight else None
    losses = torch.nn.functional.cross_entropy(
        a.logits, a.probabilities, weight=weight, reduction="none", **options
    )
    lse = torch.logsumexp(a.logits, -1)
    if z_loss:
        shares = a.probabilities if weight is None else a.probabilities * weight
        losses = losses + z_loss * shares.sum(-1) * lse.square()
    return {"losses": losses.where(a.counted, 0) if mask else losses, "lse": lse}


def _linear_cross_entropy(door, a, weight=False, **options):
    options["class_weight"] = a.class_weight if weight else None
    losses, lse = door.linear_cross_entropy_forward(a.x, a.weight, a.targets, **options)
    gradients = door.linear_cross_entropy_backward(a.dlosses, a.x, a.weight, a.targets, lse, **options)
    return {"losses": losses, "lse": lse} | _named("dx dweight", gradients)


def _torch_linear_cross_entropy(torch, a, weight=False, **options):
    logits = torch.nn.functional.linear(a.x, a.weight)
    return _torch_hard_losses(torch, logits, a.targets, a.class_weight if weight else None, **options)


def _loss(name):
    """An elementwise loss of input and target."""

    def compute(door, a, weights=False, **options):
        if weights:
            options |= {"weight": a.weight, "pos_weight": a.pos_weight}
        losses = getattr(door, f"{name}_forward")(a.input, a.target, **options)
        dinput = getattr(door, f"{name}_backward")(a.dlosses, a.input, a.target, **options)
        return {"losses": losses, "dinput": dinput}

    return compute


def _torch_loss(name):
    def run(torch, a, weights=False, **options):
        if weights:
            options |= {"weight": a.weight, "pos_weight": a.pos_weight}
        function = getattr(torch.nn.functional, name)
        return {"losses": function(a.input, a.target, reduction="none", **options)}

    return run


def _sgd(door, a, momentum=0.0, **options):
    param, buffer = a.param.copy(), np.zeros_like(a.param) if momentum else None
    for step, grad in enumerate(a.grads):
        door.sgd_update(param, grad, buffer, momentum=momentum, first=step == 0, **options)
    return {"param": param, "momentum_buffer": buffer}


def _adam(update):
    def compute(door, a, amsgrad=False, **options):
        param, m, v = a.param.copy(), np.zeros_like(a.param), np.zeros_like(a.param)
        v_max = np.zeros_like(param) if amsgrad else None
        for step, grad in enumerate(a.grads, start=1):
            getattr(door, update)(param, grad, m, v, step=step, v_max=v_max, **options)
        return {"param": param, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v_max}

    return compute


def _rmsprop(door, a, momentum=0.0, centered=False, **options):
    param, v = a.param.copy(), np.zeros_like(a.param)
    buffer = np.zeros_like(param) if momentum else None
    average = np.zeros_like(param) if centered else None
    for grad in a.grads:
        door.rmsprop_update(
            param, grad, v, momentum=momentum, momentum_buffer=buffer, grad_avg=average, **options
        )
    return {"param": param, "square_avg": v, "momentum_buffer": buffer, "grad_avg": average}


def _adagrad(door, a, **options):
    param, total = a.param.copy(), np.zeros_like(a.param)
    for step, grad in enumerate(a.grads, start=1):
        door.adagrad_update(param, grad, total, step=step, **options)
    return {"param": param, "sum": total}


def _lion(door, a, **options):
    param, m = a.param.copy(), np.zeros_like(a.param)
    for grad in a.grads:
        door.lion_update(param, grad, m, **options)
    return {"param": param, "m": m}


def _adafactor(door, a, **options):
    param = a.param.copy()
    row, column = np.zeros((len(param), 1), param.dtype), np.zeros((1, param.shape[1]), param.dtype)
    for step, grad in enumerate(a.grads, start=1):
        door.adafactor_update(param, grad, row, column, step=step, **options)
    return {"param": param, "row_var": row, "col_var": column}


def _adafactor_vector(door, a, **options):
    param, variance = a.param.copy(), np.zeros_like(a.param)
    for step, grad in enumerate(a.grads, start=1):
        door.adafactor_update(param, grad, variance=variance, step=step, **options)
    return {"param": param, "variance": variance}


def _muon(door, a, **options):
    param, buffer = a.param.copy(), np.zeros_like(a.param)
    for grad in a.grads:
        door.muon_update(param, grad, buffer, **options)
    return {"param": param, "momentum_buffer": buffer}


def _torch_optimizer(name):
    """A step of torch.optim's optimizer for each of grads: the parameter and what its state holds."""

    def run(torch, a, **options):
        if not a.param.numel():
            return None  # torch's Adafactor divides by it
        param = torch.nn.Parameter(a.param.detach().clone())
        optimizer = getattr(torch.optim, name)([param], **options)
        for grad in a.grads.detach():
            param.grad = grad.clone()
            # Muon's iteration rounds to bfloat16, an error of 1e-2: here it keeps the gradient's dtype.
            with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
                optimizer.step()
        return {"param": param} | {key: x for key, x in optimizer.state[param].items() if key != "step"}

    return run


def _in_place(change):
    """A function that changes a copy of x."""

    def compute(door, a):
        x = a.x.copy()
        change(door, x)
        return {"x": x}

    return compute


def _array_statistics(door, a):
    return {"statistics": door.array_statistics([a.x, a.y]).tolist()}


def _torch_array_statistics(torch, a):
    rows = [
        [x.double().square().sum(), x.abs().amax(), (x == 0).sum(), (~x.isfinite()).sum()]
        for x in (a.x.flatten(), a.y.flatten())
        if x.numel()
    ]
    return {"statistics": torch.tensor(rows)} if len(rows) == 2 else None


# The table -------------------------------------------------------------------------------------------

_ROWS = {"sizes": {"B": (0, 3), "T": (0, 7), "C": (1, 70)}, "large": {"B": 3, "T": 300, "C": 75}}
_FF = {
    "calls": "feed_forward_forward feed_forward_backward",
    "sizes": {"B": (0, 3), "T": (0, 20), "C": (0, 40), "F": (0, 70), "O": (0, 40)},
    "large": {"B": 3, "T": 150, "C": 33, "F": 130, "O": 35},
    "compute": _feed_forward,
    "torch": _torch_feed_forward,
}
_LOSSES = {
    "sizes": {"N": (0, 40), "V": (1, 140)},
    "large": {"N": 301, "V": 157},
    "hard": {"logits": (1e4, None)},
}


def _elementwise(name, compute, torch=None):
    return Operation(
        name=name,
        calls=f"{name}_forward {name}_backward",
        inputs={"x": "B T C", "dy": "B T C"},
        compute=compute(name),
        torch=torch or (lambda torch, a: {"y": getattr(torch.nn.functional, name)(a.x)}),
        hard={"x": (1e4, None)},
        **_ROWS,
    )


def _softmax(name):
    return Operation(
        name=name,
        calls=f"{name}_forward {name}_backward",
        inputs={"x": "B T C", "dy": "B T C"},
        compute=_from_output(name),
        torch=lambda torch, a: {"y": getattr(torch, name)(a.x, dim=-1)},
        hard={"x": (1e4, None)},
        **_ROWS,
    )


def _elementwise_loss(name, torch_name, options=({},), **inputs):
    return Operation(
        name=name,
        calls=f"{name}_forward {name}_backward",
        inputs={"input": "B T C", "target": "B T C", "dlosses": "B T C", **inputs},
        compute=_loss(name),
        torch=_torch_loss(torch_name),
        options=options,
        hard={"input": (1e4, None)},
        **_ROWS,
    )


def _optimizer(
    name, torch_name, compute, *options, shape="N M", largest=3, large=23001, steps=5, calls=None,
    hard=(1e4, None),
):
    """An update, applied `steps` times."""
    return Operation(
        name=name,
        calls=calls or f"{name}_update",
        sizes={"N": (0, 70)} | ({"M": (1, largest)} if "M" in shape else {}),
        large={"N": large} | ({"M": largest} if "M" in shape else {}),
        inputs={"param": shape, "grads": f"{steps} {shape}"},
        compute=compute,
        torch=torch_name and _torch_optimizer(torch_name),
        options=options,
        hard={"grads": hard},
    )


TABLE = (
    Operation(
        name="matmul",
        calls="matmul",
        sizes={"B": (0, 3), "M": (0, 40), "K": (0, 40), "N": (0, 70)},
        large={"B": 2, "M": 201, "K": 97, "N": 45},
        inputs={"a": "B M K", "b": "N K", "c": "B K N"},
        compute=_matmul,
        torch=_torch_matmul,
        options=({}, {"transposed": True}),
        hard={"a": (1e4, None)},
    ),
    Operation(
        name="linear",
        calls="linear_forward linear_backward",
        sizes={"B": (0, 3), "T": (0, 20), "I": (0, 70), "O": (0, 70)},
        large={"B": 3, "T": 301, "I": 345, "O": 99},
        inputs={"x": "B T I", "weight": "O I", "bias": "O", "dy": "B T O"},
        compute=_linear,
        torch=_torch_linear,
        options=({}, {"bias": False}),
        hard={"x": (1e4, None)},
    ),
    Operation(
        name="feed_forward",
        inputs={"x": "B T C", "w1": "F C", "b1": "F", "w2": "O F", "b2": "O", "dy": "B T O"},
        options=(
            {}, {"activation": "gelu", "bias": False}, {"activation": "relu"}, {"activation": "relu_squared"},
            {"activation": "silu"}, {"activation": "tanh"}, {"activation": "sigmoid"},
        ),
        **_FF,
    ),
    Operation(
        name="feed_forward (swiglu)",
        inputs={"x": "B T C", "w1": "2*F C", "b1": "2*F", "w2": "O F", "b2": "O", "dy": "B T O"},
        options=({"activation": "swiglu"}, {"activation": "swiglu", "bias": False}),
        **_FF,
    ),
    Operation(
        name="gelu",
        calls="gelu_forward gelu_backward",
        inputs={"x": "B T C", "dy": "B T C"},
        compute=_gelu,
        torch=_torch_gelu,
        options=({}, {"approximate": "tanh"}),
        hard={"x": (1e4, None)},
        **_ROWS,
    ),
    _elementwise("relu", _from_input),
    _elementwise("relu_squared", _from_input, torch=_torch_relu_squared),
    _elementwise("silu", _from_input),
    _elementwise("tanh", _from_output),
    _elementwise("sigmoid", _from_output),
    Operation(
        name="swiglu",
        calls="swiglu_forward swiglu_backward",
        inputs={"gate": "B T C", "up": "B T C", "dy": "B T C"},
        compute=_swiglu,
        torch=_torch_swiglu,
        hard={"gate": (1e4, None)},
        **_ROWS,
    ),
    _softmax("softmax"),
    _softmax("log_softmax"),
    Operation(
        name="dropout",
        calls="dropout_forward dropout_backward",
        inputs={"x": "B T C", "dy": "B T C"},
        compute=_dropout,
        options=({"p": 0.3}, {"p": 0.0}, {"p": 1.0}),
        **_ROWS,
    ),
    Operation(
        name="layer_norm",
        calls="layer_norm_forward layer_norm_backward",
        inputs={"x": "B T C", "weight": "C", "bias": "C", "dy": "B T C"},
        compute=_layer_norm,
        torch=_torch_layer_norm,
        options=({}, {"bias": False, "eps": 1e-3}),
        hard={"x": (1e4, None)},
        floor=1.0,  # with one channel dx is 0, a difference of numbers near rstd, 316
        **_ROWS,
    ),
    Operation(
        name="rms_norm",
        calls="rms_norm_forward rms_norm_backward",
        inputs={"x": "B T C", "weight": "C", "dy": "B T C"},
        compute=_rms_norm,
        torch=_torch_rms_norm,
        options=({}, {"weight": False, "eps": 1e-3}),
        hard={"x": (1e4, None)},
        floor=1.0,
        **_ROWS,
    ),
    Operation(
        name="rotary",
        calls="rotary_forward rotary_backward",
        sizes={"B": (0, 3), "H": (0, 3), "T": (0, 20), "D": (0, 20)},
        large={"B": 2, "H": 3, "T": 301, "D": 33},
        inputs={
            "x": "B H T 2*D", "dy": "B H T 2*D",
            "offsets": lambda rng, sizes: rng.integers(0, 99, sizes["B"]),
        },
        compute=_rotary,
        options=({}, {"offset": 7, "base": 100.0}, {"offset": "each"}),
    ),
    Operation(
        name="attention",
        calls="attention_forward attention_backward",
        sizes={"B": (0, 2), "G": (1, 2), "R": (1, 3), "T": (0, 70), "S": (0, 70), "D": (1, 40), "E": (1, 40)},
        large={"B": 2, "G": 2, "R": 2, "T": 101, "S": 103, "D": 33, "E": 35},
        inputs={
            "q": "B G*R T D", "k": "B G S D", "v": "B G S E", "dout": "B G*R T E",
            "seen": _booleans("B 1 T S"), "bias": _scores, "slopes": _uniform("G*R"),
            "offsets": lambda rng, sizes: rng.integers(0, sizes["S"] + 3, sizes["B"]),
        },
        compute=_attention,
        torch=_torch_attention,
        options=(
            {}, {"is_causal": True}, {"scale": 0.7}, {"mask": "boolean"},
            {"mask": "float", "is_causal": True}, {"slopes": True, "is_causal": True},
            {"offsets": True, "slopes": True, "is_causal": True},
            {"dropout_p": 0.3, "is_causal": True}, {"dropout_p": 0.3, "mask": "boolean"},
        ),
        hard={"q": (None,)},
        floor=1.0,  # with one visible key dq and dk are 0, and sums of D or T roundings
    ),
    Operation(
        name="packed_attention",
        calls="packed_attention_forward packed_attention_backward",
        sizes={"B": (0, 2), "G": (1, 2), "R": (1, 3), "T": (0, 70), "D": (1, 40)},
        large={"B": 2, "G": 2, "R": 2, "T": 101, "D": 33},
        inputs={"qkv": _qkv, "dout": "B T G*R*D", "slopes": _uniform("G*R")},
        compute=_packed_attention,
        torch=_torch_packed_attention,
        options=({}, {"is_causal": False, "scale": 0.3}, {"dropout_p": 0.3, "slopes": True}),
        floor=1.0,
    ),
    Operation(
        name="embedding",
        calls="embedding_forward embedding_backward",
        sizes={"B": (0, 3), "T": (0, 40), "V": (1, 70), "C": (0, 70)},
        large={"B": 3, "T": 301, "V": 70, "C": 99},
        inputs={"tokens": _tokens("B T", "V"), "weight": "V C", "dy": "B T C"},
        compute=_embedding,
        torch=_torch_embedding,
    ),
    Operation(
        name="cross_entropy",
        calls="cross_entropy_forward cross_entropy_backward",
        inputs={
            "logits": "N V", "targets": _tokens("N", "V", -100), "tokens": _tokens("N", "V"),
            "class_weight": _uniform("V", 0.1, 2.0), "dlosses": "N",
        },
        compute=_cross_entropy,
        torch=_torch_cross_entropy,
        options=(
            {}, {"label_smoothing": 0.1}, {"ignore_index": 0}, {"z_loss": 0.01},
            {"weight": True, "label_smoothing": 0.3, "z_loss": 0.01},
        ),
        **_LOSSES,
    ),
    Operation(
        name="soft_cross_entropy",
        calls="soft_cross_entropy_forward soft_cross_entropy_backward",
        inputs={
            "logits": "N V", "probabilities": _distributions, "counted": _booleans("N"),
            "class_weight": _uniform("V", 0.1, 2.0), "dlosses": "N",
        },
        compute=_soft_cross_entropy,
        torch=_torch_soft_cross_entropy,
        options=({}, {"label_smoothing": 0.1, "mask": True}, {"weight": True, "z_loss": 0.01}),
        **_LOSSES,
    ),
    Operation(
        name="linear_cross_entropy",
        calls="linear_cross_entropy_forward linear_cross_entropy_backward",
        sizes={"N": (0, 40), "C": (0, 40), "V": (1, 140)},
        large={"N": 301, "C": 33, "V": 157},
        inputs={
            "x": "N C", "weight": "V C", "targets": _tokens("N", "V", -100),
            "class_weight": _uniform("V", 0.1, 2.0), "dlosses": "N",
        },
        compute=_linear_cross_entropy,
        torch=_torch_linear_cross_entropy,
        options=({}, {"weight": True, "label_smoothing": 0.1, "z_loss": 0.01}),
    ),
    _elementwise_loss("mse", "mse_loss"),
    _elementwise_loss("l1", "l1_loss"),
    _elementwise_loss("smooth_l1", "smooth_l1_loss", ({}, {"beta": 0.3}, {"beta": 0.0})),
    _elementwise_loss("huber", "huber_loss", ({}, {"delta": 0.3})),
    _elementwise_loss(
        "bce_with_logits", "binary_cross_entropy_with_logits", ({}, {"weights": True}),
        target=_uniform("B T C"), weight=_uniform("B T C"), pos_weight=_uniform("B T C", 0.1, 3.0),
    ),
    _optimizer(
        "sgd", "SGD", _sgd,
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ),
    _optimizer(
        "adam", "Adam", _adam("adam_update"),
        {"lr": 0.1},
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True},
    ),
    _optimizer(
        "adamw", "AdamW", _adam("adamw_update"),
        {"lr": 0.1},
        {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3, "amsgrad": True, "maximize": True},
    ),
    _optimizer(
        "rmsprop", "RMSprop", _rmsprop,
        {"lr": 0.1},
        {"lr": 0.1, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 0.1, "alpha": 0.9, "centered": True},
    ),
    _optimizer(
        "adagrad", "Adagrad", _adagrad,
        {"lr": 0.1}, {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.1, "eps": 1e-6},
    ),
    _optimizer(
        "lion", None, _lion, {"lr": 0.1}, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3},
        hard=(1e4,),  # a subnormal moment becomes 0, and so its sign
    ),
    _optimizer(
        "adafactor", "Adafactor", _adafactor,
        {"lr": 0.1, "eps": (1e-7, 1e-3)}, {"lr": 0.1, "eps": (1e-7, 1e-2), "d": 3.0, "weight_decay": 0.1},
        largest=40, large=1001,
    ),
    _optimizer(
        "adafactor (vector)", "Adafactor", _adafactor_vector,
        {"lr": 0.1, "eps": (1e-7, 1e-3)}, {"lr": 0.1, "eps": (1e-7, 1e-2), "beta2_decay": -0.5},
        shape="N", calls="adafactor_update",
    ),
    _optimizer(
        "muon", "Muon", _muon,
        {"lr": 0.1}, {"lr": 0.1, "nesterov": False, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"},
        largest=40, large=301, steps=2,
    ),
    Operation(
        name="sum_of_squares",
        calls="sum_of_squares",
        inputs={"x": "B T C"},
        compute=lambda door, a: {"total": door.sum_of_squares(a.x)},
        torch=lambda torch, a: {"total": a.x.double().square().sum()},
        **_ROWS,
    ),
    Operation(
        name="array_statistics",
        calls="array_statistics",
        inputs={"x": "B T C", "y": "C"},
        compute=_array_statistics,
        torch=_torch_array_statistics,
        **_ROWS,
    ),
    Operation(
        name="scale_",
        calls="scale_",
        inputs={"x": "B T C"},
        compute=_in_place(lambda door, x: door.scale_(x, 0.3)),
        torch=lambda torch, a: {"x": a.x * 0.3},
        **_ROWS,
    ),
    Operation(
        name="clip_",
        calls="clip_",
        inputs={"x": "B T C"},
        compute=_in_place(lambda door, x: door.clip_(x, 0.7)),
        torch=lambda torch, a: {"x": a.x.clamp(-0.7, 0.7)},
        **_ROWS,
    ),
)  # fmt: skip


# Printing --------------------------------------------------------------------------------------------

HEADER = ["operation", "float32", "float64", "case", "torch", "case against torch"]


def _row(name, worst):
    """A line of the table; the first case is the one of float32 or float64 that is nearer to its bound."""
    nearer = max(BOUNDS, key=lambda dtype: worst[dtype][0] / BOUNDS[dtype])
    torch, case = worst.get("torch", (None, "-"))
    errors = [f"{worst[dtype][0]:.1e}" for dtype in BOUNDS]
    return [name, *errors, str(worst[nearer][1]), "-" if torch is None else f"{torch:.1e}", str(case)]


def _print(rows, markdown):
    if markdown:
        for row in [HEADER, ["---"] * len(HEADER), *rows]:
            print(f"| {' | '.join(row)} |")
        return
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    for row in [HEADER, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _torch_version():
    try:
        import torch
    except ImportError:
        return None
    return torch.__version__.partition("+")[0]


def main(arguments=None):
    """Print the table; the exit status, 1 when an error is over its bound."""
    parser = argparse.ArgumentParser(prog="python -m cllm.parity", description=__doc__.partition("\n\n")[0])
    parser.add_argument("operations", nargs="*", help="rows of the table; all when none is named")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    chosen = parser.parse_args(arguments)
    by_name = {operation.name: operation for operation in TABLE}
    for name in chosen.operations:
        if name not in by_name:
            print(f"no operation {name!r}{nearest(name, by_name)}", file=sys.stderr)
            return 2
    version = _torch_version()
    if version is not None:
        import torch

        torch.set_num_threads(1)  # a second pool of threads would wait for the kernels' one, and they for it
    rows, over = [], []
    for name in chosen.operations or by_name:
        worst = measure(by_name[name], version is not None)
        rows.append(_row(name, worst))
        over += [
            f"{name} {case}: {value:.1e} against {'torch' if column == 'torch' else 'float64'}"
            for column, (value, case) in worst.items()
            if not value <= BOUNDS.get(column, TORCH_BOUND)
        ]
    _print(rows, chosen.markdown)
    print()
    print(
        f"Norm of the error / norm of the result. Bounds: {BOUNDS['float32']:g} (float32) and "
        f"{BOUNDS['float64']:g} (float64) against float64, {TORCH_BOUND:g} against torch. "
        f"Kernels: {kernels.isa}, {kernels.get_num_threads()} threads; "
        + (f"torch {version}." if version else "torch is not installed: that column is empty.")
    )
    for line in over:
        print(f"over its bound: {line}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
