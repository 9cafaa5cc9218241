"""What the right logits are: the three families in plain torch, written from the papers and from the config's fields.

Sources: OPT arXiv:2205.01068 and its released weights; GPT-NeoX arXiv:2204.06745 with rotary embedding
arXiv:2104.09864; SantaCoder arXiv:2301.03988 with multi-query attention arXiv:1911.02150. It shares no code and no
structure with transformers, so that the two check each other: `check` compares them on a given model, `self_check` on
small random models of every variant.

It is slow on purpose (no cache, no fused attention, one explicit mask) and refuses what it does not know: another model
type, activation or kind of rotary scaling, a missing tensor, a text longer than the positions.

Shapes: B texts, T tokens, E width of the residual stream, H heads, D head dim, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlm.arch import FAMILIES
from qlm.errors import DataError, UsageError

# What a field means when config.json leaves it out. Written down a second time on purpose: transformers' config classes
# are the other statement, and a test compares the two.
DEFAULTS: dict[str, dict[str, object]] = {
    "opt": {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,  # as wide as the blocks
        "num_attention_heads": 12,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "tie_word_embeddings": False,
    },
    "gpt_bigcode": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,  # four times n_embd
        "activation_function": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "multi_query": True,
        "tie_word_embeddings": True,
    },
}

# OPT's config has no field for it: torch's default, which the released models were trained with.
OPT_LAYER_NORM_EPS = 1e-5
# Rows of OPT's position table before the first token's: fairseq counts positions from the padding id (1) plus 1.
OPT_POSITION_OFFSET = 2


def _gelu_exact(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x * 0.5**0.5))


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0.0),
    "gelu": _gelu_exact,
    "gelu_python": _gelu_exact,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
}


@torch.no_grad()
def logits(
    model_type: str,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The logits of every position of `ids`, computed in `dtype` on the device of `ids`.

    Args:
        model_type: "opt", "gpt_neox" or "gpt_bigcode".
        config: fields of the family's config; those left out have their published defaults, those that change no logit
            are ignored.
        tensors: by their names in published files (`model.decoder.…`; `gpt_neox.…` and `embed_out.weight`;
            `transformer.…`).
        ids: integers [B, T], no padding.
        dtype: float32 or float64.

    Returns: [B, T, V] in `dtype`.
    Raises UsageError for a model type, dtype, setting or length that it does not know; DataError for a missing tensor.
    """
    if model_type not in _FORWARDS:
        raise UsageError(f"model type {model_type!r}: the reference knows {', '.join(_FORWARDS)}")
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(f"dtype {dtype}: the reference computes in float32 or float64")
    settings = {**DEFAULTS[model_type], **config}
    positions, vocabulary = int(settings[FAMILIES[model_type].positions]), int(settings["vocab_size"])  # type: ignore[call-overload]
    if ids.ndim != 2 or ids.shape[1] > positions:
        raise UsageError(f"ids of shape {list(ids.shape)}: expected [texts, tokens] with at most {positions} tokens")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise UsageError(f"ids from {int(ids.min())} to {int(ids.max())}: the vocabulary has 0 to {vocabulary - 1}")
    return _FORWARDS[model_type](settings, _Weights(tensors, dtype, ids.device), ids)


class _Weights:
    """Tensors by name in one dtype on one device, and the two operations that take a name."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.tensors, self.dtype, self.device = tensors, dtype, device

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise DataError(f"{name}: no such tensor; the config says that the model has it")
        return self.tensors[name].to(self.device, self.dtype)

    def linear(self, x: Tensor, name: str, bias: bool = True) -> Tensor:
        """y = W x + b over the last axis: [..., I] to [..., O]."""
        y = torch.einsum("...i,oi->...o", x, self[f"{name}.weight"])
        return y + self[f"{name}.bias"] if bias else y

    def norm(self, x: Tensor, name: str, eps: float, affine: bool = True) -> Tensor:
        """LayerNorm (arXiv:1607.06450) over the last axis."""
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return y * self[f"{name}.weight"] + self[f"{name}.bias"] if affine else y


def _activation(name: object) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise UsageError(f"activation {name!r}: the reference knows {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[str(name)]


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention over this and all earlier tokens. q, k, v: [B, T, H, D]; returns [B, T, H * D]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    position = torch.arange(q.shape[1], device=q.device)
    later = position[None, :] > position[:, None]
    shares = torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(2)


def _opt(c: Mapping[str, Any], w: _Weights, ids: Tensor) -> Tensor:
    width, heads = c["hidden_size"], c["num_attention_heads"]
    bias, affine = c["enable_bias"], c["layer_norm_elementwise_affine"]
    before, activation = c["do_layer_norm_before"], _activation(c["activation_function"])
    projected = c["word_embed_proj_dim"] not in (None, width)

    def norm(x: Tensor, name: str) -> Tensor:
        return w.norm(x, name, OPT_LAYER_NORM_EPS, affine)

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (w.linear(x, f"{name}.{part}_proj", bias).unflatten(-1, (heads, -1)) for part in "qkv")
        return w.linear(_causal_attention(q, k, v, (width // heads) ** -0.5), f"{name}.out_proj", bias)

    def mlp(x: Tensor, name: str) -> Tensor:
        return w.linear(activation(w.linear(x, f"{name}.fc1", bias)), f"{name}.fc2", bias)

    x = w["model.decoder.embed_tokens.weight"][ids]
    if projected:
        x = w.linear(x, "model.decoder.project_in", bias=False)
    place = torch.arange(ids.shape[1], device=ids.device) + OPT_POSITION_OFFSET
    x = x + w["model.decoder.embed_positions.weight"][place]
    for i in range(c["num_hidden_layers"]):
        block = f"model.decoder.layers.{i}"
        if before:
            x = x + attention(norm(x, f"{block}.self_attn_layer_norm"), f"{block}.self_attn")
            x = x + mlp(norm(x, f"{block}.final_layer_norm"), block)
        else:  # the 350m model: normalize each sum
            x = norm(x + attention(x, f"{block}.self_attn"), f"{block}.self_attn_layer_norm")
            x = norm(x + mlp(x, block), f"{block}.final_layer_norm")
    if before and not c["_remove_final_layer_norm"]:
        x = norm(x, "model.decoder.final_layer_norm")
    if projected:
        x = w.linear(x, "model.decoder.project_out", bias=False)
    return w.linear(x, "model.decoder.embed_tokens" if c["tie_word_embeddings"] else "lm_head", bias=False)


def _rotary(c: Mapping[str, Any]) -> tuple[float, float]:
    """(share of each head that rotates, base of the wavelengths), from the fields' old or new place."""
    new = {**(c.get("rope_parameters") or c.get("rope_scaling") or {})}
    kind = new.get("rope_type", new.get("type", "default"))
    if kind != "default":
        raise UsageError(f"rope_type {kind!r}: the reference knows the plain rotary embedding alone (default)")
    share = new.get("partial_rotary_factor", c.get("partial_rotary_factor", c["rotary_pct"]))
    base = new.get("rope_theta", c.get("rope_theta", c["rotary_emb_base"]))
    return float(share), float(base)


def _rotate(x: Tensor, rotated: int, base: float) -> Tensor:
    """Turn the first `rotated` of each head's D numbers by an angle that grows with the position.

    Number j and number j + rotated/2 are the real and imaginary part of one complex number; token t multiplies it by
    exp(i t base^(-2 j / rotated)). Angles are computed in float64. x: [B, T, H, D].
    """
    half = rotated // 2
    rate = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float64, device=x.device), rate)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None, :]  # [1, T, 1, rotated / 2]
    turned = torch.complex(x[..., :half], x[..., half:rotated]) * turn.to(x.dtype.to_complex())
    return torch.cat([turned.real, turned.imag, x[..., rotated:]], dim=-1)


def _gpt_neox(c: Mapping[str, Any], w: _Weights, ids: Tensor) -> Tensor:
    heads, eps, bias = c["num_attention_heads"], c["layer_norm_eps"], c["attention_bias"]
    activation = _activation(c["hidden_act"])
    head_dim = c["hidden_size"] // heads
    share, base = _rotary(c)
    rotated = int(head_dim * share)
    if rotated % 2:
        raise UsageError(
            f"rotary_pct {share}: {rotated} of each head's {head_dim} numbers would rotate; expected an even count"
        )

    def attention(x: Tensor, name: str) -> Tensor:
        # The fused projection's rows are [q|k|v] of the first head, then of the second, ...
        q, k, v = w.linear(x, f"{name}.query_key_value", bias).unflatten(-1, (heads, 3, head_dim)).unbind(-2)
        mixed = _causal_attention(_rotate(q, rotated, base), _rotate(k, rotated, base), v, head_dim**-0.5)
        return w.linear(mixed, f"{name}.dense", bias)

    def mlp(x: Tensor, name: str) -> Tensor:
        return w.linear(activation(w.linear(x, f"{name}.dense_h_to_4h")), f"{name}.dense_4h_to_h")

    x = w["gpt_neox.embed_in.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        block = f"gpt_neox.layers.{i}"
        attended = x + attention(w.norm(x, f"{block}.input_layernorm", eps), f"{block}.attention")
        source = x if c["use_parallel_residual"] else attended  # what the MLP reads; both add to the same stream
        x = attended + mlp(w.norm(source, f"{block}.post_attention_layernorm", eps), f"{block}.mlp")
    x = w.norm(x, "gpt_neox.final_layer_norm", eps)
    return w.linear(x, "gpt_neox.embed_in" if c["tie_word_embeddings"] else "embed_out", bias=False)


def _gpt_bigcode(c: Mapping[str, Any], w: _Weights, ids: Tensor) -> Tensor:
    width, heads, eps = c["n_embd"], c["n_head"], c["layer_norm_epsilon"]
    activation = _activation(c["activation_function"])
    head_dim = width // heads
    scale = head_dim**-0.5 if c["scale_attn_weights"] else 1.0

    def attention(x: Tensor, name: str) -> Tensor:
        fused = w.linear(x, f"{name}.c_attn")
        if c["multi_query"]:  # rows: the queries of all heads, one key, one value, which all heads read
            q = fused[..., :width].unflatten(-1, (heads, head_dim))
            k, v = (part.unsqueeze(-2).expand_as(q) for part in fused[..., width:].split(head_dim, dim=-1))
        else:  # rows: [q|k|v] of the first head, then of the second, ...
            q, k, v = fused.unflatten(-1, (heads, 3, head_dim)).unbind(-2)
        return w.linear(_causal_attention(q, k, v, scale), f"{name}.c_proj")

    def mlp(x: Tensor, name: str) -> Tensor:
        return w.linear(activation(w.linear(x, f"{name}.c_fc")), f"{name}.c_proj")

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]
    for i in range(c["n_layer"]):
        block = f"transformer.h.{i}"
        x = x + attention(w.norm(x, f"{block}.ln_1", eps), f"{block}.attn")
        x = x + mlp(w.norm(x, f"{block}.ln_2", eps), f"{block}.mlp")
    x = w.norm(x, "transformer.ln_f", eps)
    return w.linear(x, "transformer.wte" if c["tie_word_embeddings"] else "lm_head", bias=False)


_FORWARDS: dict[str, Callable[[Mapping[str, Any], _Weights, Tensor], Tensor]] = {
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "gpt_bigcode": _gpt_bigcode,
}


def published_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of a float transformers causal LM under their names in published files. A tied head is absent."""
    spec = FAMILIES[model.config.model_type]
    tensors = dict(model.state_dict())
    head = tensors.pop(f"{spec.head}.weight", None)
    if head is not None and not model.config.tie_word_embeddings:
        tensors[f"{spec.published_head}.weight"] = head
    return tensors


@torch.no_grad()
def check(model: Any, *, length: int = 48, seed: int = 0) -> float:
    """Largest absolute difference between a transformers causal LM's logits and the reference's, on 2 random texts.

    Args:
        model: a float instance of one of the families' causal LM classes, on any device, in evaluation mode.
        length: tokens of each text; cut to the model's positions.
        seed: of the random ids.

    A value that is NaN or infinite on either side makes the result infinite.
    """
    spec = FAMILIES.get(model.config.model_type)
    if spec is None:
        raise UsageError(f"model type {model.config.model_type!r}: expected one of {', '.join(FAMILIES)}")
    if model.training:
        raise UsageError("the model is in training mode, where dropout changes its logits; call model.eval() first")
    config = model.config.to_dict()
    tokens = min(length, config[spec.positions])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config["vocab_size"], (2, tokens), generator=generator).to(model.device)
    expected = logits(spec.model_type, config, published_tensors(model), ids)
    difference = (model(ids, use_cache=False).logits.float() - expected).abs()
    return float(difference.max()) if bool(difference.isfinite().all()) else float("inf")


# Small models for `self_check`, in every way in which a config changes what a family computes.
_NO_SPECIALS: dict[str, object] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SMALL: dict[str, dict[str, object]] = {
    "opt": dict(
        vocab_size=97, hidden_size=48, ffn_dim=112, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=40, word_embed_proj_dim=48, **_NO_SPECIALS,
    ),
    "gpt_neox": dict(
        vocab_size=97, hidden_size=48, intermediate_size=112, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=40, **_NO_SPECIALS,
    ),
    "gpt_bigcode": dict(vocab_size=97, n_embd=48, n_inner=112, n_layer=2, n_head=3, n_positions=40, **_NO_SPECIALS),
}  # fmt: skip


def _rope(share: float, theta: float = 10000.0) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}}


_VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "opt": ("opt", {}),
    "opt post-norm": ("opt", {"do_layer_norm_before": False}),
    "opt post-norm projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt projected": ("opt", {"word_embed_proj_dim": 32}),
    "opt no final norm": ("opt", {"_remove_final_layer_norm": True}),
    "opt no biases, plain norms": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt untied, gelu": ("opt", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt_neox parallel rotary 0.25": ("gpt_neox", _rope(0.25)),
    "gpt_neox parallel rotary 1.0": ("gpt_neox", _rope(1.0)),
    "gpt_neox sequential rotary 0.25": ("gpt_neox", {"use_parallel_residual": False, **_rope(0.25)}),
    "gpt_neox sequential rotary 1.0": ("gpt_neox", {"use_parallel_residual": False, **_rope(1.0)}),
    "gpt_neox no attention bias, theta 500": ("gpt_neox", {"attention_bias": False, **_rope(0.5, 500.0)}),
    "gpt_neox tied, tanh gelu": ("gpt_neox", {"tie_word_embeddings": True, "hidden_act": "gelu_new", **_rope(0.25)}),
    "gpt_bigcode multi-query": ("gpt_bigcode", {}),
    "gpt_bigcode multi-head": ("gpt_bigcode", {"multi_query": False}),
    "gpt_bigcode unscaled": ("gpt_bigcode", {"scale_attn_weights": False}),
    "gpt_bigcode untied, exact gelu": ("gpt_bigcode", {"tie_word_embeddings": False, "activation_function": "gelu"}),
}
SELF_CHECK_TOLERANCE = 1e-4  # float32, logits of a few units, two blocks: rounding alone stays below 1e-5


def self_check() -> dict[str, float]:
    """`check` on small random models of every variant, eager and SDPA: "variant, attention" to difference.

    A difference above SELF_CHECK_TOLERANCE means that the installed transformers does not compute what the family is.
    Takes about a second; leaves torch's global random state as it was.
    """
    import transformers

    result: dict[str, float] = {}
    for variant, (model_type, changes) in _VARIANTS.items():
        spec = FAMILIES[model_type]
        config = getattr(transformers, spec.config_class)(**{**_SMALL[model_type], **changes})
        with torch.random.fork_rng(devices=[]):
            model = getattr(transformers, spec.model_classes["causal-lm"])(config).float().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                # Vectors get noise too: a bias of 0 or a norm's weight of 1 would hide that it is not used.
                neutral = parameter.mean().round() if parameter.ndim == 1 else torch.tensor(0.0)
                parameter.copy_(neutral + 0.12 * torch.randn(parameter.shape, generator=generator))
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            result[f"{variant}, {attention}"] = check(model)
    return result
