# `make help` lists the targets. They need git, make and a python3 of 3.10 or newer, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## build .venv with everything that the other targets need

# PyTorch goes first and by its exact version, so that the largest download is neither repeated nor replaced.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Hesse needs Python 3.10 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) -e '.[dev,data]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

demo: $(STAMP) ## compress the model that ships with Hesse and show the report
	$(BIN)/hesse demo

test: $(STAMP) ## run the tests that are not marked slow: about five minutes
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP) ## run the tests that are marked slow, which `make test` leaves out
	$(BIN)/python -m pytest -m slow

lint: $(STAMP) ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## run the benchmarks: hours, and environments for the peers
	$(BIN)/python bench/run.py
	$(BIN)/python bench/curvature.py
	$(BIN)/python bench/curvature_peers.py
	$(BIN)/python bench/planning.py

docs: $(DOCS_STAMP) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests bench scripts -type d -name __pycache__ -prune -exec rm -rf {} +
