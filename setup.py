"""Builds engram_kernels/_C.abi3.so: each CPU kernel file once per instruction set, the CUDA kernels, the bindings.

Environment:
    CXX                 the C++ compiler, with a launcher before it or options behind it, as in "ccache g++"
    ENGRAM_BUILD_JOBS   compilers at once (default: MAX_JOBS, as for torch's extensions, or the cores of this process)
    ENGRAM_SANITIZE     sanitizers to build with, as in "address,undefined": .ci/sanitize (default: none)
    ENGRAM_CUDA         auto: CUDA kernels where nvcc is found (default); 1: insist on them; 0: leave them out
    ENGRAM_CUDA_ARCHS   architectures, as in "80;90a;120+PTX" (default: all that this nvcc knows of ours)
    CUDA_HOME           the CUDA toolkit, if nvcc is neither on PATH nor in an installed nvidia-cuda-nvcc wheel

CUDA needs nvcc 12 or 13, no GPU, no driver and no CUDA build of torch: kernels know no torch, and the CUDA runtime is
linked in.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_TARGET_VERSION = "0x020d000000000000"  # 2.13, the oldest torch that the library runs under
CSRC = Path("csrc")
# Kernel files and flags, for csrc/runtime too. No contraction (-ffp-contract=off): every instruction set and backend
# rounds the same way. No errno: square roots are vectorised. GCC 12 warns of its own header.
CPU_BUILD = json.loads((CSRC / "cpu" / "build.json").read_text())
KERNELS = [*CPU_BUILD["prediction_kernels"], *CPU_BUILD["training_kernels"]]

# Of sanitizers: every fault ends the process, and its report names functions. -O1 builds in half the time of -O2.
SANITIZER_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]

CUDA_ARCHITECTURES = ["75", "80", "86", "89", "90a", "100", "120+PTX"]
# No contraction, as above: sampling draws the same numbers as on the CPU.
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "--fmad=false",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-Xfatbin",
    "-compress-all",
]


def compiler_words() -> list[str]:
    """The C++ compiler of CXX, split like a shell does: a launcher may come before it, options behind it."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def host_compiler_flags(words: list[str]) -> list[str]:
    """What tells nvcc of the C++ compiler, of which it wants the program alone: launchers are left out."""
    options = [word for word in words if word.startswith("-")]
    program = next(word for word in reversed(words) if word not in options)
    return ["-ccbin", program, *(flag for option in options for flag in ("-Xcompiler", option))]


def build_jobs() -> int:
    """Compilers at once: ENGRAM_BUILD_JOBS, else MAX_JOBS, else the cores that this process may run on."""
    for name in ("ENGRAM_BUILD_JOBS", "MAX_JOBS"):
        if value := os.environ.get(name):
            if not value.isdecimal() or int(value) < 1:
                raise SystemExit(f"{name}: expected a number of at least 1, got {value!r}")
            return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sanitizer_flags() -> list[str]:
    """Flags of the sanitizers that ENGRAM_SANITIZE asks for, to compile and to link with."""
    wanted = os.environ.get("ENGRAM_SANITIZE")
    return [f"-fsanitize={wanted}", *SANITIZER_FLAGS] if wanted else []


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of PATH, or of an nvidia-cuda-nvcc wheel in this environment."""
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.exists():
            raise SystemExit(f"CUDA_HOME: expected a CUDA toolkit with bin/nvcc, got {home}")
        return nvcc
    if on_path := shutil.which("nvcc"):
        return Path(on_path).resolve()
    site_packages = Path(sysconfig.get_paths()["purelib"])
    return next(iter(sorted(site_packages.glob("nvidia/*/bin/nvcc"))), None)


def cuda_compiler() -> Path | None:
    """The nvcc to build CUDA kernels with, or None where they are left out."""
    choice = os.environ.get("ENGRAM_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"ENGRAM_CUDA: expected auto, 0 or 1, got {choice!r}")
    nvcc = None if choice == "0" else find_nvcc()
    if choice == "1" and nvcc is None:
        raise SystemExit("ENGRAM_CUDA=1: found no nvcc in CUDA_HOME, on PATH or in an nvidia-cuda-nvcc wheel")
    return nvcc


def architecture_flags(nvcc: Path) -> list[str]:
    """One -gencode for each architecture, and one for the PTX that newer ones take."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    wanted = os.environ.get("ENGRAM_CUDA_ARCHS")
    flags = []
    for name in wanted.split(";") if wanted else CUDA_ARCHITECTURES:
        number, ptx = name.removesuffix("+PTX"), name.endswith("+PTX")
        if not re.fullmatch(r"\d{2,3}[af]?", number):
            raise SystemExit(f"ENGRAM_CUDA_ARCHS: expected numbers like 80;90a;120+PTX, got {wanted!r}")
        if not wanted and f"compute_{number.rstrip('a')}\n" not in known:
            continue  # a toolkit older than the architecture
        flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] if ptx else []
    return flags


def cuda_libraries(nvcc: Path) -> Path:
    """The folder of libcudart_static.a. nvcc may be a wrapper or a link elsewhere: it says itself where it lives."""
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    here = re.search(r"_HERE_=(.+)", dry_run)
    toolkit = Path(here[1].strip() if here else nvcc.parent).resolve().parent
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (toolkit / folder / "libcudart_static.a").exists():
            return toolkit / folder
    found = next(iter(toolkit.parent.glob("*/lib/libcudart_static.a")), None)  # of a wheel of its own
    if found is None:
        raise SystemExit(f"expected libcudart_static.a beside {nvcc}; in wheels it is part of nvidia-cuda-runtime")
    return found.parent


def isa_flags() -> dict[str, list[str]]:
    """Instruction sets of the processor that is built for, with their compiler flags."""
    target = sysconfig.get_platform().rpartition("-")[2]  # _PYTHON_HOST_PLATFORM changes it
    machine = platform.machine() if target == "universal2" else target
    machine = {"AMD64": "x86_64", "amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return CPU_BUILD["instruction_sets"].get(machine, {"scalar": []})


def kernel_commands(folder: Path) -> dict[Path, list[str]]:
    """The object of every CPU kernel file and instruction set, in ``folder``, and the command that compiles it."""
    commands = {}
    for isa, flags in isa_flags().items():
        for name in KERNELS:
            source, target = CSRC / "cpu" / f"{name}.cpp", folder / isa / f"{name}.o"
            files = ["-c", str(source), "-o", str(target), f"-I{CSRC}"]
            commands[target] = [
                *compiler_words(),
                *files,
                *CPU_BUILD["flags"],
                f"-DENGRAM_ISA={isa}",
                *flags,
                *sanitizer_flags(),
            ]
    return commands


def cuda_command(nvcc: Path, target: Path) -> list[str]:
    """The command that compiles all CUDA kernels."""
    files = ["-c", str(CSRC / "cuda" / "launch.cu"), "-o", str(target), f"-I{CSRC}"]
    host = host_compiler_flags(compiler_words())
    return [str(nvcc), *files, *host, "--threads", str(build_jobs()), *NVCC_FLAGS, *architecture_flags(nvcc)]


class BuildKernels(BuildExtension):
    """Adds the kernel objects, which need flags of their own, to torch's build of the bindings."""

    def build_extension(self, ext):
        """Compile the kernels, then let torch compile and link the rest."""
        folder, nvcc = Path(self.build_temp), cuda_compiler()
        if nvcc is not None:
            target = folder / "launch.cu.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            ext.extra_objects.append(str(target))
            ext.extra_link_args += [f"-L{cuda_libraries(nvcc)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
            ext.extra_link_args += ["-Wl,--exclude-libs,ALL"]
            self.spawn(cuda_command(nvcc, target))
        commands = kernel_commands(folder)
        for target in commands:
            target.parent.mkdir(parents=True, exist_ok=True)
            ext.extra_objects.append(str(target))
        with ThreadPoolExecutor(build_jobs()) as pool:
            list(pool.map(self.spawn, commands.values()))
        ext.depends += ext.extra_objects  # so that it is linked anew
        super().build_extension(ext)


def bindings() -> CppExtension:
    """The extension but for its kernels."""
    without_cuda = [] if cuda_compiler() else [str(CSRC / "cuda" / "no_cuda.cpp")]
    runtime = [CSRC / "runtime" / f"{name}.cpp" for name in ("stages", "workspace")]
    sources = sorted(map(str, [*CSRC.glob("bindings/*.cpp"), *CSRC.glob("cpu/launch*.cpp"), *runtime]))
    extension = CppExtension(
        "engram_kernels._C",
        [*sources, *without_cuda],
        include_dirs=[str(CSRC)],
        depends=sorted(
            str(path) for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")
        ),  # for sdist and rebuilds
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("Py_LIMITED_API", "0x030A0000")],
        extra_compile_args={
            "cxx": ["-O2", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", *sanitizer_flags()]
        },
        extra_link_args=sanitizer_flags(),
    )
    # what the Stable ABI needs, and nothing that only some builds of torch have
    extension.libraries = ["c10", "torch_cpu"]
    return extension


if __name__ == "__main__":  # as builders run it; the tests import it
    setup(
        ext_modules=[bindings()],
        cmdclass={"build_ext": BuildKernels.with_options(use_ninja=False, no_python_abi_suffix=False)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
