# Two commands: `make demo` (set-up and main job) and `make test` (set-up and all tests).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo docs docs-serve dist resolve test test-gpu test-hosts test-judge test-long bad-input chaos soak audit lint types clean-venv

$(STAMP): pyproject.toml constraints/cpu.txt constraints/beside.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing (about 2 GB, two to three minutes) ..."
	$(BIN)/pip install -q --disable-pip-version-check -c constraints/cpu.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints/cpu.txt -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/beside -r constraints/beside.txt
	touch $@

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo

test: $(STAMP) lint types
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not ray and not judge and not gpu and not long"
	$(BIN)/python -m pytest -m "ray and not judge and not hosts and not gpu and not long"

# Every part on a stand-in for a GPU (docs/gpu-rehearsal.md), at most six minutes; the stand-in is built once, with g++ and ninja.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "gpu and not ray and not long"
	$(BIN)/python -m pytest -m "gpu and ray and not long"

# A cluster of three hosts in network namespaces; skipped, with the reason, without root and iproute2.
test-hosts: $(STAMP)
	$(BIN)/python -m pytest -m "hosts and not long"

# A real vLLM on the CPU, alone and in a run; the first time it is installed into an environment of its own below ~/.cache (3.4 GB).
test-judge: $(STAMP)
	$(BIN)/python -m pytest -m "judge and not long"

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

# Some 1,600 wrong configurations, prompt files and models, also of rewards; the figures go to docs/reliability.md.
bad-input: $(STAMP)
	$(BIN)/python -m tests.badinput

# Known vulnerabilities of the installed packages, but those that constraints/advisories.txt accepts. Needs the network.
audit: $(STAMP)
	test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install -q pip-audit==2.10.1; }
	$(VENV)/audit/bin/pip-audit --progress-spinner off --skip-editable \
	  --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') --path $(VENV)/beside \
	  $$(sed -nE 's/^((PYSEC|GHSA|CVE)-[^ ]+) .*/--ignore-vuln \1/p' constraints/advisories.txt)

# Ten minutes of small steps in which an actor is killed every 20 s: does anything grow? --minutes 120 is the long one.
soak: $(STAMP)
	$(BIN)/python -m tests.soak --minutes 10

# 64 faults in real runs, two at a time, at most 45 minutes; as root all of them. The figures go to docs/reliability.md.
chaos: $(STAMP)
	$(BIN)/python -m tests.chaos

# The documentation site, into build/site. A broken link, or a page without a place in the nav, fails.
docs: $(STAMP)
	$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check -c constraints/cpu.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

docs-serve: docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# The sdist and the wheel, into dist/: built twice and compared, checked by twine and for completeness. Needs the network once.
dist: $(STAMP)
	test -x $(VENV)/dist/bin/twine || { $(PYTHON) -m venv $(VENV)/dist && \
	  $(VENV)/dist/bin/pip install -q --disable-pip-version-check build==1.6.1 twine==7.0.0 setuptools==84.2.1 uv==0.13.9; }
	$(VENV)/dist/bin/python .ci/dist.py

# Do the dependencies and each extra resolve for every Python that we name? Nothing is installed. Needs the network.
resolve: dist
	for python in 3.10 3.11 3.12 3.13; do for extra in $$(sed -nE '/optional-dependencies/,/^\[/s/^([a-z]+) = .*/\1/p' pyproject.toml); do \
	  $(VENV)/dist/bin/uv pip compile -q --extra $$extra --python-version $$python --python-platform x86_64-manylinux_2_28 \
	    pyproject.toml -o $(VENV)/dist/resolved.txt && echo "Python $$python, $$extra: $$(grep -c == $(VENV)/dist/resolved.txt) packages" || exit 1; \
	done; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

types: $(STAMP)
	$(BIN)/mypy

clean-venv:
	rm -rf $(VENV)
