"""The inputs of one block after another, and the statistics of what its linears read."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlm import stream as stream_module
from qlm.arch import FAMILIES as SPECS
from qlm.arch import FamilySpec, LinearGroup
from qlm.blocks import stages_of
from qlm.errors import DataError
from qlm.load import block_paths
from qlm.stream import Stream
from tests import tiny_models
from tests.conftest import FAMILIES

# Sums in float32 against float64, relative to the largest element.
HESSIAN_TOLERANCE = 1e-5


def parts(variant: str) -> tuple[Any, FamilySpec, list[str], torch.Tensor]:
    """model, spec, its blocks, windows that make more than one batch"""
    model = tiny_models.build(variant)
    spec = SPECS[model.config.model_type]
    return model, spec, block_paths(spec, model), tiny_models.token_ids(5, 40)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows a batch, so that there is a last batch that is not full."""
    monkeypatch.setattr(stream_module, "BATCH_TOKENS", 80)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def block_inputs(model: Any, blocks: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Input of each block, and the output of the last under "end", from one plain forward pass."""
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: seen.update({path: args[0], "end": output})

    hooks = [model.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True) for path in blocks]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def float64_hessians(model: Any, linears: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen.update({path: args[0].reshape(-1, args[0].shape[-1]).double()})
        )
        for path in linears
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {path: x.T @ x / len(x) for path, x in seen.items()}


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
class TestStream:
    def test_hidden_states(self, variant: str) -> None:
        model, spec, blocks, ids = parts(variant)
        expected = block_inputs(model, blocks, ids)
        stream = Stream(model, spec, blocks[0], ids)
        for path in blocks:
            torch.testing.assert_close(stream.hidden, expected[path], atol=2e-5, rtol=1e-5)
            stream.advance(model.get_submodule(path))
        torch.testing.assert_close(stream.hidden, expected["end"], atol=2e-5, rtol=1e-5)

    def test_hessians(self, variant: str) -> None:
        """Also with the shortcut that does not compute the attention again once it is final."""
        model, spec, blocks, ids = parts(variant)
        stages = stages_of(spec, model.config)
        inside = [linear for stage in stages for group in stage for linear in group.linears]
        expected = float64_hessians(model, [f"{path}.{linear}" for path in blocks for linear in inside], ids)
        stream = Stream(model, spec, blocks[0], ids)
        for path in blocks:
            block = model.get_submodule(path)
            calls: list[int] = []
            counter = block.get_submodule(spec.attention).register_forward_hook(lambda *a, calls=calls: calls.append(1))
            seen: set[str] = set()
            for stage in stages:
                for group, statistics in stream.statistics(block, stage, path).items():
                    assert statistics.tokens == ids.numel()
                    assert statistics.hessian.dtype == torch.float32
                    for linear in group.linears:
                        wanted = expected[f"{path}.{linear}"]
                        difference = (statistics.hessian - wanted).abs().max() / wanted.abs().max()
                        assert difference < HESSIAN_TOLERANCE, linear
                        seen.add(linear)
            assert seen == set(inside)
            stream.advance(block)
            counter.remove()
            assert "forward" not in vars(block.get_submodule(spec.attention))
        torch.testing.assert_close(stream.hidden, block_inputs(model, blocks, ids)["end"], atol=2e-5, rtol=1e-5)

    def test_the_shortcut_follows_the_quantized_linear(self, variant: str) -> None:
        """Once the attention's last linear has changed, what follows must see the changed one."""
        model, spec, blocks, ids = parts(variant)
        block, path = model.get_submodule(blocks[0]), blocks[0]
        stream = Stream(model, spec, path, ids)
        for stage in stages_of(spec, model.config):
            measured = stream.statistics(block, stage, path)
            expected = float64_hessians(model, [f"{path}.{g.linears[0]}" for g in stage], ids)
            for group, statistics in measured.items():
                wanted = expected[f"{path}.{group.linears[0]}"]
                difference = (statistics.hessian - wanted).abs().max() / wanted.abs().max()
                assert difference < HESSIAN_TOLERANCE, group.linears
            for group in stage:
                for linear in group.linears:
                    block.get_submodule(linear).weight.mul_(0.9)
        stream.advance(block)
        torch.testing.assert_close(
            stream.hidden, block_inputs(model, blocks, ids)[blocks[1]], atol=2e-5, rtol=1e-5
        )  # fmt: skip

    def test_skipped_stages(self, variant: str) -> None:
        """A recipe may leave out the attention's last linear: its inputs are then never kept."""
        model, spec, blocks, ids = parts(variant)
        stream = Stream(model, spec, blocks[0], ids)
        block = model.get_submodule(blocks[0])
        groups = [group for stage in stages_of(spec, model.config) for group in stage]
        last: LinearGroup = groups[-1]
        expected = float64_hessians(model, [f"{blocks[0]}.{last.linears[0]}"], ids)
        (statistics,) = stream.statistics(block, [last], blocks[0]).values()
        wanted = expected[f"{blocks[0]}.{last.linears[0]}"]
        assert (statistics.hessian - wanted).abs().max() / wanted.abs().max() < HESSIAN_TOLERANCE
        stream.advance(block)
        torch.testing.assert_close(
            stream.hidden, block_inputs(model, blocks, ids)[blocks[1]], atol=2e-5, rtol=1e-5
        )  # fmt: skip


def inputs_of(model: Any, linears: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each linear reads: float64 [samples, length, I], from one plain forward pass."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen.update({path: args[0].reshape(*ids.shape, -1).double()})
        )
        for path in linears
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def sums_of(model: Any, spec: FamilySpec, path: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The residual stream after the output of each linear that is added to it: float64 [samples, length, E], read off the modules
    around the sums."""
    block = model.get_submodule(path)
    seen: dict[str, torch.Tensor] = {}
    post_norm = spec.model_type == "opt" and not model.config.do_layer_norm_before
    parallel = spec.model_type == "gpt_neox" and model.config.use_parallel_residual
    before_mlp = {"opt": "final_layer_norm", "gpt_neox": "post_attention_layernorm", "gpt_bigcode": "ln_2"}[
        spec.model_type
    ]

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, *rest: seen.update(
            {name: (rest[0] if rest else args[0]).reshape(*ids.shape, -1).double()}
        )

    hooks = [
        block.register_forward_pre_hook(keep("input")),
        block.register_forward_hook(keep("output")),
        block.get_submodule(spec.attention_out).register_forward_hook(keep("attended")),
        block.get_submodule("self_attn_layer_norm" if post_norm else before_mlp).register_forward_pre_hook(
            keep("middle")
        ),
    ]
    if post_norm:
        hooks.append(block.get_submodule("final_layer_norm").register_forward_pre_hook(keep("output before the norm")))
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        spec.attention_out: seen["input"] + seen["attended"] if parallel else seen["middle"],
        spec.mlp_out: seen["output before the norm"] if post_norm else seen["output"],
    }


@pytest.mark.parametrize("about_mean", [False, True], ids=["about zero", "about the mean"])
@pytest.mark.parametrize("ignore_first", [False, True], ids=["all tokens", "without the first"])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_two_streams(variant: str, ignore_first: bool, about_mean: bool) -> None:
    """Products of the quantized model's inputs with the float one's, or with what its sums lack, their means, and the same of samples
    kept aside."""
    model, spec, blocks, ids = parts(variant)
    float_model = copy.deepcopy(model)
    stream = Stream(
        model, spec, blocks[0], ids, reference=True, held_out=True, ignore_first=ignore_first, about_mean=about_mean
    )  # fmt: skip
    assert stream.held_out == 1
    seen = set()
    for path in blocks:
        block, float_block = model.get_submodule(path), float_model.get_submodule(path)
        for stage in stages_of(spec, model.config):
            names = [f"{path}.{group.linears[0]}" for group in stage]
            x, target = inputs_of(model, names, ids), inputs_of(float_model, names, ids)
            sums, float_sums = sums_of(model, spec, path, ids), sums_of(float_model, spec, path, ids)
            for group, found in stream.statistics(block, stage, path, float_block).items():
                linear = group.linears[0]
                name = f"{path}.{linear}"
                assert found.held_out is not None
                for statistics, rows in ((found, slice(0, 4)), (found.held_out, slice(4, 5))):
                    a = x[name][rows, int(ignore_first) :].flatten(0, 1)
                    b = target[name][rows, int(ignore_first) :].flatten(0, 1)
                    about = a.mean(0) if about_mean else torch.zeros_like(a[0])
                    assert statistics.tokens == len(a)
                    pairs = [
                        (statistics.hessian, (a - about).T @ (a - about) / len(a), a, a),
                        (statistics.mean, a.mean(0), a, a[:, :1] ** 0),
                    ]
                    if linear in sums:
                        lag = (float_sums[linear] - sums[linear])[rows, int(ignore_first) :].flatten(0, 1)
                        pairs += [
                            (statistics.lag, lag.T @ (a - about) / len(a), float_sums[linear], a),
                            (statistics.mean_lag, lag.mean(0), float_sums[linear], a[:, :1] ** 0),
                        ]
                        assert statistics.cross is None
                        assert statistics.target_mean is None
                        seen.add(linear)
                    else:
                        centered = b - b.mean(0) if about_mean else b
                        pairs += [
                            (statistics.cross, centered.T @ (a - about) / len(a), a, b),
                            (statistics.target_mean, b.mean(0), b, a[:, :1] ** 0),
                        ]
                        assert statistics.lag is None
                        assert statistics.mean_lag is None
                    for got, wanted, *factors in pairs:
                        assert got is not None
                        # Terms of either sign cancel: the scale is that of the factors, not of the mean of their products.
                        scale = max(float(wanted.abs().max()), *(float(f.abs().mean()) for f in factors), 1e-2)
                        assert float((got - wanted).abs().max()) / scale < HESSIAN_TOLERANCE, name
            for group in stage:
                for linear in group.linears:
                    block.get_submodule(linear).weight.mul_(0.9)
        stream.advance_reference(float_block)
        stream.advance(block)
    assert seen == {spec.attention_out, spec.mlp_out}
    assert stream.reference is not None
    torch.testing.assert_close(
        stream.reference, block_inputs(float_model, blocks, ids)["end"], atol=2e-5, rtol=1e-5
    )  # fmt: skip
    torch.testing.assert_close(stream.hidden, block_inputs(model, blocks, ids)["end"], atol=2e-5, rtol=1e-5)


def test_variances_of_features_with_large_means() -> None:
    """A mean 1e4 times the deviation: squares about zero would leave nothing of the variance in fp32."""
    model, spec, blocks, ids = parts("opt")
    stage = stages_of(spec, model.config)[0]
    norm = model.get_submodule(f"{blocks[0]}.{stage[0].norm}")
    norm.bias[3] += 1e4
    norm.weight[3] = 1.0
    stream = Stream(model, spec, blocks[0], ids, about_mean=True)
    (found,) = stream.statistics(model.get_submodule(blocks[0]), stage, blocks[0]).values()
    name = f"{blocks[0]}.{stage[0].linears[0]}"
    x = inputs_of(model, [name], ids)[name].flatten(0, 1)
    wanted = x.T.cov(correction=0)
    assert wanted[3, 3] > 0.1
    assert abs(float(found.hessian[3, 3] / wanted[3, 3]) - 1) < 1e-3


@pytest.mark.parametrize("variant", FAMILIES)
def test_activations_that_are_not_finite(variant: str) -> None:
    model, spec, blocks, ids = parts(variant)
    stages = stages_of(spec, model.config)
    first = stages[0][0]
    stream = Stream(model, spec, blocks[0], ids)
    stream.hidden[1, 3, 5] = float("inf")
    with pytest.raises(DataError, match=rf"{blocks[0]}\.{first.linears[0]}: .*NaN or infinite on the calibration text"):
        stream.statistics(model.get_submodule(blocks[0]), stages[0], blocks[0])
