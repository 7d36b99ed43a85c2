PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-slow test-gpu docs fmt figures screens example benchmarks clean

demo: $(STAMP)  ## take the trained demo checkpoint through the whole chain
	$(BIN)/replk demo
	if $(BIN)/python -c "import importlib.util as u, sys; sys.exit(not u.find_spec('tensorrt_rtx'))"; then \
	  $(BIN)/replk build --backend trt-rtx; fi

test: $(STAMP)  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(STAMP)  ## full-size checkpoints through the chain, many minutes
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)  ## our kernels on an NVIDIA GPU, two minutes; nothing is skipped there
	$(BIN)/python -m pytest -m gpu

docs: $(STAMP)  ## the site, in build/docs/index.html; any doubt is an error
	$(BIN)/python -m sphinx -q -W --keep-going -n docs build/docs

fmt: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

figures: $(STAMP)  ## redraw the pictures of the documentation
	$(BIN)/python docs/figures/fusion.py
	$(BIN)/python docs/figures/lowering.py
	$(BIN)/python docs/figures/throughput.py

screens: $(STAMP)  ## run every command again for the pictures in docs/commands.md; minutes
	$(BIN)/python docs/screens.py

example: $(STAMP)  ## make the report in docs/examples again; wants a quiet machine
	$(BIN)/replk deploy models/digits.pth --data models/digits-test.npz --precision fp32 --precision fp16 \
	  --backend ort-cpu --backend openvino --backend torch --bench-batch 1 --bench-batch 4 --bench-batch 16 --max-seconds 6
	$(BIN)/replk profile --backend torch --json replk-out/$$(cat replk-out/latest)/results/profile.json
	$(BIN)/replk report --html docs/examples/digits.html --markdown docs/examples/digits.md

benchmarks: $(STAMP)  ## measure again what docs/benchmarks holds; needs a quiet machine
	$(BIN)/python benchmarks/commands.py
	$(BIN)/python benchmarks/layout.py
	$(BIN)/python benchmarks/errors.py

clean:
	rm -rf .venv replk-out build dist *.egg-info

# torch and whatever needs it must be resolved in one call under the constraints
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'replk needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $(STAMP)
