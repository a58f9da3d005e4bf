"""Uses the compiled gated attention: against NumPy, with finite differences, and inside a GPT.

    cd docs/examples/own_kernel
    python setup.py build_ext --inplace
    python use.py
"""

import gated_attention  # compiled by setup.py
import numpy as np

import cllm
from cllm import nn
from cllm.tensor import record


def attend(q, k, v, gate):
    """Gated causal attention on the tape.  q, k, v : Tensor (B, H, T, D), gate : Tensor (H,)."""
    arrays = [np.ascontiguousarray(x.data) for x in (q, k, v, gate)]
    out, attended, lse = gated_attention.forward(*arrays, cllm.get_num_threads())

    def backward(grad):
        grad = np.ascontiguousarray(grad)
        return gated_attention.backward(grad, *arrays, attended, lse, cllm.get_num_threads())

    return record(out, (q, k, v, gate), backward)


class GatedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.gate = nn.Parameter(np.zeros(config.n_head, np.float32))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).reshape(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        return self.c_proj(attend(q, k, v, self.gate).transpose(1, 2).reshape(B, T, C))


def in_numpy(q, k, v, gate):
    T, D = q.shape[2:]
    scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(-1, -2) / np.sqrt(D), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v / (1 + np.exp(-gate[:, None, None]))


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((2, 3, 7, 4)) for _ in range(3)] + [rng.standard_normal(3)]
    for dtype in (np.float32, np.float64):
        out, *_ = gated_attention.forward(*(x.astype(dtype) for x in inputs), 2)
        print(f"{dtype.__name__}: off by {np.abs(out - in_numpy(*inputs)).max():.0e}")
    print("gradcheck:", cllm.gradcheck(attend, tuple(cllm.Tensor(x, requires_grad=True) for x in inputs)))

    config = cllm.GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32)
    model = cllm.GPT(config, attention=GatedAttention, seed=0)
    tokens = rng.integers(0, 65, (4, 17))
    optimizer = cllm.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(21):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
