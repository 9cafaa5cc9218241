"""Mixed precision: what each linear loses at each number of bits, and which linear gets how many under a budget.

To second order the model moves from the float one by KL = 1/2 E[(sum_l g_l . e_l)^2] nats a token, where e_l = (W_l - Q_l) x is what
quantizing linear l does to its output at a token, and g_l the gradient there of the loss with labels drawn from the model itself: their
expectation is the Fisher matrix, which is KL's curvature. With errors of different linears taken for uncorrelated, the sum falls
apart into one cost for each linear, 1/2 E[(g_l . e_l)^2], which is predicted KL in nats. Taking the mean token by token keeps what the
usual shorthand, mean |g|^2 times tr((W - Q) H (W - Q)^T), loses: that large inputs and large gradients meet at the same tokens.

Q_l comes from the quantizer itself, with the recipe's own settings but for what learns: the sweeps over the codes stay, because they halve
what 2 bits lose and take less than a tenth off 4 (evals/LOG.md). The tokens of the mean are of samples that the Hessian has not seen.
numerics/allocate.py then finds the choice of least total cost, exactly.

What it refuses: models without a language-model head. What it does not do: look at any two linears together, or at how the errors of
earlier layers change what later ones read. Together these make a model's KL 1.2 to 1.6 times the sum of its costs, at
2, 3 and 4 bits much alike (evals/LOG.md).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlm.arch import FamilySpec, LinearGroup
from qlm.backends import BACKENDS, Statistics
from qlm.blocks import stages_of
from qlm.calibrate import evaluation_mode
from qlm.errors import DataError, UsageError
from qlm.formats.dtypes import DTYPES
from qlm.formats.gptq import group_size_of
from qlm.formats.layout import in_block
from qlm.load import biases_everywhere, block_paths, linear_paths
from qlm.numerics.affine import overflowing_row
from qlm.numerics.allocate import allocate
from qlm.recipe import (
    PRESETS,
    READERS,
    LinearSettings,
    OverrideRecipe,
    QuantizeRecipe,
    settings_for,
    size_in_bytes,
    unmatched_globs,
)
from qlm.stream import Stream

# Bits per weight and input features that share a scale; -1 is the whole row.
Option = tuple[int, int]
# What a linear may get. A scale for each 32 features of 2 bits, or other scales at 8, would lower predicted KL by 3 % at most up to 4 bits on
# average, and by 7 % at 6.5 (evals/LOG.md).
OPTIONS: tuple[Option, ...] = (
    (2, 64), (2, 128), (2, -1),
    (3, 32), (3, 64), (3, 128), (3, -1),
    (4, 32), (4, 64), (4, 128), (4, -1),
    (8, 128),
)  # fmt: skip
# Tokens that costs are measured at: as many as let gradients take `GRADIENT_BYTES`, but within these limits. They are drawn from twice
# as many where there is enough text; half of the samples at most are kept aside for them. Four times fewer cost up to a tenth of KL (evals/LOG.md).
LEAST_TOKENS, MOST_TOKENS = 4096, 16384
GRADIENT_BYTES = 2 << 30
# Logits that exist at a time, as in evaluate.py.
SLICE_LOGITS = 1 << 24
# What a safetensors header holds for a tensor beside its name, at most: dtype, shape, two offsets and their punctuation.
HEADER_BYTES = 120

# What costs are measured without, though the recipe may ask for it: what looks at the layers before, and what takes long.
CHEAP = {
    key: value
    for key, value in PRESETS["fast"].items()
    if key in LinearSettings.__dataclass_fields__ and key not in ("sweeps", "bias_correction")
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Layer:
    """Linears that take one option together: one, or those of a group that read the same input (OPT's q, k, v, which other software
    fuses into one).

    Attributes:
        names: full paths, in the order of the forward pass.
        options: what they may take, with the settings that each means.
        sizes: stored bytes of all of them, for each option.
    """

    names: tuple[str, ...]
    options: dict[Option, LinearSettings]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class BitChoice:
    """The result of `choose_bits`.

    Attributes:
        options: path of each quantized linear to its (bits, group size), in the model's order.
        bytes: stored bytes of the quantized linears; biases not included, as everywhere.
        average_bits: the same in bits per weight.
        facts: plain values for manifest and report.
    """

    options: dict[str, Option]
    bytes: int
    average_bits: float
    facts: dict[str, Any]


def choose_bits(
    model: Any,
    spec: FamilySpec,
    windows: Tensor,
    section: QuantizeRecipe,
    budget: int,
    options: Sequence[Option] = OPTIONS,
    progress: Progress | None = None,
) -> BitChoice:
    """Give each linear of a float model that `section` quantizes with gptq the bits and the group size that lose least together.

    The whole model must be in memory, in float32 or bfloat16, on one device; it is left as it was. Needed beside it: the inputs of all
    blocks for one batch (L x 4096 x hidden size), the gradients at the tokens drawn (`GRADIENT_BYTES`, or, at `LEAST_TOKENS`, as
    much as half the model, for hidden sizes of about 4096), the hidden states of all windows, and the Hessians and activations of one block.

    The same arguments give the same choice on one machine with one number of threads.

    Args:
        model: transformers causal LM of the family.
        windows: int64 [samples, length], calibration text. Some of the samples, at most half, measure the costs; the others make the
            Hessians.
        section: its `bits` and `group_size` do not matter; what its overrides say of single linears holds.
        budget: stored bytes of the quantized linears at most (`budget_of`).
        progress: called with what is being done, how much of it is done, and how much there is.
    Raises:
        UsageError: no option fits a linear, the budget is too small, the model has no language-model head, or it is in float16.
        DataError: as `quantize`.
    """
    if model.get_input_embeddings().weight.dtype == torch.float16:
        raise UsageError(
            "model: found float16, in which gradients are lost or overflow; load it in bfloat16 or float32 to have its bits chosen"
        )
    blocks = block_paths(spec, model)
    layers = layers_of(model, spec, section, options)
    refuse_too_small(model, layers, section, budget)
    tokens, aside = measured_at(layers, model, windows.shape)
    measured = windows[-aside:]
    fitted = windows[:-aside] if len(windows) > aside else windows
    drawn = torch.randperm(measured.numel(), generator=torch.Generator().manual_seed(0))[:tokens].sort().values
    if section.ignore_first and windows.shape[1] > 1:
        drawn = drawn[drawn % windows.shape[1] > 0]
    with evaluation_mode(model):
        names = names_in(layers)
        try:
            gradients = output_gradients(model, blocks, names, measured, drawn, progress)
        except FloatingPointError:
            raise _what_overflows(model, spec, blocks, measured) from None
        costs = _costs(model, spec, section, blocks, layers, fitted, measured, drawn, gradients, progress)

    taken = allocate(costs, [layer.sizes for layer in layers], budget)
    chosen = {
        name: list(layer.options)[option] for layer, option in zip(layers, taken, strict=True) for name in layer.names
    }
    size = sum(layer.sizes[option] for layer, option in zip(layers, taken, strict=True))
    average = 8 * size / _numel(model, names)
    uniform = {}
    for option in options:
        if all(option in layer.options for layer in layers):
            of_layers = [cost[list(layer.options).index(option)] for cost, layer in zip(costs, layers, strict=True)]
            uniform[f"{option[0]} bits, group size {option[1]}"] = math.fsum(of_layers)
    facts = {
        "budget_bytes": budget,
        "bytes": size,
        "average_bits": average,
        "predicted_kl": math.fsum(cost[option] for cost, option in zip(costs, taken, strict=True)),
        "predicted_kl_uniform": uniform,
        "tokens": len(drawn),
    }
    return BitChoice({name: chosen[name] for name in linear_paths(model) if name in chosen}, size, average, facts)


def with_choice(section: QuantizeRecipe, options: Mapping[str, Option]) -> QuantizeRecipe:
    """The section with an override for each linear that says what was chosen for it."""
    chosen = {
        name: OverrideRecipe.model_validate({"bits": bits, "group_size": group_size})
        for name, (bits, group_size) in options.items()
    }
    changes = {"overrides": {**section.overrides, **chosen}, "average_bits": None, "target_size": None}
    return section.model_copy(update=changes)


def budget_of(
    model: Any, spec: FamilySpec, section: QuantizeRecipe, dtype: torch.dtype, stored: Collection[str]
) -> tuple[list[Layer], int]:
    """What there is to choose, and the budget for it in bytes, as the section's `average_bits` or `target_size` says.

    Args:
        model: float; a skeleton without memory will do.
        dtype: of what stays in floating point in the files.
        stored: names of the parameters that the files hold (a tied head they need not).
    Raises:
        UsageError: as `layers_of`; the budget is too small, or the rest of the model alone is larger than `target_size`.
    """
    layers = layers_of(model, spec, section)
    names = names_in(layers)
    if section.average_bits is not None:
        budget = math.floor(section.average_bits * _numel(model, names) / 8)
    else:
        assert section.target_size is not None
        target = size_in_bytes(section.target_size)
        weights = {f"{name}.weight" for name in names}
        others = [name for name, _ in model.named_parameters() if name in stored and name not in weights]
        rest = sum(model.get_parameter(name).numel() for name in others) * dtype.itemsize
        rest += sum(len(name) + HEADER_BYTES for name in others)
        # Each quantized weight is four tensors in the file, whose names end in "qweight" and the like.
        rest += sum(4 * (len(name) + 1 + HEADER_BYTES) for name in weights)
        smallest = rest + sum(min(layer.sizes) for layer in layers)
        if smallest > target:
            raise UsageError(
                f"quantize.target_size: found {section.target_size!r}; allowed: at least {smallest} bytes, {rest} of them for what is "
                "not quantized"
            )
        budget = target - rest
    refuse_too_small(model, layers, section, budget)
    return layers, budget


def refuse_too_small(model: Any, layers: Sequence[Layer], section: QuantizeRecipe, budget: int) -> None:
    """Raises UsageError if even the smallest choice takes more than `budget` bytes."""
    smallest, weights = sum(min(layer.sizes) for layer in layers), _numel(model, names_in(layers))
    if smallest > budget:
        # Up, so that what is named is enough.
        least = math.ceil(8000 * smallest / weights) / 1000
        all_bits = READERS[section.reader].bits == READERS["gptqmodel"].bits
        of_reader = "" if all_bits else f" for reader {section.reader}"
        raise UsageError(
            f"quantize.{section.budget_key or 'bits'}: found {8 * budget / weights:.3f} stored bits per weight; allowed: at least "
            f"{least:.3f}, the least that these linears can take{of_reader}"
        )


def measured_at(layers: Sequence[Layer], model: Any, windows: tuple[int, ...]) -> tuple[int, int]:
    """At how many tokens costs are measured, and how many samples are kept aside for them. windows: [samples, length]."""
    samples, length = windows
    outputs = sum(model.get_submodule(name).weight.shape[0] for name in names_in(layers))
    tokens = min(max(GRADIENT_BYTES // (torch.bfloat16.itemsize * outputs), LEAST_TOKENS), MOST_TOKENS)
    aside = max(1, min(math.ceil(2 * tokens / length), samples // 2))
    return min(tokens, aside * length), aside


def names_in(layers: Sequence[Layer]) -> list[str]:
    return [name for layer in layers for name in layer.names]


def _numel(model: Any, names: Sequence[str]) -> int:
    return sum(model.get_submodule(name).weight.numel() for name in names)


def layers_of(
    model: Any, spec: FamilySpec, section: QuantizeRecipe, options: Sequence[Option] = OPTIONS
) -> list[Layer]:
    """What there is to choose, in the order of the forward pass.

    Raises:
        UsageError: none of the options fits a linear, a glob matches nothing, or nothing is left to quantize.
    """
    backend = BACKENDS[section.backend]
    linears = [name for name in linear_paths(model) if in_block(name)]
    for glob in unmatched_globs(section, linears):
        raise UsageError(f"quantize: {glob!r} matches none of the model's linears, such as {linears[0]!r}")
    names = {name for name in linears if settings_for(section, name) is not None}
    layers = []
    for path in block_paths(spec, model):
        for stage in stages_of(spec, model.config):
            for group in stage:
                # Those that overrides make differ are chosen for by themselves.
                together: dict[tuple[LinearSettings, ...], list[str]] = {}
                allowed: dict[str, dict[Option, LinearSettings]] = {}
                for name in (f"{path}.{linear}" for linear in group.linears):
                    if name in names:
                        shape = tuple(model.get_submodule(name).weight.shape)
                        allowed[name] = _allowed(name, shape, section, options)
                        together.setdefault(tuple(allowed[name].values()), []).append(name)
                for fused in together.values():
                    of_fused = allowed[fused[0]]
                    sizes = [
                        sum(
                            _stored_bytes(backend, tuple(model.get_submodule(name).weight.shape), how) for name in fused
                        )
                        for how in of_fused.values()
                    ]
                    layers.append(Layer(tuple(fused), of_fused, tuple(sizes)))
    if not layers:
        raise UsageError("quantize.skip: every linear is left out; there is nothing to quantize")
    return layers


def _allowed(
    name: str, shape: tuple[int, int], section: QuantizeRecipe, options: Sequence[Option]
) -> dict[Option, LinearSettings]:
    """The options of a linear [O, I], and what each means: the reader's bits, and an override of bits or group size, leave fewer."""
    found: dict[Option, LinearSettings] = {}
    seen = set()
    refused: UsageError | None = None
    readable = READERS[section.reader].bits
    for option in (option for option in options if option[0] in readable):
        settings = settings_for(_with_option(section, option), name)
        assert settings is not None
        # A group as long as the row is the row.
        same = settings.bits, group_size_of(settings, shape[1])
        if same in seen:
            continue
        try:
            BACKENDS[section.backend].check(name, shape, settings)
        except UsageError as error:
            refused = error
            continue
        seen.add(same)
        found[settings.bits, settings.group_size] = settings
    if not found:
        assert refused is not None
        raise refused
    return found


def _with_option(section: QuantizeRecipe, option: Option) -> QuantizeRecipe:
    return section.model_copy(update={"bits": option[0], "group_size": option[1]})


def _stored_bytes(backend: Any, shape: tuple[int, int], settings: LinearSettings) -> int:
    layout = backend.layout(shape, backend.format(settings, torch.float16))
    # Floats in it are scales, which are written in 16 bits.
    return sum(math.prod(item.shape) * min(DTYPES[dtype] for dtype in item.dtypes) for item in layout.values())


def output_gradients(
    model: Any,
    blocks: Sequence[str],
    names: Sequence[str],
    windows: Tensor,
    drawn: Tensor,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Gradients of -log p(y) with respect to the linears' outputs, y drawn from the model's own predictions, summed over the window.

    Args:
        windows: int64 [samples, length]; each goes forward and backward by itself, a block at a time.
        drawn: int64 [tokens], ascending: which of the samples * length tokens are kept.
    Returns:
        by linear: bfloat16 [tokens, O].
    Raises:
        UsageError: the model has no language-model head. FloatingPointError: what it computes is NaN or infinite.
    """
    if model.get_output_embeddings() is None:
        raise UsageError(
            f"quantize: bits are chosen by what a language model predicts; a {type(model).__name__} has no head"
        )
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(0)
    length = windows.shape[1]
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    rows = torch.empty(0, dtype=torch.int64)
    starts: list[Tensor] = []

    def keep(name: str, gradient: Tensor) -> None:
        kept[name].append(gradient.reshape(-1, gradient.shape[-1])[rows].to(torch.bfloat16))

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(partial(keep, name))

        return hook

    def start(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        starts.append(args[0].detach().requires_grad_())
        return (starts[-1], *args[1:])

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    handles.append(model.get_submodule(blocks[0]).register_forward_pre_hook(start))
    try:
        with _recomputing(model, blocks):
            for index, window in enumerate(windows):
                if progress is not None:
                    progress("gradients", index, len(windows))
                within = drawn[(drawn >= index * length) & (drawn < (index + 1) * length)] - index * length
                rows = within.to(device)
                with torch.enable_grad():
                    hidden = model.base_model(window[None].to(device), use_cache=False).last_hidden_state
                if not bool(hidden.isfinite().all()):
                    raise FloatingPointError(f"hidden states of sample {index} are NaN or infinite")
                slope = _slope_of_loss(model, hidden.detach()[0], generator)[None]
                # With respect to the first block's input alone: no gradient of a parameter is ever made.
                torch.autograd.grad(hidden, starts.pop(), slope)
    finally:
        for handle in handles:
            handle.remove()
    # One after the other, so that both forms of all of them are never there at once.
    return {name: torch.cat(kept.pop(name)) for name in names}


def _what_overflows(model: Any, spec: FamilySpec, blocks: Sequence[str], windows: Tensor) -> DataError:
    """What to say of a model that computes NaN or infinities: the first linear whose inputs or weights are too large."""
    stream = Stream(model, spec, blocks[0], windows, str(model.get_input_embeddings().weight.device))
    with torch.no_grad():
        for path in blocks:
            block = model.get_submodule(path)
            for stage in stages_of(spec, model.config):
                try:
                    stream.statistics(block, stage, path)
                except DataError as error:
                    return error
                for linear in (linear for group in stage for linear in group.linears):
                    row = overflowing_row(block.get_submodule(linear).weight.float())
                    if row is not None:
                        return DataError(
                            f"{path}.{linear}.weight, row {row}: too large to be squared in fp32; the checkpoint is damaged"
                        )
            stream.advance(block)
    return DataError("model: its hidden states are NaN or infinite on the calibration text; the checkpoint is damaged")


def _slope_of_loss(model: Any, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of -log p(y), y drawn from p, with respect to what the head reads. hidden [tokens, E]."""
    head = model.get_output_embeddings()
    slopes = []
    for part in hidden.split(max(1, SLICE_LOGITS // int(model.config.vocab_size))):
        with torch.enable_grad():
            x = part.detach().requires_grad_()
            log_p = torch.log_softmax(head(x).float(), dim=-1)
            label = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            loss = -log_p.gather(-1, label).sum()
        slopes.append(torch.autograd.grad(loss, x)[0])
    return torch.cat(slopes)


@contextmanager
def _recomputing(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Inside, a backward pass keeps the inputs of the blocks alone and computes each block again when its turn comes."""
    modules = [model.get_submodule(path) for path in blocks]
    for block in modules:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in modules:
            del block.forward


@torch.no_grad()
def _costs(
    model: Any,
    spec: FamilySpec,
    section: QuantizeRecipe,
    blocks: Sequence[str],
    layers: Sequence[Layer],
    fitted: Tensor,
    measured: Tensor,
    drawn: Tensor,
    gradients: dict[str, Tensor],
    progress: Progress | None,
) -> list[list[float]]:
    """Predicted KL, in nats a token, of each layer at each of its options."""
    device = str(model.get_input_embeddings().weight.device)
    about_mean = section.bias_correction and biases_everywhere(model)
    stream = Stream(model, spec, blocks[0], fitted, device, ignore_first=section.ignore_first, about_mean=about_mean)
    aside = Stream(model, spec, blocks[0], measured, device)
    costs: dict[tuple[str, ...], list[float]] = {}
    for index, path in enumerate(blocks):
        if progress is not None:
            progress("sensitivity", index, len(blocks))
        block = model.get_submodule(path)
        here = [layer for layer in layers if layer.names[0].startswith(f"{path}.")]
        group_of = {
            layer.names: next(
                group
                for stage in stages_of(spec, model.config)
                for group in stage
                if layer.names[0].removeprefix(f"{path}.") in group.linears
            )
            for layer in here
        }
        groups = list(dict.fromkeys(group_of.values()))
        if groups:
            statistics = stream.statistics(block, groups, path)
        with _inputs(block, groups, drawn, aside) as inputs:
            aside.advance(block)
        for layer in here:
            group = group_of[layer.names]
            weight = {name: model.get_submodule(name).weight.detach() for name in layer.names}
            gradient = [gradients.pop(name) for name in layer.names]
            # Biases take up the mean error, where there are any and the section says so.
            has_bias = model.get_submodule(layer.names[0]).bias is not None
            x, found = torch.cat(inputs[group]), statistics[group]
            # In the float model there is nothing of earlier layers to repair; the mean is there for the correction of biases.
            alone = Statistics(found.hessian, found.tokens, mean=found.mean, target_mean=found.mean, factors={})
            costs[layer.names] = [_cost(weight, alone, how, x, gradient, has_bias) for how in layer.options.values()]
        stream.advance(block)
    return [costs[layer.names] for layer in layers]


@contextmanager
def _inputs(
    block: nn.Module, groups: Sequence[LinearGroup], drawn: Tensor, stream: Stream
) -> Iterator[dict[LinearGroup, list[Tensor]]]:
    """What the groups read at the drawn tokens, [tokens, I] in parts, filled while the stream passes through the block."""
    found: dict[LinearGroup, list[Tensor]] = {group: [] for group in groups}
    seen = dict.fromkeys(groups, 0)

    def hook_for(group: LinearGroup) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            within = drawn[(drawn >= seen[group]) & (drawn < seen[group] + len(x))] - seen[group]
            found[group].append(x[within.to(x.device)])
            seen[group] += len(x)

        return hook

    handles = [block.get_submodule(group.linears[0]).register_forward_pre_hook(hook_for(group)) for group in groups]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _cost(
    weights: Mapping[str, Tensor],
    statistics: Statistics,
    settings: LinearSettings,
    x: Tensor,
    gradients: Sequence[Tensor],
    has_bias: bool,
) -> float:
    """1/2 E[(g . e)^2], the predicted KL in nats a token. x [tokens, I]; gradients [tokens, O] of each linear."""
    backend = BACKENDS[settings.backend]
    settings = replace(settings, **CHEAP)
    moved = torch.zeros(len(x), device=x.device)
    results = backend.quantize(weights, statistics, settings)
    for weight, gradient, result in zip(weights.values(), gradients, results, strict=True):
        quantized = backend.dequantize(
            result.tensors, (weight.shape[0], weight.shape[1]), backend.format(settings, torch.float16)
        )
        error = x.float() @ (quantized - weight.float()).T
        if has_bias and result.bias_shift is not None:
            error += result.bias_shift
        moved += (error * gradient.float()).sum(1)
    return 0.5 * moved.double().square().mean().item()
