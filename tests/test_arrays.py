"""Files of arrays: exact both ways with the safetensors library, and no header leads the reader astray."""

import hashlib
import json
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cllm import arrays
from cllm.errors import InputError

DTYPES = [
    np.float64, np.float32, np.float16, np.complex64, np.int64, np.int32, np.int16, np.int8, np.uint64,
    np.uint32, np.uint16, np.uint8, np.bool_,
]  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\/"), min_size=1).filter(
    lambda name: name not in (".", "..", "__metadata__")
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ARRAYS = st.dictionaries(
    NAMES, st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)), max_size=6
)


def same(given, found):
    assert given.keys() == found.keys()
    for name, array in given.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def file_of(path, header, data=b""):
    """A file with a header of JSON values, a text or bytes, and data."""
    if not isinstance(header, (bytes, str)):
        header = json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def parts_of(path):
    """A file's header as JSON values, and its data."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("arrays")


# With the library -----------------------------------------------------------------------------------


@given(ARRAYS)
def test_what_we_write_all_read(folder, given):
    path = folder / "ours"
    path.unlink(missing_ok=True)
    sha256 = arrays.write(path, given)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    same(given, safetensors.numpy.load_file(path))
    found, again = arrays.read(path)
    same(given, found)
    assert again == sha256
    assert arrays.header(path) == {name: (array.dtype, array.shape) for name, array in given.items()}
    for array in found.values():
        assert array.flags.writeable and array.flags.owndata and array.flags.c_contiguous


# Of no arrays and an empty dict, the library (0.8.0) makes a header that it refuses itself.
@given(ARRAYS, st.none() | st.dictionaries(st.text(), st.text(), min_size=1, max_size=3))
def test_what_the_library_writes_we_read(folder, given, metadata):
    path = folder / "theirs"
    safetensors.numpy.save_file(given, path, metadata)
    found, sha256 = arrays.read(path)
    same(given, found)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_views_and_foreign_byte_orders(tmp_path):
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    given = {"transposed": base.T, "strided": base[::2, ::-3], "big": base.astype(">i4"), "list": [1.5, 2.5]}
    arrays.write(tmp_path / "file", given)
    for found in (arrays.read(tmp_path / "file")[0], safetensors.numpy.load_file(tmp_path / "file")):
        for name, array in given.items():
            assert np.array_equal(found[name], array)
        assert found["big"].dtype == np.dtype("<i4")


def test_equal_arrays_make_equal_files(tmp_path):
    generator = np.random.default_rng(0)
    given = {f"{i}.{dtype.__name__}": np.ones(generator.integers(9), dtype) for i, dtype in enumerate(DTYPES)}
    arrays.write(tmp_path / "a", given)
    arrays.write(tmp_path / "b", dict(reversed(given.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # Each array begins where its numbers may lie in memory.
    header, data = parts_of(tmp_path / "a")
    begin = (tmp_path / "a").stat().st_size - len(data)
    for name, found in header.items():
        assert (begin + found["data_offsets"][0]) % given[name].itemsize == 0


@pytest.mark.parametrize(
    "name",
    ["", "..", ".", "../up", "a/../b", "a/.", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\x7f", "\ud800",
     "__metadata__", 3],
)  # fmt: skip
def test_names_that_could_lead_astray_are_not_written(tmp_path, name):
    with pytest.raises(InputError, match="cannot be an array's name"):
        arrays.write(tmp_path / "file", {"fine": np.ones(2), name: np.ones(2)})
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    "array", [np.array(["text"]), np.array([None]), np.zeros(2, np.complex128), np.zeros(2, "M8[s]")]
)
def test_dtypes_that_the_format_lacks_are_not_written(tmp_path, array):
    with pytest.raises(InputError, match=r"'bad' is an array of .*, which safetensors has not"):
        arrays.write(tmp_path / "file", {"fine": np.ones(2), "bad": array})
    assert not (tmp_path / "file").exists()


def test_more_arrays_than_a_header_holds_are_not_written(tmp_path):
    many = dict.fromkeys(map(str, range(30_000)), np.ones(1))
    with pytest.raises(InputError, match=r"30000 arrays need a header of .* bytes, it has at most 1048576"):
        arrays.write(tmp_path / "file", many)
    assert not (tmp_path / "file").exists()


def test_nothing_is_overwritten(tmp_path):
    arrays.write(tmp_path / "file", {"a": np.ones(2)})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(FileExistsError, match="file"):
        arrays.write(tmp_path / "file", {"a": np.zeros(2)})
    assert (tmp_path / "file").read_bytes() == before


# Hostile headers ------------------------------------------------------------------------------------

FOUR = b"\0" * 4
ENTRY = json.dumps(entry())
DEEP = '{"a":' + "[" * 100_000
BAD = {
    "not JSON": ("{", b"", "Expecting"),
    "nothing": ("", b"", "Expecting value"),
    "no object": ([1], b"", ""),
    "not UTF-8": (b'{"\xff":{}}', b"", "can't decode"),
    "more than JSON": ('{} {"a":1}', b"", "Extra data"),
    "deep": (DEEP, b"", "recursion"),
    "a name twice": (f'{{"a":{ENTRY},"a":{ENTRY}}}', FOUR, "twice"),
    "a key twice": ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR, "twice"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR, "dtype"),
    "one key more": ({"a": entry() | {"more": 1}}, FOUR, "not described"),
    "no entry": ({"a": None}, b"", ""),
    "an entry that is a list": ({"a": ["F32", [1], [0, 4]]}, FOUR, ""),
    "an unknown dtype": ({"a": entry(dtype="O")}, FOUR, "'O'"),
    "a dtype that NumPy lacks": ({"a": entry((2,), dtype="BF16")}, FOUR, "BF16"),
    "a dtype that is no text": ({"a": entry(dtype=["F32"])}, FOUR, "unhashable"),
    "an empty dict as shape": ({"a": entry() | {"shape": {}}}, FOUR, "not described"),
    "an empty text as shape": ({"a": entry() | {"shape": ""}}, FOUR, "not described"),
    "a shape that is a number": ({"a": entry() | {"shape": 1}}, FOUR, "not described"),
    "too many dimensions": ({"a": entry([1] * 65)}, FOUR, "65 dimensions"),
    "a negative size": ({"a": entry((-1,), (4, 0))}, FOUR, "at least 0"),
    "two negative sizes": ({"a": entry((-1, -1))}, FOUR, "at least 0"),
    "a negative offset": ({"a": entry((1,), (-4, 0))}, FOUR, "at least 0"),
    "a fraction": ({"a": entry((1.0,))}, FOUR, "at least 0"),
    "a bool": ({"a": entry((True,))}, FOUR, "at least 0"),
    "a text": ({"a": entry(("1",))}, FOUR, "at least 0"),
    "infinity": ('{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', FOUR, "no number of JSON"),
    "a number of 5000 digits": (
        f'{{"a":{{"dtype":"F32","shape":[1{"0" * 5000}],"data_offsets":[0,4]}}}}', FOUR, "4300 digits",
    ),
    "a huge size": ({"a": entry((2**62,))}, FOUR, "too large"),
    "a product that wraps to 4 bytes": ({"a": entry((2**32, 2**32, 1))}, FOUR, "too large"),
    "a huge size beside none": ({"a": entry((0, 2**62), (0, 0))}, b"", "too large"),
    "more than its offsets": ({"a": entry((2,))}, FOUR, r"float32 of shape \[2\] in 4 bytes"),
    "huge offsets": ({"a": entry((2**40,), (0, 2**42))}, FOUR, "have 4398046511104 bytes, and the file 4 "),
    "an offset behind the end": ({"a": entry((1,), (4, 8))}, FOUR, "begins at byte 4 of the data"),
    "reversed offsets": ({"a": entry((1,), (4, 0))}, FOUR, "in -4 bytes"),
    "three offsets": ({"a": entry((1,), (0, 4, 4))}, FOUR, "not described"),
    "an overlap": ({"a": entry((2,), (0, 8)), "b": entry((1,), (4, 8))}, FOUR * 2, "begins at byte 4"),
    "a gap": ({"a": entry(), "b": entry((1,), (8, 12))}, FOUR * 3, "begins at byte 8"),
    "bytes that no array has": ({"a": entry()}, FOUR * 2, "have 4 bytes, and the file 8"),
    "bytes that are missing": ({"a": entry()}, b"\0" * 3, "have 4 bytes, and the file 3"),
    "metadata that are no texts": ({"__metadata__": {"a": 1}}, b"", "metadata"),
    "metadata that are a list": ({"__metadata__": []}, b"", ""),
    "a long name": ({"../" * 10_000: entry()}, FOUR, "cannot be an array's name|'../../"),
    "a name with a path": ({"../../up": entry()}, FOUR, "cannot be an array's name"),
    "an absolute name": ({"/etc/passwd": entry()}, FOUR, "cannot be an array's name"),
    "a name with a zero byte": ({"a\0b": entry()}, FOUR, "cannot be an array's name"),
    "a lone surrogate": (f'{{"\\ud800":{ENTRY}}}', FOUR, "cannot be an array's name"),
    "an empty name": ({"": entry()}, FOUR, "cannot be an array's name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_header_that_lies_is_refused(tmp_path, kind):
    header, data, message = BAD[kind]
    path = file_of(tmp_path / "file", header, data)
    for read in (arrays.read, arrays.header):
        with pytest.raises(InputError, match=rf"file is damaged: its header cannot be .*{message}") as seen:
            read(path)
        assert "\n" not in str(seen.value) and len(str(seen.value)) < 400 + len(str(path))


@pytest.mark.parametrize("length", [101, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("there", [0, 100])
def test_a_length_that_is_not_there_is_refused(tmp_path, length, there):
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", length) + b" " * there)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"file is damaged: its header would have {length} bytes"):
            arrays.read(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"\0", b"\0" * 7])
def test_a_file_shorter_than_a_length(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=f"file is damaged: it has {len(content)} bytes"):
        arrays.read(tmp_path / "file")


def test_a_header_takes_no_more_memory_than_its_limit_allows(tmp_path):
    """Small JSON that becomes large in memory; and one byte more than the limit is not even read."""
    for unit in ("[],", "[[]],", '{"":{}},'):
        text = f'{{"a":[{unit * ((arrays.MAX_HEADER - 10) // len(unit))}0]}}'
        path = file_of(tmp_path / "file", text.ljust(arrays.MAX_HEADER))
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match="file is damaged"):
                arrays.read(path)
            assert tracemalloc.get_traced_memory()[1] < 40 * arrays.MAX_HEADER
        finally:
            tracemalloc.stop()
        file_of(path, text.ljust(arrays.MAX_HEADER + 1))
        with pytest.raises(InputError, match="file is damaged: its header would have 1048577 bytes, at most"):
            arrays.read(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "file"
    arrays.write(path, {"a": np.ones(1000)})
    entries = arrays._entries

    def cut(file, path):
        found = entries(file, path)
        path.write_bytes(path.read_bytes()[:-100])
        return found

    monkeypatch.setattr(arrays, "_entries", cut)
    with pytest.raises(InputError, match="file is damaged: it became shorter while it was read"):
        arrays.read(path)


def test_reading_takes_the_memory_of_the_arrays(tmp_path):
    path = tmp_path / "file"
    arrays.write(path, {f"{i}": np.ones(300_000) for i in range(10)})
    tracemalloc.start()
    try:
        found, _ = arrays.read(path)
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size + 50_000
    finally:
        tracemalloc.stop()
    assert len(found) == 10


@given(ARRAYS, st.data())
def test_whatever_a_header_says_we_read_what_the_library_reads_or_refuse(folder, given, data):
    """Numbers, names and dtypes of a true header, replaced at random."""
    path = folder / "changed"
    path.unlink(missing_ok=True)
    arrays.write(path, given)
    header, content = parts_of(path)
    numbers = st.integers(-3, 70) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, -(2**63)])
    for name in header:
        if data.draw(st.booleans()):
            key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            values = {
                "dtype": st.sampled_from([*arrays._DTYPES, "BF16", "F8_E4M3", "U1"]),
                "shape": st.lists(numbers, max_size=4),
                "data_offsets": st.lists(numbers, min_size=1, max_size=3),
            }[key]
            header[name][key] = data.draw(values)
    file_of(path, header, content)
    try:
        found, _ = arrays.read(path)
    except InputError as error:
        assert "changed is damaged" in str(error)
        return
    same(found, safetensors.numpy.load_file(path))
