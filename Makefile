# `make demo` and `make test` each do all the set-up they need; `make help` lists the rest.

# The active virtual or conda environment, otherwise .venv. conda's base environment is left alone.
ENVIRONMENT := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)),.venv)
setup := sh tools/setup_environment.sh "$(ENVIRONMENT)"
run := . build/environment.sh && python
# Tests hold a core each; every process of more takes a gigabyte.
# A test that waits for ever ends its process, with the stack of every thread, and not the whole run: ten times the slowest.
workers := -n auto --maxprocesses 4 --timeout 600 --timeout-method thread

cpp_sources = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
markdown = *.md benchmarks/*.md docs/*.md $(shell find tests -name '*.md')

.PHONY: help demo test integrations torture docs examples bench build lint lint-environment lint-cpp lint-python lint-types lint-markdown format cuda-check gpu-check clean FORCE

help:
	@echo "make demo        train three models with torch's loss and with nllx's, side by side"
	@echo "make test        run the tests (ARGS='-k word' is passed to pytest)"
	@echo "make integrations train models of transformers, Lightning, timm and others with torch's losses and nllx's"
	@echo "make torture     the long part of the attacks (tests/torture, tests/fuzz): two hours, 16 GiB of memory"
	@echo "make docs        build the documentation as a site, into build/docs"
	@echo "make build       build the extension in place"
	@echo "make examples    run every file of examples/"
	@echo "make bench       time nllx against torch (ARGS is passed on)"
	@echo "make lint        clang-format, ruff, mypy, and the width of Markdown"
	@echo "make format      let clang-format and ruff rewrite the sources, and wrap Markdown"
	@echo "make cuda-check  without a GPU: build for CUDA, check registers and spills, run the kernels' logic on the CPU"
	@echo "make gpu-check   with a GPU, ten minutes: build, kernel families, tests, compute-sanitizer, benchmarks; installs nothing"
	@echo "make clean       remove what was built; environments stay"

demo: build
	@$(setup) dev demo
	@$(run) -m demo $(ARGS)

test: build
	@$(run) -m pytest $(workers) $(ARGS)

integrations: build
	@$(setup) dev integrations
	@export NLLX_REQUIRE_INTEGRATIONS=1 && $(run) -m pytest -m 'not mutations' tests/integrations "tests/project/test_examples.py::test_example[hugging_face]" $(workers) $(ARGS)

torture: build
	@export NLLX_TORTURE=long && $(run) -m pytest tests/torture -s $(ARGS)
	@export HYPOTHESIS_PROFILE=search && bash tools/sanitize_extension.sh tests/torture/test_untrusted.py tests/semantics/test_properties.py
	@bash tools/fuzz.sh address 900
	@bash tools/fuzz.sh thread 300
	@if command -v clang++ >/dev/null; then bash tools/fuzz.sh guided 900; else echo "no clang++: libFuzzer left out"; fi
	@if command -v valgrind >/dev/null; then bash tools/fuzz.sh valgrind 300; else echo "no valgrind: left out"; fi
	@if command -v qemu-x86_64 >/dev/null; then bash tools/fuzz.sh emulated 120; else echo "no qemu-x86_64: left out"; fi

docs: build
	@$(setup) dev docs
	@$(run) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "The documentation is at build/docs/index.html"

examples: build
	@$(setup) dev examples
	@for example in $(filter-out examples/show.py,$(wildcard examples/*.py)); do \
		echo "== $$example" && . build/environment.sh && PYTHONPATH=. python $$example || exit 1; \
	done

bench: build
	@$(run) -m benchmarks --quick $(ARGS)

build: build/extension.stamp

# Runs every time and takes a fraction of a second; the file changes only when the extension must be rebuilt.
build/environment.sh: FORCE
	@$(setup) dev

# ninja knows which objects are out of date; --force leaves the decision to it. The stamp's time is that of the start, so
# that a file saved during the build is seen by the next one.
build/extension.stamp: build/environment.sh setup.py pyproject.toml $(shell find csrc -type f) $(if $(wildcard nllx/_C.*.so),,FORCE)
	@echo "Building the extension"
	@touch $@.started
	@$(run) setup.py --quiet build_ext --inplace --force
	@mv $@.started $@

lint: lint-cpp lint-python lint-types lint-markdown

lint-environment:
	@$(setup) dev lint

lint-cpp: lint-environment
	@. build/environment.sh && clang-format --dry-run -Werror $(cpp_sources)

lint-python: lint-environment
	@$(run) -m ruff check .
	@$(run) -m ruff format --check .

lint-types: lint-environment
	@$(run) -m mypy

lint-markdown: lint-environment
	@$(run) tools/wrap_markdown.py --check $(markdown)

format: lint-environment
	@. build/environment.sh && clang-format -i $(cpp_sources)
	@$(run) -m ruff check --fix .
	@$(run) -m ruff format .
	@$(run) tools/wrap_markdown.py $(markdown)

cuda-check: build
	@bash tools/cuda_check.sh build kernels on-cpu

gpu-check:
	bash tools/gpu_check.sh

clean:
	rm -rf build dist *.egg-info nllx/_C.*.so
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

FORCE:
