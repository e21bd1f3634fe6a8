# Everything runs in .venv in this checkout; each target makes what it needs and says so.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTS ?=
ONLY ?=
MINUTES ?= 30
BENCH ?=
OLDEST := $(shell for p in python3.10 $$HOME/.pyenv/versions/3.10.*/bin/python; do $$p -c '' 2> /dev/null && echo $$p && break; done)
MUTANTS ?=

.PHONY: help install demo test test-slow oldest fuzz mutants lint types check docs architectures site bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: $(STAMP) ## Make .venv and install lorasurgery with all it needs

$(STAMP): pyproject.toml constraints.txt
	@echo "== making $(VENV) with the versions in constraints.txt (the first time takes minutes: torch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and alone, so that pip takes the build that constraints.txt names
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,plot,bench,docs]'
	@touch $@

demo: $(STAMP) ## Fine-tune MiniLM, then extract, merge, compare and unmerge on real weights (about 3 minutes)
	@echo "== demo: everything it makes lies under .demo/"
	@$(BIN)/python -W ignore examples/demo.py

test: $(STAMP) ## Run the tests (minutes; needs no network once installed)
	@echo "== tests"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m 'not slow' $(TESTS)

test-slow: $(STAMP) ## The proofs that take minutes each
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(TESTS)

oldest: ## What works without torch, on the oldest supported Python, where the machine has it
	@if [ -z "$(OLDEST)" ]; then echo "== oldest: this machine has no Python 3.10; lint and types alone hold for it"; exit 0; fi; \
	echo "== oldest: $(OLDEST)"; \
	test -x .venv-oldest/bin/python || $(OLDEST) -m venv .venv-oldest; \
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check 'safetensors>=0.5' 'numpy>=1.26' 'click>=8.1.8' 'rich>=13.8' \
		'huggingface_hub>=0.30' 'pyyaml>=6.0' 'zstandard>=0.23' && \
	PYTHONPATH=$(CURDIR) .venv-oldest/bin/python tests/oldest.py

fuzz: $(STAMP) ## Read hostile files for MINUTES=30 and say what was not refused in one line, in bounded time and memory
	@echo "== fuzz: $(MINUTES) minutes"
	@HF_HUB_OFFLINE=1 $(BIN)/python -W ignore tests/hostile/fuzz.py --minutes $(MINUTES)

mutants: $(STAMP) ## Put 60 small mistakes into the code, one at a time, and say which no test notices (an hour or so); MUTANTS="--in lorasurgery/linalg" tries those of one room
	@echo "== mutants"
	@$(BIN)/python tests/mutants/mutants.py $(MUTANTS)

lint: $(STAMP) ## ruff, formatting included
	@echo "== lint"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	@echo "== types"
	@$(BIN)/mypy

check: lint types test ## lint + types + tests

docs: $(STAMP) ## Write anew the pages that are made: the CLI reference, the JSON reports, the formats' results
	@$(BIN)/python docs/generate_cli.py
	@$(BIN)/python docs/generate_json.py
	@$(BIN)/python -W ignore docs/generate_formats.py

architectures: $(STAMP) ## Extract, merge and load every model class of transformers, and write docs/architectures.md (about 10 minutes)
	@echo "== architectures"
	@$(BIN)/python -W ignore docs/generate_architectures.py

site: $(STAMP) ## Build the documentation into site/, strictly: a broken link is an error
	@echo "== site"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(STAMP) ## Everything against its peers, for hours, and docs/benchmarks.md from it; ONLY=merge runs one section
	@$(BIN)/python -W ignore benchmarks/run.py $(if $(ONLY),--only $(ONLY)) $(BENCH)

clean: ## Remove what the demo, the benchmarks and the tests made (not .venv)
	rm -rf .demo .bench site .pytest_cache .mypy_cache .ruff_cache .hypothesis
