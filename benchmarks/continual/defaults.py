"""`EngramMLP` and `MetaplasticAdam` as they come, with the obvious loop: one class after another, no replay.

    python benchmarks/continual/defaults.py --data-dir DIR [--datasets ...] [--seeds N] [--cross-entropy]

The table is that of docs/results.md. A seed draws the weights, the order of the samples, and for scikit-learn's tables
the split, 40 % for the test; digits, MNIST and Fashion-MNIST have a split of their own. Features go in as they are,
pixels as bytes. MNIST and Fashion-MNIST are the first 20 000 images in one pass over each class. Digits get three
passes, tables ten: their classes have 30 to 200 samples. ``--cross-entropy`` trains by the cross-entropy over all
outputs instead of ``model.loss``, so that the program also measures versions that had none: put such a checkout in
PYTHONPATH.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

import engram_kernels as ek
from engram_kernels.continual.data import load

TABLES = {"wine": load_wine, "breast cancer": load_breast_cancer, "iris": load_iris}
IMAGES = {"digits": 3, "mnist": 1, "fashion-mnist": 1}  # passes
HIDDEN = inspect.signature(ek.EngramMLP).parameters["sizes"].default[1:-1]
BATCH, TABLE_PASSES, MOST_SAMPLES = 16, 10, 20_000

Loss = Callable[[ek.EngramMLP, Tensor, Tensor], Tensor]


def split_of(name: str, seed: int, data_dir: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training samples and labels, test samples and labels."""
    if name in TABLES:
        x, y = TABLES[name](return_X_y=True)
        x, x_test, y, y_test = train_test_split(x, y, test_size=0.4, random_state=seed, stratify=y)
        return torch.tensor(x).float(), torch.tensor(y), torch.tensor(x_test).float(), torch.tensor(y_test)
    data = load(name, data_dir)
    return data.x_train[:MOST_SAMPLES], data.y_train[:MOST_SAMPLES], data.x_test, data.y_test


def accuracy(name: str, seed: int, data_dir: Path | None, loss: Loss) -> float:
    """Percent of the test samples that are right after the last class."""
    x, y, x_test, y_test = split_of(name, seed, data_dir)
    torch.manual_seed(seed)
    model = ek.EngramMLP((x.shape[1], *HIDDEN, len(y.unique())))
    optimizer = ek.MetaplasticAdam(model.parameters())
    for label in y.unique():
        of_class = (y == label).nonzero().flatten()
        for _ in range(IMAGES.get(name, TABLE_PASSES)):
            for rows in of_class[torch.randperm(len(of_class))].split(BATCH):
                optimizer.zero_grad()
                loss(model, x[rows], y[rows]).backward()
                optimizer.step()
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x_test.split(500)])
    return 100.0 * (found == y_test).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--datasets", nargs="+", choices=[*IMAGES, *TABLES], default=[*IMAGES, *TABLES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cross-entropy", action="store_true")
    options = parser.parse_args()
    loss: Loss = (lambda m, x, y: F.cross_entropy(m(x), y)) if options.cross_entropy else (lambda m, x, y: m.loss(x, y))
    print(f"| data set | accuracy of {options.seeds} seeds, % |\n| --- | --- |", flush=True)
    for name in options.datasets:
        got = [accuracy(name, seed, options.data_dir, loss) for seed in range(options.seeds)]
        spread = f" ± {statistics.stdev(got):.1f}" if len(got) > 1 else ""
        print(f"| {name} | {statistics.mean(got):.1f}{spread} |", flush=True)


if __name__ == "__main__":
    main()
