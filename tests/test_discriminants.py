import math

import pytest
import torch

from engram_kernels.discriminants import temper_of


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
