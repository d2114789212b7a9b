# The two commands of a newcomer: `make demo` and `make test`. Both create .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs format clean

demo: $(VENV)/.installed
	$(BIN)/sharpkit score embedded --out demo-output/run --m 1,4,16,64,256 --rho 0.1
	$(BIN)/sharpkit plot demo-output/run --out demo-output/predictive_power.png

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict sharpkit

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html docs docs/_build/html

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-output .pytest_cache .mypy_cache .ruff_cache docs/_build docs/api/generated
