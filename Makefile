# The commands of this project; `make` alone lists them. They need Python 3.11 to 3.13 with pip, and nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The full path of the first Python that has a supported version and a pip that can install into another environment
# (22.3). Our own environment has no pip, so it is skipped. PYTHON=… chooses another.
FITS := import pip, sys; \
	sys.exit(not ((3, 11) <= sys.version_info < (3, 14) and [int(n) for n in pip.__version__.split(".")[:2]] >= [22, 3]))
FOUND := $(shell PATH="$${PATH//$(CURDIR)\/.venv\/bin:/}"; \
	for p in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	command -v $$p >/dev/null && $$p -c '$(FITS)' 2>/dev/null && { command -v $$p; break; }; done)
NO_PYTHON := Espalier needs Python 3.11, 3.12 or 3.13 (TensorFlow has builds for these) with pip 22.3 or later, and \
	found none. On Debian: apt install python3 python3-pip. Or name one: make PYTHON=/path/to/python3.12

# Tests run in parallel. Neighbouring tests stay together, so that they set up once what they share. Each process takes some
# gigabytes.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/embedded ## start the service, train on real images and predict (DATA= BACKBONE= WEIGHTS= FEATURES_FROM= IMAGE_SIZE=; CI=1 stops it afterwards)
	@python -m ops.demo --data="$(DATA)" --backbone="$(BACKBONE)" --weights="$(WEIGHTS)" \
		--features-from="$(FEATURES_FROM)" --image-size="$(IMAGE_SIZE)"

up: $(VENV)/embedded ## start the service alone: API, workers, broker and MLflow, until Ctrl-C
	@python -m ops.up

weights: $(VENV)/embedded ## import pretrained weights (BACKBONE= NAME= FILE=)
	@python -m ops.weights "$(BACKBONE)" "$(NAME)" "$(FILE)"

collect: $(VENV)/embedded ## remove stored files that no row names, as workers do every hour (DRY_RUN=1 only lists them)
	@python -m ops.collect $(if $(DRY_RUN),--dry-run)

test: $(VENV)/dev ## run all tests except the slow ones
	python -m pytest $(PARALLEL) -m "not slow"

test-all: $(VENV)/dev ## run all tests
	python -m pytest $(PARALLEL)

check: $(VENV)/dev ## check format, types, imports between rooms, Compose files and Dockerfiles
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-logo --cache-dir .cache/import-linter
	check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml docker-compose.gpu.yml
	hadolint deploy/images/*.Dockerfile

bench: $(VENV)/dev ## measure extraction, training and fine-tuning beside their baselines
	python -m benchmarks.extraction
	python -m benchmarks.folds
	python -m benchmarks.heads
	python -m benchmarks.tuning
	python -m benchmarks.freed_memory
	python -m benchmarks.ingest

# LitServe and BentoML run in an environment of their own, with their own requirements.
PEERS := .cache/peers
bench-serving: $(VENV)/dev $(PEERS)/installed ## measure serving beside LitServe and BentoML (BACKBONE= SIZE=)
	python -m benchmarks.serving --peers $(PEERS)/bin/python $(if $(BACKBONE),--backbone $(BACKBONE)) $(if $(SIZE),--size $(SIZE))

$(PEERS)/installed: benchmarks/peers/requirements.txt
	$(FOUND) -m venv --without-pip $(PEERS)
	$(FOUND) -m pip --python $(PEERS)/bin/python install --disable-pip-version-check --requirement $<
	@touch $@

MINUTES ?= 10
soak: $(VENV)/dev ## kill processes at random during trainings and account for every run (MINUTES=10)
	@PYTHONPATH=tests python -m soak.run --minutes "$(MINUTES)"

lock: $(VENV)/dev ## compile requirements/*.txt again from pyproject.toml, for all platforms, with hashes
	@mkdir -p requirements
	@for group in dev embedded worker worker-gpu api api-gpu; do \
		echo "requirements/$$group.txt"; \
		uv pip compile --quiet --universal --generate-hashes --no-annotate --python-version 3.11 \
			--custom-compile-command "make lock" $$(test $$group = dev || echo --constraint requirements/dev.txt) \
			--group pyproject.toml:$$group --output-file requirements/$$group.txt || exit 1; \
	done

clean: ## remove the environment and caches, but not the data
	rm -rf $(VENV) .cache

# A virtual environment without pip: Debian's Python can make one without root, but not one with pip.
$(VENV)/bin/python:
	@test -n "$(FOUND)" || { echo "$(NO_PYTHON)"; exit 1; }
	$(FOUND) -m venv --without-pip $(VENV)

$(VENV)/embedded $(VENV)/dev: $(VENV)/%: requirements/%.txt | $(VENV)/bin/python
	@test -n "$(FOUND)" || { echo "$(NO_PYTHON)"; exit 1; }
	$(FOUND) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check --require-hashes --requirement $<
	@touch $@

.PHONY: help demo up weights collect test test-all check bench bench-serving soak lock clean
