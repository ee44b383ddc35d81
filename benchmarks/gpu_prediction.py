"""What each CUDA kernel should take on a GPU, from its machine code and the bytes it moves: lower bounds, not measured.

    python -m benchmarks.gpu_prediction

Compiles the kernels for each architecture, counts the instructions of the loop that does the work, and sets the most
occupied unit of a multiprocessor against the bytes that must come from memory. The larger of the two is the prediction.
Left out: the launch (2 to 4 us), latency, waiting between loads and products, and what the second-level cache spares.
Needs nvcc, ptxas, nvdisasm and Triton, but no GPU.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from engram_kernels.reference import words_for

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from emulator import machine_code as mc  # noqa: E402  where the machine code is read


@dataclass(frozen=True)
class Device:
    """Published peak figures of a GPU."""

    name: str
    architecture: str
    multiprocessors: int
    hertz: float
    bytes_per_second: float


# NVIDIA A100 and H100 white papers and data sheets: boost clock and memory of the SXM boards with 80 GB.
DEVICES = (Device("A100", "80", 108, 1.41e9, 2.039e12), Device("H100", "90a", 132, 1.83e9, 3.352e12))
M, N, K = 100, 4096, 4096  # sizes of most benchmarks
LARGE = 1024


@dataclass(frozen=True)
class Launch:
    """A launch of ``blocks`` of ``warps``, each of which runs the loop ``loops`` times, and the ``bytes`` it moves."""

    blocks: int
    warps: int
    loops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """A kernel at a size: parts of its mangled name, and its launch on so many multiprocessors."""

    what: str
    name: tuple[str, ...]
    launch: Callable[[int], tuple[tuple[str, ...], Launch]]
    unrolled: bool = False  # the compiler may have made one loop of several; each ends in one store


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def bits(rows: int, units: int) -> int:
    """Bytes of packed rows."""
    return 8 * rows * words_for(units)


def binary_matmul(m: int, gate: int) -> Case:
    """``gate``: 0 none, 2 per sample."""

    def launch(multiprocessors: int) -> tuple[tuple[str, ...], Launch]:
        moved = bits(m, K) * (2 if gate else 1) + bits(N, K) + 4 * m * N
        if m <= 8:  # kMostDotSamples; a half-warp makes 4 outputs of one sample, or 2 of 4 samples
            samples = 1 if m == 1 else 4
            columns = 4 if samples == 1 else 2
            name = (f"DotTileILi{samples}ELb{int(gate > 0)}E", "OutputE0")
            return name, Launch(ceil_div(N, 16 * columns) * ceil_div(m, samples), 8, K / (16 * 128), moved)
        large = ceil_div(m, 128) * ceil_div(N, 128) >= multiprocessors
        side, warps, tile = (128, 8, "ILi2ELi4ELi4E") if large else (64, 4, "ILi2ELi2ELi2E")
        name = (f"BinaryTile{tile}LNS0_4GateE{gate}E", "OutputE0")
        return name, Launch(ceil_div(m, side) * ceil_div(N, side), warps, ceil_div(K, 512), moved)

    return Case(f"binary_matmul {m}x{N}x{K}" + (", gate per sample" if gate else ""), ("binary_",), launch)


def sign_product(what: str, tile: str, rows: int, inner: int, columns: int, moved: float) -> Case:
    """y (rows, columns) = a (rows, inner) s (inner, columns)."""
    depth = 64 if "Uint8" in tile else 32

    def launch(_: int) -> tuple[tuple[str, ...], Launch]:
        blocks = ceil_div(rows, 64) * ceil_div(columns, 128)
        return (tile, "kernelILb1E"), Launch(blocks, 4, ceil_div(inner, depth), moved)

    return Case(what, ("sign_product_kernel",), launch)


def rowwise(what: str, kernel: str, variant: str, rows: int, units: int, moved: float) -> Case:
    """A warp makes 128 units of a row at a time."""

    def launch(_: int) -> tuple[tuple[str, ...], Launch]:
        return (variant,), Launch(ceil_div(rows * ceil_div(units, 128), 8), 8, 1, moved)

    return Case(what, (kernel,), launch, unrolled=True)


def cases() -> list[Case]:
    floats = 4 * M * N
    return [
        *(binary_matmul(m, gate) for m in (1, 8, M, LARGE) for gate in (0, 2)),
        sign_product(
            "sign_matmul_t 100x4096x784, float32", "Float32ELb0ELb0", M, 784, N, 4 * M * 784 + bits(N, 784) + floats
        ),
        sign_product("sign_matmul_t 100x4096x784, uint8", "Uint8ELb0ELb0", M, 784, N, M * 784 + bits(N, 784) + floats),
        sign_product(
            "masked_input_grad 100x4096x4096", "Float32ELb0ELb1", M, N, K, 2 * floats + bits(N, K) + bits(M, K)
        ),
        sign_product(
            "gated_weight_grad 100x4096x4096", "Float32ELb1ELb1", N, M, K, floats + 2 * bits(M, K) + 4 * N * K
        ),
        rowwise("pack_signs 100x4096, float32", "pack_kernelILb1E", "SignOfFloat32", M, K, floats + bits(M, K)),
        rowwise("pack_window 100x4096", "pack_kernelILb1E", "WithinWindow", M, K, floats + 2 * bits(M, K)),
        rowwise("unpack_signs 4096x4096, float32", "unpack_kernel", "IjLi4E", N, K, 4 * N * K + bits(N, K)),
        rowwise("sample_engram 100x4096, bernoulli", "bernoulli_kernel", "", M, K, bits(M, K)),
        Case(
            "sample_engram 100x4096, gumbel_top_k",
            ("gumbel_top_k_kernelILb1E",),
            lambda _: ((), Launch(M, 8, K / (8 * 128), 2 * floats + bits(M, K))),
        ),
    ]


def loop_of(kernel: mc.Kernel) -> list[mc.Instruction]:
    """The loop that does the work; of top-k sampling, whose digits are counted in others, the one with logarithms."""
    if "gumbel" not in kernel.name:
        return kernel.hot_loop()
    bodies = [kernel.inside(loop) for loop in kernel.loops()]
    counts = [sum(i.name == "MUFU" for i in body) for body in bodies]
    return min((b for b, n in zip(bodies, counts, strict=True) if n == max(counts)), key=len)


@dataclass(frozen=True)
class Prediction:
    """Seconds by the busiest unit of the multiprocessors, and by memory."""

    what: str
    device: Device
    unit: str
    clocks: float
    arithmetic: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.memory)


def predict(what: str, device: Device, body: Iterable[mc.Instruction], launch: Launch) -> Prediction:
    """From the instructions of one warp's loop."""
    needed = mc.clocks(body, device.architecture)
    unit = max(needed, key=lambda name: needed[name])
    blocks = ceil_div(launch.blocks, device.multiprocessors)  # of the multiprocessor that gets most
    seconds = blocks * launch.warps * launch.loops * needed[unit] / device.hertz
    return Prediction(what, device, unit, needed[unit], seconds, launch.bytes / device.bytes_per_second)


def kernel_predictions(device: Device) -> list[Prediction]:
    """Of the kernels in ``csrc/cuda``."""
    csrc = ROOT / "csrc"
    ptx = mc.compile_ptx(csrc / "cuda" / "launch.cu", device.architecture, include=[csrc])
    kernels = mc.kernels(mc.assemble(ptx, device.architecture))
    found = []
    for case in cases():
        parts, launch = case.launch(device.multiprocessors)
        names = [name for name in kernels if all(part in name for part in (*case.name, *parts))]
        if len(names) != 1:
            raise RuntimeError(f"{case.what}: expected one kernel named by {case.name + parts}, got {names}")
        body = loop_of(kernels[names[0]])
        if case.unrolled:
            launch = dataclasses.replace(launch, loops=launch.loops / sum(i.name == "STG" for i in body))
        found.append(predict(case.what, device, body, launch))
    return found


def update_predictions(device: Device) -> list[Prediction]:
    """Of the Triton kernel, all of whose instructions a warp runs once."""
    from emulator.triton_ptx import compile_update

    found = []
    for what, weight, state, moved in (
        ("update of 16 M weights, float32", torch.float32, torch.float32, 28 + 1 / 8),
        ("the same, bfloat16 moments", torch.float32, torch.bfloat16, 20 + 1 / 8),
        ("the same, int8 moments", torch.float32, torch.int8, 16 + 1 / 8 + 16 / 64),
        ("the same, int8 moments, bfloat16 weights", torch.bfloat16, torch.int8, 12 + 1 / 8 + 16 / 64),
    ):
        update = compile_update(weight, torch.float32, state, int(device.architecture.removesuffix("a")))
        body = [mc.Instruction(0, name, name) for name in update.instructions]
        blocks = ceil_div(N, update.rows) * ceil_div(K, 128)
        found.append(predict(what, device, body, Launch(blocks, update.num_warps, 1, moved * N * K)))
    return found


def table(devices: Iterable[Device] = DEVICES) -> list[str]:
    """Markdown: for each kernel and device microseconds by arithmetic (and the unit that sets them) and by memory."""
    devices = list(devices)
    columns = [[*kernel_predictions(device), *update_predictions(device)] for device in devices]
    lines = [
        "| operator | " + " | ".join(f"{d.name}, us | set by" for d in devices) + " |",
        "| --- |" + " --- | --- |" * len(devices),
    ]
    for row in zip(*columns, strict=True):
        cells = [row[0].what]
        for p in row:
            by = (
                f"{p.unit}; memory {1e6 * p.memory:.1f}"
                if p.arithmetic >= p.memory
                else (f"memory; {p.unit} {1e6 * p.arithmetic:.1f}")
            )
            cells += [f"{1e6 * p.seconds:.1f}", by]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    reason = mc.missing("nvcc", "ptxas", "nvdisasm")
    if reason:
        raise SystemExit(f"gpu_prediction: {reason}; CUDA_HOME or the wheels named in docs/gpu.md bring them")
    print("\n".join(table()))


if __name__ == "__main__":
    main()
