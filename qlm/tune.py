"""What a gradient can still improve in a block that has been quantized: the codes of its linears, its norms and its biases.

The loss is the mean square of the difference between the block's output and the float model's, whose input is its own, so that what
earlier blocks have lost is made up for as well. All of it stays inside one block: memory is its weights some times over, and the
activations of a few windows. Nothing is taken that is not better on the samples that were kept aside.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qlm.calibrate import evaluation_mode
from qlm.numerics.rounding import Offsets, Rounded
from qlm.stream import Stream

# Steps between two looks at the samples that were kept aside.
LOOK = 25
# First step of norms and biases, relative to their size.
FLOAT_RATE = 2e-3


@dataclass(frozen=True)
class Tuned:
    """Held-out loss before and after, and the step, out of all, whose state was taken. `after` is the least of several looks, and so a
    little too low."""

    before: float
    after: float
    step: int

    def facts(self) -> dict[str, float]:
        return {"held_out_before": self.before, "held_out_after": self.after, "step": self.step}


class BlockLoss:
    """The loss of one block as a function of some of its parameters; the others are as they are in the block."""

    def __init__(self, block: nn.Module, stream: Stream, targets: Tensor, floats: Mapping[str, Tensor]) -> None:
        """
        Args:
            targets: the float block's outputs for all samples, shaped as `stream.hidden`, which the block reads.
            floats: norms and biases by their names in the block; its own are rounded to what it computes in.
        """
        self.block, self.stream, self.targets = block, stream, targets
        self.dtype = stream.hidden.dtype
        self.split = len(targets) - stream.held_out
        # Norms, softmax and sums in fp32; products in what the block computes in.
        self.floats = {name: value.to(targets.device, torch.float32) for name, value in floats.items()}
        # Apart from the graph: gradients of weights that are not learned would cost a third of the time and stay in them.
        self.weights = {name: value.detach() for name, value in block.named_parameters() if name not in floats}
        self.generator = torch.Generator().manual_seed(0)
        self.order: list[int] = []

    def __call__(self, rows: Sequence[int], parameters: Mapping[str, Tensor]) -> Tensor:
        """Mean square over the samples `rows`, `stream.few` at most."""
        # As many as there are arguments for; the last may be there several times, and counts once.
        samples = self.stream.few
        padded = [*rows, *[rows[-1]] * (samples - len(rows))]
        with torch.autocast(self.targets.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = functional_call(
                self.block,
                {**self.weights, **self.floats, **parameters},
                (self.stream.hidden[padded].float(),),
                self.stream.arguments_for_few,
            )
        first = self.stream.first
        difference = output[: len(rows), first:].float() - self.targets[list(rows), first:].float()
        return difference.square().mean()

    def next_rows(self) -> list[int]:
        """The samples of the next step: each sample once, in a drawn order, before any comes again."""
        if len(self.order) < self.stream.few:
            self.order += torch.randperm(self.split, generator=self.generator).tolist()
        rows, self.order = self.order[: self.stream.few], self.order[self.stream.few :]
        return rows

    @torch.no_grad()
    def held_out(self, parameters: Mapping[str, Tensor]) -> float:
        aside = list(range(self.split, len(self.targets)))
        size = self.stream.few
        parts = [aside[start : start + size] for start in range(0, len(aside), size)]
        return sum(self(rows, parameters).item() * len(rows) for rows in parts) / len(aside)

    def descend(
        self,
        steps: int,
        parameters: Callable[[], Mapping[str, Tensor]],
        step: Callable[[int], None],
        state: Callable[[], dict[str, Tensor]],
        stored: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> tuple[dict[str, Tensor], Tuned]:
        """Take `steps` steps, and return the state that was best on the samples kept aside, the first one included.

        Args:
            parameters: as they are now, for the loss. step: makes one step from the gradients. state: a copy of what is learned.
            stored: the parameters as files will hold them, if that differs.
        """
        stored = stored or parameters
        with evaluation_mode(self.block):
            with torch.no_grad():
                before = self.held_out(stored())
            best, best_state, best_step = before, state(), 0
            for index in range(steps):
                with torch.enable_grad():
                    # Relative to the loss at first, so that gradients of losses of any size are numbers of usual size.
                    (self(self.next_rows(), parameters()) / max(before, torch.finfo(torch.float32).tiny)).backward()
                step(index)
                if (index + 1) % LOOK == 0 or index + 1 == steps:
                    with torch.no_grad():
                        found = self.held_out(stored())
                    if found < best:
                        best, best_state, best_step = found, state(), index + 1
        return best_state, Tuned(before, best, best_step)


def learn_rounding(
    loss: BlockLoss, weights: Mapping[str, Tensor], rounded: Mapping[str, Rounded], steps: int
) -> tuple[dict[str, Tensor], Tuned]:
    """New codes, uint8 [O, I], of the block's linears by their paths in it.

    Args:
        weights: the float weights [O, I]. rounded: what they have become so far.
    """
    offsets = {name: Offsets(weights[name], rounded[name]) for name in rounded}

    def step(index: int) -> None:
        for each in offsets.values():
            each.step(index, steps)

    return loss.descend(
        steps,
        lambda: {f"{name}.weight": each.weight(loss.dtype) for name, each in offsets.items()},
        step,
        lambda: {name: each.codes() for name, each in offsets.items()},
    )


def tune_floats(
    loss: BlockLoss, dtype: torch.dtype, steps: int, names: Collection[str] | None = None
) -> tuple[dict[str, Tensor], Tuned]:
    """New norms and biases of the block by their names in it, in `dtype`, which they are stored in. names: of those that may change, all
    if None."""
    names = loss.floats if names is None else names
    leaves = {name: loss.floats[name].clone().requires_grad_() for name in names}
    rates = {name: FLOAT_RATE * _size(loss.block, name, loss.floats[name]) for name in names}
    optimizer = torch.optim.Adam(
        [{"params": [leaf], "lr": rates[name], "first": rates[name]} for name, leaf in leaves.items()],
        betas=(0.9, 0.999),
    )

    def step(index: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * (1 - index / steps)
        optimizer.step()
        optimizer.zero_grad()

    return loss.descend(
        steps,
        lambda: leaves,
        step,
        # A copy in fp32 too, where the leaves themselves move on.
        lambda: {name: leaf.detach().to(dtype, copy=True) for name, leaf in leaves.items()},
        lambda: {name: leaf.detach().to(dtype).float() for name, leaf in leaves.items()},
    )


def _size(block: nn.Module, name: str, value: Tensor) -> float:
    """What a step of a norm's or a bias's values is relative to."""
    owner = block.get_submodule(name.rpartition(".")[0])
    own = value.square().mean().sqrt().item()
    assert isinstance(owner.weight, Tensor)
    weight = owner.weight.detach().float()
    if isinstance(owner, nn.LayerNorm):
        return weight.square().mean().sqrt().item()
    # A bias of zeros has no size of its own; a tenth of what the outputs are for inputs of size 1 will do.
    return max(own, 0.1 * weight.norm(dim=1).square().mean().sqrt().item())
