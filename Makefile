# `make help` lists what can be made. The first `quickstart` or `test` creates .venv and installs the pinned versions of
# constraints.txt into it; later ones start at once, until setup.py or constraints.txt changes.

PYTHON ?= python3
PIP_OPTIONS ?=
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_OPTIONS)

BASE := $(VENV)/.base-installed
DEV := $(VENV)/.dev-installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-jobs test-others faults lint clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 20
	@echo
	@echo "  PYTHON=python3.12     the interpreter that .venv is made from (3.11 or newer)"
	@echo "  PIP_OPTIONS=...       further options of pip, for example another package index"

quickstart: $(BASE)  ## train a small LLaMA from raw text on this machine, resume it in another layout, sample
	$(VENV_PYTHON) examples/quickstart/quickstart.py

PYTEST := OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -m "not gpu and not slow"

test: $(DEV)  ## run the tests that need no GPU
	@$(MAKE) --no-print-directory --jobs=2 --keep-going test-jobs test-others

# Real SLURM and MPI jobs wait for most of their time, so they run beside the others, one after the other.
test-jobs: $(DEV)
	$(PYTEST) -v tests/jobs

test-others: $(DEV)
	$(PYTEST) tests --ignore=tests/jobs -n auto --durations=40 --durations-min=4

faults: $(DEV)  ## run the whole fault suite (20 to 30 minutes), which writes docs/results/faults.md
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m tests.faults --output docs/results/faults.md

lint: $(DEV)  ## check the code with ruff
	$(VENV_PYTHON) -m ruff check .

clean:  ## remove .venv and the caches of the tools
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build megatron_llama.egg-info

# torch and the build tool come first, so that the package itself needs no build environment of its own.
$(BASE): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; give another one with: make PYTHON=python3.12 ...")'
	@echo "[1/3] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] installing torch (the largest download, once)"
	@$(PIP) setuptools torch
	@echo "[3/3] installing megatron-llama and what it needs"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(DEV): $(BASE)
	@echo "installing the tools of the tests"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
