# Verbs for people: make demo | test | lint | bench | networks | clean
# Each makes the environment that it needs in .venv; PYTHON and TORCH choose another interpreter or
# PyTorch (TORCH=torch takes the newest, with CUDA).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)

# Threads that wait by spinning cost everybody on a busy machine: 30 times the time was seen.
export OMP_WAIT_POLICY ?= passive

# Where nvcc is, so much proves that the CUDA kernels build; `pip install .` builds for every GPU,
# which takes minutes.
export HARMONIZER_CUDA_ARCHS ?= 80 90 100

.PHONY: demo test lint bench networks clean install
.DELETE_ON_ERROR:

# PyTorch first and by name: a dependency that asks for "any torch" must find one.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" numpy

# PyTorch by name beside it: torchvision would replace it.
$(VENV)/installed-%: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]" "$(TORCH)"
	touch $@

install: $(VENV)/installed-train

demo: $(VENV)/installed-train
	$(BIN)/python python/demo.py

# Two to four processes, each with tests that lie side by side, so that they share what they build.
PYTEST ?= -n logical --maxprocesses 4 --dist worksteal
test: $(VENV)/installed-train,test $(VENV)/parity
	$(BIN)/python -m pytest $(PYTEST)

# The authors' TensorFlow package is the oracle. Without it the parity tests run on golden values.
$(VENV)/parity: $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "tensorflow-cpu>=2.16"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "harmonization==0.0.9"
	touch $@

# Linters read the sources: nothing is built for them.
lint: export HARMONIZER_NATIVE := 0
lint: $(VENV)/installed-lint
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files csrc tests/native | grep -E '\.(h|cpp|cu|cuh)$$')

# make bench BENCH="--only loss" measures a part; python bench/run.py --help says the rest.
bench: $(VENV)/installed-test,bench $(VENV)/timm
	$(BIN)/python bench/run.py $(BENCH)

# Twelve minutes: every timm family's gradients against float64 oracles.
networks: $(VENV)/installed-test $(VENV)/timm
	$(BIN)/python python/check_networks.py --output docs/networks.md

# PyTorch by name beside it: alone, timm would replace it.
$(VENV)/timm: $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check timm "$(TORCH)"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info harmonizer_ext/_native*.so .pytest_cache .ruff_cache .mypy_cache
