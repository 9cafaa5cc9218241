"""Calibration: windows are what they say, and hidden states and Hessians equal a plain forward pass of transformers' model."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlm
from qlm.arch import FAMILIES as SPECS
from qlm.calibrate import Text, calibration_windows, read_text, text_ids, window_length
from qlm.errors import DataError, MissingInput, UsageError
from qlm.recipe import CalibrationRecipe, DataSource, EvaluateRecipe

Folder = Callable[..., Path]
# fp32 sums against float64 ones.
HESSIAN_TOLERANCE = 1e-5


def source(path: Path, **more: Any) -> CalibrationRecipe:
    return CalibrationRecipe(data=str(path), **more)


class TestReading:
    def test_text_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("one\r\ntwo\n\nété ☃\n".encode())
        text = read_text(source(path))
        assert text.documents == ("one\r\ntwo\n\nété ☃\n",)
        assert text.description == "a.txt"
        assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    @pytest.mark.parametrize("column", ["text", "body"])
    def test_jsonl(self, column: str, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        # U+2028 ends a line for Python's splitlines, but not a line of JSONL.
        documents = ["first", "second\nline", "fourth, with \u2028 in it"]
        lines = [json.dumps({column: document, "other": 1}, ensure_ascii=False) for document in documents]
        path.write_text("\n".join([*lines[:2], "", *lines[2:]]), "utf-8")
        more = {} if column == "text" else {"column": column}
        text = read_text(source(path, **more))
        assert text.documents == tuple(documents)
        assert text.joined == "\n\n".join(documents)

    @pytest.mark.parametrize(
        ("line", "number"),
        [
            ("{", 2),
            ("[]", 2),
            ('{"txt": "x"}', 2),
            ('{"text": 1}', 2),
            ("7", 2),
            ("null", 2),
            ("[" * 100_000, 2),
            ('{"text": "\\ud800"}', 2),
        ],
        ids=["cut", "list", "no column", "number", "bare", "null", "deep", "half a character"],
    )
    def test_damaged_jsonl(self, line: str, number: int, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(f'{{"text": "fine"}}\n{line}\n')
        with pytest.raises(DataError, match=rf"a\.jsonl:{number}: expected a JSON object with a string 'text'"):
            read_text(source(path))

    def test_prompts_and_completions(self, tmp_path: Path) -> None:
        """What qlm finetune takes: joined to calibrate with, refused where every token of it would be measured."""
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one"}\n{"prompt": "two ", "completion": "three"}\n')
        assert read_text(CalibrationRecipe(data=str(path))).documents == ("one", "two three")
        for measured in (DataSource(data=str(path)), EvaluateRecipe(data=str(path))):
            with pytest.raises(
                DataError, match=r"a\.jsonl:2: found 'prompt' and 'completion', .*'text'.* train\.validation$"
            ):
                read_text(measured)
        for damaged in (
            '{"prompt": "two "}',
            '{"prompt": ["a"], "completion": ["b"]}',
            '{"prompt": 1, "completion": "b"}',
        ):
            path.write_text(damaged)
            with pytest.raises(DataError, match=r"a\.jsonl:1: expected a JSON object with a string 'text'"):
                read_text(CalibrationRecipe(data=str(path)))
        for words in ('"a prompt and its completion"', '["prompt", "completion"]'):  # no object with these keys
            path.write_text(words)
            with pytest.raises(DataError, match=r"a\.jsonl:1: expected a JSON object with a string 'text'"):
                read_text(source(path))

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    @pytest.mark.parametrize("content", ["", " \n\t\n"], ids=["empty", "blank"])
    def test_nothing_in_it(self, name: str, content: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=r"a\..*: there is no text in it"):
            read_text(source(tmp_path / name))

    def test_jsonl_of_empty_texts(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
        with pytest.raises(UsageError, match="no text in it"):
            read_text(source(tmp_path / "a.jsonl"))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(MissingInput, match=r"none\.txt: no such file"):
            read_text(source(tmp_path / "none.txt"))

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(MissingInput, match="cannot be read: Is a directory"):
            read_text(source(tmp_path))

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"abc\xff\xfe", "byte 3 is 0xff"), (b"a\0b", "NUL character at 1")],
        ids=["latin", "nul"],
    )
    def test_binary(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_text(source(tmp_path / "a.txt"))

    def test_byte_order_mark(self, tmp_path: Path) -> None:
        """It is no part of the text: Windows editors put it there."""
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
        assert read_text(source(tmp_path / "a.txt")).documents == ("abc",)


class TestDatasets:
    """The `datasets` package itself, with its own reader of local files in the place of a repository."""

    @staticmethod
    def read(path: Path, **more: Any) -> Text:
        data = {"name": "json", "split": "train", "data_files": str(path), **more}
        return read_text(CalibrationRecipe.model_validate({"data": data}))

    def test_rows_are_documents(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "two", "n": null}\n')
        text = self.read(tmp_path / "a.jsonl")
        assert text.documents == ("one", "two")
        assert str(tmp_path) not in text.description
        with pytest.raises(UsageError, match=r"no column 'content'; it has text, n"):
            self.read(tmp_path / "a.jsonl", column="content")
        with pytest.raises(UsageError, match=r"column 'n' holds more than text"):
            self.read(tmp_path / "a.jsonl", column="n")
        with pytest.raises(MissingInput, match=r"data: json/train\[ cannot be read"):
            self.read(tmp_path / "a.jsonl", split="train[")

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(MissingInput, match=r"data: json/train cannot be read"):
            self.read(tmp_path / "none.jsonl")


class TestWindows:
    @pytest.fixture
    def tokenizer(self, folder_of: Folder) -> Any:
        return qlm.load_tokenizer(folder_of("opt"))

    @pytest.fixture
    def text(self, text_file: Path) -> Text:
        return read_text(source(text_file))

    @staticmethod
    def windows(text: Text, tokenizer: Any, samples: int = 6, length: int = 20, seed: int = 0) -> torch.Tensor:
        return calibration_windows(text, tokenizer, SPECS["opt"], samples=samples, length=length, seed=seed)

    def test_are_different_pieces_of_the_text(self, text: Text, tokenizer: Any) -> None:
        ids = text_ids(tokenizer, text.joined, SPECS["opt"])
        windows = self.windows(text, tokenizer, 50)
        assert windows.shape == (50, 20)
        assert windows.dtype == torch.int64
        pieces = [tuple(piece) for piece in ids[: len(ids) // 20 * 20].view(-1, 20).tolist()]
        places = [pieces.index(tuple(window)) for window in windows.tolist()]
        assert len(set(places)) == 50
        assert places != sorted(places)

    def test_follow_the_seed(self, text: Text, tokenizer: Any) -> None:
        torch.manual_seed(1)
        first = self.windows(text, tokenizer)
        torch.manual_seed(2)
        assert torch.equal(first, self.windows(text, tokenizer))
        assert not torch.equal(first, self.windows(text, tokenizer, seed=1))

    def test_all_of_the_text(self, text: Text, tokenizer: Any) -> None:
        ids = text_ids(tokenizer, text.joined, SPECS["opt"])
        count = len(ids) // 20
        windows = self.windows(text, tokenizer, count)
        assert sorted(windows.tolist()) == sorted(ids[: count * 20].view(-1, 20).tolist())
        assert (windows == 2).sum() == 1

    def test_too_little(self, text: Text, tokenizer: Any) -> None:
        tokens = len(text_ids(tokenizer, text.joined, SPECS["opt"]))
        count = tokens // 20 + 3
        with pytest.raises(
            UsageError,
            match=rf"words\.txt has {tokens} tokens, which is {tokens // 20} windows of 20, but {count} samples need "
            rf"{count * 20}: {count * 20 - tokens} tokens are missing",
        ):
            self.windows(text, tokenizer, count)

    def test_what_is_missing_is_enough(self, tokenizer: Any) -> None:
        short = Text(("a b c d e",), "short")
        with pytest.raises(UsageError, match="tokens are missing") as error:
            self.windows(short, tokenizer, 4, 10)
        missing = int(str(error.value).split(" tokens are missing")[0].split()[-1])
        assert self.windows(Text(("a b c d e" + "\n" * missing,), "long"), tokenizer, 4, 10).shape == (4, 10)

    def test_many_documents_are_drawn_from(self, tokenizer: Any) -> None:
        documents = tuple(f"document {i:05d}, " + "word " * 40 for i in range(3000))
        asked: list[int] = []

        def spy(text: str, **more: Any) -> Any:
            asked.append(len(text))
            return tokenizer(text, **more)

        windows = self.windows(Text(documents, "many"), spy, 4, 64)
        assert windows.shape == (4, 64)
        assert max(asked) < sum(map(len, documents)) / 10
        assert torch.equal(windows, self.windows(Text(documents, "many"), tokenizer, 4, 64))

    def test_length(self) -> None:
        assert window_length(None, 64) == 64
        assert window_length(None, 1 << 20) == 2048
        assert window_length(33, 64) == 33
        with pytest.raises(UsageError, match="length: windows of 65 tokens, but the model has 64 positions"):
            window_length(65, 64)
