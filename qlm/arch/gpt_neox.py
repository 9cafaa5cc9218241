"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), Pythia, Dolly: partial rotary embedding, attention and MLP in parallel.

Published files call the head `embed_out`; transformers 5 calls it `lm_head` in memory. Files keep the published name.
"""

from qlm.arch.spec import COMMON_FIELDS, COMMON_FIXED_FIELDS, COMMON_INERT_FIELDS, FamilySpec, Fold, LinearGroup

_QKV = LinearGroup(("attention.query_key_value",), "input_layernorm")
_DENSE = LinearGroup(("attention.dense",))
_UP = LinearGroup(("mlp.dense_h_to_4h",), "post_attention_layernorm")
_DOWN = LinearGroup(("mlp.dense_4h_to_h",))

GPT_NEOX = FamilySpec(
    model_type="gpt_neox",
    config_class="GPTNeoXConfig",
    model_classes={
        "causal-lm": "GPTNeoXForCausalLM",
        "sequence-classification": "GPTNeoXForSequenceClassification",
        "token-classification": "GPTNeoXForTokenClassification",
        "question-answering": "GPTNeoXForQuestionAnswering",
        "base": "GPTNeoXModel",
    },
    prefix="gpt_neox",
    blocks="layers",
    stages=((_QKV,), (_DENSE,), (_UP,), (_DOWN,)),
    parallel_stages=((_QKV, _UP), (_DENSE,), (_DOWN,)),
    parallel_if="use_parallel_residual",
    fused_qkv="per_head",
    fused_linear="attention.query_key_value",
    # Not dense_h_to_4h into dense_4h_to_h: GELU passes no scale.
    folds=(
        Fold("input_layernorm", _QKV.linears, "norm"),
        Fold("attention.query_key_value", _DENSE.linears, "attention"),
        Fold("post_attention_layernorm", _UP.linears, "norm"),
    ),
    attention="attention",
    attention_out="attention.dense",
    mlp_out="mlp.dense_4h_to_h",
    embedding="embed_in",
    head="lm_head",
    published_head="embed_out",
    head_tied=False,
    positions="max_position_embeddings",
    fields={
        **COMMON_FIELDS,
        "hidden_size": (int,),
        "num_hidden_layers": (int,),
        "num_attention_heads": (int,),
        "intermediate_size": (int,),
        "hidden_act": (str,),
        "max_position_embeddings": (int,),
        "layer_norm_eps": (float, int),
        "use_parallel_residual": (bool,),
        "attention_bias": (bool,),
        "rotary_pct": (float, int),
        "rotary_emb_base": (float, int),
        "rope_theta": (float, int),
        "partial_rotary_factor": (float, int),
        "rope_scaling": (dict, type(None)),
        "rope_parameters": (dict,),
        "attention_dropout": (float, int),
        "hidden_dropout": (float, int),
        "classifier_dropout": (float, int),
    },
    # The rotary embedding's are in checkpoint/config.py, beside its three spellings.
    defaults={
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": None,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    fixed_fields=COMMON_FIXED_FIELDS,
    # `custom_pipelines` (Dolly) names a Python file with a prompt template; qlm never looks for it.
    inert_fields=COMMON_INERT_FIELDS
    | {"attention_probs_dropout_prob", "hidden_dropout_prob", "type_vocab_size", "custom_pipelines"},
    ignored_tensors=(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", r"rotary_emb\.inv_freq"),
    lora_targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
)
