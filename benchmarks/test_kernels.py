"""Single kernels against what a user runs today: torch's float product and the eager metaplastic update."""

import pytest
import torch
import torch.nn.functional as F

from engram_kernels import ops, reference

ADAM = dict(lr=5e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-7, metaplasticity=1.35, step=3)


@pytest.mark.parametrize("gate", ["no gate", "gate per sample"])
@pytest.mark.parametrize("m", [1, 8, 100, 1024])
def test_binary_matmul(side_by_side, isa, threads, m, gate):
    n = k = 4096
    x, w = torch.randn(m, k), torch.randn(n, k)
    x_bits, w_bits = ops.pack_signs(x), ops.pack_signs(w)
    gate_bits = None if gate == "no gate" else ops.sample_engram(x, ops.draw_seed(), 0.1)
    side_by_side(
        f"binary_matmul {m}x{n}x{k}, {gate}",
        lambda: ops.binary_matmul(x_bits, w_bits, k, gate_bits),
        lambda: F.linear(x, w),
        "F.linear fp32",
        **{"GMAC/s": m * n * k},
    )


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_gated_weight_grad(side_by_side, isa, threads, rate):
    m, n, k = 100, 2048, 2048
    x, d = torch.randn(m, k), torch.randn(m, n)
    x_bits, gate_bits = ops.pack_signs(x), ops.sample_engram(x, ops.draw_seed(), rate)
    side_by_side(
        f"gated_weight_grad {m}x{n}x{k}, rate {rate}",
        lambda: ops.gated_weight_grad(d, x_bits, k, gate_bits),
        lambda: d.T @ x,
        "matmul fp32",
    )


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_gated_input_grad(side_by_side, isa, threads, rate):
    m, n, k = 100, 2048, 2048
    x, d, w = torch.randn(m, k), torch.randn(m, n), torch.randn(n, k)
    w_bits, mask_bits = ops.pack_signs(w), ops.sample_engram(x, ops.draw_seed(), rate)
    side_by_side(
        f"gated_input_grad {m}x{n}x{k}, rate {rate}",
        lambda: ops.masked_input_grad(d, w_bits, k, mask_bits),
        lambda: d @ w,
        "matmul fp32",
    )


def test_metaplastic_adam(side_by_side, isa, threads):
    n = k = 4096
    ours = [torch.randn(n, k) * 0.05, torch.randn(n, k), torch.zeros(n, k), torch.zeros(n, k)]
    theirs = [t.clone() for t in ours]
    bits = ops.pack_signs(ours[0])
    side_by_side(
        "metaplastic_adam_ 16 M weights",
        lambda: ops.metaplastic_adam_(*ours, bits, **ADAM),
        lambda: reference.metaplastic_adam_(*theirs, None, **ADAM),
        "eager PyTorch",
        **{"GB/s": n * k * 28},
    )
