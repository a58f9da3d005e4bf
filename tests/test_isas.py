"""Each instruction set's kernels, over the table of `cllm.parity`, against the best one's."""

import os
import subprocess
import sys

import numpy as np
import pytest

from cllm import kernels, parity

# Results by "operation/case/name"; the large sizes with the first options only, which halves the time.
COMPUTE = """
import sys
import numpy as np
from cllm import parity

found = {}
for operation in parity.TABLE:
    for i, case in enumerate(parity.cases(operation)):
        if case.sizes != operation.large or case.options == operation.options[0]:
            results = case.results(case.inputs())
            found |= {f"{operation.name}/{i}/{name}": x for name, x in results.items() if x is not None}
np.savez(sys.argv[1], **found)
"""


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    """A function: the results of the table on one instruction set."""
    folder, known = tmp_path_factory.mktemp("isas"), {}

    def compute(isa):
        if isa not in known:
            path = folder / f"{isa}.npz"
            environment = {**os.environ, "CLLM_ISA": isa}
            subprocess.run([sys.executable, "-c", COMPUTE, path], env=environment, check=True)
            with np.load(path) as found:
                known[isa] = dict(found)
        return known[isa]

    return compute


@pytest.mark.parametrize("isa", kernels.available_isas[1:])
def test_agrees_with_the_best_one(results_of, isa):
    best, other = results_of(kernels.available_isas[0]), results_of(isa)
    assert best.keys() == other.keys()
    floors = {operation.name: operation.floor for operation in parity.TABLE}
    differ = 0
    for name, expected in best.items():
        bound = 2 * parity.BOUNDS[str(expected.dtype)]  # each may be off by its bound
        assert parity.error(other[name], expected, floors[name.partition("/")[0]]) <= bound, name
        differ += other[name].tobytes() != expected.tobytes()
    assert differ > 0, "other code gives other roundings somewhere: was CLLM_ISA heeded?"
