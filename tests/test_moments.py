import numpy as np
import pytest
import torch

import engram_kernels as ek
from engram_kernels.codes import TableCode
from engram_kernels.moments import SecondMoments


def counted(z, y, batch):
    moments = SecondMoments(z.shape[1])
    moments.place_classes({}, int(y.max()) + 1)
    for i in range(0, len(z), batch):
        moments.add(ek.ops.pack_signs(z[i : i + batch].float() - 0.5), y[i : i + batch])
    return moments


def matrix_of(moments):
    out = torch.empty(moments.n_units, moments.n_units, dtype=torch.int64)
    moments.matrix(out)
    return out


@pytest.mark.parametrize("units", [1, 127, 512, 700, 1300])
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_counts_are_exact(units, batch):
    z = (torch.rand(37, units) < 0.3).long()
    y = torch.arange(37) % 3
    moments = counted(z, y, batch)
    assert torch.equal(matrix_of(moments), z.T @ z)
    assert torch.equal(moments.counts, torch.stack([z[y == c].sum(0) for c in range(3)]))
    v = torch.randn(units, 2, dtype=torch.float64)
    assert torch.allclose(moments.product(v), (z.T @ z).double() @ v)
    some = torch.arange(0, units, 3)
    assert torch.equal(moments.rows(some), (z.T @ z)[some])
    twice = counted(z, y, 37)
    twice.add_all(moments)
    assert torch.equal(matrix_of(twice), 2 * z.T @ z)


def test_counts_beyond_16_bits_are_exact():
    moments = counted(torch.ones(30_000, 3).long(), torch.zeros(30_000).long(), 10_000)
    for _ in range(3):
        moments.add_all(moments.copy())
    assert (matrix_of(moments) == 240_000).all()


@pytest.mark.parametrize("seed", range(20))
def test_widening_a_range_carries_counts_over_exactly(seed):
    rng = np.random.default_rng(seed)
    d, n = int(rng.integers(1, 9)), int(rng.integers(2, 60))
    X = rng.standard_cauchy((n, d)) * 10.0 ** rng.integers(-6, 7, d) + 10.0 ** rng.integers(-6, 9, d)
    X = np.round(X) if seed % 3 == 0 else X
    code = TableCode(d, thresholds=8, digits=5)
    moments = SecondMoments(code.n_units)
    moments.place_classes({}, 1)
    for row in X:
        for j, (T, c) in code.widen(row, row).items():
            moments.transform(j * code.per_feature, torch.from_numpy(T), torch.from_numpy(c))
        z = torch.from_numpy(code.encode(row[None]).reshape(1, -1))
        moments.add(ek.ops.pack_signs(z.float() - 0.5), torch.zeros(1, dtype=torch.int64))
    z = torch.from_numpy(code.encode(X).reshape(n, -1)).long()
    assert torch.equal(matrix_of(moments), z.T @ z)
    assert torch.equal(moments.counts[0], z.sum(0))
