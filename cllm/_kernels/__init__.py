"""Compiled loops, one folder for each instruction set; the best that this CPU runs is chosen at import.

``CLLM_ISA`` overrides the choice. The chosen folder goes first on this package's ``__path__``, so that
an import and a user's cimport reach the same variant.
"""

import os
from pathlib import Path

from cllm._core.cpu import may_use, supported_isas
from cllm.errors import InputError

_here = Path(__file__).parent
#: Variants that were built and that this CPU can run, the best first.
available = [isa for isa in supported_isas() if any(_here.glob(f"{isa}/gemm.*"))]


def _choose():
    wanted = os.environ.get("CLLM_ISA")
    if not available:
        raise ImportError(f"no compiled kernels in {_here}: install CLLM with `pip install .`")
    if not wanted:
        return next(isa for isa in available if may_use(isa))
    if wanted not in available:
        built = "was not built" if not any(_here.glob(f"{wanted}/gemm.*")) else "this CPU cannot run it"
        raise InputError(f"CLLM_ISA={wanted}: {built}; allowed here: {', '.join(available)}")
    if not may_use(wanted):
        raise InputError(f"CLLM_ISA={wanted}: the operating system does not let this process use it")
    return wanted


#: The variant in use. The one with tiles has matrix products alone; the rest is that of the plain AVX-512.
isa = _choose()
__path__[:0] = [str(_here / isa), *([str(_here / "x86-64-v4")] if isa == "x86-64-v4-amx" else [])]
