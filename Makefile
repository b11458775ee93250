# Every target makes its own .venv from constraints.txt when it is not there.
PYTHON ?= python3.11
BIN := .venv/bin
ENV := .venv/.installed
QUICK := runs/quickstart
unexport PYTHONDONTWRITEBYTECODE  # what one process of the tests compiled, the next ones read

.PHONY: quickstart test test-long check lint docs benchmark referee ablation demo

$(ENV): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q --no-compile -c constraints.txt -e ".[dev]"
	# By all cores, but for libraries' own tests and the hundreds of models we do not use; some are of other Pythons.
	$(BIN)/python -m compileall -q -j 0 -x "/tests/|transformers/models/" .venv/lib > /dev/null || true
	touch $@

# The embedded world: SFT, vanilla and personalised reward model, P-DPO policy, one table.
quickstart: $(ENV)
	$(BIN)/python train.py experiment=quickstart encoder=none run_dir=$(QUICK)/vanilla overwrite=true
	$(BIN)/python train.py experiment=quickstart run_dir=$(QUICK)/personalised overwrite=true
	$(BIN)/python train.py experiment=quickstart_policy run_dir=$(QUICK)/policy overwrite=true
	$(BIN)/python eval.py eval=compare runs='$(QUICK)/*' out=$(QUICK)/report
	@echo "next: $(BIN)/plrhf adapt run=$(QUICK)/personalised    # new users, from a few pairs of theirs"

# The server with its web page on the embedded world: trains what is not there yet, then serves on PORT.
PORT ?= 8000
DEMO := runs/demo
$(DEMO)/reward/results.json: | $(ENV)
	$(BIN)/python train.py experiment=quickstart run_dir=$(@D) overwrite=true
$(DEMO)/policy/results.json: | $(ENV)
	$(BIN)/python train.py experiment=quickstart_policy run_dir=$(@D) overwrite=true
demo: $(DEMO)/reward/results.json $(DEMO)/policy/results.json
	$(BIN)/python -m plrhf.serving run=$(DEMO)/policy reward=$(DEMO)/reward database=sqlite:///$(DEMO)/people.db port=$(PORT)

test: $(ENV)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

# What takes longest: compilers, notebooks, the site, TRL beside us, several processes, other launchers.
# They often wait, so that three at a time keep two cores busy.
test-long: $(ENV)
	$(BIN)/python -m pytest -n 3 --dist worksteal -m long $$(grep -rl "mark\.long" --include="test_*.py" tests)

# What every commit must pass: style, types, the tests that are not slow.
check: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not long"

lint: $(ENV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation as a site, build/site/index.html; a dead link fails.
docs: $(ENV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

# Methods on frozen features of DIR, by one protocol, with controls, JOBS at a time: one report. Begun again
# it goes on.
DIR ?= sentence-encoder
REFEREE_ROWS := referee/polis,referee/llmfao,referee/llmfao_pairs,referee/llmfao_prompts,referee/ukpconvarg1,referee/personas_individual,referee/personas_clusters,referee/personas_features,referee/personas_strangers
referee: $(ENV)
	$(BIN)/python eval.py eval=referee "eval.rows=[$(REFEREE_ROWS)]" "eval.seeds=[0,1,2]" eval.trials=12 "eval.shots=[0,1,2,4,8,16,32]" eval.jobs=$(JOBS) backbone.path=$(DIR) out=runs/referee

# Steps a second and memory beside TRL's, one table; OUT=file.json
OUT ?= benchmark.json
benchmark: $(ENV)
	$(BIN)/python benchmarks/against_trl.py --out $(OUT)

# User models x aggregators x worlds, controls, curves over settings; one report. JOBS at a time. Begun
# again it goes on where it stopped; a failed job costs no other, and is named at the end.
JOBS ?= 2
ABLATION := runs/ablation
BACKBONE := $(ABLATION)/backbone/export
SWEEP = $(BIN)/python train.py -m hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)
INTO := run_dir=$(ABLATION)/sweeps

$(BACKBONE): $(ENV)
	$(BIN)/python train.py experiment=ablation/backbone run_dir=$(@D) overwrite=true
	touch $@

ablation: $(BACKBONE)
	failed=0; sweep() { $(SWEEP) "$$@" || failed=1; }; \
	sweep experiment=ablation/user_models $(INTO)/film; \
	sweep experiment=ablation/features $(INTO)/film-features; \
	sweep experiment=ablation/n_clusters $(INTO)/film-clusters; \
	sweep experiment=ablation/user_models data.kind=individual encoder=lookup data.shuffle_users=true $(INTO)/shuffled; \
	sweep experiment=ablation/features data.shuffle_users=true $(INTO)/shuffled-features; \
	sweep experiment=ablation/n_clusters data.kind=clusters encoder.n_clusters=4 data.shuffle_users=true $(INTO)/shuffled-clusters; \
	sweep 'experiment=[ablation/user_models,ablation/soft_prompt]' $(INTO)/soft_prompt; \
	sweep 'experiment=[ablation/features,ablation/soft_prompt]' $(INTO)/soft_prompt-features; \
	sweep 'experiment=[ablation/n_clusters,ablation/soft_prompt]' encoder.n_clusters=4 $(INTO)/soft_prompt-clusters; \
	sweep experiment=ablation/pairs_per_user $(INTO)/pairs_per_user; \
	sweep 'experiment=[ablation/pairs_per_user,ablation/n_clusters]' data.kind=individual,clusters encoder=cluster encoder.n_clusters=4 $(INTO)/pairs_per_user-clusters; \
	sweep experiment=ablation/alpha $(INTO)/alpha; \
	sweep experiment=ablation/n_users $(INTO)/n_users; \
	sweep experiment=ablation/init $(INTO)/init; \
	sweep experiment=ablation/n_tokens $(INTO)/n_tokens; \
	$(BIN)/python eval.py eval=compare runs='$(ABLATION)/sweeps/*/*' out=$(ABLATION)/report || failed=1; \
	exit $$failed
