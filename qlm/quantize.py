"""A float checkpoint and a recipe in, a standard quantized checkpoint out, one block in memory at a time.

Each finished block is a shard of the output, written, fsynced and hashed into `<output>.partial/`; when all are there the folder is
renamed into place. The same call after an interruption goes on from the last finished block: the inputs of the next one are computed
again through the finished ones, with the same operations on the same bytes, so that the result is the same to the last bit.
"""

import ctypes
import importlib.metadata
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from qlm.arch import FAMILIES, FamilySpec, LinearGroup
from qlm.backends import BACKENDS, Backend, QuantizedLinear, Statistics
from qlm.calibrate import Stream, Text, bos_rule, calibration_windows, check_windows, read_text, window_length
from qlm.checkpoint import manifest
from qlm.checkpoint.files import PartialFolder, tidy
from qlm.errors import UsageError
from qlm.load import (
    Source,
    block_paths,
    check_attention,
    fill,
    in_block,
    linear_paths,
    load_tokenizer,
    open_source,
    set_parameter,
)
from qlm.recipe import (
    CalibrationRecipe,
    LinearSettings,
    QuantizeRecipe,
    Recipe,
    quantize_section,
    resolved,
    settings_for,
    unmatched_globs,
)

# Copied as they are: other software finds its tokenizer by them. qlm itself reads the first three only.
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
INDEX = "model.safetensors.index.json"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuantizeResult:
    """What was written.

    Attributes:
        output: the folder.
        layers: path of each quantized linear to its facts (method, bits, damp, relative error).
        bits_per_weight: of the quantized linears: their tensors' bits over their weights' number.
        bytes, bytes_before: of all weights, in the output and in the input.
        resumed: blocks that an earlier, interrupted run had finished; all of them if the output was there already.
    """

    output: Path
    layers: Mapping[str, Mapping[str, Any]]
    bits_per_weight: float
    bytes: int
    bytes_before: int
    resumed: int


def stages_of(spec: FamilySpec, config: Any) -> tuple[tuple[LinearGroup, ...], ...]:
    """The stages of a block, for this config: parallel residual or not."""
    parallel = spec.parallel_stages is not None and bool(getattr(config, spec.parallel_if or ""))
    return spec.parallel_stages if parallel and spec.parallel_stages is not None else spec.stages


def calibration_dtype(device: str) -> torch.dtype:
    """What blocks compute in while calibrating: bf16 where the hardware multiplies it, fp32 elsewhere. Hessians are fp32 always."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


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
    return chosen


def quantize_block(
    block: nn.Module,
    path: str,
    stages: Sequence[Sequence[LinearGroup]],
    chosen: Mapping[str, LinearSettings],
    read_weight: Callable[[str], Tensor],
    stream: Stream | None,
) -> dict[str, QuantizedLinear]:
    """Quantize the linears of one block, stage by stage, so that each sees what the quantized ones before it produce.

    Args:
        block: its linears' weights are replaced by their dequantized selves where there is a stream.
        read_weight: the full name of a linear to its weight as the checkpoint holds it.
        stream: the block's inputs; None for a backend that needs no calibration.
    Returns:
        full name of each quantized linear to its tensors, in the order of `stages`.
    """
    done: dict[str, QuantizedLinear] = {}
    for stage in stages:
        groups = [group for group in stage if any(f"{path}.{linear}" in chosen for linear in group.linears)]
        statistics: Mapping[LinearGroup, Statistics] = (
            stream.statistics(block, groups, path) if stream and groups else {}
        )
        for group in groups:
            names = [f"{path}.{linear}" for linear in group.linears if f"{path}.{linear}" in chosen]
            # Linears with the same settings go together: their rows are independent, and one pass serves them all.
            for settings in dict.fromkeys(chosen[name] for name in names):
                weights = {name: read_weight(name) for name in names if chosen[name] == settings}
                backend = BACKENDS[settings.backend]
                results = backend.quantize(weights, statistics.get(group), settings)
                for (name, weight), quantized in zip(weights.items(), results, strict=True):
                    done[name] = quantized
                    if stream is not None:
                        use_dequantized(
                            block, name.removeprefix(path + "."), quantized.tensors, backend, settings, weight.dtype
                        )
    return done


def use_dequantized(
    block: nn.Module,
    linear: str,
    tensors: Mapping[str, Tensor],
    backend: Backend,
    settings: LinearSettings,
    dtype: torch.dtype,
) -> None:
    """Let a float linear compute with the weight that its quantized tensors stand for."""
    weight = block.get_submodule(linear).weight
    assert isinstance(weight, Tensor)
    dequantized = backend.dequantize(tensors, (weight.shape[0], weight.shape[1]), backend.format(settings, dtype))
    with torch.no_grad():
        weight.copy_(dequantized)


def shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


@torch.no_grad()
def quantize(
    recipe: Recipe, *, force: bool = False, device: str = "cpu", progress: Progress | None = None
) -> QuantizeResult:
    """Quantize a checkpoint as the recipe says.

    Args:
        force: replace an output, or an unfinished one of another recipe, that is there already.
        device: where blocks and solvers run.
        progress: called with what is being done, how much of it is done, and how much there is.
    Raises:
        QlmError: one line. What an interrupted or failed run finished stays in `<output>.partial/` for the next one.
    """
    tell = progress or (lambda what, done, total: None)
    check_attention(recipe.attn_implementation, device)
    source, model = open_source(
        recipe.model, revision=recipe.revision, task=recipe.task, attn_implementation=recipe.attn_implementation
    )
    if source.backend is not None:
        raise UsageError(
            f"model: {recipe.model} is quantized already ({source.backend.name}); give the float checkpoint"
        )
    chosen = choose_settings(model, source.spec, recipe.quantize)
    backend = BACKENDS[recipe.quantize.backend]
    dtype = source.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    compute = calibration_dtype(device)

    text: Text | None = None
    if backend.needs_calibration:
        assert recipe.calibration is not None
        text = read_text(recipe.calibration)
    tell("hash input", 0, 1)
    identity = _identity(recipe, source, text, compute, device)
    tell("hash input", 1, 1)
    blocks = block_paths(source.spec, model)
    shards = [shard_name(i, len(blocks) + 1) for i in range(len(blocks) + 1)]

    output = Path(recipe.output)
    if not force and _is_made(output, identity):
        tidy(output)
        return _result(output, source, resumed=len(blocks))
    with PartialFolder(output, identity, force) as partial:
        weight_map: dict[str, str] = {}
        windows = (
            _windows(recipe.calibration, text, source) if text is not None and recipe.calibration is not None else None
        )
        stream: Stream | None = None
        if windows is not None:
            for name in _outside_blocks(source, blocks):
                if name in dict(model.named_parameters()):
                    set_parameter(model, name, source.read(name, compute).to(device))
            tell("embed", 0, 1)
            stream = Stream(model, source.spec, blocks[0], windows, device)
            tell("embed", 1, 1)
            for name in _outside_blocks(source, blocks):
                set_parameter(model, name, torch.empty(model.get_parameter(name).shape, device="meta"))

        layers: dict[str, dict[str, Any]] = {}
        resumed = 0
        for index, path in enumerate(blocks):
            tell("quantize", index, len(blocks))
            shard = shards[index + 1]
            if partial.finished(shard):
                resumed += 1
                facts = partial.record(shard)
                if stream is not None:
                    _replay(
                        model,
                        source,
                        path,
                        chosen,
                        safetensors.torch.load(partial.path(shard).read_bytes()),
                        compute,
                        device,
                    )
            else:
                tensors, facts = _quantize_shard(model, source, path, chosen, stream, dtype, compute, device)
                partial.write_tensors(shard, tensors, record=facts)
                del tensors
            layers |= facts["layers"]
            weight_map |= dict.fromkeys(facts["names"], shard)
            if stream is not None and index + 1 < len(blocks):
                stream.advance(model.get_submodule(path))
            _empty(model, path)
        tell("quantize", len(blocks), len(blocks))

        if not partial.finished(shards[0]):
            rest = {_published(source, name): source.read(name, dtype) for name in _outside_blocks(source, blocks)}
            partial.write_tensors(shards[0], rest, record={"names": list(rest)})
        weight_map |= dict.fromkeys(partial.record(shards[0])["names"], shards[0])
        files = _write_descriptions(partial, source, model, recipe, chosen, dtype, weight_map)
        outputs = [*shards, *files]
        written = manifest.build(
            **identity,
            qlm=importlib.metadata.version("qlm"),
            outputs=partial.facts(outputs),
            layers=layers,
            bos=bos_rule(source.spec),
            config={key: value for key, value in source.config.to_dict().items() if key in KEY_CONFIG_VALUES},
        )
        partial.write_json(manifest.NAME, written)
        partial.commit([*outputs, manifest.NAME])
    return _result(output, source, resumed)


# Values that were silently wrong in another library at least once; the manifest states them.
KEY_CONFIG_VALUES = frozenset(
    [
        "model_type",
        "do_layer_norm_before",
        "word_embed_proj_dim",
        "_remove_final_layer_norm",
        "rope_parameters",
        "use_parallel_residual",
        "multi_query",
        "scale_attn_weights",
        "tie_word_embeddings",
        "max_position_embeddings",
        "n_positions",
        "activation_function",
        "hidden_act",
    ]
)


def _identity(recipe: Recipe, source: Source, text: Text | None, compute: torch.dtype, device: str) -> dict[str, Any]:
    """Everything that the output's bytes depend on. A resumed run must agree in all of it."""
    plain = resolved(recipe)
    # Where the output lies, how it is measured afterwards and where the inputs lie change no byte of it.
    for key in ("output", "evaluate"):
        plain.pop(key, None)
    if Path(recipe.model).is_dir():
        plain["model"] = Path(recipe.model).resolve().name
    inputs = manifest.input_facts(source.checkpoint.files())
    if text is not None:
        if isinstance(plain["calibration"]["data"], str):
            plain["calibration"]["data"] = text.description
        inputs[f"calibration: {text.description}"] = {"sha256": text.sha256, "bytes": len(text.joined.encode())}
    packages = {name: importlib.metadata.version(name) for name in ("qlm", "torch", "transformers", "tokenizers")}
    # Sums in another order, or rounded at other places, give other bits: where and in what was computed belongs here too.
    place = {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "calibration_dtype": str(compute).removeprefix("torch."),
    }
    return {
        "recipe": plain,
        "inputs": inputs,
        "versions": packages | place,
        "seed": recipe.calibration.seed if recipe.calibration is not None else 0,
        "threads": torch.get_num_threads(),
    }


def _is_made(output: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the output is there already, complete and made from the same. Another or a damaged one is PartialFolder's to refuse."""
    if not (output / manifest.NAME).is_file():
        return False
    manifest.verify(output)
    written = manifest.read(output)
    return all(written[key] == value for key, value in identity.items())


def _windows(section: CalibrationRecipe, text: Text, source: Source) -> Tensor:
    length = window_length(section.length, int(getattr(source.config, source.spec.positions)))
    tokenizer = load_tokenizer(source.checkpoint.folder)
    return calibration_windows(text, tokenizer, source.spec, samples=section.samples, length=length, seed=section.seed)


def _outside_blocks(source: Source, blocks: Sequence[str]) -> list[str]:
    """Names in memory of the tensors that belong to no block and that the files hold (a tied head they need not)."""
    prefixes = tuple(f"{path}." for path in blocks)
    return [
        name
        for name, stored in source.file_names.items()
        if not name.startswith(prefixes) and stored in source.checkpoint.tensors
    ]


def _published(source: Source, name: str) -> str:
    """The name that a tensor of the model in memory has in published files."""
    head = f"{source.spec.head}."
    return f"{source.spec.published_head}.{name.removeprefix(head)}" if name.startswith(head) else name


def _quantize_shard(
    model: nn.Module,
    source: Source,
    path: str,
    chosen: Mapping[str, LinearSettings],
    stream: Stream | None,
    dtype: torch.dtype,
    compute: torch.dtype,
    device: str,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize one block: its tensors as they go into the file, and the record that stays beside them."""
    block = model.get_submodule(path)
    if stream is not None:
        fill(model, source, path, dtype=compute, device=device)
    quantized = quantize_block(
        block,
        path,
        stages_of(source.spec, source.config),
        chosen,
        lambda name: source.read(f"{name}.weight").to(device),
        stream,
    )
    tensors: dict[str, Tensor] = {}
    for name, _ in block.named_parameters():
        full = f"{path}.{name}"
        linear, _, leaf = full.rpartition(".")
        if linear in quantized and leaf == "weight":
            tensors |= {f"{linear}.{suffix}": t.cpu().contiguous() for suffix, t in quantized[linear].tensors.items()}
        else:
            tensors[full] = source.read(full, dtype)
    bits = {name: 8 * sum(t.nbytes for t in result.tensors.values()) for name, result in quantized.items()}
    layers = {
        name: {
            **result.facts,
            "bits_per_weight": bits[name]
            / math.prod(source.checkpoint.tensors[source.file_names[f"{name}.weight"]].shape),
        }
        for name, result in quantized.items()
    }
    return tensors, {"names": list(tensors), "layers": layers}


def _replay(
    model: nn.Module,
    source: Source,
    path: str,
    chosen: Mapping[str, LinearSettings],
    tensors: Mapping[str, Tensor],
    compute: torch.dtype,
    device: str,
) -> None:
    """Fill a block that was finished earlier with what it computed with then."""
    fill(model, source, path, dtype=compute, device=device)
    block = model.get_submodule(path)
    for name, settings in chosen.items():
        if name.startswith(f"{path}."):
            backend = BACKENDS[settings.backend]
            own = {
                key.removeprefix(f"{name}."): t.to(device) for key, t in tensors.items() if key.startswith(f"{name}.")
            }
            own.pop("bias", None)
            stored = source.checkpoint.tensors[source.file_names[f"{name}.weight"]].dtype
            use_dequantized(block, name.removeprefix(f"{path}."), own, backend, settings, stored)


def _empty(model: nn.Module, path: str) -> None:
    """Give a block's memory back, to the system."""
    for name, parameter in list(model.get_submodule(path).named_parameters()):
        set_parameter(model, f"{path}.{name}", torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
    # glibc keeps freed tensors of up to 32 MB; without this its heap grew by a shard's size with every block.
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _write_descriptions(
    partial: PartialFolder,
    source: Source,
    model: nn.Module,
    recipe: Recipe,
    chosen: Mapping[str, LinearSettings],
    dtype: torch.dtype,
    weight_map: Mapping[str, str],
) -> list[str]:
    """Write everything but weights and manifest: index, config, the backend's own files, tokenizer. Returns the names."""
    backend = BACKENDS[recipe.quantize.backend]
    scheme = {name: backend.format(settings, dtype) for name, settings in chosen.items()}
    left_out = [name for name in linear_paths(model) if name not in chosen]
    # The head has one name in published files and another in memory; readers look for either.
    left_out += (
        [source.spec.published_head]
        if source.spec.published_head not in left_out and recipe.task == "causal-lm"
        else []
    )
    description = backend.describe(scheme, left_out, dtype)
    config = {key: value for key, value in source.checkpoint.config.items() if key not in ("torch_dtype", "dtype")}
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if description.quantization_config is not None:
        config["quantization_config"] = description.quantization_config
    total = sum(partial.path(shard).stat().st_size for shard in sorted(set(weight_map.values())))
    partial.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    partial.write_json("config.json", config)
    names = [INDEX, "config.json"]
    for name, content in description.files.items():
        partial.write_json(name, content)
        names.append(name)
    for name in TOKENIZER_FILES:
        file = source.checkpoint.path(name)
        if file is not None:
            partial.write_bytes(name, file.read_bytes())
            names.append(name)
    return names


def _result(output: Path, source: Source, resumed: int) -> QuantizeResult:
    written = manifest.read(output)
    layers = written["layers"]
    weights = {name: source.checkpoint.tensors[source.file_names[f"{name}.weight"]].shape for name in layers}
    numel = {name: shape[0] * shape[1] for name, shape in weights.items()}
    bits = sum(layers[name]["bits_per_weight"] * numel[name] for name in layers)
    return QuantizeResult(
        output=output,
        layers=layers,
        bits_per_weight=bits / sum(numel.values()),
        bytes=sum(file["bytes"] for name, file in written["outputs"].items() if name.endswith(".safetensors")),
        bytes_before=sum(
            info.file.stat().st_size for info in {i.file: i for i in source.checkpoint.tensors.values()}.values()
        ),
        resumed=resumed,
    )


@torch.no_grad()
def quantize_model(
    model: Any,
    section: QuantizeRecipe | Mapping[str, Any],
    calibration: Tensor | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Quantize a transformers model in memory, in place.

    Args:
        model: of one of the three families, float, on one device.
        section: what a recipe's `quantize` section says, as an object or a mapping: `{"backend": "nf4"}`.
        calibration: int64 [samples, length] token ids, for gptq (`calibrate.calibration_windows` makes them).
    Returns:
        path of each quantized linear to its facts.
    Raises:
        UsageError: the section does not fit the model, or calibration is missing. DataError: see `quantize`.
    """
    section = quantize_section(section)
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in FAMILIES:
        raise UsageError(f"model: {model_type!r}; expected a transformers model of {', '.join(FAMILIES)}")
    spec = FAMILIES[model_type]
    backend = BACKENDS[section.backend]
    blocks = block_paths(spec, model)
    stages = stages_of(spec, model.config)
    for name in (f"{path}.{linear}" for path in blocks for s in stages for group in s for linear in group.linears):
        if type(model.get_submodule(name)) is not nn.Linear:
            kind = type(model.get_submodule(name)).__name__
            raise UsageError(f"model: {name} is a {kind}, no plain Linear: quantized already, or an adapter's")
    chosen = choose_settings(model, spec, section)
    dtype = model.get_input_embeddings().weight.dtype
    stream: Stream | None = None
    if backend.needs_calibration:
        if calibration is None:
            raise UsageError("calibration: backend gptq needs token ids, int64 [samples, length]")
        check_windows(calibration, spec, model.config)
        stream = Stream(model, spec, blocks[0], calibration, str(model.get_input_embeddings().weight.device))
    facts: dict[str, dict[str, Any]] = {}
    for index, path in enumerate(blocks):
        if progress is not None:
            progress("quantize", index, len(blocks))
        block = model.get_submodule(path)
        weights = {
            name: model.get_submodule(name).weight.data.clone() for name in chosen if name.startswith(f"{path}.")
        }
        quantized = quantize_block(block, path, stages, chosen, weights.__getitem__, stream)
        if stream is not None and index + 1 < len(blocks):
            stream.advance(block)
        for name, result in quantized.items():
            linear = model.get_submodule(name)
            shape = (linear.out_features, linear.in_features)
            bias = None if linear.bias is None else linear.bias.data
            owner, _, leaf = name.rpartition(".")
            how = backend.format(chosen[name], dtype)
            setattr(model.get_submodule(owner), leaf, backend.module(result.tensors, bias, shape, how, dtype).eval())
            facts[name] = result.facts
    return facts
