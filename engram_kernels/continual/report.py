"""What a run leaves: ``metrics.json``, one picture ``report.png``, and a table for the terminal.

Files are written beside their place and renamed into it (see `files`), so that a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import platform
import statistics
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .checkpoint import plain
from .extras import require
from .files import DamagedFileError, read_within, reason, write_atomically
from .metrics import AccuracyMatrix, average_accuracy, backward_transfer, forgetting, forward_transfer
from .training import TrainingResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS_FILE = "metrics.json"
PICTURE_FILE = "report.png"

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

# Up to so many tasks every cell of the heat map carries its number, and every line its label.
_ANNOTATED_TASKS = 20
_LABELLED_TASKS = 12
_TABLE_TASKS = 12


def metrics_of(result: TrainingResult, config: dict[str, Any], chance: float | None = None) -> dict[str, Any]:
    """The content of ``metrics.json``; what is not defined is None there (JSON has no nan).

    accuracy_matrix, average_accuracy, backward_transfer, forgetting, forward_transfer (fractions, see `metrics`;
    the last needs ``chance``, the accuracy of guessing), peak_memory_bytes, step_milliseconds, config (every option
    of the run), and what a reader needs to judge them: completed, tasks_completed, steps, train_seconds,
    total_memory_bytes, seed, threads, isa, versions.
    """
    import engram_kernels as ek

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
        "isa": ek.ops.isa(),
        "versions": {
            "engram_kernels": str(getattr(ek, "__version__", "unknown")),
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
    """What :func:`write_metrics` wrote of :func:`metrics_of`; None without the file.

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
    """Raises any exception unless this is what :func:`metrics_of` gives."""
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
    """The result that :func:`metrics_of` was given."""
    values = {field.name: metrics[field.name] for field in dataclasses.fields(TrainingResult)}
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
        cells = "".join(f"{_percent(value):>9}" for value in (row if every else row[i : i + 1]))
        when = "after" if tasks_completed is None or i < tasks_completed else "in"
        lines.append(f"{f'{when} task {i + 1}':<16}{cells}  {_percent(average):>{len(last)}}")
    return "\n".join(lines)


def summary(result: TrainingResult, width: int | None = None) -> str:
    """The numbers below the table, one a line, folded where a terminal has fewer than that many columns."""
    matrix = result.accuracy_matrix
    rows = [
        ("average accuracy", f"{_percent(average_accuracy(matrix))} %"),
        ("backward transfer", f"{_percent(backward_transfer(matrix), signed=True)} points"),
        ("forgetting", f"{_percent(forgetting(matrix))} points"),
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
    """Mean, standard deviation (of a sample, n - 1) and the values; None for what is not defined, as JSON wants it."""
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


def write_picture(directory: str | os.PathLike[str], metrics: dict[str, Any], chance: float | None = None) -> Path:
    """Draw ``report.png``: the accuracy matrix as a heat map and the accuracy curve of each task.

    Args:
        directory: an existing one.
        metrics: as from `metrics_of`, or read from ``metrics.json``.
        chance: accuracy of guessing (0 to 1), drawn as a line.

    Drawn in matplotlib's own style, whatever style the surroundings have set.

    Raises:
        MissingExtraError: without matplotlib.
        OSError: the file can't be written.
        Exception: any, of matplotlib, where it can't draw.
    """
    matplotlib = require_matplotlib()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name; the picture has a box there
        content = _picture(metrics, chance)
    path = Path(directory) / PICTURE_FILE
    write_atomically(path, content)
    return path


def require_matplotlib() -> ModuleType:
    """Matplotlib, also where the environment names a backend that there is only elsewhere (in a notebook).

    Raises:
        MissingExtraError: it is missing.
    """
    loaded = "matplotlib" in sys.modules
    backend = None if loaded else os.environ.pop("MPLBACKEND", None)
    try:
        matplotlib = require("matplotlib", "matplotlib", f"the picture {PICTURE_FILE}")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):  # there is none of that name here, and the picture needs none
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def _picture(metrics: dict[str, Any], chance: float | None) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrix = np.array(
        [[math.nan if value is None else value for value in row] for row in metrics["accuracy_matrix"]],
        dtype=float,
    )
    tasks = len(matrix)
    side = 4.6 if tasks <= 6 else 5.6
    height = side + 1.3
    figure = Figure(figsize=(2.3 * side + 1.4, height), dpi=150)
    FigureCanvasAgg(figure)  # no window system is asked for, and pyplot's global state is left alone
    figure.set_layout_engine("constrained", rect=(0.01, 0.01, 0.98, 0.98 - 0.7 / height))  # 0.7 inch for the titles
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.2))
    title = {"fontsize": 14, "fontweight": "bold", "va": "center", "parse_math": False}  # a name may hold dollars
    figure.text(0.02, 1 - 0.3 / height, _title(metrics), title)
    figure.text(0.02, 1 - 0.56 / height, _subtitle(metrics), fontsize=9, color="0.35", va="center")
    _draw_matrix(left, matrix)
    _draw_curves(right, matrix, chance)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "engram-kernels"})
    return buffer.getvalue()


def _draw_matrix(axes: Axes, matrix: np.ndarray) -> None:
    """Heat map, in percent; cividis reads alike with every kind of colour vision and in grey."""
    tasks = len(matrix)
    image = axes.imshow(100 * matrix, cmap="cividis", vmin=0, vmax=100, aspect="equal")
    axes.set_facecolor("0.93")
    labels = [str(task + 1) for task in range(tasks)]
    step = max(1, math.ceil(tasks / _ANNOTATED_TASKS))
    axes.set_xticks(range(0, tasks, step), labels[::step])
    axes.set_yticks(range(0, tasks, step), labels[::step])
    axes.tick_params(length=0)
    axes.set_xlabel("accuracy on task")
    axes.set_ylabel("after learning task")
    axes.set_title("Accuracy matrix (%)", fontsize=11, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(np.arange(-0.5, tasks), minor=True)
    axes.set_yticks(np.arange(-0.5, tasks), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    if tasks <= _ANNOTATED_TASKS:
        size = 11 if tasks <= 6 else 8.5 if tasks <= 10 else 6
        for (i, j), value in np.ndenumerate(matrix):
            if math.isnan(value):
                continue
            # Above the diagonal a task is not learned yet: the number stands back.
            axes.text(
                j,
                i,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=size if j <= i else 0.8 * size,
                fontweight="bold" if i == j else "normal",
                color="white" if value < 0.55 else "black",
                alpha=1.0 if j <= i else 0.6,
            )
    else:
        axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_curves(axes: Axes, matrix: np.ndarray, chance: float | None) -> None:
    """A line per task from the time it is learned, and the average over the tasks so far."""
    import matplotlib

    tasks = len(matrix)
    learned = int(np.sum(~np.isnan(matrix).all(axis=1)))
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, tasks))
    markers = "osD^vP*X<>hp"
    ends: list[tuple[float, str, Any]] = []
    for j in range(learned):
        when = np.arange(j, learned)
        axes.plot(
            when + 1,
            100 * matrix[j:learned, j],
            color=colors[j],
            marker=markers[j % len(markers)] if tasks <= _ANNOTATED_TASKS else None,
            markersize=5,
            linewidth=1.3,
            alpha=0.9,
        )
        ends.append((float(100 * matrix[learned - 1, j]), f"task {j + 1}", colors[j]))
    if learned:
        average = [100 * matrix[i, : i + 1].mean() for i in range(learned)]
        axes.plot(
            range(1, learned + 1), average, color="#D55E00", linewidth=3, marker="o", markersize=6, zorder=5,
            solid_capstyle="round",
        )  # fmt: skip
        ends.append((float(average[-1]), "average so far", "#D55E00"))
    if chance is not None:
        axes.axhline(100 * chance, color="0.45", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            "chance", (0, 100 * chance), xycoords=("axes fraction", "data"), xytext=(4, 2),
            textcoords="offset points", ha="left", va="bottom", fontsize=8, color="0.35",
        )  # fmt: skip
    axes.set_ylim(-3, 103)
    axes.set_xlim(0.8, max(1, tasks) + 0.2)
    step = max(1, math.ceil(tasks / 12))
    axes.set_xticks(range(1, tasks + 1, step))
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Accuracy of each task as later ones are learned", fontsize=11, loc="left")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label_ends(axes, ends if tasks <= _LABELLED_TASKS else ends[-1:], x=learned)


def _label_ends(axes: Axes, ends: list[tuple[float, str, Any]], x: int) -> None:
    """Name each line at its right end, labels pushed apart so that none covers another."""
    ordered = sorted(ends, key=lambda end: end[0])
    placed = spread([value for value, _, _ in ordered], gap=5.0, lowest=0.0, highest=100.0)
    for (value, name, color), y in zip(ordered, placed, strict=True):
        axes.annotate(
            f"{name}: {value:.0f}",
            xy=(x, value),
            xytext=(1.03, y),
            textcoords=("axes fraction", "data"),
            annotation_clip=False,
            va="center",
            fontsize=9,
            fontweight="bold" if name.startswith("average") else "normal",
            color=color if name.startswith("average") else "0.15",
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.8,
                "shrinkA": 1,
                "relpos": (0, 0.5),
            },
        )


def spread(values: Sequence[float], gap: float, lowest: float, highest: float) -> list[float]:
    """Move ascending values as little as needed for neighbours to be ``gap`` apart, within the two bounds."""
    groups: list[tuple[float, int]] = []  # (centre, members), each a run of values exactly a gap apart
    for value in values:
        centre, members = value, 1
        while True:
            reach = (members - 1) / 2 * gap
            centre = max(lowest + reach, min(highest - reach, centre))
            if not groups or groups[-1][0] + (groups[-1][1] - 1) / 2 * gap + gap <= centre - reach:
                break
            other, others = groups.pop()
            centre, members = (centre * members + other * others) / (members + others), members + others
        groups.append((centre, members))
    return [centre + (k - (members - 1) / 2) * gap for centre, members in groups for k in range(members)]


def _title(metrics: dict[str, Any]) -> str:
    config = metrics["config"]
    given = config.get("dataset", "?")
    names = [Path(name).stem for name in ([given] if isinstance(given, str) else given)]
    data = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more data sets"
    average = metrics["average_accuracy"]
    tasks = len(metrics["accuracy_matrix"])
    stopped = "" if metrics["completed"] else f" (interrupted after {metrics['tasks_completed']} of {tasks} tasks)"
    return (
        f"{config.get('method', '?')} on {data}, {config.get('scenario', '?')} scenario: "
        f"average accuracy {_percent(average)} %{stopped}"
    )


def _subtitle(metrics: dict[str, Any]) -> str:
    config = metrics["config"]
    parts = [
        f"backward transfer {_percent(metrics['backward_transfer'], signed=True)} points",
        f"forgetting {_percent(metrics['forgetting'])} points",
    ]
    if config.get("hidden"):
        parts.append("hidden " + "-".join(map(str, config["hidden"])))
    for name in ("epochs", "rate", "seed"):
        if config.get(name) is not None:
            parts.append(f"{name} {config[name]}")
    if metrics.get("step_milliseconds") is not None:
        parts.append(f"{metrics['step_milliseconds']:.1f} ms per step")
    return "   ·   ".join(parts)


def _memory(result: TrainingResult) -> str:
    if result.peak_memory_bytes is None or result.total_memory_bytes is None:
        return "unknown on this system"
    return (
        f"{result.peak_memory_bytes / 2**20:.0f} MiB above the start of training "
        f"({result.total_memory_bytes / 2**20:.0f} MiB for the whole process)"
    )


def _percent(value: float | None, signed: bool = False) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"


def _json_number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
