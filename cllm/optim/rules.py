"""The optimizers: torch.optim's constructors and defaults, and Lion; their equations are the kernels'."""

from typing import ClassVar, Literal

import numpy as np

from cllm import kernels
from cllm.errors import InputError
from cllm.optim.base import FROM_ZERO, Optimizer, below_one, finite, from_zero, is_number, listed


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

    elementwise = True

    def __init__(
        self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, *,
        maximize=False,
    ):  # fmt: skip
        super().__init__(params, locals())

    @classmethod
    def check(cls, values):
        super().check(values)
        if values.get("nesterov") and (values["momentum"] == 0 or values["dampening"] != 0):
            raise InputError(
                f"nesterov needs a momentum above 0 and a dampening of 0, "
                f"got momentum {values['momentum']} and dampening {values['dampening']}"
            )

    def state_names(self, group):
        return ("momentum_buffer",) if group["momentum"] else ()

    def update(self, group, param, grad, step, state):
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
        As `SGD`.
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

    elementwise = True
    _kernel = "adam_update"

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, *,
        maximize=False,
    ):  # fmt: skip
        super().__init__(params, locals())

    def state_names(self, group):
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def update(self, group, param, grad, step, state):
        getattr(kernels, self._kernel)(
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

    _kernel = "adamw_update"

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
        As `SGD`.
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

    elementwise = True

    def __init__(
        self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, *,
        maximize=False,
    ):  # fmt: skip
        super().__init__(params, locals())

    def state_names(self, group):
        names = ["square_avg"]
        if group["momentum"]:
            names.append("momentum_buffer")
        if group["centered"]:
            names.append("grad_avg")
        return tuple(names)

    def update(self, group, param, grad, step, state):
        kernels.rmsprop_update(
            param, grad, state["square_avg"], lr=group["lr"], alpha=group["alpha"], eps=group["eps"],
            weight_decay=group["weight_decay"], momentum=group["momentum"],
            momentum_buffer=state.get("momentum_buffer"), grad_avg=state.get("grad_avg"),
            maximize=group["maximize"],
        )  # fmt: skip


class Adagrad(Optimizer):
    """Adagrad: the gradient divided by the root of the sum of all its squares so far.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        As `SGD`.
    lr : float
    lr_decay : float
        The learning rate of an update is ``lr / (1 + (step - 1) * lr_decay)``.
    weight_decay : float
    initial_accumulator_value : float
        What the sums of squares begin from.
    eps : float
        Above 0.
    maximize : bool

    Raises
    ------
    InputError
        For a value out of range.

    See Also
    --------
    cllm.kernels.adagrad_update : the equations
    """

    elementwise = True
    rules: ClassVar[dict] = {**Optimizer.rules, "lr_decay": FROM_ZERO, "initial_accumulator_value": FROM_ZERO}

    def __init__(
        self, params, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10, *,
        maximize=False,
    ):  # fmt: skip
        super().__init__(params, locals())

    def state_names(self, group):
        return ("sum",)

    def new_state(self, group, param):
        return {"sum": np.full(param.shape, group["initial_accumulator_value"], param.dtype)}

    def update(self, group, param, grad, step, state):
        kernels.adagrad_update(
            param, grad, state["sum"], step=step, lr=group["lr"], lr_decay=group["lr_decay"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip


class Lion(Optimizer):
    """Lion: every weight moves by `lr` along the sign of a mean gradient; one array of state.

    Its steps are larger than Adam's: the authors advise a learning rate 3 to 10 times smaller, and a weight
    decay larger by as much.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        As `SGD`.
    lr : float
    betas : (float, float)
        Weight of the mean gradient in the step, and its decay; each in [0, 1).
    weight_decay : float
        Shrinks the weights directly, by ``lr * weight_decay`` a step.
    maximize : bool

    Raises
    ------
    InputError
        For a value out of range.

    See Also
    --------
    cllm.kernels.lion_update : the equations
    """

    elementwise = True

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False):
        super().__init__(params, locals())

    def state_names(self, group):
        return ("exp_avg",)

    def update(self, group, param, grad, step, state):
        kernels.lion_update(
            param, grad, state["exp_avg"], lr=group["lr"], betas=group["betas"],
            weight_decay=group["weight_decay"], maximize=group["maximize"],
        )  # fmt: skip


class Adafactor(Optimizer):
    """Adafactor: a matrix's squared gradients are remembered by rows and columns only.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        As `SGD`.
    lr : float
        The largest step relative to the parameter's own size; the paper has 0.01.
    beta2_decay : float
        The second moments' decay at step t is ``1 - t**beta2_decay``; at most 0.
    eps : (float or None, float)
        The least root of a second moment, None for the machine epsilon of the dtype; the least size that a
        parameter's step is relative to.
    d : float
        Updates of a greater root mean square than this are scaled down to it; at least 1.
    weight_decay : float
        Shrinks the weights directly, by ``lr * weight_decay`` a step.
    maximize : bool

    Raises
    ------
    InputError
        For a value out of range.

    See Also
    --------
    cllm.kernels.adafactor_update : the equations
    """

    rules: ClassVar[dict] = {
        **Optimizer.rules,
        "beta2_decay": (lambda value: finite(value) and value <= 0, "a finite number of at most 0"),
        "d": (lambda value: finite(value) and value >= 1, "a finite number of at least 1"),
        "eps": (
            lambda value: (
                isinstance(value, (tuple, list)) and len(value) == 2
                and (value[0] is None or from_zero(value[0])) and from_zero(value[1])
            ),
            "two finite numbers of at least 0, of which the first may be None",
        ),
    }  # fmt: skip

    def __init__(
        self, params, lr=1e-2, beta2_decay=-0.8, eps: tuple[float, float] = (None, 1e-3), d=1.0,
        weight_decay=0.0, *, maximize=False,
    ):  # fmt: skip
        super().__init__(params, locals())

    def state_names(self, group):
        return ("row_var", "col_var", "variance")

    def new_state(self, group, param):
        shape = param.shape
        if param.ndim < 2:
            return {"variance": np.zeros(shape, param.dtype)}
        return {
            "row_var": np.zeros((*shape[:-1], 1), param.dtype),
            "col_var": np.zeros((*shape[:-2], 1, shape[-1]), param.dtype),
        }

    def update(self, group, param, grad, step, state):
        kernels.adafactor_update(
            param, grad, **state, step=step, lr=group["lr"], beta2_decay=group["beta2_decay"],
            eps=group["eps"], d=group["d"], weight_decay=group["weight_decay"], maximize=group["maximize"],
        )  # fmt: skip


class Muon(Optimizer):
    """Muon for matrices: a step along the momentum with all its singular values brought near 1.

    Embeddings, the head, norms and biases are better off with AdamW: a group with ``"muon": False`` is
    updated by AdamW's rule, with its own `betas` and `eps`, and may hold parameters of any shape.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        As `SGD`; of two dimensions each, but for groups with ``"muon": False``.
    lr : float
    weight_decay : float
        Shrinks the weights directly, by ``lr * weight_decay`` a step.
    momentum : float
        In [0, 1).
    nesterov : bool
    ns_coefficients : (float, float, float)
        Of the Newton-Schulz iteration.
    eps : float
        The least norm that the momentum is divided by; in a group without Muon, AdamW's. Above 0.
    ns_steps : int
        Iterations, from 0 to 99.
    adjust_lr_fn : {None, "original", "match_rms_adamw"}
        How the step grows with the matrix: by ``sqrt(max(1, rows / columns))``, as None does, or by
        ``0.2 sqrt(max(rows, columns))``, which makes it as large as AdamW's, so that the two can share
        a learning rate and a weight decay.
    betas : (float, float)
        AdamW's, of the groups without Muon; each in [0, 1).

    Raises
    ------
    InputError
        For a value out of range, or a parameter that is no matrix.

    See Also
    --------
    cllm.kernels.muon_update, cllm.kernels.adamw_update : the equations
    """

    rules: ClassVar[dict] = {
        **Optimizer.rules,
        "momentum": (below_one, "a number in [0, 1)"),
        "ns_coefficients": (listed(finite, 3), "three finite numbers"),
        "ns_steps": (
            lambda value: is_number(value) and value in range(100),
            "an integer from 0 to 99",
        ),
        "adjust_lr_fn": (
            lambda value: value in (None, "original", "match_rms_adamw"),
            'None, "original" or "match_rms_adamw"',
        ),
        "muon": Optimizer.rules["nesterov"],
    }

    def __init__(
        self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True,
        ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None, *, betas=(0.9, 0.999),
    ):  # fmt: skip
        super().__init__(params, {**locals(), "muon": True})

    @classmethod
    def check(cls, values):
        super().check(values)
        if values.get("muon", True):
            for i, p in enumerate(values.get("params", ())):
                if p.data.ndim != 2:
                    raise InputError(
                        f"params[{i}] is of shape {p.data.shape}, Muon takes matrices; others can go to a "
                        'group with "muon": False, which AdamW updates'
                    )

    def state_names(self, group):
        return ("momentum_buffer",) if group["muon"] else ("exp_avg", "exp_avg_sq")

    def update(self, group, param, grad, step, state):
        if group["muon"]:
            kernels.muon_update(
                param, grad, state["momentum_buffer"], lr=group["lr"], weight_decay=group["weight_decay"],
                momentum=group["momentum"], nesterov=group["nesterov"],
                ns_coefficients=group["ns_coefficients"], eps=group["eps"], ns_steps=int(group["ns_steps"]),
                adjust_lr_fn=group["adjust_lr_fn"],
            )  # fmt: skip
        else:
            kernels.adamw_update(
                param, grad, state["exp_avg"], state["exp_avg_sq"], step=step, lr=group["lr"],
                betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
            )  # fmt: skip

    def _joins(self, group):
        return not group["muon"]
