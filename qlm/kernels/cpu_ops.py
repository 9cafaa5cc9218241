"""The quantized linear ops on CPUs: from torch tensors to the library in `cpu/`, on the threads that torch computes with.

`ops.py` checks the arguments and calls these functions; each gives None where the library was not built, was switched
off, or does not take the layer, and the torch reference computes it then. Nothing here is differentiable.

Environment, read at the first call:
    QLM_KERNELS: "reference" computes with the torch references; "native" with the library, and its absence is an error;
        by default the library if it was built.
"""

import ctypes
import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from qlm.errors import UsageError
from qlm.kernels import cpu
from qlm.kernels.activations import NF4_GROUP, gptq_group
from qlm.kernels.shared import Decode, chosen_kernels, state

_SCALE_DTYPES = {torch.float32: cpu.F32, torch.float16: cpu.F16, torch.bfloat16: cpu.BF16}

_float_activations: ContextVar[bool] = ContextVar("qlm_float_activations", default=False)


@contextmanager
def float_activations() -> Iterator[None]:
    """A context in which `gptq_linear` and `nf4_linear` leave activations in floating point on CPUs too: the torch
    references compute them, slower and to the last bit of the format. For this thread (a context variable), and at run
    time: a compiled graph does not remember it. `int8_linear` is not affected; its format rounds activations itself."""
    token = _float_activations.set(True)
    try:
        yield
    finally:
        _float_activations.reset(token)


@functools.cache
def native() -> cpu.Native | None:
    """The library, or None where the references are to compute.

    Raises:
        UsageError: QLM_KERNELS is something else. Unavailable: the library is there or is asked for, and cannot be used.
    """
    chosen = chosen_kernels()
    if chosen == "reference" or (not chosen and not cpu.available()):
        return None
    return cpu.library()


_teams: dict[int, cpu.Team] = {}


def _team() -> cpu.Team:
    """As many threads as torch has set for this one. Several threads may use a team; they wait for each other."""
    threads = torch.get_num_threads()  # also hands torch.set_num_threads on to a thread that is new
    team = _teams.get(threads)
    if team is None:
        team = _teams[threads] = cpu.borrowed_team()
    return team


def _forward(library: cpu.Native, linear: cpu.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I] float32, bfloat16 or float16 to [..., O] in the same dtype; the kernels compute in float32."""
    in_features, out_features = linear.in_features, linear.out_features
    given = x.float().contiguous()
    y = given.new_empty((*x.shape[:-1], out_features))
    if bias is not None:
        bias = bias.float().contiguous()
        linear.bias = bias.data_ptr()
    library.qlm_linear_forward(
        _team().handle, ctypes.byref(linear), given.numel() // in_features, given.data_ptr(), in_features, y.data_ptr(),
        out_features,
    )  # fmt: skip
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _readable(*tensors: Tensor) -> bool:
    """Whether the kernels can read these where they are."""
    return all(tensor.is_contiguous() and tensor.is_cpu and tensor.numel() for tensor in tensors)


# Sums of products -------------------------------------------------------------------------------------------------------

# Features of a tile of the kernel's triangle (abi.h).
_GRAM_TILE = 64


def add_gram_(hessian: Tensor, x: Tensor) -> bool:
    """hessian += x^T x on its lower triangle, in tiles of 64; False, and nothing done, where the kernel does not take it.

    Products of bfloat16 numbers are exact and their sums float32, which torch computes from float32 copies alone, in three to
    four times the time. The same bits for any number of threads.

    Args:
        hessian: float32 [I, I], contiguous. x: [T, I].
    """
    if x.dtype != torch.bfloat16 or x.shape[1] % _GRAM_TILE or not _readable(hessian, x):
        return False
    library = native()
    if library is None or not library.qlm_gram_bf16_runs_here():
        return False
    library.qlm_gram_bf16(_team().handle, x.data_ptr(), *x.shape, hessian.data_ptr())
    return True


# int8 -----------------------------------------------------------------------------------------------------------------


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, row_sum: Tensor, bias: Tensor | None, symmetric_input: bool
) -> Tensor | None:
    """`ops.int8_linear`, the same bits as its reference."""
    library = native()
    if library is None or weight_scale.dtype not in _SCALE_DTYPES or not _readable(weight, weight_scale, row_sum):
        return None
    out_features, in_features = weight.shape
    linear = cpu.Linear(
        in_features=in_features, out_features=out_features, format=cpu.INT8, weight=weight.data_ptr(),
        scale_dtype=_SCALE_DTYPES[weight_scale.dtype], scale=weight_scale.data_ptr(), row_sum=row_sum.data_ptr(),
        symmetric_input=symmetric_input,
    )  # fmt: skip
    return _forward(library, linear, x, bias)


# GPTQ -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GptqLayer:
    """What the kernels read of a GPTQ layer beside its file's tensors, made at its first call and kept until `qweight`
    is freed or one of the tensors changes.

    Attributes:
        made_of: the tensors that it was made of, each with its version and address, and bits and v2.
        linear: the layer without scales and bias; None if the kernels do not take it.
        zero_point: uint8 [G, O], decoded: a byte for each weight group.
        order: int32 [I], the in features sorted by group, and qweight: the words in that order, in strips, a second copy
            of the weight; both None unless groups are scattered (act order).
        group: in features whose activations share a scale.
    """

    made_of: tuple[object, ...]
    linear: cpu.Linear | None
    zero_point: Tensor | None = None
    order: Tensor | None = None
    qweight: Tensor | None = None
    group: int = 0


_gptq_layers: WeakIdKeyDictionary = WeakIdKeyDictionary()
_gptq_lock = threading.Lock()


def gptq_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bias: Tensor | None,
    bits: int,
    v2: bool,
    decode: Decode,
) -> Tensor | None:
    """`ops.gptq_linear`, with activations rounded to int8 in groups of up to 128 in features."""
    layer = gptq_layer(qweight, qzeros, scales, g_idx, bits, v2, decode)
    library = native()
    if library is None or layer is None or layer.linear is None:
        return None
    # A copy, since other threads may be using the layer with another bias.
    linear = cpu.Linear.from_buffer_copy(layer.linear)
    linear.scale = scales.data_ptr()
    return _forward(library, linear, x, bias)


def gptq_layer(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, v2: bool, decode: Decode
) -> _GptqLayer | None:
    """The layer as the kernels read it; None where the reference is to compute it."""
    if native() is None or _float_activations.get() or scales.dtype not in _SCALE_DTYPES or not _readable(scales):
        return None
    layer: _GptqLayer | None = _gptq_layers.get(qweight)
    if layer is not None and _is_of(layer, qweight, qzeros, scales, g_idx, bits, v2):
        return layer if layer.linear is not None else None
    with _gptq_lock:
        layer = _gptq_layers.get(qweight)  # another thread may have been first
        if layer is None or not _is_of(layer, qweight, qzeros, scales, g_idx, bits, v2):
            layer = _gptq_layers[qweight] = _make_gptq_layer(qweight, qzeros, scales, g_idx, bits, v2, decode)
    return layer if layer.linear is not None else None


def _is_of(
    layer: _GptqLayer, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, v2: bool
) -> bool:
    zeros, groups, *rest = layer.made_of
    return (
        zeros() is qzeros  # type: ignore[operator]
        and groups() is g_idx  # type: ignore[operator]
        and rest == [state(qweight), state(qzeros), state(g_idx), scales.dtype, bits, v2]
    )


def _make_gptq_layer(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, v2: bool, decode: Decode
) -> _GptqLayer:
    made_of = (
        weakref.ref(qzeros), weakref.ref(g_idx), state(qweight), state(qzeros), state(g_idx), scales.dtype, bits, v2
    )  # fmt: skip
    refused = _GptqLayer(made_of, None)
    groups, out_features = scales.shape
    in_features = g_idx.shape[0]
    if in_features % groups or not _readable(qweight, qzeros, g_idx):
        return refused
    group_size = in_features // groups
    # The kernels want in features of a group side by side, and groups of one size.
    order = torch.sort(g_idx, stable=True).indices
    sorted_groups = torch.arange(groups, dtype=g_idx.dtype).repeat_interleave(group_size)
    if not torch.equal(g_idx.index_select(0, order), sorted_groups):
        return refused
    zero_point = decode(qzeros, bits, v2).to(torch.uint8).contiguous()
    linear = cpu.Linear(
        in_features=in_features, out_features=out_features, format=cpu.GPTQ, bits=bits, group_size=group_size,
        weight=qweight.data_ptr(), scale_dtype=_SCALE_DTYPES[scales.dtype], scale=scales.data_ptr(),
        zero_point=zero_point.data_ptr(),
    )  # fmt: skip
    library = cpu.library()
    try:
        library.qlm_linear_check(ctypes.byref(linear))
    except UsageError:
        return refused
    group = gptq_group(group_size, bits)
    if torch.equal(g_idx, sorted_groups):
        return _GptqLayer(made_of, linear, zero_point, group=group)
    order, words = order.to(torch.int32), torch.empty_like(qweight)
    with cpu.Team(1) as alone:
        library.qlm_gptq_arrange(
            alone.handle,
            qweight.data_ptr(),
            bits,
            in_features,
            out_features,
            order.data_ptr(),
            cpu.GPTQ_STRIP,
            words.data_ptr(),
        )
    linear.weight, linear.strip, linear.order = words.data_ptr(), cpu.GPTQ_STRIP, order.data_ptr()
    return _GptqLayer(made_of, linear, zero_point, order, words, group)


# NF4 ------------------------------------------------------------------------------------------------------------------


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    block: int,
) -> Tensor | None:
    """`ops.nf4_linear`, with activations rounded to int8 in groups of 64 in features, and the levels to int8 too."""
    library = native()
    if library is None or not takes_nf4(packed, absmax, in_features, block):
        return None
    linear = cpu.Linear(
        in_features=in_features, out_features=out_features, format=cpu.NF4, weight=packed.data_ptr(), block=block,
        scale_dtype=cpu.F32, scale=absmax.data_ptr(),
    )  # fmt: skip
    return _forward(library, linear, x, bias)


def takes_nf4(packed: Tensor, absmax: Tensor, in_features: int, block: int) -> bool:
    """Whether the kernels compute this layer here and now: blocks of 64, 128, ... that do not cross rows."""
    return (
        native() is not None
        and not _float_activations.get()
        and block % NF4_GROUP == 0
        and in_features % block == 0
        and absmax.dtype == torch.float32
        and _readable(packed, absmax)
    )
