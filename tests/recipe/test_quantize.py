"""Recipes: every shipped one, every trap of YAML with its exact place, and thousands of damaged ones."""

import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qlm.errors import MissingInput, UsageError
from qlm.recipe import (
    PRESETS,
    FinetuneRecipe,
    HubDataset,
    LinearSettings,
    QuantizeRecipe,
    Recipe,
    TrainRecipe,
    json_schema,
    load_recipe,
    parse_any_recipe,
    parse_recipe,
    quantize_section,
    refuse_shared_outputs,
    resolved,
    resolved_finetune,
    schema_table,
    settings_for,
    size_in_bytes,
    unmatched_globs,
)
from qlm.recipe.backend_keys import TAKES
from qlm.strict_yaml import MAX_BYTES

ROOT = Path(__file__).parents[2]
RECIPES = [path for path in sorted((ROOT / "recipes").glob("*/*.yaml")) if path.parent.name != "qlora"]
MODELS = [
    "opt-125m",
    "opt-350m",
    "opt-1.3b",
    "opt-6.7b",
    "pythia-160m",
    "pythia-410m",
    "pythia-1.4b",
    "pythia-6.9b",
    "gpt-neox-20b",
    "santacoder",
    "starcoderbase-1b",
    "starcoder",
]

GPTQ = """\
model: m
quantize:
  backend: gptq
calibration:
  data: c.txt
output: out
"""
INT8 = "model: m\nquantize: {backend: int8}\noutput: out\n"


def gptq(line: str) -> str:
    """The recipe with one more line, line 4, in `quantize`."""
    return GPTQ.replace("backend: gptq\n", f"backend: gptq\n  {line}\n")


def calibration(line: str) -> str:
    """The recipe with `line` in place of the calibration's data, in line 5."""
    return GPTQ.replace("data: c.txt", line)


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, "r.yaml")
    message = str(caught.value)
    assert message.isprintable()
    return message


# --- shipped recipes --------------------------------------------------------------------------------------------------


def test_shipped_recipes_are_complete():
    names = {str(path.relative_to(ROOT / "recipes")) for path in RECIPES}
    backends = ("int8", "nf4", "gptq-4bit", "gptq-3bit")
    families = ("tiny-opt", "tiny-gpt-neox", "tiny-gpt-bigcode")
    demo = {f"demo/{family}-{backend}.yaml" for family in families for backend in ("int8", "nf4", "gptq")}
    assert names == {f"{model}/{backend}.yaml" for model in MODELS for backend in backends} | demo


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_recipe(path):
    recipe = load_recipe(path)
    text = path.read_text()
    name = path.relative_to(ROOT)
    assert text.splitlines()[0].endswith(f":  qlm quantize {name}")
    assert len(text.splitlines()) <= 25
    folder = path.parent.name
    assert recipe.output == f"out/{path.stem if folder == 'demo' else f'{folder}-{path.stem}'}"
    backend, _, bits = path.stem.removeprefix("tiny-opt-").rpartition("-")[2].partition("bit")
    assert recipe.quantize.backend == {"3": "gptq", "4": "gptq"}.get(backend, backend), bits
    assert recipe.evaluate is not None
    if folder == "demo":
        text_of_family = "python.txt" if "bigcode" in path.stem else "english.txt"
        assert recipe.model == f"evals/checkpoints/{path.stem.rpartition('-')[0]}"
        assert recipe.evaluate.data == f"evals/texts/{text_of_family}"
        if recipe.calibration is not None:
            assert recipe.calibration.data == f"calibration_data/{text_of_family}"
            assert (recipe.calibration.samples, recipe.calibration.length) == (64, 512)
    else:
        assert folder in recipe.model.replace("gpt_bigcode-", "")
        assert isinstance(recipe.evaluate.data, HubDataset)
        if recipe.quantize.backend == "gptq":
            assert recipe.quantize.bits == int(path.stem[5])
    # Flat and complete: what is written differs from the default, but for the bits that the file's name promises.
    shorter = "\n".join(line for line in text.splitlines() if line.strip() != "bits: 4")
    for number, line in enumerate(shorter.splitlines()):
        rest = "\n".join(shorter.splitlines()[:number] + shorter.splitlines()[number + 1 :])
        if line.lstrip().startswith("#"):
            continue
        try:
            without = parse_recipe(rest, "r.yaml")
        except UsageError:
            continue
        assert resolved(without) != resolved(recipe), f"{line!r} restates a default"


def test_shipped_outputs_differ():
    refuse_shared_outputs({str(path): load_recipe(path) for path in RECIPES})


# --- the README and the schema ----------------------------------------------------------------------------------------

README = (ROOT / "recipes" / "README.md").read_text()


def test_readme_has_the_schema_table():
    shown = README.partition("<!-- schema -->\n")[2].partition("<!-- /schema -->")[0]
    assert shown == schema_table(), "recipes/README.md: put the output of qlm.recipe.schema_table() between the markers"


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.S))
def test_readme_example(block):
    parse_any_recipe(block, "README.md")


def test_readme_error_is_the_real_one():
    shown = next(line for line in README.splitlines() if line.startswith("my.yaml:5:3:"))
    actual = refusal("# \n" + gptq("group-size: 64")).replace("r.yaml", "my.yaml")
    start, end = shown.split("…")
    assert actual.startswith(start)
    assert actual.endswith(end)


def test_every_key_has_a_row_a_default_and_a_meaning():
    rows = {
        cells[0].strip("` "): cells for cells in (row.strip("|").split(" | ") for row in schema_table().splitlines())
    }
    for key, field in Recipe.model_fields.items():
        assert len(rows[key]) == 4
        assert rows[key][3].strip("| ")
        if field.is_required():
            assert rows[key][2] == "required"
    for key, field in QuantizeRecipe.model_fields.items():
        default = rows[f"quantize.{key}"][2]
        if field.is_required():
            assert default == "required"
        elif field.default_factory is not None and key not in ("skip", "overrides"):
            assert default == ("by quality" if key in PRESETS["fast"] else "by backend")
        else:
            assert default == f"`{json.dumps(field.get_default())}`"
    assert "calibration.data.split" in rows
    assert "quantize.overrides.<glob>.bits" in rows


def test_json_schema_allows_each_backend_its_keys_alone():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    section = schema["$defs"]["QuantizeRecipe"]
    for rule in section["allOf"]:
        backend = rule["if"]["properties"]["backend"]["const"]
        refused = {key for key, value in rule["then"]["properties"].items() if value is False}
        assert refused == set(section["properties"]) - {"backend", *TAKES[backend]}
    json.dumps(schema)
    schema["$defs"].clear()
    assert json_schema()["$defs"], "each call gives a fresh copy"


def test_recipe_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, qlm.recipe; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- accepted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("damp: 1e-4", "damp", 1e-4),
        ("damp: 1.E-4", "damp", 1e-4),
        ("damp: .5", "damp", 0.5),
        ("damp: 1", "damp", 1.0),
        ("symmetric: false", "symmetric", False),
        ("symmetric: TRUE", "symmetric", True),
        ("skip: [no, on, y, 1:30, 1_000, 2024-01-01, =, 0b11, -0x1, 1e, '08', 'true', 0o8]", "skip",
         ["no", "on", "y", "1:30", "1_000", "2024-01-01", "=", "0b11", "-0x1", "1e", "08", "true", "0o8"]),
        ("group_size: -1", "group_size", -1),
        ("group_size: 0x40", "group_size", 64),
        ("bits: 0o10", "bits", 8),
        ("bits: +3", "bits", 3),
    ],
)  # fmt: skip
def test_yaml_1_2_values(line, key, value):
    found = getattr(parse_recipe(gptq(line), "r.yaml").quantize, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + GPTQ,
        GPTQ.replace("\n", "\r\n"),
        "---\n" + GPTQ,
        "%YAML 1.2\n---\n" + GPTQ + "...\n",
        "# comment\n\n" + GPTQ,
        '{"model": "m", "quantize": {"backend": "gptq"}, "calibration": {"data": "c.txt"}, "output": "out"}',
        GPTQ + "revision: null\nevaluate: ~\n",
    ],
)
def test_same_recipe_in_other_clothes(text):
    assert resolved(parse_recipe(text, "r.yaml")) == resolved(parse_recipe(GPTQ, "r.yaml"))


def test_defaults():
    assert resolved(parse_recipe(GPTQ, "r.yaml")) == {
        "model": "m",
        "revision": None,
        "task": "causal-lm",
        "dtype": "auto",
        "attn_implementation": "sdpa",
        "quantize": {
            "backend": "gptq", "quality": "balanced", "bits": 4, "group_size": 128, "symmetric": True, "damp": 0.01,
            "order": "gar", "scale_search": "weighted", "target_shift": "auto", "sweeps": 2, "bias_correction": True,
            "rounding_steps": 0, "tune_steps": 0, "ignore_first": False, "skip": [], "on_failure": "error", "overrides": {},
            "reader": "gptqmodel",
        },
        "calibration": {"data": "c.txt", "samples": 128, "length": None, "seed": 0},
        "evaluate": None,
        "output": "out",
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_quality_follows_the_calibration_text(backend):
    """Balanced by default; fast where there is no text to look at, which the resolved recipe says."""
    plain = INT8.replace("int8", backend)
    for text, quality in ((plain, "fast"), (f"{plain}calibration: {{data: c.txt}}\n", "balanced")):
        recipe = parse_recipe(text, "r.yaml")
        assert resolved(recipe)["quantize"]["quality"] == quality
        assert recipe.quantize.needs_calibration == (quality == "balanced")
        for key, value in PRESETS[quality].items():
            if key in TAKES[backend]:
                assert getattr(recipe.quantize, key) == value


def test_a_key_beats_its_quality():
    section = quantize_section({"backend": "gptq", "quality": "best", "sweeps": 1, "target_shift": 0.5})
    assert (section.sweeps, section.target_shift, section.bias_correction) == (
        1,
        0.5,
        PRESETS["best"]["bias_correction"],
    )


@pytest.mark.parametrize("backend", ["int8", "nf4", "gptq", "quanto"])
def test_resolved_reads_back_as_itself(backend):
    text = GPTQ if backend == "gptq" else INT8.replace("int8", backend)
    plain = resolved(parse_recipe(text, "r.yaml"))
    assert set(plain["quantize"]) == {"backend", *TAKES[backend]} - {"average_bits", "target_size"}
    assert resolved(parse_recipe(json.dumps(plain), "r.json")) == plain


@pytest.mark.parametrize("line", ["average_bits: 3.5", "target_size: 600MB", "target_size: 600"])
def test_a_budget_takes_the_place_of_bits_and_group_size(line):
    recipe = parse_recipe(gptq(line), "r.yaml")
    key, _, value = line.partition(": ")
    assert recipe.quantize.budget_key == key
    plain = resolved(recipe)
    assert str(plain["quantize"][key]) == value
    assert not {"bits", "group_size"} & plain["quantize"].keys()
    assert resolved(parse_recipe(json.dumps(plain), "r.json")) == plain
    assert parse_recipe(GPTQ, "r.yaml").quantize.budget_key is None


@pytest.mark.parametrize(
    ("size", "expected"),
    [(600, 600), ("7B", 7), ("600MB", 600_000_000), ("600 MB", 600_000_000), ("1.5GB", 1_500_000_000), ("0.5kB", 500), ("2KB", 2000),
     ("3MiB", 3 << 20), ("1.5GiB", 3 << 29), ("2KiB", 2048), ("1TB", 10**12), ("0.001TiB", 1_099_511_627)],
)  # fmt: skip
def test_size_in_bytes(size, expected):
    section = quantize_section({"backend": "gptq", "target_size": size}, True)
    assert size_in_bytes(section.target_size) == expected


def test_hub_dataset():
    text = calibration("data: {name: allenai/c4, split: train, data_files: [a, b]}\n  samples: 3")
    section = parse_recipe(text, "r.yaml").calibration
    assert section is not None
    assert section.samples == 3
    assert section.data == HubDataset(name="allenai/c4", split="train", data_files=["a", "b"])
    assert resolved(parse_recipe(text, "r"))["calibration"]["data"] == {
        "name": "allenai/c4", "config": None, "split": "train", "column": "text", "revision": None,
        "data_files": ["a", "b"],
    }  # fmt: skip


def test_json_escapes_of_large_characters():
    assert parse_recipe(INT8.replace("model: m", 'model: "\\ud83d\\ude00"'), "r.json").model == "😀"


def test_jsonl_column():
    section = parse_recipe(calibration("data: c.jsonl\n  column: code"), "r.yaml").calibration
    assert section is not None
    assert section.column == "code"
    assert section.is_jsonl


def test_recipes_are_frozen():
    recipe = parse_recipe(GPTQ, "r.yaml")
    with pytest.raises(ValidationError):
        recipe.model = "n"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings_for(recipe.quantize, "a").bits = 3


# --- refused: the exact line ------------------------------------------------------------------------------------------

ROOT_KEYS = "model, revision, task, dtype, attn_implementation, quantize, calibration, evaluate, output"
# What a message lists; the order and the wording of lists have tests of their own.
GPTQ_KEYS = ", ".join(("backend", *TAKES["gptq"]))
GPTQTAKES = f"{', '.join(TAKES['gptq'][:-1])} and {TAKES['gptq'][-1]}"
INT8_KEYS = ", ".join(TAKES["int8"])
INT8TAKES = f"{', '.join(TAKES['int8'][:-1])} and {TAKES['int8'][-1]}"
SECTION_KEYS = f"{', '.join(list(QuantizeRecipe.model_fields)[:-1])} and reader"
A_RECIPE = "allowed: a recipe, with model, quantize and output"

A_SIZE = "allowed: bytes as a whole number, or a number with B, kB, KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 600MB"

REFUSED = {
    # budgets
    "two-budgets": (
        gptq("average_bits: 3.5\n  target_size: 1GB"), "5:3: quantize.target_size: found beside average_bits, which says the "
        "same in another way; remove one of the two",
    ),
    "budget-and-bits": (
        gptq("average_bits: 3.5\n  bits: 3"), "5:3: quantize.bits: found beside average_bits, which chooses it for each linear; "
        "remove one of the two, or name the linears in overrides",
    ),
    "budget-and-group-size": (
        gptq("group_size: 128\n  target_size: 1GB"), "4:3: quantize.group_size: found beside target_size, which chooses it for each "
        "linear; remove one of the two, or name the linears in overrides",
    ),
    "budget-and-task": (
        gptq("average_bits: 3.5") + "task: base\n", "8:1: task: found base beside quantize.average_bits; bits are chosen by what a "
        "causal-lm predicts",
    ),
    "budget-of-int8": (
        INT8.replace("int8}", "int8, average_bits: 7.5}"), "2:27: quantize.average_bits: found with backend int8, which takes "
        f"{INT8TAKES}; remove it",
    ),
    "few-bits": (gptq("average_bits: 2"), "4:17: quantize.average_bits: found the number 2; allowed: a number above 2, at most 9 "
        "or null"),
    "unit-case": (gptq("target_size: 600mb"), f"4:16: quantize.target_size: found the text '600mb'; {A_SIZE}; did you mean 600MB?"),
    "unit-unknown": (gptq("target_size: 6 stone"), f"4:16: quantize.target_size: found the text '6 stone'; {A_SIZE}"),
    "unit-missing": (gptq("target_size: '600'"), f"4:16: quantize.target_size: found the text '600'; {A_SIZE}"),
    "comma": (gptq("target_size: 1,5GB"), f"4:16: quantize.target_size: found the text '1,5GB'; {A_SIZE}"),
    "size-nothing": (gptq("target_size: 0MB"), f"4:16: quantize.target_size: found the text '0MB'; {A_SIZE}"),
    "size-fraction": (
        gptq("target_size: 600.5"), "4:16: quantize.target_size: found the number 600.5; allowed: a text, a whole number from 1 to "
        "1000000000000000 or null",
    ),
    "size-negative": (
        gptq("target_size: -5"), "4:16: quantize.target_size: found the number -5; allowed: a text, a whole number from 1 to "
        "1000000000000000 or null",
    ),
    # keys
    "misspelt-root": (GPTQ + "outptu: x\n", f"7:1: outptu: unknown key; allowed: {ROOT_KEYS}; did you mean output?"),
    "capital": (GPTQ + "Revision: x\n", f"7:1: Revision: unknown key; allowed: {ROOT_KEYS}; did you mean revision?"),
    "unrelated": (GPTQ + "zzz: x\n", f"7:1: zzz: unknown key; allowed: {ROOT_KEYS}"),
    "misplaced-down": (GPTQ + "bits: 3\n", f"7:1: bits: unknown key; allowed: {ROOT_KEYS}; "
        "did you mean quantize.bits?"),
    "misplaced-up": (
        gptq("output: x"), f"4:3: quantize.output: unknown key; allowed: {GPTQ_KEYS}; "
        "did you mean output at the top level?",
    ),
    "dash": (
        gptq("group-size: 64"), f"4:3: quantize.group-size: unknown key; allowed: {GPTQ_KEYS}; "
        "did you mean group_size?",
    ),
    "in-override": (
        gptq("overrides: {'*.fc2': {bit: 8}}"),
        "4:25: quantize.overrides['*.fc2'].bit: unknown key; allowed: bits, group_size, symmetric, skip; "
        "did you mean bits?",
    ),
    "in-data": (
        calibration("data: {name: x, splt: train}"),
        "5:19: calibration.data.splt: unknown key; allowed: name, config, split, column, revision, data_files; "
        "did you mean split?",
    ),
    "missing-root": ("model: m\nquantize: {backend: int8}\n", "1:1: output: missing; allowed: a text"),
    "missing-backend": (
        "model: m\nquantize: {bits: 4}\noutput: o\n", "2:11: quantize.backend: missing; allowed: int8, nf4, "
        "gptq or quanto",
    ),
    "missing-split": (calibration("data: {name: x}"), "5:9: calibration.data.split: missing; allowed: a text"),
    "duplicate": (GPTQ + "model: n\n", "7:1: model: found a second time, first in line 1; allowed: once"),
    "duplicate-nested": (
        gptq("bits: 3\n  bits: 4"), "5:3: quantize.bits: found a second time, first in line 4; allowed: once",
    ),
    "duplicate-glob": (
        gptq("overrides: {a: {bits: 3}, 'a': {bits: 4}}"),
        "4:29: quantize.overrides.a: found a second time, first in line 4; allowed: once",
    ),
    "number-key": ("1: b\n", "1:1: found the number 1 as a key; allowed: text (put it in quotes)"),
    "list-key": ("? [a]\n: b\n", "1:3: found a list or a mapping as a key; allowed: text"),
    "no-key": (": b\n", "1:1: found a value without a key; allowed: key: value"),
    "no-value": (GPTQ + "revision:\n", "7:1: revision: found no value; write one, or remove the key"),
    "no-section": (GPTQ + "evaluate:\n", "7:1: evaluate: found no value; write one, or remove the key"),
    "no-item": (gptq("skip:\n  -"), "5:4: quantize.skip[0]: found no value; write one, or remove the key"),
    "merge": (
        "<<: {model: m}\nquantize: {backend: int8}\noutput: o\n", f"1:1: ['<<']: unknown key; allowed: {ROOT_KEYS}",
    ),
    # values
    "misspelt-value": (
        GPTQ.replace("gptq", "gtpq"), "3:12: quantize.backend: found the text 'gtpq'; allowed: int8, nf4, "
        "gptq or quanto; "
        "did you mean gptq?",
    ),
    "capital-value": (
        GPTQ.replace("gptq", "GPTQ"), "3:12: quantize.backend: found the text 'GPTQ'; allowed: int8, nf4, "
        "gptq or quanto; "
        "did you mean gptq?",
    ),
    "quoted-number": (
        gptq("bits: '4'"), "4:9: quantize.bits: found the text '4'; allowed: 2, 3, 4 or 8; did you mean 4, "
        "without quotes?",
    ),
    "quoted-exponent": (
        gptq("damp: '1e-4'"), "4:9: quantize.damp: found the text '1e-4'; allowed: a number above 0, at most 1; "
        "did you mean 1e-4, without quotes?",
    ),
    "bad-bits": (gptq("bits: 5"), "4:9: quantize.bits: found the number 5; allowed: 2, 3, 4 or 8"),
    "float-bits": (gptq("bits: 4.0"), "4:9: quantize.bits: found the number 4.0; allowed: a whole number"),
    "bool-bits": (gptq("bits: true"), "4:9: quantize.bits: found true; allowed: 2, 3, 4 or 8"),
    "null-bits": (gptq("bits: null"), "4:9: quantize.bits: found null; allowed: 2, 3, 4 or 8"),
    "underscore": (
        calibration("data: c.txt\n  samples: 1_000"),
        "6:12: calibration.samples: found the text '1_000'; allowed: a whole number from 1 to 1000000; "
        "did you mean 1000?",
    ),
    "sexagesimal": (
        calibration("data: c.txt\n  seed: 1:30"),
        "6:9: calibration.seed: found the text '1:30'; allowed: a whole number from 0 to 4294967295",
    ),
    "octal-1.1": (
        calibration("data: c.txt\n  seed: 010"),
        "6:9: calibration.seed: found '010', which is octal in YAML 1.1 and decimal in 1.2; "
        "allowed: no leading zero, or 0o before octal",
    ),
    "yaml-1.1-bool": (
        gptq("symmetric: no"), "4:14: quantize.symmetric: found the text 'no'; allowed: true or false; "
        "did you mean false?",
    ),
    "number-bool": (gptq("symmetric: 1"), "4:14: quantize.symmetric: found the number 1; allowed: true or false"),
    "nan": (gptq("damp: .nan"), "4:9: quantize.damp: found '.nan'; allowed: finite numbers"),
    "inf": (gptq("damp: -.inf"), "4:9: quantize.damp: found '-.inf'; allowed: finite numbers"),
    "overflow": (gptq("damp: 1e999"), "4:9: quantize.damp: found '1e999'; allowed: finite numbers"),
    "zero-damp": (gptq("damp: 0.0"), "4:9: quantize.damp: found the number 0.0; allowed: a number above 0, at most 1"),
    "out-of-range": (
        calibration("data: c.txt\n  samples: 0"),
        "6:12: calibration.samples: found the number 0; allowed: a whole number from 1 to 1000000",
    ),
    "63-bits": (
        calibration("data: c.txt\n  seed: 9223372036854775808"),
        "6:9: calibration.seed: found the number '9223372036854775808'; allowed: whole numbers of at most 63 bits",
    ),
    "5000-digits": (
        calibration("data: c.txt\n  seed: " + "1" * 5000),
        f"6:9: calibration.seed: found the number '{'1' * 60}…' (5000 characters); "
        "allowed: whole numbers of at most 63 bits",
    ),
    "number-for-text": (
        GPTQ + "revision: 1e10\n",
        "7:11: revision: found the number 1e10; allowed: a text or null; put it in quotes if it is meant as text",
    ),
    "null-for-text": (
        INT8.replace("model: m", "model: null"),
        "1:8: model: found null; allowed: a text; put it in quotes if it is meant as text",
    ),
    "text-for-section": (
        "model: m\nquantize: gptq\noutput: o\n",
        f"2:11: quantize: found the text 'gptq'; allowed: a section with {SECTION_KEYS}",
    ),
    "text-for-list": (gptq("skip: a"), "4:9: quantize.skip: found the text 'a'; allowed: a list of texts"),
    "number-in-list": (
        gptq("skip: [a, 1]"),
        "4:13: quantize.skip[1]: found the number 1; allowed: a text; put it in quotes if it is meant as text",
    ),
    "list-for-mapping": (
        gptq("overrides: [a]"),
        "4:14: quantize.overrides: found a list of 1; allowed: a mapping from text to a section with bits, group_size, "
        "symmetric and skip",
    ),
    "list-for-text": (INT8.replace("model: m", "model: [m]"), "1:8: model: found a list of 1; allowed: a text"),
    "number-for-data": (
        calibration("data: 3"),
        "5:9: calibration.data: found the number 3; allowed: a text or a section with name, config, split, "
        "column, revision "
        "and data_files; put it in quotes if it is meant as text",
    ),
    "no-files": (
        calibration("data: {name: x, split: a, data_files: []}"),
        "5:41: calibration.data.data_files: found a list of 0; allowed: a text, a list of one or more texts or null",
    ),
    "empty-text": (
        INT8.replace("model: m", "model: ''"), "1:8: model: found the text ''; allowed: a text of 1 to 4096 characters",
    ),
    "empty-glob": (gptq("skip: ['']"), "4:10: quantize.skip[0]: found the text ''; "
        "allowed: a text of 1 to 256 characters"),
    "empty-glob-key": (
        gptq("overrides: {'': {bits: 8}}"),
        "4:15: quantize.overrides['']: found the text '' as a key; allowed: a text of 1 to 256 characters",
    ),
    "many": (
        gptq("skip: [" + "a, " * 1001 + "]"), "4:9: quantize.skip: found 1001 entries; allowed: at most 1000",
    ),
    "control": (
        INT8.replace("model: m", 'model: "a\\nb"'),
        "1:8: model: found the text 'a\\nb' with an unprintable character; allowed: printable characters",
    ),
    "space": (
        INT8.replace("model: m", "model: ' m'"),
        "1:8: model: found the text ' m'; allowed: the same without the space around it",
    ),
    "surrogate": (
        INT8.replace("model: m", 'model: "\\ud800"'),
        "1:8: model: found half a surrogate pair in the text '\\ud800'; allowed: whole characters",
    ),
    "home": (
        INT8.replace("output: out", "output: ~/x"),
        "3:9: output: found the text '~/x'; '~' is not expanded here: write the path without it",
    ),
    # what does not fit together
    "not-for-int8": (
        INT8.replace("int8", "int8, group_size: 128"),
        f"2:27: quantize.group_size: found with backend int8, which takes {INT8TAKES}; remove it",
    ),
    "not-for-gptq": (
        gptq("double_quant: true"),
        f"4:3: quantize.double_quant: found with backend gptq, which takes {GPTQTAKES}; remove it",
    ),
    "unknown-for-int8": (
        INT8.replace("int8", "int8, bit: 8"),
        f"2:27: quantize.bit: unknown key; allowed: backend, {INT8_KEYS}; did you mean bits?",
    ),
    "int8-bits": (
        INT8.replace("int8", "int8, bits: 4"), "2:27: quantize.bits: found 4 with backend int8; allowed: 8",
    ),
    "quanto-bits": (
        INT8.replace("int8", "quanto, bits: 4"),
        "2:29: quantize.bits: found with backend quanto, which takes qtype and skip; remove it",
    ),
    "no-calibration": (
        "model: m\nquantize: {backend: gptq}\noutput: o\n",
        "2:1: calibration: missing; backend gptq needs a section with data",
    ),
    "useless-calibration": (
        GPTQ.replace("gptq", "nf4\n  quality: fast"),
        "5:1: calibration: found with backend nf4, which looks at no text with quality fast; remove it",
    ),
    "calibration-for-sweeps": (
        INT8.replace("int8", "int8, sweeps: 1"),
        "2:1: calibration: missing; backend int8 needs a section with data; 'quality: fast' alone looks at no text",
    ),
    "strength": (
        GPTQ.replace("gptq", "gptq\n  target_shift: 2"),
        "4:17: quantize.target_shift: found the number 2; allowed: a number from 0 to 1 or auto",
    ),
    "strength-in-words": (
        GPTQ.replace("gptq", "gptq\n  target_shift: atuo"),
        "4:17: quantize.target_shift: found the text 'atuo'; allowed: a number from 0 to 1 or auto; did you mean auto?",
    ),
    "useless-column": (
        calibration("data: c.txt\n  column: x"),
        "6:3: calibration.column: found with data that is no .jsonl file; remove it",
    ),
    "outer-column": (
        calibration("data: {name: x, split: a}\n  column: x"),
        "6:3: calibration.column: found with data that is no .jsonl file; write it inside data",
    ),
    "empty-override": (
        gptq("overrides: {a: {}}"),
        "4:18: quantize.overrides.a: found an override that changes nothing; "
        "allowed: at least one of bits, group_size, symmetric or skip",
    ),
    "skip-and-bits": (
        gptq("overrides: {a: {skip: true, bits: 8}}"),
        "4:31: quantize.overrides.a.bits: found beside 'skip: true', where it has no effect; remove one of the two",
    ),
    "skip-and-override": (
        gptq("skip: [a]\n  overrides: {a: {bits: 8}}"),
        "5:3: quantize.overrides: found 'a' here and in skip, which wins; remove one of the two",
    ),
    "task-without-perplexity": (
        INT8 + "task: base\nevaluate: {data: e.txt}\n",
        "5:1: evaluate: found with task base; only causal-lm has a perplexity: remove it",
    ),
    "output-is-model": (
        INT8.replace("output: out", "output: ./m/"),
        "3:1: output: found './m/', which holds model 'm'; allowed: a folder of its own",
    ),
    "output-holds-data": (
        GPTQ.replace("c.txt", "d/../out/c.txt"),
        "6:1: output: found 'out', which holds calibration.data 'd/../out/c.txt'; allowed: a folder of its own",
    ),
    # YAML
    "empty": ("", f"1:1: found an empty file; {A_RECIPE}"),
    "comments": ("# nothing\n", f"1:1: found an empty file; {A_RECIPE}"),
    "only-start": ("---\n", f"2:1: found an empty file; {A_RECIPE}"),
    "scalar": ("a\n", f"1:1: found the text 'a'; {A_RECIPE}"),
    "list": ("- a\n", f"1:1: found a list of 1; {A_RECIPE}"),
    "alias": (
        gptq("skip: [*x]"),
        "4:10: quantize.skip[0]: found the alias '*x'; allowed: the value (a text that begins with * needs quotes)",
    ),
    "unquoted-glob": (
        gptq("overrides: {*.fc2: {bits: 8}}"),
        "4:15: quantize.overrides: found the alias '*.fc2:'; "
        "allowed: the value (a text that begins with * needs quotes)",
    ),
    "unquoted-star": (
        gptq("skip: [*]"),
        "4:11: found what is not YAML: expected alphabetic or numeric character, but found ']'; "
        "put a text that begins with * in quotes",
    ),
    "anchor": (GPTQ + "revision: &a x\n", "7:11: revision: found the anchor '&a'; allowed: the value alone"),
    "anchor-on-section": ("&a\n" + GPTQ, "1:1: found the anchor '&a'; allowed: the value alone"),
    "self-reference": ("a: &a [*a]\n", "1:4: a: found the anchor '&a'; allowed: the value alone"),
    "tag": (GPTQ + "revision: !!str 3\n", "7:11: revision: found the tag '!!str'; allowed: the value alone"),
    "plain-tag": (GPTQ + "revision: ! 3\n", "7:11: revision: found the tag '!'; allowed: the value alone"),
    "python-tag": (
        "!!python/object/apply:os.system [id]\n",
        "1:1: found the tag '!!python/object/apply:os.system'; allowed: the value alone",
    ),
    "two-documents": (GPTQ + "---\n" + GPTQ, "7:1: found a second document; allowed: one recipe a file"),
    "directive-1.1": ("%YAML 1.1\n---\n" + GPTQ, "2:1: found a YAML directive; allowed: none but %YAML 1.2"),
    "directive-tag": ("%TAG ! x\n---\n" + GPTQ, "2:1: found a YAML directive; allowed: none but %YAML 1.2"),
    "tab": (
        "model: m\nquantize:\n\tbackend: int8\n",
        "3:1: found what is not YAML: found character '\\t' that cannot start any token; indent with spaces",
    ),
    "open-quote": (
        INT8.replace("model: m", "model: 'm"),
        "1:8: found what is not YAML: while scanning a quoted scalar, found unexpected end of stream",
    ),
    "two-colons": ("a: b: c\n", "1:5: found what is not YAML: mapping values are not allowed here"),
    "bare-error-of-the-scanner": (
        'model: "\\UFFFFFFFF"\n', "1:1: found what is not YAML, here or soon after; allowed: a recipe in YAML",
    ),
    "nul": (GPTQ + "a: \0\n", "7:4: found the character U+0000; allowed: a recipe, printable text in YAML"),
    "escape": (GPTQ + "a: \x1b[2J\n", "7:4: found the character U+001B; allowed: a recipe, printable text in YAML"),
    "line-separator": (GPTQ + "#\u2028x\n", "7:2: found the character U+2028; allowed: a recipe, "
        "printable text in YAML"),
    "depth": ("[" * 1000, "1:17: [0][0][0][0][0][0]…: found nesting deeper than 16; allowed: at most that"),
    "depth-mapping": ("{a: " * 1000, "1:65: a.a.a.a.a.a…: found nesting deeper than 16; allowed: at most that"),
    "depth-blocks": ("- " * 1000, "1:33: [0][0][0][0][0][0]…: found nesting deeper than 16; allowed: at most that"),
    "size": ("#" * (MAX_BYTES + 1), f"1:1: found more than {MAX_BYTES} bytes; allowed: a recipe of at most that"),
    "size-in-bytes": ("#" + "ü" * (MAX_BYTES // 2), f"1:1: found more than {MAX_BYTES} bytes; "
        "allowed: a recipe of at most that"),
    "values": ("- a\n" * 10_001, "10000:3: [9999]: found more than 10000 values; allowed: at most that many"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_place_and_advice(name):
    text, expected = REFUSED[name]
    assert refusal(text) == f"r.yaml:{expected}"


def test_first_error_of_several():
    assert refusal(gptq("bits: 5\n  damp: 2").replace("model: m", "mdoel: m")).startswith(
        "r.yaml:1:1: mdoel: unknown key"
    )


def test_union_tags_of_the_validator_are_no_keys():
    assert refusal(calibration("data: {<hub>: {<hub>: {<file>: x}}}")).startswith(
        "r.yaml:5:10: calibration.data['<hub>']: unknown key"
    )
    assert refusal(gptq("overrides: {'[key]': {'[key]': 3}}")).startswith(
        "r.yaml:4:25: quantize.overrides['[key]']['[key]']: unknown key"
    )


# --- files ------------------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    (tmp_path / "int8.yaml").write_text(INT8)
    with pytest.raises(MissingInput, match=r"in8\.yaml: no such recipe; did you mean .*/int8\.yaml\?$"):
        load_recipe(tmp_path / "in8.yaml")
    with pytest.raises(MissingInput, match=r"int8\.yaml/x: no such recipe$"):
        load_recipe(tmp_path / "int8.yaml" / "x")
    with pytest.raises(MissingInput, match="no such recipe; a file name holds no NUL character"):
        load_recipe("a\0b")


def test_file_that_is_no_recipe(tmp_path):
    with pytest.raises(UsageError, match=": found a folder; allowed: a recipe, a YAML file"):
        load_recipe(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match=": found not a regular file; allowed"):
        load_recipe(pipe)
    file = tmp_path / "r.yaml"
    file.write_bytes(b"model: m\nquantize: \x89PNG")
    with pytest.raises(UsageError, match=r"r\.yaml:2:11: found byte 0x89, which is not UTF-8; allowed: a recipe"):
        load_recipe(file)
    file.write_text(INT8, encoding="utf-16")
    with pytest.raises(UsageError, match=r"r\.yaml:1:1: found byte 0xff, which is not UTF-8"):
        load_recipe(file)
    file.write_bytes(b"#" * 300_000)
    with pytest.raises(UsageError, match=r"r\.yaml:1:1: found 300000 bytes; allowed: a recipe of at most 262144"):
        load_recipe(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(INT8)
    file.chmod(0)
    with pytest.raises(UsageError, match=r"r\.yaml: may not be read"):
        load_recipe(file)


def test_unreadable_file_by_the_error_of_open(tmp_path, monkeypatch):
    file = tmp_path / "r.yaml"
    file.write_text(INT8)

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UsageError, match=r"r\.yaml: may not be read; change its permissions"):
        load_recipe(file)


def test_file_name_cannot_write_to_the_terminal(tmp_path):
    with pytest.raises(MissingInput) as caught:
        load_recipe(tmp_path / "\x1b[2J\n.yaml")
    assert str(caught.value).isprintable()


# --- settings of one linear -------------------------------------------------------------------------------------------


def section(**keys) -> QuantizeRecipe:
    return quantize_section({"backend": "gptq", **keys})


def test_settings_without_overrides():
    assert settings_for(section(), "decoder.layers.0.fc1") == LinearSettings(
        backend="gptq", bits=4, group_size=128, symmetric=True, input_16bit=False, double_quant=False, damp=0.01, order="gar",
        scale_search="weighted", smooth=False, target_shift="auto", compensate=False, sweeps=2, bias_correction=True,
        rounding_steps=0, tune_steps=0, qtype="qint8", on_failure="error",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "bits", "group_size"),
    [
        ({"backend": "int8"}, 8, -1),
        ({"backend": "nf4"}, 4, 64),
        ({"backend": "quanto"}, 8, -1),
        ({"backend": "quanto", "qtype": "qint4"}, 4, 128),
        ({"backend": "quanto", "qtype": "qfloat8"}, 8, -1),
        ({"backend": "gptq", "bits": 3, "group_size": -1}, 3, -1),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_settings_by_backend(keys, bits, group_size):
    linear = settings_for(quantize_section(keys), "a")
    assert linear is not None
    assert (linear.bits, linear.group_size) == (bits, group_size)


def test_overrides_apply_from_top_to_bottom():
    quantize = section(
        bits=3,
        skip=["*.0.*"],
        overrides={
            "*.fc2": {"bits": 4},
            "layers.1.*": {"bits": 8, "symmetric": False},
            "layers.2.fc2": {"group_size": 32},
            "layers.3.*": {"skip": True},
            "layers.3.fc1": {"skip": False},
            "layers.0.fc1": {"skip": False, "bits": 2},
        },
    )

    def found(name):
        linear = settings_for(quantize, name)
        return linear and (linear.bits, linear.group_size, linear.symmetric)

    assert found("layers.9.fc1") == (3, 128, True)
    assert found("layers.9.fc2") == (4, 128, True)
    assert found("layers.1.fc2") == (8, 128, False)
    assert found("layers.2.fc2") == (4, 32, True)
    assert found("layers.3.fc2") is None
    assert found("layers.3.fc1") == (3, 128, True)
    assert found("layers.0.fc2") is None
    assert found("layers.0.fc1") == (2, 128, True)


def test_globs_match_the_whole_path_and_its_case():
    quantize = section(skip=["fc1", "*.FC2", "layers.1", "layers.[34].*", "layers.?.x"])
    names = ["layers.0.fc1", "layers.0.fc2", "layers.1.fc1", "layers.10.x"]
    assert all(settings_for(quantize, name) for name in names)
    assert settings_for(quantize, "layers.3.fc1") is None
    assert settings_for(quantize, "layers.7.x") is None


def test_unmatched_globs():
    quantize = section(skip=["*.fc1", "*.fc9"], overrides={"decoder.*": {"bits": 8}, "encoder.*": {"bits": 8}})
    assert unmatched_globs(quantize, iter(["decoder.layers.0.fc1"])) == ["*.fc9", "encoder.*"]


def test_section_from_python():
    ready = section(bits=3)
    assert quantize_section(ready) is ready
    with pytest.raises(UsageError, match=r"^quantize\.bit: unknown key; allowed: .*; did you mean bits\?$"):
        quantize_section({"backend": "gptq", "bit": 3})
    with pytest.raises(UsageError, match=r"^quantize\.backend: missing; allowed: int8, nf4, gptq or quanto$"):
        quantize_section({})
    with pytest.raises(UsageError, match=r"^quantize: found the text 'gptq'; allowed: a section"):
        quantize_section("gptq")
    with pytest.raises(UsageError, match=r"^quantize\[3\]: unknown key"):
        quantize_section({"backend": "gptq", 3: 4})
    with pytest.raises(
        UsageError, match=r"^quantize\.damp: found the number nan; allowed: a number above 0, at most 1$"
    ):
        section(damp=float("nan"))


def test_two_recipes_for_one_output():
    first = parse_recipe(INT8, "a.yaml")
    for output in ("out", "./out/", "out/b", "x/../out"):
        second = parse_recipe(INT8.replace("output: out", f"output: {output}"), "b.yaml")
        with pytest.raises(
            UsageError, match=r"^b\.yaml: output: found '.*', and a\.yaml writes to 'out'; allowed: a folder"
        ):
            refuse_shared_outputs({"a.yaml": first, "b.yaml": second})
    refuse_shared_outputs(
        {"a.yaml": first, "b.yaml": parse_recipe(INT8.replace("output: out", "output: out2"), "b.yaml")}
    )


# --- damaged recipes --------------------------------------------------------------------------------------------------

TRAIN = """\
model: m
task: token-classification
adapter: {r: 8, targets: [q_proj, "*.fc2"]}
train:
  data: t.jsonl
  labels: [a, b]
  validation: 0.1
  steps: 3
  gradient_checkpointing: auto
output: out
"""
SEEDS = [
    GPTQ,
    INT8,
    TRAIN,
    *(path.read_text() for path in RECIPES[:12:4]),
    *re.findall(r"```yaml\n(.*?)```", README, re.S),
]
KEYS = [
    *Recipe.model_fields,
    *QuantizeRecipe.model_fields,
    *HubDataset.model_fields,
    *FinetuneRecipe.model_fields,
    *TrainRecipe.model_fields,
    "samples",
    "length",
    "seed",
    "windows",
]
SCRAPS = [
    *KEYS, "int8", "nf4", "gptq", "quanto", "*", "*.fc2", '"*.fc2"', "&a", "*a", "!!str", "!", "<<", "<hub>", "<file>",
    "[key]",
    "null", "~", "true", "no", "010", "0o10", "1e-4", "1e999", ".nan", "-.inf", "9" * 30, "9" * 5000, "1:30",
    "-1", "0", "4.0",
    "'", '"', '"\\UFFFFFFFF"', '"\\ud800"', '"\\x00"', "\t", "\n", "\r", "  ", ": ", "- ", "? ", "[", "]",
    "{", "}", ",", "#", "|\n", ">\n", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n",
    "\0", "\x1b", "\x85", "\u2028", "\ufeff", "\ud800", "ü", "😀",
]  # fmt: skip


def outcome(text: str) -> Recipe | FinetuneRecipe | str:
    """The recipe, or the error's text; any other exception ends the test."""
    try:
        return parse_any_recipe(text, "r.yaml")
    except UsageError as error:
        return str(error)


def check_accepted_or_one_line(text: str) -> None:
    found = outcome(text)
    if isinstance(found, str):
        place = re.match(r"r\.yaml:([1-9]\d*):[1-9]\d*: \S", found)
        assert place, found
        assert found.isprintable()
        assert int(place[1]) <= len(re.split(r"\r\n|\r|\n", text)) + 1
    elif isinstance(found, FinetuneRecipe):
        plain = resolved_finetune(found)
        assert resolved_finetune(parse_any_recipe(json.dumps(plain), "r.json")) == plain
    else:
        plain = resolved(found)
        assert resolved(parse_recipe(json.dumps(plain), "r.json")) == plain
        settings_for(found.quantize, "decoder.layers.0.fc1")


edits = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "delete", "repeat", "swap", "value"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 40),
        st.sampled_from(SCRAPS) | st.text(max_size=5),
    ),
    min_size=1,
    max_size=4,
)
fast = settings(
    max_examples=400, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@fast
@given(st.sampled_from(SEEDS), edits)
def test_damaged_recipe_is_accepted_or_refused_in_one_line(text, steps):
    for kind, place, length, scrap in steps:
        at = int(place * len(text))
        lines = text.splitlines(keepends=True) or [""]
        row = int(place * len(lines))
        if kind == "insert":
            text = text[:at] + scrap + text[at:]
        elif kind == "replace":
            text = text[:at] + scrap + text[at + length :]
        elif kind == "delete":
            text = text[:at] + text[at + length :]
        elif kind == "repeat":
            text = "".join(lines[: row + 1] + lines[row:])
        elif kind == "swap":
            text = "".join([*lines[:row], *lines[row + 1 :], *lines[row : row + 1]])
        else:
            key, colon, _ = lines[row].partition(":")
            text = "".join([*lines[:row], f"{key}{colon} {scrap}\n", *lines[row + 1 :]])
    check_accepted_or_one_line(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from([*KEYS, "gptq", "int8", "<hub>", "[key]", "train", "c.jsonl"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from([*KEYS, "<hub>", "<file>", "[key]", "*.fc2", ""]), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


@settings(fast, max_examples=150)
@given(
    st.fixed_dictionaries(
        {"model": st.just("m") | values, "output": st.just("o") | values},
        optional={
            "quantize": st.fixed_dictionaries(
                {"backend": st.sampled_from(["gptq", "int8", "nf4", "quanto"]) | values},
                optional={key: values for key in QuantizeRecipe.model_fields if key != "backend"},
            )
            | values,
            "train": st.fixed_dictionaries(
                {"data": st.just("d") | values},
                optional={key: values for key in TrainRecipe.model_fields if key != "data"},
            )
            | values,
            "adapter": st.dictionaries(st.sampled_from(["r", "alpha", "targets", "dropout"]), values) | values,
            "calibration": st.fixed_dictionaries({"data": values}, optional={"samples": values, "column": values})
            | values,
            "evaluate": st.fixed_dictionaries({"data": values}, optional={"windows": values, "column": values})
            | values,
            "task": values,
        },
    )
)
def test_any_structure_is_accepted_or_refused_in_one_line(data):
    check_accepted_or_one_line(json.dumps(data))
    if isinstance(data.get("quantize"), dict):
        with contextlib.suppress(UsageError):
            quantize_section(data["quantize"])


@fast
@given(st.text(max_size=60))
def test_any_text_is_refused_in_one_line(text):
    check_accepted_or_one_line(text)
