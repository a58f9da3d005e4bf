"""The figures of a bench (training steps, products, kernels, roofline, growth), and README's table of steps.

    cllm bench --against torch          # or: make bench
    python plots/bench.py runs/bench

keeps the records beside the figures, in plots/gallery, and draws from them alone; without a folder it draws
again from those kept there.
"""

import argparse
import re
import shutil
from pathlib import Path

from cllm import bench
from cllm.bench import figures, records

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "plots" / "gallery"
TABLE = re.compile(r"^\| size \| shape \|.*\n(?:\|.*\n)+", re.MULTILINE)


def table(rows):
    """The training steps in Markdown."""
    lines = ["| size | shape | threads | CLLM, ms | torch, ms | torch / CLLM | aim |", "|---" * 7 + "|"]
    for row in rows:
        side = records.other(row)
        if row["group"] != "step" or row["unit"] != "s" or side is None:
            continue
        size, _, shape = row["case"].partition(" ")
        ours, theirs = (f"{records.numbers(row, name)[0] * 1e3:.2f}" for name in (records.OURS, side))
        star, mark = "*" if side == "torch.compile" else "", "~" if records.noisy(row) else ""
        cells = (size, shape, row["threads"], ours, theirs + star, f"{mark}{records.value(row)[0]:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {records.target(row)} |")
    return "\n".join(lines) + "\n"


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("bench", nargs="?", default=GALLERY, type=Path, help="the folder of a bench")
    folder = parser.parse_args().bench
    environment, rows = bench.load(folder)
    if folder.resolve() != GALLERY:
        shutil.copy(folder / records.FILE, GALLERY / records.FILE)
    for path in figures.draw(environment, rows, GALLERY):
        print(path.relative_to(ROOT))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(TABLE.sub(lambda match: table(rows), text, count=1), encoding="utf-8")


if __name__ == "__main__":
    main()
