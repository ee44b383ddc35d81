"""Single operators against what a user runs today: torch's products in float32, bfloat16 and int8, the eager update."""

import pytest
import torch
import torch.nn.functional as F
from bound import Bound, register_loop
from measure import Contender

import engram_kernels as ek
from engram_kernels import ops, reference

ADAM = dict(lr=5e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-7, metaplasticity=1.35, step=3)
N = K = 4096


def product_arguments(m, n, k, device):
    """Activations and weights, real-valued, and their packed signs."""
    x, w = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
    return x, w, ops.pack_signs(x), ops.pack_signs(w)


def engram_of(x, rate):
    return ops.sample_engram(x, ops.draw_seed(), rate)


# ---- products


@pytest.mark.parametrize("m", [1, 8, 100, 1024])
def test_binary_matmul(side_by_side, any_target, one_thread, m):
    x, w, x_bits, w_bits = product_arguments(m, N, K, any_target.device)
    baselines = {"F.linear fp32": lambda: F.linear(x, w)}
    if any_target.isa == ops.available_isas()[0] or any_target.device == "cuda":
        x_half, w_half = x.bfloat16(), w.bfloat16()
        x_int, w_int = x.sign().to(torch.int8), w.sign().to(torch.int8)
        baselines["F.linear bf16"] = lambda: F.linear(x_half, w_half)
        baselines["_int_mm int8"] = lambda: torch._int_mm(x_int, w_int.T)
    if any_target.device == "cuda":
        x_fp16, w_fp16 = x.half(), w.half()
        baselines["F.linear fp16"] = lambda: F.linear(x_fp16, w_fp16)
    side_by_side(
        f"binary_matmul {m}x{N}x{K}",
        any_target,
        lambda: ops.binary_matmul(x_bits, w_bits, K),
        baselines,
        bound=register_loop(any_target.isa),
        work=m * N * K,
        rate_unit="GMAC/s",
    )


@pytest.mark.parametrize("m", [1, 8, 100, 1024])
def test_binary_matmul_on_two_threads(side_by_side, target, two_threads, m):
    x, w, x_bits, w_bits = product_arguments(m, N, K, target.device)

    def product():
        return ops.binary_matmul(x_bits, w_bits, K)

    baselines = {"F.linear fp32": lambda: F.linear(x, w), "1 thread": Contender(product, threads=1)}
    side_by_side(
        f"binary_matmul {m}x{N}x{K}",
        target,
        product,
        baselines,
        bound=register_loop(target.isa),
        work=m * N * K,
        rate_unit="GMAC/s",
    )


@pytest.mark.parametrize("m", [1, 8, 100, 1024])
def test_gate_per_sample(side_by_side, target, one_thread, m):
    x, w, x_bits, w_bits = product_arguments(m, N, K, target.device)
    gate_bits = engram_of(x, 0.1)
    side_by_side(
        f"binary_matmul {m}x{N}x{K}, gated",
        target,
        lambda: ops.binary_matmul(x_bits, w_bits, K, gate_bits),
        {"without gate": lambda: ops.binary_matmul(x_bits, w_bits, K), "F.linear fp32": lambda: F.linear(x, w)},
        bound=register_loop(target.isa),
        work=m * N * K,
        rate_unit="GMAC/s",
    )


@pytest.mark.parametrize("m", [1, 8, 100, 1024])
def test_packing_included(side_by_side, target, one_thread, m):
    x, w, _, w_bits = product_arguments(m, N, K, target.device)
    side_by_side(
        f"pack_signs, binary_matmul {m}x{N}x{K}",
        target,
        lambda: ops.binary_matmul(ops.pack_signs(x), w_bits, K),
        {"F.linear fp32": lambda: F.linear(x, w)},
        work=m * N * K,
        rate_unit="GMAC/s",
    )


@pytest.mark.parametrize(("m", "n", "k"), [(10, 10, 784), (33, 127, 65)])
def test_small_shapes(side_by_side, target, one_thread, m, n, k):
    x, w, x_bits, w_bits = product_arguments(m, n, k, target.device)
    side_by_side(
        f"binary_matmul {m}x{n}x{k}",
        target,
        lambda: ops.binary_matmul(x_bits, w_bits, k),
        {"F.linear fp32": lambda: F.linear(x, w)},
        work=m * n * k,
        rate_unit="GMAC/s",
    )


def test_call_overhead(side_by_side, target, one_thread):
    """Of a product with next to nothing to compute, so that the call is what takes the time."""
    x, w, x_bits, w_bits = product_arguments(1, 1, 1, target.device)
    side_by_side(
        "call of binary_matmul 1x1x1",
        target,
        lambda: ops.binary_matmul(x_bits, w_bits, 1),
        {"F.linear fp32": lambda: F.linear(x, w)},
        peak=False,
    )


@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32], ids=["uint8", "float32"])
def test_first_layer(side_by_side, target, one_thread, pixels):
    m, k = 100, 784
    images = torch.randint(256, (m, k), dtype=torch.uint8, device=target.device)
    x, w = images.to(pixels), torch.randn(N, k, device=target.device)
    x_float, w_bits = images.float(), ops.pack_signs(w)
    side_by_side(
        f"sign_matmul_t {m}x{N}x{k}, {'uint8' if pixels == torch.uint8 else 'float32'}",
        target,
        lambda: ops.sign_matmul_t(x, w_bits, k),
        {"F.linear fp32": lambda: F.linear(x_float, w)},
        work=m * N * k,
        rate_unit="GMAC/s",
    )


# ---- engrams


@pytest.mark.parametrize("rule", ["gumbel_top_k", "bernoulli"])
def test_sample_engram(side_by_side, target, threads, rule):
    m = 100
    x, _, x_bits, w_bits = product_arguments(m, N, K, target.device)
    seed = ops.draw_seed()
    side_by_side(
        f"sample_engram {m}x{K}, {rule}",
        target,
        lambda: ops.sample_engram(x, seed, 0.1, rule, temperature=0.1),
        {f"binary_matmul {m}x{N}x{K}": lambda: ops.binary_matmul(x_bits, w_bits, K)},
    )


# ---- backward


@pytest.mark.parametrize("rate", [0.05, 0.1, 1.0, None], ids=lambda r: "ungated" if r is None else f"rate{r}")
def test_gated_weight_grad(side_by_side, target, threads, rate):
    m = 100
    x, d = torch.randn(m, K, device=target.device), torch.randn(m, N, device=target.device)
    x_bits, gate_bits = ops.pack_signs(x), None if rate is None else engram_of(x, rate)
    written = torch.empty(N, K, device=target.device)
    side_by_side(
        f"gated_weight_grad {m}x{N}x{K}, " + ("ungated" if rate is None else f"rate {rate}"),
        target,
        lambda: ops.gated_weight_grad(d, x_bits, K, gate_bits),
        {"matmul fp32": lambda: d.T @ x, "zeroing a fresh result": lambda: torch.empty_like(written).zero_()},
        bound=Bound("writing memory", written.zero_),  # without asking the system for it
    )


def test_real_weight_grad(side_by_side, target, threads):
    m, pixels = 100, 784
    d, x = torch.randn(m, N, device=target.device), torch.randn(m, pixels, device=target.device)
    side_by_side(
        f"real_weight_grad {m}x{N}x{pixels}",
        target,
        lambda: ops.real_weight_grad(d, x),
        {"matmul fp32": lambda: d.T @ x},
    )


@pytest.mark.parametrize("rate", [0.05, 0.1, 1.0], ids="rate{}".format)
def test_gated_input_grad(side_by_side, target, threads, rate):
    m = 100
    x, d, w = (torch.randn(*shape, device=target.device) for shape in ((m, K), (m, N), (N, K)))
    # at rate 1 every unit takes part, as in a layer without a gate
    w_bits, mask_bits = ops.pack_signs(w), engram_of(x, rate)
    side_by_side(
        f"masked_input_grad {m}x{N}x{K}, " + ("ungated" if rate == 1.0 else f"rate {rate}"),
        target,
        lambda: ops.masked_input_grad(d, w_bits, K, mask_bits),
        {"matmul fp32": lambda: d @ w},
    )


# ---- update


@pytest.mark.parametrize(
    ("state_dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int8, torch.float32),
        (torch.int8, torch.bfloat16),
    ],
    ids=["float32", "bfloat16", "int8", "int8-weights-bfloat16"],
)
def test_metaplastic_adam(side_by_side, target, threads, state_dtype, weight_dtype):
    """Through the optimizer, which chooses the tensors; the bound is a copy that moves as many bytes as they take."""
    settings = dict(lr=ADAM["lr"], weight_decay=ADAM["weight_decay"], metaplasticity=ADAM["metaplasticity"])
    layer = ek.BinaryEngramLinear(K, N, bias=False, scaled=False, device=target.device, dtype=weight_dtype)
    weight = layer.weight
    weight.grad = torch.randn_like(weight)
    optimizer = ek.MetaplasticAdam(layer.parameters(), state_dtype=state_dtype, **settings)
    optimizer.step()  # makes the state

    state = [t for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor) and t.numel() > 2]
    moved = sum(2 * t.nbytes for t in (weight, *state)) + weight.grad.nbytes + weight.sign_bits().nbytes
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=target.device)
    copy = torch.empty_like(source)

    theirs = [torch.randn(N, K, device=target.device) * scale for scale in (0.05, 1, 0, 0)]
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
    side_by_side(
        f"metaplastic update {N}x{K}, {names[state_dtype]} state, {names[weight_dtype]} weights",
        target,
        optimizer.step,
        {"eager PyTorch fp32": lambda: reference.metaplastic_adam_(*theirs, None, **ADAM)},
        bound=Bound("copy", lambda: copy.copy_(source), moved),
        work=moved,
        rate_unit="GB/s",
        rounds=5,
    )


@pytest.mark.parametrize("rate", [0.1, None], ids=["rate0.1", "ungated"])
def test_fused_backward_and_update(side_by_side, target, threads, rate):
    """The gradient made and consumed block by block, against the same two operators one after the other."""
    m = 100
    x, d = torch.randn(m, K, device=target.device), torch.randn(m, N, device=target.device)
    x_bits, gate_bits = ops.pack_signs(x), None if rate is None else engram_of(x, rate)
    ours, theirs = ([torch.randn(N, K, device=target.device) * s for s in (0.05, 0, 0)] for _ in range(2))
    bits, their_bits = ops.pack_signs(ours[0]), ops.pack_signs(theirs[0])

    def apart():
        weight, *moments = theirs
        grad = ops.gated_weight_grad(d, x_bits, K, gate_bits)
        ops.metaplastic_adam_(weight, grad, *moments, their_bits, **ADAM)

    side_by_side(
        f"gated_metaplastic_adam_ {m}x{N}x{K}, " + ("ungated" if rate is None else f"rate {rate}"),
        target,
        lambda: ops.gated_metaplastic_adam_(d, x_bits, gate_bits, *ours, bits, **ADAM),
        {"gradient, then update": apart},
        rounds=5,
    )
