"""The figures of a bench: training steps, matrix products, kernels, roofline, growth.

    cllm bench --against torch          # or: make bench
    python plots/bench.py runs/bench

draws plots/gallery/bench_*.png and .svg from the records alone.
"""

import argparse
from pathlib import Path

from cllm import bench
from cllm.bench import figures

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bench", nargs="?", default="runs/bench", help="the folder that `cllm bench` wrote")
parser.add_argument("--out", default=Path(__file__).parent / "gallery", help="a folder")
options = parser.parse_args()

for path in figures.draw(*bench.load(options.bench), options.out):
    print(path)
