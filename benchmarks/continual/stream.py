"""A thousand permuted MNIST tasks, one sample at a time: who still learns at the end?

    python benchmarks/continual/stream.py search --data-dir DIR
    python benchmarks/continual/stream.py measure --data-dir DIR [--samples 150] [--seeds 0]
    python benchmarks/continual/stream.py picture

The protocol is that of BiMU (Cottart et al. 2026, arXiv 2605.30198, table 1): a binary network 784-100-10, one label at
a time, one pass, no task label, no replay; the result is the accuracy on the test images of the last five tasks, right
after the last sample. The paper streams all 60 000 images in each task; here a task has ``--samples`` of them, drawn
anew, since the whole takes one core three to four hours a row. `search` chooses on permutations and images of its own.

A step goes by the package's operators and not by autograd, which takes longer than they do at one sample;
`tests/test_streaming.py` holds it to the gradients of :class:`~engram_kernels.BinaryEngramLinear`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from jobs import RESULTS
from torch import Tensor

import engram_kernels as ek
from engram_kernels.continual.data import Dataset, load
from engram_kernels.encoding import standardize

FILE, SEARCH = RESULTS / "stream.json", RESULTS / "search" / "stream.json"
PICTURE = RESULTS.parent / "pictures" / "stream.png"
INPUTS, HIDDEN, CLASSES = 784, 100, 10
LAST = 5  # tasks that the result is measured on
HELD_OUT = 5000  # training images that only the search is measured on
SEARCH_SEED = 1000
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a network and its updates; ``rate`` None has no engram."""

    lr: float
    metaplasticity: float = 0.0
    weight_bound: float = math.inf
    rate: float | None = None


BOUND = 0.1  # twice the range in which weights start; with it, lr and metaplasticity have their scale
GRID = {
    "no metaplasticity": [Settings(lr) for lr in (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)],
    "metaplasticity, unbounded": [
        Settings(lr, m) for lr, m in itertools.product((1e-4, 1e-3, 3e-3, 1e-2), (0.3, 1.35, 7.2))
    ],
    "metaplasticity, bounded": [
        Settings(lr, m / BOUND, BOUND)
        for lr, m in (*itertools.product((1e-4, 3e-4, 1e-3), (0.5, 1.0, 1.5)), (1e-3, 0.25), (3e-3, 0.25), (3e-3, 0.5))
    ],
    "metaplasticity, bounded, engram": [
        *(Settings(lr, m / BOUND, BOUND, 0.5) for lr, m in itertools.product((1e-4, 3e-4, 1e-3), (0.5, 1.0, 1.5))),
        Settings(1e-3, 0.25 / BOUND, BOUND, 0.8),
    ],
}


class Learner:
    """A network x -> LayerNorm(s(W1) x) -> gated signs -> s(W2) that learns from one sample at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.steps = settings, 0
        self.weights = [torch.empty(n, k).uniform_(-0.05, 0.05) for n, k in ((HIDDEN, INPUTS), (CLASSES, HIDDEN))]
        self.moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in self.weights]
        self.bits = [ek.ops.pack_signs(weight) for weight in self.weights]
        self.first_grad = torch.empty_like(self.weights[0])
        self.engram = None if settings.rate is None else ek.StochasticEngram(settings.rate, temperature=0)
        self.window = 1.0 if self.engram is None else math.inf
        self.scale = 1.0 / math.sqrt(HIDDEN if self.engram is None else self.engram.recruited(HIDDEN))

    def forward(self, x: Tensor) -> tuple[Tensor, Any, Tensor, Tensor, Tensor | None]:
        """Floats (M, 784) -> scores (M, 10), the hidden layer's sums and their norm, its signs and its gate."""
        sums = ek.ops.sign_matmul_t(x, self.bits[0], INPUTS)
        norm = torch.native_layer_norm(sums, (HIDDEN,), None, None, 1e-5)
        gate = None if self.engram is None else self.engram(norm[0]).gate_bits
        signs = ek.ops.pack_signs(norm[0])
        scores = ek.ops.binary_matmul(signs, self.bits[1], HIDDEN, gate) * self.scale
        return scores, norm, sums, signs, gate

    def step(self, x: Tensor, y: int) -> None:
        """One update from a sample (1, 784) and its label."""
        scores, (z, mean, inverse), sums, signs, gate = self.forward(x)
        d = torch.softmax(scores, dim=1)
        d[0, y] -= 1
        d *= self.scale
        dz = ek.ops.masked_input_grad(d, self.bits[1], HIDDEN, ek.ops.pack_window(z, self.window, gate))
        dsums = torch.ops.aten.native_layer_norm_backward(
            dz, sums, (HIDDEN,), mean, inverse, None, None, [True, False, False]
        )[0]
        torch.mul(dsums.T, x, out=self.first_grad)
        self.steps += 1
        settings: dict[str, Any] = dict(
            lr=self.settings.lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=0.0,
            metaplasticity=self.settings.metaplasticity,
            weight_bound=self.settings.weight_bound,
            step=self.steps,
        )
        first, second = zip(self.weights, self.moments, self.bits, strict=True)
        ek.ops.gated_metaplastic_adam_(d, signs, gate, second[0], *second[1], second[2], **settings)
        ek.ops.metaplastic_adam_(first[0], self.first_grad, *first[1], first[2], **settings)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return (self.forward(x)[0].argmax(dim=1) == y).float().mean().item()


def generator_of(seed: int, task: int) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 * seed + task)


@torch.inference_mode()
def stream(
    data: Dataset, settings: Settings, seed: int, *, tasks: int, samples: int, every: int | None = None
) -> dict[str, Any]:
    """Learns ``tasks`` tasks. Returns the mean accuracy on the last five at the end, the curve, and the seconds.

    The curve has the accuracy on the newest task after every ``every`` tasks.
    """
    torch.manual_seed(seed)
    learner, curve, seconds = Learner(settings), [], 0.0
    orders = [torch.randperm(INPUTS, generator=generator_of(seed, task)) for task in range(tasks)]
    images, labels = standardize(data.x_test.flatten(1)), data.y_test
    for task, order in enumerate(orders):
        chosen = torch.randperm(len(data.x_train), generator=generator_of(seed, tasks + task))[:samples]
        x = standardize(data.x_train[chosen].flatten(1))[:, order]
        y = data.y_train[chosen].tolist()
        start = time.perf_counter()
        for i, label in enumerate(y):
            learner.step(x[i : i + 1], label)
        seconds += time.perf_counter() - start
        if every is not None and (task + 1) % every == 0:
            curve.append([task + 1, learner.accuracy(images[:, order], labels)])
    last = [learner.accuracy(images[:, order], labels) for order in orders[-LAST:]]
    return {"accuracy": sum(last) / LAST, "curve": curve, "seconds": seconds}


def search(data: Dataset, tasks: int, samples: int) -> dict[str, Any]:
    """Tries the grid on images that are not trained on and permutations of another seed."""
    rest = dataclasses.replace(
        data,
        x_train=data.x_train[:-HELD_OUT],
        y_train=data.y_train[:-HELD_OUT],
        x_test=data.x_train[-HELD_OUT:],
        y_test=data.y_train[-HELD_OUT:],
    )
    rows: dict[str, Any] = {}
    for name, grid in GRID.items():
        tried = []
        for settings in grid:
            result = stream(rest, settings, SEARCH_SEED, tasks=tasks, samples=samples)
            tried.append({"settings": dataclasses.asdict(settings), "accuracy": result["accuracy"]})
            print(f"{name}: {settings} -> {100 * result['accuracy']:.1f} %", flush=True)
        rows[name] = sorted(tried, key=lambda row: -row["accuracy"])
    return {"tasks": tasks, "samples": samples, "rows": rows}


def measure(data: Dataset, found: dict[str, Any], tasks: int, samples: int, seeds: list[int]) -> dict[str, Any]:
    """Runs the best settings of each row of a search on other permutations, from the test set."""
    result: dict[str, Any] = {"tasks": tasks, "samples": samples, "rows": {}}
    for name, tried in found["rows"].items():
        settings = Settings(**tried[0]["settings"])
        runs = []
        for seed in seeds:
            runs.append(stream(data, settings, seed, tasks=tasks, samples=samples, every=max(1, tasks // 20)))
            print(f"{name}, seed {seed}: {100 * runs[-1]['accuracy']:.1f} %, {runs[-1]['seconds']:.0f} s", flush=True)
        result["rows"][name] = {"settings": tried[0]["settings"], "runs": runs}
    return result


def picture(result: dict[str, Any]) -> None:
    """Draws the accuracy on the newest task along the stream."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, row in result["rows"].items():
        for i, run in enumerate(row["runs"]):
            tasks, accuracy = zip(*run["curve"], strict=True)
            color = f"C{list(result['rows']).index(name)}"
            axes.plot(tasks, [100 * a for a in accuracy], color=color, label=name if i == 0 else None)
    axes.set_xlabel("permuted tasks learned")
    axes.set_ylabel("accuracy on the newest, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("search", "measure", "picture"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", type=int, help="200 in a search, 1000 in a measurement")
    parser.add_argument("--samples", type=int, default=150, help="of a task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.action == "picture":
        picture(json.loads(FILE.read_text()))
        return
    data = load("mnist", options.data_dir)
    if options.action == "search":
        SEARCH.write_text(json.dumps(search(data, options.tasks or 200, options.samples), indent=1) + "\n")
        return
    found = json.loads(SEARCH.read_text())
    result = measure(data, found, options.tasks or 1000, options.samples, options.seeds)
    FILE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
