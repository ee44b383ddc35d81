"""The operators without data, for torch.compile, torch.export and meta tensors: checks and shapes.

A fake refuses what its operator refuses, in the same words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import library  # noqa: F401  it registers the operators
from .reference import _GROUP, _GROUPED_ROWS, PACKED_STAGES, SCALE_BLOCK, Window, packed_tensors, words_for

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _require(condition: Any, name: str, expected: str, got: Any) -> None:
    shown = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else got
    torch._check(condition, lambda: f"{name}: expected {expected}, got {shown}")


def _check_tensor(name: str, x: Tensor | None) -> None:
    _require(x is not None, name, "a tensor", None)


def _check_same_device(**tensors: Tensor | None) -> None:
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, place = next(iter(places.items()))
    for name, own in places.items():
        _require(own == place, name, f"a tensor on {place} like {first}", f"one on {own}")


def _check_k(k: Any) -> None:
    _require(k >= 1, "k", "1 to 2^31 - 1", k)
    _require(k <= 2**31 - 1, "k", "1 to 2^31 - 1", k)


def _check_floats(name: str, x: Tensor) -> None:
    _check_tensor(name, x)
    _require(x.dtype in _FLOATS, name, "float32, bfloat16 or float16", x)


def _check_matrix(name: str, x: Tensor) -> None:
    _check_floats(name, x)
    _require(x.dim() == 2, name, "2 dimensions", x)


def _check_units(name: str, x: Tensor) -> None:
    expected = "1 to 2^31 - 1 units in the last dimension"
    _require(x.dim() >= 1, name, expected, x)
    _require(x.shape[-1] >= 1, name, expected, x)
    _require(x.shape[-1] <= 2**31 - 1, name, expected, x)


def _check_packed(name: str, bits: Tensor, k: Any) -> None:
    _check_tensor(name, bits)
    _check_k(k)
    expected = f"int64 of shape (rows, {words_for(k)}) for k = {k}"
    _require(bits.dtype == torch.int64 and bits.dim() == 2, name, expected, bits)
    _require(bits.shape[1] == words_for(k), name, expected, bits)


def _check_gate(name: str, bits: Tensor | None, samples: Any, k: Any) -> None:
    if bits is None:
        return
    words = words_for(k)
    expected = f"int64 of shape ({words},) or ({samples}, {words}) for k = {k}"
    _require(bits.dtype == torch.int64 and bits.dim() in (1, 2), name, expected, bits)
    _require(bits.shape[-1] == words, name, expected, bits)
    if bits.dim() == 2:
        _require(bits.shape[0] == samples, name, expected, bits)


def _check_seed(seed: Tensor) -> None:
    _check_tensor("seed", seed)
    _require(seed.device.type == "cpu", "seed", "a CPU tensor", f"one on {seed.device}")
    shaped = seed.dtype == torch.int64 and seed.dim() == 1 and seed.shape[0] == 2
    _require(shaped, "seed", "int64 (2,), the Philox key and offset", seed)


@torch.library.register_fake("engram_kernels::pack_signs")
def _(x):
    _check_floats("x", x)
    _check_units("x", x)
    return x.new_empty((*x.shape[:-1], words_for(x.shape[-1])), dtype=torch.int64)


@torch.library.register_fake("engram_kernels::kept_sign_bits")
def _(weight, filters=False):
    _check_floats("weight", weight)
    _check_units("weight", weight)
    if filters:
        units = weight.shape[-3] * weight.shape[-2] * weight.shape[-1]
        return weight.new_empty((*weight.shape[:-3], words_for(units)), dtype=torch.int64)
    return weight.new_empty((*weight.shape[:-1], words_for(weight.shape[-1])), dtype=torch.int64)


@torch.library.register_fake("engram_kernels::pack_window")
def _(x, width=1.0, gate_bits=None):
    _check_same_device(x=x, gate_bits=gate_bits)
    _check_matrix("x", x)
    _check_units("x", x)
    _require(width > 0, "width", "above 0", width)
    _check_gate("gate_bits", gate_bits, *x.shape)
    return x.new_empty((x.shape[0], words_for(x.shape[1])), dtype=torch.int64)


@torch.library.register_fake("engram_kernels::unpack_signs")
def _(bits, k, dtype):
    _check_k(k)
    expected = f"int64 of shape (..., {words_for(k)}) for k = {k}"
    _require(bits.dtype == torch.int64 and bits.dim() >= 1, "bits", expected, bits)
    _require(bits.shape[-1] == words_for(k), "bits", expected, bits)
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32)
    _require(dtype in allowed, "dtype", "float32, bfloat16, float16, float64, int8 or int32", dtype)
    return bits.new_empty((*bits.shape[:-1], k), dtype=dtype)


@torch.library.register_fake("engram_kernels::transpose_bits")
def _(bits, k):
    _check_packed("bits", bits, k)
    return bits.new_empty((k, words_for(bits.shape[0])))


@torch.library.register_fake("engram_kernels::binary_matmul")
def _(x_bits, w_bits, k, gate_bits=None):
    _check_same_device(x_bits=x_bits, w_bits=w_bits, gate_bits=gate_bits)
    _check_packed("x_bits", x_bits, k)
    _check_packed("w_bits", w_bits, k)
    _check_gate("gate_bits", gate_bits, x_bits.shape[0], k)
    return x_bits.new_empty((x_bits.shape[0], w_bits.shape[0]), dtype=torch.int32)


@torch.library.register_fake("engram_kernels::binary_threshold")
def _(x_bits, w_bits, k, threshold, flip, gate_bits=None):
    _check_same_device(x_bits=x_bits, w_bits=w_bits, threshold=threshold, flip=flip, gate_bits=gate_bits)
    _check_packed("x_bits", x_bits, k)
    _check_packed("w_bits", w_bits, k)
    n = w_bits.shape[0]
    _require(n >= 1, "w_bits", "1 to 2^31 - 1 rows", w_bits)
    _require(n <= 2**31 - 1, "w_bits", "1 to 2^31 - 1 rows", w_bits)
    for name, tensor, dtype in (("threshold", threshold, torch.int32), ("flip", flip, torch.bool)):
        expected = f"{dtype} ({n},), one for each row of w_bits"
        _check_tensor(name, tensor)
        _require(tensor.dtype == dtype and tensor.dim() == 1, name, expected, tensor)
        _require(tensor.shape[0] == n, name, expected, tensor)
    _check_gate("gate_bits", gate_bits, x_bits.shape[0], k)
    return x_bits.new_empty((x_bits.shape[0], words_for(n)), dtype=torch.int64)


@torch.library.register_fake("engram_kernels::sign_matmul")
def _(a, w_bits, k):
    _check_same_device(a=a, w_bits=w_bits)
    _check_matrix("a", a)
    _check_packed("w_bits", w_bits, k)
    _require(a.shape[1] == w_bits.shape[0], "a", f"shape (M, {w_bits.shape[0]}) to meet the rows of w_bits", a)
    return a.new_empty((a.shape[0], k))


@torch.library.register_fake("engram_kernels::sign_matmul_t")
def _(x, w_bits, k, w_groups=None):
    _check_same_device(x=x, w_bits=w_bits, w_groups=w_groups)
    _check_tensor("x", x)
    exact = x.dtype == torch.uint8
    if not exact:
        _check_matrix("x", x)
    _check_packed("w_bits", w_bits, k)
    _require(x.dim() == 2, "x", f"shape (M, {k}) for k = {k}", x)
    _require(x.shape[1] == k, "x", f"shape (M, {k}) for k = {k}", x)
    if exact:
        _require(k <= (2**31 - 1) // 255, "k", f"at most {(2**31 - 1) // 255} for uint8", k)
    if w_groups is not None:
        groups, outputs = -(-k // _GROUP), -(-w_bits.shape[0] // _GROUPED_ROWS) * _GROUPED_ROWS
        expected = f"int16 of shape ({groups}, {outputs}) for k = {k} and {w_bits.shape[0]} rows"
        _require(w_groups.dtype == torch.int16 and w_groups.dim() == 2, "w_groups", expected, w_groups)
        _require(w_groups.shape[0] == groups and w_groups.shape[1] == outputs, "w_groups", expected, w_groups)
    return x.new_empty((x.shape[0], w_bits.shape[0]), dtype=torch.int32 if exact else x.dtype)


@torch.library.register_fake("engram_kernels::standardise")
def _(y, eps=1e-5):
    _check_matrix("y", y)
    _check_units("y", y)
    _require(eps >= 0, "eps", "at least 0", eps)
    return y.new_empty(y.shape), y.new_empty((y.shape[0], 2), dtype=torch.float64)


@torch.library.register_fake("engram_kernels::standardise_grad")
def _(d, y, moments):
    _check_same_device(d=d, y=y, moments=moments)
    _check_matrix("d", d)
    _check_matrix("y", y)
    _check_units("y", y)
    _require(d.shape == y.shape, "d", f"the shape of y, {y.dtype} {tuple(y.shape)}", d)
    _check_tensor("moments", moments)
    expected = f"float64 ({y.shape[0]}, 2), mean and reciprocal deviation"
    _require(moments.dtype == torch.float64 and moments.dim() == 2, "moments", expected, moments)
    _require(moments.shape[0] == y.shape[0] and moments.shape[1] == 2, "moments", expected, moments)
    return y.new_empty(y.shape)


@torch.library.register_fake("engram_kernels::gated_input_grad")
def _(d, w_bits, x, gate_bits=None):
    _check_same_device(d=d, w_bits=w_bits, x=x, gate_bits=gate_bits)
    _check_matrix("d", d)
    _check_matrix("x", x)
    _require(x.shape[0] == d.shape[0], "x", f"{d.shape[0]} samples like d", x)
    _check_units("x", x)
    _check_packed("w_bits", w_bits, x.shape[1])
    _require(d.shape[1] == w_bits.shape[0], "d", f"shape (M, {w_bits.shape[0]}) to meet the rows of w_bits", d)
    _check_gate("gate_bits", gate_bits, *x.shape)
    return d.new_empty(x.shape)


@torch.library.register_fake("engram_kernels::masked_input_grad")
def _(d, w_bits, k, mask_bits):
    _check_same_device(d=d, w_bits=w_bits, mask_bits=mask_bits)
    _check_matrix("d", d)
    _check_packed("w_bits", w_bits, k)
    _require(d.shape[1] == w_bits.shape[0], "d", f"shape (M, {w_bits.shape[0]}) to meet the rows of w_bits", d)
    _check_tensor("mask_bits", mask_bits)
    _check_gate("mask_bits", mask_bits, d.shape[0], k)
    return d.new_empty((d.shape[0], k))


@torch.library.register_fake("engram_kernels::gated_weight_grad")
def _(d, x_bits, k, gate_bits=None):
    _check_same_device(d=d, x_bits=x_bits, gate_bits=gate_bits)
    _check_matrix("d", d)
    _check_packed("x_bits", x_bits, k)
    _require(x_bits.shape[0] == d.shape[0], "x_bits", f"{d.shape[0]} samples like d", x_bits)
    _check_gate("gate_bits", gate_bits, d.shape[0], k)
    return d.new_empty((d.shape[1], k))


@torch.library.register_fake("engram_kernels::real_weight_grad")
def _(d, x):
    _check_same_device(d=d, x=x)
    _check_matrix("d", d)
    _check_matrix("x", x)
    _check_units("x", x)
    _require(x.shape[0] == d.shape[0], "x", f"{d.shape[0]} samples like d", x)
    _require(x.dtype == d.dtype, "x", f"{d.dtype} like d", x)
    return d.new_empty((d.shape[1], x.shape[1]))


@torch.library.register_fake("engram_kernels::_layer")
def _(x, w_bits, gate_bits, bias, scale, binary_input, window):
    _check_same_device(x=x, w_bits=w_bits, gate_bits=gate_bits, bias=bias)
    y = x.new_empty((x.shape[0], w_bits.shape[0]))
    if not binary_input:
        return y, None, None
    x_bits = x.new_empty((x.shape[0], words_for(x.shape[1])), dtype=torch.int64)
    return y, x_bits, None if window is None else torch.empty_like(x_bits)


@torch.library.register_fake("engram_kernels::_layer_grad")
def _(d, scale, needs_bias, k, w_bits, mask_bits, x, gate_bits):
    m, n = d.shape
    own = None if scale == 1.0 else d.new_empty((m, n))
    db = d.new_empty((n,)) if needs_bias else None
    return own, db, None if mask_bits is None else d.new_empty((m, k)), None if x is None else d.new_empty((n, k))


_LEAST = {"top": 0, "bottom": 0, "left": 0, "right": 0}


def check_window(numbers: Any, least_dilation: int = 1) -> Window:
    """The window of numbers that make one. Raises: RuntimeError."""
    fields = len(Window._fields)
    _require(len(numbers) == fields, "window", f"{fields} numbers", len(numbers))
    w = Window(*numbers)
    least_of = _LEAST | {"dilation_h": least_dilation, "dilation_w": least_dilation}
    for name, number in zip(Window._fields, numbers, strict=True):
        least = least_of.get(name, 1)
        _require(least <= number <= 2**31 - 1, "window", f"{least} to 2^31 - 1 as {name}", number)
    divides = w.channels % w.groups == 0
    _require(divides, "window", f"a number of groups that divides {w.channels} channels", w.groups)
    _require(w.units <= 2**31 - 1, "window", "at most 2^31 - 1 units of a sample", w.units)
    _require(w.group_units <= 2**31 - 1, "window", "at most 2^31 - 1 units of a kernel", w.group_units)
    for axis, size, reach in (
        ("height", w.height + w.top + w.bottom, w.dilation_h * (w.kernel_h - 1) + 1),
        ("width", w.width + w.left + w.right, w.dilation_w * (w.kernel_w - 1) + 1),
    ):
        _require(size >= reach, "window", f"a kernel that fits into the padded {axis} {size}", f"one of {reach}")
    pixels = w.out_height * w.out_width
    _require(pixels <= 2**31 - 1, "window", "at most 2^31 - 1 output pixels of a sample", pixels)
    padded = (w.height + w.top + w.bottom) * (w.width + w.left + w.right)
    _require(padded <= 2**31 - 1, "window", "at most 2^31 - 1 padded pixels of a sample", padded)
    return w


def _check_filters(w_bits: Tensor, w: Window) -> None:
    _check_packed("w_bits", w_bits, w.group_units)
    expected = f"a row or more, which {w.groups} groups share out evenly"
    _require(w_bits.shape[0] >= 1, "w_bits", expected, w_bits)
    _require(w_bits.shape[0] % w.groups == 0, "w_bits", expected, w_bits)


def _check_output_grad(d: Tensor, w: Window, outputs: Any) -> None:
    _check_floats("d", d)
    expected = f"shape (B, {w.out_height}, {w.out_width}, {outputs})"
    _require(d.dim() == 4, "d", expected, d)
    _require(tuple(d.shape[1:]) == (w.out_height, w.out_width, outputs), "d", expected, d)


@torch.library.register_fake("engram_kernels::unfold_bits")
def _(bits, window, group=0):
    w = check_window(window, 0)
    _check_packed("bits", bits, w.units)
    _require(0 <= group < w.groups, "group", f"0 to {w.groups - 1}", group)
    return bits.new_empty((bits.shape[0] * w.out_height * w.out_width, words_for(w.group_units)))


@torch.library.register_fake("engram_kernels::interleave_bits")
def _(bits, rows, k):
    _check_packed("bits", bits, k)
    most = (2**31 - 1) // k
    _require(1 <= rows <= most, "rows", f"1 to {most} for k = {k}", rows)
    _require(bits.shape[0] % rows == 0, "bits", f"a multiple of {rows} rows", bits)
    return bits.new_empty((bits.shape[0] // rows, words_for(rows * k)))


@torch.library.register_fake("engram_kernels::binary_conv2d")
def _(x_bits, w_bits, window, gate_bits=None, scale=1.0):
    _check_same_device(x_bits=x_bits, w_bits=w_bits, gate_bits=gate_bits)
    w = check_window(window)
    _check_packed("x_bits", x_bits, w.units)
    _check_filters(w_bits, w)
    _check_gate("gate_bits", gate_bits, x_bits.shape[0], w.units)
    return x_bits.new_empty((x_bits.shape[0], w.out_height, w.out_width, w_bits.shape[0]), dtype=torch.float32)


@torch.library.register_fake("engram_kernels::masked_conv2d_input_grad")
def _(d, w_bits, window, mask_bits, scale=1.0):
    _check_same_device(d=d, w_bits=w_bits, mask_bits=mask_bits)
    w = check_window(window)
    _check_filters(w_bits, w)
    _check_output_grad(d, w, w_bits.shape[0])
    _check_tensor("mask_bits", mask_bits)
    _check_gate("mask_bits", mask_bits, d.shape[0], w.units)
    return d.new_empty((d.shape[0], w.height, w.width, w.channels))


@torch.library.register_fake("engram_kernels::gated_conv2d_weight_grad")
def _(d, x_bits, window, gate_bits=None, scale=1.0):
    _check_same_device(d=d, x_bits=x_bits, gate_bits=gate_bits)
    w = check_window(window)
    _check_floats("d", d)
    _require(d.dim() == 4, "d", "4 dimensions", d)
    _check_output_grad(d, w, d.shape[3])
    expected = f"an output or more, which {w.groups} groups share out evenly"
    _require(d.shape[3] >= 1, "d", expected, d)
    _require(d.shape[3] % w.groups == 0, "d", expected, d)
    _check_packed("x_bits", x_bits, w.units)
    _require(x_bits.shape[0] == d.shape[0], "x_bits", f"{d.shape[0]} samples like d", x_bits)
    _check_gate("gate_bits", gate_bits, d.shape[0], w.units)
    return d.new_empty((d.shape[3], w.group_units))


@torch.library.register_fake("engram_kernels::draw_seed")
def _():
    return torch.empty(2, dtype=torch.int64, device="cpu")


def _check_values(y: Tensor) -> None:
    _check_tensor("y", y)
    expected = "int32 (M, N) of 1 to 2^31 - 1 units"
    _require(y.dtype == torch.int32 and y.dim() == 2, "y", expected, y)
    _require(y.shape[1] >= 1, "y", expected, y)
    _require(y.shape[1] <= 2**31 - 1, "y", expected, y)


@torch.library.register_fake("engram_kernels::value_signs")
def _(y, threshold=None, flip=None):
    _check_same_device(y=y, threshold=threshold, flip=flip)
    _check_values(y)
    _require(flip is None or threshold is not None, "flip", "None without thresholds", flip)
    for name, tensor, dtype in (("threshold", threshold, torch.int32), ("flip", flip, torch.bool)):
        if tensor is not None:
            expected = f"{dtype} ({y.shape[1]},), one for each unit of y"
            _require(tensor.dtype == dtype and tensor.dim() == 1, name, expected, tensor)
            _require(tensor.shape[0] == y.shape[1], name, expected, tensor)
    return y.new_empty((y.shape[0], words_for(y.shape[1])), dtype=torch.int64)


@torch.library.register_fake("engram_kernels::top_units")
def _(y, count):
    _check_values(y)
    _require(count >= 1, "count", f"1 to {y.shape[1]}, the units of y", count)
    _require(count <= y.shape[1], "count", f"1 to {y.shape[1]}, the units of y", count)
    return y.new_empty((y.shape[0], words_for(y.shape[1])), dtype=torch.int64)


@torch.library.register_fake("engram_kernels::packed_network")
def _(x, gate_bits, layout, factors, tensors):
    names, numbers = list(PACKED_STAGES), iter(layout)
    first = names[layout[0]] if len(layout) > 0 else "nothing"
    _require(
        first in ("product", "convolution"), "layout", "a product or a convolution as the first stage", list(layout[:1])
    )
    _check_same_device(x=x, gate_bits=gate_bits)
    _check_tensor("x", x)
    of_images = first == "convolution"
    k = check_window(layout[1 : 1 + len(Window._fields)]).units if of_images else layout[1]
    if layout[len(PACKED_STAGES[first])]:  # real
        expected = f"uint8 of shape (M, {k})"
        _require(x.dtype == torch.uint8 and x.dim() == 2, "x", expected, x)
        _require(x.shape[1] == k, "x", expected, x)
        _require(gate_bits is None, "gate_bits", "None before a product of numbers", gate_bits)
    else:
        _check_packed("x", x, k)
        _check_gate("gate_bits", gate_bits, x.shape[0], k)
    units, name, held = 0, "", iter(tensors)
    for number in numbers:
        name = names[number]
        own = [next(numbers) for _ in PACKED_STAGES[name]]
        tensor, *_ = [next(held) for _ in range(packed_tensors(name, own))] or [None]
        if name in ("product", "dendritic", "prototype", "ridge"):
            units = tensor.shape[0] // (own[0] if name == "dendritic" else 1)
        elif name in ("convolution", "max_pool"):
            window = check_window(own[:-1])
            channels = tensor.shape[0] if name == "convolution" else window.channels
            units = window.out_height * window.out_width * channels
    if name in ("recruit", "gate"):
        return x.new_empty((x.shape[0], words_for(units)), dtype=torch.int64)
    return x.new_empty((x.shape[0], units), dtype=torch.float32)


@torch.library.register_fake("engram_kernels::patch_excitability")
def _(images, filters, units, floor, pool=3):
    for name, tensor in (("images", images), ("filters", filters), ("units", units)):
        _check_tensor(name, tensor)
    _check_same_device(images=images, filters=filters, units=units)
    _require(images.dtype == torch.uint8, "images", "uint8 (M, height, width, channels)", images)
    _require(images.dim() == 4, "images", "uint8 (M, height, width, channels)", images)
    _, height, width, channels = images.shape
    for size in (height, width, channels):
        _require(size >= 1, "images", "uint8 (M, height, width, channels)", images)
    expected = "int8 (filters, size, size) of 1 to 128 pixels"
    _require(filters.dtype == torch.int8 and filters.dim() == 3, "filters", expected, filters)
    size = filters.shape[1]
    _require(filters.shape[0] >= 1, "filters", expected, filters)
    _require(filters.shape[2] == size, "filters", expected, filters)
    _require(size >= 1, "filters", expected, filters)
    _require(size <= 128, "filters", expected, filters)
    _require(units.dtype == torch.int64 and units.dim() == 1, "units", "int64 (N,)", units)
    _require(1e-30 <= floor <= 1e30, "floor", "1e-30 to 1e30", floor)
    for right in (pool >= 1, pool <= 2**31 - 1):
        _require(right, "pool", "1 to 2^31 - 1", pool)
    for side in (height, width):
        _require(size + pool - 1 <= side, "filters", f"at most {side - pool + 1} pixels", size)
    return images.new_empty((images.shape[0], units.shape[0]), dtype=torch.float32)


@torch.library.register_fake("engram_kernels::sample_engram")
def _(score, seed, rate, bernoulli=False, temperature=1.0, first_row=0, row_step=1):
    _check_matrix("score", score)
    _check_units("score", score)
    _check_seed(seed)
    _require(0 < rate <= 1, "rate", "in (0, 1]", rate)
    _require(temperature == 0 or temperature >= 1e-6, "temperature", "0 or at least 1e-6", temperature)
    _require(first_row >= 0, "first_row", "at least 0", first_row)
    _require(row_step >= 1, "row_step", "at least 1", row_step)
    return score.new_empty((score.shape[0], words_for(score.shape[1])), dtype=torch.int64)


def _check_update(
    read,  # the other arguments by name
    weight,
    exp_avg,
    exp_avg_sq,
    sign_bits,
    *,
    exp_avg_scale=None,
    exp_avg_sq_scale=None,
    seed=None,
    **_numbers,  # compiled graphs hold these, and the operator checks them when it runs
):
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "sign_bits": sign_bits}
    scales = {"exp_avg_scale": exp_avg_scale, "exp_avg_sq_scale": exp_avg_sq_scale}
    _check_same_device(weight=weight, **read, **state, **scales)
    for name, tensor in (("weight", weight), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_tensor(name, tensor)
    _require(weight.dtype in (torch.float32, torch.bfloat16), "weight", "float32 or bfloat16", weight)
    _require(weight.dim() == 2, "weight", "2 dimensions", weight)
    _check_units("weight", weight)
    n, k = weight.shape
    scaled, blocks = exp_avg.dtype == torch.int8, -(-k // SCALE_BLOCK)
    _require(
        exp_avg.dtype in (torch.float32, torch.bfloat16, torch.int8), "exp_avg", "float32, bfloat16 or int8", exp_avg
    )
    for name, tensor, dtype, columns in (
        ("exp_avg", exp_avg, exp_avg.dtype, k),
        ("exp_avg_sq", exp_avg_sq, torch.uint8 if scaled else exp_avg.dtype, k),
        ("exp_avg_scale", exp_avg_scale, torch.float32, blocks),
        ("exp_avg_sq_scale", exp_avg_sq_scale, torch.float32, blocks),
        ("sign_bits", sign_bits, torch.int64, words_for(k)),
    ):
        if name.endswith("scale"):
            wanted = "a tensor" if scaled else "None"
            _require(scaled == (tensor is not None), name, f"{wanted} for {exp_avg.dtype} moments", tensor)
        if tensor is not None:
            expected = f"{dtype} ({n}, {columns})"
            _require(tensor.dtype == dtype and tensor.dim() == 2, name, expected, tensor)
            _require(tensor.shape[0] == n, name, expected, tensor)
            _require(tensor.shape[1] == columns, name, expected, tensor)
    rounds = weight.dtype != torch.float32 or exp_avg.dtype != torch.float32
    _require(not rounds or seed is not None, "seed", "int64 (2,) to round compact numbers with", None)
    if seed is not None:
        _check_seed(seed)


@torch.library.register_fake("engram_kernels::metaplastic_adam_")
def _(weight, grad, *state, **settings):
    _check_update({"grad": grad}, weight, *state, **settings)
    _check_tensor("grad", grad)
    alike = grad.dtype in (torch.float32, weight.dtype) and grad.shape == weight.shape
    _require(alike, "grad", f"float32 or the weight's dtype, in the weight's shape {tuple(weight.shape)}", grad)


@torch.library.register_fake("engram_kernels::gated_metaplastic_adam_")
def _(d, x_bits, gate_bits, weight, *state, **settings):
    _check_update({"d": d, "x_bits": x_bits, "gate_bits": gate_bits}, weight, *state, **settings)
    _check_matrix("d", d)
    n, k = weight.shape
    _check_packed("x_bits", x_bits, k)
    _require(d.shape[1] == n, "d", f"shape (M, {n}) to meet the rows of the weight", d)
    _require(x_bits.shape[0] == d.shape[0], "x_bits", f"{d.shape[0]} samples like d", x_bits)
    _check_gate("gate_bits", gate_bits, d.shape[0], k)


@torch.library.register_fake("engram_kernels::real_metaplastic_adam_")
def _(d, x, weight, *state, **settings):
    _check_update({"d": d, "x": x}, weight, *state, **settings)
    _check_matrix("d", d)
    _check_matrix("x", x)
    n, k = weight.shape
    _require(d.shape[1] == n, "d", f"shape (M, {n}) to meet the rows of the weight", d)
    _require(tuple(x.shape) == (d.shape[0], k), "x", f"shape {(d.shape[0], k)}", x)
