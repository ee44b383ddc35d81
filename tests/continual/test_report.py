"""What is written: valid, complete, whole or not at all."""

import json
import math

import pytest

from engram_kernels.continual import report
from engram_kernels.continual.training import TrainingResult
from engram_kernels.files import DamagedFileError

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


def test_what_is_written_is_read(tmp_path):
    assert report.read_metrics(tmp_path) is None
    for tasks, learned in ((5, 5), (5, 2), (1, 1), (3, 0)):
        metrics = report.metrics_of(result_of(tasks, learned), CONFIG, chance=0.1)
        report.write_metrics(tmp_path, metrics)
        assert report.read_metrics(tmp_path) == metrics


def test_a_bit_flipped_anywhere_gives_numbers_that_fit_or_a_line_that_names_the_file(tmp_path):
    metrics = report.metrics_of(result_of(3), {**CONFIG, "tasks": 3}, chance=0.1)
    path = report.write_metrics(tmp_path, metrics)
    content, refused = path.read_bytes(), 0
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            read = report.read_metrics(tmp_path)
        except DamagedFileError as error:
            assert str(path) in str(error)
            assert "without --resume training begins anew" in str(error)
            assert "\n" not in str(error)
            refused += 1
        else:
            for name in ("average_accuracy", "backward_transfer", "forgetting"):
                assert read[name] == metrics[name]
            report.summary(report.result_of(read))
    assert refused > 4 * len(content)


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy_matrix": "none"},
        {"accuracy_matrix": []},
        {"accuracy_matrix": [[0.5, 0.5], [0.5]]},
        {"accuracy_matrix": [["0.5"]]},
        {"accuracy_matrix": [[1.5]]},
        {"accuracy_matrix": [[True]]},
        {"config": []},
        {"config": {"tasks": 3}},
        {"completed": 1},
        {"steps": None},
        {"steps": 1.5},
        {"versions": "2.13"},
        {"average_accuracy": 0.123},
        {"train_seconds": "1"},
    ],
    ids=str,
)
def test_metrics_of_other_kinds_are_refused(tmp_path, changes):
    report.write_metrics(tmp_path, {**report.metrics_of(result_of(2), CONFIG), **changes})
    name = "accuracy.matrix" if "tasks" in str(changes) else next(iter(changes)).replace("_", ".")
    with pytest.raises(DamagedFileError, match=rf"metrics: expected .* got .*metrics\.json \(.*{name}"):
        report.read_metrics(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b"[" * 10**5, b"\xff\xfe", b'{"completed": true}'])
def test_what_is_no_metrics_is_refused(tmp_path, content):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"metrics: expected the metrics\.json of a run, got .*metrics\.json"):
        report.read_metrics(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5000])
def test_numbers_that_json_lacks_are_refused(tmp_path, number):
    path = report.write_metrics(tmp_path, report.metrics_of(result_of(2), CONFIG))
    path.write_text(path.read_text().replace('"train_seconds": 0.0', f'"train_seconds": {number}'))
    with pytest.raises(DamagedFileError, match=r"metrics\.json"):
        report.read_metrics(tmp_path)


def test_a_file_larger_than_any_metrics_is_not_read(tmp_path, monkeypatch):
    report.write_metrics(tmp_path, report.metrics_of(result_of(2), CONFIG))
    monkeypatch.setattr(report, "_LARGEST_METRICS_BYTES", 100)
    with pytest.raises(DamagedFileError, match=r"metrics\.json has more than 100 bytes"):
        report.read_metrics(tmp_path)


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
