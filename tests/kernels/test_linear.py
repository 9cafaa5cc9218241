"""The CPU kernels of the linear layers, for each instruction set, against int64 and float64 arithmetic."""

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qlm.errors import DataError, UsageError
from qlm.kernels import cpu
from qlm.kernels.ops import NF4_LEVELS
from qlm.numerics import packing

# float32 sums of so many products; the error grows with their number.
FLOAT_TOLERANCE = 3e-6
# int8 activations, one scale for up to 128 of them: a code is off by at most half a step of max|x| / 127. In the worst
# case all errors add up; they are random, so that the sum of K of them grows with sqrt(K). 5 standard deviations.
INT8_STEP_DEVIATION = 1 / 127 / 12**0.5 * 5
# The NF4 levels as int8 codes: at most 0.0037 of absmax away.
NF4_LEVEL_ERROR = 0.0037
DTYPES = {"float32": cpu.F32, "float16": cpu.F16, "bfloat16": cpu.BF16}

Forward = Callable[..., NDArray[np.float32]]


def address(array: NDArray | torch.Tensor | None) -> int | None:
    if array is None:
        return None
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data


@pytest.fixture(scope="module", params=cpu.library().supported)
def native(request: pytest.FixtureRequest) -> Iterator[cpu.Native]:
    library = cpu.library()
    before = library.isa
    library.select_isa(request.param)
    yield library
    library.select_isa(before)


@pytest.fixture(scope="module")
def team() -> Iterator[cpu.Team]:
    with cpu.Team(2) as two:
        yield two


def forward(team: cpu.Team, linear: cpu.Linear, x: NDArray[np.float32]) -> NDArray[np.float32]:
    y = np.full((x.shape[0], linear.out_features), np.nan, np.float32)
    x = np.ascontiguousarray(x, np.float32)
    cpu.library().qlm_linear_forward(
        team.handle, ctypes.byref(linear), x.shape[0], address(x), x.shape[1], address(y), y.shape[1]
    )
    return y


def int8_linear(weight: NDArray[np.int8], scale: NDArray, row_sum: NDArray[np.int32], **more: object) -> cpu.Linear:
    return cpu.Linear(
        in_features=weight.shape[1], out_features=weight.shape[0], format=cpu.INT8, weight=address(weight),
        scale=address(scale), row_sum=address(row_sum), **more,
    )  # fmt: skip


# int8 -----------------------------------------------------------------------------------------------------------------


def whole_numbers(rng: np.random.Generator, tokens: int, width: int, *, ends_only: bool = False) -> NDArray[np.float32]:
    """Activations whose int8 codes are the activations themselves, shifted: 256 whole numbers, both ends present."""
    low = rng.integers(-255, 1, (tokens, 1))
    x = low + (255 * rng.integers(0, 2, (tokens, width)) if ends_only else rng.integers(0, 256, (tokens, width)))
    ends = rng.permuted(np.broadcast_to(np.arange(width), (tokens, width)), axis=1)[:, :2]
    np.put_along_axis(x, ends[:, :1], low, axis=1)
    np.put_along_axis(x, ends[:, 1:], low + 255, axis=1)
    return x.astype(np.float32)


def assert_exact(team: cpu.Team, weight: NDArray[np.int8], x: NDArray[np.float32]) -> None:
    row_sum = weight.sum(1, dtype=np.int64).astype(np.int32)
    scale = np.ones(len(weight), np.float32)
    y = forward(team, int8_linear(weight, scale, row_sum), x)
    exact = x.astype(np.int64) @ weight.astype(np.int64).T
    np.testing.assert_array_equal(y, exact.astype(np.float32))


def test_int8_is_exact_on_ten_thousand_random_cases(native: cpu.Native, team: cpu.Team) -> None:
    rng = np.random.default_rng(0)
    for case in range(10_000):
        width = int(rng.integers(2, 300))
        rows = int(rng.integers(1, 20)) if case % 10 else int(rng.integers(60, 140))
        tokens = int(rng.integers(1, 9)) if case % 20 else int(rng.integers(9, 40))
        # An odd start: rows of a file lie anywhere.
        start = int(rng.integers(0, 64))
        store = rng.integers(-127, 128, start + rows * width, dtype=np.int8)
        if case % 4 == 0:
            store = rng.choice(np.array([-127, 127], np.int8), store.size)
        x = whole_numbers(rng, tokens, width, ends_only=case % 8 == 0)
        assert_exact(team, store[start:].reshape(rows, width), x)


@pytest.mark.parametrize("width", [*range(1, 66), 127, 128, 129, 191, 257])
def test_int8_tails(native: cpu.Native, team: cpu.Team, width: int) -> None:
    rng = np.random.default_rng(width)
    weight = rng.integers(-127, 128, (7, width), dtype=np.int8)
    if width == 1:
        # One number is a range that includes 0.
        assert_exact(team, weight, np.array([[255.0], [-255.0], [0.0]], np.float32))
    else:
        assert_exact(team, weight, whole_numbers(rng, 5, width))


@pytest.mark.parametrize("width", [65_793, 66_309, 66_310])
@pytest.mark.parametrize("extreme", [-127, 127, -128])
def test_int8_sums_that_fill_int32(native: cpu.Native, team: cpu.Team, width: int, extreme: int) -> None:
    weight = np.full((3, width), extreme, np.int8)
    weight[1, ::2] *= -1 if extreme != -128 else 0
    for low in (-255.0, 0.0):
        x = np.full((2, width), low + 255 if low == 0 else low, np.float32)
        x[:, 0] = 0.0
        x[1, 1::3] = 0.0
        assert_exact(team, weight, x)


def test_int8_refuses_what_int32_cannot_hold(native: cpu.Native, team: cpu.Team) -> None:
    weight = np.zeros((1, 66_311), np.int8)
    linear = int8_linear(weight, np.ones(1, np.float32), np.zeros(1, np.int32))
    with pytest.raises(UsageError, match="66311 in features; int32 sums hold at most 66310"):
        forward(team, linear, np.zeros((1, 66_311), np.float32))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_equals_the_torch_reference_to_the_last_bit(
    native: cpu.Native, team: cpu.Team, symmetric: bool, dtype: str
) -> None:
    from qlm.kernels.ops import int8_linear_reference

    torch.manual_seed(0)
    for tokens, width, rows in ((1, 96, 40), (3, 200, 17), (7, 130, 64), (30, 64, 129)):
        x = torch.randn(tokens, width) * 3
        x[0, :] = 0.0
        weight = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
        scale = (torch.rand(rows, 1) * 0.01).to(getattr(torch, dtype))
        row_sum = weight.sum(1, dtype=torch.int32)
        bias = torch.randn(rows)
        linear = int8_linear(
            weight.numpy(), scale.view(torch.int16).numpy() if dtype != "float32" else scale.numpy(), row_sum.numpy(),
            scale_dtype=DTYPES[dtype], bias=address(bias), symmetric_input=int(symmetric),
        )  # fmt: skip
        expected = int8_linear_reference(x, weight, scale, row_sum, bias, symmetric)
        np.testing.assert_array_equal(forward(team, linear, x.numpy()), expected.numpy())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_gives_nan_for_a_token_that_is_not_finite(native: cpu.Native, team: cpu.Team, bad: float) -> None:
    weight = np.ones((5, 40), np.int8)
    linear = int8_linear(weight, np.ones(5, np.float32), np.full(5, 40, np.int32))
    x = np.ones((3, 40), np.float32)
    x[1, 39] = bad
    y = forward(team, linear, x)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_int8_row_sums_and_quantized_rows(native: cpu.Native, team: cpu.Team) -> None:
    torch.manual_seed(1)
    for rows, width in ((1, 1), (3, 63), (70, 200), (5, 1000)):
        weight = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
        sums = np.zeros(rows, np.int32)
        native.qlm_int8_row_sums(team.handle, address(weight), rows, width, address(sums))
        np.testing.assert_array_equal(sums, weight.sum(1).numpy())
        for dtype, code in DTYPES.items():
            floats = torch.randn(rows, width).to(getattr(torch, dtype))
            floats[0] = 0.0
            codes, scale = np.zeros((rows, width), np.int8), np.zeros(rows, np.float32)
            native.qlm_int8_quantize_rows(
                team.handle, address(floats), code, rows, width, address(codes), address(scale), address(sums)
            )
            np.testing.assert_array_equal(scale, floats.float().abs().amax(1).numpy() / np.float32(127))
            np.testing.assert_array_equal(sums, codes.sum(1))
            error = np.abs(codes * scale[:, None] - floats.float().numpy())
            assert (error <= scale[:, None] * 0.50001).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 5, 37, 63, 64, 70])
def test_int8_refuses_to_quantize_rows_that_are_not_finite(
    native: cpu.Native, team: cpu.Team, dtype: str, bad: float, place: int
) -> None:
    floats = torch.ones(3, 71).to(getattr(torch, dtype))
    floats[1, place] = bad
    codes, scale, sums = np.zeros((3, 71), np.int8), np.zeros(3, np.float32), np.zeros(3, np.int32)
    with pytest.raises(DataError, match="row 1 has values that are not finite"):
        native.qlm_int8_quantize_rows(
            team.handle, address(floats), DTYPES[dtype], 3, 71, address(codes), address(scale), address(sums)
        )


# float ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_agrees_with_float64(native: cpu.Native, team: cpu.Team, dtype: str) -> None:
    torch.manual_seed(2)
    for tokens, width, rows in ((1, 1, 1), (1, 65, 5), (2, 15, 16), (5, 128, 33), (13, 100, 70), (40, 257, 9)):
        x, bias = torch.randn(tokens, width), torch.randn(rows)
        weight = torch.randn(rows, width).to(getattr(torch, dtype))
        linear = cpu.Linear(
            in_features=width, out_features=rows, format=cpu.FLOAT, weight=address(weight), weight_dtype=DTYPES[dtype],
            bias=address(bias),
        )  # fmt: skip
        y = forward(team, linear, x.numpy())
        exact = x.double() @ weight.double().t() + bias.double()
        size = (x.double().abs() @ weight.double().abs().t() + bias.double().abs()).numpy()
        assert (np.abs(y - exact.numpy()) <= FLOAT_TOLERANCE * size).all()


# GPTQ -----------------------------------------------------------------------------------------------------------------


def gptq_case(bits: int, groups: int, group_size: int, rows: int, seed: int) -> tuple[torch.Tensor, dict[str, NDArray]]:
    """A random layer: its weight as float64 [O, I], and its arrays."""
    torch.manual_seed(seed)
    width = groups * group_size
    codes = torch.randint(0, 2**bits, (width, rows), dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (groups, rows), dtype=torch.uint8)
    scale = (torch.rand(groups, rows) * 0.02 + 0.001).half()
    weight = (codes.double().view(groups, group_size, rows) - zero.double().unsqueeze(1)) * scale.double().unsqueeze(1)
    arrays = {
        "weight": packing.pack_rows(codes, bits).contiguous().numpy(),
        "zero_point": zero.contiguous().numpy(),
        "scale": scale.view(torch.int16).numpy(),
    }
    return weight.view(width, rows).t(), arrays


def gptq_linear(
    arrays: dict[str, NDArray], bits: int, group_size: int, shape: tuple[int, int], **more: object
) -> cpu.Linear:
    return cpu.Linear(
        in_features=shape[1], out_features=shape[0], format=cpu.GPTQ, bits=bits, group_size=group_size,
        scale_dtype=cpu.F16, **{name: address(array) for name, array in arrays.items()}, **more,
    )  # fmt: skip


def int8_bound(x: NDArray[np.float32], weight: torch.Tensor, part: int) -> NDArray[np.float64]:
    """What rounding the activations may change: the step of each part, times the norm of the weights that it meets."""
    tokens, width = x.shape
    step = np.abs(x.reshape(tokens, -1, part)).max(2)
    norm = weight.view(weight.shape[0], width // part, part).square().sum(2).sqrt().numpy()
    return np.sqrt(np.square(step) @ np.square(norm).T) * INT8_STEP_DEVIATION


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256])
def test_gptq_agrees_with_float64(native: cpu.Native, team: cpu.Team, bits: int, group_size: int) -> None:
    for rows, tokens in ((8, 1), (32, 1), (160, 1), (24, 2), (328, 7), (96, 70)):
        weight, arrays = gptq_case(bits, 3, group_size, rows, seed=rows)
        x = np.random.default_rng(rows).standard_normal((tokens, weight.shape[1])).astype(np.float32)
        bias = np.random.default_rng(1).standard_normal(rows).astype(np.float32)
        y = forward(team, gptq_linear(arrays, bits, group_size, (rows, weight.shape[1]), bias=address(bias)), x)
        exact = x.astype(np.float64) @ weight.numpy().T + bias
        part = 128 if group_size == 256 else group_size
        assert (np.abs(y - exact) <= int8_bound(x, weight, part) + 1e-6).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_exact_when_the_activations_are_int8(native: cpu.Native, team: cpu.Team, bits: int) -> None:
    """Then only the float32 sums over groups are left, here of whole numbers: no error at all."""
    weight, arrays = gptq_case(bits, 2, 64, 48, seed=3)
    weight = weight / torch.tensor(arrays["scale"]).view(torch.float16).double().repeat_interleave(64, 0).t()
    arrays["scale"] = torch.ones(2, 48).half().view(torch.int16).numpy()
    rng = np.random.default_rng(0)
    for tokens in (1, 2, 5, 60):
        x = rng.integers(-127, 128, (tokens, 128)).astype(np.float32)
        x[:, 0] = x[:, 64] = 127
        y = forward(team, gptq_linear(arrays, bits, 64, (48, 128)), x)
        np.testing.assert_array_equal(y, x @ weight.numpy().T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_in_act_order(native: cpu.Native, team: cpu.Team, bits: int) -> None:
    _, arrays = gptq_case(bits, 4, 32, 40, seed=4)
    order = np.random.default_rng(0).permutation(128).astype(np.int32)
    # The file has the in features in the model's order, with groups scattered over them.
    scattered = torch.zeros(128, 40, dtype=torch.uint8)
    scattered[torch.from_numpy(order.astype(np.int64))] = packing.unpack_rows(torch.from_numpy(arrays["weight"]), bits)
    file = packing.pack_rows(scattered, bits).contiguous().numpy()
    sorted_words = np.empty_like(file)
    native.qlm_gptq_arrange(team.handle, address(file), bits, 128, 40, address(order), 0, address(sorted_words))
    np.testing.assert_array_equal(sorted_words, arrays["weight"])
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    linear = gptq_linear({**arrays, "weight": sorted_words, "order": order}, bits, 32, (40, 128))
    in_order = gptq_linear({**arrays, "weight": sorted_words}, bits, 32, (40, 128))
    np.testing.assert_array_equal(forward(team, linear, x), forward(team, in_order, x[:, order]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [96, 128, 200, 416])
@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "act order"])
def test_gptq_in_strips_gives_the_same_bits(
    native: cpu.Native, team: cpu.Team, bits: int, rows: int, ordered: bool
) -> None:
    _, arrays = gptq_case(bits, 3, 64, rows, seed=8)
    order = np.random.default_rng(2).permutation(192).astype(np.int32) if ordered else None
    plain, strips = np.empty_like(arrays["weight"]), np.empty_like(arrays["weight"])
    for strip, out in ((0, plain), (128, strips)):
        native.qlm_gptq_arrange(
            team.handle, address(arrays["weight"]), bits, 192, rows, address(order), strip, address(out)
        )
    if not ordered:
        np.testing.assert_array_equal(plain, arrays["weight"])
    for tokens in (1, 2, 9, 60):
        x = np.random.default_rng(tokens).standard_normal((tokens, 192)).astype(np.float32)
        more = {**arrays, **({} if order is None else {"order": order})}
        expected = forward(team, gptq_linear({**more, "weight": plain}, bits, 64, (rows, 192)), x)
        found = forward(team, gptq_linear({**more, "weight": strips}, bits, 64, (rows, 192), strip=128), x)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "5 bits; 2, 3, 4 and 8 are known"),
        ({"group_size": 12}, "groups of 12 of 128 in features"),
        ({"group_size": 96}, "groups of 96 of 128 in features"),
        ({"zero_point": None}, "scales or zero points are missing"),
        ({"scale": None}, "scales or zero points are missing"),
        ({"weight": None}, "weight is missing"),
        ({"in_features": 0}, "0 in, 8 out features"),
        ({"format": 9}, "format 9 is not known"),
    ],
)
def test_gptq_refuses_what_does_not_fit(team: cpu.Team, changes: dict[str, object], message: str) -> None:
    _, arrays = gptq_case(4, 4, 32, 8, seed=0)
    linear = gptq_linear(arrays, 4, 32, (8, 128))
    for name, value in changes.items():
        setattr(linear, name, value)
    with pytest.raises(UsageError, match=message):
        forward(team, linear, np.zeros((1, max(1, linear.in_features)), np.float32))


# NF4 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block", [64, 128, 256])
def test_nf4_agrees_with_float64(native: cpu.Native, team: cpu.Team, nested: bool, block: int) -> None:
    rng = np.random.default_rng(block)
    for rows, width, tokens in ((1, 256, 1), (5, 256, 1), (67, 512, 1), (16, 768, 2), (70, 1024, 9), (9, 256, 40)):
        codes = rng.integers(0, 16, (rows, width), dtype=np.uint8)
        packed = codes[:, ::2] << 4 | codes[:, 1::2]
        blocks = rows * width // block
        linear = cpu.Linear(
            in_features=width, out_features=rows, format=cpu.NF4, weight=address(packed), block=block,
        )  # fmt: skip
        if nested:
            code = rng.integers(0, 256, blocks, dtype=np.uint8)
            table = np.sort(rng.standard_normal(256)).astype(np.float32)
            outer = rng.random(-(-blocks // 8)).astype(np.float32) + 0.1
            linear.absmax_code, linear.nested_code = address(code), address(table)
            linear.nested_absmax, linear.nested_block, linear.nested_offset = address(outer), 8, 2.5
            absmax = table[code] * outer.repeat(8)[:blocks] + np.float32(2.5)
        else:
            absmax = rng.random(blocks).astype(np.float32) + 0.1
            linear.scale = address(absmax)
        levels = np.array(NF4_LEVELS)[codes]
        weight = levels * absmax.astype(np.float64).repeat(block).reshape(rows, width)
        x = rng.standard_normal((tokens, width)).astype(np.float32)
        y = forward(team, linear, x)
        # Roundings of the levels are errors of the weight, and as random as those of the activations.
        by_level = np.abs(absmax).repeat(block).reshape(rows, width) * NF4_LEVEL_ERROR
        bound = int8_bound(x, torch.from_numpy(weight), 64) + 5 * np.sqrt(np.square(x) @ np.square(by_level).T)
        assert (np.abs(y - x @ weight.T) <= bound).all()


def test_nf4_refuses_blocks_that_cross_rows(team: cpu.Team) -> None:
    packed, absmax = np.zeros((8, 48), np.uint8), np.ones(12, np.float32)
    linear = cpu.Linear(
        in_features=96, out_features=8, format=cpu.NF4, weight=address(packed), block=64, scale=address(absmax)
    )
    with pytest.raises(UsageError, match="blocks of 64 in rows of 96"):
        forward(team, linear, np.zeros((1, 96), np.float32))


# All ------------------------------------------------------------------------------------------------------------------


def layers() -> dict[str, cpu.Linear]:
    """One layer of each format, 256 to 200; the arrays stay alive with the structures."""
    rng = np.random.default_rng(5)
    weight = rng.integers(-127, 128, (200, 256), dtype=np.int8)
    scale, row_sum = np.full(200, 0.01, np.float32), weight.sum(1, dtype=np.int32)
    half = rng.standard_normal((200, 256)).astype(np.float16)
    _, gptq = gptq_case(4, 2, 128, 200, seed=6)
    packed, absmax = rng.integers(0, 256, (200, 128), dtype=np.uint8), np.full(800, 0.1, np.float32)
    shape = dict(in_features=256, out_features=200)
    made = {
        "int8": int8_linear(weight, scale, row_sum),
        "float": cpu.Linear(**shape, format=cpu.FLOAT, weight=address(half), weight_dtype=cpu.F16),
        "gptq": gptq_linear(gptq, 4, 128, (200, 256)),
        "nf4": cpu.Linear(**shape, format=cpu.NF4, weight=address(packed), block=64, scale=address(absmax)),
    }
    for linear in made.values():
        linear.arrays = (weight, scale, row_sum, half, gptq, packed, absmax)
    return made


@pytest.mark.parametrize("format", ["int8", "float", "gptq", "nf4"])
def test_the_same_bits_for_every_team_and_batch(native: cpu.Native, format: str) -> None:
    linear = layers()[format]
    x = np.random.default_rng(7).standard_normal((50, 256)).astype(np.float32)
    with cpu.Team(1) as one:
        expected = forward(one, linear, x)
        for tokens in (1, 2, 3, 6, 8, 12, 13, 49):
            np.testing.assert_array_equal(forward(one, linear, x[:tokens]), expected[:tokens])
    for threads in (2, 4):
        with cpu.Team(threads) as several:
            np.testing.assert_array_equal(forward(several, linear, x), expected)
            np.testing.assert_array_equal(forward(several, linear, x[:1]), expected[:1])
