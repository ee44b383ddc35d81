"""`engram-kernels info`: the state of the installation."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from .. import __version__, ops
from .console import Parser, one_line


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "info",
        help="versions, instruction set, threads, CUDA and Triton: what a bug report needs",
        description="Print what a bug report needs to say about the installation.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the state of the installation; anything that can't be found out is said, not raised."""
    build = ops.build_info()
    extra = ("scikit-learn", "safetensors", "matplotlib", "tqdm")
    environment = {name: value for name, value in os.environ.items() if name.startswith("ENGRAM_")}
    rows: list[tuple[str, str]] = [
        ("engram-kernels", __version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", str(torch.__version__)),
        *((name, _version(name) or "not installed") for name in ("numpy", "triton")),
        ("system", f"{platform.platform()} {platform.machine()}"),
        ("processor", processor()),
        ("instruction set", f"{ops.isa()} in use; available: {', '.join(ops.available_isas())}"),
        ("processor flags", ", ".join(_cpu_features()) or "unknown"),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        *((f"build: {name}", str(value)) for name, value in sorted(build.items())),
        ("cuda", _cuda_state()),
        ("nvidia driver", _driver()),
        ("triton state", _triton_state()),
        ("extra 'train'", ", ".join(f"{name} {_version(name) or 'missing'}" for name in extra)),
        (
            "environment",
            " ".join(f"{name}={value}" for name, value in environment.items()) or "no ENGRAM_* set",
        ),
    ]
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        print(f"{name:<{width}}{value}")
    return 0


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty elsewhere than on Linux."""
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def processor() -> str:
    """The name of the processor."""
    return _cpu_info().get("model name") or platform.processor() or "unknown"


def _cpu_features() -> list[str]:
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    known = ("avx2", "avx512f", "avx512bw", "avx512vbmi", "avx512_vpopcntdq", "asimd", "sve")
    return [flag for flag in known if flag in flags]


def _cuda_state() -> str:

    if torch.version.cuda is None:
        return "torch is built without CUDA"
    built = f"torch is built with CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        return f"{built}; no usable device"
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return f"{built}; " + ", ".join(
        f"{device.name} (sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB)" for device in devices
    )


def _driver() -> str:
    try:
        first = Path("/proc/driver/nvidia/version").read_text("utf-8", "replace").splitlines()[0]
        return first.partition(":")[2].strip()
    except (OSError, IndexError):
        return "not found"


def _triton_state() -> str:
    try:
        import triton
    except ImportError as error:
        return f"can't be imported ({one_line(error)})"
    try:
        target = triton.runtime.driver.active.get_current_target()
        return f"active for {target.backend} {target.arch}"
    except Exception as error:  # what a missing GPU raises differs between Triton's versions
        return f"imports; no active GPU driver ({one_line(error)})"
