"""A base, a text and a recipe in, a PEFT adapter out: the run itself.

The loop is training/loop.py's; what is trained on what is training/job.py's. Here is what lies around them: quantizing the base first
where the recipe says so, the model with its adapter, what a run must agree in to go on where another was, and the output.
"""

import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlm import adapters
from qlm.arch import HEADS, Task
from qlm.calibrate import bos_rule
from qlm.checkpoint import manifest
from qlm.checkpoint.adapter import CONFIG, WEIGHTS, base_facts
from qlm.checkpoint.files import PartialFolder, check_output, tidy
from qlm.errors import CannotCreate, DataError, UsageError
from qlm.load import check_device, load, open_source
from qlm.quantize import KEY_CONFIG_VALUES, Progress, quantize
from qlm.recipe import FinetuneRecipe, Recipe, resolved_finetune
from qlm.training import loop as training_loop
from qlm.training import state as training_state
from qlm.training.data import shortened
from qlm.training.job import Job, Process, base_quantizing_recipe
from qlm.training.loop import TrainingLoop
from qlm.training.plan import TrainingPlan, plan_job, refuse_if_too_large
from qlm.training.report import training_report
from qlm.training.signals import Signals

CHECKPOINTS = "checkpoints"
METRICS, REPORT = "metrics.jsonl", "report.html"


@dataclass(frozen=True)
class FinetuneResult:
    """What was written.

    Attributes:
        output: the folder of the adapter. base: folder or name of the model that it belongs to; revision: of that, on the hub.
        task: that it was trained for.
        steps: of the whole run. resumed: steps that earlier, interrupted runs had done; all of them if the output was there already.
        training: facts of the manifest: trainable parameters, tokens, precision, optimizer, losses.
        metrics: the records of metrics.jsonl.
        float_base: name and revision of the float model that the base was quantized from in this run, if the adapter fits that as well.
    """

    output: Path
    base: str
    revision: str | None
    task: Task
    steps: int
    resumed: int
    training: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    float_base: tuple[str, str | None] | None = None

    def summary(self, seconds: float) -> dict[str, str]:
        """What somebody wants to know first, in words; `training` and `metrics` have the rest. `seconds` are those of the call."""
        training, before = self.training, f" ({self.resumed} of them were done before)" if self.resumed else ""
        changes: dict[str, str] = {}
        if training["loss"] is not None:
            changes["loss"] = "{first:.4f} -> {last:.4f} (first and last step)".format(**training["loss"])
        if training["validation"] is not None:
            first, last = (training["validation"][when] for when in ("before", "after"))
            for key, digits in (("validation_perplexity", 3), ("validation_accuracy", 4)):
                if key in first:
                    changes[key] = f"{first[key]:.{digits}f} -> {last[key]:.{digits}f}"
        return {
            "adapter": str(self.output),
            "base": self.base,
            "steps": f"{self.steps}{before}",
            "trainable_parameters": f"{training['trainable_parameters']:,}",
            "learned_from": f"{training['target_tokens']:,} {'tokens' if self.task == 'causal-lm' else 'labels'}",
            **shortened(training["data"], training["max_length"]),
            **changes,
            "seconds": f"{seconds:.1f}",
        }

    def next_commands(self) -> list[str]:
        """Commands that somebody may want next, as they are typed into a shell."""
        output, merged = map(shlex.quote, (str(self.output), f"{self.output}-merged"))

        def model(name: str, revision: str | None) -> str:
            return shlex.quote(name) + ("" if revision is None else f" --revision {shlex.quote(revision)}")

        apart = model(self.base, self.revision)
        # Onto the weights that nothing was lost of, where they are known.
        together = apart if self.float_base is None else model(*self.float_base)
        generate = f'qlm generate {apart} --adapter {output} --prompt "..."'
        merge = f"qlm merge {together} {output} --into float --output {merged}"
        return [generate, merge] if self.task == "causal-lm" else [merge]


def finetune(
    recipe: FinetuneRecipe,
    *,
    force: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    planned: Callable[[TrainingPlan], None] | None = None,
) -> FinetuneResult:
    """Train an adapter as the recipe says. Under `torchrun` or `accelerate launch` every process makes this call.

    Args:
        force: replace an output, or an unfinished one of another recipe, that is there already.
        device: where the model runs: "cpu", "cuda" or "cuda:N"; with several processes each takes its own GPU.
        progress: called with what is being done, how much of it is done, and how much there is.
        planned: called with what the run is going to need, before it starts; not when the output is there already.
    Raises:
        QlmError: one line. What cannot fit is refused before anything is made. Checkpoints stay in `<output>.partial/` for the next call.
        KeyboardInterrupt, or what the handler of SIGTERM raises: after the step in hand was finished and saved.
    """
    tell = progress or (lambda what, done, total: None)
    check_device(device)
    process = Process.here(device)
    output = Path(recipe.output)
    if not (output / manifest.NAME).is_file():
        # Before the base is made, which may take long. Whether an output of ours is of the same run is known afterwards.
        check_output(output, force)
    job = Job.open(recipe, process)
    is_there = not force and (output / manifest.NAME).is_file()
    if process.is_main and not (is_there and _has_base(recipe)):
        needs = plan_job(recipe, job, process)
        refuse_if_too_large(recipe, needs)
        if planned is not None:
            planned(needs)
    process.wait()
    base = _base(recipe, process, force, tell)
    if base != recipe.model:
        job = job.on(base)
    tell("hash input", 0, 1)
    files = manifest.input_facts(job.source.checkpoint.files())
    identity = _identity(recipe, job, process, files)
    tell("hash input", 1, 1)
    if not force and manifest.is_made(output, identity):
        if process.is_main:
            tidy(output)
        return _result(recipe, output, base, job.steps)
    process.wait()
    with PartialFolder(output, identity, force) if process.is_main else nullcontext() as partial:
        if partial is not None:
            partial.state_folder(CHECKPOINTS)
        process.wait()
        checkpoints = output.with_name(output.name + ".partial") / CHECKPOINTS
        resumed, loop = _train(recipe, job, process, checkpoints, tell)
        tensors, config = adapters.files_of(loop.adapter_model(), base)
        if partial is not None:
            partial.write_tensors(WEIGHTS, tensors)
            partial.write_json(CONFIG, config)
            partial.write_bytes(METRICS, training_state.metrics_lines(loop.metrics))
            training = _training_facts(job, loop)
            page = training_report(identity["recipe"], training, identity["versions"], loop.metrics)
            partial.write_bytes(REPORT, page.encode())
            _write_manifest(partial, identity, job, training, files)
            partial.commit(partial.finished_names)
    process.wait()
    return _result(recipe, output, base, resumed)


def _has_base(recipe: FinetuneRecipe) -> bool:
    """Whether there is something to train on before this call makes it."""
    return recipe.quantize is None or (Path(recipe.base_output) / manifest.NAME).is_file()


def _base(recipe: FinetuneRecipe, process: Process, force: bool, tell: Progress) -> str:
    """The model that is trained on: as it is, or quantized into a folder of its own first, by one process."""
    quantizing = base_quantizing_recipe(recipe)
    if quantizing is None:
        return recipe.model
    if process.is_main:
        _quantize(quantizing, recipe.output, process, force, tell)
    process.wait()
    return quantizing.output


def _quantize(recipe: Recipe, adapter: str, process: Process, force: bool, tell: Progress) -> None:
    try:
        quantize(recipe, device=str(process.device), progress=tell)
    except (CannotCreate, UsageError, DataError) as error:
        # One that is there and is another's, or damaged. --force is for starting over, not for doing the same again.
        if not force:
            raise type(error)(_as_base(str(error), recipe.output, adapter)) from None
        quantize(recipe, force=True, device=str(process.device), progress=tell)


def _as_base(message: str, base: str, adapter: str) -> str:
    """The message, which says of the folder that it begins with that this is a base, where it is one: the recipe may not name it."""
    place, _, what = message.partition(": ")
    folders = Path(os.path.abspath(base)), Path(os.path.abspath(f"{base}.partial"))
    if any(Path(os.path.abspath(place)).is_relative_to(folder) for folder in folders):
        return f"{place} (the base of {adapter}): {what}"
    return message


def saved_step(recipe: FinetuneRecipe) -> int | None:
    """The step that an interrupted run goes on from; None where it has none."""
    output = Path(recipe.output)
    return max(training_state.steps(output.with_name(f"{output.name}.partial") / CHECKPOINTS), default=None)


# What changes no byte of the output: where it lies, how often a run is saved and what else is shown of it.
_WITHOUT_EFFECT = ("save_every", "tensorboard")


def _identity(
    recipe: FinetuneRecipe, job: Job, process: Process, files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that the output's bytes depend on. A resumed run must agree in all of it.

    Args:
        files: {name: {"bytes", "sha256"}} of the base's files.
    """
    plain = resolved_finetune(recipe)
    plain.pop("output")
    for key in _WITHOUT_EFFECT:
        plain["train"].pop(key, None)
    if Path(recipe.model).is_dir():
        plain["model"] = Path(recipe.model).resolve().name
    for section, key in (("train", "data"), ("train", "validation"), ("calibration", "data")):
        if plain.get(section) and isinstance(plain[section].get(key), str):
            plain[section][key] = Path(plain[section][key]).name
    data = {f"train.{key}: {facts['data']}": {"sha256": facts["sha256"]} for key, facts in job.facts.items()}
    packages = ("qlm", "torch", "transformers", "tokenizers", "peft", "accelerate")
    where = {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "cpu",
        "precision": job.precision,
        **({"sharded": "FSDP2"} if process.sharded else {}),
        "optimizer": job.optimizer,
        "processes": str(process.count),
    }
    return {
        "recipe": plain,
        "inputs": {**files, **data},
        "versions": {name: importlib.metadata.version(name) for name in packages} | where,
        "seed": recipe.train.seed,
        "threads": torch.get_num_threads(),
    }


def _training_facts(job: Job, loop: TrainingLoop) -> dict[str, Any]:
    measured = [record for record in loop.metrics if "validation_loss" in record]
    steps = [record for record in loop.metrics if "loss" in record]
    trained = training_state.trainable(loop.adapter_model())
    return {
        "steps": job.steps,
        "trainable_parameters": sum(parameter.numel() for parameter in trained.values()),
        "target_tokens": sum(record["tokens"] for record in steps),
        "rows": len(job.rows),
        "validation_rows": len(job.validation),
        "max_length": job.max_length,
        "precision": job.precision,
        "optimizer": job.optimizer,
        "gradient_checkpointing": job.checkpointing,
        "data": job.facts,
        **({"labels": job.labels} if job.labels is not None else {}),
        "loss": {"first": steps[0]["loss"], "last": steps[-1]["loss"]} if steps else None,
        "validation": {"before": measured[0], "after": measured[-1]} if measured else None,
    }


def _write_manifest(
    partial: PartialFolder,
    identity: Mapping[str, Any],
    job: Job,
    training: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    written = manifest.build(
        **identity,
        qlm=importlib.metadata.version("qlm"),
        outputs=partial.facts([name for name in partial.finished_names if name != manifest.NAME]),
        layers={},
        bos=bos_rule(job.source.spec),
        config={key: value for key, value in job.source.config.to_dict().items() if key in KEY_CONFIG_VALUES},
        training=training,
        base=base_facts(job.base, job.revision, files),
    )
    partial.write_json(manifest.NAME, written)


def _result(recipe: FinetuneRecipe, output: Path, base: str, resumed: int) -> FinetuneResult:
    written = manifest.read(output)
    training, quantized = written["training"], recipe.quantize is not None
    revision = None if quantized else recipe.revision
    # Smoothed weights are others than the float ones.
    floats = (recipe.model, recipe.revision) if quantized and not written["base"]["smoothed"] else None
    metrics = [json.loads(line) for line in (output / METRICS).read_text("utf-8").splitlines()]
    return FinetuneResult(output, base, revision, recipe.task, training["steps"], resumed, training, metrics, floats)


# --- the run ----------------------------------------------------------------------------------------------------------


def _train(
    recipe: FinetuneRecipe, job: Job, process: Process, checkpoints: Path, tell: Progress
) -> tuple[int, TrainingLoop]:
    """Steps that were done before, and the loop after the last one."""
    state = training_state.load_newest(checkpoints) if process.is_main else None
    process.wait()
    if not process.is_main:
        # The main process has removed or passed over what is damaged.
        state = training_state.load_newest(checkpoints)
    model = _model(recipe, job, process)
    arguments = training_loop.training_arguments(recipe.train, job, process, checkpoints)
    with Signals() as signals:
        loop = training_loop.trainer_class()(model, arguments, job, process, checkpoints, tell, signals)
        if recipe.train.tensorboard and process.is_main:
            loop.add_callback(training_loop.tensorboard(Path(recipe.output)))
        # Each process drops out other features.
        torch.manual_seed(recipe.train.seed + process.rank)
        loop.run(state)
    signals.pass_on()
    return (0 if state is None else state.step), loop


def _model(recipe: FinetuneRecipe, job: Job, process: Process) -> Any:
    """The base with a fresh adapter, on this process's device."""
    torch.manual_seed(recipe.train.seed)
    model = load(
        job.base,
        revision=job.revision,
        task=job.task,
        device=str(process.device),
        # float16 is autocast's affair alone.
        dtype=torch.bfloat16 if job.precision == "bfloat16" else torch.float32,
        attn_implementation=recipe.attn_implementation,
        new_head=job.task != "causal-lm",
    )
    if job.precision == "float16":
        for module in model.modules():
            # bitsandbytes' 4-bit linears, which autocast does not reach, say themselves what they multiply in.
            if getattr(module, "compute_dtype", None) is not None:
                module.compute_dtype = torch.float16
    if model.config.pad_token_id is None:
        model.config.pad_token_id = job.pad_id
    if job.labels is not None and len(job.labels) != model.config.num_labels:
        adapters.resize_head(model, HEADS[job.task], len(job.labels))
    adapted = adapters.attach(
        model, job.source.spec, recipe.adapter, job.task, recipe.train.seed, float_weight=_float_weights(recipe, job)
    )
    for parameter in training_state.trainable(adapted).values():
        # A head in full comes in the base's dtype; small steps are lost in bfloat16.
        parameter.data = parameter.data.float()
    return adapted


def _float_weights(recipe: FinetuneRecipe, job: Job) -> Callable[[str], Tensor] | None:
    """Where `initialization: svd` finds the weights that the base was quantized from."""
    if recipe.adapter.initialization != "svd" or recipe.quantize is None:
        return None
    task: Task = "base" if job.task != "causal-lm" else job.task
    source, _ = open_source(recipe.model, revision=recipe.revision, task=task)
    # A base alone has no prefix before its blocks.
    prefix = "" if task == "causal-lm" else f"{source.spec.prefix}."
    return lambda path: source.read(f"{path.removeprefix(prefix)}.weight", torch.float32)
