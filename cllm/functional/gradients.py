"""Where fused operations put the gradients of parameters: straight to where they live.

The first one after `zero_grad` assigns, later ones add; nothing is copied or cleared.
"""

import weakref
from contextlib import contextmanager

import numpy as np

from cllm._core.pool import empty
from cllm.tensor import WRITTEN, Parameter

MADE_AGAIN_FROM = 1 << 20  # bytes


def targets_of(*tensors):
    """Where a kernel writes the gradients of these: an array each, or None to allocate; and whether it adds.

    Only a Parameter's gradient has a place of its own. A kernel adds to all of its targets or to none: where
    only some hold a gradient, the others start from zero.
    """
    arrays, adds = [], []
    for x in tensors:
        array, add = x.grad_target() if isinstance(x, Parameter) and x.requires_grad else (None, False)
        arrays.append(array)
        adds.append(add)
    if True not in adds:
        return arrays, False
    for i, x in enumerate(tensors):
        if not adds[i] and x is not None:
            if arrays[i] is None:
                arrays[i] = np.zeros(x.data.shape, x.data.dtype)
            else:
                arrays[i].fill(0)
    return arrays, True


def written(tensors, arrays):
    """What a backward function returns for these tensors once the kernel has filled the arrays."""
    results = []
    for x, array in zip(tensors, arrays):
        if x is None:
            continue
        if isinstance(x, Parameter) and x.requires_grad:
            x.grad_written(array)
            results.append(WRITTEN)
        else:
            results.append(array)
    return tuple(results)


@contextmanager
def claimed(x):
    """An array for the gradient of x, to be filled in this context; None where x holds one already."""
    if isinstance(x, Parameter):
        with x.claiming:
            yield x.claim_grad()
    else:
        yield None if x.is_leaf and x.grad is not None else empty(x.data.shape, x.data.dtype)


def taken(x, array):
    """The array from `claimed`, from now on only for `delivered`; None if others have taken it since."""
    return x.take_claim(array) if isinstance(x, Parameter) else array


def delivered(x, array):
    """What a backward function returns for x when the array from `taken` holds its gradient."""
    if not isinstance(x, Parameter) or not x.requires_grad:
        return array
    if x.grad is None:
        x.grad_written(array)
    else:  # the array is no place of x's, and another gradient came first
        np.add(x.grad, array, out=x.grad)
    return WRITTEN


def made_again(result, make):
    """`result`, whose array the operations that need it in their backward pass compute again by make().

    For large results of cheap operations: what waits for the backward pass is most of training's memory. A
    small one is kept, since the call takes longer than its pass (5 us of the 20 of a norm of `tiny`). The
    array is read-only from then on: what is written into it would not be what the backward pass sees.
    """
    if result._node is not None and result.data.nbytes >= MADE_AGAIN_FROM:
        result._node.make = weakref.ref(result.data), make
        result.data.flags.writeable = False
    return result


def kept(x):
    """A function that gives x's array in the backward pass."""
    data, make = x.data, None if x._node is None else x._node.make
    return make[1] if make is not None and make[0]() is data else lambda: data


def data_of(x):
    return None if x is None else x.data
