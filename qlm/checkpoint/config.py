"""From `config.json` to what the model classes are built from: an allow-list of fields per family, each checked.

A field that is not on the list is an error, because it may change numbers in a way that is not known here; transformers
would keep it and ignore it. Fields that are known and change nothing are dropped. Nothing in a config can name code:
transformers 4.56-5.2 imported a kernel named by `_attn_implementation_internal` (CVE-2026-4372), and took
`trust_remote_code` from a config (CVE-2026-5241).
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from qlm.arch import FAMILIES, FamilySpec
from qlm.errors import DataError

# Bounds that no model of the three families comes near; they keep a damaged config from asking for terabytes.
LARGEST: dict[str, int] = {
    "layers": 1024,
    "heads": 1024,
    "hidden": 1 << 16,
    "feed-forward": 1 << 20,
    "positions": 1 << 20,
    "vocabulary": 1 << 21,
    "labels": 1 << 16,
}
_SIZES: dict[str, str] = {
    "num_hidden_layers": "layers",
    "n_layer": "layers",
    "num_attention_heads": "heads",
    "n_head": "heads",
    "hidden_size": "hidden",
    "n_embd": "hidden",
    "word_embed_proj_dim": "hidden",
    "ffn_dim": "feed-forward",
    "intermediate_size": "feed-forward",
    "n_inner": "feed-forward",
    "max_position_embeddings": "positions",
    "n_positions": "positions",
    "vocab_size": "vocabulary",
    "num_labels": "labels",
}
# Without these the shapes of the tensors would hang on the config class's defaults. `n_inner` has a meaning when
# absent.
_REQUIRED = frozenset(_SIZES) - {"n_inner", "word_embed_proj_dim", "num_labels"}
_HEADS = ("num_attention_heads", "n_head")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PROBABILITIES = ("dropout", "pdrop", "layerdrop")
_NORM_EPSILONS = ("layer_norm_eps", "layer_norm_epsilon")
_ACTIVATION_FIELDS = ("activation_function", "hidden_act")
ACTIVATIONS = (
    "relu",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "gelu_python",
    "quick_gelu",
    "silu",
    "swish",
    "tanh",
)
QUANTIZATION_METHODS = ("gptq", "bitsandbytes", "compressed-tensors", "quanto")
# Fields through which a config asks for code to be imported.
_CODE_FIELDS = frozenset(
    {"auto_map", "auto_mapping", "_attn_implementation", "_attn_implementation_internal", "megatron_core"}
)

# GPTNeoXConfig's, since its first version.
DEFAULT_ROTARY_FRACTION = 0.25
DEFAULT_ROTARY_BASE = 10000.0


class HasConfig(Protocol):
    """What is needed of a checkpoint here."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def config_source(self) -> str: ...


def read_config(checkpoint: HasConfig) -> tuple[FamilySpec, dict[str, Any]]:
    """The family, and the keyword arguments for its config class.

    Fields that the file leaves out are left out here. GPT-NeoX's rotary settings, which files spell in three ways, come
    back as `rope_parameters` = {"rope_type": "default", "rope_theta": float, "partial_rotary_factor": float}, always.

    Raises:
        DataError: naming the field, what it holds and what is allowed.
    """
    raw, source = checkpoint.config, checkpoint.config_source
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise DataError(f"{source}: model_type is {model_type!r}; qlm knows {', '.join(FAMILIES)}")
    spec = FAMILIES[model_type]
    kept: dict[str, Any] = {}
    for name, value in raw.items():
        if name == "model_type":
            continue
        if name == "quantization_config":
            _check_quantization(value, source)
        elif name in _CODE_FIELDS:
            raise DataError(
                f"{source}: {name} asks for code to be imported, which qlm never does; remove it if the model needs "
                "no code of its own"
            )
        elif name in spec.fixed_fields:
            _check_fixed(name, value, spec.fixed_fields[name], source)
        elif name in spec.fields:
            _check_type(name, value, spec.fields[name], source)
            _check_value(name, value, source)
            kept[name] = value
        elif name not in spec.inert_fields:
            hint = _did_you_mean(name, [*spec.fields, *spec.fixed_fields])
            raise DataError(
                f"{source}: unknown field {name!r} in a config of {model_type}; it may change numbers, so it is not "
                f"ignored{hint}"
            )
    missing = sorted(_REQUIRED & spec.fields.keys() - kept.keys())
    if missing:
        raise DataError(f"{source}: lacks {', '.join(missing)}; a config of {model_type} must say so")
    _check_together(spec, raw, kept, source)
    if "rope_parameters" in spec.fields:
        _normalise_rotary(kept, source)
    return spec, kept


def _check_fixed(name: str, value: Any, allowed: Iterable[object], source: str) -> None:
    # type() because False == 0 to Python
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = " or ".join(repr(choice) for choice in allowed)
        raise DataError(f"{source}: {name} is {value!r}; only {choices} is supported")


def _check_type(name: str, value: Any, types: tuple[type, ...], source: str) -> None:
    if type(value) not in types:
        names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        raise DataError(f"{source}: {name} is {value!r}, a {type(value).__name__}; expected {names}")


def _check_value(name: str, value: Any, source: str) -> None:
    def refuse(expected: str) -> None:
        raise DataError(f"{source}: {name} is {value!r}; expected {expected}")

    if value is None:
        return
    if name in _SIZES and not 1 <= value <= LARGEST[_SIZES[name]]:
        refuse(f"1 to {LARGEST[_SIZES[name]]}")
    elif name in _TOKEN_IDS:
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(type(token) is int and -1 <= token < LARGEST["vocabulary"] for token in ids):
            refuse("token ids")
    elif name.endswith(_PROBABILITIES) and not 0 <= value <= 1:
        refuse("0 to 1")
    elif name in _NORM_EPSILONS and not 0 < value < 1:
        refuse("more than 0 and less than 1")
    elif name in _ACTIVATION_FIELDS and value not in ACTIVATIONS:
        refuse(f"one of {', '.join(ACTIVATIONS)}")
    elif name in ("rotary_pct", "partial_rotary_factor") and not 0 < value <= 1:
        refuse("more than 0 and at most 1")
    elif name in ("rotary_emb_base", "rope_theta") and not 0 < value < 1e12:
        refuse("a positive number")
    elif name == "id2label" and not (
        len(value) <= LARGEST["labels"]
        and all(k.isdecimal() and len(k) < 8 and isinstance(v, str) for k, v in value.items())
    ):
        refuse("ids mapped to labels")
    elif name == "label2id" and not (
        len(value) <= LARGEST["labels"] and all(type(v) is int and v >= 0 for v in value.values())
    ):
        refuse("labels mapped to ids")


def _check_together(spec: FamilySpec, raw: Mapping[str, Any], kept: Mapping[str, Any], source: str) -> None:
    """Fields that must agree with each other."""
    heads = next(kept[name] for name in _HEADS if name in kept)
    hidden = kept[spec.hidden_size]
    if hidden % heads:
        raise DataError(f"{source}: {spec.hidden_size} {hidden} is not a multiple of the {heads} attention heads")
    labels = kept.get("id2label")
    if labels is not None and "num_labels" in kept and len(labels) != kept["num_labels"]:
        raise DataError(f"{source}: num_labels is {kept['num_labels']}, but id2label has {len(labels)} labels")
    padding = kept.get("pad_token_id")
    if padding is not None and spec.model_type == "opt" and not 0 <= padding < kept["vocab_size"]:
        # OPT's embedding has a padding row, so that id must be one of its rows.
        raise DataError(f"{source}: pad_token_id is {padding}; expected an id below vocab_size {kept['vocab_size']}")
    if spec.fused_qkv == "multi_query":
        # Two fields that follow from multi_query; transformers ignores them, so a contradiction would go unseen.
        multi_query = kept.get("multi_query", True)
        expected = {
            "num_key_value_heads": 1 if multi_query else heads,
            "attention_head_type": "multiquery" if multi_query else "multihead",
        }
        for name, value in expected.items():
            if raw.get(name, value) != value:
                raise DataError(f"{source}: {name} is {raw[name]!r}; multi_query {multi_query} implies {value!r}")


def _normalise_rotary(kept: dict[str, Any], source: str) -> None:
    """Merge the old and the new fields of the rotary embedding into `rope_parameters`; where several are there they
    must be equal.
    """
    scaling = kept.pop("rope_scaling", None) or {}
    parameters = kept.pop("rope_parameters", {})
    for name, given in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        unknown = sorted(given.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        kinds = {
            given[key] if isinstance(given[key], str) else repr(given[key])
            for key in ("rope_type", "type")
            if key in given
        }
        if kinds - {"default"}:
            raise DataError(
                f"{source}: {name} has the type {sorted(kinds)[0]!r}; only 'default' rotary embeddings are supported"
            )
        if unknown:
            raise DataError(
                f"{source}: {name} has the unknown field {unknown[0]!r}; expected rope_type, rope_theta, "
                "partial_rotary_factor"
            )
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in given:
                _check_type(f"{name}.{key}", given[key], (float, int), source)
                _check_value(key, given[key], source)

    def merged(places: dict[str, Any], default: float) -> float:
        values = {place: value for place, value in places.items() if value is not None}
        if len({float(value) for value in values.values()}) > 1:
            said = ", ".join(f"{place} {value}" for place, value in values.items())
            raise DataError(f"{source}: the rotary embedding is described twice with different values: {said}")
        return float(next(iter(values.values()), default))

    fraction = merged(
        {
            "rotary_pct": kept.pop("rotary_pct", None),
            "partial_rotary_factor": kept.pop("partial_rotary_factor", None),
            "rope_scaling.partial_rotary_factor": scaling.get("partial_rotary_factor"),
            "rope_parameters.partial_rotary_factor": parameters.get("partial_rotary_factor"),
        },
        DEFAULT_ROTARY_FRACTION,
    )
    base = merged(
        {
            "rotary_emb_base": kept.pop("rotary_emb_base", None),
            "rope_theta": kept.pop("rope_theta", None),
            "rope_scaling.rope_theta": scaling.get("rope_theta"),
            "rope_parameters.rope_theta": parameters.get("rope_theta"),
        },
        DEFAULT_ROTARY_BASE,
    )
    dimensions = math.floor(kept["hidden_size"] // kept["num_attention_heads"] * fraction)
    if dimensions < 2 or dimensions % 2:
        raise DataError(
            f"{source}: a rotary fraction of {fraction} rotates {dimensions} dimensions of each head; expected an "
            "even number"
        )
    kept["rope_parameters"] = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": fraction}


def _check_quantization(value: Any, source: str) -> None:
    """Only that the method is one that qlm reads; its settings are for the backend that reads it."""
    if not isinstance(value, dict):
        raise DataError(f"{source}: quantization_config is a {type(value).__name__}; expected an object")
    method = value.get("quant_method")
    if method is None and (value.get("load_in_4bit") is True or value.get("load_in_8bit") is True):
        method = "bitsandbytes"
    if method not in QUANTIZATION_METHODS:
        raise DataError(
            f"{source}: quantization_config has the method {method!r}; qlm reads {', '.join(QUANTIZATION_METHODS)}"
        )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else ""
