# `make help` lists the targets. Everything is installed into .venv, nothing outside this folder changes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# Enough for one local build: sm_80 code, PTX for newer devices, and sm_90a for Hopper's clusters.
# A release is built for setup.py's own list: make clean && make build TORCH_CUDA_ARCH_LIST=...
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX;9.0a
# Without a GPU they could not run, and compiling them takes longer than all the rest: make build
# CBAM_FUSED_CUDA=1 does it all the same. The tests compile them, and run them on the CPU, by themselves.
export CBAM_FUSED_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),,0)
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Processes that share the test files. Each has torch in memory, and the kernels under test have threads.
TEST_JOBS ?= $(shell test $(MAX_JOBS) -lt 4 && echo $(MAX_JOBS) || echo 4)
PYTEST = $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK = 1

SOURCES := $(shell find csrc -type f 2>/dev/null)
CLANG_FORMATTED = $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.hpp')
# Without a build environment of its own, pip uses the torch in .venv and does not fetch a second one.
INSTALL = $(BIN)/python -m pip install -q --no-build-isolation

.PHONY: help bench train test sanitize gpu lint format check build clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

bench: $(VENV)/.bench  ## build, then run the quick benchmark (ARGS="..." instead of --quick for others)
	$(BIN)/python benchmarks/bench.py $(or $(ARGS),--quick)

train: $(VENV)/.bench  ## build, then train small networks on real images, plain and fused
	$(BIN)/python benchmarks/train.py $(ARGS)

test: $(VENV)/.test  ## build, then run the tests (ARGS="-k name" for some, "-n 0 --pdb" for a debugger)
	$(PYTEST) $(ARGS)

sanitize: $(VENV)/.test  ## the CUDA kernels under address and undefined-behaviour sanitizers, on the CPU
	$(PYTEST) -q tests/test_cuda_sanitized.py tests/simt/test_simt.py $(ARGS)

# On a machine with a GPU and the CUDA toolkit: everything that only such a machine can show.
gpu: export CBAM_FUSED_CUDA = 1
gpu: $(VENV)/.test $(VENV)/.bench  ## with a GPU: all tests, compute-sanitizer's four tools, and the benchmark's bars
	$(BIN)/python benchmarks/gpu.py $(ARGS)

lint: $(VENV)/.lint  ## ruff, clang-format and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CLANG_FORMATTED),$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMATTED))
	$(BIN)/mypy

format: $(VENV)/.lint  ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CLANG_FORMATTED),$(BIN)/clang-format -i $(CLANG_FORMATTED))

check: $(VENV)/.build  ## what this machine has, and a self-check of every available backend
	$(BIN)/python -m cbam_fused

build: $(VENV)/.build  ## .venv with the package in it, native modules compiled

clean:  ## remove what was built; .venv too
	rm -rf $(VENV) build cbam_fused/*.so *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A python3 without ensurepip (Debian's, for one) still makes an environment; pip then fills it.
$(VENV)/.torch:
	@echo "[1/3] $(VENV): torch and build tools"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	$(BIN)/python -m pip install $(if $(CI),-q) "torch>=2.10" "setuptools>=77" ninja numpy
	@touch $@

# build_ext by itself first, because pip would hide its progress; pip then finds the objects made. A path in the
# environment, not setuptools' finder: from this folder's parent, that finder would lose to the folder's own name.
$(VENV)/.build: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	@echo "[2/3] native modules"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	@PATH="$(abspath $(BIN)):$$PATH" $(INSTALL) --no-deps --config-settings editable_mode=compat -e .
	@touch $@

$(VENV)/.bench $(VENV)/.test $(VENV)/.lint: $(VENV)/.%: $(VENV)/.build pyproject.toml
	@echo "[3/3] what $* needs"
	@$(BIN)/python -m pip install -q $$($(BIN)/python -c 'import importlib.metadata as m; \
		print(*(r.split(";")[0].strip() for r in m.requires("cbam-fused") if "extra == \"$*\"" in r))')
	@touch $@
