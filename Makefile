# make demo   export the built-in model for android-int4 and search real texts with it
# make test   lint, type-check and test
# Both set up everything they need in .venv: python3 with venv, make and a C++ compiler are enough.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   := demo
BUNDLE := $(DEMO)/egemma-small-android-int4
NATIVE := setup.py pyproject.toml sdk/egemma/_native/egx.cpp

.PHONY: demo test lint test-full clean

demo: $(VENV)/.export
	$(BIN)/egemma-export --target android-int4 --model models/egemma-small --out $(BUNDLE) --force
	$(BIN)/egemma inspect $(BUNDLE)
	rm -f $(DEMO)/notes.db $(DEMO)/notes.db-wal $(DEMO)/notes.db-shm
	$(BIN)/egemma add-lines $(DEMO)/notes.db benchmarks/demo_texts.jsonl --jsonl --model $(BUNDLE)
	@while read -r query; do \
	  echo; echo "? $$query"; $(BIN)/egemma search $(DEMO)/notes.db "$$query" -k 2 --model $(BUNDLE) || exit 1; \
	done < benchmarks/demo_queries.txt

# Two processes: the exporter's ExecuTorch and the SDK's own cannot share one.
test: lint
	$(BIN)/python -m pytest tests/sdk tests/server
	$(BIN)/python -m pytest --ignore=tests/sdk --ignore=tests/server

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The 24-layer, 262,144-row model, random: about 4 GB of memory and 2 GB of cache.
test-full: $(VENV)/.dev
	$(BIN)/python -m pytest --ignore=tests/sdk --ignore=tests/server -m full_size

$(VENV)/.dev: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.export

$(VENV)/.export: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[export]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info sdk/egemma/_native/*.so
