# `make` lists the targets. Each does its own set-up; none needs another to have been run by hand.
# PYTHON chooses the interpreter of .venv, CC the compiler, SNAPD_CFLAGS adds flags to the C, ARGS goes to pytest.

PYTHON ?= python3
BIN := .venv/bin
C_USERS := $(wildcard tests examples)
CLANG := clang -fsyntax-only -std=gnu11 -Wall -Wextra -Werror -pthread -Isnapd/agent
PREFIX ?= /usr/local
INSTALL_DIR = $(DESTDIR)$(PREFIX)
SOURCES := find Makefile pyproject.toml hatch_build.py .ci snapd $(C_USERS) -type f \
	\( -name '*.[ch]' -o -name '*.py' -o -name '*.varlink' -o -name '*.toml' -o -name Makefile -o -path '.ci/*' \)

# $(call need,command that succeeds when it is there,name,Debian package,Fedora package)
need = @$(1) >/dev/null 2>&1 || { \
	echo "$(2) is missing: apt install $(3) (Debian, Ubuntu), dnf install $(4) (Fedora)" >&2; false; }

.PHONY: help build demo demo-tabs test tabs lint type torture sanitize bench docs install uninstall clean need-clang \
	need-redis need-stress need-chromium need-runtimes

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

build: .venv/installed ## make .venv with snapd and the test tools; compile what changed
	@$(BIN)/python hatch_build.py build
	@$(BIN)/python -m compileall -q snapd # whoever waits for a daemon's start must not wait for that

demo: need-redis build ## show the main job on a Python process and a redis-server, and verify every byte
	@$(BIN)/python -m tests.demo

demo-tabs: need-chromium build ## show background tabs of a browser on their way to disk and back; writes tabs.png
	@$(BIN)/python -m tests.demo_tabs $(ARGS)

test: need-redis build ## run all tests (ARGS='tests/unit -k map' for a part)
	@$(BIN)/python -m tests.lanes $(ARGS)

tabs: need-chromium need-runtimes build ## dump a browser's tabs, node and JVMs that know nothing of snapd (ten minutes)
	@SNAPD_REQUIRE_PEERS=1 $(BIN)/pytest -m torture tests/kernel/test_tabs.py tests/kernel/test_demo.py \
		tests/kernel/test_attached_runtimes.py $(ARGS)

lint: need-clang build ## ruff, clang's opinion of all C, and no line over 120 columns
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@CC=clang $(BIN)/python hatch_build.py syntax
	@find $(C_USERS) -name '*.c' | xargs -r $(CLANG)
	@$(SOURCES) | while read -r file; do expand "$$file" | LC_ALL=C.UTF-8 grep -nE '.{121}' | sed "s|^|$$file:|"; \
		done | { ! grep .; }

type: build ## mypy --strict
	@$(BIN)/mypy

torture: need-stress need-redis build ## dump programs at random while they verify themselves, TORTURE_S (600) seconds
	@$(BIN)/pytest -m torture -o faulthandler_timeout=4000 $(ARGS)

sanitize: build ## the engine's C under TSan, ASan and UBSan, against real processes (SANITIZE_S=20 each)
	@$(BIN)/python -m tests.sanitize

bench: build ## throughput and latencies beside the machine's own limits (ARGS='--kernel zram' as root)
	@$(BIN)/snapd bench $(ARGS)

docs: build ## write docs/errors.md from snapd/errors.py
	@$(BIN)/python docs/make_errors.py

# The packages that snapd needs come along and are its own: neither the system's Python nor another program sees them.
install: build ## install below PREFIX (/usr/local), or below DESTDIR for a package
	@$(if $(filter /%,$(PREFIX)),,echo "PREFIX has to be an absolute path" >&2; exit 1)
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; umask 022; to='$(INSTALL_DIR)'; \
	$(BIN)/hatchling build -t wheel -d "$$scratch" >/dev/null 2>&1; \
	rm -rf "$$to/lib/heap-snapd"; install -d "$$to/bin" "$$to/lib" "$$to/include" "$$to/share/doc/heap-snapd"; \
	$(BIN)/pip install -qq --disable-pip-version-check --root-user-action ignore --no-compile \
		--target "$$to/lib/heap-snapd" "$$scratch"/*.whl; \
	rm -rf "$$to/lib/heap-snapd/bin" "$$to"/lib/heap-snapd/snapd-*.dist-info/direct_url.json; \
	$(BIN)/python -m compileall -q $(if $(DESTDIR),-s '$(DESTDIR)') "$$to/lib/heap-snapd"; \
	chmod -R a+rX "$$to/lib/heap-snapd"; \
	{ echo "#!$$(readlink -f $(BIN)/python) -sP"; cat packaging/snapd.in; } > "$$scratch/snapd"; \
	install -m 755 "$$scratch/snapd" "$$to/bin/snapd"; \
	ln -sfn heap-snapd/snapd/agent/libsnapd-agent.so "$$to/lib/libsnapd-agent.so"; \
	install -m 644 snapd/agent/snapd.h "$$to/include/snapd.h"; \
	install -m 644 LICENSE docs/operations.md "$$to/share/doc/heap-snapd"; \
	put() { install -d "$$to/$${2%/*}"; sed 's|/usr/local|$(PREFIX)|' "systemd/$$1" > "$$scratch/unit"; \
		install -m 644 "$$scratch/unit" "$$to/$$2"; }; \
	for kind in service socket; do put heap-snapd.$$kind lib/systemd/system/heap-snapd.$$kind; \
		put user/heap-snapd.$$kind lib/systemd/user/heap-snapd.$$kind; done; \
	put heap-snapd.tmpfiles lib/tmpfiles.d/heap-snapd.conf; \
	put heap-snapd.sysusers lib/sysusers.d/heap-snapd.conf; \
	put 60-heap-snapd.rules lib/udev/rules.d/60-heap-snapd.rules

uninstall: ## remove what install put there, with the same PREFIX and DESTDIR
	@$(if $(filter /%,$(PREFIX)),,echo "PREFIX has to be an absolute path" >&2; exit 1)
	rm -rf '$(INSTALL_DIR)/lib/heap-snapd' '$(INSTALL_DIR)/share/doc/heap-snapd'
	cd '$(INSTALL_DIR)/lib' 2>/dev/null && rm -f systemd/system/heap-snapd.* systemd/user/heap-snapd.* \
		tmpfiles.d/heap-snapd.conf sysusers.d/heap-snapd.conf udev/rules.d/60-heap-snapd.rules || true
	rm -f '$(INSTALL_DIR)/bin/snapd' '$(INSTALL_DIR)/lib/libsnapd-agent.so' '$(INSTALL_DIR)/include/snapd.h'

clean: ## remove .venv and everything that was built
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find snapd tests -name __pycache__ -prune -exec rm -rf {} +
	find snapd -name '*.so' -delete
	rm -f snapd/bench/load snapd/bench/raw

# What only the operating system can give is looked for before anything is downloaded.
.venv/installed: pyproject.toml
	@$(PYTHON) hatch_build.py check
	$(call need,$(PYTHON) -c 'import ensurepip; import venv',Python's venv module,python3-venv,python3)
	@echo "making .venv (a minute, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check --editable '.[test,lint]'
	@touch $@

need-clang:
	$(call need,command -v clang,clang,clang,clang)

# Without redis-server its tests and its part of the demo are left out, unless SNAPD_REQUIRE_PEERS=1.
need-redis:
	$(call need,command -v redis-server,redis-server,redis-server,redis) || [ "$$SNAPD_REQUIRE_PEERS" != 1 ]

need-stress:
	$(call need,command -v stress-ng,stress-ng,stress-ng,stress-ng)
	$(call need,command -v redis-benchmark,redis-benchmark,redis-tools,redis)

need-chromium:
	$(call need,command -v chromium,chromium,chromium,chromium)

need-runtimes:
	$(call need,command -v node,node,nodejs,nodejs)
	$(call need,command -v javac,javac,default-jdk-headless,java-latest-openjdk-devel)
