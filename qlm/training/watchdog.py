"""Values that are NaN or infinite: are there any, and in which tensor or module did they begin. Functions on tensors and modules; what
is looked at when, and what follows from it, is the loop's affair."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first floating-point tensor with a value that is NaN or infinite, and how many it has; None when all are finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            values = tensor.detach()
            # 8-bit floats have no isfinite.
            values = values.float() if values.element_size() == 1 else values
            if not bool(values.isfinite().all()):
                return f"{name} ({int((~values.isfinite()).sum())} of {values.numel()} values)"
    return None


def moments(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> list[tuple[str, Tensor]]:
    """The optimizer's tensors that a NaN could lie in, as ("parameter: key", tensor)."""
    return [
        (f"{names[parameter]}: {key}", value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        # Counts of steps lie on the CPU; looking at them costs a pass of its own.
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim and "map" not in key
    ]


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """The largest magnitude in them, a tensor of one number; NaN or infinite if any value is."""
    found = list(tensors)
    return nn.utils.get_total_norm(found, norm_type=math.inf) if found else torch.zeros(())


def largest_norm(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the tensor with the largest norm, and that norm; None where there is no tensor. In float64, where the squares of any
    float32 have a sum."""
    norms = {name: float(tensor.detach().double().norm()) for name, tensor in tensors}
    name = max(norms, key=norms.__getitem__, default=None)
    return None if name is None else f"{name} has the largest, {norms[name]:.3g}"


def where_from(
    model: nn.Module,
    trained: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    forward: Callable[[Mapping[str, Tensor]], None],
) -> str | None:
    """Where a loss that is not finite comes from: a tensor of the model, or else the first module that makes one of finite input.

    Args:
        trained: parameters that are looked at first. batches: of the step. forward: sends one of them through the model.
    """
    packed, scales = _four_bits(model)
    tensors = [*trained.items(), *model.named_parameters(), *model.named_buffers(), *scales]
    # Masks may hold infinities on purpose.
    faulty = not_finite((name, tensor) for name, tensor in tensors if "mask" not in name and name not in packed)
    if faulty is not None:
        return faulty
    for batch in batches:
        if (module := _first_module(model, batch, forward)) is not None:
            return f"output of {module}"
    return None


def _four_bits(model: nn.Module) -> tuple[set[str], list[tuple[str, Tensor]]]:
    """Of bitsandbytes' linears: names of the parameters with packed codes, which mean nothing where they are held as floats; and their
    scales by their names in files, which are neither parameters nor buffers."""
    packed, scales = set(), []
    for name, module in model.named_modules():
        state: Any = getattr(module, "quant_state", None)
        if state is not None:
            packed.add(f"{name}.weight")
            scales.append((f"{name}.weight.absmax", state.absmax))
            if state.nested:
                scales.append((f"{name}.weight.nested_absmax", state.state2.absmax))
    return packed, scales


def _first_module(
    model: nn.Module, batch: Mapping[str, Tensor], forward: Callable[[Mapping[str, Tensor]], None]
) -> str | None:
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not found and not_finite([(name, output)]):
            found.append(name)

    hooks = [
        module.register_forward_hook(functools.partial(look, name))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
