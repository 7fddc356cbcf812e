# One door to everything: `make demo` shows what Milepost does, `make test` proves it.
#
#   make VENV=/path/to/environment …    use (or create) another environment; a torch in it is kept
#   make PYTHON=python3.12 …            the interpreter that a new environment is made with

VENV ?= .venv
PYTHON ?= python3.11
GAZETTEER_VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/milepost.stamp
HAVE_GAZETTEER := $(wildcard gazetteer/Makefile)
GAZETTEER := $(MAKE) -C gazetteer VENV=$(GAZETTEER_VENV) PYTHON=$(PYTHON)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-distributed test test-slow test-filesystems test-chaos test-storm test-gazetteer cov \
	check lint types docs docs-site dist bench bench-full fmt fmt-check size gazetteer gazetteer-demo clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 24

setup: $(STAMP) ## the virtual environment, with pinned versions

$(STAMP): pyproject.toml constraints.txt tools/install.sh
	PYTHON="$(PYTHON)" bash tools/install.sh "$(VENV)"
	@touch $@

demo: $(STAMP) ## train, kill the trainer in the middle of a save, resume, compare bit for bit
	$(BIN)/python examples/demo.py

demo-distributed: $(STAMP) ## train on 4 ranks, kill them, go on on 2, kill them, go on on one
	$(BIN)/python examples/demo_distributed.py

test: $(STAMP) ## what proves the promises, but for the long runs (test-slow, test-filesystems)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not filesystems" $(PYTEST_ARGS)
ifneq ($(HAVE_GAZETTEER),)
	@if bash tools/touched.sh test-gazetteer gazetteer; then $(MAKE) test-gazetteer; fi
endif

test-slow: $(STAMP) ## soaks and long property runs only
	$(BIN)/python -m pytest -m slow --timeout 3600 -o faulthandler_timeout=3700 $(PYTEST_ARGS)

test-filesystems: $(STAMP) ## saves on every kind of file system that root can mount here
	$(BIN)/python -m pytest -n $(WORKERS) --timeout 900 -o faulthandler_timeout=1000 tests/filesystems $(PYTEST_ARGS)

test-chaos: $(STAMP) ## kills by ckpt-chaos at every file event of trainer and writer
	$(BIN)/python -m pip install --quiet -c constraints.txt ckpt-chaos
	$(BIN)/python -m pytest -m slow -n 0 tests/faults/test_ckpt_chaos.py $(PYTEST_ARGS)

test-storm: $(STAMP) ## jobs of three ranks under SIGKILL, SIGSTOP and SIGCONT (STORM_ROUNDS=, STORM_SEED=)
	$(BIN)/python -m pytest -m slow -n 0 -o faulthandler_timeout=3700 tests/faults/test_storm.py $(PYTEST_ARGS)

cov: $(STAMP) ## the tests with branch coverage, child processes included
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -m "not slow and not filesystems" $(PYTEST_ARGS)
	$(BIN)/python -m coverage combine
	$(BIN)/python -m coverage report

check: fmt-check lint types docs docs-site size ## all gates but the tests
ifneq ($(HAVE_GAZETTEER),)
	$(GAZETTEER) check
endif

fmt: $(STAMP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

fmt-check: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP) ## ruff, spelling, and the dependency rule
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-cache

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy --strict src

docs: $(STAMP) ## run the code in the documents, and compare what is generated in them
	$(BIN)/python -m pytest -p no:randomly README.md docs $(PYTEST_ARGS)
	$(BIN)/python -m cogapp --check --diff -p "import sys; sys.path.insert(0, 'tools')" docs/cli.md docs/filesystems.md
	$(BIN)/python benchmarks/report.py --check

docs-site: $(STAMP) $(VENV)/docs.stamp ## the documents and the API reference as a web site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(STAMP) $(VENV)/dist.stamp ## build wheel and sdist, check them, run README's example with the wheel
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tools/check_dist.py dist

docs/filesystems.md: docs/filesystems.json

docs/filesystems.json: $(STAMP) FORCE # as root
	MILEPOST_FILESYSTEMS=$@ $(BIN)/python -m pytest tests/filesystems/test_features.py

docs/cli.md docs/filesystems.md: $(STAMP) FORCE ## write the command line's help, and what was found, into them
	$(BIN)/python -m cogapp -r -p "import sys; sys.path.insert(0, 'tools')" $@

NAME ?=
BENCH_ARGS ?=

$(VENV)/bench.stamp $(VENV)/dist.stamp $(VENV)/docs.stamp: $(VENV)/%.stamp: $(STAMP)
	bash tools/install.sh "$(VENV)" $*
	@touch $@

bench: $(VENV)/bench.stamp ## benchmarks against the peers, about 10 minutes (NAME="gpt2 lost": these, --list names all)
	$(BIN)/python benchmarks/run.py $(NAME) $(BENCH_ARGS)

bench-full: $(VENV)/bench.stamp ## all of them, into docs/benchmarks and README; run again, it goes on where it ended
	$(BIN)/python benchmarks/run.py --full --resume $(NAME) $(BENCH_ARGS)
	$(BIN)/python benchmarks/report.py

docs/benchmarks: $(STAMP) FORCE ## write the tables and charts of docs/benchmarks/results.json
	$(BIN)/python benchmarks/report.py

size: $(STAMP) ## lines of code per package against the budget
	$(BIN)/python tools/size.py

ifneq ($(HAVE_GAZETTEER),)
test-gazetteer: ## the tests of gazetteer/, and this repository documented by it
	$(GAZETTEER) test self NAME=Milepost

gazetteer: ## document this repository with the documentation system in gazetteer/, and follow every link
	$(GAZETTEER) self NAME=Milepost

gazetteer-demo: ## its demo
	$(GAZETTEER) demo
endif

clean: ## what `make` made, except environments
	rm -rf build dist demo-run .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*

FORCE:
