"""Rows as lines of text."""

import shutil
import sys
import textwrap

from cllm.bench import records
from cllm.bench.records import OURS

__all__ = ["GROUPS", "Table", "summary"]

#: Group -> what stands above its rows.
GROUPS = {
    "ceilings": "what this machine can do: multiply-adds in registers, memory traffic as STREAM counts it",
    "step": "training step: forward, backward, clipping, AdamW; float32",
    "gemm": "matrix products M x N x K: torch.mm / CLLM, OpenBLAS (NumPy) / CLLM; goal 1.08",
    "attention": "causal attention (B,H,T,D), forward + backward",
    "gelu": "GELU",
    "ffn": "feed-forward block C -> 4C -> C, forward + backward",
    "optimizer": "optimizer update, by parameters; Adam and AdamW against torch's fused",
    "loss": "softmax cross-entropy and head with cross-entropy (M,V,C), forward + backward",
    "norm": "norms, rows x C, forward + backward",
    "import": "the first import in a process: CLLM with its GPT, and torch",
    "memory": "memory beyond the import and 16 bytes a parameter; faults of a step after warm-up",
    "sweep": "sweeps, start-up included: beside processes of torch, one a trial, as many at once",
    "growth": "time a token of a GPT of L2 C128 T64 V256 as one of them grows",
}
WIDE = 112  # columns from which the achieved speed is shown as well
PASSES = ("fwd", "dX", "dW")
LEGEND = (
    "ratio: other / CLLM, the median of the rounds' ratios, with their range. < misses its goal, over: above "
    "its limit. ~ noisy: the middle half of the rounds spans over 15 %; repeat it on a quiet machine. "
    "* torch.compile, where it was faster than eager torch."
)


class Table:
    """Prints rows as they come.

    Parameters
    ----------
    out : text file, optional
        Standard output by default.
    width : int, optional
        By default the terminal's; from 112 on each row says its GFLOP/s or GB/s as well.
    """

    def __init__(self, out=None, width=None):
        self.out = out or sys.stdout
        self.width = width or shutil.get_terminal_size((80, 24)).columns
        self.wide = self.width >= WIDE
        self.group, self.products = None, []

    def say(self, line=""):
        print(line, file=self.out, flush=True)

    def note(self, text, label=None):
        """Print words, broken at the table's width; with a label a line of the head."""
        first = f"{label:16} " if label else ""
        wrapped = textwrap.wrap(
            text, max(self.width, 60), initial_indent=first, subsequent_indent=" " * len(first),
            break_on_hyphens=False,
        )  # fmt: skip
        self.say("\n".join(wrapped))

    def row(self, row):
        if row["group"] != self.group:
            self.finish()
            self.group = row["group"]
            self._heading(row)
        if row["group"] == "gemm":
            self.products.append(row)
            if row["pass"] == PASSES[-1]:
                self.finish()
            return
        self.say(self._line(row))

    def finish(self):
        """Print what waits for its line to be complete."""
        if self.products:
            self.say(self._product_line(self.products))
        self.products = []

    def _heading(self, row):
        self.say()
        self.note(GROUPS[row["group"]])
        others = [side for side in row["samples"] if side != OURS]
        if row["group"] == "gemm":
            names = ["torch"] * ("torch" in others) + ["OpenBLAS"] * ("NumPy" in others)
            line = f"{'/'.join(names):27}" + "".join(f"  {step:12}" for step in PASSES)
            self.say(f"{line:72}GFLOP/s: fwd     dX     dW" if self.wide else line.rstrip())
            return
        name = others[0] if others else ""
        columns = f"{'':31} thr {OURS:>8} {name:>8} {'ratio':>6} {'range':>9} {'goal':>4}"
        self.say((columns + ("   achieved" if self.wide else "")).rstrip())

    def _line(self, row):
        side, found = records.other(row), records.value(row)
        case = row["case"]
        line = f"{case:31} {row['threads']:3} "
        if row["unit"] in ("s", "MB"):
            mark = "*" if side == "torch.compile" else " "
            theirs = _amount(records.numbers(row, side)[0], row["unit"]) + mark if side else ""
            line += f"{_amount(records.numbers(row)[0], row['unit']):>8}{theirs:>9}"
        else:
            line += f"{row['unit']:>17}"
        if found is not None:
            middle, low, high = (f"{x:.0f}" if row["unit"] == "faults" else _short(x) for x in found)
            noise = "~" if records.noisy(row) else ""
            spread = f"{low}-{high}" if len(row["samples"][OURS]) > 1 else ""
            line += f" {noise + middle:>6} {spread:>9}"
        elif records.noisy(row):
            line += f" {'~':>6}"
        wanted = records.target(row)
        if wanted is not None:
            line += f" {_short(wanted) if wanted < 10 else wanted:>4}"
            line += (" <" if not row["most"] else " over") if records.below_target(row) else ""
        if self.wide and row["unit"] == "s":
            line = f"{line:78}{_speed(row)}"
        return line.rstrip()

    def _product_line(self, rows):
        first = rows[0]
        line = f"{first['size']:6}{first['layer']:5}{'x'.join(map(str, first['shape'])):16}"
        for row in rows:
            cells = []
            for side in ("torch", "NumPy"):
                if side in row["samples"]:
                    mark = "<" if records.below_target(row, side) else ""
                    cells.append(f"{_short(records.value(row, side)[0])}{mark}")
            line += f"{'~' if records.noisy(row) else '':>2}{'/'.join(cells):12}"
        if self.wide:
            speeds = (row["flops"] / records.numbers(row)[0] / 1e9 for row in rows)
            line = f"{line:78}" + " ".join(f"{speed:6.1f}" for speed in speeds)
        return line.rstrip()


def summary(rows):
    """Lines that say for each group how many rows reach their target, and which is furthest from it."""
    lines = []
    for group in GROUPS:
        judged = []  # (share of the target that is reached, row, side)
        for row in rows:
            for side in row["targets"] if row["group"] == group else ():
                if side != OURS and group != "gemm" and side != records.other(row):
                    continue
                found, wanted = records.value(row, side if side != OURS else None)[0], row["targets"][side]
                share = wanted / max(found, 1e-9) if row["most"] else found / wanted
                judged.append((share, row, side))
        if not judged:
            continue
        missed = [entry for entry in judged if records.below_target(entry[1], _side(entry))]
        line = f"{group:10} {len(judged) - len(missed):3} of {len(judged):3} reach the goal"
        if missed:
            _, row, side = min(missed, key=lambda entry: entry[0])
            found = records.value(row, None if side == OURS else side)[0]
            threads = f", {row['threads']} threads" if row["threads"] > 1 else ""
            of = row["targets"][side]
            line += f"; furthest: {row['case']}{threads}: {_short(found)} of {of if of > 9 else _short(of)}"
        lines.append(line)
    return lines


def _side(entry):
    return None if entry[2] == OURS else entry[2]


def _amount(x, unit):
    """A time or a size with three digits."""
    if unit == "MB":
        return f"{x:.0f} MB"
    for scale, name in ((1, "s"), (1e-3, "ms")):
        if x >= scale:
            return f"{_three(x / scale)} {name}"
    return f"{_three(x / 1e-6)} us"


def _three(x):
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _short(x):
    """A ratio, with as many digits as four columns hold."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def _speed(row):
    seconds = records.numbers(row)[0]
    if row["flops"]:
        return f"  {row['flops'] / seconds / 1e9:6.1f} GFLOP/s"
    return f"  {row['bytes'] / seconds / 1e9:6.1f} GB/s" if row["bytes"] else ""
