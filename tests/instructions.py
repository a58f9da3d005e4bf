"""How many instructions each kernel takes, against the counts in instructions.json: make instructions.

Valgrind counts the same number on a busy machine as on an idle one. One process calls the functions of the
table of `cllm.parity`, float32, x86-64-v3 (Valgrind has no AVX-512), one thread. What counts is executed in
the kernels' own libraries or, called from there, in libc and libm: neither NumPy nor Python. A kernel that
takes over 10 % more than before fails; --update writes the counts anew.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
ISA = "x86-64-v3"
MOST = 1.10


def call_kernels():
    """In Valgrind's process: each call between two of getppid, where it writes what it has counted.

    Prints the functions in the order of the calls.
    """
    from cllm import kernels, parity
    from cllm._core import pool

    marks = []

    class Door:
        """The door with a mark before and after each call, when there is a name to write."""

        operation = None

        def __getattr__(self, function):
            def call(*args, **options):
                if self.operation is None:
                    return getattr(kernels, function)(*args, **options)
                marks.append(f"{self.operation}: {function}")
                os.getppid()
                result = getattr(kernels, function)(*args, **options)
                os.getppid()
                return result

            return call

    kernels.set_num_threads(1)
    door = Door()
    for operation in parity.TABLE:
        case = parity.Case(operation, operation.large, operation.options[0], "float32")
        arrays = {}
        for name, array in case.inputs().items():  # aligned, for loops that begin at a multiple of 64
            arrays[name] = pool.empty(array.shape, array.dtype)
            arrays[name][...] = array
        for name in (None, operation.name):  # the first time, symbols are found and scratch is made
            door.operation = name
            case.results(arrays, door)
    print(json.dumps(marks))


def count(path, kernels):
    """The instructions in a file of callgrind's: of the kernels' folder and what it calls in libc or libm."""
    names, total = {}, 0
    place = called = ""
    call = False
    for line in path.read_text().splitlines():
        if match := re.match(r"(c?ob)=\((\d+)\)(?: (.*))?", line):
            if match[3]:
                names[match[2]] = match[3]
            if match[1] == "cob":
                called = names[match[2]]
            else:
                place = called = names[match[2]]
        elif line.startswith("calls="):
            call = True  # the next line has what the called function took
        elif match := re.match(r"[+*-]?\d* (\d+)", line):
            library = re.match(r"(libc|libm|libmvec)[.-]", Path(called).name)
            if place.startswith(kernels) and (not call or library):
                total += int(match[1])
            call, called = False, place
    return total


def measure():
    """Instructions of each kernel, by "operation: function"."""
    if shutil.which("valgrind") is None:
        sys.exit("instructions: Valgrind is not installed (on Debian: apt-get install valgrind)")
    from cllm import _kernels, kernels

    if ISA not in kernels.available_isas:
        sys.exit(f"instructions: this CPU or build has no {ISA} kernels, whose instructions are counted")
    folder = str(Path(_kernels.__file__).parent / ISA)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        command = ["valgrind", "--tool=callgrind", "--dump-before=getppid", f"--callgrind-out-file={out}"]
        environment = {**os.environ, "CLLM_ISA": ISA, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        run = subprocess.run(
            [*command, sys.executable, __file__, "--call"],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode:
            sys.exit(f"instructions: Valgrind ended with {run.returncode}:\n{run.stderr[-2000:]}")
        counts = {}
        for i, name in enumerate(json.loads(run.stdout)):
            counts[name] = counts.get(name, 0) + count(Path(f"{out}.{2 * i + 2}"), folder)
    return counts, compiler(folder)


def compiler(folder):
    """The compiler that the kernels' libraries name."""
    for path in sorted(Path(folder).glob("*.so")):
        if found := re.search(rb"GCC: [^\0]+|clang version [^\0]+", path.read_bytes()):
            return found[0].decode()
    return "unknown"


def main():
    parser = argparse.ArgumentParser(description="Count the kernels' instructions.")
    parser.add_argument("--update", action="store_true", help=f"write the counts to {FILE.name}")
    parser.add_argument("--call", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        return call_kernels()
    counts, made_by = measure()
    if options.update:
        table = {"compiler": made_by, "isa": ISA, "instructions": counts}
        FILE.write_text(json.dumps(table, indent=1) + "\n")
        print(f"instructions: {len(counts)} kernels written to {FILE.name}")
        return None
    committed = json.loads(FILE.read_text())
    before = committed["instructions"]
    more = {name: n for name, n in counts.items() if name in before and n > MOST * before[name]}
    fewer = sum(name in before and n * MOST < before[name] for name, n in counts.items())
    wrong = [f"{name}: {n:,} instructions, {n / before[name] - 1:+.0%}" for name, n in more.items()]
    wrong += [f"{name}: nothing was counted" for name, n in counts.items() if not n]
    wrong += [f"{name}: not in {FILE.name}" for name in counts if name not in before]
    wrong += [f"{name}: in {FILE.name}, but not called" for name in before if name not in counts]
    print(f"instructions: {len(counts)} kernels, {len(more)} over {MOST - 1:.0%} more, {fewer} fewer")
    if wrong:
        print(*wrong, sep="\n")
        if made_by != committed["compiler"]:
            print(f"compiled by {made_by}, the counts are of {committed['compiler']}: that may be the reason")
        sys.exit(f"if this is meant: {os.path.relpath(sys.executable)} {os.path.relpath(__file__)} --update")
    return None


if __name__ == "__main__":
    main()
