# make run: set up and run the main job.  make test: set up and run the tests.

SHELL := /bin/bash
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
READY := .venv/ready
ALONE := .venv/alone

.PHONY: run test lint tables

run: $(READY)
	$(BIN)/snakemake --cores all

test: $(READY) $(ALONE)/ready
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/codespell $$(git ls-files)
	$(BIN)/mypy
	$(BIN)/snakemake --lint

# Renews the tables of config/README.md, results/README.md, docs/ and environment.yml.
tables: $(READY)
	$(BIN)/python tools/readme_tables.py

# The stamp makes a second run instant; changed pins install again.
$(READY): requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: python3 is older than 3.11; put a newer one first in PATH"; exit 1; }
	@python3 -m venv .venv || \
		{ echo "error: no virtual environment; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

$(ALONE)/ready: tests/requirements.txt $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(ALONE) --requirement $<
	@touch $@
