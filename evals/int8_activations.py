"""What do the int8 activations of qlm's CPU kernels change, and an int8 head?

    python evals/int8_activations.py [--windows N] [--out FILE]

Quantizes the demo's checkpoints with the recipes of recipes/demo, and measures on their held-out texts, by the protocol of README.md:

    activations   the quantized model with its kernels' int8 activations, against itself under float_activations()
    head          the float model with its head in int8 (a scale for each row, activations int8 per token), against itself
    both          the quantized model with int8 activations and an int8 head, as the engine runs it, against itself with neither

A table of KL divergences in nats with their standard errors, then one line of JSON. The exit code is 1 where a KL is 1e-3 or more, or
where the kernels are not installed.
"""

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from shared import ROOT, cpu_name, use_checkout, versions, write_json

CHECKPOINTS = ("tiny-opt", "tiny-gpt-neox", "tiny-gpt-bigcode")
BACKENDS = ("gptq", "nf4", "int8")
MOST_KL = 1e-3


def quantized(checkpoint: str, backend: str, work: Path) -> Path:
    from qlm.quantize import quantize
    from qlm.recipe import load_recipe

    recipe = load_recipe(ROOT / "recipes" / "demo" / f"{checkpoint}-{backend}.yaml")
    output = work / f"{checkpoint}-{backend}"
    quantize(recipe.model_copy(update={"output": str(output)}))
    return output


def with_float_activations(model: Any) -> Any:
    """`model`, whose forward passes run under float_activations()."""
    from qlm.kernels.ops import float_activations

    forward = model.base_model.forward

    @functools.wraps(forward)
    def run(*arguments: Any, **options: Any) -> Any:
        with float_activations():
            return forward(*arguments, **options)

    model.base_model.forward = run
    return model


def with_int8_head(model: Any) -> Any:
    """`model` with its head as the engine holds it in int8; a tied embedding stays as it is."""
    from qlm.backends.int8 import Int8Linear

    weight = model.get_output_embeddings().weight.detach()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scale.where(scale > 0, torch.ones_like(scale))).round().to(torch.int8)
    model.set_output_embeddings(Int8Linear(codes, scale, None, symmetric_input=False))
    return model


def measure(model: Any, baseline: Any, checkpoint: Path, windows: int) -> Any:
    from qlm.arch import FAMILIES
    from qlm.calibrate import bos_rule, text_ids
    from qlm.evaluate import evaluate
    from qlm.load import load_tokenizer

    spec = FAMILIES[model.config.model_type]
    language = "python" if spec.model_type == "gpt_bigcode" else "english"
    text = (ROOT / "evals" / "texts" / f"{language}.txt").read_text("utf-8")
    ids = text_ids(load_tokenizer(checkpoint), text, spec)
    length = int(getattr(model.config, spec.positions))
    return evaluate(model, ids, length=length, windows=windows, baseline=baseline, data_sha256="", bos=bos_rule(spec))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS))
    arguments.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    arguments.add_argument("--windows", type=int, default=32, help="windows of held-out text")
    arguments.add_argument("--out", type=Path, help="JSON file to write")
    options = arguments.parse_args()
    use_checkout()
    import transformers

    from qlm.kernels.cpu_ops import native
    from qlm.load import load

    library = native()
    if library is None:
        print(
            "int8_activations: qlm's CPU kernels are not installed, or QLM_KERNELS=reference; nothing to measure",
            file=sys.stderr,
        )
        return 1
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    rows: list[dict[str, Any]] = []

    def add(checkpoint: str, backend: str, what: str, model: Any, baseline: Any) -> None:
        found = measure(model, baseline, ROOT / "evals" / "checkpoints" / checkpoint, options.windows)
        rows.append(
            {
                "checkpoint": checkpoint, "backend": backend, "what": what, "activations": found.activations,
                "kl": found.kl_divergence, "kl_stderr": found.kl_stderr, "same_top1": found.same_top1,
                "perplexity": found.perplexity, "baseline_perplexity": found.baseline_perplexity,
                "tokens": found.tokens,
            }
        )  # fmt: skip

    with tempfile.TemporaryDirectory(prefix="int8_activations-") as name:
        for checkpoint in options.checkpoints:
            folder = ROOT / "evals" / "checkpoints" / checkpoint
            add(checkpoint, "float", "head", with_int8_head(load(folder)), load(folder))
            for backend in options.backends:
                made = quantized(checkpoint, backend, Path(name))
                baseline = with_float_activations(load(made))
                if backend != "int8":  # whose format rounds activations itself
                    add(checkpoint, backend, "activations", load(made), baseline)
                add(checkpoint, backend, "both", with_int8_head(load(made)), baseline)

    print(
        f"{'checkpoint':18} {'backend':8} {'what':12} {'KL, nats':>10} {'(stderr)':>10} {'same top-1':>10} {'perplexity':>18}"
    )
    for row in rows:
        print(
            f"{row['checkpoint']:18} {row['backend']:8} {row['what']:12} {row['kl']:10.2e} {row['kl_stderr']:10.1e} "
            f"{row['same_top1']:10.3%} {row['baseline_perplexity']:8.3f} {row['perplexity']:8.3f}  {row['activations']}"
        )
    report = {"rows": rows, "isa": library.isa, "cpu": cpu_name(), "versions": versions()}
    if options.out is not None:
        write_json(options.out, report)
    print(json.dumps({"rows": rows}))
    return 1 if any(not row["kl"] < MOST_KL for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
