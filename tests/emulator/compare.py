"""Compares emulated kernels with ``engram_kernels.reference``: one function an operator.

Each takes the operators (:class:`EmulatedOps`) and a shape, draws arguments for it and asserts: integers and bits are
exact; sums of floats lie within the bound of their rounding, or are exact where ``exact`` draws integers small enough.
Outputs are filled with other values beforehand (operators.py), so that what a kernel leaves out shows.
"""

import math
from dataclasses import replace
from functools import partial

import torch

from engram_kernels import reference

from .build import Read, Write
from .operators import DOTS, PATTERNS, TILES, EmulatedOps

GATES = ("none", "shared", "per sample")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SMALL_TILES, LARGE_TILES = 10**6, 1  # multiprocessors that make the launcher choose them
SEED = (0x123456789ABCDEF, 2**32 - 1)


def at_offset(x: torch.Tensor, elements: int) -> torch.Tensor:
    """The same numbers so many elements behind an aligned address."""
    moved = torch.empty(elements + x.numel(), dtype=x.dtype)[elements:].view(x.shape)
    return moved.copy_(x)


def packed(rows: int, k: int, rate: float = 0.5) -> torch.Tensor:
    return reference._pack(torch.rand(rows, k) < rate)


def gate_of(kind: str, rows: int, k: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    return packed(rows, k, 0.4) if kind == "per sample" else packed(1, k, 0.4)[0]


def scattered(x: torch.Tensor, numbers: list[float]) -> torch.Tensor:
    """Puts the numbers at random places of x."""
    places = torch.randperm(x.numel())[: len(numbers)]
    x.view(-1)[places] = torch.tensor(numbers[: len(places)], dtype=x.dtype)
    return x


def assert_same(actual: torch.Tensor, expected: torch.Tensor, *context) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, context
    if not torch.equal(actual, expected):
        wrong = (actual != expected).nonzero()
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {actual.numel()} differ, first {list(at)}: {actual[at]}, not {expected[at]} {context}"
        )


# ---- packing


def pack_signs(ops: EmulatedOps, rows: int, k: int, dtype=torch.float32, offset: int = 0) -> None:
    of_type = torch.finfo(dtype)
    least = of_type.smallest_normal * of_type.eps
    extremes = [0.0, -0.0, math.inf, -math.inf, least, -least, of_type.max, of_type.min]
    x = at_offset(scattered(torch.randn(rows, k).to(dtype), extremes), offset)
    assert_same(ops.pack_signs(x), reference.pack_signs(x), rows, k, dtype, offset)


def assert_reports_nan(function, *arguments, **settings) -> None:
    try:
        function(*arguments, **settings)
    except RuntimeError as error:
        assert "NaN" in str(error), error
    else:
        raise AssertionError(f"no NaN reported {settings}")


def pack_signs_of_nan(ops: EmulatedOps, k: int, dtype=torch.float32, offset: int = 0) -> None:
    """The least positive NaN and the last negative one, wherever they are."""
    bits = torch.tensor([math.inf], dtype=dtype).view(torch.int32 if dtype == torch.float32 else torch.int16)
    for place in (0, k - 1, k, 2 * k - 1):
        for nan in (bits + 1, torch.full_like(bits, -1)):
            x = at_offset(torch.full((2, k), -1.0, dtype=dtype), offset)
            x.view(-1).view(bits.dtype)[place] = nan
            assert_reports_nan(ops.pack_signs, x)


def pack_window(ops: EmulatedOps, rows: int, k: int, gate="none", width: float = 1.0, offset: int = 0) -> None:
    above = float(torch.nextafter(torch.tensor(width), torch.tensor(math.inf)))
    extremes = [0.0, -0.0, width, -width, above, -above, math.inf, -math.inf, 1e-45, -1e-45, math.nan]
    x = at_offset(scattered(torch.randn(rows, k), extremes), offset)
    gate_bits = gate_of(gate, rows, k)
    expected = reference.pack_window(x, width, gate_bits)
    assert_same(ops.pack_window(x, width, gate_bits), expected, rows, k, gate, width, offset)


def unpack_signs(ops: EmulatedOps, rows: int, k: int, dtype=torch.float32) -> None:
    bits = packed(rows, k)
    assert_same(ops.unpack_signs(bits, k, dtype), reference.unpack_signs(bits, k, dtype), rows, k, dtype)


def unpack_signs_to_an_unaligned_tensor(ops: EmulatedOps, dtype: torch.dtype) -> None:
    (size, plus, minus), bits = PATTERNS[dtype], packed(3, 144)
    out = at_offset(torch.zeros(3, 144, dtype=dtype), 1)
    arguments = dict(bits=Read(bits), rows=3, k=144, size=size, plus=plus, minus=minus, out=Write(out))
    ops.library.call("run_unpack_signs", schedule=ops.schedule, **arguments)
    assert_same(out, reference.unpack_signs(bits, 144, dtype), dtype)


# ---- taps of convolutions

WINDOWS = {
    "one pixel": reference.Window(1, 1, 1, 1, 1),
    "3 channels, same padding": reference.Window(5, 6, 3, 3, 3, 1, 1, 1, 1, 1, 1),
    "64 channels": reference.Window(4, 3, 64, 3, 3, 1, 1, 1, 1, 1, 1),
    "65 channels, strides and dilation": reference.Window(7, 6, 65, 2, 3, 2, 1, 0, 1, 2, 0, 2, 1),
    "3 groups": reference.Window(3, 4, 6, 3, 1, 1, 1, 1, 1, 0, 0, 1, 1, 3),
    "150 channels": reference.Window(2, 3, 150, 1, 2),
    "one pixel again and again": reference.Window(2, 3, 9, 2, 5, dilation_h=0, dilation_w=0),
}


def unfold_bits(ops: EmulatedOps, window: str, samples: int) -> None:
    w = WINDOWS[window]
    bits = packed(samples, w.units)
    for group in range(w.groups):
        expected = reference.unfold_bits(bits, w, group)
        for own in (bits, with_padding(bits, w.units)):
            assert_same(ops.unfold_bits(own, w, group), expected, window, samples, group)


# ---- products of bits


def with_padding(bits: torch.Tensor, k: int) -> torch.Tensor:
    """The same units, and bits that are set in the padding."""
    return bits | ~reference._pack(torch.ones(k, dtype=torch.bool))


def valid_gate(ops: EmulatedOps, rows: int, k: int) -> None:
    gate = packed(rows, k)
    assert_same(ops.valid_gate(with_padding(gate, k), k), gate, rows, k)
    assert_same(ops.valid_gate(None, k), packed(1, k, 1.0)[0], k)


def padded_products(ops: EmulatedOps, m: int, n: int, k: int, gate="none", form: int = 0) -> None:
    """As the bindings call it where rows have padding: within a gate that leaves it out."""
    x, w, gate_bits = packed(m, k), packed(n, k), gate_of(gate, m, k)
    expected = reference.binary_matmul(x, w, k, gate_bits)
    clean = ops.valid_gate(None if gate_bits is None else with_padding(gate_bits, k), k)
    actual = ops.binary_matmul(with_padding(x, k), with_padding(w, k), k, clean, form)
    assert_same(actual, expected, m, n, k, gate, form)


def binary_matmul(ops: EmulatedOps, m: int, n: int, k: int, gate="none", form: int = 0) -> None:
    x, w, gate_bits = packed(m, k), packed(n, k), gate_of(gate, m, k)
    expected = reference.binary_matmul(x, w, k, gate_bits)
    assert_same(ops.binary_matmul(x, w, k, gate_bits, form), expected, m, n, k, gate, form)


def binary_threshold(ops: EmulatedOps, m: int, n: int, k: int, gate="none", form: int = 0) -> None:
    x, w, gate_bits = packed(m, k), packed(n, k), gate_of(gate, m, k)
    y = reference.binary_matmul(x, w, k, gate_bits)
    threshold = torch.randint(-3, 4, (n,), dtype=torch.int32)
    if m > 0:
        hit = torch.rand(n) < 0.5  # a threshold that some y equals
        threshold = torch.where(hit, y[torch.randint(0, m, (n,)), torch.arange(n)], threshold)
    scattered(threshold, [-(2**31), 2**31 - 1])
    flip = torch.rand(n) < 0.4
    expected = reference.binary_threshold(x, w, k, threshold, flip, gate_bits)
    actual = ops.binary_threshold(x, w, k, threshold, flip, gate_bits, form)
    assert_same(actual, expected, m, n, k, gate, form)


# ---- products of numbers and signs

SIGN_PRODUCTS = ("sign_matmul", "sign_matmul_t", "masked_input_grad", "gated_weight_grad")


def numbers(shape: tuple[int, int], dtype: torch.dtype, terms: int, exact: bool) -> torch.Tensor:
    """Random numbers; with `exact`, integers such that float32 holds any sum of so many of them."""
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype)
    if not exact:
        return (torch.randn(shape) * torch.randn(shape).exp()).to(dtype)
    most = min(2**8 if dtype == torch.bfloat16 else 2**24, 2**24 // max(terms, 1))
    return torch.randint(-most, most + 1, shape).to(dtype)


def assert_sums(actual: torch.Tensor, expected: torch.Tensor, magnitudes: torch.Tensor, terms: int, *context) -> None:
    """Agreement to the rounding of three planes of `terms` numbers, added to sums below `magnitudes` in any order.

    expected and magnitudes are float64. A plane holds nothing below 2^-133. Rounding to bfloat16 comes on top.
    """
    bound = 3 * terms * (2.0**-24 * magnitudes + 2.0**-133)
    if actual.dtype == torch.bfloat16:
        bound = bound + 2.0**-8 * (expected.abs() + bound)
    error = (actual.double() - expected).abs()
    assert actual.shape == expected.shape and (error <= bound).all(), (float((error - bound).max()), context)


def sign_product(
    ops: EmulatedOps,
    operator: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    gate: str = "none",
    exact: bool = True,
    offset: int = 0,
) -> None:
    """gate: the mask of masked_input_grad, the gate of gated_weight_grad."""
    terms = {"sign_matmul_t": k, "gated_weight_grad": m}.get(operator, n)
    shape = (m, k) if operator == "sign_matmul_t" else (m, n)
    a = at_offset(numbers(shape, dtype, terms, exact), offset)
    bits = packed(m if operator == "gated_weight_grad" else n, k)
    further = [] if gate == "none" else [gate_of(gate, m, k)]
    actual = getattr(ops, operator)(a, bits, k, *further)
    context = (operator, m, n, k, dtype, gate, offset)
    if exact or dtype == torch.uint8:
        return assert_same(actual, getattr(reference, operator)(a, bits, k, *further), *context)
    assert actual.dtype == dtype
    expected = getattr(reference, operator)(a.double(), bits, k, *further)
    absolute = a.double().abs()
    magnitudes = absolute.sum(0 if operator == "gated_weight_grad" else 1).unsqueeze(1)
    assert_sums(actual, expected, magnitudes, terms, *context)


def infinities(ops: EmulatedOps, dtype: torch.dtype) -> None:
    """Infinity stays infinite, NaN stays NaN, both stay in their row; the largest and the least numbers are kept."""
    of_type = torch.finfo(dtype)
    numbers = [math.inf, -math.inf, math.nan, of_type.max, -of_type.max, -0.0, 2.0**-126, -(2.0**-133)]
    a = torch.zeros(len(numbers) + 1, 7, dtype=dtype)
    a[:-1, 2] = torch.tensor(numbers, dtype=dtype)
    a[-1, :2] = torch.tensor([math.inf, -math.inf], dtype=dtype)
    w_bits = packed(7, 9)
    w_bits[:2, 0] |= 1
    expected = a[:-1, 2:3] * reference.unpack_signs(w_bits, 9, dtype)[2]
    y = ops.sign_matmul(a, w_bits, 9)
    torch.testing.assert_close(y[:-1], expected, rtol=0, atol=0, equal_nan=True)
    assert y[-1, 0].isnan()
    if dtype == torch.float32:  # NaNs whose leading half is that of infinity
        nans = torch.tensor([[0x7F800001], [0x7F80FFFF], [0x7FFFFFFF]], dtype=torch.int32).view(dtype)
        assert ops.sign_matmul(nans, packed(1, 3), 3).isnan().all()


def no_contraction(ops: EmulatedOps) -> None:
    """Sums of nothing are 0, and nothing is read for them."""
    nothing = torch.empty(3, 0, dtype=torch.int64)
    assert_same(ops.sign_matmul_t(torch.empty(2, 0), nothing, 0), torch.zeros(2, 3))
    assert_same(ops.sign_matmul(torch.empty(3, 0), packed(1, 70)[:0], 70), torch.zeros(3, 70))
    assert_same(ops.gated_weight_grad(torch.empty(0, 3), packed(1, 70)[:0], 70), torch.zeros(3, 70))


def sparse_mask(ops: EmulatedOps) -> None:
    """Tiles whose mask recruits nothing are not multiplied, and not left out either."""
    w_bits, mask = packed(5, 200, 1.0), torch.zeros(70, 4, dtype=torch.int64)
    d = torch.full((70, 5), math.inf)
    assert_same(ops.masked_input_grad(d, w_bits, 200, mask), torch.zeros(70, 200))
    expected = torch.zeros(70, 200)
    for row, unit in [(69, 195), (3, 127), (63, 64)]:
        mask[row, unit // 64] = 1 << unit % 64 if unit % 64 < 63 else -(2**63)
        expected[row, unit] = 5
    assert_same(ops.masked_input_grad(torch.ones(70, 5), w_bits, 200, mask), expected)


def ties_to_even_bfloat16(ops: EmulatedOps) -> None:
    """257 and 259 lie between two neighbours each; ties go to the even one. What passes the largest is infinite."""
    a = torch.tensor([[256, 1, 0], [256, 3, 0], [256, 2, 1], [-256, -1, 0], [2.0**127, 2.0**127, 0]]).bfloat16()
    expected = torch.tensor([256.0, 260.0, 260.0, -256.0, math.inf]).bfloat16()
    assert_same(ops.sign_matmul(a, packed(3, 2, 1.0), 2), expected.unsqueeze(1).expand(5, 2))


# ---- engrams


def sample_engram(
    ops: EmulatedOps,
    rows: int,
    k: int,
    rate: float,
    rule: str = "gumbel_top_k",
    temperature: float = 1.0,
    first_row: int = 2**33 + 2**31,
    row_step: int = 2**31 + 1,
    levels: int = 0,
    offset: int = 0,
) -> None:
    """levels: of how many different scores, for ties; 0 for as many as there are units."""
    score = torch.randn(rows, k) if levels == 0 else torch.randint(0, levels, (rows, k)).float() - 1.0
    if rows * k > 40:
        scattered(score, [0.0, -0.0, -0.0, math.inf, math.inf, -math.inf, 1e-45, -1e-45, 3e38, -3e38])
    score, seed = at_offset(score, offset), torch.tensor(SEED)
    arguments = score, seed, rate, rule, temperature, first_row, row_step
    expected = reference.sample_engram(*arguments)
    assert_same(ops.sample_engram(*arguments), expected, rows, k, rate, rule, temperature, levels, offset)


def bernoulli_at_a_draw(ops: EmulatedOps) -> None:
    """A rate that is one unit's draw does not recruit it; a little more does."""
    seed = torch.tensor(SEED)
    draw = int(reference.philox(seed, 1, 70)[0, 5])
    for threshold, recruited in [(draw, 0), (draw + 1, 1)]:
        gate = ops.sample_engram(torch.empty(1, 70), seed, threshold / 2**32, "bernoulli")
        assert int(gate[0, 0]) >> 5 & 1 == recruited


def sample_engram_of_nan(ops: EmulatedOps, k: int, offset: int = 0) -> None:
    """Reported wherever scores are read."""
    seed = torch.tensor(SEED)
    for place in (0, k - 1, 2 * k - 1):
        score = at_offset(torch.randn(2, k), offset)
        score.view(-1)[place] = math.nan
        for temperature in (0.0, 1.0):
            assert_reports_nan(ops.sample_engram, score, seed, 0.3, temperature=temperature)
        ops.sample_engram(score, seed, 0.3, temperature=math.inf)
        ops.sample_engram(score, seed, 0.3, "bernoulli")


# ---- standardising


def standardise(ops: EmulatedOps, m: int, n: int, eps: float = 2.0**-17, whole: bool = False) -> None:
    y, d = (torch.randn(m, n) * 2.0 ** torch.randint(-20, 20, (m, n)) for _ in range(2))  # so far apart that sums round
    if whole:
        y = y.round()
    z, moments = ops.standardise(y, eps)
    expected = reference.standardise(y, eps)
    assert_same(moments, expected[1], m, n, eps)
    assert_same(z, expected[0], m, n, eps)
    assert_same(ops.standardise_grad(d, y, moments), reference.standardise_grad(d, y, moments), m, n, eps)


# ---- a few shapes that reach every line, for builds that are slow to run


def _with_processors(check, multiprocessors: int, **arguments):
    def run(ops: EmulatedOps) -> None:
        check(replace(ops, multiprocessors=multiprocessors), **arguments)

    return run


# By the file in csrc/cuda.
COMPACT = {
    "pack.cuh": [
        *(partial(pack_signs, rows=3, k=k, dtype=dtype) for dtype in FLOATS for k in (260, 131)),
        *(partial(pack_signs, rows=2, k=132, dtype=dtype, offset=1) for dtype in FLOATS[:2]),
        *(partial(pack_signs_of_nan, k=k, dtype=dtype) for dtype in FLOATS for k in (132, 131)),
        *(partial(pack_window, rows=3, k=k, gate=gate) for gate in GATES for k in (260, 131)),
    ],
    "unpack.cuh": [partial(unpack_signs, rows=3, k=k, dtype=dtype) for dtype in PATTERNS for k in (144, 131, 1)]
    + [partial(unpack_signs_to_an_unaligned_tensor, dtype=dtype) for dtype in PATTERNS],
    "unfold.cuh": [partial(unfold_bits, window=window, samples=2) for window in WINDOWS],
    "valid_gate.cuh": [partial(valid_gate, rows=rows, k=k) for rows in (1, 5) for k in (1, 64, 131, 300)],
    "standardise.cuh": [
        *(partial(standardise, m=m, n=n) for m in (1, 11) for n in (1, 33, 200)),
        partial(standardise, m=3, n=100, eps=0.5, whole=True),
    ],
    "sample_engram.cuh": [
        partial(sample_engram, rows=3, k=260, rate=0.3, rule="bernoulli"),
        partial(sample_engram, rows=2, k=131, rate=1.0, rule="bernoulli"),
        bernoulli_at_a_draw,
        *(partial(sample_engram_of_nan, k=k) for k in (132, 131)),
        partial(sample_engram, rows=2, k=1300, rate=0.1),
        partial(sample_engram, rows=2, k=1301, rate=0.5, temperature=0.3),
        partial(sample_engram, rows=2, k=1300, rate=0.4, temperature=0.0, levels=3),
        partial(sample_engram, rows=2, k=1303, rate=0.7, temperature=0.0, levels=2),
        partial(sample_engram, rows=1, k=5, rate=0.01, temperature=math.inf),
        partial(sample_engram, rows=2, k=260, rate=0.3, temperature=math.inf),
        partial(sample_engram, rows=1, k=260, rate=0.3, offset=1),
    ],
    "binary_matmul.cuh": [
        _with_processors(check, multiprocessors, m=m, n=n, k=k, gate=gate, form=TILES)
        for multiprocessors in (SMALL_TILES, LARGE_TILES)
        for gate in GATES
        for check, m, n, k in [
            (binary_matmul, 35, 40, 2700),
            (binary_matmul, 67, 69, 129),
            (binary_threshold, 35, 130, 300),
        ]
    ],
    "binary_dot.cuh": [
        *(partial(binary_matmul, m=m, n=17, k=70) for m in (1, 8, 9, 0)),  # as the launcher chooses
        *(
            partial(check, m=m, n=n, k=k, gate=gate, form=DOTS)
            for gate in GATES
            for check, m, n, k in [
                (binary_matmul, 1, 70, 2200),
                (binary_matmul, 5, 37, 1100),
                (binary_threshold, 1, 70, 300),
                (binary_threshold, 6, 33, 129),
            ]
        ),
    ],
    "sign_product.cuh": [
        *(
            partial(sign_product, operator=operator, m=m, n=n, k=k, dtype=dtype, exact=exact)
            for operator in SIGN_PRODUCTS[:2]
            for dtype in (torch.float32, torch.bfloat16)
            for m, n, k, exact in [(67, 36, 132, True), (3, 131, 69, False)]
        ),
        *(
            partial(sign_product, operator=operator, m=m, n=n, k=k, dtype=dtype, gate=gate)
            for operator in SIGN_PRODUCTS[2:]
            for dtype in (torch.float32, torch.bfloat16)
            for m, n, k in [(67, 36, 132), (37, 67, 131)]
            for gate in GATES
            if gate != "none" or operator == "gated_weight_grad"
        ),
        partial(sign_product, operator="sign_matmul_t", m=3, n=5, k=200, dtype=torch.uint8),
        partial(sign_product, operator="sign_matmul_t", m=66, n=131, k=67, dtype=torch.uint8),
        partial(sign_product, operator="sign_matmul", m=66, n=1, k=130),
        partial(sign_product, operator="gated_weight_grad", m=132, n=36, k=132, exact=False, offset=1),
        partial(infinities, dtype=torch.float32),
        partial(infinities, dtype=torch.bfloat16),
        no_contraction,
        sparse_mask,
        ties_to_even_bfloat16,
    ],
}
