"""Safetensors headers: what safetensors writes is accepted, damaged files are refused or mean what they say."""

import json
import math
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from qlm.checkpoint.safetensors_header import MAX_HEADER_BYTES, TensorInfo, header_length, parse_header
from qlm.errors import DataError, QlmError
from qlm.formats.dtypes import DTYPES

FILE = Path("model.safetensors")
MUTATIONS = 4000


def parse(data: bytes) -> dict[str, TensorInfo]:
    """As the reader does it."""
    length = header_length(data[:9], len(data), str(FILE))
    return parse_header(data[8 : 8 + length], FILE, len(data))


def file_bytes(header: str | bytes | dict, data: bytes = b"") -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture(scope="module")
def real() -> bytes:
    tensors = {
        "a.weight": torch.arange(6).reshape(2, 3).float(),
        "b.half": torch.ones(3, dtype=torch.float16),
        "c.bf16": torch.ones(2, 2, 2, dtype=torch.bfloat16),
        "d.int8": torch.ones(5, dtype=torch.int8),
        "e.empty": torch.ones(0, 4),
        "f.scalar": torch.tensor(3, dtype=torch.int64),
        "g.bool": torch.tensor([True, False]),
        "h.float8": torch.ones(4).to(torch.float8_e4m3fn),
    }
    return save(tensors, {"format": "pt"})


def test_what_safetensors_writes_is_accepted(real):
    found = parse(real)
    assert found["a.weight"].shape == (2, 3)
    assert found["f.scalar"].shape == ()
    assert found["e.empty"].bytes == 0
    assert {name: info.dtype for name, info in found.items()}["c.bf16"] == "BF16"
    values = torch.frombuffer(bytearray(real), dtype=torch.float32, count=6, offset=found["a.weight"].offset)
    assert values.tolist() == [0, 1, 2, 3, 4, 5]
    assert [info.offset for info in found.values()] == sorted(info.offset for info in found.values())


def test_an_empty_file_of_tensors_is_accepted():
    assert parse(file_bytes("{}")) == {}


REFUSED = {
    "too short": (b"\2\0\0\0\0\0\0\0{", "too few"),
    "empty": (b"", "too few"),
    "huge header": (struct.pack("<Q", 1 << 62) + b"{}", "at most"),
    "header over 8 MiB": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most"),
    "header beyond the file": (struct.pack("<Q", 100) + b"{}", "ends after"),
    "leading space": (file_bytes(b' {"a":1}'), "begin with"),
    "zip": (b"PK\x03\x04" + bytes(20), "at most"),
    "a list": (file_bytes(b"[1, 2]"), "begin with"),
    "not JSON": (file_bytes(b"{nonsense"), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not UTF-8"),
    "deep": (file_bytes(b'{"a":' * 20_000 + b"1" + b"}" * 20_000), "nested too deeply"),
    "trailing tab": (file_bytes(b"{}\t"), "spaces alone"),
    "duplicate name": (
        file_bytes(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}', bytes(8)),
        "appears twice",
    ),
    "duplicate field": (
        file_bytes('{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
        "appears twice",
    ),
    "unknown field": (file_bytes({"a": {**entry(), "x": 1}}, bytes(8)), "exactly dtype"),
    "missing field": (file_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "exactly dtype"),
    "entry is a list": (file_bytes({"a": [1]}, bytes(8)), "exactly dtype"),
    "unknown dtype": (file_bytes({"a": entry("F4")}, bytes(8)), "dtype 'F4'"),
    "dtype is a list": (file_bytes({"a": entry(["F32"])}, bytes(8)), "dtype"),
    "rank 5": (file_bytes({"a": entry(shape=[1, 1, 1, 1, 2])}, bytes(8)), "at most 4 sizes"),
    "negative size": (file_bytes({"a": entry(shape=[-2])}, bytes(8)), "sizes"),
    "size is a float": (file_bytes({"a": entry(shape=[2.0])}, bytes(8)), "sizes"),
    "size is a bool": (file_bytes({"a": entry(shape=[True, 2])}, bytes(8)), "sizes"),
    "size is a string": (file_bytes({"a": entry(shape="2")}, bytes(8)), "sizes"),
    "huge size": (file_bytes({"a": entry(shape=[0, 1 << 62], offsets=[0, 0])}), "sizes"),
    "overflowing product": (file_bytes({"a": entry(shape=[1 << 32, 1 << 32], offsets=[0, 0])}), "takes"),
    "huge integer": (file_bytes('{"a": {"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}'), "digits"),
    "NaN": (file_bytes('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'), "NaN"),
    "overflowing float": (file_bytes('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}'), "too large"),
    "three offsets": (file_bytes({"a": entry(offsets=[0, 8, 8])}, bytes(8)), "begin and an end"),
    "reversed offsets": (file_bytes({"a": entry(offsets=[8, 0])}, bytes(8)), "hold -8"),
    "wrong byte count": (file_bytes({"a": entry(offsets=[0, 12])}, bytes(12)), "takes 8 bytes"),
    "beyond the end": (file_bytes({"a": entry()}, bytes(7)), "truncated"),
    "appended bytes": (file_bytes({"a": entry()}, bytes(9)), "belong to none"),
    "gap": (file_bytes({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "leaves a gap"),
    "gap before the first": (file_bytes({"a": entry(offsets=[4, 12])}, bytes(12)), "leaves a gap"),
    "overlap": (file_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
    "same bytes": (file_bytes({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "control characters in a name": (file_bytes({"a\x1b[2J": entry()}, bytes(8)), "printable"),
    "newline in a name": (file_bytes({"a\nb": entry()}, bytes(8)), "printable"),
    "half a surrogate in a name": (
        file_bytes('{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)), "printable",
    ),
    "empty name": (file_bytes({"": entry()}, bytes(8)), "printable"),
    "metadata of a number": (file_bytes({"__metadata__": {"a": 1}}), "strings to strings"),
    "metadata is a list": (file_bytes({"__metadata__": []}), "strings to strings"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    data, words = REFUSED[case]
    with pytest.raises(DataError) as caught:
        parse(data)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def meaning(data: bytes) -> list[tuple[str, str, list[int], list[int]]]:
    """What the header of an accepted file says, read by a parser that keeps every pair; fails on anything doubtful."""
    (length,) = struct.unpack("<Q", data[:8])
    pairs = json.loads(data[8 : 8 + length], object_pairs_hook=lambda pairs: pairs)
    found = []
    for name, described in pairs:
        if name == "__metadata__":
            continue
        fields = dict(described)
        assert sorted(key for key, _ in described) == ["data_offsets", "dtype", "shape"]
        found.append((name, fields["dtype"], fields["shape"], fields["data_offsets"]))
    assert len({name for name, *_ in found}) == len(found)
    return found


def check_mutant(data: bytes) -> bool:
    """Whether the file is accepted; if so, it must be consistent in itself to the last byte."""
    try:
        found = parse(data)
    except QlmError:
        return False
    start = 8 + struct.unpack("<Q", data[:8])[0]
    said = meaning(data)
    assert {name for name, *_ in said} == found.keys()
    covered = 0
    for name, dtype, shape, (begin, end) in sorted(said, key=lambda item: item[3]):
        assert found[name] == TensorInfo(dtype, tuple(shape), FILE, start + begin)
        assert math.prod(shape) * DTYPES[dtype] == end - begin
        assert begin == covered
        covered = end
    assert start + covered == len(data)
    return True


def mutate(data: bytes, chance: random.Random) -> bytes:
    mutant = bytearray(data)
    (length,) = struct.unpack("<Q", data[:8])
    kind = chance.randrange(8)
    if kind == 0:  # bits of the header
        for _ in range(chance.randint(1, 3)):
            mutant[chance.randrange(8 + length)] ^= 1 << chance.randrange(8)
    elif kind == 1:  # the end is missing
        del mutant[chance.randrange(len(mutant)) :]
    elif kind == 2:  # something is appended
        mutant += chance.randbytes(chance.randint(1, 20))
    elif kind == 3:  # the length is wrong
        mutant[:8] = struct.pack("<Q", max(0, length + chance.randint(-20, 20)))
    elif kind == 4:  # a digit is another digit: offsets, shapes, dtypes
        places = [i for i in range(8, 8 + length) if chr(mutant[i]).isdigit()]
        mutant[chance.choice(places)] = ord(chance.choice("0123456789"))
    elif kind == 5:  # bytes of the header are cut out, its length kept right
        begin = 8 + chance.randrange(length)
        count = min(chance.randint(1, 30), 8 + length - begin)
        del mutant[begin : begin + count]
        mutant[:8] = struct.pack("<Q", length - count)
    elif kind == 6:  # a piece of the header is doubled, its length kept right
        begin = 8 + chance.randrange(length)
        piece = bytes(mutant[begin : min(begin + chance.randint(1, 80), 8 + length)])
        mutant[begin:begin] = piece
        mutant[:8] = struct.pack("<Q", length + len(piece))
    else:  # a name or dtype is another one
        old, new = chance.choice(
            [
                (b"b.half", b"a.weight"),
                (b'"F16"', b'"F32"'),
                (b'"F32"', b'"I32"'),
                (b"dtype", b"dtipe"),
                (b'{"', b' {"'),
            ]
        )
        at = mutant.find(old)
        mutant[at : at + len(old)] = new
        mutant[:8] = struct.pack("<Q", length + len(new) - len(old))
    return bytes(mutant)


def test_mutants_are_refused_or_mean_what_they_say(real):
    chance = random.Random(0)
    accepted = sum(check_mutant(mutate(real, chance)) for _ in range(MUTATIONS))
    # Some changes give another valid header (a letter of a name, F32 for I32): the check against the config finds them.
    assert 0 < accepted < MUTATIONS // 4


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.text(max_size=6),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*DTYPES, "F4", "f32", ""]),
                "shape": st.lists(st.integers(-1, 3) | st.just(1 << 62), max_size=5),
                "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2).map(sorted),
            }
        ),
        max_size=3,
    ),
    st.integers(0, 24),
)
def test_made_up_headers_are_refused_or_mean_what_they_say(header, size):
    check_mutant(file_bytes(header, bytes(size)))
