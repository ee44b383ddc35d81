"""Runs PTX on the CPU: what nvcc and Triton really emit for a kernel, inline assembly included.

    module = ptx.Module(text)
    memory = ptx.Memory()
    module.launch("kernel", grid=(2, 1, 1), block=(128, 1, 1), memory=memory,
                  arguments=[memory.add(x, "x", read_only=True), memory.add(y, "y"), 1000])

Every thread of a batch of blocks is a lane, and every register a numpy array over lanes. Lanes at the same instruction
form a group; the group at the lowest instruction runs, which brings the sides of a branch together again where they
meet. An interleaving of blocks that a GPU may choose too.

Checked at every access: that it lies within one registered buffer, aligned, not a store to a read-only one; in shared
memory also that what is read has been written, and that no copy (cp.async) is in flight there. Checked at every
barrier: that all threads of the block that have not exited reach the same one. At warp collectives: that the lanes of
the member mask, or the whole warp at ``.aligned`` instructions, are there together. A thread that never gets further, a
source lane of a shuffle that does not take part, a division of integers by zero, a PTX instruction that is not known:
:class:`PtxError` with the instruction and its line.

Not modelled: races between threads (tests/emulator's C++ side finds them), weak memory order, the few last bits of
approximate functions, the order of a tensor core's additions, clusters, TMA, wgmma and textures.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .ptx_numbers import TYPES, Array, Type

WARP = 32
Lanes = slice | NDArray[np.int64]  # slice(None): every lane of the batch, which numpy reads without a copy
EVERYONE = slice(None)

# An address is a window, from bit 40 on, and an offset: no buffer reaches into the next. The windows of shared, local
# and parameter memory exist for generic addresses; in instructions that name the space, an address is the offset alone.
WINDOW_SHIFT = 40
SYMBOL_WINDOW, SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 0x8000, 0xC000, 0xD000, 0xE000
UNWRITTEN, WRITTEN, IN_FLIGHT = 0, 1, 2  # states of a byte of shared memory
JUNK = 0xCD  # registers and memory before the first write

LANES_PER_BATCH = 1 << 14


class PtxError(RuntimeError):
    """The kernel did what no kernel may, or something that this interpreter does not know."""


# --- Source -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Symbol:
    """What a name stands for. ``value``: a global's address, or a label's instruction counted from its function's."""

    kind: str  # register, shared, dynamic, local, param, global, label, table
    value: int = 0
    type: Type | None = None
    size: int = 0
    align: int = 1
    targets: list[str] = field(default_factory=list)


class Scope:
    """Names of a function or of a block in braces; inline assembly declares its own registers and labels."""

    def __init__(self, parent: Scope | None = None):
        self.parent, self.names = parent, dict[str, Symbol]()

    def find(self, name: str) -> Symbol | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None


@dataclass
class Instruction:
    """One statement, split but not decoded."""

    opcode: str
    operands: list[str]
    guard: str | None  # name of the predicate register, with ! in front where negated
    scope: Scope
    line: int
    text: str

    @cached_property
    def words(self) -> list[str]:
        """The opcode and its modifiers. ``L1::no_allocate`` is one word."""
        return re.sub(r"\b(shared|param)::\w+", r"\1", self.opcode).split(".")

    @cached_property
    def types(self) -> list[Type]:
        return [TYPES[word] for word in self.words[1:] if word in TYPES]


@dataclass
class Variable:
    """A .global or .const array of a module, with its initial bytes."""

    name: str
    data: NDArray[np.uint8]
    read_only: bool


@dataclass
class Function:
    """An .entry or .func: where its body is, its statements once that was read, its parameters."""

    name: str
    entry: bool
    body: int
    scope: Scope
    most_threads: int | None
    parameters: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)


class Reader:
    """Cuts PTX text into statements. Offsets stay those of the text, so that errors can name a line."""

    _SPACE = re.compile(r"\s*")
    _LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
    _STATEMENT = re.compile(r"(?:@(!?\s*[%\w$]+)\s+)?([a-z]\w*(?:(?:\.|::)\w+)*)\s*(.*)", re.S)
    _VARIABLE = re.compile(r"(?:\.align\s+(\d+)\s+)?(?:\.v([24])\s+)?\.(\w+)\s+(.*)", re.S)

    def __init__(self, text: str):
        def blank(match: re.Match[str]) -> str:
            return re.sub(r"[^\n]", " ", match[0])

        text = re.sub(r"/\*.*?\*/", blank, text, flags=re.S)
        text = re.sub(r"//[^\n]*", blank, text)
        self.text = re.sub(r"^[ \t]*\.(loc|file|version|target|address_size)\b[^\n]*", blank, text, flags=re.M)
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.at = 0

    def line(self, at: int) -> int:
        return bisect_left(self.newlines, at) + 1

    def skip_space(self) -> bool:
        """Moves to the next character that is not space; false at the end."""
        match = self._SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.at < len(self.text)

    def until(self, stops: str) -> tuple[str, str]:
        """The text up to one of ``stops``, and the stop, which is passed."""
        start, match = self.at, re.compile(f"[{stops}]").search(self.text, self.at)
        if match is None:
            raise PtxError(f"line {self.line(start)}: statement without an end")
        self.at = match.end()
        return self.text[start : match.start()], match[0]

    def skip_body(self) -> None:
        """Moves behind the closing brace, whose opening one has been passed."""
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}[self.until("{}")[1]]

    def body(self, scope: Scope, declare: Callable[[str, Scope], None]) -> list[Instruction]:
        """Instructions up to the closing brace, whose opening one has been passed."""
        instructions: list[Instruction] = []
        outer = scope
        while self.skip_space():
            at = self.at
            label = self._LABEL.match(self.text, at)
            if self.text[at] == "{":
                self.at, scope = at + 1, Scope(scope)
            elif self.text[at] == "}":
                self.at = at + 1
                if scope is outer:
                    return instructions
                assert scope.parent is not None
                scope = scope.parent
            elif label:
                self.at = label.end()
                self.skip_space()
                if self.text.startswith(".branchtargets", self.at):
                    targets = self.until(";")[0].removeprefix(".branchtargets")
                    scope.names[label[1]] = Symbol("table", targets=[name.strip() for name in targets.split(",")])
                else:
                    scope.names[label[1]] = Symbol("label", len(instructions))
            else:
                statement = self.until(";")[0].strip()
                if statement.startswith("."):
                    declare(statement, scope)
                elif statement:
                    instructions.append(self._instruction(statement, scope, self.line(at)))
        raise PtxError("function without an end")

    def _instruction(self, statement: str, scope: Scope, line: int) -> Instruction:
        match = self._STATEMENT.fullmatch(statement)
        if match is None:
            raise PtxError(f"line {line}: not an instruction: {statement!r}")
        guard, opcode, rest = match.groups()
        text = " ".join(statement.split())
        return Instruction(opcode, split(rest), guard and guard.replace(" ", ""), scope, line, text)

    @classmethod
    def variable(cls, declaration: str) -> tuple[str, Type, int, int, str]:
        """``.align 8 .b8 name[88] = ...`` -> name, type, size in bytes (0 for ``[]``), alignment, initialiser."""
        match = cls._VARIABLE.fullmatch(declaration.strip())
        if match is None or match[3] not in TYPES:
            raise PtxError(f"not a variable: {declaration!r}")
        align, vector, type_, rest = match.groups()
        left, _, initial = rest.partition("=")
        name, *extents = re.findall(r"[\w$%]+|\[\s*\]", left)
        size = TYPES[type_].bytes * int(vector or 1)
        for extent in extents:
            size *= 0 if extent.startswith("[") else int(extent, 0)
        return name, TYPES[type_], size, int(align or TYPES[type_].bytes), initial.strip()


def split(operands: str) -> list[str]:
    """Operands at commas outside brackets."""
    parts, depth, part = [], 0, ""
    for c in operands:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += c
    return [*parts, part.strip()] if part.strip() else parts


# --- Module -----------------------------------------------------------------------------------------------------------


class Module:
    """A PTX file."""

    def __init__(self, text: str):
        self.functions: dict[str, Function] = {}
        self.variables: list[Variable] = []
        self.scope = Scope()
        self._relocations: list[tuple[Variable, str]] = []
        self._programs: dict[str, Program] = {}
        self._reader = reader = Reader(text)
        while reader.skip_space():
            header, stop = reader.until("{;=")
            if stop == "=":
                header += "=" + reader.until(";")[0]
            words = header.split()
            if ".entry" in words or ".func" in words or re.search(r"\.func\b", header):
                if stop == "{":
                    self._function(header, reader.at)
                    reader.skip_body()
            elif words[0] == ".section":
                reader.skip_body()
            elif words[0] not in (".alias", ".pragma"):
                self._variable(header)
        for variable, initial in self._relocations:
            self._initialise(variable, initial)

    @property
    def entries(self) -> list[str]:
        return [name for name, function in self.functions.items() if function.entry]

    def entry(self, fragment: str) -> str:
        """The one kernel whose (mangled) name contains ``fragment``."""
        found = [name for name in self.entries if fragment in name]
        if len(found) != 1:
            raise PtxError(f"{len(found)} of the kernels {self.entries} have {fragment!r} in their name, expected one")
        return found[0]

    def _variable(self, header: str) -> None:
        declaration = re.sub(r"^\s*(\.(extern|visible|weak|common)\s+)*", "", header)
        space, _, rest = declaration.partition(" ")
        name, type_, size, align, initial = Reader.variable(re.sub(r"\.attribute\([^)]*\)", "", rest))
        if space == ".shared":
            self.scope.names[name] = Symbol("shared" if size else "dynamic", size=size, align=align)
        elif space in (".global", ".const"):
            variable = Variable(name, np.zeros(size, np.uint8), space == ".const")
            address = SYMBOL_WINDOW + len(self.variables) << WINDOW_SHIFT
            self.scope.names[name] = Symbol("global", address, type=type_)
            self.variables.append(variable)
            if initial:
                self._relocations.append((variable, initial))
        else:
            raise PtxError(f"unknown declaration: {' '.join(header.split())}")

    def _initialise(self, variable: Variable, initial: str) -> None:
        type_ = self.scope.names[variable.name].type
        assert type_ is not None
        values = np.zeros(len(variable.data) // type_.bytes, type_.storage)
        items = [item.strip() for item in initial.replace("{", " ").replace("}", " ").split(",")]
        for i, item in enumerate(items):
            symbol = self.scope.find(re.sub(r"generic\(([\w$]+)\)", r"\1", item))
            values[i] = symbol.value if symbol else immediate(item, type_)
        variable.data[:] = values.view(np.uint8)

    def function(self, name: str) -> Function:
        """A function with its instructions. A module of templates has many, of which a test runs few."""
        function = self.functions[name]
        if not function.instructions:
            self._reader.at = function.body
            function.instructions = self._reader.body(function.scope, self._declare)
        return function

    def _function(self, header: str, body: int) -> None:
        header = " ".join(header.split())
        match = re.search(r"\.(entry|func)\s*(?:\.\w+\s+)*(\([^)]*\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?(.*)", header)
        if match is None:
            raise PtxError(f"not a function: {header}")
        kind, results, name, parameters, directives = match.groups()
        scope = Scope(self.scope)
        threads = re.search(r"\.(?:req|max)ntid\s+([\d, ]+)", directives)
        most_threads = int(np.prod([int(n) for n in threads[1].split(",")])) if threads else None
        function = Function(name, kind == "entry", body, scope, most_threads)
        for declared, names in ((results, function.results), (parameters, function.parameters)):
            for declaration in split((declared or "").strip().strip("()")):
                text = re.sub(r"\.ptr\b(\s*\.(global|shared|const|local))?\s*(\.align\s+\d+)?", "", declaration)
                param, _, size, align, _ = Reader.variable(text.strip().removeprefix(".param").replace(".noalias", ""))
                scope.names[param] = Symbol("param" if function.entry else "local", size=size, align=align)
                names.append(param)
        self.functions[name] = function

    @staticmethod
    def _declare(statement: str, scope: Scope) -> None:
        space, _, rest = " ".join(statement.split()).partition(" ")
        if space == ".reg":
            type_name, _, names = rest.strip().lstrip(".").partition(" ")
            if type_name not in TYPES:
                raise PtxError(f"register of unknown type: {statement}")
            for name in names.split(","):
                match = re.fullmatch(r"([\w$%]+)(?:<(\d+)>)?", name.strip())
                if match is None:
                    raise PtxError(f"not a register: {statement}")
                every = [match[1]] if match[2] is None else [f"{match[1]}{i}" for i in range(int(match[2]))]
                for each in every:
                    scope.names[each] = Symbol("register", type=TYPES[type_name])
        elif space in (".shared", ".local", ".param"):
            name, _, size, align, _ = Reader.variable(rest)
            scope.names[name] = Symbol("shared" if space == ".shared" else "local", size=size, align=align)
        elif space not in (".pragma", ".callprototype"):
            raise PtxError(f"unknown declaration: {statement}")

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        memory: Memory,
        arguments: Sequence[int | float | bytes],
        dynamic_shared: int = 0,
    ) -> Counter[str]:
        """Runs a kernel to its end. ``arguments``: bytes stand for a struct. Returns instructions counted by opcode."""
        if name not in self._programs:
            self._programs[name] = Program(self, name)
        program = self._programs[name]
        params = program.pack(arguments)
        sizes = [tuple(int(n) for n in size) + (1,) * (3 - len(size)) for size in (grid, block)]
        grid_size, block_size = sizes
        threads = int(np.prod(block_size))
        most = self.functions[name].most_threads or 1024
        if threads > most:
            raise PtxError(f"{name}: launched with {threads} threads a block, its bound is {most}")
        blocks = int(np.prod(grid_size))
        per_batch = max(1, LANES_PER_BATCH // (-(-threads // WARP) * WARP))
        counts: Counter[str] = Counter()
        for first in range(0, blocks, per_batch):
            numbers = np.arange(first, min(first + per_batch, blocks))
            counts += Run(program, memory, params, grid_size, block_size, numbers, dynamic_shared).run()
        return counts


def immediate(text: str, type_: Type) -> np.generic:
    """A literal as a raw value of a type's storage."""
    text = text.strip()
    if type_.kind == "p":
        return np.bool_(int(text, 0) != 0)
    hexadecimal = re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text)
    if hexadecimal and len(hexadecimal[2]) == (8 if hexadecimal[1] in "fF" else 16):
        value = int(hexadecimal[2], 16)
        if type_.bits == 64 and hexadecimal[1] in "fF":
            value = int(np.uint32(value).view(np.float32).astype(np.float64).view(np.uint64))
        elif type_.bits == 32 and hexadecimal[1] in "dD":
            value = int(np.uint64(value).view(np.float64).astype(np.float32).view(np.uint32))
    elif type_.kind == "f" and re.search(r"[.eE]", text) and not text.lower().startswith("0x"):
        value = int(np.float64(text).astype(type_.dtype).view(type_.storage))
    elif text == "WARP_SZ":
        value = WARP
    else:
        digits = text.rstrip("U")
        octal = re.fullmatch(r"(-?)0([0-7]+)", digits)
        value = int(octal[1] + octal[2], 8) if octal else int(digits, 0)
    return type_.storage.type(value & ((1 << type_.bits) - 1))


# --- Memory -----------------------------------------------------------------------------------------------------------


class Buffer:
    """Bytes, and the same bytes as wider words."""

    def __init__(self, data: NDArray[np.uint8], name: str, read_only: bool = False):
        self.data, self.name, self.read_only = data, name, read_only
        self._words: dict[int, Array] = {}

    def words(self, size: int) -> Array:
        """The bytes as words of ``size`` bytes; the rest of a division is left out."""
        if size not in self._words:
            whole = len(self.data) // size * size
            self._words[size] = self.data[:whole].view(f"u{size}")
        return self._words[size]


class Memory:
    """Global memory: numpy arrays under made-up addresses, so far apart that every stray pointer is caught."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def add(self, array: np.ndarray, name: str, read_only: bool = False) -> int:
        """Registers a contiguous array, which kernels read and write in place. Returns its address."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: expected a contiguous array")
        self.buffers.append(Buffer(array.reshape(-1).view(np.uint8), name, read_only))
        return len(self.buffers) << WINDOW_SHIFT


# --- Program: decoded kernel ------------------------------------------------------------------------------------------


Execute = Callable[["Run", Lanes], "list[tuple[int, Lanes]] | None"]


@dataclass
class Step:
    """A decoded instruction. ``execute`` returns None, or where the lanes go; ``finish`` runs after a barrier."""

    execute: Execute
    guard: Callable[[Run, Lanes], NDArray[np.bool_]] | None
    source: Instruction
    finish: Callable[[Run, Lanes], None] | None = None


class Program:
    """A kernel and the functions that it calls, decoded: steps, and the layout of registers and memories."""

    def __init__(self, module: Module, name: str):
        from . import ptx_instructions  # which needs this module

        self.module, self.name = module, name
        functions = self._reachable(module.function(name))
        self.functions = {function.name: function for function in functions}
        self.registers: list[Type] = []
        self.starts: dict[str, int] = {}
        self.place: dict[Symbol, int] = {}  # a register's number, a label's step, a variable's offset in its space
        self.sizes = {"shared": 0, "local": 0, "param": 0}
        start = 0
        for function in functions:
            self.starts[function.name] = start
            for scope in dict.fromkeys([function.scope, *(i.scope for i in function.instructions)]):
                while scope is not module.scope:
                    for symbol in scope.names.values():
                        self._place(symbol, start)
                    assert scope.parent is not None
                    scope = scope.parent
            start += len(function.instructions)
        self._place_module_shared(functions)
        self.call_results: dict[int, list[Symbol]] = {}  # by the step of a call: where its results go
        self.steps: list[Step] = []
        for function in functions:
            self.function = function
            for instruction in function.instructions:
                try:
                    self.steps.append(ptx_instructions.decode(self, instruction, len(self.steps)))
                except PtxError as error:
                    raise PtxError(f"{error}\n  line {instruction.line}: {instruction.text}") from None

    def _reachable(self, entry: Function) -> list[Function]:
        """Called functions first: their lanes run ahead and come back together at the return."""
        found: list[Function] = []
        started: set[str] = set()

        def visit(function: Function) -> None:
            started.add(function.name)
            for instruction in function.instructions:
                if instruction.words[0] == "call":
                    for name in instruction.operands:
                        if name in self.module.functions and name not in started:
                            visit(self.module.function(name))
            found.append(function)

        visit(entry)
        return found

    def _place(self, symbol: Symbol, start: int) -> None:
        """Gives a register its number, a variable its offset, a label its step; once."""
        if symbol in self.place:
            return
        if symbol.kind == "register":
            assert symbol.type is not None
            self.place[symbol] = len(self.registers)
            self.registers.append(symbol.type)
        elif symbol.kind == "label":
            self.place[symbol] = start + symbol.value
        elif symbol.kind in self.sizes:
            self.place[symbol] = -(-self.sizes[symbol.kind] // symbol.align) * symbol.align
            self.sizes[symbol.kind] = self.place[symbol] + symbol.size

    def _place_module_shared(self, functions: list[Function]) -> None:
        """Shared variables of the module take room in this kernel only if it names them; the dynamic one comes last."""
        named = {
            name
            for function in functions
            for instruction in function.instructions
            for operand in instruction.operands
            for name in re.findall(r"[\w$]+", operand)
        }
        symbols = [symbol for name, symbol in self.module.scope.names.items() if name in named]
        for symbol in symbols:
            if symbol.kind == "shared":
                self._place(symbol, 0)
        dynamic = [symbol for symbol in symbols if symbol.kind == "dynamic"]
        align = max([symbol.align for symbol in dynamic], default=1)
        self.dynamic_start = -(-self.sizes["shared"] // align) * align
        self.place.update(dict.fromkeys(dynamic, self.dynamic_start))

    def pack(self, arguments: Sequence[int | float | bytes]) -> NDArray[np.uint8]:
        """Arguments as bytes of parameter memory."""
        function = self.functions[self.name]
        if len(arguments) != len(function.parameters):
            raise PtxError(f"{self.name}: {len(function.parameters)} parameters, got {len(arguments)} arguments")
        packed = np.zeros(self.sizes["param"], np.uint8)
        for name, value in zip(function.parameters, arguments, strict=True):
            symbol = function.scope.names[name]
            if isinstance(value, float):
                raw = np.array(value, f"f{symbol.size}").tobytes()
            elif isinstance(value, bytes):
                raw = value
            else:
                raw = (int(value) & (1 << 8 * symbol.size) - 1).to_bytes(symbol.size, "little")
            if len(raw) != symbol.size:
                raise PtxError(f"{self.name}: parameter {name} has {symbol.size} bytes, got {len(raw)}")
            packed[self.place[symbol] :][: symbol.size] = np.frombuffer(raw, np.uint8)
        return packed


# --- Run: some blocks of a launch -------------------------------------------------------------------------------------


@dataclass
class Copy:
    """A cp.async in flight: for each lane the group it belongs to, its destination and the bytes to write."""

    lanes: NDArray[np.int64]
    group: NDArray[np.int64]
    target: NDArray[np.int64]  # byte in the buffer of shared memory
    data: NDArray[np.uint8]  # [lanes, bytes]


class Run:
    """The state of a batch of blocks."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        params: NDArray[np.uint8],
        grid: tuple[int, ...],
        block: tuple[int, ...],
        blocks: NDArray[np.int64],
        dynamic_shared: int,
    ):
        self.program, self.memory, self.grid, self.block_size = program, memory, grid, block
        self.threads = int(np.prod(block))
        self.stride = -(-self.threads // WARP) * WARP  # a block's lanes: whole warps
        self.lanes = len(blocks) * self.stride
        self.numbers = np.arange(self.lanes)
        self.block_of = np.repeat(np.arange(len(blocks)), self.stride)
        self.block_numbers = blocks
        thread = np.tile(np.arange(self.stride), len(blocks))
        self.exited = thread >= self.threads
        self.registers = [
            np.frombuffer(bytes([JUNK]) * self.lanes * t.storage.itemsize, np.uint8).copy().view(t.storage)
            if t.kind != "p"
            else np.ones(self.lanes, bool)
            for t in program.registers
        ]
        self.special = self._special(thread, blocks)
        self.params = Buffer(params, "parameters", read_only=True)
        self.shared_bytes = program.dynamic_start + dynamic_shared if dynamic_shared else program.sizes["shared"]
        self.shared_stride = -(-self.shared_bytes // 16) * 16
        self.shared = Buffer(np.full(len(blocks) * self.shared_stride, JUNK, np.uint8), "shared memory")
        self.shared_state = Buffer(np.full(len(self.shared.data), UNWRITTEN, np.uint8), "state")
        self.local_stride = -(-program.sizes["local"] // 16) * 16
        self.local = Buffer(np.full(self.lanes * self.local_stride, JUNK, np.uint8), "local memory")
        self.symbols = [Buffer(v.data, v.name, v.read_only) for v in program.module.variables]
        self.waiting_at = np.full(self.lanes, -1)  # the barrier instruction of a waiting lane
        self.barrier = np.zeros((2, self.lanes), np.int64)  # its number, and how many threads it takes (0: all)
        self.vote = np.zeros(self.lanes, bool)  # the predicate that a lane brings to a barrier with a reduction
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.lanes, np.int64)  # groups of copies that a lane has closed
        self.return_to: dict[str, NDArray[np.int64]] = {}
        self.groups: dict[int, Lanes] = {}
        self.counts: Counter[int] = Counter()

    def _special(self, thread: NDArray[np.int64], blocks: NDArray[np.int64]) -> dict[str, NDArray[np.uint32]]:
        x, y, _ = self.block_size
        gx, gy, _ = self.grid
        block = np.repeat(blocks, self.stride)
        lane = thread % WARP
        every: dict[str, NDArray[np.int64] | int] = {
            "%tid.x": thread % x, "%tid.y": thread // x % y, "%tid.z": thread // (x * y),
            "%ctaid.x": block % gx, "%ctaid.y": block // gx % gy, "%ctaid.z": block // (gx * gy),
            "%laneid": lane, "%warpid": thread // WARP, "%nwarpid": self.stride // WARP,
            "%lanemask_eq": 1 << lane, "%lanemask_lt": (1 << lane) - 1, "%lanemask_le": (2 << lane) - 1,
            "%lanemask_gt": (1 << 32) - (2 << lane), "%lanemask_ge": (1 << 32) - (1 << lane),
        }  # fmt: skip
        for axis, threads, count in zip("xyz", self.block_size, self.grid, strict=True):
            every[f"%ntid.{axis}"], every[f"%nctaid.{axis}"] = threads, count
        return {name: np.broadcast_to(np.asarray(v).astype(np.uint32), self.lanes) for name, v in every.items()}

    # Groups of lanes

    def of(self, lanes: Lanes) -> NDArray[np.int64]:
        """The numbers of these lanes, in order."""
        return self.numbers if isinstance(lanes, slice) else lanes

    def where(self, lanes: Lanes, chosen: NDArray[np.bool_]) -> Lanes:
        """The lanes of a group for which ``chosen`` (one per lane of the group) holds."""
        chosen = np.broadcast_to(chosen, len(self.of(lanes)))
        return lanes if chosen.all() else self.of(lanes)[chosen]

    def count(self, lanes: Lanes) -> int:
        return self.lanes if isinstance(lanes, slice) else len(lanes)

    def _join(self, pc: int, lanes: Lanes) -> None:
        """Adds lanes to the group at an instruction."""
        if pc in self.groups:
            lanes = np.sort(np.concatenate([self.of(self.groups[pc]), self.of(lanes)]))
        if self.count(lanes):
            self.groups[pc] = EVERYONE if self.count(lanes) == self.lanes else lanes

    def run(self) -> Counter[str]:
        """To the end of every block. Returns how often each opcode was interpreted."""
        self._join(self.program.starts[self.program.name], self.numbers[~self.exited])
        with np.errstate(all="ignore"):
            while self.groups:
                pc = min(self.groups)
                lanes = self.groups.pop(pc)
                try:
                    pc = self._advance(pc, lanes)
                    if not self.groups:
                        self._release()
                except PtxError as error:
                    pc = self.pc
                    source = self.program.steps[min(pc, len(self.program.steps) - 1)].source
                    raise PtxError(f"{self.program.name}: {error}\n  line {source.line}: {source.text}") from None
        counts: Counter[str] = Counter()
        for pc, count in self.counts.items():
            counts[self.program.steps[pc].source.opcode] += count
        return counts

    def _advance(self, pc: int, lanes: Lanes) -> int:
        """Runs a group until it meets another, splits, waits or ends."""
        steps, limit = self.program.steps, min(self.groups, default=len(self.program.steps))
        while pc < limit:
            self.pc = pc
            step = steps[pc]
            self.counts[pc] += 1
            active = lanes if step.guard is None else self.where(lanes, step.guard(self, lanes))
            if self.count(active):
                moves = step.execute(self, active)
                if moves is not None:
                    for target, moved in moves:
                        self._join(target, moved)
                    if active is not lanes:
                        self._join(pc + 1, np.setdiff1d(self.of(lanes), self.of(active), assume_unique=True))
                    return pc
            pc += 1
        if pc == len(steps):
            raise PtxError("ran past the end of the program")
        self._join(pc, lanes)
        return pc

    # Barriers and warps

    def wait(self, lanes: Lanes, barrier: Array, threads: Array, vote: Array, aligned: bool) -> None:
        """Puts lanes to sleep at a barrier."""
        if aligned:
            self.whole_warps(lanes, exited_ok=True)
        self.waiting_at[lanes] = self.pc
        self.barrier[0, lanes], self.barrier[1, lanes], self.vote[lanes] = barrier, threads, vote

    def _release(self) -> None:
        """Nobody can run: wakes the blocks that are complete at a barrier."""
        waiting = np.flatnonzero(self.waiting_at >= 0)
        if not len(waiting):
            return
        block = self.block_of[waiting]
        living = np.bincount(self.block_of[~self.exited], minlength=len(self.block_numbers))
        keys, key_of = np.unique(np.stack([block, self.barrier[0, waiting]]), axis=1, return_inverse=True)
        arrived = np.bincount(key_of)
        wanted = np.zeros(keys.shape[1], np.int64)
        wanted[key_of] = self.barrier[1, waiting]
        ready = (arrived == np.where(wanted == 0, living[keys[0]], wanted))[key_of]
        if not ready.any():
            self.pc = int(self.waiting_at[waiting[0]])
            there = {self.program.steps[at].source.line for at in self.waiting_at[waiting]}
            raise PtxError(
                f"barrier not reached by all threads of block {self.block_name(block[0])}: "
                f"{arrived[0]} of {living[block[0]]} threads wait (at lines {sorted(there)})"
            )
        woken = waiting[ready]
        places = self.waiting_at[woken]
        for key in np.unique(key_of[ready]):
            at = np.unique(self.waiting_at[waiting[key_of == key]])
            if len(at) > 1:
                self.pc = int(at[0])
                lines = [self.program.steps[pc].source.line for pc in at]
                raise PtxError(f"divergent barrier: threads of one block wait at lines {lines}")
        self.waiting_at[woken] = -1
        for pc in np.unique(places):
            lanes, finish = woken[places == pc], self.program.steps[pc].finish
            if finish is not None:
                finish(self, lanes)
            self._join(int(pc) + 1, lanes)

    def block_name(self, block: int) -> tuple[int, ...]:
        gx, gy, _ = self.grid
        number = int(self.block_numbers[block])
        return number % gx, number // gx % gy, number // (gx * gy)

    def thread_name(self, lane: int) -> str:
        thread = [int(self.special[f"%tid.{axis}"][lane]) for axis in "xyz"]
        return f"thread {tuple(thread)} of block {self.block_name(int(self.block_of[lane]))}"

    def whole_warps(self, lanes: Lanes, exited_ok: bool = False) -> None:
        """Checks that these lanes are whole warps, up to lanes that have exited."""
        here = np.zeros(self.lanes, bool)
        here[lanes] = True
        warps = here.reshape(-1, WARP)
        expected = ~self.exited.reshape(-1, WARP) if exited_ok else np.ones_like(warps)
        split = warps.any(1) & (warps != expected).any(1)
        if split.any():
            warp = int(np.argmax(split))
            raise PtxError(
                f"warp not converged at an .aligned instruction: {int(warps[warp].sum())} of {WARP} lanes are here "
                f"of the warp of {self.thread_name(warp * WARP)}"
            )

    def warp_masks(self, here: NDArray[np.bool_]) -> NDArray[np.uint32]:
        """Booleans of all lanes -> for each lane the 32 bits of its warp."""
        return np.packbits(here.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32).ravel().repeat(WARP)

    def members(self, lanes: Lanes, mask: Array) -> NDArray[np.uint32]:
        """Checks a collective's member mask; returns for each of the lanes the mask of lanes that take part."""
        here = np.zeros(self.lanes, bool)
        here[lanes] = True
        numbers = self.of(lanes)
        arrived, exited = self.warp_masks(here)[numbers], self.warp_masks(self.exited)[numbers]
        mask = np.broadcast_to(np.asarray(mask, np.uint32), numbers.shape)
        own = np.uint32(1) << (numbers % WARP).astype(np.uint32)
        absent = mask & ~(arrived | exited)
        wrong = (absent != 0) | (mask & own == 0)
        if wrong.any():
            i = int(np.argmax(wrong))
            problem = (
                f"its lanes {int(absent[i]):#x} are not converged here"
                if absent[i]
                else f"{self.thread_name(int(numbers[i]))} is not one of them"
            )
            raise PtxError(f"warp collective with member mask {int(mask[i]):#x}: {problem}")
        return mask & arrived

    # Memory

    def locate(
        self, space: str, address: Array, size: int, lanes: Lanes, write: bool
    ) -> Iterator[tuple[Buffer, NDArray[np.int64], NDArray[np.int64] | slice]]:
        """Checks accesses of ``size`` bytes; yields buffers, bytes in them, and which of the lanes go there."""
        address = np.broadcast_to(address, self.count(lanes))
        if space in ("shared", "local", "param"):
            buffer = self._inside(space, address.astype(np.int64), size, lanes, write)
            yield buffer, self._shifted(space, address, lanes), EVERYONE
            return
        window = (address >> np.uint64(WINDOW_SHIFT)).astype(np.int64)
        offset = (address & np.uint64((1 << WINDOW_SHIFT) - 1)).astype(np.int64)
        first = int(window[0])
        uniform = bool((window == first).all())
        for each in [first] if uniform else np.unique(window).tolist():
            chosen = EVERYONE if uniform else np.flatnonzero(window == each)
            there, here = offset[chosen], lanes if uniform else self.of(lanes)[chosen]
            inner = {SHARED_WINDOW: "shared", LOCAL_WINDOW: "local", PARAM_WINDOW: "param"}.get(each)
            if inner is not None and space == "":
                buffer = self._inside(inner, there, size, here, write)
                yield buffer, self._shifted(inner, there, here), chosen
                continue
            buffer = self._buffer(each)
            if buffer is None:
                value = int(np.broadcast_to(address, self.count(lanes))[0 if uniform else chosen[0]])
                raise PtxError(f"{self._who(here, 0)} follows a stray pointer {value:#x}")
            self._check(buffer.name, there, size, len(buffer.data), here, buffer.read_only and write)
            yield buffer, there, chosen

    def _buffer(self, window: int) -> Buffer | None:
        if 1 <= window <= len(self.memory.buffers):
            return self.memory.buffers[window - 1]
        if SYMBOL_WINDOW <= window < SYMBOL_WINDOW + len(self.symbols):
            return self.symbols[window - SYMBOL_WINDOW]
        return None

    def _inside(self, space: str, offset: NDArray[np.int64], size: int, lanes: Lanes, write: bool) -> Buffer:
        buffer, end = {
            "shared": (self.shared, self.shared_bytes),
            "local": (self.local, self.program.sizes["local"]),
            "param": (self.params, len(self.params.data)),
        }[space]
        self._check(buffer.name, offset, size, end, lanes, buffer.read_only and write)
        return buffer

    def _shifted(self, space: str, offset: Array, lanes: Lanes) -> NDArray[np.int64]:
        """Offsets in a block's or a lane's own memory -> bytes of the buffer of all."""
        offset = offset.astype(np.int64)
        if space == "shared":
            return offset + self.block_of[lanes] * self.shared_stride
        if space == "local":
            return offset + self.numbers[lanes] * self.local_stride
        return offset

    def _who(self, lanes: Lanes, i: int) -> str:
        return self.thread_name(int(self.of(lanes)[i]))

    def _check(self, name: str, offset: NDArray[np.int64], size: int, end: int, lanes: Lanes, forbidden: bool) -> None:
        outside = (offset < 0) | (offset > end - size)
        if outside.any():
            i = int(np.argmax(outside))
            what = f"{size} bytes at byte {int(offset[i])} of {name}, which has {end}"
            raise PtxError(f"out of bounds: {self._who(lanes, i)} accesses {what}")
        crooked = offset & (size - 1)
        if crooked.any():
            i = int(np.argmax(crooked != 0))
            what = f"{size} bytes at byte {int(offset[i])} of {name}"
            raise PtxError(f"misaligned: {self._who(lanes, i)} accesses {what}")
        if forbidden:
            raise PtxError(f"{self._who(lanes, 0)} writes to read-only {name}")

    def load(self, space: str, address: Array, size: int, count: int, lanes: Lanes) -> list[Array]:
        """``count`` consecutive words of ``size`` bytes for each lane."""
        loaded: list[Array] = [np.empty(0)] * count
        for buffer, at, chosen in self.locate(space, address, size * count, lanes, write=False):
            if buffer is self.shared:
                self._check_shared(at, size * count, self.of(lanes)[chosen], write=False)
            words, first = buffer.words(size), at // size
            for i in range(count):
                if isinstance(chosen, slice):
                    loaded[i] = words[first + i]
                else:
                    if not len(loaded[i]):
                        loaded[i] = np.empty(self.count(lanes), words.dtype)
                    loaded[i][chosen] = words[first + i]
        return loaded

    def store(self, space: str, address: Array, values: list[Array], size: int, lanes: Lanes) -> None:
        """Consecutive words of ``size`` bytes of each lane. Of lanes that write to the same place the last one wins."""
        values = [np.broadcast_to(value, self.count(lanes)) for value in values]
        for buffer, at, chosen in self.locate(space, address, size * len(values), lanes, write=True):
            words, first = buffer.words(size), at // size
            if buffer is self.shared:
                self._check_shared(at, size * len(values), self.of(lanes)[chosen], write=True)
            for i, value in enumerate(values):
                words[first + i] = value[chosen]
                if buffer is self.shared:
                    self.shared_state.words(size)[first + i] = int.from_bytes(bytes([WRITTEN]) * size, "little")

    def _check_shared(self, at: NDArray[np.int64], size: int, lanes: NDArray[np.int64], write: bool) -> None:
        """Refuses shared memory that a copy is in flight to, or that is read before it is written."""
        word = min(size, 8)
        states = self.shared_state.words(word)
        for i in range(0, size, word):
            state = states[(at + i) // word]
            if (state == int.from_bytes(bytes([WRITTEN]) * word, "little")).all():
                continue
            of_bytes = state[:, None].view(np.uint8).reshape(len(state), word)
            for bad, problem in ((IN_FLIGHT, "touches bytes that a copy is in flight to"),
                                 (UNWRITTEN, "reads uninitialised bytes")):  # fmt: skip
                rows = (of_bytes == bad).any(1)
                if rows.any() and not (write and bad == UNWRITTEN):
                    lane = int(np.argmax(rows))
                    offset = int(at[lane] + i - self.block_of[lanes[lane]] * self.shared_stride)
                    raise PtxError(f"{self.thread_name(int(lanes[lane]))} {problem}: byte {offset} of shared memory")

    def start_copy(self, target: Array, data: NDArray[np.uint8], lanes: Lanes) -> None:
        """Puts [lanes, bytes] in flight to shared memory."""
        size = data.shape[1]
        for _, at, _ in self.locate("shared", target, size, lanes, write=True):
            self._check_shared(at, size, self.of(lanes), write=True)
            self.shared_state.data[at[:, None] + np.arange(size)] = IN_FLIGHT
            self.copies.append(Copy(self.of(lanes), self.committed[lanes].copy(), at, data))

    def land_copies(self, lanes: Lanes, groups_in_flight: int) -> None:
        """Writes what these lanes copied, but for their latest ``groups_in_flight`` groups and an open one."""
        landing = np.full(self.lanes, -1)
        landing[lanes] = self.committed[lanes] - groups_in_flight - 1  # the last group that has to be there
        kept = []
        for copy in self.copies:
            lands = copy.group <= landing[copy.lanes]
            place = copy.target[lands][:, None] + np.arange(copy.data.shape[1])
            self.shared.data[place], self.shared_state.data[place] = copy.data[lands], WRITTEN
            if not lands.all():
                stays = ~lands
                kept.append(Copy(copy.lanes[stays], copy.group[stays], copy.target[stays], copy.data[stays]))
        self.copies = kept
