"""What holds for every kernel, over drawn shapes: the table of `cllm.parity`, called in many ways."""

import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import misaligned, read_only, same_bits, strided, with_threads

from cllm import kernels, parity

# The sanitizers' builds are slow: tests/sanitize.sh asks for fewer.
EXAMPLES = int(os.environ.get("CLLM_TEST_EXAMPLES", "12"))
GUARD = 64  # bytes on either side of an output


def guarded(like):
    """An array of `like`'s shape and dtype, full of NaN (or -1), and its buffer, whose ends must stay."""
    buffer = np.full(like.nbytes + 2 * GUARD, 0xA5, np.uint8)
    inside = buffer[GUARD : GUARD + like.nbytes]
    inside[...] = 0xFF
    return inside.view(like.dtype).reshape(like.shape), buffer


def assert_intact(buffer):
    assert (buffer[:GUARD] == 0xA5).all(), "wrote before its output"
    assert (buffer[-GUARD:] == 0xA5).all(), "wrote after its output"


def as_tuple(results):
    """What a kernel returned as a tuple of arrays; None stays."""
    results = results if isinstance(results, tuple) else (results,)
    return tuple(None if x is None else np.asarray(x) for x in results)


class Probe:
    """The door to the kernels. Each call is made in every way that must give the same bits."""

    def __init__(self):
        self.called = set()

    def __getattr__(self, name):
        def call(*arguments, **options):
            function = getattr(kernels, name)
            self.called.add(name)
            bound = inspect.signature(function).bind(*arguments, **options).arguments
            arrays = {key: value for key, value in bound.items() if isinstance(value, np.ndarray)}
            others = {key: value for key, value in bound.items() if key not in arrays}
            in_place = name.endswith(("_update", "_"))
            probe = probe_update if in_place else probe_function
            return probe(lambda **changed: function(**others, **{**arrays, **changed}), function, arrays)

        return call


def probe_function(call, function, arrays):
    """Results of a call, after the same from inputs of every kind, on 3 threads and into arrays of ours."""
    before = {name: x.copy() for name, x in arrays.items()}
    expected = with_threads(1, call)
    assert same_bits(as_tuple(with_threads(3, call)), as_tuple(expected)), "depends on the threads"
    for kind in (read_only, misaligned, strided):
        inputs = {name: kind(x) for name, x in arrays.items()}
        assert same_bits(as_tuple(call(**inputs)), as_tuple(expected)), kind.__name__
        assert all(np.array_equal(inputs[name], x) for name, x in before.items()), f"{kind.__name__}: changed"
    results = as_tuple(expected)
    parameters = inspect.signature(function).parameters
    out = "results" if "results" in parameters else "out"
    if out in parameters and parameters[out].default is None:  # elsewhere out is an input
        places = [(None, None) if x is None else guarded(x) for x in results]
        given_out = tuple(x for x, _ in places)
        written = call(**{out: given_out if isinstance(expected, tuple) else given_out[0]})
        assert all(x is y for x, y in zip(as_tuple(written), given_out))
        assert same_bits(given_out, results), "depends on what out held"
        for _, buffer in places:
            if buffer is not None:
                assert_intact(buffer)
    if "accumulate" in parameters:
        starts = [None if x is None else np.full_like(x, 0.5) for x in results]
        sums = tuple(None if x is None else x.copy() for x in starts)
        call(accumulate=True, out=sums if isinstance(expected, tuple) else sums[0])
        for i, (x, start, total) in enumerate(zip(results, starts, sums)):
            if x is not None:
                added = start if i > 0 or len(results) == 1 else np.zeros_like(x)
                assert parity.error(total, added.astype(np.float64) + x) <= parity.BOUNDS[str(x.dtype)]
    for name, x in arrays.items():
        assert same_bits(x, before[name]), f"{name} was changed"
    return expected


def probe_update(call, function, arrays):
    """A call that changes all its arrays but grad; made with grads of every kind, and in guarded arrays."""
    grad = {"grad": arrays["grad"]} if "grad" in arrays else {}
    changed = {name: x for name, x in arrays.items() if name not in grad}

    def updated(**grads):
        copies = {name: x.copy() for name, x in changed.items()}
        call(**copies, **grads)
        return tuple(copies.values())

    before = {name: x.copy() for name, x in grad.items()}
    expected = with_threads(1, updated)
    assert same_bits(with_threads(3, updated), expected), "depends on the threads"
    for kind in (read_only, misaligned, strided):
        assert same_bits(updated(**{name: kind(x) for name, x in grad.items()}), expected), kind.__name__
    places = {name: guarded(x) for name, x in changed.items()}
    for name, (inside, _) in places.items():
        inside[...] = changed[name]
    call(**{name: inside for name, (inside, _) in places.items()})
    assert same_bits(tuple(inside for inside, _ in places.values()), expected)
    for _, buffer in places.values():
        assert_intact(buffer)
    for name, x in grad.items():
        assert same_bits(x, before[name]), "grad was changed"
    return call()


def check(case):
    """The case's results: close to float64, of the dtype, and the same in every way of calling."""
    arrays = case.inputs()
    probe = Probe()
    results = case.results(arrays, probe)
    assert probe.called == set(case.operation.calls.split())
    expected = case.reference_results(arrays)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert (result is None) == (expected[name] is None), name
        if isinstance(result, np.ndarray):
            assert result.dtype == case.dtype, name
    assert parity.largest_error(case.operation, results, expected) <= parity.BOUNDS[case.dtype], str(case)


def drawn_cases(operation):
    hard = [(name, factor) for name, factors in operation.hard.items() for factor in factors]
    return st.builds(
        parity.Case,
        st.just(operation),
        st.fixed_dictionaries({letter: st.integers(*bounds) for letter, bounds in operation.sizes.items()}),
        st.sampled_from(operation.options),
        st.sampled_from(list(parity.BOUNDS)),
        st.sampled_from([None, *hard]),
        st.integers(0, 5),
    )


OPERATIONS = pytest.mark.parametrize("operation", parity.TABLE, ids=lambda operation: operation.name)


@OPERATIONS
def test_any_shape_called_in_any_way(operation):
    @settings(max_examples=EXAMPLES)
    @given(drawn_cases(operation))
    def run(case):
        check(case)

    run()


@OPERATIONS
def test_sizes_that_threads_share(operation):
    for options in operation.options:
        check(parity.Case(operation, operation.large, options, "float32"))
    check(parity.Case(operation, operation.large, operation.options[0], "float64"))


# Where the reference says how far a NaN goes: through products with 0 (of dropped elements, the softmax of
# one key, ignored rows, units that are off, the sine of 0, a weight decay of 0) and clips that clip nothing.
# Elsewhere it goes where a finite change goes.
BY_REFERENCE = {
    "dropout", "rotary", "attention", "packed_attention", "linear_cross_entropy", "feed_forward",
    "sgd", "adam", "adamw", "rmsprop", "adagrad", "adafactor", "adafactor (vector)",
}  # fmt: skip
FINITE = {"class_weight", "slopes"}  # refused when they are not


def with_element(arrays, name, at, value):
    """The arrays, with arrays[name][at] replaced."""
    moved = arrays[name].copy()
    moved[at] = value
    return {**arrays, name: moved}


def dependents(case, arrays, name, at):
    """By name of a result: which elements a NaN in arrays[name][at] must spoil, and which it may."""
    clean = {key: x for key, x in case.reference_results(arrays).items() if x is not None}
    must = {key: np.zeros(np.shape(x), bool) for key, x in clean.items()}
    value = arrays[name][at]
    for other in (-value, value + 1, 5.0, -5.0):
        results = case.reference_results(with_element(arrays, name, at, other))
        must = {key: mask | (results[key] != clean[key]) for key, mask in must.items()}
    if case.operation.name not in BY_REFERENCE:
        return must, must
    results = case.reference_results(with_element(arrays, name, at, np.nan))
    return must, {key: mask | np.isnan(results[key]) for key, mask in must.items()}


@pytest.mark.parametrize(
    "operation",
    [operation for operation in parity.TABLE if operation.name != "array_statistics"],  # which counts them
    ids=lambda operation: operation.name,
)
def test_nan_reaches_exactly_what_depends_on_it_and_infinity_nothing_else(operation):
    """Two elements of each input."""
    sizes = {letter: max(low, min(high, 5)) for letter, (low, high) in operation.sizes.items()}
    rng = np.random.default_rng(0)
    for options in operation.options:
        case = parity.Case(operation, sizes, options, "float32")
        arrays = case.inputs()
        clean = case.results(arrays)
        spoilable = [name for name, x in arrays.items() if x.dtype.kind == "f" and name not in FINITE]
        for name in spoilable * 2:
            at = tuple(int(rng.integers(n)) for n in arrays[name].shape)
            must, may = dependents(case, arrays, name, at)
            for bad in (np.nan, np.inf, -np.inf):
                results = case.results(with_element(arrays, name, at, bad))
                for key in must:
                    reached = ~np.isfinite(results[key]) & (results[key] != clean[key])
                    where = f"{case}: {bad} in {name}{at}, {key}"
                    assert not (reached & ~may[key]).any(), f"leaked: {where}"
                    assert not np.isnan(bad) or (reached | ~must[key]).all(), f"lost: {where}"


def test_every_kernel_has_a_row():
    covered = {name for operation in parity.TABLE for name in operation.calls.split()}
    ours = {name for name in vars(kernels) if name.endswith(("_forward", "_backward", "_update"))}
    assert ours <= covered, f"add to cllm.parity.TABLE: {sorted(ours - covered)}"
    assert all(hasattr(kernels, name) for name in covered)
    assert len({operation.name for operation in parity.TABLE}) == len(parity.TABLE)


@OPERATIONS
def test_errors_against_torch_and_float64(operation):
    """What `python -m cllm.parity` prints."""
    torch = pytest.importorskip("torch", reason="needs the parity extra (torch==2.13.0)")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two pools of threads would wait for each other
    try:
        worst = parity.measure(operation)
    finally:
        torch.set_num_threads(before)
    for column, (error, case) in worst.items():
        assert error <= parity.BOUNDS.get(column, parity.TORCH_BOUND), f"{column}: {case}"


def test_prints_the_table(capsys, monkeypatch):
    assert parity.main(["relu", "scale_"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["operation", "relu", "scale_"]
    assert parity.main(["relu", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| relu | 0.0e+00 | 0.0e+00 | ")
    assert parity.main(["rellu"]) == 2
    assert capsys.readouterr().err == "no operation 'rellu' (did you mean \"relu\"?)\n"
    monkeypatch.setitem(parity.BOUNDS, "float32", 1e-12)
    assert parity.main(["gelu"]) == 1
    assert capsys.readouterr().err.startswith("over its bound: gelu B=")


def test_the_page_shows_every_operation():
    page = Path(__file__).resolve().parents[1] / "docs" / "parity.md"
    _, _, *rows = re.findall(r"^\| (.+?) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [operation.name for operation in parity.TABLE]
