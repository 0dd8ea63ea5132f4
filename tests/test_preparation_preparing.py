"""A preparation as a whole: what goes in comes out or is listed, nothing in the source changes, and a kill at any moment is mended."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from src.errors import ExitCode, UserError
from src.preparation import contact_sheet, preparing
from tests.tiny.faults import POSIX, assert_one_line, seconds
from tests.tiny.photos import fingerprint, photo, photo_folder
from tests.tiny.pictures import encoded, noise
from tests.tiny.preparation import assert_conserved, contents, manifest, run


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """The report takes a second of matplotlib; tests/test_prepare_dataset.py makes it."""
    monkeypatch.setattr(contact_sheet, "write_report", lambda *args: b"report")


# --- the law, on hostile trees

PNG = encoded(photo(1, 90, 70), "PNG")
MATERIAL = {
    **{f"photo {seed}": encoded(photo(seed, 100, 80), "PNG") for seed in range(4)},
    "copy": encoded(photo(0, 200, 160).resize((120, 96)), "JPEG", quality=60),
    "blurred": encoded(photo(9, 100, 80).filter(ImageFilter.GaussianBlur(9)), "PNG"),
    "tiny": encoded(photo(8, 30, 90), "PNG"),
    "cut off": PNG[: len(PNG) // 2],
    "a bit flipped": PNG[:60] + bytes([PNG[60] ^ 4]) + PNG[61:],
    "empty": b"",
    "text": b"a dog\n\nanother dog",
    "html": b"<html>",
    "bomb": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\2\0\0\0" + b"\0" * 20,
    "metadata": b'{"file_name": "a.png", "text": "from metadata"}\n{"file_name": "b.jpg", "captions": ["x", "y"]}\n',
}  # fmt: skip
NAMES = ["a.png", "b.jpg", "c.webp", "a.txt", "b.caption", "a-masklabel.png", "b-masklabel.png", "metadata.jsonl", "e\u0301.PNG",
         "f g.gif", ".h.png", "i.heif", "j", "k.png ", "l\n.png", "m\udcff.png", "CON.png", "n.psd", "-masklabel.png", ".png"]  # fmt: skip
FOLDERS = ["", "10_sks dog", "deep/er", "x.png", "a-masklabel.png"]
SPECIAL = ["pipe", "link", "loop", "dangling"]


def build(root: Path, tree) -> None:
    for folder, name, content in tree:
        path = root / folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if content == "pipe":
                os.mkfifo(path)
            elif content in SPECIAL:
                os.symlink({"link": "/etc/hostname", "loop": ".", "dangling": "nowhere"}[content], path)
            else:
                with open(path, "xb") as file:
                    file.write(MATERIAL[content])
        except OSError:  # a file where a folder should be, or twice the same name
            continue


@POSIX
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.lists(
        st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.sampled_from([*MATERIAL, *MATERIAL, *SPECIAL])), max_size=14
    ),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "keep_blurred": st.just(True), "keep_duplicates": st.just(True), "allow_upscale": st.just(True),
            "trigger": st.none(), "keep_uncaptioned": st.just(True), "buckets": st.just(True), "crop": st.just("smart"),
        },
    ),
)  # fmt: skip
def test_every_file_is_accounted_for_and_none_is_changed(tmp_path_factory, tree, changes):
    root = tmp_path_factory.mktemp("tree")
    src, dst = root / "src", root / "dst"
    src.mkdir()
    build(src, tree)
    before = fingerprint(src)
    message = None
    try:
        with seconds(20):
            run(src, dst, **changes)
    except UserError as error:
        message = str(error)
    if message is None:
        assert_conserved(src, dst)
    else:
        assert "\n" not in message
        assert [name for name in contents(dst) if not name.startswith(".preparing/")] == []
    assert fingerprint(src) == before
    shutil.rmtree(root)


def test_a_name_with_a_line_break_stays_on_one_line(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    (src / "a\nb.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"^[^\n]*; first: a.b\.png: [^\n]*; see --help$"):
        run(src, tmp_path / "dst")


# --- what is written


def test_the_files_and_what_is_in_them(tmp_path):
    src = photo_folder(tmp_path / "src", 2)
    (src / "a.txt").write_text("asleep\nawake")
    outcome = run(src, tmp_path / "dst")
    made = contents(tmp_path / "dst")
    assert made["0000.txt"] == b"sks dog, asleep\nsks dog, awake"
    assert made["0001.txt"] == b"a photo of sks dog"
    rows = [json.loads(line) for line in made["metadata.jsonl"].splitlines()]
    assert rows[0] == {"file_name": "0000.png", "text": "sks dog, asleep", "captions": ["sks dog, asleep", "sks dog, awake"]}
    assert rows[1] == {"file_name": "0001.png", "text": "a photo of sks dog", "captions": ["a photo of sks dog"]}
    with Image.open(tmp_path / "dst/0000.png") as picture:
        assert (picture.size, picture.mode, picture.info) == ((64, 64), "RGB", {})
    facts = manifest(tmp_path / "dst")
    assert facts["trigger"] == "sks dog"
    assert facts["settings"]["size"] == 64
    assert facts["pictures"][0]["source_px"] == [96, 80]
    assert facts["pictures"][0]["crop_px"] == [8, 0, 88, 80]
    assert outcome.counts() == {"found": 3, "prepared": 2, "masks": 0, "caption_files": 1, "skipped": {}}


def test_without_several_captions_metadata_has_two_columns(tmp_path):
    run(photo_folder(tmp_path / "src", 2), tmp_path / "dst")
    row = json.loads((tmp_path / "dst/metadata.jsonl").read_text().splitlines()[0])
    assert list(row) == ["file_name", "text"]


def test_kohya_folders_give_captions_and_repeats(tmp_path):
    src = tmp_path / "src"
    photo_folder(src / "10_sks dog", 1)
    photo(7).save(src / "z.png")
    run(src, tmp_path / "dst", trigger=None, keep_uncaptioned=True)
    rows = [json.loads(line) for line in (tmp_path / "dst/metadata.jsonl").read_text().splitlines()]
    assert [(row["text"], row["repeats"]) for row in rows] == [("sks dog", 10), ("", 1)]


def test_pictures_of_one_stem_do_not_collide(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    photo(1).save(src / "a.png")
    photo(2).save(src / "a.jpg", quality=95)
    assert len(run(src, tmp_path / "dst").prepared) == 2


def test_the_same_bytes_twice_can_both_be_kept(tmp_path):
    src = photo_folder(tmp_path / "src", 1)
    shutil.copy(src / "a.png", src / "b.png")
    assert [item.file_name for item in run(src, tmp_path / "dst", keep_duplicates=True).prepared] == ["0000.png", "0001.png"]
    assert (tmp_path / "dst/0000.png").read_bytes() == (tmp_path / "dst/0001.png").read_bytes()


def test_masks_are_cut_as_their_pictures(tmp_path):
    """A picture that is white where its mask is; the smart crop moves with the detail, and both are cut alike."""
    src = tmp_path / "src"
    src.mkdir()
    picture, mask = Image.new("RGB", (300, 100), (90, 90, 95)), Image.new("L", (300, 100))
    picture.paste(noise(60), (230, 20))
    for image, colour in ((picture, "white"), (mask, 255)):
        image.paste(colour, (250, 40, 270, 60))
    picture.save(src / "a.png")
    mask.resize((600, 200), Image.Resampling.NEAREST).save(src / "a-masklabel.png")  # another size of the same shape will do
    outcome = run(src, tmp_path / "dst", crop="smart")
    assert outcome.masks == 1
    with Image.open(tmp_path / "dst/0000.png") as image, Image.open(tmp_path / "dst/0000-masklabel.png") as cut:
        white = image.convert("L").point([255 if value > 250 else 0 for value in range(256)])
        assert cut.mode == "L"
        box = cut.point([255 if value > 200 else 0 for value in range(256)]).getbbox()
        assert all(abs(ours - theirs) <= 1 for ours, theirs in zip(box, white.crop((0, 0, 64, 64)).getbbox()))
    assert_conserved(src, tmp_path / "dst")


def test_the_mask_and_the_caption_of_a_picture_that_is_left_out_are_listed(tmp_path):
    src = photo_folder(tmp_path / "src", 2)
    photo(5, 30, 30).save(src / "b.png")
    Image.new("L", (30, 30)).save(src / "b-masklabel.png")
    (src / "b.txt").write_text("small")
    outcome = run(src, tmp_path / "dst")
    kinds = {"b.png": "too small", "b-masklabel.png": "mask without picture", "b.txt": "unused caption"}
    assert {skip.source: skip.kind for skip in outcome.skipped} == kinds
    assert outcome.skipped_pictures == {"too small": 1}
    assert_conserved(src, tmp_path / "dst")


def test_endings_in_capitals_are_read_too(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    photo(1).save(src / "IMG_1.PNG")
    (src / "IMG_1.TXT").write_text("asleep")
    Image.new("L", (96, 80)).save(src / "IMG_1-masklabel.PNG")
    outcome = run(src, tmp_path / "dst")
    assert (outcome.prepared[0].captions, outcome.prepared[0].caption_from) == (("sks dog, asleep",), "IMG_1.TXT")
    assert (outcome.masks, outcome.skipped) == (1, ())
    assert_conserved(src, tmp_path / "dst")


def test_a_mask_of_another_shape_is_listed(tmp_path):
    src = photo_folder(tmp_path / "src", 1)
    Image.new("L", (50, 80)).save(src / "a-masklabel.png")
    outcome = run(src, tmp_path / "dst")
    assert [(skip.source, skip.kind) for skip in outcome.skipped] == [("a-masklabel.png", "unreadable mask")]
    assert "50x80 is not the shape" in outcome.skipped[0].reason
    assert not (tmp_path / "dst/0000-masklabel.png").exists()


def test_several_processes_make_the_same_bytes_as_one(tmp_path):
    src = photo_folder(tmp_path / "src", 8)
    (src / "d.txt").write_text("asleep")
    (src / "broken.png").write_bytes(b"x")
    run(src, tmp_path / "dst", workers=1)
    serial = contents(tmp_path / "dst")
    shutil.rmtree(tmp_path / "dst")
    run(src, tmp_path / "dst", workers=2)
    assert contents(tmp_path / "dst") == serial


def test_a_dry_run_writes_nothing_and_decides_the_same(tmp_path):
    src = photo_folder(tmp_path / "src", 3)
    photo(0).save(src / "copy.png")
    dry = run(src, tmp_path / "dst", dry_run=True)
    assert not (tmp_path / "dst").exists()
    wet = run(src, tmp_path / "dst")
    assert dry.skipped == wet.skipped
    assert dry.counts() == wet.counts()


# --- what is refused


def test_source_and_destination_may_not_overlap(tmp_path):
    src = photo_folder(tmp_path / "src", 1)
    before = fingerprint(tmp_path)
    os.symlink(src, tmp_path / "link")
    for dst in (src, src / "out", src / "deep/out", tmp_path, tmp_path / "link", tmp_path / "link/out", src / ".." / "src"):
        with pytest.raises(UserError) as caught:
            run(src, dst)
        assert caught.value.exit_code == ExitCode.USAGE
        assert_one_line(caught.value, "--dst", "never changed")
    os.unlink(tmp_path / "link")
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"src": "nowhere"}, "no such folder"),
        ({"src": ""}, "--src is missing"),
        ({"dst": ""}, "--dst is missing"),
        ({"size": 500}, "nearest: 496 or 504"),
        ({"size": 520, "buckets": True}, "nearest: 512 or 576"),
        ({"size": 8}, "outside 64"),
        ({"background": "nocolour"}, "--background"),
        ({"crop": "left"}, "--crop left: choose center or smart"),
        ({"trigger": " "}, "--trigger"),
        ({"workers": 0}, "workers 0"),
        ({"caption": "blip", "captioner": "nowhere/model"}, "--captioner"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, changes, part):
    src = photo_folder(tmp_path / "src", 1)
    with pytest.raises(UserError) as caught:
        run(**{"src": src, "dst": tmp_path / "dst", **changes})
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "dst").exists()


def test_an_empty_folder_and_one_without_a_usable_picture_are_refused(tmp_path):
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        run(tmp_path / "src", tmp_path / "dst")
    (tmp_path / "src/a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no picture is left \(1 unreadable; first: a.png"):
        run(tmp_path / "src", tmp_path / "dst")


def test_captions_that_are_not_utf8_are_refused_before_anything_is_written(tmp_path):
    src = photo_folder(tmp_path / "src", 2)
    (src / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a.txt \(byte 3 is not UTF-8\)"):
        run(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_second_preparation_of_the_same_folder_is_refused(tmp_path, monkeypatch):
    src, dst = photo_folder(tmp_path / "src", 1), tmp_path / "dst"

    def meanwhile(*args):
        with pytest.raises(UserError, match="at work there"):
            run(src, dst)
        return real(*args)

    real = preparing._prepare
    monkeypatch.setattr(preparing, "_prepare", meanwhile)
    run(src, dst)
    assert_conserved(src, dst)


def test_a_full_disk_is_one_line_and_the_rest_goes_on_later(tmp_path, monkeypatch):
    src, dst = photo_folder(tmp_path / "src", 4), tmp_path / "dst"
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 9:
            raise OSError(28, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as caught:
        run(src, dst)
    assert_one_line(caught.value, "No space left", "free some space")
    monkeypatch.setattr(os, "fsync", real)
    run(src, dst)
    assert_conserved(src, dst)
