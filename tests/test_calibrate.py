"""Calibration: windows are what they say, and hidden states and Hessians equal a plain forward pass of transformers' model."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlm
from qlm.arch import FAMILIES as SPECS
from qlm.arch import FamilySpec, LinearGroup
from qlm.blocks import stages_of
from qlm.calibrate import Stream, Text, calibration_windows, read_text, text_ids, window_length
from qlm.errors import DataError, MissingInput, UsageError
from qlm.load import block_paths
from qlm.recipe import CalibrationRecipe
from tests import tiny_models
from tests.conftest import FAMILIES

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


def parts(variant: str) -> tuple[Any, FamilySpec, list[str], torch.Tensor]:
    """model, spec, its blocks, windows that make more than one batch"""
    model = tiny_models.build(variant)
    spec = SPECS[model.config.model_type]
    return model, spec, block_paths(spec, model), tiny_models.token_ids(5, 40)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows a batch, so that there is a last batch that is not full."""
    monkeypatch.setattr(sys.modules["qlm.calibrate"], "BATCH_TOKENS", 80)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def block_inputs(model: Any, blocks: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Input of each block, and the output of the last under "end", from one plain forward pass."""
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: seen.update({path: args[0], "end": output})

    hooks = [model.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True) for path in blocks]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def float64_hessians(model: Any, linears: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen.update({path: args[0].reshape(-1, args[0].shape[-1]).double()})
        )
        for path in linears
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {path: x.T @ x / len(x) for path, x in seen.items()}


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
class TestStream:
    def test_hidden_states(self, variant: str) -> None:
        model, spec, blocks, ids = parts(variant)
        expected = block_inputs(model, blocks, ids)
        stream = Stream(model, spec, blocks[0], ids)
        for path in blocks:
            torch.testing.assert_close(stream.hidden, expected[path], atol=2e-5, rtol=1e-5)
            stream.advance(model.get_submodule(path))
        torch.testing.assert_close(stream.hidden, expected["end"], atol=2e-5, rtol=1e-5)

    def test_hessians(self, variant: str) -> None:
        """Also with the shortcut that does not compute the attention again once it is final."""
        model, spec, blocks, ids = parts(variant)
        stages = stages_of(spec, model.config)
        inside = [linear for stage in stages for group in stage for linear in group.linears]
        expected = float64_hessians(model, [f"{path}.{linear}" for path in blocks for linear in inside], ids)
        stream = Stream(model, spec, blocks[0], ids)
        for path in blocks:
            block = model.get_submodule(path)
            calls: list[int] = []
            counter = block.get_submodule(spec.attention).register_forward_hook(lambda *a, calls=calls: calls.append(1))
            seen: set[str] = set()
            for stage in stages:
                for group, statistics in stream.statistics(block, stage, path).items():
                    assert statistics.tokens == ids.numel()
                    assert statistics.hessian.dtype == torch.float32
                    for linear in group.linears:
                        wanted = expected[f"{path}.{linear}"]
                        difference = (statistics.hessian - wanted).abs().max() / wanted.abs().max()
                        assert difference < HESSIAN_TOLERANCE, linear
                        seen.add(linear)
            assert seen == set(inside)
            stream.advance(block)
            counter.remove()
            assert "forward" not in vars(block.get_submodule(spec.attention))
        torch.testing.assert_close(stream.hidden, block_inputs(model, blocks, ids)["end"], atol=2e-5, rtol=1e-5)

    def test_the_shortcut_follows_the_quantized_linear(self, variant: str) -> None:
        """Once the attention's last linear has changed, what follows must see the changed one."""
        model, spec, blocks, ids = parts(variant)
        block, path = model.get_submodule(blocks[0]), blocks[0]
        stream = Stream(model, spec, path, ids)
        for stage in stages_of(spec, model.config):
            measured = stream.statistics(block, stage, path)
            expected = float64_hessians(model, [f"{path}.{g.linears[0]}" for g in stage], ids)
            for group, statistics in measured.items():
                wanted = expected[f"{path}.{group.linears[0]}"]
                difference = (statistics.hessian - wanted).abs().max() / wanted.abs().max()
                assert difference < HESSIAN_TOLERANCE, group.linears
            for group in stage:
                for linear in group.linears:
                    block.get_submodule(linear).weight.mul_(0.9)
        stream.advance(block)
        torch.testing.assert_close(
            stream.hidden, block_inputs(model, blocks, ids)[blocks[1]], atol=2e-5, rtol=1e-5
        )  # fmt: skip

    def test_skipped_stages(self, variant: str) -> None:
        """A recipe may leave out the attention's last linear: its inputs are then never kept."""
        model, spec, blocks, ids = parts(variant)
        stream = Stream(model, spec, blocks[0], ids)
        block = model.get_submodule(blocks[0])
        groups = [group for stage in stages_of(spec, model.config) for group in stage]
        last: LinearGroup = groups[-1]
        expected = float64_hessians(model, [f"{blocks[0]}.{last.linears[0]}"], ids)
        (statistics,) = stream.statistics(block, [last], blocks[0]).values()
        wanted = expected[f"{blocks[0]}.{last.linears[0]}"]
        assert (statistics.hessian - wanted).abs().max() / wanted.abs().max() < HESSIAN_TOLERANCE
        stream.advance(block)
        torch.testing.assert_close(
            stream.hidden, block_inputs(model, blocks, ids)[blocks[1]], atol=2e-5, rtol=1e-5
        )  # fmt: skip


@pytest.mark.parametrize("variant", FAMILIES)
def test_activations_that_are_not_finite(variant: str) -> None:
    model, spec, blocks, ids = parts(variant)
    stages = stages_of(spec, model.config)
    first = stages[0][0]
    stream = Stream(model, spec, blocks[0], ids)
    stream.hidden[1, 3, 5] = float("inf")
    with pytest.raises(DataError, match=rf"{blocks[0]}\.{first.linears[0]}: .*NaN or infinite on the calibration text"):
        stream.statistics(model.get_submodule(blocks[0]), stages[0], blocks[0])
