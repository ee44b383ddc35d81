"""The metrics against their formulas, on matrices worked out by hand and on random ones."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_kernels.continual.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    task_forgetting,
)

MATRIX = [
    [0.9, 0.1, 0.0],
    [0.5, 0.8, 0.2],
    [0.6, 0.4, 1.0],
]


def test_worked_example():
    assert average_accuracy(MATRIX) == pytest.approx((0.6 + 0.4 + 1.0) / 3)
    assert backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 2)
    assert forgetting(MATRIX) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)
    assert task_forgetting(MATRIX) == pytest.approx([0.9 - 0.6, 0.8 - 0.4])
    assert forward_transfer(MATRIX, chance=0.1) == pytest.approx(((0.1 - 0.1) + (0.2 - 0.1)) / 2)


def test_forgetting_counts_from_the_best_ever_and_backward_transfer_from_the_diagonal():
    """Task 0 got better after it was learned (0.5 -> 0.9) and then worse (0.7)."""
    matrix = [[0.5, 0.0, 0.0], [0.9, 0.6, 0.0], [0.7, 0.6, 0.8]]
    assert backward_transfer(matrix) == pytest.approx((0.2 + 0.0) / 2)
    assert forgetting(matrix) == pytest.approx((0.2 + 0.0) / 2)
    matrix[2][0] = 0.4
    assert backward_transfer(matrix) == pytest.approx(-0.05)
    assert forgetting(matrix) == pytest.approx(0.25)


@given(st.integers(2, 8), st.randoms(use_true_random=False))
def test_the_formulas(tasks, random):
    a = np.array([[random.random() for _ in range(tasks)] for _ in range(tasks)])
    matrix = a.tolist()
    last = tasks - 1
    assert average_accuracy(matrix) == pytest.approx(a[last].mean())
    assert backward_transfer(matrix) == pytest.approx((a[last, :last] - a.diagonal()[:last]).mean())
    assert forgetting(matrix) == pytest.approx((a[:last, :last].max(axis=0) - a[last, :last]).mean())
    assert task_forgetting(matrix) == pytest.approx(list(a[:last, :last].max(axis=0) - a[last, :last]))
    chance = random.random()
    assert forward_transfer(matrix, chance) == pytest.approx((a.diagonal(1) - chance).mean())


@given(st.integers(1, 7), st.sampled_from([None, math.nan]), st.randoms(use_true_random=False))
def test_an_interrupted_run_is_judged_on_the_tasks_it_learned(learned, empty, random):
    tasks = 8
    whole = [[random.random() for _ in range(tasks)] for _ in range(learned)]
    partial = whole + [[empty] * tasks for _ in range(tasks - learned)]
    block = [row[:learned] for row in whole]
    for metric in (average_accuracy, backward_transfer, forgetting, lambda matrix: forward_transfer(matrix, 0.1)):
        assert metric(partial) == pytest.approx(metric(block), nan_ok=True)
    assert len(task_forgetting(partial)) == learned - 1


def test_undefined_is_nan():
    for metric in (average_accuracy, backward_transfer, forgetting):
        assert math.isnan(metric([]))
        assert math.isnan(metric([[None, None], [None, None]]))
    assert average_accuracy([[0.5]]) == 0.5
    assert math.isnan(backward_transfer([[0.5]]))
    assert math.isnan(forgetting([[0.5]]))
    assert task_forgetting([]) == task_forgetting([[0.5]]) == []
    for matrix in ([], [[0.5]], [[0.5, None], [0.5, 0.5]], [[0.5], [0.5, 0.5]]):
        assert math.isnan(forward_transfer(matrix, 0.1))


def test_values_above_the_diagonal_may_be_missing():
    matrix = [[0.9, None], [0.7, 0.8]]
    assert average_accuracy(matrix) == pytest.approx(0.75)
    assert backward_transfer(matrix) == pytest.approx(-0.2)
    assert forgetting(matrix) == pytest.approx(0.2)
    assert forward_transfer([[0.9, None, 0.1], [0.7, 0.8, 0.6], [0.7, 0.8, 0.9]], 0.5) == pytest.approx(0.1)


def test_a_long_stream_is_judged_by_its_diagonal_and_its_last_row():
    matrix = [[0.9, None, None], [None, 0.8, None], [0.5, 0.4, 0.9]]
    assert average_accuracy(matrix) == pytest.approx(0.6)
    assert backward_transfer(matrix) == pytest.approx(-0.4)
    assert forgetting(matrix) == pytest.approx(0.4)
    for metric in (average_accuracy, backward_transfer, forgetting):
        assert math.isnan(metric(matrix[:2])), "what needs a missing value is not defined"


@pytest.mark.parametrize(
    ("matrix", "wanted"),
    [
        ([[0.5, 0.5], [0.5, None]], "a value for task 1 in row 1"),
        ([[None, None], [0.5, 0.5]], "empty rows only at the end"),
        ([[0.5, 0.5], [0.5]], "a value for task 1 in row 1"),
        ([[50.0]], "accuracies from 0 to 1"),
    ],
)
def test_a_matrix_with_gaps_or_percentages_is_refused(matrix, wanted):
    with pytest.raises(ValueError, match=wanted):
        average_accuracy(matrix)
