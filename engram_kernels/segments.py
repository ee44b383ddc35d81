"""Dendritic segments of binary codes: each class has several binary prototypes, which compete for its samples.

A segment counts in how many of the samples that it won each unit fired. Its hidden weights are these counts less what
they would be if every unit fired at its expected rate; their signs are its binary weights. A sample changes one segment
of its own class and nothing else. So what is learned of a class does not depend on other classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .reference import words_for

_TOP_SEGMENTS = 3  # whose mean activation is the score: a single one is noisy, many blur the class
_CONSCIENCE = 0.3  # advantage in activation of a segment without wins over one with as many as the mean
_RECENT = 256  # samples of a class that say what its scores are like
_CERTAINTY = 15.0  # log-odds of a difference of scores of 1, if their standard deviation were 1
_CHUNK = 256  # samples that are unpacked together


class Segments:
    """Segments of a binary code of K units, up to S for each class.

    With ``g`` the code, ``r`` the expected rates of its units, ``n[j]`` the samples that segment j won and
    ``fired[j, k]`` those of them in which unit k fired, the activation of a segment and the score of a class are

        a[j] = sum_k (g[k] - r[k]) sign(fired[j, k] - r[k] n[j]) / sum_k 2 r[k] (1 - r[k])
        score = mean of the 3 largest a[j] of the class

    so that 1 is the activation of a segment that has won nothing but this code, if as many units fire as expected. The
    first S different samples of a class make a segment each. A later one is won by
    ``argmax_j (a[j] + 0.3 (1 - n[j] / mean n))``, so that no segment stays idle. (Dendritic segments: Iyer et al. 2022;
    conscience: DeSieno 1988. It is the rule of :meth:`DendriticReadout.local_loss` with a step of 1 and no momentum.)

    Args:
        rates: float64 (K,), between 0 and 1.
        segments: S.
    """

    def __init__(self, rates: np.ndarray, segments: int) -> None:
        self.rates, self.segments = rates, segments
        self._of_class: list[_OwnSegments] = []

    def place_classes(self, places: Mapping[int, int], classes: int) -> None:
        """Makes room: class i of so far becomes ``places[i]`` of ``classes``; one without a place is dropped."""
        placed = [_OwnSegments(self.rates, self.segments) for _ in range(classes)]
        for before, after in places.items():
            placed[after] = self._of_class[before]
        self._of_class = placed

    def add(self, bits: Tensor, y: Tensor) -> None:
        """Learns samples in their order: codes, bits (M, words), and numbers of classes, int64 (M,)."""
        for c in y.unique().tolist():
            own = bits[y == c]
            for part in own.split(_CHUNK):
                self._of_class[c].add(part)

    def add_all(self, other: Segments) -> None:
        """Takes over the segments of another with the same classes in the same places.

        Where a class then has more than S, the two of the most equal weights become one, until it has S.
        """
        for own, more in zip(self._of_class, other._of_class, strict=True):
            own.add_all(more)

    def transform(self, first: int, T: np.ndarray, c: np.ndarray) -> None:
        """Carries the counts over to ``new = T old + c`` of the units from ``first`` on; int64 (u, u), (u,)."""
        for own in self._of_class:
            own.transform(first, T, c)

    def scores(self, bits: Tensor) -> Tensor:
        """Codes, bits (M, words) -> float64 (M, classes); -inf for a class without samples."""
        return torch.stack([own.scores(bits) for own in self._of_class], dim=1)

    def temper(self) -> float:
        """The factor by which differences of scores become log-odds.

        It falls with the square root of the standard deviation of scores within a class, and was found on ten data
        sets: neither a constant nor a factor that falls with the deviation itself was as good.
        """
        met = sum(own.met for own in self._of_class)
        variance = sum(own.met * own.score_variance for own in self._of_class) / max(1, met)
        return _CERTAINTY / max(variance, 1e-6) ** 0.25

    def typical(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the score of a class for samples that it had not learned, float64 (C,)."""
        mean = torch.tensor([own.score_mean for own in self._of_class], dtype=torch.float64)
        variance = torch.tensor([own.score_variance for own in self._of_class], dtype=torch.float64)
        return mean, variance.clamp(min=1e-6).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """All that was learned: tensors by name."""
        own = self._of_class
        k = len(self.rates)
        return {
            "fired": torch.from_numpy(np.concatenate([np.zeros((0, k), np.int32), *[o.fired[: o.used] for o in own]])),
            "won": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *[o.won[: o.used] for o in own]])),
            "used": torch.tensor([o.used for o in own], dtype=torch.int64),
            "met": torch.tensor([o.met for o in own], dtype=torch.int64),
            "score_mean": torch.tensor([o.score_mean for o in own], dtype=torch.float64),
            "score_variance": torch.tensor([o.score_variance for o in own], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.place_classes({}, len(state["used"]))
        last = 0
        for i, own in enumerate(self._of_class):
            first, last = last, last + int(state["used"][i])
            own.take(state["fired"][first:last].numpy(), state["won"][first:last].numpy())
            own.met = int(state["met"][i])
            own.score_mean, own.score_variance = float(state["score_mean"][i]), float(state["score_variance"][i])


class _OwnSegments:
    """The segments of one class."""

    def __init__(self, rates: np.ndarray, segments: int) -> None:
        self.rates, self.most = rates, segments
        self._full = float((2 * rates * (1 - rates)).sum())
        self.used = 0
        self.fired = np.zeros((0, len(rates)), dtype=np.int32)
        self.won = np.zeros(0, dtype=np.int64)
        self._bits = torch.zeros(0, words_for(len(rates)), dtype=torch.int64, device="cpu")
        self._offset = np.zeros(0)
        # of scores of samples before they were learned
        self.met, self.score_mean, self.score_variance = 0, 0.0, 0.0

    def add(self, bits: Tensor) -> None:
        """Learns samples in their order, bits (M, words)."""
        fired = (ops.unpack_signs(bits, len(self.rates), torch.int8) > 0).numpy()
        for i in range(len(bits)):
            activations = self.activations(bits[i : i + 1])[0]
            if self.used:
                self._meet(_score(activations))
            new = self.used < self.most and not (self._bits[: self.used] == bits[i]).all(dim=1).any()
            if new:
                self._make_room(1)
                winner, self.used = self.used, self.used + 1
            else:
                won = self.won[: self.used]
                winner = int((activations + _CONSCIENCE * (1 - won / won.mean())).argmax())
            self.fired[winner] += fired[i]
            self.won[winner] += 1
            self._derive(winner)

    def activations(self, bits: Tensor) -> np.ndarray:
        """Codes, bits (M, words) -> float64 (M, used)."""
        if not self.used:
            return np.zeros((len(bits), 0))
        # a gate is half the sum of its sign and 1
        y = ops.binary_matmul(bits, self._bits[: self.used], len(self.rates)).numpy()
        return (0.5 * y + self._offset[: self.used]) / self._full

    def scores(self, bits: Tensor) -> Tensor:
        """Codes, bits (M, words) -> float64 (M,)."""
        if not self.used:
            return torch.full((len(bits),), -torch.inf, dtype=torch.float64)
        return torch.from_numpy(_score(self.activations(bits)))

    def add_all(self, other: _OwnSegments) -> None:
        """Takes over another's segments."""
        if not other.used:
            return
        met = self.met + other.met
        share = other.met / met if met else 0.0
        apart = other.score_mean - self.score_mean
        self.score_variance += share * (other.score_variance - self.score_variance + (1 - share) * apart**2)
        self.score_mean, self.met = self.score_mean + share * apart, met
        fired = np.concatenate([self.fired[: self.used], other.fired[: other.used]])
        won = np.concatenate([self.won[: self.used], other.won[: other.used]])
        bits = torch.cat([self._bits[: self.used], other._bits[: other.used]]) if self.used else other._bits
        alike = ops.binary_matmul(bits, bits, len(self.rates)).numpy()
        np.fill_diagonal(alike, np.iinfo(np.int32).min)
        while len(won) > self.most:
            kept, gone = sorted(np.unravel_index(int(alike.argmax()), alike.shape))
            fired[kept] += fired[gone]
            won[kept] += won[gone]
            rest = np.arange(len(won)) != gone
            fired, won, bits, alike = fired[rest], won[rest], bits[torch.from_numpy(rest)], alike[rest][:, rest]
            bits[kept] = _packed(fired[kept] - self.rates * won[kept])
            alike[kept] = alike[:, kept] = ops.binary_matmul(bits[kept, None], bits, len(self.rates))[0].numpy()
            alike[kept, kept] = np.iinfo(np.int32).min
        self.take(fired, won)

    def transform(self, first: int, T: np.ndarray, c: np.ndarray) -> None:
        """Carries the counts over to ``new = T old + c`` of the units from ``first`` on."""
        own = slice(first, first + len(c))
        self.fired[: self.used, own] = self.fired[: self.used, own] @ T.T + self.won[: self.used, None] * c
        for j in range(self.used):
            self._derive(j)

    def take(self, fired: np.ndarray, won: np.ndarray) -> None:
        """Has these segments and no others: int32 (used, K), int64 (used,)."""
        self.used = 0
        self._make_room(len(won))
        self.used = len(won)
        self.fired[: self.used], self.won[: self.used] = fired, won
        for j in range(self.used):
            self._derive(j)

    def _meet(self, score: float) -> None:
        """A running mean and variance of scores, which rise while segments are added: later ones count more."""
        self.met += 1
        share = max(2 / (self.met + 1), 1 / _RECENT)
        apart = score - self.score_mean
        self.score_mean += share * apart
        self.score_variance = (1 - share) * (self.score_variance + share * apart**2)

    def _make_room(self, more: int) -> None:
        """Space for ``more`` segments: twice what there was, so that growing by one is cheap."""
        if self.used + more <= len(self.won):
            return
        room = min(self.most, max(2 * len(self.won), self.used + more))
        more = room - len(self.won)
        self.fired = np.concatenate([self.fired, np.zeros((more, len(self.rates)), np.int32)])
        self.won = np.concatenate([self.won, np.zeros(more, np.int64)])
        self._offset = np.concatenate([self._offset, np.zeros(more)])
        self._bits = torch.cat([self._bits, self._bits.new_zeros(more, self._bits.shape[1])])

    def _derive(self, j: int) -> None:
        """Weights of segment j from its counts."""
        hidden = self.fired[j] - self.rates * self.won[j]
        self._bits[j] = _packed(hidden)
        self._offset[j] = (0.5 - self.rates) @ np.where(hidden >= 0, 1.0, -1.0)


def _packed(hidden: np.ndarray) -> Tensor:
    """The signs of hidden weights, float64 (K,) -> bits (words,)."""
    return ops.pack_signs(torch.from_numpy(hidden.astype(np.float32))[None])[0]


def _score(activations: np.ndarray) -> Any:
    """Activations of a class's segments (..., used) -> their score (...).

    As ``readouts.segment_scores``, in NumPy, whose calls take less of the time that one sample takes to learn.
    """
    used = activations.shape[-1]
    if used <= _TOP_SEGMENTS:
        return activations.mean(axis=-1)
    return np.partition(activations, used - _TOP_SEGMENTS, axis=-1)[..., used - _TOP_SEGMENTS :].mean(axis=-1)


__all__ = ["Segments"]
