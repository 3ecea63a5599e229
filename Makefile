# make demo         train on the bundled digits, measure, draw the report
# make test         lint, types, import floors, tests
# make test-extras  other people's libraries, the report in a browser; two environments of their own
# make package      wheel and source distribution in dist/, checked, and the wheel in an empty environment
# make docs         the documentation site, in site/
# make bench        short runs of all benchmarks, beside those libraries, in the same environment

PYTHON ?= python3
VENV := .venv
EXTRAS := .venv-extras
INTEGRATIONS := .venv-integrations
PACKAGE := .venv-package
DOCS := .venv-docs
BIN := $(VENV)/bin
# The real MNIST files; tests need them, and `mf.load("mnist")` fetches them if this is empty.
export MARGINFLOW_DATA ?= $(abspath $(wildcard ../shared/data))

.PHONY: demo test lint test-extras package docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/marginflow demo --out runs/demo --force

# Files, not single tests, go to the two processes: expensive fixtures belong to a file. They go in
# their own order: xdist's puts files of few tests last, and those are among the longest.
test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff format --check src tests benchmarks examples docs-site
	$(BIN)/ruff check src tests benchmarks examples docs-site
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test-extras: $(EXTRAS)/.installed $(INTEGRATIONS)/.installed docs
	$(EXTRAS)/bin/python -m pytest tests/extras -m extras
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations -m integrations

package: $(PACKAGE)/.installed
	$(PACKAGE)/bin/python -m pytest tests/package -m package

docs: site/index.html

# Whatever a page may show. The variable keeps Material from advertising its successor on every build.
site/index.html: $(DOCS)/.installed mkdocs.yml $(shell find docs docs-site examples src -type f ! -name '*.pyc') \
    CONTRIBUTING.md CHANGELOG.md
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# One after another: they are timed.
bench: $(EXTRAS)/.installed
	@for script in $(sort $(wildcard benchmarks/[!_]*.py)); do \
	  echo "== $$script --short"; $(EXTRAS)/bin/python $$script --short || exit 1; echo; \
	done

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "marginflow needs Python 3.11 or newer; run make PYTHON=python3.11 …" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch --editable '.[dev]'
	touch $@

$(EXTRAS)/.installed: pyproject.toml constraints.txt constraints-extras.txt
	$(PYTHON) -m venv --clear $(EXTRAS)
	$(EXTRAS)/bin/pip install --quiet --constraint constraints-extras.txt torch --editable '.[dev,attack-libraries,browser]'
	$(EXTRAS)/bin/pip install --quiet --constraint constraints-extras.txt --no-deps auto-LiRPA appdirs pyyaml ninja tqdm
	touch $@

# torchattacks pins a requests that mlflow refuses: the two cannot share an environment.
$(INTEGRATIONS)/.installed: pyproject.toml constraints.txt constraints-integrations.txt
	$(PYTHON) -m venv --clear $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/pip install --quiet --constraint constraints-integrations.txt torch --editable '.[dev,integrations]'
	touch $@

# Without torch: what is built is installed into an environment of its own by the tests.
$(PACKAGE)/.installed: constraints-package.txt
	$(PYTHON) -m venv --clear $(PACKAGE)
	$(PACKAGE)/bin/pip install --quiet --constraint constraints-package.txt \
	  build check-wheel-contents hatchling mypy pytest twine
	touch $@

# The package itself is not installed: its docstrings are read from src/.
$(DOCS)/.installed: pyproject.toml constraints-docs.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/pip install --quiet --constraint constraints-docs.txt \
	  $$($(DOCS)/bin/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

clean:
	rm -rf $(VENV) $(EXTRAS) $(INTEGRATIONS) $(PACKAGE) $(DOCS) dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache .artefacts
