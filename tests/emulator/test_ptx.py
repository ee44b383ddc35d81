"""The PTX interpreter: every instruction against integers and fractions of Python, every check shown to fire."""

import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from . import machine_code, ptx

N = 512
HEADER = ".version 8.3\n.target sm_80\n.address_size 64\n"


def pool(dtype: str, rng: np.random.Generator) -> np.ndarray:
    """N values, half of them corner cases."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        x = rng.standard_normal(N) * 2.0 ** rng.integers(-20, 20, N)
        corners = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1.5, 2.5, -0.5, 1e-40, 3e38, 65504.0, 0.1, 1 / 3]
    else:
        x = rng.integers(0, 1 << 63, N) * 2 + rng.integers(0, 2, N)
        bits = 8 * kind.itemsize
        corners = [0, 1, 2, 3, 7, 8, 31, 32, 33, bits, 0x1234, *(2**bits - n for n in (1, 2, 8)), 2 ** (bits - 1),
                   2 ** (bits - 1) - 1]  # fmt: skip
    values = [x[i] if i % 2 else corners[rng.integers(len(corners))] for i in range(N)]
    if kind.kind == "f":
        return np.array(values, np.float64).astype(kind)
    return (
        np.array([int(v) & (1 << 8 * kind.itemsize) - 1 for v in values], np.uint64)
        .astype(f"u{kind.itemsize}")
        .view(kind)
    )


def evaluate(text: str, operands: list[np.ndarray], result: str) -> np.ndarray:
    """Runs one line of PTX for N threads. {0}, {1}, ... are its operands, {z} its result; %p and %q are predicates."""
    dtype = np.dtype(result)
    arrays = [*operands, np.zeros(N, dtype)]
    names = [*(f"%o{i}" for i in range(len(operands))), "%z"]
    lines = [".reg .pred %p, %q;", ".reg .b32 %t, %n, %m, %u<4>;", ".reg .b16 %h<4>;", "mov.u32 %m, %tid.x;",
             "mov.u32 %n, %ctaid.x;", "mad.lo.u32 %t, %n, 128, %m;"]  # fmt: skip
    for i, (array, name) in enumerate(zip(arrays, names, strict=True)):
        lines += [f".reg .b64 %a{i};", f".reg .b{8 * array.itemsize} {name};", f"ld.param.u64 %a{i}, [p{i}];",
                  f"mad.wide.u32 %a{i}, %t, {array.itemsize}, %a{i};"]  # fmt: skip
    lines += [f"ld.global.b{8 * a.itemsize} %o{i}, [%a{i}];" for i, a in enumerate(operands)]
    lines += [text.format(*names, z="%z"), f"st.global.b{8 * dtype.itemsize} [%a{len(operands)}], %z;", "ret;"]
    params = ", ".join(f".param .u64 p{i}" for i in range(len(arrays)))
    module = ptx.Module(f"{HEADER}.visible .entry k({params})\n{{\n" + "\n".join(lines) + "\n}\n")
    memory = ptx.Memory()
    pointers = [memory.add(array, f"operand {i}", read_only=array is not arrays[-1]) for i, array in enumerate(arrays)]
    module.launch("k", (N // 128,), (128,), memory, pointers)
    return arrays[-1]


def wrapped(value: int, dtype: str) -> int:
    kind = np.dtype(dtype)
    value &= (1 << 8 * kind.itemsize) - 1
    return value - (1 << 8 * kind.itemsize) if kind.kind == "i" and value >> 8 * kind.itemsize - 1 else value


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


def bits_of(x: int, start: int, length: int, width: int, signed: bool) -> int:
    """bfe, as the PTX ISA's pseudocode has it."""
    start, length = start & 255, length & 255
    sign = x >> min(start + length - 1, width - 1) & 1 if signed and length else 0
    return sum((x >> start + i & 1 if i < length and start + i < width else sign) << i for i in range(width))


def lut(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


def permuted(a: int, b: int, control: int) -> int:
    source, result = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        nibble = control >> 4 * i & 15
        byte = source[nibble & 7]
        result |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return result


def bytes_of(x: int, signed: bool) -> list[int]:
    return [int.from_bytes([b], "little", signed=signed) for b in (x & 0xFFFFFFFF).to_bytes(4, "little")]


INTEGER_CASES: list[tuple[str, list[str], str, Callable[..., int]]] = [
    ("add.s32 {z}, {0}, {1};", ["i4", "i4"], "i4", lambda a, b: a + b),
    ("add.sat.s32 {z}, {0}, {1};", ["i4", "i4"], "i4", lambda a, b: max(-(2**31), min(2**31 - 1, a + b))),
    ("sub.s64 {z}, {0}, {1};", ["i8", "i8"], "i8", lambda a, b: a - b),
    ("add.s16 {z}, {0}, {1};", ["i2", "i2"], "i2", lambda a, b: a + b),
    ("mul.lo.s32 {z}, {0}, {1};", ["i4", "i4"], "i4", lambda a, b: a * b),
    ("mul.hi.s32 {z}, {0}, {1};", ["i4", "i4"], "i4", lambda a, b: a * b >> 32),
    ("mul.hi.u32 {z}, {0}, {1};", ["u4", "u4"], "u4", lambda a, b: a * b >> 32),
    ("mul.hi.u64 {z}, {0}, {1};", ["u8", "u8"], "u8", lambda a, b: a * b >> 64),
    ("mul.hi.s64 {z}, {0}, {1};", ["i8", "i8"], "i8", lambda a, b: a * b >> 64),
    ("mul.wide.s32 {z}, {0}, {1};", ["i4", "i4"], "i8", lambda a, b: a * b),
    ("mul.wide.u16 {z}, {0}, {1};", ["u2", "u2"], "u4", lambda a, b: a * b),
    ("mad.lo.s32 {z}, {0}, {1}, {2};", ["i4", "i4", "i4"], "i4", lambda a, b, c: a * b + c),
    ("mad.wide.u32 {z}, {0}, {1}, {2};", ["u4", "u4", "u8"], "u8", lambda a, b, c: a * b + c),
    ("mad.hi.s32 {z}, {0}, {1}, {2};", ["i4", "i4", "i4"], "i4", lambda a, b, c: (a * b >> 32) + c),
    ("or.b32 {1}, {1}, 1; div.s32 {z}, {0}, {1};", ["i4", "i4"], "i4", lambda a, b: truncated(a, b | 1)),
    ("or.b32 {1}, {1}, 1; rem.s32 {z}, {0}, {1};", ["i4", "i4"], "i4", lambda a, b: a - truncated(a, b | 1) * (b | 1)),
    ("or.b64 {1}, {1}, 1; div.u64 {z}, {0}, {1};", ["u8", "u8"], "u8", lambda a, b: a // (b | 1)),
    ("or.b64 {1}, {1}, 1; rem.s64 {z}, {0}, {1};", ["i8", "i8"], "i8", lambda a, b: a - truncated(a, b | 1) * (b | 1)),
    ("shl.b32 {z}, {0}, {1};", ["u4", "u4"], "u4", lambda a, b: a << b if b < 32 else 0),
    ("shr.u64 {z}, {0}, {1};", ["u8", "u4"], "u8", lambda a, b: a >> b if b < 64 else 0),
    ("shr.s32 {z}, {0}, {1};", ["i4", "u4"], "i4", lambda a, b: a >> min(b, 31)),
    ("shr.s16 {z}, {0}, {1};", ["i2", "u4"], "i2", lambda a, b: a >> min(b, 15)),
    ("shf.l.wrap.b32 {z}, {0}, {1}, {2};", ["u4"] * 3, "u4", lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    ("shf.r.wrap.b32 {z}, {0}, {1}, {2};", ["u4"] * 3, "u4", lambda a, b, c: (b << 32 | a) >> (c & 31)),
    ("shf.l.clamp.b32 {z}, {0}, {1}, {2};", ["u4"] * 3, "u4", lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32),
    ("shf.r.clamp.b32 {z}, {0}, {1}, {2};", ["u4"] * 3, "u4", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    ("bfe.u32 {z}, {0}, {1}, {2};", ["u4"] * 3, "u4", lambda a, b, c: bits_of(a, b, c, 32, False)),
    ("bfe.s32 {z}, {0}, {1}, {2};", ["i4", "u4", "u4"], "i4", lambda a, b, c: bits_of(a, b, c, 32, True)),
    ("bfe.s64 {z}, {0}, {1}, {2};", ["i8", "u4", "u4"], "i8", lambda a, b, c: bits_of(a, b, c, 64, True)),
    ("bfe.u64 {z}, {0}, 5, {1};", ["u8", "u4"], "u8", lambda a, c: bits_of(a, 5, c, 64, False)),
    ("and.b32 {2}, {2}, 255; bfi.b32 {z}, {0}, {1}, {2}, 9;", ["u4"] * 3, "u4",
     lambda a, b, c: b if c & 255 >= 32 else b & ~(0x1FF << (c & 255)) | (a & 0x1FF) << (c & 255)),
    ("bfi.b64 {z}, {0}, {1}, 8, 40;", ["u8", "u8"], "u8",
     lambda a, b: b & ~((1 << 40) - 1 << 8) | (a & (1 << 40) - 1) << 8),
    ("prmt.b32 {z}, {0}, {1}, {2};", ["u4"] * 3, "u4", permuted),
    ("prmt.b32.f4e {z}, {0}, {1}, {2};", ["u4"] * 3, "u4", lambda a, b, c: (b << 32 | a) >> 8 * (c & 3)),
    ("prmt.b32.rc16 {z}, {0}, {1}, {2};", ["u4"] * 3, "u4", lambda a, b, c: (a >> 16 * (c & 1) & 0xFFFF) * 0x10001),
    ("lop3.b32 {z}, {0}, {1}, {2}, 0xE8;", ["u4"] * 3, "u4", lambda a, b, c: lut(a, b, c, 0xE8)),
    ("lop3.b32 {z}, {0}, {1}, {2}, 0x28;", ["u4"] * 3, "u4", lambda a, b, c: (a ^ b) & c),
    ("setp.gt.u32 %q, {0}, {1}; lop3.or.b32 %u0|%p, {0}, {1}, {2}, 0x80, %q; selp.u32 {z}, 1, 0, %p;", ["u4"] * 3,
     "u4", lambda a, b, c: int(a & b & c != 0 or a > b)),
    ("popc.b32 {z}, {0};", ["u4"], "u4", lambda a: a.bit_count()),
    ("popc.b64 {z}, {0};", ["u8"], "u4", lambda a: a.bit_count()),
    ("clz.b32 {z}, {0};", ["u4"], "u4", lambda a: 32 - a.bit_length()),
    ("clz.b64 {z}, {0};", ["u8"], "u4", lambda a: 64 - a.bit_length()),
    ("brev.b32 {z}, {0};", ["u4"], "u4", lambda a: int(f"{a:032b}"[::-1], 2)),
    ("bfind.u32 {z}, {0};", ["u4"], "i4", lambda a: a.bit_length() - 1),
    ("bfind.s32 {z}, {0};", ["i4"], "i4", lambda a: (~a if a < 0 else a).bit_length() - 1),
    ("bfind.shiftamt.u32 {z}, {0};", ["u4"], "i4", lambda a: 32 - a.bit_length() if a else -1),
    ("min.s32 {z}, {0}, {1};", ["i4", "i4"], "i4", min),
    ("max.u64 {z}, {0}, {1};", ["u8", "u8"], "u8", max),
    ("abs.s32 {z}, {0};", ["i4"], "i4", abs),
    ("neg.s16 {z}, {0};", ["i2"], "i2", lambda a: -a),
    ("not.b64 {z}, {0};", ["u8"], "u8", lambda a: ~a),
    ("and.b32 {z}, {0}, {1};", ["u4", "u4"], "u4", lambda a, b: a & b),
    ("xor.b16 {z}, {0}, {1};", ["u2", "u2"], "u2", lambda a, b: a ^ b),
    ("setp.lt.and.s32 %p, {0}, {1}, %p; setp.le.s32 %q, {0}, {1}; setp.ge.and.u32 %p, {0}, {1}, %q;"
     "selp.b32 {z}, {0}, {1}, %p;", ["i4", "i4"], "i4",
     lambda a, b: a if wrapped(a, "u4") >= wrapped(b, "u4") and a <= b else b),
    ("setp.hi.u32 %p|%q, {0}, {1}; selp.u32 %u0, 1, 0, %p; selp.u32 %u1, 2, 0, %q; add.u32 {z}, %u0, %u1;",
     ["u4", "u4"], "u4", lambda a, b: 1 if a > b else 2),
    ("setp.ne.s32 %p, {0}, {1}; mov.u32 {z}, 5; @!%p mov.u32 {z}, 7;", ["i4", "i4"], "u4",
     lambda a, b: 5 if a != b else 7),
    ("set.lt.u32.s32 {z}, {0}, {1};", ["i4", "i4"], "u4", lambda a, b: 0xFFFFFFFF if a < b else 0),
    ("slct.u32.s32 {z}, {0}, {1}, {2};", ["u4", "u4", "i4"], "u4", lambda a, b, c: a if c >= 0 else b),
    ("cvt.s32.s8 {z}, {0};", ["u4"], "i4", lambda a: wrapped(a, "i1")),
    ("cvt.u16.u32 {z}, {0};", ["u4"], "u2", lambda a: a),
    ("cvt.s64.s32 {z}, {0};", ["i4"], "i8", lambda a: a),
    ("cvt.sat.s8.s32 %h0, {0}; cvt.s32.s16 {z}, %h0;", ["i4"], "i4", lambda a: max(-128, min(127, a))),
    ("cvt.sat.u16.s64 {z}, {0};", ["i8"], "u2", lambda a: max(0, min(65535, a))),
    ("dp4a.u32.s32 {z}, {0}, {1}, {2};", ["u4", "i4", "i4"], "i4",
     lambda a, b, c: c + sum(x * y for x, y in zip(bytes_of(a, False), bytes_of(b, True), strict=True))),
    ("mov.b32 {{%h0, %h1}}, {0}; mov.b32 {z}, {{%h1, %h0}};", ["u4"], "u4", lambda a: a << 16 | a >> 16),
    ("mov.b64 {{%u0, %u1}}, {0}; mov.b64 {z}, {{%u1, %u0}};", ["u8"], "u8", lambda a: a << 32 | a >> 32),
    ("{{ .reg .b32 %o0; mov.u32 %o0, 3; add.u32 %u0, %o0, 1; }} add.u32 {z}, {0}, %u0;", ["u4"], "u4",
     lambda a: a + 4),
]  # fmt: skip


@pytest.mark.parametrize(("text", "types", "result", "expected"), INTEGER_CASES, ids=[c[0] for c in INTEGER_CASES])
def test_integer_instruction(text, types, result, expected):
    operands = [pool(type_, np.random.default_rng(i)) for i, type_ in enumerate(types)]
    got = evaluate(text, operands, result)
    for i, values in enumerate(zip(*(operand.tolist() for operand in operands), strict=True)):
        assert got[i] == wrapped(expected(*values), result), f"{text} of {values}"


PRECISION = {"f4": (24, -126, 127), "f2": (11, -14, 15), "bf16": (8, -126, 127), "f8": (53, -1022, 1023)}


def rounded(x: Fraction, form: str, mode: str = "rn") -> float:
    """A fraction as a float of some format, rounded once. By integers alone."""
    precision, least, most = PRECISION[form]
    if x == 0:
        return 0.0
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > abs(x)
    unit = Fraction(2) ** (max(exponent, least) - precision + 1)
    whole, rest = divmod(x / unit, 1)
    up = {"rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2), "rm": False, "rp": rest > 0,
          "rz": rest > 0 and x < 0}[mode]  # fmt: skip
    value = (whole + bool(up)) * unit
    limit = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** most
    if abs(value) > limit:
        to_limit = mode == "rz" or (mode == "rm" and x > 0) or (mode == "rp" and x < 0)
        return float(limit if to_limit else np.inf) * (1 if x > 0 else -1)
    return float(value)


def finite(dtype: str, seed: int) -> np.ndarray:
    """Floats that are numbers, of few exponents, so that sums cancel, and some subnormal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(N) * 2.0 ** rng.integers(-3, 3, N)
    x[::5] = np.round(x[::5] * 4) / 4
    x[1::17] *= 2.0**-130 if dtype != "f2" else 2.0**-16
    x[2::17] *= 2.0**120 if dtype != "f2" else 2.0**9
    return x.astype(np.float32).astype(np.float64 if dtype == "f8" else dtype)


def check_floats(got: np.ndarray, expected: list[float], what: str) -> None:
    for i, (a, b) in enumerate(zip(got.astype(np.float64).tolist(), expected, strict=True)):
        assert a == b or (np.isnan(a) and np.isnan(b)), f"{what}, lane {i}: {a!r}, expected {b!r}"


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_float32_arithmetic_rounds_once(name, mode):
    a, b, c = (finite("f4", seed) for seed in range(3))
    with np.errstate(over="ignore"):  # a third of the sums is nothing but the product's rounding error
        c[::3] = -(a[::3].astype(np.float64) * b[::3]).astype(np.float32)
    operands = [a, b, c] if name == "fma" else [a, b]
    exact = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
             "fma": lambda x, y, z: x * y + z}[name]  # fmt: skip
    text = f"{name}.{mode}.f32 {{z}}, {', '.join(f'{{{i}}}' for i in range(len(operands)))};"
    with np.errstate(all="ignore"):
        keep = np.isfinite(c)
    c[~keep] = 1
    got = evaluate(text, operands, "f4")
    expected = [
        rounded(exact(*map(Fraction, values)), "f4", mode)
        for values in zip(*(o.tolist() for o in operands), strict=True)
    ]
    check_floats(got, expected, text)


@pytest.mark.parametrize("text", ["div.rn.f32 {z}, {0}, {1};", "rcp.rn.f32 {z}, {1};", "div.full.f32 {z}, {0}, {1};"])
def test_division_rounds_once(text):
    a, b = finite("f4", 0), finite("f4", 1)
    b[b == 0] = 3
    top = [Fraction(1)] * N if text.startswith("rcp") else [Fraction(x) for x in a.tolist()]
    expected = [rounded(x / Fraction(y), "f4") for x, y in zip(top, b.tolist(), strict=True)]
    check_floats(evaluate(text, [a, b], "f4"), expected, text)


def test_square_root_is_the_nearest_float():
    a = np.abs(finite("f4", 0))
    got = evaluate("sqrt.rn.f32 {z}, {0};", [a], "f4")
    for x, root in zip(a.tolist(), got, strict=True):
        below, above = (Fraction(float(np.nextafter(root, np.float32(to)))) for to in (-1, np.inf))
        middle = Fraction(float(root))
        assert root == x == 0 or ((below + middle) / 2) ** 2 <= Fraction(x) <= ((middle + above) / 2) ** 2


@pytest.mark.parametrize(("form", "type_"), [("f16", "f2"), ("bf16", "bf16")])
@pytest.mark.parametrize("name", ["add", "mul", "fma"])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_rounds_once(form, type_, name, packed):
    def halves(seed: int) -> np.ndarray:
        x = finite("f4" if form == "bf16" else "f2", seed)
        return (x.view(np.uint32) >> 16).astype(np.uint16) if form == "bf16" else x.view(np.uint16)

    def numbers(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32) if form == "bf16" else bits.view(np.float16)

    count = 3 if name == "fma" else 2
    low, high = ([halves(seed + offset) for seed in range(count)] for offset in (0, 10))
    operands = [a | b.astype(np.uint32) << 16 for a, b in zip(low, high, strict=True)] if packed else low
    suffix = f"{form}x2" if packed else form
    text = f"{name}.rn.{suffix} {{z}}, {', '.join(f'{{{i}}}' for i in range(count))};"
    got = evaluate(text, operands, "u4" if packed else "u2")
    exact = {"add": lambda x, y: x + y, "mul": lambda x, y: x * y, "fma": lambda x, y, z: x * y + z}[name]
    for shift, part in ((0, low), (16, high))[: 1 + packed]:
        values = zip(*(numbers(p).tolist() for p in part), strict=True)
        expected = [rounded(exact(*map(Fraction, v)), type_) for v in values]
        check_floats(numbers((got >> shift).astype(np.uint16)), expected, text)


@pytest.mark.parametrize(
    ("form", "type_", "mode"),
    [("bf16", "bf16", "rn"), ("bf16", "bf16", "rz"), *(("f16", "f2", mode) for mode in ("rn", "rz", "rm", "rp"))],
)
def test_conversion_to_half_precision(form, type_, mode):
    a = finite("f4", 3)
    got = evaluate(f"cvt.{mode}.{form}.f32 {{z}}, {{0}};", [a], "u2")
    numbers = got.view(np.float16) if form == "f16" else (got.astype(np.uint32) << 16).view(np.float32)
    check_floats(numbers, [rounded(Fraction(x), type_, mode) for x in a.tolist()], f"{form} {mode}")


def test_packed_conversion_puts_its_first_source_high():
    a, b = np.full(N, 1.0, np.float32), np.full(N, -2.0, np.float32)
    assert evaluate("cvt.rn.bf16x2.f32 {z}, {0}, {1};", [a, b], "u4")[0] == 0x3F80C000
    assert evaluate("cvt.rn.f16x2.f32 {z}, {0}, {1};", [a, b], "u4")[0] == 0x3C00C000


FLOAT_TO_INTEGER = [
    ("rni", round),
    ("rzi", int),
    ("rmi", lambda x: int(np.floor(x))),
    ("rpi", lambda x: int(np.ceil(x))),
]


@pytest.mark.parametrize(("mode", "to_integer"), FLOAT_TO_INTEGER)
@pytest.mark.parametrize("type_", ["s32", "u32", "s64", "u16"])
def test_conversion_to_integers_saturates(mode, to_integer, type_):
    a = pool("f4", np.random.default_rng(0))
    kind = f"{'i' if type_[0] == 's' else 'u'}{int(type_[1:]) // 8}"
    got = evaluate(f"cvt.{mode}.{type_}.f32 {{z}}, {{0}};", [a], kind)
    limits = np.iinfo(kind)
    for x, y in zip(a.tolist(), got.tolist(), strict=True):
        if np.isnan(x):
            expected = int(limits.min) if type_ == "s64" else 0  # 2^63 as s64
        elif np.isinf(x):
            expected = limits.max if x > 0 else limits.min
        else:
            expected = max(limits.min, min(limits.max, to_integer(x)))
        assert y == expected, x


@pytest.mark.parametrize("type_", ["i4", "u4", "i8", "u8"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_conversion_of_integers(type_, mode):
    a = pool(type_, np.random.default_rng(0))
    name = f"{'s' if type_[0] == 'i' else 'u'}{8 * int(type_[1])}"
    if mode == "rz" and type_[1] == "8":
        with pytest.raises(ptx.PtxError, match="cvt"):
            evaluate(f"cvt.{mode}.f32.{name} {{z}}, {{0}};", [a], "f4")
        return
    got = evaluate(f"cvt.{mode}.f32.{name} {{z}}, {{0}};", [a], "f4")
    check_floats(got, [rounded(Fraction(x), "f4", mode) for x in a.tolist()], name)


COMPARISONS = {"lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
               "eq": lambda a, b: a == b, "ne": lambda a, b: a != b}  # fmt: skip


@pytest.mark.parametrize("name", [*COMPARISONS, *(f"{name}u" for name in COMPARISONS), "num", "nan"])
def test_comparison_of_floats(name):
    a, b = (pool("f4", np.random.default_rng(seed)) for seed in (0, 1))
    got = evaluate(f"setp.{name}.f32 %p, {{0}}, {{1}}; selp.u32 {{z}}, 1, 0, %p;", [a, b], "u4")
    for x, y, z in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        unordered = np.isnan(x) or np.isnan(y)
        if name in ("num", "nan"):
            expected = unordered == (name == "nan")
        else:
            expected = len(name) == 3 if unordered else COMPARISONS[name[:2]](x, y)
        assert z == expected


FLOAT_CASES: list[tuple[str, list[str], str, Callable[..., np.ndarray]]] = [
    ("min.f32 {z}, {0}, {1};", ["f4", "f4"], "f4", np.fmin),
    ("max.NaN.f32 {z}, {0}, {1};", ["f4", "f4"], "f4", np.maximum),
    ("abs.f32 {z}, {0};", ["f4"], "f4", np.abs),
    ("neg.f64 {z}, {0};", ["f8"], "f8", np.negative),
    ("mul.f64 {z}, {0}, {1};", ["f8", "f8"], "f8", np.multiply),
    ("copysign.f32 {z}, {0}, {1};", ["f4", "f4"], "f4", lambda a, b: np.copysign(b, a)),
    ("ex2.approx.f32 {z}, {0};", ["f4"], "f4", lambda a: np.exp2(a.astype(np.float64)).astype(np.float32)),
    ("cvt.f64.f32 {z}, {0};", ["f4"], "f8", lambda a: a.astype(np.float64)),
    ("cvt.rmi.f32.f32 {z}, {0};", ["f4"], "f4", np.floor),
    ("cvt.sat.f32.f32 {z}, {0};", ["f4"], "f4", lambda a: np.clip(np.where(np.isnan(a), 0, a), 0, 1)),
    ("mul.ftz.f32 {z}, {0}, 0f00800000;", ["f4"], "f4",
     lambda a: np.where(np.abs(a * np.float32(2.0**-126)) < 2.0**-126, np.float32(0), a * np.float32(2.0**-126))),
    ("testp.finite.f32 %p, {0}; selp.u32 {z}, 1, 0, %p;", ["f4"], "u4", np.isfinite),
]  # fmt: skip


@pytest.mark.parametrize(("text", "types", "result", "expected"), FLOAT_CASES, ids=[c[0] for c in FLOAT_CASES])
def test_float_instruction(text, types, result, expected):
    operands = [pool(type_, np.random.default_rng(i)) for i, type_ in enumerate(types)]
    with np.errstate(all="ignore"):
        want = expected(*operands)
    np.testing.assert_allclose(evaluate(text, operands, result), want, rtol=1e-7, atol=0)


def test_double_fma_is_fused():
    a, b = (np.random.default_rng(seed).standard_normal(N) for seed in (0, 1))
    got = evaluate("fma.rn.f64 {z}, {0}, {1}, {2};", [a, b, -a * b], "f8")
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a, b, -a * b, strict=True)]
    check_floats(got, [rounded(value, "f8") for value in exact], "fma.f64")
    assert np.any(got != 0)


# --- Warps, blocks and memory, on PTX by hand ------------------------------------------------------------------------


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 64,
    blocks: int = 1,
    declare: str = "",
    read_only: bool = False,
    dynamic_shared: int = 0,
) -> None:
    """Runs a kernel of pointers %a0, %a1, ...; %t is the thread, %at4 is 4 times it in 64 bits."""
    params = ", ".join(f".param .u64 p{i}" for i in range(len(arrays)))
    loads = "\n".join(f"ld.param.u64 %a{i}, [p{i}];" for i in range(len(arrays)))
    module = ptx.Module(
        f"""{HEADER}{declare}
        .visible .entry k({params}) .maxntid 256, 1, 1
        {{
        .reg .b32 %t, %r<20>; .reg .b64 %a<8>, %at4, %d<8>; .reg .pred %p<4>; .reg .f32 %f<8>; .reg .b16 %h<4>;
        mov.u32 %t, %tid.x;
        mul.wide.u32 %at4, %t, 4;
        {loads}
        {body}
        ret;
        }}"""
    )
    memory = ptx.Memory()
    pointers = [memory.add(array, "xyz"[i], read_only) for i, array in enumerate(arrays)]
    module.launch("k", (blocks,), (threads,), memory, pointers, dynamic_shared)


SHUFFLES = {  # mode, b, c: source lane and whether it is valid, from CUDA's description of __shfl_*_sync
    ("bfly", 5, 0x1F): lambda lane: (lane ^ 5, True),
    ("down", 3, 0x1F): lambda lane: (lane + 3, lane + 3 < 32),
    ("up", 3, 0x00): lambda lane: (lane - 3, lane >= 3),
    ("idx", 7, 0x1F): lambda lane: (7, True),
    ("idx", 9, 0x181F): lambda lane: (lane // 8 * 8 + 9 % 8, True),  # width 8
    ("down", 2, 0x181F): lambda lane: (lane + 2, lane % 8 < 6),
    ("up", 2, 0x1800): lambda lane: (lane - 2, lane % 8 >= 2),
    ("bfly", 16, 0x101F): lambda lane: (lane ^ 16, lane >= 16),  # width 16: only a lower segment can be read
}


@pytest.mark.parametrize("key", SHUFFLES, ids=str)
def test_shuffle(key):
    mode, b, c = key
    z, flags = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    run(
        f"""add.u32 %r0, %t, 100;
        shfl.sync.{mode}.b32 %r1|%p0, %r0, {b}, {c}, -1;
        selp.u32 %r2, 1, 0, %p0;
        add.u64 %d0, %a0, %at4; st.global.u32 [%d0], %r1;
        add.u64 %d1, %a1, %at4; st.global.u32 [%d1], %r2;""",
        z,
        flags,
    )
    for thread in range(64):
        source, valid = SHUFFLES[key](thread % 32)
        assert flags[thread] == valid
        assert z[thread] == 100 + (thread // 32 * 32 + source if valid else thread)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vote.sync.ballot.b32 %r1, %p0, -1;", lambda odd: sum(1 << i for i in range(32) if odd[i])),
        ("vote.sync.any.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1;", any),
        ("vote.sync.all.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1;", all),
        ("activemask.b32 %r1;", lambda odd: 0xFFFFFFFF),
        ("@!%p0 bra SKIP; activemask.b32 %r1; SKIP: vote.sync.ballot.b32 %r1, %p0, -1;",
         lambda odd: sum(1 << i for i in range(32) if odd[i])),
        ("redux.sync.add.s32 %r1, %t, -1;", lambda odd: None),
    ],
)  # fmt: skip
def test_vote(text, expected):
    z = np.zeros(64, np.uint32)
    store = "add.u64 %d0, %a0, %at4; st.global.u32 [%d0], %r1;"
    run(f"rem.u32 %r0, %t, 3; setp.eq.u32 %p0, %r0, 1; {text} {store}", z)
    for warp in range(2):
        members = range(32 * warp, 32 * warp + 32)
        want = expected([i % 3 == 1 for i in members])
        assert (z[32 * warp : 32 * warp + 32] == (sum(members) if want is None else want)).all()


@pytest.mark.parametrize(("mode", "expected"), [("or", 1), ("and", 0), ("popc", 3)])
def test_barrier_reduces(mode, expected):
    z = np.zeros(128, np.uint32)
    result = "%r1" if mode == "popc" else "%p1"
    run(
        f"""setp.lt.u32 %p0, %t, 3; bar.red.{mode}.{"u32" if mode == "popc" else "pred"} {result}, 0, %p0;
        {"" if mode == "popc" else "selp.u32 %r1, 1, 0, %p1;"}
        mov.u32 %r2, %ctaid.x; mul.wide.u32 %d1, %r2, 256; add.u64 %d0, %a0, %at4; add.u64 %d0, %d0, %d1;
        st.global.u32 [%d0], %r1;""",
        z,
        blocks=2,
    )
    assert (z == expected).all()


def test_loop_of_different_lengths_comes_together():
    z = np.zeros(64, np.uint32)
    run(
        """mov.u32 %r0, 0; mov.u32 %r1, 0;
        LOOP: setp.ge.u32 %p0, %r0, %t; @%p0 bra DONE;
        add.u32 %r1, %r1, %r0; add.u32 %r0, %r0, 1; bra.uni LOOP;
        DONE: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
        add.u64 %d0, %a0, %at4; st.global.u32 [%d0], %r2;""",
        z,
    )
    assert [int(v) for v in z] == [(t ^ 1) * ((t ^ 1) - 1) // 2 for t in range(64)]


def test_branch_by_index():
    z = np.zeros(64, np.uint32)
    run(
        """rem.u32 %r0, %t, 3; add.u64 %d0, %a0, %at4;
        TABLE: .branchtargets A, B, C;
        brx.idx %r0, TABLE;
        A: mov.u32 %r1, 10; bra END;
        B: mov.u32 %r1, 20; bra END;
        C: mov.u32 %r1, 30;
        END: st.global.u32 [%d0], %r1;""",
        z,
    )
    assert [int(v) for v in z] == [[10, 20, 30][t % 3] for t in range(64)]


def test_atomics():
    z, old = np.zeros(8, np.uint32), np.zeros(64, np.uint32)
    z[5] = 9
    run(
        """atom.global.add.u32 %r0, [%a0], 2; add.u64 %d0, %a1, %at4; st.global.u32 [%d0], %r0;
        red.global.max.u32 [%a0+4], %t; red.relaxed.gpu.global.or.b32 [%a0+8], %t;
        atom.global.exch.b32 %r1, [%a0+12], 7; atom.global.cas.b32 %r2, [%a0+20], 9, %t;
        red.shared.add.u32 [s], 1; bar.sync 0; ld.shared.u32 %r3, [s]; st.global.u32 [%a0+16], %r3;""".replace(
            "red.shared", "setp.eq.u32 %p0, %t, 0; @%p0 st.shared.u32 [s], 0; bar.sync 0; red.shared"
        ),
        z,
        old,
        declare=".shared .align 4 .b8 s[4];",
    )
    assert z[:6].tolist() == [128, 63, 63, 7, 64, 0]
    assert sorted(old.tolist()) == list(range(0, 128, 2))


def test_vectors_and_narrow_accesses():
    x = np.arange(256, dtype=np.uint8)
    z = np.zeros(64, np.uint32)
    run(
        """mul.wide.u32 %d0, %t, 16; and.b64 %d0, %d0, 255; add.u64 %d0, %a0, %d0;
        ld.global.nc.L1::no_allocate.v4.u32 {%r0, %r1, %r2, %r3}, [%d0];
        ld.global.s8 %r4, [%a0+255]; ld.global.u16 %h0, [%a0+2]; cvt.u32.u16 %r5, %h0;
        add.u32 %r0, %r0, %r3; add.u32 %r0, %r0, %r4; add.u32 %r0, %r0, %r5;
        add.u64 %d1, %a1, %at4; st.global.u32 [%d1], %r0;""",
        x,
        z,
    )
    words = x.view(np.uint32).reshape(-1, 4)
    want = [(int(words[t % 16, 0]) + int(words[t % 16, 3]) - 1 + 0x0302) & 0xFFFFFFFF for t in range(64)]
    assert z.tolist() == want


COPY = """mul.lo.u32 %r0, %t, 16; mul.wide.u32 %d0, %t, 16; add.u64 %d1, %a0, %d0; mov.u32 %r1, s;
    add.u32 %r1, %r1, %r0;
    setp.lt.u32 %p0, %t, 3; selp.u32 %r2, 16, 0, %p0; setp.eq.u32 %p1, %t, 3; selp.u32 %r2, 5, %r2, %p1;
    @!%p0 mov.u64 %d1, %a0; cp.async.cg.shared.global [%r1], [%d1], 16, %r2; cp.async.commit_group;
    {wait} ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r1]; add.u64 %d2, %a1, %d0;
    st.global.v4.u32 [%d2], {{%r4, %r5, %r6, %r7}};"""


def test_asynchronous_copy_fills_with_zeros():
    x, z = np.arange(48, dtype=np.uint8), np.full(64 * 16, 255, np.uint8)
    run(COPY.format(wait="cp.async.wait_group 0;"), x, z, declare=".shared .align 16 .b8 s[1024];")
    assert (z[:48] == x).all()
    assert (z[48:53] == x[:5]).all()
    assert (z[53:] == 0).all()


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
def test_reading_a_copy_in_flight_is_an_error(wait):
    x, z = np.arange(48, dtype=np.uint8), np.zeros(1024, np.uint8)
    with pytest.raises(ptx.PtxError, match="in flight"):
        run(COPY.format(wait=wait), x, z, declare=".shared .align 16 .b8 s[1024];")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    x, z = np.arange(4 * 64, dtype=np.uint16), np.zeros((32, 4), np.uint32)
    registers = ["%r4", "%r5", "%r6", "%r7"][:count]
    suffix = ".trans" if transposed else ""
    run(
        f"""mul.wide.u32 %d0, %t, 16; add.u64 %d1, %a0, %d0; mov.u32 %r1, s; mul.lo.u32 %r0, %t, 16;
        add.u32 %r1, %r1, %r0; ld.global.v4.u32 {{%r8, %r9, %r10, %r11}}, [%d1];
        st.shared.v4.u32 [%r1], {{%r8, %r9, %r10, %r11}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{", ".join(registers)}}}, [%r1];
        add.u64 %d2, %a1, %d0; {" ".join(f"st.global.u32 [%d2+{4 * i}], {r};" for i, r in enumerate(registers))}""",
        x,
        z,
        threads=32,
        declare=".shared .align 16 .b8 s[512];",
    )
    matrices = x.reshape(4, 8, 8)
    for lane in range(32):
        for i in range(count):
            rows = matrices[i].T if transposed else matrices[i]
            low, high = rows[lane // 4, 2 * (lane % 4)], rows[lane // 4, 2 * (lane % 4) + 1]
            assert z[lane, i] == int(low) | int(high) << 16


def fragments(matrix: np.ndarray, registers: int) -> np.ndarray:
    """Rows of bytes -> what each lane holds: register i of lane 4 g + q has row g (+ 8), bytes 4 q (+ 16)."""
    held = np.zeros((32, registers), np.uint32)
    rows = len(matrix) // 8
    for lane in range(32):
        for i in range(registers):
            row, byte = lane // 4 + 8 * (i % rows), 4 * (lane % 4) + 16 * (i // rows)
            held[lane, i] = matrix[row, byte : byte + 4].view(np.uint32)[0]
    return held


def unpacked(matrix: np.ndarray, type_: str) -> np.ndarray:
    if type_ == "b1":
        return np.unpackbits(matrix, axis=1, bitorder="little").astype(np.int64)
    if type_ == "bf16":
        return (matrix.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return matrix.view({"u8": np.uint8, "s8": np.int8}[type_]).astype(np.int64)


@pytest.mark.parametrize(
    ("shape", "types", "operation"),
    [
        ("m8n8k128", ("b1", "b1"), ".xor.popc"), ("m16n8k256", ("b1", "b1"), ".xor.popc"),
        ("m16n8k256", ("b1", "b1"), ".and.popc"), ("m16n8k32", ("u8", "s8"), ""), ("m16n8k32", ("s8", "s8"), ""),
        ("m16n8k16", ("bf16", "bf16"), ""),
    ],
)  # fmt: skip
def test_mma(shape, types, operation):
    rng = np.random.default_rng(0)
    rows, small = (8, True) if shape == "m8n8k128" else (16, False)
    width = 16 if small else 32
    a, b = (rng.integers(0, 256, (n, width), dtype=np.uint8) for n in (rows, 8))
    floats = types[0] == "bf16"
    if floats:
        a, b = ((rng.standard_normal((n, 16)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
                for n in (rows, 8))  # fmt: skip
    c = rng.integers(-1000, 1000, (rows, 8)).astype(np.float32 if floats else np.int32)
    x, y = unpacked(a, types[0]), unpacked(b, types[1])
    want = c + ((x[:, None] != y[None]).sum(-1) if operation == ".xor.popc" else x @ y.T)
    a_count, b_count, c_count = (1, 1, 2) if small else (4, 2, 4)

    def place(lane: int, i: int) -> tuple[int, int]:
        return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2

    held = np.array([[c[place(lane, i)] for i in range(c_count)] for lane in range(32)])
    memory = np.concatenate([fragments(a, a_count), fragments(b, b_count), held.view(np.uint32)], axis=1)
    total, stride = a_count + b_count + c_count, 4 * (a_count + b_count + c_count)
    names = [f"%r{i}" for i in range(total)]
    groups = [names[:a_count], names[a_count : a_count + b_count], names[a_count + b_count :]]
    text_a, text_b, text_c = ("{" + ", ".join(group) + "}" for group in groups)
    sums = "f32" if floats else "s32"
    run(
        f"""mul.wide.u32 %d0, %t, {stride}; add.u64 %d0, %a0, %d0;
        {" ".join(f"ld.global.u32 {name}, [%d0+{4 * i}];" for i, name in enumerate(names))}
        mma.sync.aligned.{shape}.row.col.{sums}.{types[0]}.{types[1]}.{sums}{operation}
            {text_c}, {text_a}, {text_b}, {text_c};
        {" ".join(f"st.global.u32 [%d0+{4 * i}], {name};" for i, name in enumerate(names))}""",
        memory,
        threads=32,
    )
    got = np.ascontiguousarray(memory[:, a_count + b_count :]).view(c.dtype)
    for lane in range(32):
        for i in range(c_count):
            assert got[lane, i] == np.asarray(want[place(lane, i)]).astype(c.dtype)


FAULTS = {
    "out of bounds": "mul.wide.u32 %d0, %t, 8; add.u64 %d0, %a0, %d0; ld.global.u32 %r0, [%d0];",
    "out of bounds: .* of x, which has 256": "st.global.u32 [%a0+256], %t;",
    "misaligned": "ld.global.v2.u32 {%r0, %r1}, [%a0+4];",
    "misaligned: thread .1, 0, 0. of block": "shr.u64 %d0, %at4, 1; add.u64 %d0, %a0, %d0; ld.global.u32 %r0, [%d0];",
    "stray pointer": "ld.global.u32 %r0, [%at4+4];",
    "uninitialised": "ld.shared.u32 %r0, [s+4];",
    "out of bounds: .* of shared memory, which has 64":
        "mov.u32 %r1, s; mad.lo.u32 %r1, %t, 4, %r1; ld.shared.u32 %r0, [%r1];",
    "barrier not reached by all": "setp.lt.u32 %p0, %t, 32; @%p0 bar.sync 1; @!%p0 bar.sync 2;",
    "divergent barrier": "setp.lt.u32 %p0, %t, 32; @%p0 bra A; bar.sync 0; bra B; A: bar.sync 0; B:",
    "warp not converged.* 16 of 32": "setp.lt.u32 %p0, %t, 16; @%p0 bar.sync 0;",
    "warp not converged.* 31 of 32":
        "setp.eq.u32 %p0, %t, 5; @%p0 ret; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [s];",
    "member mask 0xffffffff: its lanes 0xfffc are not converged":
        "and.b32 %r1, %t, 31; setp.lt.u32 %p0, %r1, 16; setp.gt.u32 %p1, %r1, 1; and.pred %p0, %p0, %p1;"
        "@!%p0 shfl.sync.bfly.b32 %r0, %t, 1, 31, -1;",
    "is not one of them": "shfl.sync.bfly.b32 %r0, %t, 1, 31, 1;",
    "reads from lane 0, which takes no part":
        "setp.eq.u32 %p0, %t, 0; @%p0 ret; shfl.sync.idx.b32 %r0, %t, 0, 31, -1;",
    "division by zero": "div.u32 %r0, 1, %t;",
    "trap": "trap;",
    "unknown instruction tex": "tex.1d.v4.f32.f32 {%f0, %f1, %f2, %f3}, [%a0, {%f4}];",
    r"unknown modifiers \['bogus'\]": "add.bogus.s32 %r0, %t, 1;",
    "unknown name missing": "mov.u32 %r0, missing;",
    "is not a label": "bra NOWHERE;",
    "fewer than": "mov.u64 %r0, 1;",
    "branch index": "T: .branchtargets A; brx.idx %t, T; A:",
    "cp.async of 16 bytes from": "cp.async.cg.shared.global [s], [%a0+4], 16;",
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_fault_is_found(message):
    with pytest.raises(ptx.PtxError, match=message) as caught:
        run(FAULTS[message], np.zeros(64, np.uint32), declare=".shared .align 16 .b8 s[64];")
    assert "line" in str(caught.value)  # and it names the instruction


def test_read_only_buffer():
    with pytest.raises(ptx.PtxError, match="writes to read-only x"):
        run("st.global.u32 [%a0], 1;", np.zeros(4, np.uint32), read_only=True)


def test_too_many_threads():
    with pytest.raises(ptx.PtxError, match="512 threads a block, its bound is 256"):
        run("", threads=512)


def test_arguments_are_checked():
    module = ptx.Module(HEADER + ".entry k(.param .align 8 .b8 s[24]) { ret; }")
    with pytest.raises(ptx.PtxError, match="has 24 bytes, got 16"):
        module.launch("k", (1,), (1,), ptx.Memory(), [bytes(16)])
    with pytest.raises(ptx.PtxError, match="1 parameters, got 0"):
        module.launch("k", (1,), (1,), ptx.Memory(), [])


# --- What nvcc emits -------------------------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(bool(machine_code.missing("nvcc")), reason=machine_code.missing("nvcc"))


@pytest.fixture(scope="module", params=["75", "80", "90a", "100"])
def compiled(request):
    source = machine_code.FOLDER / "ptx_self_test.cu"
    return ptx.Module(machine_code.compile_ptx(source, request.param).read_text())


@needs_nvcc
def test_struct_argument_calls_tables_and_local_memory(compiled):
    n = 1000
    x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    y = np.zeros(n, np.float32)
    memory = ptx.Memory()
    argument = struct.pack("<QQqff", memory.add(x, "x", True), memory.add(y, "y"), n, 0.5, 3.0)
    compiled.launch(compiled.entry("language"), (4,), (256,), memory, [argument])
    weights, offsets = np.array([1, -2, 3, -4], np.float32), [5, 7, 11]
    for i in range(n):
        value = np.float32(x[i] * np.float32(0.5) + np.float32(offsets[i % 3])) * weights[i % 4]
        history = [np.float32(value * np.float32(j)) for j in range(8)]
        value = history[i * 5 % 8]
        value = [value + 1, -value, np.sqrt(np.abs(value)), value / np.float32(3), np.float32(int(value))][i % 5]
        assert y[i] == np.float32(value), i


@needs_nvcc
def test_reduction_over_a_block(compiled):
    x = np.random.default_rng(0).integers(-1000, 1000, 700).astype(np.int32)
    sums, any_, count = (np.zeros(3, np.int32) for _ in range(3))
    memory = ptx.Memory()
    pointers = [memory.add(x, "x", True), *(memory.add(a, "out") for a in (sums, any_, count))]
    compiled.launch(compiled.entry("reduction"), (3,), (256,), memory, [*pointers, len(x)], dynamic_shared=8 * 4)
    parts = [x[:256], x[256:512], x[512:]]
    assert sums.tolist() == [part.sum() for part in parts]
    assert any_.tolist() == [int((part > 998).any()) for part in parts]
    assert count.tolist() == [(part > 0).sum() for part in parts]


@needs_nvcc
def test_integers_of_all_widths(compiled):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-(2**63), 2**63 - 1, 300) for _ in range(2))
    b[::7] &= 0xFF
    b[b == 0] = 1
    out = np.zeros((8, 300), np.int64)
    memory = ptx.Memory()
    pointers = [memory.add(a, "a", True), memory.add(b, "b", True), memory.add(out, "out")]
    compiled.launch(compiled.entry("integers"), (3,), (128,), memory, [*pointers, 300])
    for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        low, high, ux = wrapped(x, "i4"), wrapped(y, "i4") or 1, x & 2**64 - 1
        quotient = truncated(x, y)
        want = [
            quotient,
            x - quotient * y,
            truncated(low, high),
            low % 2**32 % 10,
            ux * (y % 2**64) >> 64,
            ux.bit_count() + 64 - ux.bit_length(),
            wrapped(x, "i1") * wrapped(y, "i2"),
            ux >> (y & 63) | ux << (-y & 63),
        ]
        assert [int(v) for v in out[:, i]] == [wrapped(value, "i8") for value in want], i
