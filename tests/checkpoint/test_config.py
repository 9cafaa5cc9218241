"""Configs: published ones are accepted, fields that are not known are refused, and nothing in them can name code."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import transformers

from qlm.arch import FAMILIES
from qlm.checkpoint.config import read_config
from qlm.errors import DataError
from tests import tiny_models

OPT_125M = {
    "_name_or_path": "facebook/opt-125m", "activation_dropout": 0.0, "activation_function": "relu",
    "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True,
    "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0,
    "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.21.0.dev0",
    "use_cache": True, "vocab_size": 50272, "word_embed_proj_dim": 768,
}  # fmt: skip
PYTHIA_160M = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "classifier_dropout": 0.1, "eos_token_id": 0,
    "hidden_act": "gelu", "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12,
    "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True,
    "vocab_size": 50304,
}  # fmt: skip
SANTACODER = {
    "activation_function": "gelu_pytorch_tanh", "architectures": ["GPTBigCodeForCausalLM"],
    "attention_softmax_in_fp32": True, "multi_query": True, "attn_pdrop": 0.1, "bos_token_id": 49152,
    "embd_pdrop": 0.1, "eos_token_id": 49152, "inference_runner": 0, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "max_batch_size": None, "max_sequence_length": None, "model_type": "gpt_bigcode",
    "n_embd": 2048, "n_head": 16, "n_inner": 8192, "n_layer": 24, "n_positions": 2048, "num_key_value_heads": 1,
    "pad_key_length": True, "pre_allocate_kv_cache": False, "resid_pdrop": 0.1,
    "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "torch_dtype": "float32", "transformers_version": "4.28.0.dev0", "use_cache": True,
    "validate_runner_input": True, "vocab_size": 49280,
}  # fmt: skip
PUBLISHED = {
    "facebook/opt-125m": OPT_125M,
    "facebook/opt-350m": {
        **OPT_125M, "_name_or_path": "opt-350m", "do_layer_norm_before": False, "ffn_dim": 4096, "hidden_size": 1024,
        "num_attention_heads": 16, "num_hidden_layers": 24, "word_embed_proj_dim": 512,
    },
    "facebook/opt-1.3b": {**OPT_125M, "_remove_final_layer_norm": False, "hidden_size": 2048, "ffn_dim": 8192,
                          "num_attention_heads": 32, "word_embed_proj_dim": 2048},
    "facebook/opt-6.7b": {
        **OPT_125M, "_remove_final_layer_norm": False, "hidden_size": 4096, "ffn_dim": 16384, "enable_bias": True,
        "layer_norm_elementwise_affine": True, "num_attention_heads": 32, "num_hidden_layers": 32,
        "word_embed_proj_dim": 4096,
    },
    "EleutherAI/pythia-160m": PYTHIA_160M,
    "EleutherAI/gpt-neox-20b": {
        **PYTHIA_160M, "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0, "hidden_act": "gelu_fast",
        "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64, "num_hidden_layers": 44,
        "vocab_size": 50432, "transformers_version": "4.19.0.dev0",
    },
    "databricks/dolly-v2-3b": {
        **PYTHIA_160M, "custom_pipelines": {"text-generation": {"impl": "instruct_pipeline.InstructionTextGeneration"}},
        "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32, "num_hidden_layers": 32,
        "torch_dtype": "bfloat16", "vocab_size": 50280,
    },
    "bigcode/gpt_bigcode-santacoder": SANTACODER,
    "bigcode/starcoderbase-1b": {
        **SANTACODER, "_name_or_path": "bigcode/large-model", "bos_token_id": 0, "eos_token_id": 0, "n_positions": 8192,
        "summary_activation": None, "vocab_size": 49152, "attention_head_type": "multiquery", "n_ctx": 8192,
    },
    "bigcode/starcoder": {
        **SANTACODER, "bos_token_id": 0, "eos_token_id": 0, "n_embd": 6144, "n_head": 48, "n_inner": 24576,
        "n_layer": 40, "n_positions": 8192, "vocab_size": 49152, "transformers_version": "4.28.1",
    },
}  # fmt: skip
SMALL = {"opt": OPT_125M, "gpt_neox": PYTHIA_160M, "gpt_bigcode": SANTACODER}


@dataclass
class Raw:
    config: dict[str, Any]
    config_source: str = "folder/config.json"


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        read_config(Raw(config))
    assert str(caught.value).startswith("folder/config.json: ")
    return str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_what_transformers_makes_of_them(name):
    raw = PUBLISHED[name]
    spec, settings = read_config(Raw(raw))
    assert spec is FAMILIES[raw["model_type"]]
    config_class = getattr(transformers, spec.config_class)
    ours = config_class(**settings).to_dict()
    theirs = config_class.from_dict(dict(raw)).to_dict()
    for field in settings:
        assert ours[field] == theirs[field], field


@pytest.mark.parametrize("use_diff", [True, False], ids=["differences", "all"])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_configs_that_transformers_writes_now(variant, use_diff):
    config = tiny_models.VARIANTS[variant]().config
    spec, settings = read_config(Raw(json.loads(config.to_json_string(use_diff))))
    again = type(config)(**settings)
    for field in spec.fields:
        assert getattr(again, field, None) == getattr(config, field, None), field


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("auto_map", {"AutoModelForCausalLM": "modeling.Evil"}),
        ("_attn_implementation_internal", "evil/kernel"),
        ("_attn_implementation", "evil/kernel"),
        ("trust_remote_code", True),
        ("trust_remote_code", 1),
        ("auto_mapping", {"parent_library": "os"}),
        ("megatron_core", "os"),
        ("quantization_config", {"quant_method": "evil"}),
        ("quantization_config", {}),
        ("quantization_config", "gptq"),
        ("__class__", "os.system"),
        ("__dict__", {}),
        ("torch_dtype_", "float16"),
        ("is_decoder", 0),
        ("add_cross_attention", True),
        ("chunk_size_feed_forward", 1),
        ("pruned_heads", {"0": [1]}),
        ("per_layer_config", {"0": {}}),
        ("sliding_window", 128),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_fields_that_may_change_numbers_or_run_code_are_refused(family, field, value):
    assert field in refusal({**SMALL[family], field: value})


@pytest.mark.parametrize("family", ["opt", "gpt_bigcode"])
def test_rotary_settings_of_families_without_rotary_embeddings_change_nothing(family):
    """GPTQModel writes them into every config."""
    rotary = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    plain, with_them = (read_config(Raw({**SMALL[family], **extra}))[1] for extra in ({}, rotary))
    assert with_them == plain


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "compressed-tensors", "quanto"])
def test_quantized_configs_of_known_methods_are_accepted(method):
    for family in SMALL.values():
        read_config(Raw({**family, "quantization_config": {"quant_method": method, "bits": 4}}))
    read_config(Raw({**OPT_125M, "quantization_config": {"load_in_4bit": True}}))


def test_a_misspelt_field_gets_a_hint():
    assert "did you mean 'do_layer_norm_before'?" in refusal({**OPT_125M, "do_layernorm_before": False})
    assert "did you mean 'use_parallel_residual'?" in refusal({**PYTHIA_160M, "use_paralel_residual": False})


@pytest.mark.parametrize("model_type", ["gpt2", "llama", None, 3, ["opt"], "OPT"])
def test_other_families_are_refused(model_type):
    assert "qlm knows opt, gpt_neox, gpt_bigcode" in refusal({**OPT_125M, "model_type": model_type})


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("opt", "hidden_size", "768"),
        ("opt", "hidden_size", 768.0),
        ("opt", "hidden_size", True),
        ("opt", "hidden_size", 0),
        ("opt", "hidden_size", -768),
        ("opt", "hidden_size", 770),
        ("opt", "hidden_size", 1 << 20),
        ("opt", "num_hidden_layers", 10**9),
        ("opt", "num_attention_heads", 0),
        ("opt", "ffn_dim", 10**12),
        ("opt", "max_position_embeddings", 1 << 30),
        ("opt", "vocab_size", 1 << 30),
        ("opt", "pad_token_id", 50272),
        ("opt", "bos_token_id", 2.0),
        ("opt", "eos_token_id", [2, "3"]),
        ("opt", "eos_token_id", []),
        ("opt", "do_layer_norm_before", 1),
        ("opt", "activation_function", "evil/kernel"),
        ("opt", "dropout", 2),
        ("opt", "layerdrop", -1),
        ("opt", "id2label", {"a": "b"}),
        ("opt", "id2label", ["b"]),
        ("opt", "label2id", {"a": "b"}),
        ("opt", "num_labels", 0),
        ("gpt_neox", "layer_norm_eps", 0),
        ("gpt_neox", "rotary_pct", 0),
        ("gpt_neox", "rotary_pct", 1.5),
        ("gpt_neox", "rotary_emb_base", -1),
        ("gpt_neox", "hidden_act", "os.system"),
        ("gpt_bigcode", "n_inner", "x"),
        ("gpt_bigcode", "multi_query", None),
        ("gpt_bigcode", "num_key_value_heads", 16),
        ("gpt_bigcode", "attention_head_type", "multihead"),
    ],
    ids=str,
)
def test_absurd_values_are_refused(family, field, value):
    assert field in refusal({**SMALL[family], field: value})


@pytest.mark.parametrize(
    ("family", "field"),
    [("opt", "hidden_size"), ("opt", "ffn_dim"), ("opt", "vocab_size"), ("gpt_neox", "intermediate_size"),
     ("gpt_neox", "num_attention_heads"), ("gpt_bigcode", "n_layer"), ("gpt_bigcode", "n_positions")],
)  # fmt: skip
def test_sizes_must_be_there(family, field):
    config = {name: value for name, value in SMALL[family].items() if name != field}
    assert f"lacks {field}" in refusal(config)


def rotary(**fields: Any) -> dict[str, Any]:
    base = {name: value for name, value in PYTHIA_160M.items() if name not in ("rotary_pct", "rotary_emb_base")}
    return read_config(Raw({**base, **fields}))[1]["rope_parameters"]


def test_the_rotary_embedding_in_its_old_and_its_new_place():
    wanted = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    old = {"rotary_pct": 0.5, "rotary_emb_base": 5000}
    new = {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    assert rotary(**old) == wanted
    assert rotary(rope_parameters={"rope_type": "default", **new}) == wanted
    assert rotary(**new) == wanted
    assert rotary(**old, rope_parameters={"type": "default", **new}, rope_scaling=None) == wanted
    assert rotary() == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    settings = read_config(Raw(PYTHIA_160M))[1]
    assert not settings.keys() & {"rotary_pct", "rotary_emb_base", "rope_theta", "rope_scaling"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rotary_pct": 0.25, "rope_parameters": {"partial_rotary_factor": 1.0}}, "described twice"),
        ({"rotary_pct": 0.25, "partial_rotary_factor": 0.5}, "rotary_pct 0.25, partial_rotary_factor 0.5"),
        ({"rotary_emb_base": 10000, "rope_theta": 500000}, "rotary_emb_base 10000, rope_theta 500000"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "has the type 'linear'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "has the type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "has the type 'yarn'"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "has the type"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "unknown field 'factor'"),
        ({"rope_parameters": {"rope_theta": "10000"}}, "rope_parameters.rope_theta is '10000'"),
        ({"rope_parameters": []}, "rope_parameters is []"),
        ({"rotary_pct": 0.01}, "rotates 0 dimensions"),
    ],
    ids=range(11),
)
def test_rotary_settings_that_disagree_or_are_unknown_are_refused(fields, words):
    with pytest.raises(DataError) as caught:
        rotary(**fields)
    assert words in str(caught.value)
