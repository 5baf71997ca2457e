# Each target works alone on a fresh machine: `make setup` is the part they share, and costs nothing twice.
PYTHON  ?= python3
RECIPE  ?= relu-attn
TRACK   ?= text
SEEDS   ?= 3
BIN     := .venv/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
STAMP   := .venv/.installed
TOOLS   := .venv/.installed-tools
# Empty, with BIN= the folder of a python that has everything, where nothing can be installed.
SETUP   ?= $(STAMP)
PEERS   := hqq torchao einops termcolor  # what tests compare with, and nothing else should import: see pyproject.toml

# In the order of their worth, seed by seed: whoever's time runs out has compared the first of them.
GPU     := baseline relu-attn sgd gated-attn softmax1 sink-logit softpick muon osp

.PHONY: help setup bench test check format leaderboard perf gpu paper clean
.DEFAULT_GOAL := help

help:  ## what there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 14

setup: $(STAMP)  ## create .venv and install what benchmarks need, torch first; `make test` adds what it needs

# torch comes first and alone, pinned: drawn in by another package it would be the newest build, several GB of it.
# pip would compile one module after the other; here all cores do. What is no Python of this version stays as it is.
INSTALL := $(PIP) install -qq -c constraints.txt --no-compile
COMPILE := $(BIN)/python -W ignore -m compileall -q -j 0 .venv > .venv/compile.log 2>&1 || true
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch, then the rest (a minute or two, once) ..."
	@$(INSTALL) --upgrade pip  # a new one takes half the time of Python's own
	@$(INSTALL) torch
	@$(INSTALL) -e .
	@$(PIP) check
	@$(COMPILE)
	@$(BIN)/python -c "import quantbench, torch, transformers"
	@touch $@

# What tests, checks and benchmarks need besides.
$(TOOLS): $(STAMP)
	@echo "installing what tests and checks need (once) ..."
	@$(INSTALL) -e '.[dev]'
	@$(INSTALL) --no-deps --upgrade --target .venv/peers $(PEERS)
	@$(PIP) check
	@$(COMPILE)
	@touch $@

bench: setup  ## train, measure and quantize a recipe beside its baseline: make bench RECIPE=relu-attn [TRACK=text SEEDS=3]
	@$(BIN)/quantbench bench $(RECIPE) --track $(TRACK) --seeds $(SEEDS)

test: $(TOOLS)  ## what CI runs
	@$(BIN)/python -m pytest

check: $(TOOLS)  ## format, lint, types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

format: $(TOOLS)  ## rewrite the sources in the project's format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

leaderboard: setup  ## render the tables and figures of results/ again
	@$(BIN)/quantbench leaderboard

perf: $(TOOLS)  ## benchmarks, as ratios to a peer in the same run, into results/perf/; fails where a goal is missed
	@$(BIN)/python -m tests.perf

gpu: $(SETUP:$(STAMP)=$(TOOLS))  ## on a machine with a CUDA device: its tests, benchmarks and the track text-gpu; run again, it resumes
	@$(BIN)/python -m pytest -m gpu
	@$(BIN)/python -m tests.perf || echo "going on: goals of speed are no reason to stop"
	@$(BIN)/python -m quantbench bench $(GPU) --track text-gpu --seeds $(SEEDS)

# Three layers before one: the residual peak, on which the paper's claims hang, needs them.
paper: $(SETUP)  ## where a GPU is: arXiv:2410.13835 at its own size, baseline, SGD and ReLU; run again, it resumes
	@$(BIN)/python -m quantbench bench baseline sgd relu-attn --track bb-paper-3layer
	@$(BIN)/python -m quantbench probe baseline sgd relu-attn --track bb-paper-3layer
	@$(BIN)/python -m quantbench bench baseline sgd relu-attn --track bb-paper-1layer
	@$(BIN)/python -m quantbench probe baseline sgd relu-attn --track bb-paper-1layer
	@$(BIN)/python -m quantbench claims

clean:  ## remove .venv and everything that was computed but not committed
	rm -rf .venv .quantbench build *.egg-info
