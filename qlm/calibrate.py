"""Text into token windows, windows into the inputs of each block, inputs into Hessians.

Calibration sees a model one block at a time: a `Stream` holds the inputs of the block whose turn it is, as the quantized blocks before
it produce them, and moves on when the block is done. Memory is one block, its inputs, and the Hessians of one stage.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlm.arch import FamilySpec, LinearGroup
from qlm.backends import Statistics
from qlm.errors import DataError, MissingInput, Unavailable, UsageError
from qlm.numerics.gptq import add_gram_, finish_hessian_
from qlm.recipe import DataSource, HubDataset

# Longest window by default; the protocol of the GPTQ paper, and what the families were trained with at least.
LONGEST_WINDOW = 2048
# Tokens that go through a block at once: large enough for full speed, small enough that activations stay below a block's size.
BATCH_TOKENS = 4096
# A dataset of gigabytes is not read to its end for a few hundred windows: documents are drawn until this many characters a token.
CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Text:
    """The documents of a data source, and a name for them that has no machine's path in it."""

    documents: tuple[str, ...]
    description: str

    @property
    def joined(self) -> str:
        """The documents joined by an empty line, as the canonical perplexity protocol wants them."""
        return "\n\n".join(self.documents)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.joined.encode()).hexdigest()


def read_text(source: DataSource) -> Text:
    """Read a text file (one document), a JSONL file (one a line) or a hub dataset (one a row).

    Raises:
        MissingInput: no such file, or the hub cannot be reached. DataError: not text. UsageError: nothing in it.
    """
    if isinstance(source.data, HubDataset):
        text = _read_hub(source.data)
    else:
        text = _read_file(Path(source.data), source.column)
    if not any(document.strip() for document in text.documents):
        raise UsageError(f"{text.description}: there is no text in it")
    return text


def _read_file(path: Path, column: str) -> Text:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file") from None
    except OSError as error:
        raise MissingInput(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}") from None
    if "\0" in text:
        raise DataError(f"{path}: not text: there is a NUL character at {text.index(chr(0))}")
    if path.suffix != ".jsonl":
        return Text((text,), path.name)
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)[column]
        except (ValueError, TypeError, KeyError):
            document = None
        if not isinstance(document, str):
            raise DataError(f"{path}:{number}: expected a JSON object with a string {column!r}")
        documents.append(document)
    return Text(tuple(documents), path.name)


def _read_hub(source: HubDataset) -> Text:
    try:
        from datasets import load_dataset
    except ImportError:
        raise Unavailable("data: a hub dataset needs the package datasets; install it, or give a text file") from None
    name = "/".join(part for part in (source.name, source.config, source.split) if part)
    try:
        data_files = source.data_files if source.data_files is None else dict.fromkeys([source.split], source.data_files)
        rows = load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, data_files=data_files
        )  # fmt: skip
        documents = rows[source.column]
    except KeyError:
        raise UsageError(f"data: {name} has no column {source.column!r}; it has {', '.join(rows.column_names)}") from None
    except Exception as error:  # every layer of the hub client raises its own kinds
        raise MissingInput(f"data: {name} cannot be read: {type(error).__name__}: {error}") from None
    return Text(tuple(documents), name)


def text_ids(tokenizer: Any, text: str, spec: FamilySpec) -> Tensor:
    """One tokenizer call on the whole text: int64 [T], BOS once at the front where the family has it, nothing else added."""
    ids = tokenizer(text, verbose=False).input_ids
    if spec.bos_first and ids[:1] != [spec.bos_id]:
        raise DataError(f"the tokenizer starts a text with {ids[:1]}, but every {spec.model_type} text starts with {spec.bos_id}")
    return torch.tensor(ids, dtype=torch.int64)


def window_length(length: int | None, positions: int) -> int:
    """The length asked for, or the model's own, 2048 at most. Raises UsageError for one longer than the positions."""
    if length is not None and length > positions:
        raise UsageError(f"length: {length} tokens, but the model has {positions} positions")
    return length or min(positions, LONGEST_WINDOW)


def calibration_windows(
    text: Text, tokenizer: Any, spec: FamilySpec, *, samples: int, length: int, seed: int
) -> Tensor:
    """`samples` windows of `length` tokens, drawn without overlap: int64 [samples, length]. The text is tokenized once.

    Raises:
        UsageError: too little text; says how much is missing.
    """
    generator = torch.Generator().manual_seed(seed)
    documents: Sequence[str] = text.documents
    budget = samples * length * CHARACTERS_PER_TOKEN
    if len(documents) > 1 and sum(map(len, documents)) > budget:
        drawn, size = [], 0
        for index in torch.randperm(len(documents), generator=generator).tolist():
            drawn.append(documents[index])
            size += len(documents[index])
            if size > budget:
                break
        documents = drawn
    ids = text_ids(tokenizer, "\n\n".join(documents), spec)
    available = len(ids) // length
    if available < samples:
        raise UsageError(
            f"calibration: {text.description} has {len(ids)} tokens, which is {available} windows of {length}, but "
            f"{samples} samples need {samples * length}: {samples * length - len(ids)} tokens are missing; give more text or "
            "ask for fewer or shorter samples"
        )
    chosen = torch.randperm(available, generator=generator)[:samples]
    return ids[: available * length].view(available, length)[chosen]


class _Stop(Exception):
    """Ends a forward pass that has gone far enough."""


class Stream:
    """The inputs of one block after another.

    Attributes:
        hidden: [samples, length, hidden size], the inputs of the next block, in the dtype that the blocks compute in.
    """

    def __init__(self, model: nn.Module, first_block: str, windows: Tensor, device: str = "cpu") -> None:
        """Run the model up to its first block.

        Args:
            model: with embeddings filled in; its blocks may be empty.
            first_block: path of the block.
            windows: int64 [samples, length].
        """
        size = max(1, BATCH_TOKENS // windows.shape[1])
        self._arguments: list[dict[str, Any]] = []
        batches: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batches.append(args[0])
            self._arguments.append(kwargs)
            raise _Stop

        hook = model.get_submodule(first_block).register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in windows.split(size):
                try:
                    model(input_ids=batch.to(device), use_cache=False)
                except _Stop:
                    pass
        finally:
            hook.remove()
        self.hidden = torch.cat(batches)
        self._size = size

    def statistics(self, block: nn.Module, groups: Sequence[LinearGroup], path: str) -> Mapping[LinearGroup, Statistics]:
        """The Hessians of what `groups` read, from one pass through the block that ends when the last of them has been reached.

        Raises:
            DataError: an activation is NaN or infinite; names the layer.
        """
        sums: dict[LinearGroup, Tensor] = {}
        tokens = self.hidden.shape[0] * self.hidden.shape[1]
        waiting: set[LinearGroup] = set()

        def hook_for(group: LinearGroup) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                if not bool(x.isfinite().all()):
                    raise DataError(
                        f"{path}.{group.linears[0]}: {int((~x.isfinite()).sum())} of {x.numel()} values of its input are NaN "
                        "or infinite on the calibration text; the checkpoint or an earlier layer is damaged"
                    )
                if group not in sums:
                    sums[group] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
                add_gram_(sums[group], x)
                waiting.discard(group)
                if not waiting:
                    raise _Stop

            return hook

        hooks = [block.get_submodule(group.linears[0]).register_forward_pre_hook(hook_for(group)) for group in groups]
        try:
            for batch, kwargs in zip(self.hidden.split(self._size), self._arguments, strict=True):
                waiting.update(groups)
                try:
                    block(batch, **kwargs)
                except _Stop:
                    pass
        finally:
            for handle in hooks:
                handle.remove()
        return {group: Statistics(finish_hessian_(total, tokens), tokens) for group, total in sums.items()}

    def advance(self, block: nn.Module) -> None:
        """Replace the inputs of `block` by its outputs, in place."""
        for batch, kwargs in zip(self.hidden.split(self._size), self._arguments, strict=True):
            batch.copy_(block(batch, **kwargs))
