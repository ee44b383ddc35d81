"""Every operator in plain PyTorch: the definition that all backends are tested against.

Slow and simple on purpose. ``bits`` are the packed format: int64 words, bit 1 = +1 (in a gate: recruited), least
significant bit first along the last dimension, rows padded with 0 bits to a multiple of 128 bits. M samples, N outputs,
K inputs throughout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

_WORD_BITS = 64
_ROW_BITS = 128
_LOW = 0xFFFFFFFF
_GROUP, _GROUPED_ROWS = 12, 32
_PARTIAL_SUMS = 32


def words_for(k: int) -> int:
    """Number of 64-bit words in a packed row of ``k`` units."""
    return -(-k // _ROW_BITS) * (_ROW_BITS // _WORD_BITS)


def _pack(bits: Tensor) -> Tensor:
    """Booleans (..., K) -> packed int64 (..., words)."""
    k = bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.int64), (0, words_for(k) * _WORD_BITS - k))
    place = torch.arange(_WORD_BITS, device=bits.device)
    return (padded.unflatten(-1, (-1, _WORD_BITS)) << place).sum(-1)


def _unpack(bits: Tensor, k: int) -> Tensor:
    """Packed int64 (..., words) -> booleans (..., K)."""
    place = torch.arange(_WORD_BITS, device=bits.device)
    return (bits.unsqueeze(-1) >> place & 1).flatten(-2)[..., :k].bool()


def _gate(gate_bits: Tensor | None, k: int) -> Tensor | float:
    """The gate as a factor: 0 or 1 per unit, or 1 where there is none."""
    return 1.0 if gate_bits is None else _unpack(gate_bits, k).to(torch.float64)


def pack_signs(x: Tensor) -> Tensor:
    """Signs of ``x``, sign(0) = +1. Floats (..., K) -> bits (..., words)."""
    if x.isnan().any():
        raise RuntimeError("x: expected numbers, got NaN, which has no sign")
    return _pack(x >= 0)


def pack_window(x: Tensor, width: float = 1.0, gate_bits: Tensor | None = None) -> Tensor:
    """Straight-through window ``1{|x| <= width} * gate``. Floats (M, K) -> bits (M, words)."""
    window = _pack(x.float().abs() <= width)
    return window if gate_bits is None else window & gate_bits


def unpack_signs(bits: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bits (..., words) -> (..., K) of +1 and -1 in ``dtype``."""
    return _unpack(bits, k).to(dtype) * 2 - 1


def transpose_bits(bits: Tensor, k: int) -> Tensor:
    """Bits of samples (M, words of K) -> bits of units (K, words of M)."""
    return pack_signs(unpack_signs(bits, k).T.contiguous())


def binary_matmul(x_bits: Tensor, w_bits: Tensor, k: int, gate_bits: Tensor | None = None) -> Tensor:
    """``y[m,n] = sum_k g[m,k] s(x[m,k]) s(W[n,k])``. (M, words), (N, words) -> int32 (M, N)."""
    x, w = unpack_signs(x_bits, k, torch.float64), unpack_signs(w_bits, k, torch.float64)
    return ((x * _gate(gate_bits, k)) @ w.T).to(torch.int32)


def binary_threshold(
    x_bits: Tensor, w_bits: Tensor, k: int, threshold: Tensor, flip: Tensor, gate_bits: Tensor | None = None
) -> Tensor:
    """Sign bits of the next layer: ``1{(y[m,n] >= threshold[n]) != flip[n]}``, y as in :func:`binary_matmul`.

    ``threshold`` int32 (N,), ``flip`` bool (N,) -> bits (M, words of N). BatchNorm and the sign after it are one such
    threshold per unit, flipped where BatchNorm's factor is negative (Umuroglu et al. 2017, FINN).
    """
    return _pack((binary_matmul(x_bits, w_bits, k, gate_bits) >= threshold) != flip)


def value_signs(y: Tensor, threshold: Tensor | None = None, flip: Tensor | None = None) -> Tensor:
    """Signs of integers by a threshold a unit, ``(y >= threshold) != flip``, or by the mean, ``y[m] >= mean of y[m]``.

    int32 (M, N), int32 (N,), bool (N,) -> bits (M, words of N).
    """
    if threshold is None:
        wide = y.to(torch.int64)
        return _pack(wide * y.shape[1] >= wide.sum(1, keepdim=True))
    return _pack((y >= threshold) != (False if flip is None else flip))


def top_units(y: Tensor, count: int) -> Tensor:
    """The ``count`` units of largest y, ties to the lower index. int32 (M, K) -> gate bits (M, words)."""
    order = y.argsort(dim=1, descending=True, stable=True)[:, :count]
    return _pack(torch.zeros_like(y, dtype=torch.bool).scatter_(1, order, True))


def _mean_in_order(terms: Tensor) -> Tensor:
    """Means of the rows of float64 (M, N) -> (M, 1), summed in the one order that all backends keep to.

    Term n joins partial sum ``n mod 32``, one after the other; then the upper half of the partial sums is added to the
    lower one until a single sum is left.
    """
    n = terms.shape[1]
    groups = torch.nn.functional.pad(terms, (0, -n % _PARTIAL_SUMS)).unflatten(1, (-1, _PARTIAL_SUMS))
    sums = torch.zeros_like(groups[:, 0])
    for group in groups.unbind(1):
        sums = sums + group
    while sums.shape[1] > 1:
        lower, upper = sums.chunk(2, dim=1)
        sums = lower + upper
    return sums / n


def standardise(y: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """``z = (y - mean) / sqrt(variance + eps)`` of each row, and what the gradient needs of it. Exact in every bit.

    Floats (M, N) -> z (M, N) in the dtype of y, and the mean and the reciprocal deviation, float64 (M, 2). The mean is
    summed in float64, without error where y holds integers, and subtracted as two float32 numbers, so that the sign of
    z is that of ``N y - sum(y)``, ties included.
    """
    mean = _mean_in_order(y.double())
    centred = _centred(y, mean)
    variance = _mean_in_order(centred.double().square())
    reciprocal = (1 / (variance + eps).sqrt()).float()
    return (centred * reciprocal).to(y.dtype), torch.cat([mean, reciprocal.double()], dim=1)


def _centred(y: Tensor, mean: Tensor) -> Tensor:
    """``y - mean`` in float32, of a float64 mean."""
    high = mean.float()
    return (y.float() - high) - (mean - high.double()).float()


def standardise_grad(d: Tensor, y: Tensor, moments: Tensor) -> Tensor:
    """Gradient of y through :func:`standardise`: ``(d - mean(d) - z mean(d z)) / sqrt(variance + eps)``.

    d (M, N), y (M, N), moments (M, 2) -> (M, N) in the dtype of y. Exact in every bit.
    """
    mean, reciprocal = moments[:, :1], moments[:, 1:].float()
    z, wide = _centred(y, mean) * reciprocal, d.float()
    mean_d, mean_dz = _mean_in_order(wide.double()), _mean_in_order(wide.double() * z.double())
    return (((wide - mean_d.float()) - z * mean_dz.float()) * reciprocal).to(y.dtype)


class Window(NamedTuple):
    """Where the taps of a convolution lie; ``csrc/core/window.h`` is the same.

    A sample of height x width x channels is one packed row of units, pixel by pixel, the channels of a pixel together.
    Tap (i, j) of output pixel (y, x) is pixel (y stride_h - top + i dilation_h, x stride_w - left + j dilation_w);
    outside the image it is padding and counts nothing. Filters and unfolded rows hold, tap by tap, the channels of one
    of ``groups`` groups. A dilation of 0, which :func:`unfold_bits` alone takes, takes one pixel
    for all taps.

    >>> window = ek.reference.Window(height=5, width=7, channels=3, kernel_h=3, kernel_w=3, top=1, bottom=1)
    >>> window.out_height, window.out_width, window.units, window.group_units
    (5, 5, 105, 27)
    """

    height: int
    width: int
    channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return (self.height + self.top + self.bottom - self.dilation_h * (self.kernel_h - 1) - 1) // self.stride_h + 1

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return (self.width + self.left + self.right - self.dilation_w * (self.kernel_w - 1) - 1) // self.stride_w + 1

    @property
    def units(self) -> int:
        """Units of a sample."""
        return self.height * self.width * self.channels

    @property
    def group_units(self) -> int:
        """Units that an output sees, K: all taps of the channels of a group."""
        return self.kernel_h * self.kernel_w * (self.channels // self.groups)


# Stages of packed_network and the numbers that each has behind its own, which is its place here.
PACKED_STAGES = {
    "product": ("inputs", "real"),
    "sign by mean": (),
    "sign by threshold": (),
    "recruit": ("recruited", "score"),
    "gate": (),
    "affine": ("factors", "scaled", "shifted"),
    "dendritic": ("segments", "recruited"),
    "prototype": ("recruited",),
    "ridge": (),
    "convolution": (*Window._fields, "real"),
    "max_pool": (*Window._fields, "flipped"),
    "transpose": ("rows", "columns"),
}
PACKED_SCORES = ("value", "magnitude", "standardised", "distance")


def packed_tensors(name: str, numbers: list[int]) -> int:
    """How many tensors a stage of `packed_network` has, by its name and numbers."""
    if name == "product":
        return 1 + numbers[1]
    if name == "affine":
        return numbers[1] + numbers[2]
    if name in ("convolution", "max_pool"):
        return numbers[-1] + (name == "convolution")
    return {"sign by threshold": 2, "gate": 1, "dendritic": 2, "prototype": 3, "ridge": 4}.get(name, 0)


def packed_network(
    x: Tensor, gate_bits: Tensor | None, layout: list[int], factors: list[float], tensors: list[Tensor]
) -> Tensor:
    """The layers of a packed network from a product or convolution on, ``docs/packed-format.md``, in one call.

    uint8 (M, K) where that is ``real``, else bits (M, words) with their gate -> the values that the last
    stage leaves, float32 (M, N), or the gate that it chooses, bits (M, words).

    ``layout`` has for each stage its place in `PACKED_STAGES` and the numbers that it has there; ``tensors`` are those
    of the stages in order:

        product             signs (N, words), and what group_signs makes of them where it is real
        convolution         signs (O, words of K), and likewise
        max_pool            flips as bits (words,) where it is flipped
        sign by threshold   int32 thresholds (P,), flips as bits (words of P,): of all N units, or of a multiple P of
                            128 units that divides N, which come again
        gate                bits (words,)
        affine              float32 scale (N,) where it is scaled, shift (N,) where it is shifted; own ``factors``
        dendritic           signs (C S, words), float32 rate times their sums (C S,)
        prototype           prototypes, bits (C, words), float32 offset (C,), int64 samples (C,)
        ridge               float32 weight (C, K), bias (C,), sums of the rows of weight (C,), int64 samples (C,)
    """
    numbers, own_factors, held = iter(layout), iter(factors), iter(tensors)
    names = list(PACKED_STAGES)
    y, bits, gate, units, name = x, x, gate_bits, 0, ""
    for number in numbers:
        name = names[number]
        own = [next(numbers) for _ in PACKED_STAGES[name]]
        if name == "product":
            units, weight = own[0], next(held)
            if own[1]:
                y, _ = sign_matmul_t(y, weight, units), next(held)
            else:
                y = binary_matmul(bits, weight, units, gate)
            gate, units = None, weight.shape[0]
        elif name == "convolution":
            window, weight = Window(*own[:-1]), next(held)
            if own[-1]:
                sums = _convolved(_image(y, window), weight, window)
                next(held)
            else:
                sums = binary_conv2d(bits, weight, window, gate)
            y = sums.flatten(1).to(torch.int32)
            gate, units = None, y.shape[1]
        elif name == "max_pool":
            window = Window(*own[:-1])
            bits, units = pool_signs(bits, window), window.out_height * window.out_width * window.channels
            bits = bits ^ next(held) if own[-1] else bits
        elif name == "transpose":
            y = y.unflatten(1, (own[0], own[1])).transpose(1, 2).flatten(1)
        elif name == "sign by mean":
            bits = value_signs(y)
        elif name == "sign by threshold":
            threshold, flips = next(held), next(held)
            rows = y.reshape(-1, len(threshold))
            bits = (value_signs(rows, threshold) ^ flips).reshape(len(y), words_for(units))
        elif name == "recruit":
            score = PACKED_SCORES[own[1]]
            if score == "distance":
                y_score = (y.to(torch.int64) * units - y.to(torch.int64).sum(1, keepdim=True)).abs()
            else:
                y_score = y.abs() if score == "magnitude" else y
            gate = top_units(y_score, own[0])
        elif name == "gate":
            gate = next(held).expand(len(x), -1)
        elif name == "affine":
            y = y.float()
            for _ in range(own[0]):
                y = y * next(own_factors)
            scale = next(held) if own[1] else None
            if own[2]:
                y = y + next(held) if scale is None else torch.addcmul(next(held), y, scale)
        elif name == "dendritic":
            assert gate is not None
            y = binary_matmul(gate, next(held), units, gate).float() - next(held)
            y = (y / own[1] ** 0.5).unflatten(1, (-1, own[0])).amax(2)
        elif name == "prototype":
            assert gate is not None
            y = (binary_matmul(gate, next(held), units, gate) - next(held)) / own[0] ** 0.5
            y = y.masked_fill(next(held) == 0, -torch.inf)
        else:
            assert gate is not None
            products = sign_matmul_t(next(held), gate, units).T
            bias, sums = next(held), next(held)
            y = (0.5 * (products + sums) + bias).masked_fill(next(held) == 0, -torch.inf)
    if name in ("recruit", "gate"):
        assert gate is not None
        return gate.contiguous()
    return y.float()


def patch_excitability(images: Tensor, filters: Tensor, units: Tensor, floor: float, pool: int = 3) -> Tensor:
    """How much random filters respond near their places: correlations with patches, by the contrast of the patch.

    ``z[m,n] = max over pool x pool places of sum_ij w[f,i,j] x[m,r+i,c+j,channel] / (sqrt(sum (x - mean)^2) + floor)``

    uint8 (M, height, width, channels), int8 (F, size, size) of -1, 0 and 1, rising int64 (N,), numbers
    ``((r * columns + c) * channels + channel) * F + f`` of the first place and the filter -> float32 (M, N).
    """
    m, height, width, channels = images.shape
    size = filters.shape[1]
    x = images.permute(0, 3, 1, 2).reshape(m * channels, 1, height, width).double()
    patch = x.new_ones(1, 1, size, size)
    sums, pixels, squares = (
        torch.nn.functional.conv2d(a, w).round().float()  # integers
        for a, w in ((x, filters[:, None].double()), (x, patch), (x.square(), patch))
    )
    spread = (squares - pixels * pixels * (1 / (size * size))).clamp(min=0)
    contrast = spread.double().sqrt().float() + floor  # torch's root of float32 is not the nearest one everywhere
    z = torch.nn.functional.max_pool2d(sums * (1 / contrast), pool, stride=1)
    return z.unflatten(0, (m, channels)).permute(0, 3, 4, 1, 2).flatten(1)[:, units]


def sign_matmul(a: Tensor, w_bits: Tensor, k: int) -> Tensor:
    """``y = a @ s(W)``. Floats (M, N), bits (N, words) -> (M, K) in the dtype of ``a``."""
    return (a.double() @ unpack_signs(w_bits, k, torch.float64)).to(a.dtype)


def group_signs(w_bits: Tensor, k: int) -> Tensor:
    """Packed signs (N, words) in groups of 12 inputs: int16 (ceil(K / 12), N rounded up to a multiple of 32).

    Bit i of number n of group g is that of ``W[n, 12 g + i]`` for i < 6, bit 8 + i that of ``W[n, 12 g + 6 + i]``.
    Layout: ``csrc/cpu/grouped_product.cpp``.
    """
    n, groups = w_bits.shape[0], -(-k // _GROUP)
    padded = torch.nn.functional.pad(
        _unpack(w_bits, k).to(torch.int16), (0, groups * _GROUP - k, 0, -n % _GROUPED_ROWS)
    )
    place = torch.arange(_GROUP, dtype=torch.int16, device=w_bits.device)
    place = torch.where(place < _GROUP // 2, place, place - _GROUP // 2 + 8)
    return (padded.unflatten(1, (groups, _GROUP)) << place).sum(2).to(torch.int16).T.contiguous()


def sign_matmul_t(x: Tensor, w_bits: Tensor, k: int, w_groups: Tensor | None = None) -> Tensor:
    """``y = x @ s(W).T``. Floats (M, K), bits (N, words) -> (M, N) in the dtype of ``x``; uint8 -> int32, exact.

    ``w_groups``, what :func:`group_signs` makes of the bits, says nothing new.
    """
    y = x.double() @ unpack_signs(w_bits, k, torch.float64).T
    return y.to(torch.int32 if x.dtype == torch.uint8 else x.dtype)


def masked_input_grad(d: Tensor, w_bits: Tensor, k: int, mask_bits: Tensor) -> Tensor:
    """``dx[m,k] = mask[m,k] sum_n d[m,n] s(W[n,k])``. (M, N) -> (M, K) in the dtype of ``d``."""
    dx = d.double() @ unpack_signs(w_bits, k, torch.float64)
    return (dx * _gate(mask_bits, k)).to(d.dtype)


def gated_input_grad(d: Tensor, w_bits: Tensor, x: Tensor, gate_bits: Tensor | None = None) -> Tensor:
    """Straight-through gradient of the input, masked by ``gate * 1{|x| <= 1}``. (M, N), x (M, K) -> (M, K)."""
    return masked_input_grad(d, w_bits, x.shape[1], pack_window(x, 1.0, gate_bits))


def gated_weight_grad(d: Tensor, x_bits: Tensor, k: int, gate_bits: Tensor | None = None) -> Tensor:
    """``dW[n,k] = sum_m d[m,n] g[m,k] s(x[m,k])``. (M, N), bits (M, words) -> (N, K) in the dtype of ``d``."""
    x = unpack_signs(x_bits, k, torch.float64) * _gate(gate_bits, k)
    return (d.double().T @ x).to(d.dtype)


def real_weight_grad(d: Tensor, x: Tensor) -> Tensor:
    """``dW[n,k] = sum_m d[m,n] x[m,k]``. (M, N), x (M, K) -> (N, K) in the dtype of both."""
    return (d.double().T @ x.double()).to(d.dtype)


def _image(units: Tensor, window: Window) -> Tensor:
    """Units (B, units) as a padded image (B, C, height, width) of float64."""
    image = units.to(torch.float64).unflatten(1, (window.height, window.width, window.channels)).permute(0, 3, 1, 2)
    return torch.nn.functional.pad(image, (window.left, window.right, window.top, window.bottom))


def _gated_image(x_bits: Tensor, window: Window, gate_bits: Tensor | None) -> Tensor:
    """Signs within their gate as a padded image: padding is 0 and counts nothing."""
    return _image(unpack_signs(x_bits, window.units) * _gate(gate_bits, window.units), window)


def _filters(w_bits: Tensor, window: Window) -> Tensor:
    """Filters as ``conv2d`` takes them, (O, C / groups, kernel_h, kernel_w)."""
    channels = window.channels // window.groups
    signs = unpack_signs(w_bits, window.group_units, torch.float64)
    return signs.unflatten(1, (window.kernel_h, window.kernel_w, channels)).permute(0, 3, 1, 2)


def unfold_bits(bits: Tensor, window: Window, group: int = 0) -> Tensor:
    """The taps of every output pixel, 0 in the padding. Bits (B, words of units) -> (B out pixels, words of K)."""
    w = Window(*window)
    channels = w.channels // w.groups
    image = _image(_unpack(bits, w.units), w)[:, group * channels : (group + 1) * channels]
    y = torch.arange(w.out_height)[:, None] * w.stride_h + torch.arange(w.kernel_h) * w.dilation_h
    x = torch.arange(w.out_width)[:, None] * w.stride_w + torch.arange(w.kernel_w) * w.dilation_w
    # (B, channels, out_height, out_width, kernel_h, kernel_w)
    windows = image[:, :, y[:, None, :, None], x[None, :, None, :]]
    return _pack(windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, w.group_units).bool())


def interleave_bits(bits: Tensor, rows: int, k: int) -> Tensor:
    """Rows of a sample, taken in turn. Bits (B rows, words of k) -> (B, words of rows k), unit ``i rows + r``."""
    return _pack(_unpack(bits, k).unflatten(0, (-1, rows)).transpose(1, 2).flatten(1))


def binary_conv2d(
    x_bits: Tensor, w_bits: Tensor, window: Window, gate_bits: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """``y = scale conv2d(g s(x), s(W))``, padded by 0.

    (B, words of units), (O, words of K), gate (words of units,) or like x -> float32 (B, out_height, out_width, O).
    """
    w = Window(*window)
    return _convolved(_gated_image(x_bits, w, gate_bits), w_bits, w) * torch.tensor(scale, dtype=torch.float32)


def _convolved(image: Tensor, w_bits: Tensor, w: Window) -> Tensor:
    """A padded image (B, C, height, width) with filters -> float32 (B, out_height, out_width, O)."""
    y = torch.nn.functional.conv2d(
        image,
        _filters(w_bits, w),
        stride=(w.stride_h, w.stride_w),
        dilation=(w.dilation_h, w.dilation_w),
        groups=w.groups,
    )
    return y.permute(0, 2, 3, 1).float()


def pool_signs(bits: Tensor, window: Window) -> Tensor:
    """The largest sign of each channel that an output pixel sees; padding has none above -1.

    (B, words of units) -> (B, words of out_height out_width channels).
    """
    w = Window(*window)
    signs = unpack_signs(bits, w.units).unflatten(1, (w.height, w.width, w.channels)).permute(0, 3, 1, 2)
    image = torch.nn.functional.pad(signs, (w.left, w.right, w.top, w.bottom), value=-1.0)
    kernel, stride, dilation = (w.kernel_h, w.kernel_w), (w.stride_h, w.stride_w), (w.dilation_h, w.dilation_w)
    return pack_signs(torch.nn.functional.max_pool2d(image, kernel, stride, 0, dilation).permute(0, 2, 3, 1).flatten(1))


def masked_conv2d_input_grad(
    d: Tensor, w_bits: Tensor, window: Window, mask_bits: Tensor, scale: float = 1.0
) -> Tensor:
    """Gradient of the input of :func:`binary_conv2d`, masked like :func:`masked_input_grad`.

    (B, out_height, out_width, O), mask (words of units,) or (B, words of units) -> (B, height, width, C).
    """
    w = Window(*window)
    shape = (d.shape[0], w.channels, w.height + w.top + w.bottom, w.width + w.left + w.right)
    dx = conv2d_input(
        shape,
        _filters(w_bits, w),
        d.double().permute(0, 3, 1, 2),
        stride=(w.stride_h, w.stride_w),
        dilation=(w.dilation_h, w.dilation_w),
        groups=w.groups,
    )
    inside = dx[:, :, w.top : w.top + w.height, w.left : w.left + w.width].permute(0, 2, 3, 1)
    mask = _unpack(mask_bits, w.units).unflatten(-1, (w.height, w.width, w.channels))
    return torch.where(mask, inside * scale, 0.0).to(d.dtype)


def gated_conv2d_weight_grad(
    d: Tensor, x_bits: Tensor, window: Window, gate_bits: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Gradient of the filters of :func:`binary_conv2d`. (B, out_height, out_width, O) -> (O, K)."""
    w = Window(*window)
    dw = conv2d_weight(
        _gated_image(x_bits, w, gate_bits),
        (d.shape[3], w.channels // w.groups, w.kernel_h, w.kernel_w),
        d.double().permute(0, 3, 1, 2),
        stride=(w.stride_h, w.stride_w),
        dilation=(w.dilation_h, w.dilation_w),
        groups=w.groups,
    )
    return (dw.permute(0, 2, 3, 1).flatten(1) * scale).to(d.dtype)


def philox(seed: Tensor, rows: int, k: int, first_row: int = 0, row_step: int = 1) -> Tensor:
    """Philox4x32-10 draws (Salmon et al. 2011): 32 random bits per unit, int64 (rows, k) in [0, 2^32).

    ``seed`` is int64 (2,): the 64-bit key and an offset below 2^32. The draw of unit ``column`` of a row is word
    ``column % 4`` of counter ``(column // 4, row low, row high, offset)``.
    """
    key, offset = (int(value) for value in seed)
    groups = -(-k // 4)
    row = (first_row + row_step * torch.arange(rows)).unsqueeze(1).expand(rows, groups)
    c0 = torch.arange(groups).expand(rows, groups) & _LOW
    c1, c2, c3 = row & _LOW, row >> 32, torch.full_like(row, offset)
    key0, key1 = key & _LOW, key >> 32 & _LOW
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps to the right 64 bits
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ key0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ key1, p0 & _LOW
        key0, key1 = key0 + 0x9E3779B9 & _LOW, key1 + 0xBB67AE85 & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :k]


def natural_log(x: Tensor) -> Tensor:
    """ln of positive normal float32, by single IEEE operations in the order of ``csrc/core/philox.h``."""
    bits = x.view(torch.int32)
    e = bits - 0x3F3504F3 >> 23
    m = (bits - (e << 23)).view(torch.float32)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = z * 0.11111111 + 0.14285714
    p = p * z + 0.2
    p = p * z + 0.33333334
    p = p * z + 1.0
    return e.float() * 0.6931472 + (s + s) * p


def gumbel(draws: Tensor) -> Tensor:
    """Standard Gumbel variates, float32, from 32 random bits each: ``-ln(-ln u)``."""
    u = ((draws >> 9).float() + 0.5) * 2.0**-23
    return -natural_log(-natural_log(u))


def recruited_units(rate: float, k: int) -> int:
    """Units that a share ``rate`` of ``k`` units is: at least one, halves to even (as csrc/bindings/sampling.cpp)."""
    return max(1, round(rate * k))


def sample_engram(
    score: Tensor,
    seed: Tensor,
    rate: float,
    rule: str = "gumbel_top_k",
    temperature: float = 1.0,
    first_row: int = 0,
    row_step: int = 1,
) -> Tensor:
    """Recruits units: floats (M, K) -> gate bits (M, words).

    ``"bernoulli"`` recruits each unit independently with probability ``rate`` (``score`` gives the shape only);
    ``"gumbel_top_k"`` recruits the ``max(1, round(rate * K))`` units of largest ``score / temperature + Gumbel``, ties
    to the lower index; temperature 0 adds no noise, infinity ignores the scores. Sample m has the :func:`philox` draws
    of row ``first_row + m row_step``.
    """
    rows, k = score.shape
    if rule == "bernoulli":
        return _pack(philox(seed, rows, k, first_row, row_step) < round(rate * 2**32)).to(score.device)
    count = recruited_units(rate, k)
    key = score.float().cpu()
    if temperature > 0:
        noise = gumbel(philox(seed, rows, k, first_row, row_step))
        inverse = torch.tensor(1.0) / torch.tensor(temperature, dtype=torch.float32)
        key = noise if inverse == 0 else key * inverse + noise
    order = key.argsort(dim=1, descending=True, stable=True)
    gate = torch.zeros(rows, k, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return _pack(gate).to(score.device)


_DROPPED = 20  # bits of a float32 below three of mantissa
_FIRST_ZERO, _SECOND_ZERO = 2.0**-15, 2.0**-31
# carry into the exponent the bits of what is above the largest code, as a float: 1.875 - 2^-15, and 1.875
_FIRST_CARRY, _SECOND_CARRY = (1 << 20) + (1 << 8) - 1, (1 << 20) - 1
SCALE_BLOCK = 64


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32).long()


def _float(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def round_to_bfloat16(x: Tensor, random16: Tensor) -> Tensor:
    """Stochastic rounding of float32 to bfloat16: up with the probability of the distance from the lower neighbour.

    ``random16`` (same shape) are random integers in [0, 2^16).
    """
    return (_bits(x) + random16 >> 16).to(torch.int16).view(torch.bfloat16)


def _mixed(x: Tensor, key: Tensor) -> Tensor:
    """Integers in [0, 2^32), mixed as in ``csrc/core/compact.h``."""
    x = (x ^ x >> 16) * 0x7FEB352D & _LOW
    x = (x ^ x >> 15 ^ key) * 0x846CA68B & _LOW
    return x ^ x >> 16


def rounding_draws(seed: Tensor, rows: int, k: int, first_row: int = 0) -> Tensor:
    """Draws that compact numbers are rounded with: 32 random bits each, int64 (rows, k) in [0, 2^32).

    ``seed`` is that of :func:`philox`. A draw is a counter that the golden ratio steps, mixed (the constants are those
    of Wellons' lowbias32, 2018); its start and key are mixed from the row and :func:`philox` draws of the step.
    """
    step = philox(seed, 1, 4)[0]
    row = (first_row + torch.arange(rows)).unsqueeze(1)
    low, high = row & _LOW, row >> 32
    start, key = (_mixed(step[i] + low & _LOW, step[i + 1] + high & _LOW) for i in (0, 2))
    return _mixed(start + torch.arange(k) * 0x9E3779B9 & _LOW, key)


def _moment_noise(random16: Tensor) -> Tensor:
    """What to add to bits of which ``_DROPPED`` are cut off: the middle of one of 2^16 steps."""
    return (random16 << (_DROPPED - 16)) + (1 << (_DROPPED - 17))


def _by_unit(scale: Tensor, k: int) -> Tensor:
    return scale.repeat_interleave(SCALE_BLOCK, dim=1)[:, :k]


def _block_scale(x: Tensor, carry: int) -> Tensor:
    """The scale of every block of 64 units of a row.

    The least power of two for which the largest code stands for no less than the block's largest magnitude, at most
    2^126; 0 for a block of zeros.
    """
    k = x.shape[1]
    magnitude = torch.nn.functional.pad(x.abs(), (0, -k % SCALE_BLOCK))
    largest = magnitude.unflatten(1, (-1, SCALE_BLOCK)).amax(dim=2)
    return _float((_bits(largest) + carry & 0x7F800000).clamp(max=253 << 23))


def _reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, _float((254 << 23) - _bits(scale)), 0.0)


def decode_first_moment(codes: Tensor, scale: Tensor) -> Tensor:
    """int8 codes (N, K) and scales (N, ceil(K / 64)) -> float32 (N, K). Format: ``csrc/core/compact.h``."""
    zero = torch.tensor(_FIRST_ZERO)
    magnitude = _float((codes.long().abs() << _DROPPED) + _bits(zero)) - zero
    return torch.where(codes < 0, -magnitude, magnitude) * _by_unit(scale, codes.shape[1])


def encode_first_moment(x: Tensor, random16: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a first moment, float32 (N, K), rounded by random integers in [0, 2^16)."""
    scale, zero = _block_scale(x, _FIRST_CARRY), torch.tensor(_FIRST_ZERO)
    magnitude = x.abs() * _by_unit(_reciprocal(scale), x.shape[1]) + zero
    codes = (_bits(magnitude) - _bits(zero) + _moment_noise(random16) >> _DROPPED).clamp(max=127)
    return torch.where(x < 0, -codes, codes).to(torch.int8), scale


def decode_second_moment(codes: Tensor, scale: Tensor) -> Tensor:
    """uint8 codes (N, K) and scales (N, ceil(K / 64)) -> float32 (N, K). Format: ``csrc/core/compact.h``."""
    zero = torch.tensor(_SECOND_ZERO)
    return (_float((codes.long() << _DROPPED) + _bits(zero)) - zero) * _by_unit(scale, codes.shape[1])


def encode_second_moment(x: Tensor, random16: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a second moment, float32 (N, K), rounded likewise; no code is 0."""
    scale, zero = _block_scale(x, _SECOND_CARRY), torch.tensor(_SECOND_ZERO)
    value = x * _by_unit(_reciprocal(scale), x.shape[1]) + zero
    codes = _bits(value) - _bits(zero) + _moment_noise(random16) >> _DROPPED
    return codes.clamp(1, 255).to(torch.uint8), scale


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def metaplastic_adam_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sign_bits: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    metaplasticity: float,
    step: int,
    weight_bound: float = float("inf"),
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
    seed: Tensor | None = None,
    first_row: int = 0,
) -> None:
    """One metaplastic Adam step in place (Laborieux et al. 2021); all (N, K), ``sign_bits`` (N, words) or None.

    ``W -= lr sqrt(1 - beta2^t) / (1 - beta1^t) * mu' / (sqrt(v) + eps)``, where ``mu' = mu (1 - tanh^2(m |W|))`` if the
    step would shrink ``|W|`` and ``mu`` otherwise. ``weight_decay`` is coupled: it is added to the gradient. A
    metaplasticity ``m`` above 1e38 counts as 1e38, since infinity times a weight of 0 would be a NaN. ``W`` is then
    clipped to ``[-weight_bound, weight_bound]``.

    A ``mu`` of a magnitude below 2^-126, the least normal float32, becomes 0: processors take much longer for such
    numbers, and one that only decays would stay among them for ever.

    Where the gradient (with decay) is not finite, ``W``, ``mu`` and ``v`` stay as they are; where the new ``W`` would
    be a NaN, ``W`` does. Raises: RuntimeError in either case, once everything else is updated.

    ``weight`` is float32, float64 or bfloat16. The moments are like it, or bfloat16, or int8 and uint8 with
    ``exp_avg_scale`` and ``exp_avg_sq_scale`` (N, ceil(K / 64)). What is compact is rounded stochastically with
    :func:`rounding_draws` of ``seed`` for rows from ``first_row`` on: 16 bits for both moments of a unit, half
    ``unit % 2`` (the low half first) of draw ``unit // 2``; with a bfloat16 weight, the low half of draw ``unit``,
    whose high half rounds the weight, clipped before. So ``|W|`` never exceeds a ``weight_bound`` that bfloat16 can
    represent, since what is representable does not move, nor any other rounded up to bfloat16.
    """
    (n, k), scaled = weight.shape, exp_avg.dtype == torch.int8
    w = _widened(weight)
    mu = decode_first_moment(exp_avg, exp_avg_scale) if scaled else _widened(exp_avg)  # type: ignore[arg-type]
    v = decode_second_moment(exp_avg_sq, exp_avg_sq_scale) if scaled else _widened(exp_avg_sq)  # type: ignore[arg-type]
    g = _widened(grad) + weight_decay * w
    finite = g.isfinite()
    next_mu = beta1 * mu + (1 - beta1) * g
    next_mu = torch.where(next_mu.abs() < torch.finfo(torch.float32).tiny, 0.0, next_mu)
    mu = torch.where(finite, next_mu, mu)
    v = torch.where(finite, beta2 * v + (1 - beta2) * (g * g), v)
    consolidation = torch.tanh(min(metaplasticity, 1e38) * w.abs()) ** 2
    step_avg = torch.where(w.sign() * mu.sign() > 0, mu * (1 - consolidation), mu)
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    stepped = w - torch.where(finite, step_size * (step_avg / (v.sqrt() + eps)), 0.0)
    failed = bool((~finite | stepped.isnan()).any())
    bound = w.new_tensor(weight_bound)
    w = torch.where(stepped.isnan(), w, stepped).clamp(-bound, bound)
    if exp_avg.dtype in (torch.bfloat16, torch.int8) or weight.dtype == torch.bfloat16:
        assert seed is not None
        own_draw = weight.dtype == torch.bfloat16
        draws = rounding_draws(seed, n, k if own_draw else -(-k // 2), first_row).to(weight.device)
        halves = torch.stack([draws & 0xFFFF, draws >> 16], dim=2)
        for_moments = halves[:, :, 0] if own_draw else halves.flatten(1)[:, :k]
        for_weight = halves[:, :, 1]
    if scaled:
        assert exp_avg_scale is not None and exp_avg_sq_scale is not None
        for encode, x, codes, scale in (
            (encode_first_moment, mu, exp_avg, exp_avg_scale),
            (encode_second_moment, v, exp_avg_sq, exp_avg_sq_scale),
        ):
            new_codes, new_scale = encode(x, for_moments)
            codes.copy_(new_codes)
            scale.copy_(new_scale)
    for kept, x in ((exp_avg, mu), (exp_avg_sq, v), (weight, w)):
        if kept.dtype == torch.bfloat16:
            kept.copy_(round_to_bfloat16(x, for_weight if kept is weight else for_moments))
        elif kept.is_floating_point():
            kept.copy_(x)
    if sign_bits is not None:
        sign_bits.copy_(_pack(weight >= 0))
    if failed:
        raise RuntimeError("grad: expected finite steps, got NaN or infinity; those weights were left as they were")


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
    """:func:`metaplastic_adam_` with the gradient :func:`gated_weight_grad` ``(d, x_bits, K, gate_bits)``."""
    grad = gated_weight_grad(d.float(), x_bits, weight.shape[1], gate_bits)
    metaplastic_adam_(weight, grad, exp_avg, exp_avg_sq, sign_bits, **settings)


def real_metaplastic_adam_(
    d: Tensor,
    x: Tensor,
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sign_bits: Tensor | None,
    **settings: Any,
) -> None:
    """:func:`metaplastic_adam_` with the gradient :func:`real_weight_grad` ``(d, x)``."""
    metaplastic_adam_(weight, real_weight_grad(d.float(), x.float()), exp_avg, exp_avg_sq, sign_bits, **settings)
