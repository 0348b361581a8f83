# make quickstart   trains, merges and compares small experts on handwritten digits
# make test         formatting, lint, types and tests
#
# Each target makes the virtual environment that it needs; nothing has to be done first.
#   PYTHON=python3.12     which Python (3.11 or newer)
#   VENV=.venv            where the environment goes
#   OUT=folder            where the quickstart writes
#   WORKERS=auto          how many processes run the tests (auto: one per core)
#   PYTEST="-k ties -x"   arguments for pytest

PYTHON ?= python3
VENV ?= .venv
OUT ?= jaxmerge-quickstart
WORKERS ?= auto
PYTEST ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
METADATA := pyproject.toml setup.py
# mypy follows no package-dir mapping: it is shown the package as it will be installed.
TYPES := build/types

.PHONY: help quickstart test test-torch lint format clean

help:
	@awk '!/^#/ { exit } { sub(/^# ?/, ""); print }' Makefile

quickstart: $(VENV)/.package
	$(BIN)/jaxmerge quickstart "$(OUT)"

test: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 $(PYTEST)

# The same with PyTorch, transformers, peft and gguf, so that the tests that need them run too.
test-torch: $(VENV)/.torch
	$(MAKE) test

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPES)
	mkdir -p $(TYPES)/jaxmerge
	ln -s "$(CURDIR)"/jaxmerge/* "$(CURDIR)/converters" $(TYPES)/jaxmerge/
	bin=$$(cd "$(BIN)" && pwd) && cd $(TYPES) && \
	"$$bin/mypy" --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis jaxmerge-quickstart
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: each says that something is installed, and is made again when the metadata changes.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("jaxmerge needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv --clear "$(VENV)"
	touch $@

$(VENV)/.package: $(VENV)/.made $(METADATA)
	@echo "Installing jaxmerge into $(VENV); the first time takes a few minutes"
	$(PIP) install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.made $(METADATA)
	@echo "Installing jaxmerge and its test tools into $(VENV); the first time takes a few minutes"
	$(PIP) install --quiet --editable ".[test]"
	touch $@ $(VENV)/.package

$(VENV)/.torch: $(VENV)/.test
	$(PIP) install --quiet --editable ".[torch,lora,gguf]"
	touch $@
