"""What a weight backend is: how the weights of a linear are stored and multiplied.

A backend works on named tensors, exactly those that the file holds for one linear, bias excepted: `quantize` makes them, the file
keeps them, `module` runs on them. Between quantizing and loading nothing is converted, so nothing can go wrong there. Backends know
nothing of models, blocks or files; quantize.py and load.py do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlm.arch import HEADS
from qlm.errors import DataError
from qlm.formats.layout import TensorLayout
from qlm.kernels import activations
from qlm.numerics.affine import RowError
from qlm.numerics.gptq import Factor, factorize_in_order
from qlm.recipe import LinearSettings

# A path in the model (as in memory) to how that linear is stored. Each backend has its own frozen dataclass for the how.
Scheme = Mapping[str, Any]


@dataclass(frozen=True)
class Statistics:
    """What calibration says about the input x that a group of linears shares, in the model as quantized so far.

    Products of two are means over the calibration tokens, E[a b^T], or, where the biases will make up for the mean of every output,
    E[(a - E[a]) (b - E[b])^T]: then what an error costs is its variance alone.

    Attributes:
        hessian: fp32 [I, I], of x with itself.
        tokens: how many tokens that were.
        mean: fp32 [I], E[x].
        absmax: fp32 [I], max |x| before the linears do anything with it.
        cross: fp32 [I, I], of x' with x, x' the same input in the float model; None where that is not followed, and where `lag` is.
        target_mean: fp32 [I], E[x'].
        lag: fp32 [O, I], of s' - s with x, s the sum of the residual stream and the linear's output, and s' the same in the float
            model; where the linear's output is added to the residual stream. It holds what all layers before have lost.
        mean_lag: fp32 [O], E[s' - s].
        held_out: the same of samples that were kept aside; on the CPU.
        factors: of the Hessian, by what they were made with; kept where a dictionary is given, for those who solve several times.
    """

    hessian: Tensor
    tokens: int
    mean: Tensor | None = None
    cross: Tensor | None = None
    target_mean: Tensor | None = None
    lag: Tensor | None = None
    mean_lag: Tensor | None = None
    absmax: Tensor | None = None
    held_out: "Statistics | None" = None
    factors: "dict[tuple[str, int, float], Factor] | None" = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Statistics":
        """The same with every tensor moved, without what has been kept with it."""
        tensors: Any = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, held_out=None, factors=None, **tensors)

    def factor(self, order: str, group_size: int, damp: float) -> Factor:
        """`factorize_in_order` of the Hessian. Raises SingularHessian."""
        how = order, group_size, damp
        found = self.factors.get(how) if self.factors is not None else None
        if found is None:
            found = factorize_in_order(self.hessian, *how)
            if self.factors is not None:
                self.factors[how] = found
        return found

    def lag_of(self, weight: Tensor) -> Tensor | None:
        """What the outputs of linears [O, I] that multiply x lag behind the float model's, with x: fp32 [O, I], where the weight is; None
        if unknown."""
        if self.lag is not None:
            return self.lag.to(weight.device)
        return None if self.cross is None else weight.float() @ (self.cross - self.hessian).to(weight.device)

    def mean_lag_of(self, weight: Tensor) -> Tensor | None:
        """Its mean: fp32 [O]; the weight lies where the statistics do."""
        if self.mean_lag is not None or self.mean is None or self.target_mean is None:
            return self.mean_lag
        return weight.float() @ (self.target_mean - self.mean)


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear's tensors, by their names in the file after the linear's path, and facts for manifest and report.

    Attributes:
        bias_shift: fp32 [O], to be added to the linear's bias, if it has one.
        loss, size: float64 [O], of each output e H e^T and w H w^T: e its weights' error, w what they were to come near to, H the
            damped Hessian of the inputs, or 1 where no text was looked at. `relative_error` makes facts of them.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    bias_shift: Tensor | None = None
    loss: Tensor | None = None
    size: Tensor | None = None


@dataclass(frozen=True)
class Description:
    """How a folder tells other software what is in it: the `quantization_config` of config.json, and files beside it."""

    quantization_config: dict[str, Any] | None
    files: dict[str, dict[str, Any]]


class Backend(Protocol):
    """The interface. Implementations are plain classes without a common base; `qlm.backends.BACKENDS` names them."""

    name: str

    @property
    def as_multiplied(self) -> Callable[[Tensor], Tensor] | None:
        """What its linears make of their input [..., I] before they multiply it, where that is part of the format. Those with
        `input_16bit` multiply it as it is."""

    def check(self, name: str, shape: tuple[int, int], settings: LinearSettings) -> None:
        """Refuse a linear [O, I] that the settings cannot hold. Raises UsageError with the linear's name."""

    def quantize(
        self, weights: Mapping[str, Tensor], statistics: Statistics | None, settings: LinearSettings
    ) -> list[QuantizedLinear]:
        """Quantize linears that share their input and their settings.

        Args:
            weights: full name of each linear to its weight [O, I], any float dtype.
            statistics: of their input, where the settings look at any (`QuantizeRecipe.needs_calibration`).
        Raises:
            DataError: a weight is not finite, or the statistics cannot be used; names the linear.
        """

    def format(self, settings: LinearSettings, dtype: torch.dtype) -> Any:
        """How a linear quantized with `settings`, from a checkpoint of `dtype`, is stored."""

    def layout(self, shape: tuple[int, int], format: Any) -> dict[str, TensorLayout]:
        """The tensors that a file must hold for a linear [O, I]."""

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], format: Any) -> Tensor:
        """The float weight that the tensors stand for: fp32 [O, I]."""

    def module(
        self,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        shape: tuple[int, int],
        format: Any,
        dtype: torch.dtype,
    ) -> nn.Module:
        """A module that computes x W^T + b from the tensors, in `dtype`. Its state dict is the file's tensors. One that rounds
        activations has a method `activation_format`, which says how: "int8 per token"."""

    def describe(self, scheme: Scheme, left_out: Sequence[str], dtype: torch.dtype) -> Description:
        """What config.json says about a model whose linears are stored by `scheme`, `left_out` ones in `dtype`."""

    def read(self, config: Mapping[str, Any], linears: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
        """The scheme of a folder that says `config`, for the linears (paths as in memory) of its blocks, and the head's.

        Raises:
            DataError: the config asks for something that this backend does not do.
        """


def activations_of(model: nn.Module) -> str:
    """What the model's linears do with activations, here and now: "float", "int8 in groups of 128", or several of these."""
    formats = [getattr(module, "activation_format", None) for module in model.modules()]
    return activations.together({str(format()) for format in formats if callable(format)})


def with_heads(left_out: Sequence[str]) -> list[str]:
    """The linears that stay floats, and the heads of all tasks: other software quantizes a head that is not named, one that it starts anew
    on this checkpoint's base among them."""
    return list(dict.fromkeys([*left_out, *HEADS.values()]))


def only_format(scheme: Scheme, fact: str) -> Any:
    """The one value of attribute `fact` in the scheme; formats that cannot mix it call this. Checked when the recipe was read."""
    values = {getattr(how, fact) for how in scheme.values()}
    assert len(values) == 1, f"{fact} differs between linears: {values}"
    return values.pop()


def relative_error(loss: Tensor, size: Tensor) -> float:
    """sqrt(sum(loss) / sum(size)), both [O] as in `QuantizedLinear`; 0 for weights of size 0."""
    whole = size.sum().item()
    return float(math.sqrt(loss.sum().item() / whole)) if whole > 0 else 0.0


def with_parts(quantized: QuantizedLinear, parts: Mapping[str, Sequence[range]]) -> QuantizedLinear:
    """The same with the relative error of each part of its outputs among the facts, under "parts"; as it is where there are none."""
    if not parts or quantized.loss is None or quantized.size is None:
        return quantized
    errors = {
        part: relative_error(
            *(torch.cat([x[r.start : r.stop] for r in rows]) for x in (quantized.loss, quantized.size))
        )
        for part, rows in parts.items()
    }
    return replace(
        quantized, facts={**quantized.facts, "parts": {part: {"relative_error": e} for part, e in errors.items()}}
    )


def row_squares(x: Tensor) -> Tensor:
    """Sum of squares of each row: float64 [O]. x [O, I], of any size that fp32 holds."""
    # In parts, because all of x in float64 would be the largest thing in memory.
    return torch.cat([part.double().square().sum(1) for part in x.split(256)])


def as_autocast(x: Tensor) -> Tensor:
    """The input of a linear in the dtype that autocast gives torch's own. On GPUs norms answer in float32 under autocast, and what follows
    would be multiplied in it."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def refuse_not_finite(name: str, tensor: Tensor, blame: str = "the checkpoint is damaged") -> None:
    """Raises DataError, with the tensor's name and the index of the first of them, for values that are NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all()):
        return
    where = (~tensor.isfinite()).nonzero()
    raise DataError(
        f"{name}: {len(where)} of {tensor.numel()} values are NaN or infinite, the first at {where[0].tolist()}; {blame}"
    )


def refuse_singular(names: str, error: ValueError, settings: LinearSettings) -> None:
    """Raises DataError for a Hessian that cannot be used, unless the recipe has such linears rounded to nearest."""
    if settings.on_failure == "error":
        raise DataError(
            f"{names}: the Hessian of the calibration text cannot be used: {error}; use more or other text, "
            "or accept rounding to nearest for such layers with quantize.on_failure: round_to_nearest"
        ) from None


def refused(weights: Mapping[str, Tensor], error: ValueError) -> DataError:
    """What a solver has refused, with the names of the linears whose weights [O, I] it had been given one below the other, or with
    the one name and the output that it is about."""
    if isinstance(error, RowError):
        row = error.row
        for name, weight in weights.items():
            if row < len(weight):
                return DataError(f"{name}.weight, row {row}: {error}")
            row -= len(weight)
    return DataError(f"{', '.join(weights)}: {error}")


def apply_keeping_dtypes(module: nn.Module, fn: Any) -> nn.Module:
    """`nn.Module._apply` for a module whose buffers must keep their dtype: `.to(torch.bfloat16)` moves, but does not round, scales."""
    for name, buffer in module._buffers.items():
        if buffer is not None:
            moved = fn(buffer)
            module._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = fn(parameter.data)
    return module
