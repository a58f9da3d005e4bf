"""Windows of tokens against a plain reference, and what the door refuses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import assert_refuses

from cllm import kernels


def reference(tokens, starts, block_size, lengths=None, documents=None, end=None):
    """gather_windows, one target at a time."""
    shape = len(starts), block_size
    inputs, targets, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    for b, start in enumerate(starts):
        for t in range(block_size if lengths is None else lengths[b]):
            place = start + t
            inputs[b, t], targets[b, t] = tokens[place], tokens[place + 1]
            begins = documents is not None and place + 1 in documents
            mask[b, t] = not begins and tokens[place] != end
    return inputs, targets, mask


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(["uint8", "uint16", "uint32", "int64"]))
    n = draw(st.integers(2, 200))
    high = min(np.iinfo(dtype).max, draw(st.sampled_from([3, 300, 70_000, 2**40])))
    tokens = np.random.default_rng(draw(st.integers(0, 99))).integers(0, high, n, endpoint=True).astype(dtype)
    block_size = draw(st.integers(1, n - 1))
    starts = draw(st.lists(st.integers(0, n - 1 - block_size), max_size=9))
    options = {}
    if draw(st.booleans()):
        options["lengths"] = [draw(st.integers(0, block_size)) for _ in starts]
    if draw(st.booleans()):
        options["documents"] = sorted(draw(st.lists(st.integers(0, n), max_size=30)))
    if draw(st.booleans()):
        options["end"] = draw(st.sampled_from([0, 1, 2, 255, 256, 2**40]))
    return tokens, np.array(starts, np.int64), block_size, options


@given(cases())
def test_windows_are_the_references(case):
    tokens, starts, block_size, options = case
    tokens.flags.writeable = False
    arrays = {name: value if name == "end" else np.array(value, np.int64) for name, value in options.items()}
    results = kernels.gather_windows(tokens, starts, block_size, **arrays)
    expected = reference(tokens, starts, block_size, **options)
    for found, wanted in zip(results, expected):
        if found is None:
            assert not options
            continue
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        np.testing.assert_array_equal(found, wanted)
    out = tuple(None if array is None else np.empty_like(array) for array in results)
    results_again = kernels.gather_windows(tokens, starts, block_size, out, **arrays, prefetch=True)
    for given_out, again in zip(out, results_again):
        assert again is given_out
    for given_out, found in zip(out, results):
        np.testing.assert_array_equal(given_out, found)


def test_documents_out_of_order_write_nothing_outside():
    inputs, targets, mask = np.zeros((2, 8), np.int64), np.zeros((2, 8), np.int64), np.zeros((4, 8), bool)
    places = np.array([30, -5, 2, 19, 2**62, 0, 21])
    kernels.gather_windows(
        np.arange(40), np.array([10, 20]), 8, (inputs, targets, mask[1:3]), documents=places
    )
    assert not mask[0].any() and not mask[3].any()


TOKENS = np.arange(20, dtype=np.uint16)
OUT = (np.empty((1, 4), np.int64), np.empty((1, 4), np.int64), None)


@pytest.mark.parametrize(
    ("kind", "message", "arguments", "options"),
    [
        (ValueError, "gather_windows: starts[1] is 16, it must be in [0, 16)", (TOKENS, [0, 16], 4), {}),
        (ValueError, "gather_windows: starts[0] is -1, it must be in [0, 16)", (TOKENS, [-1], 4), {}),
        (ValueError, "gather_windows: starts[0] is 0, it must be in [0, 0)", (TOKENS, [0], 20), {}),
        (
            ValueError,
            "gather_windows: lengths[0] is 5, it must be in [0, 5)",
            (TOKENS, [0], 4),
            {"lengths": [5]},
        ),
        (
            ValueError,
            "gather_windows: starts + lengths[0] is 20, it must be in [0, 20)",
            (TOKENS, [17], 4),
            {"lengths": [3]},
        ),
        (
            ValueError,
            "gather_windows: lengths is (2,), it must be (1,)",
            (TOKENS, [0], 4),
            {"lengths": [1, 2]},
        ),
        (
            ValueError,
            "gather_windows: documents is (1, 1), it must be (m,)",
            (TOKENS, [0], 4),
            {"documents": [[1]]},
        ),
        (ValueError, "gather_windows: block_size is 0, it must be in [1, 2**48)", (TOKENS, [0], 0), {}),
        (ValueError, "gather_windows: end is -1, it must be in [0, 2**63)", (TOKENS, [0], 4), {"end": -1}),
        (ValueError, "gather_windows: starts is (1, 1), it must be (B,)", (TOKENS, [[0]], 4), {}),
        (
            ValueError,
            "gather_windows: tokens are strided or unaligned, they must be contiguous",
            (TOKENS[::2], [0], 4),
            {},
        ),
        (
            TypeError,
            "gather_windows: tokens must be a 1-D array of uint8, uint16, uint32, int64",
            (TOKENS.astype(">u2"), [0], 4),
            {},
        ),
        (TypeError, "gather_windows: starts is float64, it must be an integer array", (TOKENS, [0.5], 4), {}),
        (
            ValueError,
            "gather_windows: out has a mask, there is one only with lengths, documents or end",
            (TOKENS, [0], 4, (*OUT[:2], np.empty((1, 4), bool))),
            {},
        ),
        (
            TypeError,
            "gather_windows: mask is NoneType, it must be a NumPy array",
            (TOKENS, [0], 4, OUT),
            {"end": 1},
        ),
        (
            ValueError,
            "gather_windows: targets overlaps an input or another output, it must have its own memory",
            (TOKENS, [0], 4, (OUT[0], OUT[0], None)),
            {},
        ),
    ],
)
def test_refuses(kind, message, arguments, options):
    assert_refuses(kind, message, kernels.gather_windows, *arguments, **options)
