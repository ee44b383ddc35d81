"""What streams random features or second moments today, in float32, written from the publications' formulas.

*RanPAC* (McDonnell et al. 2023): a random projection, ReLU, the Gram matrix of the features and a ridge regression of
the classes on them. *RanDumb* (Prabhu et al. 2024): random Fourier features of a Gaussian kernel, and the nearest class
mean in the Mahalanobis distance of their covariance within the classes. *StreamingLDA* (Hayes and Kanan 2020): a
linear discriminant of the features as they are, its covariance brought up to date by every sample by itself.

All of them learn with ``partial_fit(x, y)``, x float32 (M, K), y int64 (M,), and ``predict(x)``. A solution is found
when it is asked for, and kept until the next sample. Left out, since their users would: augmentation and features of
pretrained networks, which are no part of these formulas.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

BATCH = 1024  # samples whose features exist together


class RandomFeatures(abc.ABC):
    """Random features, their Gram matrix, and their sums by class; ``penalty`` is a share of the mean diagonal."""

    def __init__(self, n_features: int, n_units: int, n_classes: int, *, penalty: float, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(n_features, n_units, generator=self.generator)
        self.gram = torch.zeros(n_units, n_units)
        self.sums = torch.zeros(n_classes, n_units)
        self.samples = torch.zeros(n_classes)
        self.penalty = penalty
        self._answer: tuple[Tensor, Tensor] | None = None

    @abc.abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Samples (M, features) -> random features (M, N)."""

    @abc.abstractmethod
    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights (N, C) and biases (C,)."""

    def partial_fit(self, x: Tensor, y: Tensor) -> RandomFeatures:
        for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            z = self.features(part)
            self.gram.addmm_(z.T, z)
            self.sums.index_add_(0, labels, z)
            self.samples += torch.bincount(labels, minlength=len(self.samples))
        self._answer = None
        return self

    def predict(self, x: Tensor) -> Tensor:
        if self._answer is None:
            self._answer = self.solve()
        weight, bias = self._answer
        return torch.cat([(self.features(part) @ weight + bias).argmax(1) for part in x.split(BATCH)])


class RanPAC(RandomFeatures):
    def features(self, x: Tensor) -> Tensor:
        return (x @ self.weight).relu_()

    def solve(self) -> tuple[Tensor, Tensor]:
        matrix = self.gram.clone()
        matrix.diagonal().add_(self.penalty * matrix.diagonal().mean())
        return torch.linalg.solve(matrix, self.sums.T), torch.zeros(len(self.sums))


class RanDumb(RandomFeatures):
    """``gamma`` of the kernel ``exp(-gamma |a - b|^2)``."""

    def __init__(self, *arguments: int, gamma: float, penalty: float, seed: int = 0) -> None:
        super().__init__(*arguments, penalty=penalty, seed=seed)
        self.weight *= math.sqrt(2 * gamma)
        self.phase = 2 * math.pi * torch.rand(len(self.gram), generator=self.generator)

    def features(self, x: Tensor) -> Tensor:
        return torch.addmm(self.phase, x, self.weight).cos_().mul_(math.sqrt(2 / len(self.gram)))

    def solve(self) -> tuple[Tensor, Tensor]:
        n = self.samples.sum()
        means = self.sums / self.samples.clamp(min=1)[:, None]
        within = self.gram / n
        within.addmm_((means * (self.samples / n)[:, None]).T, means, alpha=-1)
        within.diagonal().add_(self.penalty * within.diagonal().mean())
        weight = torch.cholesky_solve(means.T, torch.linalg.cholesky(within))
        return weight, -0.5 * (means.T * weight).sum(0)


class StreamingLDA:
    """``shrinkage`` of the covariance towards the identity before its pseudo-inverse."""

    def __init__(self, n_features: int, n_classes: int, *, shrinkage: float = 1e-4) -> None:
        self.means = torch.zeros(n_classes, n_features)
        self.samples = torch.zeros(n_classes)
        self.covariance = torch.zeros(n_features, n_features)
        self.seen = 0
        self.shrinkage = shrinkage
        self._answer: tuple[Tensor, Tensor] | None = None

    def partial_fit(self, x: Tensor, y: Tensor) -> StreamingLDA:
        for sample, label in zip(x, y.tolist(), strict=True):
            deviation = sample - self.means[label]
            t = self.seen
            self.covariance.mul_(t / (t + 1)).addr_(deviation, deviation, alpha=t / (t + 1) ** 2)
            self.means[label] += deviation / (self.samples[label] + 1)
            self.samples[label] += 1
            self.seen += 1
        self._answer = None
        return self

    def predict(self, x: Tensor) -> Tensor:
        if self._answer is None:
            matrix = self.covariance * (1 - self.shrinkage)
            matrix.diagonal().add_(self.shrinkage)
            weight = torch.linalg.pinv(matrix) @ self.means.T
            self._answer = weight, -0.5 * (self.means.T * weight).sum(0)
        weight, bias = self._answer
        return (x @ weight + bias).argmax(1)
