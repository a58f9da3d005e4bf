"""What a sweep shows while it runs: a live table on a terminal, plain lines elsewhere.

A display has four methods, which `sweep.run` calls: `start(sweep, directory, results, n_workers)` once,
`step(trial, step, loss)` a few times a second, `ended(result)` after each trial, and `end(text)` once.
`results` is the sweep's own dict {trial name: `sweep.Result`}, which fills as trials end.
"""

import sys
from time import monotonic

from cllm.progress import duration
from cllm.verdict import plus_minus, ranking

__all__ = ["Lines", "Table", "choose"]

HEARTBEAT = 30.0  # seconds without a line after which plain lines say what is running
MOST_ROWS = 16  # running trials in the live table


def choose():
    """A live table when standard output is a terminal, else plain lines."""
    return Table() if sys.stdout.isatty() else Lines()


class Lines:
    """Plain lines: the start, each trial's end, a sign of life during long trials, the verdict."""

    def start(self, sweep, directory, results, n_workers):
        self.sweep, self.results = sweep, results
        trials = [result.trial for result in results.values()]
        self.max_steps = {trial.name: sweep.trial_config(trial).train.max_steps for trial in trials}
        todo = [name for name, result in results.items() if result.state != "finished"]
        n_failed = sum(result.state == "failed" for result in results.values())
        self.ended_names = results.keys() - set(todo)
        self.running = {}  # trial name -> (step, loss)
        self.steps_todo = sum(self.max_steps[name] for name in todo)
        self.steps_ended = 0
        self.began = self.spoken = monotonic()
        product = f"{len(sweep.settings)} settings x {len(sweep.config.seeds)} seeds = {len(trials)} trials"
        threads = f"{sweep.config.threads} thread{'s' * (sweep.config.threads > 1)}"
        at_once = f", {n_workers} at once with {threads} each" if todo else ""
        self.say(f"sweep: {product}{at_once}; files in {directory}")
        for notice in sweep.notices:
            self.say(notice)
        if len(todo) < len(trials):
            self.say(f"{len(trials) - len(todo)} trials are finished already and kept")
        if n_failed:
            self.say(f"{n_failed} trials that failed are tried again")

    def step(self, trial, step, loss):
        self.running[trial.name] = (step, loss)
        if monotonic() - self.spoken > HEARTBEAT:
            where = [f"{name} at step {at}/{self.max_steps[name]}" for name, (at, _) in self.running.items()]
            self.say(f"running: {', '.join(where)}; {self.left()}")

    def ended(self, result):
        self.count(result)
        self.say(self.line(result))

    def end(self, text):
        self.say(text)

    def say(self, text):
        self.spoken = monotonic()
        print(text, flush=True)

    def count(self, result):
        name = result.trial.name
        self.running.pop(name, None)
        self.ended_names.add(name)
        self.steps_ended += self.max_steps[name]

    def line(self, result):
        """One trial's end in words."""
        n, trial = len(self.results), result.trial
        outcome = f"failed: {result.error}"
        if result.state == "finished":
            outcome = f"{self.sweep.config.objective} {result.value:.4f}, {duration(result.seconds)}"
        place = f"[{len(self.ended_names):{len(str(n))}}/{n}]"
        return f"{place} {trial.name} ({self.sweep.describe(trial.setting)}): {outcome}; {self.left()}"

    def left(self):
        """The time that the remaining steps take at the rate so far, in words."""
        done = self.steps_ended + sum(step for step, _ in list(self.running.values()))
        if not done:
            return "time left not known yet"
        return f"{duration((monotonic() - self.began) * max(0, self.steps_todo - done) / done)} left"


class Table(Lines):
    """A live table: how far the sweep is, the running trials, the best so far; failures stay above it."""

    def start(self, sweep, directory, results, n_workers):
        from rich.console import Console
        from rich.live import Live

        self.console = Console(highlight=False, markup=False)
        super().start(sweep, directory, results, n_workers)
        self.best = ""
        self.live = Live(self, console=self.console, refresh_per_second=4, transient=True)
        self.live.start()

    def step(self, trial, step, loss):
        self.running[trial.name] = (step, loss)

    def ended(self, result):
        self.count(result)
        if result.state == "failed":
            self.say(self.line(result))
        first = ranking(self.sweep, self.results)[0]
        if first.complete:
            value = plus_minus(first.mean, first.standard_error)
            self.best = f"best so far: {self.sweep.describe(first.setting)}, {value}"

    def end(self, text):
        self.live.stop()
        super().end(text)

    def say(self, text):
        self.console.print(text, soft_wrap=True)

    def __rich__(self):
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table as Grid

        n_ended, n_all = len(self.ended_names), len(self.results)
        n_failed = sum(self.results[name].state == "failed" for name in list(self.ended_names))
        failed = f", {n_failed} failed" if n_failed else ""
        total = Grid.grid(padding=(0, 2))
        total.add_row(f"{n_ended}/{n_all} trials{failed}", ProgressBar(n_all, n_ended, width=30), self.left())
        rows = Grid.grid(padding=(0, 2))
        for name, (step, loss) in list(self.running.items())[:MOST_ROWS]:
            steps, setting = self.max_steps[name], self.results[name].trial.setting
            bar = ProgressBar(steps, step, width=20)
            shown = "" if loss is None else f"loss {loss:.3f}"
            rows.add_row(name, self.sweep.describe(setting), bar, f"step {step}/{steps}", shown)
        below = [f"and {len(self.running) - MOST_ROWS} more"] if len(self.running) > MOST_ROWS else []
        return Group(total, rows, *below, self.best)
