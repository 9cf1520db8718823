# Every target starts from nothing but git, Python and make, and costs nothing when there is nothing
# to do. Environments hold exactly what requirements/*.lock names.

VENV := .venv
PYTHONS := 3.12 3.11
SMOKE_VENV := .venv-py311
SMOKE_PYTHON := 3.11
LOCKS := requirements/py311.lock requirements/py312.lock

READY := $(VENV)/.installed
SMOKE_READY := $(SMOKE_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo serve test smoke lint types format docs lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY)  ## Make .venv from the lock of the newest supported Python (3.12, else 3.11)

demo: $(READY)  ## Fetch the model and run the main job on 8 virtual CPU devices
	$(VENV)/bin/python -m experiments.quickstart --config=configs/smollm2_cpu.py

serve: $(READY)  ## Serve the model over HTTP at port 8000, on 8 virtual CPU devices
	$(VENV)/bin/pdjax serve --config=configs/smollm2_cpu.py

test: $(READY)  ## Run every test, in as many processes as there are cores
	$(VENV)/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

# Files without such a test are not collected: to import them takes longer than the tests.
smoke: $(SMOKE_READY)  ## Run the smoke subset on Python 3.11 and the oldest JAX supported
	$(SMOKE_VENV)/bin/python -m pytest -m smoke --numprocesses=auto --maxprocesses=4 --dist=worksteal \
		$$(grep -rlE 'smoke' tests --include='test_*.py')

lint: $(READY)  ## Check style and format
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check

types: $(READY)  ## Check types
	$(VENV)/bin/python -m mypy

format: $(READY)  ## Rewrite the sources in the house format
	$(VENV)/bin/python -m ruff check --fix
	$(VENV)/bin/python -m ruff format

docs: $(READY)  ## Write the generated pages and diagrams of docs/ anew
	$(VENV)/bin/python docs/scripts/diagrams.py
	$(VENV)/bin/python -m docs.scripts.configuration
	$(VENV)/bin/python -m docs.scripts.families
	$(VENV)/bin/python -m pdjax.host.metrics.definitions > docs/metrics.md

lock:  ## Resolve requirements/*.lock anew (needs Python 3.11 and 3.12)
	requirements/lock 3.11 3.12

clean:  ## Remove environments, caches and build outputs; results/ stays
	rm -rf .venv .venv-* build dist *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache
	find pdjax pallas_kernels experiments configs tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.locked: $(LOCKS)
	requirements/make-venv $(VENV) $(PYTHONS)
	@touch $@

$(SMOKE_VENV)/.locked: $(LOCKS)
	requirements/make-venv $(SMOKE_VENV) $(SMOKE_PYTHON)
	@touch $@

# setuptools comes from the lock too: with build isolation pip would fetch an unpinned one. Its
# compat mode puts the clone on the path: otherwise, beside a clone that is itself called pdjax, that
# folder would be imported as an empty package.
%/.installed: %/.locked pyproject.toml
	requirements/tell "Installing pdjax" \
		$*/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --editable . --config-settings editable_mode=compat
	@touch $@
