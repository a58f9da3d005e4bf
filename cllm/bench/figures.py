"""A bench's records -> matplotlib figures, in the style of `cllm.figures`.

Each function takes the rows of `records.load` and returns a `matplotlib.figure.Figure`, or None when the
rows that it draws were not measured.
"""

import functools
from pathlib import Path

from cllm import figures
from cllm.bench import records
from cllm.bench.records import OURS
from cllm.bench.steps import SIZES

__all__ = ["draw", "growth", "kernels", "products", "roofline", "steps"]

GOOD, MISSED, GOAL, CEILING = "C0", "C1", "0.25", "0.45"
GROUP_NAMES = {
    "attention": "attention, fwd + bwd",
    "gelu": "GELU",
    "ffn": "feed-forward, fwd + bwd",
    "optimizer": "optimizer update",
    "loss": "loss, fwd + bwd",
    "norm": "norm, fwd + bwd",
    "import": "start",
    "memory": "memory",
}
# What the roofline's upper half shows.
ARITHMETIC = {
    "gemm": "matrix product",
    "attention": "attention",
    "ffn": "feed-forward",
    "loss": "head + cross-entropy",
}
PASS_NAMES = {"fwd": "forward", "dX": "dX", "dW": "dW"}
AXES = {"C": "width C (channels)", "T": "context length T", "L": "depth L (layers)", "V": "vocabulary V"}


def _styled(function):
    """Run `function` under CLLM's style, whatever the caller's rcParams are."""

    @functools.wraps(function)
    def styled(*args, **kwargs):
        import matplotlib.style

        with matplotlib.style.context(["default", figures.style.STYLE]):
            return function(*args, **kwargs)

    return styled


def draw(environment, rows, out):
    """Write every figure that the rows allow as OUT/bench_NAME.png and .svg; return the paths.

    Parameters
    ----------
    environment, rows
        As `records.load` returns them.
    out : path-like
        A folder.
    """
    paths = []
    for function in (steps, products, kernels, roofline, growth):
        figure = function(rows)
        if figure is not None:
            _sign(figure, environment)
            paths += figures.save(figure, Path(out, f"bench_{function.__name__}"))
    return paths


def _sign(figure, environment):
    """Below the figure: where this was measured."""
    words = [environment["CPU"], environment["instruction set"], f"CLLM {environment['CLLM'].split(',')[0]}"]
    if "torch" in environment:
        words.append(f"torch {environment['torch']}")
    figure.supxlabel(", ".join(words), fontsize=7.5, color="0.45", x=0.99, ha="right")


def _compared(rows):
    """The rows that have a side beside CLLM."""
    return [row for row in rows if records.other(row) is not None]


def _against(rows):
    """What CLLM is compared with in these rows: "torch" or "NumPy"."""
    return " or ".join(sorted({records.other(row).partition(".")[0] for row in rows}))


def _dot(axes, place, row, side=None, across=True, **look):
    """A ratio as a dot with the range of its rounds; hollow when the machine was noisy."""
    middle, low, high = records.value(row, side)
    color = look.pop("color", MISSED if records.below_target(row, side) else GOOD)
    if records.noisy(row):
        look["markerfacecolor"] = "white"
    line, at = ([low, high], [place, place]), (middle, place)
    if not across:
        line, at = line[::-1], at[::-1]
    axes.plot(*line, color=color, linewidth=1.2, alpha=0.5, zorder=2, solid_capstyle="butt")
    axes.plot(*at, color=color, linestyle="none", zorder=3, **{"marker": "o"} | look)


def _ratio_ticks(axis, low, high):
    """A logarithmic axis of ratios with plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    marks = (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
    if high < 5 * low:
        marks = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3)
    axis.set_major_locator(FixedLocator(marks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _legend_of_marks(goals, missed, noisy):
    """Handles for what the dots and ticks mean, as far as they occur."""
    from matplotlib.lines import Line2D

    dot = {"linestyle": "none", "marker": "o"}
    handles = [Line2D([], [], color=GOOD, **dot, label="median, range of the rounds")]
    if goals:
        tick = {"linestyle": "none", "marker": "|", "markersize": 10, "markeredgewidth": 1.6}
        handles.append(Line2D([], [], color=GOAL, **tick, label="target"))
    if missed:
        handles.append(Line2D([], [], color=MISSED, **dot, label="below its target"))
    if noisy:
        handles.append(Line2D([], [], color="0.4", markerfacecolor="white", **dot, label="noisy"))
    return handles


@_styled
def steps(rows):
    """How many times faster than torch a training step is, for each size and number of threads."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in _compared(rows) if row["group"] == "step"]
    if not rows:
        return None
    sizes = [size for size in SIZES if any(row["size"] == size for row in rows)]
    threads = sorted({row["threads"] for row in rows})
    figure = Figure(figsize=(6.8, 3.8))
    axes = figure.subplots()
    for row in rows:
        index = threads.index(row["threads"])
        place = sizes.index(row["size"]) + 0.24 * (index - (len(threads) - 1) / 2)
        wanted = records.target(row)
        if wanted:
            axes.plot([place - 0.09, place + 0.09], [wanted, wanted], color=GOAL, linewidth=1.6, zorder=2.5)
        _dot(axes, place, row, across=False, color=f"C{index}", marker="osD^"[index % 4], markersize=6.5)
        middle = records.value(row)[0]
        left = index < len(threads) // 2  # not over the range of the next
        beside = {"xytext": (-7, 0), "ha": "right"} if left else {"xytext": (7, 0), "ha": "left"}
        beside |= {"textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(f"{middle:.2f}", (place, middle), **beside, color="0.3")
    axes.axhline(1, color=CEILING, linewidth=1, zorder=1)
    labels = []
    for size in sizes:
        L, H, C, T, B, V = SIZES[size]
        labels.append(f"{size}\nL{L} H{H} C{C}\nT{T} B{B} V{V}")
    axes.set_xticks(range(len(sizes)), labels, fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_xlim(-0.5, len(sizes) - 0.35)
    axes.set_ylim(bottom=min(0.9, axes.get_ylim()[0]))
    axes.set_ylabel("time of torch / time of CLLM")
    axes.set_title("A training step beside torch, float32", loc="left")
    handles = [
        Line2D([], [], color=f"C{i}", marker="osD^"[i % 4], linestyle="none", label=_threads(n))
        for i, n in enumerate(threads)
    ]
    handles.append(Line2D([], [], color=GOAL, linewidth=1.6, label="target"))
    if any(map(records.noisy, rows)):
        hollow = {"color": "0.4", "marker": "o", "linestyle": "none", "markerfacecolor": "white"}
        handles.append(Line2D([], [], **hollow, label="noisy"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    return figure


def _threads(n):
    return "1 thread" if n == 1 else f"{n} threads"


@_styled
def products(rows):
    """The matrix products of each size beside torch.mm and beside OpenBLAS."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in _compared(rows) if row["group"] == "gemm"]
    rows = [row for row in rows if row["threads"] == rows[0]["threads"]]
    if not rows:
        return None
    sides = [side for side in ("torch", "NumPy") if any(side in row["samples"] for row in rows)]
    figure = Figure(figsize=(6.8, 1.2 + 2.1 * len(sides)))
    panels = figure.subplots(len(sides), 1, sharex=True, squeeze=False)[:, 0]
    places, labels, spans = {}, [], {}
    for row in rows:
        key = row["size"], row["layer"]
        if key not in places:
            spans.setdefault(row["size"], []).append(len(places) + 1.2 * len(spans))
            places[key] = len(places) + 1.2 * (len(spans) - (row["size"] in spans))
            spans[row["size"]][-1] = places[key]
            labels.append(row["layer"])
    names = {"torch": "torch.mm / CLLM", "NumPy": "OpenBLAS / CLLM"}
    marks = dict(zip(PASS_NAMES, "osD"))
    for axes, side in zip(panels, sides):
        found = [row for row in rows if side in row["samples"]]
        for row in found:
            place = places[row["size"], row["layer"]] + 0.24 * (list(marks).index(row["pass"]) - 1)
            color, mark = f"C{list(marks).index(row['pass'])}", marks[row["pass"]]
            _dot(axes, place, row, side, across=False, color=color, marker=mark, markersize=4)
        axes.set_yscale("log")
        values = [records.value(row, side)[0] for row in found]
        axes.set_ylim(0.93 * min([*values, 1]), 1.07 * max(values))
        _ratio_ticks(axes.yaxis, *axes.get_ylim())
        axes.axhline(1, color=CEILING, linewidth=1, zorder=1)
        if wanted := records.target(found[0], side):
            axes.axhline(wanted, color=GOAL, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
        axes.set_ylabel(names[side])
        axes.grid(False, axis="x")
    panels[-1].set_xticks(list(places.values()), labels, rotation=60, fontsize=8)
    panels[-1].tick_params(axis="x", length=0, pad=1)
    for size, at in spans.items():
        across = panels[0].get_xaxis_transform()
        panels[0].text(sum(at) / len(at), 1.01, size, transform=across, ha="center", va="bottom", fontsize=9)
    handles = [
        Line2D([], [], color=f"C{i}", marker=mark, markersize=4, linestyle="none", label=PASS_NAMES[step])
        for i, (step, mark) in enumerate(marks.items())
    ]
    if records.target(rows[0], sides[0]):
        handles.append(Line2D([], [], color=GOAL, linewidth=1, linestyle=(0, (4, 2)), label="target"))
    title = f"Matrix products, float32, {_threads(rows[0]['threads'])}"
    panels[0].set_title(title, loc="left", pad=20)
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    return figure


@_styled
def kernels(rows):
    """Every kernel, import and memory beside torch (or NumPy): dots of other / CLLM, with the targets."""
    from matplotlib.figure import Figure

    rows = [row for row in _compared(rows) if row["group"] in GROUP_NAMES]
    if not rows:
        return None
    figure = Figure(figsize=(6.8, 1.2 + 0.2 * (len(rows) + 1.3 * len({row["group"] for row in rows}))))
    axes = figure.subplots()
    place, group, labels = 0.0, None, []
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            place += 0.5 if labels else 0
            text = {"fontsize": 8.5, "fontweight": "bold", "ha": "right", "va": "center"}
            axes.annotate(GROUP_NAMES[group], (0, place), xycoords=("axes fraction", "data"), xytext=(-5, 0),
                          textcoords="offset points", **text)  # fmt: skip
            place += 1
        wanted = records.target(row)
        if wanted:
            axes.plot([wanted], [place], "|", color=GOAL, markersize=9, markeredgewidth=1.6, zorder=2.5)
        _dot(axes, place, row)
        labels.append((place, row["case"] + ("" if row["threads"] == 1 else f", {_threads(row['threads'])}")))
        place += 1
    axes.set_xscale("log")
    _ratio_ticks(axes.xaxis, *axes.get_xlim())
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place - 0.3, -0.7)
    axes.axvline(1, color=CEILING, linewidth=1, zorder=1)
    against = _against(rows)
    axes.set_xlabel(f"{against} / CLLM")
    axes.set_title(f"Kernels, import and memory beside {against}", loc="left")
    seen = (any(map(test, rows)) for test in (records.target, records.below_target, records.noisy))
    figure.legend(handles=_legend_of_marks(*seen), loc="outside upper right", ncols=4)
    return figure


@_styled
def roofline(rows):
    """What kernels achieve of the machine: GFLOP/s by arithmetic intensity, and GB/s where memory limits."""
    from matplotlib.figure import Figure

    busy = [row for row in rows if row["unit"] == "s" and row["bytes"]]
    if not busy:
        return None
    threads = min(row["threads"] for row in busy)
    busy = [row for row in busy if row["threads"] == threads]
    ceilings = {
        row["case"]: records.numbers(row)[2]  # the best round: a ceiling is what the machine can do
        for row in rows
        if row["group"] == "ceilings" and row["threads"] == threads
    }
    peak = ceilings.pop("FMA in registers", None)
    memory = [speed for case, speed in ceilings.items() if case.startswith("memory")]
    figure = Figure(figsize=(6.8, 7.2))
    upper, lower = figure.subplots(2, 1, height_ratios=(1, 1))

    arithmetic = [row for row in busy if row["flops"]]
    intensity = [row["flops"] / row["bytes"] for row in arithmetic]
    span = (min([*intensity, 4]) / 1.5, max([*intensity, 400]) * 1.5)
    if peak and memory:
        best = max(memory)
        roof = [span[0], peak / best, span[1]]
        upper.plot(roof, [min(peak, best * x) for x in roof], color=CEILING, linewidth=1.2, zorder=1)
        small = {"textcoords": "offset points", "fontsize": 8, "color": "0.3"}
        words = f"vector registers {peak:.0f} GFLOP/s"  # tiles go beyond
        upper.annotate(words, (span[1], peak), xytext=(0, 3), ha="right", va="bottom", **small)
        words = f"memory {best:.0f} GB/s"
        upper.annotate(words, (roof[1], peak), xytext=(2, -6), ha="left", va="top", **small)
    for index, (group, name) in enumerate(ARITHMETIC.items()):
        points = [(row["flops"] / row["bytes"], row["flops"] / records.numbers(row)[0] / 1e9)
                  for row in arithmetic if row["group"] == group]  # fmt: skip
        if points:
            look = {"marker": "osD^"[index], "markersize": 4 if group == "gemm" else 6.5, "linestyle": "none"}
            alpha = 0.5 if group == "gemm" else 1
            upper.plot(*zip(*points), color=f"C{index}", alpha=alpha, label=name, zorder=3, **look)
    upper.set_xscale("log")
    upper.set_xlim(*span)
    top = max([row["flops"] / records.numbers(row)[0] / 1e9 for row in arithmetic] + [peak or 1])
    upper.set_ylim(0, 1.12 * top)
    upper.set_xlabel("floating-point operations a byte (each array once)")
    upper.set_ylabel("GFLOP/s")
    upper.set_title(f"Arithmetic, {_threads(threads)}", loc="left")
    if arithmetic:
        upper.legend(loc="lower right")

    moving = [row for row in busy if not row["flops"]]
    for place, row in enumerate(moving):
        for side, color, mark in ((records.other(row), "0.6", "D"), (OURS, "C0", "o")):
            if side:
                speed = row["bytes"] / records.numbers(row, side)[0] / 1e9
                hollow = {"markerfacecolor": "white"} if records.noisy(row) else {}
                lower.plot(speed, place, mark, color=color, markersize=5.5, zorder=3, **hollow)
    for index, (case, speed) in enumerate(sorted(ceilings.items(), key=lambda item: item[1])):
        look = {"color": CEILING, "linewidth": 1, "linestyle": ("-", "--", ":", "-.", (0, (8, 2)))[index % 5]}
        lower.axvline(speed, zorder=1, **look)
        lower.plot([], [], label=f"{case} {speed:.0f} GB/s", **look)
    if moving:
        lower.plot([], [], "o", color="C0", label="CLLM")
        if any(records.other(row) for row in moving):
            lower.plot([], [], "D", color="0.6", label=_against(_compared(moving)))
        if any(map(records.noisy, moving)):
            lower.plot([], [], "o", color="0.4", markerfacecolor="white", label="noisy")
        lower.legend(loc="lower right", fontsize=8)
    lower.set_yticks(range(len(moving)), [row["case"] for row in moving], fontsize=8)
    lower.tick_params(axis="y", length=0)
    lower.set_ylim(len(moving) - 0.4, -0.6)
    lower.set_xlim(0, 1.3 * lower.get_xlim()[1])
    lower.set_xlabel("GB/s (each array once; beyond memory's speed: what fits in a cache)")
    lower.set_title(f"Memory, {_threads(threads)}", loc="left")
    return figure


@_styled
def growth(rows):
    """Time a token as C, T, L and V grow, beside what the arithmetic alone takes at vector units' peak."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    found = [row for row in rows if row["group"] == "growth"]
    if not found:
        return None
    threads = found[-1]["threads"]
    found = [row for row in found if row["threads"] == threads]
    peaks = [
        records.numbers(row)[0]
        for row in rows
        if row["group"] == "ceilings" and row["threads"] == threads and row["unit"] == "GFLOP/s"
    ]
    figure = Figure(figsize=(6.8, 5))
    panels = figure.subplots(2, 2, sharey=True)
    for axes, (axis, name) in zip(panels.flat, AXES.items()):
        points = sorted((row for row in found if row["axis"] == axis), key=lambda row: row["at_value"])
        where = [row["at_value"] for row in points]
        micros = [records.numbers(row)[0] * 1e6 for row in points]
        axes.plot(where, micros, "o-", color="C0", label="CLLM")
        if peaks and points:
            least = [row["flops"] / peaks[0] / 1e3 for row in points]
            axes.plot(where, least, "--", color=CEILING, label="arithmetic at the vector units' peak")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(where))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_xlabel(name)
    for axes in panels[:, 0]:
        axes.set_ylabel("time a token (µs)")
    panels[0, 0].set_title(f"Training step, {_threads(threads)}", loc="left")
    figure.legend(handles=panels[0, 0].get_lines(), loc="outside upper right", ncols=2)
    return figure
