# Needs python >= 3.11, make and git; everything else is put into .venv by the first target that wants it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

DEMO_STAMP := $(VENV)/.demo
BENCH_STAMP := $(VENV)/.bench

.PHONY: help demo test test-all test-floors style lint audit fuzz bench gallery notebooks docs dist browser screenshots clean

# no bytecode for the whole of each package, which takes a minute: what is imported is compiled then
PIP = $(PY) -m pip install --quiet --disable-pip-version-check --no-compile

# else each of the tests' processes compiles this package and the tests once more
unexport PYTHONDONTWRITEBYTECODE

# What the demo runs and no more. torch first and alone: its pin decides which build is taken, before anything else asks
# for "any torch".
$(DEMO_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lightning_toys needs python >= 3.11; set PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt -e .
	@touch $@

# All extras, and the tools of the tests.
$(STAMP): $(DEMO_STAMP)
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(DEMO_STAMP)  ## train regression and flow with 8 seeds each, and compare them
	$(PY) cli.py sweep -c configs/flow_vs_regression/demo.yaml --grid.model.mode '[regression,flow]'

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

style: $(STAMP)  ## ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lint: style  ## ruff and mypy
	$(VENV)/bin/mypy

# mypy, which takes one core, runs beside the tests
test: style  ## the gate: ruff, mypy, pytest
	@$(VENV)/bin/mypy > $(VENV)/mypy.txt 2>&1 & types=$$!; \
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal -m "not slow"; tests=$$?; \
	wait $$types; types=$$?; echo "mypy: $$(cat $(VENV)/mypy.txt)"; exit $$((tests ? tests : types))

# The whole matrix of configurations, verbs, precisions and ranks, and what is marked slow.
test-all: lint  ## all configurations, verbs, precisions and ranks, and what is slow
	LIGHTNING_TOYS_MATRIX=all OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

# The oldest version that pyproject.toml allows of all that it names, in an environment of its own; torch alone stays at its
# pin, since one more torch is gigabytes of wheels on most machines. On the oldest Python that we allow: not every floor has
# wheels for a newer one. Wheels only, so that a floor without one is an error and no build; ours is built by hatchling's floor.
FLOORS := .venv-floors
FLOORS_PY := $(FLOORS)/bin/python
FLOORS_PIP = $(FLOORS_PY) -m pip install --quiet --disable-pip-version-check --only-binary :all:

$(FLOORS)/.installed: pyproject.toml constraints.txt tests/floors.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "floors are those of python 3.11; set PYTHON=python3.11")'
	test -x $(FLOORS_PY) || $(PYTHON) -m venv $(FLOORS)
	$(FLOORS_PIP) "$$(grep '^torch==' constraints.txt)"
	$(FLOORS_PIP) packaging
	$(FLOORS_PY) tests/floors.py > $(FLOORS)/constraints.txt
	$(FLOORS_PIP) -c $(FLOORS)/constraints.txt hatchling hatch-fancy-pypi-readme editables
	$(FLOORS_PIP) -c $(FLOORS)/constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

# Old packages beside new ones that they came before are told so (matplotlib by pyparsing): such warnings are not ours.
test-floors: $(FLOORS)/.installed  ## the command line with the oldest dependencies allowed (Python 3.11)
	@root=$$(mktemp -d) && trap 'rm -rf "$$root"' EXIT && $(FLOORS_PY) cli.py sweep -c flow_vs_regression/demo \
	  --grid.model.mode '[regression,flow]' --trainer.max_epochs 20 --run.root "$$root"
	OMP_NUM_THREADS=1 $(FLOORS_PY) -m pytest -n auto --dist worksteal -m "not slow" -W ignore::DeprecationWarning \
	  tests/test_cli.py tests/commands tests/training/test_tensorboard.py

# Changed configurations, flags, checkpoints, run folders and model files, at random: no traceback, no hang, no file lost. Some
# two hours on two cores; the same command goes on where it was stopped. Failed cases are in build/fuzz/failed, made small.
FUZZ_CASES ?= 5000
FUZZ_SEED ?= 0
FUZZ_JOBS ?= $(shell nproc)

fuzz: $(STAMP)  ## changed input at random, some two hours
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --cases $(FUZZ_CASES) --seed $(FUZZ_SEED) --jobs $(FUZZ_JOBS)

# jax and blackjax, which only the benchmarks want
$(BENCH_STAMP): $(STAMP)
	$(PIP) -c constraints.txt -e ".[bench]"
	@touch $@

# Hours of a core, with nothing beside it. The last line writes RESULTS.md's first table from the others' sections.
bench: $(BENCH_STAMP)  ## benchmarks, hours; writes benchmarks/RESULTS.md
	$(PY) benchmarks/startup_speed.py --write
	$(PY) benchmarks/training_speed.py --write
	$(PY) benchmarks/policy_speed.py --write
	$(PY) benchmarks/mirror_speed.py --write
	$(PY) benchmarks/entropy_speed.py --write
	$(PY) benchmarks/bilevel_speed.py --write
	$(PY) benchmarks/scale_speed.py --write
	$(PY) benchmarks/sweep_speed.py --write
	$(PY) benchmarks/jitted_speed.py --write
	$(PY) benchmarks/jitted_policy_speed.py --write
	$(PY) benchmarks/jitted_control_speed.py --write
	$(PY) benchmarks/jitted_mirror_speed.py --write
	$(PY) benchmarks/demo_speed.py --write
	$(PY) benchmarks/summary.py --write

# What is known of the pinned versions' holes, from PyPI's advisories: a fresh environment, so that nothing of it is ours.
# --strict: a package that the service does not know is a failure too, and not a clean bill.
audit:  ## known holes of the pinned versions (needs the network)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder/venv" && \
	  "$$folder/venv/bin/pip" install --quiet --disable-pip-version-check pip-audit && \
	  { "$$folder/venv/bin/pip-audit" -r constraints.txt --no-deps --disable-pip --strict || { \
	    echo "audit: a pin has a known hole (listed above), or the advisories could not be had: then nothing was audited" >&2; \
	    exit 1; }; }

# Every figure, table and number of README and docs, from the code: in a quick setting to build/gallery-quick (some
# twenty minutes), or with FULL=1 as documented, into the docs (from nothing more than a day of a core; most runs of hours are kept in gallery/kept). What is finished stays.
gallery: $(STAMP)  ## figures, tables and numbers of the docs; FULL=1 writes them, ONLY="a b" some
	OMP_NUM_THREADS=1 $(PY) gallery/build.py $(if $(FULL),--full) $(if $(ONLY),--only $(ONLY))

# The outputs of docs/notebooks, by executing them; a minute and a half.
notebooks: $(STAMP)  ## outputs of docs/notebooks
	$(PY) gallery/notebooks.py

# The site, out of docs and the docstrings: open build/site/index.html. A warning is an error. Some minutes, since every module
# is imported and has a page; what has not changed is not built again.
docs: $(STAMP)  ## the site, into build/site
	$(PY) -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/site

# What would be published, into dist/: the sdist and the wheel, their page as an index would show it, and whether both are whole
# and the wheel is small. In an environment of its own; the backend is installed by `build`, as it is by whoever installs us.
DIST := .venv-dist

$(DIST)/.installed: constraints.txt
	test -x $(DIST)/bin/python || $(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	@touch $@

dist: $(DIST)/.installed  ## wheel and sdist, checked, into dist/
	rm -rf dist
	$(DIST)/bin/python -m build --outdir dist
	$(DIST)/bin/twine check --strict dist/*
	$(DIST)/bin/python tests/dist.py dist

# The browser test needs Debian's chromium; without it the test is skipped, outside of CI.
browser:  ## Chromium for the tests that look at pages (Debian, root)
	@command -v chromedriver >/dev/null && command -v chromium >/dev/null || \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core)

screenshots: $(STAMP) browser  ## TensorBoard's pictures of the docs
	LIGHTNING_TOYS_SCREENSHOTS=docs/images $(PY) -m pytest -q tests/training/test_tensorboard.py

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(FLOORS) $(DIST) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
