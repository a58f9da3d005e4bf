"""Module: an object that holds parameters and submodules as attributes and computes with them."""

from collections import namedtuple
from collections.abc import Mapping
from contextlib import contextmanager

import numpy as np

from cllm import rng
from cllm.errors import InputError, nearest
from cllm.tensor import Parameter

_ALIGNMENT = 64  # bytes, a cache line and the widest vector
_GAP = 16  # each parameter starts at a multiple of this many elements: 64 bytes of float32

# A module's own bookkeeping, which copies and pickles of it do without.
_BOOKKEEPING = ("flat_data", "flat_grad", "_captures")

IncompatibleKeys = namedtuple("IncompatibleKeys", "missing_keys unexpected_keys")

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


def initial(shape, dtype, draw):
    """A Parameter filled by draw(generator, shape), or zeros without initial values."""
    if not _draws:
        return Parameter(np.zeros(shape, dtype))
    return Parameter(draw(rng.next_initial_generator(), shape).astype(dtype))


class Module:
    """Base class: a subclass sets Parameters and Modules as attributes and defines forward()."""

    training = True
    # Whether its parameters of two dimensions are matrices, to Muon and to decay = "matrices": those of
    # embeddings and norms are not. A class of yours may say so, too.
    holds_matrices = True
    flat_data = None  # the block of all parameters and that of their gradients, after flatten()
    flat_grad = None
    _captures = ()  # those of `cllm.capture` that are open on this module

    def __call__(self, *args, **kwargs):
        output = self.forward(*args, **kwargs)
        for capture in self._captures:
            capture.output(self, output, args)
        return output

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

    def zero_grad(self, set_to_none=True):
        """Let every parameter's `grad` be None; with set_to_none=False, fill those that exist with zeros."""
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.fill(0)

    # Looking inside ----------------------------------------------------------------------------------

    def observe(self, name, value):
        """Offer a Tensor or array of this forward pass to `cllm.capture`, as this module's `name`.

        It costs nothing unless somebody captures. What is expensive to have is computed only when
        ``self.observed(name)`` says so.
        """
        for capture in self._captures:
            capture.offer(self, name, value)

    def observed(self, name=None):
        """Whether somebody captures what this module offers under `name`; None means its output."""
        wanted = [capture.wants(self, name) for capture in self._captures]  # each takes note of the name
        return any(wanted)

    # State -------------------------------------------------------------------------------------------

    def state_dict(self):
        """Name -> array of every parameter: not copies but the arrays that training goes on changing."""
        return {name: parameter.data for name, parameter in self._named()}

    def load_state_dict(self, state_dict, strict=True):
        """Copy the arrays of a state_dict into the parameters; nothing changes unless all of it fits.

        Parameters
        ----------
        state_dict : dict
            Name -> array of floats, cast to the parameter's dtype. A parameter with several names needs one
            of them.
        strict : bool
            False passes over names that are missing or unexpected.

        Returns
        -------
        IncompatibleKeys
            The named tuple (missing_keys, unexpected_keys) of lists of names.

        Raises
        ------
        InputError
            Names missing and unexpected keys, shapes that differ, and arrays that are not of floats.
        """
        if not isinstance(state_dict, Mapping):
            kind = type(state_dict).__name__
            raise InputError(f"the weights are a {kind}, they must be a dict of arrays by name")
        names = {}
        for name, parameter in self._named():
            names.setdefault(id(parameter), (parameter, []))[1].append(name)
        missing = [
            aliases[0] for _, aliases in names.values() if not any(name in state_dict for name in aliases)
        ]
        known = [name for _, aliases in names.values() for name in aliases]
        unexpected = [name for name in state_dict if name not in set(known)]
        problems = []
        if strict and missing:
            problems.append(f"missing {_listed(missing)}")
        if strict and unexpected:
            problems.append(f"unexpected {_listed(unexpected)}{nearest(unexpected[0], missing)}")
        copies = []
        for parameter, aliases in names.values():
            arrays = [(name, np.asarray(state_dict[name])) for name in aliases if name in state_dict]
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
        return IncompatibleKeys(missing, unexpected)

    def flatten(self, dtype=None):
        """Move all parameters into one contiguous block, `flat_data`, and their gradients into `flat_grad`.

        Each parameter becomes a view that starts at a multiple of 16 elements; the gaps are zero. Optimizers,
        norms and checkpoints then work on few long arrays. A flat parameter's `grad` is always the same
        memory: after `zero_grad`, the next loss or backward overwrites what an earlier `grad` showed.

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
        attributes = {name: value for name, value in vars(self).items() if name not in _BOOKKEEPING}
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
