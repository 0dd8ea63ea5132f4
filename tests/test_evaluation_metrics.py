"""Metrics against closed forms, hand-computed kernels and, where they are installed, torchmetrics and torch-fidelity."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from scipy.spatial.distance import cdist

from src.evaluation import metrics


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns))


def with_moments(mean: np.ndarray, covariance: np.ndarray, rows: int = 50, seed: int = 0) -> np.ndarray:
    """Rows whose mean and unbiased covariance are exactly these."""
    x = normal(rows, len(mean), seed)
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ scipy.linalg.sqrtm(covariance).real.T + mean


def some_covariance(size: int, seed: int) -> np.ndarray:
    x = normal(size, size, seed)
    return x @ x.T / size + 0.1 * np.eye(size)


# --- Fréchet distance ------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_by_their_formula() -> None:
    one, other = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 16.0])
    shift = np.array([1.0, -2.0, 0.5])
    found = metrics.frechet_distance(with_moments(np.zeros(3), np.diag(one)), with_moments(shift, np.diag(other), 80, 1))
    assert found == pytest.approx((shift**2).sum() + ((np.sqrt(one) - np.sqrt(other)) ** 2).sum(), rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    one, other = some_covariance(6, 1), some_covariance(6, 2)
    root = scipy.linalg.sqrtm(one)
    wanted = np.trace(one + other - 2 * scipy.linalg.sqrtm(root @ other @ root)).real
    found = metrics.frechet_distance(with_moments(np.zeros(6), one), with_moments(np.zeros(6), other, 70, 3))
    assert found == pytest.approx(wanted, rel=1e-9)


def test_frechet_distance_with_fewer_pictures_than_features() -> None:
    """Both covariances are singular. In a plane that a rotation hides, the distance is that of the plane."""
    one, other = with_moments(np.zeros(2), np.diag([1.0, 4.0]), 5), with_moments(np.ones(2), np.diag([9.0, 4.0]), 6, 1)
    turn = np.linalg.qr(normal(300, 300))[0][:2]
    assert metrics.frechet_distance(one @ turn, other @ turn) == pytest.approx(2 + (3 - 1) ** 2, rel=1e-9)
    assert metrics.frechet_distance(normal(5, 300), normal(5, 300)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_symmetric_and_grows_with_the_bias_of_a_small_sample() -> None:
    x, y = normal(400, 30), normal(300, 30, 1)
    assert metrics.frechet_distance(x, y) == pytest.approx(metrics.frechet_distance(y, x))
    assert metrics.frechet_distance(x[:40], y[:40]) > 2 * metrics.frechet_distance(x, y)


# --- kernels ---------------------------------------------------------------------------------------------------------------


def test_polynomial_mmd_by_hand() -> None:
    x, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    kernel = lambda a, b: (a @ b / 2 + 1) ** 3  # noqa: E731
    within_x = kernel(x[0], x[1])
    within_y = (kernel(y[0], y[1]) + kernel(y[0], y[2]) + kernel(y[1], y[2])) / 3
    between = sum(kernel(a, b) for a in x for b in y) / 6
    assert metrics.polynomial_mmd(x, y) == pytest.approx(within_x + within_y - 2 * between)


def test_the_kernel_distance_is_unbiased() -> None:
    """Of equal distributions its mean over many draws is 0, of any size; one draw is on either side of it."""
    values = [metrics.polynomial_mmd(normal(8, 4, seed), normal(8, 4, seed + 1000)) for seed in range(400)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < -5 * error
    assert max(values) > 5 * error


def test_subsets_are_drawn_by_the_seed_and_of_both_sides() -> None:
    x, y = normal(40, 5), normal(60, 5, 1) + 1
    found = metrics.kernel_distance(x, y, subsets=200, subset_size=20)
    assert found == metrics.kernel_distance(x, y, subsets=200, subset_size=20)
    assert found != metrics.kernel_distance(x, y, subsets=200, subset_size=20, seed=1)
    assert found.mean == pytest.approx(metrics.polynomial_mmd(x, y), abs=4 * found.std / math.sqrt(200))
    whole = metrics.kernel_distance(x, y[:40], subsets=3, subset_size=40)
    assert whole.mean == pytest.approx(metrics.polynomial_mmd(x, y[:40]))
    assert whole.std == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="subsets of 41"):
        metrics.kernel_distance(x, y, subset_size=41)


def test_cmmd_by_hand() -> None:
    x, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[-1.0, 0.0]])
    k = lambda squared: math.exp(-squared / 200)  # noqa: E731
    biased = (2 * k(0) + 2 * k(2)) / 4 + 1 - 2 * (k(4) + k(2)) / 2
    assert metrics.cmmd(x, y) == pytest.approx(1000 * biased)
    y = np.array([[-1.0, 0.0], [0.0, -1.0]])
    unbiased = k(2) + k(2) - 2 * (k(4) + k(2) + k(2) + k(4)) / 4
    assert metrics.cmmd(x, y, with_itself=False) == pytest.approx(1000 * unbiased)
    assert metrics.cmmd(x, x) == 0


def test_cmmd_of_opposite_points_is_the_most_that_the_docstring_says() -> None:
    point = np.eye(8)[:1]
    most = metrics.cmmd(point, -point)
    assert most == pytest.approx(2000 * (1 - math.exp(-2 / 100)))
    assert f"{most:.1f} with the defaults" in metrics.cmmd.__doc__


def test_cmmd_of_gaussians_by_their_formula() -> None:
    """E k(x, y) of independent N(m, I) and N(0, I) in D dimensions: (s / (s + 2))^(D/2) exp(-|m|^2 / 2 (s + 2)), s = sigma^2."""
    shift = 3.0
    x, y = normal(3000, 4), normal(3000, 4, 1) + np.array([shift, 0, 0, 0])
    wanted = 2 * (100 / 102) ** 2 * (1 - math.exp(-(shift**2) / 2 / 102))
    assert metrics.cmmd(x, y) == pytest.approx(1000 * wanted, rel=0.05)


# --- scores ----------------------------------------------------------------------------------------------------------------


def test_inception_score_knows_its_limits() -> None:
    sure = np.eye(10)[np.arange(100) % 10] * 1000.0
    assert metrics.inception_score(sure, splits=1).mean == pytest.approx(10)
    assert metrics.inception_score(np.zeros((100, 10))).mean == pytest.approx(1)
    assert metrics.inception_score(np.full((100, 10), 7.0)).std == pytest.approx(0)


def test_inception_score_of_two_kinds_of_pictures_by_hand() -> None:
    """p = (a, 1 - a) and (1 - a, a) in equal numbers: exp(ln 2 - H(a))."""
    a = 0.9
    logits = np.log(np.array([[a, 1 - a], [1 - a, a]] * 50))
    entropy = -(a * math.log(a) + (1 - a) * math.log(1 - a))
    assert metrics.inception_score(logits, splits=1).mean == pytest.approx(math.exp(math.log(2) - entropy))


def test_each_split_has_its_own_mean() -> None:
    logits = normal(25, 6) * 3
    rows = np.random.default_rng(5).permutation(25)
    p = scipy.special.softmax(logits[rows], axis=1)
    scores = []
    for part in (p[:8], p[8:16], p[16:]):
        divergence = scipy.special.rel_entr(part, np.broadcast_to(part.mean(axis=0), part.shape)).sum(axis=1)
        scores.append(math.exp(divergence.mean()))
    found = metrics.inception_score(logits, splits=3, seed=5)
    assert (found.mean, found.std) == pytest.approx((np.mean(scores), np.std(scores)))
    with pytest.raises(ValueError, match="at least 26 rows"):
        metrics.inception_score(logits, splits=26)


def test_clip_score_by_hand() -> None:
    pictures, texts = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 5.0]])
    found = metrics.clip_score(pictures, texts)
    assert (found.mean, found.std) == pytest.approx((80, 20))
    assert metrics.clip_score(pictures, -texts).mean == 0
    with pytest.raises(ValueError, match="2 pictures with 1 texts"):
        metrics.clip_score(pictures, texts[:1])


# --- neighbours ------------------------------------------------------------------------------------------------------------


def reaches(queries: np.ndarray, references: np.ndarray, k: int) -> np.ndarray:
    """(N, M): whether query i is within reach of reference j; by sorting, and with scipy's distances."""
    radii = np.sort(cdist(references, references), axis=1)[:, k]
    return cdist(queries, references) <= radii


def test_precision_and_recall_on_a_line() -> None:
    real = np.array([[0.0], [1.0], [2.0], [10.0]])  # with k = 1 they reach 1, 1, 1, 8
    generated = np.array([[2.5], [-0.5], [19.0]])  # reach 3, 3, 16.5
    precision, recall = metrics.precision_recall(real, generated, k=1)
    assert precision == pytest.approx(2 / 3)
    assert recall == 1
    assert metrics.precision_recall(real, generated[:2], k=1) == pytest.approx((1, 3 / 4))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbour_figures_by_sorting(k: int, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", 16)  # several blocks, the last not full
    real, generated = normal(70, 4), normal(50, 4, 1) * 1.3 + 0.3
    precision, recall = metrics.precision_recall(real, generated, k)
    assert precision == pytest.approx(reaches(generated, real, k).any(axis=1).mean())
    assert recall == pytest.approx(reaches(real, generated, k).any(axis=1).mean())
    density, coverage = metrics.density_coverage(real, generated, k)
    assert density == pytest.approx(reaches(generated, real, k).sum() / k / 50)
    assert coverage == pytest.approx(reaches(generated, real, k).any(axis=0).mean())
    assert 0 < precision < 1
    assert 0 < coverage < 1


def test_identical_sets_and_disjoint_ones() -> None:
    x = normal(60, 8) + 100
    for k in (1, 3):
        assert metrics.precision_recall(x, x, k) == (1, 1)
        assert metrics.density_coverage(x, x, k) == pytest.approx(((k + 1) / k, 1))  # itself, and the k-th on the edge
        assert metrics.precision_recall(x, x + 1000, k) == (0, 0)
        assert metrics.density_coverage(x, x + 1000, k) == (0, 0)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(x, x + 1000) == pytest.approx(8 * 1000**2)


def test_one_mode_alone_is_precise_and_covers_little() -> None:
    centres = np.repeat(np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]]), 50, axis=0)
    real, generated = centres + normal(200, 2), normal(200, 2, 1)
    precision, recall = metrics.precision_recall(real, generated)
    assert precision > 0.9
    assert recall < 0.3
    density, coverage = metrics.density_coverage(real, generated)
    assert density > 0.7
    assert coverage < 0.3


def test_density_of_equal_distributions_is_near_one() -> None:
    density, coverage = metrics.density_coverage(normal(800, 3), normal(800, 3, 1))
    assert density == pytest.approx(1, abs=0.1)
    assert coverage == pytest.approx(1 - 0.5**5, abs=0.03)  # its expected value for equal sizes: Naeem et al., equation 12


def test_an_outlier_makes_precision_but_not_density() -> None:
    real = np.concatenate([normal(100, 2), [[100.0, 0.0]]])
    generated = normal(100, 2, 1) + np.array([60.0, 0.0])
    assert metrics.precision_recall(real, generated)[0] == 1
    assert metrics.density_coverage(real, generated)[0] < 0.3


def test_nearest_neighbours() -> None:
    queries, references = normal(30, 5), normal(90, 5, 1)
    indices, distances = metrics.nearest(queries, references, 3)
    apart = cdist(queries, references)
    assert (indices == np.argsort(apart, axis=1)[:, :3]).all()
    assert distances == pytest.approx(np.sort(apart, axis=1)[:, :3])


def test_closeness_of_copies_and_of_others() -> None:
    real = np.array([[0.0], [1.0], [5.0], [5.0]])
    generated = np.array([[0.0], [0.25], [-3.0], [5.0], [5.5]])
    assert metrics.closeness(real, generated).tolist() == [0, 0.25, 3, 0, math.inf]


def test_a_copy_far_from_the_origin_is_a_copy() -> None:
    """Squared distances by |x|^2 + |y|^2 - 2 x.y would leave rounding there, not 0."""
    real = normal(20, 2048).astype(np.float32) * 0.01 + 30
    assert (metrics.closeness(real, real[3:6]) == 0).all()
    assert (metrics.nearest(real, real)[1] == 0).all()


# --- what is refused -------------------------------------------------------------------------------------------------------

TWO_SIDED = [
    metrics.frechet_distance, metrics.polynomial_mmd, metrics.cmmd, metrics.precision_recall, metrics.density_coverage,
    metrics.nearest, metrics.closeness, metrics.clip_score,
]  # fmt: skip


@pytest.mark.parametrize("metric", TWO_SIDED, ids=lambda metric: metric.__name__)
def test_no_metric_answers_nan(metric) -> None:
    good = normal(20, 4)
    for bad in (np.full((20, 4), np.nan), np.where(np.eye(20, 4) > 0, np.inf, 1.0)):
        with pytest.raises(ValueError, match="not finite"):
            metric(good, bad)
    with pytest.raises(ValueError, match="4 features on one side, 5 on the other"):
        metric(good, normal(20, 5))
    with pytest.raises(ValueError, match="rows"):
        metric(good, np.zeros((0, 4)))
    with pytest.raises(ValueError, match="matrix"):
        metric(good, np.zeros(4))


@pytest.mark.parametrize("metric", [metrics.frechet_distance, metrics.polynomial_mmd])
def test_one_picture_has_no_spread(metric) -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        metric(normal(1, 3), normal(5, 3))


def test_more_neighbours_than_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 rows"):
        metrics.precision_recall(normal(9, 2), normal(3, 2), k=3)
    with pytest.raises(ValueError, match="at least 6 rows"):
        metrics.density_coverage(normal(5, 2), normal(9, 2), k=5)


# --- other libraries -------------------------------------------------------------------------------------------------------


def test_the_same_figures_as_torchmetrics() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(90, 12), normal(90, 12, 1) * 1.5 + 0.2
    one, other = torch.from_numpy(x), torch.from_numpy(y)
    fid = _compute_fid(one.mean(0), torch.cov(one.T), other.mean(0), torch.cov(other.T)).item()
    assert metrics.frechet_distance(x, y) == pytest.approx(fid, rel=1e-9)
    assert metrics.polynomial_mmd(x, y) == pytest.approx(poly_mmd(one, other).item(), rel=1e-9)


def test_the_same_inception_score_as_torchmetrics() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.inception import InceptionScore

    class Given(torch.nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return pictures

    logits = normal(100, 12) * 2
    score = InceptionScore(feature=Given(), splits=1)
    score.update(torch.from_numpy(logits))
    assert metrics.inception_score(logits, splits=1).mean == pytest.approx(score.compute()[0].item(), rel=1e-6)


def test_the_same_figures_as_torch_fidelity() -> None:
    try:
        import torch_fidelity  # noqa: F401
    except Exception as error:  # not installed, or with a torchvision for another torch
        pytest.skip(f"torch-fidelity: {error}")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = normal(90, 12), normal(90, 12, 1) * 1.5 + 0.2
    one, other = torch.from_numpy(x), torch.from_numpy(y)
    fid = fid_statistics_to_metric(fid_features_to_statistics(one), fid_features_to_statistics(other), False)
    assert metrics.frechet_distance(x, y) == pytest.approx(fid["frechet_inception_distance"], rel=1e-9)
    whole = kid_features_to_metric(one, other, kid_subsets=1, kid_subset_size=90, verbose=False)
    assert metrics.polynomial_mmd(x, y) == pytest.approx(whole["kernel_inception_distance_mean"], rel=1e-9)
    isc = isc_features_to_metric(one, splits=1)
    assert metrics.inception_score(x, splits=1).mean == pytest.approx(isc["inception_score_mean"], rel=1e-9)
    found = prc_features_to_metric(other, one, verbose=False)  # generated first
    assert metrics.precision_recall(x, y) == pytest.approx((found["precision"], found["recall"]))
