"""Folders of pictures as examples: sets, sizes and pixels worked out by hand."""

import json
import math
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from src import dataset, prepare_dataset
from src.buckets import bucket_sizes
from src.dataset import load_mask, load_picture, read_dataset
from src.errors import ExitCode, UserError
from src.images import read_image


def picture(path: Path, size: tuple[int, int] = (64, 64), caption: str | None = "a photo") -> Path:
    """A picture whose left half is red and whose lower half is blue, so that a cut or mirrored one is told."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), (0, 0, width // 2, height))
    image.paste((0, 0, 255), (0, height // 2, width, height))
    image.save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def read(folder: Path, resolution_px: int = 64, **changes: object) -> dataset.Dataset:
    settings = {"step_px": 32, "buckets": True, "validation_every": None} | changes
    return read_dataset(folder, resolution_px, **settings)


def refusal(code: ExitCode, folder: Path, *args: object, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, *args, **changes)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders ---


def test_any_tree_of_pictures_is_read_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "deep/er/c.webp", ".hidden/x.png", ".y.png"):
        picture(tmp_path / name, caption=f"this is {name}")
    (tmp_path / "notes.md").write_text("no picture")
    found = read(tmp_path)
    assert [item.path.relative_to(tmp_path).as_posix() for item in found.train] == ["a.jpg", "b.png", "deep/er/c.webp"]
    assert found.train[1].captions == ("this is b.png",)
    assert found.trigger is None
    assert found.held_out == ()


def test_kohya_folders_give_repeats_and_captions(tmp_path: Path) -> None:
    picture(tmp_path / "10_sks dog" / "a.png", caption=None)
    picture(tmp_path / "2_cat" / "b.png", caption="a cat")
    found = read(tmp_path)
    assert [(item.repeats, item.captions) for item in found.train] == [(10, ("sks dog",)), (2, ("a cat",))]


def test_one_caption_may_stand_for_all(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption=None)
    picture(tmp_path / "b.png")
    found = read(tmp_path, fixed_caption="a photo of a dog", weight=0.5)
    assert [(item.captions, item.weight) for item in found.train] == [(("a photo of a dog",), 0.5)] * 2


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert "prepare_dataset" in refusal(ExitCode.NOT_FOUND, tmp_path / "nowhere")
    assert "is not a folder" in refusal(ExitCode.NOT_FOUND, picture(tmp_path / "sets" / "a.png"))
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refusal(ExitCode.REFUSED, tmp_path / "empty")


def test_pictures_without_captions_are_all_named(tmp_path: Path) -> None:
    for index in range(12):
        picture(tmp_path / f"{index:02}.png", caption="  \n" if index % 2 else None)
    message = refusal(ExitCode.REFUSED, tmp_path)
    assert "00.png, 01.png" in message
    assert "and 2 more" in message
    assert "--trigger" in message


def test_a_prepared_folder_is_read_with_its_trigger_repeats_and_cuts(tmp_path: Path) -> None:
    """Prepared by the program itself. SDXL is told of both cuts as of one: 300x100 -> centre 100x100 -> 64x64 -> 64x64."""
    picture(tmp_path / "raw" / "3_dog" / "a.png", (300, 100), caption="sks dog on grass")
    picture(tmp_path / "raw" / "3_dog" / "b.png", (200, 200), caption=None)
    folder = tmp_path / "prepared"
    prepare = [
        "--src",
        str(tmp_path / "raw"),
        "--dst",
        str(folder),
        "--size",
        "64",
        "--trigger",
        "sks dog",
        "--keep-duplicates",
    ]
    assert prepare_dataset.main([*prepare, "--keep-blurred", "--workers", "1"]) == 0
    found = read(folder, 32)
    assert found.trigger == "sks dog"
    first, second = found.train
    assert "sks dog" in first.captions[0]
    assert (first.size_px, first.original_px, first.crop_top_left) == ((32, 32), (300, 100), (0, 32))
    assert (second.original_px, second.crop_top_left) == ((200, 200), (0, 0))
    assert [item.repeats for item in found.train] == [3, 3]
    (folder / "0001.png").unlink()
    assert "0001.png" in refusal(ExitCode.NOT_FOUND, folder)


def test_a_picture_without_a_caption_is_trained_with_the_trigger(tmp_path: Path) -> None:
    picture(tmp_path / "0000.png", caption=None)
    picture(tmp_path / "0001.png", caption="sks dog on grass")
    (tmp_path / "dataset.json").write_text(json.dumps({"trigger": "sks dog", "pictures": []}))
    found = read(tmp_path)
    assert [item.captions for item in found.train] == [("sks dog",), ("sks dog on grass",)]
    assert any("1 of 2 pictures have no caption" in note and "'sks dog'" in note for note in found.notes)


def test_an_emptied_caption_of_a_prepared_folder_is_none(tmp_path: Path) -> None:
    """Its own metadata still hold the old one."""
    for name in ("a", "b"):
        picture(tmp_path / "raw" / f"{name}.png", (200 if name == "a" else 100, 100), caption=f"sks dog {name}")
    prepare = ["--src", str(tmp_path / "raw"), "--dst", str(tmp_path / "made"), "--size", "64", "--trigger", "sks dog"]
    assert prepare_dataset.main([*prepare, "--keep-duplicates", "--keep-blurred", "--workers", "1"]) == 0
    assert [item.captions for item in read(tmp_path / "made").train] == [("sks dog a",), ("sks dog b",)]
    (tmp_path / "made" / "0000.txt").write_text("\n")
    found = read(tmp_path / "made")
    assert [item.captions for item in found.train] == [("sks dog",), ("sks dog b",)]
    assert any("1 of 2 pictures have no caption" in note for note in found.notes)
    (tmp_path / "made" / "0001.txt").unlink()  # one that is not there says nothing: some keep metadata alone
    assert read(tmp_path / "made").train[1].captions == ("sks dog b",)


def test_endings_in_capitals_are_read_too(tmp_path: Path) -> None:
    """As cameras, and programs of Windows, write them."""
    picture(tmp_path / "IMG_1.JPG", caption=None)
    (tmp_path / "IMG_1.TXT").write_text("a photo")
    Image.new("L", (64, 64)).save(tmp_path / "IMG_1-masklabel.PNG")
    [item] = read(tmp_path, masked=True).train
    assert item.captions == ("a photo",)
    assert item.mask.samefile(tmp_path / "IMG_1-masklabel.PNG")


def test_damaged_headers_lead_to_preparation(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name in ("b.png", "c.png"):
        picture(tmp_path / name).write_bytes(b"no picture")
    message = refusal(ExitCode.REFUSED, tmp_path)
    assert "b.png" in message
    assert "1 more" in message
    assert "python -m src.prepare_dataset" in message


def test_a_caption_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_bytes("Käse".encode("latin-1"))
    assert "a.txt" in refusal(ExitCode.REFUSED, tmp_path)


# --- sizes ---


@pytest.mark.parametrize(("resolution_px", "step_px"), [(512, 64), (1024, 64), (128, 32), (64, 64), (768, 8)])
def test_buckets_have_about_the_same_number_of_pixels(resolution_px: int, step_px: int) -> None:
    sizes = bucket_sizes(resolution_px, step_px)
    assert (resolution_px, resolution_px) in sizes
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % step_px == height % step_px == 0
        assert width * height <= resolution_px**2
        assert (width + step_px) * (height + step_px) > resolution_px**2  # no room for one step more of both
        assert 1 / 4 <= width / height <= 4


def test_a_bucket_has_the_nearest_shape(tmp_path: Path) -> None:
    shapes = [(300, 300), (640, 480), (300, 1000), (5000, 100), *((width, 61) for width in range(15, 240, 9))]
    for index, size in enumerate(shapes):
        picture(tmp_path / f"{index:02}.png", size)
    sizes = bucket_sizes(512, 64)
    for item, (width, height) in zip(read(tmp_path, 512, step_px=64, validation_every=0).train, shapes):
        distances = {size: abs(math.log(size[0] / size[1] / (width / height))) for size in sizes}
        assert distances[item.size_px] == pytest.approx(min(distances.values()))
        assert item.original_px == (width, height)
    assert {item.size_px for item in read(tmp_path, 512, buckets=False).train} == {(512, 512)}


def test_a_resolution_between_the_steps_is_refused_for_buckets_alone(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    message = refusal(ExitCode.USAGE, tmp_path, 520, step_px=64)
    assert "512 or 576" in message
    assert "--no-buckets" in message
    assert read(tmp_path, 520, step_px=64, buckets=False).train[0].size_px == (520, 520)


def test_enlarged_pictures_are_counted(tmp_path: Path) -> None:
    picture(tmp_path / "small.png", (32, 40))
    picture(tmp_path / "big.png", (90, 90))
    found = read(tmp_path)
    [note] = [note for note in found.notes if "enlarged" in note]
    assert note.startswith("1 of 2 pictures")
    assert "small.png (32x40, by 2)" in note
    assert load_picture(found.train[1]).size == (64, 64)
    assert not any("enlarged" in note for note in read(tmp_path, 32).notes)


def test_the_sizes_are_listed(tmp_path: Path) -> None:
    for name, size in {"a": (90, 90), "b": (95, 90), "c": (200, 50)}.items():
        picture(tmp_path / f"{name}.png", size)
    assert "sizes: 64x64 (2), 128x32 (1)" in read(tmp_path).notes


# --- pixels ---


def test_a_picture_is_scaled_and_cut_at_its_centre(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (300, 100))
    [item] = read(tmp_path, buckets=False).train
    assert item.crop_top_left == (0, 64)  # 300x100 is scaled to 192x64; 64 of 192 are kept from 64 on
    scaled = Image.open(item.path).resize((192, 64), Image.Resampling.LANCZOS).crop((64, 0, 128, 64))
    difference = max(
        abs(one - other) for one, other in zip(load_picture(item).tobytes(), scaled.tobytes())
    )  # scaled then cut, or at once: rounding alone
    assert difference <= 2


@pytest.mark.parametrize("place", ["jpg", "png", "png, behind the pixels"])
def test_a_picture_stands_upright(tmp_path: Path, place: str) -> None:
    path = picture(tmp_path / f"a.{place[:3]}", (128, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees
    if "behind" in place:
        data, body = path.read_bytes(), b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        path.write_bytes(data[:-12] + chunk + data[-12:])  # the last 12 bytes are the end chunk
    else:
        Image.open(path).save(path, exif=exif)
    [item] = read(tmp_path).train
    assert item.original_px == (64, 128)
    assert read_image(path).size == (64, 128)
    assert load_picture(item).size == item.size_px


def test_a_mirrored_picture_is_the_mirror_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (80, 64))
    [item] = read(tmp_path, buckets=False).train
    assert load_picture(item, flip=True).tobytes() == ImageOps.mirror(load_picture(item)).tobytes()
    assert load_picture(item, flip=True).tobytes() != load_picture(item).tobytes()


def test_a_damaged_picture_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", (200, 200))
    path.write_bytes(path.read_bytes()[:-100])
    [item] = read(tmp_path).train
    with pytest.raises(UserError, match=r"a\.png.*prepare_dataset"):
        load_picture(item)


def test_masks_belong_to_their_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (300, 100))
    picture(tmp_path / "b.png")
    mask = Image.new("L", (600, 200), 0)
    mask.paste(255, (200, 0, 300, 200))  # the left half of the centre, in twice the size
    mask.save(tmp_path / "a-masklabel.png")
    found = read(tmp_path, buckets=False, masked=True)
    assert [item.path.name for item in found.train] == ["a.png", "b.png"]
    assert any("1 of 2 pictures have no mask" in note for note in found.notes)
    first, second = found.train
    assert load_mask(second) is None
    cut = load_mask(first)
    assert (cut.mode, cut.size) == ("L", (64, 64))
    assert (cut.getpixel((8, 32)), cut.getpixel((56, 32))) == (255, 0)
    assert load_mask(first, flip=True).getpixel((8, 32)) == 0
    assert [item.mask for item in read(tmp_path).train] == [None, None]  # not asked for


def test_masks_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (300, 100))
    assert "a-masklabel.png" in refusal(ExitCode.REFUSED, tmp_path, masked=True)
    Image.new("L", (100, 300)).save(tmp_path / "a-masklabel.png")
    assert "not the shape" in refusal(ExitCode.REFUSED, tmp_path, masked=True)


# --- held out ---


@pytest.mark.parametrize(
    ("count", "every", "held_out"),
    [(9, None, []), (10, None, [9]), (25, None, [9, 19]), (25, 0, []), (5, 2, [1, 3]), (3, 4, []), (2, 2, [1])],
)
def test_every_nth_picture_is_held_out(tmp_path: Path, count: int, every: int | None, held_out: list[int]) -> None:
    for index in range(count):
        picture(tmp_path / f"{index:02}.png", (64 + index, 64))
    found = read(tmp_path, validation_every=every)
    assert [int(item.path.stem) for item in found.held_out] == held_out
    assert [int(item.path.stem) for item in found.train] == [index for index in range(count) if index not in held_out]


def test_a_file_that_is_there_twice_is_not_held_out(tmp_path: Path) -> None:
    """Of 1 2 2 3 4 every second one that is there once; and where there is no such, none."""
    for name, width in {"a": 1, "b": 2, "c": 2, "d": 3, "e": 4}.items():
        picture(tmp_path / f"{name}.png", (64 + width, 64))
    found = read(tmp_path, validation_every=2)
    assert [item.path.stem for item in found.held_out] == ["d"]
    assert [item.path.stem for item in found.train] == ["a", "b", "c", "e"]
    assert "equal files are learnt and never held out: 2 of 5" in found.notes
    for name in "ade":
        (tmp_path / f"{name}.png").unlink()
    assert read(tmp_path, validation_every=2).held_out == ()


def test_holding_out_fewer_than_was_asked_for_is_said(tmp_path: Path) -> None:
    for index in range(6):
        picture(tmp_path / f"{index}.png", (64 + index, 64))
    found = read(tmp_path, validation_every=2, most_held_out=2)
    assert [item.path.stem for item in found.held_out] == ["2", "5"]
    assert "one picture in 3 is held out and not one in 2" in found.notes[-1]
    assert not [note for note in read(tmp_path, validation_every=2, most_held_out=3).notes if "held out" in note]


def test_all_pictures_are_never_held_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert "2 or more" in refusal(ExitCode.USAGE, tmp_path, validation_every=1)


def test_the_digest_changes_with_all_that_a_training_sees(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", (80, 64))
    Image.new("L", (64, 64)).save(tmp_path / "a-masklabel.png")
    digests = [read(tmp_path).digest]
    assert read(tmp_path).digest == digests[0]
    digests += [
        read(tmp_path, 128).digest, read(tmp_path, masked=True).digest, read(tmp_path, validation_every=2).digest,
        read(tmp_path, weight=0.5).digest, read(tmp_path, fixed_caption="x").digest,
    ]  # fmt: skip
    Image.new("L", (64, 64), 9).save(tmp_path / "a-masklabel.png")
    digests.append(read(tmp_path, masked=True).digest)
    (tmp_path / "a.txt").write_text("another photo")
    digests.append(read(tmp_path).digest)
    Image.new("RGB", (64, 64), "green").save(tmp_path / "a.png")
    digests.append(read(tmp_path).digest)
    picture(tmp_path / "3_more" / "c.png")
    digests.append(read(tmp_path).digest)
    assert len(set(digests)) == len(digests)
