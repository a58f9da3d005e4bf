"""Named arrays in a file of the safetensors format: eight bytes, the length of a JSON header; that; the data.

Written and hashed in one pass. On reading, each size that the header claims is checked against the file's
own before anything is allocated for it. https://huggingface.co/docs/safetensors has the format; here BF16
and float8, which NumPy lacks, are refused.
"""

import hashlib
import json
import os
import re
from math import prod
from pathlib import Path

import numpy as np

from cllm import files
from cllm.errors import InputError

__all__ = ["MAX_HEADER", "check_name", "header", "read", "write"]

# Bytes, which are 10 000 arrays. JSON made for it becomes objects of 33 times its length in memory.
MAX_HEADER = 1 << 20
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_DTYPES = {name: np.dtype(code) for name, code in _DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# A reader that makes files of names must not be led out of its folder.
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]|^$|^/|^__metadata__$|(^|/)\.\.?(/|$)")


def check_name(name):
    """Raise an InputError unless an array may have this name: no control character, no path trick."""
    if not isinstance(name, str) or _BAD_NAME.search(name):
        raise InputError(
            f"{name!r} cannot be an array's name, which is a text without control characters, "
            'backslashes, a leading "/" and parts "." or ".."'
        )


def write(path, arrays):
    """Write a new file, forced to the disk.

    Parameters
    ----------
    path : path-like
        Nothing may be there.
    arrays : dict of str to ndarray
        Numbers or bools of up to 8 bytes. Equal dicts give equal files, whatever their order.

    Returns
    -------
    str
        The file's SHA-256 in hexadecimal digits.

    Raises
    ------
    InputError
        For a name or dtype that the format lacks, or too many arrays; nothing has been written then.
    OSError
        Names the file.
    """
    entries, data, end = {}, [], 0
    found = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in found.items():
        check_name(name)
        if array.dtype.newbyteorder("<") not in _NAMES:
            raise InputError(f"{name!r} is an array of {array.dtype}, which safetensors has not")
    # The widest first: the header's length is a multiple of 8, so that each array is aligned.
    for name in sorted(found, key=lambda name: (-found[name].itemsize, name)):
        array = found[name]
        dtype = array.dtype.newbyteorder("<")
        array = np.asarray(array, dtype, order="C")
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        data.append(array.reshape(-1).view(np.uint8))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise InputError(
            f"{len(found)} arrays need a header of {len(text)} bytes, it has at most {MAX_HEADER}"
        )
    return files.create(path, [len(text).to_bytes(8, "little"), text, *data])


def header(path):
    """What a file holds, without its data.

    Returns
    -------
    dict of str to (dtype, tuple)
        Each array's dtype and shape, in the order of the data.

    Raises
    ------
    InputError
        When the file is damaged: names it.
    """
    with open(path, "rb", buffering=0) as file:
        entries, _ = _entries(file, Path(path))
    return {name: (dtype, shape) for name, (dtype, shape, _, _) in entries.items()}


def read(path):
    """All arrays of a file, and its hash.

    No more memory is allocated than the arrays' bytes, which are the file's, and what the header takes.

    Returns
    -------
    arrays : dict of str to ndarray
        Writable, and the caller's own.
    sha256 : str
        Of what was read, in hexadecimal digits.

    Raises
    ------
    InputError
        When the file is damaged: names it.
    OSError
        When it cannot be read.
    """
    path, arrays = Path(path), {}
    with open(path, "rb", buffering=0) as file:
        entries, head = _entries(file, path)
        digest = hashlib.sha256(head)
        for name, (dtype, shape, _, _) in entries.items():
            arrays[name] = np.empty(shape, dtype)
            view = memoryview(arrays[name].reshape(-1).view(np.uint8))
            for start in range(0, len(view), files.CHUNK):
                _fill(file, view[start : start + files.CHUNK], path)
                digest.update(view[start : start + files.CHUNK])
    return arrays, digest.hexdigest()


def _fill(file, view, path):
    while view:
        n = file.readinto(view)
        if not n:
            raise InputError(f"{path} is damaged: it became shorter while it was read")
        view = view[n:]


def _entries(file, path):
    """The checked header, name -> (dtype, shape, begin, end) in the order of the data; and its bytes."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise InputError(f"{path} is damaged: it has {size} bytes, a safetensors file at least 8")
    head = bytearray(8)
    _fill(file, memoryview(head), path)
    length = int.from_bytes(head, "little")
    if length > min(size - 8, MAX_HEADER):
        most = f"at most {MAX_HEADER}" if length <= size - 8 else f"the file has {size}"
        raise InputError(f"{path} is damaged: its header would have {length} bytes, {most}")
    head += bytes(length)
    _fill(file, memoryview(head)[8:], path)
    try:
        found = json.loads(head[8:].decode(), object_pairs_hook=_once, parse_constant=_refuse)
        metadata = found.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not texts")
        entries = dict(sorted(map(_entry, found.items()), key=lambda item: item[1][2:]))
        end = 0
        for name, (_, _, begin, stop) in entries.items():
            if begin != end:
                raise ValueError(f"{name!r} begins at byte {begin} of the data, and not at {end}")
            end = stop
        if end != size - 8 - length:
            raise ValueError(f"its arrays have {end} bytes, and the file {size - 8 - length} for them")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is damaged: its header cannot be used ({said})") from None
    return entries, head


def _entry(item):
    """One array of a header, checked by itself."""
    name, entry = item
    check_name(name)
    dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not (type(shape) is type(offsets) is list and len(entry) == 3 and len(offsets) == 2):
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    if len(shape) > 64:
        raise ValueError(f"{name!r} has {len(shape)} dimensions, NumPy's arrays have up to 64")
    if any(type(n) is not int or n < 0 or n >= 2**63 for n in (*shape, *offsets)):
        raise ValueError(f"{name!r} has a size that is not a whole number of at least 0")
    if prod(n for n in shape if n) * dtype.itemsize >= 2**63:  # NumPy refuses it even beside a 0
        raise ValueError(f"{name!r} is too large")
    if prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"{name!r} is {dtype} of shape {shape} in {offsets[1] - offsets[0]} bytes")
    return name, (dtype, tuple(shape), *offsets)


def _once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _refuse(constant):
    raise ValueError(f"{constant} is no number of JSON")
