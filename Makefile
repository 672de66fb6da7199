# Every target sets itself up in .venv; Python 3.11 or later (with its venv module) and make are all that must be there.
# A stamp in .venv says what is installed; changing pyproject.toml or constraints.txt installs again.

.DEFAULT_GOAL := help
.PHONY: help quickstart systems test test-slow test-quickstart test-hosts test-torch test-compile lint format clean

VENV := .venv
BIN := $(VENV)/bin
# python3 where it is new enough, otherwise a newer one beside it; `make PYTHON=/path/to/python3.12 ...` overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
LINTED := silkie_jax data_prep benchmarks examples tests
# `make test TEST="tests/nn -k lora"` runs some of the tests.
TEST ?= tests
# Processes of `make test` and `make test-slow`; each takes up to 6 GB.
WORKERS ?= 2
PARALLEL := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed-data,evaluation  ## preference distillation from end to end, minutes on two cores; QUICKSTART=--fast in small
	$(BIN)/python -m examples.quickstart $(QUICKSTART)

systems: $(VENV)/.installed-data,evaluation,serve  ## the related systems beside the quickstart, and a table of all; SYSTEMS=--fast in small
	$(BIN)/python -m examples.systems $(SYSTEMS)

test: $(VENV)/.installed-dev  ## the test suite, but for slow tests; TEST="PATH -k WORD" for some of it
	$(PARALLEL) -m "not slow and not hosts and not quickstart" $(TEST)

test-slow: $(VENV)/.installed-dev  ## its slow tests: kills, whole runs, benchmarks, many meshes
	$(PARALLEL) -m "slow and not hosts and not quickstart" $(TEST)

test-quickstart: $(VENV)/.installed-dev  ## the quickstart in small, killed again and again, and the related systems
	$(BIN)/python -m pytest -m quickstart tests/examples

test-hosts: $(VENV)/.installed-dev  ## the tests of several processes; wants four quiet cores
	$(BIN)/python -m pytest -m hosts tests/training/test_hosts.py

test-torch: $(VENV)/.installed-dev-torch  ## the tests that need the torch extra (and PEFT)
	$(BIN)/python -m pytest $$(grep -rlE 'importorskip\(.torch' tests --include='test_*.py')

test-compile: $(VENV)/.installed-dev-tpu  ## compiles pod configs at full size with the TPU compiler (brings libtpu)
	$(BIN)/python -m pytest tests/forecast/test_forecast.py -k fits_pods

lint: $(VENV)/.installed-dev  ## ruff (lint and format) and mypy
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

clean:  ## remove .venv, caches and what the quickstart wrote
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info runs/quickstart

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "silkie_jax needs Python 3.11 or later, but python3 is" \
		"$$(python3 --version 2>&1). Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "silkie_jax needs Python 3.11 or" \
		"later, but $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it" \
		"(Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Extras: .installed-dev, .installed-dev-torch, .installed-data,evaluation
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	$(INSTALL) '.[$*]'
	@touch $@
