/* The plain C ABI of qlm's CPU kernels: what Python calls through ctypes, and nothing else is exported.
 *
 * Pointers are raw; those to void (weights and scales, which lie in files) may be unaligned, typed ones are aligned to
 * their type. Sizes are int64 counts of elements unless a name says bytes; matrices are row-major. Shape letters as in
 * qlm/arch/spec.py: T tokens, I in features, O out features, G groups, H heads, D head dim, V vocabulary, L layers; E is
 * the width of the residual stream, F that of the MLP, S sequences.
 *
 * Functions that can fail return 0 or one of the codes below, and leave one line in qlm_error(). Nothing is written
 * through an output pointer before all arguments have been checked. Memory that a struct points to belongs to the
 * caller and must outlive the object made from it.
 */
#ifndef QLM_ABI_H
#define QLM_ABI_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QLM_ABI_VERSION 3

#if defined(__GNUC__)
#define QLM_API __attribute__((visibility("default")))
#else
#define QLM_API
#endif

enum qlm_status {
  QLM_OK = 0,
  QLM_BAD_ARGUMENT = 1, /* the caller's mistake: a shape, a range, a name */
  QLM_NO_MEMORY = 2,
  QLM_FILE_SHRANK = 3,  /* a mapped file that the call reads became shorter; results are garbage */
  QLM_NOT_FINITE = 4    /* NaN or infinity in the logits, or in a key or value that the cache's dtype cannot hold */
};

/* The line that belongs to the last failure on this thread; empty if there was none. */
QLM_API const char *qlm_error(void);
QLM_API int32_t qlm_abi_version(void);
/* sizeof the struct of that name, so that a caller in another language can check its own copy; -1: no such struct. */
QLM_API int64_t qlm_struct_size(const char *name);

/* Instruction sets --------------------------------------------------------------------------------------------------*/

/* Names that were compiled in, best last, separated by commas: "scalar,avx2,avxvnni,avx512vnni". */
QLM_API const char *qlm_isa_compiled(void);
/* Those of them that this CPU and operating system can run. */
QLM_API const char *qlm_isa_supported(void);
/* Choose one by name, or the best with NULL or "". Applies to all later calls of the process; not while one runs. */
QLM_API int qlm_isa_select(const char *name);
/* The one in use. */
QLM_API const char *qlm_isa_selected(void);

/* Thread teams ------------------------------------------------------------------------------------------------------*/

typedef struct qlm_team qlm_team;

/* A team of `threads` (1 to 256), the calling thread counted. Workers sleep between calls. A team serves one call at a
 * time; callers from several threads wait for each other. After fork() the child's team starts workers of its own. */
QLM_API int qlm_team_create(int32_t threads, qlm_team **team);
/* A team that runs on an OpenMP pool that is in the process already (torch's), given the address of its GOMP_parallel,
 * so that there is no second pool. For qlm_linear_forward and qlm_gram_bf16 only. */
QLM_API int qlm_team_borrow(void *gomp_parallel, int32_t threads, qlm_team **team);
QLM_API void qlm_team_destroy(qlm_team *team);
QLM_API int32_t qlm_team_threads(const qlm_team *team);

/* Linear layers -----------------------------------------------------------------------------------------------------*/

enum qlm_dtype { QLM_F32 = 0, QLM_F16 = 1, QLM_BF16 = 2, QLM_I8 = 3 };
enum qlm_format { QLM_FLOAT = 0, QLM_INT8 = 1, QLM_GPTQ = 2, QLM_NF4 = 3 };
enum qlm_activation { QLM_NONE = 0, QLM_RELU = 1, QLM_GELU = 2 /* exact, erf */, QLM_GELU_TANH = 3 };

/* y = x W^T + bias, W stored as the checkpoint stores it. Fields that a format does not name are ignored. */
typedef struct qlm_linear {
  int64_t in_features, out_features; /* I, O */
  int32_t format;                    /* qlm_format */
  int32_t bits;                      /* GPTQ: 2, 3, 4 or 8 */
  /* FLOAT: weight_dtype [O, I]. INT8: int8 [O, I]. GPTQ: qweight, int32 [I * bits / 32, O]. NF4: uint8 [O * I / 2]. */
  const void *weight;
  int32_t weight_dtype;              /* FLOAT: F32, F16 or BF16 */
  int32_t scale_dtype;               /* INT8, GPTQ: of `scale`; NF4: F32 */
  const void *scale;                 /* INT8: [O]. GPTQ: [G, O]. NF4: absmax [O * I / block], NULL when it is nested */
  const float *bias;                 /* [O] or NULL */
  const int32_t *row_sum;            /* INT8: [O], sums of the rows of weight (qlm_int8_row_sums) */
  int32_t symmetric_input;           /* INT8: activations without zero point */
  int32_t strip;                     /* GPTQ: 0, or a multiple of 128: weight is laid out by qlm_gptq_arrange */
  int64_t group_size;                /* GPTQ: in features that share a scale, in storage order: I / G */
  const uint8_t *zero_point;         /* GPTQ: [G, O], decoded */
  const int32_t *order;              /* GPTQ: NULL, or [I]: storage position i holds in feature order[i] (act order) */
  int64_t block;                     /* NF4: weights that share an absmax; divides I */
  const uint8_t *absmax_code;        /* NF4 nested: [O * I / block] */
  const float *nested_code;          /* NF4 nested: [256] */
  const float *nested_absmax;        /* NF4 nested: [ceil(O * I / block / nested_block)] */
  int64_t nested_block;
  float nested_offset;
  int32_t rank;                      /* of the adapter beside it, y += B (A x), before an activation; 0: there is none */
  const float *adapter_a;            /* [rank, I] */
  const float *adapter_b;            /* B transposed, [rank, O], its scaling included */
} qlm_linear;

/* QLM_OK if the kernels can run this layer. */
QLM_API int qlm_linear_check(const qlm_linear *linear);
/* y [T, O] = x [T, I] W^T + bias, float32; strides in elements. x and y do not overlap. */
QLM_API int qlm_linear_forward(qlm_team *team, const qlm_linear *linear, int64_t tokens, const float *x, int64_t x_stride,
                               float *y, int64_t y_stride);
/* sums [O] of the rows of an int8 weight [O, I]. */
QLM_API int qlm_int8_row_sums(qlm_team *team, const int8_t *weight, int64_t out_features, int64_t in_features,
                              int32_t *sums);
/* A float weight [O, I] to int8 codes [O, I], scale [O] = max|row| / 127, and row sums; for a head held in int8. */
QLM_API int qlm_int8_quantize_rows(qlm_team *team, const void *weight, int32_t dtype, int64_t out_features,
                                   int64_t in_features, int8_t *codes, float *scale, int32_t *sums);
/* GPTQ words [I * bits / 32, O] of the file -> words that are read in long pieces: for each `strip` out features in turn
 * (the last ones may be fewer) all their rows, [ceil(O / strip)][I * bits / 32][strip]. strip 0 keeps the layout. order:
 * NULL, or [I]: storage position i becomes in feature order[i]. */
QLM_API int qlm_gptq_arrange(qlm_team *team, const int32_t *qweight, int32_t bits, int64_t in_features,
                             int64_t out_features, const int32_t *order, int32_t strip, int32_t *arranged);
/* hessian [I, I] += x^T x, the 64 x 64 tiles of its lower triangle alone (whole tiles on the diagonal); x [T, I] bfloat16, I a
 * multiple of 64. The same bits for any number of threads. Where `qlm_gram_bf16_runs_here` is 1. */
QLM_API int qlm_gram_bf16(qlm_team *team, const uint16_t *x, int64_t tokens, int64_t features, float *hessian);
/* 1 if the instruction set in use is avx512vnni and the CPU has AVX512-BF16, else 0. */
QLM_API int32_t qlm_gram_bf16_runs_here(void);
/* GB/s at which the team reads `bytes` of memory at `data` once, by nothing but wide loads: the machine's ceiling. */
QLM_API int qlm_read_bandwidth(qlm_team *team, const void *data, int64_t bytes, double *gigabytes_per_s);

/* Decoders ----------------------------------------------------------------------------------------------------------*/

enum qlm_qkv { QLM_QKV_SEPARATE = 0 /* three linears */, QLM_QKV_PER_HEAD = 1 /* [q|k|v] for each head in turn */,
               QLM_QKV_MULTI_QUERY = 2 /* all q heads, one k, one v */ };

typedef struct qlm_norm { /* LayerNorm; weight and bias float32 [E], or NULL for 1 and 0 */
  const float *weight, *bias;
} qlm_norm;

typedef struct qlm_block {
  qlm_norm attention_norm, mlp_norm;
  qlm_linear qkv[3];        /* QKV_SEPARATE: q, k, v; else the first one alone */
  qlm_linear attention_out; /* H * D -> E */
  qlm_linear up, down;      /* E -> F, F -> E */
} qlm_block;

typedef struct qlm_model {
  int64_t vocabulary, positions;      /* V; the most positions that a sequence may have */
  int64_t embedding_width;            /* of the token table: E, or OPT's word_embed_proj_dim */
  int64_t hidden, mlp;                /* E, F */
  int64_t layers, heads, kv_heads, head_dim;
  int64_t rotary_dims;                /* first so many dims of each head are rotated (NeoX halves); 0: none */
  float rotary_base;
  float norm_eps;
  float attention_scale;              /* multiplies q . k */
  int32_t qkv_layout;                 /* qlm_qkv */
  int32_t activation;                 /* qlm_activation */
  int32_t norm_before;                /* 1: x + f(norm(x)); 0: norm(x + f(x)), OPT-350m */
  int32_t parallel_residual;          /* x + attention(norm1(x)) + mlp(norm2(x)) */
  int32_t has_final_norm;
  int32_t embedding_dtype, position_dtype;
  const void *embedding;              /* [V, embedding_width] */
  const void *position;               /* [positions + position_offset, E], or NULL */
  int64_t position_offset;            /* the first token's row */
  const qlm_linear *project_in, *project_out; /* NULL, or embedding_width -> E and back, no bias */
  qlm_norm final_norm;
  qlm_linear head;                    /* embedding_width -> V */
  const qlm_block *blocks;            /* [L] */
} qlm_model;

typedef struct qlm_decoder qlm_decoder;
typedef struct qlm_cache qlm_cache;

/* A decoder over `model` (copied, its tensors not). cache_dtype: qlm_dtype of keys and values. */
QLM_API int qlm_decoder_create(const qlm_model *model, qlm_team *team, int32_t cache_dtype, qlm_decoder **decoder);
QLM_API void qlm_decoder_destroy(qlm_decoder *decoder);

/* Keys and values of one sequence, in pages of 64 positions that forks share until they differ. */
QLM_API int qlm_cache_create(qlm_decoder *decoder, qlm_cache **cache);
QLM_API int qlm_cache_fork(const qlm_cache *cache, qlm_cache **copy);
QLM_API int qlm_cache_truncate(qlm_cache *cache, int64_t length); /* forget all positions from `length` on */
QLM_API int64_t qlm_cache_length(const qlm_cache *cache);
QLM_API void qlm_cache_destroy(qlm_cache *cache);
/* Bytes of all pages of the decoder's caches, shared ones once. */
QLM_API int64_t qlm_cache_bytes(const qlm_decoder *decoder);

/* Append counts[s] >= 1 ids to the sequence of caches[s] (S different caches; ids are concatenated, nothing is padded).
 * logits: float32 [S, V], of each sequence's last token; NULL if they are not wanted. On failure no cache has grown. */
QLM_API int qlm_decoder_step(qlm_decoder *decoder, int64_t sequences, qlm_cache *const *caches, const int64_t *counts,
                             const int32_t *ids, float *logits);
/* The same, and log p(targets[t] | ids up to t) in nats for every id instead of logits: float32 [sum of counts];
 * targets[t] < 0 is not scored and gives 0. `all_logits`: NULL, or float32 [sum of counts, V]. */
QLM_API int qlm_decoder_score(qlm_decoder *decoder, int64_t sequences, qlm_cache *const *caches, const int64_t *counts,
                              const int32_t *ids, const int32_t *targets, float *log_probabilities, float *all_logits);

/* Mapped files ------------------------------------------------------------------------------------------------------*/

/* While registered, a read past the end of the file under [data, data + bytes) gives zeros instead of killing the
 * process with SIGBUS, and every call that reads tensors in that range returns QLM_FILE_SHRANK. At most 1024 ranges. */
QLM_API int qlm_mapping_register(const void *data, int64_t bytes);
QLM_API void qlm_mapping_unregister(const void *data);
/* QLM_FILE_SHRANK if that happened in the registered range that holds `data`, for those who read it by themselves. */
QLM_API int qlm_mapping_check(const void *data);

#ifdef __cplusplus
}
#endif
#endif
