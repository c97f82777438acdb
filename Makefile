SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TAGMILL_PEERS ?= .venv-peers
# of make cluster-up: where it keeps its state, how many workers of how much, the master's port (0: a free one)
CLUSTER ?= .cluster
CLUSTER_WORKERS ?= 2
CLUSTER_CORES ?= 1
CLUSTER_MEMORY ?= 1g
CLUSTER_PORT ?= 0
# of make dist: the Python of the executors' hosts; empty: the one behind $(VENV)
WORKER_PYTHON ?=

AIRFLOW ?= .venv-airflow
# of make test and test-slow: files of tests that run side by side
PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow chaos bench bench-env cluster-up cluster-down dist airflow-env airflow-test lint lock clean

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
	$(BIN)/python -m pytest -q -n $(PROCESSES) --dist loadfile -m "not slow and not chaos and not bench"

test-slow: $(VENV)/.ok  ## the slow tests: kills and resumes, real corpora (with TAGMILL_DATA set)
	$(BIN)/python -m pytest -q -n $(PROCESSES) --dist loadfile -m slow

chaos: $(VENV)/.ok  ## kills at random moments, guards taken away, which the loop must notice; damage of every kind; all circumstances
	$(BIN)/python -m tests.chaos --kills $(or $(KILLS),100) $(if $(SEED),--seed $(SEED))
	for guard in in_place manifest_first keeps_rubbish; do \
	    $(BIN)/python -m tests.chaos --kills 20 --mutation $$guard; [ $$? -eq 4 ] || exit 1; \
	done
	$(BIN)/python -m pytest -q -m chaos

bench: $(VENV)/.ok bench-env  ## speed and memory against other libraries, side by side (with TAGMILL_DATA set)
	$(BIN)/python -m pytest -q -s -m bench tests/bench
	$(BIN)/python -m tests.bench flat hinge folds tree growth start integrity

bench-env: $(TAGMILL_PEERS)/.ok  ## the other libraries in an environment of their own, from their hashed lock

$(TAGMILL_PEERS)/.ok: tests/bench/peers.lock | $(VENV)/.ok
	$(PYTHON) -m venv $(TAGMILL_PEERS)
	$(BIN)/uv pip sync --quiet --require-hashes --build-constraints $< --python $(TAGMILL_PEERS)/bin/python $<
	@touch $@

cluster-up: $(VENV)/.ok  ## a Spark cluster on this machine: a master, two workers, a secret; prints its address
	@$(BIN)/python -m jobs.cluster up --folder $(CLUSTER) --workers $(CLUSTER_WORKERS) --cores $(CLUSTER_CORES) --memory $(CLUSTER_MEMORY) --port $(CLUSTER_PORT)

cluster-down: $(VENV)/.ok  ## stop it
	@$(BIN)/python -m jobs.cluster down --folder $(CLUSTER)

dist: $(VENV)/.ok  ## the wheel, and the environment of executors as one archive, in dist/
	$(BIN)/python -m jobs.dist --output dist --python "$(WORKER_PYTHON)"

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

clean:  ## the environment, the demo run, what dist made, what is left of a cluster that was stopped
	rm -rf $(VENV) runs dist $(if $(wildcard $(CLUSTER)/cluster.json),,$(CLUSTER))
