"""A recipe from start to end: refuse early, quantize, measure against the float model, and give a row for the table."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qlm.adapters import apply_adapter
from qlm.arch import FAMILIES
from qlm.calibrate import Text, bos_rule, read_text, text_ids, window_length
from qlm.checkpoint.adapter import files_on_record, read_adapter, refuse_other_base
from qlm.checkpoint.reader import Checkpoint
from qlm.engine.engine import Engine
from qlm.engine.runtime import Runtime
from qlm.evaluate import Evaluation, evaluate, evaluate_engine
from qlm.load import load, load_tokenizer
from qlm.memory import peak_memory
from qlm.plan import plan, refuse_if_too_large
from qlm.quantize import quantize
from qlm.recipe import DataSource, Recipe
from qlm.report import Row, Steps


def load_with_adapter(
    model: str | Path, adapter: str | Path | None, *, revision: str | None = None, **options: Any
) -> Any:
    """transformers' model, as `load` gives it, with an adapter's layers inside where there is an adapter.

    Raises:
        QlmError: as `load` and `apply_adapter`; DataError where the adapter's manifest names another base.
    """
    if adapter is not None:
        # Which base it is for is asked first: loading takes longer.
        folder = Checkpoint.open(model, revision).folder
        refuse_other_base(read_adapter(adapter), folder, files_on_record(model, revision))
    loaded = load(model, revision=revision, **options)
    return loaded if adapter is None else apply_adapter(loaded, adapter).get_base_model()


def evaluate_on(
    model: str | Path,
    source: DataSource | Text,
    *,
    length: int | None,
    windows: int | None = None,
    adapter: str | Path | None = None,
    baseline: str | Path | None = None,
    revision: str | None = None,
    baseline_revision: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    attn_implementation: str = "sdpa",
    runtime: Runtime = "transformers",
    threads: int | None = None,
    head: str = "auto",
    cache_dtype: str = "auto",
    tell: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a model on a text, and its KL divergence from `baseline`, by the canonical protocol (evaluate.py).

    adapter: folder of an adapter of `model`, not of the baseline.
    threads, head, cache_dtype: of the engine, where that is the `runtime`; a baseline's head and cache are float there.
    """
    text = source if isinstance(source, Text) else read_text(source)
    if runtime == "engine":
        with ExitStack() as opened:
            engine = opened.enter_context(
                Engine(model, revision=revision, threads=threads, head=head, cache_dtype=cache_dtype, adapter=adapter)
            )
            reference = None
            if baseline is not None:
                reference = opened.enter_context(
                    Engine(baseline, revision=baseline_revision, threads=threads, head="float", cache_dtype="float32")
                )
            size = window_length(length, engine.decoder.positions)
            ids = text_ids(load_tokenizer(model, revision=revision), text.joined, engine.spec)
            if isinstance(tell, Steps):
                tell.tokens_per_unit["evaluate"] = size
            return evaluate_engine(
                engine,
                ids,
                length=size,
                baseline=reference,
                windows=windows,
                data_sha256=text.sha256,
                bos=bos_rule(engine.spec),
                progress=None if tell is None else lambda done, total: tell("evaluate", done, total),
            )
    loaded = load_with_adapter(
        model, adapter, revision=revision, device=device, dtype=dtype, attn_implementation=attn_implementation
    )
    other = None
    if baseline is not None:
        other = load(
            baseline, revision=baseline_revision, device=device, dtype=dtype, attn_implementation=attn_implementation
        )
    spec = FAMILIES[loaded.config.model_type]
    size = window_length(length, int(getattr(loaded.config, spec.positions)))
    ids = text_ids(load_tokenizer(model, revision=revision), text.joined, spec)
    if isinstance(tell, Steps):
        tell.tokens_per_unit["evaluate"] = size
    return evaluate(
        loaded,
        ids,
        length=size,
        baseline=other,
        windows=windows,
        data_sha256=text.sha256,
        bos=bos_rule(spec),
        progress=None if tell is None else lambda done, total: tell("evaluate", done, total),
    )


def run_recipe(
    name: str, recipe: Recipe, *, force: bool = False, device: str = "cpu", tell: Steps | None = None
) -> Row:
    """Quantize as the recipe says, and evaluate where it says so. `name` is what the row calls it."""
    # A text that cannot be read is better known now than in an hour.
    text = None if recipe.evaluate is None else read_text(recipe.evaluate)
    refuse_if_too_large(recipe, plan(recipe, device))
    peak_memory(reset=True)
    start = time.perf_counter()
    result = quantize(recipe, force=force, device=device, progress=tell)
    quantize_seconds = time.perf_counter() - start
    peak = peak_memory()
    evaluation = None
    start = time.perf_counter()
    if recipe.evaluate is not None and text is not None:
        evaluation = evaluate_on(
            result.output,
            text,
            length=recipe.evaluate.length,
            windows=recipe.evaluate.windows,
            baseline=recipe.model,
            baseline_revision=recipe.revision,
            device=device,
            attn_implementation=recipe.attn_implementation,
            tell=tell,
        )
    seconds = time.perf_counter() - start if evaluation is not None else 0.0
    section = recipe.quantize
    backend: str = section.backend
    if section.backend == "gptq":
        backend += (
            f" {section.bits}-bit" if result.choice is None else f" mixed {result.choice['average_bits']:.2f}-bit"
        )
    # int8 and nf4 without a text are `fast` by themselves.
    asked_for = "quality" in section.model_fields_set and (section.quality != "fast" or recipe.calibration is not None)
    if asked_for:
        backend += f", {section.quality}"
    return Row(name, Path(recipe.model).name, backend, result, evaluation, quantize_seconds, seconds, peak)
