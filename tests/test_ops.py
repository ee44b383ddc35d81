import ctypes
import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import engram_kernels as ek
from engram_kernels import ops, reference

SIZES = [1, 3, 31, 63, 64, 65, 127, 129, 784, 1000]
GATES = ["none", "shared", "per sample"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
sizes = st.integers(1, 300)
per_isa = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bits_of(rows, k):
    return reference.pack_signs(torch.randn(rows, k))


def gate_of(kind, m, k):
    if kind == "none":
        return None
    gate = reference._pack(torch.rand(m, k) < 0.3)
    return gate[0].contiguous() if kind == "shared" else gate


def assert_close(actual, expected, terms):
    """Agreement to what single-precision accumulation of `terms` numbers of order 1 allows."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    eps = torch.finfo(expected.dtype).eps
    scale = math.sqrt(terms) * 4
    torch.testing.assert_close(actual.float(), expected.float(), rtol=4 * eps, atol=scale * (eps + 1e-6))


# ---- integers and bits: exact


def test_pack_signs_matches_every_bit_of_the_format(isa):
    x = torch.tensor([[1.0, -1.0, 0.0, -0.0, float("inf"), -float("inf"), 1e-45, -1e-45]])
    packed = ops.pack_signs(x)
    assert packed.tolist() == [[0b01011101, 0]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", SIZES)
def test_pack_and_unpack_round_trip(isa, k, dtype):
    x = torch.randn(5, k).to(dtype)
    x[0, 0], x[1, 0] = 0.0, -0.0
    packed = ops.pack_signs(x)
    assert packed.dtype == torch.int64 and packed.shape == (5, 2 * math.ceil(k / 128))
    assert torch.equal(packed, reference.pack_signs(x))
    for out_dtype in (*FLOATS, torch.float64, torch.int8, torch.int32):
        unpacked = ops.unpack_signs(packed, k, out_dtype)
        assert unpacked.dtype == out_dtype
        assert torch.equal(unpacked, torch.where(x >= 0, 1, -1).to(out_dtype))


def test_pack_signs_takes_any_leading_dimensions_and_strides(isa):
    x = torch.randn(3, 4, 70)
    assert torch.equal(ops.pack_signs(x), reference.pack_signs(x))
    assert torch.equal(ops.pack_signs(x[0, 0]), reference.pack_signs(x[0, 0]))
    assert torch.equal(ops.pack_signs(x.transpose(1, 2)), reference.pack_signs(x.transpose(1, 2).contiguous()))
    assert ops.pack_signs(x[:0]).shape == (0, 4, 2)


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("gate", GATES)
def test_pack_window_is_exact(isa, k, gate):
    x = torch.randn(7, k)
    x[0, 0], x[1, 0], x[2, 0] = 1.0, -1.0, 1.0000001
    gate_bits = gate_of(gate, 7, k)
    for width in (1.0, 0.25):
        assert torch.equal(ops.pack_window(x, width, gate_bits), reference.pack_window(x, width, gate_bits))


@pytest.mark.parametrize("n", [*SIZES, 32, 33, 784])
@pytest.mark.parametrize("dtype", FLOATS)
def test_standardising_is_exact(isa, n, dtype):
    for m in (0, 1, 5):
        wide = torch.randn(m, n) * 2.0 ** torch.randint(-20, 14, (m, n))  # so far apart that sums round
        whole, zeros = torch.randint(-n, n + 1, (m, n)), torch.zeros(m, n)
        for y in (torch.randn(m, n), wide, torch.randn(m, n) * 1e-20, whole, zeros):
            y, d = y.to(dtype), torch.randn(m, n).to(dtype)
            z, moments = ops.standardise(y, 1e-3)
            expected = reference.standardise(y, 1e-3)
            assert z.dtype == dtype and torch.equal(z, expected[0]) and torch.equal(moments, expected[1]), m
            assert torch.equal(ops.standardise_grad(d, y, moments), reference.standardise_grad(d, y, moments)), m
    y = torch.randn(n, 7).T
    assert torch.equal(ops.standardise(y)[0], reference.standardise(y)[0])


def test_standardised_samples_and_their_gradient_agree_with_layer_norm(isa):
    y, d = torch.randn(6, 100, dtype=torch.float64) * 3 + 20, torch.randn(6, 100, dtype=torch.float64)
    y.requires_grad_()
    expected = torch.nn.functional.layer_norm(y, (100,), eps=1e-5)
    expected.backward(d)
    z, moments = ops.standardise(y.detach().float())
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)
    dy = ops.standardise_grad(d.float(), y.detach().float(), moments)
    torch.testing.assert_close(dy.double(), y.grad, rtol=1e-4, atol=1e-5)


def test_signs_of_standardised_integers_are_those_of_the_integers(isa):
    for n in (3, 100, 4096):
        y = torch.randint(-3, 4, (50, n)).float() * 2 + 1001
        z = ops.standardise(y)[0]
        assert torch.equal(ops.pack_signs(z), reference.value_signs(y.int()))
        exact = y.double() * n == y.double().sum(1, keepdim=True)
        assert torch.equal(z == 0, exact)


def test_what_is_no_number_stays_in_its_row(isa):
    y = torch.randn(4, 50)
    y[1, 3], y[2, 7] = math.nan, math.inf
    z, moments = ops.standardise(y)
    assert z[1:3].isnan().all() and moments[1].isnan().all()
    for row in (0, 3):
        assert torch.equal(z[row], ops.standardise(y[row : row + 1])[0][0])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("k", SIZES)
def test_binary_matmul_is_exact_over_the_sweep(isa, k, gate):
    for m in SIZES[:-2]:
        for n in SIZES[:-2]:
            x_bits, w_bits, gate_bits = bits_of(m, k), bits_of(n, k), gate_of(gate, m, k)
            y = ops.binary_matmul(x_bits, w_bits, k, gate_bits)
            assert y.dtype == torch.int32
            assert torch.equal(y, reference.binary_matmul(x_bits, w_bits, k, gate_bits)), (m, n, k)


@per_isa
@given(m=sizes, n=sizes, k=st.integers(1, 20000), gate=st.sampled_from(GATES))
def test_binary_matmul_is_exact(isa, m, n, k, gate):
    m, n = min(m, 40), min(n, 70)
    x_bits, w_bits, gate_bits = bits_of(m, k), bits_of(n, k), gate_of(gate, m, k)
    expected = reference.binary_matmul(x_bits, w_bits, k, gate_bits)
    assert torch.equal(ops.binary_matmul(x_bits, w_bits, k, gate_bits), expected)


@pytest.mark.parametrize("m", [1, 63, 64, 130, 517])
@pytest.mark.parametrize("k", [1, 64, 100, 128, 333])
def test_transpose_bits_is_exact(isa, m, k):
    bits = bits_of(m, k)
    assert torch.equal(ops.transpose_bits(bits, k), reference.transpose_bits(bits, k))
    assert torch.equal(ops.transpose_bits(ops.transpose_bits(bits, k), m), bits)
    assert ops.transpose_bits(bits[:0], k).shape == (k, 0)
    twice = bits.repeat_interleave(2, 0)[::2]
    assert torch.equal(ops.transpose_bits(twice, k), reference.transpose_bits(bits, k))


def test_binary_matmul_at_the_extremes(isa):
    k = 70001  # above 2 * 32768: no 16-bit counter may hide anywhere
    ones, minus = ops.pack_signs(torch.ones(9, k)), ops.pack_signs(-torch.ones(9, k))
    assert (ops.binary_matmul(ones, ones, k) == k).all()
    assert (ops.binary_matmul(ones, minus, k) == -k).all()
    nothing = torch.zeros_like(ones)
    assert (ops.binary_matmul(ones, minus, k, nothing) == 0).all()


def test_non_contiguous_and_empty_arguments(isa):
    k = 129
    x_bits, w_bits, gate = bits_of(20, k), bits_of(12, k), gate_of("per sample", 20, k)
    y = ops.binary_matmul(x_bits[::2], w_bits[::3], k, gate[::2])
    assert torch.equal(y, reference.binary_matmul(x_bits[::2], w_bits[::3], k, gate[::2]))
    assert ops.binary_matmul(x_bits[:0], w_bits, k).shape == (0, 12)
    assert ops.binary_matmul(x_bits, w_bits[:0], k).shape == (20, 0)
    d = torch.randn(12, 20).T
    assert_close(ops.sign_matmul(d, w_bits, k), reference.sign_matmul(d, w_bits, k), 12)
    x = torch.randn(k, 20).T
    assert_close(ops.sign_matmul_t(x, w_bits, k), reference.sign_matmul_t(x, w_bits, k), k)
    empty = torch.empty(0, 12)
    assert ops.sign_matmul(empty, w_bits, k).shape == (0, k)
    assert ops.sign_matmul_t(torch.empty(0, k), w_bits, k).shape == (0, 12)
    assert ops.gated_input_grad(empty, w_bits, torch.empty(0, k)).shape == (0, k)
    assert torch.equal(ops.gated_weight_grad(empty, x_bits[:0], k), torch.zeros(12, k))
    assert ops.sample_engram(torch.empty(0, k), torch.tensor([1, 0]), 0.5).shape == (0, 4)


# ---- floats


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("n", SIZES[:-1])
def test_sign_products_over_the_sweep(isa, n, k):
    w_bits = bits_of(n, k)
    for m in (1, 3, 6, 7, 13):
        a, x = torch.randn(m, n), torch.randn(m, k)
        assert_close(ops.sign_matmul(a, w_bits, k), reference.sign_matmul(a, w_bits, k), n)
        assert_close(ops.sign_matmul_t(x, w_bits, k), reference.sign_matmul_t(x, w_bits, k), k)


@pytest.mark.parametrize("k", SIZES)
def test_sign_products_of_uint8_are_exact(isa, k):
    for m, n in [(1, 1), (3, 65), (31, 127), (33, 10), (70, 64)]:
        x, w_bits = torch.randint(0, 256, (m, k), dtype=torch.uint8), bits_of(n, k)
        x[0] = 255
        y = ops.sign_matmul_t(x, w_bits, k)
        assert y.dtype == torch.int32 and torch.equal(y, reference.sign_matmul_t(x, w_bits, k)), (m, n)
        grouped = reference.group_signs(w_bits, k)
        assert torch.equal(ops.sign_matmul_t(x, w_bits, k, grouped), y), (m, n)
        few = x * (torch.rand(m, k) < 0.05)  # most groups of them are left out
        assert torch.equal(ops.sign_matmul_t(few, w_bits, k, grouped), reference.sign_matmul_t(few, w_bits, k)), (m, n)
    ones = reference.pack_signs(torch.ones(3, k))  # the largest sums, of either sign
    assert (ops.sign_matmul_t(torch.full((2, k), 255, dtype=torch.uint8), ones, k) == 255 * k).all()
    assert (ops.sign_matmul_t(torch.full((2, k), 255, dtype=torch.uint8), torch.zeros_like(ones), k) == -255 * k).all()


def test_infinities_stay_infinite(isa):
    w_bits = reference.pack_signs(torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0, 1.0]]))
    x = torch.tensor([[1.0, 2.0, math.inf, 0.0, 5.0, 6.0], [1.0, math.inf, 3.0, 0.0, 5.0, 6.0]])
    assert ops.sign_matmul_t(x, w_bits, 6).flatten().tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.45, 0.55, 0.9, 1.0])  # sparse and dense kernels, and their border
@pytest.mark.parametrize("shared", [False, True])
def test_gated_gradients_at_every_density(isa, rate, shared):
    for m, n, k in [(5, 70, 129), (100, 65, 300), (130, 33, 64), (300, 9, 1030)]:
        d, x, w_bits = torch.randn(m, n), torch.randn(m, k), bits_of(n, k)
        gate = reference._pack(torch.rand(m, k) < rate)
        gate = gate[0].contiguous() if shared else gate
        dw = ops.gated_weight_grad(d, reference.pack_signs(x), k, gate)
        assert_close(dw, reference.gated_weight_grad(d, reference.pack_signs(x), k, gate), m)
        dx = ops.masked_input_grad(d, w_bits, k, gate)
        assert_close(dx, reference.masked_input_grad(d, w_bits, k, gate), n)


@per_isa
@given(m=sizes, n=sizes, k=sizes, gate=st.sampled_from(GATES), scale=st.sampled_from([0.3, 3.0]))
def test_gated_gradients_agree(isa, m, n, k, gate, scale):
    d, x = torch.randn(m, n), torch.randn(m, k) * scale
    w_bits, x_bits, gate_bits = bits_of(n, k), reference.pack_signs(x), gate_of(gate, m, k)
    dx = ops.gated_input_grad(d, w_bits, x, gate_bits)
    assert_close(dx, reference.gated_input_grad(d, w_bits, x, gate_bits), n)
    outside = (x.abs() > 1) | (False if gate_bits is None else ~reference._unpack(gate_bits, k))
    assert (dx[outside.expand_as(dx)] == 0).all()
    dw = ops.gated_weight_grad(d, x_bits, k, gate_bits)
    assert_close(dw, reference.gated_weight_grad(d, x_bits, k, gate_bits), m)


def test_weight_grad_over_several_chunks_of_samples(isa):
    d, x_bits, gate = torch.randn(700, 70), bits_of(700, 33), gate_of("per sample", 700, 33)
    for gate_bits in (None, gate):
        expected = reference.gated_weight_grad(d, x_bits, 33, gate_bits)
        assert_close(ops.gated_weight_grad(d, x_bits, 33, gate_bits), expected, 700)


# on both sides of the kernels' tiles, vectors, blocks of outputs and chunks of samples
@pytest.mark.parametrize("m", [0, 1, 127, 129, 300])
@pytest.mark.parametrize("n, k", [(1, 1), (7, 5), (64, 48), (65, 49), (3, 300), (130, 784)])
def test_real_weight_grad(isa, m, n, k):
    d, x = torch.randn(m, n), torch.randn(m, k)
    expected = reference.real_weight_grad(d, x)
    assert_close(ops.real_weight_grad(d, x), expected, m)
    assert_close(ops.real_weight_grad(d.T.contiguous().T, x.T.contiguous().T), expected, m)
    whole = torch.randint(-9, 10, (m, n)).float(), torch.randint(-9, 10, (m, k)).float()
    assert torch.equal(ops.real_weight_grad(*whole), reference.real_weight_grad(*whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_arguments_give_their_own_dtype(isa, dtype):
    m, n, k = 9, 33, 70
    w_bits, gate = bits_of(n, k), gate_of("per sample", m, k)
    d, x = torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)
    x_bits = ops.pack_signs(x)
    assert_close(ops.sign_matmul(d, w_bits, k), reference.sign_matmul(d, w_bits, k), n)
    assert_close(ops.sign_matmul_t(x, w_bits, k), reference.sign_matmul_t(x, w_bits, k), k)
    assert_close(ops.gated_input_grad(d, w_bits, x, gate), reference.gated_input_grad(d, w_bits, x, gate), n)
    assert_close(ops.gated_weight_grad(d, x_bits, k, gate), reference.gated_weight_grad(d, x_bits, k, gate), m)
    assert_close(ops.real_weight_grad(d, x), reference.real_weight_grad(d, x), m)
    assert torch.equal(
        ops.sample_engram(x, torch.tensor([3, 0]), 0.2), reference.sample_engram(x, torch.tensor([3, 0]), 0.2)
    )


# ---- engrams


def test_philox_known_answers():
    """Vectors of the Random123 distribution for philox4x32-10."""
    zero = reference.philox(torch.tensor([0, 0]), 1, 4)
    assert [hex(v) for v in zero[0].tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, math.inf])
def test_gumbel_top_k_is_bit_exact(isa, k, temperature):
    score = torch.randn(6, k)
    score[0] = 0.5  # ties throughout
    for rate in (0.01, 0.1, 0.5, 1.0):
        seed = torch.tensor([0x123456789ABCDEF, 5])
        gate = ops.sample_engram(score, seed, rate, temperature=temperature, first_row=2**33 + 1)
        expected = reference.sample_engram(score, seed, rate, temperature=temperature, first_row=2**33 + 1)
        assert torch.equal(gate, expected)
        assert (reference._unpack(gate, k).sum(1) == max(1, round(rate * k))).all()


@pytest.mark.parametrize("k", SIZES)
def test_bernoulli_is_bit_exact(isa, k):
    for rate in (1e-3, 0.1, 0.5, 1.0):
        seed = torch.tensor([-7, 2**32 - 1])
        gate = ops.sample_engram(torch.empty(6, k), seed, rate, "bernoulli")
        assert torch.equal(gate, reference.sample_engram(torch.empty(6, k), seed, rate, "bernoulli"))
    assert reference._unpack(gate, k).all()  # rate 1 recruits everyone


def test_bernoulli_recruits_at_its_rate():
    gate = reference._unpack(ops.sample_engram(torch.empty(500, 1000), ops.draw_seed(), 0.1, "bernoulli"), 1000)
    assert abs(gate.float().mean().item() - 0.1) < 5 * math.sqrt(0.09 / 5e5)


def test_gumbel_top_1_draws_from_the_softmax():
    score = torch.tensor([0.0, 1.0, 2.0, -1.0])
    rows, temperature = 40000, 0.7
    gate = ops.sample_engram(score.expand(rows, 4), ops.draw_seed(), 0.25, temperature=temperature)
    frequency = reference._unpack(gate, 4).double().mean(0)
    expected = torch.softmax(score.double() / temperature, 0)
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / rows).sqrt()).all()


def test_natural_log_is_accurate():
    x = torch.logspace(-37, 38, 20001, dtype=torch.float64).float()
    error = (reference.natural_log(x).double() - x.double().log()).abs()
    assert (error <= 3e-7 * x.double().log().abs().clamp(min=1)).all()


def test_a_rank_draws_what_one_process_would_have_drawn(isa):
    score, seed = torch.randn(10, 200), ops.draw_seed()
    for rule in ("gumbel_top_k", "bernoulli"):
        whole = ops.sample_engram(score, seed, 0.1, rule)
        parts = [ops.sample_engram(score[i : i + 5], seed, 0.1, rule, first_row=i) for i in (0, 5)]
        assert torch.equal(whole, torch.cat(parts))
        for rank in range(3):
            part = ops.sample_engram(score[rank::3], seed, 0.1, rule, first_row=rank, row_step=3)
            assert torch.equal(whole[rank::3], part)


# ---- the update


def update_arguments(n, k):
    weight, grad = torch.randn(n, k) * 0.2, torch.randn(n, k)
    return weight, grad, torch.randn(n, k) * 0.1, torch.rand(n, k), reference.pack_signs(weight)


ADAM = dict(lr=5e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2, metaplasticity=1.35, step=3)


def update_state(weight, state_dtype):
    """Zero moments, and the keyword arguments that go with them."""
    (n, k), second = weight.shape, torch.uint8 if state_dtype == torch.int8 else state_dtype
    moments = torch.zeros(n, k, dtype=state_dtype), torch.zeros(n, k, dtype=second)
    scales = {}
    if state_dtype == torch.int8:
        scales = {name: torch.zeros(n, -(-k // 64)) for name in ("exp_avg_scale", "exp_avg_sq_scale")}
    return moments, scales | {"seed": torch.tensor([5, 0])}


@pytest.mark.parametrize("weight_bound", [math.inf, 0.3])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_update_leaves_weights_as_they_were_where_a_gradient_is_not_finite(isa, state_dtype, weight_bound):
    last_nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()  # rounding would carry it to -0
    for dtype, unit, value in itertools.product(
        (torch.float32, torch.bfloat16), (0, 37, 63, 64, 69), (math.nan, last_nan, math.inf, -math.inf)
    ):
        weight, grad = torch.empty(3, 70).uniform_(-0.3, 0.3).to(dtype), torch.randn(3, 70)
        before, sign_bits = weight.clone(), reference.pack_signs(weight)
        moments, settings = update_state(weight, state_dtype)
        grad[1, unit] = value
        other = torch.ones(3, 70, dtype=torch.bool)
        other[1, unit] = False
        with pytest.raises(RuntimeError, match="grad: expected finite steps"):
            ops.metaplastic_adam_(
                weight, grad, *moments, sign_bits, **ADAM, weight_bound=weight_bound, **settings
            )  # fmt: skip
        assert weight[1, unit] == before[1, unit] and moments[0][1, unit] == 0
        assert not weight.isnan().any() and torch.equal(sign_bits, reference.pack_signs(weight))
        assert moments[0].float().isfinite().all() and moments[1].float().isfinite().all()
        assert (weight != before)[other].float().mean() > 0.9  # a small step may round to none in bfloat16


@pytest.mark.parametrize("metaplasticity", [0.0, math.inf])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_update_at_the_edges_of_its_formula(isa, eps, metaplasticity):
    """Weights of 0, gradients of 0 and so small that their squares vanish."""
    weight = torch.tensor([[0.0, -0.0, 0.5, -0.5, 1e-30, 0.0, 0.2]]).repeat(3, 10)
    grad = torch.tensor([[1.0], [0.0], [-1e-30]]).expand_as(weight).contiguous()
    state = torch.zeros_like(weight), torch.zeros_like(weight)
    expected, expected_state = weight.clone(), [t.clone() for t in state]
    settings = ADAM | dict(eps=eps, metaplasticity=metaplasticity, weight_decay=0.0)
    raised = []
    for module, w, moments in ((reference, expected, expected_state), (ops, weight, state)):
        try:
            module.metaplastic_adam_(w, grad, *moments, None, **settings)
            raised.append(None)
        except RuntimeError as error:
            raised.append(str(error))
    assert raised[0] == raised[1] and (raised[0] is None) == (eps > 0)  # 0 / 0 is no step
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state, tuple(expected_state))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_first_moment_that_only_decays_reaches_zero(isa, state_dtype):
    least = torch.finfo(torch.float32).tiny
    exp_avg = torch.tensor([[2.0, 1.05, -1.05, 0.5, -0.1, 0.0]]).mul(least).repeat(3, 20).to(state_dtype)
    weight, seed = torch.randn(3, 120), torch.tensor([7, 0])
    moments = exp_avg, torch.full_like(exp_avg, 1e-6)
    theirs = [t.clone() for t in moments]
    settings = ADAM | {"weight_decay": 0.0, "seed": seed}
    ops.metaplastic_adam_(weight.clone(), torch.zeros(3, 120), *moments, None, **settings)
    reference.metaplastic_adam_(weight, torch.zeros(3, 120), *theirs, None, **settings)
    assert torch.equal(moments[0], theirs[0])
    assert moments[0].tolist()[0][:6] == [pytest.approx(1.8 * least, rel=0.01), 0.0, 0.0, 0.0, 0.0, 0.0]


def test_update_refuses_arguments_that_share_memory(isa):
    names = ("weight", "grad", "exp_avg", "exp_avg_sq")
    for one, other in itertools.combinations(range(4), 2):
        tensors = [torch.randn(4, 70).abs() for _ in names]
        before = [t.clone() for t in tensors]
        shared = torch.cat([tensors[one].view(-1), torch.zeros(70)])
        tensors[one], tensors[other] = shared[:280].view(4, 70), shared[70:].view(4, 70)  # a row apart
        before[one], before[other] = tensors[one].clone(), tensors[other].clone()
        with pytest.raises(RuntimeError, match=r"\w+: expected memory of its own, got some that \w+ shares"):
            ops.metaplastic_adam_(tensors[0], tensors[1], tensors[2], tensors[3], None, **ADAM)
        assert all(map(torch.equal, tensors, before))
    weight, _, *state = update_arguments(4, 128)
    d = weight[:3, :4].contiguous()
    for sharing in (weight.view(-1)[:12].view(3, 4), state[0].view(-1)[:12].view(3, 4)):
        with pytest.raises(RuntimeError, match="d: expected memory of its own"):
            ops.gated_metaplastic_adam_(sharing, bits_of(3, 128), None, weight, *state, **ADAM)
    ops.gated_metaplastic_adam_(d, bits_of(3, 128), None, weight, *state, **ADAM)
    both = torch.zeros(8, 70)  # neighbours are no overlap
    ops.metaplastic_adam_(both[:4], torch.randn(4, 70), both[4:], torch.zeros(4, 70), None, **ADAM)


@pytest.mark.parametrize("k", SIZES)
def test_metaplastic_adam_agrees_and_writes_fresh_bits(isa, k):
    for metaplasticity, weight_bound in [(0.0, math.inf), (1.35, 0.1), (1.35, math.inf), (30.0, 0.25), (30.0, 1e-30)]:
        mine = update_arguments(7, k)
        theirs = [t.clone() for t in mine]
        settings = ADAM | {"metaplasticity": metaplasticity, "weight_bound": weight_bound}
        ops.metaplastic_adam_(*mine, **settings)
        reference.metaplastic_adam_(*theirs, **settings)
        for a, b in zip(mine[:4], theirs[:4], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
        assert torch.equal(mine[4], reference.pack_signs(mine[0]))


def test_metaplastic_adam_is_the_same_on_every_isa():
    results, first = [], update_arguments(9, 1000)
    before = ops.isa()
    for name in ops.available_isas():
        ops.set_isa(name)
        arguments = [t.clone() for t in first + first]
        ops.metaplastic_adam_(*arguments[:5], **ADAM)
        ops.metaplastic_adam_(*arguments[5:], **ADAM, weight_bound=0.1)
        results.append(arguments)
    ops.set_isa(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


STATES = [torch.float32, torch.bfloat16, torch.int8]


def compact_arguments(n, k, weight_dtype, state_dtype):
    """Weight, moments as two steps from zero leave them, sign bits, and the keyword arguments of a compact update."""
    weight = (torch.randn(n, k) * 0.2).to(weight_dtype)
    second = torch.uint8 if state_dtype == torch.int8 else state_dtype
    state = [torch.zeros(n, k, dtype=state_dtype), torch.zeros(n, k, dtype=second)]
    settings = ADAM | {"seed": torch.tensor([-5, 2**32 - 1]), "first_row": 2**33}
    if state_dtype == torch.int8:
        settings |= {name: torch.zeros(n, -(-k // 64)) for name in ("exp_avg_scale", "exp_avg_sq_scale")}
    arguments = [weight, *state, reference.pack_signs(weight)]
    for step in (1, 2):
        grad = torch.randn(n, k) * torch.randn(n, k).exp()
        reference.metaplastic_adam_(arguments[0], grad, *arguments[1:], **settings | {"step": step})
    return arguments, settings


def cloned(arguments, settings):
    copies = {name: value.clone() for name, value in settings.items() if isinstance(value, torch.Tensor)}
    return [t.clone() for t in arguments], settings | copies


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("k", [1, 63, 64, 130, 1000])
@pytest.mark.parametrize("weight_bound", [math.inf, 0.15])
def test_compact_updates_agree(isa, weight_bound, k, state_dtype, weight_dtype):
    mine, settings = compact_arguments(7, k, weight_dtype, state_dtype)
    settings |= {"weight_bound": weight_bound}
    theirs, their_settings = cloned(mine, settings)
    grad = (torch.randn(7, k)).to(weight_dtype)
    ops.metaplastic_adam_(mine[0], grad, *mine[1:], **settings)
    reference.metaplastic_adam_(theirs[0], grad, *theirs[1:], **their_settings)
    for a, b in zip(mine[1:3], theirs[1:3], strict=True):  # moments, codes included: every bit
        assert torch.equal(a, b)
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        assert name not in settings or torch.equal(settings[name], their_settings[name])
    if weight_dtype == torch.float32:
        torch.testing.assert_close(mine[0], theirs[0], rtol=2e-6, atol=1e-7)
    else:  # the last bit of the sum before rounding may tip it over
        torch.testing.assert_close(mine[0], theirs[0], rtol=2**-7, atol=0)
        assert (mine[0] != theirs[0]).float().mean() <= max(0.005, 1 / mine[0].numel())
    assert torch.equal(mine[3], reference.pack_signs(mine[0]))


@pytest.mark.parametrize("exponent", [-126, -111, -110, -96, -95, -94, -30, 60, 124, 125, 126])
def test_compact_moments_agree_at_the_ends_of_their_scales(isa, exponent):
    mine, settings = compact_arguments(4, 130, torch.bfloat16, torch.int8)
    mine[1] = torch.randint(-127, 128, (4, 130), dtype=torch.int8)
    mine[2] = torch.randint(256, (4, 130), dtype=torch.uint8)
    for name, most in (("exp_avg_scale", 120), ("exp_avg_sq_scale", 126)):  # whose quotient is finite
        settings[name].fill_(2.0 ** min(exponent, most))[0] = 0
    theirs, their_settings = cloned(mine, settings)
    grad = (torch.randn(4, 130) * 2.0 ** min(exponent / 2, 50)).bfloat16()
    ops.metaplastic_adam_(mine[0], grad, *mine[1:], **settings)
    reference.metaplastic_adam_(theirs[0], grad, *theirs[1:], **their_settings)
    assert torch.equal(mine[1], theirs[1]) and torch.equal(mine[2], theirs[2])
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        assert torch.equal(settings[name], their_settings[name])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", STATES)
def test_a_gradient_that_is_not_finite_changes_nothing_beside_it(isa, state_dtype, weight_dtype):
    """Words that hold one are worked on number by number, all others at once: to the same bits."""
    arguments, settings = compact_arguments(5, 150, weight_dtype, state_dtype)
    alone = torch.zeros(150, dtype=torch.bool)
    alone[[3, 66, 149]] = True  # one in every word, with moments that set no scale
    arguments[1][:, alone], arguments[2][:, alone] = 0, 1 if state_dtype == torch.int8 else 1e-6
    settings |= {"weight_decay": 0.0, "weight_bound": 0.3}
    grad = torch.randn(5, 150).to(weight_dtype)
    grad[:, alone] = 0.0
    broken, broken_settings = cloned(arguments, settings)
    ops.metaplastic_adam_(arguments[0], grad, *arguments[1:], **settings)
    grad[:, alone] = math.nan
    with pytest.raises(RuntimeError, match="grad: expected finite steps"):
        ops.metaplastic_adam_(broken[0], grad, *broken[1:], **broken_settings)
    for a, b in zip(arguments[:3], broken[:3], strict=True):
        assert torch.equal(a[:, ~alone], b[:, ~alone])
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        assert name not in settings or torch.equal(settings[name], broken_settings[name])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("k", [1, 63, 64, 130, 1000])
@pytest.mark.parametrize("weight_bound", [0.125, 0.1, 0.3, 50.0])
def test_a_bound_clips_what_the_unbounded_update_gives_and_nothing_else(
    isa, weight_bound, k, state_dtype, weight_dtype
):
    mine, settings = compact_arguments(7, k, weight_dtype, state_dtype)
    theirs, their_settings = cloned(mine, settings)
    grad = torch.randn(7, k)
    ops.metaplastic_adam_(mine[0], grad, *mine[1:], **settings, weight_bound=weight_bound)
    ops.metaplastic_adam_(theirs[0], grad, *theirs[1:], **their_settings)
    bound = torch.full((7, k), weight_bound)
    if weight_dtype == torch.bfloat16:  # rounding keeps order: as well clip to what the bound is rounded to
        bound = reference.round_to_bfloat16(
            bound, reference.rounding_draws(settings["seed"], 7, k, settings["first_row"]) >> 16
        )
    expected = torch.maximum(torch.minimum(theirs[0], bound), -bound)
    assert torch.equal(mine[0].view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(mine[3], reference.pack_signs(expected))
    for a, b in zip(mine[1:3], theirs[1:3], strict=True):
        assert torch.equal(a, b)
    if weight_bound == 0.125 or weight_dtype == torch.float32:
        assert (mine[0].abs() <= torch.tensor(weight_bound)).all()  # the bound in float32


def test_weights_come_to_the_bound_from_however_far_beyond(isa):
    settings = ADAM | {"weight_decay": 0.0, "weight_bound": 1.0, "seed": torch.tensor([5, 0])}
    for dtype in (torch.float32, torch.bfloat16):
        weight, zeros = torch.tensor([[1e38, -1e38, 2.0, -2.0, 0.5, -0.5] * 12]), torch.zeros(1, 72)
        bounded, grad = weight.to(dtype), torch.randn(1, 72)
        ops.metaplastic_adam_(bounded, zeros, zeros.clone(), zeros.clone(), None, **settings)
        assert torch.equal(bounded, weight.clamp(-1, 1).to(dtype))
        infinite_step = settings | {"lr": 1e300, "metaplasticity": 0.0}
        ops.metaplastic_adam_(bounded, grad, zeros.clone(), zeros.clone(), None, **infinite_step)
        assert torch.equal(bounded, -grad.sign().to(dtype))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("gate", GATES)
def test_the_fused_update_is_the_two_operators_one_after_the_other(isa, gate, state_dtype, weight_dtype):
    for m, n, k in [(20, 3, 7), (100, 70, 1030), (0, 5, 65), (300, 130, 129)]:
        fused, settings = compact_arguments(n, k, weight_dtype, state_dtype)
        settings |= {"weight_bound": math.inf if k == 7 else 0.2}
        apart, apart_settings = cloned(fused, settings)
        d, x_bits, gate_bits = torch.randn(m, n), bits_of(m, k), None if m == 0 else gate_of(gate, m, k)
        ops.gated_metaplastic_adam_(d, x_bits, gate_bits, *fused, **settings)
        grad = ops.gated_weight_grad(d, x_bits, k, gate_bits)
        ops.metaplastic_adam_(apart[0], grad, *apart[1:], **apart_settings)
        for a, b in zip([*fused, *settings.values()], [*apart, *apart_settings.values()], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", STATES)
def test_the_fused_update_of_a_real_input_is_the_two_operators_one_after_the_other(isa, state_dtype, weight_dtype):
    for m, n, k in [(20, 3, 7), (100, 70, 1030), (0, 5, 65), (300, 130, 129)]:
        fused, settings = compact_arguments(n, k, weight_dtype, state_dtype)
        apart, apart_settings = cloned(fused, settings)
        d, x = torch.randn(m, n), torch.randn(m, k)
        ops.real_metaplastic_adam_(d, x, *fused, **settings)
        ops.metaplastic_adam_(apart[0], ops.real_weight_grad(d, x), *apart[1:], **apart_settings)
        for a, b in zip([*fused, *settings.values()], [*apart, *apart_settings.values()], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("moment, smallest_step", [("first", 2**-18), ("second", 2**-34)])
def test_compact_moments_round_without_bias(moment, smallest_step):
    width = 16
    encode, decode = (getattr(reference, f"{name}_{moment}_moment") for name in ("encode", "decode"))
    x = torch.randn(1, 64).exp()
    x[0, :5] = torch.tensor([1.0, 1e-3, 1e-5, 0.0, 1500.0])  # the largest, which rounds within its octave
    draws = torch.randperm(2**width).unsqueeze(1).expand(-1, 64)  # every draw once
    codes, scale = encode(x.expand(2**width, 64), draws)
    mean = decode(codes, scale).double().mean(0)
    # a step of the format is at most an eighth of the number, plus the smallest step; draws divide it evenly
    smallest = scale[0, 0] * smallest_step
    step = x[0] / 8 + smallest
    assert ((mean - x[0]).abs() <= step * 2.0**-width + (smallest if moment == "second" else 0)).all()
    again, _ = encode(decode(codes, scale), draws)
    assert torch.equal(again, codes)  # what is representable does not move


def test_stochastic_rounding_to_bfloat16_is_unbiased():
    x = torch.tensor([1.0, 1.001, -3.3, 1e-20, 0.0])
    draws = torch.arange(2**16).unsqueeze(1).expand(-1, 5)
    rounded = reference.round_to_bfloat16(x.expand(2**16, 5), draws).double()
    assert ((rounded.mean(0) - x.double()).abs() <= x.abs() * 1e-9).all()
    assert (rounded[:, 0] == 1).all() and (rounded[:, 4] == 0).all()


@pytest.mark.parametrize("state_dtype", STATES)
def test_updates_write_every_bit_of_the_signs(isa, state_dtype):
    for k in (1, 64, 65, 129, 200):
        (weight, *state, bits), settings = compact_arguments(3, k, torch.float32, state_dtype)
        bits.fill_(-1)
        ops.metaplastic_adam_(weight, torch.randn(3, k), *state, bits, **settings)
        assert torch.equal(bits, reference.pack_signs(weight))


def test_an_overflow_does_not_spread_over_its_block(isa):
    (weight, *state, bits), settings = compact_arguments(1, 64, torch.float32, torch.int8)
    theirs, their_settings = cloned([weight, *state, bits], settings)
    for step in range(3, 9):
        grad = torch.ones(1, 64)
        if step == 3:
            grad[0, 5] = 1e25  # its square is infinite
        ops.metaplastic_adam_(weight, grad, *state, bits, **settings | {"step": step})
        reference.metaplastic_adam_(theirs[0], grad, *theirs[1:], **their_settings | {"step": step})
        assert torch.equal(state[0], theirs[1]) and torch.equal(state[1], theirs[2])
        theirs[0].copy_(weight)
    v = reference.decode_second_moment(state[1], settings["exp_avg_sq_scale"])
    assert v.isfinite().all() and weight.isfinite().all()


def test_a_second_moment_never_vanishes_beside_a_larger_one(isa):
    weight, grad = torch.zeros(1, 64), torch.full((1, 64), 1e-12)
    grad[0, 0] = 1.0
    state = [torch.zeros(1, 64, dtype=torch.int8), torch.zeros(1, 64, dtype=torch.uint8)]
    settings = ADAM | {name: torch.zeros(1, 1) for name in ("exp_avg_scale", "exp_avg_sq_scale")}
    for step in range(1, 30):
        before = weight.clone()
        ops.metaplastic_adam_(weight, grad, *state, None, **settings | {"step": step, "seed": torch.tensor([1, step])})
        assert ((weight - before).abs() <= 10 * ADAM["lr"]).all()


def test_metaplastic_adam_bumps_version_counters():
    arguments = update_arguments(3, 5)
    before = [t._version for t in arguments]
    ops.metaplastic_adam_(*arguments, **ADAM)
    changed = [t._version > version for t, version in zip(arguments, before, strict=True)]
    assert changed == [True, False, True, True, True]


@pytest.mark.parametrize("beta2", [0.999, 0.9999999, 1 - 1e-8])
def test_metaplastic_adam_with_slow_second_moments(isa, beta2):
    mine = update_arguments(3, 5)
    mine[3].zero_()
    theirs = [t.double() for t in mine[:4]]
    settings = ADAM | {"beta2": beta2, "weight_decay": 0.0}
    ops.metaplastic_adam_(*mine, **settings)
    reference.metaplastic_adam_(*theirs, None, **settings)
    torch.testing.assert_close(mine[0].double(), theirs[0], rtol=1e-5, atol=1e-6)


# ---- threads


def test_results_do_not_depend_on_the_number_of_threads(isa):
    m, n, k = 300, 257, 1000
    x, d, score = torch.randn(m, k), torch.randn(m, n), torch.randn(m, k)
    w_bits, x_bits, gate = bits_of(n, k), reference.pack_signs(x), gate_of("per sample", m, k)
    seed, before = torch.tensor([9, 0]), torch.get_num_threads()

    def everything():
        update = update_arguments_fixed()
        ops.metaplastic_adam_(*update, **ADAM)
        return [
            ops.pack_signs(x),
            ops.binary_matmul(x_bits, w_bits, k, gate),
            ops.binary_matmul(x_bits, w_bits[:10], k, gate),
            ops.sign_matmul(d, w_bits, k),
            ops.sign_matmul_t(x, w_bits, k),
            ops.gated_input_grad(d, w_bits, x, gate),
            ops.gated_input_grad(d, w_bits, x * 0.1),
            ops.gated_weight_grad(d, x_bits, k, gate),
            ops.real_weight_grad(d, x),
            ops.sample_engram(score, seed, 0.1),
            *ops.standardise(score),
            ops.standardise_grad(score, score, ops.standardise(score)[1]),
            *update,
        ]

    fixed = update_arguments(400, k)

    def update_arguments_fixed():
        return [t.clone() for t in fixed]

    try:
        torch.set_num_threads(1)
        alone = everything()
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(alone, everything(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


# ---- torch.library


def packed_network_cases(m, n, k):
    """One of bytes that ends in an affine stage, one of signs with a gate that ends in its own gate, and read-outs."""
    x, x_bits, w_bits = torch.randint(256, (m, k), dtype=torch.uint8), bits_of(m, k), bits_of(n, k)
    sums, samples = torch.randn(4), torch.tensor([3, 0, 1, 2])
    return [
        (
            x, None, [0, k, 1, 1, 0, n, 0, 5, 1, 1, 1], [0.5],
            [w_bits, reference.group_signs(w_bits, k), bits_of(4, n), torch.randn(4), torch.randn(4)],
        ),
        (x_bits, gate_of("per sample", m, k), [0, k, 0, 3, 4, 3], [], [w_bits]),
        (x_bits, None, [0, k, 0, 3, 4, 0, 6, 2, 4], [], [w_bits, bits_of(8, n), torch.randn(8)]),
        (x_bits, None, [0, k, 0, 3, 4, 1, 7, 4], [], [w_bits, bits_of(4, n), sums, samples]),
        (x_bits, None, [0, k, 0, 3, 4, 1, 8], [], [w_bits, torch.randn(4, n), sums, sums, samples]),
        *packed_image_cases(m),
    ]  # fmt: skip


def packed_image_cases(m):
    """Of bytes: two convolutions, whose thresholds are those of a row of pixels and of a sample, a pool, a product. Of
    signs with a gate: two groups, a transpose, a gate."""
    first = reference.Window(8, 6, 3, 3, 3, top=1, bottom=1, left=1, right=1)
    second = reference.Window(8, 6, 64, 3, 2, 2, 1, top=1, dilation_w=2)
    pool = reference.Window(second.out_height, second.out_width, 20, 2, 2, right=1)
    grouped = reference.Window(5, 4, 6, 2, 2, groups=2)
    x, w1, w2 = torch.randint(256, (m, first.units), dtype=torch.uint8), bits_of(64, 27), bits_of(20, 64 * 6)
    seen, pooled = second.out_height * second.out_width * 20, pool.out_height * pool.out_width * 20
    product = [0, pooled, 0]
    return [
        (
            x, None, [9, *first, 1, 2, 9, *second, 0, 2, 10, *pool, 1, *product], [],
            [
                w1, reference.group_signs(w1, 27), torch.randint(-900, 900, (128,)).int(), bits_of(1, 128)[0],
                w2, torch.randint(-9, 9, (seen,)).int(), bits_of(1, seen)[0], bits_of(1, pooled)[0], bits_of(4, pooled),
            ],
        ),
        (
            bits_of(m, grouped.units), gate_of("per sample", m, grouped.units),
            [9, *grouped, 0, 11, 12, 4, 1, 0, 48, 0, 3, 2, 0], [], [bits_of(4, 12), bits_of(5, 48)],
        ),
    ]  # fmt: skip


def patches(m, height, width, channels, *, size, filters, units, pool=3):
    """Arguments of patch_excitability."""
    images = torch.randint(0, 256, (m, height, width, channels)).to(torch.uint8)
    taps = torch.randint(-1, 2, (filters, size, size)).to(torch.int8)
    places = (height - size - pool + 2) * (width - size - pool + 2)
    return images, taps, torch.randint(0, places * channels * filters, (units,)).sort().values, 25.5, pool


def opcheck_cases():
    m, n, k = 5, 9, 70
    x, d = torch.randn(m, k), torch.randn(m, n)
    x_bits, w_bits, gate = reference.pack_signs(x), bits_of(n, k), gate_of("per sample", m, k)
    seed = torch.tensor([1, 0])
    weight, grad, avg, avg_sq, bits = update_arguments(n, k)
    threshold = torch.arange(k, dtype=torch.int32) - k // 2
    return {
        "pack_signs": [(x,), (x.bfloat16(),)],
        "pack_window": [(x, 1.0, gate), (x, 0.5, None)],
        "unpack_signs": [(x_bits, k, torch.float32)],
        "transpose_bits": [(x_bits, k)],
        "binary_matmul": [(x_bits, w_bits, k, gate), (x_bits, w_bits, k, gate[0].clone()), (x_bits, w_bits, k)],
        "sign_matmul": [(d.clone().requires_grad_(), w_bits, k), (d.bfloat16(), w_bits, k)],
        "sign_matmul_t": [
            (x.clone().requires_grad_(), w_bits, k),
            (x.half(), w_bits, k),
            ((x.abs() * 50).to(torch.uint8), w_bits, k),
            ((x.abs() * 50).to(torch.uint8), w_bits, k, reference.group_signs(w_bits, k)),
        ],
        "standardise": [(x,), (x.half(), 0.1)],
        "standardise_grad": [(x, x, reference.standardise(x)[1]), (x, x.bfloat16(), reference.standardise(x)[1])],
        "value_signs": [((x * 9).int(),), ((x * 9).int(), threshold), ((x * 9).int(), threshold, threshold > 0)],
        "top_units": [((x * 9).int(), 3)],
        "packed_network": packed_network_cases(m, n, k),
        "patch_excitability": [patches(2, 9, 8, 2, size=3, filters=4, units=20)],
        "gated_input_grad": [(d, w_bits, x, gate), (d, w_bits, x)],
        "masked_input_grad": [(d, w_bits, k, gate)],
        "gated_weight_grad": [(d, x_bits, k, gate), (d, x_bits, k)],
        "real_weight_grad": [(d, x)],
        "sample_engram": [(x, seed, 0.1), (x, seed, 0.1, True)],
        "metaplastic_adam_": [(weight, grad, avg, avg_sq, bits), (weight, grad, avg, avg_sq, None)],
        "gated_metaplastic_adam_": [(d, x_bits, gate, weight, avg, avg_sq, bits)],
        "real_metaplastic_adam_": [(d, x, weight, avg, avg_sq, bits)],
    }


@pytest.mark.parametrize("name", list(opcheck_cases()))
def test_opcheck(name):
    for arguments in opcheck_cases()[name]:
        for kwargs in [ADAM, ADAM | {"weight_bound": 0.1}] if name.endswith("adam_") else [{}]:
            opcheck(getattr(torch.ops.engram_kernels, name).default, arguments, kwargs)


def test_every_operator_has_a_reference_of_the_same_name_and_arguments():
    import inspect

    for name in opcheck_cases():
        mine, theirs = (inspect.signature(getattr(module, name)) for module in (ops, reference))
        assert mine == theirs, name


def test_gradients_of_the_sign_products_agree_with_autograd_through_the_reference():
    n, k = 33, 70
    w_bits = bits_of(n, k)
    for op, size in (("sign_matmul", n), ("sign_matmul_t", k)):
        a = torch.randn(4, size, requires_grad=True)
        b = a.detach().clone().requires_grad_()
        getattr(ops, op)(a, w_bits, k).square().sum().backward()
        getattr(reference, op)(b, w_bits, k).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("m", [0, 1, 5, 70, 300])
def test_packed_networks(isa, m):
    for x, gate, layout, factors, tensors in packed_network_cases(m, 131, 70):
        expected = reference.packed_network(x, gate, layout, factors, tensors)
        before = torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = ops.packed_network(x, gate, layout, factors, tensors)
            torch.set_num_threads(before)
            if layout[-1] == 8:  # sums of floats
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(y, expected), layout


IMAGE = reference.Window(2, 2, 2, 1, 1)


@pytest.mark.parametrize(
    "layout, tensors, message",
    [
        ([], [], "layout: expected a product or a convolution as the first stage, got nothing"),
        ([1], [], "layout: expected a product or a convolution as the first stage, got another"),
        ([0, 70], [], "layout: expected more than 2 numbers"),
        ([0, 70, 0], [], "tensors: expected more than 0, which the layout names"),
        ([0, 70, 0], [(9, 70), (9, 70)], "tensors: expected 1, got 2"),
        ([0, 200, 0], [(9, 70)], r"tensors\[0\]: expected int64 of sizes -1 4 .*, got int64 \(9, 2\)"),
        ([0, 70, 0, 0, 9, 0], [(9, 70), (3, 9)], "layout: expected signs before each product but the first, got none"),
        ([0, 70, 0, 1, 0, 8, 0], [(9, 70), (3, 8)], "layout: expected a product of 9 inputs, got 8"),
        ([0, 70, 0, 3, 10, 0], [(9, 70)], "layout: expected 1 to 9 as number 4, got 10"),
        ([0, 70, 0, 7, 4], [(9, 70)], "layout: expected a gate before a read-out, got none"),
        ([0, 70, 0, 12], [(9, 70)], "layout: expected 0 to 11 as number 3, got 12"),
        ([0, 70, 0, 11, 4, 2], [(9, 70)], "layout: expected a transpose of 9 units, got 4 x 2"),
        (
            [0, 70, 0, 1, 10, *IMAGE, 0],
            [(9, 70)],
            "layout: expected a max_pool of one group of the signs of 9 units, got",
        ),
        ([0, 70, 0, 10, *IMAGE, 0], [(8, 70)], "layout: expected a max_pool of one group of the signs of 8 units, got"),
        ([0, 70, 0, 1, 10, *IMAGE, 0], [(8, 70)], "layout: expected a stage that makes values at the end, got signs"),
        ([0, 70, 0, 1, 10, *IMAGE, 0, 1], [(8, 70)], "layout: expected values before stage 1, got signs alone"),
        ([9, *IMAGE, 1], [], r"tensors: expected more than 0"),
        ([9, *IMAGE[:-1], 3, 0], [], "layout: expected a number of groups that divides 2 channels, got 3"),
        ([9, *IMAGE[:3], 3, *IMAGE[4:], 0], [], "layout: expected a kernel that fits into the padded height 2, got"),
        ([9, *IMAGE[:6], 0, *IMAGE[7:], 0], [], "layout: expected 1 to 2147483647 as number 7, got 0"),
        ([0, 70, 0, 5, 1, 0, 0], [(9, 70)], "layout: expected 0 to 0 as number 4, got 1"),
        ([0, 70, 0, 5, 0, 0, 0, 1], [(9, 70)], "layout: expected integers before a stage of signs, got float32"),
    ],
)
def test_what_is_no_packed_network_is_named(layout, tensors, message):
    x, held = bits_of(3, 70), [bits_of(*shape) for shape in tensors]
    with pytest.raises(RuntimeError, match=message):
        ops.packed_network(x, None, layout, [], held)


def test_grouped_signs_of_more_outputs_than_a_block(isa):
    k, n = 300, 4133
    w_bits, x = bits_of(n, k), torch.full((5, k), 255, dtype=torch.uint8)  # sums that 16 bits do not hold
    expected = reference.sign_matmul_t(x, w_bits, k)
    assert torch.equal(ops.sign_matmul_t(x, w_bits, k, reference.group_signs(w_bits, k)), expected)


@pytest.mark.parametrize("n", SIZES)
def test_signs_and_most_excited_units_of_integers(isa, n):
    for m in (0, 1, 5):
        wide = torch.randint(-(2**31), 2**31, (m, n)).to(torch.int32)
        for y in (wide, wide % 5, wide % 5 - 7, torch.full((m, n), -3, dtype=torch.int32)):
            assert torch.equal(ops.value_signs(y), reference.value_signs(y))
            threshold, flip = torch.randint(-9, 9, (n,), dtype=torch.int32), torch.rand(n) < 0.5
            assert torch.equal(ops.value_signs(y, threshold), reference.value_signs(y, threshold))
            assert torch.equal(ops.value_signs(y, threshold, flip), reference.value_signs(y, threshold, flip))
            for count in {1, max(1, n // 10), n}:
                assert torch.equal(ops.top_units(y, count), reference.top_units(y, count)), (m, count)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 9, 11, 12, 13, 40])  # up to 11, sums are held in 16 bits
@pytest.mark.parametrize("pool", [1, 3, 4])
def test_patches_respond_as_the_reference_says(isa, size, pool):
    for m, channels, filters, units in [(0, 1, 1, 4), (1, 3, 5, 0), (33, 1, 32, 300), (70, 2, 7, 50)]:
        height, width = size + pool - 1 + m % 5, size + pool - 1 + units % 7
        x, w, *rest = patches(m, height, width, channels, size=size, filters=filters, units=units, pool=pool)
        for images in (x, x // 128 * 255, torch.full_like(x, 255)):
            for taps in (w, torch.ones_like(w), -torch.ones_like(w), w * 2 // 3 * 2 + 1):
                z = ops.patch_excitability(images, taps, *rest)
                assert torch.equal(z, reference.patch_excitability(images, taps, *rest))


# ---- bad input: the message names the argument, what it got and what it needs


def bad_calls():
    x, d, k = torch.randn(4, 70), torch.randn(4, 9), 70
    x_bits, w_bits = bits_of(4, k), bits_of(9, k)
    seed = torch.tensor([0, 0])
    update = update_arguments(3, 5)
    nan = torch.full((2, 3), math.nan)
    images, filters = torch.zeros(2, 9, 12, 1, dtype=torch.uint8), torch.zeros(4, 3, 3, dtype=torch.int8)
    no_units = torch.zeros(0, dtype=torch.int64)
    return {
        "pack float64": (lambda: ops.pack_signs(x.double()), r"x: expected float32.*got float64 \(4, 70\)"),
        "groups": (
            lambda: ops.sign_matmul_t(x.byte(), w_bits, k, torch.zeros(12, 31, dtype=torch.int16)),
            r"w_groups: expected int16 of shape \(6, 32\) for k = 70 and 9 rows, got int16 \(12, 31\)",
        ),
        "standardise integers": (lambda: ops.standardise(x.int()), r"y: expected float32, .*got int32 \(4, 70\)"),
        "standardise nothing": (
            lambda: ops.standardise(x[:, :0]),
            r"y: expected 1 to .* units .* got float32 \(4, 0\)",
        ),
        "eps": (lambda: ops.standardise(x, -1.0), "eps: expected at least 0, got -1"),
        "moments": (
            lambda: ops.standardise_grad(x, x, torch.zeros(4, 2)),
            r"moments: expected float64 \(4, 2\), .*got float32 \(4, 2\)",
        ),
        "gradient": (lambda: ops.standardise_grad(d, x, x), r"d: expected the shape of y, float32 \(4, 70\), got .*9"),
        "values": (lambda: ops.value_signs(x), r"y: expected int32 \(M, N\) .*got float32 \(4, 70\)"),
        "values threshold": (
            lambda: ops.value_signs(x.int(), torch.zeros(69, dtype=torch.int32)),
            r"threshold: expected int32 \(70,\), one for each unit of y, got int32 \(69,\)",
        ),
        "values flip": (
            lambda: ops.value_signs(x.int(), None, torch.zeros(70, dtype=torch.bool)),
            r"flip: expected None without thresholds, got bool \(70,\)",
        ),
        "top count": (lambda: ops.top_units(x.int(), 71), "count: expected 1 to 70, the units of y, got 71"),
        "patches": (
            lambda: ops.patch_excitability(torch.zeros(2, 9, 9, 1), filters, no_units, 1.0),
            r"images: expected uint8 \(M, height, width, channels\), got float32 \(2, 9, 9, 1\)",
        ),
        "patch filters": (
            lambda: ops.patch_excitability(images, filters[:, :2], no_units, 1.0),
            r"filters: expected int8 \(filters, size, size\) of 1 to 128 pixels, got int8 \(4, 2, 3\)",
        ),
        "patch taps": (
            lambda: ops.patch_excitability(images, filters + 2, no_units, 1.0),
            "filters: expected -1, 0 and 1, got 2",
        ),
        "patch size": (
            lambda: ops.patch_excitability(images, filters, no_units, 1.0, 8),
            "filters: expected at most 2 pixels for images of 9 x 12 and a pool of 8, got 3",
        ),
        "patch units": (
            lambda: ops.patch_excitability(images, filters, no_units.new_tensor([3, 1]), 1.0),
            "units: expected rising numbers from 0 to 159, got 1 at 1",
        ),
        "patch floor": (lambda: ops.patch_excitability(images, filters, no_units, 0.0), "floor: expected 1e-30 to"),
        "pack int": (lambda: ops.pack_signs(x.int()), r"x: expected float32.*got int32"),
        "pack scalar": (lambda: ops.pack_signs(torch.tensor(1.0)), "x: expected 1 to .* units in the last dim"),
        "pack nothing": (lambda: ops.pack_window(x[:, :0]), r"x: expected 1 to .* units .* got float32 \(4, 0\)"),
        "None": (lambda: ops.binary_matmul(None, w_bits, k), "x_bits: expected a tensor, got None"),
        "None among others": (
            lambda: ops.masked_input_grad(d, w_bits, k, None),
            "mask_bits: expected a tensor, got None",
        ),
        "None on meta": (
            lambda: ops.binary_matmul(None, w_bits.to("meta"), k),
            "x_bits: expected a tensor, got None",
        ),
        "None to update": (
            lambda: ops.metaplastic_adam_(update[0], None, *update[2:], **ADAM),
            "grad: expected a tensor, got None",
        ),
        "pack NaN": (lambda: ops.pack_signs(nan), "x: .*NaN"),
        "pack NaN bf16": (lambda: ops.pack_signs(nan.bfloat16()), "x: .*NaN"),
        "unpack k": (lambda: ops.unpack_signs(x_bits, 300), r"bits: .*\(\.\.\., 6\).*got int64 \(4, 2\)"),
        "unpack dtype": (lambda: ops.unpack_signs(x_bits, k, torch.bool), "dtype: .*got bool"),
        "k mismatch": (
            lambda: ops.binary_matmul(x_bits, w_bits, 784),
            r"x_bits: expected int64 of shape \(rows, 14\) for k = 784, got int64 \(4, 2\)",
        ),
        "k zero": (lambda: ops.binary_matmul(x_bits, w_bits, 0), r"k: expected 1 to 2\^31 - 1, got 0"),
        "k huge": (lambda: ops.unpack_signs(x_bits, 2**31), r"k: expected 1 to 2\^31 - 1, got 2147483648"),
        "words dtype": (lambda: ops.binary_matmul(x_bits, w_bits.int(), k), "w_bits: .*got int32"),
        "words 1-d": (lambda: ops.binary_matmul(x_bits[0], w_bits, k), r"x_bits: .*got int64 \(2,\)"),
        "gate rows": (
            lambda: ops.binary_matmul(x_bits, w_bits, k, w_bits),
            r"gate_bits: expected int64 of shape \(2,\) or \(4, 2\).*got int64 \(9, 2\)",
        ),
        "sign_matmul N": (lambda: ops.sign_matmul(x, w_bits, k), r"a: expected shape \(M, 9\).*got"),
        "sign_matmul_t K": (lambda: ops.sign_matmul_t(d, w_bits, k), r"x: expected shape \(M, 70\).*got"),
        "input_grad M": (lambda: ops.gated_input_grad(d[:2], w_bits, x), "x: expected 2 samples like d"),
        "weight_grad M": (lambda: ops.gated_weight_grad(d[:2], x_bits, k), "x_bits: expected 2 samples"),
        "real weight_grad M": (lambda: ops.real_weight_grad(d[:2], x), "x: expected 2 samples like d"),
        "real weight_grad dtype": (
            lambda: ops.real_weight_grad(d, x.half()),
            "x: expected float32 like d, got float16",
        ),
        "real update d": (
            lambda: ops.real_metaplastic_adam_(d, x, update[0], *update[2:], **ADAM),
            r"d: expected shape \(M, 3\) to meet the rows of the weight, got float32 \(4, 9\)",
        ),
        "real update x": (
            lambda: ops.real_metaplastic_adam_(d[:, :3], x, update[0], *update[2:], **ADAM),
            r"x: expected shape \(4, 5\), a row for each of d and a column .* of the weight, got float32 \(4, 70\)",
        ),
        "rate 0": (lambda: ops.sample_engram(x, seed, 0.0), r"rate: expected in \(0, 1\], got 0"),
        "rate 2": (lambda: ops.sample_engram(x, seed, 2.0), r"rate: expected in \(0, 1\], got 2"),
        "temperature": (lambda: ops.sample_engram(x, seed, 0.5, temperature=-1.0), "temperature: .*got -1"),
        "temperature NaN": (lambda: ops.sample_engram(x, seed, 0.5, temperature=math.nan), "temperature: .*nan"),
        "rule": (lambda: ops.sample_engram(x, seed, 0.5, "uniform"), "rule: .*got 'uniform'"),
        "seed": (lambda: ops.sample_engram(x, seed[:1], 0.5), r"seed: expected int64 \(2,\)"),
        "score NaN": (lambda: ops.sample_engram(nan, seed, 0.5), "score: .*NaN"),
        "update shape": (
            lambda: ops.metaplastic_adam_(update[0], update[1].T, *update[2:], **ADAM),
            r"grad: expected float32 or the weight's dtype, in .* shape float32 \(3, 5\), got float32 \(5, 3\)",
        ),
        "update strides": (
            lambda: ops.metaplastic_adam_(torch.randn(5, 3).T, *update[1:], **ADAM),
            "weight: expected contiguous memory",
        ),
        "update moments": (
            lambda: ops.metaplastic_adam_(update[0], update[1], update[2].bfloat16(), *update[3:], **ADAM),
            r"exp_avg_sq: expected bfloat16 \(3, 5\), got float32 \(3, 5\)",
        ),
        "update moment dtype": (
            lambda: ops.metaplastic_adam_(update[0], update[1], update[2].half(), *update[3:], **ADAM),
            "exp_avg: expected float32, bfloat16 or int8, got float16",
        ),
        "update without scales": (
            lambda: ops.metaplastic_adam_(update[0], update[1], update[2].char(), update[3].byte(), None, **ADAM),
            "exp_avg_scale: expected a tensor for int8 moments",
        ),
        "update without seed": (
            lambda: ops.metaplastic_adam_(update[0].bfloat16(), *update[1:], **ADAM),
            r"seed: expected int64 \(2,\).*got None",
        ),
        "fused d": (
            lambda: ops.gated_metaplastic_adam_(d, bits_of(4, 5), None, update[0], *update[2:], **ADAM),
            r"d: expected shape \(M, 3\).*got float32 \(4, 9\)",
        ),
        "fused samples": (
            lambda: ops.gated_metaplastic_adam_(d[:, :3], bits_of(6, 5), None, update[0], *update[2:], **ADAM),
            r"x_bits: expected 4 samples like d, got int64 \(6, 2\)",
        ),
        "uint8 shape": (lambda: ops.sign_matmul_t(torch.zeros(70, dtype=torch.uint8), w_bits, k), r"x: .*got uint8"),
        "update step": (lambda: ops.metaplastic_adam_(*update, **ADAM | {"step": 0}), "step: .*got 0"),
        "update beta": (lambda: ops.metaplastic_adam_(*update, **ADAM | {"beta1": 1.0}), "beta1: .*got 1"),
        "update bound 0": (lambda: ops.metaplastic_adam_(*update, **ADAM, weight_bound=0.0), "weight_bound: .*got 0"),
        "update bound -1": (lambda: ops.metaplastic_adam_(*update, **ADAM, weight_bound=-1), "weight_bound: .*got -1"),
        "update bound NaN": (
            lambda: ops.metaplastic_adam_(*update, **ADAM, weight_bound=math.nan),
            "weight_bound: expected above 0 in float32, got nan",
        ),
        "fused bound": (
            lambda: ops.gated_metaplastic_adam_(
                torch.ones(4, 3), bits_of(4, 5), None, update[0], *update[2:], **ADAM, weight_bound=1e-50
            ),
            "weight_bound: expected above 0 in float32, got 1e-50",
        ),
        "update NaN": (
            lambda: ops.metaplastic_adam_(update[0].clone(), update[1] * math.nan, *update[2:], **ADAM),
            "grad: expected finite steps",
        ),
        "device": (
            lambda: ops.binary_matmul(x_bits, w_bits.to("meta"), k),
            "w_bits: expected a tensor on cpu like x_bits, got one on meta",
        ),
        "device of a layer": (
            lambda: ek.BinaryEngramLinear(k, 9, device="meta")(x),
            "w_bits: expected a tensor on cpu like x, got one on meta",
        ),
        "isa": (lambda: ops.set_isa("sse9"), "ISA: expected one of .*scalar.*got 'sse9'"),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_input_is_named(name):
    call, message = bad_calls()[name]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_a_forced_instruction_set_is_used_and_an_unknown_one_refused():
    import subprocess
    import sys

    def run(name):
        return subprocess.run(
            [sys.executable, "-c", "import engram_kernels as ek; print(ek.ops.isa())"],
            env=os.environ | {"ENGRAM_ISA": name},
            capture_output=True,
            text=True,
        )

    assert run("scalar").stdout.strip() == "scalar"
    refused = run("sse9")
    assert refused.returncode != 0 and "ENGRAM_ISA: ISA: expected one of" in refused.stderr


def test_garbage_beyond_k_in_a_gate_cannot_reach_memory_outside():
    k = 70
    gate = torch.full((4, 2), -1)
    d, w_bits, x_bits = torch.randn(4, 9), bits_of(9, k), bits_of(4, k)
    assert_close(ops.masked_input_grad(d, w_bits, k, gate), reference.masked_input_grad(d, w_bits, k, gate), 9)
    assert_close(ops.gated_weight_grad(d, x_bits, k, gate), reference.gated_weight_grad(d, x_bits, k, gate), 4)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_calls_leave_no_memory_behind():
    x, seed = torch.randn(2, 64), torch.tensor([1, 0])
    bits, d = ops.pack_signs(x), torch.randn(2, 2)

    def calls(n):
        for _ in range(n):
            gate = ops.sample_engram(x, seed, 0.1)
            ops.binary_matmul(bits, bits, 64, gate)
            ops.masked_input_grad(d, bits, 64, gate)
            ops.gated_weight_grad(d, bits, 64, gate)
            ops.unpack_signs(bits, 64)

    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    calls(500)
    before = resident_bytes()
    calls(20_000)
    assert resident_bytes() - before < 500_000  # the smallest leak there can be, 48 bytes a call, would take 960 kB


def test_public_name():
    assert ek.ops is ops and ek.reference is reference


# ---- memory as it comes: unaligned, and with bits where no unit is


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """The same numbers a byte behind an address that suits their dtype, as in a mapped file."""
    size = t.numel() * t.element_size()
    memory = torch.empty(size + 17, dtype=torch.uint8)
    start = 16 - memory.data_ptr() % 16 + 1
    address = (ctypes.c_uint8 * size).from_address(memory.data_ptr() + start)
    view = torch.frombuffer(address, dtype=t.dtype).view(t.shape) if size else t
    view.copy_(t)
    view._memory = memory
    return view


def test_unaligned_arguments_give_the_same(isa):
    m, n, k = 5, 6, 100
    x, d, a = torch.randn(m, k), torch.randn(m, n), torch.randn(m, n)
    x_bits, w_bits, gate = bits_of(m, k), bits_of(n, k), bits_of(m, k)
    threshold, flip = torch.randint(-5, 5, (n,), dtype=torch.int32), torch.rand(n) < 0.5
    calls = [
        (ops.pack_signs, x),
        (ops.pack_signs, x.bfloat16()),
        (ops.pack_window, x, 1.0, gate),
        (ops.unpack_signs, x_bits, k),
        (ops.binary_matmul, x_bits, w_bits, k, gate),
        (ops.binary_threshold, x_bits, w_bits, k, threshold, flip, gate),
        (ops.sign_matmul, a, w_bits, k),
        (ops.sign_matmul_t, x, w_bits, k),
        (ops.standardise_grad, x, x, ops.standardise(x)[1]),
        (ops.gated_input_grad, d, w_bits, x, gate),
        (ops.masked_input_grad, d, w_bits, k, gate),
        (ops.gated_weight_grad, d, x_bits, k, gate),
        (ops.sample_engram, x, torch.tensor([3, 4]), 0.3),
    ]
    for function, *arguments in calls:
        moved = [unaligned(t) if isinstance(t, torch.Tensor) else t for t in arguments]
        assert any(isinstance(t, torch.Tensor) and t.data_ptr() % 2 for t in moved)
        assert torch.equal(function(*moved), function(*arguments)), function
    weight, grad, *state = update_arguments(n, k)
    expected = [t.clone() for t in (weight, *state)]
    ops.metaplastic_adam_(expected[0], grad, *expected[1:], **ADAM)
    ops.metaplastic_adam_(weight, unaligned(grad), *state, **ADAM)
    assert all(map(torch.equal, (weight, *state), expected))
    with pytest.raises(RuntimeError, match="exp_avg: expected contiguous memory that is aligned to its dtype"):
        ops.metaplastic_adam_(weight, grad, unaligned(state[0]), *state[1:], **ADAM)


@pytest.mark.parametrize("k", [1, 63, 64, 65, 100, 127, 129, 500, 1000, 1023, 2049])
def test_bits_in_the_padding_do_not_count(isa, k):
    padding = ~reference._pack(torch.ones(k, dtype=torch.bool))
    for m, n in ((1, 3), (2, 40), (5, 70), (20, 33)):
        x, w, d = bits_of(m, k), bits_of(n, k), torch.randn(m, n)
        for gate in (None, bits_of(m, k), bits_of(1, k)[0]):
            padded_gate = None if gate is None else gate | padding
            y = ops.binary_matmul(x | padding, w | padding & bits_of(n, padding.numel() * 64), k, padded_gate)
            assert torch.equal(y, reference.binary_matmul(x, w, k, gate)), (m, n, gate is None)
            threshold, flip = torch.randint(-3, 3, (n,), dtype=torch.int32), torch.rand(n) < 0.5
            signs = ops.binary_threshold(x | padding, w | padding, k, threshold, flip, padded_gate)
            assert torch.equal(signs, reference.binary_threshold(x, w, k, threshold, flip, gate))
            dw = ops.gated_weight_grad(d, x | padding, k, padded_gate)
            assert torch.equal(dw, ops.gated_weight_grad(d, x, k, gate))
            if gate is not None:
                dx = ops.masked_input_grad(d, w | padding, k, padded_gate)
                assert torch.equal(dx, ops.masked_input_grad(d, w, k, gate))


def fake_refuses(operator, name, *arguments, **settings):
    """Whether the operator names the argument, on the CPU and for meta tensors alike."""

    def on_meta(t):
        return t.to("meta") if isinstance(t, torch.Tensor) else t

    for move in (lambda t: t, on_meta):
        given = {key: t if key == "seed" else move(t) for key, t in settings.items()}
        with pytest.raises(RuntimeError, match=f"^{name}: expected"):
            operator(*map(move, arguments), **given)


def test_fakes_check_what_the_operators_check():
    o = torch.ops.engram_kernels
    m, n, k = 3, 5, 100
    x, d, bits, w = torch.randn(m, k), torch.randn(m, n), bits_of(m, k), bits_of(n, k)
    short, wide, ints = bits_of(m, k)[:, :1], bits_of(m, 300), torch.zeros(m, k, dtype=torch.int32)
    for operator, name, *arguments in (
        (o.pack_signs, "x", ints),
        (o.pack_signs, "x", torch.zeros(3, 0)),
        (o.pack_signs, "x", torch.zeros(())),
        (o.pack_window, "x", x[0], 1.0),
        (o.pack_window, "width", x, 0.0),
        (o.pack_window, "gate_bits", x, 1.0, wide),
        (o.unpack_signs, "bits", short, k, torch.float32),
        (o.unpack_signs, "k", bits, 0, torch.float32),
        (o.unpack_signs, "dtype", bits, k, torch.int64),
        (o.binary_matmul, "x_bits", wide, w, k),
        (o.binary_matmul, "w_bits", bits, w.int(), k),
        (o.binary_matmul, "gate_bits", bits, w, k, bits[:2]),
        (o.binary_threshold, "threshold", bits, w, k, torch.zeros(n), torch.zeros(n).bool()),
        (o.binary_threshold, "flip", bits, w, k, torch.zeros(n).int(), torch.zeros(n - 1).bool()),
        (o.sign_matmul, "a", x, w, k),
        (o.sign_matmul, "a", d.double(), w, k),
        (o.sign_matmul_t, "x", d, w, k),
        (o.sign_matmul_t, "x", torch.zeros(k, dtype=torch.uint8), w, k),
        (o.standardise, "y", x[0]),
        (o.standardise, "eps", x, -1.0),
        (o.standardise_grad, "d", d, x, torch.zeros(m, 2, dtype=torch.float64)),
        (o.standardise_grad, "moments", x, x, torch.zeros(m, 2)),
        (o.gated_input_grad, "x", d, w, x[:2]),
        (o.gated_input_grad, "d", x, w, x),
        (o.masked_input_grad, "mask_bits", d, w, k, bits[:2]),
        (o.masked_input_grad, "d", d[:, :2], w, k, bits),
        (o.gated_weight_grad, "x_bits", d, bits[:2], k),
        (o.gated_weight_grad, "gate_bits", d, bits, k, wide),
        (o.real_weight_grad, "x", d, x[:2]),
        (o.real_weight_grad, "x", d, x.half()),
        (o.sample_engram, "score", ints, torch.tensor([1, 0]), 0.5),
    ):
        fake_refuses(operator, name, *arguments)
    seed = torch.tensor([1, 0])
    fake_refuses(o.sample_engram, "rate", x, seed=seed, rate=1.5)
    fake_refuses(o.sample_engram, "seed", x, seed=seed[:1], rate=0.5)
    fake_refuses(o.sample_engram, "temperature", x, seed=seed, rate=0.5, temperature=-1.0)
    weight, grad, *state = update_arguments(n, k)
    for name, arguments in (
        ("weight", (weight.double(), grad, *state)),
        ("exp_avg", (weight, grad, state[0].half(), *state[1:])),
        ("exp_avg_sq", (weight, grad, state[0], state[1][:2], state[2])),
        ("exp_avg_scale", (weight, grad, state[0].to(torch.int8), state[1].to(torch.uint8), None)),
        ("sign_bits", (weight, grad, *state[:2], short)),
        ("seed", (weight.bfloat16(), grad, *state)),
        ("grad", (weight, grad[:2], *state)),
    ):
        fake_refuses(o.metaplastic_adam_, name, *arguments, **ADAM)
    for name, d_, x_bits in (("d", d[:, :2], bits), ("x_bits", d, bits[:2]), ("x_bits", d, short)):
        fake_refuses(o.gated_metaplastic_adam_, name, d_, x_bits, None, weight, *state, **ADAM)
    for name, d_, x_ in (("d", d[:, :2], x), ("x", d, x[:2]), ("x", d, x[:, :2])):
        fake_refuses(o.real_metaplastic_adam_, name, d_, x_, weight, *state, **ADAM)


def test_every_tensor_has_its_place_checked():
    o, k = torch.ops.engram_kernels, 100
    score, seed = torch.randn(3, k), torch.tensor([1, 0])
    with pytest.raises(RuntimeError, match="seed: expected a CPU tensor, got one on meta"):
        o.sample_engram(score, seed.to("meta"), 0.1)
    weight = torch.randn(5, k)
    moments, settings = update_state(weight, torch.int8)
    before = weight.clone()
    for name in settings:
        elsewhere = settings | {name: settings[name].to("meta")}
        with pytest.raises(RuntimeError, match=f"^{name}: expected"):
            ops.metaplastic_adam_(weight, torch.randn(5, k), *moments, None, **ADAM, **elsewhere)
    with pytest.raises(RuntimeError, match="^exp_avg_sq: expected"):
        ops.gated_metaplastic_adam_(
            torch.randn(3, 5), bits_of(3, k), None, weight, moments[0], moments[1].to("meta"), None, **ADAM, **settings
        )
    assert torch.equal(weight, before)


def test_a_result_too_large_for_any_memory_is_named():
    with pytest.raises(RuntimeError, match="result: expected at most"):
        ops.sign_matmul(torch.zeros(2**62, 0), torch.zeros(0, 2, dtype=torch.int64), 100)


def test_the_module_shows_its_functions_and_nothing_else():
    assert dir(ops) == sorted(dir(ops))
    assert all(getattr(ops, name).__module__ == ops.__name__ for name in dir(ops))
    public = {name for name, value in vars(ops).items() if getattr(value, "__module__", None) == ops.__name__}
    assert set(dir(ops)) == {name for name in public if not name.startswith("_")}
