# make demo   sets up .venv and runs the main job on a small real model (README)
# make test   sets up .venv and runs the tests
# make test-slow  sets up .venv and runs what takes minutes: runs over several processes, runs that are killed
# make test-engines  sets up .venv-engines with vLLM's CPU build and llama.cpp, and serves exported heads in them
# make check  lint, format, types, and the wheel

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
ENGINES ?= .venv-engines

.PHONY: demo test test-slow test-engines check setup
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

test-slow: setup
	$(BIN)/python -m pytest -m slow tests/training

# vLLM brings versions of its own. PyPI's torchvision and its kin are CUDA builds, which fail to import beside a CPU torch;
# Qwen3.5 needs torchvision's Python part (tests/engines/sitecustomize.py does the rest).
$(ENGINES)/ready: tests/engines/requirements.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	$(ENGINES)/bin/pip uninstall --quiet --yes torchaudio torchvision torchcodec
	$(ENGINES)/bin/pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0
	touch $@

test-engines: setup $(ENGINES)/ready
	BEBOP_ENGINE_PYTHON=$(CURDIR)/$(ENGINES)/bin/python $(BIN)/python -m pytest -m engine tests/engines

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/python -m tests.wheel dist
