# make demo         train on the bundled digits, measure, draw the report
# make test         lint, types, import floors, tests
# make test-extras  other people's libraries, the report in a browser; two environments of their own
# make package      wheel and source distribution in dist/, checked, and the wheel in an empty environment
# make docs         the documentation site, in site/
# make audit        known vulnerabilities of every pinned package, where the databases can be reached
# make lock         the sums of all files of every pinned package, from the package index
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

# $(1): an environment, $(2): its constraints, $(3): given where torch is among them. Installed is what they list and nothing else, each file by its SHA-256 sum,
# and no package is built from its source, which would run code that no sum names.
PINNED = install --quiet --require-hashes --no-deps --only-binary :all: --requirement
define environment
	$(PYTHON) -m venv --clear $(1)
	@$(if $(3),$(1)/bin/pip $(PINNED) constraints-cpu.txt 2>/dev/null || true)
	$(1)/bin/pip $(PINNED) $(2)
	@! $(1)/bin/pip show torch 2>/dev/null | grep -q '^Requires:.*nvidia-' || $(1)/bin/pip $(PINNED) constraints-cuda.txt
endef
ourselves = $(1)/bin/pip install --quiet --no-deps --no-build-isolation --editable .

.PHONY: demo test lint test-extras package docs audit lock bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/marginflow demo --out runs/demo --force

# Files, not single tests, go to the two processes: expensive fixtures belong to a file. They go in
# their own order: xdist's puts files of few tests last, and those are among the longest.
test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff format --check src tests benchmarks examples docs-site tools
	$(BIN)/ruff check src tests benchmarks examples docs-site tools
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

# Tolerant of a machine without a network: it says what was not audited.
audit: $(PACKAGE)/.installed
	$(PACKAGE)/bin/python tools/audit.py

lock: $(PACKAGE)/.installed
	$(PACKAGE)/bin/python tools/lock.py

# One after another: they are timed.
bench: $(EXTRAS)/.installed
	@for script in $(sort $(wildcard benchmarks/[!_]*.py)); do \
	  echo "== $$script --short"; $(EXTRAS)/bin/python $$script --short || exit 1; echo; \
	done

$(VENV)/.installed: pyproject.toml constraints.txt constraints-cpu.txt constraints-cuda.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "marginflow needs Python 3.11 or newer; run make PYTHON=python3.11 …" >&2; exit 1; }
	$(call environment,$(VENV),constraints.txt,torch)
	$(call ourselves,$(VENV))
	$(BIN)/pip check
	touch $@

# pip check would complain: auto-LiRPA asks for torch below 1.13, torchattacks for a torchvision that it never imports.
$(EXTRAS)/.installed: pyproject.toml constraints-extras.txt constraints-cpu.txt constraints-cuda.txt
	$(call environment,$(EXTRAS),constraints-extras.txt,torch)
	$(call ourselves,$(EXTRAS))
	touch $@

# torchattacks pins a requests that mlflow refuses: the two cannot share an environment.
$(INTEGRATIONS)/.installed: pyproject.toml constraints.txt constraints-integrations.txt constraints-cpu.txt constraints-cuda.txt
	$(call environment,$(INTEGRATIONS),constraints-integrations.txt,torch)
	$(call ourselves,$(INTEGRATIONS))
	$(INTEGRATIONS)/bin/pip check
	touch $@

# Without torch: what is built is installed into an environment of its own by the tests.
$(PACKAGE)/.installed: constraints-package.txt
	$(call environment,$(PACKAGE),constraints-package.txt)
	$(PACKAGE)/bin/pip check
	touch $@

# The package itself is not installed: its docstrings are read from src/.
$(DOCS)/.installed: pyproject.toml constraints-docs.txt
	$(call environment,$(DOCS),constraints-docs.txt)
	$(DOCS)/bin/pip check
	touch $@

clean:
	rm -rf $(VENV) $(EXTRAS) $(INTEGRATIONS) $(PACKAGE) $(DOCS) dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache .artefacts
