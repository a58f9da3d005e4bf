"""Repeated sequences of random tokens, which only attention that copies can foresee: induction heads.

A sequence of random tokens comes twice. In the first half every next token is a guess; in the second, a head
that finds the place where the present token stood before, and copies what followed, knows it. That takes
two layers: one that tells each place what stood before it, and one that looks for it (Olsson et al. 2022).
    cllm sweep experiments/induction.toml
"""

import numpy as np

import cllm
from cllm import nn


def build(config, n_tokens=32, length=24, n_layer=2):
    """The task: attention without feed-forward layers and norms; the second half of a sequence counts."""
    shape = cllm.GPTConfig(**{**vars(config.model), "vocab_size": n_tokens, "block_size": 2 * length})
    return cllm.Task(
        model=AttentionOnly(shape, n_layer),
        train=Repeats(20_000, n_tokens, length, seed=config.train.seed),
        evals={"val": Repeats(500, n_tokens, length, seed=config.train.seed + 10**6)},
        metrics={"accuracy": accuracy},
    )


class AttentionOnly(nn.Module):
    """Layers of attention, each added to what it read; positions are learned."""

    def __init__(self, config, n_layer):
        super().__init__()
        C = config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.block_size, C)
        for table in (self.wte, self.wpe):
            table.weight.data[...] *= C**-0.5
        self.h = nn.ModuleList([nn.MultiHeadAttention(config) for _ in range(n_layer)])
        self.head = nn.Linear(C, config.vocab_size, bias=False)

    def forward(self, tokens):
        """(B, T) -> (B, T, V)"""
        x = self.wte(tokens) + self.wpe(np.arange(tokens.shape[1]))
        for layer in self.h:
            x = x + layer(x)
        return self.head(x)


class Repeats:
    """Sequences of random tokens, each twice; example i is a pure function of (seed, i)."""

    def __init__(self, n, n_tokens, length, seed):
        self.half = np.random.default_rng(seed).integers(n_tokens, size=(n, length))

    def __len__(self):
        return len(self.half)

    def __getitem__(self, indices):
        half = self.half[indices]
        twice = np.concatenate([half, half], axis=1)
        inputs, targets = twice[:, :-1], twice[:, 1:]
        mask = np.zeros(targets.shape, bool)
        mask[:, half.shape[1] :] = True  # the first repeated token's successor, and all after it
        return cllm.Batch(inputs, targets, mask)


def accuracy(outputs, batch):
    """How many of the targets that count are the likeliest token, and how many count."""
    right = outputs.data.argmax(-1) == batch.targets
    return right[batch.mask].sum(), batch.mask.sum()
