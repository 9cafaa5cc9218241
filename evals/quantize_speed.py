"""Seconds and peak memory of GPTQ on a real shape with random weights, qlm and GPTQModel in turns.

    python evals/quantize_speed.py opt-125m --samples 32 --length 512 --peer-python PATH --repeats 3 --out evals/results
    python evals/quantize_speed.py opt-1.3b --only-memory          the checkpoint's size beside the peak of quantizing it

PATH is the python of an environment with gptqmodel (evals/peer_gptqmodel.py). Every run is a process of its own. Both sides get the
same windows of token ids; both times go from opening the checkpoint to the last byte written, imports excepted; the peer's time
without loading and saving stands beside them. Speed does not depend on the weights' values, so random ones will do; quality does,
and nothing is said about it here. The last line printed is JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared import ROOT, cpu_name, slug, status_bytes, use_checkout, versions, write_byte_tokenizer, write_json

# The published configs, as far as they differ from transformers' defaults.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "OPT",
        {"vocab_size": 512, "hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "word_embed_proj_dim": 128, "max_position_embeddings": 128},
    ),
    "opt-125m": ("OPT", {}),
    "opt-350m": (
        "OPT",
        {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "word_embed_proj_dim": 512, "do_layer_norm_before": False},
    ),
    "opt-1.3b": (
        "OPT",
        {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
         "word_embed_proj_dim": 2048},
    ),
    "pythia-1.4b": (
        "GPTNeoX",
        {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
         "num_attention_heads": 16, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "pythia-410m": (
        "GPTNeoX",
        {"vocab_size": 50304, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "santacoder-1.1b": (
        "GPTBigCode",
        {"vocab_size": 49280, "n_embd": 2048, "n_inner": 8192, "n_layer": 24, "n_head": 16, "n_positions": 2048,
         "bos_token_id": 0, "eos_token_id": 0},
    ),
}  # fmt: skip


def write_checkpoint(folder: Path, shape: str) -> Path:
    """A checkpoint of that shape: fp16 weights N(0, 0.02), a tokenizer of bytes. Kept between calls."""
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    path = folder / shape
    if (path / "config.json").exists():
        return path
    family, changes = SHAPES[shape]
    config = getattr(transformers, f"{family}Config")(**changes)
    model_class: Any = getattr(transformers, f"{family}ForCausalLM")
    # A skeleton first: building it for real would draw every weight twice, in fp32.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = model_class(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        is_norm = parameter.ndim == 1 and leaf == "weight"
        values = torch.empty(parameter.shape, dtype=torch.float16).normal_(float(is_norm), 0.02, generator=generator)
        model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(values, requires_grad=False)
    model.tie_weights()
    path.mkdir(parents=True, exist_ok=True)
    write_byte_tokenizer(path, config.vocab_size, bos_first=family == "OPT")
    unfinished = folder / f"{shape}.unfinished"
    model.save_pretrained(unfinished, max_shard_size="2GB")
    # config.json last: its presence says that the rest is there.
    for file in sorted(unfinished.iterdir(), key=lambda f: f.name == "config.json"):
        file.replace(path / file.name)
    unfinished.rmdir()
    return path


def recipe(checkpoint: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    # A token a byte here: as much text as the windows need. qlm tokenizes it with the clock running, the peer gets ids.
    text = output.parent / f"calibration-{options.samples}x{options.length}.txt"
    bytes_needed = options.samples * (options.length + 1) + 4
    source = (ROOT / "calibration_data" / "english.txt").read_bytes()
    text.write_bytes((source * (bytes_needed // len(source) + 1))[:bytes_needed].decode("utf-8", "ignore").encode())
    return {
        "model": str(checkpoint),
        "quantize": {"backend": "gptq", "bits": options.bits, "group_size": options.group_size},
        "calibration": {"data": str(text), "samples": options.samples, "length": options.length},
        "output": str(output),
    }


def write_windows(checkpoint: Path, file: Path, options: argparse.Namespace) -> None:
    """The windows that qlm will calibrate on, for the peer."""
    from qlm.arch import FAMILIES
    from qlm.calibrate import calibration_windows, read_text
    from qlm.load import load_tokenizer
    from qlm.recipe import Recipe

    section = Recipe.model_validate(recipe(checkpoint, file, options)).calibration
    assert section is not None
    model_type = json.loads((checkpoint / "config.json").read_text())["model_type"]
    windows = calibration_windows(
        read_text(section), load_tokenizer(checkpoint), FAMILIES[model_type], samples=options.samples,
        length=options.length, seed=section.seed,
    )  # fmt: skip
    file.write_text(json.dumps(windows.tolist()))


def worker(recipe_file: Path, threads: int) -> None:
    """One qlm run in this process; prints what it took."""
    import transformers

    from qlm.quantize import quantize
    from qlm.recipe import Recipe

    # The peer imports these before its clock starts; qlm would import them inside.
    for family, _ in SHAPES.values():
        getattr(transformers, f"{family}ForCausalLM")
    torch.set_num_threads(threads)
    imported = status_bytes("VmRSS")
    start = time.perf_counter()
    quantize(Recipe.model_validate_json(recipe_file.read_text()))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": status_bytes("VmHWM"), "imports_rss_bytes": imported}))


def run(command: list[str], threads: int) -> dict[str, float]:
    """The JSON of the last line that the command prints."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    try:
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        pass
    raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def summary_of(runs: list[dict[str, float]]) -> dict[str, float]:
    found = {key: round(statistics.median(r[key] for r in runs), 3) for key in runs[0]}
    return {**found, "seconds_best": round(min(r["seconds"] for r in runs), 3)}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shape", choices=SHAPES)
    arguments.add_argument("--samples", type=int, default=32, help="calibration windows")
    arguments.add_argument("--length", type=int, default=512, help="tokens in a window")
    arguments.add_argument("--bits", type=int, default=4)
    arguments.add_argument("--group-size", type=int, default=128)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=2, help="runs of each side")
    arguments.add_argument("--peer-python", type=Path, help="python of an environment with gptqmodel")
    arguments.add_argument("--peer-dtype", default="float32", help="what the peer computes in")
    arguments.add_argument(
        "--only-memory", action="store_true", help="one qlm run, its peak beside the checkpoint's size"
    )
    arguments.add_argument("--work", type=Path, help="folder for checkpoints and outputs; checkpoints stay there")
    arguments.add_argument(
        "--out", type=Path, help="folder for quantize_speed-gptq-SHAPE.json or quantize_speed-memory-SHAPE.json"
    )
    if len(sys.argv) == 4 and sys.argv[1] == "--worker":
        use_checkout()
        worker(Path(sys.argv[2]), int(sys.argv[3]))
        return 0
    options = arguments.parse_args()
    use_checkout()
    import transformers

    transformers.logging.disable_progress_bar()
    work = options.work or Path(tempfile.mkdtemp(prefix="quantize_speed-"))
    try:
        report = measure(work, options)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    if options.out is not None:
        kind = "memory" if options.only_memory else "gptq"
        write_json(options.out / f"quantize_speed-{kind}-{slug(options.shape)}.json", report)
    print(json.dumps({key: value for key, value in report.items() if key not in ("runs", "versions")}))
    return 0


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = write_checkpoint(work, options.shape)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    output, recipe_file, windows = work / "qlm-output", work / "recipe.json", work / "windows.json"
    recipe_file.write_text(json.dumps(recipe(checkpoint, output, options)))
    here = [sys.executable, str(Path(__file__).resolve()), "--worker", str(recipe_file), str(options.threads)]
    sides: dict[str, Callable[[], dict[str, float]]] = {"qlm": lambda: run(here, options.threads)}
    if options.peer_python is not None and not options.only_memory:
        write_windows(checkpoint, windows, options)
        there = [
            str(options.peer_python), str(ROOT / "evals" / "peer_gptqmodel.py"), "quantize", str(checkpoint), str(windows),
            str(work / "peer-output"), "--bits", str(options.bits), "--group-size", str(options.group_size),
            "--dtype", options.peer_dtype,
        ]  # fmt: skip
        sides["peer"] = lambda: run(there, options.threads)

        # GPTQModel compiles an extension when it first runs in an environment (42 s on two cores), which nobody's ratio should hold.
        warm_up = write_checkpoint(work, "tiny")
        few = argparse.Namespace(**{**vars(options), "samples": 4, "length": 64})
        write_windows(warm_up, work / "warm-up.json", few)
        run([*there[:3], str(warm_up), str(work / "warm-up.json"), *there[5:]], options.threads)

    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    # In turns: the machine's other load hits both alike.
    for repeat in range(1 if options.only_memory else options.repeats):
        for side, once in sides.items():
            for left_over in (output, work / "qlm-output.partial", work / "peer-output"):
                shutil.rmtree(left_over, ignore_errors=True)
            runs[side].append(once())
            found = runs[side][-1]
            print(
                f"run {repeat + 1} {side:5} {found['seconds']:8.1f} s   peak {found['peak_rss_bytes'] / 2**20:8.0f} MiB",
                flush=True,
            )
    report: dict[str, Any] = {
        "shape": options.shape, "samples": options.samples, "length": options.length, "bits": options.bits,
        "group_size": options.group_size, "threads": options.threads, "cpu": cpu_name(), "checkpoint_bytes": size,
        **{side: summary_of(results) for side, results in runs.items()},
    }  # fmt: skip
    peak = report["qlm"]["peak_rss_bytes"]
    report["peak_over_checkpoint"] = round(peak / size, 3)
    print(
        f"checkpoint {size / 2**20:.0f} MiB, qlm's peak {peak / 2**20:.0f} MiB: {report['peak_over_checkpoint']} of it"
    )
    if "peer" in report:
        ours, theirs = report["qlm"], report["peer"]
        report["time_ratio"] = round(ours["seconds"] / theirs["seconds"], 4)
        report["time_ratio_to_peers_quantize_alone"] = round(ours["seconds"] / theirs["quantize_seconds"], 4)
        report["peak_ratio"] = round(peak / theirs["peak_rss_bytes"], 4)
        print(
            f"qlm / GPTQModel: time {report['time_ratio']} (all of it, medians), {report['time_ratio_to_peers_quantize_alone']} "
            f"(qlm's all to the peer's quantize call alone), peak memory {report['peak_ratio']}"
        )
    return {**report, "runs": runs, "versions": versions()}


if __name__ == "__main__":
    sys.exit(main())
