PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo table export-zoo load test lint serving-env clean

# --no-deps: of the wheel with NVIDIA's tritonserver only the binary is used, not the Python side's dependencies.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[export,serving,openvino,client,dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt nvidia-pytriton
	touch $@

demo: $(READY)
	$(BIN)/vilu demo

table: $(READY)
	$(BIN)/python bench/table.py --output bench/results/table

export-zoo: $(READY)
	$(BIN)/python bench/zoo.py --output bench/results/zoo

load: $(READY)
	$(BIN)/python bench/load.py --faults

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -q

clean:
	rm -rf .venv demo build .pytest_cache .mypy_cache .ruff_cache
