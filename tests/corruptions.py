"""Files changed at random, and headers made to deceive: python tests/corruptions.py [N [SEED]]

Each of N cases (5000) changes one file of a small run or of its data and reads it as a user would. It must be
refused or passed over with a message that names the file; or, where that is the promise, the tokens are made
again, or what is loaded has another hash. Nothing else may be raised, nothing else loaded, and no more memory
taken than the files have bytes and `ROOM`. Prints the cases of each kind; the exit status is 1 if one fails.

What cannot be noticed is not among them: a token file without a SHA-256 says only what its tokens are (a
resumed run knows it by its hash), and a description beside it is the user's own, checked but not hashed.
"""

import collections
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import traceback
import tracemalloc
import warnings
from pathlib import Path

import numpy as np

import cllm
from cllm import checkpoint, cli, data, guard
from cllm.data import cache
from cllm.errors import InputError
from cllm.progress import Silent
from cllm.replay import replay
from cllm.train import Trainer

CONFIG = {
    "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16, "model.block_size": 8, "optim.lr": 0.01,
    "schedule.warmup_steps": 2, "train.batch_size": 2, "train.max_steps": 12, "train.checkpoint_interval": 6,
    "train.threads": 1, "guard.policy": "skip", "guard.window": 2, "guard.spike": 1e-3,
}  # fmt: skip
# Bytes beside those of the files: a buffer of 256 kB to hash with, JSON as objects, the exception.
ROOM = 400_000
TEXT = "".join(f"{i} times the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(100))


# Ways to change a file ------------------------------------------------------------------------------


def flip(content, rng):
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def cut(content, rng):
    return content[: rng.choice((0, 1, 7, 8, len(content) - 1, rng.randrange(len(content))))]


def grow(content, rng):
    return content + rng.choice((rng.randbytes(rng.randrange(1, 64)), bytes(rng.choice((1, 4, 512)))))


def swap(content, rng):
    n = rng.randrange(1, min(64, len(content) // 2))
    a = rng.randrange(len(content) - 2 * n + 1)
    b = rng.randrange(a + n, len(content) - n + 1)
    content[a : a + n], content[b : b + n] = content[b : b + n], content[a : a + n]
    return content


def overwrite(content, rng):
    n = rng.choice((1, 8, 64, 512))
    a = rng.randrange(len(content))
    part = content[a : a + n]
    content[a : a + n] = rng.choice((bytes(len(part)), b"\xff" * len(part), rng.randbytes(len(part))))
    return content


def drop(content, rng):
    a = rng.randrange(len(content))
    del content[a : a + rng.choice((1, 2, 4, 64))]
    return content


def repeat(content, rng):
    a = rng.randrange(len(content))
    content[a:a] = content[a : a + rng.choice((1, 2, 4, 64))]
    return content


WAYS = (flip, flip, cut, grow, swap, overwrite, drop, repeat)


def changed(content, rng):
    """The content after one of the ways; always another."""
    while (found := rng.choice(WAYS)(bytearray(content), rng)) == content:
        pass
    return bytes(found)


# Headers made to deceive ----------------------------------------------------------------------------

HUGE = (2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 2**64 - 1, 10**30)
NAMES = (
    "../model", "../../../../etc/passwd", "/etc/passwd", "a/../../b", "..", ".", "", "a\\b", "C:\\x", "a\0b",
    "a\nb", "\x1b[2J", "__metadata__", "a/./b", "\ud800",
)  # fmt: skip


def _header(content):
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def _file(header, rest):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _sized(content, rng):
    """A size of an array that is no true one: negative, huge, no whole number, no number."""
    header, rest = _header(content)
    array = header[rng.choice([name for name in header if header[name]["shape"]])]
    sizes = array[rng.choice(("shape", "data_offsets"))]
    i = rng.randrange(len(sizes))
    wrong = (-1, -sizes[i] - 1, sizes[i] + 1, float(sizes[i]), str(sizes[i]), None, True, [sizes[i]])
    sizes[i] = rng.choice((*wrong, *HUGE, *(-n for n in HUGE), 1e308, float("nan"), float("inf")))
    return _file(header, rest)


def _wrapped(content, rng):
    """A shape whose number of bytes wraps around to the true one in 64 bits."""
    header, rest = _header(content)
    array = rng.choice(list(header.values()))
    array["shape"] = [*array["shape"], *rng.choice(((2**32, 2**32), (2**63, 2), (-1, -1), (2**64 + 1,)))]
    return _file(header, rest)


def _shifted(content, rng):
    """Arrays that overlap, leave a gap or lie outside."""
    header, rest = _header(content)
    offsets = rng.choice(list(header.values()))["data_offsets"]
    n = rng.choice((4, -4, 8, len(rest), 2**40, 2**63, -(2**40)))
    moved = [offset + n for offset in offsets]
    offsets[:] = rng.choice((moved, offsets[::-1], [0, len(rest) + 8], [*offsets, 0]))
    return _file(header, rest)


def _named(content, rng):
    header, rest = _header(content)
    header[rng.choice(NAMES)] = header.pop(rng.choice(list(header)))
    return _file(header, rest)


def _twice(content, rng):
    header, rest = _header(content)
    name = rng.choice(list(header))
    one = json.dumps({name: header[name]})[1:-1]
    return _file(f"{{{one}, {json.dumps(header)[1:]}".encode(), rest)


def _typed(content, rng):
    header, rest = _header(content)
    wrong = ("O", "object", "BF16", "F8_E5M2", "f4", "", "F320", None, 4, ["F32"], {"F32": 1}, "U" * 10_000)
    rng.choice(list(header.values()))["dtype"] = rng.choice(wrong)
    return _file(header, rest)


def _built(content, rng):
    """An entry of another build."""
    header, rest = _header(content)
    name = rng.choice(list(header))
    entry = header[name]
    gone = rng.choice(list(entry))
    lacking = {key: value for key, value in entry.items() if key != gone}
    wrong = (None, [], {}, 1, "F32", lacking, entry | {"more": 1}, entry | {"shape": {}}, list(entry.items()))
    header[name] = rng.choice(wrong)
    return _file(header, rest)


def _counted(content, rng):
    """A length of the header that is not its own."""
    true = struct.unpack("<Q", content[:8])[0]
    wrong = (0, 1, true - 1, true + 1, true - 8, len(content), len(content) - 7, 2**31, 2**63, 2**64 - 1)
    return struct.pack("<Q", rng.choice((*wrong, rng.getrandbits(64)))) + content[8:]


def _texts(content, rng):
    """A header that is no JSON object, or one that is hard to read."""
    header, rest = _header(content)
    text = json.dumps(header).encode()
    wrong = (
        b"", b" " * 100, b"null", b"[]", b"0", b'"a"', text[:-1], text + b"}", b"\xff\xfe" + text, text[1:],
        b"[" * 20_000, b'{"a":' * 20_000, text.replace(b'"shape"', b'"shape\xff"', 1),
        b'{"a":' + b"9" * 5000 + b"}", text.decode().encode("utf-16"), text.replace(b"[", b"[[", 1),
        b'{"__metadata__":{"a":1},' + text[1:], b'{"__metadata__":[],' + text[1:],
    )  # fmt: skip
    return _file(rng.choice(wrong), rest)


def _longer(content, rng):
    return content + bytes(rng.choice((1, 4, 64, 4096)))


DECEITS = (_sized, _sized, _wrapped, _shifted, _named, _twice, _typed, _built, _counted, _texts, _longer)


def vouched(folder, name):
    """Let a folder's state.json say that a changed file of arrays is the true one."""
    path = folder / "state.json"
    entry = json.loads(path.read_bytes())
    hashes = entry["sha256"]
    hashes.pop("state")
    hashes[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    hashes["state"] = checkpoint._sha256(entry["step"], entry["state"], hashes)
    path.write_bytes(checkpoint._text(entry))


# What a description beside a token file may not say, and what is none.
LIES = [
    {"vocab_size": value} for value in (0, -1, 2**32 + 1, 2**64, 10**40, "65", 1.5, True, None, [65], 3)
] + [
    {"dtype": value} for value in ("object", "O", "<u2", "uint64", "int16", "float32", ["uint16"], 2, None)
] + [
    {"sha256": value} for value in ("0" * 64, "", "../../x", None, 7, ["0" * 64], "Z" * 64, "0" * 63)
] + [
    {"tokenizer": value} for value in (
        None, [], {}, 0, "char", "/etc/passwd", {"type": "char"}, {"type": "char", "characters": ""},
        {"type": "char", "characters": "ba"}, {"type": "char", "characters": "aa"}, {"type": "pickle"},
        {"type": "ids", "vocab_size": -1}, {"type": "ids", "vocab_size": 2**80}, {"type": "ids"},
    )
] + [{"path": "/etc/passwd"}]  # fmt: skip
NO_OBJECTS = (
    b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 20_000, b'{"a":' * 20_000,
    b'{"vocab_size":' + b"9" * 5000 + b"}",
)  # fmt: skip


# The cases ------------------------------------------------------------------------------------------


class Failed(Exception):
    """What a case has found that must not be."""


class Cases:
    """A run, token files and their cache in a folder of their own, and what they hold unchanged."""

    def __init__(self, root):
        self.root = root
        (root / "text.txt").write_text(TEXT)
        self.run = root / "run"
        config = {**CONFIG, "data.source": str(root / "text.txt"), "run.dir": str(self.run)}
        summary = Trainer(config, progress=Silent()).fit()
        assert summary["state"] == "finished" and summary["incidents"]
        self.old, self.new = checkpoint.listed(self.run)
        (self.incident,) = guard.incidents(self.run)[-1:]
        self.text = data.load(root / "text.txt")
        tokens = np.concatenate([self.text.train.array, self.text.val.array])
        self.tokens = tokens.tobytes()
        tokenizer = self.text.tokenizer
        plain = {"dtype": "uint8", "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.to_dict()}
        self.description = {**plain, "sha256": hashlib.sha256(self.tokens).hexdigest()}
        for name, description in (("plain", plain), ("hashed", self.description)):
            tokens.tofile(root / f"{name}.bin")
            (root / f"{name}.json").write_text(json.dumps(description))
        self.old_bytes, self.new_bytes = (bits(checkpoint.load(path)[0]) for path in (self.old, self.new))
        self.hash = data.load(root / "plain.bin").hash
        assert bits(cllm.load(self.run)[0].state_dict()) == self.new_bytes
        guard.load_incident(self.incident)

    def part(self, rng):
        return self.new / rng.choice((*checkpoint.ARRAY_FILES, "state.json"))

    def checkpoint(self, rng):
        """A part of the newest checkpoint, in one of the ways to read one."""
        file = self.part(rng)
        content = changed(file.read_bytes(), rng)
        reads = (self.load, self.load, self.load, self.newest, self.model, self.inspected)
        return rng.choice(reads)(file, content)

    def mixed(self, rng):
        """A part of another checkpoint, or the other part."""
        file = self.part(rng)
        others = [self.new / name for name in checkpoint.ARRAY_FILES if name != file.name]
        return self.load(file, rng.choice([self.old / file.name, *others]).read_bytes())

    def deceit(self, rng):
        """A header made by hand, and a state.json that vouches for it."""
        folder, names = rng.choice(((self.new, checkpoint.ARRAY_FILES), (self.incident, guard.PARTS)))
        file = folder / rng.choice(names)
        content = rng.choice(DECEITS)(file.read_bytes(), rng)
        state = (folder / "state.json").read_bytes()
        with replaced(file, content):
            vouched(folder, file.name)
            try:
                message = refused(lambda: checkpoint.read(folder, names), file, folder)
            finally:
                (folder / "state.json").write_bytes(state)
        if "header" not in message and "shorter" not in message and "at least 8" not in message:
            raise Failed(f"the reader of arrays has not refused it, but: {message}")

    def tokenizer(self, rng):
        """The run's tokenizer; what is not refused is the same one, written in another way."""
        file = self.run / "tokenizer.json"
        with replaced(file, changed(file.read_bytes(), rng)):
            try:
                _, found = cllm.load(self.run)
            except InputError as error:
                named(error, file)
                return "refused"
        if found.to_dict() != self.text.tokenizer.to_dict():
            raise Failed(f"it is another: {found.to_dict()}")
        return "the same"

    def step(self, rng):
        """A part of a step that went wrong."""
        file = self.incident / rng.choice((*guard.PARTS, "state.json"))
        with replaced(file, changed(file.read_bytes(), rng)):
            if rng.random() < 0.1:
                refused(lambda: replay(self.run), file)
            else:
                refused(lambda: guard.load_incident(self.incident), file, self.incident)

    def hashed(self, rng):
        """A token file with a SHA-256 beside it."""
        file = self.root / "hashed.bin"
        with replaced(file, changed(file.read_bytes(), rng)):
            refused(lambda: data.load(file), file, file)

    def plain(self, rng):
        """A token file without: refused, or its hash is not the one that a run has noted."""
        file = self.root / "plain.bin"
        with replaced(file, changed(file.read_bytes(), rng)):
            try:
                found = data.load(file)
            except InputError as error:
                named(error, file)
                return "refused"
        if found.hash == self.hash:
            raise Failed("other tokens have the same hash")
        return "another hash"

    def described(self, rng):
        """A description beside a token file that lies."""
        file = self.root / "hashed.json"
        lie = rng.choice(LIES)
        text = json.dumps({**self.description, **lie}).encode()
        if rng.random() < 0.2:
            text = rng.choice((*NO_OBJECTS, file.read_bytes()[: rng.randrange(1, 100)]))
        with replaced(file, text):
            try:
                found = data.load(file.with_suffix(".bin"))
            except InputError as error:
                if str(file) not in str(error) and file.name not in str(error):
                    raise Failed(f"the message does not name the file: {error}") from None
                return
        raise Failed(f"loaded with a vocabulary of {found.vocab_size}: {text[:200]}")

    def cached(self, rng):
        """A text's tokens in the cache: told of, and made again."""
        file = self.root / "cache" / "tokens" / (self.text.hash + rng.choice((".bin", ".json")))
        content = file.read_bytes()
        file.write_bytes(changed(content, rng))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = data.load(self.root / "text.txt")
        if not any(str(file.with_suffix(".bin")) in str(warning.message) for warning in seen):
            raise Failed("nothing was said")
        if found.train.array.tobytes() + found.val.array.tobytes() != self.tokens:
            raise Failed("the tokens are others")
        if file.read_bytes() != content:
            raise Failed("the file was not made again")

    def scanned(self, rng):
        """What is remembered of a token file's hash: read again in silence, as it is only a short cut."""
        file = self.root / "plain.bin"
        folder = self.root / "cache" / "scans"
        shutil.rmtree(folder, ignore_errors=True)
        settled, cache.SETTLED = cache.SETTLED, 0
        try:
            data.load(file)
            (memo,) = folder.iterdir()
            memo.write_bytes(changed(memo.read_bytes(), rng))
            found = data.load(file)
        finally:
            cache.SETTLED = settled
        if found.hash != self.hash:
            raise Failed("another hash")

    # Ways to read a checkpoint

    def load(self, file, content):
        with replaced(file, content):
            refused(lambda: checkpoint.load(self.new), file, self.new)

    def newest(self, file, content):
        with replaced(file, content):
            passed_over(lambda: checkpoint.newest(self.run), file, self.old)
            found = passed_over(lambda: checkpoint.load_newest(self.run), file)
        if bits(found[0]) != self.old_bytes or found[2]["step"] != checkpoint.step_of(self.old):
            raise Failed("it is not the older checkpoint")

    def model(self, file, content):
        with replaced(file, content):
            model, _ = passed_over(lambda: cllm.load(self.run), file)
        if bits(model.state_dict()) != self.old_bytes:
            raise Failed("it is not the older checkpoint's model")

    def inspected(self, file, content):
        with replaced(file, content):
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                status = cli.main(["inspect", str(self.run)])
        if status != 1 or f"damaged: {file}" not in said.getvalue():
            raise Failed(f"cllm inspect said: {said.getvalue()}")


@contextlib.contextmanager
def replaced(file, content):
    """In this context a file has another content."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


@contextlib.contextmanager
def cache_in(folder):
    before = os.environ.get("CLLM_CACHE")
    os.environ["CLLM_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("CLLM_CACHE")
        if before is not None:
            os.environ["CLLM_CACHE"] = before


def bits(arrays):
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}


def named(error, file):
    if str(file) not in str(error) or "\n" in str(error):
        raise Failed(f"the message does not name the file in one line: {error}") from None
    return str(error)


def refused(read, file, measured=None):
    """The message with which reading is refused; `measured` is the file or folder whose bytes it may take."""
    size = 0
    if measured is not None:
        size = sum(path.stat().st_size for path in (measured.iterdir() if measured.is_dir() else [measured]))
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        read()
    except InputError as error:
        taken = tracemalloc.get_traced_memory()[1] - before
        if measured is not None and taken > size + ROOM:
            raise Failed(f"{taken} bytes were taken for {size}") from None
        return named(error, file)
    raise Failed("it was loaded")


def passed_over(read, file, expected=None):
    """What reading gives when it passes over a file, and says so."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = read()
    said = [str(warning.message) for warning in seen]
    if not any("passed over" in message and str(file) in message for message in said):
        raise Failed(f"it has said {said}")
    if expected is not None and found != expected:
        raise Failed(f"{found} was taken")
    return found


KINDS = (
    "checkpoint", "checkpoint", "checkpoint", "mixed", "deceit", "deceit", "deceit", "step", "tokenizer",
    "hashed", "plain", "described", "cached", "scanned",
)  # fmt: skip


def run(n, seed=0, kinds=KINDS):
    """The number of cases by kind, and what failed, as texts."""
    counts, failures = collections.Counter(), []
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory() as root, cache_in(Path(root) / "cache"):
            cases = Cases(Path(root))
            for i in range(n):
                rng = random.Random(f"{seed} {i}")
                kind = kinds[i % len(kinds)]
                try:
                    outcome = getattr(cases, kind)(rng)
                except Exception as error:
                    told = str(error) if isinstance(error, Failed) else traceback.format_exc()
                    failures.append(f"case {i} of seed {seed}, {kind}: {told}")
                else:
                    counts[f"{kind} ({outcome})" if outcome else kind] += 1
    finally:
        tracemalloc.stop()
    return counts, failures


if __name__ == "__main__":
    n, seed = (int(word) for word in (sys.argv[1:] + ["5000", "0"][len(sys.argv) - 1 :]))
    counts, failures = run(n, seed)
    print(f"{n} changed files:", ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    print(f"{len(failures)} failed")
    sys.exit(bool(failures))
