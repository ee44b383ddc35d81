"""Methods side by side: every run a process of its own, so that its memory and its time are its own.

A comparison leaves ``compare.json`` and ``report.html`` (see `html`), written anew after every run, and below them each
run's own folder. A complete run is kept; an interrupted one goes on (see `checkpoint`).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import platform
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TextIO

from ..files import write_atomically
from . import html, report
from .checkpoint import Checkpoint, OtherOptionsError, check_same_options, plain
from .extras import MissingExtraError
from .folders import check_free, numbered
from .progress import ProgressState, replay, step_bar
from .streams import cells, fitted, padded, readable

COMPARISON_FILE = "compare.json"
PAGE_FILE = "report.html"

# A run is of this package, wherever it lies, and of no module that happens to lie in the current folder, which
# ``python -m`` and ``python -c`` would look in first.
_LAUNCHER = """
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
from importlib.util import module_from_spec, spec_from_file_location
folder = sys.argv.pop(1)
spec = spec_from_file_location("engram_kernels", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["engram_kernels"] = package = module_from_spec(spec)
spec.loader.exec_module(package)
from engram_kernels.cli import train_for_comparison
sys.exit(train_for_comparison(sys.argv[1:]))
"""
_TRAIN = (sys.executable, "-c", _LAUNCHER, str(Path(__file__).parents[1]))
_EXIT_INTERRUPTED = 130
_EXIT_ORPHANED = 137
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_KEPT_LINES = 20  # of a failed process's stderr


@dataclass
class Run:
    """One method with one seed.

    Attributes:
        label: of the method.
        seed: of the run.
        folder: where its process writes.
        arguments: of ``engram-kernels train``, but for seed and folder.
        config: every option that its numbers follow from, as in ``metrics.json``.
        threads: CPU threads; None leaves them to torch.
        status: ``waiting``, ``running``, ``complete``, ``interrupted`` or ``failed``.
        kept: whether it was complete before.
        error: why it failed, in one line.
        output: the last lines of its process's stderr.
        metrics: the content of its ``metrics.json``, if complete or interrupted.
        progress: the state that its process reported last.
    """

    label: str
    seed: int
    folder: Path
    arguments: list[str]
    config: dict[str, Any]
    threads: int | None = None
    status: str = "waiting"
    kept: bool = False
    error: str = ""
    output: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    metrics: dict[str, Any] | None = None
    progress: ProgressState = field(default_factory=ProgressState)
    started: float = 0.0
    process: subprocess.Popen[str] | None = None

    @property
    def name(self) -> str:
        """Label and seed."""
        return f"{self.label}, seed {self.seed}"

    @property
    def seconds(self) -> float:
        """Since its process began."""
        return time.monotonic() - self.started

    def keep(self) -> None:
        """Takes over the numbers that an earlier comparison with the same options left complete."""
        with contextlib.suppress(ValueError, OSError):
            metrics = self._read()
            if metrics is not None and metrics["completed"] and self.threads in (None, metrics["threads"]):
                self.metrics, self.status, self.kept = metrics, "complete", True

    def _read(self) -> dict[str, Any] | None:
        metrics = report.read_metrics(self.folder)
        if metrics is not None:
            check_same_options(metrics["config"], plain(self.config), self.folder)
        return metrics

    def start(self, put: Callable[[str, str], None]) -> None:
        """Starts its process, which goes on from a checkpoint with the same options.

        ``put`` gets, from other threads, ``("report", line)`` for every line of the process's stdout (see `replay`),
        ``("text", line)`` for one of its stderr, and at last ``("end", "")``.
        """
        resume = False
        with contextlib.suppress(ValueError, OSError):  # damaged or of other options: it begins anew
            resume = Checkpoint(self.folder, self.config).tasks_completed() is not None
        command = [*_TRAIN, *self.command()]
        self.started, self.status = time.monotonic(), "running"
        process = self.process = subprocess.Popen(
            [*command, "--resume"] if resume else command,
            stdin=subprocess.PIPE,  # open as long as this process lives, see `end_with_parent`
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            # Ctrl-C reaches this process alone, which forwards it: twice would mean to skip the evaluation.
            start_new_session=True,
        )

        def read(stream: IO[str], kind: str) -> None:
            with stream:
                for line in stream:
                    put(kind, line)

        assert process.stdout is not None and process.stderr is not None
        reports = threading.Thread(target=read, args=(process.stdout, "report"), daemon=True)
        errors = process.stderr

        def read_all() -> None:
            reports.start()
            read(errors, "text")
            reports.join()
            put("end", "")

        threading.Thread(target=read_all, daemon=True).start()

    def report(self, line: str) -> str | None:
        """Takes a report of its process; returns the kind of report, None for a line that is none."""
        try:
            fields = replay(line, self.progress)
        except (ValueError, TypeError, KeyError):
            self.output.append(line)
            return None
        if fields["event"] == "failed":
            self.error = str(fields["message"])
        return str(fields["event"])

    def command(self) -> list[str]:
        """The arguments of ``engram-kernels train``."""
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return [*self.arguments, *threads, "--seed", str(self.seed), "--output", str(self.folder)]

    def end(self, interrupted: bool) -> None:
        """Takes the results of its process, which has closed its streams."""
        assert self.process is not None and self.process.stdin is not None
        code = self.process.wait()
        self.process.stdin.close()
        self.status = {0: "complete", _EXIT_INTERRUPTED: "interrupted"}.get(code, "failed")
        if interrupted and code < 0:
            self.status = "interrupted"
        if self.status == "complete" or code == _EXIT_INTERRUPTED:
            try:
                self.metrics = self._read()
            except (ValueError, OSError) as error:  # of an earlier run perhaps, if this one wrote nothing
                if self.status == "complete":
                    self.status, self.error = "failed", str(error)
        elif code < 0 and self.status == "failed":
            self.error = f"killed by signal {-code}"
            with contextlib.suppress(ValueError):
                self.error = f"killed by {signal.Signals(-code).name}"
        elif self.status == "failed" and not self.error:  # a fault of the program: the last line of its traceback
            self.error = next((line.strip() for line in reversed(self.output) if line.strip()), "it gave no reason")

    def send(self, number: int) -> None:
        """Sends its process a signal, if it still runs."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


def run_all(runs: Sequence[Run], jobs: int, display: Display, changed: Callable[[], object]) -> bool:
    """Runs all that are not complete, ``jobs`` processes at a time; a failure stops no other run.

    The first Ctrl-C is forwarded: the running ones write their results so far. The second one kills.

    Args:
        runs: in the order to run them.
        jobs: processes at once, at least 1.
        display: shows the progress.
        changed: called whenever a run is over.

    Returns:
        False if it was interrupted.
    """
    events: queue.SimpleQueue[tuple[Run, str, str] | None] = queue.SimpleQueue()  # None: interrupted
    waiting, running = deque[Run](), list[Run]()
    interrupts = 0
    display.begin(runs)
    for run in runs:
        run.keep()
        if run.kept:
            display.over(run)
        else:
            waiting.append(run)
    with _interrupts(lambda: events.put(None)):
        try:
            while running or (waiting and not interrupts):
                while waiting and len(running) < jobs and not interrupts:
                    run = waiting.popleft()
                    run.start(lambda kind, line, run=run: events.put((run, kind, line)))  # type: ignore[misc]
                    running.append(run)
                display.redraw(running)
                try:
                    event = events.get(timeout=0.5)
                except queue.Empty:
                    continue
                if event is None:
                    interrupts += 1
                    display.interrupted()
                    for run in running:
                        run.send(signal.SIGINT if interrupts == 1 else signal.SIGKILL)
                    continue
                run, kind, line = event
                if kind == "end":
                    run.end(interrupts > 0)
                    running.remove(run)
                    display.over(run)
                    changed()
                elif kind == "text":
                    run.output.append(line)
                elif run.report(line) in ("resumed", "learned"):
                    display.learned(run)
        finally:
            for run in running:  # only if something here went wrong
                run.send(signal.SIGKILL)
            display.end()
    return not interrupts


@contextlib.contextmanager
def _interrupts(put: Callable[[], None]) -> Iterator[None]:
    """Has Ctrl-C, and other signals that ask to end, call ``put``; an exception could come between any two lines."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda *_: put()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Display:
    """Progress of a comparison, a line for every event: for logs.

    Args:
        stream: by default stderr.
        quiet: only failures and interrupts are shown.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet

    def begin(self, runs: Sequence[Run]) -> None:
        """All runs there are."""

    def learned(self, run: Run) -> None:
        """A run has learned a task, or goes on after one."""
        self._write(f"{run.name}: {_tasks(run.progress)}; {_time(run)}")

    def over(self, run: Run) -> None:
        """A run has come to its end, or was complete before."""
        if run.status == "failed":
            self._write(f"{run.name}: failed: {run.error}", always=True)
        elif run.status == "interrupted" or run.metrics is None:
            self._write(f"{run.name}: interrupted", always=True)
        else:
            accuracy = run.metrics["average_accuracy"]
            result = "" if accuracy is None else f", average accuracy {accuracy:.1%}"
            when = "complete from before" if run.kept else f"complete in {_duration(run.seconds)}"
            self._write(f"{run.name}: {when}{result}")

    def interrupted(self) -> None:
        """The comparison was asked to stop."""
        self._write("interrupted: waiting for the runs to write what they have learned (interrupt again to kill)", True)

    def redraw(self, running: Sequence[Run]) -> None:
        """Called several times a second."""

    def end(self) -> None:
        """Nothing more will be shown."""

    def _write(self, line: str, always: bool = False) -> None:
        if always or not self._quiet:
            print(line, file=self._stream, flush=True)


class BarDisplay(Display):
    """For terminals: a tqdm bar for every run in progress and one over all; the lines of ended runs stay above.

    Raises:
        MissingExtraError: without tqdm.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._all = step_bar(self._stream, None, unit="run")
        self._bars: dict[str, Any] = {}

    def begin(self, runs: Sequence[Run]) -> None:
        """Draws the bar over all runs."""
        self._all.reset(total=len(runs))
        self._all.set_description("runs")

    def learned(self, run: Run) -> None:
        """The bar shows it."""

    def redraw(self, running: Sequence[Run]) -> None:
        """Draws the bars."""
        for run in running:
            if run.name not in self._bars:
                self._bars[run.name] = step_bar(self._stream, None)
                self._bars[run.name].set_description(run.name, refresh=False)
            bar = self._bars[run.name]
            bar.total, bar.initial = run.progress.steps or None, run.progress.steps_before
            bar.n = run.progress.steps_taken
            bar.set_postfix_str(_tasks(run.progress) if run.progress.tasks else "starting")  # which draws it

    def over(self, run: Run) -> None:
        """Takes the run's bar away and writes its line."""
        if (bar := self._bars.pop(run.name, None)) is not None:
            bar.close()
        super().over(run)
        self._all.update()
        self._all.refresh()

    def end(self) -> None:
        """Takes all bars away."""
        for bar in (*self._bars.values(), self._all):
            bar.close()

    def _write(self, line: str, always: bool = False) -> None:
        self._all.write(line, file=self._stream)


def default_display(quiet: bool = False) -> Display:
    """Bars on a terminal, lines elsewhere or without tqdm."""
    if not quiet and sys.stderr.isatty():
        with contextlib.suppress(MissingExtraError):
            return BarDisplay()
    return Display(quiet=quiet)


def content_of(runs: Sequence[Run], about: dict[str, Any]) -> dict[str, Any]:
    """The content of ``compare.json``.

    ``about`` (data set, seeds, command), and ``methods``: for each its label, its ``summary`` (mean and
    deviation over the complete seeds of average_accuracy, backward_transfer, forgetting, step_milliseconds,
    peak_memory_bytes) and its ``runs`` (seed, status, error, command, metrics).
    """
    methods = []
    for label, group in itertools.groupby(runs, key=lambda run: run.label):
        members = list(group)
        complete = [run.metrics for run in members if run.status == "complete" and run.metrics is not None]
        summary = {
            name: report.mean_and_deviation([metrics[name] for metrics in complete if metrics[name] is not None])
            for name in html.SUMMARIZED
        }
        methods.append(
            {
                "label": label,
                "config": plain(
                    {name: value for name, value in members[0].config.items() if name not in ("seed", "data_dir")}
                ),
                "summary": summary,
                "runs": [
                    {
                        "seed": run.seed,
                        "status": run.status,
                        "error": run.error,
                        "output": "".join(run.output) if run.status == "failed" else "",
                        "command": readable(shlex.join(["engram-kernels", "train", *run.command()])),
                        "metrics": run.metrics,
                    }
                    for run in members
                ],
            }
        )
    about = dict(about)
    return {**about, "environment": _environment(runs, about.pop("processor", "unknown")), "methods": methods}


def _environment(runs: Sequence[Run], processor: str) -> dict[str, str]:
    """The machine and versions of the runs; values that differ between them are listed."""
    known = [run.metrics for run in runs if run.metrics is not None]

    def all_of(values: Iterable[Any]) -> str:
        return " or ".join(map(str, dict.fromkeys(values))) or "not known yet"

    names = dict.fromkeys(name for metrics in known for name in metrics["versions"])
    return {
        "processor": processor,
        "instruction set": all_of(metrics["isa"] for metrics in known),
        "threads per run": all_of(metrics["threads"] for metrics in known),
        "system": platform.platform(),
        **{name: all_of(metrics["versions"].get(name) for metrics in known) for name in names},
    }


def write(directory: Path, content: dict[str, Any]) -> list[Path]:
    """Writes both files into a directory that exists; returns their paths."""
    page = directory / PAGE_FILE
    write_atomically(page, html.page(content).encode("utf-8", "backslashreplace"))
    return [page, report.write_metrics(directory, content, COMPARISON_FILE)]


def folder_names(labels: Sequence[str]) -> list[str]:
    """A name that any file system takes for each label, all different."""
    names: list[str] = []
    for label in labels:
        base = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")[:60] or "method"
        names.append(next(path.name for path in numbered(Path(base)) if path.name not in names))
    return names


def folders(output: Path, configs: dict[str, dict[int, dict[str, Any]]]) -> list[Path]:
    """The folder of each label's runs below ``output``, which has one of them for each seed.

    One that holds a run with other options is left as it is: the label gets the next free number.

    Args:
        output: of the comparison.
        configs: by label and seed, every option that the numbers of a run follow from.
    """
    chosen: list[Path] = []
    for config_of, name in zip(configs.values(), folder_names(list(configs)), strict=True):
        for path in numbered(output / name):
            if path in chosen:
                continue
            try:
                for seed, config in config_of.items():
                    check_free(path / f"seed{seed}", config)
            except OtherOptionsError:
                continue
            chosen.append(path)
            break
    return chosen


def end_with_parent() -> None:
    """Has this process, which :meth:`Run.start` began, end when the one that began it does, however that ends.

    Its standard input is a pipe that nobody writes to: it comes to its end with the parent. On Linux the system sends
    a signal besides, at once and whatever this process is doing.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os._exit(_EXIT_ORPHANED)

    threading.Thread(target=watch, daemon=True).start()


def table(content: dict[str, Any], width: int | None = None) -> str:
    """The summary for the terminal, best accuracy first; as many of its columns as fit ``width`` of the terminal's."""
    names = ("accuracy in %", "backward", "forgetting", "ms/step", "peak MiB")
    rows = []
    for method in html.ranked(content["methods"]):
        means = [method["summary"][name]["mean"] for name in html.SUMMARIZED]
        deviation = method["summary"]["average_accuracy"]["deviation"]
        scales, forms = (100, 100, 100, 1, 2**-20), (".1f", "+.1f", ".1f", ".2f", ".1f")
        values = [
            "-" if mean is None else format(scale * mean, form)
            for mean, scale, form in zip(means, scales, forms, strict=True)
        ]
        if deviation is not None:
            values[0] += f" ± {100 * deviation:.1f}"
        rows.append((method["label"], values))
    label_width = max(len("method"), *(cells(label) for label, _ in rows))
    columns = len(names)
    if width is not None:
        while columns > 1 and label_width + sum(len(name) + 2 for name in names[:columns]) > width:
            columns -= 1
        label_width = min(label_width, max(len("method"), width - len(names[0]) - 2))
    return "\n".join(
        padded(fitted(label, label_width), label_width)
        + "".join(f"  {value:>{len(name)}}" for value, name in zip(values[:columns], names, strict=False))
        for label, values in [("method", names), *rows]
    )


def _tasks(progress: ProgressState) -> str:
    accuracy = "" if progress.accuracy is None else f", {progress.accuracy:.1%} on them"
    return f"{progress.tasks_learned} of {progress.tasks} tasks{accuracy}"


def _time(run: Run) -> str:
    if run.progress.tasks_learned == run.progress.tasks:
        return f"{_duration(run.seconds)}, writing its results"
    if run.progress.steps_taken == run.progress.steps_before:  # it has learned nothing yet
        return _duration(run.seconds)
    return f"{_duration(run.seconds)}, {_duration(run.progress.remaining_seconds)} remain"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
