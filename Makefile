# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PEERS  ?= build/peers

# A folder of wheels that pip is set up to use (for example a CPU build of torch) serves uv too.
FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
UV_ENV := $(if $(wildcard $(firstword $(FIND_LINKS))),UV_FIND_LINKS="$(firstword $(FIND_LINKS))",) UV_LINK_MODE=copy

.PHONY: help setup demo test lint bench bench-loader bench-gpu clean

help:
	@echo "make demo       run the whole pipeline on embedded data (about ten minutes on two cores)"
	@echo "make test       run the test suite"
	@echo "make setup      create $(VENV) and install dpal into it"
	@echo "make lint       check style and types"
	@echo "make bench      measure the figures that docs/performance.md quotes"
	@echo "make bench-loader  race the loader against other loaders (they get $(PEERS), 3 GB)"
	@echo "make bench-gpu  the same for an accelerator"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "── creating $(VENV) and installing (first time: about 2 GB)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dpal needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	@$(UV_ENV) $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test]'
	@touch $@

demo: setup
	@$(BIN)/dpal demo

test: setup
	@tests/system_packages.sh
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary dpal/base data_tools cluster
	@$(BIN)/pytest -q -n auto --maxprocesses=4 --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dpal/base data_tools cluster

# bench_peers.py runs through bench-loader, which knows where the other loaders are.
bench: setup bench-loader
	@for file in $(filter-out benchmarks/bench_peers.py,$(wildcard benchmarks/bench_*.py)); do \
		echo "── $$file"; $(BIN)/python $$file || exit 1; done

bench-loader: setup $(PEERS)/.tried
	@echo "── benchmarks/bench_peers.py"
	@$(BIN)/python benchmarks/bench_peers.py --peers-python $(PEERS)/bin/python $(RACE)

# One by one where they do not install together: who is missing is reported by the race as out.
$(PEERS)/.tried: benchmarks/peers/requirements.txt | setup
	@echo "── installing other loaders into $(PEERS), beside $(VENV)"
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv $(PEERS)
	@$(UV_ENV) $(BIN)/uv pip install --quiet --python $(PEERS)/bin/python -r $< \
		|| grep -v '^#' $< | while read -r pin; do \
			$(UV_ENV) $(BIN)/uv pip install --quiet --python $(PEERS)/bin/python "$$pin" \
				|| echo "not installed: $$pin" >&2; done
	@touch $@

bench-gpu: setup
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' \
		|| { echo "bench-gpu needs an accelerator that torch can see" >&2; exit 2; }
	@$(BIN)/python benchmarks/bench_train_step.py --device cuda

clean:
	rm -rf $(VENV) runs build *.egg-info
