# Every target first creates what it needs: a virtual environment in $(VENV) with the versions pinned in
# constraints.txt. If it exists already, this takes no time. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
# Number of test processes. Each uses one thread and about 3 GiB.
JOBS ?= 2
# Number of graphs that `make fuzz` rewrites, 500 per line of its output.
GRAPHS ?= 20000
# Number of damaged files of all kinds that `make fuzz-load` reads, 200 per line of its output; over half are checkpoints.
CASES ?= 50000
# Options of `make fuzz-load`, such as --kinds plan statistics, --seed 3, --minutes 60 or --report counts.json.
FUZZ_ARGS ?=
# Number of saves that `make storm` kills, and number of races between saves.
STORMS ?= 200
# Number of commands, and of evaluations, that `make chaos` kills.
KILLS ?= 50
# Number of calls that `make soak` makes.
CALLS ?= 2000
# Models that `make bench-cpu` measures, with their number of layers; dit:28 is a complete DiT-XL/2.
MODELS ?= dit:4,dit-1024:2,pixart-sigma:2,sd3-medium:2
# Minutes after which `make bench-cpu` starts no further system, for these models and for whole images.
MINUTES ?= 18
IMAGE_MINUTES ?= 8
# Options of `make bench-gpu`, such as --model dit,flux@1 --batch 2,16 --budget 500.
GPU_ARGS ?=
# Options of `make gpu-wheels`, such as --python 3.11 or --without numpy,scipy.
WHEEL_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# For mypy, import-linter and the API reference: links that give passes/ and backends/ their installed locations.
LINKS := build/links
# Made when the packages of `make docs` are installed.
DOCS_STAMP := $(VENV)/.installed-docs

# Threads that spin while they wait for each other run many times slower on cores that other processes also use.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help setup demo compare test test-slow test-all sample every lint types fuzz fuzz-load storm chaos soak zoo-calls check links docs format coverage bench bench-cpu bench-gpu measure-gpu gpu-wheels low-bit clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make the virtual environment

demo: $(STAMP) ## quantize a small diffusion transformer; write pictures and figures into $(OUT)/
	$(PY) -m examples.digits.demo --out $(OUT)

compare: $(STAMP) ## the demo with every available method and more images, in five times the time
	$(PY) -m examples.digits.demo --all --images 100 --out $(OUT)

# Types take half a minute on one core, so they are checked beside the tests.
test: lint ## run the checks and the tests, but for the slow ones
	@$(MAKE) --no-print-directory --jobs 2 types sample

test-slow: $(STAMP) ## run the tests that take seconds each, which `make test` leaves out
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile -m "slow and not exhaustive"

test-all: lint ## run the checks, all tests and every combination that `make test` samples
	@$(MAKE) --no-print-directory --jobs 2 types every

sample: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile -m "not slow and not exhaustive"

every: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile

fuzz: $(STAMP) ## rewrite $(GRAPHS) random graphs, different ones each time, and compare
	FXQUANT_FUZZ=$(GRAPHS) OMP_NUM_THREADS=1 $(PY) -m pytest tests/fuzz -v -n $(JOBS) -rA

fuzz-load: $(STAMP) ## read $(CASES) damaged checkpoints, plans, statistics and other files, different ones each time
	OMP_NUM_THREADS=1 TORCH_FAKE_TENSOR_DISPATCH_CACHE=0 $(PY) -m tests.mutations --cases $(CASES) $(FUZZ_ARGS)

storm: $(STAMP) ## kill and race saves at random times, $(STORMS) of each
	OMP_NUM_THREADS=1 $(PY) -m tests.storms --kills $(STORMS) --races $(STORMS)

chaos: $(STAMP) ## kill $(KILLS) conversions and evaluations at random times, repeat them, and compare the results byte for byte
	OMP_NUM_THREADS=1 $(PY) -m tests.storms.chaos --kills $(KILLS)
	OMP_NUM_THREADS=1 $(PY) -m tests.storms.evaluations --kills $(KILLS)

soak: $(STAMP) ## make $(CALLS) calls of quantized models in every way, and compare results and memory
	OMP_NUM_THREADS=1 $(PY) -m tests.storms.soak --calls $(CALLS)

zoo-calls: $(STAMP) ## test every zoo model with each optional input on and off, in every order, in float64
	OMP_NUM_THREADS=1 $(PY) -m tests.zoo.calls

# mypy and griffe support neither package-dir nor the import hook of an editable install.
links:
	@rm -rf $(LINKS)/fxquant && mkdir -p $(LINKS)/fxquant
	@ln -s "$(CURDIR)"/fxquant/* "$(CURDIR)/passes" "$(CURDIR)/backends" $(LINKS)/fxquant

check: lint types ## check lint, format, types and import directions

lint: $(STAMP) links
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	cd $(LINKS) && "$(abspath $(VENV))/bin/lint-imports" "$(CURDIR)/pyproject.toml" --no-cache

types: $(STAMP) links
	cd $(LINKS) && "$(abspath $(PY))" -m mypy --config-file "$(CURDIR)/pyproject.toml"

docs: $(DOCS_STAMP) links ## build the documentation site into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo 'Open build/site/index.html. The search needs a server: $(PY) -m http.server --directory build/site'

format: $(STAMP) ## fix what ruff can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

coverage: $(STAMP) ## rewrite docs/coverage.md: which linears of which models are balanced
	OMP_NUM_THREADS=1 $(PY) -m tests.zoo

bench: $(STAMP) ## time the conversion of models
	$(PY) benchmarks/convert.py

bench-cpu: $(STAMP) ## time quantized models on the CPU, compared with other quantizers
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[bench,demo]'
	-$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[bench-more]'
	@# Threads that sleep between products take about 5 % longer. Nothing else should run at the same time anyway.
	env -u OMP_WAIT_POLICY $(PY) -m benchmarks.cpu --model $(MODELS) --minutes $(MINUTES) \
		--json $(OUT)/cpu.json --markdown $(OUT)/cpu.md
	env -u OMP_WAIT_POLICY $(PY) -m benchmarks.cpu.images --minutes $(IMAGE_MINUTES) \
		--json $(OUT)/images.json --markdown $(OUT)/images.md

bench-gpu: $(STAMP) ## check products and models on a GPU or in Triton's interpreter, and time them on a GPU
	$(PY) -m benchmarks.gpu $(GPU_ARGS) --json $(OUT)/gpu.json --markdown $(OUT)/gpu.md

measure-gpu: $(STAMP) ## device tests, tuning, models and targets on a GPU, in steps; into $(OUT)/measure-gpu
	PYTHON="$(abspath $(PY))" benchmarks/gpu/measure.sh $(OUT)/measure-gpu

gpu-wheels: $(STAMP) ## collect the wheels that a machine without access to packages needs for it, into $(OUT)/wheels
	$(PY) -m benchmarks.gpu.wheels $(OUT)/wheels $(WHEEL_ARGS)

low-bit: $(STAMP) ## measure recipes in every number format and each part of auto-*, into docs/results.md; an hour or two
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.low_bit --json $(OUT)/low_bit.json --into docs/results.md --picture docs/pictures/parts.svg

clean: ## remove built files, but not the virtual environment
	rm -rf build dist $(OUT) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	rm -rf $(VENV)

# torch is installed first and alone, so that pip takes exactly this build and no later package replaces it.
#
# The editable install is the default one, an import hook, and not editable_mode=strict: strict makes a tree of links to
# the present files, so a new file could not be imported until the next install. The hook maps the three folders, so new
# files in them can be imported at once.
$(STAMP): pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "The pinned versions in constraints.txt need Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1)."; \
	  echo "Name a newer one: make PYTHON=python3.11"; exit 1; }
	@echo 'Setting up $(VENV), once: this takes a minute or more.'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt $(TORCH)
	$(PIP) install --quiet --constraint constraints.txt setuptools
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo,dev,export]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	@touch $@
