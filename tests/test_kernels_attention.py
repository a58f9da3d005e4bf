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
    misaligned,
    read_only,
    same_bits,
    strided,
    values,
    with_threads,
)

from cllm import kernels, reference


def problem(B, H, T, S, D, dtype, G=None, E=None):
    """q, k, v, dout."""
    G, E = H if G is None else G, D if E is None else E
    return (
        values(B, H, T, D, dtype=dtype),
        values(B, G, S, D, dtype=dtype, seed=1),
        values(B, G, S, E, dtype=dtype, seed=2),
        values(B, H, T, E, dtype=dtype, seed=3),
    )


def passes_of(module, q, k, v, dout, is_causal=False, **options):
    out, lse = module.attention_forward(q, k, v, is_causal, **options)
    return out, lse, *module.attention_backward(dout, q, k, v, out, lse, is_causal, **options)


def both_passes(*arrays, **options):
    return passes_of(kernels, *arrays, **options)


def reference_passes(*arrays, **options):
    with np.errstate(all="ignore"):
        return passes_of(reference, *arrays, **options)


def assert_gradients_close(results, expected, dout, dtype):
    """Where a gradient is 0 (one visible key), rounding is measured against dout."""
    for result, want in zip(results, expected):
        assert result.dtype == dtype
        assert result.shape == want.shape
        limit = TOLERANCE[np.dtype(dtype)] * max(np.linalg.norm(want), 0.3 * np.linalg.norm(dout))
        assert np.linalg.norm(result - want) <= limit


def assert_as_reference(results, expected, dout, dtype):
    """Out and lse, -inf where it says so, and the gradients."""
    blind = np.isneginf(expected[1])
    assert np.array_equal(np.isneginf(results[1]), blind)
    lse = [np.where(blind, 0, x[1]).astype(x[1].dtype) for x in (results, expected)]
    assert_close((results[0], lse[0]), (expected[0], lse[1]), dtype)
    assert_gradients_close(results[2:], expected[2:], dout, dtype)


def make_mask(kind, shape, dtype, seed):
    """A mask of one of the kinds; about half of a boolean or "-inf" one excludes."""
    mask = np.asarray(values(*shape, seed=seed))
    if kind == "bool":
        return mask > 0
    excluded = kind == "-inf" and values(*shape, seed=seed + 1) > 0
    return np.where(excluded, -np.inf, mask).astype(dtype)


SIZES = st.one_of(st.sampled_from([0, 1, 2, 17, 64, 65, 129]), st.integers(0, 70))


@st.composite
def cases(draw):
    """Shapes and options of attention of every kind."""
    B, G, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    H, T, S = G * group, draw(SIZES), draw(SIZES)
    D = draw(st.integers(0, 40))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    options = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        shape = tuple(n if draw(st.booleans()) else 1 for n in (B, H, T, S))
        kind = draw(st.sampled_from(["bool", "float", "-inf"]))
        options["mask"] = make_mask(kind, shape[draw(st.integers(0, 4)) :], dtype, seed)
    if draw(st.booleans()):
        options["offsets"] = np.random.default_rng(seed).integers(0, S + 9, B)
    if draw(st.booleans()):
        options["slopes"] = values(H, seed=seed)
    if draw(st.booleans()):
        options |= {"dropout_p": 0.3, "key": 0x123456789ABCDEF, "scale": 0.7}
    return (B, H, T, S, D, dtype, G, draw(st.sampled_from([D, 5, 33]))), options


@settings(max_examples=60, deadline=None)
@given(cases())
def test_attention(case):
    shape, options = case
    dtype = shape[5]
    arrays = problem(*shape)
    results = with_threads(1, lambda: both_passes(*arrays, **options))
    assert same_bits(with_threads(3, lambda: both_passes(*arrays, **options)), results)
    assert_as_reference(results, reference_passes(*arrays, **options), arrays[3], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": "bool"}, {"mask": "-inf"}])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (1, 2, 200, 200, 33), (2, 1, 97, 300, 64), (1, 1, 300, 64, 130)]
)
def test_sizes_over_several_blocks(shape, options, dtype):
    arrays = problem(*shape, dtype)
    if "mask" in options:
        options = {"mask": make_mask(options["mask"], (*shape[:2], *shape[2:4]), dtype, 5)}
    results = with_threads(1, lambda: both_passes(*arrays, **options))
    assert same_bits(with_threads(2, lambda: both_passes(*arrays, **options)), results)
    assert_as_reference(results, reference_passes(*arrays, **options), arrays[3], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "-inf", "dropout"])
def test_keys_over_several_chunks(kind, dtype):
    """The forward pass takes 1024 keys at a time: what it has so far is corrected to a maximum to come."""
    T, S = 70, 2300
    q, k, v, dout = problem(1, 2, T, S, 16, dtype, E=33)
    k = k * np.where(np.arange(S) < 1100, 0.5, 3)[:, None].astype(dtype)
    k[0, 1] = k[0, 1, ::-1]  # and of one head that comes first
    options = {"is_causal": kind == "causal"}
    if kind == "causal":
        options["offsets"] = np.array([S - T])
    elif kind == "dropout":
        options |= {"dropout_p": 0.3, "key": 11}
    elif kind != "plain":
        options["mask"] = make_mask(kind, (T, S), dtype, 5)
        options["mask"][:5, :1500] = options["mask"][5:9, 900:] = False if kind == "bool" else -np.inf
        options["mask"][9] = False if kind == "bool" else -np.inf
    arrays = (q, k, v, dout)
    results = with_threads(1, lambda: both_passes(*arrays, **options))
    assert same_bits(with_threads(2, lambda: both_passes(*arrays, **options)), results)
    assert_as_reference(results, reference_passes(*arrays, **options), dout, dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_a_later_chunk(bad):
    """A value there reaches the queries that see it alone, a key makes them NaN."""
    T, S = 30, 2100
    q, k, v, _ = problem(1, 1, T, S, 8, np.float32)
    for array in (k, v):
        spoilt = array.copy()
        spoilt[0, 0, S - 10, 3] = bad
        given = (spoilt, v) if array is k else (k, spoilt)
        options = {"is_causal": True, "offsets": np.array([S - T])}
        out, lse = kernels.attention_forward(q, *given, **options)
        with np.errstate(all="ignore"):
            wanted, wanted_lse = reference.attention_forward(q, *given, **options)
        assert np.array_equal(np.isfinite(out), np.isfinite(wanted))
        assert np.array_equal(np.isfinite(lse), np.isfinite(wanted_lse))
        seen = np.isfinite(out[0, 0, T - 10 :, 3])  # an infinite key may have a score of -infinity
        assert np.isfinite(out[0, 0, : T - 10]).all() and not (seen.all() if array is k else seen.any())


def test_a_chunk_in_which_all_scores_are_minus_infinity():
    """It adds nothing to what the other chunks have; alone it gives NaN, as in torch."""
    T, S = 4, 1028
    q, k, v, _ = problem(1, 1, T, S, 8, np.float32)
    q[..., 0], k[..., 0] = 1, 0
    k[0, 0, 1024:, 0] = -np.inf  # the second chunk
    for options in ({}, {"is_causal": True, "offsets": np.array([S - T])}):
        out, lse = kernels.attention_forward(q, k, v, **options)
        wanted = kernels.attention_forward(q, k[:, :, :1024], v[:, :, :1024])
        assert same_bits((out, lse), wanted)
    k[0, 0, :1024, 0] = -np.inf
    assert all(np.isnan(x).all() for x in kernels.attention_forward(q, k, v))


def band(T, S, width):
    """Query i sees the keys from i - width to i + width."""
    return abs(np.arange(T)[:, None] - np.arange(S)) <= width


def padding(B, S, first, end):
    """Sequence b has the keys first[b] to end[b] - 1."""
    keys = np.arange(S)
    return ((keys >= np.reshape(first, (B, 1))) & (keys < np.reshape(end, (B, 1))))[:, None, None]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        band(200, 200, 3),
        band(200, 200, 80).T,
        np.roll(band(200, 200, 2), 100, axis=1),
        padding(2, 200, [0, 190], [10, 200]),
        padding(2, 200, [5, 64], [5, 129]),
        np.zeros((), bool),
        np.ones((), bool),
        np.eye(200, dtype=bool)[::-1],
    ],
    ids=["band", "wide band", "band elsewhere", "padding", "empty sequence", "none", "all", "antidiagonal"],
)
def test_masks_with_blocks_that_are_skipped(mask, is_causal):
    arrays = problem(2, 2, 200, 200, 8, np.float64, G=1)
    options = {"is_causal": is_causal, "dropout_p": 0.3, "key": 8}
    results = both_passes(*arrays, mask=mask, **options)
    assert_as_reference(results, reference_passes(*arrays, mask=mask, **options), arrays[3], np.float64)
    assert same_bits(both_passes(*arrays, mask=np.where(mask, 0.0, -np.inf), **options), results)


@pytest.mark.parametrize("T, S", [(129, 129), (65, 100), (100, 65)])
def test_a_mask_that_says_the_same_gives_the_same_bits(T, S):
    arrays = problem(2, 3, T, S, 16, np.float32)
    causal = both_passes(*arrays, is_causal=True)
    assert same_bits(both_passes(*arrays, mask=np.tri(T, S, dtype=bool)), causal)
    assert same_bits(both_passes(*arrays, is_causal=True, mask=np.ones(S, bool)), causal)
    assert same_bits(both_passes(*arrays, is_causal=True, mask=np.float32(0)), causal)
    assert same_bits(both_passes(*arrays, is_causal=True, slopes=np.zeros(3), offsets=[0, 0]), causal)
    late = both_passes(*arrays, is_causal=True, offsets=[S, 2**31 - 1])
    assert same_bits(late, both_passes(*arrays))


@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_read_by_their_strides(kind, dtype):
    """As they lie: broadcast, transposed, reversed, in steps, read-only; a misaligned one is copied."""
    B, H, T, S = 2, 3, 70, 90
    arrays = problem(B, H, T, S, 8, dtype)
    mask = make_mask(kind, (B, H, T, S), dtype, 7)
    expected = both_passes(*arrays, mask=mask)
    views = [
        strided(mask),
        read_only(mask),
        np.ascontiguousarray(mask.T).T,
        mask[..., ::-1].copy()[..., ::-1],
        mask[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
    ]
    if kind == "-inf":
        views.append(misaligned(mask))
    for view in views:
        before = view.tobytes()
        assert same_bits(both_passes(*arrays, mask=view), expected)
        assert view.tobytes() == before
    for part in (mask[0, 0, 0], mask[0, 0], mask[:, :1], mask[:, :, :1], mask[..., :1], mask[:, :1, :1]):
        full = np.ascontiguousarray(np.broadcast_to(part, mask.shape))
        assert same_bits(both_passes(*arrays, mask=part), both_passes(*arrays, mask=full))


@pytest.mark.parametrize("group", [2, 3])
def test_grouped_heads_are_repeated_keys_and_values(group):
    q, k, v, dout = problem(2, 2 * group, 70, 65, 16, np.float32, G=2)
    options = {"is_causal": True, "dropout_p": 0.2, "key": 3, "slopes": np.linspace(0, 0.5, 2 * group)}
    results = both_passes(q, k, v, dout, **options)
    repeated = both_passes(q, k.repeat(group, 1), v.repeat(group, 1), dout, **options)
    assert same_bits(results[:3], repeated[:3])
    for result, parts in zip(results[3:], repeated[3:]):
        parts = parts.reshape(2, 2, group, *parts.shape[2:])
        assert_close(result, parts.sum(2, dtype=np.float64), np.float32)


def test_offsets_continue_on_a_cache():
    """The rows that follow, beside a cache of which the rest is NaN: as within the whole sequence."""
    lengths, T, S = np.array([0, 30, 64, 91]), 5, 100
    q, k, v, dout = problem(4, 4, S, S, 16, np.float32, G=2)
    slopes = kernels.alibi_slopes(4)
    whole, whole_lse = kernels.attention_forward(q, k, v, True, slopes=slopes)
    for new in (1, T):
        rows = lengths[:, None] + np.arange(new)
        take = [np.take_along_axis(x, rows[:, None, :, None], axis=2) for x in (q, dout, whole)]
        cache_k, cache_v = k.copy(), v.copy()
        for b, length in enumerate(lengths):
            cache_k[b, :, length + new :] = np.nan
            cache_v[b, :, length + new :] = np.nan
        options = {"is_causal": True, "offsets": lengths, "slopes": slopes}
        results = both_passes(take[0], cache_k, cache_v, take[1], **options)
        assert_close(results[0], take[2], np.float32)
        assert_close(results[1], np.take_along_axis(whole_lse, rows[:, None], axis=2), np.float32)
        assert all(np.isfinite(x).all() for x in results)
        for b, length in enumerate(lengths):
            assert not results[3][b, :, length + new :].any()


def test_alibi_slopes_and_what_they_do():
    assert np.array_equal(kernels.alibi_slopes(8), 0.5 ** np.arange(1, 9))
    assert np.array_equal(kernels.alibi_slopes(1), [2.0**-8])
    assert np.array_equal(kernels.alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert np.allclose(np.log2(kernels.alibi_slopes(12)), [*-np.arange(1.0, 9), -0.5, -1.5, -2.5, -3.5])
    assert kernels.alibi_slopes(12).dtype == np.float64
    for n_head, kind in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(kind, match="alibi_slopes: n_head is"):
            kernels.alibi_slopes(n_head)
    arrays = problem(2, 3, 40, 70, 8, np.float64)
    slopes = kernels.alibi_slopes(3)
    position = np.array([0, 30])[:, None, None, None] + np.arange(40)[:, None]
    bias = -slopes[:, None, None] * abs(position - np.arange(70))
    results = both_passes(*arrays, slopes=slopes, offsets=[0, 30])
    assert_close(results, tuple(both_passes(*arrays, mask=bias)), np.float64)
    assert same_bits(both_passes(*arrays, slopes=strided(slopes), offsets=np.int8([0, 30])), results)
    odd = {"slopes": misaligned(slopes), "offsets": misaligned(np.array([0, 30]))}
    assert same_bits(both_passes(*arrays, **odd), results)


@pytest.mark.parametrize("is_causal", [False, True])
def test_alibi_of_queries_beyond_the_last_key_loses_no_digits(is_causal):
    """All keys lie 10^4 and more positions back, or 2 to 61: what the distances share makes no difference."""
    arrays = problem(2, 2, 60, 40, 8, np.float32)
    options = {"slopes": np.array([0.7, 0.01]), "is_causal": is_causal}
    near = both_passes(*arrays, offsets=[41, 60], **options)
    far = both_passes(*arrays, offsets=[10_000, 2**31 - 1], **options)
    assert same_bits(near, far)
    position = np.full((60, 1), 39)
    bias = -options["slopes"][:, None, None] * (position - np.arange(40))
    assert_close(far, reference_passes(*arrays, mask=bias), np.float32)
    position = np.array([10_000, 20_000])[:, None, None, None] + np.arange(60)[:, None]
    whole = -options["slopes"][:, None, None] * (position - np.arange(40.0))
    expected = reference_passes(*arrays, mask=whole)
    assert_close((far[0], *far[2:]), (expected[0], *expected[2:]), np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_large_scores(dtype):
    q, k, v, dout = problem(1, 2, 40, 40, 8, dtype)
    expected = reference_passes(q, k, v, dout, is_causal=True, scale=0.7)
    assert_gradients_close(both_passes(q, k, v, dout, is_causal=True, scale=0.7), expected, dout, dtype)
    mask = make_mask("-inf", (40, 40), dtype, 3)
    for options in ({"is_causal": True}, {"mask": mask}, {"mask": 1e4 * mask}, {"slopes": [1e4, -1e4]}):
        if "slopes" in options:
            options = {"slopes": np.array(options["slopes"])}
        results = both_passes(1e4 * q, k, v, dout, **options)
        with np.errstate(invalid="ignore"):
            expected = reference_passes((1e4 * q).astype(dtype), k, v, dout, **options)
        assert all(np.isfinite(result).all() for result in (results[0], *results[2:]))
        # A score of 4e4 has an ulp of 4e-3 in float32: weights are good to that.
        limit = 1e-9 if dtype == np.float64 else 0.02
        for result, want in zip((results[0], *results[2:]), (expected[0], *expected[2:])):
            assert np.linalg.norm(result - want) <= limit * max(np.linalg.norm(want), np.linalg.norm(dout))
    lowest = np.full((40, 40), np.finfo(dtype).min)
    assert_close(both_passes(0 * q, k, v, dout, mask=lowest)[0], both_passes(0 * q, k, v, dout)[0], dtype)


def test_subnormals():
    q, k, v, dout = problem(1, 2, 20, 20, 8, np.float32)
    tiny = np.float32(1e-40)
    results = both_passes(q * tiny, k * tiny, v * tiny, dout, mask=np.tri(20, dtype=bool))
    assert np.allclose(results[1][0, 0], np.log(np.arange(1, 21)))
    means = np.cumsum((v * tiny).astype(np.float64), axis=2) / np.arange(1, 21)[:, None]
    assert np.abs(results[0] - means).max() <= 2e-43


def numeric_gradient(function, x, dout, step=1e-6):
    """d sum(function() dout) / dx by central differences, x being what function reads."""
    gradient = np.empty_like(x)
    for at in np.ndindex(x.shape):
        before = x[at]
        x[at] = before + step
        above = function()
        x[at] = before - step
        gradient[at] = np.sum((above - function()) * dout) / (2 * step)
        x[at] = before
    return gradient


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "offsets": [2, 0]},
        {"mask": make_mask("bool", (2, 4, 3, 5), np.float64, 1), "dropout_p": 0.3, "key": 9},
        {"mask": make_mask("-inf", (3, 5), np.float64, 1), "slopes": np.linspace(0.1, 2, 4)},
        {"mask": make_mask("float", (2, 1, 1, 5), np.float64, 1), "is_causal": True, "scale": 0.9},
    ],
    ids=["offsets", "bool", "-inf and slopes", "float and causal"],
)
def test_gradients_are_those_of_finite_differences(options):
    q, k, v, dout = problem(2, 4, 3, 5, 3, np.float64, G=2, E=2)
    results = both_passes(q, k, v, dout, **options)
    for x, gradient in zip((q, k, v), results[2:]):
        expected = numeric_gradient(lambda: kernels.attention_forward(q, k, v, **options)[0], x, dout)
        assert error(gradient, expected) < 1e-7


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["causal", "offsets", "bool", "-inf"])
def test_what_is_not_finite_reaches_only_what_depends_on_it(kind, bad, name):
    """Against the reference, which never touches a masked element; T = 100 has whole and partial tiles."""
    options = {"is_causal": True}
    if kind == "offsets":
        options["offsets"] = [20]
    elif kind != "causal":
        mask = make_mask(kind, (1, 2, 100, 100), np.float32, 3)
        nothing = False if kind == "bool" else -np.inf
        mask[..., 7] = nothing      # a key that none sees
        mask[:, 0, 63] = nothing    # a query that sees none
        options = {"mask": mask}
    for positions in ((0,), (7, 63), (64, 99)):
        arrays = dict(zip(("q", "k", "v", "dout"), problem(1, 2, 100, 100, 5, np.float32, G=1)))
        clean = both_passes(*arrays.values(), **options)
        arrays[name][..., positions, 3] = bad
        results = both_passes(*arrays.values(), **options)
        expected = reference_passes(*arrays.values(), **options)
        for result, want, before in zip(results, expected, clean):
            assert np.array_equal(np.isfinite(result), np.isfinite(want))
            same = np.isfinite(want) & np.isclose(want, before, rtol=1e-3, atol=1e-4)
            assert np.allclose(result[same], want[same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["q", "k"])
def test_what_its_scale_makes_infinite_reaches_only_what_depends_on_it(name):
    for position in (0, 5, 63, 99):
        arrays = dict(zip(("q", "k", "v", "dout"), problem(1, 2, 100, 100, 4, np.float32, G=1)))
        clean = both_passes(*arrays.values(), is_causal=True, scale=10.0)
        arrays[name][0, 0, position] = 1e38
        dq, dk = both_passes(*arrays.values(), is_causal=True, scale=10.0)[2:4]
        if name == "k":  # queries before the key do not see it
            assert same_bits(dq[:, :, :position], clean[2][:, :, :position])
            assert not np.isfinite(dq[:, 0, position:]).all()
        else:  # keys after the query are not seen by it
            assert same_bits(dk[:, :, position + 1 :], clean[3][:, :, position + 1 :])
            assert np.isfinite(np.delete(dq, position, axis=2)).all()


@pytest.mark.parametrize("kind", ["bool", "-inf", "bool, causal"])
@pytest.mark.parametrize("filling", [1.0, np.nan, np.inf])
def test_a_query_that_sees_no_key(kind, filling):
    """0, -inf and zero gradients, whatever stands in its row and in keys that none sees."""
    mask = make_mask(kind[:4], (70, 90), np.float32, 2)
    nothing = False if mask.dtype == bool else -np.inf
    mask[[3, 69]] = nothing
    mask[0, 0] = nothing  # with is_causal, query 0 then sees nothing either
    mask[:, [0, 64, 89]] = nothing
    options = {"mask": mask, "is_causal": "causal" in kind}
    sees = mask != nothing
    if options["is_causal"]:
        sees &= np.tri(70, 90, dtype=bool)
    blind, unseen = ~sees.any(1), ~sees.any(0)
    assert blind[[3, 69]].all() and unseen[[0, 64, 89]].all()
    q, k, v, dout = problem(1, 2, 70, 90, 8, np.float32, G=1)
    q[:, :, blind] = dout[:, :, blind] = k[:, :, unseen] = v[:, :, unseen] = filling
    out, lse, dq, dk, dv = results = both_passes(q, k, v, dout, **options)
    assert np.isneginf(lse[:, :, blind]).all()
    assert not any(x.any() for x in (out[:, :, blind], dq[:, :, blind], dk[:, :, unseen], dv[:, :, unseen]))
    dout[:, :, blind] = 0
    assert_as_reference(results, reference_passes(q, k, v, dout, **options), dout, np.float32)


def test_empty_sizes():
    for shape in ((0, 2, 3, 3, 4), (2, 0, 3, 3, 4), (2, 2, 0, 3, 4)):
        q, k, v, dout = problem(*shape, np.float32)
        out, _, dq, dk, dv = both_passes(q, k, v, dout, mask=np.ones((1, 3), bool))
        assert out.shape == dq.shape == q.shape
        assert not dk.any()
        assert not dv.any()
    q, k, v, dout = problem(1, 1, 3, 0, 4, np.float32)
    out, lse, dq, dk, dv = both_passes(q, k, v, dout, is_causal=True, mask=np.ones((3, 0), bool))
    assert not out.any()
    assert np.isneginf(lse).all()
    assert not dq.any()
    assert dk.shape == dv.shape == (1, 1, 0, 4)


def test_reads_any_array():
    arrays = problem(2, 3, 37, 37, 16, np.float32)
    expected = both_passes(*arrays, is_causal=True)
    assert same_bits(both_passes(*[read_only(x) for x in arrays], is_causal=True), expected)
    assert same_bits(both_passes(*[strided(x) for x in arrays], is_causal=True), expected)
    views = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in arrays]
    assert same_bits(both_passes(*views, is_causal=True), expected)


@pytest.mark.parametrize("n_kv_head", [None, 4, 2, 1])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2, "key": 5}, {"slopes": np.linspace(0, 1, 4)}])
def test_packed_attention_is_attention(n_kv_head, options):
    B, T, H, D = 3, 50, 4, 6
    G = n_kv_head or H
    qkv = values(B, T, (H + 2 * G) * D, dtype=np.float32)
    dout = values(B, T, H * D, dtype=np.float32, seed=1)
    parts = [*np.split(qkv, [H * D, (H + G) * D], axis=-1), dout]
    heads = [np.moveaxis(x.reshape(B, T, -1, D), 2, 1) for x in parts]
    out, lse, *gradients = both_passes(*heads, is_causal=True, **options)
    merged = [np.ascontiguousarray(np.moveaxis(x, 1, 2)).reshape(B, T, -1) for x in (out, *gradients)]
    packed, packed_lse = kernels.packed_attention_forward(qkv, H, n_kv_head=n_kv_head, **options)
    assert same_bits((packed, packed_lse), (merged[0], lse))
    dqkv = kernels.packed_attention_backward(dout, qkv, packed, packed_lse, H, n_kv_head=n_kv_head, **options)
    assert same_bits(dqkv, np.concatenate(merged[1:], axis=-1))
    expected = reference.packed_attention_forward(qkv, H, n_kv_head=n_kv_head, **options)
    assert_close((packed, packed_lse), expected, np.float32)
    expected = reference.packed_attention_backward(dout, qkv, *expected, H, n_kv_head=n_kv_head, **options)
    assert_close(dqkv, expected, np.float32)


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
    results = both_passes(q, k, v, dout, dropout_p=dropout_p, key=2**64 - 1)
    expected = reference_passes(q, k, v, dout, dropout_p=dropout_p, key=2**64 - 1)
    assert_close(results, expected, np.float64)


def test_no_channels_and_no_heads():
    qkv = np.zeros((2, 3, 0), np.float32)
    out, lse = kernels.packed_attention_forward(qkv, 2, is_causal=False)
    assert np.allclose(lse, np.log(3))
    assert kernels.packed_attention_backward(out, qkv, out, lse, 2).shape == qkv.shape


@pytest.mark.parametrize(
    "kind, message, options",
    [
        (TypeError, "mask is int64, it must be bool or q's float32", {"mask": np.ones((5, 6), int)}),
        (TypeError, "mask is float64, it must be bool or q's float32", {"mask": np.ones((5, 6))}),
        (ValueError, "mask is (6, 5), it must broadcast to (2, 4, 5, 6)", {"mask": np.ones((6, 5), bool)}),
        (ValueError, "mask is (3, 1), it must broadcast to (2, 4, 5, 6)", {"mask": np.ones((3, 1), bool)}),
        (
            ValueError,
            "mask is (1, 2, 4, 5, 6), it must broadcast to (2, 4, 5, 6)",
            {"mask": np.ones((1, 2, 4, 5, 6), bool)},
        ),
        (ValueError, "slopes is (2,), it must be (4,), one for each head", {"slopes": np.ones(2)}),
        (ValueError, "slopes has nan, all must be finite", {"slopes": np.array([1, 1, np.nan, 1])}),
        (TypeError, "slopes is int64, it must be float32 or float64", {"slopes": np.ones(4, int)}),
        (ValueError, "offsets is (3,), it must be (2,), one for each sequence", {"offsets": [0, 0, 0]}),
        (ValueError, "offsets[1] is -1, it must be in [0, 2147483648)", {"offsets": [0, -1]}),
        (TypeError, "offsets is float64, it must be an integer array", {"offsets": [0.0, 1.0]}),
    ],
)
def test_refuses_bad_options_before_it_writes(kind, message, options):
    q, k, v, dout = problem(2, 4, 5, 6, 4, np.float32, G=2)
    out, lse = kernels.attention_forward(q, k, v)
    place = (np.full_like(out, 7), np.full_like(lse, 7))
    message = f"attention_forward: {message}"
    assert_refuses(kind, message, kernels.attention_forward, q, k, v, out=place, **options)
    assert (place[0] == 7).all() and (place[1] == 7).all()
    message = message.replace("forward", "backward")
    assert_refuses(kind, message, kernels.attention_backward, dout, q, k, v, out, lse, **options)


def test_refuses_heads_that_do_not_fit():
    q, k, v, _ = problem(2, 4, 5, 6, 4, np.float32, G=3)
    message = "attention_forward: k has 3 heads, they must divide the 4 of q"
    assert_refuses(ValueError, message, kernels.attention_forward, q, k, v)
    message = "attention_forward: k has 0 heads, they must divide the 4 of q"
    assert_refuses(ValueError, message, kernels.attention_forward, q, k[:, :0], v[:, :0])
    packed, qkv = kernels.packed_attention_forward, np.zeros((2, 3, 12), np.float32)
    message = "packed_attention_forward: n_kv_head is 3, it must divide n_head, 4"
    assert_refuses(ValueError, message, packed, qkv, 4, n_kv_head=3)
    message = "packed_attention_forward: qkv is (2, 3, 12), it must be (B, T, 8 D) for 4 heads"
    message += " and 2 key/value heads"
    assert_refuses(ValueError, message, packed, qkv, 4, n_kv_head=2)
    message = "packed_attention_forward: qkv is (2, 3, 12), it must be (B, T, 15 D) for 5 heads"
    assert_refuses(ValueError, message, packed, qkv, 5)
    message = "packed_attention_forward: slopes is (3,), it must be (4,), one for each head"
    assert_refuses(ValueError, message, packed, qkv, 4, slopes=np.ones(3))


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


def test_numbers_of_heads_of_a_small_dtype_do_not_wrap():
    """3 * 30000 is 24464 in uint16, and 3 * 100 is 44 in uint8."""
    message = "packed_attention_forward: qkv is (1, 2, 6), it must be (B, T, 90000 D) for 30000 heads"
    assert_refuses(ValueError, message, kernels.packed_attention_forward, values(1, 2, 6), np.uint16(30000))
    qkv = values(1, 2, 300)
    assert same_bits(kernels.packed_attention_forward(qkv, np.uint8(100)),
                     kernels.packed_attention_forward(qkv, 100))  # fmt: skip
    assert same_bits(kernels.alibi_slopes(np.uint8(200)), kernels.alibi_slopes(200))


def test_scale_is_finite_in_the_arrays_dtype():
    q = values(1, 1, 2, 4, dtype=np.float32)
    for scale in (np.inf, np.nan, -np.inf, 1e39):
        message = f"attention_forward: scale is {scale}, it must be finite in float32"
        assert_refuses(ValueError, message, kernels.attention_forward, q, q, q, scale=scale)
    message = "packed_attention_forward: scale is inf, it must be finite in float64"
    assert_refuses(ValueError, message, kernels.packed_attention_forward, values(1, 2, 6), 1, scale=np.inf)
    message = "attention_forward: scale is too large for a float"
    assert_refuses(ValueError, message, kernels.attention_forward, q, q, q, scale=10**400)
