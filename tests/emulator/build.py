"""Builds kernels for the emulator, and calls them with tensors.

    library = load("tests/emulator/self_test.cpp", architecture=800, mode="checked")
    library.call("run_pack", x=Read(x), rows=3, k=784, bits=Write(bits), schedule=1)

The file is host code: it includes kernels of ``csrc/cuda`` and exports functions (``extern "C"``, visible) that call
their launchers. Their parameters are ``int64_t``, ``float`` and pointers.
"""

import ctypes
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
COMPILER = os.environ.get("CXX", "g++")
CACHE = Path(tempfile.gettempdir()) / f"engram_emulator_{os.getuid()}"

ARCHITECTURES = (750, 800, 1000)
# No contraction: every operation of float rounds by itself, as in csrc/cuda.
COMMON_FLAGS = [
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-g", "-ffp-contract=off", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", f"-I{FOLDER}",
]  # fmt: skip
# The checker is told of every access by the calls that these flags make the compiler insert; it defines them itself.
CHECKED_FLAGS = [
    "-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment,bounds-strict,shift,signed-integer-overflow,integer-divide-by-zero",
]  # fmt: skip
KERNEL_FLAGS = {"fast": ["-O2"], "checked": CHECKED_FLAGS, "coverage": ["-O0", "--coverage"]}
EMULATOR_SOURCES = {"fast": ["emulator.cpp"], "checked": ["emulator.cpp", "checker.cpp"], "coverage": ["emulator.cpp"]}
MODES = tuple(KERNEL_FLAGS)

GUARD_BYTES = 1 << 14
GUARD = 0xA5
ALIGNMENT = 256  # of cudaMalloc


class EmulatorError(RuntimeError):
    """What a kernel did wrong, and where."""


# ---- arguments


@dataclass
class Read:
    """A tensor that kernels may read."""

    tensor: torch.Tensor
    permission = 0


@dataclass
class Write(Read):
    """A tensor that kernels may read and write."""

    permission = 1


@dataclass
class Flag(Read):
    """A tensor that threads and blocks may write at the same time, as they do with the same value."""

    permission = 2


class GuardedMemory:
    """Copies of tensors that lie far apart, with guards between, as aligned as the tensors."""

    def __init__(self, arguments: dict[str, Read]):
        self.arguments = arguments
        spans = {name: _span(argument.tensor) for name, argument in arguments.items()}
        room = sum(span.numel() + GUARD_BYTES + 2 * ALIGNMENT for span in spans.values()) + GUARD_BYTES
        self._memory = torch.full((room,), GUARD, dtype=torch.uint8)
        base = self._memory.data_ptr()
        self.spans: dict[str, tuple[int, int]] = {}  # by name: offset, bytes
        end = 0
        for name, span in spans.items():
            offset = end + GUARD_BYTES
            offset += (arguments[name].tensor.data_ptr() - base - offset) % ALIGNMENT
            end = offset + span.numel()
            self._memory[offset:end] = span
            self.spans[name] = offset, span.numel()
        self._before = self._memory.clone()

    def address(self, name: str) -> int:
        return self._memory.data_ptr() + self.spans[name][0]

    def write_back(self) -> None:
        """Copies what kernels wrote to the tensors. Raises EmulatorError if they wrote elsewhere."""
        changed = self._memory != self._before
        for name, (offset, size) in self.spans.items():
            inside = slice(offset, offset + size)
            if self.arguments[name].permission == Read.permission:
                if changed[inside].any():
                    raise EmulatorError(f"{name}: written, though it may only be read")
                continue
            _span(self.arguments[name].tensor).copy_(self._memory[inside])
            changed[inside] = False
        if changed.any():
            stray = int(changed.nonzero()[0])
            distances = {name: stray - offset for name, (offset, _) in self.spans.items()}
            name = min(distances, key=lambda name: abs(distances[name]))
            raise EmulatorError(f"a write outside of every tensor, {distances[name]} bytes from the start of {name}")


def _span(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from a tensor's first element to its last, as bytes."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,)).view(torch.uint8)


# ---- build


def _run(*command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


@functools.cache
def _compiler_version() -> str:
    return _run(COMPILER, "--version")


def _digest(paths: Iterable[Path], *settings) -> str:
    digest = hashlib.sha256(repr((_compiler_version(), settings)).encode())
    for path in sorted(paths):
        digest.update(f"{path}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def _compile(source: Path, target: Path, flags: list[str]) -> None:
    """Compiles to a name of its own first, lest another process sees half a file."""
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}.o")
        _run(COMPILER, "-c", source, "-o", unfinished, *flags, *COMMON_FLAGS)
        unfinished.rename(target)


def _emulator_objects(mode: str) -> list[Path]:
    flags = ["-O2", f"-DENGRAM_CHECKED={int(mode == 'checked')}", f"-DENGRAM_COVERAGE={int(mode == 'coverage')}"]
    digest = _digest([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")], flags, COMMON_FLAGS)
    objects = []
    for name in EMULATOR_SOURCES[mode]:
        objects.append(CACHE / f"{digest}_{name}.o")
        _compile(FOLDER / name, objects[-1], flags)
    return objects


def build(host: str | Path, architecture: int = 800, mode: str = "fast", overlay: Path | None = None) -> Path:
    """The shared library of a host file, from the cache if nothing has changed that it is made of.

    overlay: a folder whose files are included in place of those of the same name in ``csrc``.
    """
    if architecture not in ARCHITECTURES or mode not in MODES:
        raise ValueError(f"expected an architecture of {ARCHITECTURES} and a mode of {MODES}")
    host = Path(host).resolve()
    headers = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh")]
    headers += [path for folder in {FOLDER, host.parent} for path in folder.glob("*") if path.suffix in (".h", ".cuh")]
    flags = [f"-DENGRAM_EMULATED={architecture}", *KERNEL_FLAGS[mode]]
    if overlay is not None:
        headers += [path for path in overlay.rglob("*") if path.is_file()]
        flags.insert(0, f"-I{overlay}")
    digest = _digest({host, *headers, *FOLDER.glob("*.cpp")}, flags, COMMON_FLAGS)
    folder = CACHE / f"{host.stem}_{architecture}_{mode}_{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "kernels.so"
    if not library.exists():
        kernels = folder / "kernels.o"
        _compile(host, kernels, flags)
        if mode == "checked":  # calls of these functions are not instrumented
            renamed = (f"--redefine-sym={name}=checked_{name}" for name in ("memcpy", "memmove", "memset"))
            _run("objcopy", *renamed, kernels)
        unfinished = folder / f"{os.getpid()}.so"
        coverage = ["--coverage"] if mode == "coverage" else []
        _run(COMPILER, "-shared", "-o", unfinished, kernels, *_emulator_objects(mode), *coverage)
        unfinished.rename(library)
    return library


# ---- coverage


@dataclass
class LineCoverage:
    """Numbers of the lines of a file that have code, and of those that ran."""

    executable: set[int] = field(default_factory=set)
    executed: set[int] = field(default_factory=set)

    @property
    def missed(self) -> list[int]:
        return sorted(self.executable - self.executed)

    @property
    def ratio(self) -> float:
        return len(self.executed) / len(self.executable) if self.executable else 1.0


def _line_coverage(folder: Path, sources: Path) -> dict[str, LineCoverage]:
    coverage: dict[str, LineCoverage] = {}
    for data in folder.glob("*.gcda"):
        for file in json.loads(_run("gcov", "--json-format", "--stdout", data))["files"]:
            path = Path(file["file"])
            if sources not in path.parents:
                continue
            of_file = coverage.setdefault(str(path.relative_to(sources)), LineCoverage())
            for line in file["lines"]:  # of every instance of a template
                of_file.executable.add(line["line_number"])
                if line["count"] > 0:
                    of_file.executed.add(line["line_number"])
    return coverage


def merged(*coverages: dict[str, LineCoverage]) -> dict[str, LineCoverage]:
    """What any of several libraries has run, as of several architectures."""
    total: dict[str, LineCoverage] = {}
    for name, part in itertools.chain.from_iterable(coverage.items() for coverage in coverages):
        of_file = total.setdefault(name, LineCoverage())
        of_file.executable |= part.executable
        of_file.executed |= part.executed
    return total


# ---- call


class Library:
    """Functions of a host file, with the kernels that they launch."""

    def __init__(self, path: Path, mode: str):
        self.path, self.mode = path, mode
        for earlier in path.parent.glob("*.gcda"):
            earlier.unlink()
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_error.restype = ctypes.c_char_p
        if mode == "checked":
            for offset, size, name in _shared_arrays(path):
                self._library.emulator_add_shared_array(ctypes.c_size_t(offset), ctypes.c_size_t(size), name.encode())

    def call(self, function: str, /, *, schedule: int = 0, multiprocessors: int = 4, **arguments) -> None:
        """Calls a function with arguments in the order in which they are given; their names are those of errors.

        An argument is ``Read``, ``Write`` or ``Flag`` of a tensor on the CPU, None, an int or a float. schedule 0 is
        the natural order of threads, any other the seed of an order.
        Raises EmulatorError.
        """
        memory = GuardedMemory({name: value for name, value in arguments.items() if isinstance(value, Read)})
        self._library.emulator_clear_error()
        self._library.emulator_clear_regions()
        self._library.emulator_configure(ctypes.c_uint64(schedule), ctypes.c_int(multiprocessors))
        for name, (_, size) in memory.spans.items():
            address, permission = ctypes.c_void_p(memory.address(name)), memory.arguments[name].permission
            self._library.emulator_add_region(address, ctypes.c_size_t(size), name.encode(), ctypes.c_int(permission))
        result = getattr(self._library, function)(*(_as_c(memory, name, value) for name, value in arguments.items()))
        message = self._library.emulator_error().decode()
        if message:
            raise EmulatorError(_with_source(self.path, message))
        memory.write_back()
        if result != 0:
            raise EmulatorError(f"{function} returned {result}")

    def coverage(self, sources: Path = ROOT / "csrc" / "cuda") -> dict[str, LineCoverage]:
        """Coverage of every file in a folder by all calls of a coverage build so far, by name."""
        self._library.emulator_write_coverage()
        return _line_coverage(self.path.parent, sources)


def _as_c(memory: GuardedMemory, name: str, value):
    if isinstance(value, Read):
        return ctypes.c_void_p(memory.address(name))
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


@functools.cache
def load(host: str | Path, architecture: int = 800, mode: str = "fast", overlay: Path | None = None) -> Library:
    return Library(build(host, architecture, mode, overlay), mode)


# ---- names in errors


def _without_parameters(name: str) -> str:
    """``void f<(Kind)1>(int*)`` -> ``f<(Kind)1>``."""
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ")


def _frames(library: Path, offset: int) -> list[tuple[str, str]]:
    """Functions and source lines at an address, the innermost inlined function first."""
    lines = _run("addr2line", "-f", "-C", "-i", "-e", library, hex(offset)).splitlines()
    return [
        (_without_parameters(name), line.split(" (")[0]) for name, line in zip(lines[::2], lines[1::2], strict=True)
    ]


def _with_source(library: Path, message: str) -> str:
    def function(match):
        return _frames(library, int(match[1], 16))[-1][0]

    def line(match):
        # a return address lies behind its call; the emulator's headers are not where the kernel went wrong
        frames = _frames(library, int(match[1], 16) - 1)
        return next((line for _, line in frames if not line.startswith(f"{FOLDER}/emulated_")), frames[0][1])

    message = re.sub(r"<function (0x[0-9a-f]+)>", function, message)
    message = re.sub(r"<line (0x[0-9a-f]+)>", line, message)
    return message.replace(f"{ROOT}/", "")


def _shared_arrays(library: Path) -> list[tuple[int, int, str]]:
    """Offset, bytes and name of every shared array: what is local to a thread, see emulated_cuda.h."""
    arrays = []
    for line in _run("readelf", "--symbols", "--wide", "--demangle", library).splitlines():
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[3] == "TLS":
            name = fields[7].rpartition("::")[2]
            if not name.startswith("engram_guard_"):
                arrays.append((int(fields[1], 16), int(fields[2], 0), name))
    return arrays
