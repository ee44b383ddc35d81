"""What each PTX instruction does: a decoder per opcode, which turns a statement into a function of a run and its lanes.

A decoder must account for every modifier that changes results: one that is not known is an error, never ignored.
``_UNSEEN`` lists those that have no effect here, such as cache hints.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .ptx import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    WARP,
    WINDOW_SHIFT,
    Execute,
    Instruction,
    Lanes,
    Program,
    PtxError,
    Run,
    Step,
    Symbol,
    immediate,
    split,
)
from .ptx_numbers import PART, TYPES, Array, Type, add_to_odd, flushed, high_product, narrowed, widened

Read = Callable[[Run, Lanes], Array]
Write = Callable[[Run, Lanes, Array], None]

U32, S32, U64, B32, F32, F64, PRED = (TYPES[name] for name in ("u32", "s32", "u64", "b32", "f32", "f64", "pred"))
ROUNDINGS = {"rn", "rz", "rm", "rp"}
INTEGRAL_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
SPACES = {"global", "const", "shared", "local", "param"}
_UNSEEN = {
    "sync", "aligned", "uni", "volatile", "weak", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "nc",
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_last", "L1::evict_first",
    "L1::evict_unchanged", "L1::no_allocate", "L2::evict_last", "L2::evict_first", "L2::evict_normal", "L2::64B",
    "L2::128B", "L2::256B", "L2::cache_hint", "level::eviction_priority", "noftz",
}  # fmt: skip
SPECIAL_ZERO = {"%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi", "%smid"}


class Decoder:
    """An instruction with readers and writers for its operands, and modifiers that have to be used up."""

    def __init__(self, program: Program, instruction: Instruction, index: int):
        self.program, self.index = program, index
        self.name, *modifiers = instruction.words
        self.instruction, self.operands, self.types = instruction, instruction.operands, instruction.types
        self.modifiers = [word for word in modifiers if word not in TYPES and word not in _UNSEEN]
        self.all_modifiers = modifiers

    @property
    def type(self) -> Type:
        if not self.types:
            raise PtxError("instruction without a type")
        return self.types[0]

    def take(self, *words: str) -> bool:
        """Whether one of these modifiers is there; marks them as understood."""
        left = [word for word in self.modifiers if word not in words]
        found = len(left) < len(self.modifiers)
        self.modifiers = left
        return found

    def choose(self, words: set[str] | dict[str, object], default: str | None = None) -> str:
        """The modifier that is one of ``words``."""
        for word in self.modifiers:
            if word in words:
                self.modifiers.remove(word)
                return word
        if default is None:
            raise PtxError(f"expected one of the modifiers {sorted(words)}")
        return default

    def symbol(self, name: str) -> Symbol | None:
        return self.instruction.scope.find(name)

    def value_of(self, symbol: Symbol) -> int:
        return symbol.value if symbol.kind == "global" else self.program.place[symbol]

    def read(self, operand: int | str, type_: Type | None = None) -> Read:
        """A reader of a register, special register, name or literal, as values of ``type_.dtype``."""
        text = self.operands[operand] if isinstance(operand, int) else operand
        type_ = type_ or self.type
        dtype, storage = type_.dtype, type_.storage
        if text.startswith("!"):
            positive = self.read(text[1:].strip(), type_)
            return lambda run, lanes: ~positive(run, lanes)
        symbol = self.symbol(text)
        if symbol is not None and symbol.kind == "register":
            number, held = self.program.place[symbol], symbol.type
            assert held is not None
            if held.bits < type_.bits:
                raise PtxError(f"{text} has {held.bits} bits, fewer than {type_.name}")
            if held.storage == storage:
                return lambda run, lanes: run.registers[number][lanes].view(dtype)
            return lambda run, lanes: run.registers[number][lanes].astype(storage).view(dtype)
        if text.startswith("%"):
            return self._read_special(text, storage, dtype)
        if symbol is not None:
            constant = storage.type(self.value_of(symbol)).view(dtype)
        elif "+" in text[1:] and (symbol := self.symbol(text.partition("+")[0].strip())) is not None:
            constant = storage.type(self.value_of(symbol) + int(text.partition("+")[2], 0)).view(dtype)
        else:
            try:
                constant = immediate(text, type_).view(dtype)
            except ValueError:
                raise PtxError(f"unknown name {text}") from None
        return lambda run, lanes: constant

    @staticmethod
    def _read_special(text: str, storage: np.dtype, dtype: np.dtype) -> Read:
        if text in SPECIAL_ZERO:  # time and place of execution: any value will do
            return lambda run, lanes: storage.type(0).view(dtype)
        if text == "%dynamic_smem_size":
            return lambda run, lanes: storage.type(run.shared_bytes - run.program.dynamic_start).view(dtype)

        def special(run: Run, lanes: Lanes) -> Array:
            if text not in run.special:
                raise PtxError(f"unknown special register {text}")
            return run.special[text][lanes].astype(storage).view(dtype)

        return special

    def write(self, operand: int | str, type_: Type | None = None) -> Write:
        """A writer to a register; a narrower value is extended by its sign or by zeros."""
        text = self.operands[operand] if isinstance(operand, int) else operand
        type_ = type_ or self.type
        if text == "_":
            return lambda run, lanes, value: None
        symbol = self.symbol(text)
        if symbol is None or symbol.kind != "register" or symbol.type is None:
            raise PtxError(f"{text} is not a register")
        number, held, dtype = self.program.place[symbol], symbol.type, type_.storage
        if held.bits < type_.bits:
            raise PtxError(f"{text} has {held.bits} bits, fewer than {type_.name}")

        if held.storage == dtype:

            def write(run: Run, lanes: Lanes, value: Array) -> None:
                run.registers[number][lanes] = value.view(dtype)
        else:
            signed = np.dtype(f"i{type_.bytes}" if type_.kind == "s" else dtype)

            def write(run: Run, lanes: Lanes, value: Array) -> None:
                run.registers[number][lanes] = value.view(signed).astype(held.storage)

        return write

    def vector(self, operand: int) -> list[str]:
        text = self.operands[operand]
        return split(text.strip("{}")) if text.startswith("{") else [text]

    def floats(self, operand: int | str, type_: Type | None = None) -> Read:
        """A reader of floats as float64."""
        type_ = type_ or self.type
        raw = self.read(operand, type_)
        return lambda run, lanes: widened(raw(run, lanes).view(type_.storage), type_)

    def address(self, operand: int) -> tuple[Read, str | None]:
        """``[register or name + offset]`` -> a reader of addresses, and the kind of memory that a name is in."""
        text = self.operands[operand].strip()
        if not (text.startswith("[") and text.endswith("]")):
            raise PtxError(f"{text} is not an address")
        base, plus, offset = text[1:-1].strip().partition("+")
        base = base.strip()
        distance = int(offset.strip(), 0) if plus else 0
        symbol = self.symbol(base)
        if symbol is None or symbol.kind != "register":
            start = self.value_of(symbol) if symbol is not None else int(base, 0)
            constant = np.uint64(start + distance & 2**64 - 1)
            return (lambda run, lanes: constant), None if symbol is None else symbol.kind
        assert symbol.type is not None
        held = symbol.type
        raw = self.read(base, TYPES[f"u{held.bits}"])
        step = held.storage.type(distance & (1 << held.bits) - 1)
        return (lambda run, lanes: (raw(run, lanes) + step).astype(np.uint64, copy=False)), None

    def elementwise(self, function: Callable[..., Array], *types: Type, result: Type | None = None) -> Execute:
        """``operand 0 = function(operands 1, 2, ...)``."""
        reads = [self.read(i + 1, type_) for i, type_ in enumerate(types)]
        write = self.write(0, result or self.type)
        if len(reads) == 1:
            (a,) = reads
            return lambda run, lanes: write(run, lanes, function(a(run, lanes)))
        if len(reads) == 2:
            a, b = reads
            return lambda run, lanes: write(run, lanes, function(a(run, lanes), b(run, lanes)))
        return lambda run, lanes: write(run, lanes, function(*(read(run, lanes) for read in reads)))


Decode = Callable[[Decoder], "Execute | tuple[Execute, Callable[[Run, Lanes], None]]"]
_DECODERS: dict[str, Decode] = {}


def instruction(*names: str) -> Callable[[Decode], Decode]:
    def register(decode_: Decode) -> Decode:
        for name in names:
            _DECODERS[name] = decode_
        return decode_

    return register


def decode(program: Program, source: Instruction, index: int) -> Step:
    """A statement as a step of a program."""
    decoder = Decoder(program, source, index)
    if decoder.name not in _DECODERS:
        raise PtxError(f"unknown instruction {source.opcode}")
    decoded = _DECODERS[decoder.name](decoder)
    if decoder.modifiers:
        raise PtxError(f"unknown modifiers {decoder.modifiers} of {decoder.name}")
    execute, finish = decoded if isinstance(decoded, tuple) else (decoded, None)
    guard = None
    if source.guard is not None:
        guard = decoder.read(source.guard, PRED)
    return Step(execute, guard, source, finish)


# --- Control flow -----------------------------------------------------------------------------------------------------


def _label(d: Decoder, name: str) -> int:
    symbol = d.symbol(name)
    if symbol is None or symbol.kind != "label":
        raise PtxError(f"{name} is not a label")
    return d.program.place[symbol]


@instruction("bra")
def _bra(d: Decoder) -> Execute:
    target = _label(d, d.operands[0])
    return lambda run, lanes: [(target, lanes)]


@instruction("brx")
def _brx(d: Decoder) -> Execute:
    d.take("idx")
    table = d.symbol(d.operands[1])
    if table is None or table.kind != "table":
        raise PtxError(f"{d.operands[1]} is not a list of branch targets")
    targets = np.array([_label(d, name) for name in table.targets])
    index = d.read(0, U32)

    def execute(run: Run, lanes: Lanes) -> list[tuple[int, Lanes]]:
        chosen = np.broadcast_to(index(run, lanes), run.count(lanes))
        if (chosen >= len(targets)).any():
            raise PtxError(f"branch index {chosen.max()} of {len(targets)} targets")
        to = targets[chosen]
        return [(int(target), run.of(lanes)[to == target]) for target in np.unique(to)]

    return execute


@instruction("ret", "exit")
def _ret(d: Decoder) -> Execute:
    function = d.program.function
    if function.entry or d.name == "exit":

        def leave(run: Run, lanes: Lanes) -> list[tuple[int, Lanes]]:
            run.exited[lanes] = True
            return []

        return leave

    formal = [function.scope.names[name] for name in function.results]

    def execute(run: Run, lanes: Lanes) -> list[tuple[int, Lanes]]:
        numbers, back = run.of(lanes), run.return_to[function.name][lanes].copy()
        run.return_to[function.name][lanes] = -1
        moves: list[tuple[int, Lanes]] = []
        for target in np.unique(back):
            there = numbers[back == target]
            actual = run.program.call_results[int(target) - 1]
            _copy_arguments(run, there, formal, actual)
            moves.append((int(target), there))
        return moves

    return execute


@instruction("call")
def _call(d: Decoder) -> Execute:
    lists = [split(operand[1:-1]) if operand.startswith("(") else operand for operand in d.operands]
    results = lists.pop(0) if isinstance(lists[0], list) else []
    name, arguments = lists[0], lists[1] if len(lists) > 1 else []
    assert isinstance(name, str)
    called = d.program.functions.get(name)
    if called is None:
        return _raising(f"call of {name}, which this module does not define")

    def symbols(names: Sequence[str]) -> list[Symbol]:
        found = [d.symbol(name) for name in names]
        if any(symbol is None or symbol.kind != "local" for symbol in found):
            raise PtxError(f"expected .param variables, got {names}")
        return [symbol for symbol in found if symbol is not None]

    formal = [called.scope.names[parameter] for parameter in called.parameters]
    actual = symbols(arguments)
    d.program.call_results[d.index] = symbols(results)
    entry, back = d.program.starts[name], d.index + 1

    def execute(run: Run, lanes: Lanes) -> list[tuple[int, Lanes]]:
        returns = run.return_to.setdefault(name, np.full(run.lanes, -1))
        if (returns[lanes] >= 0).any():
            raise PtxError(f"recursion in {name}")
        returns[lanes] = back
        _copy_arguments(run, run.of(lanes), actual, formal)
        return [(entry, lanes)]

    return execute


def _copy_arguments(run: Run, lanes: NDArray[np.int64], sources: list[Symbol], targets: list[Symbol]) -> None:
    local = run.local.data.reshape(run.lanes, -1)
    for source, target in zip(sources, targets, strict=True):
        start, end = run.program.place[source], run.program.place[target]
        local[lanes, end : end + target.size] = local[lanes, start : start + source.size]


def _raising(message: str) -> Execute:
    def execute(run: Run, lanes: Lanes) -> None:
        raise PtxError(f"{run.thread_name(int(run.of(lanes)[0]))}: {message}")

    return execute


@instruction("trap", "brkpt")
def _trap(d: Decoder) -> Execute:
    return _raising(d.name)


@instruction("bar", "barrier")
def _barrier(d: Decoder) -> Execute | tuple[Execute, Callable[[Run, Lanes], None]]:
    if d.take("warp"):
        return _warp_barrier(d)
    d.take("cta")
    aligned = d.name == "bar" or "aligned" in d.all_modifiers
    if not d.take("red"):
        if "sync" not in d.all_modifiers:
            raise PtxError("of barriers, only sync and red are known")
        number, threads = d.read(0, S32), d.read(1, S32) if len(d.operands) > 1 else d.read("0", S32)
        no = np.bool_(False)
        return lambda run, lanes: run.wait(lanes, number(run, lanes), threads(run, lanes), no, aligned) or []
    combine = d.choose({"or", "and", "popc"})
    type_ = PRED if combine != "popc" else U32
    number, vote = d.read(1, S32), d.read(len(d.operands) - 1, PRED)
    threads = d.read(2, S32) if len(d.operands) > 3 else d.read("0", S32)
    write = d.write(0, type_)

    def execute(run: Run, lanes: Lanes) -> list[tuple[int, Lanes]]:
        run.wait(lanes, number(run, lanes), threads(run, lanes), vote(run, lanes), aligned)
        return []

    def finish(run: Run, lanes: Lanes) -> None:
        numbers = run.of(lanes)
        block = run.block_of[numbers]
        count = np.bincount(block, minlength=len(run.block_numbers))
        votes = np.bincount(block, run.vote[numbers], minlength=len(run.block_numbers)).astype(np.uint32)
        per_block = {"or": votes > 0, "and": votes == count, "popc": votes}[combine]
        write(run, lanes, per_block[block])

    return execute, finish


def _warp_barrier(d: Decoder) -> Execute:
    mask = d.read(0, U32)

    def execute(run: Run, lanes: Lanes) -> None:
        run.members(lanes, mask(run, lanes))

    return execute


@instruction("membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "createpolicy")
def _no_effect(d: Decoder) -> Execute:
    """Order of memory, hints and time: without effect where every access is done at once."""
    d.modifiers.clear()
    return lambda run, lanes: None


# --- Moves and memory -------------------------------------------------------------------------------------------------


@instruction("mov")
def _mov(d: Decoder) -> Execute:
    targets, sources = d.vector(0), d.vector(1)
    if d.operands[0].startswith("{"):
        part = TYPES[f"b{d.type.bits // len(targets)}"]
        read, writes = d.read(1), [d.write(name, part) for name in targets]

        def unpack(run: Run, lanes: Lanes) -> None:
            whole = np.broadcast_to(read(run, lanes), run.count(lanes))
            parts = np.ascontiguousarray(whole).view(part.storage).reshape(-1, len(writes)).copy()
            for i, write in enumerate(writes):
                write(run, lanes, parts[:, i])

        return unpack
    if d.operands[1].startswith("{"):
        part = TYPES[f"b{d.type.bits // len(sources)}"]
        reads, write = [d.read(name, part) for name in sources], d.write(0)

        def pack(run: Run, lanes: Lanes) -> None:
            parts = [np.broadcast_to(read(run, lanes), run.count(lanes)) for read in reads]
            write(run, lanes, np.stack(parts, axis=1).view(d.type.storage)[:, 0])

        return pack
    return d.elementwise(lambda x: x, d.type)


def _space(d: Decoder, named: str | None) -> str:
    """The memory that an access goes to: what its modifier says, "" for generic addresses."""
    space = d.choose(SPACES, "")
    if space == "param" and named in ("param", "local"):
        return named  # parameters of called functions live in local memory
    if space == "global" or space == "const":
        return "global"
    return space


def _word(d: Decoder) -> tuple[Type, int]:
    """Type and number of a vector access's words."""
    count = {"v2": 2, "v4": 4, "v8": 8, "": 1}[d.choose({"v2", "v4", "v8"}, "")]
    return d.type, count


@instruction("ld", "ldu")
def _ld(d: Decoder) -> Execute:
    (type_, count), (address, named) = _word(d), d.address(1)
    space = _space(d, named)
    names = d.vector(0)
    if len(names) != count:
        raise PtxError(f"{len(names)} registers for a vector of {count}")
    writes = [d.write(name, type_) for name in names]

    def execute(run: Run, lanes: Lanes) -> None:
        for write, value in zip(writes, run.load(space, address(run, lanes), type_.bytes, count, lanes), strict=True):
            write(run, lanes, value)

    return execute


@instruction("st")
def _st(d: Decoder) -> Execute:
    (type_, count), (address, named) = _word(d), d.address(0)
    space = _space(d, named)
    names = d.vector(1)
    if len(names) != count:
        raise PtxError(f"{len(names)} registers for a vector of {count}")
    bits = TYPES[f"b{type_.bits}"]
    reads = [d.read(name, bits) for name in names]

    def execute(run: Run, lanes: Lanes) -> None:
        run.store(space, address(run, lanes), [read(run, lanes) for read in reads], type_.bytes, lanes)

    return execute


@instruction("cvta")
def _cvta(d: Decoder) -> Execute:
    """Between addresses of a space and generic ones; those of global memory are the same in both."""
    to_space = d.take("to")
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(d.choose(SPACES), 0)
    shift = d.type.dtype.type(window << WINDOW_SHIFT) if d.type.bits == 64 else d.type.dtype.type(0)
    return d.elementwise((lambda x: x - shift) if to_space else (lambda x: x + shift), d.type)


@instruction("isspacep")
def _isspacep(d: Decoder) -> Execute:
    space = d.choose(SPACES)
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
    others = np.array(list(window.values()), np.uint64)

    def inside(address: Array) -> Array:
        at = address >> np.uint64(WINDOW_SHIFT)
        return at == window[space] if space in window else ~np.isin(at, others)

    return d.elementwise(inside, U64, result=PRED)


@instruction("cp")
def _cp(d: Decoder) -> Execute:
    if not d.take("async"):
        raise PtxError("of cp, only async is known")
    if d.take("commit_group"):

        def commit(run: Run, lanes: Lanes) -> None:
            run.committed[lanes] += 1

        return commit
    if d.take("wait_all"):
        return lambda run, lanes: run.land_copies(lanes, -1)
    if d.take("wait_group"):
        in_flight = int(d.operands[0])
        return lambda run, lanes: run.land_copies(lanes, in_flight)
    d.take("shared")
    d.take("global")
    size = int(d.operands[2])
    if size not in (4, 8, 16):
        raise PtxError(f"cp.async of {size} bytes")
    (target, _), (source, _) = d.address(0), d.address(1)
    wanted = d.read(3, U32) if len(d.operands) > 3 else d.read(str(size), U32)

    def execute(run: Run, lanes: Lanes) -> None:
        numbers, addresses = run.of(lanes), np.broadcast_to(source(run, lanes), run.count(lanes))
        given = np.broadcast_to(wanted(run, lanes), len(numbers))
        if (given > size).any():
            raise PtxError(f"cp.async copies {given.max()} bytes into {size}")
        if (addresses & np.uint64(size - 1)).any():
            raise PtxError(f"misaligned: cp.async of {size} bytes from {int(addresses[addresses % size != 0][0]):#x}")
        data = np.zeros((len(numbers), size), np.uint8)
        whole = np.flatnonzero(given == size)
        if len(whole):
            words = run.load("global", addresses[whole], 4, size // 4, numbers[whole])
            data[whole] = np.stack(words, axis=1).view(np.uint8)
        for byte in range(int(given[given < size].max(initial=0))):
            part = np.flatnonzero((given < size) & (given > byte))
            data[part, byte] = run.load("global", addresses[part] + np.uint64(byte), 1, 1, numbers[part])[0]
        run.start_copy(np.broadcast_to(target(run, lanes), len(numbers)), data, lanes)

    return execute


def _sequential(combine: Callable[[Array, Sequence[Array]], Array]) -> Callable[..., Array]:
    """An atomic: lanes with the same address one after the other, in the order of their numbers."""

    def execute(run: Run, lanes: Lanes, space: str, addresses: Array, type_: Type, arguments: list[Array]) -> Array:
        addresses = np.broadcast_to(addresses, run.count(lanes))
        arguments = [np.broadcast_to(argument, len(addresses)) for argument in arguments]
        numbers, before = run.of(lanes), np.empty(len(addresses), type_.dtype)
        owner = addresses if space != "shared" else addresses + (run.block_of[numbers] << 32).astype(np.uint64)
        left = np.arange(len(addresses))
        while len(left):
            _, first = np.unique(owner[left], return_index=True)
            now = left[first]
            old = run.load(space, addresses[now], type_.bytes, 1, numbers[now])[0].view(type_.dtype)
            new = combine(old, [argument[now] for argument in arguments])
            run.store(space, addresses[now], [new.view(type_.storage)], type_.bytes, numbers[now])
            before[now] = old
            left = np.delete(left, first)
        return before

    return execute


_ATOMICS: dict[str, Callable[[Array, Sequence[Array]], Array]] = {
    "add": lambda old, given: old + given[0],
    "exch": lambda old, given: given[0],
    "min": lambda old, given: np.minimum(old, given[0]),
    "max": lambda old, given: np.maximum(old, given[0]),
    "and": lambda old, given: old & given[0],
    "or": lambda old, given: old | given[0],
    "xor": lambda old, given: old ^ given[0],
    "cas": lambda old, given: np.where(old == given[0], given[1], old),
    "inc": lambda old, given: np.where(old >= given[0], old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, given: np.where((old == 0) | (old > given[0]), given[0], old - old.dtype.type(1)),
}


@instruction("atom", "red")
def _atomic(d: Decoder) -> Execute:
    returns = d.name == "atom"
    address, named = d.address(int(returns))
    space = _space(d, named)
    kind = d.choose(set(_ATOMICS))
    type_ = d.type
    if type_.parts > 1 or type_.name in ("bf16", "f16"):
        raise PtxError(f"atomic of {type_.name}")
    first = 1 + returns
    reads = [d.read(i, type_) for i in range(first, first + (2 if kind == "cas" else 1))]
    apply = _sequential(_ATOMICS[kind])
    write = d.write(0, type_) if returns else None

    def execute(run: Run, lanes: Lanes) -> None:
        old = apply(run, lanes, space, address(run, lanes), type_, [read(run, lanes) for read in reads])
        if write is not None:
            write(run, lanes, old)

    return execute


# --- Integers and bits ------------------------------------------------------------------------------------------------


def _count_type(d: Decoder, i: int) -> Read:
    return d.read(i, U32)


@instruction("and", "or", "xor", "not")
def _bitwise(d: Decoder) -> Execute:
    function = {"and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert}[d.name]
    return d.elementwise(function, *[d.type] * (len(d.operands) - 1))


@instruction("shl", "shr")
def _shift(d: Decoder) -> Execute:
    """Shifts by the type's width or more give zeros, or copies of the sign."""
    type_, left = d.type, d.name == "shl"
    last = np.uint32(type_.bits - 1)

    def shift(x: Array, by: Array) -> Array:
        amount = np.minimum(by, last).astype(type_.dtype)
        shifted = x << amount if left else x >> amount
        return shifted if type_.kind == "s" and not left else np.where(by > last, type_.dtype.type(0), shifted)

    return d.elementwise(shift, type_, U32)


@instruction("shf")
def _funnel_shift(d: Decoder) -> Execute:
    left, wraps = d.choose({"l", "r"}) == "l", d.choose({"wrap", "clamp"}) == "wrap"

    def shift(low: Array, high: Array, by: Array) -> Array:
        pair = high.astype(np.uint64) << np.uint64(32) | low
        amount = (by & np.uint32(31) if wraps else np.minimum(by, np.uint32(32))).astype(np.uint64)
        return (pair << amount >> np.uint64(32) if left else pair >> amount).astype(np.uint32)

    return d.elementwise(shift, U32, U32, U32)


@instruction("lop3")
def _lop3(d: Decoder) -> Execute:
    combine = d.choose({"or", "and"}, "")
    table = int(d.operands[4], 0)
    reads = [d.read(i, B32) for i in (1, 2, 3)]
    target, _, flag = d.operands[0].partition("|")
    write = d.write(target.strip(), B32)
    write_flag = d.write(flag.strip(), PRED) if combine else None
    given = d.read(5, PRED) if combine else None

    def execute(run: Run, lanes: Lanes) -> None:
        a, b, c = (read(run, lanes) for read in reads)
        result = np.zeros(run.count(lanes), np.uint32)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        write(run, lanes, result)
        if write_flag is not None and given is not None:
            q = given(run, lanes)
            write_flag(run, lanes, (result != 0) | q if combine == "or" else (result != 0) & q)

    return execute


@instruction("popc")
def _popc(d: Decoder) -> Execute:
    return d.elementwise(lambda x: np.bitwise_count(x).astype(np.uint32), d.type, result=U32)


def _highest_bit(x: Array) -> Array:
    """Index of the highest set bit of unsigned integers, -1 for 0."""
    found = np.full(np.shape(x), -1, np.int32)
    for bit in range(8 * x.dtype.itemsize):
        found = np.where(x >> x.dtype.type(bit) & x.dtype.type(1) != 0, np.int32(bit), found)
    return found


@instruction("clz")
def _clz(d: Decoder) -> Execute:
    return d.elementwise(lambda x: np.int32(d.type.bits - 1) - _highest_bit(x), d.type, result=U32)


@instruction("bfind")
def _bfind(d: Decoder) -> Execute:
    shift, type_ = d.take("shiftamt"), d.type

    def find(x: Array) -> Array:
        magnitude = (np.where(x < 0, ~x, x) if type_.kind == "s" else x).view(type_.storage)
        found = _highest_bit(magnitude)
        return np.where((found >= 0) & shift, np.int32(type_.bits - 1) - found, found)

    return d.elementwise(find, type_, result=U32)


@instruction("brev")
def _brev(d: Decoder) -> Execute:
    one = d.type.dtype.type(1)

    def reverse(x: Array) -> Array:
        result = np.zeros_like(x)
        for bit in range(d.type.bits):
            result |= (x >> d.type.dtype.type(bit) & one) << d.type.dtype.type(d.type.bits - 1 - bit)
        return result

    return d.elementwise(reverse, d.type)


@instruction("bfe")
def _bfe(d: Decoder) -> Execute:
    """Bits ``start .. start + length - 1``; beyond the top they are copies of the sign, or 0."""
    type_, signed = d.type, d.type.kind == "s"
    top = type_.bits - 1

    def extract(x: Array, start: Array, length: Array) -> Array:
        start, length = start & np.uint32(0xFF), length & np.uint32(0xFF)
        wide = x.astype(np.int64) if signed else x.astype(np.uint64)
        shifted = (wide >> np.minimum(start, top).astype(wide.dtype)).view(np.uint64)
        if signed:
            beyond = np.where(x < 0, ~np.uint64(0), np.uint64(0))
            shifted = np.where(start > top, beyond, shifted)
        else:
            shifted = np.where(start > top, np.uint64(0), shifted)
        spare = np.uint64(64) - np.minimum(length, 64)
        high = np.where(length == 0, np.uint64(0), shifted << np.minimum(spare, np.uint64(63)))
        cut = (high.view(np.int64) >> spare.astype(np.int64)).view(np.uint64) if signed else high >> spare
        return np.where(length == 0, np.uint64(0), cut).astype(type_.dtype)

    return d.elementwise(extract, type_, U32, U32)


@instruction("bfi")
def _bfi(d: Decoder) -> Execute:
    bits, word = np.uint32(d.type.bits), d.type.dtype.type

    def insert(x: Array, into: Array, start: Array, length: Array) -> Array:
        start, length = start & np.uint32(0xFF), length & np.uint32(0xFF)
        ones = np.where(length >= bits, ~word(0), (word(1) << np.minimum(length, bits - 1).astype(word)) - word(1))
        by = np.minimum(start, bits - np.uint32(1)).astype(word)
        mask = np.where(start >= bits, word(0), ones << by)
        return into & ~mask | x << by & mask

    return d.elementwise(insert, d.type, d.type, U32, U32)


@instruction("prmt")
def _prmt(d: Decoder) -> Execute:
    mode = d.choose({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}, "")
    selectors = {  # bytes of the result, lowest first, for each value of the control's low two bits
        "f4e": [[i + j for j in range(4)] for i in range(4)],
        "b4e": [[(i - j) % 8 for j in range(4)] for i in range(4)],
        "rc8": [[i] * 4 for i in range(4)],
        "ecl": [[max(i, j) for j in range(4)] for i in range(4)],
        "ecr": [[min(i, j) for j in range(4)] for i in range(4)],
        "rc16": [[0, 1, 0, 1], [2, 3, 2, 3]] * 2,
    }

    def permute(a: Array, b: Array, control: Array) -> Array:
        a, b, control = np.broadcast_arrays(a, b, control)
        source = np.stack([a, b], axis=-1).view(np.uint8).reshape(-1, 8)
        result = np.empty((len(source), 4), np.uint8)
        rows = np.arange(len(source))
        for byte in range(4):
            if mode:
                index = np.array([chosen[byte] for chosen in selectors[mode]])[np.ravel(control) & np.uint32(3)]
                result[:, byte] = source[rows, index]
            else:
                nibble = np.ravel(control) >> np.uint32(4 * byte) & np.uint32(15)
                value = source[rows, nibble & np.uint32(7)]
                sign = np.where(value & 0x80, np.uint8(0xFF), np.uint8(0))
                result[:, byte] = np.where(nibble & np.uint32(8), sign, value)
        return result.view(np.uint32)[:, 0].reshape(a.shape)

    return d.elementwise(permute, B32, B32, U32)


@instruction("dp4a")
def _dp4a(d: Decoder) -> Execute:
    a_type, b_type = d.types[0], d.types[1]
    total = S32 if "s" in (a_type.kind, b_type.kind) else U32

    def dot(a: Array, b: Array, c: Array) -> Array:
        for byte in range(4):
            one = (a.view(np.uint32) >> np.uint32(8 * byte)).astype(np.uint8).view(f"{a_type.dtype.kind}1")
            two = (b.view(np.uint32) >> np.uint32(8 * byte)).astype(np.uint8).view(f"{b_type.dtype.kind}1")
            c = c + one.astype(total.dtype) * two.astype(total.dtype)
        return c

    return d.elementwise(dot, a_type, b_type, total, result=total)


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def _signed_division(a: Array, b: Array) -> Array:
    """Quotient rounded to zero, as in C. Magnitudes are unsigned: that of the least integer is no signed one."""
    unsigned = f"u{a.dtype.itemsize}"
    quotient = (np.asarray(np.abs(a)).view(unsigned) // np.asarray(np.abs(b)).view(unsigned)).view(a.dtype)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _integer_arithmetic(d: Decoder) -> Execute:
    type_, name = d.type, d.name
    if d.take("sat") and (name not in ("add", "sub") or type_.name != "s32"):
        raise PtxError(f"saturating {name}")
    saturating = "sat" in d.all_modifiers

    def plain(function: Callable[[Array, Array], Array]) -> Execute:
        def clipped(a: Array, b: Array) -> Array:
            return np.clip(function(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1).astype(np.int32)

        return d.elementwise(clipped if saturating else function, type_, type_)

    if name in ("add", "sub"):
        return plain(operator.add if name == "add" else operator.sub)
    if name in ("min", "max"):
        return plain(np.minimum if name == "min" else np.maximum)
    if name in ("neg", "abs"):
        return d.elementwise(np.negative if name == "neg" else np.abs, type_)
    if name in ("div", "rem"):

        def divide(a: Array, b: Array) -> Array:
            if (b == 0).any():
                raise PtxError("integer division by zero")
            quotient = _signed_division(a, b) if type_.kind == "s" else a // b
            return quotient if name == "div" else a - quotient * b

        return d.elementwise(divide, type_, type_)
    part = d.choose({"lo", "hi", "wide"})
    adds = [] if name == "mul" else [type_]
    if part == "wide":
        wide = TYPES[f"{type_.kind}{2 * type_.bits}"]
        multiply = lambda a, b: a.astype(wide.dtype) * b.astype(wide.dtype)  # noqa: E731
        adds, result = [wide] if adds else [], wide
    else:
        multiply, result = high_product if part == "hi" else operator.mul, type_
    if adds:
        return d.elementwise(lambda a, b, c: multiply(a, b) + c, type_, type_, *adds, result=result)
    return d.elementwise(multiply, type_, type_, result=result)


def _smaller(a: Array, b: Array) -> Array:
    """Minimum of floats: a number rather than NaN, -0 below +0."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def _larger(a: Array, b: Array) -> Array:
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def _exact_double_fma(a: Array, b: Array, c: Array) -> Array:
    """Fused multiply-add of doubles by rational arithmetic; only few kernels have any."""

    def one(x: float, y: float, z: float) -> float:
        if not all(map(np.isfinite, (x, y, z))):
            return float(np.float64(x) * np.float64(y) + np.float64(z))
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        return float(exact) if exact else x * y + z

    return np.vectorize(one, otypes=[np.float64])(a, b, c)


def _float_function(d: Decoder, type_: Type) -> Callable[..., Array]:
    """The instruction on raw bits of floats that are not packed."""
    name, rounding = d.name, d.choose(ROUNDINGS, "rn")
    flush, saturate, to_nan, relu = d.take("ftz"), d.take("sat"), d.take("NaN"), d.take("relu")
    d.take("full", "approx")
    if type_ is F64 and rounding != "rn":
        raise PtxError(f"rounding {rounding} of float64")
    native = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}
    ordered = {"min": (_smaller, np.minimum), "max": (_larger, np.maximum)}

    def clean(bits: Array) -> Array:
        return flushed(bits.view(np.float32)).view(np.uint32) if flush and type_ is F32 else bits

    def finish(bits: Array) -> Array:
        bits = clean(bits)
        if saturate or relu:
            x = widened(bits, type_)
            bits = narrowed(np.clip(np.nan_to_num(x, nan=0.0, posinf=np.inf), 0.0, 1.0 if saturate else np.inf), type_)
        return bits

    def exact(*operands: Array) -> Array:
        x = [widened(operand, type_) for operand in operands]
        if name == "div":
            if rounding != "rn":
                raise PtxError(f"division rounded by {rounding}")
            return narrowed(x[0] / x[1], type_)
        if name in ("fma", "mad"):
            return narrowed(add_to_odd(np.asarray(x[0] * x[1]), x[2]), type_, rounding)
        if name == "mul":
            return narrowed(np.asarray(x[0] * x[1]), type_, rounding)
        return narrowed(add_to_odd(x[0], x[1] if name == "add" else -x[1]), type_, rounding)

    def function(*operands: Array) -> Array:
        operands = tuple(np.asarray(clean(operand)) for operand in operands)
        if name in ("neg", "abs"):
            sign = type_.storage.type(1 << type_.bits - 1)
            return operands[0] ^ sign if name == "neg" else operands[0] & ~sign
        if name in ordered:
            x, y = (widened(operand, type_) for operand in operands)
            return finish(narrowed(ordered[name][int(to_nan)](x, y), type_))
        if type_ is F64 and name in ("fma", "mad"):
            return _exact_double_fma(*(operand.view(np.float64) for operand in operands)).view(np.uint64)
        if rounding == "rn" and type_ in (F32, F64) and name in native:
            x, y = (operand.view(type_.dtype) for operand in operands)
            return finish(np.asarray(native[name](x, y)).view(type_.storage))
        return finish(exact(*operands))

    return function


def _float_arithmetic(d: Decoder) -> Execute:
    """Floats as raw bits; of a packed type, all parts of all lanes at once."""
    type_ = d.type
    single = PART.get(type_.name, type_)
    function = _float_function(d, single)
    bits = TYPES[f"b{type_.bits}"]
    if type_.parts == 1:
        return d.elementwise(function, *[bits] * (len(d.operands) - 1), result=bits)

    def packed(*operands: Array) -> Array:
        flat = [np.ascontiguousarray(operand) for operand in np.broadcast_arrays(*operands)]
        return function(*(np.atleast_1d(operand).view(single.storage) for operand in flat)).view(type_.storage)

    return d.elementwise(packed, *[bits] * (len(d.operands) - 1), result=bits)


@instruction("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs")
def _arithmetic(d: Decoder) -> Execute:
    return _float_arithmetic(d) if d.type.kind == "f" else _integer_arithmetic(d)


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*_FUNCTIONS)
def _float_of_one(d: Decoder) -> Execute:
    """sqrt.rn and rcp.rn are exact; approximations are exact here, which hardware is only nearly."""
    type_, function = d.type, _FUNCTIONS[d.name]
    approximate, flush = d.take("approx"), d.take("ftz")
    rounding = d.choose(ROUNDINGS, "rn")
    if rounding != "rn" or type_.name not in ("f32", "f64") or not (approximate or d.name in ("sqrt", "rcp")):
        raise PtxError(f"unknown form of {d.name}")

    def apply(x: Array) -> Array:
        x = np.asarray(flushed(x) if flush else x)
        exact = d.name in ("sqrt", "rcp")  # one IEEE operation
        y = function(x) if exact or type_ is F64 else function(x.astype(np.float64)).astype(np.float32)
        return flushed(y) if flush else y

    return d.elementwise(apply, type_)


@instruction("copysign")
def _copysign(d: Decoder) -> Execute:
    return d.elementwise(lambda sign, magnitude: np.copysign(magnitude, sign), d.type, d.type)


@instruction("testp")
def _testp(d: Decoder) -> Execute:
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda x: ~np.isnan(x), "notanumber": np.isnan,
    }  # fmt: skip
    return d.elementwise(tests[d.choose(set(tests))], d.type, result=PRED)


# --- Comparison and choice --------------------------------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
_UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_BOOLEANS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def _comparison(d: Decoder, type_: Type) -> Callable[[Array, Array], Array]:
    """Comparisons are false of NaN, those that end in u are true; ``ne`` too is false."""
    flush = d.take("ftz")
    word = d.choose({*_COMPARISONS, *_UNORDERED, "num", "nan"})

    def compare(a: Array, b: Array) -> Array:
        if type_.kind != "f":
            return _COMPARISONS[word](a, b)
        x, y = (widened(v.view(type_.storage), type_) for v in (a, b))
        if flush and type_ is F32:
            x, y = (flushed(v.astype(np.float32)) for v in (x, y))
        unordered = np.isnan(x) | np.isnan(y)
        if word in ("num", "nan"):
            return unordered if word == "nan" else ~unordered
        if word in _UNORDERED:
            return _COMPARISONS[_UNORDERED[word]](x, y) | unordered
        return _COMPARISONS[word](x, y) & ~unordered

    return compare


def _compare_and_combine(d: Decoder, type_: Type) -> tuple[Read, Read | None]:
    """Readers of ``compare(a, b) op c`` and of ``!compare(a, b) op c``, the second result of setp."""
    compare = _comparison(d, type_)
    a, b = d.read(1, type_), d.read(2, type_)
    if len(d.operands) < 4:
        return (lambda run, lanes: compare(a(run, lanes), b(run, lanes))), None
    combine, c = _BOOLEANS[d.choose(set(_BOOLEANS))], d.read(3, PRED)

    def first(run: Run, lanes: Lanes) -> Array:
        return combine(compare(a(run, lanes), b(run, lanes)), c(run, lanes))

    def second(run: Run, lanes: Lanes) -> Array:
        return combine(~np.asarray(compare(a(run, lanes), b(run, lanes))), c(run, lanes))

    return first, second


@instruction("setp")
def _setp(d: Decoder) -> Execute:
    target, _, inverse = d.operands[0].partition("|")
    first, second = _compare_and_combine(d, d.type)
    write = d.write(target.strip(), PRED)
    write_inverse = d.write(inverse.strip(), PRED) if inverse else None

    def execute(run: Run, lanes: Lanes) -> None:
        value = np.asarray(first(run, lanes))
        if write_inverse is not None:
            other = np.asarray(second(run, lanes)) if second is not None else ~value
            write_inverse(run, lanes, other)
        write(run, lanes, value)

    return execute


@instruction("set")
def _set(d: Decoder) -> Execute:
    result, source = d.types
    value, _ = _compare_and_combine(d, source)
    write = d.write(0, result)
    yes = result.dtype.type(1.0) if result.kind == "f" else (~result.storage.type(0)).view(result.dtype)
    no = result.dtype.type(0)
    return lambda run, lanes: write(run, lanes, np.where(value(run, lanes), yes, no))


@instruction("selp")
def _selp(d: Decoder) -> Execute:
    return d.elementwise(lambda a, b, chosen: np.where(chosen, a, b), d.type, d.type, PRED)


@instruction("slct")
def _slct(d: Decoder) -> Execute:
    type_, by = d.types
    d.take("ftz")
    return d.elementwise(lambda a, b, c: np.where(c >= 0, a, b), type_, type_, by)


# --- Conversion -------------------------------------------------------------------------------------------------------


@instruction("cvt")
def _cvt(d: Decoder) -> Execute:
    target, source = d.types
    saturate, flush, relu = d.take("sat"), d.take("ftz"), d.take("relu")
    rounding = d.choose(ROUNDINGS, "")
    integral = d.choose(set(INTEGRAL_ROUNDINGS), "")
    if relu:
        raise PtxError("cvt.relu")
    if target.parts == 2:
        single = PART[target.name]
        write = d.write(0, target)
        high, low = d.floats(1, source), d.floats(2, source)

        def pack(run: Run, lanes: Lanes) -> None:
            parts = [narrowed(read(run, lanes), single, rounding or "rn") for read in (low, high)]
            parts = [np.broadcast_to(part, run.count(lanes)) for part in parts]
            write(run, lanes, np.stack(parts, axis=1).view(target.storage)[:, 0])

        return pack
    if source.kind == "f":
        return _from_float(d, target, source, rounding, integral, saturate, flush)
    if target.kind == "f":
        return _to_float(d, target, source, rounding)

    def to_integer(x: Array) -> Array:
        if saturate:
            limits = np.iinfo(target.dtype)
            x = np.clip(x, max(limits.min, np.iinfo(x.dtype).min), min(limits.max, np.iinfo(x.dtype).max))
        return x.astype(target.dtype)

    return d.elementwise(to_integer, source, result=target)


def _to_float(d: Decoder, target: Type, source: Type, rounding: str) -> Execute:
    if rounding == "rn" and target in (F32, F64):
        return d.elementwise(lambda x: np.asarray(x).astype(target.dtype), source, result=target)
    if source.bits == 64:
        raise PtxError(f"cvt.{rounding}.{target.name}.{source.name}")
    bits = TYPES[f"b{target.bits}"]
    return d.elementwise(lambda x: narrowed(x.astype(np.float64), target, rounding), source, result=bits)


def _from_float(
    d: Decoder, target: Type, source: Type, rounding: str, integral: str, saturate: bool, flush: bool
) -> Execute:
    read, write = d.floats(1, source), d.write(0, TYPES[f"{'b' if target.kind == 'f' else target.kind}{target.bits}"])

    def execute(run: Run, lanes: Lanes) -> None:
        x = read(run, lanes)
        if flush and source is F32:
            x = flushed(x.astype(np.float32)).astype(np.float64)
        if integral:
            x = INTEGRAL_ROUNDINGS[integral](x)
        if target.kind == "f":
            if saturate:
                x = np.clip(np.where(np.isnan(x), 0.0, x), 0.0, 1.0)
            bits = narrowed(x, target, rounding or "rn")
            write(run, lanes, flushed(bits.view(np.float32)).view(np.uint32) if flush and target is F32 else bits)
            return
        limits = np.iinfo(target.dtype)
        wide = source.bits == 64 or target.bits == 64
        nan = np.uint64(1 << target.bits - 1) if wide else np.uint64(0)
        above, below = x >= float(limits.max) + (target.bits < 64), x < float(limits.min)
        inside = np.where(np.isnan(x) | above | below, 0.0, x)
        value = inside.astype(np.uint64 if limits.min == 0 else np.int64).astype(target.dtype)
        value = np.where(above, target.dtype.type(limits.max), np.where(below, target.dtype.type(limits.min), value))
        write(run, lanes, np.where(np.isnan(x), nan.astype(target.storage).view(target.dtype), value))

    return execute


# --- Warps ------------------------------------------------------------------------------------------------------------


@instruction("activemask")
def _activemask(d: Decoder) -> Execute:
    write = d.write(0, B32)

    def execute(run: Run, lanes: Lanes) -> None:
        here = np.zeros(run.lanes, bool)
        here[lanes] = True
        write(run, lanes, run.warp_masks(here)[lanes])

    return execute


@instruction("vote")
def _vote(d: Decoder) -> Execute:
    if "sync" not in d.all_modifiers:
        raise PtxError("vote without sync, which sm_70 removed")
    mode = d.choose({"ballot", "any", "all", "uni"})
    vote, mask = d.read(1, PRED), d.read(2, U32)
    write = d.write(0, B32 if mode == "ballot" else PRED)

    def execute(run: Run, lanes: Lanes) -> None:
        members = run.members(lanes, mask(run, lanes))
        votes = np.zeros(run.lanes, bool)
        votes[lanes] = vote(run, lanes)
        ballot = run.warp_masks(votes)[lanes] & members
        every, none = ballot == members, ballot == 0
        write(run, lanes, {"ballot": ballot, "any": ~none, "all": every, "uni": every | none}[mode])

    return execute


@instruction("redux")
def _redux(d: Decoder) -> Execute:
    mode = d.choose({"add", "min", "max", "and", "or", "xor"})
    function = {"add": np.add, "min": np.minimum, "max": np.maximum,
                "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[mode]  # fmt: skip
    if d.type.kind == "f":
        raise PtxError("redux of floats")
    read, mask, write = d.read(1), d.read(2, U32), d.write(0)

    def execute(run: Run, lanes: Lanes) -> None:
        members, numbers = run.members(lanes, mask(run, lanes)), run.of(lanes)
        values = np.broadcast_to(read(run, lanes), len(numbers))
        key = (numbers // WARP << 32) | members
        _, first, group = np.unique(key, return_index=True, return_inverse=True)
        totals = values[first].copy()
        rest = np.setdiff1d(np.arange(len(numbers)), first)
        function.at(totals, group[rest], values[rest])
        write(run, lanes, totals[group])

    return execute


@instruction("shfl")
def _shfl(d: Decoder) -> Execute:
    """PTX ISA, shfl.sync: the last operand but one holds the clamp in bits 0-4 and the segment mask in bits 8-12."""
    if "sync" not in d.all_modifiers:
        raise PtxError("shfl without sync, which sm_70 removed")
    mode = d.choose({"up", "down", "bfly", "idx"})
    target, _, flag = d.operands[0].partition("|")
    value, b, c, mask = (d.read(i, B32) for i in (1, 2, 3, 4))
    write, write_flag = d.write(target.strip(), B32), d.write(flag.strip(), PRED) if flag else None

    def execute(run: Run, lanes: Lanes) -> None:
        members, numbers = run.members(lanes, mask(run, lanes)), run.of(lanes)
        lane, control = numbers % WARP, np.asarray(c(run, lanes)).astype(np.int64)
        by, clamp, segment = np.asarray(b(run, lanes)).astype(np.int64) & 31, control & 31, control >> 8 & 31
        last, first = lane & segment | clamp & ~segment, lane & segment
        source, valid = {
            "up": lambda: (lane - by, lane - by >= last),
            "down": lambda: (lane + by, lane + by <= last),
            "bfly": lambda: (lane ^ by, (lane ^ by) <= last),
            "idx": lambda: (first | by & ~segment, (first | by & ~segment) <= last),
        }[mode]()
        source = np.where(valid, source, lane)
        outside = members >> source.astype(np.uint32) & np.uint32(1) == 0
        if outside.any():
            i = int(np.argmax(outside))
            raise PtxError(f"{run.thread_name(int(numbers[i]))} reads from lane {int(source[i])}, which takes no part")
        every = np.zeros(run.lanes, np.uint32)
        every[lanes] = value(run, lanes)
        write(run, lanes, every[numbers - lane + source])
        if write_flag is not None:
            write_flag(run, lanes, valid)

    return execute


# --- Tensor cores -----------------------------------------------------------------------------------------------------

_GROUP, _QUAD = np.arange(WARP) // 4, np.arange(WARP) % 4


def _registers(d: Decoder, operand: int, type_: Type) -> Callable[[Run, Lanes], Array]:
    """Fragments of whole warps: [warps, lanes, registers]."""
    reads = [d.read(name, type_) for name in d.vector(operand)]

    def read(run: Run, lanes: Lanes) -> Array:
        values = [np.broadcast_to(one(run, lanes), run.count(lanes)) for one in reads]
        return np.stack(values, axis=-1).reshape(-1, WARP, len(values))

    return read


def _rows_of_words(fragments: Array, rows: int, words: int) -> Array:
    """Register i of lane 4 group + quad -> [warps, rows, words]; i counts rows by 8 first, then words by 4."""
    matrix = np.empty((len(fragments), rows, words), np.uint32)
    for i in range(fragments.shape[2]):
        matrix[:, _GROUP + 8 * (i % (rows // 8)), _QUAD + 4 * (i // (rows // 8))] = fragments[:, :, i]
    return matrix


def _dot_products(d: Decoder) -> Callable[[Array, Array], Array]:
    """Rows of words of a and b -> their dot products, as float64 or int64."""
    if "b1" in d.all_modifiers:
        d.take("b1", "popc")
        combine = {"xor": operator.xor, "and": operator.and_}[d.choose({"xor", "and"})]
        return lambda a, b: np.bitwise_count(combine(a[:, :, None], b[:, None])).sum(-1, dtype=np.int64)
    a_type, b_type = d.types[1:3]

    def numbers(words: Array, type_: Type) -> Array:
        parts = np.ascontiguousarray(words).view(type_.storage)
        return widened(parts, type_) if type_.kind == "f" else parts.view(type_.dtype).astype(np.float64)

    return lambda a, b: numbers(a, a_type) @ numbers(b, b_type).transpose(0, 2, 1)


@instruction("mma")
def _mma(d: Decoder) -> Execute:
    """Fragments as in ptx.cuh. Sums of floats are exact and rounded once; a tensor core rounds more often."""
    shape = d.choose({"m8n8k128", "m16n8k256", "m16n8k128", "m16n8k32", "m16n8k16", "m8n8k16"})
    if not (d.take("row") and d.take("col")):
        raise PtxError("mma: expected row.col")
    total = d.types[0]
    bits = 1 if "b1" in d.all_modifiers else d.types[1].bits
    rows, words = int(shape[1 : shape.index("n")]), int(shape[shape.index("k") + 1 :]) * bits // 32
    dot = _dot_products(d)
    a, b, c = _registers(d, 1, B32), _registers(d, 2, B32), _registers(d, 3, total)
    writes = [d.write(name, total) for name in d.vector(0)]
    for operand, count in ((0, rows // 4), (1, rows // 8 * words // 4), (2, words // 4), (3, rows // 4)):
        if len(d.vector(operand)) != count:
            raise PtxError(f"mma.{shape}: operand {operand} has {len(d.vector(operand))} registers, expected {count}")

    def execute(run: Run, lanes: Lanes) -> None:
        run.whole_warps(lanes)
        products = dot(_rows_of_words(a(run, lanes), rows, words), _rows_of_words(b(run, lanes), 8, words))
        added = c(run, lanes)
        for i, write in enumerate(writes):
            of_lane = products[:, _GROUP + 8 * (i // 2), 2 * _QUAD + i % 2]
            if total.kind == "f":
                value = (of_lane + added[:, :, i]).astype(total.dtype)
            else:
                value = (of_lane.astype(np.int64) + added[:, :, i]).astype(np.int32)
            write(run, lanes, value.ravel())

    return execute


@instruction("ldmatrix")
def _ldmatrix(d: Decoder) -> Execute:
    d.choose({"m8n8"})
    count = int(d.choose({"x1", "x2", "x4"})[1:])
    transposed = d.take("trans")
    address, _ = d.address(1)
    space = _space(d, None)
    writes = [d.write(name, B32) for name in d.vector(0)]
    if len(writes) != count:
        raise PtxError(f"{len(writes)} registers for {count} matrices")

    def execute(run: Run, lanes: Lanes) -> None:
        run.whole_warps(lanes)
        numbers = run.of(lanes).reshape(-1, WARP)
        addresses = np.broadcast_to(address(run, lanes), run.count(lanes)).reshape(-1, WARP)
        for i, write in enumerate(writes):
            of_matrix = slice(8 * i, 8 * i + 8)
            words = run.load(space, addresses[:, of_matrix].ravel(), 4, 4, numbers[:, of_matrix].ravel())
            rows = np.stack(words, axis=1).reshape(-1, 8, 4)
            if transposed:
                halves = rows.view(np.uint16)
                lower, upper = halves[:, 2 * _QUAD, _GROUP], halves[:, 2 * _QUAD + 1, _GROUP]
                value = lower.astype(np.uint32) | upper.astype(np.uint32) << np.uint32(16)
            else:
                value = rows[:, _GROUP, _QUAD]
            write(run, lanes, value.ravel())

    return execute
