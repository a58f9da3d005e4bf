"""The parts of a transformer besides attention: the feed-forward layer and the block."""

from cllm import functional as F
from cllm.errors import InputError
from cllm.functional.elementwise import ACTIVATIONS
from cllm.nn.attention import MultiHeadAttention
from cllm.nn.layers import LayerNorm, Linear, RMSNorm
from cllm.nn.module import Module
from cllm.tensor import Tensor


def norm_of(config):
    """A norm over the channels: layer norm (Ba, Kiros & Hinton 2016) or RMS norm (Zhang & Sennrich 2019).

    Both with eps 1e-5; RMS norm has no bias.
    """
    if config.norm == "rms":
        return RMSNorm(config.n_embd, eps=1e-5)
    return LayerNorm(config.n_embd, bias=config.bias)


class FeedForward(Module):
    """Linear, activation, linear: one fused operation.

    config : GPTConfig
        Of it n_embd, d_ff, activation, bias and dropout. d_ff None is 4 n_embd; for "swiglu", which has two
        matrices in front (one above the other in `c_fc`: gates, then what they let through), 8/3 n_embd
        rounded up to a multiple of 8, so that it has about as many weights (Shazeer 2020).
    """

    def __init__(self, config):
        super().__init__()
        C, gated = config.n_embd, config.activation == "swiglu"
        d_ff = config.d_ff or (-(-C // 3) * 8 if gated else 4 * C)
        self.activation, self.dropout = config.activation, config.dropout
        self.c_fc = Linear(C, 2 * d_ff if gated else d_ff, bias=config.bias)
        self.c_proj = Linear(d_ff, C, bias=config.bias)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)"""
        fc, proj = self.c_fc, self.c_proj
        if self.observed("hidden") or fc.observed() or proj.observed():
            hidden = ACTIVATIONS[self.activation](fc(x))
            self.observe("hidden", hidden)
            y = proj(hidden)
        else:
            y = F.feed_forward(x, fc.weight, fc.bias, proj.weight, proj.bias, self.activation)
        return F.dropout(y, self.dropout) if self.dropout and self.training else y


class Block(Module):
    """A transformer block: attention and feed-forward, each with a residual connection and a norm.

    With f each of the two in turn, norm_position "pre" computes x + f(norm(x)) (Radford et al. 2019) and
    "post" norm(x + f(x)) (Vaswani et al. 2017).

    Parameters
    ----------
    config : GPTConfig
    attention : class
        Built as attention(config); its forward takes (B, T, C) to (B, T, C).
    """

    def __init__(self, config, attention=MultiHeadAttention):
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.ln_1 = norm_of(config)
        if not callable(attention) or isinstance(attention, Module):
            raise InputError(f"attention is a {type(attention).__name__}, it must be a class of modules")
        self.attn = attention(config)
        if not isinstance(self.attn, Module):
            raise InputError(
                f"attention(config) gives a {type(self.attn).__name__}, it must give a module: "
                "class MyAttention(nn.Module)"
            )
        self.ln_2 = norm_of(config)
        self.mlp = FeedForward(config)

    def forward(self, x, cache=None):
        """(B, T, C) -> (B, T, C); a LayerCache goes to the attention."""
        options = {} if cache is None else {"cache": cache}
        if self.post_norm:
            x = self.ln_1(x + _like(x, self.attn(x, **options), self.attn))
            return self.ln_2(x + _like(x, self.mlp(x), self.mlp))
        x = x + _like(x, self.attn(self.ln_1(x), **options), self.attn)
        return x + _like(x, self.mlp(self.ln_2(x)), self.mlp)


def _like(x, y, module):
    """y, which must be a Tensor of x's shape: adding another shape would broadcast without a word."""
    if isinstance(y, Tensor) and y.shape == x.shape:
        return y
    given = f"a Tensor {y.shape}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
    raise InputError(f"{type(module).__name__}.forward returned {given}, it must return a Tensor {x.shape}")
