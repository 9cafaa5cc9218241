"""Does a folder that qlm wrote give the same logits in the software that its format belongs to?

    python evals/equivalence.py [--checkpoints FOLDER ...] [--gptqmodel-python PATH] [--out FILE]

Quantizes each checkpoint (the demo's by default; one that is not there is left out, and said so), loads the folder with qlm.load and
with plain transformers, and compares logits on held-out text, on the CPU in float32, qlm's under float_activations(): formats are
compared, and not the rounding of activations to int8 that qlm's CPU kernels of 4-bit formats add (evals/LOG.md has its KL):

    int8    transformers with compressed-tensors: as it is; for OPT also with a scale for each token in fc1 and fc2, where
            compressed-tensors 0.20 takes one for all tokens, since OPT flattens them there
    nf4     transformers with bitsandbytes: as config.json has it, computing in bf16; in float32; and in float32 without its repacking,
            which rounds absmax to bf16 (evals/LOG.md)
    gptq    GPTQModel, with its torch kernel, in an environment of its own (evals/peer_gptqmodel.py): as it is; for GPT-NeoX also with
            the head put in, which GPTQModel 7.7.0 does not find under its published name and leaves uninitialised

A table of the largest difference of a logit and the share of positions with the same most likely token, then one line of JSON.
For int8 it also says how far single linears are apart on the same input, relative to their largest output: activations are rounded
while running, and the last bit of a float32 sum decides now and then which way, which shows in the logits but is no disagreement.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shared import ROOT, cpu_name, use_checkout, versions, write_json
from torch import Tensor

CHECKPOINTS = tuple(ROOT / "evals" / "checkpoints" / name for name in ("tiny-opt", "tiny-gpt-neox", "tiny-gpt-bigcode"))
BACKENDS: dict[str, dict[str, Any]] = {
    "int8": {"backend": "int8"},
    "nf4": {"backend": "nf4"},
    "nf4 double": {"backend": "nf4", "double_quant": True},
    "gptq 4-bit": {"backend": "gptq"},
}


def language_of(folder: Path) -> str:
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return "python" if model_type == "gpt_bigcode" else "english"


def make(folder: Path, backend: str, work: Path) -> Path:
    from qlm.quantize import quantize
    from qlm.recipe import Recipe

    output = work / f"{folder.name}-{backend.replace(' ', '-')}"
    sections: dict[str, Any] = {"model": str(folder), "quantize": BACKENDS[backend], "output": str(output)}
    if BACKENDS[backend]["backend"] == "gptq":
        text = str(ROOT / "calibration_data" / f"{language_of(folder)}.txt")
        sections["calibration"] = {"data": text, "samples": 32}
    quantize(Recipe.model_validate(sections))
    return output


def windows_of(folder: Path, count: int) -> Tensor:
    """The first windows of the held-out text: int64 [count, length]."""
    from qlm.arch import FAMILIES
    from qlm.calibrate import text_ids
    from qlm.load import load_tokenizer

    config = json.loads((folder / "config.json").read_text())
    spec = FAMILIES[config["model_type"]]
    length = min(int(config.get(spec.positions, 2048)), 512)
    # Four bytes a token are more than any tokenizer here needs for these windows.
    text = (ROOT / "evals" / "texts" / f"{language_of(folder)}.txt").read_text("utf-8")[: 16 * count * length]
    ids = text_ids(load_tokenizer(folder), text, spec)
    return ids[: count * length].view(count, length)


@torch.no_grad()
def logits_of(model: Any, windows: Tensor) -> Tensor:
    return torch.cat([model(input_ids=row[None], use_cache=False).logits.float() for row in windows])


def plain_transformers(folder: Path) -> Any:
    """As anybody loads it, in float32.

    transformers 5.23 leaves the fp16 `weight`s of a bitsandbytes folder that are no linears' in fp16 whatever is asked for; they are
    widened here, which loses nothing.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def compute_in_float32(model: Any, repack: bool) -> Any:
    """Let bitsandbytes' linears compute in float32, with or without its repacking."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            if not repack:
                module.support_avx512bf16_for_cpu = False
    return model


def keep_tokens_apart(model: Any) -> Any:
    """Give the matrices [T, I] that OPT makes before fc1 a dimension more, so that compressed-tensors sees tokens."""

    def before(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].unsqueeze(1),) if args[0].ndim == 2 else args

    def after(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.squeeze(1)

    for name, module in model.named_modules():
        if name.endswith((".fc1", ".fc2")):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    return model


@torch.no_grad()
def worst_linear(ours: Any, theirs: Any, windows: Tensor) -> float:
    """Largest difference of a quantized linear's output on the input that it gets in their model, over its largest output."""
    found = [0.0]

    def compare_with(mine: Any) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(((mine(args[0]) - output).abs().max() / output.abs().max()).item())

        return hook

    handles = [
        module.register_forward_hook(compare_with(ours.get_submodule(name)), prepend=True)
        for name, module in theirs.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    ]
    theirs(input_ids=windows[:1], use_cache=False)
    for handle in handles:
        handle.remove()
    return max(found)


def gptqmodel_logits(python: Path, folder: Path, windows: Tensor, work: Path, *flags: str) -> Tensor:
    """GPTQModel's logits, computed by another interpreter."""
    file, found = work / "windows.json", work / "logits.pt"
    file.write_text(json.dumps(windows.tolist()))
    command = [
        str(python),
        str(ROOT / "evals" / "peer_gptqmodel.py"),
        "logits",
        str(folder),
        str(file),
        str(found),
        *flags,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(
            f"exit code {done.returncode}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}"
        )
    return torch.load(found, weights_only=True)


Other = tuple[str, Callable[[], tuple[Tensor, dict[str, float]]]]


def others(backend: str, folder: Path, ours: Any, windows: Tensor, work: Path, python: Path | None) -> Iterator[Other]:
    """What else reads the folder: its name, and a function that gives its logits and further figures."""

    def compressed_tensors(change: Callable[[Any], Any]) -> tuple[Tensor, dict[str, float]]:
        theirs = change(plain_transformers(folder))
        return logits_of(theirs, windows), {"worst_linear": worst_linear(ours, theirs, windows)}

    def bitsandbytes(change: Callable[[Any], Any]) -> tuple[Tensor, dict[str, float]]:
        return logits_of(change(plain_transformers(folder)), windows), {}

    if backend == "int8":
        yield "compressed-tensors, as it is", partial(compressed_tensors, lambda model: model)
        if ours.config.model_type == "opt":
            yield "compressed-tensors, a scale for each token", partial(compressed_tensors, keep_tokens_apart)
    elif backend.startswith("nf4"):
        yield "bitsandbytes, as config.json has it (bf16)", partial(bitsandbytes, lambda model: model)
        yield "bitsandbytes, float32", partial(bitsandbytes, partial(compute_in_float32, repack=True))
        yield "bitsandbytes, float32, no repacking", partial(bitsandbytes, partial(compute_in_float32, repack=False))
    elif python is not None:
        yield "GPTQModel, as it is", lambda: (gptqmodel_logits(python, folder, windows, work), {})
        if ours.config.model_type == "gpt_neox":
            restored = partial(gptqmodel_logits, python, folder, windows, work, "--restore-head")
            yield "GPTQModel, with the head put in", lambda: (restored(), {})


def compare(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    if not bool(theirs.isfinite().all()):
        raise ValueError("their logits are NaN or infinite")
    return {
        "largest_logit_difference": (ours - theirs).abs().max().item(),
        "logit_std": ours.std().item(),
        "same_argmax": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--checkpoints", type=Path, nargs="+", default=list(CHECKPOINTS))
    arguments.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    arguments.add_argument("--windows", type=int, default=8, help="windows of held-out text")
    arguments.add_argument("--gptqmodel-python", type=Path, help="python of an environment with gptqmodel")
    arguments.add_argument("--out", type=Path, help="JSON file to write")
    options = arguments.parse_args()
    use_checkout()
    import transformers

    from qlm.kernels.ops import float_activations
    from qlm.load import load

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="equivalence-") as name:
        work = Path(name)
        for checkpoint in options.checkpoints:
            if not (checkpoint / "model.safetensors").is_file():
                left_out.append(f"{checkpoint.name}: no model.safetensors there")
                continue
            windows = windows_of(checkpoint, options.windows)
            for backend in options.backends:
                if backend.startswith("gptq") and options.gptqmodel_python is None:
                    left_out.append(f"{checkpoint.name} {backend}: no --gptqmodel-python")
                    continue
                folder = make(checkpoint, backend, work)
                model = load(folder, dtype="float32")
                with float_activations():
                    ours = logits_of(model, windows)
                for other, run in others(backend, folder, model, windows, work, options.gptqmodel_python):
                    row = {"checkpoint": checkpoint.name, "backend": backend, "other": other}
                    try:
                        theirs, facts = run()
                        rows.append({**row, "positions": windows.numel(), **compare(ours, theirs), **facts})
                    except Exception as error:  # what another library throws is the result for it
                        text = (str(error).strip() or "no message").splitlines()[0]
                        rows.append({**row, "error": f"{type(error).__name__}: {text}"})

    print(f"{'checkpoint':18} {'backend':11} {'against':44} {'largest':>9} {'std':>6} {'same':>9} {'linear':>9}")
    for row in rows:
        head = f"{row['checkpoint']:18} {row['backend']:11} {row['other']:44}"
        if "error" in row:
            print(f"{head} {row['error']}")
        else:
            linear = f"{row['worst_linear']:9.1e}" if "worst_linear" in row else ""
            print(
                f"{head} {row['largest_logit_difference']:9.2e} {row['logit_std']:6.2f} {row['same_argmax']:9.4%} {linear}".rstrip()
            )
    for line in left_out:
        print(f"left out: {line}")
    report = {"rows": rows, "left_out": left_out, "cpu": cpu_name(), "versions": versions()}
    if options.out is not None:
        write_json(options.out, report)
    print(json.dumps({"rows": rows, "left_out": left_out}))
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
