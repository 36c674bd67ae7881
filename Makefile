# Everything runs in a virtual environment of its own, .venv; `make test` and `make demo` set it up when needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS := benchmarks/results
WORKERS ?= 2

.PHONY: setup demo test lint format bench clean

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

# The measurements of the README, one document each; run it on a machine that does nothing else.
bench: setup
	mkdir -p $(RESULTS)
	$(BIN)/torchaccel bench decode --model llama-110m --context 32768 --json $(RESULTS)/decode-32k.json
	$(BIN)/torchaccel bench decode --model llama-110m --context 512 --json $(RESULTS)/decode-512.json
	$(BIN)/torchaccel bench prefill --model llama-110m --context 8192 --baselines inductor \
		--options '{"sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 1024}}' \
		--json $(RESULTS)/prefill-8k.json
	$(BIN)/torchaccel bench generate --model demo --json $(RESULTS)/generate-demo.json

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
