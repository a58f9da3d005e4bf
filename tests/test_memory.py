"""Memory: flat over 10,000 calls of each kernel and over training steps, linear in attention's length."""

import gc
import json
import statistics
import subprocess
import sys
import weakref

import numpy as np
import pytest
from kernel_checks import same_bits

import cllm
from cllm import config as configs
from cllm import functional as F
from cllm import kernels
from cllm._core import pool
from cllm.data import Examples, Tokens
from cllm.progress import Silent
from cllm.train import Trainer

CALLS = 10_000
# A process's pages come and go by a few dozen kilobytes; 16 bytes lost in each call would be 160.
SLACK = 128 * 1024

# For each operation: bytes that the process and the pool grew by in CALLS calls of each of its kernels.
MEASURE = """
import json, resource, sys
from cllm import kernels, parity
from cllm._core import pool

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

class Counter:
    calls = 0
    def __getattr__(self, name):
        self.calls += 1
        return getattr(kernels, name)

growth = {}
for operation in parity.TABLE:
    sizes = {letter: max(low, min(high, 3)) for letter, (low, high) in operation.sizes.items()}
    case = parity.Case(operation, sizes, operation.options[-1], "float32")
    arrays, counter = case.inputs(), Counter()
    case.results(arrays, counter)
    repeats = int(sys.argv[1]) * len(operation.calls.split()) // counter.calls
    for _ in range(repeats // 10):
        case.results(arrays)
    before = (resident(), *pool.usage())
    for _ in range(repeats):
        case.results(arrays)
    growth[operation.name] = [a - b for a, b in zip((resident(), *pool.usage()), before)]
print(json.dumps(growth))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_memory_is_flat():
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(CALLS)], capture_output=True, text=True, check=True
    )
    for name, (resident, live, idle) in json.loads(run.stdout).items():
        assert resident <= SLACK, f"{name}: {resident} bytes more after {CALLS} calls"
        assert live == idle == 0, f"{name}: the pool grew by {live} bytes in use and {idle} idle"


# A run; what each step costs in page faults, resident bytes, bytes of the pool, and the most that Python and
# NumPy allocated beside it, which only the last steps trace.
TRAIN = """
import json, resource, sys, tracemalloc
import numpy as np
import cllm
from cllm._core import pool
from cllm.data import Examples

threads, kind, folder, text = int(sys.argv[1]), *sys.argv[2:]
STEPS, TRACED = 30, 5
rows, before = [], {"faults": 0}

def numbers():
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    beside = tracemalloc.get_traced_memory()[1] if tracemalloc.is_tracing() else 0
    return {"faults": faults, "resident": resident, "pool": sum(pool.usage()), "beside": beside}

def follow(trainer, record):
    if record["split"] != "train":
        return
    found = numbers()
    rows.append(found | {"faults": found["faults"] - before["faults"]})
    if trainer.step == STEPS - TRACED:
        tracemalloc.start()
    before["faults"] = numbers()["faults"]
    if tracemalloc.is_tracing():
        tracemalloc.reset_peak()

values = {
    "run.dir": folder, "data.source": text, "train.threads": threads, "train.max_steps": STEPS,
    "train.eval_interval": 0, "schedule.warmup_steps": 5,
}
task = None
if kind == "examples":
    rng = np.random.default_rng(0)
    digits = Examples(rng.random((2000, 784), np.float32), rng.integers(0, 10, 2000))
    layers = [cllm.nn.Linear(784, 64), cllm.nn.Linear(64, 10)]

    class Classifier(cllm.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = layers
        def forward(self, x):
            return self.last(self.first(x).relu())

    task = cllm.Task(Classifier(), digits)
    values["train.batch_size"] = 256
else:
    L, H, C, T, B = {"char": (4, 4, 128, 64, 12), "baby": (2, 6, 384, 256, 2)}[kind]
    values |= {
        "model.n_layer": L, "model.n_head": H, "model.n_embd": C, "model.block_size": T,
        "train.batch_size": B, "model.dropout": 0.1,
    }
cllm.train.Trainer(cllm.config.load(None, values), task, [follow], progress=cllm.progress.Silent()).fit()
print(json.dumps(rows))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
@pytest.mark.parametrize("kind", ["char", "baby", "examples"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_training_step_takes_no_new_memory(kind, threads, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog\n" * 1000)
    run = subprocess.run(
        [sys.executable, "-c", TRAIN, str(threads), kind, str(tmp_path / "run"), str(text)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = json.loads(run.stdout)
    settled, traced = rows[5:25], rows[-4:]
    # Made before the run settled: 10,000 faults in the first step of char, and none from the second on.
    assert statistics.median(row["faults"] for row in settled) == 0
    assert max(row["faults"] for row in settled[1:]) < 50
    assert settled[-1]["resident"] - settled[0]["resident"] <= SLACK
    assert {row["pool"] for row in settled} == {rows[5]["pool"]}
    # Beside the pool's: the tape, small arrays, and a batch's places. Without the pool it would be all of it.
    beside = max(row["beside"] for row in traced)
    assert 0 < beside < 0.05 * rows[5]["pool"] + 2**18


# The most resident memory after attention, forward and backward, at each of the lengths.
ATTEND = """
import json, resource, sys
import numpy as np
from cllm import kernels

kernels.set_num_threads(2)
peaks = []
for T in map(int, sys.argv[1:]):
    qkv = np.random.default_rng(0).standard_normal((1, T, 3 * 32), np.float32)
    out, lse = kernels.packed_attention_forward(qkv, 1)
    kernels.packed_attention_backward(out, qkv, out, lse, 1)
    q = qkv.reshape(1, T, 3, 32).transpose(0, 2, 1, 3)[:, :1]
    out, lse = kernels.attention_forward(q, q, q, True)
    kernels.attention_backward(out, q, q, q, out, lse, True)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in kilobytes")
def test_attention_is_linear_in_memory():
    lengths = [2048, 8192, 16384]
    run = subprocess.run(
        [sys.executable, "-c", ATTEND, *map(str, lengths)], capture_output=True, text=True, check=True
    )
    small, middle, large = json.loads(run.stdout)
    # A query, key, value, their gradients and the result take 128 bytes each; the scores would take 64 kB.
    assert (large - middle) / (lengths[2] - lengths[1]) < 40 * 128
    assert (middle - small) / (lengths[1] - lengths[0]) < 40 * 128


def test_a_run_that_is_over_gives_its_memory_back_at_once(tmp_path):
    """A sweep's worker trains one after the other: what waits for Python's search for circles adds up."""
    text, held = tmp_path / "text.txt", []
    text.write_text("a sentence that comes again. " * 40)
    keys = {"data.source": str(text), "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 32}
    keys |= {"model.block_size": 16, "train.batch_size": 4, "train.max_steps": 4, "train.grad_accum": 2}
    gc.collect()
    gc.disable()
    try:
        for number in range(2):
            config = configs.load(None, {**keys, "run.dir": str(tmp_path / str(number))})
            trainer = Trainer(config, progress=Silent())
            trainer.fit()
            arrays = [owner_of(x.data) for x in trainer.model.parameters()]
            held += [weakref.ref(array) for array in arrays]
            del trainer, arrays
        left = sum(array() is not None for array in held)
    finally:
        gc.enable()
    assert held and left == 0


def owner_of(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_what_a_step_holds_is_the_pools():
    """Batches, activations and their gradients lie in blocks of the pool, aligned to 64 bytes; gradients of
    parameters stay where they are."""
    inputs, targets = Tokens(np.arange(2000) % 65).batch(0, 4, 16, seed=0)
    model = cllm.GPT(cllm.GPTConfig(vocab_size=65, n_layer=2, n_head=2, n_embd=32, block_size=16), seed=0)
    examples = Examples(np.ones((50, 7), np.float32), np.arange(50))
    batch = examples[np.arange(9)]
    linear, x = cllm.nn.Linear(64, 512), cllm.Tensor(np.ones((64, 64), np.float32), requires_grad=True)
    hidden = linear(x)
    out = (hidden.gelu() * 2.0).relu()
    (out * out).sum().backward()
    arrays = {"inputs": inputs, "targets": targets, "logits": model(inputs).data, "dx": x.grad}
    arrays |= {"hidden": hidden.data, "out": out.data, "rows": batch.inputs, "classes": batch.targets}
    for name, array in arrays.items():
        owner = owner_of(array)
        assert type(owner.base).__name__ == "Block", name
        assert owner.ctypes.data % 64 == 0, name

    places = []
    for _ in range(3):
        model.loss(inputs, targets).backward()
        places.append([p.grad.ctypes.data for p in model.parameters()])
        for parameter in model.parameters():
            parameter.grad = None
    assert places[0] == places[1] == places[2]


def test_examples_from_the_pool_are_what_numpy_takes():
    rng = np.random.default_rng(0)
    for array in (rng.random((20, 3)), rng.integers(0, 9, 20), rng.random((20, 2)).astype(">f4")[:, ::-1]):
        examples = Examples(array, array, np.ones(array.shape, bool))
        for indices in (
            np.array([3, 3, 19, 0]), np.array([], int), np.array([-1, 2]), [4, 5], slice(2, 9),
            np.array([[1, 2]]), rng.random(20) < 0.5, np.array([7], np.uint8),
        ):  # fmt: skip
            expected = array[indices]
            found = examples[indices].inputs
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert found.tobytes() == expected.tobytes()
        with pytest.raises(IndexError):
            examples[np.array([3, 20])]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_results_of_norms_do_not_wait_for_the_backward_pass(norm):
    """They are made again; the gradients have the bits of those of a graph that keeps them."""
    rng = np.random.default_rng(0)
    shapes = (1024, 256), (256,), (256,), (64, 256), (512, 256), (512,), (256, 512), (256,)
    arrays = [np.float32(rng.standard_normal(shape)) for shape in shapes]

    def graph(keep):
        pool.trim()  # arrays count with the size of their buffer
        x, w, b, *others = (cllm.Tensor(array, requires_grad=True) for array in arrays)
        h = F.layer_norm(x, 256, w, b, 0.1) if norm == "layer" else F.rms_norm(x, 256, w, 0.1)
        if keep:
            h._node.make = None
        results = F.linear(h, others[0]), F.feed_forward(h, *others[1:])
        del h
        live = pool.usage()[0]
        sum((y * y).sum() for y in results).backward()
        return live, tuple(t.grad for t in (x, w, b, *others) if t.grad is not None)

    (made, gradients), (kept, wanted) = graph(False), graph(True)
    assert kept - made == arrays[0].nbytes + sum(gradient.nbytes for gradient in gradients)
    assert same_bits(gradients, wanted)


def test_an_edit_of_a_norms_result_reaches_the_gradients():
    """What is assigned does; writing into an array that is made again is refused."""
    gradients = []
    for rows in (1 << 10, 1 << 16):  # kept, made again
        x, w = (cllm.Tensor(np.ones(s, np.float32), requires_grad=True) for s in ((rows, 8), (3, 8)))
        h = F.rms_norm(x, 8)
        h.data = h.data * 2
        F.linear(h, w).sum().backward()
        gradients.append(w.grad / rows)
    assert np.allclose(gradients, 2)
    h = F.rms_norm(x, 8)
    with pytest.raises(ValueError, match="read-only"):
        h.data[0] = 0


def test_chunks_of_the_feed_forward_layer_limit_its_memory(monkeypatch):
    """And change sums over rows alone: a result of each row has the same bits."""
    rng = np.random.default_rng(0)
    dy, x, w1, w2 = (np.float32(rng.standard_normal(s)) for s in ((1000, 8), (1000, 8), (300, 8), (8, 300)))

    def passes():
        y, pre = kernels.feed_forward_forward(x, w1, None, w2, None)
        return y, pre, *kernels.feed_forward_backward(dy, x, pre, w1, w2, bias=False)

    whole = passes()
    pool.trim()
    monkeypatch.setattr("cllm.kernels.linear.HIDDEN_ELEMENTS", 300 * 100)
    monkeypatch.setattr("cllm.kernels.linear.HIDDEN_ROWS", 1)
    y, pre, dx, dw1, _, dw2, _ = passes()
    idle = pool.usage()[1]
    assert same_bits((y, pre, dx), whole[:3])
    for found, wanted in ((dw1, whole[3]), (dw2, whole[5])):
        assert not same_bits(found, wanted)  # other sums: the chunks were made
        assert np.linalg.norm(found - wanted) < 1e-6 * np.linalg.norm(wanted)
    assert idle <= 2 * 1.125 * 100 * 300 * 4
