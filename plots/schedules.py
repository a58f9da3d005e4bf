"""Every learning-rate schedule at a glance: the figure of docs/schedules.md.

    python plots/schedules.py

draws plots/gallery/schedules.png and .svg from the functions of `cllm.schedules` alone.
"""

import argparse
from functools import partial
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from cllm import figures, schedules

LR, MIN_LR, WARMUP_STEPS, MAX_STEPS = 1.0, 0.1, 100, 1000
WARM = {"warmup_steps": WARMUP_STEPS}
RUN = {**WARM, "max_steps": MAX_STEPS, "min_lr": MIN_LR}
FLOOR = {**WARM, "min_lr": MIN_LR}

# A panel each: title, the schedule, and in some a variant (dashed) with the key that makes it.
PANELS = [
    ("warmup", partial(schedules.warmup, warmup_steps=8)),
    ("constant", partial(schedules.constant, **WARM)),
    ("linear", partial(schedules.linear, **RUN)),
    ("cosine", partial(schedules.cosine, **RUN)),
    (
        "cosine_restarts", partial(schedules.cosine_restarts, cycle_steps=300, **RUN),
        "cycle_mult = 2", partial(schedules.cosine_restarts, cycle_steps=300, cycle_mult=2, **RUN),
    ),
    (
        "wsd", partial(schedules.wsd, decay_share=0.4, **RUN),
        '"1-sqrt"', partial(schedules.wsd, decay_share=0.4, decay_shape="1-sqrt", **RUN),
    ),
    ("inverse_sqrt", partial(schedules.inverse_sqrt, **FLOOR)),
    (
        "one_cycle", partial(schedules.one_cycle, max_steps=MAX_STEPS),
        "three_phase", partial(schedules.one_cycle, max_steps=MAX_STEPS, three_phase=True),
    ),
    ("step", partial(schedules.step, step_size=200, gamma=0.6, **FLOOR)),
    ("multi_step", partial(schedules.multi_step, milestones=[500, 800], gamma=0.4, **FLOOR)),
    (
        "exponential", partial(schedules.exponential, gamma=0.998, **FLOOR),
        "gamma = 0.99", partial(schedules.exponential, gamma=0.99, **FLOOR),
    ),
    (
        "join",
        schedules.join([
            partial(schedules.constant, **WARM), partial(schedules.cosine, max_steps=500, min_lr=MIN_LR)
        ], [500]),
    ),
]  # fmt: skip


def draw():
    with matplotlib.style.context(["default", figures.style.STYLE]):
        figure = Figure(figsize=(6.8, 4.6))
        axes = figure.subplots(3, 4, sharey=True)
        for panel, (title, schedule, *variant) in zip(axes.flat, PANELS):
            zoomed = title == "warmup"
            n = 16 if zoomed else MAX_STEPS
            marks = {"marker": "o", "markersize": 2.8, "linewidth": 0.9} if zoomed else {}
            panel.plot([schedule(step, LR) for step in range(n)], color="black", **marks)
            if variant:
                rates = [variant[1](step, LR) for step in range(n)]
                dashes = {"color": "C1", "linestyle": (0, (2.2, 1.2)), "linewidth": 1.4}
                panel.plot(rates, label=variant[0], zorder=1.9, **dashes)  # seen where it differs
                panel.legend(
                    prop={"family": "monospace", "size": 7}, loc="upper right", handlelength=1.7,
                    borderaxespad=0.0, borderpad=0.0, handletextpad=0.5,
                )  # fmt: skip
            panel.set_title(title, family="monospace", fontsize=9.5, pad=5)
            panel.set(ylim=(0, 1.27 * LR), xlim=(-0.03 * n, 1.02 * n))
            panel.set_yticks([MIN_LR, LR], ["min_lr", "lr"])
            panel.set_xticks([0, 7, 15] if zoomed else [0, 500, 1000])
            panel.tick_params(labelsize=8, length=2.5, pad=2)
            panel.tick_params("y", labelfontfamily="monospace", labelsize=7.5)
            if not zoomed and panel.get_subplotspec().rowspan.stop < 3:
                panel.set_xticklabels([])
        figure.supxlabel("step", fontsize=9.5)
        figure.supylabel("learning rate", fontsize=9.5)
        return figure


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
gallery = Path(__file__).parent / "gallery"
parser.add_argument("--out", default=gallery / "schedules", help="path without suffix")
for path in figures.save(draw(), parser.parse_args().out):
    print(path)
