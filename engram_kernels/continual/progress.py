"""The progress of a run: lines or a bar on a terminal, lines of JSON for another process."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any, Protocol, TextIO

from .extras import MissingExtraError, require


class Progress(Protocol):
    """Reports of the training loop, in this order: begin, [resumed,] (step..., learned)..., [interrupted,] end."""

    def begin(self, tasks: int, steps: int) -> None:
        """Training starts: so many tasks, so many steps altogether."""

    def resumed(self, tasks: int, steps: int) -> None:
        """So many tasks were learned, in so many steps, before this process."""

    def step(self, task: int, loss: float | None, accuracy: float | None) -> None:
        """One step was taken on ``task``; loss and accuracy are those of its batch, None where not computed."""

    def learned(self, task: int, accuracies: list[float | None]) -> None:
        """``task`` is learned; ``accuracies`` are those on all tasks now, None where not evaluated."""

    def interrupted(self) -> None:
        """Training was asked to stop; the state reached is being evaluated."""

    def end(self) -> None:
        """Nothing more will be reported."""


class NoProgress:
    """Progress that is not shown."""

    def begin(self, tasks: int, steps: int) -> None:
        """Ignored."""

    def resumed(self, tasks: int, steps: int) -> None:
        """Ignored."""

    def step(self, task: int, loss: float | None, accuracy: float | None) -> None:
        """Ignored."""

    def learned(self, task: int, accuracies: list[float | None]) -> None:
        """Ignored."""

    def interrupted(self) -> None:
        """Ignored."""

    def end(self) -> None:
        """Ignored."""


class ProgressState(NoProgress):
    """The state of a run that its progress adds up to.

    Attributes:
        tasks: of the run.
        tasks_learned: how many of them are learned.
        steps: of the run.
        steps_taken: how many of them are taken.
        steps_before: how many of those were taken by an earlier process.
        accuracy: mean accuracy (0 to 1) on the tasks learned so far; None before the first, and where not evaluated.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.tasks = self.tasks_learned = self.steps = self.steps_taken = self.steps_before = 0
        self.accuracy: float | None = None
        self._begun = self._reported = time.perf_counter()

    def begin(self, tasks: int, steps: int) -> None:
        """Sets the extent."""
        self.tasks, self.steps = tasks, steps
        self._begun = self._reported = time.perf_counter()

    def resumed(self, tasks: int, steps: int) -> None:
        """Sets the state; the remaining time follows from the steps of this process."""
        self.tasks_learned, self.steps_taken, self.steps_before = tasks, steps, steps

    def step(self, task: int, loss: float | None, accuracy: float | None) -> None:
        """Counts."""
        self.steps_taken += 1

    def learned(self, task: int, accuracies: list[float | None]) -> None:
        """Takes the accuracies."""
        self.tasks_learned, self._reported = task + 1, time.perf_counter()
        known = [accuracy for accuracy in accuracies[: task + 1] if accuracy is not None]
        self.accuracy = sum(known) / len(known) if len(known) == task + 1 else None

    @property
    def seconds(self) -> float:
        """From the beginning to the last task learned."""
        return self._reported - self._begun

    @property
    def remaining_seconds(self) -> float:
        """For the steps that were left at the last task learned."""
        return self.seconds / max(1, self.steps_taken - self.steps_before) * (self.steps - self.steps_taken)


class LineProgress(ProgressState):
    """One line per task: for logs, where a bar that redraws itself would leave thousands of lines."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to ``stream``, by default stderr."""
        super().__init__()
        self._stream = sys.stderr if stream is None else stream

    def resumed(self, tasks: int, steps: int) -> None:
        """Writes a line."""
        super().resumed(tasks, steps)
        self._write(f"resumed after task {tasks}/{self.tasks}")

    def learned(self, task: int, accuracies: list[float | None]) -> None:
        """Writes a line."""
        super().learned(task, accuracies)
        average = "" if self.accuracy is None else f", on the tasks so far {self.accuracy:.1%}"
        self._write(
            f"task {task + 1}/{self.tasks} learned: accuracy on this task {accuracies[task]:.1%}{average}; "
            f"{self.seconds:.0f} s, {self.remaining_seconds:.0f} s remain"
        )

    def interrupted(self) -> None:
        """Writes a line."""
        self._write("interrupted: evaluating what was learned so far (interrupt again to skip)")

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class JsonProgress:
    """One line of JSON for every report, for another process: ``{"event": "learned", "task": 0, ...}``.

    Steps that follow one another within a tenth of a second share a line, with their ``count``; loss and accuracy are
    those of the last. :func:`replay` reads the lines. A reader that has gone is no error.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to ``stream``."""
        self._stream = stream
        self._steps = 0
        self._step: dict[str, Any] = {}
        self._written = 0.0

    def begin(self, tasks: int, steps: int) -> None:
        """Writes a line."""
        self._write("begin", tasks=tasks, steps=steps)

    def resumed(self, tasks: int, steps: int) -> None:
        """Writes a line."""
        self._write("resumed", tasks=tasks, steps=steps)

    def step(self, task: int, loss: float | None, accuracy: float | None) -> None:
        """Writes a line, for several steps if they are fast."""
        self._steps += 1
        self._step = {"task": task, "loss": loss, "accuracy": accuracy}
        if time.perf_counter() >= self._written + 0.1:
            self._write_steps()

    def learned(self, task: int, accuracies: list[float | None]) -> None:
        """Writes a line."""
        self._write("learned", task=task, accuracies=accuracies)

    def interrupted(self) -> None:
        """Writes a line."""
        self._write("interrupted")

    def end(self) -> None:
        """Writes a line."""
        self._write("end")

    def failed(self, message: str) -> None:
        """Writes a line: the run ended with an error."""
        self._write("failed", message=message)

    def _write_steps(self) -> None:
        if self._steps:
            step, self._steps, self._written = {**self._step, "count": self._steps}, 0, time.perf_counter()
            self._write("step", **step)

    def _write(self, event: str, **fields: Any) -> None:
        self._write_steps()
        with contextlib.suppress(OSError):
            print(json.dumps({"event": event, **fields}), file=self._stream, flush=True)


def replay(line: str, progress: Progress) -> dict[str, Any]:
    """Hands a line of `JsonProgress` on to the progress of this process; returns its fields.

    Raises:
        ValueError: the line is no report.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or fields.get("event") not in _EVENTS:
        raise ValueError(f"line: expected a report of one of {', '.join(_EVENTS)}, got {line.strip()!r}")
    arguments = {name: fields[name] for name in _EVENTS[fields["event"]]}
    if fields["event"] == "failed":
        return fields
    for _ in range(fields.get("count", 1)):
        getattr(progress, fields["event"])(**arguments)
    return fields


_EVENTS: dict[str, tuple[str, ...]] = {
    "begin": ("tasks", "steps"),
    "resumed": ("tasks", "steps"),
    "step": ("task", "loss", "accuracy"),
    "learned": ("task", "accuracies"),
    "interrupted": (),
    "end": (),
    "failed": ("message",),
}


def step_bar(stream: TextIO, total: int | None, unit: str = "step") -> Any:
    """A tqdm bar, which is taken away when it is closed.

    Raises:
        MissingExtraError: without tqdm.
    """
    tqdm = require("tqdm", "tqdm", "a progress bar").tqdm
    return tqdm(total=total, file=stream, unit=unit, dynamic_ncols=True, leave=False)


class BarProgress(LineProgress):
    """A tqdm bar over all steps with task, running accuracy and remaining time; a line above it per task.

    Raises:
        MissingExtraError: without tqdm.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """Draw on ``stream``, by default stderr."""
        super().__init__(stream)
        require("tqdm", "tqdm", "a progress bar")
        self._bar: Any = None
        self._running = RunningMean()

    def begin(self, tasks: int, steps: int) -> None:
        """Draw the empty bar."""
        super().begin(tasks, steps)
        self._bar = step_bar(self._stream, steps)
        self._bar.set_description(f"task 1/{tasks}")

    def resumed(self, tasks: int, steps: int) -> None:
        """Begin where the earlier process ended."""
        super().resumed(tasks, steps)
        self._bar.initial = self._bar.n = steps  # tqdm reckons the rate from what comes after ``initial``
        self._bar.set_description(f"task {tasks + 1}/{self.tasks}")

    def step(self, task: int, loss: float | None, accuracy: float | None) -> None:
        """Advance the bar; tqdm limits how often it is drawn."""
        super().step(task, loss, accuracy)
        self._bar.set_description(f"task {task + 1}/{self.tasks}", refresh=False)
        if loss is not None and accuracy is not None:
            self._running.add(task, accuracy)
            self._bar.set_postfix_str(f"accuracy {self._running.value:.1%}, loss {loss:.3f}", refresh=False)
        self._bar.update()

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _write(self, line: str) -> None:
        if self._bar is None:
            super()._write(line)
        else:
            self._bar.write(line, file=self._stream)


class RunningMean:
    """Exponential mean over about the last 50 batches of the current task."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.value = 0.0
        self._task, self._weight = -1, 0.0

    def add(self, task: int, value: float) -> None:
        """Take in a batch; the first of another task starts anew."""
        if task != self._task:
            self._task, self._weight = task, 0.0
        self._weight = 0.98 * self._weight + 1.0
        self.value = value if self._weight == 1.0 else self.value + (value - self.value) / self._weight


def default_progress() -> Progress:
    """A bar on a terminal, lines elsewhere or without tqdm."""
    if sys.stderr.isatty():
        try:
            return BarProgress()
        except MissingExtraError:
            pass
    return LineProgress()
