# Two commands need nothing but Python and make on a fresh machine:  make demo   make test
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2

BIN := $(VENV)/bin
# The tests' workers are processes: one thread each keeps them from fighting for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo test static lint clean

demo: $(VENV)/.installed
	$(BIN)/normbt train

test: $(VENV)/.installed-dev
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels
	$(PYTEST) tests

static: $(VENV)/.installed-dev
	$(BIN)/python -m bench static --check

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and pinned: the version that the tests ran with, and pip then changes nothing about it.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[train,plot]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
