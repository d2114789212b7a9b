# The two commands of a newcomer: `make demo` and `make test`. Both create .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-models test-trainers lint docs format clean bench bench-gpu bench-compare wheel release-check minimum newest

demo: $(VENV)/.installed
	$(BIN)/sharpkit figure3 --preset mini --panels right --workers 2 --out demo-output
	$(BIN)/sharpkit plot demo-output/scores --out demo-output/predictive_power.png

# Three processes of one thread each, for some tests wait more than they compute; a file's tests stay
# together, with what they share. The order is that of the files, so that small ones come last.
PARALLEL := -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The core, some 15 minutes on 2 idle cores.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PARALLEL) -m 'not slow' $(TESTS)

# What takes long: statistics over many zoos, training again, whole commands.
test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PARALLEL) -m slow $(TESTS)

# The measurements on networks of torchvision, timm, transformers and peft: tests/models.
test-models: .venv-models/.installed
	.venv-models/bin/python -m pytest -n 2 --dist worksteal tests/models

# SAM and the tracker inside Lightning, Accelerate and the Trainer of Hugging Face, rows in TensorBoard,
# wandb and MLflow: tests/trainers.
test-trainers: .venv-trainers/.installed
	OMP_NUM_THREADS=1 .venv-trainers/bin/python -m pytest -n 2 --dist loadfile tests/trainers

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict sharpkit

# 12 parts, so that the pages with code are not all in one of them
docs: $(VENV)/.installed
	rm -rf docs/api/generated
	$(BIN)/python -m sphinx -q -W --keep-going -E -j 12 -b html docs docs/_build/html

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every speed claim beside the peers: about an hour and a half on 2 idle cores; QUICK=1 for a few minutes,
# ONLY=sam to run again what has that text in its name.
bench: .venv-bench/.installed
	.venv-bench/bin/python benchmarks/run_all.py $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

# The figures of a GPU, at most six minutes, with the Python that has the CUDA build of torch.
bench-gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu.py $(if $(QUICK),--quick) \
		$(if $(ONLY),--only "$(ONLY)") $(if $(DEVICE),--device $(DEVICE))

# BASE=<commit> [HEAD=<commit>]: fails if a case of the regression set is past 15 % slower.
HEAD ?= HEAD
bench-compare: $(VENV)/.installed
	$(BIN)/python benchmarks/compare.py $(BASE) $(if $(BASE),$(HEAD))

# Builds dist/, and runs the demo from the wheel in an environment outside the tree.
wheel: $(VENV)/.installed
	.ci/wheel

# Before a release: versions agree, and sdist and wheel work alone on the oldest and newest Python.
release-check: $(VENV)/.installed
	.ci/release-check

# The tests with the oldest torch and the lower bounds of pyproject.toml. On Linux the index gives
# the CUDA build of that torch: some 3 GB to download, 6 GB on disk.
minimum: .venv-minimum/.installed
	.venv-minimum/bin/python -m pytest $(TESTS)

# The tests with the newest torch of the index, the rest as in constraints.txt. As large as minimum.
newest: .venv-newest/.installed
	OMP_NUM_THREADS=1 .venv-newest/bin/python $(PARALLEL) $(TESTS)

.venv-bench/.installed: pyproject.toml constraints.txt benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt \
		-r benchmarks/requirements-peers.txt -e .
	touch $@

.venv-minimum/.installed: pyproject.toml .ci/lower_bounds.py
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python .ci/lower_bounds.py > .venv-minimum/requirements.txt
	.venv-minimum/bin/python -m pip install --quiet -r .venv-minimum/requirements.txt -e '.[test]'
	touch $@

# always the newest, so nothing here says which: `rm -r .venv-newest` looks again
.venv-newest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	grep -v '^torch==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade -c .venv-newest/constraints.txt torch
	.venv-newest/bin/python -m pip install --quiet -c .venv-newest/constraints.txt \
		-e '.[report,test,tensorboard]'
	touch $@

# torchvision comes without its requirements, so that it never brings another build of torch.
.venv-models/.installed: pyproject.toml constraints.txt constraints-models.txt
	$(PYTHON) -m venv .venv-models
	.venv-models/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-models/bin/python -m pip install --quiet --no-deps -c constraints-models.txt torchvision
	.venv-models/bin/python -m pip install --quiet -c constraints.txt -c constraints-models.txt \
		-e '.[test,models]'
	touch $@

.venv-trainers/.installed: pyproject.toml constraints.txt constraints-models.txt constraints-trainers.txt \
		constraints-loggers.txt
	$(PYTHON) -m venv .venv-trainers
	.venv-trainers/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-trainers/bin/python -m pip install --quiet -c constraints.txt -c constraints-models.txt \
		-c constraints-trainers.txt -e '.[test,trainers,tensorboard]'
	.venv-trainers/bin/python -m pip install --quiet -c constraints-models.txt \
		-c constraints-trainers.txt -c constraints-loggers.txt wandb mlflow-skinny
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-bench .venv-minimum .venv-models .venv-newest .venv-trainers dist demo-output .pytest_cache .mypy_cache .ruff_cache docs/_build docs/api/generated
