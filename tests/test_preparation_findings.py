"""Which pictures are left out: on photos that were blurred, shrunk, recompressed, and on photos that only look alike."""

from __future__ import annotations

import io

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from src.preparation.examining import Examined, sharpness
from src.preparation.findings import duplicates, find
from src.preparation.settings import PrepareConfig
from tests.tiny.photos import photo


def examined(picture: Image.Image, name: str, **facts) -> Examined:
    colours = picture.resize((4, 4), Image.Resampling.BOX).tobytes().hex()
    known = {"source_px": picture.size, "size_px": (64, 64), "sharpness": 100.0, "sha256": "x"}
    return Examined(name, phash=str(imagehash.phash(picture)), colours=colours, **{**known, **facts})


def recompressed(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def halved(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BILINEAR)


def kept_and_skipped(*pictures: Examined, captioned: bool = True, **settings):
    kept, skipped = find(pictures, lambda source: captioned, lambda item: False, PrepareConfig(**settings))
    return [item.source for item in kept], {skip.source: skip.kind for skip in skipped}, kept


@pytest.mark.parametrize("seed", range(8))
def test_copies_are_found_and_the_largest_is_kept(seed):
    original = photo(seed, 400, 300)
    copies = {
        "halved": halved(original),
        "recompressed": recompressed(original, 30),
        "both": recompressed(halved(original), 30),
        "another format": original.copy(),
    }
    pictures = [examined(copy, name) for name, copy in copies.items()] + [examined(original, "original", sharpness=101.0)]
    assert duplicates(pictures, 4) == dict.fromkeys(copies, "original")


def test_different_photos_are_no_duplicates():
    pictures = [examined(photo(seed, 300, 300), str(seed)) for seed in range(120)]
    assert duplicates(pictures, 4) == {}


def test_the_same_shape_in_another_colour_is_no_duplicate():
    """The perceptual hash sees no colour: a red and a green ball are one to it."""
    balls = []
    for colour in ("red", "green"):
        picture = Image.new("RGB", (200, 200), "white")
        picture.paste(colour, (40, 60, 150, 170))
        balls.append(examined(picture, colour))
    assert imagehash.hex_to_hash(balls[0].phash) - imagehash.hex_to_hash(balls[1].phash) <= 4
    assert duplicates(balls, 4) == {}


def test_the_figure_at_another_place_is_no_duplicate():
    def drawn(x, y):
        picture = Image.new("RGB", (128, 128), "white")
        picture.paste("blue", (x, y, x + 30, y + 50))
        picture.paste("orange", (x + 5, y - 20, x + 25, y))
        return picture

    places = [(10, 30), (40, 30), (80, 30), (10, 70), (45, 70), (90, 70), (20, 50), (60, 55)]
    assert duplicates([examined(drawn(*place), str(place)) for place in places], 4) == {}


def test_of_equal_size_the_one_with_a_caption_is_kept_then_the_sharpest():
    picture = photo(0, 200, 200)
    pictures = [examined(picture, name, sharpness=value) for name, value in {"a": 90.0, "b": 100.0, "c": 95.0}.items()]
    assert duplicates(pictures, 4) == {"a": "b", "c": "b"}
    assert duplicates(pictures, 4, lambda item: item.source == "a") == {"b": "a", "c": "a"}


def test_a_chain_of_small_differences_swallows_nothing():
    """0 is near 3 and 3 is near 6, but 0 is far from 6: both ends stay."""
    hashes = {"a": 0, "b": 0b111, "c": 0b111111}
    pictures = [Examined(n, source_px=(9, 9), size_px=(8, 8), phash=f"{h:016x}", colours="00" * 48) for n, h in hashes.items()]
    assert duplicates(pictures, 4) == {"b": "a"}


def test_the_distance_is_that_of_imagehash():
    dice = np.random.default_rng(0)
    pictures = []
    for name in range(40):
        bits = int(dice.integers(0, 1 << 8))  # few bits, so that many pairs are near
        pictures.append(Examined(str(name), source_px=(9, 9), size_px=(8, 8), phash=f"{bits:016x}", colours="00" * 48))
    by_name = {item.source: imagehash.hex_to_hash(item.phash) for item in pictures}
    found = duplicates(pictures, 2)
    kept = [name for name in by_name if name not in found]
    assert all(by_name[name] - by_name[other] <= 2 for name, other in found.items())
    assert all(by_name[a] - by_name[b] > 2 for a in kept for b in kept if a != b)


def test_sharpness_is_the_variance_of_the_laplacian():
    picture = photo(5, 64, 64)
    grey = np.asarray(picture.convert("L"), dtype=float)
    laplacian = ndimage.convolve(grey, [[0, 1, 0], [1, -4, 1], [0, 1, 0]])[1:-1, 1:-1]
    cells = [cell for row in np.array_split(laplacian, 8, 0) for cell in np.array_split(row, 8, 1)]
    assert sharpness(picture) == pytest.approx(max(cell.var() for cell in cells), rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_blur_is_found_and_depth_of_field_is_not(seed):
    threshold = PrepareConfig().blur_threshold
    sharp = photo(seed, 512, 512)
    blurred = sharp.filter(ImageFilter.GaussianBlur(3))
    portrait = blurred.copy()
    portrait.paste(sharp.crop((128, 128, 384, 384)), (128, 128))  # the subject is sharp, the background is not
    assert sharpness(blurred) < threshold < sharpness(portrait) <= 2 * sharpness(sharp)


def test_a_flat_or_tiny_picture_has_a_sharpness():
    assert sharpness(Image.new("RGB", (512, 512))) == 0
    assert sharpness(Image.new("RGB", (2, 2))) == 0


@pytest.mark.parametrize(
    ("facts", "kind", "flag"),
    [
        ({"problem": "broken"}, "unreadable", None),
        ({"source_px": (100, 40)}, "too small", "allow_upscale"),
        ({"sharpness": 39.0}, "blurred", "keep_blurred"),
    ],
)
def test_findings_and_what_overrides_them(facts, kind, flag):
    bad, good = examined(photo(1), "bad", **facts), examined(photo(2), "good")
    assert kept_and_skipped(bad, good)[:2] == (["good"], {"bad": kind})
    if flag:
        names, skipped, kept = kept_and_skipped(bad, good, **{flag: True})
        assert (names, skipped) == (["bad", "good"], {})
        assert f"kept although {kind}" in kept[0].notes[0]
        assert kept[1].notes == []


def test_a_note_of_an_earlier_run_neither_stays_nor_adds_up():
    bad = examined(photo(1), "bad", sharpness=39.0)
    for settings in ({"keep_blurred": True}, {"keep_blurred": True}, {"blur_threshold": 1.0}):
        (bad,) = kept_and_skipped(bad, **settings)[2]
        assert len(bad.notes) == ("keep_blurred" in settings)


def test_no_caption():
    picture = examined(photo(1), "a")
    assert kept_and_skipped(picture, captioned=False)[1] == {"a": "no caption"}
    assert kept_and_skipped(picture, captioned=False, keep_uncaptioned=True)[0] == ["a"]


def test_a_picture_that_is_left_out_makes_no_other_a_duplicate():
    picture = photo(1, 200, 200)
    blurred, sharp = examined(picture, "large and blurred", sharpness=1.0), examined(halved(picture), "small and sharp")
    assert kept_and_skipped(blurred, sharp)[:2] == (["small and sharp"], {"large and blurred": "blurred"})


def test_keep_duplicates_says_so():
    pictures = [examined(photo(1), name) for name in "ab"]
    names, skipped, kept = kept_and_skipped(*pictures, keep_duplicates=True)
    assert (names, skipped) == (["a", "b"], {})
    assert [len(item.notes) for item in kept] == [0, 1]
