# make quickstart: sets everything up and prunes a ResNet-50 on this machine.  make test: the same set-up, then the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install quickstart test test-here test-ray exhaustive lint docs options gpu clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[dev]'
	touch $(STAMP)

quickstart: install
	$(BIN)/python jobs/prune_resnet50.py

# The tests on Ray mostly wait, so they run beside the others; each of the two fails on its own.
test: install lint
	@$(MAKE) --no-print-directory -j2 test-here test-ray

test-here: install
	$(BIN)/python -m pytest -n auto --dist worksteal --durations=20 -m 'not ray and not exhaustive and not job and not gpu'

# Its output comes in one piece when it ends, not between the lines of the others.
test-ray: install
	@$(BIN)/python -m pytest --durations=20 -m 'ray and not exhaustive' >$(VENV)/test-ray.log 2>&1; \
	status=$$?; cat $(VENV)/test-ray.log; exit $$status

exhaustive: install
	$(BIN)/python -m pytest -m 'exhaustive or job or gpu'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

options: install
	$(BIN)/python -m laasp_ray.cli.options_page

# Proves a machine with a GPU: make gpu, or make gpu DEVICE=cpu for a rehearsal. It installs nothing, so that it runs
# without a network: on the environment of this project if it is there, else on the python3 that is.
DEVICE ?= cuda
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) bench/gpu.py --device $(DEVICE) $(if $(OUT),--out $(OUT)) \
		$(if $(DATA),--data $(DATA)) $(if $(WHEELS),--wheels $(WHEELS)) $(GPU_OPTIONS)

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

$(VENV)/installed-docs: $(STAMP)
	$(PIP_INSTALL) --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
