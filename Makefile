# Every target makes its environment first; a stamp keeps it from installing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := $(VENV)/$(BIN)/python
STAMP := $(VENV)/.installed
INSTRUCTOR := $(VENV)/.instructor
SITE_RUN := .venv-site/$(BIN)/python
SITE_STAMP := .venv-site/.installed
FIRST_LESSON := work/01_load_lora_adapter.ipynb

# Two at a time with a thread each: one more thread gains a model of this size little.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile
# What the notebooks write while they are tested stays out of a learner's own record.
NBMAKE := COURSE_RUNS="$(CURDIR)/runs/testing" $(PYTEST) --nbmake --nbmake-timeout=600

.PHONY: help setup lab test check lint types test-code test-notebooks test-reruns test-other-base notebooks experiments base-model lock newest site serve test-site badges colab classroom grade report feedback formgrader test-classroom

help:
	@echo "make lab         open your copies of the lessons, in work/, in JupyterLab (NO_BROWSER=1 serves without a browser;"
	@echo "                 UPDATE=01 takes a newer edition of that lesson, and keeps your copy beside it)"
	@echo "make test        all tests: code, then every lesson as learners get it, and solved with its hidden tests"
	@echo "make check       lint, types, and the tests that run no notebook: what every commit passes"
	@echo "make lint        form and lint of the code (ruff)"
	@echo "make types       types of adapter_checks (mypy)"
	@echo "make notebooks   lessons/*.py to notebooks/ and solutions/ (ONLY=01 for one lesson); those whose code"
	@echo "                 has not changed keep their outputs (FORCE=1 runs them all the same)"
	@echo "make experiments the sweeps behind the lessons' claims, as far as results are missing (ONLY=rank for one)"
	@echo "make test-reruns each cell of each lesson twice and with an interrupt (more than twice their time)"
	@echo "make test-other-base  all lessons on a small random model of another architecture (about their time)"
	@echo "make base-model  remake models/ and data/ from nothing (about three hours)"
	@echo "make lock        constraints.txt anew after a change in a requirements file (OPTIONS=--upgrade for the newest)"
	@echo "make newest      the tests on the newest libraries, in an environment of their own, and what changed"
	@echo "make site        the course as web pages, in runs/site/html, in an environment of its own without PyTorch"
	@echo "make serve       the same, at port 8000 of this machine"
	@echo "make test-site   the same, then its links, its contents, and pages in Chromium if there is one"
	@echo "make badges      links to Colab, Binder and Codespaces at the head of README (GITHUB_REPOSITORY=owner/name)"
	@echo "make colab       the lessons for Colab, in runs/colab (GITHUB_REPOSITORY=owner/name)"
	@echo "For instructors (classroom/README.md), with nbgrader, which the first of these installs:"
	@echo "make classroom   stage the lessons as assignments, and pack the hand-out (ONLY=01 for one lesson)"
	@echo "make grade       SUBMISSIONS=folder or zip, to classroom/staging/scores.csv and report.md (OPTIONS=...)"
	@echo "make report      both anew, after grading by hand"
	@echo "make feedback    a page for each submission, to classroom/staging/feedback/"
	@echo "make formgrader  open nbgrader's formgrader, to grade by hand (NO_BROWSER=1 as above)"
	@echo "make test-classroom  the tests of all that"

# The stamp holds the folder it was made for: the package is installed by its path,
# so a checkout that was moved must be installed again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): requirements.txt requirements-beyond-text.txt constraints.txt pyproject.toml adapter_checks/pyproject.toml
	@"$(PYTHON)" tools/check_python.py
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) tools/install.py
	@printf '%s' "$(CURDIR)" > $(STAMP)

setup: $(STAMP)

# The site needs no PyTorch, so its workflow installs in a minute.
$(SITE_STAMP): requirements-site.txt constraints.txt
	@"$(PYTHON)" tools/check_python.py
	"$(PYTHON)" -m venv .venv-site
	$(SITE_RUN) -m pip install --disable-pip-version-check -r requirements-site.txt
	@touch $(SITE_STAMP)

# What an instructor needs beside the course, in the same environment.
$(INSTRUCTOR): $(STAMP) requirements-instructor.txt
	$(RUN) -m pip install --disable-pip-version-check -r requirements-instructor.txt
	@touch $(INSTRUCTOR)

# JupyterLab's own defaults hold: a token, and localhost only. It refuses to start
# for root, who has only that account in most containers, so root is let in here.
# What the environment lacks is said and stops nobody: a lesson may well run all the same.
lab: $(STAMP)
	@$(RUN) -m course_utils.environment || true
	@$(RUN) -m tools.lab $(UPDATE)
	$(RUN) -m jupyterlab --LabApp.default_url=/lab/tree/$(FIRST_LESSON) \
		$(if $(NO_BROWSER),--no-browser) $(if $(filter 0,$(shell id -u)),--allow-root)

test: check test-notebooks

check: lint types test-code

lint: $(STAMP)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

types: $(STAMP)
	$(RUN) -m mypy --config-file adapter_checks/pyproject.toml adapter_checks/src

test-code: $(STAMP)
	$(PYTEST)

test-notebooks: $(STAMP)
	$(NBMAKE) notebooks
# The instructor's edition is the solved one with the hidden tests: a test compares them, and so one run does for both.
	$(RUN) -m tools.build classroom
	COURSE_STRICT=1 $(NBMAKE) classroom/staging/source

# Each cell interrupted, and run again. One lesson at a time, since an interrupt comes at half of a cell's time. It takes more than
# twice the time of all lessons, so it is no part of `make test`.
test-reruns: $(STAMP)
	TEST_RERUNS=1 $(RUN) -m pytest tests/test_reruns.py

# That no lesson asks of another base what only the shipped model does. It takes about the time of all lessons.
test-other-base: $(STAMP)
	TEST_OTHER_BASE=1 $(RUN) -m pytest tests/test_other_base.py

notebooks: $(STAMP)
	$(RUN) -m tools.build notebooks $(ONLY) $(if $(FORCE),--force)

classroom: $(INSTRUCTOR)
	$(RUN) -m classroom stage $(ONLY)

grade: $(INSTRUCTOR)
	$(RUN) -m classroom grade "$(SUBMISSIONS)" $(OPTIONS)

report feedback: $(INSTRUCTOR)
	$(RUN) -m classroom $@

formgrader: $(INSTRUCTOR)
	cd classroom && ../$(RUN) -m jupyterlab --LabApp.default_url=/formgrader/manage_assignments \
		$(if $(NO_BROWSER),--no-browser) $(if $(filter 0,$(shell id -u)),--allow-root)

# TEST_CLASSROOM: nothing is skipped, neither what is slow nor what misses nbgrader.
test-classroom: $(INSTRUCTOR)
	TEST_CLASSROOM=1 $(PYTEST) tests/test_classroom.py

# glibc gives large blocks back to the system after each use; kept, they save a tenth to a sixth of a step's time.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=500000000

experiments: $(STAMP)
	$(KEEP_MEMORY) $(RUN) -m experiments.run $(ONLY)

base-model: $(STAMP)
	$(KEEP_MEMORY) $(RUN) -m pretraining.run

# One resolution for every system and Python. "-c constraints.txt" itself is left out: it would allow no change.
lock: $(STAMP)
	cat requirements.txt requirements-instructor.txt requirements-site.txt | grep -v '^-[cr]' | UV_CUSTOM_COMPILE_COMMAND="make lock" \
		$(RUN) -m uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
		--no-emit-package course-utils --no-emit-package adapter-checks $(OPTIONS) --output-file constraints.txt -

newest:
	"$(PYTHON)" -m tools.newest

# A clean build: the generator's cache knows nothing of its own new version.
site: $(SITE_STAMP)
	$(SITE_RUN) -m tools.pages runs/site
	$(SITE_RUN) -m zensical build --clean --strict -f runs/site/mkdocs.yml

badges: $(SITE_STAMP)
	$(SITE_RUN) -m tools.online readme

colab: $(SITE_STAMP)
	$(SITE_RUN) -m tools.online colab runs/colab

serve: site
	cd runs/site/html && ../../../$(SITE_RUN) -m http.server --bind localhost 8000

test-site: site
	$(SITE_RUN) -m pytest docs/site
