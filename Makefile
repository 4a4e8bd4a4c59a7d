BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo table export-zoo load docs matrix lint test clean

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

matrix: $(READY)
	.ci/matrix

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -q

clean:
	rm -rf .venv demo build site .pytest_cache .mypy_cache .ruff_cache
