"""The door of ``python -m src.train_lora``: reads what was typed, checks what can be checked, and only then imports torch."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src import training_start
from src.checkpoints import Checkpoint, CheckpointFolder
from src.doors import answer
from src.errors import ExitCode
from src.terminal import Terminal
from src.train_arguments import apply_typed, build_run, help_text, parse_arguments
from src.train_config import TrainRun

_get = training_start.value_of
FREE_SETTINGS = training_start.FREE_SETTINGS | {"train.format", "train.class_dir"}
# What the tensors of a checkpoint follow from: another value is another adapter or another optimizer.
FIXED_SETTINGS = {"train.rank", "train.targets", "train.use_dora", "train.train_text_encoder", "train.optimizer"}


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
    say = terminal.say
    store = CheckpointFolder(Path(run.train.output_dir).expanduser(), say)
    with store.lock() if terminal.processes.is_first else contextlib.nullcontext():
        opened = training_start.opened(store, typed, run, lambda found: _resumed_run(found, typed), "an adapter", say)
        if opened is None:
            return ExitCode.OK
        run, checkpoint, dataset = opened

        from src import quiet

        quiet.silence_libraries(verbose="verbose" in typed)
        from src.training.trainer import Trainer  # torch: seconds, paid only when all that was typed is right

        terminal.processes.set_threads()
        return Trainer(run, terminal, dataset).train(store, checkpoint, force="force" in typed)


def _resumed_run(checkpoint: Checkpoint, typed: dict[str, Any]) -> TrainRun:
    return training_start.resumed_run(checkpoint, typed, TrainRun, apply_typed, FREE_SETTINGS, FIXED_SETTINGS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
