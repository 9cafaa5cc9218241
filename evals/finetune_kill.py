"""Kill -9 at random moments of a training run; the same command again must end with the same bytes.

    python evals/finetune_kill.py [--runs 20] [--model evals/checkpoints/tiny-opt] [--backend nf4] [--steps 40] [--seed 0]

The recipe (a LoRA adapter with dropout on a quantized base, a checkpoint every third step) runs once without interruption, in a temporary
folder. Then, for each run: start it anew, send SIGKILL at a random moment between the first byte on the disk and the usual end, run
the same command to its end, and compare SHA-256 of every file. One line a kill; the last line is JSON. The exit code is 1 if any run
differs.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

try:
    from evals.kill_test import finish, hashes, start, wait_for
except ImportError:  # started as a file
    from kill_test import finish, hashes, start, wait_for

ROOT = Path(__file__).resolve().parent.parent


def recipe_for(model: Path, backend: str, steps: int, output: Path) -> dict[str, object]:
    calibration = {"data": str(ROOT / "calibration_data" / "english.txt"), "samples": 8, "length": 64}
    return {
        "model": str(model),
        "quantize": {"backend": backend},
        **({"calibration": calibration} if backend == "gptq" else {}),
        "adapter": {"r": 8, "dropout": 0.1},
        "train": {
            "data": str(ROOT / "calibration_data" / "python.txt"), "validation": 0.01, "steps": steps, "batch_size": 2,
            "gradient_accumulation": 2, "max_length": 64, "learning_rate": 1e-3, "save_every": 3, "evaluate_every": 10,
        },
        "output": str(output),
    }  # fmt: skip


def left_by(partial: Path, output: Path) -> str:
    """What the killed run left, in words."""
    steps = [int(path.name[5:]) for path in partial.glob("checkpoints/step-*[0-9]")]
    if steps:
        return f"with a checkpoint of step {max(steps)}"
    return "with the output in its place" if output.exists() else "without a checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--model", type=Path, default=ROOT / "evals" / "checkpoints" / "tiny-opt")
    parser.add_argument("--backend", choices=("nf4", "int8", "gptq"), default="nf4")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    began = time.monotonic()

    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "out"
        partial = output.with_name("out.partial")
        recipe = Path(temporary) / "recipe.yaml"
        # JSON is YAML.
        recipe.write_text(json.dumps(recipe_for(options.model.resolve(), options.backend, options.steps, output)))

        process = start(recipe, "finetune")
        first = wait_for(process, partial)
        finish(process)
        seconds = time.monotonic() - first
        wanted = hashes(output)
        print(f"{options.model.name}: {len(wanted)} files, {seconds:.2f} s from the first byte to the end", flush=True)

        identical = killed = 0
        while killed < options.runs:
            shutil.rmtree(output)
            process = start(recipe, "finetune")
            wait_for(process, partial)
            moment = chance.uniform(0, seconds)
            time.sleep(moment)
            process.kill()
            process.communicate()
            if process.returncode == 0:
                continue  # it was quicker than usual and had ended: no kill
            killed += 1
            left = left_by(partial, output)
            finish(start(recipe, "finetune"))
            found = hashes(output)
            other = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            other += [partial.name] if partial.exists() else []
            identical += not other
            print(
                f"{killed:3d}/{options.runs}: killed {moment:.1f} s after the first byte, {left}; then "
                f"{'DIFFERENT: ' + ', '.join(other) if other else 'identical'}",
                flush=True,
            )
    result = {
        "model": options.model.name, "backend": options.backend, "steps": options.steps, "kills": killed,
        "identical": identical, "files": len(wanted), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    print(json.dumps(result))
    sys.exit(0 if identical == options.runs else 1)


if __name__ == "__main__":
    main()
