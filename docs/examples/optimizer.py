"""An optimizer of one's own: the sign of a running mean of the gradient (signSGD, Bernstein et al. 2018).

A subclass of Optimizer says which arrays it keeps for each parameter, and how one step changes them. Groups,
the checks, joining neighbouring parameters into one array, checkpoints and resuming are inherited. The
constructor's arguments become keys of [optim]:

    cllm train --optim.name docs/examples/optimizer.py:SignSGD --optim.lr 1e-4 --optim.momentum 0.95
"""

import numpy as np

import cllm
from cllm import optim


class SignSGD(optim.Optimizer):
    elementwise = True  # neighbouring parameters may come as one flat array

    def __init__(self, params, lr=1e-4, momentum=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def state_names(self, group):
        return ("momentum_buffer",)  # zeros at first

    def update(self, group, param, grad, step, state):
        """Change `param` and the state in place; arrays of one shape, step counts from 1."""
        mean = state["momentum_buffer"]
        mean *= group["momentum"]
        mean += (1 - group["momentum"]) * grad
        param *= 1 - group["lr"] * group["weight_decay"]
        param -= group["lr"] * np.sign(mean)


if __name__ == "__main__":
    w = cllm.Tensor(np.array([3.0, -2.0]), requires_grad=True)
    optimizer = SignSGD([w], lr=0.05)
    for step in range(101):
        loss = ((w - np.array([1.0, 1.0])) ** 2).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.4f}, w {np.round(w.data, 3)}")
