"""The project's own statement of each family's tensors and defaults against transformers' classes, variant by variant."""

from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from qlm.arch import FAMILIES
from qlm.arch.shapes import causal_lm_linears, causal_lm_shapes, complete_fields
from qlm.checkpoint.config import _REQUIRED, read_config
from qlm.checkpoint.expected import published_name
from qlm.engine.reference import _SMALL, _VARIANTS, DEFAULTS
from tests import tiny_models

# Fields that change no logit of a causal LM in evaluation mode.
TRAINING = ("dropout", "pdrop", "layerdrop")
LABELS = {"num_labels", "id2label", "label2id"}
ROTARY = {"rotary_pct", "rotary_emb_base", "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters"}


class AsRead:
    """What `read_config` wants of a checkpoint, from transformers' config as it would be saved."""

    def __init__(self, config: Any) -> None:
        self.config, self.config_source = config.to_diff_dict(), "config.json"
        # A file may leave out what is the class's default; what qlm asks for stays.
        spec = FAMILIES[config.model_type]
        self.config |= {name: getattr(config, name) for name in spec.fields.keys() & _REQUIRED}
        self.config = {name: value for name, value in self.config.items() if value is not None}


def check(model: nn.Module) -> None:
    spec, given = read_config(AsRead(model.config))
    fields = complete_fields(spec, given)
    expected = {
        published_name(spec, name): tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    found = causal_lm_shapes(spec, fields)
    assert found == expected
    linears = {
        published_name(spec, f"{name}.").removesuffix("."): (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert causal_lm_linears(spec, fields) == linears
    assert list(causal_lm_linears(spec, fields)) == list(linears), "the same order"


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_shapes_of_the_tiny_models(variant: str) -> None:
    check(tiny_models.VARIANTS[variant]())


@pytest.mark.parametrize("variant", _VARIANTS)
def test_shapes_of_every_variant_of_the_reference(variant: str) -> None:
    family, changes = _VARIANTS[variant]
    spec = FAMILIES[family]
    config = getattr(transformers, spec.config_class)(**{**_SMALL[family], **changes})
    with init_empty_weights(include_buffers=False):
        check(getattr(transformers, spec.model_classes["causal-lm"])(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_a_config_that_says_as_little_as_it_may(family: str) -> None:
    spec = FAMILIES[family]
    required = {name: value for name, value in _SMALL[family].items() if name in _REQUIRED}
    config = getattr(transformers, spec.config_class)(**required)
    with torch.device("meta"):
        check(getattr(transformers, spec.model_classes["causal-lm"])(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    spec = FAMILIES[family]
    required = {name: value for name, value in _SMALL[family].items() if name in _REQUIRED}
    theirs = getattr(transformers, spec.config_class)(**required)
    ours = complete_fields(spec, required)
    for name in spec.defaults:
        assert ours[name] == getattr(theirs, name), name
        assert type(ours[name]) is type(getattr(theirs, name)), name
    assert ours["tie_word_embeddings"] == theirs.tie_word_embeddings
    # transformers leaves n_inner null, and reads that as four times the width.
    assert {name: ours[name] for name in spec.multiples} == {
        name: getattr(theirs, name) or 4 * theirs.n_embd for name in spec.multiples
    }
    assert complete_fields(spec, {**required, **dict.fromkeys(spec.multiples)}) == ours


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_may_be_left_out_has_a_default(family: str) -> None:
    spec = FAMILIES[family]
    optional = {name for name in spec.fields if name not in _REQUIRED | LABELS | ROTARY and not name.endswith(TRAINING)}
    assert optional == {*spec.defaults, *spec.multiples, "tie_word_embeddings"}
    assert {name: value for name, value in DEFAULTS[family].items() if name in spec.defaults}.items() <= (
        spec.defaults.items()
    ), "the reference's statement"
    for name, value in spec.defaults.items():
        assert type(value) in spec.fields[name], name
