"""What a fine-tuning recipe may say: a base, an adapter, the training, where to. A `train` section makes a recipe one of this kind.

Strict in the same way as a quantizing recipe, whose sections it shares.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from qlm.errors import QlmError, UsageError
from qlm.recipe.quantize import (
    Attention,
    CalibrationRecipe,
    DataSource,
    Glob,
    HubDataset,
    PathText,
    QuantizeRecipe,
    Recipe,
    Section,
    Text,
    check_calibration,
    contains,
    parse_recipe,
    quality_without_text,
    resolved,
    used_source,
)
from qlm.recipe.reading import read_recipe
from qlm.recipe.words import FILE, HUB, SHARE, Words, refused
from qlm.strict_yaml import at, in_words, read_yaml

FinetuneTask = Literal["causal-lm", "sequence-classification", "token-classification", "question-answering"]
Initialization = Literal["standard", "svd"]
Schedule = Literal["linear", "cosine", "constant"]
TooLong = Literal["truncate", "skip", "error"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Optimizer = Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"]

# Files that hold samples in other ways than a line each, or no text at all.
_NO_TEXT = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".xz", ".docx", ".pdf")
# Bases that adapters attach to. quanto's is there for comparison alone.
BASES = ("nf4", "gptq", "int8")
_MAX_RANK = 4096
# The most bits at which `initialization: svd` may start an adapter, and the bases that it may start one on.
SVD_BITS = 3
SVD_BASES = "quantize: {backend: gptq, bits: 3 or 2, quality: fast}"
_LABELLED = ("sequence-classification", "token-classification")


class AdapterRecipe(Section):
    """Low-rank matrices A [r, I] and B [O, r] beside each chosen linear, which then adds alpha / r * B A x (LoRA, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, le=_MAX_RANK, description="Rank: rows of A, columns of B.")
    alpha: int | None = Field(
        None, ge=1, le=65536, description="What the adapter adds is multiplied by `alpha / r`. null: twice `r`."
    )
    dropout: float = Field(
        0.05, ge=0, lt=1, description="Share of the adapter's input features set to zero while training."
    )
    targets: Literal["all_linear"] | Annotated[list[Glob], Field(min_length=1, max_length=1000)] = Field(
        "all_linear",
        description="Linears that get an adapter: all of each block, or a list of last path components (`q_proj`) and globs of whole "
        "paths. One that matches nothing is an error.",
    )
    initialization: Initialization = Field(
        "standard",
        description="`standard`: B is zero, so that training starts from the base as it is. `svd`: A and B start as the best rank-r "
        "repair of what quantizing lost. It gained at 2 bits and lost at 3 on the demo models (evals/LOG.md). Beside `quantize: {backend: gptq, bits: 2, quality: fast}`, or `bits: 3`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _twice_r(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("alpha") is None:
            r = data.get("r", cls.model_fields["r"].default)
            if type(r) is int and 1 <= r <= _MAX_RANK:
                return {**data, "alpha": 2 * r}
        return data


def _check_svd(quantize: QuantizeRecipe | None) -> None:
    """Refuse the repairing start where there is nothing for it to repair, or no float weight to repair it by. Linears that stay in more bits
    than the others are known when the model is (training/plan.py)."""
    key, allowed = ("adapter", "initialization"), f"allowed: {SVD_BASES}, or standard"
    if quantize is None:
        raise refused(key, f"found svd without quantize: it repairs what quantizing `model` here takes; {allowed}")
    if quantize.budget_key is not None:
        raise refused(
            key, f"found svd beside quantize.{quantize.budget_key}, which also chooses 4 and 8 bits; {allowed}"
        )
    if quantize.bits > SVD_BITS:
        raise refused(
            key, f"found svd with {quantize.bits} bits ({quantize.backend}), where it gains nothing; {allowed}"
        )
    if quantize.target_shift != 0:
        # W - Q then holds what was done on purpose, and repairing that loses (evals/LOG.md).
        raise refused(
            key, f"found svd with target_shift {quantize.target_shift}, which aims at other weights than the float ones; allowed: "
            "'quality: fast' or 'target_shift: 0.0' in quantize, or standard"
        )  # fmt: skip


def _validation_kind(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return SHARE
    return HUB if isinstance(value, Mapping | HubDataset) else FILE


class TrainRecipe(DataSource):
    """What the adapter learns from, and how. A step is one change of the adapter, by `batch_size` × `gradient_accumulation` rows."""

    data: Annotated[
        Annotated[PathText, Tag(FILE)] | Annotated[HubDataset, Tag(HUB)], Discriminator(_validation_kind)
    ] = Field(
        description="A text file (UTF-8), a `.jsonl` file with one JSON object a line, or a dataset on the hub. Objects and rows "
        "hold `text`, or `prompt` and `completion` (only the completion is learned); for heads `text` and `label`, `tokens` and "
        "`labels`, or `question`, `context`, `answer` and `answer_start`."
    )
    validation: (
        Annotated[
            Annotated[PathText, Tag(FILE)]
            | Annotated[HubDataset, Tag(HUB)]
            | Annotated[float, Field(gt=0, lt=1), Tag(SHARE)],
            Discriminator(_validation_kind),
        ]
        | None
    ) = Field(
        None,
        description="Text that is not learned from, in the same form, to measure on: a file, a hub dataset, or a share of the rows of `data`.",
    )
    labels: Annotated[list[Text], Field(min_length=2, max_length=10_000)] | None = Field(
        None,
        description="Sequence and token classification: names of the labels, in the order of their numbers. null: as the model's config says.",
    )
    steps: int | None = Field(None, ge=1, le=10_000_000, description="How many steps. Stands in the place of `epochs`.")
    epochs: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="How many times the data is gone through. null: once, unless `steps` is given.",
    )
    batch_size: int = Field(4, ge=1, le=4096, description="Rows that go through the model together.")
    gradient_accumulation: int = Field(4, ge=1, le=4096, description="Batches whose gradients make one step.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="At its highest, after the warm-up.")
    schedule: Schedule = Field("cosine", description="How the learning rate falls after the warm-up.")
    warmup: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="Share of the steps in which the learning rate rises from zero. The first of them has zero itself, as in all of transformers' schedules, and changes nothing.",
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="Of AdamW.")
    max_gradient_norm: float = Field(
        1.0, gt=0, le=1e9, description="Gradients with a larger norm, all of them together, are scaled down to it."
    )
    max_length: int | None = Field(
        None, ge=2, le=1 << 20, description="Tokens of a row. null: as many as the model has positions, at most 2048."
    )
    too_long: TooLong = Field(
        "truncate",
        description="What becomes of a sample longer than `max_length`, counted in either case. Plain text is cut into rows instead.",
    )
    packing: bool = Field(
        True,
        description="causal-lm: whole texts side by side in a row, as many as fit, with EOS (and the family's BOS) between. false, and "
        "always with heads: one sample a row.",
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="Compute activations a second time instead of keeping them: slower, with less memory. `auto`: on a GPU, and on a CPU for models of more than 300 M parameters.",
    )
    precision: Precision = Field(
        "auto",
        description="What the model computes in; `auto`: on a GPU bfloat16 where it has that, else float16 with loss scaling; float32 on a CPU. Adapters are float32.",
    )
    optimizer: Optimizer = Field(
        "auto",
        description="`auto`: paged 8-bit AdamW (bitsandbytes) on CUDA, torch's AdamW elsewhere and under FSDP. The 8-bit ones need CUDA.",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Of the adapter's start, dropout, and the order of the data.")
    save_every: int = Field(50, ge=1, le=10_000_000, description="Steps between checkpoints.")
    evaluate_every: int = Field(50, ge=1, le=10_000_000, description="Steps between measurements on `validation`.")
    tensorboard: bool = Field(False, description="Also write TensorBoard's event files.")

    @model_validator(mode="before")
    @classmethod
    def _once(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("steps") is None and data.get("epochs") is None:
            return {**data, "epochs": 1}
        return data

    @model_validator(mode="after")
    def _says_it_once(self) -> "TrainRecipe":
        if self.steps is not None and self.epochs is not None:
            raise refused("epochs", "found beside steps, which says the same in another way; remove one of the two")
        if self.validation is None and "evaluate_every" in self.model_fields_set:
            raise refused(
                "evaluate_every", "found without validation, so that there is nothing to measure on; remove it"
            )
        for key, value in (("data", self.data), ("validation", self.validation)):
            if isinstance(value, str) and value.lower().endswith(_NO_TEXT):
                raise refused(
                    key,
                    f"found {in_words(value, '')}, which would be read as plain text; allowed: a text file, or a .jsonl file",
                )
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            twice = next(name for name in self.labels if self.labels.count(name) > 1)
            raise refused("labels", f"found {in_words(twice)} twice; allowed: each name once")
        return self

    @property
    def validation_share(self) -> float | None:
        """Share of the rows of `data` that is kept for validation, if that is what `validation` says."""
        return self.validation if isinstance(self.validation, float) else None

    @property
    def validation_source(self) -> DataSource | None:
        """Where validation text comes from, if it has a source of its own."""
        if self.validation is None or isinstance(self.validation, float):
            return None
        is_jsonl = isinstance(self.validation, str) and self.validation.lower().endswith(".jsonl")
        column = {"column": self.column} if is_jsonl and self.is_jsonl else {}
        return DataSource.model_validate({"data": self.validation, **column})


class FinetuneRecipe(Section):
    """One adapter, trained on one base."""

    model: PathText = Field(
        description="A folder, or a model on the hub: `owner/name`. Float, or quantized already (nf4, gptq or int8)."
    )
    revision: Text | None = Field(None, description="Commit, tag or branch of a model on the hub.")
    task: FinetuneTask = Field(
        "causal-lm",
        description="The head that the model is loaded with; one that is no language model's is trained in full.",
    )
    attn_implementation: Attention = Field("sdpa", description="Attention used while training.")
    quantize: QuantizeRecipe | None = Field(
        None,
        description="Quantize the float model first, into the folder `<output>-base`, and train on that. null: train on `model` as it is.",
    )
    calibration: CalibrationRecipe | None = Field(
        None, description="Text that the quantizer looks at; only beside `quantize`."
    )
    adapter: AdapterRecipe = Field(AdapterRecipe.model_validate({}), description=AdapterRecipe.__doc__)
    train: TrainRecipe = Field(description=TrainRecipe.__doc__)
    output: PathText = Field(description="Folder to create. It must not exist, unless `--force` is given.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_depend(cls, data: Any) -> Any:
        data = quality_without_text(data)
        if not isinstance(data, Mapping):
            return data
        train, task = data.get("train"), data.get("task", "causal-lm")
        if task != "causal-lm" and isinstance(train, Mapping) and "packing" not in train:
            return {**data, "train": {**train, "packing": False}}
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> "FinetuneRecipe":
        if self.quantize is not None:
            if self.quantize.backend not in BASES:
                raise refused(
                    ("quantize", "backend"), f"found {self.quantize.backend}, on which nothing is trained; allowed: nf4, gptq or int8"
                )  # fmt: skip
            check_calibration(self.quantize, self.calibration, self.task)
        elif self.calibration is not None:
            raise refused("calibration", "found without quantize, which alone looks at it; remove one of the two")
        if self.adapter.initialization == "svd":
            _check_svd(self.quantize)
        train = self.train
        if self.task != "causal-lm":
            if train.packing:
                raise refused(
                    ("train", "packing"), f"found true with task {self.task}, where a row holds one sample; remove it"
                )
            for key, value in (("data", train.data), ("validation", train.validation)):
                if isinstance(value, str) and not value.endswith(".jsonl"):
                    raise refused(
                        ("train", key), f"found {in_words(value, '')} with task {self.task}; allowed: a .jsonl file or a dataset on the hub, "
                        "with a label in each sample"
                    )  # fmt: skip
        if train.labels is not None and self.task not in _LABELLED:
            raise refused(("train", "labels"), f"found with task {self.task}, which has none; remove them")
        inputs = {"model": self.model, "train.data": train.data, "train.validation": train.validation}
        if self.calibration is not None:
            inputs["calibration.data"] = self.calibration.data
        for folder in self.outputs:
            for key, path in inputs.items():
                if isinstance(path, str) and contains(folder, path):
                    found = f"found {in_words(folder, '')}, which holds {key} {in_words(path, '')}"
                    raise refused("output", f"{found}; allowed: a folder of its own")
        return self

    @property
    def outputs(self) -> tuple[str, ...]:
        """The folders that it writes."""
        return (self.output,) if self.quantize is None else (self.output, self.base_output)

    @property
    def base_output(self) -> str:
        """Folder of the quantized base, where there is a `quantize` section."""
        return f"{self.output.rstrip('/')}-base"

    def base_recipe(self) -> Recipe | None:
        """The quantizing recipe of the base, or None where `model` is trained on as it is."""
        if self.quantize is None:
            return None
        keys = ("model", "revision", "task", "attn_implementation", "quantize", "calibration")
        return Recipe.model_validate({**{key: getattr(self, key) for key in keys}, "output": self.base_output})


_WORDS = Words(FinetuneRecipe)


def resolved_finetune(recipe: FinetuneRecipe) -> dict[str, Any]:
    """The recipe as plain JSON values with every default filled in; read again, it gives the same. Keys without effect are left out."""
    plain = recipe.model_dump(mode="json")
    base = recipe.base_recipe()
    if base is not None:
        of_base = resolved(base)
        plain |= {key: of_base[key] for key in ("quantize", "calibration")}
    train = plain["train"]
    used_source(train, recipe.train)
    if recipe.train.validation is None:
        del train["evaluate_every"]
    return plain


def load_finetune_recipe(path: str | Path) -> FinetuneRecipe:
    """Read and validate a fine-tuning recipe. Errors as those of `load_recipe`."""
    return parse_finetune_recipe(*read_recipe(path))


def load_any_recipe(path: str | Path) -> Recipe | FinetuneRecipe:
    """Read and validate a recipe of either kind: a `train` section makes it a fine-tuning recipe."""
    return parse_any_recipe(*read_recipe(path))


def parse_finetune_recipe(text: str, source: str) -> FinetuneRecipe:
    """Validate a fine-tuning recipe's text; `source` is the name that errors carry. Raises UsageError as `parse_recipe` does."""
    try:
        document = read_yaml(text)
        if isinstance(document.value, dict) and "train" not in document.value and "quantize" in document.value:
            raise at(
                document.keys[("quantize",)],
                "missing; without this section a recipe quantizes, with 'qlm quantize'; allowed here: a recipe that trains",
                ("train",),
            )
        return _WORDS.validated(document)
    except QlmError as error:
        raise type(error)(f"{source}:{error}") from None


def parse_any_recipe(text: str, source: str) -> Recipe | FinetuneRecipe:
    """Validate the text of a recipe of either kind."""
    try:
        value = read_yaml(text).value
    except UsageError:
        value = None
    return (parse_finetune_recipe if isinstance(value, dict) and "train" in value else parse_recipe)(text, source)


def finetune_json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a fine-tuning recipe; `qlm schema --finetune` prints it."""
    return _WORDS.json_schema("qlm fine-tuning recipe")


def finetune_schema_table() -> str:
    """Every key of a fine-tuning recipe as a Markdown table; sections that a quantizing recipe has are named and not repeated."""
    shared = {"QuantizeRecipe": "quantize", "CalibrationRecipe": "calibration", "HubDataset": "calibration.data"}
    return _WORDS.table(shared)
