// A whole step of a model, prefill or decode, in one call of the team: every thread goes through `Step::work` together.
//
// Tokens of all sequences lie one after the other, CHUNK of them at a time. What is done for each token on its own
// (norms, quantizing a linear's input) is handed out token by token, linears by ranges of out features, attention by
// key-value head and group of queries. No result depends on which thread computed what, nor on how many there are.
//
// With a single token the work between two linears is too short to share: every thread does it for itself, into memory
// of its own, which saves a barrier ("alone" below). A step with one token allocates nothing but a page of the cache
// now and then.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "abi.h"
#include "buffer.h"
#include "cache.h"
#include "kernels.h"
#include "split.h"
#include "team.h"

namespace {

using qlm::AttentionTask;
using qlm::Buffer;
using qlm::ceil_div;
using qlm::Epilogue;
using qlm::fail;
using qlm::is_float;
using qlm::Kernels;
using qlm::LinearKernel;
using qlm::PAGE;
using qlm::Split;
using qlm::split;
using qlm::weight_bytes;

// Tokens that go through the blocks together: enough for the weights' reading to vanish behind the arithmetic, and few
// enough for the activations of a long prompt to stay small.
constexpr int64_t CHUNK = 512;
// Tokens whose logits exist at one time while scoring.
constexpr int64_t SCORED = 32;
// Neighbouring positions of a page lie side by side, so one thread stores so many.
constexpr int64_t STORED = 32;
// Above this many tokens, work on single tokens is handed out in groups.
constexpr int64_t TOKEN_GROUP = 4, TOKEN_GROUP_FROM = 64;
// A call takes so many tokens and sequences at most, far more than fit into any memory.
constexpr int64_t MOST_TOKENS = int64_t{1} << 32;
// Bounds of the sizes in qlm_model: products of three of them fit into int64.
constexpr int64_t LARGEST_SIZE = int64_t{1} << 21;

// Where prepared inputs lie. Two linears that are never prepared at the same time share a slot.
enum Slot {
  SLOT_QKV,  // q, or q, k and v; attention_out; project_in and _out
  SLOT_K,
  SLOT_V,
  SLOT_MLP,  // up; down; head
  SLOTS
};

struct BlockPlan {
  Split qkv[3], attention_out, up, down;
  Split together;  // attention_out and down at once, in blocks with parallel residual
  bool one_preparation = true;
};

// A run of tokens of one sequence within a chunk.
struct Segment {
  qlm_cache *cache;
  int64_t sequence;
  int64_t first;  // its first token, counted from the chunk's first
  int64_t count;
  int64_t position;  // of its first token
  int64_t items;     // of attention, for one kv head
};

struct Chunk {
  int64_t first_token, tokens;  // of the call
  int64_t first_segment, segments;
  int64_t first_row, rows;  // tokens whose logits are wanted, in `rows` of the decoder
  int64_t attention_rows;   // query rows of one item at most
  int64_t attention_items;  // in all
  bool fused;               // one item has all queries of its key-value head and sequence
  int64_t visible;          // the most positions that a token sees
};

// What each thread has for itself.
struct Private {
  Buffer row, normed, scratch, prepared[SLOTS];
};

int64_t common_multiple(int64_t a, int64_t b) {
  int64_t x = a, y = b;
  while (y != 0) {
    const int64_t rest = x % y;
    x = y;
    y = rest;
  }
  return a / x * b;
}

// y [tokens, O], the items of one linear; a phase has up to four of them.
struct Job {
  const qlm_linear *linear;
  const void *prepared;
  Epilogue epilogue;
  float *y;
  int64_t y_stride;
  Split split;
};

}  // namespace

struct qlm_decoder {
  qlm_model model;
  std::vector<qlm_block> blocks;
  qlm_linear project_in = {}, project_out = {};
  qlm_team *team;
  int64_t threads;
  std::shared_ptr<qlm::PagePool> pool;
  int64_t q_width, kv_width, qkv_width;  // columns of q, of k or v, of all

  // Follows from the chosen instruction set.
  const Kernels *kernels = nullptr;
  std::vector<BlockPlan> plans;
  Split project_in_split, project_out_split, head_split;

  // Of the running call.
  std::vector<Chunk> chunks;
  std::vector<Segment> segments;
  std::vector<int64_t> rows;        // tokens of the call whose logits are wanted
  std::vector<int32_t> segment_of;  // of each token of the call
  Buffer x, qkv, attended, mlp, projected, logits, prepared[SLOTS];
  std::vector<Private> own;
  // Cosines and sines, for PAGE positions each: [PAGE, 2, rotary_dims / 2].
  std::vector<std::vector<float>> rotary_pages;

  void plan();
  void extend_rotary(int64_t positions);
  // Where head h's query starts in a row of `qkv`, and the key and value that it reads.
  int64_t q_at(int64_t h) const {
    return model.qkv_layout == QLM_QKV_PER_HEAD ? 3 * h * model.head_dim : h * model.head_dim;
  }
  int64_t k_at(int64_t kv) const {
    return model.qkv_layout == QLM_QKV_PER_HEAD ? (3 * kv + 1) * model.head_dim : q_width + kv * model.head_dim;
  }
  int64_t v_at(int64_t kv) const {
    return k_at(kv) + (model.qkv_layout == QLM_QKV_PER_HEAD ? model.head_dim : kv_width);
  }
};

void qlm_decoder::plan() {
  const Kernels &chosen = qlm::selected();
  if (kernels == &chosen) return;
  std::vector<BlockPlan> made(blocks.size());
  auto granule = [&](const qlm_linear &linear) { return chosen.linear[linear.format].granule(linear); };
  auto alone = [&](const qlm_linear &linear) {
    return split(linear.out_features, weight_bytes(linear), granule(linear), threads);
  };
  for (size_t l = 0; l < blocks.size(); ++l) {
    const qlm_block &block = blocks[l];
    BlockPlan &p = made[l];
    const int count = model.qkv_layout == QLM_QKV_SEPARATE ? 3 : 1;
    for (int i = 0; i < count; ++i) p.qkv[i] = alone(block.qkv[i]);
    if (count == 3) {
      p.one_preparation =
          qlm::same_preparation(block.qkv[0], block.qkv[1]) && qlm::same_preparation(block.qkv[0], block.qkv[2]);
    }
    p.attention_out = alone(block.attention_out);
    p.up = alone(block.up);
    p.down = alone(block.down);
    p.together = split(model.hidden, weight_bytes(block.attention_out) + weight_bytes(block.down),
                       common_multiple(granule(block.attention_out), granule(block.down)), threads);
  }
  plans.swap(made);
  if (model.project_in != nullptr) project_in_split = alone(project_in);
  if (model.project_out != nullptr) project_out_split = alone(project_out);
  head_split = alone(model.head);
  kernels = &chosen;
}

// The angles as transformers has them: frequencies 1 / base^(2 i / dims) and their products with the position rounded
// to float32 (`GPTNeoXRotaryEmbedding`); cosine and sine of those in double.
void qlm_decoder::extend_rotary(int64_t positions) {
  if (model.rotary_dims == 0) return;
  const int64_t half = model.rotary_dims / 2;
  while (static_cast<int64_t>(rotary_pages.size()) * PAGE < positions) {
    std::vector<float> page(static_cast<size_t>(2 * PAGE * half));
    const int64_t first = static_cast<int64_t>(rotary_pages.size()) * PAGE;
    for (int64_t i = 0; i < half; ++i) {
      const float exponent = static_cast<float>(2 * i) / static_cast<float>(model.rotary_dims);
      const float frequency = 1.0f / static_cast<float>(std::pow(static_cast<double>(model.rotary_base), exponent));
      for (int64_t p = 0; p < PAGE; ++p) {
        const float angle = static_cast<float>(first + p) * frequency;
        page[static_cast<size_t>((2 * p) * half + i)] = static_cast<float>(std::cos(static_cast<double>(angle)));
        page[static_cast<size_t>((2 * p + 1) * half + i)] = static_cast<float>(std::sin(static_cast<double>(angle)));
      }
    }
    rotary_pages.push_back(std::move(page));
  }
}

namespace {

// One call: what the caller gave, and what the threads share.
struct Step {
  qlm_decoder &decoder;
  const int32_t *ids;
  float *step_logits;      // qlm_decoder_step: [S, V] or NULL
  const int32_t *targets;  // qlm_decoder_score
  float *log_probabilities;
  float *all_logits;

  const Kernels &k;
  const qlm_model &model;
  const int64_t E, F, V, width;  // residual stream, MLP, vocabulary, embedding
  // The first failure in the order (block, token): block * MOST_TOKENS + token; block L is the head.
  std::atomic<int64_t> failure{INT64_MAX};

  Step(qlm_decoder &decoder, const int32_t *ids, float *step_logits, const int32_t *targets, float *log_probabilities,
       float *all_logits)
      : decoder(decoder),
        ids(ids),
        step_logits(step_logits),
        targets(targets),
        log_probabilities(log_probabilities),
        all_logits(all_logits),
        k(*decoder.kernels),
        model(decoder.model),
        E(model.hidden),
        F(model.mlp),
        V(model.vocabulary),
        width(model.embedding_width) {}

  bool scores() const { return targets != nullptr; }

  void not_finite(int64_t block, int64_t token) {
    const int64_t here = block * MOST_TOKENS + token;
    int64_t seen = failure.load(std::memory_order_relaxed);
    while (here < seen && !failure.compare_exchange_weak(seen, here, std::memory_order_relaxed)) {
    }
  }
  // To be asked after a barrier that follows the work which may have failed: all threads then get the same answer.
  bool failed() const { return failure.load(std::memory_order_relaxed) != INT64_MAX; }

  void work(int thread);
  bool blocks(const Chunk &chunk, int thread);
  void gather(const Chunk &chunk);
  void heads(const Chunk &chunk, int thread);

  // `work(t)` for 0 <= t < count, then a barrier; or, `alone`, on every thread for itself without one.
  template <typename F_>
  void tokens(int64_t count, bool alone, F_ &&work) {
    if (alone) {
      for (int64_t t = 0; t < count; ++t) work(t);
      return;
    }
    const int64_t group = count >= TOKEN_GROUP_FROM ? TOKEN_GROUP : 1;
    decoder.team->each(ceil_div(count, group), [&](int64_t item) {
      const int64_t end = std::min(count, (item + 1) * group);
      for (int64_t t = item * group; t < end; ++t) work(t);
    });
    decoder.team->barrier();
  }

  void *slot(Slot which, bool alone, int thread) {
    return alone ? decoder.own[static_cast<size_t>(thread)].prepared[which].bytes() : decoder.prepared[which].bytes();
  }

  void prepare(const qlm_linear &linear, int64_t count, int64_t t, const float *x, void *prepared) {
    qlm::prepare(k, linear, count, t, x, prepared);
  }

  void run(const Job &job, int64_t count, int64_t item) {
    const int64_t o0 = job.split.start(item), o1 = job.split.start(item + 1);
    qlm::run(k, *job.linear, count, job.prepared, o0, o1, job.epilogue, job.y, job.y_stride);
  }

  // All items of the jobs; no barrier.
  void run_all(const Job *jobs, int count_of_jobs, int64_t count) {
    int64_t items = 0;
    for (int j = 0; j < count_of_jobs; ++j) items += jobs[j].split.items;
    decoder.team->each(items, [&](int64_t item) {
      int j = 0;
      for (; item >= jobs[j].split.items; ++j) item -= jobs[j].split.items;
      run(jobs[j], count, item);
    });
  }

  void store(const Chunk &chunk, int64_t layer, int64_t t, int64_t kv_head);
  void attend(const Chunk &chunk, const Segment &segment, int64_t layer, int64_t kv_head, int64_t group, int thread);
  void attention(const Chunk &chunk, int64_t layer, int thread);
};

// Rotate one token's key and its queries, and put key and value into the cache.
void Step::store(const Chunk &chunk, int64_t layer, int64_t t, int64_t kv_head) {
  const Segment &segment =
      decoder.segments[static_cast<size_t>(decoder.segment_of[static_cast<size_t>(chunk.first_token + t)])];
  const int64_t position = segment.position + t - segment.first;
  float *const row = decoder.qkv.floats() + t * decoder.qkv_width;
  float *const key = row + decoder.k_at(kv_head);
  if (model.rotary_dims > 0) {
    const int64_t half = model.rotary_dims / 2, group = model.heads / model.kv_heads;
    const float *const cosine =
        decoder.rotary_pages[static_cast<size_t>(position / PAGE)].data() + 2 * (position % PAGE) * half;
    const float *const sine = cosine + half;
    k.rotate(key, model.rotary_dims, cosine, sine);
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      k.rotate(row + decoder.q_at(h), model.rotary_dims, cosine, sine);
    }
  }
  if (!k.cache_store(segment.cache->view(layer), kv_head, position, key, row + decoder.v_at(kv_head))) {
    not_finite(layer, chunk.first_token + t);
  }
}

// Query rows are (token, head), so that all heads that read the same key and value are together.
void Step::attend(const Chunk &chunk, const Segment &segment, int64_t layer, int64_t kv_head, int64_t group,
                  int thread) {
  const int64_t heads = model.heads / model.kv_heads, D = model.head_dim;
  const float *q[qlm::ATTENTION_ROWS];
  float *out[qlm::ATTENTION_ROWS];
  int64_t visible[qlm::ATTENTION_ROWS];
  const int64_t first = group * chunk.attention_rows;
  const int64_t end = std::min(first + chunk.attention_rows, segment.count * heads);
  for (int64_t row = first; row < end; ++row) {
    const int64_t t = row / heads, h = kv_head * heads + row % heads, i = row - first;
    q[i] = decoder.qkv.floats() + (segment.first + t) * decoder.qkv_width + decoder.q_at(h);
    out[i] = decoder.attended.floats() + (segment.first + t) * decoder.q_width + h * D;
    visible[i] = segment.position + t + 1;
  }
  const AttentionTask task = {segment.cache->view(layer), kv_head, end - first, q, out, visible, model.attention_scale};
  k.attention(task, decoder.own[static_cast<size_t>(thread)].scratch.bytes());
}

// Keys and values into the cache, then attention; ends with a barrier.
void Step::attention(const Chunk &chunk, int64_t layer, int thread) {
  if (!chunk.fused) {
    const int64_t groups = ceil_div(chunk.tokens, STORED);
    decoder.team->each(groups * model.kv_heads, [&](int64_t item) {
      const int64_t kv_head = item / groups, first = item % groups * STORED;
      for (int64_t t = first; t < std::min(first + STORED, chunk.tokens); ++t) store(chunk, layer, t, kv_head);
    });
    decoder.team->barrier();
  }
  // Items come in ascending order, so each thread walks through the segments once.
  int64_t s = 0, before = 0;
  decoder.team->each(chunk.attention_items, [&](int64_t item) {
    const Segment *segment = &decoder.segments[static_cast<size_t>(chunk.first_segment + s)];
    while (item - before >= segment->items * model.kv_heads) {
      before += segment->items * model.kv_heads;
      segment = &decoder.segments[static_cast<size_t>(chunk.first_segment + ++s)];
    }
    // The last groups of a head see the most; they come first, so that short ones fill the gaps at the end.
    const int64_t kv_head = (item - before) / segment->items;
    const int64_t group = segment->items - 1 - (item - before) % segment->items;
    if (chunk.fused) {
      for (int64_t t = 0; t < segment->count; ++t) store(chunk, layer, segment->first + t, kv_head);
    }
    attend(chunk, *segment, layer, kv_head, group, thread);
  });
  decoder.team->barrier();
}

// The residual stream and attention's output of the rows that are wanted, moved to the front.
void Step::gather(const Chunk &chunk) {
  const int64_t q = decoder.q_width;
  float *const x = decoder.x.floats(), *const attended = decoder.attended.floats();
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const int64_t t = decoder.rows[static_cast<size_t>(chunk.first_row + r)] - chunk.first_token;
    if (t == r) continue;
    std::copy_n(x + t * E, E, x + r * E);
    std::copy_n(attended + t * q, q, attended + r * q);
  }
}

// All blocks for the tokens of one chunk; the residual stream of the rows that are wanted is left in `x`. False when
// something was not finite.
bool Step::blocks(const Chunk &chunk, int thread) {
  int64_t n = chunk.tokens;
  const int32_t *const id = ids + chunk.first_token;
  const int32_t *const segment_of = decoder.segment_of.data() + chunk.first_token;
  float *const x = decoder.x.floats(), *const qkv = decoder.qkv.floats();
  float *const attended = decoder.attended.floats(), *const mlp = decoder.mlp.floats();
  Private &own = decoder.own[static_cast<size_t>(thread)];
  float *const normed = own.normed.floats();
  const bool separate = model.qkv_layout == QLM_QKV_SEPARATE;
  // With norms after the sums every thread would have to write the residual stream.
  const bool alone = n == 1 && model.norm_before;
  const Epilogue plain, add{QLM_NONE, true}, activated{model.activation, false};

  auto embed_position = [&](int64_t t, bool sum, float *row) {
    if (model.position != nullptr) {
      const Segment &segment = decoder.segments[static_cast<size_t>(segment_of[t])];
      const int64_t position = segment.position + t - segment.first;
      k.embed(model.position, model.position_dtype, position + model.position_offset, E, sum, row);
    } else if (!sum) {
      std::memset(row, 0, static_cast<size_t>(E) * sizeof(float));
    }
  };

  if (model.project_in != nullptr) {
    void *const prepared = slot(SLOT_QKV, false, thread);
    tokens(n, false, [&](int64_t t) {
      k.embed(model.embedding, model.embedding_dtype, id[t], width, false, normed);
      prepare(decoder.project_in, n, t, normed, prepared);
      embed_position(t, false, x + t * E);
    });
    const Job job = {&decoder.project_in, prepared, add, x, E, decoder.project_in_split};
    run_all(&job, 1, n);
    decoder.team->barrier();
  }

  for (int64_t l = 0; l < model.layers; ++l) {
    const qlm_block &block = decoder.blocks[static_cast<size_t>(l)];
    const BlockPlan &plan = decoder.plans[static_cast<size_t>(l)];
    void *const for_q = slot(SLOT_QKV, alone, thread), *const for_mlp = slot(SLOT_MLP, alone, thread);
    void *const for_k = plan.one_preparation ? for_q : slot(SLOT_K, alone, thread);
    void *const for_v = plan.one_preparation ? for_q : slot(SLOT_V, alone, thread);
    // The last block's keys and values are needed of every token, all that follows only of the rows that are wanted.
    const bool narrows = l + 1 == model.layers && chunk.rows < n;
    const bool up_early = model.parallel_residual && !narrows;

    tokens(n, alone, [&](int64_t t) {
      float *row = x + t * E;
      if (l == 0 && model.project_in == nullptr) {
        // Alone, one thread writes the residual stream; it is read by others only after the next barrier.
        if (alone && thread != 0) row = own.row.floats();
        k.embed(model.embedding, model.embedding_dtype, id[t], width, false, row);
        embed_position(t, true, row);
      }
      const float *in = row;
      if (model.norm_before) {
        k.layer_norm(row, block.attention_norm, model.norm_eps, E, normed);
        in = normed;
      } else if (l > 0) {
        k.layer_norm(row, decoder.blocks[static_cast<size_t>(l - 1)].mlp_norm, model.norm_eps, E, row);
      }
      prepare(block.qkv[0], n, t, in, for_q);
      if (separate && !plan.one_preparation) {
        prepare(block.qkv[1], n, t, in, for_k);
        prepare(block.qkv[2], n, t, in, for_v);
      }
      if (up_early) {
        k.layer_norm(row, block.mlp_norm, model.norm_eps, E, normed);
        prepare(block.up, n, t, normed, for_mlp);
      }
    });

    const int64_t stride = decoder.qkv_width;
    Job jobs[4] = {{&block.qkv[0], for_q, plain, qkv, stride, plan.qkv[0]}};
    int count = 1;
    if (separate) {
      jobs[count++] = {&block.qkv[1], for_k, plain, qkv + decoder.q_width, stride, plan.qkv[1]};
      jobs[count++] = {&block.qkv[2], for_v, plain, qkv + decoder.q_width + decoder.kv_width, stride, plan.qkv[2]};
    }
    const Job up = {&block.up, for_mlp, activated, mlp, F, plan.up};
    if (up_early) jobs[count++] = up;
    run_all(jobs, count, n);
    decoder.team->barrier();

    attention(chunk, l, thread);
    if (failed()) return false;
    if (narrows) {
      n = chunk.rows;
      if (n == 0) return true;
      if (thread == 0) gather(chunk);
      decoder.team->barrier();
      if (model.parallel_residual) {
        tokens(n, false, [&](int64_t t) {
          k.layer_norm(x + t * E, block.mlp_norm, model.norm_eps, E, normed);
          prepare(block.up, n, t, normed, for_mlp);
        });
        run_all(&up, 1, n);
        decoder.team->barrier();
      }
    }

    tokens(n, alone, [&](int64_t t) {
      prepare(block.attention_out, n, t, attended + t * decoder.q_width, for_q);
      if (model.parallel_residual) prepare(block.down, n, t, mlp + t * F, for_mlp);
    });
    Job out = {&block.attention_out, for_q, add, x, E, plan.attention_out};
    Job down = {&block.down, for_mlp, add, x, E, plan.down};
    if (model.parallel_residual) {
      // Both on the same out features, so that one thread adds both.
      out.split = down.split = plan.together;
      decoder.team->each(plan.together.items, [&](int64_t item) {
        run(out, n, item);
        run(down, n, item);
      });
      decoder.team->barrier();
      continue;
    }
    run_all(&out, 1, n);
    decoder.team->barrier();

    tokens(n, alone, [&](int64_t t) {
      float *const row = x + t * E;
      float *const in = model.norm_before ? normed : row;
      k.layer_norm(row, model.norm_before ? block.mlp_norm : block.attention_norm, model.norm_eps, E, in);
      prepare(block.up, n, t, in, for_mlp);
    });
    run_all(&up, 1, n);
    decoder.team->barrier();

    tokens(n, alone, [&](int64_t t) { prepare(block.down, n, t, mlp + t * F, for_mlp); });
    run_all(&down, 1, n);
    decoder.team->barrier();
  }
  return true;
}

// Logits of the chunk's rows that are wanted, `SCORED` at a time when they are only looked at.
void Step::heads(const Chunk &chunk, int thread) {
  Private &own = decoder.own[static_cast<size_t>(thread)];
  const int64_t block_rows = scores() ? SCORED : chunk.rows;
  for (int64_t done = 0; done < chunk.rows; done += block_rows) {
    const int64_t m = std::min(block_rows, chunk.rows - done), row0 = chunk.first_row + done;
    const int64_t *const token = decoder.rows.data() + row0;
    const bool alone = m == 1;
    void *const prepared = slot(SLOT_MLP, alone, thread);
    void *const projecting = slot(SLOT_QKV, alone, thread);
    // With all_logits every token has its row there; else rows follow each other.
    float *const y = all_logits != nullptr ? all_logits + token[0] * V
                     : scores()            ? decoder.logits.floats()
                                           : step_logits + row0 * V;

    tokens(m, alone, [&](int64_t r) {
      const float *in = decoder.x.floats() + (done + r) * E;
      float *const normed = own.normed.floats();
      auto norm = [&](const qlm_norm &which) {
        k.layer_norm(in, which, model.norm_eps, E, normed);
        in = normed;
      };
      if (!model.norm_before) norm(decoder.blocks.back().mlp_norm);
      if (model.has_final_norm) norm(model.final_norm);
      if (model.project_out != nullptr) {
        prepare(decoder.project_out, m, r, in, projecting);
      } else {
        prepare(model.head, m, r, in, prepared);
      }
    });
    if (model.project_out != nullptr) {
      float *const projected = decoder.projected.floats();
      const Job job = {&decoder.project_out, projecting, {}, projected, width, decoder.project_out_split};
      run_all(&job, 1, m);
      decoder.team->barrier();
      tokens(m, alone, [&](int64_t r) { prepare(model.head, m, r, projected + r * width, prepared); });
    }
    const Job job = {&model.head, prepared, {}, y, V, decoder.head_split};
    decoder.team->each(job.split.items, [&](int64_t item) {
      run(job, m, item);
      const int64_t o0 = job.split.start(item), o1 = job.split.start(item + 1);
      for (int64_t r = 0; r < m; ++r) {
        if (!k.all_finite(y + r * V + o0, o1 - o0)) not_finite(model.layers, token[r]);
      }
    });
    decoder.team->barrier();
    if (!scores()) continue;
    decoder.team->each(m, [&](int64_t r) {
      const int32_t target = targets[token[r]];
      if (target < 0) return;
      const double log_sum = k.log_sum_exp(y + r * V, V);
      if (!std::isfinite(log_sum)) not_finite(model.layers, token[r]);
      log_probabilities[token[r]] = static_cast<float>(static_cast<double>(y[r * V + target]) - log_sum);
    });
    decoder.team->barrier();
  }
}

void Step::work(int thread) {
  for (const Chunk &chunk : decoder.chunks) {
    if (!blocks(chunk, thread)) return;
    heads(chunk, thread);
  }
}

const char *dtype_name(int32_t dtype) {
  return dtype == QLM_F32 ? "float32" : dtype == QLM_F16 ? "float16" : dtype == QLM_BF16 ? "bfloat16" : "int8";
}

// Arguments and memory ------------------------------------------------------------------------------------------------

int check_call(const qlm_decoder *decoder, int64_t sequences, qlm_cache *const *caches, const int64_t *counts,
               const int32_t *ids, const int32_t *targets, int64_t *total) {
  if (decoder == nullptr || caches == nullptr || counts == nullptr || ids == nullptr) {
    return fail(QLM_BAD_ARGUMENT, "decoder, caches, counts or ids is NULL");
  }
  if (sequences < 1 || sequences > MOST_TOKENS) {
    return fail(QLM_BAD_ARGUMENT, "%lld sequences; expected at least 1", static_cast<long long>(sequences));
  }
  const qlm_model &model = decoder->model;
  int64_t token = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const auto number = static_cast<long long>(s);
    if (caches[s] == nullptr) return fail(QLM_BAD_ARGUMENT, "sequence %lld: its cache is NULL", number);
    if (caches[s]->pool != decoder->pool) {
      return fail(QLM_BAD_ARGUMENT, "sequence %lld: its cache belongs to another decoder", number);
    }
    if (counts[s] < 1) {
      return fail(QLM_BAD_ARGUMENT, "sequence %lld: %lld ids; expected at least 1", number,
                  static_cast<long long>(counts[s]));
    }
    if (counts[s] > model.positions - caches[s]->length) {
      return fail(QLM_BAD_ARGUMENT, "sequence %lld: %lld ids after the %lld in its cache; the model has %lld positions",
                  number, static_cast<long long>(counts[s]), static_cast<long long>(caches[s]->length),
                  static_cast<long long>(model.positions));
    }
    if (counts[s] > MOST_TOKENS - 1 - token)
      return fail(QLM_BAD_ARGUMENT, "more than 2^32 ids in one call; give fewer");
    for (int64_t end = token + counts[s], t = token; t < end; ++t) {
      if (ids[t] < 0 || ids[t] >= model.vocabulary) {
        return fail(QLM_BAD_ARGUMENT, "sequence %lld, id number %lld: %d; the vocabulary has 0 to %lld", number,
                    static_cast<long long>(t - token), ids[t], static_cast<long long>(model.vocabulary - 1));
      }
      if (targets != nullptr && targets[t] >= model.vocabulary) {
        return fail(QLM_BAD_ARGUMENT, "sequence %lld, target number %lld: %d; expected -1 (not scored) or 0 to %lld",
                    number, static_cast<long long>(t - token), targets[t],
                    static_cast<long long>(model.vocabulary - 1));
      }
    }
    token += counts[s];
  }
  if (sequences > 1) {
    std::vector<const qlm_cache *> sorted(caches, caches + sequences);
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) {
      const auto first = std::find(caches, caches + sequences, *twice);
      const auto second = std::find(first + 1, caches + sequences, *twice);
      return fail(QLM_BAD_ARGUMENT, "sequences %lld and %lld have the same cache; fork it to go on in two ways",
                  static_cast<long long>(first - caches), static_cast<long long>(second - caches));
    }
  }
  *total = token;
  return QLM_OK;
}

// Cut the call into chunks, and those into segments and items of attention.
void lay_out(qlm_decoder &decoder, qlm_cache *const *caches, const int64_t *counts, int64_t total, bool last_tokens,
             const int32_t *targets, bool all) {
  const qlm_model &model = decoder.model;
  const int64_t heads = model.heads / model.kv_heads;
  decoder.chunks.clear();
  decoder.segments.clear();
  decoder.rows.clear();
  decoder.segment_of.resize(static_cast<size_t>(total));
  int64_t s = 0, taken = 0;  // the sequence that comes next, and how many of its tokens are in earlier chunks
  for (int64_t token = 0; token < total;) {
    Chunk chunk = {};
    chunk.first_token = token;
    chunk.first_segment = static_cast<int64_t>(decoder.segments.size());
    chunk.first_row = static_cast<int64_t>(decoder.rows.size());
    chunk.tokens = std::min(CHUNK, total - token);
    for (int64_t t = 0; t < chunk.tokens;) {
      const int64_t count = std::min(counts[s] - taken, chunk.tokens - t);
      const Segment segment = {caches[s], s, t, count, caches[s]->length + taken, 0};
      std::fill_n(decoder.segment_of.begin() + token + t, count, static_cast<int32_t>(decoder.segments.size()));
      decoder.segments.push_back(segment);
      chunk.visible = std::max(chunk.visible, segment.position + count);
      t += count;
      taken += count;
      if (taken == counts[s]) {
        if (last_tokens) decoder.rows.push_back(token + t - 1);
        ++s;
        taken = 0;
      }
    }
    if (targets != nullptr) {
      for (int64_t t = token; t < token + chunk.tokens; ++t) {
        if (all || targets[t] >= 0) decoder.rows.push_back(t);
      }
    }
    chunk.segments = static_cast<int64_t>(decoder.segments.size()) - chunk.first_segment;
    chunk.rows = static_cast<int64_t>(decoder.rows.size()) - chunk.first_row;
    // Fewer queries in an item where there would be less than one for each thread; no result depends on that.
    auto items = [&](int64_t rows) {
      int64_t sum = 0;
      for (int64_t i = 0; i < chunk.segments; ++i) {
        Segment &segment = decoder.segments[static_cast<size_t>(chunk.first_segment + i)];
        segment.items = ceil_div(segment.count * heads, rows);
        sum += segment.items * model.kv_heads;
      }
      return sum;
    };
    chunk.attention_rows = qlm::ATTENTION_ROWS;
    chunk.attention_items = items(chunk.attention_rows);
    while (chunk.attention_rows > 1 && chunk.attention_items < decoder.threads) {
      chunk.attention_rows /= 2;
      chunk.attention_items = items(chunk.attention_rows);
    }
    chunk.fused = chunk.attention_items == chunk.segments * model.kv_heads;
    decoder.chunks.push_back(chunk);
    token += chunk.tokens;
  }
}

void reserve(qlm_decoder &decoder, bool with_block_logits) {
  const qlm_model &model = decoder.model;
  const Kernels &k = *decoder.kernels;
  int64_t n = 0, rows = 0, visible = 0;
  for (const Chunk &chunk : decoder.chunks) {
    n = std::max(n, chunk.tokens);
    rows = std::max(rows, with_block_logits ? std::min(chunk.rows, SCORED) : chunk.rows);
    visible = std::max(visible, chunk.visible);
  }
  const int64_t float_bytes = sizeof(float);
  decoder.x.reserve(n * model.hidden * float_bytes);
  decoder.qkv.reserve(n * decoder.qkv_width * float_bytes);
  decoder.attended.reserve(n * decoder.q_width * float_bytes);
  decoder.mlp.reserve(n * model.mlp * float_bytes);
  if (model.project_out != nullptr) decoder.projected.reserve(rows * model.embedding_width * float_bytes);
  if (with_block_logits) decoder.logits.reserve(rows * model.vocabulary * float_bytes);

  auto slots = [&](Buffer *buffers, int64_t tokens, int64_t head_rows) {
    int64_t bytes[SLOTS] = {};
    auto need = [&](Slot slot, const qlm_linear &linear, int64_t count) {
      if (count > 0) bytes[slot] = std::max(bytes[slot], qlm::prepared_bytes(k, linear, count));
    };
    for (size_t l = 0; l < decoder.blocks.size(); ++l) {
      const qlm_block &block = decoder.blocks[l];
      need(SLOT_QKV, block.qkv[0], tokens);
      if (!decoder.plans[l].one_preparation) {
        need(SLOT_K, block.qkv[1], tokens);
        need(SLOT_V, block.qkv[2], tokens);
      }
      need(SLOT_QKV, block.attention_out, tokens);
      need(SLOT_MLP, block.up, tokens);
      need(SLOT_MLP, block.down, tokens);
    }
    if (model.project_in != nullptr) need(SLOT_QKV, decoder.project_in, tokens);
    if (model.project_out != nullptr) need(SLOT_QKV, decoder.project_out, head_rows);
    need(SLOT_MLP, model.head, head_rows);
    for (int i = 0; i < SLOTS; ++i) buffers[i].reserve(bytes[i]);
  };
  slots(decoder.prepared, n, rows);
  const int64_t scratch = k.attention_scratch_bytes(visible), row = std::max(model.hidden, model.embedding_width);
  for (Private &own : decoder.own) {
    own.row.reserve(row * float_bytes);
    own.normed.reserve(row * float_bytes);
    own.scratch.reserve(scratch);
    slots(own.prepared, 1, 1);
  }
}

int describe_failure(const qlm_decoder &decoder, int64_t failure) {
  const int64_t block = failure / MOST_TOKENS, token = failure % MOST_TOKENS;
  const Segment *segment = &decoder.segments[static_cast<size_t>(decoder.segment_of[static_cast<size_t>(token)])];
  int64_t position = token;
  for (const Chunk &chunk : decoder.chunks) {
    if (token >= chunk.first_token && token < chunk.first_token + chunk.tokens) {
      position = segment->position + token - chunk.first_token - segment->first;
    }
  }
  const auto sequence = static_cast<long long>(segment->sequence);
  if (block == decoder.model.layers) {
    return fail(
        QLM_NOT_FINITE,
        "sequence %lld, position %lld: the logits are NaN or infinite; the checkpoint is damaged or overflows float32",
        sequence, static_cast<long long>(position));
  }
  const int32_t dtype = decoder.pool->dtype();
  return fail(
      QLM_NOT_FINITE,
      "sequence %lld, position %lld: a key or value of block %lld is NaN, infinite or too large for a %s cache; %s",
      sequence, static_cast<long long>(position), static_cast<long long>(block), dtype_name(dtype),
      dtype == QLM_F16 ? "use cache_dtype bfloat16 or float32; if that fails too, the checkpoint is damaged"
                       : "the checkpoint is damaged");
}

// Whether a file that holds something of the model has shrunk.
bool shrank(const qlm_decoder &decoder) {
  if (!qlm::any_shrank()) return false;
  const qlm_model &model = decoder.model;
  const int linears = model.qkv_layout == QLM_QKV_SEPARATE ? 3 : 1;
  auto norm_shrank = [](const qlm_norm &norm) { return qlm::shrank(norm.weight) || qlm::shrank(norm.bias); };
  auto block_shrank = [&](const qlm_block &block) {
    for (int i = 0; i < linears; ++i) {
      if (qlm::shrank(block.qkv[i])) return true;
    }
    return qlm::shrank(block.attention_out) || qlm::shrank(block.up) || qlm::shrank(block.down) ||
           norm_shrank(block.attention_norm) || norm_shrank(block.mlp_norm);
  };
  return qlm::shrank(model.embedding) || qlm::shrank(model.position) || qlm::shrank(model.head) ||
         qlm::shrank(decoder.project_in) || qlm::shrank(decoder.project_out) || norm_shrank(model.final_norm) ||
         std::any_of(decoder.blocks.begin(), decoder.blocks.end(), block_shrank);
}

// `call` may throw; what it throws becomes a status.
template <typename F>
int guarded(F &&call) {
  try {
    return call();
  } catch (const std::bad_alloc &) {
    return fail(QLM_NO_MEMORY, "not enough memory; use fewer or shorter sequences");
  } catch (const std::exception &error) {
    return fail(QLM_NO_MEMORY, "%s", error.what());
  } catch (...) {
    return fail(QLM_NO_MEMORY, "unknown C++ exception");
  }
}

int run_call(qlm_decoder *decoder, int64_t sequences, qlm_cache *const *caches, const int64_t *counts,
             const int32_t *ids, float *step_logits, const int32_t *targets, float *log_probabilities,
             float *all_logits) {
  return guarded([&]() -> int {
    // A cache's length is read while checking, and it must not change until it has grown.
    std::unique_lock<std::mutex> lock;
    if (decoder != nullptr) lock = std::unique_lock<std::mutex>(decoder->pool->mutex);
    int64_t total = 0;
    if (const int status = check_call(decoder, sequences, caches, counts, ids, targets, &total)) return status;
    decoder->plan();
    lay_out(*decoder, caches, counts, total, step_logits != nullptr, targets, all_logits != nullptr);
    int64_t visible = 0;
    for (const Chunk &chunk : decoder->chunks) visible = std::max(visible, chunk.visible);
    decoder->extend_rotary(visible);
    reserve(*decoder, targets != nullptr && all_logits == nullptr);
    auto undo = [&](bool wipe) {
      for (int64_t s = 0; s < sequences; ++s) caches[s]->forget(caches[s]->length, wipe);
    };
    if (targets != nullptr) std::fill_n(log_probabilities, total, 0.0f);
    Step step(*decoder, ids, step_logits, targets, log_probabilities, all_logits);
    bool started = false;
    try {
      for (int64_t s = 0; s < sequences; ++s) caches[s]->reserve(caches[s]->length + counts[s]);
      started = true;
      decoder->team->run([&](int thread) { step.work(thread); });
    } catch (...) {
      undo(started);
      throw;
    }
    int status = QLM_OK;
    if (shrank(*decoder)) {
      status =
          fail(QLM_FILE_SHRANK, "a file of the checkpoint became shorter while it was in use; nothing was computed");
    } else if (step.failed()) {
      status = describe_failure(*decoder, step.failure.load());
    }
    if (status != QLM_OK) {
      undo(true);
      return status;
    }
    for (int64_t s = 0; s < sequences; ++s) caches[s]->length += counts[s];
    return QLM_OK;
  });
}

int check_size(const char *name, int64_t value) {
  if (value >= 1 && value <= LARGEST_SIZE) return QLM_OK;
  return fail(QLM_BAD_ARGUMENT, "%s is %lld; expected 1 to %lld", name, static_cast<long long>(value),
              static_cast<long long>(LARGEST_SIZE));
}

int check_linear(const char *name, int64_t layer, const qlm_linear &linear, int64_t in_features, int64_t out_features) {
  char where[64];
  if (layer < 0) {
    std::snprintf(where, sizeof where, "%s", name);
  } else {
    std::snprintf(where, sizeof where, "block %lld, %s", static_cast<long long>(layer), name);
  }
  if (linear.in_features != in_features || linear.out_features != out_features) {
    return fail(QLM_BAD_ARGUMENT, "%s: %lld in and %lld out features; the model's sizes imply %lld and %lld", where,
                static_cast<long long>(linear.in_features), static_cast<long long>(linear.out_features),
                static_cast<long long>(in_features), static_cast<long long>(out_features));
  }
  if (const int status = qlm_linear_check(&linear)) {
    char line[512];
    std::snprintf(line, sizeof line, "%s", qlm_error());
    return fail(status, "%s: %s", where, line);
  }
  return QLM_OK;
}

int check_model(const qlm_model &model) {
  const struct {
    const char *name;
    int64_t value;
  } sizes[] = {{"vocabulary", model.vocabulary},
               {"positions", model.positions},
               {"embedding_width", model.embedding_width},
               {"hidden", model.hidden},
               {"mlp", model.mlp},
               {"layers", model.layers},
               {"heads", model.heads},
               {"kv_heads", model.kv_heads},
               {"head_dim", model.head_dim}};
  for (const auto &size : sizes) {
    if (const int status = check_size(size.name, size.value)) return status;
  }
  const auto heads = static_cast<long long>(model.heads), kv_heads = static_cast<long long>(model.kv_heads);
  const auto head_dim = static_cast<long long>(model.head_dim);
  if (model.heads % model.kv_heads != 0) {
    return fail(QLM_BAD_ARGUMENT, "%lld heads are no multiple of %lld key-value heads", heads, kv_heads);
  }
  if (model.heads * model.head_dim > LARGEST_SIZE) {
    return fail(QLM_BAD_ARGUMENT, "%lld heads of %lld dims; expected at most %lld in all", heads, head_dim,
                static_cast<long long>(LARGEST_SIZE));
  }
  if (model.rotary_dims < 0 || model.rotary_dims % 2 != 0 || model.rotary_dims > model.head_dim) {
    return fail(QLM_BAD_ARGUMENT, "rotary_dims is %lld; expected an even number from 0 to head_dim %lld",
                static_cast<long long>(model.rotary_dims), head_dim);
  }
  if (model.rotary_dims > 0 && !(model.rotary_base > 0.0f && std::isfinite(model.rotary_base))) {
    return fail(QLM_BAD_ARGUMENT, "rotary_base is %g; expected a positive number",
                static_cast<double>(model.rotary_base));
  }
  if (!(model.norm_eps >= 0.0f && std::isfinite(model.norm_eps)) || !std::isfinite(model.attention_scale)) {
    return fail(QLM_BAD_ARGUMENT, "norm_eps %g or attention_scale %g is not a usable number",
                static_cast<double>(model.norm_eps), static_cast<double>(model.attention_scale));
  }
  if (model.qkv_layout < QLM_QKV_SEPARATE || model.qkv_layout > QLM_QKV_MULTI_QUERY) {
    return fail(QLM_BAD_ARGUMENT, "qkv_layout is %d; expected 0 to 2", model.qkv_layout);
  }
  if (model.qkv_layout == QLM_QKV_PER_HEAD && model.kv_heads != model.heads) {
    return fail(QLM_BAD_ARGUMENT, "queries, keys and values per head, but %lld heads and %lld key-value heads", heads,
                kv_heads);
  }
  if (model.activation < QLM_NONE || model.activation > QLM_GELU_TANH) {
    return fail(QLM_BAD_ARGUMENT, "activation is %d; expected 0 to 3", model.activation);
  }
  if (model.parallel_residual != 0 && model.norm_before == 0) {
    return fail(QLM_BAD_ARGUMENT, "parallel_residual with norms after the sums; no such model is known");
  }
  if (model.embedding == nullptr || model.blocks == nullptr)
    return fail(QLM_BAD_ARGUMENT, "embedding or blocks is NULL");
  if (!is_float(model.embedding_dtype) || (model.position != nullptr && !is_float(model.position_dtype))) {
    return fail(QLM_BAD_ARGUMENT, "embedding_dtype %d, position_dtype %d; expected float32, float16 or bfloat16",
                model.embedding_dtype, model.position_dtype);
  }
  if (model.position_offset < 0 || model.position_offset > LARGEST_SIZE) {
    return fail(QLM_BAD_ARGUMENT, "position_offset is %lld; expected 0 or more",
                static_cast<long long>(model.position_offset));
  }
  const int64_t E = model.hidden, W = model.embedding_width;
  if ((model.project_in == nullptr || model.project_out == nullptr) && W != E) {
    return fail(QLM_BAD_ARGUMENT, "embedding_width %lld without project_in and project_out; expected hidden, %lld",
                static_cast<long long>(W), static_cast<long long>(E));
  }
  if (model.project_in != nullptr) {
    if (const int status = check_linear("project_in", -1, *model.project_in, W, E)) return status;
  }
  if (model.project_out != nullptr) {
    if (const int status = check_linear("project_out", -1, *model.project_out, E, W)) return status;
  }
  if (const int status = check_linear("head", -1, model.head, W, model.vocabulary)) return status;
  const int64_t q = model.heads * model.head_dim, kv = model.kv_heads * model.head_dim;
  const bool separate = model.qkv_layout == QLM_QKV_SEPARATE;
  for (int64_t l = 0; l < model.layers; ++l) {
    const qlm_block &block = model.blocks[l];
    if (const int status = check_linear(separate ? "q" : "qkv", l, block.qkv[0], E, separate ? q : q + 2 * kv))
      return status;
    if (separate) {
      if (const int status = check_linear("k", l, block.qkv[1], E, kv)) return status;
      if (const int status = check_linear("v", l, block.qkv[2], E, kv)) return status;
    }
    if (const int status = check_linear("attention_out", l, block.attention_out, q, E)) return status;
    if (const int status = check_linear("up", l, block.up, E, model.mlp)) return status;
    if (const int status = check_linear("down", l, block.down, model.mlp, E)) return status;
  }
  return QLM_OK;
}

}  // namespace

// The C functions -----------------------------------------------------------------------------------------------------

int qlm_decoder_create(const qlm_model *model, qlm_team *team, int32_t cache_dtype, qlm_decoder **decoder) {
  return guarded([&]() -> int {
    if (model == nullptr || team == nullptr || decoder == nullptr)
      return fail(QLM_BAD_ARGUMENT, "model, team or decoder is NULL");
    if (cache_dtype < QLM_F32 || cache_dtype > QLM_I8) {
      return fail(QLM_BAD_ARGUMENT, "cache_dtype is %d; expected float32, float16, bfloat16 or int8", cache_dtype);
    }
    if (const int status = check_model(*model)) return status;
    auto made = std::make_unique<qlm_decoder>();
    made->model = *model;
    made->blocks.assign(model->blocks, model->blocks + model->layers);
    made->model.blocks = made->blocks.data();
    if (model->project_in != nullptr) made->project_in = *model->project_in;
    if (model->project_out != nullptr) made->project_out = *model->project_out;
    made->team = team;
    made->threads = team->threads();
    made->own = std::vector<Private>(static_cast<size_t>(made->threads));
    made->q_width = model->heads * model->head_dim;
    made->kv_width = model->kv_heads * model->head_dim;
    made->qkv_width = made->q_width + 2 * made->kv_width;
    made->pool = std::make_shared<qlm::PagePool>(model->layers, model->kv_heads, model->head_dim, cache_dtype);
    *decoder = made.release();
    return QLM_OK;
  });
}

void qlm_decoder_destroy(qlm_decoder *decoder) { delete decoder; }

int qlm_cache_create(qlm_decoder *decoder, qlm_cache **cache) {
  return guarded([&]() -> int {
    if (decoder == nullptr || cache == nullptr) return fail(QLM_BAD_ARGUMENT, "decoder or cache is NULL");
    *cache = new qlm_cache(decoder->pool);
    return QLM_OK;
  });
}

int qlm_cache_fork(const qlm_cache *cache, qlm_cache **copy) {
  return guarded([&]() -> int {
    if (cache == nullptr || copy == nullptr) return fail(QLM_BAD_ARGUMENT, "cache or copy is NULL");
    const std::lock_guard<std::mutex> lock(cache->pool->mutex);
    *copy = cache->fork().release();
    return QLM_OK;
  });
}

int qlm_cache_truncate(qlm_cache *cache, int64_t length) {
  return guarded([&]() -> int {
    if (cache == nullptr) return fail(QLM_BAD_ARGUMENT, "cache is NULL");
    const std::lock_guard<std::mutex> lock(cache->pool->mutex);
    if (length < 0 || length > cache->length) {
      return fail(QLM_BAD_ARGUMENT, "length %lld; expected 0 to %lld, which the cache has",
                  static_cast<long long>(length), static_cast<long long>(cache->length));
    }
    cache->forget(length);
    return QLM_OK;
  });
}

int64_t qlm_cache_length(const qlm_cache *cache) {
  if (cache == nullptr) return 0;
  const std::lock_guard<std::mutex> lock(cache->pool->mutex);
  return cache->length;
}

void qlm_cache_destroy(qlm_cache *cache) {
  if (cache == nullptr) return;
  // The cache may be the last to hold the pool, whose mutex must outlive the lock.
  const std::shared_ptr<qlm::PagePool> pool = cache->pool;
  const std::lock_guard<std::mutex> lock(pool->mutex);
  delete cache;
}

int64_t qlm_cache_bytes(const qlm_decoder *decoder) {
  if (decoder == nullptr) return 0;
  const std::lock_guard<std::mutex> lock(decoder->pool->mutex);
  return decoder->pool->bytes();
}

int qlm_decoder_step(qlm_decoder *decoder, int64_t sequences, qlm_cache *const *caches, const int64_t *counts,
                     const int32_t *ids, float *logits) {
  return run_call(decoder, sequences, caches, counts, ids, logits, nullptr, nullptr, nullptr);
}

int qlm_decoder_score(qlm_decoder *decoder, int64_t sequences, qlm_cache *const *caches, const int64_t *counts,
                      const int32_t *ids, const int32_t *targets, float *log_probabilities, float *all_logits) {
  if (targets == nullptr || log_probabilities == nullptr) {
    return fail(QLM_BAD_ARGUMENT, "targets or log_probabilities is NULL");
  }
  return run_call(decoder, sequences, caches, counts, ids, nullptr, targets, log_probabilities, all_logits);
}
