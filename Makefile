# Everything lives in .venv. `make demo` and `make test` set it up by themselves.
.PHONY: setup lock demo test test-slow fuzz browser chromium tpu libtpu lint types clean

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# The first interpreter that runs and is new enough: a shim of a version manager may exist and fail.
define FIND_PYTHON
for p in python3 python3.12 python3.13 python3.14 python; do \
  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then echo $$p; exit 0; fi; \
done; \
echo "No Python 3.12 or newer found (tried python3, python3.12, python3.13, python3.14, python)." >&2; \
echo "Install one, for example: pyenv install 3.12, or uv python install 3.12." >&2; exit 1
endef

setup: $(STAMP)

# The very files of requirements.lock where it is for this machine; elsewhere what the ranges give.
LOCKED := (3, 12), "linux", "x86_64"
define REQUIREMENTS
if $(PYTHON) -c 'import platform, sys; \
  sys.exit((sys.version_info[:2], sys.platform, platform.machine()) != ($(LOCKED)))'; \
then echo --require-hashes -r requirements.lock; else echo -r requirements-dev.txt; fi
endef

$(STAMP): requirements.txt requirements-dev.txt requirements.lock
	@python=$$($(FIND_PYTHON)) || exit 1; test -x $(PYTHON) || $$python -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $$($(REQUIREMENTS))
	@touch $@

# The newest that the ranges allow. Needs uv.
lock:
	uv pip compile --quiet --upgrade --generate-hashes --no-annotate --python-version 3.12 \
	  --python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock" \
	  --output-file requirements.lock requirements-dev.txt

demo: $(STAMP)
	$(PYTHON) -m launch.demo --output=out/demo

# Four processes on two cores: some tests wait for commands that they start, or for time to pass. In
# tests/conftest.py's order: files of few tests are the longest here, and pytest-xdist would take them
# last. Where a process dies, all end: with another in its place, pytest-xdist 3.8 waits for ever.
test: $(STAMP)
	$(PYTHON) -m pytest -n 4 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0

test-slow: $(STAMP)
	$(PYTHON) -m pytest -m slow --timeout=3600

# 6,000 mutated files of every kind; `make fuzz ARGS=--seed=1` for others.
fuzz: $(STAMP)
	$(PYTHON) -m tests.fuzz --mutations=6000 $(ARGS)

# The live page in Chromium: Debian's package, or another by LONGLIVE_CHROMIUM=PATH.
browser: $(STAMP) chromium
	$(PYTHON) -m pytest -m browser tests/serving/browser

chromium:
	@for b in "$$LONGLIVE_CHROMIUM" chromium chromium-browser google-chrome; do \
	  command -v "$$b" >/dev/null && exit 0; done; \
	{ apt-get update -q && apt-get install -y -q --no-install-recommends chromium; } || \
	  { echo "No Chromium: install it, or set LONGLIVE_CHROMIUM to its path." >&2; exit 1; }

# Compiles for slices of TPUs. libtpu, of the version that jax[tpu] asks for, has a folder of its own:
# where it is found, JAX looks for chips at every start.
LIBTPU := $(VENV)/tpu
tpu: libtpu
	PYTHONPATH=$(LIBTPU) $(PYTHON) -m pytest -m tpu tests/tpu

libtpu: $(STAMP)
	@test -d $(LIBTPU)/libtpu || $(PYTHON) -m pip install --quiet --disable-pip-version-check \
	  --no-deps --target $(LIBTPU) "$$($(PYTHON) -c 'import importlib.metadata as m; \
	  print(next(r for r in m.requires("jax") if r.startswith("libtpu")).partition(";")[0])')"

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/basedpyright

clean:
	rm -rf out .pytest_cache .ruff_cache .hypothesis
