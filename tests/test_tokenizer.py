"""The tokenizer without transformers: the same ids, texts and ends as with it. What is refused is tested in test_load.py,
where `load_tokenizer` wraps this one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlm.arch.shapes import complete_fields
from qlm.checkpoint.config import read_config
from qlm.checkpoint.reader import Checkpoint
from qlm.load import build_config, load_tokenizer
from qlm.tokenizer import read_tokenizer, special_tokens, stop_ids
from tests.conftest import FAMILIES, change_json

Folder = Callable[..., Path]
TEXTS = [
    "",
    "a",
    "a line\n  of text, été ☃",
    "</s>",
    "one </s> two<pad><s>\n",
    "<unk>",
    " lead and trail ",
    "def f(x):\n\treturn x",
]


def split_files(folder: Path, tokenizer_json: str) -> None:
    """vocab.json and merges.txt instead of tokenizer.json, as the official OPT repositories have them."""
    (folder / "tokenizer.json").unlink()
    model = json.loads(tokenizer_json)["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", "utf-8")


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_same_ids_and_texts_as_the_wrapped_one(variant: str, files: str, copy_of: Folder, tokenizer_json: str) -> None:
    folder = copy_of(variant, pad_token_id=1)
    if files == "vocab.json":
        split_files(folder, tokenizer_json)
    bare, wrapped = read_tokenizer(Checkpoint.open(folder)), load_tokenizer(folder)
    assert len(wrapped) == bare.get_vocab_size()
    for text in TEXTS:
        for special in (True, False):
            ids = bare.encode(text, add_special_tokens=special).ids
            assert ids == wrapped(text, add_special_tokens=special).input_ids
            for skip in (True, False):
                assert bare.decode(ids, skip_special_tokens=skip) == wrapped.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_special_tokens_in_a_text_are_tokens(files: str, copy_of: Folder, tokenizer_json: str) -> None:
    folder = copy_of("opt")
    if files == "vocab.json":
        split_files(folder, tokenizer_json)
    tokenizer = read_tokenizer(Checkpoint.open(folder))
    ids = tokenizer.encode("one</s>two<pad>").ids
    assert (ids[0], ids.count(2), ids[-1]) == (2, 2, 1)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "onetwo"


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize(
    ("eos", "expected"),
    [
        ("absent", None), (None, []), (3, [3]), (319, [319]), (5000, [5000]), (-1, [-1]), ([3], [3]), ([7, 3, 7], [7, 3]),
        ([5000, 3], [5000, 3]), ([-1, 3], [-1, 3]),
    ],
    ids=repr,
)  # fmt: skip
def test_stop_ids(variant: str, eos: Any, expected: list[int] | None, copy_of: Folder) -> None:
    """The rule of generating with transformers: the tokenizer's own EOS, else the config's; all of a list."""
    folder = copy_of(variant)
    change_json(folder / "config.json", eos_token_id=None)
    if eos != "absent":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
    checkpoint = Checkpoint.open(folder)
    spec, given = read_config(checkpoint)
    found = stop_ids(complete_fields(spec, given), read_tokenizer(checkpoint))

    configured, own = build_config(spec, given).eos_token_id, load_tokenizer(folder).eos_token_id
    several = configured if isinstance(configured, list) else []
    first = own if own is not None else None if several else configured
    assert found == list(dict.fromkeys([*([] if first is None else [first]), *several]))
    assert found == ([spec.defaults["eos_token_id"]] if expected is None else expected)


def test_special_tokens(copy_of: Folder) -> None:
    folder = copy_of("neox-parallel-rotary-0.25", bos_token_id=-1, eos_token_id=[3, 0], pad_token_id=100_000)
    checkpoint = Checkpoint.open(folder)
    spec, fields = read_config(checkpoint)
    assert special_tokens(spec, fields, read_tokenizer(checkpoint)) == {"eos_token": "<unk>"}
