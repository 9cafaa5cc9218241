// Linear layers on a team: checks, the split into items, and the helpers that a loader needs.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>
#include <utility>

#include "kernels.h"
#include "split.h"
#include "team.h"

namespace qlm {

namespace {

// Features of a group: no dimension of a model comes near; products of sizes stay far inside int64.
constexpr int64_t MOST_FEATURES = int64_t{1} << 24;
// int32 sums of so many products of 255 and 127 are exact; qlm/kernels/ops.py has the same bound.
constexpr int64_t MOST_INT8_FEATURES = 66310;

constexpr int32_t MOST_RANK = 1 << 16;

int check_gptq(const qlm_linear &l) {
  const int64_t period = l.bits == 3 ? 32 : 32 / (l.bits > 0 ? l.bits : 1);
  if (l.bits != 2 && l.bits != 3 && l.bits != 4 && l.bits != 8)
    return fail(QLM_BAD_ARGUMENT, "gptq linear: %d bits; 2, 3, 4 and 8 are known", l.bits);
  if (l.in_features % period || l.out_features % 4)
    return fail(QLM_BAD_ARGUMENT, "gptq linear: %lld in, %lld out features; %d bits need multiples of %lld and 4",
                (long long)l.in_features, (long long)l.out_features, l.bits, (long long)period);
  if (l.group_size < 1 || l.group_size % period || l.in_features % l.group_size)
    return fail(QLM_BAD_ARGUMENT,
                "gptq linear: groups of %lld of %lld in features; the kernels need a divisor that is a multiple of %lld",
                (long long)l.group_size, (long long)l.in_features, (long long)period);
  if (l.strip < 0 || l.strip % 128)
    return fail(QLM_BAD_ARGUMENT, "gptq linear: strips of %d out features; expected 0 or a multiple of 128", l.strip);
  if (!l.scale || !is_float(l.scale_dtype) || !l.zero_point)
    return fail(QLM_BAD_ARGUMENT, "gptq linear: scales or zero points are missing");
  if (l.order)
    for (int64_t i = 0; i < l.in_features; ++i)
      if (l.order[i] < 0 || l.order[i] >= l.in_features)
        return fail(QLM_BAD_ARGUMENT, "gptq linear: order[%lld] is %d; expected 0 to %lld", (long long)i, l.order[i],
                    (long long)l.in_features - 1);
  return QLM_OK;
}

int check_nf4(const qlm_linear &l) {
  if (l.block < 64 || l.block % 64 || l.in_features % l.block)
    return fail(QLM_BAD_ARGUMENT,
                "nf4 linear: blocks of %lld in rows of %lld; the kernels need a multiple of 64 that divides the row",
                (long long)l.block, (long long)l.in_features);
  const bool nested = l.absmax_code && l.nested_code && l.nested_absmax && l.nested_block > 0;
  if (!l.scale && !nested) return fail(QLM_BAD_ARGUMENT, "nf4 linear: absmax is missing");
  if (l.scale && l.scale_dtype != QLM_F32) return fail(QLM_BAD_ARGUMENT, "nf4 linear: absmax is not float32");
  return QLM_OK;
}

int check(const qlm_linear &l) {
  if (l.in_features < 1 || l.out_features < 1 || l.in_features > MOST_FEATURES || l.out_features > MOST_FEATURES)
    return fail(QLM_BAD_ARGUMENT, "linear: %lld in, %lld out features; expected 1 to %lld", (long long)l.in_features,
                (long long)l.out_features, (long long)MOST_FEATURES);
  if (!l.weight) return fail(QLM_BAD_ARGUMENT, "linear: the weight is missing");
  if (l.rank < 0 || l.rank > MOST_RANK || (l.rank > 0 && (!l.adapter_a || !l.adapter_b)))
    return fail(QLM_BAD_ARGUMENT, "linear: an adapter of rank %d; expected 0 to %d, with both matrices", l.rank, MOST_RANK);
  switch (l.format) {
    case QLM_FLOAT:
      if (is_float(l.weight_dtype)) return QLM_OK;
      return fail(QLM_BAD_ARGUMENT, "float linear: dtype %d; expected float32, float16 or bfloat16", l.weight_dtype);
    case QLM_INT8:
      if (l.in_features > MOST_INT8_FEATURES)
        return fail(QLM_BAD_ARGUMENT, "int8 linear: %lld in features; int32 sums hold at most %lld",
                    (long long)l.in_features, (long long)MOST_INT8_FEATURES);
      if (l.scale && is_float(l.scale_dtype) && l.row_sum) return QLM_OK;
      return fail(QLM_BAD_ARGUMENT, "int8 linear: scales or row sums are missing");
    case QLM_GPTQ: return check_gptq(l);
    case QLM_NF4: return check_nf4(l);
  }
  return fail(QLM_BAD_ARGUMENT, "linear: format %d is not known", l.format);
}

// `work(thread)` on the team, which reads at `data`; what it throws (no thread to be had, in a forked process) and a
// shrunken file as a status.
template <typename Data, typename F> int run_on(qlm_team *team, const Data &data, F work) {
  try {
    team->run(std::move(work));
  } catch (const std::exception &error) {
    return fail(QLM_NO_MEMORY, "%s", error.what());
  }
  return shrank(data) ? fail(QLM_FILE_SHRANK, "a mapped file became shorter while it was read") : QLM_OK;
}

}  // namespace

bool shrank(const qlm_linear &l) {
  const void *const read[] = {l.weight, l.scale,       l.bias,        l.row_sum,      l.zero_point,
                              l.order,  l.absmax_code, l.nested_code, l.nested_absmax};
  return std::any_of(std::begin(read), std::end(read), [](const void *data) { return shrank(data); });
}

namespace {

int64_t format_bytes(const Kernels &kernels, const qlm_linear &linear, int64_t tokens) {
  return round_up(kernels.linear[linear.format].prepared_bytes(linear, tokens), 64);
}

}  // namespace

int64_t prepared_bytes(const Kernels &kernels, const qlm_linear &linear, int64_t tokens) {
  return format_bytes(kernels, linear, tokens) + tokens * linear.rank * static_cast<int64_t>(sizeof(float));
}

void prepare(const Kernels &kernels, const qlm_linear &linear, int64_t tokens, int64_t t, const float *x, void *prepared) {
  kernels.linear[linear.format].prepare(linear, tokens, t, x, prepared);
  if (linear.rank == 0) return;
  void *const behind = static_cast<char *>(prepared) + format_bytes(kernels, linear, tokens);
  kernels.low_rank_down(linear, x, static_cast<float *>(behind) + t * linear.rank);
}

void run(const Kernels &kernels, const qlm_linear &linear, int64_t tokens, const void *prepared, int64_t o0, int64_t o1,
         Epilogue epilogue, float *y, int64_t y_stride) {
  const LinearKernel &kernel = kernels.linear[linear.format];
  if (linear.rank == 0) return kernel.run(linear, tokens, prepared, o0, o1, epilogue, y, y_stride);
  kernel.run(linear, tokens, prepared, o0, o1, Epilogue{QLM_NONE, epilogue.add}, y, y_stride);
  const void *const behind = static_cast<const char *>(prepared) + format_bytes(kernels, linear, tokens);
  kernels.low_rank_up(linear, tokens, static_cast<const float *>(behind), o0, o1, epilogue.activation, y, y_stride);
}

bool same_preparation(const qlm_linear &a, const qlm_linear &b) {
  if (a.format != b.format || a.in_features != b.in_features || a.rank != 0 || b.rank != 0) return false;
  switch (a.format) {
    case QLM_INT8: return a.symmetric_input == b.symmetric_input;
    case QLM_GPTQ: {
      if (a.bits != b.bits || a.group_size != b.group_size) return false;
      if (!a.order || !b.order) return a.order == b.order;
      return a.order == b.order || !std::memcmp(a.order, b.order, static_cast<size_t>(a.in_features) * 4);
    }
    default: return true;
  }
}

}  // namespace qlm

using namespace qlm;

int qlm_linear_check(const qlm_linear *linear) { return check(*linear); }

int qlm_linear_forward(qlm_team *team, const qlm_linear *linear, int64_t tokens, const float *x, int64_t x_stride,
                       float *y, int64_t y_stride) {
  if (int status = check(*linear)) return status;
  if (tokens < 0 || x_stride < linear->in_features || y_stride < linear->out_features)
    return fail(QLM_BAD_ARGUMENT, "linear: %lld tokens, strides %lld and %lld for %lld in, %lld out features",
                (long long)tokens, (long long)x_stride, (long long)y_stride, (long long)linear->in_features,
                (long long)linear->out_features);
  if (tokens == 0) return QLM_OK;
  const Kernels &kernels = selected();
  Buffer prepared;
  try {
    prepared.reserve(prepared_bytes(kernels, *linear, tokens));
  } catch (const std::bad_alloc &) {
    return fail(QLM_NO_MEMORY, "linear: no memory for the activations of %lld tokens", (long long)tokens);
  }
  // Two calls and no barrier: a borrowed pool has none.
  const int status = run_on(team, *linear, [&](int) {
    team->each(tokens, [&](int64_t t) { prepare(kernels, *linear, tokens, t, x + t * x_stride, prepared.bytes()); });
  });
  if (status != QLM_OK) return status;
  const Split items = split(linear->out_features, weight_bytes(*linear), kernels.linear[linear->format].granule(*linear), team->threads());
  return run_on(team, *linear, [&](int) {
    team->each(items.items, [&](int64_t item) {
      run(kernels, *linear, tokens, prepared.bytes(), items.start(item), items.start(item + 1), Epilogue{}, y, y_stride);
    });
  });
}

int qlm_int8_row_sums(qlm_team *team, const int8_t *weight, int64_t out_features, int64_t in_features, int32_t *sums) {
  if (out_features < 1 || in_features < 1 || in_features > MOST_INT8_FEATURES)
    return fail(QLM_BAD_ARGUMENT, "int8 row sums: %lld in, %lld out features; in features are 1 to %lld",
                (long long)in_features, (long long)out_features, (long long)MOST_INT8_FEATURES);
  return run_on(team, weight, [&](int) {
    team->each(ceil_div(out_features, 64), [&](int64_t item) {
      for (int64_t o = item * 64; o < out_features && o < item * 64 + 64; ++o)
        sums[o] = static_cast<int32_t>(selected().sum_i8(weight + o * in_features, in_features));
    });
  });
}

int qlm_int8_quantize_rows(qlm_team *team, const void *weight, int32_t dtype, int64_t out_features, int64_t in_features,
                           int8_t *codes, float *scale, int32_t *sums) {
  if (out_features < 1 || in_features < 1 || in_features > MOST_INT8_FEATURES || !is_float(dtype))
    return fail(QLM_BAD_ARGUMENT, "int8 rows: %lld in, %lld out features of dtype %d; in features are 1 to %lld",
                (long long)in_features, (long long)out_features, dtype, (long long)MOST_INT8_FEATURES);
  const int64_t row_bytes = in_features * (dtype == QLM_F32 ? 4 : 2);
  const int status = run_on(team, weight, [&](int) {
    team->each(ceil_div(out_features, 64), [&](int64_t item) {
      for (int64_t o = item * 64; o < out_features && o < item * 64 + 64; ++o) {
        int8_t *row = codes + o * in_features;
        selected().quantize_row_i8(static_cast<const char *>(weight) + o * row_bytes, dtype, in_features, row, scale + o);
        sums[o] = static_cast<int32_t>(selected().sum_i8(row, in_features));
      }
    });
  });
  if (status != QLM_OK) return status;
  for (int64_t o = 0; o < out_features; ++o)
    if (!std::isfinite(scale[o]))
      return fail(QLM_NOT_FINITE, "int8 rows: row %lld has values that are not finite", (long long)o);
  return QLM_OK;
}

int qlm_gptq_arrange(qlm_team *team, const int32_t *qweight, int32_t bits, int64_t in_features, int64_t out_features,
                     const int32_t *order, int32_t strip, int32_t *arranged) {
  qlm_linear l = {};
  l.format = QLM_GPTQ, l.bits = bits, l.in_features = in_features, l.out_features = out_features;
  l.group_size = in_features, l.weight = qweight, l.order = order, l.strip = strip;
  l.scale = l.zero_point = reinterpret_cast<const uint8_t *>("");
  if (int status = check(l)) return status;
  const int64_t period = bits == 3 ? 32 : 32 / bits, words = bits == 3 ? 3 : 1;  // in features; rows of words
  const int64_t rows = in_features * bits / 32, side = strip == 0 ? out_features : strip;
  return run_on(team, l, [&](int) {
    // One item: a period of one strip. Strip after strip, so that each page of the file is read in one go.
    const int64_t strips = ceil_div(out_features, side);
    team->each(strips * (in_features / period), [&](int64_t item) {
      const int64_t first = item % strips * side, from_period = item / strips;
      const int64_t width = std::min(side, out_features - first);
      int32_t *to = arranged + first * rows + from_period * words * width;
      const int32_t *from = qweight + first;
      if (!order) {
        for (int64_t w = 0; w < words; ++w)
          std::memcpy(to + w * width, from + (from_period * words + w) * out_features, static_cast<size_t>(width) * 4);
        return;
      }
      std::memset(to, 0, static_cast<size_t>(words * width) * 4);
      for (int64_t k = 0; k < period; ++k) {
        const int64_t source = order[from_period * period + k];
        const int64_t from_bit = source % period * bits, to_bit = k * bits;
        const int32_t *word = from + (source / period * words + from_bit / 32) * out_features;
        int32_t *out = to + to_bit / 32 * width;
        for (int64_t o = 0; o < width; ++o) {
          // A code may go on in the next word, with 3 bits.
          uint64_t code = static_cast<uint32_t>(word[o]);
          if (from_bit % 32 + bits > 32) code |= static_cast<uint64_t>(static_cast<uint32_t>(word[out_features + o])) << 32;
          code = (code >> (from_bit % 32) & ((1u << bits) - 1)) << (to_bit % 32);
          out[o] = static_cast<int32_t>(static_cast<uint32_t>(out[o]) | static_cast<uint32_t>(code));
          if (code >> 32)
            out[width + o] = static_cast<int32_t>(static_cast<uint32_t>(out[width + o]) | static_cast<uint32_t>(code >> 32));
        }
      }
    });
  });
}

int qlm_read_bandwidth(qlm_team *team, const void *data, int64_t bytes, double *gigabytes_per_s) {
  if (bytes < 1) return fail(QLM_BAD_ARGUMENT, "read bandwidth: %lld bytes", (long long)bytes);
  constexpr int64_t ITEM = 1 << 20;
  uint64_t seen[256] = {};
  const auto start = std::chrono::steady_clock::now();
  const int status = run_on(team, data, [&](int thread) {
    team->each(ceil_div(bytes, ITEM), [&](int64_t item) {
      const int64_t from = item * ITEM;
      seen[thread] ^= selected().read(static_cast<const char *>(data) + from, bytes - from < ITEM ? bytes - from : ITEM);
    });
  });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (status != QLM_OK) return status;
  // What was read must be used, or a compiler might leave the reading out.
  volatile uint64_t all = 0;
  for (uint64_t one : seen) all = all ^ one;
  *gigabytes_per_s = static_cast<double>(bytes) / 1e9 / seconds;
  return QLM_OK;
}
