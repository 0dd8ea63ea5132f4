"""The door of ``python -m src.finetune``: reads what was typed, checks what can be checked, and only then imports torch."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from src import training_start
from src.checkpoints import Checkpoint, CheckpointFolder
from src.doors import answer
from src.errors import ExitCode
from src.finetune_arguments import apply_typed, build_run, help_text, parse_arguments
from src.finetune_config import FinetuneRun
from src.terminal import Terminal

FREE_SETTINGS = training_start.FREE_SETTINGS | {"train.captions_file"}  # what it holds is compared
# What the tensors of a checkpoint follow from: another value is another set of weights or another optimizer.
FIXED_SETTINGS = {"train.part", "train.optimizer"}


def main(argv: Sequence[str]) -> int:
    """Run the training and return the exit code. Errors are one line; ``--debug`` adds the traceback."""
    return answer(argv, _run, "interrupted; if a checkpoint has been saved, --resume goes on from it", as_json="--json" in argv)


def _run(argv: Sequence[str], terminal: Terminal) -> int:
    typed = parse_arguments(argv)
    if "help" in typed:
        print(help_text())
        return ExitCode.OK
    run = build_run(typed)
    if "estimate_vram" in typed:
        from src.training_plan import estimate

        result = estimate(run)
        print(json.dumps(result.as_json()) if terminal.as_json else result.text())
        return ExitCode.OK

    def resumed(checkpoint: Checkpoint) -> FinetuneRun:
        return training_start.resumed_run(checkpoint, typed, FinetuneRun, apply_typed, FREE_SETTINGS, FIXED_SETTINGS)

    store = CheckpointFolder(Path(run.train.output_dir).expanduser(), terminal.say)
    with store.lock() if terminal.processes.is_first else contextlib.nullcontext():
        opened = training_start.opened(store, typed, run, resumed, "a model", terminal.say)
        if opened is None:
            return ExitCode.OK
        run, checkpoint, dataset = opened

        from src import quiet

        quiet.silence_libraries(verbose="verbose" in typed)
        from src.training.trainer import Trainer  # torch: seconds, paid only when all that was typed is right
        from src.training.unet_learning import UnetLearning

        terminal.processes.set_threads()
        trainer = Trainer(run, terminal, dataset, UnetLearning(run))
        return trainer.train(store, checkpoint, force="force" in typed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
