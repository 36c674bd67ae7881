# Everything runs in a virtual environment of its own, .venv; `make test` and `make demo` set it up when needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS := benchmarks/results
PEERS := build/peers
WORKERS ?= 2
CHROMIUM ?= chromium

.PHONY: setup demo test lint format bench bench-sparse peers report-image clean

setup: $(STAMP)

# torch comes first and through the constraints, so that no other requirement pulls in a larger build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/torchaccel demo

# One OpenMP thread per worker: workers that share cores would spin at each other's barriers.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# mypy sees the packages as they are imported: a folder of links maps passes/ and kernels/ into torchaccel.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/torchaccel
	ln -s $(CURDIR)/torchaccel/* $(CURDIR)/passes $(CURDIR)/kernels build/types/torchaccel/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --package torchaccel

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The measurements of the README, one document each; run it on a machine that does nothing else, after `make peers`
# (without, the baselines it installs are listed as absent).
bench: setup
	mkdir -p $(RESULTS)
	$(BIN)/torchaccel bench decode --model llama-110m --context 32768 --options '{"kv_compression": "int4"}' \
		--json $(RESULTS)/decode-32k.json
	$(BIN)/torchaccel bench decode --model llama-110m --context 512 --json $(RESULTS)/decode-512.json
	$(BIN)/torchaccel bench prefill --model llama-110m --context 8192 --baselines inductor \
		--options '{"sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 1024}}' \
		--json $(RESULTS)/prefill-8k.json
	$(BIN)/torchaccel bench generate --model demo --baselines eager,inductor,static,hf_quantized,kvpress:snapkv \
		--json $(RESULTS)/generate-demo.json
	$(BIN)/torchaccel evaluate --model demo --options '{"preset": "exact"}' --options '{"kv_compression": "int8"}' \
		--options '{"sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 256}}' \
		--tasks perplexity,agreement,recall --json $(RESULTS)/evaluate-demo.json

# Methods that read a sixteenth of 32k tokens in every layer, beside int4 and int2; a run of its own, as variants that are
# timed in turns push each other out of the caches. Then those that read pages, of four times the tokens, and prompts.
bench-sparse: setup
	mkdir -p $(RESULTS)
	$(BIN)/torchaccel bench decode --model llama-110m --context 32768 --warm \
		--options '{"kv_compression": "int4"}' --options '{"kv_compression": "int2"}' \
		--options '{"sparse_attention": {"method": "quest", "tokens": 2048, "dense_layers": 0}}' \
		--options '{"sparse_attention": {"method": "quest", "tokens": 2048}}' \
		--options '{"sparse_attention": {"method": "double_sparsity", "tokens": 2048, "dense_layers": 0}}' \
		--options '{"sparse_attention": {"method": "tidal_decode", "tokens": 2048, "dense_layers": 0}}' \
		--options '{"sparse_attention": {"method": "lserve", "tokens": 2048}}' \
		--json $(RESULTS)/decode-32k-sparse.json
	$(BIN)/torchaccel bench decode --model llama-110m --context 131072 --warm --baselines eager \
		--options '{"sparse_attention": {"method": "quest", "tokens": 2048, "dense_layers": 0}}' \
		--options '{"sparse_attention": {"method": "lserve", "tokens": 2048}}' \
		--json $(RESULTS)/decode-128k-sparse.json
	$(BIN)/torchaccel bench prefill --model llama-110m --context 16384 --warm --baselines inductor --prompts 3 --warmup 1 \
		--options '{"sparse_attention": {"method": "xattention", "block": 64, "threshold": 0.5}}' \
		--options '{"sparse_attention": {"method": "flex_prefill", "gamma": 0.5, "min_budget": 128}}' \
		--options '{"sparse_attention": {"method": "minference", "vertical": 256, "slash": 1024}}' \
		--options '{"sparse_attention": {"method": "loopserve", "alpha": 0.5}}' \
		--options '{"sparse_attention": {"method": "infllm_v2", "dense_len": 0, "blocks": 32, "window": 1024}}' \
		--json $(RESULTS)/prefill-16k.json

# What `bench --baselines hf_quantized,kvpress:<press>` needs. kvpress wants a transformers older than ours and lives in
# an environment of its own; of torchaccel that environment uses the measuring code alone, so it gets no dependencies.
peers: setup $(PEERS)/kvpress/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt optimum-quanto==0.2.7

$(PEERS)/kvpress/.installed: constraints.txt
	$(PYTHON) -m venv $(PEERS)/kvpress
	$(PEERS)/kvpress/bin/pip install --quiet --constraint constraints.txt torch
	$(PEERS)/kvpress/bin/pip install --quiet --constraint constraints.txt kvpress==0.5.5
	$(PEERS)/kvpress/bin/pip install --quiet --no-deps --editable .
	touch $@

# The picture of the README: the head of the report about $(DOCUMENTS), as a browser without a window shows it.
DOCUMENTS ?= $(addprefix $(RESULTS)/,evaluate-demo.json generate-demo.json decode-32k.json decode-512.json prefill-8k.json)
IMAGE ?= docs/report.png
report-image: setup
	mkdir -p build
	$(BIN)/torchaccel report $(DOCUMENTS) --html build/report.html
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
		--disable-component-update --disable-sync --user-data-dir=build/chromium --hide-scrollbars \
		--window-size=1280,1250 --screenshot=$(IMAGE) file://$(CURDIR)/build/report.html

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
