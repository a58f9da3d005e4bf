"""Modules: objects that hold parameters and compute with them.

A module's parameters and submodules are its plain attributes, in the order in which they were set; names are
dotted paths of attribute names. B = batch size, T = sequence length, C = channels.
"""

from cllm.nn import init
from cllm.nn.attention import MultiHeadAttention
from cllm.nn.cache import Cache
from cllm.nn.captures import capture, watching
from cllm.nn.layers import Dropout, Embedding, LayerNorm, Linear, ModuleList, RMSNorm, Sequential
from cllm.nn.module import Module, without_initial_values
from cllm.nn.transformer import Block, FeedForward, norm_of
from cllm.tensor import Parameter

__all__ = [
    "Block", "Cache", "Dropout", "Embedding", "FeedForward", "LayerNorm", "Linear", "Module", "ModuleList",
    "MultiHeadAttention", "Parameter", "RMSNorm", "Sequential", "capture", "init", "norm_of",
    "watching", "without_initial_values",
]  # fmt: skip
