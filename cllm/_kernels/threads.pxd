"""How many of the threads that a caller allows are worth their start."""


cdef inline int useful_threads(double work, double serial_below, int n_threads) noexcept nogil:
    """So many that each has at least half of `serial_below` to do; -n stands for n whatever the work.

    benchmarks/thresholds.py measures with -n from which work on two threads are faster than one.
    """
    if n_threads < 0:
        return -n_threads
    if work < serial_below:
        return 1
    return <int>min(<double>n_threads, 2 * work / serial_below)
