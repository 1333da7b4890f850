# SPDX-License-Identifier: Apache-2.0
# `make` lists the targets. Everything installed goes below .venv/, which git ignores.
#
#   make test PYTHON=python3.12            another interpreter for a new environment
#   make test PYTHON=python3 VENV=         an environment that exists already; installs nothing
#   make demo MODEL=Qwen/Qwen2.5-0.5B-Instruct   a hub id, a folder or a .gguf file

PYTHON ?= python3
VENV   ?= .venv/main
OLDEST ?= .venv/oldest
MODEL  ?=
JOBS   ?= 2
# the pip requirement for torch, without a local version such as +cpu
TORCH  ?= torch==2.13.0
TRANSFORMERS_OLDEST ?= transformers==5.17.*
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

PY := $(if $(strip $(VENV)),$(VENV)/bin/python,$(PYTHON))
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet
# on Linux, PyPI's torch brings gigabytes of CUDA libraries; elsewhere it is the CPU build
CPU_LINUX := $(shell [ "$$(uname)" = Linux ] && ! nvidia-smi >/dev/null 2>&1 && echo yes)

# one thread for each test process: the tensors are small, and processes share the cores
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PARALLEL = $$($(1) -c 'import xdist; print("-n $(JOBS)")' 2>/dev/null)

.PHONY: help env demo test test-oldest lint format clean
help:
	@echo "make demo         a small model answers with the packed cache and with the usual one"
	@echo "make test         environment and whole test suite"
	@echo "make test-oldest  all tests that meet transformers, with the oldest supported one"
	@echo "make lint         ruff and mypy;   make format   apply ruff"
	@echo "make clean        remove the environments and caches"

ifneq ($(strip $(VENV)),)
ENV  := $(VENV)/.installed-dev
DEMO := $(VENV)/.installed-$(if $(MODEL),gguf,demo)
endif

env: $(ENV)

$(VENV)/.installed-torch:
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "rq-hf needs Python 3.10 to 3.13; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(CPU_LINUX),yes)
	@echo "No NVIDIA GPU found: installing the CPU build of torch"
	@$(PY) $(PIP_INSTALL) --no-deps --retries 1 --timeout 20 --extra-index-url $(CPU_INDEX) "$(TORCH)+cpu" \
	  || { echo "No CPU build for this Python could be had; installing PyPI's build (large)"; \
	       $(PY) $(PIP_INSTALL) "$(TORCH)"; }
else
	$(PY) $(PIP_INSTALL) "$(TORCH)"
endif
	@touch $@

# the project itself with the extra of that name, and what torch needs
$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml
	$(PY) $(PIP_INSTALL) --editable ".[$*]"
	@$(PY) -c 'import torch; print("torch", torch.__version__, "for CUDA", torch.version.cuda)'
ifeq ($(CPU_LINUX),yes)
	@$(PY) -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' \
	  || echo "Note: a CUDA build of torch on a machine without a GPU; it works, but is large"
endif
	@touch $@

# shares every package of $(VENV) but transformers and what that needs older
$(OLDEST)/.installed: $(ENV)
	$(PY) -m venv --without-pip $(OLDEST)
	@$(PY) -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > "$$($(OLDEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	$(OLDEST)/bin/python $(PIP_INSTALL) "$(TRANSFORMERS_OLDEST)"
	@touch $@

demo: $(DEMO)
	$(PY) -m examples.demo $(if $(MODEL),--model "$(MODEL)")

test: $(ENV)
	$(TEST_ENV) $(PY) -m pytest -q $(call PARALLEL,$(PY))

# quantizers and kernels know nothing of transformers
test-oldest: $(OLDEST)/.installed
	@$(OLDEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -q $(call PARALLEL,$(OLDEST)/bin/python) \
	  --ignore=tests/quant --ignore=tests/ops

lint: $(ENV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(ENV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
