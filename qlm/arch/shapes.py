"""Which tensors a causal LM of each family has, and their shapes: a second statement beside transformers' classes, which
need torch. A test compares the two for every variant.

Names are those of published files: with the base model's prefix, the head as `published_head`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlm.arch.gpt_bigcode import GPT_BIGCODE
from qlm.arch.gpt_neox import GPT_NEOX
from qlm.arch.opt import OPT
from qlm.arch.spec import FamilySpec


@dataclass(frozen=True)
class _Part:
    """A module with a weight: a matrix [O, I] of a linear, a table [rows, width], or a LayerNorm's vector [width]."""

    path: str
    shape: tuple[int, ...]
    bias: bool
    is_linear: bool


def complete_fields(spec: FamilySpec, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The checked fields of a config, with those that it leaves out filled in."""
    complete = {**spec.defaults, "tie_word_embeddings": spec.head_tied, **fields}
    for name, (other, factor) in spec.multiples.items():
        if complete.get(name) is None:
            complete[name] = factor * complete[other]
    return complete


def causal_lm_shapes(spec: FamilySpec, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the float model, the head's always among them, tied or not.

    Args:
        fields: complete, as `complete_fields` gives them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in _parts(spec, fields):
        shapes[f"{part.path}.weight"] = part.shape
        if part.bias:
            shapes[f"{part.path}.bias"] = part.shape[:1]
    return shapes


def causal_lm_linears(spec: FamilySpec, fields: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Path of each linear to its shape (O, I), the head's too, in the order of the modules."""
    return {part.path: (part.shape[0], part.shape[1]) for part in _parts(spec, fields) if part.is_linear}


def _parts(spec: FamilySpec, fields: Mapping[str, Any]) -> Iterator[_Part]:
    yield from _FAMILIES[spec.model_type](fields, spec.prefix)
    head = fields["word_embed_proj_dim"] if spec is OPT else fields[spec.hidden_size]
    yield _linear(spec.published_head, fields["vocab_size"], head, bias=False)


def _linear(path: str, outputs: int, inputs: int, bias: bool = True) -> _Part:
    return _Part(path, (outputs, inputs), bias, is_linear=True)


def _norm(path: str, width: int) -> _Part:
    return _Part(path, (width,), bias=True, is_linear=False)


def _table(path: str, rows: int, width: int) -> _Part:
    return _Part(path, (rows, width), bias=False, is_linear=False)


def _opt(c: Mapping[str, Any], prefix: str) -> Iterator[_Part]:
    width, inner, narrow, bias = c["hidden_size"], c["ffn_dim"], c["word_embed_proj_dim"], c["enable_bias"]
    # A LayerNorm without weight and bias has no tensors.
    affine = c["layer_norm_elementwise_affine"]
    yield _table(f"{prefix}.decoder.embed_tokens", c["vocab_size"], narrow)
    yield _table(f"{prefix}.decoder.embed_positions", c["max_position_embeddings"] + OPT.position_offset, width)
    if narrow != width:
        yield _linear(f"{prefix}.decoder.project_out", narrow, width, bias=False)
        yield _linear(f"{prefix}.decoder.project_in", width, narrow, bias=False)
    if affine and c["do_layer_norm_before"] and not c["_remove_final_layer_norm"]:
        yield _norm(f"{prefix}.decoder.final_layer_norm", width)
    for i in range(c["num_hidden_layers"]):
        block = f"{prefix}.decoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield _linear(f"{block}.self_attn.{name}", width, width, bias)
        if affine:
            yield _norm(f"{block}.self_attn_layer_norm", width)
        yield _linear(f"{block}.fc1", inner, width, bias)
        yield _linear(f"{block}.fc2", width, inner, bias)
        if affine:
            yield _norm(f"{block}.final_layer_norm", width)


def _gpt_neox(c: Mapping[str, Any], prefix: str) -> Iterator[_Part]:
    width, inner, bias = c["hidden_size"], c["intermediate_size"], c["attention_bias"]
    yield _table(f"{prefix}.embed_in", c["vocab_size"], width)
    for i in range(c["num_hidden_layers"]):
        block = f"{prefix}.layers.{i}"
        yield _norm(f"{block}.input_layernorm", width)
        yield _norm(f"{block}.post_attention_layernorm", width)
        yield _linear(f"{block}.attention.query_key_value", 3 * width, width, bias)
        yield _linear(f"{block}.attention.dense", width, width, bias)
        yield _linear(f"{block}.mlp.dense_h_to_4h", inner, width)
        yield _linear(f"{block}.mlp.dense_4h_to_h", width, inner)
    yield _norm(f"{prefix}.final_layer_norm", width)


def _gpt_bigcode(c: Mapping[str, Any], prefix: str) -> Iterator[_Part]:
    width, inner = c["n_embd"], c["n_inner"]
    keys = width // c["n_head"] if c["multi_query"] else width
    yield _table(f"{prefix}.wte", c["vocab_size"], width)
    yield _table(f"{prefix}.wpe", c["n_positions"], width)
    for i in range(c["n_layer"]):
        block = f"{prefix}.h.{i}"
        yield _norm(f"{block}.ln_1", width)
        yield _linear(f"{block}.attn.c_attn", width + 2 * keys, width)
        yield _linear(f"{block}.attn.c_proj", width, width)
        yield _norm(f"{block}.ln_2", width)
        yield _linear(f"{block}.mlp.c_fc", inner, width)
        yield _linear(f"{block}.mlp.c_proj", width, inner)
    yield _norm(f"{prefix}.ln_f", width)


_FAMILIES = {OPT.model_type: _opt, GPT_NEOX.model_type: _gpt_neox, GPT_BIGCODE.model_type: _gpt_bigcode}
