"""The command line: `cllm COMMAND ...`, also `python -m cllm COMMAND ...`.

Each command is a parser in `_parser` and a function of its name. Config keys are options too,
`--SECTION.KEY VALUE`; they are taken out before argparse sees the rest, since which keys there are is
`config`'s business. What a user got wrong ends in one sentence on stderr and exit status 2; an exception in
a file of theirs shows their part of the traceback and ends with 1; any other is a bug of CLLM. Heavy
modules are imported by the command that needs them, so that `cllm --help` answers at once.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import numpy as np

import cllm
from cllm import parallel, userfile
from cllm.errors import InputError, nearest, plain_notes
from cllm.files import why

__all__ = ["main"]

TIMED_OUT, TERMINATED = 124, 143  # exit statuses as timeout(1) and shells have them
CONFIGURED = ("train", "resume", "sweep", "verify-resume")  # commands with config keys as options

# What `cllm quickstart --short` changes.
SHORT_SWEEP = {"base.train.max_steps": 40}
SHORT_TRAIN = {"train.max_steps": 200, "train.eval_interval": 50, "train.sample_interval": 50}


def main(argv=None):
    """Run one command.

    Parameters
    ----------
    argv : list of str, optional
        What follows `cllm`; by default the process's arguments.

    Returns
    -------
    int
        Exit status: 0, 1 for a failed run, 2 for bad input, 124 when train.max_minutes were over before the
        run was (as timeout(1) has it), 130 after Ctrl-C, 141 when the reader of the output has gone, 143
        after SIGTERM.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a model may write what a terminal's encoding lacks: ? then
        sys.stdout.reconfigure(errors="replace")
    try:
        with plain_notes():
            status = _dispatch(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # `cllm info | head -1`: what is still buffered must not fail a second time at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except SystemExit as stopped:
        if stopped.code != TERMINATED:
            raise
        return _complain("stopped by SIGTERM", TERMINATED)
    except Exception as error:
        theirs = userfile.own_traceback(error)
        if theirs is not None:
            print(theirs, end="", file=sys.stderr)
            return 1
        if isinstance(error, InputError):
            return _complain(error, 2)
        if isinstance(error, OSError):
            return _complain(why(error), 2)
        raise


def _complain(message, status):
    print("cllm:", " ".join(str(message).split()), file=sys.stderr)
    return status


def _dispatch(argv):
    overrides = {}
    if argv and argv[0] in CONFIGURED:
        with parallel.here().agreeing():
            rest, overrides = _split_overrides(argv[1:])
        argv = [argv[0], *rest]
    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as done:  # after --help or --version
        return done.code or 0
    if options.command is None:
        parser.print_help()
        return 0
    options.overrides = overrides
    return options.run(options) or 0


# Options ---------------------------------------------------------------------------------------------

_OVERRIDE = re.compile(r"--([A-Za-z][\w-]*(?:\.[\w-]+)+)(?:=(.*))?", re.DOTALL)


def _split_overrides(argv):
    """Take `--section.key value`, `--section.key=value`, `--section.[no-]flag` out of `argv`.

    Returns
    -------
    rest : list of str
        What argparse is to read.
    overrides : dict
        Dotted key, with underscores, to parsed value; the last of several wins.
    """
    from cllm import config

    flags = {key for key, words, _ in config.describe() if words == "true or false"} | _task_flags(argv)
    rest, overrides = [], {}
    argv = list(argv)
    while argv:
        match = _OVERRIDE.fullmatch(argv[0])
        if match is None:
            rest.append(argv.pop(0))
            continue
        option = argv.pop(0)
        name, text = match[1].replace("-", "_"), match[2]
        key = name.removeprefix("base.")
        section, _, last = key.rpartition(".")
        if last.startswith("no_") and f"{section}.{last[3:]}" in flags:
            if text is not None:
                raise InputError(f"{option}: an option with no- takes no value")
            overrides[name[: -len(last)] + last[3:]] = False
        elif text is None and key in flags and (not argv or argv[0] not in ("true", "false")):
            overrides[name] = True
        elif text is None and (not argv or argv[0].startswith("--")):
            raise InputError(f"{option} needs a value: {option} VALUE")
        else:
            overrides[name] = config.parse_value(argv.pop(0) if text is None else text, key)
    return rest, overrides


def _task_flags(argv):
    """The keys of [task] that are true or false in the function which `argv` or its config file names."""
    from cllm import config

    options = [match for match in map(_OVERRIDE.fullmatch, argv) if match]
    if not any(match[1].removeprefix("base.").startswith("task.") for match in options):
        return set()
    places = []  # [task] sections: the last one that names a function counts
    # What is wrong with a file is told when it is read in earnest.
    with suppress(InputError, OSError, AttributeError, TypeError):
        for path in [Path(word) for word in argv if word.endswith(".toml") and Path(word).is_file()]:
            nested = config.read_toml(path)
            base = nested.get("sweep", {}).get("base")
            files = [(path.parent / base, config.read_toml(path.parent / base))] if base else []
            for file, sections in [*files, (path, nested), (path, nested.get("base", {}))]:
                config.beside(sections, file)
                places.append(dict(sections.get("task", {}).items()))
    for word, value in zip(argv, [*argv[1:], ""]):
        if match := _OVERRIDE.fullmatch(word):
            section, _, name = match[1].removeprefix("base.").partition(".")
            if section == "task" and name in ("build", "run"):
                places.append({name: value if match[2] is None else match[2]})
    named = [(key, place[key]) for place in places for key in ("build", "run") if key in place]
    with suppress(InputError):
        return config.task_flags(*named[-1]) if named else set()
    return set()


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputErrors and whose help may end in a computed table."""

    def __init__(self, *, table=None, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.table = table

    def format_help(self):
        return super().format_help() + ("" if self.table is None else self.table())

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = options.parser if options.command else self
            name = unknown[0].partition("=")[0]
            kind = "option" if name.startswith("-") else "argument"
            hint = nearest(name, [flag for flag in parser._option_string_actions if flag.startswith("--")])
            hint = _key_hint(name, options.command) or hint
            raise InputError(f"unknown {kind} {name}{hint}; see {parser.prog} --help")
        return options

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            kind = "command" if action.dest == "command" else action.metavar or action.dest
            allowed = ", ".join(map(str, action.choices))
            raise InputError(f"unknown {kind} {value!r}{nearest(value, action.choices)}; allowed: {allowed}")


def _key_hint(name, command):
    """A hint at the config key whose last part an option is, as --lr is of --optim.lr; or ""."""
    from cllm import config

    if command not in CONFIGURED or not name.startswith("--"):
        return ""
    last = name[2:].replace("-", "_").removeprefix("no_")
    keys = [key for key, _, _ in config.describe() if key.partition(".")[2] == last]
    prefix = "base." if command == "sweep" else ""
    options = [f'"--{prefix}{key}"'.replace("_", "-") for key in keys]
    return f" (did you mean {' or '.join(options)}?)" if options else ""


def _parser():
    parser = _Parser(
        prog="cllm",
        description="Train small language models on this CPU, sweep over settings and seeds, draw figures.",
        epilog="example:\n  cllm quickstart\n\n`cllm COMMAND --help` says more, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"cllm {cllm.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(run, help, description, *examples, **options):
        name = run.__name__.removeprefix("_").replace("_", "-")
        epilog = "\n".join(["examples:" if len(examples) > 1 else "example:", *(f"  {e}" for e in examples)])
        sub = commands.add_parser(
            name, help=help, description=textwrap.fill(description, 100), epilog=epilog, **options
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = command(
        _quickstart,
        "sweep, plot, train and sample on built-in text, in a few minutes",
        "Sweep a tiny GPT over learning rates and seeds, draw the result, train a small GPT, let it write. "
        "Files go to runs/. A second call reuses what is there.",
        "cllm quickstart",
    )
    sub.add_argument("--short", action="store_true", help="far fewer steps, to check that everything works")

    sub = command(
        _train,
        "train a model",
        "Train a GPT as a TOML file and options say; without either, a small GPT on the built-in text. "
        "The run goes to --run.dir, by default runs/CONFIG-N. [task] names a task of your own.",
        "cllm train",
        "cllm train char.toml --optim.lr 3e-3 --model.n-layer 6 --model.no-bias --run.dir runs/deeper",
        usage="cllm train [CONFIG.toml] [--SECTION.KEY VALUE ...]",
        table=_config_table,
    )
    sub.add_argument("config", metavar="CONFIG.toml", nargs="?", help="a run's configuration")

    sub = command(
        _resume,
        "go on with a run that was stopped",
        "Go on from a run's newest complete checkpoint, to the same weights as if it had never stopped. "
        "A finished run is left as it is; --train.max-steps extends it, where the schedule would have had "
        "the same learning rates so far, as constant, inverse_sqrt and, before its decay, wsd have. "
        "Intervals, limits and threads may change, and all of [guard] and [monitor].",
        "cllm resume runs/char",
        "cllm resume runs/char --train.max-steps 4000",
        "cllm resume runs/char --guard.policy skip",
        usage="cllm resume RUN [--train.KEY VALUE ...] [--guard.KEY VALUE ...] [--monitor.KEY VALUE ...]",
    )
    sub.add_argument("directory", metavar="RUN", help="a run's directory")

    sub = command(
        _sweep,
        "train many settings, each with several seeds, and compare them",
        "Run the trials of a sweep file and end in results.csv and a verdict. Running it again continues it; "
        "values, seeds and steps may be added. Any key of the sweep's base is an option: "
        "--base.SECTION.KEY VALUE. With --scheduler the workers of a Dask cluster train the trials, over "
        "folders that they share with this machine.",
        "cllm sweep experiments/lr_sweep.toml",
        "cllm sweep experiments/lr_sweep.toml --workers 2 --base.train.max-steps 100 --run.dir runs/trial",
        usage="cllm sweep SWEEP.toml [--dry-run] [--workers N | --scheduler tcp://HOST:PORT [--same-isa]]\n"
        "       [--run.dir DIR] [--base.SECTION.KEY X ...]",
    )
    sub.add_argument("file", metavar="SWEEP.toml", help="a sweep's configuration")
    sub.add_argument("--run.dir", dest="directory", metavar="DIR", help="the sweep's directory")
    sub.add_argument("--workers", type=_whole(1), metavar="N", help="trials at once (cores // threads)")
    sub.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="run the trials on a Dask cluster")
    sub.add_argument(
        "--same-isa", action="store_true", help="there, only on workers of one instruction set (any, marked)"
    )
    sub.add_argument("--dry-run", action="store_true", help="list the trials, estimate time and memory")

    sub = command(
        _status,
        "say how far a sweep is",
        "Tell from a sweep's files how far it is, which trials run, what is best so far; from any shell, "
        "while it runs or afterwards.",
        "cllm status runs/lr_sweep",
        "watch cllm status runs/lr_sweep",
    )
    sub.add_argument("directory", metavar="SWEEP", help="a sweep's directory")

    sub = command(
        _plot,
        "draw the figures of runs or sweeps",
        "Draw loss curves, and for a sweep what suits it: its objective against what it varied, heat maps, "
        "differences from the best, and so on, as PNG and SVG.",
        "cllm plot runs/char",
        "cllm plot runs/lr_sweep --out figures",
    )
    sub.add_argument("paths", metavar="RUN_OR_SWEEP", nargs="+", help="directories of runs or sweeps")
    sub.add_argument("--out", metavar="DIR", help="where the files go (figures/ inside each directory)")

    sub = command(
        _report,
        "write a sweep's report, one HTML file",
        "Write all that there is to say of a sweep into one HTML file, which needs no network: verdict, "
        "settings, figures, and for each trial the command that reproduces it.",
        "cllm report runs/lr_sweep",
        "cllm report runs/lr_sweep --out lr_sweep.html",
    )
    sub.add_argument("directory", metavar="SWEEP", help="a sweep's directory")
    sub.add_argument("--out", metavar="FILE", help="the HTML file (report.html inside the directory)")

    sub = command(
        _sample,
        "let a trained model write",
        "Continue a prompt with a run's model.",
        'cllm sample runs/char --prompt "def " --max-new-tokens 300 --temperature 0.8',
    )
    sub.add_argument("directory", metavar="RUN", help="a run's directory")
    sub.add_argument("--prompt", default="\n", metavar="TEXT", help="text to continue (a line break)")
    sub.add_argument("--max-new-tokens", type=_whole(1), default=200, metavar="N", help="how many (200)")
    sub.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: the likeliest (1.0)")
    sub.add_argument("--top-k", type=_whole(1), metavar="K", help="choose among the K likeliest (all)")
    sub.add_argument("--seed", type=_whole(0), default=0, metavar="S", help="another seed, another text (0)")
    sub.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which weights (last)")

    sub = command(
        _eval,
        "measure a trained model",
        "Print the loss and the metrics of a run's model on all of its evaluations, as a rule its validation "
        "split, on another split or another text.",
        "cllm eval runs/char --split test --metrics accuracy,bits_per_byte",
        "cllm eval runs/char --data.source notes.txt --checkpoint best",
    )
    sub.add_argument("directory", metavar="RUN", help="a run's directory")
    sub.add_argument("--data.source", dest="source", metavar="PATH", help="a text, in the run's tokens")
    sub.add_argument(
        "--split", metavar="NAME", help="train, val, test or an evaluation's name (all evaluations)"
    )
    sub.add_argument("--metrics", metavar="A,B", help="besides those of the run's config")
    sub.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which weights (last)")

    sub = command(
        _replay,
        "run a step that went wrong again, in float64 too",
        "Say which layer went wrong first in a step that [guard] kept, because its loss or gradient was not "
        "finite, or its loss a spike.",
        "cllm replay runs/char",
    )
    sub.add_argument("directory", metavar="RUN", help="a run's directory")
    sub.add_argument("--step", type=_whole(1), metavar="N", help="which one (the last)")

    sub = command(
        _inspect,
        "say what a run's checkpoints hold",
        "List a run's checkpoints, each verified by its SHA-256, and what one of them holds: losses, "
        "position, versions, optimizer, arrays by name. The exit status is 1 when one of them is damaged.",
        "cllm inspect runs/char",
        "cllm inspect runs/char --checkpoint best",
    )
    sub.add_argument("directory", metavar="RUN", help="a run's directory")
    sub.add_argument(
        "--checkpoint", type=_checkpoint, default="last", metavar="last|best|STEP", help="which one (last)"
    )

    sub = command(
        _verify_resume,
        "kill and resume a short run of a configuration, and compare the bits",
        "Train a few steps without a stop; train them again with two kills (SIGKILL), each in a process of "
        "its own; compare weights, optimizer and records. The exit status is 0 when all bits agree, else 1.",
        "cllm verify-resume char.toml",
        "cllm verify-resume char.toml --model.n-layer 2 --steps 9",
        usage="cllm verify-resume CONFIG.toml [--steps N] [--minutes X] [--SECTION.KEY VALUE ...]",
    )
    sub.add_argument("config", metavar="CONFIG.toml", help="a run's configuration")
    sub.add_argument("--steps", type=_whole(3), default=20, metavar="N", help="steps of the short run (20)")
    sub.add_argument("--minutes", type=_minutes, default=10.0, metavar="X", help="at most so long (10)")

    command(
        _info,
        "versions, instruction set, threads, cache folder",
        "Say what CLLM found on this machine.",
        "cllm info",
    )

    sub = command(
        _bench,
        "how fast CLLM is here, beside torch if wanted",
        "Time training steps and kernels beside NumPy or torch and against this machine's limits; measure "
        "memory, imports and growth. Rows are printed as they come; records and figures go to --out.",
        "cllm bench --against torch",
        "cllm bench --only step,gemm --sizes tiny,char --threads 1",
    )
    sub.add_argument("--against", choices=("torch",), metavar="torch", help="take turns with torch")
    sub.add_argument(
        "--only", metavar="GROUPS",
        help="with commas between: ceilings, step, gemm, attention, gelu, ffn, optimizer, loss, norm, "
        "import, memory, sweep, growth (all)",
    )  # fmt: skip
    sub.add_argument("--sizes", metavar="NAMES", help="tiny, char, baby, story, gpt2, likewise (all)")
    sub.add_argument("--threads", type=_whole(1), metavar="N", help="threads of all sides (steps: 1 and all)")
    sub.add_argument("--rounds", type=_whole(1), metavar="N", help="turns of each side (7; steps: 5)")
    sub.add_argument("--quick", action="store_true", help="few rounds, and without what takes long")
    sub.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    sub.add_argument("--out", default="runs/bench", metavar="DIR", help="where files go (runs/bench)")
    return parser


def _whole(least):
    """An argparse type: a whole number, at least `least`."""

    def whole(text):
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole


def _checkpoint(text):
    """An argparse type: last, best, or a step."""
    if text not in ("last", "best") and not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not last, best or a step")
    return text if text in ("last", "best") else int(text)


def _minutes(text):
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _config_table():
    """Each config key as an option with its default and what it may be."""
    from cllm import config

    lines = ["", "config keys, in CONFIG.toml's sections or as options (n-layer is n_layer):"]
    section = None
    for key, words, default in config.describe():
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append(f"  [{section}]")
        shown = "" if default is None else config.to_toml({"x": default}).partition(" = ")[2].strip()
        head = f"    --{key.replace('_', '-'):33} {shown:16} "
        lines += textwrap.wrap(words, 108, initial_indent=head, subsequent_indent=" " * len(head))
        if key == "task.run":
            lines.append("    --task.KEY".ljust(len(head)) + "an argument of that function")
    return "\n".join(lines) + "\n"


# Commands --------------------------------------------------------------------------------------------


def _train(options):
    from cllm import config, train

    name = {"name": Path(options.config).stem} if options.config else {}
    units = parallel.here()
    with units.agreeing():
        wanted = config.load(options.config, options.overrides)
    for note in config.notes(wanted) if units.rank == 0 else ():
        print(f"cllm: note: {note}", file=sys.stderr)
    return _exit_status(train.Trainer(wanted, **name).fit())


def _resume(options):
    summary, was_finished = _resumed(options.directory, options.overrides)
    if was_finished:
        longer = f"{shlex.quote(options.directory)} --train.max-steps {2 * summary['step']}"
        print(
            f"{options.directory} is finished after {summary['step']} steps and left as it is; to go on, "
            f"where the schedule allows that: {_command()} resume {longer}"
        )
    return _exit_status(summary)


def _exit_status(summary):
    """The exit status of a run: 1 when it failed, such as by a loss that is no longer finite."""
    return {"finished": 0, "interrupted": TIMED_OUT}.get(summary["state"], 1)


def _sweep(options):
    from cllm import sweep

    units = parallel.here()
    with units.agreeing():
        if units.size > 1:
            raise InputError(
                f"mpirun started {units.size} processes of cllm sweep, which starts its own: --workers N"
            )
    directory = options.overrides.pop("run.dir", None) or Path("runs", Path(options.file).stem)
    plan = sweep.Sweep.load(options.file, options.overrides)
    if options.dry_run:
        if options.scheduler:
            raise InputError("--dry-run estimates for this machine alone: leave out --scheduler")
        print("\n".join(sweep.forecast(plan, Path(directory), options.workers)))
        return 0
    try:
        summary = sweep.run(
            plan, directory, workers=options.workers, scheduler=options.scheduler, same_isa=options.same_isa
        )
    except KeyboardInterrupt:
        return _complain("interrupted; the same command again continues the sweep", 130)
    return 0 if summary["trials"]["finished"] else 1


def _status(options):
    from cllm import status

    print("\n".join(status.lines(options.directory)))
    return 0


def _plot(options):
    from cllm import figures

    for path in options.paths:
        out = options.out
        if out is not None and len(options.paths) > 1:  # same file names: a folder for each
            out = Path(out, Path(path).resolve().name)
        for written in figures.for_directory(path, out=out):
            print(written)
    return 0


def _report(options):
    from cllm import report

    print(report.write(options.directory, options.out))
    return 0


def _sample(options):
    from cllm import saved

    model, tokenizer = saved.load(options.directory, checkpoint=options.checkpoint)
    if tokenizer is None:
        raise InputError(f"{options.directory} has no tokenizer, so it has no text to continue")
    text = _continued(
        model, tokenizer, options.prompt, options.max_new_tokens,
        temperature=options.temperature, top_k=options.top_k, seed=options.seed,
    )  # fmt: skip
    print(text)
    return 0


def _eval(options):
    from cllm import saved

    found = saved.evaluate(
        options.directory, options.source, options.split, options.checkpoint, options.metrics.split(",")
        if options.metrics else (),
    )  # fmt: skip
    for split, values in found.items():
        step = values.pop("step")
        shown = ", ".join(f"{name} {_number(value)}" for name, value in values.items())
        print(f"step {step}: {split} {shown}")
    return 0


def _number(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _replay(options):
    from cllm.replay import replay

    for line in replay(options.directory, options.step).lines():
        print(line)
    return 0


def _continued(model, tokenizer, prompt, max_new_tokens, **choice):
    """The prompt and what the model writes after it, as text."""
    from cllm.generate import generate

    if not prompt:
        raise InputError("the prompt is empty, it must have at least one character")
    given = tokenizer.encode(prompt)
    if not len(given):  # white space where token ids are wanted
        raise InputError(f"the prompt {prompt!r} has no token, it must have at least one")
    tokens = generate(model, given[None], max_new_tokens, **choice)
    return tokenizer.decode(tokens[0])


def _inspect(options):
    from cllm import contents

    lines, intact = contents.lines(options.directory, options.checkpoint)
    print("\n".join(lines))
    return 0 if intact else 1


def _verify_resume(options):
    from functools import partial

    from cllm import config, verify

    wanted = config.load(options.config, options.overrides)
    say = partial(print, flush=True)
    return 0 if verify.resume_is_exact(wanted, options.steps, options.minutes, say) else 1


def _info(options):
    from cllm import bench, kernels

    print(f"cllm {cllm.__version__}")
    isas = [f"{isa} (in use)" if isa == kernels.isa else isa for isa in kernels.available_isas]
    rows = [
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("NumPy", np.__version__),
        ("CPU", bench.cpu_model()),
        ("instruction sets", ", ".join(isas)),
        ("OpenMP", "yes" if kernels.openmp else "no: the kernels run serially"),
        ("threads", cllm.get_num_threads()),
        ("cache", _cache_folder()),
    ]
    for label, text in rows:
        print(f"{label:17} {text}")
    return 0


def _cache_folder():
    from cllm.data import cache

    try:
        return cache.folder()
    except OSError as error:
        return f"none, since {error}: set CLLM_CACHE"


def _bench(options):
    from cllm import bench

    only, sizes = (text and text.split(",") for text in (options.only, options.sizes))
    try:
        bench.run(
            only, sizes, against=options.against, threads=options.threads, out=options.out,
            quick=options.quick, compile=not options.no_compile, rounds=options.rounds,
        )  # fmt: skip
    except KeyboardInterrupt:
        return _complain(f"interrupted; the rows measured so far are in {options.out}", 130)
    return 0


# Quickstart ------------------------------------------------------------------------------------------


def _quickstart(options):
    from cllm import config, figures, sweep, train

    folder = Path(cllm.__file__).resolve().parents[1] / "experiments"
    sweep_file, train_file = folder / "quickstart_sweep.toml", folder / "quickstart_train.toml"
    if not (sweep_file.is_file() and train_file.is_file()):
        raise InputError(
            "quickstart needs the experiments folder of CLLM's repository: run `make quickstart` in a clone"
        )
    name = "quickstart-short" if options.short else "quickstart"
    plan = sweep.Sweep.load(sweep_file, SHORT_SWEEP if options.short else {})
    sweep_directory, run_directory = Path("runs", f"{name}-sweep"), Path("runs", f"{name}-train")
    settings = {**(SHORT_TRAIN if options.short else {}), "run.dir": str(run_directory)}
    settings = config.load(train_file, settings)
    rates, seeds, training = len(plan.settings), len(plan.config.seeds), settings.train
    print(
        f"""CLLM quickstart, {"under a minute" if options.short else "about three minutes"} on two cores:
  1. sweep a tiny GPT over {rates} learning rates with {seeds} seeds each, on Python's own library
  2. draw the result
  3. train a larger GPT for {training.max_steps} steps, with a generated line every {training.sample_interval}
  4. let it write
Files go to {Path("runs").resolve()}; what is finished there is reused."""
    )
    command = _command()
    try:
        _heading(1, f"sweep: {_shown_path(sweep_file)}")
        try:
            sweep.run(plan, sweep_directory)
        except InputError as error:
            if not sweep_directory.exists():
                raise
            raise InputError(f"{error}; or delete {sweep_directory} and start quickstart afresh") from None

        _heading(2, "figures")
        for path in figures.for_directory(sweep_directory):
            print(path)

        _heading(3, f"train: {_shown_path(train_file)}")
        if (run_directory / "config.toml").is_file():
            summary, was_finished = _resumed(run_directory)
            if was_finished:
                print(f"{run_directory} is finished already and reused: val loss {summary['val_loss']:.4f}")
        else:
            summary = train.Trainer(settings).fit()
    except KeyboardInterrupt:
        again = f"{command} quickstart{' --short' if options.short else ''}"
        return _complain(f"interrupted; the same command goes on where this stopped: {again}", 130)
    if status := _exit_status(summary):
        return status

    _heading(4, "sample")
    model, tokenizer = cllm.load(run_directory)
    print(_continued(model, tokenizer, "def ", 300, temperature=0.8))
    print(
        f"""
Next, to copy:
  {command} sample {run_directory} --prompt "class " --max-new-tokens 500 --temperature 0.7
  {command} train --data.source README.md --model.n-layer 2 --train.max-steps 500
  {command} sweep {_shown_path(sweep_file)} --base.model.n-layer 1 --run.dir runs/one-layer"""
    )
    return 0


def _resumed(directory, overrides=None):
    """The summary of a run after going on with it, and whether it was finished and left as it was."""
    from cllm import train

    path = Path(directory, "summary.json")
    before = json.loads(path.read_bytes()) if path.is_file() else None
    summary = train.resume(directory, overrides)
    return summary, summary == before


def _heading(number, text):
    print(f"\n{number}. {text}", flush=True)


def _shown_path(path):
    """A path as short as it can be written from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _command():
    """How this shell can call CLLM: by name when that finds it, else by path."""
    script = Path(sys.executable).with_name("cllm")
    found = shutil.which("cllm")
    if found and script.exists() and os.path.samefile(found, script):
        return "cllm"
    return shlex.quote(_shown_path(script)) if script.exists() else f"{shlex.quote(sys.executable)} -m cllm"
