"""The operators, bit-packed: thin functions over ``torch.ops.engram_kernels``, their fakes and gradients.

Names and arguments are those of :mod:`engram_kernels.reference`, which defines what each computes. ``bits`` are int64
words, 64 units each, rows padded to a multiple of 128 units (``csrc/core/bits.h``). Float arguments may be float32,
bfloat16 or float16; results come in the dtype of the float argument. Products of real numbers with signs are summed in
float32: an infinite argument gives infinity or NaN, never a finite number.
Every function raises RuntimeError that names the argument, what it needs and what it got. On CUDA, whose calls return
before they have run, a NaN is reported by a later call, or by :func:`check_numbers`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import triton_kernels
from .reference import SCALE_BLOCK, words_for

_library = Path(__file__).parent / "_C.abi3.so"
if not _library.exists():
    raise ImportError(
        "engram_kernels: the compiled library engram_kernels/_C.abi3.so is missing; "
        "install the package (pip install .) or build it in place (python setup.py build_ext --inplace)"
    )
torch.ops.load_library(str(_library))
_ops = torch.ops.engram_kernels


# ---- instruction sets


def isa() -> str:
    """Instruction set of the CPU kernels in use: "avx512", "avx2", "neon" or "scalar"."""
    return _ops._isa()


def available_isas() -> list[str]:
    """Instruction sets that this build has and this machine can run, best first."""
    return _ops._available_isas().split(",")


def set_isa(name: str) -> None:
    """Uses another instruction set from now on, in all threads; ``ENGRAM_ISA`` does so from the start.

    Raises: RuntimeError if ``name`` is not in :func:`available_isas`.
    """
    _ops._set_isa(name)


if os.environ.get("ENGRAM_ISA"):
    try:
        set_isa(os.environ["ENGRAM_ISA"])
    except RuntimeError as error:
        raise ImportError(f"environment variable ENGRAM_ISA: {str(error).splitlines()[0]}") from None


def build_info() -> dict[str, str]:
    """How the loaded library was built: its ``file`` name, the CPU ``isas`` usable here, ``cuda`` kernels yes or no."""
    return {"file": _library.name, "isas": ",".join(available_isas()), "cuda": "yes" if _ops._has_cuda() else "no"}


# ---- operators


def pack_signs(x: Tensor) -> Tensor:
    """Signs of ``x``, sign(0) = +1. Floats (..., K) -> bits (..., words). NaN is an error."""
    return _ops.pack_signs(x)


def pack_window(x: Tensor, width: float = 1.0, gate_bits: Tensor | None = None) -> Tensor:
    """Straight-through window ``1{|x| <= width} * gate``. Floats (M, K) -> bits (M, words)."""
    return _ops.pack_window(x, width, gate_bits)


def unpack_signs(bits: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bits (..., words) -> (..., K) of +1 and -1 in ``dtype`` (float32/64, bfloat16, float16, int8, int32)."""
    return _ops.unpack_signs(bits, k, dtype)


def binary_matmul(x_bits: Tensor, w_bits: Tensor, k: int, gate_bits: Tensor | None = None) -> Tensor:
    """Gated product of sign matrices, exact: ``y[m,n] = sum_k g[m,k] s(x[m,k]) s(W[n,k])``.

    Shapes: ``x_bits`` (M, words), ``w_bits`` (N, words), ``gate_bits`` (words,) shared or (M, words) -> int32 (M, N).
    Padding bits do not count.
    """
    return _ops.binary_matmul(x_bits, w_bits, k, gate_bits)


def binary_threshold(
    x_bits: Tensor, w_bits: Tensor, k: int, threshold: Tensor, flip: Tensor, gate_bits: Tensor | None = None
) -> Tensor:
    """Sign bits of the next layer: ``1{(y[m,n] >= threshold[n]) != flip[n]}``, y as in :func:`binary_matmul`.

    Shapes: as :func:`binary_matmul`, ``threshold`` int32 (N,), ``flip`` bool (N,) -> bits (M, words of N). For
    inference: BatchNorm and the sign after it are one such threshold per unit, flipped where BatchNorm's factor is
    negative.
    """
    return _ops.binary_threshold(x_bits, w_bits, k, threshold, flip, gate_bits)


def sign_matmul(a: Tensor, w_bits: Tensor, k: int) -> Tensor:
    """``y = a @ s(W)``. Floats (M, N), bits (N, words) -> (M, K). Differentiable in ``a``."""
    return _ops.sign_matmul(a, w_bits, k)


def sign_matmul_t(x: Tensor, w_bits: Tensor, k: int) -> Tensor:
    """``y = x @ s(W).T``: the real-valued first layer.

    Floats (M, K), bits (N, words) -> (M, N). Differentiable in ``x``. uint8 (M, K), as images come -> int32, exact, for
    K up to 8 421 504.
    """
    return _ops.sign_matmul_t(x, w_bits, k)


def gated_input_grad(d: Tensor, w_bits: Tensor, x: Tensor, gate_bits: Tensor | None = None) -> Tensor:
    """Straight-through gradient of the input: ``dx = gate * 1{|x| <= 1} * (d @ s(W))``.

    Shapes: ``d`` (M, N), ``w_bits`` (N, words), ``x`` (M, K), gate as in :func:`binary_matmul` -> (M, K).
    Cost is proportional to the units that take part.
    """
    return _ops.gated_input_grad(d, w_bits, x, gate_bits)


def masked_input_grad(d: Tensor, w_bits: Tensor, k: int, mask_bits: Tensor) -> Tensor:
    """:func:`gated_input_grad` where gate and window are already one mask, as :func:`pack_window` makes it."""
    return _ops.masked_input_grad(d, w_bits, k, mask_bits)


def gated_weight_grad(d: Tensor, x_bits: Tensor, k: int, gate_bits: Tensor | None = None) -> Tensor:
    """Gradient of the hidden weight: ``dW[n,k] = sum_m d[m,n] g[m,k] s(x[m,k])``.

    Shapes: ``d`` (M, N), ``x_bits`` (M, words), gate as in :func:`binary_matmul` -> (N, K).
    Cost is proportional to the recruited units.
    """
    return _ops.gated_weight_grad(d, x_bits, k, gate_bits)


def sample_engram(
    score: Tensor,
    seed: Tensor,
    rate: float,
    rule: str = "gumbel_top_k",
    temperature: float = 1.0,
    first_row: int = 0,
) -> Tensor:
    """Recruits units: floats (M, K) -> gate bits (M, words). Rules in :func:`engram_kernels.reference.sample_engram`.

    ``seed`` is int64 (2,) on the CPU: the Philox key and an offset below 2^32; :func:`draw_seed` takes one from torch's
    generator. ``first_row`` is the number of this batch's first sample in the whole batch of a data-parallel step.
    The same seed gives the same engram on every device, for any thread count.
    """
    if rule not in ("gumbel_top_k", "bernoulli"):
        raise RuntimeError(f"rule: expected 'gumbel_top_k' or 'bernoulli', got {rule!r}")
    return _ops.sample_engram(score, seed, rate, rule == "bernoulli", temperature, first_row)


def draw_seed() -> Tensor:
    """A seed for :func:`sample_engram` from torch's default CPU generator, so that ``torch.manual_seed`` governs it."""
    key = torch.randint(2**63 - 1, (1,), device="cpu")
    return torch.cat([key, torch.zeros_like(key)])


def check_numbers() -> None:
    """Waits for all CUDA devices and reports a NaN that an operator met there.

    On CUDA a call returns before it has run, so that NaNs are reported by a later operator, like CUDA's own errors.
    Raises: RuntimeError naming the operator and its argument.
    """
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
        _ops._check_nan_flags()


def _note_changes(*tensors: Tensor | None) -> None:
    """Has graphs that saved these tensors notice the change: the Stable ABI leaves version counters alone."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if t is not None])


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
    """One metaplastic Adam step in place, in a single pass over memory; writes fresh sign bits in the same pass.

    Shapes: all (N, K), ``sign_bits`` (N, words) or None. ``weight`` is float32 or bfloat16, ``grad`` float32 or like
    the weight, the moments float32, bfloat16, or int8 and uint8 with scales (N, ceil(K / 64)). ``step`` counts from 1;
    the weight is clipped to ``[-weight_bound, weight_bound]``, in float32 before it is rounded; ``seed`` as in
    :func:`sample_engram`, needed for everything that is not float32. Formula, formats and source in
    :func:`engram_kernels.reference.metaplastic_adam_`.
    """
    _ops.metaplastic_adam_(
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        sign_bits,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        metaplasticity=metaplasticity,
        step=step,
        weight_bound=weight_bound,
        exp_avg_scale=exp_avg_scale,
        exp_avg_sq_scale=exp_avg_sq_scale,
        seed=seed,
        first_row=first_row,
    )
    _note_changes(weight, exp_avg, exp_avg_sq, sign_bits, exp_avg_scale, exp_avg_sq_scale)


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
    """
    _ops.gated_metaplastic_adam_(d, x_bits, gate_bits, weight, exp_avg, exp_avg_sq, sign_bits, **settings)
    scales = settings.get("exp_avg_scale"), settings.get("exp_avg_sq_scale")
    _note_changes(weight, exp_avg, exp_avg_sq, sign_bits, *scales)


torch.library.impl("engram_kernels::metaplastic_adam_", "cuda", triton_kernels.metaplastic_adam_)
torch.library.impl("engram_kernels::gated_metaplastic_adam_", "cuda", triton_kernels.gated_metaplastic_adam_)


# ---- fakes: what the operators check and the shapes they give, without data, for torch.compile and meta tensors

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _require(condition: Any, name: str, expected: str, got: Any) -> None:
    shown = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else got
    torch._check(condition, lambda: f"{name}: expected {expected}, got {shown}")


def _check_same_device(**tensors: Tensor | None) -> None:
    first = next(iter(tensors))
    place = tensors[first].device  # type: ignore[union-attr]
    for name, tensor in tensors.items():
        if tensor is not None:
            _require(tensor.device == place, name, f"a tensor on {place} like {first}", f"one on {tensor.device}")


def _check_k(name: str, k: Any) -> None:
    _require(k >= 1, name, "1 to 2^31 - 1", k)
    _require(k <= 2**31 - 1, name, "1 to 2^31 - 1", k)


def _check_floats(name: str, x: Tensor) -> None:
    _require(x.dtype in _FLOATS, name, "float32, bfloat16 or float16", x)


def _check_matrix(name: str, x: Tensor) -> None:
    _check_floats(name, x)
    _require(x.dim() == 2, name, "2 dimensions", x)


def _check_packed(name: str, bits: Tensor, k: Any) -> None:
    _check_k("k", k)
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
    _require(seed.device.type == "cpu", "seed", "a CPU tensor", f"one on {seed.device}")
    shaped = seed.dtype == torch.int64 and seed.dim() == 1 and seed.shape[0] == 2
    _require(shaped, "seed", "int64 (2,), the Philox key and offset", seed)


@torch.library.register_fake("engram_kernels::pack_signs")
def _(x):
    _check_floats("x", x)
    _require(x.dim() >= 1, "x", "at least 1 unit in the last dimension", x)
    _require(x.shape[-1] >= 1, "x", "at least 1 unit in the last dimension", x)
    return x.new_empty((*x.shape[:-1], words_for(x.shape[-1])), dtype=torch.int64)


@torch.library.register_fake("engram_kernels::pack_window")
def _(x, width=1.0, gate_bits=None):
    _check_same_device(x=x, gate_bits=gate_bits)
    _check_matrix("x", x)
    _check_k("k", x.shape[1])
    _require(width > 0, "width", "above 0", width)
    _check_gate("gate_bits", gate_bits, *x.shape)
    return x.new_empty((x.shape[0], words_for(x.shape[1])), dtype=torch.int64)


@torch.library.register_fake("engram_kernels::unpack_signs")
def _(bits, k, dtype):
    _check_k("k", k)
    expected = f"int64 of shape (..., {words_for(k)}) for k = {k}"
    _require(bits.dtype == torch.int64 and bits.dim() >= 1, "bits", expected, bits)
    _require(bits.shape[-1] == words_for(k), "bits", expected, bits)
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32)
    _require(dtype in allowed, "dtype", "float32, bfloat16, float16, float64, int8 or int32", dtype)
    return bits.new_empty((*bits.shape[:-1], k), dtype=dtype)


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
    _check_k("k", n)
    for name, tensor, dtype in (("threshold", threshold, torch.int32), ("flip", flip, torch.bool)):
        expected = f"{dtype} ({n},), one for each row of w_bits"
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
def _(x, w_bits, k):
    _check_same_device(x=x, w_bits=w_bits)
    exact = x.dtype == torch.uint8
    if not exact:
        _check_matrix("x", x)
    _check_packed("w_bits", w_bits, k)
    _require(x.dim() == 2, "x", f"shape (M, {k}) for k = {k}", x)
    _require(x.shape[1] == k, "x", f"shape (M, {k}) for k = {k}", x)
    if exact:
        _require(k <= (2**31 - 1) // 255, "k", f"at most {(2**31 - 1) // 255} for uint8", k)
    return x.new_empty((x.shape[0], w_bits.shape[0]), dtype=torch.int32 if exact else x.dtype)


@torch.library.register_fake("engram_kernels::gated_input_grad")
def _(d, w_bits, x, gate_bits=None):
    _check_same_device(d=d, w_bits=w_bits, x=x, gate_bits=gate_bits)
    _check_matrix("d", d)
    _check_matrix("x", x)
    _require(x.shape[0] == d.shape[0], "x", f"{d.shape[0]} samples like d", x)
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


@torch.library.register_fake("engram_kernels::sample_engram")
def _(score, seed, rate, bernoulli=False, temperature=1.0, first_row=0):
    _check_matrix("score", score)
    _check_k("k", score.shape[1])
    _check_seed(seed)
    _require(0 < rate <= 1, "rate", "in (0, 1]", rate)
    _require(temperature == 0 or temperature >= 1e-6, "temperature", "0 or at least 1e-6", temperature)
    _require(first_row >= 0, "first_row", "at least 0", first_row)
    return score.new_empty((score.shape[0], words_for(score.shape[1])), dtype=torch.int64)


def _check_update(
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
    _require(weight.dtype in (torch.float32, torch.bfloat16), "weight", "float32 or bfloat16", weight)
    _require(weight.dim() == 2, "weight", "2 dimensions", weight)
    n, k = weight.shape
    _check_k("k", k)
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
def _(weight, grad, exp_avg, exp_avg_sq, sign_bits, *, exp_avg_scale=None, exp_avg_sq_scale=None, **settings):
    scales = {"exp_avg_scale": exp_avg_scale, "exp_avg_sq_scale": exp_avg_sq_scale}
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "sign_bits": sign_bits}
    _check_same_device(weight=weight, grad=grad, **state, **scales)
    _check_update(weight, **state, **scales, **settings)
    alike = grad.dtype in (torch.float32, weight.dtype) and grad.shape == weight.shape
    _require(alike, "grad", f"float32 or the weight's dtype, in the weight's shape {tuple(weight.shape)}", grad)


@torch.library.register_fake("engram_kernels::gated_metaplastic_adam_")
def _(
    d,
    x_bits,
    gate_bits,
    weight,
    exp_avg,
    exp_avg_sq,
    sign_bits,
    *,
    exp_avg_scale=None,
    exp_avg_sq_scale=None,
    **settings,
):
    scales = {"exp_avg_scale": exp_avg_scale, "exp_avg_sq_scale": exp_avg_sq_scale}
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "sign_bits": sign_bits}
    _check_same_device(weight=weight, d=d, x_bits=x_bits, gate_bits=gate_bits, **state, **scales)
    _check_update(weight, **state, **scales, **settings)
    _check_matrix("d", d)
    n, k = weight.shape
    _check_packed("x_bits", x_bits, k)
    _require(d.shape[1] == n, "d", f"shape (M, {n}) to meet the rows of the weight", d)
    _require(x_bits.shape[0] == d.shape[0], "x_bits", f"{d.shape[0]} samples like d", x_bits)
    _check_gate("gate_bits", gate_bits, d.shape[0], k)


# ---- gradients


def _save_bits(ctx, inputs, output):
    _, w_bits, ctx.k = inputs
    ctx.save_for_backward(w_bits)


def _sign_matmul_backward(ctx, grad):
    return _ops.sign_matmul_t(grad, ctx.saved_tensors[0], ctx.k), None, None


def _sign_matmul_t_backward(ctx, grad):
    return _ops.sign_matmul(grad, ctx.saved_tensors[0], ctx.k), None, None


torch.library.register_autograd("engram_kernels::sign_matmul", _sign_matmul_backward, setup_context=_save_bits)
torch.library.register_autograd("engram_kernels::sign_matmul_t", _sign_matmul_t_backward, setup_context=_save_bits)
