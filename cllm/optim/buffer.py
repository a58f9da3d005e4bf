"""The gradients of a step as one: summed over micro-batches, averaged, clipped, described."""

from functools import partial

import numpy as np

from cllm import kernels
from cllm.optim import gradients, spans
from cllm.parallel import TreeSum

__all__ = ["GradientBuffer"]


class GradientBuffer:
    """All gradients of a model.

    ::

        gradients = optim.GradientBuffer(model.named_parameters())
        for inputs, targets in micro_batches:
            model.loss(inputs, targets, reduction="sum").backward()
            gradients.accumulate()
        gradients.sum()
        gradients.average(n_targets)
        norm = gradients.clip_norm(1.0)

    Where parameters and gradients lie in one block, as a GPT's do, each of these walks over that block.

    Parameters
    ----------
    named_parameters : iterable of (str, Parameter)
    """

    def __init__(self, named_parameters):
        self.parameters = dict(named_parameters)
        self._idle = []  # blocks of partial sums that are not in use, each laid out as the gradients are
        # no reference to self: in such a circle weights stay till Python looks for them, 6.5 MB a char trial
        first = next(iter(self.parameters.values()), None)
        self._tree = TreeSum(partial(_add, self._idle, first), partial(_copy, self._idle))
        self._held = set()  # the names that had a gradient in one of the leaves

    @property
    def views(self):
        """The gradients by name, None where there is none: the parameters' own arrays."""
        return {name: parameter.grad for name, parameter in self.parameters.items()}

    @property
    def arrays(self):
        """The gradients that there are, neighbours joined to one array; to be written to only as a whole."""
        return spans.joined([grad for grad in self.views.values() if grad is not None])

    def accumulate(self):
        """Take the parameters' gradients as the next leaf of the sum; the parameters then have none.

        A parameter without a gradient counts as zeros.
        """
        leaf = []
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._held.add(name)
            leaf.append(_present(parameter))
        self._tree.push(leaf)
        self.zero()

    def sum(self, units=None):
        """Give the parameters the sum of all leaves as their gradients.

        Those that had none in any leaf have none.

        Parameters
        ----------
        units : cllm.parallel.Units, optional
            Sum up their leaves too: each has as many, and each gets the same sum.
        """
        total = self._tree.total()
        if units is not None and units.size > 1:
            units.sum(spans.joined(total))
            self._held = set().union(*units.gather(self._held))
        for parameter, part in zip(self.parameters.values(), total):
            parameter.grad = part
        for name in self.parameters.keys() - self._held:
            self.parameters[name].grad = None
        self._idle.append(total)
        self._held = set()

    def zero(self):
        """Let every parameter's `grad` be None."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def average(self, n):
        """Divide all gradients by `n`, in place, see `optim.average_grad_`."""
        gradients.average_grad_(self.parameters.values(), n)

    def clip_norm(self, max_norm):
        """Limit the norm of all gradients together; returns what it was, see `optim.clip_grad_norm_`."""
        return gradients.clip_grad_norm_(self.parameters.values(), max_norm)

    def clip_value(self, clip_value):
        """Limit each element, see `optim.clip_grad_value_`."""
        gradients.clip_grad_value_(self.parameters.values(), clip_value)

    def statistics(self):
        """Norm, largest magnitude, shares of zeros and non-finite, see `optim.gradient_statistics`."""
        return gradients.gradient_statistics(self.parameters.items())


def _present(parameter):
    """A parameter's gradient; where it has none, zeros in the gradient's place."""
    if parameter.grad is None:
        place, _ = parameter.grad_target()
        place[...] = 0
        parameter.grad_written(place)
    return parameter.grad


def _pairs(arrays, others):
    """Arrays and their partners, joined where both are neighbours."""
    for start, stop in spans.join(list(zip(arrays, others))):
        yield (kernels.span(arrays[start], arrays[stop - 1]), kernels.span(others[start], others[stop - 1]))


def _copy(idle, leaf):
    """A copy of the leaf, in an idle block if there is one."""
    sums = idle.pop() if idle else spans.zeros_like(leaf)
    for mine, theirs in _pairs(sums, leaf):
        np.copyto(mine, theirs)
    return sums


def _add(idle, first, earlier, later):
    """Add to the earlier sum; the later one's block is idle then, unless `first` has its gradient there."""
    for mine, theirs in _pairs(earlier, later):
        np.add(mine, theirs, out=mine)
    if later[0] is not first.grad:
        idle.append(later)
    return earlier
