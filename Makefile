# make quickstart   distil a real teacher on this machine, in about five minutes after installation
# make test         the tests (no downloads, no torch)

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Large pages, and memory that is kept rather than given back after each step, spare the CPU most page faults of large
# arrays (glibc 2.35 or newer; ignored elsewhere).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=68719476736:glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=268435456
# Tests run in this many processes; neighbours stay together, since they share what they compare with.
JOBS ?= 2

.PHONY: quickstart test test-slow test-real test-parity lint mutate clean

quickstart: $(BIN)/.installed
	$(BIN)/python tools/quickstart.py

test: $(BIN)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not real and not parity"

test-slow: $(BIN)/.installed-test
	$(BIN)/python -m pytest -m "slow and not real and not parity"

test-real: $(BIN)/.installed-test
	$(BIN)/python tools/fetch_assets.py
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "real and not slow and not parity"

test-parity: $(BIN)/.installed-parity
	$(BIN)/python tools/fetch_assets.py
	$(BIN)/python -m pytest -m parity

lint: $(BIN)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

mutate: $(BIN)/.installed-test
	$(BIN)/python tools/mutate.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(BIN)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(BIN)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(BIN)/.installed $@

# The CPU build of torch is enough; installed first so that transformers takes it.
$(BIN)/.installed-parity: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable ".[test,parity,eval]"
	touch $(BIN)/.installed $(BIN)/.installed-test $@

clean:
	rm -rf $(VENV)
