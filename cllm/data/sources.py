"""Where data comes from: built-in texts, text files, folders of them, and token files.

A text is a list of `Document`; `decode` turns one into characters. Token files are memory-mapped.
"""

import json
import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cllm.data import cache
from cllm.data.tokenizers import MOST_TOKENS, tokenizer_from_dict
from cllm.errors import InputError, nearest

__all__ = ["BUILT_IN", "Document", "TokenFile", "decode", "documents", "token_files"]

STDLIB_SKIPPED = {"test", "idlelib", "lib2to3", "site-packages", "dist-packages"}
STDLIB_BYTES = 4_000_000


@dataclass(frozen=True)
class Document:
    """One text file: its name (relative, with "/"), its path for messages, and its bytes."""

    name: str
    path: str
    content: bytes


@dataclass(frozen=True)
class TokenFile:
    """One .bin file: its path, its tokens (memory-mapped, read-only), its bytes' hash, its largest token,
    and what its .json file says."""

    path: str
    array: np.ndarray
    sha256: str
    largest: int
    vocab_size: int | None
    tokenizer: object | None


def documents(source):
    """The documents of a built-in text, a UTF-8 file or a folder, sorted by name.

    Of a folder, all files in it and below count, but for hidden ones (".git"), empty ones, and binary ones,
    which are those with a zero byte in the first 8000 (git's rule).

    Parameters
    ----------
    source : str
        A built-in name goes first: a file of that name is "./python-stdlib".

    Raises
    ------
    InputError
        When nothing is there to read, or `source` is no known name.
    OSError
        When a file is missing or cannot be read.
    """
    if source in BUILT_IN:
        return BUILT_IN[source]()
    path = _expanded(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        found = [Document("", str(path), path.read_bytes())]
        if not found[0].content:
            raise InputError(f"{path} is empty; training needs UTF-8 text")
        return found
    if path.exists():
        raise InputError(f"{path} is neither a file nor a folder; training needs UTF-8 text files")
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"no such file or folder: {path}")
    raise InputError(
        f'"{source}" is neither a built-in text ({", ".join(BUILT_IN)}) nor an existing file or folder'
        + nearest(source, BUILT_IN)
    )


def decode(document):
    """A document's characters: UTF-8, without a byte order mark, every line ending read as "\\n".

    Raises
    ------
    InputError
        At bytes that are not UTF-8: names the file and the offset of the first.
    """
    try:
        text = document.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{document.path} is not UTF-8 text: byte 0x{document.content[error.start]:02x} at offset "
            f"{error.start} ({error.reason}); convert the file to UTF-8"
        ) from None
    text = text.removeprefix("\ufeff")
    # A checkout on Windows gives the same tokens, and no model spends a token on "\r".
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def token_files(source):
    """The token files of a .bin path or of a folder with train.bin and val.bin.

    Tokens are little-endian uint16, as nanoGPT writes them, unless a .json file of the same name beside
    the .bin says otherwise: ``{"dtype": "uint8" | "uint16" | "uint32", "vocab_size": N,
    "tokenizer": {...}, "sha256": "..."}``, each key optional; with the last, a file whose bytes have another
    hash is refused.

    Returns
    -------
    dict of str to TokenFile, or None
        Keys "train", "val" and, if there, "test" for a folder; "all" for one file. None: `source` is text.
    """
    if source in BUILT_IN:
        return None
    path = _expanded(source)
    if path.suffix == ".bin" and not path.is_dir():
        return {"all": _token_file(path)}
    if (path / "train.bin").is_file():
        names = [name for name in ("train", "val", "test") if name != "test" or (path / "test.bin").exists()]
        return {name: _token_file(path / f"{name}.bin") for name in names}
    return None


def _python_stdlib():
    """The running interpreter's own sources: pure ASCII files in path order, up to 4 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    found, size = [], 0
    for name in _names(root, skip=lambda folder: folder in STDLIB_SKIPPED):
        if not name.endswith(".py"):
            continue
        content = (root / name).read_bytes()
        if not content or not content.isascii():
            continue
        size += len(content)
        if size > STDLIB_BYTES:
            break
        found.append(Document(name, str(root / name), content))
    if not found:
        raise InputError(
            f"this Python has no .py files of its standard library in {root} (it may be zipped or stripped); "
            "set data.source to a UTF-8 text file or a folder of text files"
        )
    return found


BUILT_IN = {"python-stdlib": _python_stdlib}


def _expanded(source):
    """The source as a path, "~" written out."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        raise InputError(f"{source} names a home folder that there is not; use a full path") from None


def _folder(root):
    found = []
    for name in _names(root, skip=lambda folder: folder.startswith(".")):
        if name.rpartition("/")[2].startswith("."):
            continue
        content = (root / name).read_bytes()
        if content and b"\0" not in content[:8000]:
            found.append(Document(name, str(root / name), content))
    if not found:
        raise InputError(f"{root} has no text files; training needs UTF-8 text in it or in its subfolders")
    return found


def _names(root, skip):
    """Relative paths of the files below root, with "/", sorted; folders with skip(name) are left out."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not skip(name)]
        base = Path(folder)
        names += [path.relative_to(root).as_posix() for name in files if (path := base / name).is_file()]
    return sorted(names)


def _token_file(path):
    description = _sidecar(path.with_suffix(".json"))
    dtype = np.dtype(description.get("dtype", "uint16")).newbyteorder("<")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise InputError(
            f"{path} has {size} bytes; a {dtype.name} token file has a positive multiple of {dtype.itemsize}"
        )
    sha256, largest = cache.scan(path, dtype)
    if sha256 != description.get("sha256", sha256):
        raise InputError(
            f"{path} is damaged or another file: its SHA-256 is {sha256}, "
            f"{path.with_suffix('.json').name} says {description['sha256']}"
        )
    tokenizer, vocab_size = None, description.get("vocab_size")
    if "tokenizer" in description:
        name = f"tokenizer in {path.with_suffix('.json')}"
        tokenizer = tokenizer_from_dict(description["tokenizer"], name)
        if vocab_size is not None and vocab_size < tokenizer.vocab_size:
            raise InputError(f"{name} has {tokenizer.vocab_size} tokens, and vocab_size is only {vocab_size}")
    return TokenFile(
        path=str(path),
        array=np.asarray(np.memmap(path, dtype, mode="r")),
        sha256=sha256,
        largest=largest,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
    )


def _sidecar(path):
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    known = {"dtype", "sha256", "tokenizer", "vocab_size"}
    if not isinstance(description, dict) or set(description) - known:
        raise InputError(f"{path} must be a JSON object with keys among {', '.join(sorted(known))}")
    if description.get("dtype", "uint16") not in ("uint8", "uint16", "uint32"):
        raise InputError(f"{path}: dtype is {description['dtype']!r}; it must be uint8, uint16 or uint32")
    vocab_size = description.get("vocab_size", 1)
    if type(vocab_size) is not int or not 1 <= vocab_size <= MOST_TOKENS:
        raise InputError(f"{path}: vocab_size is {vocab_size!r}; it must be an integer from 1 to 2^32")
    sha256 = description.get("sha256", "0" * 64)
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(f"{path}: sha256 is {sha256!r}; it must be 64 hexadecimal digits in lower case")
    return description
