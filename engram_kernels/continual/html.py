"""A comparison as one page: ``page`` turns the content of ``compare.json`` into HTML.

The page loads nothing: styles and graphics (SVG) are in it, and there is no script. Colours follow the reader's light
or dark setting and can be told apart with every kind of colour vision; where a colour says something, a shape, a dash
or a word says it too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .metrics import average_accuracy
from .report import spread

SUMMARIZED = ("average_accuracy", "backward_transfer", "forgetting", "step_milliseconds", "peak_memory_bytes")

_NONE, _MINUS, _TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

# Up to so many tasks every cell of a heat map carries its number, and every point of a curve its mark.
_ANNOTATED_TASKS = 20

_NAME_LENGTH = 26  # characters of a label at the end of a curve

# After Okabe and Ito 2008 ("Color Universal Design") and Tol's muted scheme: for light paper, and for dark.
_COLORS = (
    ("#0072b2", "#56b4f0"), ("#d55e00", "#ff8a4c"), ("#009e73", "#2fd0a2"), ("#b65590", "#ee9dcb"),
    ("#b07d00", "#f5c042"), ("#4b4fb0", "#a3a6ff"), ("#5b6470", "#b4bdc8"), ("#882255", "#e0709f"),
    ("#5d7d00", "#b9d24f"), ("#0b7c8c", "#6fd6e4"),
)  # fmt: skip
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
# cividis (Nuñez, Anderton and Renslow 2018) at equal distances: reads alike with every kind of colour vision, and grey
_CIVIDIS = (
    (0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120), (165, 156, 116),
    (195, 179, 105), (225, 204, 85), (254, 232, 56),
)  # fmt: skip


@dataclass(frozen=True)
class _Method:
    """A method as it is drawn: numbers over its complete runs, or over what there is if none is complete."""

    number: int  # in the order given, which its colour and its mark follow
    label: str
    summary: dict[str, dict[str, Any]]
    matrix: list[list[float | None]]  # mean over seeds
    curve: dict[int, tuple[float, float | None]]  # task, mean and deviation of the average accuracy so far
    seeds: int
    complete: int
    statuses: tuple[str, ...]

    @property
    def color(self) -> str:
        return f"var(--m{self.number % len(_COLORS)})"

    @property
    def dash(self) -> str:
        return _DASHES[self.number // len(_COLORS) % len(_DASHES)]

    @property
    def end(self) -> tuple[int, float]:
        """The last task of the curve, and the mean there."""
        task = max(self.curve)
        return task, self.curve[task][0]

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
    drawn = [method for method in methods if method.matrix]
    # no line across tasks at which the average was not measured
    curved = [method for method in drawn if method.curve and len(method.curve) == method.end[0] + 1]
    tasks = max((len(method.matrix) for method in methods), default=0)
    title = f"{len(methods)} method{'s' if len(methods) != 1 else ''} on {content['dataset']}"
    sections = [
        _troubles(order),
        _tiles(methods),
        _section(
            "Summary",
            _summary_table(methods),
            ("Best average accuracy first. " if len(methods) > 1 else "") + _counted(methods, content),
        ),
    ]
    if curved:
        sections.append(
            _section(
                "Accuracy as tasks are learned",
                _curves(curved, tasks, content.get("chance")),
                "Average accuracy on all tasks learned so far, after each task"
                + (
                    "; the band is ± one standard deviation over seeds." if any(m.complete > 1 for m in curved) else "."
                ),
            )
        )
    if drawn:
        sections += [
            _section(
                "Accuracy on every task",
                _heat_maps(drawn, tasks),
                "Each row is a moment: how well every task is known after learning that one. Down a column one sees a "
                "task being kept or forgotten."
                + (" Mean over seeds." if any(method.complete > 1 for method in drawn) else ""),
            ),
            _section("Memory and speed", _costs(methods), _measured(content)),
        ]
    sections += [
        _section("Hyper-parameters", _hyperparameters(order)),
        _section("How this was made", _provenance(content, order)),
    ]
    body = "\n".join(section for section in sections if section)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{_style()}</style>
</head>
<body>
<header>
<p class="eyebrow">engram-kernels compare</p>
<h1>{_text(title)}</h1>
<p class="facts">{" ".join(f"<span>{_text(fact)}</span>" for fact in content["facts"])}</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""


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
        statuses=tuple(run["status"] for run in runs),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# --- words and numbers ------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return escape(str(value), quote=True)


def _percent(value: float | None, sign: bool = False) -> str:
    return _NONE if value is None else f"{100 * value:{'+' if sign else ''}.1f}".replace("-", _MINUS)


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def _mebibytes(value: float) -> str:
    mebibytes = value / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes >= 100 else f"{mebibytes:.1f} MiB"


def _ratio(value: float, smallest: float) -> str:
    ratio = value / smallest if smallest > 0 else math.inf
    return (f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}") + _TIMES


def _counted(methods: Sequence[_Method], content: dict[str, Any]) -> str:
    seeds = content["seeds"]
    if len(seeds) < 2:
        return f"One seed ({', '.join(map(str, seeds))}): differences may be chance."
    text = f"Mean ± standard deviation over {len(seeds)} seeds"
    return text + ("." if all(m.complete == m.seeds for m in methods) else ", as far as they are complete.")


def _measured(content: dict[str, Any]) -> str:
    text = (
        "Every run was a process of its own. Memory: peak above that before training. Time: median step, whole update."
    )
    if content["jobs"] > 1:
        text += f" Up to {content['jobs']} runs shared the machine, which makes steps slower than alone."
    return text


# --- sections ---------------------------------------------------------------------------------------------------------


def _section(title: str, content: str, note: str = "") -> str:
    name = title.lower().replace(" ", "-")
    text = f'<p class="note">{_text(note)}</p>\n' if note else ""
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{_text(title)}</h2>\n{text}{content}\n</section>'


def _troubles(order: Sequence[dict[str, Any]]) -> str:
    """Runs that gave no numbers, and why."""
    items = []
    for method in order:
        for run in method["runs"]:
            name = f"<b>{_text(method['label'])}</b>, seed {_text(run['seed'])}"
            if run["status"] == "failed":
                said = f"<details><summary>its last words</summary><pre>{_text(run['output'])}</pre></details>"
                items.append(f"<li>{name} failed: {_text(run['error'])}{said if run['output'].strip() else ''}</li>")
            elif run["status"] == "interrupted":
                learned = "" if run["metrics"] is None else f" after {run['metrics']['tasks_completed']} tasks"
                items.append(f"<li>{name} was interrupted{learned}; the same command goes on with it</li>")
            elif run["status"] != "complete":
                items.append(f"<li>{name} is not run yet; the same command does it</li>")
    if not items:
        return ""
    return f'<section class="troubles" role="note" aria-label="Incomplete"><ul>\n{chr(10).join(items)}\n</ul></section>'


def _tiles(methods: Sequence[_Method]) -> str:
    """Who is best at what, for those who read nothing else."""
    tiles = []
    for title, name, best, form in (
        ("Most accurate", "average_accuracy", max, lambda value: f"{_percent(value)} %"),
        ("Forgets least", "forgetting", min, lambda value: f"{_percent(value)} points"),
        ("Fastest step", "step_milliseconds", min, _milliseconds),
        ("Least memory", "peak_memory_bytes", min, _mebibytes),
    ):
        known = [(mean, method) for method in methods if (mean := method.mean(name)) is not None]
        if len(known) < 2:
            continue
        value, winner = best(known, key=lambda pair: pair[0])
        others = [mean for mean, method in known if method is not winner]
        second = best(others)
        if name in ("average_accuracy", "forgetting"):
            margin = f"{_percent(abs(value - second))} points ahead of the next"
        else:
            ratio = _ratio(second, value)
            margin = "as much as the next" if ratio == f"1.0{_TIMES}" else f"the next needs {ratio}"
        tiles.append(
            f'<div class="tile" style="--c:{winner.color}"><p>{title}</p><p class="big">{form(value)}</p>'
            f'<p class="who">{_key(winner)} {_text(winner.label)}</p><p class="margin">{margin}</p></div>'
        )
    return f'<section class="tiles" aria-label="Best of each">{"".join(tiles)}</section>' if tiles else ""


def _summary_table(methods: Sequence[_Method]) -> str:
    best: dict[str, float] = {}
    for name in SUMMARIZED:
        known = [mean for method in methods if (mean := method.mean(name)) is not None]
        if known:
            best[name] = max(known) if name in ("average_accuracy", "backward_transfer") else min(known)

    def cell(method: _Method, name: str) -> str:
        mean, deviation = method.mean(name), method.deviation(name)
        if mean is None:
            return f'<td class="n none">{_NONE}</td>'
        percent = name in ("average_accuracy", "backward_transfer", "forgetting")
        if percent:
            value = _percent(mean, sign=name == "backward_transfer")
            spread = "" if deviation is None else f"±&nbsp;{_percent(deviation)}"
        elif name == "step_milliseconds":
            value, spread = _milliseconds(mean).removesuffix(" ms"), ""
        else:
            value, spread = _mebibytes(mean).removesuffix(" MiB"), ""
        is_best = mean == best[name] and len(methods) > 1
        if is_best:
            beside = "best" if percent else "least"
        elif percent:
            beside = f"{_percent(mean - best[name], sign=True)}"
        else:
            beside = _ratio(mean, best[name])
        if len(methods) == 1:
            beside = ""
        meter = ""
        if name == "average_accuracy":
            meter = f'<span class="meter"><i style="width:{100 * mean:.1f}%;background:{method.color}"></i></span>'
        return (
            f'<td class="n{" best" if is_best else ""}"><b>{value}</b> <span class="pm">{spread}</span>'
            f'{meter}<span class="beside">{beside}</span></td>'
        )

    rows = []
    for place, method in enumerate(methods, 1):
        runs = f"{method.complete}/{method.seeds}"
        rank = str(place) if method.complete else _NONE
        rows.append(
            f'<tr><td class="rank">{rank}</td><th scope="row">{_key(method)} {_text(method.label)}</th>'
            + "".join(cell(method, name) for name in SUMMARIZED)
            + f'<td class="n">{runs}</td></tr>'
        )
    several = len(methods) > 1
    heads = (
        ("average accuracy", "%, and points behind the best" if several else "%"),
        ("backward transfer", "points; below 0: later tasks harmed earlier ones"),
        ("forgetting", "points lost from each task's highest"),
        ("time per step", "ms, and times the fastest" if several else "ms"),
        ("peak memory", "MiB, and times the smallest" if several else "MiB"),
        ("runs", "complete"),
    )
    head = "".join(f'<th scope="col" class="n">{name}<small>{unit}</small></th>' for name, unit in heads)
    return (
        '<div class="scroll card" tabindex="0" role="region" aria-label="Summary table"><table class="summary">\n'
        '<thead><tr><th scope="col"><span class="hidden">rank</span></th><th scope="col">method</th>'
        f"{head}</tr></thead>\n"
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _curves(methods: Sequence[_Method], tasks: int, chance: float | None) -> str:
    legend = "".join(f"<li>{_key(method, line=True)} {_text(method.label)}</li>" for method in methods)
    names = 70 + 8 * max(len(_short(method.label, _NAME_LENGTH)) for method in methods)
    wide = _curve_chart(methods, tasks, chance, width=1000, height=430, labels=names)
    narrow = _curve_chart(methods, tasks, chance, width=420, height=380, labels=0)
    heads = "".join(f'<th scope="col" class="n">{_text(method.label)}</th>' for method in methods)
    rows = "".join(
        f'<tr><th scope="row">after task {i + 1}</th>'
        + "".join(
            f'<td class="n">{_with_deviation(*method.curve[i])}</td>'
            if i in method.curve
            else f'<td class="n">{_NONE}</td>'
            for method in methods
        )
        + "</tr>"
        for i in range(tasks)
    )
    return (
        f'<figure class="card chart"><div class="wide">{wide}</div><div class="narrow">{narrow}'
        f'<ul class="legend">{legend}</ul></div>'
        f'<details><summary>The numbers</summary><div class="scroll" tabindex="0" role="region" '
        'aria-label="Numbers of the curves"><table><thead><tr><th scope="col">% on tasks so far</th>'
        f"{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></details></figure>"
    )


def _with_deviation(mean: float, deviation: float | None) -> str:
    return _percent(mean) + ("" if deviation is None else f" ± {_percent(deviation)}")


def _curve_chart(
    methods: Sequence[_Method], tasks: int, chance: float | None, *, width: int, height: int, labels: int
) -> str:
    """A line per method over the tasks, named at its end where there is room for ``labels``."""
    left, right, top, bottom = 46, labels or 14, 14, 46
    values = [
        mean + sign * (deviation or 0.0) for m in methods for mean, deviation in m.curve.values() for sign in (-1, 0, 1)
    ]
    low, high = _range(values)
    along = (width - left - right) / max(1, tasks - 1)

    def x(task: int) -> float:
        return left + along * task if tasks > 1 else (left + width - right) / 2

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - min(high, max(low, value))) / (high - low)

    parts = []
    for tick in _ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text class="tick" x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.0f}</text>'
        )
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, tasks) if tasks / step <= (12 if labels else 10))
    for task in range(tasks):
        if task == 0 or (task + 1) % step == 0:
            parts.append(
                f'<text class="tick" x="{x(task):.1f}" y="{height - bottom + 20}" text-anchor="middle">'
                f"{task + 1}</text>"
            )
    parts.append(
        f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{height - 6}" text-anchor="middle">'
        "tasks learned</text>"
        f'<text class="axis" transform="translate(12 {(top + height - bottom) / 2:.0f}) rotate(-90)" '
        'text-anchor="middle">average accuracy so far, %</text>'
    )
    if chance is not None and low < chance < high:
        parts.append(
            f'<line class="chance" x1="{left}" x2="{width - right}" y1="{y(chance):.1f}" y2="{y(chance):.1f}"/>'
            f'<text class="tick" x="{left + 6}" y="{y(chance) - 6:.1f}">guessing</text>'
        )
    for method in reversed(methods):  # the best in front
        banded = [(i, mean, deviation) for i, (mean, deviation) in method.curve.items() if deviation is not None]
        if banded:
            upper = [f"{x(i):.1f},{y(mean + deviation):.1f}" for i, mean, deviation in banded]
            lower = [f"{x(i):.1f},{y(mean - deviation):.1f}" for i, mean, deviation in reversed(banded)]
            parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{method.color}" class="band"/>')
    for method in reversed(methods):
        points = " ".join(f"{x(i):.1f},{y(mean):.1f}" for i, (mean, _) in method.curve.items())
        dash = f' stroke-dasharray="{method.dash}"' if method.dash else ""
        parts.append(f'<polyline points="{points}" stroke="{method.color}"{dash} class="line"/>')
        for i, (mean, deviation) in method.curve.items():
            told = f"{method.label}, after task {i + 1}: {_with_deviation(mean, deviation)} %"
            small = tasks > _ANNOTATED_TASKS and i != method.end[0]
            shape = (
                f'<circle cx="{x(i):.1f}" cy="{y(mean):.1f}" r="6" fill="transparent"/>'
                if small
                else _mark(method.number, x(i), y(mean), method.color)
            )
            parts.append(f"<g>{shape}<title>{_text(told)}</title></g>")
    if labels:
        ends = sorted(methods, key=lambda method: -method.end[1])
        places = spread([y(m.end[1]) for m in ends], gap=19.0, lowest=top + 4.0, highest=height - bottom)
        for method, place in zip(ends, places, strict=True):
            end = x(method.end[0]), y(method.end[1])
            stop = width - right + 22
            parts.append(
                f'<polyline class="lead" stroke="{method.color}" points="{end[0] + 7:.1f},{end[1]:.1f} '
                f'{stop - 8},{place:.1f} {stop - 2},{place:.1f}"/>'
                f'<text class="name" x="{stop + 2}" y="{place + 4.5:.1f}"><tspan font-weight="700">'
                f"{_percent(method.end[1])}</tspan> {_text(_short(method.label, _NAME_LENGTH))}"
                f"<title>{_text(method.label)}</title></text>"
            )
    best = methods[0]
    told = "; ".join(f"{m.label} ends at {_percent(m.end[1])} %" for m in methods)
    return _svg(
        width, height, f"Average accuracy so far against tasks learned, best: {best.label}", f"{told}.", "".join(parts)
    )


def _heat_maps(methods: Sequence[_Method], tasks: int) -> str:
    known = [
        value
        for method in methods
        for i, row in enumerate(method.matrix)
        for value in row[: i + 1]
        if value is not None
    ]
    low, high = _range(known)
    cards = "".join(
        f'<figure class="card"><figcaption>{_key(method)} {_text(method.label)}'
        + ("" if method.complete else " <small>(incomplete)</small>")
        + f"</figcaption>{_heat_map(method, low, high)}</figure>"
        for method in methods
    )
    stops = "".join(
        f'<stop offset="{i / (len(_CIVIDIS) - 1):.3f}" stop-color="rgb{color}"/>' for i, color in enumerate(_CIVIDIS)
    )
    scale = (
        '<svg viewBox="0 0 240 12" width="240" height="12" role="img" '
        f'aria-label="colour scale from {100 * low:.0f} to {100 * high:.0f} percent">'
        f'<defs><linearGradient id="scale">{stops}</linearGradient></defs>'
        '<rect width="240" height="12" rx="3" fill="url(#scale)"/></svg>'
    )
    below = "≤ " if low > 0 else ""
    size = "large" if tasks > 10 else "small"
    faded = " Pale: not learned yet." if tasks <= _ANNOTATED_TASKS else ""
    return (
        f'<p class="scale"><span>{below}{100 * low:.0f} %</span> {scale} <span>{100 * high:.0f} %</span>'
        f"<span>{faded}</span></p>"
        f'<div class="cards {size}">{cards}</div>'
    )


def _heat_map(method: _Method, low: float, high: float) -> str:
    tasks = len(method.matrix)
    side = 420 if tasks > 10 else 290
    cell = min(56, max(3, side // tasks))
    font = 15 if tasks <= 6 else 13 if tasks <= 10 else 11
    left, top = 40, 6
    gap = 1.5 if tasks <= _ANNOTATED_TASKS else 0
    width, height = left + tasks * cell + 10, top + tasks * cell + 40
    parts = []
    for i, row in enumerate(method.matrix):
        for j, value in enumerate(row):
            learned = j <= i
            if value is None or (not learned and tasks > _ANNOTATED_TASKS):
                continue
            x, y = left + j * cell, top + i * cell
            color, ink = _heat(value, low, high)
            told = f"after task {i + 1}, on task {j + 1}: {_percent(value)} %"
            number = ""
            if tasks <= _ANNOTATED_TASKS:
                ink = (
                    f'style="font-size:{font}px;fill:{ink}"' if learned else f'class="pale" style="font-size:{font}px"'
                )
                number = (
                    f'<text x="{x + cell / 2:g}" y="{y + cell / 2 + 0.36 * font:.1f}" text-anchor="middle" {ink}>'
                    f"{100 * value:.0f}</text>"
                )
            faded = "" if learned else ' opacity=".18"'
            size = f'width="{cell - gap:g}" height="{cell - gap:g}"'
            edges = ' rx="3"' if gap else ' shape-rendering="crispEdges"'  # no seams
            parts.append(
                f'<g><rect x="{x}" y="{y}" {size}{edges} fill="{color}"{faded}/>{number}<title>{told}</title></g>'
            )
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, tasks) if tasks / step <= _ANNOTATED_TASKS)
    for task in range(tasks):
        if task == 0 or (task + 1) % step == 0:
            centre = task * cell + cell / 2
            parts.append(
                f'<text class="tick" x="{left + centre:g}" y="{top + tasks * cell + 14}" text-anchor="middle">'
                f"{task + 1}</text>"
                f'<text class="tick" x="{left - 6}" y="{top + centre + 4:g}" text-anchor="end">{task + 1}</text>'
            )
    middle = tasks * cell / 2
    parts.append(
        f'<text class="axis" x="{left + middle:g}" y="{height - 6}" text-anchor="middle">accuracy on task</text>'
        f'<text class="axis" transform="translate(11 {top + middle:g}) rotate(-90)" text-anchor="middle">'
        "after task</text>"
    )
    final = next((row for row in reversed(method.matrix) if row != [None] * tasks), [])
    told = f"On the last row the accuracies are {', '.join(map(_percent, final))} percent."
    return _svg(width, height, f"Accuracy matrix of {method.label}", told, "".join(parts))


def _costs(methods: Sequence[_Method]) -> str:
    charts = []
    for title, name, form in (
        ("Peak memory", "peak_memory_bytes", _mebibytes),
        ("Time per step", "step_milliseconds", _milliseconds),
    ):
        known = sorted(
            ((mean, method) for method in methods if (mean := method.mean(name)) is not None), key=lambda pair: pair[0]
        )
        if known:
            charts.append(
                f'<figure class="card"><figcaption>{title}</figcaption>{_bars(title, name, known, form)}</figure>'
            )
    return f'<div class="cards pair">{"".join(charts)}</div>' if charts else "<p>Not measured on this system.</p>"


def _bars(title: str, name: str, known: Sequence[tuple[float, _Method]], form: Any) -> str:
    """Horizontal bars, the smallest first; a whisker is ± one standard deviation."""
    width, row, room = 480, 46, 150
    smallest = known[0][0]
    longest = max(mean + (method.deviation(name) or 0.0) for mean, method in known) or 1.0
    parts = []
    for place, (mean, method) in enumerate(known):
        y, deviation = place * row, method.deviation(name)
        length = (width - room) * mean / longest
        told = f"{method.label}: {form(mean)}" + ("" if deviation is None else f" ± {form(deviation)}")
        ratio = "" if len(known) == 1 else "least" if mean == smallest else _ratio(mean, smallest)
        end = length
        whisker = ""
        if deviation:
            a, b = ((width - room) * max(0.0, mean + sign * deviation) / longest for sign in (-1, 1))
            end = b
            whisker = f'<path class="whisker" d="M{a:.1f} {y + 27}H{b:.1f}M{a:.1f} {y + 23}v8M{b:.1f} {y + 23}v8"/>'
        parts.append(
            f'<g><text class="name" x="0" y="{y + 13}">{_text(_short(method.label, 52))}</text>'
            f'<rect x="0" y="{y + 20}" width="{max(2.0, length):.1f}" height="14" rx="3" fill="{method.color}"/>'
            f"{whisker}"
            f'<text class="name" x="{max(end, 0) + 8:.1f}" y="{y + 32}"><tspan font-weight="700">{form(mean)}</tspan>'
            f'<tspan dx="7" class="tick">{ratio}</tspan></text><title>{_text(told)}</title></g>'
        )
    told = "; ".join(f"{method.label} {form(mean)}" for mean, method in known)
    return _svg(width, len(known) * row, f"{title} of every method, smallest first", f"{told}.", "".join(parts))


def _hyperparameters(order: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for method in order for name in method["config"]))
    rows: list[str] = []
    for name in names:
        cells = [_option(method["config"][name]) if name in method["config"] else None for method in order]
        differs = len(set(cells)) > 1
        shown = "".join(f'<td class="n">{_NONE if cell is None else _text(cell)}</td>' for cell in cells)
        rows.append(f'<tr{" class=differs" if differs else ""}><th scope="row">{_text(name)}</th>{shown}</tr>')
    heads = "".join(f'<th scope="col" class="n">{_text(method["label"])}</th>' for method in order)
    return (
        "<details><summary>Every option of every method; those that differ stand out</summary>"
        '<div class="scroll card" tabindex="0" role="region" aria-label="Hyper-parameters"><table class="options">'
        f'<thead><tr><th scope="col">option</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _option(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(_option, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _provenance(content: dict[str, Any], order: Sequence[dict[str, Any]]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in content["environment"].items())
    commands = "\n".join(run["command"] for method in order for run in method["runs"])
    return (
        f'<pre class="card" tabindex="0"><code>{_text(content["command"])}</code></pre>'
        f'<dl><dt>date</dt><dd><time datetime="{_text(content["created"])}">'
        f"{_text(content['created'].replace('T', ' '))}</time></dd>{rows}</dl>"
        "<details><summary>The command of every single run</summary>"
        f'<pre class="card" tabindex="0"><code>{_text(commands)}</code></pre></details>'
    )


# --- drawing ----------------------------------------------------------------------------------------------------------


def _svg(width: float, height: float, title: str, description: str, content: str) -> str:
    """A drawing, with its content in words for those who hear the page.

    It has no title element of its own, which would hide those of its parts from the mouse.
    """
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_text(f"{title}. {description}")}">'
        f"{content}</svg>"
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of a scale in tenths that hold all values: down to 0 if that is not far."""
    if not values:
        return 0.0, 1.0
    low = math.floor(10 * min(values) - 0.15) / 10
    high = math.ceil(10 * max(values) + 0.05) / 10
    low = 0.0 if low <= 0.3 else low
    return max(0.0, low), min(1.0, max(high, low + 0.1))


def _ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 6.01 or step == 0.2)
    return [low + step * i for i in range(math.floor((high - low) / step + 1.001))]


def _heat(value: float, low: float, high: float) -> tuple[str, str]:
    """Colour of a cell, and of the ink that reads on it."""
    place = min(1.0, max(0.0, (value - low) / (high - low))) * (len(_CIVIDIS) - 1)
    below = min(int(place), len(_CIVIDIS) - 2)
    share = place - below
    color = [round(a + share * (b - a)) for a, b in zip(_CIVIDIS[below], _CIVIDIS[below + 1], strict=True)]
    return "#" + "".join(f"{part:02x}" for part in color), "#fff" if place < 0.5 * (len(_CIVIDIS) - 1) else "#111"


def _mark(number: int, x: float, y: float, color: str, r: float = 4.5) -> str:
    """A shape for each method, so that lines can be told apart without their colours."""
    d = 1.3 * r
    shapes = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - 0.9 * r:.1f} {y - 0.9 * r:.1f}h{1.8 * r:.1f}v{1.8 * r:.1f}h{-1.8 * r:.1f}z",
        f"M{x:.1f} {y - 1.2 * r:.1f}l{1.15 * r:.1f} {2 * r:.1f}h{-2.3 * r:.1f}z",
        f"M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}z",
        f"M{x:.1f} {y + 1.2 * r:.1f}l{1.15 * r:.1f} {-2 * r:.1f}h{-2.3 * r:.1f}z",
    )
    # another shape when the colours come round again
    shape = shapes[(number + number // len(_COLORS)) % len(shapes)]
    return f'<path class="mark" d="{shape}" fill="{color}"/>'


def _key(method: _Method, line: bool = False) -> str:
    """The mark of a method beside its name."""
    dash = f' stroke-dasharray="{method.dash}"' if method.dash else ""
    stroke = f'<path d="M0 7H28" stroke="{method.color}" stroke-width="2.2"{dash}/>' if line else ""
    width = 28 if line else 14
    return (
        f'<svg class="key" viewBox="0 0 {width} 14" width="{width}" height="14" aria-hidden="true">{stroke}'
        f"{_mark(method.number, width / 2, 7, method.color)}</svg>"
    )


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _style() -> str:
    light = "".join(f"--m{i}:{color};" for i, (color, _) in enumerate(_COLORS))
    dark = "".join(f"--m{i}:{color};" for i, (_, color) in enumerate(_COLORS))
    return f""":root{{--paper:#f5f6f8;--card:#fff;--ink:#15191f;--soft:#5a6370;--line:#dfe3e8;--track:#eef0f3;
--warn:#fff4e0;--edge:#c77700;{light}}}
@media (prefers-color-scheme:dark){{:root{{--paper:#0f1318;--card:#181e25;--ink:#eef1f5;--soft:#a2adba;--line:#2e3742;
--track:#242c35;--warn:#33280f;--edge:#f5c042;{dark}}}}}{_RULES}"""


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%;font-variant-numeric:tabular-nums}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
main{padding-bottom:56px}
.eyebrow{margin:0;color:var(--soft);font-size:.85rem;letter-spacing:.04em}
h1{font-size:clamp(1.6rem,4vw,2.3rem);line-height:1.15;margin:.15em 0 .4em;letter-spacing:-.015em;
overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .2em;letter-spacing:-.005em}
section{margin-top:44px}
.facts{display:flex;flex-wrap:wrap;gap:8px;margin:0}
.facts span{background:var(--card);border:1px solid var(--line);border-radius:99px;padding:2px 12px;font-size:.85rem;
overflow-wrap:anywhere}
.note{margin:0 0 14px;color:var(--soft);font-size:.92rem;max-width:75ch}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px}
figure{margin:0}
figcaption{font-weight:600;margin-bottom:10px;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;font-family:inherit}
svg.key,.scale svg{display:inline-block;width:auto;vertical-align:-2px;flex:none}
text{fill:var(--ink);font-size:14px}
.tick{fill:var(--soft);font-size:12.5px}.axis{fill:var(--soft);font-size:13px}
.grid{stroke:var(--line)}.chance{stroke:var(--soft);stroke-dasharray:4 4}
.line{fill:none;stroke-width:2.6;stroke-linejoin:round}.band{opacity:.15}.mark{stroke:var(--card);stroke-width:1.3}
.lead{fill:none;stroke-width:1;opacity:.7}.whisker{stroke:var(--ink);fill:none;stroke-width:1.4}
.pale{fill:var(--soft);opacity:.8}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:14px;margin-top:28px}
.tile{background:var(--card);border:1px solid var(--line);border-top:4px solid var(--c);border-radius:12px;
padding:14px 16px}
.tile p{margin:0;color:var(--soft);font-size:.88rem}
.tile .big{font-size:1.75rem;font-weight:700;color:var(--ink);line-height:1.25;letter-spacing:-.01em}
.tile .who{color:var(--ink);font-weight:600;font-size:.95rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.95rem}
th,td{padding:9px 12px;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-size:.85rem;vertical-align:bottom}
thead small{display:block;font-weight:400;color:var(--soft);font-size:.75rem;line-height:1.3;max-width:17ch;
margin-left:auto}
.n{text-align:right;white-space:nowrap}thead .n{white-space:normal}
tbody th{font-weight:600;overflow-wrap:anywhere;min-width:9em}
.rank,.pm,.beside,.none{color:var(--soft)}
.summary.card{padding:4px 8px}
.summary tr>:nth-child(2){position:sticky;left:-8px;background:var(--card)}
.summary td b{font-weight:600}.best b{font-weight:800}
.pm{font-size:.85em}
.beside{display:block;font-size:.8rem}
.best .beside{color:var(--ink);font-weight:600}
.meter{display:block;height:4px;border-radius:2px;background:var(--track);margin:4px 0 2px;min-width:90px}
.meter i{display:block;height:100%;border-radius:2px}
.cards{display:grid;gap:14px}
.cards.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr))}
.cards.large{grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr))}
.cards.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));align-items:start}
.scale{display:flex;flex-wrap:wrap;align-items:center;gap:4px 10px;color:var(--soft);font-size:.88rem;margin:0 0 12px}
.narrow{display:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:10px 0 0;padding:0;font-size:.9rem}
details{margin-top:10px}
summary{cursor:pointer;color:var(--soft);font-size:.92rem;padding:4px 0}
details[open]>summary{margin-bottom:8px}
.options{font-size:.88rem}.options td,.options th{padding:5px 12px}.options th{white-space:nowrap}
.options tr:not(.differs)>*{color:var(--soft);font-weight:400}
.options .differs td{font-weight:700}
pre{margin:10px 0;font:.86rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;font-size:.92rem;margin:12px 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.troubles{background:var(--warn);border-left:4px solid var(--edge);border-radius:8px;padding:10px 18px;margin-top:24px}
.troubles ul{margin:0;padding-left:18px}.troubles pre{font-size:.8rem}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
:focus-visible{outline:2px solid var(--m0);outline-offset:2px}
@media (max-width:720px){header,main{padding-left:14px;padding-right:14px}header{padding-top:24px}
section{margin-top:34px}.wide{display:none}.narrow{display:block}.card{padding:12px}
.tiles{grid-template-columns:1fr 1fr;gap:10px}
.tile .big{font-size:1.35rem}th,td{padding:8px}}
"""
