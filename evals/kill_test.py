"""Kill -9 at random moments of a quantization; the same command again must end with the same bytes.

    python evals/kill_test.py [--runs 20] [--recipe recipes/demo/tiny-opt-gptq.yaml] [--seed 0]

The recipe runs once without interruption, in a temporary folder and without its evaluation. Then, for each run: start it anew,
send SIGKILL at a random moment (once a number of files drawn evenly are written, and a random share of a file's usual time
later), run the same command to its end, and compare SHA-256 of every file. One line a kill; the last line is JSON. The exit code is 1 if any run differs.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qlm.recipe import load_recipe, resolved

ROOT = Path(__file__).resolve().parent.parent
# One thread: the moments then mean the same on a busy machine, and the interpreter is this one.
COMMAND = [sys.executable, "-c", "from qlm.cli import main; main()"]


def start(recipe: Path, verb: str = "quantize") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*COMMAND, verb, "--quiet", "--threads", "1", str(recipe)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {errors.decode()}")


def wait_for(process: subprocess.Popen[bytes], path: Path) -> float:
    """The moment at which the path appears."""
    while not path.exists():
        if process.poll() is not None:
            finish(process)
            sys.exit(f"{path} never appeared")
        time.sleep(0.001)
    return time.monotonic()


def count(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors"))) if folder.exists() else 0


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "demo" / "tiny-opt-gptq.yaml")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    began = time.monotonic()

    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "out"
        partial = output.with_name("out.partial")
        # JSON is YAML. Evaluation changes no byte of the output.
        recipe = Path(temporary) / "recipe.yaml"
        plain = {**resolved(load_recipe(options.recipe)), "output": str(output), "evaluate": None}
        recipe.write_text(json.dumps(plain))

        process = start(recipe)
        first = wait_for(process, partial)
        finish(process)
        seconds = time.monotonic() - first
        wanted, shards = hashes(output), count(output)
        print(f"{options.recipe.stem}: {len(wanted)} files, {seconds:.2f} s from the first byte to the end")

        identical = killed = 0
        while killed < options.runs:
            shutil.rmtree(output)
            process = start(recipe)
            wait_for(process, partial)
            files = chance.randrange(shards + 1)
            while process.poll() is None and count(partial / "files") < files:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, seconds / shards))
            process.kill()
            process.communicate()
            if process.returncode == 0:
                continue  # it was quicker than usual and had ended: no kill
            killed += 1
            left = count(partial / "files")
            finish(start(recipe))
            same = hashes(output) == wanted and not partial.exists()
            identical += same
            print(
                f"{killed:3d}/{options.runs}: killed with {left} of {shards} shards written; then "
                f"{'identical' if same else 'DIFFERENT'}",
                flush=True,
            )
    result = {
        "recipe": options.recipe.stem, "kills": killed, "identical": identical,
        "files": len(wanted), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    print(json.dumps(result))
    sys.exit(0 if identical == options.runs else 1)


if __name__ == "__main__":
    main()
