"""The figures of two sets of pictures, each with what it rests on: a number too small to be one is said, not shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from src.evaluation import metrics
from src.evaluation.metrics import Spread
from src.terminal import counted

FID_PICTURES = 10_000  # below, published Fréchet distances are not to be compared with
FEW_PICTURES = 1_000
SPLITS = 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
REACH_K, DENSITY_K = 3, 5
LOWER, HIGHER = "lower", "higher"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement; ``value`` is None where there were too few pictures, and ``note`` says so."""

    key: str
    name: str
    features: str  # the extractor's name
    value: float | None
    std: float | None  # over subsets or splits, where there are any
    better: str
    based_on: str  # pictures, subsets, splits
    note: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one extractor saw in both sets: (N, D) and (M, D), and the logits (M, C) of the generated ones, if it classifies."""

    extractor: str
    real: np.ndarray
    generated: np.ndarray
    logits: np.ndarray | None = None

    @property
    def fewer(self) -> int:
        return min(len(self.real), len(self.generated))

    @property
    def pictures(self) -> str:
        return f"{len(self.real):,} real, {len(self.generated):,} generated"


def of_inception(seen: Seen, seed: int) -> list[Figure]:
    """FID, KID, inception score, precision and its like."""
    return [
        _frechet(seen, "FID"),
        _kernel(seen, "KID", seed),
        _inception_score(seen, seed),
        *_manifolds(seen),
    ]


def of_clip(seen: Seen, texts: np.ndarray | None, of_texts: np.ndarray | None, seed: int) -> list[Figure]:
    """CMMD, CLIP score, and what is FID and KID on Inception, here under names of their own; precision and its like.

    ``texts`` (T, D) are the prompts of the generated pictures whose indices are ``of_texts`` (T,); None: not asked for.
    """
    found = [_cmmd(seen), _frechet(seen, "Fréchet distance"), _kernel(seen, "kernel distance", seed), *_manifolds(seen)]
    return found if texts is None else [_clip_score(seen, texts, of_texts), *found]


def _measured(
    key: str, name: str, seen: Seen, better: str, needed: int, measure: Callable[[], float | Spread],
    *, based_on: str = "", note: str = "", have: int | None = None,
) -> Figure:  # fmt: skip
    """The figure, or the reason why there is none: a side (or ``have``) has fewer than the pictures ``needed``."""
    based_on = based_on or seen.pictures
    have = seen.fewer if have is None else have
    if have < needed:
        return Figure(
            key, name, seen.extractor, None, None, better, based_on, f"not measured: it takes {needed}, there are {have}"
        )
    value = measure()
    mean, std = (value.mean, value.std) if isinstance(value, Spread) else (value, None)
    return Figure(key, name, seen.extractor, mean, std, better, based_on, note)


def _frechet(seen: Seen, name: str) -> Figure:
    dimensions, note = seen.real.shape[1], ""
    if seen.fewer <= dimensions:
        note = f"biased upwards: fewer pictures than the {dimensions:,} features; go by the kernel figures"
    elif seen.fewer < FID_PICTURES:
        note = f"biased upwards below {FID_PICTURES:,} pictures; go by the kernel figures"
    measure = partial(metrics.frechet_distance, seen.real, seen.generated)
    return _measured("frechet_distance", name, seen, LOWER, 2, measure, note=note)


def _kernel(seen: Seen, name: str, seed: int) -> Figure:
    size = min(KID_SUBSET_SIZE, seen.fewer // 2)  # of a whole side all subsets would be the same
    based_on = f"{seen.pictures}; {KID_SUBSETS} subsets of {size}"
    measure = partial(metrics.kernel_distance, seen.real, seen.generated, KID_SUBSETS, size, seed)
    return _measured("kernel_distance", name, seen, LOWER, 4, measure, based_on=based_on, note=_few(seen))


def _cmmd(seen: Seen) -> Figure:
    measure, note = partial(metrics.cmmd, seen.real, seen.generated), ""
    if 2 <= seen.fewer < FEW_PICTURES:
        note = f"biased upwards by about {measure() - measure(with_itself=False):.2g} at this number of pictures"
    return _measured("cmmd", "CMMD", seen, LOWER, 2, measure, note=note)


def _inception_score(seen: Seen, seed: int) -> Figure:
    each = len(seen.generated) // SPLITS
    note = "" if each >= FEW_PICTURES else f"biased downwards: splits of about {each} pictures"
    return _measured(
        "inception_score", "inception score", seen, HIGHER, SPLITS,
        partial(metrics.inception_score, seen.logits, SPLITS, seed),
        based_on=f"{len(seen.generated):,} generated; {SPLITS} splits", note=note, have=len(seen.generated),
    )  # fmt: skip


def _clip_score(seen: Seen, texts: np.ndarray, of_texts: np.ndarray) -> Figure:
    return _measured(
        "clip_score", "CLIP score", seen, HIGHER, 1, partial(metrics.clip_score, seen.generated[of_texts], texts),
        based_on=f"{len(texts):,} of {len(seen.generated):,} generated have a prompt", have=len(texts),
    )  # fmt: skip


def _manifolds(seen: Seen) -> list[Figure]:
    """Precision, recall, density, coverage, authenticity: by the nearest neighbours of each picture."""
    of, few = seen.pictures, _few(seen)
    found = []
    for names, k, measure in (
        (("precision", "recall"), REACH_K, metrics.precision_recall),
        (("density", "coverage"), DENSITY_K, metrics.density_coverage),
    ):
        values = measure(seen.real, seen.generated, k) if seen.fewer > k else (0.0, 0.0)  # too few: not shown
        for name, value in zip(names, values):
            measured = partial(float, value)
            found.append(_measured(name, name, seen, HIGHER, k + 1, measured, based_on=f"{of}; k = {k}", note=few))
    authenticity = partial(_authenticity, seen)
    return [*found, _measured("authenticity", "authenticity", seen, HIGHER, 2, authenticity, note=few)]


def _authenticity(seen: Seen) -> float:
    return float((metrics.closeness(seen.real, seen.generated) > 1).mean())


def _few(seen: Seen) -> str:
    return f"coarse: {counted(seen.fewer, 'picture')} on the smaller side" if seen.fewer < FEW_PICTURES else ""
