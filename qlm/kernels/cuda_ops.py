"""The quantized linear ops on NVIDIA GPUs: from torch tensors to the Triton kernels in `cuda/`.

`ops.py` checks the arguments and calls these functions; each gives None where Triton is not there or cannot launch anything, was switched off,
or does not take the layer, and the torch reference computes it then; `why_not` says why. Nothing here is differentiable. NF4
is bitsandbytes' on GPUs.

Triton is imported at the first call with a CUDA tensor, and never without a GPU. torch's CUDA builds bring it along; it compiles with the
machine's C compiler. A layer's first call prepares it and, with new shapes, tries configurations (`cuda/tune.py`): it waits for the
GPU, so it must not be the one that a CUDA graph captures. Calls after it only launch kernels and allocate with torch's allocator.
What is kept of a GPTQ layer must not lie in a graph's memory either: torch.compile records graphs without its op, which says so to it
(`ops.py`); for a memory pool of your own, call the model once outside of it.

Environment, read at the first call:
    QLM_KERNELS: "reference" computes with the torch references; "native" with the kernels, and their absence is an error;
        by default the kernels if they can run.
"""

import functools
import importlib
import importlib.util
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakIdKeyDictionary

from qlm.errors import Unavailable
from qlm.kernels.shared import Decode, chosen_kernels, state

# The oldest GPUs that the tests compile the kernels for.
LEAST_CAPABILITY = (7, 5)
# Triton's products use tensor cores from here on. On older ones it compiles them to ordinary multiplications, 80 instructions a weight,
# while cuBLAS has Turing's tensor cores too.
_TENSOR_CORES = (8, 0)
# Up to so many rows the words are read by `matvec`; one row costs as much as the next, so that tensor cores win early where they are.
MATVEC_ROWS = 16
_MATVEC_ROWS_BESIDE_TENSOR_CORES = 4
# Beyond so many rows a weight may as well be dequantized once and multiplied by cuBLAS, since the tile kernel dequantizes it for each block
# of rows again: both are timed. Beyond the second number that is the only way. Neither number has been measured yet (evals/gpu_kernels.py).
DENSE_ROWS, FUSED_ROWS = 64, 1024
# torch._int_mm takes more rows than this on CUDA (torch 2.13, `_int_mm_out_cuda`).
_INT_MM_ROWS = 16
# int32 holds sum((q - zero_point) * w) with w = -128 too; beyond it the reference subtracts in int64.
_MOST_INT8_IN_FEATURES = (2**31 - 1) // (255 * 128)


class Gpu(NamedTuple):
    """What the launchers ask of a device: compute capability (8, 0) and number of multiprocessors."""

    capability: tuple[int, int]
    multiprocessors: int

    @property
    def tensor_cores(self) -> bool:
        return self.capability >= _TENSOR_CORES


@functools.cache
def why_not(index: int) -> str:
    """Why the kernels do not compute on the CUDA device of this number: one line, empty if they do.

    Raises:
        UsageError: QLM_KERNELS is something else. Unavailable: the GPU is too old; or the kernels are asked for and not there.
    """
    chosen = chosen_kernels()
    if chosen == "reference":
        return "QLM_KERNELS=reference"
    reason = _missing(index)
    if reason and chosen == "native":
        raise Unavailable(f"QLM_KERNELS=native: no GPU kernels, since {reason}; unset it to compute with torch")
    if reason:
        # Once for a device, since this is cached.
        logging.getLogger("qlm").warning(
            "qlm: note: int8 and GPTQ run, and are quantized, through plain torch, slowly, since %s", reason
        )
    return reason


def _missing(index: int) -> str:
    if torch.version.hip is not None:
        return "they are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        name, version = torch.cuda.get_device_name(index), "{}.{}".format(*capability)
        raise Unavailable(
            f"{name} has compute capability {version}; qlm's GPU kernels need 7.5 (T4) or newer: use such a GPU, the CPU, or set "
            "QLM_KERNELS=reference to compute slowly with torch"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    _refuse_capture()
    try:
        # What only a launch can tell: whether there is a C compiler for Triton's launcher, and a driver new enough for its code.
        with torch.cuda.device(index):
            kernels("int8").quantize(torch.zeros(1, 16, device="cuda"), False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, the C compiler, the driver
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton cannot launch a kernel: {lines[0]}"
    return ""


def _refuse_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise Unavailable(
            "a quantized layer's first call waits for the GPU, which a CUDA graph cannot capture: call the model once before capturing it"
        )


@functools.cache
def _gpu(index: int) -> Gpu | None:
    if why_not(index):
        return None
    properties = torch.cuda.get_device_properties(index)
    return Gpu((properties.major, properties.minor), properties.multi_processor_count)


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether a GPU multiplies bfloat16; torch's own question is about the current GPU alone."""
    return torch.cuda.get_device_capability(device) >= _TENSOR_CORES


def describe(index: int = 0) -> str:
    """The kernels in words, for `qlm doctor`; empty where they do not compute."""
    gpu = _gpu(index)
    return (
        "" if gpu is None else f"Triton {kernels('gptq').triton.__version__}, sm_{gpu.capability[0]}{gpu.capability[1]}"
    )


@functools.cache
def kernels(name: str) -> Any:
    """The module `qlm.kernels.cuda.NAME`, which imports Triton."""
    return importlib.import_module(f"qlm.kernels.cuda.{name}")


def _gpu_of(x: Tensor, *weights: Tensor) -> Gpu | None:
    """The GPU that x is on, if the kernels compute there and can read the weights, which are whole, where they are."""
    if not x.is_cuda or not all(t.device == x.device and t.is_contiguous() and t.numel() for t in weights):
        return None
    return _gpu(x.device.index)


def _run(
    key: tuple[object, ...], variant: tuple[object, ...], ways: list[Callable[[], Tensor]], device: torch.device
) -> Tensor:
    result: Tensor = kernels("tune").run(key, variant, len(ways), lambda i: ways[i](), device)
    return result


def _variant(x: Tensor, bias: Tensor | None, *others: Tensor) -> tuple[object, ...]:
    """What a product's kernels are compiled anew for, beside the layer's shape: number of rows, dtypes, and whether x begins at a multiple
    of 16 bytes, as everything that was allocated for itself does."""
    return x.shape[0], x.data_ptr() % 16 == 0, None if bias is None else bias.dtype, *(t.dtype for t in others)


# Quantizing -------------------------------------------------------------------------------------------------------------


def columns(device: torch.device) -> tuple[Callable[..., None], Callable[..., None], int] | None:
    """The fields of `numerics.columns.Columns` for a GPU, which this module cannot name (numerics and kernels do not import each other).
    None for a CPU, and where the kernels do not compute (`why_not`). Raises Unavailable as `why_not`."""
    if device.type != "cuda" or _gpu(device.index) is None:
        return None

    def there(kernel: Callable[..., None]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            with torch.cuda.device(device):
                kernel(*arguments)

        return launch

    loops = kernels("columns")
    return there(loops.round_columns), there(loops.choose_columns), loops.MOST


# int8 -----------------------------------------------------------------------------------------------------------------


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, row_sum: Tensor, bias: Tensor | None, symmetric_input: bool
) -> Tensor | None:
    """`ops.int8_linear`: its reference's numbers on CPUs, but for the rounding of scale * sums + bias to one step instead of two."""
    gpu = _gpu_of(x, weight, weight_scale, row_sum, *(() if bias is None else (bias,)))
    if gpu is None:
        return None
    with torch.cuda.device(x.device):
        return int8_product(x, weight, weight_scale, row_sum, bias, symmetric_input, gpu)


def int8_product(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_sum: Tensor,
    bias: Tensor | None,
    symmetric_input: bool,
    gpu: Gpu,
) -> Tensor | None:
    """`int8_linear` on the device that everything is on. Which kernel computes the int32 sums changes nothing in them."""
    (N, K), leading = weight.shape, x.shape[:-1]
    if K > _MOST_INT8_IN_FEATURES:
        return None
    if x.numel() == 0:
        return x.new_empty(*leading, N)
    int8, tune = kernels("int8"), kernels("tune")
    rows = x.numel() // K
    cublas = rows > _INT_MM_ROWS and K % 8 == 0 and N % 8 == 0 and x.is_cuda
    if rows > MATVEC_ROWS and not gpu.tensor_cores and not cublas:
        return None
    x = x.reshape(rows, K).contiguous()
    layer = int8.Layer(weight, weight_scale, row_sum, bias, x.dtype)

    def by(kernel: Callable[..., Tensor], how: object) -> Callable[[], Tensor]:
        return lambda: kernel(int8.quantize(x, symmetric_input), layer, how, gpu.multiprocessors)

    def by_cublas() -> Tensor:
        tokens = int8.quantize(x, symmetric_input)
        return int8.finish(torch._int_mm(tokens.codes, weight.t()), tokens, layer)

    ways: list[Callable[[], Tensor]] = []
    if rows <= (_MATVEC_ROWS_BESIDE_TENSOR_CORES if gpu.tensor_cores else MATVEC_ROWS):
        ways += [by(int8.matvec, how) for how in int8.MATVEC]
    if rows == 1 and int8.by_fours(weight):
        ways += [functools.partial(int8.fused_matvec, x, symmetric_input, layer, how) for how in int8.FUSED]
    if rows > 1 and gpu.tensor_cores:
        ways += [by(int8.matmul, how) for how in int8.matmul_configs(rows)]
    if cublas:
        ways.append(by_cublas)
    key = ("int8", x.dtype, N, K, symmetric_input, tune.rows_class(rows), len(ways))
    y = _run(key, _variant(x, bias, weight_scale), ways, x.device)
    return y.view(*leading, N)


def int8_weight(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The weight [N, K] of an int8 layer in `dtype`."""
    if _gpu_of(weight, weight_scale) is None:
        return None
    with torch.cuda.device(weight.device):
        way = functools.partial(kernels("int8").dequantize, weight, weight_scale, dtype)
        return _run(("int8 weight", *weight.shape), (dtype, weight_scale.dtype), [way], weight.device)


# GPTQ -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GptqLayer:
    """What the kernels read of a GPTQ layer beside its file's tensors, made at its first call and kept until `qweight` is freed or one
    of the tensors changes.

    Attributes:
        made_of: the tensors that it was made of, each with its version and address, and bits and v2.
        zero_point: uint8 [G, N], decoded: a byte for each weight group; None if a group is not one of the layer's.
        group_size: in features of a group if feature k is of group k // group_size (in `order`, where there is one), else 0.
        order: int64 [K], the in features sorted by group, g_idx: their groups, and words: the words in that order, a second copy of the
            weight; all None unless groups are scattered (act order).
    """

    made_of: tuple[object, ...]
    zero_point: Tensor | None = None
    group_size: int = 0
    order: Tensor | None = None
    g_idx: Tensor | None = None
    words: Tensor | None = None


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
    """`ops.gptq_linear`, with activations in floating point."""
    gpu = _gpu_of(x, qweight, qzeros, scales, g_idx, *(() if bias is None else (bias,)))
    if gpu is None:
        return None
    with torch.cuda.device(x.device):
        return gptq_product(x, qweight, qzeros, scales, g_idx, bias, bits, v2, decode, gpu)


def gptq_product(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bias: Tensor | None,
    bits: int,
    v2: bool,
    decode: Decode,
    gpu: Gpu,
) -> Tensor | None:
    """`gptq_linear` on the device that everything is on."""
    kept = _gptq_layer(qweight, qzeros, scales, g_idx, bits, v2, decode)
    if kept.zero_point is None:
        return None
    K, N = g_idx.shape[0], scales.shape[1]
    leading = x.shape[:-1]
    if x.numel() == 0:
        return x.new_empty(*leading, N)
    gptq, tune = kernels("gptq"), kernels("tune")
    x = x.reshape(-1, K).contiguous()
    rows = x.shape[0]
    tile = gpu.tensor_cores and x.dtype != torch.float32
    by_tile = tile and 1 < rows <= FUSED_ROWS
    by_vector = rows <= (_MATVEC_ROWS_BESIDE_TENSOR_CORES if tile else MATVEC_ROWS)
    in_file_order = _in_file_order(kept, qweight, scales, g_idx, bits)

    def dense() -> Tensor:
        weight = _gptq_weight(in_file_order, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return linear(x, weight.t(), None if bias is None else bias.to(x.dtype))

    if not by_tile and not by_vector:
        return dense().view(*leading, N)
    given, layer = x, in_file_order
    if kept.order is not None:
        given = x.index_select(1, kept.order)
        layer = gptq.Layer(kept.words, scales, kept.zero_point, kept.g_idx, bits, kept.group_size)
    ways: list[Callable[[], Tensor]] = []
    if by_vector:
        ways += [functools.partial(gptq.matvec, given, layer, bias, how, gpu.multiprocessors) for how in gptq.MATVEC]
    if by_tile:
        ways += [
            functools.partial(gptq.matmul, given, layer, bias, how, gpu.multiprocessors)
            for how in gptq.matmul_configs(rows)
        ]
    if by_tile and rows > DENSE_ROWS:
        ways.append(dense)
    key = ("gptq", bits, x.dtype, N, K, layer.group_size, tune.rows_class(rows), len(ways))
    return _run(key, _variant(x, bias, scales, g_idx), ways, x.device).view(*leading, N)


def gptq_weight(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    v2: bool,
    dtype: torch.dtype,
    decode: Decode,
) -> Tensor | None:
    """The weight [K, N] of a GPTQ layer in `dtype`: the float32 weight of the reference, rounded."""
    if _gpu_of(qweight, qzeros, scales, g_idx) is None:
        return None
    with torch.cuda.device(qweight.device):
        kept = _gptq_layer(qweight, qzeros, scales, g_idx, bits, v2, decode)
        if kept.zero_point is None:
            return None
        return _gptq_weight(_in_file_order(kept, qweight, scales, g_idx, bits), dtype)


def _gptq_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    key = ("gptq weight", layer.bits, layer.out_features, layer.in_features, layer.group_size)
    way = functools.partial(kernels("gptq").dequantize, layer, dtype)
    return _run(key, (dtype, layer.scale.dtype, layer.g_idx.dtype), [way], layer.words.device)


def _in_file_order(kept: _GptqLayer, qweight: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Any:
    group_size = kept.group_size if kept.order is None else 0
    return kernels("gptq").Layer(qweight, scales, kept.zero_point, g_idx, bits, group_size)


def _gptq_layer(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, v2: bool, decode: Decode
) -> _GptqLayer:
    layer: _GptqLayer | None = _gptq_layers.get(qweight)
    if layer is None or not _is_of(layer, qweight, qzeros, g_idx, bits, v2):
        with _gptq_lock:
            layer = _gptq_layers.get(qweight)  # another thread may have been first
            if layer is None or not _is_of(layer, qweight, qzeros, g_idx, bits, v2):
                layer = _gptq_layers[qweight] = _make_gptq_layer(qweight, qzeros, scales, g_idx, bits, v2, decode)
    return layer


def _is_of(layer: _GptqLayer, qweight: Tensor, qzeros: Tensor, g_idx: Tensor, bits: int, v2: bool) -> bool:
    zeros, groups, *rest = layer.made_of
    return (
        zeros() is qzeros  # type: ignore[operator]
        and groups() is g_idx  # type: ignore[operator]
        and rest == [state(qweight), state(qzeros), state(g_idx), bits, v2]
    )


def _make_gptq_layer(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, v2: bool, decode: Decode
) -> _GptqLayer:
    """Waits for the GPU, since how groups lie decides which kernels run."""
    _refuse_capture()
    made_of = (
        weakref.ref(qzeros), weakref.ref(g_idx), state(qweight), state(qzeros), state(g_idx), bits, v2
    )  # fmt: skip
    groups_here = g_idx.to(device="cpu", dtype=torch.int64)
    G, K = scales.shape[0], len(groups_here)
    if int(groups_here.min()) < 0 or int(groups_here.max()) >= G:
        return _GptqLayer(made_of)
    zero_point = decode(qzeros, bits, v2).to(torch.uint8).contiguous()
    in_order, order = torch.sort(groups_here, stable=True)
    size = int((in_order == in_order[0]).sum())
    if not torch.equal(in_order, torch.arange(K) // size):  # groups of different sizes
        layer = _GptqLayer(made_of, zero_point)
    elif torch.equal(in_order, groups_here):
        layer = _GptqLayer(made_of, zero_point, size)
    else:
        order = order.to(qweight.device)
        words = kernels("gptq").arrange(qweight, order, bits)
        layer = _GptqLayer(made_of, zero_point, size, order, in_order.to(g_idx), words)
    if qweight.is_cuda:
        # Another thread, on another stream, may be the next to read what so far is only queued on this one.
        torch.cuda.current_stream(qweight.device).synchronize()
    return layer
