"""The CUDA kernels, emulated, agree with ``engram_kernels.reference`` over shapes, types, architectures and orders.

One architecture for each set of instructions that kernels choose between: sm_75 (products of bits by xor, no bfloat16,
no asynchronous copies), sm_80 (by and) and sm_100 (by int8). Schedule 0 runs threads in their natural order, others
shuffle threads, warps and blocks; odd ones let warps take turns, even ones run a warp as far as it gets.
"""

import math
import shutil

import pytest
import torch

from engram_kernels import reference

from . import build, compare
from .build import Flag, Read, Write
from .compare import FLOATS, GATES, LARGE_TILES, SEED, SMALL_TILES, packed
from .operators import DOTS, PATTERNS, TILES, EmulatedOps

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason=f"{build.COMPILER} not installed")

SIZES = [1, 3, 31, 64, 65, 127, 129, 300]
OFFSETS = [0, 1, 2]  # in elements: aligned, aligned to one number, and to two


# Each architecture in one order and each order once; every pair with the slow tests.
QUICK = set(zip(build.ARCHITECTURES, (2, 1, 0), strict=True))


@pytest.fixture(
    params=[
        pytest.param((a, s), marks=[] if (a, s) in QUICK else pytest.mark.slow, id=f"sm_{a}-order_{s}")
        for a in build.ARCHITECTURES
        for s in (0, 1, 2)
    ]
)
def ops(request):
    return EmulatedOps(request.param[0], schedule=request.param[1])


# ---- packing


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pack_signs(ops, dtype):
    for k in (*SIZES, 4, 132, 1000):
        for offset in OFFSETS:
            compare.pack_signs(ops, 3, k, dtype, offset)
    compare.pack_signs(ops, 40, 5, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pack_signs_reports_nan_wherever_it_is(ops, dtype):
    for k, offset in [(132, 0), (132, 1), (131, 0)]:
        compare.pack_signs_of_nan(ops, k, dtype, offset)


def test_pack_signs_knows_every_16_bit_number(ops):
    for dtype in FLOATS[1:]:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        numbers = every[~every.isnan()]
        assert torch.equal(ops.pack_signs(numbers), reference.pack_signs(numbers))


@pytest.mark.parametrize("gate", GATES)
def test_pack_window(ops, gate):
    for k in (*SIZES, 4, 132, 1000):
        for width in (1.0, 0.25, 1e-42, math.inf):
            compare.pack_window(ops, 3, k, gate, width, offset=k % 3)


def test_standardise(ops):
    for n in SIZES:
        compare.standardise(ops, 9, n, whole=n % 2 == 0)
    compare.standardise(ops, 0, 5)


@pytest.mark.parametrize("dtype", PATTERNS, ids=str)
def test_unpack_signs(ops, dtype):
    for k in (*SIZES, 2, 4, 8, 16, 144, 1000):
        compare.unpack_signs(ops, 3, k, dtype)


@pytest.mark.parametrize("dtype", PATTERNS, ids=str)
def test_unpack_signs_to_an_unaligned_tensor(ops, dtype):
    compare.unpack_signs_to_an_unaligned_tensor(ops, dtype)


@pytest.mark.parametrize("window", compare.WINDOWS)
def test_unfold_bits(ops, window):
    for samples in (0, 1, 3):
        compare.unfold_bits(ops, window, samples)


# ---- products of bits

FORMS = [(TILES, SMALL_TILES), (TILES, LARGE_TILES), (DOTS, 4)]


@pytest.fixture(params=FORMS, ids=["small tiles", "large tiles", "dots"])
def form(ops, request):
    ops.multiprocessors = request.param[1]
    return request.param[0]


@pytest.mark.parametrize("gate", GATES)
def test_binary_matmul(ops, form, gate):
    # Sizes of either side of a tile, and enough words to fill every stage and to end in the middle of one.
    for m, n, k in [(1, 1, 1), (2, 31, 129), (33, 3, 513), (17, 66, 640), (65, 7, 64)]:
        compare.binary_matmul(ops, m, n, k, gate, form)
    compare.binary_matmul(ops, 3, 34, 2200, gate, form)


@pytest.mark.parametrize("gate", GATES)
def test_binary_threshold(ops, form, gate):
    for m, n, k in [(1, 1, 1), (1, 129, 300), (3, 31, 129), (33, 64, 65), (9, 200, 520)]:
        compare.binary_threshold(ops, m, n, k, gate, form)


def test_binary_products_of_several_blocks_each_way(form, ops):
    for gate in GATES:
        compare.binary_matmul(ops, 130, 135, 100, gate, form)
        compare.binary_threshold(ops, 130, 135, 100, gate, form)


def test_binary_matmul_at_the_extremes(ops, form):
    k = 520
    ones, none = packed(5, k, 1.0), packed(5, k, 0.0)
    for gate, total in [(None, k), (ones[0], k), (ones, k), (none, 0)]:
        assert (ops.binary_matmul(ones, ones, k, gate, form) == total).all()
        assert (ops.binary_matmul(ones, none, k, gate, form) == -total).all()


def test_binary_products_as_the_launcher_chooses(ops):
    for m in (1, 8, 9):
        for gate in GATES:
            compare.binary_matmul(ops, m, 33, 129, gate)
            compare.binary_threshold(ops, m, 33, 129, gate)


def test_valid_gate(ops):
    for k in (*SIZES, 1000):
        compare.valid_gate(ops, 3, k)
    compare.valid_gate(ops, 700, 70)


@pytest.mark.parametrize("gate", GATES)
def test_padding_does_not_count_in_binary_products(ops, form, gate):
    for m, n, k in [(1, 1, 1), (2, 31, 129), (33, 3, 513), (9, 66, 600)]:
        compare.padded_products(ops, m, n, k, gate, form)


def test_binary_products_of_nothing(ops):
    for m, n in [(0, 5), (5, 0)]:
        compare.binary_matmul(ops, m, n, 70)
        compare.binary_threshold(ops, m, n, 70)


# ---- products of numbers and signs

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 33, 129), (65, 36, 68), (64, 4, 132), (5, 70, 31)]  # M, N, K


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["integers", "reals"])
@pytest.mark.parametrize("operator", compare.SIGN_PRODUCTS)
def test_sign_products(ops, operator, exact, dtype):
    gates = {"masked_input_grad": GATES[1:], "gated_weight_grad": GATES}.get(operator, ["none"])
    for i, (m, n, k) in enumerate(SHAPES):
        for gate in gates:
            compare.sign_product(ops, operator, m, n, k, dtype, gate, exact, offset=OFFSETS[i % 3])
    # aligned: contraction of several stages, and several blocks each way
    compare.sign_product(ops, operator, 132, 132, 132, dtype, gates[-1], exact)


def test_sign_products_of_uint8(ops):
    for m, n, k in [*SHAPES, (67, 130, 200)]:
        for offset in OFFSETS:
            compare.sign_product(ops, "sign_matmul_t", m, n, k, torch.uint8, offset=offset)
    most = torch.full((2, 300), 255, dtype=torch.uint8)
    ones = packed(3, 300, 1.0)
    assert (ops.sign_matmul_t(most, ones, 300) == 255 * 300).all()
    assert (ops.sign_matmul_t(most, torch.zeros_like(ones), 300) == -255 * 300).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sign_products_of_extreme_numbers(ops, dtype):
    compare.infinities(ops, dtype)


def test_sign_products_round_to_the_nearest_bfloat16(ops):
    compare.ties_to_even_bfloat16(ops)


def test_sign_products_of_nothing(ops):
    w_bits = packed(5, 70)
    assert ops.sign_matmul(torch.empty(0, 5), w_bits, 70).shape == (0, 70)
    assert ops.sign_matmul_t(torch.empty(2, 70), w_bits[:0], 70).shape == (2, 0)
    compare.no_contraction(ops)


def test_a_mask_of_hardly_any_unit(ops):
    compare.sparse_mask(ops)


# ---- engrams


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, math.inf])
def test_gumbel_top_k(ops, temperature):
    for i, k in enumerate([1, 3, 4, 65, 131, 300, 1028, 1300]):
        for levels in (0, 3):
            for rate in (0.01, 0.4) if k > 1 else (0.5,):
                compare.sample_engram(ops, 2, k, rate, temperature=temperature, levels=levels, offset=OFFSETS[i % 3])
    compare.sample_engram(ops, 2, 132, 1.0, temperature=temperature)


def test_gumbel_top_k_gives_ties_to_the_lower_index(ops):
    for k in (5, 130, 1100, 2000):
        for count in {1, 4, k // 2, k - 1}:
            gate = ops.sample_engram(torch.zeros(1, k), torch.tensor(SEED), count / k, temperature=0.0)
            assert torch.equal(gate, reference._pack(torch.arange(k) < count).unsqueeze(0)), (k, count)


def test_gumbel_top_k_tells_keys_apart_by_their_last_digit(ops):
    """Scores that differ in one bit each, in any order: all four digits of a key take part."""
    for first in (0x3F800000, 0x3F8000F0, 0x3F80FFF0, 0x3FFFFFF0):
        score = (torch.randperm(600, dtype=torch.int32) + first).view(torch.float32).unsqueeze(0)
        for numbers in (score, -score):
            arguments = numbers, torch.tensor(SEED), 0.3, "gumbel_top_k", 0.0
            assert torch.equal(ops.sample_engram(*arguments), reference.sample_engram(*arguments))


def test_sample_engram_reports_nan_where_it_reads_scores(ops):
    for k, offset in [(132, 0), (132, 1), (131, 0)]:
        compare.sample_engram_of_nan(ops, k, offset)


def test_bernoulli(ops):
    for k in (*SIZES, 1000):
        for rate in (1e-3, 0.3, 1.0):
            compare.sample_engram(ops, 3, k, rate, "bernoulli")
    compare.sample_engram(ops, 40, 7, 0.5, "bernoulli")
    compare.bernoulli_at_a_draw(ops)


@pytest.mark.parametrize("rule", ["bernoulli", "gumbel_top_k"])
@pytest.mark.parametrize("first_row", [0, 2**32 - 1, 2**32, 2**62 + 12345])
def test_draws_are_those_of_the_row(ops, first_row, rule):
    compare.sample_engram(ops, 3, 70, 0.3, rule, first_row=first_row)


# ---- more work than blocks: each takes several pieces

MOST_WARPS = 2**16 * 8


@pytest.fixture
def wide_ops():
    return EmulatedOps(800)


def test_pack_signs_of_more_rows_than_warps(wide_ops):
    x = torch.randn(MOST_WARPS + 1000, 1)
    assert torch.equal(wide_ops.pack_signs(x), torch.cat([(x >= 0).long(), torch.zeros_like(x).long()], dim=1))


def test_bernoulli_of_more_rows_than_warps(wide_ops):
    rows, seed = MOST_WARPS + 1000, torch.tensor(SEED)
    gate = wide_ops.sample_engram(torch.empty(rows, 1), seed, 0.4, "bernoulli")
    draws = reference.philox(seed, rows, 1)
    assert torch.equal(gate, torch.cat([(draws < round(0.4 * 2**32)).long(), torch.zeros_like(draws)], dim=1))


def test_unpack_signs_of_more_units_than_threads(wide_ops):
    k = MOST_WARPS // 2 + 129
    bits = packed(1, k).expand(64, -1).contiguous()
    bits[-1] = ~bits[-1]
    y = wide_ops.unpack_signs(bits, k, torch.int8)
    row = reference.unpack_signs(bits[:1], k, torch.int8)
    assert torch.equal(y[:-1], row.expand(63, -1)) and torch.equal(y[-1:], -row)


# ---- the flag of NaNs


def test_nothing_is_flagged_without_a_nan(ops):
    x, bits, nan = torch.randn(2, 70), torch.full((2, 2), -1), torch.full((1,), 5, dtype=torch.int32)
    arguments = dict(x=Read(x), element=0, rows=2, k=70, bits=Write(bits), nan=Flag(nan))
    ops.library.call("run_pack_signs", schedule=ops.schedule, **arguments)
    assert nan == 5
