"""Measures every operation's error and renews the tables of docs/parity.md and README.md.

    python plots/parity_tables.py        needs torch: make parity installs it
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"^\| operation \|.*\n(?:\|.*\n)+", re.MULTILINE)
NOTE = re.compile(r"^Norm of the error.*\n", re.MULTILINE)  # bounds, instruction set, torch
README_COLUMNS = (0, 1, 2, 4)  # without the cases


def renew(page, pattern, new):
    text = page.read_text(encoding="utf-8")
    page.write_text(pattern.sub(lambda match: new, text, count=1), encoding="utf-8")


def main():
    command = [sys.executable, "-m", "cllm.parity", "--markdown"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = TABLE.search(output)[0]
    renew(ROOT / "docs" / "parity.md", TABLE, table)
    renew(ROOT / "docs" / "parity.md", NOTE, NOTE.search(output)[0])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    short = "".join(f"| {' | '.join(row[i] for i in README_COLUMNS)} |\n" for row in cells)
    renew(ROOT / "README.md", TABLE, short)


if __name__ == "__main__":
    main()
