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

from engram_kernels.continual import plots

HERE = Path(__file__).parent
OURS, BINARY, FULL, BOUND = plots.BLUE, plots.SKY, plots.ORANGE, plots.GREY
Rows = dict[str, list[dict[str, Any]]]
PERMUTED_PENALTIES = "82 to 97, by protocol"
PUBLISHED = {
    "split, finetune": "19.9",
    "split, ewc": "about 20",
    "split, si": "19 to 21",
    "split, lwf": "22 to 23",
    "permuted, ewc": PERMUTED_PENALTIES,
    "permuted, si": PERMUTED_PENALTIES,
}  # average accuracies, %: those that van de Ven and Tolias 2019 and later comparisons report


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


def cell_text(label: str) -> str:
    """A label in a table of Markdown."""
    return label.replace("|", r"\|")


def colour(label: str) -> str:
    """By kind of method."""
    if label.startswith("engram-fp"):
        return FULL
    if label.startswith(("engram", "classifier")):
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
    figure = Figure(figsize=(9, 0.3 * len(rows) + 1.6), dpi=130, layout="constrained")
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
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=11)
    kinds = {"ours (binary)": OURS, "other binary": BINARY, "full precision": FULL, "sees old data": BOUND}
    axes.legend(
        [matplotlib.patches.Patch(color=c) for c in kinds.values()], list(kinds), fontsize=8, ncols=4, frameon=False,
        loc="upper center", bbox_to_anchor=(0.5, 0.0), bbox_transform=axes.transAxes, borderaxespad=4.5,
    )  # fmt: skip
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def ablation_picture(rows: Rows, path: Path) -> None:
    """Accuracies of each block of variants, and a line at its unchanged recipe."""
    blocks = {
        "two trained hidden layers, 10-way output": [name for name in rows if not name.startswith("100 segments")],
        "100 segments": [name for name in rows if name.startswith("100 segments")],
    }
    blocks = {title: labels for title, labels in blocks.items() if labels}
    figure = Figure(figsize=(9, 0.3 * len(rows) + 2.2), dpi=130, layout="constrained")
    heights = [len(labels) for labels in blocks.values()]
    for axes, (title, labels) in zip(
        figure.subplots(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0], blocks.items(), strict=True
    ):
        unchanged = 100 * statistics.fmean(row["average_accuracy"] for row in rows[labels[0]])
        axes.axvline(unchanged, color="0.4", linewidth=1, linestyle=(0, (4, 3)))
        for at, label in enumerate(labels):
            values = [100 * row["average_accuracy"] for row in rows[label]]
            mean = statistics.fmean(values)
            axes.barh(at, mean, color=OURS if at == 0 else BINARY, alpha=0.85, height=0.72)
            axes.plot(values, [at] * len(values), "o", color="black", markersize=2.5, alpha=0.6)
            axes.text(max(unchanged, *values) + 0.8, at, f"{mean:.1f}", va="center", fontsize=9)
        names = ["unchanged"] + [label.removeprefix("100 segments, ") for label in labels[1:]]
        axes.set_yticks(range(len(labels)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 105)
        axes.set_title(title, loc="left", fontsize=11)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    axes.set_xlabel("average accuracy on Split-MNIST after the last task (%)")
    figure.savefig(path)


def memory_picture(rows: Rows, path: Path) -> None:
    """Peak memory on the left, time per thousand samples on the right."""
    figure = Figure(figsize=(11, 0.3 * len(rows) + 1.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for at, (label, own) in enumerate(rows.items()):
        memory = statistics.median(row["peak_memory_bytes"] for row in own) / 1e6
        samples = 2 * 5000 / own[0]["steps"]
        seconds = statistics.median(row["step_milliseconds"] for row in own) / samples
        for axes, value, text in ((left, memory, f"{memory:.0f}"), (right, seconds, f"{seconds:.2f}")):
            axes.barh(at, value, color=colour(label), alpha=0.85, height=0.72)
            axes.text(value, at, f" {text}", va="center", fontsize=9)
    left.set_yticks(range(len(rows)), list(rows))
    left.invert_yaxis()
    left.set_xlabel("peak memory of training (MB)")
    right.set_xlabel("seconds of training steps per 1000 samples")
    for axes in (left, right):
        axes.margins(x=0.12)
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


def long_table(rows: Rows) -> list[str]:
    """Accuracy on the newest task, the last ten and all, at the end."""
    lines = [
        "| consolidation | newest task, % | last ten, % | all, % | when learned: last ten, % |",
        "| --- " * 5 + "|",
    ]
    for label, own in rows.items():
        ends, learned = [last_row(row) for row in own], [diagonal(row) for row in own]
        cells = [
            [100 * end[-1] for end in ends],
            [100 * statistics.fmean(end[-10:]) for end in ends],
            [100 * statistics.fmean(end) for end in ends],
            [100 * statistics.fmean(each[-10:]) for each in learned],
        ]
        lines.append(f"| {cell_text(label)} | " + " | ".join(spread(cell) for cell in cells) + " |")
    return lines


def long_picture(rows: Rows, title: str, path: Path) -> None:
    """Left: accuracy on each task when it was learned. Right: at the end, on each task of the stream."""
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = {c: iter(("-", "--", ":", "-.")) for c in (FULL, OURS)}
    for label, own in rows.items():
        c = OURS if label.startswith("trained") else FULL
        line = next(styles[c])
        learned, end = np.mean([diagonal(row) for row in own], 0), np.mean([last_row(row) for row in own], 0)
        task = np.arange(1, len(end) + 1)
        left.plot(task, 100 * learned, line, color=c, label=label)
        right.plot(task, 100 * end, line, color=c, label=label)
    left.set_title(f"{title}: each task when it was learned", loc="left", fontsize=10)
    right.set_title("each task at the end of the stream", loc="left", fontsize=10)
    left.set_ylabel("test accuracy (%)")
    left.set_ylim(0, 100)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9, ncols=3)
    for axes in (left, right):
        axes.set_xlabel("task")
        axes.grid(axis="y", color="0.9")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)


def domain_table(rows: Rows) -> list[str]:
    """The first data set when learned and at the end, and the second."""
    lines = ["| method | first, when learned | first, at the end | lost, points | second | seeds |", "| --- " * 6 + "|"]
    for label, own in rows.items():
        before = [100 * diagonal(row)[0] for row in own]
        after = [100 * last_row(row)[0] for row in own]
        lost = [a - b for a, b in zip(before, after, strict=True)]
        second = [100 * last_row(row)[1] for row in own]
        lines.append(f"| {label} | {' | '.join(map(spread, (before, after, lost, second)))} | {len(own)} |")
    return lines


def published_baselines_table(rows: Rows) -> list[str]:
    """What each baseline reaches here, and what it is known for."""
    lines = ["| stream, method | here, % | published, % | seeds |", "| --- " * 4 + "|"]
    for label, own in rows.items():
        here = spread([100 * row["average_accuracy"] for row in own], digits=2)
        lines.append(f"| {label} | {here} | {PUBLISHED.get(label, '-')} | {len(own)} |")
    return lines


def published_table(rows: list[dict[str, Any]]) -> list[str]:
    """Accuracy on each of the six tasks at the end; the largest network first."""
    lines = [
        "| hidden | step size | metaplasticity | normalisation at test | task 1 | 2 | 3 | 4 | 5 | 6 | mean | seeds |",
        "| --- " * 12 + "|",
    ]
    for hidden, lr, m in sorted({(-row["hidden"], -row["lr"], row["metaplasticity"]) for row in rows}):
        own = [row for row in rows if (-row["hidden"], -row["lr"], row["metaplasticity"]) == (hidden, lr, m)]
        for name, meaning in (
            ("own normalisation", "each task's own (uses its label)"),
            ("last normalisation", "the last task's"),
        ):
            ends = 100 * np.array([row[name][-1] for row in own])
            cells = [spread(list(ends[:, j])) for j in range(ends.shape[1])]
            lines.append(
                f"| 2 x {-hidden} | {-lr:g} | {m:g} | {meaning} | {' | '.join(cells)} | {spread(list(ends.mean(1)))} | "
                f"{len(own)} |"
            )
    return lines


def main() -> None:
    """Writes what there are results for."""
    write_search()
    parts = json.loads((HERE / "comments.json").read_text())
    lines = ["# Continual learning: what was measured", "", *parts["head"]]
    pictures = HERE / "pictures"
    pictures.mkdir(exist_ok=True)

    def section(title: str, name: str, rows: Rows, body: list[str], picture: str | None = None) -> None:
        if not rows:
            return
        lines.extend(["", f"## {title}", "", *parts.get(name, []), ""])
        if picture:
            lines.extend([f"![{title}](pictures/{picture})", ""])
        lines.extend([*body, "", *commands(rows)])

    for data, title in (("mnist", "Split-MNIST"), ("fashion-mnist", "Split-Fashion-MNIST")):
        name = f"split-{data}"
        rows = load(name)
        if rows:
            bars(rows, f"{title}, class-incremental, five tasks of two classes", pictures / f"{name}.png", chance=10)
        section(f"{title}, class-incremental", name, rows, accuracy_table(rows), f"{name}.png")
    rows = load("permuted")
    if rows:
        bars(rows, "Permuted MNIST, ten tasks", pictures / "permuted.png", chance=10)
    section("Permuted MNIST, ten tasks", "permuted", rows, accuracy_table(rows), "permuted.png")
    for name, title in (
        ("domain-mnist-first", "MNIST, then Fashion-MNIST"),
        ("domain-fashion-mnist-first", "Fashion-MNIST, then MNIST"),
    ):
        rows = load(name)
        section(title, name, rows, domain_table(rows))
    rows = load("published-baselines")
    section("The baselines on their published settings", "published-baselines", rows, published_baselines_table(rows))
    path = RESULTS / "published.json"
    if path.exists():
        lines.extend(["", "## The published result of metaplasticity", "", *parts.get("published", []), ""])
        lines.extend(published_table(json.loads(path.read_text())))
    for name, title in (("long-50", "50 permuted tasks"), ("long-100", "100 permuted tasks")):
        rows = load(name)
        if rows:
            long_picture(rows, title, pictures / f"{name}.png")
        section(title, name, rows, long_table(rows), f"{name}.png")
    rows = load("ablation")
    if rows:
        ablation_picture(rows, pictures / "ablation.png")
    section("What each part earns", "ablation", rows, accuracy_table(rows), "ablation.png")
    rows = load("compact")
    section("What compact state costs", "compact", rows, accuracy_table(rows))
    rows = load("memory")
    if rows:
        memory_picture(rows, pictures / "memory.png")
    section("Memory and time", "memory", rows, memory_table(rows), "memory.png")
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n")


def memory_table(rows: Rows) -> list[str]:
    """Peak memory and time beside those of ewc."""

    def of(name: str, label: str) -> float:
        return statistics.median(row[name] for row in rows[label])

    lines = ["| method | peak memory, MB | of ewc's | ms per step | samples per step |", "| --- " * 5 + "|"]
    for label in rows:
        memory = of("peak_memory_bytes", label)
        share = f"{100 * memory / of('peak_memory_bytes', 'ewc'):.0f} %" if "ewc" in rows else "-"
        samples = 2 * 5000 / of("steps", label)
        lines.append(
            f"| {label} | {memory / 1e6:.0f} | {share} | {of('step_milliseconds', label):.1f} | {samples:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
