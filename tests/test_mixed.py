"""Mixed precision from a recipe to a folder: within the budget, measured once, drawn, and said in the file as other software reads it."""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import qlm
from qlm.backends.gptq import GptqBackend
from qlm.checkpoint import manifest
from qlm.errors import UsageError
from qlm.formats.gptq import GptqFormat
from qlm.plan import SMALL_FILES_BYTES, plan
from qlm.recipe import Recipe, parse_recipe
from tests import tiny_models
from tests.conftest import FAMILIES, Cli, files_of, recipe_text

Folder = Callable[..., Path]
quantize_module = importlib.import_module("qlm.quantize")
# A budget is used up to a step of a layer, and these models have few; the headers of files are bounded from above.
LEAST_USED = 0.96


@pytest.fixture
def recipe(text_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(model: Path, **more: Any) -> Recipe:
        text = recipe_text(model, tmp_path / "out", "gptq", text_file, quality="fast", **more)
        return parse_recipe(text, "test.yaml")

    return make


def bits_in(folder: Path) -> dict[str, tuple[int, int]]:
    """What config.json says of each linear, by its rules, as GPTQModel reads them: the first that matches."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = {}
    for name in manifest.read(folder)["layers"]:
        how = next((v for rule, v in config["dynamic"].items() if re.match(rule.removeprefix("+:"), name)), config)
        found[name] = (how["bits"], how["group_size"])
    return found


@pytest.mark.parametrize("variant", FAMILIES)
def test_average_bits(variant: str, folder_of: Folder, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    wanted = recipe(folder_of(variant), average_bits=3.6)
    needs = plan(wanted)
    result = qlm.quantize(wanted)
    assert LEAST_USED * 3.6 < result.bits_per_weight <= 3.6
    assert result.choice is not None
    assert result.choice["average_bits"] == pytest.approx(result.bits_per_weight, rel=1e-12)
    # Said in the same way by the rules for other software, by the manifest, and by the picture.
    written = manifest.read(result.output)
    assert written["choice"] == result.choice
    assert written["recipe"]["quantize"]["average_bits"] == 3.6
    facts = {name: (how["bits"], how["group_size"]) for name, how in result.layers.items()}
    assert bits_in(result.output) == facts
    assert len({bits for bits, _ in facts.values()}) > 1
    drawn = [title.text or "" for title in ElementTree.parse(result.output / "bits.svg").iter() if "title" in title.tag]
    assert sorted(drawn[1:]) == sorted(
        f"block {block[1]}, {block[2]}: {facts[name][0]} bits, group size {facts[name][1]}"
        for name in facts
        if (block := re.fullmatch(r".*?\.(\d+)\.(.+)", name))
    )
    assert manifest.verify(result.output)
    assert qlm.load(result.output)(tiny_models.token_ids()).logits.isfinite().all()
    assert needs.linears == len(result.layers)
    assert needs.disk - SMALL_FILES_BYTES == pytest.approx(result.bytes, rel=0.06)


# GPT-NeoX's head is a matrix of its own.
@pytest.mark.parametrize(
    ("variant", "size", "most"),
    [
        ("opt", 250_000, 250_000),
        ("opt", "290kB", 290_000),
        ("neox-parallel-rotary-0.25", "0.35MB", 350_000),
        ("bigcode-multi-query", "260KiB", 266_240),
    ],
)
def test_target_size_is_never_exceeded(
    variant: str, size: Any, most: int, folder_of: Folder, recipe: Callable[..., Recipe]
) -> None:
    output = qlm.quantize(recipe(folder_of(variant), target_size=size)).output
    stored = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert LEAST_USED * most < stored <= most


def test_resumed_without_measuring_again(
    folder_of: Folder, recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(folder_of("opt"), average_bits=3.5)
    complete = files_of(qlm.quantize(wanted).output)

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == at:
            raise KeyboardInterrupt

    for at in (("embed", 0), ("quantize", 1)):
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(KeyboardInterrupt):
            qlm.quantize(wanted, progress=stop)
        with monkeypatch.context() as patch:
            patch.delattr(quantize_module, "choose_bits")
            result = qlm.quantize(wanted)
        assert result.resumed == at[0].count("quantize")
        assert files_of(result.output) == complete


def test_another_budget_does_not_continue(folder_of: Folder, recipe: Callable[..., Recipe]) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "embed":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qlm.quantize(recipe(folder_of("opt"), average_bits=3.5), progress=stop)
    with pytest.raises(UsageError, match=r"another recipe\.quantize\.average_bits: it has 3\.5, now it is 3\.6"):
        qlm.quantize(recipe(folder_of("opt"), average_bits=3.6))


def test_fused_linears_are_alike_and_named_as_one(folder_of: Folder, recipe: Callable[..., Recipe]) -> None:
    output = qlm.quantize(recipe(folder_of("opt"), average_bits=3.4, skip=["*.1.self_attn.[kqv]_proj"])).output
    found = bits_in(output)
    block = "model.decoder.layers.0.self_attn"
    assert len({found[f"{block}.{part}_proj"] for part in "qkv"}) == 1
    config = json.loads((output / "config.json").read_text())["quantization_config"]

    def as_vllm_sees_it(name: str) -> Any:
        for rule, how in config["dynamic"].items():
            if re.match(rule[2:], name):
                return (how["bits"], how["group_size"]) if rule.startswith("+:") else None
        return config["bits"], config["group_size"]

    assert as_vllm_sees_it(f"{block}.qkv_proj") == found[f"{block}.q_proj"]
    assert as_vllm_sees_it("model.decoder.layers.1.self_attn.qkv_proj") is None
    assert set(qlm.load(output).state_dict()) >= {f"{block}.q_proj.qweight", "model.decoder.layers.1.fc1.qweight"}


def test_no_rule_for_what_is_not_fused() -> None:
    four, three = GptqFormat(4, 128), GptqFormat(3, -1)
    parts = {f"model.decoder.layers.0.self_attn.{part}_proj": four for part in "qkv"}
    others = {f"model.decoder.layers.{layer}.fc1": three for layer in range(4)}
    dynamic = GptqBackend().describe({**parts, **others}, ["lm_head"], torch.float16).quantization_config["dynamic"]  # type: ignore[index]
    assert [rule.rpartition(".")[2] for rule in dynamic] == [r"q_proj$", r"qkv_proj$", r"k_proj$", r"v_proj$"]
    parts["model.decoder.layers.0.self_attn.k_proj"] = three
    described = GptqBackend().describe({**parts, **others}, ["lm_head"], torch.float16).quantization_config
    assert described is not None
    assert [rule.rpartition(".")[2] for rule in described["dynamic"]] == [r"q_proj$", r"v_proj$"]


@pytest.mark.parametrize("key", ["average_bits", "target_size"])
def test_in_memory(key: str) -> None:
    model = tiny_models.build("opt")
    weights = 2 * (4 * 128 * 128 + 2 * 128 * 256)
    before = sum(parameter.nbytes for parameter in model.parameters())
    value: Any = 3.5 if key == "average_bits" else before - 4 * weights + 3 * weights // 8 + 40_000
    facts = qlm.quantize_model(model, {"backend": "gptq", "quality": "fast", key: value}, tiny_models.token_ids(8, 48))
    assert len({how["bits"] for how in facts.values()}) > 1
    stored = {name: model.get_submodule(name).state_dict() for name in facts}
    quantized = sum(t.nbytes for tensors in stored.values() for key, t in tensors.items() if key != "bias")
    if key == "average_bits":
        assert LEAST_USED * 3.5 < 8 * quantized / weights <= 3.5
    else:
        assert quantized + before - 4 * weights < value


class TestRefuses:
    """Before anything is written, and by `plan` in the same words."""

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("average_bits", 2.01, r"found 2\.010 stored bits per weight; allowed: at least 2\.\d+, the least that these linears can take"),
            ("target_size", "90kB", r"found '90kB'; allowed: at least 1\d{5} bytes, 1\d{5} of them for what is not quantized"),
            ("target_size", "190kB", r"found '190kB'; allowed: at least 1\d{5} bytes, 1\d{5} of them for what is not quantized"),
        ],
    )  # fmt: skip
    def test_too_little(
        self, key: str, value: Any, message: str, folder_of: Folder, recipe: Callable[..., Recipe], tmp_path: Path
    ) -> None:
        wanted = recipe(folder_of("opt"), **{key: value})
        for verb in (plan, qlm.quantize):
            with pytest.raises(UsageError, match=rf"quantize\.{key}: {message}"):
                verb(wanted)
        assert list(tmp_path.iterdir()) == []

    def test_in_memory(self) -> None:
        with pytest.raises(UsageError, match=r"quantize\.bits: found beside average_bits"):
            qlm.quantize_model(tiny_models.build("opt"), {"backend": "gptq", "average_bits": 3.5, "bits": 4})


def test_plan_counts_the_whole_float_model(recipe: Callable[..., Recipe], tmp_path: Path, tokenizer_json: str) -> None:
    model = tiny_models.opt(num_hidden_layers=40, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024)
    model.half().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer_json)
    mixed, uniform = plan(recipe(tmp_path / "model", average_bits=4.3)), plan(recipe(tmp_path / "model"))
    assert mixed.disk <= uniform.disk * 1.05
    whole = sum(parameter.numel() for parameter in model.parameters()) * torch.bfloat16.itemsize
    assert mixed.quantize_memory - uniform.quantize_memory > 0.9 * whole
    assert mixed.quantize_seconds > uniform.quantize_seconds


def test_command_line(
    folder_of: Folder, text_file: Path, recipe_file: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    path = recipe_file(folder_of("opt"), tmp_path / "out", "gptq", average_bits=3.5, quality="fast")
    code, out, err = cli("quantize", path, "--json", tmp_path / "report.json")
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())[0]
    assert re.search(r"gptq mixed 3\.\d\d-bit, fast +3\.\d{3} ", out)
    assert f"12 linears -> {tmp_path / 'out'}, their bits in {tmp_path / 'out' / 'bits.svg'}" in err.replace("\n", "")
    assert report["choice"]["bytes"] <= report["choice"]["budget_bytes"]
    assert report["choice"]["predicted_kl"] > 0
