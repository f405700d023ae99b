# `make demo` walks the whole road on a CPU, `make test` runs the tests, `make docs` builds the documentation site into
# build/docs. Each sets up .venv first.
#
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#
# PIP_ARGS goes to pip; README.md says when PyTorch's CPU index is wanted.

PYTHON ?= python3
PIP_ARGS ?=

.PHONY: demo test docs setup clean

setup: .venv/ready

demo: .venv/ready
	.venv/bin/python launch/demo.py configs/sample/demo.yaml

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo 'build/docs/index.html; to serve it: python -m http.server --directory build/docs'

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and \
		"Python 3.11 or 3.12 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		--constraint constraints.txt --editable '.[export,finetune,data,dask,docs,dev]'
	touch $@

clean:
	rm -rf .venv runs
