# Two commands on a fresh machine with Python 3.11 or newer: `make run`, `make test`.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RULES := backprop,feedback_alignment,direct_feedback_alignment,kolen_pollack,forward_gradient

.PHONY: run test check docs package clean
PROSE := README.md CONTRIBUTING.md CHANGELOG.md WORKSPACE.md docs

run: $(VENV)/installed
	$(BIN)/python -m experiments.sweep \
	    --config=experiments/configs/quickstart.py \
	    --workdir=runs/quickstart --grid='rule=$(RULES)'
	$(BIN)/python scripts/plot_alignment.py runs/quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist=worksteal -rs

check: $(VENV)/installed
	$(BIN)/ruff check bpjax experiments scripts benchmarks tests examples docs .ci
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell $(PROSE) bpjax experiments examples scripts benchmarks tests
	JAX_PLATFORMS=cpu PYTHONPATH=. $(BIN)/python scripts/report.py --check

# Warnings are errors; needs no network.
docs: $(VENV)/installed
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -b html -W --keep-going -n -q docs docs/_build
	@echo 'built docs/_build/index.html'

package: $(VENV)/installed
	$(BIN)/python .ci/package.py

# pyenv's shims exist for versions that are not selected: ask each to answer.
$(VENV)/installed: setup.cfg pyproject.toml
	@for python in $(PYTHON) python3.12 python3.11 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	      2>/dev/null; then \
	    exec $$python -m venv $(VENV); fi; done; \
	  echo 'error: Python 3.11 or newer is needed; name one with' \
	      'make PYTHON=...' >&2; exit 1
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[test,docs]'
	touch $@

clean:
	rm -rf $(VENV) runs docs/_build docs/examples
