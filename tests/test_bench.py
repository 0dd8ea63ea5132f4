"""The bench names its parts, and times what the program really answers."""

from src.bench import __main__ as bench


def test_an_unknown_part_is_one_line(capsys) -> None:
    assert bench.main(["swop"]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: there is no bench 'swop'; there are: start, swap, train"]


def test_start_times_each_door_beside_a_bare_interpreter(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "RUNS", 1)
    assert bench.main(["start"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" ms")]
    assert len(rows) == 4
    assert all(float(row.split()[-2]) > 0 for row in rows)
