"""How a training step grows: ``python benchmarks/growth.py --output DIR`` writes growth.json and growth.png.

Step time and peak memory above import of 784-H-H-10 against H, the engram's rate, the samples of a batch and the
threads: ours exact, ours compact (int8 moments, fused), *published* and the fastest *compiled*. Times are medians, all
contenders in turns; memory is that of ``memory_probe.py``. The baselines have no gate: flat lines against the rate.

Two bounds are drawn. No step takes less time than to read and write its hidden weights and moments once, measured by a
multiplication in place of as many bytes, and to multiply its signs forward on registers (``bound.cpp``); what the
backward pass takes besides has no such bound. No step has less memory than its hidden weights and moments.
"""

from __future__ import annotations

import argparse
import functools
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bound import register_loop
from measure import Contender, alternate, available_bytes, environment, torch_threads
from memory_probe import peak_bytes_in_fresh_process
from report import header
from steps import BATCH, RATE, batch, fastest_way, initial_state, make_step, sizes_of
from tqdm import tqdm

import engram_kernels as ek


class Point(NamedTuple):
    """The size of a step."""

    hidden: int = 4096
    rate: float = RATE
    samples: int = BATCH
    threads: int = 2


SWEEPS = {
    "hidden": [256, 512, 1024, 2048, 4096, 8192],
    "rate": [0.01, 0.03, 0.1, 0.3, 1.0],
    "samples": [10, 100, 1000],
    "threads": [1, 2],
}
LABELS = {
    "exact, fused": "ours, exact",
    "compact int8": "ours, engram and\ncompact state",
    "published": "published",
    "compiled": "compiled",
}
OURS = ["exact, fused", "compact int8"]
RATE_LABELS = {"exact, fused": "ours, float32 state", "compact int8": "ours, compact state"}
BYTES_OF_STATE = {"exact, fused": 12.0, "compact int8": 4 + 2 + 2 * 4 / 64}  # weight, moments, scales of 64 units
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


def seconds_of_each(calls: dict[str, Any], rounds: int) -> dict[str, float]:
    """Medians. Raises: RuntimeError if one fails."""
    contenders = {name: Contender(call) for name, call in calls.items()}
    alternate(contenders.values(), rounds)
    errors = {name: contender.error for name, contender in contenders.items() if contender.error}
    if errors:
        raise RuntimeError(f"steps failed: {errors}")
    return {name: contender.median or 0.0 for name, contender in contenders.items()}


def bounds(point: Point) -> dict[str, float]:
    """Seconds that no step of ours takes less than."""
    loop = register_loop(ek.ops.isa())
    state = {name: torch.ones(int(weights_of(point.hidden) * BYTES_OF_STATE[name] / 4)) for name in OURS}
    calls = {name: functools.partial(torch.Tensor.mul_, tensor, 1.0) for name, tensor in state.items()}
    seconds = seconds_of_each(calls if loop is None else calls | {"products": loop.call}, 5)
    products = 0.0
    if loop is not None:
        signs = sum(k * n for k, n in list(pairwise(sizes_of(point.hidden)))[1:])
        products = seconds["products"] * point.samples * signs / loop.work
    return {name: seconds[name] + products for name in OURS}


def measured(point: Point, ways: dict[str, str], gated: bool, bar: tqdm) -> list[dict[str, Any]]:
    """Series by name, and the way that each takes, at one size. ``gated``: the exact step has an engram too."""
    rate = point.rate if gated else None
    with torch_threads(point.threads):
        state = initial_state(sizes_of(point.hidden))
        calls = {}
        for name, way in ways.items():
            step = make_step(way, sizes_of(point.hidden), state, **({"rate": rate} if gated else {}))
            calls[name] = functools.partial(step, *batch(samples=point.samples))
            calls[name]()  # compiles, which a warm-up would take for slowness
        seconds = seconds_of_each(calls, 3 if point.hidden == SWEEPS["hidden"][-1] else 5)
        del calls, state
        least = bounds(point)
    bar.update()
    found = []
    for name, way in ways.items():
        bar.set_postfix_str(f"{way}, H = {point.hidden}, rate {point.rate:g}, {point.samples} samples")
        peak = peak_bytes_in_fresh_process(way, point.hidden, point.threads, rate=rate, samples=point.samples)
        values: dict[str, Any] = dict(
            series=name, way=way, step_milliseconds=1e3 * seconds[name], peak_memory_bytes=peak
        )
        if name in OURS:
            values["least_milliseconds"] = 1e3 * least[name]
            values["least_memory_bytes"] = BYTES_OF_STATE[name] * weights_of(point.hidden)
        found.append(values)
        bar.update()
    return found


def sweep(against: str, bar: tqdm, skipped: list[str]) -> list[dict[str, Any]]:
    """All points of one axis."""
    points = []
    for value in SWEEPS[against]:
        point = Point()._replace(**{against: value})
        ways = {name: name for name in OURS}
        reason = too_large(point.hidden)
        if against != "rate" and reason is None:
            ways |= {"published": "published", "compiled": fastest_way(point.hidden)}
        elif reason:
            skipped.append(f"published and compiled at H = {point.hidden}: {reason}")
        points += [
            dict(against=against, **point._asdict(), **values)
            for values in measured(point, ways, against == "rate", bar)
        ]
    return points


# ---- the picture

COLORS = {"exact, fused": "#0072B2", "compact int8": "#009E73", "published": "#D55E00", "compiled": "#8A5A9E"}
MARKERS = dict(zip(COLORS, "osD^", strict=True))
AXES = {
    "hidden": "hidden units H of each layer",
    "rate": "engram rate: fraction of units recruited",
    "samples": "samples of a batch",
    "threads": "threads",
}


def draw(path: Path, content: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 17.5), dpi=110)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.065, right=0.845, top=0.93, bottom=0.05, wspace=0.62, hspace=0.36)
    base = Point()
    figure.text(0.02, 0.978, "How a training step of 784-H-H-10 grows", fontsize=15, weight="bold")
    figure.text(
        0.02, 0.965, f"{header(content['environment'])} · if not said otherwise H = {base.hidden}, engram rate "
        f"{base.rate:g}, {base.samples} samples, {base.threads} threads", fontsize=8.5, color="0.35",
    )  # fmt: skip
    figure.text(
        0.02, 0.954, "dotted: the least time of ours, to read and write its state once and multiply its signs forward; "
        "the least memory, its state", fontsize=8.5, color="0.35",
    )  # fmt: skip
    if content["skipped"]:
        figure.text(0.02, 0.012, "skipped: " + "; ".join(content["skipped"]), fontsize=8.5, color="0.35")
    panels = figure.subplots(len(SWEEPS), 2)
    for row, against in enumerate(SWEEPS):
        for column, quantity in enumerate(("milliseconds", "memory_bytes")):
            _panel(panels[row][column], content["points"], against, quantity)
    figure.savefig(path, metadata={"Software": "engram-kernels"})


def _panel(axes, all_points: list[dict], against: str, quantity: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    scale = 1.0 if quantity == "milliseconds" else 2**-20
    value, least = ("step_milliseconds" if quantity == "milliseconds" else f"peak_{quantity}"), f"least_{quantity}"
    ends = []
    for name, label in LABELS.items():
        mine = sorted(
            (p[against], scale * p[value], scale * p.get(least, 0))
            for p in all_points
            if p["against"] == against and p["series"] == name and p[value] is not None
        )
        if mine:
            x, y, bound = zip(*mine, strict=True)
            axes.plot(x, y, color=COLORS[name], marker=MARKERS[name], markersize=5, linewidth=2)
            if name in OURS:
                axes.plot(x, bound, color=COLORS[name], linewidth=1.2, linestyle=":")
            ends.append((y[-1], RATE_LABELS[name] if against == "rate" else label, COLORS[name]))
        elif against == "rate":
            flat = [p[value] for p in all_points if p["against"] == "hidden" and p["series"] == name
                    and p["hidden"] == Point().hidden]  # fmt: skip
            if flat and flat[0]:
                axes.axhline(scale * flat[0], color=COLORS[name], linewidth=2, linestyle=(0, (5, 2)))
                ends.append((scale * flat[0], f"{label} (no gate)", COLORS[name]))
    ticks = SWEEPS[against]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    title = "Time per step (ms)" if quantity == "milliseconds" else "Peak memory above import (MiB)"
    axes.set_title(title, fontsize=11, weight="bold", loc="left")
    axes.set_xlabel(AXES[against])
    _label_ends(axes, ends)


def _label_ends(axes, ends: list[tuple[float, str, str]]) -> None:
    """Names each line at its right end, labels pushed apart so that none covers another."""
    low, high = axes.get_ylim()
    position = axes.transAxes.inverted().transform
    gap = 0.13
    ends = sorted(ends)
    lines = [
        position(axes.transData.transform((axes.get_xlim()[1], min(max(value, low), high))))[1] for value, *_ in ends
    ]
    labels = list(lines)
    for i in range(1, len(labels)):
        labels[i] = max(labels[i], labels[i - 1] + gap)
    labels[-1] = min(labels[-1], 1.0)
    for i in reversed(range(len(labels) - 1)):
        labels[i] = min(labels[i], labels[i + 1] - gap)
    for line, at, (_, text, color) in zip(lines, labels, ends, strict=True):
        axes.annotate(
            text, xy=(1.0, line), xytext=(1.035, at), xycoords="axes fraction", textcoords="axes fraction",
            annotation_clip=False, va="center", fontsize=9, color=color, weight="bold",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 1},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    points: list[dict] = []
    skipped: list[str] = []
    torch.manual_seed(0)
    with tqdm(total=sum(len(values) * (3 if a == "rate" else 5) for a, values in SWEEPS.items()), unit="figure") as bar:
        for against in SWEEPS:
            points += sweep(against, bar, skipped)
    content = dict(environment=environment(), skipped=skipped, points=points)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "growth.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(arguments.output / "growth.png", content)
    for text in skipped:
        print(f"skipped: {text}")
    print(f"wrote {arguments.output / 'growth.json'} and growth.png")


if __name__ == "__main__":
    main()
