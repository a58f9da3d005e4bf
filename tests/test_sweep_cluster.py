"""A sweep on a Dask cluster: a scheduler and three workers on this machine, some of them killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cllm import kernels, sweep
from cllm.errors import InputError
from cllm.files import LOCK, Lock
from cllm.sweep import cluster as clusters

SWEEP = """
[sweep]
seeds = [0, 1]
[base.data]
source = "{source}"
[base.model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
[base.schedule]
warmup_steps = 2
min_lr = 0.0
[base.train]
batch_size = 4
max_steps = {steps}
eval_interval = 100
checkpoint_interval = 50
[[space]]
"optim.lr" = [1e-3, 1e-2]
"""
SECONDS = 120.0  # what anything may take on a busy machine


class Cluster:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, folder):
        self.folder, self.file, self.workers = folder, folder / "scheduler.json", []
        self.env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.scheduler = self.start("scheduler", "--port", "0")
        wait_for(self.file.is_file)
        self.address = json.loads(self.file.read_text())["address"]

    def start(self, kind, *options, **env):
        command = [sys.executable, "-m", "dask", kind, "--no-dashboard", "--scheduler-file", self.file]
        with open(self.folder / "log.txt", "a") as log:
            return subprocess.Popen(
                [*command, *options], stdout=log, stderr=log, cwd=self.folder, env={**self.env, **env}
            )

    def add_worker(self, **env):
        local = self.folder / f"worker-{len(self.workers)}"
        options = ("--no-nanny", "--nthreads", "1", "--local-directory", local)
        self.workers.append(self.start("worker", *options, **env))

    def wait_for_workers(self, n):
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(n, timeout=SECONDS)

    def stop(self):
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def plan(tmp_path, text_file):
    """A sweep of so many steps."""

    def plan(steps=500):
        path = tmp_path / "sweep.toml"
        path.write_text(SWEEP.format(source=text_file, steps=steps), encoding="utf-8")
        return sweep.Sweep.load(path)

    return plan


class Quiet:
    def start(self, sweep, directory, results, n_workers):
        self.notes, self.ends = [], []

    def stage(self, orders, left):
        pass

    def step(self, trial, step, loss):
        pass

    def ended(self, result):
        self.ends.append(result)

    def note(self, text):
        self.notes.append(text)

    def end(self, text):
        pass


def wait_for(found):
    deadline = time.monotonic() + SECONDS
    while not (what := found()):
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)
    return what


def table(directory):
    with open(directory / "results.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def children(pid):
    with suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def command(directory, cluster):
    words = [sys.executable, "-m", "cllm", "sweep", "sweep.toml", "--run.dir", str(directory)]
    return [*words, "--scheduler", cluster.address]


# ------------------------------------------------------------------------------------------------------


class Killer(Quiet):
    """Kills a worker in the midst of a trial, twice, and starts another one after the second."""

    def __init__(self, cluster):
        self.cluster, self.killed, self.orphans = cluster, [], []

    def step(self, trial, step, loss):
        if step > 60 and len(self.killed) < 2 and trial.name not in self.killed:
            self.killed.append(trial.name)
            worker = next(w for w in self.cluster.workers if w.poll() is None and children(w.pid))
            self.orphans += children(worker.pid)
            worker.kill()
            worker.wait()
            if len(self.killed) == 2:
                self.cluster.add_worker()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the trials' processes through /proc")
def test_killed_workers_change_nothing(cluster, plan, tmp_path):
    plan = plan()
    sweep.run(plan, tmp_path / "local", workers=2, progress=Quiet())
    for _ in range(3):
        cluster.add_worker()
    cluster.wait_for_workers(3)
    shown = Killer(cluster)
    summary = sweep.run(plan, tmp_path / "out", progress=shown, scheduler=cluster.address)
    assert len(shown.killed) == 2 and len(shown.orphans) == 2
    assert len(shown.ends) == 4 and summary["trials"] == {"finished": 4, "failed": 0}
    assert table(tmp_path / "out") == table(tmp_path / "local")
    assert not list((tmp_path / "out").rglob("error.txt"))
    for pid in shown.orphans:
        wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    sweep.run(plan, tmp_path / "out", progress=shown, scheduler="tcp://nobody:1")  # nothing is left to train
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_stopped_sweep_goes_on(cluster, plan, tmp_path, name):
    plan = plan(2000)
    directory = tmp_path / "out"
    cluster.add_worker()
    cluster.add_worker()
    process = subprocess.Popen(
        command(directory, cluster), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=cluster.env,
    )  # fmt: skip
    try:
        wait_for(lambda: list(directory.glob("trials/*/checkpoints/step-*")) or process.poll() is not None)
        process.send_signal(getattr(signal, name))
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    if name == "SIGINT":
        assert process.returncode == 130, errors
        assert "Traceback" not in errors and "stopped with " in output
        assert "paused" in {row["state"] for row in table(directory)}
        assert [children(worker.pid) for worker in cluster.workers] == [[], []]
        steps = [checkpoint_steps(path) for path in directory.glob("trials/*")]
        assert any(step % 50 for found in steps for step in found)  # written because of Ctrl-C
    else:
        assert any(children(worker.pid) for worker in cluster.workers)
    sweep.run(plan, directory, progress=Quiet(), scheduler=cluster.address)
    sweep.run(plan, tmp_path / "local", workers=2, progress=Quiet())
    assert table(directory) == table(tmp_path / "local")
    assert not list(directory.rglob("error.txt"))


def test_without_its_scheduler_a_sweep_ends_with_one_sentence_and_goes_on_here(cluster, plan, tmp_path):
    plan = plan(2000)
    cluster.add_worker()

    class Ending(Quiet):
        def step(self, trial, step, loss):
            if step > 0:
                cluster.scheduler.kill()

    with pytest.raises(InputError, match=f"the scheduler {cluster.address} has gone; the same command"):
        sweep.run(plan, tmp_path / "out", progress=Ending(), scheduler=cluster.address)
    assert "pending" in {row["state"] for row in table(tmp_path / "out")}
    sweep.run(plan, tmp_path / "out", workers=2, progress=Quiet())
    sweep.run(plan, tmp_path / "local", workers=2, progress=Quiet())
    assert table(tmp_path / "out") == table(tmp_path / "local")


def checkpoint_steps(run_dir):
    return [int(path.name.removeprefix("step-")) for path in run_dir.glob("checkpoints/step-*")]


OTHERS = [isa for isa in kernels.available_isas if isa != kernels.isa]


@pytest.mark.skipif(not OTHERS, reason="this machine has one instruction set only")
def test_workers_of_another_instruction_set_are_marked_or_left_idle(cluster, plan, tmp_path):
    plan = plan(40)
    cluster.add_worker()
    cluster.add_worker(CLLM_ISA=OTHERS[0])
    cluster.wait_for_workers(2)
    shown = Quiet()
    summary = sweep.run(plan, tmp_path / "any", progress=shown, scheduler=cluster.address)
    assert summary["instruction_sets"].keys() == {kernels.isa, OTHERS[0]}
    assert {result.isa for result in shown.ends} == {kernels.isa, OTHERS[0]}
    (note,) = shown.notes
    assert "was computed with" in note and "differ in their last digits" in note
    cluster.add_worker()
    cluster.wait_for_workers(3)
    summary = sweep.run(plan, tmp_path / "same", progress=shown, scheduler=cluster.address, same_isa=True)
    assert summary["instruction_sets"] == {kernels.isa: 4} and shown.notes == []
    sweep.run(plan, tmp_path / "local", workers=1, progress=Quiet())
    assert table(tmp_path / "same") == table(tmp_path / "local")


def test_what_is_no_scheduler_is_said_in_one_sentence(cluster, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "CONNECT_SECONDS", 1.0)
    cluster.add_worker()
    cluster.wait_for_workers(1)
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        (worker,) = client.scheduler_info()["workers"]
    for address, words in (
        ("tcp://127.0.0.1:9", r"no scheduler answers at tcp://127\.0\.0\.1:9 within 1 s; it must be tcp://HOST:PORT"),
        ("nonsense", r"no scheduler answers at nonsense \(.*\); it must be tcp://HOST:PORT"),
        (worker, "is a worker, it must be the scheduler"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words) as caught:
            sweep.run(plan(), tmp_path / "out", progress=Quiet(), scheduler=address)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_worker_without_the_directory_is_named(tmp_path):
    with Lock(tmp_path, "sweep"):
        held = (tmp_path / LOCK).read_text()
        place = clusters._Place("topic", os.getcwd(), str(tmp_path), held, None, 1)
        clusters._check_shared("tcp://w:1", place)
        no = str(tmp_path / "no")
        for change, words in (
            ({"held": "another"}, f"worker tcp://w:1 does not have the sweep's directory, {tmp_path}: it"),
            ({"directory": no}, f"does not have the sweep's directory, {no}: it must be shared"),
            ({"cwd": no}, f"does not have this working directory, {no}: it must be shared"),
        ):
            with pytest.raises(InputError, match=words):
                clusters._check_shared("tcp://w:1", clusters._Place(**(vars(place) | change)))


def test_a_cluster_needs_dask_and_its_own_workers(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r'needs dask\.distributed: pip install "cllm\[cluster\]"'):
        sweep.run(plan(), tmp_path / "out", progress=Quiet(), scheduler="tcp://127.0.0.1:9")
    with pytest.raises(InputError, match="workers is 2, but with a scheduler its own workers count"):
        sweep.run(plan(), tmp_path / "out", workers=2, progress=Quiet(), scheduler="tcp://127.0.0.1:9")
    with pytest.raises(InputError, match="same_isa is about a scheduler's workers"):
        sweep.run(plan(), tmp_path / "out", progress=Quiet(), same_isa=True)
    assert not (tmp_path / "out").exists()
