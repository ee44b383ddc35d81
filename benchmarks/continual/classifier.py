"""EngramClassifier against what streams today: one pass, one class at a time, no replay, no task label.

    python benchmarks/continual/classifier.py accuracy --data-dir DIR [--datasets ...] [--methods ...]
    python benchmarks/continual/classifier.py cost
    python benchmarks/continual/classifier.py table

Every finished run is added to results/classifier.json, so that an interrupted one goes on; ``table`` makes
CLASSIFIER.md of it. A seed draws the code, the order of the classes, and for scikit-learn's data sets the split, 40 %
for the test. SGDClassifier streams standardised features in the same order, with the scaling of the whole training set:
an advantage. Logistic regression and k nearest neighbours see all classes at once, and are bounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jobs import RESULTS
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
from engram_kernels.continual.data import load

FILE = RESULTS / "classifier.json"
TABLES: dict[str, Callable[..., Any]] = {
    "digits": load_digits,
    "iris": load_iris,
    "wine": load_wine,
    "breast cancer": load_breast_cancer,
}
IMAGES = ("mnist", "fashion-mnist")
OURS = "EngramClassifier"


class Task(NamedTuple):
    """Training and test data, the settings of our classifier for them, and data of another kind."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    settings: dict[str, Any]
    other: np.ndarray | None


def task(name: str, seed: int, data_dir: Path | None) -> Task:
    if name in TABLES:
        X, y = TABLES[name](return_X_y=True)
        x, x_test, y, y_test = train_test_split(X, y, test_size=0.4, random_state=seed, stratify=y)
        return Task(x, y, x_test, y_test, {}, None)
    data = load(name, data_dir)
    other = load(IMAGES[1 - IMAGES.index(name)], data_dir)
    arrays = (data.x_train, data.y_train, data.x_test, data.y_test)
    x, y, x_test, y_test = (a.numpy() for a in arrays)
    return Task(x, y, x_test, y_test, {"n_units": 8192, "image_shape": (28, 28)}, other.x_test.numpy())


def by_class(y: np.ndarray, seed: int) -> list[np.ndarray]:
    """The samples of one class after another, classes in an order of the seed."""
    order = np.random.default_rng(seed).permutation(np.unique(y))
    return [np.flatnonzero(y == label) for label in order]


def calibration_error(probabilities: np.ndarray, y: np.ndarray) -> float:
    """Expected calibration error in 15 bins of the likeliest class's probability (Guo et al. 2017)."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == y
    bins = np.minimum((sure * 15).astype(int), 14)
    return float(sum(abs((sure - right)[bins == b].sum()) for b in range(15)) / len(y))


def ours(t: Task, seed: int) -> dict[str, float]:
    model = ek.EngramClassifier(random_state=seed, **t.settings)
    start = time.perf_counter()
    for part in by_class(t.y, seed):
        model.partial_fit(t.x[part], t.y[part])
    learned = time.perf_counter()
    probabilities = model.predict_proba(t.x_test)
    row = {
        "accuracy": float((probabilities.argmax(1) == t.y_test).mean()),
        "calibration_error": calibration_error(probabilities, t.y_test),
        "learn_seconds": learned - start,
    }
    if t.other is not None:
        novelty = np.concatenate([model.novelty(t.x_test), model.novelty(t.other)])
        row["novelty_auc"] = roc_auc_score(np.repeat([0, 1], [len(t.x_test), len(t.other)]), novelty)
    return row


def sgd(t: Task, seed: int) -> dict[str, float]:
    scaler, model = StandardScaler().fit(t.x), SGDClassifier(loss="log_loss", random_state=seed)
    for part in by_class(t.y, seed):
        model.partial_fit(scaler.transform(t.x[part]), t.y[part], classes=np.unique(t.y))
    return {"accuracy": model.score(scaler.transform(t.x_test), t.y_test)}


def whole(make: Callable[[], Any]) -> Callable[[Task, int], dict[str, float]]:
    """A method that has no order, or ignores it."""
    return lambda t, seed: {"accuracy": make().fit(t.x, t.y).score(t.x_test, t.y_test)}


METHODS: dict[str, Callable[[Task, int], dict[str, float]]] = {
    OURS: ours,
    "LDA": whole(LinearDiscriminantAnalysis),
    "Gaussian naive Bayes": whole(GaussianNB),
    "nearest centroid": whole(lambda: make_pipeline(StandardScaler(), NearestCentroid())),
    "SGDClassifier.partial_fit": sgd,
    "joint logistic regression": whole(lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))),
    "joint 5 nearest neighbours": whole(lambda: make_pipeline(StandardScaler(), KNeighborsClassifier())),
}
SLOW = ("joint logistic regression", "joint 5 nearest neighbours")  # on images: one seed says it


def accuracy(names: list[str], methods: list[str], seeds: int, data_dir: Path | None) -> None:
    rows = read()
    for name in names:
        for method in methods:
            run = METHODS[method]
            alone = name in IMAGES and (method in SLOW or method not in (OURS, "SGDClassifier.partial_fit"))
            for seed in range(1 if alone else seeds):
                key = {"data": name, "method": method, "seed": seed}
                if any(key.items() <= row.items() for row in rows):
                    continue
                rows.append(key | run(task(name, seed, data_dir), seed))
                print(rows[-1], flush=True)
                FILE.write_text(json.dumps(rows, indent=1) + "\n")


def cost(units: int = 4096, samples: int = 8192, repeats: int = 5) -> None:
    """Ratios of medians, taken in turns in one run, and how work grows with the units."""
    gen = torch.Generator().manual_seed(0)
    bits = ek.ops.pack_signs(torch.randn(samples, units, generator=gen) - 0.7)
    codes = ek.ops.unpack_signs(bits, units).add_(1).div_(2)
    from engram_kernels.moments import SecondMoments

    moments = SecondMoments(units)
    moments.place_classes({}, 1)
    y = torch.zeros(samples, dtype=torch.int64)
    counted, product = [], []
    for _ in range(repeats):
        counted.append(seconds(lambda: moments.add(bits, y)))
        product.append(seconds(lambda: codes.T @ codes))
    row: dict[str, Any] = {"gram_ratio": statistics.median(product) / statistics.median(counted)}
    rng = np.random.default_rng(0)
    labels = np.arange(3 * units) % 10
    x = rng.normal(size=(len(labels), 512)) + rng.normal(size=(10, 512))[labels]
    model = ek.EngramClassifier(units).fit(x, labels)
    again, update = [], []
    for i in range(repeats):
        model.discriminants_.forget()
        again.append(seconds(lambda: model.predict(x[:1])))
        update.append(seconds(lambda i=i: model.partial_fit(x[i : i + 1], labels[i : i + 1]).predict(x[:1])))
    row["update_ratio"] = statistics.median(again) / statistics.median(update)
    row["learn_seconds_by_units"] = {
        n: statistics.median(seconds(lambda n=n: ek.EngramClassifier(n).fit(x[:4096], labels[:4096])) for _ in range(3))
        for n in (1024, 2048, 4096, 8192)
    }
    rows = [r for r in read() if "cost" not in r] + [{"cost": row, "units": units, "threads": torch.get_num_threads()}]
    print(rows[-1])
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text()) if FILE.exists() else []


def table() -> None:
    """CLASSIFIER.md."""
    rows = [row for row in read() if "method" in row]
    names = [name for name in (*IMAGES, *TABLES) if any(row["data"] == name for row in rows)]
    lines = [
        "# EngramClassifier, one class at a time",
        "",
        "Test accuracy in %, mean and standard deviation over the seeds, after one pass, one class at a time, without",
        "replay and task labels. `python benchmarks/continual/classifier.py table` makes this page of",
        "results/classifier.json; the program says how each row came about. Methods called joint saw all classes",
        "at once.",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for method in METHODS:
        cells = []
        for name in names:
            got = [100 * row["accuracy"] for row in rows if row["data"] == name and row["method"] == method]
            spread = f" ± {statistics.stdev(got):.1f}" if len(got) > 1 else ""
            cells.append(f"{statistics.mean(got):.1f}{spread}" if got else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    for key, label in (("calibration_error", "calibration error"), ("novelty_auc", "novelty, area under the curve")):
        found = {name: [r[key] for r in rows if r["data"] == name and key in r] for name in names}
        lines.append(
            f"| {OURS}: {label} | "
            + " | ".join(f"{statistics.mean(v):.3f}" if v else "" for v in found.values())
            + " |"
        )
    costs = [row for row in read() if "cost" in row]
    for row in costs:
        c = row["cost"]
        lines += [
            "",
            f"With {row['units']} units and {row['threads']} thread(s): counting pairs is {c['gram_ratio']:.1f} times "
            f"faster than the float32 product of the same codes; one more sample and a prediction cost "
            f"{c['update_ratio']:.0f} times less than a new solution. Learning 4096 samples of 512 features takes "
            + ", ".join(f"{s:.2f} s with {n}" for n, s in c["learn_seconds_by_units"].items())
            + " units.",
        ]
    (Path(__file__).parent / "CLASSIFIER.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "cost", "table"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--datasets", nargs="+", choices=[*TABLES, *IMAGES], default=[*TABLES, *IMAGES])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.what == "accuracy":
        accuracy(arguments.datasets, arguments.methods, arguments.seeds, arguments.data_dir)
    elif arguments.what == "cost":
        cost()
    else:
        table()


if __name__ == "__main__":
    main()
