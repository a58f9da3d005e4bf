"""Sampling text from a model, token by token."""

import numpy as np

from cllm import rng
from cllm.errors import InputError
from cllm.tensor import no_grad

__all__ = ["generate"]


def generate(model, tokens, max_new_tokens, temperature=1.0, top_k=None, seed=0):
    """Continue token sequences.

    While a sequence fits into block_size, the model sees all of it. A full window goes on from its last
    block_size // 2 tokens until it is full again, so that a key/value cache serves any length and a
    token costs one position's computation. The model runs in eval mode and is left as it was.

    Parameters
    ----------
    model : GPT
    tokens : (T,) or (B, T) integer array
        At least one token each.
    max_new_tokens : int
    temperature : float
        Divides the logits; 0 takes the most likely token each time.
    top_k : int, optional
        Only the k most likely tokens can be drawn.
    seed : int
        The same seed gives the same tokens.

    Returns
    -------
    int64 array
        (T + max_new_tokens,) or (B, T + max_new_tokens): the given tokens and the new ones.

    Raises
    ------
    InputError
        For an empty sequence, or an option out of range.
    """
    given = np.asarray(tokens)
    if given.dtype.kind not in "iu" or given.ndim not in (1, 2) or given.shape[-1] < 1:
        raise InputError(
            f"tokens are {given.dtype} {given.shape}, they must be integers (T,) or (B, T), T at least 1"
        )
    if not _is_integer(max_new_tokens) or max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens!r}, it must be an integer of at least 0")
    if not 0 <= temperature < np.inf:
        raise InputError(f"temperature is {temperature}, it must be 0 or a positive number")
    if top_k is not None and (not _is_integer(top_k) or top_k < 1):
        raise InputError(f"top_k is {top_k!r}, it must be an integer of at least 1")
    n_given = given.shape[-1]
    sequence = np.empty((given.size // n_given, n_given + max_new_tokens), np.int64)
    sequence[:, :n_given] = given
    generator = rng.initial_generator(seed, "generate")
    block_size, training = model.config.block_size, model.training
    cache = model.new_cache(len(sequence)) if len(sequence) and model.takes_cache else None
    start = fed = max(0, n_given - block_size)  # where the window begins; where the cache ends
    model.eval()
    try:
        with no_grad():
            for end in range(n_given, sequence.shape[1]):
                if end - start > block_size:
                    start = fed = end - max(1, block_size // 2)
                    if cache is not None:
                        cache.rewind(cache.lengths)
                if cache is None:
                    features = model.features(sequence[:, start:end])
                else:
                    features = model.features(sequence[:, fed:end], cache)
                    fed = end
                logits = model.lm_head(features[:, -1]).data.astype(np.float64)
                sequence[:, end] = _draw(logits, temperature, top_k, generator)
    finally:
        model.train(training)
    return sequence.reshape(*given.shape[:-1], -1)


def _is_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _draw(logits, temperature, top_k, generator):
    """One token for each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits = np.where(logits < least, -np.inf, logits)
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    total = np.cumsum(np.exp(logits), axis=-1)
    # Scaled by the last sum itself, so that a draw can never lie above it.
    draw = generator.random((len(logits), 1)) * total[:, -1:]
    return (total <= draw).sum(-1)
