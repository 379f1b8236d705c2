# make demo   sets up .venv and runs the main job on a small real model (README)
# make test   sets up .venv and runs the tests
# make check  lint, format, types, and the wheel

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check setup
.DELETE_ON_ERROR:

setup: $(VENV)/ready

# Made anew when the dependencies change; constraints.txt pins what the tests were run with.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo.sh

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/python -m tests.wheel dist
