# make pretrain   from nothing to a trained, evaluated, sampled model (about ten minutes on two cores)
# make test       the default test suite
# make test-all   all tests, the slow ones too: hours; SLURM's and compilers' where these are there
# make lint       ruff, pyright and the wording of docstrings
# make docs       docs/config.md and the tables of exit codes, from the code
#
# DATA, WORKDIR and CONFIG change what is trained: make pretrain DATA='books/**/*.txt' WORKDIR=runs/books

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= stdlib
CONFIG ?= configs/tiny.py
ARGS ?=
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: pretrain test test-all lint docs clean

$(VENV)/ok: pyproject.toml requirements.txt constraints.txt
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no ensurepip; on Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	@touch $@

$(VENV)/dev: $(VENV)/ok requirements-dev.txt requirements-data.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,data]' -c constraints.txt
	@touch $@

# As they are given, through the environment: a name may hold anything but what make expands first.
override DATA := $(value DATA)
override WORKDIR := $(value WORKDIR)
export DATA WORKDIR

pretrain: $(VENV)/ok
	@$(BIN)/python scripts/pretrain.py --data="$$DATA" --config=$(CONFIG) \
		$${WORKDIR:+--workdir="$$WORKDIR"} $(ARGS)

test: $(VENV)/dev
	$(PYTEST) $(ARGS)

test-all: $(VENV)/dev
	$(PYTEST) -m '' $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff format --check lm scripts configs tests
	$(BIN)/ruff check lm scripts configs tests
	$(BIN)/python scripts/project/lint_prose.py lm scripts configs tests
	$(BIN)/pyright

docs: $(VENV)/ok
	$(BIN)/python scripts/project/config_page.py
	$(BIN)/python scripts/launch/exit_codes.py

clean:
	rm -rf $(VENV) data runs
