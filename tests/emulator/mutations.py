"""Wrong kernels that the tests must tell from the right ones.

    python tests/emulator/mutations.py [NAME ...]      runs those, or all, and writes MUTATIONS.md

Each mutation replaces one text of a file in ``csrc/cuda`` by another. The file so changed takes the place of the right
one, its kernels are compared with the reference (``compare.COMPACT``) under three orders of threads, and where that
finds nothing, run under the checker. Results are kept beside the compiled libraries, so that an interrupted run goes
on where it ended. ``ptx.cuh`` has no mutations: the emulator has functions of its own in its place.
"""

import hashlib
import json
import multiprocessing
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from emulator import build, compare
from emulator.operators import HOST, EmulatedOps

SCHEDULES = (0, 1, 2)
LIMIT_SECONDS = 240
REPORT = Path(__file__).parent / "MUTATIONS.md"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    architecture: int = 800

    def apply(self, source: str) -> str:
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {source.count(self.old)} places in {self.file} read {self.old!r}")
        return source.replace(self.old, self.new)


def _of(file: str, *mutations: tuple) -> list[Mutation]:
    return [Mutation(name, file, *rest) for name, *rest in mutations]


MUTATIONS = [
    *_of(
        "pack.cuh",
        ("infinity is NaN", "(x & 0x7FFFFFFFu) > 0x7F800000u", "(x & 0x7FFFFFFFu) >= 0x7F800000u"),
        ("NaN of 16 bits unseen", "nan |= (x & 0x7FFFu) > infinity;", ""),
        ("negative NaN unseen", "nan |= (x & 0x7FFFFFFFu) >", "nan |= x < 0x80000000u && x >"),
        ("-0 is negative", "return x <= 0x80000000u;", "return x < 0x80000000u;"),
        ("-0 of 16 bits is negative", "return x <= 0x8000u;", "return x < 0x8000u;"),
        ("infinities of the 16-bit types swapped", "0x7F80 : 0x7C00", "0x7C00 : 0x7F80"),
        ("window without its border", "(x & 0x7FFFFFFFu) <= width", "(x & 0x7FFFFFFFu) < width"),
        ("window of one side", "return (x & 0x7FFFFFFFu) <= width", "return x <= width"),
        ("four units beyond a row", "if (unit + 4 * lane < K)", "if (unit + 4 * lane <= K)"),
        ("one unit beyond a row", "own < K && test", "own <= K && test"),
        ("ballot kept by other lanes", "if (lane / 8 == i)", "if (lane % 8 == i)"),
        ("nibble reversed", "(test(four.of[i], nan)) << i", "(test(four.of[i], nan)) << (3 - i)"),
        ("shared gate taken by row", "gate + row * gate_stride + word", "gate + row * words + word"),
        ("pointer not asked for alignment", "K % 4 == 0 && reinterpret_cast<uintptr_t>(x) % (4 * sizeof(Number)) == 0",
         "K % 4 == 0"),
        ("row not asked for alignment", "K % 4 == 0 && reinterpret_cast", "reinterpret_cast"),
        ("only the first thread reports NaN", "if (nan) *nan_flag", "if (nan && threadIdx.x == 0) *nan_flag"),
        ("warps repeat each other's pieces", "i += piece_step()", "i += gridDim.x"),
    ),
    *_of(
        "warp.cuh",
        ("nibbles of the wrong lanes", "4 * (lane_id() % 8)", "4 * (lane_id() / 4)"),
        ("nibbles of other words joined", "__shfl_xor_sync(kAllLanes, word, 4)", "__shfl_xor_sync(kAllLanes, word, 8)"),
        ("words of a piece in each other's place", "[lane_id() / 8] = word", "[lane_id() / 8 ^ 1] = word"),
        ("pieces left out", "(blockIdx.x) * (kBlock / kWarp)", "(blockIdx.x) * kWarp"),
    ),
    *_of(
        "valid_gate.cuh",
        ("gate left out", " & (p.gate == nullptr ? ~uint64_t{0} : p.gate[i])", ""),
        ("padding kept", "valid_bits(i % p.words, p.K)", "~uint64_t{0}"),
        ("words of the first row", "i % p.words", "i"),
    ),
    *_of(
        "unpack.cuh",
        ("shift within half a word", ">> unit % 32", ">> unit % 16"),
        ("signs swapped", "? plus : minus", "? minus : plus"),
        ("words of 64 bits", "[unit / 32]", "[unit / 64]"),
        ("units of one piece", "unit = i % pieces * kUnits", "unit = i % pieces"),
        ("rows without their padding", "row * p.words", "row * ceil_div(p.K, kWordBits)"),
        ("row not asked for alignment", "p.K % kUnits == 0 && ", ""),
        ("pointer not asked for alignment", " && reinterpret_cast<uintptr_t>(p.out) % 16 == 0", ""),
    ),
    *_of(
        "unfold.cuh",
        ("second word left out", "if (shift + count > kWordBits)", "if (false)"),
        ("second word read in any case", "if (shift + count > kWordBits)", "if (shift > 0)"),
        ("bits of the next tap", "value & valid_bits(0, count)", "value"),
        ("run beyond the word", "if (count > first + kWordBits - at) count = first + kWordBits - at;", ""),
        ("padding read above", "row >= rows.first && ", ""),
        ("padding read below", "row < rows.last && ", ""),
        ("padding read on the left", "column >= columns.first && ", ""),
        ("padding read on the right", " && column < columns.last", ""),
        ("dilation of the other axis", "row * w.dilation_h", "row * w.dilation_w"),
        ("the first group", "p.group * channels + c", "c"),
        ("channels of a group as a pixel's", "(y * w.width + x) * w.channels", "(y * w.width + x) * channels"),
        ("words of a sample without padding", "pixel.sample * p.stride",
         "pixel.sample * ceil_div(units(w), kWordBits)"),
        ("bits at the start of the word", " << (at - first)", ""),
        ("tap by row", "tap / w.kernel_w, column", "tap / w.kernel_h, column"),
    ),
    *_of(
        "standardise.cuh",
        ("mean in float32", "centre(float y, double mean)", "centre(float y, float mean)"),
        ("rest of the mean left out", "(y - high) - static_cast<float>(mean - static_cast<double>(high))", "y - high"),
        ("a unit beyond the row", "i < n; i += kWarp) sum", "i <= n; i += kWarp) sum"),
        ("last half of the partial sums left out", "half = kWarp / 2; half > 0; half /= 2) sum",
         "half = kWarp / 2; half > 1; half /= 2) sum"),
        ("partial sums in another order", "int half = kWarp / 2; half > 0; half /= 2",
         "int half = 1; half < kWarp; half *= 2"),
        ("eps of another call", "variance + p.eps", "variance + 1e-5"),
        ("reciprocal not rounded", "lane_id() == 0 ? mean : static_cast<double>(reciprocal)",
         "lane_id() == 0 ? mean : 1.0 / sqrt(variance + p.eps)"),
        ("moments in each other's place", "lane_id() == 0 ? mean", "lane_id() == 1 ? mean"),
        ("moments of the first row", "p.moments[2 * row]", "p.moments[0]"),
        ("gradient of the values themselves", "static_cast<double>(centre(y[i], mean) * reciprocal)",
         "static_cast<double>(y[i])"),
        ("mean of the gradient kept", "(d[i] - mean_d)", "d[i]"),
        ("all warps take the first rows", "row = first_piece(); row < p.M; row += piece_step()) {\n    const float* y",
         "row = warp_id(); row < p.M; row += gridDim.x) {\n    const float* y"),
    ),
    *_of(
        "sample_engram.cuh",
        ("counter by unit",
         "philox(p.seed, static_cast<uint64_t>(unit / 4), row_number(p, m), p.offset);\n    uint32_t nibble",
         "philox(p.seed, static_cast<uint64_t>(unit), row_number(p, m), p.offset);\n    uint32_t nibble"),
        ("first row ignored", "p.first_row + static_cast<uint64_t>(m)", "static_cast<uint64_t>(m)"),
        ("row step ignored", "static_cast<uint64_t>(m) * p.row_step", "static_cast<uint64_t>(m)"),
        ("high half of the row ignored", "row_number(p, m), p.offset);\n#pragma",
         "static_cast<uint32_t>(row_number(p, m)), p.offset);\n#pragma"),
        ("offset ignored", "row_number(p, m), p.offset);\n#pragma", "row_number(p, m), 0);\n#pragma"),
        ("a draw at the rate recruits", "draws.word[j] < p.threshold", "draws.word[j] <= p.threshold"),
        ("padding recruited", "unit + j < p.K && draws", "draws"),
        ("rate 1 is rate 0", "< p.threshold)", "< static_cast<uint32_t>(p.threshold))"),
        ("one tie too many", "rank < wanted", "rank <= wanted"),
        ("ties within a lane ranked the same", "rank += equal[j];", ""),
        ("a lane ranked after itself", "(1u << lane) - 1", "(2u << lane) - 1"),
        ("ties of earlier pieces forgotten", "equal_before += equal_in_piece;", ""),
        ("ties of earlier warps of another lane",
         "equal_before - equal_in_run, 0)", "equal_before - equal_in_run, 31)"),
        ("higher digits compared at the wrong shift", "key[j] >> (shift + kDigitBits) == key_digits",
         "key[j] >> shift == key_digits"),
        ("histogram not cleared", "histogram[thread] = 0;", "if (shift == 24) histogram[thread] = 0;"),
        ("no barrier after clearing", "histogram[thread] = 0;\n    __syncthreads();", "histogram[thread] = 0;"),
        ("no barrier after counting", "__syncthreads();\n    const int digit", "const int digit"),
        ("no barrier after finding", "__syncthreads();\n    key_digits", "key_digits"),
        ("no barrier after sums of warps", "= count;\n  __syncthreads();", "= count;"),
        ("scan leaves out a lane", "lane_id() >= step", "lane_id() > step"),
        ("two digits found", "reached - own < wanted", "reached - own <= wanted"),
        ("wanted after the digit", "wanted - (reached - own)", "wanted - reached"),
        ("temperature ignored", "value[j] * p.inverse_temperature + noise", "value[j] + noise"),
        ("no noise at infinite temperature", "p.inverse_temperature >= 0.0f", "p.inverse_temperature > 0.0f"),
        ("NaN unseen", "nan |= value[j] != value[j];", "nan = false;"),
        ("pointer not asked for alignment", " && reinterpret_cast<uintptr_t>(p.score) % 16 == 0", ""),
        ("padding counted", "if (unit + j < p.K) atomicAdd", "atomicAdd"),
        ("padding above the threshold", "unit + j < p.K && key[j] > threshold", "key[j] > threshold"),
        ("counted without atomic operations", "atomicAdd(&histogram[key[j] >> (32 - kDigitBits)], 1)",
         "histogram[key[j] >> (32 - kDigitBits)] += 1"),
    ),
    *_of(
        "binary_matmul.cuh",
        ("swizzle puts pieces on each other", "(piece ^ (row >> 1 & 3))", "(piece | (row >> 1 & 3))"),
        ("fragment loaded without the swizzle", "swizzled(row, 2 * step + lane / 8 % 2)",
         "row * 4 + 2 * step + lane / 8 % 2"),
        ("no barrier before a stage is used", "__syncthreads();  // this stage has come", "// this stage has come"),
        ("one group of copies too many in flight", "Tile::kStages - 2>();", "Tile::kStages - 1>();"),
        ("stage refilled that is being read", "stages[next % Tile::kStages]", "stages[step % Tile::kStages]"),
        ("rows beyond the last copied", "there && r < left", "there"),
        ("words beyond the last copied", "const bool there = word < words_left_;", "const bool there = true;"),
        ("gate of the first tile", "gate_ = first_row(p.gate, m, p.words)", "gate_ = first_row(p.gate, 0, p.words)"),
        ("|x| of the wrong row", "counts.rows[r % 2] += __popc(a[i][r])", "counts.rows[r / 2] += __popc(a[i][r])"),
        ("|g| of the wrong row", "counts.rows[r % 2] += __popc(g[r])", "counts.rows[r / 2] += __popc(g[r])"),
        ("|w| of one half twice", "__popc(b[j][0]) + __popc(b[j][1])", "2 * __popc(b[j][0])"),
        ("fragments of w in the wrong order",
         "b[j][1] = two_tiles[1], b[j + 1][0] = two_tiles[2]", "b[j][1] = two_tiles[2], b[j + 1][0] = two_tiles[1]"),
        ("shared gate of the wrong half", "a[i][r] &= g[r / 2]", "a[i][r] &= g[r % 2]"),
        ("shared gate not counted", "sum_over_quad(counts.shared_gate) :", "static_cast<int>(p.K) :"),
        ("second product without the gate", "~a[i][r] & g[r]", "~a[i][r]"),
        ("half of w not turned over", "b[j][0] = ~b[j][0], b[j][1] = ~b[j][1]", "b[j][0] = ~b[j][0]"),
        ("padding subtracted", ": padded - count)", ": static_cast<uint32_t>(p.K) - count)", 750),
        ("rows of the two products swapped", "a[i][2 * half + 1]", "a[i][half + 1]", 750),
        ("shared gate counted, not c doubled", "(recruited) - 2 * count", "(recruited) - count", 750),
        ("bits of a and b do not meet", "a[i][r] >> bit & kLowBits", "a[i][r] >> (7 - bit) & kLowBits", 1000),
        ("bytes of b with their other bits", "b[j][r] >> bit & kLowBits", "b[j][r] >> bit", 1000),
        ("the highest bit of a byte left out", "bit < 8; ++bit", "bit < 7; ++bit", 1000),
        ("|w| of the neighbour", "columns[j * 8 + quad * 2 + e]", "columns[j * 8 + quad * 2]"),
        ("rows of another tile counted", "if (i == warp_n) {", "if (i == warp_m) {"),
        ("columns of another tile counted", "j % Tile::kWarpsM == warp_m", "j % Tile::kWarpsM == 0"),
        ("counts of columns in each other's place", "(j * Tile::kWarpsM + warp_m) * 8", "(j + warp_m) * 8"),
        ("counts of rows in each other's place", "rows[warp_n * 16 + half", "rows[warp_m * 16 + half"),
        ("no barrier before counts are exchanged", "if (kAndForm) __syncthreads();  // the", "// the"),
        ("no barrier after counts are exchanged", "  if (kAndForm) __syncthreads();\n\n", "\n"),
        ("rows copied too far apart", "from + r * stride_", "from + 2 * r * stride_"),
        ("shared gate copied by its second row", "&& row() == 0) ptx::copy_16", "&& row() == 1) ptx::copy_16"),
        ("sum over half a quad", "count + __shfl_xor_sync(kAllLanes, count, 2)",
         "count + __shfl_xor_sync(kAllLanes, count, 1)"),
        ("a column beyond the last", "if (column + 1 < p.N) y[1]", "if (column < p.N) y[1]"),
        ("two numbers written wherever they lie", "p.N % 2 == 0 && column < p.N", "column < p.N"),
        ("threshold not reached at its value", ">= p.threshold[column]", "> p.threshold[column]"),
        ("flip ignored", " != (p.flip[column] != 0)", ""),
        ("padding of bits not written", "warp_n < words * kWordBits", "warp_n < p.N"),
        ("no blocks for padding of bits", "product ? p.N : words_for(p.N) * kWordBits", "p.N"),
        ("bits of rows beyond the last", "row < p.M && warp_n", "warp_n"),
        ("bits of half a quad", "bits |= __shfl_xor_sync(kAllLanes, bits, 2);", ""),
    ),
    *_of(
        "binary_dot.cuh",
        ("carry lost", "(a & b) | (a & c) | (b & c)", "(a & b) | (a & c)"),
        ("twos counted once", "2 * __popc(twos)", "__popc(twos)"),
        ("words of the next row", "word + 2 < words", "word < words"),
        ("rows of w beyond the last", "n + j < p.N ? p.words : 0", "p.words"),
        ("samples beyond the last", "m + s < p.M ? p.words : 0", "p.words"),
        ("gate applied to w alone", "(differ[i] ^ x[i]) & g[i]", "(differ[i] & g[i]) ^ x[i]"),
        ("gate of the first sample", "(m + s) * p.gate_stride", "m * p.gate_stride"),
        ("sums of the other half", "if (upper) first += left;", "if (!upper) first += left;"),
        ("lanes meet twice", "word += kDotLanes * 4", "word += kDotLanes * 2"),
        ("padding subtracted", "static_cast<uint32_t>(p.K) - 2u", "static_cast<uint32_t>(p.words * 64) - 2u"),
        ("several lanes write one sum", "lane % (kDotLanes / Tile::kValues) == 0 && ", ""),
        ("samples beyond the last written", "row < p.M && column < p.N;", "column < p.N;"),
        ("threshold not reached at its value", "y >= p.threshold[column]", "y > p.threshold[column]"),
        ("flip ignored", " != (p.flip[column] != 0)", ""),
        ("no barrier after clearing", "= 0;\n    __syncthreads();", "= 0;"),
        ("no barrier before bits are written", "__syncthreads();\n    if (own_s", "if (own_s"),
        ("bits set without atomic operations",
         "atomicOr(&bits[s][(column - block_n) / 32], 1u << (column - block_n) % 32)",
         "bits[s][(column - block_n) / 32] |= 1u << (column - block_n) % 32"),
        ("bits of samples beyond the last", "if (own_s < kSamples && m + own_s < p.M)", "if (own_s < kSamples)"),
        ("no blocks for padding of bits", "const int64_t columns = product ? p.N : words_for(p.N) * kWordBits;",
         "const int64_t columns = p.N;"),
    ),
    *_of(
        "sign_product.cuh",
        ("a plane of float32 missing", "plane = Tile::Format::kPlanes - 1; plane >= 0; --plane) {  // the least first",
         "plane = Tile::Format::kPlanes / 2; plane >= 0; --plane) {"),
        ("planes of seven bits", "left[e] & 0xFFFF0000u", "left[e] & 0xFFFE0000u"),
        ("infinity minus infinity", "left[e] = left[e] == leading[e] ? 0 : ", "left[e] = "),
        ("numbers of a pair swapped", "leading[2 * pair] >> 16 | leading[2 * pair + 1]",
         "leading[2 * pair] | leading[2 * pair + 1] >> 16"),
        ("ties to bfloat16 upwards", "0x7FFFu + (bits >> 16 & 1)", "0x8000u"),
        ("NaN rounded like a number", "if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;", ""),
        ("transposed a taken as it lies", "wide ? launch_product<Float32, true, true>",
         "wide ? launch_product<Float32, false, true>"),
        ("matrices of transposed a in the wrong order", "lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2",
         "lane % 16, first / 8 + lane / 16"),
        ("matrices of signs in the wrong order", "step * 16 + lane % 16, first / 8 + lane / 16",
         "step * 16 + lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2"),
        ("tiles of signs in the wrong order",
         "b[j][1] = two_tiles[1], b[j + 1][0] = two_tiles[2]", "b[j][1] = two_tiles[2], b[j + 1][0] = two_tiles[1]"),
        ("shared mask taken by row",
         "(p.mask_stride == 0 ? 0 : row) * words_for(p.V) + column", "row * words_for(p.V) + column"),
        ("mask of a part of the rows", "kProductRows * kProductColumns / kWordBits", "kProductColumns / kWordBits"),
        ("mask beyond the last row", "row < p.R && word < words_for(p.V)", "word < words_for(p.V)"),
        ("mask beyond the last word", "row < p.R && word < words_for(p.V)", "row < p.R"),
        ("masked tile left out", "row >= p.R) continue;", "row >= p.R || !any) continue;"),
        ("shared gate taken by row", "sign_line * 2 * p.gate_stride + word", "sign_line * words + word"),
        ("gate of 64-bit words", "sign_line * 2 * p.gate_stride + word", "sign_line * p.gate_stride + word"),
        ("-1 where the gate is 0", "& 1 ? sign : 0) <<", "& 1 ? sign : kMinus) <<"),
        ("-1 of int8 is 127", "? 0xFF : 0xBF80", "? 0x7F : 0xBF80"),
        ("numbers beyond a row", "length - at < 4 ? length - at : 4)", "4)"),
        ("lines beyond the last", "f * kLineStep >= lines_left", "f * kLineStep > lines_left"),
        ("signs beyond the last word", "sign_line < sign_lines && word < words", "sign_line < sign_lines"),
        ("signs beyond the last row", "sign_line < sign_lines && word < words", "word < words"),
        ("row not asked for alignment", "length % 4 == 0 && ", ""),
        ("pointer not asked for alignment", " && reinterpret_cast<uintptr_t>(p.a) % (4 * sizeof(Number)) == 0", ""),
        ("one stage alone", "stages[step % 2]", "stages[0]"),
        ("no barrier before a stage is used", "__syncthreads();  // this stage is whole", "// this stage is whole"),
        ("next stage is the first again", "(step + 1) * Tile::kDepth, loaded", "step * Tile::kDepth, loaded"),
        ("two numbers written wherever they lie", "p.V % 2 == 0 && column < p.V", "column < p.V"),
        ("a column beyond the last", "if (column + 1 < p.V) to[1]", "if (column < p.V) to[1]"),
        ("rows beyond the last", "if (row >= p.R) continue;", ""),
        ("numbers in the first place of a piece", "piece[four % kFoursOfPiece]", "piece[0]"),
        ("swizzle beyond the line", ": line % 8)", ": line % 16)"),
        ("16-bit numbers joined at bytes", "place % kOfWord * (32 / kOfWord)", "place % kOfWord * 8"),
        ("columns of blocks by rows",
         "blockIdx.x / row_blocks * kProductColumns", "blockIdx.x / row_blocks * kProductRows"),
        ("rows of a half tile", "tile * 16 + half * 8 + group", "tile * 16 + half * 4 + group", 750),
        ("a plane counted twice", "plane = Tile::Format::kPlanes - 1; plane >= 0; --plane) {\n          const auto",
         "plane = Tile::Format::kPlanes - 1; plane >= -1 + Tile::Format::kPlanes / 2; --plane) {\n          const auto",
         750),
    ),
]  # fmt: skip

# What no test can see, and why.
EQUIVALENT = {
    "sign_product.cuh: mask beyond the last word": "a tile has 128 columns, like a 16-byte piece of a "
    "packed row: where a tile has a column, both of its words are there",
}

# What the emulator cannot show, and why.
MISSED = {
    "sign_product.cuh: NaN rounded like a number": "rounding changes only NaNs whose low bits are set, as in a GPU's "
    "0x7FFFFFFF; the emulated product keeps the bits of its operands",
}


def key_of(mutation: Mutation) -> str:
    return f"{mutation.file}: {mutation.name}"


BY_KEY = {key_of(mutation): mutation for mutation in MUTATIONS}

# ---- running

_TILES = ["run_binary_matmul"], ["binary_dot.cuh", "binary_matmul.cuh"]
# Functions of kernels.cpp that a file's comparisons call, and what they include: compiled alone, since it is soon done.
PARTS = {
    "pack.cuh": (["run_pack_signs", "run_pack_window"], ["pack.cuh"]),
    "unpack.cuh": (["run_unpack_signs"], ["unpack.cuh"]),
    "unfold.cuh": (["run_unfold_bits"], ["unfold.cuh"]),
    "valid_gate.cuh": (["run_valid_gate"], ["valid_gate.cuh"]),
    "standardise.cuh": (["run_standardise", "run_standardise_grad"], ["standardise.cuh"]),
    "sample_engram.cuh": (["run_sample_engram"], ["sample_engram.cuh"]),
    "binary_matmul.cuh": _TILES,
    "binary_dot.cuh": _TILES,
    "sign_product.cuh": (["run_sign_product"], ["sign_product.cuh"]),
    "warp.cuh": (["run_pack_signs", "run_pack_window"], ["pack.cuh"]),
}


def part_of_host(file: str) -> str:
    functions, headers = PARTS[file]
    kept = []
    for paragraph in HOST.read_text().split("\n\n"):
        lines = paragraph.splitlines()
        if any(line.startswith("#include") for line in lines):
            kept.append("\n".join(f'#include "cuda/{header}"' for header in headers))
        elif "ENGRAM_EXPORT run_" not in paragraph or any(f"{name}(" in paragraph for name in functions):
            kept.append(paragraph)
    return "\n\n".join(kept) + "\n"


def checks_of(file: str) -> list:
    return compare.COMPACT["pack.cuh" if file == "warp.cuh" else file]


def catch(mutation: Mutation, overlay: Path) -> tuple[str, str]:
    """How a mutation is caught, and the first line of what was said: "" if it is not. overlay: an empty folder."""
    source = build.ROOT / "csrc" / "cuda" / mutation.file
    (overlay / "cuda").mkdir()
    (overlay / "cuda" / mutation.file).write_text(mutation.apply(source.read_text()))
    host = overlay / f"{overlay.name}.cpp"
    host.write_text(part_of_host(mutation.file))
    for mode, how in [("coverage", "compare"), ("checked", "checker")]:  # coverage: compiled the fastest
        for schedule in SCHEDULES:
            torch.manual_seed(schedule)
            ops = EmulatedOps(mutation.architecture, mode, schedule, host=host, overlay=overlay)
            ops.library  # noqa: B018 an error of the compiler is not a catch
            for check in checks_of(mutation.file):
                try:
                    check(ops)
                except Exception as error:
                    return how, next(filter(None, str(error).splitlines()), type(error).__name__)
    return "", ""


def _send(connection, mutation: Mutation, overlay: Path) -> None:
    connection.send(catch(mutation, overlay))


def run(mutation: Mutation) -> tuple[str, str]:
    """catch() in a process of its own, which a wrong kernel may well end or never end."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
        process = context.Process(target=_send, args=(sender, mutation, Path(folder)))
        process.start()
        sender.close()
        try:
            if not receiver.poll(LIMIT_SECONDS):
                return "compare", f"does not end within {LIMIT_SECONDS} s"
            return receiver.recv()
        except EOFError:
            process.join()
            if process.exitcode > 0:
                raise RuntimeError(f"{key_of(mutation)}: see above") from None
            return "compare", f"ended by signal {-process.exitcode}"
        finally:
            process.kill()
            process.join()
            for built in build.CACHE.glob(f"{Path(folder).name}_*"):
                shutil.rmtree(built)


# ---- results


def _kept(mutation: Mutation) -> Path:
    sources = [*sorted((build.ROOT / "csrc").rglob("*.cuh")), Path(compare.__file__)]
    text = repr(mutation) + "".join(path.read_text() for path in sources)
    return build.CACHE / f"mutation_{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def result_of(mutation: Mutation) -> tuple[str, str]:
    kept = _kept(mutation)
    if not kept.exists():
        build.CACHE.mkdir(exist_ok=True)
        kept.write_text(json.dumps(run(mutation)))
    how, said = json.loads(kept.read_text())
    return how, said


def report(results: dict[str, tuple[str, str]]) -> str:
    counted = [key for key in results if key not in EQUIVALENT]
    caught = {how: sum(results[key][0] == how for key in counted) for how in ("compare", "checker", "")}
    lines = [
        "# Mutations of the CUDA kernels",
        "",
        "Written by `python tests/emulator/mutations.py`. *compare*: results differ from the reference, or the",
        "unchecked build finds a stray write or threads that part; *checker*: results agree, and the checker finds an",
        "access that must not be.",
        "",
        f"{len(counted)} mutations: {caught['compare']} caught by compare, {caught['checker']} by the checker, "
        f"{caught['']} missed; {len(results) - len(counted)} equivalent.",
        "",
        "| file | mutation | architecture | caught by | says |",
        "|---|---|---|---|---|",
    ]
    for key, (how, said) in results.items():
        mutation = BY_KEY[key]
        verdict = how or ("equivalent" if key in EQUIVALENT else "**missed**")
        said = (said[:110] if how else (EQUIVALENT | MISSED).get(key, "")).replace("|", "\\|")
        lines.append(f"| {mutation.file} | {mutation.name} | sm_{mutation.architecture // 10} | {verdict} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    keys = sys.argv[1:] or list(BY_KEY)
    for key in keys:
        how, said = result_of(BY_KEY[key])
        print(f"{key:70} {how or 'MISSED':8} {said[:150]}", flush=True)
    if keys == list(BY_KEY):
        REPORT.write_text(report({key: result_of(mutation) for key, mutation in BY_KEY.items()}))


if __name__ == "__main__":
    main()
