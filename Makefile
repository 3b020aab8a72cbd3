# The one menu. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := PYTHONPATH=tools $(BIN)/python
STAMP  := $(VENV)/.ready
LOCK   := requirements.lock
# Tests are shared out file by file, in order.
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-extras lint types check docs dashboards bench bench-update bench-drift bench-serving bench-telemetry _bench-telemetry crash-test fuzz lock arm64 clean

help:  ## This list.
	@grep -hE '^[a-z0-9_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9_-]+):.*## (.*)/  \1\t\2/' | expand -t 14

setup: $(STAMP)  ## Make the environment in .venv, from the hashed lock.

$(STAMP): $(LOCK) agent/pyproject.toml control_plane/pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Lightship needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12")'
	@echo "Setting up .venv (a minute or two, once) …"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(LOCK)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e agent -e control_plane
	@touch $@

demo: $(STAMP)  ## The whole loop on real data, explained as it goes. KEEP=1 leaves it running.
	@$(RUN) -m demo $(if $(KEEP),--keep)

test: $(STAMP)  ## Every test.
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

test-extras:  ## The tests of optional packages, in an environment that has them (.venv-extras).
	@$(MAKE) --no-print-directory test VENV=.venv-extras LOCK=requirements-extras.lock TESTS='-m extras'

crash-test: $(STAMP)  ## Fail the real programs at every point; writes docs/reliability.md. ONLY=words for some; AGAIN=1: what missed.
	@$(RUN) -m crash_test $(if $(ONLY),--only "$(ONLY)") $(if $(AGAIN),--again)

fuzz: $(STAMP)  ## Foreign bytes for every parser, FUZZ_SECONDS=30 each; writes docs/reliability.md. ONLY=words for some.
	@$(RUN) -m fuzz --seconds $(or $(FUZZ_SECONDS),30) $(if $(ONLY),--only "$(ONLY)")

lint: $(STAMP)  ## ruff: style, bugs, security, formatting.
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict.
	@$(BIN)/mypy agent control_plane tools

check: lint types test  ## Everything CI runs.

docs: $(STAMP)  ## Write docs/reference/ from the code.
	@$(RUN) -m docs_reference

dashboards: $(STAMP)  ## Write Grafana's dashboards into the package.
	@$(RUN) -m dashboards

bench: bench-update bench-drift bench-serving bench-telemetry  ## Every benchmark. Pages and figures go to docs/benchmarks/.

bench-update: $(STAMP)  ## What looking for updates and getting them costs; a few minutes.
	@$(RUN) -m bench_update

bench-drift: $(STAMP)  ## How often drift alarms are false, and how soon true; some 25 minutes. ONLY=parts, QUICK=1, AGAIN=1.
	@$(RUN) -m bench_drift $(if $(ONLY),--only "$(ONLY)") $(if $(QUICK),--quick) $(if $(AGAIN),--again)

bench-serving: $(STAMP)  ## What a prediction costs, here and in other servers; about an hour. ONLY=parts, SOAK=requests, QUICK=1, AGAIN=1.
	@$(RUN) -m bench_serving $(if $(ONLY),--only "$(ONLY)") $(if $(SOAK),--soak $(SOAK)) $(if $(QUICK),--quick) $(if $(AGAIN),--again)

bench-telemetry:  ## What telemetry costs, and what it takes to lose a report; some ten minutes. ONLY=parts, QUICK=1.
	@$(MAKE) --no-print-directory _bench-telemetry VENV=.venv-extras LOCK=requirements-extras.lock

_bench-telemetry: $(STAMP)
	@$(RUN) -m bench_telemetry $(if $(ONLY),--only "$(ONLY)") $(if $(QUICK),--quick)

lock:  ## Renew the hashed locks (needs the `uv` program).
	@grep -vE '^#' agent/pyproject.toml | $(PYTHON) -c 'import tomllib,pathlib; d=tomllib.loads(pathlib.Path("agent/pyproject.toml").read_text())["project"]["dependencies"]; pathlib.Path("agent/requirements.in").write_text("# Generated from agent/pyproject.toml by `make lock`.\n"+"\n".join(d)+"\n")'
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header requirements.in -o requirements.lock
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header requirements-extras.in -c requirements.lock -o requirements-extras.lock
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header agent/requirements.in -c requirements.lock -o agent/requirements.lock
	uv pip compile -q --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header tests/clients/requirements.in -o tests/clients/requirements.lock

arm64:  ## Build the agent's ARM64 image with buildah (needs buildah, and a base image; see docs/operators-guide.md).
	STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot buildah bud --arch arm64 -f Dockerfile.arm64 -t lightship-agent:arm64 .

clean:  ## Remove what the targets above made.
	rm -rf $(VENV) .venv-newest .venv-extras build .pytest_cache .mypy_cache .ruff_cache .hypothesis
