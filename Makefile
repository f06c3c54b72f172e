# Everything a newcomer, a contributor and the CI type. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Nothing here may reach out to a model hub: the demo's weights are in the repository.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## make .venv (PYTHON=python3.12 picks another Python)

demo: $(READY) ## render manifests/demo.parquet with the model that ships, into out/demo
	@$(BIN)/python submit.py jobs/demo.yaml
	@$(BIN)/ltx-batch report jobs/demo.yaml

test: $(READY) ## every test but the slow ones and those that need a GPU
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY) ## the kill matrix on local disk and S3
	@$(BIN)/python -m pytest -m slow -n 2

check: $(READY) ## format, lint, types, layers, unit tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest tests/unit

format: $(READY) ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## what the machinery costs: overhead and scale (benchmarks/README.md)
	@$(BIN)/python benchmarks/overhead.py
	@$(BIN)/python benchmarks/scale.py

clean: ## remove caches and the output of demo and smoke; .venv and other output stay
	@rm -rf out/demo out/smoke build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV); the first time takes minutes, as PyTorch is large."
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[s3,dev]'
	@touch $@
