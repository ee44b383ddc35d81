// sign_product: y[r,v] = mask[r,v] sum_i a[r,i] s[i,v], real numbers times signs from packed bits
//
// Which operators it is: core/operands.h.
//
// Tensor cores multiply bfloat16. A sign is one exactly; a float32 is the exact sum of three, its leading 8, middle 8
// and last 8 bits (below 2^-110 the last are cut off), so that three products, summed in float32, lose nothing that a
// float32 product would keep. bfloat16 takes one product. uint8 takes mma of int8, exact by nature. On sm_75, without
// bfloat16, threads multiply and add the same tile themselves.
//
// Data path: a block makes a tile of kRows x kColumns. In each stage numbers (16-byte loads, split into planes) and
// signs (a 32-bit word a thread, expanded to 64 bytes) go through registers to shared memory, loaded while the stage
// before is multiplied. A stage is 64 bytes along the contraction. Whatever is contiguous in memory stays contiguous
// in shared memory, and ldmatrix transposes where the contraction is not; pieces of 16 bytes are swizzled so that it
// meets no bank twice. Signs are never unpacked in device memory.
//
//   y tile: 4 warps            a warp: 2 x 8 products of 16 x 8, times planes
//   +---------+---------+
//   |   w0    |   w1    | 32
//   +---------+---------+
//   |   w2    |   w3    | 32
//   +---------+---------+
//       64        64
//
// Bound: the rate of the tensor cores, a third of it for float32; gated_weight_grad for few samples by writing y. A
// tile whose mask recruits nothing is not multiplied.
#pragma once

#include <type_traits>

#include "cuda/ptx.cuh"
#include "cuda/warp.cuh"

namespace engram::cuda {

constexpr int kProductWarps = 4, kProductThreads = kProductWarps * kWarp;
constexpr int kProductRows = 64, kProductColumns = 128;
constexpr int kProductBlocks = 2;               // of a multiprocessor at once: 255 registers a thread
constexpr int kRowTiles = 2, kColumnTiles = 8;  // of a warp

// Formats of a: as it lies in memory, as shared memory holds it, in how many planes, and what sums and results are.
struct Float32 {
  using Number = uint32_t;  // bits
  using Held = uint16_t;    // bfloat16
  using Sum = float;
  using Result = float;
  static constexpr int kPlanes = 3;
};
struct BFloat16 {
  using Number = uint16_t;
  using Held = uint16_t;
  using Sum = float;
  using Result = uint16_t;
  static constexpr int kPlanes = 1;
};
struct Uint8 {
  using Number = uint8_t;
  using Held = uint8_t;  // and signs int8
  using Sum = int32_t;
  using Result = int32_t;
  static constexpr int kPlanes = 1;
};

// Four numbers side by side, in as many words as a number has bytes.
template <typename Number>
struct alignas(4 * sizeof(Number)) Four {
  uint32_t word[sizeof(Number)];
};
template <typename Number>
__device__ __forceinline__ void put(Four<Number>& four, int place, Number number) {
  constexpr int kOfWord = 4 / sizeof(Number);
  four.word[place / kOfWord] |= static_cast<uint32_t>(number) << place % kOfWord * (32 / kOfWord);
}

template <typename Number>
__device__ __forceinline__ void split(const Four<Number>& four, Four<Number> (&planes)[1]) {
  planes[0] = four;
}
// Leading bits are cut off, not rounded: each remainder is exact, and the last fits. Where nothing is cut off, nothing
// is left, also of infinity, from which subtraction would make a NaN.
__device__ __forceinline__ void split(const Four<uint32_t>& four, Four<uint16_t> (&planes)[3]) {
  uint32_t left[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) left[e] = four.word[e];
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    uint32_t leading[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      leading[e] = left[e] & 0xFFFF0000u;
      const float rest = __uint_as_float(left[e]) - __uint_as_float(leading[e]);
      left[e] = left[e] == leading[e] ? 0 : __float_as_uint(rest);
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) planes[plane].word[pair] = leading[2 * pair] >> 16 | leading[2 * pair + 1];
  }
}

__device__ __forceinline__ float to_result(float sum, float) { return sum; }
__device__ __forceinline__ int32_t to_result(int32_t sum, int32_t) { return sum; }
__device__ __forceinline__ uint16_t to_result(float sum, uint16_t) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = __float_as_uint(sum);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

// A tile in shared memory: kLines lines of kLinePieces 16-byte pieces.
template <int kLines_, int kLinePieces_>
struct SharedTile {
  static constexpr int kLines = kLines_, kLinePieces = kLinePieces_;
  uint4 pieces[kLines * kLinePieces];

  // Eight lines at the same piece lie in different banks.
  static __device__ __forceinline__ int place(int line, int piece) {
    constexpr int kLinesOfBanks = 8 / kLinePieces;  // lines that cover all 32 banks once, if several do
    return line * kLinePieces +
           (piece ^ (kLinePieces < 8 ? line / (kLinesOfBanks < 1 ? 1 : kLinesOfBanks) % kLinePieces : line % 8));
  }
  __device__ __forceinline__ uint4* at(int line, int piece) { return pieces + place(line, piece); }
  template <typename T>
  __device__ __forceinline__ T element(int line, int index) const {
    constexpr int kOfPiece = 16 / sizeof(T);
    return reinterpret_cast<const T*>(pieces + place(line, index / kOfPiece))[index % kOfPiece];
  }
};

template <typename Format_, bool kATransposed_, bool kSignsByRow_>
struct ProductTile {
  using Format = Format_;
  using Held = typename Format::Held;
  static constexpr bool kATransposed = kATransposed_, kSignsByRow = kSignsByRow_;
  static constexpr int kDepth = 64 / sizeof(Held);  // of a stage along the contraction: 32, or 64 of int8
  static constexpr int kFours = kProductRows * kDepth / 4 / kProductThreads;  // fours of numbers that a thread loads
  static constexpr int kSignWords = kProductColumns * kDepth / 32 / kProductThreads;
  using ATile = std::conditional_t<kATransposed, SharedTile<kDepth, kProductRows * sizeof(Held) / 16>,
                                   SharedTile<kProductRows, 4>>;
  using SignTile = std::conditional_t<kSignsByRow, SharedTile<kDepth, kProductColumns * sizeof(Held) / 16>,
                                      SharedTile<kProductColumns, 4>>;
  struct Stage {
    ATile a[Format::kPlanes];
    SignTile signs;
  };
};

// What a thread has loaded of the next stage.
template <typename Tile>
struct Loaded {
  Four<typename Tile::Format::Number> a[Tile::kFours];
  uint32_t signs[Tile::kSignWords], gates[Tile::kSignWords];
};

template <bool kAligned, typename Tile>
__device__ __forceinline__ void load_stage(const SignProduct& p, int64_t r, int64_t v, int64_t i,
                                           Loaded<Tile>& loaded) {
  using Number = typename Tile::Format::Number;
  const auto* a = static_cast<const Number*>(p.a);
  const int thread = static_cast<int>(threadIdx.x);
  // lines of a: rows of y, or steps of the contraction where a is transposed; a thread's fours are of one column of
  // them
  constexpr int kFoursOfLine = (Tile::kATransposed ? kProductRows : Tile::kDepth) / 4;
  constexpr int kLineStep = kProductThreads / kFoursOfLine;
  const int64_t length = Tile::kATransposed ? p.R : p.I;
  const int64_t line = (Tile::kATransposed ? i : r) + thread / kFoursOfLine;
  const int64_t at = (Tile::kATransposed ? r : i) + thread % kFoursOfLine * 4;
  const Number* from = a + line * length + at;
  const int64_t lines_left = (Tile::kATransposed ? p.I : p.R) - line;
  const int there = static_cast<int>(length - at < 4 ? length - at : 4);  // of four numbers
#pragma unroll
  for (int f = 0; f < Tile::kFours; ++f, from += kLineStep * length) {
    loaded.a[f] = {};
    if (f * kLineStep >= lines_left) continue;
    if constexpr (kAligned) {
      if (there == 4) loaded.a[f] = *reinterpret_cast<const Four<Number>*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (e < there) put(loaded.a[f], e, from[e]);
    }
  }
  // lines of signs: steps of the contraction where signs lie by row, else columns of y
  constexpr int kWordsOfLine = (Tile::kSignsByRow ? kProductColumns : Tile::kDepth) / 32;
  const int64_t sign_lines = Tile::kSignsByRow ? p.I : p.V;
  const int64_t words = 2 * words_for(Tile::kSignsByRow ? p.V : p.I);  // of 32 bits
#pragma unroll
  for (int s = 0; s < Tile::kSignWords; ++s) {
    const int index = s * kProductThreads + thread;
    const int64_t sign_line = (Tile::kSignsByRow ? i : v) + index / kWordsOfLine;
    const int64_t word = (Tile::kSignsByRow ? v : i) / 32 + index % kWordsOfLine;
    const bool valid = sign_line < sign_lines && word < words;
    loaded.signs[s] = valid ? words32(p.signs)[sign_line * words + word] : 0;
    loaded.gates[s] = ~0u;
    if (Tile::kSignsByRow && p.gate != nullptr)
      loaded.gates[s] = valid ? words32(p.gate)[sign_line * 2 * p.gate_stride + word] : 0;
  }
}

// Four bytes (int8) or two (bfloat16) of +1, -1 or, where the gate is 0, 0: units first, first + 1, ...
template <typename Held>
__device__ __forceinline__ uint32_t expand(uint32_t signs, uint32_t gates, int first) {
  uint32_t expanded = 0;
  constexpr int kUnits = 4 / sizeof(Held), kBits = 32 / kUnits;
  constexpr uint32_t kPlus = sizeof(Held) == 1 ? 0x01 : 0x3F80, kMinus = sizeof(Held) == 1 ? 0xFF : 0xBF80;
#pragma unroll
  for (int e = 0; e < kUnits; ++e) {
    const uint32_t sign = signs >> (first + e) & 1 ? kPlus : kMinus;
    expanded |= (gates >> (first + e) & 1 ? sign : 0) << e * kBits;
  }
  return expanded;
}

template <typename Tile>
__device__ __forceinline__ void store_stage(const Loaded<Tile>& loaded, typename Tile::Stage& stage) {
  using Held = typename Tile::Held;
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kFoursOfLine = (Tile::kATransposed ? kProductRows : Tile::kDepth) / 4;
  constexpr int kFoursOfPiece = 4 / sizeof(Held);
#pragma unroll
  for (int f = 0; f < Tile::kFours; ++f) {
    const int index = f * kProductThreads + thread, line = index / kFoursOfLine, four = index % kFoursOfLine;
    Four<Held> planes[Tile::Format::kPlanes];
    split(loaded.a[f], planes);
#pragma unroll
    for (int plane = 0; plane < Tile::Format::kPlanes; ++plane) {
      auto* piece = reinterpret_cast<Four<Held>*>(stage.a[plane].at(line, four / kFoursOfPiece));
      piece[four % kFoursOfPiece] = planes[plane];
    }
  }
  constexpr int kWordsOfLine = (Tile::kSignsByRow ? kProductColumns : Tile::kDepth) / 32;
  constexpr int kPiecesOfWord = 2 * sizeof(Held);
#pragma unroll
  for (int s = 0; s < Tile::kSignWords; ++s) {
    const int index = s * kProductThreads + thread, line = index / kWordsOfLine, word = index % kWordsOfLine;
#pragma unroll
    for (int piece = 0; piece < kPiecesOfWord; ++piece) {
      constexpr int kUnits = 4 / sizeof(Held);
      const int first = piece * 4 * kUnits;
      const uint32_t signs = loaded.signs[s], gates = loaded.gates[s];
      *stage.signs.at(line, word * kPiecesOfWord + piece) =
          make_uint4(expand<Held>(signs, gates, first), expand<Held>(signs, gates, first + kUnits),
                     expand<Held>(signs, gates, first + 2 * kUnits), expand<Held>(signs, gates, first + 3 * kUnits));
    }
  }
}

// Fragments of 16 rows of a, or of two tiles of 8 columns of signs, over 32 bytes of the contraction from byte
// 32 step of the stage. `first`: the first row or column.
template <bool kTransposed, typename Shared>
__device__ __forceinline__ void load_a(Shared& tile, int first, int step, uint32_t (&r)[4]) {
  const int lane = lane_id();
  if constexpr (kTransposed)
    ptx::load_matrices_transposed(r, tile.at(step * 16 + lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2));
  else
    ptx::load_matrices(r, tile.at(first + lane % 16, step * 2 + lane / 16));
}
template <bool kByRow, typename Shared>
__device__ __forceinline__ void load_signs(Shared& tile, int first, int step, uint32_t (&r)[4]) {
  const int lane = lane_id();
  if constexpr (kByRow)
    ptx::load_matrices_transposed(r, tile.at(step * 16 + lane % 16, first / 8 + lane / 16));
  else
    ptx::load_matrices(r, tile.at(first + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
}

// Multiplies a stage on the tensor cores, or on sm_75 unit by unit, into the same accumulators.
template <typename Tile>
__device__ __forceinline__ void multiply_stage(typename Tile::Stage& stage,
                                               typename Tile::Format::Sum (&sum)[kRowTiles][kColumnTiles][4]) {
  const int warp_row = warp_id() / 2 * 32, warp_column = warp_id() % 2 * 64;
#if ENGRAM_ARCH >= 800
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t b[kColumnTiles][2];
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      uint32_t two_tiles[4];
      load_signs<Tile::kSignsByRow>(stage.signs, warp_column + j * 8, step, two_tiles);
      b[j][0] = two_tiles[0], b[j][1] = two_tiles[1], b[j + 1][0] = two_tiles[2], b[j + 1][1] = two_tiles[3];
    }
#pragma unroll
    for (int plane = Tile::Format::kPlanes - 1; plane >= 0; --plane) {  // the least first
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t a[4];
        load_a<Tile::kATransposed>(stage.a[plane], warp_row + i * 16, step, a);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          if constexpr (sizeof(typename Tile::Held) == 1)
            ptx::mma_bytes(sum[i][j], a, b[j]);
          else
            ptx::mma_bfloat16(sum[i][j], a, b[j]);
        }
      }
    }
  }
#else
  using Held = typename Tile::Held;
  using Sum = typename Tile::Format::Sum;
  const int group = lane_id() / 4, quad = lane_id() % 4;
#pragma unroll 1
  for (int i = 0; i < Tile::kDepth; ++i) {
    Sum a[kRowTiles][2];
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + tile * 16 + half * 8 + group;
        Sum number = 0;
#pragma unroll
        for (int plane = Tile::Format::kPlanes - 1; plane >= 0; --plane) {
          const auto& shared = stage.a[plane];
          const Held held =
              Tile::kATransposed ? shared.template element<Held>(i, row) : shared.template element<Held>(row, i);
          if constexpr (sizeof(Held) == 1)
            number += held;
          else
            number += __uint_as_float(static_cast<uint32_t>(held) << 16);
        }
        a[tile][half] = number;
      }
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = warp_column + j * 8 + quad * 2 + e;
        const Held held = Tile::kSignsByRow ? stage.signs.template element<Held>(i, column)
                                            : stage.signs.template element<Held>(column, i);
        Sum sign;
        if constexpr (sizeof(Held) == 1)
          sign = static_cast<int8_t>(held);
        else
          sign = __uint_as_float(static_cast<uint32_t>(held) << 16);
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Sum& into = sum[tile][j][2 * half + e];
            if constexpr (sizeof(Held) == 1)
              into += a[tile][half] * sign;
            else
              into = __fmaf_rn(a[tile][half], sign, into);
          }
      }
  }
#endif
}

__device__ __forceinline__ bool recruited(const SignProduct& p, int64_t row, int64_t column) {
  return p.mask == nullptr ||
         (p.mask[(p.mask_stride == 0 ? 0 : row) * words_for(p.V) + column / kWordBits] >> column % kWordBits & 1) != 0;
}

template <bool kAligned, typename Tile>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks) sign_product_kernel(SignProduct p) {
  using Format = typename Tile::Format;
  using Result = typename Format::Result;
  __shared__ alignas(128) typename Tile::Stage stages[2];
  const int64_t row_blocks = ceil_div(p.R, kProductRows);
  const int64_t r = blockIdx.x % row_blocks * kProductRows, v = blockIdx.x / row_blocks * kProductColumns;
  const int64_t steps = ceil_div(p.I, Tile::kDepth);

  bool any = true;
  if (p.mask != nullptr) {
    bool own = false;
    for (int i = static_cast<int>(threadIdx.x); i < kProductRows * kProductColumns / kWordBits; i += kProductThreads) {
      const int64_t row = r + i / 2, word = v / kWordBits + i % 2;
      if (row < p.R && word < words_for(p.V))
        own |= p.mask[(p.mask_stride == 0 ? 0 : row) * words_for(p.V) + word] != 0;
    }
    any = __syncthreads_or(own) != 0;
  }

  typename Format::Sum sum[kRowTiles][kColumnTiles][4] = {};
  if (any) {
    Loaded<Tile> loaded;
    load_stage<kAligned, Tile>(p, r, v, 0, loaded);
    for (int64_t step = 0; step < steps; ++step) {
      typename Tile::Stage& stage = stages[step % 2];
      store_stage<Tile>(loaded, stage);
      __syncthreads();  // this stage is whole, and all warps are done with the one before, which is refilled next
      if (step + 1 < steps) load_stage<kAligned, Tile>(p, r, v, (step + 1) * Tile::kDepth, loaded);
      multiply_stage<Tile>(stage, sum);
    }
  }

  const int group = lane_id() / 4, quad = lane_id() % 4;
  auto* y = static_cast<Result*>(p.y);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = r + warp_id() / 2 * 32 + i * 16 + half * 8 + group;
      if (row >= p.R) continue;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const int64_t column = v + warp_id() % 2 * 64 + j * 8 + quad * 2;
        struct alignas(2 * sizeof(Result)) Two {
          Result of[2];
        } two;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool kept = column + e < p.V && recruited(p, row, column + e);
          two.of[e] = kept ? to_result(sum[i][j][2 * half + e], Result{}) : Result{0};
        }
        Result* to = y + row * p.V + column;
        if (p.V % 2 == 0 && column < p.V) {
          *reinterpret_cast<Two*>(to) = two;
        } else {
          if (column < p.V) to[0] = two.of[0];
          if (column + 1 < p.V) to[1] = two.of[1];
        }
      }
    }
}

template <typename Format, bool kATransposed, bool kSignsByRow>
cudaError_t launch_product(const SignProduct& p, cudaStream_t stream) {
  using Tile = ProductTile<Format, kATransposed, kSignsByRow>;
  using Number = typename Format::Number;
  const int64_t length = kATransposed ? p.R : p.I;
  const bool aligned = length % 4 == 0 && reinterpret_cast<uintptr_t>(p.a) % (4 * sizeof(Number)) == 0;
  const auto blocks = static_cast<unsigned>(ceil_div(p.R, kProductRows) * ceil_div(p.V, kProductColumns));
  const auto kernel = aligned ? sign_product_kernel<true, Tile> : sign_product_kernel<false, Tile>;
  ENGRAM_LAUNCH(kernel, blocks, kProductThreads, stream, p);
  return cudaGetLastError();
}

inline cudaError_t sign_product(const SignProduct& p, cudaStream_t stream) {
  if (p.R == 0 || p.V == 0) return cudaSuccess;
  const bool wide = p.element == Element::kFloat32;
  if (p.element == Element::kUint8) return launch_product<Uint8, false, false>(p, stream);
  if (!p.signs_by_row)
    return wide ? launch_product<Float32, false, false>(p, stream) : launch_product<BFloat16, false, false>(p, stream);
  if (!p.a_transposed)
    return wide ? launch_product<Float32, false, true>(p, stream) : launch_product<BFloat16, false, true>(p, stream);
  return wide ? launch_product<Float32, true, true>(p, stream) : launch_product<BFloat16, true, true>(p, stream);
}

}  // namespace engram::cuda
