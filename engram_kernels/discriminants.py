"""Linear discriminants of binary codes, from counted second moments alone.

With ``S`` the covariance of the units within the classes, ``P`` a prior covariance of the weights and ``mu_c`` the mean
code of class c less the mean of all,

    w_c = (S + penalty v P^-1)^-1 mu_c,   score[m, c] = (z[m] - mean) · w_c - w_c · mu_c / 2

where v is the variance of all features in the basis in which P is the identity: a regularised linear discriminant
analysis. It is a function of integers, the same in whatever order they were counted.

Up to :data:`DIRECT_UNITS` units the matrix is factorised. Beyond, it is never formed: conjugate gradients multiply with
the counts as they are stored, preconditioned by the best that a sample of the units says of the others (Nyström;
Frangella, Tropp and Udell 2023). A small change of the counts is caught up with by conjugate gradients too, from the
solution and with the factor of before.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import scipy.linalg
import torch
from torch import Tensor

from .moments import SecondMoments

DIRECT_UNITS = 4096
TOLERANCE = 5e-5  # of the residual, relative to the right side
EXACT_UNITS = 2048  # up to here in float64, which then costs little
_SAMPLE = 512  # of the units, that speaks for the others where the matrix is not formed
_COLUMNS = 64  # of the matrix that are found at a time
_ROWS = 1024  # of a matrix that are multiplied at a time, in its place
_SELECTION = 1024  # features by which the penalty is chosen: a sample tells as much
_FRESH_SHARE = 1.1  # growth of the samples up to which the penalty and the factor of before are good enough
_MOST_STEPS = 500
_PROBES = 4  # random vectors that find a trace
_PROBE_TOLERANCE = 1e-2
_LEAST_LEFT = 0.05  # share of the samples, and of what tells classes apart, that the parameters leave
_DEGREES = 4  # of freedom, of Student's t
_MEANS_TEMPER = 0.27  # where pairs are not counted: the likeliest labels on most data sets
_ALIKE = 20.0  # differences of n log(error) that say little
_PENALTIES = 10.0 ** torch.arange(-6.0, 1.01, 0.5, dtype=torch.float64, device="cpu")  # shares of all variance


class Prior(NamedTuple):
    """What is believed of the weights: how large they are by unit, and along which sums of units they may be larger."""

    scale: Tensor  # float64 (K,), standard deviations of the units' weights
    sums: Tensor  # float64 (S, U), weights of S runs of U units, from unit 0 on: linear functions of a feature
    strength: float  # standard deviation of the weight of such a sum, when it varies by 1


class Discriminant(NamedTuple):
    """``score = z · weight + bias`` of codes z of 0 and 1; float32 (C, K) and (C,).

    ``temper`` times the score, with the logarithm of the classes' shares, is the log-odds of the classes.
    """

    weight: Tensor
    bias: Tensor
    temper: float


class Typical(NamedTuple):
    """What the samples of each class are like: code distances to the class's mean, and scores for the class."""

    weight: Tensor  # float32 (C, K): squared distance to the mean = z · weight + bias
    bias: Tensor
    distance: Tensor  # float64 (C,), mean and standard deviation of each
    distance_deviation: Tensor
    score: Tensor
    score_deviation: Tensor  # inf where pairs are not counted


class Discriminants:
    """Solves for the discriminant of counts, and keeps what makes the next solution cheap.

    Args:
        moments: the counts, which may go on.
        prior: of the weights.
        penalty: a share of the variance, or None to choose the one of least error by generalised cross-validation.

    Attributes: ``former``, how many of the last classes of the counts are no answers any more, but are in the pairs.
    """

    def __init__(self, moments: SecondMoments, prior: Prior, penalty: float | None) -> None:
        self.moments, self.prior, self.penalty = moments, prior, penalty
        self.former = 0
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_start": None}  # a factor is larger than all the rest, and can be found again

    def forget(self) -> None:
        """Drops what was solved for: the next solution is a new one."""
        self._answer: Discriminant | None = None
        self._answer_samples = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._start: _Solved | None = None
        self._typical: Typical | None = None

    def recall(self, answer: Discriminant) -> None:
        """Takes an answer found earlier for these very counts."""
        self._answer, self._answer_samples = answer, self.moments.samples.clone()

    def discriminant(self) -> Discriminant:
        """The discriminant of all that was counted so far."""
        moments = self.moments
        if self._answer is not None and torch.equal(self._answer_samples, moments.samples):
            return self._answer
        n = moments.total
        means = moments.counts.double() / moments.samples.clamp(min=1)[:, None]
        mean = moments.counts.sum(0).double() / max(1, n)
        centred = torch.where((moments.samples > 0)[:, None], means - mean, 0.0)
        asked = len(centred) - self.former
        several = int((moments.samples > 0).sum()) > 1
        weight, temper = self._weights(mean, centred, asked) if several else (torch.zeros_like(centred), 1.0)
        bias = -weight @ mean - 0.5 * (weight * centred).sum(1)
        self._typical = None
        self.recall(Discriminant(weight[:asked].float(), bias[:asked].float(), temper))
        assert self._answer is not None
        return self._answer

    def typical(self) -> Typical:
        """What the samples of each class are like, by what was counted so far."""
        answer, moments = self.discriminant(), self.moments
        if self._typical is None:
            asked = len(answer.weight)
            means = moments.counts.double() / moments.samples.clamp(min=1)[:, None]
            own = means[:asked]
            distance = 1 - 2 * own
            score = answer.weight.double()
            spread = self._deviations(torch.cat([distance, score]), means)
            self._typical = Typical(
                distance.float(),
                own.square().sum(1).float(),
                (own * (1 - own)).sum(1),
                spread[:asked],
                (score * own).sum(1) + answer.bias.double(),
                spread[asked:],
            )
        return self._typical

    def _deviations(self, weight: Tensor, means: Tensor) -> Tensor:
        """Standard deviations within the classes of sums of units, weights (R, K) -> (R,)."""
        moments, n = self.moments, self.moments.total
        shares = moments.samples.double() / n
        if moments.blocks:
            dtype = torch.float64 if moments.n_units <= EXACT_UNITS else torch.float32
            squares = (weight.T * moments.product(weight.T.to(dtype))).sum(0) / n
            within = squares - (weight @ means.T).square() @ shares
        else:
            within = weight.square() @ (shares @ (means * (1 - means)))
        return within.clamp(min=0).sqrt() + 1e-12

    def _weights(self, mean: Tensor, centred: Tensor, asked: int) -> tuple[Tensor, float]:
        """Weights (C, K), and the temper of the scores of the classes that are asked for."""
        moments = self.moments
        shares = moments.samples.double() / moments.total
        if not moments.blocks:  # the means alone: as if all units varied alike and independently
            variance = (mean * (1 - mean) - shares @ centred.square()).mean()
            return centred / (variance + 1e-30), _MEANS_TEMPER
        system = _System(moments, self.prior, mean, centred, shares)
        start = self._start
        if start is None or len(start.solution[0]) != len(shares) or moments.total > _FRESH_SHARE * start.samples:
            start = _new(system, self.penalty)
        else:
            solution = _conjugate_gradients(
                system, system.right, start.solution, start.penalty, start.preconditioner, TOLERANCE
            )
            start = start._replace(solution=solution)
        self._start = start
        w, right, penalty = start.solution[:, :asked].double(), system.right[:, :asked].double(), start.penalty
        means = w.T @ right
        within = means - penalty * system.features.variance * (w.T @ w)  # by what the weights solve
        temper = temper_of(means, 0.5 * (within + within.T), moments.samples[:asked], start.freedom)
        return system.features.push(start.solution).T.double(), temper


class _Solved(NamedTuple):
    solution: Tensor  # (F, C)
    penalty: float
    samples: int
    preconditioner: _Factor | _LowRank
    freedom: float  # the number of parameters that samples decide on: the trace of S (S + penalty v)^-1


def temper_of(means: Tensor, within: Tensor, samples: Tensor, freedom: float) -> float:
    """The factor by which differences of scores become log-odds, from the classes' moments.

    Between two classes a difference has means ``d`` apart, and the variance ``v`` within each. Learned samples flatter
    both: with ``freedom`` parameters on n samples, of which the classes have a and b, new samples have ``d``
    less by ``(1/a + 1/b) freedom / (1 - freedom / n)`` and ``v`` larger by ``1 / (1 - freedom / n)^2`` (asymptotics of
    regularised discriminants: Zollanvari and Dougherty 2015). Normal distributions would give the factor ``d / v``.
    Tails are heavier: Student's t gives ``d / v / (1 + D^2 / 4 degrees)`` midway, at the distance ``D^2 = d^2 / v``.
    All pairs count by their shares and overlap, ``exp(-D^2 / 8)``.

    float64 (C, C): ``means[i, j]`` of score i in class j, ``within`` the covariance of scores; int64 (C,).
    """
    n = int(samples.sum())
    i, j = torch.triu_indices(len(samples), len(samples), 1)
    seen = (samples[i] > 0) & (samples[j] > 0)
    i, j = i[seen], j[seen]
    left = max(1 - freedom / n, _LEAST_LEFT)
    apart = means[i, i] - means[i, j] - means[j, i] + means[j, j]
    flattered = (1 / samples[i] + 1 / samples[j]) * freedom / left
    apart = torch.maximum(apart - flattered, _LEAST_LEFT * apart)
    variance = (within[i, i] + within[j, j] - 2 * within[i, j]).clamp(min=1e-30) / left**2
    distance = apart.square() / variance
    # of the least distance, so that classes that are all far apart have a weight as well
    weight = samples[i] * samples[j] * torch.exp((distance.min() - distance) / 8) if len(i) else apart
    factor = apart / variance / (1 + distance / (4 * _DEGREES))
    return float((weight * factor).sum() / weight.sum()) if len(i) else 1.0


class _Features:
    """The units scaled by the prior, and its sums as further features: the basis in which the prior is the identity."""

    def __init__(self, moments: SecondMoments, prior: Prior, mean: Tensor, dtype: torch.dtype) -> None:
        self.units = len(prior.scale)
        s, u = prior.sums.shape
        spread = torch.zeros(s, dtype=torch.float64)
        for i in range(s):
            run = slice(i * u, (i + 1) * u)
            pairs = moments.square(i * u, (i + 1) * u).double() / moments.total
            spread[i] = prior.sums[i] @ (pairs - torch.outer(mean[run], mean[run])) @ prior.sums[i]
        spread = spread.clamp(min=0.0).sqrt()
        still = spread <= 1e-6 * prior.sums.sum(1)
        self.sums = (prior.sums * torch.where(still, 0.0, prior.strength / spread)[:, None]).to(dtype)
        self.scale = prior.scale.to(dtype)
        own = (self.scale.double().square() * mean * (1 - mean)).sum()
        self.variance = float(own + prior.strength**2 * (~still).sum())

    def __len__(self) -> int:
        return self.units + len(self.sums)

    def pull(self, v: Tensor) -> Tensor:
        """Of units (K, R) -> of features (F, R)."""
        s, u = self.sums.shape
        runs = v[: s * u].reshape(s, u, v.shape[1])
        return torch.cat([v * self.scale[:, None], torch.einsum("su,sur->sr", self.sums, runs)])

    def push(self, w: Tensor) -> Tensor:
        """Weights of features (F, R) -> of units (K, R)."""
        s, u = self.sums.shape
        out = w[: self.units] * self.scale[:, None]
        out[: s * u] += torch.einsum("su,sr->sur", self.sums, w[self.units :]).flatten(0, 1)
        return out


class _System:
    """``(total covariance - between the classes + penalty variance) W = class means``, in the prior's basis."""

    def __init__(self, moments: SecondMoments, prior: Prior, mean: Tensor, centred: Tensor, shares: Tensor) -> None:
        self.moments, self.n = moments, moments.total
        self.dtype = torch.float64 if moments.n_units <= EXACT_UNITS else torch.float32
        self.features = _Features(moments, prior, mean, self.dtype)
        self.mean, self.shares = mean.to(self.dtype), shares.to(self.dtype)
        self.right = self.features.pull(centred.T.to(self.dtype))

    def total(self, v: Tensor) -> Tensor:
        """The total covariance times (F, R)."""
        w = self.features.push(v)
        y = self.moments.product(w).div_(self.n).addr_(self.mean, self.mean @ w, alpha=-1)
        return self.features.pull(y)

    def within(self, v: Tensor, penalty: float) -> Tensor:
        """The matrix of the system times (F, R)."""
        y = self.total(v).add_(v, alpha=penalty * self.features.variance)
        return y - (self.right * self.shares) @ (self.right.T @ v)

    def columns(self, chosen: Tensor) -> Tensor:
        """Columns of the total covariance, (F, chosen)."""
        out = torch.empty(len(self.features), len(chosen), dtype=self.dtype)
        for i in range(0, len(chosen), _COLUMNS):
            part = chosen[i : i + _COLUMNS]
            v = torch.zeros(len(self.features), len(part), dtype=self.dtype)
            v[part, torch.arange(len(part))] = 1
            out[:, i : i + _COLUMNS] = self.total(v)
        return out

    def matrix(self) -> Tensor:
        """The total covariance (F, F): in one piece of memory, since it is the largest there is."""
        features, k = self.features, self.moments.n_units
        s, u = features.sums.shape
        out = torch.empty(len(features), len(features), dtype=self.dtype)
        units = out[:k, :k]
        self.moments.matrix(units)
        units.div_(self.n).addr_(self.mean, self.mean, alpha=-1)
        with_sums = torch.empty(k, s, dtype=self.dtype)
        for i in range(s):
            with_sums[:, i] = units[:, i * u : (i + 1) * u] @ features.sums[i]
        out[k:, k:] = torch.einsum("su,sur->sr", features.sums, with_sums[: s * u].view(s, u, s))
        out[:k, k:] = with_sums * features.scale[:, None]
        out[k:, :k] = out[:k, k:].T
        units.mul_(features.scale).mul_(features.scale[:, None])
        return out


def _new(system: _System, penalty: float | None) -> _Solved:
    """A solution that owes nothing to an earlier one, or what conjugate gradients need to find it."""
    features, direct = system.features, system.moments.n_units <= DIRECT_UNITS
    f = len(features)
    if direct:
        matrix = system.matrix()
        chosen = _spread(f, _SELECTION)
        part = matrix[chosen][:, chosen]
    else:
        sums = torch.arange(features.units, f)
        chosen = torch.cat([_spread(features.units, _SAMPLE), sums])
        columns = system.columns(chosen)
        part = columns[chosen]
    if penalty is None:
        penalty = choose_penalty(part.double(), system.right[chosen].double(), system.shares.double(), system.n)
    shift = penalty * features.variance + 1e-30
    preconditioner: _Factor | _LowRank
    probes = 2.0 * torch.randint(2, (f, _PROBES), generator=torch.Generator().manual_seed(0)).to(system.dtype) - 1.0
    right = torch.cat([system.right, probes], dim=1)
    if direct:
        matrix.addmm_(system.right * system.shares, system.right.T, alpha=-1.0)
        matrix.diagonal().add_(shift)
        lower = matrix.T  # as LAPACK stores it, so that the factor takes the matrix's place
        preconditioner = _Factor(torch.linalg.cholesky(lower, out=lower))
        solution = preconditioner.solve(right)
    else:
        preconditioner = _LowRank(columns, part, shift)
        enough = torch.full((right.shape[1],), TOLERANCE, dtype=system.dtype)
        enough[-_PROBES:] = _PROBE_TOLERANCE
        solution = _conjugate_gradients(system, right, torch.zeros_like(right), penalty, preconditioner, enough)
    solution, probed = solution[:, :-_PROBES].clone(), solution[:, -_PROBES:]
    freedom = f - shift * float((probes * probed).sum()) / _PROBES  # Hutchinson 1990
    return _Solved(solution, penalty, system.n, preconditioner, freedom)


def _conjugate_gradients(
    system: _System,
    right: Tensor,
    x: Tensor,
    penalty: float,
    preconditioner: _Factor | _LowRank,
    tolerance: float | Tensor,
) -> Tensor:
    """The solution for each column of ``right`` by itself, from ``x`` on, to a residual relative to the column."""
    x = x.clone()
    residual = right - system.within(x, penalty) if bool(x.any()) else right.clone()
    enough = tolerance * right.norm(dim=0)
    direction, before = torch.zeros_like(x), torch.ones_like(enough)
    for _ in range(_MOST_STEPS):
        if bool((residual.norm(dim=0) <= enough).all()):
            break
        z = preconditioner.solve(residual)
        fall = (residual * z).sum(0)
        direction = z + fall / before.clamp(min=1e-30) * direction
        y = system.within(direction, penalty)
        step = fall / (direction * y).sum(0).clamp(min=1e-30)
        x += step * direction
        residual -= step * y
        before = fall
    return x


class _Factor:
    """The inverse of a matrix by its Cholesky factor."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def solve(self, v: Tensor) -> Tensor:
        """The inverse times (F, R)."""
        half = torch.linalg.solve_triangular(self.factor, v, upper=False)  # cholesky_solve would copy the factor
        return torch.linalg.solve_triangular(self.factor.T, half, upper=True)


class _LowRank:
    """An approximate inverse of ``matrix + shift``, from some of the matrix's columns, which it writes over."""

    def __init__(self, columns: Tensor, part: Tensor, shift: float) -> None:
        values, vectors = _eigen(part.double())
        kept = values > 1e-6 * values[-1]
        half = _times(columns, (vectors[:, kept] / values[kept].sqrt()).to(columns.dtype))  # half half^T is near matrix
        values, vectors = _eigen((half.T @ half).double())
        kept = values > 1e-6 * values[-1]
        self.basis = _times(half, (vectors[:, kept] / values[kept].sqrt()).to(half.dtype))
        values = values[kept]
        self.factors = ((values[0] + shift) / (values + shift) - 1).to(half.dtype)

    def solve(self, v: Tensor) -> Tensor:
        """The inverse times (F, R), up to a factor."""
        return v + self.basis @ (self.factors[:, None] * (self.basis.T @ v))


def _times(rows: Tensor, right: Tensor) -> Tensor:
    """``rows @ right`` in the memory of ``rows``, which has as many columns or more."""
    for part in rows.split(_ROWS):
        part[:, : right.shape[1]] = part @ right
    return rows[:, : right.shape[1]]


def choose_penalty(total: Tensor, between: Tensor, shares: Tensor, n: int) -> float:
    """The penalty, as a share of all variance, with the least error of regression by generalised cross-validation.

    (Golub, Heath and Wahba 1979.) Of a hundred samples it chooses too small ones at random. So the next larger penalty
    is taken if ``n log(error)`` is larger by 20 at most, which from some thousand samples on it rarely is.

    float64: ``total`` (F, F) the covariance of features, ``between`` (F, C) the centred means of the classes,
    ``shares`` (C,) of the samples.
    """
    values, vectors = _eigen(total)
    values = values.clamp(min=0.0)
    variance = values.sum()
    projected = (vectors.T @ (between * shares)).square().sum(1)
    target = (shares * (1 - shares)).sum()
    errors = []
    for share in _PENALTIES.tolist():
        shrunk = values + share * variance + 1e-300
        freedom = float((values / shrunk).sum()) + 1
        fit = (projected * (2 / shrunk - values / shrunk**2)).sum()
        errors.append(float(target - fit) / (1 - freedom / n) ** 2 if freedom < n else math.inf)
    best = errors.index(min(errors)) if min(errors) < math.inf else len(errors) - 1
    if best + 1 < len(errors) and errors[best + 1] <= errors[best] * math.exp(_ALIKE / n):
        best += 1
    return float(_PENALTIES[best])


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and vectors. By SciPy: MKL's method of torch gives up on some matrices with many zeros."""
    values, vectors = scipy.linalg.eigh(matrix.numpy(), driver="evr", check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _spread(f: int, most: int) -> Tensor:
    """``most`` numbers below f, evenly spread, or all of them."""
    return torch.arange(f) if f <= most else torch.arange(most) * f // most


__all__ = [
    "DIRECT_UNITS",
    "EXACT_UNITS",
    "TOLERANCE",
    "Discriminant",
    "Discriminants",
    "Prior",
    "Typical",
    "choose_penalty",
    "temper_of",
]
