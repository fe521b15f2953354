# The commands that a person and CI run. Everything installs into .venv; nothing else on the machine changes.
#   make demo    data, training, export, verification, verdicts: the whole chain in minutes
#   make test    the tests            make test-all   with the slow ones
#   make check   lint, types, format  make format     apply the format
#   make extension   the fused loss; the targets that train or test make it first
#   make fuzz    100,000 wrong pictures, bundles, shards and requests, and a report; fails at the first not refused
#   make bench   demo and benchmarks, their JSON and the README's tables; fails if a check of the loss is not met
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTENSION := $(VENV)/.extension
# Versions that the tests passed with; CONSTRAINTS= installs the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
EXTRAS := train,export,cpu,jpeg,serve,triton,score,ray,dev
# TensorRT-RTX has wheels for this platform only; elsewhere the ONNX files are made without an engine. Nor has the fuzzer
# wheels for others; elsewhere `make fuzz` makes its own mutants, without feedback.
ifeq ($(shell uname -sm),Linux x86_64)
EXTRAS := $(EXTRAS),rtx,fuzz
endif

.PHONY: demo test test-all check format fuzz bench install extension clean

install: $(INSTALLED) $(EXTENSION)
extension: $(EXTENSION)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[$(EXTRAS)]"
	touch $@

# Status 2 means that there is no C++ compiler: the build has said so, and training takes the reference loss.
$(EXTENSION): $(INSTALLED) cpp_ext/build.py $(wildcard cpp_ext/csrc/*)
	$(BIN)/python -m cpp_ext.build && touch $@ || [ $$? -eq 2 ]

# Half of the demo's fakes lie near its thresholds, so a budget of 0.5 points of flips would leave nothing in INT8.
demo: $(INSTALLED) $(EXTENSION)
	$(BIN)/python -m train.run --preset demo --out runs/demo --overwrite
	$(BIN)/python -m train.evaluate --run runs/demo --data data/demo
	$(BIN)/python -m export.trt --run runs/demo --model models/demo --fp32 --fp16 --int8 --budget-flips 2.5
	$(BIN)/python -m export.verify --model models/demo --run runs/demo
	$(BIN)/ntf predict --model models/demo data/demo/test/pixel_shuffle/*/*0[0-3].png
	$(BIN)/python -m export.summary --run runs/demo --model models/demo

# Two processes of one thread each finish sooner than one of two.
test: $(INSTALLED) $(EXTENSION)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not slow"

test-all: $(INSTALLED) $(EXTENSION)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

fuzz: $(INSTALLED)
	$(BIN)/python -m benchmarks.fuzz --inputs 100000

bench: demo
	mkdir -p build
	$(BIN)/python -m pytest benchmarks --ignore=benchmarks/bench_loss.py --benchmark-json=build/benchmarks.json
	$(BIN)/python -m benchmarks.tables build/benchmarks.json
	$(BIN)/python -m benchmarks.demo_table
	$(BIN)/python -m benchmarks.roofline
	$(BIN)/python -m benchmarks.bench_loading
	$(BIN)/python -m benchmarks.bench_runtime
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.bench_speed
	$(BIN)/python -m benchmarks.bench_loss
	$(BIN)/python -m benchmarks.serving

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -rf $(EXTENSION) cpp_ext/soft_contrastive.so cpp_ext/soft_contrastive.json cpp_ext/soft_contrastive.ptxas.log
