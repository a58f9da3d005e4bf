"""`cllm.capi` from a user's own Cython: each function against the door, and the example of the guide."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kernel_checks import same_bits, values

from cllm import kernels

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "own_kernel"
CAPI = (ROOT / "cllm" / "capi.pxd").read_text()
DECLARED = re.findall(r"^cdef (int|void) (\w+)\((.*?)\) noexcept nogil$", CAPI, re.MULTILINE | re.DOTALL)
OUT = object()  # stands for an output among the arguments


def covers():
    """The source of a module with a Python function for each of them, pointers being integers."""
    lines = ["# cython: language_level=3", "from libc.stdint cimport int64_t"]
    for result, name, text in DECLARED:
        lines.append(f"from cllm.capi cimport {name} as c_{name}")
        arguments = [argument.strip() for argument in text.split(",") if argument.strip()]
        taken, given = [], []
        for argument in arguments:
            kind, _, variable = argument.rpartition(" ")
            taken.append(f"size_t {variable}" if kind.endswith("*") else argument)
            given.append(f"<{kind}>{variable}" if kind.endswith("*") else variable)
        lines += [f"def {name}({', '.join(taken)}):", "    with nogil:"]
        lines.append(f"        {'status = ' if result == 'int' else ''}c_{name}({', '.join(given)})")
        if result == "int":
            lines.insert(-2, "    cdef int status")
            lines.append("    return status")
    return "\n".join(lines) + "\n"


def build(folder):
    """Runs the folder's setup.py; quickly rather than for speed."""
    environment = {**os.environ, "CFLAGS": "-O0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def covers_folder(tmp_path_factory):
    """Where `capi_covers` has been built, with the example's setup.py."""
    folder = tmp_path_factory.mktemp("capi")
    (folder / "capi_covers.pyx").write_text(covers())
    setup = (EXAMPLE / "setup.py").read_text().replace("gated_attention", "capi_covers")
    (folder / "setup.py").write_text(setup)
    build(folder)
    return folder


def results_of_both(module, dtype, n_threads):
    """Name -> what the C function wrote, what the door returns."""
    suffix = {"float32": "_f32", "float64": "_f64"}[dtype]
    found = {}

    def run(name, expected, *arguments):
        """Calls the function with new arrays like those of `expected` for each OUT."""
        expected = expected if isinstance(expected, tuple) else (expected,)
        outputs = [np.full_like(x, np.nan) for x in expected]
        waiting = iter(outputs)
        arguments = [next(waiting) if x is OUT else x for x in arguments]
        addresses = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in arguments]
        status = getattr(module, name + suffix)(*addresses, n_threads)
        assert status in (None, 0)
        found[name + suffix] = tuple(outputs), expected

    def draw(*shape):
        return values(*shape, dtype=dtype, seed=len(shape) + sum(shape))

    a, b, bias = draw(201, 45), draw(45, 67), draw(67)
    run("matmul", kernels.matmul(a, b), a, 45, 1, b, 67, 1, 0, OUT, 201, 67, 45, False)
    weight = np.ascontiguousarray(b.T)
    expected = kernels.linear_forward(a, weight, bias)
    run("matmul", expected, a, 45, 1, weight, 1, 45, bias, OUT, 201, 67, 45, False)

    B, H, G, T, S, D, E = 2, 4, 2, 60, 57, 8, 12
    q, k, v, dout = draw(B, H, T, D), draw(B, G, S, D), draw(B, G, S, E), draw(B, H, T, E)
    sizes = (B, H, G, T, S, D, E, True, 0.4)
    out, lse = kernels.attention_forward(q, k, v, True, 0.4)
    run("attention_forward", (out, lse), q, k, v, OUT, OUT, *sizes)
    gradients = kernels.attention_backward(dout, q, k, v, out, lse, True, 0.4)
    run("attention_backward", gradients, dout, q, k, v, out, lse, OUT, OUT, OUT, *sizes)

    N, C = 501, 77
    x, dy = draw(N, C), draw(C, N).reshape(N, C)
    for tanh in (True, False):
        form = "tanh" if tanh else "none"
        run("gelu_forward", kernels.gelu_forward(x, form), x, OUT, N * C, tanh)
        run("gelu_backward", kernels.gelu_backward(dy, x, form), dy, x, OUT, N * C, tanh)
    y = kernels.softmax_forward(x)
    run("softmax_forward", y, x, OUT, N, C)
    run("softmax_backward", kernels.softmax_backward(dy, y), dy, y, OUT, N, C)
    weight, bias = draw(C), draw(C)
    y, mean, rstd = kernels.layer_norm_forward(x, weight, bias)
    run("layer_norm_forward", (y, mean, rstd), x, weight, bias, 1e-5, OUT, OUT, OUT, N, C)
    gradients = kernels.layer_norm_backward(dy, x, weight, mean, rstd)
    run("layer_norm_backward", gradients, dy, x, weight, mean, rstd, OUT, OUT, OUT, N, C)

    targets = np.random.default_rng(0).integers(0, C, N)
    targets[::5] = -100
    losses, lse = kernels.cross_entropy_forward(x, targets, label_smoothing=0.1)
    run("cross_entropy_forward", (losses, lse), x, targets, OUT, OUT, N, C, -100, 0.1)
    expected = kernels.cross_entropy_backward(losses, x, targets, lse, label_smoothing=0.1)
    run("cross_entropy_backward", expected, losses, x, targets, lse, OUT, N, C, -100, 0.1)

    ours, theirs = ([x.copy(), np.zeros_like(x), np.zeros_like(x)] for _ in range(2))
    for step in (1, 2, 3):
        settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        kernels.adamw_update(theirs[0], dy, *theirs[1:], step=step, **settings)
        param, m, v = (array.ctypes.data for array in ours)
        scalars = (step, 1e-2, 0.9, 0.99, 1e-8, 0.1)
        getattr(module, "adamw_update" + suffix)(param, dy.ctypes.data, m, v, x.size, *scalars, n_threads)
    found["adamw_update" + suffix] = tuple(ours), tuple(theirs)
    return found


def assert_same_bits():
    """For both dtypes, on 1 and 3 threads; `capi_covers` is on the path."""
    import capi_covers

    called = set()
    for dtype in ("float32", "float64"):
        for n_threads in (1, 3):
            for name, (written, expected) in results_of_both(capi_covers, dtype, n_threads).items():
                assert same_bits(written, expected), f"{name} on {n_threads} threads"
                called.add(name)
    assert called == {name for _, name, _ in DECLARED}


@pytest.mark.parametrize("isa", kernels.available_isas)
def test_each_function_gives_the_doors_bits_on_each_instruction_set(covers_folder, isa):
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_capi; test_capi.assert_same_bits()"
    command = [sys.executable, "-c", code, str(covers_folder), str(ROOT / "tests")]
    done = subprocess.run(command, env={**os.environ, "CLLM_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_both_dtypes_are_declared_alike():
    shapes = {}
    for result, name, arguments in DECLARED:
        plain = " ".join(re.sub(r"\b(float|double)\*", "T*", arguments).split())
        shapes.setdefault(name[:-4], set()).add((result, plain))
    assert len(DECLARED) == 2 * len(shapes)
    assert all(len(kinds) == 1 for kinds in shapes.values())


def test_example(tmp_path):
    """docs/examples/own_kernel, built in a folder of its own."""
    folder = tmp_path / "own_kernel"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("build", "*.c", "*.so", "__pycache__"))
    build(folder)
    done = subprocess.run([sys.executable, "use.py"], cwd=folder, capture_output=True, text=True, check=True)
    off = dict(re.findall(r"(float\d+): off by (\S+)", done.stdout))
    assert float(off["float32"]) < 1e-5
    assert float(off["float64"]) < 1e-12
    assert "gradcheck: True" in done.stdout
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert abs(losses[0] - math.log(65)) < 0.3
    assert losses[-1] < losses[0] / 2
