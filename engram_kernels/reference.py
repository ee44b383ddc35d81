"""Every operator in plain PyTorch: the definition that all backends are tested against.

Slow and simple on purpose. ``bits`` are the packed format: int64 words, bit 1 = +1 (in a gate: recruited), least
significant bit first along the last dimension, rows padded with 0 bits to a multiple of 128 bits. M samples, N outputs,
K inputs throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD_BITS = 64
_ROW_BITS = 128
_LOW = 0xFFFFFFFF


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


def binary_matmul(x_bits: Tensor, w_bits: Tensor, k: int, gate_bits: Tensor | None = None) -> Tensor:
    """``y[m,n] = sum_k g[m,k] s(x[m,k]) s(W[n,k])``. (M, words), (N, words) -> int32 (M, N)."""
    x, w = unpack_signs(x_bits, k, torch.float64), unpack_signs(w_bits, k, torch.float64)
    return ((x * _gate(gate_bits, k)) @ w.T).to(torch.int32)


def sign_matmul(a: Tensor, w_bits: Tensor, k: int) -> Tensor:
    """``y = a @ s(W)``. Floats (M, N), bits (N, words) -> (M, K) in the dtype of ``a``."""
    return (a.double() @ unpack_signs(w_bits, k, torch.float64)).to(a.dtype)


def sign_matmul_t(x: Tensor, w_bits: Tensor, k: int) -> Tensor:
    """``y = x @ s(W).T``. Floats (M, K), bits (N, words) -> (M, N) in the dtype of ``x``."""
    return (x.double() @ unpack_signs(w_bits, k, torch.float64).T).to(x.dtype)


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


def philox(seed: Tensor, rows: int, k: int, first_row: int = 0) -> Tensor:
    """Philox4x32-10 draws (Salmon et al. 2011): 32 random bits per unit, int64 (rows, k) in [0, 2^32).

    ``seed`` is int64 (2,): the 64-bit key and an offset below 2^32. The draw of unit ``column`` of a row is word
    ``column % 4`` of counter ``(column // 4, row low, row high, offset)``.
    """
    key, offset = (int(value) for value in seed)
    groups = -(-k // 4)
    row = torch.arange(first_row, first_row + rows).unsqueeze(1).expand(rows, groups)
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


def sample_engram(
    score: Tensor,
    seed: Tensor,
    rate: float,
    rule: str = "gumbel_top_k",
    temperature: float = 1.0,
    first_row: int = 0,
) -> Tensor:
    """Recruits units: floats (M, K) -> gate bits (M, words).

    ``"bernoulli"`` recruits each unit independently with probability ``rate`` (``score`` gives the shape only);
    ``"gumbel_top_k"`` recruits the ``max(1, round(rate * K))`` units of largest ``score / temperature + Gumbel``, ties
    to the lower index; temperature 0 adds no noise, infinity ignores the scores.
    """
    rows, k = score.shape
    if rule == "bernoulli":
        return _pack(philox(seed, rows, k, first_row) < round(rate * 2**32)).to(score.device)
    count = max(1, round(rate * k))
    key = score.float().cpu()
    if temperature > 0:
        noise = gumbel(philox(seed, rows, k, first_row))
        inverse = torch.tensor(1.0) / torch.tensor(temperature, dtype=torch.float32)
        key = noise if inverse == 0 else key * inverse + noise
    order = key.argsort(dim=1, descending=True, stable=True)
    gate = torch.zeros(rows, k, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return _pack(gate).to(score.device)


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
) -> None:
    """One metaplastic Adam step in place (Laborieux et al. 2021); all (N, K), ``sign_bits`` (N, words) or None.

    ``W -= lr sqrt(1 - beta2^t) / (1 - beta1^t) * mu' / (sqrt(v) + eps)``, where ``mu' = mu (1 - tanh^2(m |W|))`` if the
    step would shrink ``|W|`` and ``mu`` otherwise. ``weight_decay`` is coupled: it is added to the gradient.
    """
    grad = grad + weight_decay * weight
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    consolidated = exp_avg * (1 - torch.tanh(metaplasticity * weight.abs()) ** 2)
    step_avg = torch.where(weight.sign() * exp_avg > 0, consolidated, exp_avg)
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    weight.addcdiv_(step_avg, exp_avg_sq.sqrt().add_(eps), value=-step_size)
    if sign_bits is not None:
        sign_bits.copy_(pack_signs(weight))
