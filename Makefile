# The one door. Every target installs and builds what it needs, and may be repeated.
SHELL := /bin/bash
export PATH := $(HOME)/.cargo/bin:$(PATH)
TOOLS = $$(tools/build.sh | tail -n 1)

.PHONY: help demo test check fmt clippy unit sim bench setup generate clean-cache

help: ## What there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: setup ## A real rollout on real parts: a good update, then one that rolls itself back (about 3 minutes once built)
	@cargo build --workspace
	@OSIMAGE_TOOLS=$(TOOLS) target/debug/demo

test: setup check ## Everything: check, then the shipped binaries on real control planes and OSTree hosts
	@export OSIMAGE_TOOLS=$(TOOLS); cargo build --workspace && cargo test --workspace --no-fail-fast

check: setup fmt clippy unit ## The usual loop: format, lints, purity of the planner, unit tests, simulator

fmt:
	@cargo fmt --check

clippy:
	@cargo clippy --workspace --all-targets -- -D warnings
	@! cargo tree -p osimage-planner -e normal --prefix none | grep -E '^(tokio|hyper|kube-client|kube-runtime) ' \
	  || { echo "the planner must stay pure: see above what it depends on"; exit 1; }

unit:
	@cargo test --workspace --lib --bins -q
	@cargo test -p osimage-crds -p osimage-planner --tests -q

sim: ## The simulator, long: SIM_SEEDS seeds of each kind of fault (default 1500, more than 10,000 in all); prints steps, seeds, violations
	@set -o pipefail; SIM_SEEDS=$${SIM_SEEDS:-1500} cargo test --release -p osimage-planner --test sim -- --nocapture \
	  | awk '{ print; fflush() } / steps, .* seeds, .* violations$$/ { n = NF; steps += $$(n-5); seeds += $$(n-3); bad += $$(n-1) } \
	    END { printf "sim: %d steps, %d seeds, %d violations\n", steps, seeds, bad }'

bench: setup ## A pulling worker against `ostree pull`, side by side: wall time and memory
	@cargo build --release --workspace
	@OSIMAGE_TOOLS=$(TOOLS) OSIMAGE_BIN_DIR=target/release target/release/bench-pull

generate: ## Writes the generated files: CRDs
	@UPDATE=1 cargo test -q -p osimage-crds --test golden

setup: ## Installs what is missing on this machine
	@tools/setup.sh

clean-cache: ## Removes what was built outside the repository
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/osimage-operator"
