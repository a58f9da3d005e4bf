"""What a few values allow to be said about their mean: errors, intervals, paired differences.

Values are lists of finite floats, one a seed. Nothing here knows what they measure.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

__all__ = ["LEVEL", "Difference", "Estimate", "estimate", "holm", "mean_and_error", "paired", "seeds_needed"]

LEVEL = 0.95  # of all intervals
BOOTSTRAP_FROM = 10  # values; of fewer, resamples repeat each other and an interval from them is too narrow
RESAMPLES = 10_000
# Values that differ by less are the same but for rounding: their spread would make any difference certain.
ROUNDING = 8 * np.finfo(np.float64).eps


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. What the values do not allow is None: of one, or of equal ones, the interval."""

    n: int
    mean: float
    standard_error: float | None
    interval: tuple[float, float] | None
    method: str | None  # "t" | "bootstrap"


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, first - second, its Student's t interval, and p of its two-sided test.

    `effect` is the mean in units of the single differences' standard deviation. `correlation` is None of
    fewer than three pairs: of two it would be 1 or -1, whatever they are.
    """

    n: int
    mean: float
    standard_error: float | None
    interval: tuple[float, float] | None
    correlation: float | None
    effect: float | None
    p: float | None


def mean_and_error(values):
    """The mean and its standard error; the error is None of a single value, 0 of equal ones."""
    scaled, scale = _scaled(values)
    mean, deviation = _moments(scaled)
    error = None if deviation is None else _times(deviation / math.sqrt(len(values)), scale)
    return _times(mean, scale), error


def estimate(values):
    """The mean over seeds with what is known of it.

    Parameters
    ----------
    values : list of float
        At least one.

    Returns
    -------
    Estimate
        Its interval is Student's t of two to nine values. From ten on it is a bootstrap interval, BCa (Efron
        1987) widened for few values (Hesterberg 2015). The resamples are always the same ones, and the order
        of the values does not matter.
    """
    mean, error = mean_and_error(values)
    if not error:
        return Estimate(len(values), mean, error, None, None)
    method, interval = "t", _around(mean, error, len(values))
    if len(values) >= BOOTSTRAP_FROM:
        method, interval = "bootstrap", _bootstrap(values)
    interval = _finite(interval)
    return Estimate(len(values), mean, error, interval, interval and method)


def paired(first, second):
    """Differences between values of the same seeds.

    Parameters
    ----------
    first, second : list of float
        Of the same length, at least one; values at one place belong together.

    Returns
    -------
    Difference
        Of equal differences the error is 0, and there is no interval and no p: without a spread there is
        nothing that a test could compare them with.
    """
    from scipy.special import stdtr

    n = len(first)
    both, scale = _scaled([*first, *second])
    first, second = both[:n], both[n:]
    mean, deviation = _moments([a - b for a, b in zip(first, second)])
    if not deviation:
        return Difference(n, _times(mean, scale), deviation, None, None, None, None)
    error = deviation / math.sqrt(n)
    p = 2 * float(stdtr(n - 1, -abs(mean / error)))
    interval = tuple(_times(end, scale) for end in _around(mean, error, n))
    correlation, effect = _correlation(first, second), mean / deviation
    mean, error = _times(mean, scale), _times(error, scale)
    return Difference(n, mean, error, _finite(interval), correlation, effect, p)


def holm(ps):
    """p-values corrected for their number (Holm 1979): the k-th smallest of m times m - k + 1, never falling.

    Who rejects below alpha is wrong about any of them with a probability of alpha at most.
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected


def seeds_needed(effect, n_tests=1, power=0.8, most=1000):
    """Pairs at which a paired t test finds a true difference with probability `power`.

    Parameters
    ----------
    effect : float
        The difference in units of the single differences' standard deviation.
    n_tests : int
        Tests that share the error of 1 - LEVEL.
    power : float
    most : int
        Where to give up.

    Returns
    -------
    int or None
        None for more than `most`.
    """
    from scipy.special import nctdtr, ndtri, stdtrit

    tail = (1 - LEVEL) / 2 / n_tests
    effect = min(abs(effect), 1e4)  # beyond it two pairs suffice for any number of tests that sweeps have
    if effect == 0:
        return None
    least = ((ndtri(1 - tail) + ndtri(power)) / effect) ** 2  # were the deviation known
    for n in range(max(2, math.floor(min(least, most + 1))), most + 1):
        if 1 - nctdtr(n - 1, effect * math.sqrt(n), stdtrit(n - 1, 1 - tail)) >= power:
            return n
    return None


def _scaled(values):
    """The values divided by a power of two to at most 1, so that squares do not overflow; its exponent."""
    scale = math.frexp(max(map(abs, values)))[1]
    return [math.ldexp(value, -scale) for value in values], scale


def _times(value, scale):
    try:
        return math.ldexp(value, scale)
    except OverflowError:
        return math.copysign(math.inf, value)


def _moments(scaled):
    """Mean and standard deviation of scaled values: 0 when they differ by rounding, None of a single one."""
    if len(scaled) == 1:
        return scaled[0], None
    if max(scaled) - min(scaled) <= ROUNDING:
        return (scaled[0] if abs(scaled[0]) > ROUNDING else 0.0), 0.0
    mean = math.fsum(scaled) / len(scaled)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in scaled) / (len(scaled) - 1))


def _correlation(first, second):
    """Pearson's; None of fewer than three pairs, or where one side is always the same."""
    if len(first) < 3:
        return None
    standard = []
    for values in (first, second):
        mean, deviation = _moments(values)
        if not deviation:
            return None
        standard.append([(value - mean) / deviation for value in values])
    product = math.fsum(a * b for a, b in zip(*standard)) / (len(first) - 1)
    return max(-1.0, min(1.0, product))


@functools.cache
def _t_quantile(n):
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + LEVEL) / 2))


def _around(mean, error, n):
    reach = _t_quantile(n) * error
    return mean - reach, mean + reach


def _finite(interval):
    """The interval, unless it goes beyond the largest float."""
    return interval if all(map(math.isfinite, interval)) else None


@functools.lru_cache(2)
def _resamples(n):
    """Places of values in each resample: half drawn, half those mirrored, so that both tails match."""
    drawn = np.random.default_rng(n).integers(0, n, (RESAMPLES // 2, n))
    return np.concatenate([drawn, n - 1 - drawn])


def _bootstrap(values):
    """The BCa interval of the mean (Efron 1987).

    A plain one is too narrow for few values: of ten normal ones it covers the mean in 90 of 100 cases. The
    normal quantile in it is therefore sqrt(n / (n - 1)) times Student's, as Hesterberg (2015) has it for
    percentile intervals: 95 of 100.
    """
    from scipy.special import ndtr, ndtri

    scaled, scale = _scaled(sorted(values))
    n, ordered = len(scaled), np.array(scaled)
    away = ordered - _moments(scaled)[0]
    means = np.sort(away[_resamples(n)].mean(1))
    below, not_above = np.searchsorted(means, 0.0, "left"), np.searchsorted(means, 0.0, "right")
    bias = ndtri((below + not_above) / (2 * RESAMPLES))
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    reach = math.sqrt(n / (n - 1)) * _t_quantile(n)
    shares = [ndtr(bias + z / (1 - acceleration * z)) for z in (bias - reach, bias + reach)]
    low, high = (np.quantile(means, share) + ordered.mean() for share in shares)
    return _times(float(low), scale), _times(float(high), scale)
