"""What a run of the benchmarks leaves: a table in the terminal, ``kernels.json``, and the picture ``kernels.png``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engram_kernels.continual import plots

JSON_FILE, PICTURE_FILE = "kernels.json", "kernels.png"
HEADINGS = ["what", "ISA", "threads", "ms", "rate", "% of the bound", "peak MiB", "times faster than"]


@dataclass
class Baseline:
    """What one of ours is compared with; ``ratio`` is the baseline's figure divided by ours."""

    name: str
    ratio: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    calls: int = 0
    error: str | None = None


@dataclass
class Row:
    group: str
    what: str
    isa: str
    threads: int
    seconds: float | None = None
    rounds: int = 0
    rate: float | None = None
    rate_unit: str = ""
    bound: str | None = None
    bound_fraction: float | None = None
    peak_bytes: int | None = None
    baselines: list[Baseline] = field(default_factory=list)


# Of the run in this process: what was measured, and what a reader must know besides.
ROWS: list[Row] = []
NOTES: list[str] = []


def add(row: Row, benchmark) -> None:
    """Adds a row to the report, and what it compares to pytest-benchmark's own."""
    ROWS.append(row)
    ratios = {baseline.name: baseline.ratio for baseline in row.baselines}
    benchmark.extra_info.update(what=row.what, isa=row.isa, threads=row.threads, ratios=ratios)


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits without an exponent."""
    if value is None:
        return "-"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text and value >= 1 else text


def ratio_text(baseline: Baseline) -> str:
    if baseline.ratio is None:
        return f"- {baseline.name}"
    once = " (1 call)" if baseline.calls == 1 else ""
    return f"{baseline.ratio:.{2 if baseline.ratio < 10 else 1}f}x {baseline.name}{once}"


def cells(row: Row) -> list[str]:
    rate = "-" if row.rate is None else f"{number(row.rate)} {row.rate_unit}"
    bound = "-" if row.bound_fraction is None else f"{row.bound_fraction:.0%} of {row.bound}"
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    milliseconds = "-" if row.seconds is None else number(1e3 * row.seconds)
    ratios = ", ".join(map(ratio_text, row.baselines))
    if row.seconds is None and row.baselines:
        ratios = f"less memory: {ratios}"
    return [row.what, row.isa, str(row.threads), milliseconds, rate, bound, peak, ratios]


def header(environment: dict[str, Any]) -> str:
    sets = "+".join(environment["instruction_sets"])
    gpu = f" · {environment['gpu']}" if environment["gpu"] else ""
    return (
        f"torch {environment['torch']} ({environment['torch_capability']}) · {environment['cpu']}, "
        f"{environment['cores']} cores, {sets}{gpu}"
    )


def table(rows: list[Row], notes: list[str]) -> list[str]:
    """Lines for the terminal: one heading, the rows by group, then what failed and why."""
    body = [cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *body, strict=True)]
    aligned = "<<>>><><"

    def line(texts):
        return "  ".join(f"{t:{a}{w}}" for t, a, w in zip(texts, aligned, widths, strict=True)).rstrip()

    lines, group = [line(HEADINGS)], None
    for row, texts in zip(rows, body, strict=True):
        if row.group != group:
            group = row.group
            lines.append(f"-- {group} ".ljust(sum(widths[:3]) + 4, "-"))
        lines.append(line(texts))
    failed = {f"{b.name}: {b.error}" for row in rows for b in row.baselines if b.error}
    return lines + [f"note: {text}" for text in [*sorted(failed), *notes]]


def write(folder: Path, environment: dict[str, Any], rows: list[Row], notes: list[str]) -> list[Path]:
    """Writes the figures and, where matplotlib is installed, the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "notes": notes, "rows": [asdict(row) for row in rows]}
    paths = [folder / JSON_FILE]
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return paths
    paths.append(folder / PICTURE_FILE)
    draw(paths[1], environment, rows)
    return paths


# ---- the picture: a line per measurement, a dot per baseline

COLORS = [*plots.COLORS[:6], "black"]
MARKERS = "osD^vPX"


def draw(path: Path, environment: dict[str, Any], rows: list[Row]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = [row for row in rows if any(b.ratio for b in row.baselines)]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    names = list(dict.fromkeys(b.name for row in rows for b in row.baselines if b.ratio))
    style = {name: (COLORS[i % 7], MARKERS[i % 7 - i // 7]) for i, name in enumerate(names)}

    row_inches, title_inches, legend_inches = 0.23, 0.42, 0.22 * -(-len(names) // 4)
    heights = [row_inches * len(members) + title_inches for members in groups.values()]
    top, bottom = 0.75 + legend_inches, 0.4
    height = top + sum(heights) + bottom
    figure = Figure(figsize=(11.5, height), dpi=130)
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.32 / height, "How many times faster (or smaller) than", fontsize=15, weight="bold")
    figure.text(0.02, 1 - 0.56 / height, header(environment), fontsize=8.5, color="0.35")
    ratios = [b.ratio for row in rows for b in row.baselines if b.ratio]
    low, high = min(0.5, 0.8 * min(ratios)), 1.25 * max(ratios)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= t <= high]

    y = height - top
    handles = {}
    for (group, members), inches in zip(groups.items(), heights, strict=True):
        y -= inches
        axes = figure.add_axes((0.41, y / height, 0.44, row_inches * len(members) / height))
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(len(members) - 0.5, -0.5)
        axes.axvspan(low, 1, color="0.95", zorder=0)
        axes.axvline(1, color="0.45", linewidth=1, zorder=1)
        axes.set_title(group, fontsize=10.5, weight="bold", loc="left", pad=5)
        for i, row in enumerate(members):
            axes.axhline(i, color="0.88", linewidth=0.8, zorder=1)
            for b in row.baselines:
                if b.ratio:
                    color, marker = style[b.name]
                    (handles[b.name],) = axes.plot(
                        b.ratio, i, marker, color=color, markersize=6, markeredgecolor="white", markeredgewidth=0.5,
                        linestyle="none", zorder=3, clip_on=False,
                    )  # fmt: skip
            axes.text(1.015, i, _right_label(row), transform=axes.get_yaxis_transform(), fontsize=8, va="center")
        labels = [f"{row.what}   {row.isa}, {row.threads} thread{'s' * (row.threads > 1)}" for row in members]
        axes.set_yticks(range(len(members)), labels, fontsize=8)
        last = group == list(groups)[-1]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", length=0, labelsize=8, labelbottom=last, colors="0.35")
        axes.grid(axis="x", color="0.88", linewidth=0.8)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.legend(
        handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(0.015, 1 - 0.68 / height), ncols=4,
        frameon=False, fontsize=8.5, handletextpad=0.1, columnspacing=1.5, borderaxespad=0,
    )  # fmt: skip
    figure.savefig(path, metadata={"Software": "engram-kernels"})


def _right_label(row: Row) -> str:
    if row.seconds is None:
        return f"{row.peak_bytes / 2**20:.0f} MiB" if row.peak_bytes is not None else ""
    milliseconds = 1e3 * row.seconds
    text = f"{number(milliseconds)} ms" if milliseconds >= 0.1 else f"{number(1e3 * milliseconds)} µs"
    return text if row.bound_fraction is None else f"{text}, {row.bound_fraction:.0%} of bound"
