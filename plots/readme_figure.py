"""The README's figure: final validation loss of a tiny GPT against its learning rate, three seeds each.

    cllm sweep experiments/quickstart_sweep.toml --run.dir runs/quickstart-sweep     # or: make quickstart
    python plots/readme_figure.py runs/quickstart-sweep

draws plots/gallery/readme.png and .svg from the sweep's records alone.
"""

import argparse
from pathlib import Path

from cllm import figures, records

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("sweep", nargs="?", default="runs/quickstart-sweep", help="the sweep's directory")
parser.add_argument("--out", default=Path(__file__).parent / "gallery" / "readme", help="path without suffix")
options = parser.parse_args()

figure = figures.against(records.load(options.sweep), "optim.lr", "val.loss", over="train.seed")
for path in figures.save(figure, options.out):
    print(path)
