"""From how much work on a second thread pays, for each family of kernels: where `SERIAL_BELOW` comes from.

    python benchmarks/thresholds.py            all families
    python benchmarks/thresholds.py norm gemm  some of them

For each work, doubled from line to line, the time of one thread and of two, whatever the kernels' own
threshold says. A second thread pays from the least work on of which two threads always take under 95 % of
one's time. Such a figure is of a machine with a second core to spare: a threshold lies at it or above.
"""

import statistics
import sys
import time

import numpy as np

from cllm import kernels
from cllm._kernels import gemm as _gemm
from cllm.kernels import threads

ROUNDS, BLOCK_SECONDS = 9, 0.004
PAYS = 0.95
LIMIT_SECONDS = 200e-6  # of one thread: no threshold lies above

rng = np.random.default_rng(0)


def array(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


def out(*arrays):
    return tuple(map(np.empty_like, arrays))


# Each makes calls of a size n: name of the call -> (function, work), in the unit of the family's threshold.


def gemm(n):
    x, w, dy = array(n, 64), array(64, 64), array(n, 64)
    y, grads = np.empty_like(dy), out(x, w)
    return {
        "forward": (lambda: kernels.linear_forward(x, w, out=y), n * 64 * 64),
        "backward": (lambda: kernels.linear_backward(dy, x, w, out=(*grads, None), bias=False), n * 64 * 64),
    }


def column_sums(n):
    x, sums = array(n, 64), array(64)
    return {"bias": (lambda: _gemm.column_sums(x, sums, False, threads.count), n * 64)}


def attention(n):
    q, k, v, dout = (array(2, 1, n, 16) for _ in range(4))
    y, lse = kernels.attention_forward(q, k, v, True)
    return {
        "forward": (lambda: kernels.attention_forward(q, k, v, True), 2 * n * n * 16),
        "backward": (lambda: kernels.attention_backward(dout, q, k, v, y, lse, True), 2 * n * n * 16),
    }


def norm(n):
    x, w, b, dy = array(n, 64), array(64), array(64), array(n, 64)
    _, mean, rstd = kernels.layer_norm_forward(x, w, b)
    grads = out(x, w, b)
    return {
        "forward": (lambda: kernels.layer_norm_forward(x, w, b), n * 64),
        "backward": (lambda: kernels.layer_norm_backward(dy, x, w, mean, rstd, out=grads), n * 64),
    }


def elementwise(n):
    x, dy = array(n * 64), array(n * 64)
    y = np.empty_like(x)
    return {
        "GELU forward": (lambda: kernels.gelu_forward(x, out=y), n * 64),
        "GELU backward": (lambda: kernels.gelu_backward(dy, x, out=y), n * 64),
        "ReLU forward": (lambda: kernels.relu_forward(x, out=y), n * 64),
    }


def softmax(n):
    x, dy = array(n, 64), array(n, 64)
    y = kernels.softmax_forward(x)
    dx = np.empty_like(x)
    return {
        "forward": (lambda: kernels.softmax_forward(x, out=y), n * 64),
        "backward": (lambda: kernels.softmax_backward(dy, y, out=dx), n * 64),
    }


def loss(n):
    logits, targets, dlosses = array(n, 64), rng.integers(0, 64, n), array(n)
    _, lse = kernels.cross_entropy_forward(logits, targets)
    d = np.empty_like(logits)
    x, y = array(n * 64), array(n * 64)
    return {
        "forward": (lambda: kernels.cross_entropy_forward(logits, targets), n * 64),
        "backward": (lambda: kernels.cross_entropy_backward(dlosses, logits, targets, lse, out=d), n * 64),
        "squares": (lambda: kernels.mse_forward(x, y), n * 64),
    }


def embedding(n):
    tokens, weight, dy = rng.integers(0, 64, n), array(64, 64), array(n, 64)
    y, dweight = np.empty_like(dy), np.empty_like(weight)
    return {
        "forward": (lambda: kernels.embedding_forward(tokens, weight, out=y), n * 64),
        "backward": (lambda: kernels.embedding_backward(dy, tokens, 64, out=dweight), (n + 64) * 64),
    }


def optimizers(n):
    p, g, m, v = array(n * 64), array(n * 64), np.zeros(n * 64, np.float32), np.zeros(n * 64, np.float32)
    return {
        "AdamW": (lambda: kernels.adamw_update(p, g, m, v, step=1, lr=1e-4, weight_decay=0.1), n * 64),
        "SGD": (lambda: kernels.sgd_update(p, g, m, lr=1e-4, momentum=0.9), n * 64),
    }


def rotary(n):
    x = array(1, 1, n, 64)
    y = np.empty_like(x)
    return {"forward": (lambda: kernels.rotary_forward(x, out=y), n * 64)}


FAMILIES = (
    gemm, column_sums, attention, norm, elementwise, softmax, loss, embedding, optimizers, rotary,
)  # fmt: skip


def measure(call):
    """Seconds of a call on one thread and on two, which take turns."""
    best = {1: np.inf, 2: np.inf}
    for i in range(ROUNDS):
        for n in (1, 2) if i % 2 == 0 else (2, 1):
            threads.count = -n
            call()
            seconds, end = [], time.perf_counter() + BLOCK_SECONDS
            while time.perf_counter() < end:
                began = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - began)
            best[n] = min(best[n], statistics.median(seconds))
    return best[1], best[2]


def main(wanted):
    known = {family.__name__: family for family in FAMILIES}
    for name in wanted or known:
        if name not in known:
            sys.exit(f"thresholds: unknown family {name!r}; families are {', '.join(known)}")
        found, n, longest = {}, 4, 0.0
        while longest < LIMIT_SECONDS:
            longest = 0.0
            for call, (function, work) in known[name](n).items():
                found.setdefault(call, []).append((work, *measure(function)))
                longest = max(longest, found[call][-1][1])
            n *= 2
        for call, lines in found.items():
            slow = [i for i, (_, one, two) in enumerate(lines) if two >= PAYS * one]
            first = lines[slow[-1] + 1][0] if slow and slow[-1] + 1 < len(lines) else None
            print(f"{name} {call}: " + (f"pays from {first:,}" if first else "does not pay here"))
            for work, one, two in lines:
                print(f"  {work:>12,}  {one * 1e6:8.1f} us  {two * 1e6:8.1f} us  {one / two:5.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
