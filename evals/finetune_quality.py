"""What 4 bits in the base cost a fine-tuned model, and what merging costs: the demo's recipes, and the same on the float base.

    python evals/finetune_quality.py                            the three recipes as they are; what is there already is not run again
    python evals/finetune_quality.py --recipes recipes/qlora/tiny-opt.yaml --steps 60
    python evals/finetune_quality.py --table                    the table of the results so far; runs nothing

For each recipe (NF4 base, LoRA) qlm trains the adapter, and a second one on the float base with the same data, seed and steps; then merges the
first into float, nf4, gptq and int8: onto the float weights, and onto what the NF4 weights stand for. Quantizing looks at windows of the
training text. Perplexity, and for merged models KL divergence from the NF4 base with the adapter beside it, are taken on one held-out text
of the kind that was trained on, by the protocol of evals/README.md, with float activations (`float_activations()`).

The adapter is also loaded by plain PEFT on plain transformers, over bitsandbytes' reading of the NF4 base (in float32, without its
repacking) and over the float base: the largest difference of a logit from qlm's.

A recipe's row is kept in --out as soon as it is there, with the version of the sources that made it, and measured anew when those or the settings
are others; with --work an interrupted row goes on where it was. The last line printed is JSON; the exit code is 1 if a row failed.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from equivalence import compute_in_float32, logits_of, plain_transformers
from quality_subject import remember_hidden_states
from shared import ROOT, WITHOUT_FIGURES, change_json, cpu_name, slug, sources_version, use_checkout, versions

OUT = ROOT / "evals" / "results" / "finetune_quality.json"
RECIPES = tuple(ROOT / "recipes" / "qlora" / f"tiny-{name}.yaml" for name in ("opt", "gpt-neox", "gpt-bigcode"))
INTO = ("float", "nf4", "gptq", "int8")
# To be raised when rows are measured in another way.
JUDGE = 1
# Windows on which qlm's logits are compared with PEFT's.
COMPARED_WINDOWS = 2

# Cells in the order of the table.
IN_WORDS = {
    "float": "float, as it was",
    "nf4": "NF4, as it was",
    "float + adapter": "float + LoRA",
    "nf4 + adapter": "NF4 + LoRA",
    **{
        f"{into} from {onto}": f"NF4 + LoRA, merged onto {'the float' if onto == 'float' else 'its NF4'} weights, {words}"
        for onto in ("float", "nf4")
        for into, words in (("float", "float"), ("nf4", "NF4"), ("gptq", "GPTQ 4-bit"), ("int8", "int8"))
    },
}


class Subject:
    """A recipe, as it is run here, and the held-out text.

    Attributes:
        name: of the checkpoint. recipe, float_recipe: on the NF4 base and on the float one. work: folder of everything that is written.
        model: folder of the float checkpoint.
        ids, length, windows: the held-out text, and how it is cut.
        protocol: what the figures depend on. digest: of it.
    """

    def __init__(self, file: Path, options: argparse.Namespace, work: Path) -> None:
        from qlm.arch import FAMILIES
        from qlm.calibrate import bos_rule, read_text, text_ids, window_length
        from qlm.checkpoint import manifest
        from qlm.checkpoint.reader import Checkpoint
        from qlm.load import load_tokenizer
        from qlm.recipe import DataSource, FinetuneRecipe, load_finetune_recipe, resolved_finetune

        given = load_finetune_recipe(file)
        if given.quantize is None or given.quantize.backend != "nf4" or not isinstance(given.train.data, str):
            raise SystemExit(f"{file}: a recipe that quantizes into nf4 and trains on a text file is needed")
        self.name = Path(given.model).name
        # The recipes' paths are seen from the repository's root.
        self.model, self.data = ROOT / given.model, ROOT / given.train.data
        plain = given.model_dump(mode="json", exclude_unset=True)
        plain |= {"model": str(self.model), "output": str(work / "nf4")}
        plain["train"] |= {"data": str(self.data)}
        if options.steps is not None:
            plain["train"]["steps"] = options.steps
        resolved = resolved_finetune(FinetuneRecipe.model_validate(plain))
        shown = {key: resolved[key] for key in ("adapter", "quantize", "train")}

        held_out = options.text or ROOT / "evals" / "texts" / self.data.name
        text = read_text(DataSource(data=str(held_out)))
        files = Checkpoint.open(self.model)
        self.spec = FAMILIES[files.config["model_type"]]
        self.bos, self.text_sha256 = bos_rule(self.spec), text.sha256
        self.ids = text_ids(load_tokenizer(self.model), text.joined, self.spec)
        self.length = window_length(options.length, int(files.config[self.spec.positions]))
        self.windows = min(options.windows, len(self.ids) // self.length)
        self.calibration = {"samples": options.samples, "length": self.length}
        self.protocol = {
            "judge": JUDGE,
            "checkpoint": self.name,
            "files": {name: fact["sha256"] for name, fact in manifest.input_facts(files.files()).items()},
            "recipe": {**shown, "train": {**shown["train"], "data": self.data.name}},
            "trained_on_sha256": read_text(DataSource(data=str(self.data))).sha256,
            "text": text.description,
            "text_sha256": text.sha256,
            "length": self.length,
            "windows": self.windows,
            "bos": self.bos,
            "merging": {**self.calibration, "data": self.data.name, "quality": "balanced", "into": INTO},
            "activations": "float_activations(), in float32; while training as it is",
        }
        self.digest = hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()[:12]
        # What another protocol left in a folder that is kept would be in the way.
        self.work = work / f"{self.name}-{self.digest}"
        self.recipe = FinetuneRecipe.model_validate({**plain, "output": str(self.work / "nf4")})
        self.float_recipe = FinetuneRecipe.model_validate(
            {key: value for key, value in plain.items() if key not in ("quantize", "calibration")}
            | {"output": str(self.work / "float")}
        )

    def judge(self, model: Any, baseline: Any = None) -> dict[str, Any]:
        from qlm.evaluate import evaluate
        from qlm.kernels.ops import float_activations

        with float_activations():
            found = evaluate(
                model, self.ids, length=self.length, windows=self.windows, baseline=baseline, data_sha256=self.text_sha256,
                bos=self.bos,
            )  # fmt: skip
        figures = {"perplexity": found.perplexity, "perplexity_stderr": found.perplexity_stderr}
        if baseline is not None:
            figures |= {"kl": found.kl_divergence, "kl_stderr": found.kl_stderr}
        return figures


def with_adapter(base: Path, adapter: Path) -> Any:
    """transformers' model with the adapter's layers in it, in float32."""
    from qlm.adapters import apply_adapter
    from qlm.load import load

    return apply_adapter(load(base, dtype="float32"), adapter).get_base_model()


def by_peft(base: Path, adapter: Path) -> Any:
    """As anybody loads the two without qlm, computing in float32."""
    import peft

    model: Any = peft.PeftModel.from_pretrained(plain_transformers(base), str(adapter))
    return compute_in_float32(model, repack=False).eval()


@torch.no_grad()
def logit_difference(subject: Subject, base: Path, adapter: Path) -> dict[str, float]:
    from qlm.kernels.ops import float_activations

    windows = subject.ids[: COMPARED_WINDOWS * subject.length].view(-1, subject.length)
    with float_activations():
        ours = logits_of(with_adapter(base, adapter).eval(), windows)
    peers = by_peft(base, adapter)
    theirs = logits_of(peers, windows)
    with peers.disable_adapter():
        without = logits_of(peers, windows)
    return {
        "largest_difference": (ours - theirs).abs().max().item(),
        "largest_change_by_the_adapter": (theirs - without).abs().max().item(),
        "same_top1": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }


def merged(subject: Subject, onto: str, into: str, adapter: Path) -> Path:
    """The folder that `qlm merge` makes of the adapter."""
    from qlm.merge import merge
    from qlm.recipe import CalibrationRecipe

    output = subject.work / slug(f"{into} from {onto}")
    base = subject.model if onto == "float" else subject.recipe.base_output
    calibration = None
    if into != "float":
        calibration = CalibrationRecipe.model_validate({"data": str(subject.data), **subject.calibration})
    merge(base, adapter, into, output, calibration=calibration)
    return output


def row_of(subject: Subject, threads: int) -> dict[str, Any]:
    from qlm.checkpoint.adapter import WEIGHTS
    from qlm.finetune import finetune
    from qlm.load import load

    began = time.perf_counter()
    cells: dict[str, dict[str, Any]] = {}

    def keep(name: str, model: Any, baseline: Any = None) -> None:
        cells[name] = subject.judge(model, baseline)
        print(f"{subject.name:18} {IN_WORDS[name]:58} {cells[name]['perplexity']:8.3f}", flush=True)

    result = finetune(subject.recipe)
    base, adapter = Path(subject.recipe.base_output), result.output
    beside = finetune(subject.float_recipe)
    keep("float", load(subject.model, dtype="float32"))
    keep("nf4", load(base, dtype="float32"))
    keep("float + adapter", with_adapter(subject.model, beside.output))
    apart = with_adapter(base, adapter)
    remember_hidden_states(apart)
    keep("nf4 + adapter", apart)
    for onto in ("float", "nf4"):
        for into in INTO:
            keep(f"{into} from {onto}", load(merged(subject, onto, into, adapter), dtype="float32"), apart)
    losses = {
        side: {"first": each.training["loss"]["first"], "last": each.training["loss"]["last"]}
        for side, each in (("nf4", result), ("float", beside))
    }
    return {
        "checkpoint": subject.name,
        "protocol": subject.digest,
        "version": version(),
        "steps": result.steps,
        "trained_on": subject.data.name,
        "trainable_parameters": result.training["trainable_parameters"],
        "adapter_bytes": (adapter / WEIGHTS).stat().st_size,
        "cells": cells,
        "nf4_over_float": cells["nf4 + adapter"]["perplexity"] / cells["float + adapter"]["perplexity"],
        "training_loss": losses,
        "by_plain_peft": {
            "over bitsandbytes NF4": logit_difference(subject, base, adapter),
            "over float": logit_difference(subject, subject.model, adapter),
        },
        "threads": threads,
        "seconds": round(time.perf_counter() - began, 1),
    }


def version() -> str:
    """Of what trains, merges, loads and judges."""
    return sources_version(("qlm.finetune", "qlm.merge", "qlm.load", "qlm.evaluate"), without=WITHOUT_FIGURES)


# --- the file and its table -------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []


def keep_row(path: Path, row: dict[str, Any], protocol: Mapping[str, Any]) -> None:
    """Put a row into the file, in the place of the same checkpoint's."""

    def change(report: Any) -> Any:
        report = report or {"rows": [], "protocols": {}}
        return {
            "rows": [*(other for other in report["rows"] if other["checkpoint"] != row["checkpoint"]), row],
            "protocols": {**report["protocols"], row["checkpoint"]: protocol},
            "cpu": cpu_name(),
            "versions": versions(),
        }

    change_json(path, change)


def in_table(cell: Mapping[str, Any]) -> str:
    kl = f" · {cell['kl']:.3g}" if "kl" in cell else ""
    return f"{cell['perplexity']:.2f}{kl}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One column a checkpoint: perplexities, and below them what else is known of the adapter."""

    def line(label: str, values: Sequence[str]) -> str:
        return f"| {label} | {' | '.join(values)} |"

    def difference(row: Mapping[str, Any], base: str) -> str:
        found = row["by_plain_peft"][base]
        return f"{found['largest_difference']:.1e} of {found['largest_change_by_the_adapter']:.1f}"

    return "\n".join(
        [
            line("perplexity · KL in nats from NF4 + LoRA", [row["checkpoint"] for row in rows]),
            "|---" * (len(rows) + 1) + "|",
            line("learns", [f"{row['trained_on']}, {row['steps']} steps" for row in rows]),
            *(line(words, [in_table(row["cells"][name]) for row in rows]) for name, words in IN_WORDS.items()),
            line("NF4 + LoRA over float + LoRA", [f"{row['nf4_over_float']:.4f}" for row in rows]),
            line("trained parameters", [f"{row['trainable_parameters']:,}" for row in rows]),
            line("bytes of the adapter", [f"{row['adapter_bytes']:,}" for row in rows]),
            line(
                "plain PEFT over bitsandbytes NF4: largest logit difference, of what the adapter changes",
                [difference(row, "over bitsandbytes NF4") for row in rows],
            ),
            line("the same over float", [difference(row, "over float") for row in rows]),
        ]
    )


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--recipes", nargs="+", type=Path, default=list(RECIPES))
    arguments.add_argument("--steps", type=int, help="instead of the recipe's")
    arguments.add_argument("--windows", type=int, default=128, help="of held-out text")
    arguments.add_argument("--length", type=int, default=512, help="tokens in a window, at most all positions")
    arguments.add_argument("--samples", type=int, default=32, help="calibration windows of what is merged")
    arguments.add_argument("--text", type=Path, help="held-out text instead of evals/texts")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--force", action="store_true", help="run rows that are there already")
    arguments.add_argument("--table", action="store_true", help="print the table of --out")
    arguments.add_argument("--work", type=Path, help="folder to keep adapters and models in")
    arguments.add_argument("--out", type=Path, default=OUT, help="JSON file to add to")
    return arguments.parse_args()


def run(options: argparse.Namespace, work: Path) -> list[str]:
    """Every row that is missing; messages of those that failed."""
    failed = []
    for file in options.recipes:
        subject = Subject(file, options, work)
        known = [row for row in rows_of(options.out) if row["checkpoint"] == subject.name]
        # Rows of before there were versions have none.
        same = [row for row in known if (row["protocol"], row.get("version")) == (subject.digest, version())]
        if same and not options.force:
            print(f"{subject.name}: there already", flush=True)
            continue
        try:
            row = row_of(subject, options.threads)
        # What another library throws is the result for it.
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            failed.append(f"{subject.name}: {type(error).__name__}: {first}")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        keep_row(options.out, row, subject.protocol)
    return failed


def main() -> int:
    options = parse()
    use_checkout()
    if options.table:
        print(markdown(rows_of(options.out)))
        return 0
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    place: AbstractContextManager[Any] = tempfile.TemporaryDirectory(prefix="finetune-quality-")
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        place = nullcontext(options.work)
    with place as work:
        failed = run(options, Path(work))
    rows = rows_of(options.out)
    print(markdown(rows))
    ratios = {row["checkpoint"]: round(row["nf4_over_float"], 5) for row in rows}
    print(json.dumps({"nf4_over_float": ratios, "rows": len(rows), "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
