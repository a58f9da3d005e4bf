"""A whole training step of CLLM and of torch, side by side in one process: medians and their ratio.

A step is forward, backward, clipping by norm and AdamW, on the same shape, batch and thread count. The
two sides take turns in blocks, since a machine's speed drifts and since each side has a thread pool of
its own, whose idle threads spin for a while: a block starts after a pause, with a step that is not timed.
"""

import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import cllm
from cllm import kernels, optim
from cllm.errors import InputError, nearest

__all__ = ["SIZES", "Timing", "cpu_model", "environment", "measure", "run", "shape_of"]

#: Name -> n_layer, n_head, n_embd, block_size, batch_size, vocab_size.
SIZES = {
    "tiny": (2, 2, 64, 32, 8, 65),
    "char": (4, 4, 128, 64, 12, 65),
    "baby": (6, 6, 384, 256, 16, 65),
}
ROUNDS = 9
BLOCK_SECONDS = 0.4
PAUSE_SECONDS = 0.02  # both pools' idle threads have stopped spinning by then
NOISY = 1.15  # the middle half of the rounds differs by more than this factor


@dataclass(frozen=True)
class Timing:
    """Seconds of one step on one side: the medians of its blocks, in the order they were run."""

    blocks: tuple[float, ...]

    @property
    def median(self):
        return statistics.median(self.blocks)

    @property
    def noisy(self):
        low, _, high = statistics.quantiles(self.blocks, n=4)
        return high > NOISY * low


def shape_of(size):
    """The shape of a named size as one line, "L4 H4 C128 T64 B12 V65"."""
    return " ".join(f"{letter}{n}" for letter, n in zip("LHCTBV", SIZES[size]))


def cpu_model():
    """The processor's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment():
    """What the numbers depend on, as (label, text) pairs."""
    return [
        ("CPU", cpu_model()),
        ("instruction set", kernels.isa),
        ("CLLM", f"{cllm.__version__}, NumPy {np.__version__}, Python {platform.python_version()}"),
    ]


def measure(steps, rounds=ROUNDS):
    """Time functions that each make one training step, taking turns.

    Parameters
    ----------
    steps : list of callables without arguments
    rounds : int
        Blocks of each side.

    Returns
    -------
    list of Timing
        One for each function, with `rounds` block medians in seconds.
    """
    counts = []
    for step in steps:
        for _ in range(3):  # first-time allocations, packing scratch, optimizer moments
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
        counts.append(max(1, min(30, round(BLOCK_SECONDS / seconds))))
    blocks = [[] for _ in steps]
    for i in range(rounds):
        order = range(len(steps)) if i % 2 == 0 else reversed(range(len(steps)))
        for side in order:
            time.sleep(PAUSE_SECONDS)
            steps[side]()
            times = []
            for _ in range(counts[side]):
                start = time.perf_counter()
                steps[side]()
                times.append(time.perf_counter() - start)
            blocks[side].append(statistics.median(times))
    return [Timing(tuple(times)) for times in blocks]


def run(sizes=None, against=None, threads=None, rounds=ROUNDS, out=None):
    """Print the table of `cllm bench` and return its rows.

    Parameters
    ----------
    sizes : list of str, optional
        Names in `SIZES`; all of them by default.
    against : "torch" or None
        What to run beside CLLM. Without torch installed CLLM is timed alone, and the table says so.
    threads : int, optional
        Threads of both sides; by default as many as CLLM uses.
    rounds : int
        Blocks of each side.
    out : text file, optional
        Standard output by default.

    Returns
    -------
    list of dict
        size, ours (Timing), theirs (Timing or None), ratio (float or None), noisy (bool).
    """
    out = out or sys.stdout
    sizes = list(SIZES) if sizes is None else list(sizes)
    for size in sizes:
        if size not in SIZES:
            raise InputError(f"unknown size {size!r}{nearest(size, SIZES)}; sizes are {', '.join(SIZES)}")
    if against not in (None, "torch"):
        raise InputError(f"cannot measure against {against!r}; allowed is torch")
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, it must be at least 1")
    torch = _import_torch() if against else None

    threads_before = cllm.get_num_threads()
    threads = threads or threads_before
    rows = []
    try:
        cllm.set_num_threads(threads)
        if torch is not None:
            torch_threads_before = torch.get_num_threads()
            torch.set_num_threads(threads)
        _print_header(threads, against, torch, out)
        for size in sizes:
            rows.append(_measure_size(size, torch, rounds))
            _print_row(rows[-1], out)
    finally:
        cllm.set_num_threads(threads_before)
        if torch is not None:
            torch.set_num_threads(torch_threads_before)
    if any(row["noisy"] for row in rows):
        print("noisy: the middle half of the rounds spans over 15 %; repeat it on a quiet machine", file=out)
    return rows


def _import_torch():
    try:
        import torch
    except ImportError:
        return None
    return torch


def _print_header(threads, against, torch, out):
    for label, text in environment():
        print(f"{label:16} {text}", file=out)
    if torch is not None:
        print(f"{'torch':16} {torch.__version__}", file=out)
    elif against:
        print(f"{'torch':16} not installed, so CLLM is timed alone: pip install torch==2.13.0", file=out)
    print(f"{'threads':16} {threads}", file=out)
    print("\nstep: forward, backward, clipping, AdamW; float32; ms, median (min to max) of rounds", file=out)
    columns = f"{'size':5} {'shape':28} {'CLLM':>24}"
    if torch is not None:
        columns += f" {'torch':>24} {'torch/CLLM':>11}"
    print(columns, file=out, flush=True)


def _print_row(row, out):
    def cell(timing):
        low, high = min(timing.blocks), max(timing.blocks)
        return f"{timing.median * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f})"

    line = f"{row['size']:5} {shape_of(row['size']):28} {cell(row['ours']):>24}"
    if row["theirs"] is not None:
        line += f" {cell(row['theirs']):>24} {row['ratio']:11.2f}"
    print(line + ("  noisy" if row["noisy"] else ""), file=out, flush=True)


def _measure_size(size, torch, rounds):
    n_layer, n_head, n_embd, block_size, batch_size, vocab_size = SIZES[size]
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, vocab_size, (2, batch_size, block_size))
    config = cllm.GPTConfig(
        vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd
    )
    steps = [_our_step(config, tokens, targets)]
    if torch is not None:
        steps.append(_torch_step(torch, config, tokens, targets))
    timings = measure(steps, rounds)
    ours, theirs = timings[0], timings[1] if torch is not None else None
    return {
        "size": size,
        "ours": ours,
        "theirs": theirs,
        # Of each round and then the median: both sides of a round met the same weather.
        "ratio": statistics.median(b / a for a, b in zip(ours.blocks, theirs.blocks)) if theirs else None,
        "noisy": any(timing.noisy for timing in timings),
    }


def _our_step(config, tokens, targets):
    model = cllm.GPT(config, seed=0)
    parameters = list(model.parameters())
    optimizer = optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    def step():
        loss = model.loss(tokens, targets)
        loss.backward()
        optim.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _torch_step(torch, config, tokens, targets):
    from torch.nn import functional as F

    C, H = config.n_embd, config.n_head

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = torch.nn.LayerNorm(C), torch.nn.LayerNorm(C)
            self.c_attn, self.attn_proj = torch.nn.Linear(C, 3 * C), torch.nn.Linear(C, C)
            self.c_fc, self.mlp_proj = torch.nn.Linear(C, 4 * C), torch.nn.Linear(4 * C, C)

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
            q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
            return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))

    class TorchGPT(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(config.vocab_size, C)
            self.wpe = torch.nn.Embedding(config.block_size, C)
            self.blocks = torch.nn.ModuleList(Block() for _ in range(config.n_layer))
            self.ln_f = torch.nn.LayerNorm(C)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.ln_f(x), self.wte.weight)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model = TorchGPT()
    for parameter in model.parameters():  # GPT-2's scale: the time of a step must not come from odd values
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    tokens, targets = torch.from_numpy(tokens), torch.from_numpy(targets)

    def step():
        model(tokens, targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
