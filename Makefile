# make reproduce   set up, then run the compendium (ARGS="--scale smoke" and so on go to `boig reproduce`)
# make test        set up, then every check that CI runs
# make docs        set up, then the notebooks as a site in _docs/
# make setup       only the environment, in .venv; a second call installs nothing
# make clean       remove the environment and caches; results stay
PYTHON ?= python3
BIN := .venv/bin

.PHONY: reproduce test docs setup clean

reproduce: setup
	$(BIN)/boig reproduce $(ARGS)

test: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/run.sh

docs: setup
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build -q -j auto nbs _docs
	@echo "Open _docs/index.html"

setup: .venv/.installed

.venv/.installed: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "boig needs Python 3.11 or newer as '$(PYTHON)'. Try: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "Could not make .venv; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv _docs jupyter_execute build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find boig nbs tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
