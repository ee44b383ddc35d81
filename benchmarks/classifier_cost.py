"""What learning, asking and remembering cost EngramClassifier and its peers: ``python benchmarks/classifier_cost.py``.

Writes results/classifier-cost.json and, as ``--draw`` alone does, classifier-cost.png. Images are random bytes of
MNIST's shape; no method's work depends on their content. Times are processor seconds of one thread, medians of rounds
in which all take turns, so that other programs matter little. Memory is the peak above what the process held before,
in a process of its own. The peers are those of continual/peers.py, in float32 as published.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import environment, peak_bytes_of, torch_threads
from report import header

import engram_kernels as ek
from engram_kernels.moments import SecondMoments

sys.path.insert(0, str(Path(__file__).parent / "continual"))
from peers import RanPAC, StreamingLDA

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "classifier-cost.json"
PIXELS, CLASSES = 784, 10
FEATURES = 512  # as of embeddings, where one sample more is learned
UNITS = [1024, 2048, 4096, 8192, 16384]
SAMPLES = [1024, 2048, 4096, 8192]
MEMORY_UNITS = [1024, 2048, 4096, 8192, 10_000]
AT_UNITS, AT_SAMPLES = 4096, 2048  # where the other one grows
PSEUDO_INVERSE_UNITS = 1024  # where StreamingLDA is asked for an answer: with 4096 it would take minutes
WHOLE_UNITS, WHOLE_SAMPLES = [2048, 8192], 60_000  # a pass over as many images as MNIST has, and an answer
PARTS = ["memory", "pairs_ratio", "one_more", "units", "samples", "whole"]
WAYS = ["whole images", "patches", "RanPAC"]
LABELS = {"whole images": "ours, projections", "patches": "ours, patches", "RanPAC": "RanPAC"}


def images(samples: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (samples, PIXELS), dtype=np.uint8)
    x[:, :2] = [0, 255]
    return x, np.arange(samples) % CLASSES


def learner(way: str, units: int) -> Callable[[np.ndarray, np.ndarray], Any]:
    """``partial_fit`` of a new model, for images."""
    if way == "RanPAC":
        peer = RanPAC(PIXELS, units, CLASSES, penalty=1e-4)
        return lambda x, y: peer.partial_fit(torch.from_numpy(x).float() / 255, torch.from_numpy(y))
    return ek.EngramClassifier(units, **({"image_shape": (28, 28)} if way == "patches" else {})).partial_fit


def processor_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians, all calls in turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in found.items()}


# ---- what is measured


def growth(against: str, rounds: int) -> list[dict[str, Any]]:
    """Learning of so many samples with so many units by a model that exists, without the solution."""
    points = []
    for size in UNITS if against == "units" else SAMPLES:
        units, samples = (size, AT_SAMPLES) if against == "units" else (AT_UNITS, size)
        x, y = images(samples)
        learn = {way: learner(way, units) for way in WAYS}
        for call in learn.values():
            call(x[:CLASSES], y[:CLASSES])  # makes the code
        calls = {way: functools.partial(call, x, y) for way, call in learn.items()}
        for way, seconds in processor_seconds(calls, rounds).items():
            points.append({"units": units, "samples": samples, "way": way, "seconds": seconds})
            print(points[-1], flush=True)
    return points


def whole(units: int, rounds: int) -> dict[str, float]:
    """Seconds of a new model to learn all images and to answer for one, the solution included."""
    x, y = images(WHOLE_SAMPLES)
    return processor_seconds(
        {way: lambda way=way: learner(way, units)(x, y).predict(_question(way, x[:1])) for way in WAYS}, rounds
    )


def _question(way: str, x: np.ndarray) -> Any:
    return torch.from_numpy(x).float() / 255 if way == "RanPAC" else x


def pairs(rounds: int) -> float:
    """How many times faster pairs are counted than the float32 product of the same codes is made."""
    bits = ek.ops.pack_signs(torch.randn(8192, AT_UNITS) - 0.7)
    codes = ek.ops.unpack_signs(bits, AT_UNITS).add_(1).div_(2)
    moments, y = SecondMoments(AT_UNITS), torch.zeros(len(bits), dtype=torch.int64)
    moments.place_classes({}, 1)
    took = processor_seconds({"count": lambda: moments.add(bits, y), "product": lambda: codes.T @ codes}, rounds)
    return took["product"] / took["count"]


def one_more(units: int, rounds: int) -> dict[str, float]:
    """Seconds to learn one more sample and to predict one: with our last solution, and with none; and StreamingLDA."""
    rng = np.random.default_rng(0)
    y = np.arange(3 * units) % CLASSES
    x = rng.normal(size=(len(y), FEATURES)) + rng.normal(size=(CLASSES, FEATURES))[y]
    model = ek.EngramClassifier(units).fit(x, y)
    model.predict(x[:1])
    learning = copy.deepcopy(model)
    numbers = itertools.count()
    features, labels = torch.randn(2, units), torch.tensor([0, 1])
    peer = StreamingLDA(units, CLASSES).partial_fit(features, labels)

    def learn(model):
        i = next(numbers)
        return model.partial_fit(x[i : i + 1], y[i : i + 1])

    calls = {
        "ours": lambda: learn(model).predict(x[:1]),
        "ours, learning alone": lambda: learn(learning),
        "ours, a new solution": lambda: learn(copy.deepcopy(model)).predict(x[:1]),  # a copy starts without a factor
        "StreamingLDA, learning alone": lambda: peer.partial_fit(features[:1], labels[:1]),
    }
    if units <= PSEUDO_INVERSE_UNITS:
        calls["StreamingLDA"] = lambda: peer.partial_fit(features[:1], labels[:1]).predict(features[:1])
    took = processor_seconds(calls, rounds)
    took["ours, many at once"] = processor_seconds(
        {"": lambda: ek.EngramClassifier(units).partial_fit(x, y).predict(x[:1])}, rounds
    )[""] / len(y)
    return took


def memory(way: str, units: int) -> dict[str, int | None]:
    """Peak bytes while learning, and with the solution, in this process."""
    x, y = images(1024)
    warm = learner(way, 64)(x, y)  # loads what a library needs once

    def ask(model):
        return model.predict(_question(way, x[:1]))

    ask(warm)
    kept = []
    learning = peak_bytes_of(lambda: kept.append(learner(way, units)(x, y)))
    kept.clear()
    return {"learning": learning, "solving": peak_bytes_of(lambda: ask(learner(way, units)(x, y)))}


def memory_in_fresh_process(way: str, units: int) -> dict[str, int | None]:
    paths = [str(Path(ek.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--memory", way, str(units)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=variables, check=True).stdout)


def measure(parts: list[str], rounds: int) -> None:
    """Measures each part and puts it into the file, in place of what was there."""
    run: dict[str, Callable[[], Any]] = {
        "memory": lambda: [
            {"way": way, "units": units} | memory_in_fresh_process(way, units) for units in MEMORY_UNITS for way in WAYS
        ],
        "pairs_ratio": lambda: pairs(rounds),
        "one_more": lambda: {str(units): one_more(units, rounds) for units in (PSEUDO_INVERSE_UNITS, AT_UNITS)},
        "units": lambda: growth("units", rounds),
        "samples": lambda: growth("samples", rounds),
        "whole": lambda: {str(units): whole(units, rounds) for units in WHOLE_UNITS},
    }
    for part in parts:
        found = run[part]()
        content = json.loads(FILE.read_text()) if FILE.exists() else {}
        content |= {"environment": environment(), "isa": ek.ops.isa(), part: found}
        FILE.write_text(json.dumps(content, indent=1) + "\n")


# ---- the picture

COLORS = {"whole images": "#0072B2", "patches": "#009E73", "RanPAC": "#D55E00"}


def draw(path: Path, content: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.9), dpi=130)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.055, right=0.985, top=0.78, bottom=0.125, wspace=0.22)
    figure.text(0.02, 0.93, "What learning images of 784 pixels costs", fontsize=15, weight="bold")
    figure.text(0.02, 0.88, f"{header(content['environment'])} · 1 thread", fontsize=8.5, color="0.35")
    panels = figure.subplots(1, 3)
    for axes, against in zip(panels, ("units", "samples"), strict=False):
        points = content[against]
        for way in WAYS:
            x, y = zip(*[(p[against], p["seconds"]) for p in points if p["way"] == way], strict=True)
            label = f"{LABELS[way]}, slope {slope(x, y):.1f}"
            axes.plot(x, y, color=COLORS[way], marker="o", markersize=5, linewidth=2, label=label)
        at = f"{AT_SAMPLES} samples" if against == "units" else f"{AT_UNITS} units"
        _axes(axes, f"Processor seconds, {at}", f"{against} (slope: of the last doubling)")
    for way in WAYS:
        for key, style in (("learning", "-"), ("solving", (0, (4, 2)))):
            x, y = zip(*[(p["units"], p[key] / 1e6) for p in content["memory"] if p["way"] == way], strict=True)
            text = f"{LABELS[way]}{', with the solution' if key == 'solving' else ''}"
            panels[2].plot(x, y, color=COLORS[way], linestyle=style, marker="o", markersize=4, linewidth=2, label=text)
    _axes(panels[2], "Peak memory (MB)", "units")
    panels[2].set_ylim(top=12 * panels[2].get_ylim()[1])  # room for the legend
    figure.savefig(path, metadata={"Software": "engram-kernels"})


def slope(x: tuple[float, ...], y: tuple[float, ...]) -> float:
    """The power with which y grows between the last two points."""
    return math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2])


def _axes(axes: Any, title: str, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, fontsize=11, weight="bold", loc="left")
    axes.set_xlabel(label)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure, by default all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help="draw what was measured before, and measure nothing")
    parser.add_argument("--memory", nargs=2, metavar=("WAY", "UNITS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch_threads(1):
        if arguments.memory:
            print(json.dumps(memory(arguments.memory[0], int(arguments.memory[1]))))
            return
        if not arguments.draw:
            measure(arguments.parts, arguments.rounds)
    draw(FILE.with_suffix(".png"), json.loads(FILE.read_text()))


if __name__ == "__main__":
    main()
