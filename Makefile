# Two commands do everything: `make demo` and `make test`. Both install what is missing into .venv first.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

CSRC := $(shell find csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
BUILD_SCRIPTS := $(wildcard setup.py csrc/*.py)
BUILT := convmask/ops/_C.*

# Stamps: what they stand for is up to date while nothing that it was made from is younger.
ENVIRONMENT := $(VENV)/.environment-is-complete
EXTENSION := $(VENV)/.convmask-is-installed

# The pair requirements/torch-$(TORCH).txt is installed; whichever it was stays until another is asked for.
TORCH ?= $(or $(shell cat $(ENVIRONMENT) 2>/dev/null),2.14)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install build demo viewer compare test test-all lint format check-detectron2 wheel clean distclean FORCE

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Variables: PYTHON=python3.12 (to create .venv with), TORCH=2.9 (a pair of requirements/torch-*.txt),"
	@echo "ARGS='-k panoptic' (for pytest; options for viewer), IMAGE=photo.jpg WEIGHTS=model.pth CONFIG=config.yaml (for demo)."

install: $(EXTENSION) ## create .venv, or complete it, with everything that the other targets need

demo: $(EXTENSION) ## train, evaluate and draw a small model; with IMAGE=photo.jpg: predict on it (WEIGHTS=, CONFIG=)
	@$(PY) -W ignore demo/quick_demo.py $(if $(IMAGE),--image "$(IMAGE)") $(if $(WEIGHTS),--weights "$(WEIGHTS)") \
	  $(if $(CONFIG),--config "$(CONFIG)")

viewer: $(EXTENSION) ## look at images with the models in output/ (or ARGS='--model FOLDER') in a browser
	@$(PY) -W ignore demo/app.py $(ARGS)

compare: $(EXTENSION) ## train every method for BUDGET=3m on DATA=synthetic (or nuclei), and write docs/comparison.{md,html}
	$(PY) -W ignore tools/compare.py --budget $(or $(BUDGET),3m) --data $(or $(DATA),synthetic) \
	  --clock $(or $(CLOCK),wall) --page $(or $(PAGE),docs) $(ARGS)

test: $(EXTENSION) ## run the tests that take seconds
	$(PY) -m pytest -m "not slow" $(ARGS)

test-all: $(EXTENSION) ## run every test
	$(PY) -m pytest $(ARGS)

check-detectron2: $(EXTENSION) ## run `test` with SRC=<a checkout of Detectron2> in place of the installed one
	@$(PY) packaging/check_checkout.py "$(SRC)"
	PYTHONPATH="$$(cd "$(SRC)" && pwd)$${PYTHONPATH:+:$$PYTHONPATH}" $(PY) -m pytest -m "not slow" $(ARGS)

.PHONY: docs
docs: $(EXTENSION) ## build the pages into build/docs, and fail at a warning
	$(PY) docs/tables.py --check
	$(PY) -W ignore -m sphinx -W --keep-going -n -q -c docs -b html . build/docs
	@echo build/docs/index.html

lint: $(EXTENSION) ## check style and types, change nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(if $(CSRC),$(VENV)/bin/clang-format --dry-run -Werror $(CSRC))
	$(PY) -m mypy convmask projects

format: $(EXTENSION) ## bring the sources into the style that `lint` asks for
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(CSRC),$(VENV)/bin/clang-format -i $(CSRC))

build: $(ENVIRONMENT) ## rebuild the compiled operators from scratch, and say why where that fails
	rm -rf build $(BUILT) $(EXTENSION)
	CONVMASK_BUILD_EXT=1 $(MAKE) $(EXTENSION)

wheel: $(EXTENSION) ## build a wheel into dist/
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

clean: ## delete what was built, keep .venv and output/
	rm -rf build dist *.egg-info $(BUILT) $(EXTENSION) .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## delete .venv too
	rm -rf $(VENV)

# Another pair than the installed one was asked for.
ifneq ($(TORCH),$(shell cat $(ENVIRONMENT) 2>/dev/null))
$(ENVIRONMENT): FORCE
endif

# Every step leaves alone what is there already, so an interrupted run goes on where it stopped.
$(ENVIRONMENT): $(wildcard requirements/*.txt packaging/*.py) pyproject.toml
	@rm -f $@
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) is not there: name a Python with make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "ConvMask needs Python 3.10 or later," \
	  "$(PYTHON) is $$("$(PYTHON)" --version 2>&1): name another with make PYTHON=python3.12" >&2; exit 1; }
	@test -f requirements/torch-$(TORCH).txt || { echo "TORCH=$(TORCH): there is no such pair, there are" \
	  $(sort $(patsubst requirements/torch-%.txt,%,$(wildcard requirements/torch-*.txt))) >&2; exit 1; }
	@"$(PYTHON)" packaging/create_environment.py $(VENV) $(if $(filter file,$(origin PYTHON)),,--exactly)
	$(PIP) install $(foreach name,torch-$(TORCH) build runtime dev tools,-r requirements/$(name).txt)
	$(PY) packaging/provide.py
	@echo $(TORCH) > $@

$(EXTENSION): $(ENVIRONMENT) $(BUILD_SCRIPTS) $(CSRC)
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@
