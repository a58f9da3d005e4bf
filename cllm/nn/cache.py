"""The keys and values of tokens that a model has seen, for generating text token by token."""

import numpy as np

from cllm.errors import InputError
from cllm.tensor import as_tensor


class Cache:
    """Keys and values of every layer for a batch of sequences, which may differ in length.

    ``model.new_cache(batch_size)`` makes one, ``model(tokens, cache=cache)`` appends T tokens to each
    sequence and returns the logits of these. Sequences of different length: feed them padded on the right,
    then let `rewind` drop each one's padding. What was dropped is never seen again. The cache holds what the
    weights gave when it was filled: after an update of the weights, make a new one.

    Parameters
    ----------
    model : GPT
    batch_size : int
        Sequences.

    Attributes
    ----------
    model : GPT
        The only one that may use this cache.
    layers : list of LayerCache
        What each block's attention gets.
    """

    def __init__(self, model, batch_size):
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}, it must be an integer of at least 1")
        config = model.config
        n_kv_head, head_size = config.n_kv_head or config.n_head, config.n_embd // config.n_head
        self.model = model
        self._lengths = np.zeros(batch_size, np.int64)
        shape = (int(batch_size), n_kv_head, config.block_size, head_size)
        dtype = model.lm_head.weight.dtype
        self.layers = [LayerCache(self._lengths, shape, dtype) for _ in range(config.n_layer)]

    @property
    def lengths(self):
        """(B,) int64 array, a copy: the tokens that are held of each sequence."""
        return self._lengths.copy()

    def rewind(self, n):
        """Drop the last n tokens.

        Parameters
        ----------
        n : int or (B,) integer array
            For all sequences, or for each its own number; between 0 and the tokens that it holds.

        Raises
        ------
        InputError
            Before anything changes.
        """
        n = np.asarray(n)
        B = len(self._lengths)
        if n.dtype.kind not in "iu" or n.shape not in ((), (B,)):
            raise InputError(f"rewind: n is {n.dtype} {n.shape}, it must be an integer or integers ({B},)")
        for i, (count, length) in enumerate(zip(np.broadcast_to(n, B).tolist(), self._lengths.tolist())):
            if not 0 <= count <= length:
                raise InputError(
                    f"rewind: n is {count} for sequence {i}, it must be between 0 and its {length} tokens"
                )
        self._lengths -= n.astype(np.int64)

    def check(self, model, shape):
        """Raise unless tokens of this shape (B, T) can go through the model and into this cache."""
        B, T = shape
        if model is not self.model:
            raise InputError("the cache belongs to another model: make one with this model's new_cache")
        if len(self._lengths) != B:
            raise InputError(f"tokens are {B} sequences, the cache holds {len(self._lengths)}")
        longest, room = int(self._lengths.argmax()), self.layers[0].keys.shape[2]
        if self._lengths[longest] + T > room:
            raise InputError(
                f"the cache holds {self._lengths[longest]} tokens of sequence {longest}, and {T} more do not "
                f"fit the model's block_size of {room}: rewind it or make a new one"
            )

    def advance(self, n):
        """Count n tokens as held: their keys and values are in all layers."""
        self._lengths += n


class LayerCache:
    """One layer's keys and values (B, n_kv_head, block_size, head size).

    lengths : (B,) int64 array
        Tokens held of each sequence before those that the running forward pass adds.
    """

    def __init__(self, lengths, shape, dtype):
        self.lengths = lengths
        self.keys, self.values = np.zeros(shape, dtype), np.zeros(shape, dtype)

    def append(self, keys, values):
        """Put T new tokens' keys and values behind those that are held.

        Parameters
        ----------
        keys, values : (B, n_kv_head, T, head size) Tensors

        Returns
        -------
        keys, values : (B, n_kv_head, S, head size) Tensors
            All of them, S = the longest sequence's length with the new ones. Entry j of sequence b is that
            of its token j; those from lengths[b] + T on mean nothing.
        """
        rows = np.arange(len(self.lengths))[:, None]
        at = self.lengths[:, None] + np.arange(keys.shape[2])
        self.keys[rows, :, at] = keys.data.swapaxes(1, 2)
        self.values[rows, :, at] = values.data.swapaxes(1, 2)
        S = int(self.lengths.max()) + keys.shape[2]
        return as_tensor(self.keys[:, :, :S]), as_tensor(self.values[:, :, :S])
