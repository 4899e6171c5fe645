# The commands of this checkout. Everything is installed into .venv and nowhere else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Only its model file is read; what it says it needs would bring a second OpenCV.
SECOND_OCR := --no-deps --ignore-requires-python rapidocr-onnxruntime

.DEFAULT_GOAL := help
.PHONY: help demo test check install clean

help: ## list these targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(READY) ## set up, train a little, fill holes, write a page: demo/report.html
	$(BIN)/controlfill demo --output_dir demo

test: $(READY) ## set up and run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(READY) ## format, lint, types, import layers, budgets
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/budget.py

install: $(READY) ## set up the environment in .venv

# torch first and by itself: other packages would pull another build of it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(SECOND_OCR)
	touch $(READY)

clean: ## remove the environment and all results in this checkout
	rm -rf .venv demo outputs
