"""A whole training step of CLLM and of torch: forward, backward, clipping by norm and AdamW."""

import contextlib
import functools
import io
import warnings

import numpy as np

import cllm
from cllm import optim
from cllm.bench import ceilings, records, timing

__all__ = ["SIZES", "flops_of", "growth", "our_step", "rows", "shape_of", "torch_step"]

#: Name -> n_layer, n_head, n_embd, block_size, batch_size, vocab_size.
SIZES = {
    "tiny": (2, 2, 64, 32, 8, 65),
    "char": (4, 4, 128, 64, 12, 65),
    "baby": (6, 6, 384, 256, 16, 65),
    "story": (8, 8, 512, 512, 4, 8192),
    "gpt2": (12, 12, 768, 64, 4, 50257),
}
LARGE = ("baby", "story", "gpt2")  # whose share of the peak and whose memory have targets
# What a step is to gain on torch, with one thread and with more.
TARGETS = {
    "tiny": (1.9, 2.5),
    "char": (1.4, 1.5),
    "baby": (1.25, 1.25),
    "story": (1.25, 1.25),
    "gpt2": (1.35, 1.35),
}
SHARE_TARGET = 0.85
SPEEDUP_TARGET, SPEEDUP_SIZES = 1.85, ("baby", "story")  # of two threads
COMPILE_LOSES = 1.03  # a compiled step slower than this times the eager one leaves the race after one round

# The axes of the growth figure: one is swept, the others stay at the second value; 2048 tokens a step.
GROWTH = {"C": (64, 128, 256, 512), "T": (32, 64, 256, 1024), "L": (1, 2, 4, 8), "V": (64, 256, 2048, 16384)}
GROWTH_TOKENS = 2048
HEAD_SIZE = 32


def shape_of(size):
    """The shape of a named size as one line, "L4 H4 C128 T64 B12 V65"."""
    return " ".join(f"{letter}{n}" for letter, n in zip("LHCTBV", SIZES[size]))


def flops_of(n_layer, n_head, n_embd, block_size, batch_size, vocab_size):
    """Floating-point operations that a training step needs: 2 for each multiply-add.

    Counted are the matrix products, once forward and twice backward, and of causal attention the half that a
    query may see: for each token and layer 24 C^2 + 2 C (T + 1), and 2 C V for the head. Left out are
    what is computed again in the backward pass, norms, activations, the loss and the optimizer.
    """
    L, C, T, B, V = n_layer, n_embd, block_size, batch_size, vocab_size
    return 3 * B * T * (L * (24 * C * C + 2 * C * (T + 1)) + 2 * C * V)


def _config(n_layer, n_head, n_embd, block_size, batch_size, vocab_size):
    return cllm.GPTConfig(
        vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd
    )


def _batch(shape):
    *_, T, B, V = shape
    return np.random.default_rng(0).integers(0, V, (2, B, T))


def our_step(shape):
    """A function that makes one training step of CLLM, and the number of parameters."""
    tokens, targets = _batch(shape)
    model = cllm.GPT(_config(*shape), seed=0)
    parameters = list(model.parameters())
    optimizer = optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    def step():
        loss = model.loss(tokens, targets)
        loss.backward()
        optim.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.data.size for p in parameters)


def torch_step(torch, shape):
    """The same of torch: a function, and one that makes the same step by torch.compile, compiled when it is
    first called; and the number of parameters."""
    from cllm.bench import torch_gpt

    n_layer, n_head, n_embd, block_size, _, vocab_size = shape
    torch.manual_seed(0)
    model = torch_gpt.GPT(n_layer, n_head, n_embd, block_size, vocab_size)
    parameters = list(model.parameters())
    optimizer = torch_gpt.adamw(parameters)
    tokens, targets = map(torch.from_numpy, _batch(shape))

    def step(forward=model):
        forward(tokens, targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @functools.cache
    def compiled():  # not before it is wanted: the compiler is large
        torch.compiler.reset()  # one function compiled 8 times would run eagerly from then on
        return torch.compile(model)

    return step, lambda: step(compiled()), sum(p.numel() for p in parameters)


def _compiles(compiled, threads):
    """Why torch.compile cannot be used here, or ""; makes one compiled step with each number of threads."""
    try:
        # What fails is told in one line: torch's own words go on for pages.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            for n in threads:
                timing.use_threads(n)
                compiled()
    except Exception as error:  # its errors are of many classes: no compiler, no memory, no space on the disk
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


def rows(size, threads, torch, effort, compile=True, say=print):
    """The rows of one size: a step with each number of threads, its share of the peak, threads against one.

    All sides take turns in the same rounds, with them the machine's own peak.

    Parameters
    ----------
    size : str
        A name in `SIZES`.
    threads : list of int
    torch : module or None
    effort : timing.Effort
    compile : bool
        Whether to try torch.compile beside eager torch.
    say : callable
        Takes a line for the user.
    """
    shape, flops = SIZES[size], flops_of(*SIZES[size])
    ours, n_parameters = our_step(shape)
    sides = {(records.OURS, n): ours for n in threads}
    if torch is not None:
        eager, compiled, _ = torch_step(torch, shape)
        sides |= {("torch", n): eager for n in threads}
        if compile:
            wrong = _compiles(compiled, threads)
            if wrong:
                say(f"torch.compile does not work here, so torch runs eagerly: {wrong}")
            for n in threads if not wrong else ():
                timing.use_threads(n)
                first, second = (min(timing.timed(call) for _ in range(2)) for call in (eager, compiled))
                if second < COMPILE_LOSES * first:
                    sides["torch.compile", n] = compiled
    peaks = {n: ceilings.fma(n) for n in threads}
    sides |= {("peak", n): call for n, (call, _) in peaks.items()}
    seconds = timing.measure(sides, effort)

    found = []
    for n in threads:
        samples = {name: times for (name, m), times in seconds.items() if m == n and name != "peak"}
        wanted = TARGETS.get(size, (None, None))[n > 1]
        targets = {name: wanted for name in samples if name != records.OURS and wanted}
        case = f"{size} {shape_of(size)}"
        more = {"size": size, "parameters": n_parameters}
        found.append(records.row("step", case, n, samples, targets=targets, flops=flops, **more))
        peak = peaks[n][1] / min(seconds["peak", n])  # a disturbed round would flatter the share
        share = [flops / s / peak for s in samples[records.OURS]]
        targets = {records.OURS: SHARE_TARGET} if size in LARGE else {}
        more = {"unit": "of FMA peak", "targets": targets, "size": size}
        found.append(records.row("step", f"{size}, arithmetic", n, {records.OURS: share}, **more))
        if n > 1 and 1 in threads:
            gain = [a / b for a, b in zip(seconds[records.OURS, 1], samples[records.OURS])]
            targets = {records.OURS: SPEEDUP_TARGET} if n == 2 and size in SPEEDUP_SIZES else {}
            more = {"unit": "x of 1 thread", "targets": targets, "size": size}
            found.append(records.row("step", f"{size}, threads", n, {records.OURS: gain}, **more))
    return found


def growth(threads, effort):
    """Rows of the group "growth": seconds a token as one side of a small GPT grows, and its arithmetic."""
    for axis, values in GROWTH.items():
        for n in values:
            at = {letter: options[1] for letter, options in GROWTH.items()} | {axis: n}
            C, T = at["C"], at["T"]
            shape = (at["L"], max(C // HEAD_SIZE, 1), C, T, max(GROWTH_TOKENS // T, 1), at["V"])
            n_tokens = shape[3] * shape[4]
            step, _ = our_step(shape)
            seconds = timing.measure({(records.OURS, threads): step}, effort)[records.OURS, threads]
            samples = {records.OURS: [s / n_tokens for s in seconds]}
            flops = flops_of(*shape) / n_tokens
            yield records.row("growth", f"{axis} {n}", threads, samples, flops=flops, axis=axis, at_value=n)
