"""Tables of captions: Flickr30k's and Flickr8k's forms, what is wrong in them, and how an epoch visits several captions."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from src.captions import find_caption_table, read_caption_table
from src.dataset import Order, read_dataset
from src.errors import ExitCode, UserError
from tests.tiny import finetuning, training


def read(folder: Path) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    table = find_caption_table(folder)
    found, notes = read_caption_table(table, folder, sorted(folder.rglob("*.png")))
    return {path.name: captions for path, captions in found.items()}, notes


@pytest.mark.parametrize(("style", "stop"), [("pipe", " ."), ("comma", "")])
def test_both_forms(style: str, stop: str, tmp_path: Path) -> None:
    found, notes = read(finetuning.flickr(tmp_path / "flickr", 2, style))
    assert found == {f"000{n}.png": tuple(f"caption {k}, of 000{n}{stop}" for k in range(3)) for n in range(2)}
    assert notes[0].endswith("6 of 2 pictures")


def test_a_list_in_a_cell_is_several_captions(tmp_path: Path) -> None:
    """The columns and the quoting of Flickr30k on the Hugging Face hub; lists that are none are left out and counted."""
    training.photos(tmp_path / "data" / "flickr30k-images", 3)
    rows = [
        ("raw", "sentids", "split", "filename", "img_id"),
        (json.dumps(["Two men, outside.", 'A "friend" waves.']), "[0, 1]", "train", "0000.png", 0),
        (json.dumps(["A dog runs."]), "[2]", "test", "0001.png", 1),
        ('["A cat', "[3]", "val", "0002.png", 2),
        ("[1, 2]", "[4]", "val", "0002.png", 2),
        ("[]", "[5]", "val", "0002.png", 2),
    ]
    with (tmp_path / "data" / "flickr_annotations_30k.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    found, notes = read(tmp_path / "data")
    assert found == {"0000.png": ("Two men, outside.", 'A "friend" waves.'), "0001.png": ("A dog runs.",)}
    assert notes == [
        "captions from flickr_annotations_30k.csv: 3 of 2 pictures",
        "flickr_annotations_30k.csv: 3 lines without picture or caption are left out, first line 4",
    ]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    """Flickr30k itself has a line without its last delimiter, and names pictures that may not be there."""
    folder = finetuning.flickr(tmp_path / "flickr", 2)
    table = folder / "results.csv"
    table.write_text(table.read_text() + '\n0001.png| 4   a dog\nghost.png| 0| a "ghost\n\n0001.png| 4| the fourth')
    found, notes = read(folder)
    assert len(found["0001.png"]) == 4
    assert notes[1:] == [
        "results.csv: 1 lines without picture or caption are left out, first line 8",
        "results.csv names pictures that are not there: 1, first ghost.png",
    ]


def test_an_unquoted_comma_belongs_to_the_caption(tmp_path: Path) -> None:
    training.photos(tmp_path / "data", 1)
    (tmp_path / "data" / "captions.csv").write_text("file_name,text\n0000.png,a fox, a hare and a cat\n")
    assert read(tmp_path / "data")[0] == {"0000.png": ("a fox, a hare and a cat",)}


def test_a_name_that_two_pictures_have_needs_its_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        training.photos(tmp_path / "data" / split, 1)
    table = tmp_path / "data" / "captions.csv"
    table.write_text("image,caption\ntrain/0000.png,a fox\nval/0000.png,a hare\n")
    pictures = sorted((tmp_path / "data").rglob("*.png"))
    found, _ = read_caption_table(table, tmp_path / "data", pictures)
    assert {path.parent.name: texts for path, texts in found.items()} == {"train": ("a fox",), "val": ("a hare",)}
    table.write_text("image,caption\ntrain/0000.png,a fox\n0000.png,a hare\n")
    with pytest.raises(UserError, match=r"line 3: '0000.png' may be .*train.* or .*val") as caught:
        read_caption_table(table, tmp_path / "data", pictures)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0000.png,a fox", "names no picture"),
        ("image,caption\nghost.png,a fox", "names none of the pictures"),
        ("", "names no picture"),
        ('image,caption\n0000.png,"a fox\n0001.png,a hare\n', "line 3 is within quotes that an earlier line opened"),
    ],
)
def test_what_is_no_such_table_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    training.photos(tmp_path / "data", 1)
    (tmp_path / "data" / "captions.csv").write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        read(tmp_path / "data")
    assert caught.value.exit_code == ExitCode.REFUSED
    assert "\n" not in str(caught.value)


def test_pictures_without_a_line_are_left_out(tmp_path: Path) -> None:
    training.photos(tmp_path / "data", 3)
    (tmp_path / "data" / "captions.csv").write_text("image,caption\n0000.png,a\n0002.png,b\n0002.png,c")
    found = read_dataset(
        tmp_path / "data", 64, step_px=16, buckets=False, validation_every=0, captions_file=tmp_path / "data" / "captions.csv"
    )
    assert [example.captions for example in found.train] == [("a",), ("b", "c")]
    assert any("left out: 1, first 0001.png" in note for note in found.notes)


def test_an_epoch_of_all_captions_holds_each_pair_once() -> None:
    counts = [3, 1, 2]
    order = Order([0, 0, 0], [1, 1, 2], counts, batch_size=1, seed=4, caption_dropout=0, flip=False, all_captions=True)
    assert order.batches_per_epoch == 3 + 1 + 4
    for epoch in range(3):
        draws = [draw for index in range(8) for draw in order.batch(epoch * 8 + index)]
        pairs = Counter((draw.example, draw.caption) for draw in draws)
        assert pairs == {(0, 0): 1, (0, 1): 1, (0, 2): 1, (1, 0): 1, (2, 0): 2, (2, 1): 2}
        assert len({draw.key for draw in draws}) == 8
