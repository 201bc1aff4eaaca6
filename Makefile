# make install | demo | test | test-all | lint | bench | clean
#
# Each target first makes its own virtual environment, .venv, from nothing; the next call finds it ready. Variables:
#   PYTHON=python3.12    the Python to build it with (3.10 or newer)
#   VENV=DIR             where it goes
#   DALI=cuda12|cuda13   the DALI wheel; by default the one of torch's CUDA, cuda13 without CUDA (it decodes on the CPU too)
#   JOBS=2               processes that run tests
# On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA libraries.

ifneq ($(words $(CURDIR)),1)
$(error the path of this checkout holds spaces, which make cannot handle: move it, $(CURDIR))
endif

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
DALI ?= $$($(BIN)/python -c 'import torch; print("cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda13")')

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# DeepSpeed builds its CPU communication at first use and looks for ninja on the PATH.
export PATH := $(BIN):$(PATH)
# Its build belongs to this environment: environments that share one rebuild it in turns, and wait for each other's locks.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

# An environment of a moved checkout, or whose Python is gone, is not ready.
$(shell [ "$$(cat $(STAMP) 2>&1)" = "$(CURDIR)" ] && [ -x $(BIN)/python ] || rm -f $(STAMP))

.PHONY: help demo test test-all lint bench clean install

help:
	@echo "make install   make the environment, .venv, alone; the other targets do so by themselves"
	@echo "make demo      render videos, pretrain, evaluate and report, on the CPU"
	@echo "make test      the tests, slow ones left out"
	@echo "make test-all  every test"
	@echo "make lint      style and types"
	@echo "make bench     the benchmarks"
	@echo "make clean     remove the environment, caches and build output; runs/ stays"

install: $(STAMP)

# What the machine must bring, each with one sentence on what to install.
define check_machine
@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) found; install Python 3.10 or newer, or name one with make PYTHON=..." >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) --version 2>&1) is too old; install Python 3.10 or newer and name it with make PYTHON=..." >&2; exit 1; }
@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
@command -v "$${CXX:-c++}" >/dev/null || { echo "error: no C++ compiler, which DeepSpeed needs for its communication on the CPU; install g++ (Debian, Ubuntu: apt install g++)" >&2; exit 1; }
@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "error: Python.h is missing, which DeepSpeed's communication on the CPU is compiled against; install Python's headers (Debian, Ubuntu: apt install python3-dev)" >&2; exit 1; }
@[ ! -e $(VENV) ] || [ -e $(VENV)/pyvenv.cfg ] || [ $(VENV) = .venv ] || { echo "error: VENV=$(VENV) exists and is no virtual environment; name another place" >&2; exit 1; }
endef

# The stamp is written last: an install that was cut off leaves none, and the next one starts over (pip's cache keeps it short).
# torch and the build tools come first, because DeepSpeed's set-up looks at them; hence no build isolation either.
$(STAMP): setup.py CMakeLists.txt $(wildcard kernels/csrc/*) pyproject.toml constraints.txt xkd_fast/__init__.py
	$(check_machine)
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	@[ -e $@ ] || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	@$(PIP) torch setuptools wheel ninja cmake packaging py-cpuinfo
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@$(PIP) --no-build-isolation --editable ".[$(DALI),test,dev]"
	@echo "$(CURDIR)" > $@

demo: $(STAMP)
	@$(BIN)/xkd-fast demo

# One thread per process: the machine is shared by the test processes, and by the ranks that some tests start.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-all: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: $(STAMP)
	@$(BIN)/python -m pytest benchmarks --benchmark -s -rs $(PYTEST_ARGS)

clean:
	@[ ! -e $(VENV) ] || [ -e $(VENV)/pyvenv.cfg ] || [ $(VENV) = .venv ] || { echo "error: VENV=$(VENV) is no virtual environment, so it stays" >&2; exit 1; }
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
