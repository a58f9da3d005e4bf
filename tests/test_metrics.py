"""Metrics against plain loops and cases worked by hand; splits, masks, ties, NaN, and refused input."""

import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import Tensor, data, metrics
from cllm.errors import InputError

DOCS = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")

LENGTHS = np.array([1, 2, 0, 4, 1, 3])
MAKERS = {
    "accuracy": metrics.Accuracy,
    "top1": partial(metrics.TopK, 1),
    "top2": partial(metrics.TopK, 2),
    "perplexity": metrics.Perplexity,
    **{
        f"{cls.__name__} {average}": partial(cls, average)
        for cls in (metrics.Precision, metrics.Recall, metrics.F1)
        for average in ("macro", "micro", "weighted", None)
    },
}


def measured(metric, *batch):
    metric.update(*batch)
    return metric.compute()


# Plain loops -----------------------------------------------------------------------------------------


def counted(targets, mask):
    mask = np.broadcast_to(True if mask is None else mask, targets.shape)
    return [index for index in np.ndindex(targets.shape) if mask[index] and targets[index] != -100]


def predicted(row):
    """The first class with the largest score; None where one is NaN."""
    if any(math.isnan(score) for score in row):
        return None
    return next(i for i, score in enumerate(row) if score == max(row))


def loop_accuracy(outputs, targets, mask):
    rows = counted(targets, mask)
    return sum(predicted(outputs[i]) == targets[i] for i in rows) / len(rows)


def loop_top(k, outputs, targets, mask):
    rows = counted(targets, mask)
    right = 0
    for i in rows:
        row = list(outputs[i])
        if not any(map(math.isnan, row)):
            right += sum(score > row[targets[i]] for score in row) < k
    return right / len(rows)


def loop_nats(outputs, targets, mask):
    nats = []
    for i in counted(targets, mask):
        row = [float(score) for score in outputs[i]]
        top = max(row)
        nats.append(top + math.log(sum(math.exp(score - top) for score in row)) - row[targets[i]])
    return nats


def loop_perplexity(outputs, targets, mask):
    nats = loop_nats(outputs, targets, mask)
    return math.exp(math.fsum(nats) / len(nats))


def loop_of_classes(kind, average, outputs, targets, mask):
    pairs = [(predicted(outputs[i]), int(targets[i])) for i in counted(targets, mask)]
    classes = sorted({c for pair in pairs for c in pair if c is not None})

    def ratio(part, whole):
        return part / whole if whole else 0.0

    def of(chosen):
        right = sum(p == t and t in chosen for p, t in pairs)
        guessed = sum(p in chosen for p, _ in pairs)
        actual = sum(t in chosen for _, t in pairs)
        return {
            "Precision": ratio(right, guessed), "Recall": ratio(right, actual),
            "F1": ratio(2 * right, guessed + actual),
        }[kind]  # fmt: skip

    values = {c: of([c]) for c in classes}
    if average == "micro":
        return of(classes)
    if average == "macro":
        return sum(values.values()) / len(values)
    if average == "weighted":
        return sum(values[t] for _, t in pairs) / len(pairs)
    return values


LOOPS = {
    "accuracy": loop_accuracy,
    "top1": partial(loop_top, 1),
    "top2": partial(loop_top, 2),
    "perplexity": loop_perplexity,
    **{
        f"{kind} {average}": partial(loop_of_classes, kind, average)
        for kind in ("Precision", "Recall", "F1")
        for average in ("macro", "micro", "weighted", None)
    },
}


@st.composite
def batches(draw, n_classes=None, nan=False):
    """Scores (..., C) with ties, targets with some -100, a mask or None; at least one target counts."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    n_classes = n_classes or draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    outputs = rng.integers(-3, 4, (*shape, n_classes)).astype(draw(st.sampled_from([np.float32, np.float64])))
    targets = rng.integers(0, n_classes, shape).astype(draw(st.sampled_from([np.int64, np.int32, np.int16])))
    targets[rng.random(shape) < 0.2] = -100
    mask = draw(st.sampled_from([None, rng.random(shape) < 0.6, rng.random(shape[-1:]) < 0.6]))
    if nan and draw(st.booleans()):
        outputs[rng.random(outputs.shape) < 0.1] = np.nan
    if not counted(targets, mask):
        targets[(0,) * len(shape)] = 0
        mask = None
    return outputs, targets, mask


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40)
@given(st.data())
def test_against_plain_loops(name, data):
    batch = data.draw(batches(nan=name != "perplexity"))
    found, expected = measured(MAKERS[name](), *batch), LOOPS[name](*batch)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-6 if name == "perplexity" else 1e-14)
    assert type(found) in (float, dict)


@settings(max_examples=40)
@given(batches(n_classes=6))
def test_bits_per_byte_against_plain_loops(batch):
    _, targets, mask = batch
    n_bytes = sum(int(LENGTHS[targets[i]]) for i in counted(targets, mask))
    metric = metrics.BitsPerByte(LENGTHS)
    metric.update(*batch)
    if n_bytes:
        expected = math.fsum(loop_nats(*batch)) / math.log(2) / n_bytes
        # A loss near 0 is the logarithm of a float32 sum near 1, and has no better digits than that.
        assert metric.compute() == pytest.approx(expected, rel=1e-6, abs=4 * float(np.finfo(np.float32).eps))


@settings(max_examples=40)
@given(batches(n_classes=5, nan=True))
def test_confusion_matrix_against_plain_loops(batch):
    outputs, targets, mask = batch
    expected, without = np.zeros((5, 5), int), 0
    for i in counted(targets, mask):
        prediction = predicted(outputs[i])
        if prediction is None:
            without += 1
        else:
            expected[targets[i], prediction] += 1
    metric = metrics.ConfusionMatrix(5)
    matrix = measured(metric, *batch)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, expected)
    assert metric.unpredicted == without


def counted_share(outputs, batch):
    return len(counted(batch.targets, batch.mask)), batch.targets.size


ALL = {
    **MAKERS,
    "bits per byte": partial(metrics.BitsPerByte, LENGTHS),
    "confusion": partial(metrics.ConfusionMatrix, 6),
    "mean": partial(metrics.Mean, counted_share),
}


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25)
@given(st.data())
def test_any_split_gives_the_same(name, data):
    summed = name in ("perplexity", "bits per byte")  # the others only count
    outputs, targets, mask = data.draw(batches(n_classes=6, nan=not summed))
    mask = np.broadcast_to(True if mask is None else mask, targets.shape)
    whole, one, merged = ALL[name](), ALL[name](), ALL[name]()
    whole.update(outputs, targets, mask)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(targets)), max_size=4)))
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, len(targets)]):
        batch = outputs[begin:end], targets[begin:end], mask[begin:end]
        one.update(*batch)
        parts.append(ALL[name]())
        parts[-1].update(*batch)
    for part in reversed(parts):
        merged.merge(part)
    for other in (one, merged):
        for attribute in whole._sums:
            found, expected = getattr(other, attribute), getattr(whole, attribute)
            np.testing.assert_allclose(found, expected, rtol=1e-14 if attribute == "nats" else 0)
        if not summed:
            np.testing.assert_equal(other.compute(), whole.compute())
        elif whole.count:
            assert other.compute() == pytest.approx(whole.compute(), rel=1e-13)


# By hand ---------------------------------------------------------------------------------------------

TARGETS = np.array([0, 1, 2, 0, 1, 2])
GUESSES = np.array([0, 2, 1, 0, 0, 1])  # scikit-learn's own example of these metrics


def test_precision_recall_and_f1_by_hand():
    def value(cls, average):
        return measured(cls(average, n_classes=3), GUESSES, TARGETS)

    assert value(metrics.Precision, "macro") == pytest.approx(2 / 9)  # (2/3 + 0 + 0) / 3
    assert value(metrics.Precision, "micro") == pytest.approx(2 / 6)
    assert value(metrics.Precision, None) == {0: 2 / 3, 1: 0.0, 2: 0.0}
    assert value(metrics.Recall, "macro") == pytest.approx(1 / 3)
    assert value(metrics.Recall, None) == {0: 1.0, 1: 0.0, 2: 0.0}
    assert value(metrics.F1, "macro") == pytest.approx(0.8 / 3)
    assert value(metrics.F1, "weighted") == pytest.approx(0.8 / 3)
    assert value(metrics.F1, "micro") == pytest.approx(1 / 3)
    assert measured(metrics.ConfusionMatrix(3), GUESSES, TARGETS).tolist() == [
        [2, 0, 0],
        [1, 0, 1],
        [0, 2, 0],
    ]


def test_weighted_by_the_number_of_targets():
    targets, guesses = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert measured(metrics.Recall("weighted", 2), guesses, targets) == pytest.approx((3 * 2 / 3 + 1) / 4)
    assert measured(metrics.Precision("weighted", 2), guesses, targets) == pytest.approx((3 * 1 + 0.5) / 4)


def test_classes_that_do_not_occur_do_not_take_part_and_zero_by_zero_is_zero():
    targets, guesses = np.array([7, 7]), np.array([7, 3])
    assert measured(metrics.Precision(None, 10), guesses, targets) == {3: 0.0, 7: 1.0}
    assert measured(metrics.Recall(None, 10), guesses, targets) == {3: 0.0, 7: 0.5}  # 3 is 0 / 0
    assert measured(metrics.Recall("macro", 10), guesses, targets) == 0.25


def test_perplexity_and_bits_of_known_probabilities():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.125, 0.375, 0.5]])
    targets = np.array([0, 0])
    assert measured(metrics.Perplexity(), np.log(probabilities), targets) == pytest.approx(4.0)  # 2 bits each
    bits = metrics.BitsPerByte([2, 1, 1])
    assert measured(bits, np.log(probabilities) + 7, targets) == pytest.approx(1.0)  # 4 bits, 4 bytes
    assert measured(metrics.Perplexity(), np.zeros((5, 8), np.float32), np.arange(5)) == pytest.approx(8.0)


def test_perplexity_of_known_losses():
    metric = metrics.Perplexity()
    metric.add(2 * math.log(3), 2)
    metric.add(0.0, 2)
    assert metric.compute() == pytest.approx(math.sqrt(3))
    metric.add(1e9, 1)
    assert metric.compute() == math.inf


def test_hard_logits():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert measured(metrics.Perplexity(), logits, np.array([0, 1])) == 1.0
    assert measured(metrics.Perplexity(), logits, np.array([1, 1])) == math.inf  # exp(10,000)
    infinite = np.array([[np.inf, 0.0], [-np.inf, 0.0]])
    assert measured(metrics.Accuracy(), infinite, np.array([0, 0])) == 0.5
    assert measured(metrics.TopK(1), infinite, np.array([0, 0])) == 0.5


@pytest.mark.parametrize("name", [name for name in MAKERS if name[:3] not in ("top", "per")])
def test_integer_predictions_are_the_scores_largest(name):
    rng = np.random.default_rng(3)
    outputs, targets = rng.normal(size=(4, 5, 6)), rng.integers(0, 6, (4, 5))
    given = MAKERS[name]() if name == "accuracy" else MAKERS[name](n_classes=6)
    assert measured(given, outputs.argmax(-1), targets) == measured(MAKERS[name](), outputs, targets)


def test_tensors_masks_and_views():
    rng = np.random.default_rng(4)
    outputs, targets = rng.normal(size=(6, 4, 5)), rng.integers(0, 5, (4, 6))
    view = outputs.transpose(1, 0, 2)
    view.flags.writeable = False
    mask = np.arange(6) < 3  # broadcasts: the first three of each sequence
    for name, make in MAKERS.items():
        expected = measured(make(), view[:, :3].copy(), targets[:, :3])
        assert measured(make(), view, targets, mask) == pytest.approx(expected, rel=1e-12), name
        assert measured(make(), Tensor(view.copy()), targets, mask) == pytest.approx(expected, rel=1e-12)


def test_uncounted_targets_may_be_anything():
    outputs, targets = np.eye(3), np.array([0, 99, -7])
    mask = np.array([True, False, False])
    for make in MAKERS.values():
        measured(make(), outputs, targets, mask)
    metric = metrics.Accuracy()
    metric.update(outputs, np.array([0, -100, 1]))
    assert (metric.correct, metric.count) == (1, 2)


def test_merging_brings_the_number_of_classes():
    merged, part = metrics.F1(), metrics.F1()
    part.update(np.eye(4), np.arange(4))
    merged.merge(part)
    merged.merge(metrics.F1())
    merged.update(np.arange(4), np.arange(4))  # which needs the number
    assert merged.counts.tolist() == [[2] * 4] * 3
    other = metrics.F1()
    other.update(np.eye(5), np.arange(5))
    with pytest.raises(InputError, match="a metric of 4 classes cannot be merged with one of 5"):
        merged.merge(other)


def test_top_k_in_several_blocks(monkeypatch):
    rng = np.random.default_rng(6)
    batch = rng.integers(0, 9, (50, 7)).astype(float), rng.integers(0, 7, 50), rng.random(50) < 0.8
    whole = measured(metrics.TopK(3), *batch)
    monkeypatch.setattr(metrics, "_BLOCK", 4 * 7 + 3)
    assert measured(metrics.TopK(3), *batch) == whole == loop_top(3, *batch)


def test_reset_forgets():
    outputs, targets = np.eye(6), np.arange(6)
    for make in ALL.values():
        metric, once = make(), make()
        metric.update(outputs[::-1], targets)
        metric.reset()
        for attribute in metric._sums:
            assert not np.any(getattr(metric, attribute))
        metric.update(outputs, targets)
        once.update(outputs, targets)
        np.testing.assert_equal(metric.compute(), once.compute())


# Ties and NaN ----------------------------------------------------------------------------------------


def test_ties():
    scores = np.array([[1.0, 3.0, 3.0, 2.0]] * 4)
    targets = np.arange(4)
    assert [measured(metrics.TopK(k), scores, targets) for k in (1, 2, 3, 4)] == [0.5, 0.5, 0.75, 1.0]
    assert measured(metrics.Accuracy(), scores, targets) == 0.25  # the first of the largest
    assert measured(metrics.ConfusionMatrix(4), scores, targets)[:, 1].tolist() == [1] * 4
    assert measured(metrics.TopK(1), np.zeros((3, 5)), np.array([0, 2, 4])) == 1.0


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_a_row_with_nan_is_never_right(place, target):
    scores = np.array([[5.0, 4.0, 3.0]])
    scores[0, place] = np.nan
    targets = np.array([target])
    for metric in (metrics.Accuracy(), *map(metrics.TopK, (1, 2, 3))):
        assert measured(metric, scores, targets) == 0.0
    matrix = metrics.ConfusionMatrix(3)
    assert not measured(matrix, scores, targets).any() and matrix.unpredicted == 1
    assert measured(metrics.Recall(None), scores, targets) == {target: 0.0}
    assert math.isnan(measured(metrics.Perplexity(), scores, targets))
    hidden = np.array([False])
    metric = metrics.Perplexity()
    metric.update(scores, targets, hidden)
    metric.update(np.zeros((1, 3)), targets)
    assert metric.compute() == pytest.approx(3.0)


# The rest --------------------------------------------------------------------------------------------


def test_sizes_zero_and_one():
    for make in MAKERS.values():
        metric = make()
        metric.update(np.zeros((0, 4)), np.zeros(0, int))
        metric.update(np.zeros((2, 0, 4)), np.zeros((2, 0), int))
        with pytest.raises(InputError, match=f"^{type(metric).__name__} has counted nothing, "):
            metric.compute()
    assert measured(metrics.Accuracy(), np.zeros(4), np.array(0)) == 1.0  # one row, no batch axis
    assert measured(metrics.Perplexity(), np.zeros((3, 1)), np.zeros(3, int)) == 1.0


def test_a_mean_of_a_users_function():
    def length(outputs, batch):
        return abs(outputs).sum(), len(batch.targets)

    metric = metrics.Mean(length)
    metric.update(np.array([1.0, -2.0]), data.Batch(np.zeros(2), np.zeros(2, int)))
    metric.update(np.array([3.0]), np.zeros(1, int))
    assert metric.compute() == 2.0
    metric = metrics.Mean(lambda outputs, batch: (Tensor(outputs).sum(), batch.mask.sum()))
    metric.update(np.array([1.0, 2.0]), SimpleNamespace(targets=None, mask=np.array([True, True])))
    assert metric.compute() == 1.5


def test_metrics_by_name():
    for name in set(metrics.BY_NAME) - {"bits_per_byte"}:
        built = metrics.build(name)
        assert type(built) is type(metrics.BY_NAME[name]())
        assert measured(built, np.eye(6), np.arange(6)) >= 0
    assert metrics.build("top5").k == 5
    built = metrics.build("bits_per_byte", data.CharTokenizer("aé"))
    assert measured(built, np.zeros((2, 2)), np.array([0, 1])) == pytest.approx(2 / 3)


def test_the_documentations_examples_run_and_name_all():
    for block in re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL):
        exec(compile(block, "metrics.md", "exec"), {})
    for name in (*metrics.BY_NAME, *metrics.__all__):
        assert f"`{name}" in DOCS or f'"{name}"' in DOCS, name


def pair(outputs, batch):
    return outputs, "two"


SCORES = np.zeros((2, 3, 4))
GOOD = np.zeros((2, 3), int)
BAD = np.array([[0, 1, 2], [3, 4, 0]])


@pytest.mark.parametrize("dtype", [np.float16, np.longdouble])
def test_scores_of_any_float_type(dtype):
    for name, make in MAKERS.items():
        one, other = make(), make()
        one.update(SCORES.astype(dtype), GOOD)
        other.update(SCORES.astype(dtype).astype(np.float64), GOOD)
        assert one.compute() == other.compute(), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.update(SCORES, GOOD.astype(float)), "targets are float64, they must be integers"),
        (lambda m: m.update(SCORES, BAD), r"targets\[1, 1\] is 4, it must be in 0 to 3"),
        (lambda m: m.update(SCORES, GOOD - 1), r"targets\[0, 0\] is -1, it must be in 0 to 3"),
        (lambda m: m.update(SCORES[0, 0], np.array(5)), "targets is 5, it must be in 0 to 3"),
        (
            lambda m: m.update(SCORES, GOOD[:, :2]),
            r"outputs are float64 \(2, 3, 4\) and targets \(2, 2\), outputs",
        ),
        (
            lambda m: m.update(SCORES[..., 0], GOOD),
            r"outputs are float64 \(2, 3\) and targets \(2, 3\), outputs",
        ),
        (lambda m: m.update(SCORES.astype(complex), GOOD), "outputs are complex128"),
        (
            lambda m: m.update(SCORES[..., :0], GOOD),
            r"outputs are \(2, 3, 0\), they must have at least one class",
        ),
        (
            lambda m: m.update(SCORES, GOOD, np.ones(2, bool)),
            r"mask is \(2,\), it must broadcast to .* \(2, 3\)",
        ),
        (
            lambda m: m.update(SCORES, GOOD, np.ones((1, 2, 3), bool)),
            r"mask is \(1, 2, 3\), it must broadcast",
        ),
        (lambda m: m.update(SCORES, GOOD, np.ones(3)), "mask is float64, it must be boolean: True counts"),
    ],
)
@pytest.mark.parametrize("name", ["accuracy", "top2", "perplexity", "F1 macro"])
def test_bad_batches_are_refused_and_not_counted(name, call, message):
    metric = MAKERS[name]()
    with pytest.raises(InputError, match=message) as caught:
        call(metric)
    assert "\n" not in str(caught.value)
    assert not any(np.any(getattr(metric, attribute)) for attribute in metric._sums)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.TopK(0), "k is 0, it must be an integer of at least 1"),
        (lambda: metrics.TopK(True), "k is True"),
        (lambda: metrics.TopK(5).update(SCORES, GOOD), r"k is 5, it must be at most .* classes \(4\)"),
        (lambda: metrics.TopK(2).update(GOOD, GOOD), r"outputs are int64, TopK needs all classes' scores"),
        (lambda: metrics.Perplexity().update(GOOD, GOOD), "outputs are int64, Perplexity needs all"),
        (lambda: metrics.Accuracy().update(GOOD[0], GOOD), r"predictions are \(3,\) and targets \(2, 3\)"),
        (lambda: metrics.F1().update(GOOD, GOOD), r"integer predictions do not tell .*: F1\(n_classes"),
        (lambda: metrics.F1(n_classes=3).update(BAD, GOOD), r"outputs\[1, 0\] is 3, it must be in 0 to 2"),
        (lambda: metrics.F1(n_classes=3).update(GOOD, BAD), r"targets\[1, 0\] is 3, it must be in 0 to 2"),
        (lambda: metrics.F1(n_classes=3).update(SCORES, GOOD), "outputs have 4 classes, the metric has 3"),
        (lambda: metrics.F1().update(SCORES, GOOD.astype(np.uint64) + np.uint64(2**64 - 100)),
         r"targets have 18446744073709551516, they must be below 2\*\*63"),
        (lambda: metrics.F1("macr"), r'average is macr \(did you mean "macro"\?\), it must be one of'),
        (lambda: metrics.F1(n_classes=0), "n_classes is 0, it must be an integer of at least 1"),
        (lambda: metrics.ConfusionMatrix(1025), "n_classes is 1025, a confusion matrix has at most 1,024"),
        (lambda: metrics.ConfusionMatrix(0), "n_classes is 0, it must be an integer of at least 1"),
        (lambda: metrics.ConfusionMatrix(5).update(SCORES, GOOD), "outputs have 4 classes, the metric has 5"),
        (lambda: metrics.BitsPerByte(None), "byte_lengths is None: this tokenizer does not know"),
        (lambda: metrics.BitsPerByte([1, -1]), "byte_lengths must be one integer of at least 0"),
        (lambda: metrics.BitsPerByte([1, 1]).update(SCORES, GOOD), "byte_lengths has 2 tokens, outputs have"),
        (lambda: metrics.Mean(3), "function is 3, it must be a function"),
        (lambda: metrics.Mean(pair).update(1.0, GOOD), r"pair returned .*, it must return \(sum, count\)"),
        (lambda: metrics.Mean(lambda o, b: 3).update(1.0, GOOD), r"lambda> returned 3, it must return \("),
        (lambda: metrics.Accuracy().merge(metrics.TopK(1)), "a Accuracy cannot be merged with a TopK"),
        (lambda: metrics.TopK(1).merge(metrics.TopK(2)), "a metric with k = 1 cannot be merged with one"),
        (lambda: metrics.F1().merge(metrics.F1("micro")), "a metric with average = macro cannot be merged"),
        (lambda: metrics.F1(n_classes=2).merge(metrics.F1(n_classes=3)), "a metric of 2 classes cannot be"),
        (lambda: metrics.build("acuracy"), r'"acuracy" is no metric \(did you mean "accuracy"\?\), it'),
        (lambda: metrics.build("bits_per_byte", data.IdTokenizer(9)), "byte_lengths is None"),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
