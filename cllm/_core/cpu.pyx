"""Which instruction sets this CPU and its operating system can run."""

cdef extern from *:
    """
    #if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    static int cllm_cpu_level(void) {
        __builtin_cpu_init();
        if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
              && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))) return 1;
        if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
              && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
              && __builtin_cpu_supports("avx512vl"))) return 3;
        return 4;
    }
    #else
    static int cllm_cpu_level(void) { return 1; }
    #endif
    """
    int cllm_cpu_level()


def supported_isas():
    """Names of the kernel variants that this CPU can run, the best first."""
    level = cllm_cpu_level()
    return [name for name, needs in (("x86-64-v4", 4), ("x86-64-v3", 3), ("portable", 1)) if level >= needs]
