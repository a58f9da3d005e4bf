"""Batches: splitting, pool, documents, padding, the background producer, and files larger than memory."""

import gc
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
import traceback
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cllm
from cllm import data
from cllm.data import Batch, BatchPool, Examples, Producer, QueueClosed, Sequences, Tokens, cache
from cllm.data.batch import feed
from cllm.errors import InputError
from cllm.task import language_loss


def same(a, b):
    """Whether two batches are equal bit for bit, the position included."""
    for name in ("inputs", "targets", "mask"):
        one, other = getattr(a, name), getattr(b, name)
        if (one is None) != (other is None):
            return False
        if one is not None and (one.dtype, one.shape, one.tobytes()) != (
            other.dtype, other.shape, other.tobytes(),
        ):  # fmt: skip
            return False
    return a.position == b.position


# Batch


@given(n=st.integers(1, 40), parts=st.integers(1, 40), masked=st.booleans(), width=st.integers(0, 3))
def test_split_covers_the_batch(n, parts, masked, width):
    inputs, targets = np.arange(n * width).reshape(n, width), np.arange(n)
    position = {"index": 3, "epoch": 0, "sample": 30}
    batch = Batch(inputs, targets, targets % 3 == 0 if masked else None, position)
    if parts > n:
        message = f"a batch of {n} examples cannot be split into {parts} parts, only 1 to {n}"
        with pytest.raises(InputError, match=message):
            batch.split(parts)
        return
    pieces = batch.split(parts)
    lengths = [len(piece) for piece in pieces]
    assert len(pieces) == parts and sum(lengths) == n
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1
    for name in ("inputs", "targets", "mask"):
        whole = getattr(batch, name)
        if whole is None:
            assert all(getattr(piece, name) is None for piece in pieces)
            continue
        np.testing.assert_array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), whole)
        if whole.size:
            assert all(np.shares_memory(getattr(piece, name), whole) for piece in pieces)
    assert all(piece.position == position for piece in pieces)


@pytest.mark.parametrize("n", [0, -1, 1.0, "2", None])
def test_split_refuses(n):
    with pytest.raises(InputError, match=r"a batch of 4 examples cannot be split into .* parts, only 1 to 4"):
        Batch(np.zeros(4), np.zeros(4)).split(n)


def test_split_keeps_what_a_subclass_adds():
    class Weighted(Batch):
        pass

    batch = Weighted(np.zeros(4), np.zeros(4))
    batch.weight = 0.5
    assert [piece.weight for piece in batch.split(2)] == [0.5, 0.5]
    assert Batch(np.zeros(2), np.zeros(2)).position is None


# Pool


def test_the_pools_buffers():
    pool = BatchPool()
    shapes = [((12, 64), {}), ((3, 5), {"mask": True}), ((0, 7), {"mask": True})]
    shapes.append(((2, 28, 28), {"dtype": np.float32, "targets_shape": (2,), "targets_dtype": np.uint8}))
    for shape, options in shapes:
        inputs, targets, mask = pool.empty(shape, **options)
        assert inputs.shape == shape and inputs.dtype == options.get("dtype", np.int64)
        assert targets.shape == options.get("targets_shape", shape)
        assert targets.dtype == options.get("targets_dtype", np.int64)
        assert (mask is None) == ("mask" not in options)
        arrays = [array for array in (inputs, targets, mask) if array is not None]
        for i, array in enumerate(arrays):
            assert array.flags.c_contiguous and array.flags.writeable
            assert array.ctypes.data % 64 == 0
            array[...] = i % 2
        for i, array in enumerate(arrays):  # none reaches into another
            assert (array == i % 2).all()
    with pytest.raises(ValueError, match="lengths must be at least 0"):
        pool.empty((2, -1))
    with pytest.raises(TypeError, match="object"):
        pool.empty((2,), dtype=object)


def test_a_shared_batch_returns_with_its_last_user():
    pool = BatchPool()
    nothing = {"arrays_out": 0, "bytes_out": 0, "taken": 0, "recycled": 0}
    assert {key: n for key, n in pool.stats().items() if key != "bytes_free"} == nothing
    batch = Batch(*pool.empty((12, 64), mask=True))
    batch.inputs[...] = 7
    out = pool.stats()
    size = 12 * 64 * 17
    assert out["arrays_out"] == 3 and size <= out["bytes_out"] <= 1.125 * size
    address = batch.inputs.ctypes.data
    consumers = [*batch.split(5), batch, batch.inputs[::2].T, memoryview(batch.inputs)]
    del batch
    gc.collect()
    while consumers:
        assert pool.stats()["arrays_out"] == (3 if len(consumers) > 2 else 1)
        assert pool.empty((12, 64), mask=True)[0].ctypes.data != address
        consumers.pop(0)
    free = pool.stats()
    assert free["arrays_out"] == free["bytes_out"] == 0
    assert free["bytes_free"] >= out["bytes_out"]
    again = pool.empty((12, 64), mask=True)
    assert address in {array.ctypes.data for array in again[:2]}
    assert pool.stats()["recycled"] > 0


def test_training_takes_its_batches_from_a_pool():
    source = feed(Tokens(np.arange(5000, dtype=np.uint16)), "text", 16)
    for i in range(50):
        source.batch(i, 4, 0)
    stats = source.pool.stats()
    assert stats["taken"] == 100 and stats["arrays_out"] == 0
    assert stats["recycled"] >= 98


# Documents


@st.composite
def texts(draw):
    """Tokens 1 ... 9, with 0 at the end of documents, and where the documents begin."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    documents = [np.append(rng.integers(1, 10, n - 1), 0) for n in lengths]
    starts = np.cumsum([0, *lengths[:-1]])
    return np.concatenate(documents).astype(np.uint16), starts, documents


@given(texts(), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_a_window_masks_first_tokens_of_documents(text, block_size, batch_size, index):
    array, starts, _ = text
    kinds = {
        "starts": Tokens(array, documents=starts),
        "end": Tokens(array, end=0),
        "none": Tokens(array),
    }
    if len(array) <= block_size:
        return
    plain = feed(kinds["none"], "text", block_size)
    owner = np.searchsorted(starts, np.arange(len(array)), side="right")  # of each place, its document
    for kind in ("starts", "end"):
        masked = feed(kinds[kind], "text", block_size)
        places = kinds[kind].starts(index, batch_size, block_size, 7)
        batch, without = masked.batch(index, batch_size, 7), plain.batch(index, batch_size, 7)
        assert without.mask is None
        np.testing.assert_array_equal(batch.inputs, without.inputs)
        np.testing.assert_array_equal(batch.targets, without.targets)
        for row, start in zip(batch.mask, places):
            assert row.tolist() == [owner[start + t] == owner[start + t + 1] for t in range(block_size)]
        inputs, targets = kinds[kind].batch(index, batch_size, block_size, 7)
        np.testing.assert_array_equal(inputs, batch.inputs)
        np.testing.assert_array_equal(targets, np.where(batch.mask, batch.targets, -100))
        # In evaluation each place but the first is a target once, and counts unless a document begins there.
        counted = np.concatenate([batch.mask.ravel() for batch in masked.batches(batch_size)])
        assert counted.tolist() == (owner[1:] == owner[:-1]).tolist()
        by_hand = np.concatenate([t.ravel() for _, t in kinds[kind].windows(block_size, batch_size)])
        np.testing.assert_array_equal(by_hand, np.where(counted, array[1:].astype(int), -100))


@given(texts(), st.integers(1, 12) | st.none(), st.integers(1, 6), st.integers(0, 2))
def test_sequences_have_each_target_once(text, block_size, batch_size, epoch):
    array, starts, documents = text
    if max(map(len, documents)) < 2:
        with pytest.raises(InputError, match="no sequence has two tokens, an input and a target"):
            Sequences(documents, block_size)
        return
    expected = sorted(
        (tuple(document[:i]), document[i]) for document in documents for i in range(1, len(document))
    )
    for dataset in (
        Sequences(documents, block_size),
        Sequences([document.tolist() for document in documents], block_size),
        Sequences(Tokens(array, documents=starts), block_size),
        Sequences(Tokens(array, end=0), block_size),
    ):
        source = feed(dataset, "sequences")
        n = len(source)
        first, last = epoch * n // batch_size, ((epoch + 1) * n - 1) // batch_size
        shuffled = [source.batch(i, batch_size, 5) for i in range(first, last + 1)]
        for batches in (list(source.batches(batch_size)), shuffled):
            seen = []
            for batch in batches:
                width = batch.inputs.shape[1]
                assert batch.mask.any(axis=0).all()  # no column is padding alone
                assert width <= (block_size or width)
                assert not batch.inputs[~batch.mask].any() and not batch.targets[~batch.mask].any()
                for inputs, targets, mask in zip(batch.inputs, batch.targets, batch.mask):
                    length = mask.sum()
                    assert mask[:length].all()  # the padding is at the end
                    np.testing.assert_array_equal(inputs[1:length], targets[: length - 1])
                    seen.append([*inputs[:1], *targets[:length]])
            if batches is shuffled:
                seen = seen[epoch * n - first * batch_size :][:n]
            assert sum(len(row) - 1 for row in seen) == len(expected)
            if block_size is None:
                found = sorted((tuple(row[:i]), row[i]) for row in seen for i in range(1, len(row)))
                assert found == expected
            else:
                assert sorted(row[i] for row in seen for i in range(1, len(row))) == sorted(
                    target for _, target in expected
                )


def test_a_long_sequence_is_cut():
    dataset = Sequences([[0, 1, 2, 3, 4, 5, 6], [9], [7, 8], []], block_size=3)
    assert len(dataset) == 3
    batch = dataset[np.arange(3)]
    assert batch.inputs.tolist() == [[0, 1, 2], [3, 4, 5], [7, 0, 0]]
    assert batch.targets.tolist() == [[1, 2, 3], [4, 5, 6], [8, 0, 0]]
    assert batch.mask.tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    assert dataset[np.array([2])].inputs.tolist() == [[7]]
    with pytest.raises(InputError, match=r"sequence 1: tokens are float64 \(2,\); they must be integers"):
        Sequences([[1, 2], [0.5, 2.0]])
    with pytest.raises(InputError, match="say nothing of documents"):
        Sequences(Tokens(np.arange(5)))
    with pytest.raises(InputError, match="block_size is 0"):
        Sequences([[1, 2]], block_size=0)
    for documents in ([3, 1], [-1, 2], [0, 6]):
        with pytest.raises(InputError, match="train: documents must ascend from 0 to 5"):
            Tokens(np.arange(5), "train", documents=documents)


def test_padding_and_other_documents_change_no_loss():
    config = cllm.GPTConfig(vocab_size=10, block_size=8, n_layer=2, n_head=2, n_embd=16)
    model = cllm.GPT(config, seed=0, dtype=np.float64)
    documents = [np.array([1, 2, 3, 0]), np.array([4, 5, 0]), np.array([6, 7, 8, 9, 1, 0])]
    alone = [language_loss(model, Batch(d[None, :-1], d[None, 1:])) for d in documents]
    together, count = language_loss(model, Sequences(documents)[np.arange(3)])
    assert count == sum(n for _, n in alone)
    assert together.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-12)
    tokens = Tokens(np.concatenate(documents), end=0)
    batch = feed(tokens, "text", 8).batch(0, 3, 0)
    loss, count = language_loss(model, batch)
    assert 0 < count == batch.mask.sum() < batch.mask.size
    by_hand = model.loss(*tokens.batch(0, 3, 8, 0), reduction="sum")
    assert loss.item() == by_hand.item()


# From the configuration


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(f"<{i:02}" + "é" * (i % 7) + ">")
    return tmp_path / "texts"


def whole_documents(text, split):
    """The documents of a split as its padded rows give them."""
    tokens = getattr(text, split)
    found = []
    for batch in feed(tokens, split, 50).batches(4):
        for inputs, targets, mask in zip(batch.inputs, batch.targets, batch.mask):
            found.append(text.tokenizer.decode([*inputs[:1], *targets[mask]]))
    return found


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
@pytest.mark.parametrize("fractions", [(0.2, 0.2), (0.0, 0.0)])
def test_the_files_of_a_folder_are_documents(folder, tokenizer, fractions):
    files = [path.read_text() for path in sorted(folder.iterdir())]
    for _ in ("made", "from the cache"):
        text = data.load(folder, tokenizer, *fractions, packing="padded")
        found = [document for split in ("train", "val", "test") if len(getattr(text, split))
                 for document in whole_documents(text, split)]  # fmt: skip
        assert sorted(document.removesuffix("\n") for document in found) == files
        packed = data.load(folder, tokenizer, *fractions, packing="documents")
        assert packed.hash == text.hash == data.load(folder, tokenizer, *fractions).hash
        window = next(feed(packed.train, "train", len(packed.train) - 1).batches(1))
        begins = 1 + np.flatnonzero(~window.mask[0])
        assert len(begins) == len(whole_documents(text, "train")) - 1
        for place in begins:
            assert text.tokenizer.decode(packed.train.array[place : place + 1]) == "<"
    assert data.load(folder, tokenizer, *fractions).train.documents is None


def test_documents_of_a_text_that_is_cut_by_place(folder):
    for path in sorted(folder.iterdir())[2:]:
        path.unlink()
    text = data.load(folder, val_fraction=0.6, packing="documents")
    joined = "<00>\n<01é>"
    assert text.tokenizer.decode(text.train.array) == joined[:4]
    assert text.train.documents.tolist() == [0]
    assert text.tokenizer.decode(text.val.array) == joined[4:]
    assert text.val.documents.tolist() == [0, 1]


def test_an_older_cache_entry_is_made_again(folder):
    text = data.load(folder)
    array, description = cache.read(text.hash)
    del description["documents"]
    cache.write(text.hash, np.array(array), description)
    again = data.load(folder, packing="documents")
    assert again.hash == text.hash
    assert "documents" in cache.read(text.hash)[1]


@pytest.mark.parametrize("packing", ["documents", "padded"])
def test_a_token_file_ends_documents_by_a_token(tmp_path, packing):
    np.array([1, 2, 0, 3, 4, 5, 0, 6, 0, 7], np.uint16).tofile(tmp_path / "t.bin")
    text = data.load(tmp_path / "t.bin", val_fraction=0.0, packing=packing, eos=0)
    source = feed(text.train, "train", 3)
    targets = [batch.targets[batch.mask].tolist() for batch in source.batches(10)]
    assert sorted(itertools.chain(*targets)) == [0, 0, 0, 2, 4, 5]
    assert isinstance(text.train.array.base.base, np.memmap)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"packing": "document"}, r'data\.packing is "document" \(did you mean "documents"\?\); '
                                  "it must be of windows, documents, padded"),
        ({"eos": 3}, r'data\.eos is 3, but data\.packing is "windows", which knows no documents; '
                     'set data.packing to "documents" or "padded"'),
        ({"packing": "documents"}, r'data\.packing is "documents", but .* is one document; '
                                   "set data.eos to the token that ends one, or use a folder of files"),
        ({"packing": "padded", "eos": 99}, r"data\.eos is 99, but the vocabulary has 5 tokens, 0 to 4"),
        ({"packing": "padded", "eos": -1}, r"data\.eos is -1, but the vocabulary has 5 tokens, 0 to 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed(tmp_path, values, message):
    (tmp_path / "text.txt").write_text("abcde" * 20)
    with pytest.raises(InputError, match=message):
        data.load(tmp_path / "text.txt", **values)
    if "eos" not in values and values["packing"] == "documents":
        np.arange(9, dtype=np.uint16).tofile(tmp_path / "t.bin")
        with pytest.raises(InputError, match=r"a token file does not say .* end; set data\.eos"):
            data.load(tmp_path / "t.bin", **values)


def test_the_configuration_says_how_to_pack():
    given_config = cllm.config.from_dict({"data": {"packing": "documents", "eos": 10, "tokenizer": "byte"}})
    assert (given_config.data.packing, given_config.data.eos) == ("documents", 10)
    plain = cllm.config.from_dict({}).data
    assert (plain.packing, plain.eos) == ("windows", None)
    with pytest.raises(InputError, match=r"data\.eos is 1\.5"):
        cllm.config.from_dict({"data": {"packing": "documents", "eos": 1.5}})


# Producer

RNG = np.random.default_rng(0)
ARRAY = RNG.integers(0, 300, 3000).astype(np.uint16)
FEEDS = {
    "windows": feed(Tokens(ARRAY), "windows", 16),
    "documents": feed(Tokens(ARRAY, end=5), "documents", 16),
    "padded": feed(Tokens(ARRAY, end=5, padded=True), "padded", 16),
    "examples": feed(Examples(RNG.random((50, 3)), np.arange(50), np.arange(50) % 2 == 0), "examples"),
}


@pytest.mark.parametrize("kind", FEEDS)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 500), st.integers(1, 5), st.sampled_from([1, 7, "full"]), st.integers(0, 2)),
        min_size=1, max_size=4,
    ),
    ahead=st.integers(1, 4),
)  # fmt: skip
def test_a_producer_gives_what_the_feed_gives(kind, requests, ahead):
    with Producer(FEEDS[kind], ahead) as producer:
        for index, count, batch_size, seed in requests:  # each a seek, then some in order
            for i in range(index, index + count):
                found = producer.batch(i, batch_size, seed)
                assert same(found, FEEDS[kind].batch(i, batch_size, seed))
                assert found.position == FEEDS[kind].position(i, batch_size)
    assert not [thread for thread in threading.enumerate() if thread.name == "cllm batches"]


class Counting:
    """A feed that notes which batches were made."""

    def __init__(self, fail_at=None, error=None):
        self.made, self.fail_at, self.error = [], fail_at, error

    def batch(self, index, batch_size, seed):
        self.made.append(index)
        if index == self.fail_at:
            raise self.error
        return Batch(np.full(batch_size, index), np.full(batch_size, seed))


def test_a_seek_reads_nothing_between():
    source = Counting()
    with Producer(source, ahead=2) as producer:
        assert producer.batch(0, 3, 5).inputs.tolist() == [0, 0, 0]
        assert producer.batch(10**12, 3, 5).inputs[0] == 10**12
        producer.batch(10**12 + 1, 3, 5)
    assert all(i < 5 or 0 <= i - 10**12 < 6 for i in source.made)


def test_the_order_of_a_processing_unit():
    """Unit 1 of 2 takes leaves 2 and 3 of each four."""
    source, order = Counting(), [2, 3, 6, 7, 10, 11]
    with Producer(source, following=lambda i: i + 1 if i % 4 == 2 else i + 3) as producer:
        assert [producer.batch(i, 1, 0).inputs[0] for i in order] == order
    assert source.made[: len(order)] == order  # once each: no request was a seek


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, QueueClosed, MemoryError])
def test_an_error_comes_where_the_feed_would_raise_it(kind):
    source = Counting(fail_at=3, error=kind("batch 3"))
    with Producer(source, ahead=2) as producer:
        for i in range(3):
            assert producer.batch(i, 1, 0).inputs[0] == i
        with pytest.raises(kind, match="batch 3") as caught:
            producer.batch(3, 1, 0)
        frames = traceback.extract_tb(caught.value.__traceback__)
        assert [frame.name for frame in frames if frame.filename == __file__][-1] == "batch"
        assert not any(t.is_alive() for t in threading.enumerate() if t.name == "cllm batches")
        source.fail_at = None  # as a file that is there again: the same batch can be asked for
        assert [producer.batch(i, 1, 0).inputs[0] for i in (3, 4)] == [3, 4]


def test_closing_while_a_batch_is_made_or_waits():
    source = Counting()
    producer = Producer(source, ahead=1)
    producer.close()  # before it began
    for count in range(4):
        for i in range(count):
            producer.batch(i, 1, 0)
        producer.close()
        producer.close()
    assert producer.batch(7, 1, 0).inputs[0] == 7  # it begins anew
    producer.close()


def test_a_producer_that_is_forgotten_ends():
    producer = Producer(Counting())
    producer.batch(0, 1, 0)
    thread, gone = producer._thread, weakref.ref(producer)
    del producer
    gc.collect()
    assert gone() is None
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("ahead", [0, -1, 1.0, True, None])
def test_how_far_ahead(ahead):
    with pytest.raises(InputError, match=r"ahead is .*, it must be an integer of at least 1"):
        Producer(Counting(), ahead=ahead)


FORK = """
import os, signal, sys
import numpy as np
from cllm.data import Producer, Tokens
from cllm.data.batch import feed

source = feed(Tokens(np.arange(5000, dtype=np.uint16)), "text", 16)
producer = Producer(source)
first = producer.batch(0, 4, 0).inputs.tolist()
child = os.fork()
if child == 0:
    signal.alarm(60)
    wanted = source.batch(1, 4, 0).inputs.tolist()
    right = producer.batch(1, 4, 0).inputs.tolist() == wanted
    producer.close()
    sys.exit(0 if right else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert producer.batch(1, 4, 0).inputs.tolist() == source.batch(1, 4, 0).inputs.tolist()
print(status, "and ends without closing")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_and_an_exit_with_the_thread_running():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("0 and ends without closing\n", "", 0)


# Files larger than memory

LARGE = """
import json, os, resource, sys
import numpy as np
from cllm import data
from cllm.data.batch import feed
from cllm.data.producer import Producer

def private():
    with open("/proc/self/status") as file:
        rows = [line.split() for line in file if line.startswith(("VmData", "RssAnon"))]
    return {row[0]: int(row[1]) * 1024 for row in rows}

path, allowed = sys.argv[1], int(sys.argv[2])
before = private()
resource.setrlimit(resource.RLIMIT_DATA, (before["VmData:"] + allowed,) * 2)
try:
    np.empty(2 * allowed, np.uint8)
    limited = False
except MemoryError:
    limited = True
text = data.load(path, val_fraction=0.001, packing="documents", eos=9)
source = feed(text.train, "train", 256)
with Producer(source) as producer:
    sums = [int(producer.batch(i, 16, 7).inputs.sum()) for i in (*range(200), 10**7, 10**12)]
n = sum(1 for _ in zip(range(200), source.batches(64)))
print(json.dumps({
    "limited": limited, "grown": private()["RssAnon:"] - before["RssAnon:"],
    "tokens": len(text.train) + len(text.val),
    "vocab_size": text.vocab_size, "hash": text.hash, "batches": n, "positive": sum(s > 0 for s in sums),
}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_file_far_larger_than_the_memory_that_may_be_used(tmp_path):
    size, allowed = 1 << 30, 64 << 20
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.truncate(size)  # sparse: it takes no disk
        file.write(np.arange(1, 5000, dtype=np.uint16).tobytes())
        file.seek(size - 2)
        file.write(np.array([6000], np.uint16).tobytes())
    os.utime(path, ns=(0, 0))
    run = subprocess.run(
        [sys.executable, "-c", LARGE, str(path), str(allowed)], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)
    assert found["limited"]  # the limit holds, for those who would read the file into memory
    assert found["tokens"] == size // 2 and found["vocab_size"] == 6001
    assert found["batches"] == 200
    assert found["grown"] < allowed


def test_a_token_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SETTLED", 0)
    path = tmp_path / "t.bin"
    tokens = np.arange(1000, dtype=np.uint16)
    tokens.tofile(path)
    monkeypatch.setattr(cache, "LONG", 2000)
    with pytest.warns(UserWarning, match=r"t\.bin is read once to take its hash, about 0 s"):
        first = data.load(path)
    reads = []
    monkeypatch.setattr(cache, "_fill", lambda *args: reads.append(args) or 0)
    assert data.load(path).hash == first.hash and not reads
    monkeypatch.undo()
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "cache"))

    # Another content is noticed, also under the old size and time.
    stat = path.stat()
    tokens[500] = 1
    tokens.tofile(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = data.load(path)
    assert changed.hash != first.hash
    for entry in (tmp_path / "cache" / "scans").iterdir():  # a damaged entry is not believed
        content = entry.read_text()
        entry.write_text(content.replace("999", "998"))
    tokens[500] = 500
    tokens.tofile(path)
    assert data.load(path).hash == first.hash


def test_a_file_just_written_is_not_believed_to_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "cache"))
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "t.bin")
    data.load(tmp_path / "t.bin")
    assert not (tmp_path / "cache" / "scans").exists()


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "t.bin"
    np.arange(1000, dtype=np.uint16).tofile(path)
    real = cache._fill

    def fill(file, buffer):
        with open(path, "ab") as more:
            more.write(b"\0\0")
        return real(file, buffer[:0])

    monkeypatch.setattr(cache, "_fill", fill)
    with pytest.raises(InputError, match=r"t\.bin was changed while it was read"):
        data.load(path)


def test_a_hash_beside_a_token_file_finds_damage(tmp_path):
    path = tmp_path / "t.bin"
    np.arange(1000, dtype=np.uint16).tofile(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({"sha256": sha256}))
    assert data.load(path).vocab_size == 1000
    content = bytearray(path.read_bytes())
    content[77] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"t\.bin is damaged or another file: its SHA-256 is .*t\.json says"):
        data.load(path)


@pytest.mark.parametrize("packing", ["documents", "padded"])
def test_a_run_of_documents_is_resumed_bit_for_bit(folder, tmp_path, packing):
    values = {
        "data.source": str(folder), "data.packing": packing, "data.val_fraction": 0.3,
        "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 8,
        "train.batch_size": 3, "train.eval_interval": 2, "train.grad_accum": 2,
        "schedule.name": "constant", "schedule.warmup_steps": 2,
    }  # fmt: skip

    def run(name, steps):
        overrides = {**values, "run.dir": str(tmp_path / name), "train.max_steps": steps}
        cllm.Trainer(cllm.config.load(None, overrides), progress=cllm.progress.Silent()).fit()

    run("whole", 8)
    run("parts", 4)
    cllm.train.resume(tmp_path / "parts", {"train.max_steps": 8}, progress=cllm.progress.Silent())
    weights = [(tmp_path / name / "checkpoints/step-00000008/model.safetensors").read_bytes()
               for name in ("whole", "parts")]  # fmt: skip
    assert weights[0] == weights[1]
    state = json.loads((tmp_path / "whole/checkpoints/step-00000008/state.json").read_text())["state"]
    text = data.load(folder, val_fraction=0.3, packing=packing)
    source = feed(text.train, "train", 8)
    assert state["position"] == source.position(16, 3)
    # What is evaluated is what counts.
    model, _ = cllm.load(tmp_path / "whole")
    mask = np.concatenate([batch.mask.ravel() for batch in feed(text.val, "val", 8).batches(5)])
    assert 0 < mask.sum() < mask.size
    assert cllm.evaluate(model, text.val)["tokens"] == mask.sum()


# The Trainer's producer

PREFETCH = {
    "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 8, "train.batch_size": 3,
    "train.max_steps": 12, "train.eval_interval": 4, "train.checkpoint_interval": 5, "train.threads": 1,
    "schedule.warmup_steps": 2,
}  # fmt: skip


def fit(run_dir, prefetch, task=None, callbacks=(), **changes):
    values = {**PREFETCH, "train.prefetch": prefetch, "run.dir": str(run_dir)}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return cllm.Trainer(values, task, callbacks, progress=cllm.progress.Silent()).fit()


def left(run_dir):
    """What a run has left that must be the same: its arrays' bytes and its records without times."""
    newest = cllm.checkpoint.newest(run_dir)
    arrays = [(newest / name).read_bytes() for name in cllm.checkpoint.ARRAY_FILES]
    lines = cllm.records.Run(run_dir).records
    return arrays, [{k: v for k, v in line.items() if not cllm.records.is_timing(k)} for line in lines]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "cllm batches"]


class Noting:
    """A dataset of one's own that notes how often it was asked, and in which threads."""

    def __init__(self, error_at=None, wrong_at=None):
        rng = np.random.default_rng(0)
        self.inputs, self.targets = rng.integers(0, 9, (40, 5)), rng.integers(0, 9, (40, 5))
        self.asked, self.error_at, self.wrong_at = [], error_at, wrong_at

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, indices):
        self.asked.append(threading.current_thread().name)
        if len(self.asked) == self.error_at:
            raise RuntimeError("no such file")
        inputs = self.inputs[indices].astype(np.float32)
        if self.wrong_at in indices:
            inputs[...] = np.nan
        return Batch(inputs, self.targets[indices][:, 0])


def noting_task(**options):
    model = cllm.nn.Sequential(cllm.nn.Linear(5, 8), cllm.nn.Linear(8, 9))
    return cllm.Task(model, Noting(**options), {"val": Noting()})


@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("kind", ["windows", "documents", "padded", "full"])
def test_prefetching_changes_no_bit(folder, tmp_path, kind, accum):
    changes = {"data__source": str(folder), "data__val_fraction": 0.3, "train__grad_accum": accum}
    changes |= {"train__batch_size": "full"} if kind == "full" else {"data__packing": kind}
    for prefetch in (0, 1, 4):
        fit(tmp_path / str(prefetch), prefetch, **changes)
        assert not threads()
    assert left(tmp_path / "0") == left(tmp_path / "1") == left(tmp_path / "4")


def test_a_task_is_prefetched_in_order(tmp_path):
    for prefetch in (0, 2):
        task = noting_task()
        fit(tmp_path / str(prefetch), prefetch, task, train__grad_accum=4)
        asked = task.train.dataset.asked
        if prefetch:  # each batch once: no request was a seek
            assert 48 <= len(asked) <= 48 + prefetch + 1 and set(asked) == {"cllm batches"}
        else:
            assert asked == ["MainThread"] * 48
    assert left(tmp_path / "0") == left(tmp_path / "2")


class Killed(Exception):
    pass


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_prefetching_over_steps_that_go_wrong_and_kills(tmp_path, policy):
    changes = {"guard__policy": policy, "train__grad_accum": 2, "guard__limit": 100}
    fit(tmp_path / "plain", 0, noting_task(wrong_at=7), **changes)
    assert cllm.records.Run(tmp_path / "plain").summary["incidents"] > 0
    for kill_at in (3, 8, 11):

        def kill(trainer, record, kill_at=kill_at):
            if record["step"] == kill_at and record["split"] == "train":
                raise Killed

        run_dir = tmp_path / f"killed-{kill_at}"
        with pytest.raises(Killed):
            fit(run_dir, 3, noting_task(wrong_at=7), [kill], **changes)
        assert not threads()
        cllm.train.resume(
            run_dir, {"train.prefetch": 1}, task=noting_task(wrong_at=7), progress=cllm.progress.Silent()
        )
        assert left(run_dir) == left(tmp_path / "plain")
        for path in cllm.guard.incidents(run_dir):
            other = tmp_path / "plain" / "incidents" / path.name
            assert (path / "batch.safetensors").read_bytes() == (other / "batch.safetensors").read_bytes()


def test_an_error_of_the_dataset_ends_the_run_and_the_thread(tmp_path):
    with pytest.raises(RuntimeError, match="no such file") as caught:
        fit(tmp_path / "run", 2, noting_task(error_at=6))
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert any(frame.filename == __file__ and frame.name == "__getitem__" for frame in frames)
    assert not threads()
    summary = cllm.records.Run(tmp_path / "run").summary
    assert summary["state"] == "failed" and summary["step"] == 5  # where it would have been without a thread
    with pytest.raises(InputError, match=r"train\.prefetch is -1, it must be 0 or more"):
        fit(tmp_path / "other", -1, noting_task())
