"""A classifier with scikit-learn's interface that learns new classes at any time, from counted binary codes.

    model = EngramClassifier()
    model.partial_fit(X_first, y_first)   # any classes
    model.partial_fit(X_later, y_later)   # others, or more of the same
    model.predict(X)

A random binary code of the features (:mod:`engram_kernels.codes`), counts of it (:mod:`engram_kernels.moments`), and a
linear discriminant that is solved for when it is asked (:mod:`engram_kernels.discriminants`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from . import ops
from .checks import check_number, check_size
from .codes import PatchCode, ProjectionCode, TableCode
from .discriminants import Discriminant, Discriminants, Prior
from .moments import SecondMoments

_DEFAULT_UNITS = 2048
_BATCH = 4096  # samples that are encoded and counted together
_TABLE_DIGITS = 8


class EngramClassifier(ClassifierMixin, BaseEstimator):
    """Learns classes at any time, in any order, from any real features; keeps counts and no samples."""

    def __init__(
        self,
        n_units: int = _DEFAULT_UNITS,
        *,
        readout: str = "ridge",
        image_shape: tuple[int, ...] | None = None,
        patch: int | tuple[int, ...] = (4, 6, 8),
        rate: float = 0.2,
        penalty: float | None = None,
        random_state: Any = 0,
        n_jobs: int | None = None,
    ) -> None:
        self.n_units = n_units
        self.readout = readout
        self.image_shape = image_shape
        self.patch = patch
        self.rate = rate
        self.penalty = penalty
        self.random_state = random_state
        self.n_jobs = n_jobs

    # ---- learning

    def fit(self, X: Any, y: Any) -> EngramClassifier:
        """Learns X and y from nothing: :meth:`partial_fit` without what was learned before, of 2 classes at least."""
        return self._learn(X, y, None, fresh=True, least_classes=2)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> EngramClassifier:
        """Learns more samples, of classes seen before or not."""
        return self._learn(X, y, classes, fresh=not hasattr(self, "moments_"), least_classes=1)

    def _learn(self, X: Any, y: Any, classes: Any, *, fresh: bool, least_classes: int) -> EngramClassifier:
        before = dict(self.__dict__)
        try:
            self._check_settings()
            X, y = self._validated(X, y, fresh)
            labels = _labels("y", y)
            if len(labels) < least_classes:
                raise ValueError("y: expected at least 2 classes, got 1 class; partial_fit takes classes one by one")
            known = labels if fresh else _joined(self.classes_, labels)
            if classes is not None:
                known = _joined(known, _labels("classes", classes))
            if fresh:
                self._start()
            elif self.moments_.total + len(y) > torch.iinfo(torch.int32).max:
                raise ValueError("X: expected at most 2**31 - 1 samples in all, since pairs are counted in 32 bits")
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        places = {} if fresh else {i: int(p) for i, p in enumerate(np.searchsorted(known, self.classes_))}
        self.moments_.place_classes(places, len(known))
        self.classes_ = known
        with _threads(self.n_jobs):
            if self.table_ is not None:
                self._widen(X.min(axis=0), X.max(axis=0))
            numbers = torch.from_numpy(np.searchsorted(known, y))
            for i in range(0, len(y), _BATCH):
                self.moments_.add(self._encode(X[i : i + _BATCH]), numbers[i : i + _BATCH])
        return self

    def _start(self) -> None:
        """Nothing learned: the code and counts of zero."""
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.n_units_ = self.n_units
        self.table_ = None if self.image_shape is not None else _table_code(self.n_features_in_, self.n_units_)
        self._table_units = 0 if self.table_ is None else _whole_rows(self.table_.n_units)
        units = self.n_units_ - self._table_units
        self.projection_: ProjectionCode | PatchCode
        if self.image_shape is None:
            self.projection_ = ProjectionCode(self.n_features_in_, units, seed=self.seed_, rate=self.rate)
        else:
            sizes = (self.patch,) if isinstance(self.patch, int) else tuple(self.patch)
            self.projection_ = PatchCode(self.image_shape, units, sizes=sizes, seed=self.seed_, rate=self.rate)
        self.moments_ = SecondMoments(self.n_units_, pairs=self.readout == "ridge")
        self._discriminants = Discriminants(self.moments_, self._prior(), self.penalty)

    def _widen(self, low: np.ndarray, high: np.ndarray) -> None:
        """Has the ranges of the features include these, and carries the counts over."""
        assert self.table_ is not None
        units = self.table_.per_feature
        for j, (T, c) in self.table_.widen(np.float64(low), np.float64(high)).items():
            if self.moments_.total:
                self._discriminants.forget()  # of other units
                self.moments_.transform(j * units, torch.from_numpy(T), torch.from_numpy(c))

    # ---- asking

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-odds of the classes, up to a constant, (M, classes); of the second of two classes, (M,)."""
        scores = self._scores(X)
        if len(self.classes_) == 2:
            return scores[:, 1] - scores[:, 0]
        return scores

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each sample, (M,)."""
        scores = self._scores(X)
        return self.classes_[scores.argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, (M, classes)."""
        scores = self._scores(X)
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "moments_")
        X = self._validated_X(X, fresh=False)
        out = np.empty((len(X), len(self.classes_)))
        with _threads(self.n_jobs):
            weight, bias = self._discriminant()
            for i in range(0, len(X), _BATCH):
                y = code_product(self._encode(X[i : i + _BATCH]), weight)
                out[i : i + _BATCH] = y.double() + bias
        return out

    def _discriminant(self) -> Discriminant:
        found = self._discriminants.discriminant()
        share = self.moments_.samples.double() / self.moments_.total
        return found._replace(bias=found.bias + share.log().float())

    def _prior(self) -> Prior:
        k, d = self.n_units_, self.n_features_in_
        scale = torch.full((k,), 0.5 * math.sqrt(d / max(1, k - self._table_units)), dtype=torch.float64)
        sums = torch.zeros(0, 1, dtype=torch.float64)
        if self.table_ is not None:
            of_feature = torch.zeros(self.table_.per_feature, dtype=torch.float64)
            of_feature[: self.table_.thresholds] = 0.5 / math.sqrt(self.table_.thresholds)
            scale[: self._table_units] = 0.0
            scale[: self.table_.n_units] = of_feature.repeat(d)
            sums = torch.from_numpy(self.table_.linear())
        return Prior(scale, sums, 1.0)

    def _encode(self, X: np.ndarray) -> Tensor:
        """Samples (M, features) -> bits (M, words of n_units_)."""
        bits = self.projection_.encode(X)
        if self.table_ is None:
            return bits
        z = torch.from_numpy(self.table_.encode(np.asarray(X, dtype=np.float64)).reshape(len(X), -1))
        signs = torch.full((len(X), self._table_units), -1.0)
        signs[:, : z.shape[1]] += 2.0 * z
        return torch.cat([ops.pack_signs(signs), bits], dim=1)

    # ---- checks

    def _check_settings(self) -> None:
        check_size("n_units", self.n_units)
        if self.readout not in ("ridge", "prototype"):
            raise ValueError(f"readout: expected 'ridge' or 'prototype', got {self.readout!r}")
        check_number("rate", self.rate, "a share of the units above 0 and below 1", above=0.0)
        if self.penalty is not None:
            check_number("penalty", self.penalty, "None or a finite number above 0", above=0.0)

    def _validated(self, X: Any, y: Any, fresh: bool) -> tuple[np.ndarray, np.ndarray]:
        if y is None:
            raise ValueError("y: expected labels, got None; requires y to be passed, but the target y is None")
        X = self._validated_X(X, fresh=fresh)
        y = column_or_1d(_to_numpy(y), warn=True)
        check_consistent_length(X, y)
        check_classification_targets(y)
        return X, y

    def _validated_X(self, X: Any, *, fresh: bool) -> np.ndarray:
        X = validate_data(self, _to_numpy(X), reset=fresh, dtype="numeric", ensure_all_finite=False)
        if X.dtype.kind == "f":
            _check_finite(X)
        return X if X.dtype == np.uint8 else np.asarray(X, dtype=np.float64)


def code_product(bits: Tensor, weight: Tensor) -> Tensor:
    """``z @ weight.T`` for codes z of 0 and 1. Bits (M, words), float32 (C, K) -> float32 (M, C)."""
    return 0.5 * (ops.sign_matmul_t(weight, bits, weight.shape[1]).T + weight.sum(1))


def _table_code(n_features: int, n_units: int) -> TableCode | None:
    """The finest that takes no more than half of the units; None if there are too many features."""
    for thresholds, digits in ((16, 8), (8, 8), (4, 8), (4, 4)):
        if _whole_rows(n_features * (thresholds + digits)) <= n_units // 2:
            return TableCode(n_features, thresholds=thresholds, digits=digits)
    return None


def _whole_rows(n_units: int) -> int:
    """Units of packed rows without padding."""
    return -(-n_units // 128) * 128


def _to_numpy(X: Any) -> Any:
    """Torch tensors as arrays; what else there is, scikit-learn converts."""
    return X.detach().cpu().numpy() if isinstance(X, Tensor) else X


def _check_finite(X: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(X.sum(dtype=np.float64)):  # far cheaper than a look at each, and right unless it says no
            return
    bad = np.argwhere(~np.isfinite(X))
    if len(bad):
        row, column = bad[0]
        kind = "NaN" if np.isnan(X[row, column]) else "inf"
        raise ValueError(f"X: expected finite numbers, got {kind} at row {row}, column {column}")


def _labels(name: str, y: Any) -> np.ndarray:
    """The labels in order, each once."""
    try:
        return np.unique(np.asarray(y))
    except TypeError:
        kinds = " and ".join(sorted({type(label).__name__ for label in np.ravel(np.asarray(y, dtype=object))}))
        raise ValueError(f"{name}: expected labels of one kind, which can be put in order, got {kinds}") from None


def _joined(known: np.ndarray, labels: np.ndarray) -> np.ndarray:
    kinds = [
        "text" if a.dtype.kind in "US" else "numbers" if a.dtype.kind in "biuf" else "objects" for a in (known, labels)
    ]
    if len(known) and kinds[0] != kinds[1]:
        raise ValueError(f"y: expected labels like those of before, {kinds[0]} such as {known[0]!r}, got {labels[0]!r}")
    return _labels("y", np.concatenate([known, labels]))


@contextlib.contextmanager
def _threads(n_jobs: int | None) -> Iterator[None]:
    """Runs with ``n_jobs`` of torch's threads: None as they are, -1 for all processors."""
    before = torch.get_num_threads()
    if n_jobs is not None:
        import joblib

        torch.set_num_threads(joblib.effective_n_jobs(n_jobs))
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["EngramClassifier"]
