# make demo and make test need Python 3.10 to 3.13 with its venv module, pip and make; everything else goes into .venv.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2# test processes
ARGS   ?=# more arguments for demo, test, test-slow and bench

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
# One thread a process: the tests run side by side, and small tensors gain nothing from more.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MPLBACKEND=Agg

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format test-slow bench docs clean

help:
	@echo "make demo        train on scikit-learn's digits, sample along the geometry, report"
	@echo "make test        lint, types, tests with doctests"
	@echo "make coverage    the tests again, and which lines they do not reach: a fifth longer"
	@echo "make test-slow   the tests that take minutes; some need data (RIEMVAE_DATA=folder with shapes180.npz)"
	@echo "make lint        lint and types alone;  make format  puts the source in order"
	@echo "make bench       measure against the peer library"
	@echo "make docs        build the documentation site into docs/_build/html"
	@echo "make clean       remove what was built, except $(VENV)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "riemvae needs Python 3.10 to 3.13: make $(MAKECMDGOALS) PYTHON=/path/to/python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# A stamp is younger than the files that say what to install, or pip runs again.
$(VENV)/.installed: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-%: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) -e '.[$*]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/riemvae demo $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy riemvae

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

coverage: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --cov --cov-report=term --cov-fail-under=95 $(ARGS)

test-slow: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

bench: $(VENV)/.installed-bench
	$(ONE_THREAD) $(BIN)/python benchmarks/run.py $(ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage docs/_build docs/tutorials
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
