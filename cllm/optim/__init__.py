"""Optimizers with torch.optim's constructors and defaults; gradient clipping and statistics.

Parameters that lie next to each other in a model's block, and whose gradients and state do so too, are
updated as one array where the rule is elementwise: a whole GPT is one kernel call, a pass over memory. Loose
parameters work as well. The state is laid out as the parameters are, with one view for each of them.
Which arrays join is found out when a parameter's `data` or `grad` is another array than in the last step,
and remembered until then.
"""

from cllm.optim.base import Optimizer
from cllm.optim.buffer import GradientBuffer
from cllm.optim.config import BY_NAME, OptimConfig, arguments, build, find
from cllm.optim.gradients import (
    accumulate_grad_,
    average_grad_,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    gradient_statistics,
    update_ratios,
)
from cllm.optim.rules import SGD, Adafactor, Adagrad, Adam, AdamW, Lion, Muon, RMSprop

__all__ = [
    "BY_NAME", "SGD", "Adafactor", "Adagrad", "Adam", "AdamW", "GradientBuffer", "Lion", "Muon",
    "OptimConfig", "Optimizer", "RMSprop", "accumulate_grad_", "arguments", "average_grad_", "build",
    "clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "find", "gradient_statistics",
    "update_ratios",
]  # fmt: skip
