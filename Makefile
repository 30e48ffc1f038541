# make demo                     train a subject and see it: out/demo/   (SUBJECT=name or folder of your pictures, BASE=tiny-sd3)
# make test                     everything that is checked; the browser's part only where Chromium is installed
# make test-browser             the studio in a real browser: JupyterLab, Voila, old and new widgets (ONLY="lab voila voila7")
# make test-colab               run the lessons (nbs/tutorials) in an environment of Colab's versions, constraints-colab.txt
# make readme / export          README.md from nbs/index.ipynb / lora_nb/*.py from the notebooks
# make docs                     the site, without Quarto: _docs/index.html (with Quarto: nbdev-docs)
# make picture                  run the demo and put its picture and numbers on the index
# make results                  the runs behind nbs/results.ipynb: every method, every concept, three seeds (hours; resumes)
# make bench / bench-gpu        the measured comparisons / the same for transformers of SD3.5's shapes, where there is a GPU
# make turbo                    distil the few-step LoRAs again and measure them (half an hour)
# make quality                  the measured quality of the embedded bases (minutes)
# make base / base3             train tiny-sd / tiny-sd3 again, into out/base (hours on a CPU; needs the emoji font)
PYTHON ?= python3
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --no-compile -qq -c constraints.txt $(INDEX)
META := constraints.txt settings.ini setup.py pyproject.toml
QUIET := LORA_NB_QUIET=1 HF_HUB_OFFLINE=1
COLAB ?= $(CURDIR)/.venv-colab

.PHONY: demo test test-browser test-colab bench bench-gpu results turbo quality base base3 docs readme picture export clean

demo: .venv/.run
	$(BIN)/python -m lora_nb.cli demo $(if $(SUBJECT),--subject "$(SUBJECT)") $(if $(BASE),--pretrained_model_name_or_path "$(BASE)")

test: .venv/.dev
	$(BIN)/python tools/test.py $(ONLY)

test-colab: $(COLAB)/.lessons
	cd nbs/tutorials && for nb in *.ipynb; do echo $$nb; $(QUIET) $(COLAB)/bin/jupyter-execute $$nb || exit 1; done

test-browser: .venv/.dev
	$(BIN)/python tools/browser.py $(ONLY)

bench: .venv/.dev
	cd nbs/benchmarks && $(QUIET) ../../$(BIN)/jupyter-nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=-1 *.ipynb
	$(BIN)/nbdev-clean --fname nbs/benchmarks

bench-gpu: .venv/.dev
	$(BIN)/python tools/bench_gpu.py

results: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tools/results.py

turbo: .venv/.dev
	OMP_NUM_THREADS=2 $(BIN)/python tools/turbo.py train table

quality: .venv/.dev
	$(BIN)/python -m lora_nb.zoo.quality tiny-sd --output nbs/zoo/logs/quality.json
	$(BIN)/python -m lora_nb.zoo.adherence tiny-sd tiny-sd3 --output nbs/zoo/logs/adherence.json

base: .venv/.run
	$(BIN)/python -m lora_nb.zoo.unet $(or $(OUT),out/base)

base3: .venv/.run
	$(BIN)/python -m lora_nb.zoo.mmdit $(or $(OUT),out/base)

docs: .venv/.dev
	$(BIN)/python tools/docs.py

readme: .venv/.dev
	$(QUIET) $(BIN)/nbdev-test nbs/index.ipynb --save && $(BIN)/nbdev-clean --fname nbs/index.ipynb
	$(BIN)/python tools/readme.py README.md

picture: demo
	cp out/demo/before_after.jpg out/demo/metrics.json nbs/images/
	$(BIN)/python tools/card.py

export: .venv/.dev
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean
	$(BIN)/python tools/stubs.py

# INDEX="--extra-index-url ..." adds a package index, e.g. one with CPU builds of torch
INDEX ?=

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python $(META)
	$(PIP) -e . && touch $@

.venv/.dev: .venv/bin/python $(META)
	$(PIP) -e '.[dev]' && touch $@ .venv/.run

$(COLAB)/.lessons: constraints-colab.txt settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(COLAB)
	$(COLAB)/bin/python -m pip install --disable-pip-version-check --no-compile -qq -c constraints-colab.txt $(INDEX) -e . \
	    ipykernel nbclient peft
	touch $@

clean:
	rm -rf build dist out _docs _proc *.egg-info
