# The two commands of the README. Each sets everything up in .venv on a machine with Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test types lint imports unit torch release clean

demo: $(VENV)/.installed
	$(BIN)/ifp pull smollm2-135m
	$(BIN)/ifp generate --task "help me write Python" \
	    "Write a Python function that counts the vowels in a string." \
	    --max-tokens 200 --temp 0 --stats

test: lint types imports unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q --numprocesses auto --dist loadfile

torch: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --group parity

release: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist . >/dev/null
	$(BIN)/python docs/check_release.py dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

# setuptools warns about what an editable installation is for, whoever asked for one.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[plots]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

clean:
	rm -rf $(VENV)
