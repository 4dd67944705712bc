# Two commands matter: `make demo` and `make test`. Both set up `.venv` by themselves.
PYTHON ?= python3
TORCH ?= $(shell grep "^torch==" constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: venv demo test check docs format bench clean

venv: $(STAMP)

# torch comes first and alone: an unpinned torch asked for by another package would fetch gigabytes of CUDA libraries
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	{ grep -v "^torch==" constraints.txt; echo "$(TORCH)"; } > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt --editable ".[dev]"
	@touch $(STAMP)

demo: venv
	$(BIN)/secateur demo --output demo

test: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: venv
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_rooms.py

format: venv
	$(BIN)/ruff format src tests benchmarks scripts
	$(BIN)/ruff check --fix src tests benchmarks scripts

docs: venv
	$(BIN)/python scripts/write_reference.py
	$(BIN)/python scripts/write_results.py

bench: venv
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache
