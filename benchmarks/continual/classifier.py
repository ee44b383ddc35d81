"""EngramClassifier against what streams today: one pass, one class at a time, no replay, no task label.

    python benchmarks/continual/classifier.py search --data-dir DIR
    python benchmarks/continual/classifier.py accuracy --data-dir DIR [--datasets ...] [--methods ...] [--units ...]
    python benchmarks/continual/classifier.py table

Every finished run is added to results/classifier.json, or classifier-search.json, so that an interrupted one goes on;
``table`` makes CLASSIFIER.md of them. A seed draws the code, the order of the classes, and for tables the split, 40 %
for the test. SGDClassifier streams standardised features in the same order, with the scaling of the whole training set:
an advantage. Logistic regression and k nearest neighbours see all classes at once, and are bounds.

``search`` chooses the settings of images, ours and those of peers.py, by the last 5000 training images; the test images
take no part in it. Tables have our defaults. Some of the tables come with the packages river and palmerpenguins.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jobs import RESULTS
from peers import RanDumb, RanPAC, StreamingLDA
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import engram_kernels as ek
from engram_kernels.codes import PatchCode
from engram_kernels.continual.data import load

FILE = RESULTS / "classifier.json"
SEARCH_FILE = RESULTS / "classifier-search.json"
COST_FILE = RESULTS.parents[1] / "results" / "classifier-cost.json"
SEARCH_UNITS = 2048
VALIDATION = 5000
UNITS = 8192
LBFGS_STEPS = 100


def penguins() -> tuple[np.ndarray, np.ndarray]:
    """The four measured features of palmerpenguins; two birds without any are left out."""
    from palmerpenguins import load_penguins

    table = load_penguins().dropna(subset="bill_length_mm")
    features = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]
    return table[features].to_numpy(dtype=float), table["species"].to_numpy(dtype=str)


def of_river(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A data set that river ships."""
    from river import datasets

    rows, labels = zip(*getattr(datasets, name)(), strict=True)
    return np.array([list(row.values()) for row in rows], dtype=float), np.array([str(label) for label in labels])


TABLES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "digits": lambda: load_digits(return_X_y=True),
    "iris": lambda: load_iris(return_X_y=True),
    "wine": lambda: load_wine(return_X_y=True),
    "breast cancer": lambda: load_breast_cancer(return_X_y=True),
    "penguins": penguins,
    "image segments": lambda: of_river("ImageSegments"),
    "bananas": lambda: of_river("Bananas"),
    "phishing": lambda: of_river("Phishing"),
}
IMAGES = ("mnist", "fashion-mnist")
OURS = "EngramClassifier"
DENDRITIC = "EngramClassifier, dendritic"


class Task(NamedTuple):
    """Training and test data, whether they are images, units of methods that have them, and data of another kind."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    images: bool
    units: int | None
    other: np.ndarray | None

    @property
    def settings(self) -> dict[str, Any]:
        """Those of our classifier."""
        return {"n_units": self.units, "image_shape": (28, 28)} if self.images else {}


def task(name: str, seed: int, data_dir: Path | None, units: int) -> Task:
    if name in TABLES:
        X, y = TABLES[name]()
        x, x_test, y, y_test = train_test_split(X, y, test_size=0.4, random_state=seed, stratify=y)
        return Task(x, y, x_test, y_test, False, None, None)
    data = load(name, data_dir)
    other = load(IMAGES[1 - IMAGES.index(name)], data_dir)
    arrays = (data.x_train, data.y_train, data.x_test, data.y_test)
    x, y, x_test, y_test = (a.numpy() for a in arrays)
    return Task(x, y, x_test, y_test, True, units, other.x_test.numpy())


def by_class(y: np.ndarray, seed: int) -> list[np.ndarray]:
    """The samples of one class after another, classes in an order of the seed."""
    order = np.random.default_rng(seed).permutation(np.unique(y))
    return [np.flatnonzero(y == label) for label in order]


def calibration_error(probabilities: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error in 15 bins of the likeliest class's probability (Guo et al. 2017)."""
    sure = probabilities.max(1)
    bins = np.minimum((sure * 15).astype(int), 14)
    return float(sum(abs((sure - right)[bins == b].sum()) for b in range(15)) / len(right))


def ours(t: Task, seed: int, readout: str = "ridge") -> dict[str, float]:
    model = ek.EngramClassifier(random_state=seed, readout=readout, **t.settings)
    start = time.perf_counter()
    for part in by_class(t.y, seed):
        model.partial_fit(t.x[part], t.y[part])
    learned = time.perf_counter()
    probabilities = model.predict_proba(t.x_test)
    right = model.classes_[probabilities.argmax(1)] == t.y_test
    row = {
        "accuracy": float(right.mean()),
        "calibration_error": calibration_error(probabilities, right),
        "learn_seconds": learned - start,
    }
    if t.other is not None:
        novelty = np.concatenate([model.novelty(t.x_test), model.novelty(t.other)])
        row["novelty_auc"] = roc_auc_score(np.repeat([0, 1], [len(t.x_test), len(t.other)]), novelty)
    return row


def pixels(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).float() / 255


def streamed(model: Any, t: Task, seed: int) -> Any:
    """A peer that has learned the images one class at a time."""
    for part in by_class(t.y, seed):
        model.partial_fit(pixels(t.x[part]), torch.from_numpy(t.y[part]))
    return model


def peer(make: Callable[..., Any]) -> Callable[[Task, int], dict[str, float]]:
    """``make(features, units, classes, seed)`` of peers.py, on images."""

    def run(t: Task, seed: int) -> dict[str, float]:
        model = streamed(make(t.x.shape[1], t.units, 10, seed), t, seed)
        return {"accuracy": float((model.predict(pixels(t.x_test)).numpy() == t.y_test).mean())}

    return run


def sgd(t: Task, seed: int) -> dict[str, float]:
    scaler, model = StandardScaler().fit(t.x), SGDClassifier(loss="log_loss", random_state=seed)
    for part in by_class(t.y, seed):
        model.partial_fit(scaler.transform(t.x[part]), t.y[part], classes=np.unique(t.y))
    return {"accuracy": model.score(scaler.transform(t.x_test), t.y_test)}


def whole(make: Callable[[], Any]) -> Callable[[Task, int], dict[str, float]]:
    """A method that has no order, or ignores it."""
    return lambda t, seed: {"accuracy": make().fit(t.x, t.y).score(t.x_test, t.y_test)}


def joint_of_code(t: Task, seed: int) -> dict[str, float]:
    """Logistic regression on the bits of our code, all classes at once: the read-out that counts give up."""
    code = PatchCode((28, 28), t.units, sizes=(4, 6, 8), seed=seed, rate=ek.EngramClassifier().rate)
    bits = [ek.ops.unpack_signs(code.encode(x), t.units).numpy() for x in (t.x, t.x_test)]
    return {"accuracy": LogisticRegression(max_iter=LBFGS_STEPS).fit(bits[0], t.y).score(bits[1], t.y_test)}


# Chosen by ``search``: penalties of both, the width of RanDumb's kernel.
RANPAC = {"penalty": 1e-4}
RANDUMB = {"gamma": 0.01, "penalty": 1e-4}
OF_IMAGES: dict[str, Callable[[Task, int], dict[str, float]]] = {
    "RanPAC": peer(lambda d, n, c, seed: RanPAC(d, n, c, seed=seed, **RANPAC)),
    "RanDumb": peer(lambda d, n, c, seed: RanDumb(d, n, c, seed=seed, **RANDUMB)),
    "StreamingLDA": peer(lambda d, n, c, seed: StreamingLDA(d, c)),
    "joint logistic regression of our code": joint_of_code,
}
METHODS: dict[str, Callable[[Task, int], dict[str, float]]] = {
    OURS: ours,
    DENDRITIC: functools.partial(ours, readout="dendritic"),
    **OF_IMAGES,
    "LDA": whole(LinearDiscriminantAnalysis),
    "Gaussian naive Bayes": whole(GaussianNB),
    "nearest centroid": whole(lambda: make_pipeline(StandardScaler(), NearestCentroid())),
    "SGDClassifier.partial_fit": sgd,
    "joint logistic regression": whole(lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))),
    "joint 5 nearest neighbours": whole(lambda: make_pipeline(StandardScaler(), KNeighborsClassifier())),
}
WITH_UNITS = (
    OURS,
    DENDRITIC,
    "RanPAC",
    "RanDumb",
    "joint logistic regression of our code",
)  # of which images give the number; tables leave it to the default


def accuracy(names: list[str], methods: list[str], units: list[int], seeds: int, data_dir: Path | None) -> None:
    for name in names:
        for method in methods:
            if name in TABLES and method in OF_IMAGES:
                continue
            widths = units if name in IMAGES and method in WITH_UNITS else [None]
            for width, seed in [(width, seed) for width in widths for seed in range(seeds)]:
                key = {"data": name, "method": method, "seed": seed} | ({"units": width} if width else {})
                if any(key.items() <= row.items() for row in read(FILE)):
                    continue
                row = key | METHODS[method](task(name, seed, data_dir, width or UNITS), seed)
                print(row, flush=True)
                write(FILE, [*read(FILE), row])


# ---- the choice of settings

PATCHES = [(4, 6, 8), (3, 5, 7), (5, 7, 9), (6, 8, 10), (8, 12), (4, 8, 12)]
RATES = [0.15, 0.35]  # besides the default, at the default patches
PENALTIES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
GAMMAS = [0.005, 0.01, 0.02, 0.04]


def search(names: list[str], data_dir: Path | None) -> None:
    """Validation accuracy of every setting, on all images that have the code's width in common."""
    for name in names:
        data = load(name, data_dir)
        x, y = data.x_train.numpy(), data.y_train.numpy()
        t = Task(x[:-VALIDATION], y[:-VALIDATION], x[-VALIDATION:], y[-VALIDATION:], True, SEARCH_UNITS, None)
        for label, settings in [("RanPAC", {}), *[("RanDumb", {"gamma": gamma}) for gamma in GAMMAS]]:
            done = [row for row in read(SEARCH_FILE) if settings.items() <= row["settings"].items()]
            if any(row["data"] == name and row["method"] == label for row in done):
                continue
            make = RanPAC if label == "RanPAC" else RanDumb
            model = streamed(make(x.shape[1], SEARCH_UNITS, 10, penalty=0.0, **settings), t, 0)
            found = list(penalties_of(model, t))
            keep = [(settings | {"penalty": penalty}, right) for penalty, right in found]
            write(SEARCH_FILE, read(SEARCH_FILE) + [searched(name, label, s, right) for s, right in keep])
        for settings in [
            *[{"patch": p, "rate": 0.25} for p in PATCHES],
            *[{"patch": PATCHES[0], "rate": r} for r in RATES],
        ]:
            texts = json.loads(json.dumps(settings))
            if any(r["data"] == name and r["method"] == OURS and r["settings"] == texts for r in read(SEARCH_FILE)):
                continue
            model = ek.EngramClassifier(**t.settings, **settings).fit(t.x, t.y)
            right = float((model.predict(t.x_test) == t.y_test).mean())
            write(SEARCH_FILE, [*read(SEARCH_FILE), searched(name, OURS, texts, right)])


def penalties_of(model: Any, t: Task) -> Iterator[tuple[float, float]]:
    """Penalties and the validation accuracy of each, from the same Gram matrix."""
    x = pixels(t.x_test)
    for penalty in PENALTIES:
        model.penalty = penalty
        model.partial_fit(x[:0], torch.zeros(0, dtype=torch.int64))  # no samples, but the solution is found anew
        yield penalty, float((model.predict(x).numpy() == t.y_test).mean())


def searched(name: str, method: str, settings: dict[str, Any], right: float) -> dict[str, Any]:
    row = {"data": name, "method": method, "units": SEARCH_UNITS, "settings": settings, "validation_accuracy": right}
    print(row, flush=True)
    return row


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n")


# ---- CLASSIFIER.md


def table() -> None:
    rows = read(FILE)
    lines = [
        "# EngramClassifier, one class at a time",
        "",
        "Test accuracy in %, mean and standard deviation over the seeds, after one pass, one class at a time, without",
        "replay and task labels. `python benchmarks/continual/classifier.py table` makes this page of",
        "results/classifier.json and results/classifier-search.json; the program says how each row came about. Methods",
        "called joint saw all classes at once.",
        "",
        "## Images",
        "",
        *accuracies(rows, IMAGES),
        "",
        "## Tables",
        "",
        *accuracies(rows, [name for name in TABLES if any(row["data"] == name for row in rows)]),
        "",
        "## Settings tried on validation data",
        "",
        f"Accuracy in % on the last {VALIDATION} training images, which were not learned, with {SEARCH_UNITS} units.",
        "",
        *searches(read(SEARCH_FILE)),
        "",
        "## Cost",
        "",
        "Processor seconds of one thread on images of 784 pixels, with the ratios of one run; by",
        "`python benchmarks/classifier_cost.py`. The code exists already, and the solution is not found.",
        "",
        "![Processor seconds and memory against units and samples](../results/classifier-cost.png)",
        "",
        *costs(json.loads(COST_FILE.read_text())),
    ]
    (Path(__file__).parent / "CLASSIFIER.md").write_text("\n".join(lines) + "\n")


def header(cells: list[str]) -> list[str]:
    return [line(cells), f"|{'---|' * len(cells)}"]


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def accuracies(rows: list[dict[str, Any]], names: list[str] | tuple[str, ...]) -> list[str]:
    """A row for each method and number of units, and what else is known of ours."""
    lines = header(["", *names])
    for method in METHODS:
        for units in sorted({row.get("units", 0) for row in rows if row["method"] == method and row["data"] in names}):
            got = [
                [r for r in rows if (r["data"], r["method"], r.get("units", 0)) == (n, method, units)] for n in names
            ]
            label = f"{method}, {units} units" if units else method
            lines.append(line([label, *[spread([100 * row["accuracy"] for row in cell], 1) for cell in got]]))
            for key, what in (("calibration_error", "calibration error"), ("novelty_auc", "novelty, area under curve")):
                values = [[row[key] for row in cell if key in row] for cell in got]
                if any(values):
                    lines.append(line([f"{label}: {what}", *[spread(value, 3, deviation=False) for value in values]]))
    return lines


def spread(values: list[float], digits: int, *, deviation: bool = True) -> str:
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if deviation and len(values) > 1 else text


def searches(rows: list[dict[str, Any]]) -> list[str]:
    lines = header(["", "settings", *IMAGES])
    for method, text in dict.fromkeys((row["method"], json.dumps(row["settings"])) for row in rows):
        same = [row for row in rows if row["method"] == method and json.dumps(row["settings"]) == text]
        right = {row["data"]: f"{100 * row['validation_accuracy']:.2f}" for row in same}
        settings = ", ".join(f"{name} {value}" for name, value in json.loads(text).items())
        lines.append(line([method, settings, *[right.get(name, "") for name in IMAGES]]))
    return lines


def costs(content: dict[str, Any]) -> list[str]:
    """Learning by units, memory, and one sample more."""
    peer, ways = "RanPAC", {"whole images": "ours, projections", "patches": "ours, patches"}
    units = sorted({point["units"] for point in content["units"]})
    took = {(point["way"], point["units"]): point["seconds"] for point in content["units"]}
    lines = header(["times less than RanPAC to learn a sample, with units:", *map(str, units)])
    for way, label in ways.items():
        lines.append(line([label, *[f"{took[peer, n] / took[way, n]:.1f}" for n in units]]))
    lines += [
        "",
        *header(["times less than RanPAC for 60 000 images and a solution, units:", *content["whole"]]),
    ]
    for way, label in ways.items():
        lines.append(line([label, *[f"{took[peer] / took[way]:.1f}" for took in content["whole"].values()]]))
    units = sorted({point["units"] for point in content["memory"]})
    lines += ["", *header(["peak MB while learning / with the solution, with units:", *map(str, units)])]
    for way, label in (ways | {peer: peer}).items():
        points = {point["units"]: point for point in content["memory"] if point["way"] == way}
        lines.append(
            line([label, *[f"{points[n]['learning'] / 1e6:.0f} / {points[n]['solving'] / 1e6:.0f}" for n in units]])
        )
    lines += ["", f"Counting pairs of 8192 codes of 4096 units takes {content['pairs_ratio']:.1f} times less than the"]
    lines += ["float32 product of the same codes. One sample more, in milliseconds:", ""]
    names = dict.fromkeys(name for row in content["one_more"].values() for name in row)
    lines += header(["", *[f"{n} units" for n in content["one_more"]]])
    for name in names:
        cells = [row.get(name) for row in content["one_more"].values()]
        lines.append(
            line(
                [
                    name,
                    *[
                        "" if seconds is None else f"{1e3 * seconds:.{2 if seconds < 0.01 else 0}f}"
                        for seconds in cells
                    ],
                ]
            )
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "accuracy", "table"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--datasets", nargs="+", choices=[*TABLES, *IMAGES], default=[*TABLES, *IMAGES])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--units", nargs="+", type=int, default=[UNITS])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.what == "accuracy":
        accuracy(arguments.datasets, arguments.methods, arguments.units, arguments.seeds, arguments.data_dir)
    elif arguments.what == "search":
        search([name for name in arguments.datasets if name in IMAGES], arguments.data_dir)
    else:
        table()


if __name__ == "__main__":
    main()
