"""The drawings: one palette, one accuracy matrix, one set of curves, one set of bars, by matplotlib.

:func:`write_picture` draws ``report.png`` of one run; the page of a comparison (see `html`) takes the same drawings as
SVG. matplotlib comes with the extra ``train`` and is imported where something is drawn.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from ..files import write_atomically
from .extras import require
from .streams import fitted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE_FILE = "report.png"

# Okabe and Ito 2008, "Color Universal Design": told apart with every kind of colour vision, on light and dark paper.
COLORS = BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY, OCHRE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#B07D00",
)  # fmt: skip
INK = "#15191f"  # of text and axes; a page has its own
# Lines are told apart without their colours too. A mark, and the character that looks like it.
MARKS = (("o", "\u25cf"), ("s", "\u25a0"), ("^", "\u25b2"), ("D", "\u25c6"), ("v", "\u25bc"))
DASHES = ("-", (0, (7, 3)), (0, (2, 2)), (0, (9, 3, 2, 3)))
# reads alike with every kind of colour vision and in grey (Nuñez, Anderton and Renslow 2018)
HEAT_COLORS = "cividis"

ANNOTATED_TASKS = 20  # up to so many every cell of a matrix has its number, and every point of a curve its mark
LABELLED_TASKS = 12  # up to so many every task has the label of its curve
_LABEL_CELLS = 26  # of a label at the end of a curve

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Curve:
    """A line over the number of tasks learned.

    Attributes:
        label: its name.
        tasks: the numbers of tasks learned at its points, from 1.
        means: its values there, 0 to 1.
        deviations: one standard deviation at each point, None where there is none.
        color, mark, dash: as matplotlib takes them; mark None for none.
        strong: whether it stands out.
    """

    label: str
    tasks: Sequence[int]
    means: Sequence[float]
    deviations: Sequence[float | None] = ()
    color: Any = COLORS[0]
    mark: str | None = "o"
    dash: Any = "-"
    strong: bool = False


def style_of(number: int) -> tuple[str, int, Any]:
    """Colour, index into MARKS and dash of the line of that number: all different up to 40."""
    rounds = number // len(COLORS)
    return COLORS[number % len(COLORS)], (number + rounds) % len(MARKS), DASHES[rounds % len(DASHES)]


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
        with contextlib.suppress(ValueError):  # there is none of that name here, and a picture needs none
            matplotlib.rcParams["backend"] = backend
    return matplotlib


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Has matplotlib draw in our style, whatever style the surroundings have set."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
                "ytick.color": INK, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "engram-kernels",
                "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
            }
        )  # fmt: skip
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name; the picture has a box there
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, without pyplot's global state and without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def accuracy_matrix(axes: Axes, matrix: np.ndarray, low: float = 0.0, high: float = 1.0, scale: bool = True) -> None:
    """Draws accuracies (0 to 1, nan where unknown) as a heat map: a row after each task, a column for each task.

    Colours go from ``low`` to ``high``; ``scale`` shows them beside a matrix whose cells have no numbers.
    """
    tasks = len(matrix)
    many = tasks > ANNOTATED_TASKS
    edges = np.arange(tasks + 1) - 0.5
    image = axes.pcolormesh(
        edges, edges, 100 * np.ma.masked_invalid(matrix), cmap=HEAT_COLORS, vmin=100 * low, vmax=100 * high,
        edgecolors="none" if many else "white", linewidth=0 if many else 1.2, rasterized=many,
    )  # fmt: skip
    axes.set_aspect("equal")
    axes.invert_yaxis()
    step = max(1, math.ceil(tasks / ANNOTATED_TASKS))
    ticks = range(0, tasks, step)
    axes.set_xticks(ticks, [str(task + 1) for task in ticks])
    axes.set_yticks(ticks, [str(task + 1) for task in ticks])
    axes.tick_params(length=0)
    axes.set_xlabel("accuracy on task")
    axes.set_ylabel("after learning task")
    axes.spines[:].set_visible(False)
    if many:
        if scale:
            axes.figure.colorbar(image, ax=axes, shrink=0.8)
        return
    size = 11 if tasks <= 6 else 8.5 if tasks <= 10 else 6
    for (i, j), value in np.ndenumerate(matrix):
        if math.isnan(value):
            continue
        learned = j <= i  # above the diagonal a task is not learned yet: the number stands back
        axes.text(
            j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=size if learned else 0.8 * size,
            fontweight="bold" if i == j else "normal", alpha=1.0 if learned else 0.6,
            color="#ffffff" if value < (low + high) / 2 + 0.05 * (high - low) else "#111111",
        )  # fmt: skip


def curves(
    axes: Axes, lines: Sequence[Curve], tasks: int, chance: float | None, labelled: Sequence[Curve],
    limits: tuple[float, float],
) -> None:  # fmt: skip
    """Draws lines in percent over the number of tasks learned, the last in front.

    Args:
        axes: where to draw.
        lines: what to draw.
        tasks: how many there are.
        chance: accuracy of guessing (0 to 1), drawn as a line where it is in sight; None for none.
        labelled: those that have their name and last value at their right end.
        limits: the ends of the scale, 0 to 1, see `bounds`.
    """
    low, high = limits
    for line in lines:
        x, y = list(line.tasks), 100 * np.array(line.means)
        if any(deviation is not None for deviation in line.deviations):
            spread_of = 100 * np.array([deviation or 0.0 for deviation in line.deviations])
            axes.fill_between(x, y - spread_of, y + spread_of, color=line.color, alpha=0.15, linewidth=0)
        axes.plot(
            x, y, color=line.color, linestyle=line.dash, linewidth=3 if line.strong else 1.6, alpha=0.95,
            marker=line.mark if tasks <= ANNOTATED_TASKS else None, markersize=6 if line.strong else 5,
            markeredgecolor="white", markeredgewidth=0.5, solid_capstyle="round", clip_on=False,
        )  # fmt: skip
    if chance is not None and low <= chance <= high:
        axes.axhline(100 * chance, color=INK, alpha=0.6, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            "guessing", (0, 100 * chance), xycoords=("axes fraction", "data"), xytext=(4, 2),
            textcoords="offset points", ha="left", va="bottom", fontsize=8, alpha=0.8,
        )  # fmt: skip
    margin = 3 * (high - low)
    axes.set_ylim(100 * low - margin, 100 * high + margin)
    axes.set_xlim(0.8, max(1, tasks) + 0.2)
    axes.set_xticks(range(1, tasks + 1, max(1, math.ceil(tasks / 12))))
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(axis="y", color=INK, alpha=0.12)
    _label_ends(axes, labelled)


def _label_ends(axes: Axes, lines: Sequence[Curve]) -> None:
    """Names each line at its right end, labels pushed apart so that none covers another."""
    ordered = sorted((line for line in lines if line.means), key=lambda line: line.means[-1])
    bottom, top = axes.get_ylim()
    points = axes.get_window_extent().height * 72 / axes.figure.dpi  # of the axes, about: before the layout
    gap = (top - bottom) * min(1 / max(1, len(ordered)), 13.0 / points)
    placed = spread([100 * line.means[-1] for line in ordered], gap=gap, lowest=bottom, highest=top)
    for line, y in zip(ordered, placed, strict=True):
        value = 100 * line.means[-1]
        axes.annotate(
            f"{shortened(line.label)}: {value:.0f}", xy=(line.tasks[-1], value), xytext=(1.03, y),
            textcoords=("axes fraction", "data"), annotation_clip=False, va="center", fontsize=9,
            fontweight="bold" if line.strong else "normal", color=line.color if line.strong else INK,
            arrowprops={"arrowstyle": "-", "color": line.color, "linewidth": 0.8, "shrinkA": 1, "relpos": (0, 0.5)},
        )  # fmt: skip


def shortened(label: str) -> str:
    """A label cut to the room at the end of a curve."""
    short = fitted(label, _LABEL_CELLS)
    return label if short == label else short[:-1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def bars(
    axes: Axes, labels: Sequence[str], means: Sequence[float], texts: Sequence[str], colors: Sequence[str],
    deviations: Sequence[float | None],
) -> None:  # fmt: skip
    """Draws horizontal bars from the top, each with its label above and its text at its end."""
    longest = max(mean + (deviation or 0.0) for mean, deviation in zip(means, deviations, strict=True)) or 1.0
    for at, (label, mean, text, color, deviation) in enumerate(
        zip(labels, means, texts, colors, deviations, strict=True)
    ):
        axes.barh(at, mean, height=0.36, color=color)
        if deviation:
            axes.errorbar(mean, at, xerr=deviation, color=INK, capsize=3, linewidth=1)
        axes.text(0, at - 0.34, shortened(label), va="center", fontsize=9)
        axes.text(mean + (deviation or 0.0) + 0.02 * longest, at, text, va="center", fontsize=9, fontweight="bold")
    axes.set_xlim(0, 1.5 * longest)
    axes.set_ylim(len(labels) - 0.5, -0.7)
    axes.set_axis_off()


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a scale in tenths that holds all values, 0 to 1: down to 0 if that is not far."""
    if not values:
        return 0.0, 1.0
    low = math.floor(10 * min(values) - 0.15) / 10
    high = math.ceil(10 * max(values) + 0.05) / 10
    low = 0.0 if low <= 0.3 else low
    return max(0.0, low), min(1.0, max(high, low + 0.1))


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


def as_array(matrix: Sequence[Sequence[float | None]]) -> np.ndarray:
    """An accuracy matrix as ``metrics.json`` has it, with nan for None."""
    return np.array([[math.nan if value is None else value for value in row] for row in matrix], dtype=float)


def as_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an ``svg`` element for a page of HTML: text stays text, and is in the page's own colour.

    Args:
        figure: the figure.
        name: different for every figure of a page; begins every id within the element.
        description: the figure in words, for screen readers.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):  # a style would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key in ("href", f"{{{_XLINK}}}href") and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            element.set(key, value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor"))
    for key in ("width", "height"):  # as wide as the page has room
        root.attrib.pop(key)
    root.attrib |= {"role": "img", "aria-label": description, "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")


def write_picture(directory: str | os.PathLike[str], metrics: dict[str, Any], chance: float | None = None) -> Path:
    """Draw ``report.png``: the accuracy matrix as a heat map and the accuracy curve of each task.

    Args:
        directory: an existing one.
        metrics: as from `report.metrics_of`, or read from ``metrics.json``.
        chance: accuracy of guessing (0 to 1), drawn as a line.

    Raises:
        MissingExtraError: without matplotlib.
        OSError: the file can't be written.
        Exception: any, of matplotlib, where it can't draw.
    """
    with own_style():
        buffer = io.BytesIO()
        _picture(metrics, chance).savefig(buffer, format="png", metadata={"Software": "engram-kernels"})
    path = Path(directory) / PICTURE_FILE
    write_atomically(path, buffer.getvalue())
    return path


def _picture(metrics: dict[str, Any], chance: float | None) -> Figure:
    matrix = as_array(metrics["accuracy_matrix"])
    side = 4.6 if len(matrix) <= 6 else 5.6
    height = side + 1.3
    figure = new_figure(2.3 * side + 1.4, height)
    figure.set_layout_engine("constrained", rect=(0.01, 0.01, 0.98, 0.98 - 0.7 / height))  # 0.7 inch for the titles
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.2))
    figure.text(0.02, 1 - 0.3 / height, title_of(metrics), fontsize=14, fontweight="bold", va="center")
    figure.text(0.02, 1 - 0.56 / height, _subtitle(metrics), fontsize=9, alpha=0.8, va="center")
    accuracy_matrix(left, matrix)
    left.set_title("Accuracy matrix (%)", fontsize=11, loc="left")
    lines = curves_of(matrix)
    curves(right, lines, len(matrix), chance, lines if len(matrix) <= LABELLED_TASKS else lines[-1:], (0.0, 1.0))
    right.set_title("Accuracy of each task as later ones are learned", fontsize=11, loc="left")
    return figure


def curves_of(matrix: np.ndarray) -> list[Curve]:
    """A line for each task from the time it is learned, and last the average over the tasks so far."""
    import matplotlib

    learned = int(np.sum(~np.isnan(matrix).all(axis=1)))
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(matrix)))
    lines = [
        Curve(
            f"task {j + 1}", range(j + 1, learned + 1), list(matrix[j:learned, j]), color=tuple(colors[j]),
            mark="osD^vP*X<>hp"[j % 12],
        )
        for j in range(learned)
    ]  # fmt: skip
    if learned:
        average = [float(matrix[i, : i + 1].mean()) for i in range(learned)]
        lines.append(Curve("average so far", range(1, learned + 1), average, color=VERMILION, strong=True))
    return lines


def title_of(metrics: dict[str, Any]) -> str:
    """Method, data, scenario and average accuracy of a run."""
    config = metrics["config"]
    given = config.get("dataset", "?")
    names = [Path(name).stem for name in ([given] if isinstance(given, str) else given)]
    data = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more data sets"
    tasks = len(metrics["accuracy_matrix"])
    stopped = "" if metrics["completed"] else f" (interrupted after {metrics['tasks_completed']} of {tasks} tasks)"
    return (
        f"{config.get('method', '?')} on {data}, {config.get('scenario', '?')} scenario: "
        f"average accuracy {percent(metrics['average_accuracy'])} %{stopped}"
    )


def _subtitle(metrics: dict[str, Any]) -> str:
    config = metrics["config"]
    parts = [
        f"backward transfer {percent(metrics['backward_transfer'], signed=True)} points",
        f"forgetting {percent(metrics['forgetting'])} points",
    ]
    if config.get("hidden"):
        parts.append("hidden " + "-".join(map(str, config["hidden"])))
    for name in ("epochs", "rate", "seed"):
        if config.get(name) is not None:
            parts.append(f"{name} {config[name]}")
    if metrics.get("step_milliseconds") is not None:
        parts.append(f"{metrics['step_milliseconds']:.1f} ms per step")
    return "   \N{MIDDLE DOT}   ".join(parts)


def percent(value: float | None, signed: bool = False) -> str:
    """A fraction in percent with one digit; a hyphen where it is not known."""
    if value is None or math.isnan(value):
        return "-"
    return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
