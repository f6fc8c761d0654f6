# `make demo` and `make test` set up what they need in .venv; nothing has to be installed before,
# besides Python >= 3.11 and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt

.PHONY: demo test check format lint types imports slow parity compare compare-environments bench-tables nano nano-card nano-train clean

# Asks the embedded default about three pictures, and shows where the time goes.
demo: $(VENV)/.demo
	$(BIN)/python models/nano/demo.py

# In several processes, a file's tests in one of them: they share what the file converts.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Full-size shapes: converts and runs a seeded checkpoint of the 0.5B model. Needs 8 GB of memory and of disk.
slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# Against transformers and mlx-vlm, in an environment of their own.
parity:
	bash tests/parity/setup.sh
	.venv-parity/bin/python -m pytest -m parity tests/parity

# Make the embedded default bundle again, from its checkpoint.
nano: $(VENV)/.dev
	$(BIN)/fastvlm-convert models/nano/checkpoint -o models/fastvlm_zoo/nano --source-id fastvlm-nano --licence MIT \
		--vision-dtype float16 --resolutions 320

# Measure the accuracy in its card, models/nano/README.md, again: 1000 pictures that no one looked at in training, once
# for each width and encoder.
nano-card: $(VENV)/.dev
	$(BIN)/python models/nano/table.py models/fastvlm_zoo/nano --card models/nano/README.md

# Train it from nothing, or go on where that was stopped, into build/nano/checkpoint; copy this to models/nano/checkpoint
# for `make nano`. NANO_TRAIN has more for train.py, such as "--minutes 60 --workers 4".
NANO_TRAIN ?=
nano-train: $(VENV)/.dev
	$(BIN)/python models/nano/train.py build/nano --resume $(NANO_TRAIN)

# Time to first token beside other libraries, each in an environment of its own; see benchmarks/README.md.
#   make compare ARGS="--against mlx-vlm --resolution 256 --runs 7"
compare: $(VENV)/.dev compare-environments
	$(BIN)/fastvlm-bench compare $(ARGS)

# The tables of benchmarks/README.md, from the reports in benchmarks/results.
bench-tables: $(VENV)/.dev
	$(BIN)/python -m fastvlm_bench.results benchmarks/results benchmarks/README.md

compare-environments:
	PYTHON=$(PYTHON) bash benchmarks/environments/setup.sh

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev,convert]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .venv-parity .venv-compare build dist models/converted
