"""The ops, by their torch references and by the CPU kernels: against float64, compressed-tensors, `qlm.numerics` and torch's own
op checks. What only the way to the kernels can get wrong is in test_cpu_ops.py."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qlm.kernels import activations, cpu_ops, ops
from qlm.kernels.ops import (
    MAX_IN_FEATURES,
    dequantize_gptq,
    gptq_linear,
    int8_linear,
    int8_row_sum,
    nf4_linear,
    quantize_activation_per_token,
)
from qlm.numerics import nf4, packing

# Relative to the largest output. Two roundings of an output for int8 (product and bias in float32, then x's dtype); the
# weight's rounding and a float32 sum of up to 320 products for the others, whose errors average out.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# What rounding activations to int8 may change, one scale max|x| / 127 for each part of them: a code is off by at most half a
# step. In the worst case all errors add up; they are random, so that the sum of K of them grows with sqrt(K). 5 standard
# deviations of a uniform error.
INT8_STEP_DEVIATION = 1 / 127 / 12**0.5 * 5
# The scale at which linear_nf4.cpp rounds the NF4 levels to int8.
NF4_LEVEL_SCALE = 124.13

DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
LEADING = pytest.mark.parametrize(
    "leading", [(), (1,), (3,), (2, 5), (2, 1, 3), (0,), (4, 0)], ids=lambda s: "x".join(map(str, s)) or "vector"
)
with_and_without_bias = pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
symmetric_or_not = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["native", "reference"])
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the CPU kernels, and with the torch references."""
    if request.param == "reference":
        monkeypatch.setattr(cpu_ops, "native", lambda: None)
    elif cpu_ops.native() is None:
        pytest.skip("the CPU kernels are not installed, or QLM_KERNELS=reference")
    return str(request.param)


both_ways = pytest.mark.usefixtures("computed_by")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if actual.numel():
        error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error < TOLERANCE[dtype]


class Layer:
    """One random layer: the op's call, and the weight that it stands for in float64, made without the op."""

    def __init__(self, kind: str, with_bias: bool = True, out_features: int = 96, in_features: int = 320) -> None:
        self.weight: torch.Tensor
        self.op: Callable[..., torch.Tensor]
        self.settings: dict[str, int]
        self.tensors: tuple[torch.Tensor, ...]
        self.kind = kind
        self.bias = random(out_features, seed=5) if with_bias else None
        self.shape = (out_features, in_features)
        if kind.startswith("int8"):
            self._int8()
        elif kind == "nf4":
            self._nf4()
        else:
            self._gptq(*kind.split("-"))

    def _int8(self) -> None:
        codes = torch.randint(-127, 128, self.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
        scale = random(self.shape[0], 1, seed=2).abs() / 127
        self.weight = codes.double() * scale.double()
        self.op, self.settings = int8_linear, {"symmetric_input": self.kind == "int8-symmetric"}
        self.tensors = (codes, scale, int8_row_sum(codes))

    def _nf4(self) -> None:
        codes, absmax = nf4.quantize_nf4(random(*self.shape, seed=1))
        self.weight = nf4.dequantize_nf4(codes, absmax, self.shape).double()
        self.op, self.settings = nf4_linear, {"out_features": self.shape[0], "in_features": self.shape[1], "block": 64}
        self.tensors = (packing.pack_nf4(codes), absmax)

    def _gptq(self, _: str, bits_text: str, version: str, order: str) -> None:
        bits, group_size = int(bits_text), 64
        out_features, in_features = self.shape
        groups = in_features // group_size
        generator = torch.Generator().manual_seed(1)
        codes = torch.randint(0, 2**bits, (in_features, out_features), generator=generator)
        zero_point = torch.randint(1, 2**bits, (groups, out_features), generator=generator)
        scales = (random(groups, out_features, seed=2).abs() / 2**bits).half()
        g_idx = torch.arange(in_features, dtype=torch.int32) // group_size
        if order == "act":
            g_idx = g_idx[torch.randperm(in_features, generator=generator)]
        group = g_idx.long()
        self.weight = (scales.double()[group] * (codes - zero_point[group])).t()
        self.op, self.settings = gptq_linear, {"bits": bits, "v2": version == "v2"}
        qzeros = packing.encode_zero_points(zero_point, bits, "gptq_v2" if version == "v2" else "gptq")
        self.tensors = (packing.pack_rows(codes, bits), qzeros, scales, g_idx)

    def order(self) -> torch.Tensor:
        """The in features, those of a group side by side."""
        return torch.arange(self.shape[1]) if self.kind == "nf4" else torch.argsort(self.tensors[3], stable=True)

    def rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, I] and the weight as the kernels of the 4-bit formats have them: int8 codes times scales, in float64, in
        features sorted by group."""
        order = self.order()
        x, weight = x[:, order], self.weight[:, order]
        part = activations.NF4_GROUP if self.kind == "nf4" else activations.gptq_group(64, self.settings["bits"])
        parts = x.float().unflatten(-1, (-1, part))
        absmax = parts.abs().amax(dim=-1, keepdim=True)
        codes = (parts * torch.where(absmax > 0, 127 / absmax, 0.0)).round()
        if self.kind == "nf4":
            packed, absmax_of_weight = self.tensors
            levels = torch.tensor(ops.NF4_LEVELS, dtype=torch.float64)
            rounded_levels = (levels * NF4_LEVEL_SCALE).round() / NF4_LEVEL_SCALE
            weight = rounded_levels[packing.unpack_nf4(packed).long()].view(-1, 64) * absmax_of_weight.double().view(
                -1, 1
            )
        return (codes.double() * (absmax / 127).double()).flatten(-2), weight.view(self.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x, *self.tensors, self.bias, **self.settings)

    def raw(self, x: torch.Tensor) -> tuple[object, ...]:
        return (x, *self.tensors, self.bias, *self.settings.values())


GPTQ_KINDS = [
    f"gptq-{bits}-{version}-{order}" for bits in (2, 3, 4, 8) for version in ("v1", "v2") for order in ("seq", "act")
]
WEIGHT_ONLY_KINDS = ["nf4", *GPTQ_KINDS]
ALL_KINDS = ["int8-asymmetric", "int8-symmetric", *WEIGHT_ONLY_KINDS]
FEW_KINDS = ["int8-asymmetric", "int8-symmetric", "nf4", "gptq-3-v1-act", "gptq-4-v1-seq"]


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHT_ONLY_KINDS)
@with_and_without_bias
@DTYPES
def test_weight_only_layers_against_float64(kind, with_bias, dtype, computed_by):
    layer = Layer(kind, with_bias)
    x = random(7, 320, dtype=dtype)
    if computed_by == "reference":
        bias = None if layer.bias is None else layer.bias.to(dtype).double()
        expected = nn.functional.linear(x.double(), layer.weight.float().to(dtype).double(), bias)
    else:
        bias = None if layer.bias is None else layer.bias.double()
        expected = nn.functional.linear(*layer.rounded(x), bias)
    assert_close(layer(x), expected, dtype)


@pytest.mark.parametrize("kind", WEIGHT_ONLY_KINDS)
@DTYPES
def test_what_rounding_activations_changes(kind, dtype):
    layer = Layer(kind)
    x = random(200, 320, dtype=dtype)
    with ops.float_activations():
        exact = layer(x)
    exact_again = getattr(ops, f"{layer.op.__name__}_reference")(*layer.raw(x))
    assert torch.equal(exact, exact_again)
    plain = nn.functional.linear(x.double(), layer.weight, layer.bias.double())
    order = layer.order()
    parts, weights = (t.double().abs()[:, order].unflatten(-1, (-1, 64)) for t in (x, layer.weight))
    bound = INT8_STEP_DEVIATION * (parts.amax(-1).square() @ weights.square().sum(-1).t()).sqrt()
    if kind == "nf4":  # roundings of the levels are errors of the weight, and as random
        levels = layer.rounded(x)[1] - layer.weight
        bound += 5 * (x.double().square() @ levels.square().t()).sqrt()
    error = (layer(x).double() - plain).abs()
    assert (error <= bound + TOLERANCE[dtype] * plain.abs().max()).all()


@pytest.mark.parametrize("kind", ["int8-asymmetric", "int8-symmetric"])
@with_and_without_bias
@DTYPES
@both_ways
def test_int8_layers_against_float64(kind, with_bias, dtype):
    layer = Layer(kind, with_bias)
    x = random(7, 320, dtype=dtype)
    q, scale, zero_point = quantize_activation_per_token(x, symmetric=kind == "int8-symmetric")
    expected = ((q.double() - zero_point) * scale.double()) @ layer.weight.t()
    if layer.bias is not None:
        expected += layer.bias.double()
    assert_close(layer(x), expected, dtype)
    # and the rounding of x itself is at most half a step in each product
    plain = nn.functional.linear(x.double(), layer.weight, None if layer.bias is None else layer.bias.double())
    bound = 0.5001 * scale.double() * layer.weight.abs().sum(dim=1) + TOLERANCE[dtype] * plain.abs().max()
    if kind == "int8-symmetric":  # code 127.5 does not exist, so the largest value may be off by a whole step
        bound = 2 * bound
    assert ((layer(x).double() - plain).abs() <= bound).all()


@pytest.mark.parametrize("kind", FEW_KINDS)
@LEADING
@DTYPES
@both_ways
def test_any_leading_shape(kind, leading, dtype):
    layer = Layer(kind)
    x = random(math.prod(leading), 320, dtype=dtype)
    y = layer(x.reshape(*leading, 320))
    assert y.shape == (*leading, 96)
    assert y.dtype == dtype
    # A product may be summed in another order for another number of rows.
    if x.shape[0]:
        assert_close(y.reshape(-1, 96), layer(x), dtype)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_x_may_be_a_view(kind, computed_by):
    layer = Layer(kind)
    wide = random(12, 640)
    views = (random(320, 6).t(), wide[:, 7:327], wide[::2, ::2], random(320).expand(4, 320), random(2, 320, 3).mT)
    for x in views:
        assert not x.is_contiguous()
        if computed_by == "native" or kind.startswith("int8"):
            assert torch.equal(layer(x), layer(x.contiguous()))
        else:  # torch may sum in another order
            assert_close(layer(x), layer(x.contiguous()), x.dtype)


@pytest.mark.parametrize("kind", FEW_KINDS)
@both_ways
def test_dtype_stays_that_of_x_under_autocast(kind):
    layer = Layer(kind)
    x = random(5, 320).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert torch.equal(y, layer(x))
    assert y.dtype == x.grad.dtype == torch.float32


# torch's own checks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEW_KINDS)
@with_and_without_bias
@DTYPES
@both_ways
def test_opcheck(kind, with_bias, dtype):
    layer = Layer(kind, with_bias)
    op = getattr(torch.ops.qlm, layer.op.__name__).default
    for x in (random(2, 3, 320, dtype=dtype), random(3, 320, dtype=dtype).requires_grad_()):
        torch.library.opcheck(op, layer.raw(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_shapes_on_the_meta_device(kind):
    layer = Layer(kind)
    layer.tensors = tuple(t.to("meta") for t in layer.tensors)
    layer.bias = layer.bias.to("meta")
    y = layer(torch.empty(2, 3, 320, dtype=torch.bfloat16, device="meta"))
    assert y.shape == (2, 3, 96)
    assert y.dtype == torch.bfloat16


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
@with_and_without_bias
@DTYPES
def test_gradient_is_that_of_the_dequantized_linear(kind, with_bias, dtype):
    layer = Layer(kind, with_bias)
    if layer.bias is not None:
        layer.bias = layer.bias.requires_grad_()
    twin = nn.Linear(320, 96, bias=with_bias, dtype=torch.float64)
    with torch.no_grad():
        twin.weight.copy_(layer.weight.float().to(dtype))
    x = random(2, 5, 320, dtype=dtype)
    gradient = random(2, 5, 96, seed=9, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    layer(ours).backward(gradient)
    twin(theirs).backward(gradient.double())
    assert_close(ours.grad, theirs.grad, dtype)
    if layer.bias is not None:
        assert_close(layer.bias.grad, twin.bias.grad, torch.float32)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_gradient_of_a_single_vector_and_of_no_tokens(kind):
    layer = Layer(kind)
    layer.bias = layer.bias.requires_grad_()
    x = random(320).requires_grad_()
    layer(x).sum().backward()
    assert_close(x.grad, layer.weight.sum(dim=0), torch.float32)
    assert torch.equal(layer.bias.grad, torch.ones(96))
    layer.bias.grad = None
    x = torch.empty(0, 320, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 320)
    assert torch.equal(layer.bias.grad, torch.zeros(96))


@pytest.mark.parametrize("kind", WEIGHT_ONLY_KINDS)
def test_gradient_by_finite_differences(kind):
    layer = Layer(kind)
    x, direction, gradient = random(3, 320), random(3, 320, seed=3), random(3, 96, seed=4)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(gradient)
    # The op is linear in x, so that one wide step is as good as a narrow one; but not with rounded activations.
    with ops.float_activations():
        difference = ((layer(x + direction) - layer(x - direction)).double() * gradient).sum() / 2
    assert difference.item() == pytest.approx((leaf.grad.double() * direction).sum().item(), rel=1e-4)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_nothing_but_the_quantized_weight_is_kept_for_the_backward_pass(kind):
    layer = Layer(kind)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(random(50, 320).requires_grad_())
    owned = {t.data_ptr() for t in layer.tensors}
    assert kept
    assert all(t.data_ptr() in owned for t in kept)


# int8 -----------------------------------------------------------------------------------------------------------------


def tokens_of_many_kinds() -> torch.Tensor:
    rows = [random(64, seed=seed) * 10.0 ** (seed % 9 - 4) for seed in range(60)]
    rows += [row.abs() for row in rows[:9]] + [-row.abs() for row in rows[:9]]
    rows += [
        torch.linspace(-1, 1, 64),
        torch.linspace(0, 255, 64),
        torch.linspace(-255, 0, 64),
        torch.linspace(-3, 252, 64),
    ]
    integers = torch.arange(64.0) * 4
    rows += [
        torch.cat([integers[:-1] + 0.5, torch.tensor([255.0])]),
        torch.cat([integers[:-1] - 127.5, torch.tensor([127.5])]),
    ]
    rows += [torch.cat([torch.zeros(63), torch.tensor([value])]) for value in (1.0, -1.0, 1e-30, -1e30)]
    return torch.stack(rows)


@symmetric_or_not
def test_codes_are_those_of_compressed_tensors(symmetric):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = quantization.QuantizationArgs(
        num_bits=8, type="int", strategy="token", symmetric=symmetric, dynamic=True
    )
    x = tokens_of_many_kinds()
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    scale, zero_point = calculate_qparams(low, high, arguments)
    codes = quantize(x, scale, zero_point, arguments, dtype=torch.int8)
    q, our_scale, our_zero_point = quantize_activation_per_token(x, symmetric)
    assert torch.equal(our_scale, scale)
    assert torch.equal(our_zero_point, zero_point.to(torch.int32))
    assert torch.equal(q, codes)


@symmetric_or_not
def test_zero_is_always_coded_exactly(symmetric):
    x = tokens_of_many_kinds()
    x[:, 3] = 0
    q, _, zero_point = quantize_activation_per_token(x, symmetric)
    assert torch.equal(q[:, 3:4].int(), zero_point)


@pytest.mark.parametrize("kind", FEW_KINDS)
@DTYPES
@both_ways
def test_tokens_of_zeros_give_the_bias(kind, dtype):
    layer = Layer(kind)
    y = layer(torch.zeros(3, 320, dtype=dtype))
    assert torch.equal(y, layer.bias.to(dtype).expand(3, -1))


@pytest.mark.parametrize("kind", FEW_KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_values_that_are_not_finite_spoil_their_token_alone(kind, value, computed_by):
    layer = Layer(kind)
    x = random(4, 320)
    good = layer(x)
    x[2, 7] = value
    y = layer(x)
    # The references of the others give infinities where the arithmetic does.
    weight_only = computed_by == "reference" and not kind.startswith("int8")
    assert not (y[2].isfinite().any() if weight_only else ~y[2].isnan().all())
    assert torch.equal(y[[0, 1, 3]], good[[0, 1, 3]])


MATMULS = pytest.mark.parametrize(
    "matmul",
    [
        pytest.param(ops._int8_matmul_chunked, id="chunked"),
        pytest.param(
            ops._int8_matmul_int_mm,
            id="int_mm",
            marks=pytest.mark.skipif(not ops._cpu_multiplies_int8(), reason="torch._int_mm is not used on this CPU"),
        ),
    ],
)


@MATMULS
@pytest.mark.parametrize("in_features", [2, 3, 8, 64, 1023, 1024, 1025, 4096, 66_310])
def test_sums_of_extreme_codes_are_exact(matmul, in_features):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (5, in_features), generator=generator, dtype=torch.int8)
    q[0], q[1] = 127, -128
    q[2, ::2], q[2, 1::2] = 127, -128
    weight = torch.randint(-128, 128, (9, in_features), generator=generator, dtype=torch.int8)
    weight[0], weight[1], weight[2] = 127, -127, -128
    weight[3, ::2], weight[3, 1::2] = 127, -127
    sums = matmul(q, weight)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), q.long() @ weight.long().t())


@MATMULS
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33])
def test_sums_are_exact_for_any_number_of_tokens(matmul, tokens):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (tokens, 77), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (13, 77), generator=generator, dtype=torch.int8)
    assert torch.equal(matmul(q, weight).long(), q.long() @ weight.long().t())


@pytest.mark.parametrize("out_features", [1, 2, 8])
@pytest.mark.parametrize("in_features", [1, 2, 8])
def test_sums_of_tiny_layers_are_exact(out_features, in_features):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (20, in_features), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    assert torch.equal(ops._int8_matmul(q, weight).long(), q.long() @ weight.long().t())


@both_ways
def test_an_int8_weight_may_be_a_view():
    layer = Layer("int8-asymmetric")
    x = random(6, 320)
    expected = layer(x)
    codes, scale, row_sum = layer.tensors
    wide = torch.cat([codes, codes], dim=1)
    for view in (codes.t().contiguous().t(), wide[:, :320], wide[:, 320:], wide.repeat_interleave(2, dim=1)[:, :640:2]):
        assert torch.equal(int8_linear(x, view, scale, row_sum, layer.bias), expected)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_chunked_sums_are_exact_with_reduced_float32_products(precision):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (40, 2048), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (64, 2048), generator=generator, dtype=torch.int8)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = ops._int8_matmul_chunked(q, weight)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(sums.long(), q.long() @ weight.long().t())


@pytest.mark.parametrize("level", [127, -127, -128])
@both_ways
def test_the_longest_rows_do_not_overflow(level):
    weight = torch.full((8, MAX_IN_FEATURES), level, dtype=torch.int8)
    x = torch.ones(2, MAX_IN_FEATURES)
    x[1] = -1
    y = int8_linear(x, weight, torch.ones(8, 1), int8_row_sum(weight))
    expected = torch.tensor([[1.0], [-1.0]]) * level * MAX_IN_FEATURES
    assert torch.allclose(y, expected.expand(2, 8), rtol=1e-6)


@MATMULS
def test_the_reference_is_the_same_with_either_product(matmul, monkeypatch):
    layer = Layer("int8-asymmetric")
    x = random(6, 320)
    expected = layer(x)
    monkeypatch.setattr(ops, "_int8_matmul", matmul)
    assert torch.equal(ops.int8_linear_reference(*layer.raw(x)), expected)


@both_ways
def test_int8_refuses_what_does_not_fit():
    codes, scale, row_sum = Layer("int8-asymmetric").tensors
    x = random(2, 320)
    with pytest.raises(ValueError, match="66311 in features; int32 sums hold at most 66310"):
        int8_linear(torch.zeros(1, 66_311), torch.zeros(1, 66_311, dtype=torch.int8), torch.ones(1, 1), row_sum[:1])
    with pytest.raises(ValueError, match=r"weight is uint8 \[96, 320\]"):
        int8_linear(x, codes.view(torch.uint8), scale, row_sum)
    with pytest.raises(ValueError, match=r"weight_scale is float32 \[96\]; float \[96, 1\] is needed"):
        int8_linear(x, codes, scale.flatten(), row_sum)
    with pytest.raises(ValueError, match=r"row_sum is int64 \[96\]"):
        int8_linear(x, codes, scale, row_sum.long())
    with pytest.raises(ValueError, match=r"x has shape \[2, 319\]; the layer has 320 in features"):
        int8_linear(x[:, 1:], codes, scale, row_sum)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        int8_linear(x.double(), codes, scale, row_sum)
    with pytest.raises(ValueError, match=r"bias has shape \[95\]; \[96\] is needed"):
        int8_linear(x, codes, scale, row_sum, torch.zeros(95))


# GPTQ -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GPTQ_KINDS)
def test_dequantized_gptq_weight(kind):
    layer = Layer(kind)
    weight = dequantize_gptq(*layer.tensors, **layer.settings)
    assert weight.dtype == torch.float32
    assert weight.is_contiguous()
    # (code - zero point) * scale: both factors fit float32, so that one rounding separates it from float64.
    assert torch.equal(weight, layer.weight.float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids=lambda b: f"{b}-bit")
def test_unpacking_agrees_with_numerics_on_any_words(bits):
    generator = torch.Generator().manual_seed(bits)
    words = torch.randint(-(2**31), 2**31, (6 * bits, 50), generator=generator).to(torch.int32)
    assert torch.equal(ops._unpack_words(words, bits), packing.unpack_rows(words, bits).int())


@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids=lambda b: f"{b}-bit")
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_zero_points_agree_with_numerics_on_any_words(bits, v2):
    generator = torch.Generator().manual_seed(bits)
    qzeros = torch.randint(-(2**31), 2**31, (2, 3 * bits), generator=generator).to(torch.int32)
    zero_point = packing.decode_zero_points(qzeros, bits, "gptq_v2" if v2 else "gptq")
    out_features = zero_point.shape[1]
    qweight = packing.pack_rows(torch.zeros(64, out_features, dtype=torch.uint8), bits)
    g_idx = torch.arange(64, dtype=torch.int32) // 32
    weight = dequantize_gptq(qweight, qzeros, torch.ones(2, out_features), g_idx, bits, v2)
    assert torch.equal(weight, -zero_point.float().t().repeat_interleave(32, dim=1))


@pytest.mark.parametrize("group_size", [32, 64, 160], ids=lambda g: f"group-{g}")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_consecutive_groups_and_gathered_ones_give_the_same_weight(group_size, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    groups = -(-160 // group_size)  # the last group may be short
    codes = torch.randint(0, 16, (160, 24), generator=generator)
    zero_point = torch.randint(1, 16, (groups, 24), generator=generator)
    scales = random(groups, 24).half()
    g_idx = torch.arange(160, dtype=dtype) // group_size
    arguments = (packing.pack_rows(codes, 4), packing.encode_zero_points(zero_point, 4), scales, g_idx, 4, False)
    weight = dequantize_gptq(*arguments)
    monkeypatch.setattr(ops, "_groups_are_consecutive", lambda *_: False)
    assert torch.equal(weight, dequantize_gptq(*arguments))
    expected = scales.double()[g_idx.long()] * (codes - zero_point[g_idx.long()])
    assert torch.equal(weight, expected.t().float())


@both_ways
def test_gptq_refuses_what_does_not_fit():
    layer = Layer("gptq-4-v1-seq")
    qweight, qzeros, scales, g_idx = layer.tensors
    x = random(2, 320)
    with pytest.raises(ValueError, match="5 bits; 2, 3, 4 and 8 are known"):
        gptq_linear(x, qweight, qzeros, scales, g_idx, bits=5, v2=False)
    with pytest.raises(ValueError, match=r"qweight is int32 \[40, 96\]; int32 \[80, 96\] is needed"):
        gptq_linear(x, qweight, qzeros, scales, g_idx, bits=8, v2=False)
    with pytest.raises(ValueError, match=r"qzeros is int32 \[4, 12\]; int32 \[5, 12\] is needed"):
        gptq_linear(x, qweight, qzeros[:4], scales, g_idx, bits=4, v2=False)
    with pytest.raises(ValueError, match=r"scales is int32"):
        gptq_linear(x, qweight, qzeros, scales.int(), g_idx, bits=4, v2=False)
    with pytest.raises(ValueError, match=r"g_idx is float32"):
        gptq_linear(x, qweight, qzeros, scales, g_idx.float(), bits=4, v2=False)
    with pytest.raises(ValueError, match="319 in, 96 out features; 4-bit words need multiples of 8"):
        gptq_linear(x, qweight, qzeros, scales, g_idx[:-1], bits=4, v2=False)
    with pytest.raises(ValueError, match=r"x has shape \[2, 319\]"):
        gptq_linear(x[:, 1:], qweight, qzeros, scales, g_idx, bits=4, v2=False)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        gptq_linear(x, qweight, qzeros, scales, g_idx + 1, bits=4, v2=False)


# NF4 ------------------------------------------------------------------------------------------------------------------


def test_levels_are_those_of_numerics():
    assert ops.NF4_LEVELS == nf4.CODEBOOK


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 9), (5, 64), (40, 96), (64, 128)], ids=str)
@pytest.mark.parametrize("block", [32, 64], ids=lambda b: f"block-{b}")
def test_dequantized_nf4_weight_agrees_with_numerics(shape, block):
    codes, absmax = nf4.quantize_nf4(random(*shape), block)
    packed = packing.pack_nf4(codes)
    weight = ops.dequantize_nf4(packed, absmax, *shape, block)
    assert torch.equal(weight, nf4.dequantize_nf4(codes, absmax, shape, block))
    x = random(3, shape[1])
    with ops.float_activations():
        y = nf4_linear(x, packed, absmax, out_features=shape[0], in_features=shape[1], block=block)
    assert torch.equal(y, nn.functional.linear(x, weight))


@both_ways
def test_nf4_refuses_what_does_not_fit():
    packed, absmax = Layer("nf4").tensors
    x = random(2, 320)
    with pytest.raises(ValueError, match=r"packed is uint8 \[15360, 1\]; uint8 \[15200, 1\] is needed"):
        nf4_linear(x, packed, absmax, out_features=95, in_features=320)
    with pytest.raises(ValueError, match=r"absmax is float32 \[480\]; float \[960\] is needed"):
        nf4_linear(x, packed, absmax, out_features=96, in_features=320, block=32)
    with pytest.raises(ValueError, match=r"absmax is uint8"):
        nf4_linear(x, packed, absmax.to(torch.uint8), out_features=96, in_features=320)
    with pytest.raises(ValueError, match="block is 0"):
        nf4_linear(x, packed, absmax, out_features=96, in_features=320, block=0)


# GPU and compiler -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", FEW_KINDS)
def test_cuda_agrees_with_the_cpu(kind):
    on_cpu, on_gpu = Layer(kind), Layer(kind)
    on_gpu.tensors = tuple(t.cuda() for t in on_gpu.tensors)
    on_gpu.bias = on_gpu.bias.cuda()
    for tokens in (1, 16, 17, 40):  # the int8 product pads up to 16 rows
        for dtype in TOLERANCE:
            x = random(tokens, 320, dtype=dtype)
            with ops.float_activations():
                assert_close(on_gpu(x.cuda()).cpu(), on_cpu(x), dtype)


@pytest.mark.parametrize("kind", FEW_KINDS)
@both_ways
def test_ops_stay_whole_in_a_compiled_graph(kind):
    layer = Layer(kind)
    x = random(4, 320).requires_grad_()
    compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, layer(x) * 2)
    assert_close(x.grad, 2 * layer.weight.sum(dim=0).expand(4, -1), torch.float32)
