"""SGD, Adam, AdamW and RMSprop, with torch.optim's constructors and defaults; gradient clipping.

Parameters that lie next to each other in a model's block, and whose gradients and state do so too, are
updated as one array: a whole GPT is one kernel call, a pass over memory. Loose parameters work as well. The
state is laid out as the parameters are, with one view for each of them. Which arrays join is found out when
a parameter's `data` or `grad` is another array than in the last step, and remembered until then.
"""

import inspect
import math
from dataclasses import dataclass, field
from numbers import Real

import numpy as np

from cllm import kernels
from cllm.errors import InputError, nearest

__all__ = [
    "BY_NAME", "SGD", "Adam", "AdamW", "OptimConfig", "Optimizer", "RMSprop", "build", "clip_grad_norm_",
    "clip_grad_value_",
]  # fmt: skip


# Hyperparameters -------------------------------------------------------------------------------------


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def _from_zero(value):
    return _is_number(value) and 0 <= value < math.inf


def _below_one(value):
    return _is_number(value) and 0 <= value < 1


def _is_bool(value):
    return isinstance(value, (bool, np.bool_))


_FROM_ZERO = (_from_zero, "a finite number of at least 0")
_FLAG = (_is_bool, "True or False")
_RULES = {
    "lr": _FROM_ZERO,
    "momentum": _FROM_ZERO,
    "weight_decay": _FROM_ZERO,
    "dampening": (lambda value: _is_number(value) and math.isfinite(value), "a finite number"),
    "eps": (lambda value: _from_zero(value) and value > 0, "a finite number above 0"),
    "alpha": (_below_one, "a number in [0, 1)"),
    "betas": (
        lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_below_one, value)),
        "two numbers in [0, 1)",
    ),
    "nesterov": _FLAG, "amsgrad": _FLAG, "centered": _FLAG, "maximize": _FLAG,
}  # fmt: skip


def _check(values):
    """Raise an InputError unless all hyperparameters in the dict are allowed."""
    for name, value in values.items():
        rule = _RULES.get(name)
        if rule is not None and not rule[0](value):
            raise InputError(f"{name} is {value!r}, it must be {rule[1]}")
    if values.get("nesterov") and (values["momentum"] == 0 or values["dampening"] != 0):
        raise InputError(
            f"nesterov needs a momentum above 0 and a dampening of 0, "
            f"got momentum {values['momentum']} and dampening {values['dampening']}"
        )


# The base --------------------------------------------------------------------------------------------


def _join(columns):
    """The longest chains of neighbours, as (start, stop) pairs that cut up the rows.

    Parameters
    ----------
    columns : list of tuple of ndarray
        A tuple for each parameter: its data, gradient, ...; rows i and i + 1 join when all their arrays
        are neighbours with the same gap.
    """
    start = 0
    for i in range(1, len(columns) + 1):
        if i < len(columns):
            gaps = {kernels.gap(a, b) for a, b in zip(columns[i - 1], columns[i])}
            if len(gaps) == 1 and gaps != {-1}:
                continue
        yield start, i
        start = i


def _zeros_like(arrays):
    """Zeros of each array's shape and dtype, laid out as these are: neighbours stay neighbours."""
    result = []
    for start, stop in _join([(array,) for array in arrays]):
        chain = arrays[start:stop]
        block = np.zeros(kernels.span(chain[0], chain[-1]).size, chain[0].dtype)
        offset = 0
        for i, array in enumerate(chain):
            if i:
                offset += kernels.gap(chain[i - 1], array)
            result.append(block[offset : offset + array.size].reshape(array.shape))
            offset += array.size
    return result


class Optimizer:
    """What all optimizers share: groups, state, and which arrays an update joins.

    Attributes
    ----------
    param_groups : list of dict
        "params" and the hyperparameters of each group; changing a value takes effect at the next step.
    steps : list of int
        How often each parameter has been updated; a step without its gradient does not count.
    """

    def __init__(self, params, defaults):
        _check(defaults)
        self.defaults = defaults
        self.param_groups = []
        self.steps = []
        self._state = {}  # name -> array or None for each parameter
        self._runs = None
        self._seen = None
        params = [params] if hasattr(params, "grad") else list(params)
        if not params:
            raise InputError("params is empty, an optimizer needs at least one parameter")
        for group in params if isinstance(params[0], dict) else [{"params": params}]:
            self.add_param_group(group)

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
        _check(group)
        self.param_groups.append(group)
        self.steps = self.steps + [0] * len(params)
        for arrays in self._state.values():
            arrays += [None] * len(params)

    def step(self):
        """Update every parameter that has a gradient, in place.

        Raises
        ------
        InputError
            For a hyperparameter out of range, such as a NaN learning rate; no parameter has changed then.
        """
        for group in self.param_groups:
            _check(group)
        self._plan()
        steps = self.steps
        for group, indices, names, arrays in self._runs:
            step = steps[indices[0]] + 1
            param, grad = arrays[:2]
            state = dict(zip(names, arrays[2:]))
            if param.flags.c_contiguous:
                self._update(group, param, grad, step, state)
            else:
                copy = np.ascontiguousarray(param)
                self._update(group, copy, grad, step, state)
                param[...] = copy
            for i in indices:
                steps[i] = step

    def zero_grad(self):
        """Forget all gradients; the next backward pass assigns them anew."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    # State -------------------------------------------------------------------------------------------

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
            i: {"step": self.steps[i], **{name: self._state[name][i] for name in self._state_names(group)}}
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
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        given = [len(group["params"]) for group in groups]
        if sizes != given:
            raise InputError(f"the state is of groups of {given} parameters, the optimizer has {sizes}")
        groups = [
            {**mine, **group, "params": mine["params"]} for mine, group in zip(self.param_groups, groups)
        ]
        for group in groups:
            _check(group)
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

    def _take(self, state, groups):
        """Replace groups and all state by copies of these, after checks."""
        for i, group, p in self._numbered(groups):
            values = state[i]
            expected = self._state_names(group) if values["step"] else ()
            names = [name for name in values if name != "step"]
            if sorted(names) != sorted(expected):
                raise InputError(
                    f"the state of parameter {i} is {', '.join(names) or 'empty'}, "
                    f"{type(self).__name__} needs {', '.join(expected) or 'none'}"
                )
            for name in names:
                array = np.asarray(values[name])
                if array.shape != p.data.shape or array.dtype != p.data.dtype:
                    raise InputError(
                        f"{name}.{i} is {array.dtype} of shape {array.shape}, "
                        f"it must be {p.data.dtype} of shape {p.data.shape}"
                    )
        for mine, group in zip(self.param_groups, groups):
            mine.update(group)
        self.steps = [int(values["step"]) for values in state.values()]
        self._state = {}
        self._allocate()
        for i, values in state.items():
            for name, array in values.items():
                if name != "step":
                    self._state[name][i][...] = array

    # Joining -----------------------------------------------------------------------------------------

    def _allocate(self):
        """Make the state arrays that the groups' hyperparameters ask for and that are not there yet."""
        start = 0
        for group in self.param_groups:
            params = group["params"]
            stop = start + len(params)
            for name in self._state_names(group):
                arrays = self._state.setdefault(name, [None] * len(self.steps))
                if params and any(array is None for array in arrays[start:stop]):
                    arrays[start:stop] = _zeros_like([p.data for p in params])
            start = stop

    def _plan(self):
        """Bring `_runs` up to date: for each kernel call, the group, parameter numbers and joined arrays."""
        seen = [(p.data, p.grad) for p in self._params()]
        names = [self._state_names(group) for group in self.param_groups]
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
        columns = [(*seen[i], *(self._state[name][i] for name in names)) for i in indices]
        for start, stop in _join(columns):
            joined = [kernels.span(*pair) for pair in zip(columns[start], columns[stop - 1])]
            self._runs.append((group, indices[start:stop], names, joined))

    # An optimizer ------------------------------------------------------------------------------------

    def _state_names(self, group):
        """The names of the state arrays of a group's parameters."""
        raise NotImplementedError

    def _update(self, group, param, grad, step, state):
        """Call the kernel; `step` counts from 1."""
        raise NotImplementedError


# The optimizers --------------------------------------------------------------------------------------


class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        The parameters, or groups ``{"params": [...], "lr": ...}`` with hyperparameters of their own.
    lr : float
    momentum, dampening, weight_decay : float
    nesterov, maximize : bool

    Raises
    ------
    InputError
        For a value out of range.

    See Also
    --------
    cllm.kernels.sgd_update : the equations
    """

    def __init__(
        self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, *,
        maximize=False,
    ):  # fmt: skip
        super().__init__(
            params,
            {
                "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
                "nesterov": nesterov, "maximize": maximize,
            },
        )  # fmt: skip

    def _state_names(self, group):
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, group, param, grad, step, state):
        kernels.sgd_update(
            param, grad, state.get("momentum_buffer"), lr=group["lr"], momentum=group["momentum"],
            dampening=group["dampening"], weight_decay=group["weight_decay"], nesterov=group["nesterov"],
            first=step == 1, maximize=group["maximize"],
        )  # fmt: skip


class Adam(Optimizer):
    """Adam; `weight_decay` is added to the gradient.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        The parameters, or groups ``{"params": [...], "lr": ...}`` with hyperparameters of their own.
    lr : float
    betas : (float, float)
        Decay of the running means of the gradient and of its square; each in [0, 1).
    eps : float
        Above 0.
    weight_decay : float
    amsgrad, maximize : bool

    Raises
    ------
    InputError
        For a value out of range.

    See Also
    --------
    cllm.kernels.adam_update : the equations
    """

    _kernel = staticmethod(kernels.adam_update)

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, *,
        maximize=False,
    ):  # fmt: skip
        super().__init__(
            params,
            {
                "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
                "maximize": maximize,
            },
        )  # fmt: skip

    def _state_names(self, group):
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _update(self, group, param, grad, step, state):
        self._kernel(
            param, grad, state["exp_avg"], state["exp_avg_sq"], step=step, lr=group["lr"],
            betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
            v_max=state.get("max_exp_avg_sq"), maximize=group["maximize"],
        )  # fmt: skip


class AdamW(Adam):
    """Adam whose `weight_decay` shrinks the weights directly, by ``lr * weight_decay`` a step.

    Parameters, errors and state as `Adam`.

    See Also
    --------
    cllm.kernels.adamw_update : the equations
    """

    _kernel = staticmethod(kernels.adamw_update)

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, amsgrad=False, *,
        maximize=False,
    ):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)


class RMSprop(Optimizer):
    """RMSprop: the gradient divided by the root of a running mean of its square.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        The parameters, or groups ``{"params": [...], "lr": ...}`` with hyperparameters of their own.
    lr : float
    alpha : float
        Decay of the running mean; in [0, 1).
    eps : float
        Above 0.
    weight_decay, momentum : float
    centered, maximize : bool
        Centred: divide by an estimate of the standard deviation instead.

    Raises
    ------
    InputError
        For a value out of range.

    See Also
    --------
    cllm.kernels.rmsprop_update : the equations
    """

    def __init__(
        self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, *,
        maximize=False,
    ):  # fmt: skip
        super().__init__(
            params,
            {
                "lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum,
                "centered": centered, "maximize": maximize,
            },
        )  # fmt: skip

    def _state_names(self, group):
        names = ["square_avg"]
        if group["momentum"]:
            names.append("momentum_buffer")
        if group["centered"]:
            names.append("grad_avg")
        return tuple(names)

    def _update(self, group, param, grad, step, state):
        kernels.rmsprop_update(
            param, grad, state["square_avg"], lr=group["lr"], alpha=group["alpha"], eps=group["eps"],
            weight_decay=group["weight_decay"], momentum=group["momentum"],
            momentum_buffer=state.get("momentum_buffer"), grad_avg=state.get("grad_avg"),
            maximize=group["maximize"],
        )  # fmt: skip


#: What a config may name.
BY_NAME = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "rmsprop": RMSprop}


# Clipping --------------------------------------------------------------------------------------------


def _gradients(params):
    """The gradients of the parameters that have one."""
    params = [params] if hasattr(params, "grad") else params
    return [p.grad for p in params if p.grad is not None]


def _joined(grads):
    """The same elements in fewer arrays: neighbours joined."""
    return [kernels.span(grads[start], grads[stop - 1]) for start, stop in _join([(grad,) for grad in grads])]


def clip_grad_norm_(params, max_norm):
    """Scale all gradients by one factor, in place, so that their norm is at most `max_norm`.

    Parameters
    ----------
    params : iterable of Tensor
        Those without a gradient are skipped.
    max_norm : float
        Infinity only measures.

    Returns
    -------
    float
        The 2-norm of all gradients together, before clipping, summed in double. Where it is NaN or infinite
        the gradients are of no use and become NaN or 0, as in torch.

    Raises
    ------
    InputError
        When `max_norm` is negative or NaN.
    """
    if not _is_number(max_norm) or not max_norm >= 0:
        raise InputError(f"max_norm is {max_norm!r}, it must be a number of at least 0")
    grads = _gradients(params)
    spans = _joined(grads)
    norm = math.sqrt(sum(kernels.sum_of_squares(grad) for grad in spans))
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1 and max_norm < math.inf:
        # A NaN must not reach the zeros between neighbours.
        for grad in grads if math.isnan(factor) else spans:
            kernels.scale_(grad, factor)
    return norm


def clip_grad_value_(params, clip_value):
    """Limit every element of the gradients to [-clip_value, clip_value], in place.

    Raises
    ------
    InputError
        When `clip_value` is negative or NaN.
    """
    if not _is_number(clip_value) or not clip_value >= 0:
        raise InputError(f"clip_value is {clip_value!r}, it must be a number of at least 0")
    for grad in _joined(_gradients(params)):
        np.clip(grad, -clip_value, clip_value, out=grad)


# The config's section --------------------------------------------------------------------------------

#: Where a config's defaults are other than the constructor's.
_CONFIG_DEFAULTS = {"adamw": {"betas": (0.9, 0.99), "weight_decay": 0.1}}

_DECAY = ("all", "matrices")


@dataclass(frozen=True)
class OptimConfig:
    """[optim]: the optimizer and its arguments.

    Parameters
    ----------
    name : {"sgd", "adam", "adamw", "rmsprop"}
    lr : float
        The largest learning rate; above 0.
    decay : {"all", "matrices"}
        What `weight_decay` applies to: all parameters, or those of two or more dimensions that are not
        embedding or position tables.
    grad_clip : float
        The largest norm of all gradients; 0 for no clipping.
    arguments : dict
        The optimizer's own arguments. Those left out are filled in from its constructor's defaults, but for
        AdamW's betas, here (0.9, 0.99), and weight decay, here 0.1.

    Raises
    ------
    InputError
        For an unknown name or argument, or a value out of range.
    """

    name: str = "adamw"
    lr: float = 1e-3
    decay: str = "all"
    grad_clip: float = 1.0
    arguments: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.name not in BY_NAME:
            hint = nearest(self.name, BY_NAME)
            raise InputError(f'name is "{self.name}"{hint}, it must be one of {", ".join(BY_NAME)}')
        parameters = inspect.signature(BY_NAME[self.name]).parameters
        known = {name: p.default for name, p in parameters.items() if name not in ("params", "lr")}
        for name in self.arguments:
            if name not in known:
                hint = nearest(name, known)
                raise InputError(f"{self.name} has no argument {name}{hint}, it takes {', '.join(known)}")
        if self.decay not in _DECAY:
            hint = nearest(self.decay, _DECAY)
            raise InputError(f'decay is "{self.decay}"{hint}, it must be one of {", ".join(_DECAY)}')
        if not _from_zero(self.lr) or self.lr == 0:
            raise InputError(f"lr is {self.lr!r}, it must be a finite number above 0")
        if not _from_zero(self.grad_clip):
            raise InputError(f"grad_clip is {self.grad_clip!r}, it must be a finite number of at least 0")
        arguments = {**known, **_CONFIG_DEFAULTS.get(self.name, {}), **self.arguments}
        _check(arguments)
        if "betas" in arguments:
            arguments["betas"] = tuple(arguments["betas"])
        object.__setattr__(self, "arguments", arguments)


def build(config, named_parameters):
    """The optimizer of an `OptimConfig`.

    Parameters
    ----------
    config : OptimConfig
    named_parameters : iterable of (str, Tensor)
        With decay = "matrices", a name with a part "wte", "wpe" or one that contains "embed" is a table.

    Returns
    -------
    Optimizer
        With decay = "matrices" the first group decays, the second does not.
    """
    named = list(named_parameters)
    cls = BY_NAME[config.name]
    if config.decay == "all":
        return cls([p for _, p in named], lr=config.lr, **config.arguments)
    decays = {
        True: {"params": []},
        False: {"params": [], "weight_decay": 0.0},
    }
    for name, p in named:
        table = any(part in ("wte", "wpe") or "embed" in part for part in name.lower().split("."))
        decays[p.data.ndim >= 2 and not table]["params"].append(p)
    groups = [group for group in decays.values() if group["params"]]
    return cls(groups, lr=config.lr, **config.arguments)
