"""Text into token windows, windows into the inputs of each block, inputs into Hessians.

Calibration sees a model one block at a time: a `Stream` holds the inputs of the block whose turn it is, as the quantized blocks before
it produce them, and moves on when the block is done. Memory is one block, its inputs, and the Hessians of one stage.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlm.arch import FamilySpec
from qlm.errors import DataError, MissingInput, Unavailable, UsageError
from qlm.kernels.cuda_ops import has_bfloat16
from qlm.recipe import CalibrationRecipe, DataSource, HubDataset

# Longest window by default; the protocol of the GPTQ paper, and what the families were trained with at least.
LONGEST_WINDOW = 2048
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
    """Read a text file (one document), a JSONL file (one a line) or a hub dataset (one a row). To calibrate with, a prompt and its
    completion, as fine-tuning takes them, are one document; where it is measured they are refused, for only completions should count.

    Raises:
        MissingInput: no such file, or the hub cannot be reached. DataError: not text. UsageError: nothing in it.
    """
    if isinstance(source.data, HubDataset):
        text = _read_hub(source.data)
    else:
        text = _read_file(Path(source.data), source.column, joins_pairs=isinstance(source, CalibrationRecipe))
    if not any(document.strip() for document in text.documents):
        raise UsageError(f"{text.description}: there is no text in it")
    return text


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark. Raises MissingInput or DataError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file") from None
    except OSError as error:
        raise MissingInput(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")  # the byte order mark of some editors
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}") from None
    if "\0" in text:
        raise DataError(f"{path}: not text: there is a NUL character at {text.index(chr(0))}")
    return text


def _read_file(path: Path, column: str, *, joins_pairs: bool) -> Text:
    text = read_utf8(path)
    if path.suffix != ".jsonl":
        return Text((text,), path.name)
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
            is_object = isinstance(sample, dict)
            is_pair = is_object and column not in sample and "prompt" in sample and "completion" in sample
            if is_pair and not joins_pairs:
                raise DataError(
                    f"{path}:{number}: found 'prompt' and 'completion', and a perplexity would count the prompts too; expected {column!r}: "
                    "give a plain text, or measure completions alone with qlm finetune, as its train.validation"
                )
            document = sample["prompt"] + sample["completion"] if is_pair else sample[column]
            document.encode()  # half a character (an escaped surrogate) is no text
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DataError(f"{path}:{number}: expected a JSON object with a string {column!r}") from None
        documents.append(document)
    return Text(tuple(documents), path.name)


def hub_rows(source: HubDataset) -> tuple[Any, str]:
    """The rows of a hub dataset, a `datasets.Dataset`, and its name. Raises MissingInput or Unavailable."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise Unavailable("data: a hub dataset needs the package datasets; install it, or give a text file") from None
    name = "/".join(part for part in (source.name, source.config, source.split) if part)
    try:
        data_files = (
            source.data_files if source.data_files is None else dict.fromkeys([source.split], source.data_files)
        )
        rows = load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, data_files=data_files
        )  # fmt: skip
    except Exception as error:  # every layer of the hub client raises its own kinds
        raise MissingInput(f"data: {name} cannot be read: {type(error).__name__}: {error}") from None
    return rows, name


def _read_hub(source: HubDataset) -> Text:
    rows, name = hub_rows(source)
    if source.column not in rows.column_names:
        raise UsageError(f"data: {name} has no column {source.column!r}; it has {', '.join(rows.column_names)}")
    documents = tuple(rows[source.column])
    if not all(isinstance(document, str) for document in documents):
        raise UsageError(f"data: {name}: column {source.column!r} holds more than text; name one that holds text alone")
    return Text(documents, name)


def text_ids(tokenizer: Any, text: str, spec: FamilySpec) -> Tensor:
    """The ids of `text` as one sequence: int64 [N], from one tokenizer call, with BOS by the family's rule.

    The call asks for no special tokens, so that the tokenizer's own settings cannot add a second BOS or an EOS. The
    rule is applied here: `spec.bos_id` once at the front if `spec.bos_first`, else nothing. An empty text gives BOS
    alone or no id.

    Raises DataError if the tokenizer's own special tokens are neither none nor the rule's: then it is not the family's.
    """
    plain = _call(tokenizer, "a", special=False)
    allowed = [plain, [spec.bos_id, *plain]] if spec.bos_first else [plain]
    found = _call(tokenizer, "a", special=True)
    if found not in allowed:
        rule = f"{allowed[-1]} for {spec.model_type} (BOS: {bos_rule(spec)})"
        raise DataError(f"the tokenizer turns 'a' into {found}, expected {rule}: it is another family's")
    own_bos = getattr(tokenizer, "bos_token_id", None)
    if spec.bos_first and own_bos not in (None, spec.bos_id):
        raise DataError(f"the tokenizer's BOS has id {own_bos}, expected {spec.bos_id} for {spec.model_type}")
    ids = _call(tokenizer, text, special=False)
    return torch.tensor([spec.bos_id, *ids] if spec.bos_first else ids, dtype=torch.int64)


def _call(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    # verbose would warn that the text is longer than the model's positions; it is cut into windows later.
    return list(
        tokenizer(text, add_special_tokens=special, truncation=False, padding=False, verbose=False)["input_ids"]
    )


def calibration_dtype(device: str) -> torch.dtype:
    """What blocks compute in while calibrating: bf16 where the hardware multiplies it, fp32 elsewhere. Hessians are fp32 always."""
    if device.startswith("cuda"):
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def bos_rule(spec: FamilySpec) -> str:
    """The family's BOS rule in words, as reports give it."""
    return f"id {spec.bos_id} once at the start of the text" if spec.bos_first else "none added"


def window_length(length: int | None, positions: int) -> int:
    """The length asked for, or the model's own, 2048 at most. Raises UsageError for one longer than the positions."""
    if length is not None and length > positions:
        raise UsageError(f"length: windows of {length} tokens, but the model has {positions} positions")
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


def check_windows(windows: Any, spec: FamilySpec, config: Any) -> None:
    """Refuse windows that the model cannot read.

    Raises:
        UsageError: not int64 [samples, length], or longer than the positions. DataError: an id that the model does not have.
    """
    if not isinstance(windows, Tensor) or windows.dtype != torch.int64 or windows.ndim != 2 or not windows.numel():
        what = f"{windows.dtype} {list(windows.shape)}" if isinstance(windows, Tensor) else type(windows).__name__
        raise UsageError(f"calibration: found {what}; expected token ids, int64 [samples, length]")
    window_length(windows.shape[1], int(getattr(config, spec.positions)))
    if int(windows.min()) < 0 or int(windows.max()) >= config.vocab_size:
        raise DataError(
            f"calibration: ids from {int(windows.min())} to {int(windows.max())}, but the model has {config.vocab_size} "
            "tokens: the tokenizer is another model's"
        )


@contextmanager
def instead_of_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in the place of a module's own inside; one that the instance had before, such as accelerate's, comes back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Dropout off inside; afterwards every module is in the mode it was in (they may differ inside one model)."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True
