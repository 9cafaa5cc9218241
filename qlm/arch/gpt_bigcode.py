"""GPTBigCode (SantaCoder, arXiv:2301.03988; StarCoder, arXiv:2305.06161): learned positions, tied head, multi-query attention.

With `multi_query` the rows of `c_attn` are all query heads, then one key head, then one value head; without it they are
[q|k|v] for each head in turn.
"""

from qlm.arch.spec import COMMON_FIELDS, COMMON_FIXED_FIELDS, COMMON_INERT_FIELDS, FamilySpec, Fold, LinearGroup

GPT_BIGCODE = FamilySpec(
    model_type="gpt_bigcode",
    config_class="GPTBigCodeConfig",
    model_classes={
        "causal-lm": "GPTBigCodeForCausalLM",
        "sequence-classification": "GPTBigCodeForSequenceClassification",
        "token-classification": "GPTBigCodeForTokenClassification",
        "base": "GPTBigCodeModel",
    },
    prefix="transformer",
    blocks="h",
    stages=(
        (LinearGroup(("attn.c_attn",), "ln_1"),),
        (LinearGroup(("attn.c_proj",)),),
        (LinearGroup(("mlp.c_fc",), "ln_2"),),
        (LinearGroup(("mlp.c_proj",)),),
    ),
    fused_qkv="multi_query",
    fused_linear="attn.c_attn",
    # Not c_fc into mlp.c_proj: GELU passes no scale.
    folds=(
        Fold("ln_1", ("attn.c_attn",), "norm"),
        Fold("attn.c_attn", ("attn.c_proj",), "attention"),
        Fold("ln_2", ("mlp.c_fc",), "norm"),
    ),
    attention="attn",
    attention_out="attn.c_proj",
    mlp_out="mlp.c_proj",
    embedding="wte",
    head="lm_head",
    published_head="lm_head",
    head_tied=True,
    positions="n_positions",
    hidden_size="n_embd",
    layers="n_layer",
    heads="n_head",
    fields={
        **COMMON_FIELDS,
        "n_positions": (int,),
        "n_embd": (int,),
        "n_layer": (int,),
        "n_head": (int,),
        "n_inner": (int, type(None)),
        "activation_function": (str,),
        "layer_norm_epsilon": (float, int),
        "scale_attn_weights": (bool,),
        "multi_query": (bool,),
        "attention_softmax_in_fp32": (bool,),
        "scale_attention_softmax_in_fp32": (bool,),
        "resid_pdrop": (float, int),
        "embd_pdrop": (float, int),
        "attn_pdrop": (float, int),
    },
    defaults={
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": None,
        "activation_function": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "multi_query": True,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
    },
    multiples={"n_inner": ("n_embd", 4)},
    # GPT-2's, which the first conversions of the models carried along.
    fixed_fields={**COMMON_FIXED_FIELDS, "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,)},
    inert_fields=COMMON_INERT_FIELDS
    | {
        "num_key_value_heads", "inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length",
        "pre_allocate_kv_cache", "validate_runner_input", "summary_activation", "summary_first_dropout",
        "summary_proj_to_labels", "summary_type", "summary_use_proj", "attention_head_type", "n_ctx",
        # GPTQModel writes settings of a rotary embedding for models that have none.
        "rope_parameters",
    },
    ignored_tensors=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    lora_targets=("c_attn", "c_proj", "c_fc"),
)  # fmt: skip
