"""Processing units: processes that share a step's micro-batches and send their gradients up a tree.

``mpirun -n 4 cllm train ...`` starts four units, on one machine or on several (the extra `mpi` brings
mpi4py). A step's `grad_accum` micro-batches are the leaves of a binary tree, summed pairwise by index. Each
unit owns as many leaves as the others, a power of two of them: a whole subtree. So the sums, and with them
the weights, have the same bits with any number of units of one instruction set. Each unit updates its own
copy of the weights; the first alone writes files and shows progress.

SIGTERM or Ctrl-C to any one of the units, or train.max_minutes, stops all of them after the step, with a
checkpoint. Given to mpirun itself, Open MPI 5 ends its processes about half a second later: where a step
and its checkpoint take longer, the run goes on from the checkpoint before.
"""

import os
import sys
import traceback
from contextlib import contextmanager
from functools import lru_cache

import numpy as np

from cllm.errors import InputError

__all__ = ["TreeSum", "Units", "fitting", "here"]

# Set by mpirun or srun in each process that it starts: how many there are.
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


class TreeSum:
    """A sum over leaves that come in order, pairwise by index, as a binary counter counts.

    After leaves 0 to 5 it holds the sums of 0 to 3 and of 4 and 5. So the rounding of a sum follows from the
    number of leaves alone, and at most log2(n) + 1 sums are in memory (pairwise summation; Higham 1993, "The
    accuracy of floating point summation").

    Parameters
    ----------
    add : callable
        (earlier, later) -> their sum; it may be earlier itself.
    keep : callable, optional
        What is held of a leaf that waits for its partner, where the leaf itself will be overwritten.
    """

    def __init__(self, add, keep=lambda leaf: leaf):
        self.add, self.keep = add, keep
        self._sums = []  # (level, sum of 2**level leaves), the highest level first

    def __len__(self):
        """How many leaves are in the sum."""
        return sum(1 << level for level, _ in self._sums)

    def push(self, leaf):
        """Add the next leaf."""
        level = 0
        while self._sums and self._sums[-1][0] == level:
            leaf = self.add(self._sums.pop()[1], leaf)
            level += 1
        self._sums.append((level, self.keep(leaf) if level == 0 else leaf))

    def total(self):
        """The sum of all leaves, of which there must be one; the next leaf begins another sum."""
        _, total = self._sums.pop()
        while self._sums:
            total = self.add(self._sums.pop()[1], total)
        return total


class Units:
    """The processing units of a run, seen from one of them.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, optional
        None is one unit alone.

    Attributes
    ----------
    rank, size : int
        Which one this is, from 0, of how many.
    local : int
        How many of them are on this machine.
    """

    def __init__(self, comm=None):
        self.comm = comm
        self.rank, self.size, self.local = 0, 1, 1
        if comm is not None:
            from mpi4py import MPI

            self.rank, self.size = comm.rank, comm.size
            self.local = comm.Split_type(MPI.COMM_TYPE_SHARED).size

    def gather(self, value):
        """Each unit's value, by rank; every unit gets all of them."""
        return [value] if self.size == 1 else self.comm.allgather(value)

    def any(self, flag):
        """Whether the flag is set at one of the units."""
        return any(self.gather(bool(flag)))

    def of_first(self, value):
        """The first unit's value."""
        return value if self.size == 1 else self.comm.bcast(value, root=0)

    def sum(self, arrays):
        """Sum contiguous arrays over all units, in place, pairwise by rank; each gets the same sum."""
        merges = _merges(self.size)
        for array in arrays:
            received = None
            for into, later in merges:
                if self.rank == later:
                    self.comm.Send(array, dest=into)
                elif self.rank == into:
                    received = np.empty_like(array) if received is None else received
                    self.comm.Recv(received, source=later)
                    np.add(array, received, out=array)
            self.comm.Bcast(array, root=0)

    def leaves(self, n):
        """Which of n leaves this unit owns, a range.

        Raises
        ------
        InputError
            When so many units do not fit the tree; names the counts that would.
        """
        counts = fitting(n)
        if self.size not in counts:
            *most, last = map(str, counts)
            listed = f"{', '.join(most)} or {last}" if most else last
            raise InputError(
                f"{self.size} processing units do not fit train.grad_accum = {n}: start {listed} "
                "(grad_accum divided by the units must be a power of two), or change train.grad_accum"
            )
        share = n // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    @contextmanager
    def agreeing(self):
        """What every unit does before the run; when one cannot, none goes on, and one of them says why."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [error is not None] if self.size == 1 else self.gather(error is not None)
        if any(failed):
            if failed.index(True) == self.rank:
                raise error
            sys.exit(2)

    @contextmanager
    def together(self):
        """A run's loop: whatever ends it in one unit ends all of them, and leaves none waiting for it."""
        try:
            yield
        except BaseException:
            if self.size > 1:
                traceback.print_exc()
                print(f"processing unit {self.rank} of {self.size} failed: the run ends", file=sys.stderr)
                sys.stderr.flush()
                self.comm.Abort(1)
            raise


def fitting(n):
    """The numbers of units that fit a tree of n leaves: n / units must be a power of two, or units 1."""
    return [
        units for units in range(1, n + 1)
        if units == 1 or (n % units == 0 and (n // units) & (n // units - 1) == 0)
    ]  # fmt: skip


@lru_cache(maxsize=1)
def here():
    """The units that this process was started among: all of mpirun's, or itself alone.

    Raises
    ------
    InputError
        When mpirun started several, and mpi4py is missing.
    """
    started = max((int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdigit()), default=1)
    if started == 1:
        return Units()
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise InputError(
            f"mpirun started {started} processes, which need mpi4py to work together ({error}); "
            'install it: pip install "cllm[mpi]"'
        ) from None
    if MPI.COMM_WORLD.size == 1:
        raise InputError(
            f"mpirun started {started} processes, but mpi4py's MPI library sees one: "
            "both must be of the same MPI"
        )
    return Units(MPI.COMM_WORLD)


@lru_cache
def _merges(size):
    """The additions over `size` units in order, as (into, later) ranks; rank 0 ends up with the sum."""
    merges = []

    def add(into, later):
        merges.append((into, later))
        return into

    tree = TreeSum(add)
    for rank in range(size):
        tree.push(rank)
    tree.total()
    return merges
