# make demo: the main job on the embedded data.  make test: everything CI checks.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test nbs run-nbs clean

demo: $(READY)
	$(BIN)/bnfold reproduce --data digits --out out/digits

test: $(READY)
	$(BIN)/python -m pytest tests

# notebooks → package, and their metadata cleaned
nbs: $(READY)
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean

# execute the fast notebooks in place, and make README.md from the index
run-nbs: $(READY)
	$(BIN)/python nbs/run.py $$(find nbs -name '*.ipynb' -not -path '*tutorials*' | sort) && $(BIN)/nbdev-clean && $(BIN)/python nbs/readme.py

$(READY): settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info out
