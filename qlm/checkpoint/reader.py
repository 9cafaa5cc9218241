"""A model folder opened for reading: its config, and its tensors one at a time.

Which files are read is decided here, in this order: safetensors (single, sharded, or the one file that AutoGPTQ names
after its settings), then PyTorch's `.bin`. Two candidates of equal rank are an error; nothing is guessed.

A tensor is handed out in one of two ways. `read` fills fresh memory with `pread`: quantizing and loading take this one,
because pages of a mapped file count as the process's memory until the system takes them back, so that a loop over the
blocks of a model would seem to need all of it. `map` gives the file's own bytes, read-only: the CPU engine computes from
them where they lie, which starts at once and needs no memory twice. A file that shrinks under a map kills the process
at the next access; whoever computes from maps asks `check_unchanged` before, and the kernels turn the signal of what
happens in between into an error.

Nothing here imports torch, except that `read` does when it makes its first tensor.
"""

import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from qlm.arch import FAMILIES
from qlm.checkpoint import hub, strict_json
from qlm.checkpoint.config import read_config
from qlm.checkpoint.folder import ModelFolder, is_plain_name, read_into, resolve_model_folder
from qlm.checkpoint.names import check_tensors
from qlm.checkpoint.safetensors_header import TensorInfo, header_length, parse_header
from qlm.checkpoint.unpickle import read_bin
from qlm.errors import DataError, MissingInput, Unavailable, UsageError
from qlm.formats.dtypes import DTYPES, NUMPY_DTYPES, to_float32, torch_dtype

# At run time torch takes seconds to import, and the CPU engine does without.
if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "MappedTensor", "TensorInfo", "check_tensors", "read_config"]

MAX_CONFIG_BYTES = 4 << 20
_PIECE_ELEMENTS = 4 << 20
# Files besides weights whose content decides what a model computes or how its text is tokenized.
_MATTERING = (
    "config.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class _Weights:
    """Files and tensors of one checkpoint, in file order, and the size of each file of tensors when its header was
    checked, in bytes.
    """

    files: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class MappedTensor:
    """A tensor where it lies in the page cache, read-only, row-major and perhaps unaligned.

    Attributes:
        address: of its first element; valid as long as the checkpoint or `array` lives.
        dtype: its safetensors name.
        array: numpy's view of it; bfloat16 as uint16, 8-bit floats as uint8.
    """

    address: int
    dtype: str
    shape: tuple[int, ...]
    array: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


class Checkpoint:
    """A model folder whose every header has been checked. Open one with `Checkpoint.open`.

    Attributes:
        folder: the folder with the files (for a hub id, the snapshot in the cache).
        config: `config.json` as it stands; `read_config` checks it.
        tensors: name -> where the tensor lies and what it is, in file order.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        self.folder = folder.folder
        config = self.read_json("config.json", MAX_CONFIG_BYTES)
        if config is None:
            if folder.path("adapter_config.json") is not None:
                raise UsageError(
                    f"{self.folder}: is an adapter; give the model that it is for, and this folder with --adapter"
                )
            raise MissingInput(f"{self.folder}: has no config.json; expected a model folder")
        self.config: dict[str, Any] = config
        weights = _find_weights(folder, config)
        self._weight_files = weights.files
        self._sizes = weights.sizes
        self._maps: dict[str, mmap.mmap] = {}
        self._copies: dict[str, np.ndarray] = {}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(weights.tensors))

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None) -> "Checkpoint":
        """Open a local folder, a folder of the hub client's cache, or a hub id (`org/name`), which is downloaded first.

        Raises:
            MissingInput: there is no such folder or repository, or it lacks a file.
            DataError: a file is damaged or not what it should be.
            UsageError: `revision` with a folder that has no revisions.
        """
        text = os.fspath(model)
        if "\0" in text or not text:
            raise MissingInput(f"model {text!r} is not a path or a hub id")
        path = Path(text).expanduser()
        if hub.is_hub_id(text) and not os.path.lexists(path):
            return cls(ModelFolder(hub.download(text, revision)))
        return cls(ModelFolder(resolve_model_folder(path, revision)))

    @property
    def source(self) -> str:
        """The folder, for errors."""
        return str(self.folder)

    @property
    def config_source(self) -> str:
        """The path of `config.json`, for errors."""
        return str(self.folder / "config.json")

    @property
    def quantize_config(self) -> dict[str, Any] | None:
        """How the weights are quantized: `quantization_config` of `config.json`, else AutoGPTQ's
        `quantize_config.json`, else None.
        """
        inside = self.config.get("quantization_config")
        if inside is None:
            return self.read_json("quantize_config.json", MAX_CONFIG_BYTES)
        if not isinstance(inside, dict):
            raise DataError(
                f"{self.config_source}: quantization_config is a {type(inside).__name__}; expected an object"
            )
        return inside

    def read(self, name: str) -> "torch.Tensor":
        """The tensor in fresh CPU memory, row-major.

        Raises:
            KeyError: no such tensor.
            DataError: the file has become shorter since it was opened, or a bool is neither 0 nor 1.
            Unavailable: not enough memory.
        """
        import torch

        info = self.tensors[name]
        count = _span(info)
        try:
            tensor = torch.empty(info.shape if info.stride is None else (count,), dtype=torch_dtype(info.dtype))
        except RuntimeError:
            raise _no_memory(name, info) from None
        if count:
            self._fill(name, tensor.reshape(-1).view(torch.uint8).numpy())
        return tensor if info.stride is None else tensor.as_strided(info.shape, info.stride).contiguous()

    def read_ahead(self, names: Iterable[str]) -> None:
        """Let the system begin to read these tensors from the disk while something else is done; returns at once. They take memory of
        the system's cache only, which is there to be taken back."""
        infos = sorted((self.tensors[name] for name in names), key=lambda info: info.file)
        for file, of_file in itertools.groupby(infos, key=lambda info: info.file):
            with self._folder.open(file.name) as descriptor:
                for info in of_file:
                    # It is advice: a file system need not take it.
                    with suppress(OSError):
                        os.posix_fadvise(descriptor, info.offset, info.bytes, os.POSIX_FADV_WILLNEED)

    def map(self, name: str) -> MappedTensor:
        """The tensor where it lies in its file, which is mapped as a whole once and stays so as long as the checkpoint
        lives. A tensor of a `.bin` file whose elements are not in row-major order is copied into memory instead.

        Raises:
            KeyError: no such tensor.
            DataError: the file has changed its size since it was opened, or a bool is neither 0 nor 1.
            Unavailable: not enough memory or address space.
        """
        info = self.tensors[name]
        if info.stride is None:
            array: np.ndarray = np.ndarray(
                info.shape, NUMPY_DTYPES[info.dtype], self._map_file(info.file), offset=info.offset
            )
            _check_bools(name, info, array.reshape(-1))
        elif name in self._copies:
            array = self._copies[name]
        else:
            array = self._copies[name] = self._read_strided(name, info, info.stride)
        return MappedTensor(array.ctypes.data, info.dtype, info.shape, array)

    def same_values(self, first: str, second: str) -> bool:
        """Whether two float tensors of one shape hold the same numbers, whatever their dtypes (NaN equals a NaN of the
        same bits). Reads them piece by piece.
        """
        a, b = self.tensors[first], self.tensors[second]
        if a == b:  # one storage of a `.bin` file
            return True
        for start in range(0, math.prod(a.shape), _PIECE_ELEMENTS):
            stop = min(start + _PIECE_ELEMENTS, math.prod(a.shape))
            x, y = self._piece(first, start, stop), self._piece(second, start, stop)
            if a.dtype == b.dtype and x.tobytes() == y.tobytes():
                continue
            if not np.array_equal(to_float32(x, a.dtype), to_float32(y, b.dtype)):
                return False
        return True

    def _piece(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` of the flattened tensor."""
        info = self.tensors[name]
        if info.stride is not None:
            return self.map(name).array.reshape(-1)[start:stop]
        piece = np.empty(stop - start, NUMPY_DTYPES[info.dtype])
        with self._folder.open(info.file.name) as descriptor:
            offset = info.offset + start * piece.itemsize
            read_into(descriptor, piece.view(np.uint8).data, offset, info.file)
        return piece

    def mappings(self) -> list[np.ndarray]:
        """The bytes of each file that is mapped, which stays so as long as its array lives: uint8."""
        return [np.frombuffer(mapped, np.uint8) for mapped in self._maps.values()]

    def check_unchanged(self) -> None:
        """Raises DataError if a mapped file has another size than when it was opened."""
        for file, mapped in self._maps.items():
            self._check_size(file, mapped.size())

    def _check_size(self, file: str, found: int) -> None:
        if found != self._sizes[file]:
            raise DataError(
                f"{self.folder / file}: has {found} bytes, and had {self._sizes[file]} when it was opened; it was changed "
                "while in use; open the model again"
            )

    def _map_file(self, file: Path) -> mmap.mmap:
        if file.name not in self._maps:
            with self._folder.open(file.name) as descriptor:
                self._check_size(file.name, os.fstat(descriptor).st_size)
                try:
                    mapped = mmap.mmap(descriptor, self._sizes[file.name], access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:  # ValueError: it became shorter just now
                    raise Unavailable(f"{file}: cannot be mapped into memory: {error}") from None
            self._maps[file.name] = mapped
        return self._maps[file.name]

    def _read_strided(self, name: str, info: TensorInfo, stride: tuple[int, ...]) -> np.ndarray:
        dtype = NUMPY_DTYPES[info.dtype]
        try:
            elements = np.empty(_span(info), dtype)
            self._fill(name, elements.view(np.uint8))
            steps = tuple(step * dtype.itemsize for step in stride)
            array = np.ascontiguousarray(np.lib.stride_tricks.as_strided(elements, info.shape, steps))
        except MemoryError:
            raise _no_memory(name, info) from None
        array.flags.writeable = False
        return array

    def _fill(self, name: str, buffer: np.ndarray) -> None:
        """Read the bytes of a tensor's span into `buffer`, uint8."""
        info = self.tensors[name]
        with self._folder.open(info.file.name) as descriptor:
            read_into(descriptor, buffer.data, info.offset, info.file)
        _check_bools(name, info, buffer)

    def read_json(self, filename: str, max_bytes: int = strict_json.MAX_JSON_BYTES) -> dict[str, Any] | None:
        """The JSON object in a file of the folder, or None when there is no such file."""
        if self._folder.path(filename) is None:
            return None
        return strict_json.load_object(self._folder.read(filename, max_bytes), str(self.folder / filename), max_bytes)

    def path(self, filename: str) -> Path | None:
        """Path of a file of the folder, or None when there is none. Raises DataError when it leads elsewhere."""
        return self._folder.path(filename)

    def files(self) -> list[Path]:
        """The files whose content decides what the model computes: weights, their index, config and tokenizer; sorted
        by name.
        """
        small = [name for name in _MATTERING if self._folder.path(name) is not None]
        return [self.folder / name for name in sorted({*self._weight_files, *small})]


def _span(info: TensorInfo) -> int:
    """How many elements lie in the file from the tensor's first to its last."""
    if info.stride is None:
        return math.prod(info.shape)
    return 1 + sum((size - 1) * stride for size, stride in zip(info.shape, info.stride, strict=True))


def _no_memory(name: str, info: TensorInfo) -> Unavailable:
    needed = _span(info) * DTYPES[info.dtype]
    return Unavailable(f"{info.file}: tensor {name!r} takes {needed} bytes of memory, which could not be had")


def _check_bools(name: str, info: TensorInfo, values: np.ndarray) -> None:
    if info.dtype == "BOOL" and values.size and values.view(np.uint8).max() > 1:
        raise DataError(f"{info.file}: tensor {name!r} is bool, but has bytes other than 0 and 1")


# The tensors that a file's header describes, and the file's size.
_Header = tuple[dict[str, TensorInfo], int]


def _find_weights(folder: ModelFolder, config: Mapping[str, Any]) -> _Weights:
    names = folder.names()
    safetensors = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    for suffix, single, read_header in (
        (".safetensors", "model.safetensors", _read_safetensors),
        (".bin", "pytorch_model.bin", _read_bin),
    ):
        indexes = [name for name in names if name.endswith(f"{suffix}.index.json")]
        if suffix == ".bin":
            indexes = [name for name in indexes if name == "pytorch_model.bin.index.json"]
        if len(indexes) > 1 or (indexes and single in names):
            both = [*indexes, *[single] * (single in names)]
            raise DataError(
                f"{folder.folder}: has {' and '.join(both)}; which of them describes the weights is not clear; remove "
                "one"
            )
        if indexes:
            return _read_shards(folder, indexes[0], suffix, read_header, _tied_heads(config))
        if single not in names and suffix == ".safetensors" and safetensors:
            if len(safetensors) > 1:
                raise DataError(
                    f"{folder.folder}: has {len(safetensors)} safetensors files ({safetensors[0]}, ...) and no index; "
                    "expected model.safetensors.index.json, which says what lies where"
                )
            single = safetensors[0]
        if single in names:
            tensors, size = read_header(folder, single)
            return _Weights((single,), tensors, {single: size})
    adapter = "; it is an adapter, give the folder of the model it belongs to" if "adapter_config.json" in names else ""
    raise MissingInput(
        f"{folder.folder}: has no weights; expected model.safetensors, pytorch_model.bin or an index of either{adapter}"
    )


def _read_safetensors(folder: ModelFolder, name: str) -> _Header:
    with folder.open(name) as descriptor:
        return read_header(descriptor, folder.folder / name)


def read_header(descriptor: int, file: Path) -> _Header:
    """The tensors of an open safetensors file, and its size."""
    size = os.fstat(descriptor).st_size
    first = bytearray(min(9, size))
    read_into(descriptor, memoryview(first), 0, file)
    header = bytearray(header_length(bytes(first), size, str(file)))
    read_into(descriptor, memoryview(header), 8, file)
    return parse_header(bytes(header), file, size), size


def _read_bin(folder: ModelFolder, name: str) -> _Header:
    real = folder.real_path(name)
    if real is None:
        raise MissingInput(f"{folder.folder / name}: no such file")
    size = real.stat().st_size
    return read_bin(real, folder.folder / name), size


def _read_shards(
    folder: ModelFolder,
    index_name: str,
    suffix: str,
    read_header: Callable[[ModelFolder, str], _Header],
    tied_heads: frozenset[str],
) -> _Weights:
    """The tensors of all shards. Each tensor must lie in exactly the shard that the index names, and each shard hold no
    other.
    """
    source = str(folder.folder / index_name)
    index = strict_json.load_object(folder.read(index_name, strict_json.MAX_JSON_BYTES), source)
    unknown = sorted(index.keys() - {"metadata", "weight_map"})
    weight_map = index.get("weight_map")
    if unknown or not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{source}: expected an object with metadata and weight_map; found {sorted(index)!r}")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_name(shard) or not shard.endswith(suffix):
            raise DataError(
                f"{source}: tensor {tensor!r} is said to lie in {shard!r}; expected the plain name of a {suffix} file "
                "in the folder"
            )
        shards.setdefault(shard, set()).add(tensor)
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    for shard in sorted(shards):
        if folder.path(shard) is None:
            raise MissingInput(
                f"{folder.folder / shard}: missing; {index_name} says that it holds {len(shards[shard])} tensors; "
                "download it again"
            )
        found, sizes[shard] = read_header(folder, shard)
        # Converters drop a head that shares the embedding's memory from the shard and forget it in the index (bigcode's
        # octocoder).
        missing = sorted(shards[shard] - found.keys() - tied_heads)
        extra = sorted(found.keys() - shards[shard])
        if missing:
            raise DataError(
                f"{folder.folder / shard}: lacks {missing[0]!r} ({len(missing)} in all), which {index_name} says it "
                "holds"
            )
        if extra:
            where = f"lies in {weight_map[extra[0]]!r}" if extra[0] in weight_map else "does not exist"
            raise DataError(
                f"{folder.folder / shard}: holds {extra[0]!r} ({len(extra)} in all), which {where} according to "
                f"{index_name}"
            )
        tensors.update(found)
    return _Weights((index_name, *sorted(shards)), tensors, sizes)


def _tied_heads(config: Mapping[str, Any]) -> frozenset[str]:
    """The head's name when it is the embedding, so that the file need not hold it."""
    family = FAMILIES.get(config["model_type"]) if isinstance(config.get("model_type"), str) else None
    if family is None or not config.get("tie_word_embeddings", family.head_tied):
        return frozenset()
    return frozenset({f"{family.published_head}.weight"})
