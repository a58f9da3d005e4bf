"""Records: written line by line, cut back on resuming, read in whatever state a run was left."""

import json
import math

import numpy as np
import pytest

from cllm import records
from cllm.errors import InputError
from cllm.tensor import Tensor


def train(step, loss=1.0):
    return {"step": step, "split": "train", "loss": loss}


def val(step, loss=1.0):
    return {"step": step, "split": "val", "loss": loss, "perplexity": math.exp(loss)}


def test_each_line_is_there_at_once(tmp_path):
    with records.Recorder(tmp_path) as recorder:
        for step in (1, 2):
            recorder.write(train(step))
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    assert lines[0] == '{"step": 1, "split": "train", "loss": 1.0}'


def test_values_of_all_kinds_stay_json(tmp_path):
    with records.Recorder(tmp_path) as recorder:
        recorder.write(
            train(np.int64(1), np.float32(0.5))
            | {"nan": math.nan, "inf": np.float64(-np.inf), "list": (1, np.array([1.0, np.nan])),
               "path": tmp_path, "text": "\udc80\u2028\r\n", "flag": True, "zero_d": np.array(3)}
        )  # fmt: skip
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads(line, parse_constant=refuse)
    assert record == train(1, 0.5) | {
        "nan": None, "inf": None, "list": [1, [1.0, None]], "path": str(tmp_path), "text": "\udc80\u2028\r\n",
        "flag": True, "zero_d": 3,
    }  # fmt: skip
    with (
        records.Recorder(tmp_path) as recorder,
        pytest.raises(ValueError, match=r'needs "step" and "split"; .* loss'),
    ):
        recorder.write({"loss": 1.0})


def test_a_tensor_of_one_element_is_its_number(tmp_path):
    with records.Recorder(tmp_path) as recorder:
        recorder.write(train(1) | {"x": Tensor(2.5), "y": [Tensor([[3.0]])], "z": np.longdouble(0.5)})
    assert records.Run(tmp_path).records == [train(1) | {"x": 2.5, "y": [3.0], "z": 0.5}]


@pytest.mark.parametrize(
    ("value", "given"),
    [
        (Tensor([1.0, 2.0]), r"'x' is a Tensor of shape \(2,\)"),
        (b"1", "'x' is a bytes"),
        ({"in": {1}}, "'x' is a dict"),
        (np.complex64(1j), "'x' is a complex64"),
        (Tensor, "'x' is a type"),
    ],
)
def test_what_json_cannot_hold_is_named(tmp_path, value, given):
    with (
        records.Recorder(tmp_path) as recorder,
        pytest.raises(InputError, match=f"^a record's {given}, it must be .*, which JSON can hold$"),
    ):
        recorder.write(train(1) | {"x": value})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_series(tmp_path):
    with records.Recorder(tmp_path) as recorder:
        for record in (train(1), val(1, 3.0), train(2, math.nan), train(3, 2.0) | {"lr": 0.1}):
            recorder.write(record)
    (run,) = records.load(tmp_path)
    steps, values = run.series("train", "loss")
    assert (steps.dtype, values.dtype) == (np.int64, np.float64)
    np.testing.assert_array_equal(steps, [1, 2, 3])
    np.testing.assert_array_equal(values, [1.0, np.nan, 2.0])
    steps, values = run.series("train", "lr")  # not measured is not there; it is no zero and no NaN
    np.testing.assert_array_equal(steps, [3])
    assert [len(part) for part in run.series("test", "loss")] == [0, 0]


def test_truncate(tmp_path):
    with records.Recorder(tmp_path) as recorder:
        for step in range(1, 7):
            recorder.write(train(step))
            if step % 2 == 0:
                recorder.write(val(step))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(b'{"step": 7, "spl')
    with records.Recorder(tmp_path) as recorder:
        assert path.read_bytes() == b"".join(lines)  # the torn line is gone already
        recorder.truncate(4)
        assert path.read_bytes() == b"".join(lines[:6])
        recorder.write(train(5))
        assert path.read_bytes() == b"".join(lines[:7])
        recorder.truncate(-1)
        assert path.read_bytes() == b""
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "tail", [b"{", b'{"step": 2, "split"', b"\0\0\0", b'{"step": 2}\n', b"\xff\xfe", b"12"]
)
def test_a_torn_last_line_is_no_record(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(train(1)).encode() + b"\n" + tail)
    assert records.load(tmp_path)[0].records == [train(1)]
    with records.Recorder(tmp_path) as recorder:
        recorder.write(train(2))
    assert records.load(tmp_path)[0].records == [train(1), train(2)]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train(1)))
    with records.Recorder(tmp_path) as recorder:
        recorder.write(train(2))
    assert records.load(tmp_path)[0].records == [train(1), train(2)]


def test_a_series_of_an_unknown_name_is_an_error(tmp_path):
    with records.Recorder(tmp_path) as recorder:
        recorder.write({"step": 1, "split": "train", "loss": 1.0, "lr": 0.1, "rows": [1, 2]})
        recorder.write({"step": 1, "split": "val", "loss": 1.0, "accuracy": 0.5})
    (run,) = records.load(tmp_path)
    assert run.names() == ["train.loss", "train.lr", "train.rows", "val.loss", "val.accuracy"]
    message = r'no record of val.acuracy \(did you mean "val.accuracy"\?\); it has train.loss, train.lr'
    with pytest.raises(InputError, match=message):
        run.series("val", "acuracy")
    with pytest.raises(InputError, match=r"train.rows of .* is not one number a record"):
        run.series("train", "rows")
    assert len(run.series("train", "grad_norm")[0]) == 0  # a name that there is, not recorded here
    assert len(run.series("valid", "loss")[0]) == 0  # a run that has not ended may still come to it
    records.write_summary(tmp_path, {"state": "finished"})
    (run,) = records.load(tmp_path)
    with pytest.raises(InputError, match=r'no record of valid.loss \(did you mean "val.loss"\?\)'):
        run.series("valid", "loss")
    assert len(records.Run(tmp_path / "nothing").series("val", "los")[0]) == 0


def test_damage_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n' + json.dumps(train(2)) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1, is not a record"):
        _ = records.load(tmp_path)[0].records


def test_summary_and_config(tmp_path):
    (tmp_path / "config.toml").write_text('[optim]\nlr = 0.1\nbetas = [0.9, 0.99]\n[data]\nsource = "x"\n')
    (run,) = records.load(tmp_path)
    assert run.config == {"optim.lr": 0.1, "optim.betas": [0.9, 0.99], "data.source": "x"}
    assert (run.state, run.summary, run.records) == ("unfinished", {}, [])
    records.write_summary(tmp_path, {"state": "failed", "train_loss": np.float32(np.nan), "best": None})
    (run,) = records.load(tmp_path)
    assert run.summary == {"state": "failed", "train_loss": None, "best": None}
    assert run.state == "failed"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.toml", "summary.json"]


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path):
    records.write_summary(tmp_path, {"state": "finished"})
    with pytest.raises(InputError, match=r"^the summary's 'state' is a object, it must be a number"):
        records.write_summary(tmp_path, {"state": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"state": "finished"}


@pytest.mark.parametrize("name", ["config.toml", "summary.json"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / name).write_text("{")
    (run,) = records.load(tmp_path)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        _ = (run.config, run.summary)


def test_load_a_sweep(tmp_path):
    for name in ("s001-seed0", "s000-seed1", "s000-seed0", "not-a-run"):
        (tmp_path / "trials" / name).mkdir(parents=True)
        if name.startswith("s"):
            (tmp_path / "trials" / name / "config.toml").touch()
    assert [run.path.name for run in records.load(tmp_path)] == ["s000-seed0", "s000-seed1", "s001-seed0"]


def test_load_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such run or sweep: .*nothing"):
        records.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no run"):
        records.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="holds no run"):
        records.load(tmp_path / "file")
