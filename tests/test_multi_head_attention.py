"""nn.MultiHeadAttention by itself: masks, cross-attention, weights; fused against plain and against torch."""

import re

import numpy as np
import pytest

import cllm
from cllm import Tensor, nn, rng
from cllm.errors import InputError

B, T, S, C, H = 2, 5, 7, 12, 4

MASKS = {
    "none": None,
    "boolean": np.random.default_rng(1).random((B, 1, T, T)) > 0.4,
    "row": np.array([True, True, False, True, False]),
    "heads": np.random.default_rng(2).random((H, T, T)) > 0.3,
    "float": np.random.default_rng(3).standard_normal((B, H, T, T)),
    "excluding": np.where(np.random.default_rng(4).random((T, T)) > 0.5, 0.5, -np.inf),
    "blind": np.zeros((T, T), bool),
    "blind row": np.where(np.arange(T)[:, None] == 2, -np.inf, 0.5),
}


def module_of(dtype=np.float64, **fields):
    cllm.manual_seed(0)  # the same values each time
    config = cllm.GPTConfig(**{"n_embd": C, "n_head": H, **fields})
    module = nn.MultiHeadAttention(config).flatten(dtype)
    for name, p in module.named_parameters():
        p.data += 0.3 * rng.initial_generator(5, name).standard_normal(p.shape)
    return module


def x_of(*shape, seed=0, dtype=np.float64):
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype), requires_grad=True)


def run(module, *inputs, **options):
    """Output and gradients of inputs and parameters."""
    module.zero_grad()
    y = module(*inputs, **options)
    (y * np.cos(np.arange(y.numel())).reshape(y.shape).astype(y.dtype)).sum().backward()
    results = {"y": y.data}
    for i, x in enumerate(inputs):
        results[i], x.grad = x.grad, None
    return results | {name: p.grad.copy() for name, p in module.named_parameters()}


def assert_same(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for key in b:
        np.testing.assert_allclose(a[key], b[key], rtol=tolerance, atol=tolerance, err_msg=str(key))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("is_causal", [None, False])
@pytest.mark.parametrize(
    "fields", [{}, {"position": "alibi", "n_kv_head": 2}, {"qk_norm": True, "n_kv_head": 1, "bias": False}]
)
def test_masks_fused_and_plain(mask, is_causal, fields):
    fused, plain = module_of(**fields), module_of(attention="plain", **fields)
    options = {"attn_mask": mask, "is_causal": is_causal}
    results = run(fused, x_of(B, T, C), **options)
    assert_same(run(plain, x_of(B, T, C), **options), results)
    assert all(np.isfinite(array).all() for array in results.values())
    if mask is MASKS["blind"]:
        bias = 0 if fused.c_proj.bias is None else fused.c_proj.bias.data
        np.testing.assert_array_equal(results["y"], np.zeros((B, T, C)) + bias)
        assert not results[0].any() and not results["c_attn.weight"].any()


@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_a_mask_may_be_learned(attention):
    module = module_of(attention=attention, position="alibi")
    mask = x_of(H, T, T, seed=7)
    assert cllm.gradcheck(lambda x, m: module(x, attn_mask=m), [x_of(B, T, C), mask])
    fixed = Tensor(mask.data)
    np.testing.assert_allclose(
        module(x_of(B, T, C), attn_mask=fixed).data, module(x_of(B, T, C), attn_mask=mask).data, rtol=1e-12
    )


@pytest.mark.parametrize("position", ["learned", "rotary", "alibi"])
@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 2, "bias": False}, {"qk_norm": True}])
def test_cross_attention(position, fields):
    fields = {"n_embd": 16, **fields}
    fused, plain = (module_of(attention=a, position=position, **fields) for a in ("fused", "plain"))
    inputs = x_of(B, T, 16), x_of(B, S, 16, seed=1)
    results = run(fused, *inputs)
    assert_same(run(plain, *inputs), results)
    unplaced = module_of(**fields)  # positions do not count between two sequences
    assert_same(run(unplaced, *inputs), results)
    backwards = run(fused, inputs[0], Tensor(inputs[1].data[:, ::-1].copy(), requires_grad=True))
    np.testing.assert_allclose(backwards["y"], results["y"], rtol=1e-10, atol=1e-12)
    assert cllm.gradcheck(lambda x, c: fused(x, c), list(inputs))


def test_a_context_equal_to_x_is_self_attention():
    module, x = module_of(), x_of(B, T, C)
    np.testing.assert_allclose(module(x, x).data, module(x, is_causal=False).data, rtol=1e-12)
    np.testing.assert_allclose(module(x, x, is_causal=True).data, module(x).data, rtol=1e-12)


def test_weights():
    module, x = module_of(position="rotary", n_embd=16, n_kv_head=2), x_of(B, T, 16)
    y, weights = module(x, need_weights=True)
    assert weights.shape == (B, H, T, T) and weights.requires_grad
    np.testing.assert_allclose(weights.data.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(y.data, module(x).data, rtol=1e-10, atol=1e-14)
    _, weights = module(x, x_of(B, S, 16, seed=1), attn_mask=np.arange(S) != 2, need_weights=True)
    assert weights.shape == (B, H, T, S) and not weights.data[..., 2].any()
    _, weights = module(x, attn_mask=MASKS["blind"], need_weights=True)
    assert not weights.data.any()


def test_dropout_is_for_training():
    module, x = module_of(dropout=0.5), x_of(B, T, C)
    cllm.manual_seed(0)
    first = module(x).data
    assert (module(x).data != first).any()
    cllm.manual_seed(0)
    np.testing.assert_array_equal(module(x).data, first)
    np.testing.assert_array_equal(module.eval()(x).data, module_of()(x).data)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attn_mask": np.ones((T, T), int)}, "attn_mask is int64, it must be boolean or of floats"),
        ({"attn_mask": np.ones((3, T), bool)}, r"attn_mask is \(3, 5\), it must broadcast to \(2, 4, 5, 5\)"),
        ({"attn_mask": np.ones((1, B, H, T, T), bool)}, r"attn_mask is \(1, 2, 4, 5, 5\), it must broadcast"),
        ({"context": x_of(B, S, 3)}, r"context is \(2, 7, 3\), it must be \(2, S, 12\)"),
        ({"context": x_of(3, S, C)}, r"context is \(3, 7, 12\), it must be \(2, S, 12\)"),
        ({"context": x_of(S, C)}, r"context is \(7, 12\)"),
    ],
)
@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_refusals(options, message, attention):
    with pytest.raises((InputError, TypeError), match=message):
        module_of(attention=attention)(x_of(B, T, C), **options)


def test_a_cache_goes_with_causal_self_attention_only():
    model = cllm.GPT(cllm.GPTConfig(n_embd=C, n_head=H))
    layer, x = model.new_cache(B).layers[0], x_of(B, T, C, dtype=np.float32)
    attn = model.transformer.h[0].attn
    for options in ({"context": x}, {"attn_mask": np.ones((T, T), bool)}, {"is_causal": False}):
        with pytest.raises(InputError, match=r"^attention with a cache is causal, without a context"):
            attn(x, cache=layer, **options)
    assert not layer.keys.any()


# Against torch


@pytest.mark.parametrize("mask", ["none", "row", "float", "boolean"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torchs_module_gives_the_same(mask, cross, dtype):
    torch = pytest.importorskip("torch")
    module = module_of(dtype)
    twin = torch.nn.MultiheadAttention(C, H, batch_first=True, dtype=getattr(torch, np.dtype(dtype).name))
    named = {"in_proj_weight": "c_attn.weight", "in_proj_bias": "c_attn.bias"}
    named |= {"out_proj.weight": "c_proj.weight", "out_proj.bias": "c_proj.bias"}
    ours = module.state_dict()
    twin.load_state_dict({theirs: torch.tensor(ours[name]) for theirs, name in named.items()})
    x, context = x_of(B, T, C, dtype=dtype), x_of(B, S if mask == "none" else T, C, seed=1, dtype=dtype)
    inputs = (x, context) if cross else (x,)
    tensors = [torch.tensor(z.data, requires_grad=True) for z in inputs]
    array = MASKS[mask]
    theirs = None
    if array is not None:  # torch wants (B H, T, S), and True excludes
        wide = np.broadcast_to(array, (B, H, T, T)).reshape(B * H, T, T)
        theirs = torch.tensor(~wide if wide.dtype == bool else wide.astype(dtype))
    expected, weights = twin(
        tensors[0], tensors[-1], tensors[-1], attn_mask=theirs, average_attn_weights=False
    )
    waves = torch.cos(torch.arange(expected.numel(), dtype=torch.float64)).view(expected.shape)
    (expected * waves.to(expected.dtype)).sum().backward()
    if mask == "boolean":  # torch gives NaN where a row sees nothing
        assert np.broadcast_to(array, (B, H, T, T)).any(-1).all()
    results = run(module, *inputs, attn_mask=array, is_causal=False)
    tolerance = 2e-5 if dtype == np.float32 else 1e-12
    wanted = {"y": expected.detach().numpy(), **{i: z.grad.numpy() for i, z in enumerate(tensors)}}
    wanted |= {name: dict(twin.named_parameters())[t].grad.numpy() for t, name in named.items()}
    assert_same(results, wanted, tolerance)
    _, found = module(*inputs, attn_mask=array, is_causal=False, need_weights=True)
    np.testing.assert_allclose(found.data, weights.detach().numpy(), rtol=tolerance, atol=tolerance)


class WrongShape(nn.Module):
    """Attention of a user's that returns what would broadcast without a word, or no Tensor."""

    result = None

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        return type(self).result(self.proj(x))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize(
    "result, given",
    [
        (lambda y: y[:, :, :1], r"a Tensor (2, 5, 1)"),
        (lambda y: y.mean(0), r"a Tensor (5, 8)"),
        (lambda y: y.data, "a ndarray"),
        (lambda y: None, "a NoneType"),
    ],
)
def test_a_block_refuses_what_is_not_of_its_inputs_shape(result, given, norm_position):
    sizes = {"vocab_size": 5, "block_size": 5, "n_layer": 1, "n_head": 2, "n_embd": 8}
    config = cllm.GPTConfig(**sizes, norm_position=norm_position)
    kind = type("Wrong", (WrongShape,), {"result": staticmethod(result)})
    model = cllm.GPT(config, attention=kind)
    message = f"Wrong.forward returned {given}, it must return a Tensor (2, 5, 8)"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        model(np.zeros((2, 5), int))
