"""The page of ``quality``: the figures, a sample of both sides, and the generated pictures that are nearest to real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src import report
from src.evaluation import inputs, metrics
from src.evaluation.figures import Figure, Seen
from src.images import read_image

if TYPE_CHECKING:
    from src.evaluation.quality import Comparison

SHOWN = 24  # pictures of each side
SUSPECTS, NEIGHBOURS = 8, 3
_PICTURE_PX, _SUSPECT_PX = 128, 192
_NEAR_COPY = 0.1  # of closeness: marked

_ON_FIGURES = """\
Distances (CMMD; FID or Fréchet distance; KID or kernel distance): 0 is no difference that the features can see. FID fits a \
Gaussian to each side and is biased upwards, the more the fewer the pictures. The kernel distance is unbiased, and CMMD \
needs few pictures: of a small sample believe those two. Precision and density: do the generated pictures look like real \
ones? Recall and coverage: is all that is real among the generated? Authenticity: the share of generated pictures that are \
no copies, by the neighbours below; what is usual depends on the features, so compare it between models. CLIP score: 100 \
times the cosine of picture and prompt. After ± stands the deviation over subsets, splits or, of the CLIP score, pictures.
Figures can be compared where the features, the number of pictures and the real pictures are the same, and not otherwise. \
The real pictures must be ones that the model has not learnt: of what it has learnt by heart every figure here is perfect."""
_ON_COPIES = """\
The generated pictures that are nearest to a real one, each beside its nearest real pictures. Closeness: its distance by \
that of the real picture to its own nearest real one. 0 is the same picture, below a tenth (marked) nearly the same, below \
1 it is nearer than real pictures are to each other. Where the real pictures are those that were learnt, this is the check \
for learning by heart."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A generated picture and its nearest real ones, nearest first, by index."""

    generated: int
    real: tuple[int, ...]
    distances: tuple[float, ...]
    closeness: float | None  # None: infinite, its nearest real picture is there twice

    def as_json(self, generated: Sequence[Path], real: Sequence[Path]) -> dict[str, Any]:
        return {
            "generated": generated[self.generated].name,
            "real": [real[index].name for index in self.real],
            "distances": list(self.distances),
            "closeness": self.closeness,
        }


def copies(seen: Seen, count: int = SUSPECTS) -> list[Copy]:
    """The ``count`` generated pictures of the smallest closeness (metrics.closeness); none with a single real picture."""
    if len(seen.real) < 2:
        return []
    closeness = metrics.closeness(seen.real, seen.generated)
    chosen = np.argsort(closeness, kind="stable")[:count]
    indices, distances = metrics.nearest(seen.generated[chosen], seen.real, min(NEIGHBOURS, len(seen.real)))
    return [
        Copy(int(index), tuple(map(int, near)), tuple(map(float, far)), float(ratio) if math.isfinite(ratio) else None)
        for index, near, far, ratio in zip(chosen, indices, distances, closeness[chosen])
    ]


def page(comparison: Comparison, found: Sequence[Figure], suspects: Sequence[Copy], extractor: str) -> bytes:
    """The finished file. Raises UserError for a picture that is gone meanwhile."""
    real, generated = comparison.real, comparison.generated
    prompts = comparison.prompts
    facts = {
        "real": f"{len(real.pictures):,} of {real.found:,} pictures in {real.folder.resolve().name}",
        "generated": f"{len(generated.pictures):,} of {generated.found:,} pictures in {generated.folder.resolve().name}",
        "prompts": None if prompts is None else f"{len(prompts) - prompts.count(None):,} of {len(prompts):,}",
        "seed": comparison.seed,
    }
    return report.page(
        f"Quality of {generated.folder.resolve().name}",
        report.facts({name: value for name, value in facts.items() if value is not None}),
        report.section("Figures", _table(found), report.text(_ON_FIGURES)),
        report.section("Real, a sample", _gallery(inputs.sample(real.pictures, SHOWN, comparison.seed), {})),
        report.section("Generated, a sample", _generated(comparison)),
        report.section("Nearest neighbours", _suspects(comparison, suspects), report.text(f"By {extractor}. {_ON_COPIES}")),
    )


def _table(found: Sequence[Figure]) -> str:
    rows = [
        (figure.name, figure.features, _shown(figure), figure.better, figure.based_on, figure.note or None) for figure in found
    ]
    return report.table(["metric", "features", "value", "better", "of", "to know"], rows)


def _shown(figure: Figure) -> str | None:
    if figure.value is None:
        return None
    return f"{figure.value:.4g}" if figure.std is None else f"{figure.value:.4g} ± {figure.std:.2g}"


def _generated(comparison: Comparison) -> str:
    pictures = comparison.generated.pictures
    captions = dict(zip(pictures, comparison.prompts or []))
    return _gallery(inputs.sample(pictures, SHOWN, comparison.seed), captions)


def _gallery(pictures: Sequence[Path], captions: dict[Path, str | None]) -> str:
    return report.gallery(report.picture(read_image(path), captions.get(path) or "", _PICTURE_PX) for path in pictures)


def _suspects(comparison: Comparison, suspects: Sequence[Copy]) -> str:
    if not suspects:
        return report.text("Not measured: it takes two real pictures.")
    real, generated = comparison.real.pictures, comparison.generated.pictures
    columns = ["closeness", "generated", *[f"real, {place}" for place in ("nearest", "second", "third")]]
    rows = []
    for copy in suspects:
        cells = [_thumbnail(generated[copy.generated], generated[copy.generated].name)]
        cells += [_thumbnail(real[index], f"{far:.4g}") for index, far in zip(copy.real, copy.distances)]
        ratio = "twice among the real" if copy.closeness is None else f"{copy.closeness:.3g}"
        rows.append([ratio, *cells, *[None] * (len(columns) - 1 - len(cells))])
    marked = [index for index, copy in enumerate(suspects) if copy.closeness is not None and copy.closeness < _NEAR_COPY]
    return report.table(columns, rows, marked=marked)


def _thumbnail(path: Path, caption: str) -> str:
    return report.picture(read_image(path), caption, _SUSPECT_PX)
