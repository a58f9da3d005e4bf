"""Embedding kernels against the float64 reference."""

import numpy as np
import pytest
from kernel_checks import (
    DTYPES,
    assert_close,
    assert_reads_any_array,
    assert_refuses,
    assert_refuses_bad_out,
    assert_same_at_any_thread_count,
    error,
    same_bits,
    values,
)

from cllm import kernels, reference

# tokens' shape, V, C: one of each; no tokens; one token without a dimension; columns that no line of 16
# divides; more columns than a block; tokens that occur more than 32 times.
CASES = [
    ((1,), 1, 1), ((0,), 5, 4), ((3, 0), 5, 4), ((), 5, 4), ((4, 9), 7, 17), ((2, 50), 200, 300),
    ((130,), 3, 33),
]  # fmt: skip


def problem(shape, V, C, dtype):
    """dy, tokens, weight."""
    tokens = np.random.default_rng(1).integers(0, V, shape)
    return values(*shape, C, dtype=dtype), tokens, values(V, C, dtype=dtype, seed=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "V", "C"), CASES)
def test_embedding(shape, V, C, dtype):
    dy, tokens, weight = problem(shape, V, C, dtype)
    out = kernels.embedding_forward(tokens, weight)
    assert out.shape == (*shape, C)
    assert np.array_equal(out, weight[tokens])
    dweight = kernels.embedding_backward(dy, tokens, V)
    assert_close(dweight, reference.embedding_backward(dy, tokens, V), dtype)
    assert not dweight[np.setdiff1d(np.arange(V), tokens)].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_fills_the_batch_keeps_its_digits(dtype):
    """A plain float32 sum of 20000 rows of one sign loses 1e-4."""
    dy, tokens = np.abs(values(20_000, 40, dtype=dtype)), np.full(20_000, 2)
    result = kernels.embedding_backward(dy, tokens, 4)
    expected = reference.embedding_backward(dy, tokens, 4)
    assert error(result, expected) < (2e-6 if dtype == np.float32 else 1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("V", "C"), [(65, 128), (1000, 300), (3, 17)])
def test_the_same_bits_at_any_thread_count(V, C, dtype):
    dy, tokens, weight = problem((8, 500), V, C, dtype)
    assert_same_at_any_thread_count(lambda: kernels.embedding_forward(tokens, weight))
    assert_same_at_any_thread_count(lambda: kernels.embedding_backward(dy, tokens, V))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate_adds(dtype):
    dy, tokens, before = problem((4, 30), 11, 20, dtype)
    fresh = kernels.embedding_backward(dy, tokens, 11)
    out = before.copy()
    assert kernels.embedding_backward(dy, tokens, 11, out=out, accumulate=True) is out
    assert_close(out, before + reference.embedding_backward(dy, tokens, 11), dtype)
    assert same_bits(kernels.embedding_backward(dy, tokens, 11, out=out), fresh)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_its_token_alone(dtype):
    dy, tokens, weight = problem((40,), 6, 10, dtype)
    dy[3, 4] = np.nan
    weight[tokens[3]] = np.nan
    wrong = np.zeros((6, 10), bool)
    wrong[tokens[3], 4] = True
    assert np.array_equal(np.isnan(kernels.embedding_backward(dy, tokens, 6)), wrong)
    assert np.array_equal(np.isnan(kernels.embedding_forward(tokens, weight))[:, 0], tokens == tokens[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_out(dtype):
    dy, tokens, weight = problem((4, 6), 9, 10, dtype)
    assert_reads_any_array(kernels.embedding_forward, tokens, weight)
    assert_reads_any_array(lambda dy, tokens: kernels.embedding_backward(dy, tokens, 9), dy, tokens)
    for kind in (np.uint8, np.int16, np.uint32, np.uint64):
        assert same_bits(kernels.embedding_forward(tokens.astype(kind), weight), weight[tokens])
    block = np.zeros((33, 10), dtype)
    table = block[:9]
    table[...] = weight
    assert_refuses_bad_out(
        lambda out: kernels.embedding_forward(tokens, table, out=out), dy, block[5:29].reshape(4, 6, 10)
    )
    block = np.zeros((24, 10), dtype)
    rows = block.reshape(4, 6, 10)
    assert_refuses_bad_out(
        lambda out: kernels.embedding_backward(rows, tokens, 9, out=out), weight, block[15:]
    )  # fmt: skip


def test_a_bad_token_is_named_before_anything_is_written():
    weight, dy = np.zeros((5, 3), np.float32), np.zeros((2, 2, 3), np.float32)
    out, dweight = np.full((2, 2, 3), 9, np.float32), np.full((5, 3), 9, np.float32)
    for bad in (5, -1):
        tokens = np.array([[0, 4], [1, bad]])
        message = f"embedding_forward: tokens[1, 1] is {bad}, it must be in [0, 5)"
        assert_refuses(ValueError, message, kernels.embedding_forward, tokens, weight, out=out)
        message = f"embedding_backward: tokens[1, 1] is {bad}, it must be in [0, 5)"
        assert_refuses(ValueError, message, kernels.embedding_backward, dy, tokens, 5, out=dweight)
    assert (out == 9).all()
    assert (dweight == 9).all()


def test_refuses_bad_arguments():
    weight, tokens = np.zeros((5, 3), np.float32), np.zeros(4, np.int64)
    forward, backward = kernels.embedding_forward, kernels.embedding_backward
    message = "embedding_forward: weight is (5,), it must be (V, C)"
    assert_refuses(ValueError, message, forward, tokens, weight[:, 0])
    message = "embedding_forward: tokens is float32, it must be an integer array"
    assert_refuses(TypeError, message, forward, weight, weight)
    message = "embedding_forward: weight is int64, it must be float32 or float64"
    assert_refuses(TypeError, message, forward, tokens, weight.astype(np.int64))
    message = "embedding_backward: dy is (5, 3), tokens is (4,); they must be (*tokens.shape, C)"
    assert_refuses(ValueError, message, backward, weight, tokens, 5)
    message = "embedding_backward: accumulate=True needs an array in out"
    assert_refuses(ValueError, message, backward, weight[:4], tokens, 5, accumulate=True)
    for n_rows, kind, what in ((-1, ValueError, "in [0, 2**48)"), (2**70, ValueError, "in [0, 2**48)"),
                               (4.5, TypeError, "an integer")):  # fmt: skip
        message = f"embedding_backward: n_rows is {n_rows}, it must be {what}"
        assert_refuses(kind, message, backward, weight[:0], tokens[:0], n_rows)
    message = f"embedding_forward: tokens has {2**64 - 1}, it must be below 2**63"
    assert_refuses(ValueError, message, forward, np.array([2**64 - 1], np.uint64), weight)
    message = "embedding_forward: tokens is a ragged list, its rows must have one length"
    assert_refuses(ValueError, message, forward, [[0], [1, 2]], weight)


def test_number_of_rows_of_a_small_dtype_does_not_wrap():
    """200 + 100 is 44 in uint8, too short for the lists of tokens; 200 + 300 raises there."""
    for n in (300, 100):
        dy, tokens = values(n, 8), np.arange(n) % 200
        assert same_bits(kernels.embedding_backward(dy, tokens, np.uint8(200)),
                         kernels.embedding_backward(dy, tokens, 200))  # fmt: skip
