"""Data: sources, tokenizers, splits, the cache, and the order of batches."""

import json
import os
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm import data
from cllm.data import cache, sources
from cllm.data.tokens import Tokens, permute
from cllm.errors import InputError

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 40


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("CLLM_CACHE", str(folder))
    return folder


@pytest.fixture
def play(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text(PLAY)
    return path


def decoded(text, split):
    return text.tokenizer.decode(getattr(text, split).array)


# Sources


def test_one_file_is_cut_by_place(play):
    text = data.load(play, val_fraction=0.1, test_fraction=0.2)
    n = len(PLAY)
    train, test = n * 7 // 10, n * 9 // 10
    assert decoded(text, "train") == PLAY[:train]
    assert decoded(text, "test") == PLAY[train:test]
    assert decoded(text, "val") == PLAY[test:]
    assert text.vocab_size == len(set(PLAY)) == text.tokenizer.vocab_size
    assert text.source == str(play)


@pytest.mark.parametrize("n", [7, 10, 1_115_394])
def test_the_cut_is_exact_in_decimals(n):
    # 0.9 * n rounds down in floating point where 0.9 is a little less than nine tenths
    cuts = data._cuts(n, data.DataConfig(val_fraction=0.1))
    assert cuts["train"] == slice(0, n * 9 // 10)
    assert cuts["val"] == slice(n * 9 // 10, n)


def test_the_standard_library(monkeypatch):
    root = Path(sysconfig.get_path("stdlib"))
    found = sources.documents("python-stdlib")
    names = [document.name for document in found]
    assert names == sorted(names)
    assert not sources.STDLIB_SKIPPED & {part for name in names for part in name.split("/")}
    assert all(name.endswith(".py") and document.content.isascii() for name, document in zip(names, found))
    assert found[0].content == (root / names[0]).read_bytes()
    size = sum(len(document.content) for document in found)
    assert size <= 4_000_000
    monkeypatch.setattr(sources, "STDLIB_BYTES", len(found[0].content) + len(found[1].content))
    assert sources.documents("python-stdlib") == found[:2]

    monkeypatch.setattr(sources, "STDLIB_BYTES", 200_000)
    text = data.load("python-stdlib")
    train, val = decoded(text, "train"), decoded(text, "val")
    documents = sources.documents("python-stdlib")
    for document in documents:
        if len(document.content) < 500:
            continue  # some small files are equal
        assert (document.content.decode() in val) == (data._fraction(document.name) < 0.1)
        assert (document.content.decode() in train) == (data._fraction(document.name) >= 0.1)


def test_an_interpreter_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(InputError, match=r"no \.py files of its standard library .* set data.source"):
        data.load("python-stdlib")


def test_a_folder_is_split_by_name(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0\xff")
    (folder / "empty.txt").touch()
    for i in range(40):
        (folder / "sub" / f"{i:02}.txt").write_text(f"<{i:02}>")
    text = data.load(folder, val_fraction=0.2, test_fraction=0.2)
    parts = {split: decoded(text, split).split("\n") for split in ("train", "val", "test")}
    assert sorted(member for members in parts.values() for member in members) == [
        f"<{i:02}>" for i in range(40)
    ]
    assert parts["train"] == sorted(parts["train"])
    for split, members in parts.items():
        for member in members:
            place = data._fraction(f"sub/{member[1:-1]}.txt")
            assert split == ("val" if place < 0.2 else "test" if place < 0.4 else "train")
    # A new file moves no other, and a larger test share takes nothing from validation.
    (folder / "new.txt").write_text("<new>")
    more = data.load(folder, val_fraction=0.2, test_fraction=0.3)
    assert set(parts["val"]) <= set(decoded(more, "val").split("\n"))


def test_fraction_is_stable():
    # sha256 of b"os.py" begins with d9d7c69c
    assert data._fraction("os.py") == pytest.approx(0xD9D7C69C / 2**32, abs=1e-9)
    assert all(0 <= data._fraction(str(i)) < 1 for i in range(1000))


def test_a_folder_of_few_files_is_cut_by_place(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(PLAY)
    text = data.load(tmp_path / "texts")
    assert decoded(text, "val") == PLAY[len(PLAY) * 9 // 10 :]


def test_line_endings_and_byte_order_mark(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\n".encode())
    text = data.load(path, val_fraction=0.0)
    assert decoded(text, "train") == "one\ntwo\nthree\n"
    assert len(text.val) == len(text.test) == 0


def test_not_utf8_names_file_and_offset(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("\ufeffcaf".encode() + b"\xe9 au lait")
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text: byte 0xe9 at offset 6"):
        data.load(path)


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"empty\.txt is empty"):
        data.load(tmp_path / "empty.txt")
    with pytest.raises(InputError, match="no text but a byte order mark"):
        data.load(tmp_path / "mark.txt")
    with pytest.raises(InputError, match="folder has no text files"):
        data.load(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*missing\.txt"):
        data.load(tmp_path / "missing.txt")
    with pytest.raises(InputError, match=r'neither a built-in text.*did you mean "python-stdlib"'):
        data.load("pyton-stdlib")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        data.load("/dev/null")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"val_fraction": 1.0}, r"data\.val_fraction is 1\.0; it must be a number from 0 to below 1"),
        ({"val_fraction": float("nan")}, r"data\.val_fraction is nan"),
        ({"test_fraction": -0.1}, r"data\.test_fraction is -0\.1"),
        ({"test_fraction": True}, r"data\.test_fraction is True"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "must be below 1"),
        ({"tokenizer": ""}, r"data\.tokenizer is ''"),
    ],
)
def test_config_values(values, message):
    with pytest.raises(InputError, match=message):
        data.load("python-stdlib", **values)


# Token files


def test_nanogpt_token_file(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16) % 300
    tokens.tofile(tmp_path / "tokens.bin")
    text = data.load(tmp_path / "tokens.bin")
    assert text.vocab_size == 300
    np.testing.assert_array_equal(text.train.array, tokens[:900])
    np.testing.assert_array_equal(text.val.array, tokens[900:])
    assert isinstance(text.train.array.base, np.memmap) or isinstance(text.train.array.base.base, np.memmap)
    assert text.tokenizer.decode([3, 299]) == "3 299"
    np.testing.assert_array_equal(text.tokenizer.encode("3 299"), [3, 299])
    with pytest.raises(InputError, match="token ids from 0 to 299"):
        text.tokenizer.encode("hello")


def test_token_file_with_description(tmp_path):
    tokenizer = data.CharTokenizer("abc")
    np.array([0, 1, 2, 1] * 10, np.uint32).tofile(tmp_path / "t.bin")
    description = {"dtype": "uint32", "vocab_size": 4, "tokenizer": tokenizer.to_dict()}
    (tmp_path / "t.json").write_text(json.dumps(description))
    text = data.load(tmp_path / "t.bin")
    assert (text.vocab_size, len(text.train), decoded(text, "train")[:4]) == (4, 36, "abcb")
    (tmp_path / "t.json").write_text(json.dumps({"dtype": "uint32"}))
    assert data.load(tmp_path / "t.bin").vocab_size == 3


def test_folder_of_token_files(tmp_path):
    np.arange(90, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "val.bin")
    text = data.load(tmp_path)
    assert (len(text.train), len(text.val), len(text.test), text.vocab_size) == (90, 10, 0, 90)


@pytest.mark.parametrize(
    ("content", "description", "message"),
    [
        (b"", {}, "0 bytes; a uint16 token file"),
        (b"abc", {}, "3 bytes; a uint16 token file has a positive multiple of 2"),
        (b"\7\0\2\0", {"vocab_size": 5}, "has token 7 at position 0, but the vocabulary has 5 tokens"),
        (b"ab", {"dtype": "float32"}, "must be uint8, uint16 or uint32"),
        (b"ab", {"vocab_size": -1}, "vocab_size is -1; it must be an integer from 1 to 2"),
        (b"ab", {"vocab_size": 2**32 + 1}, "vocab_size is 4294967297; it must be an integer from 1 to 2"),
        (b"ab", {"sha256": "0" * 63}, "it must be 64 hexadecimal digits"),
        (b"ab", {"sha256": "0" * 64}, r"t\.bin is damaged or another file"),
        (b"ab", {"vocab": 1}, "keys among dtype, sha256, tokenizer, vocab_size"),
        (b"ab", {"tokenizer": {"type": "bpe"}}, "not a tokenizer's description"),
        (b"ab", {"tokenizer": None}, "not a tokenizer's description"),
        (b"ab", {"tokenizer": {"type": "ids", "vocab_size": 2**64}}, "not a tokenizer's description"),
        (b"ab", {"tokenizer": {"type": "char", "characters": "ba"}}, "characters must ascend"),
        (b"ab", {"tokenizer": {"type": "char", "characters": "aab"}}, "characters must ascend"),
        (b"ab", {"tokenizer": {"type": "byte"}, "vocab_size": 25}, "has 256 tokens, and vocab_size is only"),
        (b"ab", "[" * 100_000, r"t\.json is not JSON: .*recursion"),
        (b"ab", [], r"t\.json must be a JSON object"),
    ],
)
def test_bad_token_files(tmp_path, content, description, message):
    (tmp_path / "t.bin").write_bytes(content)
    text = description if isinstance(description, str) else json.dumps(description)
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InputError, match=message):
        data.load(tmp_path / "t.bin")


# Tokenizers


@given(st.text(min_size=1))
def test_char_round_trip(text):
    tokenizer = data.CharTokenizer(text)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int64
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text
    again = data.tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    np.testing.assert_array_equal(again.encode(text), tokens)


@given(st.text())
def test_byte_round_trip(text):
    tokenizer = data.tokenizer_from_dict(json.loads(json.dumps(data.ByteTokenizer().to_dict())))
    tokens = tokenizer.encode(text)
    assert tokens.tolist() == list(text.encode())
    assert tokenizer.decode(tokens) == text


@given(st.text(min_size=1))
def test_byte_lengths_add_up_to_the_texts(text):
    for tokenizer in (data.CharTokenizer(text), data.ByteTokenizer()):
        lengths = tokenizer.byte_lengths()
        assert lengths.dtype == np.int64 and lengths.shape == (tokenizer.vocab_size,)
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_byte_lengths_of_characters_and_of_unknown_tokens():
    edges = "\x00\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff"
    assert data.CharTokenizer(edges).byte_lengths().tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert data.tokenizer_from_dict({"type": "ids", "vocab_size": 9}).byte_lengths() is None


def test_byte_decodes_a_cut_character():
    assert data.ByteTokenizer().decode([0xC3, 0x61]) == "\ufffda"


@pytest.mark.parametrize("text", ["na\u00efve", "na\u00efve" + "x" * 5, "na\u00efve\U0001f600"])
def test_a_character_outside_the_tokenizer(text):
    message = r"character '\\xef' \(U\+00EF\) at position 2, .* knows only the 4 characters .* 'aenv'"
    with pytest.raises(InputError, match=message):
        data.CharTokenizer("naven").encode(text)
    with pytest.raises(InputError, match=r"lone surrogate \(U\+DC80\) at position 1"):
        data.ByteTokenizer().encode("a\udc80")


@pytest.mark.parametrize("tokens", [[0, 1, -1], [0, 1, 4], [0.0, 1.0]])
def test_decoding_what_is_no_token(tokens):
    with pytest.raises(InputError, match=r"token -?\d at position 2 .* from 0 to 3|must be integers"):
        data.CharTokenizer("aenv").decode(tokens)


def test_tokenizer_from_a_file(tmp_path, play):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data.CharTokenizer(PLAY + "éz").to_dict()))
    text = data.load(play, tokenizer=path)
    assert text.vocab_size == len(set(PLAY + "éz"))
    assert decoded(text, "train") == PLAY[: len(PLAY) * 9 // 10]
    play.write_text(PLAY + "ß")
    message = rf"play\.txt has the character '\\xdf' \(U\+00DF\) at position {len(PLAY)}"
    with pytest.raises(InputError, match=message):
        data.load(play, tokenizer=str(path))
    path.write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer's description"):
        data.load(play, tokenizer=path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        data.load(play, tokenizer=path)
    with pytest.raises(InputError, match=r'did you mean "byte"'):
        data.load(play, tokenizer="bytes")


def test_splits_do_not_depend_on_the_tokenizer(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("äöü" * 100)
    chars, as_bytes = data.load(path, tokenizer="char"), data.load(path, tokenizer="byte")
    for split in ("train", "val"):
        assert decoded(chars, split) == decoded(as_bytes, split)
    assert as_bytes.vocab_size == 256


def test_many_characters_take_more_bytes(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 300))))
    text = data.load(path)
    assert text.train.array.dtype == np.uint16
    assert decoded(text, "val") == "".join(map(chr, range(0x4E00 + 270, 0x4E00 + 300)))
    assert data._smallest_dtype(65537) == np.uint32


# Cache


def test_the_second_load_comes_from_the_cache(play, monkeypatch, cache_folder):
    first = data.load(play)
    monkeypatch.setattr(data, "_tokenise", None)
    second = data.load(play)
    np.testing.assert_array_equal(first.train.array, second.train.array)
    assert first.hash == second.hash
    assert len(list((cache_folder / "tokens").iterdir())) == 2
    assert not second.train.array.flags.writeable
    base = second.train.array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_each_input_has_its_own_entry(play, tmp_path):
    hashes = {data.load(play, **values).hash for values in (
        {}, {"val_fraction": 0.2}, {"test_fraction": 0.1}, {"tokenizer": "byte"},
    )}  # fmt: skip
    other = tmp_path / "other.txt"
    other.write_text(PLAY + ".")
    hashes.add(data.load(other).hash)
    assert len(hashes) == 5
    other.write_text(PLAY)  # the same content under another name
    assert data.load(other).hash == data.load(play).hash


@pytest.mark.parametrize("suffix", [".bin", ".json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_entry_is_made_again(play, cache_folder, suffix, damage):
    text = data.load(play)
    good = np.array(text.train.array)
    path = cache_folder / "tokens" / (text.hash + suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes({"flip": content, "cut": content[:-7], "empty": b""}[damage])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(data.load(play).train.array, good)
    said = [str(warning.message) for warning in seen]
    assert len(said) == (damage != "gone") and all(f"{text.hash}.bin and its .json are" in m for m in said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read(text.hash) is not None


def test_a_cache_that_cannot_be_written(play, tmp_path, monkeypatch):
    expected = np.array(data.load(play).train.array)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="token cache cannot be written .* set CLLM_CACHE"):
        text = data.load(play)
    np.testing.assert_array_equal(text.train.array, expected)
    assert not text.train.array.flags.writeable


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("CLLM_CACHE")
    assert cache.folder() == tmp_path / "cllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "cllm"


def test_processes_that_build_at_once(play, cache_folder):
    script = "from cllm import data; import sys; print(data.load(sys.argv[1]).train.array.sum())"
    command = [sys.executable, "-c", script, str(play)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    sums = {worker.communicate()[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sums == {f"{data.load(play).train.array.sum()}\n"}
    assert sorted(path.suffix for path in (cache_folder / "tokens").iterdir()) == [".bin", ".json"]


# Batches


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, key):
    places = permute(np.arange(n), n, key)
    np.testing.assert_array_equal(np.sort(places), np.arange(n))


def test_permute_mixes():
    n = 10_000
    places = [permute(np.arange(n), n, key) for key in range(8)]
    for a in places:
        assert abs(np.corrcoef(np.arange(n), a)[0, 1]) < 0.05
    assert (places[0] == places[1]).sum() < 10
    # large sizes work too, and one by one is the same as together
    n = 2**40 + 7
    some = np.array([0, 1, n - 1])
    assert permute(some, n, 5).max() < n
    assert [int(permute(np.array([i]), n, 5)[0]) for i in some] == permute(some, n, 5).tolist()


@given(
    n_tokens=st.integers(2, 500), block_size=st.integers(1, 40), batch_size=st.integers(1, 9),
    seed=st.integers(-5, 2**63), epoch=st.integers(0, 3),
)  # fmt: skip
def test_an_epoch_has_each_window_once(n_tokens, block_size, batch_size, seed, epoch):
    tokens = Tokens(np.arange(n_tokens, dtype=np.uint16))
    if n_tokens <= block_size:
        with pytest.raises(InputError, match="too short"):
            tokens.batch(0, batch_size, block_size, seed)
        return
    n = tokens.n_windows(block_size)
    first, last = epoch * n // batch_size, ((epoch + 1) * n - 1) // batch_size
    batches = [tokens.batch(i, batch_size, block_size, seed) for i in range(first, last + 1)]
    inputs = np.concatenate([inputs for inputs, _ in batches])
    targets = np.concatenate([targets for _, targets in batches])
    assert inputs.shape == ((last - first + 1) * batch_size, block_size)
    np.testing.assert_array_equal(targets, inputs + 1)
    here = inputs[epoch * n - first * batch_size :][:n]
    starts = np.sort(here[:, 0])
    np.testing.assert_array_equal(starts, starts[0] + np.arange(n) * block_size)  # one grid, each place once
    assert targets.max() < n_tokens
    assert tokens.position(first, batch_size, block_size) == {
        "index": first, "epoch": first * batch_size // n, "sample": first * batch_size % n,
    }  # fmt: skip


def test_batches_are_a_pure_function():
    tokens = Tokens(np.arange(5000, dtype=np.uint16))
    forward = [tokens.batch(i, 12, 8, seed=1)[0] for i in range(300)]
    again = Tokens(np.arange(5000, dtype=np.uint16))
    for i in (299, 7, 150, 86):
        np.testing.assert_array_equal(again.batch(i, 12, 8, seed=1)[0], forward[i])
    # the order of samples does not depend on the batch size
    np.testing.assert_array_equal(
        np.concatenate([tokens.batch(i, 36, 8, seed=1)[0] for i in range(100)]), np.concatenate(forward)
    )
    inputs, targets = tokens.batch(0, 12, 8, seed=1)
    for array in (inputs, targets):
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
        assert array.flags.writeable
    inputs[:] = 0  # the caller's own
    np.testing.assert_array_equal(tokens.batch(0, 12, 8, seed=1)[0], forward[0])


def test_seeds_and_epochs_differ():
    tokens = Tokens(np.arange(5000, dtype=np.uint16))
    n = tokens.n_windows(8)
    orders = [tokens.batch(epoch, n, 8, seed)[0][:, 0] for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.05
    shifts = {int(tokens.batch(epoch, n, 8, 0)[0].min()) for epoch in range(100)}
    assert shifts == set(range(8))


def test_batches_do_not_depend_on_the_process(play):
    script = (
        "from cllm import data; import sys, hashlib; t = data.load(sys.argv[1]).train;"
        "order = b''.join(t.batch(i, 12, 64, 1337)[1].tobytes() for i in range(50));"
        "print(hashlib.sha256(order).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(play)]
    runs = {
        subprocess.run(command, env=env, capture_output=True, text=True).stdout
        for env in (environment, {**environment, "PYTHONHASHSEED": "8", "OMP_NUM_THREADS": "2"})
    }
    assert len(runs) == 1
    assert len(runs.pop()) == 65


@given(n_tokens=st.integers(2, 300), block_size=st.integers(1, 40), batch_size=st.integers(1, 9))
def test_windows_cover_the_split_once(n_tokens, block_size, batch_size):
    tokens = Tokens(np.arange(n_tokens, dtype=np.uint16), "val")
    if n_tokens <= block_size:
        with pytest.raises(InputError, match=f"the val split has {n_tokens} tokens"):
            tokens.windows(block_size, batch_size)
        return
    batches = list(tokens.windows(block_size, batch_size))
    for inputs, targets in batches:
        np.testing.assert_array_equal(targets, inputs + 1)
        assert len(inputs) <= batch_size
        assert inputs.dtype == np.int64
        assert inputs.flags.c_contiguous
    assert all(inputs.shape[1] == block_size for inputs, _ in batches[:-1])
    targets = np.concatenate([targets.ravel() for _, targets in batches])
    np.testing.assert_array_equal(targets, np.arange(1, n_tokens))


def test_messages_of_short_splits():
    short = Tokens(np.zeros(40, np.uint8), "train")
    message = (
        "the train split has 40 tokens, too short for block_size = 64, which needs 65 "
        r"\(the inputs and one more target\); use block_size <= 39 or more text"
    )
    for call in (lambda: short.batch(0, 4, 64, 0), lambda: short.n_windows(64), lambda: short.windows(64, 4)):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(InputError, match=r"the test split has 0 tokens.*use more text"):
        Tokens(np.zeros(0, np.uint8), "test").windows(8, 1)
    with pytest.raises(InputError, match="batch_size is 0; it must be at least 1"):
        short.batch(0, 0, 8, 0)
    with pytest.raises(InputError, match="batch index is -1"):
        short.batch(-1, 1, 8, 0)
