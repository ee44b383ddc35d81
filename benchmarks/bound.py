"""What no implementation can pass; for products ``bound.cpp``, compiled when it is asked for."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch

ROOT = Path(__file__).parents[1]
MACS = 2_000_000_000  # of a measurement: some milliseconds


@functools.cache
def library(isa: str) -> ctypes.CDLL:
    """``bound.cpp`` with the flags of the kernels themselves, for an instruction set with vectors.

    Raises: RuntimeError with the compiler's first error; OSError where there is no compiler.
    """
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    build = json.loads((ROOT / "csrc" / "cpu" / "build.json").read_text())
    flags = build["flags"] + build["instruction_sets"].get(machine, {"scalar": []})[isa]
    flags += [f"-DENGRAM_ISA={isa}", f"-I{ROOT / 'csrc'}", "-shared"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bound.so"
        command = [os.environ.get("CXX", "c++"), *flags, str(Path(__file__).with_name("bound.cpp")), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(next((line for line in done.stderr.splitlines() if "error" in line), done.stderr))
        loaded = ctypes.CDLL(str(target))
    loaded.bits_per_step.restype = loaded.distance_of.restype = ctypes.c_int64
    loaded.distance_of.argtypes = [ctypes.c_uint64] * 2 + [ctypes.c_int64]
    x, w, steps = 0x0123456789ABCDEF, 0xFEDCBA9876543211, 101  # more steps than a byte counts, and no multiple of them
    expected, got = (x ^ w).bit_count() * steps * loaded.bits_per_step() // 64, loaded.distance_of(x, w, steps)
    if got != expected:
        raise RuntimeError(f"bound.cpp for {isa}: expected a distance of {expected}, got {got}")
    return loaded


@dataclass(frozen=True)
class Bound:
    """A call, and how much of the work that ours does it stands for."""

    name: str
    call: Callable[[], Any]
    work: float = 1.0


def register_loop(isa: str) -> Bound | None:
    """The kernels' primitives on registers, for as many threads as torch has, in multiply-accumulates.

    None where the compiler chooses the vectors, on a GPU, and, with a note in the report, where it does not compile.
    """
    if isa not in ("avx512", "avx2", "neon"):
        return None
    try:
        loaded = library(isa)
    except (OSError, RuntimeError, LookupError) as error:
        note = f"no bound for {isa}: {error}"
        if note not in report.NOTES:
            report.NOTES.append(note)
        return None
    steps = MACS // loaded.bits_per_step()

    def loop() -> None:
        loaded.distance_of(1, ~1 & (2**64 - 1), steps)

    # on one thread, and as much again for each other: waking threads for a few milliseconds would be measured too
    return Bound("register loop", loop, torch.get_num_threads() * steps * loaded.bits_per_step())
