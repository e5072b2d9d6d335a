# Every target sets up what it needs, from nothing: a virtual environment in $(VENV) with the pinned versions of
# constraints.txt. The second time that costs nothing. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
# Tests run in this many processes, of one thread and about 3 GiB each.
JOBS ?= 2
# How many graphs `make fuzz` rewrites, 500 a line of its output.
GRAPHS ?= 20000
# How many damaged checkpoints `make fuzz-load` loads, 50 a line of its output.
CASES ?= 5000
# How many saves `make storm` kills, and how many it races.
STORMS ?= 200
# What `make bench-cpu` measures: models with their number of layers; dit:28 is a whole DiT-XL/2.
MODELS ?= dit:4,dit-1024:2,pixart-sigma:2,sd3-medium:2
# What `make bench-gpu` measures, such as --model dit,flux@1 --batch 2,16 --budget 500.
GPU_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# passes/ and backends/ linked to where they are installed, for mypy.
LINKS := build/links

# Threads that wait for each other by spinning take many times as long on cores that something else uses too.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help setup demo compare test fuzz fuzz-load storm zoo-calls check format coverage bench bench-cpu bench-gpu clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make the virtual environment

demo: $(STAMP) ## quantize a small diffusion transformer, pictures and report into out/
	$(PY) -m examples.digits.demo --out $(OUT)

compare: $(STAMP) ## the same by every method there is, in twice the time
	$(PY) -m examples.digits.demo --all --out $(OUT)

test: check ## the checks, then the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS)

fuzz: $(STAMP) ## rewrite $(GRAPHS) random graphs, others each time, and compare
	FXQUANT_FUZZ=$(GRAPHS) OMP_NUM_THREADS=1 $(PY) -m pytest tests/fuzz -v -n $(JOBS) -rA

fuzz-load: $(STAMP) ## load $(CASES) checkpoints that were damaged, others each time
	FXQUANT_FUZZ_LOAD=$(CASES) OMP_NUM_THREADS=1 $(PY) -m pytest tests/mutations -v -n $(JOBS) -rA

storm: $(STAMP) ## kill and race saves at random instants: $(STORMS) of each
	OMP_NUM_THREADS=1 $(PY) -m tests.storms --kills $(STORMS) --races $(STORMS)

zoo-calls: $(STAMP) ## each optional input of each model of the zoo on and off, in every order, in float64
	OMP_NUM_THREADS=1 $(PY) -m tests.zoo.calls

check: $(STAMP) ## lint, format, types and import directions
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@# mypy follows neither package-dir nor the import hook of an editable install, so it gets the installed layout as links.
	@rm -rf $(LINKS)/fxquant && mkdir -p $(LINKS)/fxquant
	@ln -s "$(CURDIR)"/fxquant/* "$(CURDIR)/passes" "$(CURDIR)/backends" $(LINKS)/fxquant
	cd $(LINKS) && "$(abspath $(PY))" -m mypy --config-file "$(CURDIR)/pyproject.toml"
	cd $(LINKS) && "$(abspath $(VENV))/bin/lint-imports" "$(CURDIR)/pyproject.toml" --no-cache

format: $(STAMP) ## mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

coverage: $(STAMP) ## write docs/coverage.md anew: which linears of which models are balanced
	OMP_NUM_THREADS=1 $(PY) -m tests.zoo

bench: $(STAMP) ## time the conversion of models
	$(PY) benchmarks/convert.py

bench-cpu: $(STAMP) ## time quantized models on the processor, beside other quantizers
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[bench,demo]'
	@# Threads that sleep between products take about 5 % longer; nothing else should run beside this anyway.
	env -u OMP_WAIT_POLICY $(PY) -m benchmarks.cpu --model $(MODELS) --json $(OUT)/cpu.json --markdown $(OUT)/cpu.md

bench-gpu: $(STAMP) ## check products and models on a GPU or in Triton's interpreter, and time them on a GPU
	$(PY) -m benchmarks.gpu $(GPU_ARGS) --json $(OUT)/gpu.json --markdown $(OUT)/gpu.md

clean: ## remove what was built, but not the virtual environment
	rm -rf build dist $(OUT) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	rm -rf $(VENV)

# torch goes in first and by itself, so that pip takes exactly that build and nothing after it brings in another.
#
# The editable install is the default one, an import hook, and not editable_mode=strict: strict makes a tree of links to
# the files that there are now, so that a new file cannot be imported until the next install. The hook maps the three
# folders, and what is added under them is there at once.
$(STAMP): pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "The pinned versions in constraints.txt need Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1)."; \
	  echo "Name a newer one: make PYTHON=python3.11"; exit 1; }
	@echo 'Setting up $(VENV), once: this takes a minute or more.'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt $(TORCH)
	$(PIP) install --quiet --constraint constraints.txt setuptools
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo,dev]'
	@touch $@
