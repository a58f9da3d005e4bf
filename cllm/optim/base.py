"""What all optimizers share: checks of hyperparameters, groups, state, which arrays an update joins."""

import math
from collections.abc import Mapping
from numbers import Real
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from cllm import kernels
from cllm.errors import InputError, nearest
from cllm.optim import spans
from cllm.tensor import enable_grad

# Hyperparameters -------------------------------------------------------------------------------------


def is_number(value):
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def from_zero(value):
    return is_number(value) and 0 <= value < math.inf


def above_zero(value):
    return from_zero(value) and value > 0


def below_one(value):
    return is_number(value) and 0 <= value < 1


def finite(value):
    return is_number(value) and math.isfinite(value)


def listed(rule, n):
    """Whether a value is a tuple or list of n values that obey a rule."""
    return lambda value: isinstance(value, (tuple, list)) and len(value) == n and all(map(rule, value))


FROM_ZERO = (from_zero, "a finite number of at least 0")
FLAG = (lambda value: isinstance(value, (bool, np.bool_)), "True or False")


class Optimizer:
    """What all optimizers share, and what one of your own begins from.

    A subclass gives `state_names` and `update`, and its constructor calls this one::

        class SignSGD(optim.Optimizer):
            elementwise = True

            def __init__(self, params, lr=1e-4, momentum=0.9):
                super().__init__(params, {"lr": lr, "momentum": momentum})

            def state_names(self, group):
                return ("momentum_buffer",)

            def update(self, group, param, grad, step, state):
                mean = state["momentum_buffer"]
                mean += (1 - group["momentum"]) * (grad - mean)
                param -= group["lr"] * np.sign(mean)

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor), or of dict
        The parameters, or groups ``{"params": [...], "lr": ...}`` with hyperparameters of their own. Names
        become the group's "param_names".
    defaults : dict
        The hyperparameters by name, the constructor's arguments: what a group may set. A constructor's
        ``locals()`` will do: ``self``, ``params`` and ``__class__`` are left out.

    Attributes
    ----------
    param_groups : list of dict
        "params" and the hyperparameters of each group; changing a value takes effect at the next step.
    steps : list of int
        How often each parameter has been updated; a step without its gradient does not count.
    elementwise : bool
        Whether the rule treats each element by itself, and leaves one alone whose parameter, gradient and
        state are 0. Parameters that lie next to each other then come to `update` as one flat array: a
        whole GPT is one call. Unless a subclass says so, each comes by itself, in its own shape.
    rules : dict
        Name of a hyperparameter -> (test, what it must be, in words).
    """

    elementwise = False
    rules: ClassVar[dict] = {
        "lr": FROM_ZERO,
        "momentum": FROM_ZERO,
        "weight_decay": FROM_ZERO,
        "dampening": (finite, "a finite number"),
        "eps": (above_zero, "a finite number above 0"),
        "alpha": (below_one, "a number in [0, 1)"),
        "betas": (listed(below_one, 2), "two numbers in [0, 1)"),
        "nesterov": FLAG, "amsgrad": FLAG, "centered": FLAG, "maximize": FLAG,
    }  # fmt: skip

    def __init__(self, params, defaults):
        defaults = {
            name: value for name, value in defaults.items() if name not in ("self", "params", "__class__")
        }
        self.check(defaults)
        self.defaults = defaults
        self.param_groups = []
        self.steps = []
        self._state = []  # a dict for each parameter: name -> array
        self._made = []  # for each group, the names that its state was made for
        self._runs = None
        self._seen = None
        params = [params] if hasattr(params, "grad") else list(params)
        if not params:
            raise InputError("params is empty, an optimizer needs at least one parameter")
        for group in params if isinstance(params[0], dict) else [{"params": params}]:
            self.add_param_group(group)

    # What a subclass gives ---------------------------------------------------------------------------

    def state_names(self, group):
        """The names of the arrays that the rule keeps for a parameter of this group.

        Parameters
        ----------
        group : dict
            Of `param_groups`; an option such as amsgrad may ask for one array more.

        Returns
        -------
        tuple of str
        """
        return ()

    def new_state(self, group, param):
        """A parameter's arrays before its first update: zeros of its shape unless a subclass says otherwise.

        Parameters
        ----------
        group : dict
        param : ndarray

        Returns
        -------
        dict of str to ndarray
            For each of `state_names`, or those of them that suit a parameter of this shape. Arrays of other
            shapes than the parameter's are for rules that are not `elementwise`.
        """
        return {name: np.zeros(param.shape, param.dtype) for name in self.state_names(group)}

    def update(self, group, param, grad, step, state):
        """Make one step in place.

        Parameters
        ----------
        group : dict
            The hyperparameters.
        param : ndarray
            Contiguous; to be changed.
        grad : ndarray of the same shape
            Not to be changed.
        step : int
            Which update of this parameter it is, from 1.
        state : dict of str to ndarray
            To be changed.
        """
        name = type(self).__name__
        raise NotImplementedError(f"{name} must define update(group, param, grad, step, state)")

    @classmethod
    def check(cls, values):
        """Raise an InputError unless these hyperparameters, a dict, are allowed.

        Each must obey the rule of its name in `rules`, if there is one.
        """
        for name, value in values.items():
            rule = cls.rules.get(name)
            if rule is not None and not rule[0](value):
                raise InputError(f"{name} is {value!r}, it must be {rule[1]}")

    # What users call ---------------------------------------------------------------------------------

    def add_param_group(self, group):
        """Add parameters with hyperparameters of their own.

        Parameters
        ----------
        group : dict
            "params", and any of the constructor's arguments; the others take the constructor's values.

        Raises
        ------
        InputError
            For an unknown key, a value out of range, a parameter that is there already.
        """
        if not isinstance(group, dict) or "params" not in group:
            raise InputError(f'a parameter group must be a dict with the key "params", got {group!r}')
        for name in group:
            if name not in ("params", "name") and name not in self.defaults:
                hint = nearest(name, self.defaults)
                raise InputError(
                    f"{type(self).__name__} has no argument {name}{hint}, it takes {', '.join(self.defaults)}"
                )
        params = group["params"]
        params = [params] if hasattr(params, "grad") else list(params)
        names = [p[0] for p in params if isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str)]
        if names:
            if len(names) < len(params):
                raise InputError(
                    f"{len(names)} of {len(params)} parameters are named, it must be all or none"
                )
            group = {**group, "param_names": names}
            params = [p for _, p in params]
        known = {id(p) for p in self._params()}
        for i, p in enumerate(params):
            if not hasattr(p, "grad") or not isinstance(getattr(p, "data", None), np.ndarray):
                raise InputError(f"params[{i}] is a {type(p).__name__}, it must be a cllm.Tensor")
            if not getattr(p, "is_leaf", True):
                raise InputError(f"params[{i}] is the result of an operation, it must be a leaf")
            if id(p) in known:
                raise InputError(f"params[{i}] of shape {p.data.shape} is given twice")
            known.add(id(p))
        group = {**self.defaults, **group, "params": params}
        self.check(group)
        self.param_groups.append(group)
        self.steps = self.steps + [0] * len(params)
        self._state += [{} for _ in params]
        self._made.append(())

    def step(self, closure=None):
        """Update every parameter that has a gradient, in place.

        Parameters
        ----------
        closure : function, optional
            Called first, with gradients on: it computes the loss, calls its backward() and returns it.

        Returns
        -------
        What the closure returned, or None.

        Raises
        ------
        InputError
            For a hyperparameter out of range, such as a NaN learning rate; no parameter has changed then.
        """
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.check(group)
        self._plan()
        steps = self.steps
        for group, indices, names, arrays in self._runs:
            step = steps[indices[0]] + 1
            param, grad = arrays[:2]
            state = dict(zip(names, arrays[2:]))
            if param.flags.c_contiguous:
                self.update(group, param, grad, step, state)
            else:
                copy = np.ascontiguousarray(param)
                self.update(group, copy, grad, step, state)
                param[...] = copy
            for i in indices:
                steps[i] = step
        return loss

    def zero_grad(self, set_to_none=True):
        """Forget all gradients; the next backward pass assigns them anew.

        With set_to_none=False those that exist are filled with zeros: their parameters go on being updated.
        """
        for p in self._params():
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.fill(0)

    # State -------------------------------------------------------------------------------------------

    @property
    def state(self):
        """Parameter -> its "step" and arrays in `state_dict`, of those that were updated; read-only."""
        values = self.state_dict()["state"]
        return MappingProxyType({p: values[i] for i, _, p in self._numbered() if i in values})

    def state_dict(self):
        """The state by parameter number, and the groups, laid out as torch.optim's.

        Returns
        -------
        dict
            ``{"state": {0: {"step": 7, "exp_avg": array, ...}, ...}, "param_groups": [{"lr": ...,
            "params": [0, 1, ...]}, ...]}``. Numbers count through all groups; parameters that were never
            updated are missing. The arrays are the optimizer's own, not copies.
        """
        self._allocate()
        state = {
            i: {"step": self.steps[i], **self._state_of(i, self.state_names(group))}
            for i, group, _ in self._numbered()
            if self.steps[i]
        }
        groups, start = [], 0
        for group in self.param_groups:
            stop = start + len(group["params"])
            groups.append({**group, "params": list(range(start, stop))})
            start = stop
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict):
        """Take over what `state_dict` returned, for as many parameters of the same shapes; copies.

        Raises
        ------
        InputError
            When groups, parameters, shapes or dtypes differ; nothing has changed then.
        """
        for key in ("state", "param_groups"):
            if not isinstance(state_dict, Mapping) or key not in state_dict:
                raise InputError(f'the state has no "{key}", it must be what state_dict() returned')
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        given = [len(group["params"]) for group in groups]
        if sizes != given:
            raise InputError(f"the state is of groups of {given} parameters, the optimizer has {sizes}")
        groups = [
            {**mine, **group, "params": mine["params"]} for mine, group in zip(self.param_groups, groups)
        ]
        for group in groups:
            self.check(group)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        state = {i: state_dict["state"].get(number, {"step": 0}) for i, number in enumerate(numbers)}
        self._take(state, groups)

    def arrays(self):
        """All state as arrays, for a checkpoint.

        Returns
        -------
        dict of str to ndarray
            "step", the `steps` as int64, and for example "exp_avg.3" for parameter 3; the optimizer's own
            arrays, not copies.
        """
        arrays = {"step": np.array(self.steps, np.int64)}
        for i, values in self.state_dict()["state"].items():
            arrays.update({f"{name}.{i}": array for name, array in values.items() if name != "step"})
        return arrays

    def load_arrays(self, arrays):
        """Take over what `arrays` returned, for the same parameters; copies. Hyperparameters stay.

        Raises
        ------
        InputError
            When an array is missing, superfluous, or of another shape or dtype; nothing has changed then.
        """
        steps = np.asarray(arrays.get("step", ()))
        if steps.shape != (len(self.steps),):
            raise InputError(f"the state is of {steps.size} parameters, the optimizer has {len(self.steps)}")
        state = {i: {"step": int(step)} for i, step in enumerate(steps)}
        for key, array in arrays.items():
            name, _, number = key.rpartition(".")
            if key == "step":
                continue
            if not number.isdecimal() or int(number) not in state:
                raise InputError(f"the state has an array {key}, which belongs to no parameter")
            state[int(number)][name] = array
        self._take(state, self.param_groups)

    def _params(self):
        return [p for group in self.param_groups for p in group["params"]]

    def _numbered(self, groups=None):
        """(number, group, parameter) of each parameter."""
        i = 0
        for group in self.param_groups if groups is None else groups:
            for p in group["params"]:
                yield i, group, p
                i += 1

    def _state_of(self, i, names):
        """The arrays of these names that parameter i has: an option that was switched off leaves its own."""
        return {name: self._state[i][name] for name in names if name in self._state[i]}

    def _take(self, state, groups):
        """Replace groups and all state by copies of these, after checks."""
        for i, group, p in self._numbered(groups):
            values = state[i]
            expected = self.new_state(group, p.data) if values["step"] else {}
            names = [name for name in values if name != "step"]
            if sorted(names) != sorted(expected):
                raise InputError(
                    f"the state of parameter {i} is {', '.join(names) or 'empty'}, "
                    f"{type(self).__name__} needs {', '.join(expected) or 'none'}"
                )
            for name, like in expected.items():
                array = np.asarray(values[name])
                if array.shape != like.shape or array.dtype != like.dtype:
                    raise InputError(
                        f"{name}.{i} is {array.dtype} of shape {array.shape}, "
                        f"it must be {like.dtype} of shape {like.shape}"
                    )
        for mine, group in zip(self.param_groups, groups):
            mine.update(group)
        self.steps = [int(values["step"]) for values in state.values()]
        self._state = [{} for _ in self.steps]
        self._made = [() for _ in self.param_groups]
        self._allocate()
        for i, values in state.items():
            for name, array in values.items():
                if name != "step":
                    self._state[i][name][...] = array

    # Joining -----------------------------------------------------------------------------------------

    def _allocate(self):
        """Make the state arrays that the groups' hyperparameters ask for and that are not there yet."""
        stop = 0
        for number, group in enumerate(self.param_groups):
            start, stop = stop, stop + len(group["params"])
            names = self.state_names(group)
            if self._made[number] == names:
                continue
            self._made[number] = names
            data = [p.data for p in group["params"]]
            fresh = [self.new_state(group, array) for array in data]
            for name in names:
                # Where all are as their parameters are, in blocks laid out as the parameters' blocks.
                if all(name in new and new[name].shape == array.shape for new, array in zip(fresh, data)):
                    for new, array in zip(fresh, spans.zeros_like(data)):
                        array[...] = new[name]
                        new[name] = array
            for mine, new in zip(self._state[start:stop], fresh):
                for name in names:
                    if name in new:
                        mine.setdefault(name, new[name])

    def _plan(self):
        """Bring `_runs` up to date: for each kernel call, the group, parameter numbers and joined arrays."""
        seen = [(p.data, p.grad) for p in self._params()]
        names = [self.state_names(group) for group in self.param_groups]
        if self._seen is not None:
            arrays, steps, before = self._seen
            if steps is self.steps and names == before and len(arrays) == len(seen):
                for (data, grad), (old_data, old_grad) in zip(arrays, seen):
                    if data is not old_data or grad is not old_grad:
                        break
                else:
                    return
        self._allocate()
        self._runs = []
        start = 0
        for group, group_names in zip(self.param_groups, names):
            stop = start + len(group["params"])
            chain = []
            for i in range(start, stop):
                # Parameters that were updated equally often, next to each other, can go into one call.
                if chain and (seen[i][1] is None or self.steps[i] != self.steps[chain[-1]]):
                    self._add_runs(group, group_names, chain, seen)
                    chain = []
                if seen[i][1] is not None:
                    chain.append(i)
            self._add_runs(group, group_names, chain, seen)
            start = stop
        self._seen = (seen, self.steps, names)

    def _add_runs(self, group, names, indices, seen):
        states = [self._state_of(i, names) for i in indices]
        columns = [(*seen[i], *state.values()) for i, state in zip(indices, states)]
        alone = ((i, i + 1) for i in range(len(columns)))
        for start, stop in spans.join(columns) if self._joins(group) else alone:
            arrays = [kernels.span(*pair) for pair in zip(columns[start], columns[stop - 1])]
            self._runs.append((group, indices[start:stop], tuple(states[start]), arrays))

    def _joins(self, group):
        """Whether this group's neighbours may come to `update` as one flat array."""
        return self.elementwise
