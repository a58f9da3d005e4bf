"""What users are told: the one exception of CLLM's own, suggestions for mistyped names, notes."""

import difflib
import sys
import warnings
from contextlib import contextmanager

__all__ = ["InputError", "nearest", "plain_notes"]


class InputError(ValueError):
    """An input that CLLM cannot use; the message is one sentence: what was wrong, what is allowed."""


def nearest(word, allowed):
    """The known name closest to `word` as ``' (did you mean "x"?)'``, or ``''`` when none is close."""
    close = difflib.get_close_matches(str(word), [str(name) for name in allowed], n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


@contextmanager
def plain_notes():
    """In this context a UserWarning is one line on stderr, without the place in the code that gave it."""

    def show(message, category, *place):
        if issubclass(category, UserWarning):
            print("cllm: note:", " ".join(str(message).split()), file=sys.stderr)
        else:
            shown(message, category, *place)

    with warnings.catch_warnings():
        shown, warnings.showwarning = warnings.showwarning, show
        yield
