"""The command line: every command on tiny models, its streams, its exit codes, and what README files say about it."""

import ast
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import qlm
import qlm.cli
from qlm.kernels import cpu
from qlm.recipe import finetune_json_schema, json_schema
from tests import tiny_models
from tests.conftest import BACKENDS, FAMILIES, ROOT, Cli, command, files_of

Folder = Callable[..., Path]
RecipeFile = Callable[..., Path]
COLUMNS = "model backend bits/weight size of float ppl float ppl change KL (nats) same top-1 seconds peak RAM"
EVALUATION_KEYS = {
    "perplexity", "perplexity_stderr", "tokens", "kl_divergence", "kl_stderr", "same_top1", "protocol", "bos",
    "data_sha256", "seconds",
}  # fmt: skip
COMMANDS = (
    "quantize", "finetune", "merge", "plan", "validate", "schema", "recipes", "evaluate", "generate", "bench", "inspect", "verify",
    "doctor",
)  # fmt: skip
TREE = typer.main.get_command(qlm.cli.app)
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="qlm was installed without its CPU kernels")


def measured(text: Path) -> str:
    return f"evaluate: {{data: {json.dumps(str(text))}, length: 32, windows: 4}}\n"


@pytest.fixture(scope="module")
def quantized(folder_of: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of each backend, written on first use by the library. Not to be changed."""
    from qlm.recipe import parse_recipe
    from tests.conftest import recipe_text

    root = tmp_path_factory.mktemp("quantized")

    def folder(backend: str) -> Path:
        output = root / backend
        if not output.exists():
            qlm.quantize(parse_recipe(recipe_text(folder_of("opt"), output, backend, text_file), "test.yaml"))
        return output

    return folder


def allows(node: Any, value: Any, schema: dict[str, Any]) -> bool:
    """Whether a JSON Schema allows a value; the keywords that `json_schema` uses, and no others."""
    if isinstance(node, bool):
        return node
    kinds = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float), "null": type(None)
    }  # fmt: skip
    number = isinstance(value, int | float) and not isinstance(value, bool)

    def holds(word: str, rule: Any) -> bool:
        match word:
            case "$ref":
                return allows(schema["$defs"][rule.rpartition("/")[2]], value, schema)
            case "type":
                return isinstance(value, kinds[rule]) and (rule == "boolean" or not isinstance(value, bool))
            case "enum":
                return any(value == choice and type(value) is type(choice) for choice in rule)
            case "const":
                return bool(value == rule)
            case "anyOf":
                return any(allows(option, value, schema) for option in rule)
            case "oneOf":
                return sum(allows(option, value, schema) for option in rule) == 1
            case "allOf":
                return all(allows(option, value, schema) for option in rule)
            case "if":
                return not allows(rule, value, schema) or allows(node["then"], value, schema)
            case "required":
                return not isinstance(value, dict) or set(rule) <= value.keys()
            case "properties":
                return not isinstance(value, dict) or all(
                    allows(rule[k], v, schema) for k, v in value.items() if k in rule
                )
            case "additionalProperties":
                known = node.get("properties", {})
                return not isinstance(value, dict) or all(
                    allows(rule, v, schema) for k, v in value.items() if k not in known
                )
            case "propertyNames":
                return not isinstance(value, dict) or all(allows(rule, key, schema) for key in value)
            case "items":
                return not isinstance(value, list) or all(allows(rule, item, schema) for item in value)
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
                good = {
                    "minimum": lambda: value >= rule,
                    "maximum": lambda: value <= rule,
                    "exclusiveMinimum": lambda: value > rule,
                    "exclusiveMaximum": lambda: value < rule,
                }
                return not number or bool(good[word]())
            case "minLength" | "maxLength" | "minItems" | "maxItems" | "maxProperties":
                kind = {"L": str, "I": list, "P": dict}[word[3]]
                return not isinstance(value, kind) or (len(value) >= rule if word[:3] == "min" else len(value) <= rule)
        assert word in ("$schema", "$defs", "title", "description", "default", "then"), word
        return True

    return all(holds(word, rule) for word, rule in node.items())


class TestQuantize:
    def test_table_notes_and_json(
        self, cli: Cli, folder_of: Folder, recipe_file: RecipeFile, text_file: Path, tmp_path: Path
    ) -> None:
        extra = measured(text_file)
        recipes = [
            recipe_file(folder_of(variant), tmp_path / backend, backend, f"{backend}.yaml", extra=extra)
            for variant, backend in zip((*FAMILIES, "opt"), BACKENDS, strict=True)
        ]
        code, out, err = cli("quantize", *recipes, "--json", tmp_path / "rows.json")
        assert code == 0
        header, *lines = out.splitlines()
        assert " ".join(header.split()) == COLUMNS
        names = ["int8", "nf4", "gptq 4-bit", "quanto"]
        assert [name in line for name, line in zip(names, lines, strict=True)] == [True] * 4
        assert not [line for line in lines if " - " in line]
        assert all("." not in word or word.count(".") == 1 for line in lines for word in line.split())
        notes = [line for line in err.splitlines() if "->" in line]
        assert [f"[{n}/4] {name}: " in note for n, (name, note) in enumerate(zip(BACKENDS, notes, strict=True), 1)]
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert [row["backend"] for row in rows] == names
        for row, backend in zip(rows, BACKENDS, strict=True):
            assert row["output"] == str(tmp_path / backend)
            assert row["evaluation"].keys() >= EVALUATION_KEYS
            assert row["bytes"] < row["bytes_before"]
            assert row["peak_memory_bytes"] > 1e7
            assert row["evaluation"]["kl_divergence"] > 0
            assert row["layers"]

    def test_json_on_stdout_is_all_of_it(
        self, cli: Cli, folder_of: Folder, recipe_file: RecipeFile, tmp_path: Path
    ) -> None:
        code, out, err = cli("quantize", recipe_file(folder_of("opt"), tmp_path / "o"), "--json", "-", "--quiet")
        assert (code, err) == (0, "")
        (row,) = json.loads(out)
        assert row["evaluation"] is None
        assert row["resumed_blocks"] == 0

    def test_without_evaluation_the_table_has_dashes(
        self, cli: Cli, folder_of: Folder, recipe_file: RecipeFile, tmp_path: Path
    ) -> None:
        code, out, err = cli("quantize", "-q", recipe_file(folder_of("opt"), tmp_path / "o"))
        assert (code, err) == (0, "")
        assert out.splitlines()[1].split().count("-") == 5

    def test_again_takes_what_is_there(
        self, cli: Cli, folder_of: Folder, recipe_file: RecipeFile, tmp_path: Path
    ) -> None:
        recipe = recipe_file(folder_of("opt"), tmp_path / "o")
        assert cli("quantize", recipe)[0] == 0
        before = files_of(tmp_path / "o")
        code, _, err = cli("quantize", recipe)
        assert code == 0
        assert "(2 blocks were there already)" in err
        assert files_of(tmp_path / "o") == before
        code, _, err = cli("quantize", recipe, "--force")
        assert code == 0
        assert "already" not in err
        assert files_of(tmp_path / "o") == before

    def test_continues(
        self, cli: Cli, folder_of: Folder, recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stopped after the first block; the same command says that it was there, and gives the same bytes."""
        from qlm.checkpoint.files import PartialFolder

        recipe = recipe_file(folder_of("opt"), tmp_path / "o")
        assert cli("quantize", recipe)[0] == 0
        whole = files_of(tmp_path / "o")
        (tmp_path / "o").rename(tmp_path / "whole")
        write, shards = PartialFolder.write_tensors, []

        def stop(self: PartialFolder, *arguments: Any, **more: Any) -> None:
            if len(shards) == 2:
                raise RuntimeError("stop")
            shards.append(arguments[0])
            write(self, *arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(PartialFolder, "write_tensors", stop)
            assert cli("quantize", recipe)[0] == 1
        assert not (tmp_path / "o").exists()
        code, _, err = cli("quantize", recipe)
        assert code == 0
        assert re.search(r"\([12] blocks were there already\)", err)
        assert files_of(tmp_path / "o") == whole


def test_no_library_writes_to_stderr(
    folder_of: Folder, recipe_file: RecipeFile, text_file: Path, tmp_path: Path
) -> None:
    """A fresh process for each backend: on stderr are qlm's own notes alone, such as no advice of bitsandbytes."""
    started = {
        backend: command(
            "quantize", recipe_file(folder_of("opt"), tmp_path / backend, backend, f"{backend}.yaml", extra=measured(text_file))
        )
        for backend in BACKENDS
    }  # fmt: skip
    for backend, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert len(out.splitlines()) == 2
        strange = [line for line in err.splitlines() if not line.startswith(f"[1/1] {backend}: ")]
        assert strange == []


def training(model: object, output: object, text: Path, **more: Any) -> str:
    """A fine-tuning recipe of two steps that change what the model says."""
    train = {
        "data": str(text), "steps": 2, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 0.1, "warmup": 0.0,
        "max_length": 24, **more,
    }  # fmt: skip
    return json.dumps({"model": str(model), "adapter": {"r": 4}, "train": train, "output": str(output)})


@pytest.fixture(scope="module")
def adapter(folder_of: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of "opt", with the recipe that it was made by beside it. Not to be changed."""
    from qlm.finetune import finetune
    from qlm.recipe import load_finetune_recipe

    root = tmp_path_factory.mktemp("adapters")
    (root / "short.txt").write_text(text_file.read_text("utf-8")[:4000], "utf-8")
    (root / "recipe.yaml").write_text(training(folder_of("opt"), root / "adapter", root / "short.txt", validation=0.1))
    return finetune(load_finetune_recipe(root / "recipe.yaml")).output


class TestFinetune:
    def test_facts(self, cli: Cli, folder_of: Folder, adapter: Path, tmp_path: Path) -> None:
        output = tmp_path / "adapter"
        text = (adapter.parent / "recipe.yaml").read_text().replace(str(adapter), str(output))
        (tmp_path / "recipe.yaml").write_text(text)
        code, out, err = cli("finetune", tmp_path / "recipe.yaml", "--json", tmp_path / "facts.json")
        assert code == 0
        facts = json.loads((tmp_path / "facts.json").read_text())
        assert (facts["adapter"], facts["base"]) == (str(output), str(folder_of("opt")))
        assert (facts["steps"], facts["resumed_steps"]) == (2, 0)
        shown = {name.strip(): value.strip() for name, value in re.findall(r"^(.{1,22}?) {2,}(.*)$", out, re.MULTILINE)}
        assert len(out.splitlines()) == 8
        assert shown["trainable parameters"] == f"{facts['trainable_parameters']:,}"
        assert shown["steps"] == "2"
        before, after = (facts["validation"][when]["validation_perplexity"] for when in ("before", "after"))
        assert shown["validation perplexity"] == f"{before:.3f} -> {after:.3f}"
        # What it says to do next are commands as they stand.
        for line, verb in zip(err.splitlines()[-2:], ("generate", "merge"), strict=True):
            next_, qlm_, *rest = shlex.split(line)
            assert (next_, qlm_, rest[0]) == ("next:", "qlm", verb)
            # The model has 64 positions.
            assert cli(*rest, *(("--max-new-tokens", 4) if verb == "generate" else ()))[::2] == (0, "")
        assert json.loads(cli("finetune", tmp_path / "recipe.yaml", "--json", "-")[1]) == {**facts, "resumed_steps": 2}
        tensors = "adapter_model.safetensors"
        assert files_of(output)[tensors] == files_of(adapter)[tensors]

    def test_plan(self, cli: Cli, adapter: Path, tmp_path: Path) -> None:
        code, out, _ = cli("plan", adapter.parent / "recipe.yaml", "--json", "-")
        facts = json.loads(out)
        assert code == 0
        assert facts["memory"] > facts["base_memory"] + facts["adapter_memory"] + facts["activation_memory"]
        # Before it starts the run says the same.
        (tmp_path / "r.yaml").write_text(
            (adapter.parent / "recipe.yaml").read_text().replace(str(adapter), str(tmp_path / "a"))
        )
        _, _, err = cli("finetune", tmp_path / "r.yaml")
        words = f"{facts['steps']} steps of at most {facts['tokens_per_step']} tokens, {facts['trainable']} parameters"
        assert f"r: {words}" in err.splitlines()[0]

    def test_again_takes_what_is_there(self, cli: Cli, adapter: Path) -> None:
        before = files_of(adapter)
        code, out, err = cli("finetune", adapter.parent / "recipe.yaml")
        # Nothing of what it would need.
        assert (code, err.splitlines()[0]) == (0, f"recipe: {adapter} was there already")
        assert "needs about" not in err
        assert re.search(r"^steps +2 \(2 of them were done before\) *$", out, re.MULTILINE)
        assert cli("finetune", adapter.parent / "recipe.yaml", "--quiet")[2] == ""
        assert files_of(adapter) == before

    def test_refused(self, cli: Cli, recipe_file: RecipeFile, folder_of: Folder, tmp_path: Path) -> None:
        quantizing = recipe_file(folder_of("opt"), tmp_path / "q")
        assert "without this section a recipe quantizes" in cli.fails(2, "finetune", quantizing)
        (tmp_path / "t.yaml").write_text(training("m", tmp_path / "t", tmp_path / "nothing.txt"))
        assert "trains, with 'qlm finetune'" in cli.fails(2, "quantize", tmp_path / "t.yaml")
        assert "model folder m does not exist" in cli.fails(66, "plan", tmp_path / "t.yaml")
        assert "model folder m does not exist" in cli.fails(66, "finetune", tmp_path / "t.yaml")
        assert "no such recipe" in cli.fails(66, "finetune", tmp_path / "u.yaml")
        (tmp_path / "t.yaml").write_text(training(folder_of("opt"), tmp_path / "t", tmp_path / "nothing.txt"))
        assert "nothing.txt: no such file" in cli.fails(66, "finetune", tmp_path / "t.yaml")
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "t.yaml").write_text(training(folder_of("opt"), tmp_path / "t", tmp_path / "empty.txt"))
        assert "empty.txt: there is no text in it" in cli.fails(2, "finetune", tmp_path / "t.yaml")
        assert not (tmp_path / "t").exists()


class TestAdapter:
    """`--adapter` beside plain PEFT on plain transformers, and beside the merged model."""

    PROMPT = "The cat sat"

    def test_generate_as_peft_does(self, cli: Cli, adapter: Path, folder_of: Folder) -> None:
        import torch
        from peft import PeftModel
        from transformers import OPTForCausalLM

        folder = folder_of("opt")
        tokenizer = qlm.load_tokenizer(folder)
        plain = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = [tokenizer(self.PROMPT)["input_ids"]]
        settings: dict[str, Any] = dict(max_new_tokens=12, do_sample=False)
        alone = plain.generate(torch.tensor(ids), **settings)[0].tolist()
        with_adapter = (
            PeftModel.from_pretrained(plain, str(adapter)).generate(torch.tensor(ids), **settings)[0].tolist()
        )
        assert alone != with_adapter
        options = ("--prompt", self.PROMPT, "--greedy", "--max-new-tokens", "12", "--json", "-")
        expected = tokenizer.decode(with_adapter[len(ids[0]) :], skip_special_tokens=True)
        for runtime, more in (("transformers", ("--runtime", "transformers", "--dtype", "float32")), ("engine", ())):
            code, out, err = cli("generate", folder, "--adapter", adapter, *options, *more)
            found = json.loads(out)
            assert (code, err) == (0, "")
            assert (found["texts"], found["adapter"], found["runtime"]) == ([expected], str(adapter), runtime)
            without = json.loads(cli("generate", folder, *options, *more)[1])
            assert without["texts"] != [expected]
            assert "adapter" not in without

    def test_evaluate_as_the_merged_model(
        self, cli: Cli, adapter: Path, folder_of: Folder, text_file: Path, tmp_path: Path
    ) -> None:
        options = ("--data", text_file, "--length", 32, "--windows", 8, "--json", "-")
        # In fp32 throughout: merged fp16 weights would be rounded once more.
        folder = tmp_path / "base"
        tiny_models.build("opt").save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes((folder_of("opt") / "tokenizer.json").read_bytes())
        other = tmp_path / "adapter"
        (tmp_path / "t.yaml").write_text(training(folder, other, adapter.parent / "short.txt"))
        assert cli("finetune", tmp_path / "t.yaml", "--quiet")[0] == 0
        code, out, _ = cli("merge", folder, other, "--into", "float", "--output", tmp_path / "m", *options)
        assert code == 0
        merged = json.loads(out)
        apart = json.loads(cli("evaluate", folder, "--adapter", other, *options)[1])
        alone = json.loads(cli("evaluate", folder, *options)[1])
        assert apart["perplexity"] == pytest.approx(merged["evaluation"]["perplexity"], rel=1e-5)
        assert merged["evaluation"]["kl_divergence"] < 1e-8
        code, out, err = cli("merge", folder, other, "--into", "float", "--output", tmp_path / "m", *options[:-2])
        assert (code, f"merge: {tmp_path / 'm'} was there already" in err.splitlines()) == (0, True)
        assert re.search(r"^  baseline +the base with the adapter *$", out, re.MULTILINE)
        assert re.search(r"^  baseline perplexity stderr +\d", out, re.MULTILINE)
        assert abs(apart["perplexity"] / alone["perplexity"] - 1) > 0.01
        again = json.loads(cli("evaluate", tmp_path / "m", *options)[1])
        assert again["perplexity"] == pytest.approx(apart["perplexity"], rel=1e-5)
        engine = json.loads(cli("evaluate", folder, "--adapter", other, *options, "--runtime", "engine")[1])
        assert engine["perplexity"] == pytest.approx(apart["perplexity"], rel=1e-4)

    def test_an_adapter_is_no_model(self, cli: Cli, adapter: Path) -> None:
        assert "is an adapter; give the model that it is for" in cli.fails(2, "generate", adapter, "--prompt", "a")

    def test_refused(self, cli: Cli, adapter: Path, folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
        folder = folder_of("opt")
        for verb, options in (("generate", ("--prompt", "a")), ("evaluate", ("--data", text_file, "--length", 32))):
            assert "no such folder" in cli.fails(66, verb, folder, "--adapter", tmp_path / "none", *options)
            # The same shapes, other weights; and another family.
            assert "was trained on another base" in cli.fails(
                65, verb, folder_of("opt-post-norm"), "--adapter", adapter, *options
            )
            assert str(adapter) in cli.fails(65, verb, folder_of(FAMILIES[1]), "--adapter", adapter, *options)


class TestMerge:
    @pytest.mark.parametrize("into", ["float", "nf4", "gptq", "int8"])
    def test_into(self, into: str, cli: Cli, adapter: Path, folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
        looked_at = ("--calibration", text_file, "--samples", 8, "--calibration-length", 32) if into == "gptq" else ()
        code, out, err = cli(
            "merge", folder_of("opt"), adapter, "--into", into, "--output", tmp_path / "m", *looked_at, "--quiet",
            "--json", tmp_path / "facts.json",
        )  # fmt: skip
        assert (code, err) == (0, "")
        facts = json.loads((tmp_path / "facts.json").read_text())
        assert (facts["into"], facts["onto"], facts["evaluation"]) == (into, "float weights", None)
        assert str(facts["linears"]) in out
        backend = json.loads(cli("inspect", tmp_path / "m", "--json", "-")[1])["backend"]
        assert backend == {"float": "none (float)"}.get(into, into)

    def test_settings(self, cli: Cli, adapter: Path, folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
        options = ("--bits", 3, "--group-size", 32, "--quality", "fast", "--calibration", text_file, "--samples", 8)
        target = ("--into", "gptq", "--output", tmp_path / "m")
        code, _, err = cli("merge", folder_of("opt"), adapter, *target, *options, "--calibration-length", 32)
        assert code == 0, err
        quantized = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
        assert (quantized["bits"], quantized["group_size"]) == (3, 32)

    def test_refused(self, cli: Cli, adapter: Path, folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
        def fails(code: int, *options: object, into: str = "gptq", model: str = "opt") -> str:
            return cli.fails(
                code, "merge", folder_of(model), adapter, "--into", into, "--output", tmp_path / "m", *options
            )

        assert "into: found 'int4'; allowed: float, nf4, gptq, int8" in fails(2, into="int4")
        assert "--samples: has no effect without --calibration" in fails(2, "--samples", 8, into="nf4")
        assert "--calibration-length: has no effect without --calibration" in fails(
            2, "--calibration-length", 8, into="nf4"
        )
        assert "--windows: has no effect without --data" in fails(2, "--windows", 8, into="nf4")
        assert "quantize.bits: found" in fails(2, "--bits", 5, "--calibration", text_file)
        assert "float quantizes nothing" in fails(2, "--bits", 4, into="float")
        assert "--calibration: found ''" in fails(2, "--calibration", "")
        assert "calibration" in fails(2)
        assert "trained on another base" in fails(65, into="nf4", model="opt-post-norm")
        assert not (tmp_path / "m").exists()


class TestEvaluate:
    def test_with_a_baseline(
        self, cli: Cli, folder_of: Folder, quantized: Callable[[str], Path], text_file: Path, tmp_path: Path
    ) -> None:
        code, out, _ = cli(
            "evaluate", quantized("int8"), "--data", text_file, "--baseline", folder_of("opt"), "--length", 32, "--windows",
            5, "--json", tmp_path / "result.json",
        )  # fmt: skip
        assert code == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert result.keys() >= EVALUATION_KEYS
        assert result["tokens"] == 5 * 31
        assert 0 < result["kl_divergence"] < 0.01
        assert 0.9 < result["same_top1"] <= 1
        assert re.fullmatch("[0-9a-f]{64}", result["data_sha256"])
        assert result["perplexity_stderr"] > 0
        for key in ("perplexity", "kl divergence", "same top1", "protocol", "bos"):
            assert key in out
        assert f"{result['perplexity']:.6g}" in out
        assert f"{result['kl_divergence']:.6g} nats" in out
        assert f"{100 * result['same_top1']:.2f} %" in out

    def test_the_table_has_no_empty_rows(self, cli: Cli, folder_of: Folder, text_file: Path) -> None:
        code, out, _ = cli("evaluate", folder_of("opt"), "--data", text_file, "--length", 32, "--windows", 1, "-q")
        assert code == 0
        assert re.search(r"^length +32 tokens *$", out, re.MULTILINE)
        assert not [word for word in ("None", "baseline", "stderr", "kl", "top1") if word in out]

    def test_json_on_stdout(self, cli: Cli, folder_of: Folder, text_file: Path) -> None:
        code, out, err = cli(
            "evaluate", folder_of("opt"), "--data", text_file, "--length", 32, "--windows", 1, "--json", "-", "-q"
        )
        assert (code, err) == (0, "")
        result = json.loads(out)
        assert result["kl_divergence"] is None
        assert result["perplexity_stderr"] is None

    def test_jsonl(self, cli: Cli, folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
        words = text_file.read_text("utf-8")[:4000]
        (tmp_path / "a.jsonl").write_text(json.dumps({"code": words}) + "\n", "utf-8")
        (tmp_path / "a.txt").write_text(words, "utf-8")
        results = []
        for options in (["--data", tmp_path / "a.jsonl", "--column", "code"], ["--data", tmp_path / "a.txt"]):
            code, out, _ = cli("evaluate", folder_of(FAMILIES[1]), *options, "--length", 32, "--json", "-", "-q")
            assert code == 0
            results.append(json.loads(out)["perplexity"])
        assert results[0] == results[1]

    @needs_kernels
    @pytest.mark.parametrize("variant", FAMILIES)
    def test_engine_gives_the_same(self, variant: str, cli: Cli, folder_of: Folder, text_file: Path) -> None:
        results = {}
        for runtime in ("transformers", "engine"):
            options = ("--data", text_file, "--length", 32, "--windows", 20, "--runtime", runtime, "--json", "-", "-q")
            code, out, err = cli("evaluate", folder_of(variant), *options)
            assert (code, err) == (0, "")
            results[runtime] = json.loads(out)
            del results[runtime]["seconds"]
        for key in ("perplexity", "perplexity_stderr"):
            values = [result.pop(key) for result in results.values()]
            assert values[0] == pytest.approx(values[1], rel=1e-4)
        assert results["engine"] == results["transformers"]

    def test_options_of_the_engine(self, cli: Cli, folder_of: Folder, text_file: Path) -> None:
        arguments = ("evaluate", folder_of("opt"), "--data", text_file, "-q")
        assert "--runtime engine" in cli.fails(2, *arguments, "--head", "int8")
        assert "expected one of engine, transformers" in cli.fails(2, *arguments, "--runtime", "torch")
        for option in (("--dtype", "float32"), ("--attention", "eager"), ("--device", "cuda")):
            assert " ".join(option) in cli.fails(2, *arguments, "--runtime", "engine", *option)

    @needs_kernels
    @pytest.mark.parametrize("variant", FAMILIES)
    def test_engine_with_a_baseline(
        self, variant: str, cli: Cli, folder_of: Folder, recipe_file: RecipeFile, text_file: Path, tmp_path: Path
    ) -> None:
        assert cli("quantize", "-q", recipe_file(folder_of(variant), tmp_path / "out", "int8"))[0] == 0
        options = (
            "--data",
            text_file,
            "--length",
            32,
            "--windows",
            20,
            "--baseline",
            folder_of(variant),
            "--json",
            "-",
            "-q",
        )
        code, out, err = cli("evaluate", tmp_path / "out", *options)
        assert (code, err) == (0, "")
        expected = json.loads(out)
        code, out, err = cli(
            "evaluate", tmp_path / "out", *options, "--runtime", "engine", "--head", "float", "--cache-dtype", "float32"
        )
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert 0 < found["kl_divergence"] < 0.01
        for key in ("kl_divergence", "kl_stderr"):
            assert found.pop(key) == pytest.approx(expected.pop(key), abs=1e-5)
        for key in ("perplexity", "perplexity_stderr", "baseline_perplexity", "baseline_perplexity_stderr"):
            assert found.pop(key) == pytest.approx(expected.pop(key), rel=1e-4)
        for key in ("same_top1", "same_top1_stderr"):
            assert found.pop(key) == pytest.approx(expected.pop(key), abs=2 / found["tokens"])
        assert {**found, "seconds": 0} == {**expected, "seconds": 0}

    def test_options_that_cannot_be(self, cli: Cli, folder_of: Folder, text_file: Path) -> None:
        model = folder_of("opt")
        data = ("--data", text_file)
        assert "positions" in cli.fails(2, "evaluate", model, *data, "--length", tiny_models.POSITIONS + 1, "-q")
        assert "--windows" in cli.fails(2, "evaluate", model, *data, "--windows", 0)
        assert "dtype" in cli.fails(2, "evaluate", model, *data, "--dtype", "int4", "-q")
        assert "flex" in cli.fails(2, "evaluate", model, *data, "--attention", "flex", "-q")
        assert "nothing.txt" in cli.fails(66, "evaluate", model, "--data", "nothing.txt", "-q")


@pytest.mark.parametrize("runtime", [pytest.param("engine", marks=needs_kernels), "transformers"])
class TestGenerate:
    @pytest.fixture
    def options(self, runtime: str) -> tuple[Any, ...]:
        return ("--prompt", "The module", "--max-new-tokens", 8, "--runtime", runtime)

    def test_greedy_streams_prompt_and_text(self, cli: Cli, folder_of: Folder, options: tuple[Any, ...]) -> None:
        runs = [cli("generate", folder_of("opt"), *options, "--greedy") for _ in range(2)]
        assert runs[0] == runs[1]
        code, out, err = runs[0]
        assert (code, err) == (0, "")
        assert out.startswith("The module")
        assert out.endswith("\n")
        _, as_json, _ = cli("generate", folder_of("opt"), *options, "--greedy", "--json", "-")
        value = json.loads(as_json)
        assert value["prompt"] + value["texts"][0] + "\n" == out
        assert value["runtime"] == options[-1]

    def test_json_says_how(self, cli: Cli, folder_of: Folder, options: tuple[Any, ...], runtime: str) -> None:
        more = ("--seed", 7, "--top-p", 0.9, "--stop", "x", "--json", "-")
        value = json.loads(cli("generate", folder_of("opt"), *options, *more)[1])
        assert (value["model"], value["revision"]) == (str(folder_of("opt")), None)
        own = {
            "engine": {"head": "auto", "cache_dtype": "auto"},
            "transformers": {"device": "cpu", "dtype": "auto", "attn_implementation": "sdpa"},
        }
        assert value["options"] == {
            "max_new_tokens": 8, "temperature": 1.0, "top_k": None, "top_p": 0.9, "repetition_penalty": 1.0,
            "num_return_sequences": 1, "seed": 7, "greedy": False, "stop": ["x"], **own[runtime],
        }  # fmt: skip

    def test_stdout_that_lacks_characters(self, folder_of: Folder, runtime: str) -> None:
        """Escaped, with a note; JSON has escapes of its own."""
        arguments = (
            "generate",
            folder_of("opt"),
            "--prompt",
            "é→",
            "--max-new-tokens",
            2,
            "--greedy",
            "--runtime",
            runtime,
        )

        def run(*more: object, encoding: str) -> tuple[int | None, str, str]:
            process = command(*arguments, *more, environment={"PYTHONIOENCODING": encoding}, encoding="utf-8")
            out, err = process.communicate(timeout=120)
            return process.returncode, out, err

        code, plain, err = run(encoding="utf-8")
        assert (code, err, plain[:2]) == (0, "", "é→")
        escaped = plain.encode("ascii", "backslashreplace").decode()
        code, out, err = run(encoding="ascii")
        assert (code, out) == (0, escaped)
        assert err.startswith("qlm: note: stdout is ascii: other characters")
        assert err.count("\n") == 1
        code, out, err = run("--prompt", "ü", encoding="ascii")
        assert (code, out.splitlines()[1][:8]) == (0, "\\xe9\\u21"[:8])
        code, out, err = run("--json", "-", encoding="ascii")
        assert (code, err) == (0, "")
        assert json.loads(out)["prompt"] + json.loads(out)["texts"][0] + "\n" == plain

    def test_seed(self, cli: Cli, folder_of: Folder, options: tuple[Any, ...]) -> None:
        def text(seed: int) -> str:
            more = ("--seed", seed, "--top-k", 50, "--top-p", 0.9, "--temperature", 1.2)
            code, out, err = cli("generate", folder_of(FAMILIES[2]), *options, *more, "--repetition-penalty", 1.1)
            assert (code, err) == (0, "")
            return out

        assert text(1) == text(1)
        assert len({text(seed) for seed in range(4)}) > 1

    def test_several(self, cli: Cli, folder_of: Folder, tmp_path: Path, options: tuple[Any, ...]) -> None:
        more = ("--num-return-sequences", 3, "--seed", 1, "--json", tmp_path / "texts.json")
        code, out, _ = cli("generate", folder_of(FAMILIES[1]), *options, *more)
        assert code == 0
        texts = json.loads((tmp_path / "texts.json").read_text("utf-8"))["texts"]
        assert len(texts) == 3
        assert out == "".join(f"--- {n} ---\nThe module{text}\n" for n, text in enumerate(texts, 1))

    def test_several_prompts(self, cli: Cli, folder_of: Folder, tmp_path: Path, options: tuple[Any, ...]) -> None:
        more = ("--prompt", "A longer one, of more words", "--greedy")
        code, out, _ = cli("generate", folder_of(FAMILIES[1]), *options, *more, "--json", tmp_path / "texts.json")
        assert code == 0
        found = json.loads((tmp_path / "texts.json").read_text("utf-8"))
        assert [each["prompt"] for each in found] == ["The module", "A longer one, of more words"]
        whole = [each["prompt"] + each["texts"][0] for each in found]
        assert out == "".join(f"--- {n} ---\n{text}\n" for n, text in enumerate(whole, 1))
        alone = cli("generate", folder_of(FAMILIES[1]), *options, "--greedy")[1]
        assert alone == whole[0] + "\n"

    def test_stop(self, cli: Cli, folder_of: Folder, options: tuple[Any, ...]) -> None:
        text = json.loads(cli("generate", folder_of("opt"), *options, "--greedy", "--json", "-")[1])["texts"][0]
        code, out, _ = cli("generate", folder_of("opt"), *options, "--greedy", "--stop", "no such", "--stop", text[3:5])
        assert (code, out) == (0, "The module" + text[: text.index(text[3:5])] + "\n")
        assert "stop ['']: expected" in cli.fails(
            2, "generate", folder_of("opt"), *options, "--stop", "", "--json", "-"
        )

    def test_options_that_contradict(self, cli: Cli, folder_of: Folder, options: tuple[Any, ...], runtime: str) -> None:
        assert "greedy" in cli.fails(2, "generate", folder_of("opt"), *options, "--greedy", "--top-k", 2, "--json", "-")
        found, out, err = cli("generate", folder_of("opt"), "--prompt", "a " * 200, "--runtime", runtime)
        assert found == 2
        assert "positions" in err
        assert err.count("\n") == 1
        assert len(out.splitlines()) <= 1


@pytest.mark.parametrize("runtime", [pytest.param("engine", marks=needs_kernels), "transformers"])
class TestRevision:
    """Of a repository in the hub client's cache, where nothing is said to be the newest."""

    @pytest.fixture
    def repository(self, folder_of: Folder, tmp_path: Path) -> Path:
        import shutil

        path = tmp_path / "models--org--name"
        shutil.copytree(folder_of("opt"), path / "snapshots" / ("a" * 40))
        (path / "refs").mkdir()
        (path / "refs" / "v1").write_text("a" * 40)
        return path

    def test_generate(self, cli: Cli, folder_of: Folder, repository: Path, runtime: str) -> None:
        options = ("--prompt", "The module", "--max-new-tokens", 4, "--greedy", "--json", "-", "--runtime", runtime)
        expected = json.loads(cli("generate", folder_of("opt"), *options)[1])
        code, out, err = cli("generate", repository, *options, "--revision", "v1")
        assert (code, err) == (0, "")
        assert json.loads(out) == {**expected, "model": str(repository), "revision": "v1"}
        assert "'main' is not in the cache" in cli.fails(66, "generate", repository, *options)

    def test_evaluate(self, cli: Cli, folder_of: Folder, repository: Path, text_file: Path, runtime: str) -> None:
        options = ("--data", text_file, "--length", 32, "--windows", 2, "--json", "-", "-q", "--runtime", runtime)
        expected = json.loads(cli("evaluate", folder_of("opt"), *options)[1])
        code, out, err = cli("evaluate", repository, *options, "--revision", "v1")
        assert (code, err) == (0, "")
        assert json.loads(out)["perplexity"] == expected["perplexity"]
        assert "'main' is not in the cache" in cli.fails(66, "evaluate", repository, *options)


class TestRuntime:
    OPTIONS = ("--prompt", "The module", "--max-new-tokens", 4, "--greedy", "--json", "-")

    @needs_kernels
    def test_the_engine_is_the_default_on_cpus(
        self, cli: Cli, quantized: Callable[[str], Path], folder_of: Folder
    ) -> None:
        for folder in (folder_of("opt"), quantized("int8"), quantized("nf4"), quantized("gptq")):
            code, out, err = cli("generate", folder, *self.OPTIONS)
            assert (code, err) == (0, "")
            assert json.loads(out)["runtime"] == "engine"

    @needs_kernels
    @pytest.mark.parametrize("variant", FAMILIES)
    def test_both_give_the_same_text(self, variant: str, cli: Cli, folder_of: Folder) -> None:
        options = ("--prompt", "The module", "--max-new-tokens", 30, "--greedy", "--json", "-", "--runtime")
        texts = [
            json.loads(cli("generate", folder_of(variant), *options, runtime)[1])["texts"]
            for runtime in ("engine", "transformers")
        ]
        assert texts[0] == texts[1]

    def test_transformers_says_why(self, cli: Cli, quantized: Callable[[str], Path], folder_of: Folder) -> None:
        for folder, options, reason in (
            (quantized("quanto"), (), "the checkpoint is quanto's"),
            (folder_of("opt"), ("--dtype", "bfloat16"), "--dtype bfloat16: the engine computes in float32"),
            (folder_of("opt"), ("--attention", "eager"), "--attention eager: the engine has an attention of its own"),
        ):
            code, out, err = cli("generate", folder, *self.OPTIONS, *options)
            assert (code, json.loads(out)["runtime"]) == (0, "transformers")
            assert err.startswith(f"qlm: note: running on transformers: {reason}")
            assert err.count("\n") == 1
            assert cli("generate", folder, *self.OPTIONS, *options, "--runtime", "transformers") == (0, out, "")

    @needs_kernels
    def test_quanto_on_the_engine(self, cli: Cli, quantized: Callable[[str], Path]) -> None:
        line = cli.fails(2, "generate", quantized("quanto"), *self.OPTIONS, "--runtime", "engine")
        assert "--runtime transformers" in line

    def test_options_that_cannot_be_honoured(self, cli: Cli, folder_of: Folder) -> None:
        for options, words in (
            (("--runtime", "engine", "--device", "cuda"), "--device cuda with --runtime engine"),
            (("--runtime", "engine", "--dtype", "float32"), "--dtype float32 with --runtime engine"),
            (("--runtime", "engine", "--attention", "sdpa"), "--attention sdpa with --runtime engine"),
            (("--head", "int8", "--attention", "sdpa"), "--attention sdpa with --head int8"),
            (("--runtime", "transformers", "--head", "float"), "--head float: an option of the engine"),
            (("--runtime", "transformers", "--cache-dtype", "int8"), "--cache-dtype int8: an option of the engine"),
            (("--runtime", "llama.cpp"), "--runtime llama.cpp: expected one of engine, transformers"),
        ):
            assert words in cli.fails(2, "generate", folder_of("opt"), *self.OPTIONS, *options)

    def test_without_the_native_library(self, cli: Cli, folder_of: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qlm.kernels.cpu.why_not_available", lambda: "qlm's CPU kernels are not installed")
        line = cli.fails(69, "generate", folder_of("opt"), *self.OPTIONS)
        assert line.endswith("qlm's CPU kernels are not installed; or take --runtime transformers")
        assert cli("generate", folder_of("opt"), *self.OPTIONS, "--runtime", "transformers")[0] == 0

    @needs_kernels
    @pytest.mark.parametrize(
        "arguments", [("generate", "--prompt", "a", "--max-new-tokens", "2"), ("bench", "--prompt", "4", "--new", "2")]
    )
    def test_no_torch(self, arguments: tuple[str, ...], folder_of: Folder) -> None:
        verb, *options = arguments
        code = (
            "import sys; from qlm.cli import main\ntry: main(sys.argv[1:])\n"
            "finally: assert not {'torch', 'transformers'} & sys.modules.keys()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, verb, str(folder_of("opt")), *options],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")


BENCH_KEYS = {
    "model", "backend", "threads", "isa", "prompt_tokens", "new_tokens", "prefill_ms", "prefill_tokens_per_s",
    "decode_ms_per_token", "decode_tokens_per_s", "weight_bytes_per_token", "read_gb_per_s", "ceiling_gb_per_s", "ceiling_share",
    "no_ceiling", "peak_rss_gb", "checkpoint_gb", "load_s", "first_token_s",
}  # fmt: skip


@needs_kernels
class TestBench:
    def test_table_and_json(self, cli: Cli, quantized: Callable[[str], Path], tmp_path: Path) -> None:
        options = ("--prompt", 20, "--new", 3, "--repeats", 2, "--threads", 1)
        code, out, err = cli("bench", quantized("int8"), *options, "--json", tmp_path / "bench.json")
        assert (code, err) == (0, "")
        result = json.loads((tmp_path / "bench.json").read_text())
        assert result.keys() >= BENCH_KEYS
        assert (result["model"], result["backend"], result["threads"]) == ("int8", "int8", 1)
        assert (result["prompt_tokens"], result["new_tokens"], result["batch"]) == (20, 3, 1)
        assert all(value > 0 for value in result.values() if isinstance(value, int | float))
        assert result["decode_ms_per_token"] * result["decode_tokens_per_s"] == pytest.approx(1000, rel=1e-3)
        assert re.search(r"^decode tokens per s +[\d.]+", out, re.MULTILINE)
        # A file as small as this one is read from the CPU's caches.
        assert result["ceiling_share"] is None
        assert "fit into the CPU's caches" in result["no_ceiling"]
        assert result["no_ceiling"] in out
        assert "ceiling share" not in out

    def test_batch_on_stdout(self, cli: Cli, folder_of: Folder) -> None:
        code, out, _ = cli(
            "bench", folder_of("opt"), "--prompt", 1, "--new", 2, "--batch", 3, "--repeats", 1, "--json", "-"
        )
        assert (code, json.loads(out)["batch"]) == (0, 3)

    def test_more_than_the_positions(self, cli: Cli, folder_of: Folder) -> None:
        line = cli.fails(2, "bench", folder_of("opt"), "--prompt", 60, "--new", 5)
        assert "60 + 5 tokens: the model has 64 positions" in line


class TestInspect:
    def test_float(self, cli: Cli, folder_of: Folder) -> None:
        for variant in FAMILIES:
            code, out, err = cli("inspect", folder_of(variant), "--json", "-")
            assert (code, err) == (0, "")
            facts = json.loads(out)
            model = tiny_models.build(variant)
            assert facts["family"] == model.config.model_type
            assert facts["backend"] == "none (float)"
            assert facts["bits_per_weight"] == 16
            assert facts["parameters"] == sum(p.numel() for p in model.parameters())
            assert facts["bytes"] == sum(facts["bytes_by_part"].values())
            assert facts["bytes_by_part"]["quantized linears"] == 0

    @pytest.mark.parametrize(("backend", "bits"), [("int8", 8), ("nf4", 4.5), ("gptq", 4.1), ("quanto", 8)])
    def test_quantized(self, backend: str, bits: float, cli: Cli, quantized: Callable[[str], Path]) -> None:
        code, out, err = cli("inspect", quantized(backend), "--json", "-")
        assert (code, err) == (0, "")
        facts = json.loads(out)
        assert facts["backend"] == backend
        assert facts["quantized_linears"] == 12
        assert facts["bytes_by_part"]["other linears in blocks"] == 0
        # Scales, zero points and a few hundred bytes of state a linear, which weigh much in one of 128 x 128.
        assert bits <= facts["bits_per_weight"] < bits + 1.1
        assert facts["bytes"] == sum(facts["bytes_by_part"].values())

    def test_table(self, cli: Cli, folder_of: Folder) -> None:
        code, out, _ = cli("inspect", folder_of("opt"))
        assert code == 0
        facts = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in out.splitlines() if "  " in line.strip())
        assert facts["layers"] == "2"
        assert facts["bos"] == "2 at the start of every text"
        assert facts["embeddings and head"].endswith(" MB")
        assert "model.decoder.layers.0.fc1" in out or "decoder.layers.0.fc1" in out


class TestSmallCommands:
    def test_validate(self, cli: Cli, recipe_file: RecipeFile) -> None:
        a, b = recipe_file("m", "a", name="a.yaml"), recipe_file("m", "b", name="b.yaml")
        assert cli("validate", a, b) == (0, f"{a}: valid\n{b}: valid\n", "")
        assert "b.yaml" in cli.fails(2, "validate", a, recipe_file("m", "a", name="b.yaml"))

    def test_plan(self, cli: Cli, folder_of: Folder, recipe_file: RecipeFile, tmp_path: Path) -> None:
        recipe = recipe_file(folder_of("opt"), tmp_path / "o", "gptq")
        code, out, err = cli("plan", recipe)
        assert (code, err) == (0, "")
        assert re.search(r"^linears +12 *$", out, re.MULTILINE)
        assert re.search(r"^quantize memory +[\d.]+ [MG]B *$", out, re.MULTILINE)
        assert not (tmp_path / "o").exists()
        facts = json.loads(cli("plan", recipe, "--json", "-")[1])
        assert facts["memory"] >= facts["quantize_memory"] > 1e8
        assert json.loads(cli("plan", recipe, "--device", "cpu", "--json", "-")[1])["disk"] == facts["disk"]
        said = cli.fails(69, "plan", recipe, "--device", "cuda")
        assert "device: 'cuda', but torch sees no CUDA GPU here; use 'cpu'" in said

    def test_plan_of_several(self, cli: Cli, folder_of: Folder, recipe_file: RecipeFile, tmp_path: Path) -> None:
        recipes = [
            recipe_file(folder_of("opt"), tmp_path / name, "int8", f"{name}-disk.yaml", skip=["*.0.*"]) for name in "ab"
        ]
        code, out, _ = cli("plan", *recipes)
        assert code == 0
        assert all(str(path) in out.replace("\n", "") for path in recipes)
        assert len(re.findall(r"linears +6 *$", out, re.MULTILINE)) == 2
        assert json.loads(cli("plan", *recipes, "--json", "-")[1]).keys() == {str(path) for path in recipes}

    def test_schema_of_recipes_that_train(self, cli: Cli) -> None:
        code, out, err = cli("schema", "--finetune")
        assert (code, err) == (0, "")
        assert json.loads(out) == finetune_json_schema()

    def test_validate_takes_both_kinds(
        self, cli: Cli, recipe_file: RecipeFile, text_file: Path, tmp_path: Path
    ) -> None:
        quantizing = recipe_file("m", tmp_path / "q")
        path = tmp_path / "t.yaml"
        path.write_text(training("m", tmp_path / "t", text_file))
        assert cli("validate", quantizing, path) == (0, f"{quantizing}: valid\n{path}: valid\n", "")
        path.write_text(training("m", tmp_path / "q", text_file))
        assert "writes to" in cli.fails(2, "validate", quantizing, path)
        path.write_text(training("m", tmp_path / "t", text_file, epochs=3))
        assert "train.epochs: found beside steps" in cli.fails(2, "validate", path)

    def test_schema(self, cli: Cli) -> None:
        code, out, err = cli("schema")
        assert (code, err) == (0, "")
        assert json.loads(out) == json_schema()

    def test_schema_agrees_with_the_reader(self, recipe_file: RecipeFile) -> None:
        from ruamel.yaml import YAML

        schema, yaml = json_schema(), YAML(typ="safe", pure=True)
        schema_of_training = finetune_json_schema()
        shipped = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name != "accelerate"]
        assert len(shipped) >= 57
        for path in shipped:
            kind = schema_of_training if "qlora" in path.parts else schema
            assert allows(kind, yaml.load(path), kind), path
        good = {"model": "m", "quantize": {"backend": "gptq"}, "calibration": {"data": "a.txt"}, "output": "o"}
        assert allows(schema, good, schema)
        for section, key, value in (
            ("quantize", "bits", 5), ("quantize", "bits", "4"), ("quantize", "group_size", 48), ("quantize", "damp", 0),
            ("quantize", "double_quant", True), ("quantize", "Bits", 4), ("quantize", "backend", "awq"),
            ("quantize", "overrides", {"*": {"bit": 4}}), ("calibration", "samples", 0), ("calibration", "seed", -1),
            ("calibration", "data", 7), ("calibration", "data", {"name": "a/b"}),
        ):  # fmt: skip
            wrong = {**good, section: {**good[section], key: value}}  # type: ignore[dict-item]
            assert not allows(schema, wrong, schema), (section, key, value)
        assert not allows(schema, {key: value for key, value in good.items() if key != "output"}, schema)
        assert not allows(schema, {**good, "comment": "x"}, schema)

    def test_inspect_lists_what_globs_match(
        self, cli: Cli, folder_of: Folder, recipe_file: RecipeFile, tmp_path: Path
    ) -> None:
        for variant in FAMILIES:
            paths = json.loads(cli("inspect", folder_of(variant), "--json", "-")[1])["first_block"]
            assert len(paths) in (4, 6)
            recipe = recipe_file(folder_of(variant), tmp_path / "o", "int8", skip=paths)
            assert json.loads(cli("plan", recipe, "--json", "-")[1])["linears"] == len(paths)

    def test_recipes(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code, out, _ = cli("recipes")
        assert code == 0
        assert {"demo/tiny-opt-gptq", "opt-125m/gptq-4bit", "qlora/tiny-opt", "qlora/starcoder"} <= set(out.split())
        monkeypatch.chdir(tmp_path)
        assert cli("recipes", "opt-125m/gptq-4bit") == (0, "opt-125m-gptq-4bit.yaml\n", "")
        assert cli("recipes", "opt-125m/int8", "mine.yaml") == (0, "mine.yaml\n", "")
        assert cli("validate", "mine.yaml", "opt-125m-gptq-4bit.yaml")[0] == 0
        assert "exists" in cli.fails(73, "recipes", "opt-125m/int8", "mine.yaml")
        assert "did you mean opt-125m/int8?" in cli.fails(2, "recipes", "opt-125/int8")

    def test_doctor(self, cli: Cli, tmp_path: Path) -> None:
        code, out, err = cli("doctor", "--json", tmp_path / "report.json")
        assert (code, err) == (0, "")
        assert out.splitlines()[-1].split() == ["verdict", "healthy"]
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["verdict"] == "healthy"
        assert re.match(r"\d+\.\d+", report["packages"]["transformers"])
        assert report["kernels"].keys() >= {"int8_linear", "gptq_linear", "nf4"}

    def test_doctor_finds_wrong_logits(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        for difference in (0.5, float("nan")):
            monkeypatch.setattr("qlm.doctor.self_check", lambda d=difference: {"opt, sdpa": d, "opt, eager": 1e-6})
            code, out, _ = cli("doctor")
            assert code == 1
            assert "computes wrong logits: ['opt, sdpa']" in out

    def test_verify(self, cli: Cli, quantized: Callable[[str], Path], tmp_path: Path) -> None:
        import shutil

        folder = tmp_path / "copy"
        shutil.copytree(quantized("nf4"), folder)
        code, out, err = cli("verify", folder)
        assert (code, err) == (0, "")
        assert "all as written by qlm" in out
        shard = next(folder.glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        assert shard.name in cli.fails(65, "verify", folder)
        assert "no such folder" in cli.fails(66, "verify", tmp_path / "nothing")


class TestMistakes:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["frobnicate"], ["quantise", "a.yaml"], ["quantize"], ["quantize", "--frob", "a.yaml"], ["inspect"],
            ["evaluate", "m", "--length", "x"], ["generate", "m"], ["--frob"], ["validate", "--json"], ["inspect", "a", "b"],
            ["finetune"], ["finetune", "a.yaml", "b.yaml"], ["merge", "m", "a"], ["merge", "m", "a", "--into", "nf4"],
            ["generate", "m", "--prompt", "a", "--max-new-tokens", "0"], ["quantize", "a.yaml", "--threads", "0"],
        ],
        ids=" ".join,
    )  # fmt: skip
    def test_wrong_arguments(self, arguments: list[str], cli: Cli) -> None:
        line = cli.fails(2, *arguments)
        known = f" {arguments[0]}" if arguments[0] in COMMANDS else ""
        assert line.endswith(f"; see qlm{known} --help")
        assert ".;" not in line

    def test_missing_files(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("quantize", "validate", "plan", "finetune"):
            assert "a.yaml" in cli.fails(66, name, "a.yaml")
        for name in ("inspect", "generate", "verify"):
            options = ["--prompt", "a"] if name == "generate" else []
            assert "nothing/here/at-all" in cli.fails(66, name, "nothing/here/at-all", *options)
        assert list(tmp_path.iterdir()) == []

    def test_json_target_that_cannot_be_written(self, cli: Cli, tmp_path: Path) -> None:
        """Said before anything else: there is no such model either."""
        for arguments in (
            ("inspect", "m"), ("evaluate", "m"), ("generate", "m", "--prompt", "a"), ("bench", "m"), ("quantize", "a.yaml"),
            ("plan", "a.yaml"), ("doctor",), ("finetune", "a.yaml"), ("merge", "m", "a", "--into", "nf4", "--output", "o"),
        ):  # fmt: skip
            line = cli.fails(73, *arguments, "--json", tmp_path / "no" / "such" / "f.json")
            assert line.endswith("no/such/f.json: create failed: No such file or directory")
            assert "is a folder" in cli.fails(73, *arguments, "--json", tmp_path)
        assert "m" in cli.fails(66, "inspect", "m", "--json", tmp_path / "good.json")
        assert list(tmp_path.iterdir()) == []

    def test_names_cannot_write_to_the_terminal(self, cli: Cli, tmp_path: Path) -> None:
        line = cli.fails(66, "validate", tmp_path / "a\x1b[31m\nb.yaml")
        assert "\x1b" not in line

    def test_debug_shows_where(self, cli: Cli) -> None:
        code, _, err = cli("validate", "--debug", "nothing.yaml")
        assert code == 66
        assert "Traceback (most recent call last)" in err
        assert err.splitlines()[-1].startswith("qlm: error: ")

    @pytest.mark.parametrize("debug", [False, True])
    def test_a_defect(self, debug: bool, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*arguments: object) -> None:
            raise ZeroDivisionError("first line\nsecond \x1b[0m line")

        monkeypatch.setattr("qlm.recipe.load_any_recipe", broken)
        code, out, err = cli("validate", "a.yaml", *(["--debug"] if debug else []))
        assert (code, out) == (1, "")
        assert ("Traceback" in err) == debug
        last = err.splitlines()[-1]
        assert last.startswith("qlm: error: ZeroDivisionError: first line\\nsecond \\x1b[0m line; ")
        assert len(err.splitlines()) == 1 or debug

    def test_out_of_memory(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*arguments: object) -> None:
            raise MemoryError

        monkeypatch.setattr("qlm.recipe.load_any_recipe", broken)
        assert "out of memory" in cli.fails(69, "validate", "a.yaml")


class TestHelp:
    def test_all_commands_are_there(self, cli: Cli) -> None:
        code, out, err = cli("--help")
        assert (code, err) == (0, "")
        assert set(TREE.commands) == set(COMMANDS)  # type: ignore[attr-defined]
        assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)
        assert cli() == (0, out, "")
        assert cli("-h") == (0, out, "")

    @pytest.mark.parametrize("name", COMMANDS)
    def test_of_a_command(self, name: str, cli: Cli) -> None:
        code, out, err = cli(name, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"Usage: qlm {name}")
        for parameter in TREE.commands[name].params:  # type: ignore[attr-defined]
            assert all(option in out for option in parameter.opts if option.startswith("--"))

    def test_help_loads_nothing_heavy(self) -> None:
        code = "import sys; from qlm.cli import main\ntry: main(['quantize', '--help'])\nfinally: assert 'torch' not in sys.modules"
        subprocess.run(
            [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )  # fmt: skip


# A verb that takes for ever, started by the real command line in a process of its own.
WAIT = """
import sys, time
import qlm.recipe
def load_recipe(path):
    print("ready", flush=True)
    time.sleep(60)
qlm.recipe.load_recipe = qlm.recipe.load_any_recipe = qlm.recipe.load_finetune_recipe = load_recipe
from qlm.cli import main
main([sys.argv[1], "a.yaml"])
"""


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("verb", ["quantize", "finetune", "validate"])
def test_signals(number: int, code: int, word: str, verb: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, verb],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    assert err == f"qlm: {word}{'' if verb == 'validate' else '; the same command continues'}\n"


@pytest.mark.parametrize("arguments", [["recipes"], ["inspect", "MODEL"], ["schema"], ["--help"]], ids=" ".join)
def test_nobody_reads_stdout(arguments: list[str], folder_of: Folder) -> None:
    """Like `qlm recipes | true`: quiet."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", "from qlm.cli import main; main()", *(str(folder_of("opt")) if a == "MODEL" else a for a in arguments)],
        stdout=writing, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


# --- what README files say --------------------------------------------------------------------------------------------

READMES = ("README.md", "recipes/README.md")


def commands_in(name: str) -> list[str]:
    """Every `qlm ...` of a README: in code blocks, and in `inline code` of more than one word."""
    text = (ROOT / name).read_text("utf-8")
    blocks = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found += re.findall(r"`(qlm [^`]+)`", outside)
    return sorted({line.removeprefix("$ ") for line in found if re.match(r"(\$ )?qlm [a-z-]", line)})


@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name in READMES if (ROOT / name).exists() for line in commands_in(name)]
)
def test_commands_in_readmes_parse(name: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    assert words[0] in TREE.commands, line  # type: ignore[attr-defined]
    parser = TREE.commands[words[0]]  # type: ignore[attr-defined]
    options = {opt: parameter for parameter in parser.params for opt in (*parameter.opts, *parameter.secondary_opts)}
    for word in words[1:]:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in options, line
    if len(words) > 1:
        # Wrong numbers of arguments and options without a value are found too; words such as FILE stand for themselves.
        parser.make_context("qlm", words[1:], resilient_parsing=False)


def test_readmes_name_files_that_exist() -> None:
    for name in READMES:
        for line in commands_in(name):
            for word in shlex.split(line, comments=True):
                if word.startswith("recipes/"):
                    assert list(ROOT.glob(word)), line


def test_readme_knows_every_command() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert [name for name in COMMANDS if f"`{name}`" not in text and f"`qlm {name}" not in text] == []


PYTHON = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_python_in_the_readme() -> None:
    """It compiles, and takes from qlm public names alone, with arguments that they have."""
    import inspect

    used = set()
    for block in PYTHON:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qlm":
                used.add(node.attr)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func).startswith("qlm.")
            ):
                signature = inspect.signature(getattr(qlm, node.func.attr))
                signature.bind(*node.args, **{str(keyword.arg): keyword.value for keyword in node.keywords})
            assert not (isinstance(node, ast.ImportFrom) and str(node.module).startswith("qlm"))
    assert {"load", "load_tokenizer", "generate", "quantize_model"} <= used <= set(qlm.__all__)


def test_python_in_the_readme_runs(folder_of: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that needs qlm alone, with tiny models in the place of its folders."""
    (block,) = [block for block in PYTHON if block.startswith("import qlm")]
    block = re.sub(r'"(out|evals/checkpoints)/[^"]*opt[^"]*"', repr(str(folder_of(FAMILIES[0]))), block)
    block = re.sub(r'"(out|evals/checkpoints)/[^"]*neox[^"]*"', repr(str(folder_of(FAMILIES[1]))), block)
    with contextlib.redirect_stdout(None):
        exec(compile(block, "README.md", "exec"), {})


@needs_kernels
def test_engine_in_the_readme_runs(folder_of: Folder) -> None:
    (block,) = [block for block in PYTHON if "qlm.Engine(" in block]
    block = re.sub(r'"out/[^"]*"', repr(str(folder_of("opt"))), block)
    block = block.replace("max_new_tokens=100", "max_new_tokens=10")
    with contextlib.redirect_stdout(None):
        exec(compile(block, "README.md", "exec"), {"qlm": qlm})
