"""The operators, bit-packed: thin functions over ``torch.ops.engram_kernels``.

Names and arguments are those of :mod:`engram_kernels.reference`, which defines what each computes. ``bits`` are int64
words, 64 units each, rows padded to a multiple of 128 units (``csrc/core/bits.h``). Float arguments may be float32,
bfloat16 or float16; results come in the dtype of the float argument. Products of real numbers with signs are summed in
float32: an infinite argument gives infinity or NaN, never a finite number.
Every function raises RuntimeError that names the argument, what it needs and what it got. On CUDA, whose calls return
before they have run, a NaN is reported by a later call, or by :func:`check_numbers`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from . import batching, fakes, library, reference, triton_kernels, unfolding  # noqa: F401  most register what torch asks
from .library import operators
from .reference import Window

_P = ParamSpec("_P")

__all__ = [
    "available_isas",
    "binary_conv2d",
    "binary_matmul",
    "binary_threshold",
    "build_info",
    "check_numbers",
    "draw_seed",
    "gated_conv2d_weight_grad",
    "gated_input_grad",
    "gated_metaplastic_adam_",
    "gated_weight_grad",
    "interleave_bits",
    "isa",
    "masked_conv2d_input_grad",
    "masked_input_grad",
    "metaplastic_adam_",
    "pack_signs",
    "pack_window",
    "packed_network",
    "patch_excitability",
    "real_metaplastic_adam_",
    "real_weight_grad",
    "sample_engram",
    "set_isa",
    "sign_matmul",
    "sign_matmul_t",
    "standardise",
    "standardise_grad",
    "top_units",
    "transpose_bits",
    "unfold_bits",
    "unpack_signs",
    "value_signs",
]


def __dir__() -> list[str]:
    return __all__


# ---- instruction sets


def isa() -> str:
    """Instruction set of the CPU kernels in use: "avx512", "avx2", "neon" or "scalar".

    >>> ek.ops.isa() in ("avx512", "avx2", "neon", "scalar")
    True
    """
    return operators._isa()


def available_isas() -> list[str]:
    """Instruction sets that this build has and this machine can run, best first.

    >>> ek.ops.available_isas()[-1]
    'scalar'
    """
    return operators._available_isas().split(",")


def set_isa(name: str) -> None:
    """Uses another instruction set from now on, in all threads; ``ENGRAM_ISA`` does so from the start.

    Raises: RuntimeError if ``name`` is not in :func:`available_isas`.

    >>> ek.ops.set_isa(ek.ops.isa())
    """
    operators._set_isa(name)


if os.environ.get("ENGRAM_ISA"):
    try:
        set_isa(os.environ["ENGRAM_ISA"])
    except RuntimeError as error:
        raise ImportError(f"environment variable ENGRAM_ISA: {str(error).splitlines()[0]}") from None


def build_info() -> dict[str, str]:
    """How the loaded library was built: its ``file`` name, the CPU ``isas`` usable here, ``cuda`` kernels yes or no.

    >>> sorted(ek.ops.build_info())
    ['cuda', 'file', 'isas']
    """
    return {
        "file": library.FILE.name,
        "isas": ",".join(available_isas()),
        "cuda": "yes" if operators._has_cuda() else "no",
    }


# ---- operators


def pack_signs(x: Tensor) -> Tensor:
    """Signs of ``x``, sign(0) = +1. Floats (..., K) -> bits (..., words). NaN is an error.

    >>> ek.ops.pack_signs(torch.tensor([0.5, -2.0, 0.0])).tolist()  # 1 + 4, and a word of padding
    [5, 0]
    """
    return operators.pack_signs(x)


def pack_window(x: Tensor, width: float = 1.0, gate_bits: Tensor | None = None) -> Tensor:
    """Straight-through window ``1{|x| <= width} * gate``. Floats (M, K) -> bits (M, words).

    >>> ek.ops.pack_window(torch.tensor([[0.5, -2.0, -1.0]])).tolist()
    [[5, 0]]
    """
    return operators.pack_window(x, width, gate_bits)


def unpack_signs(bits: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bits (..., words) -> (..., K) of +1 and -1 in ``dtype`` (float32/64, bfloat16, float16, int8, int32).

    >>> ek.ops.unpack_signs(torch.tensor([5, 0]), 3).tolist()
    [1.0, -1.0, 1.0]
    """
    return operators.unpack_signs(bits, k, dtype)


def transpose_bits(bits: Tensor, k: int) -> Tensor:
    """Bits of samples (M, words of K) -> bits of units (K, words of M). On the CPU alone.

    >>> bits = ek.ops.pack_signs(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    >>> ek.ops.unpack_signs(ek.ops.transpose_bits(bits, 2), 2).tolist()
    [[1.0, 1.0], [-1.0, 1.0]]
    """
    return operators.transpose_bits(bits, k)


def binary_matmul(x_bits: Tensor, w_bits: Tensor, k: int, gate_bits: Tensor | None = None) -> Tensor:
    """Gated product of sign matrices, exact: ``y[m,n] = sum_k g[m,k] s(x[m,k]) s(W[n,k])``.

    Shapes: ``x_bits`` (M, words), ``w_bits`` (N, words), ``gate_bits`` (words,) shared or (M, words) -> int32 (M, N).
    Padding bits do not count.

    >>> x, w = torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    >>> ek.ops.binary_matmul(ek.ops.pack_signs(x), ek.ops.pack_signs(w), 3).tolist()
    [[1]]
    """
    return operators.binary_matmul(x_bits, w_bits, k, gate_bits)


def binary_threshold(
    x_bits: Tensor, w_bits: Tensor, k: int, threshold: Tensor, flip: Tensor, gate_bits: Tensor | None = None
) -> Tensor:
    """Sign bits of the next layer: ``1{(y[m,n] >= threshold[n]) != flip[n]}``, y as in :func:`binary_matmul`.

    Shapes: as :func:`binary_matmul`, ``threshold`` int32 (N,), ``flip`` bool (N,) -> bits (M, words of N). For
    inference: BatchNorm and the sign after it are one such threshold per unit, flipped where BatchNorm's factor is
    negative.

    >>> x = w = ek.ops.pack_signs(torch.ones(1, 3))
    >>> ek.ops.binary_threshold(x, w, 3, torch.tensor([2], dtype=torch.int32), torch.tensor([False])).tolist()  # 3 >= 2
    [[1, 0]]
    """
    return operators.binary_threshold(x_bits, w_bits, k, threshold, flip, gate_bits)


def patch_excitability(images: Tensor, filters: Tensor, units: Tensor, floor: float, pool: int = 3) -> Tensor:
    """How much random filters respond near their places: correlations with patches, by the contrast of the patch.

    ``z[m,n] = max over pool x pool places of sum_ij w[f,i,j] x[m,r+i,c+j,channel] / (sqrt(sum (x - mean)^2) + floor)``

    On the CPU alone. Shapes: ``images`` uint8 (M, height, width, channels), ``filters`` int8 (F, size, size) of -1, 0
    and 1, up to 128 x 128, ``units`` rising int64 (N,) -> float32 (M, N). The number of a unit, whose place is the
    first row r and column c of its pool, is ``((r * columns + c) * channels + channel) * F + f``, with
    ``height - size - pool + 2`` rows and columns likewise. Local receptive fields with random shared filters and
    pooling: Jarrett et al. 2009.

    >>> image = torch.zeros(1, 4, 4, 1, dtype=torch.uint8)
    >>> image[0, :3, 1] = 200  # an upright stroke, with an end below
    >>> upright, level = [[1, -1], [1, -1]], [[1, 1], [-1, -1]]
    >>> filters = torch.tensor([upright, level], dtype=torch.int8)
    >>> z = ek.ops.patch_excitability(image, filters, torch.tensor([0, 1]), 1.0)
    >>> [round(value, 2) for value in z[0].tolist()]
    [1.99, 1.15]
    """
    return operators.patch_excitability(images, filters, units, floor, pool)


def sign_matmul(a: Tensor, w_bits: Tensor, k: int) -> Tensor:
    """``y = a @ s(W)``. Floats (M, N), bits (N, words) -> (M, K). Differentiable in ``a``.

    >>> w_bits = ek.ops.pack_signs(torch.tensor([[1.0, -1.0, 1.0]]))
    >>> ek.ops.sign_matmul(torch.tensor([[0.5]]), w_bits, 3).tolist()
    [[0.5, -0.5, 0.5]]
    """
    return operators.sign_matmul(a, w_bits, k)


def sign_matmul_t(x: Tensor, w_bits: Tensor, k: int, w_groups: Tensor | None = None) -> Tensor:
    """``y = x @ s(W).T``: the real-valued first layer.

    Floats (M, K), bits (N, words) -> (M, N). Differentiable in ``x``. uint8 (M, K), as images come -> int32, exact, for
    K up to 8 421 504. ``w_groups``, what :func:`engram_kernels.reference.group_signs` makes of signs that stay, makes
    that faster on the CPU.

    >>> w_bits = ek.ops.pack_signs(torch.tensor([[1.0, -1.0, 1.0]]))
    >>> ek.ops.sign_matmul_t(torch.tensor([[0.5, 2.0, 4.0]]), w_bits, 3).tolist()
    [[2.5]]
    """
    return operators.sign_matmul_t(x, w_bits, k, w_groups)


def value_signs(y: Tensor, threshold: Tensor | None = None, flip: Tensor | None = None) -> Tensor:
    """Signs of integers by a threshold a unit, ``(y >= threshold) != flip``, or by the mean, ``y[m] >= mean of y[m]``.

    Shapes: int32 (M, N), int32 (N,), bool (N,) -> bits (M, words of N).

    >>> y = torch.tensor([[1, 2, 3]], dtype=torch.int32)
    >>> ek.ops.value_signs(y).tolist()  # 2 >= 2 and 3 >= 2
    [[6, 0]]
    """
    return operators.value_signs(y, threshold, flip)


def top_units(y: Tensor, count: int) -> Tensor:
    """The ``count`` units of largest y, equal ones by the lower number first. int32 (M, K) -> gate bits (M, words).

    >>> ek.ops.top_units(torch.tensor([[1, 3, 2, 3]], dtype=torch.int32), 1).tolist()
    [[2, 0]]
    """
    return operators.top_units(y, count)


def standardise(y: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """``z = (y - mean) / sqrt(variance + eps)`` of each row, and what :func:`standardise_grad` needs of it.

    Floats (M, N) -> z (M, N) in the dtype of y, and the mean and the reciprocal deviation, float64 (M, 2). The same
    bits on every processor. The sign of z is that of ``N y - sum(y)``, ties included.

    >>> z, moments = ek.ops.standardise(torch.tensor([[1.0, 2.0, 2.0, 3.0]]))
    >>> z.sign().tolist(), moments[0, 0].item()
    ([[-1.0, 0.0, 0.0, 1.0]], 2.0)
    """
    return operators.standardise(y, eps)


def standardise_grad(d: Tensor, y: Tensor, moments: Tensor) -> Tensor:
    """Gradient of y through :func:`standardise`: ``(d - mean(d) - z mean(d z)) / sqrt(variance + eps)``.

    Shapes: d (M, N), y (M, N), moments (M, 2) as :func:`standardise` gives them -> (M, N) in the dtype of y. The same
    bits on every processor.

    >>> y = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    >>> ek.ops.standardise_grad(torch.ones(1, 4), y, ek.ops.standardise(y)[1]).tolist()  # a shift changes nothing
    [[0.0, 0.0, 0.0, 0.0]]
    """
    return operators.standardise_grad(d, y, moments)


def packed_network(
    x: Tensor, gate_bits: Tensor | None, layout: list[int], factors: list[float], tensors: list[Tensor]
) -> Tensor:
    """The layers of a packed network from a product on, in one call. On the CPU.

    uint8 (M, K) or bits (M, words) with their gate -> float32 (M, N), or the gate that the last stage chooses, bits
    (M, words). ``layout``, ``factors`` and ``tensors`` say what the stages are:
    :func:`engram_kernels.reference.packed_network`. :class:`engram_kernels.PackedModel` makes them.

    >>> w_bits = ek.ops.pack_signs(torch.tensor([[1.0, -1.0, 1.0]]))
    >>> x = torch.tensor([[1, 2, 4]], dtype=torch.uint8)
    >>> groups = ek.reference.group_signs(w_bits, 3)
    >>> ek.ops.packed_network(x, None, [0, 3, 1], [], [w_bits, groups]).tolist()
    [[3.0]]
    """
    return operators.packed_network(x, gate_bits, layout, factors, tensors)


def gated_input_grad(d: Tensor, w_bits: Tensor, x: Tensor, gate_bits: Tensor | None = None) -> Tensor:
    """Straight-through gradient of the input: ``dx = gate * 1{|x| <= 1} * (d @ s(W))``.

    Shapes: ``d`` (M, N), ``w_bits`` (N, words), ``x`` (M, K), gate as in :func:`binary_matmul` -> (M, K).
    Cost is proportional to the units that take part.

    >>> w_bits, x = ek.ops.pack_signs(torch.tensor([[1.0, -1.0, 1.0]])), torch.tensor([[0.5, -0.5, 2.0]])
    >>> ek.ops.gated_input_grad(torch.tensor([[3.0]]), w_bits, x).tolist()
    [[3.0, -3.0, 0.0]]
    """
    return operators.gated_input_grad(d, w_bits, x, gate_bits)


def masked_input_grad(d: Tensor, w_bits: Tensor, k: int, mask_bits: Tensor) -> Tensor:
    """:func:`gated_input_grad` where gate and window are already one mask, as :func:`pack_window` makes it.

    >>> w_bits, mask_bits = ek.ops.pack_signs(torch.tensor([[1.0, -1.0, 1.0]])), torch.tensor([[3, 0]])
    >>> ek.ops.masked_input_grad(torch.tensor([[3.0]]), w_bits, 3, mask_bits).tolist()
    [[3.0, -3.0, 0.0]]
    """
    return operators.masked_input_grad(d, w_bits, k, mask_bits)


def gated_weight_grad(d: Tensor, x_bits: Tensor, k: int, gate_bits: Tensor | None = None) -> Tensor:
    """Gradient of the hidden weight: ``dW[n,k] = sum_m d[m,n] g[m,k] s(x[m,k])``.

    Shapes: ``d`` (M, N), ``x_bits`` (M, words), gate as in :func:`binary_matmul` -> (N, K).
    Cost is proportional to the recruited units.

    >>> x_bits, gate_bits = ek.ops.pack_signs(torch.tensor([[1.0, -1.0, 1.0]])), torch.tensor([[3, 0]])
    >>> ek.ops.gated_weight_grad(torch.tensor([[3.0]]), x_bits, 3, gate_bits).tolist()
    [[3.0, -3.0, 0.0]]
    """
    return operators.gated_weight_grad(d, x_bits, k, gate_bits)


def real_weight_grad(d: Tensor, x: Tensor) -> Tensor:
    """Gradient of the hidden weight of a layer with a real-valued input: ``dW[n,k] = sum_m d[m,n] x[m,k]``.

    Shapes: ``d`` (M, N), ``x`` (M, K) of the same dtype, float32, bfloat16 or float16 -> (N, K) in that dtype. On CUDA
    torch's own product.

    >>> ek.ops.real_weight_grad(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0, 0.5], [2.0, 0.0]])).tolist()
    [[5.0, 1.5]]
    """
    return operators.real_weight_grad(d, x)


def unfold_bits(bits: Tensor, window: Window, group: int = 0) -> Tensor:
    """The taps of every output pixel of a convolution, 0 in the padding: its products become those of matrices.

    Bits (B, words of units) -> (B * out_height * out_width, words of K), for the channels of one group. ``window`` as
    in :class:`engram_kernels.reference.Window`.

    >>> bits = ek.ops.pack_signs(torch.tensor([[1.0, -1.0, 1.0]]))  # three pixels of one channel in a row
    >>> window = ek.reference.Window(height=1, width=3, channels=1, kernel_h=1, kernel_w=2)
    >>> ek.ops.unfold_bits(bits, window)[:, 0].tolist()  # + -, then - +
    [1, 2]
    """
    return operators.unfold_bits(bits, window, group)


def interleave_bits(bits: Tensor, rows: int, k: int) -> Tensor:
    """Rows of a sample, taken in turn: images whose channels come first as those whose channels come last.

    Bits (B * rows, words of k) -> (B, words of rows * k): unit ``i * rows + r`` is unit i of row r. On the CPU alone.

    >>> bits = ek.ops.pack_signs(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))
    >>> ek.ops.interleave_bits(bits, 2, 2).tolist()  # + - + +
    [[13, 0]]
    """
    return operators.interleave_bits(bits, rows, k)


def binary_conv2d(
    x_bits: Tensor, w_bits: Tensor, window: Window, gate_bits: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Gated convolution of signs, ``y = scale conv2d(g s(x), s(W))``; padding counts nothing.

    Shapes: ``x_bits`` (B, words of units), ``w_bits`` (O, words of K), ``gate_bits`` (words of units,) shared or like
    ``x_bits`` -> float32 (B, out_height, out_width, O). Sums are exact integers before ``scale``, below 2^24 after it
    too.

    >>> x, w = torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    >>> window = ek.reference.Window(height=1, width=3, channels=1, kernel_h=1, kernel_w=2, right=1)
    >>> ek.ops.binary_conv2d(ek.ops.pack_signs(x), ek.ops.pack_signs(w), window).flatten().tolist()
    [0.0, 0.0, 1.0]
    """
    return operators.binary_conv2d(x_bits, w_bits, window, gate_bits, scale)


def masked_conv2d_input_grad(
    d: Tensor, w_bits: Tensor, window: Window, mask_bits: Tensor, scale: float = 1.0
) -> Tensor:
    """Gradient of the input of :func:`binary_conv2d`, times a mask as :func:`pack_window` makes it.

    Shapes: ``d`` (B, out_height, out_width, O), ``w_bits`` (O, words of K), ``mask_bits`` (words of units,) or
    (B, words of units) -> (B, height, width, channels).

    >>> window = ek.reference.Window(height=1, width=3, channels=1, kernel_h=1, kernel_w=2)
    >>> w_bits, mask_bits = ek.ops.pack_signs(torch.tensor([[1.0, -1.0]])), torch.tensor([[3, 0]])
    >>> ek.ops.masked_conv2d_input_grad(torch.tensor([2.0, 3.0]).view(1, 1, 2, 1), w_bits, window, mask_bits).flatten()
    tensor([2., 1., 0.])
    """
    return operators.masked_conv2d_input_grad(d, w_bits, window, mask_bits, scale)


def gated_conv2d_weight_grad(
    d: Tensor, x_bits: Tensor, window: Window, gate_bits: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Gradient of the filters of :func:`binary_conv2d`.

    Shapes: ``d`` (B, out_height, out_width, O), ``x_bits`` and ``gate_bits`` as there -> (O, K).

    >>> x_bits = ek.ops.pack_signs(torch.tensor([[1.0, -1.0, 1.0]]))
    >>> window = ek.reference.Window(height=1, width=3, channels=1, kernel_h=1, kernel_w=2)
    >>> ek.ops.gated_conv2d_weight_grad(torch.tensor([2.0, 3.0]).view(1, 1, 2, 1), x_bits, window).tolist()
    [[-1.0, 1.0]]
    """
    return operators.gated_conv2d_weight_grad(d, x_bits, window, gate_bits, scale)


def sample_engram(
    score: Tensor,
    seed: Tensor,
    rate: float,
    rule: str = "gumbel_top_k",
    temperature: float = 1.0,
    first_row: int = 0,
    row_step: int = 1,
) -> Tensor:
    """Recruits units: floats (M, K) -> gate bits (M, words). Rules in :func:`engram_kernels.reference.sample_engram`.

    ``seed`` is int64 (2,) on the CPU: the Philox key and an offset below 2^32; :func:`draw_seed` takes one from torch's
    generator. Sample m has the draws of row ``first_row + m row_step``, its number in the whole batch of a
    data-parallel step: a contiguous part of that batch has a ``first_row``, every W-th sample of it a ``row_step`` of
    W. The same seed gives the same engram on every device, for any thread count.

    >>> score = torch.tensor([[0.1, 2.0, -3.0, 0.7]])
    >>> ek.ops.sample_engram(score, ek.ops.draw_seed(), 0.5, temperature=0.0).tolist()  # units 1 and 3: 2 + 8
    [[10, 0]]
    """
    if rule not in ("gumbel_top_k", "bernoulli"):
        raise RuntimeError(f"rule: expected 'gumbel_top_k' or 'bernoulli', got {rule!r}")
    return operators.sample_engram(score, seed, rate, rule == "bernoulli", temperature, first_row, row_step)


def draw_seed() -> Tensor:
    """A seed for :func:`sample_engram` from torch's default CPU generator, so that ``torch.manual_seed`` governs it.

    Compiled graphs draw from that generator too, and so what the eager code draws.

    >>> ek.ops.draw_seed().shape
    torch.Size([2])
    """
    return operators.draw_seed()


def check_numbers() -> None:
    """Waits for all CUDA devices and reports a NaN that an operator met there.

    On CUDA a call returns before it has run, so that NaNs are reported by a later operator, like CUDA's own errors.
    Raises: RuntimeError naming the operator and its argument.

    >>> ek.ops.check_numbers()
    """
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
        operators._check_nan_flags()


def _note_update(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, sign_bits: Tensor | None, settings: dict[str, Any]
) -> None:
    """Has graphs that saved these tensors notice the change: the Stable ABI leaves version counters alone."""
    if not torch.compiler.is_compiling():
        scales = settings.get("exp_avg_scale"), settings.get("exp_avg_sq_scale")
        changed = weight, exp_avg, exp_avg_sq, sign_bits, *scales
        torch.autograd.graph.increment_version([t for t in changed if t is not None])


def _arguments_of(definition: Callable[_P, None]) -> Callable[[Callable[..., None]], Callable[_P, None]]:
    """Gives an operator the arguments of its definition, which alone states them."""

    def decorate(operator: Callable[..., None]) -> Callable[_P, None]:
        operator.__signature__ = inspect.signature(definition)  # type: ignore[attr-defined]
        return operator

    return decorate


@_arguments_of(reference.metaplastic_adam_)
def metaplastic_adam_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, sign_bits: Tensor | None, **settings: Any
) -> None:
    """One metaplastic Adam step in place, in a single pass over memory; writes fresh sign bits in the same pass.

    Shapes: all (N, K), ``sign_bits`` (N, words) or None. ``weight`` is float32 or bfloat16, ``grad`` float32 or like
    the weight, the moments float32, bfloat16, or int8 and uint8 with scales (N, ceil(K / 64)). ``step`` counts from 1;
    the weight is clipped to ``[-weight_bound, weight_bound]``, in float32 before it is rounded; ``seed`` as in
    :func:`sample_engram`, needed for everything that is not float32. Formula, formats and source, and ``settings`` with
    their defaults, in :func:`engram_kernels.reference.metaplastic_adam_`.

    >>> weight, mu, v = torch.tensor([[0.5, -0.5]]), torch.zeros(1, 2), torch.zeros(1, 2)
    >>> settings = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, metaplasticity=2.0, step=1)
    >>> ek.ops.metaplastic_adam_(weight, torch.ones(1, 2), mu, v, None, lr=0.1, **settings)
    >>> [round(w, 3) for w in weight[0].tolist()]  # |W| shrinks less than it grows
    [0.458, -0.6]
    """
    operators.metaplastic_adam_(weight, grad, exp_avg, exp_avg_sq, sign_bits, **settings)
    _note_update(weight, exp_avg, exp_avg_sq, sign_bits, settings)


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
    """:func:`metaplastic_adam_` with the gradient of :func:`gated_weight_grad`, made and consumed block by block.

    No (N, K) gradient ever exists. Shapes: ``d`` (M, N), ``x_bits`` (M, words), gate as in :func:`binary_matmul`;
    ``settings`` are the keyword arguments of :func:`metaplastic_adam_`. For float32 ``d`` the result is that of the two
    operators one after the other, bit for bit.

    >>> weight, mu, v = torch.tensor([[0.5, -0.5]]), torch.zeros(1, 2), torch.zeros(1, 2)
    >>> settings = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, metaplasticity=2.0, step=1)
    >>> x_bits = ek.ops.pack_signs(torch.ones(1, 2))
    >>> ek.ops.gated_metaplastic_adam_(torch.ones(1, 1), x_bits, None, weight, mu, v, None, lr=0.1, **settings)
    >>> [round(w, 3) for w in weight[0].tolist()]
    [0.458, -0.6]
    """
    operators.gated_metaplastic_adam_(d, x_bits, gate_bits, weight, exp_avg, exp_avg_sq, sign_bits, **settings)
    _note_update(weight, exp_avg, exp_avg_sq, sign_bits, settings)


def real_metaplastic_adam_(
    d: Tensor,
    x: Tensor,
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sign_bits: Tensor | None,
    **settings: Any,
) -> None:
    """:func:`metaplastic_adam_` with the gradient of :func:`real_weight_grad`, made and consumed block by block.

    No (N, K) gradient ever exists. Shapes: ``d`` (M, N) and ``x`` (M, K), floats; ``settings`` are the keyword
    arguments of :func:`metaplastic_adam_`. For float32 ``d`` and ``x`` the result on the CPU is that of the two
    operators one after the other, bit for bit.

    >>> weight, mu, v = torch.tensor([[0.5, -0.5]]), torch.zeros(1, 2), torch.zeros(1, 2)
    >>> settings = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, metaplasticity=2.0, step=1)
    >>> ek.ops.real_metaplastic_adam_(torch.ones(1, 1), torch.ones(1, 2), weight, mu, v, None, lr=0.1, **settings)
    >>> [round(w, 3) for w in weight[0].tolist()]
    [0.458, -0.6]
    """
    operators.real_metaplastic_adam_(d, x, weight, exp_avg, exp_avg_sq, sign_bits, **settings)
    _note_update(weight, exp_avg, exp_avg_sq, sign_bits, settings)


def _real_weight_grad_of_torch(d: Tensor, x: Tensor) -> Tensor:
    return d.T @ x


torch.library.impl("engram_kernels::real_weight_grad", "cuda", _real_weight_grad_of_torch)
torch.library.impl("engram_kernels::real_metaplastic_adam_", "cuda", triton_kernels.real_metaplastic_adam_)
torch.library.impl("engram_kernels::metaplastic_adam_", "cuda", triton_kernels.metaplastic_adam_)
torch.library.impl("engram_kernels::gated_metaplastic_adam_", "cuda", triton_kernels.gated_metaplastic_adam_)
for _name in ("value_signs", "top_units"):  # in CUDA's memory by torch's operators
    torch.library.impl(f"engram_kernels::{_name}", "cuda", getattr(reference, _name))
