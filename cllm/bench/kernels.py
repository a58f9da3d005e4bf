"""The kernels' rows: each beside torch, matrix products beside NumPy's OpenBLAS as well.

A case names its work and knows how to make it: `make(torch, R)` gives the sides, functions without
arguments, over arrays from `R(*shape)`. Without torch the sides are CLLM and plain NumPy. Bytes
count each array that a pass must read or write once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import cllm
from cllm import functional, kernels
from cllm._kernels import gemm
from cllm.bench import records, timing
from cllm.bench.steps import SIZES
from cllm.tensor import Parameter, Tensor

__all__ = ["GROUPS", "Case", "cases", "rows"]

OURS = records.OURS
#: The groups of cases, in the table's order.
GROUPS = ("gemm", "attention", "gelu", "ffn", "optimizer", "loss", "norm")
SCALE = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class Case:
    """One row: see the head of this file. `memory` is what all sides need, in bytes."""

    group: str
    name: str
    make: Callable
    target: float | None = None
    flops: float = 0
    n_bytes: float = 0
    memory: float = 0
    heavy: bool = False  # left out by --quick
    more: dict = field(default_factory=dict)


def cases(group, sizes=tuple(SIZES)):
    """The cases of a group, as an iterator; of the matrix products those of the named sizes."""
    return {
        "gemm": lambda: _products(sizes), "attention": _attention, "gelu": _gelu, "ffn": _feed_forward,
        "optimizer": _optimizers, "loss": _losses, "norm": _norms,
    }[group]()  # fmt: skip


def rows(group, threads, torch, effort, sizes=tuple(SIZES), quick=False, say=print):
    """Measure the cases of a group: a generator of rows."""
    for case in cases(group, sizes):
        if quick and case.heavy:
            continue
        if case.memory > 0.8 * available_memory():
            say(f"{case.name} is left out: it needs {case.memory / 1e9:.1f} GB of memory")
            continue
        rng = np.random.default_rng(0)
        sides = case.make(torch, lambda *shape, rng=rng: rng.standard_normal(shape, dtype=np.float32))
        if timing.openblas() is None and group == "gemm":
            del sides["NumPy"]  # with threads of its own choosing
        seconds = timing.measure({(name, threads): call for name, call in sides.items()}, effort)
        samples = {name: times for (name, _), times in seconds.items()}
        # The targets are about torch; OpenBLAS is NumPy's part of the matrix products.
        reached = ("torch", "NumPy") if group == "gemm" else ("torch",)
        targets = {name: case.target for name in reached if name in samples and case.target}
        more = {"targets": targets, "flops": case.flops, "n_bytes": case.n_bytes, **case.more}
        yield records.row(group, case.name, threads, samples, **more)


def available_memory():
    """Bytes that can be used without swapping; infinity where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


# Matrix products -------------------------------------------------------------------------------------


def _products(sizes):
    for size in sizes:
        _, _, C, T, B, V = SIZES[size]
        layers = {"qkv": (3 * C, C), "proj": (C, C), "fc": (4 * C, C), "fc2": (C, 4 * C), "head": (V, C)}
        for layer, (N, K) in layers.items():
            for step in ("fwd", "dX", "dW"):
                yield Case(
                    "gemm", f"{size} {layer} {step}", _product(B * T, N, K, step), 1.08,
                    flops=2 * B * T * N * K, n_bytes=4 * (B * T * (N + K) + N * K),
                    heavy=B * T * N * K > 3e8,
                    more={"size": size, "layer": layer, "pass": step, "shape": [B * T, N, K]},
                )  # fmt: skip


def _product(M, N, K, step):
    def make(torch, R):
        x, w, dy = R(M, K), R(N, K), R(M, N)
        a, b = {"fwd": (x, w.T), "dX": (dy, w), "dW": (dy.T, x)}[step]
        y = np.empty((a.shape[0], b.shape[1]), np.float32)
        # As linear layers call them: behind their one check of shapes.
        ours = {
            "fwd": lambda: gemm.linear_forward(x, w, None, y, cllm.get_num_threads()),
            "dX": lambda: gemm.linear_backward_input(dy, w, y, cllm.get_num_threads()),
            "dW": lambda: gemm.linear_backward_weight(dy, x, y, False, cllm.get_num_threads()),
        }[step]
        sides = {OURS: ours, "NumPy": lambda: np.matmul(a, b, out=y)}
        if torch:
            ta, tb, ty = map(torch.from_numpy, (a, b, y))
            sides["torch"] = lambda: torch.mm(ta, tb, out=ty)
        return sides

    return make


# Attention, activations, feed-forward ----------------------------------------------------------------


def _attention():
    for shape, target in (
        ((12, 4, 64, 32), 2.0), ((16, 6, 256, 64), 1.9), ((4, 12, 1024, 64), 1.7), ((1, 8, 8192, 64), 1.2),
    ):  # fmt: skip
        B, H, T, D = shape

        def make(torch, R, shape=shape):
            q, k, v, dout = (R(*shape) for _ in range(4))

            def ours():
                out, lse = kernels.attention_forward(q, k, v, True)
                kernels.attention_backward(dout, q, k, v, out, lse, True)

            if torch is None:
                return {OURS: ours, "NumPy": lambda: _numpy_attention(dout, q, k, v)}
            tq, tk, tv = (torch.from_numpy(x).requires_grad_() for x in (q, k, v))
            tdout = torch.from_numpy(dout)

            def theirs():
                tq.grad = tk.grad = tv.grad = None
                torch.nn.functional.scaled_dot_product_attention(tq, tk, tv, is_causal=True).backward(tdout)

            return {OURS: ours, "torch": theirs}

        yield Case(
            "attention", f"attention {B},{H},{T},{D}", make, target, flops=6 * B * H * D * T * (T + 1),
            n_bytes=4 * 12 * B * H * T * D, heavy=T >= 1024,
            memory=(12 * B * H * T * D + 4 * B * H * T * T) * 4,
        )  # fmt: skip


def _numpy_attention(dout, q, k, v):
    T, scale = q.shape[2], q.shape[3] ** -0.5
    scores = q @ k.swapaxes(2, 3) * np.float32(scale)
    scores[..., np.triu_indices(T, 1)[0], np.triu_indices(T, 1)[1]] = -np.inf
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    out = scores @ v
    dv = scores.swapaxes(2, 3) @ dout
    d = dout @ v.swapaxes(2, 3)
    d -= (dout * out).sum(-1, keepdims=True)
    d *= scores * np.float32(scale)
    return out, d @ k, d.swapaxes(2, 3) @ q, dv


def _gelu():
    n = 6_000_000
    for mode, name, target in (("tanh", "tanh", 4.0), ("none", "erf", 1.4)):

        def forward(torch, R, mode=mode):
            x = R(n)
            y = np.empty_like(x)
            sides = {OURS: lambda: kernels.gelu_forward(x, mode, out=y)}
            if torch:
                tx = torch.from_numpy(x)
                sides["torch"] = lambda: torch.nn.functional.gelu(tx, approximate=mode)
            elif mode == "tanh":
                sides["NumPy"] = lambda: _numpy_gelu(x)
            return sides

        def backward(torch, R, mode=mode):
            x, dy = R(n), R(n)
            dx = np.empty_like(x)
            sides = {OURS: lambda: kernels.gelu_backward(dy, x, mode, out=dx)}
            if torch:
                tx, tdy = torch.from_numpy(x), torch.from_numpy(dy)
                sides["torch"] = lambda: torch.ops.aten.gelu_backward(tdy, tx, approximate=mode)
            elif mode == "tanh":
                sides["NumPy"] = lambda: _numpy_gelu_backward(dy, x)
            return sides

        yield Case("gelu", f"GELU {name} fwd, 6 M", forward, target, n_bytes=8 * n)
        yield Case("gelu", f"GELU {name} bwd, 6 M", backward, target, n_bytes=12 * n)


def _numpy_gelu(x):
    return 0.5 * x * (1 + np.tanh(SCALE * (x + 0.044715 * x * x * x)))


def _numpy_gelu_backward(dy, x):
    tanh = np.tanh(SCALE * (x + 0.044715 * x * x * x))
    return dy * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * SCALE * (1 + 3 * 0.044715 * x * x))


def _feed_forward():
    for C, M in ((128, 768), (384, 4096), (768, 256)):

        def make(torch, R, C=C, M=M):
            x, w1, b1, w2, b2 = R(M, C), R(4 * C, C) / 20, R(4 * C), R(C, 4 * C) / 20, R(C)
            dy = R(M, C)
            out = tuple(np.empty_like(a) for a in (x, w1, b1, w2, b2))

            def ours():
                _, pre = kernels.feed_forward_forward(x, w1, b1, w2, b2)
                kernels.feed_forward_backward(dy, x, pre, w1, w2, out=out)

            def numpy():
                pre = x @ w1.T + b1
                hidden = _numpy_gelu(pre)
                y = hidden @ w2.T + b2
                dpre = _numpy_gelu_backward(dy @ w2, pre)
                return y, dpre @ w1, dpre.T @ x, dpre.sum(0), dy.T @ hidden, dy.sum(0)

            if torch is None:
                return {OURS: ours, "NumPy": numpy}
            F = torch.nn.functional
            ts = [torch.from_numpy(a).requires_grad_() for a in (x, w1, b1, w2, b2)]
            tdy = torch.from_numpy(dy)

            def theirs():
                for t in ts:
                    t.grad = None
                hidden = F.gelu(F.linear(ts[0], ts[1], ts[2]), approximate="tanh")
                F.linear(hidden, ts[3], ts[4]).backward(tdy)

            return {OURS: ours, "torch": theirs}

        # x, dy, y, dx; pre and hidden there and back; the weights forward, backward and their gradients
        yield Case(
            "ffn", f"feed-forward C{C}, {M} rows", make, 1.25, flops=48 * M * C * C,
            n_bytes=4 * (4 * M * C + 16 * M * C + 24 * C * C), heavy=C > 128,
        )  # fmt: skip


# Optimizers ------------------------------------------------------------------------------------------


def _optimizers():
    for n, target in ((800_000, 2.0), (10_800_000, 1.15), (124_000_000, 1.0)):
        for name in ("Adam", "AdamW"):
            yield Case(
                "optimizer", f"{name} {n / 1e6:g} M", _adam(name, n), target, n_bytes=28 * n,
                heavy=n > 1e8, memory=32 * n,
            )  # fmt: skip
    n = 10_800_000
    for name, torch_name, keywords in (
        ("RMSprop", "RMSprop", {}), ("SGD momentum", "SGD", {"momentum": 0.9}), ("Adagrad", "Adagrad", {}),
    ):  # fmt: skip
        make = _simple_optimizer(torch_name, n, keywords)
        yield Case("optimizer", f"{name} {n / 1e6:g} M", make, 4.0, n_bytes=20 * n, memory=24 * n)


def _adam(name, n):
    decay = 0.1 if name == "AdamW" else 0.0

    def make(torch, R):
        p, g, m, v = R(n), R(n), np.zeros(n, np.float32), np.zeros(n, np.float32)
        update, steps = {"Adam": kernels.adam_update, "AdamW": kernels.adamw_update}[name], [0]

        def ours():
            steps[0] += 1
            update(p, g, m, v, step=steps[0], lr=1e-4, weight_decay=decay)

        def numpy():
            m[:] = 0.9 * m + 0.1 * g
            v[:] = 0.999 * v + 0.001 * g * g
            p[:] -= 1e-4 * (m / (np.sqrt(v) + 1e-8) + decay * p)

        if torch is None:
            return {OURS: ours, "NumPy": numpy}
        tp = torch.from_numpy(p.copy()).requires_grad_()
        tp.grad = torch.from_numpy(g)
        theirs = getattr(torch.optim, name)([tp], lr=1e-4, weight_decay=decay, fused=True)
        return {OURS: ours, "torch": theirs.step}

    return make


def _simple_optimizer(torch_name, n, keywords):
    def make(torch, R):
        p, g, v = R(n), R(n), np.zeros(n, np.float32)
        ours = {
            "RMSprop": lambda: kernels.rmsprop_update(p, g, v, lr=1e-4),
            "SGD": lambda: kernels.sgd_update(p, g, v, lr=1e-4, momentum=0.9),
            "Adagrad": lambda: kernels.adagrad_update(p, g, v, step=1, lr=1e-4),
        }[torch_name]

        def numpy():
            if torch_name == "SGD":
                v[:] = 0.9 * v + g
                p[:] -= 1e-4 * v
            else:
                v[:] = v + g * g if torch_name == "Adagrad" else 0.99 * v + 0.01 * g * g
                p[:] -= 1e-4 * g / (np.sqrt(v) + 1e-8)

        if torch is None:
            return {OURS: ours, "NumPy": numpy}
        tp = torch.from_numpy(p.copy()).requires_grad_()
        tp.grad = torch.from_numpy(g)
        return {OURS: ours, "torch": getattr(torch.optim, torch_name)([tp], lr=1e-4, **keywords).step}

    return make


# Losses and norms ------------------------------------------------------------------------------------


def _losses():
    M, V = 4096, 8192

    def cross_entropy(torch, R):
        logits, targets = R(M, V), np.random.default_rng(1).integers(0, V, M)
        dlosses = np.full(M, 1 / M, np.float32)

        def ours():  # what functional.cross_entropy computes where gradients are wanted
            kernels.cross_entropy_both(dlosses, logits, targets)

        def numpy():
            e = np.exp(logits - logits.max(1, keepdims=True))
            e /= e.sum(1, keepdims=True)
            loss = -np.log(e[np.arange(M), targets]).mean()
            e[np.arange(M), targets] -= 1
            e /= M
            return loss, e

        if torch is None:
            return {OURS: ours, "NumPy": numpy}
        tl, tt = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(targets)

        def theirs():
            tl.grad = None
            torch.nn.functional.cross_entropy(tl, tt).backward()

        return {OURS: ours, "torch": theirs}

    yield Case("loss", f"cross-entropy {M} x {V}", cross_entropy, 8.0, n_bytes=12 * M * V)
    for M_, V_, C_ in ((4096, 8192, 512), (1024, 50257, 768)):
        yield Case(
            "loss", f"head + CE {M_},{V_},{C_}", _head(M_, V_, C_), 1.3, flops=6 * M_ * V_ * C_,
            n_bytes=4 * (3 * M_ * C_ + 3 * V_ * C_), heavy=True,
        )  # fmt: skip


def _head(M, V, C):
    def make(torch, R):
        x, w, targets = R(M, C), R(V, C) / 50, np.random.default_rng(1).integers(0, V, M)
        cx, cw = Tensor(x, requires_grad=True), Parameter(w)

        def ours():
            cx.grad = cw.grad = None
            functional.linear_cross_entropy(cx, cw, targets).backward()

        def numpy():
            e = x @ w.T
            e -= e.max(1, keepdims=True)
            np.exp(e, out=e)
            e /= e.sum(1, keepdims=True)
            loss = -np.log(e[np.arange(M), targets]).mean()
            e[np.arange(M), targets] -= 1
            e /= M
            return loss, e @ w, e.T @ x

        if torch is None:
            return {OURS: ours, "NumPy": numpy}
        F = torch.nn.functional
        tx, tw = (torch.from_numpy(a).requires_grad_() for a in (x, w))
        tt = torch.from_numpy(targets)

        def theirs():
            tx.grad = tw.grad = None
            F.cross_entropy(F.linear(tx, tw), tt).backward()

        return {OURS: ours, "torch": theirs}

    return make


def _norms():
    for (M, C), target in (((768, 128), 2.0), ((4096, 384), 1.4)):
        for name in ("layer norm", "RMS norm"):
            make = _norm(name, M, C)
            yield Case("norm", f"{name} {M} x {C}", make, target, n_bytes=20 * M * C)


def _norm(name, M, C):
    def make(torch, R):
        x, w, b, dy = R(M, C), R(C), R(C), R(M, C)
        out, eps = (np.empty_like(x), np.empty_like(w), np.empty_like(b)), 1e-5

        def layer():
            _, mean, rstd = kernels.layer_norm_forward(x, w, b)
            kernels.layer_norm_backward(dy, x, w, mean, rstd, out=out)

        def rms():
            _, rstd = kernels.rms_norm_forward(x, w, eps)
            kernels.rms_norm_backward(dy, x, w, rstd, out=out[:2])

        def numpy():
            centered = x - x.mean(1, keepdims=True) if name == "layer norm" else x
            rstd = 1 / np.sqrt((centered * centered).mean(1, keepdims=True) + eps)
            normed = centered * rstd
            y, d = normed * w + b, dy * w
            dx = d - normed * (d * normed).mean(1, keepdims=True)
            if name == "layer norm":
                dx -= d.mean(1, keepdims=True)
            return y, dx * rstd, (dy * normed).sum(0), dy.sum(0)

        ours = layer if name == "layer norm" else rms
        if torch is None:
            return {OURS: ours, "NumPy": numpy}
        F = torch.nn.functional
        ts, tdy = [torch.from_numpy(a).requires_grad_() for a in (x, w, b)], torch.from_numpy(dy)

        def theirs():
            for t in ts:
                t.grad = None
            if name == "layer norm":
                F.layer_norm(ts[0], (C,), ts[1], ts[2], eps).backward(tdy)
            else:
                F.rms_norm(ts[0], (C,), ts[1], eps).backward(tdy)

        return {OURS: ours, "torch": theirs}

    return make
