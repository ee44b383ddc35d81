"""Several processes that share every batch of a run, as torchrun starts them. A single process is rank 0 of 1.

Each holds the whole network and the whole data set, and takes the steps that one process would take: its part of a
batch is every W-th sample, by whose number in the batch engrams are drawn, and gradients are averaged over the batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def launched() -> int:
    """How many processes torchrun has started, this one included; 1 without it."""
    by_torchrun = dist.is_available() and dist.is_torchelastic_launched()
    return int(os.environ["WORLD_SIZE"]) if by_torchrun else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The group of all processes that torchrun has started with this one; nothing where it has started none."""
    if launched() == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one. Process 0 writes and prints."""
    return dist.get_rank() if size() > 1 else 0


def part(samples: int) -> tuple[slice, float]:
    """This process's samples of a batch, and what their mean weighs in that of the batch.

    A batch of fewer samples than there are processes leaves some without one: they take the first, which weighs
    nothing, so that all draw the same numbers from their generators.
    """
    own = len(range(rank(), samples, size()))
    return (slice(rank(), None, size()), own / samples) if own else (slice(0, 1), 0.0)


def mean(values: list[float], weight: float) -> list[float]:
    """Means over the batch, of means over the processes' parts."""
    if size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device="cpu") * weight
    dist.all_reduce(total)
    result: list[float] = total.tolist()
    return result


def average_gradients(parameters: Iterable[Tensor], weight: float) -> None:
    """Has every gradient be the mean over the batch, of means over the processes' parts. In float32, all at once."""
    if size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten().float() for gradient in gradients]).mul_(weight)
    dist.all_reduce(flat)
    for gradient, values in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(values.view_as(gradient))


@contextlib.contextmanager
def counting_together(counts: list[Tensor], weight: float) -> Iterator[None]:
    """Adds up what the processes add to ``counts`` meanwhile; a part that weighs nothing counts nothing."""
    if size() == 1:
        yield
        return
    before = [counted.clone() for counted in counts]
    yield
    for counted, start in zip(counts, before, strict=True):
        added = (counted - start) if weight else torch.zeros_like(counted)
        dist.all_reduce(added)
        counted.copy_(start + added)


def gathered(own: Any) -> list[Any]:
    """What each process gives, by rank."""
    if size() == 1:
        return [own]
    everyone: list[Any] = [None] * size()
    dist.all_gather_object(everyone, own)
    return everyone


def told_by_the_first(value: Any = None) -> Any:
    """The value that process 0 gives."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
