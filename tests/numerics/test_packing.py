"""The file layouts, against a slow reference that moves one bit at a time and against readers written differently."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm.numerics.packing import (
    CODES_PER_PERIOD,
    decode_zero_points,
    encode_zero_points,
    pack_columns,
    pack_nf4,
    pack_rows,
    unpack_columns,
    unpack_nf4,
    unpack_rows,
)

ALL_BITS = (2, 3, 4, 8)
bits_of_all_widths = pytest.mark.parametrize("bits", ALL_BITS, ids=lambda b: f"{b}-bit")


def random_codes(rows: int, columns: int, bits: int, seed: int = 0, lowest: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def pack_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """One column's words as signed 32-bit integers."""
    stream = [(code >> k) & 1 for code in codes for k in range(bits)]
    assert len(stream) % 32 == 0
    words = []
    for start in range(0, len(stream), 32):
        word = sum(bit << k for k, bit in enumerate(stream[start : start + 32]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def pack_3_bits_word_by_word(v: list[int]) -> list[int]:
    """32 codes by the word-level rule of AutoGPTQ's documentation: fields at 3j, 3j + 1 and 3j + 2, two codes split."""
    words = [0, 0, 0]
    for j in range(10):
        words[0] |= v[j] << (3 * j)
        words[1] |= v[11 + j] << (3 * j + 1)
        words[2] |= v[22 + j] << (3 * j + 2)
    words[0] |= (v[10] & 3) << 30
    words[1] |= (v[10] >> 2) | (v[21] & 1) << 31
    words[2] |= v[21] >> 1
    return [word - 2**32 if word >= 2**31 else word for word in words]


@bits_of_all_widths
def test_rows_are_the_bits_of_the_specification(bits):
    codes = random_codes(CODES_PER_PERIOD[bits] * 3, 5, bits)
    expected = [pack_bit_by_bit(codes[:, o].tolist(), bits) for o in range(5)]
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.t().tolist() == expected


def test_3_bit_words_are_those_of_the_word_level_rule():
    codes = random_codes(32, 200, 3)
    assert pack_rows(codes, 3).t().tolist() == [pack_3_bits_word_by_word(codes[:, o].tolist()) for o in range(200)]


@pytest.mark.parametrize("value", range(8))
def test_each_3_bit_code_alone_in_its_place(value):
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes.fill_diagonal_(value)
    packed = pack_rows(codes, 3)
    assert packed.t().tolist() == [pack_3_bits_word_by_word(codes[:, o].tolist()) for o in range(32)]
    assert torch.equal(unpack_rows(packed, 3), codes)


@given(
    bits=st.sampled_from(ALL_BITS),
    periods=st.integers(0, 5),
    columns=st.integers(1, 37),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
)
@settings(deadline=None)
def test_round_trip_of_rows(bits, periods, columns, seed, dtype):
    codes = random_codes(periods * CODES_PER_PERIOD[bits], columns, bits, seed)
    packed = pack_rows(codes.to(dtype), bits)
    assert packed.shape == (codes.shape[0] * bits // 32, columns)
    assert torch.equal(unpack_rows(packed, bits), codes)


@given(bits=st.sampled_from(ALL_BITS), periods=st.integers(0, 5), rows=st.integers(1, 37), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_round_trip_of_columns(bits, periods, rows, seed):
    zeros = random_codes(rows, periods * CODES_PER_PERIOD[bits], bits, seed)
    packed = pack_columns(zeros, bits)
    assert packed.shape == (rows, zeros.shape[1] * bits // 32)
    assert packed.is_contiguous()
    assert torch.equal(unpack_columns(packed, bits), zeros)


@given(bits=st.sampled_from(ALL_BITS), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_any_words_survive_unpacking_and_packing(bits, seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (6, 7), generator=generator).to(torch.int32)
    assert torch.equal(pack_rows(unpack_rows(words, bits), bits), words)


@bits_of_all_widths
def test_views_are_packed_like_copies(bits):
    period = CODES_PER_PERIOD[bits]
    codes = random_codes(6, 2 * period, bits).t()[::2]
    assert torch.equal(pack_rows(codes, bits), pack_rows(codes.contiguous(), bits))


@bits_of_all_widths
def test_lengths_that_do_not_fill_words_are_refused(bits):
    period = CODES_PER_PERIOD[bits]
    with pytest.raises(
        ValueError, match=f"codes has {period + 1} rows; {bits}-bit packing needs a multiple of {period}"
    ):
        pack_rows(torch.zeros(period + 1, 4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"zeros has {period - 1} columns"):
        pack_columns(torch.zeros(4, period - 1, dtype=torch.uint8), bits)


def test_what_cannot_be_packed_or_unpacked_is_refused():
    with pytest.raises(ValueError, match="bits is 5"):
        pack_rows(torch.zeros(32, 1, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="codes goes from 0 to 16; the format holds 0 to 15"):
        pack_rows(torch.tensor([[16]] + [[0]] * 7), 4)
    with pytest.raises(ValueError, match="codes goes from -1"):
        pack_rows(torch.tensor([[-1]] + [[0]] * 7), 4)
    with pytest.raises(ValueError, match=r"codes is torch\.float32"):
        pack_rows(torch.zeros(8, 1), 4)
    with pytest.raises(ValueError, match="takes a matrix"):
        pack_rows(torch.zeros(8, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="qweight has 4 rows; 3-bit codes fill a multiple of 3 words"):
        unpack_rows(torch.zeros(4, 1, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=r"qzeros is torch\.int64"):
        unpack_columns(torch.zeros(4, 3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="format is 'marlin'"):
        decode_zero_points(torch.zeros(4, 3, dtype=torch.int32), 4, "marlin")


# Zero points ----------------------------------------------------------------------------------------------------------


def stored_fields(qzeros: torch.Tensor, bits: int) -> list[list[int]]:
    """Plain Python: each row as one big integer, cut into fields."""
    rows = []
    for row in qzeros.tolist():
        number = sum((word % 2**32) << (32 * k) for k, word in enumerate(row))
        rows.append([(number >> (bits * j)) % 2**bits for j in range(len(row) * 32 // bits)])
    return rows


def read_with_mask(qzeros: torch.Tensor, bits: int) -> list[list[int]]:
    return [[(field + 1) % 2**bits for field in row] for row in stored_fields(qzeros, bits)]


def read_without_mask(qzeros: torch.Tensor, bits: int) -> list[list[int]]:
    return [[field + 1 for field in row] for row in stored_fields(qzeros, bits)]


def read_by_adding_to_words(qzeros: torch.Tensor, bits: int) -> list[list[int]]:
    """One is added to every field of the packed row at once, as GPTQModel turns version 1 into version 2."""
    fields_per_row = qzeros.shape[1] * 32 // bits
    ones = sum(1 << (bits * j) for j in range(fields_per_row))
    rows = []
    for row in qzeros.tolist():
        number = (sum((word % 2**32) << (32 * k) for k, word in enumerate(row)) + ones) % (1 << (32 * len(row)))
        rows.append([(number >> (bits * j)) % 2**bits for j in range(fields_per_row)])
    return rows


@bits_of_all_widths
def test_every_reader_of_version_1_gets_the_same_zero_points(bits):
    zero_point = random_codes(9, 3 * CODES_PER_PERIOD[bits], bits, lowest=1)
    zero_point[0, :] = 2**bits - 1
    zero_point[1, :] = 1
    qzeros = encode_zero_points(zero_point, bits, "gptq")
    expected = zero_point.tolist()
    assert read_with_mask(qzeros, bits) == expected
    assert read_without_mask(qzeros, bits) == expected
    assert read_by_adding_to_words(qzeros, bits) == expected
    assert decode_zero_points(qzeros, bits, "gptq").tolist() == expected


@bits_of_all_widths
def test_version_2_stores_the_zero_point_itself(bits):
    zero_point = random_codes(9, 3 * CODES_PER_PERIOD[bits], bits)
    zero_point[0, :] = 0
    qzeros = encode_zero_points(zero_point, bits, "gptq_v2")
    assert stored_fields(qzeros, bits) == zero_point.tolist()
    decoded = decode_zero_points(qzeros, bits, "gptq_v2")
    assert decoded.dtype == torch.int32
    assert torch.equal(decoded, zero_point.int())


@pytest.mark.parametrize(
    ("bits", "version_1", "version_2"),
    [(2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)],
    ids=["2-bit", "4-bit", "8-bit"],
)
def test_words_of_symmetric_zero_points(bits, version_1, version_2):
    middle = torch.full((1, CODES_PER_PERIOD[bits]), 2 ** (bits - 1))
    assert encode_zero_points(middle, bits, "gptq").item() % 2**32 == version_1
    assert encode_zero_points(middle, bits, "gptq_v2").item() % 2**32 == version_2


@bits_of_all_widths
def test_version_1_holds_no_zero_point_0(bits):
    zero_point = torch.ones(1, CODES_PER_PERIOD[bits], dtype=torch.uint8)
    zero_point[0, 1] = 0
    with pytest.raises(ValueError, match="zero_point goes from 0 to 1; the format holds 1"):
        encode_zero_points(zero_point, bits, "gptq")
    with pytest.raises(ValueError, match=f"the format holds 0 to {2**bits - 1}"):
        encode_zero_points(zero_point.int() + 2**bits, bits, "gptq_v2")


@bits_of_all_widths
def test_a_full_field_of_version_1_is_masked(bits):
    qzeros = torch.full((1, 3), -1, dtype=torch.int32)
    assert decode_zero_points(qzeros, bits, "gptq").unique().tolist() == [0]


# NF4 ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 15), max_size=70))
@settings(deadline=None)
def test_nf4_bytes(codes):
    padded = codes + [7] * (len(codes) % 2)
    packed = pack_nf4(torch.tensor(codes, dtype=torch.uint8))
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(padded) // 2, 1)
    assert packed.flatten().tolist() == [16 * a + b for a, b in zip(padded[::2], padded[1::2], strict=True)]
    assert unpack_nf4(packed, len(codes)).tolist() == codes
    assert unpack_nf4(packed).tolist() == padded


def test_nf4_bytes_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="codes goes from 0 to 16"):
        pack_nf4(torch.tensor([0, 16]))
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        pack_nf4(torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="packed has 3 bytes; 7 NF4 codes need 4"):
        unpack_nf4(torch.zeros(3, 1, dtype=torch.uint8), 7)
    with pytest.raises(ValueError, match=r"packed is torch\.int32"):
        unpack_nf4(torch.zeros(3, 1, dtype=torch.int32))
