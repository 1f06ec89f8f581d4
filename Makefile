# Each target does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test browser deepspeed style docs clean

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/hf-ensemble demo

test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# What the tests of the page of a run need beside Chromium; without it `make test` skips them.
browser: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser]'

# What the tests of bases that DeepSpeed cuts need; without it `make test` skips them.
deepspeed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed]'

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Strict: a broken link fails. The site is in site/.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) demo_output site

# torch first and pinned: an unpinned torch brings gigabytes of CUDA packages to a machine without a GPU.
$(STAMP): pyproject.toml setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test,dev]'
	touch $(STAMP)
