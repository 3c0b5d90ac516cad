# `make` lists the targets. `make demo`, `make test` and `make check` set up what they need.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test browser kernels check fix clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=python3.12, PIP_ARGS='--extra-index-url …', DEMO_ARGS, TEST_ARGS='-k name'"

install: $(STAMP) ## create .venv with the package, the demo's plot and the tools

demo: $(STAMP) ## solve problems live, then race D2F against autoregression
	$(BIN)/d2f demo $(DEMO_ARGS)

# Two processes, since two cores are what CI has; a file's tests stay together, as they share models. In
# the order of their names: files of few long tests would come last, and one process would wait.
test: $(STAMP) ## run the tests, all but those of the page
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/browser $(TEST_ARGS)

browser: $(STAMP) ## run the tests of the server's page in a real Chromium
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
	  echo "make: there is no Chromium in PATH; on Debian install the package chromium"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser $(TEST_ARGS)

kernels: $(STAMP) ## run the kernels' tests, interpreted where there is no GPU; gets Triton if need be
	@$(BIN)/python -c 'import triton' 2>/dev/null || { echo "Installing Triton"; \
	  $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) 'triton>=3.6,<3.8'; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/ops tests/unit/engine/test_backends.py \
	  tests/unit/models/test_feature_cache.py tests/architecture/test_public_api.py

check: $(STAMP) ## lint, formatting, types, import contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fix: $(STAMP) ## repair what ruff can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "make: no '$(PYTHON)' found; install Python 3.11 or newer, or say PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: d2f needs Python 3.11 or newer, but '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1);" \
	       "say PYTHON=python3.12, for example"; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "Creating $(VENV) with $$("$(PYTHON)" -V)"; "$(PYTHON)" -m venv --clear $(VENV); } || { \
	  echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv"; exit 1; }
	@rm -f $@
	@echo "Installing d2f and its tools into $(VENV); PyTorch is large, this takes some minutes (log: $(LOG))"
	@{ PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	     $(PIP_ARGS) -c constraints.txt -e '.[dev,demo]' 2>&1 && touch $@; } | tee $(LOG) \
	   | awk '/^Collecting|^Installing build/ { printf "  %s\n", $$0 } \
	          /^ *Downloading .*MB\)/ { printf "  %s\n", $$0 } \
	          /^Installing collected/ { print "  Installing packages" } { fflush() }'
	@test -f $@ || { tail -n 25 $(LOG); echo "make: the installation failed; the whole log is $(LOG)"; exit 1; }
