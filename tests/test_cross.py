"""The NEON kernels, compiled for aarch64 and executed by an emulator, against the reference.

``cross/kernel_runner.cpp`` is the program that runs them: it has no torch, and gets its cases through a pipe.
"""

import ast
import itertools
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
from test_ops import ADAM, FLOATS, GATES, assert_close, bits_of, gate_of, update_arguments

from engram_kernels import ops, reference

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: NEON kernels not run")

K_SIZES = [1, 3, 31, 63, 64, 65, 127, 129, 784]
M_SIZES = N_SIZES = [1, 3, 7, 33, 70]
SHAPES = list(itertools.product(M_SIZES, N_SIZES, K_SIZES))


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
        return field.contiguous().view(torch.uint8).numpy().tobytes()
    return struct.pack("<f" if isinstance(field, float) else "<q", field)


def flag(value: bool) -> torch.Tensor:
    return torch.tensor([int(value)])


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
    for m, n, k in SHAPES:
        x, w_bits = torch.randn(m, k), bits_of(n, k)
        yield Case(f"{m=} {n=} {k=}", [m, n, k, x, w_bits], [reference.sign_matmul_t(x, w_bits, k)], terms=k)


def masked_input_grad_cases() -> Iterator[Case]:
    for (m, n, k), kind, rate in itertools.product(SHAPES, GATES[1:], (0.2, 0.8)):  # below and above half: two paths
        d, w_bits, mask = torch.randn(m, n), bits_of(n, k), reference._pack(torch.rand(m, k) < rate)
        mask = mask[0].contiguous() if kind == "shared" else mask
        expected = reference.masked_input_grad(d, w_bits, k, mask)
        yield Case(f"{m=} {n=} {k=} {kind} {rate=}", [m, n, k, stride_of(mask), d, w_bits, mask], [expected], terms=n)


def gated_weight_grad_cases() -> Iterator[Case]:
    for (m, n, k), kind in itertools.product([*SHAPES, (700, 70, 33)], GATES):  # 700 samples: several chunks
        d, x_bits, gate = torch.randn(m, n), bits_of(m, k), gate_of(kind, m, k)
        expected = reference.gated_weight_grad(d, x_bits, k, gate)
        yield Case(f"{m=} {n=} {k=} {kind}", [m, n, k, stride_of(gate), d, x_bits, gate], [expected], terms=m)


def sample_engram_cases() -> Iterator[Case]:
    seed, first_row = torch.tensor([-0x123456789ABCDEF, 2**32 - 1]), 2**33 + 1

    def case(score, rate, rule, temperature=1.0):
        m, k = score.shape
        count, threshold = max(1, round(rate * k)), round(rate * 2**32)  # as csrc/bindings.cpp computes them
        inverse = -1.0 if temperature == 0 else (torch.tensor(1.0) / torch.tensor(temperature)).item()
        fields = [m, k, rule == "bernoulli", count, threshold, inverse, *seed.tolist(), first_row, score]
        if score.isnan().any():
            expected = [None, flag(True)]
        else:
            expected = [reference.sample_engram(score, seed, rate, rule, temperature, first_row), flag(False)]
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


def metaplastic_adam_cases() -> Iterator[Case]:
    """Expects what the native kernels compute: all instruction sets round alike."""
    names = ("eps", "weight_decay", "metaplasticity")
    beta1, beta2, step = ADAM["beta1"], ADAM["beta2"], ADAM["step"]
    step_size = ADAM["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)  # as csrc/bindings.cpp computes it
    decays = [beta1, 1 - beta1, beta2, 1 - beta2]
    for n, k, metaplasticity in itertools.product(N_SIZES, K_SIZES, (0.0, 1.35, 30.0)):
        adam, before = ADAM | {"metaplasticity": metaplasticity}, update_arguments(n, k)
        for with_bits in (True, False):
            given = before if with_bits else (*before[:4], None)
            weight, grad, exp_avg, exp_avg_sq, bits = after = [t if t is None else t.clone() for t in given]
            ops.metaplastic_adam_(*after, **adam)
            fields = [n, k, *decays, *(adam[name] for name in names), step_size, *given]
            expected = [weight, exp_avg, exp_avg_sq, *([bits] if with_bits else []), flag(False)]
            yield Case(f"{n=} {k=} {metaplasticity=} {with_bits=}", fields, expected)
    grad = torch.full((n, k), math.nan)
    fields = [n, k, *decays, *(ADAM[name] for name in names), step_size, before[0], grad, *before[2:]]
    yield Case("NaN", fields, [None, None, None, None, flag(True)])


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
    "sample_engram": sample_engram_cases,
    "metaplastic_adam": metaplastic_adam_cases,
}


# ---- build and run


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Over thousands of small tensors, torch's threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def setup_constant(name: str):
    """A literal that setup.py assigns. Importing it would start a build."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py: expected an assignment to {name}")


@pytest.fixture(scope="module")
def kernel_runner(tmp_path_factory) -> Path:
    folder, csrc = tmp_path_factory.mktemp("cross"), ROOT / "csrc"
    sources = {"launch": (csrc / "cpu" / "launch.cpp", ["-O2", "-std=c++17"])}
    sources["kernel_runner"] = (ROOT / "tests" / "cross" / "kernel_runner.cpp", ["-O2", "-std=c++17"])
    for isa, flags in setup_constant("ISA_FLAGS")["aarch64"].items():
        macros = [f"-DENGRAM_ISA={isa}", f"-DENGRAM_ISA_{isa.upper()}"]
        for name in setup_constant("KERNELS"):
            source = csrc / "cpu" / f"{name}.cpp"
            sources[f"{isa}_{name}"] = (source, [*setup_constant("KERNEL_FLAGS"), *macros, *flags])

    def compiler(*arguments):
        done = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile_one(name):
        source, flags = sources[name]
        compiler("-c", source, "-o", folder / f"{name}.o", f"-I{csrc}", *flags)

    with ThreadPoolExecutor(min(2, int(os.environ.get("ENGRAM_BUILD_JOBS", 2)))) as pool:
        list(pool.map(compile_one, sources))
    program = folder / "kernel_runner"
    compiler("-static", *(folder / f"{name}.o" for name in sources), "-o", program)
    return program


def execute(program: Path, isa: str, cases: bytes) -> subprocess.CompletedProcess:
    return subprocess.run([EMULATOR, str(program), isa], input=cases, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def cases() -> dict[str, list[Case]]:
    torch.manual_seed(0)
    return {name: list(make()) for name, make in OPERATORS.items()}


@pytest.fixture(scope="module", params=["neon", "scalar"])
def results(request, kernel_runner, cases) -> dict[str, list[list[bytes]]]:
    """The result fields of every case, from one process per instruction set, since starting one is slow."""
    stream = b"".join(case.encode(number) for number, name in enumerate(OPERATORS) for case in cases[name])
    done = execute(kernel_runner, request.param, stream)
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


def test_an_unknown_instruction_set_is_refused(kernel_runner):
    done = execute(kernel_runner, "avx2", b"")
    assert done.returncode == 2 and b"instruction set" in done.stderr
