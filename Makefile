# Everything runs in .venv, which is made here from the pinned constraints: a bare clone needs Python 3.11+, git and make.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
CODE := kernels operators cluster pipelines tests benchmarks

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types clean

demo: $(INSTALLED)
	@$(VENV)/bin/vectormill demo

test: $(INSTALLED)
	@$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	@$(VENV)/bin/python -m ruff check --quiet $(CODE)
	@$(VENV)/bin/python -m ruff format --quiet --diff $(CODE)

types: $(INSTALLED)
	@$(VENV)/bin/python -m mypy --no-error-summary

clean:
	rm -rf demo build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an install that was interrupted is done again. An environment that is there but lacks
# pip (another tool made it, or its creation was interrupted) is completed by running venv over it.
$(INSTALLED): pyproject.toml constraints.txt
	@python="$(VENV)/bin/python"; test -x "$$python" || python="$(PYTHON)"; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "vectormill needs Python 3.11 or newer, but $$python is $$("$$python" --version 2>/dev/null || echo missing);" \
	         "remove an older $(VENV), or run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (some minutes the first time) ..." >&2
	@$(VENV)/bin/python -m pip install -qq -c constraints.txt -e ".[dev]"
	@touch $@
