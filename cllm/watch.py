"""What a sweep shows: a live table on a terminal, plain lines elsewhere; `status` from another shell.

A display has six methods, which `sweep.run` calls: `start(sweep, directory, results, n_workers)` once,
`stage(orders, left)` before each list of trials of which some are `left` to train, `step(trial, step, loss)`
a few times a second, `ended(result)` after each trial, `note(text)` for what happens besides, and `end(text)`
once. `results` is the sweep's own dict {trial name: `sweep.Result`}, which fills as trials end.
"""

import sys
import time
from collections import Counter
from time import monotonic

from cllm import verdict
from cllm.progress import duration

__all__ = [
    "Lines", "Table", "best", "choose", "columns", "counts", "cut", "short", "sparkline", "until",
]  # fmt: skip

HEARTBEAT = 30.0  # seconds without a line after which plain lines say what is running
REFRESH = 2  # drawings of the live table in a second
MOST_ROWS = 16  # trials in the live table
WIDTH = 8  # characters of a sparkline
HISTORY = 64  # losses of a trial that are kept for it
STATES = ("finished", "running", "paused", "pruned", "failed", "pending")  # in the order of telling
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"


def choose():
    """A live table when standard output is a terminal, else plain lines."""
    return Table() if sys.stdout.isatty() else Lines()


# Words -----------------------------------------------------------------------------------------------


def counts(results):
    """How many trials are in which state, in words: "12 finished, 2 running, 4 pending"."""
    found = Counter(result.state for result in results.values())
    return ", ".join(f"{found[state]} {state}" for state in STATES if found[state])


def best(sweep, results):
    """The best setting so far in words; "" before there is one.

    Before a setting has finished with all of its seeds, it is the best of those that have come to the
    furthest rung.
    """
    first = next(iter(verdict.ranking(sweep, results)), None)
    if first is not None and first.complete:
        value = verdict.plus_minus(first.mean, first.standard_error)
        return f"best so far: {sweep.config.objective} {value}, {short(sweep, first.setting)}"
    by_rung = {}
    for result in results.values():
        if result.value is not None:
            by_rung.setdefault((result.step, result.trial.setting), []).append(result.value)
    sign = 1 if sweep.config.goal == "minimize" else -1
    whole = {key: values for key, values in by_rung.items() if len(values) == len(sweep.config.seeds)}
    if not whole:
        return ""
    step, setting = min(whole, key=lambda key: (-key[0], sign * sum(whole[key]) / len(whole[key]), key))
    mean = sum(whole[step, setting]) / len(whole[step, setting])
    value = f"{sweep.config.objective} {mean:.4f} at step {step}"
    return f"best so far: {value}, {short(sweep, setting)}"


def short(sweep, setting):
    """A setting in few words, "lr=0.003 name=sgd": keys without their sections where no two are alike."""
    values, keys = sweep.settings[setting], sweep.varied()
    last = Counter(key.rpartition(".")[2] for key in keys)
    names = {key: key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in keys}
    return " ".join(f"{names[key]}={verdict.text(values[key])}" for key in keys if key in values)


def columns(rows):
    """Rows of cells as lines, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in rows]


def cut(line, width):
    return line if len(line) <= width else line[: width - 1] + "…"


def sparkline(values, width=WIDTH, blocks=BLOCKS):
    """Numbers as a line of blocks, the highest for the largest; what is not finite is left blank.

    More numbers than `width` are drawn as the means of as many parts.
    """
    n = len(values)
    if n > width:
        values = [_mean(values[i * n // width : (i + 1) * n // width]) for i in range(width)]
    known = [value for value in values if _is_finite(value)]
    if not known:
        return " " * len(values)
    low, high = min(known), max(known)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((v - low) * scale)] if _is_finite(v) else " " for v in values)


def _mean(values):
    known = [value for value in values if _is_finite(value)]
    return sum(known) / len(known) if known else None


def _is_finite(value):
    return value is not None and abs(value) < float("inf")


def until(seconds):
    """Time left in words, with the clock's time at its end when that is not at once."""
    if seconds < 60:
        return f"{duration(seconds)} left"
    at = time.localtime(time.time() + seconds)
    day = "" if seconds < 12 * 3600 else time.strftime("%a ", at)
    return f"{duration(seconds)} left, until {day}{time.strftime('%H:%M', at)}"


def _plural(n, word):
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


# Displays --------------------------------------------------------------------------------------------


class Lines:
    """Plain lines: the start, each trial's end, rungs, a sign of life during long trials, the verdict."""

    def start(self, sweep, directory, results, n_workers):
        self.sweep, self.results = sweep, results
        self.running = {}  # trial name -> step
        self.begins, self.goals = {}, {}  # trial name -> step from which, to which it goes in this stage
        self.cohort, self.rounds = set(), 0
        self.n_done = self.n_all = 0  # trials of the stage
        self.steps_done = self.steps_all = 0  # of the trials of the stage that were left
        self.steps_before = 0  # in earlier stages of this call
        self.began = self.spoken = monotonic()
        self.words = ""
        config = sweep.config
        n_settings, n_seeds = config.trials or len(sweep.numbers), len(config.seeds)
        product = f"{_plural(n_settings, 'setting')} x {_plural(n_seeds, 'seed')}"
        product += f" = {_plural(n_settings * n_seeds, 'trial')}"
        at_once = f", {n_workers} at once with {_plural(config.threads, 'thread')} each" if n_workers else ""
        self.say(f"sweep: {product}{at_once}; files in {directory}")
        for notice in sweep.notices:
            self.say(notice)

    def stage(self, orders, left):
        self.words = self.stage_words(orders)
        self.steps_before += self.steps_done
        self.n_all, self.n_done = len(orders), len(orders) - len(left)
        self.begins = {order.trial.name: self.results[order.trial.name].step for order in left}
        self.goals = {order.trial.name: order.until or order.config.train.max_steps for order in left}
        self.steps_done = 0
        self.steps_all = sum(max(0, self.goals[name] - begin) for name, begin in self.begins.items())
        kept = f"{_plural(self.n_done, 'trial')} of {self.n_all} done already and kept" if self.n_done else ""
        self.tell_stage(kept)

    def tell_stage(self, kept):
        if self.words or kept:
            self.say("; ".join(filter(None, (self.words, kept))))

    def stage_words(self, orders):
        """What a list of trials is for; "" when it is all that there is to a sweep."""
        sweep, first = self.sweep, orders[0]
        numbers, rungs = {order.trial.setting for order in orders}, sweep.prune.rungs
        n = _plural(len(numbers), "setting")
        if first.trial.seed in sweep.confirm_seeds:
            return f"confirmation: the best {n} again, with {_plural(len(sweep.confirm_seeds), 'fresh seed')}"
        new = not numbers <= self.cohort
        dropped = "" if new else f", {len(self.cohort) - len(numbers)} dropped"
        self.cohort = numbers
        self.rounds += new
        words = []
        if sweep.config.method == "tpe":
            words.append(f"round {self.rounds}")
        if first.until is not None:
            words.append(f"rung {rungs.index(first.until) + 1} of {len(rungs)}")
        elif rungs:
            words.append("after the last rung")
        if not words:
            return ""
        return f"{', '.join(words)}: {n} to step {first.until or first.config.train.max_steps}{dropped}"

    def step(self, trial, step, loss):
        self.count(trial.name, step)
        if monotonic() - self.spoken > HEARTBEAT:
            where = [f"{name} at step {at}/{self.goals[name]}" for name, at in self.running.items()]
            self.say(f"running: {', '.join(where)}; {self.left()}")

    def ended(self, result):
        self.count_ended(result)
        self.say(self.line(result))

    def note(self, text):
        self.say(text)

    def end(self, text):
        self.say(text)

    def say(self, text):
        self.spoken = monotonic()
        print(text, flush=True)

    def count(self, name, step):
        """Note how far a trial is."""
        before = self.running.get(name, self.begins[name])
        self.running[name] = max(before, step)
        self.steps_done += self.running[name] - before

    def count_ended(self, result):
        self.count(result.trial.name, self.goals[result.trial.name])  # also what a failed one will not need
        self.running.pop(result.trial.name)
        self.n_done += 1

    def line(self, result):
        """One trial's end in words."""
        place, trial = f"[{self.n_done:{len(str(self.n_all))}}/{self.n_all}]", result.trial
        words = f"{trial.name} ({self.sweep.describe(trial.setting)}): {self.outcome(result)}"
        return f"{place} {words}; {self.left()}"

    def outcome(self, result):
        if result.state == "failed":
            return f"failed: {' '.join(result.error.split())}"
        rung = f" at step {result.step}" if result.state == "paused" else ""
        tested = "" if result.test is None else f", on test {result.test:.4f}"
        value = f"{self.sweep.config.objective} {result.value:.4f}"
        return f"{value}{rung}{tested}, {duration(result.seconds)}"

    def left(self):
        """The time that the remaining steps of the stage take at the rate so far, in words."""
        done = self.steps_before + self.steps_done
        if not done:
            return "time left not known yet"
        seconds = (monotonic() - self.began) * max(0, self.steps_all - self.steps_done) / done
        return until(seconds)


class Table(Lines):
    """A live table: the stage, the running trials, those that ended last, the best so far.

    Failures and what else must not be missed stay above it, and so do stages that are over.
    """

    def start(self, sweep, directory, results, n_workers):
        from rich.console import Console
        from rich.live import Live

        self.console = Console(highlight=False, markup=False)
        self.unicode = (self.console.encoding or "").lower().startswith("utf")
        self.losses = {}  # trial name -> the losses that it told of, in order
        self.since = {}  # trial name -> when it took its first step here, and which
        self.last = []  # results that came last, in this stage
        self.best, self.best_due, self.stage_began = "", 0.0, 0.0
        super().start(sweep, directory, results, n_workers)
        self.live = Live(self, console=self.console, refresh_per_second=REFRESH, transient=True)
        if n_workers:
            self.live.start()

    def stage(self, orders, left):
        self.stage_over()
        super().stage(orders, left)
        self.stage_began = monotonic()
        self.last = []

    def tell_stage(self, kept):
        if kept:
            self.say(kept)

    def stage_over(self):
        if self.words:
            self.say(f"{self.words} ({duration(monotonic() - self.stage_began)})")

    def step(self, trial, step, loss):
        self.count(trial.name, step)
        if step > self.begins[trial.name]:
            self.since.setdefault(trial.name, (monotonic(), step))
        if loss is not None:
            losses = self.losses.setdefault(trial.name, [])
            losses.append(loss)
            if len(losses) > HISTORY:
                losses[:] = [_mean(losses[i : i + 2]) for i in range(0, len(losses), 2)]

    def ended(self, result):
        self.count_ended(result)
        if result.state == "failed":
            words = f"{result.trial.name} ({self.setting(result)}): {self.outcome(result)}"
            self.say(cut(words, 2 * self.console.width - 10))  # two lines; all of it is in results.csv
        self.last = [result, *self.last[: MOST_ROWS - 1]]
        shown = {*self.running, *(result.trial.name for result in self.last)}
        self.losses = {name: losses for name, losses in self.losses.items() if name in shown}
        self.since.pop(result.trial.name, None)

    def end(self, text):
        self.live.stop()
        self.stage_over()
        *lines, last = text.split("\n")  # what is long in them are the rows of a table; the last is a path
        width = max(80, self.console.width)
        self.console.print("\n".join([*(cut(line, width) for line in lines), last]), soft_wrap=True)

    def say(self, text):
        self.console.print(text)

    def __rich__(self):
        from rich.text import Text

        width = self.console.width
        text = "\n".join(cut(line, width) for line in self.drawing(width, self.console.height))
        return Text(text, no_wrap=True, overflow="crop")

    def drawing(self, width, height):
        """The table as lines; the last column may be longer than the terminal is wide."""
        n, left = f"{self.n_done}/{self.n_all} trials ", f" {self.left()}"
        long = max(10, min(40, width - len(n) - len(left)))
        done = long * self.steps_done // max(1, self.steps_all)
        bar = "━" * done + "╌" * (long - done) if self.unicode else "#" * done + "." * (long - done)
        most = max(2, min(MOST_ROWS, height - 6))
        running = list(self.running.items())
        rows = [self.running_row(name, step) for name, step in running[:most]]
        rows += [self.ended_row(result) for result in self.last[: max(0, most - len(running))]]
        more = f"and {len(running) - most} more are running" if len(running) > most else ""
        results = dict(self.results)  # which grows while this thread of the terminal draws
        if monotonic() > self.best_due:  # it takes a while where there are thousands of trials
            began = monotonic()
            self.best = best(self.sweep, results)
            self.best_due = monotonic() + max(1.0, 500 * (monotonic() - began))
        lines = (self.words, n + bar + left, *columns(rows), more, self.best, counts(results))
        return list(filter(None, lines))

    def running_row(self, name, step):
        losses = self.losses.get(name, ())
        loss = f"{losses[-1]:.3f}" if losses and losses[-1] is not None else ""
        began, first = self.since.get(name, (0.0, step))
        left = ""
        if step > first:
            left = duration((monotonic() - began) * (self.goals[name] - step) / (step - first))
        setting = self.setting(self.results[name])
        return name, "running", f"{step}/{self.goals[name]}", self.spark(name), loss, left, setting

    def ended_row(self, result):
        name, value = result.trial.name, "" if result.value is None else f"{result.value:.3f}"
        return name, result.state, str(result.step), self.spark(name), value, "", self.setting(result)

    def spark(self, name):
        return sparkline(self.losses.get(name, ()), blocks=BLOCKS if self.unicode else PLAIN_BLOCKS)

    def setting(self, result):
        return short(self.sweep, result.trial.setting)
