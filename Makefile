# Every target makes its own .venv from constraints.txt when it is not there.
PYTHON ?= python3.11
BIN := .venv/bin
ENV := .venv/.installed
QUICK := runs/quickstart

.PHONY: quickstart test lint benchmark

$(ENV): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# The embedded world: SFT, vanilla and personalised reward model, P-DPO policy, one table.
quickstart: $(ENV)
	$(BIN)/python train.py experiment=quickstart encoder=none run_dir=$(QUICK)/vanilla
	$(BIN)/python train.py experiment=quickstart run_dir=$(QUICK)/personalised
	$(BIN)/python train.py experiment=quickstart_policy run_dir=$(QUICK)/policy
	$(BIN)/python eval.py eval=compare runs='$(QUICK)/*' out=$(QUICK)/report

test: $(ENV)
	$(BIN)/python -m pytest -n 2

lint: $(ENV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Steps a second and memory beside TRL's, one table; OUT=file.json
OUT ?= benchmark.json
benchmark: $(ENV)
	$(BIN)/python benchmarks/against_trl.py --out $(OUT)
