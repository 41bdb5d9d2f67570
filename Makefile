# `make run` and `make test` are all a newcomer needs; everything lands in .venv.
PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= What is 17 + 25?
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install dev peers run test test-slow check format clean

install: .venv/installed
dev: .venv/installed-dev

# torch goes first and alone: any package that needs it would otherwise pull the newest CUDA build, several GB.
.venv/installed: requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	@touch $@

# Other rewriting systems that benchmarks/rewriting.py measures; beside the environment, not in it.
peers: dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .peers -r benchmarks/requirements.txt

run: install
	$(BIN)/enginery run "$(PROMPT)"

test: dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: dev
	$(BIN)/python -m pytest -m slow

check: dev
	$(BIN)/ruff format --check src tests benchmarks training
	$(BIN)/ruff check src tests benchmarks training
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: dev
	$(BIN)/ruff format src tests benchmarks training
	$(BIN)/ruff check --fix src tests benchmarks training

clean:
	rm -rf .venv .peers build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
