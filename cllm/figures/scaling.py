"""A loss against the number of parameters, with the power law that fits it."""

import math

import numpy as np

from cllm.errors import InputError
from cllm.figures.groups import end, ended, mean_over
from cllm.figures.style import add_legend, loss_unit, objective_name, palette, styled, ticks_at

__all__ = ["fit_power_law", "scaling_law"]

LEAST_ALPHA, MOST_ALPHA = 1e-3, 5.0  # that are tried
LEAST_SIZES = 6  # a law of three numbers, and something left to judge it by


@styled
def scaling_law(runs, y="val.loss", over="train.seed", at="last"):
    """A loss at the end of runs against their number of parameters, the fit E + A / N^alpha, its residuals.

    Of the settings of one size the one with the best mean counts, as if each size had been tuned.

    Parameters
    ----------
    runs : list of records.Run
        Of at least six sizes; `parameters` of their summaries is N.
    y, over, at
        As of `against`; y is a loss.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When there are fewer than six sizes.

    Notes
    -----
    The form is that of Hoffmann et al. (2022), "Training compute-optimal large language models", at one
    number of tokens. `fit_power_law` says how it is fitted.
    """
    from matplotlib.figure import Figure

    best = {}  # parameters -> (mean, runs)
    for group, mean in mean_over(ended(runs), over, y, at, "minimize"):
        n = group[0].summary.get("parameters")
        if n and not math.isnan(mean) and (n not in best or mean < best[n][0]):
            best[n] = (mean, group)
    if len(best) < LEAST_SIZES:
        raise InputError(f"there are {len(best)} sizes with a {y}, a scaling law needs {LEAST_SIZES}")
    sizes = sorted(best)
    losses = np.array([best[n][0] for n in sizes])
    spread = [np.array([end(run, y, at, "minimize") for run in best[n][1]]) for n in sizes]
    errors = [v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for v in spread]
    fit = fit_power_law(sizes, losses)

    figure = Figure(figsize=(7.2, 5.8))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    grid = np.geomspace(sizes[0], sizes[-1], 200)
    line, reach = fit.curve(grid)
    intervals = [fit.interval(value) for value in ("E", "alpha")]
    E, alpha = (f"{low:.2f} to {high:.2f}" for low, high in intervals)
    law = f"E + (N1 / N)^α: E = {fit.E:.2f} ({E}), α = {fit.alpha:.2f} ({alpha}), N1 = {_count(fit.N_A)}"
    fill = {"color": palette(0), "alpha": 0.2, "linewidth": 0}
    fill["label"] = "its 95 % band; in brackets 95 % intervals"
    band = above.fill_between(grid, line - reach, line + reach, **fill)
    (curve,) = above.plot(grid, line, color=palette(0), label=law)
    error = "mean ± standard error" if any(errors) else "one run"
    points = {"yerr": errors if any(errors) else None, "color": "black", "fmt": "o"}
    dots = above.errorbar(sizes, losses, label=error, **points)
    name = objective_name(y)
    above.set_xscale("log")
    above.set_ylabel(name + loss_unit(runs, y))
    title = f"{name[0].upper()}{name[1:]} of {len(sizes)} sizes, each at its best setting"
    above.set_title(title, loc="left")
    below.errorbar(sizes, losses - fit.curve(sizes)[0], **points)
    below.axhline(0, color=palette(0))
    below.set_ylabel("residual")
    below.set_xlabel("parameters N")
    figure.align_ylabels()
    add_legend(figure, [dots, curve, band], "outside lower center", 90)
    ticks_at(below, sizes, [_count(n) for n in sizes])
    return figure


class _Fit:
    """E + A / N^alpha with the covariance of its three numbers; A / N^alpha is 1 at N_A parameters."""

    def __init__(self, x0, values, covariance, x, losses):
        self.x0, self.values, self.covariance, self.n = x0, values, covariance, len(x)
        self.x, self.losses = x, losses
        self.E, scale, self.alpha = values
        self.N_A = x0 * max(scale, 0.0) ** (1 / self.alpha) if self.alpha else math.nan

    def interval(self, name):
        """The 95 % interval of "E" or "alpha": all values with which the best fit is not much worse.

        That is by t^2 / (n - 3) of the least sum of squares (Bates & Watts 1988, section 6.1). Unlike one
        from the covariance it is true where E is hardly known, and stays in what is possible.
        """
        fitted = self.values[0] + self.values[1] * self.x ** -self.values[2]
        limit = float(np.sum((fitted - self.losses) ** 2)) * (1 + self._t() ** 2 / (self.n - 3))
        if name == "E":
            rest, own, ends = self._rest_of_E, self.values[0], (0.0, max(self.losses.max(), self.values[0]))
        else:
            rest, own, ends = self._rest_of_alpha, self.values[2], (LEAST_ALPHA, MOST_ALPHA)
        return tuple(_crossing(rest, float(own), end, limit) for end in ends)

    def _rest_of_alpha(self, alpha):
        """The least sum of squares with this alpha: of a straight line over x^-alpha."""
        from scipy.optimize import nnls

        return nnls(np.stack([np.ones_like(self.x), self.x**-alpha], 1), self.losses)[1] ** 2

    def _rest_of_E(self, E):
        """The least sum of squares with this E, over all alpha."""
        from scipy.optimize import minimize_scalar

        above = self.losses - E

        def rest(log_alpha):
            power = self.x ** -math.exp(log_alpha)
            return float(np.sum((above - max(above @ power / (power @ power), 0) * power) ** 2))

        grid = np.linspace(math.log(LEAST_ALPHA), math.log(MOST_ALPHA), 60)
        at = int(np.argmin([rest(place) for place in grid]))
        bounds = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
        return minimize_scalar(rest, bounds=bounds, method="bounded", options={"xatol": 1e-9}).fun

    def curve(self, sizes):
        """The law at these sizes, and half the width of its 95 % band (delta method)."""
        E, scale, alpha = self.values
        x = np.asarray(sizes, float) / self.x0
        power = x**-alpha
        slope = np.stack([np.ones_like(x), power, -scale * power * np.log(x)])
        variance = np.einsum("in,ij,jn->n", slope, self.covariance, slope)
        return E + scale * power, self._t() * np.sqrt(np.maximum(variance, 0))

    def _t(self):
        from scipy.special import stdtrit

        return float(stdtrit(self.n - 3, 0.975))


def _crossing(rest, own, end, limit):
    """Where the sum of squares reaches the limit between a fit's own value and an end; else that end."""
    from scipy.optimize import brentq

    if rest(end) <= limit or end == own:
        return end
    if rest(own) >= limit:
        return own
    return float(brentq(lambda value: rest(value) - limit, *sorted((own, end))))


def fit_power_law(sizes, losses):
    """Least squares of losses = E + A / sizes^alpha, with E, A >= 0 and alpha > 0.

    Parameters
    ----------
    sizes, losses : sequences of numbers
        At least six different sizes, above 0: the law has three numbers, and needs something to be judged by.

    Returns
    -------
    object
        With E, alpha, N_A (where A / N^alpha is 1), ``interval(name)`` and ``curve(sizes)``.

    Raises
    ------
    InputError
        When there are fewer, or no such law fits.
    """
    from scipy.optimize import curve_fit

    sizes, losses = np.asarray(sizes, float), np.asarray(losses, float)
    if len(set(sizes.tolist())) < LEAST_SIZES or sizes.min() <= 0 or len(sizes) != len(losses):
        raise InputError(f"a power law needs losses of {LEAST_SIZES} different sizes above 0, not of {sizes}")
    x0 = math.exp(np.log(sizes).mean())  # so that A is of the losses' own size
    x, span = sizes / x0, max(float(np.ptp(losses)), 1e-9)
    best = None
    for alpha in (0.1, 0.3, 0.6, 1.0):
        start = (max(losses.min() - span, 0.0), span, alpha)
        try:
            values, covariance = curve_fit(
                lambda x, E, scale, alpha: E + scale * x**-alpha, x, losses, start,
                bounds=([0, 0, LEAST_ALPHA], [np.inf, np.inf, MOST_ALPHA]), maxfev=20_000,
            )  # fmt: skip
        except RuntimeError:
            continue
        rest = float(np.sum((values[0] + values[1] * x ** -values[2] - losses) ** 2))
        if best is None or rest < best[0]:
            best = rest, values, covariance
    if best is None or not np.isfinite(best[2]).all():
        raise InputError("no law E + A / N^alpha fits these losses")
    return _Fit(x0, best[1], best[2], x, losses)


def _count(n):
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= scale:
            return f"{n / scale:.3g}{unit}"
    return f"{n:g}"
