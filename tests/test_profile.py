"""[train] profile: the table of where a step's time goes."""

import ast
import json
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cllm
from cllm import checkpoint, cli, kernels, parity, profile, records
from cllm import config as configs
from cllm.data import Examples
from cllm.errors import InputError
from cllm.progress import Lines, Silent
from cllm.task import Task
from cllm.train import PARTS, Trainer, resume

PACKAGE = Path(cllm.__file__).parent
LANGUAGE = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 16, "model.dropout": 0.1,
    "schedule.warmup_steps": 2, "train.batch_size": 4, "train.max_steps": 9, "train.eval_interval": 0,
    "train.grad_accum": 2, "train.threads": 1,
}  # fmt: skip


@pytest.fixture
def often(monkeypatch):
    """Every other step is timed, from the second on."""
    monkeypatch.setattr(profile, "WARM_UP", 1)
    monkeypatch.setattr(profile, "EVERY", 2)


def originals():
    return {name: getattr(kernels, name) for name in profile.KERNELS}


def fit(text, run_dir, **values):
    values = {key.replace("__", "."): value for key, value in values.items()}
    config = configs.load(None, LANGUAGE | {"data.source": str(text), "run.dir": str(run_dir)} | values)
    return Trainer(config, progress=Silent()).fit()


def records_of(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: x for key, x in json.loads(line).items() if not records.is_timing(key)} for line in lines]


def arrays_of(run_dir):
    model, optimizer, _ = checkpoint.load(checkpoint.newest(run_dir))
    return {name: x.tobytes() for name, x in (model | optimizer).items()}


def check(found, steps):
    """A profile that is whole: its shares add up to 1, its milliseconds to the step's."""
    assert found["steps"] == steps
    assert found["ms"] > 0
    assert sum(found["parts"].values()) == pytest.approx(1)
    assert min(found["parts"].values()) >= 0
    rows = {row["name"]: row for row in found["rows"]}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert sum(row["ms"] for row in rows.values()) == pytest.approx(found["ms"])
    assert all(row["share"] >= 0 and row["ms"] >= 0 for row in rows.values())
    return rows


def test_each_kernel_has_a_formula():
    assert sorted(profile.FLOPS) == sorted(profile.KERNELS)


@pytest.mark.parametrize("operation", parity.TABLE, ids=lambda operation: operation.name)
def test_formulas_take_what_the_kernels_take(operation):
    timed = profile.Profile(SimpleNamespace(), {})
    for options in operation.options:
        case = parity.Case(operation, operation.large, options, "float32")
        with timed._wrapped():
            case.results(case.inputs())
    for name in operation.calls.split():
        row = timed.rows[name]
        assert row.calls and row.own > 0 and row.bytes > 0, name
        assert (row.flops > 0) == (name != "embedding_forward"), name


def test_work_of_known_operations():
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def work(name, *args, **options):
        timed = profile.Profile(SimpleNamespace(), {})
        with timed._wrapped():
            getattr(kernels, name)(*args, **options)
        return timed.rows[name].flops, timed.rows[name].bytes

    x, w, b = array(6, 5), array(7, 5), array(7)
    assert work("linear_forward", x, w, b) == (2 * 6 * 5 * 7, 4 * (30 + 35 + 7 + 42))
    assert work("linear_forward", x, weight=w, bias=b) == work("linear_forward", x=x, weight=w, bias=b)
    dy, out = array(6, 7), (None, np.zeros_like(w), np.zeros_like(b))
    assert work("linear_backward", dy, x, w, out=out) == (4 * 6 * 5 * 7, 4 * (42 + 30 + 35 + 30 + 35 + 7))
    _, moved = work("linear_backward", dy, x, w, out=out, accumulate=True)
    assert moved == 4 * (42 + 30 + 35 + 30 + 2 * (35 + 7))
    assert work("matmul", array(2, 3, 5, 4), array(4, 6)) == (2 * 2 * 3 * 5 * 4 * 6, 4 * (120 + 24 + 180))
    assert work("scale_", array(10), 2.0) == (10, 80)
    assert work("adamw_update", *(array(10) for _ in range(3)), abs(array(10)), step=1, lr=0.1)[1] == 7 * 40
    assert work("embedding_forward", np.zeros(3, np.int64), array(100, 8)) == (0, 2 * 4 * 3 * 8)
    for T, S in ((5, 5), (3, 7), (7, 3)):
        q, k, v = array(2, 4, T, 8), array(2, 2, S, 8), array(2, 2, S, 6)
        pairs = np.tril(np.ones((T, S))).sum()
        assert work("attention_forward", q, k, v)[0] == 2 * 2 * 4 * T * S * (8 + 6)
        assert work("attention_forward", q, k, v, True)[0] == 2 * 2 * 4 * pairs * (8 + 6)
    assert (
        work("packed_attention_forward", array(2, 5, 4 * 8 + 2 * 8), 4, n_kv_head=1)[0] == 2 * 2 * 4 * 15 * 16
    )


def test_bits_are_the_same(text_file, tmp_path, often):
    before = originals()
    plain = fit(text_file, tmp_path / "plain")
    assert "profile" not in plain
    found = fit(text_file, tmp_path / "timed", train__profile=True)
    assert originals() == before
    assert records_of(tmp_path / "plain") == records_of(tmp_path / "timed")
    assert arrays_of(tmp_path / "plain") == arrays_of(tmp_path / "timed")
    assert {key for key in found if key not in plain} == {"profile"}
    assert json.loads((tmp_path / "timed" / "summary.json").read_text())["profile"] == found["profile"]

    rows = check(found["profile"], steps=4)
    counted = {name: row["calls"] for name, row in rows.items() if row["calls"]}
    assert counted["packed_attention_forward"] == counted["packed_attention_backward"] == 2 * 2
    assert sum(n for name, n in counted.items() if name.startswith("linear_cross_entropy")) >= 2
    assert counted["adamw_update"] == 1
    assert list(found["profile"]["parts"]) == ["data", "forward", "backward", "optimizer", "other"]
    assert {"data", "forward, outside kernels", "optimizer, outside kernels", "other"} < rows.keys()


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "adagrad", "lion", "adafactor", "muon"])
def test_each_optimizer_has_its_row(text_file, tmp_path, often, name):
    more = {"optim__weight_decay": 0.0} if name == "adagrad" else {}
    found = fit(text_file, tmp_path / "run", train__profile=True, optim__name=name, **more)
    assert f"{name}_update" in check(found["profile"], steps=4)


def test_shares_are_right(tmp_path, often):
    """Sleeps of known parts: 4, 2 and 2 of 8."""
    inputs = np.ones((8, 3), np.float32)
    model = cllm.nn.Linear(3, 2)

    def loss(model, batch):
        time.sleep(0.04)
        return cllm.functional.mse_loss(model(batch.inputs), batch.targets, reduction="sum"), 16

    class Slow(Examples):
        def __getitem__(self, indices):
            time.sleep(0.02)
            return super().__getitem__(indices)

    def slow(dy, *args, **options):
        time.sleep(0.02)
        return backward(dy, *args, **options)

    backward = kernels.linear_backward
    task = Task(model, Slow(inputs, np.ones((8, 2), np.float32)), loss=loss)
    config = configs.load(None, {
        "run.dir": str(tmp_path / "run"), "train.max_steps": 7, "train.batch_size": 4, "train.profile": True,
        "schedule.warmup_steps": 0,
    })  # fmt: skip
    kernels.linear_backward = slow  # what a user puts there is timed, and stays
    try:
        found = Trainer(config, task, progress=Silent()).fit()["profile"]
        assert kernels.linear_backward is slow
    finally:
        kernels.linear_backward = backward
    rows = check(found, steps=3)
    largest = [row["name"] for row in found["rows"][:3]]
    assert largest[0] == "forward, outside kernels"
    assert sorted(largest[1:]) == ["data", "linear_backward"]
    assert rows["linear_backward"]["ms"] >= 20
    assert rows["forward, outside kernels"]["ms"] >= 40
    assert found["parts"]["backward"] >= rows["linear_backward"]["share"]


def test_originals_are_back_after_an_exception(text_file, tmp_path, often):
    before, seen = originals(), []

    class Failure(Exception):
        pass

    def loss(model, batch):
        seen.append(kernels.linear_forward is before["linear_forward"])
        out = cllm.functional.mse_loss(model(batch.inputs), batch.targets, reduction="sum")
        if len(seen) == 4:
            raise Failure
        return out, 8

    x = np.ones((8, 2), np.float32)
    task = Task(cllm.nn.Linear(2, 2), Examples(x, x), loss=loss)
    config = configs.load(None, {
        "run.dir": str(tmp_path / "run"), "train.batch_size": 4, "train.profile": True,
    })  # fmt: skip
    trainer = Trainer(config, task, progress=Silent())
    with pytest.raises(Failure):
        trainer.fit()
    assert seen == [True, False, True, False]  # only the timed steps see anything else
    assert originals() == before
    assert not any(method in vars(trainer) for method in PARTS)
    check(json.loads((tmp_path / "run" / "summary.json").read_text())["profile"], steps=2)


def test_steps_of_two_threads(often):
    """One of them is timed, without the other's kernels, and the originals are back."""
    before, first, second = originals(), *(profile.Profile(SimpleNamespace(), {}) for _ in range(2))
    inside, over = threading.Event(), threading.Event()

    def longer():
        kernels.scale_(np.ones(3), 2.0)
        inside.set()
        over.wait(10)

    other = threading.Thread(target=lambda: [second.step(update) for update in (list, longer)])

    def update():
        other.start()
        inside.wait(10)

    first.step(list)
    first.step(update)
    over.set()
    other.join()
    assert originals() == before
    assert (first.steps, second.steps) == (1, 0)
    assert first.rows["scale_"].calls == 0
    assert [first.step(list), first.step(list)] == [[], []]
    assert first.steps == 2


def test_a_resumed_run(text_file, tmp_path, often):
    fit(text_file, tmp_path / "run", schedule__name="constant")
    summary = resume(tmp_path / "run", {"train.max_steps": 14, "train.profile": True}, progress=Silent())
    check(summary["profile"], steps=2)
    summary = resume(tmp_path / "run", {"train.max_steps": 15, "train.profile": False}, progress=Silent())
    assert "profile" not in summary


def test_table(text_file, tmp_path, often, capsys):
    options = [f"--{key.replace('_', '-')}={value}" for key, value in LANGUAGE.items()]
    folder = tmp_path / "run"
    status = cli.main(
        ["train", *options, f"--data.source={text_file}", f"--run.dir={folder}", "--train.profile"]
    )
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("finished")) + 1
    assert re.fullmatch(r"profile of 4 steps, [\d.]+ ms each:", lines[start])
    shares = [float(line[32:38]) for line in lines[start + 3 :]]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert shares == sorted(shares, reverse=True)
    assert all(len(line) < 80 for line in lines[start:])
    assert any(line.startswith("  packed_attention_backward ") for line in lines)
    found = json.loads((folder / "summary.json").read_text())["profile"]
    assert profile.table(found) == lines[start:]


def test_a_run_that_ends_too_soon(text_file, tmp_path, capsys):
    values = {"data.source": str(text_file), "run.dir": str(tmp_path / "run"), "train.max_steps": 3}
    config = configs.load(None, LANGUAGE | values | {"train.profile": True})
    assert Trainer(config, progress=Lines()).fit()["profile"] == {"steps": 0}
    assert capsys.readouterr().out.endswith("\nprofile: no step was timed, the first is step 4\n")


def test_a_loop_of_ones_own_has_no_profile(tmp_path):
    (tmp_path / "mine.py").write_text("def train(config, run):\n    pass\n")
    with pytest.raises(InputError, match=r"^train\.profile is true, but task\.run is a loop of its own"):
        configs.load(None, {"task.run": f"{tmp_path}/mine.py:train", "train.profile": True})


def test_all_of_cllm_calls_kernels_by_their_module():
    """Elsewhere a kernel is looked up when it is called: a name bound at import would not be timed."""
    for path in PACKAGE.rglob("*.py"):
        if path.parts[len(PACKAGE.parts)] in ("kernels", "reference.py", "parity.py", "profile.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cllm.kernels"):
                bound = {alias.name for alias in node.names} & set(profile.KERNELS)
                assert not bound, f"{path} binds {bound}"
        for statement in _at_import(tree):
            for node in ast.walk(statement):
                called = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "kernels"
                assert not (called and node.attr in profile.KERNELS), f"{path}:{node.lineno}"


def _at_import(node):
    """The statements that run when a module is imported."""
    for statement in node.body:
        if isinstance(statement, ast.ClassDef):
            yield from _at_import(statement)
        elif not isinstance(statement, ast.FunctionDef):
            yield statement
