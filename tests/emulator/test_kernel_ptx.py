"""The PTX of the real kernels, one for each family of architectures, on small odd shapes against the reference.

Bit for bit: integers, and floats whose sums are exact in every order.
"""

import struct

import numpy as np
import pytest
import torch

from engram_kernels import ops, reference

from . import machine_code as mc
from . import ptx

pytestmark = pytest.mark.skipif(bool(mc.missing("nvcc")), reason=mc.missing("nvcc"))

CSRC = mc.FOLDER.parents[1] / "csrc"
BLOCK = 256
FLOAT32, BFLOAT16, FLOAT16, UINT8 = range(4)
# Those between have the PTX of the one before; that of 90a is that of 80 for another assembler.
ARCHITECTURES = ("75", "80", pytest.param("90a", marks=pytest.mark.slow), "100")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def module(request):
    return ptx.Module(mc.compile_ptx(CSRC / "cuda" / "launch.cu", request.param, include=[CSRC]).read_text())


class Launch:
    """Memory of one launch, and the launch."""

    def __init__(self, module: ptx.Module):
        self.module, self.memory = module, ptx.Memory()

    def read(self, tensor: torch.Tensor | None, name: str) -> int:
        return 0 if tensor is None else self.memory.add(_array(tensor), name, read_only=True)

    def write(self, tensor: torch.Tensor, name: str) -> int:
        return self.memory.add(_array(tensor), name)

    def __call__(self, fragment: str, blocks: int, threads: int, *arguments: int | bytes) -> None:
        self.module.launch(self.module.entry(fragment), (blocks,), (threads,), self.memory, arguments)


def _array(tensor: torch.Tensor) -> np.ndarray:
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return plain.numpy()


def packed(form: str, *values: int | float | bool) -> bytes:
    """A struct of csrc/core/operands.h, padded as C++ does."""
    return struct.pack(f"@{form}0q", *values)


def bits(rows: int, k: int, seed: int) -> torch.Tensor:
    return reference.pack_signs(torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)))


def garbage(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A result before it is written: every element must be."""
    return torch.full(shape, -7 if dtype.is_signed else 7, dtype=dtype)


@pytest.mark.parametrize("k", [77, 132])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pack_signs(module, dtype, k):
    x = torch.randn(19, k).to(dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    words, nan = reference.words_for(k), torch.zeros(1, dtype=torch.int32)
    out, launch = garbage(19, words), Launch(module)
    test = bytes(1) if dtype == torch.float32 else struct.pack("<H", 0x7F80 if dtype == torch.bfloat16 else 0x7C00)
    kernel = f"pack_kernelILb{int(k % 4 == 0)}ENS0_{'13SignOfFloat32' if dtype == torch.float32 else '12SignOf16Bits'}"
    arguments = [19, k, words, launch.write(out, "bits"), test, launch.write(nan, "nan")]
    launch(kernel, 2, BLOCK, launch.read(x, "x"), 0, 0, *arguments)
    assert torch.equal(out, reference.pack_signs(x))
    assert not nan

    x[7, 5] = float("nan")
    launch(kernel, 2, BLOCK, launch.read(x, "x"), 0, 0, *arguments)
    assert nan


@pytest.mark.parametrize("k", [77, 132])
@pytest.mark.parametrize("gated", [False, True])
def test_pack_window(module, k, gated):
    x, gate = torch.randn(9, k), bits(9, k, 1) if gated else None
    words = reference.words_for(k)
    out, launch = garbage(9, words), Launch(module)
    gate_arguments = launch.read(gate, "gate"), words if gated else 0
    rest = 9, k, words, launch.write(out, "bits"), struct.pack("<f", 0.7), 0
    kernel = f"pack_kernelILb{int(k % 4 == 0)}ENS0_12WithinWindow"
    launch(kernel, 3, BLOCK, launch.read(x, "x"), *gate_arguments, *rest)
    assert torch.equal(out, reference.pack_window(x, 0.7, gate))


@pytest.mark.parametrize("n", [1, 77, 132])
def test_standardise(module, n):
    y, d = torch.randn(19, n) + 3, torch.randn(19, n)
    z, moments, dy = garbage(19, n, dtype=y.dtype), garbage(19, 2, dtype=torch.float64), garbage(19, n, dtype=y.dtype)
    launch = Launch(module)
    results = launch.write(z, "z"), launch.write(moments, "moments")
    launch("standardise_kernel", 2, BLOCK, packed("QdqqQQ", launch.read(y, "y"), 1e-5, 19, n, *results))
    expected = reference.standardise(y)
    assert torch.equal(z, expected[0]) and torch.equal(moments, expected[1])
    addresses = launch.read(d, "d"), launch.read(y, "y again"), launch.read(moments.clone(), "moments again")
    launch("standardise_grad_kernel", 2, BLOCK, packed("QQQqqQ", *addresses, 19, n, launch.write(dy, "dy")))
    assert torch.equal(dy, reference.standardise_grad(d, y, moments))


@pytest.mark.parametrize(
    ("dtype", "letter", "plus", "minus"),
    [(torch.int8, "h", 1, 0xFF), (torch.bfloat16, "t", 0x3F80, 0xBF80), (torch.float32, "j", 0x3F800000, 0xBF800000),
     (torch.float64, "m", 0x3FF0000000000000, 0xBFF0000000000000)],
)  # fmt: skip
@pytest.mark.parametrize("k", [77, 144])
def test_unpack_signs(module, dtype, letter, plus, minus, k):
    x_bits, size = bits(7, k, 0), dtype.itemsize
    units = 16 // size if k % (16 // size) == 0 else 1
    out, launch = torch.full((7, k), 3.0).to(dtype), Launch(module)
    words = reference.words_for(k)
    argument = packed("QqqqiQQQ", launch.read(x_bits, "bits"), 7, k, words, size, plus, minus, launch.write(out, "out"))
    launch(f"unpack_kernelI{letter}Li{units}E", 2, BLOCK, argument)
    assert torch.equal(out, reference.unpack_signs(x_bits, k, dtype))


TILES = {"large": (2, 4, 4), "small": (2, 2, 2)}
GATES = ("none", "shared", "per sample")


def gate_of(kind: str, rows: int, k: int) -> torch.Tensor | None:
    return {"none": None, "shared": bits(1, k, 2)[0], "per sample": bits(rows, k, 2)}[kind]


def matmul(
    module: ptx.Module,
    kernel: str,
    rows: int,
    columns: int,
    threads: int,
    m: int,
    n: int,
    k: int,
    gate: str,
    product: bool,
) -> None:
    """Runs binary_matmul or binary_threshold by tiles of rows x columns and compares."""
    x, w, g = bits(m, k, 0), bits(n, k, 1), gate_of(gate, m, k)
    words, launch = reference.words_for(k), Launch(module)
    threshold = torch.randint(-9, 10, (n,), dtype=torch.int32)
    flip = torch.randint(0, 2, (n,), dtype=torch.uint8)
    out = garbage(m, n, dtype=torch.int32) if product else garbage(m, reference.words_for(n))
    y = launch.write(out, "y")
    argument = packed(
        "QQQqqqqqQQQQ", launch.read(x, "x"), launch.read(w, "w"), launch.read(g, "gate"),
        words if gate == "per sample" else 0, m, n, k, words, y if product else 0,
        launch.read(threshold, "threshold"), launch.read(flip, "flip"), 0 if product else y,
    )  # fmt: skip
    width = n if product else 64 * reference.words_for(n)
    launch(f"{kernel}NS0_6OutputE{int(not product)}E", -(-m // rows) * -(-width // columns), threads, argument)
    want = reference.binary_matmul(x, w, k, g)
    if not product:
        want = reference.pack_signs(torch.where((want >= threshold) != flip.bool(), 1.0, -1.0))
    assert torch.equal(out, want)


@pytest.mark.parametrize("product", [True, False], ids=["product", "threshold"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tile", TILES)
def test_binary_matmul_by_tiles(module, tile, gate, product):
    warps_m, warps_n, tiles_m = TILES[tile]
    kernel = (
        f"binary_matmul_kernelINS0_10BinaryTileILi{warps_m}ELi{warps_n}ELi{tiles_m}ELNS0_4GateE{GATES.index(gate)}EEEL"
    )
    rows, columns, threads = warps_m * tiles_m * 16, warps_n * 32, warps_m * warps_n * 32
    matmul(module, kernel, rows, columns, threads, rows + 3, 41, 1300, gate, product)


@pytest.mark.parametrize("product", [True, False], ids=["product", "threshold"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("samples", [1, 4])
def test_binary_matmul_by_dots(module, samples, gate, product):
    kernel = f"binary_dot_kernelINS0_7DotTileILi{samples}ELb{int(gate != 'none')}EEEL"
    columns = 16 * (4 if samples == 1 else 2)
    matmul(module, kernel, samples, columns, BLOCK, 1 if samples == 1 else 6, 75, 2100, gate, product)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    ("dtype", "transposed", "by_row"),
    [(torch.uint8, False, False), *((t, *form) for t in (torch.float32, torch.bfloat16)
                                    for form in ((False, False), (False, True), (True, True)))],
)  # fmt: skip
def test_sign_product(module, dtype, transposed, by_row, aligned):
    rows, inner, columns = (68, 72, 141) if aligned else (66, 71, 70)
    if dtype == torch.uint8:
        a = torch.randint(0, 256, (rows, inner), dtype=dtype)
    else:  # so few bits that every order of additions gives the same, in three planes of bfloat16 for float32
        a = (torch.randint(-(2**17), 2**17, (rows, inner)) / 1024).to(dtype)
        a = a if dtype == torch.float32 else (a / 32).round().to(dtype)
    signs = bits(inner, columns, 0) if by_row else bits(columns, inner, 0)
    gate = bits(inner, columns, 1) if transposed else None
    mask = bits(rows, columns, 2) if by_row and not transposed else None
    s = reference.unpack_signs(signs, columns if by_row else inner, torch.float64)
    s = s if by_row else s.T
    if gate is not None:
        s = s * (reference.unpack_signs(gate, columns, torch.float64) > 0)
    want = a.double() @ s
    if mask is not None:
        want = want * (reference.unpack_signs(mask, columns, torch.float64) > 0)

    out_dtype = torch.int32 if dtype == torch.uint8 else dtype
    out, launch = garbage(rows, columns, dtype=out_dtype), Launch(module)
    held = a.T.contiguous() if transposed else a
    element = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.uint8: UINT8}[dtype]
    words = reference.words_for(columns)
    argument = packed(
        "Qi?Q?QqQqQqqq", launch.read(held, "a"), element, transposed, launch.read(signs, "signs"), by_row,
        launch.read(gate, "gate"), words if transposed else 0, launch.read(mask, "mask"),
        0 if mask is None else words, launch.write(out, "y"), rows, inner, columns,
    )  # fmt: skip
    name = {torch.float32: "7Float32", torch.bfloat16: "8BFloat16", torch.uint8: "5Uint8"}[dtype]
    fits = (rows if transposed else inner) % 4 == 0
    tile = f"11ProductTileINS0_{name}ELb{int(transposed)}ELb{int(by_row)}EE"
    launch(f"sign_product_kernelILb{int(fits)}ENS0_{tile}", -(-rows // 64) * -(-columns // 128), 128, argument)
    assert torch.equal(out, want.to(out_dtype))


def sample(
    module: ptx.Module, kernel: str, blocks: int, score: torch.Tensor, **given
) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = score.shape
    settings = {
        "bernoulli": False,
        "count": 0,
        "threshold": 0,
        "inverse_temperature": 0.0,
        "seed": (5, 9),
        "first_row": 0,
        "row_step": 1,
    }
    settings |= given
    words, stride, launch = reference.words_for(k), -(-k // 4) * 4, Launch(module)
    gate, keys, nan = garbage(m, words), garbage(m, stride, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    argument = packed(
        "QQqqq?qQfQIQQQqQ", launch.read(score, "score"), launch.write(gate, "gate"), m, k, words, settings["bernoulli"],
        settings["count"], settings["threshold"], settings["inverse_temperature"], *settings["seed"],
        settings["first_row"], settings["row_step"], launch.write(keys, "keys"), stride, launch.write(nan, "nan"),
    )  # fmt: skip
    launch(kernel, blocks, BLOCK, argument)
    return gate, nan


@pytest.mark.parametrize("k", [77, 260])
def test_bernoulli_engram(module, k):
    score, first_row = torch.zeros(5, k), 2**33 + 1
    gate, _ = sample(
        module, "bernoulli_kernel", 2, score, bernoulli=True, threshold=round(0.3 * 2**32), first_row=first_row
    )
    assert torch.equal(
        gate, reference.sample_engram(score, torch.tensor([5, 9]), 0.3, "bernoulli", first_row=first_row)
    )


@pytest.mark.parametrize("k", [77, 260, 1500])
@pytest.mark.parametrize("temperature", [0.0, 0.5, float("inf")])
def test_gumbel_top_k_engram(module, k, temperature):
    score = (torch.randn(3, k) * 4).round() / 4  # with ties
    inverse = -1.0 if temperature == 0 else 1 / temperature
    kernel = f"gumbel_top_k_kernelILb{int(k % 4 == 0)}E"
    gate, nan = sample(module, kernel, 3, score, count=max(1, round(0.1 * k)), inverse_temperature=inverse)
    assert torch.equal(gate, reference.sample_engram(score, torch.tensor([5, 9]), 0.1, temperature=temperature))
    assert not nan
    if temperature < float("inf"):
        score[1, 5] = float("nan")
        _, nan = sample(module, kernel, 3, score, count=9, inverse_temperature=inverse)
        assert nan


@pytest.mark.parametrize("architecture", [75, 80, 90, 100])
@pytest.mark.parametrize("k", [132, 77])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_metaplastic_adam_by_triton(architecture, k, state):
    """Bit for bit like the CPU kernel: both do the same IEEE operations in the same order."""
    triton_ptx = pytest.importorskip("emulator.triton_ptx", reason="no Triton on this machine")
    compiled = triton_ptx.compile_update(
        torch.float32, torch.float32, state, architecture, k_factor=4 if k % 4 == 0 else 1
    )
    n, blocks = 13, -(-k // 64)
    weight, grad = torch.randn(n, k), torch.randn(n, k)
    second = triton_ptx.SECOND_MOMENT[state]
    if state == torch.int8:
        scales = {"exp_avg_scale": torch.full((n, blocks), 0.5), "exp_avg_sq_scale": torch.full((n, blocks), 0.25)}
        moments = [torch.randint(-127, 128, (n, k), dtype=state), torch.randint(1, 256, (n, k), dtype=second)]
    else:
        scales = {}
        moments = [torch.randn(n, k).to(state), torch.rand(n, k).to(second)]
    seed = torch.tensor([2**40 + 3, 9])
    tensors = dict(weight=weight, grad=grad, exp_avg=moments[0], exp_avg_sq=moments[1], **scales,
                   sign_bits=garbage(n, reference.words_for(k)))  # fmt: skip
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    settings = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01, metaplasticity=1.3, step=3,
                    weight_bound=0.7)  # fmt: skip
    seeded = dict(seed=None if state == torch.float32 else seed, first_row=2**33)
    *_, key0, key1, key2, key3 = torch.ops.engram_kernels._check_update(**expected, **settings, **seeded)
    ops.metaplastic_adam_(**expected, **settings, **seeded)

    memory, nan = ptx.Memory(), np.zeros(1, np.int32)
    given: dict[str, int | float] = {
        name: memory.add(_array(tensor), name, read_only=name == "grad") for name, tensor in tensors.items()
    }
    beta1, beta2, step = settings["beta1"], settings["beta2"], settings["step"]
    given |= dict(nan_flag=memory.add(nan, "nan"), N=n, K=k, beta1=beta1, one_minus_beta1=1 - beta1, beta2=beta2,
                  one_minus_beta2=1 - beta2, eps=settings["eps"], weight_decay=settings["weight_decay"],
                  slope=_float32(-2 * _float32(np.log2(np.e)) * _float32(settings["metaplasticity"])),
                  step_size=settings["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step),
                  weight_bound=settings["weight_bound"],
                  key0=int(key0), key1=int(key1), key2=int(key2), key3=int(key3), first_row=2**33)  # fmt: skip
    module = ptx.Module(compiled.ptx)
    programs = -(-n // compiled.rows) * -(-k // 128)
    arguments = [given[name] for name, _ in compiled.parameters]
    unused = len(module.functions[module.entries[0]].parameters) - len(arguments)  # scratch memory
    module.launch(module.entries[0], (programs,), (32 * compiled.num_warps,), memory, [*arguments, *[0] * unused],
                  compiled.shared)  # fmt: skip
    assert not nan[0]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def _float32(x: float) -> float:
    return float(np.float32(x))
