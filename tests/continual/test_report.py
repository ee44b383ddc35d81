"""What is written: valid, complete, whole or not at all."""

import json
import math
import os
import stat
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_kernels.continual import report
from engram_kernels.continual.training import TrainingResult

CONFIG = {"dataset": "own.npz", "scenario": "class", "method": "engram", "hidden": [32], "seed": 7}
KEYS = {
    "accuracy_matrix", "average_accuracy", "backward_transfer", "forgetting", "peak_memory_bytes",
    "step_milliseconds", "config",
}  # fmt: skip


def result_of(tasks, learned=None):
    """A run of so many tasks, stopped after ``learned``."""
    learned = tasks if learned is None else learned
    rows = [[0.9 - 0.05 * (i - j) if j <= i else 0.0 for j in range(tasks)] for i in range(learned)]
    matrix = [[min(1.0, max(0.0, value)) for value in row] for row in rows]
    return TrainingResult(
        accuracy_matrix=matrix + [[None] * tasks for _ in range(tasks - learned)],
        completed=learned == tasks,
        tasks_completed=learned,
        steps=100 * learned,
        step_milliseconds=1.5 if learned else math.nan,
        peak_memory_bytes=2**20,
        total_memory_bytes=2**28,
    )


@pytest.mark.parametrize(("tasks", "learned"), [(5, 5), (5, 2), (1, 1), (3, 0)])
def test_metrics_are_complete_and_valid_json(tmp_path, tasks, learned):
    result = result_of(tasks, learned)
    metrics = report.metrics_of(result, CONFIG)
    path = report.write_metrics(tmp_path, metrics)

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(path.read_text(), parse_constant=no_constants)
    assert read == metrics
    assert set(read) >= KEYS
    assert read["accuracy_matrix"] == result.accuracy_matrix
    assert read["completed"] is (tasks == learned)
    assert read["seed"] == 7
    assert (read["average_accuracy"] is None) == (learned == 0)
    assert (read["forgetting"] is None) == (learned < 2)
    assert read["forward_transfer"] is None, "it needs the accuracy of guessing"
    known = report.metrics_of(result, CONFIG, chance=0.25)["forward_transfer"]
    assert known == (None if learned < 2 else -0.25)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    report.write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_files_are_as_readable_as_any_other(tmp_path):
    report.write_atomically(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")}
    assert len(modes) == 1


@pytest.mark.parametrize(("tasks", "learned"), [(5, 5), (10, 10), (2, 1), (1, 1), (3, 0), (30, 30)])
def test_a_picture_of_any_run(tmp_path, tasks, learned):
    pytest.importorskip("matplotlib")
    path = report.write_picture(tmp_path, report.metrics_of(result_of(tasks, learned), CONFIG), chance=0.1)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(content[16:20], "big") > 800
    assert os.listdir(tmp_path) == ["report.png"]


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [
        ("mnist", "on mnist, class"),
        ("folder/own.npz", "on own, class"),
        (["mnist", "folder/own.npz"], "on mnist, own, class"),
        (["a.npz", "b.npz", "c.npz", "d.npz"], "on a and 3 more data sets, class"),
    ],
)
def test_the_title_names_the_data(dataset, wanted):
    assert wanted in report._title(report.metrics_of(result_of(2), {**CONFIG, "dataset": dataset}))


@given(st.lists(st.floats(0, 100), max_size=15).map(sorted))
def test_labels_are_spread_in_order_and_within_bounds(values):
    placed = report.spread(values, gap=5.0, lowest=0.0, highest=100.0)
    assert len(placed) == len(values)
    assert all(low + 5.0 <= high + 1e-9 for low, high in pairwise(placed))
    assert all(-1e-9 <= y <= 100 + 1e-9 for y in placed)
    if all(low + 5.0 <= high for low, high in pairwise(values)):
        assert placed == pytest.approx(values)


def test_the_table_shows_the_matrix():
    lines = report.table(result_of(3, 2).accuracy_matrix).splitlines()
    assert lines[0].split()[-5:] == ["task", "3", "average", "so", "far"]
    assert [line.split()[3:] for line in lines[1:]] == [
        ["90.0", "0.0", "0.0", "90.0"],
        ["85.0", "90.0", "0.0", "87.5"],
    ]


def test_the_table_marks_a_task_learned_in_part():
    lines = report.table(result_of(3, 2).accuracy_matrix, tasks_completed=1).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["after task 1", "in task 2"]


def test_the_table_of_many_tasks_fits_a_terminal():
    lines = report.table(result_of(40).accuracy_matrix).splitlines()
    assert len(lines) == 41
    assert max(map(len, lines)) <= 80


def test_summary_names_every_number():
    text = report.summary(result_of(3))
    for piece in (
        "average accuracy",
        "85.0 %",
        "backward transfer",
        "-7.5",
        "forgetting",
        "1.50 ms",
        "1 MiB above",
    ):
        assert piece in text


def test_mean_and_deviation_over_seeds():
    content = report.summarize_seeds([0, 1], [result_of(3), result_of(3)])
    assert content["average_accuracy"]["mean"] == pytest.approx(0.85)
    assert content["average_accuracy"]["deviation"] == pytest.approx(0.0)
    assert "average accuracy" in report.seeds_table(content)
    single = report.summarize_seeds([0], [result_of(1)])
    assert single["forgetting"] == {"mean": None, "deviation": None, "values": [None]}
    assert "-" in report.seeds_table(single)
    json.dumps(single, allow_nan=False)
