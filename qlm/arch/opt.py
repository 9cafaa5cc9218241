"""OPT (Zhang et al. 2022, arXiv:2205.01068): learned positions with an offset of 2, ReLU, tied head, </s> before every text.

The 350m model differs from the others in two ways: its LayerNorms come after attention and MLP (`do_layer_norm_before` false),
and its embeddings are narrower than its blocks (`project_in`, `project_out`).
"""

from qlm.arch.spec import COMMON_FIELDS, COMMON_FIXED_FIELDS, COMMON_INERT_FIELDS, FamilySpec, Fold, LinearGroup

OPT = FamilySpec(
    model_type="opt",
    config_class="OPTConfig",
    model_classes={
        "causal-lm": "OPTForCausalLM",
        "sequence-classification": "OPTForSequenceClassification",
        "question-answering": "OPTForQuestionAnswering",
        "base": "OPTModel",
    },
    prefix="model",
    blocks="decoder.layers",
    stages=(
        (
            LinearGroup(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "self_attn_layer_norm",
                "do_layer_norm_before",
            ),
        ),
        (LinearGroup(("self_attn.out_proj",)),),
        (LinearGroup(("fc1",), "final_layer_norm", "do_layer_norm_before"),),
        (LinearGroup(("fc2",)),),
    ),
    # A LayerNorm after attention or MLP makes the residual too: nothing can be folded into it.
    folds=(
        Fold(
            "self_attn_layer_norm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "norm",
            {"do_layer_norm_before": True, "layer_norm_elementwise_affine": True},
        ),
        Fold("self_attn.v_proj", ("self_attn.out_proj",), "attention"),
        Fold(
            "final_layer_norm",
            ("fc1",),
            "norm",
            {"do_layer_norm_before": True, "layer_norm_elementwise_affine": True},
        ),
        Fold("fc1", ("fc2",), "relu", {"activation_function": "relu"}),
    ),
    attention="self_attn",
    attention_out="self_attn.out_proj",
    mlp_out="fc2",
    embedding="decoder.embed_tokens",
    head="lm_head",
    published_head="lm_head",
    head_tied=True,
    positions="max_position_embeddings",
    position_offset=2,
    bos_first=True,
    bos_id=2,
    fields={
        **COMMON_FIELDS,
        "hidden_size": (int,),
        "num_hidden_layers": (int,),
        "ffn_dim": (int,),
        "max_position_embeddings": (int,),
        "do_layer_norm_before": (bool,),
        "_remove_final_layer_norm": (bool,),
        "word_embed_proj_dim": (int, type(None)),
        "num_attention_heads": (int,),
        "activation_function": (str,),
        "enable_bias": (bool,),
        "layer_norm_elementwise_affine": (bool,),
        "dropout": (float, int),
        "attention_dropout": (float, int),
        "layerdrop": (float, int),
    },
    defaults={
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    multiples={"word_embed_proj_dim": ("hidden_size", 1)},
    fixed_fields=COMMON_FIXED_FIELDS,
    # GPTQModel writes settings of a rotary embedding for models that have none.
    inert_fields=COMMON_INERT_FIELDS | {"activation_dropout", "rope_parameters"},
    lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
)
