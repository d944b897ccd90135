# demo: the main job on the embedded images. test, lint, bench, sanitize: what contributors run. All in a virtual environment of
# its own, torch first, so that TORCH chooses the build and nothing after it replaces it:
#   make demo TORCH=torch==2.13.0     make test PYTHON=python3.12     make test ARGS="-k law"
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# One stamp per TORCH and extras: a second `make` installs nothing, another TORCH installs again.
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)

MAKEFLAGS += --no-builtin-rules

# What the compiled part is made of: after a change it is built again (only what changed, in a few seconds).
COMPILED := setup.py $(wildcard build_tools/*.py csrc/*.* csrc/*/*.*)
SANITIZED := $(wildcard tests/test_channel_mask*.py tests/test_masked_adamw.py tests/test_sl*.py tests/test_optim*.py tests/test_group_norm.py tests/test_group_norm_silu*.py tests/test_timestep_loss.py tests/test_timestep_loss_laws.py tests/test_timestep_loss_philox.py)

.PHONY: demo test lint bench sanitize clean

demo: $(STAMP)-run
	$(BIN)/ebdiff run $(ARGS)

test: $(STAMP)-test
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)-test
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

# The CPU part under AddressSanitizer and UndefinedBehaviorSanitizer. Without torch.compile: it starts compilers.
sanitize: $(STAMP)-test
	$(BIN)/python -m build_tools.sanitize build/sanitize \
	    $(BIN)/python -m pytest $(SANITIZED) -k "not compile" -p no:cacheprovider $(ARGS)

clean:
	rm -rf $(VENV) build dist ebdiff.egg-info ebdiff/_build.json ebdiff/_C.*

# `pip install torch` leaves a torch that is there alone; the constraint keeps the second install from changing it.
# TORCH is not quoted, so that it can hold pip's options too.
$(STAMP)-%: pyproject.toml tests/foreign.txt $(COMPILED)
	@$(PYTHON) -c 'import sys; sys.exit("ebdiff needs Python 3.11 or later: make PYTHON=... chooses one" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	$(BIN)/python -m pip install -c $(VENV)/torch.txt -e "$(if $(filter-out run,$*),.[$*],.)"
	$(if $(filter test,$*),$(BIN)/python -m pip install --no-deps -r tests/foreign.txt)
	@touch $@
