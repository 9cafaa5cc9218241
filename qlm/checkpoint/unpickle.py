"""PyTorch's `.bin` files (the zip format of torch >= 1.6) read without running anything that they say.

`torch.save` writes a zip archive: `<name>/data.pkl`, a pickle of the state dict in which each tensor is a call of
`torch._utils._rebuild_tensor_v2` on a storage, and `<name>/data/<key>`, the bytes of each storage, stored without
compression.

A pickle is a program for a small stack machine. The machine here knows only the instructions that `torch.save` needs,
and it never imports, calls or sets an attribute of anything: a global is a name, and the few names that a state dict
needs are understood by the code below. Every other instruction or name is an error. `pickletools.genops` splits the
bytes into instructions; it runs none of them. `torch.load(weights_only=True)` is not used: it has had two holes of its
own (CVE-2025-32434, CVE-2026-24747).

Refused: older formats (a bare pickle, a tar file), TorchScript archives, compressed or overlapping members, storages of
another size than the pickle says, tensors that reach beyond their storage or repeat its elements. Bytes of tensors
are not read here.
"""

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlm.checkpoint.folder import read_into
from qlm.checkpoint.safetensors_header import MAX_RANK, TensorInfo
from qlm.errors import DataError, MissingInput
from qlm.formats.dtypes import DTYPES

# The pickle of a 66-billion-parameter model has some 300 kB. Longer ones cost seconds and hundreds of MB to step
# through.
MAX_PICKLE_BYTES = 4 << 20
MAX_MEMBERS = 100_000

# To the safetensors name of the elements.
STORAGES: dict[str, str] = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
_ORDERED_DICT = "collections OrderedDict"
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
ALLOWED_NAMES = frozenset({*STORAGES, _ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER})

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7
_ENCRYPTED = 0x1
_SMALL_MEMBERS = ("version", "byteorder", ".data/serialization_id", ".format_version", ".storage_alignment")


@dataclass(frozen=True)
class _Name:
    """What a GLOBAL instruction leaves on the stack: the name, and nothing of what it names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    elements: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Dict(dict[Any, Any]):
    """An OrderedDict's stand-in; BUILD is allowed on it and does nothing."""


class _Mark:
    pass


_MARK = _Mark()


def read_bin(path: Path, source: Path | None = None) -> dict[str, TensorInfo]:
    """The tensors of a state dict saved by `torch.save`, in the order in which they were saved.

    Args:
        path: the file to open; the caller has checked where it leads.
        source: the path to name in errors and in the result's `file`; `path` when left out.

    Raises:
        DataError: the file is not such a state dict, or asks for anything but tensors.
    """
    source = source or path
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise MissingInput(f"{source}: cannot be opened: {error.strerror}") from None
    with file:
        members = _members(file.fileno(), source)
        begin, size = members["data.pkl"]
        pickle_bytes = bytearray(size)
        read_into(file.fileno(), memoryview(pickle_bytes), begin, source)
        state = _Machine(source).run(bytes(pickle_bytes))
    tensors: dict[str, TensorInfo] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise DataError(
                f"{source}: its state dict has the key {name!r}; a tensor's name must be printable characters"
            )
        if not isinstance(value, _Tensor):
            raise DataError(
                f"{source}: {name!r} is a {_describe(value)}, not a tensor; expected a plain state dict of a model"
            )
        tensors[name] = _locate(name, value, members, source)
    return tensors


def _members(descriptor: int, source: Path) -> dict[str, tuple[int, int]]:
    """Name without the archive's prefix -> (position of the first byte, bytes) for every member that a state dict may
    have.
    """
    with os.fdopen(os.dup(descriptor), "rb") as file:
        start = file.read(4)
        if start != b"PK\x03\x04":
            raise DataError(
                f"{source}: not a zip file, as torch.save writes since 1.6 (it begins with {start!r}); "
                "save it again with a newer torch, or as safetensors"
            )
        try:
            entries = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile raises many kinds of errors on damaged archives
            raise DataError(f"{source}: a damaged or truncated zip file ({error}); download it again") from None
        file_bytes = os.fstat(descriptor).st_size
        if len(entries) > MAX_MEMBERS:
            raise DataError(f"{source}: {len(entries)} members; at most {MAX_MEMBERS} are read")
        prefix = entries[0].filename.split("/")[0] + "/" if entries else ""
        members: dict[str, tuple[int, int]] = {}
        spans: list[tuple[int, int, str]] = []
        for entry in entries:
            name = entry.filename.removeprefix(prefix)
            _check_member(entry, name, prefix, source)
            if name in members:
                raise DataError(f"{source}: the member {entry.filename!r} appears twice")
            begin = _data_position(descriptor, entry, file_bytes, source)
            members[name] = (begin, entry.file_size)
            spans.append((entry.header_offset, begin + entry.file_size, entry.filename))
    spans.sort()
    if spans and spans[0][0] != 0:
        raise DataError(f"{source}: {spans[0][0]} bytes come before the first member; torch.save writes none")
    for (_, end, last), (begin, _, name) in pairwise(spans):
        if begin < end:
            raise DataError(f"{source}: the members {last!r} and {name!r} overlap")
    if "data.pkl" not in members:
        raise DataError(f"{source}: has no data.pkl; expected what torch.save writes")
    if members["data.pkl"][1] > MAX_PICKLE_BYTES:
        raise DataError(
            f"{source}: its data.pkl has {members['data.pkl'][1]} bytes; at most {MAX_PICKLE_BYTES} are read"
        )
    if "byteorder" in members:
        begin, size = members["byteorder"]
        order = bytearray(min(size, 16))
        read_into(descriptor, memoryview(order), begin, source)
        if order != b"little":
            raise DataError(f"{source}: byte order {bytes(order)!r}; only little-endian files are read")
    return members


def _check_member(entry: zipfile.ZipInfo, name: str, prefix: str, source: Path) -> None:
    known = name == "data.pkl" or name in _SMALL_MEMBERS or (name.startswith("data/") and name[5:].isdecimal())
    if not known or not entry.filename.startswith(prefix) or len(prefix) < 2:
        raise DataError(
            f"{source}: the member {entry.filename!r} has no place in a state dict; TorchScript and other archives "
            "are not read"
        )
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise DataError(f"{source}: the member {entry.filename!r} is compressed; torch.save stores without compression")
    if entry.flag_bits & _ENCRYPTED:
        raise DataError(f"{source}: the member {entry.filename!r} is encrypted")


def _data_position(descriptor: int, entry: zipfile.ZipInfo, file_bytes: int, source: Path) -> int:
    """Where the member's bytes begin, from its own header, which must agree with the directory at the archive's end."""
    header = bytearray(_LOCAL_HEADER.size)
    if not 0 <= entry.header_offset <= file_bytes - len(header):
        raise DataError(f"{source}: the member {entry.filename!r} lies beyond the end of the file; download it again")
    read_into(descriptor, memoryview(header), entry.header_offset, source)
    signature, _, _, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    begin = entry.header_offset + len(header) + name_bytes + extra_bytes
    if signature != b"PK\x03\x04" or method != zipfile.ZIP_STORED or begin + entry.file_size > file_bytes:
        raise DataError(f"{source}: the member {entry.filename!r} is damaged or truncated; download the file again")
    name = bytearray(name_bytes)
    read_into(descriptor, memoryview(name), entry.header_offset + len(header), source)
    if name != entry.orig_filename.encode("utf-8", "replace"):
        raise DataError(f"{source}: the member {entry.filename!r} has another name in its own header")
    return begin


def _locate(name: str, tensor: _Tensor, members: dict[str, tuple[int, int]], source: Path) -> TensorInfo:
    """The tensor's place in the file, after checking that all of it lies inside its storage."""
    storage, where = tensor.storage, f"{source}: tensor {name!r}"
    itemsize = DTYPES[storage.dtype]
    member = members.get(f"data/{storage.key}")
    if member is None:
        raise DataError(f"{where}: its storage data/{storage.key} is missing")
    begin, size = member
    if size != storage.elements * itemsize:
        raise DataError(
            f"{where}: its storage has {size} bytes; {storage.elements} elements of {storage.dtype} take "
            f"{storage.elements * itemsize}"
        )
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))
    # A stride of 0 would make a small storage fill any amount of memory.
    if tensor.offset > storage.elements or (count and (last >= storage.elements or count > storage.elements)):
        raise DataError(
            f"{where}: shape {tensor.shape}, stride {tensor.stride} and offset {tensor.offset} do not fit into its "
            "storage of "
            f"{storage.elements} elements"
        )
    stride = None if _is_row_major(tensor.shape, tensor.stride) else tensor.stride
    return TensorInfo(storage.dtype, tensor.shape, source, begin + tensor.offset * itemsize, stride)


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


class _Machine:
    """The stack machine of a pickle, with the instructions that a state dict needs and no others."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> dict[Any, Any]:
        """The value that the program leaves, which must be a dict."""
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    result = self.stack.pop()
                    if not isinstance(result, dict):
                        raise DataError(
                            f"{self.source}: holds a {_describe(result)}; expected a plain state dict of a model"
                        )
                    return result
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
            # genops on a broken program, or a stack that is too short for an instruction
            raise DataError(f"{self.source}: its pickle is damaged ({error})") from None
        raise DataError(f"{self.source}: its pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            stack.append(tuple(reversed([self._pop() for _ in range(_TUPLES[name])])))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name == "APPEND":
            value = self._pop()
            self._top(list).append(value)
        elif name == "APPENDS":
            values = self._pop_to_mark()
            self._top(list).extend(values)
        elif name == "SETITEM":
            value, key = self._pop(), self._pop()
            self._set_items([key, value])
        elif name == "SETITEMS":
            self._set_items(self._pop_to_mark())
        elif name == "GLOBAL":
            stack.append(self._name(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            stack.append(self._name(f"{module} {attribute}"))
        elif name == "BINPERSID":
            stack.append(self._storage(self._pop()))
        elif name == "REDUCE":
            arguments, function = self._pop(), self._pop()
            stack.append(self._reduce(function, arguments))
        elif name == "BUILD":
            self._build(self._pop())
        else:
            raise DataError(
                f"{self.source}: its pickle uses the instruction {name}, which no state dict needs; refused"
            )

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value belongs")
        return value

    def _pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"a {_describe(self.stack[-1])} where a {kind.__name__} belongs")
        return self.stack[-1]

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, bool):
                raise ValueError(f"a dict's key is a {_describe(key)}")
            if key in target:
                raise DataError(f"{self.source}: the key {key!r} appears twice")
            target[key] = value

    def _name(self, name: str) -> _Name:
        if name not in ALLOWED_NAMES:
            raise DataError(
                f"{self.source}: its pickle names {name.replace(' ', '.')}, which no state dict of tensors needs; it "
                "was not run; "
                "use safetensors files"
            )
        return _Name(name)

    def _storage(self, identity: Any) -> _Storage:
        match identity:
            case ("storage", _Name(name), str(key), str(_), int(elements)) if name in STORAGES and elements >= 0:
                if key.isdecimal() and len(key) < 20:
                    return _Storage(STORAGES[name], key, elements)
        raise DataError(
            f"{self.source}: its pickle describes a storage that torch.save would not write: {_describe(identity)}"
        )

    def _reduce(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Name) else None
        match (name, arguments):
            case (str(x), ()) if x == _ORDERED_DICT:
                return _Dict()
            case (
                str(x),
                (_Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(_), dict(_), *rest),
            ) if x == _REBUILD_TENSOR and not any(rest):
                if offset >= 0 and len(shape) == len(stride) <= MAX_RANK and _are_counts(shape) and _are_counts(stride):
                    return _Tensor(storage, offset, shape, stride)
            case (str(x), (_Tensor() as tensor, bool(_), dict(_))) if x == _REBUILD_PARAMETER:
                return tensor
        what = _describe(function) if name is None else name.replace(" ", ".")
        raise DataError(f"{self.source}: its pickle calls {what} in a way that torch.save would not write")

    def _build(self, state: Any) -> None:
        """`torch.save` keeps a state dict's `_metadata` as an attribute. It holds version numbers of modules and is
        dropped.
        """
        target = self._top(_Dict)
        if (
            not isinstance(state, dict)
            or not state.keys() <= {"_metadata"}
            or not isinstance(state.get("_metadata", {}), dict)
        ):
            raise DataError(
                f"{self.source}: its pickle sets attributes of a {_describe(target)} other than _metadata; refused"
            )


def _are_counts(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 48 for value in values)


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: _MARK,
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _describe(value: Any) -> str:
    """A value's kind, in a few words; values themselves may be large or refer to themselves."""
    kinds = {_Name: "global", _Storage: "storage", _Tensor: "tensor", _Dict: "dict"}
    return kinds.get(type(value), type(value).__name__)
