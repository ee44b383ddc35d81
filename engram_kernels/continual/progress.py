"""How a run tells a person where it is."""

from __future__ import annotations

import re
import sys
import time
from typing import Any, NamedTuple, Protocol, TextIO

from .extras import MissingExtraError, require


class Progress(Protocol):
    """What the training loop reports, in this order: begin, [resumed,] (step..., learned)..., [interrupted,] end."""

    def begin(self, tasks: int, steps: int) -> None:
        """Training starts: so many tasks, so many steps altogether."""

    def resumed(self, tasks: int, steps: int) -> None:
        """So many tasks were learned, in so many steps, before this process."""

    def step(self, task: int, loss: float | None, accuracy: float | None) -> None:
        """One step was taken on ``task``; loss and accuracy are those of its batch, None where not computed."""

    def learned(self, task: int, accuracies: list[float | None]) -> None:
        """``task`` is learned; ``accuracies`` are those on all tasks now, None where not evaluated."""

    def interrupted(self) -> None:
        """The user asked to stop; the state reached is being evaluated."""

    def end(self) -> None:
        """Nothing more will be reported."""


class NoProgress:
    """Says nothing."""

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


class LineProgress:
    """One line per task: for logs, where a bar that redraws itself would leave thousands of lines."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to ``stream``, by default stderr."""
        self._stream = sys.stderr if stream is None else stream
        self._begun = time.perf_counter()
        self._tasks = self._steps = self._done = self._before = 0

    def begin(self, tasks: int, steps: int) -> None:
        """Remember the extent."""
        self._tasks, self._steps, self._begun = tasks, steps, time.perf_counter()

    def resumed(self, tasks: int, steps: int) -> None:
        """Say so; the remaining time follows from the steps of this process."""
        self._done = self._before = steps
        self._write(f"resumed after task {tasks}/{self._tasks}")

    def step(self, task: int, loss: float | None, accuracy: float | None) -> None:
        """Count."""
        self._done += 1

    def learned(self, task: int, accuracies: list[float | None]) -> None:
        """Write the line."""
        seconds = time.perf_counter() - self._begun
        remaining = seconds / max(1, self._done - self._before) * (self._steps - self._done)
        so_far = [accuracy for accuracy in accuracies[: task + 1] if accuracy is not None]
        average = f", on the tasks so far {sum(so_far) / len(so_far):.1%}" if len(so_far) == task + 1 else ""
        self._write(
            f"task {task + 1}/{self._tasks} learned: accuracy on this task {accuracies[task]:.1%}{average}; "
            f"{seconds:.0f} s, {remaining:.0f} s remain"
        )

    def interrupted(self) -> None:
        """Say so."""
        self._write("interrupted: evaluating what was learned so far (interrupt again to skip)")

    def end(self) -> None:
        """Nothing to close."""

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class Told(NamedTuple):
    """What a line of :class:`LineProgress` says: tasks learned of all; the rest None where it does not say."""

    learned: int
    tasks: int
    accuracy: float | None = None  # on the tasks so far, 0 to 1
    remaining_seconds: float | None = None


_TOLD = re.compile(
    r"task (?P<learned>\d+)/(?P<tasks>\d+) learned: accuracy on this task [\d.]+%"
    r"(, on the tasks so far (?P<percent>[\d.]+)%)?; \d+ s, (?P<left>\d+) s"
    r"|resumed after task (?P<resumed>\d+)/(?P<of>\d+)$"
)


def told(line: str) -> Told | None:
    """Reads a line that :class:`LineProgress` wrote in another process; None for every other line."""
    match = _TOLD.match(line.rstrip())
    if match is None:
        return None
    if match["resumed"]:
        return Told(int(match["resumed"]), int(match["of"]))
    accuracy = None if match["percent"] is None else float(match["percent"]) / 100
    return Told(int(match["learned"]), int(match["tasks"]), accuracy, float(match["left"]))


class BarProgress(LineProgress):
    """A tqdm bar over all steps with task, running accuracy and remaining time; a line above it per task.

    Raises:
        MissingExtraError: without tqdm.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """Draw on ``stream``, by default stderr."""
        super().__init__(stream)
        self._tqdm: Any = require("tqdm", "tqdm", "a progress bar").tqdm
        self._bar: Any = None
        self._running = RunningMean()

    def begin(self, tasks: int, steps: int) -> None:
        """Draw the empty bar."""
        super().begin(tasks, steps)
        self._bar = self._tqdm(total=steps, file=self._stream, unit="step", dynamic_ncols=True, leave=False)
        self._bar.set_description(f"task 1/{tasks}")

    def resumed(self, tasks: int, steps: int) -> None:
        """Begin where the earlier process ended."""
        super().resumed(tasks, steps)
        self._bar.initial = self._bar.n = steps  # tqdm reckons the rate from what comes after ``initial``
        self._bar.set_description(f"task {tasks + 1}/{self._tasks}")

    def step(self, task: int, loss: float | None, accuracy: float | None) -> None:
        """Advance the bar; tqdm limits how often it is drawn."""
        super().step(task, loss, accuracy)
        self._bar.set_description(f"task {task + 1}/{self._tasks}", refresh=False)
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
