# The whole life of a checkout. `make demo` and `make test` need only Python, git and make; each sets up everything.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A machine without any linker gets one from PyPI.
EXTRAS := dev$(shell command -v ld.lld ld cc >/dev/null || echo ',cross')

.PHONY: help setup demo test lint check bench zoo clean
.DEFAULT_GOAL := help

help:
	@echo 'make setup   .venv with cnncc, cnncc-runtime (editable) and all that tests need'
	@echo 'make demo    train, compile, verify and benchmark the digits CNN, then classify a PNG'
	@echo 'make test    the whole test suite'
	@echo 'make check   ruff, mypy, import-linter, then the fast tests'
	@echo 'make bench   benchmarks against peers'
	@echo 'make zoo     every architecture, light and heavy'
	@echo 'make clean   remove .venv and build outputs'

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml runtime/pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cnncc needs Python 3.10 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0  # first, so that nothing pulls a newer one
	$(BIN)/pip install --quiet --disable-pip-version-check -e runtime -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/python examples/digits/demo.py

test: setup
	$(BIN)/pytest -m 'not zoo'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(BIN)/pytest -q -m 'not slow and not zoo'

bench: setup
	$(BIN)/python benchmarks/peers.py

zoo: setup
	$(BIN)/pytest -m 'zoo or slow' tests/zoo

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
