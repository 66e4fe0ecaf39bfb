# make demo: set everything up, build, run the bundled pair side by side.   make test: the test suite.
# make check: what CI also demands (style, types, stubs, sanitizers).       make bench: docs/BENCHMARKS.md anew, on this machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PATH := $(CURDIR)/$(BIN):$(PATH)
CXX_SOURCES = $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h')

.PHONY: demo test check bench dev build sanitize emulate stubtest clean

demo: build
	$(BIN)/dspark demo

test: build $(VENV)/.clients
	$(BIN)/python -m pytest -q

check: build stubtest sanitize
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

bench: build
	$(BIN)/python tools/measure.py

dev: build

# The ARM kernels: cross-compiled, tested under an emulator. Apart from `check`: it installs a compiler.
emulate: $(VENV)/.deps
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	    { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { apt-get update -qq && apt-get install -y -qq g++-aarch64-linux-gnu qemu-user; } >/dev/null 2>&1; } || \
	    { echo "cannot emulate: g++-aarch64-linux-gnu and qemu-user are not installed, and apt-get as root is not possible"; exit 1; }
	$(BIN)/cmake --preset emulate -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja >/dev/null
	$(BIN)/cmake --build --preset emulate
	$(BIN)/ctest --preset emulate

stubtest: build
	$(BIN)/python -m mypy.stubtest dspark_cpp._core --ignore-disjoint-bases --allowlist tools/stubtest_allowlist.txt --mypy-config-file pyproject.toml

sanitize: $(VENV)/.deps
	$(BIN)/cmake --preset asan -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja >/dev/null
	$(BIN)/cmake --build --preset asan
	$(BIN)/ctest --preset asan

# Re-run on every call: ninja decides what is stale, seconds when nothing is. CMAKE_ARGS passes through.
build: $(VENV)/.deps
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .

$(VENV)/.deps: pyproject.toml
	@command -v ccache >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { apt-get install -y -qq ccache || { apt-get update -qq && apt-get install -y -qq ccache; }; } >/dev/null 2>&1; } || \
	    echo "ccache not found: llama.cpp is compiled anew in every fresh clone"
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV); }
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --group dev $$($(BIN)/python tools/runtime_requirements.py)
	touch $@

# Heavier clients of the server and a browser for its page; tests of what cannot be installed are skipped.
$(VENV)/.clients: $(VENV)/.deps
	$(BIN)/pip install --quiet --group clients
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { apt-get install -y -qq chromium || { apt-get update -qq && apt-get install -y -qq chromium; }; } >/dev/null 2>&1; } || \
	    echo "Chromium not found: the tests of the chat page are skipped"
	touch $@

clean:
	rm -rf build $(VENV)
