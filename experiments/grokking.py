"""Modular addition, a + b mod p: a model first learns the pairs that it sees by heart, and later the rule.

Question (Power et al. 2022): how long after the pairs that were seen do those that were not come out right?
    cllm train experiments/grokking.toml
    cllm sweep experiments/grokking_seeds.toml
"""

from dataclasses import replace

import numpy as np

import cllm
from cllm import nn
from cllm.data import Examples


def build(config, p=53, train_share=0.5, norms=True):
    """The task: each example is the tokens a, b, "=" and the target (a + b) mod p after the last of them.

    With norms the model is a GPT; without, the one layer that Nanda et al. (2023) took apart.
    """
    if p < 2:
        raise cllm.InputError(f"task.p is {p}, it must be at least 2")
    if not 0 < train_share < 1:
        raise cllm.InputError(f"task.train_share is {train_share:g}, it must lie between 0 and 1")
    a, b = (part.ravel() for part in np.divmod(np.arange(p * p), p))
    inputs = np.stack([a, b, np.full(p * p, p)], axis=1)
    targets = np.zeros((p * p, 3), np.int64)
    targets[:, -1] = (a + b) % p
    mask = np.zeros(targets.shape, bool)
    mask[:, -1] = True

    order = np.random.default_rng(config.train.seed).permutation(p * p)
    seen, unseen = np.split(order, [round(train_share * p * p)])
    if not len(seen) or not len(unseen):
        raise cllm.InputError(f"task.train_share is {train_share:g}, which leaves one side empty")
    everything = Examples(inputs, targets, mask)
    shape = replace(config.model, vocab_size=p + 1, block_size=3)
    return cllm.Task(
        model=cllm.GPT(shape, seed=config.train.seed) if norms else OneLayer(shape),
        train=Picked(everything, seen),
        evals={"val": Picked(everything, unseen), "seen": Picked(everything, seen)},
        metrics={"accuracy": accuracy},
    )


class OneLayer(nn.Module):
    """Attention, then a feed-forward layer, each added to what it read; no norms; untied.

    Weights start normal with a standard deviation of 1 / sqrt(C), those of the head 1 / sqrt(V), as in the
    model of Nanda et al. (2023). With torch's start of linear layers the rule had not come by step 3000.
    """

    def __init__(self, config):
        super().__init__()
        C, V = config.n_embd, config.vocab_size
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(config.block_size, C)
        self.attn, self.mlp = nn.MultiHeadAttention(config), nn.FeedForward(config)
        self.head = nn.Linear(C, V, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, std=(V if p is self.head.weight else C) ** -0.5)

    def forward(self, tokens):
        """(B, T) -> (B, T, V)"""
        x = self.wte(tokens) + self.wpe(np.arange(tokens.shape[1]))
        x = x + self.attn(x)
        return self.head(x + self.mlp(x))


class Picked:
    """Some examples of a dataset."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, indices):
        return self.dataset[self.indices[indices]]


def accuracy(outputs, batch):
    """How many of the targets that count are the likeliest token, and how many count."""
    right = outputs.data.argmax(-1) == batch.targets
    return right[batch.mask].sum(), batch.mask.sum()
