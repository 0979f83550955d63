# Every target makes its environment first. An environment is installed again when pyproject.toml or
# constraints.txt change, and kept otherwise.

PYTHON ?= python3
VENV := .venv
VENV_XLA := .venv-xla
VENV_TRACKERS := .venv-trackers
XLA_PINS := torch==2.9.0 torch_xla==2.9.0

KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
DEV := $(VENV)/.dev-$(KEY)
BENCH := $(VENV)/.bench-$(KEY)
DOCS := $(VENV)/.docs-$(KEY)
XLA := $(VENV_XLA)/.xla-$(KEY)
TRACKERS := $(VENV_TRACKERS)/.trackers-$(KEY)

# These need a device, an environment of their own, a quiet machine, or programs and rights that pip cannot give.
ELSEWHERE := --ignore=tests/xla --ignore=tests/gpu --ignore=tests/benchmarks --ignore=tests/cluster
# Two halves side by side: half of a run's time goes by waiting for processes that start, time out or are killed.
PYTEST := -m pytest -n 2 --dist worksteal $(ELSEWHERE)

.NOTPARALLEL:
.PHONY: demo test test-xla test-trackers test-cluster check bench docs clean

demo: $(DEV)
	$(VENV)/bin/python examples/demo.py

test: $(DEV)
	$(VENV)/bin/python $(PYTEST) tests

# The lowest torch we support is also the only one torch_xla has, so one environment serves both. Of the tests that need
# no torch_xla, those are left out that another torch shows nothing new about: the launcher and the command line, settings
# and their conversion, trackers, examples and docs, the rules of the source tree, the pool that tests run on, and pure
# arithmetic on positions and orders; reports, ledgers, and which checkpoints are kept and when.
NOT_ABOUT_TORCH := accelerator/launch accelerator/cli accelerator/configure accelerator/trackers accelerator/doctor \
	accelerator/test_config.py accelerator/test_choice.py accelerator/test_batch_arithmetic.py \
	accelerator/test_lines.py accelerator/test_processes.py examples test_architecture.py test_rank_pool.py \
	strategies/test_sharding.py strategies/test_registry.py strategies/test_tree.py strategies/test_drawn.py \
	strategies/test_seeded.py strategies/test_hugging_face.py strategies/test_loader_arguments.py \
	accelerator/report accelerator/test_ledger.py accelerator/test_progress.py accelerator/test_padding.py \
	accelerator/checkpoint/test_retention.py accelerator/checkpoint/test_preemption.py

test-xla: $(XLA)
	$(VENV_XLA)/bin/python $(PYTEST) $(NOT_ABOUT_TORCH:%=--ignore=tests/%) tests
ifneq ($(wildcard tests/xla/test_*.py),)
	PJRT_DEVICE=CPU CPU_NUM_DEVICES=4 TF_CPP_MIN_LOG_LEVEL=2 XLA_FLAGS=--xla_backend_optimization_level=0 \
		$(VENV_XLA)/bin/python -m pytest tests/xla
endif

# Each tracker against its own package. An environment of 1.9 gigabytes with torch, so it is run by hand.
test-trackers: $(TRACKERS)
	$(VENV_TRACKERS)/bin/python -m pytest tests/accelerator/trackers

# Needs root; and SLURM (Debian's slurmctld, slurmd and munge), or `ip netns`. What is absent is skipped, and says so.
test-cluster: $(DEV)
	$(VENV)/bin/python -m pytest tests/cluster

check: $(DEV)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest tests/test_architecture.py

bench: $(DEV) $(BENCH)
	set -e; for script in tests/benchmarks/bench_*.py; do $(VENV)/bin/python $$script; done

docs: $(DEV) $(DOCS)
	$(VENV)/bin/mkdocs build --strict --config-file .mkdocs.yml

# What runs and builds leave behind. The environments stay: they are large and renew themselves.
clean:
	rm -rf site build dist runs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find accelerator strategies tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.%-$(KEY):
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[$*]'
	rm -f $(VENV)/.$*-*
	touch $@

$(XLA):
	test -x $(VENV_XLA)/bin/python || $(PYTHON) -m venv $(VENV_XLA)
	grep -v -e '^torch==' constraints.txt > $(VENV_XLA)/constraints.txt
	printf '%s\n' $(XLA_PINS) >> $(VENV_XLA)/constraints.txt
	$(VENV_XLA)/bin/pip install --quiet -c $(VENV_XLA)/constraints.txt -e '.[dev,xla]'
	$(VENV_XLA)/bin/pip uninstall --quiet --yes torchao  # 0.18 needs a newer torch, and transformers imports what it finds
	rm -f $(VENV_XLA)/.xla-*
	touch $@

$(TRACKERS):
	test -x $(VENV_TRACKERS)/bin/python || $(PYTHON) -m venv $(VENV_TRACKERS)
	$(VENV_TRACKERS)/bin/pip install --quiet -c constraints.txt \
		-e '.[tensorboard,wandb,mlflow]' pytest pytest-timeout pytest-xdist hypothesis
	$(VENV_TRACKERS)/bin/pip install --quiet trackio  # by itself: it needs an older pillow than the others are pinned to
	rm -f $(VENV_TRACKERS)/.trackers-*
	touch $@
