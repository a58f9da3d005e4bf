"""GPT: a decoder-only transformer language model, as GPT-2 (Radford et al. 2019).

Parameters have nanoGPT's names. B = batch size, T = sequence length, C = channels, V = vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np

from cllm import functional as F
from cllm import nn, rng
from cllm.errors import InputError, nearest
from cllm.tensor import Parameter

__all__ = ["GPT", "GPTConfig"]

# What each of these may be.
_CHOICES = {
    "activation": ("gelu_tanh", "gelu"),
    "position": ("learned",),
    "norm": ("layer",),
    "norm_position": ("pre",),
    "attention": ("fused",),
}


@dataclass(frozen=True)
class GPTConfig:
    """[model]: a GPT's shape.

    Parameters
    ----------
    vocab_size : int
        Tokens that the model knows.
    block_size : int
        Positions: the longest sequence.
    n_layer, n_head, n_embd : int
        Blocks, heads in a block, channels; n_embd must be divisible by n_head.
    dropout : float
        In [0, 1): after the embedding, on attention weights and on each block's two outputs.
    bias : bool
        Whether linear layers and norms have one.
    activation : {"gelu_tanh", "gelu"}
        GELU by tanh, as GPT-2, or by erf.
    d_ff : int, optional
        Width of the feed-forward layer; 4 n_embd unless given.
    n_kv_head : int, optional
        For now n_head.
    position, norm, norm_position, qk_norm, attention
        For now "learned", "layer", "pre", False and "fused".
    tied : bool
        Whether the output layer uses the token embedding's weights.

    Raises
    ------
    InputError
        Names the field, its value and what is allowed.
    """

    vocab_size: int = 65
    block_size: int = 64
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu_tanh"
    d_ff: int | None = None
    n_kv_head: int | None = None
    position: str = "learned"
    norm: str = "layer"
    norm_position: str = "pre"
    qk_norm: bool = False
    tied: bool = True
    attention: str = "fused"

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "d_ff", "n_kv_head"):
            value = getattr(self, name)
            if value is None and name in ("d_ff", "n_kv_head"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"{name} is {value!r}, it must be an integer of at least 1")
            object.__setattr__(self, name, int(value))
        for name in ("bias", "qk_norm", "tied"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise InputError(f"{name} is {getattr(self, name)!r}, it must be true or false")
        p = self.dropout
        if isinstance(p, bool) or not isinstance(p, (int, float, np.floating)) or not 0 <= p < 1:
            raise InputError(f"dropout is {p!r}, it must be a number in [0, 1)")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                choices = " or ".join(f'"{choice}"' for choice in allowed)
                raise InputError(f"{name} is {value!r}{nearest(value, allowed)}, it must be {choices}")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd is {self.n_embd}, it must be divisible by n_head ({self.n_head})")
        if self.n_kv_head not in (None, self.n_head):
            raise InputError(f"n_kv_head is {self.n_kv_head}, it must be n_head ({self.n_head}) or left out")
        if self.qk_norm:
            raise InputError("qk_norm is true, it must be false for now")


class GPT(nn.Module):
    """A language model: tokens (B, T) to logits (B, T, V).

    All parameters are views into `flat_data`, their gradients into `flat_grad`.

    Parameters
    ----------
    config : GPTConfig
    attention : class, optional
        Built as attention(config) in each block, takes (B, T, C) to (B, T, C); the fused causal attention
        unless given.
    seed : int
        Initial values of each parameter come from (seed, its name): weights of linear layers and embeddings
        are normal with deviation 0.02, those named c_proj 0.02 / sqrt(2 n_layer), biases 0. Other Parameters
        of a user's module keep the values that it gave them.
    dtype : float32 or float64
    """

    def __init__(self, config, attention=None, seed=0, dtype=np.float32):
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise TypeError(f"GPT: config is {type(config).__name__}, it must be a GPTConfig")
        if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise InputError(f"dtype is {np.dtype(dtype)}, it must be float32 or float64")
        self.config = config
        with nn.without_initial_values():
            self.transformer = body = nn.Module()
            body.wte = nn.Embedding(config.vocab_size, config.n_embd)
            body.wpe = nn.Embedding(config.block_size, config.n_embd)
            body.h = nn.ModuleList(
                nn.Block(config, attention or nn.MultiHeadAttention) for _ in range(config.n_layer)
            )
            body.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = body.wte.weight
        self.flatten(dtype)
        self._initialise(seed)

    def _initialise(self, seed):
        """Draw the initial values; in float32, so that a float64 model starts with the same ones."""
        residual = 0.02 / math.sqrt(2 * self.config.n_layer)
        drawn = set()
        for path, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)) or id(module.weight) in drawn:
                continue
            drawn.add(id(module.weight))
            deviation = residual if path.endswith("c_proj") else 0.02
            generator = rng.initial_generator(seed, f"{path}.weight")
            weight = module.weight.data
            weight[...] = generator.standard_normal(weight.shape, np.float32) * np.float32(deviation)
            if isinstance(getattr(module, "bias", None), Parameter):
                module.bias.data[...] = 0

    def _tokens(self, tokens):
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu" or tokens.ndim != 2:
            raise InputError(f"tokens are {tokens.dtype} {tokens.shape}, they must be integers (B, T)")
        if tokens.shape[1] > self.config.block_size:
            raise InputError(
                f"tokens have {tokens.shape[1]} positions, the model's block_size is {self.config.block_size}"
            )
        return tokens

    def features(self, tokens):
        """What the output layer sees: tokens (B, T) -> Tensor (B, T, C)."""
        body = self.transformer
        x = F.token_position_embedding(self._tokens(tokens), body.wte.weight, body.wpe.weight)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        for block in body.h:
            x = block(x)
        return body.ln_f(x)

    def forward(self, tokens):
        """Logits of each position's next token.

        Parameters
        ----------
        tokens : (B, T) integer array
            T at most block_size, values in [0, vocab_size).

        Returns
        -------
        (B, T, V) Tensor
        """
        return self.lm_head(self.features(tokens))

    def loss(self, tokens, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
        """The cross-entropy of the next tokens, without an array of all logits.

        Parameters
        ----------
        tokens, targets : (B, T) integer arrays
        ignore_index : int
            Positions with this target do not count.
        label_smoothing : float in [0, 1]
        reduction : {"mean", "sum", "none"}

        Returns
        -------
        Tensor
            () or, for "none", (B, T); in nats.
        """
        return F.linear_cross_entropy(
            self.features(tokens), self.lm_head.weight, targets, ignore_index, reduction, label_smoothing
        )
