# The words for every chore: setup lint types test demo bench nano sanitize clean. Each does its own set-up, once.
#   make test ARGS="-k session"      what pytest is told besides
#   make test PYTHON=python3.12 VENV=/tmp/venv

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
TARGET_MINUTES ?= 24
DRAFT_MINUTES ?= 12

BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that spin while they wait are several times slower on busy cores.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup lint types test demo bench nano sanitize clean

help:
	@echo "make setup   a virtual environment in $(VENV) with everything in it"
	@echo "make test    the test suite"
	@echo "make demo    build the bundled pair into an engine, and read a page with it"
	@echo "make lint    ruff, and the direction of imports"
	@echo "make types   mypy"
	@echo "make bench   the tables of the README: reading, and speculation against plain decoding"
	@echo "make nano    the bundled pair again, from nothing (wants a GPU)"
	@echo "make sanitize  compute-sanitizer over the operators' tests (wants a GPU)"
	@echo "make clean   remove what these make, but the virtual environment"

setup: $(INSTALLED)

# One resolution for both, so that the tested PyTorch is not replaced by a newer one.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 13) else \
		f"trtvlm needs Python 3.10 to 3.12; $(PYTHON) is {v[0]}.{v[1]}: name another, as in make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet "$(TORCH)" -e ".[dev]"
	@touch $@

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	lint-imports

types: $(INSTALLED)
	mypy

test: $(INSTALLED)
	python -m pytest $(ARGS)

demo: demo/engine/build_report.json
	trtvlm generate --engine demo/engine --image model/pages/samples/demo.png

demo/engine/build_report.json: $(wildcard model/nano/*/*) | $(INSTALLED)
	@rm -rf demo/engine
	trtvlm build --model nano --quant int4_awq --sm 86 --output demo/engine

bench: demo/engine/build_report.json
	@mkdir -p benchmarks
	python -m trtvlm.scripts.evaluate_reading --engine demo/engine --output benchmarks/reading.json
	python -m trtvlm.scripts.check_lossless --engine demo/engine --tokens 10000 --samples 2000 \
		--output benchmarks/lossless-int4.json
	python -m trtvlm.scripts.check_lossless --model nano --tokens 10000 --output benchmarks/lossless-16bit.json

# Stopped and called again, both trainings go on where they were.
nano: runs/nano/draft/model.safetensors
	mkdir -p model/nano
	rm -rf model/nano/target model/nano/draft
	cp -r runs/nano/target runs/nano/draft model/nano/

runs/nano/target/model.safetensors: | $(INSTALLED)
	python -m trtvlm.scripts.make_tokenizer
	python -m trtvlm.scripts.train_nano --output runs/nano --minutes $(TARGET_MINUTES)

runs/nano/draft/model.safetensors: runs/nano/target/model.safetensors
	trtvlm draft-train --target runs/nano/target --draft scratch --data pages --output runs/nano/draft \
		--minutes $(DRAFT_MINUTES) $(if $(wildcard runs/nano/draft.state),--resume)

sanitize: $(INSTALLED)
	python -m trtvlm.scripts.sanitize $(ARGS)

clean:
	rm -rf build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
