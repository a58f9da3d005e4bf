"""Modules: names, state, modes, flat blocks."""

import copy
import pickle

import numpy as np
import pytest

import cllm
from cllm import Tensor, nn
from cllm import functional as F
from cllm.errors import InputError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Dropout(0.5))
        self.heads = nn.ModuleList([nn.Linear(5, 2, bias=False) for _ in range(2)])
        self.scale = nn.Parameter(np.full((2,), 2.0, np.float32))
        self.heads[1].weight = self.heads[0].weight

    def forward(self, x):
        x = self.body(x)
        return sum(head(x) for head in self.heads) * self.scale


NAMES = ["scale", "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "heads.0.weight"]


def x_of(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_names_parameters_and_modules():
    net = Net()
    assert [name for name, _ in net.named_parameters()] == NAMES
    assert [name for name, _ in net.named_parameters("net")][1] == "net.body.0.weight"
    assert len(list(net.parameters())) == 6 and list(net.state_dict()) == [*NAMES, "heads.1.weight"]
    names = [name for name, _ in net.named_modules()]
    assert names == ["", "body", "body.0", "body.1", "body.2", "heads", "heads.0", "heads.1"]
    assert "Dropout(p=0.5)" in repr(net) and "LayerNorm" in repr(net)
    assert len(net.heads) == 2 and net.heads[-1] is net.heads[1]


def test_names_are_torchs():
    torch = pytest.importorskip("torch")
    ours = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.Embedding(5, 2)), nn.Linear(4, 2, bias=False)
    )
    t = torch.nn
    theirs = t.Sequential(
        t.Linear(3, 4), t.Sequential(t.LayerNorm(4), t.Embedding(5, 2)), t.Linear(4, 2, bias=False)
    )
    shapes = {name: tuple(array.shape) for name, array in theirs.state_dict().items()}
    assert {name: array.shape for name, array in ours.state_dict().items()} == shapes
    ours.load_state_dict({name: array.numpy() for name, array in theirs.state_dict().items()})
    x = x_of(2, 3)
    np.testing.assert_allclose(
        ours[0](x).data, theirs[0](torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_train_and_eval_reach_every_module():
    net = Net()
    assert all(module.training for module in net.modules())
    assert net.eval() is net and not any(module.training for module in net.modules())
    np.testing.assert_array_equal(net(x_of(2, 3)).data, net(x_of(2, 3)).data)
    net.train()
    assert (net(x_of(2, 3)).data != net(x_of(2, 3)).data).any()


def test_manual_seed_makes_initial_values_repeat():
    def drawn(seed):
        cllm.manual_seed(seed)
        return nn.Linear(20, 30), nn.Embedding(50, 20)

    (a, e), (b, f), (c, _) = drawn(0), drawn(0), drawn(1)
    np.testing.assert_array_equal(a.weight.data, b.weight.data)
    np.testing.assert_array_equal(e.weight.data, f.weight.data)
    assert (a.weight.data != c.weight.data).any()
    assert np.abs(a.weight.data).max() <= 20**-0.5 and a.weight.data.std() == pytest.approx(
        (20 * 3) ** -0.5, rel=0.1
    )
    assert e.weight.data.std() == pytest.approx(1, rel=0.1) and a.weight.dtype == np.float32


def test_zero_grad():
    net = Net().eval()
    net(x_of(2, 3)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


# State


def test_state_dict_holds_the_arrays_themselves():
    net = Net()
    state = net.state_dict()
    assert (
        state["body.0.weight"] is net.body[0].weight.data
        and state["heads.0.weight"] is state["heads.1.weight"]
    )


def test_load_state_dict_casts_and_accepts_one_name_of_a_shared_parameter():
    net, other = Net(), Net()
    state = {name: array.astype(np.float64) for name, array in other.state_dict().items()}
    del state["heads.0.weight"]
    net.load_state_dict(state)
    for name, array in net.state_dict().items():
        np.testing.assert_array_equal(array, other.state_dict()[name])
        assert array.dtype == np.float32


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("scale"), "^the weights do not fit this Net: missing scale$"),
        (lambda s: s.update(extra=s["scale"]), "unexpected extra"),
        (
            lambda s: s.update(scole=s.pop("scale")),
            r'missing scale; unexpected scole \(did you mean "scale"\?\)',
        ),
        (lambda s: s.update(scale=np.ones(3)), r"scale is \(3,\), it must be \(2,\)"),
        (lambda s: s.update(scale=np.array([1, 2])), "scale is int64, it must be of floats"),
        (
            lambda s: s.update({"heads.1.weight": s["heads.0.weight"] + 1}),
            "heads.1.weight and heads.0.weight differ",
        ),
        (lambda s: s.clear(), r"missing scale, .* and 1 more"),
    ],
)
def test_load_state_dict_refuses_what_does_not_fit_and_changes_nothing(change, message):
    net = Net()
    before = {name: array.copy() for name, array in net.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()}
    change(state)
    with pytest.raises(InputError, match=message):
        net.load_state_dict(state)
    for name, array in net.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_load_state_dict_may_pass_over_names_as_torch_does():
    torch = pytest.importorskip("torch")
    layer, twin = nn.Linear(2, 3), torch.nn.Linear(2, 3)
    state = {"weight": np.ones((3, 2), np.float32), "scale": np.ones(1, np.float32)}
    keys = layer.load_state_dict(state, strict=False)
    theirs = twin.load_state_dict({name: torch.tensor(x) for name, x in state.items()}, strict=False)
    assert tuple(keys) == tuple(theirs) == (["bias"], ["scale"]) and keys.missing_keys == ["bias"]
    assert (layer.weight.data == 1).all()
    assert tuple(layer.load_state_dict(state_dict=layer.state_dict())) == ([], [])
    with pytest.raises(InputError, match=r"weight is \(2,\)"):
        layer.load_state_dict({"weight": np.ones(2)}, strict=False)


@pytest.mark.parametrize("flat", [False, True])
def test_zero_grad_may_fill_with_zeros(flat):
    layer = nn.Linear(2, 3)
    if flat:
        layer.flatten()
    layer.weight.grad = np.ones((3, 2))
    layer.zero_grad(set_to_none=False)
    assert not layer.weight.grad.any() and layer.bias.grad is None
    layer.zero_grad()
    assert layer.weight.grad is None


# Flat blocks


def test_flatten_moves_values_and_gradients_into_one_block_each():
    net = Net().eval()
    net(x_of(4, 3)).sum().backward()
    values = {name: p.data.copy() for name, p in net.named_parameters()}
    grads = {name: p.grad.copy() for name, p in net.named_parameters()}
    assert net.flatten() is net
    start = 0
    for name, p in net.named_parameters():
        np.testing.assert_array_equal(p.data, values[name])
        np.testing.assert_array_equal(p.grad, grads[name])
        for view, block in ((p.data, net.flat_data), (p.grad, net.flat_grad)):
            assert view.ctypes.data == block.ctypes.data + start * 4 and view.flags.c_contiguous
        assert not net.flat_data[start + p.numel() : start + -(-p.numel() // 16) * 16].any()
        start += -(-p.numel() // 16) * 16
    assert net.flat_data.shape == net.flat_grad.shape == (start,)
    assert net.flat_data.ctypes.data % 64 == 0 and net.flat_grad.ctypes.data % 64 == 0


def test_views_stay_valid_after_loading_assigning_and_training():
    net = Net().flatten()
    net.load_state_dict({name: array + 1 for name, array in net.state_dict().items()})
    net.scale.data = np.array([7.0, 8.0])
    net.body[0].bias.data += 1
    net(x_of(4, 3)).sum().backward()
    net.zero_grad()
    net(x_of(4, 3)).sum().backward()
    net.scale.grad = np.array([5.0, 6.0])
    for p in net.parameters():
        assert np.shares_memory(p.data, net.flat_data) and np.shares_memory(p.grad, net.flat_grad)
    assert net.flat_data[:2].tolist() == [7, 8] and net.flat_grad[:2].tolist() == [5, 6]
    with pytest.raises(ValueError, match=r"\(3,\)"):
        net.scale.data = np.zeros(3)


def test_a_flat_gradient_is_assigned_first_and_added_to_later():
    layer = nn.Linear(3, 2).flatten()
    layer.flat_grad[...] = np.nan  # whatever was there does not matter
    for times in (1, 2):
        layer(np.ones((1, 3), np.float32)).sum().backward()
        assert layer.weight.grad.tolist() == [[times] * 3] * 2 and layer.bias.grad.tolist() == [times] * 2
    layer.zero_grad()
    assert layer.weight.grad is None
    (layer.weight * 3).sum().backward()
    assert layer.weight.grad.tolist() == [[3] * 3] * 2 and layer.bias.grad is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_blocks_of_its_own(copied):
    net = Net().flatten()
    twin = copied(net)
    assert twin.heads[1].weight is twin.heads[0].weight and twin.heads[0].weight is not net.heads[0].weight
    np.testing.assert_array_equal(twin.flat_data, net.flat_data)
    twin.flat_data[...] = 0
    assert net.scale.data.any() and not twin.scale.data.any()


# Layers


def test_layers_compute_what_functional_does():
    x = Tensor(x_of(2, 4, 6))
    layer = nn.Linear(6, 3)
    np.testing.assert_array_equal(layer(x).data, F.linear(x, layer.weight, layer.bias).data)
    np.testing.assert_array_equal(nn.RMSNorm(6)(x).data, F.rms_norm(x, 6).data)
    table = nn.Embedding(7, 3)
    np.testing.assert_array_equal(table(np.array([[6, 0]])).data, table.weight.data[[[6, 0]]])
    assert nn.LayerNorm(6).normalized_shape == (6,)  # torch's form
    assert nn.LayerNorm(6, bias=False).bias is None and nn.LayerNorm(6)(x).shape == (2, 4, 6)
    for norm, function in ((nn.LayerNorm, F.layer_norm), (nn.RMSNorm, F.rms_norm)):
        bare = norm((4, 6), elementwise_affine=False)
        assert not list(bare.parameters())
        np.testing.assert_array_equal(bare(x).data, function(x, (4, 6)).data)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: nn.Dropout(1.5), "Dropout: p is 1.5, it must be a number between 0 and 1"),
        (lambda: nn.Dropout("a"), "Dropout: p is 'a', it must"),
        (lambda: nn.Linear(-3, 2), "Linear: in_features is -3, it must be an integer of at least 0"),
        (lambda: nn.Linear(3, 2.0), "Linear: out_features is 2.0, it must"),
        (lambda: nn.Embedding(-1, 2), "Embedding: num_embeddings is -1, it must"),
        (lambda: nn.LayerNorm(-2), "LayerNorm: normalized_shape is -2, it must be an integer of at least 0"),
        (lambda: nn.RMSNorm((2, 1.5)), "RMSNorm: normalized_shape is 1.5, it must"),
        (lambda: nn.Sequential(nn.Linear(2, 2), F.relu), "Sequential: module 1 is a function, it must be"),
        (lambda: nn.ModuleList([None]), "ModuleList: module 0 is a NoneType, it must be a Module"),
        (lambda: Net().load_state_dict(None), "the weights are a NoneType, they must be a dict of arrays by"),
        (lambda: cllm.manual_seed(-1), "manual_seed: seed is -1, it must be an integer of at least 0"),
        (lambda: cllm.manual_seed(1.5), "manual_seed: seed is 1.5, it must"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_block_without_dropout_is_its_formula():
    config = cllm.GPTConfig(n_embd=8, n_head=2, activation="gelu", bias=False)
    block = nn.Block(config)
    x = Tensor(x_of(2, 5, 8))
    y = x + block.attn(block.ln_1(x))
    y = y + F.linear(F.gelu(F.linear(block.ln_2(y), block.mlp.c_fc.weight)), block.mlp.c_proj.weight)
    np.testing.assert_allclose(block(x).data, y.data, rtol=1e-5, atol=1e-6)
    q, k, v = F.linear(block.ln_1(x), block.attn.c_attn.weight).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, 8)
    np.testing.assert_allclose(
        block.attn(block.ln_1(x)).data, F.linear(z, block.attn.c_proj.weight).data, rtol=1e-5, atol=1e-6
    )


def test_a_module_without_forward_says_so():
    with pytest.raises(NotImplementedError, match="Module defines no forward"):
        nn.Module()(1)
