"""The folder that a preparation makes: taken over by the next run, safe from it, and mended after a kill at any moment."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from PIL import Image

from src.dataset import read_dataset
from src.errors import UserError
from src.preparation import contact_sheet, examining
from tests.tiny.faults import POSIX, assert_one_line, killed_at
from tests.tiny.photos import photo, photo_folder
from tests.tiny.preparation import assert_conserved, contents, manifest, run


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """The report takes a second of matplotlib; tests/test_prepare_dataset.py makes it."""
    monkeypatch.setattr(contact_sheet, "write_report", lambda *args: b"report")


def inodes(dst):
    return {path.name: path.stat().st_ino for path in dst.glob("*.png")}


def test_a_second_run_does_nothing_again(tmp_path, monkeypatch):
    src, dst = photo_folder(tmp_path / "src", 4), tmp_path / "dst"
    run(src, dst)
    before, made = inodes(dst), contents(dst)
    monkeypatch.setattr(examining, "read_image", lambda *args, **kwargs: pytest.fail("a picture is decoded again"))
    assert run(src, dst).taken_over == 4
    assert inodes(dst) == before
    assert contents(dst) == made


@pytest.mark.parametrize(
    "changes", [{"size": 128, "allow_upscale": True}, {"crop": "smart"}, {"background": "black"}, {"buckets": True}]
)
def test_a_changed_setting_makes_the_pictures_anew(tmp_path, changes):
    src, dst = photo_folder(tmp_path / "src", 3), tmp_path / "dst"
    run(src, dst)
    assert run(src, dst, **changes).taken_over == 0
    made = contents(dst)
    shutil.rmtree(dst)
    run(src, dst, **changes)
    assert contents(dst) == made


def test_a_changed_caption_leaves_the_pictures(tmp_path):
    src, dst = photo_folder(tmp_path / "src", 3), tmp_path / "dst"
    run(src, dst)
    before = inodes(dst)
    assert run(src, dst, trigger="ohwx").taken_over == 3
    assert inodes(dst) == before
    assert (dst / "0000.txt").read_text() == "a photo of ohwx"


def test_pictures_that_come_and_go_renumber_the_others_without_work(tmp_path, monkeypatch):
    src, dst = photo_folder(tmp_path / "src", 4), tmp_path / "dst"
    for name in "abcd":
        (src / f"{name}.txt").write_text(name)
    run(src, dst)
    by_source = {item["source"]: (dst / item["file_name"]).stat().st_ino for item in manifest(dst)["pictures"]}
    (src / "b.png").unlink()
    photo(9).save(src / "0.png")
    photo(10).save(src / "c2.png")
    outcome = run(src, dst)
    assert outcome.taken_over == 3
    assert [item.picture.source for item in outcome.prepared] == ["0.png", "a.png", "c.png", "c2.png", "d.png"]
    for item in manifest(dst)["pictures"]:
        assert by_source.get(item["source"], 0) in (0, (dst / item["file_name"]).stat().st_ino)
    assert_conserved(src, dst)
    made = contents(dst)
    shutil.rmtree(dst)
    run(src, dst)
    assert contents(dst) == made


def test_the_report_shows_the_pictures_that_were_left_out_and_no_others(tmp_path, monkeypatch):
    """Of the three of a first run the second loses its caption; its name goes to the third."""
    src, dst = photo_folder(tmp_path / "src", 3), tmp_path / "dst"
    for name in "ac":
        (src / f"{name}.txt").write_text(name)
    run(src, dst)
    expected, shown = (dst / "0001.png").read_bytes(), {}

    def report(outcome, config, thumbnails):
        shown.update({source: path.read_bytes() for source, path in thumbnails.items()})
        return b"report"

    monkeypatch.setattr(contact_sheet, "write_report", report)
    assert [skip.kind for skip in run(src, dst, trigger=None).skipped] == ["no caption"]
    assert shown == {"b.png": expected}
    assert (dst / "0001.png").read_bytes() != expected


def test_a_mask_that_could_not_be_opened_is_not_taken_for_none(tmp_path, monkeypatch):
    src, dst = photo_folder(tmp_path / "src", 1), tmp_path / "dst"
    mask = src / "a-masklabel.png"
    Image.new("L", (96, 80)).save(mask)

    def closed(read):
        def opened(path, *more):
            if path == mask:
                raise UserError(f"{path}: cannot be read (Permission denied)")
            return read(path, *more)

        return opened

    with monkeypatch.context() as patched:
        for name in ("sha256_of", "read_mask"):
            patched.setattr(examining, name, closed(getattr(examining, name)))
        assert [skip.kind for skip in run(src, dst).skipped] == ["unreadable mask"]
    mask.unlink()
    assert run(src, dst).skipped == ()
    Image.new("L", (96, 80)).save(mask)
    assert run(src, dst).masks == 1


def test_older_pictures_of_ours_are_taken_away_and_others_files_are_not(tmp_path):
    src, dst = photo_folder(tmp_path / "src", 4), tmp_path / "dst"
    run(src, dst)
    (dst / "latents.npz").write_bytes(b"kohya's cache")
    (src / "d.png").unlink()
    run(src, dst)
    assert not (dst / "0003.png").exists()
    assert not (dst / "0003.txt").exists()
    assert (dst / "latents.npz").read_bytes() == b"kohya's cache"


@pytest.mark.parametrize(
    "name", ["0001.png", "x.jpg", "sub/x.jpg", "notes.txt", "metadata.jsonl", "report.html", "dataset.json"]
)
def test_a_folder_with_others_data_is_refused(tmp_path, name):
    src, dst = photo_folder(tmp_path / "src", 2), tmp_path / "dst"
    (dst / name).parent.mkdir(parents=True)
    (dst / name).write_bytes(b"precious")
    with pytest.raises(UserError) as caught:
        run(src, dst, overwrite=True)
    assert_one_line(caught.value, name, str(dst))
    assert contents(dst) == {name: b"precious"}


@pytest.mark.parametrize("name", ["0001.txt", "0001.png", "metadata.jsonl"])
def test_what_was_changed_by_hand_is_not_lost(tmp_path, name):
    src, dst = photo_folder(tmp_path / "src", 2), tmp_path / "dst"
    run(src, dst)
    made = contents(dst)
    (dst / name).write_bytes(b"by hand")
    with pytest.raises(UserError, match="--overwrite") as caught:
        run(src, dst)
    assert_one_line(caught.value, name)
    assert (dst / name).read_bytes() == b"by hand"
    run(src, dst, overwrite=True)
    assert contents(dst) == made


def test_a_manifest_cannot_make_us_delete_others_files(tmp_path):
    src, dst = photo_folder(tmp_path / "src", 2), tmp_path / "dst"
    run(src, dst)
    (tmp_path / "victim.txt").write_text("precious")
    (dst / "keep.bin").write_text("precious")
    facts = manifest(dst)
    facts["files"] |= {"../victim.txt": "", "keep.bin": "", str(tmp_path / "victim.txt"): ""}
    (dst / "dataset.json").write_text(json.dumps(facts))
    run(src, dst)
    assert (tmp_path / "victim.txt").exists()
    assert (dst / "keep.bin").exists()
    facts["pictures"][0]["file_name"] = "../victim.png"
    (dst / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(UserError):
        run(src, dst)
    assert (tmp_path / "victim.txt").exists()
    assert (dst / "keep.bin").exists()


@POSIX
@pytest.mark.parametrize("first_run", [False, True], ids=["a folder anew", "a folder in place of another"])
def test_killed_at_any_write_the_same_command_finishes(tmp_path, monkeypatch, first_run):
    src, dst, reference = photo_folder(tmp_path / "src", 3), tmp_path / "dst", tmp_path / "reference"
    Image.new("L", (96, 80), 255).save(src / "c-masklabel.png")
    if first_run:
        run(src, dst)
        shutil.copytree(dst, tmp_path / "first")
        (src / "a.png").unlink()  # all the others move up by one
        photo(11).save(src / "f.png")
    run(src, reference)
    expected = contents(reference)
    step = int(os.environ.get("KILL_STEP", 8))
    boundary = 1 + (step // 2 if first_run else 0)  # shifted, so that both cases together see more of them
    while killed_at(boundary, lambda: run(src, dst)):
        run(src, dst)
        assert contents(dst) == expected, f"killed at boundary {boundary}"
        shutil.rmtree(dst)
        if first_run:
            shutil.copytree(tmp_path / "first", dst)
        boundary += step
    assert boundary > 60
    assert contents(dst) == expected


def test_what_is_done_before_a_kill_is_not_done_again(tmp_path, monkeypatch):
    src, dst = photo_folder(tmp_path / "src", 6), tmp_path / "dst"
    decoded, real = [], examining.read_image

    def read(path, **options):
        if len(decoded) == 4:
            raise KeyboardInterrupt
        decoded.append(path.name)
        return real(path, **options)

    monkeypatch.setattr(examining, "read_image", read)
    with pytest.raises(KeyboardInterrupt):
        run(src, dst)
    assert decoded == ["a.png", "b.png", "c.png", "d.png"]
    decoded.clear()
    run(src, dst)
    assert decoded == ["e.png", "f.png"]


def test_an_interrupted_folder_says_so_to_the_trainer(tmp_path, monkeypatch):
    src, dst = photo_folder(tmp_path / "src", 2), tmp_path / "dst"
    run(src, dst)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(contact_sheet, "write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        run(src, dst, trigger="another")
    with pytest.raises(UserError, match="interrupted"):
        read_dataset(dst, 64, step_px=8, buckets=False, validation_every=0)
