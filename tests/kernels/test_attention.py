"""Attention and the cache's pages, against float64 on what the pages hold, for every dtype of the cache."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.probe import BF16, F16, F32, I8, Cache, FloatArray, Probe, guarded

DTYPES = {"float32": F32, "float16": F16, "bfloat16": BF16, "int8": I8}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
HEAD_DIMS = (64, 80, 96, 128)
ROWS = 16

# Against float64 attention over the very numbers in the pages, of the largest |value|: float32's rounding of the scores,
# times their size (below 20 here), of exp, of the sums. The cache's dtype does not matter to it.
FLOAT32_SUMS = 1e-6
# Against float64 attention over the keys and values that were stored: the values' own rounding, and the keys' moving the
# scores (of standard deviation 1 here) by as much, relative to the largest |value|.
STORED = {F32: 1e-6, F16: 2**-10, BF16: 2**-7, I8: 2**-6}

quick = settings(max_examples=40, deadline=None)


def normal(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def filled(
    probe: Probe, dtype: int, positions: int, head_dim: int, kv_heads: int = 1, seed: int = 0, guard: bool = False
) -> tuple[Cache, FloatArray, FloatArray]:
    """A cache of normal keys and values [kv_heads, positions, D], and those."""
    keys, values = normal(2, kv_heads, positions, head_dim, seed=seed)
    cache = Cache(dtype, kv_heads, head_dim, positions, guard)
    for head in range(kv_heads):
        for position in range(positions):
            assert probe.cache_store(cache, head, position, keys[head, position], values[head, position])
    return cache, keys, values


def exact(
    q: list[FloatArray],
    keys: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    visible: list[int],
    scale: float,
) -> npt.NDArray[np.float64]:
    """Each row [D] by torch in float64 over its own visible positions."""
    k, v = torch.from_numpy(keys), torch.from_numpy(values)
    rows = [
        torch.nn.functional.scaled_dot_product_attention(
            torch.from_numpy(row.astype(np.float64))[None], k[:n], v[:n], scale=scale
        )[0]
        for row, n in zip(q, visible, strict=True)
    ]
    return torch.stack(rows).numpy()


def assert_attends(
    probe: Probe,
    cache: Cache,
    kv_head: int,
    q: list[FloatArray],
    visible: list[int],
    stored: tuple[FloatArray, FloatArray] | None = None,
) -> list[FloatArray]:
    scale = float(np.float32(cache.head_dim**-0.5))
    out = probe.attention(cache, kv_head, q, visible, scale)
    keys, values = cache.decoded(kv_head, max(visible))
    size = np.abs(values).max()
    assert np.abs(np.stack(out) - exact(q, keys, values, visible, scale)).max() <= FLOAT32_SUMS * size
    if stored is not None:
        keys, values = stored[0].astype(np.float64), stored[1].astype(np.float64)
        assert np.abs(np.stack(out) - exact(q, keys, values, visible, scale)).max() <= STORED[cache.dtype] * size
    return out


class TestAttention:
    @dtypes
    @given(data=st.data())
    @quick
    def test_any_shape(self, probe: Probe, dtype: int, data: st.DataObject) -> None:
        head_dim = data.draw(st.one_of(st.sampled_from(HEAD_DIMS), st.integers(1, 130)), "head_dim")
        near_pages = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 257])
        visible = data.draw(st.lists(st.one_of(near_pages, st.integers(1, 300)), min_size=1, max_size=ROWS), "visible")
        kv_heads = data.draw(st.integers(1, 3), "kv_heads")
        kv_head = data.draw(st.integers(0, kv_heads - 1), "kv_head")
        cache, keys, values = filled(probe, dtype, max(visible), head_dim, kv_heads, seed=head_dim)
        q = list(normal(len(visible), head_dim, seed=7))
        assert_attends(probe, cache, kv_head, q, visible, (keys[kv_head], values[kv_head]))

    @dtypes
    def test_every_head_dim(self, probe: Probe, dtype: int) -> None:
        for head_dim in range(1, 131):
            cache, keys, values = filled(probe, dtype, 70, head_dim)
            q = list(normal(3, head_dim, seed=1))
            assert_attends(probe, cache, 0, q, [70, 5, 64], (keys[0], values[0]))

    @dtypes
    def test_every_count_of_rows_in_prefill(self, probe: Probe, dtype: int) -> None:
        cache, keys, values = filled(probe, dtype, 144, 80)
        for rows in range(1, ROWS + 1):
            for first in (1, 60, 128):
                q = list(normal(rows, 80, seed=rows))
                assert_attends(probe, cache, 0, q, list(range(first, first + rows)), (keys[0], values[0]))

    @dtypes
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_multi_query_decode(self, probe: Probe, dtype: int, head_dim: int) -> None:
        cache, keys, values = filled(probe, dtype, 600, head_dim)
        assert_attends(probe, cache, 0, list(normal(ROWS, head_dim, seed=3)), [600] * ROWS, (keys[0], values[0]))

    def test_one_position_gives_its_value(self, probe: Probe) -> None:
        cache, _, values = filled(probe, F32, 1, 40)
        (out,) = probe.attention(cache, 0, [normal(40, seed=1)], [1], 0.1)
        np.testing.assert_array_equal(out, values[0, 0])

    def test_scale_is_applied(self, probe: Probe) -> None:
        cache, keys, values = filled(probe, F32, 100, 16)
        q = [normal(16, seed=1)]
        for scale in (1.0, 0.03, -0.5, 0.0):
            out = probe.attention(cache, 0, q, [100], scale)
            wide = exact(q, keys[0].astype(np.float64), values[0].astype(np.float64), [100], scale)
            np.testing.assert_allclose(np.stack(out), wide, atol=2e-5)

    @dtypes
    def test_huge_scores_do_not_overflow(self, probe: Probe, dtype: int) -> None:
        cache, _, _ = filled(probe, dtype, 200, 64)
        q = normal(64, seed=5) * np.float32(1e4)
        (out,) = probe.attention(cache, 0, [q], [200], 1.0)
        keys, values = cache.decoded(0, 200)
        best = int((keys @ q.astype(np.float64)).argmax())
        np.testing.assert_allclose(out, values[best], rtol=1e-6, atol=1e-7)

    @dtypes
    def test_nan_and_infinite_queries_give_nan_in_their_row_alone(self, probe: Probe, dtype: int) -> None:
        cache, _, _ = filled(probe, dtype, 130, 48)
        rows, visible = list(normal(ROWS, 48, seed=2)), [130 - r for r in range(ROWS)]
        clean = probe.attention(cache, 0, rows, visible, 0.2)
        for r, bad in ((0, np.nan), (5, np.inf), (6, -np.inf), (15, np.nan)):
            spoilt = [row.copy() for row in rows]
            spoilt[r][:] = bad
            out = probe.attention(cache, 0, spoilt, visible, 0.2)
            assert np.isnan(out[r]).all()
            for other in range(ROWS):
                if other != r:
                    np.testing.assert_array_equal(out[other], clean[other])


class TestIndependence:
    """The bits of a row depend on its query and on what it may look at, and on nothing else."""

    @dtypes
    @pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 67])
    def test_rows_beside_it(self, probe: Probe, dtype: int, head_dim: int) -> None:
        cache, _, _ = filled(probe, dtype, 260, head_dim)
        rows = list(normal(ROWS, head_dim, seed=4))
        visible = [260, 1, 64, 65, 200, 63, 128, 129, 7, 250, 192, 193, 255, 2, 100, 31]
        alone = [probe.attention(cache, 0, [q], [n], 0.11)[0] for q, n in zip(rows, visible, strict=True)]
        for count in range(1, ROWS + 1):
            for first in range(0, ROWS - count + 1, 3):
                part = slice(first, first + count)
                together = probe.attention(cache, 0, rows[part], visible[part], 0.11)
                np.testing.assert_array_equal(together, alone[part])

    @dtypes
    def test_what_lies_past_the_visible_positions(self, probe: Probe, dtype: int) -> None:
        for visible in (1, 40, 64, 65, 100, 128):
            cache, keys, values = filled(probe, dtype, visible, 72)
            rows = list(normal(5, 72, seed=4))
            before = probe.attention(cache, 0, rows, [visible] * 5, 0.11)
            longer = Cache(dtype, 1, 72, 192)
            for position in range(192):
                large = normal(2, 72, seed=position) * np.float32(1e4)
                k, v = (keys[0, position], values[0, position]) if position < visible else large
                assert probe.cache_store(longer, 0, position, k, v)
            np.testing.assert_array_equal(probe.attention(longer, 0, rows, [visible] * 5, 0.11), before)
            # and beside a row that may look there
            both = probe.attention(longer, 0, [*rows, rows[0]], [*[visible] * 5, 192], 0.11)
            np.testing.assert_array_equal(both[:5], before)

    @dtypes
    def test_other_heads(self, probe: Probe, dtype: int) -> None:
        cache, keys, values = filled(probe, dtype, 100, 24, kv_heads=3)
        rows = list(normal(4, 24, seed=4))
        for head in range(3):
            single = Cache(dtype, 1, 24, 100)
            for position in range(100):
                probe.cache_store(single, 0, position, keys[head, position], values[head, position])
            np.testing.assert_array_equal(
                probe.attention(cache, head, rows, [100, 50, 64, 1], 0.2),
                probe.attention(single, 0, rows, [100, 50, 64, 1], 0.2),
            )


class TestBounds:
    """Operands end where memory ends."""

    @dtypes
    @given(
        head_dim=st.one_of(st.sampled_from(HEAD_DIMS), st.integers(1, 130)),
        visible=st.lists(st.integers(1, 200), min_size=1, max_size=ROWS),
        at_end=st.booleans(),
    )
    @example(head_dim=1, visible=[64], at_end=True)
    @quick
    def test_attention(self, probe: Probe, dtype: int, head_dim: int, visible: list[int], at_end: bool) -> None:
        cache, _, _ = filled(probe, dtype, max(visible), head_dim, guard=True)
        q = [guarded(row, at_end) for row in normal(len(visible), head_dim, seed=1)]
        out = [guarded(np.full(head_dim, np.nan, np.float32), at_end) for _ in visible]
        # 64 divides both the size and the page's, so the scratch is aligned either way.
        size = probe.scratch_bytes(max(visible))
        assert size % 64 == 0
        scratch = guarded(np.full(size, 255, np.uint8), at_end)
        probe.attention(cache, 0, q, visible, 0.3, out, scratch)
        np.testing.assert_array_equal(out, probe.attention(cache, 0, [row.copy() for row in q], visible, 0.3))

    @dtypes
    @pytest.mark.parametrize("at_end", [True, False], ids=["guard-after", "guard-before"])
    def test_store(self, probe: Probe, dtype: int, at_end: bool) -> None:
        for head_dim in range(1, 131):
            cache = Cache(dtype, 2, head_dim, 64, guard=True)
            k, v = (guarded(x, at_end) for x in normal(2, head_dim))
            for position in (0, 63):
                assert probe.cache_store(cache, 1, position, k, v)
            assert not cache.parts(0, 0)[0].any()
            assert not cache.parts(0, 0)[1].any()


def rounded(dtype: int, x: FloatArray) -> npt.NDArray[np.float64]:
    kind = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[dtype]
    return torch.from_numpy(x).to(kind).to(torch.float64).numpy()


class TestStore:
    @pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
    def test_rounds_as_torch_does(self, probe: Probe, dtype: int) -> None:
        # Ties, subnormal numbers, both zeros.
        x = np.concatenate([normal(1000), np.float32(2.0) ** np.arange(-149, 16), [0.0, -0.0, 65504, -65519.996]])
        bits = np.arange(0x38000000, 0x47700000, 0x1357, dtype=np.uint32)
        halfway = np.arange(0x33000000, 0x47000000, 0x11000, dtype=np.uint32)
        x = np.concatenate([x.astype(np.float32), bits.view(np.float32), -halfway.view(np.float32)])
        head_dim = 128
        x = x[: x.size // (2 * head_dim) * 2 * head_dim].reshape(-1, 2, head_dim)[:128]
        cache = Cache(dtype, 1, head_dim, len(x))
        for position, (k, v) in enumerate(x):
            assert probe.cache_store(cache, 0, position, k, v)
        keys, values = cache.decoded(0, len(x))
        np.testing.assert_array_equal(keys, rounded(dtype, np.ascontiguousarray(x[:, 0])))
        np.testing.assert_array_equal(values, rounded(dtype, np.ascontiguousarray(x[:, 1])))

    def test_int8_has_a_scale_for_each_position(self, probe: Probe) -> None:
        sizes = np.float32(10.0) ** np.arange(-6, 7, dtype=np.float32)
        cache = Cache(I8, 2, 96, len(sizes))
        k, v = normal(2, len(sizes), 96) * sizes[:, None]
        for position in range(len(sizes)):
            assert probe.cache_store(cache, 1, position, k[position], v[position])
        keys, values = cache.decoded(1, len(sizes))
        _, _, scales = cache.parts(0, 1)
        for stored, x, scale in ((keys, k, scales[0]), (values, v, scales[1])):
            absmax = np.abs(x).max(1)
            np.testing.assert_array_equal(scale[: len(sizes)], absmax / np.float32(127))
            assert (np.abs(stored - x) <= 0.5001 * scale[: len(sizes), None]).all()
        codes = cache.parts(0, 1)[0][:, : len(sizes)]
        np.testing.assert_array_equal(np.abs(codes.astype(int)).max(0), 127)

    def test_int8_of_zeros_and_of_the_smallest_numbers(self, probe: Probe) -> None:
        cache = Cache(I8, 1, 20, 3)
        rows = [np.zeros(20, np.float32), np.full(20, 1e-45, np.float32), np.full(20, 2e-43, np.float32)]
        for position, row in enumerate(rows):
            assert probe.cache_store(cache, 0, position, row, row)
            assert np.abs(cache.decoded(0, 3)[0][position] - row).max() <= 2e-43
            assert np.isfinite(cache.decoded(0, 3)[1]).all()
        (out,) = probe.attention(cache, 0, [normal(20)], [3], 1.0)
        assert np.isfinite(out).all()

    @dtypes
    def test_not_finite_is_refused_and_nothing_stored(self, probe: Probe, dtype: int) -> None:
        cache, _, _ = filled(probe, dtype, 3, 37)
        before = [page.copy() for page in cache.pages]
        good = normal(37, seed=9)
        for place in (0, 15, 16, 36):
            for bad in (np.nan, np.inf, -np.inf):
                spoilt = good.copy()
                spoilt[place] = bad
                assert not probe.cache_store(cache, 0, 2, spoilt, good)
                assert not probe.cache_store(cache, 0, 2, good, spoilt)
        for page, kept in zip(cache.pages, before, strict=True):
            np.testing.assert_array_equal(page, kept)

    @pytest.mark.parametrize(
        ("dtype", "largest", "first_refused"),
        [
            (F32, np.finfo(np.float32).max, np.inf),
            (F16, np.nextafter(np.float32(65520), np.float32(0)), 65520.0),
            (BF16, float.fromhex("0x1.fefffep+127"), float.fromhex("0x1.ffp+127")),
            (I8, float.fromhex("0x1.fffefep+127"), np.finfo(np.float32).max),
        ],
        ids=["float32", "float16", "bfloat16", "int8"],
    )
    def test_ends_of_the_range(self, probe: Probe, dtype: int, largest: float, first_refused: float) -> None:
        for sign in (1, -1):
            cache = Cache(dtype, 1, 5, 1)
            x = np.array([0, 0, sign * largest, 0, 1], np.float32)
            zeros = np.zeros(5, np.float32)
            assert probe.cache_store(cache, 0, 0, zeros, x)
            assert np.isfinite(cache.decoded(0, 1)[1]).all()
            (out,) = probe.attention(cache, 0, [zeros], [1], 1.0)
            assert np.isfinite(out).all()
            assert math.isclose(out[2], x[2], rel_tol=2**-8)
            x[2] = sign * first_refused
            assert not probe.cache_store(cache, 0, 0, zeros, x)
            assert not probe.cache_store(cache, 0, 0, x, zeros)
