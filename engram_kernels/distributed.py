"""What several processes have counted, put together."""

from __future__ import annotations

import copy
import hashlib
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .readouts import PrototypeReadout, RidgeReadout

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def merged_counts(model: Model, group: Any = None) -> Model:
    """A copy of a model whose counted read-outs hold what all processes have counted, summed by ``all_reduce``.

    Counts are integers: the copy, the same in every process, is what one process makes of all the samples, bit for bit.
    The model itself keeps what its process has counted and may count on, so that a later call counts nothing twice.
    Every process of the group makes the call. Copy and model exist together: a RidgeReadout's K² integers of 4 bytes,
    twice.

    Args:
        model: a :class:`~engram_kernels.PrototypeReadout`, a :class:`~engram_kernels.RidgeReadout`, or a model with
            such read-outs and otherwise the same weights in every process.
        group: of torch.distributed; None: the default one.

    Raises, in every process: RuntimeError without a process group; TypeError for a model without counted read-outs;
    ValueError if settings or weights differ between processes, or for more than 2³¹ - 1 samples in all.

    >>> store = torch.distributed.HashStore()  # torchrun sets rank and size up for you
    >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> readout = ek.RidgeReadout(256, 10, engram=ek.StochasticEngram(0.1, temperature=0))
    >>> readout.observe(torch.randn(5, 256), torch.tensor([0, 1, 2, 3, 4]))
    >>> int(ek.merged_counts(readout).samples.sum())
    5
    >>> torch.distributed.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("merged_counts: expected a process group of torch.distributed, got none")
    merged = copy.deepcopy(model)
    readouts = [part for part in merged.modules() if isinstance(part, (PrototypeReadout, RidgeReadout))]
    if not readouts:
        raise TypeError(f"model: expected a PrototypeReadout or RidgeReadout in it, got none in {type(model).__name__}")
    counts = [counted for readout in readouts for counted in readout.buffers(recurse=False)]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, _identity(merged, readouts, counts), group=group)
    for rank, other in enumerate(everyone):
        for name, own in everyone[0].items():
            if other.get(name) != own:
                raise ValueError(f"{name}: expected the same in all processes, got another in process {rank} than in 0")
    for readout in readouts:
        samples = readout.samples.sum()
        dist.all_reduce(samples, group=group)
        if int(samples) > torch.iinfo(torch.int32).max:
            raise ValueError(f"samples: expected at most 2**31 - 1 of all processes, got {int(samples)}")
    for counted in counts:
        dist.all_reduce(counted, group=group)
    return merged


def _identity(model: nn.Module, readouts: list[Any], counts: list[Tensor]) -> dict[str, str]:
    """What processes must have in common: settings of the read-outs, and a digest of every tensor but the counts."""
    found = {f"settings of {type(part).__name__} {i}": f"{part}" for i, part in enumerate(readouts)}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not any(tensor is counted for counted in counts):
            values = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
            found[name] = f"{tuple(tensor.shape)} {hashlib.blake2b(values.tobytes()).hexdigest()}"
    return found
