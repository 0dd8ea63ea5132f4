"""Checks a drawn landscape against its caption: time of day, colour of the hills and of the house, number of trees."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

from src.evaluation.segmenting import HARDENINGS, distances, harden, lab, picture_pixels
from src.scenes.drawing import DARKER, HILL_COLOURS, SKIES
from src.scenes.grammar import COLOURS, HOUSES, SIZE_PX, Landscape

HORIZON = 0.55  # in the middle of where the drawing has it
SKY_ROWS, GROUND_ROW, FRONT_ROWS = slice(1, 54), 57, slice(121, SIZE_PX)  # sky; where hills may begin; the hills in front
MAX_SKY, MAX_HILLS, MAX_HOUSE = 16.0, 16.0, 22.0  # CIELAB, from the colours expected
MIN_TREE_PX, MIN_ROOF_PX, ROOF_PX = 60, 80, (18, 44)  # areas; width of a roof
_ROOF, _TREE, _TRUNK = (88, 60, 50), (21, 94, 60), (101, 67, 33)
_LIT_WINDOW, _WINDOW = (255, 236, 150), (200, 230, 245)


def check(picture: Image.Image, land: Landscape) -> tuple[bool, bool, bool, tuple[str, ...]]:
    """Whether time and hills, the number of trees, and the house's colour are right; and what is not, in words."""
    pixels = picture_pixels(picture)
    for _ in range(HARDENINGS):
        pixels = harden(pixels)
    colours = lab(pixels)
    time, hills = _time(colours), None
    if time is not None:
        hills = _nearest(
            np.median(colours[FRONT_ROWS].reshape(-1, 3), axis=0),
            {name: _scaled(colour, DARKER[time]) for name, colour in HILL_COLOURS.items()}, MAX_HILLS,
        )  # fmt: skip
    faults = []
    if time != land.time:
        faults.append(f"time: {time or 'unclear'} instead of {land.time}")
    if hills != land.hills:
        faults.append(f"hills: {hills or 'unclear'} instead of {land.hills}")
    labels, names = _labelled(colours, time or land.time, hills or land.hills)
    trees = len(_parts(labels == names.index("tree"), MIN_TREE_PX))
    wood = labels == names.index("roof")
    house = _house(colours, wood, time or land.time) or _house(
        colours, wood | (labels == names.index("trunk")), time or land.time
    )
    if trees != land.trees:
        faults.append(f"trees: {trees} instead of {land.trees}")
    if house != land.house:
        faults.append(f"house: {house or 'none'} instead of {land.house}")
    return (time, hills) == (land.time, land.hills), trees == land.trees, house == land.house, tuple(faults)


def _time(colours: np.ndarray) -> str | None:
    """The sky that the rows' middle colours are nearest to."""
    found = np.median(colours[SKY_ROWS], axis=1)  # (rows, 3)
    share = np.clip((np.arange(SIZE_PX)[SKY_ROWS] + 0.5) / (SIZE_PX * HORIZON), 0, 1)[:, None]
    errors = {}
    for name, (top, bottom) in SKIES.items():
        expected = lab(np.array(top) * (1 - share) + np.array(bottom) * share)
        errors[name] = float(np.sqrt(((found - expected) ** 2).sum(-1)).mean())
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= MAX_SKY else None


def _labelled(colours: np.ndarray, time: str, hills: str) -> tuple[np.ndarray, list[str]]:
    """Each pixel below the sky by what it is nearest to; above, -1."""
    dark = DARKER[time]
    parts = {"back": _scaled(HILL_COLOURS[hills], 0.82 * dark), "front": _scaled(HILL_COLOURS[hills], dark)}
    parts |= {"roof": _scaled(_ROOF, dark), "tree": _scaled(_TREE, dark), "trunk": _scaled(_TRUNK, dark)}
    parts |= {"sky": SKIES[time][1], "window": _LIT_WINDOW if dark < 1 else _WINDOW}
    parts |= {name: _scaled(COLOURS[name], max(dark, 0.75)) for name in HOUSES}
    labels = distances(colours, lab(np.array(list(parts.values()), dtype=np.float32))).argmin(-1)
    labels[:GROUND_ROW] = -1
    return labels, list(parts)


def _house(colours: np.ndarray, roof: np.ndarray, time: str) -> str | None:
    """The colour of the wall below the roof, above its door and window; None for no roof or another colour."""
    roofs = [part for part in _parts(roof, MIN_ROOF_PX) if ROOF_PX[0] <= np.ptp(np.nonzero(part)[1]) <= ROOF_PX[1]]
    if not roofs:
        return None
    y, x = np.nonzero(max(roofs, key=np.sum))
    left, right = x.min(), x.max() + 1
    inset = (right - left) // 6
    wall = colours[y.max() + 2 : y.max() + 5, left + inset : right - inset].reshape(-1, 3)
    if not len(wall):
        return None
    shade = max(DARKER[time], 0.75)
    return _nearest(np.median(wall, axis=0), {name: _scaled(COLOURS[name], shade) for name in HOUSES}, MAX_HOUSE)


def _parts(mask: np.ndarray, least_px: int) -> list[np.ndarray]:
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    return [labels == number for number in np.nonzero(sizes >= least_px)[0] if number]


def _nearest(colour: np.ndarray, among: dict[str, tuple[float, ...]], at_most: float) -> str | None:
    found = distances(colour, lab(np.array(list(among.values()), dtype=np.float32)))
    return list(among)[int(found.argmin())] if found.min() <= at_most else None


def _scaled(colour: tuple[int, int, int], by: float) -> tuple[float, ...]:
    return tuple(part * by for part in colour)
