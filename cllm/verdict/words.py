"""Numbers and values as a reader sees them."""

import json
import math
import textwrap

__all__ = ["plus_minus", "short", "shown", "text", "wrap"]

COLUMNS = 80


def plus_minus(mean, error):
    """mean ± error, both to the error's second digit; the mean alone when there is no error."""
    return f"{shown(mean, error)} ± {shown(error, error)}" if error else shown(mean, error)


def shown(value, error):
    """A number to its error's second digit, to five digits of its own when there is no error.

    Numbers that would be rows of zeros have a power of ten.
    """
    if not error or not math.isfinite(error) or not math.isfinite(value):
        return f"{value:.5g}"
    place = _power(f"{error:.1e}")  # as it is rounded: 0.0999 is 0.10
    if error >= 1e-6 and max(abs(value), error) < 1e6:
        return f"{value:.{max(0, 1 - place)}f}"
    digits = (_power(f"{value:.15e}") if value else place) - place + 1
    return f"{value:.{min(max(digits, 0), 15)}e}"


def text(value):
    """A value of a setting as TOML would write it, strings without quotes."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def short(value):
    """A setting's value with at most five digits."""
    return f"{value:.5g}" if isinstance(value, float) else text(value)


def wrap(text, columns=COLUMNS):
    """Text whose lines are broken at words for a terminal; what follows a break is indented."""
    how = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, columns, **how) for line in text.split("\n"))


def _power(scientific):
    return int(scientific.partition("e")[2])
