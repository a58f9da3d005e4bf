"""Records -> matplotlib figures; and one of attention weights.

They take runs (`records.load`), `attention` an array; they return a `matplotlib.figure.Figure`, show nothing
and touch no global state of matplotlib.
"""

from cllm.figures.against import against
from cllm.figures.attention import attention
from cllm.figures.curves import loss_curves, metric_curves
from cllm.figures.directory import drawn, for_directory, save, to_svg
from cllm.figures.scaling import fit_power_law, scaling_law
from cllm.figures.sweeps import contenders, differences, heat_map, rungs, sensitivity

__all__ = [
    "against", "attention", "contenders", "differences", "drawn", "fit_power_law", "for_directory",
    "heat_map", "loss_curves", "metric_curves", "rungs", "save", "scaling_law", "sensitivity", "to_svg",
]  # fmt: skip
