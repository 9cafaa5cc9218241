"""Cross entropy of a language model with a frozen head, without its logits: they are made, used and forgotten some rows at a time.

A vocabulary of 50,000 makes logits, their log-softmax and its gradient the largest things in memory of a whole step. The head learns
nothing, so that the gradient of its input is all that is wanted: it follows from the same rows' logits, in the forward pass already.
Rows without a target cost nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlm.calibrate import instead_of_forward
from qlm.training.data import NOT_LEARNED

# Logits that exist at once, twice: 64 MB in float32. With fewer rows in a part, arranging the head's weights for each product counts.
_LOGITS = 16 << 20


def logits_bytes(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """What logits take at most: in `dtype`, their log-softmax in float32, and its exponential in `dtype`."""
    return min(tokens * vocabulary, _LOGITS) * (4 + 2 * dtype.itemsize)


def language_loss(model: Any, batch: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Cross entropy of the token after each position, in nats, summed over the batch: float32, a number.

    Args:
        model: a causal language model of one of the families, maybe with an adapter on it, maybe wrapped for several processes.
        batch: its inputs, and int64 `labels` [B, T], the tokens themselves; -100 is none to learn.
        dtype: of the head's products; softmax and sums are float32.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    inner = getattr(model, "module", model)
    head = inner.get_output_embeddings()
    # What `logits` are then is the loss. It is made where the head would run: under FSDP2 all of its weight is here then alone. Forward
    # is the wrapper's, which waits for gradients there.
    with instead_of_forward(head, lambda hidden: summed_loss(hidden, head.weight, batch["labels"], dtype)):
        loss: Tensor = model(**inputs).logits
    return loss


def summed_loss(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of what a head without bias reads, [B, T, E], and its weight [V, E], which has no gradient."""
    wanted = labels[:, 1:].flatten()
    rows = (wanted != NOT_LEARNED).nonzero().squeeze(1)
    found: Tensor = _SummedLoss.apply(hidden[:, :-1].flatten(0, 1)[rows], weight.to(dtype), wanted[rows])
    return found


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        parts = math.ceil(len(hidden) * len(weight) / _LOGITS)
        size = math.ceil(len(hidden) / max(1, parts)) or 1
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), size):
                part = slice(start, start + size)
                target = wanted[part, None]
                logp = (hidden[part].to(weight.dtype) @ weight.T).log_softmax(1, dtype=torch.float32)
                total -= logp.gather(1, target).sum()
                if gradient is not None:
                    share = logp.exp_()
                    share.scatter_add_(1, target, share.new_full(target.shape, -1.0))
                    # In float16 shares below 6e-8 vanish here, before any scaling of the loss: together 1e-7 of a gradient or so.
                    gradient[part] = share.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(ctx.dtype), None, None
