"""Losses that do not push down the classes of earlier tasks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def batch_cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy over the classes that occur in the batch; the other scores get no gradient.

    Scores (M, classes), labels int64 (M,) -> scalar. Known as the labels trick (Zeno et al. 2018) and, per batch, as
    asymmetric cross-entropy's mask (Caccia et al. 2022).
    """
    present = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    present[y] = True
    return functional.cross_entropy(scores.masked_fill(~present, -torch.inf), y)
