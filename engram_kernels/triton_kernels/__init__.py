"""The updates of hidden weights on CUDA, in Triton, which is imported when one first runs: that takes a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.engram_kernels
_GRADIENT_BLOCK_BYTES = 4 << 20  # stays in the second-level cache, and is enough work for every device
_GRADIENT_BLOCK_ROWS = 64  # so many rows begin at a multiple of 16 bytes in every format


@functools.cache
def _launch() -> Callable[..., None]:
    try:
        from .metaplastic_adam import launch
    except ImportError as error:
        raise RuntimeError(
            "metaplastic_adam_: expected Triton, which updates CUDA tensors, and could not import it "
            f"({error}); install it with pip install 'engram-kernels[triton]'"
        ) from error
    return launch


def _nan_flag() -> int:
    """Address of the int32 that tells later operators of a weight that could not be updated; raises what it told."""
    return _ops._update_nan_flag()


def _refuse_capture() -> None:
    """Raises: RuntimeError within the capture of a CUDA graph."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step: expected no capture into a CUDA graph, which would replay one step's bias correction and random "
            "bits for ever, since both are read when the call is made"
        )


def _scales(settings: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    return settings.get("exp_avg_scale"), settings.get("exp_avg_sq_scale")


def metaplastic_adam_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sign_bits: Tensor | None,
    **settings: Any,
) -> None:
    """:func:`engram_kernels.ops.metaplastic_adam_` on CUDA; a NaN is an error of a later operator."""
    launch, grad = _launch(), grad.contiguous()
    numbers = _ops._check_update(weight, grad, exp_avg, exp_avg_sq, sign_bits, **settings)
    _refuse_capture()
    with torch.cuda.device(weight.device):
        launch(
            weight,
            grad,
            (exp_avg, exp_avg_sq, *_scales(settings), sign_bits),
            numbers,
            settings.get("first_row", 0),
            _nan_flag(),
        )


def gated_metaplastic_adam_(
    d: Tensor,
    x_bits: Tensor,
    gate_bits: Tensor | None,
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sign_bits: Tensor | None,
    **settings: Any,
) -> None:
    """:func:`engram_kernels.ops.gated_metaplastic_adam_` on CUDA; the gradient exists for a block of rows at a time."""
    k = weight.shape[1]
    _update_by_blocks(
        lambda own: _ops.gated_weight_grad(own.contiguous(), x_bits, k, gate_bits),
        d, weight, (exp_avg, exp_avg_sq, *_scales(settings), sign_bits), settings,
    )  # fmt: skip


def real_metaplastic_adam_(
    d: Tensor,
    x: Tensor,
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sign_bits: Tensor | None,
    **settings: Any,
) -> None:
    """:func:`engram_kernels.ops.real_metaplastic_adam_` on CUDA, likewise."""
    if x.dim() != 2 or x.shape[0] != d.shape[0] or x.shape[1] != weight.shape[1]:
        raise RuntimeError(f"x: expected shape {(d.shape[0], weight.shape[1])}, got {tuple(x.shape)}")
    x = x.float()
    _update_by_blocks(lambda own: own.T @ x, d, weight, (exp_avg, exp_avg_sq, *_scales(settings), sign_bits), settings)


def _update_by_blocks(
    gradient_of: Callable[[Tensor], Tensor],
    d: Tensor,
    weight: Tensor,
    state: tuple[Tensor | None, ...],
    settings: dict[str, Any],
) -> None:
    """The update with ``gradient_of`` some columns of d, a block of rows of the weight at a time."""
    launch, (exp_avg, exp_avg_sq, *_, sign_bits) = _launch(), state
    numbers = _ops._check_update(weight, None, exp_avg, exp_avg_sq, sign_bits, **settings)
    _refuse_capture()
    n, k = weight.shape
    if d.dim() != 2 or d.shape[1] != n:
        raise RuntimeError(f"d: expected shape (M, {n}) to meet the rows of the weight, got {tuple(d.shape)}")
    d = d.float()
    rows = max(1, _GRADIENT_BLOCK_BYTES // (4 * k * _GRADIENT_BLOCK_ROWS)) * _GRADIENT_BLOCK_ROWS
    with torch.cuda.device(weight.device):
        first_row, nan_flag = settings.get("first_row", 0), _nan_flag()
        for begin in range(0, n, rows):
            block = slice(begin, begin + rows)
            state_of_block = tuple(None if t is None else t[block] for t in state)
            launch(weight[block], gradient_of(d[:, block]), state_of_block, numbers, first_row + begin, nan_flag)
