# `make demo` shows it, `make test` checks it; both install what they need into .venv.

PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(wildcard protos/specdec/v1/*.proto)
CHECKOV := .venv/checkov/bin/checkov --config-file .ci/checkov.yaml
DEMO_PROMPT := Write a Python class Stack with push, pop, peek and is_empty methods, then show how to use each method.

.PHONY: demo test test-all drills lint docs wheel-check proto proto-release prometheus-rule manifests clean

# A state directory of its own: the demo does not meet a system that runs already.
demo: export SPECDEC_STATE_DIR := $(CURDIR)/.venv/demo-state
demo: .venv/installed
	@$(BIN)/specdec up --detach || exit; \
	trap 'exit 130' INT TERM; trap '$(BIN)/specdec down' EXIT; \
	echo; echo "== The answer, drafted by dflash and ngram-lm together as a tree; accepted draft tokens are coloured in a terminal"; \
	$(BIN)/specdec generate "$(DEMO_PROMPT)" --method dflash+ngram-lm --draft-depth 4 --draft-nodes 15 \
		--max-new-tokens 160; status=$$?; \
	echo; echo "== The same with and without a drafter"; \
	$(BIN)/specdec compare "$(DEMO_PROMPT)" --methods none,ngram,ngram-lm,mtp,dflash,dflash+ngram-lm --draft-depth 4 \
		--draft-nodes 15 --max-new-tokens 160 || status=$$?; \
	exit $$status

PYTEST := $(BIN)/pytest -n 2 --dist loadfile --max-worker-restart 0 --durations 25 --durations-min 2

test: lint
	$(PYTEST) -m "not slow and not drill"

# Everything: what `make test` runs, then the tests that take long.
test-all: test
	$(PYTEST) -m slow

# Whole systems under load, of which parts are killed, stopped, ended and added. It prints how long answers paused.
drills: .venv/installed
	$(BIN)/pytest -v -rP --show-capture=stdout -m "slow or drill" tests/drills

# The package as users get it: built, installed apart from its sources, and run. `make test-all` does it as well.
wheel-check: .venv/installed
	$(BIN)/pytest tests/contract/test_wheel.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against protos/released.binpb

# docs/configuration.md as the code has it; a test fails when it drifts.
docs: .venv/installed
	$(BIN)/python -m docs.make_configuration > docs/configuration.md

# The contract as it is now becomes the one that later changes must not break.
proto-release: .venv/installed
	$(BIN)/buf build protos --exclude-source-info --output protos/released.binpb

proto: .venv/installed
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

prometheus-rule: .venv/installed
	$(BIN)/python deploy/kubernetes/components/monitoring/make_prometheus_rule.py

# Every overlay rendered and checked; checkov has an environment of its own, for it pins what we need otherwise.
manifests: .venv/installed .venv/checkov/installed
	$(BIN)/pytest -n 2 tests/deploy
	rm -rf .venv/manifests && mkdir .venv/manifests
	$(BIN)/python -m tests.deploy.manifests .venv/manifests
	$(CHECKOV) --framework kubernetes --directory .venv/manifests
	$(CHECKOV) --framework dockerfile --file deploy/Dockerfile

.venv/checkov/installed: .venv/installed
	$(PYTHON) -m venv .venv/checkov
	.venv/checkov/bin/python -m pip install --quiet checkov==3.3.30
	touch $@

# Engines that benchmarks compare with, in versions that do not go with ours. Two requirements of theirs are left
# out: torchvision, which text does not need, and openvino-telemetry, which reports to its maker.
.venv/peers/installed: .venv/installed .ci/peers.txt
	@echo "Installing the peers into .venv/peers: 1.6 GB, two to three minutes"
	$(PYTHON) -m venv .venv/peers
	.venv/peers/bin/python -m pip install --quiet --no-deps --requirement .ci/peers.txt
	.venv/peers/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/installed: pyproject.toml .ci/constraints.txt $(wildcard specdec/runtime/kernels/*.[ch])
	@echo "Installing into .venv: 1.6 GB, two to three minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[models,http,bench,dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
