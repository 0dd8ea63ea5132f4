"""Which pictures are left out, and why: decided from what was measured, so that it can be tested without a picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np

from src.preparation.examining import Examined
from src.preparation.scanning import Skip
from src.preparation.settings import PrepareConfig

ALTHOUGH = "kept although"  # how the notes of what a flag overruled begin
_OVERRULED_BY = {
    "too small": "--allow-upscale or a smaller --size",
    "blurred": "--keep-blurred",
    "duplicate": "--keep-duplicates",
    "no caption": "--trigger or --keep-uncaptioned",
}
MAX_COLOUR_DISTANCE = 12.0  # of 255, mean over 4x4 fields: recompressed and shrunk copies differ by less than 3


def find(
    pictures: Sequence[Examined],
    has_caption: Callable[[str], bool],
    is_rich: Callable[[Examined], bool],
    config: PrepareConfig,
) -> tuple[list[Examined], list[Skip]]:
    """(kept, left out), each in the order of ``pictures``. A picture that is kept against a finding has it in its notes.

    ``has_caption`` is asked with a picture's source name; ``is_rich`` says which has a caption or mask of its own.
    """
    reasons: dict[str, list[tuple[str, str, bool]]] = {picture.source: [] for picture in pictures}  # (kind, reason, keep)
    for picture in pictures:
        reasons[picture.source] += _findings_of(picture, has_caption, config)
    left = [picture for picture in pictures if all(keep for _, _, keep in reasons[picture.source])]
    for source, better in duplicates(left, config.duplicate_distance, is_rich).items():
        reasons[source].append(("duplicate", f"nearly the same as {better}, which is kept", config.keep_duplicates))
    kept, skipped = [], []
    for picture in pictures:
        final = next(((kind, reason) for kind, reason, keep in reasons[picture.source] if not keep), None)
        if final is not None:
            skipped.append(Skip(picture.source, *final))
        else:
            own = [note for note in picture.notes if not note.startswith(ALTHOUGH)]  # facts of an earlier result have some
            against = [f"{ALTHOUGH} {kind} ({reason})" for kind, reason, _ in reasons[picture.source]]
            kept.append(replace(picture, notes=own + against))
    return kept, skipped


def overruled_by(kinds: Collection[str]) -> str:
    """What to type to keep pictures that were left out: "--keep-blurred (blurred), ..."; "" if nothing helps."""
    return ", ".join(f"{flags} ({kind})" for kind, flags in _OVERRULED_BY.items() if kind in kinds)


def duplicates(
    pictures: Sequence[Examined], max_distance: int, is_rich: Callable[[Examined], bool] = lambda item: False
) -> dict[str, str]:
    """Source name of each near-duplicate -> that of the picture which is kept in its place.

    That is the largest; of equal size one with a caption or mask (``is_rich``); of those the sharpest.

    Two pictures are near-duplicates if their perceptual hashes differ in at most ``max_distance`` of 64 bits and their
    colours by less than ``MAX_COLOUR_DISTANCE``. Only a kept picture makes others duplicates, so no chain of small
    differences swallows two that are unlike.
    """
    area = {item.source: item.source_px[0] * item.source_px[1] for item in pictures}
    order = sorted(pictures, key=lambda item: (-area[item.source], not is_rich(item), -item.sharpness, item.source))
    hashes = np.array([int(item.phash, 16) for item in order], dtype=np.uint64)
    colours = np.array([list(bytes.fromhex(item.colours)) for item in order], dtype=np.int16)
    kept: list[int] = []
    found: dict[str, str] = {}
    for index, item in enumerate(order):
        distances = np.bitwise_count(hashes[kept] ^ hashes[index])
        near = [kept[place] for place in np.flatnonzero(distances <= max_distance)]
        alike = [other for other in near if np.abs(colours[other] - colours[index]).mean() < MAX_COLOUR_DISTANCE]
        if alike:
            found[item.source] = order[alike[0]].source
        else:
            kept.append(index)
    return found


def _findings_of(picture: Examined, has_caption: Callable[[str], bool], config: PrepareConfig) -> list[tuple[str, str, bool]]:
    """(kind, reason, whether it is kept all the same) of what is wrong with one picture for itself."""
    if picture.problem is not None:
        return [("unreadable", picture.problem, False)]
    findings = []
    if picture.enlarged > 1:
        (width, height), (least_width, least_height) = picture.source_px, picture.size_px
        findings.append(("too small", f"{width}x{height} for {least_width}x{least_height}", config.allow_upscale))
    if (picture.enlarged <= 1 or config.allow_upscale) and picture.sharpness < config.blur_threshold:
        reason = f"sharpness {picture.sharpness:.3g}, threshold {config.blur_threshold:g}"
        findings.append(("blurred", reason, config.keep_blurred))
    if not has_caption(picture.source):
        reason = "no text beside it, in metadata or in a folder's name; give --trigger or --keep-uncaptioned"
        findings.append(("no caption", reason, config.keep_uncaptioned))
    return findings
