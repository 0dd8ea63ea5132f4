# make demo   draw a picture with the embedded model        make check  lint, then the tests
# make test   the whole test suite                          make bench  time and memory of what this project promises
# make demo-lora   teach the embedded model something new, and show before and after: nine minutes on two CPU cores
# make embedded   the model that ships, from nothing: about four hours on two CPU cores, in pieces as you like
# make torture   hundreds of kills, cuts and full disks: half an hour
# Each makes .venv and installs what it needs. PYTHON=python3.12 chooses another interpreter (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin
DEMO_PROMPT := a red circle left of a blue square on a white background

.PHONY: demo demo-lora embedded test check bench torture clean

demo: .venv/installed
	$(BIN)/python main.py "$(DEMO_PROMPT)" --model embedded --seed 87

DEMO_LORA := outputs/demo-lora
DEMO_LORA_DRAW := $(BIN)/python main.py --prompts configs/train/demo-prompts.txt --model embedded

demo-lora: .venv/installed
	rm -rf $(DEMO_LORA)
	$(BIN)/python -m src.example_subject --draw $(DEMO_LORA)/raw
	$(BIN)/python -m src.prepare_dataset --src $(DEMO_LORA)/raw --dst $(DEMO_LORA)/train --size 128 --trigger gelato
	$(DEMO_LORA_DRAW) --output $(DEMO_LORA)/before
	$(BIN)/python -m src.train_lora --config configs/train/demo.yaml --dataset_dir $(DEMO_LORA)/train --output_dir $(DEMO_LORA)/lora
	$(DEMO_LORA_DRAW) --lora $(DEMO_LORA)/lora/final --output $(DEMO_LORA)/after
	$(BIN)/python -m src.example_subject --before $(DEMO_LORA)/before --after $(DEMO_LORA)/after --sheet $(DEMO_LORA)/sheet.png

embedded: .venv/installed
	$(BIN)/python -m src.scratch all --work outputs/embedded --out models/embedded

test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

torture: .venv/installed-dev
	TORTURE=1 $(BIN)/python -m pytest -s tests/test_checkpoints_faults.py tests/test_training_kills.py tests/test_training_resume.py

bench: .venv/installed
	$(BIN)/python -m src.bench

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
