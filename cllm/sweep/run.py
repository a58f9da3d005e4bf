"""Running a sweep: from its plan to a table and a verdict."""

import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from cllm import config as configs
from cllm import kernels, records, task, verdict, watch
from cllm.errors import InputError
from cllm.files import write_atomic
from cllm.lifecycle import TERMINATED, user_files
from cllm.sweep.engine import run_trials
from cllm.sweep.results import read, trained, write_table
from cllm.verdict import text

__all__ = ["run"]


def run(sweep, directory, workers=None, progress=None):
    """Run a sweep's trials, or what is left of them, and judge them.

    Finished trials of an earlier call are kept, those in flight go on from their checkpoints, failed ones
    are tried again. While it runs, `directory` always holds a whole results.csv.

    Parameters
    ----------
    sweep : Sweep
    directory : path-like
        New, empty, or that of the same sweep.
    workers : int, optional
        Trials at once; by default this process's cores divided by the threads of a trial.
    progress : object, optional
        Shows the sweep, see `cllm.watch`; by default what suits standard output.

    Returns
    -------
    dict
        What summary.json holds: each setting's mean, standard error and n, ranked, and the verdict.

    Raises
    ------
    InputError
        When the directory holds something else, or the data cannot be used. Nothing has been written then.
    KeyboardInterrupt, SystemExit
        After Ctrl-C and SIGTERM, when the workers have written their checkpoints.
    """
    directory = Path(directory)
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}, it must be at least 1")
    judged = _refuse_another(sweep, directory)
    trials = sweep.trials()
    results = {trial.name: read(sweep, trial, directory) for trial in trials}
    todo = [trial for trial in trials if results[trial.name].state != "finished"]
    shown = progress or watch.choose()
    if todo:
        _prepare_data(sweep, todo, directory)
        directory.mkdir(parents=True, exist_ok=True)
    began = monotonic()
    with _locked(directory), _terminable():
        if todo or not judged:
            write_atomic(directory / "sweep.toml", configs.to_toml(sweep.resolved()))
            (directory / "summary.json").unlink(missing_ok=True)  # it told of an end that is not one any more
        n_workers = min(workers or max(1, kernels.get_num_threads() // sweep.config.threads), len(todo))
        shown.start(sweep, directory, results, n_workers)
        try:
            run_trials(sweep, directory, todo, n_workers, results, shown)
        except BaseException:
            n_finished = sum(result.state == "finished" for result in results.values())
            shown.end(f"stopped with {n_finished} of {len(trials)} trials finished")
            raise
        summary = _summary(sweep, results, monotonic() - began)
        written = all((directory / name).exists() for name in ("results.csv", "summary.json"))
        if todo or not judged or not written:
            write_table(sweep, directory, results)
            records.write_summary(directory, summary)
    lines = [*verdict.table(sweep, results), "", summary["verdict"], ""]
    shown.end("\n".join([*lines, f"all trials: {directory / 'results.csv'}"]))
    return summary


@contextmanager
def _terminable():
    """In this context SIGTERM is an exception, so that workers are told; theirs to keep who handle it."""

    def terminate(signum, frame):
        raise SystemExit(TERMINATED)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _prepare_data(sweep, todo, directory):
    """Tokenise and cache each text once, before workers want it; check that blocks fit it.

    Trials on a text, or with a user's file, that has changed since the others ran would not compare with
    them: an InputError. Those that failed without a checkpoint begin anew and do not count.
    """
    seen, hashes, files = [], {}, {}
    for trial in todo:
        config = sweep.trial_config(trial)
        files |= user_files(config)
        if config.task.key is not None:
            continue  # its data is its function's business
        needs = (config.data, config.model.block_size)
        if needs not in seen:
            seen.append(needs)
            hashes[config.data] = task.load_text(config).hash
    for trial in sweep.trials():
        done = trained(directory / "trials" / trial.name)
        source = sweep.trial_config(trial).data
        if done and source in hashes and done.get("data_hash") != hashes[source]:
            raise InputError(
                f"{source.source} has changed since {trial.name} was trained on it; "
                "to compare trials on the new text, choose another folder: --run.dir DIR"
            )
        for path, sha256 in (done.get("files") or {}).items():
            if files.get(path, sha256) != sha256:
                raise InputError(
                    f"{path} has changed since {trial.name} was trained with it; "
                    "to compare trials with the new one, choose another folder: --run.dir DIR"
                )


def _refuse_another(sweep, directory):
    """Raise when `directory` holds something else than this sweep; whether it was judged in the same way.

    How trials are judged may change: that trains nothing anew.
    """
    path = directory / "sweep.toml"
    if not path.exists():
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is a file; a sweep needs a new or empty folder")
        if (directory / "config.toml").exists():
            raise InputError(f"{directory} holds a run; a sweep needs a new or empty folder: --run.dir DIR")
        return True
    there, here = _flat(configs.read_toml(path)), _flat(sweep.resolved())
    judged = True
    for key in [*here, *there]:
        if there.get(key) != here.get(key) and key in ("sweep.objective", "sweep.at", "sweep.goal"):
            judged = False
        elif there.get(key) != here.get(key):
            was, is_now = (f"{text(d[key])}" if key in d else "not set" for d in (there, here))
            raise InputError(
                f"{directory} holds another sweep: {key} is {was} there and {is_now} here; "
                "choose another folder: --run.dir DIR"
            )
    return judged


def _flat(resolved):
    """A resolved sweep with one key for each value."""
    flat = {f"sweep.{key}": value for key, value in resolved["sweep"].items()}
    flat.update({f"base.{key}": value for key, value in configs.flatten(resolved["base"]).items()})
    for index, block in enumerate(resolved["space"], 1):
        flat.update({f"[[space]] {index}, {key},": value for key, value in block.items()})
    return flat


@contextmanager
def _locked(directory):
    """Hold the sweep's directory: a second process that wants it is refused. Ends with the process."""
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"another process is running the sweep in {directory}; wait for its end") from None
    finally:
        os.close(descriptor)


def _summary(sweep, results, seconds):
    """summary.json: the settings by rank, what became of the trials, the verdict."""
    states = [result.state for result in results.values()]
    return {
        "state": "finished",
        "objective": sweep.config.objective,
        "at": sweep.config.at,
        "goal": sweep.config.goal,
        "seeds": sorted(sweep.config.seeds),
        "trials": {state: states.count(state) for state in ("finished", "failed")},
        "settings": [
            {
                "setting": standing.setting,
                "values": sweep.settings[standing.setting],
                "mean": standing.mean,
                "standard_error": standing.standard_error,
                "n": len(standing.values),
                "finished": f"{len(standing.values)}/{standing.n_seeds}",
            }
            for standing in verdict.ranking(sweep, results)
        ],
        "verdict": verdict.verdict(sweep, results),
        "seconds": seconds,
    }
