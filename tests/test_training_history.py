"""The log: what was added comes back, a torn line is passed over, a resume drops what it repeats."""

import json
from pathlib import Path

import pytest

from src.errors import UserError
from src.training import history
from src.training.history import History, Record


def filled(path: Path | None) -> History:
    log = History(path)
    for step in (5, 10, 15):
        log.add("train", step, loss=1 / step, lr=1e-4, grad_norm=0.5)
    log.add("validation", 10, loss=0.2)
    log.add("samples", 10, prompts=["a fox", "zwei Füchse\n🦊"])
    log.add("event", 12, text="step 12 skipped")
    return log


def test_what_was_added_comes_back(tmp_path) -> None:
    log = filled(tmp_path / "log.jsonl")
    log.flush()
    again = History(tmp_path / "log.jsonl")
    assert again.read() == log.read()
    assert again.read("validation") == [Record("validation", 10, {"loss": 0.2})]
    assert again.read("samples")[0].values["prompts"][1] == "zwei Füchse\n🦊"
    assert again.curve("train", "loss") == [(5, 1 / 5), (10, 1 / 10), (15, 1 / 15)]


def test_each_line_is_json_that_stands_alone(tmp_path) -> None:
    filled(tmp_path / "log.jsonl").flush()
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert json.loads(lines[0]) == {"kind": "train", "step": 5, "loss": 0.2, "lr": 1e-4, "grad_norm": 0.5}
    assert len(lines) == 6


def test_numbers_that_are_none_are_null_and_leave_a_gap(tmp_path) -> None:
    log = History(tmp_path / "log.jsonl")
    for step, loss in ((1, float("nan")), (2, float("inf")), (3, 0.5)):
        log.add("train", step, loss=loss)
    log.flush()
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert History(tmp_path / "log.jsonl").curve("train", "loss") == [(3, 0.5)]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_passed_over_and_written_over(tmp_path, cut) -> None:
    path = tmp_path / "log.jsonl"
    filled(path).flush()
    whole = History(path).read()
    path.write_bytes(path.read_bytes()[:-cut])
    torn = History(path)
    assert torn.read() == (whole[:-1] if cut > 1 else whole)  # without its newline alone, the line is whole
    torn.add("event", 20, text="on")
    torn.flush()
    assert History(path).read() == [*torn.read()]


@pytest.mark.parametrize(
    "line", ["", "null", "[1]", "{}", '{"kind": "other", "step": 1}', '{"kind": "train"}', "\xff{", "[" * 99_999]
)
def test_foreign_lines_are_passed_over(tmp_path, line) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(line.encode("latin-1") + b'\n{"kind": "train", "step": 1, "loss": 2}\n')
    assert History(path).read() == [Record("train", 1, {"loss": 2})]


def test_a_resume_drops_what_it_repeats(tmp_path) -> None:
    log = filled(tmp_path / "log.jsonl")
    log.flush()
    log = History(tmp_path / "log.jsonl")
    log.rewind(10)
    log.add("train", 15, loss=9.0)
    log.flush()
    assert History(tmp_path / "log.jsonl").curve("train", "loss") == [(5, 1 / 5), (10, 1 / 10), (15, 9.0)]
    assert History(tmp_path / "log.jsonl").read("event") == []
    log.rewind(-1)
    log.flush()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_it_reaches_the_disk_by_itself_after_a_while_and_not_at_each_step(tmp_path, monkeypatch) -> None:
    now, writes = [0.0], []
    monkeypatch.setattr(history.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(history, "publish_bytes", lambda path, data: writes.append(data))
    log = History(tmp_path / "log.jsonl")
    for step in range(1000):
        now[0] += 0.1
        log.add("train", step, loss=1.0)
    assert 4 <= len(writes) <= 5  # 100 seconds, one in 20
    log.flush()
    log.flush()
    assert len(writes) <= 6, "a flush of nothing new wrote"
    assert len(writes[-1].splitlines()) == 1000


def test_a_full_disk_is_told_when_asked_and_never_ends_a_step(tmp_path, monkeypatch) -> None:
    now = [0.0]

    def full(path: Path, data: bytes) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(history.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(history, "publish_bytes", full)
    log = History(tmp_path / "log.jsonl")
    now[0] = 100.0
    log.add("train", 1, loss=1.0)
    with pytest.raises(UserError):
        log.flush()
    monkeypatch.undo()
    log.flush()
    assert History(tmp_path / "log.jsonl").curve("train", "loss") == [(1, 1.0)]


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = filled(None)
    log.flush()
    assert len(log.read()) == 6
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no kind"):
        History(None).add("trian", 1, loss=1.0)
