"""A comparison as one page: ``page`` turns the content of ``compare.json`` into HTML.

The page loads nothing: styles and drawings (SVG, see `plots`) are in it, and there is no script. Colours follow the
reader's light or dark setting; wherever a colour tells methods apart, a mark, a dash or a word does too. Without
matplotlib the page has its numbers alone. The template escapes every text that it is given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import plots
from .extras import MissingExtraError
from .metrics import average_accuracy

SUMMARIZED = ("average_accuracy", "backward_transfer", "forgetting", "step_milliseconds", "peak_memory_bytes")

_NONE, _MINUS, _TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_PERCENTAGES = SUMMARIZED[:3]
_LARGER_IS_BETTER = SUMMARIZED[:2]


@dataclass(frozen=True)
class _Method:
    """A method as it is drawn: numbers over its complete runs, or over those with any numbers if none is complete."""

    number: int  # in the order given, which its colour and its mark follow
    label: str
    summary: dict[str, dict[str, Any]]
    matrix: list[list[float | None]]  # mean over seeds
    curve: dict[int, tuple[float, float | None]]  # task, mean and deviation of the average accuracy so far
    seeds: int
    complete: int

    @property
    def color(self) -> str:
        return plots.style_of(self.number)[0]

    @property
    def mark(self) -> str:
        return plots.MARKS[plots.style_of(self.number)[1]][1]

    @property
    def line(self) -> plots.Curve:
        color, mark, dash = plots.style_of(self.number)
        means, deviations = zip(*self.curve.values(), strict=True)
        tasks = [task + 1 for task in self.curve]
        return plots.Curve(self.label, tasks, means, deviations, color, plots.MARKS[mark][0], dash)

    def mean(self, name: str) -> float | None:
        value: float | None = self.summary[name]["mean"]
        return value

    def deviation(self, name: str) -> float | None:
        value: float | None = self.summary[name]["deviation"]
        return value


def ranked(methods: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best average accuracy first, those without one last."""

    def key(method: dict[str, Any]) -> float:
        mean = method["summary"]["average_accuracy"]["mean"]
        return math.inf if mean is None else -mean

    return sorted(methods, key=key)


def page(content: dict[str, Any]) -> str:
    """The whole document for the content of ``compare.json`` (see `compare.content_of`)."""
    numbers = {id(method): number for number, method in enumerate(content["methods"])}
    order = ranked(content["methods"])
    methods = [_method(numbers[id(method)], method) for method in order]
    names = list(dict.fromkeys(name for method in order for name in method["config"]))
    options = {
        name: [_option(method["config"][name]) if name in method["config"] else _NONE for method in order]
        for name in names
    }
    environment = Environment(
        loader=PackageLoader("engram_kernels.continual"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": _percent, "with_deviation": _with_deviation}
    return environment.get_template("comparison.html").render(
        content=content,
        order=order,
        methods=methods,
        tasks=max((len(method.matrix) for method in methods), default=0),
        curved=_curved(methods),
        several_seeds=any(method.complete > 1 for method in methods),
        tiles=_tiles(methods),
        cells={method.label: [_cell(method, methods, name) for name in SUMMARIZED] for method in methods},
        options=options,
        commands="\n".join(run["command"] for method in order for run in method["runs"]),
        **_drawings(methods, content.get("chance")),
    )


def _method(number: int, method: dict[str, Any]) -> _Method:
    runs = method["runs"]
    complete = [run["metrics"] for run in runs if run["status"] == "complete" and run["metrics"]]
    shown = complete or [run["metrics"] for run in runs if run["metrics"]]
    matrices = [metrics["accuracy_matrix"] for metrics in shown]
    curve: dict[int, tuple[float, float | None]] = {}
    for task in range(max(map(len, matrices), default=0)):
        known = [m for m in matrices if any(value is not None for value in m[task])]
        values = [value for m in known if not math.isnan(value := average_accuracy(m[: task + 1]))]
        if values:  # long streams may be tested on every task at their end alone
            curve[task] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    return _Method(
        number=number,
        label=method["label"],
        summary=method["summary"],
        matrix=[[_mean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)],
        curve=curve,
        seeds=len(runs),
        complete=len(complete),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _curved(methods: Sequence[_Method]) -> list[_Method]:
    """Those with a curve: no line goes across tasks at which the average was not measured."""
    return [method for method in methods if method.curve and len(method.curve) == max(method.curve) + 1]


# --- drawings ---------------------------------------------------------------------------------------------------------


def _drawings(methods: Sequence[_Method], chance: float | None) -> dict[str, Any]:
    """The drawings by their names in the template; none without anything to draw, or without matplotlib."""
    drawn = [method for method in methods if method.matrix]
    drawings: dict[str, Any] = {"curves": [], "matrices": [], "costs": [], "missing": None, "measured": bool(drawn)}
    try:
        with plots.own_style():
            if curved := _curved(methods):
                drawings["curves"] = [_curves(curved, chance, narrow) for narrow in (False, True)]
            drawings["matrices"] = _matrices(drawn)
            drawings["costs"] = [
                cost
                for title, name, form in (
                    ("Peak memory", "peak_memory_bytes", _mebibytes),
                    ("Time per step", "step_milliseconds", _milliseconds),
                )
                if (cost := _costs(drawn, title, name, form)) is not None
            ]
    except MissingExtraError as error:
        drawings["missing"] = str(error)
    return drawings


def _curves(methods: Sequence[_Method], chance: float | None, narrow: bool) -> Markup:
    """The average accuracy so far of every method; on a narrow screen the names stand below instead of at the ends."""
    lines = [method.line for method in reversed(methods)]  # the best in front
    ends = [
        mean + sign * (deviation or 0.0)
        for method in methods for mean, deviation in method.curve.values() for sign in (-1, 0, 1)
    ]  # fmt: skip
    figure = plots.new_figure(*((3.8, 3.5) if narrow else (10.0, 4.3)))
    axes = figure.subplots()
    tasks = max(len(method.matrix) for method in methods)
    plots.curves(axes, lines, tasks, chance, [] if narrow else lines, plots.bounds(ends))
    axes.set_ylabel("average accuracy so far, %")
    ending = "; ".join(f"{line.label} ends at {_percent(line.means[-1])} %" for line in reversed(lines))
    description = f"Average accuracy so far against tasks learned, best: {methods[0].label}. {ending}."
    return Markup(plots.as_svg(figure, "narrow-curves" if narrow else "curves", description))


def _matrices(methods: Sequence[_Method]) -> list[tuple[_Method, Markup]]:
    """Every method with its accuracy matrix, all in the same colours."""
    low, high = plots.bounds(
        [value for m in methods for i, row in enumerate(m.matrix) for value in row[: i + 1] if value is not None]
    )
    found = []
    for method in methods:
        side = 3.2 if len(method.matrix) <= 10 else 4.4
        figure = plots.new_figure(side, side)
        plots.accuracy_matrix(figure.subplots(), plots.as_array(method.matrix), low, high)
        last = next((row for row in reversed(method.matrix) if row != [None] * len(row)), [])
        description = (
            f"Accuracy matrix of {method.label}. On the last row the accuracies are {', '.join(map(_percent, last))} "
            "percent."
        )
        found.append((method, Markup(plots.as_svg(figure, f"matrix-{method.number}", description))))
    return found


def _costs(methods: Sequence[_Method], title: str, name: str, form: Any) -> tuple[str, Markup] | None:
    """A title and bars, the smallest first; None where nothing was measured."""
    known = sorted(
        ((mean, method) for method in methods if (mean := method.mean(name)) is not None), key=lambda pair: pair[0]
    )
    if not known:
        return None
    smallest = known[0][0]
    texts = [
        form(mean) + ("" if len(known) == 1 else ", least" if mean == smallest else f", {_ratio(mean, smallest)}")
        for mean, _ in known
    ]
    figure = plots.new_figure(5.0, 0.2 + 0.52 * len(known))
    plots.bars(
        figure.subplots(),
        [method.label for _, method in known],
        [mean for mean, _ in known],
        texts,
        [method.color for _, method in known],
        [method.deviation(name) for _, method in known],
    )
    said = "; ".join(f"{method.label} {form(mean)}" for mean, method in known)
    description = f"{title} of every method, smallest first. {said}."
    return title, Markup(plots.as_svg(figure, name.replace("_", "-"), description))


# --- numbers ----------------------------------------------------------------------------------------------------------


def _tiles(methods: Sequence[_Method]) -> list[dict[str, Any]]:
    """The best method by each number, and by how much."""
    tiles = []
    for title, name, form in (
        ("Most accurate", "average_accuracy", lambda value: f"{_percent(value)} %"),
        ("Forgets least", "forgetting", lambda value: f"{_percent(value)} points"),
        ("Fastest step", "step_milliseconds", _milliseconds),
        ("Least memory", "peak_memory_bytes", _mebibytes),
    ):
        known = [(mean, method) for method in methods if (mean := method.mean(name)) is not None]
        if len(known) < 2:
            continue
        best = max if name in _LARGER_IS_BETTER else min
        value, winner = best(known, key=lambda pair: pair[0])
        second = best(mean for mean, method in known if method is not winner)
        if name in _PERCENTAGES:
            margin = f"{_percent(abs(value - second))} points ahead of the next"
        else:
            ratio = _ratio(second, value)
            margin = "as much as the next" if ratio == f"1.0{_TIMES}" else f"the next needs {ratio}"
        tiles.append({"title": title, "value": form(value), "method": winner, "margin": margin})
    return tiles


def _cell(method: _Method, methods: Sequence[_Method], name: str) -> dict[str, Any]:
    """A cell of the summary: its value, its deviation, and how it compares with the best."""
    mean, deviation = method.mean(name), method.deviation(name)
    if mean is None:
        return {"value": None}
    known = [value for other in methods if (value := other.mean(name)) is not None]
    best = max(known) if name in _LARGER_IS_BETTER else min(known)
    percent = name in _PERCENTAGES
    if percent:
        text = _percent(mean, sign=name == "backward_transfer")
    else:
        text = (_milliseconds if name == "step_milliseconds" else _mebibytes)(mean).split()[0]
    is_best = mean == best and len(methods) > 1
    beside = ""
    if is_best:
        beside = "best" if percent else "least"
    elif len(methods) > 1:
        beside = _percent(mean - best, sign=True) if percent else _ratio(mean, best)
    return {
        "value": text,
        "deviation": _percent(deviation) if percent and deviation is not None else None,
        "best": is_best,
        "beside": beside,
        "share": 100 * mean if name == "average_accuracy" else None,
    }


def _percent(value: float | None, sign: bool = False) -> str:
    return _NONE if value is None else f"{100 * value:{'+' if sign else ''}.1f}".replace("-", _MINUS)


def _with_deviation(mean: float, deviation: float | None) -> str:
    return _percent(mean) + ("" if deviation is None else f" ± {_percent(deviation)}")


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def _mebibytes(value: float) -> str:
    mebibytes = value / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes >= 100 else f"{mebibytes:.1f} MiB"


def _ratio(value: float, smallest: float) -> str:
    ratio = value / smallest if smallest > 0 else math.inf
    return (f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}") + _TIMES


def _option(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(_option, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
