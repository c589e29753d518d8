# make            the whole recipe on generated data: base → stable → three branches → GRPO from each → table and picture
# make SMOKE=1    the same with a few steps of everything (runs/smoke)
# make tool       a further branch, not the paper's: thinks with a calculator; stable → tool → GRPO → the same table
# make test       all tests, on a CPU
# make findings   the paper's findings F0 to F6, three seeds, hours; ONLY=F1 SEEDS=1: a part (assets/findings.py)
# make real DATA=DIR   a model of 28M parameters on public files (data/README.md): shards, all stages, losses
# make gpu        the first twenty minutes on a GPU, with PYTHON's own torch: tests/gpu.sh, parts A and B
# make bench      the benchmarks: minutes each, the figures of README and log
# make lint | clean | distclean (clean keeps runs/, distclean asks before it deletes them)
#
# SEED=1 OUT=runs/seed1 another seed; PYTHON=python3.12 another interpreter; JOBS=4 more stages side by side.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
SEED   ?= 0
JOBS   ?= 2
STARTS := base stable short long hybrid

ifdef SMOKE
OUT  ?= runs/smoke
FEW   = --steps 12 --save-every 6 --eval-every 12
FEWRL = --steps 2 --prompts-per-step 4 --rollouts 4 --eval-problems 20 --eval-subset 20
else
OUT  ?= runs/tiny
endif

# Stages that run side by side get one thread each: small matrices gain more from that than from sharing two.
RUN    = --seed $(SEED) --out $(OUT)
ALONE  = --threads $(JOBS) $(RUN)
BESIDE = --threads 1 $(RUN)

all: $(VENV)/run.ok
	@$(MAKE) --no-print-directory -j$(JOBS) recipe
	@$(PY) -m assets.report $(OUT)

recipe: rl-long rl-hybrid rl-short rl-stable rl-base # the longest first

base: $(VENV)/run.ok
	@$(PY) midtrain.py --branch base $(FEW) $(ALONE)
stable: base
	@$(PY) midtrain.py --branch stable $(FEW) --keep-every 600 $(ALONE)
short long hybrid: stable
	@$(PY) midtrain.py --branch $@ $(FEW) $(BESIDE)
rl-base: stable # after stable, which has the machine to itself
rl-stable: stable
rl-short: short
rl-long: long
rl-hybrid: hybrid
$(STARTS:%=rl-%): rl-%:
	@$(PY) rl.py --branch $* $(FEWRL) $(BESIDE)

tool: stable
	@$(PY) midtrain.py --branch tool $(FEW) $(ALONE)
	@$(PY) rl.py --branch tool $(FEWRL) $(ALONE)
	@$(PY) -m assets.report $(OUT)

SEEDS ?= 3
ONLY  ?= F0,F1,C,F2,F3,F4,F5,F6,QA,W,T,O

findings: $(VENV)/run.ok
	@$(PY) -m assets.findings --only $(ONLY) --seeds $(SEEDS) --jobs $(JOBS)

# What two CPU cores do in half an hour; on a GPU: make real DATA=DIR BATCH= BASE= STABLE= DECAY=, the preset's own numbers.
REAL   ?= runs/real
BATCH  ?= --batch 4 --micro-batch 2
BASE   ?= --steps 120
STABLE ?= --steps 240
DECAY  ?= --steps 80
SMALL   = $(PY) midtrain.py --preset small --data $(REAL)/data --out $(REAL) --seed $(SEED) --eval-every 40 $(BATCH)

real: $(VENV)/run.ok
	@test -d "$(DATA)" || { echo "make real needs DATA=DIR, the folder of the public files (README)" >&2; exit 2; }
	@$(PY) -m data.prepare --data $(DATA) --out $(REAL)/data --seq-len 1024 --vocab-size 8192 --keep-overlaps long_cot
	@$(SMALL) --branch base $(BASE)
	@$(SMALL) --branch stable $(STABLE)
	@for branch in short long hybrid; do $(SMALL) --branch $$branch $(DECAY) || exit $$?; done
	@$(PY) -m assets.report $(REAL)

$(VENV)/run.ok: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/test.ok: $(VENV)/run.ok requirements-dev.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@$(PY) -m pip install -q --disable-pip-version-check "lm-eval[hf]" || echo "without lm-eval: its test is skipped"
	@touch $@

test: $(VENV)/test.ok
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal tests

bench: $(VENV)/test.ok
	@for f in tests/bench_*.py; do echo "== $$f"; $(PY) $$f || exit 1; done

gpu:
	PYTHON=$(PYTHON) bash tests/gpu.sh A; PYTHON=$(PYTHON) bash tests/gpu.sh B

lint: $(VENV)/test.ok
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@test ! -d runs || { du -sh runs; printf "delete runs/, every checkpoint in it? [y/N] "; \
	    read answer; test "$$answer" = y && rm -rf runs || echo "kept"; }

.PHONY: all recipe tool findings real $(STARTS) $(STARTS:%=rl-%) test bench gpu lint clean distclean
