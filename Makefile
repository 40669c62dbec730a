# make demo   the whole pipeline, on text that every installation has
# make test   the tests
# make lint   ruff, mypy and the layers of the package
# make bench  the cost of each part, its lower bound and its peers (docs/performance.md)
# make docs   the site, in site/
# make lock   the pins in requirements/, within the ranges of pyproject.toml

PYTHON ?= python3.11
BIN := .venv/bin
DEMO := runs/demo
BENCH := runs/bench

.PHONY: demo test lint bench docs format lock clean

# Huge pages for the heap: CPU training is 1.2 times as fast (docs/performance.md). glibc reads this when a process starts.
demo bench: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

demo: .venv/core
	$(BIN)/resmem run --gin_file=configs/demo.gin --workdir=$(DEMO)

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/resmem run --gin_file=configs/bench_t5_small.gin --workdir=$(BENCH)
	$(BIN)/python -m benchmarks --workdir=$(BENCH)

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp is newer than the files that it was installed from.
.venv/core: requirements/core.txt pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/core.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv/test: .venv/core requirements/test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/test.txt
	touch $@

.venv/docs: .venv/core requirements/test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/test.txt --editable '.[docs]'
	touch $@

lock:
	uv pip compile pyproject.toml --universal --no-annotate --no-header --no-emit-index-url -o requirements/core.txt
	uv pip compile pyproject.toml --extra test --universal --no-annotate --no-header --no-emit-index-url -o requirements/test.txt

clean:
	rm -rf .venv build dist site *.egg-info
