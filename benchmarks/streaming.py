"""A training step of small networks at one to sixteen samples: ours against float networks of the same sizes.

    python benchmarks/streaming.py

A step is forward, cross-entropy, backward and optimizer, on one thread. All contenders take turns. The table has
medians of the processor's time, which other processes disturb less than the clock's. *Compiled* is ``torch.compile`` of
the network and its loss.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from measure import cpu_model, torch_threads
from torch import Tensor, nn

import engram_kernels as ek

SIZES = ((784, 256, 256, 10), (64, 100, 10))
BATCHES = (1, 4, 16)
ROUNDS, CALLS = 9, 100


def float_step(sizes: tuple[int, ...], x: Tensor, y: Tensor, *, compiled: bool, **options: bool) -> Callable[[], None]:
    """Linear layers with ReLU, Adam with ``options``."""
    layers = [module for k, n in pairwise(sizes) for module in (nn.Linear(k, n), nn.ReLU())]
    network = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(network.parameters(), **options)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(x), y)

    return training_step(torch.compile(loss_of) if compiled else loss_of, optimizer, x, y)


def binary_step(sizes: tuple[int, ...], x: Tensor, y: Tensor, **options: bool) -> Callable[[], None]:
    """Layers of ours, the first with a real-valued input, MetaplasticAdam with ``options``."""
    layers = (ek.BinaryEngramLinear(k, n, binary_input=i > 0) for i, (k, n) in enumerate(pairwise(sizes)))
    network = nn.Sequential(*layers)
    optimizer = ek.MetaplasticAdam(network.parameters(), **options)
    return training_step(lambda x, y: F.cross_entropy(network(x), y), optimizer, x, y)


def training_step(
    loss_of: Callable[[Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss_of(x, y).backward()
        optimizer.step()

    return step


def processor_seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS


def main() -> None:
    print(f"{cpu_model()}, {ek.ops.isa()}, 1 thread, microseconds a step")
    for sizes in SIZES:
        for samples in BATCHES:
            torch.compiler.reset()
            x, y = torch.randn(samples, sizes[0]), torch.randint(sizes[-1], (samples,))
            steps = {
                "float, compiled, Adam fused": float_step(sizes, x, y, compiled=True, fused=True),
                "float, compiled, Adam foreach": float_step(sizes, x, y, compiled=True, foreach=True),
                "float, eager, Adam fused": float_step(sizes, x, y, compiled=False, fused=True),
                "ours": binary_step(sizes, x, y),
                "ours, fuse_backward": binary_step(sizes, x, y, fuse_backward=True),
            }
            with torch_threads(1):
                for step in steps.values():
                    processor_seconds(step)  # compiles, and warms up
                rounds = [{name: processor_seconds(step) for name, step in steps.items()} for _ in range(ROUNDS)]
            medians = {name: statistics.median(1e6 * seconds[name] for seconds in rounds) for name in steps}
            compiled = min(us for name, us in medians.items() if "compiled" in name)
            print(f"{'-'.join(map(str, sizes))}, batch {samples}")
            for name, us in medians.items():
                print(f"  {name:32}{us:8.0f}   {us / compiled:5.2f} of the fastest compiled")


if __name__ == "__main__":
    main()
