# Everything runs in a virtual environment that this file makes; PYTHON chooses the interpreter of a new one.
# The first interpreter that runs and fits (a version manager's stub may be on the PATH and not run).
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
EXTRAS := $(patsubst requirements-%.txt,$(STAMP)-%,$(filter-out %-interop.txt,$(wildcard requirements-*.txt)))
DEV := $(STAMP)-dev

.PHONY: help install install-sdxl install-formats install-cloud install-interop install-view demo demo-fcmae demo-tagger demo-sdxl workshop test test-slow test-slurm test-view test-python screens lint bench bench-gpu simd clean

help:  ## this list
	@awk -F ':[^#]*## ' '/^[a-z -]+:[^#]*## / {printf "make %-26s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# All that was and is asked for is named in each call, so that pip keeps versions that fit together.
ASKED = $(filter $(EXTRAS),$(sort $@ $(MAKECMDGOALS:install-%=$(STAMP)-%) $(shell ls $(STAMP)-* 2>/dev/null)))
define PIP
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt $(ASKED:$(STAMP)-%=-r requirements-%.txt) || \
		{ echo "pip failed: its lines above say why. For no network, a proxy or a full disk: docs/install.md"; exit 1; }
	@touch $@ $(ASKED)
endef

install: $(STAMP)  ## make .venv and install requirements.txt

$(STAMP): requirements.txt
	@test -x $(PY) || $(PYTHON) -c '$(FITS)' 2> /dev/null || \
		{ echo "Python 3.11 to 3.14 is needed, found $(or $(PYTHON),none); name one: make install PYTHON=/path/to/python3"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || true
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PY) -m ensurepip > /dev/null 2>&1 || \
		{ echo "$(VENV) has no pip (see above); on Debian and Ubuntu: sudo apt install python3-venv; then make install again"; exit 1; }
	@echo "$(VENV): installing requirements.txt; PyTorch with CUDA is most of 3 GB to download, 7 GB on the disk"
	$(PIP)

$(EXTRAS): $(STAMP)-%: requirements-%.txt $(STAMP)
	@echo "$(VENV): installing requirements-$*.txt"
	$(PIP)

install-sdxl: $(STAMP)-sdxl  ## add requirements-sdxl.txt, which finetune_sdxl.py needs, to .venv
install-formats: $(STAMP)-formats  ## add requirements-formats.txt to .venv: HEIC, JPEG XL, DICOM, and the previews in raw photographs
install-cloud: $(STAMP)-cloud  ## add requirements-cloud.txt, which data.root and loop.checkpoint_mirror of s3://... need, to .venv
install-view: $(STAMP)-view  ## add requirements-view.txt, which view.py needs, to .venv

INTEROP := .venv-interop
install-interop: install  ## a tool that reads a tagger's exports, in an environment of its own, for tests/models/slow_wd14_tools.py
	test -x $(INTEROP)/bin/python || $(PY) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-interop.txt
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dghs-imgutils==0.19.0

# Each is a script of commands, in the environment: one command a line, printed before it runs.
DEMO := PATH="$(abspath $(VENV))/bin:$$PATH" sh demos
demo: install  ## the best classifier of the embedded glyphs that four minutes give, its export and predictions; five minutes
	$(DEMO)/glyphs.sh

demo-fcmae: install  ## what pretraining does: FCMAE and fine-tuning, and two starts from scratch, in equal minutes; ten minutes
	$(DEMO)/fcmae.sh

demo-tagger: install  ## a tagger, from pictures with words to a file that programs for taggers read; five minutes
	$(DEMO)/tagger.sh

TONES := collections/tones
demo-sdxl: install-sdxl  ## a tiny SDXL with and without zero terminal SNR, a LoRA, their exports; nine minutes
	test -d $(TONES) || $(PY) bench/tiny_sdxl.py tones $(TONES)
	$(DEMO)/sdxl.sh $(TONES)/shapes

SHAPES := collections/shapes
workshop: install-sdxl  ## images with few tags to a tagger and a tiny SDXL that draws tags; ten minutes
	test -d $(SHAPES) || $(PY) bench/tiny_sdxl.py pictures $(SHAPES)
	$(DEMO)/images.sh $(SHAPES)

# Idle threads sleep: on two cores, processes with spinning threads slow each other down.
test test-slow test-slurm test-view: export OMP_WAIT_POLICY := PASSIVE

test: $(DEV) lint  ## lint, then all tests but the slow ones; MORE: arguments for pytest
	$(PY) -m pytest -n 2 --dist worksteal --ignore=tests/slurm --ignore=tests/viewer $(MORE)

OTHER := .venv-python
test-python:  ## lint and test on another Python, in an environment of its own: make test-python PYTHON=python3.14
	@test "$$($(OTHER)/bin/python -V 2>&1)" = "$$($(PYTHON) -V 2>&1)" || rm -rf $(OTHER)
	$(MAKE) test VENV=$(OTHER) PYTHON=$(PYTHON)

test-slow: $(DEV)  ## the slow tests, files named slow_*.py; MORE: arguments for pytest
	$(PY) -m pytest -n 2 --dist worksteal --timeout=1500 $$(find tests -name 'slow_*.py') $(MORE)

# Where a program is missing, root installs its packages from Debian; one target at a time, under make -j.
APT = @command -v $(1) >/dev/null || test "$$(id -u)" != 0 || flock /var/cache/apt \
	sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends $(2)'

test-slurm: $(DEV)  ## jobs on a real SLURM on this machine, as root: installs it from Debian where it is missing
	$(call APT,sbatch,slurm-wlm munge)
	$(PY) -m pytest -n 2 --dist loadfile --timeout=1500 -rs tests/slurm

# ONNX Runtime for browsers, which export.py format=page would fetch itself; its version is in models/interop/page.py.
# Without npm's registry, its test is skipped, and says so.
PAGE := outputs/cache/onnxruntime-web@1.30.0
WASM := ort-wasm-simd-threaded.wasm
test-view: install-view $(DEV)  ## pages in a browser: installs Debian's chromium and npm, as root, where they are missing
	$(call APT,chromium,chromium fonts-dejavu-core)
	-$(call APT,npm,npm)
	-test -f $(PAGE)/$(WASM) || { mkdir -p $(PAGE) && npm pack --silent $(notdir $(PAGE)) && \
		tar -xzf onnxruntime-web-*.tgz -C $(PAGE) --strip-components=2 $(addprefix package/dist/,ort.wasm.bundle.min.mjs $(WASM)) && \
		rm onnxruntime-web-*.tgz; }
	$(PY) -m pytest -rs tests/viewer

SCREENS := label label_phone viewer_run_light viewer_compare_dark
screens: install-view install-sdxl $(DEV)  ## the pictures of the page in docs/ anew; test-view draws them, too
	$(PY) -m pytest tests/viewer/test_walks.py
	cp $(SCREENS:%=outputs/screens/%.png) docs/images/

lint: $(DEV)  ## ruff (rules and format), and the syntax nodes of each room against tests/budget.toml
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tests/budget.py

bench: install  ## side-by-side measurements; run it on an idle machine
	$(PY) bench/step_overhead.py
	OMP_NUM_THREADS=1 $(PY) -m bench.start repeats=3

bench-gpu: install-sdxl $(DEV)  ## GPU tests and benches in eight minutes of one GPU; adds figures to docs/gpu.jsonl, and goes on from it
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
	rm -rf $(VENV) $(INTEROP) $(OTHER) outputs collections .pytest_cache .ruff_cache
