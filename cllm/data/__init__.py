"""Text to tokens, split and cached, and tokens to batches.

>>> text = load("python-stdlib", tokenizer="char", val_fraction=0.1)
>>> inputs, targets = text.train.batch(0, batch_size=12, block_size=64, seed=1337)
"""

import hashlib
import math
import os
import warnings
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from cllm.data import cache, sources
from cllm.data.batch import Batch, Examples
from cllm.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    IdTokenizer,
    load_tokenizer,
    tokenizer_from_dict,
)
from cllm.data.tokens import Tokens
from cllm.errors import InputError

__all__ = [
    "Batch", "ByteTokenizer", "CharTokenizer", "DataConfig", "Examples", "IdTokenizer", "Text", "Tokens",
    "load", "tokenizer_from_dict",
]  # fmt: skip

# Raise it when the same input would give other tokens or splits: old cache entries are then not found.
VERSION = 1
CHUNK = 1 << 20  # characters encoded at once


@dataclass(frozen=True)
class DataConfig:
    """[data]: what is read and how it is cut.

    Parameters
    ----------
    source : str
        A built-in name ("python-stdlib"), a UTF-8 text file, a folder of text files, a .bin token file, or
        a folder with train.bin and val.bin.
    tokenizer : str
        "char" (one token for each character that the text has), "byte", or the path of a tokenizer.json.
    val_fraction, test_fraction : float
        Shares of the text kept from training.
    """

    source: str = "python-stdlib"
    tokenizer: str = "char"
    val_fraction: float = 0.1
    test_fraction: float = 0.0

    def __post_init__(self):
        for name in ("source", "tokenizer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise InputError(f"data.{name} is {value!r}; it must be a name or a path")
        for name in ("val_fraction", "test_fraction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise InputError(f"data.{name} is {value!r}; it must be a number from 0 to below 1")
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError(
                f"data.val_fraction + data.test_fraction is {self.val_fraction + self.test_fraction:g}; "
                "it must be below 1, so that something is left to train on"
            )


@dataclass(frozen=True)
class Text:
    """A tokenised text in three splits; `load` makes it.

    `hash` stands for all that the tokens follow from: contents, tokenizer, fractions.
    """

    source: str
    hash: str
    tokenizer: object = field(repr=False)
    vocab_size: int
    train: Tokens
    val: Tokens
    test: Tokens


def load(
    source,
    tokenizer=DataConfig.tokenizer,
    val_fraction=DataConfig.val_fraction,
    test_fraction=DataConfig.test_fraction,
):
    """Read, split and tokenise a text; what was tokenised before comes memory-mapped from the cache.

    How a text is split:

    - Several documents (a folder, a built-in text): each goes where a hash of its name says, so that it stays
      there whatever is added beside it. A split's documents are joined with a line break between.
    - One document, or so few that a split would have none: by place, in the order train, test, validation.
      The last `val_fraction` of the characters is validation, the `test_fraction` before it is test.
    - A .bin file: by place. A folder with train.bin, val.bin and perhaps test.bin: as it is.

    The char tokenizer's vocabulary is the characters of all splits. Line endings are read as "\\n".
    A token file keeps its own tokens: "char" then stands for the tokenizer that its .json file describes,
    or for bare token ids.

    Parameters
    ----------
    source : str or path-like
    tokenizer : str
    val_fraction, test_fraction : float
        As in `DataConfig`.

    Returns
    -------
    Text

    Raises
    ------
    InputError
        When the source cannot be used: empty, not UTF-8, an unknown name, a character that a given
        tokenizer lacks.
    OSError
        When a file is missing or cannot be read.

    Warns
    -----
    UserWarning
        When the cache cannot be written; the tokens are then kept in memory.
    """
    config = DataConfig(os.fspath(source), os.fspath(tokenizer), val_fraction, test_fraction)
    given = {"char": None, "byte": ByteTokenizer()}
    given = given[tokenizer] if tokenizer in given else load_tokenizer(tokenizer)
    files = sources.token_files(config.source)
    if files is not None:
        return _from_token_files(files, given, config)

    documents = sources.documents(config.source)
    names = [(document.name, hashlib.sha256(document.content).hexdigest()) for document in documents]
    key = _hash(names, given.to_dict() if given else "char", config)
    cached = cache.read(key)
    if cached is None:
        array, description = _tokenise(documents, given, config)
        cached = _cached(key, array, description)
    array, description = cached
    tokenizer = tokenizer_from_dict(description["tokenizer"])
    splits, start = {}, 0
    for name, length in description["lengths"].items():
        splits[name] = Tokens(array[start : start + length], name)
        start += length
    return Text(config.source, key, tokenizer, tokenizer.vocab_size, **splits)


def _cached(key, array, description):
    """Write to the cache and read back, so that later runs and this one use the same mapped file."""
    try:
        cache.write(key, array, description)
    except OSError as error:
        warnings.warn(
            f"the token cache cannot be written ({error}), so the tokens stay in memory and are made "
            "again in each run; set CLLM_CACHE to a folder that can be written",
            stacklevel=3,
        )
    return cache.read(key) or (array, description)


def _tokenise(documents, tokenizer, config):
    """All splits' tokens in one array of the smallest dtype, and the description that the cache keeps."""
    texts = [sources.decode(document) for document in documents]
    if not any(texts):
        raise InputError(f"{documents[0].path} has no text but a byte order mark")
    if tokenizer is None:
        tokenizer = CharTokenizer(set("\n" if len(texts) > 1 else "").union(*texts))
    else:
        for document, text in zip(documents, texts):
            tokenizer.check(text, document.path)
    dtype = _smallest_dtype(tokenizer.vocab_size)
    splits = {
        name: [tokenizer.encode(text[i : i + CHUNK]).astype(dtype) for i in range(0, len(text), CHUNK)]
        for name, text in _split([document.name for document in documents], texts, config).items()
    }
    description = {
        "dtype": dtype.str,
        "lengths": {name: sum(map(len, pieces)) for name, pieces in splits.items()},
        "tokenizer": tokenizer.to_dict(),
    }
    return np.concatenate([piece for pieces in splits.values() for piece in pieces]), description


def _split(names, texts, config):
    """The three splits' texts, by a hash of each document's name or else by place; see `load`."""
    wanted = {"train": True, "val": config.val_fraction > 0, "test": config.test_fraction > 0}
    groups = {name: [] for name in wanted}
    for name, text in zip(names, texts):
        place = _fraction(name)
        if place < config.val_fraction:
            groups["val"].append(text)
        elif place < config.val_fraction + config.test_fraction:
            groups["test"].append(text)
        else:
            groups["train"].append(text)
    if all(groups[name] for name in wanted if wanted[name]):
        return {name: "\n".join(group) for name, group in groups.items()}
    text = "\n".join(texts)
    return {name: text[cut] for name, cut in _cuts(len(text), config).items()}


def _fraction(name):
    """A document's place in [0, 1): the first 53 bits of the SHA-256 of its name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _cuts(n, config):
    """Where a text of n characters (or n tokens) is cut: train, test, validation."""
    val, test = (Fraction(str(share)) for share in (config.val_fraction, config.test_fraction))
    train_end, test_end = math.floor(n * (1 - val - test)), math.floor(n * (1 - val))
    return {"train": slice(0, train_end), "val": slice(test_end, n), "test": slice(train_end, test_end)}


def _from_token_files(files, tokenizer, config):
    described = next(iter(files.values()))
    tokenizer = tokenizer or described.tokenizer
    largest = max(int(file.array.max()) for file in files.values())
    tokenizer = tokenizer or IdTokenizer(described.vocab_size or largest + 1)
    vocab_size = max(described.vocab_size or 0, tokenizer.vocab_size)
    for file in files.values():
        if file.array.max() >= vocab_size:
            position = int((file.array >= vocab_size).argmax())
            raise InputError(
                f"{file.path} has token {file.array[position]} at position {position}, but the vocabulary "
                f"has {vocab_size} tokens, 0 to {vocab_size - 1}"
            )
    if "all" in files:
        array = files["all"].array
        splits = {name: array[cut] for name, cut in _cuts(len(array), config).items()}
    else:
        splits = {"test": described.array[:0]} | {name: file.array for name, file in files.items()}
    names = [
        (name, file.array.dtype.str, hashlib.sha256(file.array.data).hexdigest())
        for name, file in files.items()
    ]
    return Text(
        config.source,
        _hash(names, [vocab_size, tokenizer.to_dict()], config),
        tokenizer,
        vocab_size,
        **{name: Tokens(array, name) for name, array in splits.items()},
    )


def _hash(names, tokenizer, config):
    return hashlib.sha256(
        repr((VERSION, names, tokenizer, float(config.val_fraction), float(config.test_fraction))).encode()
    ).hexdigest()


def _smallest_dtype(vocab_size):
    return np.dtype("<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")
