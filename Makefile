# Every target works from a fresh clone; artefacts and caches go under .output/ (the environment under .venv/).
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
export PYTHONDONTWRITEBYTECODE := # a daemon that compiles all of itself at each start takes a second more

OUT := .output
# Caches per user: root's `make test` must not spoil a user's `make check`, nor a foreign checkout stop it.
CACHE := $(shell mkdir -p $(OUT)/cache-$$(id -un) 2>/dev/null && echo $(OUT)/cache-$$(id -un) || echo $$HOME/.cache/clrk)
BIN := .venv/bin
PYTEST := $(BIN)/python -P -m pytest -o cache_dir=$(CACHE)/pytest
# Whole files side by side: what each makes on the host has its process's name (tests/instances.py).
LANES := -n auto --maxprocesses=4 --dist=loadfile -m "not alone"
# Through src/, where a relative import has its true name: at the top level ruff would take `runtime` for the package.
PY_PATHS := src $(foreach part,runtime ebpf gateway netns,src/clrk/$(part)/) tests examples setup.py
C_FILES := $(shell find ebpf runtime src/clrk/core examples tests -name node_modules -prune -o -name '*.[ch]' ! -name '_stamp.c' -print 2>/dev/null)
C_WARNINGS := -Wall -Wextra -Werror -Wshadow -Wconversion -Wstrict-prototypes -Wmissing-prototypes -Wundef \
	-Wpointer-arith -Wwrite-strings -Wformat=2 -Wvla

.PHONY: help setup setup-tests demo test check lint lint-c type arch unit kernel e2e bench soak fuzz fmt clean need-venv need-root

help: ## Show this text
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' Makefile

setup: ## Install what is missing: Debian packages (as root) and .venv; a second run is quick
	@packaging/setup.sh

setup-tests: # what `make setup` does, and the servers that the tests talk to
	@packaging/setup.sh --tests

demo: setup need-root ## Set up, run one traced request through real sandboxes, and walk the debugging session
	@examples/demo/run

test: setup-tests need-root ## Set up and run everything: static checks, unit, kernel and e2e tests (root)
	@$(MAKE) --jobs=2 --output-sync lint lint-c type arch
	@CLRK_MUST_WORK=1 $(PYTEST) -n auto --dist worksteal tests/unit tests/fuzz
	@CLRK_MUST_WORK=1 $(PYTEST) $(LANES) tests/kernel tests/e2e tests/browser
	@CLRK_MUST_WORK=1 $(PYTEST) -m alone tests/kernel tests/e2e tests/browser

check: need-venv lint lint-c type arch unit ## Everything that needs no root: static checks and unit tests

lint: need-venv ## ruff: style, imports, security, formatting
	@$(BIN)/ruff check --cache-dir $(CACHE)/ruff $(PY_PATHS)
	@$(BIN)/ruff format --cache-dir $(CACHE)/ruff --check $(PY_PATHS)

lint-c: need-venv ## clang-format, and gcc and clang with warnings as errors, for the C sources
	@$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	@for compiler in gcc clang; do for file in ebpf/csrc/*.c runtime/csrc/*.c; do \
		$$compiler -std=gnu11 -O2 $(C_WARNINGS) -Isrc/clrk/core -Iebpf/csrc -fsyntax-only "$$file"; done; done

type: need-venv ## mypy, strict
	@$(BIN)/mypy --cache-dir $(CACHE)/mypy -p clrk

arch: need-venv ## import-linter: who may import whom
	@$(BIN)/lint-imports --cache-dir $(CACHE)/import-linter

unit: need-venv ## Tests that need no root: unit, fuzz smoke, the page in Chromium
	@$(PYTEST) -n auto --dist worksteal tests/unit tests/fuzz
	@$(PYTEST) tests/browser

kernel: need-venv need-root ## Tests against the running kernel: BPF, namespaces, sandboxes (root)
	@CLRK_MUST_WORK=1 $(PYTEST) $(LANES) tests/kernel

e2e: need-venv need-root ## Tests with the real daemon and real agents (root)
	@CLRK_MUST_WORK=1 $(PYTEST) $(LANES) tests/e2e
	@CLRK_MUST_WORK=1 $(PYTEST) -m alone tests/e2e

bench: setup need-root ## Measure, as ratios in alternation; the figures of docs/benchmarks.md (root)
	@$(BIN)/python -P tests/bench/run.py

soak: setup need-root ## 2,000 invocations, ten at a time, with everything failing at random; all accounted for (root, minutes)
	@PYTHONPATH=tests/e2e:tests $(BIN)/python -P tests/e2e/soak.py $(SOAK)

fuzz: need-venv ## Fuzz every parser with coverage as a guide: TARGET=one of tests/fuzz/targets.py (all), SECONDS_EACH=60
	@for target in $${TARGET:-$$(PYTHONPATH=tests/fuzz $(BIN)/python -P -c 'from targets import TARGETS; print(*TARGETS)')}; do \
		echo "== $$target"; PYTHONPATH=tests/fuzz $(BIN)/python -P tests/fuzz/run.py $$target $${SECONDS_EACH:-60}; done

fmt: need-venv ## Format Python and C
	@$(BIN)/ruff check --cache-dir $(CACHE)/ruff --fix $(PY_PATHS)
	@$(BIN)/ruff format --cache-dir $(CACHE)/ruff $(PY_PATHS)
	@$(BIN)/clang-format -i $(C_FILES)

clean: ## Remove .output, .venv and everything built
	@rm -rf $(OUT) .venv build dist src/*.egg-info ebpf/_stamp.c ebpf/_stamp*.o ebpf/_stamp*.so runtime/_launch
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

need-venv:
	@test -x $(BIN)/python || { echo "no .venv yet: run 'sudo make setup' first" >&2; exit 1; }
	@mkdir -p $(CACHE)

need-root:
	@test "$$(id -u)" -eq 0 || { echo "this needs root (namespaces, cgroups, BPF): use sudo" >&2; exit 1; }
