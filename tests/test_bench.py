"""`cllm bench`: rows, records, table, figures and refusals. No test looks at how long anything took."""

import json
import re
import sys

import numpy as np
import pytest

from cllm import bench, cli
from cllm._kernels import ceilings as ceiling_kernels
from cllm.bench import ceilings, figures, kernels, process, records, steps, sweeps, table, timing
from cllm.errors import InputError

QUICK = timing.Effort(rounds=2, block_seconds=1e-4)
SMALL = {"tiny": (1, 2, 16, 8, 2, 11), "baby": (1, 2, 16, 8, 3, 13)}


@pytest.fixture
def small(monkeypatch):
    """Sizes, cases and machine limits that take no time."""
    monkeypatch.setattr(steps, "SIZES", SMALL)
    monkeypatch.setattr(kernels, "SIZES", SMALL)
    monkeypatch.setattr(bench, "SIZES", SMALL)
    monkeypatch.setattr(figures, "SIZES", SMALL)
    monkeypatch.setattr(steps, "GROWTH", {"C": (32, 64), "T": (8, 16), "L": (1, 2), "V": (11, 13)})
    monkeypatch.setattr(steps, "GROWTH_TOKENS", 16)
    monkeypatch.setattr(ceilings, "ELEMENTS", 1 << 16)
    monkeypatch.setattr(ceilings, "UPDATED", 1 << 16)
    monkeypatch.setattr(ceilings, "FMA_SECONDS", 1e-5)
    monkeypatch.setattr(ceilings, "_rounds", {})
    monkeypatch.setattr(bench, "Effort", lambda rounds, seconds: QUICK)
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0)


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def time_row(**more):
    fields = {"targets": {"torch": 2.0}, "flops": 2e9} | more
    samples = fields.pop("samples", {"CLLM": [1.0, 2.0, 1.0], "torch": [3.0, 3.0, 2.0]})
    return records.row("norm", "layer norm", 1, samples, **fields)


# Rows ------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_rounds():
    row = time_row()
    assert records.value(row) == (2.0, 1.5, 3.0)
    assert not records.below_target(row)
    assert records.below_target(time_row(targets={"torch": 2.01}))


def test_the_faster_of_two_others_counts():
    row = time_row(samples={"CLLM": [1.0], "torch": [3.0], "torch.compile": [2.0]})
    assert records.other(row) == "torch.compile"
    assert records.value(row)[0] == 2.0


def test_a_number_alone_has_an_upper_or_lower_limit():
    faults = records.row("memory", "x", 1, {"CLLM": [60]}, unit="faults", targets={"CLLM": 50}, most=True)
    assert records.value(faults) == (60, 60, 60)
    assert records.below_target(faults)
    assert not records.below_target(faults | {"most": False})
    alone = time_row(samples={"CLLM": [1.0]}, targets={})
    assert records.value(alone) is None
    assert not records.below_target(alone)


@pytest.mark.parametrize(
    ("samples", "noisy"), [([1.0, 1.1, 1.05, 1.0], False), ([1.0, 1.4, 1.0, 1.5], True), ([1.0, 2.0], False)]
)
def test_noise_is_a_wide_middle_half(samples, noisy):
    assert records.noisy(time_row(samples={"CLLM": samples, "torch": [1.0] * len(samples)})) is noisy


def test_measure_takes_turns_and_counts_rounds():
    calls = []
    sides = {("CLLM", 1): lambda: calls.append("a"), ("torch", 1): lambda: calls.append("b")}
    with timing.threads_of_all():
        seconds = timing.measure(sides, timing.Effort(4, 0))
    assert {side: len(times) for side, times in seconds.items()} == {("CLLM", 1): 4, ("torch", 1): 4}
    # three calls first; then a block is one that is not timed and one that is
    assert "".join(calls) == "aaabbb" + "aabb" + "bbaa" + "aabb" + "bbaa"


def test_each_side_runs_with_its_threads():
    found = {1: set(), 2: set()}
    sides = {("CLLM", n): lambda n=n: found[n].add(kernels.kernels.get_num_threads()) for n in found}
    with timing.threads_of_all():
        timing.measure(sides, timing.Effort(2, 0))
    assert found == {1: {1}, 2: {2}}


def test_share_of_the_peak_and_gain_of_threads(monkeypatch):
    flops = bench.flops_of(*steps.SIZES["tiny"])
    seconds = {("CLLM", 1): [2.0, 4.0], ("CLLM", 2): [1.0, 4.0], ("peak", 1): [0.5, 0.8], ("peak", 2): [0.5]}
    monkeypatch.setattr(timing, "measure", lambda sides, effort: seconds)
    monkeypatch.setattr(ceilings, "fma", lambda n: (None, n * flops))
    step, share, *_, gain = steps.rows("tiny", [1, 2], None, QUICK)
    assert (step["samples"], step["flops"]) == ({"CLLM": [2.0, 4.0]}, flops)
    assert share["samples"] == {"CLLM": [0.25, 0.125]}  # of 2 flops a second, the peak's best round
    assert (gain["unit"], gain["samples"]) == ("x of 1 thread", {"CLLM": [2.0, 1.0]})


def test_threads_come_back():
    before = bench.kernels.kernels.get_num_threads()
    with timing.threads_of_all():
        timing.use_threads(before + 1)
        assert bench.kernels.kernels.get_num_threads() == before + 1
    assert bench.kernels.kernels.get_num_threads() == before


def test_openblas_counts_its_threads():
    if timing.openblas() is None:
        pytest.skip("this NumPy has no OpenBLAS of its own")
    with timing.threads_of_all():
        timing.use_threads(1)
        assert timing.openblas()[1]() == 1


# The machine's limits --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [1, 2])
def test_ceiling_kernels_do_their_work(n_threads):
    n = 1 << 17
    x, y, z = np.arange(n, dtype=np.float32), np.full(n, 3, np.float32), np.empty(n, np.float32)
    assert ceiling_kernels.triad(x, y, z, n_threads) == 12 * n
    assert np.array_equal(z, x + 6)
    assert ceiling_kernels.copy(x, z, n_threads) == 8 * n
    assert np.array_equal(z, x)
    assert ceiling_kernels.read(x, n_threads) == 4 * n
    assert ceiling_kernels.update(y, z, n_threads) == 12 * n
    assert np.array_equal(z, x + 6)
    once = ceiling_kernels.fma(1, n_threads)
    assert once > 0
    assert ceiling_kernels.fma(10, n_threads) == 10 * once


# What is counted -------------------------------------------------------------------------------------


def test_flops_of_a_step_are_those_of_its_products():
    L, H, C, T, B, V = shape = (2, 2, 8, 5, 3, 7)
    layers = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * L + [(V, C)]
    linear = sum(2 * B * T * n * k for n, k in layers)
    pairs = sum(t + 1 for t in range(T))  # a query and a key that it may see
    attention = L * B * H * pairs * 2 * 2 * (C // H)  # scores and values
    assert bench.flops_of(*shape) == 3 * (linear + attention)


def test_targets_and_sizes_go_together():
    assert set(steps.TARGETS) == set(steps.SIZES) >= set(steps.LARGE)
    assert set(bench.SECONDS) == set(bench.GROUPS)
    assert set(kernels.GROUPS) < set(bench.GROUPS)
    products = list(kernels.cases("gemm"))
    assert len(products) == len({case.name for case in products}) == 5 * 5 * 3
    assert (products[0].more["shape"], products[0].flops) == ([256, 192, 64], 2 * 256 * 192 * 64)
    every = [case for group in kernels.GROUPS for case in kernels.cases(group)]
    assert all(case.n_bytes > 0 and case.target for case in every)


@pytest.mark.parametrize("group", ["norm", "ffn"])
def test_both_sides_of_a_kernel_run(group):
    case = next(iter(kernels.cases(group)))
    rng = np.random.default_rng(0)
    sides = case.make(None, lambda *shape: rng.standard_normal(shape, dtype=np.float32))
    assert set(sides) == {"CLLM", "NumPy"}
    for call in sides.values():
        call()


def test_numpy_attention_is_attention():
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((2, 2, 9, 4), dtype=np.float32) for _ in range(4))
    out, lse = kernels.kernels.attention_forward(q, k, v, True)
    wanted = kernels.kernels.attention_backward(dout, q, k, v, out, lse, True)
    found = kernels._numpy_attention(dout, q, k, v)
    for a, b in zip(found, (out, *wanted)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_case_without_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(kernels, "available_memory", lambda: 1e6)
    said = []
    rows = list(kernels.rows("optimizer", 1, None, QUICK, say=said.append))
    assert rows == []
    assert len(said) == 9
    assert "needs" in said[0]


@pytest.mark.parametrize("beside_torch", [False, True])
def test_a_sweep_beside_processes_of_torch(beside_torch, monkeypatch):
    """Made small: every row is there, its numbers are possible, and both sides learn alike."""
    torch = pytest.importorskip("torch") if beside_torch else None
    small = {"RATES": (1e-3, 2e-3), "SEEDS": (0,), "STEPS": 25, "MANY": 6, "STARTS": 1, "TEXT_BYTES": 50_000}
    for name, value in small.items():
        monkeypatch.setattr(sweeps, name, value)
    said = []
    rows = {row["case"]: row for row in sweeps.rows(torch, said.append)}
    grid, memory, busy, own = list(rows.values())[:4]
    assert set(grid["samples"]) == set(memory["samples"]) == ({"CLLM", "torch"} if torch else {"CLLM"})
    assert all(20 < mb < 3000 for (mb,) in memory["samples"].values())
    assert 0 < own["samples"]["CLLM"][0] < busy["samples"]["CLLM"][0] <= 1
    assert rows["a worker's first step"]["samples"]["CLLM"][0] > 0.01
    assert {"status of 6 trials", "report of 6 trials"} < set(rows)
    if torch:
        ours, theirs = map(float, re.search(r"CLLM (\S+), torch (\S+)$", said[0]).groups())
        assert abs(ours - theirs) < 0.2 and ours < 4.2  # it starts at log(97) = 4.57


def test_a_process_that_is_watched_and_fails_is_one_sentence():
    with pytest.raises(InputError, match="a process that is measured ended with 3: no"):
        sweeps._watched([[sys.executable, "-c", "print('no'); raise SystemExit(3)"]], 1)


# The command -----------------------------------------------------------------------------------------


def test_without_torch(small, no_torch, tmp_path, capsys):
    words = ["--against", "torch", "--only", "ceilings,step,gemm,growth", "--threads", "1"]
    assert cli.main(["bench", *words, "--out", str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^torch +not installed, so CLLM is timed beside NumPy alone", out, re.MULTILINE)
    assert re.search(r"^tiny L1 H2 C16 T8 B2 V11 +1 +\d", out, re.MULTILINE)
    assert re.search(r"^baby +qkv +24x48x16 +\d+\.\d\d", out.replace("~", " "), re.MULTILINE)
    lines = [json.loads(line) for line in (tmp_path / "b/bench.jsonl").read_text().splitlines()]
    assert lines[0]["environment"]["instruction set"] == records.environment()["instruction set"]
    assert len(lines) == 1 + 6 + 2 * 2 + 2 * 5 * 3 + 8
    stems = {path.stem for path in (tmp_path / "b").glob("*.png")}
    assert stems == {"bench_products", "bench_growth", "bench_roofline"}
    assert (tmp_path / "b/table.txt").read_text(encoding="utf-8").startswith("CPU")


def test_a_second_bench_renews_its_rows_and_keeps_the_others(small, no_torch, tmp_path, capsys):
    bench.run(["ceilings"], threads=1, out=tmp_path)
    _, before = bench.load(tmp_path)
    bench.run(["step"], ["tiny"], threads=1, out=tmp_path)
    bench.run(["ceilings"], threads=1, out=tmp_path)
    _, rows = bench.load(tmp_path)
    assert [row["case"] for row in rows][:6] == [row["case"] for row in before]
    assert len(rows) == 6 + 2
    capsys.readouterr()


def test_an_interrupted_bench_keeps_its_rows(small, no_torch, tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "growth", interrupted)
    words = ["--only", "ceilings,growth", "--threads", "1", "--out", str(tmp_path)]
    assert cli.main(["bench", *words]) == 130
    captured = capsys.readouterr()
    assert captured.err == f"cllm: interrupted; the rows measured so far are in {tmp_path}\n"
    with open(tmp_path / records.FILE, "a") as file:
        file.write('{"group": "ste')  # a line that was not finished
    _, rows = bench.load(tmp_path)
    assert len(rows) == 6


def test_a_line_cut_off_by_a_kill_costs_nothing_else(tmp_path):
    path = tmp_path / records.FILE
    path.write_text('{"group": "ste')
    records.append(path, {"environment": {"CPU": "new", "CLLM": "1"}})
    records.append(path, time_row())
    environment, rows = records.load(tmp_path)
    assert environment["CPU"] == "new"
    assert len(rows) == 1


def test_rows_of_another_machine_are_left_out(tmp_path):
    path = tmp_path / records.FILE
    records.append(path, {"environment": {"CPU": "old", "CLLM": "1"}})
    records.append(path, time_row())
    records.append(path, {"environment": {"CPU": "new", "CLLM": "1"}})
    records.append(path, records.row("norm", "b", 1, {"CLLM": [1.0]}))
    environment, rows = records.load(tmp_path)
    assert environment["CPU"] == "new"
    assert [row["case"] for row in rows] == ["b"]


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r'unknown group \'gem\' \(did you mean "gemm"\?\); groups are'):
        bench.run(["gem"], out=tmp_path)
    with pytest.raises(InputError, match=r'unknown size \'bay\' \(did you mean "baby"\?\)'):
        bench.run(sizes=["bay"], out=tmp_path)
    with pytest.raises(InputError, match="against 'jax'; allowed is torch"):
        bench.run(against="jax", out=tmp_path)
    with pytest.raises(InputError, match="threads is 0"):
        bench.run(threads=0, out=tmp_path)
    with pytest.raises(InputError, match="no size is left"):
        bench.run(sizes=["baby"], quick=True, out=tmp_path)
    with pytest.raises(InputError, match="rounds is 0"):
        bench.run(rounds=0, out=tmp_path)
    with pytest.raises(InputError, match=r"has no bench\.jsonl"):
        bench.load(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_is_one_line():
    def compiled():
        raise RuntimeError("no C++ compiler\nand pages more")

    with timing.threads_of_all():
        assert steps._compiles(compiled, [1]) == "no C++ compiler"


# Processes -------------------------------------------------------------------------------------------


def test_processes_measure_themselves(monkeypatch):
    monkeypatch.setattr(process, "HEADS", ((64, 128, 32),))
    (row,) = process.head_rows(1)
    assert (row["unit"], row["targets"]) == ("of logits", {"CLLM": 0.10})
    (row,) = process.step_rows("tiny", 1, None)
    assert row["unit"] == "faults"
    assert len(row["samples"]["CLLM"]) == process.STEPS
    (row,) = process.import_rows(None, timing.Effort(1, 0))
    assert records.numbers(row)[0] > 0


def test_what_torch_imports_late_is_no_memory_of_its_step():
    pytest.importorskip("torch")
    assert process._measured("steps", "tiny", 1, "torch")["extra"] < 50 * process.MB


def test_a_process_that_fails_says_why():
    with pytest.raises(InputError, match="status 1: KeyError: 'nothing'"):
        process._measured("nothing")


# Table and figures -----------------------------------------------------------------------------------


def every_kind():
    """Rows of each group, as a bench with torch writes them."""
    rows = [
        records.row("ceilings", case, 1, {"CLLM": [speed]}, unit=unit)
        for case, speed, unit in (("FMA in registers", 128, "GFLOP/s"), ("memory, copy", 30, "GB/s"))
    ]
    pair = {"CLLM": [1e-3, 1.1e-3, 1e-3], "torch": [2e-3, 2e-3, 2.1e-3]}
    for n in (1, 2):
        step = pair | {"torch.compile": [1.8e-3, 1.8e-3, 1.8e-3]}
        targets = {"torch": 1.9, "torch.compile": 1.9}
        rows.append(records.row("step", "tiny L2", n, step, targets=targets, flops=1e8, size="tiny"))
        share = {"unit": "of FMA peak", "targets": {"CLLM": 0.85}, "size": "tiny"}
        rows.append(records.row("step", "tiny, arithmetic", n, {"CLLM": [0.7, 0.8, 0.8]}, **share))
    for case in kernels.cases("gemm", ["tiny"]):
        samples, targets = pair | {"NumPy": [1.05e-3] * 3}, {"torch": 1.08, "NumPy": 1.08}
        more = {"targets": targets, "flops": case.flops, "n_bytes": case.n_bytes, **case.more}
        rows.append(records.row("gemm", case.name, 1, samples, **more))
    for group in kernels.GROUPS[1:]:
        for case in kernels.cases(group):
            more = {"targets": {"torch": case.target}, "flops": case.flops, "n_bytes": case.n_bytes}
            rows.append(records.row(group, case.name, 1, pair, **more))
    rows.append(records.row("memory", "baby", 1, {"CLLM": [100.0], "torch": [300.0]}, unit="MB"))
    limits = {"unit": "faults", "targets": {"CLLM": 50}, "most": True}
    rows.append(records.row("memory", "baby, page faults", 1, {"CLLM": [99, 98, 99]}, **limits))
    for axis, values in steps.GROWTH.items():
        for n in values:
            more = {"flops": 1e6 * n, "axis": axis, "at_value": n}
            rows.append(records.row("growth", f"{axis} {n}", 1, {"CLLM": [1e-6 * n]}, **more))
    return rows


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_the_terminal(width, capsys):
    shown = table.Table(width=width)
    for row in every_kind():
        shown.row(row)
    for line in (table.LEGEND, *table.summary(every_kind())):
        shown.note(line)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width, max(lines, key=len)
    assert any("GFLOP/s" in line for line in lines[20:]) == (width == 120)
    assert any(line.startswith("baby, page faults") and line.endswith("50 over") for line in lines)


def test_the_summary_names_the_row_furthest_from_its_target():
    lines = table.summary(every_kind())
    (step,) = (line for line in lines if line.startswith("step"))
    assert "0 of   4" in step
    assert "tiny, arithmetic: 0.80 of 0.85" in step or "1.80 of 1.90" in step


def test_figures_are_drawn_from_records_alone(tmp_path):
    records.append(tmp_path / records.FILE, {"environment": records.environment()})
    for row in every_kind():
        records.append(tmp_path / records.FILE, row)
    paths = figures.draw(*records.load(tmp_path), tmp_path / "figures")
    names = ("steps", "products", "kernels", "roofline", "growth")
    assert [path.name for path in paths] == [f"bench_{n}.{k}" for n in names for k in ("png", "svg")]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_a_figure_without_rows_is_none():
    for function in (figures.steps, figures.products, figures.kernels, figures.roofline, figures.growth):
        assert function([]) is None


@pytest.mark.parametrize("size", ["tiny", "baby"])
def test_beside_torch(small, size, capsys):
    torch = pytest.importorskip("torch")
    with timing.threads_of_all():
        rows = list(steps.rows(size, [1, 2], torch, QUICK, compile=False))
    assert set(rows[0]["samples"]) == {"CLLM", "torch"}
    assert [row["unit"] for row in rows] == ["s", "of FMA peak", "s", "of FMA peak", "x of 1 thread"]
