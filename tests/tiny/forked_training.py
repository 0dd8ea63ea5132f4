"""A training that starts in a moment: everything is imported and made once, and each run is a forked child that may die."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from src import train_lora
from src.checkpoints import CheckpointFolder
from src.terminal import Terminal
from src.train_arguments import build_run, parse_arguments
from src.training import judging
from src.training.history import History
from src.training.judging import Judge
from src.training.loop import Job
from src.training.saving import Saver
from src.training.trainer import Trainer
from tests.tiny import training
from tests.tiny.faults import in_child


class ForkedTraining:
    """``python -m src.train_lora`` for a tiny random model of a family, in a folder of its own."""

    def __init__(self, root: Path, family: str = "sd1", pictures: int = 5) -> None:
        torch.set_num_threads(1)  # a forked child must not wait for threads that only its parent has
        self.root, self.output = root, root / "lora"
        self.base, self.data = training.model(root / "model", family), training.photos(root / "data", pictures)
        self.common = [
            "--dataset_dir", str(self.data), "--model", str(self.base), "--output_dir", str(self.output), "--device", "cpu",
            "--set", f"paths.cache={root / 'cache'}", "--resolution", str(training.SIZE_PX), "--mixed_precision", "no",
            "--no-samples",
        ]  # fmt: skip
        self._prepared: tuple[Job, Saver, Judge] | None = None

    def prepare(self, *arguments: str) -> tuple[Job, Saver, Judge]:
        """Load the model, encode, put the adapter in: once, here; the runs that follow start from a copy of this process."""
        run = build_run(parse_arguments([*self.common, *arguments]))
        self._prepared = Trainer(run, Terminal())._prepare(self.store())
        return self._prepared

    def run(self, *arguments: str, before: Callable[[], object] = lambda: None) -> int:
        """Train in a child; its exit status, or minus the signal that ended it. ``before`` is called in the child first."""

        def child() -> None:
            log = os.open(self.root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - in place of what pytest put there
            # Drawing the report is most of the time of a tiny training, and it is written as any other file is.
            judging.Judge.report = lambda self, progress: None
            if self._prepared is not None:
                Trainer._prepare = lambda trainer, store: self._at_hand(store)
            before()
            os._exit(train_lora.main([*self.common, *arguments]))

        return in_child(child)

    def _at_hand(self, store: CheckpointFolder) -> tuple[Job, Saver, Judge]:
        job, saver, judge = self._prepared
        saver.store, job.history = store, History(store.root / "log.jsonl")
        judge.start(saver, job.history)
        return job, saver, judge

    def store(self, say: Callable[[str], None] = print) -> CheckpointFolder:
        return CheckpointFolder(self.output, say)

    def log(self) -> str:
        """What the runs since the last call said."""
        path = self.root / "log"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        path.unlink(missing_ok=True)
        return text

    def result(self, step: int) -> dict[str, bytes]:
        """What a training leaves, byte for byte: adapter and optimizer of its last checkpoint, and the published adapters."""
        folders = [self.output / f"checkpoint-{step}", self.output / "final", self.output / "best"]
        paths = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
        assert len(paths) == 8, paths  # each in diffusers' and PEFT's form; live adapter, optimizer
        return {path.relative_to(self.output).as_posix(): path.read_bytes() for path in paths}

    def names(self) -> set[str]:
        """Every file and folder below the output folder."""
        return {path.relative_to(self.output).as_posix() for path in self.output.rglob("*")}

    def clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
