"""What is trained on what: the base, rows in their order, and which process on which device. No model is loaded here.

The whole run is one pass over a list of rows drawn from the seed beforehand, so that where a run stands is one number, its step. Rows
that fill up the last step have no targets and so no weight.
"""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from qlm.arch import HEADS, Task
from qlm.calibrate import window_length
from qlm.errors import DataError, Unavailable, UsageError
from qlm.kernels.cuda_ops import has_bfloat16
from qlm.load import Source, linear_paths, load_tokenizer, open_source
from qlm.recipe import FinetuneRecipe, Recipe
from qlm.training.data import NOT_LEARNED, Samples, read_samples, split

# `gradient_checkpointing: auto` on a CPU: activations of smaller models than this fit beside them.
_LARGE = 300_000_000


# How long processes wait for one that quantizes the base, or reads a large one. What they send each other while they train keeps torch's
# own limit (10 minutes with NCCL).
LONGEST_WAIT = timedelta(hours=24)
# What accelerate's configuration may say of FSDP, by the variable that its launcher makes of a key (whose default comes first).
_FSDP_SETTINGS: dict[str, tuple[str, str, str, str]] = {
    "FSDP_VERSION": ("1", "2", "fsdp_version", "FSDP1 makes one flat tensor of weights of different kinds"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false", "false", "fsdp_activation_checkpointing",
        "accelerate's computes activations anew with other dropout; train.gradient_checkpointing of the recipe does not",
    ),
    "FSDP_OFFLOAD_PARAMS": ("false", "false", "fsdp_offload_params", "the optimizer and the 4-bit linears need their weights on the GPU"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "false", "false", "fsdp_cpu_ram_efficient_loading", "every process reads the base itself"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Process:
    """Which of `count` processes this is, by its rank from 0, and where it computes.

    Attributes:
        sharded: whether each process holds a part of every weight alone (FSDP2), as accelerate's configuration says.
        waiting: torch's process group for waits that may last as long as LONGEST_WAIT; None for one process.
    """

    device: torch.device
    rank: int
    count: int
    sharded: bool = False
    waiting: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def here(cls, device: str) -> "Process":
        """As the launcher's environment says (torchrun's variables, which accelerate sets as well).

        Raises:
            UsageError: FSDP on a CPU, or with settings that would train otherwise than the recipe says; DeepSpeed.
        """
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise UsageError("accelerate's configuration asks for DeepSpeed; allowed here: MULTI_GPU (DDP) or FSDP")
        count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        found = torch.device(device)
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if sharded:
            check_fsdp(found)
        if found.type == "cuda":
            index = int(os.environ.get("LOCAL_RANK", "0")) if count > 1 else found.index or 0
            found = torch.device("cuda", index)
            torch.cuda.set_device(found)
        if count == 1:
            return cls(found, rank, count, sharded)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")
        # With gloo on GPUs too: a wait of NCCL's keeps the GPU busy.
        waiting = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        return cls(found, rank, count, sharded, waiting)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here, for LONGEST_WAIT at most."""
        if self.count > 1:
            torch.distributed.barrier(self.waiting)


def check_fsdp(device: torch.device) -> None:
    """Refuse what accelerate's configuration asks of FSDP and what cannot be had.

    Raises:
        UsageError: names the key of accelerate's configuration file.
    """
    if device.type == "cpu":
        # accelerate (1.15) takes no notice of its FSDP configuration on CPUs, and trains with DDP.
        raise UsageError(
            "accelerate's configuration asks for FSDP, which it has on GPUs only; found cpu: give --device cuda, or use DDP"
        )
    for variable, (default, wanted, key, why) in _FSDP_SETTINGS.items():
        said = os.environ.get(variable, default).lower()
        if said != wanted:
            raise UsageError(f"accelerate's configuration: {key}: found {said}; allowed here: {wanted}, for {why}")


@dataclass(frozen=True)
class Job:
    """What is trained on what.

    Attributes:
        base: folder or hub name of the model, quantized or float.
        rows: to learn from. validation: to measure on. facts: of the data, for identity and manifest. labels: their names.
        order: row of each slot of the run, one step after the other; -1 for a row without weight.
        max_length: tokens in a row, at most. pad_id: what short rows are filled up with.
        precision: float32, bfloat16 or float16. optimizer: a name of the recipe's.
    """

    base: str
    revision: str | None
    source: Source
    task: Task
    rows: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    facts: dict[str, Any]
    labels: list[str] | None
    order: list[int]
    steps: int
    max_length: int
    pad_id: int
    precision: str
    optimizer: str
    checkpointing: bool

    @classmethod
    def open(cls, recipe: FinetuneRecipe, process: Process) -> "Job":
        """Read the data, and see what there is to train, on the recipe's own model; `on` is the same on what that is quantized into.

        Args:
            process: one of those that share each step's rows.
        Raises:
            QlmError: the model, the data or the labels are not as the recipe needs them, or this device cannot train as it asks.
        """
        train = recipe.train
        source, empty = open_source(
            recipe.model, revision=recipe.revision, task=recipe.task, attn_implementation=recipe.attn_implementation,
            new_head=recipe.task != "causal-lm",
        )  # fmt: skip
        labels = _labels(recipe, source)
        tokenizer = load_tokenizer(recipe.model, revision=recipe.revision)
        length = window_length(train.max_length, int(getattr(source.config, source.spec.positions)))
        read = functools.partial(
            read_samples, tokenizer=tokenizer, spec=source.spec, task=recipe.task, max_length=length,
            packing=train.packing, too_long=train.too_long, labels=labels,
        )  # fmt: skip
        samples: Samples = read(train)
        other: Samples | None = None
        if train.validation_source is not None:
            other = read(train.validation_source)
        elif train.validation_share is not None:
            samples, other = split(samples, train.validation_share, train.seed)
        rows, facts = samples.rows, {"data": samples.facts, **({"validation": other.facts} if other else {})}
        per_step = train.batch_size * train.gradient_accumulation * process.count
        steps = train.steps or math.ceil((train.epochs or 1) * len(rows) / per_step)
        # With `epochs` the rows may end before the last step does; with `steps` a next pass begins.
        filled = steps * per_step if train.steps else (train.epochs or 1) * len(rows)
        parameters = sum(empty.get_submodule(name).weight.numel() for name in linear_paths(empty))
        large = process.device.type == "cuda" or parameters > _LARGE
        return cls(
            base=recipe.model,
            revision=recipe.revision,
            source=source,
            task=recipe.task,
            rows=rows,
            validation=other.rows if other else [],
            facts=facts,
            labels=labels,
            order=_order(len(rows), filled, train.seed) + [-1] * (steps * per_step - filled),
            steps=steps,
            max_length=length,
            pad_id=_pad_id(tokenizer, source),
            precision=choose_precision(train.precision, process.device),
            optimizer=choose_optimizer(train.optimizer, process.device, process.sharded),
            checkpointing=large if train.gradient_checkpointing == "auto" else train.gradient_checkpointing,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of `precision`."""
        found = getattr(torch, self.precision)
        assert isinstance(found, torch.dtype)
        return found

    def on(self, base: str) -> "Job":
        """On another folder of the same model, with its tokenizer and so the same rows. Raises what `open_source` raises."""
        source, _ = open_source(base, task=self.task, new_head=self.task != "causal-lm")
        return replace(self, base=base, revision=None, source=source)


def base_quantizing_recipe(recipe: FinetuneRecipe) -> Recipe | None:
    """The quantizing recipe of the base, or None where `model` is trained on as it is. For a task whose head the float model lacks it is
    that of the language model: the new head is the training's."""
    quantizing = recipe.base_recipe()
    if quantizing is not None and quantizing.task != "causal-lm":
        try:
            open_source(quantizing.model, revision=quantizing.revision, task=quantizing.task)
        except DataError:
            return quantizing.model_copy(update={"task": "causal-lm"})
    return quantizing


def _pad_id(tokenizer: Any, source: Source) -> int:
    """Any token does where a mask says what is padding; heads that look for the last token need one that texts do not end with."""
    for value in (source.config.pad_token_id, tokenizer.pad_token_id, source.config.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def _labels(recipe: FinetuneRecipe, source: Source) -> list[str] | None:
    """Names of a classification's labels: the recipe's, or else the config's. None for other tasks.

    Raises:
        UsageError: the checkpoint has a head for another number of them.
    """
    if recipe.task not in ("sequence-classification", "token-classification"):
        return None
    config, head = source.config, f"{HEADS[recipe.task]}.weight"
    if recipe.train.labels is None:
        return [str(config.id2label[number]) for number in range(config.num_labels)]
    if source.file_names[head] in source.checkpoint.tensors and len(recipe.train.labels) != config.num_labels:
        raise UsageError(
            f"train.labels: found {len(recipe.train.labels)} labels; the head in {recipe.model} has {config.num_labels}: give as many, "
            "or a model without a head, which then gets a new one"
        )
    return list(recipe.train.labels)


def _order(rows: int, slots: int, seed: int) -> list[int]:
    """One permutation of the rows after the other, as many slots as there are to fill."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < slots:
        order += torch.randperm(rows, generator=generator).tolist()
    return order[:slots]


def choose_precision(wanted: str, device: torch.device) -> str:
    """What the forward pass computes in: "auto" is bfloat16 where a GPU has it, float16 on others, float32 on a CPU.

    Raises:
        UsageError, Unavailable: this device cannot train in what was asked for.
    """
    on_gpu = device.type == "cuda"
    bfloat16_here = not on_gpu or has_bfloat16(device)
    if wanted == "auto":
        return "float32" if not on_gpu else "bfloat16" if bfloat16_here else "float16"
    if wanted == "float16" and not on_gpu:
        raise UsageError(
            "train.precision: found float16 on a CPU, where no loss scaling is made for it; allowed here: float32 or bfloat16"
        )
    if wanted == "bfloat16" and not bfloat16_here:
        raise Unavailable("train.precision: this GPU has no bfloat16; use float16 or auto")
    return wanted


def choose_optimizer(wanted: str, device: torch.device, sharded: bool = False) -> str:
    """ "auto" is paged 8-bit AdamW on CUDA, AdamW elsewhere and under FSDP, where each process holds a part of its state.

    Raises:
        UsageError: an 8-bit one on a CPU, or under FSDP (bitsandbytes 0.50 has none for parameters in parts).
    """
    if wanted == "auto":
        return "paged_adamw_8bit" if device.type == "cuda" and not sharded else "adamw"
    if wanted != "adamw" and device.type != "cuda":
        raise UsageError(f"train.optimizer: found {wanted} on {device.type}; it needs CUDA: use adamw or auto")
    if wanted != "adamw" and sharded:
        raise UsageError(
            f"train.optimizer: found {wanted} under FSDP, for whose parameters in parts it is not made; use adamw or auto"
        )
    return wanted


class Rows:
    """The rows by number; -1 is a row of one token without a target."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], pad_id: int) -> None:
        self._rows = rows
        self._without_weight = {key: _emptied(key, value, pad_id) for key, value in rows[0].items()}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        return self._without_weight if number < 0 else self._rows[number]


def _emptied(key: str, value: Any, pad_id: int) -> Any:
    content = pad_id if key == "input_ids" else NOT_LEARNED
    return [content] if isinstance(value, list) else content
