"""Bad input through the real command line: one line on stderr, the exit code of the kind, and nothing left behind."""

import json
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlm.kernels import cpu
from tests import tiny_models
from tests.conftest import FAMILIES, Cli, command, names_below, recipe_text

Folder = Callable[..., Path]
RecipeFile = Callable[..., Path]
Refused = Callable[..., str]
WEIGHT = "model.decoder.layers.1.fc1.weight"


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Refused:
    """`qlm quantize` must fail with this exit code and one line that holds all the words, and change nothing on disk."""

    def check(code: int, *recipes: Path, words: tuple[str, ...]) -> str:
        before = names_below(tmp_path)
        line = cli.fails(code, "quantize", *recipes)
        assert names_below(tmp_path) == before
        for word in words:
            assert word in line
        return line

    return check


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_header(folder: Path, edit: Callable[[str], str]) -> None:
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = edit(data[8 : 8 + size].decode().strip()).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


class TestRecipes:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (("quantize:", "quantise:"), (":2:1: quantise: unknown key", "did you mean quantize?")),
            (('"backend"', '"backends"'), ("backends: unknown key", "did you mean backend?")),
            (('"int8"', '"int9"'), ("quantize.backend", "'int9'", "int8, nf4")),
            (('"int8"}', '"gptq", "bits": 5}'), ("quantize.bits", "5", "2, 3, 4")),
            (('"int8"}', '"gptq", "bits": "4"}'), ("quantize.bits", "'4'")),
            (('"int8"}', '"int8", "group_size": 64}'), ("quantize.group_size", "backend int8")),
            (('"int8"}', '"gptq", "damp": 1e-40}'), ("quantize.damp",)),
            (("output:", "outputs:"), ("outputs: unknown key",)),
            (("model:", "dtype: no\nmodel:"), ("dtype", "'no'")),
            (("model:", "model: other\nmodel:"), ("model", "twice")),
            (("model:", "\tmodel:"), (":1:",)),
        ],
        ids=lambda value: value[1] if len(value) == 2 and "\n" not in value[1] else "",
    )
    def test_wrong(
        self, change: tuple[str, str], words: tuple[str, ...], folder_of: Folder, recipe_file: RecipeFile,
        refused: Refused, tmp_path: Path, cli: Cli,
    ) -> None:  # fmt: skip
        path = recipe_file(folder_of("opt"), tmp_path / "out")
        path.write_text(path.read_text().replace(*change, 1))
        if "1e-40" in change[1]:
            words = ("calibration",)
        line = refused(2, path, words=words)
        assert re.match(rf"qlm: error: {re.escape(str(path))}:\d+:\d+: ", line)
        assert cli.fails(2, "validate", path) == line

    @pytest.mark.parametrize("content", [b"", b"- a\n", b"\xff\xfe", b"a: &x 1\nb: *x\n", b"{" * 5000, b"a" * 300_000])
    def test_no_recipe(self, content: bytes, tmp_path: Path, refused: Refused) -> None:
        (tmp_path / "r.yaml").write_bytes(content)
        refused(2, tmp_path / "r.yaml", words=("r.yaml",))

    def test_missing(self, tmp_path: Path, refused: Refused) -> None:
        refused(66, tmp_path / "none.yaml", words=("none.yaml",))

    def test_two_for_one_output(
        self, folder_of: Folder, recipe_file: RecipeFile, refused: Refused, tmp_path: Path
    ) -> None:
        a = recipe_file(folder_of("opt"), tmp_path / "out", "int8", "a.yaml")
        for place in (tmp_path / "out", tmp_path / "x" / ".." / "out", tmp_path / "out" / "inside"):
            b = recipe_file(folder_of("opt"), place, "nf4", "b.yaml")
            refused(2, a, b, words=("a.yaml", "b.yaml", "output"))

    def test_a_wrong_one_among_good_ones(
        self, folder_of: Folder, recipe_file: RecipeFile, refused: Refused, tmp_path: Path
    ) -> None:
        """All recipes are read before the first is run."""
        good = recipe_file(folder_of("opt"), tmp_path / "out", "int8", "good.yaml")
        bad = recipe_file(folder_of("opt"), tmp_path / "out2", "int3", "bad.yaml")
        refused(2, good, bad, words=("bad.yaml",))

    def test_group_size_that_does_not_divide(
        self, tmp_path: Path, tokenizer_json: str, recipe_file: RecipeFile, refused: Refused
    ) -> None:
        tiny_models.opt(ffn_dim=320).half().save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "tokenizer.json").write_text(tokenizer_json)
        recipe = recipe_file(tmp_path / "model", tmp_path / "out", "gptq")
        refused(2, recipe, words=("quantize.group_size: 128 does not divide the 320 inputs of ", "fc2"))

    def test_bits_that_cannot_be_packed(self, tmp_path: Path, recipe_file: RecipeFile, refused: Refused) -> None:
        tiny_models.opt(hidden_size=120, word_embed_proj_dim=120).half().save_pretrained(tmp_path / "model")
        recipe = recipe_file(tmp_path / "model", tmp_path / "out", "gptq", bits=3, group_size=-1)
        refused(2, recipe, words=("120 inputs", "3-bit", "multiple of 32"))
        recipe = recipe_file(tmp_path / "model", tmp_path / "out", "nf4")
        refused(2, recipe, words=("blocks of 64", "120 inputs", "quantize.skip"))

    def test_glob_that_matches_nothing(
        self, folder_of: Folder, recipe_file: RecipeFile, refused: Refused, tmp_path: Path
    ) -> None:
        recipe = recipe_file(folder_of("opt"), tmp_path / "out", "int8", skip=["decoder.layers.0.*"])
        refused(2, recipe, words=("'decoder.layers.0.*' matches none", "model.decoder.layers.0"))

    def test_text_longer_than_the_positions(
        self, folder_of: Folder, recipe_file: RecipeFile, refused: Refused, tmp_path: Path
    ) -> None:
        recipe = recipe_file(folder_of("opt"), tmp_path / "out", "gptq")
        recipe.write_text(recipe.read_text().replace("length: 32", "length: 65"))
        refused(2, recipe, words=("65 tokens", "64 positions"))


class TestModels:
    @pytest.fixture
    def model_refused(self, recipe_file: RecipeFile, refused: Refused, tmp_path: Path, cli: Cli) -> Refused:
        """Refused by `quantize`, and with the same line by `inspect`, `generate` and `evaluate`."""

        def check(code: int, model: Path, *, words: tuple[str, ...], everywhere: bool = True) -> None:
            line = refused(code, recipe_file(model, tmp_path / "out"), words=words)
            if everywhere:
                generate = ["generate", model, "--prompt", "a", "--max-new-tokens", 2, "--runtime"]
                runtimes = ["transformers", *(["engine"] if cpu.available() else [])]
                for arguments in (["inspect", model], *([*generate, runtime] for runtime in runtimes)):
                    assert cli.fails(code, *arguments) == line

        return check

    def test_missing(self, tmp_path: Path, model_refused: Refused) -> None:
        model_refused(66, tmp_path / "none", words=("none", "does not exist"))

    def test_a_file(self, copy_of: Folder, model_refused: Refused) -> None:
        model_refused(66, copy_of() / "model.safetensors", words=("is a file",))

    def test_empty_folder(self, tmp_path: Path, model_refused: Refused) -> None:
        (tmp_path / "model").mkdir()
        model_refused(66, tmp_path / "model", words=("config.json",))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model_type": "llama"}, ("'llama'", "opt, gpt_neox")),
            ({"model_type": None}, ("model_type",)),
            ({"hidden_sizes": 128}, ("hidden_sizes", "did you mean 'hidden_size'?")),
            ({"num_hidden_layers": 3}, ("layers.2.", "tensors")),
            ({"hidden_size": 256, "word_embed_proj_dim": 256}, ("shape",)),
            ({"hidden_size": "128"}, ("hidden_size",)),
            ({"vocab_size": 1 << 40}, ("vocab_size",)),
            ({"auto_map": {"AutoModel": "evil.Model"}}, ("auto_map",)),
            ({"activation_function": "evil"}, ("activation_function",)),
            ({"num_attention_heads": 0}, ("num_attention_heads",)),
            ({"quantization_config": {"quant_method": "awq"}}, ("awq",)),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_config(
        self, changes: dict[str, Any], words: tuple[str, ...], copy_of: Folder, model_refused: Refused
    ) -> None:
        model_refused(65, copy_of(**changes), words=words)

    @pytest.mark.parametrize(
        "content", [b"", b"[]", b'{"a": 1, "a": 2}', b'{"vocab_size": NaN}', b"\xff", b"[" * 99999]
    )
    def test_config_that_is_no_json(self, content: bytes, copy_of: Folder, model_refused: Refused) -> None:
        folder = copy_of()
        (folder / "config.json").write_bytes(content)
        model_refused(65, folder, words=("config.json",))

    @pytest.mark.parametrize(
        ("edit", "words"),
        [
            (lambda t: t.pop(WEIGHT), (WEIGHT,)),
            (lambda t: t.update({"model.decoder.layers.0.fc9.weight": torch.zeros(2)}), ("fc9.weight", "not expected")),
            (lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}), (WEIGHT, "shape", "[128, 256]", "[256, 128]")),
            (lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)}), (WEIGHT, "int8")),
            (lambda t: t.update({WEIGHT: t[WEIGHT].double()}), (WEIGHT, "float64")),
        ],
        ids=["missing", "extra", "shape", "int8", "float64"],
    )
    def test_tensors(
        self, edit: Callable[[dict[str, torch.Tensor]], Any], words: tuple[str, ...], copy_of: Folder,
        model_refused: Refused,
    ) -> None:  # fmt: skip
        folder = copy_of()
        edit_tensors(folder, edit)
        model_refused(65, folder, words=words)

    @pytest.mark.parametrize("keep", [0, 5, 100, 20_000, -1])
    def test_truncated(self, keep: int, copy_of: Folder, model_refused: Refused) -> None:
        path = copy_of() / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        model_refused(65, path.parent, words=("model.safetensors",))

    def test_duplicated(self, copy_of: Folder, model_refused: Refused) -> None:
        folder = copy_of()
        edit_header(folder, lambda text: text[:-1] + "," + text[1:])
        model_refused(65, folder, words=("model.safetensors", "twice"))

    def test_overlapping(self, copy_of: Folder, model_refused: Refused) -> None:
        folder = copy_of()

        def overlap(text: str) -> str:
            header = json.loads(text)
            header["model.decoder.layers.1.fc1.bias"]["data_offsets"] = header["model.decoder.layers.0.fc1.bias"][
                "data_offsets"
            ]
            return json.dumps(header)

        edit_header(folder, overlap)
        model_refused(65, folder, words=("model.safetensors",))

    def test_not_a_number(
        self, copy_of: Folder, recipe_file: RecipeFile, tmp_path: Path, cli: Cli, refused: Refused
    ) -> None:
        """In the first block nothing is left; in the second the first stays, to go on from."""
        for layer in (0, 1):
            folder = copy_of(name=f"model{layer}")
            name = WEIGHT.replace("1", str(layer), 1)
            edit_tensors(folder, lambda t, name=name: t[name].view(-1)[7].fill_(float("nan")))
            recipe = recipe_file(folder, tmp_path / f"out{layer}")
            if layer == 0:
                refused(65, recipe, words=(name, "NaN", "[0, 7]"))
            else:
                assert name in cli.fails(65, "quantize", recipe)
                assert not (tmp_path / "out1").exists()
                assert (tmp_path / "out1.partial").exists()

    @pytest.fixture
    def sharded(self, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        tiny_models.build("opt", dtype=torch.float16).save_pretrained(folder, max_shard_size="200KB")
        return folder

    def test_missing_shard(self, sharded: Path, model_refused: Refused) -> None:
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.unlink()
        model_refused(66, sharded, words=(shard.name, "missing"))

    @pytest.mark.parametrize(
        "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "C:x.safetensors", "..", ""]
    )
    def test_shard_path(self, name: str, sharded: Path, model_refused: Refused) -> None:
        index = sharded / "model.safetensors.index.json"
        value = json.loads(index.read_text())
        value["weight_map"][WEIGHT] = name
        index.write_text(json.dumps(value))
        model_refused(65, sharded, words=(WEIGHT, "plain name"))

    def test_symlink_out_of_the_folder(self, copy_of: Folder, tmp_path: Path, model_refused: Refused) -> None:
        folder = copy_of()
        (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
        (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
        model_refused(65, folder, words=("model.safetensors", "outside the model's folder"))

    def test_tensor_in_two_shards(self, sharded: Path, model_refused: Refused) -> None:
        first, second = sorted(sharded.glob("*.safetensors"))[:2]
        tensors = load_file(second)
        name, tensor = next(iter(load_file(first).items()))
        save_file({**tensors, name: tensor}, second)
        model_refused(65, sharded, words=(second.name, name, f"lies in '{first.name}'"))

    def test_pickle_with_a_foreign_name(self, copy_of: Folder, tmp_path: Path, model_refused: Refused) -> None:
        folder = copy_of()
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()

        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.system, (f"touch {tmp_path}/owned",)

        torch.save({**tensors, "evil": Evil()}, folder / "pytorch_model.bin")
        model_refused(65, folder, words=("pytorch_model.bin", "system"))
        assert not (tmp_path / "owned").exists()

    def test_no_tokenizer(self, copy_of: Folder, recipe_file: RecipeFile, refused: Refused, tmp_path: Path) -> None:
        folder = copy_of()
        (folder / "tokenizer.json").unlink()
        refused(66, recipe_file(folder, tmp_path / "out", "gptq"), words=("tokenizer.json",))

    def test_damaged_tokenizer(
        self, copy_of: Folder, recipe_file: RecipeFile, refused: Refused, tmp_path: Path
    ) -> None:
        folder = copy_of()
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        refused(65, recipe_file(folder, tmp_path / "out", "gptq"), words=("tokenizer.json",))

    def test_another_families_tokenizer(
        self, copy_of: Folder, recipe_file: RecipeFile, refused: Refused, tmp_path: Path
    ) -> None:
        """Ids that the embedding does not have are found before any block is touched."""
        folder = copy_of(FAMILIES[1])
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        for index, piece in enumerate(["Ġthe", "Ġa"]):
            if piece in tokenizer["model"]["vocab"]:
                tokenizer["model"]["vocab"][piece] = 5000 + index
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        refused(65, recipe_file(folder, tmp_path / "out", "gptq"), words=("tokenizer", "320"))


class TestTexts:
    @pytest.mark.parametrize(
        ("content", "code", "words"),
        [
            (None, 66, ("no such file",)),
            (b"", 2, ("no text in it",)),
            (b"a few words", 2, ("tokens are missing",)),
            (b"\x7fELF\xff\x00\x01", 65, ("not UTF-8 text: byte 4 is 0xff",)),
            (b"a\x00b" * 500, 65, ("NUL",)),
        ],
        ids=["missing", "empty", "short", "binary", "nul"],
    )
    @pytest.mark.parametrize("where", ["calibration", "evaluate"])
    def test_refused(
        self, content: bytes | None, code: int, words: tuple[str, ...], where: str, folder_of: Folder, cli: Cli,
        recipe_file: RecipeFile, refused: Refused, tmp_path: Path,
    ) -> None:  # fmt: skip
        text = tmp_path / "text.txt"
        if content is not None:
            text.write_bytes(content)
        if where == "calibration":
            refused(code, recipe_file(folder_of("opt"), tmp_path / "out", "gptq", text=text), words=words)
        else:
            if words == ("tokens are missing",):
                words = ("one window needs",)
            line = cli.fails(code, "evaluate", folder_of("opt"), "--data", text, "--length", 32)
            assert all(word in line for word in words)

    @pytest.mark.parametrize("content", [None, b"", b"\xff"], ids=["missing", "empty", "binary"])
    def test_of_the_evaluation_before_quantizing(
        self, content: bytes | None, folder_of: Folder, recipe_file: RecipeFile, refused: Refused, tmp_path: Path
    ) -> None:
        """Found before an hour of work, not after it."""
        text = tmp_path / "text.txt"
        if content is not None:
            text.write_bytes(content)
        extra = f"evaluate: {{data: {text}}}\n"
        code = {None: 66, b"": 2, b"\xff": 65}[content]
        refused(code, recipe_file(folder_of("opt"), tmp_path / "out", "int8", extra=extra), words=("text.txt",))


class TestPlaces:
    def test_output_exists(self, folder_of: Folder, recipe_file: RecipeFile, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        refused(73, recipe_file(folder_of("opt"), tmp_path / "out"), words=("out: exists already", "--force"))
        (tmp_path / "out2").write_text("a file")
        refused(73, recipe_file(folder_of("opt"), tmp_path / "out2"), words=("out2: exists already",))
        refused(73, recipe_file(folder_of("opt"), tmp_path / "out2" / "x"), words=("out2", "Not a directory"))

    def test_no_permission(self, folder_of: Folder, tmp_path: Path, text_file: Path, cli: Cli) -> None:
        """Root, who may write everywhere, gets a read-only file system."""
        place = tmp_path / "theirs"
        place.mkdir(mode=0o555)
        recipe = tmp_path / "r.yaml"
        recipe.write_text(recipe_text(folder_of("opt"), place / "out", "int8", text_file))
        mounted = os.geteuid() == 0
        if (
            mounted
            and subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "qlm-test", place], capture_output=True).returncode
        ):
            pytest.skip("root without the right to mount cannot be denied a folder")
        try:
            line = cli.fails(73, "quantize", recipe)
            assert "out.partial" in line
            assert ("Read-only file system" if mounted else "Permission denied") in line
            assert list(place.iterdir()) == []
        finally:
            if mounted:
                subprocess.run(["umount", place], check=True)

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        """A file system of 600 kB."""
        place = tmp_path / "small"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "qlm-test", place], capture_output=True)
        if done.returncode:
            pytest.skip(
                "a file system can be mounted by root only; test_resume.py has a disk that is full by injection"
            )
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)

    def test_disk_full(
        self, small_disk: Path, folder_of: Folder, text_file: Path, tmp_path: Path, cli: Cli,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        recipe = tmp_path / "r.yaml"
        recipe.write_text(recipe_text(folder_of("opt"), small_disk / "out", "int8", text_file))
        # The plan refuses at once ...
        line = cli.fails(73, "quantize", recipe)
        assert re.search(r"out needs 0\.02 GB, and 0\.00 GB are free there", line)
        assert list(small_disk.iterdir()) == []
        # ... and where somebody else fills the disk meanwhile, the write that fails is named.
        import qlm.plan

        monkeypatch.setattr(qlm.plan, "free_disk", lambda output: 10**12)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(250_000))
        line = cli.fails(73, "quantize", recipe)
        assert "No space left on device" in line
        assert "bytes needed" in line
        left = {path.name for path in small_disk.iterdir()} - {"filler"}
        assert left <= {"out.partial"}
        # Room is made; the same command ends.
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
        assert cli("quantize", recipe)[0] == 0
        assert cli("verify", small_disk / "out")[0] == 0
        assert {path.name for path in small_disk.iterdir()} == {"out"}

    def test_disk_full_before_anything_is_finished(
        self, small_disk: Path, folder_of: Folder, text_file: Path, tmp_path: Path, cli: Cli,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        import qlm.plan

        monkeypatch.setattr(qlm.plan, "free_disk", lambda output: 10**12)
        (small_disk / "filler").write_bytes(bytes(500_000))
        recipe = tmp_path / "r.yaml"
        recipe.write_text(recipe_text(folder_of("opt"), small_disk / "out", "int8", text_file))
        assert "No space left on device" in cli.fails(73, "quantize", recipe)
        assert [path.name for path in small_disk.iterdir()] == ["filler"]

    def test_file_size_limit(self, folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
        """`ulimit -f`: the kernel's signal would end the process without a word."""
        (tmp_path / "r.yaml").write_text(recipe_text(folder_of("opt"), tmp_path / "out", "int8", text_file))
        process = command(
            "quantize",
            tmp_path / "r.yaml",
            "--quiet",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000,) * 2),
        )
        out, err = process.communicate()
        assert (process.returncode, out) == (73, "")
        assert err.count("\n") == 1
        assert "File too large" in err
        assert not (tmp_path / "out").exists()


def test_a_changed_recipe_for_an_unfinished_output(
    copy_of: Folder, recipe_file: RecipeFile, cli: Cli, tmp_path: Path, refused: Refused
) -> None:
    folder = copy_of()
    edit_tensors(folder, lambda t: t[WEIGHT].view(-1)[7].fill_(float("nan")))
    assert "NaN" in cli.fails(65, "quantize", recipe_file(folder, tmp_path / "out", "nf4"))
    recipe = recipe_file(folder, tmp_path / "out", "nf4", double_quant=True)
    refused(2, recipe, words=("recipe.quantize.double_quant: it has False, now it is True", "--force"))


def test_device_that_is_not_there(
    folder_of: Folder, recipe_file: RecipeFile, cli: Cli, tmp_path: Path, text_file: Path
) -> None:
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in cli.fails(
            69, "quantize", recipe_file(folder_of("opt"), tmp_path / "out"), "--device", "cuda"
        )
        assert "no CUDA GPU" in cli.fails(
            69, "evaluate", folder_of("opt"), "--data", text_file, "--device", "cuda:1", "--length", 32
        )
    recipe = recipe_file(folder_of("opt"), tmp_path / "out", extra="attn_implementation: flash_attention_2\n")
    assert "flash_attention_2" in cli.fails(69, "quantize", recipe)
    assert not (tmp_path / "out").exists()


def test_names_in_files_cannot_write_to_the_terminal(
    copy_of: Folder, recipe_file: RecipeFile, refused: Refused, tmp_path: Path
) -> None:
    folder = copy_of()
    edit_tensors(folder, lambda t: t.update({"\x1b[2Jowned\r\n": torch.zeros(2)}))
    line = refused(65, recipe_file(folder, tmp_path / "out"), words=("owned",))
    assert "\x1b" not in line
    folder = copy_of(name="other", model_type="\x1b[31mred")
    assert "\x1b" not in refused(65, recipe_file(folder, tmp_path / "out"), words=("red",))
