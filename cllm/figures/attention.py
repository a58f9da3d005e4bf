"""Attention weights as pictures."""

import numpy as np

from cllm.errors import InputError
from cllm.figures.style import styled

__all__ = ["attention"]


@styled
def attention(weights, tokens=None):
    """The attention weights of one layer's heads on one sequence: a small picture for each head.

    Rows are queries, columns keys. All heads share one colour scale, so that they can be compared; a weight
    of exactly 0, such as that of a key that a query must not see, is gray.

    ::

        with cllm.capture(model, "h.*.attn.weights") as seen:
            model(tokenizer.encode(text)[None])
        figures.attention(seen["h.0.attn.weights"][0], list(text)).savefig("heads.png")

    Parameters
    ----------
    weights : (H, T, S) array
        Of H heads, T queries and S keys.
    tokens : sequence of str, optional
        The S tokens, to label the axes; the queries are the last T of them. Beyond 48 there is no room
        for labels, and positions are counted instead.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When weights have another shape or are not finite, or tokens another number.
    """
    from matplotlib.figure import Figure

    weights = np.asarray(weights)
    if weights.ndim != 3 or weights.dtype.kind != "f" or not weights.size:
        hint = "; of a batch take one sequence, weights[0]" if weights.ndim == 4 else ""
        raise InputError(f"weights are {weights.dtype} {weights.shape}, they must be floats (H, T, S){hint}")
    if not np.isfinite(weights).all():
        raise InputError("weights hold NaN or infinity, they must be finite")
    H, T, S = weights.shape
    if tokens is not None and len(tokens) != S:
        raise InputError(f"tokens are {len(tokens)}, they must be {S}: one for each key of the weights")
    n_columns = min(H, 4) if H != 6 and H != 9 else 3
    n_rows = -(-H // n_columns)
    height = 1.9 * min(max(T / S, 0.4), 2.5)
    figure = Figure(figsize=(1.9 * n_columns + 1.1, height * n_rows + 0.9))
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[H:]:
        axes.set_axis_off()
    shown = np.ma.masked_equal(weights, 0)
    for head, axes in enumerate(grid.flat[:H]):
        picture = axes.imshow(
            shown[head], cmap="Blues", vmin=0, vmax=weights.max(), aspect="auto", interpolation="nearest"
        )
        axes.set_facecolor("0.9")
        axes.set_title(f"head {head}", loc="left")
        axes.grid(False)
        axes.label_outer()
    if tokens is not None and S <= 48:
        words = [_visible(token) for token in tokens]
        size = 9 if S <= 12 else 6.5 if S <= 24 else 4
        across = {"rotation": 90} if max(map(len, words)) > 1 else {}
        grid[0, 0].set_xticks(range(S), words)
        grid[0, 0].set_yticks(range(T), words[S - T :])
        for axes in grid.flat[:H]:
            axes.tick_params(length=0, labelsize=size)
            axes.tick_params(axis="x", **across)
    figure.supxlabel("key" if tokens is not None else "key position", fontsize=10)
    figure.supylabel("query" if tokens is not None else "query position", fontsize=10)
    figure.colorbar(picture, ax=grid, label="attention weight", aspect=30)
    return figure


def _visible(token):
    """A token whose blanks can be seen on an axis."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
