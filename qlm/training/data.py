"""Text, JSONL or a hub dataset into rows of token ids and labels, and rows into batches. Knows no model and no training loop.

A row is what goes through the model as one sequence. A label of -100 (torch's `ignore_index`) is not learned. A language model's labels
are the row's own ids, and `language_loss` predicts each from those before it, so that nothing predicts the first token of a row: its
label is always -100, and whoever counts the other labels has counted what the loss is a mean of. Labels of a head are not shifted.

| sample | ids | learned |
|---|---|---|
| plain text | the whole file, BOS by the family's rule once at its start, cut into rows of `max_length` | every token |
| `text` | BOS by the rule, the text, EOS | the text and EOS |
| `prompt`, `completion` | BOS by the rule, the prompt, the completion, EOS | the completion and EOS |
| `text`, `label` | BOS by the rule, the text | the label |
| `tokens`, `labels` | BOS by the rule, the words with a space between | at each word's first token its label |
| `question`, `context`, `answer`, `answer_start` | BOS by the rule, the question, a line end, the context | where the answer starts and ends |

Prompt and completion are tokenized apart, as they are when the model is asked for a completion; nothing is put between them.

What it refuses: a sample that is not of these forms, or of which nothing would be learned, with its file and line. Nothing is cut or left
out without being counted in `Samples.facts`.
"""

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlm.arch import FamilySpec
from qlm.arch.spec import Task
from qlm.calibrate import hub_rows, read_utf8, text_ids
from qlm.checkpoint.strict_json import load_object
from qlm.errors import DataError, UsageError
from qlm.recipe import DataSource, HubDataset, TooLong
from qlm.strict_yaml import in_words

NOT_LEARNED = -100

Row = dict[str, list[int] | int]


@dataclass(frozen=True)
class Samples:
    """What training reads.

    Attributes:
        rows: `input_ids` with `labels` (a list of the same length, or one number), or with `start_positions` and `end_positions`.
        facts: `data` (the name of the file), its `bytes` and `sha256` (of a hub dataset: those of its rows as JSON), `rows`, `tokens`
            in them, `learned` (predictions that the loss counts), `left_over` (tokens after the last row of a plain text); but for plain
            text also `samples` read, `cut` and `skipped` (samples longer than a row), `empty` (rows of a hub dataset without text). A
            part of a file (`split`) has `rows`, `tokens` and `learned` of its own, and in `file` all but its name that is of the whole.
    """

    rows: list[Row]
    facts: dict[str, Any]


@dataclass
class _Encoded:
    """One sample as ids and what is learned of it; `where` names it in errors."""

    where: str
    ids: list[int]
    learned: Row

    def row(self, task: Task) -> Row:
        """The sample as a row of its own."""
        labels = self.learned.get("labels")
        if task == "causal-lm" and isinstance(labels, list):
            return {"input_ids": self.ids, "labels": [NOT_LEARNED, *labels[1:]]}
        return {"input_ids": self.ids, **self.learned}

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens."""
        del self.ids[length:]
        labels = self.learned.get("labels")
        if isinstance(labels, list):
            del labels[length:]
        end = self.learned.get("end_positions")
        if isinstance(end, int) and end >= length:
            self.learned["end_positions"] = NOT_LEARNED


def _learned(row: Row) -> int:
    """Predictions of a row, or of what is learned of a sample, that the loss counts."""
    if "end_positions" in row:
        return 0 if row["end_positions"] == NOT_LEARNED else 2
    labels = row["labels"]
    return sum(label != NOT_LEARNED for label in labels) if isinstance(labels, list) else 1


def read_samples(
    data: DataSource,
    tokenizer: Any,
    spec: FamilySpec,
    task: Task,
    *,
    max_length: int,
    packing: bool,
    too_long: TooLong,
    labels: Sequence[str] | None,
    eos_id: int | None = None,
) -> Samples:
    """The rows of a data source.

    Args:
        tokenizer: the model's, as `load_tokenizer` gives it.
        max_length: tokens of a row, at most.
        packing: causal-lm: whole samples side by side in a row, as many as fit. Attention sees over their borders.
        too_long: what becomes of a sample of more tokens. A sample that is cut so short that nothing of it is learned is an error.
        labels: names of the labels, in the order of their numbers; None where the task has none.
        eos_id: the id that ends a text; the tokenizer's by default.

    Raises:
        MissingInput: no such file, or the hub cannot be reached.
        DataError: not text, or a sample is damaged: `file:line: what was found; what is expected`.
        UsageError: nothing in it, a sample is too long, or plain text for a head.
    """
    is_plain = isinstance(data.data, str) and not data.is_jsonl
    if is_plain and task != "causal-lm":
        raise UsageError(
            f"train.data: found the text file {data.data} with task {task}; expected samples with labels, a .jsonl file"
        )
    if is_plain:
        return _plain_text(Path(str(data.data)), tokenizer, spec, max_length)
    source = _hub_samples(data.data) if isinstance(data.data, HubDataset) else _jsonl_samples(Path(data.data))
    bos = text_ids(tokenizer, "", spec).tolist()
    encode = _Encoder(tokenizer, bos, tokenizer.eos_token_id if eos_id is None else eos_id, _column(data), labels)
    forms: Mapping[Task, Callable[[Sequence[_Sample]], Iterable[_Encoded]]] = {
        "causal-lm": encode.texts,
        "sequence-classification": encode.classified_texts,
        "token-classification": encode.classified_words,
        "question-answering": encode.questions,
    }
    samples = source.samples
    if isinstance(data.data, HubDataset):
        samples = [sample for sample in samples if not sample.is_blank(encode.column)]
    if not samples:
        raise UsageError(f"{source.name}: there is no sample in it")
    facts: dict[str, Any] = {
        "data": source.name, "bytes": source.bytes, "sha256": source.sha256, "samples": len(samples), "rows": 0, "tokens": 0,
        "learned": 0, "cut": 0, "skipped": 0, "empty": len(source.samples) - len(samples), "left_over": 0,
    }  # fmt: skip
    kept: list[_Encoded] = []
    for sample in forms[task](samples):
        if len(sample.ids) > max_length:
            if too_long == "error":
                raise UsageError(
                    f"{sample.where}: found a sample of {len(sample.ids)} tokens; expected at most {max_length} (train.max_length); "
                    "'too_long: truncate' cuts such samples, 'skip' leaves them out"
                )
            facts["cut" if too_long == "truncate" else "skipped"] += 1
            if too_long == "skip":
                continue
            sample.cut(max_length)
            if not _learned(sample.learned):
                raise DataError(
                    f"{sample.where}: found a sample of which nothing is learned once it is cut to {max_length} tokens "
                    "(train.max_length); make it longer, or leave such samples out with 'too_long: skip'"
                )
        kept.append(sample)
    if not kept:
        raise UsageError(
            f"{source.name}: all {len(samples)} samples are longer than {max_length} tokens (train.max_length), and 'too_long: skip' "
            "leaves them out; nothing is left to learn"
        )
    rows = _pack(kept, max_length) if packing else [each.row(task) for each in kept]
    facts |= {"rows": len(rows), "tokens": sum(len(each.ids) for each in kept), "learned": sum(map(_learned, rows))}
    return Samples(rows, facts)


def split(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Rows to train on, and a share of them, drawn by `seed`, to measure on; both in the order that they had, at least one in each.

    Raises UsageError where there are not two rows.
    """
    total = len(samples.rows)
    own = {key: samples.facts[key] for key in ("data", "bytes", "sha256")}
    whole = {key: value for key, value in samples.facts.items() if key not in own}
    if total < 2:
        raise UsageError(
            f"train.validation: found a share of {total} row(s) of {samples.facts['data']}; give a file, or more data"
        )
    held = min(max(1, round(total * share)), total - 1)
    generator = torch.Generator().manual_seed(seed)
    chosen = set(torch.randperm(total, generator=generator)[:held].tolist())

    def part(is_held: bool) -> Samples:
        rows = [row for number, row in enumerate(samples.rows) if (number in chosen) == is_held]
        tokens = sum(len(_list(row["input_ids"])) for row in rows)
        facts = {"rows": len(rows), "tokens": tokens, "learned": sum(map(_learned, rows)), "file": whole}
        return Samples(rows, own | facts)

    return part(False), part(True)


def shortened(facts: Mapping[str, Mapping[str, Any]], max_length: int) -> dict[str, str]:
    """What was not read as it is, in words: `cut` and `left_out`, neither where everything was.

    Args:
        facts: those of `data` and, where there is one, of `validation`.
    """
    # Two parts of one file have their samples in common.
    read = [("samples", facts["data"].get("file", facts["data"]))]
    if "validation" in facts and "file" not in facts["validation"]:
        read.append(("for validation", facts["validation"]))

    def counted(key: str) -> str:
        return " and ".join(f"{each[key]:,} of {each['samples']:,} {what}" for what, each in read if each.get(key))

    words = {}
    if cut := counted("cut"):
        words["cut"] = f"{cut}, to {max_length:,} tokens (train.too_long)"
    out = [f"{skipped}, longer than {max_length:,} tokens (train.too_long)"] if (skipped := counted("skipped")) else []
    if empty := sum(each.get("empty", 0) for _, each in read):
        out.append(f"{empty:,} without text")
    return words | ({"left_out": "; ".join(out)} if out else {})


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """One batch: int64 `input_ids` and `attention_mask` [rows, T], padded on the right, with what the rows hold besides: `labels`
    [rows, T], -100 where padded, or `labels`, `start_positions` and `end_positions` [rows].
    """
    length = max(len(_list(row["input_ids"])) for row in rows)
    filler = {"input_ids": pad_id, "labels": NOT_LEARNED}
    batch = {}
    for key, first in rows[0].items():
        if isinstance(first, list):
            values: list[Any] = [[*_list(row[key]), *[filler[key]] * (length - len(_list(row[key])))] for row in rows]
        else:
            values = [row[key] for row in rows]
        batch[key] = torch.tensor(values, dtype=torch.int64)
    sizes = torch.tensor([len(_list(row["input_ids"])) for row in rows])
    batch["attention_mask"] = (torch.arange(length) < sizes[:, None]).to(torch.int64)
    return batch


# --- sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """A sample as it was read; `where` is "file:line"."""

    where: str
    value: Mapping[str, Any]

    def is_blank(self, column: str) -> bool:
        """Whether it is a row without text, of which some hub datasets are full."""
        text = self.value.get(column)
        return "prompt" not in self.value and isinstance(text, str) and not text.strip()

    def refuse(self, message: str) -> DataError:
        return DataError(f"{self.where}: {message}")

    def text(self, key: str, *, blank: bool = False) -> str:
        """The text under `key`, which may be empty if `blank`."""
        text = self.get(key, str, "a text")
        try:
            text.encode()
        except UnicodeEncodeError:  # an escaped surrogate
            raise self.refuse(f"found half a character in {key!r}; expected a text") from None
        if not blank and not text.strip():
            raise self.refuse(f"found an empty {key!r}; expected a text")
        return text

    def get(self, key: str, kind: type | tuple[type, ...], words: str) -> Any:
        if key not in self.value:
            found = ", ".join(map(repr, self.value)) or "no key"
            raise self.refuse(f"found {found}; expected the key {key!r} with {words}")
        value = self.value[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.refuse(f"found {_shown(value)} in {key!r}; expected {words}")
        return value


@dataclass(frozen=True)
class _Source:
    name: str
    bytes: int
    sha256: str
    samples: list[_Sample]


def _shown(value: object) -> str:
    return "an object" if isinstance(value, Mapping) else in_words(value)


def _column(data: DataSource) -> str:
    return data.data.column if isinstance(data.data, HubDataset) else data.column


def _jsonl_samples(path: Path) -> _Source:
    text = read_utf8(path)
    samples = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            samples.append(_Sample(where, load_object(line.encode(), where)))
    return _Source(path.name, path.stat().st_size, _sha256(path), samples)


def _hub_samples(source: HubDataset) -> _Source:
    rows, name = hub_rows(source)
    digest, size, samples = hashlib.sha256(), 0, []
    for number, row in enumerate(rows):
        line = json.dumps(row, sort_keys=True, default=str).encode() + b"\n"
        digest.update(line)
        size += len(line)
        samples.append(_Sample(f"{name}, row {number}", row))
    return _Source(name, size, digest.hexdigest(), samples)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain_text(path: Path, tokenizer: Any, spec: FamilySpec, max_length: int) -> Samples:
    text = read_utf8(path)
    if not text.strip():
        raise UsageError(f"{path.name}: there is no text in it")
    ids: list[int] = text_ids(tokenizer, text, spec).tolist()
    windows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    # Nothing is predicted in a row of one token.
    left_over = windows.pop() if len(windows[-1]) < 2 else []
    if not windows:
        raise UsageError(f"{path.name}: found one token; expected a text to learn from")
    rows: list[Row] = [{"input_ids": window, "labels": [NOT_LEARNED, *window[1:]]} for window in windows]
    facts: dict[str, Any] = {
        "data": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path), "rows": len(rows), "tokens": sum(map(len, windows)),
        "learned": sum(map(_learned, rows)), "left_over": len(left_over),
    }  # fmt: skip
    return Samples(rows, facts)


# --- samples into ids -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoder:
    """Turns samples into ids, one method for each form. Texts go to the tokenizer together, which is many times as fast."""

    tokenizer: Any
    bos: list[int]
    eos_id: int | None
    column: str
    labels: Sequence[str] | None
    _numbers: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {name: number for number, name in enumerate(self.labels or ())})

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        return [list(ids) for ids in found["input_ids"]]

    def texts(self, samples: Sequence[_Sample]) -> Iterator[_Encoded]:
        """`text`, or `prompt` and `completion`; both kinds may be in one file."""
        if self.eos_id is None:
            raise DataError("the tokenizer has no EOS, with which a text ends; expected an eos_token_id in config.json")
        pairs: list[tuple[str, str]] = []
        for sample in samples:
            is_pair = "prompt" in sample.value or "completion" in sample.value
            if is_pair and self.column in sample.value:
                raise sample.refuse(f"found {self.column!r} beside 'prompt' or 'completion'; expected one or the other")
            if is_pair:
                pair = (sample.text("prompt", blank=True), sample.text("completion", blank=True))
                if not "".join(pair).strip():
                    raise sample.refuse("found an empty 'prompt' and an empty 'completion'; expected a text")
                pairs.append(pair)
            else:
                pairs.append(("", sample.text(self.column)))
        prompts, completions = (self._ids([pair[side] for pair in pairs]) for side in (0, 1))
        for sample, prompt, completion in zip(samples, prompts, completions, strict=True):
            start = [*self.bos, *prompt]
            learned = [*completion, self.eos_id]
            labels = [NOT_LEARNED] * len(start) + learned
            yield _Encoded(sample.where, start + learned, {"labels": labels})

    def classified_texts(self, samples: Sequence[_Sample]) -> Iterator[_Encoded]:
        texts = [sample.text(self.column) for sample in samples]
        for sample, ids in zip(samples, self._ids(texts), strict=True):
            label = self._label(sample, "label", sample.get("label", (int, str), self._allowed()))
            yield _Encoded(sample.where, [*self.bos, *ids], {"labels": label})

    def classified_words(self, samples: Sequence[_Sample]) -> Iterator[_Encoded]:
        for sample in samples:
            words = sample.get("tokens", list, "a list of words")
            labels = sample.get("labels", list, "a list with a label for each word")
            if len(words) != len(labels):
                raise sample.refuse(
                    f"found {len(labels)} 'labels' for {len(words)} 'tokens'; expected a label for each"
                )
            if not words:
                raise sample.refuse("found empty 'tokens'; expected a list of words")
            for word in words:
                if not isinstance(word, str) or not word.strip():
                    raise sample.refuse(f"found {_shown(word)} in 'tokens'; expected words")
            ids, marks = list(self.bos), [NOT_LEARNED] * len(self.bos)
            pieces = self._ids([word if number == 0 else f" {word}" for number, word in enumerate(words)])
            for piece, value in zip(pieces, labels, strict=True):
                ids += piece
                marks += [self._label(sample, "labels", value), *[NOT_LEARNED] * (len(piece) - 1)][: len(piece)]
            yield _Encoded(sample.where, ids, {"labels": marks})

    def questions(self, samples: Sequence[_Sample]) -> Iterator[_Encoded]:
        questions = self._ids([f"{sample.text('question')}\n" for sample in samples])
        for sample, question in zip(samples, questions, strict=True):
            context, answer = sample.text("context"), sample.text("answer")
            start = sample.get("answer_start", int, "the answer's first character in the context, counted from 0")
            if start < 0 or context[start : start + len(answer)] != answer:
                there = context[start : start + len(answer)] if 0 <= start < len(context) else "nothing"
                raise sample.refuse(
                    f"found {in_words(there, '')} at 'answer_start' {start}; expected the answer, {in_words(answer, '')}"
                )
            found = self.tokenizer(
                context, add_special_tokens=False, truncation=False, padding=False, verbose=False, return_offsets_mapping=True
            )  # fmt: skip
            inside = [
                number for number, (first, last) in enumerate(found["offset_mapping"]) if last > start and first < start + len(answer)
            ]  # fmt: skip
            if not inside:
                raise sample.refuse(
                    f"found no token in the answer {in_words(answer, '')}; expected a text of the context"
                )
            before = [*self.bos, *question]
            ids = [*before, *found["input_ids"]]
            learned: Row = {"start_positions": len(before) + inside[0], "end_positions": len(before) + inside[-1]}
            yield _Encoded(sample.where, ids, learned)

    def _allowed(self) -> str:
        if self.labels is None:
            return "a label's number from 0"
        names = ", ".join(map(repr, self.labels[:8])) + (", …" if len(self.labels) > 8 else "")
        named = "" if self.labels[0] != "LABEL_0" else "; name them in train.labels"
        return f"a number from 0 to {len(self.labels) - 1}, or one of {names}{named}"

    def _label(self, sample: _Sample, key: str, value: object) -> int:
        """The number of a label that is a number or a name."""
        number = self._numbers.get(value) if isinstance(value, str) else value
        most = float("inf") if self.labels is None else len(self.labels) - 1
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= most:
            raise sample.refuse(f"found {_shown(value)} in {key!r}; expected {self._allowed()}")
        return number


def _pack(samples: Sequence[_Encoded], max_length: int) -> list[Row]:
    """Whole samples side by side in rows of at most `max_length` tokens: best fit, the longest first. Rows are in the order of their
    first samples, and samples in a row in their own.
    """
    order = sorted(range(len(samples)), key=lambda number: -len(samples[number].ids))
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (tokens that are free, bin), sorted
    for number in order:
        size = len(samples[number].ids)
        slot = bisect_left(open_bins, (size, -1))
        if slot == len(open_bins):
            free, chosen = max_length, len(bins)
            bins.append([])
        else:
            free, chosen = open_bins.pop(slot)
        bins[chosen].append(number)
        if free > size:
            insort(open_bins, (free - size, chosen))
    rows: list[Row] = []
    for members in sorted(sorted(each) for each in bins):
        ids: list[int] = []
        labels: list[int] = []
        for number in members:
            ids += samples[number].ids
            labels += _list(samples[number].learned["labels"])
        labels[0] = NOT_LEARNED
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def _list(value: list[int] | int) -> list[int]:
    assert isinstance(value, list)
    return value
