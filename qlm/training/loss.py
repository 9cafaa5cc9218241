"""Losses of the tasks, as sums over targets: a mean of the batches' means would weigh a target by how many others are beside it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlm.arch import Task
from qlm.training.data import NOT_LEARNED
from qlm.training.language_loss import language_loss

# What a batch holds beside the model's inputs.
TARGETS = ("labels", "start_positions", "end_positions")


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


def targets_in(batch: Mapping[str, Tensor]) -> int:
    """How many labels a head's batch has; a pair of positions is two."""
    return sum(int(batch[key].ne(NOT_LEARNED).sum()) for key in TARGETS if key in batch)


def _right(outputs: Any, targets: Mapping[str, Tensor]) -> int:
    """How many of them the head's largest logit is at."""
    logits = {"labels": "logits", "start_positions": "start_logits", "end_positions": "end_logits"}
    return sum(int((outputs[logits[key]].argmax(-1) == wanted).sum()) for key, wanted in targets.items())


@torch.no_grad()
def validation_sums(
    model: Any, batches: Iterable[dict[str, Tensor]], task: Task, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Loss in nats, targets, and of heads the right ones, summed over the batches: float64 [3]. dtype: as in `language_loss`.

    Draws nothing from any random generator, so that measuring more or less often changes no training.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        if task == "causal-lm":
            sums[0] += language_loss(model, batch, dtype)
            sums[1] += batch["labels"][:, 1:].ne(NOT_LEARNED).sum()
        else:
            targets = {key: batch.pop(key) for key in TARGETS if key in batch}
            outputs = model(**batch)
            sums[0] += head_loss(outputs, targets)
            sums[1] += targets_in(targets)
            sums[2] += _right(outputs, targets)
    model.train(was_training)
    return sums


def record(sums: Tensor, task: Task) -> dict[str, Any]:
    """What metrics.jsonl says of a measurement.

    Args:
        sums: those of `validation_sums`, of all processes together.
    Returns:
        `validation_loss` (nats per target), `validation_perplexity` or, of heads, `validation_accuracy` (a share), and
        `validation_tokens`, how many targets there were.
    """
    loss, count, right = sums.tolist()
    mean = loss / max(count, 1)
    extra = {"validation_perplexity": math.exp(min(mean, 700.0))}
    if task != "causal-lm":
        extra = {"validation_accuracy": right / max(count, 1)}
    return {"validation_loss": mean, **extra, "validation_tokens": int(count)}
