"""One picture in one worker process: decoded, measured, cut, and stored under a name that says what it was made from.

Sharpness is the variance of the Laplacian (Pech-Pacheco et al. 2000) of the grey picture *as it will be trained*, so that it
means the same for a 2- and a 20-megapixel photo, and of the sharpest of 8x8 fields, so that a portrait before a soft
background and a drawing with wide flat areas count as sharp. Measured on thirty photos and drawings at 512 px: sharp ones
reach 110 to 20,000; softened by a Gaussian of 1 px 17 to 850, of 2 px 2 to 70, of 3 px 1 to 28. The default threshold is 40.

The perceptual hash is the 64-bit pHash of imagehash. It sees no colour, so the mean colours of 4x4 fields go with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from PIL import Image, ImageColor

from src.errors import UserError
from src.files import publish_bytes, sha256_of
from src.images import encode_png, picture_size, read_image, read_mask
from src.preparation.framing import Box, crop_box, cut, enlargement, size_for
from src.preparation.settings import PrepareConfig
from src.preparation.workers import taking_turns

VERSION = 1  # of what is done to the pixels; another one makes every picture anew
LARGE_PIXELS = 16_000_000  # one worker at a time decodes what is larger
_SHARPNESS_GRID = 8
_COLOUR_GRID = 4


@dataclass(slots=True)
class Examined:
    """What is known of one picture. Sizes are (width, height) in pixels, of the upright picture."""

    source: str
    key: str = ""  # SHA-256 of the source's name and bytes, its mask's bytes and the pixel settings
    source_sha256: str = ""
    problem: str | None = None  # why it cannot be read
    source_px: tuple[int, int] = (0, 0)
    size_px: tuple[int, int] = (0, 0)
    crop_px: Box = (0.0, 0.0, 0.0, 0.0)
    sharpness: float = 0.0
    phash: str = ""  # 16 hex digits
    colours: str = ""  # 4x4 fields, RGB, in hex digits
    sha256: str = ""  # of the PNG; "": none was made
    mask: str | None = None  # its source
    mask_problem: str | None = None
    mask_sha256: str = ""
    notes: list[str] = field(default_factory=list)  # what was done to the pixels

    @property
    def enlarged(self) -> float:
        return enlargement(self.source_px, self.size_px)


@dataclass(frozen=True, slots=True)
class Desk:
    """Where a worker finds and leaves things. ``known`` are results of earlier runs by key, with the file each is in."""

    root: Path
    shelf: Path | None  # None: nothing is stored
    config: PrepareConfig
    known: Mapping[str, tuple[dict[str, Any], Path]]


def examine(desk: Desk, source: str, mask: str | None) -> Examined:
    """Examine one picture and store it as ``shelf/KEY.png``, its mask as ``KEY.mask.png`` and the facts as ``KEY.json``.

    What an earlier run stored and is still whole is taken over. Whatever is wrong with the picture is a ``problem``, no error.
    Raises UserError when the result cannot be stored.
    """
    path = desk.root / source
    result = Examined(source, mask=mask)
    try:
        result.source_sha256 = sha256_of(path)
        result.key = _key(desk, result)
        if (earlier := _earlier(desk, result.key)) is not None:
            return parse_examined(earlier)
        width, height = picture_size(path)
        with taking_turns(if_large=width * height > LARGE_PIXELS):
            background = ImageColor.getrgb(desk.config.background)[:3]
            drawn = _draw(result, read_image(path, background=background, notes=result.notes), desk.config)
    except UserError as error:
        result.problem = _without_path(str(error), path)
        return result
    except MemoryError:
        result.problem = "too large for this machine's memory; make the picture smaller first"
        return result
    if drawn is not None:
        _store(desk, result, drawn)
    return result


def sharpness(picture: Image.Image) -> float:
    """Variance of the 4-neighbour Laplacian, on grey values 0 to 255, of the sharpest field of an 8x8 grid."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    rows = np.array_split(laplacian, _SHARPNESS_GRID, axis=0)
    fields = [cell for row in rows for cell in np.array_split(row, _SHARPNESS_GRID, axis=1)]
    return max((float(cell.var()) for cell in fields if cell.size), default=0.0)


def parse_examined(facts: Mapping[str, Any]) -> Examined:
    """The inverse of ``asdict``, after JSON has made lists of the tuples."""
    known = {name: facts[name] for name in Examined.__dataclass_fields__ if name in facts}
    for name in ("source_px", "size_px", "crop_px"):
        known[name] = tuple(known[name])
    return Examined(**known)


def _key(desk: Desk, result: Examined) -> str:
    mask_sha256 = ""
    if result.mask is not None:
        mask_sha256 = "unreadable"  # which is not the same as no mask; why is said when it is read itself
        with contextlib.suppress(UserError):
            mask_sha256 = sha256_of(desk.root / result.mask)
    # With its name: of two equal files each has its own result.
    recipe = [VERSION, result.source, result.source_sha256, mask_sha256, desk.config.pixel_settings()]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _draw(result: Examined, picture: Image.Image, config: PrepareConfig) -> Image.Image | None:
    """Measure the picture and cut it; None for one that is too small."""
    result.source_px = picture.size
    result.size_px = size_for(picture.size, config)
    result.crop_px = tuple(round(edge, 3) for edge in crop_box(picture, result.size_px, config.crop))
    result.phash = str(imagehash.phash(picture))
    result.colours = picture.resize((_COLOUR_GRID, _COLOUR_GRID), Image.Resampling.BOX).tobytes().hex()
    if result.enlarged > 1 and not config.allow_upscale:
        return None
    drawn = cut(picture, result.crop_px, result.size_px)
    result.sharpness = round(sharpness(drawn), 2)
    return drawn


def _store(desk: Desk, result: Examined, drawn: Image.Image) -> None:
    """Store picture, mask and, last of all, the facts: what has facts is complete."""
    data = encode_png(drawn, {})
    result.sha256 = hashlib.sha256(data).hexdigest()
    files = {f"{result.key}.png": data}
    if result.mask is not None and (mask := _read_mask(desk.root / result.mask, result)) is not None:
        files[f"{result.key}.mask.png"] = encode_png(mask, {})
        result.mask_sha256 = hashlib.sha256(files[f"{result.key}.mask.png"]).hexdigest()
    if desk.shelf is not None:
        files[f"{result.key}.json"] = json.dumps(asdict(result)).encode()
        for name, content in files.items():
            publish_bytes(desk.shelf / name, content)


def _read_mask(path: Path, result: Examined) -> Image.Image | None:
    """The mask cut as its picture was. It may be of another size, but has to have the same shape."""
    try:
        mask = read_mask(path)
    except UserError as error:
        result.mask_problem = _without_path(str(error), path)
        return None
    scale_x, scale_y = (ours / theirs for ours, theirs in zip(mask.size, result.source_px))
    if abs(scale_x * result.source_px[1] - scale_y * result.source_px[1]) > 1 and abs(scale_x / scale_y - 1) > 0.01:
        shape = "{}x{} is not the shape of its picture, {}x{}".format(*mask.size, *result.source_px)
        result.mask_problem = f"{shape}; paint it on a copy of the picture"
        return None
    left, top, right, bottom = result.crop_px
    box = (left * scale_x, top * scale_y, min(mask.width, right * scale_x), min(mask.height, bottom * scale_y))
    return cut(mask, box, result.size_px)


def _earlier(desk: Desk, key: str) -> dict[str, Any] | None:
    """Facts that an earlier run stored for this key, if the files that they tell of are there and unchanged."""
    facts, place = desk.known.get(key, (None, None))
    if desk.shelf is not None and facts is None:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            facts = json.loads((desk.shelf / f"{key}.json").read_bytes())
    if not isinstance(facts, dict) or not facts.get("sha256"):
        return None
    wanted = {"png": facts["sha256"], "mask.png": facts.get("mask_sha256", "")}
    for ending, digest in wanted.items():
        if not digest:
            continue
        at_home = [desk.shelf / f"{key}.{ending}"] if desk.shelf else []
        elsewhere = [] if place is None else [place if ending == "png" else mask_path(place)]
        if not any(_is_whole(path, digest) for path in (*at_home, *elsewhere)):
            return None
    return facts


def mask_path(picture: Path) -> Path:
    """Where the mask of a prepared picture lies: ``0000-masklabel.png`` beside ``0000.png``."""
    return picture.with_name(f"{picture.stem}-masklabel.png")


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return sha256_of(path) == digest
    except UserError:
        return False


def _without_path(message: str, path: Path) -> str:
    """An error's text without the path before it, which the report gives in a column of its own."""
    return message.removeprefix(f"{path}: ")
