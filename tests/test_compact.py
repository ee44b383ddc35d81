"""The moments in 8 and 16 bits (csrc/core/compact.h): no value is rounded with a bias, so that steps stay Adam's."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_kernels import ops, reference

STEPS, N, K = 5000, 64, 64


def assert_between(x, encode, decode, zero):
    """Every number lies between its two codes, but for half of one of the 2^16 steps between them."""
    least, most = torch.zeros(x.shape, dtype=torch.int64), torch.full(x.shape, 0xFFFF)
    codes, scale = encode(x, least)
    below, above = decode(codes, scale), decode(*encode(x, most))
    unit = reference._by_unit(scale, x.shape[1])
    rounding = 2.0**-17 * (x + unit * zero) / 7  # codes are spaced by 1/8 of themselves at most
    in_range = (x >= unit * zero / 8) | (zero > 2.0**-20)  # a second moment ends there, says the format
    assert ((below - rounding <= x) & (x <= above + rounding))[in_range].all()
    assert in_range.float().mean() > 0.5


# Largest magnitudes on either side of an octave, and of what the largest code stands for.
LARGEST = [1.0, 1.75, 1.875 - 2**-14, 1.875 - 2**-15, 1.875, 1.875 + 2**-20, 1.9999, 2.0]


@given(largest=st.sampled_from(LARGEST), exponent=st.integers(-45, 60), seed=st.integers(0, 2**31))
def test_every_number_of_a_block_lies_between_two_codes(largest, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.empty(4, 150).uniform_(-24, 0, generator=generator).exp2()
    x = spread * torch.randn(4, 150, generator=generator).sign()
    x[:, ::64] = 1.0  # one of every block is the largest
    x *= largest * 2.0**exponent
    assert_between(x.abs(), reference.encode_first_moment, reference.decode_first_moment, 2.0**-15)
    assert_between(x * x, reference.encode_second_moment, reference.decode_second_moment, 2.0**-31)


def growing(step, noise):
    return -(1 + step / 50) * (1 + 0.3 * noise)


def outlier(step, noise):
    gradient = noise - 0.3
    if step == STEPS // 2:
        gradient[:, 5] = 1e5
    return gradient


STREAMS = {
    "constant": lambda step, noise: torch.full_like(noise, -1.0),
    "noisy": lambda step, noise: noise - 0.1,
    "growing": growing,
    "shrinking": lambda step, noise: -math.exp(-step / 800) * (1 + 0.5 * noise),
    "one outlier": outlier,
}


def train(stream, state_dtype):
    """Distances moved, and both moments averaged over the second half of the steps, by row and unit."""
    noises = torch.Generator().manual_seed(1)
    weight, second = torch.full((N, K), -20.0), torch.uint8 if state_dtype == torch.int8 else state_dtype
    exp_avg, exp_avg_sq = torch.zeros(N, K, dtype=state_dtype), torch.zeros(N, K, dtype=second)
    scales = [torch.zeros(N, 1) if state_dtype == torch.int8 else None for _ in range(2)]
    first_sum, second_sum = torch.zeros(N, K, dtype=torch.float64), torch.zeros(N, K, dtype=torch.float64)
    for step in range(1, STEPS + 1):
        ops.metaplastic_adam_(
            weight, stream(step, torch.randn(N, K, generator=noises)), exp_avg, exp_avg_sq, None, lr=1e-3, beta1=0.9,
            beta2=0.999, eps=1e-8, weight_decay=0.0, metaplasticity=0.0, step=step, exp_avg_scale=scales[0],
            exp_avg_sq_scale=scales[1], seed=torch.tensor([3, step]),
        )  # fmt: skip
        if step > STEPS // 2:
            coded = state_dtype == torch.int8
            first_sum += reference.decode_first_moment(exp_avg, scales[0]) if coded else exp_avg
            second_sum += reference.decode_second_moment(exp_avg_sq, scales[1]) if coded else exp_avg_sq
    return weight + 20.0, first_sum * 2 / STEPS, second_sum * 2 / STEPS


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("stream", STREAMS)
def test_moments_and_distances_are_those_of_float32(stream, state_dtype):
    exact, compact = train(STREAMS[stream], torch.float32), train(STREAMS[stream], state_dtype)
    others = torch.arange(K) != 5  # than the unit that gets the outlier, which is looked at alone
    for name, wanted, got in zip(("distance", "first moment", "second moment"), exact, compact, strict=True):
        for units in (others, ~others) if stream == "one outlier" else (others | True,):
            ratio = float(got[:, units].mean() / wanted[:, units].mean())
            assert abs(ratio - 1) < 0.03, (name, ratio)


def test_an_outlier_beyond_the_range_of_a_block_holds_the_others_back_until_it_has_decayed():
    """What compact.h says of gradients more than 10^6 times as large as the others of their block."""

    def speed(beta2):
        weight, scales = torch.zeros(N, K), [torch.zeros(N, 1) for _ in range(2)]
        exp_avg, exp_avg_sq = torch.zeros(N, K, dtype=torch.int8), torch.zeros(N, K, dtype=torch.uint8)
        for step in range(1, 601):
            grad = torch.full((N, K), -1.0)
            if step == 100:
                grad[:, 0] = 1e10
            before = weight[:, 1:].mean().item()
            ops.metaplastic_adam_(
                weight, grad, exp_avg, exp_avg_sq, None, lr=1e-3, beta1=0.9, beta2=beta2, eps=1e-8, weight_decay=0.0,
                metaplasticity=0.0, step=step, exp_avg_scale=scales[0], exp_avg_sq_scale=scales[1],
                seed=torch.tensor([3, step]),
            )  # fmt: skip
            if step in (99, 150):
                yield weight[:, 1:].mean().item() - before
        yield weight[:, 1:].mean().item() - before

    usual, held_back, _ = speed(0.999)
    assert usual == pytest.approx(1e-3, rel=0.05) and abs(held_back) < 1e-5
    *_, released = speed(0.9)  # a factor of (1e10 / 4e6)^2 decays in 150 steps
    assert released == pytest.approx(1e-3, rel=0.05)


# ---- the draws they are rounded with


def draws_of(rows=512, k=2048, first_row=2**33, seed=(-5, 2**32 - 1)):
    return reference.rounding_draws(torch.tensor(seed), rows, k, first_row)


def assert_uniform(cells):
    """Of integers in [0, 2^16): chi-squared, as a normal deviate, on as many counts."""
    expected = cells.numel() / 2**16
    chi_squared = float(((torch.bincount(cells.flatten(), minlength=2**16) - expected) ** 2).sum()) / expected
    assert abs(chi_squared - (2**16 - 1)) / math.sqrt(2 * (2**16 - 1)) < 5


def assert_independent(a, b):
    for i, j in itertools.product((0, 8, 16, 24), repeat=2):  # bytes of either, as one integer
        assert_uniform((a >> i & 0xFF) << 8 | b >> j & 0xFF)


@pytest.mark.parametrize("seed", [(-5, 2**32 - 1), (0, 0), (1, 1)], ids=str)
def test_both_halves_of_the_draws_are_uniform(seed):
    draws = draws_of(seed=seed)
    assert draws.min() >= 0 and draws.max() < 2**32
    assert_uniform(draws & 0xFFFF)
    assert_uniform(draws >> 16)


@pytest.mark.parametrize("distance", [1, 2, 3, 8, 16, 64, 233, 610, 987, 1024])  # the golden ratio's worst among them
def test_draws_of_a_row_are_independent_whatever_their_distance(distance):
    draws = draws_of()
    assert_independent(draws[:, :-distance], draws[:, distance:])


@pytest.mark.parametrize(
    "change",
    [
        dict(first_row=2**33 + 1),
        dict(first_row=2**33 + 64),
        dict(first_row=2**32),
        dict(seed=(-5, 2**32 - 2)),
        dict(seed=(-5, 0)),
        dict(seed=(-4, 2**32 - 1)),
        dict(seed=(-5 ^ 1 << 62, 2**32 - 1)),
    ],
    ids=str,
)
def test_draws_of_other_rows_steps_and_seeds_are_independent(change):
    assert_independent(draws_of(), draws_of(**change))


def test_neighbouring_differences_of_the_draws_are_uniform():
    differences = draws_of().diff(dim=1) % 2**32
    assert_uniform(differences & 0xFFFF)
    assert_uniform(differences >> 16)


def test_no_bit_of_the_draws_follows_from_another():
    bits = draws_of(rows=256)[:, :, None] >> torch.arange(32) & 1
    signs = (2 * bits - 1).float().flatten(0, 1)
    for distance in (0, 1, 2):
        sums = signs[: len(signs) - distance].T @ signs[distance:] / math.sqrt(len(signs))
        if distance == 0:
            sums.fill_diagonal_(0)
        assert sums.abs().max() < 5.5  # of 1024 normal deviates


def test_rows_drawn_apart_are_those_drawn_together():
    assert torch.equal(draws_of(7, 100)[3:], draws_of(4, 100, first_row=2**33 + 3))
    assert torch.equal(draws_of(7, 100)[:, :60], draws_of(7, 60))
