"""Time binary layers of your own sizes against `nn.Linear`, forward alone and a whole training step.

    python examples/layer_sizes.py --batch 100 --sizes 1024x1024 4096x4096 --rate 0.1

Sizes are inputs x outputs. Every figure is a median; the two layers of a row are timed in turns on the same machine.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from torch.utils.benchmark import Timer

import engram_kernels as ek

parser = argparse.ArgumentParser(description="Time binary layers against nn.Linear.")
parser.add_argument("--batch", type=int, default=100, help="samples")
parser.add_argument("--sizes", nargs="+", default=["1024x1024", "2048x2048"], metavar="KxN", help="inputs x outputs")
parser.add_argument("--rate", type=float, default=0.1, help="share of the inputs that each sample recruits")
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--seconds", type=float, default=0.5, help="of timing, a turn")
options = parser.parse_args()


def forward(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A call that computes the layer's output and nothing else."""
    return torch.no_grad()(lambda: layer(x))


def step(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A call that trains the layer on a batch: forward, backward and update."""
    binary = isinstance(layer, ek.BinaryEngramLinear)
    optimizer = (ek.MetaplasticAdam if binary else torch.optim.Adam)(layer.parameters(), lr=1e-3)

    def call() -> None:
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    return call


print(f"{options.batch} samples, rate {options.rate}, {options.threads} threads, {ek.ops.isa()}; milliseconds")
print(f"{'layer':>12} {'':8} {'nn.Linear':>10} {'binary':>10} {'faster':>8}")
for size in options.sizes:
    k, n = map(int, size.split("x"))
    x = torch.randn(options.batch, k)
    layers = nn.Linear(k, n, bias=False), ek.BinaryEngramLinear(k, n, engram=ek.StochasticEngram(options.rate))
    for kind in (forward, step):
        timers = [Timer("call()", globals={"call": kind(layer, x)}, num_threads=options.threads) for layer in layers]
        turns = [[timer.blocked_autorange(min_run_time=options.seconds).median for timer in timers] for _ in range(3)]
        plain, binary = (1e3 * median(times) for times in zip(*turns, strict=True))
        print(f"{size:>12} {kind.__name__:8} {plain:10.3f} {binary:10.3f} {plain / binary:7.1f}x")
