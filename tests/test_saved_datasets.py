"""Data sets that `datasets` saved: unpacked once, byte for byte, with all captions; and one line for what is none."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from src import folders, saved_datasets
from src.dataset import read_dataset
from src.errors import UserError
from src.saved_datasets import unpacked
from tests.tiny import training

datasets = pytest.importorskip("datasets")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pictures = sorted(training.photos(tmp_path / "photos", 3).glob("*.png"))
    rows = {"image": list(map(str, pictures)), "caption": [[f"one {n}", f"two {n}"] for n in range(3)], "other": [1, 2, 3]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_pictures_and_captions_come_out_as_they_went_in(saved: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = unpacked(saved, tmp_path / "cache", said.append)
    originals = [path.read_bytes() for path in sorted((tmp_path / "photos").glob("*.png"))]
    assert [path.read_bytes() for path in sorted(folder.glob("*.png"))] == originals
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["captions"] for line in lines] == [[f"one {n}", f"two {n}"] for n in range(3)]
    stamps = [path.stat().st_mtime_ns for path in folder.iterdir()]
    assert unpacked(saved, tmp_path / "cache", said.append) == folder
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == stamps
    assert len(said) == 2
    assert unpacked(saved / "test", tmp_path / "cache", said.append).is_dir()  # one split alone


def test_a_phones_jpeg_is_one_and_what_is_not_read_here_is_refused(tmp_path: Path) -> None:
    """Pillow calls a JPEG with a second picture in it MPO; and an ICO opens, but no folder of pictures is read with it."""
    picture, other = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))

    def saved(name: str, **options: object) -> Path:
        picture.save(tmp_path / f"a.{name}", **options)
        rows = {"image": [str(tmp_path / f"a.{name}")], "caption": ["a dog"]}
        data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        data.save_to_disk(str(tmp_path / name))
        return tmp_path / name

    folder = unpacked(saved("mpo", save_all=True, append_images=[other]), tmp_path / "cache", print)
    found = read_dataset(folder, 64, step_px=16, buckets=False, validation_every=0)
    assert [item.captions for item in found.train] == [("a dog",)]
    with pytest.raises(UserError, match="row 0 is a picture of the kind ICO"):
        unpacked(saved("ico"), tmp_path / "cache", print)


def test_processes_of_one_run_unpack_once(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first. Threads stand for processes: a lock is of the opened file, whoever opened it."""
    calls = []
    real = folders.publish_folder

    def slow(*arguments: object) -> Path:
        calls.append(arguments[0])
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(folders, "publish_folder", slow)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: unpacked(saved, tmp_path / "cache", lambda line: None), range(3)))
    assert len(calls) == 1
    assert set(found) == {calls[0]}


def test_a_folder_of_pictures_is_left_alone(tmp_path: Path) -> None:
    folder = training.photos(tmp_path / "photos", 1)
    assert unpacked(folder, tmp_path / "cache", print) == folder


def test_what_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": [1, 2], "caption": ["a", "b"]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(UserError, match="needs a column 'image' of pictures"):
        unpacked(tmp_path / "numbers", tmp_path / "cache", print)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read by `datasets`") as caught:
        unpacked(tmp_path / "broken", tmp_path / "cache", print)
    assert "\n" not in str(caught.value)
    kinds = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [None], "caption": ["a"]}, features=kinds).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(UserError, match="row 0 has no picture"):
        unpacked(tmp_path / "none", tmp_path / "cache", print)
    with pytest.raises(UserError, match=r"row 7: .*gone\.png cannot be read"):
        saved_datasets._bytes({"bytes": None, "path": str(tmp_path / "gone.png")}, tmp_path, 7)
