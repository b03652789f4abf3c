# The commands to know. `make demo` needs Python 3.11+ and nothing else; `make test` builds what it needs.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
include engines.mk

.PHONY: help demo up cache documents test test-engine chaos upgrade fuzz check audit format env-example dashboard compose-dry compose-env \
	bench bench-submit bench-gateway bench-tables bench-pipeline bench-growth bench-size bench-dispatch bench-order bench-break-even bench-endpoints bench-express bench-refill bench-knee bench-observability bench-takeover bench-end-to-end bench-front-end bench-cache nginx rabbitmq chromium prometheus

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

demo: .venv/.demo checkpoint-gguf ## 64 prompts from file to results, with no server, GPU or account
	@STOKER_ENGINE__KIND=llamacpp stoker run examples/prompts.jsonl -o out.jsonl

up: .venv/.demo checkpoint-gguf ## everything on this machine until Ctrl-C
	@stoker up

test: check checkpoint-gguf embedder ## all tests: real services, real kills, real vLLM, a real browser (builds what it needs)
	@$(MAKE) --no-print-directory -j3 engine-vllm checkpoint chromium
	@python -m tests.support.services sh -c 'pytest -n 4 --dist worksteal -m "not engine and not alone" && pytest -n 2 --dist loadfile -m "(engine or alone) and not long"'

test-engine: .venv/.dev engine-vllm checkpoint ## only the tests with a real vLLM
	@python -m tests.support.services pytest -m engine

MINUTES ?= 10
JOB_S ?= 0.2
chaos: .venv/.dev ## real faults on a running system: MINUTES=10 SEED= JOB_S=0.2
	@python -m tests.chaos.run --minutes $(MINUTES) --job-s $(JOB_S) $(if $(SEED),--seed $(SEED))

upgrade: .venv/.dev rabbitmq ## the schema migrated under load, old processes replaced by new ones: FROM=COMMIT (without: before each of the last three revisions)
	@python -m tests.upgrade.run $(if $(FROM),--from $(FROM))

check: .venv/.dev prometheus ## lint, types, layers, generated files, compose file, Kubernetes' manifests, alert rules
	@ruff format --check --quiet . && ruff check --quiet .
	@mypy
	@shellcheck deploy/backup/*.sh
	@lint-imports --no-logo > .venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }
	@python -c 'from runtime.settings import env_example; print(env_example(), end="")' | diff - .env.example
	@python -m scripts.dashboard | diff - deploy/grafana/dashboards/stoker.json
	@! command -v promtool > /dev/null || { \
		promtool check config deploy/prometheus/prometheus.yml && promtool test rules deploy/prometheus/alerts_test.yml; \
	} > .venv/promtool.log 2>&1 || { cat .venv/promtool.log; exit 1; }
	@POSTGRES_PASSWORD=x RABBITMQ_PASSWORD=x REDIS_PASSWORD=x FLOWER_PASSWORD=x GRAFANA_PASSWORD=x \
		docker-compose --env-file /dev/null --profile '*' config -q
	@python -m tests.cluster.manifests

fuzz: .venv/.dev ## our parsers and the HTTP contract under inputs that nobody would send (45 minutes): MINUTES=45
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes -r requirements/fuzz.txt
	@python -m tests.fuzz.run $(if $(findstring command,$(origin MINUTES)),--minutes $(MINUTES)); code=$$?; \
		python -m tests.fuzz.table; exit $$code

audit: .venv/.dev audit-env ## what is known against each pinned version, and secrets in the tree: asks PyPI, 2 minutes
	@python -m tests.audit.run; code=$$?; python -m tests.audit.table; exit $$code

format: .venv/.dev ## put the code into its format
	@ruff check --quiet --fix . ; ruff format --quiet .

compose-dry: .venv/.dev engine-vllm checkpoint ## every service of docker-compose.yml run for real, in a Docker engine of its own: needs root
	@python -m tests.support.packages debootstrap || true # what is missing is said by the next
	@python -m tests.compose.dry

compose-env: ## secrets for docker compose, made once
	@$(PYTHON) scripts/compose_env.py

cache: .venv/.demo embedder ## what the semantic cache needs: its libraries and the small embedder
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[demo,cache,flower,gateway,tables,traces]' -e ./client

documents: .venv/.demo embedder ## what reading and searching documents needs: its libraries and the small embedder
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[demo,cache,documents,flower,gateway,tables,traces]' -e ./client

env-example: .venv/.demo
	@python -c 'from runtime.settings import env_example; print(env_example(), end="")' > .env.example

dashboard: .venv/.demo ## Grafana's dashboard from deploy/grafana/panels.toml, the table of metrics in docs/operations.md
	@python -m scripts.dashboard > deploy/grafana/dashboards/stoker.json
	@python -m scripts.metrics_table

# `make bench-cache`, `bench-dispatch`, `bench-size` and `make chaos` are of other questions or too long; the table shows their last results.
BENCHES := bench-end-to-end bench-front-end bench-pipeline bench-growth bench-submit bench-gateway bench-order bench-refill bench-endpoints bench-knee bench-express bench-observability bench-takeover
bench: .venv/.dev ## all ratios anew (about 2 hours), one table of them, README.md and docs/benchmarks.md
	@failed=; for bench in $(BENCHES); do \
		echo "== make $$bench"; $(MAKE) --no-print-directory $$bench || failed="$$failed $$bench"; \
	done; python -m benchmarks.readme; python -m benchmarks.table; \
	[ -z "$$failed" ] || { echo "bench: not measured anew:$$failed" >&2; exit 1; }

bench-pipeline: .venv/.dev nginx rabbitmq ## the pipeline on an endpoint that costs nothing, beside Celery per prompt and Ray Data
	@$(MAKE) --no-print-directory ray-env || echo "bench-pipeline: goes on without Ray Data" >&2
	@python -m benchmarks.pipeline

bench-growth: .venv/.dev nginx rabbitmq ## what a job costs in larger batches and fuller tables
	@python -m benchmarks.growth

bench-submit: .venv/.dev ## rows/s and memory of submit and download, beside bare COPYs
	@python -m benchmarks.submit

bench-tables: .venv/.dev nginx rabbitmq engine-vllm checkpoint embedder ## tables of 1,000,000 and 10,000,000 rows; with FOLDER=banking77 that one too, by command and by client
	@python -m benchmarks.large_table
	@[ -z "$(FOLDER)" ] || python -m benchmarks.banking_table --folder $(FOLDER)

bench-gateway: .venv/.dev ## the gateway under 200 clients beside uploads of 100,000 lines; a file of 2 GB
	@python -m benchmarks.gateway

bench-express: .venv/.dev rabbitmq engine-vllm checkpoint ## single requests beside a batch: p50 and p99 without protection, with a low cap, with ours
	@python -m benchmarks.express

nginx: .venv/.dev
	@python -m tests.support.packages nginx

chromium: .venv/.dev
	@python -m tests.support.packages chromium || true # the page's tests say that they are skipped

prometheus: .venv/.dev
	@python -m tests.support.packages promtool || true # what needs it says that it is skipped

rabbitmq: .venv/.dev
	@python -m tests.support.packages rabbitmq-server

JOBS ?= 10000000
bench-size: .venv/.dev nginx rabbitmq ## ten million jobs in one Postgres, from submit to retention (two hours, 35 GB of disk): JOBS=10000000
	@python -m benchmarks.size --jobs $(JOBS)

bench-dispatch: .venv/.dev ## the dispatch leader at 10,000 to 1,000,000 shards, and who waits for whom
	@python -m benchmarks.dispatch

bench-order: .venv/.dev rabbitmq engine-vllm checkpoint ## the order of jobs on vLLM: prefix reuse, long and short outputs first
	@python -m benchmarks.order

bench-break-even: .venv/.dev rabbitmq engine-vllm checkpoint ## a batch on a real engine beside what a managed API asks: `stoker cost`
	@python -m benchmarks.break_even

bench-knee: .venv/.dev engine-vllm checkpoint ## how many requests at once endpoints bear, and whether the window finds it: scripted ones, a real engine
	@python -m benchmarks.knee

bench-takeover: .venv/.dev rabbitmq ## how long schedules are not looked for when the leading beat is killed, or Redis emptied
	@python -m benchmarks.takeover

bench-refill: .venv/.dev rabbitmq ## starvation and tail of scripted engines, one of them with 2,048 slots
	@python -m benchmarks.refill

bench-endpoints: .venv/.dev rabbitmq ## 20,000 jobs on four endpoints: slow, rate-limited, failing, dying and returning
	@python -m benchmarks.endpoints

bench-observability: .venv/.dev nginx rabbitmq engine-vllm checkpoint ## throughput with traces, metrics and Flower on, beside none of them
	@python -m benchmarks.observability

bench-cache: .venv/.dev embedder gptcache engine-vllm checkpoint ## the cache: hits, errors, GPTCache, lookups, duplicates, a real engine: FOLDER=banking77 is a folder with its train.csv and test.csv
	@OPENBLAS_NUM_THREADS=1 python -m benchmarks.cache --folder $(FOLDER)
	@$(VENV_GPTCACHE)/bin/python -m benchmarks.cache_gptcache --folder $(FOLDER)
	@python -m benchmarks.cache_lookup --folder $(FOLDER)
	@python -m benchmarks.cache_exact
	@python -m benchmarks.cache_engine --folder $(FOLDER)

bench-end-to-end: .venv/.dev rabbitmq engine-vllm checkpoint ## the whole system beside the bare engine: LLM.chat and run-batch
	@python -m benchmarks.end_to_end

bench-front-end: .venv/.dev engine-vllm checkpoint ## vLLM's batch route beside single requests
	@python -m benchmarks.front_end

# Only what a run needs: no test tools.
.venv/.demo: pyproject.toml client/pyproject.toml constraints.txt
	@echo "building .venv: pip is at work, about 30 s, minutes on a slow network" >&2
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[demo,flower,gateway,tables,traces]' -e ./client
	@touch $@

.venv/.dev: .venv/.demo requirements/compose.txt
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[demo,dev,cache,documents,flower,gateway,tables,traces]' -e ./client
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --require-hashes -r requirements/compose.txt
	@touch $@
