"""What follows from a checkpoint: which one is published as the best, and which may go."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from src.checkpoints import CheckpointFolder
from src.errors import UserError
from src.train_config import TrainRun
from src.training.history import History
from src.training.judging import Judge

ADAPTER = "adapter.safetensors"


def test_the_best_stays_where_it_could_not_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resume, which knows of no best yet, another program has best/ open: once it is closed the same is published."""
    store, history, said = CheckpointFolder(tmp_path, print), History(None), []
    for step, loss in ((1, 0.1), (2, 0.3), (3, 0.2), (4, 0.4)):
        store.save(step, {ADAPTER: b"%d" % step}, {})
        history.add("validation", step, loss=loss)
    run = TrainRun()
    run.train.keep, run.train.samples = 2, False
    judge = Judge(run, None, SimpleNamespace(held_out=(), train=()), None, None, None, None, said.append)
    judge.start(SimpleNamespace(store=store, result_of=lambda found: {ADAPTER: found.read(ADAPTER)}), history)

    def is_open(*args: object) -> None:
        raise UserError("best: not saved; close the program that has it open")

    with monkeypatch.context() as patched:
        patched.setattr(store, "publish", is_open)
        judge.follow_up()
    assert [line.partition(",")[0] for line in said] == ["best    not renewed"]
    assert [checkpoint.step for checkpoint in store.valid()] == [1, 3, 4]
    judge.follow_up()
    assert (tmp_path / "best" / ADAPTER).read_bytes() == b"1"
    assert [checkpoint.step for checkpoint in store.valid()] == [1, 3, 4]
