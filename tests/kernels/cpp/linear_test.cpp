// Linear layers of every format against sums in int64 and double: random shapes with all tails, unaligned weights, all
// operands against guard pages, for every instruction set; and the helpers that a loader needs.

#include <memory>

#include "abi.h"
#include "check.h"
#include "kernels.h"
#include "tests.h"

namespace {

// The NF4 levels (QLoRA, appendix E), in the order of their codes.
constexpr double NF4[16] = {-1.0,
                            -0.6961928009986877,
                            -0.5250730514526367,
                            -0.39491748809814453,
                            -0.28444138169288635,
                            -0.18477343022823334,
                            -0.09105003625154495,
                            0.0,
                            0.07958029955625534,
                            0.16093020141124725,
                            0.24611230194568634,
                            0.33791524171829224,
                            0.44070982933044434,
                            0.5626170039176941,
                            0.7229568362236023,
                            1.0};

// Relative to sum |w x|: float32 sums of some thousands of products.
constexpr double FLOAT_TOLERANCE = 2e-6;
// Activations of the 4-bit and GPTQ formats are int8 for each group of at most so many in features, or better: each is
// off by at most half of its group's max|x| / 127.
constexpr int64_t ACTIVATION_GROUP = 128;
constexpr double ACTIVATION_TOLERANCE = 0.51 / 127;
// The NF4 levels are int8 codes in the kernels, off by at most so much of absmax.
constexpr double LEVEL_TOLERANCE = 0.0037;

class Store {  // one operand's memory
 public:
  template <typename T> T *place(int64_t count, int64_t slack_bytes = 0) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T)) + slack_bytes;
    return reinterpret_cast<T *>(memory_.place<char>(bytes, false));
  }

 private:
  Guarded memory_{size_t{4} << 20};
};

// Where the word of row `row` and out feature `o` lies among `rows` rows of words, in strips of so many out features.
int64_t word_at(int64_t row, int64_t o, int64_t rows, int64_t out_features, int64_t strip) {
  const int64_t side = strip == 0 ? out_features : strip, first = o / side * side, width = std::min(side, out_features - first);
  return first * rows + row * width + o - first;
}

// A linear layer whose tensors end at guard pages, with its weight in double.
struct Layer {
  qlm_linear linear = {};
  Store weight, scale, bias, row_sum, zero_point, order, absmax_code, nested_code, nested_absmax;
  std::vector<double> w;             // [O, I]
  std::vector<double> weight_error;  // [O, I], NF4: how far the kernels' levels may be off
  std::vector<int8_t> codes;

  double &at(int64_t o, int64_t i) { return w[static_cast<size_t>(o * linear.in_features + i)]; }

  void start(int32_t format, int64_t in_features, int64_t out_features, Random &random) {
    linear = {};
    linear.format = format;
    linear.in_features = in_features;
    linear.out_features = out_features;
    w.assign(static_cast<size_t>(in_features * out_features), 0.0);
    weight_error.assign(w.size(), 0.0);
    if (!random.one_in(3)) {
      float *const values = bias.place<float>(out_features);
      for (int64_t o = 0; o < out_features; ++o) values[o] = random.normal();
      linear.bias = values;
    }
  }

  // `count` floats of `dtype` at memory that may be unaligned; what they are as double.
  std::vector<double> floats(Store &store, int64_t count, int32_t dtype, Random &random, const void **place, float least,
                             float spread) {
    const int64_t size = dtype == QLM_F32 ? 4 : 2, slack = random.between(0, 3);
    char *const bytes = store.place<char>(count * size, slack);
    std::vector<double> values(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      const float value = least + spread * random.normal();
      if (dtype == QLM_F32) {
        std::memcpy(bytes + 4 * i, &value, 4);
        values[static_cast<size_t>(i)] = static_cast<double>(value);
      } else {
        const uint16_t half = dtype == QLM_F16 ? to_f16(value) : to_bf16(value);
        std::memcpy(bytes + 2 * i, &half, 2);
        values[static_cast<size_t>(i)] = dtype == QLM_F16 ? f16_value(half) : bf16_value(half);
      }
    }
    *place = bytes;
    return values;
  }

  void make_float(int64_t in_features, int64_t out_features, Random &random) {
    start(QLM_FLOAT, in_features, out_features, random);
    linear.weight_dtype = static_cast<int32_t>(random.between(QLM_F32, QLM_BF16));
    w = floats(weight, in_features * out_features, linear.weight_dtype, random, &linear.weight, 0.0f, 1.0f);
  }

  void make_int8(int64_t in_features, int64_t out_features, Random &random) {
    start(QLM_INT8, in_features, out_features, random);
    int8_t *const file = weight.place<int8_t>(in_features * out_features, random.between(0, 3));
    int32_t *const sums = row_sum.place<int32_t>(out_features);
    codes.resize(w.size());
    // Random, or what strains int32 most: all of one sign, at the ends of the range.
    const int64_t kind = random.between(0, 3);
    for (int64_t o = 0; o < out_features; ++o) {
      sums[o] = 0;
      for (int64_t i = 0; i < in_features; ++i) {
        const int64_t code = kind == 0   ? random.between(-128, 127)
                             : kind == 1 ? random.between(-127, 127)
                             : kind == 2 ? (o % 2 ? -127 : 127)
                                         : -128;
        file[o * in_features + i] = static_cast<int8_t>(code);
        codes[static_cast<size_t>(o * in_features + i)] = static_cast<int8_t>(code);
        sums[o] += static_cast<int32_t>(code);
      }
    }
    linear.weight = file;
    linear.row_sum = sums;
    linear.symmetric_input = random.one_in(3);
    linear.scale_dtype = static_cast<int32_t>(random.between(QLM_F32, QLM_BF16));
    scales = floats(scale, out_features, linear.scale_dtype, random, &linear.scale, 0.01f, 0.002f);
  }
  std::vector<double> scales;

  void make_gptq(int32_t bits, int64_t in_features, int64_t out_features, int64_t group_size, Random &random) {
    start(QLM_GPTQ, in_features, out_features, random);
    const int64_t groups = in_features / group_size;
    linear.bits = bits;
    linear.group_size = group_size;
    linear.scale_dtype = static_cast<int32_t>(random.between(QLM_F32, QLM_BF16));
    const std::vector<double> s = floats(scale, groups * out_features, linear.scale_dtype, random, &linear.scale, 0.05f, 0.02f);
    uint8_t *const zeros = zero_point.place<uint8_t>(groups * out_features);
    // v1 files store the zero point less 1, so it may be 2^bits.
    for (int64_t k = 0; k < groups * out_features; ++k) zeros[k] = static_cast<uint8_t>(random.between(0, bits == 8 ? 255 : 1 << bits));
    linear.zero_point = zeros;
    int32_t *ordered = nullptr;
    if (random.one_in(3)) {
      ordered = order.place<int32_t>(in_features);
      for (int64_t i = 0; i < in_features; ++i) ordered[i] = static_cast<int32_t>(i);
      for (int64_t i = in_features - 1; i > 0; --i) std::swap(ordered[i], ordered[random.between(0, i)]);
      linear.order = ordered;
    }
    const int64_t words = in_features * bits / 32;
    // As in the file, or all words of some out features after the other: abi.h, qlm_gptq_arrange.
    linear.strip = random.one_in(3) ? static_cast<int32_t>(128 * random.between(1, 2)) : 0;
    uint8_t *const file = weight.place<uint8_t>(words * out_features * 4, random.between(0, 3));
    std::memset(file, 0, static_cast<size_t>(words * out_features * 4));
    for (int64_t i = 0; i < in_features; ++i)
      for (int64_t o = 0; o < out_features; ++o) {
        const int64_t code = random.between(0, (1 << bits) - 1), group = i / group_size * out_features + o;
        for (int32_t b = 0; b < bits; ++b) {
          const int64_t bit = i * bits + b;  // of this out feature's stream of words
          const int64_t byte = word_at(bit / 32, o, words, out_features, linear.strip) * 4 + bit % 32 / 8;
          file[byte] = static_cast<uint8_t>(file[byte] | (code >> b & 1) << bit % 8);
        }
        at(o, ordered ? ordered[i] : i) = s[static_cast<size_t>(group)] * static_cast<double>(code - zeros[group]);
      }
    linear.weight = file;
  }

  void make_nf4(int64_t in_features, int64_t out_features, int64_t block, Random &random) {
    start(QLM_NF4, in_features, out_features, random);
    linear.block = block;
    const int64_t count = in_features * out_features, blocks = count / block;
    uint8_t *const file = weight.place<uint8_t>(count / 2, random.between(0, 3));
    for (int64_t k = 0; k < count / 2; ++k) file[k] = static_cast<uint8_t>(random.bits());
    linear.weight = file;
    std::vector<double> absmax(static_cast<size_t>(blocks));
    if (random.one_in(2)) {
      linear.scale_dtype = QLM_F32;
      absmax = floats(scale, blocks, QLM_F32, random, &linear.scale, 0.5f, 0.1f);
    } else {
      const int64_t nested_block = random.one_in(2) ? 256 : 3;
      linear.nested_block = nested_block;
      linear.nested_offset = random.normal();
      uint8_t *const coded = absmax_code.place<uint8_t>(blocks);
      float *const code = nested_code.place<float>(256);
      float *const outer = nested_absmax.place<float>((blocks + nested_block - 1) / nested_block);
      for (int64_t k = 0; k < 256; ++k) code[k] = random.normal();
      for (int64_t k = 0; k < (blocks + nested_block - 1) / nested_block; ++k) outer[k] = random.normal();
      for (int64_t k = 0; k < blocks; ++k) {
        coded[k] = static_cast<uint8_t>(random.bits());
        absmax[static_cast<size_t>(k)] = static_cast<double>(code[coded[k]]) * static_cast<double>(outer[k / nested_block]) +
                                         static_cast<double>(linear.nested_offset);
      }
      linear.absmax_code = coded;
      linear.nested_code = code;
      linear.nested_absmax = outer;
    }
    for (int64_t k = 0; k < count; ++k) {
      const int level = k % 2 ? file[k / 2] & 15 : file[k / 2] >> 4;
      w[static_cast<size_t>(k)] = NF4[level] * absmax[static_cast<size_t>(k / block)];
      weight_error[static_cast<size_t>(k)] = LEVEL_TOLERANCE * std::fabs(absmax[static_cast<size_t>(k / block)]);
    }
  }
};

// Activations of `tokens` tokens, ending at a guard page, rows `stride` apart.
void fill(float *x, int64_t tokens, int64_t width, int64_t stride, Random &random) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t kind = random.between(0, 9);
    const float size = random.one_in(4) ? 1e-3f : 2.0f;
    for (int64_t i = 0; i < width; ++i) {
      float value = size * random.normal();
      if (kind == 0) value = 0.0f;
      if (kind == 1) value = std::fabs(value);          // codes from 0 on
      if (kind == 2) value = -std::fabs(value);         // up to 255
      if (kind == 3) value = i % 2 ? size : -size;      // only the two ends
      x[t * stride + i] = value;
    }
  }
}

// y of one token of an int8 layer, operation by operation as qlm/kernels/ops.py has it, with the sum in int64.
void int8_reference(const Layer &layer, const float *x, std::vector<float> &y) {
  const qlm_linear &l = layer.linear;
  const int64_t width = l.in_features;
  float low = 0.0f, high = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < width; ++i) {
    finite = finite && std::isfinite(x[i]);
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  const float scale = l.symmetric_input ? std::max(-low, high) / 127.5f : (high - low) / 255.0f;
  if (!finite || !std::isfinite(scale)) {
    y.assign(static_cast<size_t>(l.out_features), NAN);
    return;
  }
  const float divisor = scale == 0.0f ? 1.1920928955078125e-7f : scale;
  float zero = 0.0f;
  if (!l.symmetric_input && scale != 0.0f) zero = std::nearbyint(std::min(std::max(-128.0f - low / scale, -128.0f), 127.0f));
  std::vector<int64_t> q(static_cast<size_t>(width));
  for (int64_t i = 0; i < width; ++i)
    q[static_cast<size_t>(i)] =
        static_cast<int64_t>(std::nearbyint(std::min(std::max(x[i] / divisor + zero, -128.0f), 127.0f))) - static_cast<int64_t>(zero);
  y.resize(static_cast<size_t>(l.out_features));
  for (int64_t o = 0; o < l.out_features; ++o) {
    int64_t sum = 0;
    const int8_t *const row = layer.codes.data() + o * width;
    for (int64_t i = 0; i < width; ++i) sum += q[static_cast<size_t>(i)] * row[i];
    float value = static_cast<float>(sum) * static_cast<float>(layer.scales[static_cast<size_t>(o)]) * divisor;
    if (l.bias) value += l.bias[o];
    y[static_cast<size_t>(o)] = value;
  }
}

bool same_bits(float a, float b) { return float_bits(a) == float_bits(b) || (std::isnan(a) && std::isnan(b)); }

struct Operands {
  Store x, y;
  std::unique_ptr<Layer> layer{new Layer};
};

// One random layer of a format, its forward pass against the reference; then token by token, and by hand through the
// kernel table with an epilogue: the same bits.
void check_layer(qlm_team *team, const char *isa, Operands &operands, int64_t tokens, Random &random) {
  Layer &layer = *operands.layer;
  const qlm_linear &l = layer.linear;
  CHECK(qlm_linear_check(&l) == QLM_OK, "%s", qlm_error());
  const int64_t x_stride = l.in_features + (random.one_in(2) ? random.between(0, 9) : 0);
  const int64_t y_stride = l.out_features + (random.one_in(2) ? random.between(0, 9) : 0);
  float *const x = operands.x.place<float>((tokens - 1) * x_stride + l.in_features);
  float *const y = operands.y.place<float>((tokens - 1) * y_stride + l.out_features);
  fill(x, tokens, l.in_features, x_stride, random);
  const int64_t spoiled = l.format == QLM_INT8 && random.one_in(10) ? random.between(0, tokens - 1) : -1;
  if (spoiled >= 0) x[spoiled * x_stride + random.between(0, l.in_features - 1)] = random.one_in(2) ? NAN : INFINITY;
  constexpr float UNTOUCHED = 12345.0f;
  std::fill(y, y + (tokens - 1) * y_stride + l.out_features, UNTOUCHED);
  CHECK(qlm_linear_forward(team, &l, tokens, x, x_stride, y, y_stride) == QLM_OK, "%s", qlm_error());

  auto describe = [&](int64_t t, int64_t o) {
    static char text[300];
    std::snprintf(text, sizeof text, "%s, format %d, bits %d, weight dtype %d, [%lld, %lld], group %lld, block %lld, strip %d, order %d: token %lld of %lld, out feature %lld",
                  isa, l.format, l.bits, l.weight_dtype, static_cast<long long>(l.out_features),
                  static_cast<long long>(l.in_features), static_cast<long long>(l.group_size), static_cast<long long>(l.block),
                  l.strip, l.order != nullptr, static_cast<long long>(t), static_cast<long long>(tokens), static_cast<long long>(o));
    return text;
  };
  std::vector<float> expected;
  for (int64_t t = 0; t < tokens; ++t) {
    const float *const row = x + t * x_stride;
    for (int64_t o = l.out_features; t < tokens - 1 && o < y_stride; ++o)
      CHECK(y[t * y_stride + o] == UNTOUCHED, "%s", describe(t, o));
    if (l.format == QLM_INT8) {
      int8_reference(layer, row, expected);
      for (int64_t o = 0; o < l.out_features; ++o) {
        const float value = y[t * y_stride + o];
        CHECK(same_bits(value, expected[static_cast<size_t>(o)]), "%s: %.9g, expected %.9g", describe(t, o),
              static_cast<double>(value), static_cast<double>(expected[static_cast<size_t>(o)]));
      }
      continue;
    }
    // The largest |x| near each in feature, wherever the groups of activations begin (in storage order).
    std::vector<double> largest(static_cast<size_t>(l.in_features), 0.0);
    if (l.format != QLM_FLOAT) {
      std::vector<double> of_part(static_cast<size_t>(l.in_features / ACTIVATION_GROUP + 3), 0.0);  // a part of nothing at both ends
      for (int64_t i = 0; i < l.in_features; ++i) {
        double &most = of_part[static_cast<size_t>(i / ACTIVATION_GROUP + 1)];
        most = std::max(most, std::fabs(static_cast<double>(row[l.order ? l.order[i] : i])));
      }
      for (int64_t i = 0; i < l.in_features; ++i) {
        const double *const near = &of_part[static_cast<size_t>(i / ACTIVATION_GROUP)];
        largest[static_cast<size_t>(l.order ? l.order[i] : i)] = std::max(near[0], std::max(near[1], near[2]));
      }
    }
    for (int64_t o = 0; o < l.out_features; ++o) {
      double sum = 0, size = 0, activation_error = 0, weight_error = 0;
      for (int64_t i = 0; i < l.in_features; ++i) {
        const double weight = layer.at(o, i), product = weight * static_cast<double>(row[i]);
        sum += product;
        size += std::fabs(product);
        activation_error += std::fabs(weight) * largest[static_cast<size_t>(i)];
        weight_error += layer.weight_error[static_cast<size_t>(o * l.in_features + i)] * std::fabs(static_cast<double>(row[i]));
      }
      if (l.bias) sum += static_cast<double>(l.bias[o]), size += std::fabs(static_cast<double>(l.bias[o]));
      const double tolerance = FLOAT_TOLERANCE * size + ACTIVATION_TOLERANCE * activation_error + weight_error + 1e-30;
      const double value = static_cast<double>(y[t * y_stride + o]);
      CHECK(std::fabs(value - sum) <= tolerance, "%s: %.9g, expected %.9g +- %.2g", describe(t, o), value, sum, tolerance);
    }
  }

  // A token's result is the same without its neighbours.
  std::vector<float> alone(static_cast<size_t>(l.out_features));
  const int64_t t = random.between(0, tokens - 1);
  CHECK(qlm_linear_forward(team, &l, 1, x + t * x_stride, l.in_features, alone.data(), l.out_features) == QLM_OK);
  for (int64_t o = 0; o < l.out_features; ++o)
    CHECK(same_bits(alone[static_cast<size_t>(o)], y[t * y_stride + o]), "%s: %.9g alone, %.9g with others", describe(t, o),
          static_cast<double>(alone[static_cast<size_t>(o)]), static_cast<double>(y[t * y_stride + o]));

  // In pieces, with an epilogue.
  const qlm::LinearKernel &kernel = qlm::selected().linear[l.format];
  const int64_t bytes = kernel.prepared_bytes(l, tokens);
  void *const prepared = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
  for (int64_t k = tokens - 1; k >= 0; --k) kernel.prepare(l, tokens, k, x + k * x_stride, prepared);
  const qlm::Epilogue epilogue = {static_cast<int32_t>(random.between(QLM_NONE, QLM_GELU_TANH)), random.one_in(2)};
  std::vector<float> plain(static_cast<size_t>(tokens * l.out_features));
  for (int64_t k = 0; k < tokens; ++k)
    std::copy(y + k * y_stride, y + k * y_stride + l.out_features, plain.begin() + k * l.out_features);
  for (int64_t k = 0; k < (tokens - 1) * y_stride + l.out_features; ++k) y[k] = 0.5f;
  const int64_t granule = kernel.granule(l);
  CHECK(granule > 0);
  for (int64_t o0 = 0; o0 < l.out_features;) {
    const int64_t o1 = std::min(l.out_features, o0 + granule * random.between(1, 5));
    kernel.run(l, tokens, prepared, o0, o1, epilogue, y, y_stride);
    o0 = o1;
  }
  std::free(prepared);
  for (int64_t k = 0; k < tokens; ++k)
    for (int64_t o = 0; o < l.out_features; ++o) {
      const double v = static_cast<double>(plain[static_cast<size_t>(k * l.out_features + o)]);
      double activated = v;
      if (epilogue.activation == QLM_RELU) activated = v > 0 || std::isnan(v) ? v : 0;
      if (epilogue.activation == QLM_GELU) activated = v * 0.5 * std::erfc(-v / std::sqrt(2.0));
      if (epilogue.activation == QLM_GELU_TANH) {
        const double u = std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v);
        activated = v / (1 + std::exp(-2 * u));
      }
      if (epilogue.add) activated += 0.5;
      const float value = y[k * y_stride + o];
      const bool right = std::isnan(activated) ? std::isnan(value)
                                               : std::fabs(static_cast<double>(value) - activated) <= 1e-6 * (1 + std::fabs(v));
      CHECK(right, "%s: activation %d, add %d of %.9g: %.9g, expected %.9g", describe(k, o), epilogue.activation, epilogue.add, v,
            static_cast<double>(value), activated);
    }
}

int64_t period(int32_t bits) { return bits == 3 ? 32 : 32 / bits; }

// One or a few as in decoding, or as many as in a prompt.
int64_t some_tokens(Random &random) {
  if (random.one_in(16)) return random.between(50, 150);
  return random.one_in(8) ? random.between(10, 49) : random.between(1, 9);
}

void random_layers(qlm_team *team, const char *isa, Operands &operands) {
  Layer &layer = *operands.layer;
  Random random(1);
  // All tails around one and two vectors.
  for (int64_t width = 1; width <= 130; ++width) {
    const int64_t tokens = random.between(1, 3), features = random.between(1, 70);
    layer.make_int8(width, features, random);
    check_layer(team, isa, operands, tokens, random);
    layer.make_float(width, features, random);
    check_layer(team, isa, operands, tokens, random);
  }
  for (int i = 0; i < 600; ++i) {
    const int64_t tokens = some_tokens(random);
    layer.make_int8(random.between(1, 300), random.between(1, 90), random);
    check_layer(team, isa, operands, tokens, random);
  }
  for (int i = 0; i < 200; ++i) {
    const int64_t tokens = some_tokens(random);
    layer.make_float(random.between(1, 300), random.between(1, 90), random);
    check_layer(team, isa, operands, tokens, random);
  }
  for (int i = 0; i < 400; ++i) {
    const int64_t tokens = some_tokens(random);
    const int32_t bits = i % 4 == 3 ? 8 : 2 + i % 4;
    const int64_t group_size = period(bits) * random.between(1, random.one_in(2) ? 4 : 12);
    layer.make_gptq(bits, group_size * random.between(1, 6), 4 * random.between(1, random.one_in(4) ? 100 : 24), group_size, random);
    check_layer(team, isa, operands, tokens, random);
  }
  for (int i = 0; i < 200; ++i) {
    const int64_t tokens = some_tokens(random);
    const int64_t block = 64 * random.between(1, 3);
    layer.make_nf4(block * random.between(1, 4), random.between(1, 90), block, random);
    check_layer(team, isa, operands, tokens, random);
  }
  // The widest int8 layers: where int32 with -128 ends, and where it ends with -127.
  for (const int64_t width : {65791, 65792, 65793, 66310})
    for (int i = 0; i < 4; ++i) {
      layer.make_int8(width, random.between(1, 5), random);
      check_layer(team, isa, operands, random.between(1, 3), random);
    }
}

// Loader's helpers against their definition.
void helpers(qlm_team *team, Operands &operands) {
  Random random(2);
  Layer &layer = *operands.layer;
  for (int i = 0; i < 60; ++i) {
    const int64_t width = random.between(1, 200), features = random.between(1, 150);
    layer.make_int8(width, features, random);
    int32_t *const sums = operands.y.place<int32_t>(features);
    CHECK(qlm_int8_row_sums(team, static_cast<const int8_t *>(layer.linear.weight), features, width, sums) == QLM_OK);
    for (int64_t o = 0; o < features; ++o) CHECK(sums[o] == layer.linear.row_sum[o]);

    layer.make_float(width, features, random);
    int8_t *const codes = operands.x.place<int8_t>(width * features);
    Store scale_store;
    float *const scale = scale_store.place<float>(features);
    CHECK(qlm_int8_quantize_rows(team, layer.linear.weight, layer.linear.weight_dtype, features, width, codes, scale, sums) == QLM_OK);
    for (int64_t o = 0; o < features; ++o) {
      double most = 0;
      int32_t sum = 0;
      for (int64_t k = 0; k < width; ++k) most = std::max(most, std::fabs(layer.at(o, k)));
      CHECK(std::fabs(static_cast<double>(scale[o]) - most / 127) <= 1e-7 * most);
      for (int64_t k = 0; k < width; ++k) {
        const int8_t code = codes[o * width + k];
        sum += code;
        CHECK(code >= -127 && std::fabs(layer.at(o, k) - code * static_cast<double>(scale[o])) <= 0.5001 * static_cast<double>(scale[o]));
      }
      CHECK(sums[o] == sum);
    }
  }
  // Words in another order of the in features, and in strips of the out features.
  for (int i = 0; i < 60; ++i) {
    const int32_t bits = i % 4 == 3 ? 8 : 2 + i % 4;
    const int64_t width = period(bits) * random.between(1, 9), features = 4 * random.between(1, random.one_in(2) ? 9 : 80);
    const int64_t words = width * bits / 32;
    int32_t *const from = operands.x.place<int32_t>(words * features), *const to = operands.y.place<int32_t>(words * features);
    for (int64_t k = 0; k < words * features; ++k) from[k] = static_cast<int32_t>(random.bits());
    int32_t *const order = layer.order.place<int32_t>(width);
    for (int64_t k = 0; k < width; ++k) order[k] = static_cast<int32_t>(random.between(0, width - 1));
    const int32_t strip = static_cast<int32_t>(128 * random.between(0, 2));
    const bool ordered = !random.one_in(3);
    CHECK(qlm_gptq_arrange(team, from, bits, width, features, ordered ? order : nullptr, strip, to) == QLM_OK, "%s", qlm_error());
    auto code = [&](const int32_t *packed, int64_t k, int64_t o, int64_t side) {
      uint32_t value = 0;
      for (int32_t b = 0; b < bits; ++b) {
        const int64_t bit = k * bits + b;
        value |= (static_cast<uint32_t>(packed[word_at(bit / 32, o, words, features, side)]) >> bit % 32 & 1) << b;
      }
      return value;
    };
    for (int64_t k = 0; k < width; ++k)
      for (int64_t o = 0; o < features; ++o)
        CHECK(code(to, k, o, strip) == code(from, ordered ? order[k] : k, o, 0), "%d bits, %lld, strips of %d", bits,
              static_cast<long long>(k), strip);
  }
  for (const int64_t bytes : {1, 63, 64, 65, 4095, 1000003}) {
    double speed = -1;
    CHECK(qlm_read_bandwidth(team, operands.x.place<char>(bytes), bytes, &speed) == QLM_OK && speed > 0);
  }
}

// Arguments that no kernel may see.
void refusals(qlm_team *team, Operands &operands) {
  Random random(3);
  Layer &layer = *operands.layer;
  std::vector<float> x(4096), y(4096, 7.0f);
  auto refused = [&](const qlm_linear &l, int64_t tokens, int64_t x_stride, int64_t y_stride) {
    CHECK(qlm_linear_forward(team, &l, tokens, x.data(), x_stride, y.data(), y_stride) == QLM_BAD_ARGUMENT);
    CHECK(std::strlen(qlm_error()) > 10);
    for (const float value : y) CHECK(value == 7.0f);
  };
  layer.make_int8(64, 8, random);
  const qlm_linear good = layer.linear;
  refused(good, -1, 64, 8);
  refused(good, 2, 63, 8);
  refused(good, 2, 64, 7);
  CHECK(qlm_linear_forward(team, &good, 0, x.data(), 64, y.data(), 8) == QLM_OK);
  auto changed = [&](const qlm_linear &base, auto &&change) {
    qlm_linear bad = base;
    change(bad);
    refused(bad, 1, 1 << 20, 1 << 20);
  };
  changed(good, [](qlm_linear &l) { l.in_features = 0; });
  changed(good, [](qlm_linear &l) { l.out_features = -8; });
  changed(good, [](qlm_linear &l) { l.in_features = 66311; });
  changed(good, [](qlm_linear &l) { l.format = 4; });
  changed(good, [](qlm_linear &l) { l.format = -1; });
  changed(good, [](qlm_linear &l) { l.weight = nullptr; });
  changed(good, [](qlm_linear &l) { l.scale = nullptr; });
  changed(good, [](qlm_linear &l) { l.scale_dtype = QLM_I8; });
  changed(good, [](qlm_linear &l) { l.row_sum = nullptr; });
  layer.make_gptq(4, 64, 8, 32, random);
  const qlm_linear gptq = layer.linear;
  changed(gptq, [](qlm_linear &l) { l.bits = 5; });
  changed(gptq, [](qlm_linear &l) { l.bits = 0; });
  changed(gptq, [](qlm_linear &l) { l.bits = 64; });
  changed(gptq, [](qlm_linear &l) { l.group_size = 0; });
  changed(gptq, [](qlm_linear &l) { l.group_size = 48; });
  changed(gptq, [](qlm_linear &l) { l.in_features = 60; });
  changed(gptq, [](qlm_linear &l) { l.zero_point = nullptr; });
  changed(gptq, [](qlm_linear &l) { l.strip = 64; });
  changed(gptq, [](qlm_linear &l) { l.strip = -128; });
  std::vector<int32_t> order(64, 0);
  changed(gptq, [&](qlm_linear &l) { order[63] = 64, l.order = order.data(); });
  changed(gptq, [&](qlm_linear &l) { order[63] = -1, l.order = order.data(); });
  layer.make_nf4(128, 8, 64, random);
  const qlm_linear nf4 = layer.linear;
  changed(nf4, [](qlm_linear &l) { l.block = 0; });
  changed(nf4, [](qlm_linear &l) { l.block = 32; });
  changed(nf4, [](qlm_linear &l) { l.block = 192; });
  changed(nf4, [](qlm_linear &l) { l.scale = nullptr, l.absmax_code = nullptr; });
  layer.make_float(16, 8, random);
  changed(layer.linear, [](qlm_linear &l) { l.weight_dtype = QLM_I8; });
}

// The bits do not depend on the number of threads.
void threads(Operands &operands) {
  Random random(4);
  Layer &layer = *operands.layer;
  for (int i = 0; i < 16; ++i) {
    if (i % 4 == 0) layer.make_int8(300, 500, random);
    if (i % 4 == 1) layer.make_float(300, 500, random);
    if (i % 4 == 2) layer.make_gptq(2 + i / 4 % 3, 384, 500, 96, random);
    if (i % 4 == 3) layer.make_nf4(256, 500, 64, random);
    const int64_t tokens = random.between(1, 20), width = layer.linear.in_features;
    std::vector<float> x(static_cast<size_t>(tokens * width)), first, y(static_cast<size_t>(tokens * 500));
    fill(x.data(), tokens, width, width, random);
    for (const int count : {1, 2, 4}) {
      qlm_team *team = nullptr;
      CHECK(qlm_team_create(count, &team) == QLM_OK);
      CHECK(qlm_linear_forward(team, &layer.linear, tokens, x.data(), width, y.data(), 500) == QLM_OK);
      qlm_team_destroy(team);
      if (count == 1) first = y;
      CHECK(std::memcmp(first.data(), y.data(), y.size() * sizeof(float)) == 0, "%d threads", count);
    }
  }
}

}  // namespace

void test_linear() {
  qlm_team *team = nullptr;
  CHECK(qlm_team_create(2, &team) == QLM_OK);
  Operands operands;
  for (const char *isa : instruction_sets()) {
    CHECK(qlm_isa_select(isa) == QLM_OK, "%s", qlm_error());
    random_layers(team, isa, operands);
    helpers(team, operands);
    refusals(team, operands);
    threads(operands);
  }
  CHECK(qlm_isa_select(nullptr) == QLM_OK);
  qlm_team_destroy(team);
}
