"""The products of convolutions on CUDA: their taps unfolded into rows of bits, then the products of matrices.

Samples are taken in blocks, so that what is unfolded stays small. On the CPU
csrc/cpu/launch.cpp does all of it at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .library import operators
from .reference import Window, words_for

_UNFOLDED_BYTES = 1 << 26  # of a block: rows of bits forwards and for filters, floats for the input


def _blocks(samples: int, window: Window, row_bytes: int) -> Iterator[slice]:
    """Samples whose unfolded rows take so much memory, at least one at a time."""
    block = max(1, _UNFOLDED_BYTES // max(1, window.out_height * window.out_width * row_bytes))
    return (slice(first, first + block) for first in range(0, samples, block))


def _groups(window: Window, outputs: int) -> Iterator[tuple[int, slice]]:
    """Each group and its outputs."""
    each = outputs // window.groups
    return ((group, slice(group * each, (group + 1) * each)) for group in range(window.groups))


def _gate_of(gate_bits: Tensor | None, samples: int, window: Window, device: torch.device) -> Tensor | None:
    """A gate for every sample, without its padding, where one is needed: padded taps have bits of 0, not of no sign."""
    if gate_bits is not None:
        return gate_bits.expand(samples, -1)
    if not (window.top or window.bottom or window.left or window.right):
        return None
    units = torch.ones(1, window.units, dtype=torch.float32, device=device)
    return operators.pack_signs(units).expand(samples, -1)


def _rows(bits: Tensor | None, block: slice, window: Window, group: int) -> Tensor | None:
    return None if bits is None else operators.unfold_bits(bits[block], window, group)


def binary_conv2d(
    x_bits: Tensor, w_bits: Tensor, window: list[int], gate_bits: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """As :func:`engram_kernels.ops.binary_conv2d`."""
    w, samples, outputs = Window(*window), x_bits.shape[0], w_bits.shape[0]
    gate = _gate_of(gate_bits, samples, w, x_bits.device)
    y = x_bits.new_empty((samples, w.out_height, w.out_width, outputs), dtype=torch.float32)
    for block in _blocks(samples, w, 8 * words_for(w.group_units)):
        for group, own in _groups(w, outputs):
            rows = _rows(x_bits, block, w, group)
            sums = operators.binary_matmul(rows, w_bits[own], w.group_units, _rows(gate, block, w, group))
            y[block, :, :, own] = (sums * scale).view(-1, w.out_height, w.out_width, sums.shape[1])
    return y


def masked_conv2d_input_grad(
    d: Tensor, w_bits: Tensor, window: list[int], mask_bits: Tensor, scale: float = 1.0
) -> Tensor:
    """As :func:`engram_kernels.ops.masked_conv2d_input_grad`."""
    w, samples = Window(*window), d.shape[0]
    channels, kernel = w.channels // w.groups, (w.kernel_h, w.kernel_w)
    padded = w.height + w.top + w.bottom, w.width + w.left + w.right
    inside = slice(w.top, w.top + w.height), slice(w.left, w.left + w.width)
    dx = d.new_empty((samples, w.height, w.width, w.channels))
    for block in _blocks(samples, w, 4 * w.group_units):
        for group, own in _groups(w, w_bits.shape[0]):
            terms = operators.sign_matmul(d[block, :, :, own].flatten(0, 2).float(), w_bits[own], w.group_units)
            # fold wants (B, channels * taps, out pixels)
            terms = terms.view(-1, w.out_height * w.out_width, w.kernel_h * w.kernel_w, channels)
            terms = terms.permute(0, 3, 2, 1).flatten(1, 2)
            image = torch.nn.functional.fold(
                terms, padded, kernel, dilation=(w.dilation_h, w.dilation_w), stride=(w.stride_h, w.stride_w)
            )
            of_group = slice(group * channels, (group + 1) * channels)
            dx[block, :, :, of_group] = image[:, :, inside[0], inside[1]].permute(0, 2, 3, 1) * scale
    recruited = operators.unpack_signs(mask_bits, w.units, torch.int8).view(-1, w.height, w.width, w.channels) > 0
    return dx.masked_fill_(~recruited, 0.0)


def gated_conv2d_weight_grad(
    d: Tensor, x_bits: Tensor, window: list[int], gate_bits: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """As :func:`engram_kernels.ops.gated_conv2d_weight_grad`."""
    w, samples, outputs = Window(*window), d.shape[0], d.shape[3]
    gate = _gate_of(gate_bits, samples, w, d.device)
    dw = torch.zeros(outputs, w.group_units, dtype=torch.float32, device=d.device)
    for block in _blocks(samples, w, 8 * words_for(w.group_units)):
        for group, own in _groups(w, outputs):
            of_group = d[block, :, :, own].flatten(0, 2).float()
            rows = _rows(x_bits, block, w, group)
            gate_rows = _rows(gate, block, w, group)
            dw[own] += operators.gated_weight_grad(of_group, rows, w.group_units, gate_rows)
    return (dw * scale).to(d.dtype)


for _function in (binary_conv2d, masked_conv2d_input_grad, gated_conv2d_weight_grad):
    torch.library.impl(f"engram_kernels::{_function.__name__}", "cuda", _function)
