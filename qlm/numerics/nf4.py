"""The NF4 data type: 4-bit codes of a fixed codebook, one scale (`absmax`) for each block of 64 weights.

It quantizes to the same bytes as bitsandbytes 0.50 does on the CPU, corner cases included (ties, blocks of zeros, a
last block that is not full), with and without its double quantization ("compressed statistics"), so that files can be
compared by hash. It does not choose scales other than the largest magnitude, and refuses NaN and infinite weights.

Sources: Dettmers et al., QLoRA (2023), section 3 and appendix E; Dettmers et al., 8-bit optimizers via block-wise
quantization (2022), section 2 (the dynamic map); bitsandbytes 0.50 `backends/default/ops.py` and `csrc/cpu_ops.cpp`.
"""

import functools
from collections.abc import Sequence
from math import prod

import torch

from qlm.formats.nf4 import CODEBOOK

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmax values that share one nested absmax
_SMALLEST_DIVISOR = 1e-38  # bitsandbytes' guard against dividing by the absmax of a block of zeros
_NESTED_STEPS = 65535  # bitsandbytes' CPU code looks nested codes up in a table of 65,536 equal steps from -1 to 1


def codebook(device: torch.device | str = "cpu") -> torch.Tensor:
    """`CODEBOOK` as float32 [16]."""
    return torch.tensor(CODEBOOK, dtype=torch.float32, device=device)


def quantize_nf4(weight: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes of a weight, block by block of the flattened row-major tensor.

    Args:
        weight: float32, bfloat16 or float16 [O, I] (any shape); 16-bit values are widened exactly.
        block: weights in a block.

    Returns:
        codes: uint8 [O * I]; a value halfway between two levels takes the lower one.
        absmax: float32 [ceil(O * I / block)], the largest magnitude of each block.

    Raises:
        ValueError: not a float tensor, or NaN or infinite values in it.
    """
    _check_finite(weight, "weight")
    _check_block(block)
    flat = weight.reshape(-1).float()
    full = flat.numel() - flat.numel() % block
    blocks, rest = flat[:full].view(-1, block), flat[full:]
    absmax = blocks.abs().amax(dim=1)
    # bitsandbytes multiplies by the reciprocal in full blocks and divides in the last, partial one, whose absmax alone
    # is raised to the smallest divisor: the two round differently, so both are kept.
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST_DIVISOR)).unsqueeze(1)).clamp_(-1, 1).reshape(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=_SMALLEST_DIVISOR)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, (rest / last).clamp_(-1, 1)])
    return _nearest(scaled, codebook(flat.device)), absmax


def dequantize_nf4(codes: torch.Tensor, absmax: torch.Tensor, shape: Sequence[int], block: int = BLOCK) -> torch.Tensor:
    """The weight that codes stand for: `CODEBOOK[code] * absmax of its block`, one rounding, in float32.

    Args:
        codes: integers [O * I] from 0 to 15.
        absmax: float32 [ceil(O * I / block)].
        shape: (O, I), or any shape with as many elements.
        block: weights in a block.

    Returns:
        float32 of that shape.

    Raises:
        ValueError: sizes that do not belong together, or NaN or infinite values in absmax.
    """
    _check_finite(absmax, "absmax")
    _check_block(block)
    count = prod(shape)
    if codes.numel() != count:
        raise ValueError(f"codes has {codes.numel()} values; shape {tuple(shape)} needs {count}")
    needed = -(-count // block)
    if absmax.numel() != needed:
        raise ValueError(f"absmax has {absmax.numel()} values; {count} weights in blocks of {block} need {needed}")
    levels = codebook(codes.device)[codes.reshape(-1).int()]
    return _scale_blocks(levels, absmax, block).reshape(tuple(shape))


@functools.cache
def _dynamic_map_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        for sign in (1, -1):
            values += (sign * 10.0 ** (exponent - 6) * middles).tolist()
    return tuple(sorted(values))


def dynamic_map() -> torch.Tensor:
    """The 8-bit dynamic map with which bitsandbytes codes nested statistics: float32 [256], ascending.

    Zero, one, and for each decade 10**-6 ... 1 of both signs 2**0 ... 2**6 equally spaced fractions: small values have
    many exponents and few fractions, large ones few exponents and many fractions.
    """
    return torch.tensor(_dynamic_map_values(), dtype=torch.float32)


def double_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code the absmax values with 8 bits each: their mean is taken off, the rest is coded in blocks of 256.

    The codes are those of bitsandbytes' CPU code, which first rounds to one of 65,536 equal steps, so that a value very
    near the middle of two levels, or very near zero, need not get the nearest one (its CUDA code searches exactly).

    Args:
        absmax: float32 [N].

    Returns:
        codes: uint8 [N].
        nested_absmax: float32 [ceil(N / 256)].
        offset: float32 scalar, the mean; with another number of threads torch may add in another order.

    Raises:
        ValueError: not a float tensor, empty, or NaN or infinite values in it.
    """
    _check_finite(absmax, "absmax")
    if not absmax.numel():
        raise ValueError("absmax is empty; its mean does not exist")
    flat = absmax.reshape(-1).float()
    offset = flat.mean()
    _check_finite(offset, "the mean of absmax")  # the sum can overflow
    rest = flat - offset
    padding = -rest.numel() % NESTED_BLOCK
    blocks = torch.nn.functional.pad(rest, (0, padding)).view(-1, NESTED_BLOCK)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / nested_absmax).unsqueeze(1)).clamp_(-1, 1)
    # The step is computed with a fused multiply-add there: in float64 the product and the sum are exact, and one
    # rounding follows.
    step = (((scaled + 1) * 0.5).double() * _NESTED_STEPS + 0.5).float().trunc()
    # 0 / 0 in a block of zeros, or in one so small that its reciprocal is infinite: step 0 there, hence code 0.
    step = step.nan_to_num(nan=0.0)
    codes = _nearest(2 * step / _NESTED_STEPS - 1, dynamic_map().to(flat.device))
    return codes.view(-1)[: rest.numel()].clone(), nested_absmax, offset


def double_dequantize(codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor | float) -> torch.Tensor:
    """The absmax values that nested codes stand for: `dynamic_map()[code] * nested_absmax of its block + offset`.

    Args:
        codes: uint8 [N].
        nested_absmax: float32 [ceil(N / 256)].
        offset: scalar.

    Returns:
        float32 [N].

    Raises:
        ValueError: sizes that do not belong together, or NaN or infinite values.
    """
    offset = torch.as_tensor(offset, dtype=torch.float32, device=codes.device)
    _check_finite(nested_absmax, "nested_absmax")
    _check_finite(offset, "offset")
    needed = -(-codes.numel() // NESTED_BLOCK)
    if nested_absmax.numel() != needed:
        raise ValueError(f"nested_absmax has {nested_absmax.numel()} values; {codes.numel()} codes need {needed}")
    levels = dynamic_map().to(codes.device)[codes.reshape(-1).int()]
    return _scale_blocks(levels, nested_absmax, NESTED_BLOCK) + offset


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of ascending levels, the lower one in a tie: uint8, the shape of `values`."""
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)


def _scale_blocks(levels: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """`levels` [N] times the scale of the block that each belongs to."""
    full = levels.numel() - levels.numel() % block
    scale = scale.reshape(-1).float()
    scaled = levels[:full].view(-1, block) * scale[: full // block].unsqueeze(1)
    return torch.cat([scaled.reshape(-1), levels[full:] * scale[full // block :]])


def _check_finite(values: torch.Tensor, name: str) -> None:
    if not values.is_floating_point():
        raise ValueError(f"{name} is {values.dtype}; a float tensor is needed")
    bad = ~torch.isfinite(values)
    count = int(bad.sum())
    if count:
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name} has {count} NaN or infinite values of {values.numel()}, the first at index {first}")


def _check_block(block: int) -> None:
    if block < 1:
        raise ValueError(f"block is {block}; a block has at least one weight")
