# Every target makes its own .venv from constraints.txt when it is not there.
PYTHON ?= python3.11
BIN := .venv/bin
ENV := .venv/.installed

.PHONY: quickstart test lint

$(ENV): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(ENV)
	$(BIN)/python train.py experiment=quickstart

test: $(ENV)
	$(BIN)/python -m pytest

lint: $(ENV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
