"""A picture of the scenes' grammar cut into its background and its pieces, by colour alone.

Soft edges mix two colours into a third (blue into red: purple), which must not become things of their own. So edges are made
hard first (Kuwahara et al. 1976: a pixel takes the mean of the flattest window that holds it), then each pixel goes to the
nearest colour in CIELAB, the background's or one of the grammar's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from src.scenes import drawing
from src.scenes.grammar import COLOURS, SIZE_PX, Background

# Chosen by measurement on rendered truth, blurred, noisy, shifted, and through a VAE; see the proof's table.
HARDENINGS = 2
MIN_AREA_PX = 60  # a smaller piece is a speck; the smallest thing of the grammar has 190
MIN_CORE_PX = 2.0  # depth of a piece at its thickest; what is thinner is left over of an edge
FRAME_PX = 5  # along the border, where things hardly are
MIN_FRAME = 0.8  # share of the frame that has the background's colours
MIN_PATTERN = 0.7  # share of each colour's places that have it, in stripes and dots
MAX_RAMP_ERROR = 0.13  # mean distance from the gradient, of its whole
MIN_OPEN = 0.12  # of the picture that is background
MAX_OFF, MAX_STAINED = 18.0, 26.0  # CIELAB, of what is open from the background's colours: its median and its 90th percentile
MAX_DISTANCE = 38.0  # CIELAB, of a piece's middle colour from the one it is called
ALIKE = 20.0  # CIELAB; the nearest two of the grammar's colours are further apart
MIN_INNER = 0.2  # of an outlined thing: what is not outline; a small star's 0.26
MAX_SPECKS = 0.07  # of the picture: more are a pattern that should not be there
STRAY_PX, MAX_STRAY = 30, 3  # area of a compact speck that touches no piece; so many may be there
COMMON = 0.08  # share of the frame from which a colour belongs to a wrong background
RAMP_STEPS = 17
MAX_OFF_RAMP = 0.3  # a gradient's own colour, so much of the whole away from where it belongs, is no background there
MIN_BLOT_PX = 3.0  # depth of a stripe's own colour where the other belongs: drawn stripes waver by a pixel or two
NAMES = tuple(COLOURS)


@dataclass(frozen=True, eq=False)
class Piece:
    """A connected piece of one colour, with its outline where one is asked for."""

    colour: str
    mask: np.ndarray  # (H, W) bool
    is_clear: bool = True  # near enough to the colour it is called, and not all outline


@dataclass(frozen=True)
class Segments:
    """What a picture is made of. ``labels`` (H, W): an index into NAMES, or -1 where the background is."""

    labels: np.ndarray
    pieces: tuple[Piece, ...]
    specks: np.ndarray  # (H, W) bool: what is neither
    has_background: bool  # the one that was asked for


def segment(picture: Image.Image, background: Background, outlines: Mapping[str, str] | None = None) -> Segments:
    """Cut a picture of any size, resized to the scenes'; ``background`` is the one it should have.

    ``outlines`` are the outlines that are asked for, each to the colour that it surrounds: both make one piece.
    """
    pixels = picture_pixels(picture)
    hard = pixels
    for _ in range(HARDENINGS):
        hard = harden(hard)
    colours = lab(hard)
    labels = _labelled(colours, background.colours, background.kind == "gradient")
    is_right = _has_background(colours, labels, background)
    if is_right:
        _label_blots(labels, colours, background)
    else:
        labels = _labelled(colours, _frame_colours(colours), False)
    pieces = tuple(_pieces(labels, colours, outlines or {}))
    specks = (labels >= 0) & ~np.any([piece.mask for piece in pieces], axis=0)
    is_clean = specks.mean() <= MAX_SPECKS and _strays(specks, pieces) <= MAX_STRAY
    return Segments(labels, pieces, specks, is_right and bool(is_clean))


def picture_pixels(picture: Image.Image) -> np.ndarray:
    """(H, W, 3), 0 to 255, in the size of the scenes."""
    if picture.size != (SIZE_PX, SIZE_PX):
        picture = picture.resize(
            (SIZE_PX, SIZE_PX), Image.Resampling.BOX if picture.width > SIZE_PX else Image.Resampling.BICUBIC
        )
    return np.asarray(picture.convert("RGB"), dtype=np.float32)


def harden(pixels: np.ndarray, window: int = 3) -> np.ndarray:
    """Edges made hard, (H, W, 3): of the windows that hold a pixel, the mean of that with the least variance."""
    size = (window, window, 1)
    mean = ndimage.uniform_filter(pixels, size, mode="nearest")
    variance = (ndimage.uniform_filter(pixels**2, size, mode="nearest") - mean**2).sum(-1)
    reach = window // 2
    height, width = variance.shape
    padded = np.pad(variance, reach, constant_values=np.inf)
    around = np.pad(mean, ((reach, reach), (reach, reach), (0, 0)))
    shifts = [(y, x) for y in range(window) for x in range(window)]
    best = np.argmin([padded[y : y + height, x : x + width] for y, x in shifts], axis=0)
    rows, columns = np.mgrid[:height, :width]
    offsets = np.array(shifts)
    return around[rows + offsets[best, 0], columns + offsets[best, 1]]


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB levels (..., 3), 0 to 255 -> CIELAB under D65, where distances are roughly what the eye sees."""
    share = np.clip(rgb, 0, 255) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    xyz = xyz / np.array([0.9505, 1.0, 1.089])
    cubic = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = cubic[..., 0], cubic[..., 1], cubic[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def distances(colours: np.ndarray, others: np.ndarray) -> np.ndarray:
    """CIELAB (..., 3) and (N, 3) -> (..., N)."""
    return np.sqrt(((colours[..., None, :] - others) ** 2).sum(-1))


@cache
def _palette(colours: tuple[str, ...], is_ramp: bool) -> tuple[np.ndarray, np.ndarray]:
    """The colours to choose among, (N, 3), and what each means, (N,): -1 is the background."""
    own = [np.array(COLOURS[name], dtype=np.float32) for name in colours]
    if is_ramp:
        own = [own[0] + (own[1] - own[0]) * share for share in np.linspace(0, 1, RAMP_STEPS)]
    others = [index for index, name in enumerate(NAMES) if name not in colours]
    return lab(np.array(own + [COLOURS[NAMES[index]] for index in others])), np.array([-1] * len(own) + others)


def _labelled(colours: np.ndarray, background: tuple[str, ...], is_ramp: bool) -> np.ndarray:
    palette, meaning = _palette(background, is_ramp)
    return meaning[distances(colours, palette).argmin(-1)]


def _frame() -> np.ndarray:
    frame = np.ones((SIZE_PX, SIZE_PX), dtype=bool)
    frame[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX] = False
    return frame


def _frame_colours(colours: np.ndarray) -> tuple[str, ...]:
    """The colours that a wrong background is made of, most of it first."""
    palette = lab(np.array(list(COLOURS.values()), dtype=np.float32))
    counts = np.bincount(distances(colours[_frame()], palette).argmin(-1), minlength=len(NAMES))
    order = np.argsort(-counts)
    return tuple(NAMES[index] for index in order if counts[index] >= COMMON * counts.sum())


def _strays(specks: np.ndarray, pieces: tuple[Piece, ...]) -> int:
    """How many specks are small things of their own: no thing's tips, no left over edge."""
    parts, _ = ndimage.label(specks)
    near = ndimage.binary_dilation(np.any([piece.mask for piece in pieces], axis=0)) if pieces else np.zeros_like(specks)
    sizes, depths = np.bincount(parts.ravel()), ndimage.distance_transform_edt(specks)
    numbers = [number for number in np.nonzero(sizes >= STRAY_PX)[0] if number]
    return sum(bool(depths[parts == n].max() >= MIN_CORE_PX and not near[parts == n].any()) for n in numbers)


def _has_background(colours: np.ndarray, labels: np.ndarray, background: Background) -> bool:
    """Whether the frame and what is open has the colours asked for, in their pattern."""
    is_open = labels == -1
    if is_open[_frame()].mean() < MIN_FRAME or is_open.mean() < MIN_OPEN:
        return False
    palette, meaning = _palette(background.colours, background.kind == "gradient")
    off = distances(colours[is_open], palette[meaning == -1]).min(-1)
    is_flat = background.kind in ("plain", "gradient")  # where stripes and dots meet, soft edges mix their colours
    if np.median(off) > MAX_OFF or np.percentile(off, 90) > (MAX_STAINED if is_flat else MAX_DISTANCE):
        return False
    if background.kind == "plain":
        return True
    share = _share(colours, background)
    if background.kind == "gradient":
        return _ramp_error(share, is_open, background) <= MAX_RAMP_ERROR
    return _pattern(share >= 0.5, is_open, background)[0] >= MIN_PATTERN


def _share(colours: np.ndarray, background: Background) -> np.ndarray:
    """How far each pixel is from the first of a background's two colours to the second, (H, W) in [0, 1]."""
    first, second = lab(np.array([COLOURS[name] for name in background.colours], dtype=np.float32))
    axis = second - first
    return np.clip((colours - first) @ axis / (axis @ axis), 0, 1)


def _label_blots(labels: np.ndarray, colours: np.ndarray, background: Background) -> None:
    """Things in a colour of the background's own, where it does not belong, get that colour's label in ``labels``.

    Not so a gap among dots, which looks like none.
    """
    if background.kind == "plain":
        return
    is_open, share = labels == -1, _share(colours, background)
    if background.kind == "gradient":
        is_blot = is_open & (abs(share - _ramp(background.colours)[:, None]) > MAX_OFF_RAMP)
    else:
        expected = _pattern(share >= 0.5, is_open, background)[1]
        is_blot = is_open & (share >= 0.5) & ~expected
        if background.kind == "striped":
            is_blot |= is_open & (share < 0.5) & expected
    parts, _ = ndimage.label(is_blot)
    depths = ndimage.maximum(ndimage.distance_transform_edt(is_blot), parts, np.arange(parts.max() + 1))
    is_blot &= (depths >= MIN_BLOT_PX)[parts]
    first, second = (NAMES.index(name) for name in background.colours)
    labels[is_blot] = np.where(share[is_blot] >= 0.5, second, first)


def _ramp_error(share: np.ndarray, is_open: np.ndarray, background: Background) -> float:
    expected = _ramp(background.colours)
    rows = is_open.sum(1) >= 8
    found = np.array([np.median(share[y, is_open[y]]) for y in np.nonzero(rows)[0]])
    return float(abs(found - expected[rows]).mean()) if rows.any() else 1.0


@cache
def _ramp(colours: tuple[str, ...]) -> np.ndarray:
    """What the share of the second colour is in each row of a gradient, measured as in a picture."""
    first, second = np.array([COLOURS[name] for name in colours], dtype=np.float32)
    place = (np.arange(SIZE_PX)[:, None] + 0.5) / SIZE_PX
    line, start, axis = lab(first + (second - first) * place), lab(first), lab(second) - lab(first)
    return np.clip((line - start) @ axis / (axis @ axis), 0, 1)


def _pattern(is_second: np.ndarray, is_open: np.ndarray, background: Background) -> tuple[float, np.ndarray]:
    """Stripes or dots folded onto one period, at the shift that fits best.

    The share of each colour's places that have it, of the worse one; and where the second colour belongs, (H, W).
    """
    period = drawing.STRIPE_PX if background.kind == "striped" else drawing.DOT_PX
    shape = (SIZE_PX // period, period, SIZE_PX // period, period)
    count = is_open.reshape(shape).sum((0, 2))  # (period, period)
    second = (is_open & is_second).reshape(shape).sum((0, 2))
    tile = _tile(background.kind, period)
    best, belongs = -1.0, tile
    for y in range(period if background.kind == "dotted" else 1):
        for x in range(period):
            moved = np.roll(tile, (y, x), (0, 1))
            on, off = (moved * count).sum(), ((1 - moved) * count).sum()
            shares = (moved * second).sum() / max(on, 1), ((1 - moved) * (count - second)).sum() / max(off, 1)
            if min(shares) > best:
                best, belongs = float(min(shares)), moved
    return best, np.tile(belongs > 0, (SIZE_PX // period,) * 2)


@cache
def _tile(kind: str, period: int) -> np.ndarray:
    """One period of a pattern: 1 where the second colour is."""
    pattern = drawing.background(Background(kind, ("black", "white"), 0.0)).resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)
    return (np.asarray(pattern)[:period, :period, 0] >= 128).astype(np.float32)


def _pieces(labels: np.ndarray, colours: np.ndarray, outlines: Mapping[str, str]) -> list[Piece]:
    """What is large and thick enough to be a thing; its colour is that of its middle, where it is not outline."""
    palette = lab(np.array(list(COLOURS.values()), dtype=np.float32))
    is_outline = np.isin(labels, [NAMES.index(name) for name in outlines])
    joined = labels.copy()
    for outline, inner in outlines.items():
        joined[labels == NAMES.index(outline)] = NAMES.index(inner)
    parts = _merged(joined, colours)
    found = []
    for number, box in enumerate(ndimage.find_objects(parts), start=1):
        part = parts[box] == number if box else np.zeros((1, 1), dtype=bool)
        if part.sum() < MIN_AREA_PX or ndimage.distance_transform_edt(np.pad(part, 1)).max() < MIN_CORE_PX:
            continue
        mask = parts == number
        own = colours[mask & ~is_outline]
        is_clear = len(own) >= MIN_INNER * part.sum()
        middle = np.median(own if is_clear else colours[mask], axis=0)
        away = distances(middle, palette)
        away[[index for index in range(len(NAMES)) if index not in labels]] = np.inf
        found.append(Piece(NAMES[int(away.argmin())], mask, bool(is_clear and away.min() <= MAX_DISTANCE)))
    return found


def _merged(labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Connected parts of one label, numbered from 1; parts that touch and are alike are one: its colour was only uneven."""
    parts = np.zeros(labels.shape, dtype=np.int64)
    for index in np.unique(labels[labels >= 0]):
        own, _ = ndimage.label(labels == index)
        parts[own > 0] = own[own > 0] + parts.max()
    count = int(parts.max())
    if count < 2:
        return parts
    sizes = np.bincount(parts.ravel(), minlength=count + 1).clip(1)
    means = np.stack([np.bincount(parts.ravel(), colours[..., c].ravel(), count + 1) for c in range(3)], -1) / sizes[:, None]
    touching = {
        (int(min(pair)), int(max(pair)))
        for a, b in ((parts[1:], parts[:-1]), (parts[:, 1:], parts[:, :-1]))
        for pair in np.unique(np.stack([a, b], -1)[(a != b) & (a > 0) & (b > 0)], axis=0)
    }
    root = np.arange(count + 1)
    for a, b in sorted(touching):
        if np.linalg.norm(means[a] - means[b]) < ALIKE:
            root[root == root[b]] = root[a]
    return root[parts]
