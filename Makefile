# make quickstart: sets everything up and prunes a ResNet-50 on this machine.  make test: the same set-up, then the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install quickstart test exhaustive lint docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[dev]'
	touch $(STAMP)

quickstart: install
	$(BIN)/python jobs/prune_resnet50.py

test: install lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not ray and not exhaustive and not job and not gpu'
	$(BIN)/python -m pytest -m 'ray and not exhaustive'

exhaustive: install
	$(BIN)/python -m pytest -m 'exhaustive or job or gpu'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

$(VENV)/installed-docs: $(STAMP)
	$(PIP_INSTALL) --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
