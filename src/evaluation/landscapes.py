"""Checks a drawn landscape against its caption: time of day, colour of the hills and of the house, number of trees."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

from src.evaluation.segmenting import HARDENINGS, MIN_CORE_PX, RAMP_STEPS, distances, harden, lab, picture_pixels
from src.scenes.drawing import DARKER, HILL_COLOURS, LIGHTS, SKIES
from src.scenes.grammar import COLOURS, HOUSES, SIZE_PX, Landscape

HORIZON = 0.55  # in the middle of where the drawing has it
SKY_ROWS, GROUND_ROW, FRONT_ROWS = slice(1, 54), 57, slice(121, SIZE_PX)  # sky; where hills may begin; the hills in front
MAX_SKY, MAX_HILLS, MAX_HOUSE = 16.0, 16.0, 22.0  # CIELAB, from the colours expected
MIN_TREE_PX, MIN_ROOF_PX, ROOF_PX = 60, 80, (18, 44)  # areas; width of a roof
WALL_PX = 24  # below the roof, where the house's own wall ends
MAX_OFF_SKY, MAX_OFF_GROUND = 26.0, 30.0  # CIELAB, from every colour that may be there
MIN_OTHER_PX, RESEMBLES = 70, 25.0  # area of what should not be there; CIELAB
MIN_LEAVES = 0.2  # of a tree, of its area
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
    houses = _houses(colours, wood, time or land.time) or _houses(
        colours, wood | (labels == names.index("trunk")), time or land.time
    )
    house = houses[0][0] if len(houses) == 1 else None
    is_alone = house is not None and not _has_strangers(colours, time or land.time, hills or land.hills, houses[0][1])
    is_sky = time is None or not _has_something_in_sky(colours, time)
    if trees != land.trees:
        faults.append(f"trees: {trees} instead of {land.trees}")
    if not is_sky:
        faults.append("sky: something else is in it")
    if house != land.house:
        faults.append(f"house: {house or (f'{len(houses)} of them' if houses else 'none')} instead of {land.house}")
    elif not is_alone:
        faults.append("house: something else lies on the hills")
    is_background = (time, hills) == (land.time, land.hills) and is_sky
    return is_background, trees == land.trees, house == land.house and is_alone, tuple(faults)


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
    parts = _palette(time, hills)
    labels = distances(colours, lab(np.array(list(parts.values()), dtype=np.float32))).argmin(-1)
    labels[:GROUND_ROW] = -1
    return labels, list(parts)


def _palette(time: str, hills: str) -> dict[str, tuple[float, ...]]:
    """The colours of what lies below the sky."""
    dark = DARKER[time]
    parts = {"back": _scaled(HILL_COLOURS[hills], 0.82 * dark), "front": _scaled(HILL_COLOURS[hills], dark)}
    parts |= {"roof": _scaled(_ROOF, dark), "tree": _scaled(_TREE, dark), "trunk": _scaled(_TRUNK, dark)}
    parts |= {"sky": SKIES[time][1], "window": _LIT_WINDOW if dark < 1 else _WINDOW}
    return parts | {name: _scaled(COLOURS[name], max(dark, 0.75)) for name in HOUSES}


def _houses(colours: np.ndarray, roof: np.ndarray, time: str) -> list[tuple[str, tuple[slice, slice]]]:
    """Of each roof with a wall below: the wall's colour, above its door and window, and where the house stands."""
    shade, found = max(DARKER[time], 0.75), []
    for part in _parts(roof, MIN_ROOF_PX):
        y, x = np.nonzero(part)
        left, right, foot = x.min(), x.max() + 1, y.max()
        inset = (right - left) // 6
        wall = colours[foot + 2 : foot + 5, left + inset : right - inset].reshape(-1, 3)
        if not ROOF_PX[0] <= right - 1 - left <= ROOF_PX[1] or not len(wall):
            continue
        name = _nearest(np.median(wall, axis=0), {name: _scaled(COLOURS[name], shade) for name in HOUSES}, MAX_HOUSE)
        if name is not None:
            found.append((name, (slice(y.min(), foot + WALL_PX), slice(max(0, left - 3), right + 3))))
    return found


def _has_strangers(colours: np.ndarray, time: str, hills: str, own: tuple[slice, slice]) -> bool:
    """Whether more than hills, trees and the house at ``own`` lies below the sky.

    That is: what has no colour of theirs, or a house's or the sky's colour where neither of them is; not asked of colours that
    the hills resemble.
    """
    labels, names = _labelled(colours, time, hills)
    palette = lab(np.array(list(_palette(time, hills).values()), dtype=np.float32))
    sun = lab(np.array([LIGHTS[time]], dtype=np.float32))[: time == "at sunset"]  # which reaches down here then
    is_ground = labels >= 0
    above, horizon = (np.array(colour) for colour in SKIES[time])
    low_sky = lab(np.stack([above + (horizon - above) * share for share in np.linspace(0.7, 1, RAMP_STEPS // 3)]))
    off = distances(colours, np.concatenate([palette, sun, low_sky])).min(-1)
    to_sky, to_hills = (
        distances(palette, palette[[names.index(n) for n in of]]).min(-1) for of in (["sky"], ["back", "front"])
    )
    is_open = is_ground & ((to_sky < RESEMBLES)[labels] | (distances(colours, sun) < RESEMBLES).any(-1))
    parts, _ = ndimage.label(is_open)
    is_sky = is_open & np.isin(parts, parts[GROUND_ROW])  # what comes down from above
    outside = is_ground & ~is_sky
    outside[own] = False
    strangers = [is_ground & (off > MAX_OFF_GROUND)]
    leaves, wood = (np.isin(labels, [names.index(name) for name in kind]) for kind in (["tree"], ["roof", "trunk"]))
    parts, count = ndimage.label(leaves | (wood & outside))  # a dark tree may be of both
    is_tree = (ndimage.mean(leaves, parts, np.arange(count + 1)) >= MIN_LEAVES)[parts] & (parts > 0)
    for kind in (*((name,) for name in HOUSES), ("roof", "trunk"), ("window",), ("sky",)):
        indices = [names.index(name) for name in kind]
        if (to_hills[indices] >= RESEMBLES).all():
            strangers.append(np.isin(labels, indices) & outside & ~is_tree)
    return any(_compact(mask) for mask in strangers)


def _has_something_in_sky(colours: np.ndarray, time: str) -> bool:
    """Whether more than sun or moon and stars covers the sky's colours."""
    top, bottom = (np.array(colour) for colour in SKIES[time])
    ramp = [top + (bottom - top) * share for share in np.linspace(0, 1, RAMP_STEPS)]
    off = distances(colours[SKY_ROWS], lab(np.array([*ramp, LIGHTS[time]], dtype=np.float32))).min(-1)
    return bool(_compact(off > MAX_OFF_SKY))


def _compact(mask: np.ndarray) -> list[np.ndarray]:
    """Parts that are large and thick enough to be a thing: no star, no edge, no tip of a tree."""
    return [part for part in _parts(mask, MIN_OTHER_PX) if ndimage.distance_transform_edt(part).max() >= MIN_CORE_PX]


def _parts(mask: np.ndarray, least_px: int) -> list[np.ndarray]:
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    return [labels == number for number in np.nonzero(sizes >= least_px)[0] if number]


def _nearest(colour: np.ndarray, among: dict[str, tuple[float, ...]], at_most: float) -> str | None:
    found = distances(colour, lab(np.array(list(among.values()), dtype=np.float32)))
    return list(among)[int(found.argmin())] if found.min() <= at_most else None


def _scaled(colour: tuple[int, int, int], by: float) -> tuple[float, ...]:
    return tuple(part * by for part in colour)
