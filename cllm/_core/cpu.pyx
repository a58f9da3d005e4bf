"""Which instruction sets this CPU and its operating system can run."""

cdef extern from *:
    """
    #if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
    #include <cpuid.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    /* CPUID leaf 7 has AMX-BF16 and AMX-TILE, and Linux knows their state (ARCH_GET_XCOMP_SUPP, bits 17 and 18). */
    static int cllm_has_tiles(void) {
        unsigned int a, b, c, d;
        unsigned long long features = 0;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & d >> 24 & 1
            && syscall(SYS_arch_prctl, 0x1021, &features) == 0 && (features >> 17 & 3) == 3;
    }
    /* Linux wants to be asked, since signal frames grow by 8 kB: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA. */
    static int cllm_ask_for_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
    #else
    static int cllm_has_tiles(void) { return 0; }
    static int cllm_ask_for_tiles(void) { return 0; }
    #endif
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
    int cllm_has_tiles()
    int cllm_ask_for_tiles()


def supported_isas():
    """Names of the kernel variants that this CPU can run, the best first."""
    level = cllm_cpu_level()
    names = [name for name, needs in (("x86-64-v4", 4), ("x86-64-v3", 3), ("portable", 1)) if level >= needs]
    return ["x86-64-v4-amx", *names] if level == 4 and cllm_has_tiles() else names


def may_use(isa):
    """Whether the operating system lets this process use the variant, from now on."""
    return isa != "x86-64-v4-amx" or bool(cllm_ask_for_tiles())
