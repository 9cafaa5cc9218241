"""Integer codes packed into the words and bytes of checkpoint files, and back. This docstring is the byte-level
specification.

GPTQ words (`qweight`, `qzeros`; AutoGPTQ and GPTQModel, bits 2, 3, 4 and 8)
    A packed tensor holds little-endian int32 words. Along the packed axis the words are one stream of bits, lowest bit
    first: code `j` is the bits `bits * j` to `bits * j + bits - 1` of the stream, that is

        word   = bits * j // 32
        offset = bits * j % 32
        code   = (stream of words) >> (32 * word + offset)  &  (2**bits - 1)

    With 2, 4 and 8 bits no code crosses a word. With 3 bits 32 codes fill three words: code 10 has its two low bits in
    bits 30-31 of word 0 and its high bit in bit 0 of word 1; code 21 has its low bit in bit 31 of word 1 and its two
    high bits in bits 0-1 of word 2. (AutoGPTQ `nn_modules/qlinear/qlinear_cuda_old.py`, `pack`; the same in GPTQModel.)

    `qweight` [I * bits / 32, O] is packed along the in features I (rows), `qzeros` [G, O * bits / 32] along the out
    features O (columns). The format has no padding, so the length of the packed axis must fill whole words:

        bits                              2    3    4    8
        codes that fill whole words      16   32    8    4
        words that they fill              1    3    1    1

GPTQ zero points, version 1 and 2
    Version 2 (`checkpoint_format: gptq_v2`) stores the zero point. Version 1 (`gptq`) stores the zero point minus one,
    and readers disagree about a stored 2**bits - 1: AutoGPTQ adds one to each field and masks (gives 0), exllama's
    kernels add one and do not mask (gives 2**bits), GPTQModel adds one to each field of the packed word at once
    (carries into the neighbour). All agree on zero points from 1 to 2**bits - 1: nothing else is written as version 1.

NF4 bytes (bitsandbytes `weight`)
    uint8 [ceil(N / 2), 1]: two codes of the flattened row-major weight in a byte, the first in the high nibble. When N
    is odd, the last low nibble is 7, the code of 0.0 (bitsandbytes `backends/default/ops.py`, `quantize_4bit`).
"""

from typing import Literal

import torch

GptqFormat = Literal["gptq", "gptq_v2"]

# bits: how many codes fill whole 32-bit words.
CODES_PER_PERIOD: dict[int, int] = {2: 16, 3: 32, 4: 8, 8: 4}

NF4_CODE_OF_ZERO = 7
_AXES = ("rows", "columns")


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the codes of a weight along the in features, the layout of `qweight`.

    Args:
        codes: integers [I, O] from 0 to 2**bits - 1.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [I * bits / 32, O].

    Raises:
        ValueError: unknown bits, a code out of range, or an I that does not fill whole words.
    """
    _check_codes(codes, bits, "codes", axis=0)
    period = CODES_PER_PERIOD[bits]
    words_per_period = period * bits // 32
    fields = codes.to(torch.int32).unflatten(0, (-1, period))
    words = torch.zeros(fields.shape[0], words_per_period, codes.shape[1], dtype=torch.int32, device=codes.device)
    for j in range(period):
        word, offset = divmod(bits * j, 32)
        words[:, word] |= fields[:, j] << offset  # int32 shifts drop the bits past the word, which the next one takes
        if offset + bits > 32:
            words[:, word + 1] |= fields[:, j] >> (32 - offset)
    return words.flatten(0, 1)


def unpack_rows(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of a `qweight`: the inverse of `pack_rows`.

    Args:
        qweight: int32 [I * bits / 32, O].
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 [I, O].

    Raises:
        ValueError: unknown bits, not int32, or a number of words that holds no whole number of codes.
    """
    _check_words(qweight, bits, "qweight", axis=0)
    period = CODES_PER_PERIOD[bits]
    words = qweight.unflatten(0, (-1, period * bits // 32))
    codes = torch.empty(words.shape[0], period, qweight.shape[1], dtype=torch.uint8, device=qweight.device)
    for j in range(period):
        word, offset = divmod(bits * j, 32)
        here = min(bits, 32 - offset)  # bits of this code in this word; masked at once, since >> copies the sign bit
        field = (words[:, word] >> offset) & ((1 << here) - 1)
        if here < bits:
            field = field | (words[:, word + 1] & ((1 << (bits - here)) - 1)) << here
        codes[:, j] = field
    return codes.flatten(0, 1)


def pack_columns(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers along the out features, the layout of `qzeros`. What is stored is what is given: see
    `encode_zero_points`.

    Args:
        zeros: integers [G, O] from 0 to 2**bits - 1.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [G, O * bits / 32].

    Raises:
        ValueError: unknown bits, a value out of range, or an O that does not fill whole words.
    """
    _check_codes(zeros, bits, "zeros", axis=1)
    return pack_rows(zeros.t(), bits).t().contiguous()


def unpack_columns(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers stored in a `qzeros`: the inverse of `pack_columns`.

    Args:
        qzeros: int32 [G, O * bits / 32].
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 [G, O].

    Raises:
        ValueError: unknown bits, not int32, or a number of words that holds no whole number of values.
    """
    _check_words(qzeros, bits, "qzeros", axis=1)
    return unpack_rows(qzeros.t(), bits).t().contiguous()


def encode_zero_points(zero_point: torch.Tensor, bits: int, format: GptqFormat = "gptq") -> torch.Tensor:
    """`qzeros` of a GPTQ file.

    Args:
        zero_point: integers [G, O]; from 1 to 2**bits - 1 for "gptq" (version 1), from 0 for "gptq_v2".
        bits: 2, 3, 4 or 8.
        format: "gptq" stores the zero point minus one, "gptq_v2" the zero point.

    Returns:
        int32 [G, O * bits / 32].

    Raises:
        ValueError: unknown bits or format, a zero point that the format cannot hold, or an O that does not fill whole
            words.
    """
    lowest = _lowest_zero_point(format)
    _check_codes(zero_point, bits, "zero_point", axis=1, lowest=lowest)
    return pack_columns(zero_point.to(torch.int32) - lowest, bits)


def decode_zero_points(qzeros: torch.Tensor, bits: int, format: GptqFormat = "gptq") -> torch.Tensor:
    """The zero points of a `qzeros`.

    Args:
        qzeros: int32 [G, O * bits / 32].
        bits: 2, 3, 4 or 8.
        format: "gptq" (version 1: one is added to each field, and masked, as AutoGPTQ does) or "gptq_v2".

    Returns:
        int32 [G, O], from 0 to 2**bits - 1; signed, so that differences with it do not wrap.

    Raises:
        ValueError: unknown bits or format, not int32, or a number of words that holds no whole number of values.
    """
    added = _lowest_zero_point(format)
    return (unpack_columns(qzeros, bits).to(torch.int32) + added) & (2**bits - 1)


def pack_nf4(codes: torch.Tensor) -> torch.Tensor:
    """Pack NF4 codes two to a byte, the first in the high nibble.

    Args:
        codes: integers [N] from 0 to 15.

    Returns:
        uint8 [ceil(N / 2), 1].

    Raises:
        ValueError: not a vector of integers from 0 to 15.
    """
    if codes.dim() != 1:
        raise ValueError(f"codes has shape {tuple(codes.shape)}; NF4 codes are packed from a vector [N]")
    _check_range(codes, 0, 15, "codes")
    codes = codes.to(torch.uint8)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_tensor([NF4_CODE_OF_ZERO])])
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)


def unpack_nf4(packed: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """The NF4 codes of packed bytes: the inverse of `pack_nf4`.

    Args:
        packed: uint8 [ceil(N / 2), 1], or any shape with as many bytes.
        count: N; None means two codes for every byte.

    Returns:
        uint8 [N].

    Raises:
        ValueError: not uint8, or a number of bytes that is not ceil(N / 2).
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed is {packed.dtype}; NF4 codes are packed in torch.uint8")
    count = 2 * packed.numel() if count is None else count
    if packed.numel() != (count + 1) // 2:
        raise ValueError(f"packed has {packed.numel()} bytes; {count} NF4 codes need {(count + 1) // 2}")
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 0x0F], dim=1).reshape(-1)[:count]


def _lowest_zero_point(format: str) -> int:
    if format not in ("gptq", "gptq_v2"):
        raise ValueError(f"format is {format!r}; zero points are stored as 'gptq' or 'gptq_v2'")
    return 1 if format == "gptq" else 0


def _check_range(values: torch.Tensor, lowest: int, highest: int, name: str) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} is {values.dtype}; integers from {lowest} to {highest} are packed")
    if values.numel():
        low, high = (int(v) for v in torch.aminmax(values))
        if low < lowest or high > highest:
            raise ValueError(f"{name} goes from {low} to {high}; the format holds {lowest} to {highest}")


def _check_codes(codes: torch.Tensor, bits: int, name: str, axis: int, lowest: int = 0) -> None:
    period = _period(bits)
    if codes.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(codes.shape)}; packing takes a matrix")
    if codes.shape[axis] % period:
        raise ValueError(
            f"{name} has {codes.shape[axis]} {_AXES[axis]}; {bits}-bit packing needs a multiple of {period}"
        )
    _check_range(codes, lowest, 2**bits - 1, name)


def _check_words(words: torch.Tensor, bits: int, name: str, axis: int) -> None:
    needed = _period(bits) * bits // 32
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"{name} is {words.dtype} {tuple(words.shape)}; packed words are a matrix of torch.int32")
    if words.shape[axis] % needed:
        raise ValueError(
            f"{name} has {words.shape[axis]} {_AXES[axis]}; {bits}-bit codes fill a multiple of {needed} words"
        )


def _period(bits: int) -> int:
    if bits not in CODES_PER_PERIOD:
        raise ValueError(f"bits is {bits!r}; codes are packed with {', '.join(map(str, CODES_PER_PERIOD))} bits")
    return CODES_PER_PERIOD[bits]
