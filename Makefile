PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
INSTALL := bin/python -m pip install --quiet --disable-pip-version-check
# TORCH=cpu: PyTorch's own builds without CUDA, which are smaller. Their names end in +cpu, which
# pip counts as later than the same version at PyPI.
INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: demo test test-oldest lint bench clean

# Islands of agreement on a bundled photograph.
demo: $(VENV)/.installed
	$(BIN)/python predict_test_image.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# The same tests with the oldest Python and the lower end of every range in pyproject.toml.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy apm *.py flop_analysis/*.py misc_scripts/*.py misc_scripts/bundled/*.py single_token_segmentation/*.py

bench: $(VENV)/.installed
	$(BIN)/python flop_analysis/benchmark.py

$(VENV)/.installed: pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(INSTALL) $(INDEX) -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/$(INSTALL) $(INDEX) -e '.[dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	sed -n 's/.*"\([A-Za-z_-]*\)>=\([^",]*\),.*/\1==\2/p' pyproject.toml > $(OLDEST)/lowest.txt
	$(OLDEST)/$(INSTALL) -c $(OLDEST)/lowest.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST)
