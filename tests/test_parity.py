"""CLLM against torch: the same weights, batches, schedule, clipping and AdamW give the same training.

The torch GPT is written out here, so that nothing of CLLM checks itself. Needs the `parity` extra.
"""

import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the parity extra (torch==2.13.0)")

import cllm  # noqa: E402
from cllm import data, optim, schedules  # noqa: E402

STEPS = 200
LR, MIN_LR, WARMUP_STEPS = 1e-3, 1e-4, 20
BETAS, EPS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.99), 1e-8, 0.1, 1.0


class Block(torch.nn.Module):
    """A pre-norm GPT-2 block under nanoGPT's names."""

    def __init__(self, n_head, n_embd):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = torch.nn.LayerNorm(n_embd)
        self.attn = torch.nn.ModuleDict(
            {"c_attn": torch.nn.Linear(n_embd, 3 * n_embd), "c_proj": torch.nn.Linear(n_embd, n_embd)}
        )
        self.ln_2 = torch.nn.LayerNorm(n_embd)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(n_embd, 4 * n_embd), "c_proj": torch.nn.Linear(4 * n_embd, n_embd)}
        )

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(C // self.n_head)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        hidden = torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden)


class TorchGPT(torch.nn.Module):
    """GPT-2: learned positions, tied head, tanh GELU, no dropout."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd):
        super().__init__()
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(vocab_size, n_embd),
                "wpe": torch.nn.Embedding(block_size, n_embd),
                "h": torch.nn.ModuleList([Block(n_head, n_embd) for _ in range(n_layer)]),
                "ln_f": torch.nn.LayerNorm(n_embd),
            }
        )

    def forward(self, tokens):
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.transformer["ln_f"](x) @ self.transformer["wte"].weight.T

    def loss(self, tokens, targets):
        logits = self(tokens)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def scheduled_lr(step):
    """Linear warm-up, then a cosine to MIN_LR at the last step: written here, not taken from CLLM."""
    if step < WARMUP_STEPS:
        return LR * (step + 1) / WARMUP_STEPS
    progress = (step - (WARMUP_STEPS - 1)) / (STEPS - 1 - (WARMUP_STEPS - 1))
    return MIN_LR + 0.5 * (LR - MIN_LR) * (1 + math.cos(math.pi * progress))


def train_torch(model, batches):
    """Losses of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    losses = []
    for step, (tokens, targets) in enumerate(batches):
        loss = model.loss(torch.from_numpy(tokens), torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.param_groups[0]["lr"] = scheduled_lr(step)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def train_cllm(model, batches):
    """Losses of each step."""
    optimizer = optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    losses = []
    for step, (tokens, targets) in enumerate(batches):
        loss = model.loss(tokens, targets)
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = schedules.cosine(
                step, lr=LR, warmup_steps=WARMUP_STEPS, max_steps=STEPS, min_lr=MIN_LR
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return np.array(losses)


def without_key_biases(state, n_embd):
    """The weights, less each key bias: softmax ignores it, so its gradient is rounding alone."""
    weights = {}
    for name, array in state.items():
        array = np.array(array.numpy() if isinstance(array, torch.Tensor) else array)
        if name.endswith("c_attn.bias"):
            array[n_embd : 2 * n_embd] = 0
        weights[name] = array
    return weights


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Real text: a few modules of the running interpreter."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = ("argparse.py", "ast.py", "tarfile.py", "typing.py", "zipfile.py", "inspect.py", "doctest.py")
    found = [library / name for name in modules if (library / name).is_file()]
    if not found:
        pytest.skip("this interpreter comes without its sources")
    path = tmp_path_factory.mktemp("parity") / "stdlib.txt"
    path.write_text("".join(module.read_text(encoding="utf-8") for module in found), encoding="utf-8")
    return data.load(path, tokenizer="char", val_fraction=0.1)


# Measured: losses differ by 2e-7 (float32) and 5e-16 (float64) at most, weights by 2e-6 and 5e-15.
# In float64 rounding is too small to hide a difference in the arithmetic; float32 is what people train with.
@pytest.mark.parametrize(
    ("dtype", "loss_rtol", "weight_atol"), [(np.float32, 1e-5, 1e-4), (np.float64, 1e-12, 1e-11)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_200_steps_agree_with_torch(text, dtype, loss_rtol, weight_atol, threads):
    shape = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 64}
    model = cllm.GPT(cllm.GPTConfig(vocab_size=text.vocab_size, **shape), seed=0, dtype=dtype)
    twin = TorchGPT(text.vocab_size, **shape).to(getattr(torch, np.dtype(dtype).name))
    state = {name: torch.from_numpy(np.array(array)) for name, array in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not missing
    assert set(unexpected) <= {"lm_head.weight"}  # tied: the same array as wte

    batches = [text.train.batch(step, batch_size=8, block_size=32, seed=1337) for step in range(STEPS)]
    threads_before = cllm.get_num_threads(), torch.get_num_threads()
    try:
        cllm.set_num_threads(threads)
        torch.set_num_threads(threads)
        ours, theirs = train_cllm(model, batches), train_torch(twin, batches)
    finally:
        cllm.set_num_threads(threads_before[0])
        torch.set_num_threads(threads_before[1])

    assert ours[-1] < 0.75 * ours[0]  # it learned: 200 steps of nothing would agree as well
    np.testing.assert_allclose(ours, theirs, rtol=loss_rtol, atol=0)
    trained = without_key_biases(model.state_dict(), shape["n_embd"])
    expected = without_key_biases(twin.state_dict(), shape["n_embd"])
    for name, array in expected.items():
        np.testing.assert_allclose(trained[name], array, rtol=0, atol=weight_atol, err_msg=name)
