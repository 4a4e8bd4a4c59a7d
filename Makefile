BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo table export-zoo load gpu docs matrix lint test test-all clean

# With the Python of `make demo PYTHON=python3.12`, else the first one found that serves.
$(READY): pyproject.toml constraints.txt .ci/install
	.ci/install $(PYTHON)

demo: $(READY)
	$(BIN)/vilu demo

table: $(READY)
	$(BIN)/python bench/table.py --output bench/results/table

export-zoo: $(READY)
	$(BIN)/python bench/zoo.py --output bench/results/zoo

load: $(READY)
	$(BIN)/python bench/load.py --faults

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# On a machine with a GPU: tests, goals and tuning, into one folder. PYTHON may be any that has torch and triton.
gpu:
	PYTHON=$(or $(PYTHON),python3) bench/gpu.sh $(or $(OUTPUT),bench/results/gpu)

matrix: $(READY)
	.ci/matrix

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Three tests at a time, as many wait for a server; whole files together, which share their export and their server.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow" --doctest-modules tests vilu

# What `make test` does, then the long tests, with the coverage of both.
test-all: lint
	$(PYTEST) -m "not slow" --doctest-modules --cov --cov-report= tests vilu
	$(PYTEST) -m slow --cov --cov-append --cov-report=term:skip-covered tests

clean:
	rm -rf .venv demo build site .pytest_cache .mypy_cache .ruff_cache
