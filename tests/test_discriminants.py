import math

import pytest
import torch

from engram_kernels.discriminants import _PENALTIES, choose_penalty, temper_of


def test_log_odds_of_normal_classes_that_overlap_need_no_factor():
    # two classes, D^2 = 0.01, far more samples than parameters: Fisher's discriminant is the log-odds
    means, within = torch.tensor([[0.0025, -0.0025], [-0.0025, 0.0025]]).double(), torch.eye(2).double() * 0.0025
    within[0, 1] = within[1, 0] = -0.0025
    assert temper_of(means, within, torch.tensor([10**9, 10**9]), 5.0) == pytest.approx(1.0, abs=2e-3)


def test_parameters_and_distance_make_the_factor_smaller():
    means, within = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double(), torch.eye(2).double() * 2
    samples = torch.tensor([50, 50])
    sure = temper_of(means, within, samples, 0.0)
    assert sure == pytest.approx(1 / (1 + 4 / 16))
    assert 0 < temper_of(means, within, samples, 20.0) < sure
    assert 0 < temper_of(means, within, samples, 100.0) < 0.01  # nothing but noise, and still an order of classes
    assert temper_of(10 * means, 10 * within, samples, 0.0) < sure


def test_classes_without_samples_have_no_say():
    means, within = torch.randn(4, 4).double(), torch.eye(4).double()
    some = torch.tensor([0, 2])
    alone = temper_of(means[some][:, some], within[some][:, some], torch.tensor([30, 9]), 3.0)
    assert temper_of(means, within, torch.tensor([30, 0, 9, 0]), 3.0) == alone
    assert temper_of(means[:1, :1], within[:1, :1], torch.tensor([30]), 3.0) == 1.0
    assert math.isfinite(temper_of(100 * torch.eye(4).double(), 1e-9 * within, torch.tensor([9, 9, 9, 9]), 1.0))


def moments_of(seed, n, features=30, classes=3):
    """Covariance, class means and shares of noisy samples of which the first feature alone tells classes apart."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, features, generator=rng, dtype=torch.float64)
    x[:, 0] += y
    x -= x.mean(0)
    shares = y.bincount().double() / n
    return x.T @ x / n, torch.stack([x[y == c].mean(0) for c in range(classes)], dim=1), shares, x, y


def cross_validated(x, y, classes, share):
    """``n log`` of the error of ridge regression on indicators by generalised cross-validation, sample by sample."""
    n, variance = len(x), x.square().mean(0).sum()
    targets = torch.nn.functional.one_hot(y, classes).double()
    targets -= targets.mean(0)
    hat = x @ torch.linalg.solve(x.T @ x / n + share * variance * torch.eye(x.shape[1]), x.T / n)
    left = 1 - (hat.trace() + 1) / n
    return n * math.log((targets - hat @ targets).square().sum() / n / left**2)


@pytest.mark.parametrize("n", [40, 100, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_penalty_is_of_least_error_or_the_next_if_that_is_as_good(n, seed):
    total, between, shares, x, y = moments_of(seed, n)
    errors = [cross_validated(x, y, 3, share) for share in _PENALTIES.tolist()]
    best = errors.index(min(errors))
    step = best + 1 < len(errors) and errors[best + 1] - errors[best] <= 20
    assert choose_penalty(total, between, shares, n) == float(_PENALTIES[best + step])


def test_with_fewer_samples_than_any_penalty_needs_the_largest_is_taken():
    total, between, shares, *_ = moments_of(0, 3, features=400)
    assert choose_penalty(total, between, shares, 1) == float(_PENALTIES[-1])
