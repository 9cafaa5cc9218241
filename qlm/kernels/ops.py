"""The three quantized linear ops: schema, shape rule, gradient, torch reference and kernels of each.

    qlm::int8_linear    int8 weights per out feature, int8 activations per token, exact int32 sums
    qlm::gptq_linear    2, 3, 4 or 8-bit weights in groups, GPTQ file layout
    qlm::nf4_linear     NF4 weights in blocks, bitsandbytes file layout

All take `x` of any leading shape (empty ones too) in float32, bfloat16 or float16, and return [..., O] in the same
dtype, also under autocast: the caller chooses the dtype. Callers use the plain functions of the same names and never
choose an implementation: on CPUs the library in `cpu/` computes (`cpu_ops.py`), on NVIDIA GPUs int8 and GPTQ have Triton kernels
in `cuda/` (`cuda_ops.py`); elsewhere, and where those are not there or do not take a layer, the torch reference
(`int8_linear_reference` and so on), which stays the oracle of the tests. QLM_KERNELS=reference switches all kernels off.
Gradients flow to `x` and the bias, computed from the dequantized weight; quantized weights and their scales are constants.

On CPUs the kernels of `gptq_linear` and `nf4_linear` round activations to int8, which the formats do not ask for
(W4A8); `float_activations()` and QLM_KERNELS=reference (cpu_ops.py) turn that off, and `gptq_activations` and
`nf4_activations` say what is done. Its KL divergence from float activations is in `evals/LOG.md`.

The bit layouts are specified in `qlm/numerics/packing.py`. This module reads them with code of its own, so that the
tests can check one against the other.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from qlm.errors import Unavailable
from qlm.kernels import activations, cpu_ops, cuda_ops
from qlm.kernels.cpu_ops import float_activations

# int32 holds sum((q - zero_point) * w) over so many in features, with |q - zero_point| <= 255 and |w| <= 127.
MAX_IN_FEATURES = 66_310
# The same with w = -128, which files of other programs may hold. Beyond it the two terms are subtracted in int64.
_MAX_IN_FEATURES_FULL_RANGE = (2**31 - 1) // (255 * 128)
# float32 sums of this many products of int8 values are exact: 1024 * 128 * 128 = 2**24.
_EXACT_CHUNK = 1024

# The NF4 levels; source and derivation in `qlm/numerics/nf4.py`.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# bits: codes that fill whole 32-bit words.
_CODES_PER_PERIOD = {2: 16, 3: 32, 4: 8, 8: 4}

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

__all__ = [
    "MAX_IN_FEATURES",
    "NF4_LEVELS",
    "dequantize_gptq",
    "dequantize_nf4",
    "float_activations",
    "gptq_activations",
    "gptq_linear",
    "gptq_linear_reference",
    "int8_linear",
    "int8_linear_reference",
    "int8_row_sum",
    "kernel",
    "nf4_activations",
    "nf4_linear",
    "nf4_linear_reference",
    "quantize_activation_per_token",
]

# Low-level registration: torch.library.custom_op would add 3 microseconds to each call's 19 (evals/LOG.md).
_LIBRARY = torch.library.Library("qlm", "FRAGMENT")


def _define(
    reference: Callable[..., torch.Tensor],
    cpu: Callable[..., torch.Tensor],
    fake: Callable[..., Any],
    cuda: Callable[..., torch.Tensor] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Any:
    """The op `qlm::NAME` of `NAME_reference`: `cpu` computes it on CPUs, `cuda` on GPUs, the reference elsewhere."""
    name = reference.__name__.removesuffix("_reference")
    schema = torch.library.infer_schema(reference, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"qlm::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.qlm, name).default


def kernel(op: str, device: str, otherwise: str = "torch reference: dequantize, then multiply") -> str:
    """What computes an op ("int8_linear", "gptq_linear" or "nf4_linear") on a device, in words, for `qlm doctor`;
    `otherwise` where no kernel of qlm's does."""
    library = cpu_ops.native() if device == "cpu" else None
    if library is not None:
        rounded = {
            "int8_linear": activations.PER_TOKEN,
            "gptq_linear": f"int8 in groups of up to {activations.MOST_IN_GPTQ_GROUP}",
            "nf4_linear": activations.in_groups(activations.NF4_GROUP),
        }
        return f"native ({library.isa}), activations {rounded[op]}"
    reason = ""
    if device == "cuda" and op != "nf4_linear":
        index = torch.cuda.current_device()
        try:
            if described := cuda_ops.describe(index):
                return described
            reason = f" (no GPU kernels: {cuda_ops.why_not(index)})"
        except Unavailable as error:
            return f"none: {error}"
    return (int8_kernel(device) if op == "int8_linear" else otherwise) + reason


# int8 -----------------------------------------------------------------------------------------------------------------


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    row_sum: torch.Tensor,
    bias: torch.Tensor | None = None,
    symmetric_input: bool = False,
) -> torch.Tensor:
    """Linear layer with int8 weights and activations that are quantized to int8 here, token by token.

    y = scale * weight_scale * (q @ weight.T - zero_point * row_sum) + bias, with `q`, `scale` and `zero_point` from
    `quantize_activation_per_token`. The integer part is exact. A token with NaN or infinite values gives NaN in all its
    outputs.

    Args:
        x: [..., I] float32, bfloat16 or float16.
        weight: int8 [O, I].
        weight_scale: float [O, 1], one for each out feature.
        row_sum: int32 [O], the sum of each row of `weight`: `int8_row_sum(weight)`.
        bias: [O] or None.
        symmetric_input: activations without zero point.

    Returns:
        [..., O] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or more in features than int32 sums can hold (66,310).
    """
    return _int8_linear(x, weight, weight_scale, row_sum, bias, symmetric_input)


def int8_row_sum(weight: torch.Tensor) -> torch.Tensor:
    """The sum of each row of an int8 weight [O, I]: int32 [O]."""
    return weight.sum(dim=1, dtype=torch.int32)


def quantize_activation_per_token(
    x: torch.Tensor, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize each token to int8, as compressed-tensors' dynamic token quantization does, operation by operation.

    The range always includes 0. Asymmetric: scale = (high - low) / 255, zero_point = round(clamp(-128 - low / scale)).
    Symmetric: scale = max|x| / 127.5, zero_point = 0. Then q = round(clamp(x / scale + zero_point)), halves to even.
    Computed in float32 whatever the dtype of x: compressed-tensors itself rounds every step to a 16-bit x's dtype,
    vLLM's kernels do not. A token of zeros gets q = 0 and zero point 0; one with NaN or infinite values gets the scale
    NaN and codes without meaning.

    Args:
        x: [T, I] float32, bfloat16 or float16.
        symmetric: no zero point.

    Returns:
        q: int8 [T, I].
        scale: float32 [T, 1].
        zero_point: int32 [T, 1].

    Source: compressed-tensors 0.20 `quantization/utils/helpers.py`, `calculate_qparams`.
    """
    x = x.float()
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum(-low, high) / 127.5 if symmetric else (high - low) / 255
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    divisor = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    if symmetric:
        zero_point = torch.zeros_like(scale)
        q = x / divisor
    else:
        # NaN where low and scale are 0, and in a token with NaN: zero point 0 then, since a cast of NaN is undefined.
        zero_point = (-128 - low / scale).clamp_(-128, 127).round_().nan_to_num_(nan=0.0)
        q = (x / divisor).add_(zero_point)
    q = q.clamp_(-128, 127).round_().nan_to_num_(nan=0.0).to(torch.int8)
    return q, divisor, zero_point.to(torch.int32)


def int8_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    row_sum: torch.Tensor,
    bias: torch.Tensor | None,
    symmetric_input: bool,
) -> torch.Tensor:
    """`int8_linear` in torch, on any device."""
    _check_int8(x, weight, weight_scale, row_sum, bias)
    out_features, in_features = weight.shape
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    q, scale, zero_point = quantize_activation_per_token(x.reshape(-1, in_features), symmetric_input)
    sums = _int8_matmul(q, weight)
    if not symmetric_input:
        if in_features > _MAX_IN_FEATURES_FULL_RANGE:
            sums = sums.long()
        sums = sums - zero_point * row_sum
    y = sums.float().mul_(weight_scale.float().view(1, -1)).mul_(scale)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)


def _int8_linear_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    row_sum: torch.Tensor,
    bias: torch.Tensor | None,
    symmetric_input: bool,
) -> torch.Tensor:
    _check_int8(x, weight, weight_scale, row_sum, bias)
    y = cpu_ops.int8_linear(x, weight, weight_scale, row_sum, bias, symmetric_input)
    return int8_linear_reference(x, weight, weight_scale, row_sum, bias, symmetric_input) if y is None else y


def _int8_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    row_sum: torch.Tensor,
    bias: torch.Tensor | None,
    symmetric_input: bool,
) -> torch.Tensor:
    _check_int8(x, weight, weight_scale, row_sum, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _int8_linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    row_sum: torch.Tensor,
    bias: torch.Tensor | None,
    symmetric_input: bool,
) -> torch.Tensor:
    _check_int8(x, weight, weight_scale, row_sum, bias)
    y = cuda_ops.int8_linear(x, weight, weight_scale, row_sum, bias, symmetric_input)
    return int8_linear_reference(x, weight, weight_scale, row_sum, bias, symmetric_input) if y is None else y


_int8_linear = _define(int8_linear_reference, _int8_linear_cpu, _int8_linear_fake, _int8_linear_cuda)


def _int8_matmul(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Exact `q @ weight.T`: int8 [T, I], int8 [O, I] -> int32 [T, O]."""
    out_features, in_features = weight.shape
    if q.device.type == "cpu":
        # With one in feature torch 2.13's CPU product returns uninitialised memory.
        fits = in_features > 1 and _cpu_multiplies_int8()
    else:
        fits = q.device.type == "cuda" and out_features % 8 == 0 and in_features % 8 == 0
    return _int8_matmul_int_mm(q, weight) if fits else _int8_matmul_chunked(q, weight)


def int8_kernel(device: str) -> str:
    """What multiplies int8 in the reference, in words."""
    if device == "cuda" or _cpu_multiplies_int8():
        return "torch._int_mm, exact in int32"
    return "float32 products of 1024 columns, summed exactly in int32 (slow: this CPU has no AVX512-VNNI)"


@functools.cache
def _cpu_multiplies_int8() -> bool:
    """Whether torch._int_mm is both exact and fast on this CPU: with AVX512-VNNI.

    Without it, torch before 2.6 overflowed in 16-bit sums (pytorch issue 136746), and later ones run a scalar loop.
    """
    return bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


def _int8_matmul_int_mm(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    tokens = q.shape[0]
    if q.device.type == "cuda" and tokens <= 16:  # cuBLAS's int8 product takes more than 16 rows only
        q = torch.nn.functional.pad(q, (0, 0, 0, 17 - tokens))
    return torch._int_mm(q, weight.t())[:tokens]


def _int8_matmul_chunked(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # Exact with TF32 and with bfloat16 products as well, should the user have allowed them: both hold int8 values
    # exactly and sum in float32.
    total = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.int32, device=q.device)
    with _no_autocast(q):
        for start in range(0, q.shape[1], _EXACT_CHUNK):
            chunk = slice(start, start + _EXACT_CHUNK)
            total += (q[:, chunk].float() @ weight[:, chunk].float().t()).to(torch.int32)
    return total


def _check_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    row_sum: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"int8_linear: weight is {_describe(weight)}; an int8 matrix [O, I] is needed")
    out_features, in_features = weight.shape
    if in_features > MAX_IN_FEATURES:
        raise ValueError(f"int8_linear: {in_features} in features; int32 sums hold at most {MAX_IN_FEATURES}")
    _check_input("int8_linear", x, in_features, bias, out_features)
    if tuple(weight_scale.shape) != (out_features, 1) or not weight_scale.is_floating_point():
        raise ValueError(f"int8_linear: weight_scale is {_describe(weight_scale)}; float [{out_features}, 1] is needed")
    if tuple(row_sum.shape) != (out_features,) or row_sum.dtype != torch.int32:
        raise ValueError(f"int8_linear: row_sum is {_describe(row_sum)}; int32 [{out_features}] is needed")


# GPTQ -----------------------------------------------------------------------------------------------------------------


def gptq_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    v2: bool,
) -> torch.Tensor:
    """Linear layer with weights in the GPTQ file layout.

    On CPUs activations are rounded to int8 in groups (`gptq_activations`), with the scale max|x| / 127, and meet the codes
    in exact int32 sums; scales, zero points and sums over groups are float32, whatever x's dtype. A token with NaN or
    infinite values gives NaN in all its outputs. Groups of different sizes, or that share 32-bit words, take the reference.

    On GPUs activations stay as they are. Up to 4 rows (16 where x is float32 or the GPU has no tensor cores that Triton uses) the weight
    keeps its float32 values, above it is rounded to x's dtype; sums are float32.

    On both the first call for a `qweight` decodes the zero points and keeps them, a byte for each group; with groups that are
    scattered over the in features (act order) also a second, sorted copy of the words; both are freed with `qweight`.

    The reference dequantizes the weight in float32, rounds it to x's dtype and multiplies in it.

    Args:
        x: [..., I] float32, bfloat16 or float16.
        qweight: int32 [I * bits / 32, O].
        qzeros: int32 [G, O * bits / 32].
        scales: float [G, O].
        g_idx: int32 or int64 [I], the group of each in feature.
        bias: [O] or None.
        bits: 2, 3, 4 or 8.
        v2: whether `qzeros` holds the zero points (version 2) or the zero points minus one (version 1).

    Returns:
        [..., O] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    return _gptq_linear(x, qweight, qzeros, scales, g_idx, bias, bits, v2)


def dequantize_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int, v2: bool
) -> torch.Tensor:
    """The weight of a GPTQ layer: scales[g_idx[i], o] * (code[i, o] - zero_point[g_idx[i], o]), in float32.

    Version 1 zero points are the stored fields plus one, masked to `bits` bits, as AutoGPTQ reads them.

    Args:
        qweight, qzeros, scales, g_idx, bits, v2: as in `gptq_linear`.

    Returns:
        float32 [O, I].

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    _check_gptq(qweight, qzeros, scales, g_idx, bits)
    return _gptq_weight(qweight, qzeros, scales, g_idx, bits, v2).t().contiguous()


def _gptq_weight(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int, v2: bool
) -> torch.Tensor:
    """The weight transposed, float32 [I, O], which is the order of the file."""
    groups, out_features = scales.shape
    in_features = g_idx.shape[0]
    codes = _unpack_words(qweight, bits)
    zero_point, scale = _zero_points(qzeros, bits, v2).float(), scales.float()
    weight = codes.float()
    if _groups_are_consecutive(g_idx, groups):
        grouped = weight.view(groups, in_features // groups, out_features)
        grouped.sub_(zero_point.unsqueeze(1)).mul_(scale.unsqueeze(1))
        return weight
    return weight.sub_(zero_point.index_select(0, g_idx)).mul_(scale.index_select(0, g_idx))


def _zero_points(qzeros: torch.Tensor, bits: int, v2: bool) -> torch.Tensor:
    """int32 [G, O * bits / 32] -> int32 [G, O]."""
    # Rows of words are unpacked; qzeros has its words in columns.
    zero_point = _unpack_words(qzeros.t(), bits).t()
    return zero_point if v2 else (zero_point + 1) & (2**bits - 1)


def _groups_are_consecutive(g_idx: torch.Tensor, groups: int) -> bool:
    """Whether in feature i is of group i // (I / G): no gather then. Not asked on a GPU, which would have to wait."""
    in_features = g_idx.shape[0]
    if g_idx.device.type != "cpu" or in_features % groups:
        return False
    return bool((g_idx.view(groups, -1) == torch.arange(groups).unsqueeze(1)).all())


def _unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [N * bits / 32, M] -> int32 [N, M]."""
    period = _CODES_PER_PERIOD[bits]
    position = torch.arange(0, bits * period, bits, dtype=torch.int32, device=words.device)
    if bits != 3:
        codes = words.unsqueeze(1) >> position.view(1, -1, 1)
        return codes.bitwise_and_(2**bits - 1).flatten(0, 1)
    words = words.unflatten(0, (-1, 3))
    codes = words.index_select(1, position // 32) >> (position % 32).view(1, -1, 1)
    # Code 10 continues in word 1, code 21 in word 2.
    codes[:, 10] = (codes[:, 10] & 3) | (words[:, 1] << 2)
    codes[:, 21] = (codes[:, 21] & 1) | (words[:, 2] << 1)
    return codes.bitwise_and_(7).flatten(0, 1)


@torch.library.custom_op("qlm::gptq_weight", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _gptq_weight_op(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    v2: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`_gptq_weight` for the backward pass, which torch.compile traces and which must not ask for values of `g_idx`."""
    weight = cuda_ops.gptq_weight(qweight, qzeros, scales, g_idx, bits, v2, dtype, _zero_points)
    return _gptq_weight(qweight, qzeros, scales, g_idx, bits, v2).to(dtype) if weight is None else weight


@_gptq_weight_op.register_fake
def _(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    v2: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return scales.new_empty(g_idx.shape[0], scales.shape[1], dtype=dtype)


def gptq_activations(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, *, bits: int, v2: bool
) -> str:
    """What `gptq_linear` does with activations, here and now: "int8 in groups of 128", or "float"."""
    _check_gptq(qweight, qzeros, scales, g_idx, bits)
    layer = cpu_ops.gptq_layer(qweight, qzeros, scales, g_idx, bits, v2, _zero_points)
    return activations.FLOAT if layer is None else activations.in_groups(layer.group)


def gptq_linear_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    v2: bool,
) -> torch.Tensor:
    """`gptq_linear` in torch, on any device, with activations in floating point."""
    _check_gptq(qweight, qzeros, scales, g_idx, bits)
    _check_input("gptq_linear", x, g_idx.shape[0], bias, scales.shape[1])
    weight = _gptq_weight(qweight, qzeros, scales, g_idx, bits, v2).to(x.dtype)
    with _no_autocast(x):
        return linear(x, weight.t(), None if bias is None else bias.to(x.dtype))


def _gptq_linear_cpu(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    v2: bool,
) -> torch.Tensor:
    _check_gptq(qweight, qzeros, scales, g_idx, bits)
    _check_input("gptq_linear", x, g_idx.shape[0], bias, scales.shape[1])
    y = cpu_ops.gptq_linear(x, qweight, qzeros, scales, g_idx, bias, bits, v2, _zero_points)
    return gptq_linear_reference(x, qweight, qzeros, scales, g_idx, bias, bits, v2) if y is None else y


def _gptq_linear_fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    v2: bool,
) -> torch.Tensor:
    _check_gptq(qweight, qzeros, scales, g_idx, bits)
    _check_input("gptq_linear", x, g_idx.shape[0], bias, scales.shape[1])
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def _gptq_linear_cuda(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    v2: bool,
) -> torch.Tensor:
    _check_gptq(qweight, qzeros, scales, g_idx, bits)
    _check_input("gptq_linear", x, g_idx.shape[0], bias, scales.shape[1])
    y = cuda_ops.gptq_linear(x, qweight, qzeros, scales, g_idx, bias, bits, v2, _zero_points)
    return gptq_linear_reference(x, qweight, qzeros, scales, g_idx, bias, bits, v2) if y is None else y


# What a GPU keeps of a layer from its first call on must not lie in the memory of a graph that torch.compile records.
_gptq_linear = _define(
    gptq_linear_reference, _gptq_linear_cpu, _gptq_linear_fake, _gptq_linear_cuda, (torch.Tag.cudagraph_unsafe,)
)


def _check_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> None:
    bits = int(bits)  # under torch.compile it may be a symbol, which is no dictionary key
    if bits not in _CODES_PER_PERIOD:
        raise ValueError(f"gptq_linear: {bits} bits; 2, 3, 4 and 8 are known")
    if scales.dim() != 2 or not scales.is_floating_point():
        raise ValueError(f"gptq_linear: scales is {_describe(scales)}; a float matrix [G, O] is needed")
    if g_idx.dim() != 1 or g_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"gptq_linear: g_idx is {_describe(g_idx)}; an int32 vector [I] is needed")
    groups, out_features = scales.shape
    in_features = g_idx.shape[0]
    period = _CODES_PER_PERIOD[bits]
    if in_features % period or out_features % period:
        raise ValueError(
            f"gptq_linear: {in_features} in, {out_features} out features; {bits}-bit words need multiples of {period}"
        )
    for name, words, shape in (
        ("qweight", qweight, (in_features * bits // 32, out_features)),
        ("qzeros", qzeros, (groups, out_features * bits // 32)),
    ):
        if words.dtype != torch.int32 or tuple(words.shape) != shape:
            raise ValueError(f"gptq_linear: {name} is {_describe(words)}; int32 {list(shape)} is needed")


# NF4 ------------------------------------------------------------------------------------------------------------------


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_features: int,
    in_features: int,
    block: int = 64,
) -> torch.Tensor:
    """Linear layer with NF4 weights.

    On CPUs activations are rounded to int8 in groups of 64 with the scale max|x| / 127, and the 16 levels to int8 too (by at
    most 0.0037 of a block's absmax); their int32 sums are exact, absmax and sums over blocks float32, whatever x's dtype. A
    token with NaN or infinite values gives NaN in all its outputs. Blocks of other sizes than 64, 128, ... and blocks that
    cross rows take the reference.

    The reference dequantizes the weight in float32, rounds it to x's dtype and multiplies in it.

    Args:
        x: [..., I] float32, bfloat16 or float16.
        packed: uint8 [ceil(O * I / 2), 1] (or flat), two codes in a byte, the first in the high nibble.
        absmax: float32 [ceil(O * I / block)]; nested statistics are decoded before.
        bias: [O] or None.
        out_features, in_features: O and I.
        block: weights that share an absmax, in the flattened row-major weight.

    Returns:
        [..., O] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    return _nf4_linear(x, packed, absmax, bias, out_features, in_features, block)


def dequantize_nf4(
    packed: torch.Tensor, absmax: torch.Tensor, out_features: int, in_features: int, block: int = 64
) -> torch.Tensor:
    """The weight of an NF4 layer, level * absmax of its block: float32 [O, I]. Arguments and errors as `nf4_linear`."""
    _check_nf4(packed, absmax, out_features, in_features, block)
    count = out_features * in_features
    # One look-up for each byte gives both of its levels, as one 64-bit value: on CPUs a third of the time of looking up rows of two.
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=packed.device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).view(torch.int64).view(-1)
    weight = pairs.index_select(0, packed.reshape(-1).int()).view(torch.float32)
    if count % block:
        scale = absmax.float().repeat_interleave(block)[:count]
        return (weight[:count] * scale).view(out_features, in_features)
    weight.view(-1, block).mul_(absmax.float().view(-1, 1))
    return weight.view(out_features, in_features)


def nf4_activations(packed: torch.Tensor, absmax: torch.Tensor, *, in_features: int, block: int = 64) -> str:
    """What `nf4_linear` does with activations, here and now: "int8 in groups of 64", or "float"."""
    native = cpu_ops.takes_nf4(packed, absmax, in_features, block)
    return activations.in_groups(activations.NF4_GROUP) if native else activations.FLOAT


def nf4_linear_reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    in_features: int,
    block: int,
) -> torch.Tensor:
    """`nf4_linear` in torch, on any device, with activations in floating point."""
    _check_input("nf4_linear", x, in_features, bias, out_features)
    weight = dequantize_nf4(packed, absmax, out_features, in_features, block).to(x.dtype)
    with _no_autocast(x):
        return linear(x, weight, None if bias is None else bias.to(x.dtype))


def _nf4_linear_cpu(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    in_features: int,
    block: int,
) -> torch.Tensor:
    _check_nf4(packed, absmax, out_features, in_features, block)
    _check_input("nf4_linear", x, in_features, bias, out_features)
    y = cpu_ops.nf4_linear(x, packed, absmax, bias, out_features, in_features, block)
    return nf4_linear_reference(x, packed, absmax, bias, out_features, in_features, block) if y is None else y


def _nf4_linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    in_features: int,
    block: int,
) -> torch.Tensor:
    _check_nf4(packed, absmax, out_features, in_features, block)
    _check_input("nf4_linear", x, in_features, bias, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


_nf4_linear = _define(nf4_linear_reference, _nf4_linear_cpu, _nf4_linear_fake)


def _check_nf4(packed: torch.Tensor, absmax: torch.Tensor, out_features: int, in_features: int, block: int) -> None:
    count = out_features * in_features
    if packed.dtype != torch.uint8 or packed.numel() != (count + 1) // 2:
        raise ValueError(f"nf4_linear: packed is {_describe(packed)}; uint8 [{(count + 1) // 2}, 1] is needed")
    if block < 1:
        raise ValueError(f"nf4_linear: block is {block}; a block has at least one weight")
    blocks = -(-count // block)
    if not absmax.is_floating_point() or absmax.numel() != blocks:
        raise ValueError(f"nf4_linear: absmax is {_describe(absmax)}; float [{blocks}] is needed")


# Gradients ------------------------------------------------------------------------------------------------------------
# x itself is not kept for the backward pass: the gradient needs the weight alone. For int8 this is the straight-through
# gradient, that of the layer without the rounding of x.


def _register_gradient(
    op: str, tensors: slice, bias: int, weight_io: Callable[..., torch.Tensor], arguments: int
) -> None:
    """Give `op` the gradient of a linear layer.

    Args:
        op: its name.
        tensors: which of its inputs are the quantized weight.
        bias: which of its inputs is the bias.
        weight_io: from those tensors, the inputs after the bias and the gradient's dtype to the weight [I, O] in that dtype or in
            float32 (a view will do).
        arguments: how many inputs the op has.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[tensors])
        ctx.settings = inputs[bias + 1 :]
        ctx.bias_dtype = None if inputs[bias] is None else inputs[bias].dtype

    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients: list[torch.Tensor | None] = [None] * arguments
        with _no_autocast(gradient):
            if ctx.needs_input_grad[0]:
                weight = weight_io(*ctx.saved_tensors, *ctx.settings, gradient.dtype).to(gradient.dtype)
                gradients[0] = gradient @ weight.t()
            if ctx.bias_dtype is not None and ctx.needs_input_grad[bias]:
                gradients[bias] = (
                    gradient.reshape(-1, gradient.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
                )
        return tuple(gradients)

    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_LIBRARY)


def _int8_weight_io(
    weight: torch.Tensor, weight_scale: torch.Tensor, symmetric_input: bool, dtype: torch.dtype
) -> torch.Tensor:
    if weight.is_cuda:
        return _int8_weight_op(weight, weight_scale, dtype).t()
    return (weight.float() * weight_scale.float()).t()


@torch.library.custom_op("qlm::int8_weight", mutates_args=())
def _int8_weight_op(weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight of an int8 layer [O, I]: in one kernel on GPUs, where torch would take three and write float32."""
    found = cuda_ops.int8_weight(weight, weight_scale, dtype)
    return (weight.float() * weight_scale.float()).to(dtype) if found is None else found


@_int8_weight_op.register_fake
def _(weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _nf4_weight_io(
    packed: torch.Tensor, absmax: torch.Tensor, out_features: int, in_features: int, block: int, dtype: torch.dtype
) -> torch.Tensor:
    return dequantize_nf4(packed, absmax, out_features, in_features, block).t()


_register_gradient("qlm::int8_linear", tensors=slice(1, 3), bias=4, weight_io=_int8_weight_io, arguments=6)
_register_gradient("qlm::gptq_linear", tensors=slice(1, 5), bias=5, weight_io=_gptq_weight_op, arguments=8)
_register_gradient("qlm::nf4_linear", tensors=slice(1, 3), bias=3, weight_io=_nf4_weight_io, arguments=7)


# Shared ---------------------------------------------------------------------------------------------------------------


def _no_autocast(x: torch.Tensor) -> torch.autocast:
    """Autocast off: inside an op it would change the dtype of the result behind the shape rule's back."""
    return torch.autocast(x.device.type, enabled=False)


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_input(op: str, x: torch.Tensor, in_features: int, bias: torch.Tensor | None, out_features: int) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"{op}: x is {x.dtype}; float32, bfloat16 or float16 is needed")
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; the layer has {in_features} in features")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"{op}: bias has shape {list(bias.shape)}; [{out_features}] is needed")
