import math

import pytest
import torch

import engram_kernels as ek
from engram_kernels.reference import _unpack


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("k", [1, 3, 65, 784])
def test_stochastic_engram_recruits_exactly(isa, rate, k):
    gate, scale = ek.StochasticEngram(rate)(torch.randn(20, k))
    assert scale == 1.0
    assert (_unpack(gate, k).sum(1) == max(1, round(rate * k))).all()


def test_temperature_orders_noise_against_excitability():
    x = torch.randn(50, 400)
    top = torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(40, dim=1).indices, True)

    def overlap(temperature):
        gate = _unpack(ek.StochasticEngram(0.1, temperature)(x).gate_bits, 400)
        return (gate & top).sum().item() / top.sum().item()

    assert overlap(0.0) == 1.0
    assert 1.0 > overlap(0.1) > overlap(1.0) > overlap(math.inf)
    assert abs(overlap(math.inf) - 0.1) < 0.03


def test_evaluation_takes_the_most_excitable_without_noise():
    x = torch.randn(5, 200)
    for score in ("preactivation", "magnitude"):
        engram = ek.StochasticEngram(0.1, 5.0, score=score).eval()
        key = x.abs() if score == "magnitude" else x
        expected = torch.zeros_like(x, dtype=torch.bool).scatter_(1, key.topk(20, dim=1).indices, True)
        assert torch.equal(_unpack(engram(x).gate_bits, 200), expected)


def test_bernoulli_engram_preserves_the_expectation_at_evaluation():
    layer = ek.BinaryEngramLinear(400, 6, engram=ek.BernoulliEngram(0.25))
    x = torch.randn(1, 400)
    mean = layer(x.expand(4000, 400)).mean(0)
    at_eval = layer.eval()(x)[0]
    assert ((mean - at_eval).abs() < 5 * math.sqrt(400 * 0.25 / 4000)).all()
    sampled = ek.BernoulliEngram(0.25, sample_at_eval=True).eval()(x)
    assert sampled.gate_bits is not None and sampled.scale == 1.0


def test_context_engram_is_fixed_per_context():
    engram = ek.ContextEngram(3, 0.2)
    x = torch.randn(4, 100)
    with pytest.raises(RuntimeError, match="context: set the engram's context"):
        engram(x)
    engram.context = 1
    gate = engram(x).gate_bits
    assert gate.shape == (2,) and torch.equal(gate, engram.eval()(torch.randn(9, 100)).gate_bits)
    assert _unpack(gate, 100).sum() == 20
    engram.context = torch.tensor([0, 1, 2, 1])
    gates = engram(x).gate_bits
    assert torch.equal(gates[1], gate) and torch.equal(gates[3], gate)
    assert not torch.equal(gates[0], gate) and not torch.equal(gates[0], gates[2])
    other = ek.ContextEngram(3, 0.2)
    other.load_state_dict(engram.state_dict())
    other.context = 1
    assert torch.equal(other(x).gate_bits, gate)


@pytest.mark.parametrize(
    "change",
    [
        lambda e, other: e.seed.add_(1),
        lambda e, other: e.seed.data.add_(1),
        lambda e, other: e.seed.numpy().__iadd__(1),
        lambda e, other: e.load_state_dict(other.state_dict()),
        lambda e, other: e.load_state_dict(other.state_dict(), assign=True),
        lambda e, other: setattr(e, "rate", 0.5),
        lambda e, other: setattr(e, "num_contexts", 4),
    ],
)
def test_gates_of_contexts_are_drawn_anew_whoever_changed_what_they_follow_from(change):
    engram, other = ek.ContextEngram(3, 0.2), ek.ContextEngram(3, 0.2)
    before = engram.gates(100, torch.device("cpu"))
    assert engram.gates(100, torch.device("cpu")) is before
    change(engram, other)
    fresh = ek.ContextEngram(engram.num_contexts, engram.rate)
    fresh.load_state_dict(engram.state_dict())
    drawn = engram.gates(100, torch.device("cpu"))
    assert torch.equal(drawn, fresh.gates(100, torch.device("cpu")))
    assert not torch.equal(drawn, before)


def test_gates_drawn_while_inferring_serve_training():
    engram = ek.ContextEngram(2, 0.5)
    engram.context = 1
    layer = ek.BinaryEngramLinear(70, 9, engram=engram)
    with torch.inference_mode():
        layer(torch.randn(4, 70))
    layer(torch.randn(4, 70)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("make", [lambda: ek.StochasticEngram(0.1), lambda: ek.BernoulliEngram(0.1)])
def test_manual_seed_reproduces_whatever_the_threads(make):
    x, before, drawn = torch.randn(64, 300), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(5)
            engram = make()
            drawn.append([engram(x).gate_bits, engram(x).gate_bits])
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(drawn[0][0], drawn[0][1])
    for other in drawn[1:]:
        assert all(torch.equal(a, b) for a, b in zip(drawn[0], other, strict=True))


def test_ranks_with_one_seed_draw_their_part_of_the_batch():
    x, parts = torch.randn(10, 300), []
    torch.manual_seed(1)
    whole = ek.StochasticEngram(0.1)(x).gate_bits
    for first in (0, 5):
        torch.manual_seed(1)
        engram = ek.StochasticEngram(0.1)
        engram.first_row = first
        parts.append(engram(x[first : first + 5]).gate_bits)
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ek.BernoulliEngram(0.0), r"rate: expected a number in \(0, 1\], got 0.0"),
        (lambda: ek.StochasticEngram(1.5), r"rate: expected a number in \(0, 1\], got 1.5"),
        (lambda: ek.StochasticEngram(math.nan), "rate: .*got nan"),
        (lambda: ek.StochasticEngram("0.1"), "rate: .*got '0.1'"),
        (lambda: ek.StochasticEngram(0.1, temperature=-1), "temperature: expected 0 or at least 1e-6, got -1"),
        (lambda: ek.StochasticEngram(0.1, temperature=math.nan), "temperature: .*got nan"),
        (lambda: ek.StochasticEngram(0.1, score="gradient"), "score: .*got 'gradient'"),
        (lambda: ek.ContextEngram(0, 0.1), "num_contexts: expected at least 1, got 0"),
        (lambda: setattr(ek.ContextEngram(2, 0.1), "context", 2), r"context: expected numbers in \[0, 2\), got 2"),
        (lambda: setattr(ek.ContextEngram(2, 0.1), "context", 0.5), "context: expected an int"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_context_per_sample_must_fit_the_batch():
    engram = ek.ContextEngram(2, 0.5)
    engram.context = torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="context: expected 4 numbers, one per sample, got 3"):
        engram(torch.randn(4, 10))


def test_a_stochastic_engram_without_noise_leaves_the_generator_alone():
    x = torch.randn(5, 40)
    evaluated = ek.StochasticEngram(0.2, temperature=1.0).eval()
    for engram in (evaluated, ek.StochasticEngram(0.2, temperature=0.0)):
        before = torch.get_rng_state()
        assert engram(x).gate_bits is not None
        assert torch.get_rng_state().equal(before)
    ek.StochasticEngram(0.2, temperature=1.0)(x)
    assert not torch.get_rng_state().equal(before)
