# `make demo` and `make test` do their own set-up; nothing has to be installed by hand but Python 3.11+ and make.
# Recipes use relative paths only, so that the project also works in a folder whose path has spaces.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.outgrow-installed

.PHONY: setup demo test lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	$(PY) -m outgrow.runtime.cli demo

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --level error

test: lint
	$(PY) -m pytest

format: setup
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

clean:
	rm -rf .venv build outgrow.egg-info runs
