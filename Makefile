# What each target does is one or two lines; `make` alone lists them. Everything happens in .venv, nothing outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml setup.py CMakeLists.txt package.xml $(wildcard msg/*.msg)
export OMP_NUM_THREADS ?= 2
# Tests: the setters of messages check every value (Humble always does), and no message leaves this machine.
TEST_ENV := ROS_PYTHON_CHECK_FIELDS=1 ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST
PYTEST := $(TEST_ENV) $(BIN)/pytest --durations 12
say = @printf '\n== %s\n' "$(1)"

.PHONY: help demo venv lint test test-full test-gpu colcon clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

demo: $(VENV)/demo.stamp ## a real drone sequence through the real node; results and a report in out/demo/
	$(call say,Playing demo/sequence into the node; results go to out/demo)
	@$(BIN)/python demo/run.py --out out/demo

venv: $(VENV)/dev.stamp ## .venv with everything for development (ROS 2 from wheels, torch, ruff, mypy, pytest)

lint: $(VENV)/dev.stamp ## ruff (lint and format) and mypy
	$(call say,Lint and types)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@mkdir -p build/types && ln -sfn ../../tools build/types/matchanything_tools && $(BIN)/mypy

test: lint ## lint, types, and all tests that take seconds
	$(call say,Tests (without those marked full or gpu))
	@$(PYTEST)

test-full: lint ## lint, types, and all tests, also those that take minutes
	$(call say,All tests (without those marked gpu))
	@$(PYTEST) -m "not gpu" --timeout 1800

test-gpu: $(VENV)/dev.stamp ## the tests that need an NVIDIA GPU
	$(call say,Tests on the GPU)
	@$(PYTEST) -m gpu --timeout 1800

colcon: $(VENV)/dev.stamp ## build as a ROS 2 workspace would (a sourced ROS 2, else wheels), and check what was installed
	$(call say,colcon build of a workspace; without a sourced ROS 2 its wheels are installed for it: some minutes)
	@$(PYTEST) -m full --timeout 1800 test/test_package_colcon.py

clean: ## remove everything that was made here
	rm -rf $(VENV) build dist out install log *.egg-info matchanything_ros/msg matchanything_ros/*.so

# The environments. Installed editable: changes to .py files need no new installation.
$(BIN)/python:
	$(call say,Making the environment $(VENV) with $(PYTHON))
	@$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/python $(INPUTS)
	$(call say,Installing the package and ROS 2 (wheels) into $(VENV); messages are generated and compiled: about a minute)
	@$(BIN)/pip install -q -e '.[ros,replay]' && touch $@

$(VENV)/dev.stamp: $(BIN)/python $(INPUTS)
	$(call say,Installing the package with all tools for development into $(VENV); messages are generated and compiled: a few minutes)
	@$(BIN)/pip install -q -e '.[ros,dev]' && touch $(VENV)/demo.stamp $@
