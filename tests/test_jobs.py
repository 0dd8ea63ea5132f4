"""Job files, job names and the journal of finished pictures."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import pytest

from src.errors import ExitCode, UserError
from src.jobs import MAX_JOB_FILE_BYTES, JobLine, Journal, job_id, read_job_lines, split_flags

NOBODY = io.StringIO()


def write(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "jobs.txt"
    path.write_bytes(data)
    return str(path)


# --- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a cat\n\n  # note\n--prompt x  \n", [(1, "a cat"), (4, "--prompt x")]),
        (b"one\r\ntwo\rthree", [(1, "one"), (2, "two"), (3, "three")]),
        ("\ufeffé 猫\n".encode(), [(1, "é 猫")]),
        ("a\u2028b\x0bc\x85d\n".encode(), [(1, "a\u2028b\x0bc\x85d")]),  # only line ends of files part lines
        (b"a # b", [(1, "a # b")]),
    ],
)
def test_job_lines(data: bytes, lines: list[tuple[int, str]], tmp_path: Path) -> None:
    expected = [JobLine(*line) for line in lines]
    assert read_job_lines(write(tmp_path, data), NOBODY) == expected
    assert read_job_lines("-", io.TextIOWrapper(io.BytesIO(data), encoding="cp1252")) == expected
    assert read_job_lines("-", io.StringIO(data.decode(), newline="")) == expected


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"fine\nfonc\xe9\n", "line 2 is not UTF-8 (byte 0xe9)"),
        (b"\xef\xbb\xbfa\nb\n\xff", "line 3 is not UTF-8 (byte 0xff)"),
        (b"\xff\xfe\x00\xd8", "line 1 is not UTF-8 (byte 0xff)"),
    ],
)
def test_a_file_that_is_not_utf8_is_refused(data: bytes, words: str, tmp_path: Path) -> None:
    steps = ("save the file as UTF-8", "standard input: line")
    sources = ((write(tmp_path, data), NOBODY), ("-", io.TextIOWrapper(io.BytesIO(data))))
    for (source, stdin), step in zip(sources, steps):
        with pytest.raises(UserError) as caught:
            read_job_lines(source, stdin)
        assert caught.value.exit_code == ExitCode.REFUSED
        assert words in str(caught.value)
        assert step in str(caught.value)
        assert ("save the file" in str(caught.value)) is (source != "-")


def test_a_lone_surrogate_on_stdin_is_refused() -> None:
    with pytest.raises(UserError, match="line 1 is not UTF-8"):
        read_job_lines("-", io.StringIO("a\udce9"))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer for ever
    for name, code in (
        ("missing.txt", ExitCode.NOT_FOUND),
        (".", ExitCode.REFUSED),
        ("pipe", ExitCode.REFUSED),
        ("a\0", ExitCode.REFUSED),
    ):
        with pytest.raises(UserError) as caught:
            read_job_lines(str(tmp_path / name), NOBODY)
        assert caught.value.exit_code == code


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(MAX_JOB_FILE_BYTES + 1)
    with pytest.raises(UserError, match="larger than 64 MiB") as caught:
        read_job_lines(str(path), NOBODY)
    assert caught.value.exit_code == ExitCode.REFUSED


# --- flags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a cat, --ar 16:9", None),
        ("- a list item", None),
        ("it's a cat", None),
        ('--prompt "a cat" --steps 20', ["--prompt", "a cat", "--steps", "20"]),
        ('--prompt "it\'s" --negative_prompt ""', ["--prompt", "it's", "--negative_prompt", ""]),
        (r'--prompt "fate \(series\)"', ["--prompt", r"fate \(series\)"]),
        ("--prompt 'a # b' # c", ["--prompt", "a # b", "#", "c"]),
        ("--steps=20", ["--steps=20"]),
        ("--", ["--"]),
    ],
)
def test_split_flags(text: str, words: list[str] | None) -> None:
    assert split_flags(text) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-W 64 --prompt x", ["-W", "64", "--prompt", "x"]),
        ("-W=64 --prompt x", ["-W=64", "--prompt", "x"]),
        ("-x a cat", None),
        ("- W", None),
        ("-Wide cat", None),
        ("", None),
    ],
)
def test_a_line_may_begin_with_a_short_flag(text: str, words: list[str] | None) -> None:
    assert split_flags(text, {"-W", "-n"}) == words


@pytest.mark.parametrize("text", ['--prompt "a cat', "--prompt it's", "--prompt a\\", '--prompt "\x1b[2J'])
def test_malformed_quotes_are_a_usage_error(text: str) -> None:
    with pytest.raises(UserError) as caught:
        split_flags(text)
    assert caught.value.exit_code == ExitCode.USAGE
    assert str(caught.value).isprintable()


# --- names -------------------------------------------------------------------------------------------------------------


def test_job_id_is_the_hash_of_canonical_json() -> None:
    # printf '[0,{"a":1,"b":"\\u00e9"}]' | sha256sum
    assert job_id({"b": "é", "a": 1}, 0) == "b266a8a49640583e"


def test_job_id_tells_jobs_apart_but_not_orders() -> None:
    settings = {"prompt": "a cat", "seed": None, "width": 512, "guidance_scale": 7.5, "loras": [["ink", 0.8]]}
    names = list(settings)
    random.Random(0).shuffle(names)
    assert job_id({name: settings[name] for name in names}, 3) == job_id(settings, 3)
    others = [settings | change for change in ({"prompt": "a dog"}, {"seed": 0}, {"width": 513}, {"loras": []}, {"x": 1})]
    ids = {job_id(item, occurrence) for item in [settings, *others] for occurrence in range(5)}
    assert len(ids) == 30
    assert all(len(item) == 16 and int(item, 16) >= 0 for item in ids)


# --- the journal -------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "00001.png"
    path.write_bytes(b"png")
    return path


def test_a_second_run_finds_what_the_first_finished(tmp_path: Path, picture: Path) -> None:
    Journal(tmp_path / "journal.jsonl").record("aa", 1, picture, seed=7)
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.finished("aa", 1) == picture
    assert journal.finished("aa", 0) is None
    assert journal.finished("bb", 1) is None
    assert (journal.seed_of("aa"), journal.seed_of("bb")) == (7, None)


def test_the_running_journal_knows_its_own_entries(tmp_path: Path, picture: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record("aa", 0, picture, seed=0)
    assert journal.finished("aa", 0) == picture
    assert journal.seed_of("aa") == 0


def test_a_deleted_picture_is_drawn_again_with_the_same_seed(tmp_path: Path, picture: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record("aa", 0, picture, seed=7)
    picture.unlink()
    assert journal.finished("aa", 0) is None
    assert journal.seed_of("aa") == 7
    picture.mkdir()
    assert journal.finished("aa", 0) is None


def test_the_first_seed_and_the_last_file_of_a_job_count(tmp_path: Path, picture: Path) -> None:
    again = picture.with_name("00002.png")
    again.write_bytes(b"png")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record("aa", 0, picture, seed=7)
    journal.record("aa", 0, again, seed=8)
    for known in (journal, Journal(tmp_path / "journal.jsonl")):
        assert (known.finished("aa", 0), known.seed_of("aa")) == (again, 7)


def test_what_is_forgotten_is_drawn_again_and_a_kill_meanwhile_loses_nothing(tmp_path: Path, picture: Path) -> None:
    """Of three pictures two are redone, by two processes; the second opens the journal after the first has drawn."""
    path = tmp_path / "journal.jsonl"
    for index in range(3):
        Journal(path).record("aa", index, picture, seed=7)
    new = [tmp_path / f"new-{index}.png" for index in range(2)]
    for process, file in enumerate(new):
        journal = Journal(path, process)
        journal.forget({"aa": range(process, process + 1), "bb": range(5)})
        assert journal.finished("aa", process) is None
        file.write_bytes(b"png")
        journal.record("aa", process, file, seed=9)
        expected = [new[0], new[1] if process else picture, picture]
        assert [Journal(path).finished("aa", index) for index in range(3)] == expected
    Journal(path).forget({"aa": range(3)})
    again = Journal(path)
    assert [again.finished("aa", index) for index in range(3)] == [None] * 3
    assert again.seed_of("aa") is None, "a job without a seed draws another one"
    again.record("aa", 0, picture.with_name("00002.png"), seed=11)
    assert Journal(path).seed_of("aa") == 11


@pytest.mark.parametrize("value", ["3", "null", '"x"', "[[[]]]", "[3]", '{"aa": 0}'])
def test_a_foreign_list_of_the_forgotten_does_not_count(tmp_path: Path, picture: Path, value: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"forgotten": {value}}}\n["forgotten"]\n"forgotten"\n')
    Journal(path).record("aa", 0, picture, seed=7)
    assert Journal(path).finished("aa", 0) == picture


def test_a_picture_that_was_announced_counts_if_it_became_that_file(tmp_path: Path, picture: Path) -> None:
    """Killed after the file had its name and before the journal had its line; or before, and the name is another's."""
    path = tmp_path / "journal.jsonl"
    Journal(path).announce("aa", 0, picture, seed=7, data=b"png")
    Journal(path).announce("aa", 1, picture, seed=7, data=b"another")
    Journal(path).announce("aa", 2, tmp_path / "never.png", seed=7, data=b"png")
    assert [Journal(path).finished("aa", index) for index in range(3)] == [picture, None, None]


def test_a_journal_cut_anywhere_loses_only_its_last_line(tmp_path: Path, picture: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for index in range(3):
        journal.record("aa", index, picture, seed=7)
    data = path.read_bytes()
    third = data.index(b"\n", data.index(b"\n") + 1) + 1
    for end in range(third, len(data) - 1):
        path.write_bytes(data[:end])
        torn = Journal(path)
        assert [torn.finished("aa", index) for index in range(3)] == [picture, picture, None]
        torn.record("aa", 2, picture, seed=7)
        assert [Journal(path).finished("aa", index) for index in range(3)] == [picture] * 3


@pytest.mark.parametrize(
    "change",
    [
        *[{"file": name} for name in ("../00001.png", "/etc/passwd", "sub/00001.png", "a\\b", "..", "", "a\0", 3)],
        *[{"index": index} for index in ("0", -1, True, None)],
        *[{"seed": seed} for seed in (None, -1, 1.5)],
        {"job": []},
    ],
    ids=str,
)
def test_foreign_entries_do_not_count(change: dict, tmp_path: Path, picture: Path) -> None:
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for name in ("00001.png", "sub/00001.png"):
        (folder / name).write_bytes(b"png")
    path = folder / "journal.jsonl"
    entry = {"job": "aa", "index": 0, "seed": 7, "file": "00001.png"}
    path.write_text(json.dumps(entry))
    assert Journal(path).finished("aa", 0) == folder / "00001.png"
    path.write_text(json.dumps(entry | change))
    assert [Journal(path).finished("aa", index) for index in (0, 1, -1)] == [None, None, None]


def test_lines_of_other_programs_do_not_count(tmp_path: Path, picture: Path) -> None:
    path = tmp_path / "journal.jsonl"
    rng = random.Random(0)
    noise = [
        b"",
        b"null",
        b"3",
        b"[]",
        b"{}",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"job": "aa"}',
        rng.randbytes(99),
    ]
    path.write_bytes(b"\n".join(noise) + b"\n")
    Journal(path).record("aa", 0, picture, seed=7)
    assert Journal(path).finished("aa", 0) == picture


def test_a_picture_elsewhere_is_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="beside the journal"):
        Journal(tmp_path / "journal.jsonl").record("aa", 0, tmp_path / "sub" / "x.png", seed=1)


def test_a_journal_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Journal(tmp_path)
    assert caught.value.exit_code == ExitCode.REFUSED
