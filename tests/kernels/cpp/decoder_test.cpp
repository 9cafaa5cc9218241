// Decoders of random small models: the same logits whatever the threads, the batch, the cuts of the prompt, forks and
// truncations; scores that belong to the logits; refusals that leave everything as it was. Every tensor of the model ends
// at a guard page. (That the logits are the right ones is for the Python tests to say, which have a reference.)

#include <deque>

#include "abi.h"
#include "check.h"
#include "tests.h"

namespace {

struct Model {
  std::deque<Guarded> memory;
  qlm_model model = {};
  std::vector<qlm_block> blocks;
  qlm_linear project_in = {}, project_out = {};

  template <typename T> T *place(int64_t count) {
    memory.emplace_back(static_cast<size_t>(count) * sizeof(T));
    return memory.back().place<T>(count);
  }
  float *floats(int64_t count, Random &random, float size, float center = 0.0f) {
    float *const values = place<float>(count);
    for (int64_t i = 0; i < count; ++i) values[i] = center + size * random.normal();
    return values;
  }
  uint16_t *halves(int64_t count, int32_t dtype, Random &random, float size) {
    uint16_t *const values = place<uint16_t>(count);
    for (int64_t i = 0; i < count; ++i) values[i] = dtype == QLM_F16 ? to_f16(size * random.normal()) : to_bf16(size * random.normal());
    return values;
  }
  qlm_norm norm(Random &random) { return {floats(model.hidden, random, 0.1f, 1.0f), floats(model.hidden, random, 0.1f)}; }

  qlm_linear linear(int32_t format, int64_t in_features, int64_t out_features, Random &random, bool bias = true) {
    qlm_linear l = {};
    l.format = format;
    l.in_features = in_features;
    l.out_features = out_features;
    if (bias) l.bias = floats(out_features, random, 0.1f);
    const float size = 1.0f / std::sqrt(static_cast<float>(in_features));
    if (format == QLM_FLOAT) {
      l.weight_dtype = static_cast<int32_t>(random.between(QLM_F32, QLM_BF16));
      l.weight = l.weight_dtype == QLM_F32 ? static_cast<const void *>(floats(in_features * out_features, random, size))
                                           : halves(in_features * out_features, l.weight_dtype, random, size);
    } else if (format == QLM_INT8) {
      int8_t *const codes = place<int8_t>(in_features * out_features);
      int32_t *const sums = place<int32_t>(out_features);
      for (int64_t o = 0; o < out_features; ++o) {
        sums[o] = 0;
        for (int64_t i = 0; i < in_features; ++i) sums[o] += codes[o * in_features + i] = static_cast<int8_t>(random.between(-127, 127));
      }
      l.weight = codes;
      l.row_sum = sums;
      l.scale_dtype = QLM_F32;
      l.scale = floats(out_features, random, 0.0f, size / 70);
    } else if (format == QLM_GPTQ) {
      l.bits = 4;
      l.group_size = 32;
      int32_t *const words = place<int32_t>(in_features / 8 * out_features);
      for (int64_t i = 0; i < in_features / 8 * out_features; ++i) words[i] = static_cast<int32_t>(random.bits());
      const int64_t groups = in_features / 32;
      uint8_t *const zeros = place<uint8_t>(groups * out_features);
      std::memset(zeros, 8, static_cast<size_t>(groups * out_features));
      l.weight = words;
      l.zero_point = zeros;
      l.scale_dtype = QLM_F16;
      uint16_t *const scales = place<uint16_t>(groups * out_features);
      for (int64_t i = 0; i < groups * out_features; ++i) scales[i] = to_f16(size / 5);
      l.scale = scales;
      if (random.one_in(3)) {
        int32_t *const order = place<int32_t>(in_features);
        for (int64_t i = 0; i < in_features; ++i) order[i] = static_cast<int32_t>(in_features - 1 - i);
        l.order = order;
      }
    } else {
      l.block = 64;
      uint8_t *const codes = place<uint8_t>(in_features * out_features / 2);
      for (int64_t i = 0; i < in_features * out_features / 2; ++i) codes[i] = static_cast<uint8_t>(random.bits());
      l.weight = codes;
      l.scale_dtype = QLM_F32;
      l.scale = floats(in_features * out_features / 64, random, 0.0f, 2 * size);
    }
    return l;
  }

  Model(int32_t format, int64_t variant, Random &random) {
    qlm_model &m = model;
    m.heads = random.between(1, 3);
    m.head_dim = format == QLM_NF4 ? 64 : 32;
    m.hidden = m.heads * m.head_dim;
    m.mlp = 64 * random.between(1, 2);
    m.layers = random.between(1, 2);
    m.vocabulary = random.between(5, 90);
    m.positions = random.between(100, 110);
    m.embedding_width = m.hidden;
    m.kv_heads = m.heads;
    m.norm_eps = 1e-5f;
    m.attention_scale = 1.0f / std::sqrt(static_cast<float>(m.head_dim));
    m.norm_before = 1;
    m.has_final_norm = 1;
    m.activation = static_cast<int32_t>(random.between(QLM_RELU, QLM_GELU_TANH));
    if (variant <= 1) {  // OPT, and its 350m shape
      m.qkv_layout = QLM_QKV_SEPARATE;
      m.position_offset = 2;
      if (variant == 1) {
        m.norm_before = 0;
        m.has_final_norm = 0;
        m.embedding_width = 64;
        project_in = linear(format, 64, m.hidden, random, false);
        project_out = linear(format, m.hidden, 64, random, false);
        m.project_in = &project_in;
        m.project_out = &project_out;
      }
    } else if (variant <= 3) {  // GPT-NeoX
      m.qkv_layout = QLM_QKV_PER_HEAD;
      m.rotary_dims = random.one_in(2) ? m.head_dim / 4 : m.head_dim;
      m.rotary_base = 10000.0f;
      m.parallel_residual = variant == 2;
    } else if (variant == 4) {  // GPTBigCode
      m.qkv_layout = QLM_QKV_MULTI_QUERY;
      m.kv_heads = 1;
    } else {
      m.qkv_layout = QLM_QKV_PER_HEAD;
    }
    m.embedding_dtype = static_cast<int32_t>(random.between(QLM_F32, QLM_BF16));
    const int64_t table = m.vocabulary * m.embedding_width;
    m.embedding = m.embedding_dtype == QLM_F32 ? static_cast<const void *>(floats(table, random, 1.0f))
                                               : halves(table, m.embedding_dtype, random, 1.0f);
    if (m.rotary_dims == 0) {
      m.position_dtype = QLM_F16;
      m.position = halves((m.positions + m.position_offset) * m.hidden, QLM_F16, random, 0.5f);
    }
    for (int64_t l = 0; l < m.layers; ++l) {
      qlm_block block = {};
      block.attention_norm = norm(random);
      block.mlp_norm = norm(random);
      const int64_t kv = m.kv_heads * m.head_dim;
      if (m.qkv_layout == QLM_QKV_SEPARATE)
        for (qlm_linear &each : block.qkv) each = linear(format, m.hidden, m.hidden, random);
      else
        block.qkv[0] = linear(format, m.hidden, m.hidden + 2 * kv, random);
      block.attention_out = linear(format, m.hidden, m.hidden, random);
      block.up = linear(format, m.hidden, m.mlp, random);
      block.down = linear(format, m.mlp, m.hidden, random);
      blocks.push_back(block);
    }
    m.blocks = blocks.data();
    if (m.has_final_norm) m.final_norm = norm(random);
    m.head = linear(random.one_in(2) ? QLM_INT8 : QLM_FLOAT, m.embedding_width, m.vocabulary, random, false);
  }
};

struct Decoder {
  qlm_team *team = nullptr;
  qlm_decoder *decoder = nullptr;
  int64_t vocabulary;

  Decoder(const qlm_model &model, int threads, int32_t cache_dtype) : vocabulary(model.vocabulary) {
    CHECK(qlm_team_create(threads, &team) == QLM_OK);
    CHECK(qlm_decoder_create(&model, team, cache_dtype, &decoder) == QLM_OK, "%s", qlm_error());
  }
  ~Decoder() {
    qlm_decoder_destroy(decoder);
    qlm_team_destroy(team);
  }
  qlm_cache *cache() {
    qlm_cache *made = nullptr;
    CHECK(qlm_cache_create(decoder, &made) == QLM_OK, "%s", qlm_error());
    return made;
  }
  // Logits [S, V], in memory that ends at a guard page while the step runs.
  std::vector<float> step(const std::vector<qlm_cache *> &caches, const std::vector<std::vector<int32_t>> &ids) {
    std::vector<int64_t> counts;
    int64_t total = 0;
    for (const auto &each : ids) counts.push_back(static_cast<int64_t>(each.size())), total += counts.back();
    Guarded ids_memory(static_cast<size_t>(total) * 4), logits_memory(caches.size() * static_cast<size_t>(vocabulary) * 4);
    int32_t *const all = ids_memory.place<int32_t>(total), *next = all;
    for (const auto &each : ids) next = std::copy(each.begin(), each.end(), next);
    const int64_t size = static_cast<int64_t>(caches.size()) * vocabulary;
    float *const logits = logits_memory.place<float>(size);
    CHECK(qlm_decoder_step(decoder, static_cast<int64_t>(caches.size()), caches.data(), counts.data(), all, logits) == QLM_OK, "%s", qlm_error());
    return std::vector<float>(logits, logits + size);
  }
};

bool equal(const float *a, const float *b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (float_bits(a[i]) == float_bits(b[i])) continue;
    std::fprintf(stderr, "number %lld of %lld: %.9g and %.9g\n", static_cast<long long>(i), static_cast<long long>(count),
                 static_cast<double>(a[i]), static_cast<double>(b[i]));
    return false;
  }
  return true;
}

std::vector<int32_t> random_ids(int64_t count, int64_t vocabulary, Random &random) {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t &id : ids) id = static_cast<int32_t>(random.between(0, vocabulary - 1));
  return ids;
}

void one_model(const char *isa, int32_t format, int64_t variant, int32_t cache_dtype, Random &random) {
  Model made(format, variant, random);
  const int64_t V = made.model.vocabulary;
  char name[100];
  std::snprintf(name, sizeof name, "%s, format %d, variant %d, cache %d", isa, format, static_cast<int>(variant), cache_dtype);
  std::vector<std::vector<int32_t>> prompts;
  for (int64_t s = 0; s < 3; ++s) prompts.push_back(random_ids(s == 0 ? random.between(65, 80) : random.between(1, 20), V, random));

  std::vector<float> expected;  // [3, V]: each prompt by itself with one thread, then two more tokens
  std::vector<std::vector<float>> alone(3);
  const std::vector<int32_t> more = {static_cast<int32_t>(V - 1), 0};
  {
    Decoder decoder(made.model, 1, cache_dtype);
    for (size_t s = 0; s < 3; ++s) {
      qlm_cache *const cache = decoder.cache();
      alone[s] = decoder.step({cache}, {prompts[s]});
      for (const float logit : alone[s]) CHECK(std::isfinite(logit), "%s", name);
      const auto last = decoder.step({cache}, {more});
      expected.insert(expected.end(), last.begin(), last.end());
      CHECK(qlm_cache_length(cache) == static_cast<int64_t>(prompts[s].size()) + 2);
      qlm_cache_destroy(cache);
    }
    CHECK(qlm_cache_bytes(decoder.decoder) == 0);
  }
  for (const int threads : {2, 3}) {
    Decoder decoder(made.model, threads, cache_dtype);
    std::vector<qlm_cache *> caches = {decoder.cache(), decoder.cache(), decoder.cache()};
    auto logits = decoder.step(caches, prompts);
    for (size_t s = 0; s < 3; ++s) CHECK(equal(alone[s].data(), logits.data() + static_cast<int64_t>(s) * V, V), "%s: prompt %zu, %d threads", name, s, threads);
    // A fork goes its own way, and the original does not notice.
    qlm_cache *fork = nullptr;
    CHECK(qlm_cache_fork(caches[0], &fork) == QLM_OK);
    decoder.step({fork}, {random_ids(20, V, random)});
    // More tokens one at a time, all sequences together; one of them truncated and fed again.
    decoder.step(caches, {{more[0]}, {more[0]}, {more[0]}});
    CHECK(qlm_cache_truncate(caches[0], static_cast<int64_t>(prompts[0].size()) - 3) == QLM_OK);
    decoder.step({caches[0]}, {{prompts[0].end() - 3, prompts[0].end()}});
    decoder.step({caches[0]}, {{more[0]}});
    logits = decoder.step(caches, {{more[1]}, {more[1]}, {more[1]}});
    CHECK(equal(expected.data(), logits.data(), 3 * V), "%s: token by token, %d threads", name, threads);
    // The fork cut back to the common part gives what the original gave.
    CHECK(qlm_cache_truncate(fork, static_cast<int64_t>(prompts[0].size()) - 1) == QLM_OK);
    qlm_cache_destroy(caches[0]);
    logits = decoder.step({fork}, {{prompts[0].back()}});
    CHECK(equal(alone[0].data(), logits.data(), V), "%s: fork, %d threads", name, threads);

    // Scores are the logits' own log-probabilities, and a scored prompt continues like any other.
    qlm_cache *const scored = decoder.cache();
    const std::vector<int32_t> &ids = prompts[1];
    const int64_t count = static_cast<int64_t>(ids.size());
    std::vector<int32_t> targets = random_ids(count, V, random);
    if (count > 2) targets[1] = -1;
    std::vector<float> scores(ids.size()), all(static_cast<size_t>(count * V)), again(ids.size());
    CHECK(qlm_decoder_score(decoder.decoder, 1, &scored, &count, ids.data(), targets.data(), scores.data(), all.data()) == QLM_OK, "%s", qlm_error());
    CHECK(equal(alone[1].data(), all.data() + (count - 1) * V, V), "%s: scored", name);
    for (int64_t t = 0; t < count; ++t) {
      double sum = 0;
      for (int64_t v = 0; v < V; ++v) sum += std::exp(static_cast<double>(all[static_cast<size_t>(t * V + v)]));
      const int32_t target = targets[static_cast<size_t>(t)];
      const double wanted = target < 0 ? 0 : static_cast<double>(all[static_cast<size_t>(t * V + target)]) - std::log(sum);
      CHECK(std::fabs(static_cast<double>(scores[static_cast<size_t>(t)]) - wanted) < 1e-5, "%s: %g, expected %g", name,
            static_cast<double>(scores[static_cast<size_t>(t)]), wanted);
    }
    CHECK(qlm_cache_truncate(scored, 0) == QLM_OK);
    CHECK(qlm_decoder_score(decoder.decoder, 1, &scored, &count, ids.data(), targets.data(), again.data(), nullptr) == QLM_OK);
    CHECK(equal(scores.data(), again.data(), count), "%s: scored without logits", name);
    logits = decoder.step({scored}, {more});
    CHECK(equal(expected.data() + V, logits.data(), V), "%s: after scoring", name);

    // What cannot be done changes nothing.
    const int64_t length = qlm_cache_length(caches[1]);
    auto refused = [&](std::vector<qlm_cache *> some, std::vector<int64_t> counts, std::vector<int32_t> bad) {
      CHECK(qlm_decoder_step(decoder.decoder, static_cast<int64_t>(some.size()), some.data(), counts.data(), bad.data(), logits.data()) == QLM_BAD_ARGUMENT);
      CHECK(std::strlen(qlm_error()) > 10 && qlm_cache_length(caches[1]) == length);
    };
    refused({caches[1]}, {1}, {static_cast<int32_t>(V)});
    refused({caches[1]}, {2}, {0, -1});
    refused({caches[1]}, {0}, {0});
    refused({caches[1], caches[1]}, {1, 1}, {0, 0});
    refused({caches[1], nullptr}, {1, 1}, {0, 0});
    refused({}, {}, {});
    refused({caches[1]}, {made.model.positions - length + 1}, std::vector<int32_t>(static_cast<size_t>(made.model.positions), 0));
    CHECK(qlm_cache_truncate(caches[1], length + 1) == QLM_BAD_ARGUMENT);
    CHECK(qlm_cache_truncate(caches[1], -1) == QLM_BAD_ARGUMENT);
    // Up to the last position, and not beyond.
    decoder.step({caches[1]}, {random_ids(made.model.positions - length, V, random)});
    CHECK(qlm_cache_length(caches[1]) == made.model.positions);
    CHECK(qlm_cache_bytes(decoder.decoder) > 0);
    qlm_cache_destroy(fork);
    qlm_cache_destroy(scored);
    qlm_cache_destroy(caches[1]);
    if (threads == 3) {  // a cache may go after its decoder
      qlm_decoder_destroy(decoder.decoder);
      decoder.decoder = nullptr;
    }
    qlm_cache_destroy(caches[2]);
  }
}

void wrong_models(Random &random) {
  Model made(QLM_FLOAT, 2, random);
  qlm_team *team = nullptr;
  CHECK(qlm_team_create(1, &team) == QLM_OK);
  auto refused = [&](auto &&change) {
    qlm_model model = made.model;
    std::vector<qlm_block> blocks = made.blocks;
    model.blocks = blocks.data();
    change(model, blocks);
    qlm_decoder *decoder = nullptr;
    CHECK(qlm_decoder_create(&model, team, QLM_F16, &decoder) == QLM_BAD_ARGUMENT);
    CHECK(decoder == nullptr && std::strlen(qlm_error()) > 10);
  };
  using Blocks = std::vector<qlm_block>;
  refused([](qlm_model &m, Blocks &) { m.layers = 0; });
  refused([](qlm_model &m, Blocks &) { m.heads = -1; });
  refused([](qlm_model &m, Blocks &) { m.vocabulary += 1; });
  refused([](qlm_model &m, Blocks &) { m.hidden += 1; });
  refused([](qlm_model &m, Blocks &) { m.head_dim = INT64_MAX; });
  refused([](qlm_model &m, Blocks &) { m.rotary_dims = 3; });
  refused([](qlm_model &m, Blocks &) { m.rotary_dims = 2 * m.head_dim; });
  refused([](qlm_model &m, Blocks &) { m.rotary_base = NAN; });
  refused([](qlm_model &m, Blocks &) { m.norm_eps = -1; });
  refused([](qlm_model &m, Blocks &) { m.qkv_layout = 3; });
  refused([](qlm_model &m, Blocks &) { m.activation = 9; });
  refused([](qlm_model &m, Blocks &) { m.embedding = nullptr; });
  refused([](qlm_model &m, Blocks &) { m.embedding_dtype = QLM_I8; });
  refused([](qlm_model &m, Blocks &) { m.blocks = nullptr; });
  refused([](qlm_model &, Blocks &blocks) { blocks.back().down.weight = nullptr; });
  refused([](qlm_model &, Blocks &blocks) { blocks.back().up.out_features -= 1; });
  qlm_decoder *decoder = nullptr;
  CHECK(qlm_decoder_create(&made.model, team, 7, &decoder) == QLM_BAD_ARGUMENT);
  CHECK(qlm_decoder_create(&made.model, nullptr, QLM_F16, &decoder) == QLM_BAD_ARGUMENT);
  CHECK(qlm_decoder_create(nullptr, team, QLM_F16, &decoder) == QLM_BAD_ARGUMENT);
  // NaN in a weight is found, and the cache does not keep it.
  static_cast<float *>(const_cast<void *>(static_cast<const void *>(made.model.blocks[0].attention_norm.weight)))[0] = NAN;
  CHECK(qlm_decoder_create(&made.model, team, QLM_F16, &decoder) == QLM_OK);
  qlm_cache *cache = nullptr;
  CHECK(qlm_cache_create(decoder, &cache) == QLM_OK);
  const int64_t count = 3;
  const int32_t ids[3] = {0, 1, 2};
  std::vector<float> logits(static_cast<size_t>(made.model.vocabulary));
  CHECK(qlm_decoder_step(decoder, 1, &cache, &count, ids, logits.data()) == QLM_NOT_FINITE);
  CHECK(qlm_cache_length(cache) == 0);
  qlm_cache_destroy(cache);
  qlm_decoder_destroy(decoder);
  qlm_decoder_destroy(nullptr);
  qlm_cache_destroy(nullptr);
  qlm_team_destroy(team);
}

}  // namespace

void test_decoder() {
  int number = 0;
  for (const char *isa : instruction_sets()) {
    CHECK(qlm_isa_select(isa) == QLM_OK);
    Random random(static_cast<uint64_t>(6 + number));
    // Every format with every variant, half of them with each instruction set.
    for (int round = 0; round < 12; ++round)
      one_model(isa, round % 4, round / 4 + 3 * ((round + number) % 2), (round + round / 4) % 4, random);
    wrong_models(random);
    ++number;
  }
  CHECK(qlm_isa_select(nullptr) == QLM_OK);
}
