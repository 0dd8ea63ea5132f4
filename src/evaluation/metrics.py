"""Distances and scores between two sets of pictures: pure functions on feature matrices, in float64.

A feature matrix is (N, D), a row a picture; where the rows come from (Inception, CLIP) is src/evaluation/features.py's
business. A figure can be compared only with one of the same extractor, and the biased ones (Fréchet distance, CMMD,
inception score, precision and its like) only with one of the same number of pictures.

All raise ValueError for matrices of other forms, for numbers that are not finite, and for too few rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_BLOCK = 1024  # rows whose distances are held at once
_ROUNDING = 1e-12  # a squared distance below this share of the squared lengths is what float64 leaves of 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and standard deviation (of the values themselves, not of their mean) over subsets or splits."""

    mean: float
    std: float


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance of the Gaussians through (N, D) and (M, D): FID on Inception's features. 0 to infinity, 0 is equal.

    |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^1/2), Heusel et al. 2017 (arXiv 1706.08500), with unbiased covariances. No root of a
    matrix is taken: with S = R'R, the trace of (S1 S2)^1/2 is the sum of the singular values of R1 R2'. That holds for
    singular covariances, too, so fewer pictures than features need no correction. It is biased upwards, the more the fewer
    the pictures. N and M are at least 2.
    """
    real, generated = _pair(real, generated, 2)
    mean_1, factor_1 = _gaussian(real)
    mean_2, factor_2 = _gaussian(generated)
    shared = np.linalg.svd(factor_1 @ factor_2.T, compute_uv=False).sum()
    distance = ((mean_1 - mean_2) ** 2).sum() + (factor_1**2).sum() + (factor_2**2).sum() - 2 * shared
    return max(0.0, float(distance))


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Squared maximum mean discrepancy of (N, D) and (M, D) under (x.y / D + 1)^3, unbiased: may be a little below 0.

    Gretton et al. 2012 (JMLR 13), lemma 6. N and M are at least 2.
    """
    x, y = _pair(x, y, 2)
    within = sum((_cubic(item, item).sum() - _cubic_diagonal(item).sum()) / (len(item) * (len(item) - 1)) for item in (x, y))
    return float(within - 2 * _cubic(x, y).mean())


def kernel_distance(
    real: np.ndarray, generated: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Spread:
    """:func:`polynomial_mmd` over random subsets of both: KID on Inception's features.

    Binkowski et al. 2018 (arXiv 1801.01401). The mean does not depend on the number of pictures; the deviation says how far
    one subset can be off. Raises ValueError for subsets that are larger than a side.
    """
    real, generated = _pair(real, generated, 2)
    if not 2 <= subset_size <= min(len(real), len(generated)):
        raise ValueError(f"subsets of {subset_size} out of {len(real)} and {len(generated)} rows")
    random = np.random.default_rng(seed)
    values = [
        polynomial_mmd(*(side[random.choice(len(side), subset_size, replace=False)] for side in (real, generated)))
        for _ in range(subsets)
    ]
    return Spread(float(np.mean(values)), float(np.std(values)))


def cmmd(
    real: np.ndarray, generated: np.ndarray, sigma: float = 10.0, scale: float = 1000.0, with_itself: bool = True
) -> float:
    """``scale`` times the squared discrepancy of CLIP's unit vectors under a Gaussian kernel. 0 is equal.

    At most 2 scale (1 - e^(-2 / sigma^2)), 39.6 with the defaults: each side is one point, opposite the other's.
    Jayasumana et al. 2024 (arXiv 2401.09603), with the authors' estimator: the biased one, which counts each row with
    itself, so that even two samples of one source are above 0. Without (``with_itself=False``) it is unbiased, needs two
    rows a side and may be a little below 0.
    """
    real, generated = _pair(real, generated, 1 if with_itself else 2)

    def kernels(x: np.ndarray, y: np.ndarray) -> float:
        return float(sum(np.exp(squared / (-2 * sigma**2)).sum() for squared in _squared_distances(x, y)))

    def within(x: np.ndarray) -> float:
        count = len(x)
        return kernels(x, x) / count**2 if with_itself else (kernels(x, x) - count) / (count * (count - 1))

    between = kernels(real, generated) / (len(real) * len(generated))
    distance = scale * (within(real) + within(generated) - 2 * between)
    return max(0.0, distance) if with_itself else distance


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 0) -> Spread:
    """exp of the mean divergence of p(class | picture) from p(class), for each split: 1 to C, of logits (N, C).

    Salimans et al. 2016 (arXiv 1606.03498). The rows are shuffled by ``seed``, then cut into equal splits. It sees pictures
    that are clear and of many classes; it knows nothing of the real ones.
    """
    logits = _matrix(logits, splits)
    logits = logits[np.random.default_rng(seed).permutation(len(logits))]
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))  # (N, C)
    scores = []
    for part in range(splits):
        log_split = log_p[part * len(log_p) // splits : (part + 1) * len(log_p) // splits]
        p = np.exp(log_split)
        log_mean = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))  # a class that nothing shows weighs 0
        scores.append(np.exp((p * (log_split - log_mean)).sum(axis=1).mean()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def clip_score(pictures: np.ndarray, texts: np.ndarray) -> Spread:
    """100 times the cosine of picture i (row of (N, D)) and text i: mean, at least 0, and deviation. 0 to 100.

    As torchmetrics computes it. CLIPScore of Hessel et al. 2021 (arXiv 2104.08718) is 2.5 max(cosine, 0) for each pair:
    its mean is this one by 40, unless cosines are negative.
    """
    pictures, texts = _pair(pictures, texts, 1)
    if len(pictures) != len(texts):
        raise ValueError(f"{len(pictures)} pictures with {len(texts)} texts")
    lengths = np.linalg.norm(pictures, axis=1) * np.linalg.norm(texts, axis=1)
    if not lengths.all():
        raise ValueError("a row of zeros has no direction")
    scores = 100 * (pictures * texts).sum(axis=1) / lengths
    return Spread(max(0.0, float(scores.mean())), float(scores.std()))


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """(precision, recall), 0 to 1 each: Kynkäänniemi et al. 2019 (arXiv 1904.06991).

    Precision: generated pictures within reach of a real one, that is no farther from it than its k-th nearest real one.
    Recall: the same with the sides exchanged. Each side has more than k rows.
    """
    real, generated = _pair(real, generated, k + 1)
    return _within_reach(generated, real, k), _within_reach(real, generated, k)


def density_coverage(real: np.ndarray, generated: np.ndarray, k: int = 5) -> tuple[float, float]:
    """(density, coverage), Naeem et al. 2020 (arXiv 2002.09797): as precision and recall, less at the mercy of outliers.

    Density: how many real pictures a generated one is within reach of, by ``k``; 0 up, near 1 for equal distributions.
    Coverage: real pictures with a generated one within their reach, 0 to 1. The real side has more than k rows.
    """
    real, generated = _pair(real, generated, 1)
    _matrix(real, k + 1)
    radii = _squared_radii(real, k)
    reached, hits = np.zeros(len(real), dtype=bool), 0
    for squared in _squared_distances(generated, real):
        inside = squared <= radii
        reached |= inside.any(axis=0)
        hits += int(inside.sum())
    return hits / (k * len(generated)), float(reached.mean())


def nearest(queries: np.ndarray, references: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """For each query the ``count`` nearest references, nearest first: indices and Euclidean distances, (N, count) each."""
    queries, references = _pair(queries, references, 1)
    _matrix(references, count)
    indices, distances = [], []
    for squared in _squared_distances(queries, references):
        order = np.argsort(squared, axis=1, kind="stable")[:, :count]
        indices.append(order)
        distances.append(np.sqrt(np.take_along_axis(squared, order, axis=1)))
    return np.concatenate(indices), np.concatenate(distances)


def closeness(real: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """(M,): how far each generated picture is from its nearest real one, by how far that one is from its own nearest.

    0 is a copy; the share above 1 is the authenticity of Alaa et al. 2022 (arXiv 2102.08921), which of equal distributions
    is about 0.4 in 2 dimensions and 0.85 in 512. At least two real rows.
    """
    real, generated = _pair(real, generated, 1)
    own = np.sqrt(_squared_radii(_matrix(real, 2), 1))
    indices, distances = nearest(generated, real)
    near, reach = distances[:, 0], own[indices[:, 0]]
    return np.divide(near, reach, out=np.where(near > 0, np.inf, 0.0), where=reach > 0)


def _matrix(values: np.ndarray, least_rows: int) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) < least_rows:
        raise ValueError(f"expected a matrix of at least {least_rows} rows, got the shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("there are numbers that are not finite")
    return values


def _pair(x: np.ndarray, y: np.ndarray, least_rows: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = _matrix(x, least_rows), _matrix(y, least_rows)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{x.shape[1]} features on one side, {y.shape[1]} on the other")
    return x, y


def _gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,), and a triangle R (min(N, D), D) with R'R the covariance."""
    mean = x.mean(axis=0)
    return mean, np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r")


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _cubic_diagonal(x: np.ndarray) -> np.ndarray:
    return ((x * x).sum(axis=1) / x.shape[1] + 1) ** 3


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances of rows, (up to ``_BLOCK``, M) at a time; equal rows are 0 apart, whatever rounding says."""
    lengths = (y * y).sum(axis=1)
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK]
        sums = (block * block).sum(axis=1)[:, None] + lengths
        squared = sums - 2 * block @ y.T
        squared[squared < _ROUNDING * sums] = 0.0
        yield squared


def _squared_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row; the row itself is the first of the sorted ones."""
    return np.concatenate([np.partition(squared, k, axis=1)[:, k] for squared in _squared_distances(x, x)])


def _within_reach(queries: np.ndarray, references: np.ndarray, k: int) -> float:
    """The share of queries that are no farther from some reference than that one's k-th nearest other reference."""
    radii = _squared_radii(references, k)
    inside = [(squared <= radii).any(axis=1) for squared in _squared_distances(queries, references)]
    return float(np.concatenate(inside).mean())
