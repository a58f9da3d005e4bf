"""A classification task: which arm of a spiral a point belongs to.

build() gets the run's configuration and the keys of [task] as arguments; it returns the model, the data and
how to judge them. `cllm train` then does what it does for language models: schedule, clipping, records,
checkpoints.

    cllm train docs/examples/classification.toml
    cllm sweep docs/examples/classification_sweep.toml
"""

import numpy as np

import cllm
from cllm import functional as F
from cllm import metrics, nn


class Spirals:
    """Points in the plane: len() and indexing by an integer array are all that a dataset needs."""

    def __init__(self, n, n_arms, noise, seed):
        generator = np.random.default_rng(seed)
        self.arms = generator.integers(0, n_arms, n)
        radius = np.sqrt(generator.random(n))
        angle = 4 * radius + 2 * np.pi * self.arms / n_arms + noise * generator.standard_normal(n)
        self.points = (radius * np.stack([np.cos(angle), np.sin(angle)])).T.astype(np.float32)

    def __len__(self):
        return len(self.arms)

    def __getitem__(self, indices):
        return cllm.Batch(self.points[indices], self.arms[indices])


class Classifier(nn.Module):
    def __init__(self, width, n_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, n_classes))

    def forward(self, points):
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(points)))))


def cross_entropy(model, batch):
    """The sum of the losses, and what they are divided by: so micro-batches of any size add up."""
    return F.cross_entropy(model(batch.inputs), batch.targets, reduction="sum"), len(batch.targets)


def build(config, n_arms=3, noise=0.15, width=64, n_points=3000):
    return cllm.Task(
        model=Classifier(width, n_arms),
        train=Spirals(n_points, n_arms, noise, seed=0),
        evals={
            "val": Spirals(1000, n_arms, noise, seed=1),
            "noisy": Spirals(1000, n_arms, 2 * noise, seed=2),
        },
        loss=cross_entropy,
        metrics={"accuracy": metrics.Accuracy(), "f1": metrics.F1(average="macro")},
    )
