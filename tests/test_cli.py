"""The command line as a user meets it: what it prints, its exit status, and what it leaves on disk."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cllm import cli, config
from cllm.errors import InputError

TINY = [
    "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16", "--model.block-size", "16",
    "--train.batch-size", "4", "--train.max-steps", "12", "--train.eval-interval", "6",
    "--train.checkpoint-interval", "6", "--schedule.warmup-steps", "2", "--train.threads", "1",
]  # fmt: skip
COMMANDS = (
    "quickstart", "train", "resume", "sweep", "status", "plot", "report", "sample", "eval", "replay",
    "inspect", "verify-resume", "info", "bench",
)  # fmt: skip


@pytest.fixture
def cllm(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder: cllm("info") -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        status = cli.main([str(word) for word in argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run of 12 steps."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "plays.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 60, encoding="utf-8")
    directory = folder / "run"
    assert cli.main(["train", "--data.source", str(text), "--run.dir", str(directory), *TINY]) == 0
    return directory


def contents(folder):
    """Every file below a folder with its bytes."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def assert_one_sentence(result, *words):
    """Exit status 2, nothing but one line on stderr, and these words in it."""
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("cllm: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert str(word) in err


# Help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(cllm, command):
    status, out, err = cllm(command, "--help")
    assert (status, err) == (0, "")
    assert re.search(rf"examples?:\n  cllm {command}", out)
    assert all(len(line) <= 110 for line in out.splitlines())


def test_help_lists_the_commands_that_there_are(cllm):
    status, out, _ = cllm("--help")
    assert status == 0
    listed = re.search(r"\ncommands:\n(.*?)\n\n", out, re.DOTALL)[1]
    assert re.findall(r"^ {4}([\w-]+)", listed, re.MULTILINE) == list(COMMANDS)
    assert cllm() == (0, out, "")


def test_train_help_shows_every_config_key_with_its_default(cllm):
    _, out, _ = cllm("train", "--help")
    for key, default in config.flatten(config.to_dict(config.load())).items():
        line = re.search(rf"^ *--{re.escape(key.replace('_', '-'))} .*$", out, re.MULTILINE)
        assert line, key
        assert config.to_toml({"x": default}).removeprefix("x = ").strip() in line[0]


def test_train_help_shows_the_choices_of_a_key(cllm):
    _, out, _ = cllm("train", "--help")
    words = " ".join(out.split())
    assert '--model.position "learned" "learned" or "rotary" or "sinusoidal" or "alibi" or "none" ' in words
    assert '--task.run "FILE.py:NAME" --task.KEY an argument of that function' in words


def test_version(cllm):
    status, out, _ = cllm("--version")
    assert status == 0
    assert re.fullmatch(r"cllm \d+\.\d+\.\d+\S*\n", out)


# Overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.n-layer", "4"], {"model.n_layer": 4}),
        (["--model.n_layer=4"], {"model.n_layer": 4}),
        (["--optim.lr", "3e-4"], {"optim.lr": 3e-4}),
        (["--optim.lr", "-1"], {"optim.lr": -1}),
        (["--optim.betas", "0.9,0.99"], {"optim.betas": [0.9, 0.99]}),
        (["--model.no-bias"], {"model.bias": False}),
        (["--model.bias"], {"model.bias": True}),
        (["--model.bias", "false"], {"model.bias": False}),
        (["--model.bias=true"], {"model.bias": True}),
        (["--optim.nesterov", "--optim.momentum", "0.9"], {"optim.nesterov": True, "optim.momentum": 0.9}),
        (["--base.train.max-steps", "100"], {"base.train.max_steps": 100}),
        (["--base.model.no-bias"], {"base.model.bias": False}),
        (["--run.dir", "12"], {"run.dir": "12"}),
        (["--data.source=a=b.txt"], {"data.source": "a=b.txt"}),
        (["--train.seed", "1", "--train.seed", "2"], {"train.seed": 2}),
    ],
)
def test_overrides(words, expected):
    assert cli._split_overrides(words) == ([], expected)


FLAGGED = "def build(config, use_loss=False, no_mask=True, n=1): ...\ndef other(config, bias=True): ...\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--task.use-loss", "run.toml"], {"task.use_loss": True}),
        (["run.toml", "--task.no-use-loss", "--task.no-mask"], {"task.use_loss": False, "task.no_mask": 1}),
        (["run.toml", "--task.no-no-mask", "--task.n", "3"], {"task.no_mask": False, "task.n": 3}),
        (["--task.build", "a/my.py:other", "--task.no-bias"], {"task.bias": False}),
        (["sweep.toml", "--base.task.use-loss"], {"base.task.use_loss": True}),
        (["based.toml", "--base.task.no-use-loss"], {"base.task.use_loss": False}),
        (["wrong.toml", "--task.n", "3"], {"task.n": 3}),
    ],
)
def test_flags_of_a_tasks_function(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "my.py").write_text(FLAGGED)
    (tmp_path / "a" / "base.toml").write_text('[task]\nbuild = "my.py:build"\n')  # beside my.py
    (tmp_path / "run.toml").write_text('[task]\nbuild = "a/my.py:build"\n')
    (tmp_path / "sweep.toml").write_text('[base.task]\nbuild = "a/my.py:build"\n')
    (tmp_path / "based.toml").write_text('[sweep]\nbase = "a/base.toml"\n')
    (tmp_path / "wrong.toml").write_text("task = 3\n")
    rest, overrides = cli._split_overrides(words)
    overrides.pop("task.build", None)
    assert overrides == expected and len(rest) == sum(word.endswith(".toml") for word in words)
    with pytest.raises(InputError, match=r"--task\.n needs a value"):
        cli._split_overrides([*words, "--task.n"])


def test_overrides_leave_the_rest_to_argparse():
    words = ["a.toml", "--model.bias", "b.toml", "--workers", "2", "--train.seed", "3", "--dry-run"]
    rest, overrides = cli._split_overrides(words)
    assert rest == ["a.toml", "b.toml", "--workers", "2", "--dry-run"]
    assert overrides == {"model.bias": True, "train.seed": 3}


# Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], ["trian", '(did you mean "train"?)']),
        (["train", "--model.n-leyer", "4"], ["model.n_leyer", "model.n_layer"]),
        (["train", "--modle.n-layer", "4"], ["modle", "model"]),
        (["train", "--modell", "4"], ["unknown option --modell"]),
        (["train", "--lr", "3e-4"], ['unknown option --lr (did you mean "--optim.lr"?)']),
        (["train", "--no-bias"], ['(did you mean "--model.bias"?)']),
        (["train", "--name", "x"], ['(did you mean "--optim.name" or "--schedule.name"?)']),
        (["resume", "a", "--max-steps", "9"], ['(did you mean "--train.max-steps"?)']),
        (["sweep", "a.toml", "--lr", "3e-4"], ['(did you mean "--base.optim.lr"?)']),
        (["train", "--task.p", "3"], ["task.p is set, but neither task.build nor task.run is"]),
        (["train", "--task.build", "my.py:build"], ["task.build names my.py, which cannot be read"]),
        (["train", "--train.metrics", "acc"], ["train.metrics", "accuracy"]),
        (["train", "--model.n-layer"], ["--model.n-layer needs a value"]),
        (["train", "--model.n-layer", "four"], ["model.n_layer", "four", "integer"]),
        (["train", "--model.n-layer", "0"], ["n_layer", "0"]),
        (["train", "--model.n-head", "3"], ["n_embd", "n_head", "128", "3"]),
        (["train", "--optim.lr", "nan"], ["optim.lr", "nan"]),
        (["train", "--optim.lr", "-1"], ["lr", "-1"]),
        (["train", "--optim.name", "adamm"], ["adamm", "adam"]),
        (["train", "--optim.momentum", "0.9"], ["momentum", "adamw"]),
        (["train", "--schedule.name", "cosin"], ["cosin", "cosine"]),
        (["train", "--data.source", "python-stdlibs"], ["python-stdlibs", '(did you mean "python-stdlib"?)']),
        (["train", "--data.source", "missing.txt"], ["missing.txt"]),
        (["train", "missing.toml"], ["missing.toml"]),
        (["train", "a.toml", "b.toml"], ["unknown argument b.toml"]),
        (["resume", "missing"], ["missing"]),
        (["resume"], ["RUN"]),
        (["sweep", "missing.toml"], ["missing.toml"]),
        (["sweep", "missing.toml", "--workers", "0"], ["--workers", "0", "at least 1"]),
        (["plot", "missing"], ["missing"]),
        (["sample", "missing"], ["missing"]),
        (["sample", "missing", "--top-k", "x"], ["--top-k", "x"]),
        (["sample", "missing", "--checkpoint", "bset"], ["bset", "best", "last"]),
        (["sample", "missing", "--tempreature", "1"], ["--tempreature", '(did you mean "--temperature"?)']),
        (["bench", "--sizes", "tiny,chr"], ["chr", "char"]),
        (["bench", "--threads", "0"], ["--threads", "at least 1"]),
        (["bench", "--only", "step,gem"], ["gem", "gemm"]),
        (["info", "extra"], ["unknown argument extra"]),
    ],
)
def test_bad_words_are_one_sentence(cllm, tmp_path, words, expected):
    assert_one_sentence(cllm(*words), *expected)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ["text.txt", "empty"]),
        (b"short", ["4 tokens", "block_size", "16"]),
        (b"a" * 40 + b"\xff" + b"b" * 5000, ["text.txt", "UTF-8", "40"]),
        ("grün\n".encode("latin-1") * 500, ["text.txt", "UTF-8", "2"]),
    ],
    ids=["empty", "short", "not UTF-8", "latin-1"],
)
def test_bad_text_is_one_sentence(cllm, tmp_path, content, expected):
    (tmp_path / "text.txt").write_bytes(content)
    words = ["train", *TINY, "--data.source", "text.txt", "--run.dir", "run"]
    assert_one_sentence(cllm(*words), *expected)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_block_longer_than_the_text(cllm, tmp_path, text_file):
    words = ["train", *TINY, "--data.source", text_file, "--model.block-size", "100000", "--run.dir", "run"]
    assert_one_sentence(cllm(*words), "block_size", "100000")
    assert not (tmp_path / "run").exists()


def test_bad_config_files(cllm, tmp_path):
    (tmp_path / "key.toml").write_text("[optim]\nlearning_rate = 1e-3\n")
    assert_one_sentence(cllm("train", "key.toml"), "key.toml", "optim.learning_rate")
    (tmp_path / "nan.toml").write_text("[optim]\nlr = nan\n")
    assert_one_sentence(cllm("train", "nan.toml"), "nan.toml", "optim.lr")
    (tmp_path / "syntax.toml").write_text("[optim\n")
    assert_one_sentence(cllm("train", "syntax.toml"), "syntax.toml")
    assert_one_sentence(cllm("train", tmp_path), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_directory_that_holds_a_run_is_refused(cllm, trained):
    before = contents(trained)
    assert_one_sentence(cllm("train", *TINY, "--run.dir", trained), trained, f"cllm resume {trained}")
    assert contents(trained) == before


def test_a_run_directory_that_is_a_file_or_below_one(cllm, text_file):
    before = text_file.read_bytes()
    for directory in (text_file, text_file / "run"):
        words = ["train", *TINY, "--data.source", text_file, "--run.dir", directory]
        assert_one_sentence(cllm(*words), text_file)
    assert text_file.read_bytes() == before


def test_a_prompt_outside_the_tokenizer(cllm, trained):
    assert_one_sentence(cllm("sample", trained, "--prompt", "naïve"), "U+00EF", "position 2")
    assert_one_sentence(cllm("sample", trained, "--prompt", ""), "prompt")
    assert_one_sentence(cllm("sample", trained, "--prompt", "To", "--temperature", "nan"), "temperature")
    assert_one_sentence(cllm("sample", trained, "--prompt", "To", "--temperature", "-1"), "temperature")


def test_resuming_as_another_run_is_refused(cllm, trained):
    before = contents(trained)
    assert_one_sentence(cllm("resume", trained, "--model.n-layer", "2"), "model.n_layer")
    assert_one_sentence(cllm("resume", trained, "--train.max-steps", "5"), "train.max_steps", "5", "12")
    assert contents(trained) == before


@pytest.fixture(scope="module")
def runs(trained):
    """A folder with a run, one whose checkpoints are all damaged, some text, a config, and other files."""
    folder = trained.parent
    shutil.copytree(trained, folder / "damaged")
    (folder / "damaged" / "summary.json").unlink()
    for path in (folder / "damaged" / "checkpoints").glob("*/state.json"):
        path.write_bytes(path.read_bytes()[:-2])
    (folder / "other.txt").write_text("XYZ" * 100)
    (folder / "config.toml").write_text('[data]\nsource = "plays.txt"\n')
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.png").touch()
    return folder


@pytest.mark.filterwarnings("ignore:passed over a damaged checkpoint")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("resume missing", "missing holds no run: it has no config.toml"),
        ("resume photos", "photos holds no run"),
        ("resume run --train.max-steps 24", "train.max_steps cannot become 24: with it, step 3 would"),
        ("resume run --train.max-steps 5", "train.max_steps is 5, but run has done 12 steps already"),
        ("resume run --train.max-steps two", 'train.max_steps is "two", it must be an integer'),
        ("resume run --model.n-layer 2", "model.n_layer cannot change when a run is resumed"),
        ("resume run --guard.policy ignore", 'guard.policy is "ignore", it must be "stop" or "skip"'),
        ("resume damaged", "all checkpoints of damaged are damaged; to train it again from step 0"),
        ("train --run.dir run", "run already holds a run; continue it with `cllm resume run`"),
        ("train --run.dir photos", "photos holds other files; a run needs a new or empty folder"),
        ("train --train.max-minutes -1", "train.max_minutes is -1.0, it must be 0 or more"),
        ("train --train.keep-checkpoints 0", "train.keep_checkpoints is 0, it must be at least 1"),
        ("train --train.checkpoint-interval -5", "train.checkpoint_interval is -5, it must be 0 or more"),
        ("train --train.grad-accum 0", "train.grad_accum is 0, it must be at least 1"),
        ("train --train.prefetch -1", "train.prefetch is -1, it must be 0 or more"),
        ("train --train.patience 1.5", "train.patience is 1.5, it must be an integer"),
        ("train --guard.policy ignore", 'guard.policy is "ignore"'),
        ("train --guard.spike -3", "guard.spike is -3, it must be 0 or more"),
        ("train --guard.window 1", "guard.window is 1, it must be at least 2"),
        ("train --guard.keep 0", "guard.keep is 0, it must be at least 1"),
        ("train --monitor.layers -1", "monitor.layers is -1, it must be 0 or more"),
        ("train --monitor.tensorboard=perhaps", 'monitor.tensorboard is "perhaps", it must be true or false'),
        ("train --data.packing document", 'data.packing is "document" (did you mean "documents"?)'),
        ("train --data.eos 3", 'data.eos is 3, but data.packing is "windows"'),
        ("train config.toml --data.packing padded", 'data.packing is "padded", but plays.txt is one doc'),
        ("eval missing", "missing holds no run"),
        ("eval damaged", "all checkpoints of damaged are damaged"),
        ("eval run --split vall", "split is 'vall', run has train and val"),
        ("eval run --metrics acuracy", 'metrics has "acuracy" (did you mean "accuracy"?)'),
        ("eval run --data.source other.txt", "other.txt has the character 'X' (U+0058) at position 0"),
        ("eval run --data.source other.txt --split val", "data.source is given, and split is 'val'"),
        ("eval run --checkpoint 5", "unknown checkpoint '5'; allowed: last, best"),
        ("inspect missing", "missing holds no run"),
        ("inspect run --checkpoint 7", "run has no checkpoint of step 7, it has 6, 12"),
        ("inspect run --checkpoint first", "'first' is not last, best or a step"),
        ("verify-resume", "required: CONFIG.toml"),
        ("verify-resume missing.toml", "missing.toml"),
        ("verify-resume config.toml --steps 2", "'2' is not a whole number of at least 3"),
        ("verify-resume config.toml --minutes 0", "'0' is not a number above 0"),
        ("replay missing", "missing holds no run"),
        ("replay run", "run kept no step that went wrong, so there is none to replay"),
        ("replay run --step 0", "'0' is not a whole number of at least 1"),
    ],
)
def test_bad_input_of_runs_that_are_stopped_watched_and_measured(
    cllm, runs, monkeypatch, words, expected
):
    monkeypatch.chdir(runs)
    before = contents(runs)
    assert_one_sentence(cllm(*words.split()), expected)
    assert contents(runs) == before


def test_a_missing_instruction_set_is_one_sentence():
    result = subprocess.run(
        [sys.executable, "-m", "cllm", "info"],
        env={**os.environ, "CLLM_ISA": "x86-64-v9"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert_one_sentence((result.returncode, result.stdout, result.stderr), "x86-64-v9")


def test_warnings_are_one_plain_line_each(cllm, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000012" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    status, _, err = cllm("sample", "run", "--prompt", "To", "--max-new-tokens", "3")
    assert status == 0
    assert re.fullmatch(r"cllm: note: passed over a damaged checkpoint: run/.* is damaged.*\n", err)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "file"))
    words = ["--data.source", trained.parent / "plays.txt", "--run.dir", "other"]
    status, _, err = cllm("train", *TINY, *words)
    assert status == 0
    assert re.fullmatch(r"cllm: note: the token cache cannot be written \(.*CLLM_CACHE.*\n", err)


def test_without_a_home_folder(cllm, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CLLM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    status, out, _ = cllm("info")
    assert status == 0 and "none, since there is no home folder" in out
    assert_one_sentence(cllm("train", "--data.source", "~no-such-user/text.txt"), "~no-such-user/text.txt")


# Commands ----------------------------------------------------------------------------------------------


def test_train_writes_a_run_and_sample_and_plot_read_it(cllm, trained, tmp_path):
    names = {path.relative_to(trained).as_posix() for path in contents(trained)}
    assert {"config.toml", "metrics.jsonl", "summary.json", "tokenizer.json"} <= names
    assert "checkpoints/step-00000012/model.safetensors" in names

    words = ["sample", trained, "--prompt", "To be", "--max-new-tokens", "20", "--seed", "3"]
    status, out, err = cllm(*words)
    assert (status, err) == (0, "")
    assert out.startswith("To be")
    assert len(out) == len("To be") + 20 + 1
    assert cllm(*words) == (status, out, err)  # the same seed, the same text

    status, out, _ = cllm("plot", trained, "--out", tmp_path / "figures")
    assert status == 0
    written = [Path(line) for line in out.splitlines()]
    assert {path.suffix for path in written} == {".png", ".svg"}
    assert all(path.stat().st_size > 1000 for path in written)


def test_a_finished_run_stays_as_it_is(cllm, trained):
    before = contents(trained)
    status, out, err = cllm("resume", trained)
    assert (status, err) == (0, "")
    assert "finished" in out
    assert "--train.max-steps" in out
    assert contents(trained) == before


def test_runs_without_a_directory_are_numbered_after_their_config(cllm, tmp_path, text_file):
    (tmp_path / "small.toml").write_text(f'[data]\nsource = "{text_file}"\n')
    for n in (1, 2):
        status, out, _ = cllm("train", "small.toml", *TINY)
        assert status == 0
        assert f"runs/small-{n}" in out
        assert (tmp_path / f"runs/small-{n}/summary.json").is_file()


def test_a_diverging_run_exits_with_1(cllm, text_file):
    words = ["--optim.name", "sgd", "--optim.lr", "1e30", "--optim.grad-clip", "0", "--run.dir", "run"]
    status, out, _ = cllm("train", *TINY, *words, "--data.source", text_file)
    assert status == 1
    assert "failed" in out


def test_info(cllm):
    status, out, err = cllm("info")
    assert (status, err) == (0, "")
    labels = [line[:16].strip() for line in out.splitlines()[1:]]
    assert labels == ["Python", "NumPy", "CPU", "instruction sets", "OpenMP", "threads", "cache"]
    assert "(in use)" in out
    assert os.environ["CLLM_CACHE"] in out


SWEEP = """
[sweep]
base = "base.toml"
seeds = [0, 1]
[[space]]
"optim.lr" = [1e-3, 1e-2]
"""


def test_sweep_lists_its_trials_and_runs_them(cllm, tmp_path, text_file):
    (tmp_path / "base.toml").write_text(f'[data]\nsource = "{text_file}"\n[optim]\nname = "adamw"\n')
    (tmp_path / "lr.toml").write_text(SWEEP)
    base = [word.replace("--", "--base.") if word.startswith("--") else word for word in TINY]
    before = contents(tmp_path)
    status, out, _ = cllm("sweep", "lr.toml", *base, "--dry-run")
    assert status == 0
    assert re.findall(r"s\d{3}-seed\d", out) == ["s000-seed0", "s000-seed1", "s001-seed0", "s001-seed1"]
    assert contents(tmp_path) == before

    status, out, _ = cllm("sweep", "lr.toml", *base, "--workers", "2", "--run.dir", "sweeps/lr")
    assert status == 0
    assert len((tmp_path / "sweeps/lr/results.csv").read_text().splitlines()) == 5
    status, out, _ = cllm("plot", "sweeps/lr")
    assert status == 0
    assert any("optim.lr" in line for line in out.splitlines())

    assert_one_sentence(cllm("sweep", "lr.toml", "--base.train.max-stepz", "3"), "max_stepz", "max_steps")


# Interruptions -----------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_130_and_the_resume_command(tmp_path, text_file):
    words = [*TINY, "--train.max-steps", "1000000", "--data.source", str(text_file), "--run.dir", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cllm", "train", *words],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "cllm resume run" in output
    assert "Traceback" not in output


def test_a_stream_that_cannot_write_a_character_gets_a_question_mark(tmp_path):
    (tmp_path / "text.txt").write_text("grün\n" * 400, encoding="utf-8")
    words = ["train", *TINY, "--data.source", "text.txt", "--run.dir", "grün"]
    result = subprocess.run(
        [sys.executable, "-m", "cllm", *words], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert "next: cllm sample gr?n" in result.stdout
    words = ["sample", "grün", "--max-new-tokens", "60", "--temperature", "9"]
    result = subprocess.run(
        [sys.executable, "-m", "cllm", *words], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert "?" in result.stdout


@pytest.mark.parametrize("words", [["info"], ["train", "--help"]])
def test_a_reader_that_leaves_is_no_error(words):
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "cllm", *words],
            stdout=write, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(write)
    assert result.stderr == ""
    assert result.returncode in (0, 141)  # argparse drops the error when it writes its help
