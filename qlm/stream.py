"""The inputs of one block after another while a model is quantized, and what they say about the linears that read them.

A `Stream` holds what the next block reads: `hidden` as the quantized blocks before it produce it and, where the float model is the
target, `reference` as the float blocks do. Memory is these, one block (two with a reference), and the sums of one stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlm.arch import FamilySpec, LinearGroup
from qlm.backends import Statistics
from qlm.calibrate import evaluation_mode, instead_of_forward
from qlm.errors import DataError
from qlm.kernels import cpu_ops
from qlm.numerics.gptq import add_gram_, finish_hessian_

# Tokens that go through a block at once: large enough for full speed, small enough that activations stay below a block's size.
BATCH_TOKENS = 4096
# Windows in a step where something is learned by gradient.
FEW = 4
# One window in so many is kept aside where something is chosen by what was not fitted to.
HELD_OUT = 8


class _Stop(Exception):
    """Ends a forward pass that has gone far enough."""


class _Side:
    """One of the two models: its hidden states, and the inputs of its attention's last linear, batch by batch, once known."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
        self.attended: dict[int, Tensor] = {}


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; of what a GPU holds pinned, where there is room for it, since copies take a fraction of the time so."""
    if not tensor.is_cuda:
        return tensor.clone()
    try:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor)


@contextmanager
def _tf32(x: Tensor) -> Iterator[None]:
    """Inside, the GPU of x, if it is on one from sm_80 on, multiplies in TF32: factors have 11 bits, as many as a float16, products and sums
    are fp32's. Sums over all tokens are most of the arithmetic of quantizing, and no more exact than the activations that they are of."""
    if not x.is_cuda:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Sums:
    """What is summed up over the tokens of a linear's input; `finish` divides."""

    def __init__(self, about_mean: bool) -> None:
        self.tokens = 0
        self.about_mean = about_mean

    def add(self, x: Tensor, target: Tensor | None, lag: Tensor | None) -> None:
        """x, target [T, I]: the input in the quantized model, and in the float one. lag fp32 [T, O]: as in `Statistics`."""
        if self.about_mean or target is not None:
            x = x.float()
        target = None if target is None or lag is not None else target.float()
        if not self.tokens:
            # Small differences of large means would be lost in squares: these are of differences from the first tokens' means.
            self.origin = x.mean(0, dtype=torch.float32).mul_(self.about_mean)
            self.target_origin = None if target is None else target.mean(0).mul_(self.about_mean)
            self.sum = torch.zeros_like(self.origin)
            self.hessian = self.sum.new_zeros(x.shape[1], x.shape[1])
            self.other_sum = (
                None if target is None and lag is None else torch.zeros_like((x if lag is None else lag)[0])
            )
            self.product = None if self.other_sum is None else x.new_zeros(len(self.other_sum), x.shape[1])
        self.tokens += len(x)
        if self.about_mean:
            x = x - self.origin
        self.sum += x.sum(0, dtype=torch.float32)
        other = lag if target is None or self.target_origin is None else target - self.target_origin
        with _tf32(x):
            if not cpu_ops.add_gram_(self.hessian, x):
                add_gram_(self.hessian, x)
            if other is not None and self.product is not None:
                self.product.addmm_(other.T, x)
        if other is not None and self.other_sum is not None:
            self.other_sum += other.sum(0)

    def finish(self, held_out: Statistics | None) -> Statistics:
        mean = self.sum / self.tokens
        hessian = finish_hessian_(self.hessian, self.tokens)
        if self.about_mean:
            hessian.addr_(mean, mean, alpha=-1).diagonal().clamp_(min=0)
        mean = mean + self.origin
        found = Statistics(hessian, self.tokens, mean, held_out=held_out)
        if self.product is None or self.other_sum is None:
            return found
        other_mean, product = self.other_sum / self.tokens, self.product / self.tokens
        if self.about_mean:
            product.addr_(other_mean, mean - self.origin, alpha=-1)
        if self.target_origin is None:
            return replace(found, lag=product, mean_lag=other_mean)
        return replace(found, cross=product, target_mean=other_mean + self.target_origin)


@dataclass(frozen=True)
class _Read:
    """What a group reads of one batch, x [samples, length, I], and, where its output is added to the residual stream, the sum:
    fp32 [samples, length, O]."""

    x: Tensor
    sum: Tensor | None


class Stream:
    """The inputs of one block after another.

    Attributes:
        hidden: [samples, length, hidden size], the inputs of the next block, in the dtype that the blocks compute in.
        reference: the same in the float model, on the host if the model is on a GPU; None where nothing is compared with it.
        held_out: how many samples, the last ones, are kept aside for choices.
        arguments: what a block is called with beside its input, for each batch of `batch_size` samples.
        few: samples in a step where something is learned by gradient; `arguments_for_few` are theirs.
        first: index of the first token of each window that counts.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: FamilySpec,
        first_block: str,
        windows: Tensor,
        device: str = "cpu",
        *,
        reference: bool = False,
        held_out: bool = False,
        ignore_first: bool = False,
        about_mean: bool = False,
    ) -> None:
        """Run the model up to its first block.

        Args:
            model: with embeddings filled in; its blocks may be empty.
            first_block: path of the block.
            windows: int64 [samples, length].
            reference: follow the float model too.
            held_out: keep an eighth of the samples aside, at least one if there are two.
            ignore_first: leave the first token of each window, an outlier in many models, out of the statistics.
            about_mean: products are of differences from the means (`Statistics`).
        """
        self._spec = spec
        self._about_mean = about_mean
        first = spec.stages[0][0]
        norm_comes_after = first.norm_if is not None and not getattr(model.config, first.norm_if)
        self._norm_after_attention = first.norm if norm_comes_after else None
        self.first = 1 if ignore_first and windows.shape[1] > 1 else 0
        self.batch_size = max(1, BATCH_TOKENS // windows.shape[1])
        self.held_out = min(len(windows) - 1, -(-len(windows) // HELD_OUT)) if held_out else 0
        calls: list[tuple[Tensor, dict[str, Any]]] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args[0], kwargs))
            raise _Stop

        hook = model.get_submodule(first_block).register_forward_pre_hook(catch, with_kwargs=True)
        self.few = min(FEW, len(windows))
        try:
            for batch in (*windows.split(self.batch_size), windows[: self.few]):
                with suppress(_Stop), evaluation_mode(model):
                    model(input_ids=batch.to(device), use_cache=False)
        finally:
            hook.remove()
        _, self.arguments_for_few = calls.pop()
        self.arguments = [arguments for _, arguments in calls]
        self._quantized = _Side(torch.cat([hidden for hidden, _ in calls]))
        # The float model's lie on the host: they are read once in a stage, and a GPU has less memory than time.
        self._float = _Side(_on_host(self.hidden)) if reference else None

    @property
    def hidden(self) -> Tensor:
        return self._quantized.hidden

    @property
    def reference(self) -> Tensor | None:
        return None if self._float is None else self._float.hidden

    def statistics(
        self,
        block: nn.Module,
        groups: Sequence[LinearGroup],
        path: str,
        float_block: nn.Module | None = None,
        as_multiplied: Mapping[LinearGroup, Callable[[Tensor], Tensor]] = MappingProxyType({}),
        absmax: bool = False,
    ) -> Mapping[LinearGroup, Statistics]:
        """What `groups` read, from one pass through the block that ends when the last of them has been reached.

        Args:
            float_block: the block as it was before anything in it was quantized; with a reference only.
            as_multiplied: what the linears of a group make of their input [..., I] before they multiply it, if anything.
            absmax: the largest |x| of each feature too.
        Raises:
            DataError: an activation is NaN, infinite or too large to be squared; names the layer and the first such feature.
        """
        fitted: dict[LinearGroup, _Sums] = {}
        aside: dict[LinearGroup, _Sums] = {}
        largest: dict[LinearGroup, Tensor] = {}
        split = len(self.hidden) - self.held_out
        for index, first in enumerate(range(0, len(self.hidden), self.batch_size)):
            here = self._reads(block, self._quantized, index, groups)
            there = self._reads(float_block, self._float, index, groups) if float_block and self._float else {}
            for group, read in here.items():
                rounded = as_multiplied.get(group)
                x = read.x if rounded is None else rounded(read.x)
                if absmax:
                    of_batch = self._rows(read.x).abs().amax(0)
                    largest[group] = torch.maximum(largest[group], of_batch) if group in largest else of_batch
                target = there.get(group)
                lag = None
                if target is not None and target.sum is not None and read.sum is not None:
                    lag = target.sum - read.sum
                    if rounded is not None:
                        weight = cast(nn.Linear, block.get_submodule(group.linears[0])).weight
                        lag += F.linear((read.x - x).float(), weight.float())
                for sums, rows in (
                    (fitted, slice(0, max(0, split - first))),
                    (aside, slice(max(0, split - first), None)),
                ):
                    if len(x[rows]):
                        sums.setdefault(group, _Sums(self._about_mean)).add(
                            self._rows(x[rows]),
                            None if target is None else self._rows(target.x[rows]),
                            None if lag is None else self._rows(lag[rows]),
                        )
        found = {}
        for group in groups:
            name = f"{path}.{group.linears[0]}"
            kept = aside.pop(group).finish(None) if group in aside else None
            if kept is not None:
                _refuse_not_finite(kept, name)
                # Looked at once, and as large as what is solved with: it need not fill a GPU's memory.
                kept = kept.moved(_on_host) if self.hidden.is_cuda else kept
            found[group] = replace(fitted.pop(group).finish(kept), absmax=largest[group].float() if absmax else None)
            _refuse_not_finite(found[group], name)
        return found

    def _rows(self, x: Tensor) -> Tensor:
        return x[:, self.first :].flatten(0, -2)

    def _reads(
        self, block: nn.Module, side: _Side, index: int, groups: Sequence[LinearGroup]
    ) -> dict[LinearGroup, _Read]:
        """What each group reads of one batch, and, if the float model is followed, what its output is added to."""
        x: dict[LinearGroup, Tensor] = {}
        sums: dict[LinearGroup, Tensor] = {}
        batch = self._batch(side, index)
        residual = batch
        of_linear = {linear: group for group in groups for linear in group.linears}
        added = self._spec.residual_linears if self._float is not None else ()

        def stop_if_done() -> None:
            if len(x) == len(groups) and all(of_linear[linear] in sums for linear in added if linear in of_linear):
                raise _Stop

        def on_input(group: LinearGroup, module: nn.Module, args: tuple[Any, ...]) -> None:
            # A GPU has the arithmetic to compute the attention again, and less memory to keep it in.
            if self._spec.attention_out in group.linears and not args[0].is_cuda:
                side.attended[index] = args[0]
            # OPT flattens the tokens of a batch before its MLP.
            x[group] = args[0].view(*batch.shape[:2], args[0].shape[-1])
            stop_if_done()

        def on_sum(linear: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            nonlocal residual
            residual = residual.float() + output.view(batch.shape).float()
            if linear in of_linear:
                sums[of_linear[linear]] = residual
                stop_if_done()

        def on_norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            nonlocal residual
            residual = output.view(batch.shape)

        hooks = [
            block.get_submodule(group.linears[0]).register_forward_pre_hook(partial(on_input, group))
            for group in groups
        ]
        hooks += [block.get_submodule(linear).register_forward_hook(partial(on_sum, linear)) for linear in added]
        if added and self._norm_after_attention is not None:
            hooks.append(block.get_submodule(self._norm_after_attention).register_forward_hook(on_norm))
        try:
            self._forward(block, side, index, batch)
        finally:
            for handle in hooks:
                handle.remove()
        return {group: _Read(read, sums.get(group)) for group, read in x.items()}

    def _batch(self, side: _Side, index: int) -> Tensor:
        """One batch of a side's hidden states, where the model is."""
        batch = side.hidden[index * self.batch_size : (index + 1) * self.batch_size]
        return batch.to(self.hidden.device, non_blocking=True)

    def _forward(self, block: nn.Module, side: _Side, index: int, batch: Tensor | None = None) -> Tensor | None:
        """The block's output for one batch; None if a hook ended it.

        What the attention computes is final once its last linear's turn has come: from then on its output is made from the kept
        inputs of that linear, which saves the attention itself in the passes that remain.
        """
        batch = self._batch(side, index) if batch is None else batch
        with suppress(_Stop), evaluation_mode(block), _attention_from(block, self._spec, side.attended.get(index)):
            return block(batch, **self.arguments[index])
        return None

    def run(self, block: nn.Module) -> None:
        """Send the block's inputs through it, for hooks to see."""
        for index in range(len(self.arguments)):
            self._forward(block, self._quantized, index)

    def targets(self, float_block: nn.Module) -> Tensor:
        """What the float block makes of the reference, which stays as it is: shaped as `hidden`."""
        assert self._float is not None
        outputs = [self._forward(float_block, self._float, index) for index in range(len(self.arguments))]
        return torch.cat([output for output in outputs if output is not None])

    def forget_attention(self) -> None:
        """What leads to the attention's last linear may have changed after its turn came."""
        self._quantized.attended.clear()

    def advance(self, block: nn.Module) -> None:
        """Replace the inputs of `block` by its outputs, in place."""
        self._advance(block, self._quantized)

    def advance_reference(self, block: nn.Module, afresh: bool = True) -> None:
        """The same for the float model, if it is followed; `afresh`: nothing that `statistics` has kept is this block's."""
        if self._float is not None:
            if afresh:
                self._float.attended.clear()
            self._advance(block, self._float)

    def _advance(self, block: nn.Module, side: _Side) -> None:
        for index, batch in enumerate(side.hidden.split(self.batch_size)):
            output = self._forward(block, side, index)
            assert output is not None
            batch.copy_(output)
        side.attended.clear()


@contextmanager
def _attention_from(block: nn.Module, spec: FamilySpec, kept: Tensor | None) -> Iterator[None]:
    """Inside, the attention is its last linear, applied to `kept`; nothing changes where that is None."""
    if kept is None:
        yield
        return
    attention, last = block.get_submodule(spec.attention), block.get_submodule(spec.attention_out)
    with instead_of_forward(attention, lambda *args, **kwargs: (last(kept), None)):
        yield


def _refuse_not_finite(statistics: Statistics, name: str) -> None:
    # The diagonal is the sum of squares of each input feature: one NaN or infinity anywhere shows there. It may also be finite numbers
    # whose squares are not: then the mean is.
    bad, mean = ~statistics.hessian.diagonal().isfinite(), statistics.mean
    what = "too large to be squared in fp32" if mean is not None and mean.isfinite().all() else "NaN or infinite"
    of, where = "input features", ""
    if not bool(bad.any()):
        what, where = "NaN, infinite or too large to be squared in fp32", " in the float model or here"
        if statistics.cross is not None and statistics.target_mean is not None:
            bad = ~(statistics.target_mean + statistics.cross.sum(1)).isfinite()
        elif statistics.lag is not None and statistics.mean_lag is not None:
            of, bad = "outputs in the residual stream", ~(statistics.mean_lag + statistics.lag.sum(1)).isfinite()
    if bool(bad.any()):
        raise DataError(
            f"{name}: {int(bad.sum())} of its {len(bad)} {of} are {what} on the calibration text{where}, the first feature "
            f"{int(bad.nonzero()[0])}; the checkpoint or an earlier layer is damaged"
        )
