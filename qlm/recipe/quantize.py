"""What a quantizing recipe may say.

A recipe is a YAML file of at most a screenful: which model, which backend, which calibration text, where to. The
pydantic models below are the only home of every key, its allowed values, its default and its meaning; the JSON Schema
for editors and the table in `recipes/README.md` are made from them by words.py.

A recipe is taken at its word or refused: strict_yaml.py says how its text becomes values. Unknown keys are refused, and so are
keys that the chosen backend would ignore. Every error is one line: `file:line:column: key.path: what was found; what is
allowed`.
"""

import fnmatch
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from qlm.arch.spec import Task
from qlm.errors import QlmError, UsageError
from qlm.recipe.backend_keys import BITS, PRESETS, QTYPE_BITS, READERS, TAKES, Backend, Quality, Reader
from qlm.recipe.reading import read_recipe
from qlm.recipe.words import FILE, HUB, Words, listed, refused
from qlm.strict_yaml import Document, at, in_words, read_yaml

MAX_TEXT = 4096

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
Order = Literal["none", "act", "gar", "static"]
ScaleSearch = Literal["minmax", "weighted"]
Qtype = Literal["qint8", "qint4", "qfloat8"]
OnFailure = Literal["error", "round_to_nearest"]

# bitsandbytes' default block and quanto's default group for 4 bits; neither is a choice here.
NF4_BLOCK = 64
_QUANTO_INT4_GROUP = 128
# What the letters after a number of bytes mean.
SIZE_UNITS = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
}  # fmt: skip
MOST_BYTES = 10**15
# OPT's linears that vLLM makes one of, in each block; OPT-175B has 96.
_FUSED = tuple(tuple(f"model.decoder.layers.{block}.self_attn.{part}_proj" for part in "qkv") for block in range(96))


# --- the models -------------------------------------------------------------------------------------------------------


def _plain_text(text: str) -> str:
    if not text.isprintable():
        raise refused(None, f"found {in_words(text)} with an unprintable character; allowed: printable characters")
    if text != text.strip():
        raise refused(None, f"found {in_words(text)}; allowed: the same without the space around it")
    return text


def _local_path(text: str) -> str:
    if text.startswith("~"):
        raise refused(None, f"found {in_words(text)}; '~' is not expanded here: write the path without it")
    return text


def _whole(value: object) -> object:
    # pydantic's strict Literal takes 4.0 for 4.
    if isinstance(value, float):
        raise refused(None, f"found {in_words(value)}; allowed: a whole number")
    return value


def _size(text: str) -> str:
    """A number and a unit, as `size_in_bytes` takes it."""
    number, unit = _parts_of_size(text)
    if unit not in SIZE_UNITS or number is None or not 1 <= number * SIZE_UNITS[unit] <= MOST_BYTES:
        allowed = f"bytes as a whole number, or a number with {listed(SIZE_UNITS, 'or')}, such as 600MB"
        meant = next((known for known in SIZE_UNITS if known.lower() == unit.lower()), None)
        hint = f"; did you mean {number:g}{meant}?" if number and meant and meant != unit else ""
        raise refused(None, f"found {in_words(text)}; allowed: {allowed}{hint}")
    return text


def _parts_of_size(text: str) -> tuple[float | None, str]:
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([A-Za-z]*)", text)
    return (float(found[1]), found[2]) if found else (None, "")


def size_in_bytes(size: str | int) -> int:
    """600_000_000 for "600MB"; what validation let through."""
    if isinstance(size, int):
        return size
    number, unit = _parts_of_size(size)
    assert number is not None
    return int(number * SIZE_UNITS[unit])


GroupSize = Annotated[Literal[32, 64, 128, -1], BeforeValidator(_whole)]
Bits = Annotated[Literal[2, 3, 4, 8], BeforeValidator(_whole)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT), AfterValidator(_plain_text)]
Size = Annotated[
    str, StringConstraints(min_length=1, max_length=64), AfterValidator(_plain_text), AfterValidator(_size)
]
PathText = Annotated[Text, AfterValidator(_local_path)]
Glob = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_plain_text)]


class Section(BaseModel):
    # Strict: no text becomes a number, no number a boolean. Frozen: what was validated is what runs.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _preset(key: str) -> Any:
    """The default of a key: what the chosen quality says, or its `fast` value for a backend that does not take the key."""

    def default(above: dict[str, Any]) -> Any:
        # A backend or a quality that was refused is not there; its error is reported, not this one.
        quality: Quality = above.get("quality", "fast") if key in TAKES.get(above.get("backend", ""), ()) else "fast"
        return PRESETS[quality][key]

    return default


class OverrideRecipe(Section):
    """What differs for the linears that a glob matches."""

    bits: Bits | None = Field(None, description="Bits per weight of these linears.")
    group_size: GroupSize | None = Field(None, description="Input features that share a scale; -1 is the whole row.")
    symmetric: bool | None = Field(None, description="No zero points (true) or one per group (false).")
    skip: bool | None = Field(
        None, description="true leaves these linears as they are; false takes back `skip` or an earlier override."
    )

    @model_validator(mode="after")
    def _says_something(self) -> "OverrideRecipe":
        given = {name: value for name, value in self if value is not None}
        if not given:
            allowed = listed(OverrideRecipe.model_fields, "or")
            raise refused(None, f"found an override that changes nothing; allowed: at least one of {allowed}")
        if self.skip and len(given) > 1:
            other = next(name for name in given if name != "skip")
            raise refused(other, "found beside 'skip: true', where it has no effect; remove one of the two")
        return self


def _calibrated(above: dict[str, Any]) -> bool:
    return above.get("backend") == "gptq" or above.get("quality") != "fast"


def _default_bits(above: dict[str, Any]) -> Any:
    # pydantic hands over the fields that stand before `bits`, already validated.
    backend = above["backend"]
    return QTYPE_BITS[above["qtype"]] if backend == "quanto" else BITS[backend][0]


class QuantizeRecipe(Section):
    """How the weights are quantized."""

    backend: Backend = Field(
        description="How weights are stored and multiplied: `int8` (8-bit weights and activations), `nf4` "
        "(bitsandbytes 4-bit, base of QLoRA), `gptq` (2 to 8 bits, calibrated), `quanto` (for comparison)."
    )
    quality: Quality = Field(
        "balanced",
        description="Sets the defaults of `target_shift`, `compensate`, `sweeps`, `bias_correction`, `smooth`, `rounding_steps`, `tune_steps`. "
        "`fast`: all off; the default of int8 and nf4 without a calibration section, which they then do not need. "
        "`balanced`: what costs little more time. `best`: more sweeps, and what a gradient can still improve.",
    )
    qtype: Qtype = Field("qint8", description="quanto's own weight type.")
    bits: Bits = Field(
        # pydantic hands over the fields above, already validated.
        default_factory=_default_bits,
        description="Bits per weight. "
        + "; ".join(
            f"{backend}: {', '.join(map(str, sorted(bits)))}" + (f", default {bits[0]}" if len(bits) > 1 else "")
            for backend, bits in BITS.items()
        )
        + ".",
    )
    group_size: GroupSize = Field(
        128,
        description="Input features that share a scale; must divide every linear's input features. -1 is one scale "
        "per output channel. Smaller is more accurate and larger: 32 costs half a bit per weight, 128 an eighth.",
    )
    average_bits: float | None = Field(
        None,
        gt=2,
        le=9,
        description="Instead of `bits` and `group_size`: stored bits per weight of the quantized linears together, at most. Each gets the "
        "bits and the group size that lose least, as the calibration text says.",
    )
    target_size: Size | Annotated[int, Field(ge=1, le=MOST_BYTES)] | None = Field(
        None,
        description="The same by size: bytes of all weight files together, at most, as a whole number or as `600MB`, `1.5GB`, `500MiB`.",
    )
    symmetric: bool = Field(True, description="No zero points (true) or one per group (false).")
    double_quant: bool = Field(
        False, description="Quantize the block scales too: 0.37 bits per weight less (arXiv:2305.14314, section 3)."
    )
    damp: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Added to the Hessian's diagonal, as a share of its mean; raised by itself when it is too little.",
    )
    order: Order = Field(
        "gar",
        description="Order in which columns are quantized: `none` as stored, `act` by activation (the file needs a "
        "reader that knows `desc_act`), `gar` by activation inside and between groups, `static` by activation with grids chosen "
        "in advance (every reader knows these two).",
    )
    scale_search: ScaleSearch = Field(
        default_factory=lambda above: "weighted" if _calibrated(above) else "minmax",
        description="Scales that span the group (`minmax`), or lose least under the Hessian (`weighted`). nf4: `minmax` "
        "with `quality: fast`.",
    )
    smooth: bool = Field(
        default_factory=_preset("smooth"),
        description="Move outliers of the activations into the weights where the family allows it exactly (SmoothQuant).",
    )
    target_shift: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        default_factory=_preset("target_shift"),
        description="How much of the earlier layers' quantization error each layer repairs: 0 none, 1 all, `auto` by layer, as "
        "samples that are kept aside say.",
    )
    compensate: bool = Field(
        default_factory=_preset("compensate"),
        description="Let later columns repair the rounding of earlier ones, as GPTQ does, on the format's own grid.",
    )
    sweeps: int = Field(
        default_factory=_preset("sweeps"),
        ge=0,
        le=100,
        description="Times that every code is chosen anew, all others being as they are; scales are fitted anew as well.",
    )
    bias_correction: bool = Field(
        default_factory=_preset("bias_correction"), description="Take the mean error of each output off its bias."
    )
    rounding_steps: int = Field(
        default_factory=_preset("rounding_steps"),
        ge=0,
        le=10_000,
        description="Steps in which codes are learned by gradient from what the block makes of them: those of all linears but the last "
        "of attention and MLP, which are solved for afterwards.",
    )
    tune_steps: int = Field(
        default_factory=_preset("tune_steps"),
        ge=0,
        le=10_000,
        description="Steps in which a block's norms and biases are learned in the same way.",
    )
    ignore_first: bool = Field(
        False, description="Leave the first token of each window, an outlier in many models, out of the statistics."
    )
    input_16bit: list[Glob] = Field(
        [],
        max_length=1000,
        description="Globs of module paths whose int8 linears take their input as it is, 16 bits or more, instead of rounding it to 8.",
    )
    skip: list[Glob] = Field(
        [],
        max_length=1000,
        description="Globs of module paths whose linears stay as they are. One that matches nothing is an error.",
    )
    on_failure: OnFailure = Field(
        "error",
        description="When no damping mends a Hessian: stop, or round that linear to nearest and record it.",
    )
    overrides: dict[Glob, OverrideRecipe] = Field(
        {},
        max_length=1000,
        description="Changes by glob of the module path. All that match apply, from top to bottom; the later wins.",
    )
    reader: Reader = Field(
        "gptqmodel",
        description="Software that must be able to load the result, beside qlm. Refused with `gptqmodel`: nothing; with `vllm`: 2 and 3 bits, "
        "zero points, and OPT's q, k and v with different settings; with `transformers`: settings of single linears, and `damp: 1.0`.",
    )

    @model_validator(mode="after")
    def _fits_backend(self) -> "QuantizeRecipe":
        takes = TAKES[self.backend]
        for key in QuantizeRecipe.model_fields:
            if key in self.model_fields_set and key != "backend" and key not in takes:
                allowed = listed(takes, "and")
                raise refused(key, f"found with backend {self.backend}, which takes {allowed}; remove it")
        if self.average_bits is not None and self.target_size is not None:
            raise refused(
                "target_size", "found beside average_bits, which says the same in another way; remove one of the two"
            )
        if self.budget_key is not None:
            for key in ("bits", "group_size"):
                if key in self.model_fields_set:
                    raise refused(
                        key, f"found beside {self.budget_key}, which chooses it for each linear; remove one of the two, or name the linears in overrides"
                    )  # fmt: skip
        allowed_bits = BITS.get(self.backend, (self.bits,))
        if self.bits not in allowed_bits:
            allowed = listed(sorted(allowed_bits), "or")
            raise refused("bits", f"found {self.bits} with backend {self.backend}; allowed: {allowed}")
        for glob in self.input_16bit:
            if glob in self.skip:
                raise refused(
                    "input_16bit", f"found {in_words(glob, '')} here and in skip, which wins; remove one of the two"
                )
        for glob, override in self.overrides.items():
            if glob in self.skip and override.skip is not False:
                raise refused(
                    "overrides", f"found {in_words(glob, '')} here and in skip, which wins; remove one of the two"
                )
        return self

    @model_validator(mode="after")
    def _can_be_read(self) -> "QuantizeRecipe":
        reads, found = READERS[self.reader], f"with reader {self.reader}"
        other = "or choose another reader"
        if not reads.by_layer:
            for key in ("average_bits", "target_size", "skip", "overrides"):
                if getattr(self, key):
                    raise refused(key, f"found {found}, which ignores settings of single linears; remove it, {other}")
        if reads.largest_damp is not None and self.damp >= reads.largest_damp:
            raise refused("damp", f"found {self.damp:g} {found}; allowed: less than {reads.largest_damp:g}, {other}")
        places: dict[tuple[str, ...], QuantizeRecipe | OverrideRecipe] = {(): self}
        for place, section in (places | {("overrides", glob): how for glob, how in self.overrides.items()}).items():
            if section.bits not in (None, *reads.bits):
                allowed = listed(reads.bits, "or")
                raise refused((*place, "bits"), f"found {section.bits} {found}; allowed: {allowed}, {other}")
            if section.symmetric is False and not reads.asymmetric:
                raise refused((*place, "symmetric"), f"found false {found}; allowed: true, {other}")
        for parts in _FUSED if reads.fused and (self.skip or self.overrides) else ():
            if len({settings_for(self, part) for part in parts}) > 1:
                unlike = f"found different settings for {listed(parts, 'and')} {found}, which makes one linear of them"
                raise refused("overrides" if self.overrides else "skip", f"{unlike}; name all three, {other}")
        return self

    @property
    def budget_key(self) -> str | None:
        """The key that asks for bits and group sizes to be chosen, if one does."""
        return next((key for key in ("average_bits", "target_size") if getattr(self, key) is not None), None)

    @property
    def needs_calibration(self) -> bool:
        """Whether anything in it looks at calibration text."""
        takes = TAKES[self.backend]
        looking = ("target_shift", "compensate", "sweeps", "bias_correction", "smooth", "tune_steps")
        weighted = self.backend == "nf4" and self.scale_search == "weighted"
        return self.backend == "gptq" or weighted or any(getattr(self, key) for key in looking if key in takes)

    @property
    def follows_float(self) -> bool:
        """Whether the float model's own activations are needed as well."""
        return bool(self.target_shift or self.bias_correction or self.rounding_steps or self.tune_steps)

    @property
    def holds_out(self) -> bool:
        """Whether samples are kept aside to choose by."""
        return bool(self.target_shift == "auto" or self.rounding_steps or self.tune_steps)


class HubDataset(Section):
    """A dataset of the Hugging Face hub."""

    name: Text = Field(description="Dataset on the hub, `owner/name`. One that needs a loading script cannot be used.")
    config: Text | None = Field(None, description="The dataset's configuration, when it has several.")
    split: Text = Field(description="Split, in the syntax of `datasets`: `test`, `train[:2000]`.")
    column: Text = Field("text", description="Column that holds the text.")
    revision: Text | None = Field(None, description="Commit, tag or branch; a commit makes the result repeatable.")
    data_files: Text | Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="File or files of the dataset to read, instead of all."
    )


def _data_kind(value: object) -> str:
    return HUB if isinstance(value, Mapping | HubDataset) else FILE


class DataSource(Section):
    """Where text comes from."""

    data: Annotated[Annotated[PathText, Tag(FILE)] | Annotated[HubDataset, Tag(HUB)], Discriminator(_data_kind)] = (
        Field(description="A text file (UTF-8), a `.jsonl` file with one JSON object a line, or a dataset on the hub.")
    )
    column: Text = Field("text", description="Field of each object of a `.jsonl` file that holds the text.")

    @model_validator(mode="after")
    def _column_means_something(self) -> "DataSource":
        if "column" in self.model_fields_set and not self.is_jsonl:
            advice = "write it inside data" if isinstance(self.data, HubDataset) else "remove it"
            raise refused("column", f"found with data that is no .jsonl file; {advice}")
        return self

    @property
    def is_jsonl(self) -> bool:
        """Whether `data` is a file of JSON objects, one a line."""
        return isinstance(self.data, str) and self.data.lower().endswith(".jsonl")


class CalibrationRecipe(DataSource):
    """Text that the quantizer looks at. Needed by gptq; with int8 and nf4 it makes better ones; refused where it would be ignored."""

    samples: int = Field(128, ge=1, le=1_000_000, description="Number of windows.")
    length: int | None = Field(
        None, ge=2, le=1 << 20, description="Tokens per window. null: as many as the model has positions, at most 2048."
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Chooses the windows.")


class EvaluateRecipe(DataSource):
    """Text that perplexity and KL divergence are measured on; without it nothing is measured."""

    length: int | None = Field(
        None, ge=2, le=1 << 20, description="Tokens per window. null: as many as the model has positions, at most 2048."
    )
    windows: int | None = Field(
        None,
        ge=1,
        le=1_000_000_000,
        description="Only the first so many windows; null is all, as published figures mean.",
    )


class Recipe(Section):
    """One model, quantized one way."""

    model: PathText = Field(description="A folder, or a model on the hub: `owner/name`.")
    revision: Text | None = Field(None, description="Commit, tag or branch of a model on the hub.")
    task: Task = Field("causal-lm", description="The head that the model is loaded with.")
    dtype: Dtype = Field("auto", description="Of what stays in floating point; `auto` keeps the checkpoint's own.")
    attn_implementation: Attention = Field("sdpa", description="Attention used while calibrating and evaluating.")
    quantize: QuantizeRecipe = Field(description="How the weights are quantized.")
    calibration: CalibrationRecipe | None = Field(None, description=CalibrationRecipe.__doc__)
    evaluate: EvaluateRecipe | None = Field(None, description=EvaluateRecipe.__doc__)
    output: PathText = Field(description="Folder to create. It must not exist, unless `--force` is given.")

    @model_validator(mode="before")
    @classmethod
    def _quality_without_text(cls, data: Any) -> Any:
        return quality_without_text(data)

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        check_calibration(self.quantize, self.calibration, self.task)
        if self.evaluate is not None and self.task != "causal-lm":
            raise refused("evaluate", f"found with task {self.task}; only causal-lm has a perplexity: remove it")
        inputs = {"model": self.model}
        for key, section in (("calibration.data", self.calibration), ("evaluate.data", self.evaluate)):
            if section is not None and isinstance(section.data, str):
                inputs[key] = section.data
        for key, path in inputs.items():
            if contains(self.output, path):
                found = f"found {in_words(self.output, '')}, which holds {key} {in_words(path, '')}"
                raise refused("output", f"{found}; allowed: a folder of its own")
        return self

    @property
    def outputs(self) -> tuple[str, ...]:
        """The folders that it writes."""
        return (self.output,)


def quality_without_text(data: Any) -> Any:
    """A recipe's mapping, its `quantize` section as it is meant where there is no calibration text."""
    if isinstance(data, Mapping) and isinstance(data.get("quantize"), Mapping) and data.get("calibration") is None:
        return {**data, "quantize": without_text(data["quantize"])}
    return data


def check_calibration(quantize: QuantizeRecipe, calibration: CalibrationRecipe | None, task: Task) -> None:
    """Refuse calibration text that is missing or would be ignored, and a budget of bits for a head; for validators of recipes."""
    backend = quantize.backend
    if quantize.needs_calibration and calibration is None:
        way_out = "" if backend == "gptq" else "; 'quality: fast' alone looks at no text"
        raise refused("calibration", f"missing; backend {backend} needs a section with data{way_out}", "quantize")
    if not quantize.needs_calibration and calibration is not None:
        as_it_is = f" with quality {quantize.quality}" if backend in ("int8", "nf4") else ""
        raise refused("calibration", f"found with backend {backend}, which looks at no text{as_it_is}; remove it")
    if quantize.budget_key is not None and task != "causal-lm":
        raise refused(
            "task", f"found {task} beside quantize.{quantize.budget_key}; bits are chosen by what a causal-lm predicts"
        )


def without_text(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A `quantize` section as it is meant where there is no calibration text: int8 and nf4 are then `fast` by default."""
    return {"quality": "fast", **section} if section.get("backend") in ("int8", "nf4") else section


def contains(folder: str, path: str) -> bool:
    """Whether `path` is `folder` or lies in it, by name alone."""
    outer, inner = os.path.abspath(folder), os.path.abspath(path)
    return os.path.commonpath([outer, inner]) == outer


# --- what the rest of qlm asks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearSettings:
    """How one linear is quantized: the recipe's section with its overrides applied.

    Attributes:
        bits: per weight.
        group_size: input features that share a scale; -1 for the whole row. nf4: 64, of the flattened weight.
        symmetric: no zero points.
        input_16bit: int8 weights, and an input that is not rounded.
        double_quant, damp, order, scale_search, smooth, target_shift, compensate, sweeps, bias_correction, rounding_steps, tune_steps,
            qtype, on_failure: as in `QuantizeRecipe`; without effect where the backend does not take them.
    """

    backend: Backend
    bits: int
    group_size: int
    symmetric: bool
    input_16bit: bool
    double_quant: bool
    damp: float
    order: Order
    scale_search: ScaleSearch
    smooth: bool
    target_shift: float | Literal["auto"]
    compensate: bool
    sweeps: int
    bias_correction: bool
    rounding_steps: int
    tune_steps: int
    qtype: Qtype
    on_failure: OnFailure


def settings_for(quantize: QuantizeRecipe, name: str) -> LinearSettings | None:
    """The settings of the linear at module path `name` (`model.decoder.layers.0.fc1`), or None where it is skipped.

    A glob matches the whole path, and `*` matches dots too. `skip` is read first, then the overrides from top to
    bottom; each key takes the last value said.
    """
    skip = any(fnmatch.fnmatchcase(name, glob) for glob in quantize.skip)
    changes: dict[str, Any] = {}
    for glob, override in quantize.overrides.items():
        if fnmatch.fnmatchcase(name, glob):
            changes |= {key: value for key, value in override if value is not None}
    if changes.pop("skip", skip):
        return None
    group_size: int = quantize.group_size
    if quantize.backend != "gptq":
        is_quanto_int4 = quantize.backend == "quanto" and quantize.qtype == "qint4"
        group_size = NF4_BLOCK if quantize.backend == "nf4" else _QUANTO_INT4_GROUP if is_quanto_int4 else -1
    settings: dict[str, Any] = {key: getattr(quantize, key) for key in LinearSettings.__dataclass_fields__}
    settings["input_16bit"] = any(fnmatch.fnmatchcase(name, glob) for glob in quantize.input_16bit)
    return LinearSettings(**{**settings, "group_size": group_size, **changes})


def unmatched_globs(quantize: QuantizeRecipe, names: Iterable[str]) -> list[str]:
    """The globs of `skip`, `input_16bit` and `overrides` that match none of `names`: misspelt, or meant for another model."""
    names = list(names)
    globs = (*quantize.skip, *quantize.input_16bit, *quantize.overrides)
    return [glob for glob in globs if not any(fnmatch.fnmatchcase(name, glob) for name in names)]


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values with every default filled in; read again, it gives the same.

    Keys that have no effect with the recipe's backend or data are left out, so that a manifest claims nothing that did
    not happen.
    """
    plain = recipe.model_dump(mode="json")
    takes = ("backend", *TAKES[recipe.quantize.backend])
    unused = ("bits", "group_size") if recipe.quantize.budget_key is not None else ("average_bits", "target_size")
    plain["quantize"] = {key: value for key, value in plain["quantize"].items() if key in takes and key not in unused}
    for glob, override in plain["quantize"].get("overrides", {}).items():
        plain["quantize"]["overrides"][glob] = {key: value for key, value in override.items() if value is not None}
    for key, section in (("calibration", recipe.calibration), ("evaluate", recipe.evaluate)):
        if section is not None:
            used_source(plain[key], section)
    return plain


def used_source(plain: dict[str, Any], source: DataSource) -> None:
    """Take `column` out of a section's plain values where it has no effect."""
    if not source.is_jsonl:
        del plain["column"]


def quantize_section(section: QuantizeRecipe | Mapping[str, Any], calibrated: bool = False) -> QuantizeRecipe:
    """The `quantize` section from Python values; `calibrated`: there is calibration text.

    Raises:
        UsageError: "quantize.key: what was found; what is allowed".
    """
    if isinstance(section, QuantizeRecipe):
        return section
    if not isinstance(section, Mapping):
        raise UsageError(f"quantize: found {in_words(section)}; allowed: a section, as a mapping or a QuantizeRecipe")
    data = dict(section if calibrated else without_text(section))
    try:
        return QuantizeRecipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(_WORDS.explain(error, Document({"quantize": data}), ("quantize",))) from None


class Outputs(Protocol):
    """A recipe of either kind, as far as its folders go."""

    @property
    def outputs(self) -> tuple[str, ...]: ...


def refuse_shared_outputs(recipes: Mapping[str, Outputs]) -> None:
    """Refuse recipes, by their files, of which one would write into the output of another.

    Raises:
        UsageError: naming both recipes.
    """
    seen: list[tuple[str, str]] = []
    for source, recipe in recipes.items():
        for output in recipe.outputs:
            for other_source, other in seen:
                if other_source != source and (contains(output, other) or contains(other, output)):
                    raise UsageError(
                        f"{source}: output: found {in_words(output, '')}, and {other_source} writes to "
                        f"{in_words(other, '')}; allowed: a folder of its own for each recipe"
                    )
            seen.append((source, output))


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        MissingInput: there is no such file.
        UsageError: it is no regular file, too large, may not be read, is not UTF-8, or says what is not allowed.
        ReadWriteError: reading failed half-way.
    """
    return parse_recipe(*read_recipe(path))


def parse_recipe(text: str, source: str) -> Recipe:
    """Validate a recipe's text; `source` is the name that errors carry.

    Raises:
        UsageError: `source:line:column: key.path: what was found; what is allowed`.
    """
    try:
        document = read_yaml(text)
        if isinstance(document.value, dict) and "train" in document.value:
            raise at(
                document.keys[("train",)],
                "found in a recipe that is to quantize; a recipe with this section trains, with 'qlm finetune'",
                ("train",),
            )
        return _WORDS.validated(document)
    except QlmError as error:
        raise type(error)(f"{source}:{error}") from None


# --- for editors and for the README -----------------------------------------------------------------------------------

_WORDS = Words(Recipe)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors; `qlm schema` prints it."""
    return _WORDS.json_schema("qlm recipe")


def schema_table() -> str:
    """Every key of a recipe as a Markdown table: key, what is allowed, default, meaning."""
    return _WORDS.table()
