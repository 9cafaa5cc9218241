"""Fine-tuning recipes: every shipped one, what is refused and where, and how the two kinds are told apart."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from qlm.errors import MissingInput, UsageError
from qlm.recipe import (
    AdapterRecipe,
    CalibrationRecipe,
    FinetuneRecipe,
    HubDataset,
    Recipe,
    TrainRecipe,
    finetune_json_schema,
    finetune_schema_table,
    json_schema,
    load_any_recipe,
    load_finetune_recipe,
    load_recipe,
    parse_any_recipe,
    parse_finetune_recipe,
    parse_recipe,
    refuse_shared_outputs,
    resolved,
    resolved_finetune,
)

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "qlora").glob("*.yaml"))
MODELS = ["opt-1.3b", "pythia-1.4b", "santacoder", "starcoder", "tiny-gpt-bigcode", "tiny-gpt-neox", "tiny-opt"]

PLAIN = """\
model: m
train:
  data: t.txt
output: out
"""
HEAD = "model: m\ntask: sequence-classification\ntrain:\n  data: t.jsonl\noutput: out\n"
QUANTIZED = PLAIN.replace("train:", "quantize: {backend: nf4}\ntrain:")


def train(line: str) -> str:
    """The recipe with one more line, line 4, in `train`."""
    return PLAIN.replace("data: t.txt\n", f"data: t.txt\n  {line}\n")


def adapter(section: str) -> str:
    """The recipe with an adapter section, in line 2."""
    return PLAIN.replace("train:", f"adapter: {section}\ntrain:")


def repairing(quantize: str, calibration: str = "calibration: {data: c.txt}\n") -> str:
    """The recipe with `initialization: svd`, at 2:11, on a base of these keys."""
    section = f"quantize: {{backend: {quantize}}}\n{calibration}train:"
    return adapter("{initialization: svd}").replace("train:", section)


def read(text: str) -> FinetuneRecipe:
    return parse_finetune_recipe(text, "r.yaml")


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(text)
    message = str(caught.value)
    assert message.isprintable()
    return message


# --- shipped recipes --------------------------------------------------------------------------------------------------


def test_shipped_recipes_are_complete():
    assert [path.stem for path in RECIPES] == MODELS


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe(path):
    recipe = load_finetune_recipe(path)
    text = path.read_text()
    assert text.splitlines()[0].endswith(f":  qlm finetune {path.relative_to(ROOT)}")
    assert len(text.splitlines()) <= 30
    assert recipe.output == f"out/{path.stem}-qlora"
    assert recipe.base_output == f"out/{path.stem}-qlora-base"
    assert recipe.quantize.backend == "nf4"
    assert recipe.task == "causal-lm"
    assert recipe.train.validation is not None
    if path.stem.startswith("tiny-"):
        # A language that the checkpoint was not trained on.
        assert recipe.train.data == f"calibration_data/{'english' if 'bigcode' in path.stem else 'python'}.txt"
        assert recipe.model == f"evals/checkpoints/{path.stem}"
        assert (ROOT / recipe.model / "config.json").is_file()
        assert (ROOT / recipe.train.data).is_file()
    else:
        assert path.stem in recipe.model.replace("gpt_bigcode-", "")
        assert isinstance(recipe.train.data, HubDataset)
        assert isinstance(recipe.train.validation, HubDataset)
        assert recipe.train.data.split != recipe.train.validation.split
        assert recipe.train.batch_size * recipe.train.gradient_accumulation == 16
    # Complete and no more: each line that may be left out changes something.
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.lstrip().startswith("#"):
            continue
        try:
            without = read("\n".join(lines[:number] + lines[number + 1 :]))
        except UsageError:
            continue
        assert resolved_finetune(without) != resolved_finetune(recipe), f"{line!r} restates a default"


def test_shipped_outputs_differ():
    refuse_shared_outputs({str(path): load_any_recipe(path) for path in sorted((ROOT / "recipes").glob("*/*.yaml"))})


# --- accepted ---------------------------------------------------------------------------------------------------------


def test_defaults():
    assert resolved_finetune(read(PLAIN)) == {
        "model": "m",
        "revision": None,
        "task": "causal-lm",
        "attn_implementation": "sdpa",
        "quantize": None,
        "calibration": None,
        "adapter": {"r": 16, "alpha": 32, "dropout": 0.05, "targets": "all_linear", "initialization": "standard"},
        "train": {
            "data": "t.txt", "validation": None, "labels": None, "steps": None, "epochs": 1, "batch_size": 4,
            "gradient_accumulation": 4, "learning_rate": 2e-4, "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0,
            "max_gradient_norm": 1.0, "max_length": None, "too_long": "truncate", "packing": True,
            "gradient_checkpointing": "auto", "precision": "auto", "optimizer": "auto", "seed": 0, "save_every": 50,
            "tensorboard": False,
        },
        "output": "out",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("section", "alpha"), [("{r: 8}", 16), ("{r: 8, alpha: 4}", 4), ("{alpha: null}", 32), ("{r: 4096}", 8192)]
)
def test_alpha_is_twice_r(section, alpha):
    assert read(adapter(section)).adapter.alpha == alpha


def test_alpha_from_python():
    assert AdapterRecipe.model_validate({"r": 3, "alpha": None}).alpha == 6


@pytest.mark.parametrize(
    ("line", "steps", "epochs"),
    [("seed: 1", None, 1), ("steps: 7", 7, None), ("epochs: 3", None, 3), ("steps: null\n  epochs: null", None, 1)],
)
def test_one_measure_of_length(line, steps, epochs):
    found = read(train(line)).train
    assert (found.steps, found.epochs) == (steps, epochs)


@pytest.mark.parametrize(
    ("value", "share", "source"),
    [
        ("0.05", 0.05, None),
        ("v.txt", None, "v.txt"),
        ("v.jsonl", None, "v.jsonl"),
        ("{name: a/b, split: test}", None, HubDataset.model_validate({"name": "a/b", "split": "test"})),
        ("null", None, None),
    ],
)
def test_validation(value, share, source):
    found = read(train(f"validation: {value}")).train
    assert found.validation_share == share
    assert (found.validation_source.data if found.validation_source else None) == source


def test_validation_reads_the_same_column():
    found = read(PLAIN.replace("t.txt", "t.jsonl\n  column: code\n  validation: v.jsonl")).train
    assert (found.column, found.validation_source.column) == ("code", "code")
    assert "column" in resolved_finetune(read(PLAIN.replace("t.txt", "t.jsonl")))["train"]


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "question-answering"])
def test_heads_never_pack(task):
    text = HEAD.replace("sequence-classification", task)
    assert not read(text).train.packing
    assert not read(text.replace("t.jsonl", "t.jsonl\n  packing: false")).train.packing
    assert read(PLAIN.replace("t.txt", "t.jsonl")).train.packing


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        HEAD,
        QUANTIZED,
        train("validation: 0.1"),
        PLAIN.replace("t.txt", "t.jsonl\n  column: code\n  packing: true\n  steps: 3"),
        HEAD.replace("t.jsonl", "t.jsonl\n  labels: [a, b]\n  validation: v.jsonl"),
        adapter("{r: 4, targets: [q_proj, '*.fc2']}"),
        repairing("gptq, bits: 3, quality: fast"),
        PLAIN.replace("train:", "quantize: {backend: gptq, bits: 2}\ncalibration: {data: c.txt}\ntrain:"),
        *(path.read_text() for path in RECIPES),
    ],
)
def test_resolved_reads_back_as_itself(text):
    plain = resolved_finetune(read(text))
    assert resolved_finetune(parse_finetune_recipe(json.dumps(plain), "r.json")) == plain


def test_base_recipe():
    """The base is quantized by a recipe of the other kind, the same as a user would write."""
    assert read(PLAIN).base_recipe() is None
    assert read(PLAIN).outputs == ("out",)
    recipe = read(QUANTIZED)
    by_hand = parse_recipe("model: m\nquantize: {backend: nf4}\noutput: out-base\n", "q.yaml")
    assert resolved(recipe.base_recipe()) == resolved(by_hand)
    assert recipe.outputs == ("out", "out-base")
    assert read(QUANTIZED.replace("output: out", "output: out/")).base_output == "out-base"
    text = QUANTIZED.replace("backend: nf4}", "backend: gptq, bits: 3}\ncalibration: {data: c.txt, samples: 4}")
    base = read(text).base_recipe()
    assert (base.quantize.bits, base.calibration) == (3, CalibrationRecipe(data="c.txt", samples=4))


def test_recipes_are_frozen():
    with pytest.raises(ValidationError):
        read(PLAIN).train.steps = 3


# --- refused: the exact line ------------------------------------------------------------------------------------------

KEYS = ", ".join(FinetuneRecipe.model_fields)
SVD_ALLOWED = "allowed: quantize: {backend: gptq, bits: 3 or 2, quality: fast}, or standard"
REFUSED = {
    "both-lengths": (
        train("steps: 3\n  epochs: 2"),
        "5:3: train.epochs: found beside steps, which says the same in another way; remove one of the two",
    ),
    "no-steps": (train("steps: 0"), "4:10: train.steps: found the number 0; allowed: a whole number from 1 to 10000000 or null"),
    "alpha-zero": (adapter("{alpha: 0}"), "2:18: adapter.alpha: found the number 0; allowed: a whole number from 1 to 65536 or null"),
    "alpha-negative": (
        adapter("{r: 4, alpha: -8}"), "2:24: adapter.alpha: found the number -8; allowed: a whole number from 1 to 65536 or null",
    ),
    "r-zero": (adapter("{r: 0}"), "2:14: adapter.r: found the number 0; allowed: a whole number from 1 to 4096"),
    "r-too-large": (adapter("{r: 5000}"), "2:14: adapter.r: found the number 5000; allowed: a whole number from 1 to 4096"),
    "dropout-one": (adapter("{dropout: 1}"), "2:20: adapter.dropout: found the number 1; allowed: a number from 0, below 1"),
    "no-targets": (
        adapter("{targets: []}"), "2:20: adapter.targets: found a list of 0; allowed: all_linear or a list of one or more texts",
    ),
    "misspelt-targets": (
        adapter("{targets: all-linear}"),
        "2:20: adapter.targets: found the text 'all-linear'; allowed: all_linear or a list of one or more texts; did you mean all_linear?",
    ),
    "unknown-initialization": (
        adapter("{initialization: loftq}"), "2:27: adapter.initialization: found the text 'loftq'; allowed: standard or svd",
    ),
    "misspelt-key": (
        train("batchsize: 3"),
        f"4:3: train.batchsize: unknown key; allowed: {', '.join(TrainRecipe.model_fields)}; did you mean batch_size?",
    ),
    "key-of-another-section": (
        PLAIN + "learning_rate: 1e-4\n", f"5:1: learning_rate: unknown key; allowed: {KEYS}; did you mean train.learning_rate?",
    ),
    "key-of-the-other-kind": (PLAIN + "evaluate: {data: e.txt}\n", f"5:1: evaluate: unknown key; allowed: {KEYS}"),
    "gptq-without-text": (
        PLAIN.replace("train:", "quantize: {backend: gptq}\ntrain:"),
        "2:1: calibration: missing; backend gptq needs a section with data",
    ),
    "text-that-nobody-reads": (
        PLAIN.replace("train:", "calibration: {data: c.txt}\ntrain:"),
        "2:1: calibration: found without quantize, which alone looks at it; remove one of the two",
    ),
    "fast-with-text": (
        PLAIN.replace("train:", "quantize: {backend: nf4, quality: fast}\ncalibration: {data: c.txt}\ntrain:"),
        "3:1: calibration: found with backend nf4, which looks at no text with quality fast; remove it",
    ),
    "no-text": (
        PLAIN.replace("t.txt", "t.json"),
        "3:3: train.data: found 't.json', which would be read as plain text; allowed: a text file, or a .jsonl file",
    ),
    "svd-of-a-shifted-target": (
        repairing("gptq, bits: 3"),
        "2:11: adapter.initialization: found svd with target_shift auto, which aims at other weights than the float ones; allowed: "
        "'quality: fast' or 'target_shift: 0.0' in quantize, or standard",
    ),
    "svd-of-4-bits": (
        repairing("gptq, quality: fast"),
        f"2:11: adapter.initialization: found svd with 4 bits (gptq), where it gains nothing; {SVD_ALLOWED}",
    ),
    "svd-of-8-bits": (
        repairing("gptq, bits: 8, quality: fast"),
        f"2:11: adapter.initialization: found svd with 8 bits (gptq), where it gains nothing; {SVD_ALLOWED}",
    ),
    "svd-of-int8": (
        repairing("int8", ""), f"2:11: adapter.initialization: found svd with 8 bits (int8), where it gains nothing; {SVD_ALLOWED}",
    ),
    "svd-of-nf4": (
        repairing("nf4", ""), f"2:11: adapter.initialization: found svd with 4 bits (nf4), where it gains nothing; {SVD_ALLOWED}",
    ),
    "svd-of-a-budget": (
        repairing("gptq, average_bits: 2.5, quality: fast"),
        f"2:11: adapter.initialization: found svd beside quantize.average_bits, which also chooses 4 and 8 bits; {SVD_ALLOWED}",
    ),
    "svd-without-quantize": (
        adapter("{r: 4, initialization: svd}"),
        f"2:17: adapter.initialization: found svd without quantize: it repairs what quantizing `model` here takes; {SVD_ALLOWED}",
    ),
    "quanto": (
        QUANTIZED.replace("nf4", "quanto"),
        "2:12: quantize.backend: found quanto, on which nothing is trained; allowed: nf4, gptq or int8",
    ),
    "budget-for-a-head": (
        HEAD.replace("train:", "quantize: {backend: gptq, average_bits: 3}\ncalibration: {data: c.txt}\ntrain:"),
        "2:1: task: found sequence-classification beside quantize.average_bits; bits are chosen by what a causal-lm predicts",
    ),
    "base-task": (
        HEAD.replace("sequence-classification", "base"),
        "2:7: task: found the text 'base'; allowed: causal-lm, sequence-classification, token-classification or question-answering",
    ),
    "packing-for-a-head": (
        HEAD.replace("t.jsonl", "t.jsonl\n  packing: true"),
        "5:3: train.packing: found true with task sequence-classification, where a row holds one sample; remove it",
    ),
    "plain-text-for-a-head": (
        HEAD.replace("jsonl", "txt"),
        "4:3: train.data: found 't.txt' with task sequence-classification; allowed: a .jsonl file or a dataset on the hub, with a label "
        "in each sample",
    ),
    "plain-validation-for-a-head": (
        HEAD.replace("t.jsonl", "t.jsonl\n  validation: v.txt"),
        "5:3: train.validation: found 'v.txt' with task sequence-classification; allowed: a .jsonl file or a dataset on the hub, with a "
        "label in each sample",
    ),
    "labels-for-a-language-model": (
        train("labels: [a, b]"), "4:3: train.labels: found with task causal-lm, which has none; remove them",
    ),
    "label-twice": (
        HEAD.replace("t.jsonl", "t.jsonl\n  labels: [a, b, a]"), "5:3: train.labels: found the text 'a' twice; allowed: each name once",
    ),
    "share-one": (
        train("validation: 1"),
        "4:15: train.validation: found the number 1; allowed: a text, a section with name, config, split, column, revision and data_files, "
        "a number above 0, below 1 or null",
    ),
    "share-larger": (
        train("validation: 1.5"),
        "4:15: train.validation: found the number 1.5; allowed: a text, a section with name, config, split, column, revision and data_files, "
        "a number above 0, below 1 or null",
    ),
    "share-true": (
        train("validation: true"),
        "4:15: train.validation: found true; allowed: a text, a section with name, config, split, column, revision and data_files, a "
        "number above 0, below 1 or null; put it in quotes if it is meant as text",
    ),
    "validation-without-a-split": (
        train("validation: {name: a/b}"), "4:15: train.validation.split: missing; allowed: a text",
    ),
    "nothing-to-measure-on": (
        train("evaluate_every: 5"),
        "4:3: train.evaluate_every: found without validation, so that there is nothing to measure on; remove it",
    ),
    "checkpointing-yes": (
        train("gradient_checkpointing: yes"),
        "4:27: train.gradient_checkpointing: found the text 'yes'; allowed: auto or true or false; did you mean true?",
    ),
    "column-without-jsonl": (train("column: code"), "4:3: train.column: found with data that is no .jsonl file; remove it"),
    "learning-rate-in-quotes": (
        train("learning_rate: '2e-4'"),
        "4:18: train.learning_rate: found the text '2e-4'; allowed: a number above 0, at most 1; did you mean 2e-4, without quotes?",
    ),
    "output-holds-the-data": (
        PLAIN.replace("t.txt", "out/t.txt"), "4:1: output: found 'out', which holds train.data 'out/t.txt'; allowed: a folder of its own",
    ),
    "output-holds-the-validation": (
        train("validation: out/v.txt"),
        "5:1: output: found 'out', which holds train.validation 'out/v.txt'; allowed: a folder of its own",
    ),
    "base-folder-holds-the-model": (
        QUANTIZED.replace("model: m", "model: out-base"),
        "5:1: output: found 'out-base', which holds model 'out-base'; allowed: a folder of its own",
    ),
    "no-train": (
        "model: m\nquantize: {backend: nf4}\noutput: out\n",
        "2:1: train: missing; without this section a recipe quantizes, with 'qlm quantize'; allowed here: a recipe that trains",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_place_and_advice(name):
    text, expected = REFUSED[name]
    assert refusal(text) == f"r.yaml:{expected}"


def test_the_base_may_be_the_model():
    """A base that an earlier run has quantized is a model like any other."""
    assert read(PLAIN.replace("model: m", "model: out-base")).model == "out-base"


# --- two kinds --------------------------------------------------------------------------------------------------------


def test_a_train_section_makes_the_difference(tmp_path):
    quantizing, training = tmp_path / "q.yaml", tmp_path / "t.yaml"
    quantizing.write_text("model: m\nquantize: {backend: nf4}\noutput: o\n")
    training.write_text(PLAIN)
    assert isinstance(load_any_recipe(quantizing), Recipe)
    assert isinstance(load_any_recipe(training), FinetuneRecipe)
    with pytest.raises(
        UsageError,
        match=r"t\.yaml:2:1: train: found in a recipe that is to quantize; a recipe with this section trains, with 'qlm fin",
    ):
        load_recipe(training)
    with pytest.raises(UsageError, match=r"q\.yaml:2:1: train: missing; without this section a recipe quantizes"):
        load_finetune_recipe(quantizing)
    for load in (load_any_recipe, load_finetune_recipe):
        with pytest.raises(MissingInput, match=r"u\.yaml: no such recipe; did you mean .*\.yaml\?$"):
            load(tmp_path / "u.yaml")


@pytest.mark.parametrize("text", ["", "[a]", "a: [", "train", "train: {}", "train:\n"])
def test_what_is_neither_is_refused_in_one_line(text):
    with pytest.raises(UsageError, match=r"^r\.yaml:\d+:\d+: \S"):
        parse_any_recipe(text, "r.yaml")


def test_outputs_of_both_kinds_and_of_bases():
    quantizing = parse_recipe("model: m\nquantize: {backend: nf4}\noutput: out-base\n", "q.yaml")
    refuse_shared_outputs({"q.yaml": quantizing, "t.yaml": read(PLAIN)})
    with pytest.raises(UsageError, match=r"t\.yaml: output: found 'out-base', and q\.yaml writes to 'out-base'"):
        refuse_shared_outputs({"q.yaml": quantizing, "t.yaml": read(QUANTIZED)})


# --- for editors and for the README -----------------------------------------------------------------------------------


def test_schema_allows_what_is_read():
    import jsonschema

    schema = finetune_json_schema()
    for text in (PLAIN, HEAD, QUANTIZED, train("validation: 0.5"), *(path.read_text() for path in RECIPES)):
        jsonschema.validate(json.loads(json.dumps(resolved_finetune(read(text)))), schema)
    for text in ({"model": "m", "output": "o"}, {"model": "m", "train": {"data": "t", "stepz": 3}, "output": "o"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(text, schema)
    assert schema["title"] != json_schema()["title"]


def test_table_has_every_key_once_and_no_shared_section():
    rows = [row.split(" | ") for row in finetune_schema_table().splitlines()[2:]]
    keys = [row[0].strip("|` ") for row in rows]
    wanted = list(FinetuneRecipe.model_fields)
    wanted += [f"adapter.{key}" for key in AdapterRecipe.model_fields] + [
        f"train.{key}" for key in TrainRecipe.model_fields
    ]
    assert sorted(keys) == sorted(wanted)
    assert all(len(row) == 4 and row[3].strip("| ") for row in rows)


def test_readme_has_the_table():
    text = (ROOT / "recipes" / "README.md").read_text("utf-8")
    shown = text.partition("<!-- finetune schema -->\n")[2].partition("<!-- /finetune schema -->")[0]
    assert shown == finetune_schema_table(), (
        "recipes/README.md: put the output of qlm.recipe.finetune_schema_table() there"
    )
