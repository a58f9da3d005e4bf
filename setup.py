"""The only file that knows compilers: instruction-set variants, OpenMP, debug builds.

Every kernel file is translated by Cython once; the C is then compiled once for each instruction
set, from a folder of its own (object files are named after their source: two variants in one
folder would overwrite each other), and installed as ``cllm/_kernels/<isa>/``.
"""

import os
import platform
import shutil
import tempfile
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("CLLM_DEBUG") == "1"
KERNELS = sorted(Path("cllm/_kernels").glob("*.pyx"))
CORE = [*sorted(Path("cllm/_core").glob("*.pyx")), Path("cllm/capi.pyx")]
HEADERS = [str(path) for path in sorted(Path("cllm/_kernels").glob("*.h"))]

# -ffast-math and its parts that reorder sums or drop NaN checks stay out: they end "the same bits at
# any thread count". These two only free the compiler from errno and from floating-point traps.
FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-DCYTHON_WITHOUT_ASSERTIONS"]  # the kernels' shape assertions: for debug builds
if DEBUG:
    FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-ffp-contract=fast"]
VARIANTS = {
    "x86": {
        "portable": ["-march=x86-64"],
        "x86-64-v3": ["-march=x86-64-v3"],
        # GCC prefers 256-bit vectors on AVX-512 by default: 56-78 instead of 101-112 GFLOP/s in plain loops.
        "x86-64-v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "x86-64-v4-amx": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mamx-tile", "-mamx-bf16"],
    },
    "other": {"portable": []},
}
ONLY = {"x86-64-v4-amx": ["gemm"]}  # what differs from the variant before it in cllm._kernels
OPENMP = [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])]
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": DEBUG,
    "freethreading_compatible": False,
}


def mode_changed():
    """Whether the tree was last built with other flags: files are compared by their times alone."""
    stamp, mode = Path("build/mode"), f"{FLAGS} {DIRECTIVES}\n"
    if stamp.exists() and stamp.read_text() == mode:
        return False
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(mode)
    return True


FORCE = mode_changed()


def extensions():
    """One extension for each core file, one for each kernel and instruction set."""
    sources = [Extension(".".join(path.with_suffix("").parts), [str(path)]) for path in CORE + KERNELS]
    translated = cythonize(sources, build_dir="build/cython", compiler_directives=DIRECTIVES, force=FORCE)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    result = []
    for extension in translated:
        extension.include_dirs = [np.get_include(), "cllm/_kernels"]
        extension.define_macros = [("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")]
        extension.depends = HEADERS
        extension.extra_compile_args = list(FLAGS)
        extension.extra_link_args = ["-fsanitize=address,undefined"] if DEBUG else []
        package, name = extension.name.rsplit(".", 1)
        if package != "cllm._kernels":
            result.append(extension)
            continue
        for isa, flags in VARIANTS["x86" if x86 else "other"].items():
            if name not in ONLY.get(isa, [name]):
                continue
            source = Path("build", isa, f"{name}.c")
            source.parent.mkdir(parents=True, exist_ok=True)
            Path("cllm/_kernels", isa).mkdir(exist_ok=True)  # in-place builds copy the result there
            text = Path(extension.sources[0]).read_bytes()
            if not source.exists() or source.read_bytes() != text:
                source.write_bytes(text)
            variant = Extension(f"{package}.{isa}.{name}", [str(source)])
            variant.include_dirs = extension.include_dirs
            variant.define_macros = extension.define_macros
            variant.depends = HEADERS
            variant.extra_compile_args = FLAGS + flags
            variant.extra_link_args = list(extension.extra_link_args)
            result.append(variant)
    return result


class BuildKernels(build_ext):
    """Probes OpenMP and the instruction sets before it compiles, and compiles on every core."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()
        self.force = self.force or FORCE

    def build_extensions(self):
        openmp = next((pair for pair in OPENMP if self.works(*pair)), None)
        if openmp is None:
            self.warn("the C compiler has no OpenMP: the kernels are built without threads and run serially")
        kept, unknown = [], set()
        for extension in self.extensions:
            package = extension.name.split(".")
            march = [flag for flag in extension.extra_compile_args if flag.startswith("-m")]
            if march and not self.works(march, []):
                unknown.add(" ".join(march))
                continue
            if openmp is not None and package[1] == "_kernels":
                extension.extra_compile_args += openmp[0]
                extension.extra_link_args += openmp[1]
            kept.append(extension)
        for flag in sorted(unknown):
            self.warn(f"the C compiler does not know {flag}: the kernels for it are left out")
        self.extensions = kept
        super().build_extensions()

    def works(self, compile_args, link_args):
        """Whether a trivial program compiles and links with these arguments (probed once each)."""
        key = (*compile_args, "|", *link_args)
        cache = self.__dict__.setdefault("_probed", {})
        if key not in cache:
            cache[key] = self._probe(compile_args, link_args)
        return cache[key]

    def _probe(self, compile_args, link_args):
        folder = tempfile.mkdtemp()
        try:
            source = Path(folder, "probe.c")
            body = (
                "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
                if link_args
                else ("int main(void) { return 0; }\n")
            )
            if "-mamx-tile" in compile_args:  # which an older assembler does not know
                body = "#include <immintrin.h>\nint main(void) { _tile_zero(0); return 0; }\n"
            source.write_text(body)
            # Probing is expected to fail on some compilers: keep their complaints out of the log.
            stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=list(compile_args)
                )
                self.compiler.link_executable(
                    objects, str(Path(folder, "probe")), extra_postargs=list(link_args)
                )
            finally:
                os.dup2(stderr, 2)
                os.close(stderr)
                os.close(null)
            return True
        except Exception:  # every compiler class raises its own errors; any failure means "does not work"
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
