"""Time of a training step and peak memory of QLoRA on a real shape with random weights, qlm beside plain PEFT in turns.

    python evals/finetune_speed.py opt-125m --rounds 3 --out evals/results                                       on a CPU
    python evals/finetune_speed.py opt-1.3b --device cuda --precision bfloat16 --batch-size 4 --length 512       on a GPU

The peer is evals/peer_finetune.py: transformers, bitsandbytes, PEFT and the Trainer, without qlm. Both start from the float checkpoint, make NF4 of
it, put LoRA on all linears and take the same number of steps over rows of the same text: the same optimizer (AdamW; on a GPU 8-bit AdamW, not
paged), dropout, schedule and gradient checkpointing, and a loss that is logged at every step. Every run is a process of its own; the
report is written after each. Exit code 69 where there is no GPU and --device asks for one.

A run's figure is the median of its steps after the first few; a side's the median of its runs. Peak memory is that of the whole process
(VmHWM), on a GPU also what torch allocated there. Speed does not depend on the weights' values, so random ones will do. The last line
printed is JSON.
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
from pathlib import Path
from typing import Any

import torch
from gpu_cells import NO_GPU, say_goal
from quantize_speed import SHAPES, end_on_sigterm, write_checkpoint
from shared import ROOT, change_json, cpu_name, driver_version, slug, status_bytes, use_checkout, versions

SIDES = ("qlm", "peer")


def recipe_of(checkpoint: Path, text: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": str(checkpoint),
        "quantize": {"backend": "nf4"},
        "adapter": {"r": options.r, "alpha": 2 * options.r, "dropout": options.dropout},
        "train": {
            "data": str(text), "steps": options.steps, "batch_size": options.batch_size, "gradient_accumulation": 1,
            "warmup": 0.0, "max_length": options.length, "precision": options.precision,
            "gradient_checkpointing": options.gradient_checkpointing, "save_every": 10 * options.steps, "optimizer": options.optimizer,
        },
        "output": str(output),
    }  # fmt: skip


def worker(recipe_file: Path, device: str, threads: int) -> None:
    """One qlm run in this process; prints what peer_finetune.py prints."""
    use_checkout()
    from qlm.checkpoint.adapter import WEIGHTS
    from qlm.finetune import finetune
    from qlm.recipe import FinetuneRecipe

    torch.set_num_threads(threads)
    stamps: list[float] = []

    def tell(what: str, done: int, total: int) -> None:
        if what == "train":
            stamps.append(time.perf_counter())

    result = finetune(FinetuneRecipe.model_validate_json(recipe_file.read_text()), device=device, progress=tell)
    found: dict[str, Any] = {
        # The first is told before any step.
        "stamps": [stamp - stamps[0] for stamp in stamps[1:]],
        "losses": [record["loss"] for record in result.metrics if "loss" in record],
        "peak_rss_bytes": status_bytes("VmHWM"),
        "trainable_parameters": result.training["trainable_parameters"],
        "adapter_bytes": (result.output / WEIGHTS).stat().st_size,
    }
    if device != "cpu":
        found |= {
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
            "reserved_gpu_bytes": torch.cuda.max_memory_reserved(),
        }
    print(json.dumps(found))


def run(command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """What a process printed in its last line, and the times of its steps."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        **({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}),
    }  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - began
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
    except (IndexError, ValueError):
        found = None
    if found is None:
        raise SystemExit(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    stamps = found.pop("stamps")
    assert len(stamps) == options.steps, (len(stamps), options.steps)
    found["steps"] = [round(b - a, 5) for a, b in zip([0.0, *stamps], stamps, strict=False)]
    found["process_seconds"] = round(seconds, 2)
    found["step_seconds"] = statistics.median(found["steps"][options.warm_up :])
    return found


def summary_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [key for key, value in runs[0].items() if not isinstance(value, list)]
    found = {key: statistics.median(r[key] for r in runs) for key in keys}
    return {**found, "step_seconds_best": min(min(r["steps"]) for r in runs)}


def text_for(checkpoint: Path, file: Path, options: argparse.Namespace) -> Path:
    """Enough for every step to have rows of its own: a token a byte here."""
    needed = (options.steps * options.batch_size + 1) * options.length
    source = (ROOT / "calibration_data" / "english.txt").read_bytes()
    file.write_bytes((source * (needed // len(source) + 1))[:needed].decode("utf-8", "ignore").encode())
    return file


def machine_of(device: str) -> dict[str, str | None]:
    """GPU, its driver and torch's CUDA; None on a CPU."""
    if device == "cpu":
        return {"gpu": None, "driver": None, "cuda": None}
    return {"gpu": torch.cuda.get_device_name(), "driver": driver_version(), "cuda": torch.version.cuda}


def report_of(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """What the runs that there are come to; ratios as soon as both sides have one."""
    report: dict[str, Any] = {
        "shape": options.shape, "device": options.device, "precision": options.precision, "batch_size": options.batch_size,
        "length": options.length, "r": options.r, "dropout": options.dropout, "steps": options.steps, "warm_up": options.warm_up,
        "gradient_checkpointing": options.gradient_checkpointing, "optimizer": options.optimizer, "threads": options.threads, "rounds": options.rounds,
        "cpu": cpu_name(), **machine_of(options.device),
        **{side: summary_of(runs[side]) for side in SIDES if runs[side]},
    }  # fmt: skip
    everything = {"runs": runs, "versions": versions()}
    if not all(runs.values()):
        return {**report, **everything}
    ours, theirs = report["qlm"], report["peer"]
    report["step_ratio"] = round(ours["step_seconds"] / theirs["step_seconds"], 4)
    report["step_ratio_best"] = round(ours["step_seconds_best"] / theirs["step_seconds_best"], 4)
    report["peak_ratio"] = round(ours["peak_rss_bytes"] / theirs["peak_rss_bytes"], 4)
    if options.device != "cpu":
        report["peak_gpu_ratio"] = round(ours["peak_gpu_bytes"] / theirs["peak_gpu_bytes"], 4)
    report["goals"] = goals_of(report)
    return {**report, **everything}


def goals_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised of this shape on a GPU, if anything is."""
    from gpu_goals import FINETUNED, finetuning_goals

    return finetuning_goals(report["step_ratio"]) if report["gpu"] and report["shape"] == FINETUNED else []


def file_of(options: argparse.Namespace) -> Path:
    return Path(options.out / f"finetune_speed-{slug(f'{options.shape} {options.device} {options.precision}')}.json")


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = write_checkpoint(work, options.shape, options.device)
    text = text_for(checkpoint, work / "text.txt", options)
    outputs = {"qlm": work / "qlm", "peer": work / "peer"}
    recipe_file = work / "recipe.json"
    recipe_file.write_text(json.dumps(recipe_of(checkpoint, text, outputs["qlm"], options)))
    commands = {
        "qlm": [
            sys.executable, str(Path(__file__).resolve()), "--worker", str(recipe_file), options.device, str(options.threads),
        ],
        "peer": [
            sys.executable, str(ROOT / "evals" / "peer_finetune.py"), str(checkpoint), str(text), str(outputs["peer"]),
            "--steps", str(options.steps), "--batch-size", str(options.batch_size), "--length", str(options.length),
            "--r", str(options.r), "--dropout", str(options.dropout), "--precision", options.precision,
            "--optimizer", options.optimizer, "--device", options.device, "--threads", str(options.threads),
            *(["--gradient-checkpointing"] if options.gradient_checkpointing else []),
        ],
    }  # fmt: skip
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    # In turns: the machine's other load hits both alike.
    for number in range(options.rounds):
        for side in SIDES:
            for left_over in (outputs[side], work / "qlm-base", work / "qlm.partial"):
                shutil.rmtree(left_over, ignore_errors=True)
            found = run(commands[side], options)
            runs[side].append(found)
            on_gpu = f"   GPU {found['peak_gpu_bytes'] / 2**20:8.0f} MiB" if "peak_gpu_bytes" in found else ""
            print(
                f"round {number + 1} {side:5} {found['step_seconds'] * 1e3:9.1f} ms a step   "
                f"peak {found['peak_rss_bytes'] / 2**20:8.0f} MiB{on_gpu}   loss {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}",
                flush=True,
            )
            if options.out is not None:
                report = report_of(runs, options)
                change_json(file_of(options), lambda _, report=report: report)
    report = report_of(runs, options)
    shown = {key: value for key, value in report.items() if "ratio" in key}
    print("qlm / peer: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items()))
    for one in report["goals"]:
        print(say_goal(one))
    return report


def main() -> int:
    if len(sys.argv) == 5 and sys.argv[1] == "--worker":
        worker(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return 0
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shape", choices=SHAPES)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments.add_argument("--batch-size", type=int, default=2)
    arguments.add_argument("--length", type=int, default=256, help="tokens in a row")
    arguments.add_argument("--r", type=int, default=16)
    arguments.add_argument("--dropout", type=float, default=0.05)
    arguments.add_argument("--gradient-checkpointing", action="store_true")
    arguments.add_argument(
        "--optimizer",
        choices=("adamw", "adamw_8bit", "paged_adamw_8bit"),
        help="of both sides; by default adamw_8bit on a GPU, else adamw",
    )
    arguments.add_argument("--steps", type=int, default=12)
    arguments.add_argument("--warm-up", type=int, default=3, help="steps that are not counted")
    arguments.add_argument("--rounds", type=int, default=2, help="runs of each side")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--work", type=Path, help="folder for the checkpoint and outputs; they stay there")
    arguments.add_argument(
        "--out", type=Path, help="folder for finetune_speed-SHAPE-DEVICE-PRECISION.json; by default $OUT, if set"
    )
    options = arguments.parse_args()
    if options.warm_up >= options.steps:
        raise SystemExit("--warm-up: fewer than --steps")
    if options.device != "cpu" and not torch.cuda.is_available():
        print("finetune_speed: torch sees no CUDA GPU here; nothing was measured", file=sys.stderr)
        return NO_GPU
    if options.optimizer is None:
        # Paged memory, which is there for GPUs that are too small, costs time on one that is not.
        options.optimizer = "adamw" if options.device == "cpu" else "adamw_8bit"
    if options.out is None and os.environ.get("OUT"):
        options.out = Path(os.environ["OUT"])
    end_on_sigterm()
    use_checkout()
    import transformers

    transformers.logging.disable_progress_bar()
    work = options.work or Path(tempfile.mkdtemp(prefix="finetune_speed-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        report = measure(work, options)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print(json.dumps({key: value for key, value in report.items() if key not in ("runs", "versions")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
