"""The command from the shell to the folder: the report, other programs that read the result."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from src import prepare_dataset
from src.dataset import read_dataset
from src.errors import ExitCode
from src.preparation import contact_sheet
from tests.tiny.photos import fingerprint, photo, photo_folder

ROOT = Path(__file__).parent.parent


def command(src, dst, *flags):
    return ["--src", str(src), "--dst", str(dst), "--size", "64", "--workers", "1", *flags]


def prepared(src, dst, *flags):
    assert prepare_dataset.main(command(src, dst, *flags)) == ExitCode.OK
    return json.loads((dst / "dataset.json").read_text())


@pytest.fixture
def _no_report(monkeypatch):
    monkeypatch.setattr(contact_sheet, "write_report", lambda *args: b"report")


# --- who reads the result


@pytest.mark.usefixtures("_no_report")
def test_our_trainer_reads_it(tmp_path):
    src = photo_folder(tmp_path / "src", 3)
    (src / "a.txt").write_text("one\ntwo")
    prepared(src, tmp_path / "dst", "--trigger", "sks dog")
    dataset = read_dataset(tmp_path / "dst", 64, step_px=8, buckets=False, validation_every=0)
    assert dataset.trigger == "sks dog"
    assert [item.captions for item in dataset.train] == [("sks dog, one", "sks dog, two")] + [("a photo of sks dog",)] * 2
    assert {item.size_px for item in dataset.train} == {(64, 64)}


@pytest.mark.usefixtures("_no_report")
@pytest.mark.parametrize("several", [False, True])
def test_hugging_face_datasets_reads_it(tmp_path, several):
    datasets = pytest.importorskip("datasets")
    src = photo_folder(tmp_path / "src", 3)
    (src / "a.txt").write_text('Zürich, "quoted"\ntwo' if several else 'Zürich, "quoted"', encoding="utf-8")
    made = prepared(src, tmp_path / "dst", "--trigger", "sks dog")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "dst"), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(loaded) == 3
    assert loaded["text"][:] == ['sks dog, Zürich, "quoted"', *["a photo of sks dog"] * 2]
    assert ("captions" in loaded.column_names) == several
    for row, item in zip(loaded, made["pictures"]):
        with Image.open(tmp_path / "dst" / item["file_name"]) as picture:
            assert row["image"].tobytes() == picture.tobytes()


@pytest.mark.usefixtures("_no_report")
def test_each_picture_has_a_text_beside_it_for_the_other_trainers(tmp_path):
    """kohya takes the first line, OneTrainer and SimpleTuner one of them; all want NAME.txt in UTF-8 without a mark."""
    src = photo_folder(tmp_path / "src", 2)
    (src / "a.txt").write_text("\ufefféins\r\nzwei\r\n", encoding="utf-8")
    made = prepared(src, tmp_path / "dst", "--trigger", "sks")
    for item in made["pictures"]:
        lines = (tmp_path / "dst" / item["file_name"]).with_suffix(".txt").read_bytes().decode("utf-8").split("\n")
        assert lines == item["captions"]
    assert made["pictures"][0]["captions"] == ["sks, éins", "sks, zwei"]


# --- the report


class Links(HTMLParser):
    """Everything in a page that could fetch something, and its text."""

    def __init__(self):
        super().__init__()
        self.links, self.images, self.texts, self.tags = [], 0, [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "data", "action", "srcset"):
                self.images += tag == "img"
                self.links.append(value)

    def handle_data(self, data):
        self.texts.append(data)


def parse(path):
    page = Links()
    page.feed(path.read_text(encoding="utf-8"))
    return page, " ".join(page.texts)


def test_the_report_shows_pictures_captions_and_findings_in_one_file(tmp_path):
    src = photo_folder(tmp_path / "src", 3)
    photo(0).save(src / "copy.jpg", quality=95)
    photo(9, 200, 200).filter(ImageFilter.GaussianBlur(9)).save(src / "soft.png")
    photo(8, 40, 40).save(src / "tiny.png")
    (src / "a.txt").write_text("<script>alert(1)</script> " + "word " * 90)
    (src / "<b>.gif").write_bytes(b"x")
    prepared(src, tmp_path / "dst", "--trigger", "sks & dog")
    page, text = parse(tmp_path / "dst/report.html")
    assert all(link.startswith("data:image/") for link in page.links)
    assert page.images == 3 + 2  # the kept ones, the copy and the blurred one; of the tiny one nothing was made
    assert not page.tags & {"script", "b", "iframe", "link"}
    assert "<script>alert(1)</script>" in text
    for part in (
        "soft.png",
        "blurred",
        "copy.jpg",
        "nearly the same as a.png",
        "40x40 for 64x64",
        "<b>.gif",
        "sks & dog",
        "75 tokens",
    ):
        assert part in text, part
    assert "8 found = 3 pictures + 0 masks + 1 caption file + 4 listed as left out" in text


def test_the_report_of_many_pictures_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_SHOWN", 6)
    monkeypatch.setattr(contact_sheet, "MAX_SHOWN_LEFT_OUT", 2)
    monkeypatch.setattr(contact_sheet, "MAX_ROWS", 10)
    src = photo_folder(tmp_path / "src", 20)
    for number in range(4):
        photo(number).save(src / f"{number} copy.png")
    prepared(src, tmp_path / "dst", "--trigger", "x")
    page, text = parse(tmp_path / "dst/report.html")
    assert page.images == 8
    assert "6 of 20" in text
    assert "and 10 more" in text


# --- the command


def test_the_command_of_the_readme(tmp_path):
    photo_folder(tmp_path / "data/raw", 3, width=700, height=600)
    before = fingerprint(tmp_path / "data/raw")
    words = ["--src", "./data/raw", "--dst", "./data/train", "--size", "512", "--trigger"]
    done = subprocess.run(
        [sys.executable, "-m", "src.prepare_dataset", *words, "sks dog"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "3 pictures prepared, 0 left out",
        "report: data/train/report.html",
        "next:   python -m src.train_lora --dataset_dir ./data/train --resolution 512",
    ]
    names = sorted(path.name for path in (tmp_path / "data/train").iterdir())
    stems = ["0000", "0001", "0002"]
    assert names == sorted(
        [f"{stem}{end}" for stem in stems for end in (".png", ".txt")] + ["dataset.json", "metadata.jsonl", "report.html"]
    )
    assert fingerprint(tmp_path / "data/raw") == before


def test_help_is_instant_and_names_every_setting():
    code = (
        "import sys; from src import prepare_dataset; code = prepare_dataset.main(['--help']); "
        "print(sorted({'PIL', 'numpy', 'torch', 'yaml', 'matplotlib'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("[]")
    assert max(map(len, done.stdout.splitlines())) <= 150
    for flag in ("--trigger", "--buckets", "--keep-blurred", "(default: 512)", "(default: a photo of"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("flags", "code", "part"),
    [
        (["--sizes", "3"], ExitCode.USAGE, "did you mean --size"),
        (["--size", "big"], ExitCode.USAGE, "expected a whole number"),
        (["--crop", "left"], ExitCode.USAGE, "choose center or smart"),
        (["--src", "nowhere"], ExitCode.NOT_FOUND, "no such folder"),
        (["--size", "65"], ExitCode.USAGE, "--size 65 is not a multiple of 8; nearest: 64 or 72"),
        (["--workers", "0"], ExitCode.USAGE, "--workers 0 is outside"),
        (["--trigger", ""], ExitCode.USAGE, "--trigger is empty"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, flags, code, part):
    src = photo_folder(tmp_path / "src", 1)
    assert prepare_dataset.main([*command(src, tmp_path / "dst"), *flags]) == code
    error = capsys.readouterr().err
    assert part in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("_no_report")
def test_json_for_scripts(tmp_path, capsys):
    src = photo_folder(tmp_path / "src", 2)
    (src / "x.png").write_bytes(b"x")
    prepared(src, tmp_path / "dst", "--json", "--trigger", "sks")
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "folder": str(tmp_path / "dst"), "found": 3, "prepared": 2, "masks": 0, "caption_files": 0,
        "skipped": {"unreadable": 1}, "notes": [],
    }  # fmt: skip


def test_a_dry_run_lists_what_would_be_left_out(tmp_path, capsys):
    src = photo_folder(tmp_path / "src", 2)
    (src / "x.png").write_bytes(b"x")
    assert prepare_dataset.main(command(src, tmp_path / "dst", "--dry-run", "--trigger", "sks")) == ExitCode.OK
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("would leave out x.png: unreadable, ")
    assert lines[1] == "2 pictures would be prepared, 1 left out (1 unreadable)"
    assert len(lines) == 2
    assert not (tmp_path / "dst").exists()


@pytest.mark.usefixtures("_no_report")
def test_the_first_pictures_that_were_left_out_are_named(tmp_path, capsys):
    src = photo_folder(tmp_path / "src", 1)
    for number in range(12):
        (src / f"x{number:02d}.png").write_bytes(b"x")
    prepared(src, tmp_path / "dst", "--trigger", "sks")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines[:10]] == [f"left out x{number:02d}.png" for number in range(10)]
    assert lines[10:12] == ["... and 2 more, all in the report", "1 picture prepared, 12 left out (12 unreadable)"]


@pytest.mark.usefixtures("_no_report")
def test_how_to_keep_what_was_left_out_is_said(tmp_path, capsys):
    src = photo_folder(tmp_path / "src", 1)
    Image.open(src / "a.png").resize((40, 30)).save(src / "small.png")
    prepared(src, tmp_path / "dst", "--trigger", "sks")
    assert "to keep them: --allow-upscale or a smaller --size (too small)" in capsys.readouterr().err.splitlines()
    prepared(src, tmp_path / "dst", "--trigger", "sks", "--allow-upscale", "--keep-duplicates", "--keep-blurred")
    lines = capsys.readouterr().err.splitlines()
    assert "pictures enlarged, which makes them soft: 1, first small.png" in lines
    assert not any(line.startswith("to keep them") for line in lines)
    (src / "a.png").unlink()
    assert prepare_dataset.main(command(src, tmp_path / "new", "--trigger", "sks")) == ExitCode.REFUSED
    assert capsys.readouterr().err.endswith("; to keep them: --allow-upscale or a smaller --size (too small)\n")


@pytest.mark.usefixtures("_no_report")
def test_unused_captions_say_why(tmp_path):
    src = photo_folder(tmp_path / "src", 2)
    for name, text in {"a.txt": "a dog", "a.caption": "far", "b.txt": "", "notes.txt": "milk"}.items():
        (src / name).write_text(text)
    prepared(src, tmp_path / "dst", "--trigger", "sks")
    skipped = json.loads((tmp_path / "dst/dataset.json").read_text())["skipped"]
    assert {item["source"]: item["reason"] for item in skipped} == {
        "notes.txt": "no picture of that name is beside it", "a.caption": "a nearer caption is used", "b.txt": "empty",
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX")
@pytest.mark.usefixtures("_no_report")
def test_a_killed_command_goes_on(tmp_path):
    """kill -9 with two workers at work; what they had finished is still there, byte for byte, after the same command."""
    src, dst = photo_folder(tmp_path / "src", 26, width=300, height=300), tmp_path / "dst"
    line = ["--src", str(src), "--dst", str(dst), "--size", "256", "--trigger", "x", "--workers"]
    process = subprocess.Popen([sys.executable, "-m", "src.prepare_dataset", *line, "2"], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(finished(dst)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.5)  # the workers see the end of their parent
    before = {path.stem: path.with_suffix(".png").stat().st_ino for path in finished(dst)}
    assert not (dst / "dataset.json").exists()
    assert prepare_dataset.main([*line, "1"]) == ExitCode.OK
    made = json.loads((dst / "dataset.json").read_text())
    after = {item["key"]: (dst / item["file_name"]).stat().st_ino for item in made["pictures"]}
    assert len(after) == 26
    assert before.items() <= after.items()
    assert not list(dst.glob(".*"))


def finished(dst):
    return [path for path in (dst / ".preparing").glob("*.json") if re.fullmatch("[0-9a-f]{64}", path.stem)]
