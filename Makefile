# Every target sets up what it needs: a virtual environment, the dependencies, the compiled extension.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.PHONY: demo test reliability aot docs bench bench-full bench-check bench-history lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/mgt-fast demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

# Every fault of docs/reliability.md, as often as it says there; an hour or two.
reliability: $(VENV)/installed
	MGT_FAST_FAULTS=all $(BIN)/python -m pytest --durations=20 tests/train/test_resume.py \
	    tests/train/test_lost_ranks.py tests/train/test_ranks.py tests/train/test_memory_budget.py \
	    tests/train/test_interrupt.py tests/train/test_loop.py tests/train/test_runstate.py \
	    tests/train/test_runlog.py tests/train/test_lock.py tests/test_checkpoint.py tests/test_durable.py \
	    tests/test_hostile_files.py tests/data/test_hostile.py tests/data/test_shard_faults.py tests/fuzz

# Every Triton kernel in every configuration, compiled for GPUs without one; minutes.
aot: $(VENV)/installed
	$(BIN)/python tests/kernels/aot.py --channels 128 256 512 --precision float32 tf32 bf16

# The documentation, from build/docs/index.html on; every warning is an error.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

bench: $(VENV)/installed-bench
	$(BIN)/python -m pytest -c bench/pytest.ini bench --benchmark-json bench/last.json

# The long ones too: large sizes, growth, threads.
bench-full: $(VENV)/installed-bench
	$(BIN)/python -m pytest -c bench/pytest.ini bench -m "" --benchmark-json bench/last.json

# Whether a fast path lost ground to its rival since it was recorded on this device.
bench-check: $(VENV)/installed-bench
	$(BIN)/python bench/check.py

bench-history: $(VENV)/installed-bench
	$(BIN)/python bench/history.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

clean:
	rm -rf $(VENV) build demo

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mgt-fast needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(INSTALL) scikit-build-core pybind11 cmake ninja
	$(INSTALL) --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(INSTALL) --no-build-isolation --editable ".[bench]"
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(INSTALL) --no-build-isolation --editable ".[docs]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) clang-format pre-commit ruff
	@touch $@
