# Everything happens in .venv; PYTHON chooses the interpreter that creates it.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# Installs share one environment, so they must not run side by side.
.NOTPARALLEL:
.PHONY: setup demo test test-frameworks test-distributed test-nvrtc lint docs check-site gallery notebooks bench bench-pages bench-check bench-gpu bench-distributed package release clean
.DELETE_ON_ERROR:

setup: .venv/.installed-torch,test

demo: .venv/.installed-examples
	$(BIN)/python examples/train_gpt.py

test: setup
	$(BIN)/python -m pytest -n 2 -q

# Offline: the models are random and small, and nothing is to be downloaded.
test-frameworks: .venv/.installed-test,frameworks
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -q tests/frameworks

# All rules, cut in all ways, on one to four processes.
test-distributed: setup
	OPTIMISERS_ALL_LAYOUTS=1 $(BIN)/python -m pytest -q tests/test_distributed.py

# The compiler of CUDA takes every kernel. No GPU is needed.
test-nvrtc: .venv/.installed-test,nvrtc
	$(BIN)/python -m pytest -n 2 -q tests/nvrtc

lint: .venv/.installed-torch,lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python .ci/check_site.py

# Every page of the site in Chromium, which has to be on PATH, at two widths: about four minutes.
check-site: docs
	$(BIN)/python .ci/look_at_site.py $(ARGS)

# The pictures of the documentation. ARGS names some: make gallery ARGS='Lion schedules'
gallery: .venv/.installed-examples
	$(BIN)/python examples/gallery.py $(ARGS)

# What the cells of examples/notebooks show, written into them; Jupyter is not needed.
notebooks: .venv/.installed-examples
	$(BIN)/python examples/run_notebook.py --write $(ARGS)

# ARGS is for run.py: make bench ARGS='--quick --only "leaves/*"'
bench: .venv/.installed-bench
	$(BIN)/python benchmarks/run.py $(ARGS)

# The benchmarks in the documentation, from the results that are there; and our own bounds beside them.
bench-pages: .venv/.installed-examples
	$(BIN)/python benchmarks/pages.py

bench-check: .venv/.installed-torch
	$(BIN)/python benchmarks/check.py $(ARGS)

# On a CUDA device, under four minutes; --dry and --host need none.
bench-gpu: .venv/.installed-torch
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# Two ranks on this machine; ARGS=--dry takes two steps each.
bench-distributed: .venv/.installed-torch
	$(BIN)/torchrun --nproc-per-node 2 benchmarks/distributed.py $(ARGS)

# The wheel and the sdist, each tried where nothing else is installed.
package: .venv/.installed-torch,lint
	.ci/package.sh $(BIN)/python

# make release VERSION=0.2.0: see .ci/release.py.
release: .venv/.installed-torch,lint
	$(BIN)/python .ci/release.py $(VERSION)

clean:
	rm -rf .venv site dist build out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras; it goes stale when the requirements or the pins change.
# The build backend is installed first, not in an isolated build, because constraints do not reach isolated builds.
.venv/.installed-%: pyproject.toml constraints.txt .venv/.created
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation -e '.[$*]'
	@touch $@

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "optimisers needs Python 3.11 or newer; '$(PYTHON)' is not. Choose one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

# Intermediate files are deleted by make unless they are precious: the stamps are made through a pattern.
.PRECIOUS: .venv/.installed-% .venv/.created
