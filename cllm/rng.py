"""Random numbers that depend on names and counters, never on what was drawn before or on threads.

Dropout draws one 64-bit key a call: a hash of (seed, step, micro-batch, call). The kernels hash the key with
each element's index, so the backward pass draws the same mask again. Initial values come from (seed, name).
"""

import hashlib
import random

import numpy as np

from cllm.errors import InputError

__all__ = [
    "get_state", "initial_generator", "manual_seed", "next_initial_generator", "next_key", "set_state",
    "set_stream",
]  # fmt: skip

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15

_seed = 0
_stream = 0  # hash of (seed, step, micro-batch)
_calls = 0  # keys drawn from the stream
_initialised = 0  # parameters drawn since manual_seed


def _mix(h):
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit integers."""
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
    return h ^ (h >> 31)


def manual_seed(seed):
    """Start the random numbers of dropout and of user modules' initial values anew.

    A Trainer seeds for itself; this is for modules and models used by hand.

    Parameters
    ----------
    seed : int
        At least 0.
    """
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError(f"manual_seed: seed is {seed!r}, it must be an integer of at least 0")
    global _seed, _initialised
    _seed = int(seed)
    _initialised = 0
    set_stream(_seed, 0, 0)


def set_stream(seed, step, micro_batch):
    """Start the dropout keys of a micro-batch: they depend on these numbers and the order of calls."""
    global _stream, _calls
    h = 0
    for value in (seed, step, micro_batch):
        h = _mix((h + int(value) + _GOLDEN) & _MASK)
    _stream, _calls = h, 0


def next_key():
    """The next dropout key, an int in [0, 2**64)."""
    global _calls
    _calls += 1
    return _mix((_stream + _calls * _GOLDEN) & _MASK)


def initial_generator(seed, name):
    """The generator of a parameter's initial values; it depends on seed and name alone."""
    digest = hashlib.sha256(f"{int(seed)}\0{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def next_initial_generator():
    """The generator of the next parameter made outside a GPT, in order since `manual_seed`."""
    global _initialised
    _initialised += 1
    return initial_generator(_seed, f"#{_initialised}")


def get_state():
    """All that random numbers depend on, as JSON values.

    CLLM's own counters, and the generators that `random` and `numpy.random` share with all code of the
    process, which a user's data may be drawn from.
    """
    version, words, gauss = random.getstate()
    shared = np.random.get_state(legacy=False)  # noqa: NPY002
    state = {
        "counters": [_seed, _stream, _calls, _initialised],
        "python": [version, np.array(words, "<u4").tobytes().hex(), gauss],
    }
    if shared["bit_generator"] == "MT19937":
        words = shared["state"]["key"].astype("<u4").tobytes().hex()
        state["numpy"] = [words, shared["state"]["pos"], shared["has_gauss"], shared["gauss"]]
    return state


def set_state(state):
    """Go on as after `get_state`."""
    global _seed, _stream, _calls, _initialised
    _seed, _stream, _calls, _initialised = state["counters"]
    version, words, gauss = state["python"]
    random.setstate((version, tuple(np.frombuffer(bytes.fromhex(words), "<u4").tolist()), gauss))
    if "numpy" in state:
        words, position, has_gauss, gauss = state["numpy"]
        key = np.frombuffer(bytes.fromhex(words), "<u4")
        np.random.set_state(("MT19937", key, position, has_gauss, gauss))  # noqa: NPY002


manual_seed(0)
