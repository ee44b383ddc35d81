// binary_matmul, tile form: y[m,n] = sum_k g[m,k] s(x[m,k]) s(w[n,k]), by the tensor cores
//
//   x  [M, words]  w  [N, words]  gate  [words], [M, words] or null      y  [M, N] int32
//   binary_threshold instead packs 1{(y >= threshold[n]) != flip[n]} into bits [M, words_for(N)].
//
// On bits 0 and 1, with popcounts of a row written |.|, and c what the tensor core sums:
//
//                       AND form (sm_80 on)                          XOR form (sm_75)
//   no gate, or shared  c = |x & w|   y = 4c - 2|x| - 2|w| + |g|     c = |x ^ w|   y = |g| - 2c     (x, w within g)
//   gate per sample     c = |x&g & w| + |~x&g & ~w|, agreements:     c = |x&g ^ w| + |~x&g ^ ~w|, over `padded` bits:
//                       y = 2c - |g|                                 y = padded - c
//
// So a gate per sample costs a second product and no second accumulator. Padding of x, w and g is 0 and adds nothing
// to c but in the last form, where ~w counts it. |x|, |w| and |g| are counted on the fragments in registers.
//
// Where the binary instruction is a real one (sm_80 to sm_90) a step of 256 bits is one mma.m16n8k256; on sm_75 four
// of 8 x 8 x 128. From sm_100 on the binary instruction is emulated by 8 IMMA and some 137 others, so we make the int8
// operands ourselves, bit i of every byte at a time, and reuse them across the tile: 8 IMMA and (2 kTilesM * 4 +
// 2 kTilesN * 2) / (kTilesM kTilesN) * 8 = 24 others.
//
// Data path: 512 bits of each row of the block's tile go to shared memory by 16-byte cp.async, kStages deep, where
// 16-byte pieces are swizzled so that ldmatrix meets no bank twice; fragments (cuda/ptx.cuh) by ldmatrix.
//
//   block of kWarpsM x kWarpsN warps      warp: kTilesM x kTilesN products of 16 x 8
//   +----+----+----+----+                 +----+----+----+----+
//   | w0 | w1 | w2 | w3 |  16 kTilesM     |    |    |    |    |  16      columns of a warp: 32, a word of packed
//   +----+----+----+----+                 +----+----+----+----+          output
//   | w4 | w5 | w6 | w7 |                 |    |    |    |    |
//   +----+----+----+----+                 +----+----+----+----+
//     32                                    8
//
// Bound: the rate of the tensor cores for large M, reading w for small.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/warp.cuh"

namespace engram::cuda {

enum class Gate { kNone, kShared, kPerSample };
enum class Output { kProduct, kThreshold };

constexpr bool kAndForm = ENGRAM_ARCH >= 800;

template <int kWarpsM_, int kWarpsN_, int kTilesM_, Gate kGate_>
struct BinaryTile {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kTilesM = kTilesM_, kTilesN = 4;
  static constexpr Gate kGate = kGate_;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kBlocksAtOnce = kTilesM == 2 ? 4 : 1;  // of a multiprocessor: 128 registers a thread, or 255
  static constexpr int kRows = kWarpsM * kTilesM * 16, kColumns = kWarpsN * kTilesN * 8;
  static constexpr int kGateRows = kGate == Gate::kNone ? 0 : kGate == Gate::kShared ? 1 : kRows;
  static constexpr int kStageWords = 8;   // 64-bit words of a row in a stage: two steps of 256 bits
  static constexpr int kStagePieces = 4;  // of 16 bytes
  static constexpr int kAllRows = kRows + kColumns + kGateRows;
  static constexpr int kFitting = 48 * 1024 / (kAllRows * kStagePieces * 16);
  static constexpr int kStages = kFitting < 4 ? kFitting : 4;
  static_assert(kStages >= 2, "copies must overlap products");
};

// Place of a 16-byte piece of a row among the pieces of a stage. Eight rows at the same piece, which ldmatrix reads at
// a time, and 32 bytes of four rows cover all banks once.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 4 + (piece ^ (row >> 1 & 3)); }

// c += the products of all tiles of the warp over 256 bits.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void multiply_bits(int32_t (&c)[kTilesM][kTilesN][4], const uint32_t (&a)[kTilesM][4],
                                              const uint32_t (&b)[kTilesN][2]) {
#if ENGRAM_ARCH < 800
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < kTilesN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::mma_xor(c[i][j][0], c[i][j][1], a[i][2 * half], b[j][half]);
        ptx::mma_xor(c[i][j][2], c[i][j][3], a[i][2 * half + 1], b[j][half]);
      }
#elif ENGRAM_ARCH < 1000
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) ptx::mma_and(c[i][j], a[i], b[j]);
#else
  // Bits bit, bit + 8, bit + 16, bit + 24 of a word become the four bytes of an operand: which units of the contraction
  // meet in one product does not matter, as long as a and b agree.
  constexpr uint32_t kLowBits = 0x01010101u;
#pragma unroll
  for (int bit = 0; bit < 8; ++bit) {
    uint32_t a_bytes[kTilesM][4], b_bytes[kTilesN][2];
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) a_bytes[i][r] = a[i][r] >> bit & kLowBits;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) b_bytes[j][r] = b[j][r] >> bit & kLowBits;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) ptx::mma_bytes(c[i][j], a_bytes[i], b_bytes[j]);
  }
#endif
}

__device__ __forceinline__ int sum_over_quad(int count) {
  count += __shfl_xor_sync(kAllLanes, count, 1);
  return count + __shfl_xor_sync(kAllLanes, count, 2);
}

// Starts the copies of the words from `word` on: rows of x, of w, then of the gate.
template <typename Tile>
__device__ __forceinline__ void copy_stage(const BinaryMatmul& p, int64_t m, int64_t n, int64_t word, uint4* stage) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kAllRows * Tile::kStagePieces; i += Tile::kThreads) {
    int row = i / Tile::kStagePieces;
    const int piece = i % Tile::kStagePieces;
    uint4* to = stage + swizzled(row, piece);
    const uint64_t* from = p.x;
    int64_t source_row = m + row, rows = p.M, stride = p.words;
    if (row >= Tile::kRows + Tile::kColumns) {
      row -= Tile::kRows + Tile::kColumns;
      from = p.gate, stride = p.gate_stride, source_row = m + row;
      if (Tile::kGate == Gate::kShared) source_row = 0;
    } else if (row >= Tile::kRows) {
      from = p.w, source_row = n + row - Tile::kRows, rows = p.N;
    }
    const int64_t source_word = word + 2 * piece;
    const bool valid = source_row < rows && source_word < p.words;
    ptx::copy_16(to, valid ? from + source_row * stride + source_word : from, valid);
  }
}

// Popcounts of rows `group` and `group + 8` of each tile of x and of the gate, and of column `group` of each of w.
// Until they are summed over the quad, those of this lane's words.
template <typename Tile>
struct RowCounts {
  int x[Tile::kTilesM][2] = {}, gate[Tile::kTilesM][2] = {}, w[Tile::kTilesN] = {};
};

// Adds to c and the counts the 256 bits that lie in pieces 2 step and 2 step + 1 of a stage.
template <typename Tile>
__device__ __forceinline__ void multiply_step(const uint4* stage, int step,
                                              int32_t (&c)[Tile::kTilesM][Tile::kTilesN][4], RowCounts<Tile>& counts) {
  constexpr int kTilesM = Tile::kTilesM, kTilesN = Tile::kTilesN;
  const int lane = lane_id(), quad = lane % 4;
  const int warp_m = warp_id() / Tile::kWarpsN, warp_n = warp_id() % Tile::kWarpsN;
  uint32_t a[kTilesM][4], b[kTilesN][2];
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
    const int row = (warp_m * kTilesM + i) * 16 + lane % 16;
    ptx::load_matrices(a[i], stage + swizzled(row, 2 * step + lane / 16));
  }
#pragma unroll
  for (int j = 0; j < kTilesN; j += 2) {
    const int row = Tile::kRows + (warp_n * kTilesN + j) * 8 + lane % 8 + lane / 16 * 8;
    uint32_t two_tiles[4];
    ptx::load_matrices(two_tiles, stage + swizzled(row, 2 * step + lane / 8 % 2));
    b[j][0] = two_tiles[0], b[j][1] = two_tiles[1], b[j + 1][0] = two_tiles[2], b[j + 1][1] = two_tiles[3];
  }

  if constexpr (Tile::kGate == Gate::kPerSample) {
    uint32_t not_a[kTilesM][4];
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      const int row = Tile::kRows + Tile::kColumns + (warp_m * kTilesM + i) * 16 + lane % 16;
      uint32_t g[4];
      ptx::load_matrices(g, stage + swizzled(row, 2 * step + lane / 16));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        not_a[i][r] = ~a[i][r] & g[r];
        a[i][r] &= g[r];
        if (kAndForm) counts.gate[i][r % 2] += __popc(g[r]);
      }
    }
    multiply_bits<kTilesM, kTilesN>(c, a, b);
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) b[j][0] = ~b[j][0], b[j][1] = ~b[j][1];
    multiply_bits<kTilesM, kTilesN>(c, not_a, b);
  } else {
    if constexpr (Tile::kGate == Gate::kShared) {
      uint32_t g[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4* piece = stage + swizzled(Tile::kRows + Tile::kColumns, 2 * step + half);
        g[half] = reinterpret_cast<const uint32_t*>(piece)[quad];
        counts.gate[0][0] += __popc(g[half]);
      }
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i][r] &= g[r / 2];
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) b[j][0] &= g[0], b[j][1] &= g[1];
    }
    if (kAndForm) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) counts.x[i][r % 2] += __popc(a[i][r]);
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) counts.w[j] += __popc(b[j][0]) + __popc(b[j][1]);
    }
    multiply_bits<kTilesM, kTilesN>(c, a, b);
  }
}

// Turns c into y, in place. padded: bits of the contraction that were multiplied, padding included.
template <typename Tile>
__device__ __forceinline__ void finish(const BinaryMatmul& p, uint32_t padded,
                                       int32_t (&c)[Tile::kTilesM][Tile::kTilesN][4], const RowCounts<Tile>& counts) {
  const int quad = lane_id() % 4;
  const int shared_gate = Tile::kGate == Gate::kShared ? sum_over_quad(counts.gate[0][0]) : static_cast<int>(p.K);
#pragma unroll
  for (int j = 0; j < Tile::kTilesN; ++j) {
    int w[2] = {};
    if (kAndForm && Tile::kGate != Gate::kPerSample) {
      const int column = sum_over_quad(counts.w[j]);  // of column `group`; the accumulators are of 2 quad, 2 quad + 1
      w[0] = __shfl_sync(kAllLanes, column, 8 * quad);
      w[1] = __shfl_sync(kAllLanes, column, 8 * quad + 4);
    }
#pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int x = 0;
        if (kAndForm) x = sum_over_quad(Tile::kGate == Gate::kPerSample ? counts.gate[i][half] : counts.x[i][half]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int32_t& y = c[i][j][2 * half + e];
          // Unsigned, since four times a count may pass 2^31 where the sum does not.
          const auto count = static_cast<uint32_t>(y);
          if (Tile::kGate == Gate::kPerSample)
            y = static_cast<int32_t>(kAndForm ? 2 * count - static_cast<uint32_t>(x) : padded - count);
          else if (kAndForm)
            y = static_cast<int32_t>(4 * count - 2 * static_cast<uint32_t>(x) - 2 * static_cast<uint32_t>(w[e]) +
                                     static_cast<uint32_t>(shared_gate));
          else
            y = static_cast<int32_t>(static_cast<uint32_t>(shared_gate) - 2 * count);
        }
      }
    }
  }
}

template <typename Tile, Output kOutput>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksAtOnce) binary_matmul_kernel(BinaryMatmul p) {
  constexpr int kTilesM = Tile::kTilesM, kTilesN = Tile::kTilesN;
  __shared__ alignas(128) uint4 stages[Tile::kStages][Tile::kAllRows * Tile::kStagePieces];
  const int64_t row_blocks = ceil_div(p.M, Tile::kRows);
  const int64_t m = blockIdx.x % row_blocks * Tile::kRows, n = blockIdx.x / row_blocks * Tile::kColumns;
  const int64_t steps = ceil_div(p.words, Tile::kStageWords);

  int32_t c[kTilesM][kTilesN][4] = {};
  RowCounts<Tile> counts;
  for (int64_t step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) copy_stage<Tile>(p, m, n, step * Tile::kStageWords, stages[step]);
    ptx::commit_copies();
  }
  for (int64_t step = 0; step < steps; ++step) {
    ptx::wait_copies<Tile::kStages - 2>();
    __syncthreads();  // this stage has come, and all warps are done with the one before, which is refilled next
    const int64_t next = step + Tile::kStages - 1;
    if (next < steps) copy_stage<Tile>(p, m, n, next * Tile::kStageWords, stages[next % Tile::kStages]);
    ptx::commit_copies();
    const uint4* stage = stages[step % Tile::kStages];
    multiply_step<Tile>(stage, 0, c, counts);
    multiply_step<Tile>(stage, 1, c, counts);
  }
  finish<Tile>(p, static_cast<uint32_t>(steps * Tile::kStageWords * kWordBits), c, counts);

  const int group = lane_id() / 4, quad = lane_id() % 4;
  const int64_t warp_m = m + warp_id() / Tile::kWarpsN * kTilesM * 16;
  const int64_t warp_n = n + warp_id() % Tile::kWarpsN * kTilesN * 8;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = warp_m + i * 16 + half * 8 + group;
      if constexpr (kOutput == Output::kProduct) {
        if (row >= p.M) continue;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          const int64_t column = warp_n + j * 8 + quad * 2;
          int32_t* y = p.y + row * p.N + column;
          const int32_t y0 = c[i][j][2 * half], y1 = c[i][j][2 * half + 1];
          if (p.N % 2 == 0 && column < p.N) {
            *reinterpret_cast<int2*>(y) = make_int2(y0, y1);
          } else {
            if (column < p.N) y[0] = y0;
            if (column + 1 < p.N) y[1] = y1;
          }
        }
      } else {
        uint32_t bits = 0;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int64_t column = warp_n + j * 8 + quad * 2 + e;
            if (column < p.N) {
              const bool bit = (c[i][j][2 * half + e] >= p.threshold[column]) != (p.flip[column] != 0);
              bits |= static_cast<uint32_t>(bit) << (j * 8 + quad * 2 + e);
            }
          }
        bits |= __shfl_xor_sync(kAllLanes, bits, 1);
        bits |= __shfl_xor_sync(kAllLanes, bits, 2);
        const int64_t words = words_for(p.N);
        if (quad == 0 && row < p.M && warp_n < words * kWordBits)
          reinterpret_cast<uint32_t*>(p.y_bits + row * words)[warp_n / 32] = bits;
      }
    }
  }
}

template <typename Tile>
cudaError_t launch_tiles(const BinaryMatmul& p, cudaStream_t stream) {
  const bool product = p.y != nullptr;
  const int64_t columns = product ? p.N : words_for(p.N) * kWordBits;  // padding of packed output is written as well
  const auto blocks = static_cast<unsigned>(ceil_div(p.M, Tile::kRows) * ceil_div(columns, Tile::kColumns));
  const auto kernel =
      product ? binary_matmul_kernel<Tile, Output::kProduct> : binary_matmul_kernel<Tile, Output::kThreshold>;
  ENGRAM_LAUNCH(kernel, blocks, Tile::kThreads, stream, p);
  return cudaGetLastError();
}

// Large tiles where they make enough blocks for all multiprocessors, else small ones.
template <Gate kGate>
cudaError_t launch_tile_form(const BinaryMatmul& p, int multiprocessors, cudaStream_t stream) {
  using Large = BinaryTile<2, 4, 4, kGate>;
  using Small = BinaryTile<2, 2, 2, kGate>;
  if (ceil_div(p.M, Large::kRows) * ceil_div(p.N, Large::kColumns) >= multiprocessors)
    return launch_tiles<Large>(p, stream);
  return launch_tiles<Small>(p, stream);
}

inline cudaError_t binary_matmul_tiles(const BinaryMatmul& p, int multiprocessors, cudaStream_t stream) {
  if (p.gate == nullptr) return launch_tile_form<Gate::kNone>(p, multiprocessors, stream);
  if (p.gate_stride == 0) return launch_tile_form<Gate::kShared>(p, multiprocessors, stream);
  return launch_tile_form<Gate::kPerSample>(p, multiprocessors, stream);
}

}  // namespace engram::cuda
