"""``metaplastic_adam_`` on CUDA: moments, consolidation, hidden weight and fresh sign bits in one pass over memory.

::

    g   = grad + weight_decay * W
    mu  = beta1 mu + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2        mu = 0 if |mu| < 2^-126
    mu' = mu (1 - tanh^2(m |W|))  if the step would shrink |W|, that is W mu > 0;  else mu
    W  -= step_size * mu' / (sqrt(v) + eps),   step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t)
    W   = weight_bound if W > weight_bound, -weight_bound if W < -weight_bound;  infinity bounds nothing

Where g is not finite, W, mu and v stay as they are; where the new W would be a NaN, W does. Either is reported. ::

    weight                [N, K] float32 or bfloat16
    grad                  [N, K] float32 or like the weight
    exp_avg, exp_avg_sq   [N, K] float32, bfloat16, or int8 and uint8 with scales [N, ceil(K / 64)]
    sign_bits             [N, 2 ceil(K / 128)] int64 or None; written as 32-bit halves, the low one first

Formats and their rounding are those of ``csrc/core/compact.h``; the weight is clipped before it is rounded.

1 - tanh^2(z) = 4 t / (1 + t)^2 with t = e^{-2z}. Operation by operation this is ``csrc/cpu/metaplastic_adam.cpp``, and
so is every bit of the result: single IEEE operations, no contraction to fused multiply-add, root and quotient rounded
correctly.

Tile: 4 rows x 128 units, a packed row of 128 bits, so that padding words come out as 0 by themselves. A warp takes a
row, a thread a quad of 4 units: 128 bits of float32, whole sectors for a warp in every format, and four draws or two
that nobody else needs. What belongs to a word or a block of scales is reduced by shuffles and held by every quad of
it. Nothing needs shared memory or a barrier. Where 4 does not divide K, elements are read and written one by one.

Bound by memory: 28 bytes and one bit a weight for float32, 16 with 8-bit moments, 10 where the weight is bfloat16 too;
against about 110, 170 and 180 instructions a weight, root and quotient among them 28. So 8-bit moments are bound by
instructions where a device has fewer of them for a byte: it is about 6 on an H200, 9 on an H100, 10 on an A100.
"""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl
from torch import Tensor

_UNITS = tl.constexpr(128)
_QUADS = tl.constexpr(_UNITS // 4)
_BLOCK_QUADS = tl.constexpr(64 // 4)  # with one scale
_HALF_WORD_QUADS = tl.constexpr(32 // 4)

_DROPPED = tl.constexpr(20)  # bits of a float below the three of mantissa that a moment in 8 bits keeps
_FIRST_ZERO, _FIRST_BITS = tl.constexpr(2.0**-15), tl.constexpr(112 << 23)
_SECOND_ZERO, _SECOND_BITS = tl.constexpr(2.0**-31), tl.constexpr(96 << 23)
_NOISE_SHIFT = tl.constexpr(_DROPPED.value - 16)
_NOISE_MIDDLE = tl.constexpr(1 << (_DROPPED.value - 17))
# carry into the exponent the bits of what is above the largest code
_FIRST_CARRY, _SECOND_CARRY = tl.constexpr((1 << 20) + (1 << 8) - 1), tl.constexpr((1 << 20) - 1)
_EXPONENT = tl.constexpr(0x7F800000)  # the bits of a float's exponent, all 1 where it is not finite
_LEAST_NORMAL = tl.constexpr(2.0**-126)
_LARGEST_SCALE = tl.constexpr(253 << 23)
_SCALE_AND_RECIPROCAL = tl.constexpr(254 << 23)  # the bits of a power of two and of its reciprocal add up to this

NUM_WARPS = 4
ROWS = NUM_WARPS  # of a tile: one a warp
_LOG2_E = 1.44269504


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(x):
    """2^x for x <= 0; below -125 it is 2^-125."""
    x = tl.maximum(x, -125.0)
    shifted = x + 12582912.0  # 1.5 * 2^23: the low bits are the nearest integer
    f = x - (shifted - 12582912.0)
    f2 = f * f
    low = 1.0 + f * 0.693146862
    middle = 0.240222379 + f * 0.0555089302
    high = 0.00967169809 + f * 0.00132186932
    p = low + f2 * (middle + f2 * high)
    return _float(_bits(p) + (_bits(shifted) << 23))


@triton.jit
def _load(source, at, mask):
    """Floats of either format."""
    if source.dtype.element_ty == tl.bfloat16:
        halves = tl.load(source.to(tl.pointer_type(tl.uint16), bitcast=True) + at, mask, other=0)
        return _float(halves.to(tl.uint32) << 16)
    else:
        return tl.load(source + at, mask, other=0.0)


@triton.jit
def _store_bfloat16(target, at, mask, x, random16):
    """Rounds stochastically. Returns what is held from now on, as floats."""
    held = (_bits(x) + random16) >> 16
    tl.store(target.to(tl.pointer_type(tl.uint16), bitcast=True) + at, held.to(tl.uint16), mask)
    return _float(held << 16)


@triton.jit
def _groups_of_quads(x, SIZE: tl.constexpr):
    return tl.reshape(x, (x.shape[0], _QUADS // SIZE, SIZE))


@triton.jit
def _by_quad(x, SIZE: tl.constexpr):
    """Of a number for every group, one for every quad."""
    spread = tl.broadcast_to(x[:, :, None], (x.shape[0], _QUADS // SIZE, SIZE))
    return tl.reshape(spread, (x.shape[0], _QUADS))


@triton.jit
def _block_scale(x, CARRY: tl.constexpr):
    """Bits of the scale, a power of two, of every quad's block."""
    largest = tl.max((_bits(x) & 0x7FFFFFFF).to(tl.int32), axis=2)
    largest = tl.max(_groups_of_quads(largest, _BLOCK_QUADS), axis=2)
    return _by_quad(tl.minimum((largest + CARRY) & _EXPONENT, _LARGEST_SCALE), _BLOCK_QUADS)


@triton.jit
def _reciprocal(scale_bits):
    return _float(tl.where(scale_bits == 0, 0, _SCALE_AND_RECIPROCAL - scale_bits))[:, :, None]


@triton.jit
def _from_first_moment(code, scale):
    code = code.to(tl.int32)
    magnitude = _float((tl.abs(code) << _DROPPED) + _FIRST_BITS) - _FIRST_ZERO
    return tl.where(code < 0, -magnitude, magnitude) * scale


@triton.jit
def _to_first_moment(x, reciprocal, noise):
    magnitude = tl.abs(x) * reciprocal + _FIRST_ZERO
    code = tl.minimum((_bits(magnitude) - _FIRST_BITS + noise) >> _DROPPED, 127).to(tl.int32)
    return tl.where(x < 0.0, -code, code).to(tl.int8)


@triton.jit
def _from_second_moment(code, scale):
    return (_float((code.to(tl.int32) << _DROPPED) + _SECOND_BITS) - _SECOND_ZERO) * scale


@triton.jit
def _to_second_moment(x, reciprocal, noise):
    code = (_bits(x * reciprocal + _SECOND_ZERO) - _SECOND_BITS + noise) >> _DROPPED
    return tl.minimum(tl.maximum(code, 1), 255).to(tl.uint8)


@triton.jit
def _mixed(x, key):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ key) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _draws(row, number, key0, key1, key2, key3):
    """32 random bits for every row [ROWS, 1] and number [1, ...] of a draw."""
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    start = _mixed(low + key0.to(tl.uint32), high + key1.to(tl.uint32))
    key = _mixed(low + key2.to(tl.uint32), high + key3.to(tl.uint32))
    return _mixed(start[:, :, None] + number.to(tl.uint32) * 0x9E3779B9, key[:, :, None])


@triton.jit(do_not_specialize=["nan_flag", "N", "K", "key0", "key1", "key2", "key3", "first_row"])
def metaplastic_adam_kernel(
    weight,
    grad,
    exp_avg,
    exp_avg_sq,
    exp_avg_scale,
    exp_avg_sq_scale,
    sign_bits,
    nan_flag: tl.int64,
    N: tl.int64,
    K: tl.int64,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    slope,
    step_size,
    weight_bound,
    key0: tl.int64,
    key1: tl.int64,
    key2: tl.int64,
    key3: tl.int64,
    first_row: tl.int64,
    ROWS: tl.constexpr,
    K_FACTOR: tl.constexpr,
):
    """Updates a tile. Tensors are [ROWS, QUADS, 4], or [ROWS, QUADS] where a quad has one number.

    ``nan_flag`` is the address of an int32 that becomes 1 if a weight could not be updated; ``slope`` is
    -2 log2(e) m; ``K_FACTOR`` divides K.
    """
    COMPACT_WEIGHT: tl.constexpr = weight.dtype.element_ty == tl.bfloat16
    SCALED: tl.constexpr = exp_avg_scale is not None
    COMPACT_MOMENTS: tl.constexpr = exp_avg.dtype.element_ty == tl.bfloat16

    k = (K // K_FACTOR).to(tl.uint32) * K_FACTOR  # tells the compiler how rows are aligned
    tiles = (k - 1) // _UNITS + 1
    tile = tl.program_id(0).to(tl.uint32) % tiles
    tile_row = (tl.program_id(0).to(tl.uint32) // tiles).to(tl.int64) * ROWS
    row = (tile_row + tl.arange(0, ROWS))[:, None]
    quad = tl.arange(0, _QUADS)[None, :]
    unit = (tile * _UNITS + quad * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    in_rows = row < N
    mask = in_rows[:, :, None] & (unit < k)
    at = row[:, :, None] * k + unit

    w = _load(weight, at, mask)
    g = _load(grad, at, mask)
    if SCALED:
        blocks = (k - 1) // 64 + 1
        block = tile * (_UNITS // 64) + quad // _BLOCK_QUADS
        in_blocks = in_rows & (block < blocks)
        scale_at = row * blocks + block
        first_scale = tl.load(exp_avg_scale + scale_at, in_blocks, other=0.0)[:, :, None]
        second_scale = tl.load(exp_avg_sq_scale + scale_at, in_blocks, other=0.0)[:, :, None]
        mu = _from_first_moment(tl.load(exp_avg + at, mask, other=0), first_scale)
        v = _from_second_moment(tl.load(exp_avg_sq + at, mask, other=0), second_scale)
    else:
        mu = _load(exp_avg, at, mask)
        v = _load(exp_avg_sq, at, mask)

    g = g + weight_decay * w
    finite = (_bits(g) & _EXPONENT) != _EXPONENT
    next_mu = beta1 * mu + one_minus_beta1 * g
    mu = tl.where(finite, tl.where(tl.abs(next_mu) < _LEAST_NORMAL, 0.0, next_mu), mu)
    v = tl.where(finite, beta2 * v + one_minus_beta2 * (g * g), v)
    # Same signs: the step would shrink |W|. Otherwise t = 1, and the factor 4 t / (1 + t)^2 is exactly 1, as it is
    # where the weight is 0.
    opposed = (_bits(w) ^ _bits(mu)) < 0x80000000
    t = _power_of_two(tl.where(opposed, slope * tl.abs(w), 0.0))
    root = tl.where(finite, tl.sqrt_rn(v) + eps, float("nan"))  # NaN: no step
    stepped = w - step_size * tl.div_rn(mu * (4.0 * t), root * ((1.0 + t) * (1.0 + t)))
    failed = tl.max(((stepped != stepped) & mask).to(tl.int32), axis=2)
    tl.store(nan_flag.to(tl.pointer_type(tl.int32)) + tl.zeros_like(failed), 1, failed != 0)
    w = tl.where(stepped == stepped, stepped, w)
    w = tl.where(w > weight_bound, weight_bound, w)
    w = tl.where(w < -weight_bound, -weight_bound, w)

    if COMPACT_WEIGHT:
        draws = _draws(first_row + row, unit, key0, key1, key2, key3)
        random16 = draws & 0xFFFF
        # as held: rounding may have made a small negative weight -0, whose sign is +1
        w = _store_bfloat16(weight, at, mask, w, draws >> 16)
    else:
        tl.store(weight + at, w, mask)
        if COMPACT_MOMENTS or SCALED:
            pair = (tile * (_UNITS // 2) + quad * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
            draws = _draws(first_row + row, pair, key0, key1, key2, key3)
            random16 = tl.reshape(tl.join(draws & 0xFFFF, draws >> 16), (ROWS, _QUADS, 4))
    if COMPACT_MOMENTS:
        _store_bfloat16(exp_avg, at, mask, mu, random16)
        _store_bfloat16(exp_avg_sq, at, mask, v, random16)
    elif SCALED:
        noise = (random16 << _NOISE_SHIFT) + _NOISE_MIDDLE
        first_bits = _block_scale(mu, _FIRST_CARRY)
        second_bits = _block_scale(v, _SECOND_CARRY)
        tl.store(exp_avg + at, _to_first_moment(mu, _reciprocal(first_bits), noise), mask)
        tl.store(exp_avg_sq + at, _to_second_moment(v, _reciprocal(second_bits), noise), mask)
        one_per_block = in_blocks & (quad % _BLOCK_QUADS == 0)
        tl.store(exp_avg_scale + scale_at, _float(first_bits), one_per_block)
        tl.store(exp_avg_sq_scale + scale_at, _float(second_bits), one_per_block)
    else:
        tl.store(exp_avg + at, mu, mask)
        tl.store(exp_avg_sq + at, v, mask)

    if sign_bits is not None:
        four_bits = tl.sum(((w >= 0.0) & mask).to(tl.int32) << tl.arange(0, 4)[None, None, :], axis=2)
        in_place = four_bits << (quad % _HALF_WORD_QUADS * 4)
        half_words = _by_quad(tl.sum(_groups_of_quads(in_place, _HALF_WORD_QUADS), axis=2), _HALF_WORD_QUADS)
        half_words_at = (row * tiles + tile) * (_UNITS // 32) + quad // _HALF_WORD_QUADS
        one_per_half_word = in_rows & (quad % _HALF_WORD_QUADS == 0)
        tl.store(sign_bits.to(tl.pointer_type(tl.int32), bitcast=True) + half_words_at, half_words, one_per_half_word)


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def launch(
    weight: Tensor,
    grad: Tensor,
    state: tuple[Tensor | None, ...],
    numbers: list[float],
    first_row: int,
    nan_flag: int,
) -> None:
    """Runs the kernel on contiguous tensors that have been checked.

    ``state`` is what the kernel takes between ``grad`` and ``nan_flag``, the address of an int32; ``numbers`` are what
    the operator's check returns.
    """
    n, k = weight.shape
    programs = triton.cdiv(n, ROWS) * triton.cdiv(k, _UNITS.value)
    if programs == 0:
        return
    *of_moments, metaplasticity, step_size, weight_bound, key0, key1, key2, key3 = numbers
    slope = _float32(-2 * _float32(_LOG2_E) * metaplasticity)
    metaplastic_adam_kernel[(programs,)](
        weight,
        grad,
        *state,
        nan_flag,
        n,
        k,
        *of_moments,
        slope,
        step_size,
        weight_bound,
        int(key0),
        int(key1),
        int(key2),
        int(key3),
        first_row,
        ROWS=ROWS,
        K_FACTOR=4 if k % 4 == 0 else 1,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
