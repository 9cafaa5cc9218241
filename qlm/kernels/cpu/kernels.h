// The table of kernels that every instruction set fills in, and what they share. Nothing here is exported.
//
// linear_*.cpp, attention.cpp and elementwise.cpp are compiled once for each instruction set, each time in a namespace of
// its own (QLM_ISA, set by CMakeLists.txt). Such files call no functions of the C++ library: the linker keeps one copy of
// an inline function, and it could be the one compiled for AVX-512. memcpy and memset are fine.
#pragma once

#include <cstdint>

#include "abi.h"

namespace qlm {

constexpr int64_t PAGE = 64;  // positions in a page of the cache

static inline bool is_float(int32_t dtype) { return dtype == QLM_F32 || dtype == QLM_F16 || dtype == QLM_BF16; }

// What is done with the sums of a linear before they are stored.
struct Epilogue {
  int32_t activation = QLM_NONE;
  bool add = false;  // y += activation(sum + bias) instead of y =
};

// One weight format. `prepare` turns one token's input into what `run` reads (quantized, permuted, interleaved with its
// neighbours); the layout of `prepared` is the format's own and depends on (linear, tokens). Both may be called for
// different tokens, different out features by several threads at once.
struct LinearKernel {
  // Bytes of `prepared` for `tokens` tokens; its start is aligned to 64.
  int64_t (*prepared_bytes)(const qlm_linear &linear, int64_t tokens);
  // x: float32 [I], token number t of `tokens`.
  void (*prepare)(const qlm_linear &linear, int64_t tokens, int64_t t, const float *x, void *prepared);
  // Out features o0 <= o < o1 of all tokens; o0 is a multiple of `granule(linear)`, o1 too unless it is O.
  void (*run)(const qlm_linear &linear, int64_t tokens, const void *prepared, int64_t o0, int64_t o1, Epilogue epilogue,
              float *y, int64_t y_stride);
  int64_t (*granule)(const qlm_linear &linear);
};

// Where the pages of one sequence's cache lie, for one layer. A page holds, for each kv head in turn: keys transposed
// [D][PAGE], then values [PAGE][D]; with QLM_I8 followed by float32 scales of the keys [PAGE], then of the values [PAGE].
// Positions that were never written are zero.
struct CacheView {
  void *const *pages;      // of the sequence, in order: the address of this layer's part of each
  int32_t dtype;           // qlm_dtype
  int64_t kv_heads, head_dim;
};

// One head's queries against the cache. Row r may look at positions 0 <= p < visible[r]. q: rows `q_stride` apart,
// already rotated, not scaled. out: the same shape. `scratch`: attention_scratch_bytes(max(visible)) bytes, 64-aligned.
// The result of a row does not depend on the rows beside it.
struct AttentionTask {
  CacheView cache;
  int64_t kv_head, rows;   // rows <= ATTENTION_ROWS
  const float *const *q;   // [rows] -> [D]
  float *const *out;       // [rows] -> [D]
  const int64_t *visible;  // [rows], each at least 1
  float scale;
};
constexpr int64_t ATTENTION_ROWS = 16;

struct Kernels {
  LinearKernel linear[4];  // by qlm_format
  // A linear's adapter, `rank` > 0: hidden [rank] = A x; then y = activation(y + B hidden) for o0 <= o < o1 of all tokens, hidden
  // [tokens, rank].
  void (*low_rank_down)(const qlm_linear &linear, const float *x, float *hidden);
  void (*low_rank_up)(const qlm_linear &linear, int64_t tokens, const float *hidden, int64_t o0, int64_t o1, int32_t activation,
                      float *y, int64_t y_stride);

  // LayerNorm over width E, two-pass in float32; weight and bias may be NULL. y may be x.
  void (*layer_norm)(const float *x, const qlm_norm &norm, float eps, int64_t width, float *y);
  // Row `id` of a table [V, width] of `dtype`, to float32; with `add`, added to y.
  void (*embed)(const void *table, int32_t dtype, int64_t id, int64_t width, bool add, float *y);
  // Rotate the first `dims` of x [D] in place, halves paired (x[i], x[i + dims/2]); cosine and sine: float32 [dims/2].
  void (*rotate)(float *x, int64_t dims, const float *cosine, const float *sine);
  // Store one position's key and value (float32 [D] each) of one kv head. False if one of them is not finite, or not
  // finite any more in the cache's dtype (float16 ends at 65504).
  bool (*cache_store)(const CacheView &cache, int64_t kv_head, int64_t position, const float *k, const float *v);
  int64_t (*attention_scratch_bytes)(int64_t visible);
  void (*attention)(const AttentionTask &task, void *scratch);
  // log(sum(exp(x))) of float32 [width]; NaN or +inf if one of them is in x.
  double (*log_sum_exp)(const float *x, int64_t width);
  // Whether all of x [width] is finite.
  bool (*all_finite)(const float *x, int64_t width);

  int64_t (*sum_i8)(const int8_t *x, int64_t count);
  // One row [I] of a float weight to int8: scale = max|x| / 127 (0 for a row of zeros), code = round(x / scale).
  void (*quantize_row_i8)(const void *row, int32_t dtype, int64_t width, int8_t *codes, float *scale);
  // Read `bytes` from `data` with wide loads and give something that depends on all of them.
  uint64_t (*read)(const void *data, int64_t bytes);
};

// The tables that were compiled in; CMakeLists.txt defines which.
namespace scalar { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avxvnni { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }

// The table in use (dispatch.cpp).
const Kernels &selected();
// Whether that is avx512vnni and the CPU has AVX512-BF16 as well.
bool has_avx512_bf16();

// A linear with its adapter, if it has one, as `LinearKernel` (linear.cpp). What the adapter needs of an input lies behind what the
// format prepared. Nothing is added to an activation where there is an adapter.
int64_t prepared_bytes(const Kernels &kernels, const qlm_linear &linear, int64_t tokens);
void prepare(const Kernels &kernels, const qlm_linear &linear, int64_t tokens, int64_t t, const float *x, void *prepared);
void run(const Kernels &kernels, const qlm_linear &linear, int64_t tokens, const void *prepared, int64_t o0, int64_t o1,
         Epilogue epilogue, float *y, int64_t y_stride);

// Whether one preparation serves both linears: they read the same input, in the same layout.
bool same_preparation(const qlm_linear &a, const qlm_linear &b);

// Remember the line for qlm_error() and return the status. (error.cpp; a printf format.)
int fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Whether any registered file has shrunk: no, but for the strangest moments, and quick to say (mapping.cpp).
bool any_shrank();
// Whether `data` lies in a registered range whose file has shrunk. It stays so until that range is unregistered,
// because the zeros that its reader got stay too.
bool shrank(const void *data);
// The same for all that a linear reads (linear.cpp).
bool shrank(const qlm_linear &linear);

}  // namespace qlm
