"""Faults in each operation on files: a clear error, what was there stays whole, training goes on or resumes.

`Faulty` stands in for `os` where CLLM writes, and lets one operation go wrong, or all from there on. What a
system itself does when a file may not grow is tried in a process of its own.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cllm import checkpoint, cli, data, files, guard, records
from cllm import config as configs
from cllm.data import cache
from cllm.progress import Silent
from cllm.train import Trainer, resume

ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT)
OPERATIONS = (
    "open", "write", "fsync", "close", "replace", "mkdir", "unlink", "rmdir", "scandir", "ftruncate",
    "pwrite",
)  # fmt: skip
DELETIONS = ("scandir", "unlink", "rmdir")
CHANGES = ("create", "write", "fsync", "replace", "mkdir", "ftruncate", "pwrite")
# What a system that is broken in one way refuses from then on.
LASTING = {
    "full disk": (errno.ENOSPC, ("create", "write", "fsync", "mkdir", "pwrite")),
    "no room in folders": (errno.ENOSPC, ("create", "mkdir", "replace")),
    "read-only": (errno.EROFS, (*CHANGES, "unlink", "rmdir")),
    "read-only folder": (errno.EACCES, ("create", "mkdir", "replace", "unlink", "rmdir")),
    "broken disk": (errno.EIO, (*CHANGES, "unlink", "rmdir", "scandir", "open")),
}  # fmt: skip


class Faulty:
    """`os`, in which one operation goes wrong.

    Parameters
    ----------
    at : int
        Which one, from 0; in the end `seen` has all that there were: (operation, path).
    code : int, optional
        The error; None lets it pass.
    refused : tuple of str
        What fails with the error from there on, too.
    short : bool
        Only half of the bytes are written before the error comes, or instead of it.
    """

    def __init__(self, at=-1, code=None, refused=(), short=False):
        self.at, self.code, self.refused, self.short = at, code, refused, short
        self.seen, self.paths = [], {}

    def __getattr__(self, name):
        call = getattr(os, name)
        return self._watched(name, call) if name in OPERATIONS else call

    def _watched(self, name, call):
        def operation(target, *others):
            kind = "create" if name == "open" and others[0] & os.O_CREAT else name
            by_number = isinstance(target, int)
            path = others[0] if name == "replace" else target
            path = self.paths.get(target, "metrics.jsonl") if by_number else os.fspath(path)
            here = len(self.seen) == self.at
            self.seen.append((kind, path))
            if here and self.short and name == "write" and len(others[0]) > 1:
                self.short = False
                self.at += self.code is not None  # the other half fails
                return call(target, others[0][: len(others[0]) // 2])
            if name == "close":
                call(target)  # even when it fails
                self.paths.pop(target, None)
            if self.code is not None and (here or (len(self.seen) > self.at >= 0 and kind in self.refused)):
                named = () if by_number else (os.fspath(target),)  # as the system has it
                named += (None, path) if name == "replace" else ()
                raise OSError(self.code, os.strerror(self.code), *named)
            if name in ("close", "fsync"):
                return None  # what the tests write need not outlive the machine
            found = call(target, *others)
            if name == "open":
                self.paths[found] = path
            return found

        return operation


@pytest.fixture
def faults(monkeypatch):
    """Put a Faulty in the place of `os`; None takes it away."""

    def use(faulty):
        for module in (files, records):
            monkeypatch.setattr(module, "os", faulty or os)
        return faulty

    return use


def arrays(seed):
    generator = np.random.default_rng(seed)
    return {"a": generator.normal(size=300), "b": generator.integers(9, size=(4, 5))}


def save(run_dir, step, seed):
    return checkpoint.save(run_dir, step, arrays(seed), arrays(seed + 100), {"seed": seed})


def holds(path, seed):
    """Whether a checkpoint is whole and that of `seed`."""
    model, optimizer, state = checkpoint.load(path)
    return state["seed"] == seed and all(
        found.keys() == wanted.keys() and all(found[k].tobytes() == wanted[k].tobytes() for k in wanted)
        for found, wanted in ((model, arrays(seed)), (optimizer, arrays(seed + 100)))
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# One checkpoint -------------------------------------------------------------------------------------


class Place:
    """A run's folder with a checkpoint of step 1 and perhaps one of step 2, which is then written (again)."""

    def __init__(self, root, faults, replaces):
        self.root, self.faults, self.replaces, self.n = root, faults, replaces, 0

    def write(self, faulty):
        """Save step 2 in a fresh folder; the error, or None."""
        self.n += 1
        self.run_dir = self.root / str(self.n)
        self.run_dir.mkdir()
        self.one = save(self.run_dir, 1, seed=1)
        if self.replaces:
            save(self.run_dir, 2, seed=2)
        self.two = self.one.with_name("step-00000002")
        self.faults(faulty)
        try:
            assert save(self.run_dir, 2, seed=3) == self.two
        except OSError as error:
            return error
        finally:
            self.faults(None)
        return None

    def check(self, error, written):
        """All that is there is whole, step 2 is new if it was `written`; the next one leaves nothing over."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert holds(self.one, 1)
            assert checkpoint.newest(self.run_dir) == (self.two if written or self.replaces else self.one)
        if written or self.replaces:
            assert holds(self.two, 3 if written else 2)
        assert error is not None or written
        save(self.run_dir, 2, seed=4)
        assert holds(self.one, 1) and holds(self.two, 4)
        assert names(self.one.parent) == ["step-00000001", "step-00000002"]


@pytest.fixture(params=[False, True], ids=["new", "replaces"])
def place(request, tmp_path, faults):
    return Place(tmp_path, faults, request.param)


def test_what_is_counted(place):
    """All that writing a checkpoint does, so that no operation is left out below."""
    place.write(seen := Faulty())
    kinds = [kind for kind, _ in seen.seen]
    assert kinds.count("create") == 3 and kinds.count("write") == 4 + 4 + 1
    assert kinds.count("fsync") == 6 and kinds.count("replace") == 1 + place.replaces
    assert kinds.count("close") == kinds.count("create") + kinds.count("open")
    assert ("rmdir" in kinds) == place.replaces
    assert all(place.run_dir == Path(path) or place.run_dir in Path(path).parents for _, path in seen.seen)


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_each_operation_fails_once(place, code):
    place.write(whole := Faulty())
    last = max(i for i, (kind, _) in enumerate(whole.seen) if kind == "replace")
    for at, (kind, _) in enumerate(whole.seen):
        error = place.write(faulty := Faulty(at, code))
        # Deleting what is left over can wait, and some systems let nobody open a folder.
        passes = kind in DELETIONS or (kind == "open" and code == errno.EACCES)
        assert (error is None) == passes, (at, kind)
        if error is not None:
            assert (error.errno, error.filename) == (code, faulty.seen[at][1])
            assert files.why(error) == f"{os.strerror(code)}: {error.filename}"
        place.check(error, written=at > last or passes)


@pytest.mark.parametrize("what", LASTING)
def test_from_each_operation_on_all_fail(place, what):
    code, refused = LASTING[what]
    place.write(whole := Faulty())
    last = max(i for i, (kind, _) in enumerate(whole.seen) if kind == "replace")
    for at, (kind, _) in enumerate(whole.seen):
        if kind not in refused:
            continue
        error = place.write(Faulty(at, code, refused))
        assert holds(place.one, 1)
        checkpoint.tidy(place.run_dir)  # what resuming does first, now that it can
        place.check(error, written=at > last)


def test_short_writes(place):
    place.write(whole := Faulty())
    expected = {path.name: path.read_bytes() for path in place.two.iterdir()}
    for at, (kind, _) in enumerate(whole.seen):
        if kind != "write":
            continue
        assert place.write(Faulty(at, short=True)) is None
        assert {path.name: path.read_bytes() for path in place.two.iterdir()} == expected
        place.check(None, written=True)
        error = place.write(faulty := Faulty(at, errno.ENOSPC, short=True))
        assert error.errno == errno.ENOSPC and error.filename == faulty.seen[at + 1][1]
        place.check(error, written=False)


def test_what_cannot_be_renamed_back_is_not_deleted(tmp_path, faults):
    """The old one has gone out of the way, the new one cannot come, and the old one cannot come back."""
    place = Place(tmp_path, faults, replaces=True)
    place.write(whole := Faulty())
    second = [i for i, (kind, _) in enumerate(whole.seen) if kind == "replace"][1]
    assert place.write(Faulty(second, errno.ENOSPC, ("replace",))) is not None
    assert not place.two.exists()
    checkpoint.tidy(place.run_dir)
    assert holds(place.two, 2)


def test_files_that_may_not_grow(tmp_path):
    """The system's own short writes and errors: RLIMIT_FSIZE, in a process of its own."""
    whole = save(tmp_path, 1, seed=1)
    sizes = {path.stat().st_size for path in whole.iterdir()}
    script = f"""
import resource, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_faults import save
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in range(0, {max(sizes)}, 97):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        save({str(tmp_path)!r}, 2, seed=2)
    except OSError as error:
        print(error.errno, error.filename)
resource.setrlimit(resource.RLIMIT_FSIZE, ({max(sizes)}, hard))
save({str(tmp_path)!r}, 3, seed=3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(range(0, max(sizes), 97))
    folder = tmp_path / "checkpoints" / ".step-00000002.tmp"
    assert set(lines) <= {f"{errno.EFBIG} {folder / name}" for name in os.listdir(whole)}
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000003"]
    assert holds(whole, 1) and holds(whole.with_name("step-00000003"), 3)


# A whole run ----------------------------------------------------------------------------------------

SHORT = {
    "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 8, "model.block_size": 8, "optim.lr": 0.01,
    "schedule.warmup_steps": 2, "train.batch_size": 2, "train.max_steps": 6, "train.eval_interval": 0,
    "train.checkpoint_interval": 2, "train.keep_checkpoints": 1, "train.threads": 1,
}  # fmt: skip
POLICIES = {"stop": {}, "rollback": {"guard.policy": "rollback", "guard.window": 2, "guard.spike": 1e-3}}


def fit(run_dir, text_file, policy="stop"):
    config = {**SHORT, **POLICIES[policy], "data.source": str(text_file), "run.dir": str(run_dir)}
    return Trainer(config, progress=Silent()).fit()


def go_on(run_dir):
    return resume(run_dir, progress=Silent())


def told(call):
    """What a call returns, or None, and all that it says: warnings, the summary's error, an OSError."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            summary = call()
            said = [summary["error"]] if "error" in summary else []
        except OSError as error:
            summary, said = None, [files.why(error)]
    return summary, " ".join([str(warning.message) for warning in seen] + said)


def outcome(run_dir):
    """What must not depend on faults: records without times, the last checkpoint, the other files."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not records.is_timing(k)} for line in lines]
    model, optimizer, state = checkpoint.load(checkpoint.newest(run_dir))
    found = {name: array.tobytes() for part in (model, optimizer) for name, array in part.items()}
    texts = [(run_dir / name).read_text() for name in ("tokenizer.json", "config.toml")]
    summary = records.Run(run_dir).summary
    return {
        "records": lines,
        "arrays": found,
        "state": {key: state[key] for key in ("step", "best", "position", "guard", "random")},
        "texts": [text.replace(str(run_dir), "RUN") for text in texts],
        "summary": {key: summary.get(key) for key in ("state", "step", "train_loss", "best", "error")},
        "checkpoints": [path.name for path in checkpoint.listed(run_dir)],
        "incidents": [path.name for path in guard.incidents(run_dir)],
        "hidden": [path.name for path in run_dir.rglob(".*") if path.name != files.LOCK],  # it means nothing
    }


def places(seen):
    """Each different operation: (number, kind, path). Of a file's writes, and the first checkpoints', one."""
    found = {}
    for number, (kind, path) in enumerate(seen):
        found[kind, re.sub("step-0000000[0-4]", "step-", path)] = number, kind, path
    return found.values()


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from there on"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_goes_on_or_is_resumed(tmp_path, text_file, faults, policy, lasting):
    """A fault in each operation of a run, the kinds of fault in turn; then room is made and it is resumed."""
    data.load(text_file)  # the cache has tests of its own
    faults(whole := Faulty())
    fit(tmp_path / "whole", text_file, policy)
    expected = outcome(tmp_path / "whole")
    assert expected["summary"]["state"] == "finished" and not expected["hidden"]
    ends = {}
    for n, (at, kind, path) in enumerate(places(whole.seen)):
        code, refused = list(LASTING.values())[n % len(LASTING)] if lasting else (ERRORS[n % len(ERRORS)], ())
        if lasting and kind not in refused:
            code, refused = LASTING["broken disk"]
        run_dir = tmp_path / str(n)
        faults(faulty := Faulty(at, code, refused, short=n % 2 == 0))
        summary, said = told(partial(fit, run_dir, text_file, policy))
        faults(Faulty())
        # What may pass in silence: what is left over goes later, and some systems open no folders.
        silent = kind in DELETIONS or (kind == "open" and code == errno.EACCES)
        if kind == "close" and path.endswith("/.lock"):  # the run's end, which is written
            silent = said == "" and summary["state"] == "finished"
        assert faulty.seen[at][0] == kind
        named = re.sub(r"\.[0-9a-f]{12}\.tmp$", "", Path(faulty.seen[at][1]).name.removeprefix("."))
        named = rf"{os.strerror(code)}: [^ ]*{named}(?!\.[0-9a-f]{{12}}\.tmp)"
        assert silent or re.search(named, said), (at, kind, path, said)
        ends[at] = "raised" if summary is None else summary["state"]
        if ends[at] != "finished":
            begun = (run_dir / "config.toml").exists()
            call = partial(go_on, run_dir) if begun else partial(fit, run_dir, text_file, policy)
            summary, again = told(call)
            assert (summary["state"], again) == ("finished", ""), (at, kind, path)
        found = outcome(run_dir)
        # These may differ, if that was said or is nothing that matters.
        lost = ["incidents"] if "cannot be kept for a replay" in said else []
        lost += ["hidden"] if lost or (silent and ends[at] == "finished") else []
        lost += ["checkpoints"] if "old checkpoint could not be deleted" in said else []
        for key in expected:
            assert found[key] == expected[key] or key in lost, (at, kind, path, key)
    assert lasting or {*ends.values()} == {"raised", "failed", "finished"}


def test_training_goes_on_without_a_checkpoint(tmp_path, text_file, faults):
    fit(tmp_path / "whole", text_file)
    faults(whole := Faulty())
    fit(tmp_path / "counted", text_file)
    wanted = "write", str(tmp_path / "counted/checkpoints/.step-00000004.tmp/model.safetensors")
    faults(Faulty(whole.seen.index(wanted), errno.ENOSPC))
    summary, said = told(partial(fit, tmp_path / "run", text_file))
    folder = tmp_path / "run" / "checkpoints"
    assert said == (
        f"the checkpoint of step 4 could not be written (No space left on device: "
        f"{folder}/.step-00000004.tmp/model.safetensors); the newest is {folder}/step-00000002; "
        "training goes on, and will try the next one"
    )
    assert summary["state"] == "finished" and names(folder) == ["step-00000006"]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_run_whose_last_checkpoint_cannot_be_written_has_failed(tmp_path, text_file, faults, capfd):
    fit(tmp_path / "whole", text_file)
    faults(whole := Faulty())
    fit(tmp_path / "counted", text_file)
    wanted = "fsync", str(tmp_path / "counted/checkpoints/.step-00000006.tmp/state.json")
    run_dir = tmp_path / "run"
    text = configs.to_toml(configs.to_dict(configs.load(None, SHORT | {"data.source": str(text_file)})))
    (tmp_path / "run.toml").write_text(text)
    faults(Faulty(whole.seen.index(wanted), errno.EIO))
    assert cli.main(["train", str(tmp_path / "run.toml"), "--run.dir", str(run_dir)]) == 1
    faults(Faulty())
    error = (
        f"the checkpoint of step 6 could not be written (Input/output error: "
        f"{run_dir}/checkpoints/.step-00000006.tmp/state.json); the newest is "
        f"{run_dir}/checkpoints/step-00000004; when it can be: cllm resume {run_dir}"
    )
    assert error in " ".join(capfd.readouterr().out.split())
    assert records.Run(run_dir).summary["error"] == error
    assert cli.main(["resume", str(run_dir)]) == 0
    assert outcome(run_dir) == outcome(tmp_path / "whole")


def test_a_loop_of_ones_own_that_cannot_save_has_failed(tmp_path, faults):
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def train(config, run):\n"
        "    step, arrays, _ = run.restore() or (0, {'a': np.zeros(3)}, None)\n"
        "    for step in range(step + 1, 4):\n"
        "        arrays = {'a': arrays['a'] + step}\n"
        "        run.log(step, 'train', loss=1.0 / step)\n"
        "        run.save(step, arrays)\n"
    )

    def train(name):
        overrides = {"task.run": f"{tmp_path / 'own.py'}:train", "train.max_steps": 3}
        return Trainer({**overrides, "run.dir": str(tmp_path / name)}, progress=Silent()).fit()

    faults(whole := Faulty())
    train("whole")
    for step, state in ((2, "finished"), (3, "failed")):
        place = str(tmp_path / f"whole/checkpoints/.step-0000000{step}.tmp/model.safetensors")
        faults(Faulty(whole.seen.index(("create", place)), errno.ENOSPC))
        summary, said = told(partial(train, f"run-{step}"))
        faults(Faulty())
        assert summary["state"] == state and f"step {step} could not be written (No space left" in said
        go_on(tmp_path / f"run-{step}")
        found, _, last = checkpoint.load(checkpoint.newest(tmp_path / f"run-{step}"))
        assert last["step"] == 3 and found["a"].tolist() == [6.0] * 3


def test_resuming_is_tried_again(tmp_path, text_file, faults):
    """Each operation of a resumed run goes wrong, once or from there on; the next time it ends well."""
    run_dir, failed = tmp_path / "run", tmp_path / "failed"
    faults(whole := Faulty())
    fit(run_dir, text_file)
    expected = outcome(run_dir)
    shutil.rmtree(run_dir)
    place = "create", str(run_dir / "checkpoints/.step-00000004.tmp/model.safetensors")
    faults(Faulty(whole.seen.index(place), errno.EIO, CHANGES))
    assert told(partial(fit, run_dir, text_file))[0]["state"] == "failed"
    faults(whole := Faulty())
    shutil.copytree(run_dir, failed)
    go_on(run_dir)
    assert outcome(run_dir) == expected
    for n, (at, kind, path) in enumerate(places(whole.seen)):
        shutil.rmtree(run_dir)
        shutil.copytree(failed, run_dir)
        faults(Faulty(at, errno.ENOSPC, LASTING["full disk"][1] if n % 2 else ()))
        _, said = told(partial(go_on, run_dir))
        silent = kind in DELETIONS or (kind == "close" and path.endswith("/.lock"))
        assert silent or "No space left on device: " in said, (at, kind, path)
        faults(Faulty())
        told(partial(go_on, run_dir))
        found = outcome(run_dir)
        for key in expected:
            lost = key in ("hidden", "checkpoints") and (silent or "could not be deleted" in said)
            assert found[key] == expected[key] or lost, (at, kind, path, key)


# Records and the token cache ------------------------------------------------------------------------


def test_records_wait_for_room(tmp_path, faults):
    lines = [{"step": step, "split": "train", "loss": 1.0 / step} for step in range(1, 6)]
    recorder = records.Recorder(tmp_path)
    recorder.write(lines[0])
    faults(Faulty(0, errno.ENOSPC, ("write",), short=True))
    with pytest.warns(UserWarning, match=r"records cannot be written \(No space left on device: .*jsonl\)"):
        recorder.write(lines[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        recorder.write(lines[2])
    assert records.Run(tmp_path).records == lines[:1]  # of the second, half a line is there
    for call in (recorder.sync, partial(recorder.truncate, 2)):
        with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
            call()
    faults(None)
    recorder.write(lines[3])
    assert records.Run(tmp_path).records == lines[:4]
    recorder.truncate(2)
    recorder.write(lines[4])
    recorder.close()
    assert records.Run(tmp_path).records == [*lines[:2], lines[4]]


@pytest.mark.parametrize("short", [False, True])
def test_the_token_cache_is_only_a_cache(text_file, tmp_path, faults, monkeypatch, short):
    """Whatever goes wrong in it, the tokens are right, and the next time all is well."""
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "whole"))
    faults(whole := Faulty())
    expected = data.load(text_file).train.array.tobytes()
    for n, (at, kind, path) in enumerate(places(whole.seen)):
        monkeypatch.setenv("CLLM_CACHE", str(tmp_path / str(n)))
        code = ERRORS[n % len(ERRORS)]
        faults(Faulty(at, code, CHANGES if n % 2 else (), short))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert data.load(text_file).train.array.tobytes() == expected
        said = " ".join(str(warning.message) for warning in seen)
        passes = kind == "open" and code == errno.EACCES
        assert passes or re.search(f"token cache cannot be written .*{os.strerror(code)}", said), (kind, path)
        faults(None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                found = data.load(text_file)
                assert found.train.array.tobytes() == expected
        assert cache.read(found.hash) is not None
        assert names(tmp_path / str(n) / "tokens") == [f"{found.hash}.bin", f"{found.hash}.json"] or n % 2
