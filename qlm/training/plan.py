"""What a fine-tuning run needs: memory, disk and time, before it starts. Nothing is loaded but the data.

Memory is that of the device that trains: the base as it lies there, the adapter with its gradients and the optimizer's moments, and
what a backward pass finds again. Per token and block that is, beside what the norms and the attention keep, the input of each adapted
linear, which LoRA's A multiplies in float32, and its output.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlm.adapters import choose_targets, linear_shapes
from qlm.backends import BACKENDS
from qlm.blocks import choose_settings
from qlm.errors import Unavailable, UsageError
from qlm.load import block_paths, open_source
from qlm.plan import (
    PROCESS_BYTES,
    available_memory,
    free_disk,
    gigabytes,
    matmul_rate,
    plan,
    refuse_small_disk,
    stored_bytes,
)
from qlm.recipe import SVD_BITS, FinetuneRecipe, LinearSettings
from qlm.training.data import shortened
from qlm.training.job import Job, Process, base_quantizing_recipe
from qlm.training.language_loss import logits_bytes

# What peft, accelerate and the Trainer take beside what a process has anyway; measured 150 to 200 MB.
LIBRARIES_BYTES = 200_000_000
# Imports, opening the base, putting the adapter on it.
START_SECONDS = 10.0
# Parameter, gradient and two moments in float32; with an 8-bit optimizer the moments take a byte each.
ADAM_BYTES, ADAM_8BIT_BYTES = 16, 10


@dataclass(frozen=True)
class TrainingPlan:
    """What a run needs.

    Attributes:
        steps: of the run. tokens_per_step: at most, over all processes.
        trainable: parameters of the adapter; a task's head is not counted.
        base_memory, adapter_memory, activation_memory: bytes on the device that trains.
        memory: all of that, with what the process takes where the device is the CPU, or the most that making the base takes.
        memory_available: on that device; on a GPU that is not there, -1.
        disk, disk_free: bytes of the base that is made, the adapter and the checkpoints.
        seconds: of making the base and of training on this CPU; -1 for a GPU.
        shortened: samples that are cut or left out, in words; None where none is.
    """

    steps: int
    tokens_per_step: int
    trainable: int
    base_memory: int
    adapter_memory: int
    activation_memory: int
    memory: int
    memory_available: int
    disk: int
    disk_free: int
    seconds: float
    shortened: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def in_words(self) -> str:
        """One line."""
        there = "" if self.memory_available < 0 else f" of {gigabytes(self.memory_available)}"
        time = f"{self.seconds:.0f} s" if self.seconds < 90 else f"{self.seconds / 60:.0f} min"
        about = "" if self.seconds < 0 else f", about {time}"
        shortened = "" if self.shortened is None else f"; {self.shortened}"
        return (
            f"{self.steps} steps of at most {self.tokens_per_step} tokens, {self.trainable} parameters to learn: needs about "
            f"{gigabytes(self.memory)}{there} of memory, {gigabytes(self.disk)} of disk{about}{shortened}"
        )


def plan_training(recipe: FinetuneRecipe, device: str = "cpu") -> TrainingPlan:
    """Predict what the recipe needs. Raises what `finetune` would raise for a wrong recipe, checkpoint or text."""
    process = Process(torch.device(device), 0, 1)
    return plan_job(recipe, Job.open(recipe, process), process)


def plan_job(recipe: FinetuneRecipe, job: Job, process: Process) -> TrainingPlan:
    """The same, of each of the processes, for a job on the recipe's model: a base that is yet to be made has its sizes and its tokens."""
    spec, train = job.source.spec, recipe.train
    model, base = _base_bytes(recipe, job)
    targets = choose_targets(list(linear_shapes(model, spec)), spec, recipe.adapter.targets)
    if recipe.adapter.initialization == "svd" and recipe.quantize is not None:
        refuse_many_bits(targets, choose_settings(model, spec, recipe.quantize))
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in targets}
    trainable = sum(recipe.adapter.r * sum(shape) for shape in shapes.values())
    adapter = trainable * (ADAM_BYTES if job.optimizer == "adamw" else ADAM_8BIT_BYTES)
    tokens = train.batch_size * job.max_length
    activations = _activation_bytes(recipe, job, model, shapes, tokens)
    on_cpu = process.device.type == "cpu"
    memory = base + adapter + activations + (PROCESS_BYTES + LIBRARIES_BYTES if on_cpu else 0)
    # Two checkpoints with parameters and moments, one more while it is written, and the adapter itself.
    disk, seconds = trainable * (3 * 12 + 4), 0.0
    quantizing = base_quantizing_recipe(recipe)
    if quantizing is not None and not Path(recipe.base_output).exists():
        needs = plan(quantizing, str(process.device))
        of_base = needs.quantize_memory if needs.gpu_quantize_memory is None else needs.gpu_quantize_memory
        memory, disk, seconds = max(memory, of_base), disk + needs.disk, needs.quantize_seconds
    per_step = tokens * train.gradient_accumulation * process.count
    lost = shortened(job.facts, job.max_length)
    return TrainingPlan(
        steps=job.steps,
        tokens_per_step=per_step,
        trainable=trainable,
        base_memory=base,
        adapter_memory=adapter,
        activation_memory=activations,
        memory=memory,
        memory_available=available_memory() if on_cpu else _gpu_memory(process.device),
        disk=disk,
        disk_free=free_disk(Path(recipe.output)),
        seconds=round(seconds + _seconds(recipe, job, model), 1) if on_cpu else -1.0,
        shortened="; ".join(f"{key.replace('_', ' ')}: {words}" for key, words in lost.items()) or None,
    )


def refuse_if_too_large(recipe: FinetuneRecipe, needs: TrainingPlan) -> None:
    """Raises CannotCreate where the disk is too small, Unavailable where memory is: now, and not after an hour."""
    refuse_small_disk(recipe.output, needs.disk, needs.disk_free)
    if 0 <= needs.memory_available < needs.memory:
        raise Unavailable(
            f"training {recipe.model} needs about {gigabytes(needs.memory)} of memory, and {gigabytes(needs.memory_available)} are "
            "available; use a smaller train.batch_size with more gradient_accumulation, a smaller max_length, gradient_checkpointing: "
            "true, or quantize: {backend: nf4}"
        )


def refuse_many_bits(targets: Sequence[str], chosen: Mapping[str, LinearSettings]) -> None:
    """For `initialization: svd`, before the base is made: refuse linears that `skip` or `overrides` leave in floats or in more bits.

    Args:
        targets: paths of the linears that get an adapter. chosen: of those that are quantized, with what is done to them.
    """
    for path in targets:
        if path not in chosen or chosen[path].bits > SVD_BITS:
            found = f"has {chosen[path].bits} bits" if path in chosen else "stays in floats"
            raise UsageError(
                f"adapter.initialization: svd is for {SVD_BITS} bits and less, and {path} {found}; leave it out of adapter.targets, or use "
                "standard"
            )


def _base_bytes(recipe: FinetuneRecipe, job: Job) -> tuple[Any, int]:
    """The skeleton, and the bytes that the base takes where it computes."""
    source, model = open_source(
        recipe.model, revision=recipe.revision, task=recipe.task, new_head=recipe.task != "causal-lm"
    )
    itemsize = 2 if job.precision == "bfloat16" else 4
    scheme, backend = source.scheme, source.backend
    if recipe.quantize is not None and recipe.quantize.budget_key is None:
        backend = BACKENDS[recipe.quantize.backend]
        chosen = choose_settings(model, source.spec, recipe.quantize)
        scheme = {name: backend.format(settings, source.dtype) for name, settings in chosen.items()}
    total = 0
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        if path in scheme and backend is not None:
            total += stored_bytes(backend, (parameter.shape[0], parameter.shape[1]), scheme[path])
        else:
            total += parameter.numel() * itemsize
    return model, total


def _activation_bytes(
    recipe: FinetuneRecipe, job: Job, model: Any, adapted: dict[str, tuple[int, ...]], tokens: int
) -> int:
    """What a backward pass over so many tokens finds again, at most."""
    config, spec = job.source.config, job.source.spec
    itemsize = 2 if job.precision != "float32" else 4
    width, layers = int(getattr(config, spec.hidden_size)), int(getattr(config, spec.layers))
    block = block_paths(spec, model)[0]
    linears = {name: shape for name, shape in linear_shapes(model, spec).items() if name.startswith(f"{block}.")}
    kept = sum(shape[0] * itemsize for shape in linears.values())
    # The norms' inputs, the attention's own, and the MLP's activation; the residual stream is among them.
    kept += (6 * width + max(max(shape) for shape in linears.values())) * itemsize
    for name, (_, inputs) in linears.items():
        if name in adapted:
            # In float32 for A, and what dropout let through, with its mask.
            kept += inputs * ((4 if itemsize == 2 else 0) + (5 if recipe.adapter.dropout else 0))
    largest = max(math.prod(shape) for shape in linears.values())
    blocks = layers * width * itemsize + kept if job.checkpointing else layers * kept
    logits = logits_bytes(tokens, int(config.vocab_size), job.dtype) if recipe.task == "causal-lm" else 0
    # A quantized weight is there as floats for a moment, forward and backward.
    return tokens * blocks + logits + 2 * 4 * largest


def _gpu_memory(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else -1


def _seconds(recipe: FinetuneRecipe, job: Job, model: Any) -> float:
    """Of a token: forward, the gradient of every input, and, with checkpointing, forward again; the base's weights have no gradient.
    Beside them validation, forward alone, and what a process takes before the first step."""
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    passes = 3 if job.checkpointing else 2
    rate = matmul_rate(torch.bfloat16 if job.precision == "bfloat16" else torch.float32)
    looks = 2 + job.steps // recipe.train.evaluate_every if job.validation else 0
    size = recipe.train.batch_size
    looked_at = looks * _batch_tokens([len(row["input_ids"]) for row in job.validation], size)
    lengths = [len(job.rows[number]["input_ids"]) if number >= 0 else 1 for number in job.order]
    return START_SECONDS + (passes * _batch_tokens(lengths, size) + looked_at) * weights / rate


def _batch_tokens(lengths: Sequence[int], size: int) -> int:
    """Tokens that go through the model for rows of these lengths, in batches that are padded to their longest row."""
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return sum(len(batch) * max(batch) for batch in batches)
