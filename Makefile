# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: help serve test lint types fast-test next-vllm tools charts clean

# `command -v` is not enough: a version manager's shim may exist without its Python.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=

# nvidia-smi can be installed on a machine without a GPU; then it fails.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Quick checks first is an order that -j must not mix up.
.NOTPARALLEL:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The CPU build of torch is in PyTorch's own package index, which pip does not know. Where
# pip finds no such build, uv takes it from there.
$(INSTALLED): pyproject.toml deploy/cpu_torchvision.py deploy/cpu_vllm.py
	@echo "Setting up $(VENV) for $(DEVICE): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
ifeq ($(DEVICE),cpu)
	$(BIN)/python -m pip install --quiet -e '.[cpu,dev]' || { \
	  $(BIN)/python -m pip install --quiet uv && \
	  $(BIN)/uv pip install --python $(BIN)/python --torch-backend=cpu -e '.[cpu,dev]'; }
	$(BIN)/python deploy/cpu_torchvision.py
	$(BIN)/python deploy/cpu_vllm.py
else
	$(BIN)/python -m pip install --quiet -e '.[gpu,dev]'
endif
	@touch $@

serve: $(INSTALLED) ## Serve the shipped model on http://127.0.0.1:8000 (options: ARGS=...)
	$(BIN)/vllm-ficoco serve tiny-llava --host $(HOST) --port $(PORT) $(ARGS)

# Engines that are tested behind the servers.
LATER := tests/engine/test_tiles.py tests/engine/test_two_ranks.py

# The quick checks come first, so that a slip shows before an engine starts.
test: $(INSTALLED) ## Run everything: lint, types, fast tests, then engine and server tests
	$(MAKE) --no-print-directory lint types fast-test
ifeq ($(DEVICE),cpu)
	@# Engines are tested while servers start, and some behind them, as there are more. One thread
	@# each: two that share the cores wait for each other at every small operation.
	@mkdir -p reports; export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind; \
	  $(BIN)/python -m pytest -m engine $(LATER:%=--ignore=%) >reports/engine-tests.log 2>&1 & \
	  engine=$$!; $(BIN)/python -m pytest -m server; server=$$?; \
	  $(BIN)/python -m pytest -m engine $(LATER); later=$$?; \
	  wait $$engine; engine=$$?; cat reports/engine-tests.log; [ $$engine$$server$$later = 000 ]
else
	$(BIN)/python -m pytest -m "engine or server"
endif

lint: $(INSTALLED) ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

fast-test: $(INSTALLED) ## Run the tests that start neither an engine nor a server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not engine and not server"

NEXT ?= 0.33.0
next-vllm: $(INSTALLED) ## Compare what is used of vLLM with another version's sources, and run fast tests on them
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.next_vllm $(NEXT)

# Each in an environment of its own over this one: torch and what else fits is taken from below, so
# that no tool brings CUDA's gigabytes. An environment reads the .pth files of its own folder alone.
TOOLS := $(patsubst tests/tools/%.txt,.tools/%/.installed,$(wildcard tests/tools/*.txt))

tools: $(TOOLS) ## Install what README names under "Use it with" into .tools, for its tests

.tools/%/.installed: tests/tools/%.txt $(INSTALLED)
	$(BIN)/python -m venv --clear .tools/$*
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' \
	  > $$(echo .tools/$*/lib/python*/site-packages)/below.pth
	.tools/$*/bin/python -m pip install --quiet -r $<
	@touch $@

# Beside what `make tools` installs of it.
charts: .tools/kubernetes/.installed ## Fetch helm, charts and definitions for the tests of deploy/kubernetes
	.tools/kubernetes/bin/python tests/tools/kubernetes.py

clean: ## Remove caches and build products (not the environments, .venv and .tools)
	rm -rf build dist reports .mypy_cache .pytest_cache .ruff_cache .coverage
	find . -path './$(VENV)' -prune -o -path ./.tools -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
