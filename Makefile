# Needs Python 3.11 or newer and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast lint types clean

demo: .venv/installed
	@$(BIN)/loadmaster demo

# Three processes for two processors: one of them runs the live groups, and mostly waits.
PYTEST := $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test: .venv/installed
	$(PYTEST)

test-fast: .venv/installed
	$(PYTEST) -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/vulture

# mypy needs to see the checkout under the package's own name.
FLOORS := foundation traces kernels placement simulator workers app cli
MODULES := $(FLOORS:%=-p loadmaster.%) -m loadmaster -m loadmaster.errors

types: .venv/installed
	rm -rf build
	link=$$(mktemp -d) && ln -s "$(CURDIR)" $$link/loadmaster && cd $$link \
	  && "$(CURDIR)/$(BIN)/mypy" --config-file loadmaster/pyproject.toml \
	     --cache-dir "$(CURDIR)/.mypy_cache" $(MODULES); \
	status=$$?; rm -rf $$link; exit $$status

# Installing talks into a file; it is shown where a step fails. torch comes first: its CPU build
# then satisfies the floor, and nothing larger is fetched.
LOG := .venv/install.log
QUIET = >> $(LOG) 2>&1 || { tail -n 40 $(LOG); echo "installing failed; all of it is in $(LOG)"; exit 1; }

.venv/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@: > $(LOG)
	@echo "installing what Loadmaster needs into .venv (the first time: a few minutes)"
	@$(BIN)/python -m pip install --upgrade pip $(QUIET)
	@$(BIN)/python -m pip install -r constraints.txt $(QUIET)
	@$(BIN)/python -m pip install -e ".[dev]" -c constraints.txt $(QUIET)
	@echo "compiling its loops, once"
	@OMP_NUM_THREADS=1 $(BIN)/python -m loadmaster.workers.warm_up $(QUIET)
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
