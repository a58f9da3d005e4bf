"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere, or nothing.

A progress object has five methods, which the Trainer calls: `start(trainer)` once, `step(record)` after
each update, `evaluation(record)`, `sample(step, text)`, and `end(summary)` once, however the run ended.
"""

import sys
import time

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

    def end(self, summary):
        pass


class Lines:
    """Plain lines: the start, every tenth of the steps, each evaluation and sample, the end."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout

    def start(self, trainer):
        self.run_dir = trainer.run_dir
        self.max_steps = trainer.config.train.max_steps
        self.every = max(1, self.max_steps // 10)
        self.rate = _Rate(trainer.step)
        self._print(_start_line(trainer))

    def step(self, record):
        if record["step"] % self.every == 0:
            left = self.rate.left(record["step"], self.max_steps)
            self._print(
                f"step {record['step']}/{self.max_steps}: loss {record['loss']:.4f}, lr {record['lr']:.2e}, "
                f"{_thousands(record['tokens_per_s'])} tokens/s, {duration(left)} left"
            )

    def evaluation(self, record):
        self._print(_evaluation_line(record))

    def sample(self, step, text):
        self._print(f"step {step}: {text}")

    def end(self, summary):
        self._print(_end_line(summary, self.run_dir))

    def _print(self, line):
        print(_encodable(line, self.stream), file=self.stream, flush=True)


class Bar:
    """A rich progress bar; evaluations and generated lines are printed above it."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout

    def start(self, trainer):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = Console(file=self.stream, highlight=False, markup=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            auto_refresh=False,
        )
        self.run_dir = trainer.run_dir
        self.max_steps = trainer.config.train.max_steps
        self.rate = _Rate(trainer.step)
        self.drawn = 0.0
        self.console.print(_start_line(trainer))
        self.task = self.bar.add_task("step", total=self.max_steps, completed=trainer.step, figures="")
        self.bar.start()

    def step(self, record):
        now = time.monotonic()
        if now - self.drawn < _REDRAW and record["step"] < self.max_steps:
            return
        self.drawn = now
        left = self.rate.left(record["step"], self.max_steps)
        self.bar.update(
            self.task,
            completed=record["step"],
            figures=f"loss {record['loss']:.3f}  lr {record['lr']:.1e}  "
            f"{_thousands(record['tokens_per_s'])} tok/s  {duration(left)} left",
            refresh=True,
        )

    def evaluation(self, record):
        self.console.print(_evaluation_line(record))

    def sample(self, step, text):
        self.console.print(_encodable(f"step {step}: {text}", self.stream), overflow="ellipsis", no_wrap=True)

    def end(self, summary):
        self.bar.stop()
        self.console.print(_end_line(summary, self.run_dir), soft_wrap=True)


class _Rate:
    """Steps a second since the start, for the time left."""

    def __init__(self, step):
        self.first = step
        self.began = time.monotonic()

    def left(self, step, max_steps):
        """Seconds that the remaining steps take at the rate so far."""
        return (time.monotonic() - self.began) * (max_steps - step) / (step - self.first)


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


def _thousands(value):
    return f"{value / 1000:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"


def _start_line(trainer):
    data, train = trainer.config.data, trainer.config.train
    verb = f"resuming at step {trainer.step}" if trainer.step else "training"
    threads = f"{trainer.threads} thread{'s' * (trainer.threads > 1)}"
    return (
        f"{verb}: {_thousands(trainer.n_parameters)} parameters on {data.source} "
        f"({_thousands(len(trainer.text.train))} tokens, vocabulary {trainer.text.vocab_size}), "
        f"{train.max_steps} steps of {trainer.tokens_per_step} tokens, {threads}, "
        f"files in {trainer.run_dir}"
    )


def _evaluation_line(record):
    return (
        f"step {record['step']}: {record['split']} loss {record['loss']:.4f}, "
        f"perplexity {record['perplexity']:.2f}"
    )


def _end_line(summary, run_dir):
    step = summary["step"]
    if summary["state"] == "interrupted":
        return f"interrupted at step {step}; continue with: cllm resume {run_dir}"
    if summary["state"] == "failed":
        return f"failed at step {step}: {summary['error']}"
    loss = "" if summary["val_loss"] is None else f"val loss {summary['val_loss']:.4f}, "
    return (
        f"finished {step} steps: {loss}{duration(summary['seconds'])}, "
        f"peak memory {summary['memory_peak_mb']:.0f} MB, files in {run_dir}; next: cllm sample {run_dir}"
    )
