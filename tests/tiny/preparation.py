"""A preparation in one call, and what it made; for the tests of preparing and of the folder that comes out."""

from __future__ import annotations

import json
import os
from pathlib import Path

from src.preparation.preparing import prepare
from src.preparation.settings import PrepareConfig
from src.terminal import Terminal


def run(src, dst, **changes):
    config = PrepareConfig(src=str(src), dst=str(dst), **{"size": 64, "trigger": "sks dog", "workers": 1, **changes})
    return prepare(config, Terminal())


def manifest(dst):
    return json.loads((dst / "dataset.json").read_text())


def contents(folder):
    """The bytes of every file by its relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def entries(folder):
    """Every entry below a folder that is none itself."""
    names = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(names)


def assert_conserved(src, dst):
    """Every entry of the source is in the result, used for it, or listed with a reason; once."""
    made = manifest(dst)
    pictures = [item["source"] for item in made["pictures"]]
    masks = [item["mask"] for item in made["pictures"] if item["mask_file_name"]]
    skipped = [item["source"] for item in made["skipped"]]
    captions = {item["caption_from"] for item in made["pictures"]} & set(entries(src))
    assert sorted([*pictures, *masks, *skipped, *captions]) == entries(src)
    assert all(item["reason"] and item["kind"] for item in made["skipped"])
    assert made["counts"]["found"] == len(entries(src))
    assert made["complete"] is True
    expected = {"dataset.json", "metadata.jsonl", "report.html"}
    for number, item in enumerate(made["pictures"]):
        assert item["file_name"] == f"{number:04d}.png"
        expected |= {item["file_name"], f"{number:04d}.txt"} | {item["mask_file_name"]} - {None}
    assert set(contents(dst)) == expected
    assert set(made["files"]) == expected - {"dataset.json"}
