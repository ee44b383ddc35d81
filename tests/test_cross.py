"""The kernels of instruction sets that this machine may lack, executed by emulators, against the reference.

``cross/kernel_runner.cpp`` is the program that runs them: it has no torch, and gets its cases through a pipe. Built for
aarch64 it runs under qemu, built for x86-64 with AVX-512 under Bochs, on the bare machine of ``cross/bochs``.
"""

import functools
import itertools
import json
import math
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cross.bochs import machine as bochs
from test_ops import ADAM, FLOATS, GATES, assert_close, bits_of

from engram_kernels import ops, reference

ROOT = Path(__file__).parents[1]
BUILD = json.loads((ROOT / "csrc" / "cpu" / "build.json").read_text())
COMPILERS = {"aarch64": "aarch64-linux-gnu-g++", "x86_64": "x86_64-linux-gnu-g++"}
QEMU = "qemu-aarch64"
EMULATED = [("aarch64", "neon"), ("aarch64", "scalar"), ("x86_64", "avx512")]  # processor, instruction set

K_SIZES = [1, 3, 31, 63, 64, 65, 127, 129, 784]
M_SIZES = N_SIZES = [1, 3, 7, 33, 70]
SHAPES = list(itertools.product(M_SIZES, N_SIZES, K_SIZES))
EVERY_OTHER = SHAPES[::2]  # still with every M for every N, every N for every K and every K for every M


# ---- cases


@dataclass
class Case:
    label: str
    fields: list  # int, float, Tensor or None, in the order in which kernel_runner.cpp takes them
    expected: list  # the tensors that come back; None where any will do
    terms: int | None = None  # numbers summed in an element of a float result; None: every bit must agree

    def encode(self, operator: int) -> bytes:
        return struct.pack("<q", operator) + b"".join(struct.pack("<q", len(f)) + f for f in map(_bytes, self.fields))


def _bytes(field) -> bytes:
    if field is None:
        return b""
    if isinstance(field, torch.Tensor):
        return field.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
    return struct.pack("<f" if isinstance(field, float) else "<q", field)


def flag(value: bool) -> torch.Tensor:
    return torch.tensor([int(value)])


def gate_of(kind: str, m: int, k: int, rate: float = 0.3) -> torch.Tensor | None:
    if kind == "none":
        return None
    return reference._pack(torch.rand((k,) if kind == "shared" else (m, k)) < rate)


def stride_of(gate_bits) -> int:
    return 0 if gate_bits is None or gate_bits.dim() == 1 else gate_bits.shape[1]


def pack_signs_cases() -> Iterator[Case]:
    for element, dtype in enumerate(FLOATS):
        for m, k in itertools.product(M_SIZES, K_SIZES):
            x = torch.randn(m, k).to(dtype)
            x[0, 0], x[-1, -1] = 0.0, -0.0
            yield Case(f"{dtype} {m=} {k=}", [element, m, k, x], [reference.pack_signs(x), flag(False)])
            with_nan = x.clone()
            with_nan[m // 2, k // 2] = math.nan
            yield Case(f"{dtype} {m=} {k=} with NaN", [element, m, k, with_nan], [None, flag(True)])
        # float32: the upper half of its patterns, zeros, denormals and infinities among them
        every = torch.arange(2**16, dtype=torch.int32)
        x = (every << 16).view(dtype) if dtype == torch.float32 else every.to(torch.int16).view(dtype)
        x = x[~x.isnan()].unsqueeze(0)
        yield Case(f"{dtype} every value", [element, *x.shape, x], [reference.pack_signs(x), flag(False)])


def pack_window_cases() -> Iterator[Case]:
    for m, k, kind, width in itertools.product(M_SIZES, K_SIZES, GATES, (1.0, 0.25)):
        x, gate = torch.randn(m, k), gate_of(kind, m, k)
        x[0, 0], x[0, -1], x[-1, k // 2] = 1.0, -1.0, 1.0000001
        fields = [width, m, k, stride_of(gate), x, gate]
        yield Case(f"{m=} {k=} {kind} {width=}", fields, [reference.pack_window(x, width, gate)])


def unpack_signs_cases() -> Iterator[Case]:
    patterns = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for dtype in (*FLOATS, torch.float64, torch.int8, torch.int32):
        plus, minus = torch.tensor([1, -1]).to(dtype).view(patterns[dtype.itemsize]).tolist()
        for m, k in itertools.product(M_SIZES, K_SIZES):
            bits = bits_of(m, k)
            expected = reference.unpack_signs(bits, k, dtype)
            yield Case(f"{dtype} {m=} {k=}", [m, k, dtype.itemsize, plus, minus, bits], [expected])


def binary_matmul_cases() -> Iterator[Case]:
    # beyond the sweep: more words than a byte counts and than a block of words holds
    for (m, n, k), kind in itertools.product([*SHAPES, (3, 7, 4200), (9, 5, 4200), (9, 5, 20000)], GATES):
        x_bits, w_bits, gate = bits_of(m, k), bits_of(n, k), gate_of(kind, m, k)
        expected = reference.binary_matmul(x_bits, w_bits, k, gate)
        yield Case(f"{m=} {n=} {k=} {kind}", [m, n, k, stride_of(gate), x_bits, w_bits, gate], [expected])
    k = 70001  # a counter of 8 or 16 bits would overflow where all signs differ
    for m in (3, 9):
        x_bits, w_bits = (reference.pack_signs(torch.full((rows, k), value)) for rows, value in ((m, 1.0), (5, -1.0)))
        expected = torch.full((m, 5), -k, dtype=torch.int32)
        yield Case(f"{m=} {k=} all signs differ", [m, 5, k, 0, x_bits, w_bits, None], [expected])


def sign_matmul_cases() -> Iterator[Case]:
    for m, n, k in [*SHAPES, (5, 1100, 65)]:  # 1100 rows: more than a block of the kernel
        a, w_bits = torch.randn(m, n), bits_of(n, k)
        yield Case(f"{m=} {n=} {k=}", [m, n, k, a, w_bits], [reference.sign_matmul(a, w_bits, k)], terms=n)


def sign_matmul_t_cases() -> Iterator[Case]:
    for m, n, k in [*SHAPES, (5, 1100, 65)]:
        x, w_bits = torch.randn(m, k), bits_of(n, k)
        expected = reference.sign_matmul_t(x, w_bits, k)
        yield Case(f"{m=} {n=} {k=}", [m, n, k, False, x, w_bits], [expected], terms=k)
        x = torch.randint(0, 256, (m, k), dtype=torch.uint8)
        yield Case(f"uint8 {m=} {n=} {k=}", [m, n, k, True, x, w_bits], [reference.sign_matmul_t(x, w_bits, k)])
    m, n, k = 33, 5, 4200  # the largest sums: a narrow one would overflow
    x = torch.full((m, k), 255, dtype=torch.uint8)
    for sign in (1.0, -1.0):
        w_bits = reference.pack_signs(torch.full((n, k), sign))
        expected = torch.full((m, n), int(sign) * 255 * k, dtype=torch.int32)
        yield Case(f"uint8 {sign=}", [m, n, k, True, x, w_bits], [expected])


def masked_input_grad_cases() -> Iterator[Case]:
    # a third of the units is where launch.cpp changes the kernel
    for (m, n, k), kind, rate in itertools.product(EVERY_OTHER, GATES[1:], (0.1, 0.6)):
        d, w_bits, mask = torch.randn(m, n), bits_of(n, k), gate_of(kind, m, k, rate)
        expected = reference.masked_input_grad(d, w_bits, k, mask)
        yield Case(f"{m=} {n=} {k=} {kind} {rate=}", [m, n, k, stride_of(mask), d, w_bits, mask], [expected], terms=n)


# kinds of gate, and rates on both sides of the half where launch.cpp changes the kernel
WEIGHT_GRAD_GATES = [("none", 1.0), *itertools.product(GATES[1:], (0.3, 0.8))]


def gated_weight_grad_cases() -> Iterator[Case]:
    # beyond the sweep: no samples, several blocks of outputs, several chunks of samples
    shapes = [*EVERY_OTHER, (0, 5, 65), (9, 300, 65), (129, 5, 65), (500, 70, 33)]
    for (m, n, k), (kind, rate) in itertools.product(shapes, WEIGHT_GRAD_GATES):
        d, x_bits, gate = torch.randn(m, n), bits_of(m, k), gate_of(kind, m, k, rate)
        expected = reference.gated_weight_grad(d, x_bits, k, gate)
        yield Case(f"{m=} {n=} {k=} {kind} {rate=}", [m, n, k, stride_of(gate), d, x_bits, gate], [expected], terms=m)


def real_weight_grad_cases() -> Iterator[Case]:
    for m, n, k in [*EVERY_OTHER, (0, 5, 65), (9, 300, 65), (129, 5, 65), (500, 70, 33)]:
        d, x = torch.randn(m, n), torch.randn(m, k)
        yield Case(f"{m=} {n=} {k=}", [m, n, k, d, x], [reference.real_weight_grad(d, x)], terms=m)


def sample_engram_cases() -> Iterator[Case]:
    seed, first_row, row_step = torch.tensor([-0x123456789ABCDEF, 2**32 - 1]), 2**33 + 1, 2**31 + 3

    def case(score, rate, rule, temperature=1.0):
        m, k = score.shape
        count, threshold = max(1, round(rate * k)), round(rate * 2**32)  # as csrc/bindings/sampling.cpp computes them
        inverse = -1.0 if temperature == 0 else (torch.tensor(1.0) / torch.tensor(temperature)).item()
        fields = [m, k, rule == "bernoulli", count, threshold, inverse, *seed.tolist(), first_row, row_step, score]
        if score.isnan().any():
            expected = [None, flag(True)]
        else:
            expected = [reference.sample_engram(score, seed, rate, rule, temperature, first_row, row_step), flag(False)]
        return Case(f"{rule} {m=} {k=} {rate=} {temperature=}", fields, expected)

    for m, k in itertools.product((1, 3, 7), K_SIZES):
        score = torch.randn(m, k)
        score[0] = 0.5  # ties throughout
        for rate in (0.01, 0.1, 0.5, 1.0):
            yield case(score, rate, "bernoulli")
            for temperature in (0.0, 0.3, 1.0, math.inf):
                yield case(score, rate, "gumbel_top_k", temperature)
    with_nan = score.clone()
    with_nan[2, 100] = math.nan
    yield case(with_nan, 0.1, "gumbel_top_k")


# dtypes of the hidden weight and its gradient, and formats of the moments in the order of Moments in csrc/cpu/kernels.h
WEIGHTS_AND_GRADS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
MOMENTS = ["float32", "bfloat16", "scaled"]
STATE = ["weight", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "sign_bits"]


def hidden_state(n: int, k: int, dtype: torch.dtype, moments: str, with_bits: bool) -> dict[str, torch.Tensor | None]:
    """Hidden weights, moments and sign bits, in the order of STATE."""
    weight, exp_avg, exp_avg_sq = (torch.randn(n, k) * 0.2).to(dtype), torch.randn(n, k) * 0.1, torch.rand(n, k)
    weight[0, 0], exp_avg[0, 0], exp_avg_sq[0, 0] = 0.0, 1e-38, 1.0  # may become -0 in bfloat16, whose sign is +1
    scales = None, None
    if moments == "bfloat16":
        exp_avg, exp_avg_sq = exp_avg.bfloat16(), exp_avg_sq.bfloat16()
    elif moments == "scaled":
        exp_avg = torch.randint(-127, 128, (n, k)).to(torch.int8)
        exp_avg_sq = torch.randint(0, 256, (n, k)).to(torch.uint8)
        scales = tuple(2.0 ** torch.randint(-12, 1, (n, -(-k // 64))).float() for _ in range(2))
    bits = reference.pack_signs(weight) if with_bits else None
    return dict(zip(STATE, [weight, exp_avg, exp_avg_sq, *scales, bits], strict=True))


def gradient_of(n: int, k: int) -> torch.Tensor:
    """Of all magnitudes, so that all codes of the moments occur."""
    grad = torch.randn(n, k) * 2.0 ** torch.randint(-30, 2, (n, k))
    grad[0, 0] = 0.0
    return grad


def update_case(label, state, grad, gradient_fields, metaplasticity, weight_bound, first_row) -> Case:
    """The moments of the reference, and the hidden weights of the native kernels: all instruction sets round alike."""
    adam = ADAM | {"metaplasticity": metaplasticity, "weight_bound": weight_bound}
    seed = torch.tensor([-0x123456789ABCDEF, 2**32 - 1])
    after = []
    for operators in (ops, reference):
        new = {name: None if t is None else t.clone() for name, t in state.items()}
        operators.metaplastic_adam_(grad=grad, **new, **adam, seed=seed, first_row=first_row)
        after.append(new)
    mine, theirs = after
    expected = [(mine if name in ("weight", "sign_bits") else theirs)[name] for name in STATE]
    weight, exp_avg = state["weight"], state["exp_avg"]
    moments = [torch.float32, torch.bfloat16, torch.int8].index(exp_avg.dtype)
    beta1, beta2, step = adam["beta1"], adam["beta2"], adam["step"]
    step_size = adam["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)  # as csrc/bindings/update.cpp computes it
    settings = [beta1, 1 - beta1, beta2, 1 - beta2, adam["eps"], adam["weight_decay"], metaplasticity, step_size]
    settings += [weight_bound]
    fields = [*weight.shape, FLOATS.index(weight.dtype), moments, *settings, *seed.tolist(), first_row]
    label = f"{label} {weight.dtype} {MOMENTS[moments]} {metaplasticity=} {weight_bound=} {first_row=}"
    given = [*fields, *state.values(), *gradient_fields]
    return Case(label, given, [*(t for t in expected if t is not None), flag(False)])


def update_settings() -> Iterator[tuple[float, float, int]]:
    """Metaplasticity, bound of the weights and first row, in turn."""
    unbounded = [(1.35, math.inf, 0), (0.0, math.inf, 2**33 + 1), (30.0, math.inf, 0)]
    return itertools.cycle([*unbounded, (30.0, 0.125, 5), (1.35, 0.1, 2**32 - 3)])


def metaplastic_adam_cases() -> Iterator[Case]:
    settings = update_settings()
    formats = itertools.product(WEIGHTS_AND_GRADS, MOMENTS, (1, 7), K_SIZES, (True, False))
    for (dtype, grad_dtype), moments, n, k, with_bits in formats:
        grad, gap = gradient_of(n, k).to(grad_dtype), torch.full((n, 3), math.nan, dtype=grad_dtype)
        fields = [FLOATS.index(grad_dtype), k + 3, torch.cat([grad, gap], dim=1)]  # rows that lie apart
        state = hidden_state(n, k, dtype, moments, with_bits)
        yield update_case(f"{n=} {k=} grad {grad_dtype} {with_bits=}", state, grad, fields, *next(settings))
    for dtype, moments in itertools.product(FLOATS[:2], MOMENTS):
        state, grad = hidden_state(3, 70, dtype, moments, True), torch.zeros(3, 70)
        zeros = {name: None if t is None else torch.zeros_like(t) for name, t in state.items()}
        yield update_case("nothing but zeros", zeros, grad, [0, 70, grad], *next(settings))
        case = update_case("NaN", state, grad, [0, 70, grad], *next(settings))
        case.fields[-1] = torch.where(torch.arange(210).view(3, 70) == 205, math.nan, grad)
        case.expected = [*[None] * (len(case.expected) - 1), flag(True)]
        yield case


def gated_metaplastic_adam_cases() -> Iterator[Case]:
    """With a gradient that has no rounding: expects the update with that of the reference."""
    settings, formats = update_settings(), itertools.cycle(itertools.product(FLOATS[:2], MOMENTS))
    # several blocks of outputs, several of units, several chunks of samples
    shapes = [(1, 1, 1), (7, 3, 65), (20, 70, 600), (33, 150, 64), (9, 5, 1100), (150, 65, 520), (0, 70, 70)]
    for (m, n, k), (kind, rate), with_bits in itertools.product(shapes, WEIGHT_GRAD_GATES, (True, False)):
        dtype, moments = next(formats)
        d, x_bits, gate = torch.randint(-9, 10, (m, n)) * 0.125, bits_of(m, k), gate_of(kind, m, k, rate)
        grad = reference.gated_weight_grad(d, x_bits, k, gate)
        fields = [m, n, k, stride_of(gate), d, x_bits, gate]
        state = hidden_state(n, k, dtype, moments, with_bits)
        yield update_case(f"{m=} {n=} {k=} {kind} {rate=} {with_bits=}", state, grad, fields, *next(settings))


def real_metaplastic_adam_cases() -> Iterator[Case]:
    """With a gradient that has no rounding, as above."""
    settings, formats = update_settings(), itertools.cycle(itertools.product(FLOATS[:2], MOMENTS))
    for m, n, k in [(1, 1, 1), (7, 3, 65), (20, 70, 600), (33, 150, 64), (9, 5, 1100), (150, 65, 520), (0, 70, 70)]:
        dtype, moments = next(formats)
        d, x = torch.randint(-9, 10, (m, n)) * 0.125, torch.randint(-9, 10, (m, k)) * 0.25
        grad = reference.real_weight_grad(d, x)
        state = hidden_state(n, k, dtype, moments, True)
        yield update_case(f"{m=} {n=} {k=}", state, grad, [m, n, k, d, x], *next(settings))


WINDOWS = [
    reference.Window(4, 5, 3, 3, 3, 1, 1, 1, 1, 1, 1),
    reference.Window(5, 4, 64, 3, 3, 1, 1, 1, 1, 1, 1),
    reference.Window(5, 3, 65, 2, 3, 2, 1, 0, 1, 2, 0, 2, 1),
    reference.Window(3, 4, 6, 3, 1, 1, 1, 1, 1, 0, 0, 1, 1, 3),
    reference.Window(2, 2, 130, 1, 1),
]


def unfold_bits_cases() -> Iterator[Case]:
    repeated = reference.Window(2, 3, 9, 2, 2, dilation_h=0, dilation_w=0)
    for w, samples in itertools.product([*WINDOWS, repeated], (0, 1, 3)):
        bits, group = bits_of(samples, w.units), w.groups - 1
        expected = reference.unfold_bits(bits, w, group)
        yield Case(f"{w} {samples=}", [*w, samples, group, bits], [expected])


def pool_bits_cases() -> Iterator[Case]:
    windows = [reference.Window(4, 5, channels, 2, 2, 2, 1) for channels in (1, 3, 64, 65)]
    for w, samples, flipped in itertools.product(windows, (0, 1, 3), (False, True)):
        bits = bits_of(samples, w.units)
        flips = bits_of(1, w.out_height * w.out_width * w.channels) if flipped else None
        largest = reference.pool_signs(bits, w)
        expected = largest if flips is None else largest ^ flips
        yield Case(f"{w} {samples=} {flipped=}", [*w, samples, bits, flips], [expected])


def interleave_bits_cases() -> Iterator[Case]:
    for samples, rows, k in itertools.product((0, 2), (1, 3, 64, 65), (1, 49, 64, 130)):
        bits = bits_of(samples * rows, k)
        expected = reference.interleave_bits(bits, rows, k)
        yield Case(f"{samples=} {rows=} {k=}", [samples, rows, k, bits], [expected])


def convolution_cases() -> Iterator[tuple[str, reference.Window, int, int, torch.Tensor | None]]:
    for w, samples, gate in itertools.product(WINDOWS, (0, 1, 3), GATES):
        gate_bits = gate_of(gate, samples, w.units)
        yield f"{w} {samples=} {gate=}", w, samples, 6, gate_bits


def binary_conv2d_cases() -> Iterator[Case]:
    for label, w, samples, outputs, gate in convolution_cases():
        x, filters = bits_of(samples, w.units), bits_of(outputs, w.group_units)
        expected = reference.binary_conv2d(x, filters, w, gate, 0.25)
        yield Case(label, [*w, samples, outputs, stride_of(gate), 0.25, x, filters, gate], [expected])


def masked_conv2d_input_grad_cases() -> Iterator[Case]:
    for label, w, samples, outputs, mask in convolution_cases():
        if mask is not None:
            d = torch.randint(-8, 9, (samples, w.out_height, w.out_width, outputs)).float()
            filters = bits_of(outputs, w.group_units)
            expected = reference.masked_conv2d_input_grad(d, filters, w, mask, 0.25)
            yield Case(label, [*w, samples, outputs, stride_of(mask), 0.25, d, filters, mask], [expected])


def gated_conv2d_weight_grad_cases() -> Iterator[Case]:
    for label, w, samples, outputs, gate in convolution_cases():
        d = torch.randint(-8, 9, (samples, w.out_height, w.out_width, outputs)).float()
        x = bits_of(samples, w.units)
        expected = reference.gated_conv2d_weight_grad(d, x, w, gate, 0.25)
        yield Case(label, [*w, samples, outputs, stride_of(gate), 0.25, d, x, gate], [expected])


# in the order of enum Operator in kernel_runner.cpp
OPERATORS = {
    "pack_signs": pack_signs_cases,
    "pack_window": pack_window_cases,
    "unpack_signs": unpack_signs_cases,
    "binary_matmul": binary_matmul_cases,
    "sign_matmul": sign_matmul_cases,
    "sign_matmul_t": sign_matmul_t_cases,
    "masked_input_grad": masked_input_grad_cases,
    "gated_weight_grad": gated_weight_grad_cases,
    "real_weight_grad": real_weight_grad_cases,
    "sample_engram": sample_engram_cases,
    "metaplastic_adam": metaplastic_adam_cases,
    "gated_metaplastic_adam": gated_metaplastic_adam_cases,
    "real_metaplastic_adam": real_metaplastic_adam_cases,
    "unfold_bits": unfold_bits_cases,
    "interleave_bits": interleave_bits_cases,
    "binary_conv2d": binary_conv2d_cases,
    "masked_conv2d_input_grad": masked_conv2d_input_grad_cases,
    "gated_conv2d_weight_grad": gated_conv2d_weight_grad_cases,
    "pool_bits": pool_bits_cases,
}


# ---- build and run


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Over thousands of small tensors, torch's threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def missing(processor: str) -> list[str]:
    """What is not installed here of what it takes to build for a processor and to emulate it."""
    tools = [COMPILERS[processor], *([QEMU] if processor == "aarch64" else [])]
    return [tool for tool in tools if shutil.which(tool) is None] + (bochs.missing() if processor == "x86_64" else [])


def build(processor: str, folder: Path) -> Path:
    """The kernel runner of a processor, with all its instruction sets."""
    csrc, plain = ROOT / "csrc", ["-O2", "-std=c++17"]
    sources = {path.stem: (path, plain) for path in (csrc / "cpu").glob("launch*.cpp")}
    sources["kernel_runner"] = (ROOT / "tests" / "cross" / "kernel_runner.cpp", plain)
    for isa, flags in BUILD["instruction_sets"][processor].items():
        unused = [] if (processor, isa) in EMULATED else ["-O0"]  # linked, never run
        for name in [*BUILD["prediction_kernels"], *BUILD["training_kernels"]]:
            source = csrc / "cpu" / f"{name}.cpp"
            sources[f"{isa}_{name}"] = (
                source,
                [*BUILD["flags"], f"-DENGRAM_ISA={isa}", *flags, *unused],
            )

    def compiler(*arguments):
        done = subprocess.run([COMPILERS[processor], *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile_one(name):
        source, flags = sources[name]
        compiler("-c", source, "-o", folder / f"{name}.o", f"-I{csrc}", *flags)

    with ThreadPoolExecutor(min(2, int(os.environ.get("ENGRAM_BUILD_JOBS", 2)))) as pool:
        list(pool.map(compile_one, sources))
    program = folder / "kernel_runner"
    compiler("-static", "-no-pie", *(folder / f"{name}.o" for name in sources), "-o", program)
    return program


def execute(processor: str, program: Path, isa: str, cases: bytes) -> subprocess.CompletedProcess:
    if processor == "x86_64":
        return bochs.execute(program, isa, cases)
    return subprocess.run([QEMU, str(program), isa], input=cases, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def kernel_runner(tmp_path_factory):
    """The program of a processor, built when it is first asked for."""
    return functools.cache(lambda processor: build(processor, tmp_path_factory.mktemp(processor)))


def emulated(*pairs) -> list:
    """Parameters for these processors and instruction sets, skipped where tools are missing."""
    parameters = []
    for processor, isa in pairs:
        reason = f"{', '.join(missing(processor))} not installed: kernels for {processor} not run under emulation"
        skip = pytest.mark.skipif(bool(missing(processor)), reason=reason)
        parameters.append(pytest.param((processor, isa), id=f"{processor}-{isa}", marks=skip))
    return parameters


@pytest.fixture(scope="module")
def cases() -> dict[str, list[Case]]:
    torch.manual_seed(0)
    return {name: list(make()) for name, make in OPERATORS.items()}


@pytest.fixture(scope="module", params=emulated(*EMULATED))
def results(request, kernel_runner, cases) -> dict[str, list[list[bytes]]]:
    """The result fields of every case, from one process per instruction set, since starting one is slow."""
    processor, isa = request.param
    stream = b"".join(case.encode(number) for number, name in enumerate(OPERATORS) for case in cases[name])
    done = execute(processor, kernel_runner(processor), isa, stream)
    assert done.returncode == 0, done.stderr.decode()  # names the case by its number in the stream, from 1
    output, position = done.stdout, 0

    def take():
        nonlocal position
        (length,) = struct.unpack_from("<q", output, position)
        position += 8 + length
        return output[position - length : position]

    fields = {name: [[take() for _ in case.expected] for case in cases[name]] for name in OPERATORS}
    assert position == len(output)
    return fields


# ---- tests


@pytest.mark.parametrize("operator", OPERATORS)
def test_emulated_kernels_agree_with_the_reference(results, cases, operator):
    for case, fields in zip(cases[operator], results[operator], strict=True):
        for i, (field, expected) in enumerate(zip(fields, case.expected, strict=True)):
            if expected is None:
                continue
            if case.terms is None:
                assert field == _bytes(expected), f"{operator} {case.label}: result {i} differs"
                continue
            actual = torch.frombuffer(bytearray(field), dtype=expected.dtype).view(expected.shape)
            try:
                assert_close(actual, expected, case.terms)
            except AssertionError as error:
                raise AssertionError(f"{operator} {case.label}: {error}") from None


@pytest.mark.parametrize("foreign", emulated(("aarch64", "avx2"), ("x86_64", "neon")))
def test_an_unknown_instruction_set_is_refused(kernel_runner, foreign):
    processor, isa = foreign
    done = execute(processor, kernel_runner(processor), isa, b"")
    assert done.returncode == 2 and b"instruction set" in done.stderr
