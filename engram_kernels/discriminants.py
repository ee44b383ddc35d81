"""Linear discriminants of binary codes, from counted second moments alone.

With ``S`` the covariance of the units within the classes, ``P`` a prior covariance of weights and ``mu_c`` the mean code
of class c, less the mean of all,

    w_c = (S + penalty P^-1)^-1 mu_c,   score[m, c] = (z[m] - mean) · w_c - w_c · mu_c / 2 + log share_c

the regularised linear discriminant analysis of the code. It is a function of integers: the same in whatever order they
were counted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .moments import SecondMoments

_SELECTION_UNITS = 1024  # of which the penalty is chosen; a sample of the units says it as well
_PENALTIES = 10.0 ** torch.arange(-7.0, 1.01, 0.5, dtype=torch.float64, device="cpu")  # shares of all variance


class Prior(NamedTuple):
    """What is believed of the weights: how large they are by unit, and along which sums of units they may be larger."""

    scale: Tensor  # (K,) standard deviations of the units' weights
    sums: Tensor  # (S, U) weights of runs of units, of which a linear function of a feature is made
    first: int  # S runs of U units, from this unit on
    strength: float  # standard deviation of the weight of a sum that varies by 1


class Discriminant(NamedTuple):
    """``score = z · weight + bias`` of codes z of 0 and 1; float32 (C, K) and (C,)."""

    weight: Tensor
    bias: Tensor


class _Features:
    """The units scaled by the prior, with its sums as further features: the basis in which the prior is the identity."""

    def __init__(self, prior: Prior, covariance: Tensor) -> None:
        self.prior = prior
        self.dtype = covariance.dtype
        self.scale = prior.scale.to(self.dtype)
        self.sums = prior.sums.to(self.dtype)
        if len(self.sums):
            spread = self.pull_sums(self.pull_sums(covariance).T.contiguous()).diagonal().clamp(min=0).sqrt()
            small = spread <= 1e-6 * self.sums.abs().sum(1).clamp(min=1)  # a feature without variance
            self.sums = self.sums * torch.where(small, 0.0, prior.strength / spread)[:, None]

    def pull_sums(self, v: Tensor) -> Tensor:
        """(K, R) -> (S, R)."""
        s, u = self.sums.shape
        rows = v[self.prior.first : self.prior.first + s * u].reshape(s, u, v.shape[1])
        return torch.einsum("su,sur->sr", self.sums, rows)

    def pull(self, v: Tensor) -> Tensor:
        """Of units (K, R) -> of features (K + S, R)."""
        return torch.cat([v * self.scale[:, None], self.pull_sums(v)])

    def push(self, w: Tensor) -> Tensor:
        """Weights of features (K + S, R) -> of units (K, R)."""
        k = len(self.scale)
        out = w[:k] * self.scale[:, None]
        s, u = self.sums.shape
        out[self.prior.first : self.prior.first + s * u] += torch.einsum("su,sr->sur", self.sums, w[k:]).flatten(0, 1)
        return out


def solve(moments: SecondMoments, prior: Prior, penalty: float | None) -> Discriminant:
    """The discriminant of all that was counted. ``penalty`` is a share of the variance, None to choose it."""
    n = moments.total
    shares = moments.samples.double() / max(1, n)
    seen = moments.samples > 0
    means = moments.counts.double() / moments.samples.clamp(min=1)[:, None]
    mean = shares @ means
    centred = torch.where(seen[:, None], means - mean, 0.0)
    if int(seen.sum()) > 1:
        weight = _weights(moments, prior, penalty, centred, shares)
    else:
        weight = torch.zeros_like(centred)
    bias = -weight @ mean - 0.5 * (weight * centred).sum(1)
    return Discriminant(weight.float(), bias.float())


def _weights(moments: SecondMoments, prior: Prior, penalty: float | None, centred: Tensor, shares: Tensor) -> Tensor:
    n, k = moments.total, moments.n_units
    if not moments.blocks:  # the classes' means alone: as if all units varied alike and by themselves
        inside = moments.samples.double() @ (centred**2)
        share = moments.counts.sum(0).double() / n
        variance = (share * (1 - share) - inside / n).mean()
        return centred / (variance + 1e-30)
    dtype = torch.float64 if k <= 2048 else torch.float32
    mean = moments.counts.sum(0).double() / n
    total = (moments.rows(0, k).to(torch.float64).div_(n).addr_(mean, mean, alpha=-1)).to(dtype)
    features = _Features(prior, total)
    total = features.pull(features.pull(total).T.contiguous())
    between = features.pull(centred.T.to(dtype))
    variance = float(total.diagonal().sum())
    if penalty is None:
        penalty = choose_penalty(total, between, shares.to(dtype), n)
    within = total.addmm_(between * shares.to(dtype), between.T, alpha=-1.0)
    within.diagonal().add_(penalty * variance + 1e-30)
    factor = torch.linalg.cholesky(within)
    return features.push(torch.cholesky_solve(between, factor)).T.double()


def choose_penalty(total: Tensor, between: Tensor, shares: Tensor, n: int) -> float:
    """The penalty, as a share of all variance, with the least error of regression by generalised cross-validation.

    (Golub, Heath and Wahba 1979.) ``total`` (F, F) covariance of the features, ``between`` (F, C) centred class means.
    """
    f = len(total)
    chosen = torch.arange(0, f, max(1.0, f / _SELECTION_UNITS), dtype=torch.float64).long()
    part = total[chosen][:, chosen].double()
    values, vectors = torch.linalg.eigh(part)
    values = values.clamp(min=0.0)
    variance = values.sum()
    projected = (vectors.T @ (between[chosen] * shares).double()).square().sum(1)
    target = (shares * (1 - shares)).sum().double()
    best = None
    for share in _PENALTIES:
        shrunk = values + share * variance + 1e-300
        freedom = (values / shrunk).sum() + 1
        if freedom >= n:
            continue
        error = (target - (projected * (2 / shrunk - values / shrunk**2)).sum()) / (1 - freedom / n) ** 2
        if best is None or error < best[0]:
            best = (error, share)
    return float(best[1]) if best is not None else float(_PENALTIES[-1])


__all__ = ["Discriminant", "Prior", "choose_penalty", "solve"]
