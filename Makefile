# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml changes.
# The demo installs less than the tests do; both use the same .venv, in either order.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# more for pytest: make test ARGS='-k embedded'
ARGS ?=
# of make test-pooler: what every way in to a tenant's database relies on
POOLED := $(addprefix tests/, security/test_cross_tenant_requests.py security/test_concurrency_contexts.py \
	security/test_guard.py security/test_wsgi_requests.py security/test_revocation_of_open.py \
	security/test_wrapped_functions.py integration/asgi/test_starlette.py integration/integrations/test_fastapi.py \
	integration/sync/test_sync_sessions.py integration/tenants/test_lifecycle.py integration/tenants/test_tenants.py \
	integration/test_queries.py integration/seeds/test_creation.py integration/metering/test_metrics.py)
# of make test-matrix: some of its combinations, and interpreters that are not on PATH
ONLY ?=
PYTHONS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# What `make check` runs, the quickest first. Whatever else names a check (.pre-commit-config.yaml, tests) runs these targets.
CHECKS := formatting lint types docs

.PHONY: help demo test test-pooler test-matrix check $(CHECKS) format bench clean

help:
	@echo "make demo    three tenants, an application over HTTP, a fleet migration; leaves nothing behind"
	@echo "make test    the whole suite on an embedded PostgreSQL, or on TENANCY_TEST_DSN"
	@echo "make test-pooler    a part of the suite, with tenants' sessions through PgBouncer in transaction mode"
	@echo "make test-matrix    the suite on each supported Python, SQLAlchemy and PostgreSQL that is here; ONLY='3.12-*'"
	@echo "make check   formatting, lint, types, documentation; each is a target too: make $(CHECKS)"
	@echo "make format  apply formatting and safe fixes"
	@echo "make bench   the benchmarks, one at a time"
	@echo "make docs    build the documentation into site/, without a warning"
	@echo "make clean   remove .venv, those of the matrix, caches and what was built"

demo: $(VENV)/.demo
	$(BIN)/python -m examples.agent_platform.demo

# Where bytecode is not kept, each of the hundreds of programs that tests start would compile the package again.
# Three workers keep two cores busy: a third of what tests do is waiting, for locks and deadlines above all.
test: $(VENV)/.dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal --durations=10 tests \
		--ignore=tests/benchmarks $(ARGS)

test-pooler: $(VENV)/.dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal --pooler $(POOLED) $(ARGS)

# Its virtual environments are its own: .venv-3.12-sa2.1 and others.
test-matrix:
	$(PYTHON) tests/matrix.py --only "$(ONLY)" --pythons "$(PYTHONS)" -- $(ARGS)

check: $(CHECKS)

formatting: $(VENV)/.dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy --strict tenancy_orm tests

# never --quiet: it drops the warnings that --strict counts
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python -m pytest tests/benchmarks -s -p no:xdist $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-3.* build dist site .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 lacks ensurepip, without which `python3 -m venv` fails half-way and leaves a broken .venv.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python cannot make virtual environments; run: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[demo]'
	@touch $@

# dev includes demo, so the demo need not install again
$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo
