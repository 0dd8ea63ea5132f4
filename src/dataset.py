"""A folder of pictures with captions -> the examples of a training, and the order in which they are drawn.

The order has no state: which pictures, captions and mirrorings make batch number n, and the key of each one's noise,
follow from the seed and n alone. A training that is stopped goes on at any n as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from PIL import Image

from src.augmentation import Version, apply
from src.buckets import bucket_sizes, enlargement, place
from src.captions import oddly_spelled, read_caption_table, read_captions, repeats_of
from src.errors import UserError, not_found, refused, usage_error
from src.files import sha256_of
from src.images import PICTURE_SUFFIXES, fit_to, picture_size, read_image, read_mask
from src.prepared_folder import PreparedFolder, read_prepared

MASK_ENDING = "-masklabel"  # OneTrainer's convention: NAME-masklabel.png beside NAME.png
VALIDATION_EVERY = 10  # by default, where there are that many
_KEY_BITS = 63
_DERIVED_FIELDS = 3  # of `Example`, the last ones
_PREPARE = "`python -m src.prepare_dataset` sorts such pictures out"


@dataclass(frozen=True, slots=True)
class Example:
    """One picture with its captions, and how it is cut to the size that is trained."""

    path: Path
    captions: tuple[str, ...]  # at least one
    size_px: tuple[int, int]  # (width, height) of its bucket
    original_px: tuple[int, int]  # (width, height) as it was taken
    crop_top_left: tuple[int, int]  # (top, left) in pixels, after scaling and before cropping
    sha256: str  # of the file's bytes
    mask: Path | None = None
    weight: float = 1.0  # of its loss
    repeats: int = 1  # visits an epoch
    # What follows from the above and the settings, and is no part of the data set's digest:
    version: Version | None = None  # None: the picture as it is
    margin_top_left: tuple[float, float] = (0.0, 0.0)  # what the cut to the bucket itself takes of `crop_top_left`
    crop_right: int = 0  # what is cut off at the right: the `left` of the mirrored picture


@dataclass(frozen=True, slots=True)
class Dataset:
    """The pictures of a folder: those that are learnt, and those that judge."""

    folder: Path
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    trigger: str | None
    digest: str  # of all that a training sees of the folder
    notes: tuple[str, ...]  # what the user should know, a line each


# --- reading -------------------------------------------------------------------------------------------------------------


def read_dataset(
    folder: Path,
    resolution_px: int,
    *,
    step_px: int,
    buckets: bool,
    validation_every: int | None,
    masked: bool = False,
    fixed_caption: str | None = None,
    weight: float = 1.0,
    captions_file: Path | None = None,
    most_held_out: int | None = None,
) -> Dataset:
    """Read a prepared folder, kohya's ``10_name`` folders, or any tree of pictures with captions.

    ``buckets`` keeps aspect ratios in sizes of about ``resolution_px``^2 pixels whose sides are multiples of ``step_px``;
    otherwise all pictures are cut to a square. Every ``validation_every``-th picture by name is held out (None: every
    tenth where there are ten, 0: none), and no more than ``most_held_out``. ``fixed_caption`` stands for all captions;
    ``captions_file`` is a table of them, and pictures that it does not name are left out. Headers are read, pixels are not.

    Raises UserError: not found (folder, or a picture that the folder's metadata names), refused (no picture, damaged
    headers, captions), usage (a resolution, ``validation_every`` or ``masked`` that cannot be).
    """
    if validation_every == 1:
        raise usage_error("validation_every 1 would hold out every picture; give 2 or more, or 0 for none")
    sizes_px = bucket_sizes(resolution_px, step_px) if buckets else [(resolution_px, resolution_px)]
    paths = find_pictures(folder)
    prepared = read_prepared(folder)
    if captions_file is None:
        captions, notes = _captions(folder, paths, prepared, fixed_caption)
    else:
        captions, notes = read_caption_table(captions_file, folder, paths)
        if left_out := [path.name for path in paths if path not in captions]:
            notes.append(f"pictures that {captions_file.name} does not name are left out: {len(left_out)}, first {left_out[0]}")
        paths = [path for path in paths if path in captions]
    pictures_px = _picture_sizes(paths)
    masks = _find_masks(paths, pictures_px, notes) if masked else {}
    examples = []
    for path in paths:
        origin = prepared.origins.get(path.relative_to(folder).as_posix())
        placed = place(pictures_px[path], sizes_px, origin)
        repeats = origin.repeats if origin else repeats_of(folder, path)
        examples.append(
            Example(
                path, captions[path], **placed, sha256=sha256_of(path), mask=masks.get(path), weight=weight, repeats=repeats
            )
        )
    notes += _size_notes(examples, pictures_px)
    train, judges = _held_out(examples, validation_every, most_held_out, notes)
    return Dataset(folder, train, judges, prepared.trigger, _digest(train, judges), tuple(notes))


def _held_out(
    examples: Sequence[Example], validation_every: int | None, most: int | None, notes: list[str]
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(learnt, judging). A file that is there twice is always learnt: one that is known by heart judges nothing."""
    copies = Counter(item.sha256 for item in examples)
    single = [index for index, item in enumerate(examples) if copies[item.sha256] == 1]
    asked = (VALIDATION_EVERY if len(examples) >= VALIDATION_EVERY else 0) if validation_every is None else validation_every
    every = max(asked, -(-len(single) // most)) if asked and most else asked
    held_out = set(single[every - 1 :: every]) if every else set()
    if every and len(single) < len(examples):
        notes.append(f"equal files are learnt and never held out: {len(examples) - len(single)} of {len(examples)}")
    if validation_every and every > asked:
        notes.append(f"one picture in {every} is held out and not one in {asked}, to be {most} at most (validation_pictures)")
    train = tuple(item for index, item in enumerate(examples) if index not in held_out)
    return train, tuple(examples[index] for index in sorted(held_out))


def load_picture(example: Example, flip: bool = False) -> Image.Image:
    """The picture as it is trained: RGB, scaled to cover its bucket, cut at its centre, mirrored if ``flip``.

    Raises UserError for a file that is gone or damaged.
    """
    return _fitted(read_image, example.path, example, flip)


def load_mask(example: Example, flip: bool = False) -> Image.Image | None:
    """The mask in the size and cut of the picture: mode "L", white counts. None if there is none. Raises UserError."""
    return None if example.mask is None else _fitted(read_mask, example.mask, example, flip)


def _fitted(read: Callable[[Path], Image.Image], path: Path, example: Example, flip: bool) -> Image.Image:
    try:
        picture = read(path)
    except UserError as error:
        raise UserError(f"{error}; {_PREPARE}", error.exit_code) from None
    if example.version is not None:
        picture = apply(picture, example.version)
    picture = fit_to(picture, *example.size_px)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture


def find_pictures(folder: Path) -> list[Path]:
    """Every picture below ``folder`` that is neither hidden nor a mask, by name."""
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "no such folder"
        raise not_found(f"{folder}: {kind}; name the folder that `python -m src.prepare_dataset` made, or one of pictures")
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found = (Path(parent, name) for name in names if not name.startswith("."))
        paths += [path for path in found if path.suffix.lower() in PICTURE_SUFFIXES and not path.stem.endswith(MASK_ENDING)]
    if not paths:
        raise refused(f"{folder}: holds no pictures; run `python -m src.prepare_dataset --src PHOTOS --dst {folder}` first")
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _captions(
    folder: Path, paths: Sequence[Path], prepared: PreparedFolder, fixed_caption: str | None
) -> tuple[dict[Path, tuple[str, ...]], list[str]]:
    """At least one caption for each picture, and notes."""
    if fixed_caption is not None:
        return dict.fromkeys(paths, (fixed_caption,)), []
    # What prepare_dataset wrote stands in its metadata, too, where nobody who empties a caption file looks.
    captions, notes = read_captions(folder, paths, empty_is_none=bool(prepared.origins))
    trigger = prepared.trigger
    silent = [path for path in paths if not captions[path]]
    if silent and trigger is None:
        raise refused(
            f"{folder}: no caption for {_some([path.relative_to(folder).as_posix() for path in silent])}; write what is to be "
            'seen into a .txt file of the same name, or prepare them with --trigger "sks dog"'
        )
    if silent:
        notes.append(f"{len(silent)} of {len(paths)} pictures have no caption; they are trained with the trigger, '{trigger}'")
    return captions | dict.fromkeys(silent, (trigger or "",)), notes


def _picture_sizes(paths: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """(width, height) of each picture, from the headers alone."""
    sizes_px, problems = {}, []
    for path in paths:
        try:
            sizes_px[path] = picture_size(path)
        except UserError as error:
            problems.append(error)
    if problems:
        others = f" (and {len(problems) - 1} more pictures)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{others}; {_PREPARE}", problems[0].exit_code)
    return sizes_px


def _find_masks(paths: Sequence[Path], pictures_px: Mapping[Path, tuple[int, int]], notes: list[str]) -> dict[Path, Path]:
    """The mask of each picture that has one; it must have the picture's shape, or it would mark something else."""
    candidates = {path: path.with_name(f"{path.stem}{MASK_ENDING}.png") for path in paths}
    odd = oddly_spelled(paths)
    found = {path: mask if mask.is_file() else odd.get(mask, mask) for path, mask in candidates.items()}
    masks = {path: mask for path, mask in found.items() if mask.is_file()}
    if not masks:
        name = candidates[paths[0]].name
        raise refused(f"{paths[0].parent}: masked loss, but there is no mask such as {name}; paint white what counts")
    for path, mask in masks.items():
        (width, height), (mask_width, mask_height) = pictures_px[path], picture_size(mask)
        if abs(mask_width * height - mask_height * width) > max(width, height, mask_width, mask_height):  # a pixel off
            raise refused(f"{mask}: {mask_width}x{mask_height} is not the shape of {path.name}; make the mask anew")
    if len(masks) < len(paths):
        notes.append(f"{len(paths) - len(masks)} of {len(paths)} pictures have no mask; all of such a picture counts")
    return masks


def _size_notes(examples: Sequence[Example], pictures_px: Mapping[Path, tuple[int, int]]) -> list[str]:
    """How many pictures are enlarged, and which sizes are trained."""
    notes = []
    scales = {item.path: enlargement(pictures_px[item.path], item.size_px) for item in examples}
    if enlarged := [path for path, scale in scales.items() if scale > 1]:
        worst = max(enlarged, key=lambda path: scales[path])
        width_px, height_px = pictures_px[worst]
        notes.append(
            f"{len(enlarged)} of {len(examples)} pictures are smaller than the training size and are enlarged, most of all "
            f"{worst.name} ({width_px}x{height_px}, by {scales[worst]:.2g}); larger originals or a smaller --resolution help"
        )
    counts = Counter(item.size_px for item in examples)
    if len(counts) > 1:
        notes.append("sizes: " + ", ".join(f"{w}x{h} ({count})" for (w, h), count in counts.most_common()))
    return notes


def _digest(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    """SHA-256 of everything that a training sees of its pictures. File names are not part of it: they only order them.
    Nor is what follows from the other fields and the training's settings."""
    rows = [
        (*astuple(replace(item, path=None, mask=None))[:-_DERIVED_FIELDS], sha256_of(item.mask) if item.mask else None)
        for item in (*train, *held_out)
    ]
    return hashlib.sha256(json.dumps([len(train), rows]).encode()).hexdigest()


def _some(names: Sequence[str], shown: int = 10) -> str:
    """Up to ten names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


# --- order ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draw:
    """One visit to one example."""

    example: int  # its index
    caption: int  # index of the caption, -1: none
    flip: bool
    key: int  # 63 bits, another one for each visit: what is random about it comes from here


def subkey(key: int, purpose: str) -> int:
    """A key of 63 bits for one ``purpose`` of ``key``: what is drawn from it tells nothing about any other purpose."""
    digest = hashlib.blake2b(f"{key} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Order:
    """Which examples make which batch, for ever: a pure function of the arguments and the batch's index.

    An epoch holds every example ``repeats`` times. Where some are ``priors`` (pictures of the class, for prior
    preservation), it holds the others so, and as many priors as these, taken in turn from epoch to epoch.

    Only examples of one group stand in a batch. A group's last batch, if short, is filled up with pictures of the group, so
    that every step sees equally many.
    """

    def __init__(
        self,
        groups: Sequence[Hashable],
        repeats: Sequence[int],
        caption_counts: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        caption_dropout: float,
        flip: bool,
        priors: Sequence[bool] | None = None,
        all_captions: bool = False,
    ) -> None:
        """``all_captions``: an epoch holds each example so many times for each of its captions, in turn."""
        if all_captions:
            repeats = [count * captions for count, captions in zip(repeats, caption_counts)]
        self._all_captions = all_captions
        self._repeats, self._caption_counts = repeats, caption_counts
        self._batch_size, self._seed = batch_size, seed
        self._caption_dropout, self._flip = caption_dropout, flip
        priors = priors or [False] * len(groups)
        self._subjects: dict[Hashable, list[int]] = defaultdict(list)
        self._priors: dict[Hashable, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            (self._priors if priors[index] else self._subjects)[group].append(index)
        visits = sum(repeats[index] for members in self._subjects.values() for index in members)
        self._prior_visits = _shares(visits, {group: len(members) for group, members in self._priors.items()})
        self._cached: tuple[int, list[list[tuple[int, int]]]] = (-1, [])
        self.batches_per_epoch = len(self._epoch(0))
        self.fill_ups = self.batches_per_epoch * batch_size - visits - sum(self._prior_visits.values())  # an epoch

    def batch(self, index: int) -> list[Draw]:
        """The draws of batch ``index`` (from 0, without end); all processes together work on them."""
        epoch, place = divmod(index, self.batches_per_epoch)
        return [self._draw(epoch, example, visit) for example, visit in self._epoch(epoch)[place]]

    def _epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The batches of one epoch; each entry is an example and which of its visits in this epoch it is."""
        if self._cached[0] != epoch:
            source = random.Random(f"{self._seed} {epoch}")
            batches = []
            for group in dict.fromkeys([*self._subjects, *self._priors]):
                batches += self._group_batches(group, epoch, source)
            source.shuffle(batches)
            self._cached = epoch, batches
        return self._cached[1]

    def _group_batches(self, group: Hashable, epoch: int, source: random.Random) -> list[list[tuple[int, int]]]:
        members = [index for index in self._subjects.get(group, []) for _ in range(self._repeats[index])]
        if pool := self._priors.get(group):
            count = self._prior_visits[group]
            members += [pool[(epoch * count + turn) % len(pool)] for turn in range(count)]
        source.shuffle(members)
        members += [members[extra % len(members)] for extra in range(-len(members) % self._batch_size)]
        visits: Counter[int] = Counter()
        entries = []
        for index in members:
            entries.append((index, visits[index]))
            visits[index] += 1
        return [entries[start : start + self._batch_size] for start in range(0, len(entries), self._batch_size)]

    def _draw(self, epoch: int, example: int, visit: int) -> Draw:
        # By the visit and not by the place in the epoch: so a picture meets the same noise whatever the batch size is.
        key = subkey(self._seed, f"epoch {epoch} example {example} visit {visit}")
        dropped = subkey(key, "caption dropout") < self._caption_dropout * 2**_KEY_BITS
        turn = visit if self._all_captions else subkey(key, "caption")
        caption = -1 if dropped else turn % self._caption_counts[example]
        return Draw(example, caption, self._flip and bool(subkey(key, "flip") & 1), key)


def _shares(total: int, sizes: Mapping[Hashable, int]) -> dict[Hashable, int]:
    """``total`` split in proportion to ``sizes`` (largest remainders get what is left over)."""
    everything = sum(sizes.values())
    shares = {group: total * size // everything for group, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda group: -(total * sizes[group] % everything))
    for group in by_remainder[: total - sum(shares.values())]:
        shares[group] += 1
    return shares
