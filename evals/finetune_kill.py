"""Kill -9 at random moments of a training run; the same command again must end with the same bytes.

    python evals/finetune_kill.py [--runs 20] [--model evals/checkpoints/tiny-opt] [--backend nf4] [--steps 40] [--seed 0] [--out FILE]

The recipe (a LoRA adapter with dropout on a quantized base, a checkpoint every third step) runs once without interruption, in a temporary
folder. Then, for each run: start it anew, base and all, send SIGKILL at a random moment between the first byte on the disk and the usual
end, run the same command to its end, and compare SHA-256 of every file of base and adapter. Every fourth kill, the first among them, falls
into the time in which the base is made. One line a kill; the last line is JSON. The exit code is 1 if any run differs.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

try:
    from evals.kill_test import finish, hashes, start, wait_for
    from evals.shared import cpu_name, sources_version, versions, write_json
except ImportError:  # started as a file
    from kill_test import finish, hashes, start, wait_for  # type: ignore[no-redef]
    from shared import cpu_name, sources_version, versions, write_json  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parent.parent
# One in so many kills falls into the making of the base.
ONE_IN = 4


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


def partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def left_by(base: Path, output: Path) -> str:
    """What the killed run left, in words."""
    steps = [int(path.name[5:]) for path in partial(output).glob("checkpoints/step-*[0-9]")]
    if steps:
        return f"with a checkpoint of step {max(steps)}"
    if output.exists():
        return "with the output in its place"
    return "with the base and without a checkpoint" if base.exists() else "without the base"


def everything(base: Path, output: Path) -> dict[str, str]:
    """SHA-256 of each file of both folders, and what should not be there."""
    found = {f"{folder.name}/{name}": digest for folder in (base, output) for name, digest in hashes(folder).items()}
    return found | {path.name: "left over" for path in (partial(base), partial(output)) if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--model", type=Path, default=ROOT / "evals" / "checkpoints" / "tiny-opt")
    parser.add_argument("--backend", choices=("nf4", "int8", "gptq"), default="nf4")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    chance, kills = random.Random(options.seed), list[dict[str, Any]]()
    began = time.monotonic()

    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "out"
        base = output.with_name("out-base")
        recipe = Path(temporary) / "recipe.yaml"
        # JSON is YAML.
        recipe.write_text(json.dumps(recipe_for(options.model.resolve(), options.backend, options.steps, output)))

        process = start(recipe, "finetune")
        first = wait_for(process, partial(base))
        base_seconds = wait_for(process, base) - first
        finish(process)
        seconds = time.monotonic() - first
        wanted = everything(base, output)
        print(
            f"{options.model.name}: {len(wanted)} files, {seconds:.2f} s from the first byte to the end, the base in {base_seconds:.2f}",
            flush=True,
        )

        while len(kills) < options.runs:
            for folder in (base, output):
                shutil.rmtree(folder)
            process = start(recipe, "finetune")
            wait_for(process, partial(base))
            moment = chance.uniform(0, base_seconds if len(kills) % ONE_IN == 0 else seconds)
            time.sleep(moment)
            process.kill()
            process.communicate()
            if process.returncode == 0:
                continue  # it was quicker than usual and had ended: no kill
            left = left_by(base, output)
            finish(start(recipe, "finetune"))
            found = everything(base, output)
            other = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            kills.append({"seconds": round(moment, 2), "left": left, "different": other})
            print(
                f"{len(kills):3d}/{options.runs}: killed {moment:.1f} s after the first byte, {left}; then "
                f"{'DIFFERENT: ' + ', '.join(other) if other else 'identical'}",
                flush=True,
            )
    identical = sum(not kill["different"] for kill in kills)
    result = {
        "model": options.model.name, "backend": options.backend, "steps": options.steps, "seed": options.seed, "kills": len(kills),
        "identical": identical, "files": len(wanted), "usual_seconds": round(seconds, 2), "usual_base_seconds": round(base_seconds, 2),
        "seconds": round(time.monotonic() - began, 1), "version": sources_version(("qlm.finetune", "qlm.cli")), "moments": kills,
        "cpu": cpu_name(), "versions": versions(),
    }  # fmt: skip
    if options.out is not None:
        write_json(options.out, result)
    print(json.dumps(result))
    sys.exit(0 if identical == options.runs else 1)


if __name__ == "__main__":
    main()
