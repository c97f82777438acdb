SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TAGMILL_PEERS ?= .venv-peers
AIRFLOW ?= .venv-airflow

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow bench bench-env airflow-env airflow-test lint lock clean

help:  ## what can be made
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ok  ## the environment in .venv, from the hashed lock

# uv is taken out of the same lock by pip, which checks its hash; uv then installs the rest several times faster than pip.
$(VENV)/.ok: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python %d.%d found; 3.11 or newer is needed: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	awk '/^[^ ]/ {wanted = /^uv==/} wanted' requirements.lock > $(VENV)/uv.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.lock
	$(BIN)/uv pip sync --quiet --require-hashes --build-constraints requirements.lock --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --python $(BIN)/python -e .
	@touch $@

demo: $(VENV)/.ok  ## fit a tagger on the docstrings of the installed libraries and tag with it
	$(BIN)/tagmill demo --run runs/demo

test: $(VENV)/.ok  ## the tests, without the slow ones
	$(BIN)/python -m pytest -q -m "not slow and not bench"

test-slow: $(VENV)/.ok  ## the slow tests: kills and resumes, real corpora (with TAGMILL_DATA set)
	$(BIN)/python -m pytest -q -m slow

bench: $(VENV)/.ok bench-env  ## speed and memory against other libraries, side by side (with TAGMILL_DATA set)
	$(BIN)/python -m pytest -q -s -m bench tests/bench
	$(BIN)/python -m tests.bench flat hinge folds tree growth start

bench-env: $(TAGMILL_PEERS)/.ok  ## the other libraries in an environment of their own, from their hashed lock

$(TAGMILL_PEERS)/.ok: tests/bench/peers.lock | $(VENV)/.ok
	$(PYTHON) -m venv $(TAGMILL_PEERS)
	$(BIN)/uv pip sync --quiet --require-hashes --build-constraints $< --python $(TAGMILL_PEERS)/bin/python $<
	@touch $@

airflow-env: $(AIRFLOW)/.ok  ## Airflow with its Spark provider in an environment of its own, from its hashed lock

# it has its own versions of what MLflow uses too, and a part of another PySpark
$(AIRFLOW)/.ok: conf/airflow.lock | $(VENV)/.ok
	$(PYTHON) -m venv $(AIRFLOW)
	$(BIN)/uv pip sync --quiet --require-hashes --python $(AIRFLOW)/bin/python $<
	@touch $@

airflow-test: $(VENV)/.ok airflow-env  ## the DAGs: their structure, and whole runs of both on a small corpus
	TAGMILL_BIN=$(abspath $(BIN)) $(AIRFLOW)/bin/python -m pytest -q tests/airflow

lint: $(VENV)/.ok  ## ruff, types of the public interface, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lock: $(VENV)/.ok  ## resolve the dependencies anew
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-emit-index-url --generate-hashes --no-header --no-annotate --quiet --upgrade -o requirements.lock

clean:  ## the environment and the demo run
	rm -rf $(VENV) runs
