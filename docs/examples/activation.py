"""An activation as NumPy code, forward and backward, checked against finite differences.

Mish (Misra 2019) is x tanh(softplus(x)). Array code on Tensors would do, but a forward and a backward
function of one's own keep less in memory and run faster.

    python docs/examples/activation.py
"""

import numpy as np

import cllm
from cllm import nn
from cllm.tensor import record


def mish(x):
    """x tanh(softplus(x)), elementwise, differentiable.  x : Tensor -> Tensor of its shape."""
    a = x.data
    tanh = np.tanh(np.logaddexp(a, a.dtype.type(0)))

    def backward(grad):  # gets the gradient of the result, returns one for each input
        sigmoid = 1 / (1 + np.exp(-a))
        return (grad * (tanh + a * (1 - tanh**2) * sigmoid),)

    return record(a * tanh, (x,), backward)


class MishFeedForward(nn.Module):
    """Linear, mish, linear: takes the place of a block's feed-forward part."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(mish(self.c_fc(x)))


if __name__ == "__main__":
    x = cllm.Tensor(np.random.default_rng(0).standard_normal((5, 7)), requires_grad=True)  # float64
    print("gradcheck:", cllm.gradcheck(mish, (x,)))

    config = cllm.GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32)
    model = cllm.GPT(config, seed=0)
    for block in model.transformer.h:
        block.mlp = MishFeedForward(config)
    model.flatten()  # the new parameters join the model's block
    tokens = np.random.default_rng(0).integers(0, 65, (4, 17))
    optimizer = cllm.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(21):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
