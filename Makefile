# The commands to know. `make demo` needs Python 3.11+ and nothing else; `make test` builds what it needs.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
include engines.mk

.PHONY: help demo up test test-unit check format env-example

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: .venv/.demo checkpoint-gguf ## 72 prompts from file to results, with no server, GPU or account
	@STOKER_ENGINE__KIND=llamacpp stoker run examples/prompts.jsonl -o out.jsonl

up: .venv/.demo checkpoint-gguf ## everything on this machine until Ctrl-C
	@stoker up

# Only what a run needs: no test tools.
.venv/.demo: pyproject.toml constraints.txt
	@echo "building .venv (about 30 s)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[demo]'
	@touch $@

.venv/.dev: .venv/.demo
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[demo,dev]'
	@touch $@
