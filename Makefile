# Everything runs in .venv, which `make` sets up from constraints.txt. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := smollm2-135m
TOOLS := build/tools
SECONDS := 600
WORKERS ?= 2
PAGES ?= README.md $(wildcard docs/*.md docs/commands/*.md)
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
PARALLEL := -n $(WORKERS) --dist worksteal

.PHONY: demo test test-slow test-ndif test-architectures fuzz bench ndif-server ndif-server-down example docs audit sbom clean

## Fetch the embedded model and run the main experiment on it.
demo: $(VENV)/installed
	$(BIN)/persona models pull $(MODEL)
	rm -rf outputs/demo
	$(BIN)/persona substitute --grid short --out outputs/demo
	$(BIN)/persona report outputs/demo

## Lint, types, unit tests, and end-to-end tests on the embedded model, in WORKERS processes.
test: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) $(PARALLEL)

## Run the commands of the documentation again and compare; install the wheel into an empty
## environment; compute as other processors do.
test-slow: $(VENV)/tested
	$(PYTEST) $(PARALLEL) -m slow

## Run the commands on a real NDIF server, which this installs, starts and stops.
test-ndif: $(VENV)/tested
	$(PYTEST) -m ndif

## Run a tiny model of every class of transformers against the oracle. ONLY: these model types, with
## commas between; WRITE=1 writes what comes out to docs/architectures.md.
test-architectures: $(VENV)/tested
	OMP_NUM_THREADS=1 $(BIN)/python tests/architectures --workers $(WORKERS) \
		$(if $(ONLY),--only $(ONLY)) $(if $(WRITE),--write)

## Fuzz whatever reads a text or a file for SECONDS, guided by coverage (Linux).
fuzz: $(VENV)/tested
	$(BIN)/python -m pip install -q atheris
	$(BIN)/python tests/fuzz $(SECONDS)

## Time the published procedure and ours, and draw what the cost grows with. BENCH: its options.
bench: $(VENV)/tested
	THP_MEM_ALLOC_ENABLE=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks $(BENCH)

## Start that server to try remote work with, and stop it.
ndif-server: $(VENV)/installed
	$(BIN)/python tests/ndif/ndif_server.py up

ndif-server-down: $(VENV)/installed
	$(BIN)/python tests/ndif/ndif_server.py down

## Make the committed example run again.
example: $(VENV)/installed
	rm -rf outputs/example
	$(BIN)/persona reproduce --out outputs/example

## Write the generated parts of README.md and docs/ again: help texts, example outputs. PAGES: only
## these, as in `make docs PAGES=docs/speed.md`.
docs: $(VENV)/tested
	$(BIN)/python -m cogapp -r -I tests -I tests/support $(PAGES)

## Look the pinned versions up in the advisory database, over the network; one not found is an error.
audit: $(TOOLS)/installed
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

## Write dist/sbom.cdx.json: what a user's environment holds, as a CycloneDX bill of materials.
sbom: $(TOOLS)/installed
	rm -rf build/runtime
	$(PYTHON) -m venv --without-pip build/runtime
	$(TOOLS)/bin/python -m pip --python build/runtime install -q -c constraints.txt .
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file dist/sbom.cdx.json build/runtime/bin/python

clean:
	[ ! -e .ndif ] || $(MAKE) ndif-server-down
	rm -rf $(VENV) .venv-ndif .ndif dist build .mypy_cache .ruff_cache .pytest_cache

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(TOOLS)/installed: constraints.txt
	rm -rf $(TOOLS)
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q -c constraints.txt pip-audit cyclonedx-bom
	touch $@
