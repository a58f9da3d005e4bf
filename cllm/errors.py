"""The one exception of CLLM's own, and the suggestion that goes with a mistyped name."""

import difflib

__all__ = ["InputError", "nearest"]


class InputError(ValueError):
    """An input that CLLM cannot use; the message is one sentence: what was wrong, what is allowed."""


def nearest(word, allowed):
    """The known name closest to `word` as ``' (did you mean "x"?)'``, or ``''`` when none is close."""
    close = difflib.get_close_matches(str(word), [str(name) for name in allowed], n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
