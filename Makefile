# Two commands set everything up: `make run` and `make test`. PYTHON=python3.12 make run uses another Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: run test lab site export clean-notebooks readme help
.DEFAULT_GOAL := help

help:
	@echo "make run    install, execute the chapter llm/taid, show where its notebook and figures are"
	@echo "make test   install, run all tests"
	@echo "make lab    open JupyterLab"
	@echo "make site   build the site (needs Quarto)"
	@echo "make export nbs/ -> kdbook/ and README.md, then clean the notebooks"

$(READY): settings.ini constraints.txt setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: $(READY)
	$(BIN)/kdbook run llm/taid

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

site: $(READY)
	$(BIN)/kdbook site --run --jobs 2

lab: $(READY)
	$(BIN)/jupyter lab nbs

export: $(READY)
	$(BIN)/nbdev_export
	$(BIN)/python -c "from kdbook.book.chapters import readme; open('README.md', 'w', encoding='utf-8').write(readme())"
	$(MAKE) clean-notebooks

clean-notebooks: $(READY)
	$(BIN)/jupyter nbconvert --log-level=ERROR --ClearOutputPreprocessor.enabled=True --inplace nbs/*.ipynb nbs/*/*.ipynb
	$(BIN)/nbdev_clean
