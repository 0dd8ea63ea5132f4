"""The subject of ``make demo-lora``: draws its pictures, and tells by itself whether other pictures show it.

It is an ice-cream of two parts, a scoop on a cone, in the flat colours of the embedded model's world. That model knows no
such figure: it was shown single shapes and pairs apart from each other, its triangles stand on a side, and it never read
the name. The check reads colours, then shapes, then how the parts stand to each other; it takes what the embedded VAE makes
of true pictures (a little soft, colours a little off) and refuses a part too few or too many, in a wrong shape, colour or
place.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from src import files, images, recipe
from src.doors import answer
from src.errors import ExitCode, not_found, usage_error
from src.flags import CommandLine, Flag, switch
from src.terminal import Terminal

TRIGGER = "gelato"
CAPTION = "a {trigger} on a {background} background"
SCOOP_COLOUR, CONE_COLOUR = "purple", "pink"
SIZE_PX = 512  # as a photo would be, larger than what is trained; the check reads pictures of any size as CHECKED_PX
CHECKED_PX = 128

# What the embedded model was trained on (models/embedded/README.md).
COLOURS = {
    "red": (220, 38, 38), "green": (34, 160, 70), "blue": (37, 99, 235), "yellow": (250, 204, 21), "purple": (147, 51, 234),
    "orange": (249, 115, 22), "pink": (244, 114, 182), "cyan": (6, 182, 212), "brown": (120, 72, 40), "black": (20, 20, 20),
    "white": (250, 250, 250), "gray": (140, 140, 140),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where the figure stands: the scoop's centre and radius, as shares of the picture's side."""

    x: float = 0.5
    y: float = 0.35
    radius: float = 0.18


# Eight pictures, each on another ground or at another place.
EXAMPLES = (
    ("white", Place(0.50, 0.34, 0.18)),
    ("black", Place(0.44, 0.38, 0.17)),
    ("blue", Place(0.56, 0.32, 0.19)),
    ("green", Place(0.47, 0.30, 0.18)),
    ("gray", Place(0.53, 0.37, 0.19)),
    ("yellow", Place(0.45, 0.33, 0.19)),
    ("red", Place(0.55, 0.36, 0.17)),
    ("white", Place(0.42, 0.40, 0.17)),
)

# The cone, in radii of the scoop: how far below the scoop's centre its mouth is, half the mouth's width, and its length.
_MOUTH_BELOW, _MOUTH_HALF, _LENGTH = 0.5, 1.0, 2.3
_SMOOTHING = 4  # drawn so many times larger, then averaged: the edges are smooth


def render(background: str, place: Place = Place(), *, size_px: int = SIZE_PX) -> Image.Image:
    """One picture of the subject; ``background`` is a name of :data:`COLOURS`."""
    side = size_px * _SMOOTHING
    x, y, radius = place.x * side, place.y * side, place.radius * side
    mouth_y = y + _MOUTH_BELOW * radius
    canvas = Image.new("RGB", (side, side), COLOURS[background])
    draw = ImageDraw.Draw(canvas)
    corners = [(x - _MOUTH_HALF * radius, mouth_y), (x + _MOUTH_HALF * radius, mouth_y), (x, mouth_y + _LENGTH * radius)]
    draw.polygon(corners, fill=COLOURS[CONE_COLOUR])
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=COLOURS[SCOOP_COLOUR])
    return canvas.resize((size_px, size_px), Image.Resampling.BOX)


def draw_set(folder: Path) -> list[Path]:
    """Write the example pictures, each with its caption in a .txt beside it; returns the pictures' paths.

    Raises UserError when the folder cannot be written.
    """
    files.check_writable_folder(folder)
    paths = []
    for number, (background, place) in enumerate(EXAMPLES):
        path = folder / f"{TRIGGER}_{number}.png"
        files.publish_bytes(path, images.encode_png(render(background, place), {}))
        caption = CAPTION.format(trigger=TRIGGER, background=background)
        files.publish_bytes(path.with_suffix(".txt"), f"{caption}\n".encode())
        paths.append(path)
    return paths


# --- the check of the subject --------------------------------------------------------------------------------------------


class _Fault(Exception):
    """What is wrong with a picture."""


# All areas are shares of the picture, all lengths in pixels of CHECKED_PX.
_FOREIGN_DISTANCE = 70.0  # RGB; colours nearer than this to one of the three count as it. The palette's are 80 and more apart
_MAX_FOREIGN = 0.01
_MIN_PART = 0.01
_MIN_CONE_OVERLAP = 0.66
_MIN_WHOLE = 0.88  # share of a colour that lies in one piece
_CROSS = ndimage.generate_binary_structure(2, 1)
_EDGE_PX = 2  # thinner things are edges, where the VAE mixes colours


def find_fault(picture: Image.Image, background: str) -> str | None:
    """Why a picture does not show the subject, once and alone, on ``background``; None if it does."""
    pixels = _pixels(picture)
    try:
        scoop, cone = _find_parts(pixels, background)
        disc = _check_scoop(scoop)
        _check_cone(cone, disc)
    except _Fault as fault:
        return str(fault)
    return None


@dataclass(frozen=True, slots=True)
class _Disc:
    """A disc of the same area and centre as the scoop."""

    x: float
    y: float
    radius: float
    mask: np.ndarray


def _pixels(picture: Image.Image) -> np.ndarray:
    """RGB (CHECKED_PX, CHECKED_PX, 3) in float32."""
    return np.asarray(picture.convert("RGB").resize((CHECKED_PX, CHECKED_PX), Image.Resampling.BOX), dtype=np.float32)


def _distances(pixels: np.ndarray, names: Iterable[str]) -> np.ndarray:
    """How far each pixel is from each of these colours: (h, w, len(names))."""
    return np.linalg.norm(pixels[:, :, None] - np.array([COLOURS[name] for name in names], dtype=np.float32), axis=-1)


def _without_edges(mask: np.ndarray) -> np.ndarray:
    return ndimage.binary_opening(mask, _CROSS, iterations=_EDGE_PX)


def _find_parts(pixels: np.ndarray, background: str) -> tuple[np.ndarray, np.ndarray]:
    """Masks of scoop and cone, where these and the background are all there is."""
    distances = _distances(pixels, (background, SCOOP_COLOUR, CONE_COLOUR))
    foreign = _without_edges(distances.min(-1) > _FOREIGN_DISTANCE).mean()
    if foreign > _MAX_FOREIGN:
        raise _Fault(f"{max(foreign, 0.01):.0%} of it is not {background}, {SCOOP_COLOUR} or {CONE_COLOUR}")
    nearest = distances.argmin(-1)
    return _only_piece(nearest == 1, SCOOP_COLOUR), _only_piece(nearest == 2, CONE_COLOUR)


def _only_piece(mask: np.ndarray, colour: str) -> np.ndarray:
    """The one piece that a colour forms."""
    labels, count = ndimage.label(_without_edges(mask))
    areas = np.bincount(labels.ravel(), minlength=2)[1:]
    if areas.max() < _MIN_PART * mask.size:
        raise _Fault(f"nothing in it is {colour}")
    if areas.max() < _MIN_WHOLE * areas.sum():
        raise _Fault(f"{count} things in it are {colour}")
    return ndimage.binary_dilation(labels == areas.argmax() + 1, _CROSS, iterations=2 * _EDGE_PX) & mask  # its corners again


def _check_scoop(scoop: np.ndarray) -> _Disc:
    y, x = np.mgrid[: scoop.shape[0], : scoop.shape[1]]
    centre_x, centre_y, radius = x[scoop].mean(), y[scoop].mean(), np.sqrt(scoop.sum() / np.pi)
    disc = _Disc(centre_x, centre_y, radius, (x - centre_x) ** 2 + (y - centre_y) ** 2 <= radius**2)
    width, height = np.ptp(x[scoop]) + 1, np.ptp(y[scoop]) + 1
    # A square or diamond overlaps with the disc of its area by 0.83, and fills 1 or 0.5 of its box; a disc 0.79.
    if _overlap(scoop, disc.mask) < 0.84 or not 0.68 <= scoop.sum() / (width * height) <= 0.90:
        raise _Fault(f"the {SCOOP_COLOUR} part is no disc")
    if not 0.75 <= width / height <= 1.33:
        raise _Fault(f"the {SCOOP_COLOUR} part is {'flat' if width > height else 'long'}")
    return disc


def _check_cone(cone: np.ndarray, disc: _Disc) -> None:
    y, x = np.mgrid[: cone.shape[0], : cone.shape[1]]
    left, right, top, bottom = x[cone].min(), x[cone].max() + 1, y[cone].min(), y[cone].max() + 1
    middle = (left + right - 1) / 2
    if abs(middle - disc.x) > 0.35 * disc.radius:
        raise _Fault("the parts are not above each other")
    if not (-0.5 <= (top - disc.y) / disc.radius <= 1.2 and 1.7 <= (bottom - disc.y) / disc.radius <= 4.0):
        raise _Fault(f"the {CONE_COLOUR} part does not begin at the {SCOOP_COLOUR} one and hang below it")
    # The mouth hides behind the scoop, so its width is found by trying.
    tip_ward = (bottom - y) / (bottom - disc.y - _MOUTH_BELOW * disc.radius)  # 1 at the mouth, 0 at the tip
    widths = np.linspace(0.7, 1.3, 7) * disc.radius
    triangles = [(tip_ward <= 1) & (abs(x - middle) <= width * tip_ward) & ~disc.mask for width in widths]
    if max(_overlap(cone, triangle) for triangle in triangles) < _MIN_CONE_OVERLAP:
        raise _Fault(f"the {CONE_COLOUR} part is no triangle that stands on its tip")


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    return float((one & other).sum() / (one | other).sum())


# --- the check of other pictures -----------------------------------------------------------------------------------------

_BORDER_PX = 8
_BACKGROUND = re.compile(r"\bon an? (\w+) background\b")


def background_of(prompt: str) -> str | None:
    """The background that a prompt of the embedded model's grammar asks for."""
    found = _BACKGROUND.search(prompt)
    return found[1] if found and found[1] in COLOURS else None


def follows_prompt(picture: Image.Image, prompt: str) -> bool:
    """Whether a picture has the prompt's background, and each colour that the prompt names before it.

    Shapes and counts are not asked for.
    """
    background = background_of(prompt)
    if background is None:
        return False
    nearest = _distances(_pixels(picture), COLOURS).argmin(-1)
    shares = dict(zip(COLOURS, np.bincount(nearest.ravel(), minlength=len(COLOURS)) / nearest.size))
    inner = np.zeros_like(nearest, dtype=bool)
    inner[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = True
    border = float((nearest[~inner] == list(COLOURS).index(background)).mean())
    named = [word for word in _BACKGROUND.sub("", prompt).split() if word in COLOURS]
    return border > 0.7 and all(shares[name] > _MIN_PART for name in named)


# --- before and after ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture that the generator saved, and what it was drawn from."""

    picture: Image.Image
    prompt: str
    seed: int

    @property
    def is_of_subject(self) -> bool:
        """Whether its prompt asks for the subject."""
        return TRIGGER in self.prompt.split()

    @property
    def fault(self) -> str | None:
        """Why it does not show the subject, or None."""
        return find_fault(self.picture, background_of(self.prompt) or "white")


def read_drawn(folder: Path) -> list[Drawn]:
    """The pictures in a folder by prompt and seed. Raises UserError: not found; refused for one without a recipe."""
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise not_found(f"{folder}: no pictures in it; draw some first with main.py --output {folder}")
    drawn = []
    for path in paths:
        parsed = recipe.from_text_chunks(images.read_text_chunks(path, recipe.KEYS))
        drawn.append(Drawn(images.read_image(path), parsed.prompt, parsed.settings.get("seed", 0)))
    return sorted(drawn, key=lambda item: (not item.is_of_subject, item.seed))


@dataclass(frozen=True, slots=True)
class Score:
    """Of one folder: pictures of the subject that show it, and other pictures that follow their prompts."""

    shown: int
    of_subject: int
    followed: int
    others: int
    intruded: int  # other pictures that show the subject

    def __str__(self) -> str:
        unasked = f", the {TRIGGER} unasked in {self.intruded}" if self.intruded else ""
        return f"{TRIGGER} {self.shown} of {self.of_subject}, other prompts followed {self.followed} of {self.others}{unasked}"


def score(drawn: Sequence[Drawn]) -> Score:
    """Judge pictures by their prompts."""
    subject, others = [item for item in drawn if item.is_of_subject], [item for item in drawn if not item.is_of_subject]
    return Score(
        shown=sum(item.fault is None for item in subject),
        of_subject=len(subject),
        followed=sum(follows_prompt(item.picture, item.prompt) for item in others),
        others=len(others),
        intruded=sum(item.fault is None for item in others),
    )


def sheet(before: Sequence[Drawn], after: Sequence[Drawn], columns: int = 10) -> Image.Image:
    """A row of the subject before, one after, and rows of other prompts before and after."""
    pictures, labels = [], []
    for of_subject in (True, False):
        for when, drawn in (("before", before), ("after", after)):
            row = [item for item in drawn if item.is_of_subject == of_subject][:columns]
            pictures += [item.picture for item in row] + [Image.new("RGB", (1, 1), "white")] * (columns - len(row))
            labels += [f"{when}: {item.prompt}" if not of_subject else f"{when}, seed {item.seed}" for item in row]
            labels += [""] * (columns - len(row))
    return images.contact_sheet(pictures, labels, columns)


# --- the command ---------------------------------------------------------------------------------------------------------

MIN_SHOWN, MAX_LOST = 0.8, 0.1  # shares of the pictures: what the example promises

USAGE = """python -m src.example_subject --draw DIR
       python -m src.example_subject --before DIR --after DIR [--sheet FILE]"""
FLAGS = {
    "options": (
        Flag(("--draw",), f"draw the {len(EXAMPLES)} example pictures with their captions into this folder", metavar="DIR"),
        Flag(("--before",), "pictures drawn without the adapter", metavar="DIR"),
        Flag(("--after",), "pictures drawn with it, from the same prompts and seeds", metavar="DIR"),
        Flag(("--sheet",), "save a contact sheet of both", metavar="FILE"),
        switch("--debug", "show the traceback of an error"),
        Flag(("--help", "-h"), "print this", kind=None),
    )
}


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return answer(argv, _run, "interrupted")


def command_line() -> CommandLine:
    """The flags, as they are read and as --help prints them."""
    return CommandLine(
        FLAGS, prog="example_subject", usage=USAGE,
        description="The example of make demo-lora: draw its pictures, or judge what an adapter has learnt from them.",
    )  # fmt: skip


def _run(argv: Sequence[str], terminal: Terminal) -> int:
    line = command_line()
    typed = line.parse(argv)
    if "help" in typed:
        print(line.help_text())
        return ExitCode.OK
    if "draw" in typed:
        paths = draw_set(Path(typed["draw"]))
        terminal.say(f"drawn   {len(paths)} pictures of a {TRIGGER} in {typed['draw']}")
        return ExitCode.OK
    if not {"before", "after"} <= typed.keys():
        raise usage_error("give --draw DIR, or --before DIR and --after DIR; see --help")
    return _compare(typed, terminal)


def _compare(typed: dict[str, Any], terminal: Terminal) -> int:
    """Judge two folders; a failure unless the adapter draws the subject and leaves other prompts as they were."""
    before, after = read_drawn(Path(typed["before"])), read_drawn(Path(typed["after"]))
    if [(item.prompt, item.seed) for item in before] != [(item.prompt, item.seed) for item in after]:
        raise usage_error(f"{typed['before']} and {typed['after']} are not of the same prompts and seeds; draw both again")
    first, second = score(before), score(after)
    for drawn in after:
        if drawn.is_of_subject and drawn.fault:
            terminal.say(f"seed {drawn.seed}: {drawn.fault}")
    terminal.say(f"before  {first}")
    terminal.say(f"after   {second}")
    if "sheet" in typed:
        path = Path(typed["sheet"])
        files.check_writable_folder(path.parent)
        files.publish_bytes(path, images.encode_png(sheet(before, after), {}))
        terminal.say(f"sheet   {path}")
    learnt = second.shown >= MIN_SHOWN * second.of_subject
    kept = second.followed >= first.followed - MAX_LOST * second.others
    terminal.say(f"learnt: {'yes' if learnt else 'no'}, other prompts as before: {'yes' if kept else 'no'}")
    return ExitCode.OK if learnt and kept else ExitCode.FAILURE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
