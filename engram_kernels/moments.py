"""Counted second moments of binary codes: how often each two units fire together, and each unit in each class.

Integers alone, so that neither the order of the samples nor their division into batches leaves a trace, and adding two
is the same as having counted all their samples in one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import ops

_BLOCK = 512  # rows of the Gram matrix that are stored, and counted, together
_PART = 128  # rows that are worked on at a time, so that what lies between stays small
_FEW = 4  # samples up to which adding each to the rows of the units that fired costs less than transposing
_SIXTEEN_BITS = 2**16 - 1
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class SecondMoments:
    """Counts of a binary code of K units, by pair and by class.

    ``pairs[i, j]``, how many samples have both units, is symmetric: of each block of 512 rows only what lies right of
    the block's first column is kept, in 16 bits until a count of the block needs 32. That is K² bytes, and 2 K² in
    the end.

    Args:
        n_units: K, at least 1.
        pairs: False to count by class alone.

    Attributes: ``counts`` int64 (classes, K); ``samples`` int64 (classes,).
    """

    def __init__(self, n_units: int, *, pairs: bool = True) -> None:
        self.n_units = n_units
        self.counts = torch.zeros(0, n_units, dtype=torch.int64, device="cpu")
        self.samples = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.blocks: list[Tensor] = []  # int16 that hold 0 to 65535, or int32
        if pairs:
            self.blocks = [
                torch.zeros(min(_BLOCK, n_units - i), n_units - i, dtype=torch.int16, device="cpu")
                for i in range(0, n_units, _BLOCK)
            ]

    @property
    def total(self) -> int:
        """Samples of all classes."""
        return int(self.samples.sum())

    def copy(self) -> SecondMoments:
        """Another with the same counts."""
        other = SecondMoments(self.n_units, pairs=False)
        other.counts, other.samples = self.counts.clone(), self.samples.clone()
        other.blocks = [block.clone() for block in self.blocks]
        return other

    def place_classes(self, places: Mapping[int, int], classes: int) -> None:
        """Makes room: class i of so far becomes ``places[i]`` of ``classes``; one without a place is dropped.

        The pairs stay as they are.
        """
        counts = self.counts.new_zeros(classes, self.n_units)
        samples = self.samples.new_zeros(classes)
        for before, after in places.items():
            counts[after], samples[after] = self.counts[before], self.samples[before]
        self.counts, self.samples = counts, samples

    def add(self, bits: Tensor, y: Tensor) -> None:
        """Counts samples: their codes, bits (M, words), and numbers of classes, int64 (M,)."""
        m = len(y)
        if m == 0:
            return
        if self.total + m > torch.iinfo(torch.int32).max:
            raise ValueError("X: expected at most 2**31 - 1 samples in all, since pairs are counted in 32 bits")
        chosen = functional.one_hot(y, len(self.samples)).float()
        fired = ops.gated_weight_grad(chosen, bits, self.n_units, bits).round()
        self.counts += fired.to(torch.int64)
        self.samples += torch.bincount(y, minlength=len(self.samples))
        if self.blocks:
            self._widen(self.counts.sum(0))
            self._add_pairs(bits, fired.sum(0).to(torch.int32))

    def add_all(self, other: SecondMoments) -> None:
        """Adds the counts of another with the same classes in the same places."""
        self.counts += other.counts
        self.samples += other.samples
        self._widen(self.counts.sum(0))
        for block, more in zip(self.blocks, other.blocks, strict=True):
            block += _values(more).to(block.dtype)

    def subtract_all(self, other: SecondMoments) -> None:
        """Takes off the counts of another with the same classes in the same places, all of which are counted here."""
        self.counts -= other.counts
        self.samples -= other.samples
        for block, less in zip(self.blocks, other.blocks, strict=True):
            block -= _values(less).to(block.dtype)

    def rows(self, units: Tensor) -> Tensor:
        """Rows of the pairs, of units in rising order, int64 (units, K)."""
        out = torch.empty(len(units), self.n_units, dtype=torch.int64, device="cpu")
        for b, block in enumerate(self.blocks):
            start = b * _BLOCK
            first, last = torch.searchsorted(units, torch.tensor([start, start + len(block)])).tolist()
            out[first:last, start:] = _values(block[units[first:last] - start])
            out[last:, start : start + len(block)] = _values(block[:, units[last:] - start]).T
        return out

    def square(self, first: int, last: int) -> Tensor:
        """The pairs of units ``first`` to ``last`` among themselves, int64 (last - first, last - first)."""
        block, start = self.blocks[first // _BLOCK], first // _BLOCK * _BLOCK
        if last <= start + len(block):
            return _values(block[first - start : last - start, first - start : last - start]).to(torch.int64)
        return self.rows(torch.arange(first, last))[:, first:last]

    def matrix(self, out: Tensor) -> None:
        """Writes all pairs, (K, K), in a dtype that holds them exactly, or nearly."""
        for b, block in enumerate(self.blocks):
            start, end = b * _BLOCK, b * _BLOCK + len(block)
            out[start:end, start:] = _values(block)
            out[end:, start:end] = out[start:end, end:].T

    def product(self, v: Tensor) -> Tensor:
        """The pairs times floats (K, R), in their dtype, with one block of the pairs as floats at a time."""
        rows_of_v = v.T.contiguous()  # few rows times a matrix: MKL is several times slower with few columns
        out = torch.zeros_like(rows_of_v)
        for b, block in enumerate(self.blocks):
            start, end = b * _BLOCK, b * _BLOCK + len(block)
            for i in range(0, len(block), _PART):
                pairs = _floats(block[i : i + _PART], v.dtype)
                part = slice(start + i, start + i + len(pairs))
                out[:, part] += rows_of_v[:, start:] @ pairs.T
                out[:, end:] += rows_of_v[:, part] @ pairs[:, len(block) :]
        return out.T

    def set_rows(self, first: int, values: Tensor) -> None:
        """Puts rows from ``first`` on, int64 (rows, K), symmetric among themselves, and the columns they mirror."""
        last = first + len(values)
        self._widen(torch.cat([self._diagonal()[:first], values.amax(1), self._diagonal()[last:]]))
        for b, block in enumerate(self.blocks):
            start = b * _BLOCK
            end = start + len(block)
            if first < end and last > start:
                i, j = max(first, start), min(last, end)
                block[i - start : j - start] = values[i - first : j - first, start:].to(block.dtype)
                # and the other rows of the block, whose columns these are
                block[:, first - start if first > start else 0 : last - start] = (
                    values[:, start:end].T[:, max(0, start - first) :].to(block.dtype)
                )
            elif last > end:
                block[:, first - start : last - start] = values[:, start:end].T.to(block.dtype)

    def transform(self, first: int, T: Tensor, c: Tensor) -> None:
        """Carries the counts over to ``new = T old + c`` of the units from ``first`` on; int64 (u, u), (u,)."""
        last = first + len(c)
        sums = self.counts.sum(0)
        if self.blocks:
            pairs = T @ self.rows(torch.arange(first, last)) + c[:, None] * sums
            own = pairs[:, first:last] @ T.T
            own += (T @ sums[first:last] + c * self.total)[:, None] * c
            pairs[:, first:last] = own
        self.counts[:, first:last] = self.counts[:, first:last] @ T.T + self.samples[:, None] * c
        if self.blocks:
            self.set_rows(first, pairs)

    def _diagonal(self) -> Tensor:
        return torch.cat([_values(block.diagonal()).to(torch.int64) for block in self.blocks])

    def _widen(self, largest: Tensor) -> None:
        """Gives 32 bits to the blocks where a count may become ``largest`` (K,) of its row."""
        for b, block in enumerate(self.blocks):
            start = b * _BLOCK
            if block.dtype == torch.int16 and int(largest[start : start + len(block)].max()) > _SIXTEEN_BITS:
                self.blocks[b] = _values(block)

    def _add_pairs(self, bits: Tensor, fired: Tensor) -> None:
        """Counts the pairs of codes, bits (M, words), of which ``fired`` int32 (K,) have each unit."""
        m = len(bits)
        if m <= _FEW:
            for sample in ops.unpack_signs(bits, self.n_units, torch.int8) > 0:
                for b, block in enumerate(self.blocks):
                    start = b * _BLOCK
                    block[sample[start : start + len(block)]] += sample[start:]
            return
        by_unit = ops.transpose_bits(bits, self.n_units)
        for b, block in enumerate(self.blocks):
            start = b * _BLOCK
            for i in range(0, len(block), _PART):
                part = block[i : i + _PART]
                rows = slice(start + i, start + i + len(part))
                part += pairs_of(by_unit, rows, start, m, fired).to(block.dtype)


def pairs_of(by_unit: Tensor, rows: slice, start: int, m: int, fired: Tensor) -> Tensor:
    """How many of M samples have both of two units, one of ``rows``, one from ``start`` on: int32 (rows, K - start).

    With the samples of unit i as bits u_i, a row of ``by_unit`` (K, words), and their numbers ``fired`` int32 (K,),
    ``popc(u_i & u_j) = (y - M) / 4 + (popc(u_i) + popc(u_j)) / 2`` of the binary product ``y = M - 2 popc(u_i ^ u_j)``.
    """
    y = ops.binary_matmul(by_unit[rows], by_unit[start:], m)
    y += 2 * fired[rows, None] - m
    y += 2 * fired[start:]
    return y.bitwise_right_shift_(2)


def add_pairs_(gram: Tensor, bits: Tensor, fired: Tensor) -> None:
    """Adds to ``gram``, int32 (K, K), how many samples have both of two units, by rows that stay in the cache.

    Codes, bits (M, words), of which ``fired`` int32 (K,) have each unit.
    """
    m, k = len(bits), len(gram)
    if m == 0:
        return
    by_unit = ops.transpose_bits(bits, k)
    for start in range(0, k, _PART):
        end = min(start + _PART, k)
        gram[start:end] += pairs_of(by_unit, slice(start, end), 0, m, fired)


def _values(block: Tensor) -> Tensor:
    """int32 of a block in either form."""
    return block.to(torch.int32) & _SIXTEEN_BITS if block.dtype == torch.int16 else block


def _floats(block: Tensor, dtype: torch.dtype) -> Tensor:
    """A block in either form as floats: NumPy converts 16 unsigned bits in one go."""
    if block.dtype == torch.int16:
        return torch.from_numpy(block.numpy().view(np.uint16).astype(_NUMPY[dtype]))
    return block.to(dtype)


__all__ = ["SecondMoments", "add_pairs_"]
