# Every target sets up what it needs on a machine with only Python >= 3.10, g++ and make, and does so once:
# tools and pinned packages in .venv, the op library by ninja. Pass on options with ARGS="...".

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
READY_214 := .venv-torch214/.ready
# --no-compile: Python compiles the few modules that are used when it first imports them.
PIP_INSTALL := -m pip install -qq --no-compile --disable-pip-version-check

.PHONY: help setup build compare test test-full lint format bench torch214 wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make compare    eager PyTorch and fused kernels side by side: error, latency, tokens/s, memory"
	@echo "make test       the tests, but for those marked slow; make test-full runs all"
	@echo "make lint       ruff check and format check; make format mends what it can"
	@echo "make bench      the microbenchmarks of each op against eager"
	@echo "make build      the op library, in place; make wheel puts it in dist/"
	@echo "make torch214   the same built library in torch 2.14.1 (a large download)"
	@echo "make clean      removes what was built; the environments .venv* stay"

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed: make PYTHON=python3.x" if sys.version_info < (3, 10) else 0)'
	@echo "== Setting up .venv (torch is a large download)"
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt torch ninja setuptools
	@echo "== Building the op library and installing fastformer in place"
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

build: $(READY)
	@$(BIN)/python setup.py --quiet build_ext --inplace

compare: build
	$(BIN)/fastformer compare $(ARGS)

test: build
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-full: build
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: build
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

wheel: build
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

$(READY_214): Makefile
	$(PYTHON) -m venv .venv-torch214
	.venv-torch214/bin/python $(PIP_INSTALL) torch==2.14.1 numpy safetensors
	@touch $@

torch214: build $(READY_214)
	$(BIN)/python tests/packaging/two_torches.py save build/two_torches.pt
	.venv-torch214/bin/python tests/packaging/two_torches.py compare build/two_torches.pt

clean:
	rm -rf build dist *.egg-info fastformer/*.so fastformer/library_not_built.txt
