"""How a training step grows: ``python benchmarks/growth.py --output DIR`` writes growth.json and growth.png.

Step time and peak memory above import of 784-H-H-10 at batch 100, against H at one engram rate and against the rate at
one H: ours exact, ours compact (int8 moments, fused), *published* and the fastest *compiled*. Times are medians, all
contenders in turns; memory is that of ``memory_probe.py``. The baselines have no gate: flat lines against the rate.
"""

from __future__ import annotations

import argparse
import functools
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measure import Contender, alternate, available_bytes, environment, torch_threads
from memory_probe import peak_bytes_in_fresh_process
from report import header
from steps import RATE, batch, fastest_way, initial_state, make_step, sizes_of
from tqdm import tqdm

HIDDEN = [256, 512, 1024, 2048, 4096, 8192]
RATES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
RATE_HIDDEN = 4096
LABELS = {
    "exact, fused": "ours, exact",
    "compact int8": "ours, engram and\ncompact state",
    "published": "published",
    "compiled": "compiled",
}
OURS = ["exact, fused", "compact int8"]
RATE_LABELS = {"exact, fused": "ours, float32 state", "compact int8": "ours, compact state"}
# What all four steps take together in one process, per hidden weight: weights, copies, gradients, moments, temporaries.
BYTES_PER_WEIGHT = 80


def weights_of(hidden: int) -> int:
    sizes = sizes_of(hidden)
    return sum(k * n for k, n in pairwise(sizes))


def too_large(hidden: int) -> str | None:
    """Why the baselines are skipped at this size, if they are."""
    needed, available = BYTES_PER_WEIGHT * weights_of(hidden), available_bytes()
    if available is not None and needed > available:
        return f"needs about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free"
    return None


def measure_times(steps: dict[str, Any], rounds: int) -> dict[str, float | None]:
    contenders = {name: Contender(functools.partial(step, *batch())) for name, step in steps.items()}
    for contender in contenders.values():
        contender.call()  # compiles, which a warm-up would take for slowness
    alternate(contenders.values(), rounds)
    errors = {name: contender.error for name, contender in contenders.items() if contender.error}
    if errors:
        raise RuntimeError(f"steps failed: {errors}")
    return {name: contender.median for name, contender in contenders.items()}


def against_hidden(points: list[dict], skipped: list[str], threads: int, bar: tqdm) -> None:
    for hidden in HIDDEN:
        reason = too_large(hidden)
        if reason:
            names = {name: name for name in OURS}
            skipped.append(f"published and compiled at H = {hidden}: {reason}")
        else:
            names = {name: name for name in [*OURS, "published"]} | {"compiled": fastest_way(hidden)}
        state = initial_state(sizes_of(hidden))
        steps = {name: make_step(way, sizes_of(hidden), state) for name, way in names.items()}
        times = measure_times(steps, 3 if hidden == HIDDEN[-1] else 5)
        del steps, state
        bar.update()
        for name, way in names.items():
            bar.set_postfix_str(f"H = {hidden}, {way}")
            peak = peak_bytes_in_fresh_process(way, hidden, threads)
            points.append(_point("hidden", hidden, RATE, name, way, times[name], peak))
            bar.update()
        bar.update(len(LABELS) - len(names))


def against_rate(points: list[dict], threads: int, bar: tqdm) -> None:
    """Ours at every rate, both with a gate: only the state tells them apart here."""
    state = initial_state(sizes_of(RATE_HIDDEN))
    for rate in RATES:
        steps = {name: make_step(name, sizes_of(RATE_HIDDEN), state, rate=rate) for name in OURS}
        times = measure_times(steps, 5)
        del steps
        bar.update()
        for name in OURS:
            bar.set_postfix_str(f"rate {rate:g}, {name}")
            peak = peak_bytes_in_fresh_process(name, RATE_HIDDEN, threads, rate=rate)
            points.append(_point("rate", RATE_HIDDEN, rate, name, name, times[name], peak))
            bar.update()


def _point(against, hidden, rate, name, way, seconds, peak) -> dict[str, Any]:
    values = dict(series=name, way=way, step_milliseconds=1e3 * seconds, peak_memory_bytes=peak)
    return dict(against=against, hidden=hidden, rate=rate, **values)


# ---- the picture

COLORS = {"exact, fused": "#0072B2", "compact int8": "#009E73", "published": "#D55E00", "compiled": "#8A5A9E"}
MARKERS = dict(zip(COLORS, "osD^", strict=True))


def draw(path: Path, content: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.2), dpi=130)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.065, right=0.845, top=0.865, bottom=0.09, wspace=0.62, hspace=0.36)
    figure.text(0.02, 0.965, "How a training step grows: 784-H-H-10, batch 100", fontsize=15, weight="bold")
    threads = content["threads"]
    figure.text(
        0.02, 0.937, f"{header(content['environment'])} · {threads} threads", fontsize=8.5, color="0.35"
    )  # fmt: skip
    if content["skipped"]:
        figure.text(0.02, 0.012, "skipped: " + "; ".join(content["skipped"]), fontsize=8.5, color="0.35")
    panels = figure.subplots(2, 2)
    for column, against in enumerate(("hidden", "rate")):
        for row, quantity in enumerate(("step_milliseconds", "peak_memory_bytes")):
            _panel(panels[row][column], content, against, quantity)
    figure.savefig(path, metadata={"Software": "engram-kernels"})


def _panel(axes, content, against: str, quantity: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    scale = 1.0 if quantity == "step_milliseconds" else 2**-20
    points = [p for p in content["points"] if p["against"] == against and p[quantity] is not None]
    ends = []
    for name in LABELS:
        mine = [(p[against], scale * p[quantity]) for p in points if p["series"] == name]
        if mine:
            x, y = zip(*sorted(mine), strict=True)
            axes.plot(x, y, color=COLORS[name], marker=MARKERS[name], markersize=5, linewidth=2)
            label = RATE_LABELS[name] if against == "rate" else LABELS[name]
            ends.append((y[-1], label, COLORS[name]))
        elif against == "rate":
            flat = [
                scale * p[quantity]
                for p in content["points"]
                if p["against"] == "hidden" and p["series"] == name and p["hidden"] == content["rate_hidden"]
            ]
            if flat and flat[0]:
                axes.axhline(flat[0], color=COLORS[name], linewidth=2, linestyle=(0, (5, 2)))
                ends.append((flat[0], f"{LABELS[name]} (no gate)", COLORS[name]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = HIDDEN if against == "hidden" else RATES
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    what = "Time per step (ms)" if quantity == "step_milliseconds" else "Peak memory above import (MiB)"
    where = f"engram rate {RATE:g}" if against == "hidden" else f"H = {content['rate_hidden']}"
    axes.set_title(f"{what}, {where}", fontsize=11, weight="bold", loc="left")
    axes.set_xlabel(
        "hidden units H of each layer" if against == "hidden" else "engram rate: fraction of units recruited"
    )
    _label_ends(axes, ends)


def _label_ends(axes, ends: list[tuple[float, str, str]]) -> None:
    """Names each line at its right end, labels pushed apart so that none covers another."""
    low, high = axes.get_ylim()
    position = axes.transAxes.inverted().transform
    gap, last = 0.09, -1.0
    for value, label, color in sorted(ends):
        end = position(axes.transData.transform((axes.get_xlim()[1], min(max(value, low), high))))[1]
        last = max(end, last + gap)
        axes.annotate(
            label, xy=(1.0, end), xytext=(1.035, last), xycoords="axes fraction", textcoords="axes fraction",
            annotation_clip=False, va="center", fontsize=9, color=color, weight="bold",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 1},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    points: list[dict] = []
    skipped: list[str] = []
    torch.manual_seed(0)
    total = len(HIDDEN) * (1 + len(LABELS)) + len(RATES) * (1 + len(OURS))
    with torch_threads(arguments.threads), tqdm(total=total, unit="measurement") as bar:
        against_hidden(points, skipped, arguments.threads, bar)
        against_rate(points, arguments.threads, bar)
    content = dict(
        environment=environment(), threads=arguments.threads, rate_hidden=RATE_HIDDEN, skipped=skipped, points=points
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "growth.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(arguments.output / "growth.png", content)
    for text in skipped:
        print(f"skipped: {text}")
    print(f"wrote {arguments.output / 'growth.json'} and growth.png")


if __name__ == "__main__":
    main()
