"""dataset.json as prepare_dataset writes it, and as anybody else might."""

import json
from pathlib import Path

import pytest

from src.errors import ExitCode, UserError
from src.prepared_folder import Origin, PreparedFolder, read_prepared

RECORD = {
    "file_name": "0000.png",
    "size_px": [64, 64],
    "source_px": [300, 100],
    "crop_px": [100.0, 0.0, 200.0, 100.0],
    "repeats": 2,
}


def folder_with(folder: Path, manifest: object) -> Path:
    (folder / "0000.png").touch()
    (folder / "dataset.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    return folder


def test_what_was_cut_and_scaled_is_known(tmp_path: Path) -> None:
    found = read_prepared(folder_with(tmp_path, {"trigger": "sks dog", "complete": True, "pictures": [RECORD]}))
    assert found.trigger == "sks dog"
    assert found.origins == {"0000.png": Origin((64, 64), (300, 100), (100.0, 0.0), 0.64, 2)}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "{}", '{"pictures": 3}', "[" * 100_000, "\\ud800"])
def test_what_is_no_manifest_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    assert read_prepared(folder_with(tmp_path, text)) == PreparedFolder()
    assert read_prepared(tmp_path / "elsewhere") == PreparedFolder()


@pytest.mark.parametrize(
    "change",
    [
        {"size_px": None}, {"size_px": [64]}, {"size_px": [0, 64]}, {"source_px": ["a", 1]}, {"crop_px": [5, 0, 5, 9]},
        {"crop_px": [0, 0, -5, 9]}, {"crop_px": [0, 0, float("nan"), 9]}, {"repeats": 0}, {"repeats": None}, {"size_px": [1e999, 1]},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_cannot_be_is_passed_over(tmp_path: Path, change: dict) -> None:
    found = read_prepared(folder_with(tmp_path, {"trigger": 3, "pictures": [RECORD | change, "x", {"file_name": 7}]}))
    assert found == PreparedFolder()


def test_vanished_pictures_and_interrupted_preparations_are_errors(tmp_path: Path) -> None:
    folder_with(tmp_path, {"pictures": [RECORD, RECORD | {"file_name": "0001.png"}, RECORD | {"file_name": "0002.png"}]})
    with pytest.raises(UserError, match=r"0001\.png and 1 more.*prepare_dataset") as caught:
        read_prepared(tmp_path)
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    folder_with(tmp_path, {"complete": False, "pictures": []})
    with pytest.raises(UserError, match=r"interrupted.*prepare_dataset") as caught:
        read_prepared(tmp_path)
    assert caught.value.exit_code == ExitCode.REFUSED
