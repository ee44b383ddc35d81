"""The results of a run: ``metrics.json``, and a table for the terminal. The picture is drawn by `plots`.

Files are written beside their place and renamed into it (see `files`), so that a reader never sees half of one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__, ops
from ..files import DamagedFileError, read_within, reason, write_atomically
from . import processes
from .checkpoint import plain
from .metrics import AccuracyMatrix, average_accuracy, backward_transfer, forgetting, forward_transfer
from .plots import percent
from .training import TrainingResult

METRICS_FILE = "metrics.json"

_LARGEST_METRICS_BYTES = 2**28  # a matrix of 3000 tasks
_NUMBER = (float, int, type(None))
_FIELDS: dict[str, tuple[type, ...]] = {
    "accuracy_matrix": (list,),
    "average_accuracy": _NUMBER,
    "backward_transfer": _NUMBER,
    "forgetting": _NUMBER,
    "forward_transfer": _NUMBER,
    "peak_memory_bytes": (int, type(None)),
    "step_milliseconds": _NUMBER,
    "config": (dict,),
    "completed": (bool,),
    "tasks_completed": (int,),
    "steps": (int,),
    "train_seconds": (float, int),
    "total_memory_bytes": (int, type(None)),
    "threads": (int,),
    "isa": (str,),
    "versions": (dict,),
}
_OF_MATRIX = {
    "average_accuracy": average_accuracy,
    "backward_transfer": backward_transfer,
    "forgetting": forgetting,
}

_TABLE_TASKS = 12


def metrics_of(result: TrainingResult, config: dict[str, Any], chance: float | None = None) -> dict[str, Any]:
    """The content of ``metrics.json``; undefined numbers are None there (JSON has no nan).

    accuracy_matrix, average_accuracy, backward_transfer, forgetting, forward_transfer (fractions, see `metrics`;
    the last needs ``chance``, the accuracy of guessing), peak_memory_bytes, step_milliseconds, config (every option
    of the run), and their context: completed, tasks_completed, steps, train_seconds,
    total_memory_bytes, seed, threads (of each process), processes, isa, versions.
    """
    matrix = result.accuracy_matrix
    return {
        "accuracy_matrix": [[_json_number(value) for value in row] for row in matrix],
        "average_accuracy": _json_number(average_accuracy(matrix)),
        "backward_transfer": _json_number(backward_transfer(matrix)),
        "forgetting": _json_number(forgetting(matrix)),
        "forward_transfer": None if chance is None else _json_number(forward_transfer(matrix, chance)),
        "peak_memory_bytes": result.peak_memory_bytes,
        "step_milliseconds": _json_number(result.step_milliseconds),
        "config": plain(config),
        "completed": result.completed,
        "tasks_completed": result.tasks_completed,
        "steps": result.steps,
        "train_seconds": result.train_seconds,
        "total_memory_bytes": result.total_memory_bytes,
        "seed": config.get("seed"),
        "threads": torch.get_num_threads(),
        "processes": processes.size(),
        "isa": ops.isa(),
        "versions": {
            "engram_kernels": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
    }


def write_metrics(directory: str | os.PathLike[str], metrics: dict[str, Any], name: str = METRICS_FILE) -> Path:
    """Write a dictionary as JSON into ``directory`` (which exists); returns the file's path."""
    path = Path(directory) / name
    write_atomically(path, (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
    return path


def read_metrics(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The metrics in a file of :func:`write_metrics`; None without the file.

    Raises:
        DamagedFileError: the file holds something else, or numbers that do not follow from its matrix.
        OSError: it can't be read.
    """
    path = Path(directory) / METRICS_FILE
    try:
        metrics = json.loads(read_within(path, _LARGEST_METRICS_BYTES), parse_constant=_no_constant)
        _check_metrics(metrics)
    except FileNotFoundError:
        return None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a file may hold anything, at any depth
        raise DamagedFileError(
            f"metrics: expected the {METRICS_FILE} of a run, got {path} ({type(error).__name__}: {reason(error)}); "
            "without --resume training begins anew"
        ) from None
    return dict(metrics)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_metrics(metrics: dict[str, Any]) -> None:
    """Raises any exception unless these are metrics as from :func:`metrics_of`."""
    for name, wanted in _FIELDS.items():
        if type(metrics[name]) not in wanted:
            raise TypeError(f"{name}: expected {' or '.join(kind.__name__ for kind in wanted)}, got {metrics[name]!r}")
        if type(metrics[name]) is float and not math.isfinite(metrics[name]):
            raise ValueError(f"{name}: expected a finite number")
    matrix = metrics["accuracy_matrix"]
    tasks = metrics["config"].get("tasks", len(matrix))
    if not matrix or any(type(row) is not list or len(row) != len(matrix) for row in matrix) or tasks != len(matrix):
        raise ValueError(f"accuracy_matrix: expected {tasks} rows of as many values")
    if any(type(value) not in _NUMBER for row in matrix for value in row):
        raise TypeError("accuracy_matrix: expected numbers")
    for name, metric in _OF_MATRIX.items():
        if metrics[name] != _json_number(metric(matrix)):
            raise ValueError(f"{name}: expected {metric(matrix)}, which follows from the matrix, got {metrics[name]}")


def result_of(metrics: dict[str, Any]) -> TrainingResult:
    """The result that :func:`metrics_of` was given, but for its ``data``, which are the saved model's."""
    names = [field.name for field in dataclasses.fields(TrainingResult) if field.name != "data"]
    values = {name: metrics[name] for name in names}
    if values["step_milliseconds"] is None:
        values["step_milliseconds"] = math.nan
    return TrainingResult(**values)


def table(matrix: AccuracyMatrix, tasks_completed: int | None = None, width: int | None = None) -> str:
    """The accuracy matrix in percent, a row after each task, a column for each task and their average so far.

    With more tasks than fit ``width`` columns (None: not a terminal), only the task just learned and the average. A row
    beyond ``tasks_completed`` is that of a task learned in part.
    """
    tasks = len(matrix)
    every = tasks <= _TABLE_TASKS and (width is None or 32 + 9 * tasks <= width)
    names = [f"task {j + 1}" for j in range(tasks)] if every else ["this task"]
    last = "average so far" if every or width is None or width >= 41 else "so far"
    lines = ["accuracy in %   " + "".join(f"{name:>9}" for name in names) + f"  {last}"]
    for i, row in enumerate(matrix):
        if all(value is None or math.isnan(value) for value in row):
            break
        average = average_accuracy(matrix[: i + 1])
        cells = "".join(f"{percent(value):>9}" for value in (row if every else row[i : i + 1]))
        when = "after" if tasks_completed is None or i < tasks_completed else "in"
        lines.append(f"{f'{when} task {i + 1}':<16}{cells}  {percent(average):>{len(last)}}")
    return "\n".join(lines)


def summary(result: TrainingResult, width: int | None = None) -> str:
    """The numbers below the table, one a line, folded where a terminal has fewer than that many columns."""
    matrix = result.accuracy_matrix
    rows = [
        ("average accuracy", f"{percent(average_accuracy(matrix))} %"),
        ("backward transfer", f"{percent(backward_transfer(matrix), signed=True)} points"),
        ("forgetting", f"{percent(forgetting(matrix))} points"),
        ("time per step", f"{result.step_milliseconds:.2f} ms (median of {result.steps} steps)"),
        ("peak memory", _memory(result)),
    ]
    lines = [f"{name:<18}{value}" for name, value in rows]
    if width is not None:
        lines = [part for line in lines for part in textwrap.wrap(line, max(width, 30), subsequent_indent=18 * " ")]
    return "\n".join(lines)


def summarize_seeds(seeds: Sequence[int], results: Sequence[TrainingResult]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample, n - 1) over several seeds, for ``summary.json``."""
    values = {
        "average_accuracy": [average_accuracy(result.accuracy_matrix) for result in results],
        "backward_transfer": [backward_transfer(result.accuracy_matrix) for result in results],
        "forgetting": [forgetting(result.accuracy_matrix) for result in results],
        "step_milliseconds": [result.step_milliseconds for result in results],
    }
    content: dict[str, Any] = {"seeds": list(seeds)}
    return content | {name: mean_and_deviation(numbers) for name, numbers in values.items()}


def mean_and_deviation(numbers: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample, n - 1) and the values; None for an undefined number (JSON has no nan)."""
    return {
        "mean": _json_number(statistics.fmean(numbers)) if numbers else None,
        "deviation": _json_number(statistics.stdev(numbers)) if len(numbers) > 1 else None,
        "values": [_json_number(number) for number in numbers],
    }


def seeds_table(content: dict[str, Any]) -> str:
    """`summarize_seeds` for the terminal."""
    lines = [f"over seeds {' '.join(map(str, content['seeds']))}", f"{'':<18}{'mean':>8}{'deviation':>11}"]
    for name, unit, scale in (
        ("average_accuracy", "%", 100.0),
        ("backward_transfer", "points", 100.0),
        ("forgetting", "points", 100.0),
        ("step_milliseconds", "ms", 1.0),
    ):
        numbers = [content[name][key] for key in ("mean", "deviation")]
        cells = ["-" if number is None else f"{scale * number:.2f}" for number in numbers]
        label = "time per step" if name == "step_milliseconds" else name.replace("_", " ")
        lines.append(f"{label:<18}{cells[0]:>8}{cells[1]:>11} {unit}")
    return "\n".join(lines)


def _memory(result: TrainingResult) -> str:
    if result.peak_memory_bytes is None or result.total_memory_bytes is None:
        return "unknown on this system"
    return (
        f"{result.peak_memory_bytes / 2**20:.0f} MiB above the start of training "
        f"({result.total_memory_bytes / 2**20:.0f} MiB for the whole process)"
    )


def _json_number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
