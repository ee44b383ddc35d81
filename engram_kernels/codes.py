"""Random binary codes of real features, the same in whatever order the samples come.

A code turns rows of numbers into packed bits. What it does to a sample may depend on its seed and, for
:class:`TableCode`, on the range of every feature so far, and on nothing else; so counts of its bits carry no trace of
the order of the samples.

    ProjectionCode   the most excited of many random units; blind to a sample's offset and scale: images, embeddings
    PatchCode        the same from small patches of images, wherever near they lie
    TableCode        each feature by itself, at the resolution that its range so far asks for: tables of any scale
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import ops
from .reference import _GROUPED_ROWS, group_signs, philox, recruited_units, words_for

_FILTERS = 32  # of each size at least: more of them were no better
_POOL = 3  # places in each direction
_MOST_PIXELS = 128  # of a side that the operator takes
_LEAST_IMAGES = 64  # of a call, so that looking up which places need which filters takes little of it
_CONTRAST_FLOOR = 0.1 * 255  # below it a patch is as good as empty
_CHUNK_VALUES = 1 << 23  # of the largest temporary, so that memory does not grow with the batch


def seed_tensor(seed: int, stream: int) -> Tensor:
    """The Philox key and offset of one of several independent streams of a seed."""
    return torch.tensor([seed, stream], dtype=torch.int64, device="cpu")


def to_bytes(X: np.ndarray) -> Tensor:
    """Rows of numbers (M, K) -> uint8 (M, K): 0 at the least of a row, 255 at the greatest, all 0 if they are equal."""
    low, high = X.min(axis=1, keepdims=True), X.max(axis=1, keepdims=True)
    if X.dtype == np.uint8:  # most images are bytes of the whole range already
        rest = ((low != 0) | (high != 255))[:, 0]
        out = torch.from_numpy(X.copy() if rest.any() else np.ascontiguousarray(X))
        if rest.any():
            out[torch.from_numpy(rest)] = to_bytes(X[rest].astype(np.float64))
        return out
    low, span = low / 4.0, high / 4.0 - low / 4.0  # a difference cannot overflow
    span[span == 0] = math.inf
    return torch.from_numpy(np.floor((X / 4.0 - low) / span * 255.0 + 0.5).astype(np.uint8))


def _in_parts(X: np.ndarray, rows: int, n_units: int, recruit: Callable[[Tensor], Tensor]) -> Tensor:
    """Codes of all samples, bits (M, words), some rows at a time, written where they stay: else they split the heap."""
    bits = torch.empty(len(X), words_for(n_units), dtype=torch.int64, device="cpu")
    for i in range(0, len(X), rows):
        bits[i : i + rows] = recruit(to_bytes(X[i : i + rows]))
    return bits


def _balanced_signs(seed: Tensor, rows: int, k: int, first_row: int = 0) -> Tensor:
    """Random signs, int8 (rows, k), as many +1 as -1 in every row, one 0 where k is odd."""
    draws = philox(seed, rows, k, first_row) * k + torch.arange(k)  # no two alike
    if k % 2:
        return torch.sign(draws - draws.kthvalue(k // 2 + 1, dim=1, keepdim=True).values).to(torch.int8)
    return torch.where(draws > draws.kthvalue(k // 2, dim=1, keepdim=True).values, 1, -1).to(torch.int8)


class ProjectionCode:
    """The ``rate`` most excited of random units, each a sum of features with balanced random signs.

    ``z[m, n] = sum_k w[n, k] x[m, k]`` with as many +1 as -1 in ``w[n]``, on the bytes of :func:`to_bytes`: adding a
    number to all features of a sample, or scaling them, changes nothing.
    """

    def __init__(self, n_features: int, n_units: int, *, seed: int, rate: float) -> None:
        self.n_features, self.n_units, self.rate = n_features, n_units, rate
        bits, groups, middle = [], [], []
        step = max(1, _CHUNK_VALUES // 8 // n_features // _GROUPED_ROWS) * _GROUPED_ROWS
        for row in range(0, n_units, step):
            signs = _balanced_signs(seed_tensor(seed, 0), min(step, n_units - row), n_features, row)
            bits.append(ops.pack_signs(torch.where(signs >= 0, 1.0, -1.0)))  # the 0 counts as +1 until excitability
            groups.append(group_signs(bits[-1], n_features))
            middle.append((signs == 0).int().argmax(dim=1))
        self._bits, self._groups, self._middle = torch.cat(bits), torch.cat(groups, dim=1), torch.cat(middle)

    def excitability(self, x: Tensor) -> Tensor:
        """uint8 (M, K) -> int32 (M, N)."""
        z = ops.sign_matmul_t(x, self._bits, self.n_features, self._groups)
        if self.n_features % 2:
            z -= x[:, self._middle]
        return z

    def encode(self, X: np.ndarray) -> Tensor:
        """Rows of numbers (M, K) -> bits (M, words)."""
        return _in_parts(X, max(1, _CHUNK_VALUES // self.n_units), self.n_units, self._recruit)

    def _recruit(self, x: Tensor) -> Tensor:
        return ops.top_units(self.excitability(x), recruited_units(self.rate, self.n_units))


class PatchCode:
    """The ``rate`` most excited of random units that look at small patches of an image, wherever near they lie.

    A unit is a filter of balanced random signs, of one of several sizes, and a place; its excitability is the largest
    response of the filter in the 3 x 3 places around, each divided by the contrast of its patch:

        z = max over places of  sum_k w[k] x[k] / (sqrt(sum_k (x[k] - mean)^2) + floor)

    so that a stroke counts wherever exactly it runs, and a faint texture as a strong one. Filters are shared by all
    places (weight sharing and pooling: LeCun et al. 1998; random filters: Jarrett et al. 2009; units of several
    channels look at one of them). All sums are of integers and exact: :func:`engram_kernels.ops.patch_excitability`.

    Args:
        image_shape: height and width, or height, width and channels, of the images whose pixels are the features.
        n_units: N.
        sizes: side lengths of the patches in turns; those larger than the image less two pixels are left out.
        seed: of the filters and places.
        rate: share of the units that fire.
    """

    def __init__(
        self, image_shape: tuple[int, ...], n_units: int, *, sizes: tuple[int, ...], seed: int, rate: float
    ) -> None:
        height, width, self.channels = (*image_shape, 1)[:3]
        self.image = (height, width)
        self.n_features, self.n_units, self.rate = math.prod(image_shape), n_units, rate
        self._no_noise = seed_tensor(0, 0)
        sizes = tuple(size for size in sizes if size + _POOL - 1 <= min(height, width))
        if max(sizes, default=0) > _MOST_PIXELS:
            raise ValueError(f"patch: expected at most {_MOST_PIXELS} pixels, got {max(sizes)}")
        if not sizes:
            raise ValueError(f"patch: expected at most {min(height, width) - _POOL + 1} pixels, for {height}x{width}")
        self._groups = []
        for i, size in enumerate(sizes):
            units = n_units // len(sizes) + (i < n_units % len(sizes))
            places = (height - size - _POOL + 2) * (width - size - _POOL + 2) * self.channels
            filters = max(_FILTERS, -(-units // places))
            signs = _balanced_signs(seed_tensor(seed, 2 * i), filters, size * size)
            draws = philox(seed_tensor(seed, 2 * i + 1), 1, places * filters)[0]
            chosen = (draws * len(draws) + torch.arange(len(draws))).argsort()[:units]
            self._groups.append((signs.reshape(filters, size, size), chosen.sort().values))

    def encode(self, X: np.ndarray) -> Tensor:
        """Rows of pixels (M, features) -> bits (M, words)."""
        return _in_parts(X, max(_LEAST_IMAGES, _CHUNK_VALUES // 8 // self.n_units), self.n_units, self._recruit)

    def _recruit(self, x: Tensor) -> Tensor:
        images = x.reshape(len(x), *self.image, self.channels)
        z = [ops.patch_excitability(images, filters, units, _CONTRAST_FLOOR) for filters, units in self._groups]
        return ops.sample_engram(torch.cat(z, dim=1), self._no_noise, self.rate, temperature=0.0)


class TableCode:
    """Thresholds and finer bits of every feature by itself, on a grid that follows the range of the feature.

    Of feature j with range ``[low, high]`` so far the units are, at the finest level e that allows it,

        x >= t             for the multiples t of 2^e in (low, high], ``thresholds`` of them at most
        floor(x / 2^b) odd for b = e - 1 ... e - ``digits``

    The thresholds say roughly, and without assuming that anything is linear, where x lies; together with the digits
    they give x itself, to ``2^-digits`` of a step, as a weighted sum of units (:meth:`linear`).

    When a sample widens a range, the new units' bits *for all earlier samples* are known from the old units' bits:
    a new threshold outside the old range was met by all or by none, and a threshold or digit that is now too fine is
    dropped. :meth:`widen` gives this change as a linear map, so that counts can be carried over exactly and are what
    they would have been had the range been known from the start.
    """

    def __init__(self, n_features: int, *, thresholds: int, digits: int) -> None:
        self.n_features, self.thresholds, self.digits = n_features, thresholds, digits
        self.per_feature = thresholds + digits
        self.low = np.full(n_features, np.inf)
        self.high = np.full(n_features, -np.inf)

    @property
    def n_units(self) -> int:
        """Units of all features."""
        return self.n_features * self.per_feature

    def grid(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The level e of each range, and the number of the first multiple of ``2^e`` above ``low``."""
        with np.errstate(invalid="ignore"):
            largest = np.where(np.isfinite(low), np.maximum(np.abs(low), np.abs(high)), 0.0)
        level = np.frexp(largest)[1].astype(np.int64) + 1
        finest = level - 53  # beyond it steps are no longer whole numbers of float64
        crossing = (np.isfinite(low) & (high > low)).nonzero()[0]
        while len(crossing):  # one level finer where that still gives few enough
            finer = level[crossing] - 1
            count = _steps(high[crossing], finer) - _steps(low[crossing], finer)
            crossing = crossing[(count <= self.thresholds) & (finer >= finest[crossing])]
            level[crossing] -= 1
        first = _steps(np.where(np.isfinite(low), low, 0.0), level) + 1
        return level, first

    def encode(self, X: np.ndarray) -> np.ndarray:
        """Rows of numbers (M, d) -> bool (M, d, units of a feature); outside the ranges counts as their ends."""
        X = np.clip(X, self.low, self.high)
        level, first = self.grid(self.low, self.high)
        out = np.empty((*X.shape, self.per_feature), dtype=bool)
        steps = _steps(X, level)
        last = _steps(self.high, level)
        number = first[:, None] + np.arange(self.thresholds)
        number[number > last[:, None]] = np.inf  # not a threshold of this range
        np.greater_equal(steps[:, :, None], number, out=out[:, :, : self.thresholds])
        for i in range(self.digits):
            out[:, :, self.thresholds + i] = np.fmod(_steps(X, level - 1 - i), 2) != 0
        return out

    def linear(self) -> np.ndarray:
        """Weights (d, units of a feature) that give each feature, in steps of its grid and up to a constant."""
        powers = 0.5 ** np.arange(1, self.digits + 1)
        return np.tile(np.concatenate([np.ones(self.thresholds), powers]), (self.n_features, 1))

    def widen(self, low: np.ndarray, high: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Widens the ranges to include ``low`` and ``high``, (d,).

        For every feature whose units change: integers ``(T, c)`` with which ``new = T old + c`` holds for all samples
        within the old range, T (units, units), c (units,).
        """
        new_low, new_high = np.minimum(low, self.low), np.maximum(high, self.high)
        level, first = self.grid(self.low, self.high)
        new_level, new_first = self.grid(new_low, new_high)
        maps = {}
        for j in ((new_low < self.low) | (new_high > self.high)).nonzero()[0]:
            if self.low[j] <= self.high[j]:
                old = _FeatureGrid(self, self.low[j], self.high[j], int(level[j]), first[j])
                new = _FeatureGrid(self, new_low[j], new_high[j], int(new_level[j]), new_first[j])
                maps[int(j)] = new.from_old(old)
        self.low, self.high = new_low, new_high
        return maps


class _FeatureGrid:
    """The units of one feature, for the change from one range to a wider one."""

    def __init__(self, code: TableCode, low: float, high: float, level: int, first: float) -> None:
        self.code, self.low, self.high, self.level, self.first = code, low, high, level, first
        self.count = int(_steps(high, level) - _steps(low, level)) if high > low else 0

    def from_old(self, old: _FeatureGrid) -> tuple[np.ndarray, np.ndarray]:
        code = self.code
        T: np.ndarray = np.zeros((code.per_feature, code.per_feature), dtype=np.int64)
        c: np.ndarray = np.zeros(code.per_feature, dtype=np.int64)
        for i in range(self.count):
            self._threshold(i, old, T[i], c)
        for i in range(code.digits):
            level = self.level - 1 - i
            unit = code.thresholds + i
            if level < old.level and old.high > old.low:
                T[unit, code.thresholds + old.level - 1 - level] = 1
                continue
            # coarser than the old digits: it flips at each multiple of 2^level within the old range
            odd = int(np.fmod(_steps(old.low, level), 2) != 0)
            c[unit] = odd
            flip = 1 - 2 * odd
            if old.high > old.low:
                step, last = float(_steps(old.low, level)) + 1, float(_steps(old.high, level))
                while step <= last:
                    T[unit, self._old_threshold(step, level, old)] += flip
                    step, flip = step + 1, -flip
        return T, c

    def _threshold(self, i: int, old: _FeatureGrid, row: np.ndarray, c: np.ndarray) -> None:
        step = self.first + i
        if step <= _steps(old.low, self.level):
            c[i] = 1
        elif step <= _steps(old.high, self.level):
            row[self._old_threshold(step, self.level, old)] = 1

    @staticmethod
    def _old_threshold(step: float, level: int, old: _FeatureGrid) -> int:
        """Which of the old thresholds is ``step * 2^level``, a multiple of the old step within the old range."""
        return int(np.ldexp(step, level - old.level) - old.first)


def _steps(x: np.ndarray | float, level: np.ndarray | int) -> np.ndarray:
    """``floor(x / 2^level)``, exactly, as float64: halving a number and rounding it down lose nothing."""
    return np.floor(np.ldexp(x, -np.asarray(level)))


__all__ = ["PatchCode", "ProjectionCode", "TableCode", "seed_tensor", "to_bytes"]
