"""A float checkpoint and a recipe in, a standard quantized checkpoint out, one block in memory at a time.

Each finished block is a shard of the output, written, fsynced and hashed into `<output>.partial/`; when all are there the folder is
renamed into place. The same call after an interruption goes on from the last finished block: the inputs of the next one are computed
again through the finished ones, with the same operations on the same bytes, so that the result is the same to the last bit.
"""

import importlib.metadata
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from qlm.arch import FAMILIES, FamilySpec, Task
from qlm.backends import BACKENDS, Backend
from qlm.backends.base import refuse_not_finite
from qlm.blocks import choose_settings, quantize_block, set_float, stages_of, use_dequantized
from qlm.calibrate import (
    Text,
    bos_rule,
    calibration_dtype,
    calibration_windows,
    check_windows,
    read_text,
    window_length,
)
from qlm.checkpoint import manifest
from qlm.checkpoint.files import PartialFolder, tidy
from qlm.errors import UsageError
from qlm.figure import bits_figure
from qlm.formats.dtypes import torch_dtype
from qlm.formats.layout import in_block
from qlm.load import (
    Source,
    biases_everywhere,
    block_paths,
    check_attention,
    check_device,
    fill,
    linear_paths,
    load,
    load_tokenizer,
    open_source,
    set_parameter,
)
from qlm.memory import release_memory
from qlm.recipe import (
    CalibrationRecipe,
    LinearSettings,
    QuantizeRecipe,
    Recipe,
    quantize_section,
    resolved,
)
from qlm.sensitivity import budget_of, choose_bits, with_choice
from qlm.stream import Stream

# Copied as they are: other software finds its tokenizer by them. qlm itself reads the first three only.
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
# The picture of what was chosen for each linear; its record holds the choice, so that it is made once.
FIGURE = "bits.svg"

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
        choice: where bits were chosen by a budget, what is known of that (`BitChoice.facts`).
    """

    output: Path
    layers: Mapping[str, Mapping[str, Any]]
    bits_per_weight: float
    bytes: int
    bytes_before: int
    resumed: int
    choice: Mapping[str, Any] | None = None


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
    check_device(device)
    job = _Job.open(recipe, device)
    text = read_text(recipe.calibration) if recipe.calibration is not None else None
    tell("hash input", 0, 1)
    identity = _identity(recipe, job, text)
    tell("hash input", 1, 1)

    output = Path(recipe.output)
    if not force and manifest.is_made(output, identity):
        tidy(output)
        return _result(output, job.source, resumed=len(job.blocks))
    with PartialFolder(output, identity, force) as partial:
        stream = None
        if text is not None and recipe.calibration is not None:
            windows = _windows(recipe.calibration, text, job.source)
            if recipe.quantize.budget_key is not None:
                job = _choose_bits(job, recipe, windows, partial, tell)
            tell("embed", 0, 1)
            stream = _embed(job, windows, recipe.quantize)
            tell("embed", 1, 1)
        resumed = 0
        for index, path in enumerate(job.blocks):
            tell("quantize", index, len(job.blocks))
            if stream is not None or not partial.finished(job.shards[min(index + 2, len(job.blocks))]):
                job.read_ahead(index + 1)
            shard = job.shards[index + 1]
            if partial.finished(shard):
                resumed += 1
                if stream is not None:
                    tensors = safetensors.torch.load(partial.path(shard).read_bytes())
                    _replay(job, path, tensors, partial.record(shard)["floats"], stream)
            else:
                tensors, record = _quantize_shard(job, path, stream)
                partial.write_tensors(shard, tensors, record=record)
                del tensors
            if stream is not None and index + 1 < len(job.blocks):
                stream.advance(job.model.get_submodule(path))
            _empty(job.model, path)
        tell("quantize", len(job.blocks), len(job.blocks))
        if not partial.finished(job.shards[0]):
            rest = {_published(job.source, name): job.source.read(name, job.dtype) for name in job.outside_blocks()}
            partial.write_tensors(job.shards[0], rest, record={"names": list(rest), "layers": {}})
        _write_descriptions(partial, job, recipe, identity)
        partial.commit(partial.finished_names)
    return _result(output, job.source, resumed)


@dataclass(frozen=True)
class _Job:
    """What one call of `quantize` works on.

    Attributes:
        model: the skeleton; one block of it is filled at a time.
        chosen: path of each linear to be quantized to its settings; none as long as bits are yet to be chosen by a budget.
        budget: for that, in bytes.
        blocks: paths of the blocks; `shards` are the output's files, the first for what lies outside the blocks.
        dtype: of what stays in floating point in the output. compute: what blocks compute in while calibrating.
    """

    source: Source
    model: Any
    task: Task
    chosen: dict[str, LinearSettings]
    backend: Backend
    blocks: list[str]
    shards: list[str]
    dtype: torch.dtype
    compute: torch.dtype
    device: str
    budget: int | None = None

    @classmethod
    def open(cls, recipe: Recipe, device: str) -> "_Job":
        check_attention(recipe.attn_implementation, device)
        source, model = open_source(
            recipe.model, revision=recipe.revision, task=recipe.task, attn_implementation=recipe.attn_implementation
        )
        if source.backend is not None:
            raise UsageError(
                f"model: {recipe.model} is quantized already ({source.backend.name}); give the float checkpoint"
            )
        blocks = block_paths(source.spec, model)
        by_budget = recipe.quantize.budget_key is not None
        dtype = source.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        return cls(
            source=source,
            model=model,
            task=recipe.task,
            chosen={} if by_budget else choose_settings(model, source.spec, recipe.quantize),
            backend=BACKENDS[recipe.quantize.backend],
            blocks=blocks,
            shards=[shard_name(index, len(blocks) + 1) for index in range(len(blocks) + 1)],
            dtype=dtype,
            compute=calibration_dtype(device),
            device=device,
            budget=budget_of(model, source.spec, recipe.quantize, dtype, source.stored_names())[1]
            if by_budget
            else None,
        )

    def read_ahead(self, index: int) -> None:
        """Have the disk at work on a block's tensors while the one before it is computed; no index too high."""
        within = tuple(f"{path}." for path in self.blocks[index : index + 1])
        names = (self.source.file_names[name] for name in self.source.stored_names() if name.startswith(within))
        self.source.checkpoint.read_ahead(names)

    def outside_blocks(self) -> list[str]:
        """Names in memory of the tensors that belong to no block and that the files hold."""
        prefixes = tuple(f"{path}." for path in self.blocks)
        return [name for name in self.source.stored_names() if not name.startswith(prefixes)]


def _choose_bits(job: _Job, recipe: Recipe, windows: Tensor, partial: PartialFolder, progress: Progress) -> _Job:
    """The job with the bits and the group size of each linear chosen by the recipe's budget, once: a run that continues another finds
    the choice beside the picture of it. The whole float model is in memory while costs are measured."""
    source, section = job.source, recipe.quantize
    if not partial.finished(FIGURE):
        assert job.budget is not None
        model = load(
            source.checkpoint.folder,
            device=job.device,
            dtype=job.compute,
            attn_implementation=recipe.attn_implementation,
        )
        choice = choose_bits(model, source.spec, windows, section, job.budget, progress=progress)
        del model
        release_memory()
        linears = [linear for s in stages_of(source.spec, source.config) for group in s for linear in group.linears]
        figure = bits_figure(
            # q before k, as everybody says them; transformers' OPT has k, v and q.
            dict(
                sorted(
                    choice.options.items(), key=lambda item: [item[0].endswith(f".{x}") for x in linears], reverse=True
                )
            ),
            name=Path(recipe.model).resolve().name if Path(recipe.model).is_dir() else recipe.model,
            average_bits=choice.average_bits,
            size=choice.bytes,
            left_out=[name for name in linear_paths(job.model) if in_block(name) and name not in choice.options],
        )
        partial.write_bytes(FIGURE, figure.encode(), record={"options": choice.options, "facts": choice.facts})
    options = {name: (bits, group_size) for name, (bits, group_size) in partial.record(FIGURE)["options"].items()}
    return replace(job, chosen=choose_settings(job.model, source.spec, with_choice(section, options)))


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


def _identity(recipe: Recipe, job: _Job, text: Text | None) -> dict[str, Any]:
    """Everything that the output's bytes depend on. A resumed run must agree in all of it."""
    plain = resolved(recipe)
    # Where the output lies, how it is measured afterwards and where the inputs lie change no byte of it.
    for key in ("output", "evaluate"):
        plain.pop(key, None)
    if Path(recipe.model).is_dir():
        plain["model"] = Path(recipe.model).resolve().name
    inputs = manifest.input_facts(job.source.checkpoint.files())
    if text is not None:
        if isinstance(plain["calibration"]["data"], str):
            plain["calibration"]["data"] = text.description
        inputs[f"calibration: {text.description}"] = {"sha256": text.sha256, "bytes": len(text.joined.encode())}
    packages = {name: importlib.metadata.version(name) for name in ("qlm", "torch", "transformers", "tokenizers")}
    # Sums in another order, or rounded at other places, give other bits: where and in what was computed belongs here too.
    place = {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(job.device) if job.device.startswith("cuda") else "cpu",
        "calibration_dtype": str(job.compute).removeprefix("torch."),
    }
    return {
        "recipe": plain,
        "inputs": inputs,
        "versions": packages | place,
        "seed": recipe.calibration.seed if recipe.calibration is not None else 0,
        "threads": torch.get_num_threads(),
    }


def _windows(section: CalibrationRecipe, text: Text, source: Source) -> Tensor:
    length = window_length(section.length, int(getattr(source.config, source.spec.positions)))
    tokenizer = load_tokenizer(source.checkpoint.folder)
    windows = calibration_windows(
        text, tokenizer, source.spec, samples=section.samples, length=length, seed=section.seed
    )
    check_windows(windows, source.spec, source.config)
    return windows


def stream_of(
    model: Any, spec: FamilySpec, first_block: str, windows: Tensor, device: str, section: QuantizeRecipe
) -> Stream:
    """The stream that a `quantize` section asks for."""
    return Stream(
        model, spec, first_block, windows, device,
        reference=section.follows_float, held_out=section.holds_out, ignore_first=section.ignore_first,
        about_mean=section.bias_correction and biases_everywhere(model),
    )  # fmt: skip


def _embed(job: _Job, windows: Tensor, section: QuantizeRecipe) -> Stream:
    """The inputs of the first block. What lies outside the blocks is in memory for as long as that takes."""
    names = job.outside_blocks()
    for name in names:
        set_parameter(job.model, name, job.source.read(name, job.compute, job.device))
    stream = stream_of(job.model, job.source.spec, job.blocks[0], windows, job.device, section)
    for name in names:
        _forget(job.model, name)
    return stream


def _published(source: Source, name: str) -> str:
    """The name that a tensor of the model in memory has in published files."""
    head = f"{source.spec.head}."
    return f"{source.spec.published_head}.{name.removeprefix(head)}" if name.startswith(head) else name


def _quantize_shard(job: _Job, path: str, stream: Stream | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize one block: its tensors as they go into the file, and the record that stays beside them."""
    source, block = job.source, job.model.get_submodule(path)
    if stream is not None:
        fill(job.model, source, path, dtype=job.compute, device=job.device)
    quantized = quantize_block(
        block,
        path,
        source.spec,
        source.config,
        job.chosen,
        lambda name: source.read(name, device=job.device),
        stream,
        job.dtype,
    )
    linears = quantized.linears
    tensors: dict[str, Tensor] = {}
    for name, _ in block.named_parameters():
        full = f"{path}.{name}"
        linear, _, leaf = full.rpartition(".")
        if linear in linears and leaf == "weight":
            tensors |= {f"{linear}.{suffix}": t.cpu().contiguous() for suffix, t in linears[linear].tensors.items()}
        elif full in quantized.floats:
            tensors[full] = quantized.floats[full].cpu().contiguous()
        else:
            tensors[full] = source.read(full, job.dtype)
    bits = {name: 8 * sum(t.nbytes for t in result.tensors.values()) for name, result in linears.items()}
    layers = {
        name: {
            **result.facts,
            "bits_per_weight": bits[name]
            / math.prod(source.checkpoint.tensors[source.file_names[f"{name}.weight"]].shape),
        }
        for name, result in linears.items()
    }
    record = {"names": list(tensors), "layers": layers, "floats": list(quantized.floats), "block": quantized.facts}
    return tensors, record


def _replay(job: _Job, path: str, tensors: Mapping[str, Tensor], floats: Sequence[str], stream: Stream) -> None:
    """Fill a block that was finished earlier with what it computed with then, once the float one has moved the reference on."""
    source = job.source
    fill(job.model, source, path, dtype=job.compute, device=job.device)
    block = job.model.get_submodule(path)
    stream.advance_reference(block)
    for name in floats:
        set_float(block, name.removeprefix(f"{path}."), tensors[name])
    for name, settings in job.chosen.items():
        if name.startswith(f"{path}."):
            backend = BACKENDS[settings.backend]
            own = {
                key.removeprefix(f"{name}."): t.to(job.device)
                for key, t in tensors.items()
                if key.startswith(f"{name}.")
            }
            own.pop("bias", None)
            stored = torch_dtype(source.checkpoint.tensors[source.file_names[f"{name}.weight"]].dtype)
            use_dequantized(block, name.removeprefix(f"{path}."), own, backend, settings, stored)


def _forget(model: nn.Module, name: str) -> None:
    parameter = model.get_parameter(name)
    set_parameter(model, name, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))


def _empty(model: nn.Module, path: str) -> None:
    """Give a block's memory back, to the system."""
    for name, _ in list(model.get_submodule(path).named_parameters()):
        _forget(model, f"{path}.{name}")
    release_memory()


def _write_descriptions(partial: PartialFolder, job: _Job, recipe: Recipe, identity: Mapping[str, Any]) -> None:
    """Write everything but weights: index, config, the backend's own files, tokenizer, and the manifest of them all."""
    source = job.source
    weight_map = {name: shard for shard in job.shards for name in partial.record(shard)["names"]}
    total = sum(partial.path(shard).stat().st_size for shard in job.shards)
    partial.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

    scheme = {name: job.backend.format(settings, job.dtype) for name, settings in job.chosen.items()}
    left_out = [name for name in linear_paths(job.model) if name not in job.chosen]
    # The head has one name in published files and another in memory; readers look for either.
    if job.task == "causal-lm" and source.spec.published_head not in left_out:
        left_out.append(source.spec.published_head)
    description = job.backend.describe(scheme, left_out, job.dtype)
    config = {key: value for key, value in source.checkpoint.config.items() if key not in ("torch_dtype", "dtype")}
    config["dtype"] = config["torch_dtype"] = str(job.dtype).removeprefix("torch.")
    if description.quantization_config is not None:
        config["quantization_config"] = description.quantization_config
    partial.write_json("config.json", config)
    for name, content in description.files.items():
        partial.write_json(name, content)
    for name in TOKENIZER_FILES:
        file = source.checkpoint.path(name)
        if file is not None:
            partial.write_bytes(name, file.read_bytes())

    written = manifest.build(
        **identity,
        qlm=importlib.metadata.version("qlm"),
        outputs=partial.facts([name for name in partial.finished_names if name != manifest.NAME]),
        layers={name: facts for shard in job.shards for name, facts in partial.record(shard)["layers"].items()},
        choice=partial.record(FIGURE)["facts"] if recipe.quantize.budget_key is not None else None,
        blocks={
            path: facts
            for path, shard in zip(job.blocks, job.shards[1:], strict=True)
            if (facts := partial.record(shard)["block"])
        },
        bos=bos_rule(source.spec),
        config={key: value for key, value in source.config.to_dict().items() if key in KEY_CONFIG_VALUES},
    )
    partial.write_json(manifest.NAME, written)


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
        choice=written.get("choice"),
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
    section = quantize_section(section, calibration is not None)
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
    chosen = choose_settings(model, spec, section) if section.budget_key is None else {}
    for name, parameter in model.named_parameters():
        refuse_not_finite(name, parameter.detach())
    dtype = model.get_input_embeddings().weight.dtype
    stream: Stream | None = None
    if section.needs_calibration:
        if calibration is None:
            raise UsageError(f"calibration: backend {section.backend} needs token ids, int64 [samples, length]")
        check_windows(calibration, spec, model.config)
        device = str(model.get_input_embeddings().weight.device)
        if section.budget_key is not None:
            _, budget = budget_of(model, spec, section, dtype, [name for name, _ in model.named_parameters()])
            section = with_choice(
                section, choose_bits(model, spec, calibration, section, budget, progress=progress).options
            )
            chosen = choose_settings(model, spec, section)
        stream = stream_of(model, spec, blocks[0], calibration, device, section)
    facts: dict[str, dict[str, Any]] = {}
    for index, path in enumerate(blocks):
        if progress is not None:
            progress("quantize", index, len(blocks))
        block = model.get_submodule(path)
        before = {f"{path}.{name}": parameter.data.clone() for name, parameter in block.named_parameters()}
        quantized = quantize_block(block, path, spec, model.config, chosen, before.__getitem__, stream, dtype)
        if stream is not None and index + 1 < len(blocks):
            stream.advance(block)
        for name, result in quantized.linears.items():
            linear = model.get_submodule(name)
            shape = (linear.out_features, linear.in_features)
            bias = None if linear.bias is None else linear.bias.data
            owner, _, leaf = name.rpartition(".")
            how = backend.format(chosen[name], dtype)
            setattr(model.get_submodule(owner), leaf, backend.module(result.tensors, bias, shape, how, dtype).eval())
            facts[name] = result.facts
    return facts
