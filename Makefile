# Two commands need nothing but Python and make on a fresh machine:  make demo   make test
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2

BIN := $(VENV)/bin
# The tests' workers are processes: one thread each keeps them from fighting for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# The first import of a library writes its bytecode. Without it, each process would take 20 s longer to import them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-interpreted test-others test-fast static lint docs package clean

demo: $(VENV)/.installed
	$(BIN)/normbt train

# Side by side: the shorter half is one process more than there are workers, and fills the gaps that they leave.
test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory --jobs=2 test-interpreted test-others

# What it prints is kept until its end, not to be mixed with what the others print.
test-interpreted: $(VENV)/.installed-dev
	mkdir -p build
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels > build/test-interpreted.log 2>&1; status=$$?; \
	cat build/test-interpreted.log; exit $$status

# One worker takes a whole file, since its tests share what they train; distributed/ and kernels/, the longest, come first.
test-others: $(VENV)/.installed-dev
	$(PYTEST) -n $(WORKERS) --dist loadscope --no-loadscope-reorder tests

# Between two edits: without the kernels' interpreter, and without what starts processes, compiles or trains for seconds.
test-fast: $(VENV)/.installed-dev
	$(PYTEST) -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "not slow" tests

# Some entries and one target, in a minute or two; all of them take a quarter of an hour: python -m bench static --check
static: $(VENV)/.installed-dev
	$(BIN)/python -m bench static --quick --check
	$(BIN)/python -m bench host --check --rounds 1

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

# The package as a stranger gets it, the wheel made from the sdist, in an environment of its own. $(VENV), which was
# installed from the same list, lends the dependencies: they are checked against the wheel's list and not downloaded twice.
package: $(VENV)/.installed-dev
	rm -rf build/package
	$(BIN)/python -m build --outdir build/package
	$(PYTHON) -m venv build/package/venv
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > "$$(echo build/package/venv/lib/python*/site-packages)/lent.pth"
	build/package/venv/bin/python -m pip install --quiet "$$(echo build/package/*.whl)[train]"
	cd build/package && venv/bin/normbt train --loss normbt --max-steps 10 --disable-tqdm True
	cd build/package && venv/bin/python -c "import normbt_kernels as n; assert 'build/package' in n.__file__, n.__file__"
	build/package/venv/bin/python -c "from importlib.metadata import metadata; import re; \
	  text = metadata('normbt-kernels')['Description']; dead = re.findall(r'\]\((?!https?://|#).*', text); assert text and not dead, dead"

clean:
	rm -rf $(VENV) build

$(VENV)/bin/python:
	@echo "Sets up $(VENV): PyTorch, the trainers and what they need; 2.5 GB on disk, or 5.5 GB where PyTorch comes with CUDA."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# One call for everything, with torch pinned to the version that the tests ran with. Bytecode is made where it is imported:
# for all 2.5 GB it takes a minute and a half.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile "$(TORCH)" --editable

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(INSTALL) ".[train,plot]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	$(INSTALL) ".[dev]"
	touch $@

# With all that the tests need, so that CI installs once.
$(VENV)/.installed-docs: $(VENV)/bin/python pyproject.toml
	$(INSTALL) ".[dev,docs]"
	touch $(VENV)/.installed-dev $@
