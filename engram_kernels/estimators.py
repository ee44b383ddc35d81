"""A classifier with scikit-learn's interface that learns new classes at any time, from counted binary codes.

    model = EngramClassifier()
    model.partial_fit(X_first, y_first)   # any classes
    model.partial_fit(X_later, y_later)   # others, or more of the same
    model.predict(X)

A random binary code of the features (:mod:`engram_kernels.codes`) and counts of it (:mod:`engram_kernels.moments`). The
counts give a linear discriminant when it is asked for (:mod:`engram_kernels.discriminants`). Or dendritic segments
compete for the samples of their class (:mod:`engram_kernels.segments`).
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from . import ops
from .checks import check_number, check_size
from .codes import PatchCode, ProjectionCode, TableCode
from .discriminants import DIRECT_UNITS, EXACT_UNITS, Discriminant, Discriminants, Prior
from .files import write_tensors
from .moments import SecondMoments
from .segments import Segments

_DEFAULT_UNITS = 2048
_BATCH = 4096  # samples that are encoded and counted together
_LEAST_UNITS = 128
_FORMAT = "engram_kernels.EngramClassifier"
_VERSION = 2
_PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "ki": 2**10, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_CODE_SETTINGS = ("n_features_in_", "n_units_", "seed_", "readout", "segments", "image_shape", "patch", "rate")
_READOUTS = ("ridge", "prototype", "dendritic")
_BUDGETED_CLASSES = 32  # whose segments a memory budget has room for
_LEAST_THRESHOLDS = 16  # of a feature, for a code of thresholds alone


class EngramClassifier(ClassifierMixin, BaseEstimator):
    """Learns classes at any time, in any order, from any real features; keeps counts and no samples.

    Features become a random binary code; how often each two bits fire together, and each bit in each class, is counted;
    the counts give a regularised linear discriminant whenever it is asked for. Counts are integers, and what a sample's
    code is depends on no other sample but for the ranges of the features, with which counts are carried over exactly:
    any order, any batches, any division into calls, and any split over estimators that are merged afterwards give the
    same integers and the same predictions, unless ``readout`` is "dendritic". (Random features with second moments:
    McDonnell et al. 2023, "RanPAC"; Prabhu et al. 2024, "RanDumb". The code, and its counting by popcounts, are ours.)

    The code. Of images (``image_shape``): pooled random patches, :class:`~engram_kernels.codes.PatchCode`. Otherwise
    random projections of each sample, scaled by its own least and greatest feature,
    :class:`~engram_kernels.codes.ProjectionCode`; and, where half of the units suffice for it, every feature by itself
    at the resolution of its range so far, :class:`~engram_kernels.codes.TableCode`, whatever its scale and offset. With
    more features than that (``n_units`` / 16), they should be alike in scale, as pixels and embeddings are.

    Args:
        n_units: bits of the code; None for 2048, or for what ``memory_budget`` allows. Work per sample and memory grow
            with its square.
        readout: "ridge", the discriminant of the covariance within the classes; "prototype", the nearest class mean,
            which counts no pairs; or "dendritic", several binary prototypes for each class, which compete for its
            samples (:class:`~engram_kernels.segments.Segments`). It counts no pairs either, takes classes of any shape,
            and depends on the order of a class's samples. Features of a table are then thresholds alone.
        segments: prototypes of a class with ``readout="dendritic"``.
        image_shape: height and width, or height, width and channels, if the features are an image's pixels.
        patch: side length of the patches, or several.
        rate: share of the units that fire, in (0, 1).
        penalty: of the discriminant's weights, as a share of the code's variance; None to choose it by generalised
            cross-validation, which needs nothing but the counts.
        memory_budget: bytes that learning may take, or text such as "64MB"; chooses the units, which ``n_units_`` has
            after learning.
        reject: novelty above which :meth:`predict` gives ``reject_label``; None for never. See :meth:`novelty`.
        reject_label: what rejected samples are called.
        random_state: seed of the code. Only estimators of the same seed can be merged.
        n_jobs: threads, -1 for all processors, None for torch's number.
        verbose: whether to print the units that ``memory_budget`` chooses.

    Attributes: ``classes_`` in order; ``n_units_`` bits of the code; ``n_features_in_``; ``feature_names_in_`` where
    the input has names; ``moments_`` the counts.

    Learning from a small share of new samples does not start the solution anew: it is brought up to date to a relative
    residual of 5e-5, so that scores may differ by that from those of an estimator that was asked only once.
    Raises: ValueError or TypeError for settings and inputs that it cannot take, with the estimator left as it was.

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True, as_frame=False)
    >>> model = ek.EngramClassifier(n_units=512, random_state=0)
    >>> for label in range(3):  # one class after the other
    ...     model = model.partial_fit(X[y == label], y[y == label])
    >>> model.score(X, y) > 0.9
    True
    """

    classes_: np.ndarray
    n_features_in_: int
    table_: TableCode | None
    projection_: ProjectionCode | PatchCode | None
    moments_: SecondMoments
    discriminants_: Discriminants
    segments_: Segments | None

    def __init__(
        self,
        n_units: int | None = None,
        *,
        readout: str = "ridge",
        segments: int = 100,
        image_shape: tuple[int, ...] | None = None,
        patch: int | tuple[int, ...] = (4, 6, 8),
        rate: float = 0.25,
        penalty: float | None = None,
        memory_budget: int | str | None = None,
        reject: float | None = None,
        reject_label: Any = -1,
        random_state: Any = 0,
        n_jobs: int | None = None,
        verbose: bool = True,
    ) -> None:
        self.n_units = n_units
        self.readout = readout
        self.segments = segments
        self.image_shape = image_shape
        self.patch = patch
        self.rate = rate
        self.penalty = penalty
        self.memory_budget = memory_budget
        self.reject = reject
        self.reject_label = reject_label
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose

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
        self._place(known, {} if fresh else {i: i for i in range(len(self.classes_))})
        with _threads(self.n_jobs):
            if self.table_ is not None:
                self._widen(X.min(axis=0), X.max(axis=0))
            for bits, numbers in self._coded_batches(X, np.searchsorted(known, y)):
                self.moments_.add(bits, numbers)
                if self.segments_ is not None:
                    self.segments_.add(bits, numbers)
        return self

    def _coded_batches(self, X: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes, bits (M, words), and numbers of classes, int64 (M,)."""
        for i in range(0, len(X), _BATCH):
            yield self._encode(X[i : i + _BATCH]), torch.from_numpy(numbers[i : i + _BATCH])

    def _place(self, known: np.ndarray, kept: dict[int, int]) -> None:
        """Makes ``known`` the classes; ``kept`` numbers those of before that are kept, former classes stay last."""
        old, former = self.classes_ if kept else known[:0], self.discriminants_.former
        places = {i: int(np.searchsorted(known, old[i])) for i in kept}
        places |= {len(old) + i: len(known) + i for i in range(former)}
        if len(known) != len(old):
            self.discriminants_.forget()
        self._place_counts(places, len(known) + former)
        self.classes_ = known

    def _place_counts(self, places: dict[int, int], classes: int) -> None:
        self.moments_.place_classes(places, classes)
        if self.segments_ is not None:
            self.segments_.place_classes(places, classes)

    def _start(self, seed: int | None = None, n_units: int | None = None) -> None:
        """Nothing learned: the code and counts of zero."""
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1)) if seed is None else seed
        self.n_units_ = self._width() if n_units is None else n_units
        self.table_ = None if self.image_shape is not None else self._table_code()
        self._table_units = 0 if self.table_ is None else _whole_rows(self.table_.n_units)
        units = self.n_units_ - self._table_units
        if self.table_ is not None and self.readout == "dendritic":
            self.projection_ = None
        elif self.image_shape is None:
            self.projection_ = ProjectionCode(self.n_features_in_, units, seed=self.seed_, rate=self.rate)
        else:
            sizes = (self.patch,) if isinstance(self.patch, int) else tuple(self.patch)
            self.projection_ = PatchCode(self.image_shape, units, sizes=sizes, seed=self.seed_, rate=self.rate)
        self.moments_ = SecondMoments(self.n_units_, pairs=self.readout == "ridge")
        self.discriminants_ = Discriminants(self.moments_, self._prior(), self.penalty)
        self.segments_ = Segments(self._rates(), self.segments) if self.readout == "dendritic" else None

    def _table_code(self) -> TableCode | None:
        """The finest that its share of the units allows; None if there are too many features.

        Half of the units are left to projections. With dendritic segments none are: segments compare whole codes, and
        projections of features that differ in scale would blur the comparison.
        """
        if self.readout == "dendritic":
            thresholds = self.n_units_ // self.n_features_in_
            fine = thresholds >= _LEAST_THRESHOLDS
            return TableCode(self.n_features_in_, thresholds=thresholds, digits=0) if fine else None
        for thresholds, digits in ((16, 8), (8, 8), (4, 8), (4, 4)):
            if _whole_rows(self.n_features_in_ * (thresholds + digits)) <= self.n_units_ // 2:
                return TableCode(self.n_features_in_, thresholds=thresholds, digits=digits)
        return None

    def _rates(self) -> np.ndarray:
        """How often each unit is expected to fire, float64 (n_units_,): a threshold half of the time."""
        return np.full(self.n_units_, 0.5 if self.table_ is not None else self.rate)

    def _widen(self, low: np.ndarray, high: np.ndarray) -> None:
        """Has the ranges of the features include these, and carries the counts over."""
        assert self.table_ is not None
        units = self.table_.per_feature
        for j, (T, c) in self.table_.widen(low.astype(np.float64), high.astype(np.float64)).items():
            if self.moments_.total:
                self.discriminants_.forget()  # of other units
                self.moments_.transform(j * units, torch.from_numpy(T), torch.from_numpy(c))
                if self.segments_ is not None:
                    self.segments_.transform(j * units, T, c)

    def merge(self, other: EngramClassifier) -> EngramClassifier:
        """Takes over all that another estimator of the same settings has learned, as if its samples came here.

        With ``readout="dendritic"`` that holds for classes that only one of the two knows. Of a class that both know
        the segments are put together, and the most alike of them united until there are ``segments``.

        Raises: ValueError if the codes of the two differ.
        """
        check_is_fitted(self, "moments_")
        check_is_fitted(other, "moments_")
        for name, ours, theirs in zip(_CODE_SETTINGS, self._code_settings(), other._code_settings(), strict=True):
            if ours != theirs:
                raise ValueError(f"other: expected an estimator with {name} = {ours}, got {theirs}")
        if self.discriminants_.former or other.discriminants_.former:
            raise ValueError("other: expected estimators that have not been told to forget a class, got one that has")
        if self.moments_.total + other.moments_.total > torch.iinfo(torch.int32).max:
            raise ValueError("other: expected at most 2**31 - 1 samples in all, since pairs are counted in 32 bits")
        known = _joined(self.classes_, other.classes_)
        more = copy.deepcopy(other)
        for one in (self, more):
            one._place(known, {i: i for i in range(len(one.classes_))})
        if self.table_ is not None and more.table_ is not None:
            more._widen(self.table_.low, self.table_.high)
            self._widen(more.table_.low, more.table_.high)
        self.moments_.add_all(more.moments_)
        if self.segments_ is not None and more.segments_ is not None:
            self.segments_.add_all(more.segments_)
        return self

    def forget(self, classes: Any, X: Any = None, y: Any = None) -> EngramClassifier:
        """Forgets classes: they are no answers any more, and their counts are dropped.

        With ``readout="prototype"`` and "dendritic" the counts are then those of an estimator that never saw the
        classes. With "ridge" pairs of units are counted over all classes together, so that the classes' pairs stay,
        unless their samples are given once more as ``X`` and ``y``, in any order: then the pairs are taken off, and the
        counts are exact too. Ranges of features that the classes widened stay wide in any case.

        Raises: ValueError for a class that is not known, if none would be left, or for samples that are not those that
        were learned of the classes; nothing is forgotten then.
        """
        check_is_fitted(self, "moments_")
        gone = _labels("classes", np.atleast_1d(np.asarray(classes)))
        unknown = [label for label in gone.tolist() if label not in self.classes_.tolist()]
        if unknown:
            raise ValueError(f"classes: expected some of {self.classes_.tolist()}, got {unknown[0]!r}")
        kept = [i for i, label in enumerate(self.classes_.tolist()) if label not in gone.tolist()]
        if not kept:
            raise ValueError("classes: expected at least one class to be left, got all of them")
        dropped = [i for i in range(len(self.classes_)) if i not in kept]
        if X is not None:
            self._take_off(dropped, *self._validated(X, y, fresh=False))
        order = kept + (dropped if self.moments_.blocks and X is None else [])
        former = range(len(self.classes_), len(self.classes_) + self.discriminants_.former)
        places = {before: after for after, before in enumerate([*order, *former])}
        self._place_counts(places, len(places))
        self.discriminants_.former = len(places) - len(kept)
        self.discriminants_.forget()
        self.classes_ = self.classes_[kept]
        return self

    def _take_off(self, dropped: list[int], X: np.ndarray, y: np.ndarray) -> None:
        """Takes the counts of classes off, which are those of X and y."""
        strangers = [label for label in _labels("y", y).tolist() if label not in self.classes_[dropped].tolist()]
        if strangers:
            raise ValueError(f"y: expected labels of the classes to forget alone, got {strangers[0]!r}")
        moments = self.moments_
        theirs = SecondMoments(self.n_units_, pairs=bool(moments.blocks))
        theirs.place_classes({}, len(moments.samples))
        with _threads(self.n_jobs):
            for bits, numbers in self._coded_batches(X, np.searchsorted(self.classes_, y)):
                theirs.add(bits, numbers)
        for i in dropped:
            if not torch.equal(theirs.counts[i], moments.counts[i]) or theirs.samples[i] != moments.samples[i]:
                raise ValueError(
                    f"X: expected the {int(moments.samples[i])} samples that were learned of class "
                    f"{self.classes_.tolist()[i]!r}, got {int(theirs.samples[i])}, or others"
                )
        moments.subtract_all(theirs)

    # ---- asking

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-odds of the classes, up to a constant, (M, classes); of the second of two classes, (M,)."""
        scores = self._scores(self._asked(X))
        if len(self.classes_) == 2:
            return scores[:, 1] - scores[:, 0]
        return scores

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each sample, (M,), or ``reject_label`` where its novelty is above ``reject``."""
        X = self._asked(X)
        labels = self.classes_[self._scores(X).argmax(axis=1)]
        if self.reject is None:
            return labels
        rejected = self._novelty(X) > self.reject
        alike = np.asarray(self.reject_label).dtype.kind == labels.dtype.kind
        labels = labels.astype(np.result_type(labels, np.asarray(self.reject_label)) if alike else object)
        labels[rejected] = self.reject_label
        return labels

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, (M, classes).

        The log-odds of normal distributions, the classes' shares included, times a factor that follows from the counts:
        :func:`engram_kernels.discriminants.temper_of`. With ``readout="prototype"`` the factor is 0.27. With
        "dendritic" the scores of segments take the place of log-odds, all classes are taken to be as frequent, and the
        factor is that of :meth:`engram_kernels.segments.Segments.temper`.
        """
        scores = self._scores(self._asked(X))
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def novelty(self, X: Any) -> np.ndarray:
        """How unlike each sample is to all that was learned, (M,): in standard deviations, around 0 for known classes.

        The mean of two numbers, for the likeliest class: how much farther from the class's mean code the sample is, and
        how much lower its score, than samples of the class are on average, each divided by its standard deviation.
        With ``readout="prototype"`` deviations are those of independent units, and smaller than the true ones. With
        "dendritic" it is the second number alone, of samples that had not been learned yet.
        """
        return self._novelty(self._asked(X))

    def _asked(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "moments_")
        return self._validated_x(X, fresh=False)

    def _scores(self, X: np.ndarray) -> np.ndarray:
        with _threads(self.n_jobs):
            if self.segments_ is not None:
                return self.segments_.temper() * self._coded(X, self.segments_.scores)
            weight, bias, temper = self.discriminants_.discriminant()
            samples = self.moments_.samples[: len(self.classes_)].double()
            y = self._coded(X, lambda bits: code_product(bits, weight) + bias)
        return temper * (y + (samples / samples.sum()).log().numpy())

    def _novelty(self, X: np.ndarray) -> np.ndarray:
        if self.segments_ is not None:
            mean, deviation = self.segments_.typical()
            scores = self._coded(X, self.segments_.scores)
            likeliest = scores.argmax(axis=1)
            return (mean.numpy()[likeliest] - scores.max(axis=1)) / deviation.numpy()[likeliest]
        with _threads(self.n_jobs):
            weight, bias, _ = self.discriminants_.discriminant()
            typical = self.discriminants_.typical()

            def novelty(bits: Tensor) -> Tensor:
                scores = code_product(bits, weight) + bias
                likeliest = scores.argmax(dim=1, keepdim=True)
                distance = code_product(bits, typical.weight) + typical.bias
                farther = (distance - typical.distance) / typical.distance_deviation
                lower = (typical.score - scores) / typical.score_deviation
                return (0.5 * (farther + lower)).gather(1, likeliest)[:, 0]

            return self._coded(X, novelty)

    def _coded(self, X: np.ndarray, ask: Callable[[Tensor], Tensor]) -> np.ndarray:
        """What ``ask`` says of the codes, float64 (M, ...), a batch at a time."""
        parts = [ask(self._encode(X[i : i + _BATCH])).double() for i in range(0, len(X), _BATCH)]
        return torch.cat(parts).numpy()

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
        parts = []
        if self.table_ is not None:
            z = torch.from_numpy(self.table_.encode(np.asarray(X, dtype=np.float64)).reshape(len(X), -1))
            signs = torch.full((len(X), self._table_units if self.projection_ is not None else self.n_units_), -1.0)
            signs[:, : z.shape[1]] += 2.0 * z
            parts.append(ops.pack_signs(signs))
        if self.projection_ is not None:
            parts.append(self.projection_.encode(X))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    # ---- files

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned, for ``torch.save``: tensors by name, and the rest as JSON in ``"state"``.

        The tensors share memory with the estimator. The projection is kept as its seed.
        """
        check_is_fitted(self, "moments_")
        tensors = {"counts": self.moments_.counts, "samples": self.moments_.samples}
        tensors |= {f"pairs.{i}": block for i, block in enumerate(self.moments_.blocks)}
        if self.segments_ is not None:
            tensors |= {f"segments.{name}": tensor for name, tensor in self.segments_.state_dict().items()}
        if self.table_ is not None:
            tensors |= {"low": torch.from_numpy(self.table_.low), "high": torch.from_numpy(self.table_.high)}
        settings = self.get_params(deep=False)
        if not isinstance(settings["random_state"], int):
            settings["random_state"] = None  # the seed that was drawn is kept in any case
        state = {
            "settings": settings,
            "classes": self.classes_.tolist(),
            "classes_dtype": self.classes_.dtype.str,
            "former_classes": self.discriminants_.former,
            "n_features": self.n_features_in_,
            "feature_names": [str(name) for name in getattr(self, "feature_names_in_", [])],
            "n_units": self.n_units_,
            "seed": self.seed_,
        }
        try:
            text = json.dumps(state)
        except TypeError as error:
            raise ValueError(
                f"classes: expected text or numbers to save, got labels or settings of which {error}"
            ) from None
        return {**tensors, "state": text}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> EngramClassifier:
        """The estimator that :meth:`state_dict` is of; its tensors are copied."""
        state = json.loads(state_dict["state"])
        settings = state["settings"]
        for name in ("image_shape", "patch"):
            if isinstance(settings[name], list):
                settings[name] = tuple(settings[name])
        model = cls(**settings)
        model.n_features_in_ = state["n_features"]
        if state["feature_names"]:
            model.feature_names_in_ = np.array(state["feature_names"], dtype=object)
        model._start(seed=state["seed"], n_units=state["n_units"])
        if model.table_ is not None:
            model.table_.low, model.table_.high = (state_dict[name].numpy().copy() for name in ("low", "high"))
        model.classes_ = np.array(state["classes"], dtype=np.dtype(state["classes_dtype"]))
        moments = model.moments_
        moments.counts, moments.samples = state_dict["counts"].clone(), state_dict["samples"].clone()
        moments.blocks = [state_dict[f"pairs.{i}"].clone() for i in range(len(moments.blocks))]
        if model.segments_ is not None:
            prefix = "segments."
            own = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
            model.segments_.load_state_dict(own)
        model.discriminants_.former = state["former_classes"]
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`state_dict` and the answer so far to one safetensors file, without pickle.

        Raises: OSError if it can't be written; ValueError for labels that are neither text nor numbers.
        """
        tensors = self.state_dict()
        metadata = {"format": _FORMAT, "version": str(_VERSION), "state": tensors.pop("state")}
        if self.segments_ is None:
            answer = self.discriminants_.discriminant()
            temper = torch.tensor(answer.temper, dtype=torch.float64)
            tensors |= {"weight": answer.weight, "bias": answer.bias, "temper": temper}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EngramClassifier:
        """Reads what :meth:`save` wrote. Raises: ValueError for a file that is damaged, of another kind, or newer."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path}: expected a saved EngramClassifier, got another safetensors file")
                if int(metadata["version"]) != _VERSION:
                    age = "a newer" if int(metadata["version"]) > _VERSION else "an older"
                    raise ValueError(
                        f"{path}: expected version {_VERSION} of the file format, got {metadata['version']}; "
                        f"{age} engram_kernels wrote it"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: expected a whole safetensors file, got a damaged or foreign one ({error})"
            ) from None
        model = cls.from_state_dict({**tensors, "state": metadata["state"]})
        if model.segments_ is None:
            model.discriminants_.recall(Discriminant(tensors["weight"], tensors["bias"], float(tensors["temper"])))
        return model

    # ---- checks

    def _code_settings(self) -> tuple[Any, ...]:
        segments = self.segments if self.readout == "dendritic" else None
        code = (self.image_shape, self.patch, self.rate)
        return (self.n_features_in_, self.n_units_, self.seed_, self.readout, segments, *code)

    def _check_settings(self) -> None:
        if self.n_units is not None:
            check_size("n_units", self.n_units)
            if self.memory_budget is not None:
                raise ValueError("memory_budget: expected None where n_units is given, which it would choose")
        if self.readout not in _READOUTS:
            raise ValueError(f"readout: expected one of {', '.join(map(repr, _READOUTS))}, got {self.readout!r}")
        check_size("segments", self.segments)
        if check_number("rate", self.rate, "a share of the units above 0 and below 1", above=0.0) >= 1:
            raise ValueError(f"rate: expected a share of the units above 0 and below 1, got {self.rate!r}")
        if self.penalty is not None:
            check_number("penalty", self.penalty, "None or a finite number above 0", above=0.0)
        if self.reject is not None:
            check_number("reject", self.reject, "None or a finite number", above=-math.inf)
        if self.image_shape is not None:
            if not isinstance(self.image_shape, (tuple, list)) or len(self.image_shape) not in (2, 3):
                raise ValueError(f"image_shape: expected height, width and maybe channels, got {self.image_shape!r}")
            for size in self.image_shape:
                check_size("image_shape", size)
        for size in self.patch if isinstance(self.patch, (tuple, list)) else (self.patch,):
            check_size("patch", size)

    def _width(self) -> int:
        """The units asked for, or as many as the memory allows."""
        if self.memory_budget is None:
            return _DEFAULT_UNITS if self.n_units is None else operator.index(self.n_units)
        budget = _bytes(self.memory_budget)
        least = learning_bytes(_LEAST_UNITS, self.readout, self.segments)
        if least > budget:
            raise ValueError(f"memory_budget: expected at least {least} bytes, for {_LEAST_UNITS} units, got {budget}")
        width = _LEAST_UNITS
        for step in (2**k * 128 for k in range(12, -1, -1)):
            if learning_bytes(width + step, self.readout, self.segments) <= budget:
                width += step
        if self.verbose:
            print(f"memory_budget: {budget} bytes allow {width} units")
        return width

    def _validated(self, X: Any, y: Any, fresh: bool) -> tuple[np.ndarray, np.ndarray]:
        if y is None:
            raise ValueError("y: expected labels, got None; requires y to be passed, but the target y is None")
        X = self._validated_x(X, fresh=fresh)
        if self.image_shape is not None and math.prod(self.image_shape) != X.shape[1]:
            raise ValueError(f"image_shape: expected the shape of {X.shape[1]} features, got {self.image_shape}")
        y = column_or_1d(_to_numpy(y), warn=True)
        _labels("y", y)
        check_consistent_length(X, y)
        check_classification_targets(y)
        return X, y

    def _validated_x(self, X: Any, *, fresh: bool) -> np.ndarray:
        X = _to_numpy(X)
        if self.image_shape is not None and isinstance(X, np.ndarray) and X.ndim == 1 + len(self.image_shape):
            X = X.reshape(len(X), -1)
        X = validate_data(self, X, reset=fresh, dtype="numeric", ensure_all_finite=False)
        if X.dtype.kind == "f":
            _check_finite(X)
        return X if X.dtype == np.uint8 else np.asarray(X, dtype=np.float64)


def code_product(bits: Tensor, weight: Tensor) -> Tensor:
    """``z @ weight.T`` for codes z of 0 and 1. Bits (M, words), float32 (C, K) -> float32 (M, C)."""
    return 0.5 * (ops.sign_matmul_t(weight, bits, weight.shape[1]).T + weight.sum(1))


def learning_bytes(n_units: int, readout: str, segments: int) -> int:
    """What learning with so many units takes at most, the solution included, beside the interpreter and the batch.

    Of segments: those of 32 classes.
    """
    if readout == "prototype":
        return n_units * 4096
    if readout == "dendritic":
        return n_units * (4096 + 5 * segments * _BUDGETED_CLASSES)
    counts = 4 * n_units * (n_units + 512) // 2
    if n_units <= DIRECT_UNITS:
        return counts + 3 * n_units**2 * (8 if n_units <= EXACT_UNITS else 4) + 2**25
    return counts + 10_000 * n_units + 2**25


def _bytes(budget: int | str) -> int:
    """``64MB`` as a number. Raises: ValueError for what is no size."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kMG]i?)?B?\s*", str(budget))
    try:
        return int(float(found[1]) * _PREFIXES[found[2] or ""])  # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(f"memory_budget: expected bytes, or text such as '64MB', got {budget!r}") from None


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
