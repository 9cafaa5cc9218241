"""NF4 against bitsandbytes on the CPU, byte for byte."""

import statistics

import pytest
import torch

from qlm.numerics import nf4
from qlm.numerics.packing import pack_nf4, unpack_nf4

functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
SHAPES = [
    (1, 1),
    (1, 2),
    (3, 5),
    (1, 63),
    (1, 64),
    (1, 65),
    (7, 9),
    (5, 64),
    (33, 128),
    (96, 100),
    (17, 331),
    (256, 768),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def assert_same_as_bitsandbytes(weight: torch.Tensor) -> None:
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, absmax = nf4.quantize_nf4(weight)
    assert codes.dtype == torch.uint8
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(pack_nf4(codes), packed)


def random_weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The codebook ---------------------------------------------------------------------------------------------------------


def test_codebook_is_derived_from_normal_quantiles():
    # QLoRA appendix E: half of the levels on each side, quantiles from `offset` to one half, and an exact zero.
    offset = 0.9677083
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(offset + (0.5 - offset) * k / 8) for k in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * k / 7) for k in range(7)]
    levels = sorted([*positive, 0.0, *negative])
    derived = [level / max(levels) for level in levels]
    assert derived == pytest.approx(nf4.CODEBOOK, abs=2e-7)  # bitsandbytes' literal was computed in float32


def test_codebook_is_that_of_bitsandbytes():
    assert torch.equal(nf4.codebook(), functional.get_4bit_type("nf4", device="cpu"))


def test_dynamic_map_is_that_of_bitsandbytes():
    assert torch.equal(nf4.dynamic_map(), functional.create_dynamic_map())


# Quantizing -----------------------------------------------------------------------------------------------------------


@shapes
@DTYPES
def test_random_weights(shape, dtype):
    assert_same_as_bitsandbytes(random_weight(shape).to(dtype))


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 3e-38, 1e-30, 1e30, 3e38], ids=str)
def test_extreme_magnitudes(scale):
    weight = torch.randn(4, 80, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * scale
    assert_same_as_bitsandbytes(weight)


def test_blocks_of_zeros():
    weight = random_weight((4, 90))
    weight.view(-1)[64:128] = 0
    weight.view(-1)[-40:] = 0  # the last, partial block too
    assert_same_as_bitsandbytes(weight)
    assert_same_as_bitsandbytes(torch.zeros(3, 65))
    assert_same_as_bitsandbytes(-torch.zeros(3, 64))


@pytest.mark.parametrize("steps", [-2, -1, 0, 1, 2], ids=lambda s: f"{s:+d}ulp")
def test_exact_ties_and_their_neighbours(steps):
    levels = nf4.codebook()
    middles = (levels[:-1] + levels[1:]) / 2
    for _ in range(abs(steps)):
        middles = torch.nextafter(middles, torch.tensor(float(steps)) * torch.inf)
    for absmax in (1.0, -1.0, 0.5, 0.3, 3.7, 1e-3):
        block = torch.zeros(64)
        block[0] = absmax
        block[1:16] = middles * absmax
        block[16:31] = -middles * absmax
        block[31:47] = levels * absmax
        assert_same_as_bitsandbytes(torch.cat([block, block[:50]]).unsqueeze(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("context", ["in-order", "shuffled", "with-one", "with-largest"])
def test_every_finite_16_bit_value(context, dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[torch.isfinite(values)]
    if context == "shuffled":
        values = values[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))]
    elif context != "in-order":
        largest = torch.tensor(1.0 if context == "with-one" else torch.finfo(dtype).max, dtype=dtype)
        if context == "with-one":
            values = values[values.abs() <= 1]
        values = torch.nn.functional.pad(values, (0, -values.numel() % 63)).view(-1, 63)
        values = torch.cat([values, largest.expand(values.shape[0], 1)], dim=1)
    assert_same_as_bitsandbytes(values.reshape(1, -1))


@pytest.mark.parametrize("block", [32, 128, 4096], ids=lambda b: f"block-{b}")
def test_other_block_sizes(block):
    weight = random_weight((40, 130))
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    codes, absmax = nf4.quantize_nf4(weight, block)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(pack_nf4(codes), packed)


def test_codes_are_the_nearest_levels():
    weight = random_weight((64, 64))
    codes, absmax = nf4.quantize_nf4(weight)
    target = weight.double().view(-1, 64) / absmax.double().unsqueeze(1)
    distance = (target.unsqueeze(-1) - nf4.codebook().double()).abs()
    chosen = distance.gather(-1, codes.view(-1, 64, 1).long()).squeeze(-1)
    assert ((chosen - distance.amin(-1)) < 1e-7).all()


def test_a_view_is_quantized_in_row_major_order():
    weight = random_weight((64, 96)).t()
    assert_same_as_bitsandbytes(weight)
    assert torch.equal(nf4.quantize_nf4(weight)[0], nf4.quantize_nf4(weight.contiguous())[0])


# Dequantizing ---------------------------------------------------------------------------------------------------------


# In features that are a multiple of 16 but not of 64 are left out: bitsandbytes 0.50.2's AVX-512 code takes the scales
# of other blocks there (it counts blocks by row). An odd number of them goes through its torch code, which compiles
# itself unless told not to.
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 9), (5, 64), (33, 128), (9, 330), (256, 768)], ids=str)
@DTYPES
def test_dequantized_weights(shape, dtype):
    weight = random_weight(shape).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    with torch.compiler.set_stance("force_eager"):
        expected = functional.dequantize_4bit(packed, state)
    values = nf4.dequantize_nf4(unpack_nf4(packed, weight.numel()), state.absmax, shape)
    assert values.dtype == torch.float32
    assert torch.equal(values.to(dtype), expected)


def test_levels_survive_a_round_trip():
    codes = torch.arange(16, dtype=torch.uint8).repeat(8)
    absmax = torch.tensor([0.25, 8.0])
    weight = nf4.dequantize_nf4(codes, absmax, (2, 64))
    again, absmax_again = nf4.quantize_nf4(weight)
    assert torch.equal(again, codes)
    assert torch.equal(absmax_again, absmax)


# Double quantization --------------------------------------------------------------------------------------------------


def assert_same_double_quantization(weight: torch.Tensor) -> None:
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, nested_absmax, offset = nf4.double_quantize(nf4.quantize_nf4(weight)[1])
    assert codes.dtype == torch.uint8
    assert torch.equal(offset, state.offset)
    assert torch.equal(nested_absmax, state.state2.absmax)
    assert torch.equal(codes, state.absmax)
    expected = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(nf4.double_dequantize(codes, nested_absmax, offset), expected)
    if weight.shape[-1] % 64 == 0:
        whole = nf4.dequantize_nf4(nf4.quantize_nf4(weight)[0], expected, weight.shape)
        packed = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)[0]
        assert torch.equal(whole.to(weight.dtype), functional.dequantize_4bit(packed, state))


@shapes
@DTYPES
def test_double_quantization_of_random_weights(shape, dtype):
    assert_same_double_quantization(random_weight(shape).to(dtype))


@pytest.mark.parametrize("seed", range(4))
def test_double_quantization_of_many_blocks(seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(3000, 1, generator=generator) * (1 + seed))
    assert_same_double_quantization(torch.randn(3000, 64, generator=generator) * scale)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-42, 1e36], ids=str)
def test_double_quantization_of_equal_blocks(value):
    assert_same_double_quantization(torch.full((300, 64), value))


def test_double_quantization_of_tiny_differences():
    # The nested scale is so small that its reciprocal is infinite.
    assert_same_double_quantization(torch.tensor([1e-42, 3e-42]).repeat(200).unsqueeze(1).expand(-1, 64).contiguous())


def test_nested_codes_of_the_whole_range():
    # One value of 1 and one of -1 in each block; the others pass every step of bitsandbytes' table, and between them.
    dense = torch.linspace(-1, 1, 254 * 800, dtype=torch.float64).float().view(-1, 254)
    ends = torch.tensor([1.0, -1.0]).expand(dense.shape[0], 2)
    values = torch.cat([ends, dense], dim=1).flatten()
    expected, state = functional.quantize_blockwise(values - values.mean(), blocksize=256)
    codes, nested_absmax, _ = nf4.double_quantize(values)
    assert torch.equal(nested_absmax, state.absmax)
    assert torch.equal(codes, expected)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_values_that_are_not_finite_are_refused(value):
    weight = torch.zeros(4, 64)
    weight[2, 5] = value
    with pytest.raises(ValueError, match=r"weight has 1 NaN or infinite values of 256, the first at index \(2, 5\)"):
        nf4.quantize_nf4(weight)
    with pytest.raises(ValueError, match="absmax has 1 NaN"):
        nf4.double_quantize(weight.flatten())
    with pytest.raises(ValueError, match="absmax has 1 NaN"):
        nf4.dequantize_nf4(torch.zeros(64, dtype=torch.uint8), torch.tensor([value]), (1, 64))
    with pytest.raises(ValueError, match="nested_absmax has 1 NaN"):
        nf4.double_dequantize(torch.zeros(4, dtype=torch.uint8), torch.tensor([value]), 0.0)
    with pytest.raises(ValueError, match="offset has 1 NaN"):
        nf4.double_dequantize(torch.zeros(4, dtype=torch.uint8), torch.ones(1), value)


def test_sizes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"codes has 64 values; shape \(2, 64\) needs 128"):
        nf4.dequantize_nf4(torch.zeros(64, dtype=torch.uint8), torch.ones(1), (2, 64))
    with pytest.raises(ValueError, match="absmax has 1 values; 128 weights in blocks of 64 need 2"):
        nf4.dequantize_nf4(torch.zeros(128, dtype=torch.uint8), torch.ones(1), (2, 64))
    with pytest.raises(ValueError, match="nested_absmax has 1 values; 257 codes need 2"):
        nf4.double_dequantize(torch.zeros(257, dtype=torch.uint8), torch.ones(1), 0.0)
    with pytest.raises(ValueError, match=r"weight is torch\.int64"):
        nf4.quantize_nf4(torch.zeros(64, dtype=torch.int64))
    with pytest.raises(ValueError, match="block is 0"):
        nf4.quantize_nf4(torch.zeros(64), block=0)
    with pytest.raises(ValueError, match="absmax is empty"):
        nf4.double_quantize(torch.zeros(0))
    with pytest.raises(ValueError, match="the mean of absmax has 1 NaN or infinite"):
        nf4.double_quantize(torch.full((300,), 3e38))
