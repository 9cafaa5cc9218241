"""Mixed precision: costs are the KL that they say they are, sizes are what the files hold, and the model is left as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlm import sensitivity
from qlm.arch import FAMILIES as SPECS
from qlm.blocks import choose_settings
from qlm.errors import UsageError
from qlm.load import block_paths
from qlm.quantize import quantize_model
from qlm.recipe import QuantizeRecipe, quantize_section
from qlm.sensitivity import (
    OPTIONS,
    BitChoice,
    Option,
    budget_of,
    choose_bits,
    layers_of,
    names_in,
    output_gradients,
    with_choice,
)
from tests import tiny_models
from tests.conftest import FAMILIES

FEW: tuple[Option, ...] = ((2, 64), (3, 128), (4, 128))
# bfloat16 has 8 significant bits.
BFLOAT16 = 2.0**-8
# A mean over a thousand tokens of the square of a number drawn at each, which has a long tail, and terms of higher order.
SAMPLED = 1.5
# Errors of values at different tokens, which attention adds up, are not in it. In trained models costs are 0.75 to 1.3 of the truth.
ACROSS_TOKENS = 3.0
# Headers of files are bounded from above, and a budget is used up to a step of a layer.
LEAST_USED = 0.97


def section_of(**changes: Any) -> QuantizeRecipe:
    return quantize_section({"backend": "gptq", "quality": "fast", **changes}, True)


def windows(samples: int = 8, length: int = 48) -> Tensor:
    return tiny_models.token_ids(samples, length)


def choose(
    model: Any,
    average_bits: float,
    section: QuantizeRecipe | None = None,
    options: tuple[Option, ...] = FEW,
    **more: Any,
) -> BitChoice:
    section = section or section_of()
    spec = SPECS[model.config.model_type]
    weights = sum(
        model.get_parameter(f"{name}.weight").numel() for name in names_in(layers_of(model, spec, section, options))
    )
    budget = int(average_bits * weights / 8)
    return choose_bits(model, spec, more.pop("windows", windows()), section, budget, options, **more)


class TestOutputGradients:
    @pytest.mark.parametrize("variant", [*FAMILIES, "opt-350m", "neox-sequential-rotary-1.0"])
    def test_are_those_of_a_plain_backward_pass(self, variant: str) -> None:
        model = tiny_models.build(variant)
        spec = SPECS[model.config.model_type]
        blocks = block_paths(spec, model)
        names = [name for layer in layers_of(model, spec, section_of(), FEW) for name in layer.names]
        ids = windows(3, 20)
        drawn = torch.tensor([0, 3, 19, 20, 33, 41, 59])
        found = output_gradients(model, blocks, names, ids, drawn)

        # Oracle: zeros added to the outputs, whose gradients autograd makes; nothing is computed again.
        generator = torch.Generator().manual_seed(0)
        for index, window in enumerate(ids):
            added: dict[str, Tensor] = {}

            def add(name: str) -> Callable[..., Tensor]:
                def hook(module: Any, args: Any, output: Tensor) -> Tensor:
                    added[name] = torch.zeros_like(output, requires_grad=True)  # noqa: B023
                    return output + added[name]  # noqa: B023

                return hook

            handles = [model.get_submodule(name).register_forward_hook(add(name)) for name in names]
            probability = model(input_ids=window[None], use_cache=False).logits[0].softmax(-1)
            label = torch.multinomial(probability.detach(), 1, generator=generator)
            gradients = torch.autograd.grad(-probability.gather(1, label).log().sum(), [added[name] for name in names])
            for handle in handles:
                handle.remove()
            here = (drawn >= 20 * index) & (drawn < 20 * (index + 1))
            for name, gradient in zip(names, gradients, strict=True):
                expected = gradient.reshape(20, -1)[drawn[here] - 20 * index]
                assert found[name].dtype == torch.bfloat16
                error = (found[name][here].float() - expected).abs().max()
                assert error <= BFLOAT16 * expected.abs().max(), name

    def test_needs_a_head(self) -> None:
        model = tiny_models.build("opt").base_model
        with pytest.raises(UsageError, match="a OPTModel has no head"):
            output_gradients(model, ["decoder.layers.0"], [], windows(), torch.arange(3))


@torch.no_grad()
def divergence(model: Any, other: Any, ids: Tensor) -> float:
    p, q = (m(input_ids=ids, use_cache=False).logits.double().log_softmax(-1) for m in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


class TestCosts:
    @pytest.mark.parametrize("variant", FAMILIES)
    def test_are_the_divergence_of_the_one_linear(self, variant: str) -> None:
        """Each linear quantized alone, for real, and KL measured on the samples that costs are taken from."""
        model = tiny_models.build(variant)
        spec = SPECS[model.config.model_type]
        ids = windows(32, 64)
        option = (4, 128)
        for layer in layers_of(model, spec, section_of(), [option]):
            others = [name for other in layers_of(model, spec, section_of(), [option]) for name in other.names]
            section = section_of(skip=[name for name in others if name not in layer.names])
            choice = choose(model, 8.0, section, (option,), windows=ids)
            alone = copy.deepcopy(model)
            fitted, measured = ids[:-16], ids[-16:]
            quantize_model(alone, section, fitted)
            from qlm.kernels.ops import float_activations

            with float_activations():
                true = divergence(model, alone, measured)
            assert true / ACROSS_TOKENS < choice.facts["predicted_kl"] < true * SAMPLED, layer.names

    def test_a_linear_that_matters_little_gets_few_bits(self) -> None:
        model = tiny_models.build("opt")
        little, much = "model.decoder.layers.1.fc2", "model.decoder.layers.0.fc2"
        with torch.no_grad():
            model.get_parameter(f"{little}.weight").mul_(1e-3)
        choice = choose(model, 3.4)
        assert choice.options[little] == (2, 64)
        assert choice.options[much][0] >= 3

    def test_correcting_biases_counts(self) -> None:
        model = tiny_models.build("opt")
        with torch.no_grad():
            for block in model.model.decoder.layers:
                block.self_attn_layer_norm.bias.fill_(3.0)  # inputs with a large mean
        ids = windows(32, 64)  # many more tokens than features: nothing is fitted to noise
        plain = choose(model, 3.4, windows=ids).facts["predicted_kl_uniform"]
        corrected = choose(model, 3.4, section_of(bias_correction=True), windows=ids).facts["predicted_kl_uniform"]
        assert all(corrected[option] < plain[option] for option in plain)


class TestChoice:
    @pytest.mark.parametrize("variant", [*FAMILIES, "opt-350m"])
    def test_is_what_the_files_will_hold(self, variant: str) -> None:
        model = tiny_models.build(variant, dtype=torch.bfloat16 if variant == "opt" else torch.float32)
        spec = SPECS[model.config.model_type]
        choice = choose(model, 3.4, options=OPTIONS, windows=windows(4, 32))
        section = with_choice(section_of(), choice.options)
        chosen = choose_settings(model, spec, section)
        assert {name: (how.bits, how.group_size) for name, how in chosen.items()} == choice.options
        assert list(chosen) == list(choice.options)

        weights = sum(model.get_parameter(f"{name}.weight").numel() for name in chosen)
        quantize_model(model, section, windows(4, 32))
        stored = 0
        for name in chosen:
            tensors = model.get_submodule(name).state_dict()
            stored += sum(tensor.nbytes for key, tensor in tensors.items() if key != "bias")
        assert choice.bytes == stored
        assert choice.average_bits == 8 * stored / weights
        assert LEAST_USED * 3.4 < choice.average_bits <= 3.4

    def test_fused_linears_share_one_option(self) -> None:
        options = choose(tiny_models.build("opt"), 3.3).options
        for block in range(2):
            parts = {options[f"model.decoder.layers.{block}.self_attn.{part}_proj"] for part in "qkv"}
            assert len(parts) == 1
        assert len(set(options.values())) > 1

    def test_the_model_is_left_as_it_was_and_the_choice_is_the_same_again(self) -> None:
        model = tiny_models.build("opt").train()
        model.model.decoder.layers[0].fc1.eval()
        model.requires_grad_(False)
        model.lm_head.weight.requires_grad = True
        before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
        training = [module.training for module in model.modules()]
        first = choose(model, 3.4)
        assert choose(model, 3.4) == first
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == training
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
            "model.decoder.embed_tokens.weight"  # the tied head
        ]
        for module in model.modules():
            assert "forward" not in vars(module)
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_overrides_and_skip_hold(self) -> None:
        section = section_of(
            overrides={"*.0.fc1": {"bits": 8}, "*.k_proj": {"group_size": 32}, "*.1.fc2": {"skip": True}},
            skip=["*.0.fc2"],
        )
        options = choose(tiny_models.build("opt"), 4.4, section).options
        assert options["model.decoder.layers.0.fc1"][0] == 8
        assert {options[f"model.decoder.layers.{block}.self_attn.k_proj"][1] for block in range(2)} == {32}
        assert not {"model.decoder.layers.1.fc2", "model.decoder.layers.0.fc2"} & options.keys()

    def test_more_bytes_lose_less(self) -> None:
        model = tiny_models.build("neox-parallel-rotary-0.25")
        ids = windows(4, 32)
        lost = [choose(model, bits, windows=ids).facts["predicted_kl"] for bits in (2.6, 3.5, 4.0, 9.0)]
        assert lost == sorted(lost, reverse=True)
        # With room for all, each linear takes what is best for it: the most bits.
        assert set(choose(model, 9.0, windows=ids).options.values()) == {(4, 128)}

    def test_progress_is_told(self) -> None:
        told: list[tuple[str, int, int]] = []
        choose(tiny_models.build("opt"), 3.4, progress=lambda *step: told.append(step))
        assert told == [*(("gradients", index, 4) for index in range(4)), ("sensitivity", 0, 2), ("sensitivity", 1, 2)]

    def test_one_window_is_enough(self) -> None:
        assert choose(tiny_models.build("opt"), 3.4, windows=windows(1)).average_bits <= 3.4

    def test_first_tokens_that_are_ignored_cost_nothing(self) -> None:
        ids = windows(4, 32)
        with_all, without = (
            choose(tiny_models.build("opt"), 3.4, section_of(ignore_first=ignored), windows=ids).facts
            for ignored in (False, True)
        )
        # Half of the windows are kept aside, and all of their tokens are looked at.
        assert (with_all["tokens"], without["tokens"]) == (2 * 32, 2 * 31)
        assert with_all["predicted_kl"] != without["predicted_kl"]


class TestRefuses:
    def test_a_model_in_float16(self) -> None:
        with pytest.raises(
            UsageError, match="found float16, in which gradients are lost or overflow; load it in bfloat16"
        ):
            choose(tiny_models.build("opt").half(), 3.4)

    def test_a_budget_that_is_too_small(self) -> None:
        with pytest.raises(
            UsageError,
            match=r"found 2\.000 stored bits per weight; allowed: at least 2\.\d+",
        ):
            choose(tiny_models.build("opt"), 2.0)

    def test_a_linear_that_no_option_fits(self) -> None:
        model = tiny_models.build("opt-350m")
        model.model.decoder.layers[0].fc2 = torch.nn.Linear(192, 128)
        spec = SPECS["opt"]
        assert layers_of(model, spec, section_of(), ((4, 128), (4, 64)))
        with pytest.raises(UsageError, match=r"128 does not divide the 192 inputs of model\.decoder\.layers\.0\.fc2"):
            layers_of(model, spec, section_of(), ((4, 128), (3, 128)))

    def test_a_glob_that_matches_nothing(self) -> None:
        with pytest.raises(UsageError, match=r"'\*\.fc3' matches none of the model's linears"):
            choose(tiny_models.build("opt"), 3.4, section_of(overrides={"*.fc3": {"bits": 8}}))


class TestBudget:
    @staticmethod
    def stored(model: Any) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def test_average_bits_are_of_what_is_quantized(self) -> None:
        model = tiny_models.build("opt")
        section = section_of(average_bits=3.5, skip=["*.fc2", "*self_attn*"])
        layers, budget = budget_of(model, SPECS["opt"], section, torch.float16, self.stored(model))
        assert names_in(layers) == ["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"]
        assert budget == 2 * 128 * 256 * 3.5 // 8

    def test_what_no_file_holds_takes_no_room(self) -> None:
        model = tiny_models.build("neox-parallel-rotary-0.25")
        section = section_of(target_size=10**7)
        names = self.stored(model)
        _, plain = budget_of(model, SPECS["gpt_neox"], section, torch.float16, names)
        names.remove("lm_head.weight")
        _, tied = budget_of(model, SPECS["gpt_neox"], section, torch.float16, names)
        head = model.lm_head.weight.numel() * 2 + len("lm_head.weight") + sensitivity.HEADER_BYTES
        assert tied == plain + head

    def test_refuses_a_target_that_the_smallest_files_exceed(self) -> None:
        model = tiny_models.build("opt")
        message = r"quantize\.target_size: found '9kB'; allowed: at least \d{6} bytes, \d+ of them for what is not"
        with pytest.raises(UsageError, match=message):
            budget_of(model, SPECS["opt"], section_of(target_size="9kB"), torch.float16, self.stored(model))

    def test_refuses_fewer_bits_than_there_are(self) -> None:
        model = tiny_models.build("opt")
        message = r"quantize\.average_bits: found 2\.050 stored bits per weight; allowed: at least 2\.\d+"
        with pytest.raises(UsageError, match=message):
            budget_of(model, SPECS["opt"], section_of(average_bits=2.05), torch.float16, self.stored(model))

    def test_nothing_to_quantize(self) -> None:
        model = tiny_models.build("opt")
        with pytest.raises(UsageError, match="every linear is left out"):
            budget_of(model, SPECS["opt"], section_of(average_bits=3.0, skip=["*"]), torch.float16, self.stored(model))
