# Everything runs inside .venv, which the first command creates; nothing to activate.
#   make demo    install, pretrain a small GPT on text that comes with Python, let it write
#   make test    install what the tests need, run them all
#   make check   lint, format and types
#   make bench   cost per recorded op on this machine
#   make gpu     on a machine with an NVIDIA GPU: are the kernels right, and how fast (8 minutes)?
#                It installs nothing and uses the Python at hand: make gpu PYTHON=python3
# Another Python: make demo PYTHON=python3.12

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check format bench gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.plots
	$(BIN)/tinygrad-llm pretrain gpt --preset demo

test: $(VENV)/.test
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.plots
	$(BIN)/python benchmarks/op_overhead.py

gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "tinygrad_llm needs Python 3.11 or newer on the PATH (or: make PYTHON=/path/to/python)."; exit 2; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras: an install runs again only when pyproject.toml changes.
$(VENV)/.plots: $(BIN)/python pyproject.toml
	$(PIP) install --editable '.[plots]'
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(PIP) install --editable '.[test]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(PIP) install --editable '.[test,dev]'
	@touch $@
