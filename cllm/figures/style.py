"""How all figures look, and the words on them. Colours and fonts come from `cllm.mplstyle` alone."""

import functools
import math
import textwrap
from pathlib import Path

__all__ = [
    "AXIS_NAMES", "LINESTYLES", "MARKERS", "MAX_LINES", "OTHER_LINESTYLES", "SPLIT_NAMES", "STYLE",
    "add_legend", "is_task", "log_if_wide", "loss_unit", "objective_name", "palette", "plain_log_ticks",
    "short", "styled", "text", "ticks_at", "unmarked",
]  # fmt: skip

STYLE = Path(__file__).parents[1] / "cllm.mplstyle"
MARKERS = "osD^vP<"  # one for each colour of the style, so that a print in black and white can be read
MAX_LINES = len(MARKERS)

# What an axis says for a key; any other key stands for itself.
AXIS_NAMES = {
    "model.block_size": "context length (tokens)",
    "model.dropout": "dropout probability",
    "model.n_embd": "width (channels)",
    "model.n_head": "attention heads",
    "model.n_layer": "depth (layers)",
    "optim.lr": "learning rate",
    "optim.momentum": "momentum",
    "optim.name": "optimizer",
    "optim.weight_decay": "weight decay",
    "schedule.min_lr": "final learning rate",
    "schedule.name": "schedule",
    "schedule.warmup_steps": "warm-up (steps)",
    "train.batch_size": "batch size (sequences)",
    "train.grad_accum": "accumulated micro-batches",
    "train.max_steps": "training length (steps)",
    "train.seed": "seed",
}
SPLIT_NAMES = {"train": "training", "val": "validation"}
LINESTYLES = {"train": "-", "val": "--"}
OTHER_LINESTYLES = (":", "-.", (0, (5, 1, 1, 1, 1, 1)))  # of further splits, in turn


def styled(function):
    """Run `function` under CLLM's style, whatever the caller's rcParams are."""

    @functools.wraps(function)
    def styled(*args, **kwargs):
        import matplotlib.style

        with matplotlib.style.context(["default", STYLE]):
            return function(*args, **kwargs)

    return styled


def add_legend(figure, handles, place, width):
    """A legend beside the axes, or below them in as many columns as fit `width` characters.

    Longer labels are broken: a legend takes its room from the axes, or runs out of the figure.
    """
    for handle in handles:
        handle.set_label("\n".join(textwrap.wrap(handle.get_label(), width)))
    columns = 1
    if "lower" in place:
        widest = max((len(handle.get_label()) for handle in handles), default=0)
        most = 2 if len(handles) > 3 else len(handles)
        columns = max(1, min(most, width // max(widest + 6, 1)))  # 6: the line before the words
    figure.legend(handles=handles, loc=place, ncols=columns)


def palette(index):
    """The style's colour of that number; "C0" would be that of whoever saves the figure."""
    from matplotlib.colors import to_hex

    return to_hex(f"C{index}")


def plain_log_ticks(axis):
    """Ticks such as 0.2, 0.5, 1 on a logarithmic axis, instead of powers of ten with small print."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    wide = high > 300 * low
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 3), numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def ticks_at(axes, places, labels, words=False):
    """Ticks on the x axis at these places alone, without labels where there is no room for one.

    words: that cannot be guessed from the others are turned instead.
    """
    axes.set_xticks(places, labels)
    axes.set_xticks([], minor=True)
    axes.figure.draw_without_rendering()
    right = -math.inf
    for label in sorted(axes.get_xticklabels(), key=lambda label: label.get_window_extent().x0):
        box = label.get_window_extent()
        if box.x0 <= right and words:
            for turned in axes.get_xticklabels():
                turned.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")
            return
        label.set_visible(box.x0 > right)
        right = box.x1 + 3 if box.x0 > right else right


def objective_name(y):
    """SPLIT.METRIC in words: "val.loss" is the validation loss."""
    split, _, metric = y.partition(".")
    return unmarked(f"{SPLIT_NAMES.get(split, split)} {metric}")


def log_if_wide(axes, places):
    """A logarithmic x axis where positive places span a decade or more; a 0 is set beside them."""
    above = [place for place in places if place > 0]
    if min(places) < 0 or not above or max(above) < 10 * min(above):
        return
    if min(places) > 0:
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
    else:
        axes.set_xscale("symlog", linthresh=min(above), linscale=0.5)


def loss_unit(runs, y="loss"):
    """What an axis adds to a loss; nothing for a task of the user's own, whose loss may be anything."""
    if any(map(is_task, runs)) or y.rpartition(".")[2] != "loss":
        return ""
    tokenizers = {run.config.get("data.tokenizer") for run in runs}
    units = {"char": " (nats per character)", "byte": " (nats per byte)"}
    return units.get(tokenizers.pop() if len(tokenizers) == 1 else None, " (nats per token)")


def is_task(run):
    """Whether the run is one of a task of the user's own, whose loss may be anything."""
    return not {"task.build", "task.run"}.isdisjoint(run.config)


def short(key):
    """optim.lr -> lr, but optim.name -> optim."""
    section, _, name = key.rpartition(".")
    return section if name == "name" else name


def text(value):
    """A value in a label; of a user's "file.py:Name" the name."""
    if isinstance(value, str) and ".py:" in value:
        return unmarked(value.rpartition(":")[2])
    return f"{value:g}" if isinstance(value, float) else unmarked(str(value))


def unmarked(words):
    """A user's words, in which matplotlib is to see no formula."""
    return words.replace("$", r"\$")
