"""The metrics of a continual run. All follow from the accuracy matrix ``a``.

``a[i][j]`` is the accuracy on the test set of task j after learning task i, from 0 to 1 (Lopez-Paz and
Ranzato 2017, "Gradient Episodic Memory", call it R). Rows and columns count from 0. A run that was
interrupted leaves its last rows empty (None or nan): every metric is then that of the L tasks learned, on the
first L columns. Long streams are not evaluated on every task after every task: entries missing besides the diagonal
is nan, and so is a metric that needs it. A metric that is not defined (no task learned; one task, hence nothing to
forget) is nan too.

Libraries define backward transfer and forgetting differently; these are ours, where they come from, and what
Avalanche (Lomonaco et al. 2021) calls them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

AccuracyMatrix = Sequence[Sequence[float | None]]


def average_accuracy(matrix: AccuracyMatrix) -> float:
    """``mean over j < L of a[L-1][j]``: the last row (ACC of Lopez-Paz and Ranzato 2017)."""
    rows = _learned_rows(matrix)
    return _mean(rows[-1][: len(rows)]) if rows else math.nan


def backward_transfer(matrix: AccuracyMatrix) -> float:
    """``mean over j < L-1 of (a[L-1][j] - a[j][j])``: BWT of Lopez-Paz and Ranzato 2017.

    The change of each earlier task's accuracy since it was learned; negative where later learning harmed it.
    Avalanche's StreamBWT; its StreamForgetting is the same with the sign turned.
    """
    rows = _learned_rows(matrix)
    return _mean([rows[-1][j] - rows[j][j] for j in range(len(rows) - 1)])


def forward_transfer(matrix: AccuracyMatrix, chance: float) -> float:
    """``mean over 0 < j < L of (a[j-1][j] - chance)``: FWT of Lopez-Paz and Ranzato 2017.

    The effect of the tasks before it on each task not yet learned. Both they and Avalanche's StreamForwardTransfer
    subtract the accuracy of the untrained network on task j, a random number; ``chance`` (0 to 1), which is 1 / number
    of classes, is its expectation. Missing values above the diagonal (never evaluated) do not count.
    """
    rows = _learned_rows(matrix)
    before = [rows[j - 1][j] for j in range(1, len(rows)) if j < len(rows[j - 1])]
    return _mean([value - chance for value in before if not math.isnan(value)])


def forgetting(matrix: AccuracyMatrix) -> float:
    """``mean over j < L-1 of (max over i < L-1 of a[i][j] - a[L-1][j])``.

    Chaudhry et al. 2018 ("Riemannian Walk"), F at the last task: the drop from the best that each earlier
    task ever was before the last one was learned. Missing values above the diagonal (never evaluated) do not
    count.
    """
    return _mean(task_forgetting(matrix))


def task_forgetting(matrix: AccuracyMatrix) -> list[float]:
    """The L-1 summands of `forgetting`, ``max over i < L-1 of a[i][j] - a[L-1][j]`` for each earlier task j.

    Avalanche's ExperienceForgetting is counted from ``a[j][j]`` instead, see `backward_transfer`.
    """
    rows = _learned_rows(matrix)
    return [
        max(row[j] for row in rows[:-1] if j < len(row) and not math.isnan(row[j])) - rows[-1][j]
        for j in range(len(rows) - 1)
    ]


def _learned_rows(matrix: AccuracyMatrix) -> list[list[float]]:
    """The filled rows at the top, None as nan.

    Raises:
        ValueError: a value outside [0, 1], or one missing on the diagonal.
    """
    rows = [[math.nan if value is None else float(value) for value in row] for row in matrix]
    learned = [row for row in rows if not all(math.isnan(value) for value in row)]
    for i, row in enumerate(learned):
        if row is not rows[i]:
            raise ValueError("accuracy matrix: expected empty rows only at the end, got one before a filled row")
        if len(row) <= i or math.isnan(row[i]):
            raise ValueError(f"accuracy matrix: expected a value for task {i} in row {i}, got {row}")
        if any(value < 0.0 or value > 1.0 for value in row):
            raise ValueError(f"accuracy matrix: expected accuracies from 0 to 1, got {row} in row {i}")
    return learned


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
