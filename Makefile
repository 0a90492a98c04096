# The whole life of a checkout. `make demo` and `make test` need only Python, git and make; each sets up everything.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A machine without any linker gets one from PyPI.
EXTRAS := dev$(shell command -v ld.lld ld cc >/dev/null || echo ',cross')

EXECUTORCH := $(VENV)/executorch
EXECUTORCH_PYTHON = $(if $(wildcard $(EXECUTORCH)/bin/python),$(foreach kind,EXECUTORCH EXECUTORCH_INT8,\
    CNNCC_BENCH_PYTHON_$(kind)=$(abspath $(EXECUTORCH)/bin/python)))

# Families of many foundries, so that those held back for testing look like none that was trained on
FONTS := fonts-adf-accanthis fonts-adf-gillius fonts-adf-universalis fonts-averia-gwf fonts-averia-sans-gwf fonts-b612 \
    fonts-cabin fonts-cantarell fonts-century-catalogue fonts-cmu fonts-comfortaa fonts-courier-prime \
    fonts-crosextra-caladea fonts-crosextra-carlito fonts-dejavu-core fonts-dosis fonts-ebgaramond fonts-fanwood \
    fonts-firacode fonts-freefont-ttf fonts-gfs-artemisia fonts-gfs-didot fonts-gfs-neohellenic fonts-goudybookletter \
    fonts-hack fonts-inconsolata fonts-jetbrains-mono fonts-jura fonts-lato fonts-league-spartan fonts-levien-museum \
    fonts-liberation2 fonts-linuxlibertine fonts-oldstandard fonts-open-sans fonts-opendin fonts-play fonts-prociono \
    fonts-quicksand fonts-roboto-unhinted fonts-sil-charis fonts-sil-gentium fonts-texgyre fonts-tuffy fonts-urw-base35 \
    fonts-vollkorn fonts-yanone-kaffeesatz

# What the tests run engines for ARM and RISC-V with: qemu, and C and C++ compilers with those machines' libraries
AARCH64 := qemu-user g++-aarch64-linux-gnu libc6-dev-arm64-cross libstdc++6-arm64-cross \
    g++-arm-linux-gnueabihf libc6-dev-armhf-cross g++-riscv64-linux-gnu libc6-dev-riscv64-cross
# What predicts cycles of their kernels
LLVM_MCA := llvm-19
# What a fleet is played with: a registry, another client of it, and a browser for the collector's page
FLEET := docker-registry skopeo chromium
# What the collector and the agent's unit are tested with beside that
SERVICES := postgresql softhsm2 systemd

# $(call debian,PACKAGES,PURPOSE): brings Debian packages where that can be done, and else says which are missing
define debian
@if ! dpkg-query -W $(1) >/dev/null 2>&1; then \
    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
        apt-get update -qq || true; \
        apt-get install --yes -qq --no-install-recommends $(1) || true; \
    else \
        echo 'not root, or no Debian: $(2), install $(1)'; \
    fi; \
fi
endef

.PHONY: help setup demo chain-demo fleet-demo test test-gpu slow aarch64 arm-device fleet-tools service-tools cnncc-run tensorrt lint check bench executorch accuracy calibration-cost quantizers fonts threads zoo clean
.DEFAULT_GOAL := help

help:
	@echo 'make setup   .venv with cnncc, cnncc-runtime (editable) and all that tests need'
	@echo 'make demo    train, compile, verify and benchmark the digits CNN, then classify a PNG'
	@echo 'make chain-demo   train a residual network, shrink it to budgets, prove, publish, and have a device run it'
	@echo 'make fleet-demo   a registry, releases and three devices: rollouts by percent, tampering, an engine that fails'
	@echo 'make test    the whole test suite, the fast tests first'
	@echo 'make test-gpu   engines for GPUs on the GPU of this machine: parity, faults, benchmarks'
	@echo 'make slow    what takes minutes: ResNet-18 for a Raspberry Pi 5 under QEMU, heavy architectures'
	@echo 'make aarch64   what the tests run engines for ARM and RISC-V with; Debian packages only as root'
	@echo 'make arm-device   an AArch64 machine under qemu with the update agent: Debian and PyPI packages in build/'
	@echo 'make fleet-tools, make service-tools   Debian packages that fleets are tested with; only as root'
	@echo 'make cnncc-run   the C program that runs bundles on devices, and TVM'"'"'s runtime, for each machine with a compiler here'
	@echo 'make tensorrt   the bindings of TensorRT 10 and 11 that the tests hold our calls against'
	@echo 'make check   ruff, mypy, import-linter, then the fast tests'
	@echo 'make bench   every network beside every peer, on 1 and 2 threads; BENCH=... narrows it'
	@echo 'make executorch   an environment for one more peer'
	@echo 'make accuracy   int8 by cnncc and by other quantizers, on networks trained here; ACCURACY=... narrows it'
	@echo 'make calibration-cost   time and memory of calibrating ResNet-50, ours and ONNX Runtime'"'"'s'
	@echo 'make quantizers   environments for ModelOpt and NNCF'
	@echo 'make fonts   the Debian fonts that the networks of make accuracy are trained with (as root)'
	@echo 'make threads   pool.ll of pool.c and wide.ll of wide.c, where the latter were changed'
	@echo 'make zoo     every architecture, light and heavy'
	@echo 'make clean   remove .venv and build outputs'

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml runtime/pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cnncc needs Python 3.10 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0  # first, so that nothing pulls a newer one
	$(BIN)/pip install --quiet --disable-pip-version-check -e runtime -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/python examples/digits/demo.py

chain-demo: setup fleet-tools
	$(BIN)/python examples/chain/demo.py

fleet-demo: setup aarch64 fleet-tools arm-device
	$(BIN)/python examples/fleet/demo.py

# A file of tests is one worker's, so that what it makes for all of them is made once
WORKERS := -n auto --maxprocesses 4 --dist loadfile

test: setup aarch64 tensorrt fleet-tools service-tools arm-device
	$(BIN)/pytest $(WORKERS) -m 'not slow and not zoo and not gpu'
	$(BIN)/pytest $(WORKERS) -m 'slow and not zoo and not gpu'

# On a machine with an NVIDIA GPU: without one, every test of it fails
test-gpu: setup
	$(BIN)/pytest -m gpu tests/gpu

# What CI has no time for: minutes of emulation, and networks of hundreds of megabytes
slow: setup aarch64
	$(BIN)/pytest -m zoo --durations=0

# Where something of it cannot be had, tests say that they were skipped; in CI they fail
aarch64: build/aarch64/.ready
	$(call debian,$(AARCH64),to test engines for ARM and RISC-V too)
	$(call debian,$(LLVM_MCA),to test predictions of cycles too)

fleet-tools:
	$(call debian,$(FLEET),for fleets)

service-tools:
	$(call debian,$(SERVICES),to test the collector and the agent'"'"'s unit too)

# A board's RPC server runs on them
build/aarch64/.ready: pyproject.toml | setup
	mkdir -p $(@D)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	    --platform manylinux_2_28_aarch64 --dest $(@D) $$($(BIN)/pip freeze | grep '^apache-tvm') && touch $@ || \
	    echo 'no libraries of TVM for AArch64 could be downloaded'

# An AArch64 machine under qemu, with Python and what cnncc-runtime needs
arm-device: build/aarch64/device/cnncc-agent

build/aarch64/device/cnncc-agent: tests/qemu/device.py runtime/pyproject.toml | build/aarch64/.ready
	$(BIN)/python tests/qemu/device.py build/aarch64/device build/aarch64 || \
	    echo 'no AArch64 device could be made: its packages come from Debian and PyPI'

# What a device without Python runs bundles with; a compiler for each machine, whose name with g++ compiles C++
RUNNERS := $(shell uname -m):gcc aarch64:aarch64-linux-gnu-gcc arm:arm-linux-gnueabihf-gcc \
    riscv64:riscv64-linux-gnu-gcc

cnncc-run: setup
	@for runner in $(RUNNERS); do \
	    machine=$${runner%%:*} compiler=$${runner#*:}; \
	    folder=$(abspath build/cnncc-run)/$$machine; \
	    if command -v $$compiler >/dev/null && command -v $${compiler/gcc/g++} >/dev/null; then \
	        $(MAKE) --no-print-directory -C runtime/c PYTHON=$(abspath $(BIN)/python) CC=$$compiler \
	            CXX=$${compiler/gcc/g++} OUT=$$folder/cnncc-run RUNTIME=$$folder/libtvm_runtime.so \
	            $$folder/cnncc-run runtime; \
	    else \
	        echo "none for $$machine: there is no $$compiler with its g++ here"; \
	    fi; \
	done

# Only what says which functions there are: 1.3 MB each. The libraries behind them need NVIDIA's own index
tensorrt: build/tensorrt/.ready

build/tensorrt/.ready: Makefile | setup
	mkdir -p $(@D)
	for wheel in tensorrt-{,lean-}cu12-bindings==10.16.1.11 tensorrt-{,lean-}cu13-bindings==11.4.0.106; do \
	    $(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest $(@D) $$wheel \
	    || exit 1; \
	done && touch $@ || \
	    echo 'no bindings of TensorRT could be downloaded'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(BIN)/pytest -q $(WORKERS) -m 'not slow and not zoo and not gpu'

# BENCH passes arguments on: make bench BENCH='resnet18 unet --threads 1 --repeat 3 --output build/peers.json'
bench: setup $(VENV)/.peers
	$(EXECUTORCH_PYTHON) $(BIN)/python benchmarks/peers.py $(BENCH)

$(VENV)/.peers: pyproject.toml | setup
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]' || \
	    echo 'not every peer could be installed: the table will name those that are missing'
	touch $@

# ExecuTorch's packages do not go with ours: it is measured where this was made once
executorch: setup
	$(PYTHON) -m venv $(EXECUTORCH)
	$(EXECUTORCH)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 executorch==1.5.1 msgspec numpy

# ACCURACY passes arguments on: make accuracy ACCURACY='resnet mbv2 --seeds 1 --peers ort-percentile-lean'
accuracy: setup $(VENV)/.quantizers
	$(BIN)/python benchmarks/accuracy.py $(ACCURACY)

calibration-cost: setup
	$(BIN)/python benchmarks/calibration_cost.py $(COST)

# Each pins versions of onnx and onnxruntime that are not ours; 3.3 GB together
quantizers: $(VENV)/.quantizers

$(VENV)/.quantizers: Makefile | setup
	$(PYTHON) -m venv $(VENV)/nncf
	$(VENV)/nncf/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 nncf==3.4.0 onnx onnxruntime || \
	    echo 'NNCF could not be installed: the table will say so'
	$(PYTHON) -m venv $(VENV)/modelopt
	$(VENV)/modelopt/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 'nvidia-modelopt[onnx]==0.47.0' || \
	    echo 'ModelOpt could not be installed: the table will say so'
	touch $@

fonts:
	apt-get install --yes --no-install-recommends $(FONTS)

# clang comes with the linker of the extra `cross`, into an environment of its own
threads: setup
	$(PYTHON) -m venv build/clang
	build/clang/bin/pip install --quiet --disable-pip-version-check ziglang==0.17.1
	$(BIN)/python -m cnncc.targets.llvm.threads.generate build/clang/bin/python

zoo: setup
	$(BIN)/pytest -m 'zoo or slow' tests/zoo

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
