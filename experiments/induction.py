"""Repeating sequences of random tokens, which only attention that copies can foresee: induction heads.

Some random tokens, all different, come again and again; how many they are differs between sequences, so that
no position tells what comes next. The first time every next token is a guess; afterwards a head that finds
the place where the present token stood before, and copies what followed, knows it. That takes two layers: one
that tells each place what stood before it, and one that looks for it (Olsson et al. 2022).
    cllm sweep experiments/induction.toml
"""

import numpy as np

import cllm
from cllm import nn


def build(config, n_tokens=32, length=48, n_layer=2):
    """The task: attention without feed-forward layers and norms; what has come before counts."""
    shape = cllm.GPTConfig(**{**vars(config.model), "vocab_size": n_tokens, "block_size": length})
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
    """Sequences that repeat after an eighth to a half of their length; a pure function of the seed."""

    def __init__(self, n, n_tokens, length, seed):
        rng = np.random.default_rng(seed)
        self.period = rng.integers(length // 8, length // 2 + 1, size=(n, 1))
        order = rng.permuted(np.tile(np.arange(n_tokens), (n, 1)), axis=1)
        self.tokens = np.take_along_axis(order, np.arange(length + 1) % self.period, axis=1)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, indices):
        tokens = self.tokens[indices]
        mask = np.arange(tokens.shape[1] - 1) >= self.period[indices]  # the present token has come before
        return cllm.Batch(tokens[:, :-1], tokens[:, 1:], mask)


def accuracy(outputs, batch):
    """How many of the targets that count are the likeliest token, and how many count."""
    right = outputs.data.argmax(-1) == batch.targets
    return right[batch.mask].sum(), batch.mask.sum()
