# One virtual environment, one test command. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow reproduce reproduce-all benchmarks lint types clean

demo: .venv/ready
	$(BIN)/halfulp demo

# Workers of one thread each: threads that wait for a core would spin. Three, for tests wait too.
# Hundreds of processes import the package: compiled once, whatever the environment says.
test: .venv/ready
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# The claims that need no more than half an hour of two cores.
reproduce: .venv/ready
	$(BIN)/python -m reproduce stochastic_rounding bit_reduction roundoff roundoff_models

# Every claim: about two hours, by the minutes in reproduce/RESULTS.md and its training runs.
reproduce-all: .venv/ready
	$(BIN)/python -m reproduce
	$(BIN)/python -m pytest -n 2 -m slow tests/check

benchmarks: .venv/ready
	$(BIN)/python -m benchmarks

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv build dist *.egg-info

# An older pip resolves for minutes.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "halfulp needs Python 3.11 or newer: make PYTHON=python3.11 …"'
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	$(INSTALL) -e '.[data,track,dev]'
	touch $@
