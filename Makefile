# `make demo` and `make test` do their own set-up; nothing has to be installed by hand but Python 3.11+ and make.
# Recipes use relative paths only, so that the project also works in a folder whose path has spaces.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.outgrow-installed

# The tests in groups, each a process of its own, two at a time: most of them keep one core busy, and the others wait for
# disks and for each other. What starts Ray is in one group: never two clusters beside each other.
RAY := $(shell grep -rl --include='test_*.py' 'mark\.ray' tests)
RANKS := $(filter-out $(RAY),$(wildcard tests/test_*_ranks.py))
WHOLE := $(filter-out $(RAY) $(RANKS),$(wildcard tests/test_*.py))
RUNTIME := tests/runtime
OTHERS := $(filter-out tests/runtime/,$(sort $(dir $(wildcard tests/*/test_*.py))))
PARTS := RAY WHOLE RANKS OTHERS RUNTIME

.PHONY: setup peers demo test lint format clean $(PARTS)

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# Optional: DeepSpeed, for the benchmarks that run against it. pip is held to the very build of torch that is installed.
# What DeepSpeed compiles at its first use is compiled here (minutes), where no limit on memory holds it up.
DEEPSPEED_PARTS := AsyncIOBuilder, CPUAdamBuilder, PinMemoryBuilder, ShareMemCommBuilder

peers: setup
	@command -v $(CXX) >/dev/null || \
	  { echo 'make peers: DeepSpeed needs a C++ compiler, and there is no $(CXX): e.g. apt-get install g++' >&2; exit 1; }
	@printf '#include <libaio.h>\n' | $(CXX) -x c++ -E - >/dev/null 2>&1 || \
	  { echo 'make peers: DeepSpeed needs the header libaio.h: e.g. apt-get install libaio-dev' >&2; exit 1; }
	$(PY) -c 'import torch; print("torch==" + torch.__version__)' > .venv/.torch-installed
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -c .venv/.torch-installed -e '.[peers]'
	rm -f .venv/torch_extensions/*/lock  # of a build that was broken off: the next one would wait for it
	$(PY) -c 'from outgrow.perf.peers import load_deepspeed; load_deepspeed(0); \
	  from deepspeed.ops.op_builder import $(DEEPSPEED_PARTS); [part().load() for part in ($(DEEPSPEED_PARTS))]'

demo: setup
	$(PY) -m outgrow.runtime.cli demo

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --level error

test: setup
	$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target lint $(PARTS)

$(PARTS): setup
	$(PY) -m pytest $($@) $(if $(filter-out RAY,$@),$(RAY:%=--ignore=%))

format: setup
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

clean:
	rm -rf .venv build outgrow.egg-info runs
