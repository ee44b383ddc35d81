"""Makes RESULTS.md, SEARCH.md and pictures of what lies in results/: ``python benchmarks/continual/report.py``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from experiments import EXPERIMENTS
from jobs import RESULTS
from matplotlib.figure import Figure
from search import GRIDS

HERE = Path(__file__).parent
OURS, BINARY, FULL, BOUND = "#0072B2", "#56B4E9", "#E69F00", "#999999"  # Okabe and Ito: for every kind of colour vision
Rows = dict[str, list[dict[str, Any]]]


def load(name: str) -> Rows:
    """Finished runs by label, in the order of the experiment's jobs."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    found: Rows = {}
    for job in EXPERIMENTS[name].jobs:
        own = [row for row in rows if row["label"] == job.label and "error" not in row]
        if own:
            found[job.label] = sorted(own, key=lambda row: row["seed"])
    return found


def last_row(row: dict[str, Any]) -> list[float]:
    """Accuracy on every task at the end."""
    return row["accuracy_matrix"][-1] if "accuracy_matrix" in row else row["last_row"]


def diagonal(row: dict[str, Any]) -> list[float]:
    """Accuracy on every task when it was learned."""
    return row["diagonal"] if "diagonal" in row else [a[i] for i, a in enumerate(row["accuracy_matrix"])]


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± deviation of a sample."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def colour(label: str) -> str:
    """By kind of method."""
    if label.startswith("engram-fp"):
        return FULL
    if label.startswith("engram"):
        return OURS
    if label.startswith(("mbnn", "bnn", "m ")):
        return BINARY
    return BOUND if label.startswith(("joint", "replay")) else FULL


def accuracy_table(rows: Rows) -> list[str]:
    """One line a method: accuracy, transfer, time and memory."""
    lines = [
        "| method | average accuracy, % | backward transfer, points | seeds | ms per step | peak memory, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label, own in rows.items():
        accuracy = spread([100 * row["average_accuracy"] for row in own])
        transfer = [100 * row["backward_transfer"] for row in own if row["backward_transfer"] is not None]
        lines.append(
            f"| {label} | {accuracy} | {spread(transfer) if transfer else '-'} | {len(own)} | "
            f"{statistics.median(row['step_milliseconds'] for row in own):.1f} | "
            f"{statistics.median(row['peak_memory_bytes'] for row in own) / 1e6:.0f} |"
        )
    return lines


def commands(rows: Rows) -> list[str]:
    """The commands of a table, folded."""
    lines = ["<details><summary>Commands (add <code>--data-dir DIR</code>; one for each seed)</summary>", "", "```"]
    lines += [f"{own[0]['command']}" for own in rows.values()]
    return [*lines, "```", "", "</details>"]


def bars(rows: Rows, title: str, path: Path, chance: float) -> None:
    """Accuracies as bars, every seed a point."""
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for at, (label, own) in enumerate(rows.items()):
        values = [100 * row["average_accuracy"] for row in own]
        mean = statistics.fmean(values)
        axes.barh(at, mean, color=colour(label), alpha=0.85, height=0.72)
        axes.plot(values, [at] * len(values), "o", color="black", markersize=2.5, alpha=0.6)
        axes.text(max(mean, max(values)) + 0.8, at, f"{mean:.1f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.axvline(chance, color="0.4", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("average accuracy over all tasks after the last (%); dashed: chance")
    axes.set_title(title, loc="left", fontsize=11)
    kinds = {"engram (binary)": OURS, "other binary": BINARY, "full precision": FULL, "sees old data": BOUND}
    axes.legend(
        [matplotlib.patches.Patch(color=c) for c in kinds.values()], list(kinds), fontsize=8, ncols=4, frameon=False,
        loc="lower right", bbox_to_anchor=(1.0, 1.0),
    )  # fmt: skip
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def write_search() -> None:
    """SEARCH.md: every grid."""
    lines = [
        "# How the hyper-parameters were chosen", "",
        "Average accuracy on the last 5000 training images, which were not trained on, with seed 100, which no result "
        "uses. `python benchmarks/continual/search.py GRID --data-dir DIR` repeats a grid.",
    ]  # fmt: skip
    for name, jobs in GRIDS.items():
        path = RESULTS / "search" / f"{name}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        found = {row["label"]: row for row in rows if "error" not in row}
        own = [(job.label, found[job.label]) for job in jobs if job.label in found]
        if own:
            best = max(100 * row["average_accuracy"] for _, row in own)
            lines += ["", f"## {name}", "", "| value | accuracy, % |", "| --- | --- |"]
            for label, row in own:
                value = 100 * row["average_accuracy"]
                lines.append(f"| {label} | {f'**{value:.2f}**' if value == best else f'{value:.2f}'} |")
            lines += ["", f"`{own[0][1]['command']} --data-dir DIR` and so on."]
    (HERE / "SEARCH.md").write_text("\n".join(lines) + "\n")


def rounded(values: list[float]) -> str:
    """Percent without decimals, for rows of tasks."""
    return " ".join(f"{100 * value:.0f}" for value in np.asarray(values))
