"""The operators under ``torch.vmap``: ensembles and per-sample gradients.

Batches of samples with the same weights become one call with more samples. Everything else is a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import operators

Batched = tuple[Any, Any]  # a result and the dimension of its batch, or several and theirs


def _loop(
    operator: Callable[..., Tensor], size: int, dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> Batched:
    """One call for each member of the batch."""
    results = [
        # lists of numbers have a list of dimensions, all None
        operator(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(arguments, dims, strict=True)))
        for i in range(size)
    ]
    return torch.stack(results), 0


def _register_loop(name: str) -> None:
    operator = getattr(operators, name)

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Batched:
        return _loop(operator, info.batch_size, in_dims, arguments)

    torch.library.register_vmap(f"engram_kernels::{name}", rule)


def _register_rows(name: str, rows: tuple[int, ...]) -> None:
    """Samples of all members in one call, where only the arguments numbered ``rows``, (M, ...), have a batch."""
    operator = getattr(operators, name)

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Batched:
        size = info.batch_size
        moved = [a if dim is None else a.movedim(dim, 0) for a, dim in zip(arguments, in_dims, strict=True)]
        first, dims = moved[0], 2 if in_dims[0] is None else 3
        if first.dim() != dims or any(dim is not None and i not in rows for i, dim in enumerate(in_dims)):
            return _loop(operator, size, in_dims, arguments)
        samples = first.shape[-2]
        for i, argument in enumerate(moved):  # arguments that have their default may be absent
            if i in rows and argument is not None:
                moved[i] = _flat(argument, in_dims[i] is not None, size, samples)
        result = operator(*moved)
        if isinstance(result, tuple):
            return tuple(own.unflatten(0, (size, samples)) for own in result), (0,) * len(result)
        return result.unflatten(0, (size, samples)), 0

    torch.library.register_vmap(f"engram_kernels::{name}", rule)


def _flat(argument: Tensor, batched: bool, size: int, samples: int) -> Tensor:
    """An argument (size, M, ...), (size, ...) shared by samples, (M, ...) or (...) shared by both, as rows."""
    if not batched:
        if argument.dim() == 1:
            return argument
        return argument.expand(size, *argument.shape).flatten(0, 1)
    if argument.dim() == 2:
        argument = argument[:, None].expand(-1, samples, -1)
    return argument.flatten(0, 1)


def _register_leading(name: str) -> None:
    """The operator takes any leading dimensions: the batch is one of them."""
    operator = getattr(operators, name)

    def rule(info: Any, in_dims: tuple[int, ...], argument: Tensor, *others: Any) -> Batched:
        return operator(argument.movedim(in_dims[0], 0), *others), 0

    torch.library.register_vmap(f"engram_kernels::{name}", rule)


_register_leading("pack_signs")
_register_leading("kept_sign_bits")
_register_leading("unpack_signs")
_register_rows("pack_window", (0, 2))
_register_rows("binary_matmul", (0, 3))
_register_rows("binary_threshold", (0, 5))
_register_rows("sign_matmul", (0,))
_register_rows("sign_matmul_t", (0,))
_register_rows("standardise", (0,))
_register_rows("standardise_grad", (0, 1, 2))
_register_rows("gated_input_grad", (0, 2, 3))
_register_rows("masked_input_grad", (0, 3))
_register_rows("value_signs", (0,))
_register_rows("top_units", (0,))
_register_loop("packed_network")
_register_loop("transpose_bits")
_register_loop("patch_excitability")
_register_loop("gated_weight_grad")
_register_loop("real_weight_grad")
_register_loop("unfold_bits")
_register_loop("interleave_bits")
_register_loop("binary_conv2d")
_register_loop("masked_conv2d_input_grad")
_register_loop("gated_conv2d_weight_grad")
_register_loop("sample_engram")  # its draws go by the number of the row
