"""Rotary kernels against the float64 reference, finite differences and array code in torch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DTYPES,
    assert_close,
    assert_reads_any_array,
    assert_refuses,
    assert_same_at_any_thread_count,
    assert_torchs,
    check_gradients,
    misaligned,
    read_only,
    same_bits,
    values,
)

from cllm import kernels, reference

DOORS = ["rotary_forward", "rotary_backward"]
# No head, no row, no channel; one pair; pairs that fill no vector; more pairs than one piece of a row.
SHAPES = [
    (2, 0, 3, 4),
    (0, 2, 3, 4),
    (2, 2, 0, 4),
    (2, 2, 3, 0),
    (1, 1, 1, 2),
    (2, 3, 5, 6),
    (1, 2, 3, 64),
    (3, 1, 2, 258),
]
OFFSETS = [0, 5, "each"]


def offset_of(kind, B):
    """One position, or one for each of B sequences."""
    return (np.arange(B) * 7) % 11 if kind == "each" else kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OFFSETS)
@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary(shape, name, kind, dtype):
    x = values(*shape, dtype=dtype)
    options = {"offset": offset_of(kind, shape[0]), "base": 50.0}
    result = getattr(kernels, name)(x, **options)
    assert_close(result, getattr(reference, name)(x, **options), dtype)
    if kind == 0:  # the default
        assert same_bits(getattr(kernels, name)(x, base=50.0), result)


def test_gradients_are_those_of_finite_differences():
    for kind in OFFSETS:
        options = {"offset": offset_of(kind, 2), "base": 20.0}
        check_gradients(
            lambda x, options=options: kernels.rotary_forward(x, **options),
            lambda dy, x, options=options: kernels.rotary_backward(dy, **options),
            values(2, 2, 3, 6),
        )


@settings(max_examples=25)
@given(
    shape=st.tuples(*[st.integers(0, 4)] * 3, st.integers(0, 9).map(lambda n: 2 * n)),
    dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 100),
    base=st.sampled_from([3.0, 10000.0]),
)
def test_rotary_is_rotate_half_in_torch(shape, dtype, offset, base):
    """x cos + rotate_half(x) sin, the form that Llama's code made common."""
    torch = pytest.importorskip("torch")
    D = shape[3]
    x = torch.tensor(values(*shape, dtype=dtype), requires_grad=True)
    positions = torch.arange(offset, offset + shape[2], dtype=torch.float64)
    angles = torch.outer(positions, base ** (-torch.arange(0, D, 2, dtype=torch.float64) / max(D, 1)))
    cos, sin = (torch.cat([table, table], -1).to(x.dtype) for table in (angles.cos(), angles.sin()))
    y = x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin
    dy = values(*shape, dtype=dtype, seed=1)
    y.backward(torch.tensor(dy))
    options = {"offset": offset, "base": base}
    assert_torchs(kernels.rotary_forward(x.detach().numpy(), **options), y)
    assert_torchs(kernels.rotary_backward(dy, **options), x.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_depend_on_distances_alone(dtype):
    """What the embedding is for; and positions of any size keep their digits: angles are float64."""
    q, k = values(1, 1, 1, 64, dtype=dtype), values(1, 1, 1, 64, dtype=dtype, seed=1)
    scores = []
    for start in (0, 3, 1000, 2_000_000_000):
        q_turned = kernels.rotary_forward(q, offset=start + 17)
        k_turned = kernels.rotary_forward(k, offset=start)
        scores.append(float((q_turned * k_turned).sum()))
    assert np.ptp(scores) < (1e-4 if dtype == np.float32 else 1e-6) * abs(scores[0])
    x = kernels.rotary_forward(q, offset=12345)
    assert_close(kernels.rotary_backward(x, offset=12345), q.astype(np.float64), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DOORS)
def test_in_place_on_a_part_of_a_packed_array(name, dtype):
    """Queries and keys of a packed projection are turned where they lie; the rest stays as it was."""
    packed = values(2, 5, 3, 4, 16, dtype=dtype)  # B, T, parts, H, D
    before = packed.copy()
    expected = getattr(kernels, name)(before[:, :, 1].transpose(0, 2, 1, 3).copy(), offset=3)
    part = packed[:, :, 1].transpose(0, 2, 1, 3)
    assert getattr(kernels, name)(part, offset=3, out=part) is part
    assert same_bits(part.copy(), expected)
    assert np.array_equal(packed[:, :, [0, 2]], before[:, :, [0, 2]])
    again = before.copy()
    one, two = (again[:, :, 1].transpose(0, 2, 1, 3) for _ in range(2))  # two views of the same elements
    getattr(kernels, name)(one, offset=3, out=two)
    assert same_bits(again, packed)
    other = np.zeros_like(packed)[:, :, 2].transpose(0, 2, 1, 3)
    getattr(kernels, name)(before[:, :, 1].transpose(0, 2, 1, 3), offset=3, out=other)
    assert same_bits(other.copy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DOORS)
def test_threads_and_inputs(name, dtype):
    door = getattr(kernels, name)
    x = values(3, 7, 40, 64, dtype=dtype)
    for offset in (9, np.array([0, 5, 2])):
        assert_same_at_any_thread_count(lambda offset=offset: door(x, offset=offset))
    assert_reads_any_array(lambda x: door(x, offset=1), x[:, :, :3])
    reverse = x[:, ::-1, ::-2]
    assert same_bits(door(reverse), door(reverse.copy()))
    assert same_bits(door(np.broadcast_to(x[:1], x.shape)), door(np.broadcast_to(x[:1], x.shape).copy()))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_its_pair_alone(bad):
    x = values(1, 2, 3, 8)
    x[0, 1, 2, 5] = bad
    for name in DOORS:
        spoilt = ~np.isfinite(getattr(kernels, name)(x, offset=1))
        assert np.argwhere(spoilt).tolist() == [[0, 1, 2, 1], [0, 1, 2, 5]]


def test_tables_are_dropped_and_large_ones_not_kept():
    from cllm.kernels import rotary

    rotary._angles.cache_clear()
    for offset in range(20):
        kernels.rotary_forward(np.ones((1, 1, 1, 2)), offset=offset)
    assert rotary._angles.cache_info().currsize == 8
    misses = rotary._angles.cache_info().misses
    for shape, offset in (((2, 1, 16385, 64), [0, 1]), ((1, 1, 16385, 128), 0), ((1, 1, 16384, 130), 3)):
        kernels.rotary_forward(np.ones(shape, np.float32), offset=offset)
    kernels.rotary_forward(np.ones((1, 1, 8193, 128)))
    assert rotary._angles.cache_info().misses == misses
    kernels.rotary_forward(np.ones((1, 1, 16384, 128), np.float32))
    assert rotary._angles.cache_info().misses == misses + 1
    rotary._angles.cache_clear()


@pytest.mark.parametrize("name", DOORS)
def test_an_integer_array_without_dimensions_is_an_offset(name):
    door, x = getattr(kernels, name), values(2, 1, 3, 4)
    assert same_bits(door(x, offset=np.array(5)), door(x, offset=5))
    for offset in (np.array(5.0), np.array(True)):
        message = f"{name}: offset is {offset[()]!r}, it must be an integer"
        assert_refuses(TypeError, message, door, x, offset=offset)
    message = f"{name}: offset is -1, it must be in [0, 2**31)"
    assert_refuses(ValueError, message, door, x, offset=np.array(-1))


def test_refuses_bad_arguments():
    x = np.zeros((2, 3, 4, 6), np.float32)
    for name in DOORS:
        door, first = getattr(kernels, name), "x" if name == "rotary_forward" else "dy"
        message = f"{name}: {first} is (2, 3, 4), it must be (B, H, T, D) with an even D"
        assert_refuses(ValueError, message, door, x[..., 0])
        message = f"{name}: {first} is (2, 3, 4, 5), it must be (B, H, T, D) with an even D"
        assert_refuses(ValueError, message, door, x[..., :5])
        message = f"{name}: {first} is int64, it must be float32 or float64"
        assert_refuses(TypeError, message, door, x.astype(np.int64))
        for base in (0.0, -1.0, np.inf, np.nan):
            message = f"{name}: base is {base}, it must be a finite number above 0"
            assert_refuses(ValueError, message, door, x, base=base)
        message = f"{name}: base is None, it must be a number"
        assert_refuses(TypeError, message, door, x, base=None)
        message = f"{name}: offset is -1, it must be in [0, 2**31)"
        assert_refuses(ValueError, message, door, x, offset=-1)
        message = f"{name}: offset is 0.5, it must be an integer"
        assert_refuses(TypeError, message, door, x, offset=0.5)
        message = f"{name}: offset is (3,), it must be one integer or (2,)"
        assert_refuses(ValueError, message, door, x, offset=np.arange(3))
        message = f"{name}: offset is float64, it must be an integer array"
        assert_refuses(TypeError, message, door, x, offset=np.zeros(2))
        message = f"{name}: offset[1] is -3, it must be in [0, 2147483648)"
        assert_refuses(ValueError, message, door, x, offset=np.array([1, -3]))


def test_refuses_bad_out():
    x = np.ones((2, 3, 4, 6), np.float32)
    door = kernels.rotary_forward
    wide = np.zeros((2, 3, 4, 12), np.float32)
    odd = "rotary_forward: out must be aligned, of unit stride in D and without repeated elements"
    overlaps = "rotary_forward: out overlaps the input, it must be the input or have its own memory"
    held = np.ones((3, 3, 4, 6), np.float32)
    cases = [
        (x, wide, ValueError, "rotary_forward: out is (2, 3, 4, 12), it must be (2, 3, 4, 6)"),
        (x, np.zeros(x.shape), TypeError, "rotary_forward: out is float64, it must be float32"),
        (x, x.tolist(), TypeError, "rotary_forward: out is list, it must be a NumPy array"),
        (x, wide[..., ::2], ValueError, odd),
        (x, misaligned(x), ValueError, odd),
        (x, np.lib.stride_tricks.as_strided(wide, x.shape, (0, 96, 24, 4)), ValueError, odd),
        (x, np.lib.stride_tricks.as_strided(wide, x.shape, (288, 96, 8, 4)), ValueError, odd),
        (x, read_only(x), ValueError, "rotary_forward: out is read-only, it must be writable"),
        (held[:2], held[1:], ValueError, overlaps),
    ]  # fmt: skip
    for x, out, kind, message in cases:
        before = np.array(out)
        assert_refuses(kind, message, door, x, out=out)
        assert np.array_equal(before, np.array(out))
