"""One block: which of its linears are quantized how, and quantizing them stage by stage.

Nothing here knows where weights come from or where results go; `quantize` (folders) and `quantize_model` (memory) do.
"""

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlm.arch import FamilySpec, LinearGroup
from qlm.arch.parts import fused_parts
from qlm.backends import BACKENDS, Backend, QuantizedLinear, Statistics
from qlm.backends.base import refuse_not_finite, with_parts
from qlm.backends.gptq import GptqBackend
from qlm.errors import DataError, UsageError
from qlm.formats.layout import in_block
from qlm.load import linear_paths
from qlm.recipe import LinearSettings, QuantizeRecipe, settings_for, unmatched_globs
from qlm.smoothing import fold_parameters, folds_of, sampled_inputs
from qlm.stream import Stream
from qlm.tune import BlockLoss, learn_rounding, tune_floats


def stages_of(spec: FamilySpec, config: Any) -> tuple[tuple[LinearGroup, ...], ...]:
    """The stages of a block, for this config: parallel residual or not."""
    parallel = spec.parallel_stages is not None and bool(getattr(config, spec.parallel_if or ""))
    return spec.parallel_stages if parallel and spec.parallel_stages is not None else spec.stages


def choose_settings(model: nn.Module, spec: FamilySpec, section: QuantizeRecipe) -> dict[str, LinearSettings]:
    """Path of each linear that will be quantized to its settings, in the order of the model.

    Raises:
        UsageError: a glob that matches nothing, a shape that the settings cannot hold, or nothing left to quantize.
    """
    backend = BACKENDS[section.backend]
    linears = [name for name in linear_paths(model) if in_block(name)]
    for glob in unmatched_globs(section, linears):
        raise UsageError(f"quantize: {glob!r} matches none of the model's linears, such as {linears[0]!r}")
    chosen = {}
    for name in linears:
        settings = settings_for(section, name)
        if settings is not None:
            linear = cast(nn.Linear, model.get_submodule(name))
            backend.check(name, (linear.out_features, linear.in_features), settings)
            chosen[name] = settings
    if not chosen:
        raise UsageError("quantize.skip: every linear is left out; there is nothing to quantize")
    for glob in section.input_16bit:
        if not any(fnmatch.fnmatchcase(name, glob) for name in chosen):
            raise UsageError(f"quantize.input_16bit: {glob!r} matches only linears that skip leaves out; remove it")
    return chosen


@dataclass(frozen=True)
class QuantizedBlock:
    """What becomes of a block.

    Attributes:
        linears: full name of each quantized linear to its tensors, in the order of the stages.
        floats: full name of each bias or norm that has changed to its new value, in the dtype that is stored.
        facts: of what was done to the block as a whole.
    """

    linears: dict[str, QuantizedLinear]
    floats: dict[str, Tensor]
    facts: dict[str, Any]


def quantize_block(
    block: nn.Module,
    path: str,
    spec: FamilySpec,
    config: Any,
    chosen: Mapping[str, LinearSettings],
    read: Callable[[str], Tensor],
    stream: Stream | None,
    dtype: torch.dtype,
) -> QuantizedBlock:
    """Quantize the linears of one block, stage by stage, so that each sees what the quantized ones before it produce.

    Args:
        block: with a stream, its weights are replaced by their dequantized selves, its biases and norms by their new values.
        spec, config: of the model.
        read: the full name of a parameter to its value as the checkpoint holds it.
        stream: the block's inputs, of which the reference, if there is one, moves on; None where nothing is calibrated.
        dtype: of what stays in floating point.
    """
    work = _Work(block, path, spec, config, chosen, read, stream, dtype)
    work.fold()
    work.quantize()
    work.tune()
    work.advance_reference()
    return QuantizedBlock(work.linears, work.floats, work.facts)


class _Work:
    """`quantize_block`, step by step; what is done so far is in `linears`, `floats` and `facts`."""

    def __init__(
        self,
        block: nn.Module,
        path: str,
        spec: FamilySpec,
        config: Any,
        chosen: Mapping[str, LinearSettings],
        read: Callable[[str], Tensor],
        stream: Stream | None,
        dtype: torch.dtype,
    ) -> None:
        self.block, self.path, self.spec, self.config = block, path, spec, config
        self.read_stored, self.stream, self.dtype = read, stream, dtype
        self.chosen = {name: settings for name, settings in chosen.items() if name.startswith(f"{path}.")}
        self.linears: dict[str, QuantizedLinear] = {}
        self.floats: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}
        self.folded: dict[str, Tensor] = {}
        # Linears whose rounding has been learned, or is left to the solver.
        self.learned: set[str] = set()
        self.targets: Tensor | None = None
        follows_float = stream is not None and stream.reference is not None
        # What moves the float model's stream on, as it does when a finished block is read back.
        self.untouched = self.float_block = copy.deepcopy(block) if follows_float else None

    def read(self, name: str) -> Tensor:
        """A parameter as it is now, in the dtype that it is stored in, by its full name."""
        for changed in (self.floats, self.folded):
            if name in changed:
                return changed[name]
        return self.read_stored(name)

    def inner(self, name: str) -> str:
        return name.removeprefix(f"{self.path}.")

    def change(self, name: str, value: Tensor) -> None:
        """Let a bias or a norm be `value`, in the file and in the block."""
        self.floats[name] = value.to(self.dtype)
        refuse_not_finite(
            name, self.floats[name], f"what quantizing makes of it does not fit into {self.dtype}; choose another dtype"
        )
        set_float(self.block, self.inner(name), self.floats[name])

    def add_to_bias(self, name: str, shift: Tensor | None) -> None:
        """shift: fp32 [O], of the linear `name`."""
        if shift is not None and self.block.get_submodule(self.inner(name)).bias is not None:
            bias = self.read(f"{name}.bias")
            self.change(f"{name}.bias", bias.float() + shift.to(bias.device))

    def fold(self) -> None:
        """Move outliers of the activations into the weights, where that is wanted."""
        if self.stream is None or not any(settings.smooth for settings in self.chosen.values()):
            return
        quantized = {self.inner(name) for name, settings in self.chosen.items() if settings.smooth}
        not_rounded = {self.inner(name) for name, settings in self.chosen.items() if settings.input_16bit}
        folds = folds_of(self.spec, self.config, quantized, not_rounded)
        with sampled_inputs(self.block, folds, self.stream.hidden.shape[:2].numel()) as inputs:
            self.stream.run(self.block)
        parameters = {name: self.read(f"{self.path}.{name}") for name, _ in self.block.named_parameters()}
        try:
            found = fold_parameters(
                parameters, self.spec, self.config, inputs, quantized, not_rounded, dtype=self.dtype
            )
        except ValueError as error:
            raise DataError(f"{self.path}.{error}") from None
        self.facts["smoothing"] = found.facts
        for inner, value in found.parameters.items():
            name = f"{self.path}.{inner}"
            if name.endswith(".weight") and name.removesuffix(".weight") in self.chosen:
                self.folded[name] = value
                set_float(self.block, inner, value)
            else:
                self.change(name, value)
        # The float model's inputs have to be scaled and shifted as these are.
        self.float_block = copy.deepcopy(self.block) if self.float_block is not None else None

    def quantize(self) -> None:
        """The linears, stage by stage."""
        for stage in stages_of(self.spec, self.config):
            groups = [group for group in stage if self.names(group)]
            added = [linear for group in groups for linear in group.linears if linear in self.spec.residual_linears]
            if added:
                self.learn_rounding()
                self.learned |= {f"{self.path}.{linear}" for linear in added}
            self.quantize_groups(groups)
        # Those that nothing comes after, because it stays as it is.
        self.learn_rounding()

    def quantize_groups(self, groups: Sequence[LinearGroup]) -> None:
        """The linears of one stage; what is known of their inputs is given back afterwards."""
        as_multiplied = {group: rounds for group in groups if (rounds := self.as_multiplied(group)) is not None}
        statistics: Mapping[LinearGroup, Statistics] = (
            self.stream.statistics(
                self.block, groups, self.path, self.float_block, as_multiplied, absmax=self.rounds_activations()
            )
            if self.stream and groups
            else {}
        )
        for group in groups:
            names = self.names(group)
            # Linears with the same settings go together: their rows are independent, and one pass serves them all.
            for settings in dict.fromkeys(self.chosen[name] for name in names):
                weights = {name: self.read(f"{name}.weight") for name in names if self.chosen[name] == settings}
                results = BACKENDS[settings.backend].quantize(weights, statistics.get(group), settings)
                for (name, weight), quantized in zip(weights.items(), results, strict=True):
                    parts = fused_parts(self.spec, self.config, self.inner(name), len(weight))
                    self.linears[name] = with_parts(quantized, parts)
                    if self.stream is not None:
                        self.use(name, weight.dtype)
                    self.add_to_bias(name, quantized.bias_shift)

    def as_multiplied(self, group: LinearGroup) -> Callable[[Tensor], Tensor] | None:
        """What all of a group's linears make of their input before they multiply it, if anything."""
        rounds = [_as_multiplied(self.chosen[name]) for name in self.names(group)]
        return rounds[0] if all(rounds) else None

    def rounds_activations(self) -> bool:
        """Whether it matters how large single activations are."""
        return any(BACKENDS[settings.backend].as_multiplied is not None for settings in self.chosen.values())

    def names(self, group: LinearGroup) -> list[str]:
        """The linears of a group that are quantized."""
        return [name for name in (f"{self.path}.{linear}" for linear in group.linears) if name in self.chosen]

    def use(self, name: str, dtype: torch.dtype) -> None:
        """Let the block compute with what has become of a linear whose weight is stored in `dtype`."""
        settings = self.chosen[name]
        use_dequantized(
            self.block, self.inner(name), self.linears[name].tensors, BACKENDS[settings.backend], settings, dtype
        )

    def steps(self, key: str) -> int:
        """How many steps of learning by gradient, `rounding_steps` or `tune_steps`, are wanted here."""
        wanted: int = max((getattr(settings, key) for settings in self.chosen.values()), default=0)
        if not wanted or self.stream is None or self.float_block is None:
            return 0
        if not self.stream.held_out:
            self.facts["learning"] = "none: a single sample of calibration text leaves none to choose by"
            return 0
        return wanted

    def loss(self) -> BlockLoss:
        """Of the block as it is now."""
        assert self.stream is not None
        assert self.float_block is not None
        if self.targets is None:
            self.targets = self.stream.targets(self.float_block)
        floats = {inner: self.read(f"{self.path}.{inner}") for inner, p in self.block.named_parameters() if p.ndim == 1}
        return BlockLoss(self.block, self.stream, self.targets, floats)

    def learn_rounding(self) -> None:
        """New codes of the linears that have been quantized and not been learned yet, by gradient.

        It comes before the linears whose output is added to the residual stream: those are solved for, and make up for what is left.
        """
        steps, backend = self.steps("rounding_steps"), BACKENDS["gptq"]
        names = [name for name in self.linears if name not in self.learned]
        if not steps or not names:
            return
        assert self.stream is not None
        assert isinstance(backend, GptqBackend)
        weights = {name: self.read(f"{name}.weight") for name in names}
        rounded = {name: backend.rounded(self.linears[name].tensors, self.chosen[name]) for name in names}
        codes, tuned = learn_rounding(
            self.loss(),
            {self.inner(name): weight for name, weight in weights.items()},
            {self.inner(name): how for name, how in rounded.items()},
            steps,
        )
        self.learned |= set(names)
        self.facts["rounding"] = [*self.facts.get("rounding", []), tuned.facts()]
        if tuned.step:
            for name in names:
                new = backend.with_codes(self.linears[name], codes[self.inner(name)], self.chosen[name])
                self.linears[name] = new
                self.use(name, weights[name].dtype)
            self.stream.forget_attention()

    def tune(self) -> None:
        """New norms and biases, by gradient; a linear that is left out keeps its bias."""
        steps = self.steps("tune_steps")
        if not steps:
            return
        left_out = {
            f"{inner}.bias"
            for inner, module in self.block.named_modules()
            if isinstance(module, nn.Linear) and f"{self.path}.{inner}" not in self.chosen
        }
        loss = self.loss()
        new, tuned = tune_floats(loss, self.dtype, steps, loss.floats.keys() - left_out)
        self.facts["tuning"] = tuned.facts()
        if tuned.step:
            for inner, value in new.items():
                self.change(f"{self.path}.{inner}", value)
            assert self.stream is not None
            self.stream.forget_attention()

    def advance_reference(self) -> None:
        if self.stream is not None and self.untouched is not None:
            self.stream.advance_reference(self.untouched, afresh=self.float_block is not self.untouched)


def set_float(block: nn.Module, name: str, value: Tensor) -> None:
    """Let a bias or a norm of the block be `value`, in the dtype that the block computes in."""
    with torch.no_grad():
        block.get_parameter(name).copy_(value)


def _as_multiplied(settings: LinearSettings) -> Callable[[Tensor], Tensor] | None:
    """What a linear makes of its input before it multiplies it, if anything."""
    return None if settings.input_16bit else BACKENDS[settings.backend].as_multiplied


def use_dequantized(
    block: nn.Module,
    linear: str,
    tensors: Mapping[str, Tensor],
    backend: Backend,
    settings: LinearSettings,
    dtype: torch.dtype,
) -> None:
    """Let a float linear compute as the quantized one will: with the weight that its tensors stand for, and with its input rounded where
    that is part of the format. Gradients pass straight through the rounding."""
    module = block.get_submodule(linear)
    weight = module.weight
    assert isinstance(weight, Tensor)
    dequantized = backend.dequantize(tensors, (weight.shape[0], weight.shape[1]), backend.format(settings, dtype))
    with torch.no_grad():
        weight.copy_(dequantized)
    rounds = _as_multiplied(settings)
    if rounds is None:
        return

    def rounded(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].detach()
        found = rounds(x).to(x.dtype)
        return (args[0] + (found - x) if args[0].requires_grad else found,)

    module.register_forward_pre_hook(rounded)
