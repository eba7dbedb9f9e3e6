PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

# Islands of agreement on a bundled photograph.
demo: $(VENV)/.installed
	$(BIN)/python predict_test_image.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy apm *.py flop_analysis/*.py misc_scripts/*.py misc_scripts/bundled/*.py single_token_segmentation/*.py

bench: $(VENV)/.installed
	$(BIN)/python flop_analysis/benchmark.py

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV)
