# `make help` lists what there is. Everything is installed into .venv, from requirements*.txt, every file checked by
# its sha256; again only when those files or pyproject.toml change.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet
SOURCES := core routing storage engines gateway tests benchmarks sdk deploy
UV_VERSION := 0.13.9
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
  "$$python" -c '$(IS_NEW_ENOUGH)' >/dev/null 2>&1 && { echo "$$python"; break; }; done)
# Set on the command line: ARGS (run, test), NAME and QUICK=1 (bench), PYTHON.
ARGS ?=
NAME ?= overhead
QUICK ?=

.PHONY: help run demo test test-vllm check check-compose fmt bench data lock sbom install install-dev

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(RUNTIME)  ## install what is needed, fetch SmolLM2 and serve it; ARGS="..." goes to `forebay run`
	@$(BIN)/forebay run $(ARGS)

demo: $(RUNTIME)  ## a tour of two minutes: what the gateway adds to a bare engine, measured here
	@$(BIN)/forebay demo

test: $(DEV)  ## the tests, real llama.cpp included; ARGS="-k name" goes to pytest
	$(BIN)/python -m pytest -m "not vllm and not gpu" $(ARGS)

test-vllm: $(DEV)  ## the tests with a real vLLM on the CPU; installs it on the first run (GBs, minutes)
	$(BIN)/python tests/vllm/prepare.py
	$(BIN)/python -m pytest -m vllm $(ARGS)

check: $(DEV)  ## format, lint, types, layers, the lock, and the supply chain; needs no network
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/security/test_s16_supply_chain.py
	@$(MAKE) --no-print-directory check-compose

check-compose: $(DEV)  ## compose.yaml and the Dockerfiles: our rules, the specification's schema, and `config -q` where a compose tool is installed
	$(BIN)/python -m pytest -q tests/deploy/test_compose.py
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	@if docker compose version >/dev/null 2>&1; then tool="docker compose"; \
	elif command -v docker-compose >/dev/null; then tool=docker-compose; \
	else echo "not checked: compose.yaml by compose itself; there is none here (Debian: apt install docker-compose)"; exit 0; fi; \
	for profile in "" postgres gpu observability; do \
	  echo "COMPOSE_PROFILES=$$profile $$tool config -q"; COMPOSE_PROFILES=$$profile $$tool config -q || exit 1; done

fmt: $(DEV)  ## format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV)  ## a benchmark: NAME=overhead, QUICK=1 for at most four minutes
	$(BIN)/python -m benchmarks.$(NAME) $(if $(QUICK),--quick) $(ARGS)

data: $(RUNTIME)  ## fetch the data that tests and benchmarks use: SmolLM2, the only set so far
	@$(BIN)/forebay fetch smollm2

lock:  ## write requirements*.txt anew from pyproject.toml
	@test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install -q uv==$(UV_VERSION); }
	$(call lock,--group build,requirements.txt)
	$(call lock,--group dev -c requirements.txt,requirements-dev.txt)

define lock
.venv-lock/bin/uv pip compile -q pyproject.toml $(1) -o $(2) --generate-hashes --python-version 3.11 --universal \
  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
endef

sbom: $(DEV)  ## write dist/sbom.cdx.json: what an image is made of, from the lock (CycloneDX)
	@mkdir -p dist
	$(BIN)/python deploy/sbom.py requirements.txt >dist/sbom.cdx.json

install: $(RUNTIME)  ## install only
install-dev: $(DEV)  ## install only, with the tools for developers

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Forebay needs Python 3.11 or newer, and there is none on PATH."; \
	  echo "Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv), or: make PYTHON=/path/to/python3"; \
	  exit 1; }
	@$(PYTHON) -c '$(IS_NEW_ENOUGH)' || { echo "$(PYTHON) is older than Python 3.11: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make an environment (Debian, Ubuntu: apt install python3-venv)."; exit 1; }

$(RUNTIME): requirements.txt pyproject.toml | $(BIN)/python
	@echo "Installing Forebay into $(VENV). The first time downloads about 57 MB: half a minute to two."
	@$(PIP) --require-hashes -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(DEV): requirements-dev.txt sdk/pyproject.toml $(RUNTIME)
	@echo "Installing the tools for developers into $(VENV). The first time downloads about 145 MB: one to three minutes."
	@$(PIP) --require-hashes -r requirements-dev.txt
	@$(PIP) --no-deps --no-build-isolation -e . -e sdk
	@touch $@
