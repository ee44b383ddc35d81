"""Compiles the Triton kernels for any NVIDIA architecture, with neither a GPU nor a driver.

Run as a program, prints a table of what the compiled update costs on every architecture.
"""

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engram_kernels.triton_kernels import metaplastic_adam

_TOOLS = Path(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
_INTEGERS = ("nan_flag", "N", "K", "key0", "key1", "key2", "key3", "first_row")
SECOND_MOMENT = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.int8: torch.uint8}

# Warps that an SM holds, from the table of compute capabilities in CUDA's programming guide.
WARPS_OF_SM = {75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_REGISTERS_OF_SM = 65536


@dataclass(frozen=True)
class CompiledUpdate:
    """The update of one combination of formats on one architecture.

    ``parameters`` are name and type of what the PTX entry takes, in order; Triton appends two pointers, to scratch
    memory that this kernel does not use (pass 0). A launch takes ceil(N / rows) * ceil(K / 128) blocks of
    ``32 * num_warps`` threads, and ``shared`` bytes of shared memory.
    """

    architecture: int
    ptx: str
    cubin: bytes
    parameters: tuple[tuple[str, str], ...]
    num_warps: int
    shared: int
    rows: int

    @property
    def weights_per_thread(self) -> int:
        return self.rows * 128 // (32 * self.num_warps)

    @functools.cached_property
    def sass(self) -> str:
        return self._disassembled("nvdisasm", "-c")

    @functools.cached_property
    def usage(self) -> dict[str, int]:
        """REG, STACK, SHARED and LOCAL: registers a thread, and bytes."""
        found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", self._disassembled("cuobjdump", "-res-usage"))
        return {name: int(number) for name, number in found}

    @functools.cached_property
    def instructions(self) -> list[str]:
        """Operations in SASS of the kernel proper, less the subroutines for roots and quotients of unusual numbers."""
        body = re.split(r"^\$\S*slowpath:", self.sass, flags=re.MULTILINE)[0]
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, flags=re.MULTILINE)
        return [name for name in found if name != "NOP"]

    def count(self, pattern: str) -> int:
        """Instructions whose name matches from its start."""
        return sum(re.match(pattern, name) is not None for name in self.instructions)

    @property
    def occupancy(self) -> float:
        """Share of an SM's warps that its registers allow."""
        of_warp = -(-self.usage["REG"] // 8) * 8 * 32
        warps = _REGISTERS_OF_SM // of_warp // self.num_warps * self.num_warps
        return min(1.0, warps / WARPS_OF_SM[self.architecture])

    def _disassembled(self, tool: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


@functools.cache
def compile_update(
    weight: torch.dtype,
    grad: torch.dtype,
    state: torch.dtype,
    architecture: int,
    sign_bits: bool = True,
    k_factor: int = 4,
) -> CompiledUpdate:
    """Compiles as a launch with tensors at multiples of 16 bytes does. ``k_factor`` is 4 if it divides K, else 1."""
    kernel = metaplastic_adam.metaplastic_adam_kernel
    rows = metaplastic_adam.ROWS
    scale = torch.float32 if state == torch.int8 else None
    tensors = dict(
        weight=weight,
        grad=grad,
        exp_avg=state,
        exp_avg_sq=SECOND_MOMENT[state],
        exp_avg_scale=scale,
        exp_avg_sq_scale=scale,
        sign_bits=torch.int64 if sign_bits else None,
    )
    constants = dict(ROWS=rows, K_FACTOR=k_factor) | {name: None for name, dtype in tensors.items() if dtype is None}
    types = {name: "i64" if name in _INTEGERS else "fp32" for name in kernel.arg_names}
    types |= {name: _POINTERS[dtype] for name, dtype in tensors.items() if dtype is not None}
    types |= {name: "constexpr" for name in constants}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": metaplastic_adam.NUM_WARPS, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return CompiledUpdate(
        architecture=architecture,
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        parameters=tuple((name, type_) for name, type_ in types.items() if type_ != "constexpr"),
        num_warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        rows=rows,
    )


WEIGHTS_AND_GRADS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
FORMATS = [(weight, grad, state) for weight, grad in WEIGHTS_AND_GRADS for state in SECOND_MOMENT]


def table(updates: list[tuple[tuple[torch.dtype, ...], CompiledUpdate]]) -> str:
    """A line for each: formats, architecture, registers, instructions a weight, occupancy, wide accesses."""
    lines = ["weight   grad     state    | sm  | registers | instructions/weight | occupancy | 128-bit loads, stores"]
    for formats, update in updates:
        names = " ".join(str(dtype).removeprefix("torch.").ljust(8) for dtype in formats)
        per_weight = len(update.instructions) / update.weights_per_thread
        lines.append(
            f"{names} | {update.architecture:3} | {update.usage['REG']:9} | {per_weight:19.0f} | "
            f"{update.occupancy:8.0%}  | {update.count(r'LDG.*128')}, {update.count(r'STG.*128')}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([(f, compile_update(*f, sm)) for sm in WARPS_OF_SM for f in FORMATS]))
