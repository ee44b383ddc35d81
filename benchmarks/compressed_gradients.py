"""What gradients in float16 cost in accuracy: ``torchrun --nproc-per-node 2 benchmarks/compressed_gradients.py DIR``.

DIR holds the data sets. Process 0 prints a table: test accuracy in %, mean and standard deviation over the seeds, of
784-1024-1024-10 trained on all classes at once, with gradients that travel as they are and by torch's own hook.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import engram_kernels as ek
from engram_kernels.continual.data import load

DATA, SEEDS, EPOCHS, BATCH = ("mnist", "fashion-mnist"), range(3), 2, 100
HOOKS = {"float32": None, "float16": fp16_compress_hook}


def network() -> nn.Module:
    return nn.Sequential(
        ek.BinaryEngramLinear(784, 1024, binary_input=False),
        nn.BatchNorm1d(1024),
        ek.BinaryEngramLinear(1024, 1024),
        nn.BatchNorm1d(1024),
        ek.BinaryEngramLinear(1024, 10),
    )


def accuracy(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, hook: str, seed: int) -> float:
    """Of this process's replica, in %."""
    torch.manual_seed(seed)
    model = DistributedDataParallel(network())
    if HOOKS[hook]:
        model.register_comm_hook(None, HOOKS[hook])
    optimizer = ek.MetaplasticAdam(model.parameters(), lr=1e-3, metaplasticity=1.35)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(EPOCHS * seed + epoch))
        for batch in order.split(BATCH):
            own = batch[dist.get_rank() :: dist.get_world_size()]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[own]) / 32, y[own]).backward()  # logits are sums of 1024 signs
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return 100 * (model(x_test).argmax(1) == y_test).double().mean().item()


def main() -> None:
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    bar = tqdm(total=len(DATA) * len(HOOKS) * len(SEEDS), unit="run", disable=not first)
    lines = [f"| gradients | {' | '.join(DATA)} |", "| --- " * (1 + len(DATA)) + "|"]
    for hook in HOOKS:
        cells = []
        for name in DATA:
            data = load(name, Path(sys.argv[1]))
            x, x_test = (part.reshape(len(part), -1).float().sub_(33).div_(79) for part in (data.x_train, data.x_test))
            found = []
            for seed in SEEDS:
                found.append(accuracy(x, data.y_train, x_test, data.y_test, hook, seed))
                bar.update()
            cells.append(f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}")
        lines.append(f"| {hook} | {' | '.join(cells)} |")
    bar.close()
    if first:
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
