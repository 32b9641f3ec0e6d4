# Every target sets up what it needs on a machine with only Python >= 3.10, g++ and make, and does so once:
# tools and pinned packages in .venv, the op library by ninja. Pass on options with ARGS="...".

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
READY_214 := .venv-torch214/.ready
PEERS := .venv-peers
# --no-compile: Python compiles the few modules that are used when it first imports them.
PIP_INSTALL := -m pip install -qq --no-compile --disable-pip-version-check

.PHONY: help setup build build-cuda verify-gpu-kernels ptx compare test test-cpu test-triton test-full kernel-report mutations mutations-cuda mutations-ptx lint format bench training peers gpu torch214 wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make compare    eager PyTorch and fused kernels side by side: error, latency, tokens/s, memory"
	@echo "make test       the tests, but for those marked slow; make test-full runs all"
	@echo "make kernel-report   registers, stack, spills, shared memory and tensor cores of every GPU kernel that is built"
	@echo "make mutations  plants mistakes in the Triton kernels, which the tests must find; make mutations-cuda in CUDA's"
	@echo "make mutations-ptx  the same mistakes, which runs of what is compiled must find"
	@echo "make lint       ruff check and format check; make format mends what it can"
	@echo "make bench      the microbenchmarks of each op against eager"
	@echo "make training   training steps of BERT and GPT-2, attention and loss against eager: time and peak memory"
	@echo "make peers      encoders and GPT-2 on CPUs against ONNX Runtime, OpenVINO, CTranslate2 and torch.compile (bench/results)"
	@echo "make gpu        on an NVIDIA or AMD GPU: what it can do, are the kernels right, how fast are they (gpu.json, gpu.png)"
	@echo "make verify-gpu-kernels   the CUDA kernels on a simulator, under checks and sanitizers"
	@echo "make ptx        what nvcc and Triton made of the kernels, run by an interpreter: docs/ptx.md"
	@echo "make build-cuda the library of CUDA kernels, in place; needs the CUDA toolkit, but no GPU"
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
	FASTFORMER_CUDA=0 $(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# Without the CUDA kernels, for which compare and test would wait minutes: build-cuda.
build: $(READY)
	@FASTFORMER_CUDA=0 $(BIN)/python setup.py --quiet build_ext --inplace

# Wants the CUDA toolkit, no GPU: the library loads in any torch >= 2.10 and runs in one with CUDA.
build-cuda: $(READY)
	FASTFORMER_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace

# The CUDA kernels, compiled by g++, on a simulator under checks and sanitizers: docs/sim.md. Then, unless it is to be
# --quick, what nvcc and Triton made of the kernels: docs/ptx.md.
verify-gpu-kernels: build
	$(BIN)/python tests/sim/verify.py $(ARGS)
	$(if $(filter --quick,$(ARGS)),,$(BIN)/python -m pytest tests/sim/ptx)

# The first time nvcc compiles for some minutes; what lacks nvcc or triton is skipped.
ptx: build
	$(BIN)/python -m pytest tests/sim/ptx $(ARGS)

compare: build
	$(BIN)/fastformer compare $(ARGS)

# The Triton kernels compute in an interpreter, which wants a process of its own: docs/verification.md.
INTERPRETED := TRITON_INTERPRET=1 FASTFORMER_BACKEND=triton OMP_NUM_THREADS=1

test: test-cpu test-triton

test-cpu: build
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-triton: build
	$(INTERPRETED) $(BIN)/python -m pytest tests/ops tests/kernels -m "not slow" $(ARGS)

test-full: build
	$(BIN)/python -m pytest $(ARGS)
	$(INTERPRETED) $(BIN)/python -m pytest tests/ops tests/kernels $(ARGS)

kernel-report: build
	$(BIN)/python tests/kernels/report.py $(ARGS)
	$(BIN)/python tests/sim/resources.py

mutations: build
	$(BIN)/python tests/kernels/mutations.py $(ARGS)

mutations-cuda: build
	$(BIN)/python tests/sim/cuda_mutations.py $(ARGS)

mutations-ptx: build
	$(BIN)/python tests/sim/ptx_mutations.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: build
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

training: build
	PYTHONPATH=. $(BIN)/python bench/training.py $(ARGS)

# The peers' packages lie apart, so that those of .venv stay as they are.
$(PEERS)/.ready: bench/peers/requirements.txt constraints.txt $(READY)
	$(BIN)/python $(PIP_INSTALL) --upgrade --target $(PEERS) -c constraints.txt -r bench/peers/requirements.txt
	@touch $@

peers: build $(PEERS)/.ready
	PYTHONPATH=.:$(PEERS) $(BIN)/python bench/peers/run.py $(ARGS)

# With a torch of your own (ROCm, say): PYTHONPATH=. python bench/gpu.py
gpu: build
	PYTHONPATH=. $(BIN)/python bench/gpu.py $(ARGS)

wheel: build
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

$(READY_214): Makefile
	$(PYTHON) -m venv .venv-torch214
	.venv-torch214/bin/python $(PIP_INSTALL) torch==2.14.1 numpy safetensors pytest hypothesis
	@touch $@

torch214: build $(READY_214)
	$(BIN)/python tests/packaging/two_torches.py save build/two_torches.pt
	.venv-torch214/bin/python tests/packaging/two_torches.py compare build/two_torches.pt
	.venv-torch214/bin/python -m pytest -q tests/packaging/test_cuda_library.py  # the CUDA library, too, where it is built

clean:
	rm -rf build dist *.egg-info fastformer/*.so fastformer/*library_not_built.txt
