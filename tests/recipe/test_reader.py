"""`reader`: what other software cannot load is refused with its key and a way out, and what it can is not."""

import re
from typing import Any

import pytest
from transformers import GPTQConfig

from qlm.arch import FAMILIES
from qlm.backends import BACKENDS
from qlm.errors import UsageError
from qlm.formats.gptq import GptqFormat
from qlm.recipe import parse_recipe, quantize_section
from qlm.sensitivity import OPTIONS, budget_of, layers_of
from tests import tiny_models
from tests.conftest import recipe_text

OTHER = "or choose another reader"


def accepted(**keys: Any) -> None:
    parse_recipe(recipe_text("m", "out", "gptq", "c.txt", **keys), "r.yaml")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"reader": "transformers", "average_bits": 3.5}, "average_bits: found with reader transformers, which ignores settings of single linears; remove it, "),
        ({"reader": "transformers", "target_size": "1MB"}, "target_size: found with reader transformers, which ignores settings of single linears; remove it, "),
        ({"reader": "transformers", "overrides": {"*.fc2": {"bits": 8}}}, "overrides: found with reader transformers, which ignores "),
        ({"reader": "transformers", "skip": ["*.fc2"]}, "skip: found with reader transformers, which ignores "),
        ({"reader": "transformers", "damp": 1.0}, "damp: found 1 with reader transformers; allowed: less than 1, "),
        ({"reader": "vllm", "bits": 3}, "bits: found 3 with reader vllm; allowed: 4 or 8, "),
        ({"reader": "vllm", "bits": 2}, "bits: found 2 with reader vllm; allowed: 4 or 8, "),
        ({"reader": "vllm", "symmetric": False}, "symmetric: found false with reader vllm; allowed: true, "),
        ({"reader": "vllm", "overrides": {"*.fc2": {"bits": 3}}}, "overrides['*.fc2'].bits: found 3 with reader vllm; allowed: 4 or 8, "),
        ({"reader": "vllm", "average_bits": 5.0, "overrides": {"*.fc2": {"bits": 3}}}, "overrides['*.fc2'].bits: found 3 with reader vllm; "),
        ({"reader": "vllm", "overrides": {"*.fc2": {"symmetric": False}}}, "overrides['*.fc2'].symmetric: found false with reader vllm; allowed: true, "),
        ({"reader": "vllm", "overrides": {"*.q_proj": {"bits": 8}}}, "overrides: found different settings for model.decoder.layers.0.self_attn.q_proj, "),
        ({"reader": "vllm", "skip": ["*.11.self_attn.k_proj"]}, "skip: found different settings for model.decoder.layers.11.self_attn.q_proj, "),
    ],
    ids=lambda value: " ".join(map(str, value.items())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        accepted(**keys)
    message = str(caught.value)
    assert re.match(r"r\.yaml:2:\d+: quantize\.", message)
    assert words in message
    assert message.endswith(OTHER)
    # GPTQModel reads it.
    accepted(**{**keys, "reader": "gptqmodel"})


@pytest.mark.parametrize(
    "keys",
    [
        {"reader": "transformers", "bits": 2, "symmetric": False, "order": "act", "group_size": 32},
        {"reader": "vllm", "bits": 8, "order": "act"},
        {"reader": "vllm", "average_bits": 5.0},
        {"reader": "vllm", "overrides": {"*.[qkv]_proj": {"bits": 8}, "*.fc2": {"group_size": 32}}, "skip": ["*.layers.0.*"]},
    ],
    ids=str,
)  # fmt: skip
def test_accepted(keys: dict[str, Any]) -> None:
    accepted(**keys)


@pytest.mark.parametrize("backend", ["int8", "nf4", "quanto"])
def test_of_gptq_alone(backend: str) -> None:
    with pytest.raises(UsageError, match=f"quantize.reader: found with backend {backend}, which takes "):
        quantize_section({"backend": backend, "reader": "vllm"})


def test_transformers_does_not_look_at_rules_for_single_linears() -> None:
    """Why it is refused: transformers takes the config as qlm writes it, and forgets the rules."""
    formats = {"a.fc1": GptqFormat(4, 128, True, False), "a.fc2": GptqFormat(8, 128, True, False)}
    config = BACKENDS["gptq"].describe(formats, [], None).quantization_config  # type: ignore[arg-type]
    assert config is not None
    assert config["dynamic"]
    read = GPTQConfig.from_dict(config).to_dict()
    assert (read["bits"], read["group_size"], read["sym"]) == (4, 128, True)
    assert "dynamic" not in read
    with pytest.raises(ValueError, match="damp_percent"):
        GPTQConfig.from_dict({**config, "damp_percent": 1.0})


def test_bits_are_chosen_among_those_that_it_reads() -> None:
    model = tiny_models.build("opt")
    section = quantize_section({"backend": "gptq", "average_bits": 5.0, "reader": "vllm"}, True)
    found = {option for layer in layers_of(model, FAMILIES["opt"], section) for option in layer.options}
    assert found
    assert found <= {option for option in OPTIONS if option[0] in (4, 8)}
    stored = [name for name, _ in model.named_parameters()]
    too_small = section.model_copy(update={"average_bits": 3.5})
    with pytest.raises(
        UsageError, match=r"average_bits: found 3\.\d+ stored bits per weight; allowed: at least 4\.\d+"
    ):
        budget_of(model, FAMILIES["opt"], too_small, model.dtype, stored)
