"""Loading: every class of every family gives the logits of transformers' own loading, whatever the layout of the files."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, processors

import qlm
from qlm.arch import FAMILIES as SPECS
from qlm.errors import DataError, MissingInput, Unavailable, UsageError
from qlm.load import _check_flash, block_paths, check_device, device_map, set_parameter, tied_names
from qlm.recipe import parse_recipe
from tests import tiny_models
from tests.conftest import BACKENDS, FAMILIES, ROOT, SPECIALS, change_json, recipe_text

Folder = Callable[..., Path]
TASKS = [(variant, task) for variant, spec in zip(FAMILIES, SPECS.values(), strict=True) for task in spec.model_classes]
# fp32 on both sides and the same operations: only a fused kernel may differ in its last bits.
TOLERANCE = 1e-6


def outputs(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """All float outputs of a model, side by side."""
    with torch.no_grad():
        out = model(tiny_models.token_ids() if ids is None else ids, use_cache=False)
    return torch.cat([value.float().flatten(1) for value in out.values() if isinstance(value, torch.Tensor)], 1)


def spec_of(variant: str) -> qlm.arch.FamilySpec:
    return SPECS[tiny_models.build(variant).config.model_type]


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_every_variant_equals_transformers(variant: str, folder_of: Folder) -> None:
    ours = qlm.load(folder_of(variant))
    theirs = tiny_models.build(variant, dtype=torch.float16)
    assert type(ours) is type(theirs)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.float()
    torch.testing.assert_close(outputs(ours), outputs(theirs), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("variant", "task"), TASKS, ids=lambda value: value)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_task_equals_transformers(
    variant: str, task: str, attention: str, tmp_path: Path, folder_of: Folder
) -> None:
    config = transformers.AutoConfig.from_pretrained(folder_of(variant), num_labels=3, pad_token_id=1)
    torch.manual_seed(1)
    name = spec_of(variant).model_classes[task]
    theirs = getattr(transformers, name)._from_config(config, attn_implementation=attention).eval().float()
    theirs.save_pretrained(tmp_path)
    ours = qlm.load(tmp_path, task=task, attn_implementation=attention)
    assert type(ours).__name__ == name
    assert not ours.training
    assert ours.config._attn_implementation == attention
    torch.testing.assert_close(outputs(ours), outputs(theirs), atol=TOLERANCE, rtol=0)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(("variant", "task"), [t for t in TASKS if t[1] not in ("causal-lm", "base")], ids=lambda v: v)
class TestNewHead:
    def test_is_an_error_unless_asked_for(self, variant: str, task: str, folder_of: Folder) -> None:
        with pytest.raises(DataError, match=r"score|classifier|qa_outputs"):
            qlm.load(folder_of(variant), task=task)

    def test_follows_the_seed(self, variant: str, task: str, folder_of: Folder) -> None:
        heads = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            model = qlm.load(folder_of(variant), task=task, new_head=True)
            body = f"{spec_of(variant).prefix}."
            heads.append({name: p for name, p in model.named_parameters() if not name.startswith(body)})
        assert heads[0]
        for name, head in heads[0].items():
            assert torch.equal(head, heads[1][name])
            assert head.ndim == 1 or not torch.equal(head, heads[2][name])
            assert head.isfinite().all()

    def test_leaves_a_head_that_is_there(self, variant: str, task: str, tmp_path: Path, folder_of: Folder) -> None:
        torch.manual_seed(5)
        qlm.load(folder_of(variant), task=task, new_head=True).save_pretrained(tmp_path)
        torch.manual_seed(6)
        again, plain = qlm.load(tmp_path, task=task, new_head=True), qlm.load(tmp_path, task=task)
        for (name, a), b in zip(again.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("variant", FAMILIES)
class TestFileLayouts:
    def test_base_only(self, variant: str, tmp_path: Path, folder_of: Folder) -> None:
        """Files of the base model alone have no `model.` before their names; the head is the embedding."""
        spec = spec_of(variant)
        getattr(tiny_models.build(variant, dtype=torch.float16), spec.prefix).save_pretrained(tmp_path)
        whole, base = qlm.load(folder_of(variant)), qlm.load(tmp_path, task="base")
        assert torch.equal(outputs(base), outputs(getattr(whole, spec.prefix)))
        assert torch.equal(outputs(base), outputs(qlm.load(folder_of(variant), task="base")))
        if spec.head_tied:
            assert torch.equal(outputs(qlm.load(tmp_path)), outputs(whole))
        else:
            with pytest.raises(DataError, match=r"embed_out\.weight"):
                qlm.load(tmp_path)

    def test_sharded_safetensors(self, variant: str, tmp_path: Path, folder_of: Folder) -> None:
        tiny_models.build(variant, dtype=torch.float16).save_pretrained(tmp_path, max_shard_size="300KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert torch.equal(outputs(qlm.load(tmp_path)), outputs(qlm.load(folder_of(variant))))

    @pytest.mark.parametrize("shards", [1, 3])
    def test_bin(self, variant: str, shards: int, copy_of: Folder, folder_of: Folder) -> None:
        folder = copy_of(variant)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if shards == 1:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            weight_map = {}
            for index in range(shards):
                name = f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin"
                part = dict(list(tensors.items())[index::shards])
                torch.save(part, folder / name)
                weight_map |= dict.fromkeys(part, name)
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert torch.equal(outputs(qlm.load(folder)), outputs(qlm.load(folder_of(variant))))

    def test_hub_cache(self, variant: str, tmp_path: Path, folder_of: Folder) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "models--org--name"
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        for file in folder_of(variant).iterdir():
            shutil.copy(file, repository / "blobs" / f"hash-of-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
        for place in (repository, snapshot):
            assert torch.equal(outputs(qlm.load(place)), outputs(qlm.load(folder_of(variant))))
            assert qlm.load_tokenizer(place).eos_token_id in (0, 2)

    def test_head_repeats_or_replaces_the_embedding(self, variant: str, copy_of: Folder) -> None:
        spec = spec_of(variant)
        folder = copy_of(variant, tie_word_embeddings=True)
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(f"{spec.published_head}.weight", None)
        embedding = tensors[f"{spec.prefix}.{spec.embedding}.weight"]
        save_file(tensors, folder / "model.safetensors")
        alone = outputs(qlm.load(folder))
        save_file({**tensors, f"{spec.published_head}.weight": embedding.clone()}, folder / "model.safetensors")
        repeated = qlm.load(folder)
        assert torch.equal(outputs(repeated), alone)
        assert repeated.get_output_embeddings().weight is repeated.get_input_embeddings().weight
        other = embedding.clone()
        other[7, 3] += 1
        save_file({**tensors, f"{spec.published_head}.weight": other}, folder / "model.safetensors")
        with pytest.raises(DataError, match=rf"{spec.published_head}\.weight: differs from .*embed|wte"):
            qlm.load(folder)
        change_json(folder / "config.json", tie_word_embeddings=False)
        own = qlm.load(folder)
        assert own.get_output_embeddings().weight is not own.get_input_embeddings().weight
        assert not torch.equal(outputs(own), alone)


@pytest.mark.parametrize("name", ["embed_out", "lm_head"])
def test_neox_head_under_either_name(name: str, copy_of: Folder, folder_of: Folder) -> None:
    folder = copy_of(FAMILIES[1])
    tensors = load_file(folder / "model.safetensors")
    (head,) = [tensor for key, tensor in tensors.items() if key in ("embed_out.weight", "lm_head.weight")]
    body = {key: tensor for key, tensor in tensors.items() if tensor is not head}
    save_file({**body, f"{name}.weight": head}, folder / "model.safetensors")
    assert torch.equal(outputs(qlm.load(folder)), outputs(qlm.load(folder_of(FAMILIES[1]))))
    save_file({**body, "embed_out.weight": head, "lm_head.weight": head.clone()}, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"lm_head\.weight"):
        qlm.load(folder)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_rotary_fraction_in_its_old_and_new_place(fraction: float, copy_of: Folder) -> None:
    results = []
    for number, fields in enumerate(
        (
            {"rotary_pct": fraction, "rotary_emb_base": 500},
            {"partial_rotary_factor": fraction, "rope_theta": 500.0},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": fraction}},
        )
    ):
        folder = copy_of(FAMILIES[1], f"model{number}", rope_parameters=None)
        change_json(folder / "config.json", **fields)
        results.append(outputs(qlm.load(folder)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    expected = tiny_models.gpt_neox(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": fraction}
    ).eval()
    expected.load_state_dict(tiny_models.build(FAMILIES[1], dtype=torch.float16).float().state_dict(), strict=False)
    torch.testing.assert_close(results[0], outputs(expected), atol=TOLERANCE, rtol=0)


class TestDtypes:
    @pytest.mark.parametrize(
        ("asked", "got"),
        [
            (None, torch.float32),
            ("auto", torch.float32),
            ("bfloat16", torch.bfloat16),
            (torch.float16, torch.float16),
            ("float32", torch.float32),
        ],
    )
    def test_on_a_cpu(self, asked: str | torch.dtype | None, got: torch.dtype, folder_of: Folder) -> None:
        model = qlm.load(folder_of(FAMILIES[1]), dtype=asked)
        assert {p.dtype for p in model.parameters()} == {got}
        assert model.config.dtype == got
        assert model.dtype == got
        # The rotary frequencies are no weights: rounding them would shift every angle.
        assert model.gpt_neox.rotary_emb.inv_freq.dtype == torch.float32

    @pytest.mark.parametrize("wrong", ["int8", "float64", "half precision", "nn", torch.int8, torch.float64])
    def test_refused(self, wrong: object, folder_of: Folder) -> None:
        with pytest.raises(UsageError, match=r"dtype: .*expected"):
            qlm.load(folder_of("opt"), dtype=wrong)


class TestPlaces:
    def test_no_gpu(self, folder_of: Folder) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(Unavailable, match="no CUDA GPU"):
            qlm.load(folder_of("opt"), device="cuda")

    @pytest.mark.parametrize("device", ["gpu", "meta", "mps", "", "cpu:0:1"])
    def test_other_devices(self, device: str, folder_of: Folder) -> None:
        with pytest.raises(UsageError, match=r"device: .*expected 'cpu', 'cuda' or 'cuda:N'"):
            qlm.load(folder_of("opt"), device=device)

    def test_a_gpu_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        check_device("cuda")
        check_device("cuda:1")
        with pytest.raises(Unavailable, match="'cuda:2', but torch sees 2 CUDA GPUs here"):
            check_device("cuda:2")

    def test_flash_attention_on_an_old_gpu_or_in_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(UsageError, match="this model in float32"):
            _check_flash(torch.float32, "cuda")
        with pytest.raises(Unavailable, match=r"needs compute capability 8.0, which Tesla T4"):
            _check_flash(torch.float16, "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        _check_flash(torch.float16, "cuda")

    def test_flash_attention(self, folder_of: Folder) -> None:
        with pytest.raises(Unavailable, match="flash_attention_2 runs on CUDA only"):
            qlm.load(folder_of("opt"), attn_implementation="flash_attention_2")

    def test_unknown_attention(self, folder_of: Folder) -> None:
        with pytest.raises(UsageError, match="'flex'; expected one of eager, sdpa"):
            qlm.load(folder_of("opt"), attn_implementation="flex")

    @pytest.mark.parametrize("task", ["token-classification", "text-generation"])
    def test_no_such_task(self, task: str, folder_of: Folder) -> None:
        with pytest.raises(UsageError, match=r"opt has no class for .*; it has causal-lm"):
            qlm.load(folder_of("opt"), task=task)

    def test_eager_and_sdpa_agree(self, folder_of: Folder) -> None:
        for variant in FAMILIES:
            eager = qlm.load(folder_of(variant), attn_implementation="eager")
            torch.testing.assert_close(outputs(eager), outputs(qlm.load(folder_of(variant))), atol=1e-4, rtol=0)


class TestDamagedWeights:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, value: float, copy_of: Folder) -> None:
        folder = copy_of()
        tensors = load_file(folder / "model.safetensors")
        tensors["model.decoder.layers.1.fc2.weight"][3, 4] = value
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(
            DataError, match=r"layers\.1\.fc2\.weight: 1 of 32768 values are NaN or infinite, the first at \[3, 4\]"
        ):
            qlm.load(folder)

    def test_too_large_for_the_dtype(self, copy_of: Folder) -> None:
        """Weights beyond fp16's range must not become infinite in silence."""
        folder = copy_of()
        tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        tensors["model.decoder.layers.0.fc1.weight"][0, 0] = 1e6
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(DataError, match=r"fc1\.weight: .*does not fit into .*float16"):
            qlm.load(folder, dtype="float16")


class TestTokenizers:
    def test_opt_adds_bos_whatever_the_file_says(self, copy_of: Folder) -> None:
        folder = copy_of("opt")
        for processor in (None, processors.ByteLevel(), bos_after_the_text()):
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            if processor is not None:
                tokenizer.post_processor = processor
            tokenizer.save(str(folder / "tokenizer.json"))
            loaded = qlm.load_tokenizer(folder)
            ids = loaded("the text").input_ids
            assert ids[0] == 2
            assert ids.count(2) == 1
            assert loaded.decode(ids, skip_special_tokens=True) == "the text"
            assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("</s>", "</s>", "<pad>")
            assert loaded.model_max_length == tiny_models.POSITIONS

    @pytest.mark.parametrize("variant", FAMILIES[1:])
    def test_the_others_add_nothing(self, variant: str, copy_of: Folder) -> None:
        folder = copy_of(variant)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        plain = tokenizer.encode("the text").ids
        tokenizer.post_processor = bos_after_the_text()
        tokenizer.enable_padding(length=30)
        tokenizer.enable_truncation(2)
        tokenizer.save(str(folder / "tokenizer.json"))
        assert qlm.load_tokenizer(folder)("the text").input_ids == plain

    @pytest.mark.parametrize("variant", FAMILIES)
    def test_vocabulary_and_merges(self, variant: str, copy_of: Folder, tokenizer_json: str) -> None:
        folder = copy_of(variant)
        expected = qlm.load_tokenizer(folder)("a line\n  of text, été ☃").input_ids
        (folder / "tokenizer.json").unlink()
        model = json.loads(tokenizer_json)["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
        merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", "utf-8")
        loaded = qlm.load_tokenizer(folder)
        assert loaded("a line\n  of text, été ☃").input_ids == expected
        assert loaded.decode(expected, skip_special_tokens=True) == "a line\n  of text, été ☃"

    def test_what_the_folder_names_is_not_asked(self, copy_of: Folder) -> None:
        folder = copy_of("opt")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": SPECIALS[0], "add_bos_token": False})
        )
        assert type(qlm.load_tokenizer(folder)).__name__ == type(qlm.load_tokenizer(copy_of("opt", "plain"))).__name__
        assert qlm.load_tokenizer(folder)("a").input_ids[0] == 2

    def test_missing(self, copy_of: Folder) -> None:
        folder = copy_of()
        (folder / "tokenizer.json").unlink()
        with pytest.raises(MissingInput, match=r"no tokenizer\.json, and no vocab\.json with merges\.txt"):
            qlm.load_tokenizer(folder)
        (folder / "vocab.json").write_text("{}")
        with pytest.raises(MissingInput, match=r"merges\.txt"):
            qlm.load_tokenizer(folder)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: "",
            lambda text: "[]",
            lambda text: "{}",
            lambda text: text[: len(text) // 2],
            lambda text: "\ufeff\0" + text,
            lambda text: text.replace('"BPE"', '"NoSuchModel"'),
            lambda text: json.dumps({**json.loads(text), "model": {"type": "BPE", "vocab": {}, "merges": []}}),
            lambda text: json.dumps({**json.loads(text), "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
            lambda text: json.dumps(
                {**json.loads(text), "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}
            ),
            lambda text: json.dumps(
                {**json.loads(text), "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
            ),
            lambda text: json.dumps({**json.loads(text), "normalizer": {"type": "Replace"}}),
            lambda text: json.dumps(
                {**json.loads(text), "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}}
            ),
        ],
        ids=["empty", "list", "object", "cut", "binary", "model", "no vocabulary", "negative id", "merges", "charsmap", "normalizer", "regex"],
    )  # fmt: skip
    def test_damaged(self, damage: Callable[[str], str], copy_of: Folder, capfd: pytest.CaptureFixture[str]) -> None:
        folder = copy_of()
        text = damage((folder / "tokenizer.json").read_text("utf-8"))
        (folder / "tokenizer.json").write_text(text, "utf-8")
        with pytest.raises(DataError, match=str(folder)):
            qlm.load_tokenizer(folder)
        assert capfd.readouterr().err == ""

    def test_not_utf8(self, copy_of: Folder) -> None:
        folder = copy_of()
        (folder / "tokenizer.json").write_bytes(b"\xff\xfe{}")
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            qlm.load_tokenizer(folder)

    def test_without_the_bos_token(self, copy_of: Folder) -> None:
        folder = copy_of()
        Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(folder / "tokenizer.json"))
        with pytest.raises(DataError, match="no token 2"):
            qlm.load_tokenizer(folder)

    def test_ids_beyond_the_model(self, copy_of: Folder) -> None:
        """A tokenizer of another, larger model: found before the model reads beyond its embedding."""
        folder = copy_of(FAMILIES[2])
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens([f"word{i}" for i in range(5)])
        tokenizer.save(str(folder / "tokenizer.json"))
        loaded = qlm.load_tokenizer(folder)
        with pytest.raises(DataError, match="another model's"):
            qlm.generate(qlm.load(folder), loaded, "word4 ", max_new_tokens=1)


def bos_after_the_text() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])


MEASURE = """
import os, sys
import torch, transformers, qlm, qlm.load
from transformers import OPTForCausalLM
def kilobytes(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1])
def peak():
    # Without pages of files: code that runs for the first time brings in as much of its library as the page cache likes.
    return (kilobytes("VmHWM") - kilobytes("RssFile")) * 1024
model = qlm.load(sys.argv[2])
del model
open("/proc/self/clear_refs", "w").write("5")
start = peak()
model = qlm.load(sys.argv[1])
assert sys.argv[1] not in open("/proc/self/maps").read()
print(peak() - start, sum(p.numel() * 4 for p in model.parameters()), max(p.numel() for p in model.parameters()))
"""


def test_never_holds_the_checkpoint_twice(tmp_path: Path, folder_of: Folder) -> None:
    """fp32 in and fp32 out: the peak is the model and one tensor more."""
    model = tiny_models.opt(
        hidden_size=1024, ffn_dim=4096, word_embed_proj_dim=1024, num_hidden_layers=3, num_attention_heads=8
    )
    model.save_pretrained(tmp_path / "large")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "large", folder_of("opt")],
        # Large blocks straight from the system: what the C heap keeps of freed ones differs from run to run.
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        },
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown, size, largest = map(int, done.stdout.split())
    assert size > 150e6
    print(f"loading {size / 1e6:.0f} MB of parameters took {grown / 1e6:.0f} MB")
    assert grown < size + 2 * 4 * largest + 10e6


class TestSeveralDevices:
    """No machine of the tests has two GPUs: two names of the CPU stand for them, and what moves is counted."""

    def fake(self, monkeypatch: pytest.MonkeyPatch, **free: int) -> list[str]:
        import accelerate.utils

        moved: list[str] = []
        true = accelerate.utils.send_to_device

        def send(what: Any, device: str, **more: Any) -> Any:
            moved.append(device)
            return true(what, device, **more)

        monkeypatch.setattr(accelerate.utils, "send_to_device", send)
        monkeypatch.setattr(
            sys.modules["qlm.load"], "available_gpus", lambda: {name.replace("_", ":"): n for name, n in free.items()}
        )
        return moved

    @pytest.mark.parametrize("backend", ["float", *BACKENDS])
    @pytest.mark.parametrize("variant", [*FAMILIES, "opt-350m"])
    def test_same_logits(
        self, variant: str, backend: str, folder_of: Callable[[str], Path], text_file: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        folder = folder_of(variant)
        if backend != "float":
            recipe = parse_recipe(recipe_text(folder, tmp_path / "out", backend, text_file), "r.yaml")
            folder = qlm.quantize(recipe).output
        ids = tiny_models.token_ids()
        wanted = qlm.load(folder, dtype=torch.float32)(ids).logits
        moved = self.fake(monkeypatch, cpu=1, cpu_0=1)
        model = qlm.load(folder, dtype=torch.float32, device="auto")
        assert torch.equal(model(ids).logits, wanted)
        # Before each part, arguments and keywords.
        assert len(moved) >= 2 * len(block_paths(SPECS[model.config.model_type], model))
        assert set(moved) == {"cpu", "cpu:0"} == set(model.hf_device_map.values())
        head = model.get_output_embeddings()
        tied = head.weight is model.get_input_embeddings().weight
        assert tied == bool(tied_names(SPECS[model.config.model_type], model.config, "causal-lm"))
        found = model.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
        assert found.shape[1] == 7

    @pytest.mark.parametrize("backend", ["float", "int8"])
    @pytest.mark.parametrize("variant", FAMILIES)
    def test_same_text_and_perplexity(
        self, variant: str, backend: str, folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:  # fmt: skip
        """Greedy and drawn; the perplexity also beside a baseline that lies on one device."""
        folder = folder_of(variant)
        if backend != "float":
            recipe = parse_recipe(recipe_text(folder, tmp_path / "out", backend, None), "r.yaml")
            folder = qlm.quantize(recipe).output
        whole, tokenizer = qlm.load(folder, dtype=torch.float32), qlm.load_tokenizer(folder)
        moved = self.fake(monkeypatch, cpu=1, cpu_0=1)
        spread = qlm.load(folder, dtype=torch.float32, device="auto")
        parts = len(block_paths(SPECS[spread.config.model_type], spread))
        for options in ({"greedy": True}, {"seed": 3, "num_return_sequences": 2, "top_p": 0.9}):
            moved.clear()
            texts = [qlm.generate(m, tokenizer, "The city", max_new_tokens=12, **options) for m in (whole, spread)]
            assert texts[0] == texts[1]
            assert any(texts[0])
            # Every step goes through all parts.
            assert len(moved) >= 12 * parts
        moved.clear()
        ids, settings = tiny_models.token_ids(batch=1, length=100)[0], {"length": 25, "data_sha256": "", "bos": "none"}
        found = qlm.evaluate(spread, ids, **settings, baseline=whole)
        assert set(moved) == {"cpu", "cpu:0"}
        assert found.perplexity == qlm.evaluate(whole, ids, **settings).perplexity > 1
        assert found.kl_divergence == pytest.approx(0, abs=1e-7)

    @pytest.mark.parametrize("task", ["causal-lm", "base"])
    @pytest.mark.parametrize("backend", ["float", "int8"])
    @pytest.mark.parametrize("variant", FAMILIES)
    def test_each_tensor_is_put_where_it_belongs_and_once(
        self, variant: str, backend: str, task: Any, folder_of: Callable[[str], Path], text_file: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """GPTBigCode's base model has a buffer of its own, and so is a part of the map's like others, with all blocks inside."""
        folder, module = folder_of(variant), sys.modules["qlm.load"]
        if backend != "float":
            recipe = parse_recipe(recipe_text(folder, tmp_path / "out", backend, text_file), "r.yaml")
            folder = qlm.quantize(recipe).output
        self.fake(monkeypatch, cpu=1, cpu_0=1)
        filled: list[tuple[str, str]] = []
        whole, quantized = module.fill, module._quantized_module
        here: list[str] = []

        def fill(model: Any, source: Any, path: str = "", *, dtype: Any, device: str) -> None:
            here.append(device)
            whole(model, source, path, dtype=dtype, device=device)

        def put(model: Any, name: str, tensor: Any) -> None:
            filled.append((name, here[-1]))
            set_parameter(model, name, tensor)

        def made(source: Any, linear: Any, path: str, dtype: Any, device: str) -> Any:
            filled.append((path, device))
            return quantized(source, linear, path, dtype, device)

        monkeypatch.setattr(module, "fill", fill)
        monkeypatch.setattr(module, "set_parameter", put)
        monkeypatch.setattr(module, "_quantized_module", made)
        model = qlm.load(folder, task=task, dtype=torch.float32, device="auto")
        assert len({name for name, _ in filled}) == len(filled)
        where = model.hf_device_map
        for name, device in filled:
            (part,) = [path for path in where if name == path or name.startswith(f"{path}.")]
            assert device == where[part], name
        assert "" not in where

    @pytest.mark.parametrize(("first", "blocks"), [(1, 6), (3, 9), (0, 0), (99999, 12)])
    def test_shares(self, first: int, blocks: int) -> None:
        """Twelve blocks alike, by what is free: half of them, three quarters, none, all."""
        config = transformers.OPTConfig(
            hidden_size=16,
            ffn_dim=32,
            num_attention_heads=2,
            num_hidden_layers=12,
            vocab_size=50,
            word_embed_proj_dim=16,
        )
        model = transformers.OPTForCausalLM(config)
        tensors = {name: SimpleNamespace(bytes=p.nbytes) for name, p in model.named_parameters()}
        source: Any = SimpleNamespace(
            spec=SPECS["opt"], config=config, stored_names=lambda: list(tensors), file_names={name: name for name in tensors},
            checkpoint=SimpleNamespace(tensors=tensors),
        )  # fmt: skip
        found = device_map(model, source, "causal-lm", {"a": first, "b": 1})
        order = [found[path] for path in block_paths(SPECS["opt"], model)]
        assert order == ["a"] * blocks + ["b"] * (12 - blocks)
        decoder = "model.decoder"
        assert {found[f"{decoder}.embed_tokens"], found[f"{decoder}.embed_positions"], found["lm_head"]} == {"a"}
        assert found[f"{decoder}.final_layer_norm"] == "b"
        parts = tuple(f"{path}." for path in found)
        assert all(name.startswith(parts) for name, _ in model.named_parameters())

    def test_no_gpu(self, folder_of: Callable[[str], Path]) -> None:
        with pytest.raises(Unavailable, match="no CUDA GPU"):
            qlm.load(folder_of("opt"), device="auto")
