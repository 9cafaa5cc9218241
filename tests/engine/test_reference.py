"""The reference against transformers on every variant, and that a single wrong setting shows.

Tolerance: float32 rounding of logits of a few units stays near 1e-5; the project promises 1e-4.
"""

import pytest
import torch
import transformers

from qlm.arch import FAMILIES
from qlm.engine import reference
from qlm.errors import DataError, UsageError
from tests import tiny_models

AGREE = 1e-4
DISAGREE = 1e-2  # a wrong setting moves logits by at least this: a hundred times what agreement allows

# What `check` reads from a model, at hand to be changed by a test.
Case = tuple[str, dict[str, object], dict[str, torch.Tensor], torch.Tensor, torch.Tensor]


def case(variant: str, ids: torch.Tensor | None = None) -> Case:
    """(model type, config, published tensors, ids, transformers' logits)."""
    model = tiny_models.build(variant)
    ids = tiny_models.token_ids() if ids is None else ids
    with torch.no_grad():
        logits = model(ids).logits
    return model.config.model_type, model.config.to_dict(), reference.published_tensors(model), ids, logits


def difference(
    case: Case, config: dict[str, object] | None = None, tensors: dict[str, torch.Tensor] | None = None
) -> float:
    """Largest absolute difference when some config fields or tensors of the reference's side are replaced."""
    model_type, own_config, own_tensors, ids, logits = case
    ours = reference.logits(model_type, {**own_config, **(config or {})}, {**own_tensors, **(tensors or {})}, ids)
    return float((ours - logits).abs().max())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_agrees_with_transformers(variant: str, attention: str) -> None:
    model = tiny_models.build(variant)
    model.set_attn_implementation(attention)
    ids = tiny_models.token_ids(length=tiny_models.POSITIONS)
    with torch.no_grad():
        expected = model(ids).logits
    tensors = reference.published_tensors(model)
    ours = reference.logits(model.config.model_type, model.config.to_dict(), tensors, ids)
    torch.testing.assert_close(ours, expected, rtol=0, atol=AGREE)
    assert float(expected.std()) > 0.1  # the logits say something
    exact = reference.logits(model.config.model_type, model.config.to_dict(), tensors, ids, dtype=torch.float64)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=AGREE)


def test_published_names() -> None:
    neox = reference.published_tensors(tiny_models.build("neox-parallel-rotary-0.25"))
    assert "embed_out.weight" in neox
    assert not any("lm_head" in name for name in neox)
    for variant in ("opt", "bigcode-multi-query"):
        assert "lm_head.weight" not in reference.published_tensors(tiny_models.build(variant))


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        ("neox-parallel-rotary-0.25", {"use_parallel_residual": False}),
        ("neox-sequential-rotary-0.25", {"use_parallel_residual": True}),
        ("neox-parallel-rotary-0.25", {"rope_parameters": {"partial_rotary_factor": 1.0}}),
        ("neox-parallel-rotary-1.0", {"rope_parameters": {"partial_rotary_factor": 0.25}}),
        ("neox-parallel-rotary-1.0", {"rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 100.0}}),
        ("neox-parallel-rotary-0.25", {"num_attention_heads": 2}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt-post-norm", {"do_layer_norm_before": True, "_remove_final_layer_norm": True}),
        ("opt", {"_remove_final_layer_norm": True}),
        ("opt", {"activation_function": "gelu"}),
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("bigcode-multi-query", {"scale_attn_weights": False}),
        ("bigcode-unscaled", {"scale_attn_weights": True}),
        ("bigcode-multi-query", {"layer_norm_epsilon": 0.1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}" for k in value),
)
def test_one_wrong_setting_shows(variant: str, wrong: dict[str, object]) -> None:
    own = case(variant)
    assert difference(own) < AGREE
    assert difference(own, wrong) > DISAGREE


@pytest.mark.parametrize(
    ("variant", "field"), [("neox-parallel-rotary-0.25", "hidden_act"), ("bigcode-multi-query", "")]
)
def test_tanh_and_exact_gelu_are_told_apart(variant: str, field: str) -> None:
    field = field or "activation_function"
    own = case(variant)
    other = "gelu_new" if own[1][field] == "gelu" else "gelu"
    assert (
        difference(own, {field: other}) > AGREE
    )  # the two functions differ by 5e-4 at most, so DISAGREE is out of reach


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_wrong_position_offset_shows(monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    own = case("opt")
    monkeypatch.setattr(reference, "OPT_POSITION_OFFSET", offset)
    assert difference(own) > DISAGREE


def test_position_offset_is_the_one_in_arch() -> None:
    assert FAMILIES["opt"].position_offset == reference.OPT_POSITION_OFFSET


@pytest.mark.parametrize("variant", ["bigcode-multi-head", "neox-parallel-rotary-0.25"])
def test_wrong_row_order_of_the_fused_projection_shows(variant: str) -> None:
    own = case(variant)
    name = next(n for n in own[2] if n.endswith(("0.attn.c_attn.weight", "0.attention.query_key_value.weight")))
    rows = own[2][name].unflatten(0, (4, 3, 32)).transpose(0, 1).flatten(0, 2)  # all q, all k, all v
    assert difference(own, tensors={name: rows}) > DISAGREE


def test_every_tensor_matters() -> None:
    """Changing any one tensor moves the logits: none is forgotten. (A key's bias alone cancels in the softmax.)"""
    for variant in tiny_models.FAMILIES:
        own = case(variant)
        for name, tensor in own[2].items():
            moved = difference(own, tensors={name: tensor + torch.linspace(-0.5, 0.5, tensor.numel()).view_as(tensor)})
            if not name.endswith("k_proj.bias"):
                assert moved > AGREE, name


@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_later_tokens_do_not_reach_earlier_ones(variant: str) -> None:
    model_type, config, tensors, ids, _ = case(variant)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % tiny_models.VOCABULARY
    a, b = (reference.logits(model_type, config, tensors, i) for i in (ids, changed))
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=0, atol=1e-6)
    assert float((a[:, 20:] - b[:, 20:]).abs().max()) > DISAGREE


@pytest.mark.parametrize("model_type", reference.DEFAULTS)
def test_defaults_are_transformers_defaults(model_type: str) -> None:
    config = getattr(transformers, FAMILIES[model_type].config_class)().to_dict()
    rope = config.get("rope_parameters") or {}
    config |= {"rotary_pct": rope.get("partial_rotary_factor"), "rotary_emb_base": rope.get("rope_theta")}
    if model_type == "opt":
        assert config["word_embed_proj_dim"] == config["hidden_size"]
        config["word_embed_proj_dim"] = None
    defaults = reference.DEFAULTS[model_type]
    assert {name: config[name] for name in defaults} == defaults


def test_missing_fields_have_their_defaults() -> None:
    """The tiny configs without the fields that equal the default give the same logits."""
    for variant in tiny_models.FAMILIES:
        model_type, config, tensors, ids, expected = case(variant)
        defaults = reference.DEFAULTS[model_type]
        short = {name: value for name, value in config.items() if name in defaults and value != defaults[name]}
        assert len(short) < len(defaults)
        torch.testing.assert_close(reference.logits(model_type, short, tensors, ids), expected, rtol=0, atol=AGREE)


def test_old_and_new_place_of_the_rotary_fields() -> None:
    model_type, config, tensors, ids, expected = case("neox-parallel-rotary-1.0")
    del config["rope_parameters"]
    for fields in (
        {"rotary_pct": 1.0, "rotary_emb_base": 10000},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        {"partial_rotary_factor": 1.0, "rope_theta": 10000.0},
    ):
        ours = reference.logits(model_type, {**config, **fields}, tensors, ids)
        torch.testing.assert_close(ours, expected, rtol=0, atol=AGREE)


@pytest.mark.parametrize(
    ("variant", "config", "words"),
    [
        ("opt", {"activation_function": "swish"}, "activation 'swish'"),
        ("neox-parallel-rotary-0.25", {"hidden_act": "silu"}, "activation 'silu'"),
        (
            "neox-parallel-rotary-0.25",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type 'linear'",
        ),
        ("neox-parallel-rotary-0.25", {"rope_parameters": {"partial_rotary_factor": 0.1}}, "even count"),
        ("opt", {"max_position_embeddings": 32}, "at most 32 tokens"),
        ("opt", {"vocab_size": 10}, "0 to 9"),
    ],
)
def test_refuses_what_it_does_not_know(variant: str, config: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        difference(case(variant), config)


def test_refuses_other_types_and_missing_tensors() -> None:
    _, config, tensors, ids, _ = case("opt")
    with pytest.raises(UsageError, match="model type 'llama'"):
        reference.logits("llama", config, tensors, ids)
    with pytest.raises(UsageError, match="float32 or float64"):
        reference.logits("opt", config, tensors, ids, dtype=torch.bfloat16)
    del tensors["model.decoder.layers.1.fc2.bias"]
    with pytest.raises(DataError, match=r"^model\.decoder\.layers\.1\.fc2\.bias"):
        reference.logits("opt", config, tensors, ids)


def test_check_finds_a_changed_model() -> None:
    for variant in tiny_models.FAMILIES:
        model = tiny_models.build(variant)
        assert reference.check(model) < AGREE
        assert reference.check(model, seed=1) != reference.check(model)
    attention = model.transformer.h[0].attn
    attention.scaling *= 2.0
    assert reference.check(model) > DISAGREE
    attention.scaling = float("nan")
    assert reference.check(model) == float("inf")
    with pytest.raises(UsageError, match="training mode"):
        reference.check(model.train())


def test_self_check() -> None:
    state = torch.get_rng_state()
    result = reference.self_check()
    assert torch.equal(state, torch.get_rng_state())
    assert max(result.values()) < reference.SELF_CHECK_TOLERANCE
    assert {name.rpartition(", ")[2] for name in result} == {"eager", "sdpa"}
    assert {name.split()[0].rstrip(",") for name in result} == set(FAMILIES)


def test_self_check_sees_a_wrong_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "OPT_POSITION_OFFSET", 1)
    result = reference.self_check()
    wrong = {name for name, value in result.items() if value > reference.SELF_CHECK_TOLERANCE}
    assert wrong == {name for name in result if name.startswith("opt")}
