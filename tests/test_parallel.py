"""The tree of gradients, and processing units: the same bits however many share the work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kills
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cllm
from cllm import checkpoint, guard, nn, optim, parallel, records
from cllm.errors import InputError
from cllm.files import Lock
from cllm.tensor import Parameter

BESIDE = Path(sys.executable).parent / "mpirun"
MPIRUN = str(BESIDE) if BESIDE.exists() else shutil.which("mpirun")


# The tree -------------------------------------------------------------------------------------------


def expression(names):
    """How a TreeSum adds these leaves, in brackets."""
    tree = parallel.TreeSum(lambda a, b: f"({a}+{b})")
    for name in names:
        tree.push(name)
    assert len(tree) == len(names)
    return tree.total()


def test_leaves_are_summed_pairwise_by_index():
    assert expression("a") == "a"
    assert expression("abc") == "((a+b)+c)"
    assert expression("abcdef") == "(((a+b)+(c+d))+(e+f))"
    assert expression("abcdefg") == "(((a+b)+(c+d))+((e+f)+g))"


@given(st.integers(1, 200))
def test_at_most_log2_n_sums_are_held(n):
    tree = parallel.TreeSum(lambda a, b: a + b)
    for i in range(n):
        tree.push(1)
        assert len(tree._sums) <= (i + 1).bit_length()
    assert tree.total() == n and len(tree) == 0


@given(st.integers(1, 64), st.data())
def test_units_add_as_one_would(n, data):
    size = data.draw(st.sampled_from(parallel.fitting(n)))
    names = [str(i) for i in range(n)]
    share = n // size
    sums = [expression(names[rank * share : (rank + 1) * share]) for rank in range(size)]
    for into, later in parallel._merges(size):
        sums[into] = f"({sums[into]}+{sums[later]})"
    assert sums[0] == expression(names)


def test_units_that_fit():
    assert parallel.fitting(1) == [1]
    assert parallel.fitting(8) == [1, 2, 4, 8]
    assert parallel.fitting(6) == [1, 3, 6]
    assert parallel.fitting(7) == [1, 7]


def test_units_that_do_not_fit_are_refused():
    units = parallel.Units()
    units.size = 4
    with pytest.raises(InputError, match=r"4 processing units do not fit .*grad_accum = 6: start 1, 3 or 6"):
        units.leaves(6)
    units.rank = 2
    assert units.leaves(8) == range(4, 6)


# Gradients ------------------------------------------------------------------------------------------


def flat_model():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model.flatten()
    return model


@pytest.mark.parametrize("flat", [True, False])
@given(n=st.integers(1, 9))
def test_a_gradient_buffer_sums_as_the_tree_says(flat, n):
    model = flat_model() if flat else nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    buffer = optim.GradientBuffer(model.named_parameters())
    generator = np.random.default_rng(n)
    for _ in range(2):  # the second time in the blocks of the first
        leaves = []
        for _ in range(n):
            for p in model.parameters():
                p.grad = generator.standard_normal(p.shape).astype(np.float32)
            leaves.append({name: p.grad.copy() for name, p in model.named_parameters()})
            buffer.accumulate()
            assert all(grad is None for grad in buffer.views.values())
        buffer.sum()
        for name, grad in buffer.views.items():
            tree = parallel.TreeSum(np.add)
            for leaf in leaves:
                tree.push(leaf[name])
            assert grad.tobytes() == tree.total().tobytes()
        buffer.zero()


def test_a_parameter_without_a_gradient_counts_as_zeros():
    a, b, c = (Parameter(np.zeros(3, np.float32)) for _ in range(3))
    buffer = optim.GradientBuffer({"a": a, "b": b, "c": c})
    for with_b in (True, False, True):
        a.grad = np.ones(3, np.float32)
        if with_b:
            b.grad = np.full(3, 2, np.float32)
        buffer.accumulate()
    buffer.sum()
    assert a.grad.tolist() == [3, 3, 3] and b.grad.tolist() == [4, 4, 4] and c.grad is None


def test_a_gradient_buffer_is_the_models_block():
    model = flat_model()
    buffer = optim.GradientBuffer(model.named_parameters())
    assert buffer.arrays == []
    model(cllm.Tensor(np.ones((2, 5), np.float32))).sum().backward()
    (block,) = buffer.arrays
    assert np.shares_memory(block, model.flat_grad)
    assert all(np.shares_memory(view, block) for view in buffer.views.values())
    before = {name: grad.copy() for name, grad in buffer.views.items()}
    assert buffer.statistics()["overall"]["norm"] == pytest.approx(np.linalg.norm(block))
    buffer.average(4)
    for name, grad in buffer.views.items():
        np.testing.assert_array_equal(grad, before[name] / 4)
    norm = buffer.clip_norm(0.5)
    assert norm == pytest.approx(np.sqrt(sum(np.sum((x / 4) ** 2) for x in before.values())), rel=1e-6)
    assert np.linalg.norm(block) == pytest.approx(0.5, rel=1e-4)
    buffer.clip_value(1e-3)
    assert np.abs(block).max() == np.float32(1e-3)


# Processes ------------------------------------------------------------------------------------------

needs_mpi = pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun")
BASE = {
    "data.source": "words.txt", "data.val_fraction": 0.2, "model.n_layer": 2, "model.n_head": 2,
    "model.n_embd": 16, "model.block_size": 16, "model.dropout": 0.1, "train.batch_size": 2,
    "train.grad_accum": 4, "train.max_steps": 12, "train.eval_interval": 5, "train.checkpoint_interval": 5,
    "schedule.warmup_steps": 3, "train.threads": 1,
}  # fmt: skip


def start(folder, n, *words, program=("-m", "cllm")):
    """Begin `cllm ...` on n units; 0 is without mpirun."""
    launch = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", str(n)] if n else []
    environment = {**os.environ, "CLLM_CACHE": str(folder / "cache"), "OMPI_MCA_btl": "self,sm"}
    return subprocess.Popen(
        [*launch, sys.executable, *program, *words], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def flags(run_dir, **changes):
    values = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    return ["train", *flags, f"--run.dir={run_dir}"]


def start_training(folder, n, run_dir, **changes):
    return start(folder, n, *flags(run_dir, **changes))


def finish(process, timeout=120):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()  # where it hangs
    return process.returncode, out, err


@pytest.fixture
def folder(tmp_path):
    words = np.random.default_rng(0).choice(["tree", "leaf", "root", "sum", "unit"], 2000)
    (tmp_path / "words.txt").write_text(" ".join(words))
    return tmp_path


def untimed(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not records.is_timing(k)} for line in lines]


@needs_mpi
def test_any_number_of_units_gives_the_same_bits(folder):
    for n in (0, 1, 2, 4):
        code, out, err = finish(start_training(folder, n, f"units-{n}"))
        assert code == 0, err
        assert out.count("finished 12 steps") == 1
        assert json.loads((folder / f"units-{n}" / "summary.json").read_text())["units"] == max(n, 1)
    whole = checkpoint.newest(folder / "units-0")
    for n in (1, 2, 4):
        for name in ("model.safetensors", "optimizer.safetensors"):
            part = folder / f"units-{n}" / "checkpoints" / whole.name / name
            assert part.read_bytes() == (whole / name).read_bytes(), (n, name)
        assert untimed(folder / f"units-{n}") == untimed(folder / "units-0")


@needs_mpi
def test_units_prefetch_and_measure_the_same(folder):
    """Batches made ahead, of each unit's own leaves; what modules give, over the leaves of all units."""
    changes = {"monitor__activations": 4, "train__prefetch": 2, "train__grad_accum": 8}
    for n in (0, 2, 4):
        code, _, err = finish(start_training(folder, n, f"units-{n}", **changes))
        assert code == 0, err
    code, _, err = finish(start_training(folder, 0, "plain", **{**changes, "train__prefetch": 0}))
    assert code == 0, err
    whole = checkpoint.newest(folder / "plain")
    for n in (0, 2, 4):
        part = folder / f"units-{n}" / "checkpoints" / whole.name / "model.safetensors"
        assert part.read_bytes() == (whole / "model.safetensors").read_bytes()
        assert untimed(folder / f"units-{n}") == untimed(folder / "plain")
    assert any("activation_rms.h.0.mlp" in record for record in untimed(folder / "plain"))


TASK = """
import numpy as np
import cllm
from cllm import rng
from cllm.data import Batch


class Poisoned:
    def __len__(self):
        return 200

    def __getitem__(self, indices):
        inputs = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)[indices]
        inputs[indices == 7] = np.inf
        return Batch(inputs, indices % 2)


def build(config):
    rng.manual_seed(0)
    return cllm.Task(cllm.nn.Sequential(cllm.nn.Linear(3, 4), cllm.nn.Linear(4, 2)), Poisoned())
"""


@needs_mpi
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_units_decide_alike_about_a_bad_step(folder, policy):
    (folder / "my.py").write_text(TASK)
    words = [
        "train", "--task.build=my.py:build", f"--guard.policy={policy}", "--train.batch-size=2",
        "--train.grad-accum=4", "--train.max-steps=60", "--train.checkpoint-interval=5", "--train.threads=1",
        "--train.eval-interval=0", "--schedule.warmup-steps=2", "--guard.limit=100",
    ]  # fmt: skip
    for n in (0, 2, 4):
        code, out, err = finish(start(folder, n, *words, f"--run.dir=units-{n}"))
        assert code == (1 if policy == "stop" else 0), (out, err)
        assert out.count("cllm replay") == err.count("cllm replay") + out.count("cllm replay") > 0
    ours = [records.Run(folder / f"units-{n}") for n in (0, 2, 4)]
    assert len({run.summary.get("incidents") for run in ours}) == 1
    assert untimed(ours[0].path) == untimed(ours[1].path) == untimed(ours[2].path)
    bad = [sorted(path.name for path in guard.incidents(run.path)) for run in ours]
    assert bad[0] == bad[1] == bad[2] != []
    for name in bad[0]:  # also the micro-batches of other units
        kept = [run.path / "incidents" / name / "batch.safetensors" for run in ours]
        assert kept[0].read_bytes() == kept[1].read_bytes() == kept[2].read_bytes()
    code, out, err = finish(start(folder, 0, "replay", "units-4"))
    first = "first wrong in the forward pass: the input of 0 is infinite or NaN in"
    assert code == 0 and first in out, (out, err)


@needs_mpi
def test_units_resume(folder):
    constant = {"schedule__name": "constant"}
    code, _, err = finish(start_training(folder, 2, "run", train__max_steps=7, **constant))
    assert code == 0, err
    code, _, err = finish(start(folder, 4, "resume", "run", "--train.max-steps", "12"))
    assert code == 0, err
    assert finish(start_training(folder, 0, "all", **constant))[0] == 0
    a, b = (checkpoint.newest(folder / name) / "model.safetensors" for name in ("run", "all"))
    assert a.parent.name == "step-00000012" and a.read_bytes() == b.read_bytes()


def strike(folder, n, name, rank, step, place, *words):
    """What `finish` gives of n units of which one is struck by a signal."""
    program = str(Path(__file__).with_name("struck.py"))
    return finish(start(folder, n, name, str(rank), str(step), place, *words, program=(program,)), 60)


def assert_same_end(folder, name):
    """As if it had been one unit that was never stopped; outside of steps each draws its own numbers."""
    code, _, err = finish(start_training(folder, 0, "alone"))
    assert code == 0, err
    assert kills.differences(folder / "alone", folder / name, but=("units", "random")) == []


@needs_mpi
@pytest.mark.parametrize(
    ("rank", "step", "place"),
    [(0, 8, "step"), (1, 8, "step"), (0, 10, "optimizer.safetensors")],
)
def test_a_unit_that_dies_ends_the_run_which_any_number_goes_on_with(folder, rank, step, place):
    for n, command in ((2, flags("run")), (4, ["resume", "run"])):
        code, _, err = strike(folder, n, "SIGKILL", rank, step, place, *command)
        assert code not in (0, 2) and re.search(r"signal 9|Killed", err), (code, err)
        assert checkpoint.newest(folder / "run").name == "step-00000005"
        assert not records.Run(folder / "run").summary
    code, _, err = finish(start(folder, 0, "resume", "run"))
    assert code == 0, err
    assert_same_end(folder, "run")


@needs_mpi
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_one_unit_stops_all_and_any_number_goes_on(folder, name, status):
    code, out, err = strike(folder, 2, name, 1, 2, "step", *flags("run"))
    assert code == status and "Traceback" not in err, (code, err)
    assert out.count("at step 3; continue with: cllm resume run") == 1
    assert checkpoint.newest(folder / "run").name == "step-00000003"
    code, out, err = strike(folder, 4, name, 3, 7, "step", "resume", "run")
    assert code == status, err
    code, _, err = finish(start(folder, 2, "resume", "run"))
    assert code == 0, err
    assert_same_end(folder, "run")


@needs_mpi
def test_a_second_signal_to_one_unit_does_not_leave_the_others_waiting(folder):
    code, _, err = strike(folder, 2, "SIGTERM,SIGTERM", 1, 7, "step", *flags("run"))
    assert code not in (0, 2) and "processing unit 1 of 2 failed: the run ends" in err, (code, err)
    assert checkpoint.newest(folder / "run").name == "step-00000005"


@needs_mpi
def test_the_first_units_own_error_before_the_loop_ends_all(folder):
    assert strike(folder, 2, "SIGTERM", 0, 7, "step", *flags("run"))[0] == 143
    with Lock(folder / "run"):
        code, _, err = finish(start(folder, 2, "resume", "run"), 60)
    said = [line for line in err.splitlines() if line.startswith("cllm")]
    assert code == 2 and len(said) == 1 and f"in use by process {os.getpid()}" in said[0], err
    metrics = folder / "run" / "metrics.jsonl"
    metrics.write_text("no record\n" + metrics.read_text())
    code, _, err = finish(start(folder, 2, "resume", "run"), 60)
    said = [line for line in err.splitlines() if line.startswith("cllm")]
    assert code == 2 and len(said) == 1 and "metrics.jsonl, line 1, is not a record" in said[0], err


@needs_mpi
@pytest.mark.parametrize(
    ("n", "changes", "message"),
    [
        (3, {}, "3 processing units do not fit train.grad_accum = 4: start 1, 2 or 4 "),
        (2, {"data__source": "missing.txt"}, "missing.txt"),
        (2, {"train__batch_sizes": 3}, "unknown key train.batch_sizes"),
    ],
)
def test_what_cannot_be_is_said_once(folder, n, changes, message):
    code, out, err = finish(start_training(folder, n, "run", **changes))
    own = [line for line in err.splitlines() if line.startswith("cllm")]
    assert code == 2 and len(own) == 1 and message in own[0], (code, out, err)
    assert "Traceback" not in err and not (folder / "run").exists()


def test_mpirun_without_mpi4py_is_told(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    parallel.here.cache_clear()
    try:
        with pytest.raises(InputError, match="started 4 processes, which need mpi4py"):
            parallel.here()
    finally:
        parallel.here.cache_clear()
