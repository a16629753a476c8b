# Everything runs in .venv, which `make` sets up from constraints.txt. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := smollm2-135m

.PHONY: demo test test-slow example readme clean

## Fetch the embedded model and run the main experiment on it.
demo: $(VENV)/installed
	$(BIN)/persona models pull $(MODEL)
	rm -rf outputs/demo
	$(BIN)/persona substitute --grid short --out outputs/demo
	$(BIN)/persona report outputs/demo

## Lint, types, unit tests, and end-to-end tests on the embedded model.
test: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

## Run the README's commands again and compare; install the wheel into an empty environment.
test-slow: $(VENV)/tested
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

## Make the committed example run again.
example: $(VENV)/installed
	rm -rf outputs/example
	$(BIN)/persona reproduce --out outputs/example

## Write the generated parts of the README again: help texts, example outputs.
readme: $(VENV)/tested
	$(BIN)/python -m cogapp -r -I tests README.md

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
