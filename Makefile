# Grow and Prune LSTMs: `make book` and `make test` do everything; `make help` lists the rest.
# Each makes its own environment in .venv the first time. To use one you made: make book PY=python

PROFILE ?= laptop
JOBS    ?= 2
PORT    ?= 8000

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
PROFILES := smoke laptop desk wide paper

ifneq ($(words $(PROFILE)):$(filter $(PROFILE),$(PROFILES)),1:$(PROFILE))
$(error PROFILE=$(PROFILE) is unknown; choose one of: $(PROFILES))
endif

ifneq ($(origin PY),command line)
PY  := .venv/bin/python
ENV := .venv/.installed
endif

# One thread a process: two jobs on two cores must not fight for them.
export OMP_NUM_THREADS ?= 1
export PYTHONPATH := $(CURDIR)
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.PHONY: help book test real lint fix lock serve clean env

help: ## list the targets
	@echo "usage: make TARGET [PROFILE=smoke|laptop|desk|wide|paper] [JOBS=2]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: $(ENV) ## run the chapters and build the HTML book (PROFILE, JOBS)
	@$(PY) -m book.tools.build --profile $(PROFILE) --jobs $(JOBS)

test: lint ## check the style, then run the tests
	@$(PY) -m pytest -n $(JOBS) --dist loadgroup -m "not real"

real: $(ENV) ## run the tests that need the real corpora (HLSTM_REAL_DATA=folder)
	@if [ -z "$${HLSTM_REAL_DATA:-}" ]; then \
	  echo "error: set HLSTM_REAL_DATA to the folder that holds an4_sphere.tar.gz" >&2; exit 1; fi
	@$(PY) -m pytest -m real

lint: $(ENV) ## check the style of code and notebooks
	@$(PY) -m ruff check .
	@$(PY) -m book.tools.lint check

fix: $(ENV) ## strip notebook outputs, name the cells, sort the imports
	@$(PY) -m book.tools.lint fix
	@$(PY) -m ruff check --fix .

env: $(ENV) ## make the environment only

serve: ## look at the book that was built last (PORT=8000)
	@if [ ! -e _build/html/index.html ]; then echo "error: no book yet; run: make book" >&2; exit 1; fi
	@echo "http://localhost:$(PORT)/ (Ctrl-C ends)"
	@$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

lock: ## write requirements.lock anew from pyproject.toml
	@bash book/tools/lock.sh

clean: ## remove what the pipeline made; records, corpora and .venv stay
	rm -rf _build .snakemake .pytest_cache .ruff_cache .hypothesis

# The stamp is a copy of the lock that was installed: a lock that was only touched costs nothing.
.venv/.installed: requirements.lock
	@bash book/tools/env.sh
