"""Fuzzes every operator: random arguments, valid and not, against the reference or for an error that names one.

    python -m tests.fuzz.operators --seconds 60 --seed 0

A case is made by its seed and its number alone: a valid call by the operator's recipe, then changes of sizes, dtypes,
numbers, devices and aliasing, each with some probability, and a layout in memory for every tensor. ``blamed`` says from
the operator's contract, which is written down here a second time, whether the call is still valid. A valid one gives
what the reference gives, and changes nothing else. Any other raises an error that names an argument at fault, and
changes nothing at all. The first case that does not is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import multiprocessing
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import engram_kernels  # noqa: F401  registers all operators
from engram_kernels import ops, reference
from engram_kernels.reference import SCALE_BLOCK, Window, words_for

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.float64, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
ROWS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 257)
UNITS = (1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 191, 193, 255, 257, 511, 513, 784, 1000, 1025, 2049, 4097, 33000)
USUAL_PRODUCTS, MOST_PRODUCTS = 200_000, 3_000_000  # of most cases, of a tenth: a hundred should take a second
NAN, INF = math.nan, math.inf


class WrongCallError(AssertionError):
    """The operator did other than its contract says."""


class Draw(random.Random):
    """The random choices of one case."""

    def __init__(self, seed: int, case: int) -> None:
        super().__init__(f"{seed}/{case}")
        self.torch = torch.Generator().manual_seed(self.getrandbits(62))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def sizes(self, count: int = 2) -> tuple[int, ...]:
        """Rows, any number of them, and at last units, so that their product is bounded."""
        k = self.choice(UNITS) if self.chance(0.7) else self.randint(1, 300)
        rows = [self.choice(ROWS) if self.chance(0.8) else self.randint(0, 150) for _ in range(count - 1)]
        limit = MOST_PRODUCTS if self.chance(0.1) else USUAL_PRODUCTS
        while math.prod(rows) * k > limit:
            largest = rows.index(max(rows))
            rows[largest] //= 2
        return *rows, k

    def uniform_of(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.torch)

    def normal_of(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """In [low, high)."""
        return torch.randint(low, high, shape, generator=self.torch)

    def floats(self, *shape: int, dtype: torch.dtype | None = None, wild: float = 0.15) -> Tensor:
        """Numbers of a random kind; with probability ``wild``, some are infinite or NaN."""
        kind = self.choice(["normal", "normal", "small", "ties", "zeros", "border", "wide"])
        x = self.normal_of(*shape)
        if kind == "small":
            x *= 10.0 ** self.randint(-42, -3)
        elif kind == "ties":
            x = self.integers(-2, 3, *shape).float()
        elif kind == "zeros":
            x = torch.where(x > 0, 0.0, -0.0)
        elif kind == "border":
            x = x.sign() * (1 + self.integers(-1, 2, *shape) * 2.0**-23)
        elif kind == "wide":
            x *= 2.0 ** self.integers(-12, 8, *shape)
        if self.chance(wild) and x.numel():
            for value in self.sample([INF, -INF, NAN, 1e30, -1e-45], self.randint(1, 3)):
                x.view(-1)[self.randrange(x.numel())] = value
        return x.to(dtype or self.choice(FLOATS))

    def words(self, rows: int, k: int) -> Tensor:
        """Packed rows; some have bits in their padding."""
        words = self.integers(-(2**63), 2**63 - 1, rows, words_for(k))
        return words if self.chance(0.3) else words & valid_bits(k)

    def gate(self, rows: int, k: int) -> Tensor:
        """A gate for every row or, as often, one for all; some have bits in their padding."""
        rate = self.choice([0.0, 0.02, 0.1, 0.3, 0.4, 0.6, 0.9, 1.0])
        shared = self.chance(0.5)
        bits = reference._pack(self.uniform_of(1 if shared else rows, k) < rate)
        if self.chance(0.3):
            bits = bits | self.integers(-(2**63), 2**63 - 1, *bits.shape) & ~valid_bits(k)
        return bits[0] if shared else bits

    def optional_gate(self, rows: int, k: int) -> Tensor | None:
        return None if self.chance(0.3) else self.gate(rows, k)

    def philox_seed(self) -> Tensor:
        offset = self.choice([0, 1, self.getrandbits(32), 2**32 - 1])
        return torch.tensor([self.getrandbits(64) - 2**63, offset])


def valid_bits(k: int) -> Tensor:
    return reference._pack(torch.ones(k, dtype=torch.bool))


# ---- valid calls: arguments by the names and in the order of engram_kernels.ops


def pack_signs(draw: Draw, name: str = "x") -> dict[str, Any]:
    rows, k = draw.sizes()
    leading = draw.choice([(rows,), (rows,), (), (min(rows, 3), 2), (1, min(rows, 3), 1, 2)])
    return {name: draw.floats(*leading, k)}


def kept_sign_bits(draw: Draw) -> dict[str, Any]:
    return pack_signs(draw, "weight")


def pack_window(draw: Draw) -> dict[str, Any]:
    m, k = draw.sizes()
    width = draw.choice([1.0, 0.25, 1, 1e-50, 1e30, INF])
    return {"x": draw.floats(m, k), "width": width, "gate_bits": draw.optional_gate(m, k)}


def unpack_signs(draw: Draw) -> dict[str, Any]:
    m, k = draw.sizes()
    bits = draw.words(m, k)
    if draw.chance(0.3):
        bits = bits[:2].unsqueeze(0) if draw.chance(0.5) else draw.words(1, k)[0]
    return {"bits": bits, "k": k, "dtype": draw.choice([*FLOATS, torch.float64, torch.int8, torch.int32])}


def transpose_bits(draw: Draw) -> dict[str, Any]:
    m, k = draw.sizes()
    return {"bits": draw.words(max(m, 1), k), "k": k}


def binary_matmul(draw: Draw) -> dict[str, Any]:
    m, n, k = draw.sizes(3)
    return {"x_bits": draw.words(m, k), "w_bits": draw.words(n, k), "k": k, "gate_bits": draw.optional_gate(m, k)}


def binary_threshold(draw: Draw) -> dict[str, Any]:
    m, n, k = draw.sizes(3)
    n = max(n, 1)
    width = draw.choice([2, 10, k + 2])
    return {
        "x_bits": draw.words(m, k),
        "w_bits": draw.words(n, k),
        "k": k,
        "threshold": draw.integers(-width, width, n).int(),
        "flip": draw.uniform_of(n) < 0.5,
        "gate_bits": draw.optional_gate(m, k),
    }


def sign_matmul(draw: Draw) -> dict[str, Any]:
    m, n, k = draw.sizes(3)
    return {"a": draw.floats(m, n), "w_bits": draw.words(n, k), "k": k}


def sign_matmul_t(draw: Draw) -> dict[str, Any]:
    m, n, k = draw.sizes(3)
    x = draw.integers(0, 256, m, k).to(torch.uint8) if draw.chance(0.4) else draw.floats(m, k)
    w_bits = draw.words(n, k)
    return {
        "x": x,
        "w_bits": w_bits,
        "k": k,
        "w_groups": reference.group_signs(w_bits, k) if draw.chance(0.5) else None,
    }


def value_signs(draw: Draw) -> dict[str, Any]:
    m, n = draw.sizes()
    width = draw.choice([2, 1000, 2**31])
    threshold = draw.integers(-width, width, n).int() if draw.chance(0.7) else None
    flip = draw.uniform_of(n) < 0.5 if threshold is not None and draw.chance(0.7) else None
    return {"y": draw.integers(-width, width, m, n).int(), "threshold": threshold, "flip": flip}


def top_units(draw: Draw) -> dict[str, Any]:
    m, k = draw.sizes()
    width = draw.choice([2, 1000, 2**31])
    return {"y": draw.integers(-width, width, m, k).int(), "count": draw.randint(1, k)}


def packed_network(draw: Draw) -> dict[str, Any]:
    """Products with signs, gates and scales between them, images before them. The sums of ridge read-outs have an order
    of their own."""
    layout, factors, tensors = [], [], []
    real = draw.chance(0.5)
    if draw.chance(0.4):
        m = draw.choice([0, 1, 2, 5])
        k, n = packed_images(draw, real, layout, tensors)
    else:
        m, n, k = draw.sizes(3)
        n = max(1, n)
        weight = draw.words(n, k)
        layout += [0, k, int(real)]
        tensors += [weight, reference.group_signs(weight, k)] if real else [weight]
    x = draw.integers(0, 256, m, k).to(torch.uint8) if real else draw.words(m, k)
    for _ in range(draw.randint(0, 2)):
        layout.append(draw.choice([1, 2]))
        tensors += thresholds(draw, n, n) if layout[-1] == 2 else []
        gate = draw.choice(["none", "recruit", "gate"])
        if gate == "recruit":
            layout += [3, draw.randint(1, n), draw.randint(0, 3)]
        elif gate == "gate":
            layout.append(4)
            tensors.append(draw.gate(1, n).reshape(-1))
        rows = draw.randint(1, 70)
        layout += [0, n, 0]
        tensors.append(draw.words(rows, n))
        n = rows
    end = draw.choice(["values", "affine", "gate", "dendritic", "prototype"])
    if end == "affine":
        layout += [5, 1, 1, 1]
        factors.append(draw.choice([1.0, 0.5, 3.0]))
        tensors += [draw.normal_of(n), draw.normal_of(n)]
    elif end != "values":
        layout += [3, draw.randint(1, n), draw.randint(0, 3)]
        if end == "dendritic":
            layout += [6, 3, layout[-2]]
            tensors += [draw.words(6, n), draw.normal_of(6)]
        elif end == "prototype":
            layout += [7, layout[-2]]
            tensors += [draw.words(5, n), draw.normal_of(5), draw.integers(0, 2, 5)]
    gate_bits = None if real else draw.optional_gate(m, k)
    return {"x": x, "gate_bits": gate_bits, "layout": layout, "factors": factors, "tensors": tensors}


def first_stage(layout: list[int]) -> tuple[int, bool]:
    """The units that come into the first stage of a packed network, and whether they are bytes."""
    if layout[0] == 0:
        return layout[1], bool(layout[2])
    end = 1 + len(Window._fields)
    return Window(*layout[1:end]).units, bool(layout[end])


def thresholds(draw: Draw, period: int, largest: int) -> list[Tensor]:
    """Of a stage of signs, with flips."""
    return [draw.integers(-largest, largest, period).int(), draw.words(1, period)[0] & valid_bits(period)]


def packed_images(draw: Draw, real: bool, layout: list[int], tensors: list[Tensor]) -> tuple[int, int]:
    """A convolution, and perhaps signs, a pool and another one: the units before and after them."""
    w = window_of(draw)
    w = w._replace(groups=1) if real else w
    before = w.units
    while True:
        outputs = w.groups * draw.choice([1, 2, 17, 64])
        filters = draw.words(outputs, w.group_units)
        layout += [9, *w, int(real and w.units == before and len(layout) == 0)]
        tensors += [filters, reference.group_signs(filters, w.group_units)] if layout[-1] else [filters]
        height, width = w.out_height, w.out_width
        units = height * width * outputs
        if draw.chance(0.5):
            return before, units
        period = draw.choice([p for p in range(128, units + 1, 128) if units % p == 0] + [units])
        layout.append(2)
        tensors += thresholds(draw, period, w.group_units)
        if draw.chance(0.5):
            size = draw.randint(1, min(height, 3)), draw.randint(1, min(width, 3))
            pool = Window(height, width, outputs, *size, 2, 1, top=draw.randint(0, 1), right=draw.randint(0, 1))
            layout += [10, *pool, draw.randint(0, 1)]
            height, width = pool.out_height, pool.out_width
            units = height * width * outputs
            tensors += [draw.words(1, units)[0] & valid_bits(units)] if layout[-1] else []
        w = Window(height, width, outputs, draw.randint(1, min(height, 3)), draw.randint(1, min(width, 3)))


def standardise(draw: Draw) -> dict[str, Any]:
    return {"y": draw.floats(*draw.sizes()), "eps": draw.choice([1e-5, 1e-3, 1.0, 1e-300, INF])}


def standardise_grad(draw: Draw) -> dict[str, Any]:
    m, n = draw.sizes()
    moments = torch.stack([draw.normal_of(m), draw.uniform_of(m)], dim=1).double()
    return {"d": draw.floats(m, n), "y": draw.floats(m, n), "moments": moments}


def patch_excitability(draw: Draw) -> dict[str, Any]:
    size, pool, channels = draw.choice([1, 2, 3, 4, 5, 6, 8, 11, 12, 17]), draw.randint(1, 4), draw.randint(1, 3)
    height, width = (size + pool - 1 + draw.randint(0, 6) for _ in range(2))
    filters = draw.integers(-1, 2, draw.choice([1, 2, 5, 33]), size, size).to(torch.int8)
    images = draw.integers(0, 256, draw.choice([0, 1, 2, 31, 33, 65]), height, width, channels).to(torch.uint8)
    if draw.chance(0.3):
        images = images // 128 * 255
    everything = (height - size - pool + 2) * (width - size - pool + 2) * channels * len(filters)
    units = draw.integers(0, everything, draw.choice([0, 1, 3, 40, 200])).sort().values
    return {"images": images, "filters": filters, "units": units, "floor": draw.choice([0.5, 25.5]), "pool": pool}


def gated_input_grad(draw: Draw) -> dict[str, Any]:
    m, n, k = draw.sizes(3)
    gate = draw.optional_gate(m, k)
    return {"d": draw.floats(m, n), "w_bits": draw.words(n, k), "x": draw.floats(m, k), "gate_bits": gate}


def masked_input_grad(draw: Draw) -> dict[str, Any]:
    m, n, k = draw.sizes(3)
    return {"d": draw.floats(m, n), "w_bits": draw.words(n, k), "k": k, "mask_bits": draw.gate(m, k)}


def gated_weight_grad(draw: Draw) -> dict[str, Any]:
    m, n, k = draw.sizes(3)
    m = draw.choice([m, m, 2 * m, 300]) if n * k < 20_000 else m  # several chunks of samples
    return {"d": draw.floats(m, n), "x_bits": draw.words(m, k), "k": k, "gate_bits": draw.optional_gate(m, k)}


def real_weight_grad(draw: Draw) -> dict[str, Any]:
    m, n, k = draw.sizes(3)
    m = draw.choice([m, m, 2 * m, 300]) if n * k < 20_000 else m  # several chunks of samples
    d = draw.floats(m, n)
    return {"d": d, "x": draw.floats(m, k).to(d.dtype)}


def window_of(draw: Draw, least_dilation: int = 1) -> Window:
    """Of an image that is small in most cases, with a kernel that fits into it."""
    channels, groups = draw.choice([1, 2, 3, 7, 31, 64, 65, 128, 130]), 1
    if draw.chance(0.3):
        groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
    size, kernel = (draw.randint(1, 9), draw.randint(1, 9)), (draw.randint(1, 4), draw.randint(1, 4))
    sides, dilation = [draw.choice([0, 0, 1, 1, 2, 5]) for _ in range(4)], [draw.choice([1, 1, 2, 3]) for _ in range(2)]
    if least_dilation == 0 and draw.chance(0.2):
        dilation = [0, 0]
    for axis in (0, 1):
        missing = dilation[axis] * (kernel[axis] - 1) + 1 - size[axis] - sides[2 * axis] - sides[2 * axis + 1]
        sides[2 * axis] += max(0, missing)
    stride = draw.choice([1, 1, 2, 3, 11]), draw.choice([1, 1, 2, 3, 11])
    return Window(*size, channels, *kernel, *stride, *sides, *dilation, groups)


def unfold_bits(draw: Draw) -> dict[str, Any]:
    w = window_of(draw, least_dilation=0)
    return {"bits": draw.words(draw.choice([0, 1, 2, 5]), w.units), "window": w, "group": draw.randrange(w.groups)}


def interleave_bits(draw: Draw) -> dict[str, Any]:
    rows, k = draw.choice([1, 2, 3, 63, 64, 65, 130]), draw.choice(UNITS[:14])
    return {"bits": draw.words(rows * draw.choice([0, 1, 2, 3]), k), "rows": rows, "k": k}


def binary_conv2d(draw: Draw) -> dict[str, Any]:
    w, samples = window_of(draw), draw.choice([0, 1, 2, 5])
    filters = draw.words(w.groups * draw.choice([1, 2, 17]), w.group_units)
    gate = draw.optional_gate(samples, w.units)
    return {"x_bits": draw.words(samples, w.units), "w_bits": filters, "window": w, "gate_bits": gate}


def output_grad(draw: Draw, w: Window, samples: int, outputs: int) -> Tensor:
    """Finite, and of a dtype whose sums are: tests/test_convolution.py has what is not."""
    dtype = draw.choice([torch.float32, torch.bfloat16])
    return draw.floats(samples, w.out_height, w.out_width, outputs, dtype=dtype, wild=0.0)


def masked_conv2d_input_grad(draw: Draw) -> dict[str, Any]:
    w, samples = window_of(draw), draw.choice([0, 1, 2, 5])
    outputs = w.groups * draw.choice([1, 2, 17])
    filters, mask = draw.words(outputs, w.group_units), draw.gate(samples, w.units)
    return {"d": output_grad(draw, w, samples, outputs), "w_bits": filters, "window": w, "mask_bits": mask}


def gated_conv2d_weight_grad(draw: Draw) -> dict[str, Any]:
    w, samples = window_of(draw), draw.choice([0, 1, 2, 5])
    d = output_grad(draw, w, samples, w.groups * draw.choice([1, 2, 17]))
    gate = draw.optional_gate(samples, w.units)
    return {"d": d, "x_bits": draw.words(samples, w.units), "window": w, "gate_bits": gate}


def sample_engram(draw: Draw) -> dict[str, Any]:
    m, k = draw.sizes()
    return {
        "score": draw.floats(min(m, 300_000 // k), k),
        "seed": draw.philox_seed(),
        "rate": draw.choice([1e-9, 0.01, 0.1, 0.5, 1.0, 1]),
        "rule": draw.choice(["gumbel_top_k", "gumbel_top_k", "bernoulli"]),
        "temperature": draw.choice([0.0, 0, 1e-6, 0.1, 1.0, 1e30, INF]),
        "first_row": draw.choice([0, 1, 2**32 - 1, 2**40]),
        "row_step": draw.choice([1, 1, 2, 2**32 + 1]),
    }


def update_state(draw: Draw, n: int, k: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weight, moments and sign bits; and the keyword arguments of an update of them."""
    weight_dtype, state_dtype = draw.choice([torch.float32, torch.bfloat16]), draw.choice(STATES)
    spread = draw.choice([1.0, 1e-3, 1e-12])
    if state_dtype == torch.int8:
        moments = draw.integers(-128, 128, n, k).to(torch.int8), draw.integers(0, 256, n, k).to(torch.uint8)
    else:
        moments = (draw.normal_of(n, k) * spread).to(state_dtype), (draw.uniform_of(n, k) * spread**2).to(state_dtype)
    weight = (draw.normal_of(n, k) * draw.choice([0.2, 0.0, 3.0])).to(weight_dtype)
    state = {"weight": weight, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    state["sign_bits"] = draw.words(n, k) if draw.chance(0.7) else None
    metaplasticity = draw.choice([0.0, 1.35, 30.0, INF])
    settings = {
        "lr": draw.choice([0.0, 1e-3, 0.5, 1]),
        "beta1": draw.choice([0.0, 0.5, 0.9]),
        "beta2": draw.choice([0.0, 0.9, 0.999]),
        # 0 / 0 and 1e-38 / 0 differ by more than rounding: no eps of 0 where the dividend depends on a tanh
        "eps": draw.choice([1e-8, 1e-3, 1.0]) if metaplasticity > 0 else draw.choice([0.0, 0, 1e-8]),
        "weight_decay": draw.choice([0.0, 1e-2, 1]),
        "metaplasticity": metaplasticity,
        "step": draw.choice([1, 2, 1000, 2**40]),
        "weight_bound": draw.choice([INF, 1.0, 0.1, 1e-30]),
        "exp_avg_scale": None,
        "exp_avg_sq_scale": None,
        "seed": draw.philox_seed() if draw.chance(0.8) or not state_dtype == weight_dtype == torch.float32 else None,
        "first_row": draw.choice([0, 1, 2**33]),
    }
    if state_dtype == torch.int8:
        for name, least in (("exp_avg_scale", -30), ("exp_avg_sq_scale", -60)):
            scale = 2.0 ** draw.integers(least, 3, n, -(-k // SCALE_BLOCK))
            settings[name] = torch.where(draw.uniform_of(*scale.shape) < 0.1, 0.0, scale)
    return state, settings


STATES = (torch.float32, torch.bfloat16, torch.int8)


def metaplastic_adam_(draw: Draw) -> dict[str, Any]:
    n, k = draw.sizes()
    n = min(n, 100_000 // k)
    state, settings = update_state(draw, n, k)
    grad = draw.floats(n, k, dtype=draw.choice([torch.float32, state["weight"].dtype]))
    return {"weight": state.pop("weight"), "grad": grad} | state | settings


def gated_metaplastic_adam_(draw: Draw) -> dict[str, Any]:
    m, n, k = draw.sizes(3)
    n = min(n, 100_000 // k)
    state, settings = update_state(draw, n, k)
    samples = {"d": draw.floats(m, n), "x_bits": draw.words(m, k), "gate_bits": draw.optional_gate(m, k)}
    return samples | state | settings


def real_metaplastic_adam_(draw: Draw) -> dict[str, Any]:
    m, n, k = draw.sizes(3)
    n = min(n, 100_000 // k)
    state, settings = update_state(draw, n, k)
    return {"d": draw.floats(m, n), "x": draw.floats(m, k)} | state | settings


# ---- contracts


Arguments = dict[str, Any]


def either(*dtypes: torch.dtype) -> Callable[[Arguments], tuple[torch.dtype, ...]]:
    return lambda arguments: dtypes


def always(arguments: Arguments) -> bool:
    return True


def never(arguments: Arguments) -> bool:
    return False


BITS, FLOATING = either(torch.int64), either(*FLOATS)


@dataclass(frozen=True)
class TensorRule:
    """A tensor argument: its shape, in the symbols of the operator, and the dtypes it may have."""

    shapes: str  # alternatives apart by |; "..." stands for any leading dimensions
    dtypes: Callable[[Arguments], tuple[torch.dtype, ...]] = FLOATING
    optional: Callable[[Arguments], bool] = never  # whether it may be None
    allowed: Callable[[Arguments], bool] = always  # whether it may be a tensor


GATE = TensorRule("words | M words", BITS, optional=always)


def dtype_of(name: str) -> Callable[[Arguments], torch.dtype | None]:
    return lambda arguments: arguments[name].dtype if isinstance(arguments[name], Tensor) else None


def has_scales(arguments: Arguments) -> bool:
    return dtype_of("exp_avg")(arguments) == torch.int8


def rounds(arguments: Arguments) -> bool:
    return not all(dtype_of(name)(arguments) == torch.float32 for name in ("weight", "exp_avg"))


SEED = TensorRule("2", BITS)
SCALE = TensorRule("N blocks", either(torch.float32), lambda a: not has_scales(a), has_scales)
STATE_RULES = {
    "weight": TensorRule("N K", either(torch.float32, torch.bfloat16)),
    "exp_avg": TensorRule("N K", either(*STATES)),
    "exp_avg_sq": TensorRule("N K", lambda a: (torch.uint8 if has_scales(a) else dtype_of("exp_avg")(a),)),
    "sign_bits": TensorRule("N words", BITS, optional=always),
    "exp_avg_scale": SCALE,
    "exp_avg_sq_scale": SCALE,
    "seed": TensorRule("2", BITS, lambda a: not rounds(a)),
}


@dataclass(frozen=True)
class Operator:
    """How to call an operator, what it allows, and how near to the reference it is."""

    recipe: Callable[[Draw], Arguments]
    tensors: dict[str, TensorRule]
    check: Callable[[Arguments, Any, Any], None]
    written: tuple[str, ...] = ()
    no_nan: tuple[str, ...] = ()


def proper_window(numbers: Any) -> bool:
    """But for a dilation of 0, which recipes give to the one operator that takes it."""
    if len(numbers) != len(Window._fields) or not all(type(number) is int and number < 2**31 for number in numbers):
        return False
    w = Window(*numbers)
    least = min(w._replace(top=1, bottom=1, left=1, right=1, dilation_h=1, dilation_w=1))
    if least < 1 or min(w.top, w.bottom, w.left, w.right, w.dilation_h, w.dilation_w) < 0:
        return False
    fits = w.height + w.top + w.bottom > w.dilation_h * (w.kernel_h - 1)
    fits &= w.width + w.left + w.right > w.dilation_w * (w.kernel_w - 1)
    return fits and w.channels % w.groups == 0 and max(w.units, w.group_units, w.out_height * w.out_width) < 2**31


NUMBERS: dict[str, Callable[[Any], bool]] = {
    "k": lambda v: 1 <= v < 2**31,
    "window": proper_window,
    "group": lambda v: 0 <= v < 2**31,
    "rows": lambda v: 1 <= v < 2**31,
    "width": lambda v: v > 0,
    "rate": lambda v: 0 < v <= 1,
    "rule": lambda v: v in ("gumbel_top_k", "bernoulli"),
    "temperature": lambda v: v == 0 or v >= 1e-6,
    "first_row": lambda v: v >= 0,
    "count": lambda v: v >= 1,
    "row_step": lambda v: v >= 1,
    "dtype": lambda v: v in (*FLOATS, torch.float64, torch.int8, torch.int32),
    "lr": lambda v: 0 <= v < INF,
    "beta1": lambda v: 0 <= v < 1,
    "beta2": lambda v: 0 <= v < 1,
    "eps": lambda v: v >= 0,
    "weight_decay": lambda v: 0 <= v < INF,
    "metaplasticity": lambda v: v >= 0,
    "step": lambda v: v >= 1,
    "weight_bound": lambda v: v >= 1e-44,
    "floor": lambda v: 1e-30 <= v <= 1e30,
    "pool": lambda v: 1 <= v < 2**31,
}
BAD_NUMBERS: dict[str, list[Any]] = {
    "k": [0, -1, -(2**63), 2**31, 2**40, 2**63 - 1],
    "window": [
        (),
        (1,) * 13,
        (1,) * 7 + (-1,) + (1,) * 6,
        (1,) * 5 + (0,) + (1,) * 8,
        (1, 1, 3, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 2),
        (1, 1, 1, 2, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1),
        (1, 1, 1, 1, 9, 1, 1, 0, 0, 2, 2, 1, 2, 1),
        (2**31, *[1] * 13),
        (2**20, 2**20, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1),
        (1,) * 11 + (-1, 1, 1),
    ],
    "group": [-1, -(2**63), 2**31, 2**40],
    "rows": [0, -1, 2**31, 2**62],
    "width": [0.0, -1.0, NAN, -INF],
    "rate": [0.0, -0.5, 1 + 1e-12, INF, NAN],
    "rule": ["uniform", "", None, 3],
    "temperature": [-1.0, 1e-7, NAN, -INF],
    "first_row": [-1, -(2**63)],
    "count": [0, -1, -(2**63)],
    "row_step": [0, -1, -(2**63)],
    "dtype": [torch.bool, torch.int64, torch.uint8, torch.int16, torch.complex64],
    "lr": [-1e-3, NAN, INF],
    "beta1": [-0.1, 1.0, 2.0, NAN],
    "beta2": [-0.1, 1.0, 2.0, NAN],
    "eps": [-1e-8, NAN],
    "weight_decay": [-1.0, NAN, INF],
    "metaplasticity": [-1.0, NAN],
    "step": [0, -1, -(2**63)],
    "weight_bound": [0.0, -1.0, NAN, 1e-50],
    "floor": [0.0, -1.0, NAN, INF, 1e-50],
    "pool": [0, -1, 2**31, 2**40],
}
KINDS: dict[str, Any] = {
    "k": int, "window": (tuple, list), "group": int, "rows": int, "first_row": int, "row_step": int, "count": int,
    "step": int, "pool": int, "rule": str, "dtype": torch.dtype,
}  # fmt: skip


# ---- memory


def fresh(t: Tensor) -> Tensor:
    """A copy of its own, contiguous and aligned."""
    return t.resolve_neg().clone(memory_format=torch.contiguous_format)


def sliced(t: Tensor, draw: Draw) -> Tensor:
    """Every other element of some dimensions, behind a margin, of a larger tensor full of other numbers."""
    steps = [draw.choice([1, 2]) for _ in t.shape]
    margins = [draw.choice([0, 1, 3]) for _ in t.shape]
    sizes = [margin + step * size + 1 for margin, step, size in zip(margins, steps, t.shape, strict=True)]
    around = draw.integers(0, 256, math.prod(sizes) * t.element_size()).to(torch.uint8).view(t.dtype).view(sizes)
    view = around[tuple(slice(m, m + s * n, s) for m, s, n in zip(margins, steps, t.shape, strict=True))]
    return view.copy_(t)


def transposed(t: Tensor, draw: Draw) -> Tensor:
    if t.dim() < 2:
        return t
    one, other = draw.sample(range(t.dim()), 2)
    return fresh(t.transpose(one, other)).transpose(one, other)


def expanded(t: Tensor, draw: Draw) -> Tensor:
    """Its first slice along a dimension, without a copy, for all: other numbers than before."""
    dims = [dim for dim, size in enumerate(t.shape) if size > 0]
    if not dims:
        return t
    dim = draw.choice(dims)
    return fresh(t.narrow(dim, 0, 1)).expand(t.shape)


def offset(t: Tensor, draw: Draw) -> Tensor:
    """Contiguous, within other numbers."""
    before, after = draw.choice([1, 3, 4, 64]), draw.choice([0, 1, 5])
    around = draw.integers(0, 256, (before + t.numel() + after) * t.element_size()).to(torch.uint8).view(t.dtype)
    return around[before : before + t.numel()].view(t.shape).copy_(t)


def unaligned(t: Tensor, draw: Draw) -> Tensor:
    """At an odd address, up to the last byte of its memory, as in a view of a file."""
    if t.numel() == 0:
        return t
    first = draw.choice([1, 3, 5, 7])
    memory = bytearray(first + t.numel() * t.element_size())
    return torch.frombuffer(memory, dtype=t.dtype, offset=first).view(t.shape).copy_(t)


def negated(t: Tensor, draw: Draw) -> Tensor:
    """The same numbers by way of a lazy negation."""
    return torch._neg_view(-t) if t.is_floating_point() else t


LAYOUTS = (sliced, transposed, expanded, offset, unaligned, negated)


def is_aligned(t: Tensor) -> bool:
    return t.data_ptr() % t.element_size() == 0


def updatable(t: Tensor) -> bool:
    return t.is_contiguous() and is_aligned(t)


def overlap(one: Tensor, other: Tensor) -> bool:
    """Contiguous tensors."""
    ends = [t.data_ptr() + t.numel() * t.element_size() for t in (one, other)]
    return one.data_ptr() < ends[1] and other.data_ptr() < ends[0]


def side_by_side(one: Tensor, other: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Both in the same memory, that of ``other`` behind that of ``one`` or within it."""
    size, other_size = (t.numel() * t.element_size() for t in (one, other))
    at = draw.choice([0, size // 2, size - 1, size, size + 7]) // 8 * 8
    memory = torch.zeros(max(size, at + other_size) // 8 + 1, dtype=torch.int64).view(torch.uint8)
    pair = memory[:size].view(one.dtype).view(one.shape), memory[at : at + other_size].view(other.dtype)
    return pair[0].copy_(one), pair[1].view(other.shape).copy_(other)


def surroundings(t: Tensor) -> Tensor:
    """The bytes of a contiguous tensor's memory before and behind it."""
    memory = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())  # type: ignore[call-overload]
    first = t.storage_offset() * t.element_size()
    return torch.cat([memory[:first], memory[first + t.numel() * t.element_size() :]])


# ---- calls


@dataclass
class Call:
    """A call of an operator, and the surroundings it is made in."""

    name: str
    arguments: Arguments
    isa: str = ""
    threads: int = 1
    changes: list[str] = field(default_factory=list)
    faults: int = 0  # changes that may have made the call a bad one

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.name]

    def tensors(self) -> dict[str, Tensor]:
        names = self.operator.tensors
        return {name: self.arguments[name] for name in names if isinstance(self.arguments[name], Tensor)}

    @property
    def strided(self) -> bool:
        """Whether all tensors have strides: none is sparse."""
        return all(t.layout == torch.strided for t in self.tensors().values())

    @property
    def on_meta(self) -> bool:
        return any(t.is_meta for name, t in self.tensors().items() if name != "seed")

    def __str__(self) -> str:
        lines = [f"{self.name} on {self.isa}, {self.threads} threads; changes: {', '.join(self.changes) or 'none'}"]
        for name, value in self.arguments.items():
            if isinstance(value, Tensor) and value.layout == torch.strided:
                place = "meta" if value.is_meta else "aligned" if is_aligned(value) else "unaligned"
                shown = f"{value.dtype} {tuple(value.shape)}, strides {value.stride()}, {place}"
                shown += f", {value.tolist()}" if value.numel() <= 2 and not value.is_meta else ""
            else:
                shown = repr(value)
            lines.append(f"  {name}: {shown}")
        return "\n".join(lines)


def shapes_agree(call: Call) -> bool:
    """Whether one value for each symbol fits all shapes."""
    sizes: dict[str, int] = {}
    if "layout" in call.arguments:
        k, real = first_stage(call.arguments["layout"])
        sizes |= {"units": k if real else words_for(k), "words": words_for(k)}
    if "window" in call.arguments:
        w = Window(*call.arguments["window"])
        sizes |= {"units": words_for(w.units), "words": words_for(w.group_units)}
        sizes |= {"Y": w.out_height, "X": w.out_width}
    elif "k" in call.arguments:
        sizes |= {"K": call.arguments["k"]}
    else:
        for name, t in call.tensors().items():  # the last size of whatever has one of K
            rule = call.operator.tensors[name]
            if rule.shapes.split()[-1] == "K" and t.dim() >= 1:
                sizes["K"] = t.shape[-1]
                break
    if "K" in sizes:
        groups = -(-sizes["K"] // reference._GROUP)
        sizes |= {"words": words_for(sizes["K"]), "blocks": -(-sizes["K"] // SCALE_BLOCK), "groups": groups}
    w_bits = call.arguments.get("w_bits")
    if isinstance(w_bits, Tensor) and w_bits.dim() == 2:
        sizes["outputs"] = w_bits.shape[0] + -w_bits.shape[0] % reference._GROUPED_ROWS

    def fits(t: Tensor, shape: str) -> bool:
        symbols = shape.split()
        if symbols[0] == "...":
            symbols = symbols[1:]
            if t.dim() < len(symbols):
                return False
        elif t.dim() != len(symbols):
            return False
        return all(
            int(symbol) == size if symbol.isdecimal() else sizes.setdefault(symbol, size) == size
            for symbol, size in zip(reversed(symbols), reversed(t.shape), strict=False)
        )

    for name, t in call.tensors().items():
        alternatives = [s for s in call.operator.tensors[name].shapes.split("|") if len(s.split()) == t.dim()]
        if not fits(t, (alternatives or call.operator.tensors[name].shapes.split("|"))[0]):
            return False
    if "window" in call.arguments and "N" in sizes and (sizes["N"] < 1 or sizes["N"] % w.groups):
        return False
    if call.name == "patch_excitability" and not patches_fit(sizes, call.arguments["pool"]):
        return False
    if call.name == "interleave_bits" and sizes.get("M", 0) % call.arguments["rows"]:
        return False
    return sizes.get("K", 1) >= 1 and (call.name != "binary_threshold" or sizes.get("N", 1) >= 1)


def patches_fit(sizes: dict[str, int], pool: int) -> bool:
    """Of the sizes that are known: an argument may be no tensor at all."""
    least = min(sizes.get("height", 1), sizes.get("width", 1))
    known = min(least, *(sizes.get(name, 1) for name in ("channels", "F", "size"))) >= 1
    fits = not {"height", "size"} <= sizes.keys() or sizes["size"] <= least - pool + 1
    return known and fits and sizes.get("size", 1) <= 128


def wrong_patches(filters: Tensor, units: Tensor, images: Tensor, pool: int) -> set[str]:
    """The arguments with numbers that are no taps, or no units of these shapes."""
    _, height, width, channels = images.shape
    f, size, _ = filters.shape
    everything = (height - size - pool + 2) * (width - size - pool + 2) * channels * f
    outside = bool((units < 0).any() or (units >= everything).any() or (units[1:] < units[:-1]).any())
    taps = bool((filters > 1).any() or (filters < -1).any())
    return {name for name, wrong in (("filters", taps), ("units", outside)) if wrong}


def blamed(call: Call) -> set[str]:
    """The arguments of which an error may name one; none if the call is valid."""
    arguments, names = call.arguments, set()
    for name, rule in call.operator.tensors.items():
        value = arguments[name]
        if value is None:
            wrong = not rule.optional(arguments)
        elif not isinstance(value, Tensor) or value.layout != torch.strided:
            wrong = True
        else:
            wrong = not rule.allowed(arguments) or value.dtype not in rule.dtypes(arguments)
        names |= {name} if wrong else set()
    for name in arguments.keys() & NUMBERS.keys():
        kinds = KINDS.get(name, (int, float))
        # compiled graphs hold the numbers of updates
        checked = not call.on_meta or not call.operator.written
        if not isinstance(arguments[name], kinds) or (checked and not NUMBERS[name](arguments[name])):
            names.add(name)
    if (
        call.name == "top_units"
        and not names
        and arguments["y"].dim() == 2
        and arguments["count"] > arguments["y"].shape[1]
    ):
        names.add("count")
    if (names and call.faults > 1) or (
        call.strided and not names & {"k", "window", "rows", "pool"} and not shapes_agree(call)
    ):
        return set(arguments)
    strided = {name: t for name, t in call.tensors().items() if t.layout == torch.strided}
    if len({t.device for name, t in strided.items() if name != "seed"}) > 1:
        names |= strided.keys()
    if "seed" in strided and not proper_seed(strided["seed"], call.on_meta):
        names.add("seed")
    if call.on_meta:
        return names
    for name in call.operator.no_nan:
        if name in strided and strided[name].isnan().any() and reads_scores(arguments):
            names.add(name)
    if call.name == "patch_excitability" and not names:
        names |= wrong_patches(**{name: arguments[name] for name in ("filters", "units", "images", "pool")})
    written = {name: t for name, t in strided.items() if name in call.operator.written}
    names |= {name for name, t in written.items() if not updatable(t)}
    return names | sharing(call, written)


def proper_seed(seed: Tensor, on_meta: bool) -> bool:
    """On the CPU, with an offset below 2^32; dtype and shape are looked at elsewhere."""
    if seed.dtype != torch.int64 or seed.shape != (2,):
        return True
    return not seed.is_meta and (on_meta or 0 <= int(seed[1]) < 2**32)


def sharing(call: Call, written: dict[str, Tensor]) -> set[str]:
    """Arguments that share memory with one that is written, but for those that are read from a copy."""
    in_place = {
        name: t
        for name, t in call.tensors().items()
        if name != "seed" and updatable(t) and not (name in ("d", "x") and t.dtype != torch.float32)
    }
    pairs = [
        (a, b)
        for a in written.keys() & in_place.keys()
        for b in in_place
        if a != b and overlap(in_place[a], in_place[b])
    ]
    return {name for pair in pairs for name in pair}


def reads_scores(arguments: Arguments) -> bool:
    """Whether a NaN among the scores is seen: always, but where they are ignored."""
    if arguments.get("rule") == "bernoulli":
        return False
    temperature = arguments.get("temperature", 1.0)
    if not isinstance(temperature, (int, float)):
        return True  # the error may name either argument
    return temperature == 0 or temperature < 1e38


# ---- changes


def change_dtype(call: Call, draw: Draw) -> None:
    """Often to one that is near to what is allowed, and that other functions of torch would take."""
    name = draw.choice(sorted(call.tensors()))
    t = call.arguments[name]
    real = t.real if t.is_complex() else t.nan_to_num() if t.is_floating_point() else t
    near = torch.float64 if t.is_floating_point() else torch.int32
    call.arguments[name] = real.to(near if draw.chance(0.3) else draw.choice([*FLOATS, *OTHERS]))


def change_size(call: Call, draw: Draw) -> None:
    tensors = {name: t for name, t in call.tensors().items() if t.dim() > 0}
    if not tensors:
        return
    name = draw.choice(sorted(tensors))
    t, dim = tensors[name], draw.randrange(tensors[name].dim())
    size = max(0, draw.choice([t.shape[dim] - 1, t.shape[dim] + 1, 2 * t.shape[dim], 0, 1]))
    if t.shape[dim] == 0:
        shape = [size if i == dim else s for i, s in enumerate(t.shape)]
        call.arguments[name] = t.new_zeros(shape)
    else:
        call.arguments[name] = t.index_select(dim, torch.arange(size) % t.shape[dim])


def change_dimensions(call: Call, draw: Draw) -> None:
    name = draw.choice(sorted(call.tensors()))
    t = call.arguments[name]
    ways = [lambda: t.unsqueeze(0), lambda: t.unsqueeze(-1), lambda: t.flatten(), lambda: t.new_ones(())]
    call.arguments[name] = draw.choice(ways)()


def change_number(call: Call, draw: Draw) -> None:
    names = [name for name in call.arguments if name in NUMBERS]
    if names:
        name = draw.choice(names)
        call.arguments[name] = draw.choice(BAD_NUMBERS[name])


def change_units(call: Call, draw: Draw) -> None:
    if isinstance(call.arguments.get("k"), int):
        call.arguments["k"] = max(1, call.arguments["k"] + draw.choice([-128, -1, 1, 64, 128]))


def change_type(call: Call, draw: Draw) -> None:
    fixed = ("rule", "dtype", "layout", "factors", "tensors")
    name = draw.choice([name for name in call.arguments if name not in fixed])
    call.arguments[name] = draw.choice([None, "7", [1.5], {}])


def change_seed(call: Call, draw: Draw) -> None:
    if isinstance(call.arguments.get("seed"), Tensor):
        call.arguments["seed"] = torch.tensor([1, draw.choice([-1, 2**32, -(2**63)])])


def change_layout(call: Call, draw: Draw) -> None:
    name = draw.choice(sorted(call.tensors()))
    call.arguments[name] = call.arguments[name].to_sparse()


FAULTS = (
    change_dtype, change_dtype, change_size, change_size, change_dimensions, change_number, change_units, change_type,
    change_seed, change_layout,
)  # fmt: skip


def move_to_meta(call: Call, draw: Draw) -> None:
    """All tensors but the seed, or one of them, the seed included."""
    names = [name for name in sorted(call.tensors()) if name != "seed"]
    if draw.chance(0.4):
        names = [draw.choice(sorted(call.tensors()))]
    for name in names:
        call.arguments[name] = call.arguments[name].to("meta")


def share_memory(call: Call, draw: Draw) -> None:
    """Two tensors in the same memory: one that is written and any, or two that are read and equal in shape."""
    tensors = {name: t for name, t in call.tensors().items() if name != "seed" and t.numel()}
    if call.operator.written:
        written = [name for name in call.operator.written if name in tensors]
        if len(tensors) < 2 or not written:
            return
        one = draw.choice(written)
        pair = [one, draw.choice([name for name in sorted(tensors) if name != one])]
        draw.shuffle(pair)
        new = dict(zip(pair, side_by_side(tensors[pair[0]], tensors[pair[1]], draw), strict=True))
        for name in pair:
            if name.endswith("_scale"):  # a power of two or 0, which other numbers written over it are not
                new[name].copy_(tensors[name])
        call.arguments |= new
        return
    pairs = [
        (a, b)
        for a in sorted(tensors)
        for b in sorted(tensors)
        if a < b and tensors[a].dtype == tensors[b].dtype and tensors[a].shape == tensors[b].shape
    ]
    if pairs:
        one, other = draw.choice(pairs)
        call.arguments[one] = call.arguments[other]


def make_call(seed: int, case: int, names: list[str]) -> Call:
    """Case number ``case``, of one of the operators ``names``."""
    draw = Draw(seed, case)
    name = draw.choice(names)
    call = Call(name, OPERATORS[name].recipe(draw))
    call.isa, call.threads = draw.choice(ops.available_isas()), draw.choice([1, 1, 2, 3])
    for _ in range(draw.choice([0, 0, 0, 1, 1, 2])):
        fault = draw.choice(FAULTS)
        fault(call, draw)
        call.changes.append(fault.__name__)
        call.faults += 1
        if not call.tensors() or not call.strided:
            return call
    grouped = isinstance(call.arguments.get("w_groups"), Tensor)
    if grouped and call.faults and not blamed(call):  # what they must be no operator checks: the groups of w_bits
        call.arguments["w_groups"] = reference.group_signs(call.arguments["w_bits"], call.arguments["k"])
    if draw.chance(0.15):
        share_memory(call, draw)
        call.changes.append("share_memory")
    else:
        for argument, t in call.tensors().items():
            # what is written is refused in most layouts
            if draw.chance(0.1 if argument in call.operator.written else 0.4):
                layout = draw.choice(LAYOUTS)
                if (layout is negated and argument in call.operator.written) or (layout is expanded and grouped):
                    layout = offset
                call.arguments[argument] = layout(t, draw)
                call.changes.append(f"{argument} {layout.__name__}")
    if draw.chance(0.15):
        move_to_meta(call, draw)
        call.changes.append("move_to_meta")
    return call


# ---- checks of results


def require(condition: bool, message: str) -> None:
    if not condition:
        raise WrongCallError(message)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(fresh(one).view(-1).view(torch.uint8), fresh(other).view(-1).view(torch.uint8))


def check_form(actual: Any, expected: Any) -> None:
    for t in (actual, expected):
        require(isinstance(t, Tensor), f"expected a tensor, got {t!r}")
    got, wanted = ((t.dtype, tuple(t.shape)) for t in (actual, expected))
    require(got == wanted, f"expected {wanted}, got {got}")
    require(actual.is_contiguous(), f"expected a contiguous result, got strides {actual.stride()}")


def check_exact(a: Arguments, actual: Any, expected: Any) -> None:
    if not torch.equal(actual, expected):
        where = (actual != expected).nonzero()[0].tolist()
        raise WrongCallError(f"element {where}: expected {expected[tuple(where)]}, got {actual[tuple(where)]}")


def check_same_numbers(a: Arguments, actual: Any, expected: Any) -> None:
    """Exact, NaN where the expected number is."""
    check_exact(a, actual.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))
    check_exact(a, actual.isnan(), expected.isnan())


def check_near(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str = "element") -> None:
    """Within ``bound``; infinite or NaN where the expected number is."""
    difference = (actual.double() - expected.double()).abs()
    wrong = (difference > bound) | (actual.isnan() != expected.isnan()) | (actual.isinf() != expected.isinf())
    wrong &= ~(actual == expected)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        limit = bound[where].item() if isinstance(bound, Tensor) else bound
        raise WrongCallError(
            f"{what} {list(where)}: expected {expected[where]}, got {actual[where]}, may differ by {limit}"
        )


def check_sum(actual: Tensor, terms: Tensor, factors: Tensor, mask: Tensor | None = None) -> None:
    """``terms @ factors`` as float32 sums in any order, rounded to the dtype of the result; all, or those of a mask.

    Real terms (R, I) and factors (I, C). Where an infinity or a NaN takes part, no finite number may come; one that is
    multiplied by 0 may count or not.
    """
    terms, factors, got = terms.double(), factors.double(), actual.double()
    wild, wild_factors = (~terms.isfinite()).double(), (~factors.isfinite()).double()
    count, wild_count = (factors != 0).double(), (terms != 0).double() @ wild_factors
    takes_part = wild @ count + wild_count > 0
    beside = (wild.sum(1, keepdim=True) > 0) | (wild_factors.sum(0) > 0)
    terms, factors = (torch.where(t.isfinite(), t, 0.0) for t in (terms, factors))
    expected, magnitude, many = terms @ factors, terms.abs() @ factors.abs(), count.sum(0) + 2
    info = torch.finfo(actual.dtype)
    bound = magnitude * many * 2.0**-24 + expected.abs() * info.eps + many * info.smallest_normal * info.eps
    bound = torch.where(magnitude + bound > min(info.max, 3e38) * 0.999, INF, bound)  # may have gone to infinity
    silent = takes_part & got.isfinite()
    optional = ~takes_part & beside & ~got.isfinite()
    wrong = silent | ~takes_part & ~optional & ~((got - expected).abs() <= bound) & (bound < INF)
    if mask is not None:
        wrong &= mask
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        wanted = "infinity or NaN" if takes_part[where] else f"{expected[where]} +- {bound[where]}"
        raise WrongCallError(f"element {list(where)}: expected {wanted}, got {got[where]}")


def check_sign_matmul(a: Arguments, actual: Tensor, expected: Tensor) -> None:
    check_sum(actual, a["a"], reference.unpack_signs(a["w_bits"], a["k"], torch.float64))


def check_sign_matmul_t(a: Arguments, actual: Tensor, expected: Tensor) -> None:
    if a["x"].dtype == torch.uint8:
        check_exact(a, actual, expected)
    else:
        check_sum(actual, a["x"], reference.unpack_signs(a["w_bits"], a["k"], torch.float64).T)


def check_input_grad(actual: Tensor, d: Tensor, w_bits: Tensor, k: int, mask_bits: Tensor) -> None:
    mask = reference._unpack(mask_bits, k).expand(d.shape[0], k)
    require(bool((actual == 0)[~mask].all()), "expected 0 where no unit is recruited")
    check_sum(actual, d, reference.unpack_signs(w_bits, k, torch.float64), mask)


def check_masked_input_grad(a: Arguments, actual: Tensor, expected: Tensor) -> None:
    check_input_grad(actual, a["d"], a["w_bits"], a["k"], a["mask_bits"])


def check_gated_input_grad(a: Arguments, actual: Tensor, expected: Tensor) -> None:
    mask = reference.pack_window(a["x"], 1.0, a["gate_bits"])
    check_input_grad(actual, a["d"], a["w_bits"], a["x"].shape[1], mask)


def check_weight_grad(actual: Tensor, d: Tensor, x_bits: Tensor, k: int, gate_bits: Tensor | None) -> None:
    gate = reference._gate(gate_bits, k)
    check_sum(actual, d.T, reference.unpack_signs(x_bits, k, torch.float64) * gate)


def check_gated_weight_grad(a: Arguments, actual: Tensor, expected: Tensor) -> None:
    check_weight_grad(actual, a["d"], a["x_bits"], a["k"], a["gate_bits"])


def check_real_weight_grad(a: Arguments, actual: Tensor, expected: Tensor) -> None:
    check_sum(actual, a["d"].T, a["x"])


def check_conv2d_input_grad(a: Arguments, actual: Tensor, expected: Tensor) -> None:
    d, w = a["d"], Window(*a["window"])
    every = valid_bits(w.units), valid_bits(w.group_units).expand_as(a["w_bits"])
    magnitude = reference.masked_conv2d_input_grad(d.double().abs(), every[1], w, every[0])
    check_rounded(actual, expected, magnitude, w.kernel_h * w.kernel_w * d.shape[3])


def check_conv2d_weight_grad(a: Arguments, actual: Tensor, expected: Tensor) -> None:
    magnitude = a["d"].double().abs().flatten(0, 2).sum(0).unsqueeze(1)  # those of padded taps come and go
    check_rounded(actual, expected, magnitude.expand(actual.shape), 2 * math.prod(a["d"].shape[:3]))


def check_rounded(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    """Float32 sums of so many terms in any order, rounded to the dtype of the result."""
    info = torch.finfo(actual.dtype)
    bound = magnitude * (terms + 2) * 2.0**-24 + expected.double().abs() * 2 * info.eps
    check_near(actual, expected, bound + info.smallest_normal * info.eps)


def check_update(before: Arguments, after: Arguments, expected: Arguments, grad: Tensor) -> None:
    """The state that an update leaves: moments bit for bit, weights but for the rounding of tanh and of the step."""
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"):
        if after[name] is not None:
            check_exact(after, after[name].nan_to_num(nan=-123.0), expected[name].nan_to_num(nan=-123.0))
    got, wanted, old = after["weight"].double(), expected["weight"].double(), before["weight"].double()
    step = step_without_consolidation(before, grad)
    bound = 2.0**-21 * (wanted.abs() + old.abs() + step) + 1e-44
    if after["weight"].dtype == torch.bfloat16:
        tipped = int((got != wanted).sum())
        shares = (bound / (2.0**-8 * wanted.abs() + 2.0**-133)).nan_to_num(nan=1.0).clamp(max=1.0)
        likely = float(shares.sum())  # where a step is large
        most = 3 + got.numel() // 50 + likely
        require(tipped <= most, f"weight: {tipped} of {got.numel()} differ in their rounding, more than {most:.0f}")
        bound += 2.0**-7 * wanted.abs() + 2.0**-133
    check_near(got, wanted, bound, "weight")
    if after["sign_bits"] is not None:
        check_exact(after, after["sign_bits"], reference._pack(after["weight"] >= 0))


def step_without_consolidation(before: Arguments, grad: Tensor) -> Tensor:
    """Magnitude of the step that plain Adam would make."""
    mu, v = before["exp_avg"], before["exp_avg_sq"]
    if mu.dtype == torch.int8:
        mu = reference.decode_first_moment(mu, before["exp_avg_scale"])
        v = reference.decode_second_moment(v, before["exp_avg_sq_scale"])
    beta1, beta2, t = before["beta1"], before["beta2"], before["step"]
    g = grad.double() + before["weight_decay"] * before["weight"].double()
    mu, v = beta1 * mu.double() + (1 - beta1) * g, beta2 * v.double() + (1 - beta2) * g * g
    step = before["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t) * mu / (v.sqrt() + before["eps"])
    return step.abs().nan_to_num(nan=0.0, posinf=3e38)


def check_nothing(a: Arguments, actual: Any, expected: Any) -> None:
    require(actual is None, f"expected None, got {actual!r}")


UPDATED = ("weight", "exp_avg", "exp_avg_sq", "sign_bits", "exp_avg_scale", "exp_avg_sq_scale")
WORDS = TensorRule("M words", BITS)
W_BITS = TensorRule("N words", BITS)
IMAGES, IMAGE_GATE = TensorRule("M units", BITS), TensorRule("units | M units", BITS, optional=always)
OPERATORS = {
    "pack_signs": Operator(pack_signs, {"x": TensorRule("... K")}, check_exact, no_nan=("x",)),
    "kept_sign_bits": Operator(kept_sign_bits, {"weight": TensorRule("... K")}, check_exact, no_nan=("weight",)),
    "pack_window": Operator(pack_window, {"x": TensorRule("M K"), "gate_bits": GATE}, check_exact),
    "unpack_signs": Operator(unpack_signs, {"bits": TensorRule("... words", BITS)}, check_exact),
    "transpose_bits": Operator(transpose_bits, {"bits": WORDS}, check_exact),
    "binary_matmul": Operator(binary_matmul, {"x_bits": WORDS, "w_bits": W_BITS, "gate_bits": GATE}, check_exact),
    "binary_threshold": Operator(
        binary_threshold,
        {
            "x_bits": WORDS,
            "w_bits": W_BITS,
            "threshold": TensorRule("N", either(torch.int32)),
            "flip": TensorRule("N", either(torch.bool)),
            "gate_bits": GATE,
        },
        check_exact,
    ),
    "sign_matmul": Operator(sign_matmul, {"a": TensorRule("M N"), "w_bits": W_BITS}, check_sign_matmul),
    "sign_matmul_t": Operator(
        sign_matmul_t,
        {
            "x": TensorRule("M K", either(*FLOATS, torch.uint8)),
            "w_bits": W_BITS,
            "w_groups": TensorRule("groups outputs", either(torch.int16), optional=always),
        },
        check_sign_matmul_t,
    ),
    "value_signs": Operator(
        value_signs,
        {
            "y": TensorRule("M K", either(torch.int32)),
            "threshold": TensorRule("K", either(torch.int32), optional=lambda a: a["flip"] is None),
            "flip": TensorRule("K", either(torch.bool), optional=always, allowed=lambda a: a["threshold"] is not None),
        },
        check_exact,
    ),
    "packed_network": Operator(
        packed_network,
        {
            "x": TensorRule("M units", lambda a: (torch.uint8 if first_stage(a["layout"])[1] else torch.int64,)),
            "gate_bits": TensorRule(
                "words | M words", BITS, optional=always, allowed=lambda a: not first_stage(a["layout"])[1]
            ),
        },
        check_exact,
    ),
    "top_units": Operator(top_units, {"y": TensorRule("M K", either(torch.int32))}, check_exact),
    "standardise": Operator(standardise, {"y": TensorRule("M K")}, check_same_numbers),
    "standardise_grad": Operator(
        standardise_grad,
        {"d": TensorRule("M K"), "y": TensorRule("M K"), "moments": TensorRule("M 2", either(torch.float64))},
        check_same_numbers,
    ),
    "patch_excitability": Operator(
        patch_excitability,
        {
            "images": TensorRule("M height width channels", either(torch.uint8)),
            "filters": TensorRule("F size size", either(torch.int8)),
            "units": TensorRule("N", either(torch.int64)),
        },
        check_exact,
    ),
    "gated_input_grad": Operator(
        gated_input_grad,
        {"d": TensorRule("M N"), "w_bits": W_BITS, "x": TensorRule("M K"), "gate_bits": GATE},
        check_gated_input_grad,
    ),
    "masked_input_grad": Operator(
        masked_input_grad,
        {"d": TensorRule("M N"), "w_bits": W_BITS, "mask_bits": TensorRule("words | M words", BITS)},
        check_masked_input_grad,
    ),
    "gated_weight_grad": Operator(
        gated_weight_grad,
        {"d": TensorRule("M N"), "x_bits": WORDS, "gate_bits": GATE},
        check_gated_weight_grad,
    ),
    "real_weight_grad": Operator(
        real_weight_grad,
        {"d": TensorRule("M N"), "x": TensorRule("M K", lambda a: (dtype_of("d")(a),))},
        check_real_weight_grad,
    ),
    "unfold_bits": Operator(unfold_bits, {"bits": TensorRule("M units", BITS)}, check_exact),
    "interleave_bits": Operator(interleave_bits, {"bits": WORDS}, check_exact),
    "binary_conv2d": Operator(
        binary_conv2d, {"x_bits": IMAGES, "w_bits": W_BITS, "gate_bits": IMAGE_GATE}, check_exact
    ),
    "masked_conv2d_input_grad": Operator(
        masked_conv2d_input_grad,
        {"d": TensorRule("M Y X N"), "w_bits": W_BITS, "mask_bits": TensorRule("units | M units", BITS)},
        check_conv2d_input_grad,
    ),
    "gated_conv2d_weight_grad": Operator(
        gated_conv2d_weight_grad,
        {"d": TensorRule("M Y X N"), "x_bits": IMAGES, "gate_bits": IMAGE_GATE},
        check_conv2d_weight_grad,
    ),
    "sample_engram": Operator(
        sample_engram, {"score": TensorRule("M K"), "seed": SEED}, check_exact, no_nan=("score",)
    ),
    "metaplastic_adam_": Operator(
        metaplastic_adam_,
        {"grad": TensorRule("N K", lambda a: (torch.float32, dtype_of("weight")(a)))} | STATE_RULES,  # type: ignore[arg-type,return-value]
        check_nothing,
        written=UPDATED,
    ),
    "gated_metaplastic_adam_": Operator(
        gated_metaplastic_adam_,
        {"d": TensorRule("M N"), "x_bits": WORDS, "gate_bits": GATE} | STATE_RULES,
        check_nothing,
        written=UPDATED,
    ),
    "real_metaplastic_adam_": Operator(
        real_metaplastic_adam_,
        {"d": TensorRule("M N"), "x": TensorRule("M K")} | STATE_RULES,
        check_nothing,
        written=UPDATED,
    ),
}


# ---- one case


NAMED = re.compile(r"(\w+): expected ")
BY_TORCH = re.compile(r"(?:for argument|missing value for argument|argument) '(\w+)'")


def function_of(module: Any, name: str) -> Callable[..., Any]:
    """The operator or its definition; ``kept_sign_bits`` is the layers' own way to ``pack_signs``."""
    if name == "kept_sign_bits":
        return torch.ops.engram_kernels.kept_sign_bits if module is ops else lambda weight: reference.pack_signs(weight)
    return getattr(module, name)


def copied(call: Call) -> Arguments:
    """The arguments with tensors of their own, on the CPU; zeros in the place of meta tensors."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return value
        return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else fresh(value)

    return {name: copy(value) for name, value in call.arguments.items()}


def attempt(function: Callable[..., Any], arguments: Arguments) -> tuple[Any, str | None]:
    """The result, or the message of an error of a kind that users expect."""
    try:
        return function(**arguments), None
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        message = f"{type(error).__name__}: {error}"
        require("INTERNAL ASSERT" not in message, message)
        return None, str(error)


def check_refusal(call: Call, names: set[str], message: str | None) -> None:
    """The first line of the message names one of the arguments at fault."""
    require(message is not None, f"expected an error that names {' or '.join(sorted(names))}, got none")
    assert message is not None
    first = message.splitlines()[0] if message else ""
    if not call.strided and f"'engram_kernels::{call.name}'" in first:
        return  # torch found no kernel for such a tensor
    if not call.tensors() and "no tensor arguments" in first and f"engram_kernels::{call.name}" in first:
        return  # nor for none at all
    named = NAMED.match(first) or BY_TORCH.search(first)
    require(
        named is not None and named[1] in names,
        f"expected an error that names {' or '.join(sorted(names))}, got: {first}",
    )


def check_unchanged(call: Call, before: Arguments, names: Iterable[str]) -> None:
    for name in names:
        t = call.arguments[name]
        require(same_bytes(t, before[name]), f"{name}: expected it as it was, got other contents")


def check(call: Call) -> bool:
    """Makes the call. Returns whether it was valid. Raises: WrongCallError."""
    names, before = blamed(call), copied(call)
    readable = [name for name, t in call.tensors().items() if t.layout == torch.strided and not t.is_meta]
    written = [name for name in readable if name in call.operator.written]
    alone = [name for name in written if call.arguments[name].is_contiguous() and "share_memory" not in call.changes]
    around = {name: surroundings(call.arguments[name]) for name in alone}
    ops.set_isa(call.isa)
    torch.set_num_threads(call.threads)
    actual, error = attempt(function_of(ops, call.name), call.arguments)
    if names:
        check_refusal(call, names, error)
        check_unchanged(call, before, readable)
        return False
    if "share_memory" not in call.changes:
        check_unchanged(call, before, [name for name in readable if name not in written])
    for name, margin in around.items():
        require(torch.equal(surroundings(call.arguments[name]), margin), f"{name}: its surroundings were written to")
    if call.operator.written and not call.on_meta:
        check_updated(call, before, error)
    else:
        require(error is None, f"expected a result, got {error}")
    if call.operator.written:
        call.operator.check(before, actual, None)
        return True
    expected = function_of(reference, call.name)(**before)
    for own, wanted in zip(results_of(actual), results_of(expected), strict=True):
        check_form(own, wanted)
        require(own.is_meta == call.on_meta, f"expected a result where the arguments are, got one on {own.device}")
        if not call.on_meta:
            call.operator.check(before, own, wanted)
    return True


def results_of(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def check_updated(call: Call, before: Arguments, error: str | None) -> None:
    """An update against the reference's of the same gradient."""
    expected = {name: fresh(v) if isinstance(v, Tensor) else v for name, v in before.items()}
    if call.name == "metaplastic_adam_":
        grad = before["grad"]
    elif call.name == "real_metaplastic_adam_":
        d, x = (expected.pop(name).float() for name in ("d", "x"))
        if float((d.double().abs().T @ x.double().abs()).nan_to_num(posinf=0.0).amax() if d.numel() else 0.0) > 1e38:
            return  # whether a sum is finite follows from its order
        grad = ops.real_weight_grad(d, x)
        check_sum(grad, d.T, x)
    else:
        d, x_bits, gate_bits = (expected.pop(name) for name in ("d", "x_bits", "gate_bits"))
        if float(d.double().abs().nan_to_num(posinf=0.0).sum(0).amax() if d.numel() else 0.0) > 1e38:
            return  # whether a sum is finite follows from its order
        k = before["weight"].shape[1]
        grad = ops.gated_weight_grad(d.float(), x_bits, k, gate_bits)
        check_weight_grad(grad, d.float(), x_bits, k, gate_bits)
    _, expected_error = attempt(reference.metaplastic_adam_, expected | {"grad": grad})
    require(error == expected_error, f"expected the error {expected_error}, got {error}")
    check_update(before, call.arguments, expected, grad)


# ---- many cases


@dataclass
class Tally:
    """What the cases were, by operator: how many valid, how many refused."""

    valid: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {self.valid.get(name, 0)} valid calls agree, {self.refused.get(name, 0)} bad ones are refused"
            for name in OPERATORS
        )


def find_failure(seed: int, cases: Iterable[int], names: list[str] | None = None, tally: Tally | None = None) -> str:
    """A report of the first case that fails, or nothing. ``names`` are those of the operators to call."""
    tally, names = tally or Tally(), names or list(OPERATORS)
    isa, threads = ops.isa(), torch.get_num_threads()
    try:
        for case in cases:
            call = make_call(seed, case, names)
            shown = str(call)
            try:
                counts = tally.valid if check(call) else tally.refused
                counts[call.name] = counts.get(call.name, 0) + 1
            except Exception as error:  # also what an operator must not raise
                chosen = "" if names == list(OPERATORS) else f" --operators {' '.join(names)}"
                return f"{type(error).__name__}: {error}\n{shown}\n{repeat(seed, case)}{chosen}"
    finally:
        ops.set_isa(isa)
        torch.set_num_threads(threads)
    return ""


def repeat(seed: int, case: int) -> str:
    return f"repeat it with: python -m tests.fuzz.operators --seed {seed} --case {case}"


def until(deadline: float, current: Any) -> Iterator[int]:
    """Numbers of cases, told to the process that looks on, as long as there is time."""
    case = 0
    while time.monotonic() < deadline:
        current.value = case
        yield case
        case += 1


FOUND = 3  # exit status of a process that reported a case; those of crashes, Python and sanitizers are others


def worker(seed: int, cases: Iterable[int], names: list[str], current: Any) -> None:
    faulthandler.enable()
    tally = Tally()
    report = find_failure(seed, cases, names, tally)
    print(report or f"seed {seed}, {current.value + 1} cases\n{tally}", flush=True)
    sys.exit(FOUND if report else 0)


def main(arguments: list[str] | None = None) -> int:
    """The command. Cases run in a process of their own, so that one that crashes it can be named."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.operators", description="Fuzzes every operator.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (default: 60)")
    parser.add_argument("--seed", type=int, default=None, help="of all cases (default: by the clock)")
    parser.add_argument("--case", type=int, default=None, help="run this one case")
    parser.add_argument("--operators", nargs="+", choices=list(OPERATORS), default=list(OPERATORS), metavar="NAME")
    options = parser.parse_args(arguments)
    seed = time.time_ns() % 2**32 if options.seed is None else options.seed
    context = multiprocessing.get_context("fork")
    current = context.Value("q", options.case or 0)
    cases = until(time.monotonic() + options.seconds, current) if options.case is None else [options.case]
    process = context.Process(target=worker, args=(seed, cases, options.operators, current))
    process.start()
    process.join()
    if process.exitcode not in (0, FOUND):
        print(f"the process ended with {process.exitcode}\n{repeat(seed, current.value)}")
    return 1 if process.exitcode else 0


if __name__ == "__main__":
    sys.exit(main())
