"""The header of a safetensors file, checked more strictly than the safetensors library does.

The format (https://github.com/huggingface/safetensors, README, "Format"): 8 bytes, little-endian, length N of the
header; N bytes of JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}`; then the
buffer that the offsets count from.

safetensors 0.8.0 accepts duplicate names (the last one wins), white space before the header, unknown fields, and names
with control characters, although its README forbids the first two. Here all of them are errors, and so are: a header
over 8 MiB, an unknown dtype, more than 4 dimensions, a shape that does not give the byte count, a gap, an overlap, and
a buffer that is not covered to its last byte. Values are not looked at.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlm.checkpoint import strict_json
from qlm.errors import DataError
from qlm.formats.dtypes import DTYPES

# The largest real shards have headers below 1 MB; the format's own limit of 100 MB only helps texts made to fill
# memory.
MAX_HEADER_BYTES = 8 << 20
MAX_RANK = 4
MAX_DIMENSION = 1 << 40


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Attributes:
        dtype: its safetensors name ("F16").
        file: the file that holds it.
        offset: position in the file of the tensor's first element, in bytes.
        stride: elements between neighbours along each dimension; None when the elements lie in row-major order without
            gaps.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    stride: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Size of the tensor's elements in memory."""
        return math.prod(self.shape) * DTYPES[self.dtype]


def header_length(first_bytes: bytes, file_bytes: int, source: str) -> int:
    """Length of the header in bytes, from the first 9 bytes of a file of `file_bytes` bytes."""
    if len(first_bytes) < 9 or file_bytes < 10:
        raise DataError(f"{source}: {file_bytes} bytes are too few for a safetensors file")
    length = int.from_bytes(first_bytes[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise DataError(
            f"{source}: says that its header has {length} bytes; at most {MAX_HEADER_BYTES} are read; is it a "
            "safetensors file?"
        )
    if length + 8 > file_bytes:
        raise DataError(
            f"{source}: says that its header has {length} bytes, but the file ends after {file_bytes}; download it "
            "again"
        )
    if first_bytes[8:9] != b"{":
        raise DataError(f"{source}: its header does not begin with '{{', as a safetensors header must")
    return length


def parse_header(header: bytes, file: Path, file_bytes: int) -> dict[str, TensorInfo]:
    """The tensors that `header` (without the 8 bytes of length) describes, in the order in which they lie in the file.

    Raises:
        DataError: naming the file, the tensor, what was found and what the format asks for.
    """
    source = str(file)
    entries = strict_json.load_object(header, source, MAX_HEADER_BYTES)
    if header.rstrip(b" ")[-1:] != b"}":
        raise DataError(f"{source}: its header may be padded with spaces alone")
    _check_metadata(entries.pop("__metadata__", {}), source)
    start = 8 + len(header)
    spans: list[tuple[int, int, str]] = []
    found: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        info, begin, end = _entry(name, entry, file, start)
        spans.append((begin, end, name))
        found[name] = info
    spans.sort()
    _check_cover(spans, file_bytes - start, source)
    return {name: found[name] for _, _, name in spans}


def _check_metadata(metadata: Any, source: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DataError(f"{source}: __metadata__ of a safetensors header must map strings to strings")


def _entry(name: str, entry: Any, file: Path, start: int) -> tuple[TensorInfo, int, int]:
    source = f"{file}: tensor {name!r}"
    if not name or not name.isprintable():
        raise DataError(f"{source}: a tensor's name must be printable characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        keys = sorted(entry) if isinstance(entry, dict) else entry
        raise DataError(f"{source}: described by {keys!r}; expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DataError(f"{source}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_RANK or any(size > MAX_DIMENSION for size in shape):
        raise DataError(f"{source}: shape {shape!r} is not a list of at most {MAX_RANK} sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise DataError(f"{source}: data_offsets {offsets!r} are not a begin and an end")
    begin, end = offsets
    info = TensorInfo(dtype, tuple(shape), file, start + begin)
    if end - begin != info.bytes:
        raise DataError(
            f"{source}: {dtype} of shape {shape} takes {info.bytes} bytes, but its data_offsets hold {end - begin}"
        )
    return info, begin, end


def _are_counts(value: Any) -> bool:
    # bool is an int to Python, not to the format
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(spans: list[tuple[int, int, str]], buffer_bytes: int, source: str) -> None:
    """The sorted spans must follow each other without gap or overlap from the buffer's first byte to its last."""
    for (_, last_end, last), (begin, _, name) in pairwise([(0, 0, "the header"), *spans]):
        if begin != last_end:
            what = "overlaps with" if begin < last_end else "leaves a gap after"
            raise DataError(f"{source}: tensor {name!r} {what} {last!r}: it begins at {begin}, expected {last_end}")
    end = spans[-1][1] if spans else 0
    if end > buffer_bytes:
        name = next(name for _, end, name in spans if end > buffer_bytes)
        raise DataError(
            f"{source}: truncated: tensor {name!r} lies beyond the end of the file (it has {buffer_bytes} bytes of "
            "data, "
            f"expected {end}); download it again"
        )
    if end < buffer_bytes:
        raise DataError(
            f"{source}: {buffer_bytes - end} bytes after the last tensor belong to none; expected {end} bytes of data"
        )
