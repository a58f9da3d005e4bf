"""GPT: its configuration, names and initial values, a module of the user's inside it, and generation."""

import dataclasses
import gc
import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm
from cllm import functional as F
from cllm import nn, rng
from cllm._core import pool
from cllm.errors import InputError

SMALL = cllm.GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8)


# As the interface shows it.
class GatedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.gate = nn.Parameter(np.zeros((config.n_head, 1, 1), np.float32))

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        s = (q @ k.transpose(-1, -2)) * (C // self.n_head) ** -0.5
        p = s.masked_fill(~np.tri(T, dtype=bool), -np.inf).softmax(dim=-1)
        return self.proj((p @ v * self.gate.sigmoid()).transpose(1, 2).reshape(B, T, C))


def batch(seed=0, B=3, T=8):
    tokens = np.random.default_rng(seed).integers(0, 11, (B, T + 1))
    return tokens[:, :-1], tokens[:, 1:]


def names_of(n_layer, tied=True):
    block = ["ln_1.weight", "ln_1.bias"]
    block += [f"attn.{name}.{kind}" for name in ("c_attn", "c_proj") for kind in ("weight", "bias")]
    block += ["ln_2.weight", "ln_2.bias"]
    block += [f"mlp.{name}.{kind}" for name in ("c_fc", "c_proj") for kind in ("weight", "bias")]
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    names += [f"transformer.h.{i}.{name}" for i in range(n_layer) for name in block]
    return [*names, "transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]


# Configuration


def test_the_default_config_is_the_interfaces():
    assert dataclasses.asdict(cllm.GPTConfig()) == {
        "vocab_size": 65, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0,
        "bias": True, "activation": "gelu_tanh", "d_ff": None, "n_kv_head": None, "position": "learned",
        "norm": "layer", "norm_position": "pre", "qk_norm": False, "tied": True, "attention": "fused",
        "init": "gpt2", "rotary_base": 10000.0,
    }  # fmt: skip
    assert type(cllm.GPTConfig(vocab_size=np.int64(7)).vocab_size) is int
    assert cllm.GPTConfig(n_kv_head=4, d_ff=100).d_ff == 100
    with pytest.raises(dataclasses.FrozenInstanceError):
        cllm.GPTConfig().n_layer = 3


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_embd": 10, "n_head": 4}, r"n_embd is 10, it must be divisible by n_head \(4\)"),
        ({"n_layer": 0}, "n_layer is 0, it must be an integer of at least 1"),
        ({"n_embd": 12.0}, "n_embd is 12.0, it must be an integer"),
        ({"n_head": True}, "n_head is True"),
        ({"block_size": "64"}, "block_size is '64'"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"d_ff": 0}, "d_ff is 0"),
        ({"dropout": 1.0}, r"dropout is 1.0, it must be a number in \[0, 1\)"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"dropout": "0.1"}, "dropout is '0.1'"),
        ({"bias": 1}, "bias is 1, it must be true or false"),
        (
            {"activation": "gelutanh"},
            r'activation is \'gelutanh\' \(did you mean "gelu_tanh"\?\), it must be "gelu_tanh"',
        ),
        ({"position": "rope"}, '"learned", "rotary", "sinusoidal", "alibi" or "none"$'),
        ({"position": 3}, "position is 3, it must be"),
        ({"norm": "batch"}, 'norm is \'batch\', it must be "layer" or "rms"$'),
        ({"norm_position": "Post"}, r'\(did you mean "post"\?\), it must be "pre" or "post"$'),
        ({"attention": []}, 'attention is .., it must be "fused" or "plain", or FILE.py:CLASS for a class'),
        ({"attention": "flash"}, "attention is 'flash', it must be"),
        ({"init": "xavier"}, r'init is \'xavier\' \(did you mean "xavier_normal"\?\), it must be "gpt2", '),
        ({"n_kv_head": 3}, r"n_kv_head is 3, it must divide n_head \(4\)"),
        ({"n_kv_head": 8}, r"n_kv_head is 8, it must divide n_head \(4\)"),
        ({"n_kv_head": 0}, "n_kv_head is 0"),
        ({"qk_norm": 1}, "qk_norm is 1, it must be true or false"),
        ({"rotary_base": 1}, "rotary_base is 1, it must be a number above 1"),
        ({"rotary_base": float("inf")}, "rotary_base is inf"),
        ({"position": "rotary", "n_embd": 20}, "and n_embd / n_head is 5, it must be even: channels"),
        ({"position": "sinusoidal", "n_embd": 15, "n_head": 3}, "and n_embd is 15, it must be even"),
    ],
)
def test_bad_configs_are_refused_in_a_sentence(fields, message):
    with pytest.raises(InputError, match=message):
        cllm.GPTConfig(**fields)


# Parameters


@pytest.mark.parametrize("tied", [True, False])
def test_state_dict_has_nanogpts_names_and_shapes(tied):
    model = cllm.GPT(dataclasses.replace(SMALL, tied=tied))
    state = model.state_dict()
    assert list(state) == names_of(2)
    shapes = {name: state[name].shape for name in names_of(2) if ".h.1." not in name}
    assert shapes["transformer.wte.weight"] == shapes["lm_head.weight"] == (11, 8)
    assert shapes["transformer.wpe.weight"] == (8, 8) and shapes["transformer.h.0.attn.c_attn.weight"] == (
        24,
        8,
    )
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (32, 8)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (8, 32)
    assert (state["lm_head.weight"] is state["transformer.wte.weight"]) == tied
    assert len(list(model.parameters())) == len(state) - tied


def test_parameters_are_views_of_one_block():
    model = cllm.GPT(SMALL)
    for p in model.parameters():
        assert (
            np.shares_memory(p.data, model.flat_data)
            and (p.data.ctypes.data - model.flat_data.ctypes.data) % 64 == 0
        )
    model.load_state_dict(cllm.GPT(SMALL, seed=1).state_dict())
    model.loss(*batch()).backward()
    for p in model.parameters():
        assert np.shares_memory(p.data, model.flat_data) and np.shares_memory(p.grad, model.flat_grad)
    assert np.linalg.norm(model.flat_grad) == pytest.approx(
        np.sqrt(sum((p.grad.astype(np.float64) ** 2).sum() for p in model.parameters())), rel=1e-6
    )


def test_initial_values_are_gpt2s():
    model = cllm.GPT(cllm.GPTConfig(vocab_size=300, block_size=64, n_layer=8, n_head=4, n_embd=64))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.data.std() == pytest.approx(0.02 / 4, rel=0.1)
        elif name.endswith(".bias"):
            assert not p.data.any()
        elif ".ln_" in name:
            assert (p.data == 1).all()
        else:
            assert p.data.std() == pytest.approx(0.02, rel=0.1) and abs(p.data.mean()) < 0.002


def test_initial_values_come_from_seed_and_name_alone():
    model = cllm.GPT(SMALL, seed=3).state_dict()
    cllm.manual_seed(99)
    again = cllm.GPT(SMALL, seed=3).state_dict()
    double = cllm.GPT(SMALL, seed=3, dtype=np.float64).state_dict()
    other = cllm.GPT(SMALL, seed=4).state_dict()
    gated = cllm.GPT(SMALL, attention=GatedAttention, seed=3).state_dict()
    untied = cllm.GPT(dataclasses.replace(SMALL, tied=False, bias=False), seed=3).state_dict()
    for name, array in model.items():
        np.testing.assert_array_equal(array, again[name])
        np.testing.assert_array_equal(array, double[name].astype(np.float32))
        if name in gated:
            np.testing.assert_array_equal(array, gated[name])
        if name in untied and name != "lm_head.weight":
            np.testing.assert_array_equal(array, untied[name])
    assert (model["transformer.wte.weight"] != other["transformer.wte.weight"]).all()
    assert (untied["lm_head.weight"] != untied["transformer.wte.weight"]).all()
    assert not gated["transformer.h.0.attn.gate"].any()
    assert gated["transformer.h.0.attn.qkv.weight"].std() == pytest.approx(0.02, rel=0.2)


def change_of(fields):
    """Names that a variant adds and leaves out, shapes that it changes, how many parameters more it has."""
    default, variant = cllm.GPT(SMALL), cllm.GPT(dataclasses.replace(SMALL, **fields))
    before, after = ({n: a.shape for n, a in model.state_dict().items()} for model in (default, variant))
    changed = {n: shape for n, shape in after.items() if n in before and before[n] != shape}
    count = sum(p.numel() for p in variant.parameters()) - sum(p.numel() for p in default.parameters())
    return sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys()), changed, count


@pytest.mark.parametrize("position", ["rotary", "sinusoidal", "alibi", "none"])
def test_only_learned_positions_have_parameters(position):
    assert change_of({"position": position}) == ([], ["transformer.wpe.weight"], {}, -8 * 8)


def test_variants_change_names_and_shapes_as_documented():
    blocks = [f"transformer.h.{i}" for i in (0, 1)]
    norms = [f"{block}.{name}" for block in blocks for name in ("ln_1", "ln_2")] + ["transformer.ln_f"]
    assert change_of({"norm": "rms"}) == ([], sorted(f"{name}.bias" for name in norms), {}, -5 * 8)
    last = ["transformer.ln_f.bias", "transformer.ln_f.weight"]
    assert change_of({"norm_position": "post"}) == ([], last, {}, -2 * 8)
    added = [f"{block}.attn.{name}_norm.weight" for block in blocks for name in "kq"]
    assert change_of({"qk_norm": True}) == (added, [], {}, 2 * 2 * 4)
    grouped = {f"{b}.attn.c_attn.{kind}": shape for b in blocks for kind, shape in
               (("weight", (16, 8)), ("bias", (16,)))}  # fmt: skip
    assert change_of({"n_kv_head": 1}) == ([], [], grouped, -2 * (8 * 8 + 8))
    gated = {}
    for block in blocks:  # 8/3 * 8 = 21.3, up to a multiple of 8: 24
        gated |= {f"{block}.mlp.c_fc.weight": (48, 8), f"{block}.mlp.c_fc.bias": (48,)}
        gated |= {f"{block}.mlp.c_proj.weight": (8, 24)}
    assert change_of({"activation": "swiglu"}) == ([], [], gated, 2 * (3 * 24 * 8 + 48 - 2 * 32 * 8 - 32))
    others = {"activation": "silu", "attention": "plain", "init": "orthogonal", "rotary_base": 9.0}
    assert change_of(others) == ([], [], {}, 0)


@pytest.mark.parametrize(
    "n_embd, width", [(128, 344), (64, 176), (384, 1024), (3, 8), (1, 8), (768, 2048), (100, 272)]
)
def test_the_width_of_swiglu(n_embd, width):
    config = cllm.GPTConfig(n_embd=n_embd, n_head=1, activation="swiglu")
    layer = nn.FeedForward(config)
    assert layer.c_proj.weight.shape == (n_embd, width) and layer.c_fc.weight.shape == (2 * width, n_embd)
    assert 0 <= width - 8 * n_embd / 3 < 8


@pytest.mark.parametrize("position", ["rotary", "sinusoidal", "alibi", "none"])
def test_weights_fit_another_block_size_unless_positions_are_learned(position):
    model = cllm.GPT(dataclasses.replace(SMALL, position=position), dtype=np.float64)
    longer = cllm.GPT(dataclasses.replace(SMALL, position=position, block_size=20), dtype=np.float64, seed=1)
    longer.load_state_dict(model.state_dict())
    tokens, _ = batch()
    np.testing.assert_allclose(longer(tokens).data, model(tokens).data, rtol=1e-10)
    assert longer(np.tile(tokens, 2)).shape == (3, 16, 11)


def test_loading_weights_of_another_shape_is_refused():
    state = cllm.GPT(SMALL).state_dict()
    with pytest.raises(InputError, match=r"unexpected transformer\.h\.1\.ln_1\.weight.* and 7 more"):
        cllm.GPT(dataclasses.replace(SMALL, n_layer=1)).load_state_dict(state)
    with pytest.raises(InputError, match=r"transformer.wpe.weight is \(8, 8\), it must be \(16, 8\)"):
        cllm.GPT(dataclasses.replace(SMALL, block_size=16)).load_state_dict(state)


# Computation


@pytest.mark.parametrize("attention", [None, GatedAttention])
@pytest.mark.parametrize("options", [{}, {"tied": False, "bias": False, "activation": "gelu", "d_ff": 12}])
def test_gradients_of_the_whole_model(attention, options):
    config = cllm.GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=2, n_embd=4, **options)
    model = cllm.GPT(config, attention=attention, dtype=np.float64, seed=1)
    for p in model.parameters():  # far from the symmetric start, where gradients are large
        p.data += np.random.default_rng(p.numel()).standard_normal(p.shape) * 0.3
    tokens, targets = np.array([[0, 3, 3], [1, 4, 0]]), np.array([[3, 3, -100], [4, 0, 2]])

    def loss(*parameters):
        return model.loss(tokens, targets, label_smoothing=0.1)

    assert cllm.gradcheck(loss, list(model.parameters()))


@pytest.mark.parametrize("attention", [None, GatedAttention])
def test_a_few_steps_train(attention):
    model = cllm.GPT(SMALL, attention=attention)
    tokens, targets = batch()
    losses = []
    for _ in range(60):
        loss = model.loss(tokens, targets)
        loss.backward()
        losses.append(loss.item())
        for p in model.parameters():
            p.data -= 0.5 * p.grad
        model.zero_grad()
    assert losses[0] == pytest.approx(np.log(11), abs=0.1) and losses[-1] < 0.6 * losses[0]


def test_gated_attention_with_open_gates_is_half_of_the_fused_one():
    model = cllm.GPT(SMALL, dtype=np.float64)
    gated = GatedAttention(SMALL)
    fused = model.transformer.h[0].attn
    state = {
        "gate": np.full((2, 1, 1), 100.0),  # sigmoid(100) = 1
        "qkv.weight": fused.c_attn.weight.data, "qkv.bias": fused.c_attn.bias.data,
        "proj.weight": fused.c_proj.weight.data, "proj.bias": fused.c_proj.bias.data,
    }  # fmt: skip
    gated.flatten(np.float64).load_state_dict(state)
    x = cllm.Tensor(np.random.default_rng(0).standard_normal((2, 8, 8)))
    np.testing.assert_allclose(gated(x).data, fused(x).data, rtol=1e-10, atol=1e-12)


def test_loss_is_the_cross_entropy_of_the_logits():
    model = cllm.GPT(SMALL, dtype=np.float64)
    tokens, targets = batch()
    targets = targets.copy()
    targets[0, :3] = -100
    logits = model(tokens).data
    assert logits.shape == (3, 8, 11)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = np.where(
        targets >= 0, -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0], 0
    )
    np.testing.assert_allclose(
        model.loss(tokens, targets, reduction="none").data, losses, rtol=1e-10, atol=1e-14
    )
    assert model.loss(tokens, targets, reduction="sum").item() == pytest.approx(losses.sum())
    assert model.loss(tokens, targets).item() == pytest.approx(losses.sum() / 21)
    other = model.loss(
        tokens, np.where(targets == -100, 10, targets), ignore_index=10, reduction="sum"
    ).item()
    assert other == pytest.approx(losses[targets != 10].sum())
    smoothed = 0.7 * losses + 0.3 * np.where(targets >= 0, -log_p.mean(-1), 0)
    assert model.loss(tokens, targets, label_smoothing=0.3).item() == pytest.approx(smoothed.sum() / 21)


def test_loss_with_class_weights_mask_and_z_loss():
    model = cllm.GPT(SMALL, dtype=np.float64)
    model.transformer.wte.weight.data *= 30
    tokens, targets = batch()
    mask = np.random.default_rng(1).random(targets.shape) > 0.4
    weight = np.linspace(0.2, 2, 11)
    logits = model(tokens).data
    lse = np.log(np.exp(logits).sum(-1))
    plain = lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    row_weight = np.where(mask, weight[targets], 0)
    losses = row_weight * (plain + 0.01 * lse**2)
    options = {"class_weight": weight, "mask": mask, "z_loss": 0.01}
    found = model.loss(tokens, targets, reduction="none", **options).data
    np.testing.assert_allclose(found, losses, rtol=1e-10, atol=1e-14)
    mean = model.loss(tokens, targets, **options)
    assert mean.item() == pytest.approx(losses.sum() / row_weight.sum(), rel=1e-12)
    masked = np.where(mask, targets, -100)
    assert model.loss(tokens, masked).item() == pytest.approx(model.loss(tokens, targets, mask=mask).item())
    mean.backward()
    assert np.linalg.norm(model.flat_grad) > 0.1
    model.zero_grad()
    nothing = model.loss(tokens, targets, mask=np.zeros_like(mask))
    nothing.backward()
    assert nothing.item() == 0 and not model.flat_grad.any()


@settings(max_examples=25)
@given(st.data(), st.booleans(), st.booleans())
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradients(data, masked, weighted):
    config = dataclasses.replace(SMALL, n_layer=1, position="rotary")
    model = cllm.GPT(config, dtype=np.float64)
    tokens, targets = batch(B=6)
    targets = np.where(np.random.default_rng(2).random(targets.shape) < 0.3, -100, targets)
    mask = np.random.default_rng(1).random(targets.shape) > 0.5 if masked else None
    options = {"class_weight": np.linspace(0.5, 2, 11) if weighted else None, "z_loss": 1e-3}
    whole = model.loss(tokens, targets, mask=mask, label_smoothing=0.1, **options)
    whole.backward()
    expected = model.flat_grad.copy()
    model.zero_grad()
    count = F.cross_entropy_count(targets, options["class_weight"], mask=mask)
    rows = data.draw(st.permutations(range(6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    total = 0.0
    for start, end in zip([0, *cuts], [*cuts, 6]):
        part = rows[start:end]
        if part:
            loss = model.loss(
                tokens[part], targets[part], label_smoothing=0.1, reduction="sum",
                mask=None if mask is None else mask[part], **options,
            ) / count  # fmt: skip
            loss.backward()
            total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-12)
    np.testing.assert_allclose(model.flat_grad, expected, rtol=1e-9, atol=1e-13)


def test_a_position_does_not_depend_on_later_ones():
    model = cllm.GPT(SMALL, dtype=np.float64)
    tokens, _ = batch()
    changed = tokens.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    a, b = model(tokens).data, model(changed).data
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert (a[:, 5:] != b[:, 5:]).any()
    np.testing.assert_allclose(model(tokens[:, :3]).data, a[:, :3], rtol=1e-10)


def test_dropout_is_where_gpt2_has_it():
    # After the embedding, on attention weights and on each block's two outputs; keys are drawn in that order.
    p = 0.4
    model = cllm.GPT(dataclasses.replace(SMALL, dropout=p), dtype=np.float64)
    tokens, _ = batch()
    rng.set_stream(1, 2, 3)
    found = model(tokens).data
    rng.set_stream(1, 2, 3)
    body = model.transformer
    x = F.dropout(body.wte(tokens) + body.wpe(np.arange(8)), p)
    for block in body.h:
        y = F.causal_self_attention(block.attn.c_attn(block.ln_1(x)), 2, dropout_p=p)
        x = x + F.dropout(block.attn.c_proj(y), p)
        y = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
        x = x + F.dropout(block.mlp.c_proj(y), p)
    np.testing.assert_allclose(found, model.lm_head(body.ln_f(x)).data, rtol=1e-10, atol=1e-12)
    plain = cllm.GPT(SMALL, dtype=np.float64)
    np.testing.assert_array_equal(model.eval()(tokens).data, plain(tokens).data)


def test_dropout_is_for_training_and_repeats_under_a_seed():
    model = cllm.GPT(dataclasses.replace(SMALL, dropout=0.2))
    tokens, targets = batch()

    def run():
        cllm.manual_seed(1)
        model.zero_grad()
        loss = model.loss(tokens, targets)
        loss.backward()
        return loss.item(), model.flat_grad.copy()

    before = cllm.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 1):
            cllm.set_num_threads(threads)
            results.append(run())
    finally:
        cllm.set_num_threads(before)
    for loss, grad in results[1:]:
        assert loss == results[0][0]
        np.testing.assert_array_equal(grad, results[0][1])
    assert model.loss(tokens, targets).item() != results[0][0]
    model.eval()
    assert model.loss(tokens, targets).item() == model.loss(tokens, targets).item()


def test_gradients_with_dropout():
    config = cllm.GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=2, n_embd=4, dropout=0.3)
    model = cllm.GPT(config, dtype=np.float64)

    def loss(*parameters):
        cllm.manual_seed(2)
        return model.loss(np.array([[0, 3, 1]]), np.array([[3, 1, 2]]))

    assert cllm.gradcheck(loss, list(model.parameters()))


def test_the_same_bits_at_any_thread_count():
    config = cllm.GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=2, n_embd=64)
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 65, (2, 8, 64))
    before = cllm.get_num_threads()
    grads = []
    try:
        for threads in (1, 2, 3):
            cllm.set_num_threads(threads)
            model = cllm.GPT(config)
            model.loss(tokens, targets).backward()
            grads.append(model.flat_grad.copy())
    finally:
        cllm.set_num_threads(before)
    np.testing.assert_array_equal(grads[0], grads[1])
    np.testing.assert_array_equal(grads[0], grads[2])


@pytest.mark.parametrize("attention", [None, GatedAttention])
def test_memory_does_not_grow_and_needs_no_garbage_collector(attention):
    config = cllm.GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=2, n_embd=64)
    model = cllm.GPT(config, attention=attention)
    tokens, targets = np.random.default_rng(0).integers(0, 65, (2, 8, 64))
    gc.collect()
    gc.disable()
    try:
        used = []
        for _ in range(12):
            model.zero_grad()
            model.loss(tokens, targets).backward()
            model(tokens)  # a graph without a backward pass dies as well
            used.append(pool.usage())
    finally:
        gc.enable()
    assert used[4:] == used[4:5] * 8


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        (np.zeros((1, 9), int), InputError, "9 positions, the model's block_size is 8"),
        (np.zeros(3, int), InputError, r"int64 \(3,\), they must be integers \(B, T\)"),
        (np.zeros((1, 3)), InputError, "float64"),
        (np.array([[0, 11]]), ValueError, "11"),
        (np.array([[-1, 0]]), ValueError, "-1"),
    ],
)
def test_bad_tokens(tokens, error, message):
    with pytest.raises(error, match=message):
        cllm.GPT(SMALL)(tokens)


def test_bad_arguments():
    with pytest.raises(TypeError, match="must be a GPTConfig"):
        cllm.GPT({"n_layer": 1})
    with pytest.raises(InputError, match="float16"):
        cllm.GPT(SMALL, dtype=np.float16)
    for seed in (-1, 1.5, True):
        with pytest.raises(InputError, match=f"^seed is {seed}, it must be an integer of at least 0$"):
            cllm.GPT(SMALL, seed=seed)
    with pytest.raises(InputError, match=r"^attention\(config\) gives a int, it must give a module: class"):
        cllm.GPT(SMALL, attention=lambda config: 3)
    with pytest.raises(InputError, match=r"^attention is a GatedAttention, it must be a class of modules"):
        cllm.GPT(SMALL, attention=GatedAttention(SMALL))


def test_attention_from_a_users_file(tmp_path, monkeypatch):
    source = inspect.getsource(GatedAttention)
    text = f"import numpy as np\nfrom cllm import nn\n\n\n{source}"
    (tmp_path / "my.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    named = cllm.GPT(dataclasses.replace(SMALL, attention="my.py:GatedAttention"), seed=3)
    direct = cllm.GPT(SMALL, attention=GatedAttention, seed=3)
    tokens, _ = batch()
    np.testing.assert_array_equal(named(tokens).data, direct(tokens).data)
    for name, message in [
        ("my.py:GatedAttention2", r'my.py has no GatedAttention2 \(did you mean "GatedAttention"\?\)'),
        ("other.py:A", "^model.attention names other.py, which cannot be read"),
        ("my.py:np", "^attention is a module, it must be a class of modules"),
    ]:
        with pytest.raises(InputError, match=message):
            cllm.GPT(dataclasses.replace(SMALL, attention=name))
