# `make test` and `make demo` are all a newcomer needs; both may be run again and from any path.
PYTHON ?= python3
VENV := .venv
VLLM := .vllm
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
REAL = $(shell grep -rlE 'pytest.mark.(hub|slow)' tests --include='test_*.py')

.PHONY: install test test-vllm fetch real lint types demo fuzz clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow"

# what no test of `make test` needs: real tokenizers, a real small model, an older transformers; 250 MB once, kept in .real
fetch: $(INSTALLED)
	$(PY) tests/support/fetch_real.py .real

# what `make test` leaves out: what was fetched, launchers, packages built and installed, a soak
real: fetch
	. ./.real/variables.sh && OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --timeout 1200 -m "hub or slow" $(REAL)

# vLLM's CPU build in an environment of its own; minutes per family, so not part of `make test`
$(VLLM)/.installed: tests/servers/environment.py
	$(PYTHON) tests/servers/environment.py $(VLLM)

test-vllm: $(INSTALLED) $(VLLM)/.installed
	BTRM_VLLM=$(VLLM) OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/servers

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(INSTALLED)
	$(PY) -m mypy

demo: $(INSTALLED)
	$(PY) -m btrm_core train --family llama3 --overwrite

# longer than in the tests: rows and command lines that nobody means
fuzz: $(INSTALLED)
	$(PY) tests/support/row_fuzz.py --rows 100000 --seed 1
	BTRM_FUZZ=2000 BTRM_SEED=1 $(PY) -m pytest -q tests/cli/test_cli.py -k absurd_command --timeout 7200

clean:
	rm -rf $(VENV) $(VLLM) .real runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
