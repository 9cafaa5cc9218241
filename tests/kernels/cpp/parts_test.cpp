// What lies between the linears, straight through the kernel table: norms, embedding, rotation, the cache and attention
// over it, log-sum-exp, int8 rows; against double, with every operand against a guard page.

#include <cfloat>
#include <memory>

#include "abi.h"
#include "check.h"
#include "kernels.h"
#include "tests.h"

namespace {

using qlm::Kernels;
using qlm::PAGE;

constexpr double EPSILON = 1.2e-7;  // of float32

struct Memory {
  Guarded a{1 << 20}, b{1 << 20}, c{1 << 20}, d{1 << 20}, e{1 << 20};
};

std::vector<float> normals(int64_t count, Random &random, float size = 1.0f) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float &value : values) value = size * random.normal();
  return values;
}
float *placed(Guarded &memory, const std::vector<float> &values) {
  float *const place = memory.place<float>(static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), place);
  return place;
}

void layer_norm(const Kernels &k, Memory &memory, Random &random) {
  for (int64_t width = 1; width <= 200; ++width) {
    std::vector<float> x = normals(width, random);
    if (width % 3 == 0)
      for (float &value : x) value += 100.0f;  // a mean that a one-pass variance would drown in
    const std::vector<float> weight = normals(width, random), bias = normals(width, random);
    qlm_norm norm = {nullptr, nullptr};
    if (width % 4 != 1) norm.weight = placed(memory.b, weight);
    if (width % 4 != 2) norm.bias = placed(memory.c, bias);
    const float *const input = placed(memory.a, x);
    float *const y = width % 5 == 0 ? const_cast<float *>(input) : memory.d.place<float>(width);
    k.layer_norm(input, norm, 1e-5f, width, y);
    double mean = 0, variance = 0;
    for (const float value : x) mean += static_cast<double>(value) / static_cast<double>(width);
    for (const float value : x) variance += std::pow(static_cast<double>(value) - mean, 2) / static_cast<double>(width);
    for (int64_t i = 0; i < width; ++i) {
      const size_t at = static_cast<size_t>(i);
      const double factor = (norm.weight ? static_cast<double>(weight[at]) : 1.0) / std::sqrt(variance + static_cast<double>(1e-5f));
      const double expected = (static_cast<double>(x[at]) - mean) * factor + (norm.bias ? static_cast<double>(bias[at]) : 0.0);
      const double tolerance = 4 * EPSILON * (std::fabs(factor) * (std::fabs(mean) + std::fabs(static_cast<double>(x[at]))) + std::fabs(expected) + 1);
      CHECK(std::fabs(static_cast<double>(y[i]) - expected) <= tolerance, "%s, width %d: %.9g, expected %.9g", qlm_isa_selected(),
            static_cast<int>(width), static_cast<double>(y[i]), expected);
    }
  }
}

void embed(const Kernels &k, Memory &memory, Random &random) {
  for (int64_t width = 1; width <= 100; ++width)
    for (const int32_t dtype : {QLM_F32, QLM_F16, QLM_BF16}) {
      const int64_t rows = 3, size = dtype == QLM_F32 ? 4 : 2;
      char *const table = memory.a.place<char>(rows * width * size + width % 2);  // unaligned for odd widths
      std::vector<double> values;
      for (int64_t i = 0; i < rows * width; ++i) {
        const float value = random.normal();
        const uint16_t half = dtype == QLM_F16 ? to_f16(value) : to_bf16(value);
        std::memcpy(table + i * size, dtype == QLM_F32 ? static_cast<const void *>(&value) : &half, static_cast<size_t>(size));
        values.push_back(dtype == QLM_F32 ? static_cast<double>(value) : dtype == QLM_F16 ? f16_value(half) : bf16_value(half));
      }
      const std::vector<float> before = normals(width, random);
      for (int64_t id = 0; id < rows; ++id)
        for (const bool add : {false, true}) {
          float *const y = placed(memory.b, before);
          k.embed(table, dtype, id, width, add, y);
          for (int64_t i = 0; i < width; ++i) {
            const float value = static_cast<float>(values[static_cast<size_t>(id * width + i)]);
            CHECK(y[i] == (add ? before[static_cast<size_t>(i)] + value : value), "%s, width %d, dtype %d", qlm_isa_selected(),
                  static_cast<int>(width), dtype);
          }
        }
    }
}

void rotate(const Kernels &k, Memory &memory, Random &random) {
  for (int64_t dims = 2; dims <= 130; dims += 2) {
    const int64_t half = dims / 2, width = dims + dims % 7;
    const std::vector<float> x = normals(width, random), angles = normals(half, random);
    std::vector<float> cosines, sines;
    for (const float angle : angles) cosines.push_back(std::cos(angle)), sines.push_back(std::sin(angle));
    float *const y = placed(memory.a, x);
    k.rotate(y, dims, placed(memory.b, cosines), placed(memory.c, sines));
    for (int64_t i = 0; i < width; ++i) {
      double expected = static_cast<double>(x[static_cast<size_t>(i)]);
      if (i < dims) {
        const double c = static_cast<double>(cosines[static_cast<size_t>(i % half)]);
        const double s = static_cast<double>(sines[static_cast<size_t>(i % half)]) * (i < half ? -1 : 1);
        expected = expected * c + static_cast<double>(x[static_cast<size_t>(i < half ? i + half : i - half)]) * s;
      }
      CHECK(std::fabs(static_cast<double>(y[i]) - expected) <= 1e-6, "%s, %d of %d dims", qlm_isa_selected(), static_cast<int>(i), static_cast<int>(dims));
    }
  }
}

void sums_and_tests(const Kernels &k, Memory &memory, Random &random) {
  for (int64_t width = 1; width <= 300; ++width) {
    std::vector<float> x = normals(width, random, width % 2 ? 1.0f : 50.0f);
    if (width % 7 == 0)
      for (float &value : x) value += 1000.0f;
    double most = -INFINITY, sum = 0;
    for (const float value : x) most = std::max(most, static_cast<double>(value));
    for (const float value : x) sum += std::exp(static_cast<double>(value) - most);
    const double expected = most + std::log(sum), value = k.log_sum_exp(placed(memory.a, x), width);
    CHECK(std::fabs(value - expected) <= 1e-6 + 1e-7 * std::fabs(expected), "%s, width %d: %.12g, expected %.12g", qlm_isa_selected(),
          static_cast<int>(width), value, expected);
    CHECK(k.all_finite(placed(memory.a, x), width));
    const size_t place = static_cast<size_t>(random.between(0, width - 1));
    for (const float odd : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> spoiled = x;
      spoiled[place] = odd;
      CHECK(!k.all_finite(placed(memory.a, spoiled), width), "%s, width %d, place %zu", qlm_isa_selected(), static_cast<int>(width), place);
      const double result = k.log_sum_exp(placed(memory.a, spoiled), width);
      CHECK(odd == -INFINITY || std::isnan(result) || result == INFINITY);
    }
    x[place] = FLT_MAX;
    CHECK(k.all_finite(placed(memory.a, x), width));

    int8_t *const codes = memory.b.place<int8_t>(width);
    int64_t total = 0;
    for (int64_t i = 0; i < width; ++i) total += codes[i] = static_cast<int8_t>(width % 3 ? random.bits() : 0x80);
    CHECK(k.sum_i8(codes, width) == total);
    k.read(codes, width);
  }
  const int64_t many = 900000;  // -128 in all of them: partial sums must not wrap around
  int8_t *const codes = memory.b.place<int8_t>(many);
  std::memset(codes, 0x80, static_cast<size_t>(many));
  CHECK(k.sum_i8(codes, many) == -128 * many);
}

// The cache of one sequence: pages whose last byte is at a guard page.
struct Cache {
  int64_t element, head_bytes, heads, dims;
  std::vector<std::unique_ptr<Guarded>> memory;
  std::vector<void *> pages;
  qlm::CacheView view;

  Cache(int32_t dtype, int64_t heads, int64_t dims, int64_t positions) : heads(heads), dims(dims) {
    element = dtype == QLM_F32 ? 4 : dtype == QLM_I8 ? 1 : 2;
    head_bytes = 2 * dims * PAGE * element + (dtype == QLM_I8 ? 8 * PAGE : 0);
    for (int64_t p = 0; p < positions; p += PAGE) {
      memory.emplace_back(new Guarded(static_cast<size_t>(heads * head_bytes)));
      pages.push_back(memory.back()->place<char>(heads * head_bytes));
      std::memset(pages.back(), 0, static_cast<size_t>(heads * head_bytes));
    }
    view = {pages.data(), dtype, heads, dims};
  }

  // Dim d of the key (or the value) that is stored.
  double stored(int64_t head, int64_t position, int64_t d, bool value) const {
    const char *const place = static_cast<const char *>(pages[static_cast<size_t>(position / PAGE)]) + head * head_bytes;
    const int64_t p = position % PAGE, index = value ? dims * PAGE + p * dims + d : d * PAGE + p;
    if (view.dtype == QLM_F32) {
      float x;
      std::memcpy(&x, place + 4 * index, 4);
      return static_cast<double>(x);
    }
    if (view.dtype == QLM_I8) {
      float scale;
      std::memcpy(&scale, place + 2 * dims * PAGE + 4 * (value ? PAGE + p : p), 4);
      return static_cast<double>(scale) * static_cast<int8_t>(place[index]);
    }
    uint16_t half;
    std::memcpy(&half, place + 2 * index, 2);
    return view.dtype == QLM_F16 ? f16_value(half) : bf16_value(half);
  }
};

void attention(const Kernels &k, Memory &memory, Random &random) {
  for (int round = 0; round < 160; ++round) {
    const int32_t dtype = round % 4;
    const int64_t heads = random.between(1, 3), dims = random.one_in(3) ? 16 * random.between(1, 8) : random.between(1, 130);
    const int64_t positions = random.one_in(3) ? random.between(1, 12) : random.between(1, 3 * PAGE + 10);
    Cache cache(dtype, heads, dims, positions);
    double key_size = 0;
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t head = 0; head < heads; ++head) {
        std::vector<float> keys = normals(dims, random), values = normals(dims, random, random.one_in(9) ? 0.0f : 2.0f);
        CHECK(k.cache_store(cache.view, head, p, placed(memory.a, keys), placed(memory.b, values)));
        for (const bool value : {false, true}) {
          double most = 0;
          for (const float x : value ? values : keys) most = std::max(most, std::fabs(static_cast<double>(x)));
          for (int64_t d = 0; d < dims; ++d) {
            const float x = (value ? values : keys)[static_cast<size_t>(d)];
            const double stored = cache.stored(head, p, d, value);
            const bool right = dtype == QLM_F32    ? stored == static_cast<double>(x)
                               : dtype == QLM_F16  ? stored == f16_value(to_f16(x))
                               : dtype == QLM_BF16 ? stored == bf16_value(to_bf16(x))
                                                   : std::fabs(stored - static_cast<double>(x)) <= 0.5001 * most / 127;
            CHECK(right, "%s, dtype %d, dim %d: %.9g of %.9g", qlm_isa_selected(), dtype, static_cast<int>(d), stored, static_cast<double>(x));
          }
        }
        for (const float x : keys) key_size = std::max(key_size, static_cast<double>(std::fabs(x)));
      }
    // Queries in rows that are apart, each ending at a guard page of its own for the last one.
    const int64_t rows = random.between(1, qlm::ATTENTION_ROWS), head = random.between(0, heads - 1);
    std::vector<std::vector<float>> q(static_cast<size_t>(rows));
    std::vector<const float *> q_rows;
    std::vector<float *> out_rows;
    std::vector<int64_t> visible;
    float *const q_memory = memory.c.place<float>(rows * dims), *const out_memory = memory.d.place<float>(rows * dims);
    int64_t furthest = 0;
    for (int64_t r = 0; r < rows; ++r) {
      q[static_cast<size_t>(r)] = normals(dims, random);
      std::copy(q[static_cast<size_t>(r)].begin(), q[static_cast<size_t>(r)].end(), q_memory + r * dims);
      q_rows.push_back(q_memory + r * dims);
      out_rows.push_back(out_memory + r * dims);
      visible.push_back(random.one_in(2) ? positions : random.between(1, positions));
      furthest = std::max(furthest, visible.back());
    }
    const float scale = random.one_in(4) ? 2.0f : 1.0f / std::sqrt(static_cast<float>(dims));
    const qlm::AttentionTask task = {cache.view, head, rows, q_rows.data(), out_rows.data(), visible.data(), scale};
    const int64_t bytes = k.attention_scratch_bytes(furthest), padded = (bytes + 63) / 64 * 64;
    CHECK(bytes > 0);
    char *const scratch = memory.e.place<char>(padded);
    CHECK(reinterpret_cast<uintptr_t>(scratch) % 64 == 0);
    std::memset(scratch, 0xff, static_cast<size_t>(padded));  // NaN: it is not read before it is written
    k.attention(task, scratch);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> scores;
      double most = -INFINITY, sum = 0;
      for (int64_t p = 0; p < visible[static_cast<size_t>(r)]; ++p) {
        double score = 0;
        for (int64_t d = 0; d < dims; ++d) score += static_cast<double>(q[static_cast<size_t>(r)][static_cast<size_t>(d)]) * cache.stored(head, p, d, false);
        scores.push_back(score * static_cast<double>(scale));
        most = std::max(most, scores.back());
      }
      for (double &score : scores) sum += score = std::exp(score - most);
      for (int64_t d = 0; d < dims; ++d) {
        double expected = 0, size = 0;
        for (size_t p = 0; p < scores.size(); ++p) {
          const double value = cache.stored(head, static_cast<int64_t>(p), d, true);
          expected += scores[p] / sum * value;
          size += scores[p] / sum * std::fabs(value);
        }
        // A score is off by float32's epsilon of the sum of |q k|, which moves its weight by as much.
        const double tolerance = size * (1e-5 + 4 * EPSILON * static_cast<double>(scale) * static_cast<double>(dims) * key_size) + 1e-9;
        const double value = static_cast<double>(out_memory[r * dims + d]);
        CHECK(std::fabs(value - expected) <= tolerance, "%s, dtype %d, %d dims, %d visible, row %d: %.9g, expected %.9g +- %.2g", qlm_isa_selected(),
              dtype, static_cast<int>(dims), static_cast<int>(visible[static_cast<size_t>(r)]), static_cast<int>(r), value, expected, tolerance);
      }
      // Alone, in other scratch memory: the same bits.
      std::vector<float> alone(static_cast<size_t>(dims));
      float *const alone_row = alone.data();
      const qlm::AttentionTask one = {cache.view, head, 1, &q_rows[static_cast<size_t>(r)], &alone_row, &visible[static_cast<size_t>(r)], scale};
      k.attention(one, scratch);
      CHECK(std::memcmp(alone.data(), out_memory + r * dims, static_cast<size_t>(dims) * sizeof(float)) == 0, "%s, dtype %d, %d dims, row %d",
            qlm_isa_selected(), dtype, static_cast<int>(dims), static_cast<int>(r));
    }
    // What a dtype cannot hold is refused.
    std::vector<float> good = normals(dims, random), bad = good;
    for (const float odd : {NAN, INFINITY, -INFINITY, 65520.0f}) {
      bad[static_cast<size_t>(random.between(0, dims - 1))] = odd;
      const bool holds = odd == 65520.0f && dtype != QLM_F16;
      CHECK(k.cache_store(cache.view, head, 0, placed(memory.a, bad), placed(memory.b, good)) == holds, "%s, dtype %d, %g", qlm_isa_selected(), dtype, static_cast<double>(odd));
      CHECK(k.cache_store(cache.view, head, 0, placed(memory.a, good), placed(memory.b, bad)) == holds);
      bad = good;
    }
  }
}

void low_rank(const Kernels &k, Memory &memory, Random &random) {
  for (int64_t width = 1; width <= 150; width += width < 70 ? 1 : 9) {
    qlm_linear linear = {};
    linear.in_features = width, linear.out_features = 151 - width, linear.rank = static_cast<int32_t>(1 + width % 5);
    const int64_t O = linear.out_features, r = linear.rank, tokens = 1 + width % 3;
    const std::vector<float> a = normals(r * width, random), b = normals(r * O, random), x = normals(tokens * width, random), y = normals(tokens * O, random);
    linear.adapter_a = placed(memory.a, a), linear.adapter_b = placed(memory.b, b);
    const float *const input = placed(memory.c, x);
    float *const hidden = memory.d.place<float>(tokens * r);
    for (int64_t t = 0; t < tokens; ++t) k.low_rank_down(linear, input + t * width, hidden + t * r);
    float *const out = placed(memory.e, y);
    const int64_t middle = O / 3;
    k.low_rank_up(linear, tokens, hidden, 0, middle, QLM_RELU, out, O);
    k.low_rank_up(linear, tokens, hidden, middle, O, QLM_NONE, out, O);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t o = 0; o < O; ++o) {
        double expected = static_cast<double>(y[static_cast<size_t>(t * O + o)]), size = std::fabs(expected);
        for (int64_t j = 0; j < r; ++j) {
          double inner = 0, inner_size = 0;
          for (int64_t i = 0; i < width; ++i) {
            const double product = static_cast<double>(a[static_cast<size_t>(j * width + i)]) * static_cast<double>(x[static_cast<size_t>(t * width + i)]);
            inner += product, inner_size += std::fabs(product);
          }
          const double factor = static_cast<double>(b[static_cast<size_t>(j * O + o)]);
          expected += factor * inner, size += std::fabs(factor) * inner_size;
        }
        if (o < middle) expected = std::fmax(0, expected);
        CHECK(std::fabs(static_cast<double>(out[t * O + o]) - expected) <= 8 * EPSILON * size, "%s, %d in, %d out, rank %d", qlm_isa_selected(),
              static_cast<int>(width), static_cast<int>(O), linear.rank);
      }
  }
}

// Rows and sums end at guard pages; the number of tokens is odd, and more than are packed at once.
void gram(Memory &memory, Random &random) {
  if (!qlm_gram_bf16_runs_here()) return;
  for (const int64_t tokens : {1, 255, 1031})
    for (const int64_t features : {64, 192}) {
      uint16_t *const x = memory.a.place<uint16_t>(tokens * features);
      for (int64_t i = 0; i < tokens * features; ++i) x[i] = to_bf16(random.normal());
      float *const hessian = memory.b.place<float>(features * features);
      std::fill(hessian, hessian + features * features, 1.0f);
      qlm_team *team = nullptr;
      CHECK(qlm_team_create(2, &team) == QLM_OK);
      CHECK(qlm_gram_bf16(team, x, tokens, features, hessian) == QLM_OK, "%s", qlm_error());
      qlm_team_destroy(team);
      for (int64_t i = 0; i < features; ++i)
        for (int64_t j = 0; j <= i; ++j) {
          double expected = 1, size = 1;
          for (int64_t t = 0; t < tokens; ++t) {
            const double product = bf16_value(x[t * features + i]) * bf16_value(x[t * features + j]);
            expected += product, size += std::fabs(product);
          }
          const double value = static_cast<double>(hessian[i * features + j]);
          // The error of 256 sums, one after the other: their square root, times the rounding of each.
          CHECK(std::fabs(value - expected) <= 16 * EPSILON * size, "%d tokens, (%d, %d): %.9g, expected %.9g",
                static_cast<int>(tokens), static_cast<int>(i), static_cast<int>(j), value, expected);
        }
    }
}

}  // namespace

void test_parts() {
  Memory memory;
  for (const char *isa : instruction_sets()) {
    CHECK(qlm_isa_select(isa) == QLM_OK);
    const Kernels &k = qlm::selected();
    CHECK(std::strcmp(qlm_isa_selected(), isa) == 0);
    Random random(5);
    layer_norm(k, memory, random);
    embed(k, memory, random);
    rotate(k, memory, random);
    sums_and_tests(k, memory, random);
    attention(k, memory, random);
    low_rank(k, memory, random);
    gram(memory, random);
  }
  CHECK(qlm_isa_select(nullptr) == QLM_OK);
}
