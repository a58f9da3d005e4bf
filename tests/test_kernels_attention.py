"""Attention kernels against the float64 reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DTYPES,
    TOLERANCE,
    assert_close,
    assert_refuses,
    assert_refuses_bad_out,
    error,
    read_only,
    same_bits,
    strided,
    values,
    with_threads,
)

from cllm import kernels, reference


def problem(B, H, T, S, D, dtype):
    """q, k, v, dout."""
    return (
        values(B, H, T, D, dtype=dtype),
        values(B, H, S, D, dtype=dtype, seed=1),
        values(B, H, S, D, dtype=dtype, seed=2),
        values(B, H, T, D, dtype=dtype, seed=3),
    )


def both_passes(q, k, v, dout, is_causal, **options):
    out, lse = kernels.attention_forward(q, k, v, is_causal, **options)
    return out, lse, *kernels.attention_backward(dout, q, k, v, out, lse, is_causal, **options)


def reference_passes(q, k, v, dout, is_causal, **options):
    out, lse = reference.attention_forward(q, k, v, is_causal, **options)
    return out, lse, *reference.attention_backward(dout, q, k, v, out, lse, is_causal, **options)


def assert_gradients_close(results, expected, dout, dtype):
    """Where a gradient is 0 (one visible key), rounding is measured against dout."""
    for result, want in zip(results, expected):
        assert result.dtype == dtype
        assert result.shape == want.shape
        limit = TOLERANCE[np.dtype(dtype)] * max(np.linalg.norm(want), 0.3 * np.linalg.norm(dout))
        assert np.linalg.norm(result - want) <= limit


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)
    ),
    st.booleans(),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from(DTYPES),
)
def test_attention(shape, is_causal, dropout_p, dtype):
    q, k, v, dout = problem(*shape, dtype)
    options = {"dropout_p": dropout_p, "key": 0x123456789ABCDEF}
    results = with_threads(1, lambda: both_passes(q, k, v, dout, is_causal, **options))
    assert same_bits(with_threads(3, lambda: both_passes(q, k, v, dout, is_causal, **options)), results)
    expected = reference_passes(q, k, v, dout, is_causal, **options)
    assert_close(results[:2], expected[:2], dtype)
    assert_gradients_close(results[2:], expected[2:], dout, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (1, 2, 200, 200, 33), (2, 1, 97, 300, 64), (1, 1, 300, 64, 130)]
)
def test_sizes_over_several_blocks(shape, is_causal, dtype):
    q, k, v, dout = problem(*shape, dtype)
    results = with_threads(1, lambda: both_passes(q, k, v, dout, is_causal))
    assert same_bits(with_threads(2, lambda: both_passes(q, k, v, dout, is_causal)), results)
    expected = reference_passes(q, k, v, dout, is_causal)
    assert_close(results[:2], expected[:2], dtype)
    assert_gradients_close(results[2:], expected[2:], dout, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_large_scores(dtype):
    q, k, v, dout = problem(1, 2, 40, 40, 8, dtype)
    expected = reference_passes(q, k, v, dout, True, scale=0.7)
    assert_gradients_close(both_passes(q, k, v, dout, True, scale=0.7), expected, dout, dtype)
    out, lse = kernels.attention_forward(1e4 * q, k, v, True)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_only_what_depends_on_it(name, bad):
    """Against the reference, which never touches a masked element; T = 100 has whole and partial tiles."""
    for position in (0, 7, 63, 64, 99):
        arrays = dict(zip(("q", "k", "v", "dout"), problem(1, 1, 100, 100, 16, np.float32)))
        clean = both_passes(**arrays, is_causal=True)
        arrays[name][0, 0, position, 3] = bad
        results = both_passes(**arrays, is_causal=True)
        with np.errstate(all="ignore"):
            expected = reference_passes(**arrays, is_causal=True)
        for result, want, before in zip(results, expected, clean):
            assert np.array_equal(np.isfinite(result), np.isfinite(want))
            same = np.isfinite(want) & np.isclose(want, before, rtol=1e-3, atol=1e-4)
            assert np.allclose(result[same], want[same], rtol=1e-3, atol=1e-4)


def test_empty_sizes():
    for shape in ((0, 2, 3, 3, 4), (2, 0, 3, 3, 4), (2, 2, 0, 3, 4)):
        q, k, v, dout = problem(*shape, np.float32)
        out, _, dq, dk, dv = both_passes(q, k, v, dout, False)
        assert out.shape == dq.shape == q.shape
        assert not dk.any()
        assert not dv.any()
    q, k, v, _ = problem(1, 1, 3, 0, 4, np.float32)
    message = "attention_forward: k is (1, 1, 0, 4), it must have at least one key"
    assert_refuses(ValueError, message, kernels.attention_forward, q, k, v)


def test_reads_any_array():
    arrays = problem(2, 3, 37, 37, 16, np.float32)
    expected = both_passes(*arrays, True)
    assert same_bits(both_passes(*[read_only(x) for x in arrays], True), expected)
    assert same_bits(both_passes(*[strided(x) for x in arrays], True), expected)
    views = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in arrays]
    assert same_bits(both_passes(*views, True), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_packed_attention_is_attention(dropout_p):
    B, T, H, D = 3, 50, 4, 6
    qkv, dout = values(B, T, 3 * H * D, dtype=np.float32), values(B, T, H * D, dtype=np.float32, seed=1)
    options = {"dropout_p": dropout_p, "key": 5}
    heads = [np.moveaxis(x.reshape(B, T, H, D), 2, 1) for x in (*np.split(qkv, 3, axis=-1), dout)]
    out, lse, *gradients = both_passes(*heads, True, **options)
    merged = [np.ascontiguousarray(np.moveaxis(x, 1, 2)).reshape(B, T, H * D) for x in (out, *gradients)]
    packed, packed_lse = kernels.packed_attention_forward(qkv, H, **options)
    assert same_bits((packed, packed_lse), (merged[0], lse))
    dqkv = kernels.packed_attention_backward(dout, qkv, packed, packed_lse, H, **options)
    assert same_bits(dqkv, np.concatenate(merged[1:], axis=-1))


def test_dropout_keeps_the_mean_and_depends_on_its_key():
    q, k, v, _ = problem(4, 4, 64, 64, 8, np.float32)
    v = np.ones_like(v)
    out, _ = kernels.attention_forward(q, k, v, dropout_p=0.25, key=1)
    assert abs(out.mean() - 1) < 0.01
    assert same_bits(kernels.attention_forward(q, k, v, dropout_p=0.25, key=1)[0], out)
    assert error(kernels.attention_forward(q, k, v, dropout_p=0.25, key=2)[0], out) > 0.01


def test_refuses_bad_arguments():
    q, k, v, dout = problem(2, 3, 5, 6, 4, np.float32)
    forward, backward = kernels.attention_forward, kernels.attention_backward
    out, lse = forward(q, k, v)
    assert_refuses(
        ValueError, "attention_forward: q is (3, 5, 4), it must be (B, H, T, D)", forward, q[0], k, v
    )
    message = (
        "attention_forward: v is (2, 3, 5, 4), it must be (2, 3, 6, 4), "
        "since q is (2, 3, 5, 4) and k is (2, 3, 6, 4)"
    )
    assert_refuses(ValueError, message, forward, q, k, q)
    message = "attention_forward: k is float64 but q is float32; all must have one dtype"
    assert_refuses(TypeError, message, forward, q, k.astype(np.float64), v)
    message = "attention_forward: dropout_p is 1.0, it must be in [0, 1)"
    assert_refuses(ValueError, message, forward, q, k, v, dropout_p=1.0)
    message = "attention_backward: lse is (2, 3) float32, it must be (2, 3, 5) float32"
    assert_refuses(ValueError, message, backward, dout, q, k, v, out, lse[..., 0])
    block = np.zeros(2 * q.size, np.float32)
    inside, overlapping = block[: q.size].reshape(q.shape), block[q.size - 1 : -1].reshape(q.shape)
    assert_refuses_bad_out(lambda o: forward(inside, k, v, out=(o, None))[0], out, overlapping)


@pytest.mark.parametrize("dropout_p", [1e-17, 1e-10, 1 - 1e-16])
def test_dropout_close_to_its_limits(dropout_p):
    """1 - 1e-17 is 1: everything stays; 1 - 1e-16 drops all but one element in 2^53."""
    q, k, v, dout = problem(1, 1, 9, 9, 4, np.float64)
    results = both_passes(q, k, v, dout, False, dropout_p=dropout_p, key=2**64 - 1)
    expected = reference_passes(q, k, v, dout, False, dropout_p=dropout_p, key=2**64 - 1)
    assert_close(results, expected, np.float64)


def test_no_channels_and_no_heads():
    qkv = np.zeros((2, 3, 0), np.float32)
    out, lse = kernels.packed_attention_forward(qkv, 2, is_causal=False)
    assert np.allclose(lse, np.log(3))
    assert kernels.packed_attention_backward(out, qkv, out, lse, 2).shape == qkv.shape
    q, k = np.zeros((1, 1, 3, 0)), np.zeros((1, 1, 0, 0))
    message = "attention_forward: k is (1, 1, 0, 0), it must have at least one key"
    assert_refuses(ValueError, message, kernels.attention_forward, q, k, k)


def test_refuses_bad_scalars():
    q, _, _, _ = problem(1, 1, 3, 3, 4, np.float32)
    qkv = np.zeros((2, 3, 12), np.float32)
    attention, packed = kernels.attention_forward, kernels.packed_attention_forward
    for key in (-1, 2**64):
        message = f"attention_forward: key is {key}, it must be in [0, 2**64)"
        assert_refuses(ValueError, message, attention, q, q, q, key=key)
        message = f"packed_attention_forward: key is {key}, it must be in [0, 2**64)"
        assert_refuses(ValueError, message, packed, qkv, 2, key=key)
    message = "attention_forward: key is 1.5, it must be an integer"
    assert_refuses(TypeError, message, attention, q, q, q, key=1.5)
    message = "attention_forward: dropout_p is None, it must be a number"
    assert_refuses(TypeError, message, attention, q, q, q, dropout_p=None)
    message = "attention_forward: scale is 'a', it must be a number"
    assert_refuses(TypeError, message, attention, q, q, q, scale="a")
    message = "packed_attention_forward: n_head is 2.0, it must be an integer"
    assert_refuses(TypeError, message, packed, qkv, 2.0)
    message = "packed_attention_forward: n_head is 0, it must be at least 1"
    assert_refuses(ValueError, message, packed, qkv, 0)
    message = "packed_attention_forward: qkv is None, it must be float32 or float64"
    assert_refuses(TypeError, message, packed, None, 2)
