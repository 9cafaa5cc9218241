"""A checkpoint as the CPU decoder sees it: the native description of a model, whose matrices stay in the mapped files.

`Weights.open` checks the checkpoint (checkpoint/causal_lm.py), maps its files and fills in `qlm_model` (kernels/cpu/abi.h).
Memory of its own have only what the kernels want in another form: biases and norms as float32, row sums of int8 weights,
decoded zero points and arranged words of GPTQ weights, int8 weights whose inputs are not rounded, and a head that is held in int8. Everything else
is read from the page cache where it lies.

No torch and no transformers here. What the kernels cannot run is refused, with the way out (`--runtime transformers`).
"""

import ctypes
import functools
import mmap
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from qlm.arch import FamilySpec
from qlm.checkpoint.adapter import Adapter, Delta, files_on_record, read_adapter, refuse_other_base
from qlm.checkpoint.causal_lm import OpenedCheckpoint, open_causal_lm
from qlm.checkpoint.reader import Checkpoint, MappedTensor
from qlm.errors import DataError, QlmError, UsageError
from qlm.formats import gptq, nf4
from qlm.formats.dtypes import to_float32
from qlm.formats.layout import in_block
from qlm.kernels import activations, cpu

HEADS: Final = ("auto", "int8", "float")
DTYPE_CODES: Final = {"F32": cpu.F32, "F16": cpu.F16, "BF16": cpu.BF16}
# What a float dtype is called where a person reads it.
_READABLE: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

ACTIVATIONS: Final = {
    "relu": cpu.RELU,
    "gelu": cpu.GELU,
    "gelu_python": cpu.GELU,
    "gelu_new": cpu.GELU_TANH,
    "gelu_fast": cpu.GELU_TANH,
    "gelu_pytorch_tanh": cpu.GELU_TANH,
}
# OPT's config has no field for it: torch's default, which the released models were trained with.
OPT_LAYER_NORM_EPS: Final = 1e-5
# Of a head that is turned into int8: so many rows are in memory in both forms.
_ROWS_AT_A_TIME = 4096


class Weights:
    """An opened checkpoint and its native description. Keep it as long as a decoder uses it.

    Attributes:
        opened: the checked checkpoint.
        config: its config's fields, complete.
        spec: its family.
        model: the native structure; its pointers stay valid as long as this object lives.
        facts: for people and reports:
            model_type, backend ("float", "int8", "nf4" or "gptq"), bits (of most of the linears), dtype (of the tensors
            that are not quantized), head (what its matrix is multiplied as: "int8" or a float dtype), activations (how
            the kernels round them: "float", "int8 in groups of 128", or several such), bytes_per_token (that one decoded
            token reads: all linears with their scales and adapters, and the head), checkpoint_bytes (of its tensors), and, where
            there is one, adapter: how it is known to belong to the checkpoint, in words.
    """

    def __init__(
        self, opened: OpenedCheckpoint, head: str, team: cpu.Team, adapter: Adapter | None = None, belongs: str = ""
    ) -> None:
        self.opened = opened
        self.config: Mapping[str, Any] = opened.fields
        self.spec: FamilySpec = opened.spec
        native = cpu.library()
        registered: list[int] = []
        # Unregistered before the files are unmapped: the finalizer keeps the checkpoint.
        self._finalizer = weakref.finalize(self, _unregister, native, registered, opened.checkpoint)
        # All files first, so that none can end the process by shrinking while it is looked at below.
        for name in opened.tensors.values():
            opened.checkpoint.map(name)
        for mapped in opened.checkpoint.mappings():
            native.qlm_mapping_register(mapped.ctypes.data, mapped.nbytes)
            registered.append(mapped.ctypes.data)
        builder = _Builder(opened, team, adapter.deltas() if adapter is not None else {})
        self.model = _FAMILIES[self.spec.model_type](builder)
        kind = builder.head(self.model, head)
        self._keep = builder.keep
        # What was read here and not by the decoder, such as norms: zeros must not pass for their values.
        for address in registered:
            native.qlm_mapping_check(address)
        self.facts: dict[str, Any] = _facts(opened, kind, builder.bytes_per_token)
        if adapter is not None:
            self.facts["adapter"] = belongs

    @classmethod
    def open(
        cls,
        path: str | Path,
        revision: str | None = None,
        head: str = "auto",
        threads: int | None = None,
        adapter: str | Path | None = None,
    ) -> "Weights":
        """Open a folder, a hub cache folder or a hub id.

        Args:
            head: what the head's matrix is held as. "float": as the file has it. "int8": quantized here, one scale for
                each row, in memory. "auto": int8 for a quantized checkpoint, whose head is the largest matrix that is
                left in floating point; float for a float checkpoint, whose numbers should be its own.
            threads: that prepare the weights; as many as the process may use by default.
            adapter: folder of a LoRA adapter to compute beside the linears, in float32.

        Raises:
            MissingInput, DataError: the checkpoint or the adapter is not there, damaged, or not what its config says, or they do not
                belong together.
            UsageError: something that the CPU engine does not run, or another `head`.
            Unavailable: the CPU kernels are not installed, or not enough memory.
        """
        if head not in HEADS:
            raise UsageError(f"head: {head!r}; expected one of {', '.join(HEADS)}")
        cpu.library()  # says first of all if there is none
        opened = open_causal_lm(path, revision)
        read = None if adapter is None else read_adapter(adapter)
        belongs = "" if read is None else _belongs(read, opened, path, revision)
        with cpu.Team(threads) as team:
            return cls(opened, head, team, read, belongs)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.opened.checkpoint


def _belongs(adapter: Adapter, opened: OpenedCheckpoint, path: str | Path, revision: str | None) -> str:
    """How the adapter is known to belong to the checkpoint; raises DataError where it does not."""
    if adapter.task != "causal-lm":
        raise UsageError(
            f"{adapter.folder}: an adapter for {adapter.task}; the CPU engine runs language models; 'qlm merge' makes a model with that head of it, or see qlm.apply_adapter"
        )
    linears = {name: shape for name, shape in opened.linears.items() if in_block(name)}
    adapter.check(linears, {}, opened.spec.model_type)
    return refuse_other_base(adapter, opened.checkpoint.folder, files_on_record(path, revision))


def _unregister(native: cpu.Native, registered: list[int], checkpoint: Checkpoint) -> None:
    for address in registered:
        native.qlm_mapping_unregister(address)


def _facts(opened: OpenedCheckpoint, head: str, bytes_per_token: int) -> dict[str, Any]:
    blocks = [path for path in opened.linears if path != opened.spec.published_head]
    bits = Counter(_bits(opened, path) for path in blocks).most_common(1)[0][0]
    checkpoint = opened.checkpoint
    return {
        "model_type": opened.spec.model_type,
        "backend": opened.backend or "float",
        "bits": bits,
        "dtype": _READABLE[opened.dtype],
        "head": head,
        "activations": activations.together(
            {_activations(opened, path) for path in opened.formats}
            | ({f"{activations.PER_TOKEN} (head)"} if head == "int8" else set())
        ),
        "bytes_per_token": bytes_per_token,
        "checkpoint_bytes": sum(checkpoint.map(name).nbytes for name in {*opened.tensors.values()}),
    }


def _activations(opened: OpenedCheckpoint, path: str) -> str:
    """What the kernels do with the input of a quantized linear."""
    how = opened.formats[path]
    if opened.backend == "int8":
        return activations.FLOAT if how.float_input else activations.PER_TOKEN
    if opened.backend == "nf4":
        return activations.in_groups(activations.NF4_GROUP)
    group_size = opened.linears[path][1] if how.group_size == -1 else how.group_size
    return activations.in_groups(activations.gptq_group(group_size, how.bits))


def _bits(opened: OpenedCheckpoint, path: str) -> int:
    if path not in opened.formats:
        return 32 if opened.map(f"{path}.weight").dtype == "F32" else 16
    if opened.backend == "gptq":
        return int(opened.formats[path].bits)
    return {"int8": 8, "nf4": 4}[str(opened.backend)]


@dataclass(frozen=True)
class _Paths:
    """Where the parts of a block are, relative to the block."""

    qkv: tuple[str, ...]
    attention_out: str
    up: str
    down: str
    attention_norm: str
    mlp_norm: str


class _Builder:
    """From names to native structures, and what must be kept alive for them.

    Attributes:
        bytes_per_token: of what the linears made so far read for one token.
    """

    def __init__(self, opened: OpenedCheckpoint, team: cpu.Team, deltas: Mapping[str, Delta]) -> None:
        self.opened, self.team, self.deltas = opened, team, deltas
        self.keep: list[Any] = [opened]
        self.bytes_per_token = 0
        self.native = cpu.library()

    def address(self, array: np.ndarray) -> int:
        """Of the first element; keeps the array."""
        self.keep.append(array)
        return int(array.ctypes.data)

    def vector(self, name: str) -> int | None:
        """A bias or a norm's weight as float32; None where the model has none."""
        if name not in self.opened.tensors:
            return None
        mapped = self.opened.map(name)
        return self.address(_finite(to_float32(mapped.array, mapped.dtype), name))

    def norm(self, path: str) -> cpu.Norm:
        return cpu.Norm(weight=self.vector(f"{path}.weight"), bias=self.vector(f"{path}.bias"))

    def linear(self, path: str) -> cpu.Linear:
        """One linear, as it is stored.

        Raises:
            UsageError: the kernels cannot run it.
        """
        rows, columns = self.opened.linears[path]
        linear = cpu.Linear(in_features=columns, out_features=rows, bias=self.vector(f"{path}.bias"))
        mapped = self.opened.map_linear(path)
        fill = {None: _fill_float, "int8": _fill_int8, "gptq": _fill_gptq, "nf4": _fill_nf4}
        try:
            self.bytes_per_token += fill[self.opened.backend if path in self.opened.formats else None](
                self, linear, mapped, path
            )
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if linear.bias:
            self.bytes_per_token += 4 * rows
        if path in self.deltas:
            self.add_adapter(linear, self.deltas[path])
        try:
            self.native.qlm_linear_check(linear)
        except UsageError as error:
            raise UsageError(f"{path}: {error}; run it with --runtime transformers") from None
        return linear

    def add_adapter(self, linear: cpu.Linear, delta: Delta) -> None:
        a = np.ascontiguousarray(delta.a)
        b = np.ascontiguousarray((np.float32(delta.scaling) * delta.b).T)
        linear.rank, linear.adapter_a, linear.adapter_b = len(a), self.address(a), self.address(b)
        self.bytes_per_token += a.nbytes + b.nbytes

    def blocks(self, prefix: str, count: int, paths: _Paths) -> Any:
        """ctypes array of the blocks."""
        blocks = (cpu.Block * count)()
        for i, block in enumerate(blocks):
            at = f"{prefix}.{i}"
            block.attention_norm, block.mlp_norm = (
                self.norm(f"{at}.{name}") for name in (paths.attention_norm, paths.mlp_norm)
            )
            for j, name in enumerate(paths.qkv):
                block.qkv[j] = self.linear(f"{at}.{name}")
            block.attention_out, block.up, block.down = (
                self.linear(f"{at}.{name}") for name in (paths.attention_out, paths.up, paths.down)
            )
        self.keep.append(blocks)
        return blocks

    def pointer(self, linear: cpu.Linear) -> Any:
        self.keep.append(linear)
        return ctypes.pointer(linear)

    def head(self, model: cpu.Model, head: str) -> str:
        """Fill in the model's head; returns what it is held as."""
        path = self.opened.spec.published_head
        mapped = self.opened.map(f"{path}.weight")
        if head == "float" or (head == "auto" and self.opened.backend is None):
            model.head = self.linear(path)
            return _READABLE[mapped.dtype]
        rows, columns = mapped.shape
        codes, scale, sums = np.empty(mapped.shape, np.int8), np.empty(rows, np.float32), np.empty(rows, np.int32)
        row_bytes = mapped.nbytes // rows
        for first in range(0, rows, _ROWS_AT_A_TIME):
            count = min(_ROWS_AT_A_TIME, rows - first)
            start = mapped.address + first * row_bytes
            try:
                self.native.qlm_int8_quantize_rows(
                    self.team.handle, start, DTYPE_CODES[mapped.dtype], count, columns,
                    codes[first:].ctypes.data, scale[first:].ctypes.data, sums[first:].ctypes.data,
                )  # fmt: skip
            except QlmError as error:
                raise type(error)(f"{path}.weight, from row {first} on: {error}") from None
            # The embedding shares these pages where the head is tied: rows that are looked up come back by themselves.
            self.forget_pages(start, count * row_bytes)
        model.head = cpu.Linear(
            in_features=columns, out_features=rows, format=cpu.INT8, weight=self.address(codes), scale_dtype=cpu.F32,
            scale=self.address(scale), row_sum=self.address(sums), bias=self.vector(f"{path}.bias"),
        )  # fmt: skip
        self.native.qlm_linear_check(model.head)
        self.bytes_per_token += codes.nbytes + scale.nbytes + sums.nbytes
        return "int8"

    def forget_pages(self, address: int, nbytes: int) -> None:
        """Tell the kernel that pages of a file are not needed any more: they stay in the page cache, and do not count
        as this process's memory. Pages that reach beyond the range are left.
        """
        page = mmap.PAGESIZE
        start, stop = -(-address // page) * page, (address + nbytes) // page * page
        # A tensor that was copied into memory is not in a file: for it the advice would mean zeros.
        inside = any(0 <= address - file.ctypes.data < file.nbytes for file in self.opened.checkpoint.mappings())
        if inside and stop > start:
            _madvise()(start, stop - start, mmap.MADV_DONTNEED)  # advice: that it is not taken harms nobody


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        first = int(np.argmin(np.isfinite(values.reshape(-1))))
        raise DataError(f"{name}: value number {first} is NaN or infinite; the checkpoint is damaged")
    return values


def _scale(b: _Builder, linear: cpu.Linear, mapped: MappedTensor, name: str) -> int:
    """The scale as stored; returns its bytes."""
    _finite(to_float32(mapped.array, mapped.dtype), name)
    linear.scale, linear.scale_dtype = mapped.address, DTYPE_CODES[mapped.dtype]
    return mapped.nbytes


def _fill_float(b: _Builder, linear: cpu.Linear, mapped: Mapping[str, MappedTensor], path: str) -> int:
    weight = mapped["weight"]
    linear.format, linear.weight, linear.weight_dtype = cpu.FLOAT, weight.address, DTYPE_CODES[weight.dtype]
    return weight.nbytes


def _fill_int8(b: _Builder, linear: cpu.Linear, mapped: Mapping[str, MappedTensor], path: str) -> int:
    weight, rows = mapped["weight"], linear.out_features
    if b.opened.formats[path].float_input:
        # No kernel multiplies int8 with floats: such a linear is held as the floats that it stands for, in memory of its own.
        scale = _finite(to_float32(mapped["weight_scale"].array, mapped["weight_scale"].dtype), "weight_scale")
        floats = weight.array.astype(np.float32)
        floats *= scale.reshape(rows, 1)
        b.forget_pages(weight.address, weight.nbytes)
        linear.format, linear.weight, linear.weight_dtype = cpu.FLOAT, b.address(floats), cpu.F32
        return floats.nbytes
    linear.format, linear.weight = cpu.INT8, weight.address
    linear.symmetric_input = int(b.opened.formats[path].symmetric_input)
    sums = np.empty(rows, np.int32)
    b.native.qlm_int8_row_sums(b.team.handle, weight.address, rows, linear.in_features, sums.ctypes.data)
    linear.row_sum = b.address(sums)
    return weight.nbytes + sums.nbytes + _scale(b, linear, mapped["weight_scale"], "weight_scale")


def _fill_gptq(b: _Builder, linear: cpu.Linear, mapped: Mapping[str, MappedTensor], path: str) -> int:
    form, shape = b.opened.formats[path], b.opened.linears[path]
    parts = gptq.unpack({suffix: tensor.array for suffix, tensor in mapped.items()}, shape, form)
    linear.format, linear.bits, linear.group_size = cpu.GPTQ, form.bits, parts.group_size
    size = _scale(b, linear, mapped["scales"], "scales") + parts.qweight.nbytes + parts.zero_point.nbytes
    linear.zero_point = b.address(parts.zero_point)
    # In strips, which decode a third faster than the file's layout: the copy takes the place of the file's pages.
    words, order = mapped["qweight"], parts.order
    arranged = np.empty(words.shape, np.int32)
    b.native.qlm_gptq_arrange(
        b.team.handle, words.address, form.bits, shape[1], shape[0], None if order is None else order.ctypes.data,
        cpu.GPTQ_STRIP, arranged.ctypes.data,
    )  # fmt: skip
    b.forget_pages(words.address, words.nbytes)
    linear.weight, linear.strip = b.address(arranged), cpu.GPTQ_STRIP
    if order is not None:
        linear.order = b.address(order)
        size += order.nbytes
    return size


def _fill_nf4(b: _Builder, linear: cpu.Linear, mapped: Mapping[str, MappedTensor], path: str) -> int:
    parts = nf4.unpack(
        {suffix: tensor.array for suffix, tensor in mapped.items()}, b.opened.linears[path], b.opened.formats[path]
    )
    linear.format, linear.block, linear.weight = cpu.NF4, parts.block, mapped["weight"].address
    if parts.absmax is not None:
        linear.scale, linear.scale_dtype = b.address(_finite(parts.absmax, "weight.absmax")), cpu.F32
        return parts.weight.nbytes + parts.absmax.nbytes
    assert parts.absmax_code is not None
    assert parts.nested_code is not None
    assert parts.nested_absmax is not None
    linear.absmax_code, linear.nested_code = b.address(parts.absmax_code), b.address(parts.nested_code)
    linear.nested_absmax = b.address(_finite(parts.nested_absmax, "weight.nested_absmax"))
    linear.nested_block, linear.nested_offset = parts.nested_block, parts.nested_offset
    return parts.weight.nbytes + parts.absmax_code.nbytes + parts.nested_absmax.nbytes


# The families ---------------------------------------------------------------------------------------------------------


def _activation(name: str) -> int:
    if name not in ACTIVATIONS:
        raise UsageError(
            f"activation {name!r}: the CPU engine has {', '.join(ACTIVATIONS)}; run it with --runtime transformers"
        )
    return ACTIVATIONS[name]


def _common(b: _Builder, mlp: int, activation: str) -> cpu.Model:
    """What all families say in the same way. Heads' counts are those of plain multi-head attention."""
    fields, spec = b.opened.fields, b.opened.spec
    hidden, heads = fields[spec.hidden_size], fields[spec.heads]
    embedding = b.opened.map(f"{spec.prefix}.{spec.embedding}.weight")
    return cpu.Model(
        vocabulary=fields["vocab_size"], positions=fields[spec.positions], embedding_width=hidden, hidden=hidden,
        mlp=mlp, layers=fields[spec.layers], heads=heads, kv_heads=heads, head_dim=hidden // heads,
        attention_scale=(hidden // heads) ** -0.5, activation=_activation(activation), norm_before=1, has_final_norm=1,
        embedding=embedding.address, embedding_dtype=DTYPE_CODES[embedding.dtype],
    )  # fmt: skip


def _add_positions(b: _Builder, model: cpu.Model, name: str) -> None:
    table = b.opened.map(name)
    model.position, model.position_dtype = table.address, DTYPE_CODES[table.dtype]
    model.position_offset = b.opened.spec.position_offset


def _opt(b: _Builder) -> cpu.Model:
    c = b.opened.fields
    model = _common(b, c["ffn_dim"], c["activation_function"])
    model.norm_eps, model.qkv_layout = OPT_LAYER_NORM_EPS, cpu.QKV_SEPARATE
    model.norm_before = int(c["do_layer_norm_before"])
    model.has_final_norm = int(c["do_layer_norm_before"] and not c["_remove_final_layer_norm"])
    _add_positions(b, model, "model.decoder.embed_positions.weight")
    model.embedding_width = c["word_embed_proj_dim"]
    if c["word_embed_proj_dim"] != c["hidden_size"]:
        model.project_in = b.pointer(b.linear("model.decoder.project_in"))
        model.project_out = b.pointer(b.linear("model.decoder.project_out"))
    paths = _Paths(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj", "fc1", "fc2",
        "self_attn_layer_norm", "final_layer_norm",
    )  # fmt: skip
    model.blocks = b.blocks("model.decoder.layers", model.layers, paths)
    if model.has_final_norm:
        model.final_norm = b.norm("model.decoder.final_layer_norm")
    return model


def _gpt_neox(b: _Builder) -> cpu.Model:
    c = b.opened.fields
    model = _common(b, c["intermediate_size"], c["hidden_act"])
    model.norm_eps, model.qkv_layout = c["layer_norm_eps"], cpu.QKV_PER_HEAD
    model.parallel_residual = int(c["use_parallel_residual"])
    rotary = c["rope_parameters"]
    model.rotary_dims = int(model.head_dim * rotary["partial_rotary_factor"])
    model.rotary_base = rotary["rope_theta"]
    paths = _Paths(
        ("attention.query_key_value",), "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
        "input_layernorm", "post_attention_layernorm",
    )  # fmt: skip
    model.blocks = b.blocks("gpt_neox.layers", model.layers, paths)
    model.final_norm = b.norm("gpt_neox.final_layer_norm")
    return model


def _gpt_bigcode(b: _Builder) -> cpu.Model:
    c = b.opened.fields
    model = _common(b, c["n_inner"], c["activation_function"])
    model.norm_eps = c["layer_norm_epsilon"]
    model.qkv_layout = cpu.QKV_MULTI_QUERY if c["multi_query"] else cpu.QKV_PER_HEAD
    if c["multi_query"]:
        model.kv_heads = 1
    if not c["scale_attn_weights"]:
        model.attention_scale = 1.0
    _add_positions(b, model, "transformer.wpe.weight")
    paths = _Paths(("attn.c_attn",), "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")
    model.blocks = b.blocks("transformer.h", model.layers, paths)
    model.final_norm = b.norm("transformer.ln_f")
    return model


_FAMILIES: dict[str, Callable[[_Builder], cpu.Model]] = {
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "gpt_bigcode": _gpt_bigcode,
}
