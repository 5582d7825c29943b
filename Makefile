# Everything a user or a contributor types. `make` alone explains.
# Other places or versions: make demo VENV=/fast/disk/venv PYTHON=python3.12

VENV   ?= .venv
PYTHON ?= python3
TESTERS ?= 2
PY      = $(VENV)/bin/python
STAMP   = $(VENV)/.ready
PLACE   = $(if $(FINDREC_HOME),$(FINDREC_HOME),$(CURDIR))
CODE    = findrec tests evaluation docs .ci setup.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cluster torture lint types lock bench docs clean

help:
	@echo "make demo    set up, then train and evaluate on MovieLens-100K (about ten minutes on two cores)"
	@echo "make test    set up, then run the tests (those for GPUs skip themselves)"
	@echo "make test-cluster  workers, machines and disks that fail under a run, on real Ray clusters"
	@echo "make torture  twenty random kills; must end in the same weights"
	@echo "make setup   the virtual environment $(VENV); done once, then instant"
	@echo "make lint    ruff: rules and format; import-linter: which room may import which"
	@echo "make types   mypy, strict for the package, lenient for tests and benchmarks"
	@echo "make lock    resolve the dependencies anew into requirements.lock"
	@echo "make bench   time and memory of the hot kernels"
	@echo "make docs    the documentation as a site, site/index.html"
	@echo "make clean   remove build products and caches; data/, runs/ and $(VENV) stay"
	@echo "Other Python or place: make setup PYTHON=python3.12 VENV=/path/to/venv"

setup: $(STAMP)

# The stamp is written last: an interrupted set-up is taken up again.
$(STAMP): pyproject.toml constraints.txt requirements.lock setup.py .ci/setup_env.py findrec/nvidia.py
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "setup: no $(PYTHON) here. Debian/Ubuntu: sudo apt install python3 python3-venv;" \
	       "Fedora: sudo dnf install python3; macOS: brew install python@3.12" >&2; exit 1; }
	@$(PYTHON) .ci/setup_env.py $(VENV)
	@touch $(STAMP)

demo: setup
	$(PY) -m findrec.train_dist --config configs/demo.yaml
	@echo
	@echo "Metrics  $(PLACE)/runs/demo/metrics.json"
	@echo "Report   $(PLACE)/runs/demo/report.html (open it in a browser)"
	@echo "MLflow   $(VENV)/bin/mlflow ui --backend-store-uri sqlite:///$(PLACE)/mlflow.db"

# One file of tests is one process's; each process keeps to one core.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest

test: setup
	$(PYTEST) -n $(TESTERS) --dist loadfile --no-loadscope-reorder -m "not cluster and not torture"

# One after the other: workers of two clusters on two cores take too long to start.
test-cluster: setup
	$(PYTEST) -m cluster

torture: setup
	$(PYTEST) -m torture

lint: setup
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(VENV)/bin/lint-imports --no-logo --no-cache

types: setup
	$(PY) -m mypy
	$(PY) -m mypy --config-file tests/mypy.ini

# Versions that still fit are kept; `make lock LOCK=--upgrade` raises them all.
lock: setup
	$(VENV)/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --extra cpu --extra dev \
	  -c constraints.txt --generate-hashes --no-annotate --custom-compile-command "make lock" $(LOCK) \
	  -q -o requirements.lock

bench: setup
	$(PY) evaluation/benchmarks/ops.py

docs: setup
	$(PY) -m mkdocs build

clean:
	rm -rf site build dist *.egg-info findrec/assets .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find findrec tests evaluation .ci -name __pycache__ -type d -prune -exec rm -rf {} +
