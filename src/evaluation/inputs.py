"""What an evaluation is made of: pictures, their prompts and the extractors' files, found and checked without torch."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from src import recipe
from src.captions import read_captions
from src.errors import UserError, not_found, refused, usage_error
from src.images import read_text_chunks
from src.preparation.scanning import scan
from src.prompts import clean_prompt, extract_loras, parse_weights
from src.tensor_files import read_header

PROMPT_SOURCES = ("auto", "recipes", "captions", "none")
FID_CLASSES = 1008  # of the Inception that FID is defined by; other Inceptions have 1000
REAL_SCENES = "scenes.json"  # marks a folder of scenes that `quality` drew to measure against, and lists them
_SHEET = re.compile(r"_(grid_\d+|preview)$")  # main.py's contact sheets and previews


def pictures_in(folder: Path, flag: str, say: Callable[[str], None]) -> list[Path]:
    """The pictures below a folder, sorted by name; what is left out is said.

    Masks, contact sheets and previews are no pictures here. Raises UserError: not found for no folder or no picture in it.
    """
    if not folder.is_dir():
        raise not_found(f"{flag} {folder}: no such folder; check the path")
    inventory = scan(folder)
    pictures = [name for name in inventory.pictures if not _SHEET.search(Path(name).stem)]
    skipped = [skip.source for skip in inventory.skipped if skip.is_picture]
    left_out = [*(name for name in inventory.pictures if name not in set(pictures)), *skipped]
    if left_out:
        say(f"{flag} {folder}: {len(left_out)} left out (contact sheets, previews, links, other formats), first {left_out[0]}")
    if not pictures:
        raise not_found(f"{flag} {folder}: no pictures in it; name the folder that holds them")
    return [folder / name for name in pictures]


def generated_in(folder: Path, flag: str, say: Callable[[str], None]) -> list[Path]:
    """The pictures below a folder that a model drew: as `pictures_in`, without what the project itself puts beside them.

    That is scenes to measure against and, where some of the pictures carry a recipe, all that have neither recipe nor caption:
    sheets, samples of a training, reconstructions. Raises as `pictures_in`.
    """
    pictures = pictures_in(folder, flag, say)
    real = {place for place in {path.parent for path in pictures} - {folder} if (place / REAL_SCENES).is_file()}
    drawn = [path for path in pictures if path.parent not in real]
    with_recipe = set(filter(_has_recipe, drawn))
    if with_recipe:
        try:
            captions, _ = read_captions(folder, [path for path in drawn if path not in with_recipe])
        except UserError as error:
            say(f"{flag} {folder}: only pictures with a recipe are taken, for {error}")
            captions = {}
        drawn = [path for path in drawn if path in with_recipe or captions.get(path)]
    if not drawn:
        raise not_found(f"{flag} {folder}: holds scenes to measure against alone; name the folder of the model's pictures")
    kept = set(drawn)
    if left_out := [path for path in pictures if path not in kept]:
        first = left_out[0].relative_to(folder)
        say(f"{flag} {folder}: {len(left_out)} left out (scenes to measure against, or without recipe), first {first}")
    return drawn


def sample(pictures: Sequence[Path], most: int | None, seed: int) -> list[Path]:
    """At most ``most`` of the pictures, drawn by ``seed``, in their order; all for None."""
    if most is None or len(pictures) <= most:
        return list(pictures)
    return [pictures[index] for index in sorted(random.Random(seed).sample(range(len(pictures)), most))]


def prompts_of(folder: Path, pictures: Sequence[Path], source: str) -> list[str | None]:
    """What each picture was to show, as plain text: from the recipe in it, else from its caption; None where neither is.

    ``source`` is one of ``PROMPT_SOURCES``; ``auto`` is recipes first, then captions.
    """
    found: list[str | None] = [None] * len(pictures)
    if source in ("auto", "recipes"):
        found = [_recipe_prompt(path) for path in pictures]
    if source in ("auto", "captions") and None in found:
        captions, _ = read_captions(folder, pictures)
        found = [text or next(iter(captions[path]), None) for text, path in zip(found, pictures)]
    return found


def check_inception(path: Path) -> None:
    """Refuse what is not FID's Inception by its header. Raises UserError: not found; refused; usage without torch-fidelity."""
    last = read_header(path).tensors.get("fc.weight")
    if last is None or last.shape != (FID_CLASSES, 2048):
        shape = None if last is None else "x".join(map(str, last.shape))
        found = "no layer fc in it" if shape is None else f"its layer fc is {shape}, FID's {FID_CLASSES}x2048"
        raise refused(f"--inception {path}: is not the Inception of FID ({found}); see docs/evaluating.md")
    if importlib.util.find_spec("torch_fidelity") is None:
        raise usage_error("--inception needs the package torch-fidelity for its network: pip install torch-fidelity")


def _has_recipe(path: Path) -> bool:
    try:
        return bool(read_text_chunks(path, recipe.KEYS))
    except UserError:  # no picture, or a damaged one
        return False


def _recipe_prompt(path: Path) -> str | None:
    try:
        parsed = recipe.from_text_chunks(read_text_chunks(path, recipe.KEYS))
    except UserError:  # no recipe; whether it is a picture at all is found when its pixels are read
        return None
    return plain_text(parsed.prompt, parsed.settings.get("prompt_weights", True)) or None


def plain_text(prompt: str, with_weights: bool = True) -> str:
    """A prompt without its grammar: no LoRA tags and, unless they were plain text, no brackets, weights and BREAKs."""
    text = clean_prompt(prompt)
    try:
        text, _ = extract_loras(text)
        if with_weights:
            text = "".join(" " if segment.is_break else segment.text for segment in parse_weights(text))
    except UserError:
        pass  # another program's grammar: it stays as it is written
    return " ".join(text.split())
