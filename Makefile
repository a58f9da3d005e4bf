# make quickstart | test | parity | isas | sanitize | robustness | instructions | lint | bench | clean.  Each target sets .venv up by itself.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Python files are used from here (an editable install, by a path: the default way loses to any folder named cllm in
# the working directory, such as the clone itself seen from beside it); these are the ones whose change needs a new build.
BUILD_INPUTS := pyproject.toml setup.py $(shell find cllm -name '*.pyx' -o -name '*.pxd' -o -name '*.h')
# Prints the requirements of one extra, a line each, so that adding it does not compile the kernels again.
EXTRA = import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")

.PHONY: quickstart test parity isas sanitize robustness instructions lint bench clean

quickstart: $(VENV)/installed
	$(BIN)/cllm quickstart

test: $(VENV)/installed $(VENV)/extra-test
	$(BIN)/python -m pytest

parity: $(VENV)/installed $(VENV)/extra-test $(VENV)/extra-parity
	$(BIN)/python -m pytest -k torch

isas: $(VENV)/installed $(VENV)/extra-test
	for isa in $$($(BIN)/python -c 'from cllm import kernels; print(*kernels.available_isas[1:])'); do \
		case $$isa in x86-64-v4) tests=tests/test_kernels_gemm.py;; *) tests="$(wildcard tests/test_kernels_*.py)"; esac; \
		CLLM_ISA=$$isa $(BIN)/python -m pytest $$tests || exit 1; done  # behind tiles, x86-64-v4 differs in products alone

sanitize: $(VENV)/installed $(VENV)/extra-test
	tests/sanitize.sh $(BIN)/python

robustness: $(VENV)/installed $(VENV)/extra-test
	$(BIN)/python tests/batch_stress.py 60
	$(BIN)/python tests/kills.py 100
	$(BIN)/python tests/sweep_kills.py 50
	$(BIN)/python tests/corruptions.py 5000
	$(BIN)/python tests/soak.py 60

instructions: $(VENV)/installed
	$(BIN)/python tests/instructions.py

lint: $(VENV)/extra-test
	$(BIN)/ruff check .

bench: $(VENV)/installed $(VENV)/extra-parity
	$(BIN)/cllm bench --against torch

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find cllm \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "CLLM needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BUILD_INPUTS) | $(BIN)/pip
	$(BIN)/pip install --config-settings editable_mode=compat --editable .
	touch $@

$(VENV)/extra-%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -c '$(EXTRA)' $* > $(VENV)/extra-$*.txt
	$(BIN)/pip install --requirement $(VENV)/extra-$*.txt
	touch $@
