"""Builds engram_kernels/_C.abi3.so: each CPU kernel file once per instruction set, then the bindings.

Environment: ENGRAM_BUILD_JOBS compilers at once (default: the number of cores).
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_TARGET_VERSION = "0x020d000000000000"  # 2.13, the oldest torch that the library runs under
CSRC = Path("csrc")
KERNELS = [
    "pack", "binary_matmul", "sign_product", "gated_grad", "sample_engram", "metaplastic_adam", "tables",
]  # fmt: skip
ISA_FLAGS = {
    "x86_64": {
        "scalar": [],
        "avx2": ["-mavx2", "-mfma", "-mbmi", "-mbmi2"],
        "avx512": [
            "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vpopcntdq", "-mbmi", "-mbmi2",
            "-mprefer-vector-width=512", "-Wno-maybe-uninitialized",  # GCC 12 warns of its own header
        ],
    },
    "aarch64": {"scalar": [], "neon": []},
}  # fmt: skip
# No contraction: every instruction set and backend rounds the same way. No errno: square roots are vectorised.
KERNEL_FLAGS = [
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
]  # fmt: skip


def isa_flags() -> dict[str, list[str]]:
    """Instruction sets built on this machine, with their compiler flags."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return ISA_FLAGS.get(machine, {"scalar": []})


class BuildKernels(BuildExtension):
    """Adds the kernel objects, which need flags of their own, to torch's build of the bindings."""

    def build_extension(self, ext):
        """Compile the kernels, then let torch compile and link the rest."""
        compiler = os.environ.get("CXX", "c++")
        commands = []
        for isa, flags in isa_flags().items():
            folder = Path(self.build_temp) / isa
            folder.mkdir(parents=True, exist_ok=True)
            for name in KERNELS:
                source, target = CSRC / "cpu" / f"{name}.cpp", folder / f"{name}.o"
                macros = [f"-DENGRAM_ISA={isa}", f"-DENGRAM_ISA_{isa.upper()}"]
                commands.append(
                    [compiler, "-c", str(source), "-o", str(target), f"-I{CSRC}", *KERNEL_FLAGS, *macros, *flags]
                )
                ext.extra_objects.append(str(target))
        jobs = int(os.environ.get("ENGRAM_BUILD_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self.spawn, commands))
        super().build_extension(ext)


extension = CppExtension(
    "engram_kernels._C",
    [str(CSRC / "bindings.cpp"), str(CSRC / "cpu" / "launch.cpp"), str(CSRC / "cuda" / "no_cuda.cpp")],
    include_dirs=[str(CSRC)],
    depends=sorted(str(path) for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h")),  # for sdist and rebuilds
    py_limited_api=True,
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("Py_LIMITED_API", "0x030A0000")],
    extra_compile_args={"cxx": ["-O2", "-std=c++20", "-fvisibility=hidden"]},
)
extension.libraries = ["c10", "torch_cpu"]  # what the Stable ABI needs, and nothing that only some builds of torch have

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildKernels.with_options(use_ninja=False, no_python_abi_suffix=False)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
