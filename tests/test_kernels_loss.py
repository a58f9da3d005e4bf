"""The loss kernels (cross-entropy, regression, binary) against the float64 reference and torch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DTYPES,
    TOLERANCE,
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
from cllm.kernels import loss

# One class; fewer than lanes; one more than whole lanes; longer than a chunk; no rows.
SHAPES = [(1, 1), (5, 3), (33, 65), (9, 1024), (4, 2111), (0, 7)]


def problem(shape, dtype, scale=3.0):
    """dlosses, logits, targets; some targets are ignored."""
    n, V = shape
    targets = np.random.default_rng(1).integers(0, V, n)
    targets[2::4] = -100
    return values(n, dtype=dtype, seed=2), values(n, V, dtype=dtype, scale=scale), targets


def soft_problem(shape, dtype, scale=3.0):
    """dlosses, logits, probabilities: rows that add up to 1, a few that are one 1 and zeros."""
    n, V = shape
    probabilities = np.random.default_rng(3).dirichlet(np.full(V, 0.5), n).reshape(n, V)
    probabilities[1::3] = np.eye(V)[np.arange(len(probabilities[1::3])) % V]
    return values(n, dtype=dtype, seed=2), values(n, V, dtype=dtype, scale=scale), probabilities.astype(dtype)


def weights_of(V, dtype, seed=4):
    """Class weights in [0, 2), some of them 0."""
    weight = np.random.default_rng(seed).uniform(0, 2, V).astype(dtype)
    weight[2::5] = 0
    return weight


def check(dlosses, logits, targets, kind="cross_entropy", **options):
    """Forward and backward against the reference; returns them."""
    ours = [getattr(kernels, f"{kind}_{way}") for way in ("forward", "backward")]
    theirs = [getattr(reference, f"{kind}_{way}") for way in ("forward", "backward")]
    losses, lse = ours[0](logits, targets, **options)
    losses64, lse64 = theirs[0](logits, targets, **options)
    assert_close((losses, lse), (losses64, lse64), logits.dtype)
    dlogits = ours[1](dlosses, logits, targets, lse, **options)
    dlogits64 = theirs[1](dlosses, logits, targets, lse64, **options)
    if logits.shape[1] > 1:  # with one class the gradient is 0, or the small one of z-loss
        assert_close(dlogits, dlogits64, logits.dtype)
    assert np.abs(dlogits - dlogits64).max(initial=0) < 1e-5 * max(np.abs(dlogits64).max(initial=0), 1)
    return losses, lse, dlogits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape, label_smoothing, weighted, z_loss, dtype):
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    options["weight"] = weights_of(shape[1], dtype) if weighted else None
    check(*problem(shape, dtype), **options)
    mask = np.arange(shape[0]) % 4 != 1
    check(*soft_problem(shape, dtype), kind="soft_cross_entropy", **options)
    check(*soft_problem(shape, dtype), kind="soft_cross_entropy", mask=mask, **options)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cross_entropy_of_drawn_shapes_and_options(data):
    """The same bits from rows of a block as from the same rows elsewhere, and all close to the reference."""
    n, V = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 200) | st.integers(1000, 1100))
    dtype = data.draw(st.sampled_from(DTYPES))
    options = {
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        "z_loss": data.draw(st.sampled_from([0.0, 1e-4, 0.5])),
        "weight": data.draw(st.sampled_from([None, weights_of(V, dtype)])),
    }
    scale = data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    dlosses, logits, targets = problem((n, V), dtype, scale)
    result = check(dlosses, logits, targets, **options)
    soft = soft_problem((n, V), dtype, scale)
    check(*soft, kind="soft_cross_entropy", **options)
    part = slice(n // 3, None)
    losses, lse = kernels.cross_entropy_forward(logits[part], targets[part], **options)
    dlogits = kernels.cross_entropy_backward(dlosses[part], logits[part], targets[part], lse, **options)
    assert same_bits((losses, lse, dlogits), tuple(array[part] for array in result))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(5, 1), (7, 3), (33, 65), (3, 1030), (0, 4)])
def test_cross_entropy_is_torchs(shape, label_smoothing, weighted, dtype):
    """Values and gradients, of classes and of probabilities, with z-loss added by hand."""
    torch = pytest.importorskip("torch")
    weight, z_loss = weights_of(shape[1], dtype) if weighted else None, 0.01
    options = {"weight": weight, "label_smoothing": label_smoothing, "z_loss": z_loss}
    theirs = {"weight": None if weight is None else torch.tensor(weight), "label_smoothing": label_smoothing}
    for kind, (dlosses, logits, targets) in (
        ("cross_entropy", problem(shape, dtype)),
        ("soft_cross_entropy", soft_problem(shape, dtype)),
    ):
        losses, lse = getattr(kernels, f"{kind}_forward")(logits, targets, **options)
        dlogits = getattr(kernels, f"{kind}_backward")(dlosses, logits, targets, lse, **options)
        z = torch.tensor(logits, requires_grad=True)
        expected = torch.nn.functional.cross_entropy(z, torch.tensor(targets), reduction="none", **theirs)
        w = np.ones(shape[1]) if weight is None else weight
        if kind == "cross_entropy":
            share = np.where(targets == -100, 0, w[targets % len(w)])
        else:
            share = targets @ w
        expected = expected + z_loss * torch.tensor(share.astype(dtype)) * torch.logsumexp(z, 1) ** 2
        (gradient,) = torch.autograd.grad((expected * torch.tensor(dlosses)).sum(), z)
        limit = 2e-5 if dtype == np.float32 else 1e-12
        assert error(losses, expected.detach()) < limit
        assert error(dlogits, gradient) < limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_of_one_class_are_that_class(dtype):
    dlosses, logits, targets = problem((33, 65), dtype)
    options = {"weight": weights_of(65, dtype), "label_smoothing": 0.1, "z_loss": 0.01}
    counted = targets != -100
    onehot = np.eye(65, dtype=dtype)[targets % 65]
    losses, lse = kernels.soft_cross_entropy_forward(logits, onehot, mask=counted, **options)
    hard, hard_lse = kernels.cross_entropy_forward(logits, targets, **options)
    assert same_bits(lse, hard_lse)
    assert error(losses, hard) < TOLERANCE[np.dtype(dtype)]
    dlogits = kernels.soft_cross_entropy_backward(dlosses, logits, onehot, lse, mask=counted, **options)
    hard = kernels.cross_entropy_backward(dlosses, logits, targets, lse, **options)
    assert error(dlogits, hard) < TOLERANCE[np.dtype(dtype)]
    weight = np.ones(65, dtype)
    plain = kernels.cross_entropy_forward(logits, targets, label_smoothing=0.1)[0]
    ones = kernels.cross_entropy_forward(logits, targets, label_smoothing=0.1, weight=weight)[0]
    assert error(ones, plain) < TOLERANCE[np.dtype(dtype)]


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
    check(dlosses, np.nan_to_num(logits), targets, ignore_index=5, weight=weights_of(40, dtype), z_loss=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}])
def test_nothing_of_a_row_that_does_not_count_comes_through(options, dtype):
    """A NaN or infinity in an ignored row, in one of a class of weight 0 and in a masked one."""
    weight = np.zeros(6, dtype)
    dlosses, logits, targets = problem((5, 6), dtype)
    for targets in (np.full(5, -100), np.array([5, 4, 3, 2, 1])):
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = np.full_like(logits, bad)
            losses, lse = kernels.cross_entropy_forward(spoilt, targets, weight=weight, **options)
            spoilt_losses = np.full_like(dlosses, bad)
            backward = kernels.cross_entropy_backward
            assert not losses.any()
            assert not backward(spoilt_losses, spoilt, targets, lse, weight=weight, **options).any()
    dlosses, logits, probabilities = soft_problem((5, 6), dtype)
    mask = np.array([True, False, True, False, True])
    forward, backward = kernels.soft_cross_entropy_forward, kernels.soft_cross_entropy_backward
    losses, lse = forward(logits, probabilities, mask=mask, **options)
    dlogits = backward(dlosses, logits, probabilities, lse, mask=mask, **options)
    assert not losses[~mask].any()
    assert not dlogits[~mask].any()
    for array in (logits, probabilities, dlosses):
        array[~mask] = np.nan
    spoilt, lse = forward(logits, probabilities, mask=mask, **options)
    assert same_bits(spoilt, losses)
    assert same_bits(backward(dlosses, logits, probabilities, lse, mask=mask, **options), dlogits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_logits_of_any_size_are_safe(weighted, label_smoothing, dtype):
    """Rows of +-1e4; rows that lie close together far from 0, where float32 cannot hold lse to 1e-3."""
    options = {"label_smoothing": label_smoothing, "weight": weights_of(65, dtype) if weighted else None}
    for kind, draw in (("cross_entropy", problem), ("soft_cross_entropy", soft_problem)):
        dlosses, logits, targets = draw((33, 65), dtype, scale=1e4)
        losses, _, dlogits = check(dlosses, logits, targets, kind, z_loss=1e-4, **options)
        assert np.isfinite(losses).all()
        assert np.isfinite(dlogits).all()
        for offset in (1e4, -1e4):
            near = (values(33, 65, dtype=dtype) + dtype(offset)).astype(dtype)
            check(dlosses, near, targets, kind, **options)
        tiny = (values(33, 65, dtype=dtype) * np.finfo(dtype).smallest_normal).astype(dtype)  # subnormals
        check(dlosses, tiny, targets, kind, **options)


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
    weight = np.where(np.arange(70) < 10, 1, 0).astype(dtype)  # no weight, no share of the smoothing either
    options = {"weight": weight, "label_smoothing": 0.1}
    logits[1, 3] = 0
    targets[2] = 60
    check(dlosses, logits, targets, **options)
    targets[2] = 3
    onehot = np.eye(70, dtype=dtype)[targets]
    check(dlosses, logits, onehot, "soft_cross_entropy")
    check(dlosses, logits, onehot, "soft_cross_entropy", **options)


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
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "weight": weights_of(shape[1], dtype)}
    dlosses, logits, targets = problem(shape, dtype)
    assert_same_at_any_thread_count(lambda: kernels.cross_entropy_forward(logits, targets, **options))
    _, lse = kernels.cross_entropy_forward(logits, targets, **options)
    assert_same_at_any_thread_count(
        lambda: kernels.cross_entropy_backward(dlosses, logits, targets, lse, **options)
    )
    probabilities = soft_problem(shape, dtype)[2]
    options["mask"] = targets != -100
    assert_same_at_any_thread_count(
        lambda: kernels.soft_cross_entropy_forward(logits, probabilities, **options)
    )
    assert_same_at_any_thread_count(
        lambda: kernels.soft_cross_entropy_backward(dlosses, logits, probabilities, lse, **options)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_may_overwrite_the_logits(shape, dtype):
    for kind, draw in (("cross_entropy", problem), ("soft_cross_entropy", soft_problem)):
        forward, backward = getattr(kernels, f"{kind}_forward"), getattr(kernels, f"{kind}_backward")
        dlosses, logits, targets = draw(shape, dtype)
        _, lse = forward(logits, targets)
        expected = backward(dlosses, logits, targets, lse)
        assert backward(dlosses, logits, targets, lse, out=logits) is logits
        assert same_bits(logits, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_out(dtype):
    dlosses, logits, targets = problem((6, 12), dtype)
    assert_reads_any_array(kernels.cross_entropy_forward, logits, targets)
    _, lse = kernels.cross_entropy_forward(logits, targets)
    assert_reads_any_array(kernels.cross_entropy_backward, dlosses, logits, targets, lse)
    weight, mask = weights_of(12, dtype), np.arange(6) % 2 == 0
    probabilities = soft_problem((6, 12), dtype)[2]
    assert_reads_any_array(
        lambda z, t, w: kernels.cross_entropy_forward(z, t, weight=w), logits, targets, weight
    )
    assert_reads_any_array(
        lambda z, q, w, m: kernels.soft_cross_entropy_forward(z, q, weight=w, mask=m),
        logits, probabilities, weight, mask,
    )  # fmt: skip
    assert_reads_any_array(
        lambda d, z, q, e, w, m: kernels.soft_cross_entropy_backward(d, z, q, e, weight=w, mask=m),
        dlosses, logits, probabilities, lse, weight, mask,
    )  # fmt: skip
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
    overlapping = np.zeros((7, 12), dtype)
    shifted = overlapping[:6]
    shifted[...] = logits
    assert_refuses_bad_out(
        lambda out: kernels.cross_entropy_backward(dlosses, shifted, targets, lse, out=out),
        logits, overlapping[1:],
    )  # fmt: skip
    assert_refuses_bad_out(
        lambda out: kernels.soft_cross_entropy_backward(dlosses, logits, probabilities, lse, out=out),
        logits, probabilities,
    )  # fmt: skip
    for i in range(2):
        assert_refuses_bad_out(
            lambda out, i=i: kernels.soft_cross_entropy_forward(
                logits, probabilities, weight=weight, out=(out, None) if i == 0 else (None, out)
            )[i],
            lse, weight[:6],
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


def test_refuses_bad_options_before_anything_is_written():
    logits, targets = np.zeros((3, 4), np.float32), np.zeros(3, np.int64)
    probabilities, weight = np.zeros((3, 4), np.float32), np.ones(4, np.float32)
    row, table = np.full(3, 9, np.float32), np.full((3, 4), 9, np.float32)
    pair, bad, wide = (row, row.copy()), weight.copy(), np.zeros((5, 4), np.float32)
    bad[2] = -1
    cases = [
        (ValueError, "z_loss is -0.1, it must be at least 0 and finite", {"z_loss": -0.1}),
        (ValueError, "z_loss is inf, it must be at least 0 and finite", {"z_loss": np.inf}),
        (ValueError, "z_loss is nan, it must be at least 0 and finite", {"z_loss": np.nan}),
        (TypeError, "z_loss is None, it must be a number", {"z_loss": None}),
        (ValueError, "label_smoothing is -0.5, it must be in [0, 1]", {"label_smoothing": -0.5}),
        (ValueError, "weight is (3,), it must be (4,)", {"weight": weight[:3]}),
        (ValueError, "weight[2] is -1.0, it must be at least 0 and finite", {"weight": bad}),
        (ValueError, "weight[0] is nan, it must be at least 0 and finite", {"weight": weight * np.nan}),
    ]
    for kind, message, options in cases:
        for name, given_targets in (("cross_entropy", targets), ("soft_cross_entropy", probabilities)):
            forward, backward = getattr(kernels, f"{name}_forward"), getattr(kernels, f"{name}_backward")
            words = f"{name}_forward: {message}"
            assert_refuses(kind, words, forward, logits, given_targets, out=pair, **options)
            arguments = row.copy(), logits, given_targets, row.copy()
            assert_refuses(kind, f"{name}_backward: {message}", backward, *arguments, out=table, **options)
        if "weight" in options:
            options = {"class_weight": options["weight"]}
            message = f"class_{message}"
        backward = kernels.linear_cross_entropy_backward
        arguments = row.copy(), logits, np.zeros((4, 4), np.float32), targets, row.copy()
        words = f"linear_cross_entropy_backward: {message}"
        assert_refuses(kind, words, backward, *arguments, out=(table, None), **options)
        words = f"linear_cross_entropy_forward: {message}"
        assert_refuses(kind, words, kernels.linear_cross_entropy_forward, *arguments[1:4], **options)
    forward = kernels.soft_cross_entropy_forward
    shapes = "logits is (3, 4), probabilities is (5, 4); they must be (N, V), (N, V)"
    assert_refuses(ValueError, f"soft_cross_entropy_forward: {shapes}", forward, logits, wide, out=pair)
    message = "soft_cross_entropy_forward: mask is (2,), it must be (3,)"
    assert_refuses(ValueError, message, forward, logits, probabilities, mask=[True, False], out=pair)
    message = "soft_cross_entropy_forward: mask is int64, it must be boolean"
    assert_refuses(TypeError, message, forward, logits, probabilities, mask=[1, 1, 0], out=pair)
    message = "cross_entropy_forward: weight is float64 but logits is float32; all must have one dtype"
    assert_refuses(TypeError, message, kernels.cross_entropy_forward, logits, targets, weight=np.ones(4))
    for array in (*pair, table):
        assert (array == 9).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 65, 20), (300, 400, 3), (0, 5, 4)])
def test_linear_cross_entropy_takes_class_weights_and_z_loss(shape, dtype, monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(loss, "_CHUNK_ROWS", 128)  # the third shape takes three
    n, V, channels = shape
    x, weight = values(n, channels, dtype=dtype), values(V, channels, dtype=dtype, seed=1)
    dlosses, _, targets = problem((n, V), dtype)
    options = {"class_weight": weights_of(V, dtype), "z_loss": 0.01, "label_smoothing": 0.1}
    losses, lse = kernels.linear_cross_entropy_forward(x, weight, targets, **options)
    expected = reference.linear_cross_entropy_forward(x, weight, targets, **options)
    assert_close((losses, lse), expected, dtype)
    result = kernels.linear_cross_entropy_backward(dlosses, x, weight, targets, lse, **options)
    wanted = reference.linear_cross_entropy_backward(dlosses, x, weight, targets, expected[1], **options)
    assert_close(tuple(result), wanted, dtype)

    both = kernels.linear_cross_entropy_both
    again, dx, dweight = both(dlosses, x, weight, targets, **options)
    assert np.array_equal(again, losses)
    assert_close((dx, dweight), wanted, dtype)
    for needs in ((True, False), (False, True)):
        parts = both(dlosses, x, weight, targets, needs=needs, **options)[1:]
        for part, needed, whole in zip(parts, needs, (dx, dweight)):
            assert np.array_equal(part, whole) if needed else part is None
    total = np.ones_like(weight)
    assert both(dlosses, x, weight, targets, out=(None, total), accumulate=True, **options)[2] is total
    assert_close((total - 1,), (wanted[1],), dtype)
    assert_same_at_any_thread_count(lambda: both(dlosses, x, weight, targets, **options))
    for out in (total, (None, total, None)):
        with pytest.raises(TypeError, match="linear_cross_entropy_both: out must be a tuple of 2 arrays"):
            both(dlosses, x, weight, targets, out=out, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 65), (0, 5), (2900, 2901)])  # of 33 MB a gradient is streamed
def test_cross_entropy_both_is_forward_and_backward(shape, dtype):
    n, V = shape
    dlosses, logits, targets = problem(shape, dtype)
    options = {"weight": weights_of(V, dtype), "z_loss": 0.01, "label_smoothing": 0.1}
    losses, lse = kernels.cross_entropy_forward(logits, targets, **options)
    wanted = kernels.cross_entropy_backward(dlosses, logits, targets, lse, **options)
    room = np.full(n * V + 2, 9, dtype)  # one element away from any alignment
    again, dlogits = kernels.cross_entropy_both(
        dlosses, logits, targets, out=room[1:-1].reshape(shape), **options
    )
    assert np.array_equal(again, losses) and dlogits.base is room and room[0] == room[-1] == 9
    assert_close((dlogits,), (wanted,), dtype)
    assert_same_at_any_thread_count(lambda: kernels.cross_entropy_both(dlosses, logits, targets, **options))
    kept = dlogits.copy()
    assert kernels.cross_entropy_both(dlosses, logits, targets, out=logits, **options)[1] is logits
    assert np.array_equal(logits, kept)


def test_cross_entropy_both_refuses_what_the_forward_pass_does():
    call, logits = kernels.cross_entropy_both, np.zeros((3, 5), np.float32)
    dlosses, targets = np.ones(3, np.float32), np.array([0, 4, 1])
    message = "cross_entropy_both: targets[1] is 5, it must be in [0, 5) or ignore_index, -100"
    assert_refuses(ValueError, message, call, dlosses, logits, [0, 5, 1])
    message = "cross_entropy_both: dlosses is (2,), it must be (3,)"
    assert_refuses(ValueError, message, call, dlosses[:2], logits, targets)
    message = "cross_entropy_both: logits is float32 but dlosses is float64; all must have one dtype"
    assert_refuses(TypeError, message, call, np.ones(3), logits, targets)
    wrong = np.zeros((3, 4), np.float32)
    message = "cross_entropy_both: out is (3, 4), it must be (3, 5)"
    assert_refuses(ValueError, message, call, dlosses, logits, targets, out=wrong)


# Element by element ----------------------------------------------------------------------------------

# The last crosses blocks and threads.
SIZES = [(), (0,), (1,), (7, 5), (3, 0, 2), (40_001,)]
ELEMENTS = {
    "mse": ("mse", {}),
    "l1": ("l1", {}),
    "smooth_l1": ("smooth_l1", {"beta": 0.7}),
    "smooth_l1 at 0": ("smooth_l1", {"beta": 0}),
    "huber": ("huber", {"delta": 0.7}),
    "bce": ("bce_with_logits", {}),
}


def elements(name, module=kernels):
    """forward(input, target, **more) and backward(dlosses, input, target, **more) of a row of ELEMENTS."""
    kind, options = ELEMENTS[name]
    forward, backward = getattr(module, f"{kind}_forward"), getattr(module, f"{kind}_backward")
    return (
        lambda *arrays, **more: forward(*arrays, **options, **more),
        lambda *arrays, **more: backward(*arrays, **options, **more),
    )


def elements_problem(name, shape, dtype, scale=1.0):
    """dlosses, input, target; some targets are met exactly."""
    x, t = values(*shape, dtype=dtype, scale=scale), values(*shape, dtype=dtype, scale=scale, seed=1)
    if name == "bce":
        t = np.clip(np.abs(t), 0, 1)
    elif shape:
        t.reshape(-1)[::7] = x.reshape(-1)[::7]
    return values(*shape, dtype=dtype, seed=2), x, t


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_elementwise_losses(name, shape, dtype):
    (forward, backward), (forward64, backward64) = elements(name), elements(name, reference)
    for scale in (1.0, 1e4):
        dlosses, x, t = elements_problem(name, shape, dtype, scale)
        assert_close(forward(x, t), forward64(x, t), dtype)
        assert_close(backward(dlosses, x, t), backward64(dlosses, x, t), dtype)
        if name == "bce":
            options = {
                "weight": np.abs(values(*shape[-1:], dtype=dtype, seed=5)),
                "pos_weight": np.abs(values(*shape, dtype=dtype, seed=6)),
            }
            assert_close(forward(x, t, **options), forward64(x, t, **options), dtype)
            wanted = backward64(dlosses, x, t, **options)
            assert_close(backward(dlosses, x, t, **options), wanted, dtype)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(ELEMENTS)), n=st.integers(0, 300), dtype=st.sampled_from(DTYPES),
    bend=st.sampled_from([1e-300, 1e-40, 1e-3, 1.0, 1e3, float("inf")]), seed=st.integers(0, 99),
)  # fmt: skip
def test_elementwise_losses_of_drawn_sizes(name, n, dtype, bend, seed):
    """Also bends that float32 cannot invert or hold."""
    kind, options = ELEMENTS[name]
    options = dict.fromkeys(options, bend)
    dlosses, x, t = (values(n, dtype=dtype, seed=3 * seed + i) for i in range(3))
    if kind == "bce_with_logits":
        t = np.clip(t, 0, 1)
    t[::3] = x[::3]
    with np.errstate(over="ignore"):
        expected = getattr(reference, f"{kind}_forward")(x, t, **options)
        gradient = getattr(reference, f"{kind}_backward")(dlosses, x, t, **options)
    assert_close(getattr(kernels, f"{kind}_forward")(x, t, **options), expected, dtype)
    assert_close(getattr(kernels, f"{kind}_backward")(dlosses, x, t, **options), gradient, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_elementwise_losses_are_torchs(name, dtype):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    kind, options = ELEMENTS[name]
    theirs = getattr(F, {"bce_with_logits": "binary_cross_entropy_with_logits"}.get(kind, f"{kind}_loss"))
    forward, backward = elements(name)
    for scale in (1.0, 1e4):
        dlosses, x, t = elements_problem(name, (13, 7), dtype, scale)
        weight, pos_weight = np.abs(values(7, dtype=dtype)), np.abs(values(7, dtype=dtype, seed=1))
        for more in [{}, {"weight": weight, "pos_weight": pos_weight}][: 2 if name == "bce" else 1]:
            z = torch.tensor(x, requires_grad=True)
            extra = {key: torch.tensor(value) for key, value in more.items()}
            losses = theirs(z, torch.tensor(t), reduction="none", **options, **extra)
            (gradient,) = torch.autograd.grad((losses * torch.tensor(dlosses)).sum(), z)
            limit = 2e-5 if dtype == np.float32 else 1e-12
            assert error(forward(x, t, **more), losses.detach()) < limit
            assert error(backward(dlosses, x, t, **more), gradient) < limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_cross_entropy_is_exact_at_large_logits_and_keeps_small_losses(dtype):
    x = np.array([1e4, 1e4, -1e4, -1e4, 1e4, -1e4], dtype)
    t = np.array([1, 0, 1, 0, 0.25, 0.25], dtype)
    losses = kernels.bce_with_logits_forward(x, t)
    assert np.array_equal(losses, np.array([0, 1e4, 1e4, 0, 7500, 2500], dtype))
    gradient = kernels.bce_with_logits_backward(np.ones(6, dtype), x, t)
    assert np.array_equal(gradient, np.array([0, 1, -1, 0, 0.75, -0.25], dtype))
    x = np.array([-20, 20, -5, 5], dtype)
    t = np.array([0, 1, 0, 1], dtype)
    wanted = np.log1p(np.exp(-np.abs(x.astype(np.float64))))
    for i in range(4):  # each to its own size: 2e-9, 2e-9, 0.007, 0.007
        assert abs(kernels.bce_with_logits_forward(x, t)[i] / wanted[i] - 1) < 4 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_a_nan_or_infinity_stays_in_its_element(name, dtype):
    forward, backward = elements(name)
    for i in range(3):
        for bad in (np.nan, np.inf, -np.inf):
            arrays = list(elements_problem(name, (67,), dtype))
            plain = forward(*arrays[1:]), backward(*arrays)
            arrays[i][40] = bad
            for before, after in zip(plain, (forward(*arrays[1:]), backward(*arrays))):
                assert same_bits(np.delete(before, 40), np.delete(after, 40))
            if np.isnan(bad):
                assert np.isnan(backward(*arrays)[40])
                assert i == 0 or np.isnan(forward(*arrays[1:])[40])
    subnormal = elements_problem(name, (67,), dtype, float(np.finfo(dtype).smallest_normal))[1:]
    assert np.isfinite(forward(*subnormal)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_elementwise_inputs_out_and_threads(name, dtype):
    forward, backward = elements(name)
    arrays = elements_problem(name, (6, 5), dtype)
    assert_reads_any_array(forward, *arrays[1:])
    assert_reads_any_array(backward, *arrays)
    assert_refuses_bad_out(lambda out: forward(*arrays[1:], out=out), arrays[0], arrays[1])
    assert_refuses_bad_out(lambda out: backward(*arrays, out=out), arrays[1], arrays[2])
    arrays = elements_problem(name, (40_001,), dtype)
    assert_same_at_any_thread_count(lambda: forward(*arrays[1:]))
    assert_same_at_any_thread_count(lambda: backward(*arrays))
    if name == "bce":
        weight = np.abs(arrays[0])
        more = {"weight": weight, "pos_weight": weight[::-1]}
        assert_same_at_any_thread_count(lambda: backward(*arrays, **more))
        small = elements_problem(name, (6, 5), dtype)
        call = lambda d, x, t, w, p: kernels.bce_with_logits_backward(d, x, t, w, p)  # noqa: E731
        assert_reads_any_array(call, *small, weight[:5], weight[5:10])


def test_elementwise_losses_refuse_bad_arguments():
    x, t = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    out = np.full((3, 4), 9, np.float32)
    for kind in ("mse", "l1", "smooth_l1", "huber", "bce_with_logits"):
        forward, backward = getattr(kernels, f"{kind}_forward"), getattr(kernels, f"{kind}_backward")
        message = f"{kind}_forward: input is (3, 4), target is (3,); they must have one shape"
        assert_refuses(ValueError, message, forward, x, t[:, 0], out=out)
        message = f"{kind}_backward: dlosses is (3,), input is (3, 4); they must have one shape"
        assert_refuses(ValueError, message, backward, x[:, 0], x, t, out=out)
        message = f"{kind}_forward: target is float64 but input is float32; all must have one dtype"
        assert_refuses(TypeError, message, forward, x, t.astype(np.float64), out=out)
        message = f"{kind}_forward: input is int64, it must be float32 or float64"
        assert_refuses(TypeError, message, forward, x.astype(np.int64), t, out=out)
    for beta, kind in ((-1, ValueError), (np.nan, ValueError), ("a", TypeError)):
        allowed = "it must be a number" if kind is TypeError else "it must be at least 0"
        message = f"smooth_l1_forward: beta is {beta!r}, {allowed}"
        assert_refuses(kind, message, kernels.smooth_l1_forward, x, t, beta=beta, out=out)
    message = "huber_backward: delta is 0, it must be above 0"
    assert_refuses(ValueError, message, kernels.huber_backward, x, x, t, delta=0, out=out)
    message = "bce_with_logits_forward: pos_weight is (3,), it must broadcast to (3, 4)"
    assert_refuses(ValueError, message, kernels.bce_with_logits_forward, x, t, pos_weight=x[:, 0], out=out)
    message = "bce_with_logits_forward: weight is (2, 3, 4), it must broadcast to (3, 4)"
    weight = np.ones((2, 3, 4), np.float32)
    assert_refuses(ValueError, message, kernels.bce_with_logits_forward, x, t, weight=weight, out=out)
    assert (out == 9).all()


def test_thresholds_are_refused_where_the_dtype_cannot_hold_them():
    x, t = np.zeros(3, np.float32), np.ones(3, np.float32)
    for name, option in (("smooth_l1", "beta"), ("huber", "delta")):
        message = f"{name}_forward: {option} is 1e+39, it must be finite in float32"
        assert_refuses(ValueError, message, getattr(kernels, f"{name}_forward"), x, t, 1e39)
        message = f"{name}_backward: {option} is too large for a float"
        assert_refuses(ValueError, message, getattr(kernels, f"{name}_backward"), x, x, t, 10**400)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_rows_where_nothing_has_a_share(dtype):
    """They have loss 0 and no gradient whatever their logits are, as in the reference."""
    logits = np.array([[np.nan, 1], [np.inf, 1], [-np.inf, -np.inf], [1, np.nan], [1, 2]], dtype)
    q = np.array([[0, 0], [0, 0], [0, 0], [0.5, 0.5], [0, 0]], dtype)
    dlosses = np.ones(5, dtype)
    for z_loss in (0.0, 0.1):
        losses, lse = kernels.soft_cross_entropy_forward(logits, q, z_loss=z_loss)
        with np.errstate(invalid="ignore"):
            expected, _ = reference.soft_cross_entropy_forward(logits, q, z_loss=z_loss)
            gradient = reference.soft_cross_entropy_backward(dlosses, logits, q, lse, z_loss=z_loss)
        np.testing.assert_array_equal(losses, expected)
        np.testing.assert_array_equal(losses, [0, 0, 0, np.nan, 0])
        result = kernels.soft_cross_entropy_backward(dlosses, logits, q, lse, z_loss=z_loss)
        np.testing.assert_array_equal(result, gradient)
        assert not result[[0, 1, 2, 4]].any()


def test_float64_gradients_keep_their_tails():
    """Only float32 drops probabilities under 1e-30, whose products would be denormals."""
    logits, targets, one = np.array([[0.0, -100.0]]), np.zeros(1, np.int64), np.ones(1)
    _, lse = kernels.cross_entropy_forward(logits, targets)
    hard = kernels.cross_entropy_backward(one, logits, targets, lse)
    soft = kernels.soft_cross_entropy_backward(one, logits, np.array([[1.0, 0.0]]), lse)
    for gradient in (hard, soft):
        assert gradient[0, 1] == pytest.approx(np.exp(-100), rel=1e-12)


def test_cross_entropy_takes_scalars_of_any_dtype():
    logits, targets, q = values(4, 5), np.array([0, 1, 2, 3]), np.abs(values(4, 5, seed=1))
    small = {"label_smoothing": np.float16(0.1), "z_loss": np.float16(0.01)}
    whole = {name: float(value) for name, value in small.items()}
    forward = kernels.cross_entropy_forward
    assert same_bits(forward(logits, targets, ignore_index=np.int8(2), **small),
                     forward(logits, targets, ignore_index=2, **whole))  # fmt: skip
    forward = kernels.soft_cross_entropy_forward
    assert same_bits(forward(logits, q, **small), forward(logits, q, **whole))
    message = "soft_cross_entropy_forward: z_loss is too large for a float"
    assert_refuses(ValueError, message, forward, logits, q, z_loss=10**400)
