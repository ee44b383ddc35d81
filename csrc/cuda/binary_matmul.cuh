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
// to c but in the last form, where ~w counts it. |x|, |w| and |g| are counted on the fragments in registers, and
// exchanged at the end.
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
  static constexpr int kBlocksAtOnce = kTilesM == 2 ? 3 : 1;  // of a multiprocessor: 168 registers a thread, or 255
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

// A thread's part of the copies of a stage: one piece of every kStep-th row of x, of w and of the gate. What does not
// change from stage to stage is computed once: copies would otherwise take more instructions than products.
template <typename Tile>
class StageCopies {
 public:
  __device__ __forceinline__ StageCopies(const BinaryMatmul& p, int64_t m, int64_t n)
      : words_left_(p.words - kWord * piece()),
        x_(first_row(p.x, m, p.words)),
        w_(first_row(p.w, n, p.words)),
        x_rows_(rows_left(p.M, m)),
        w_rows_(rows_left(p.N, n)),
        stride_(p.words) {
    if (Tile::kGate == Gate::kPerSample) gate_ = first_row(p.gate, m, p.words);
    if (Tile::kGate == Gate::kShared) gate_ = p.gate + kWord * piece();
  }

  // Starts the copies of the words from `word` on.
  __device__ __forceinline__ void start(int64_t word, uint4* stage) const {
    const bool there = word < words_left_;
    uint4* to = stage + swizzled(row(), piece());
    copy_rows<Tile::kRows>(x_ + word, x_rows_, there, to);
    copy_rows<Tile::kColumns>(w_ + word, w_rows_, there, to + Tile::kRows * Tile::kStagePieces);
    uint4* gates = to + (Tile::kRows + Tile::kColumns) * Tile::kStagePieces;
    if (Tile::kGate == Gate::kPerSample) copy_rows<Tile::kRows>(gate_ + word, x_rows_, there, gates);
    if (Tile::kGate == Gate::kShared && row() == 0) ptx::copy_16(gates, gate_ + word, there);
  }

 private:
  static constexpr int kWord = 2;  // 64-bit words of a piece
  static constexpr int kStep = Tile::kThreads / Tile::kStagePieces;
  static_assert(Tile::kRows % kStep == 0 && Tile::kColumns % kStep == 0, "a thread copies as many rows as any other");
  static_assert(kStep % 8 == 0, "rows so far apart are swizzled alike");

  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / Tile::kStagePieces; }
  static __device__ __forceinline__ int piece() { return static_cast<int>(threadIdx.x) % Tile::kStagePieces; }
  static __device__ __forceinline__ const uint64_t* first_row(const uint64_t* rows, int64_t first, int64_t words) {
    return rows + (first + row()) * words + kWord * piece();
  }
  // Rows of a tile at `first` that exist, from this thread's first on.
  static __device__ __forceinline__ int rows_left(int64_t rows, int64_t first) {
    const int64_t left = rows - first < Tile::kRows + Tile::kColumns ? rows - first : Tile::kRows + Tile::kColumns;
    return static_cast<int>(left) - row();
  }

  template <int kRows>
  __device__ __forceinline__ void copy_rows(const uint64_t* from, int left, bool there, uint4* to) const {
#pragma unroll
    for (int r = 0; r < kRows; r += kStep)
      ptx::copy_16(to + r * Tile::kStagePieces, from + r * stride_, there && r < left);
  }

  const int64_t words_left_;
  const uint64_t* const x_;
  const uint64_t* const w_;
  const uint64_t* gate_ = nullptr;
  const int x_rows_, w_rows_;
  const int64_t stride_;
};

// Popcounts of the rows of x, or with a gate per sample of the gate, and of w. The warps that share rows share the
// counting: each counts tile warp_n of x, and every kWarpsM-th of w from warp_m on. POPC would take longer than the
// products otherwise. These are of rows `group` and `group + 8`, of columns `group` and of this lane's words.
template <typename Tile>
struct Counts {
  static_assert(Tile::kTilesM == Tile::kWarpsN && Tile::kTilesN % Tile::kWarpsM == 0, "every tile is counted once");
  int rows[2] = {}, columns[Tile::kTilesN / Tile::kWarpsM] = {}, shared_gate = 0;
};

// Adds to c and the counts the 256 bits that lie in pieces 2 step and 2 step + 1 of a stage.
template <typename Tile>
__device__ __forceinline__ void multiply_step(const uint4* stage, int step,
                                              int32_t (&c)[Tile::kTilesM][Tile::kTilesN][4], Counts<Tile>& counts) {
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
        if (kAndForm && i == warp_n) counts.rows[r % 2] += __popc(g[r]);
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
        counts.shared_gate += __popc(g[half]);
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
        if (i == warp_n) {
#pragma unroll
          for (int r = 0; r < 4; ++r) counts.rows[r % 2] += __popc(a[i][r]);
        }
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
        if (j % Tile::kWarpsM == warp_m) counts.columns[j / Tile::kWarpsM] += __popc(b[j][0]) + __popc(b[j][1]);
    }
    multiply_bits<kTilesM, kTilesN>(c, a, b);
  }
}

// Turns c into y, in place. padded: bits of the contraction that were multiplied, padding included. `exchange` has room
// for a count of every row and column of the block.
template <typename Tile>
__device__ __forceinline__ void finish(const BinaryMatmul& p, uint32_t padded, int32_t* exchange,
                                       int32_t (&c)[Tile::kTilesM][Tile::kTilesN][4], const Counts<Tile>& counts) {
  constexpr bool kCountsColumns = kAndForm && Tile::kGate != Gate::kPerSample;
  const int group = lane_id() / 4, quad = lane_id() % 4;
  const int warp_m = warp_id() / Tile::kWarpsN, warp_n = warp_id() % Tile::kWarpsN;
  int32_t* rows = exchange + warp_m * Tile::kTilesM * 16;
  int32_t* columns = exchange + Tile::kRows + warp_n * Tile::kTilesN * 8;
  if (kAndForm) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int count = sum_over_quad(counts.rows[half]);
      if (quad == 0) rows[warp_n * 16 + half * 8 + group] = count;
    }
  }
  if (kCountsColumns) {
#pragma unroll
    for (int j = 0; j < Tile::kTilesN / Tile::kWarpsM; ++j) {
      const int count = sum_over_quad(counts.columns[j]);
      if (quad == 0) columns[(j * Tile::kWarpsM + warp_m) * 8 + group] = count;
    }
  }
  if (kAndForm) __syncthreads();

  const int recruited = Tile::kGate == Gate::kShared ? sum_over_quad(counts.shared_gate) : static_cast<int>(p.K);
#pragma unroll
  for (int j = 0; j < Tile::kTilesN; ++j) {
#pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto row = kAndForm ? static_cast<uint32_t>(rows[i * 16 + half * 8 + group]) : 0u;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto column = kCountsColumns ? static_cast<uint32_t>(columns[j * 8 + quad * 2 + e]) : 0u;
          int32_t& y = c[i][j][2 * half + e];
          // Unsigned, since four times a count may pass 2^31 where the sum does not.
          const auto count = static_cast<uint32_t>(y);
          if (Tile::kGate == Gate::kPerSample)
            y = static_cast<int32_t>(kAndForm ? 2 * count - row : padded - count);
          else if (kAndForm)
            y = static_cast<int32_t>(4 * count - 2 * row - 2 * column + static_cast<uint32_t>(recruited));
          else
            y = static_cast<int32_t>(static_cast<uint32_t>(recruited) - 2 * count);
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

  const StageCopies<Tile> copies(p, m, n);
  int32_t c[kTilesM][kTilesN][4] = {};
  Counts<Tile> counts;
  for (int64_t step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) copies.start(step * Tile::kStageWords, stages[step]);
    ptx::commit_copies();
  }
  for (int64_t step = 0; step < steps; ++step) {
    ptx::wait_copies<Tile::kStages - 2>();
    __syncthreads();  // this stage has come, and all warps are done with the one before, which is refilled next
    const int64_t next = step + Tile::kStages - 1;
    if (next < steps) copies.start(next * Tile::kStageWords, stages[next % Tile::kStages]);
    ptx::commit_copies();
    const uint4* stage = stages[step % Tile::kStages];
    multiply_step<Tile>(stage, 0, c, counts);
    multiply_step<Tile>(stage, 1, c, counts);
  }
  if (kAndForm) __syncthreads();  // the stages have been read and make room for counts
  finish<Tile>(p, static_cast<uint32_t>(steps * Tile::kStageWords * kWordBits), reinterpret_cast<int32_t*>(stages), c,
               counts);

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

inline cudaError_t binary_matmul_tiles(const BinaryMatmul& p, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  if (p.gate == nullptr) return launch_tile_form<Gate::kNone>(p, multiprocessors, stream);
  if (p.gate_stride == 0) return launch_tile_form<Gate::kShared>(p, multiprocessors, stream);
  return launch_tile_form<Gate::kPerSample>(p, multiprocessors, stream);
}

}  // namespace engram::cuda
