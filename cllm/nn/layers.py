"""Layers with torch.nn's names, arguments and initial values."""

import math

import numpy as np

from cllm import functional as F
from cllm.errors import InputError
from cllm.functional.elementwise import check_probability
from cllm.nn.module import Module, initial
from cllm.tensor import Parameter


def _check_sizes(layer, **sizes):
    for name, n in sizes.items():
        if not isinstance(n, (int, np.integer)) or n < 0:
            raise InputError(f"{layer}: {name} is {n!r}, it must be an integer of at least 0")


def _normalized(layer, shape):
    """normalized_shape, an integer or several, as a tuple."""
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    for n in shape:
        _check_sizes(layer, normalized_shape=n)
    return shape


class Linear(Module):
    """y = x weight^T + bias.

    Starts uniform in +-1/sqrt(in_features), as torch does; inside a GPT as its config.init says.
    """

    def __init__(self, in_features, out_features, bias=True, dtype=np.float32):
        super().__init__()
        _check_sizes("Linear", in_features=in_features, out_features=out_features)
        bound = 1 / math.sqrt(in_features) if in_features else 0.0

        def draw(generator, shape):
            return generator.uniform(-bound, bound, shape)

        self.weight = initial((out_features, in_features), dtype, draw)
        self.bias = initial((out_features,), dtype, draw) if bias else None

    def forward(self, x):
        """(..., in_features) -> (..., out_features)"""
        return F.linear(x, self.weight, self.bias)


class Embedding(Module):
    """A table of rows. Starts normal with deviation 1, as torch does; inside a GPT with 0.02, as GPT-2."""

    holds_matrices = False

    def __init__(self, num_embeddings, embedding_dim, dtype=np.float32):
        super().__init__()
        _check_sizes("Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.weight = initial(
            (num_embeddings, embedding_dim), dtype, lambda generator, shape: generator.standard_normal(shape)
        )

    def forward(self, tokens):
        """Integer array (...) -> (..., embedding_dim)"""
        return F.embedding(tokens, self.weight)


class LayerNorm(Module):
    """Layer norm over the last dimensions, normalized_shape: an int or a tuple.

    Without elementwise_affine it has neither weight nor bias.
    """

    holds_matrices = False

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, dtype=np.float32):
        super().__init__()
        self.normalized_shape, self.eps = _normalized("LayerNorm", normalized_shape), eps
        self.weight = Parameter(np.ones(self.normalized_shape, dtype)) if elementwise_affine else None
        has_bias = elementwise_affine and bias
        self.bias = Parameter(np.zeros(self.normalized_shape, dtype)) if has_bias else None

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Root mean square norm over the last dimensions; eps None is the dtype's machine epsilon.

    Without elementwise_affine it has no weight.
    """

    holds_matrices = False

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True, dtype=np.float32):
        super().__init__()
        self.normalized_shape, self.eps = _normalized("RMSNorm", normalized_shape), eps
        self.weight = Parameter(np.ones(self.normalized_shape, dtype)) if elementwise_affine else None

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Dropout(Module):
    """In training, each element becomes 0 with probability p and the others are divided by 1 - p."""

    def __init__(self, p=0.5):
        super().__init__()
        check_probability("Dropout", p)
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p, self.training)

    def _describe(self):
        return f"p={self.p}"


class ModuleList(Module):
    """A list of modules, named 0, 1, ..."""

    def __init__(self, modules=()):
        super().__init__()
        for module in modules:
            self.append(module)

    def append(self, module):
        """Add a module at the end; returns self."""
        if not isinstance(module, Module):
            kind = type(self).__name__
            raise InputError(f"{kind}: module {len(self)} is a {type(module).__name__}, it must be a Module")
        setattr(self, str(len(self)), module)
        return self

    def __len__(self):
        return sum(name.isdigit() for name in vars(self))

    def __iter__(self):
        return (module for name, module in vars(self).items() if name.isdigit())

    def __getitem__(self, index):
        return list(self)[index]


class Sequential(ModuleList):
    """Modules that run one after another, named 0, 1, ..."""

    def __init__(self, *modules):
        super().__init__(modules)

    def forward(self, x):
        for module in self:
            x = module(x)
        return x
