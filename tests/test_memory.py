"""Memory stays flat over 10,000 calls of each kernel."""

import json
import subprocess
import sys

import pytest

CALLS = 10_000
# A process's pages come and go by a few dozen kilobytes; 16 bytes lost in each call would be 160.
SLACK = 128 * 1024

# For each operation: bytes that the process and the pool grew by in CALLS calls of each of its kernels.
MEASURE = """
import json, resource, sys
from cllm import kernels, parity
from cllm._core import pool

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

class Counter:
    calls = 0
    def __getattr__(self, name):
        self.calls += 1
        return getattr(kernels, name)

growth = {}
for operation in parity.TABLE:
    sizes = {letter: max(low, min(high, 3)) for letter, (low, high) in operation.sizes.items()}
    case = parity.Case(operation, sizes, operation.options[-1], "float32")
    arrays, counter = case.inputs(), Counter()
    case.results(arrays, counter)
    repeats = int(sys.argv[1]) * len(operation.calls.split()) // counter.calls
    for _ in range(repeats // 10):
        case.results(arrays)
    before = (resident(), *pool.usage())
    for _ in range(repeats):
        case.results(arrays)
    growth[operation.name] = [a - b for a, b in zip((resident(), *pool.usage()), before)]
print(json.dumps(growth))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_memory_is_flat():
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(CALLS)], capture_output=True, text=True, check=True
    )
    for name, (resident, live, idle) in json.loads(run.stdout).items():
        assert resident <= SLACK, f"{name}: {resident} bytes more after {CALLS} calls"
        assert live == idle == 0, f"{name}: the pool grew by {live} bytes in use and {idle} idle"
