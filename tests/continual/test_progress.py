"""Progress for a person, and for another process, which sees what this one sees."""

import io
import json

import pytest

from engram_kernels.continual.progress import BarProgress, JsonProgress, LineProgress, ProgressState, replay


def run_of(progress):
    """A run of three tasks that goes on after the first and is interrupted in the third."""
    progress.begin(3, 30)
    progress.resumed(1, 10)
    for _ in range(10):
        progress.step(1, 0.5, None)
    progress.learned(1, [0.5, 0.75, 0.0])
    progress.step(2, None, 0.25)
    progress.interrupted()
    progress.end()


class Calls(ProgressState):
    """Keeps every call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name in ("begin", "resumed", "step", "learned", "interrupted", "end"):
            return lambda **arguments: (self.calls.append((name, arguments)), found(**arguments))
        return found


@pytest.mark.parametrize("fast", [True, False])
def test_another_process_gets_the_same_calls(monkeypatch, fast):
    clock = [0.0]

    def now():
        clock[0] += 0.0 if fast else 1.0
        return clock[0]

    monkeypatch.setattr("time.perf_counter", now)
    stream, there = io.StringIO(), Calls()
    run_of(JsonProgress(stream))
    lines = stream.getvalue().splitlines()
    events = [replay(line, there)["event"] for line in lines]
    steps = ["step"] if fast else ["step"] * 10
    assert events == ["begin", "resumed", *steps, "learned", "step", "interrupted", "end"]
    here = ProgressState()
    run_of(here)
    assert [name for name, _ in there.calls] == [
        "begin", "resumed", *["step"] * 10, "learned", "step", "interrupted", "end",
    ]  # fmt: skip
    assert there.calls[0][1] == {"tasks": 3, "steps": 30}
    assert there.calls[12][1] == {"task": 1, "accuracies": [0.5, 0.75, 0.0]}
    for name in ("tasks", "tasks_learned", "steps", "steps_taken", "steps_before", "accuracy"):
        assert getattr(there, name) == getattr(here, name)
    assert (here.tasks_learned, here.steps_taken, here.steps_before, here.accuracy) == (2, 21, 10, 0.625)


def test_a_failure_is_reported_with_its_message():
    stream = io.StringIO()
    JsonProgress(stream).failed("loss: expected a finite number, got nan")
    fields = replay(stream.getvalue(), ProgressState())
    assert fields == {"event": "failed", "message": "loss: expected a finite number, got nan"}


@pytest.mark.parametrize("line", ["", "engram-kernels: error: task 1/2", "[]", "{}", json.dumps({"event": "fly"})])
def test_other_lines_are_no_reports(line):
    with pytest.raises(ValueError):
        replay(line, ProgressState())


def test_a_reader_that_has_gone_is_no_error():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    run_of(JsonProgress(Gone()))


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


def test_without_the_other_tasks_there_is_no_average():
    stream = io.StringIO()
    lines = LineProgress(stream)
    lines.begin(3, 30)
    lines.learned(1, [None, 0.75, None])
    assert lines.accuracy is None
    assert "accuracy on this task 75.0%; " in stream.getvalue()
