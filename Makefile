# make demo: the main job on the embedded data.  make test: everything CI checks.  make docs: the site, in _docs/.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test docs docs-test test-oldest dist dist-test nbs run-nbs clean

demo: $(READY)
	$(BIN)/bnfold reproduce --data digits --out out/digits

test: $(READY)
	$(BIN)/python -m pytest tests

# the documentation, built from what is committed: open _docs/index.html
docs: $(VENV)/.docs
	$(BIN)/python docs/build.py

# … and looked at in a browser, where one is installed (`apt-get install chromium`, or `playwright install chromium`)
docs-test: $(VENV)/.docs
	$(BIN)/python -m pytest -n 0 tests/test_site.py

# the fold, the Learner and exported graphs with the lower bounds of settings.ini, in an environment of its own
OLDEST := $(VENV)-oldest
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q $$(sed -n 's/^requirements = //p' settings.ini | tr ' ' '\n' | grep '>=' | sed 's/>=/==/')
	$(OLDEST)/bin/python -m pip install -q -e . pytest pytest-xdist hypothesis timm
	$(OLDEST)/bin/python -m pytest tests/test_algebra.py tests/test_rules.py tests/test_cases.py tests/test_graph.py tests/test_report.py tests/test_learner.py

# wheel and sdist, in dist/
dist: $(READY)
	$(BIN)/python -m pip install -q build
	rm -rf dist && $(BIN)/python -m build

# … each installed into an empty environment, and tried there
dist-test: dist
	set -e; for file in dist/*; do \
	  rm -rf $(VENV)-empty && $(PYTHON) -m venv $(VENV)-empty; \
	  $(VENV)-empty/bin/python -m pip install -q $$file; \
	  cd /tmp && $(CURDIR)/$(VENV)-empty/bin/python -W ignore $(CURDIR)/.github/smoke.py && cd $(CURDIR); \
	done

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

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-empty build dist *.egg-info out _docs _proc
