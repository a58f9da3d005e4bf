"""What only a process of its own shows: the time of an import, memory at its highest, page faults.

    python -m cllm.bench.process WHAT ...

is such a process: it prints one line of JSON.
"""

import itertools
import json
import os
import resource
import subprocess
import sys

import numpy as np

import cllm
from cllm import functional, kernels
from cllm.bench import records, steps, timing
from cllm.errors import InputError
from cllm.tensor import Parameter, Tensor

__all__ = ["attention_rows", "head_rows", "import_rows", "step_rows"]

MB = 1e6
BYTES_A_PARAMETER = 16  # the parameter, its gradient and two moments
HEADS = ((4096, 8192, 512), (1024, 50257, 768))
LENGTHS = (4096, 8192, 16384)
LINEAR = 2.2  # times the memory for twice the length; the pool rounds sizes up by at most an eighth
WARM_STEPS, STEPS = 3, 3


# Rows ------------------------------------------------------------------------------------------------


def import_rows(torch, effort):
    """Seconds of the first import: CLLM with its model (kernels, NumPy), and torch."""
    code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    wanted = {records.OURS: "cllm, cllm.gpt"} | ({"torch": "torch"} if torch else {})
    samples = {side: [] for side in wanted}
    for _ in range(effort.rounds + 1):  # the first reads the disk
        for side, modules in wanted.items():
            samples[side].append(float(_run("-c", code.format(modules))))
    samples = {side: times[1:] for side, times in samples.items()}
    yield records.row("import", "import", 1, samples, targets={"torch": 6.0} if torch else {})


def step_rows(size, threads, torch):
    """Memory beyond the import and 16 bytes a parameter; page faults and growth after warm-up."""
    large = size in steps.LARGE
    ours = _measured("steps", size, threads, records.OURS)
    samples = {records.OURS: [ours["extra"] / MB]}
    if torch and large:
        samples["torch"] = [_measured("steps", size, threads, "torch")["extra"] / MB]
    if large:
        more = {"unit": "MB", "targets": {"torch": 2.0} if torch else {}, "size": size}
        yield records.row("memory", f"{size}, training", threads, samples, **more)
    limits = {"most": True, "targets": {records.OURS: 50}, "size": size}
    faults = {records.OURS: ours["faults"]}
    more = {"unit": "faults", "growth": ours["growth"], **limits}
    yield records.row("memory", f"{size}, page faults", threads, faults, **more)


def head_rows(threads):
    """Memory of head and cross-entropy beyond inputs and gradients, as a share of the logits'."""
    limits = {"most": True, "targets": {records.OURS: 0.10}}
    for shape in HEADS:
        M, V, C = shape
        share = _measured("head", *shape, threads)["extra"] / (4 * M * V)
        samples = {records.OURS: [share]}
        case = f"head + CE {M},{V},{C}"
        yield records.row("memory", case, threads, samples, unit="of logits", **limits)


def attention_rows(threads):
    """How memory of attention, forward and backward, grows as T doubles up to 16384: 2 is linear."""
    found = _measured("attention", threads)["peaks"]
    lengths = sorted(map(int, found))
    for low, high in itertools.pairwise(lengths):
        samples = {records.OURS: [found[str(high)] / found[str(low)]]}
        limits = {"unit": "x of half T", "most": True, "targets": {records.OURS: LINEAR}}
        more = {"peak_bytes": found[str(high)], **limits}
        yield records.row("memory", f"attention, T {high}", threads, samples, **more)


def _run(*words):
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"a process that measures ended with status {done.returncode}: {last}")
    return done.stdout


def _measured(*words):
    return json.loads(_run("-m", "cllm.bench.process", *words))


# Inside of such a process ----------------------------------------------------------------------------


def _status(key):
    """A number of bytes from /proc/self/status, such as VmRSS and VmHWM; else the highest so far."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
    except (OSError, StopIteration):
        kilo = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def _steps(size, threads, side):
    shape = steps.SIZES[size]
    if side == "torch":
        import torch
        import torch.nn.functional

        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports 70 MB more
        timing.use_threads(int(threads))
        before = _status("VmRSS")
        step, _, n_parameters = steps.torch_step(torch, shape)
    else:
        timing.use_threads(int(threads))
        before = _status("VmRSS")
        step, n_parameters = steps.our_step(shape)
    for _ in range(WARM_STEPS):
        step()
    resident, faults = _status("VmRSS"), []
    for _ in range(STEPS):
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
    extra = _status("VmHWM") - before - BYTES_A_PARAMETER * n_parameters
    return {"extra": extra, "faults": faults, "growth": _status("VmRSS") - resident}


def _head(M, V, C, threads):
    M, V, C = int(M), int(V), int(C)
    cllm.set_num_threads(int(threads))
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal((M, C), dtype=np.float32), requires_grad=True)
    w = Parameter(rng.standard_normal((V, C), dtype=np.float32) / 50)
    targets = rng.integers(0, V, M)
    before = _status("VmRSS")
    functional.linear_cross_entropy(x, w, targets).backward()
    return {"extra": _status("VmHWM") - before - x.grad.nbytes - w.grad.nbytes}


def _attention(threads):
    cllm.set_num_threads(int(threads))
    before, peaks = _status("VmRSS"), {}
    for T in LENGTHS:  # ascending: the highest so far is this length's
        rng = np.random.default_rng(0)
        q, k, v, dout = (rng.standard_normal((1, 2, T, 64), dtype=np.float32) for _ in range(4))
        out, lse = kernels.attention_forward(q, k, v, True)
        kernels.attention_backward(dout, q, k, v, out, lse, True)
        del q, k, v, dout, out, lse
        peaks[T] = _status("VmHWM") - before
    return {"peaks": peaks}


if __name__ == "__main__":
    what = {"steps": _steps, "head": _head, "attention": _attention}[sys.argv[1]]
    print(json.dumps(what(*sys.argv[2:])))
