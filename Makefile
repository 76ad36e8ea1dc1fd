# Every target does its own set-up, into .venv. An environment that already has torch is used as it is:
#   make test PYTHON=/path/to/python
# Another build of torch for .venv, here the one without CUDA:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
# Options for the scripts: make train ARGS="--full"

TORCH ?= torch==2.13.0
ARGS ?=

ifdef PYTHON
ready := checked
bare := $(PYTHON)
else
bare := python3
PYTHON := .venv/bin/python
ready := .venv/ready
oldest := .venv/triton-3.6/triton/__init__.py
endif

.PHONY: train bench report test fuzz gpu tune audit sanitize lint checked clean

train: $(ready)
	$(PYTHON) bench/train.py $(ARGS)

bench: $(ready)
	$(PYTHON) bench/run.py $(ARGS)

# One HTML file of the newest results of each machine: bench/out/report.html
report: $(ready)
	$(PYTHON) bench/report.py $(ARGS)

test: $(ready) $(oldest)
	$(PYTHON) -m pytest -n auto $(ARGS)

# Random calls beside the oracle, for SECONDS in all.
fuzz: SECONDS ?= 3600
fuzz: $(ready)
	FASTNORM_FUZZ_SECONDS=$(SECONDS) $(PYTHON) -m pytest -n auto tests/test_fuzz.py $(ARGS)

# These two take a Python that has torch as it is, python3 if none is given: nothing is installed.
gpu:
	$(bare) bench/gpu.py $(ARGS)

tune:
	$(bare) bench/checkout.py bench/tune.py $(ARGS)

# Every kernel as machine code for five architectures, those of CUDA C++ for four where there is an nvcc, and the bytes that
# every op moves: three tables, no GPU. On two cores it takes an hour the first time; what is compiled is kept.
audit: $(ready)
	PYTHONPATH="tests:$$PYTHONPATH" $(PYTHON) -m audit

# The C++ kernels under ASAN and UBSAN, and before them those of CUDA in the tests' emulator. The process needs gcc's runtimes
# before Python; Python leaks by intent; the words of the sanitizers go to an uncaptured stderr.
sanitized := FASTNORM_SANITIZE=1 FASTNORM_BACKEND=native CXX="$(CXX)"
under := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(PYTHON) -m pytest -n 2 --capture=sys -p no:faulthandler
sanitize: $(ready)
	FASTNORM_EMULATOR_SANITIZE=1 FASTNORM_EMULATOR_ORDER=forward $(under) -k emulated $(ARGS) \
		$(patsubst %,tests/test_%.py,rows channels contract sums fused groups positions masked masked_rows branch)
	$(sanitized) $(PYTHON) -c "from fastnorm import build; build.library()"
	$(sanitized) $(under) $(ARGS) $(patsubst %,tests/test_%.py,rows channels contract fused groups positions masked masked_rows branch autograd eager modules guards)

lint: $(ready)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

clean:
	rm -rf .venv build dist *.egg-info fastnorm/_C*.so bench/out

# torch first and pinned: pip would otherwise choose a build by itself, of several gigabytes.
.venv/ready: pyproject.toml setup.py fastnorm/build.py $(wildcard csrc/* csrc/*/*)
	@echo "Setting up .venv: $(TORCH), fastnorm with its C++ kernels, and what tests and benchmarks need"
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	.venv/bin/python -m pip install -q --disable-pip-version-check "setuptools>=77" wheel ninja
	.venv/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[test,bench]"
	touch .venv/ready

# The oldest Triton that is served, for the audit's tests: beside the environment's own, which stays the one that is imported.
.venv/triton-3.6/triton/__init__.py: | .venv/ready
	.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target .venv/triton-3.6 triton==3.6.0

checked:
	@$(PYTHON) -c "import torch" || { echo "$(PYTHON) has no torch: install it first, or leave PYTHON away"; exit 2; }
	$(PYTHON) -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[test,bench]"
