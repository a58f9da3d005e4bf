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
from cllm.data.batch import Batch, Examples, Sequences
from cllm.data.pool import BatchPool
from cllm.data.producer import Producer
from cllm.data.queue import BatchQueue, QueueClosed
from cllm.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    IdTokenizer,
    load_tokenizer,
    tokenizer_from_dict,
)
from cllm.data.tokens import Tokens
from cllm.errors import InputError, nearest

__all__ = [
    "Batch", "BatchPool", "BatchQueue", "ByteTokenizer", "CharTokenizer", "DataConfig", "Examples",
    "IdTokenizer", "Producer", "QueueClosed", "Sequences", "Text", "Tokens", "load", "tokenizer_from_dict",
]  # fmt: skip

# Raise it when the same input would give other tokens or splits: old cache entries are then not found.
VERSION = 1
CHUNK = 1 << 20  # characters encoded at once
PACKINGS = ("windows", "documents", "padded")


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
    packing : "windows", "documents" or "padded"
        Windows of the text as one stream; the same, but no document's first token is predicted from the one
        before it (attention still reaches there); or a row for each document, padded, and several for one of
        more than block_size tokens.
    eos : int, optional
        The token that ends a document. Without it, the documents are the files of a folder or built-in text.
    """

    source: str = "python-stdlib"
    tokenizer: str = "char"
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    packing: str = "windows"
    eos: int | None = None

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
        if self.packing not in PACKINGS:
            raise InputError(
                f'data.packing is "{self.packing}"{nearest(self.packing, PACKINGS)}; '
                f"it must be of {', '.join(PACKINGS)}"
            )
        if self.eos is not None and self.packing == "windows":
            raise InputError(
                f'data.eos is {self.eos}, but data.packing is "windows", which knows no documents; '
                'set data.packing to "documents" or "padded"'
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
    packing=DataConfig.packing,
    eos=DataConfig.eos,
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
    packing : str
    eos : int, optional
        As in `DataConfig`.

    Returns
    -------
    Text

    Raises
    ------
    InputError
        When the source cannot be used: empty, not UTF-8, an unknown name, a character that a given
        tokenizer lacks, documents asked for where there is one or their ends are not known.
    OSError
        When a file is missing or cannot be read.

    Warns
    -----
    UserWarning
        When the cache cannot be written, and the tokens are kept in memory; when what it has is damaged, and
        is made again.
    """
    config = DataConfig(os.fspath(source), os.fspath(tokenizer), val_fraction, test_fraction, packing, eos)
    given = {"char": None, "byte": ByteTokenizer()}
    given = given[tokenizer] if tokenizer in given else load_tokenizer(tokenizer)
    files = sources.token_files(config.source)
    if files is not None:
        return _from_token_files(files, given, config)

    documents = sources.documents(config.source)
    if packing != "windows" and eos is None and len(documents) == 1:
        raise InputError(
            f'data.packing is "{packing}", but {config.source} is one document; '
            "set data.eos to the token that ends one, or use a folder of files"
        )
    names = [(document.name, hashlib.sha256(document.content).hexdigest()) for document in documents]
    key = _hash(names, given.to_dict() if given else "char", config)
    cached = cache.read(key)
    if cached is None or "documents" not in cached[1]:  # as older versions wrote it
        array, description = _tokenise(documents, given, config)
        cached = _cached(key, array, description)
    array, description = cached
    tokenizer = tokenizer_from_dict(description["tokenizer"])
    splits, start = {}, 0
    for name, length in description["lengths"].items():
        places = description["documents"][name]
        splits[name] = _tokens(array[start : start + length], name, config, tokenizer.vocab_size, places)
        start += length
    return Text(config.source, key, tokenizer, tokenizer.vocab_size, **splits)


def _tokens(array, name, config, vocab_size, documents=None):
    """A split's Tokens, with the documents that the configuration wants."""
    if config.packing == "windows":
        return Tokens(array, name)
    if config.eos is not None and not 0 <= config.eos < vocab_size:
        raise InputError(
            f"data.eos is {config.eos}, but the vocabulary has {vocab_size} tokens, 0 to {vocab_size - 1}"
        )
    documents = documents if config.eos is None else None
    return Tokens(array, name, documents=documents, end=config.eos, padded=config.packing == "padded")


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
        return array, description
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
    pieces, lengths, places = [], {}, {}
    for name, group in _split([document.name for document in documents], texts, config).items():
        lengths[name], places[name] = 0, []
        for text in group:
            places[name].append(lengths[name])
            for i in range(0, len(text), CHUNK):
                pieces.append(tokenizer.encode(text[i : i + CHUNK]).astype(dtype))
                lengths[name] += len(pieces[-1])
    description = {
        "dtype": dtype.str,
        "lengths": lengths,
        "documents": places,  # where they begin in their split
        "tokenizer": tokenizer.to_dict(),
    }
    return np.concatenate(pieces), description


def _split(names, texts, config):
    """The documents of the three splits, by a hash of each one's name or else by place; see `load`."""
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
        return {name: _joined(group) for name, group in groups.items()}
    texts = _joined(texts)
    splits = {name: [] for name in wanted}
    for name, cut in _cuts(sum(map(len, texts)), config).items():
        place = 0
        for text in texts:
            part = text[max(cut.start - place, 0) : max(cut.stop - place, 0)]
            splits[name] += [part] if part else []
            place += len(text)
    return splits


def _joined(texts):
    """The texts, each but the last with the line break that stands between it and the next."""
    return [f"{text}\n" for text in texts[:-1]] + texts[-1:]


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
    if config.packing != "windows" and config.eos is None:
        raise InputError(
            f'data.packing is "{config.packing}", but a token file does not say where documents end; '
            "set data.eos to the token that ends one"
        )
    described = next(iter(files.values()))
    tokenizer = tokenizer or described.tokenizer
    largest = max(file.largest for file in files.values())
    tokenizer = tokenizer or IdTokenizer(described.vocab_size or largest + 1)
    vocab_size = max(described.vocab_size or 0, tokenizer.vocab_size)
    for file in files.values():
        if file.largest >= vocab_size:
            position = _first_above(file.array, vocab_size - 1)
            raise InputError(
                f"{file.path} has token {file.array[position]} at position {position}, but the vocabulary "
                f"has {vocab_size} tokens, 0 to {vocab_size - 1}"
            )
    if "all" in files:
        array = files["all"].array
        splits = {name: array[cut] for name, cut in _cuts(len(array), config).items()}
    else:
        splits = {"test": described.array[:0]} | {name: file.array for name, file in files.items()}
    names = [(name, file.array.dtype.str, file.sha256) for name, file in files.items()]
    return Text(
        config.source,
        _hash(names, [vocab_size, tokenizer.to_dict()], config),
        tokenizer,
        vocab_size,
        **{name: _tokens(array, name, config, vocab_size) for name, array in splits.items()},
    )


def _first_above(array, most):
    """The place of the first token above `most`, found in pieces; there is one."""
    for i in range(0, len(array), CHUNK):
        above = array[i : i + CHUNK] > most
        if above.any():
            return i + int(above.argmax())


def _hash(names, tokenizer, config):
    return hashlib.sha256(
        repr((VERSION, names, tokenizer, float(config.val_fraction), float(config.test_fraction))).encode()
    ).hexdigest()


def _smallest_dtype(vocab_size):
    return np.dtype("<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")
