# make train: set up what is missing and train a real model.  make test: set up and test every part.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= python3.11
BIN := .venv/bin
CACHE := $(or $(LORELEI_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lorelei)
MODEL := $(CACHE)/models/HuggingFaceTB--SmolLM2-135M-Instruct/config.json

# in two processes with a thread each: as many cores as CI has; in the order of the folders, which
# has the long tests of servers and whole runs first, so that both processes end at once
PYTEST := $(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist loadgroup --no-loadscope-reorder

.PHONY: train test test-all unit lint curve bench page peers setup model vllm sglang megatron acceptance clean

train: setup model
	$(BIN)/lorelei train recipes/chain_sum/run.yaml $(ARGS)

# every part of it, in about 12 minutes on 2 cores
test: lint setup model
	$(PYTEST) -m "not slow and not matrix" $(ARGS)

# what `make test` leaves out: all engines, servers, kills
test-all: setup model
	$(PYTEST) -m "slow and not matrix" $(ARGS)

unit: setup
	$(PYTEST) tests/unit -m "not slow and not matrix" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# three seeds of the main job, about 15 minutes on 2 cores; draws docs/learning_curve.png
curve: setup model
	$(BIN)/python -m benchmarks.learning_curve $(ARGS)

# all benchmarks but the GPU's, hours on 2 quiet cores; ARGS='grpo_step 2x8': one, or one case of it
bench: setup model peers
	$(BIN)/python -m benchmarks $(ARGS)

# writes docs/benchmarks.md from benchmarks/results
page: setup
	$(BIN)/python -m benchmarks page

# the long matrices over all engines, on a quiet machine; ARGS='on vllm tiny': one engine's
acceptance: setup model vllm sglang megatron
	$(if $(ARGS),,$(PYTEST) -m matrix)
	$(BIN)/python -m acceptance $(ARGS)
	$(BIN)/python -m acceptance page

peers: setup
	$(BIN)/python -m benchmarks.peers.environment

# their own virtual environments in the cache folder, about 5 minutes each; prints the interpreter
vllm sglang megatron:
	@$(PYTHON) -m lorelei.venvs $@

setup: .venv/installed

# torch first and by its version: any other way may bring gigabytes of CUDA to a machine without a GPU
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

model: setup $(MODEL)

$(MODEL):
	$(BIN)/python scripts/fetch_model.py $(CACHE)/models

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache
