"""A base, a text and a recipe in, a PEFT adapter out: the run itself.

The loop is transformers' Trainer, with accelerate under it, and this is the project's only door to them. What is different here is
what they leave to chance:

- A run is saved through training_state.py (complete or absent, no pickles), on SIGTERM and Ctrl-C too, and the same call goes on where
  it was, with the same bytes as a run that nobody stopped.
- The whole run is one pass over a list of rows drawn from the seed beforehand, so that a position in it is one number. Rows that fill
  up the last step have no targets and so no weight.
- Loss and gradient are means over the step's target tokens, however these lie in rows, batches and processes.
- The first value that is not finite ends the run before the step is applied (the Trainer by default puts an average in the log and
  goes on).

In float16 the model's own parameters stay float32 and autocast computes the linears' products in half precision, with loss scaling:
residual stream, norms and softmax are float32. No model is trained with parameters in float16, least of all OPT, whose residuals
overflow it.
"""

import dataclasses
import functools
import importlib.metadata
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from qlm import adapters, training_state
from qlm.arch import Task
from qlm.calibrate import bos_rule, window_length
from qlm.checkpoint import manifest, strict_json
from qlm.checkpoint.adapter import HEADS, base_facts
from qlm.checkpoint.files import PartialFolder, tidy, write_file
from qlm.errors import CannotCreate, DataError, Unavailable, UsageError
from qlm.load import Source, check_device, linear_paths, load, load_tokenizer, open_source
from qlm.memory import peak_memory
from qlm.quantize import KEY_CONFIG_VALUES, Progress, quantize
from qlm.recipe import FinetuneRecipe, Recipe, resolved_finetune
from qlm.training_data import NOT_LEARNED, Samples, collate, read_samples, split
from qlm.training_state import TrainingState

# Importing the Trainer imports half of what is installed; it waits for the first run (`_trainer_class`).
if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments
else:
    Trainer = TrainerCallback = object

CHECKPOINTS = "checkpoints"
ADAPTER, ADAPTER_CONFIG, METRICS = "adapter_model.safetensors", "adapter_config.json", "metrics.jsonl"
# `gradient_checkpointing: auto` on a CPU: activations of smaller models than this fit beside them.
_LARGE = 300_000_000
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
# By transformers' names. "fused" is one pass over the parameters in C++, with torch's own AdamW state.
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


@dataclass(frozen=True)
class FinetuneResult:
    """What was written.

    Attributes:
        output: the folder of the adapter. base: folder or name of the model that it belongs to.
        steps: of the whole run. resumed: steps that earlier, interrupted runs had done; all of them if the output was there already.
        training: facts of the manifest: trainable parameters, tokens, precision, optimizer, losses.
        metrics: the records of metrics.jsonl.
    """

    output: Path
    base: str
    steps: int
    resumed: int
    training: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]


def finetune(
    recipe: FinetuneRecipe, *, force: bool = False, device: str = "cpu", progress: Progress | None = None
) -> FinetuneResult:
    """Train an adapter as the recipe says. Under `torchrun` or `accelerate launch` every process makes this call.

    Args:
        force: replace an output, or an unfinished one of another recipe, that is there already.
        device: where the model runs: "cpu", "cuda" or "cuda:N"; with several processes each takes its own GPU.
        progress: called with what is being done, how much of it is done, and how much there is.
    Raises:
        QlmError: one line. Checkpoints stay in `<output>.partial/` for the next call.
        KeyboardInterrupt, or what the handler of SIGTERM raises: after the step in hand was finished and saved.
    """
    tell = progress or (lambda what, done, total: None)
    check_device(device)
    place = _Place.here(device)
    base = _base(recipe, place, force, tell)
    job = _Job.open(recipe, base, place)
    tell("hash input", 0, 1)
    identity = _identity(recipe, job, place)
    tell("hash input", 1, 1)
    output = Path(recipe.output)
    if not force and manifest.is_made(output, identity):
        if place.is_main:
            tidy(output)
        return _result(output, base, job.steps)
    place.wait()
    with PartialFolder(output, identity, force) if place.is_main else nullcontext() as partial:
        if partial is not None:
            partial.state_folder(CHECKPOINTS)
        place.wait()
        checkpoints = output.with_name(output.name + ".partial") / CHECKPOINTS
        resumed, trainer = _train(recipe, job, place, checkpoints, tell)
        tensors, config = adapters.files_of(trainer.adapter_model(), _name_of_base(recipe))
        if partial is not None:
            partial.write_tensors(ADAPTER, tensors)
            partial.write_json(ADAPTER_CONFIG, config)
            partial.write_bytes(METRICS, training_state.metrics_lines(trainer.metrics))
            _write_manifest(partial, identity, job, trainer)
            partial.commit(partial.finished_names)
    place.wait()
    return _result(output, base, resumed)


@dataclass(frozen=True)
class _Place:
    """Which of the processes this is, and where it computes."""

    device: torch.device
    rank: int
    processes: int

    @classmethod
    def here(cls, device: str) -> "_Place":
        """As the launcher's environment says (torchrun's variables, which accelerate sets as well)."""
        processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        found = torch.device(device)
        if found.type == "cuda":
            index = int(os.environ.get("LOCAL_RANK", "0")) if processes > 1 else found.index or 0
            found = torch.device("cuda", index)
            torch.cuda.set_device(found)
        if processes > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")
        return cls(found, rank, processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.processes > 1:
            torch.distributed.barrier()


def _base(recipe: FinetuneRecipe, place: _Place, force: bool, tell: Progress) -> str:
    """The model that is trained on: as it is, or quantized into a folder of its own first, by one process."""
    quantizing = recipe.base_recipe()
    if quantizing is None:
        return recipe.model
    if place.is_main:
        _quantize(_with_task(quantizing), place, force, tell)
    place.wait()
    return quantizing.output


def _quantize(recipe: Recipe, place: _Place, force: bool, tell: Progress) -> None:
    try:
        quantize(recipe, device=str(place.device), progress=tell)
    except (CannotCreate, UsageError, DataError):
        # One that is there and is another's, or damaged. --force is for starting over, not for doing the same again.
        if not force:
            raise
        quantize(recipe, force=True, device=str(place.device), progress=tell)


def _with_task(recipe: Recipe) -> Recipe:
    """For a task whose head the float model lacks, the language model: the new head is the training's."""
    if recipe.task != "causal-lm":
        try:
            open_source(recipe.model, revision=recipe.revision, task=recipe.task)
        except DataError:
            return recipe.model_copy(update={"task": "causal-lm"})
    return recipe


def _name_of_base(recipe: FinetuneRecipe) -> str:
    return recipe.model if recipe.quantize is None else recipe.base_output


@dataclass(frozen=True)
class _Job:
    """What is trained on what.

    Attributes:
        base: folder or hub name of the model, quantized or float.
        rows: to learn from. validation: to measure on. facts: of the data, for identity and manifest. labels: their names.
        order: row of each place in the run, one step after the other; -1 for a row without weight.
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
    def open(cls, recipe: FinetuneRecipe, base: str, place: _Place) -> "_Job":
        train = recipe.train
        revision = recipe.revision if recipe.quantize is None else None
        source, empty = open_source(
            base, revision=revision, task=recipe.task, attn_implementation=recipe.attn_implementation,
            new_head=recipe.task != "causal-lm",
        )  # fmt: skip
        labels = _labels(recipe, source)
        tokenizer = load_tokenizer(base, revision=revision)
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
        per_step = train.batch_size * train.gradient_accumulation * place.processes
        steps = train.steps or math.ceil((train.epochs or 1) * len(rows) / per_step)
        # With `epochs` the rows may end before the last step does; with `steps` a next pass begins.
        places = steps * per_step if train.steps else (train.epochs or 1) * len(rows)
        order = _order(len(rows), places, train.seed)
        parameters = sum(empty.get_submodule(name).weight.numel() for name in linear_paths(empty))
        large = place.device.type == "cuda" or parameters > _LARGE
        return cls(
            base=base,
            revision=revision,
            source=source,
            task=recipe.task,
            rows=rows,
            validation=other.rows if other else [],
            facts=facts,
            labels=labels,
            order=order + [-1] * (steps * per_step - places),
            steps=steps,
            max_length=length,
            pad_id=_pad_id(tokenizer, source),
            precision=choose_precision(train.precision, place.device),
            optimizer=choose_optimizer(train.optimizer, place.device),
            checkpointing=large if train.gradient_checkpointing == "auto" else train.gradient_checkpointing,
        )


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


def _order(rows: int, places: int, seed: int) -> list[int]:
    """One permutation of the rows after the other, as many places as asked for."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < places:
        order += torch.randperm(rows, generator=generator).tolist()
    return order[:places]


def choose_precision(wanted: str, device: torch.device) -> str:
    """What the forward pass computes in: "auto" is bfloat16 where a GPU has it, float16 on others, float32 on a CPU.

    Raises:
        UsageError, Unavailable: this device cannot train in what was asked for.
    """
    on_gpu = device.type == "cuda"
    has_bfloat16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "float32" if not on_gpu else "bfloat16" if has_bfloat16 else "float16"
    if wanted == "float16" and not on_gpu:
        raise UsageError(
            "train.precision: found float16 on a CPU, where no loss scaling is made for it; allowed here: float32 or bfloat16"
        )
    if wanted == "bfloat16" and not has_bfloat16:
        raise Unavailable("train.precision: this GPU has no bfloat16; use float16 or auto")
    return wanted


def choose_optimizer(wanted: str, device: torch.device) -> str:
    """ "auto" is paged 8-bit AdamW on CUDA, AdamW elsewhere. Raises UsageError for an 8-bit one on a CPU."""
    if wanted == "auto":
        return "paged_adamw_8bit" if device.type == "cuda" else "adamw"
    if wanted != "adamw" and device.type != "cuda":
        raise UsageError(f"train.optimizer: found {wanted} on {device.type}; it needs CUDA: use adamw or auto")
    return wanted


# What changes no byte of the output: where it lies, how often a run is saved and what else is shown of it.
_WITHOUT_EFFECT = ("save_every", "tensorboard")


def _identity(recipe: FinetuneRecipe, job: _Job, place: _Place) -> dict[str, Any]:
    """Everything that the output's bytes depend on. A resumed run must agree in all of it."""
    plain = resolved_finetune(recipe)
    plain.pop("output")
    for key in _WITHOUT_EFFECT:
        plain["train"].pop(key, None)
    if Path(recipe.model).is_dir():
        plain["model"] = Path(recipe.model).resolve().name
    for section, key in (("train", "data"), ("train", "validation"), ("calibration", "data")):
        if plain.get(section) and isinstance(plain[section].get(key), str):
            plain[section][key] = Path(plain[section][key]).name
    inputs = manifest.input_facts(job.source.checkpoint.files())
    for key, facts in job.facts.items():
        inputs[f"{key}: {facts['data']}"] = {"sha256": facts["sha256"]}
    packages = ("qlm", "torch", "transformers", "tokenizers", "peft", "accelerate")
    where = {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "cpu",
        "precision": job.precision,
        "optimizer": job.optimizer,
        "processes": str(place.processes),
    }
    return {
        "recipe": plain,
        "inputs": inputs,
        "versions": {name: importlib.metadata.version(name) for name in packages} | where,
        "seed": recipe.train.seed,
        "threads": torch.get_num_threads(),
    }


def _write_manifest(partial: PartialFolder, identity: Mapping[str, Any], job: _Job, trainer: "_Trainer") -> None:
    measured = [record for record in trainer.metrics if "validation_loss" in record]
    steps = [record for record in trainer.metrics if "loss" in record]
    trained = training_state.trainable(trainer.adapter_model())
    training = {
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
    written = manifest.build(
        **identity,
        qlm=importlib.metadata.version("qlm"),
        outputs=partial.facts([name for name in partial.finished_names if name != manifest.NAME]),
        layers={},
        bos=bos_rule(job.source.spec),
        config={key: value for key, value in job.source.config.to_dict().items() if key in KEY_CONFIG_VALUES},
        training=training,
        base=base_facts(job.base, job.revision),
    )
    partial.write_json(manifest.NAME, written)


def _result(output: Path, base: str, resumed: int) -> FinetuneResult:
    import json

    training = manifest.read(output)["training"]
    metrics = [json.loads(line) for line in (output / METRICS).read_text("utf-8").splitlines()]
    return FinetuneResult(output, base, training["steps"], resumed, training, metrics)


# --- the run ----------------------------------------------------------------------------------------------------------


def _train(
    recipe: FinetuneRecipe, job: _Job, place: _Place, checkpoints: Path, tell: Progress
) -> tuple[int, "_Trainer"]:
    """Steps that were done before, and the trainer after the last one."""
    from transformers import TrainingArguments

    train = recipe.train
    state = training_state.load_newest(checkpoints) if place.is_main else None
    place.wait()
    if not place.is_main:
        # The main process has removed or passed over what is damaged.
        state = training_state.load_newest(checkpoints)
    model = _model(recipe, job, place)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        max_steps=job.steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=_SCHEDULES[train.schedule],
        warmup_steps=math.ceil(train.warmup * job.steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_gradient_norm,
        optim=_OPTIMIZERS[job.optimizer],
        seed=train.seed,
        bf16=job.precision == "bfloat16",
        fp16=job.precision == "float16",
        use_cpu=place.device.type == "cpu",
        **_checkpointing(job.checkpointing),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=train.save_every,
        eval_strategy="steps" if job.validation else "no",
        eval_steps=train.evaluate_every,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=place.device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    # Without a launcher the Trainer would spread a batch over all GPUs it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    with _Signals() as signals:
        trainer: _Trainer = _trainer_class()(model, arguments, job, place, checkpoints, tell, signals)
        if train.tensorboard and place.is_main:
            trainer.add_callback(_tensorboard(Path(recipe.output)))
        # Each process drops out other features.
        torch.manual_seed(train.seed + place.rank)
        trainer.run(state)
    signals.pass_on()
    return (0 if state is None else state.step), trainer


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """As the Trainer's arguments; transformers 5.23 calls by another name what 5.20 called gradient checkpointing."""
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def _model(recipe: FinetuneRecipe, job: _Job, place: _Place) -> Any:
    """The base with a fresh adapter, on this process's device."""
    torch.manual_seed(recipe.train.seed)
    model = load(
        job.base,
        revision=job.revision,
        task=job.task,
        device=str(place.device),
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
        _resize_head(model, HEADS[job.task], len(job.labels))
    adapted = adapters.attach(
        model, job.source.spec, recipe.adapter, job.task, recipe.train.seed, float_weight=_float_weights(recipe, job)
    )
    for parameter in training_state.trainable(adapted).values():
        # A head in full comes in the base's dtype; small steps are lost in bfloat16.
        parameter.data = parameter.data.float()
    return adapted


def _resize_head(model: Any, name: str, labels: int) -> None:
    """A fresh head for so many labels, from torch's seed, in the place of a fresh one for another number."""
    head = getattr(model, name)
    fresh = nn.Linear(
        head.in_features, labels, bias=head.bias is not None, device=head.weight.device, dtype=head.weight.dtype
    )
    nn.init.normal_(fresh.weight, std=0.02)
    if fresh.bias is not None:
        nn.init.zeros_(fresh.bias)
    setattr(model, name, fresh.train(head.training))
    model.config.num_labels = model.num_labels = labels


def _float_weights(recipe: FinetuneRecipe, job: _Job) -> Callable[[str], Tensor] | None:
    """Where `initialization: svd` finds the weights that the base was quantized from."""
    if recipe.adapter.initialization != "svd" or recipe.quantize is None:
        return None
    task: Task = "base" if job.task != "causal-lm" else job.task
    source, _ = open_source(recipe.model, revision=recipe.revision, task=task)
    # A base alone has no prefix before its blocks.
    prefix = "" if task == "causal-lm" else f"{source.spec.prefix}."
    return lambda path: source.read(f"{path.removeprefix(prefix)}.weight", torch.float32)


def _tensorboard(output: Path) -> Any:
    """The Trainer's own reporting, into a folder beside the output: its files hold times and the host's name."""
    from transformers.integrations import TensorBoardCallback

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Unavailable("train.tensorboard: needs the package tensorboard; install it, or leave it out") from None
    return TensorBoardCallback(SummaryWriter(log_dir=str(output.with_name(output.name + "-tensorboard"))))


class _Signals:
    """SIGTERM and Ctrl-C, kept until the step in hand is finished and saved. A second one is not kept."""

    def __init__(self) -> None:
        self.number = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        # Python lets the main thread alone handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self.__exit__()
            signal.raise_signal(number)
        self.number = number

    def pass_on(self) -> None:
        """To whoever handled them before, now that the run is saved."""
        if self.number:
            signal.raise_signal(self.number)
            raise KeyboardInterrupt


# What a batch holds beside the model's inputs.
_TARGETS = ("labels", "start_positions", "end_positions")


def head_loss(outputs: Any, targets: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy of a task's head, summed over its labels: fp32, a number in nats.

    Args:
        targets: int64 `labels` [B] (a text's) or [B, T] (a token's), or `start_positions` and `end_positions` [B]; -100 is no label.
    """

    def summed(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), wanted, ignore_index=NOT_LEARNED, reduction="sum")

    if "labels" in targets:
        return summed(outputs.logits.flatten(0, -2), targets["labels"].flatten())
    start = summed(outputs.start_logits, targets["start_positions"])
    return start + summed(outputs.end_logits, targets["end_positions"])


def _targets(batch: Mapping[str, Tensor]) -> int:
    """How many labels a head's batch has; a pair of positions is two."""
    return sum(int(batch[key].ne(NOT_LEARNED).sum()) for key in _TARGETS if key in batch)


def _right(outputs: Any, targets: Mapping[str, Tensor]) -> int:
    """How many of them the head's largest logit is at."""
    logits = {"labels": "logits", "start_positions": "start_logits", "end_positions": "end_logits"}
    return sum(int((outputs[logits[key]].argmax(-1) == wanted).sum()) for key, wanted in targets.items())


class _Rows:
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


class _Watch(TrainerCallback):
    """Progress, and the end of the run when a signal has come."""

    def __init__(self, trainer: "_Trainer") -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.trainer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True


@functools.cache
def _trainer_class() -> Any:
    """`_Trainer` on top of transformers' Trainer."""
    import transformers

    return type("QlmTrainer", (_Trainer, transformers.Trainer), {"__doc__": _Trainer.__doc__, "__module__": __name__})


@functools.cache
def _watch_class() -> Any:
    import transformers

    return type("Watch", (_Watch, transformers.TrainerCallback), {"__module__": __name__})


class _Trainer(Trainer):
    """transformers' loop, with its own state, data order, watchdog and measuring.

    Attributes:
        metrics: the records of metrics.jsonl so far.
        stopping: number of the signal that ends the run after this step, or 0; the same in all processes.
    """

    def __init__(
        self,
        model: Any,
        arguments: "TrainingArguments",
        job: _Job,
        place: _Place,
        checkpoints: Path,
        tell: Progress,
        signals: _Signals,
    ) -> None:
        self.job, self.place, self.checkpoints, self.tell, self.signals = job, place, checkpoints, tell, signals
        self.metrics: list[dict[str, Any]] = []
        self.stopping = 0
        self._losses: list[Tensor] = []
        self._batches: list[Mapping[str, Tensor]] = []
        self._tokens = 0
        self._named: dict[Tensor, str] = {}
        self._resumed: TrainingState | None = None
        self._clock: tuple[float, int] = (time.monotonic(), 0)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=cast(Any, _Rows(job.rows, job.pad_id)),
            eval_dataset=job.validation or None,
            data_collator=functools.partial(collate, pad_id=job.pad_id),
        )
        from transformers.trainer_callback import PrinterCallback

        # It prints every record to stdout.
        self.remove_callback(PrinterCallback)
        self.add_callback(_watch_class()(self))

    def run(self, state: TrainingState | None) -> None:
        """Train from the beginning or from the state to the end, or until a signal comes."""
        from transformers import TrainerState
        from transformers.trainer import TRAINER_STATE_NAME

        self._resumed = state
        if state is not None:
            self.metrics = list(state.metrics)
        step = 0 if state is None else state.step
        measured = {record["step"] for record in self.metrics if "validation_loss" in record}
        due = step in (0, self.job.steps) or step % int(self.args.eval_steps or 1) == 0
        # A run that was stopped while it measured does so again.
        self.args.eval_on_start = bool(self.job.validation) and due and step not in measured
        self.tell("train", step, self.job.steps)
        if state is not None and self.place.is_main:
            # All that the Trainer itself wants to know of a checkpoint; it reads it from a file.
            loop = TrainerState(global_step=step, train_batch_size=self.args.train_batch_size)
            loop.compute_steps(self.args, self.job.steps)
            write_file(self.checkpoints / TRAINER_STATE_NAME, strict_json.dumps(dataclasses.asdict(loop)))
        self.place.wait()
        self.train(resume_from_checkpoint=None if state is None else str(self.checkpoints))

    def adapter_model(self) -> Any:
        """The model with its adapter, without what accelerate puts around it."""
        return self.accelerator.unwrap_model(self.model_wrapped)

    # - data -

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.job.order

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self.job.task == "causal-lm":
            count = super()._get_num_items_in_batch(batch_samples, device)
        else:
            count = torch.tensor(sum(_targets(batch) for batch in batch_samples), device=device)
            if self.place.processes > 1:
                count = self.accelerator.gather(count).sum()
        self._tokens = int(cast(Tensor, count))
        return count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The language model's own; for heads the cross entropy summed over labels and divided by the step's number of them, where
        transformers' classes take a mean over each batch."""
        if self.job.task == "causal-lm":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        targets = {key: inputs.pop(key) for key in _TARGETS if key in inputs}
        outputs = model(**inputs)
        loss = head_loss(outputs, targets) / num_items_in_batch * self.place.processes
        return (loss, outputs) if return_outputs else loss

    # - the step -

    def begin_step(self) -> None:
        self._losses, self._batches = [], []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._batches.append(inputs)
        # Whether it was divided by the step's targets: always, here.
        self.loss_is_scaled_for_ga = True
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip, and look at everything that the step is made of before it is applied.

        Raises:
            DataError: a loss, a gradient or a state of the optimizer is not finite; names the step and the place.
        """
        self.accelerator.unscale_gradients()
        parameters = [p for p in self._names() if p.grad is not None]
        norm = training_state.full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        states = [t for _, t in self._optimizer_tensors()]
        largest = nn.utils.get_total_norm(states, norm_type=math.inf) if states else torch.zeros(())
        found = torch.stack(
            [
                torch.stack(self._losses).sum().float(),
                norm.float().to(self.args.device),
                training_state.full(largest).float().to(self.args.device),
                torch.tensor(float(self.signals.number), device=self.args.device),
            ]
        )
        if self.place.processes > 1:
            found = self.accelerator.gather(found[None]).reshape(-1, 4)
            found = torch.cat([found[:, :3].mean(0), found[:, 3].amax()[None]])
        self.loss, gradient, state, self.stopping = (*found[:3].tolist(), int(found[3]))
        self.signals.number = self.signals.number or self.stopping
        scaler = self.accelerator.scaler
        # A gradient that overflowed only because of the scale is no fault: the scaler passes over this step and lowers the scale.
        overflowed = not math.isfinite(gradient) and scaler is not None and scaler.get_scale() > 1
        if not math.isfinite(self.loss):
            self._stop(f"the loss is {self.loss}", self._where_loss())
        if not math.isfinite(gradient) and not overflowed:
            named = ((name, p.grad) for p, name in self._names().items() if p.grad is not None)
            self._stop(f"the gradient's norm is {gradient}", training_state.not_finite(named))
        if not math.isfinite(state):
            self._stop(
                "the optimizer's state is not finite", training_state.not_finite(iter(self._optimizer_tensors()))
            )
        if not overflowed:
            nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _optimizer_tensors(self) -> list[tuple[str, Tensor]]:
        names = self._names()
        return [
            (f"{names[parameter]}: {key}", value)
            for parameter, state in self._plain_optimizer().state.items()
            for key, value in state.items()
            # Counts of steps lie on the CPU; looking at them costs a pass of its own.
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim and "map" not in key
        ]

    def _where_loss(self) -> str | None:
        """Where a loss that is not finite comes from: a tensor of the model, or else the first module that makes one of finite input."""
        model = self.adapter_model()
        tensors = [*training_state.trainable(model).items(), *model.named_parameters(), *model.named_buffers()]
        # Masks may hold infinities on purpose.
        faulty = training_state.not_finite((n, t) for n, t in tensors if "mask" not in n)
        if faulty is not None:
            return faulty
        for batch in self._batches:
            if (module := self._first_not_finite(model, batch)) is not None:
                return f"output of {module}"
        return None

    def _first_not_finite(self, model: nn.Module, batch: Mapping[str, Tensor]) -> str | None:
        found: list[str] = []

        def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and training_state.not_finite(iter([(name, output)])):
                found.append(name)

        hooks = [
            module.register_forward_hook(functools.partial(look, name))
            for name, module in model.named_modules()
            if not any(True for _ in module.children())
        ]
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                model(**{key: value for key, value in self._prepare_inputs(dict(batch)).items() if key not in _TARGETS})
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None

    def _stop(self, what: str, where: str | None) -> None:
        saved = training_state.steps(self.checkpoints)
        kept = f"the checkpoint of step {saved[0]} is kept" if saved else "no checkpoint was written yet"
        raise DataError(
            f"step {self.state.global_step + 1}: {what}{f': {where}' if where else ''}; this step was not applied, and {kept}; "
            "look at the data, or lower train.learning_rate"
        )

    # - what is written down -

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            skipped = self.accelerator.optimizer_step_was_skipped
            record: dict[str, Any] = {
                "step": self.state.global_step,
                "loss": self.loss,
                "learning_rate": logs["learning_rate"],
                "gradient_norm": None if skipped else logs["grad_norm"],
                "tokens": self._tokens,
                # float16 alone: the scale was too high, and the step was passed over.
                **({"skipped": True} if skipped else {}),
            }
            self.metrics.append(record)
            self._show()
        super().log(logs, start_time)
        # metrics.jsonl is the log; this copy of it would only grow.
        self.state.log_history.clear()
        if self.signals.number and self.place.processes == 1:
            # It came after `on_step_end`. Several processes agree with the next step.
            self.control.should_save = self.control.should_training_stop = True

    def _show(self) -> None:
        notes = getattr(self.tell, "notes", None)
        if notes is not None:
            began, tokens = self._clock
            self._clock = (began, tokens + self._tokens)
            on_gpu = self.place.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
            rate = self._clock[1] / max(time.monotonic() - began, 1e-9)
            notes["train"] = f"loss {self.loss:.4f}, {rate:.0f} tokens/s, peak {peak / 1e9:.2f} GB"
        self.tell("train", self.state.global_step, self.job.steps)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all validation targets. When a signal comes, the run is saved as it is, and measures when it goes on."""
        step = self.state.global_step
        measured = self._measure()
        if measured is None:
            if step == 0:
                self.signals.__exit__()
                self.signals.pass_on()
            self.control.should_save = self.control.should_training_stop = True
            return {}
        if not math.isfinite(measured["validation_loss"]):
            self._stop(f"after {step} steps the validation loss is {measured['validation_loss']}", None)
        self.metrics.append({"step": step, **measured})
        shown = {key.replace("validation", metric_key_prefix): value for key, value in measured.items()}
        self.log(dict(shown))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, shown)
        return shown

    @torch.no_grad()
    def _measure(self) -> dict[str, Any] | None:
        """Draws nothing from any random generator, so that measuring more or less often changes no training."""
        rows, size, device = self.job.validation, self.args.per_device_train_batch_size, self.args.device
        model: Any = self.model
        was_training = model.training
        model.eval()
        # loss, targets, right ones, signal
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        batches = range(self.place.rank * size, len(rows), self.place.processes * size)
        for number, start in enumerate(batches):
            self.tell("evaluate", number, len(batches))
            if self.signals.number and self.place.processes == 1:
                break
            batch = {k: v.to(device) for k, v in collate(rows[start : start + size], self.job.pad_id).items()}
            targets = {key: batch.pop(key) for key in _TARGETS if key in batch}
            outputs = model(**batch)
            if self.job.task == "causal-lm":
                shifted = targets["labels"][:, 1:]
                # Row by row: the logits of a batch in float32 would be the largest thing in memory.
                for logits, wanted in zip(outputs.logits[:, :-1], shifted, strict=True):
                    sums[0] += F.cross_entropy(logits.float(), wanted, ignore_index=NOT_LEARNED, reduction="sum")
                sums[1] += shifted.ne(NOT_LEARNED).sum()
            else:
                sums[0] += head_loss(outputs, targets)
                sums[1] += _targets(targets)
                sums[2] += _right(outputs, targets)
        model.train(was_training)
        sums[3] = self.signals.number
        if self.place.processes > 1:
            sums = self.accelerator.gather(sums[None]).reshape(-1, 4).sum(0)
        self.tell("evaluate", len(batches), len(batches))
        if sums[3]:
            self.signals.number = self.signals.number or signal.SIGTERM
            return None
        loss, count, right, _ = sums.tolist()
        mean = loss / max(count, 1)
        extra = {"validation_perplexity": math.exp(min(mean, 700.0))}
        if self.job.task != "causal-lm":
            extra = {"validation_accuracy": right / max(count, 1)}
        return {"validation_loss": mean, **extra, "validation_tokens": int(count)}

    # - saving and going on -

    def _names(self) -> dict[Tensor, str]:
        """Of the trained parameters. Walking through the model takes longer than a look at their gradients; once it is prepared for
        training they stay the same."""
        if not self._named:
            self._named = {
                parameter: name for name, parameter in training_state.trainable(cast(nn.Module, self.model)).items()
            }
        return self._named

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        parameters = {name: training_state.full(p.detach()) for p, name in self._names().items()}
        faulty = training_state.not_finite(iter(parameters.items()))
        if faulty is not None:
            self._stop(f"after {self.state.global_step} steps there are values that are not finite", faulty)
        optimizer = training_state.optimizer_state(self._plain_optimizer(), self._names())
        scaler = self.accelerator.scaler
        state = TrainingState(
            step=self.state.global_step,
            parameters=parameters,
            optimizer=optimizer,
            schedule=self.lr_scheduler.state_dict(),  # type: ignore[union-attr]
            scaler=None if scaler is None else scaler.state_dict(),
            random=self._random_states(),
            position={"place": self.state.global_step * len(self.job.order) // self.job.steps},
            metrics=self.metrics,
        )
        if self.place.is_main:
            training_state.save(self.checkpoints, state)
        self.place.wait()

    def _random_states(self) -> dict[str, Any]:
        """The main process's generators, and torch's of all."""
        state = training_state.random_state(self.args.device)
        if self.place.processes == 1:
            return {**state, "ranks": {}}
        own = {key: value.to(self.args.device) for key, value in state.items() if isinstance(value, Tensor)}
        of_all = {key: self.accelerator.gather(value[None]) for key, value in own.items()}
        return {
            **state,
            "ranks": {
                str(rank): {key: values[rank].cpu() for key, values in of_all.items()}
                for rank in range(self.place.processes)
            },
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self._resumed is not None
        training_state.set_parameters(cast(nn.Module, self.model), self._resumed.parameters)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            training_state.set_optimizer_state(self._plain_optimizer(), self._names(), self._resumed.optimizer)
            self.lr_scheduler.load_state_dict(dict(self._resumed.schedule))  # type: ignore[union-attr]

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._resumed is not None and self._resumed.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(self._resumed.scaler))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            state = dict(self._resumed.random)
            state |= state.pop("ranks").get(str(self.place.rank), {})
            training_state.set_random_state(state, self.args.device)
