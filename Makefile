# One front door. `make demo` trains the main job on the bundled digits, `make test` passes the tests;
# both set up what they need first.

TORCH_VERSION := $(shell sed -n 's/^torch==//p' deploy/requirements/libtorch-cpu.in)
PYTHON ?= python3
CARGO ?= cargo
DEMO_DIR ?= runs/mnist-mlp
WORKERS ?= 2
SEEDS ?= 100000
SHELL_SEEDS ?= 1000
SESSIONS ?= 100 500 1000 2000
TOOLS := .tools
# Of each file that pip brings the hash is known: `make requirements` writes them.
PIP = $(PYTHON) -m pip install --quiet --require-hashes
REQUIREMENTS := deploy/requirements
# Most tests wait for processes most of the time.
TEST_THREADS ?= $(shell expr 2 \* $$(nproc))
KILLS ?= 100
RESTARTS ?= 20

.DEFAULT_GOAL := help
.PHONY: help setup build build-bench build-tests demo bench bench-functions bench-gpu bench-load bench-recovery scale test test-bench golden simulate simulate-planted simulate-shell chaos soak check fmt lint style modules features unused docs licences proto-lint proto-breaking proto-contract clean \
	advisories pins update-pins requirements sbom check-sbom wheel image release check-alerts test-browser test-cloud test-deploy test-pytorch test-kubernetes

help: ## Show what there is to make.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# ---- Set-up ----------------------------------------------------------------------------------------------------------

ifneq ($(LIBTORCH)$(LIBTORCH_USE_PYTORCH),)
setup: ## Get libtorch (CUDA=1: with CUDA). An existing LIBTORCH or LIBTORCH_USE_PYTORCH=1 is respected.
	@echo "using the libtorch of the environment"
else ifeq ($(CUDA),1)
setup: .libtorch/cuda-$(TORCH_VERSION)
else
setup: $(if $(wildcard .libtorch/cuda-$(TORCH_VERSION)),,.libtorch/cpu-$(TORCH_VERSION))
endif

# The wheel's libraries name two CUDA libraries even where no GPU is used; the rest of CUDA is left out.
.libtorch/cpu-$(TORCH_VERSION):
	@echo "getting libtorch $(TORCH_VERSION) for CPUs (about 600 MB)"
	@rm -rf .libtorch
	@$(PIP) --target .libtorch --no-deps --requirement $(REQUIREMENTS)/libtorch-cpu.txt
	@touch $@

.libtorch/cuda-$(TORCH_VERSION):
	@echo "getting libtorch $(TORCH_VERSION) with CUDA (about 4.5 GB)"
	@rm -rf .libtorch
	@$(PIP) --target .libtorch --requirement $(REQUIREMENTS)/libtorch-cuda.txt
	@touch $@

FEATURES := $(if $(CUDA),ganglion-worker/cuda) $(if $(CLOUD),ganglion-coordinator/cloud ganglion-worker/cloud)

# What is built is always the two programs, alone or with more, so that a crate has the same features each time
# and is compiled once; `make features` checks that.
BUILD := $(CARGO) build --release --locked -p ganglion-coordinator -p ganglion-worker

build: setup ## Build the programs (CUDA=1: for GPUs; CLOUD=1: with object stores).
	$(BUILD) $(if $(strip $(FEATURES)),--features "$(strip $(FEATURES))")

build-bench: setup
	$(BUILD) -p ganglion-bench

build-tests: setup
	$(BUILD) -p ganglion-tests -p ganglion-failing

# ---- Use -------------------------------------------------------------------------------------------------------------

demo: build ## Train the MLP GAN on real digits with two workers, then draw 50 digits.
	target/release/coordinator --workers $(WORKERS) --run-dir $(DEMO_DIR)
	target/release/worker sample $(DEMO_DIR) --count 50 --seed 7 --out $(DEMO_DIR)/digits.png

# ---- Measure ---------------------------------------------------------------------------------------------------------

# ONLY selects rows, so alone it leaves the other parts out.
BENCH_PARTS := $(or $(PARTS),$(if $(ONLY),rows,rows promise growth losses packages))
BENCH_NEEDS := $(if $(filter rows losses packages,$(BENCH_PARTS)),$(TOOLS)/bench)

bench: build-bench $(BENCH_NEEDS) ## Measure training, also beside PyTorch; write bench/RESULTS.md (PARTS="rows growth", ONLY="mlp-28").
	target/release/bench $(addprefix --,$(BENCH_PARTS)) $(if $(ONLY),--only "$(ONLY)") $(if $(BF16),--bf16) \
		--python-path $(TOOLS)/bench --page bench/RESULTS.md --pictures docs

bench-gpu: ## Check and measure all that needs a GPU, into OUT=folder (after `make build CUDA=1`; GPU="--device cpu" to try it).
	$(PYTHON) bench/gpu.py --out $(or $(OUT),bench-gpu) $(GPU)

bench-functions: setup ## Measure single functions: the sum of gradients, Adam, digests, framing, the journal (ONLY="tree").
	$(CARGO) bench --locked -p ganglion-bench --benches -- $(ONLY)

bench-load: build-bench ## Measure a coordinator with many sessions: SESSIONS="100 500".
	target/release/load $(SESSIONS)

scale: build-bench build-tests ## Measure groups of up to 64 real workers, and model larger ones; write docs/scale.md.
	target/release/scale --page docs/scale.md

bench-recovery: build-bench $(TOOLS)/bench ## Kill workers and coordinators, and those of others; write docs/recovery.md.
	target/release/recovery --kills $(KILLS) --restarts $(RESTARTS) --seed $(or $(SEED),1) --python-path $(TOOLS)/bench \
		--page docs/recovery.md

# PyTorch for Python loads CUDA's libraries also where there is no GPU, so all of them come along.
$(TOOLS)/bench:
	@echo "getting PyTorch and torchft for Python (4.7 GB)"
	@$(PIP) --target $@.new --requirement $(REQUIREMENTS)/bench-torchft.txt || \
		$(PIP) --target $@.new --requirement $(REQUIREMENTS)/bench.txt
	@mv $@.new $@

# ---- Checks ----------------------------------------------------------------------------------------------------------

test: build-tests $(TOOLS)/python ## Run all tests.
	RUST_TEST_THREADS=$(TEST_THREADS) GANGLION_BIN="$(CURDIR)/target/release" $(CARGO) test --release --locked --workspace --exclude ganglion-bench
	@if command -v node > /dev/null; then node tests/browser/figures.mjs; \
	else echo "the dashboard's formats were not checked: that needs node"; fi
	@if command -v kubectl || command -v kustomize; then $(MAKE) --no-print-directory test-kubernetes; \
	else echo "deploy/kubernetes was not checked: that needs kubectl or kustomize"; fi

test-bench: build-bench ## Test the programs that measure.
	$(CARGO) test --release --locked -p ganglion-bench --bins --tests

golden: build-tests ## Compare the bits of this tree with those of another commit (BASE=main, ONLY=part of a job's name).
	target/release/golden $(if $(BASE),--base $(BASE)) $(if $(ONLY),--only $(ONLY))

chaos: build-tests ## Disturb real runs at random, for MINUTES=10, and demand the same bits (SEED=x to repeat).
	MINUTES=$(MINUTES) target/release/chaos

soak: build-tests ## Disturb a run now and then for MINUTES=60: its memory, descriptors and threads must stay flat.
	MINUTES=$(MINUTES) target/release/soak

records-page: ## Write docs/records.md, the reference of metrics.jsonl and events.jsonl, from their types.
	$(CARGO) run --release --locked --quiet -p ganglion-proto --example records_page > docs/records.md.new
	mv docs/records.md.new docs/records.md

simulate: ## Simulate the group protocol with faults (SEEDS=n, FIRST=n, or SEED=x to see one again). Needs no set-up.
	SEEDS=$(SEEDS) $(CARGO) test --release --locked -p ganglion-membership --test simulation every_seed -- --nocapture

simulate-planted: ## Plant mistakes into copies of the group protocol: the simulation must find each. Needs no set-up.
	$(PYTHON) membership/tests/planted/check.py

simulate-shell: setup ## Simulate coordinator and sessions, with gRPC and journal (SHELL_SEEDS=n, or SEED=x).
	SEEDS=$(SHELL_SEEDS) $(CARGO) test --release --locked -p ganglion-worker --test simulation every_seed -- --nocapture

# What reads our files in Python, for the test that they can be read.
$(TOOLS)/python:
	@echo "getting safetensors and TensorBoard for Python (about 60 MB)"
	@$(PIP) --target $@.new --requirement $(REQUIREMENTS)/python.txt
	@mv $@.new $@

test-kubernetes: $(TOOLS)/kubernetes ## Check the manifests of deploy/kubernetes. Needs kubectl or kustomize, and no cluster.
	$(PYTHON) tests/deploy/kubernetes.py --packages $(TOOLS)/kubernetes

$(TOOLS)/kubernetes:
	@$(PIP) --target $@.new --requirement $(REQUIREMENTS)/kubernetes.txt
	@mv $@.new $@

test-cloud: $(TOOLS)/cloud ## Test checkpoints in an object store, with a server that speaks S3.
	@$(MAKE) build CLOUD=1
	PATH="$(CURDIR)/$(TOOLS)/cloud/bin:$$PATH" PYTHONPATH="$(CURDIR)/$(TOOLS)/cloud" GANGLION_BIN="$(CURDIR)/target/release" \
		$(CARGO) test --release --locked -p ganglion-tests --features cloud --test object_store

$(TOOLS)/cloud:
	@$(PIP) --target $@.new --requirement $(REQUIREMENTS)/cloud.txt
	@mv $@.new $@

PYTORCH := PYTHONPATH="$(CURDIR)/python:$(CURDIR)/$(TOOLS)/bench:$(CURDIR)/$(TOOLS)/python" GANGLION_BIN="$(CURDIR)/target/release"

test-pytorch: build $(TOOLS)/bench $(TOOLS)/python ## Test the Python package; train networks written in PyTorch, and load the result back into it.
	$(PYTORCH) $(PYTHON) tests/networks/check.py --programs target/release
	$(PYTORCH) $(PYTHON) -m unittest discover --start-directory tests/pytorch --failfast
	$(PYTORCH) GANGLION_PYTORCH=1 \
		$(CARGO) test --release --locked -p ganglion-tests --test pages --test packages

test-browser: build ## Look at the dashboard of a real run with a real browser. Needs Chromium.
	$(PYTHON) tests/browser/dashboard.py --programs target/release

check-alerts: ## Check the alerts and the configuration for Prometheus. Needs promtool.
	promtool check rules deploy/prometheus/alerts.yml
	promtool check config deploy/prometheus/prometheus.yml
	promtool test rules deploy/prometheus/alerts_test.yml

check: fmt lint style modules features unused docs licences advisories pins proto-lint proto-breaking test test-bench golden ## Everything that must be clean before a change lands.

fmt:
	$(CARGO) fmt --all --check

lint: setup
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings

# Words, scripts, Python and the C++ of c10d.
style: $(TOOLS)/lint ## Check spelling, shell scripts, Python and the layout of the C++.
	$(TOOLS)/lint/bin/typos
	$(TOOLS)/lint/bin/shellcheck $(SCRIPTS)
	$(TOOLS)/lint/bin/ruff check --no-cache
	$(TOOLS)/lint/bin/ruff format --no-cache --check --quiet
	PYTHONPATH=$(TOOLS)/lint $(TOOLS)/lint/bin/clang-format --dry-run --Werror $(SHIM)

SCRIPTS := .ci/run deploy/collect.sh deploy/release.sh deploy/slurm/ganglion.sbatch tests/deploy/bases.sh
SHIM := $(shell find c10d/shim -name '*.cc' -o -name '*.h')

$(TOOLS)/lint:
	@echo "getting typos, shellcheck, ruff and clang-format (about 25 MB)"
	@$(PIP) --target $@.new --requirement $(REQUIREMENTS)/lint.txt
	@mv $@.new $@

modules: ## Check that modules do not depend on each other in a circle.
	$(PYTHON) tests/modules.py

features: ## Check that no crate is compiled twice for want of one set of features.
	$(PYTHON) tests/features.py

unused: $(TOOLS)/bin/cargo-machete
	$(TOOLS)/bin/cargo-machete

$(TOOLS)/bin/cargo-machete:
	$(CARGO) install --quiet --locked --root $(TOOLS) cargo-machete

docs: setup
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --locked --workspace --no-deps

licences: $(TOOLS)/bin/cargo-deny
	$(TOOLS)/bin/cargo-deny --locked check licenses bans sources

# Where the database cannot be fetched this says so and goes on; REQUIRE_ADVISORIES=1, for a release, does not.
advisories: $(TOOLS)/bin/cargo-deny ## Look for known faults of the crates. Needs the network (REQUIRE_ADVISORIES=1 insists).
	@if $(TOOLS)/bin/cargo-deny --locked fetch db; then \
		$(TOOLS)/bin/cargo-deny --locked check --disable-fetch advisories; \
	else \
		echo "advisories were not checked: their database cannot be fetched from here" >&2; [ -z "$(REQUIRE_ADVISORIES)" ]; \
	fi

pins: ## Check that images are named by digest and Python packages by hash.
	$(PYTHON) deploy/pins.py check

update-pins: ## Name the newest images of their tags by digest, in deploy/Dockerfile. Needs a registry of images.
	$(PYTHON) deploy/pins.py update --docker $(DOCKER)

requirements: $(TOOLS)/uv ## Choose the newest Python packages that deploy/requirements/*.in allow, and write their hashes.
	@for file in $(REQUIREMENTS)/*.in; do \
		$(TOOLS)/uv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes --no-header \
			$$(grep -q -e --no-deps $$file && echo --no-deps) $$file --output-file $${file%.in}.txt || exit 1; \
	done

$(TOOLS)/uv:
	@$(PIP) --target $@.new --requirement $(REQUIREMENTS)/uv.txt
	@mv $@.new $@

$(TOOLS)/bin/cargo-deny:
	$(CARGO) install --quiet --locked --root $(TOOLS) cargo-deny

BUF := ../$(TOOLS)/buf/bin/buf
PROTOCOL = $(shell sed -n 's/^pub const PROTOCOL: u32 = \([0-9]*\);/\1/p' proto/src/lib.rs)

proto-lint: $(TOOLS)/buf/bin/buf
	cd proto && $(BUF) lint

# Within a version messages only grow. Between versions the number of a field that went is reserved, so that an older peer's
# field is never taken for another.
WIRE := '{"version":"v2","breaking":{"use":["WIRE"]}}'

proto-breaking: $(TOOLS)/buf/bin/buf ## Check that the wire contract still fits those of proto/contract, one for each PROTOCOL.
	@cd proto && for kept in contract/*.binpb; do \
		$(BUF) breaking --against $$kept $$(test $$kept = contract/$(PROTOCOL).binpb || echo --config $(WIRE)) || \
			{ echo "reserve what went; raise PROTOCOL, in proto/src/lib.rs, if it is of version $(PROTOCOL)" >&2; exit 1; }; \
	done
	@cd proto && $(BUF) build --exclude-source-info --output - | cmp --silent - contract/$(PROTOCOL).binpb || \
		[ -n "$(KEEP)" ] || { echo "the wire contract is new or has grown: run make proto-contract" >&2; exit 1; }

proto-contract: ## Keep the wire contract as that of PROTOCOL, in proto/contract.
	@$(MAKE) --no-print-directory proto-breaking KEEP=1
	cd proto && $(BUF) build --exclude-source-info --output contract/$(PROTOCOL).binpb

$(TOOLS)/buf/bin/buf:
	$(PIP) --target $(TOOLS)/buf --requirement $(REQUIREMENTS)/buf.txt

clean: ## Remove what was built. Set-up and runs stay.
	$(CARGO) clean

# ---- Deploy ----------------------------------------------------------------------------------------------------------

# Podman or Docker.
DOCKER ?= $(firstword $(notdir $(shell command -v podman docker)) docker)
IMAGE_KIND := $(if $(CUDA),cuda,cpu)

wheel: build $(TOOLS)/patchelf ## Pack the programs into dist/ for pip (CUDA=1: for GPUs).
	@$(MAKE) --no-print-directory sbom SBOM=dist/wheel.cdx.json SBOM_ARGS=--without-libtorch
	$(PYTHON) deploy/wheel/build.py --torch $(TORCH_VERSION) $(if $(CUDA),--cuda cu130) --sbom dist/wheel.cdx.json \
		--patchelf $(TOOLS)/patchelf/bin/patchelf

SBOM ?= dist/ganglion.cdx.json

sbom: setup $(TOOLS)/bin/cargo-cyclonedx ## List all parts of the programs in dist/ganglion.cdx.json (CycloneDX; CUDA=1, CLOUD=1).
	$(PYTHON) deploy/sbom.py --tool $(TOOLS)/bin/cargo-cyclonedx --features "$(strip $(FEATURES))" $(SBOM_ARGS) --out $(SBOM)

check-sbom: sbom $(TOOLS)/sbom ## Check that list against CycloneDX's schema.
	PYTHONPATH=$(TOOLS)/sbom $(PYTHON) tests/deploy/sbom.py $(SBOM)

$(TOOLS)/sbom:
	@$(PIP) --target $@.new --requirement $(REQUIREMENTS)/sbom.txt
	@mv $@.new $@

$(TOOLS)/bin/cargo-cyclonedx:
	$(CARGO) install --quiet --locked --root $(TOOLS) --version 0.5.9 cargo-cyclonedx

$(TOOLS)/patchelf:
	@$(PIP) --target $@.new --requirement $(REQUIREMENTS)/patchelf.txt
	@mv $@.new $@

image: ## Build the container image ganglion:cpu (CUDA=1: ganglion:cuda; IMAGE_ARGS="--build-arg ...").
	$(DOCKER) build --file deploy/Dockerfile --target $(IMAGE_KIND) --tag ganglion:$(IMAGE_KIND) $(IMAGE_ARGS) .

release: ## Make a release in dist/: wheel, image, bills of materials, checksums (CUDA=1 adds those for GPUs; DRAFT=1 to try).
	DOCKER=$(DOCKER) CUDA=$(CUDA) DRAFT=$(DRAFT) IMAGE_ARGS="$(IMAGE_ARGS)" deploy/release.sh

# Needs Debian's podman, buildah, runc, netavark, aardvark-dns, debootstrap, slurmctld, slurmd, slurm-client and munge.
test-deploy: wheel check-sbom test-kubernetes $(TOOLS)/compose ## Test the wheel, the container image and Slurm for real (as root; ONLY="wheel slurm").
	@for part in $(or $(ONLY),wheel compose slurm); do $(PYTHON) tests/deploy/$$part.py || exit 1; done

$(TOOLS)/compose:
	@$(PIP) --target $@.new --requirement $(REQUIREMENTS)/compose.txt
	@mv $@.new $@
