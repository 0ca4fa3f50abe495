# One line of help each: `make` alone prints them.
.DEFAULT_GOAL := help
.PHONY: help install demo test check format serve bench gpu kill-storm invariance audit sbom fuzz hostile soak chaos clean

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TOOLS := build/tools

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv and install everything, with pinned versions

# torch first and alone, pinned: a range would let pip choose another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[train,serve,dev]'
	touch $@

demo: $(INSTALLED)  ## train every task on generated data, serve, ask; EXIT=1 stops after the answers
	$(BIN)/python -m recipes.demo $(if $(EXIT),--exit)

test: $(INSTALLED)  ## run the tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(INSTALLED)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)  ## put the code into its one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

serve: $(INSTALLED)  ## serve model directories: make serve MODELS="models/sentiment models/numbers-en-fr"
	$(BIN)/python -m serving $(MODELS)

bench: $(INSTALLED)  ## run the benchmarks; each prints one JSON line per result
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.continuous
	$(BIN)/python -m benchmarks.prefixes
	$(BIN)/python -m benchmarks.features
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.serve

gpu: $(INSTALLED)  ## with a CUDA device: the tests and benchmarks that need one
	$(BIN)/python -m pytest -m gpu -n 8
	$(BIN)/python -m benchmarks.gpu_step
	$(BIN)/python -m benchmarks.train_step --device cuda --threads 4 --steps 65

kill-storm: $(INSTALLED)  ## kill training runs 1,000 times, at every phase and system call of a save; damage 10,000 checkpoints
	$(BIN)/python -m tests.training.kill_storm --kills 1000
	$(BIN)/python -m tests.training.kill_storm --kills 100 --workers 2
	SEQMODELS_SLOW=1 $(BIN)/python -m pytest tests/training/test_distributed.py
	$(BIN)/python -m tests.training.corruption --count 10000

invariance: $(INSTALLED)  ## 10,000 random schedules of the engine, bit for bit, and a soak of 10,000 requests
	$(BIN)/python -m tests.seqmodels.invariance

# What looks at dependencies has many of its own, so it lives apart.
$(TOOLS): Makefile
	$(PYTHON) -m venv $@
	$@/bin/pip install -q pip-audit==2.10.1 cyclonedx-bom==7.5.0
	touch $@

audit: $(TOOLS)  ## ask PyPI whether a pinned dependency has a known fault
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt || \
		{ echo "audit: a dependency has a fault, or could not be looked up; see above"; exit 1; }

sbom: $(TOOLS)  ## write what the image installs to build/sbom.json, in CycloneDX's form
	sh deploy/install.sh build/image
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom.json build/image

fuzz: $(INSTALLED)  ## ask the service a million requests in this process, four fifths of them damaged
	$(BIN)/python -m tests.serving.fuzz

hostile: $(INSTALLED)  ## ask the service about 1,000 pictures and clips that mean harm: each a clear 4xx, at once, in little memory
	$(BIN)/python -m tests.serving.hostile_images

chaos: $(INSTALLED)  ## kill replicas 50 times, leave 1,000 streams, swap models 100 times, hold 1,000 silent connections
	$(BIN)/python -m tests.serving.chaos

soak: $(INSTALLED)  ## half an hour at 70 % load: memory must not grow; then 5 minutes with a leak, which must be found
	$(BIN)/python -m tests.serving.soak
	$(BIN)/python -m tests.serving.soak --minutes 5 --plant-leak 10000

clean:  ## remove what was built, but no trained model
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
