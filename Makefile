# make demo    real text from real weights, on a fresh machine
# make test    the same set-up, then every check
# Both are quick the second time: the set-up is done again only when requirements.txt changes.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test notebooks weights clean

demo: $(READY)
	$(BIN)/python -m minillm generate --chat --temperature 0 --max-tokens 96 --stats \
		"Explain in two sentences why the sky is blue."

test: weights
	$(BIN)/ruff check minillm tests
	$(BIN)/python -m pytest --quiet

notebooks: weights    # execute notebooks/*.py into the .ipynb beside them
	cd notebooks && ../$(BIN)/jupytext --quiet --to ipynb --execute *.py

weights: $(READY)
	@$(BIN)/python -m minillm fetch

$(READY): requirements.txt
	$(PYTHON) -c "import sys; v = sys.version_info; \
		sys.exit(v < (3, 11) and f'minillm needs Python 3.11 or newer, this is {v.major}.{v.minor}: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $(READY)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
