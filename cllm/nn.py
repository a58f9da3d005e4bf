"""Modules: objects that hold parameters and compute with them.

A module's parameters and submodules are its plain attributes, in the order in which they were set; names are
dotted paths of attribute names. B = batch size, T = sequence length, C = channels.
"""

import math
from contextlib import contextmanager

import numpy as np

from cllm import functional as F
from cllm import rng
from cllm.errors import InputError, nearest
from cllm.tensor import Parameter

__all__ = [
    "Block", "Dropout", "Embedding", "FeedForward", "LayerNorm", "Linear", "Module", "ModuleList",
    "MultiHeadAttention", "Parameter", "RMSNorm", "Sequential", "without_initial_values",
]  # fmt: skip

_ALIGNMENT = 64  # bytes, a cache line and the widest vector
_GAP = 16  # each parameter starts at a multiple of this many elements: 64 bytes of float32

_draws = True


@contextmanager
def without_initial_values():
    """Modules made in this context start with zeros: who makes them gives them values."""
    global _draws
    before, _draws = _draws, False
    try:
        yield
    finally:
        _draws = before


def _initial(shape, dtype, draw):
    """A Parameter filled by draw(generator, shape), or zeros without initial values."""
    if not _draws:
        return Parameter(np.zeros(shape, dtype))
    return Parameter(draw(rng.next_initial_generator(), shape).astype(dtype))


class Module:
    """Base class: a subclass sets Parameters and Modules as attributes and defines forward()."""

    training = True
    flat_data = None  # the block of all parameters and that of their gradients, after flatten()
    flat_grad = None

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} defines no forward()")

    # Names -------------------------------------------------------------------------------------------

    def named_modules(self, prefix=""):
        """(name, module) of this module, whose name is `prefix`, and of all below it; each once."""
        seen = set()
        for name, module in self._walk(prefix):
            if id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def modules(self):
        """This module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def named_parameters(self, prefix=""):
        """(name, Parameter) of all parameters, each once, under its first name."""
        seen = set()
        for name, parameter in self._named(prefix):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def parameters(self):
        """All parameters, each once."""
        return (parameter for _, parameter in self.named_parameters())

    def _walk(self, prefix):
        yield prefix, self
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield from value._walk(f"{prefix}.{name}" if prefix else name)

    def _named(self, prefix=""):
        """All names of all parameters; a shared one comes under each of its names."""
        for path, module in self._walk(prefix):
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    yield f"{path}.{name}" if path else name, value

    # Modes -------------------------------------------------------------------------------------------

    def train(self, mode=True):
        """Set training mode, which dropout reads, here and below; returns self."""
        for module in self.modules():
            module.training = bool(mode)
        return self

    def eval(self):
        """Leave training mode; returns self."""
        return self.train(False)

    def zero_grad(self):
        """Let every parameter's `grad` be None."""
        for parameter in self.parameters():
            parameter.grad = None

    # State -------------------------------------------------------------------------------------------

    def state_dict(self):
        """Name -> array of every parameter: not copies but the arrays that training goes on changing."""
        return {name: parameter.data for name, parameter in self._named()}

    def load_state_dict(self, state):
        """Copy the arrays of a state_dict into the parameters; nothing changes unless all of it fits.

        Parameters
        ----------
        state : dict
            Name -> array of floats, cast to the parameter's dtype. A parameter with several names needs one
            of them.

        Raises
        ------
        InputError
            Names missing and unexpected keys, shapes that differ, and arrays that are not of floats.
        """
        names = {}
        for name, parameter in self._named():
            names.setdefault(id(parameter), (parameter, []))[1].append(name)
        missing = [aliases[0] for _, aliases in names.values() if not any(name in state for name in aliases)]
        known = [name for _, aliases in names.values() for name in aliases]
        unexpected = [name for name in state if name not in set(known)]
        problems = []
        if missing:
            problems.append(f"missing {_listed(missing)}")
        if unexpected:
            problems.append(f"unexpected {_listed(unexpected)}{nearest(unexpected[0], missing)}")
        copies = []
        for parameter, aliases in names.values():
            arrays = [(name, np.asarray(state[name])) for name in aliases if name in state]
            for name, array in arrays:
                if array.shape != parameter.shape:
                    problems.append(f"{name} is {array.shape}, it must be {parameter.shape}")
                elif not np.can_cast(array.dtype, np.complex128) or array.dtype.kind in "biuc":
                    problems.append(f"{name} is {array.dtype}, it must be of floats")
                elif not np.array_equal(array, arrays[0][1], equal_nan=True):
                    problems.append(f"{name} and {arrays[0][0]} differ, they must be the same weights")
            copies += [(parameter, array) for _, array in arrays[:1]]
        if problems:
            raise InputError(f"the weights do not fit this {type(self).__name__}: {'; '.join(problems)}")
        for parameter, array in copies:
            parameter.data[...] = array

    def flatten(self, dtype=None):
        """Move all parameters into one contiguous block, `flat_data`, and their gradients into `flat_grad`.

        Each parameter becomes a view that starts at a multiple of 16 elements; the gaps are zero. Optimizers,
        norms and checkpoints then work on few long arrays. A flat parameter's `grad` is always the same
        memory: after `zero_grad`, the next backward overwrites what an earlier `grad` showed.

        Parameters
        ----------
        dtype : float32 or float64, optional
            Of the block; the first parameter's unless given.

        Returns
        -------
        Module
            self
        """
        parameters = list(self.parameters())
        dtype = np.dtype(dtype or (parameters[0].dtype if parameters else np.float32))
        starts, end = [], 0
        for parameter in parameters:
            starts.append(end)
            end += -(-parameter.numel() // _GAP) * _GAP
        self.flat_data, self.flat_grad = _aligned(end, dtype), _aligned(end, dtype)
        for parameter, start in zip(parameters, starts):
            here = slice(start, start + parameter.numel())
            parameter.place(
                self.flat_data[here].reshape(parameter.shape), self.flat_grad[here].reshape(parameter.shape)
            )
        return self

    def __getstate__(self):
        attributes = {
            name: value for name, value in vars(self).items() if name not in ("flat_data", "flat_grad")
        }
        return attributes, self.flat_data is not None

    def __setstate__(self, state):
        attributes, is_flat = state
        vars(self).update(attributes)
        if is_flat:  # a copy gets blocks of its own
            self.flatten()

    def __repr__(self):
        lines = [
            f"  {name}: {value!r}".replace("\n", "\n  ")
            for name, value in vars(self).items()
            if isinstance(value, Module)
        ]
        head = f"{type(self).__name__}({self._describe()}"
        return "\n".join([head, *lines, ")"]) if lines else f"{head})"

    def _describe(self):
        return ", ".join(
            f"{name}={value.shape}" for name, value in vars(self).items() if isinstance(value, Parameter)
        )


def _listed(names):
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _aligned(n, dtype):
    """n zeros that start at a multiple of 64 bytes; views of them have a base of the same dtype."""
    raw = np.zeros(n + _ALIGNMENT // dtype.itemsize, dtype)
    start = -raw.ctypes.data % _ALIGNMENT // dtype.itemsize
    return raw[start : start + n]


# Layers ----------------------------------------------------------------------------------------------


class Linear(Module):
    """y = x weight^T + bias.

    Starts uniform in +-1/sqrt(in_features), as torch does; inside a GPT as GPT-2 does.
    """

    def __init__(self, in_features, out_features, bias=True, dtype=np.float32):
        super().__init__()
        bound = 1 / math.sqrt(in_features) if in_features else 0.0

        def draw(generator, shape):
            return generator.uniform(-bound, bound, shape)

        self.weight = _initial((out_features, in_features), dtype, draw)
        self.bias = _initial((out_features,), dtype, draw) if bias else None

    def forward(self, x):
        """(..., in_features) -> (..., out_features)"""
        return F.linear(x, self.weight, self.bias)


class Embedding(Module):
    """A table of rows. Starts normal with deviation 1, as torch does; inside a GPT as GPT-2 does."""

    def __init__(self, num_embeddings, embedding_dim, dtype=np.float32):
        super().__init__()
        self.weight = _initial(
            (num_embeddings, embedding_dim), dtype, lambda generator, shape: generator.standard_normal(shape)
        )

    def forward(self, tokens):
        """Integer array (...) -> (..., embedding_dim)"""
        return F.embedding(tokens, self.weight)


class LayerNorm(Module):
    """Layer norm over the last dimensions, normalized_shape: an int or a tuple."""

    def __init__(self, normalized_shape, eps=1e-5, bias=True, dtype=np.float32):
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps
        self.weight = Parameter(np.ones(normalized_shape, dtype))
        self.bias = Parameter(np.zeros(normalized_shape, dtype)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Root mean square norm over the last dimensions; eps None is the dtype's machine epsilon."""

    def __init__(self, normalized_shape, eps=None, dtype=np.float32):
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps
        self.weight = Parameter(np.ones(normalized_shape, dtype))

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Dropout(Module):
    """In training, each element becomes 0 with probability p and the others are divided by 1 - p."""

    def __init__(self, p=0.5):
        super().__init__()
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


# A GPT's parts ---------------------------------------------------------------------------------------


class MultiHeadAttention(Module):
    """Causal multi-head self-attention (Vaswani et al. 2017), fused.

    config : has n_embd, n_head, bias and dropout.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)"""
        p = self.dropout if self.training else 0.0
        y = self.c_proj(F.causal_self_attention(self.c_attn(x), self.n_head, p))
        return F.dropout(y, p) if p else y


class FeedForward(Module):
    """Linear, GELU, linear: one fused operation.

    config : has n_embd, d_ff (None: 4 n_embd), activation ("gelu" or "gelu_tanh"), bias and dropout.
    """

    def __init__(self, config):
        super().__init__()
        d_ff = config.d_ff or 4 * config.n_embd
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, d_ff, bias=config.bias)
        self.c_proj = Linear(d_ff, config.n_embd, bias=config.bias)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)"""
        fc, proj = self.c_fc, self.c_proj
        y = F.feed_forward(x, fc.weight, fc.bias, proj.weight, proj.bias, self.approximate)
        return F.dropout(y, self.dropout) if self.dropout and self.training else y


class Block(Module):
    """A pre-norm transformer block (Radford et al. 2019): x + attention(norm(x)), x + feed_forward(norm(x)).

    attention : a class built as attention(config), whose forward takes (B, T, C) to (B, T, C).
    """

    def __init__(self, config, attention=MultiHeadAttention):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = attention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = FeedForward(config)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)"""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))
