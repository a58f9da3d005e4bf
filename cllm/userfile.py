"""Things of a user's own, named in a configuration as ``"path/to/file.py:name"``.

`[task] build`, `[task] run`, `[optim] name` and `[model] attention` take such names. The path is relative
to the working directory; where it does not exist from there, a config file's is relative to that file's
folder, and becomes the path as seen from the working directory. Each run runs a file afresh, and once: two
names in one file share its module, and what one run leaves in its variables does not reach the next. Modules
beside the file can be imported from it; those are Python's, and stay.

What a user's file raises comes through as it is: it is their code, and their traceback helps most.
"""

import hashlib
import sys
import traceback
import types
from pathlib import Path

from cllm.errors import InputError, nearest
from cllm.files import clear_temporary, write_atomic

__all__ = [
    "beside", "digest", "digests", "forget", "is_reference", "keep", "load", "own_traceback",
    "refuse_changed",
]  # fmt: skip

_MODULES = {}  # (resolved path, sha256) -> module
_RUN = set()  # paths of the files that were run, as they were written
_EXAMPLE = {"task.build": "build", "task.run": "train", "model.attention": "MyAttention"}


def is_reference(text):
    """Whether `text` names something in a user's file, as "my.py:SignSGD" does."""
    return isinstance(text, str) and ".py:" in text


def load(reference, what):
    """The object that ``"file.py:name"`` stands for; the file is run when its content is new, or forgotten.

    Parameters
    ----------
    reference : str
    what : str
        What the reference was given for, with which errors begin: a key such as "task.build".

    Raises
    ------
    InputError
        When the reference has another form, or there is no such file or name in it.
    Exception
        Whatever the file itself raises.
    """
    path, name = _parts(reference, what)
    module = _module(path, _read(path, what))
    if name not in vars(module):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise InputError(f"{what} is {reference!r}, but {path} has no {name}{nearest(name, public)}")
    return getattr(module, name)


def beside(reference, what, config_file):
    """A config file's reference as one that holds in the working directory.

    The path stays when it exists from there; else it becomes that of the file beside the config file.

    Raises
    ------
    InputError
        When there is no such file in either place.
    """
    path, name = _parts(reference, what)
    there = Path(config_file).parent / path
    if path.exists() or path == there:
        return reference
    if not there.exists():
        raise InputError(
            f"{what} names {path}, which is neither in the working directory, {Path.cwd()}, nor beside "
            f"{config_file}"
        )
    if there.is_absolute() and there.is_relative_to(Path.cwd()):
        there = there.relative_to(Path.cwd())
    return f"{there}:{name}"


def forget():
    """Let each file be run afresh when something of it is next asked for."""
    _MODULES.clear()


def digest(reference, what):
    """The SHA-256 of the file that ``"file.py:name"`` names, as hexadecimal digits.

    It covers this one file, not what the file imports. Raises as `load` does, but runs nothing.
    """
    path, _ = _parts(reference, what)
    return hashlib.sha256(_read(path, what)).hexdigest()


def digests(references):
    """The SHA-256 of each file that {what: reference} name: {path as written: hexadecimal digits}."""
    return {str(_parts(name, what)[0]): digest(name, what) for what, name in references.items()}


def keep(files, folder):
    """Copy files into `folder`, so that the versions of `digests` can be put back; other copies go.

    Nobody else may be writing there.
    """
    for path, sha256 in files.items():
        folder.mkdir(exist_ok=True)
        write_atomic(folder / _kept_name(path, sha256), Path(path).read_bytes())
    wanted = {_kept_name(path, sha256) for path, sha256 in files.items()}
    for path in folder.glob("*.py"):
        if path.name not in wanted:
            path.unlink()
    if folder.is_dir():
        clear_temporary(folder)


def refuse_changed(files, folder, run_dir):
    """Raise when a file is no longer as `digests` found it for a run; `folder` holds the kept copies.

    Raises
    ------
    InputError
        Says how to go on.
    """
    for path, sha256 in files.items():
        kept = folder / _kept_name(path, sha256)
        try:
            source = Path(path).read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}, with which {run_dir} was trained, cannot be read ({error.strerror}) from the "
                f"working directory, {Path.cwd()}; go on in the one it was trained in, "
                f"or put back what is kept in {kept}"
            ) from None
        if hashlib.sha256(source).hexdigest() != sha256:
            raise InputError(
                f"{path} has changed since {run_dir} was trained with it; put back the version that is kept "
                f"in {kept}, or start a new run"
            )


def kept_references(flat, files, folder):
    """The references of a configuration whose file has changed or is not there, to the copies kept of them.

    Parameters
    ----------
    flat : dict
        A configuration with dotted keys.
    files : dict
        As `digests` gave it for the run.
    folder : Path
        Where `keep` put the copies.

    Returns
    -------
    dict
        Dotted keys to references.
    """
    found = {}
    for key, value in flat.items():
        if not is_reference(value):
            continue
        path, name = _parts(value, key)
        sha256 = files.get(str(path))
        if sha256 and not (path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256):
            found[key] = f"{folder / _kept_name(path, sha256)}:{name}"
    return found


def _kept_name(path, sha256):
    return f"{Path(path).stem}-{sha256[:8]}.py"


def own_traceback(error):
    """The traceback of an exception from the first line in a user's file on, as text; None without such.

    Without such, too, when the file itself raised an InputError: that is meant to be read as a sentence.
    """
    if isinstance(error, SyntaxError) and error.filename in _RUN:
        return "".join(traceback.format_exception_only(error))
    place = error.__traceback__
    while place and place.tb_frame.f_code.co_filename not in _RUN:
        place = place.tb_next
    if place is None:
        return None
    last = place
    while last.tb_next:
        last = last.tb_next
    if isinstance(error, InputError) and last.tb_frame.f_code.co_filename in _RUN:
        return None
    return "".join(traceback.format_exception(type(error), error, place))


def _parts(reference, what):
    path, colon, name = str(reference).rpartition(":")
    if not (colon and path.endswith(".py") and name.isidentifier()):
        example = _EXAMPLE.get(what, "MyClass")
        raise InputError(f"{what} is {reference!r}, it must be FILE.py:NAME, such as my.py:{example}")
    return Path(path), name


def _read(path, what):
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{what} names {path}, which cannot be read ({error.strerror}); "
            f"paths are relative to the working directory, {Path.cwd()}"
        ) from None


def _module(path, source):
    key = (path.resolve(), hashlib.sha256(source).hexdigest())
    if key not in _MODULES:
        folder = str(key[0].parent)
        if folder not in sys.path:
            sys.path.append(folder)  # last: a neighbour must not hide an installed package
        name = f"cllm_user_{path.stem}_{key[1][:12]}"
        module = types.ModuleType(name)
        module.__file__ = str(path)
        sys.modules[name] = module  # dataclasses and pickle look a class's module up here
        _RUN.add(str(path))
        try:
            exec(compile(source, str(path), "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
        _MODULES[key] = module
    return _MODULES[key]
