# `make demo`: the main job end to end on this machine, `make sft-demo`: instruction tuning of its
# model. `make test`: the tests.
PYTHON ?= python3
VENV ?= .venv
UV = $(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python

.PHONY: demo sft-demo test test-slow certify golden check fmt

demo: $(VENV)/.ready
	$(VENV)/bin/python tools/demo.py

sft-demo: $(VENV)/.ready
	$(VENV)/bin/python tools/sft_demo.py

test: $(VENV)/.ready-test
	$(VENV)/bin/python -m pytest -n 4 --dist loadfile

test-slow: $(VENV)/.ready-test
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile -m "slow and not certify"

certify: $(VENV)/.ready-test
	$(VENV)/bin/python -m pytest -m certify

golden: $(VENV)/.ready-test
	$(VENV)/bin/python tools/golden_pods.py --jobs 4

check: $(VENV)/.ready-test
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

fmt: $(VENV)/.ready-test
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet uv==0.13.9
	$(UV) -r requirements.txt
	$(UV) --no-deps -e .
	touch $@

# torch through pip, which takes a local wheel where one is configured; see requirements-test.txt.
$(VENV)/.ready-test: $(VENV)/.ready requirements-test.txt
	$(VENV)/bin/pip install --quiet -r requirements-test.txt
	touch $@
