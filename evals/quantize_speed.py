"""Seconds and peak memory of GPTQ on a real shape with random weights, qlm and GPTQModel in turns.

    python evals/quantize_speed.py opt-125m --samples 32 --length 512 --peer-python PATH --repeats 3 --out evals/results
    python evals/quantize_speed.py opt-1.3b --only-memory          the checkpoint's size beside the peak of quantizing it
    python evals/quantize_speed.py opt-6.7b --device cuda --samples 128 --length 2048 --repeats 1 --out evals/results   on a GPU

PATH is the python of an environment with gptqmodel (evals/peer_gptqmodel.py). Every run is a process of its own. Both sides get the
same windows of token ids; both times go from opening the checkpoint to the last byte written, imports excepted; the peer's time
without loading and saving stands beside them. Speed does not depend on the weights' values, so random ones will do; quality does,
and nothing is said about it here. On a GPU qlm runs alone, and the most that torch allocated there stands beside the time. `--blocks N` takes
only so many of the shape's blocks: each costs the same, so that a few say how long all of them will take. A line on stderr tells of every block
that is done, and beside where the report will be lies a file `.unfinished.json` with these until then: a run that is killed has not been
in vain. The last line printed is JSON.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_cells import NO_GPU, say_goal
from shared import (
    ROOT,
    change_json,
    cpu_name,
    driver_version,
    slug,
    status_bytes,
    use_checkout,
    versions,
    write_byte_tokenizer,
    write_json,
)

# What a line of a worker's stderr begins with that is for the report.
PROGRESS = "progress "

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
    "opt-6.7b": (
        "OPT",
        {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
         "word_embed_proj_dim": 4096},
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
    "pythia-6.9b": (
        "GPTNeoX",
        {"vocab_size": 50432, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
         "num_attention_heads": 32, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "santacoder-1.1b": (
        "GPTBigCode",
        {"vocab_size": 49280, "n_embd": 2048, "n_inner": 8192, "n_layer": 24, "n_head": 16, "n_positions": 2048,
         "bos_token_id": 0, "eos_token_id": 0},
    ),
}  # fmt: skip


def config_of(shape: str | tuple[str, Mapping[str, Any]], blocks: int | None = None) -> Any:
    """transformers' config of a shape, by its name here or as it would stand here; with fewer blocks if told so."""
    import transformers

    family, changes = SHAPES[shape] if isinstance(shape, str) else shape
    config = getattr(transformers, f"{family}Config")(**changes)
    if blocks is not None:
        # Under its common name, which every family's config understands.
        config.num_hidden_layers = blocks
    return config


def write_checkpoint(folder: Path, shape: str, device: str = "cpu", blocks: int | None = None) -> Path:
    """A checkpoint of that shape: fp16 weights N(0, 0.02), drawn on the device, a tokenizer of bytes. Kept between calls."""
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    path = folder / (shape if blocks is None else f"{shape}-{blocks}-blocks")
    if (path / "config.json").exists():
        return path
    family = SHAPES[shape][0]
    config = config_of(shape, blocks)
    model_class: Any = getattr(transformers, f"{family}ForCausalLM")
    # A skeleton first: building it for real would draw every weight twice, in fp32.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = model_class(config)
    # Seven billion numbers take a CPU minutes, and a GPU less than writing them does.
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        is_norm = parameter.ndim == 1 and leaf == "weight"
        values = torch.empty(parameter.shape, dtype=torch.float16, device=device)
        values = values.normal_(float(is_norm), 0.02, generator=generator).cpu()
        model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(values, requires_grad=False)
    if device != "cpu":
        # For those who come after, in processes of their own.
        torch.cuda.empty_cache()
    model.tie_weights()
    path.mkdir(parents=True, exist_ok=True)
    write_byte_tokenizer(path, config.vocab_size, bos_first=family == "OPT")
    unfinished = folder / f"{path.name}.unfinished"
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


def worker(recipe_file: Path, threads: int, device: str) -> None:
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

    def tell(what: str, done: int, total: int) -> None:
        row: dict[str, Any] = {
            "what": what,
            "done": done,
            "of": total,
            "seconds": round(time.perf_counter() - start, 2),
        }
        row["peak_rss_bytes"] = status_bytes("VmHWM")
        if device != "cpu":
            row["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
        print(f"{PROGRESS}{json.dumps(row)}", file=sys.stderr, flush=True)

    quantize(Recipe.model_validate_json(recipe_file.read_text()), device=device, progress=tell)
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "peak_rss_bytes": status_bytes("VmHWM"), "imports_rss_bytes": imported}
    if device != "cpu":
        found |= {
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_gpu_bytes": torch.cuda.max_memory_reserved(device),
        }
    print(json.dumps(found))


def run(
    command: list[str], threads: int, device: str = "cpu", heard: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, float]:
    """The JSON of the last line that the command prints. `heard` is told of its progress meanwhile."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    }  # fmt: skip
    said: list[str] = []
    # To a file: of two pipes one might fill up while the other is read.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        process = subprocess.Popen(
            command,
            stdout=printed,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
        try:
            for line in process.stderr or ():
                if line.startswith(PROGRESS):
                    if heard is not None:
                        heard(json.loads(line.removeprefix(PROGRESS)))
                else:
                    said.append(line)
            code = process.wait()
        finally:
            # Where this process is told to end, the other one would go on.
            process.kill()
            process.wait()
        printed.seek(0)
        output = printed.read()
    try:
        if code == 0:
            return json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        pass
    raise SystemExit(f"{' '.join(command)}: exit code {code}\n{output[-2000:]}\n{''.join(said)[-4000:]}")


def end_on_sigterm() -> None:
    """As an exception, so that what should be cleared away is: `timeout` ends a run so."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def summary_of(runs: list[dict[str, float]]) -> dict[str, float]:
    found = {key: round(statistics.median(r[key] for r in runs), 3) for key in runs[0]}
    return {**found, "seconds_best": round(min(r["seconds"] for r in runs), 3)}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shape", choices=SHAPES)
    arguments.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    arguments.add_argument("--blocks", type=int, help="take only so many of the shape's blocks")
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
        "--out",
        type=Path,
        help="folder for quantize_speed-gptq-SHAPE.json or quantize_speed-memory-SHAPE.json, GPU's name behind; by default $OUT, if set",
    )
    if len(sys.argv) == 5 and sys.argv[1] == "--worker":
        use_checkout()
        worker(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
        return 0
    options = arguments.parse_args()
    if options.device != "cpu":
        if not torch.cuda.is_available():
            print("quantize_speed: torch sees no CUDA GPU here; nothing was measured", file=sys.stderr)
            return NO_GPU
        if options.peer_python is not None:
            raise SystemExit("--peer-python: the peer runs on the CPU only; leave it out on a GPU")
    if options.out is None and os.environ.get("OUT"):
        options.out = Path(os.environ["OUT"])
    end_on_sigterm()
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
        write_json(report_file(options), report)
        unfinished_file(options).unlink(missing_ok=True)
    print(json.dumps({key: value for key, value in report.items() if key not in ("runs", "versions")}))
    return 0


def gpu_of(options: argparse.Namespace) -> str | None:
    return None if options.device == "cpu" else torch.cuda.get_device_name(options.device)


def report_file(options: argparse.Namespace) -> Path:
    parts = ["memory" if options.only_memory else "gptq", options.shape]
    if options.blocks is not None:
        parts.append(f"{options.blocks} blocks")
    gpu = gpu_of(options)
    if gpu is not None:
        parts.append(gpu)
    return Path(options.out / f"quantize_speed-{slug(' '.join(parts))}.json")


def unfinished_file(options: argparse.Namespace) -> Path:
    return report_file(options).with_suffix(".unfinished.json")


def progress_into(options: argparse.Namespace, facts: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """What tells of a run that goes on: a line on stderr, and a file that stays if the run does not end."""
    rows: list[dict[str, Any]] = []

    def heard(row: dict[str, Any]) -> None:
        rows.append(row)
        on_gpu = f", GPU {row['peak_gpu_bytes'] / 2**20:.0f} MiB" if "peak_gpu_bytes" in row else ""
        print(
            f"{row['what']}: {row['done']} of {row['of']}, {row['seconds']:.1f} s, {row['peak_rss_bytes'] / 2**20:.0f} MiB{on_gpu}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if options.out is not None:
            report = {**facts, "progress": rows, "versions": versions()}
            change_json(unfinished_file(options), lambda _: report)

    return heard


def goals_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised of this run, if anything is."""
    from gpu_goals import QUANTIZED, quantizing_goals

    measured = tuple(report[key] for key in ("shape", "samples", "length"))
    if report["gpu"] is None or measured != QUANTIZED or report["blocks"] is not None or report["bits"] != 4:
        return []
    return quantizing_goals(report["minutes"], report["peak_gpu_gb"])


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    checkpoint = write_checkpoint(work, options.shape, options.device, options.blocks)
    print(f"checkpoint: {time.perf_counter() - began:.1f} s", flush=True)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    output, recipe_file, windows = work / "qlm-output", work / "recipe.json", work / "windows.json"
    recipe_file.write_text(json.dumps(recipe(checkpoint, output, options)))
    here = [
        sys.executable, str(Path(__file__).resolve()), "--worker", str(recipe_file), str(options.threads), options.device,
    ]  # fmt: skip
    on_gpu = options.device != "cpu"
    facts: dict[str, Any] = {
        "shape": options.shape, "device": options.device, "gpu": gpu_of(options), "driver": driver_version() if on_gpu else None,
        "blocks": options.blocks, "samples": options.samples, "length": options.length, "bits": options.bits,
        "group_size": options.group_size, "threads": options.threads, "cpu": cpu_name(), "checkpoint_bytes": size,
    }  # fmt: skip
    sides: dict[str, Callable[[], dict[str, float]]] = {
        "qlm": lambda: run(here, options.threads, options.device, progress_into(options, facts))
    }
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
            of_gpu = f"   GPU {found['peak_gpu_bytes'] / 2**20:8.0f} MiB" if "peak_gpu_bytes" in found else ""
            print(
                f"run {repeat + 1} {side:5} {found['seconds']:8.1f} s   peak {found['peak_rss_bytes'] / 2**20:8.0f} MiB{of_gpu}",
                flush=True,
            )
    report: dict[str, Any] = {**facts, **{side: summary_of(results) for side, results in runs.items()}}
    peak = report["qlm"]["peak_rss_bytes"]
    report["peak_over_checkpoint"] = round(peak / size, 3)
    if on_gpu:
        report["minutes"] = round(report["qlm"]["seconds"] / 60, 3)
        report["peak_gpu_gb"] = round(report["qlm"]["peak_gpu_bytes"] / 1e9, 3)
    if options.blocks is not None:
        # More than it will be: what comes once, like tokenizing the text, is counted for every block.
        share = config_of(options.shape).num_hidden_layers / options.blocks
        report["minutes_of_all_blocks_at_most"] = round(report["qlm"]["seconds"] * share / 60, 3)
    report["goals"] = goals_of(report)
    for one in report["goals"]:
        print(say_goal(one))
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
