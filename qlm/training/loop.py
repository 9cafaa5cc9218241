"""transformers' Trainer, with accelerate under it: the project's only door to them. What is different here is what they leave to chance:

- A run is saved through state.py (complete or absent, no pickles), on SIGTERM and Ctrl-C too, and goes on where it was.
- The rows come in the order that the job lists.
- Loss and gradient are means over the step's target tokens, however these lie in rows, batches and processes.
- The first value that is not finite ends the run before the step is applied (the Trainer by default puts an average in the log and
  goes on).

In float16 the model's own parameters stay float32 and autocast computes the linears' products in half precision, with loss scaling:
residual stream, norms and softmax are float32. No model is trained with parameters in float16, least of all OPT, whose residuals
overflow it.
"""

import dataclasses
import functools
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qlm.backends import nf4_linear
from qlm.checkpoint import strict_json
from qlm.checkpoint.files import write_file
from qlm.errors import DataError, Unavailable
from qlm.memory import peak_memory
from qlm.quantize import Progress
from qlm.recipe import TrainRecipe
from qlm.training import loss as training_loss
from qlm.training import state as training_state
from qlm.training import watchdog
from qlm.training.data import collate
from qlm.training.job import Job, Process, Rows
from qlm.training.language_loss import language_loss
from qlm.training.signals import Signals
from qlm.training.state import TrainingState

# Importing the Trainer imports half of what is installed; it waits for the first run (`trainer_class`).
if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments
else:
    Trainer = TrainerCallback = object

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
# By transformers' names. "fused" is one pass over the parameters in C++, with torch's own AdamW state.
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


def training_arguments(train: TrainRecipe, job: Job, process: Process, checkpoints: Path) -> "TrainingArguments":
    """The recipe's settings in the Trainer's words."""
    from transformers import TrainingArguments

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
        # Fused AdamW skips a step whose gradients overflow by itself, and tells nobody: not accelerate, whose schedule would go on.
        optim="adamw_torch" if (job.optimizer, job.precision) == ("adamw", "float16") else _OPTIMIZERS[job.optimizer],
        seed=train.seed,
        bf16=job.precision == "bfloat16",
        fp16=job.precision == "float16",
        use_cpu=process.device.type == "cpu",
        **_checkpointing(job.checkpointing),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=train.save_every,
        eval_strategy="steps" if job.validation else "no",
        eval_steps=train.evaluate_every,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=process.device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    # accelerate's configuration may name another; the recipe decides.
    arguments.mixed_precision = {"bfloat16": "bf16", "float16": "fp16"}.get(job.precision, "no")
    # Without a launcher the Trainer would spread a batch over all GPUs it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if process.device.type == "cuda" and process.count == 1:
        # It takes the first GPU, whichever was asked for.
        torch.cuda.set_device(process.device)
        arguments.__dict__["_setup_devices"] = process.device
    return arguments


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """As the Trainer's arguments; transformers 5.23 calls by another name what 5.20 called gradient checkpointing."""
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def tensorboard(output: Path) -> Any:
    """The Trainer's own reporting, into a folder beside the output: its files hold times and the host's name."""
    from transformers.integrations import TensorBoardCallback

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Unavailable("train.tensorboard: needs the package tensorboard; install it, or leave it out") from None
    return TensorBoardCallback(SummaryWriter(log_dir=str(output.with_name(output.name + "-tensorboard"))))


class _Watch(TrainerCallback):
    """Progress, and the end of the run when a signal has come."""

    def __init__(self, trainer: "TrainingLoop") -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.trainer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True


# Methods of transformers' Trainer (5.20 to 5.23) that are overridden. One of another name would not be called, and nobody would know.
OVERRIDDEN = (
    "_get_train_sampler", "_get_num_items_in_batch", "compute_loss", "training_step", "_clip_grad_norm", "log", "evaluate",
    "_save_checkpoint", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state",
)  # fmt: skip


@functools.cache
def trainer_class() -> "type[TrainingLoop]":
    """`TrainingLoop` on top of transformers' Trainer, to be made instances of."""
    import transformers

    missing = [name for name in OVERRIDDEN if not hasattr(transformers.Trainer, name)]
    if missing:
        raise Unavailable(
            f"transformers {transformers.__version__}: its Trainer has no {missing[0]}, without which nothing would watch over the run; "
            "install the version of constraints.txt"
        )
    return type(
        "QlmTrainer", (TrainingLoop, transformers.Trainer), {"__doc__": TrainingLoop.__doc__, "__module__": __name__}
    )


@functools.cache
def _watch_class() -> Any:
    import transformers

    return type("Watch", (_Watch, transformers.TrainerCallback), {"__module__": __name__})


class TrainingLoop(Trainer):
    """transformers' loop, with its own state, data order, watchdog and measuring.

    Attributes:
        metrics: the records of metrics.jsonl so far.
        stopping: number of the signal that ends the run after this step, or 0; the same in all processes.
    """

    def __init__(
        self,
        model: Any,
        arguments: "TrainingArguments",
        job: Job,
        process: Process,
        checkpoints: Path,
        tell: Progress,
        signals: Signals,
    ) -> None:
        self.job, self.process, self.checkpoints, self.tell, self.signals = job, process, checkpoints, tell, signals
        self.metrics: list[dict[str, Any]] = []
        self.stopping = 0
        self._losses: list[Tensor] = []
        self._batches: list[Mapping[str, Tensor]] = []
        self._tokens = 0
        self._named: dict[Tensor, str] = {}
        self._resumed: TrainingState | None = None
        self._clock: tuple[float, int] = (time.monotonic(), 0)
        if process.sharded:
            # Integers accelerate leaves whole in each process.
            nf4_linear.hold_as(model, torch.bfloat16)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=cast(Any, Rows(job.rows, job.pad_id)),
            eval_dataset=job.validation or None,
            data_collator=functools.partial(collate, pad_id=job.pad_id),
        )
        if process.sharded:
            self._prepare_sharding()
        from transformers.trainer_callback import PrinterCallback

        # It prints every record to stdout.
        self.remove_callback(PrinterCallback)
        self.add_callback(_watch_class()(self))

    def _prepare_sharding(self) -> None:
        """See that accelerate shards, and keep it from rounding what it holds. Raises Unavailable where it chose another way."""
        if not self.accelerator.is_fsdp2:
            raise Unavailable(
                f"accelerate's configuration asks for FSDP2, and accelerate chose {self.accelerator.distributed_type}; use torchrun "
                "without it, or start this with accelerate launch"
            )
        # It would hold all parameters in the precision of the products: packed codes would be taken for numbers and rounded.
        # Autocast, below, rounds for products alone, as it does in one process.
        self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def _autocast(self) -> Any:
        """Products in the run's precision. Without FSDP2 accelerate sees to it in the model's forward."""
        wanted = self.process.sharded and self.job.precision != "float32"
        return torch.autocast(self.process.device.type, self.job.dtype) if wanted else nullcontext()

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
        if state is not None and self.process.is_main:
            # All that the Trainer itself wants to know of a checkpoint; it reads it from a file.
            loop = TrainerState(global_step=step, train_batch_size=self.args.train_batch_size)
            loop.compute_steps(self.args, self.job.steps)
            write_file(self.checkpoints / TRAINER_STATE_NAME, strict_json.dumps(dataclasses.asdict(loop)))
        self.process.wait()
        self.train(resume_from_checkpoint=None if state is None else str(self.checkpoints))

    def adapter_model(self) -> Any:
        """The model with its adapter, without what accelerate puts around it, when the run is over: after FSDP2 its trained parameters are
        made whole, in a call that every process makes."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        if self.process.sharded:
            training_state.make_whole(model)
        return model

    # - data -

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.job.order

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self.job.task == "causal-lm":
            count = super()._get_num_items_in_batch(batch_samples, device)
        else:
            count = torch.tensor(sum(training_loss.targets_in(batch) for batch in batch_samples), device=device)
            if self.process.count > 1:
                count = self.accelerator.gather(count).sum()
        self._tokens = int(cast(Tensor, count))
        return count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy summed over the targets and divided by the step's number of them, where transformers' classes for heads take a mean
        over each batch."""
        assert not return_outputs
        with self._autocast():
            if self.job.task == "causal-lm":
                loss = language_loss(model, inputs, self.job.dtype)
            else:
                inputs = dict(inputs)
                targets = {key: inputs.pop(key) for key in training_loss.TARGETS if key in inputs}
                loss = training_loss.head_loss(model(**inputs), targets)
        return loss / num_items_in_batch * self.process.count

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
            DataError: a loss, a gradient or a state of the optimizer is not finite; names the step and where.
        """
        self.accelerator.unscale_gradients()
        parameters = [p for p in self._names() if p.grad is not None]
        norm = training_state.full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        moments = watchdog.moments(self._plain_optimizer(), self._names())
        largest = watchdog.largest(t for _, t in moments)
        found = torch.stack(
            [
                torch.stack(self._losses).sum().float(),
                norm.float().to(self.args.device),
                training_state.full(largest).float().to(self.args.device),
                torch.tensor(float(self.signals.number), device=self.args.device),
            ]
        )
        if self.process.count > 1:
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
            named = [(name, training_state.full(p.grad)) for p, name in self._names().items() if p.grad is not None]
            self._stop(f"the gradient's norm is {gradient}", watchdog.not_finite(named) or watchdog.largest_norm(named))
        if not math.isfinite(state):
            whole = [(name, training_state.full(tensor)) for name, tensor in moments]
            self._stop("the optimizer's state is not finite", watchdog.not_finite(whole))
        if not overflowed:
            nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _where_loss(self) -> str | None:
        if self.process.sharded:
            # Where all processes must take part in a pass, one cannot search through its own batches.
            return watchdog.not_finite((name, training_state.full(p.detach())) for p, name in self._names().items())
        model = self.adapter_model()
        trained = training_state.trainable(model)

        def forward(batch: Mapping[str, Tensor]) -> None:
            with torch.no_grad(), self.compute_loss_context_manager():
                model(**{k: v for k, v in self._prepare_inputs(dict(batch)).items() if k not in training_loss.TARGETS})

        return watchdog.where_from(model, trained, self._batches, forward)

    def _stop(self, what: str, where: str | None) -> None:
        saved = training_state.steps(self.checkpoints)
        kept = f"the checkpoint of step {saved[0]} is kept" if saved else "no checkpoint was written yet"
        raise DataError(
            f"step {self.state.global_step + 1}: {what}{f': {where}' if where else ''}; this step was not applied, and {kept}; "
            "look at the data, or lower train.learning_rate and start over with --force"
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
        if self.signals.number and self.process.count == 1:
            # It came after `on_step_end`. Several processes agree with the next step.
            self.control.should_save = self.control.should_training_stop = True

    def _show(self) -> None:
        notes = getattr(self.tell, "notes", None)
        if notes is not None:
            began, tokens = self._clock
            self._clock = (began, tokens + self._tokens)
            on_gpu = self.process.device.type == "cuda"
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

    def _measure(self) -> dict[str, Any] | None:
        """What the validation rows give; None when a signal came meanwhile."""
        rows, size = self.job.validation, self.args.per_device_train_batch_size
        together = self.process.count * size
        # Under FSDP2 all take part in each pass: those without rows left have one without weight.
        count = len(rows) if not self.process.sharded else math.ceil(len(rows) / together) * together
        starts = range(self.process.rank * size, count, together)
        without_weight: list[dict[str, Any]] = [dict(Rows(rows, self.job.pad_id)[-1])] if rows else []

        def batches() -> Iterator[dict[str, Tensor]]:
            for number, start in enumerate(starts):
                self.tell("evaluate", number, len(starts))
                if self.signals.number and self.process.count == 1:
                    return
                batch = collate(rows[start : start + size] or without_weight, self.job.pad_id)
                yield {key: value.to(self.args.device) for key, value in batch.items()}

        with self._autocast():
            sums = training_loss.validation_sums(self.model, batches(), self.job.task, self.job.dtype, self.args.device)
        sums = torch.cat([sums, sums.new_tensor([self.signals.number])])
        if self.process.count > 1:
            sums = self.accelerator.gather(sums[None]).reshape(-1, 4).sum(0)
        self.tell("evaluate", len(starts), len(starts))
        if sums[3]:
            self.signals.number = self.signals.number or signal.SIGTERM
            return None
        return training_loss.record(sums[:3], self.job.task)

    # - saving and going on -

    def _names(self) -> dict[Tensor, str]:
        """Of the trained parameters. Walking through the model takes longer than a look at their gradients; once it is prepared for
        training they stay the same."""
        if not self._named:
            training_state.split_again(cast(nn.Module, self.model))
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
        faulty = watchdog.not_finite(parameters.items())
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
            metrics=self.metrics,
        )
        if self.process.is_main:
            training_state.save(self.checkpoints, state)
        self.process.wait()

    def _random_states(self) -> dict[str, Any]:
        """The main process's generators, and torch's of all."""
        state = training_state.random_state(self.args.device)
        if self.process.count == 1:
            return {**state, "ranks": {}}
        own = {key: value.to(self.args.device) for key, value in state.items() if isinstance(value, Tensor)}
        of_all = {key: self.accelerator.gather(value[None]) for key, value in own.items()}
        return {
            **state,
            "ranks": {
                str(rank): {key: values[rank].cpu() for key, values in of_all.items()}
                for rank in range(self.process.count)
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
            state |= state.pop("ranks").get(str(self.process.rank), {})
            training_state.set_random_state(state, self.args.device)
