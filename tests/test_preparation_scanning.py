"""Every entry of a folder is one of four things, and nothing is opened to find out."""

from __future__ import annotations

import inspect
import os
import socket
import sys

import pytest

from src.preparation.scanning import scan


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def kinds(root):
    return {skip.source: (skip.kind, skip.reason) for skip in scan(root).skipped}


def test_each_file_is_one_of_four_things(tmp_path):
    fill(
        tmp_path,
        "b/a.JPG",
        "a.png",
        "a-masklabel.png",
        "a.txt",
        "metadata.jsonl",
        "notes.pdf",
        ".hidden.png",
        "x-masklabel.png",
    )
    found = scan(tmp_path)
    assert found.pictures == ["a.png", "b/a.JPG"]
    assert found.masks == {"a.png": "a-masklabel.png"}
    assert found.captions == ["a.txt", "metadata.jsonl"]
    assert {skip.source: skip.kind for skip in found.skipped} == {
        ".hidden.png": "not a picture", "notes.pdf": "not a picture", "x-masklabel.png": "mask without picture",
    }  # fmt: skip
    assert len(found) == 8


def test_one_mask_belongs_to_one_picture(tmp_path):
    fill(tmp_path, "a.jpg", "a.png", "a-masklabel.png")
    found = scan(tmp_path)
    assert found.masks == {"a.jpg": "a-masklabel.png"}
    assert len(found) == 3


def test_a_mask_whose_ending_has_capitals_belongs_to_its_picture(tmp_path):
    fill(tmp_path, "a.JPG", "a-masklabel.PNG", "b.PNG", "b-masklabel.png", "c-masklabel.PNG")
    found = scan(tmp_path)
    assert found.masks == {"a.JPG": "a-masklabel.PNG", "b.PNG": "b-masklabel.png"}
    assert [skip.source for skip in found.skipped] == ["c-masklabel.PNG"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_what_is_no_regular_file_is_listed_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/etc/passwd", tmp_path / "link.png")
    os.symlink(".", tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "dangling.jpg")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket is short
        server.bind("socket.png")
        os.chdir(here)
    found = kinds(tmp_path)
    assert {name: kind for name, (kind, _) in found.items()} == dict.fromkeys(
        ("pipe.png", "link.png", "loop", "dangling.jpg", "socket.png"), "not a file"
    )
    assert found["pipe.png"][1] == "a pipe"
    assert "link" in found["link.png"][1]
    assert {skip.source for skip in scan(tmp_path).skipped if skip.is_picture} == found.keys() - {"loop"}


def test_a_folder_that_cannot_be_opened_is_listed(tmp_path, monkeypatch):
    fill(tmp_path, "closed/a.png", "b.png")
    real = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert kinds(tmp_path) == {"closed": ("unreadable", "a folder that cannot be opened (Permission denied)")}


def test_no_folder_is_too_deep(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 300)
    deep.mkdir(parents=True)
    (deep / "a.png").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        found = scan(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert found.pictures == ["d/" * 300 + "a.png"]


@pytest.mark.parametrize("name", ["IMG.CR2", "x.psd", "x.heic"])
def test_pictures_that_are_not_read_say_what_to_do(tmp_path, name, monkeypatch):
    monkeypatch.setattr("src.preparation.scanning.PICTURE_SUFFIXES", frozenset({".png"}))
    fill(tmp_path, name)
    kind, reason = kinds(tmp_path)[name]
    assert kind == "unreadable"
    assert "export" in reason or "pip install" in reason


def test_names_that_are_no_text_are_kept(tmp_path):
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9\n.png", os.O_CREAT | os.O_WRONLY))
    (name,) = scan(tmp_path).pictures
    assert os.fsencode(name) == b"caf\xe9\n.png"
