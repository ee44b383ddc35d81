"""The emulator does what CUDA's documents say, and its checker finds errors, and nothing else.

Expected values are computed here by numpy from the definitions in the CUDA C++ Programming Guide and the PTX ISA.
"""

import itertools
import re
import shutil
import subprocess
from enum import IntEnum, auto
from pathlib import Path

import numpy as np
import pytest
import torch

from emulator import build
from emulator.build import EmulatorError, Flag, Read, Write

FOLDER = Path(__file__).parent
HOST = FOLDER / "self_test.cpp"
SCHEDULES = range(6)

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason=f"{build.COMPILER} not installed")


@pytest.fixture(scope="module", params=[(750, "fast"), (800, "fast"), (750, "checked"), (800, "checked")], ids=str)
def library(request):
    """Right kernels must give the same in both builds, and no error in the checked one."""
    return build.load(HOST, *request.param)


@pytest.fixture(scope="module", params=[800, 1000], ids=str)
def newer(request):
    """For what only sm_80 and later have."""
    return build.load(HOST, request.param, "checked")


def architecture_of(library) -> int:
    return int(library.path.parent.name.removeprefix("self_test_").split("_")[0])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def garbage(*shape, dtype=torch.int32) -> torch.Tensor:
    return torch.full(shape, 77, dtype=dtype)


# ---- positions and arithmetic


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("grid", "block"), [((1, 1, 1), (1, 1, 1)), ((3, 2, 2), (5, 4, 3)), ((2, 1, 1), (1024, 1, 1))])
def test_every_thread_runs_once_and_knows_its_place(library, grid, block, schedule):
    out = garbage(int(np.prod(grid) * np.prod(block)), 6)
    sizes = dict(zip(("gx", "gy", "gz", "bx", "by", "bz"), (*grid, *block), strict=True))
    library.call("run_positions", out=Write(out), **sizes, schedule=schedule)
    places = itertools.product(*(range(size) for size in (*grid[::-1], *block[::-1])))
    expected = [(bx, by, bz, tx, ty, tz) for bz, by, bx, tz, ty, tx in places]
    assert out.tolist() == [list(place) for place in expected]


@pytest.mark.parametrize(
    ("grid", "block"), [((1, 1, 1), (1025, 1, 1)), ((0, 1, 1), (32, 1, 1)), ((1, 70000, 1), (1, 1, 1))]
)
def test_launches_that_cuda_refuses_are_errors(library, grid, block):
    sizes = dict(zip(("gx", "gy", "gz", "bx", "by", "bz"), (*grid, *block), strict=True))
    with pytest.raises(EmulatorError, match="positions_kernel, a (grid|block) of"):
        library.call("run_positions", out=Write(garbage(6)), **sizes)


def test_integer_functions(library, rng):
    a = rng.integers(0, 2**32, 300, dtype=np.uint32) >> rng.integers(0, 32, 300, dtype=np.uint32)
    b = rng.integers(0, 2**32, 300, dtype=np.uint32)
    a[:5] = [0, 1, 2**31, 2**32 - 1, 6]
    n, out = len(a), np.zeros((13, len(a)), np.uint32)
    result = tensor(out)
    library.call("run_integer_functions", a=Read(tensor(a)), b=Read(tensor(b)), out=Write(result), n=n)
    x, y = [int(v) for v in a], [int(v) for v in b]

    def signed(v):
        return v - 2**32 if v >= 2**31 else v

    def permuted(v, w):
        source, selector = (w << 32 | v).to_bytes(8, "little"), 0x7531 ^ (v & 0x1111)
        return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")

    expected = [
        lambda v, w: bin(v).count("1"),
        lambda v, w: bin(v).count("1") + bin(w).count("1"),
        lambda v, w: 32 - v.bit_length(),
        lambda v, w: (v & -v).bit_length(),
        lambda v, w: int(f"{v:032b}"[::-1], 2),
        lambda v, w: v * w >> 32,
        lambda v, w: (w << 32 | v) << w % 32 >> 32 & 0xFFFFFFFF,
        lambda v, w: (w << 32 | v) >> w % 32 & 0xFFFFFFFF,
        permuted,
        min,
        max,
        lambda v, w: min(signed(v), signed(w)) & 0xFFFFFFFF,
        lambda v, w: max(signed(v), signed(w)) & 0xFFFFFFFF,
    ]
    for row, function in zip(result.tolist(), expected, strict=True):
        assert row == [function(v, w) for v, w in zip(x, y, strict=True)]


def test_float_functions_round_once(library, rng):
    a, b = (rng.standard_normal(300).astype(np.float32) for _ in range(2))
    out = torch.zeros(8, 300)
    a[0], b[1] = np.nan, np.nan
    library.call("run_float_functions", a=Read(tensor(a)), b=Read(tensor(b)), out=Write(out), n=300)
    expected = [a + b, a - b, a * b, a / b, np.sqrt(np.abs(a)), a * b + a, np.fmin(a, b), np.fmax(a, b)]
    np.testing.assert_array_equal(out.numpy(), np.stack(expected))


# ---- collectives


@pytest.mark.parametrize("width", [1, 2, 8, 16, 32])
@pytest.mark.parametrize("argument", [0, 1, 3, 8, 17, 31])
def test_shuffles(library, rng, argument, width):
    values = rng.integers(-1000, 1000, 32, dtype=np.int32)
    lanes = rng.integers(0, 64, 32, dtype=np.int32)
    out = garbage(6, 32)
    arguments = {"values": Read(tensor(values)), "lanes": Read(tensor(lanes)), "out": Write(out)}
    for schedule in SCHEDULES:
        library.call("run_shuffles", **arguments, argument=argument, width=width, schedule=schedule)
        lane = np.arange(32)
        first = lane // width * width
        source = first + lanes % width
        up = np.where(lane - argument >= first, lane - argument, lane)
        down = np.where(lane + argument < first + width, lane + argument, lane)
        xor = np.where(lane ^ argument < first + width, lane ^ argument, lane)
        expected = [values[source], values[up], values[down], values[xor], values[source] + source, xor]
        np.testing.assert_array_equal(out.numpy(), np.stack(expected))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spread", [1, 40, 60, 200])
def test_votes_and_reductions(library, rng, spread, schedule):
    values = rng.integers(-spread, spread + 1, 32, dtype=np.int32)
    out = garbage(12, 32)
    library.call("run_votes", values=Read(tensor(values)), out=Write(out), schedule=schedule)
    votes = out.numpy().view(np.uint32)
    bits = sum(int(v > 0) << lane for lane, v in enumerate(values))
    halves = [slice(0, 16), slice(16, 32)]
    assert (votes[0] == bits).all()
    assert (votes[1] == (values > 100).any()).all() and (votes[2] == (values > -100).all()).all()
    for half, mask in zip(halves, (0x0000FFFF, 0xFFFF0000), strict=True):
        assert (votes[3, half] == bits & mask).all()
        assert (votes[4, half] == (values[half] > 50).any()).all()
        assert (votes[5, half] == (values[half] > -50).all()).all()
    if architecture_of(library) < 800:
        assert (out[6:] == 77).all()
        return
    assert out[6:9, 0].tolist() == [values.sum(), values.min(), values.max()]
    assert (out[6:9] == out[6:9, :1]).all()
    for half in halves:
        unsigned = values[half].view(np.uint32)
        expected = [unsigned.max(), np.bitwise_or.reduce(unsigned), np.bitwise_and.reduce(unsigned)]
        assert (votes[9:12, half] == np.array(expected)[:, None]).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threads", [1, 32, 33, 256])
def test_barriers_count(library, rng, threads, schedule):
    values = rng.integers(0, 2, (5, threads), dtype=np.int32)
    values[0], values[1] = 0, 1
    out = garbage(5, threads, 3)
    arguments = {"values": Read(tensor(values)), "out": Write(out), "rounds": 5, "threads": threads}
    library.call("run_barriers", **arguments, schedule=schedule)
    count = values.sum(1)
    expected = np.stack([count, count > 0, count == threads], axis=1)
    assert (out.numpy() == expected[:, None]).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_atomic_operations(library, rng, schedule):
    values = rng.integers(0, 2**32, 500, dtype=np.uint32)
    counts, results = (
        torch.zeros(8, dtype=torch.int32),
        tensor(np.array([0, 0, 2**32 - 1, 0, 0, 2**32 - 1, 600, 0, 9, 0, 5], np.uint32)),
    )
    arguments = {"values": Read(tensor(values)), "n": 500, "counts": Write(counts), "results": Write(results)}
    library.call("run_atomics", **arguments, schedule=schedule)
    assert counts.tolist() == np.bincount(values % 8, minlength=8).tolist()
    folds = [np.bitwise_or, np.bitwise_and, np.bitwise_xor, np.maximum, np.minimum]
    expected = [values.sum(dtype=np.uint32), *(fold.reduce(values) for fold in folds), 100, 9, values[0], 5, values[1]]
    assert results.tolist() == expected


# ---- fragments and matrix products, by the figures in the PTX ISA


def test_load_matrices(library, rng):
    rows, places = rng.integers(0, 2**16, (4, 8, 8), dtype=np.uint16), rng.permutation(32).astype(np.int32)
    out = garbage(2, 32, 4)
    for schedule in SCHEDULES:
        arguments = {"rows": Read(tensor(rows)), "places": Read(tensor(places)), "out": Write(out)}
        library.call("run_load_matrices", **arguments, schedule=schedule)
        halves = out.numpy().view(np.uint16).reshape(2, 32, 4, 2)
        for lane, matrix, half in itertools.product(range(32), range(4), range(2)):
            assert halves[0, lane, matrix, half] == rows[matrix, lane // 4, lane % 4 * 2 + half]
            assert halves[1, lane, matrix, half] == rows[matrix, lane % 4 * 2 + half, lane // 4]


def fragments_of_a(matrix: np.ndarray, per_register: int) -> np.ndarray:
    """Registers of each lane, as lists of elements. (16, 8 per_register) -> (32, 4, per_register)."""
    elements = np.empty((32, 4, per_register), matrix.dtype)
    for lane, register, i in itertools.product(range(32), range(4), range(per_register)):
        row = lane // 4 + (8 if register in (1, 3) else 0)
        column = lane % 4 * per_register + i + (4 * per_register if register >= 2 else 0)
        elements[lane, register, i] = matrix[row, column]
    return elements


def fragments_of_b(matrix: np.ndarray, per_register: int) -> np.ndarray:
    """(8 per_register, 8) -> (32, 2, per_register)."""
    elements = np.empty((32, 2, per_register), matrix.dtype)
    for lane, register, i in itertools.product(range(32), range(2), range(per_register)):
        elements[lane, register, i] = matrix[lane % 4 * per_register + i + 4 * per_register * register, lane // 4]
    return elements


def fragments_of_c(matrix: np.ndarray) -> np.ndarray:
    """(16, 8) -> (32, 4)."""
    elements = np.empty((32, 4), matrix.dtype)
    for lane, i in itertools.product(range(32), range(4)):
        elements[lane, i] = matrix[lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2]
    return elements


def packed(fragments: np.ndarray) -> torch.Tensor:
    """Elements of 1 bit (as bool), 8 or 16 bits -> 32-bit registers."""
    if fragments.dtype == bool:
        fragments = np.packbits(fragments, axis=-1, bitorder="little")
    return tensor(np.ascontiguousarray(fragments).view(np.uint32)[..., 0])


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of values that are bfloat16 numbers."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def product_operands(kind: str, rng):
    """a, b and c as matrices of numbers, and a, b as elements of registers."""
    c = rng.integers(-1000, 1000, (16, 8), dtype=np.int32)
    if kind == "and":
        a, b = rng.integers(0, 2, (16, 256), dtype=np.int32), rng.integers(0, 2, (256, 8), dtype=np.int32)
        return a, b, c, a.astype(bool), b.astype(bool)
    if kind == "bytes":
        a, b = rng.integers(0, 256, (16, 32), dtype=np.int32), rng.integers(-128, 128, (32, 8), dtype=np.int32)
        return a, b, c, a.astype(np.uint8), b.astype(np.int8)
    # few significant bits: sums are exact in whatever order
    a, b = rng.integers(-64, 65, (16, 16)) * 0.125, rng.integers(-64, 65, (16, 8)) * 2.0
    return a, b, c.astype(np.float32), to_bfloat16(a), to_bfloat16(b)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["and", "bytes", "bfloat16"])
def test_products_of_16_x_8(newer, rng, kind, schedule):
    a, b, c, a_elements, b_elements = product_operands(kind, rng)
    per_register = a.shape[1] // 8
    out = tensor(fragments_of_c(c))
    arguments = {
        "product": ["xor", "and", "bytes", "bfloat16"].index(kind),
        "a": Read(packed(fragments_of_a(a_elements, per_register))),
        "b": Read(packed(fragments_of_b(b_elements, per_register))),
        "c": Write(out),
    }
    newer.call("run_product", **arguments, schedule=schedule)
    np.testing.assert_array_equal(out.numpy(), fragments_of_c((c + 2 * (a @ b)).astype(c.dtype)))


def test_product_of_bfloat16_rounds_as_float32(newer, rng):
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    a, b = ((x.view(np.uint32) & 0xFFFF0000).view(np.float32) for x in (a, b))
    out = torch.zeros(32, 4)
    registers = {
        "a": Read(packed(fragments_of_a(to_bfloat16(a), 2))),
        "b": Read(packed(fragments_of_b(to_bfloat16(b), 2))),
    }
    newer.call("run_product", product=3, **registers, c=Write(out))
    expected = fragments_of_c(2 * (a.astype(np.float64) @ b.astype(np.float64)))
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=32 * 2.0**-24 * np.abs(expected).max())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", ["fast", "checked"])
def test_product_of_bits_8_x_8_by_xor(rng, mode, schedule):
    a, b = rng.integers(0, 2, (8, 128), dtype=np.int32), rng.integers(0, 2, (128, 8), dtype=np.int32)
    c = rng.integers(-1000, 1000, (8, 8), dtype=np.int32)
    words_a, words_b = (
        np.packbits(np.ascontiguousarray(x), axis=1, bitorder="little").view(np.uint32) for x in (a, b.T)
    )
    registers = [np.zeros((32, count), np.uint32) for count in (4, 2)]
    sums = np.zeros((32, 4), np.int32)
    for lane in range(32):
        registers[0][lane, 0] = words_a[lane // 4, lane % 4]
        registers[1][lane, 0] = words_b[lane // 4, lane % 4]
        sums[lane, :2] = c[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
    out = tensor(sums)
    arguments = {"a": Read(tensor(registers[0])), "b": Read(tensor(registers[1])), "c": Write(out)}
    build.load(HOST, 750, mode).call("run_product", product=0, **arguments, schedule=schedule)
    expected = c + 2 * (a[:, :, None] != b[None]).sum(1)
    for lane in range(32):
        assert out[lane, :2].tolist() == expected[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()
        assert out[lane, 2:].tolist() == [0, 0]


# ---- whole kernels


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("rows", "valid"), [(1, 64), (2, 100), (7, 448), (7, 203), (3, 0)])
def test_copies_land_where_awaited_and_fill_with_zeros(library, rng, rows, valid, schedule):
    pieces = rng.integers(0, 2**32, (max(valid, 1), 4), dtype=np.uint32)
    out = tensor(np.full((rows, 64, 4), 77, np.uint32))
    arguments = {"in": Read(tensor(pieces)), "out": Write(out), "rows": rows, "valid": valid}
    library.call("run_copies", **arguments, schedule=schedule)
    expected = np.zeros((rows * 64, 4), np.uint32)
    expected[:valid] = pieces[:valid]
    np.testing.assert_array_equal(out.numpy(), expected.reshape(rows, 64, 4)[:, ::-1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 33), (9, 64)])
def test_right_kernel_of_several_blocks(library, rng, m, n, schedule):
    x, w = (rng.integers(0, 2**64, size, dtype=np.uint64) for size in (m, n))
    y, flag = garbage(m, n), garbage(1)
    arguments = {"x": Read(tensor(x)), "w": Read(tensor(w)), "y": Write(y), "M": m, "N": n, "flag": Flag(flag)}
    library.call("run_differences", **arguments, schedule=schedule)
    assert y.tolist() == [[bin(int(a) ^ int(b)).count("1") for b in w] for a in x]
    assert flag.item() == 1


# ---- the checker


class Fault(IntEnum):
    """As in self_test.cuh."""

    NONE = 0
    READ_BEYOND = auto()
    READ_BEFORE = auto()
    WRITE_BEYOND = auto()
    WRITE_READ_ONLY = auto()
    COPY_OF_BYTES_BEYOND = auto()
    MISALIGNED = auto()
    INDEX_BEYOND_SHARED_ARRAY = auto()
    POINTER_BEYOND_SHARED_ARRAY = auto()
    UNINITIALISED = auto()
    UNINITIALISED_ROW = auto()
    NO_BARRIER_BEFORE_READ = auto()
    NO_BARRIER_BEFORE_WRITE = auto()
    NO_WARP_BARRIER = auto()
    SHUFFLE_FOR_BARRIER = auto()
    PLAIN_WRITE_BESIDE_ATOMIC = auto()
    BLOCKS_WRITE_ONE_ELEMENT = auto()
    BLOCK_READS_WHAT_ANOTHER_WRITES = auto()
    RETURN_BEFORE_BARRIER = auto()
    DIFFERENT_BARRIERS = auto()
    LANES_MISSING = auto()
    LANE_NOT_IN_MASK = auto()
    SHUFFLE_FROM_OUTSIDE = auto()
    RETURNED_LANE_IN_MASK = auto()
    HALF_WARP_LOADS_MATRICES = auto()
    MISALIGNED_ROW = auto()
    ROW_NOT_SHARED = auto()
    SHIFT_TOO_FAR = auto()
    OVERFLOW = auto()
    COPY_TO_GLOBAL = auto()
    MISALIGNED_COPY = auto()
    COPY_FROM_BEYOND = auto()
    COPY_OVER_READS = auto()
    COPY_NOT_AWAITED = auto()
    COPY_AWAITED_TOO_LITTLE = auto()
    COPY_WITHOUT_BARRIER = auto()
    COPY_TWICE = auto()
    COPY_IN_FLIGHT_AT_RETURN = auto()
    SOURCE_CHANGED = auto()


def race(name: str, *kinds: str) -> str:
    """Either order of two accesses."""
    orders = (rf"{later} of {name}, byte \d+, after an? {earlier}" for earlier, later in itertools.permutations(kinds))
    return f"race: ({'|'.join(orders)})"


# What the message must say. Where a lane goes missing, those that wait and those that return tell differently of it,
# by who comes first.
IN_FLIGHT = r"read of pieces, byte \d+, which an asynchronous copy is still to write"
ABSENT = r"waits for ever for other lanes of its warp|mask 0xffffffff names lane \d+, which is not there"
MESSAGES = {
    Fault.READ_BEYOND: r"out of bounds: read of 4 bytes of global memory, at byte 256 of x, which has 256",
    Fault.READ_BEFORE: r"out of bounds: read of 4 bytes of global memory, 4 bytes before x",
    Fault.WRITE_BEYOND: r"out of bounds: write of 4 bytes of global memory, at byte 256 of y, which has 256",
    Fault.WRITE_READ_ONLY: r"write of x, byte 12, which may only be read",
    Fault.COPY_OF_BYTES_BEYOND: r"out of bounds: read of 256 bytes of global memory, at byte 4 of x",
    Fault.MISALIGNED: r"misaligned: an address that is 8 beyond a multiple of 16 bytes",
    Fault.INDEX_BEYOND_SHARED_ARRAY: r"out of bounds: index 64 of an array",
    Fault.POINTER_BEYOND_SHARED_ARRAY: r"out of bounds: write of 4 bytes of shared memory at values, byte 256 of 256",
    Fault.UNINITIALISED: r"uninitialised: read of values, byte 20",
    Fault.UNINITIALISED_ROW: r"uninitialised: read of pieces, byte 80",
    Fault.NO_BARRIER_BEFORE_READ: r"(race|uninitialised): read of values, byte \d+",
    Fault.NO_BARRIER_BEFORE_WRITE: race("values", "read", "write"),
    Fault.NO_WARP_BARRIER: r"(race|uninitialised): read of values, byte \d+",
    Fault.SHUFFLE_FOR_BARRIER: r"race: read of values, byte \d+, after a write by thread",
    Fault.PLAIN_WRITE_BESIDE_ATOMIC: race("values", "atomic update", "write"),
    Fault.BLOCKS_WRITE_ONE_ELEMENT: r"race: write of y, byte 28, after a write by another block",
    Fault.BLOCK_READS_WHAT_ANOTHER_WRITES: race("y", "read", "write") + " by another block",
    Fault.RETURN_BEFORE_BARRIER: r"a barrier that not all threads reach, .* thread \(5, 0, 0\) has returned",
    Fault.DIFFERENT_BARRIERS: r"threads wait at different barriers: .* at .*, \(5, 0, 0\) at",
    Fault.LANES_MISSING: ABSENT,
    Fault.LANE_NOT_IN_MASK: r"a lane that is not in its own mask 0x0000ffff",
    Fault.SHUFFLE_FROM_OUTSIDE: r"a shuffle from lane 20, which is not in mask 0x0000ffff",
    Fault.RETURNED_LANE_IN_MASK: ABSENT,
    Fault.HALF_WARP_LOADS_MATRICES: ABSENT,
    Fault.MISALIGNED_ROW: r"a row of a matrix is not aligned to 16 bytes",
    Fault.ROW_NOT_SHARED: r"a row of a matrix is not in shared memory",
    Fault.SHIFT_TOO_FAR: r"undefined: a shift by \d+",
    Fault.OVERFLOW: r"undefined: signed overflow of a sum",
    Fault.COPY_TO_GLOBAL: r"the target of an? (asynchronous )?copy is not in shared memory",
    Fault.MISALIGNED_COPY: r"the source of an? (asynchronous )?copy is not aligned to 16 bytes",
    Fault.COPY_FROM_BEYOND: r"out of bounds: read of 16 bytes of global memory, at byte 256 of x",
    Fault.COPY_OVER_READS: race("pieces", "read", "write") + f"|{IN_FLIGHT}",
}
ASYNCHRONOUS_MESSAGES = {  # which copies are from sm_80 on
    Fault.COPY_NOT_AWAITED: IN_FLIGHT,
    Fault.COPY_AWAITED_TOO_LITTLE: IN_FLIGHT,
    Fault.COPY_WITHOUT_BARRIER: r"(race|uninitialised): read of pieces|" + IN_FLIGHT,
    Fault.COPY_TWICE: r"a second asynchronous copy to pieces, byte \d+",
    Fault.COPY_IN_FLIGHT_AT_RETURN: r"returns with asynchronous copies in flight",
    Fault.SOURCE_CHANGED: r"the source of an asynchronous copy was changed while in flight",
}


def run_faulty(library, fault: Fault, schedule: int) -> None:
    x, y = torch.arange(64, dtype=torch.int32), garbage(64)
    library.call("run_faulty", fault=int(fault), x=Read(x), y=Write(y), n=64, schedule=schedule)


def line_of(text: str) -> int:
    """The first line of self_test.cuh with a text."""
    lines = (FOLDER / "self_test.cuh").read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


def source_line_of(fault: Fault) -> range:
    """Lines of the case of a fault in self_test.cuh."""
    lines = (FOLDER / "self_test.cuh").read_text().splitlines()
    first = line_of(f"case Fault::k{fault.name.title().replace('_', '')}:")
    return range(first, next(i for i in range(first, len(lines)) if lines[i - 1].strip() == "break;") + 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("architecture", "fault"),
    [*((750, fault) for fault in MESSAGES), *((800, fault) for fault in MESSAGES | ASYNCHRONOUS_MESSAGES)],
    ids=lambda value: value.name.lower() if isinstance(value, Fault) else str(value),
)
def test_checker_finds(architecture, fault, schedule):
    with pytest.raises(EmulatorError) as error:
        run_faulty(build.load(HOST, architecture, "checked"), fault, schedule)
    message = str(error.value)
    assert re.search((MESSAGES | ASYNCHRONOUS_MESSAGES)[fault], message), message
    assert re.match(r"engram::cuda::self_test::faulty_kernel, block \(\d, 0, 0\)", message)
    if fault != Fault.COPY_IN_FLIGHT_AT_RETURN:
        place = re.search(r"self_test\.cuh:(\d+)$", message) or re.search(r"self_test\.cuh:(\d+)", message)
        assert place and int(place[1]) in source_line_of(fault), message


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", ["fast", "checked"])
def test_the_same_kernel_without_a_fault_passes(mode, schedule):
    run_faulty(build.load(HOST, 800, mode), Fault.NONE, schedule)


@pytest.mark.parametrize("fault", [Fault.WRITE_BEYOND, Fault.WRITE_READ_ONLY], ids=lambda fault: fault.name.lower())
def test_fast_build_finds_stray_writes(fault):
    with pytest.raises(
        EmulatorError, match="a write outside of every tensor, 256 bytes from the start of y|x: written"
    ):
        run_faulty(build.load(HOST, 800, "fast"), fault, schedule=0)


@pytest.mark.parametrize(
    "fault",
    [Fault.RETURN_BEFORE_BARRIER, Fault.DIFFERENT_BARRIERS, Fault.LANES_MISSING, Fault.SHUFFLE_FROM_OUTSIDE,
     Fault.MISALIGNED_ROW, Fault.COPY_IN_FLIGHT_AT_RETURN],
    ids=lambda fault: fault.name.lower(),
)  # fmt: skip
def test_fast_build_finds_threads_that_part(fault):
    with pytest.raises(EmulatorError, match=(MESSAGES | ASYNCHRONOUS_MESSAGES)[fault]):
        run_faulty(build.load(HOST, 800, "fast"), fault, schedule=0)


def test_a_kernel_runs_after_another_has_failed(library):
    with pytest.raises(EmulatorError):
        run_faulty(library, Fault.LANES_MISSING, schedule=0)
    run_faulty(library, Fault.NONE, schedule=0)


def test_every_fault_is_tested():
    assert set(MESSAGES) | set(ASYNCHRONOUS_MESSAGES) == set(Fault) - {Fault.NONE}
    source = (FOLDER / "self_test.cuh").read_text()
    names = re.findall(r"k\w+", source.split("enum class Fault : int {")[1].split("}")[0])
    assert [name.lower() for name in names] == ["k" + fault.name.lower().replace("_", "") for fault in Fault]


# ---- arguments


def test_tensors_keep_their_strides_and_alignment():
    memory = torch.arange(40, dtype=torch.int32)
    view = memory[1:36].view(5, 7)[:, :3]
    guarded = build.GuardedMemory({"x": Read(view), "none": Read(memory[:0])})
    assert guarded.spans["x"][1] == 4 * (4 * 7 + 3) and guarded.spans["none"][1] == 0
    assert (guarded.address("x") - view.data_ptr()) % build.ALIGNMENT == 0
    guarded.write_back()


# ---- coverage


def test_coverage_counts_a_line_that_any_instance_ran():
    library = build.load(HOST, 800, "coverage")
    run_faulty(library, Fault.NONE, schedule=0)
    first = library.coverage(FOLDER)["self_test.cuh"]
    of_product = line_of("Sum own_c[4] = {")
    assert of_product in first.executable and of_product not in first.executed and of_product in first.missed
    assert line_of("const int across = ") in first.executed and 0 < first.ratio < 1

    operands = {"a": Read(torch.zeros(32, 4, dtype=torch.int32)), "b": Read(torch.zeros(32, 2, dtype=torch.int32))}
    library.call("run_product", product=1, **operands, c=Write(garbage(32, 4)))
    second = library.coverage(FOLDER)["self_test.cuh"]
    assert second.executed >= first.executed | {of_product} and second.executable == first.executable
    assert build.merged({"f": first}, {"f": second})["f"] == second


# ---- nvcc

NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc not installed: the kernels of the self test are not compiled for GPUs")
@pytest.mark.parametrize("architecture", ["75", "80", "90a", "100"])
def test_nvcc_takes_the_same_source(tmp_path, architecture):
    source = tmp_path / "self_test.cu"
    source.write_text('#include "self_test.cpp"\n')
    command = [
        NVCC,
        "-std=c++17",
        f"-arch=sm_{architecture}",
        f"-I{build.ROOT / 'csrc'}",
        f"-I{FOLDER}",
        "-Werror=all-warnings",
    ]
    done = subprocess.run([*command, "-c", source, "-o", tmp_path / "self_test.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for fault in ("faulty_kernel", "copies_kernel", "product_kernel"):
        assert fault.encode() in (tmp_path / "self_test.o").read_bytes()
