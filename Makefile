# make demo    from nothing to heat maps: environment, data, scoring, demo/figure.png
# make test    from nothing to a tested tree: environment, lint, test suite; make test-slow: the tests that take minutes,
#              make test-random: a longer search by random examples, another one at each call
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 2 --dist worksteal --durations 10
SCORED := --obj ring --shot 2 --inferences 2 --data_type folder --data_path $(DEMO)/data \
	--backbone efficientnet_lite2 --scorer combined

.PHONY: demo test test-slow test-random lint clean

demo: .venv/runtime
	$(BIN)/python -m examples.demo_data --output $(DEMO)/data
	$(BIN)/python test.py $(SCORED) --untrained --output $(DEMO)/results --save_images -1
	@$(BIN)/python -m examples.demo_figure $(SCORED) --output $(DEMO)/figure.png

test: .venv/development lint
	$(PYTEST)

test-slow: .venv/development
	$(PYTEST) --runslow -m slow

test-random: .venv/development
	$(PYTEST) -m hypothesis --hypothesis-profile random

lint: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is %d.%d; name another with make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

.venv/runtime: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/development: requirements-dev.txt .venv/runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv $(DEMO)
