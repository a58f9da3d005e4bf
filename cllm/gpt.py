"""GPT: a decoder-only transformer language model, as GPT-2 (Radford et al. 2019), and its usual variants.

Parameters have nanoGPT's names. B = batch size, T = sequence length, C = channels, V = vocabulary.
"""

import inspect
import math
import numbers
from dataclasses import dataclass

import numpy as np

from cllm import functional as F
from cllm import kernels, nn, rng, userfile
from cllm.errors import InputError, nearest
from cllm.tensor import Parameter, no_grad

__all__ = ["GPT", "GPTConfig"]

_INITIALISATIONS = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
}

# What each of these may be; attention also a class in a file.
CHOICES = {
    "activation": kernels.ACTIVATIONS,
    "position": ("learned", "rotary", "sinusoidal", "alibi", "none"),
    "norm": ("layer", "rms"),
    "norm_position": ("pre", "post"),
    "attention": ("fused", "plain"),
    "init": ("gpt2", *_INITIALISATIONS, "normal"),
}


@dataclass(frozen=True)
class GPTConfig:
    """[model]: a GPT's shape and variant.

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
        Whether linear layers and layer norms have one.
    activation : str
        Of the feed-forward layer: "gelu_tanh" (GPT-2's), "gelu" (by erf), "relu", "relu_squared", "silu",
        "tanh", "sigmoid" or "swiglu", which gates one matrix's output by another's.
    d_ff : int, optional
        Width of the feed-forward layer. Unless given 4 n_embd, and for "swiglu" 8/3 n_embd rounded up to a
        multiple of 8, which is about as many weights.
    n_kv_head : int, optional
        Heads of keys and values, a divisor of n_head; n_head unless given. Fewer make a smaller cache.
    position : {"learned", "rotary", "sinusoidal", "alibi", "none"}
        How the model knows the order: by a learned table added to the token embeddings, or one of sines and
        cosines added to sqrt(n_embd) times them (Vaswani et al. 2017); in attention, by turning queries and
        keys (Su et al. 2021) or lowering the scores of distant tokens (Press et al. 2022); or by the causal
        mask alone.
    norm : {"layer", "rms"}
        Layer norm or RMS norm, both with eps 1e-5.
    norm_position : {"pre", "post"}
        Norms before attention and feed-forward layer, and one after the last block (GPT-2); or behind each
        residual connection, where the last block ends with one already (Vaswani et al. 2017).
    qk_norm : bool
        Whether each head's queries and keys are RMS-normed, before rotary positions.
    tied : bool
        Whether the output layer uses the token embedding's weights.
    attention : str
        "fused"; "plain", the same in array code on the tape, slower and with all weights in memory; or a
        class of yours, "FILE.py:CLASS", built as CLASS(config) in each block.
    init : str
        Initial weights of linear layers. "gpt2": normal with deviation 0.02, and 0.02 / sqrt(2 n_layer) where
        a block's output is added (the layers named c_proj). "normal": 0.02 everywhere. "xavier_uniform",
        "xavier_normal", "kaiming_uniform", "kaiming_normal" and "orthogonal": `nn.init`'s functions with
        their defaults, c_attn and c_fc each as the one matrix that they are. Embeddings are always normal
        with deviation 0.02, a tied output layer with them, and biases 0.
    rotary_base : float
        Of rotary positions: wavelengths go from 2 pi to nearly 2 pi times this many positions.

    Raises
    ------
    InputError
        Names the field, its value and what is allowed.

    Notes
    -----
    These change the number of parameters: position "learned" has block_size n_embd more than the others;
    n_kv_head below n_head saves 2 (n_head - n_kv_head) n_embd / n_head rows of each c_attn; "swiglu" has
    3 d_ff n_embd weights in a block where others have 2 d_ff n_embd; norm "rms" saves the norms' biases,
    norm_position "post" the last norm; qk_norm adds 2 n_embd / n_head in each block; tied saves vocab_size
    n_embd. The other activations and positions, attention "plain", init and rotary_base leave it as it is.

    Without learned positions no parameter depends on block_size: the same weights fit a model of another one.
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
    init: str = "gpt2"
    rotary_base: float = 10000.0

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
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout!r}, it must be a number in [0, 1)")
        if not _is_number(self.rotary_base) or not 1 < self.rotary_base < math.inf:
            raise InputError(f"rotary_base is {self.rotary_base!r}, it must be a number above 1")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value in allowed or (name == "attention" and userfile.is_reference(value)):
                continue
            quoted = [f'"{choice}"' for choice in allowed]
            choices = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
            if name == "attention":
                choices += ', or FILE.py:CLASS for a class of yours, such as "my.py:MyAttention"'
            raise InputError(f"{name} is {value!r}{nearest(value, allowed)}, it must be {choices}")
        C, H = self.n_embd, self.n_head
        if C % H:
            raise InputError(f"n_embd is {C}, it must be divisible by n_head ({H})")
        if self.n_kv_head is not None and H % self.n_kv_head:
            raise InputError(f"n_kv_head is {self.n_kv_head}, it must divide n_head ({H})")
        if self.position == "rotary" and (C // H) % 2:
            raise InputError(
                f"position is 'rotary' and n_embd / n_head is {C // H}, it must be even: channels turn"
            )
        if self.position == "sinusoidal" and C % 2:
            raise InputError(
                f"position is 'sinusoidal' and n_embd is {C}, it must be even: a sine and a cosine each"
            )


class GPT(nn.Module):
    """A language model: tokens (B, T) to logits (B, T, V).

    All parameters are views into `flat_data`, their gradients into `flat_grad`.

    Parameters
    ----------
    config : GPTConfig
    attention : class, optional
        Built as attention(config) in each block, takes (B, T, C) to (B, T, C), and sees to rotary and ALiBi
        positions itself; what the config says unless given.
    seed : int
        Each parameter's initial values come from (seed, its name), drawn as config.init says, in modules of a
        user's as well; their other Parameters keep the values that they were made with.
    dtype : float32 or float64
    """

    def __init__(self, config, attention=None, seed=0, dtype=np.float32):
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise TypeError(f"GPT: config is {type(config).__name__}, it must be a GPTConfig")
        if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise InputError(f"dtype is {np.dtype(dtype)}, it must be float32 or float64")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise InputError(f"seed is {seed!r}, it must be an integer of at least 0")
        if attention is None and userfile.is_reference(config.attention):
            attention = userfile.load(config.attention, "model.attention")
        self.config = config
        with nn.without_initial_values():
            self.transformer = body = nn.Module()
            body.wte = nn.Embedding(config.vocab_size, config.n_embd)
            if config.position == "learned":
                body.wpe = nn.Embedding(config.block_size, config.n_embd)
            body.h = nn.ModuleList(
                nn.Block(config, attention or nn.MultiHeadAttention) for _ in range(config.n_layer)
            )
            if config.norm_position == "pre":
                body.ln_f = nn.norm_of(config)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = body.wte.weight
        if config.position == "sinusoidal":
            self._waves = sinusoidal_positions(config.block_size, config.n_embd).astype(dtype)
        self.flatten(dtype)
        self._initialise(seed)

    def _initialise(self, seed):
        """Draw the initial values; each from its own generator."""
        config, drawn = self.config, set()
        for path, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)) or id(module.weight) in drawn:
                continue
            drawn.add(id(module.weight))
            generator = rng.initial_generator(seed, f"{path}.weight")
            if config.init in _INITIALISATIONS and isinstance(module, nn.Linear):
                _INITIALISATIONS[config.init](module.weight, generator=generator)
            else:
                residual = config.init == "gpt2" and path.endswith("c_proj")
                std = 0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02
                nn.init.normal_(module.weight, std=std, generator=generator)
            if isinstance(getattr(module, "bias", None), Parameter):
                nn.init.zeros_(module.bias)

    def new_cache(self, batch_size):
        """An empty key/value cache for `batch_size` sequences of up to block_size tokens: see `nn.Cache`.

        Raises
        ------
        InputError
            When an attention module of a user's has no ``cache`` argument in its forward.
        """
        for kind in self._without_cache():
            raise InputError(f"{kind.__name__}.forward has no cache argument, so this model cannot use one")
        return nn.Cache(self, batch_size)

    @property
    def takes_cache(self):
        """Whether `new_cache` can make one: attention modules of a user's need a ``cache`` argument."""
        return not self._without_cache()

    def _without_cache(self):
        """The classes of attention modules that take no cache."""
        kinds = {type(block.attn) for block in self.transformer.h}
        return [kind for kind in kinds if "cache" not in inspect.signature(kind.forward).parameters]

    def _tokens(self, tokens):
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu" or tokens.ndim != 2:
            raise InputError(f"tokens are {tokens.dtype} {tokens.shape}, they must be integers (B, T)")
        if tokens.shape[1] > self.config.block_size:
            raise InputError(
                f"tokens have {tokens.shape[1]} positions, the model's block_size is {self.config.block_size}"
            )
        return tokens

    def features(self, tokens, cache=None):
        """What the output layer sees: tokens (B, T) -> Tensor (B, T, C).  `cache` as in `forward`."""
        tokens = self._tokens(tokens)
        if cache is None:
            return self._features(tokens, None)
        if self.training and self.config.dropout:
            raise InputError("a cache and dropout do not go together: call model.eval() first")
        cache.check(self, tokens.shape)
        with no_grad():
            x = self._features(tokens, cache)
        cache.advance(tokens.shape[1])
        return x

    def _features(self, tokens, cache):
        body, config = self.transformer, self.config
        x = self._embedded(tokens, None if cache is None else cache.lengths)
        if self.training and config.dropout:
            x = F.dropout(x, config.dropout)
        for i, block in enumerate(body.h):
            x = block(x) if cache is None else block(x, cache=cache.layers[i])
        return x if config.norm_position == "post" else body.ln_f(x)

    def _embedded(self, tokens, offsets):
        """Token embeddings with what the table of positions adds, offsets being those of the first ones."""
        body, position = self.transformer, self.config.position
        if position == "learned" and offsets is None and not (body.wte.observed() or body.wpe.observed()):
            return F.token_position_embedding(tokens, body.wte.weight, body.wpe.weight)
        x = body.wte(tokens)
        if position not in ("learned", "sinusoidal"):
            return x
        places = np.arange(tokens.shape[1]) + (0 if offsets is None else offsets[:, None])
        if position == "learned":
            return x + body.wpe(places)
        # Vaswani et al. 2017, section 3.4. Without the factor the waves drown the tokens: two layers of 64
        # channels after 600 steps on characters: 2.74 nats, with it 2.20, without any positions 2.24.
        return x * math.sqrt(self.config.n_embd) + self._waves[places]

    def forward(self, tokens, cache=None):
        """Logits of each position's next token.

        Parameters
        ----------
        tokens : (B, T) integer array
            T at most block_size, values in [0, vocab_size).
        cache : nn.Cache, optional
            From `new_cache`: tokens continue the sequences that it holds and are added to them. Not with
            dropout; nothing is recorded for gradients.

        Returns
        -------
        (B, T, V) Tensor

        Raises
        ------
        InputError
            Before anything changes: for more tokens than block_size or the cache has room for, a cache of
            another model or batch size, or in training mode with dropout.
        """
        x = self.features(tokens, cache)
        if cache is None:
            return self.lm_head(x)
        with no_grad():
            return self.lm_head(x)

    def loss(
        self, tokens, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean", *,
        class_weight=None, mask=None, z_loss=0.0,
    ):  # fmt: skip
        """The cross-entropy of the next tokens, without an array of all logits.

        Parameters
        ----------
        tokens, targets : (B, T) integer arrays
        ignore_index : int
            Positions with this target do not count.
        label_smoothing : float in [0, 1]
        reduction : {"mean", "sum", "none"}
        class_weight : (V,) array, optional
            A weight for each token of the vocabulary; "mean" divides by the targets' sum of weights.
        mask : boolean array that broadcasts to (B, T), optional
            Where it is False, positions do not count.
        z_loss : float
            Factor of the squared log-sum-exp of the logits, which keeps them near 0 (Chowdhery et al. 2022).

        Returns
        -------
        Tensor
            () or, for "none", (B, T); in nats.
        """
        x = self.features(tokens)
        if self.lm_head.observed():
            self.lm_head(x)  # whoever captures the logits wants all of them
        return F.linear_cross_entropy(
            x, self.lm_head.weight, targets, ignore_index, reduction, label_smoothing,
            class_weight=class_weight, mask=mask, z_loss=z_loss,
        )  # fmt: skip


def sinusoidal_positions(block_size, n_embd):
    """Sines in the even channels and cosines in the odd ones of position p / 10000^(2i / n_embd), i the pair
    (Vaswani et al. 2017, section 3.5).  -> (block_size, n_embd) float64."""
    angles = np.arange(block_size)[:, None] * 10000.0 ** (-np.arange(0, n_embd, 2) / n_embd)
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(block_size, n_embd)


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
