"""The module that runs NF4 linears: bitsandbytes' Linear4bit, so that PEFT and everything else that knows that class works,
with qlm's own kernels for passes on a CPU. This module is the project's only door to bitsandbytes, opened at the first use.

On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks a Linear4bit at its first forward pass and rounds every absmax to bf16 (a
relative error of up to 0.4 % in each block, silently, and lossy when saved again). Modules made here do not: they compute
from the file's absmax.

Under FSDP2 the weight is a DTensor of which each process holds some rows, and while the module runs a plain parameter with all of
them; the quantization state stays the module's. FSDP2 shards floating-point parameters alone, so that `hold_as` views the bytes as such.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlm.formats.nf4 import BLOCK
from qlm.kernels import activations
from qlm.kernels.cpu_ops import takes_nf4
from qlm.kernels.ops import nf4_activations, nf4_linear


def as_bytes(packed: Tensor) -> Tensor:
    """Packed codes held in any dtype, as their bytes: uint8 [O * I / 2, 1], the same memory."""
    return packed if packed.dtype == torch.uint8 else packed.reshape(-1).view(torch.uint8)[:, None]


def hold_as(model: nn.Module, storage: torch.dtype) -> None:
    """Let all NF4 linears in a model hold their packed bytes as elements of `storage`; no byte changes, and no memory moves.

    Seen as floats they mean nothing and may be NaN: whoever looks for these must leave them out.
    """
    for module in model.modules():
        if isinstance(module, _OnCpus):
            module.hold_as(storage)


def make_nf4_linear(
    packed: Tensor, state: dict[str, Any], bias: Tensor | None, shape: tuple[int, int], dtype: torch.dtype
) -> nn.Module:
    """A `Nf4Linear`, a Linear4bit that computes in `dtype`.

    Args:
        packed: uint8 [O * I / 2, 1]. state: bitsandbytes' quantization state, by its names without "weight.".
        bias: [O] or None. shape: (O, I).
    """
    import bitsandbytes

    module = _nf4_linear_class()(
        shape[1], shape[0], bias=bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta",
        compress_statistics="nested_absmax" in state,
    )  # fmt: skip
    module.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        packed, state, requires_grad=False, device=packed.device, module=module
    )
    if bias is not None:
        module.bias = nn.Parameter(bias.to(dtype))
    module.support_avx512bf16_for_cpu = False
    module._refresh()
    return module


@functools.cache
def _nf4_linear_class() -> Any:
    import bitsandbytes

    return type(
        "Nf4Linear", (_OnCpus, bitsandbytes.nn.Linear4bit), {"__doc__": _OnCpus.__doc__, "__module__": __name__}
    )


def __getattr__(name: str) -> Any:
    """`Nf4Linear`, which pickles look for here and which cannot be made before bitsandbytes is imported."""
    if name == "Nf4Linear":
        return _nf4_linear_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Operands(NamedTuple):
    """What `nf4_linear` takes, and what that was made of.

    Attributes:
        weight, statistics: the parameter, and its state's absmax (codes of it, with double quantization).
        packed: the parameter's bytes as a plain tensor; the op would make another Params4bit of its result.
        absmax: float32 [O * I / 64].
    """

    weight: Any
    statistics: Tensor
    packed: Tensor
    absmax: Tensor


class _OnCpus(nn.Module):
    """y = x W^T + b in `compute_dtype`, returned in x's dtype.

    On CPUs `nf4_linear` computes it where its kernels take the layer, with activations rounded to int8 in groups of 64, and
    bitsandbytes does elsewhere; gradients are those of the dequantized weight either way. With double quantization absmax
    is decoded once and kept while the weight is on a CPU: 4 bytes for 64 weights, half a bit a weight.
    """

    # Linear4bit's.
    in_features: int
    out_features: int
    compute_dtype: torch.dtype | None
    weight: Any
    bias: Any
    quant_state: Any
    quant_storage: torch.dtype
    # Never saved nor copied; None where another kind of weight is here, or it is on a GPU.
    _operands: _Operands | None = None

    def forward(self, x: Tensor) -> Tensor:
        operands = self._current() if x.is_cpu else None
        # A compiled graph always has the op in it, which chooses when it runs.
        if operands is None or not (torch.compiler.is_compiling() or self._native(operands)):
            out: Tensor = super().forward(x)
            return out
        y = nf4_linear(
            x.to(self.compute_dtype or x.dtype), operands.packed, operands.absmax, self.bias,
            out_features=self.out_features, in_features=self.in_features, block=BLOCK,
        )  # fmt: skip
        return y.to(x.dtype)

    def activation_format(self) -> str:
        """What a forward pass does with activations, here and now: "int8 in groups of 64", or "float"."""
        operands = self._current() if self.weight.is_cpu else None
        if operands is None:
            return activations.FLOAT
        return nf4_activations(operands.packed, operands.absmax, in_features=self.in_features, block=BLOCK)

    def _native(self, operands: _Operands) -> bool:
        return takes_nf4(operands.packed, operands.absmax, self.in_features, BLOCK)

    def hold_as(self, storage: torch.dtype) -> None:
        """Hold the packed bytes as elements of `storage`."""
        weight = self.weight
        held = as_bytes(weight.detach().as_subclass(Tensor)).view(-1).view(storage)[:, None]
        self.weight = type(weight)(
            held, requires_grad=False, quant_state=weight.quant_state, blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics, quant_type=weight.quant_type, quant_storage=storage,
            module=self, bnb_quantized=True,
        )  # fmt: skip
        self.quant_storage = storage
        self._refresh()

    def _state(self) -> Any:
        # A parameter that somebody else has put there, FSDP2 for one, has none of its own.
        state = getattr(self.weight, "quant_state", None)
        return self.quant_state if state is None else state

    def _current(self) -> _Operands | None:
        operands, state = self._operands, self._state()
        known = operands is not None and operands.weight is self.weight
        if not known or operands.statistics is not state.absmax:  # type: ignore[union-attr]
            self._refresh()
        return self._operands

    def _refresh(self) -> None:
        from bitsandbytes.functional import dequantize_blockwise

        self._operands, weight, state = None, self.weight, self._state()
        as_in_files = (
            weight.is_cpu
            # Between two passes under FSDP2 not all of it is here.
            and not hasattr(weight, "full_tensor")
            and state is not None
            and state.quant_type == "nf4"
            and state.blocksize == BLOCK
            and tuple(state.shape) == (self.out_features, self.in_features)
            and not getattr(state, "packing_format_for_cpu", False)
        )
        if as_in_files:
            absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
            self._operands = _Operands(weight, state.absmax, as_bytes(weight.as_subclass(Tensor)), absmax)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        module = super()._apply(fn, recurse)
        self._refresh()
        return module

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_operands"}
