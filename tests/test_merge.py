"""Merging: the numbers of PEFT's own merge, every backend after it, a standard checkpoint with both inputs on record, and no adapter on a
base that it was not trained on."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import qlm
from qlm.adapters import apply_adapter
from qlm.arch import FAMILIES as SPECS
from qlm.checkpoint import manifest
from qlm.checkpoint.adapter import CONFIG, WEIGHTS, base_facts
from qlm.checkpoint.files import PartialFolder
from qlm.errors import CannotCreate, DataError, QlmError, UsageError
from qlm.merge import merge
from qlm.recipe import CalibrationRecipe, EvaluateRecipe
from qlm.run import load_with_adapter
from tests import tiny_models
from tests.conftest import FAMILIES, change_json, files_of
from tests.test_adapters import (  # noqa: F401  (fixtures)
    LOGITS_TOLERANCE,
    TASKS,
    Folder,
    Quantized,
    adapter_of_fixture,
    dequantized,
    difference,
    logits,
    model_type,
    plain,
    quantized_fixture,
    train_b,
    with_adapter,
    write,
)

FAST = {"float": None, "gptq": {"backend": "gptq", "quality": "fast"}}
INTO = ("nf4", "gptq", "int8")
# KL divergence of the merged and quantized model from the base with its adapter, in nats, on random models of logits of standard
# deviation 1; measured: int8 0.0002, nf4 0.015, gptq 0.008. An adapter left out is 0.13 or more.
MOST_KL = {"int8": 0.001, "nf4": 0.04, "gptq": 0.03}
ADAPTER_KL = 0.08
# Weights rounded to fp16, through two layers.
FP16_TOLERANCE = 0.01
# Mean square of what 4 bits change of the outputs of a head, relative to that of these outputs.
NF4_ERROR = 0.1


@pytest.fixture(scope="session")
def float32_of(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Folder:
    """The folder of a variant in float32. Not to be changed."""
    root = tmp_path_factory.mktemp("float32")

    def folder(variant: str) -> Path:
        if not (path := root / variant).exists():
            tiny_models.build(variant).save_pretrained(path)
            (path / "tokenizer.json").write_text(tokenizer_json)
        return path

    return folder


@pytest.fixture
def calibration(text_file: Path) -> Callable[[str], CalibrationRecipe | None]:
    return lambda into: CalibrationRecipe(data=str(text_file), samples=8, length=32) if into == "gptq" else None


@pytest.fixture
def measured(text_file: Path) -> EvaluateRecipe:
    return EvaluateRecipe(data=str(text_file), length=32, windows=8)


def kl(model: Any, baseline: Any) -> float:
    p, q = logits(baseline).log_softmax(-1), logits(model).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def on_record(folder: Path, trained_on: Path, smoothed: bool | None = None) -> Path:
    """An adapter's folder with the manifest that training on a base writes."""
    base = base_facts(trained_on)
    if smoothed is not None:
        base["smoothed"] = smoothed
    shutil.copytree(folder, target := folder.with_name("trained"))
    return write_manifest(target, base)


def write_manifest(folder: Path, base: dict[str, Any], training: dict[str, Any] | None = None) -> Path:
    outputs = {name: manifest.input_facts([folder / name])[name] for name in (WEIGHTS, CONFIG)}
    content = manifest.build(
        qlm="0", recipe={}, inputs=base["files"], outputs=outputs, versions={}, seed=0, threads=1, layers={}, bos="", config={},
        base=base, training=training,
    )  # fmt: skip
    (folder / manifest.NAME).write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return folder


@pytest.fixture
def adapter(adapter_of: Folder, tmp_path: Path) -> Callable[[str], Path]:
    def copy(variant: str) -> Path:
        return shutil.copytree(adapter_of(variant), tmp_path / "adapters" / variant)

    return copy


@pytest.mark.parametrize("variant", FAMILIES)
class TestNumbers:
    def test_float_is_pefts_own(self, variant: str, float32_of: Folder, adapter_of: Folder, tmp_path: Path) -> None:
        result = merge(float32_of(variant), adapter_of(variant), "float", tmp_path / "out")
        assert (result.into, result.onto) == ("float", "float weights")
        assert "not on record" in result.base
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        theirs = peft.PeftModel.from_pretrained(plain(float32_of(variant)), adapter_of(variant)).merge_and_unload()
        assert difference(logits(qlm.load(result.output)), logits(theirs)) < LOGITS_TOLERANCE
        assert difference(logits(plain(result.output)), logits(theirs)) < LOGITS_TOLERANCE
        # The published names, and nothing else of the base changed by a bit.
        before, after = tensors_of(float32_of(variant)), tensors_of(result.output)
        assert before.keys() == after.keys()
        written = manifest.read(result.output)
        changed = {f"{path}.weight" for path in written["layers"]}
        assert len(changed) == result.linears
        assert {name for name in before if not torch.equal(before[name], after[name])} == changed
        assert {t.dtype for t in after.values()} == {torch.float32}
        for facts in written["layers"].values():
            assert (facts["r"], facts["scaling"]) == (4, 3.0)
            assert 0.05 < facts["relative_change"] < 2
        assert json.loads((result.output / "config.json").read_text()) == json.loads(
            (float32_of(variant) / "config.json").read_text()
        )

    @pytest.mark.parametrize("into", INTO)
    def test_quantized_again(
        self, variant: str, into: str, folder_of: Folder, adapter_of: Folder, tmp_path: Path, calibration: Any,
        measured: EvaluateRecipe,
    ) -> None:  # fmt: skip
        """A standard checkpoint of the backend, as near to base and adapter as that backend comes; base and adapter in its manifest."""
        base = folder_of(variant)
        before = files_of(base) | files_of(adapter_of(variant))
        result = merge(
            base, adapter_of(variant), into, tmp_path / "out", calibration=calibration(into), evaluate_on=measured
        )
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert files_of(base) | files_of(adapter_of(variant)) == before
        assert manifest.verify(result.output)
        written = manifest.read(result.output)
        expected = {f"base: {name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
        expected |= {f"adapter: {name}" for name in (WEIGHTS, CONFIG)} | (
            {"calibration: words.txt"} if into == "gptq" else set()
        )
        assert written["inputs"].keys() == expected
        facts = manifest.input_facts([base / "model.safetensors", adapter_of(variant) / WEIGHTS])
        assert written["inputs"]["base: model.safetensors"] == facts["model.safetensors"]
        assert written["inputs"][f"adapter: {WEIGHTS}"] == facts[WEIGHTS]
        assert written["recipe"]["merge"] == {
            "base": variant, "adapter": variant, "into": into, "onto": "float weights", "task": "causal-lm"
        }  # fmt: skip
        assert written["recipe"]["quantize"]["backend"] == into
        assert str(tmp_path) not in json.dumps(written)
        assert result.quantized is not None
        assert written["layers"] == result.quantized.layers
        assert result.quantized.output == result.output
        assert result.bytes == sum(p.stat().st_size for p in result.output.glob("*.safetensors"))
        assert (result.output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()

        unmerged = apply_adapter(qlm.load(base), adapter_of(variant))
        merged = qlm.load(result.output)
        assert 0 < kl(merged, unmerged) < MOST_KL[into]
        assert kl(merged, qlm.load(base)) > ADAPTER_KL
        found = result.evaluation
        assert found is not None
        assert found.kl_divergence is not None
        assert 0 < found.kl_divergence < MOST_KL[into]
        ids = qlm.load_tokenizer(base)(make_text_of(measured), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([2, *ids] if variant == "opt" else ids)[: 8 * 32].view(8, 32)
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(unmerged(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert found.baseline_perplexity == pytest.approx(nll.exp().item(), rel=1e-4)
        assert found.perplexity != found.baseline_perplexity

    @pytest.mark.parametrize("kind", INTO)
    def test_onto_dequantized_weights(
        self, variant: str, kind: str, quantized: Quantized, adapter_of: Folder, tmp_path: Path
    ) -> None:  # fmt: skip
        base = quantized(variant, kind)
        result = merge(base, adapter_of(variant), "float", tmp_path / "out")
        assert result.onto == f"dequantized {kind} weights"
        config = json.loads((result.output / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == "float16"
        after, apart = tensors_of(result.output), apply_adapter(qlm.load(base), adapter_of(variant)).get_base_model()
        for path in manifest.read(result.output)["layers"]:
            layer = apart.get_submodule(path)
            expected = dequantized(layer.base_layer) + layer.get_delta_weight("default")
            torch.testing.assert_close(after[f"{path}.weight"], expected.half(), rtol=1e-3, atol=1e-6)
        published = tensors_of(Path(str(base).removesuffix(f"-{kind}")).parent / base.name)
        assert ("embed_out.weight" in after) == ("embed_out.weight" in published) == (model_type(variant) == "gpt_neox")
        if kind != "int8":  # whose activations are rounded in the base alone
            assert difference(logits(qlm.load(result.output)), logits(apart)) < FP16_TOLERANCE

    def test_from_quantized_to_quantized(
        self, variant: str, quantized: Quantized, adapter_of: Folder, tmp_path: Path, calibration: Any
    ) -> None:  # fmt: skip
        result = merge(
            quantized(variant, "nf4"),
            adapter_of(variant),
            "gptq",
            tmp_path / "out",
            calibration=calibration("gptq"),
            quantize_settings=FAST["gptq"],
        )
        assert result.onto == "dequantized nf4 weights"
        unmerged = apply_adapter(qlm.load(quantized(variant, "nf4")), adapter_of(variant))
        assert 0 < kl(qlm.load(result.output), unmerged) < MOST_KL["gptq"]


def make_text_of(section: EvaluateRecipe) -> str:
    assert isinstance(section.data, str)
    return Path(section.data).read_text()


@pytest.mark.parametrize(("variant", "task"), TASKS, ids=lambda value: value)
@pytest.mark.parametrize("into", ["float", "nf4"])
def test_heads(variant: str, task: Any, into: str, folder_of: Folder, tmp_path: Path) -> None:
    """The head is in the merged checkpoint under its published name, and the language model's is not."""
    trained = train_b(with_adapter(folder_of(variant), task))
    adapter = write(trained, tmp_path / "adapter")
    result = merge(folder_of(variant), adapter, into, tmp_path / "out")
    names = tensors_of(result.output).keys()
    spec = SPECS[model_type(variant)]
    assert f"{spec.published_head}.weight" not in names
    merged = qlm.load(result.output, task=task)
    merged.config.pad_token_id = 1
    found, expected = logits(merged), logits(trained)
    if into == "float":
        assert difference(found, expected) < FP16_TOLERANCE
    else:
        assert (found - expected).square().mean() < NF4_ERROR * expected.square().mean()
    with pytest.raises(UsageError, match="only causal-lm has a perplexity"):
        merge(folder_of(variant), adapter, into, tmp_path / "two", evaluate_on=EvaluateRecipe(data="x.txt"))


def test_a_head_with_its_own_number_of_labels(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """The base has no head, and its config no labels; the adapter's head says how many there are."""
    labelled = copy_of("opt", id2label={str(i): f"l{i}" for i in range(5)})
    adapter = write(train_b(with_adapter(labelled, "sequence-classification")), tmp_path / "adapter")
    plain_base = copy_of("opt", name="base")
    result = merge(plain_base, adapter, "nf4", tmp_path / "out")
    assert qlm.load(result.output, task="sequence-classification").score.weight.shape == (5, 128)
    assert qlm.load(result.output, task="sequence-classification").config.num_labels == 5
    change_json(plain_base / "config.json", id2label=None)
    onto_labelled = merge(labelled, adapter, "float", tmp_path / "labelled")
    assert qlm.load(onto_labelled.output, task="sequence-classification").config.id2label[3] == "l3"
    # What training has on record goes before both.
    write_manifest(adapter, base_facts(labelled), {"labels": list("abcde")})
    named = qlm.load(
        merge(labelled, adapter, "float", tmp_path / "named").output, task="sequence-classification"
    ).config
    assert named.id2label == dict(enumerate("abcde"))
    assert named.label2id == {name: i for i, name in enumerate("abcde")}


class TestWhichBase:
    def test_its_own(
        self, folder_of: Folder, adapter: Callable[[str], Path], quantized: Quantized, tmp_path: Path
    ) -> None:
        for number, kind in enumerate(("float", "nf4", "gptq")):
            base = quantized("opt", kind)
            trained = on_record(adapter("opt"), base)
            assert merge(base, trained, "float", tmp_path / str(number)).base == "the adapter was trained on this base"
            if kind != "float":
                result = merge(folder_of("opt"), trained, "float", tmp_path / f"{number} float")
                assert result.base == "the adapter was trained on a quantized copy of this base"
                assert result.onto == "float weights"
            shutil.rmtree(tmp_path / "adapters")

    def test_another(
        self, folder_of: Folder, copy_of: Callable[..., Path], adapter: Callable[[str], Path], quantized: Quantized, tmp_path: Path
    ) -> None:  # fmt: skip
        trained = on_record(adapter("opt"), quantized("opt", "nf4"))
        other = copy_of("opt", dropout=0.2)
        for base in (other, quantized("opt", "gptq")):
            words = r"trained was trained on another base|trained: was trained on another base"
            with pytest.raises(DataError, match=words) as error:
                merge(base, trained, "float", tmp_path / "out")
            assert "has SHA-256" in str(error.value)
            assert "give the base that it was trained on" in str(error.value)
        assert "config.json" in str(refused_merge(other, on_record_again(trained, folder_of("opt")), tmp_path))
        assert not (tmp_path / "out").exists()

    def test_smoothed_weights_are_not_the_float_ones(
        self, folder_of: Folder, adapter: Callable[[str], Path], quantized: Quantized, tmp_path: Path
    ) -> None:  # fmt: skip
        trained = on_record(adapter("opt"), quantized("opt", "int8"), smoothed=True)
        line = str(refused_merge(folder_of("opt"), trained, tmp_path))
        assert "give the folder that it was trained on" in line
        assert merge(quantized("opt", "int8"), trained, "int8", tmp_path / "out").onto == "dequantized int8 weights"

    def test_says_where_the_float_weights_are(
        self, folder_of: Folder, adapter_of: Folder, quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:  # fmt: skip
        """Beside the quantized base or in the current folder, by the name and the bytes that its manifest has on record."""
        base = shutil.copytree(quantized("opt", "nf4"), tmp_path / "models" / "base")
        floats, here = tmp_path / "models" / folder_of("opt").name, tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)

        def onto() -> str:
            return merge(base, adapter_of("opt"), "float", tmp_path / "out").onto

        assert onto() == "dequantized nf4 weights"
        shutil.copytree(folder_of("opt"), floats)
        hint = f"of {base}; the float weights are in {floats}: give that folder as BASE to merge onto them"
        assert onto() == f"dequantized nf4 weights {hint}"
        assert manifest.read(tmp_path / "out")["recipe"]["merge"]["onto"] == "dequantized nf4 weights"
        assert merge(floats, adapter_of("opt"), "float", tmp_path / "onto floats").onto == "float weights"
        weights = bytearray((floats / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (floats / "model.safetensors").write_bytes(weights)
        assert onto() == "dequantized nf4 weights"
        shutil.copytree(folder_of("opt"), here / floats.name)
        assert onto() == f"dequantized nf4 weights {hint.replace(str(floats), floats.name)}"

    def test_a_changed_adapter(
        self, folder_of: Folder, adapter: Callable[[str], Path], tmp_path: Path, text_file: Path
    ) -> None:
        """One bit of one weight: nothing but the hash on record tells. Without a record it is taken as it is."""
        trained = on_record(adapter("opt"), folder_of("opt"))
        data = bytearray((trained / WEIGHTS).read_bytes())
        data[-1] ^= 1
        (trained / WEIGHTS).write_bytes(data)
        line = str(refused_merge(folder_of("opt"), trained, tmp_path))
        assert line.startswith(f"{trained / WEIGHTS}: changed since it was written: its SHA-256 is ")
        for use in (
            lambda: qlm.Engine(folder_of("opt"), adapter=trained),
            lambda: load_with_adapter(folder_of("opt"), trained),
            lambda: apply_adapter(qlm.load(folder_of("opt")), trained),
        ):
            with pytest.raises(DataError) as error:
                use()
            assert str(error.value) == line
        change_json(trained / CONFIG, lora_alpha=5)
        assert f"{trained / CONFIG}: changed since" in str(refused_merge(folder_of("opt"), trained, tmp_path))
        (trained / manifest.NAME).unlink()
        assert "not on record" in merge(folder_of("opt"), trained, "float", tmp_path / "out").base

    def test_a_changed_manifest(self, folder_of: Folder, adapter: Callable[[str], Path], tmp_path: Path) -> None:
        trained = on_record(adapter("opt"), folder_of("opt"))
        text = (trained / manifest.NAME).read_text()
        (trained / manifest.NAME).write_text(text.replace('"seed": 0', '"seed": 1'))
        assert "does not agree with its checksum" in str(refused_merge(folder_of("opt"), trained, tmp_path))

    def test_another_family(self, folder_of: Folder, adapter_of: Folder, tmp_path: Path) -> None:
        assert "belongs to another base" in str(refused_merge(folder_of("opt"), adapter_of(FAMILIES[1]), tmp_path))


def on_record_again(folder: Path, trained_on: Path) -> Path:
    return write_manifest(folder, base_facts(trained_on))


def refused_merge(
    base: Path, adapter: Path, tmp_path: Path, into: str = "float", kind: Any = DataError, **more: Any
) -> QlmError:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind) as error:
        merge(base, adapter, into, tmp_path / "out", **more)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return error.value


@pytest.mark.parametrize(
    ("into", "more", "words"),
    [
        ("quanto", {}, "into: found 'quanto'; allowed: float, nf4, gptq, int8"),
        ("float", {"quantize_settings": {"backend": "nf4"}}, "quantize settings would have no effect"),
        ("float", {"calibration": "text"}, "calibration would have no effect"),
        ("gptq", {}, "calibration: missing; gptq with quality balanced needs a text; give one"),
        ("nf4", {"quantize_settings": {"backend": "gptq"}, "calibration": "text"}, "found gptq, but the merged model goes into nf4"),
        ("nf4", {"quantize_settings": {"backend": "nf4", "quality": "best"}}, "or quality fast"),
        ("nf4", {"quantize_settings": {"backend": "nf4", "quality": "fast"}, "calibration": "text"}, "looks at no text"),
        ("nf4", {"quantize_settings": {"backend": "nf4", "bits": 3}}, "bits"),
        ("nf4", {"quantize_settings": {"backend": "nf4", "skip": ["nothing"]}}, "'nothing' matches none"),
        ("gptq", {"quantize_settings": {"backend": "gptq", "group_size": 32, "skip": ["*"]}, "calibration": "text"}, "every linear"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(
    into: str, more: dict[str, Any], words: str, folder_of: Folder, adapter_of: Folder, tmp_path: Path, text_file: Path
) -> None:  # fmt: skip
    if "calibration" in more:
        more = {**more, "calibration": CalibrationRecipe(data=str(text_file), samples=8, length=32)}
    assert words in str(refused_merge(folder_of("opt"), adapter_of("opt"), tmp_path, into, UsageError, **more))


def test_places_that_do_not_fit(folder_of: Folder, adapter_of: Folder, quantized: Quantized, tmp_path: Path) -> None:
    line = refused_merge(quantized("opt", "quanto"), adapter_of("opt"), tmp_path, kind=UsageError)
    assert "quanto, which takes no adapter" in str(line)
    base = shutil.copytree(folder_of("opt"), tmp_path / "out" / "base")
    line = refused_merge(base, adapter_of("opt"), tmp_path, kind=UsageError)
    assert "is read; give a folder of its own" in str(line)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    for into in ("float", "nf4"):
        refused_merge(folder_of("opt"), adapter_of("opt"), tmp_path, into, CannotCreate)


def test_too_large_for_the_dtype(folder_of: Folder, tmp_path: Path) -> None:
    model = with_adapter(folder_of("opt"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(100.0)
    adapter = write(model, tmp_path / "adapter")
    line = str(refused_merge(folder_of("opt"), adapter, tmp_path))
    assert "which does not fit into torch.float16; convert the base to bfloat16 or float32" in line


@pytest.mark.parametrize("into", ["float", "gptq"])
class TestAgain:
    def test_a_complete_output_stays(
        self, into: str, folder_of: Folder, adapter_of: Folder, tmp_path: Path, calibration: Any
    ) -> None:  # fmt: skip
        arguments = (folder_of("opt"), adapter_of("opt"), into, tmp_path / "out")
        merge(*arguments, calibration=calibration(into), quantize_settings=FAST[into])
        content = files_of(tmp_path / "out")
        times = [path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()]
        torch.manual_seed(5)
        again = merge(*arguments, calibration=calibration(into), quantize_settings=FAST[into])
        assert (again.linears, again.was_there) == (12, True)
        assert times == [path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()]
        # Made anew, somewhere else: the same bytes.
        other = merge(
            *arguments[:3], tmp_path / "deep" / "other", calibration=calibration(into), quantize_settings=FAST[into]
        )
        assert (files_of(other.output), other.was_there) == (content, False)
        assert merge(*arguments, calibration=calibration(into), quantize_settings=FAST[into], force=True)
        assert files_of(tmp_path / "out") == content
        with pytest.raises(CannotCreate, match="exists already"):
            merge(*arguments[:2], "int8", tmp_path / "out")

    def test_goes_on_after_an_interruption(
        self, into: str, folder_of: Folder, adapter_of: Folder, tmp_path: Path, calibration: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Stopped at files that is written: the output is not there, and the next call makes it, byte for byte."""
        arguments = (folder_of("opt"), adapter_of("opt"), into)
        expected = files_of(
            merge(*arguments, tmp_path / "whole", calibration=calibration(into), quantize_settings=FAST[into]).output
        )
        real, count, stop_at = PartialFolder.write_bytes, 0, 1

        def write_bytes(self: PartialFolder, name: str, data: bytes, record: Any = None) -> None:
            nonlocal count
            if (count := count + 1) == stop_at:
                raise KeyboardInterrupt
            real(self, name, data, record)

        monkeypatch.setattr(PartialFolder, "write_bytes", write_bytes)
        finished = 0
        for stop in range(2, 40, 4):
            count, stop_at = 0, stop
            try:
                merge(*arguments, tmp_path / "out", calibration=calibration(into), quantize_settings=FAST[into])
            except KeyboardInterrupt:
                assert not (tmp_path / "out").exists()
                assert (tmp_path / "out.partial").exists()
                continue
            finished += 1
            assert files_of(tmp_path / "out") == expected
            assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
            break
        assert finished == 1
        assert stop > 2


def test_one_block_at_a_time(
    folder_of: Folder, adapter_of: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written at once is a block, and what lies outside the blocks by itself."""
    shards: list[set[str]] = []
    real = PartialFolder.write_tensors
    monkeypatch.setattr(
        PartialFolder,
        "write_tensors",
        lambda self, name, tensors, **k: (shards.append(set(tensors)), real(self, name, tensors, **k))[1],
    )
    merge(folder_of("opt"), adapter_of("opt"), "float", tmp_path / "out")
    assert "qlm.merge" in sys.modules
    places = [{name.split(".layers.")[1][0] if ".layers." in name else "" for name in names} for names in shards]
    assert places == [{"0"}, {"1"}, {""}]
