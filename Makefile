# make train: pretrain the quick start.   make test: run the tests.   Both first install what they need into .venv.
# make torch: install PyTorch and transformers there too, with which the tests compare exported checkpoints.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

TORCH ?= torch

.PHONY: train test torch lint clean

train: .venv/installed
	$(BIN)/python -m lckv_jax train configs/quickstart.yaml

test: .venv/installed
	$(BIN)/python -m pytest -n auto

torch: .venv/installed-torch

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

.venv/installed-torch: .venv/installed pyproject.toml
	$(PIP) '$(TORCH)' -e '.[torch]'
	touch $@

clean:
	rm -rf .venv
