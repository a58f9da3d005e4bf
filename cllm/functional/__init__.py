"""Differentiable operations under torch.nn.functional's names, and the fused ones that a GPT runs on.

A fused operation is one forward and one backward kernel with one tape node. It saves its inputs and row
statistics, and its backward kernel writes the gradients of Parameters straight to where they live.
"""

from cllm.functional.attention import causal_self_attention, scaled_dot_product_attention
from cllm.functional.elementwise import (
    dropout,
    gelu,
    log_softmax,
    relu,
    relu_squared,
    rotary,
    sigmoid,
    silu,
    softmax,
    softplus,
    swiglu,
    tanh,
)
from cllm.functional.layers import (
    embedding,
    feed_forward,
    layer_norm,
    linear,
    rms_norm,
    token_position_embedding,
)
from cllm.functional.losses import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    cross_entropy_count,
    huber_loss,
    l1_loss,
    linear_cross_entropy,
    mse_loss,
    smooth_l1_loss,
)

__all__ = [
    "binary_cross_entropy_with_logits", "causal_self_attention", "cross_entropy", "cross_entropy_count",
    "dropout", "embedding", "feed_forward", "gelu", "huber_loss", "l1_loss", "layer_norm", "linear",
    "linear_cross_entropy", "log_softmax", "mse_loss", "relu", "relu_squared", "rms_norm", "rotary",
    "scaled_dot_product_attention", "sigmoid", "silu", "smooth_l1_loss", "softmax", "softplus", "swiglu",
    "tanh", "token_position_embedding",
]  # fmt: skip
