"""Do the heads of tasks learn? Each family that has a task's class is trained on it and measured on samples from other documents.

    python evals/task_heads.py [--model tiny-opt ...] [--task question-answering ...] [--steps N] [--rows N] [--out FILE]

The samples are those of make_tasks.py and the settings those of recipes/qlora/tasks/, with the model exchanged: an NF4 base, a LoRA adapter on
all linears, the head in full. The trained adapter is then merged into the float weights and quantized to NF4 again, as `qlm merge` does, and
that folder is what `merged` measures, with code of its own here. `untrained` is a new head on the base. Accuracy is over samples, over labelled
words, or over questions of which both the start and the end are found (exact match); `commonest` is what always giving the commonest label gets.
One line a run; the last line is JSON. A run that --out has already, of the same sources and settings, is not run again.
"""

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path
from typing import Any

try:
    from evals import make_tasks
    from evals.shared import ROOT, WITHOUT_FIGURES, change_json, sources_version, use_checkout, versions
except ImportError:  # started as a file
    import make_tasks  # type: ignore[no-redef]
    from shared import ROOT, WITHOUT_FIGURES, change_json, sources_version, use_checkout, versions  # type: ignore[no-redef]

use_checkout()

import torch  # noqa: E402

import qlm  # noqa: E402
from qlm.arch import FAMILIES  # noqa: E402
from qlm.finetune import finetune  # noqa: E402
from qlm.load import load_tokenizer  # noqa: E402
from qlm.merge import merge  # noqa: E402
from qlm.recipe import DataSource, FinetuneRecipe, load_finetune_recipe  # noqa: E402
from qlm.training.data import NOT_LEARNED, collate, read_samples  # noqa: E402

MODELS = ("tiny-gpt-neox", "tiny-opt", "tiny-gpt-bigcode")
CHECKPOINTS = ROOT / "evals" / "checkpoints"
BATCH = 8


def version(task: str) -> str:
    """Of what trains, merges, loads and judges, and of what the samples and the settings are made by."""
    settings = ("evals/task_heads.py", "evals/make_tasks.py", f"recipes/qlora/tasks/{task}.yaml")
    return sources_version(("qlm.finetune", "qlm.merge", "qlm.load"), settings, WITHOUT_FIGURES)


def family_has(model: str, task: str) -> bool:
    config = json.loads((CHECKPOINTS / model / "config.json").read_text("utf-8"))
    return task in FAMILIES[config["model_type"]].model_classes


def recipe_for(model: str, task: str, folder: Path, steps: int | None) -> FinetuneRecipe:
    shipped = load_finetune_recipe(ROOT / "recipes" / "qlora" / "tasks" / f"{task}.yaml")
    values = shipped.model_dump(exclude_unset=True)
    values |= {"model": str(CHECKPOINTS / model), "output": str(folder / f"{model}-{task}")}
    values["train"] |= {"data": str(folder / f"{task}.jsonl"), "validation": str(folder / f"{task}-held-out.jsonl")}
    values["train"]["steps"] = steps or shipped.train.steps
    values["train"]["evaluate_every"] = values["train"]["steps"]  # before and after
    return FinetuneRecipe.model_validate(values)


def rows_of(model: Any, folder: str | Path, recipe: FinetuneRecipe) -> list[Any]:
    assert recipe.train.max_length is not None
    return read_samples(
        DataSource(data=str(recipe.train.validation)), load_tokenizer(folder), FAMILIES[model.config.model_type], recipe.task,
        max_length=recipe.train.max_length, packing=False, too_long=recipe.train.too_long, labels=recipe.train.labels,
    ).rows  # fmt: skip


@torch.no_grad()
def accuracy(model: Any, rows: list[Any]) -> float:
    """Share of what is to be found in the rows that the model finds."""
    right = total = 0
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH], pad_id=model.config.pad_token_id or 0)
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        if "start_positions" in batch:
            padded = batch["attention_mask"] == 0
            starts, ends = (
                logits.masked_fill(padded, float("-inf")).argmax(-1)
                for logits in (found.start_logits, found.end_logits)
            )
            hits = (starts == batch["start_positions"]) & (ends == batch["end_positions"])
            right, total = right + int(hits.sum()), total + len(hits)
        else:
            counted = batch["labels"] != NOT_LEARNED
            right += int((found.logits.argmax(-1) == batch["labels"])[counted].sum())
            total += int(counted.sum())
    return right / total


def commonest(rows: list[Any]) -> float | None:
    """Accuracy of always giving the commonest label; None for questions, which have none."""
    if "labels" not in rows[0]:
        return None
    labels = [row["labels"] if isinstance(row["labels"], list) else [row["labels"]] for row in rows]
    counts = collections.Counter(label for each in labels for label in each if label != NOT_LEARNED)
    return max(counts.values()) / counts.total()


def untrained(recipe: FinetuneRecipe, rows: list[Any]) -> float | None:
    """Accuracy of a new head; None where the model's config is for another number of labels."""
    torch.manual_seed(0)
    model = qlm.load(recipe.base_output, task=recipe.task, new_head=True, dtype="float32").eval()
    if recipe.train.labels is not None and len(recipe.train.labels) != model.config.num_labels:
        return None
    model.config.pad_token_id = model.config.pad_token_id or 0
    return accuracy(model, rows)


def measure(model: str, task: str, folder: Path, steps: int | None) -> dict[str, Any]:
    recipe = recipe_for(model, task, folder, steps)
    began = time.perf_counter()
    trained = finetune(recipe)
    seconds = time.perf_counter() - began
    merged = merge(recipe.model, trained.output, "nf4", f"{recipe.output}-merged").output
    loaded = qlm.load(merged, task=task, dtype="float32").eval()
    loaded.config.pad_token_id = loaded.config.pad_token_id or 0
    rows = rows_of(loaded, merged, recipe)
    validation = trained.training["validation"]
    return {
        "model": model, "task": task, "class": type(loaded).__name__, "steps": trained.steps, "rows": len(rows), "commonest": commonest(rows),
        "untrained": untrained(recipe, rows), "merged": accuracy(loaded, rows),
        "validation_before": validation["before"], "validation_after": validation["after"], "seconds": round(seconds, 1),
    }  # fmt: skip


def which(row: dict[str, Any]) -> tuple[str, str]:
    return row["model"], row["task"]


def keep(path: Path, row: dict[str, Any], samples: dict[str, int]) -> None:
    """Put a row into the file, in the place of the same model's and task's."""

    def change(report: Any) -> Any:
        report = report or {"samples": {}, "runs": []}
        runs = [*(other for other in report["runs"] if which(other) != which(row)), row]
        return {"samples": {**report["samples"], **samples}, "runs": runs, "versions": versions()}

    change_json(path, change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--task", nargs="+", choices=tuple(make_tasks.TASKS), default=tuple(make_tasks.TASKS))
    parser.add_argument("--steps", type=int, help="of each run; the recipe's by default")
    parser.add_argument("--rows", type=int, help="only the first so many held-out samples")
    parser.add_argument("--out", type=Path, help="JSON file to add to")
    parser.add_argument("--force", action="store_true", help="run what is there already")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = []
    there = (
        json.loads(options.out.read_text("utf-8"))["runs"] if options.out is not None and options.out.exists() else []
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        samples = make_tasks.write(folder)
        for name in samples if options.rows is not None else ():
            if name.endswith("-held-out.jsonl"):
                lines = (folder / name).read_text("utf-8").splitlines(keepends=True)[: options.rows]
                (folder / name).write_text("".join(lines), "utf-8")
                samples[name] = len(lines)
        for task in options.task:
            for model in options.model:
                if not family_has(model, task):
                    continue
                asked = {
                    "version": version(task),
                    "asked": {"steps": options.steps, "held_out": samples[f"{task}-held-out.jsonl"]},
                }
                same = [row for row in there if which(row) == (model, task) and asked.items() <= row.items()]
                if same and not options.force:
                    found += same
                    print(f"{task:24} {model:17} there already", flush=True)
                    continue
                row = {**measure(model, task, folder, options.steps), **asked}
                found.append(row)
                if options.out is not None:
                    keep(options.out, row, samples)
                shown = {key: row[key] for key in ("commonest", "untrained", "merged")}
                cells = "  ".join(f"{key} {'-' if value is None else f'{value:.1%}'}" for key, value in shown.items())
                print(f"{task:24} {model:17} {row['class']:36} {cells}  {row['seconds']:.0f} s", flush=True)
    print(json.dumps({"samples": samples, "runs": found, "versions": versions()}))


if __name__ == "__main__":
    main()
