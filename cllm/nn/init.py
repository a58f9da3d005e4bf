"""Initial values under torch.nn.init's names, with its arguments and formulas.

Each function fills a Tensor or a float array in place and returns it. Numbers are drawn in float32 (for
`orthogonal_` in float64) whatever the dtype, so that a float64 tensor gets the values of a float32 one.
`generator` is a numpy.random.Generator; without one, the numbers follow from `cllm.manual_seed` and from how
many were asked for since.

The weight of a linear layer is (out, in): fan_in is its second dimension, fan_out its first.
"""

import math
import numbers

import numpy as np

from cllm import rng
from cllm.errors import InputError, nearest
from cllm.tensor import Tensor

__all__ = [
    "calculate_gain", "kaiming_normal_", "kaiming_uniform_", "normal_", "ones_", "orthogonal_", "uniform_",
    "xavier_normal_", "xavier_uniform_", "zeros_",
]  # fmt: skip

_GAINS = {
    "linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "leaky_relu": None, "selu": 0.75,
}  # fmt: skip


def zeros_(tensor):
    """Fill with 0."""
    _array("zeros_", tensor)[...] = 0
    return tensor


def ones_(tensor):
    """Fill with 1."""
    _array("ones_", tensor)[...] = 1
    return tensor


def normal_(tensor, mean=0.0, std=1.0, generator=None):
    """Fill with normal random numbers.

    Parameters
    ----------
    tensor : Tensor or float array
    mean, std : float
        std at least 0.
    generator : numpy.random.Generator, optional
    """
    array = _array("normal_", tensor)
    _check_number("normal_", mean=mean)
    _check_at_least_0("normal_", std=std)
    draws = _generator("normal_", generator).standard_normal(array.shape, np.float32)
    array[...] = draws * np.float32(std) + np.float32(mean)
    return tensor


def uniform_(tensor, a=0.0, b=1.0, generator=None):
    """Fill with uniform random numbers between a and b, a <= b."""
    array = _array("uniform_", tensor)
    _check_number("uniform_", a=a, b=b)
    if not a <= b:
        raise InputError(f"uniform_: a is {a}, it must be at most b ({b})")
    draws = _generator("uniform_", generator).random(array.shape, np.float32)
    array[...] = draws * np.float32(b - a) + np.float32(a)
    return tensor


def xavier_uniform_(tensor, gain=1.0, generator=None):
    """Fill from U(-b, b), b = gain sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010)."""
    bound = math.sqrt(3) * _xavier_std("xavier_uniform_", tensor, gain)
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor, gain=1.0, generator=None):
    """Fill from N(0, std^2), std = gain sqrt(2 / (fan_in + fan_out)) (Glorot & Bengio 2010)."""
    return normal_(tensor, 0.0, _xavier_std("xavier_normal_", tensor, gain), generator)


def kaiming_uniform_(tensor, a=0, mode="fan_in", nonlinearity="leaky_relu", generator=None):
    """Fill from U(-b, b), b = gain sqrt(3 / fan) (He et al. 2015).

    Parameters
    ----------
    tensor : Tensor or float array
        At least two dimensions.
    a : float
        Slope of the leaky ReLU behind the layer; 0 is ReLU's.
    mode : {"fan_in", "fan_out"}
        Which pass keeps its variance, forward or backward.
    nonlinearity : str
        As in `calculate_gain`.
    generator : numpy.random.Generator, optional
    """
    bound = math.sqrt(3) * _kaiming_std("kaiming_uniform_", tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(tensor, a=0, mode="fan_in", nonlinearity="leaky_relu", generator=None):
    """Fill from N(0, std^2), std = gain / sqrt(fan) (He et al. 2015); arguments as `kaiming_uniform_`."""
    return normal_(
        tensor, 0.0, _kaiming_std("kaiming_normal_", tensor, a, mode, nonlinearity), generator
    )


def orthogonal_(tensor, gain=1, generator=None):
    """Fill with gain times a random matrix of orthonormal rows or columns, whichever are fewer.

    The matrix is uniform over all of them (Saxe et al. 2014; Mezzadri 2007 for the signs). More than two
    dimensions count as rows times all the others.
    """
    array = _array("orthogonal_", tensor)
    _check_number("orthogonal_", gain=gain)
    if array.ndim < 2:
        raise InputError(f"orthogonal_: tensor is {array.shape}, it must have at least two dimensions")
    if not array.size:
        return tensor
    rows, columns = array.shape[0], array.size // array.shape[0]
    flat = _generator("orthogonal_", generator).standard_normal((rows, columns))
    q, r = np.linalg.qr(flat if rows >= columns else flat.T)
    q *= np.where(np.diagonal(r) < 0, -1, 1)
    array[...] = (gain * (q if rows >= columns else q.T)).reshape(array.shape)
    return tensor


def calculate_gain(nonlinearity, param=None):
    """The factor that keeps the variance through a nonlinearity, as torch's table has it.

    Parameters
    ----------
    nonlinearity : {"linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"}
    param : float, optional
        The slope of "leaky_relu", 0.01 unless given.
    """
    if nonlinearity not in _GAINS:
        raise InputError(
            f"calculate_gain: nonlinearity is {nonlinearity!r}{nearest(nonlinearity, _GAINS)}, "
            f"it must be one of {', '.join(_GAINS)}"
        )
    if nonlinearity != "leaky_relu":
        return _GAINS[nonlinearity]
    slope = 0.01 if param is None else param
    _check_number("calculate_gain", param=slope)
    return math.sqrt(2 / (1 + slope**2))


def _array(function, tensor):
    """The array to fill."""
    array = tensor.data if isinstance(tensor, Tensor) else tensor
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{function}: tensor is {kind}, it must be a Tensor or an array of floats")
    return array


def _generator(function, generator):
    if generator is None:
        return rng.next_initial_generator()
    if not isinstance(generator, np.random.Generator):
        kind = type(generator).__name__
        raise InputError(f"{function}: generator is {kind}, it must be a numpy.random.Generator")
    return generator


def _check_number(function, **values):
    for name, value in values.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise InputError(f"{function}: {name} is {value!r}, it must be a finite number")


def _check_at_least_0(function, **values):
    _check_number(function, **values)
    for name, value in values.items():
        if value < 0:
            raise InputError(f"{function}: {name} is {value}, it must be at least 0")


def _fans(function, tensor):
    shape = _array(function, tensor).shape
    if len(shape) < 2:
        raise InputError(f"{function}: tensor is {shape}, it must have at least two dimensions")
    rest = math.prod(shape[2:])
    return shape[1] * rest, shape[0] * rest


def _xavier_std(function, tensor, gain):
    _check_at_least_0(function, gain=gain)
    return gain * math.sqrt(2 / max(sum(_fans(function, tensor)), 1))


def _kaiming_std(function, tensor, a, mode, nonlinearity):
    _check_number(function, a=a)
    if mode not in ("fan_in", "fan_out"):
        raise InputError(f'{function}: mode is {mode!r}, it must be "fan_in" or "fan_out"')
    fan = _fans(function, tensor)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(max(fan, 1))
