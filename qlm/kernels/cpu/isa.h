// What the files that are compiled once for each instruction set define, for table.cpp to collect.
#pragma once

#include "kernels.h"

namespace qlm {
namespace QLM_ISA {

extern const LinearKernel linear_float, linear_int8, linear_gptq, linear_nf4;  // linear_*.cpp

// low_rank.cpp
void low_rank_down(const qlm_linear &linear, const float *x, float *hidden);
void low_rank_up(const qlm_linear &linear, int64_t tokens, const float *hidden, int64_t o0, int64_t o1, int32_t activation,
                 float *y, int64_t y_stride);

// elementwise.cpp
void layer_norm(const float *x, const qlm_norm &norm, float eps, int64_t width, float *y);
void embed(const void *table, int32_t dtype, int64_t id, int64_t width, bool add, float *y);
void rotate(float *x, int64_t dims, const float *cosine, const float *sine);
double log_sum_exp(const float *x, int64_t width);
bool all_finite(const float *x, int64_t width);

// attention.cpp
bool cache_store(const CacheView &cache, int64_t kv_head, int64_t position, const float *k, const float *v);
int64_t attention_scratch_bytes(int64_t visible);
void attention(const AttentionTask &task, void *scratch);

// linear_int8.cpp
int64_t sum_i8(const int8_t *x, int64_t count);
void quantize_row_i8(const void *row, int32_t dtype, int64_t width, int8_t *codes, float *scale);
uint64_t read(const void *data, int64_t bytes);

}  // namespace QLM_ISA
}  // namespace qlm
