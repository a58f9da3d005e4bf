#!/usr/bin/env bash
# The kernels' tests under AddressSanitizer and UBSan: tests/sanitize.sh [PYTHON]
# Builds in a folder of its own (the tree's build stays as it is) with GCC; PYTHON needs the `test` extra.
set -eu
cd "$(dirname "$0")/.."
python="$(realpath --no-symlinks "${1:-.venv/bin/python}")"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
tar --exclude='*.so' --exclude=__pycache__ -cf - cllm docs tests setup.py pyproject.toml | tar -xf - -C "$scratch"
cd "$scratch"
CLLM_DEBUG=1 "$python" setup.py build_ext --inplace > build.log 2>&1 || { cat build.log; exit 1; }

# The interpreter is not built with the sanitizers, so their library must be loaded first. Python's own
# small-object allocator would hide overruns; an interpreter that exits leaks on purpose. A finding ends the run;
# --capture=sys lets it through, which pytest would else hold back.
export PYTHONMALLOC=malloc PYTHONPATH="$scratch" CLLM_TEST_EXAMPLES="${CLLM_TEST_EXAMPLES:-4}"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so)" \
    "$python" -m pytest --capture=sys -p no:cacheprovider -k "not torch" tests/test_kernels_*.py tests/test_properties.py
