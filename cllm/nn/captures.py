"""Looking inside a model while it runs."""

from contextlib import contextmanager
from fnmatch import fnmatchcase

import numpy as np

from cllm.errors import InputError, nearest
from cllm.nn.module import Module
from cllm.tensor import Tensor


@contextmanager
def capture(model, *patterns):
    """The values that modules compute, while this context is open.

    ::

        with cllm.capture(model, "h.*.attn.weights", "ln_f") as seen:
            model(tokens)
        seen["h.0.attn.weights"]      # (B, H, T, T)

    Parameters
    ----------
    model : Module
    *patterns : str
        A module's dotted name for its output, or that name and the name of a value that it offers by
        `Module.observe`: attention offers "weights" (before dropout), feed-forward layers "hidden". The
        leading parts of a name may be left out; ``*``, ``?`` and ``[..]`` stand for letters within one part.

    Yields
    ------
    dict
        Name -> array, a copy. A name is as long as its pattern: "h.*.attn.weights" gives "h.0.attn.weights"
        and so on. Each forward pass overwrites what the last one left; of a module that returns a tuple, the
        first entry counts.

    Raises
    ------
    InputError
        On entry, when a pattern fits no module, or gives two modules one name. On leaving, when the model ran
        and a pattern met nothing.

    Notes
    -----
    What is computed stays the same to rounding, but captured attention weights and captured parts of a
    feed-forward layer leave the fused operations, so that it takes longer and more memory.
    """
    watch = _Capture(model, patterns)
    with watching(model, watch):
        yield watch.seen
    watch.check()


@contextmanager
def watching(model, watch):
    """Within this context an object is told of what a model's modules compute.

    Parameters
    ----------
    model : Module
    watch : object
        ``output(module, value, given)`` comes after each module's forward, `given` being its arguments;
        ``offer(module, name, value)`` comes with what it observes; ``wants(module, name)`` says whether that
        is asked for, None being the output: what is asked for leaves the fused operations.
    """
    modules = list(model.modules())
    for module in modules:
        module._captures = (*module._captures, watch)
    try:
        yield
    finally:
        for module in modules:
            module._captures = tuple(other for other in module._captures if other is not watch)


class _Capture:
    """One open `capture`: which names it asks for, and what it has seen."""

    def __init__(self, model, patterns):
        if not isinstance(model, Module):
            raise InputError(f"capture: model is a {type(model).__name__}, it must be a Module")
        if not patterns:
            raise InputError("capture: there is no pattern, at least one must be given")
        self.seen = {}
        self.ran = False
        self.met = set()  # patterns that have met a value
        self.asked = {}  # id of a module -> [(pattern, last part or None for the output, head of the key)]
        self.offered = {}  # id of a module -> names that it can offer, as far as it has run
        names = {id(module): name for name, module in model.named_modules()}
        for pattern in dict.fromkeys(patterns):
            if not isinstance(pattern, str) or not pattern:
                raise InputError(f"capture: a pattern is {pattern!r}, it must be a dotted name")
            self._ask(pattern, names)

    def _ask(self, pattern, names):
        *head, last = pattern.split(".")
        found = {}  # (part or None, key) -> name of the module
        for module, name in names.items():
            parts = name.split(".") if name else []
            for wanted, part in (([*head, last], None), (head, last)):
                tail = parts[len(parts) - len(wanted) :]
                # Without a head, the values that the model itself offers are meant, not those of all modules.
                if len(tail) == len(wanted) and (wanted or not parts) and all(map(fnmatchcase, tail, wanted)):
                    key = ".".join(tail)
                    if found.setdefault((part, key), name) != name:
                        raise InputError(
                            f'capture: "{pattern}" fits {found[part, key]} and {name} with one name, '
                            f'"{key}"; write more of it, with * for the part that differs'
                        )
                    self.asked.setdefault(module, []).append((pattern, part, key))
        if not found:
            tails = dict.fromkeys(".".join(name.split(".")[-1 - len(head) :]) for name in names.values())
            raise InputError(f'capture: "{pattern}" fits no module{nearest(pattern, tails)}')

    def wants(self, module, name):
        self.offered.setdefault(id(module), set()).add(name)
        return any(
            part is None if name is None else part is not None and fnmatchcase(name, part)
            for _, part, _ in self.asked.get(id(module), ())
        )

    def output(self, module, value, given):
        self.ran = True
        for pattern, part, key in self.asked.get(id(module), ()):
            if part is None:
                self._keep(pattern, key, value[0] if isinstance(value, tuple) else value)

    def offer(self, module, name, value):
        self.offered.setdefault(id(module), set()).add(name)
        for pattern, part, key in self.asked.get(id(module), ()):
            if part is not None and fnmatchcase(name, part):
                self._keep(pattern, f"{key}.{name}" if key else name, value)

    def _keep(self, pattern, key, value):
        self.met.add(pattern)
        self.seen[key] = np.array(value.data if isinstance(value, Tensor) else value)

    def check(self):
        """Raise when the model ran and a pattern has met nothing."""
        for pattern in {pattern: None for asked in self.asked.values() for pattern, _, _ in asked}:
            if self.ran and pattern not in self.met:
                offered = {
                    name
                    for module, asked in self.asked.items()
                    if any(p == pattern and part is not None for p, part, _ in asked)
                    for name in self.offered.get(module, ()) if name is not None
                }  # fmt: skip
                last = pattern.rpartition(".")[2]
                there = f"; there is {', '.join(sorted(offered))}" if offered else ""
                raise InputError(
                    f'capture: nothing has been seen for "{pattern}"{nearest(last, offered) or there}'
                )
