"""Rows and labels against ids from the tokenizers package alone; every damaged sample by file and line."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from qlm.arch import FAMILIES as SPECS
from qlm.errors import DataError, MissingInput, UsageError
from qlm.load import load_tokenizer
from qlm.recipe import DataSource
from qlm.training.data import Samples, collate, read_samples, shortened, split
from tests.conftest import FAMILIES

Folder = Callable[..., Path]
EOS = {"opt": 2, "gpt_neox": 0, "gpt_bigcode": 0}
BOS = {"opt": [2], "gpt_neox": [], "gpt_bigcode": []}
OFF = -100


class Reader:
    """`read_samples` for a family, and the ids of texts by another way."""

    def __init__(self, folder: Path, tmp_path: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.family = json.loads((folder / "config.json").read_text())["model_type"]
        self.plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.folder = tmp_path
        self.bos, self.eos = BOS[self.family], EOS[self.family]

    def ids(self, text: str) -> list[int]:
        return list(self.plain.encode(text, add_special_tokens=False).ids)

    def file(self, content: str | list[Any], name: str = "") -> Path:
        path = self.folder / (name or ("t.txt" if isinstance(content, str) else "t.jsonl"))
        lines = content if isinstance(content, str) else "".join(f"{json.dumps(each)}\n" for each in content)
        path.write_bytes(lines.encode())
        return path

    def __call__(self, content: str | list[Any], task: str = "causal-lm", *, name: str = "", **more: Any) -> Samples:
        source = DataSource.model_validate({"data": str(self.file(content, name)), **more.pop("source", {})})
        settings = {"max_length": 64, "packing": False, "too_long": "truncate", "labels": None, **more}
        return read_samples(source, self.tokenizer, SPECS[self.family], task, **settings)  # type: ignore[arg-type]

    def fails(self, kind: type[Exception], content: str | list[Any], task: str = "causal-lm", **more: Any) -> str:
        with pytest.raises(kind) as caught:
            self(content, task, **more)
        assert str(caught.value).isprintable()
        return str(caught.value).replace(f"{self.folder}/", "")


@pytest.fixture(params=FAMILIES)
def read(request: pytest.FixtureRequest, folder_of: Folder, tmp_path: Path) -> Reader:
    return Reader(folder_of(request.param), tmp_path)


@pytest.fixture
def opt(folder_of: Folder, tmp_path: Path) -> Reader:
    return Reader(folder_of("opt"), tmp_path)


class TestPlainText:
    TEXT = "The cat sat on the mat. " * 40

    def test_rows_are_windows_of_one_sequence(self, read: Reader) -> None:
        samples = read(self.TEXT, max_length=32)
        whole = read.bos + read.ids(self.TEXT)
        assert [len(row["input_ids"]) for row in samples.rows] == [32] * (len(whole) // 32) + [len(whole) % 32]
        assert [token for row in samples.rows for token in row["input_ids"]] == whole
        for row in samples.rows:
            assert row["labels"] == [OFF, *row["input_ids"][1:]]
        assert samples.facts == {
            "data": "t.txt", "bytes": len(self.TEXT), "sha256": hashlib.sha256(self.TEXT.encode()).hexdigest(),
            "rows": len(samples.rows), "tokens": len(whole), "learned": len(whole) - len(samples.rows), "left_over": 0,
        }  # fmt: skip

    def test_packing_changes_nothing(self, read: Reader) -> None:
        assert read(self.TEXT, packing=True) == read(self.TEXT, packing=False)

    def test_a_last_token_alone_is_left_over(self, read: Reader) -> None:
        size = len(read.bos + read.ids(self.TEXT)) - 1
        samples = read(self.TEXT, max_length=size)
        assert (len(samples.rows), samples.facts["left_over"], samples.facts["tokens"]) == (1, 1, size)

    def test_a_short_text_is_one_row(self, read: Reader) -> None:
        assert read("the cat").rows == [
            {"input_ids": (ids := read.bos + read.ids("the cat")), "labels": [OFF, *ids[1:]]}
        ]

    @pytest.mark.parametrize("text", ["", " \n\t", "\ufeff"])
    def test_empty(self, text: str, opt: Reader) -> None:
        assert opt.fails(UsageError, text) == "t.txt: there is no text in it"

    def test_damaged(self, opt: Reader) -> None:
        assert "NUL character at 1" in opt.fails(DataError, "a\0b")
        (opt.folder / "a.txt").write_bytes(b"ab\xff")
        source = DataSource(data=str(opt.folder / "a.txt"))
        options: dict[str, Any] = dict(max_length=8, packing=False, too_long="skip", labels=None)
        with pytest.raises(DataError, match="not UTF-8 text: byte 2 is 0xff"):
            read_samples(source, opt.tokenizer, SPECS["opt"], "causal-lm", **options)
        with pytest.raises(MissingInput, match="no such file"):
            read_samples(DataSource(data="nowhere.txt"), opt.tokenizer, SPECS["opt"], "causal-lm", **options)

    def test_not_for_heads(self, opt: Reader) -> None:
        line = opt.fails(UsageError, "text", "question-answering")
        assert line.endswith("t.txt with task question-answering; expected samples with labels, a .jsonl file")


class TestTexts:
    def test_text_and_eos(self, read: Reader) -> None:
        samples = read([{"text": "the cat", "id": 7}, {"text": " sat\n"}])
        for row, text in zip(samples.rows, ("the cat", " sat\n"), strict=True):
            ids = read.bos + read.ids(text) + [read.eos]
            assert row == {"input_ids": ids, "labels": [OFF, *ids[1:]]}
        assert samples.facts["samples"] == samples.facts["rows"] == 2

    def test_loss_on_the_completion_only(self, read: Reader) -> None:
        (row,) = read([{"prompt": "the cat ", "completion": "sat on"}]).rows
        prompt, completion = read.bos + read.ids("the cat "), [*read.ids("sat on"), read.eos]
        assert row == {"input_ids": prompt + completion, "labels": [OFF] * len(prompt) + completion}

    def test_empty_prompt_or_completion(self, read: Reader) -> None:
        first, second = read([{"prompt": "", "completion": "sat"}, {"prompt": "sat", "completion": ""}]).rows
        assert first["input_ids"] == second["input_ids"] == read.bos + read.ids("sat") + [read.eos]
        assert first["labels"] == [OFF, *first["input_ids"][1:]]
        assert second["labels"] == [OFF] * (len(second["input_ids"]) - 1) + [read.eos]

    def test_both_kinds_in_one_file(self, read: Reader) -> None:
        rows = read([{"text": "cat"}, {"prompt": "a", "completion": "b"}]).rows
        assert [row["labels"].count(OFF) for row in rows] == [1, len(read.bos) + len(read.ids("a"))]

    def test_column(self, opt: Reader) -> None:
        assert opt([{"code": "cat"}], source={"column": "code"}).rows == opt([{"text": "cat"}]).rows

    def test_eos_of_the_caller(self, opt: Reader) -> None:
        assert opt([{"text": "cat"}], eos_id=9).rows[0]["input_ids"][-1] == 9

    def test_no_eos(self, opt: Reader) -> None:
        opt.tokenizer.eos_token = None
        assert "has no EOS" in opt.fails(DataError, [{"text": "cat"}])

    def test_blank_lines_and_byte_order_mark(self, opt: Reader) -> None:
        path = opt.folder / "b.jsonl"
        path.write_bytes('\ufeff{"text": "cat"}\r\n\n  \n{"text": "mat"}'.encode())
        samples = read_samples(
            DataSource(data=str(path)), opt.tokenizer, SPECS["opt"], "causal-lm", max_length=9, packing=False,
            too_long="error", labels=None,
        )  # fmt: skip
        assert samples.facts["samples"] == 2

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ('{"text": "a"', "t.jsonl:3: not valid JSON: Expecting ',' delimiter at column 13"),
            ('["a"]', "t.jsonl:3: holds a JSON list; expected an object"),
            ('{"text": "a", "text": "b"}', "t.jsonl:3: the key 'text' appears twice in one object"),
            ('{"text": NaN}', "t.jsonl:3: holds the number NaN, which is not allowed here"),
            ('{"txt": "a"}', "t.jsonl:3: found 'txt'; expected the key 'text' with a text"),
            ("{}", "t.jsonl:3: found no key; expected the key 'text' with a text"),
            ('{"text": 3}', "t.jsonl:3: found the number 3 in 'text'; expected a text"),
            ('{"text": null}', "t.jsonl:3: found null in 'text'; expected a text"),
            ('{"text": {"a": 1}}', "t.jsonl:3: found an object in 'text'; expected a text"),
            ('{"text": " "}', "t.jsonl:3: found an empty 'text'; expected a text"),
            (r'{"text": "\ud800"}', "t.jsonl:3: found half a character in 'text'; expected a text"),
            ('{"prompt": "a"}', "t.jsonl:3: found 'prompt'; expected the key 'completion' with a text"),
            ('{"completion": "a"}', "t.jsonl:3: found 'completion'; expected the key 'prompt' with a text"),
            ('{"prompt": "a", "completion": ["b"]}', "t.jsonl:3: found a list of 1 in 'completion'; expected a text"),
            ('{"prompt": "", "completion": " "}', "t.jsonl:3: found an empty 'prompt' and an empty 'completion'; expected a text"),
            (
                '{"prompt": "a", "completion": "b", "text": "c"}',
                "t.jsonl:3: found 'text' beside 'prompt' or 'completion'; expected one or the other",
            ),
        ],
    )  # fmt: skip
    def test_damaged_by_line(self, line: str, expected: str, opt: Reader) -> None:
        content = f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n'
        assert opt.fails(DataError, content, name="t.jsonl") == expected

    @pytest.mark.parametrize("content", ["", "\n \n"])
    def test_empty(self, content: str, opt: Reader) -> None:
        assert opt.fails(UsageError, content, name="t.jsonl") == "t.jsonl: there is no sample in it"


class TestTooLong:
    CONTENT = ({"text": "cat"}, {"text": "the cat sat on the mat " * 3}, {"prompt": "a", "completion": " the mat" * 20})

    def test_truncate(self, read: Reader) -> None:
        whole, samples = read(list(self.CONTENT), max_length=999), read(list(self.CONTENT), max_length=8)
        for short, full in zip(samples.rows, whole.rows, strict=True):
            assert short == {key: values[:8] for key, values in full.items()}
        assert (samples.facts["cut"], samples.facts["skipped"], whole.facts["cut"]) == (2, 0, 0)
        assert samples.facts["tokens"] == sum(len(row["input_ids"]) for row in samples.rows)

    def test_skip(self, read: Reader) -> None:
        samples = read(list(self.CONTENT), max_length=8, too_long="skip")
        assert samples.rows == read([self.CONTENT[0]], max_length=8).rows
        assert (samples.facts["samples"], samples.facts["rows"], samples.facts["skipped"]) == (3, 1, 2)
        line = read.fails(UsageError, list(self.CONTENT[1:]), max_length=8, too_long="skip")
        assert line.startswith("t.jsonl: all 2 samples are longer than 8 tokens")

    def test_error(self, read: Reader) -> None:
        size = len(read.bos) + len(read.ids(self.CONTENT[1]["text"])) + 1
        line = read.fails(UsageError, list(self.CONTENT), max_length=8, too_long="error")
        assert line.startswith(f"t.jsonl:2: found a sample of {size} tokens; expected at most 8 (train.max_length); ")

    def test_a_sample_of_exactly_that_length_is_whole(self, read: Reader) -> None:
        size = len(read(list(self.CONTENT), max_length=999).rows[1]["input_ids"])
        assert read([self.CONTENT[1]], max_length=size, too_long="error").facts["cut"] == 0

    def test_nothing_left_to_learn(self, read: Reader) -> None:
        content = [{"prompt": "the cat sat on the mat " * 3, "completion": "yes"}]
        line = read.fails(DataError, content, max_length=8)
        assert line == (
            "t.jsonl:1: found a sample of which nothing is learned once it is cut to 8 tokens (train.max_length); make it longer, or "
            "leave such samples out with 'too_long: skip'"
        )


class TestPacking:
    def test_whole_samples_side_by_side(self, read: Reader) -> None:
        texts = [" cat" * count for count in (3, 30, 7, 1, 12, 25, 2, 9, 40, 5)]
        content = [{"text": text} for text in texts]
        limit = max(len(row["input_ids"]) for row in read(content, max_length=999).rows) + 3
        apart = read(content, max_length=limit, too_long="error")
        packed = read(content, max_length=limit, too_long="error", packing=True)
        assert len(packed.rows) < len(apart.rows)
        expected = sorted(tuple(row["input_ids"]) for row in apart.rows)
        found = []
        for row in packed.rows:
            assert len(row["input_ids"]) == len(row["labels"]) <= limit
            assert row["labels"][0] == OFF
            left = list(row["input_ids"])
            while left:
                end = left.index(read.eos, len(read.bos)) + 1
                assert left[: len(read.bos)] == read.bos
                found.append(tuple(left[:end]))
                left = left[end:]
        assert sorted(found) == expected
        # Nothing is wasted that another order could have filled: two rows never fit into one.
        sizes = sorted(len(row["input_ids"]) for row in packed.rows)
        assert sizes[0] + sizes[1] > limit
        assert packed.facts["learned"] == sum(label != OFF for row in packed.rows for label in row["labels"])
        assert packed.facts["tokens"] == apart.facts["tokens"]

    def test_prompts_and_bos_are_not_learned(self, read: Reader) -> None:
        (row,) = read([{"prompt": "a ", "completion": "b"}] * 2, packing=True).rows
        prompt, completion = read.bos + read.ids("a "), [*read.ids("b"), read.eos]
        assert row["input_ids"] == (prompt + completion) * 2
        assert row["labels"] == ([OFF] * len(prompt) + completion) * 2

    def test_the_end_of_one_predicts_the_start_of_the_next(self, folder_of: Folder, tmp_path: Path) -> None:
        neox = Reader(folder_of(FAMILIES[1]), tmp_path)
        (row,) = neox([{"text": "cat"}, {"text": "mat"}], packing=True).rows
        cat, mat = [*neox.ids("cat"), 0], [*neox.ids("mat"), 0]
        assert row == {"input_ids": cat + mat, "labels": [OFF, *cat[1:], *mat]}

    def test_the_same_every_time(self, read: Reader) -> None:
        content = [{"text": " cat" * (1 + number % 17)} for number in range(60)]
        assert read(content, packing=True) == read(content, packing=True)


class TestHeads:
    LABELS = ("ham", "spam", "eggs")

    def test_sequence_classification(self, read: Reader) -> None:
        content = [{"text": "the cat", "label": "spam"}, {"text": "mat", "label": 2}]
        samples = read(content, "sequence-classification", labels=self.LABELS)
        assert samples.rows == [
            {"input_ids": read.bos + read.ids("the cat"), "labels": 1},
            {"input_ids": read.bos + read.ids("mat"), "labels": 2},
        ]
        assert samples.facts["learned"] == 2
        cut = read([{"text": "the cat " * 9, "label": 0}], "sequence-classification", labels=self.LABELS, max_length=4)
        assert (cut.rows[0]["labels"], len(cut.rows[0]["input_ids"]), cut.facts["cut"]) == (0, 4, 1)

    def test_token_classification(self, read: Reader) -> None:
        words, labels = ["strawberry", "sat", "Zürich"], ["ham", 2, "spam"]
        (row,) = read([{"tokens": words, "labels": labels}], "token-classification", labels=self.LABELS).rows
        pieces = [read.ids("strawberry"), read.ids(" sat"), read.ids(" Zürich")]
        assert max(map(len, pieces)) > 1
        assert row["input_ids"] == read.bos + [token for piece in pieces for token in piece]
        marks = [[number, *[OFF] * (len(piece) - 1)] for number, piece in zip((0, 2, 1), pieces, strict=True)]
        assert row["labels"] == [OFF] * len(read.bos) + [mark for each in marks for mark in each]

    def test_question_answering(self, read: Reader) -> None:
        context = "the cat sat on the mat"
        sample = {"question": "where?", "context": context, "answer": "the mat", "answer_start": 15}
        (row,) = read([sample], "question-answering").rows
        before, ids = read.bos + read.ids("where?\n"), read.ids(context)
        assert row["input_ids"] == before + ids
        start, end = row["start_positions"], row["end_positions"]
        inside = ids[start - len(before) : end - len(before) + 1]
        assert read.plain.decode(inside).strip() == "the mat"
        # The first "the" is another.
        (first,) = read([{**sample, "answer": "the cat", "answer_start": 0}], "question-answering").rows
        assert first["start_positions"] == len(before)

    def test_an_answer_that_is_cut_off(self, read: Reader) -> None:
        sample = {"question": "a", "context": "the cat sat on the mat", "answer": "mat", "answer_start": 19}
        line = read.fails(DataError, [sample], "question-answering", max_length=6)
        assert line.startswith("t.jsonl:1: found a sample of which nothing is learned once it is cut to 6 tokens")

    ALLOWED = "expected a number from 0 to 2, or one of 'ham', 'spam', 'eggs'"

    @pytest.mark.parametrize(
        ("task", "sample", "expected"),
        [
            ("sequence", {"text": "a"}, f"found 'text'; expected the key 'label' with {ALLOWED.removeprefix('expected ')}"),
            ("sequence", {"text": "a", "label": 3}, f"found the number 3 in 'label'; {ALLOWED}"),
            ("sequence", {"text": "a", "label": -1}, f"found the number -1 in 'label'; {ALLOWED}"),
            ("sequence", {"text": "a", "label": "Spam"}, f"found the text 'Spam' in 'label'; {ALLOWED}"),
            ("sequence", {"text": "a", "label": True}, f"found true in 'label'; {ALLOWED}"),
            ("sequence", {"text": "a", "label": 1.0}, f"found the number 1.0 in 'label'; {ALLOWED}"),
            ("sequence", {"text": " ", "label": 1}, "found an empty 'text'; expected a text"),
            ("token", {"tokens": ["a", "b"], "labels": [1]}, "found 1 'labels' for 2 'tokens'; expected a label for each"),
            ("token", {"tokens": [], "labels": []}, "found empty 'tokens'; expected a list of words"),
            ("token", {"tokens": "ab", "labels": [1]}, "found the text 'ab' in 'tokens'; expected a list of words"),
            ("token", {"tokens": ["a", " "], "labels": [1, 1]}, "found the text ' ' in 'tokens'; expected words"),
            ("token", {"tokens": ["a", 3], "labels": [1, 1]}, "found the number 3 in 'tokens'; expected words"),
            ("token", {"tokens": ["a"], "labels": [7]}, f"found the number 7 in 'labels'; {ALLOWED}"),
            ("token", {"tokens": ["a"], "labels": [None]}, f"found null in 'labels'; {ALLOWED}"),
            ("question", {"question": "a", "context": "b", "answer": "c"},
             "found 'question', 'context', 'answer'; expected the key 'answer_start' with the answer's first character in the context, counted "
             "from 0"),
            ("question", {"question": "a", "context": "b", "answer": "c", "answer_start": 0},
             "found 'b' at 'answer_start' 0; expected the answer, 'c'"),
            ("question", {"question": "a", "context": "b", "answer": "b", "answer_start": 5},
             "found 'nothing' at 'answer_start' 5; expected the answer, 'b'"),
            ("question", {"question": "a", "context": "bb", "answer": "b", "answer_start": -1},
             "found 'nothing' at 'answer_start' -1; expected the answer, 'b'"),
            ("question", {"question": "a", "context": "b", "answer": "", "answer_start": 0}, "found an empty 'answer'; expected a text"),
        ],
    )  # fmt: skip
    def test_damaged_by_line(self, task: str, sample: dict[str, Any], expected: str, opt: Reader) -> None:
        good = {
            "text": "a", "label": 1, "tokens": ["a"], "labels": [0], "question": "a", "context": "b", "answer": "b",
            "answer_start": 0,
        }  # fmt: skip
        name = "question-answering" if task == "question" else f"{task}-classification"
        line = opt.fails(DataError, [good, sample], name, labels=None if task == "question" else self.LABELS)
        assert line == f"t.jsonl:2: {expected}"

    def test_names_are_needed_for_names(self, opt: Reader) -> None:
        assert opt([{"text": "a", "label": 5}], "sequence-classification").rows[0]["labels"] == 5
        line = opt.fails(DataError, [{"text": "a", "label": "ham"}], "sequence-classification")
        assert line == "t.jsonl:1: found the text 'ham' in 'label'; expected a label's number from 0"


class TestDatasets:
    """The `datasets` package itself, with its own reader of local files in the place of a repository."""

    @staticmethod
    def source(path: Path, **more: Any) -> dict[str, Any]:
        return {"data": {"name": "json", "split": "train", "data_files": str(path), **more}}

    def read(self, opt: Reader, path: Path, task: Any = "causal-lm", labels: Any = None, **more: Any) -> Samples:
        source = DataSource.model_validate(self.source(path, **more))
        return read_samples(
            source, opt.tokenizer, SPECS["opt"], task, max_length=64, packing=False, too_long="error", labels=labels
        )

    def test_rows_are_samples(self, opt: Reader) -> None:
        content = [{"text": "cat"}, {"text": ""}, {"text": "mat"}]
        path = opt.file(content, "rows.jsonl")
        samples = self.read(opt, path)
        assert samples.rows == opt([content[0], content[2]]).rows
        assert (samples.facts["samples"], samples.facts["empty"]) == (2, 1)
        assert str(opt.folder) not in samples.facts["data"]
        assert samples.facts["sha256"] == self.read(opt, path).facts["sha256"]
        assert samples.facts["sha256"] != self.read(opt, opt.file(content[:2])).facts["sha256"]

    def test_columns(self, opt: Reader) -> None:
        path = opt.file([{"code": "cat"}])
        assert self.read(opt, path, column="code").facts["rows"] == 1
        with pytest.raises(DataError, match=r"json/train, row 0: found 'code'; expected the key 'text' with a text"):
            self.read(opt, path)

    def test_labels(self, opt: Reader) -> None:
        path = opt.file([{"text": "cat", "label": 1}, {"text": "mat", "label": 4}])
        with pytest.raises(DataError, match=r"row 1: found the number 4 in 'label'; expected a number from 0 to 1, or"):
            self.read(opt, path, "sequence-classification", ["a", "b"])


class TestSplit:
    @staticmethod
    def samples(rows: int) -> Samples:
        facts = {"data": "t.txt", "bytes": 5, "sha256": "0", "rows": rows, "cut": 3}
        return Samples([{"input_ids": [n, n], "labels": [OFF, n]} for n in range(rows)], facts)

    def test_parts(self) -> None:
        rest, held = split(self.samples(100), 0.07, 0)
        assert (len(rest.rows), len(held.rows)) == (93, 7)
        numbers = [[row["input_ids"][0] for row in part.rows] for part in (rest, held)]
        assert all(part == sorted(part) for part in numbers)
        assert sorted(numbers[0] + numbers[1]) == list(range(100))
        whole = {"data": "t.txt", "bytes": 5, "sha256": "0", "file": {"rows": 100, "cut": 3}}
        assert rest.facts == {**whole, "rows": 93, "tokens": 186, "learned": 93}
        assert held.facts == {**whole, "rows": 7, "tokens": 14, "learned": 7}
        assert split(self.samples(100), 0.07, 0) == (rest, held)
        assert split(self.samples(100), 0.07, 1) != (rest, held)

    def test_what_was_cut_in_words(self) -> None:
        facts = {"samples": 1200, "cut": 1100, "skipped": 0, "empty": 0}
        cut = {"cut": "1,100 of 1,200 samples, to 32 tokens (train.too_long)"}
        part = {"rows": 1, "file": facts}
        assert shortened({"data": facts}, 32) == shortened({"data": part, "validation": part}, 32) == cut
        other = {"samples": 5, "cut": 2, "skipped": 3, "empty": 4}
        assert shortened({"data": facts, "validation": other}, 32) == {
            "cut": "1,100 of 1,200 samples and 2 of 5 for validation, to 32 tokens (train.too_long)",
            "left_out": "3 of 5 for validation, longer than 32 tokens (train.too_long); 4 without text",
        }
        assert shortened({"data": {"rows": 3, "left_over": 1}}, 32) == {}

    @pytest.mark.parametrize(("share", "held"), [(0.001, 1), (0.999, 3)])
    def test_neither_part_is_empty(self, share: float, held: int) -> None:
        assert [len(part.rows) for part in split(self.samples(4), share, 0)] == [4 - held, held]

    def test_one_row(self) -> None:
        with pytest.raises(UsageError, match=r"train\.validation: found a share of 1 row\(s\) of t\.txt"):
            split(self.samples(1), 0.5, 0)


class TestCollate:
    def test_padded_on_the_right(self) -> None:
        batch = collate([{"input_ids": [5, 6, 7], "labels": [OFF, 6, 7]}, {"input_ids": [8], "labels": [9]}], 1)
        assert {key: value.tolist() for key, value in batch.items()} == {
            "input_ids": [[5, 6, 7], [8, 1, 1]],
            "labels": [[OFF, 6, 7], [9, OFF, OFF]],
            "attention_mask": [[1, 1, 1], [1, 0, 0]],
        }
        assert all(value.dtype == torch.int64 for value in batch.values())

    def test_numbers_of_heads(self) -> None:
        batch = collate([{"input_ids": [5, 6], "labels": 2}, {"input_ids": [7], "labels": 0}], 3)
        assert batch["labels"].tolist() == [2, 0]
        rows = [{"input_ids": [5, 6], "start_positions": 0, "end_positions": 1}]
        assert {key: value.tolist() for key, value in collate(rows, 3).items()} == {
            "input_ids": [[5, 6]], "start_positions": [0], "end_positions": [1], "attention_mask": [[1, 1]],
        }  # fmt: skip

    def test_loss_is_that_of_each_row_alone(self, folder_of: Folder, opt: Reader) -> None:
        """Padding and packing-free batches change no prediction: transformers' own loss, weighted by what is learned."""
        import qlm

        samples = opt([{"text": "the cat sat on the mat"}, {"prompt": "a ", "completion": "b"}])
        model = qlm.load(folder_of("opt"), dtype="float32")
        with torch.no_grad():
            together = float(model(**collate(samples.rows, 1)).loss)
            each = [
                (float(model(**collate([row], 1)).loss), sum(label != OFF for label in row["labels"]))
                for row in samples.rows
            ]
        assert sum(count for _, count in each) == samples.facts["learned"]
        assert together == pytest.approx(sum(loss * count for loss, count in each) / samples.facts["learned"], rel=1e-5)
