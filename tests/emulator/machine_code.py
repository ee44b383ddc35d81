"""What compilers made of a kernel, without a GPU: registers, memory, machine instructions, and the bound they set.

    ptx = compile_ptx(source, "80", include=[csrc])
    for name, kernel in kernels(assemble(ptx, "80")).items():
        print(kernel.registers, kernel.spilled, kernel.count("BMMA"), occupancy(kernel, "80", threads=256))

Architectures are written as nvcc does, without ``sm_``: "80", "90a". Speed that is told here follows from the
instruction count; it is not measured on a GPU.

Where nvcc comes from: CUDA_HOME, PATH, or pip. The wheel ``nvidia-cuda-nvcc`` (CUDA 13) brings a whole compiler under
``site-packages/nvidia/cu13``, with what it requires: nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime (headers,
libcudart_static.a). It does not pin their version, and parts of different versions do not work together: to have 13.0,
ask for 13.0 of all four. The wheels of CUDA 12, ``nvidia-cuda-nvcc-cu12``, hold ptxas alone and cannot compile C++.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURES = ("75", "80", "86", "89", "90a", "100", "120")
FOLDER = Path(__file__).parent
CACHE = Path(tempfile.gettempdir()) / f"engram_machine_code_{os.getuid()}"
FLAGS = ["-O3", "-std=c++17"]

# --- Tools -----------------------------------------------------------------------------------------------------------


def _wheel_folders() -> list[Path]:
    """Folders of executables that wheels bring: nvidia/cu13, nvidia/cuda_*, and Triton's own."""
    folders = []
    for package in ("nvidia", "triton"):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or [] if spec else []:
            folders += sorted(Path(place).glob("*/bin"), reverse=True) + sorted(Path(place).glob("backends/nvidia/bin"))
    return folders


def find_tool(name: str) -> Path | None:
    """nvcc, ptxas, nvdisasm or cuobjdump: of CUDA_HOME, in PATH, where CUDA is usually installed, or from a wheel."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [Path(home) / "bin" / name for home in homes if home]
    candidates += [Path(found)] if (found := shutil.which(name)) else []
    candidates += [folder / name for folder in (Path("/usr/local/cuda/bin"), *_wheel_folders())]
    return next((path for path in candidates if path.is_file() and os.access(path, os.X_OK)), None)


def find_nvcc() -> Path | None:
    """The CUDA compiler."""
    return find_tool("nvcc")


def missing(*tools: str) -> str:
    """Which of these tools are not there, as a reason to skip; empty if all are."""
    absent = [tool for tool in tools if find_tool(tool) is None]
    return f"no {' and no '.join(absent)} on this machine" if absent else ""


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{(done.stderr or done.stdout)[:4000]}")
    return done.stdout


def _tool(name: str) -> Path:
    path = find_tool(name)
    if path is None:
        raise RuntimeError(missing(name))
    return path


@functools.cache
def _version(tool: Path) -> str:
    return _run(tool, "--version")


def _cached(tool: str, arguments: Sequence[str | Path], inputs: Iterable[Path], suffix: str) -> Path:
    """Runs ``tool ... -o file``, unless it ran before with the same arguments on the same inputs."""
    path = _tool(tool)
    digest = hashlib.sha256(f"{path} {_version(path)} {arguments}".encode())
    for file in inputs:
        digest.update(file.read_bytes())
    output = CACHE / f"{digest.hexdigest()[:24]}{suffix}"
    if not output.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # another process may be at the same
            partial = Path(folder) / f"partial{suffix}"
            _run(path, *arguments, "-o", partial)
            partial.replace(output)
    return output


def compile_ptx(source: Path, architecture: str, include: Sequence[Path] = (), flags: Sequence[str] = ()) -> Path:
    """A .cu file as PTX. Compiled anew when it, or a header below the folders of ``include``, has changed."""
    headers = sorted(path for folder in include for path in folder.rglob("*") if path.suffix in (".h", ".cuh"))
    arguments = [
        "-ptx",
        f"-arch=compute_{architecture}",
        *FLAGS,
        *flags,
        *(f"-I{folder}" for folder in include),
        source,
    ]
    return _cached("nvcc", arguments, [source, *headers], ".ptx")


def assemble(ptx: Path, architecture: str) -> Path:
    """PTX as a cubin, as nvcc would have it assembled."""
    return _cached("ptxas", [f"-arch=sm_{architecture}", ptx], [ptx], ".cubin")


# --- Kernels of a cubin ----------------------------------------------------------------------------------------------


@dataclass
class Instruction:
    """One machine instruction."""

    address: int
    opcode: str  # with its modifiers: LDG.E.128
    text: str
    target: int | None = None  # of a branch

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass
class Kernel:
    """A kernel of a cubin: what it takes, and its machine instructions."""

    name: str
    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes a block, static, without what the system reserves
    most_threads: int | None  # of a block: __launch_bounds__
    instructions: list[Instruction] = field(default_factory=list)

    def count(self, prefix: str) -> int:
        """Instructions whose opcode begins with ``prefix``, such as BMMA or LDG.E.128."""
        return sum(instruction.opcode.startswith(prefix) for instruction in self.instructions)

    @property
    def opcodes(self) -> Counter[str]:
        return Counter(instruction.opcode for instruction in self.instructions)

    @property
    def spilled(self) -> int:
        """Bytes a thread that go through local memory: spilled registers, or an array that is indexed at run time."""
        return sum(_width(i.opcode) for i in self.instructions if i.name in ("LDL", "STL"))

    def loops(self) -> list[tuple[int, int]]:
        """First and last address of every backward branch's span; the endless branch behind the code is not one."""
        spans = [(i.target, i.address) for i in self.instructions if i.target is not None and i.target < i.address]
        return sorted(set(spans))

    def inside(self, loop: tuple[int, int]) -> list[Instruction]:
        return [i for i in self.instructions if loop[0] <= i.address <= loop[1]]

    def hot_loop(self) -> list[Instruction]:
        """The loop that does the work: the smallest that holds at least half of the tensor core instructions that any
        loop holds; likewise of POPC where there are none, and of all instructions where there are none either.

        Loops inside it, such as one that copies, are counted as if they ran once.
        """
        bodies = [self.inside(loop) for loop in self.loops()]
        for names in (TENSOR, ("POPC",), tuple({i.name for i in self.instructions})):
            counts = [sum(i.name in names for i in body) for body in bodies]
            if any(counts):
                return min((b for b, n in zip(bodies, counts, strict=True) if 2 * n >= max(counts)), key=len)
        return []


TENSOR = ("BMMA", "IMMA", "HMMA", "BGMMA", "IGMMA", "HGMMA", "QMMA", "OMMA")

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P[\dT]+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_SECTION = re.compile(r"^\.text\.(\S+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def _width(opcode: str) -> int:
    """Bytes that a thread moves by a memory instruction."""
    for word, width in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1), ("16", 2)):
        if word in opcode.split(".")[1:]:
            return width
    return 4


def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    """Machine instructions of every function, padding left out."""
    text = _run(_tool("nvdisasm"), "-c", cubin)
    functions: dict[str, list[Instruction]] = {}
    labels: dict[str, int] = {}
    jumps: list[tuple[Instruction, str]] = []
    current: list[Instruction] = []
    pending: list[str] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            if match[2] == "NOP":
                continue
            instruction = Instruction(address, match[2], f"{match[2]}{match[3]}".strip())
            current.append(instruction)
            if instruction.name == "BRA" and (target := _TARGET.search(match[3])):
                jumps.append((instruction, target[1]))
        elif match := _SECTION.match(line):
            current = functions.setdefault(match[1], [])
        elif match := _LABEL.match(line):
            pending.append(match[1])
    for instruction, label in jumps:
        instruction.target = labels.get(label)
    return functions


def kernels(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a cubin by their (mangled) names."""
    code = disassemble(cubin)
    found = _resources(cubin.read_bytes())
    for name, kernel in found.items():
        kernel.instructions = code[name]
    return found


RESERVED_SHARED = 1024
# Attributes of .nv.info sections, the numbers that cuobjdump -elf prints as EIATTR_...
_MAX_THREADS, _FRAME_SIZE, _REGISTERS = 0x05, 0x11, 0x2F
_WITH_BYTES = 0x04  # format of an attribute whose value follows; of others it is in the header


def _resources(elf: bytes) -> dict[str, Kernel]:
    """What the ELF file tells of each kernel; a tool that prints it would be one more to find."""
    section_table, section_size, section_count, names_index = struct.unpack_from("<Q10xHHH", elf, 40)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, section_table + i * section_size) for i in range(section_count)]

    def text(table: bytes, at: int) -> str:
        return table[at : table.index(0, at)].decode()

    def content(header: tuple[int, ...]) -> bytes:
        return elf[header[4] : header[4] + header[5]]

    section_names = content(headers[names_index])
    sections = {text(section_names, header[0]): header for header in headers}
    symbols = content(sections[".symtab"])
    symbol_names = content(sections[".strtab"])
    names = [text(symbol_names, struct.unpack_from("<I", symbols, at)[0]) for at in range(0, len(symbols), 24)]

    registers: dict[str, int] = {}
    frames: dict[str, int] = {}
    for attribute, value in _attributes(content(sections[".nv.info"])):
        if attribute in (_REGISTERS, _FRAME_SIZE):
            symbol, number = struct.unpack("<II", value)
            (registers if attribute == _REGISTERS else frames)[names[symbol]] = number
    # From sm_90 on the section of a kernel's shared memory includes the KiB that the system takes from every block.
    reserved = RESERVED_SHARED if ".nv.shared.reserved.0" in sections else 0
    found = {}
    for section in sections:
        if not section.startswith(".nv.constant0."):  # a kernel has its arguments there
            continue
        name = section.removeprefix(".nv.constant0.")
        shared = sections.get(f".nv.shared.{name}")
        threads = [
            struct.unpack_from("<III", value)
            for attribute, value in _attributes(content(sections[f".nv.info.{name}"]))
            if attribute == _MAX_THREADS
        ]
        most = threads[0][0] * threads[0][1] * threads[0][2] if threads else None
        own = shared[5] - reserved if shared else 0
        found[name] = Kernel(name, registers[name], frames.get(name, 0), own, most)
    return found


def _attributes(section: bytes) -> Iterable[tuple[int, bytes]]:
    at = 0
    while at < len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == _WITH_BYTES:
            yield attribute, section[at : at + size]
            at += size


# --- Occupancy -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a multiprocessor: CUDA C++ Programming Guide, technical specifications per compute capability."""

    warps: int
    blocks: int
    shared: int  # bytes, of which every block takes reserved ones for itself
    reserved: int


REGISTERS, REGISTER_UNIT, SHARED_UNIT = 65536, 256, 128  # registers are given to a warp by 256, shared memory by 128
MULTIPROCESSORS = {
    "75": Multiprocessor(32, 16, 64 << 10, 0),
    "80": Multiprocessor(64, 32, 164 << 10, RESERVED_SHARED),
    "86": Multiprocessor(48, 16, 100 << 10, RESERVED_SHARED),
    "89": Multiprocessor(48, 24, 100 << 10, RESERVED_SHARED),
    "90a": Multiprocessor(64, 32, 228 << 10, RESERVED_SHARED),
    "100": Multiprocessor(64, 32, 228 << 10, RESERVED_SHARED),
    "120": Multiprocessor(48, 24, 100 << 10, RESERVED_SHARED),
}


def blocks_at_once(kernel: Kernel, architecture: str, threads: int, dynamic_shared: int = 0) -> int:
    """Blocks of a kernel that fit on a multiprocessor."""
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // 32)
    # Registers live in four parts, one per scheduler: warps fit part by part.
    of_warp = -(-kernel.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // 4 // of_warp * 4 // warps
    shared = kernel.shared + dynamic_shared
    of_block = -(-(shared + limits.reserved) // SHARED_UNIT) * SHARED_UNIT
    by_shared = limits.shared // of_block if of_block else limits.blocks
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)


def occupancy(kernel: Kernel, architecture: str, threads: int, dynamic_shared: int = 0) -> float:
    """Share of a multiprocessor's warps that can be resident."""
    blocks = blocks_at_once(kernel, architecture, threads, dynamic_shared)
    return blocks * -(-threads // 32) / MULTIPROCESSORS[architecture].warps


# --- Bound -----------------------------------------------------------------------------------------------------------

# Results per clock and multiprocessor: CUDA C++ Programming Guide, "Arithmetic Instructions", table "Throughput of
# Native Arithmetic Instructions": population count 16, 32-bit integer add, compare, logic, shift and multiply 64, warp
# shuffle 32, float functions and most conversions 16, float add and multiply as below. Where compute capability 10.0
# and 12.0 are not in an edition of that table, those of 9.0 stand for them.
_UNITS = {
    "popc": ("POPC", "FLO", "BREV"),
    "shuffle": ("SHFL",),
    "function": ("MUFU", "I2F", "F2I", "I2FP", "F2F"),
    "float": ("FFMA", "FADD", "FMUL"),
    "multiply": ("IMAD", "IMUL", "IDP"),
    "integer": (
        "LOP3", "IADD3", "IADD", "SHF", "ISETP", "SEL", "PRMT", "LEA", "VIADD", "IMNMX", "VIMNMX", "IABS", "PLOP3",
        "FSETP", "FSEL", "FMNMX", "BMSK", "SGXT", "LOP", "SHL", "SHR", "FSET", "P2R", "R2P",
    ),
}  # fmt: skip
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names}
_RATES = {"popc": 16, "shuffle": 32, "function": 16, "multiply": 64, "integer": 64}
_FLOAT_RATE = {"75": 64, "80": 64, "86": 128, "89": 128, "90a": 128, "100": 128, "120": 128}

# Dense multiply-adds per clock and multiprocessor by mma.sync, from NVIDIA's architecture white papers (Turing TU102,
# A100, GA102, Ada AD102, H100); none where a paper gives no number. The H100's are of wgmma: mma.sync reaches less.
_TENSOR_RATES = {
    "75": {"IMMA": 1024},
    "80": {"BMMA": 16384, "IMMA": 2048, "HMMA": 1024},
    "86": {"IMMA": 1024, "HMMA": 512},
    "89": {"IMMA": 1024, "HMMA": 512},
    "90a": {"IMMA": 4096, "HMMA": 2048},
    "100": {},
    "120": {},
}
_SHAPES = {"88128": 8 * 8 * 128, "168256": 16 * 8 * 256, "16832": 16 * 8 * 32, "16816": 16 * 8 * 16,
           "8816": 8 * 8 * 16, "1688": 16 * 8 * 8}  # fmt: skip
_SHARED_BYTES = 128  # per clock: 32 banks of 4 bytes
_SCHEDULERS = 4  # of a multiprocessor, each issues one instruction per clock for a warp


def multiply_adds(instruction: Instruction) -> int:
    """Of a tensor core instruction of one warp."""
    if instruction.name not in TENSOR:
        return 0
    return next(_SHAPES[word] for word in instruction.opcode.split(".") if word in _SHAPES)


def clocks(body: Iterable[Instruction], architecture: str) -> dict[str, float]:
    """Clocks of a multiprocessor that each unit needs for one warp to run ``body`` once. The largest is a bound.

    From the instruction count, not measured on a GPU. Memory, latency and dependences are left out.
    """
    rates = {**_RATES, "float": _FLOAT_RATE[architecture]}
    needed: Counter[str] = Counter()
    total = 0
    for instruction in body:
        total += 1
        name = instruction.name
        if name in TENSOR:
            rate = _TENSOR_RATES[architecture].get(name)
            if rate is not None:
                needed["tensor"] += multiply_adds(instruction) / rate
        elif name == "LDSM":
            needed["shared"] += 32 * 4 * int(instruction.opcode[-1]) / _SHARED_BYTES
        elif name in ("LDS", "STS", "LDGSTS"):
            needed["shared"] += 32 * _width(instruction.opcode) / _SHARED_BYTES
        elif name in _UNIT_OF:
            needed[_UNIT_OF[name]] += 32 / rates[_UNIT_OF[name]]
    return {"issue": total / _SCHEDULERS, **needed}


def summary(kernel: Kernel, architecture: str, label: str = "") -> str:
    """One line about a kernel, and a second about its hot loop."""
    threads = kernel.most_threads or 1024
    hot = kernel.hot_loop()
    mix = Counter(i.name for i in hot).most_common(6)
    lines = [
        f"sm_{architecture:<4}{label or kernel.name}: {kernel.registers} registers, {kernel.stack} B stack, "
        f"{kernel.spilled} B spilled, {kernel.shared} B shared, {threads} threads, "
        f"occupancy {occupancy(kernel, architecture, threads):.0%}, {len(kernel.instructions)} instructions"
    ]
    if hot:
        needed = clocks(hot, architecture)
        unit = max(needed, key=lambda name: needed[name])
        bound = f"bound by {unit}: {needed[unit]:.0f} clocks a warp"
        if products := sum(map(multiply_adds, hot)):
            bound += f", {products / needed[unit]:.0f} multiply-adds a clock and multiprocessor"
        counts = ", ".join(f"{count} {name}" for name, count in mix)
        lines.append(f"         loop of {len(hot)}: {counts}; {bound} (from the instruction count, not measured)")
    return "\n".join(lines)
