"""Folding: every variant computes the same afterwards, the right rows are scaled, and int8 forgets about outliers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qlm.arch import FAMILIES
from qlm.blocks import stages_of
from qlm.kernels.ops import int8_linear_reference, int8_row_sum
from qlm.load import block_paths
from qlm.numerics.affine import quantize_weight_per_channel_absmax
from qlm.smoothing import SAMPLE_TOKENS, fold_block, fold_parameters, folds_of, sampled_inputs, source_rows
from tests import tiny_models

# Of float32 logits with a standard deviation of about 1 after two blocks.
LOGIT_TOLERANCE = 1e-4
# Of a change by 1 of values of about that size, averaged in float32.
CHANGE_TOLERANCE = 1e-5
# What smooths each variant: all its family's folds, but those of norms that make the residual too.
POST_NORM = ("opt-post-norm", "opt-350m")


def uneven(variant: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The variant with features of very different sizes and means, so that every fold has something to do."""
    model = tiny_models.build(variant, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            size = torch.exp(1.2 * torch.randn(parameter.shape[:1], generator=generator)).to(dtype)
            if "norm" in name or ".ln_" in name:
                parameter.mul_(size)
            elif any(part in name for part in ("v_proj", "fc1", "query_key_value", "c_attn", "c_fc", "dense_h_to_4h")):
                parameter.mul_(0.3 * (size if parameter.ndim == 1 else size[:, None]))
    return model


def linears(model: nn.Module) -> list[str]:
    spec = FAMILIES[model.config.model_type]
    return [linear for stage in stages_of(spec, model.config) for group in stage for linear in group.linears]


def expected_folds(variant: str) -> list[str]:
    spec = FAMILIES[tiny_models.VARIANTS[variant]().config.model_type]
    return [fold.source for fold in spec.folds if variant not in POST_NORM or fold.through != "norm"]


def gather(model: nn.Module, block: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    spec = FAMILIES[model.config.model_type]
    with sampled_inputs(block, folds_of(spec, model.config, linears(model)), ids.numel()) as found, torch.no_grad():
        model(ids)
    return found


def fold_all(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[dict]:
    spec, ids = FAMILIES[model.config.model_type], tiny_models.token_ids(4, 48)
    facts = []
    for path in block_paths(spec, model):
        block = model.get_submodule(path)
        inputs = gather(model, block, ids)
        facts.append(fold_block(block, spec, model.config, inputs, linears(model), dtype=dtype))
    return facts


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_logits_stay(variant: str) -> None:
    model, ids = uneven(variant), tiny_models.token_ids()
    before_parameters = copy.deepcopy(dict(model.named_parameters()))
    with torch.no_grad():
        before = model(ids).logits
        facts = fold_all(model)
        after = model(ids).logits
    assert (after - before).abs().max() <= LOGIT_TOLERANCE * max(1.0, before.std().item())
    for block in facts:
        assert list(block) == expected_folds(variant)
        # Each fold did something, so that what stays is no accident.
        assert all(fact["strength"] > 0 or fact["shift"] for fact in block.values())
        assert any(fact["strength"] > 0 for fact in block.values())
    # What lies outside the blocks belongs to nobody here.
    spec = FAMILIES[model.config.model_type]
    inside = tuple(f"{path}." for path in block_paths(spec, model))
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before_parameters[name])]
    assert all(name.startswith(inside) for name in changed)


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_value_rows_reach_the_features_that_are_said(variant: str) -> None:
    """A constant added to one row's bias comes out of the attention as it went in, at the features that read this row."""
    model, ids = tiny_models.build(variant), tiny_models.token_ids(1, 7)
    spec = FAMILIES[model.config.model_type]
    block = model.get_submodule(block_paths(spec, model)[0])
    (fold,) = [fold for fold in spec.folds if fold.through == "attention"]
    source, reader = block.get_submodule(fold.source), block.get_submodule(fold.linears[0])
    rows = source_rows(fold, spec, model.config, reader.in_features)
    found: list[Tensor] = []
    reader.register_forward_pre_hook(lambda module, args: found.append(args[0][0]))
    with torch.no_grad():
        model(ids)
        for row in range(0, source.out_features, 5):
            source.bias[row] += 1
            model(ids)
            source.bias[row] -= 1
            change = found.pop() - found[0]  # [T, I]
            risen = ((change - 1).abs() < CHANGE_TOLERANCE).all(0)
            assert torch.equal(risen, rows == row), row
            if row in rows:
                assert (change[:, rows != row].abs() < CHANGE_TOLERANCE).all(), row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_norms_and_source_biases_are_exact_in_what_is_stored(variant: str, dtype: torch.dtype) -> None:
    model, ids = uneven(variant).to(dtype).to(torch.float32), tiny_models.token_ids()
    with torch.no_grad():
        before = model(ids).logits
        fold_all(model, dtype)
        after = model(ids).logits
    assert (after - before).abs().max() <= LOGIT_TOLERANCE * max(1.0, before.std().item())
    spec = FAMILIES[model.config.model_type]
    for path in block_paths(spec, model):
        for fold in spec.folds:
            source = model.get_submodule(f"{path}.{fold.source}")
            exact = [source.weight, source.bias] if fold.through == "norm" else [source.bias]
            for parameter in exact:
                same = parameter.to(dtype).float() == parameter
                # Query and key rows, and fc1 where its own norm's shift has moved the bias before, are not this fold's.
                rows = source_rows(
                    fold, spec, model.config, model.get_submodule(f"{path}.{fold.linears[0]}").in_features
                )
                assert same[rows].float().mean() > 0.99, (fold.source, same[rows].float().mean())


@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_outliers_that_a_fold_can_undo_cost_int8_nothing(variant: str) -> None:
    """A model with outliers made by folding the wrong way computes what it did, and so does its int8 once it is folded back."""
    plain, ids = tiny_models.build(variant), tiny_models.token_ids(4, 48)
    spec = FAMILIES[plain.config.model_type]
    spoilt = copy.deepcopy(plain)
    for path in block_paths(spec, spoilt):
        for fold in spec.folds:
            if fold.through == "norm":
                norm, feature = spoilt.get_submodule(f"{path}.{fold.source}"), slice(3, 128, 50)
                with torch.no_grad():
                    norm.weight[feature] *= 60
                    norm.bias[feature] *= 60
                    for linear in fold.linears:
                        spoilt.get_submodule(f"{path}.{linear}").weight[:, feature] /= 60
    smoothed = copy.deepcopy(spoilt)
    fold_all(smoothed)
    with torch.no_grad():
        logits = plain(ids).logits
        error = {
            name: (as_int8(model)(ids).logits - logits).std().item()
            for name, model in {"plain": plain, "spoilt": spoilt, "smoothed": smoothed}.items()
        }
    assert error["spoilt"] > 3 * error["plain"]
    assert error["smoothed"] < 1.2 * error["plain"]


class Int8(nn.Module):
    """The op on a linear's plainly rounded weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.codes, self.scale = quantize_weight_per_channel_absmax(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear_reference(x, self.codes, self.scale, int8_row_sum(self.codes), self.bias, False)


def as_int8(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for path in block_paths(FAMILIES[model.config.model_type], model):
        for linear in linears(model):
            owner, _, leaf = f"{path}.{linear}".rpartition(".")
            setattr(model.get_submodule(owner), leaf, Int8(model.get_submodule(f"{path}.{linear}")))
    return model


class TestFoldsOf:
    def test_only_where_the_activation_is_relu(self) -> None:
        for activation, expected in (("relu", True), ("gelu", False)):
            config = tiny_models.opt(activation_function=activation).config
            spec = FAMILIES["opt"]
            quantized = [linear for stage in spec.stages for group in stage for linear in group.linears]
            assert ("fc1" in [fold.source for fold in folds_of(spec, config, quantized)]) == expected

    def test_norms_without_parameters_take_nothing(self) -> None:
        model = tiny_models.opt(layer_norm_elementwise_affine=False)
        found = folds_of(FAMILIES["opt"], model.config, linears(model))
        assert [fold.source for fold in found] == ["self_attn.v_proj", "fc1"]

    def test_linears_that_stay_float_are_not_touched(self) -> None:
        model = tiny_models.opt()
        without = [linear for linear in linears(model) if linear != "fc1"]
        assert [fold.source for fold in folds_of(FAMILIES["opt"], model.config, without)] == [
            "self_attn_layer_norm", "self_attn.v_proj",
        ]  # fmt: skip
        assert folds_of(FAMILIES["opt"], model.config, ()) == ()

    def test_linears_whose_inputs_are_not_rounded_keep_their_weights(self) -> None:
        """What such a linear reads is left alone; what is made of its output is not."""
        model, spec = tiny_models.opt(), FAMILIES["opt"]
        kept = folds_of(spec, model.config, linears(model), ["fc2", "self_attn.v_proj"])
        assert [fold.source for fold in kept] == ["self_attn.v_proj", "final_layer_norm"]
        block = model.get_submodule("model.decoder.layers.0")
        inputs = gather(model, block, tiny_models.token_ids(4, 48))
        folded = fold_parameters(dict(block.named_parameters()), spec, model.config, inputs, linears(model), ["fc2"])
        assert "fc2.weight" not in folded.parameters
        assert "fc1" not in folded.facts

    @pytest.mark.parametrize("variant", tiny_models.VARIANTS)
    def test_every_fold_names_all_that_reads_its_source(self, variant: str) -> None:
        """Whatever a source makes must reach the named linears and nothing else: zero them, and the source does not matter."""
        model, ids = tiny_models.build(variant), tiny_models.token_ids(1, 7)
        spec = FAMILIES[model.config.model_type]
        path = block_paths(spec, model)[0]
        for fold in folds_of(spec, model.config, linears(model)):
            other = copy.deepcopy(model)
            with torch.no_grad():
                for linear in fold.linears:
                    other.get_submodule(f"{path}.{linear}").weight.zero_()
                before = other(ids).logits
                other.get_submodule(f"{path}.{fold.source}").weight.mul_(3)
                after = other(ids).logits
            assert torch.equal(before, after), fold.source


class TestWithoutBiases:
    @pytest.mark.parametrize(
        "model",
        [lambda: tiny_models.opt(enable_bias=False), lambda: tiny_models.gpt_neox(attention_bias=False)],
        ids=["opt", "neox"],
    )
    def test_there_is_no_shift_and_logits_stay(self, model) -> None:
        torch.manual_seed(0)
        model, ids = model().eval(), tiny_models.token_ids()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            before = model(ids).logits
            facts = fold_all(model)
            after = model(ids).logits
        assert (after - before).abs().max() <= LOGIT_TOLERANCE * max(1.0, before.std().item())
        without = ("self_attn_layer_norm", "self_attn.v_proj", "input_layernorm", "attention.query_key_value")
        assert all(not fact["shift"] for block in facts for source, fact in block.items() if source in without)


class TestSampledInputs:
    def test_is_a_sample_over_all_passes(self) -> None:
        model = tiny_models.build("opt")
        block, ids = model.get_submodule("model.decoder.layers.1"), tiny_models.token_ids(80, 64)
        folds = folds_of(FAMILIES["opt"], model.config, linears(model))
        everything: list[Tensor] = []
        block.fc2.register_forward_pre_hook(lambda module, args: everything.append(args[0].reshape(-1, 256)))
        with sampled_inputs(block, folds, ids.numel()) as found, torch.no_grad():
            for batch in ids.split(7):  # of sizes that the step does not divide
                model(batch)
        every = len(torch.cat(everything)) // SAMPLE_TOKENS
        assert every == 5
        assert torch.equal(found["fc2"], torch.cat(everything)[::every])
        assert set(found) == {fold.linears[0] for fold in folds}
        assert not block.fc1._forward_pre_hooks

    def test_hooks_are_gone_after_an_error(self) -> None:
        model = tiny_models.build("opt")
        block = model.get_submodule("model.decoder.layers.0")
        folds = folds_of(FAMILIES["opt"], model.config, linears(model))
        with pytest.raises(KeyError), sampled_inputs(block, folds, 100):
            raise KeyError
        assert not block.fc1._forward_pre_hooks


class TestFoldParameters:
    def test_leaves_what_it_is_given_alone(self) -> None:
        model = uneven("opt")
        block = model.get_submodule("model.decoder.layers.0")
        inputs = gather(model, block, tiny_models.token_ids(4, 48))
        parameters = dict(block.named_parameters())
        before = copy.deepcopy(parameters)
        with torch.no_grad():
            folded = fold_parameters(parameters, FAMILIES["opt"], model.config, inputs, linears(model))
        assert all(torch.equal(parameters[name], before[name]) for name in before)
        assert folded.parameters.keys() <= before.keys()
        assert all(value.dtype == torch.float32 for value in folded.parameters.values())
        assert all(0 < fact["error_ratio"] <= 1 for fact in folded.facts.values())

    def test_names_the_layer_of_an_input_that_is_not_finite(self) -> None:
        model = uneven("opt")
        block = model.get_submodule("model.decoder.layers.0")
        inputs = gather(model, block, tiny_models.token_ids(4, 48))
        inputs["fc2"][3, 4] = float("nan")
        with pytest.raises(
            ValueError, match=r"fc2: 1 of its 256 input features are NaN or infinite .* the first feature 4"
        ):
            fold_block(block, FAMILIES["opt"], model.config, inputs, linears(model))
