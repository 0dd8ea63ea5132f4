"""Random versions of a picture: cut a little, other brightness, contrast and saturation. The hue stays: captions name it.

A version follows from a seed, the picture and its number alone, so each is encoded once and kept like the picture itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance


@dataclass(frozen=True, slots=True)
class Version:
    """What is done to a picture. The picture as it is: nothing cut, factors of 1."""

    kept: float = 1.0  # share of each side
    left: float = 0.0  # share of what is cut off that lies to the left
    top: float = 0.0  # and above
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


def versions(picture: str, count: int, *, crop: float, colour: float, seed: int) -> tuple[Version, ...]:
    """``count`` versions of the picture with this hash; the first is the picture as it is.

    ``crop``: up to this share of each side goes. ``colour``: each factor is in 1 - colour .. 1 + colour.
    """
    return (Version(), *(_drawn(random.Random(f"{seed} {picture} {number}"), crop, colour) for number in range(1, count)))


def apply(picture: Image.Image, version: Version) -> Image.Image:
    """An RGB picture -> its version; smaller where something is cut off."""
    if version.kept < 1:
        width, height = (max(1, round(side * version.kept)) for side in picture.size)
        left, top = round((picture.width - width) * version.left), round((picture.height - height) * version.top)
        picture = picture.crop((left, top, left + width, top + height))
    for kind, factor in (
        (ImageEnhance.Brightness, version.brightness),
        (ImageEnhance.Contrast, version.contrast),
        (ImageEnhance.Color, version.saturation),
    ):
        if factor != 1:
            picture = kind(picture).enhance(factor)
    return picture


def _drawn(dice: random.Random, crop: float, colour: float) -> Version:
    factors = [dice.uniform(1 - colour, 1 + colour) for _ in range(3)]
    return Version(dice.uniform(1 - crop, 1), dice.random(), dice.random(), *factors)
