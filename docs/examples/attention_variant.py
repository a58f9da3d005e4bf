"""An attention variant as array code: each head's output passes through a learned gate.

An attention module maps (B, T, C) to (B, T, C) and is built with the model's configuration. Everything here
is ordinary Tensor arithmetic, so the gradients come from the tape; there is no backward pass to write.

    cllm train --model.attention docs/examples/attention_variant.py:GatedAttention --train.max-steps 200
"""

import numpy as np

import cllm
from cllm import nn


class GatedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.gate = nn.Parameter(np.zeros((config.n_head, 1, 1), np.float32))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).reshape(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * (C // self.n_head) ** -0.5
        weights = scores.masked_fill(~np.tri(T, dtype=bool), -np.inf).softmax(dim=-1)
        self.observe("weights", weights)  # for cllm.capture; does nothing otherwise
        y = weights @ v * self.gate.sigmoid()
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


if __name__ == "__main__":
    config = cllm.GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32)
    model = cllm.GPT(config, attention=GatedAttention, seed=0)
    tokens = np.random.default_rng(0).integers(0, 65, (4, 17))
    with cllm.capture(model, "h.*.attn.weights") as seen:
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    print(f"loss {loss.item():.4f}; the first layer's gates have gradients", end=" ")
    print(np.round(model.transformer.h[0].attn.gate.grad.ravel(), 6))
    for name, weights in seen.items():
        print(name, weights.shape, "rows sum to one:", np.allclose(weights.sum(-1), 1, atol=1e-5))
