# Every target runs in a virtual environment of its own, made on first use and again when the requirements change.

PYTHON ?= python3
VENV ?= .venv
VENV_XLA ?= .venv-xla
VENV_DEEPSPEED ?= .venv-deepspeed
# What `make demo` and `make bench` run: arguments for python, from the top of the repository.
DEMO ?= examples/train_lm.py --strategy accel_zero2 --devices 2
BENCH ?= -m benchmarks --quick

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_XLA := $(VENV_XLA)/.installed
INSTALLED_DEEPSPEED := $(VENV_DEEPSPEED)/.installed-deepspeed
# A process for each file: one with all tests has crashed after 136 of them, in the unwinder of C++ exceptions.
XLA_TESTS := $(shell grep -lE "mark\.xla" tests/core/xla/test_*.py tests/strategies/xla/test_*.py tests/benchmarks/test_benchmark_xla.py)
DEEPSPEED_TESTS := $(shell grep -rlE --include='test_*.py' 'NEEDS_DEEPSPEED|(find_spec|importorskip)."deepspeed' tests)
# mypy knows nothing of package-dir: this link gives it strategies/ under the name it is imported by.
MYPY_LINK := .mypy_path/lightning_accel/strategies

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-xla test-deepspeed matrix lint bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(INSTALLED) ## create the environment (.venv): pinned requirements and this project

$(INSTALLED): requirements-dev.txt pyproject.toml
	@echo "Installing requirements-dev.txt into $(VENV): some minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED) ## train a small language model with accel_zero2 on two processes
	$(BIN)/python $(DEMO)

test: $(INSTALLED) ## run the tests, without the slow matrices
	$(BIN)/python -m pytest

matrix: $(INSTALLED) ## run the slow matrices of settings
	$(BIN)/python -m pytest -m matrix --durations=25

test-xla: $(INSTALLED_XLA) ## run the XLA tests on four virtual CPU devices, in an environment of their own (7 GB)
	@export PJRT_DEVICE=CPU CPU_NUM_DEVICES=4; for file in $(XLA_TESTS); do \
		$(VENV_XLA)/bin/python -m pytest -m xla $$file || exit; \
	done

$(INSTALLED_XLA): requirements-xla.txt pyproject.toml
	@echo "Installing requirements-xla.txt into $(VENV_XLA): 7 GB, as torch 2.9 comes with CUDA; some minutes."
	$(PYTHON) -m venv $(VENV_XLA)
	$(VENV_XLA)/bin/python -m pip install --quiet --requirement requirements-xla.txt
	$(VENV_XLA)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-deepspeed: $(INSTALLED_DEEPSPEED) ## run the tests beside DeepSpeed, in an environment of their own that has it
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(VENV_DEEPSPEED)/bin/python -m pytest -m "" --durations=10 $(DEEPSPEED_TESTS)

$(INSTALLED_DEEPSPEED): requirements-deepspeed.txt requirements-dev.txt pyproject.toml
	@echo "Installing requirements-deepspeed.txt into $(VENV_DEEPSPEED): some minutes the first time."
	$(PYTHON) -m venv $(VENV_DEEPSPEED)
	$(VENV_DEEPSPEED)/bin/python -m pip install --quiet --requirement requirements-deepspeed.txt
	$(VENV_DEEPSPEED)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lint: $(INSTALLED) $(MYPY_LINK) ## ruff check, ruff format --check and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(MYPY_LINK):
	@mkdir -p $(@D)
	@ln -s ../../strategies $@

bench: $(INSTALLED) ## run the quick benchmarks
	$(BIN)/python $(BENCH)

clean: ## remove what builds and tools leave behind, but not the environment
	rm -rf build dist *.egg-info .mypy_path .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(wildcard lightning_accel strategies tests examples benchmarks) -name __pycache__ -prune -exec rm -rf {} +
