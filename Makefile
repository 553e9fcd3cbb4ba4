# Every target sets up what it needs: a virtual environment in .venv with the tested versions of constraints.txt.
#   make demo     fine-tune SmolLM2-135M over eight clients of ranks 64 to 4 (downloads about 100 MB once)
#   make test     all tests        make check   lint, types        make bench   benchmarks of this machine
#   make wheels   the sdist, a wheel with the compiled operators and one of Python alone, in dist/
#   make test-engines   flora on Flower, NVFlare, in .venv-engines (500 MB with Ray); ENGINE_TESTS='-m "not slow"': no processes
#   make bench-engines   what Flower and NVFlare add to a round
#   make gpu      on a GPU: the extension, the tests, compute-sanitizer, every benchmark (PART=merge: one part; PART=--help: all names)
#   make soak     50 kills, a fault at every write, 500 rounds with clients that die (20 minutes)
#   make fuzz     messages from strangers, by a coverage-guided fuzzer (FUZZ="-runs=200000"; a find is written to the folder)
#   make aot      compile the Triton kernels for sm_80 and sm_90 without a GPU    make docs   the documentation, in site/
# PYTHON=python3.12 chooses an interpreter; TORCH_INDEX=URL a package index for torch (the CPU builds of pytorch.org are smaller).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)

.PHONY: install check test test-engines soak fuzz demo wheels bench bench-engines gpu aot docs clean
install: $(STAMP)

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "flora needs Python 3.10 or newer; '$(PYTHON)' is not. Say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	  { echo "'$(PYTHON)' lacks its venv module; on Debian: apt install python3-venv"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet -c constraints.txt numpy setuptools wheel ninja pybind11
	@touch $@

$(STAMP): $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

check: install
	$(PY) -m ruff check .
	$(PY) -m mypy

test: install
	$(PY) -m pytest

soak: install
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/soak -m soak -s

# Flower pins versions that others do not want: an environment of its own, over what .venv has.
ENGINES := .venv-engines
$(ENGINES)/.installed: $(STAMP)
	test -x $(ENGINES)/bin/python || $(PY) -m venv $(ENGINES)
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir({!r})".format(sysconfig.get_path("purelib")))' > "$$($(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/over.pth"
	$(ENGINES)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt 'flwr[simulation]>=1.41,<1.43' 'nvflare>=2.9'
	@touch $@

test-engines: $(ENGINES)/.installed
	PYTHONPATH=. $(ENGINES)/bin/python -m pytest tests/engines $(ENGINE_TESTS)

demo: install
	$(VENV)/bin/flora run flora/demo.yaml --overwrite

# Both from the sdist, so that nothing lying in this tree gets into them.
wheels: install
	rm -rf dist
	FLORA_REQUIRE_NATIVE=1 $(PY) -m build --no-isolation
	FLORA_NATIVE=0 $(PIP) wheel --quiet --no-deps --no-build-isolation -w dist dist/flora-*.tar.gz

bench: install
	$(PY) -m benchmarks.bench_lora_linear
	$(PY) -m benchmarks.bench_lora_linear --allocator default --rows 2048 --ranks 16 --kinds one
	$(PY) -m benchmarks.bench_merge
	$(PY) -m benchmarks.bench_cohort
	$(PY) -m benchmarks.bench_round
	$(PY) -m benchmarks.bench_depth
	$(PY) -m benchmarks.bench_peft

bench-engines: $(ENGINES)/.installed
	PYTHONPATH=. $(ENGINES)/bin/python -m benchmarks.bench_engines

# Without the network: the interpreter that has torch with CUDA already, where there is one.
gpu:
	@if $(PYTHON) -c 'import sys, torch, triton, pytest; sys.exit(not torch.cuda.is_available())' 2> /dev/null; \
	then $(PYTHON) -m benchmarks.gpu $(PART); \
	else $(MAKE) --no-print-directory install && $(PY) -m benchmarks.gpu $(PART); fi

aot: install
	$(PY) dev/aot.py

FUZZ ?= -runs=200000
fuzz: install
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev,fuzz]'
	$(PY) tests/fuzz/fuzz_messages.py build/fuzz $(FUZZ)

docs: install
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev,docs]'
	$(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(ENGINES) build dist site *.egg-info flora/*.so
