"""A causal LM's checkpoint opened for the CPU engine: every name, shape and dtype checked, nothing read yet, no torch.

As strict as `load`, which builds transformers' model, with which it shares all checks; what it expects comes from
qlm/arch and not from transformers' classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlm.arch import FamilySpec
from qlm.arch.shapes import causal_lm_linears, causal_lm_shapes, complete_fields
from qlm.checkpoint.config import read_config
from qlm.checkpoint.expected import check_tied_head, embedding_dtype, match_tensors
from qlm.checkpoint.reader import Checkpoint, MappedTensor
from qlm.errors import UsageError
from qlm.formats import FORMATS, QUANTO_MAP, format_of
from qlm.formats.dtypes import FLOATS
from qlm.formats.layout import TensorLayout


@dataclass(frozen=True)
class OpenedCheckpoint:
    """Attributes:
    fields: the config's checked fields, those that it leaves out filled in; `rope_parameters` for GPT-NeoX.
    dtype: safetensors name of the token embedding's dtype.
    backend: name in `FORMATS` of how the quantized linears are stored; None for a float checkpoint.
    formats: path of each quantized linear to its format; empty for a float checkpoint.
    linears: path of each linear, quantized or not, to its shape (O, I).
    tensors: published name of each tensor to its name in the files. The head's is always there: a tied head's is
        the embedding's.
    tied: whether the head is the embedding.
    """

    checkpoint: Checkpoint
    spec: FamilySpec
    fields: Mapping[str, Any]
    dtype: str
    backend: str | None
    formats: Mapping[str, Any]
    linears: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, str]
    tied: bool

    def map(self, name: str) -> MappedTensor:
        """The tensor of that published name; errors as `Checkpoint.map`."""
        return self.checkpoint.map(self.tensors[name])

    def map_linear(self, path: str) -> dict[str, MappedTensor]:
        """The tensors of a linear without its bias, by their names after its path: "weight" alone where it is not
        quantized, else those of the format's layout.
        """
        if path not in self.formats:
            return {"weight": self.map(f"{path}.weight")}
        assert self.backend is not None
        layout = FORMATS[self.backend].layout(self.linears[path], self.formats[path])
        return {suffix: self.map(f"{path}.{suffix}") for suffix in layout}


def open_causal_lm(model: str | Path, revision: str | None = None) -> OpenedCheckpoint:
    """Open a folder, a hub cache folder, or a hub id, and check every tensor's name, shape and dtype.

    Raises:
        MissingInput, DataError: see checkpoint/reader.py; one line that names file and tensor.
        UsageError: the checkpoint is quanto's.
    """
    checkpoint = Checkpoint.open(model, revision)
    spec, given = read_config(checkpoint)
    fields = complete_fields(spec, given)
    shapes, linears = causal_lm_shapes(spec, fields), causal_lm_linears(spec, fields)
    dtype = embedding_dtype(checkpoint, spec)
    backend, formats = _read_formats(checkpoint, list(linears), dtype)

    expected: dict[str, TensorLayout] = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path in formats:
            assert backend is not None
            for suffix, layout in FORMATS[backend].layout(linears[path], formats[path]).items():
                expected[f"{path}.{suffix}"] = layout
        else:
            expected[name] = TensorLayout(shape, FLOATS)

    tied = fields["tie_word_embeddings"]
    head, embedding = f"{spec.published_head}.weight", f"{spec.prefix}.{spec.embedding}.weight"
    tensors = match_tensors(checkpoint, spec, expected, optional={head} if tied else ())
    if tied:
        check_tied_head(checkpoint, tensors[head], tensors[embedding])
        tensors[head] = tensors[embedding]
    return OpenedCheckpoint(checkpoint, spec, fields, dtype, backend, formats, linears, tensors, tied)


def _read_formats(checkpoint: Checkpoint, linears: list[str], dtype: str) -> tuple[str | None, Mapping[str, Any]]:
    config = checkpoint.quantize_config
    if config is not None:
        backend = format_of(config)
        return backend, FORMATS[backend].read(config, linears, dtype)
    if checkpoint.path(QUANTO_MAP) is not None:
        raise UsageError(
            f"{checkpoint.source}: quantized by quanto, which the CPU engine does not run; run it with "
            "--runtime transformers"
        )
    return None, {}
