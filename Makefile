PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test gpu-test aot check wheel matrix audit clean

# The road once, on the embedded model: convert, transfer, finetune, save, evaluate, generate, report.
demo: .venv/demo
	$(BIN)/linearize run

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

# What needs a GPU, every file with a time limit; says what passed in gpu_tests.log. Two to four minutes with 32 cores.
gpu-test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python tests/gpu/run.py

# Kernels compiled for Hopper in every mode and width, where the suite has a choice of them; minutes, no GPU needed.
aot: .venv/test
	LINEARIZE_AOT=every OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_aot.py -n 2 -q

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The wheel, built twice with equal bytes, alone in an environment of its own that has what pip gives it.
wheel: .venv/test
	bash tests/wheel.sh --alone

# The whole suite with the oldest and the newest transformers, each in an environment of its own under .matrix/.
matrix:
	PYTHON=$(PYTHON) bash tests/matrix.sh

# Known vulnerabilities of the versions in constraints.txt; needs a network, and fails as "not run" where none answers.
audit:
	$(PYTHON) -m venv .matrix/audit
	.matrix/audit/bin/python -m pip install -q pip-audit
	.matrix/audit/bin/python tests/audit.py

clean:
	rm -rf .venv .matrix runs

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[report]'
	touch $@

# All that the demo needs is among it.
.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@ .venv/demo
