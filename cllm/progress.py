"""What a run shows while it trains: a bar with two lines on a terminal, plain lines elsewhere, or nothing.

A progress object has six methods, which the Trainer calls: `start(trainer)` once, `step(record)` after
each update, `evaluation(record)`, `sample(step, text)`, `note(text)` for what happens besides, and
`end(summary)` once, however the run ended.
"""

import numbers
import sys
import time

from cllm import profile, records

__all__ = ["Bar", "Lines", "Silent", "choose"]

# Seconds between two redraws of the bar: a tiny model takes a thousand steps in that time.
_REDRAW = 0.1


def choose(stream=None):
    """A bar when the stream (default: standard output) is a terminal, else plain lines."""
    stream = stream or sys.stdout
    return Bar(stream) if stream.isatty() else Lines(stream)


class Silent:
    """Shows nothing."""

    def start(self, trainer):
        pass

    def step(self, record):
        pass

    def evaluation(self, record):
        pass

    def sample(self, step, text):
        pass

    def note(self, text):
        pass

    def end(self, summary):
        pass


class Lines:
    """Plain lines: the start, every tenth of the steps, each evaluation and sample, the end."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout

    def start(self, trainer):
        self.next_command = trainer.next_command
        self.run_dir = trainer.run_dir
        self.max_steps = trainer.config.train.max_steps
        self.every = max(1, self.max_steps // 10)
        self.unit = trainer.unit
        self.rate, self.times = _Rate(trainer.step), _Times()
        self._print(_start_line(trainer))

    def step(self, record):
        self.times.add(record)
        if record["step"] % self.every == 0:
            left = self.rate.left(record["step"], self.max_steps)
            figures = _figures(record, decimals=4)
            if record.get("lr") is not None:
                figures.append(f"lr {record['lr']:.2e}")
            if record.get("grad_norm") is not None:
                figures.append(f"grad norm {record['grad_norm']:.3g}")
            figures += _speed(record, self.unit)
            figures.append(f"{duration(left)} left")
            self._print(f"step {record['step']}/{self.max_steps}: {', '.join(figures)}")

    def evaluation(self, record):
        self.times.add(record)
        self._print(_evaluation_line(record))

    def sample(self, step, text):
        self._print(f"step {step}: {text}")

    def note(self, text):
        self._print(text)

    def end(self, summary):
        for line in _end_lines(summary, self.times, self.run_dir, self.next_command):
            self._print(line)

    def _print(self, line):
        print(_encodable(line, self.stream), file=self.stream, flush=True)


class Bar:
    """A rich progress bar and below it what else was measured; evaluations and samples are printed above."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout

    def start(self, trainer):
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = Console(file=self.stream, highlight=False, markup=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self.run_dir, self.next_command = trainer.run_dir, trainer.next_command
        self.unit = "tok" if trainer.unit == "tokens" else trainer.unit
        self.evaluated = self.ratio = ""
        self.below = ()  # lines
        self.max_steps = trainer.config.train.max_steps
        self.rate, self.times = _Rate(trainer.step), _Times()
        self.drawn = 0.0
        self.console.print(_start_line(trainer))
        self.task = self.bar.add_task("step", total=self.max_steps, completed=trainer.step, figures="")
        self.live = Live(Group(self.bar, self), console=self.console, auto_refresh=False)
        self.live.start()

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        return Group(*[Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self.below])

    def step(self, record):
        self.times.add(record)
        if record.get("update_ratio") is not None:
            self.ratio = f"update/weight {record['update_ratio']:.1e}"
        now = time.monotonic()
        if now - self.drawn < _REDRAW and record["step"] < self.max_steps:
            return
        self.drawn = now
        left = self.rate.left(record["step"], self.max_steps)
        figures = [*_figures(record, decimals=3), *_speed(record, self.unit), f"{duration(left)} left"]
        self.bar.update(self.task, completed=record["step"], figures="  ".join(figures))
        measured = [
            form.format(record[key]) if record.get(key) is not None else ""
            for key, form in {"lr": "lr {:.1e}", "grad_norm": "grad norm {:.2g}"}.items()
        ]
        memory = f"memory {record['memory_mb']:.0f} MB" if "memory_mb" in record else ""
        lines = (*measured, self.ratio, self.evaluated), (self.times.shares(), memory)
        self.below = ["  ".join(filter(None, line)) for line in lines if any(line)]
        self.live.refresh()

    def evaluation(self, record):
        self.times.add(record)
        self.console.print(_evaluation_line(record))
        # The first metric stays in view: the loss is there anyway, perplexity says the same.
        shown = {
            key: value for key, value in record.items()
            if key not in (*_COMMON, "perplexity") and not records.is_timing(key)
        }  # fmt: skip
        if figures := _figures(shown, decimals=3):
            self.evaluated = f"{record['split']} {figures[0]}"

    def sample(self, step, text):
        self.console.print(_encodable(f"step {step}: {text}", self.stream), overflow="ellipsis", no_wrap=True)

    def note(self, text):
        self.console.print(_encodable(text, self.stream), soft_wrap=True)

    def end(self, summary):
        self.live.stop()
        for line in _end_lines(summary, self.times, self.run_dir, self.next_command):
            self.console.print(line, soft_wrap=True)


class _Rate:
    """Steps a second since the start, for the time left."""

    def __init__(self, step):
        self.first = step
        self.began = time.monotonic()

    def left(self, step, max_steps):
        """Seconds that the remaining steps take at the rate so far."""
        return (time.monotonic() - self.began) * max(0, max_steps - step) / max(1, step - self.first)


class _Times:
    """Where the time of this process went."""

    def __init__(self):
        self.parts, self.evaluations = {}, 0.0

    def add(self, record):
        if record["split"] != "train":
            self.evaluations += record.get("seconds", 0.0)
            return
        for key, value in record.items():
            if key.startswith("time_") and isinstance(value, numbers.Real):
                name = key.removeprefix("time_")
                self.parts[name] = self.parts.get(name, 0.0) + value

    def shares(self):
        """Each part's share of the steps, in words; empty when that was not measured."""
        whole = sum(self.parts.values())
        return ", ".join(
            f"{name} {100 * seconds / whole:.0f} %" for name, seconds in self.parts.items() if whole
        )

    def line(self, checkpoints):
        return (
            f"time: {duration(sum(self.parts.values()))} of steps ({self.shares()}), "
            f"{duration(self.evaluations)} of evaluations, {duration(checkpoints)} of checkpoints"
        )


def duration(seconds):
    """Seconds as a person says them: 0.8 s, 42 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _encodable(line, stream):
    """The line with a ? for each character that the stream's encoding lacks: any text may be generated."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return line.encode(encoding, "replace").decode(encoding)


def thousands(value):
    """A number as 123, 12.3k or 4.56M."""
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1000:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"


def _start_line(trainer):
    verb = f"resuming at step {trainer.step}" if trainer.step else "training"
    threads = f"{trainer.threads} thread{'s' * (trainer.threads > 1)}"
    return f"{verb}: {trainer.description}, {threads}, files in {trainer.run_dir}"


# What a record has besides what was measured.
_COMMON = ("step", "split", "loss", "lr", "grad_norm")


def _speed(record, unit):
    """How fast training is, in words, in a list; empty when that was not measured."""
    speeds = [record[key] for key in ("tokens_per_s", "examples_per_s") if key in record]
    return [f"{thousands(speed)} {unit}/s" for speed in speeds[:1]]


def _figures(record, decimals, most=4):
    """A record's loss and what else was measured, in words: the first numbers, no lists."""
    shown = {"loss": record["loss"]} if "loss" in record else {}
    shown |= {
        key: value for key, value in record.items()
        if key not in _COMMON and not records.is_timing(key) and not records.is_inside(key)
    }  # fmt: skip
    figures = []
    for key, value in shown.items():
        if value is None:
            value = float("nan")
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            figures.append(f"{key} {value:.{2 if key == 'perplexity' else decimals}f}")
    return figures[:most]


def _evaluation_line(record):
    return f"step {record['step']}: {record['split']} {', '.join(_figures(record, decimals=4, most=8))}"


def _end_lines(summary, times, run_dir, next_command):
    if times.parts:
        yield times.line(summary["time_checkpoints"])
    yield _end_line(summary, run_dir, next_command)
    if "profile" in summary:
        yield from profile.table(summary["profile"])


def _end_line(summary, run_dir, next_command):
    step = summary["step"]
    if summary["state"] == "interrupted":
        by = {"SIGTERM": "stopped by SIGTERM", "train.max_minutes": "stopped, as train.max_minutes are over,"}
        by["pause"] = "paused"
        how = by.get(summary.get("stopped_by"), "interrupted")
        return f"{how} at step {step}; continue with: cllm resume {run_dir}"
    if summary["state"] == "failed":
        return f"failed at step {step}: {summary['error']}"
    losses = {key.removesuffix("_loss"): value for key, value in summary.items() if key.endswith("_loss")}
    losses["train"] = None
    loss = "".join(f"{split} loss {value:.4f}, " for split, value in losses.items() if value is not None)
    return (
        f"finished {step} steps: {loss}{duration(summary['seconds'])}, "
        f"peak memory {summary['memory_peak_mb']:.0f} MB, files in {run_dir}; next: {next_command}"
    )
