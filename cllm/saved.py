"""What a run's directory holds, as a model again: to use it, to measure it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from cllm import checkpoint as checkpoints
from cllm import config as configs
from cllm import data, evaluation, metrics, userfile
from cllm import task as tasks
from cllm.data.tokenizers import digest, load_tokenizer
from cllm.errors import InputError, nearest
from cllm.gpt import GPT
from cllm.lifecycle import FILES

__all__ = ["check", "evaluate", "load", "parts"]


def load(run_dir, checkpoint="last", task=None):
    """The model, in eval mode, and the tokenizer of a run.

    Files of the user's that have changed since, or are not there from this working directory, are taken from
    the copies in the run's directory.

    Parameters
    ----------
    run_dir : path-like
    checkpoint : "last" or "best"
        The newest checkpoint, or the one with the lowest validation loss.
    task : cllm.Task, optional
        For a run whose task was given in Python: the same one again. Its model is filled and returned.

    Returns
    -------
    model : nn.Module
    tokenizer : object or None
        None for a task without one.

    Raises
    ------
    InputError
        When there is no run or no complete checkpoint, or no model that belongs to it.
    """
    _, found, _ = _loaded(Path(run_dir), checkpoint, task)
    return found.model, found.tokenizer


def evaluate(run_dir, source=None, split=None, checkpoint="last", measured=(), task=None):
    """The loss and the metrics of a run's model on whole splits, or on another text.

    Parameters
    ----------
    run_dir : path-like
    source : path-like, optional
        A text as [data] source names one, all of it, in the run's own tokens and cut as the run's text was;
        else what the run evaluates.
    split : str, optional
        One of the run's evaluations, or "train", or of its text "test"; all evaluations unless given.
    checkpoint : "last" or "best"
    measured : iterable of str
        Of `cllm.metrics.BY_NAME`, besides what [train] metrics and the task have.
    task : cllm.Task, optional
        For a run whose task was given in Python: the same one again.

    Returns
    -------
    dict of str to dict
        For each split, or for the source, "step", which is the checkpoint's, and what `cllm.evaluate` gives.

    Raises
    ------
    InputError
        When there is no such run, checkpoint, split or text.
    """
    run_dir = Path(run_dir)
    config, found, state = _loaded(run_dir, checkpoint, task)
    if source is not None:
        if split is not None or found.tokenizer is None:
            why = f"split is {split!r}" if split is not None else f"{run_dir} has no tokenizer"
            raise InputError(f"data.source is given, and {why}: leave out one")
        splits = {str(source): _whole(source, config.data, run_dir / "tokenizer.json")}
    elif config.task.build is None:
        text = tasks.load_text(config)
        if text.hash != state["data_hash"]:
            raise InputError(
                f"{config.data.source} has changed since {run_dir} was trained on it; "
                f"to measure on it as it is: cllm eval {run_dir} --data.source {config.data.source}"
            )
        splits = {name: getattr(text, name) for name in ("train", "val", "test") if len(getattr(text, name))}
        if split is None:
            splits.pop("train")
            splits.pop("test", None)  # looked at only when asked for
    else:
        splits = {name: source.dataset for name, source in {"train": found.train, **found.evals}.items()}
        if split is None:
            splits.pop("train")
    if split is not None and split not in splits:
        raise InputError(f"split is {split!r}, {run_dir} has {' and '.join(splits) or 'none'}")
    if not splits:
        raise InputError(f"{run_dir} evaluates nothing, give a text: --data.source PATH")
    names = dict.fromkeys((*config.train.metrics, *measured))
    for name in names:
        if name not in metrics.BY_NAME:
            hint = nearest(name, metrics.BY_NAME)
            raise InputError(f'metrics has "{name}"{hint}, it must be of {", ".join(metrics.BY_NAME)}')
    built = {name: metrics.build(name, found.tokenizer) for name in names} | getattr(found, "metrics", {})
    return {
        name: {"step": state["step"]}
        | evaluation.evaluate(found.model, dataset, loss=found.loss, metrics=built)
        for name, dataset in splits.items() if split in (None, name)
    }  # fmt: skip


def _whole(source, config, tokenizer):
    """All tokens of a text, cut into windows or documents as a run's [data] says."""
    cut = {"packing": config.packing, "eos": config.eos}
    if config.eos is None and Path(source).is_file():
        cut = {}  # one document, whose windows are the same
    tokens = data.load(source, tokenizer=tokenizer, val_fraction=0.0, **cut).train
    tokens.name = str(source)
    return tokens


def _loaded(run_dir, checkpoint, task):
    """The config, the task with the model of a checkpoint in eval mode, and the checkpoint's state."""
    if checkpoint not in ("last", "best"):
        raise InputError(f'checkpoint is {checkpoint!r}, it must be "last" or "best"')
    check(run_dir)
    loaded = checkpoints.load_newest(run_dir, only_best=checkpoint == "best")
    if loaded is None and not checkpoints.listed(run_dir):
        raise InputError(f"{run_dir} has no complete checkpoint yet; continue it with: cllm resume {run_dir}")
    if loaded is None:
        none = f"{run_dir} has no whole checkpoint that was the best when it was evaluated"
        raise InputError(none if checkpoint == "best" else f"all checkpoints of {run_dir} are damaged")
    arrays, _, state = loaded
    config, found = parts(run_dir, state, task)
    found.model.load_state_dict(arrays)
    found.model.eval()
    return config, found, state


def parts(run_dir, state, task=None):
    """What a run trained, from what its directory holds; the model's weights are still its first ones.

    Parameters
    ----------
    run_dir : Path
    state : dict
        Of a checkpoint or an incident.
    task : cllm.Task, optional
        For a run whose task was given in Python: the same one again.

    Returns
    -------
    config : cllm.Config
    task : cllm.Task or object with `model`, `loss` and `tokenizer`

    Raises
    ------
    InputError
        When there is no run, or its model cannot be known.
    """
    check(run_dir)
    written = configs.flatten(configs.read_toml(run_dir / "config.toml"))
    kept = userfile.kept_references(written, state.get("files", {}), run_dir / FILES)
    config = configs.load(run_dir / "config.toml", kept)
    if config.task.run is not None:
        raise InputError(
            f"{run_dir} was trained by {config.task.run}, which alone knows its model; "
            f"cllm.checkpoint.load({str(checkpoints.newest(run_dir))!r}) gives what it saved"
        )
    if task is None and config.task.build == tasks.GIVEN:
        raise InputError(f"{run_dir} was trained on a task made in Python: give it again, as task=...")
    if task is None and config.task.build is None:
        model = GPT(replace(config.model, vocab_size=state["vocab_size"]), seed=config.train.seed)
        tokenizer = load_tokenizer(run_dir / "tokenizer.json")
        if digest(tokenizer) != state.get("tokenizer", digest(tokenizer)):  # a step that went wrong has none
            raise InputError(
                f"{run_dir / 'tokenizer.json'} is damaged: it is not the tokenizer {run_dir} was trained with"
            )
        return config, SimpleNamespace(model=model, loss=None, tokenizer=tokenizer)
    return config, task or tasks.for_config(config)


def check(run_dir):
    if not (run_dir / "config.toml").exists():
        raise InputError(f"{run_dir} holds no run: it has no config.toml")
