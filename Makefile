# make demo                     train a subject and see it: out/demo/   (SUBJECT=name or folder of your pictures, BASE=tiny-sd3)
# make test                     everything that is checked; the browser's part only where Chromium is installed
# make test-browser             the studio in a real browser: JupyterLab, Voila, old and new widgets (ONLY="lab live voila voila7")
# make test-colab               run the lessons (nbs/tutorials) in an environment of Colab's versions, constraints-colab.txt
# make readme / export          README.md from nbs/index.ipynb / lora_nb/*.py from the notebooks
# make docs                     the site, without Quarto: _docs/index.html (with Quarto: nbdev-docs)
# make live                     the page on which the embedded model draws in a browser: out/live (minutes; needs npm)
# make picture                  run the demo and put its picture and numbers on the index
# make results                  the runs behind nbs/results.ipynb: every method, every concept, three seeds (hours; resumes)
# make bench / bench-gpu        the measured comparisons / the same for transformers of SD3.5's shapes, where there is a GPU
# make gpu-check                a training step of SD3.5's shapes on this machine's GPU beside diffusers + peft, memory beside its estimate (10 minutes)
# make true-size                every base at its true size with random weights: train, save, plain diffusers reads it; and the simulated steps (hours)
# make turbo                    distil the few-step LoRAs again and measure them (half an hour)
# make test-versions            the core with other versions, e.g. VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt (CONSTRAINTS= : newest)
# make release-check            whether this tree can be released: version, changelog, tag, wheel, badges, lessons (TAG=v0.2.0)
# make quality                  the measured quality of the embedded bases (minutes)
# make base / base3             train tiny-sd / tiny-sd3 again, into out/base (hours on a CPU; needs the emoji font)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
PIP = $(BIN)/python -m pip install --disable-pip-version-check --no-compile -qq $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) $(INDEX)
META := $(CONSTRAINTS) settings.ini setup.py pyproject.toml
QUIET := LORA_NB_QUIET=1 HF_HUB_OFFLINE=1
COLAB ?= $(CURDIR)/.venv-colab

# what depends on the versions of torch, diffusers, transformers and peft: layers, files, families, one training of each kind
CORE := nbs/0 nbs/1 nbs/2 nbs/3 64_dreambooth 65_textual_inversion 66_pti 67_sd3 51_scheduling tests/test_ editable

.PHONY: demo test test-versions test-browser test-colab release-check bench bench-gpu gpu-check true-size results turbo quality base base3 live docs readme picture export clean

demo: $(VENV)/.run
	$(BIN)/python -m lora_nb.cli demo $(if $(SUBJECT),--subject "$(SUBJECT)") $(if $(BASE),--pretrained_model_name_or_path "$(BASE)")

test: $(VENV)/.dev
	$(BIN)/python tools/test.py $(ONLY)

test-versions: $(VENV)/.dev
	$(BIN)/python tools/test.py $(or $(ONLY),$(CORE))

release-check: $(VENV)/.dev
	$(BIN)/python tools/release.py $(TAG)

test-colab: $(COLAB)/.lessons
	cd nbs/tutorials && for nb in *.ipynb; do echo $$nb; $(QUIET) $(COLAB)/bin/jupyter-execute $$nb || exit 1; done

test-browser: $(VENV)/.dev
	$(BIN)/python tools/browser.py $(ONLY)

bench: $(VENV)/.dev
	cd nbs/benchmarks && $(QUIET) ../../$(BIN)/jupyter-nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=-1 *.ipynb
	$(BIN)/nbdev-clean --fname nbs/benchmarks

bench-gpu: $(VENV)/.dev
	$(BIN)/python tools/bench_gpu.py

gpu-check: $(VENV)/.dev
	$(BIN)/python tools/bench_gpu.py --check

true-size: $(VENV)/.dev
	$(BIN)/python tools/true_size.py $(if $(BASES),--bases $(BASES))
	LORA_NB_TRUE_SIZE=1 $(QUIET) $(BIN)/python -m pytest -q tests/test_memory.py

results: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tools/results.py

turbo: $(VENV)/.dev
	OMP_NUM_THREADS=2 $(BIN)/python tools/turbo.py train table

quality: $(VENV)/.dev
	$(BIN)/python -m lora_nb.zoo.quality tiny-sd --output nbs/zoo/logs/quality.json
	$(BIN)/python -m lora_nb.zoo.adherence tiny-sd tiny-sd3 --output nbs/zoo/logs/adherence.json

base: $(VENV)/.run
	$(BIN)/python -m lora_nb.zoo.unet $(or $(OUT),out/base)

base3: $(VENV)/.run
	$(BIN)/python -m lora_nb.zoo.mmdit $(or $(OUT),out/base)

live: $(VENV)/.dev
	$(BIN)/python -m lora_nb lora_live export --output_dir out/live

docs: $(VENV)/.dev
	grep -qs '"draw"' out/live/page.json || ! command -v npm >/dev/null || $(MAKE) live
	$(BIN)/python tools/docs.py

readme: $(VENV)/.dev
	$(QUIET) $(BIN)/nbdev-test nbs/index.ipynb --save && $(BIN)/nbdev-clean --fname nbs/index.ipynb
	$(BIN)/python tools/readme.py README.md

picture: demo
	cp out/demo/before_after.jpg out/demo/metrics.json nbs/images/
	$(BIN)/python tools/card.py

export: $(VENV)/.dev
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean
	$(BIN)/python tools/stubs.py

# INDEX="--extra-index-url ..." adds a package index, e.g. one with CPU builds of torch
INDEX ?=

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python $(META)
	$(PIP) -e . && touch $@

$(VENV)/.dev: $(BIN)/python $(META)
	$(PIP) -e '.[dev]' && touch $@ $(VENV)/.run

$(COLAB)/.lessons: constraints-colab.txt settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(COLAB)
	$(COLAB)/bin/python -m pip install --disable-pip-version-check --no-compile -qq -c constraints-colab.txt $(INDEX) -e . \
	    ipykernel nbclient peft
	touch $@

clean:
	rm -rf build dist out _docs _proc *.egg-info
