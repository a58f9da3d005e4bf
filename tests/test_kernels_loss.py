"""Softmax cross-entropy kernels against the float64 reference."""

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

# One class; fewer than lanes; one more than whole lanes; longer than a chunk; no rows.
SHAPES = [(1, 1), (5, 3), (33, 65), (9, 1024), (4, 2111), (0, 7)]


def problem(shape, dtype, scale=3.0):
    """dlosses, logits, targets; some targets are ignored."""
    n, V = shape
    targets = np.random.default_rng(1).integers(0, V, n)
    targets[2::4] = -100
    return values(n, dtype=dtype, seed=2), values(n, V, dtype=dtype, scale=scale), targets


def check(dlosses, logits, targets, **options):
    """Forward and backward against the reference; returns them."""
    losses, lse = kernels.cross_entropy_forward(logits, targets, **options)
    losses64, lse64 = reference.cross_entropy_forward(logits, targets, **options)
    assert_close((losses, lse), (losses64, lse64), logits.dtype)
    dlogits = kernels.cross_entropy_backward(dlosses, logits, targets, lse, **options)
    dlogits64 = reference.cross_entropy_backward(dlosses, logits, targets, lse64, **options)
    if logits.shape[1] > 1:  # with one class the gradient is 0
        assert_close(dlogits, dlogits64, logits.dtype)
    assert np.abs(dlogits - dlogits64).max(initial=0) < 1e-5
    return losses, lse, dlogits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape, label_smoothing, dtype):
    check(*problem(shape, dtype), label_smoothing=label_smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_have_no_loss_and_no_gradient(dtype):
    dlosses, logits, targets = problem((20, 40), dtype)
    logits[2] = np.nan
    losses, lse = kernels.cross_entropy_forward(logits, targets)
    dlogits = kernels.cross_entropy_backward(dlosses, logits, targets, lse)
    ignored = targets == -100
    assert np.array_equal(losses[ignored], np.zeros(ignored.sum()))
    assert not dlogits[ignored].any()
    assert dlogits[~ignored].all()
    targets[:] = 5
    targets[3] = 39
    check(dlosses, np.nan_to_num(logits), targets, ignore_index=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_logits_of_any_size_are_safe(label_smoothing, dtype):
    """Rows of +-1e4; rows that lie close together far from 0, where float32 cannot hold lse to 1e-3."""
    dlosses, logits, targets = problem((33, 65), dtype, scale=1e4)
    losses, _, dlogits = check(dlosses, logits, targets, label_smoothing=label_smoothing)
    assert np.isfinite(losses).all()
    assert np.isfinite(dlogits).all()
    for offset in (1e4, -1e4):
        near = (values(33, 65, dtype=dtype) + dtype(offset)).astype(dtype)
        check(dlosses, near, targets, label_smoothing=label_smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_is_a_class_that_cannot_be(dtype):
    dlosses, logits, targets = problem((4, 70), dtype)
    targets[:] = 3
    logits[:, 10:] = -np.inf
    _, _, dlogits = check(dlosses, logits, targets)
    assert not dlogits[:, 10:].any()
    logits[1, 3] = -np.inf
    losses, _ = kernels.cross_entropy_forward(logits, targets)
    assert losses[1] == np.inf
    assert np.isfinite(losses[[0, 2, 3]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [0, 31, 64])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_spoils_its_row_alone(bad, column, dtype):
    dlosses, logits, targets = problem((6, 65), dtype)
    targets[:] = 7
    logits[4, column] = bad
    logits[5] = np.nan
    losses, lse = kernels.cross_entropy_forward(logits, targets)
    assert np.array_equal(np.isnan(losses), [False] * 4 + [True] * 2)
    assert np.array_equal(np.isnan(lse), [False] * 4 + [True] * 2)
    dlogits = kernels.cross_entropy_backward(dlosses, logits, targets, lse)
    assert np.isnan(dlogits[4:]).all()
    assert np.isfinite(dlogits[:4]).all()
    dlosses[0] = np.nan
    assert np.isnan(kernels.cross_entropy_backward(dlosses, logits, targets, lse)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_row_sums_to_zero_and_has_no_denormals(dtype):
    dlosses, logits, targets = problem((33, 300), dtype, scale=25)
    _, lse = kernels.cross_entropy_forward(logits, targets)
    dlogits = kernels.cross_entropy_backward(dlosses * dtype(1e-5), logits, targets, lse)
    assert np.abs(dlogits.sum(1, dtype=np.float64)).max() < 1e-11
    assert not np.any((dlogits != 0) & (np.abs(dlogits) < np.finfo(dtype).tiny))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 65), (35, 2111)])
def test_the_same_bits_at_any_thread_count(shape, dtype):
    dlosses, logits, targets = problem(shape, dtype)
    options = {"label_smoothing": 0.1}
    assert_same_at_any_thread_count(lambda: kernels.cross_entropy_forward(logits, targets, **options))
    _, lse = kernels.cross_entropy_forward(logits, targets, **options)
    assert_same_at_any_thread_count(
        lambda: kernels.cross_entropy_backward(dlosses, logits, targets, lse, **options)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_may_overwrite_the_logits(shape, dtype):
    dlosses, logits, targets = problem(shape, dtype)
    _, lse = kernels.cross_entropy_forward(logits, targets)
    expected = kernels.cross_entropy_backward(dlosses, logits, targets, lse)
    assert kernels.cross_entropy_backward(dlosses, logits, targets, lse, out=logits) is logits
    assert same_bits(logits, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_out(dtype):
    dlosses, logits, targets = problem((6, 12), dtype)
    assert_reads_any_array(kernels.cross_entropy_forward, logits, targets)
    _, lse = kernels.cross_entropy_forward(logits, targets)
    assert_reads_any_array(kernels.cross_entropy_backward, dlosses, logits, targets, lse)
    for kind in (np.int8, np.int32, np.uint16):
        few = np.where(targets == -100, 0, targets).astype(kind)
        plain = kernels.cross_entropy_forward(logits, few.astype(np.int64))
        assert same_bits(kernels.cross_entropy_forward(logits, few), plain)
    for i in range(2):
        assert_refuses_bad_out(
            lambda out, i=i: kernels.cross_entropy_forward(
                logits, targets, out=(out, None) if i == 0 else (None, out)
            )[i],
            lse, logits[0, :6],
        )  # fmt: skip
    overlapping = np.empty((7, 12), dtype)
    shifted = overlapping[:6]
    shifted[...] = logits
    assert_refuses_bad_out(
        lambda out: kernels.cross_entropy_backward(dlosses, shifted, targets, lse, out=out),
        logits, overlapping[1:],
    )  # fmt: skip


def test_a_bad_target_is_named_before_anything_is_written():
    logits = np.zeros((3, 4), np.float32)
    losses, lse = np.full(3, 9, np.float32), np.full(3, 9, np.float32)
    dlogits = np.full((3, 4), 9, np.float32)
    for bad in (4, -1):
        message = f"cross_entropy_forward: targets[2] is {bad}, it must be in [0, 4) or ignore_index, -100"
        targets = np.array([0, -100, bad])
        assert_refuses(ValueError, message, kernels.cross_entropy_forward, logits, targets, out=(losses, lse))
    message = "cross_entropy_backward: targets[0] is -100, it must be in [0, 4) or ignore_index, -1"
    targets = np.array([-100, 0, -1])
    backward = kernels.cross_entropy_backward
    assert_refuses(ValueError, message, backward, losses, logits, targets, lse, ignore_index=-1, out=dlogits)
    for out in (losses, lse, dlogits):
        assert (out == 9).all()


def test_refuses_bad_arguments():
    logits, targets, row = np.zeros((3, 4), np.float32), np.zeros(3, np.int64), np.zeros(3, np.float32)
    forward, backward = kernels.cross_entropy_forward, kernels.cross_entropy_backward
    message = "cross_entropy_forward: logits is (3, 4), targets is (2,); they must be (N, V), (N,)"
    assert_refuses(ValueError, message, forward, logits, targets[:2])
    message = "cross_entropy_forward: logits is (3, 0), targets is (3,); V must be at least 1"
    assert_refuses(ValueError, message, forward, logits[:, :0], targets)
    message = "cross_entropy_forward: label_smoothing is 1.5, it must be in [0, 1]"
    assert_refuses(ValueError, message, forward, logits, targets, label_smoothing=1.5)
    message = "cross_entropy_forward: targets is float64, it must be an integer array"
    assert_refuses(TypeError, message, forward, logits, targets.astype(np.float64))
    message = "cross_entropy_backward: lse is (2,), it must be (3,)"
    assert_refuses(ValueError, message, backward, row, logits, targets, row[:2])
    message = "cross_entropy_backward: logits is float64 but dlosses is float32; all must have one dtype"
    assert_refuses(TypeError, message, backward, row, logits.astype(np.float64), targets, row)


def test_losses_near_zero_keep_their_digits():
    """A confident row: loss = log(1 + e^-12), where lse - logit would be 0 or 1e-6 in float32."""
    logits = np.array([[12.0, 0.0]], np.float32)
    losses, _ = kernels.cross_entropy_forward(logits, np.array([0]))
    assert error(losses, [np.log1p(np.exp(-12.0))]) < 1e-2


def test_refuses_bad_scalars_and_targets_that_wrap():
    logits, targets = np.zeros((3, 4), np.float32), [0, 1, 2]
    forward = kernels.cross_entropy_forward
    for ignore_index in (None, 1.5):
        message = f"cross_entropy_forward: ignore_index is {ignore_index}, it must be an integer"
        assert_refuses(TypeError, message, forward, logits, targets, ignore_index=ignore_index)
    message = f"cross_entropy_forward: ignore_index is {2**70}, it must be in [-2**63, 2**63)"
    assert_refuses(ValueError, message, forward, logits, targets, ignore_index=2**70)
    message = "cross_entropy_forward: label_smoothing is 'a', it must be a number"
    assert_refuses(TypeError, message, forward, logits, targets, label_smoothing="a")
    message = f"cross_entropy_forward: targets has {2**64 - 100}, it must be below 2**63"  # as int64: -100
    assert_refuses(ValueError, message, forward, logits, np.array([2**64 - 100, 1, 2], np.uint64))
