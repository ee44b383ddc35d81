"""Numbers of PTX in numpy: types, single rounding in any direction, bfloat16.

Arithmetic narrower than double is done in double: a sum as two doubles, whose rounding error is exact (Knuth's
two-sum), then rounded to odd. A double that was rounded to odd rounds once more, to float32 or less, as the exact value
would (Boldo and Melquiond 2008): 53 bits are at least two more than twice 24.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Type:
    """A PTX type: ``dtype`` is what a lane's value is computed in; ``parts`` > 1 for f16x2 and the like."""

    name: str
    kind: str  # s, u, b, f, p
    bits: int
    dtype: np.dtype
    parts: int = 1

    @property
    def bytes(self) -> int:
        return self.bits // 8

    @property
    def storage(self) -> np.dtype:
        return np.dtype(bool) if self.kind == "p" else np.dtype(f"u{self.bytes}")


def _types() -> dict[str, Type]:
    types = [Type("pred", "p", 1, np.dtype(bool))]
    for bits in (8, 16, 32, 64):
        types += [Type(f"{kind}{bits}", kind, bits, np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}"))
                  for kind in "sub"]  # fmt: skip
    types += [Type(f"f{bits}", "f", bits, np.dtype(f"f{bits // 8}")) for bits in (16, 32, 64)]
    types += [Type("bf16", "f", 16, np.dtype("u2"))]
    types += [Type("f16x2", "f", 32, np.dtype("u4"), 2), Type("bf16x2", "f", 32, np.dtype("u4"), 2)]
    types += [Type("f32x2", "f", 64, np.dtype("u8"), 2)]
    return {type_.name: type_ for type_ in types}


TYPES = _types()
PART = {"f16x2": TYPES["f16"], "bf16x2": TYPES["bf16"], "f32x2": TYPES["f32"]}


def widened(bits: Array, type_: Type) -> Array:
    """Raw bits of a floating type (not packed) -> float64."""
    if type_.name == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view(type_.dtype).astype(np.float64)


def to_odd(total: Array, error: Array) -> Array:
    """``total + error``, the error below half a unit of the double ``total``, rounded to odd."""
    inexact = (error != 0) & np.isfinite(total) & (total.view(np.uint64) & np.uint64(1) == 0)
    return np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def add_to_odd(a: Array, b: Array) -> Array:
    """The sum of two doubles rounded to odd."""
    total = np.asarray(a + b)
    from_b = total - a
    return to_odd(total, np.asarray((a - (total - from_b)) + (b - from_b)))


def narrowed(x: Array, type_: Type, rounding: str = "rn") -> Array:
    """Doubles, exact or rounded to odd -> raw bits of a floating type (not packed), rounded once."""
    x = np.asarray(x)
    if type_.name == "bf16":
        return _to_bfloat16(_rounded(x, np.float32, "odd"), rounding)
    return _rounded(x, type_.dtype, rounding).view(type_.storage)


def _rounded(x: Array, dtype: np.dtype, rounding: str) -> Array:
    nearest = x.astype(dtype)
    if rounding == "rn" or dtype == np.float64:
        return nearest
    back = nearest.astype(np.float64)
    infinity = dtype.type(np.inf) if isinstance(dtype, np.dtype) else dtype(np.inf)
    above, below = back > x, back < x
    if rounding in ("rz", "odd"):
        result = np.where((above & (x > 0)) | (below & (x < 0)), np.nextafter(nearest, dtype_zero(nearest)), nearest)
        if rounding == "odd":
            inexact = np.isfinite(x) & (result.astype(np.float64) != x)
            result = (result.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)
        return result
    if rounding == "rm":
        return np.where(above, np.nextafter(nearest, -infinity), nearest)
    if rounding == "rp":
        return np.where(below, np.nextafter(nearest, infinity), nearest)
    raise ValueError(f"unknown rounding {rounding}")


def dtype_zero(x: Array) -> np.generic:
    """Zero of the same type, so that numpy does not widen."""
    return x.dtype.type(0)


def _to_bfloat16(x: Array, rounding: str) -> Array:
    """float32 rounded to odd -> bits of bfloat16."""
    bits = x.view(np.uint32)
    low, negative = bits & np.uint32(0xFFFF), bits >> np.uint32(31) != 0
    if rounding == "rn":
        up = (low > 0x8000) | ((low == 0x8000) & (bits >> np.uint32(16) & np.uint32(1) != 0))
    elif rounding == "rz":
        up = np.zeros(bits.shape, bool)
    else:
        up = (low != 0) & (negative if rounding == "rm" else ~negative)
    up &= np.isfinite(x)
    return np.where(np.isnan(x), 0x7FFF, (bits >> np.uint32(16)) + up).astype(np.uint16)


def flushed(x: Array) -> Array:
    """Subnormal float32 to zero of the same sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def high_product(a: Array, b: Array) -> Array:
    """Upper half of the product of two integers of the same type."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    x0, x1, y0, y1 = x & mask, x >> half, y & mask, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + (x0 * y1 + (middle & mask) >> half)
    if a.dtype.kind == "i":  # two's complement: a negative factor counts 2^64 too much
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)
