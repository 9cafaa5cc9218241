"""An adapter into the weights of its base: a float checkpoint, or one that is quantized anew; and how far that is from the two apart.

W' = W + scaling * B A in float32, stored in the checkpoint's dtype, one block in memory at a time. Onto the float weights where the
base is a float checkpoint, else onto what its quantized weights stand for; the result says which. Adding to 4-bit weights in place, as
PEFT and bitsandbytes do, would round them a second time to nearest: here the merged float weights are quantized by `quantize`, with
calibration where its settings look at any.

What it refuses: an adapter whose manifest names another base. An output appears complete or not at all; the float weights lie in
`<output>.partial/` until they have been quantized, and go with it. The same call after a kill goes on from the last finished block.
"""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qlm.adapters import apply_adapter, linear_shapes
from qlm.arch import HEADS, Task
from qlm.calibrate import Text, bos_rule, calibration_dtype, read_text, text_ids, window_length
from qlm.checkpoint import manifest
from qlm.checkpoint.adapter import Adapter, Delta, float_folder, read_adapter, refuse_other_base
from qlm.checkpoint.expected import published_name
from qlm.checkpoint.files import PartialFolder, remove_tree, tidy
from qlm.errors import DataError, QlmError, UsageError
from qlm.evaluate import Evaluation, evaluate
from qlm.load import Source, block_paths, check_device, load, load_tokenizer, open_source
from qlm.memory import release_memory
from qlm.quantize import INDEX, KEY_CONFIG_VALUES, TOKENIZER_FILES, Progress, QuantizeResult, quantize, shard_name
from qlm.recipe import CalibrationRecipe, EvaluateRecipe, QuantizeRecipe, Recipe, quantize_section, resolved

Into = Literal["float", "nf4", "gptq", "int8"]
FLOAT = "float"


@dataclass(frozen=True)
class MergeResult:
    """What was written.

    Attributes:
        output: the folder.
        into: "float", or the backend that the merged weights were quantized by.
        onto: what the adapter was added to: "float weights", or "dequantized nf4 weights"; with a hint where the float ones are there.
        base: how the adapter is known to belong to its base, or that this is not on record.
        linears: how many had an adapter.
        bytes: of all weights in the output.
        quantized: of the second step, if there was one.
        evaluation: of the merged model, its baseline being the base with the adapter on top; None where it was not asked for.
        was_there: whether the output was there already, and stayed as it was.
    """

    output: Path
    into: str
    onto: str
    base: str
    linears: int
    bytes: int
    quantized: QuantizeResult | None
    evaluation: Evaluation | None
    was_there: bool


@torch.no_grad()
def merge(
    base: str | Path,
    adapter: str | Path,
    into: str,
    output: str | Path,
    *,
    quantize_settings: QuantizeRecipe | Mapping[str, Any] | None = None,
    calibration: CalibrationRecipe | None = None,
    evaluate_on: EvaluateRecipe | None = None,
    revision: str | None = None,
    attn_implementation: str = "sdpa",
    force: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> MergeResult:
    """Merge an adapter into its base.

    Args:
        base: a float checkpoint or a quantized one: the one that the adapter was trained on, or the float one that that was made from.
        adapter: a folder of PEFT's; one that qlm wrote says which base it is for.
        into: "float", "nf4", "gptq" or "int8".
        quantize_settings: a recipe's `quantize` section, for the last three; their defaults when left out.
        calibration: what quantizing looks at; gptq needs it.
        evaluate_on: text to measure on; the base with its adapter and the merged model are in memory together then.
        revision: of a base on the hub.
        force: replace an output, or an unfinished one of another merge, that is there already.
    Raises:
        QlmError: one line; nothing is half-written.
    """
    tell = progress or (lambda what, done, total: None)
    check_device(device)
    job = _Job.open(
        base, adapter, into, output, quantize_settings, calibration, evaluate_on, revision, attn_implementation
    )
    text = read_text(evaluate_on) if evaluate_on is not None else None
    tell("hash input", 0, 1)
    identity = job.identity(device)
    known = refuse_other_base(job.adapter, job.source.checkpoint.folder, job.base_files)
    tell("hash input", 1, 1)

    folder, quantized = Path(output), None
    was_there = not force and manifest.is_made(folder, identity)
    if was_there:
        tidy(folder)
    else:
        with PartialFolder(folder, identity, force) as partial:
            if into == FLOAT:
                _write_float(job, partial, identity, tell)
            else:
                quantized = _write_quantized(job, partial, identity, device, tell)
            partial.commit(partial.finished_names)
    written, onto = manifest.read(folder), job.onto
    floats = None if job.source.backend is None or not Path(base).is_dir() else float_folder(Path(base))
    if floats is not None:
        onto += f" of {base}; the float weights are in {floats}: give that folder as BASE to merge onto them"
    evaluation = None
    if evaluate_on is not None and text is not None:
        evaluation = _compare(job, folder, evaluate_on, text, device, tell)
    return MergeResult(
        output=folder,
        into=into,
        onto=onto,
        base=known,
        linears=len(job.deltas),
        bytes=sum(file["bytes"] for name, file in written["outputs"].items() if name.endswith(".safetensors")),
        quantized=quantized,
        evaluation=evaluation,
        was_there=was_there,
    )


@dataclass(frozen=True)
class _Job:
    """What one call of `merge` works on.

    Attributes:
        name: of the base, for manifests.
        model: the skeleton of the base; nothing is ever read into it.
        deltas: path of each adapted linear to what is added to its weight.
        heads: name in memory of each parameter of a task's head that the adapter holds.
        config: config.json of the merged float checkpoint.
        section: how that is quantized; None where it is not.
        base_files: {name: {"bytes", "sha256"}} of the base's files.
    """

    name: str
    source: Source
    model: Any
    task: Task
    adapter: Adapter
    deltas: dict[str, Delta]
    heads: dict[str, Tensor]
    config: dict[str, Any]
    into: str
    section: QuantizeRecipe | None
    calibration: CalibrationRecipe | None
    attn_implementation: str
    base_files: dict[str, dict[str, Any]]

    @classmethod
    def open(
        cls,
        base: str | Path,
        adapter_folder: str | Path,
        into: str,
        output: str | Path,
        settings: QuantizeRecipe | Mapping[str, Any] | None,
        calibration: CalibrationRecipe | None,
        evaluate_on: EvaluateRecipe | None,
        revision: str | None,
        attn_implementation: str,
    ) -> "_Job":
        """Read the adapter and the base's headers, and hash the base's files.

        Args:
            settings: the `quantize` section of `merge`; the other arguments are those of the same names there.
        Raises:
            UsageError: arguments that do not fit together. DataError, MissingInput: a base or an adapter that is not whole, or does not
                fit the other.
        """
        section = _section(into, settings, calibration)
        adapter = read_adapter(adapter_folder)
        if evaluate_on is not None and adapter.task != "causal-lm":
            raise UsageError(
                f"evaluate: {adapter.folder} is for {adapter.task}; only causal-lm has a perplexity: leave it out"
            )
        source, model = open_source(
            base, revision=revision, task=adapter.task, attn_implementation=attn_implementation, new_head=True
        )
        if source.backend is not None and source.backend.name == "quanto":
            raise UsageError(f"base: {base} is stored by quanto, which takes no adapter; give the float checkpoint")
        for folder in (source.checkpoint.folder, adapter.folder):
            if Path(output).resolve() in (folder.resolve(), *folder.resolve().parents):
                raise UsageError(f"output: {output} holds {folder}, which is read; give a folder of its own")
        adapter.check(linear_shapes(model, source.spec), _head_shapes(model, adapter.task), source.spec.model_type)
        return cls(
            name=Path(base).resolve().name if Path(base).is_dir() else str(base),
            source=source,
            model=model,
            task=adapter.task,
            adapter=adapter,
            deltas=adapter.deltas(),
            heads={name: torch.from_numpy(value) for name, value in adapter.heads().items()},
            config=_config(source, adapter),
            into=into,
            section=section,
            calibration=calibration,
            attn_implementation=attn_implementation,
            base_files=manifest.input_facts(source.checkpoint.files()),
        )

    @property
    def onto(self) -> str:
        """What the adapter is added to, in words."""
        return "float weights" if self.source.backend is None else f"dequantized {self.source.backend.name} weights"

    def recipe(self, model: Path, output: Path) -> Recipe:
        """That quantizes the merged float checkpoint."""
        assert self.section is not None
        values: dict[str, Any] = {
            "model": str(model), "task": self.task, "attn_implementation": self.attn_implementation, "quantize": self.section,
            "calibration": self.calibration, "output": str(output),
        }  # fmt: skip
        return Recipe(**values)

    def identity(self, device: str) -> dict[str, Any]:
        """Everything that the output's bytes depend on."""
        recipe: dict[str, Any] = {
            "merge": {
                "base": self.name, "adapter": self.adapter.folder.resolve().name, "task": self.task, "into": self.into,
                "onto": self.onto,
            }
        }  # fmt: skip
        inputs = {f"base: {name}": facts for name, facts in self.base_files.items()}
        inputs |= {f"adapter: {name}": facts for name, facts in self.adapter.facts().items()}
        versions = {name: importlib.metadata.version(name) for name in ("qlm", "torch", "transformers", "tokenizers")}
        versions["machine"] = platform.machine()
        if self.section is not None:
            plain = resolved(self.recipe(Path("merged"), Path("output")))
            recipe |= {key: plain[key] for key in ("quantize", "calibration", "attn_implementation")}
            versions["calibration_dtype"] = str(calibration_dtype(device)).removeprefix("torch.")
            versions["device"] = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
        if self.calibration is not None:
            text = read_text(self.calibration)
            if isinstance(self.calibration.data, str):
                recipe["calibration"]["data"] = text.description
            inputs[f"calibration: {text.description}"] = {"sha256": text.sha256, "bytes": len(text.joined.encode())}
        return {
            "recipe": recipe,
            "inputs": inputs,
            "versions": versions,
            "seed": self.calibration.seed if self.calibration is not None else 0,
            "threads": torch.get_num_threads(),
        }

    def names(self) -> list[str]:
        """Names in memory of the parameters that the merged checkpoint holds, in the order of the model."""
        stored = set(self.source.stored_names()) | {
            # What quantized linears stand for.
            f"{path}.weight" for path in self.source.scheme
        }  # fmt: skip
        return [
            name
            for name, _ in self.model.named_parameters(remove_duplicate=False)
            if name in stored or name in self.heads
        ]

    def merged(self, name: str) -> tuple[Tensor, dict[str, Any] | None]:
        """A parameter of the merged checkpoint, and facts of it where the adapter has a part in it.

        Raises:
            DataError: it does not fit into its dtype.
        """
        path = name.removesuffix(".weight")
        if name in self.heads:
            return _as(self.heads[name], self.source.dtype, name), None
        if path in self.source.scheme and name.endswith(".weight"):
            weight, dtype = self._dequantized(path), self.source.dtype
        else:
            weight = self.source.read(name)
            dtype = weight.dtype
        delta = self.deltas.get(path) if name.endswith(".weight") else None
        if delta is None:
            return _as(weight, dtype, name), None
        added = delta.scaling * (torch.from_numpy(delta.b) @ torch.from_numpy(delta.a))
        before, change = float(weight.float().norm()), float(added.norm())
        facts = {
            "method": "merged", "r": len(delta.a), "scaling": delta.scaling, "relative_change": change / before if before else 0.0
        }  # fmt: skip
        return _as(weight.float() + added, dtype, name), facts

    def _dequantized(self, path: str) -> Tensor:
        backend, how = self.source.backend, self.source.scheme[path]
        assert backend is not None
        linear = self.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        shape = (linear.out_features, linear.in_features)
        return backend.dequantize({s: self.source.read(f"{path}.{s}") for s in backend.layout(shape, how)}, shape, how)


def _head_shapes(model: Any, task: Task) -> dict[str, tuple[int, ...]]:
    """Name of each parameter of the task's head to its shape; how many labels it has is the adapter's to say, and -1 here."""
    head = HEADS.get(task)
    if head is None:
        return {}
    shapes = {f"{head}.{name}": tuple(p.shape) for name, p in getattr(model, head).named_parameters()}
    if task == "question-answering":
        return shapes
    return {name: (-1, *shape[1:]) for name, shape in shapes.items()}


def _section(
    into: str, settings: QuantizeRecipe | Mapping[str, Any] | None, calibration: CalibrationRecipe | None
) -> QuantizeRecipe | None:
    """How to quantize what was merged, or None. Raises UsageError where the arguments do not fit together."""
    if into not in get_args(Into):
        raise UsageError(f"into: found {into!r}; allowed: {', '.join(get_args(Into))}")
    if into == FLOAT:
        if settings is not None or calibration is not None:
            given = "quantize settings" if settings is not None else "calibration"
            raise UsageError(f"into: float quantizes nothing, so {given} would have no effect; leave them out")
        return None
    section = quantize_section({"backend": into} if settings is None else settings, calibration is not None)
    if section.backend != into:
        raise UsageError(
            f"quantize.backend: found {section.backend}, but the merged model goes into {into}; make them one"
        )
    if section.needs_calibration and calibration is None:
        way_out = "" if into == "gptq" else ", or quality fast, which looks at no text"
        raise UsageError(
            f"calibration: missing; {into} with quality {section.quality} needs a text; give one (--calibration FILE){way_out}"
        )
    if calibration is not None and not section.needs_calibration:
        raise UsageError(f"calibration: {into} with quality {section.quality} looks at no text; leave it out")
    return section


def _config(source: Source, adapter: Adapter) -> dict[str, Any]:
    """config.json of the merged float checkpoint."""
    config = {key: value for key, value in source.checkpoint.config.items() if key != "quantization_config"}
    if source.backend is not None:
        config["dtype"] = config["torch_dtype"] = str(source.dtype).removeprefix("torch.")
    if adapter.task in ("sequence-classification", "token-classification"):
        count = len(next(iter(adapter.heads().values())))
        names = adapter.labels()
        if len(names) != count and count != source.config.num_labels:
            names = [f"LABEL_{i}" for i in range(count)]
        if len(names) == count:
            config.pop("num_labels", None)
            config["id2label"] = {str(i): name for i, name in enumerate(names)}
            config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def _as(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    converted = tensor.to(dtype).contiguous()
    if converted.is_floating_point() and not bool(converted.isfinite().all()):
        raise DataError(
            f"{name}: with the adapter it reaches {tensor.abs().max().item():.6g}, which does not fit into {dtype}; "
            "convert the base to bfloat16 or float32"
        )
    return converted


# --- writing ------------------------------------------------------------------------------------------------------------


def _write_float(job: _Job, partial: PartialFolder, identity: Mapping[str, Any], tell: Progress) -> None:
    """The merged float checkpoint: a shard a block, and the first for what lies outside the blocks."""
    source, blocks = job.source, block_paths(job.source.spec, job.model)
    shards = [shard_name(index, len(blocks) + 1) for index in range(len(blocks) + 1)]
    names = job.names()
    inside = tuple(f"{path}." for path in blocks)
    parts = [[n for n in names if not n.startswith(inside)], *([n for n in names if n.startswith(i)] for i in inside)]
    # What lies outside the blocks last, as `quantize` has it.
    for index, (shard, part) in enumerate([*zip(shards[1:], parts[1:], strict=True), (shards[0], parts[0])]):
        tell("merge", index, len(shards))
        if not partial.finished(shard):
            tensors: dict[str, Tensor] = {}
            layers: dict[str, Any] = {}
            for name in part:
                tensors[published_name(source.spec, name, job.task)], facts = job.merged(name)
                if facts is not None:
                    layers[name.removesuffix(".weight")] = facts
            partial.write_tensors(shard, tensors, record={"names": list(tensors), "layers": layers})
            del tensors
            release_memory()
    tell("merge", len(shards), len(shards))
    weight_map = {name: shard for shard in shards for name in partial.record(shard)["names"]}
    total = sum(partial.path(shard).stat().st_size for shard in shards)
    partial.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    partial.write_json("config.json", job.config)
    for name in TOKENIZER_FILES:
        file = source.checkpoint.path(name)
        if file is not None:
            partial.write_bytes(name, file.read_bytes())
    layers = {name: facts for shard in shards for name, facts in partial.record(shard)["layers"].items()}
    partial.write_json(
        manifest.NAME,
        manifest.build(
            **identity,
            qlm=importlib.metadata.version("qlm"),
            outputs=partial.facts([name for name in partial.finished_names if name != manifest.NAME]),
            layers=layers,
            bos=bos_rule(source.spec),
            config={key: value for key, value in source.config.to_dict().items() if key in KEY_CONFIG_VALUES},
        ),
    )


def _write_quantized(
    job: _Job, partial: PartialFolder, identity: Mapping[str, Any], device: str, tell: Progress
) -> QuantizeResult:
    """The merged checkpoint, quantized, by way of the float one in a folder that goes when the output appears."""
    steps = partial.state_folder("steps")
    merged, made = steps / "merged", steps / "quantized"
    float_identity = {**identity, "recipe": {"merge": {**identity["recipe"]["merge"], "into": FLOAT}}}
    try:
        if not manifest.is_made(merged, float_identity):
            with PartialFolder(merged, float_identity) as floats:
                _write_float(job, floats, float_identity, tell)
                floats.commit(floats.finished_names)
        result = quantize(job.recipe(merged, made), device=device, progress=tell)
    except QlmError:
        # Quantized blocks stay for the next run; float weights alone, of settings that were refused, do not.
        if not (steps / "quantized.partial").is_dir():
            remove_tree(merged)
        raise
    written = manifest.read(made)
    # A shard at a time. Links instead of copies would make two folders of one file.
    for name in written["outputs"]:
        partial.write_bytes(name, (made / name).read_bytes())
    partial.write_json(
        manifest.NAME,
        manifest.build(
            **{
                **{key: value for key, value in written.items() if key not in ("format", "checksum")},
                # The base and the adapter, which the float weights in between were made from, in the place of those.
                **identity,
                "outputs": partial.facts(list(written["outputs"])),
            }
        ),
    )
    return replace(result, output=partial.output)


# --- measuring ----------------------------------------------------------------------------------------------------------


def _compare(job: _Job, output: Path, section: EvaluateRecipe, text: Text, device: str, tell: Progress) -> Evaluation:
    """Perplexity of the merged model and of the base with the adapter on top, and the KL divergence of the first from the second."""
    spec = job.source.spec
    apart = load(job.source.checkpoint.folder, device=device, attn_implementation=job.attn_implementation)
    # The protocol asks transformers' model for its last hidden state; the adapters are inside that.
    apart = apply_adapter(apart, job.adapter.folder).get_base_model()
    merged = load(output, device=device, attn_implementation=job.attn_implementation)
    length = window_length(section.length, int(getattr(merged.config, spec.positions)))
    ids = text_ids(load_tokenizer(output), text.joined, spec)
    return evaluate(
        merged, ids, length=length, baseline=apart, windows=section.windows, data_sha256=text.sha256, bos=bos_rule(spec),
        progress=lambda done, total: tell("evaluate", done, total),
    )  # fmt: skip
