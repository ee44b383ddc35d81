// Arguments of the CUDA kernels and their launchers, known to the bindings. Pointers are of the device, tensors
// contiguous, packed rows 16-byte aligned (core/bits.h). Launchers queue work on `stream` (a cudaStream_t) of the
// current device and return a cudaError_t, 0 for none; nothing here waits for the device.
//
// M samples, N outputs, K inputs, words = words_for(K). A gate_stride is in words: 0 for one gate shared by all
// samples. Where `nan` is given, a kernel that meets a NaN writes 1 there; it is host memory that the device sees.
#pragma once

#include <cstdint>

#include "core/window.h"

namespace engram::cuda {

enum class Element { kFloat32, kBFloat16, kFloat16, kUint8 };

struct PackSigns {
  const void* x;  // [rows, K] float32, bfloat16 or float16
  Element element;
  int64_t rows, K, words;
  uint64_t* bits;  // [rows, words]
  int32_t* nan;
};

struct PackWindow {
  const float* x;  // [rows, K]
  float width;
  const uint64_t* gate;  // null: every unit
  int64_t gate_stride;
  int64_t rows, K, words;
  uint64_t* bits;  // [rows, words]
};

struct UnpackSigns {
  const uint64_t* bits;  // [rows, words]
  int64_t rows, K, words;
  int size;              // bytes of an element: 1, 2, 4 or 8
  uint64_t plus, minus;  // bit patterns of +1 and -1
  void* out;             // [rows, K]
};

struct ValidGate {
  const uint64_t* gate;  // [rows, words], null: every unit
  int64_t rows, K, words;
  uint64_t* out;  // [rows, words]
};

// Padding of x and w counts, unless a gate leaves it out, and so does that of the gate.
struct BinaryMatmul {
  const uint64_t* x;     // [M, words]
  const uint64_t* w;     // [N, words]
  const uint64_t* gate;  // [words] or [M, words], null: every unit recruited
  int64_t gate_stride;
  int64_t M, N, K, words;
  int32_t* y;  // [M, N]; null for binary_threshold
  // binary_threshold: bit n of row m is (y[m,n] >= threshold[n]) != flip[n]
  const int32_t* threshold;  // [N]
  const uint8_t* flip;       // [N], 0 or 1
  uint64_t* y_bits;          // [M, words_for(N)]
};

// y[r,v] = mask[r,v] sum_i a[r,i] s[i,v], with s in {-1, 0, 1} from packed signs and a gate.
struct SignProduct {
  const void* a;  // [R, I], or with a_transposed [I, R]
  Element element;
  bool a_transposed;
  const uint64_t* signs;  // [V, words_for(I)], or with signs_by_row [I, words_for(V)]
  bool signs_by_row;
  const uint64_t* gate;  // by row like signs, or null; s is 0 where the gate is
  int64_t gate_stride;
  const uint64_t* mask;  // [R or 1, words_for(V)] or null
  int64_t mask_stride;
  void* y;  // [R, V] of the element of a; int32 for uint8
  int64_t R, I, V;
};

struct UnfoldBits {
  const uint64_t* bits;  // [samples, words_for(units)]
  int64_t samples;
  Window window;
  int64_t group;
  uint64_t* rows;  // [samples * out_pixels, words]
  int64_t words;   // words_for(group_units)
};

struct SampleEngram {
  const float* score;  // [M, K]
  uint64_t* gate;      // [M, words]
  int64_t M, K, words;
  bool bernoulli;
  int64_t count;              // recruited units per sample (Gumbel-top-k)
  uint64_t threshold;         // recruited where the 32-bit draw is below it (Bernoulli)
  float inverse_temperature;  // 0: scores ignored; negative: no noise
  uint64_t seed;
  uint32_t offset;
  uint64_t first_row;
  uint32_t* keys;      // [M, key_stride] scratch for Gumbel-top-k
  int64_t key_stride;  // K rounded up to a multiple of 4
  int32_t* nan;
};

int launch_pack_signs(const PackSigns& p, void* stream);
int launch_pack_window(const PackWindow& p, void* stream);
int launch_unpack_signs(const UnpackSigns& p, void* stream);
int launch_valid_gate(const ValidGate& p, void* stream);
int launch_binary_matmul(const BinaryMatmul& p, void* stream);
int launch_sign_product(const SignProduct& p, void* stream);
int launch_unfold_bits(const UnfoldBits& p, void* stream);
int launch_sample_engram(const SampleEngram& p, void* stream);

bool built();  // with CUDA kernels
// Makes `device` current and tells which was before, for leave_device. An error if there is no driver or the device is
// older than the kernels.
int use_device(int device, int* previous);
int leave_device(int previous);
// Host memory in which kernels report NaNs, one flag for each NaNSource; allocated at the first call.
enum NaNSource { kPackSigns, kSampleEngram, kMetaplasticAdam, kNaNSources };
int nan_flags(int32_t** flags);
const char* error_text(int error);
// Whether work queued on the stream is recorded in a graph, which replays it with the arguments that it has now.
int is_capturing(void* stream, bool* capturing);

}  // namespace engram::cuda
