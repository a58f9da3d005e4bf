"""The tape: what each operation of a Tensor leaves behind, and the way back over it.

It is compiled since each step records dozens of operations: `record` takes 0.14 us, where Python took 0.7.
"""
from operator import attrgetter

import numpy as np

cimport numpy as cnp
from cpython.object cimport PyObject, PyTypeObject

from cllm._core.pool cimport empty

cnp.import_array()

cdef extern from *:
    """
    static _Thread_local int cllm_records = 1;
    """
    int cllm_records        # whether this thread records operations

#: What a backward function returns for a parameter whose gradient it has put in place itself.
WRITTEN = object()

cdef object _written = WRITTEN
cdef object _number = attrgetter("number")
cdef tuple _nothing = ()
cdef type _tensor = None            # the class of results
cdef long long _count = 0           # nodes so far


cdef class Node:
    """One recorded operation. `inputs` holds, for each input, its Node, the leaf Tensor itself, or None.

    `make` is None, or a weak reference to the result's array and a function that computes it again, where that
    is cheaper than to keep it for the backward pass.
    """
    cdef public object backward, grad, inputs, make
    cdef public long long number
    cdef public bint owned


cdef class Fields:
    """What a Tensor holds."""
    cdef public object data, _grad
    cdef public Node _node
    cdef public bint requires_grad
    cdef object __weakref__


def results_are(type tensor):
    """Let `record` return objects of this class, which derives from Fields."""
    global _tensor
    _tensor = tensor


def is_grad_enabled():
    """Whether operations are recorded in this thread."""
    return cllm_records != 0


def set_grad_enabled(bint enabled):
    """Whether operations are recorded in this thread from now on."""
    global cllm_records
    cllm_records = enabled


def record(array, inputs, backward):
    """The Tensor of an operation's result.

    Parameters
    ----------
    array : ndarray
        The result; float32 or float64.
    inputs : tuple of Tensor
    backward : function
        From the result's gradient to a tuple with a gradient for each input: an array of the input's shape
        and dtype, None where there is none, or WRITTEN where it already is in place. It must not write
        to the gradient that it gets, and may return it. It should hold on to the arrays that it needs, not to
        Tensors.
    """
    global _count
    cdef Fields x, result
    cdef Node node
    cdef bint needed = False
    # without a call of __init__
    result = (<PyTypeObject*>_tensor).tp_new(_tensor, <PyObject*>_nothing, NULL)
    result.data = array if cnp.PyArray_CheckExact(array) else np.asarray(array)
    if cllm_records:
        for x in inputs:
            if x is None:
                raise TypeError("record: an input is None, all must be Tensors")
            needed = needed or x.requires_grad
    if needed:
        edges = []
        for x in inputs:
            edges.append(None if not x.requires_grad else x if x._node is None else x._node)
        node = Node.__new__(Node)
        node.inputs = edges
        node.backward = backward
        node.number = _count
        _count += 1
        result.requires_grad = True
        result._node = node
    return result


cdef list collect(Node root):
    """The nodes that lead to `root`, newest first."""
    cdef list stack = [root]
    cdef set seen = {root}
    cdef Node node
    while stack:
        node = stack.pop()
        if node.backward is None:
            raise RuntimeError(
                "backward: this graph was freed by an earlier backward(); run the forward pass again"
            )
        node.grad = None
        node.owned = False
        for edge in node.inputs:
            if type(edge) is Node and edge not in seen:
                seen.add(edge)
                stack.append(edge)
    return sorted(seen, key=_number, reverse=True)


def run(Node root not None, grad, bint retain_graph):
    """Propagate `grad` from `root` to the leaves and free each node after it ran, unless told to retain them.

    Gradients travel by reference: an operation may hand on the very array that it got, or a view of it. So
    the engine adds in place only to a sum that it has made itself (`owned`).
    """
    cdef Node node, below
    nodes = collect(root)
    root.grad = grad
    with np.errstate(all="ignore"):
        for node in nodes:
            if node.grad is not None:
                for edge, grad in zip(node.inputs, node.backward(node.grad)):
                    if grad is None or edge is None or grad is _written:
                        continue
                    if type(edge) is not Node:
                        edge._accumulate(grad)
                        continue
                    below = edge
                    if below.grad is None:
                        below.grad = grad
                    elif below.owned:
                        np.add(below.grad, grad, out=below.grad)
                    else:
                        below.grad = np.add(below.grad, grad, out=empty(grad.shape, grad.dtype))
                        below.owned = True
            node.grad = None
            if not retain_graph:
                node.backward = node.make = None
                node.inputs = ()
