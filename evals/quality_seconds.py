"""Seconds of quantizing: qlm's presets beside GPTQModel and AutoRound on the same windows of text, in turns. For a quiet machine.

    python evals/quality_seconds.py --gptqmodel-python VENV/bin/python --autoround-python VENV/bin/python
    python evals/quality_seconds.py --gptqmodel-python VENV/bin/python --formats 4bit --rounds 3

A round lets every side quantize once, one after the other: from opening the checkpoint to the last byte written, imports excepted; qlm's
seconds include tokenizing the text. Each reading is kept in --out, and what is printed last is JSON: medians, and qlm's over the other's.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from quality_sides import LeftOut, sides
from quality_subject import Subject
from shared import ROOT, change_json, cpu_name, use_checkout, versions

CHECKPOINTS = ("tiny-opt", "tiny-gpt-neox", "tiny-gpt-bigcode")
# qlm's preset, beside whom, and how many of the other's seconds it may take.
BESIDE = (("fast", "gptqmodel", 1 / 3), ("balanced", "gptqmodel", 1.5), ("best", "autoround", 1.0))


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median seconds of each preset over the other's, by checkpoint and format, where both were measured; `allowed` is the most that
    qlm means to take."""
    found = []
    for checkpoint, name in dict.fromkeys((row["checkpoint"], row["format"]) for row in rows):
        seconds: dict[str, list[float]] = {}
        for row in rows:
            if (row["checkpoint"], row["format"]) == (checkpoint, name):
                seconds.setdefault(row["side"], []).append(row["seconds"])
        for preset, peer, allowed in BESIDE:
            ours, theirs = seconds.get(f"qlm-{preset}-{name}"), seconds.get(f"{peer}-{name}")
            if ours and theirs:
                ratio = statistics.median(ours) / statistics.median(theirs)
                found.append({
                    "checkpoint": checkpoint, "format": name, "preset": preset, "beside": peer, "seconds": statistics.median(ours),
                    "theirs": statistics.median(theirs), "rounds": min(len(ours), len(theirs)), "ratio": ratio, "allowed": allowed,
                })  # fmt: skip
    return found


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--checkpoints", nargs="+", default=[str(ROOT / "evals" / "checkpoints" / name) for name in CHECKPOINTS]
    )
    arguments.add_argument("--formats", nargs="+", choices=("4bit", "3bit", "2bit"), default=["4bit", "3bit", "2bit"])
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--samples", type=int, default=64, help="calibration windows")
    arguments.add_argument("--length", type=int, default=512, help="tokens in a window")
    arguments.add_argument("--gptqmodel-python", type=Path, help="python of an environment with gptqmodel")
    arguments.add_argument("--autoround-python", type=Path, help="python of an environment with auto-round")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--out", type=Path, default=ROOT / "evals" / "results" / "quality_seconds.json")
    options = arguments.parse_args()
    if options.gptqmodel_python is None and options.autoround_python is None:
        arguments.error(
            "give --gptqmodel-python, --autoround-python or both: without them there is nothing to set qlm beside"
        )
    # What a subject and the sides ask for besides; nothing is judged here.
    vars(options).update(windows=2, text=None, calibration=None, dataset=None, device="cpu", seconds=True, seeds=[0])
    return options


def main() -> int:
    options = parse()
    use_checkout()
    torch.set_num_threads(options.threads)
    known = sides(options)
    presets = [f"qlm-{preset}" for preset, peer, _ in BESIDE if getattr(options, f"{peer}_python")]
    peers = dict.fromkeys(peer for _, peer, _ in BESIDE)
    rows: list[dict[str, Any]] = []
    for checkpoint in options.checkpoints:
        subject = Subject(checkpoint, options)
        for name in options.formats:
            for turn in range(options.rounds):
                for side in (*peers, *presets):
                    way = known[f"{side}-{name}"]
                    try:
                        version = way.version()
                    except LeftOut as reason:
                        print(f"{side}-{name}: left out: {reason}", flush=True)
                        continue
                    with tempfile.TemporaryDirectory(prefix="quality-") as work:
                        # The peers compare logits on the first seed, after their clock has stopped.
                        seconds = way.make(subject, 0, Path(work)).seconds
                    rows.append({
                        "checkpoint": subject.name, "format": name, "side": f"{side}-{name}", "round": turn, "seconds": seconds,
                        "version": version,
                    })  # fmt: skip
                    print(f"{subject.name:18} {side}-{name:6} {seconds:7.1f} s", flush=True)
            keep(options.out, rows, options.threads)
    for each in ratios(rows):
        print(
            f"{each['checkpoint']:18} {each['format']} {each['preset']:9} {each['seconds']:7.1f} s, {each['beside']} {each['theirs']:7.1f} s: "
            f"{each['ratio']:.2f} ({each['allowed']:.2f} at most)"
        )
    print(json.dumps({"ratios": ratios(rows)}))
    return 0


def keep(path: Path, rows: Sequence[Mapping[str, Any]], threads: int) -> None:
    """The readings of this run in the place of earlier ones of the same checkpoint and format."""
    measured = {(row["checkpoint"], row["format"]) for row in rows}

    def change(report: Any) -> Any:
        others = [row for row in (report or {"rows": []})["rows"] if (row["checkpoint"], row["format"]) not in measured]
        kept = [*others, *rows]
        return {"rows": kept, "ratios": ratios(kept), "threads": threads, "cpu": cpu_name(), "versions": versions()}

    change_json(path, change)


if __name__ == "__main__":
    sys.exit(main())
