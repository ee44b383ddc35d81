"""What a run says is what another process reads of it."""

import io

import pytest

from engram_kernels.continual.progress import BarProgress, LineProgress, Told, told


def test_lines_are_read_as_they_were_meant():
    stream = io.StringIO()
    lines = LineProgress(stream)
    lines.begin(3, 30)
    lines.resumed(1, 10)
    for _ in range(10):
        lines.step(1, None, None)
    lines.learned(1, [0.5, 0.75, 0.0])
    lines.interrupted()
    lines.end()
    resumed, learned, interrupted = map(told, stream.getvalue().splitlines(keepends=True))
    assert resumed == Told(1, 3)
    assert learned == Told(2, 3, pytest.approx(0.625), 0.0)
    assert interrupted is None


@pytest.mark.parametrize("line", ["", "engram-kernels: error: task 1/2", "Traceback", "resumed after task 1/2 or not"])
def test_other_lines_tell_nothing(line):
    assert told(line) is None


def test_the_remaining_time_follows_from_the_steps_of_this_process(monkeypatch):
    stream = io.StringIO()
    clock = iter([0.0, 0.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    lines = LineProgress(stream)
    lines.begin(3, 30)
    lines.resumed(1, 20)
    for _ in range(2):
        lines.step(2, None, None)
    lines.learned(2, [1.0, 1.0, 1.0])
    assert "8 s, 32 s remain" in stream.getvalue()


def test_a_bar_goes_on_where_the_run_was():
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    bar = BarProgress(stream)
    bar.begin(3, 30)
    bar.resumed(1, 10)
    for _ in range(4):
        bar.step(1, 0.5, 0.75)
    bar._bar.refresh()
    bar.end()
    shown = stream.getvalue()
    assert "resumed after task 1/3" in shown
    assert "task 2/3" in shown
    assert "14/30" in shown


def test_a_line_without_the_other_tasks_is_read_too():
    stream = io.StringIO()
    lines = LineProgress(stream)
    lines.begin(3, 30)
    lines.learned(1, [None, 0.75, None])
    assert told(stream.getvalue()).accuracy is None
    assert told(stream.getvalue()).learned == 2
