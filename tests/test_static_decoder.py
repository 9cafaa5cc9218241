"""Steps of fixed shape: the same logits as transformers' own with a cache that grows, the same texts, and nothing that waits for a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from torch import Tensor

import qlm
from qlm.errors import UsageError
from qlm.generate import generate
from qlm.recipe import load_recipe
from qlm.static_decoder import GrowingDecoder, StaticDecoder, can_decode
from tests import tiny_models
from tests.conftest import FAMILIES
from tests.test_generate import PROMPT, pair

# fp32 sums in another order, logits of size 1.
TOLERANCE = 1e-5
# What would make the host wait for the GPU, or cannot be recorded.
WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def by_hand(model: Any, ids: Tensor, tokens: int) -> tuple[list[Tensor], Tensor]:
    """Logits after each of the greedy tokens, every one computed from the whole sequence."""
    found = []
    with torch.no_grad():
        for _ in range(tokens):
            found.append(model(input_ids=ids, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, found[-1].argmax(-1, keepdim=True)], 1)
    return found, ids


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_logits(variant: str, attention: str) -> None:
    model = tiny_models.build(variant)
    model.set_attn_implementation(attention)
    decoder = StaticDecoder(model, 2, 20)
    # Again from another prompt: what the cache held before counts no more.
    for prompt in (tiny_models.token_ids(2, 9), tiny_models.token_ids(2, 13)[:, 3:]):
        wanted, ids = by_hand(model, prompt, 8)
        for index, logits in enumerate(wanted):
            found = decoder.step(ids[:, prompt.shape[1] + index - 1]) if index else decoder.prefill(prompt)
            assert (found - logits).abs().max() < TOLERANCE
            assert decoder.position == prompt.shape[1] + index


@pytest.mark.parametrize("backend", ["int8", "nf4", "gptq"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_backends(
    variant: str, backend: str, folder_of: Callable[[str], Path], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Every token's activations are rounded by themselves, so that a step alone is the same as one among others."""
    quantized = qlm.quantize(load_recipe(recipe_file(folder_of(variant), tmp_path / "out", backend)))
    model = qlm.load(quantized.output, dtype=torch.float32)
    wanted, ids = by_hand(model, tiny_models.token_ids(1, 6), 6)
    decoder = StaticDecoder(model, 1, 12)
    for index, logits in enumerate(wanted):
        # int8 activations: a last bit may move one by a step.
        found = decoder.step(ids[:, 5 + index]) if index else decoder.prefill(ids[:, :6])
        assert (found - logits).abs().max() < 2e-2 * logits.std()


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_step_waits_for_nothing(variant: str, attention: str) -> None:
    """No value of a tensor is asked for: on a GPU that would end the recording."""
    model = tiny_models.build(variant)
    model.set_attn_implementation(attention)
    decoder = StaticDecoder(model, 1, 16)
    decoder.prefill(tiny_models.token_ids(1, 4))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        decoder._forward()
    called = {event.key for event in profile.key_averages()}
    assert "aten::embedding" in called
    assert not called & WAITS


@pytest.mark.parametrize(
    "options", [{"greedy": True}, {"seed": 3, "temperature": 1.3, "top_k": 20, "num_return_sequences": 3}]
)
@pytest.mark.parametrize(
    ("variant", "with_adapter"), [*((variant, False) for variant in FAMILIES), (FAMILIES[0], True)]
)
def test_generate(variant: str, with_adapter: bool, options: dict[str, Any]) -> None:
    model, tokenizer = pair(variant)
    if with_adapter:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    wanted = generate(model, tokenizer, PROMPT, max_new_tokens=24, graphs=False, **options)
    steps: list[int] = []
    true = StaticDecoder.step

    def counted(self: StaticDecoder, ids: Tensor) -> Tensor:
        steps.append(len(ids))
        return true(self, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StaticDecoder, "step", counted)
        assert generate(model, tokenizer, PROMPT, max_new_tokens=24, graphs=True, **options) == wanted
    assert 0 < len(steps) <= 23
    assert set(steps) == {options.get("num_return_sequences", 1)}
    # The model is itself again.
    assert generate(model, tokenizer, PROMPT, max_new_tokens=24, graphs=False, **options) == wanted


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_growing_cache_is_transformers_own(variant: str) -> None:
    """To the bit, with a mask and positions that say what is so without them; a second prompt begins anew."""
    model = tiny_models.build(variant)
    decoder = GrowingDecoder(model)
    for prompt in (tiny_models.token_ids(2, 9), tiny_models.token_ids(2, 13)[:, 3:]):
        found, ids = decoder.prefill(prompt), prompt
        cache = None
        for _ in range(8):
            new = ids if cache is None else ids[:, -1:]
            positions = torch.arange(ids.shape[1])[None, -new.shape[1] :].expand(2, -1)
            with torch.no_grad():
                said = model(
                    input_ids=new, attention_mask=torch.ones_like(ids), position_ids=positions, past_key_values=cache,
                    logits_to_keep=1,
                )  # fmt: skip
            cache = said.past_key_values
            assert torch.equal(found, said.logits[:, -1])
            assert not found.requires_grad
            ids = torch.cat([ids, found.argmax(-1, keepdim=True)], 1)
            found = decoder.step(ids[:, -1])


def test_the_graph_is_recorded_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another GPU than the current one a graph would be empty."""
    inside: list[Any] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def on(device: Any, **more: Any) -> Iterator[None]:
        inside.append((device, more))
        yield

    said = {
        "device": on,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": on,
        "CUDAGraph": object,
        "graph": on,
    }
    decoder = StaticDecoder(tiny_models.build(FAMILIES[0]), 1, 8)
    with mock.patch.multiple(torch.cuda, **said):
        decoder._record(torch.device("cuda", 1))
    assert inside[0] == (torch.device("cuda", 1), {})
    assert inside[-1][1] == {"stream": stream}
    assert decoder.graph is not None


def test_a_full_cache() -> None:
    decoder = StaticDecoder(tiny_models.build(FAMILIES[0]), 1, 14)
    assert decoder.length == 16
    decoder.prefill(tiny_models.token_ids(1, 15))
    decoder.step(torch.tensor([3]))
    with pytest.raises(UsageError, match="16 tokens: the cache was made for 16"):
        decoder.step(torch.tensor([3]))
    with pytest.raises(UsageError, match="17 tokens: the cache was made for 16"):
        decoder.prefill(tiny_models.token_ids(1, 17))


def test_what_it_does_not_take() -> None:
    model = tiny_models.build(FAMILIES[0])
    model.config._attn_implementation = "flash_attention_2"
    assert not can_decode(model)
    with pytest.raises(UsageError, match="flash_attention_2"):
        StaticDecoder(model, 1, 8)
