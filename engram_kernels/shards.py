"""Rows of a hidden weight in one process: DTensors, as fully_shard (FSDP2) makes them of parameters.

A metaplastic update of a weight, its 8-bit scales among it, needs nothing of other rows, and its random bits go by the
number of the row. So each process updates its own rows, and together they do what one process would do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def of_whole_rows(weight: DTensor) -> bool:
    """Whether every process has some whole rows, or all of them."""
    from torch.distributed.tensor import Replicate, Shard

    return all(isinstance(place, Replicate) or (type(place) is Shard and place.dim == 0) for place in weight.placements)


def first_row(weight: DTensor) -> int:
    """The number of this process's first row among those of the whole weight."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return offset[0]


def like(weight: DTensor, columns: int, dtype: torch.dtype) -> DTensor:
    """Zeros (N, columns), whose rows lie where those of ``weight`` (N, K) lie."""
    from torch.distributed.tensor import DTensor

    own = weight.to_local()
    zeros = torch.zeros(own.shape[0], columns, dtype=dtype, device=own.device)
    shape, stride = torch.Size((weight.shape[0], columns)), (columns, 1)
    return DTensor.from_local(zeros, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride)


def local(tensor: Tensor | None) -> Tensor | None:
    """This process's part of a DTensor; any other tensor as it is."""
    return tensor if tensor is None or not hasattr(tensor, "to_local") else tensor.to_local()
