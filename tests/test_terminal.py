"""What a person sees and what a script reads: the bar on terminals only, clean lines, JSON alone on stdout."""

import io
import json
from pathlib import Path

from src.errors import ExitCode
from src.terminal import Terminal

FACTS = {"seed": 7, "width": 64, "height": 96, "steps": 20, "time_s": 1.25}


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def run_bar(terminal: Terminal) -> None:
    terminal.start_progress(40)
    terminal.progress(10, "picture 1 of 2")
    terminal.say("between")
    terminal.progress(30, "picture 2 of 2")
    terminal.end_progress()


def test_a_terminal_gets_one_bar_with_rate_and_time_left(monkeypatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("tqdm.std.tqdm.mininterval", 0, raising=False)
    run_bar(Terminal())
    text = screen.getvalue()
    assert "0/40" in text
    assert "it/s]" in text
    assert "between\n" in text


def test_no_bar_where_stderr_is_a_file(capsys) -> None:
    run_bar(Terminal())
    assert capsys.readouterr().err == "between\n"


def test_a_picture_is_a_line_with_its_path_first(capsys) -> None:
    Terminal().picture(Path("out/a.png"), FACTS)
    assert capsys.readouterr().out == "out/a.png  seed 7  64x96  20 steps  1.2 s\n"


def test_json_has_stdout_to_itself(capsys) -> None:
    terminal = Terminal(as_json=True)
    terminal.say("a line for people")
    terminal.picture(Path("out/a.png"), FACTS)
    terminal.skipped(Path("out/b.png"), 3)
    terminal.error("no such file", ExitCode.NOT_FOUND, 4)
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0] == {"file": "out/a.png", **FACTS}
    assert lines[1] == {"file": "out/b.png", "line": 3, "skipped": True}
    assert lines[2] == {"error": "no such file", "exit_code": 4, "line": 4}
    assert err.splitlines() == ["a line for people", "error: line 4: no such file"]


def test_control_characters_and_newlines_cannot_steer_the_terminal(capsys) -> None:
    Terminal().say("a\x1b[2Jb\rc\nd\x07")
    assert capsys.readouterr().err == "a [2Jb c d \n"


def test_a_terminal_of_another_encoding_gets_no_error(monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    Terminal().say("ein Fuchs \N{FOX FACE} \udce9")
    assert raw.getvalue() == b"ein Fuchs ?  \n"
