# Everything runs in a virtual environment that this file makes; PYTHON chooses the interpreter (3.11 or 3.12).
# The first interpreter that runs and fits (a version manager's stub may be on the PATH and not run).
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help install install-sdxl install-cloud install-interop install-view demo demo-fcmae demo-tagger demo-sdxl workshop test test-slow test-slurm test-view lint bench bench-gpu simd clean

help:  ## this list
	@sed -nE 's/^([a-z -]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "make %-26s %s\n", $$1, $$2}'

install: $(STAMP)  ## make .venv and install requirements.txt

$(STAMP): requirements.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
		{ echo "Python 3.11 or 3.12 is needed and none was found; run: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(STAMP)

SDXL := $(VENV)/.installed-sdxl
install-sdxl: $(SDXL)  ## add requirements-sdxl.txt, which finetune_sdxl.py needs, to .venv

$(SDXL): requirements-sdxl.txt $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-sdxl.txt
	touch $(SDXL)

CLOUD := $(VENV)/.installed-cloud
install-cloud: $(CLOUD)  ## add requirements-cloud.txt, which data.root=s3://... needs, to .venv

$(CLOUD): requirements-cloud.txt $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-cloud.txt
	touch $(CLOUD)

VIEW := $(VENV)/.installed-view
install-view: $(VIEW)  ## add requirements-view.txt, which view.py needs, to .venv

$(VIEW): requirements-view.txt $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-view.txt
	touch $(VIEW)

INTEROP := .venv-interop
install-interop: install  ## a tool that reads a tagger's exports, in an environment of its own, for tests/models/slow_wd14_tools.py
	test -x $(INTEROP)/bin/python || $(PY) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-interop.txt
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dghs-imgutils==0.19.0

demo: install  ## the best classifier of the embedded glyphs that four minutes give, its export and predictions; five minutes
	$(PY) workshop.py recipe=demo

demo-fcmae: install  ## what pretraining does: FCMAE and fine-tuning, and two starts from scratch, in equal minutes; ten minutes
	$(PY) workshop.py recipe=demo_fcmae

demo-tagger: install  ## a tagger, from pictures with words to a file that programs for taggers read; five minutes
	$(PY) workshop.py recipe=demo_tagger

TONES := collections/tones
demo-sdxl: install-sdxl  ## a tiny SDXL with and without zero terminal SNR, a LoRA, their exports; nine minutes
	test -d $(TONES) || $(PY) bench/tiny_sdxl.py tones $(TONES)
	$(PY) workshop.py recipe=demo_sdxl data.root=$(TONES)/shapes

SHAPES := collections/shapes
workshop: install-sdxl  ## images with few tags to a tagger and a tiny SDXL that draws tags, on one page; ten minutes
	test -d $(SHAPES) || $(PY) bench/tiny_sdxl.py pictures $(SHAPES)
	$(PY) workshop.py data.root=$(SHAPES)

# Idle threads sleep: on two cores, processes with spinning threads slow each other down.
test test-slow test-slurm test-view: export OMP_WAIT_POLICY := PASSIVE

test: install lint  ## lint, then all tests but the slow ones; MORE: arguments for pytest
	$(PY) -m pytest -n 2 --dist worksteal --ignore=tests/slurm --ignore=tests/viewer $(MORE)

test-slow: install  ## the slow tests, files named slow_*.py; MORE: arguments for pytest
	$(PY) -m pytest -n 2 --dist worksteal -o python_files='slow_*.py' --ignore=tests/viewer tests $(MORE)

# Where a program is missing, root installs its packages from Debian; one target at a time, under make -j.
APT = @command -v $(1) >/dev/null || test "$$(id -u)" != 0 || flock /var/cache/apt \
	sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends $(2)'

test-slurm: install  ## jobs on a real SLURM on this machine, as root: installs it from Debian where it is missing
	$(call APT,sbatch,slurm-wlm munge)
	$(PY) -m pytest -n 2 --dist loadfile -rs tests/slurm

test-view: install-view  ## the page of view.py in a browser: installs Debian's chromium, as root, where it is missing
	$(call APT,chromium,chromium fonts-dejavu-core)
	$(PY) -m pytest -rs tests/viewer

lint: install  ## ruff (rules and format), and the syntax nodes of each room against tests/budget.toml
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tests/budget.py

bench: install  ## side-by-side measurements; run it on an idle machine
	$(PY) bench/step_overhead.py

bench-gpu: install-sdxl  ## GPU tests and benches in eight minutes of one GPU; adds figures to docs/gpu.jsonl, and goes on from it
	$(PY) bench/gpu.py

# What pillow-simd is built with on Debian: without a header, its format is lost without a word.
HEADERS := gcc libjpeg-dev zlib1g-dev libwebp-dev libtiff-dev liblcms2-dev libopenjp2-7-dev libfreetype-dev
DECODERS := from PIL import __version__, features; print("Pillow", __version__, "reads", *filter(features.check, "jpg zlib webp avif jpg_2000 libtiff littlecms2".split()))

simd: install  ## pillow-simd in place of Pillow; it gains nothing here and reads no AVIF (docs/loading.md)
	@dpkg -s $(HEADERS) > /dev/null 2>&1 || test "$$(id -u)" = 0 || { echo "first: sudo apt-get install $(HEADERS)"; exit 1; }
	@dpkg -s $(HEADERS) > /dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(HEADERS); }
	$(PY) -m pip uninstall --quiet --yes pillow
	$(PY) -m pip install --quiet --no-deps --no-binary pillow-simd pillow-simd || $(PY) -m pip install --quiet -r requirements.txt
	@$(PY) -c '$(DECODERS)'

clean:  ## remove environment, outputs and drawn collections
	rm -rf $(VENV) $(INTEROP) outputs collections .pytest_cache .ruff_cache
