# `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Overridable: make install EXTRAS=dev    make test JOBS=4
EXTRAS ?= dev,train,eval,app,quant
JOBS ?= 2
# Extra options for pip, for example the index or the folder where your platform's CPU build of torch lies.
PIP_ARGS ?=

BIN := .venv/bin
PYTHON := $(BIN)/python
STAMP := .venv/.installed
TORCH_PIN := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
SOURCES := $(wildcard oft_diffusion train_scripts tests benchmarks app)
# Small tensors: threads of two workers on the same cores only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal
# Each profile would write two lines of its own otherwise.
QUIET := KINETO_LOG_LEVEL=99
# A part of make test-full alone, with a log of its own: TESTS="-m slow tests/app" FULL_LOG=docs/logs/test-app.log
TESTS ?=
FULL_LOG ?= docs/logs/test-full.log

.PHONY: help install demo app test test-full test-gpu bench bench-gpu lint types format wheel constraints clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

install: $(STAMP)  ## .venv with the pinned dependencies and this package, editable

# The first of these that runs and is new enough. Python 3.10 works, but constraints.txt pins torch alone there.
$(PYTHON):
	@for candidate in python3 python3.11 python3.12 python3.13 python3.10; do \
	  if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	    echo "creating .venv with $$("$$candidate" --version)"; \
	    "$$candidate" -m venv .venv; exit 0; \
	  fi; \
	done; \
	echo "no Python >= 3.10 with the venv module found; on Debian: apt-get install python3-venv" >&2; exit 1

$(STAMP): pyproject.toml constraints.txt | $(PYTHON)
	@# torch first: with the pinned one in place, nothing that needs torch can bring in another.
	$(PYTHON) -m pip install $(PIP_ARGS) -c constraints.txt "torch==$(TORCH_PIN)"
	$(PYTHON) -m pip install $(PIP_ARGS) -c constraints.txt -e ".[$(EXTRAS)]"
	@$(PYTHON) -c 'import sys, torch; found = torch.__version__; print("torch", found); \
	  sys.exit(0 if found.split("+")[0] == "$(TORCH_PIN)" else f"torch is {found}, but constraints.txt pins $(TORCH_PIN)")'
	@touch $@

demo: install  ## DreamBooth on the pocket base: a before/after grid and a report
	@$(PYTHON) train_scripts/demo.py

app: install  ## the web app on the pocket base
	@$(BIN)/oft-diffusion app --open

test: install  ## the quick tests (minutes): seeded samples of the property tests
	HYPOTHESIS_PROFILE=quick $(PYTEST) -m "not slow and not gpu" --durations=25

# Paths of this machine are taken out of the log, since it is committed.
test-full: install  ## everything that this machine can run; writes docs/logs/test-full.log
	@mkdir -p $(dir $(FULL_LOG))
	@HYPOTHESIS_PROFILE=full $(PYTEST) $(TESTS) --durations=15 2>&1 \
	  | sed -u -e "s#$(CURDIR)#.#g" -e "s#$${HOME:-/nonexistent}#~#g" | tee $(FULL_LOG)

bench: install  ## speed and memory beside LoRA and others, on this processor, idle: 13 minutes a call, the next goes on
	$(QUIET) $(PYTHON) -m benchmarks.speed || test $$? = 3  # not all of it, yet
	@$(PYTHON) -m benchmarks.speed --table

bench-gpu: install  ## the same on a CUDA card, its kernels, and what the presets by memory take, in 20 minutes: never run whole yet
	@$(PYTHON) -m benchmarks.on_card || ended=$$?; $(PYTHON) -m benchmarks.speed --table; exit $${ended:-0}

test-gpu: install  ## the tests that need a CUDA card, and the quantized bases on it
	HYPOTHESIS_PROFILE=quick $(BIN)/pytest -m gpu
	HYPOTHESIS_PROFILE=quick $(BIN)/pytest -m "not slow" $(addprefix tests/quantization/test_,backends.py numerics.py frozen.py gguf.py streaming.py)

lint: install  ## ruff: rules and format; hadolint: the Dockerfile
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/hadolint app/deploy/Dockerfile

types: install  ## mypy, strict
	$(BIN)/mypy $(SOURCES)

format: install  ## ruff: fix what can be fixed, and format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

wheel: install  ## dist/*.whl
	@rm -rf dist
	$(PYTHON) -m pip wheel $(PIP_ARGS) --no-deps -w dist .

constraints: install  ## write constraints.txt from what .venv holds now
	@{ grep '^#' constraints.txt; $(PYTHON) -m pip freeze --all --exclude-editable --exclude pip \
	  | sed -E -e 's/\+[a-z0-9.]+$$//' -e '/^torch==/!s/$$/ ; python_version >= "3.11"/'; } > .venv/constraints.new
	@mv .venv/constraints.new constraints.txt && touch $(STAMP)

clean:  ## build outputs and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
