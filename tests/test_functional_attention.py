"""Attention on the tape: gradients of every form, torch's values and gradients, masks, bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import same_bits, values

import cllm
from cllm import Tensor, kernels
from cllm import functional as F
from cllm.functional.attention import fused_attention

BOOLEAN = values(2, 1, 5, 6, seed=8) > -0.3
BOOLEAN[1, 0, 2] = False  # a row that sees nothing
EXCLUDING = np.where(BOOLEAN, values(2, 1, 5, 6, seed=9), -np.inf)

# Shapes of query, key and value, and the options: sizes of torch's (..., H, T, D).
FORMS = {
    "plain": ([(2, 4, 5, 3), (2, 4, 6, 3), (2, 4, 6, 3)], {}),
    "scale": ([(2, 4, 5, 3), (2, 4, 6, 3), (2, 4, 6, 3)], {"scale": 0.3}),
    "causal": ([(2, 4, 5, 3), (2, 4, 5, 3), (2, 4, 5, 3)], {"is_causal": True}),
    "causal, more keys": ([(2, 4, 5, 3), (2, 4, 6, 3), (2, 4, 6, 3)], {"is_causal": True}),
    "causal, fewer keys": ([(2, 4, 6, 3), (2, 4, 5, 3), (2, 4, 5, 3)], {"is_causal": True}),
    "value size": ([(2, 4, 5, 3), (2, 4, 6, 3), (2, 4, 6, 7)], {"is_causal": True}),
    "boolean": ([(2, 4, 5, 3), (2, 4, 6, 3), (2, 4, 6, 3)], {"attn_mask": BOOLEAN}),
    "boolean (T, S)": ([(2, 4, 5, 3), (2, 4, 6, 3), (2, 4, 6, 3)], {"attn_mask": BOOLEAN[0, 0]}),
    "boolean (S,)": ([(2, 4, 5, 3), (2, 4, 6, 3), (2, 4, 6, 3)], {"attn_mask": BOOLEAN[0, 0, 0]}),
    "float": ([(2, 4, 5, 3), (2, 4, 6, 3), (2, 4, 6, 3)], {"attn_mask": values(4, 5, 6, seed=5)}),
    "-inf": ([(2, 4, 5, 3), (2, 4, 6, 3), (2, 4, 6, 3)], {"attn_mask": EXCLUDING, "scale": 2.0}),
    "groups": ([(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 3)], {"enable_gqa": True}),
    "one group, masked": (
        [(2, 4, 5, 3), (2, 1, 6, 3), (2, 1, 6, 3)],
        {"enable_gqa": True, "attn_mask": EXCLUDING},
    ),
    "groups, causal": (
        [(2, 6, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)],
        {"enable_gqa": True, "is_causal": True, "scale": 0.5},
    ),
    "one key head for all": ([(2, 4, 5, 3), (2, 1, 6, 3), (2, 1, 6, 3)], {"attn_mask": BOOLEAN}),
    "one query head": ([(2, 1, 5, 3), (2, 4, 6, 3), (2, 4, 6, 3)], {}),
    "one sequence of keys": ([(2, 4, 5, 3), (1, 4, 6, 3), (1, 4, 6, 3)], {"attn_mask": BOOLEAN}),
    "2-d": ([(5, 3), (6, 3), (6, 3)], {"attn_mask": BOOLEAN[1, 0]}),
    "3-d": ([(4, 5, 3), (4, 6, 3), (4, 6, 3)], {"attn_mask": BOOLEAN[0]}),
    "3-d, causal groups": (
        [(4, 5, 3), (2, 6, 3), (2, 6, 3)],
        {"enable_gqa": True, "is_causal": True},
    ),
    "5-d": ([(3, 2, 4, 5, 3), (3, 2, 4, 6, 3), (3, 2, 4, 6, 3)], {"attn_mask": EXCLUDING}),
    "5-d, groups": (
        [(3, 2, 4, 5, 3), (3, 2, 2, 6, 3), (3, 2, 2, 6, 3)],
        {"enable_gqa": True, "attn_mask": BOOLEAN[0, 0]},
    ),
}


def tensors_of(shapes, dtype=np.float64):
    return [Tensor(values(*s, seed=i, dtype=dtype), requires_grad=True) for i, s in enumerate(shapes)]


def in_dtype(options, dtype):
    mask = options.get("attn_mask")
    if mask is None or mask.dtype == bool:
        return options
    return options | {"attn_mask": mask.astype(dtype)}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form):
    shapes, options = FORMS[form]
    tensors = tensors_of(shapes)
    assert cllm.gradcheck(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), tensors)
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != bool and np.isfinite(mask).all():
        rest = {name: value for name, value in options.items() if name != "attn_mask"}
        tensors.append(Tensor(mask, requires_grad=True))
        assert cllm.gradcheck(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, **rest), tensors)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_torchs(form, dtype):
    """The mask's gradient too; torch 2.13 gives 0 and no NaN for a row that sees nothing, as we do."""
    torch = pytest.importorskip("torch")
    shapes, options = FORMS[form]
    options = in_dtype(options, dtype)
    ours = tensors_of(shapes, dtype)
    theirs = [torch.tensor(x.data, requires_grad=True) for x in ours]
    mask = options.get("attn_mask")
    our_options, their_options = dict(options), dict(options)
    if mask is not None:
        grad = mask.dtype != bool
        their_options["attn_mask"] = torch.tensor(np.atleast_2d(mask), requires_grad=grad)
        if grad:
            our_options["attn_mask"] = Tensor(mask, requires_grad=True)
            ours.append(our_options["attn_mask"])
            theirs.append(their_options["attn_mask"])
    y = F.scaled_dot_product_attention(*ours[:3], **our_options)
    z = torch.nn.functional.scaled_dot_product_attention(*theirs[:3], **their_options)
    assert y.shape == tuple(z.shape) and y.dtype == dtype
    dout = values(*y.shape, seed=9, dtype=dtype)
    y.backward(dout)
    z.backward(torch.tensor(dout))
    limit = 2e-5 if dtype == np.float32 else 1e-12
    for a, b in [(y.data, z.detach()), *((x.grad, t.grad) for x, t in zip(ours, theirs))]:
        difference = np.abs(a - b.numpy())
        assert np.linalg.norm(difference) <= limit * max(np.linalg.norm(a), 1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]),
    st.sampled_from([1, 2, 17, 65, 129]),
    st.sampled_from([1, 3, 17, 65, 129]),
    st.integers(1, 20),
    st.sampled_from(["none", "causal", "bool", "float"]),
)
def test_shapes_are_torchs_too(B, heads, T, S, D, kind):
    torch = pytest.importorskip("torch")
    H, G = heads
    arrays = [values(*s, seed=i, dtype=np.float32) for i, s in enumerate([(B, H, T, D), *[(B, G, S, D)] * 2])]
    options = {"is_causal": kind == "causal", "enable_gqa": H != G}
    if kind in ("bool", "float"):
        mask = values(B, 1, T, S, seed=4, dtype=np.float32)
        options["attn_mask"] = mask > 0 if kind == "bool" else mask
    ours = [Tensor(x, requires_grad=True) for x in arrays]
    theirs = [torch.tensor(x, requires_grad=True) for x in arrays]
    y = F.scaled_dot_product_attention(*ours, **options)
    if "attn_mask" in options:
        options["attn_mask"] = torch.tensor(options["attn_mask"])
    z = torch.nn.functional.scaled_dot_product_attention(*theirs, **options)
    y.backward(np.ones(y.shape, np.float32))
    z.sum().backward()
    for a, b in [(y.data, z.detach()), *((x.grad, t.grad) for x, t in zip(ours, theirs))]:
        assert np.linalg.norm(a - b.numpy()) <= 2e-5 * max(np.linalg.norm(a), 1)


def test_a_tensor_mask_is_its_array_and_gets_its_gradient():
    shapes = [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 3)]
    for dropout_p in (0.0, 0.4):
        results = []
        for mask in (EXCLUDING, Tensor(EXCLUDING), Tensor(EXCLUDING, requires_grad=True)):
            tensors = tensors_of(shapes)
            cllm.manual_seed(1)
            y = F.scaled_dot_product_attention(*tensors, mask, dropout_p=dropout_p, enable_gqa=True)
            y.backward(values(*y.shape, seed=7))
            results.append((y.data, *(x.grad for x in tensors)))
        assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
        assert mask.grad.shape == EXCLUDING.shape
        assert not mask.grad[~BOOLEAN].any()
        assert mask.grad.any()


def test_the_gradient_of_a_mask_with_everything_else():
    slopes, offsets = np.array([0.5, 0.1, 0.2, 0.7]), np.array([1, 2])

    def attention(q, k, v, mask):
        cllm.manual_seed(2)
        return fused_attention(q, k, v, mask, 0.3, True, 0.8, slopes=slopes, offsets=offsets)

    assert cllm.gradcheck(attention, tensors_of([(2, 4, 3, 3), (2, 2, 6, 3), (2, 2, 6, 2), (4, 1, 6)]))


@pytest.mark.parametrize("name", ["boolean", "float", "repeated", "slopes", "offsets"])
def test_what_the_caller_changes_after_the_forward_pass_does_not_matter(name):
    seen = values(5, 6, seed=8) > -0.3
    given = {
        "boolean": seen,
        "float": np.where(seen, values(5, 6, seed=9), -np.inf),
        "repeated": np.broadcast_to(values(2, 1, 5, 1, seed=9) > 0, (2, 4, 5, 6)),
        "slopes": np.array([0.5, 0.1, 0.2, 0.7]),
        "offsets": np.array([1, 2]),
    }[name]
    owner = given if given.base is None else given.base
    option = name if name in ("slopes", "offsets") else "mask"
    options = {"is_causal": True, "slopes": np.array([0.3, 0.1, 0.6, 0.2]), option: given}
    grads = []
    for change in (False, True):
        tensors = tensors_of([(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 3)])
        y = fused_attention(*tensors, **options)
        if change:
            owner[...] = 0
        y.backward(values(*y.shape, seed=7))
        grads.append(tuple(x.grad for x in tensors))
    assert same_bits(*grads)


def test_what_the_caller_changes_after_packed_attention_does_not_matter():
    grads, slopes = [], np.array([0.3, 0.1])
    for change in (False, True):
        (x,) = tensors_of([(2, 5, 24)])
        y = F.causal_self_attention(x, 2, slopes=slopes)
        slopes *= not change
        y.backward(values(*y.shape, seed=7))
        grads.append(x.grad)
    assert same_bits(*grads)


@pytest.mark.parametrize("name", ["key", "value", "query"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_nan_stays_with_those_that_see_it(learned, name):
    tensors = dict(zip(("query", "key", "value"), tensors_of([(2, 2, 5, 3), (2, 2, 6, 3), (2, 2, 6, 3)])))
    mask = np.where(np.arange(6) == 4, -np.inf, np.zeros((5, 6)))  # none sees key 4, query 1 sees no key
    mask[1] = -np.inf
    tensors[name].data[:, :, 1 if name == "query" else 4] = np.nan
    mask = Tensor(mask, requires_grad=learned)
    y = F.scaled_dot_product_attention(**tensors, attn_mask=mask)
    y.backward(np.ones(y.shape))
    grads = [x.grad for x in tensors.values()] + ([mask.grad] if learned else [])
    assert np.isfinite(y.data).all()
    assert all(np.isfinite(grad).all() for grad in grads)
    assert not y.data[:, :, 1].any()


def test_masks_of_other_floats_become_the_inputs_dtype():
    tensors = tensors_of([(1, 1, 2, 3)] * 3, np.float32)
    mask = np.array([[0.5, np.finfo(np.float64).min], [0.25, -1.0]])
    y = F.scaled_dot_product_attention(*tensors, mask)
    same = F.scaled_dot_product_attention(*tensors, np.float32([[0.5, -np.inf], [0.25, -1.0]]))
    assert y.dtype == np.float32 and same_bits(y.data, same.data)
    learned = Tensor(np.array([[0.5, 1.0], [0.25, -1.0]]), requires_grad=True)
    F.scaled_dot_product_attention(*tensors, learned).sum().backward()
    assert learned.grad.dtype == np.float64


def test_lists_and_views_are_masks_as_well():
    q, k, v = tensors_of([(1, 2, 2, 3)] * 3)
    mask = np.array([[True, False], [True, True]])
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).data
    for form in (mask, mask.tolist(), mask.T.copy().T, np.broadcast_to(mask, (1, 2, 2, 2))):
        assert same_bits(F.scaled_dot_product_attention(q, k, v, form).data, expected)
    heads = Tensor(values(1, 2, 2, 3)).transpose(1, 2)
    causal = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    assert same_bits(causal.data, F.scaled_dot_product_attention(*[heads.contiguous()] * 3, mask).data)


@pytest.mark.parametrize(
    "shapes, options, kind, message",
    [
        ([(2, 5, 3)] * 3, {"attn_mask": np.ones((5, 6), bool)}, ValueError,
         "attn_mask is (5, 6), it must broadcast to (2, 5, 5)"),
        ([(1, 2, 5, 3)] * 3, {"attn_mask": np.ones((3, 1, 5, 5))}, ValueError,
         "attn_mask is (3, 1, 5, 5), it must broadcast to (1, 2, 5, 5)"),
        ([(5, 3)] * 3, {"attn_mask": np.ones((1, 5, 5), bool)}, ValueError,
         "attn_mask is (1, 5, 5), it must broadcast to (5, 5)"),
        ([(2, 5, 3)] * 3, {"attn_mask": np.ones((5, 5), int)}, TypeError,
         "attn_mask is int64, it must be boolean or of floats"),
        ([(2, 5, 3)] * 3, {"attn_mask": Tensor(np.ones((4, 5)), requires_grad=True)}, ValueError,
         "attn_mask is (4, 5), it must broadcast to (2, 5, 5)"),
        ([(2, 5, 3)] * 3, {"attn_mask": np.ones((5, 5), bool), "is_causal": True}, ValueError,
         "give attn_mask or is_causal, not both"),
        ([(5,), (5, 3), (5, 3)], {}, ValueError, "query is (5,), it must have at least 2 dimensions"),
        ([(4, 5, 3), (2, 5, 3), (2, 5, 3)], {}, ValueError,
         "query is (4, 5, 3), key is (2, 5, 3), value is (2, 5, 3); their leading dimensions must broadcast "
         "(enable_gqa=True lets query heads share a key head)"),
        ([(4, 5, 3), (3, 5, 3), (3, 5, 3)], {"enable_gqa": True}, ValueError,
         "query is (4, 5, 3), key is (3, 5, 3), value is (3, 5, 3); the heads of key and value differ, or do "
         "not divide those of query"),
    ],
)  # fmt: skip
def test_errors(shapes, options, kind, message):
    with pytest.raises(kind) as caught:
        F.scaled_dot_product_attention(*tensors_of(shapes), **options)
    assert str(caught.value) == f"scaled_dot_product_attention: {message}"


# Packed self-attention


def unpacked(qkv, n_head, n_kv_head, rotary_base, **options):
    """`causal_self_attention` from its parts."""
    B, T, C = qkv.shape
    n = n_head + 2 * n_kv_head
    q, k, v = qkv.reshape(B, T, n, C // n).transpose(1, 2).split([n_head, n_kv_head, n_kv_head], dim=1)
    if rotary_base is not None:
        q, k = (rotated(x, rotary_base) for x in (q, k))
    out = fused_attention(q, k, v, is_causal=True, **options)
    return out.transpose(1, 2).reshape(B, T, n_head * (C // n))


def rotated(x, base):
    """Pairs (i, i + D/2) turned by t base^(-2i/D), in array code."""
    T, half = x.shape[2], x.shape[3] // 2
    angles = np.arange(T)[:, None] * base ** (-np.arange(half) / half)
    cosine, sine = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return cllm.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


@pytest.mark.parametrize("rotary_base", [None, 10000.0, 50.0])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("slopes", [None, kernels.alibi_slopes(4)])
def test_packed_attention_is_its_parts(slopes, n_kv_head, rotary_base):
    qkv = tensors_of([(2, 7, (4 + 2 * n_kv_head) * 6)] * 2)
    for dropout_p in (0.0, 0.3):
        grads = []
        for x, attention in zip(qkv, (F.causal_self_attention, unpacked)):
            x.data, x.grad = qkv[0].data, None
            before = x.data.copy()
            cllm.manual_seed(4)
            options = {"n_kv_head": n_kv_head, "slopes": slopes, "rotary_base": rotary_base}
            y = attention(x, 4, dropout_p=dropout_p, **options)
            y.backward(values(*y.shape, seed=3))
            assert np.array_equal(x.data, before)
            grads.append((y.data, x.grad))
        for a, b in zip(*grads):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_packed_attention_without_options_has_all_heads():
    x = Tensor(values(2, 5, 24))
    assert same_bits(F.causal_self_attention(x, 2).data, F.causal_self_attention(x, 2, n_kv_head=2).data)


@pytest.mark.parametrize(
    "options", [{"rotary_base": 20.0, "n_kv_head": 1}, {"slopes": np.array([0.3, 0.1])}, {"n_kv_head": 1}]
)
def test_gradients_of_packed_attention(options):
    n = 2 + 2 * options.get("n_kv_head", 2)
    assert cllm.gradcheck(lambda x: F.causal_self_attention(x, 2, **options), tensors_of([(2, 4, n * 4)]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_kv_head": 3}, "n_kv_head is 3, it must divide n_head, 4"),
        ({"rotary_base": 10.0, "n_kv_head": 2}, r"qkv is \(2, 5, 12\), it must be \(B, T, 8 D\) for 4 heads"),
        ({"rotary_base": 10.0}, "even D"),
        ({"slopes": np.ones(3)}, r"slopes is \(3,\), it must be \(4,\)"),
    ],
)
def test_packed_attention_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        F.causal_self_attention(Tensor(values(2, 5, 12)), 4, **options)


@pytest.mark.parametrize("rotary_base", [None, 10.0])
def test_packed_attention_refuses_no_heads(rotary_base):
    x = Tensor(values(2, 5, 12))
    for n_head, n_kv_head, name in ((0, None, "n_head"), (-2, 1, "n_head"), (2, 0, "n_kv_head")):
        with pytest.raises(ValueError, match=f"attention.*: {name} is (0|-2), it must be at least 1"):
            F.causal_self_attention(x, n_head, n_kv_head=n_kv_head, rotary_base=rotary_base)
