"""Text to tokens and back: one token a character, one a byte, or bare token ids.

A tokenizer has `encode`, `decode`, `check`, `byte_lengths`, `vocab_size` and `to_dict`; what `to_dict`
returns is JSON, and `tokenizer_from_dict` makes the same tokenizer from it.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from cllm.errors import InputError, nearest

__all__ = [
    "ByteTokenizer", "CharTokenizer", "IdTokenizer", "digest", "load_tokenizer", "tokenizer_from_dict",
]  # fmt: skip

MOST_TOKENS = 1 << 32  # what the widest tokens of a file can tell apart


class CharTokenizer:
    """One token for each character (Unicode code point) that the text has.

    Parameters
    ----------
    characters : iterable of str
        The vocabulary; token ids follow the code points' order. A text serves: ``CharTokenizer(text)``.

    Raises
    ------
    InputError
        When there is no character.
    """

    def __init__(self, characters):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise InputError("a char tokenizer needs at least one character")
        points = _code_points(self.characters)
        self._points = points
        self._ids = np.full(int(points[-1]) + 2, -1, np.int32)  # the last entry stands for all above
        self._ids[points] = np.arange(len(points))

    @property
    def vocab_size(self):
        return len(self.characters)

    def encode(self, text):
        """The text's tokens, int64 (len(text),).

        Raises
        ------
        InputError
            When a character is not in the vocabulary: names it, its code point and its position.
        """
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if len(ids) and ids.min() < 0:
            self.check(text)
        return ids.astype(np.int64)

    def check(self, text, name="the text"):
        """Raise an InputError about the text's first character that has no token, if there is one."""
        unknown = set(text).difference(self.characters)
        if unknown:
            position = min(text.index(character) for character in unknown)
            character = text[position]
            raise InputError(
                f"{name} has the character {character!a} (U+{ord(character):04X}) at position "
                f"{position}, but this tokenizer knows only the {self.vocab_size} characters that it was "
                f"trained on: {_excerpt(self.characters)}"
            )

    def decode(self, tokens):
        """The tokens' text. Raises an InputError for a token outside the vocabulary."""
        points = self._points[_checked(tokens, self.vocab_size)]
        return points.tobytes().decode("utf-32-le", "surrogatepass")

    def byte_lengths(self):
        """How many bytes of UTF-8 each token stands for, int64 (vocab_size,)."""
        # A character has one more byte from each of these code points on.
        return 1 + np.searchsorted([0x80, 0x800, 0x10000], self._points, side="right")

    def to_dict(self):
        return {"type": "char", "characters": self.characters}


class ByteTokenizer:
    """One token for each byte of the text's UTF-8 form; 256 tokens."""

    vocab_size = 256

    def encode(self, text):
        """The text's tokens, int64. Raises an InputError for a character that UTF-8 cannot write."""
        try:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        except UnicodeEncodeError:
            return self.check(text)

    def check(self, text, name="the text"):
        """Raise an InputError about the text's first lone surrogate, if there is one."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{name} has a lone surrogate (U+{ord(text[error.start]):04X}) at position {error.start}, "
                "which UTF-8 cannot write"
            ) from None

    def decode(self, tokens):
        """The tokens' text; bytes that are not UTF-8 (a sample may stop within a character) become U+FFFD."""
        return _checked(tokens, 256).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def byte_lengths(self):
        """How many bytes of UTF-8 each token stands for, int64 (256,): one."""
        return np.ones(256, np.int64)

    def to_dict(self):
        return {"type": "byte"}


class IdTokenizer:
    """Tokens of a .bin file whose own tokenizer is not known: its text is the ids, ``"17 4 256"``."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        """The tokens that the text's numbers name, int64. Raises an InputError for anything else."""
        try:
            tokens = np.array([int(word) for word in text.split()], np.int64)
        except (ValueError, OverflowError):
            raise InputError(
                "this model was trained on a token file without a tokenizer: "
                f"text must be token ids from 0 to {self.vocab_size - 1} with spaces between"
            ) from None
        return _checked(tokens, self.vocab_size)

    def check(self, text, name="the text"):
        """Raise an InputError when the text is not token ids of this vocabulary."""
        self.encode(text)

    def decode(self, tokens):
        return " ".join(map(str, _checked(tokens, self.vocab_size).tolist()))

    def byte_lengths(self):
        """None: what the tokens stand for is not known."""
        return None

    def to_dict(self):
        return {"type": "ids", "vocab_size": self.vocab_size}


def tokenizer_from_dict(description, name="the tokenizer"):
    """The tokenizer that ``to_dict`` described.

    Raises
    ------
    InputError
        When the description is not one; its message begins with `name`.
    """
    match description:
        case {"type": "char", "characters": str(characters)} if characters:
            tokenizer = CharTokenizer(characters)
            if tokenizer.characters != characters:  # or else the ids would be of other characters
                raise InputError(f"{name}: characters must ascend by their code points, and be there once")
            return tokenizer
        case {"type": "byte"}:
            return ByteTokenizer()
        case {"type": "ids", "vocab_size": int(vocab_size)} if 0 < vocab_size <= MOST_TOKENS:
            return IdTokenizer(vocab_size)
    raise InputError(
        f'{name} is not a tokenizer\'s description: it must be {{"type": "char", "characters": "..."}}, '
        '{"type": "byte"} or {"type": "ids", "vocab_size": N}'
    )


def load_tokenizer(path):
    """The tokenizer in a tokenizer.json. Raises InputError or OSError."""
    path = Path(path)
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f'tokenizer "{path}" is neither "char" nor "byte" nor an existing tokenizer.json'
            + nearest(path, ("char", "byte"))
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a tokenizer.json: {error}") from None
    return tokenizer_from_dict(description, str(path))


def digest(tokenizer):
    """The SHA-256 of all that a tokenizer is, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode()).hexdigest()


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _checked(tokens, vocab_size):
    """Tokens as an int64 array, all inside the vocabulary."""
    tokens = np.asarray(tokens).reshape(-1)
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"tokens are {tokens.dtype}; they must be integers")
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        position = int(outside.argmax())
        raise InputError(
            f"token {tokens[position]} at position {position} is outside the vocabulary: "
            f"tokens go from 0 to {vocab_size - 1}"
        )
    return tokens.astype(np.int64)


def _excerpt(characters, most=80):
    return ascii(characters) if len(characters) <= most else f"{characters[:most]!a}, ..."
