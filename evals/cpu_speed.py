"""Prefill and decoding on a CPU: qlm's engine and other software, in turns, each run a process of its own.

    python evals/cpu_speed.py --checkpoint FLOAT --variant int8=out/int8 --variant nf4=out/nf4 --out evals/results
    python evals/cpu_speed.py --variant int8=out/int8 --peer '/venvs/other/bin/python peer.py FILE' --rounds 7

FLOAT is a float checkpoint: qlm runs it as "float", and so do the peers that this environment has installed: transformers in
bf16, torch's dynamic int8, bitsandbytes NF4. Variants are folders that `qlm quantize` wrote. A `--peer` is a command
that prints a line of JSON with prefill_ms and decode_ms_per_token (and "peer", its name) for the same numbers of
tokens and threads, which it finds in QLM_PROMPT, QLM_NEW and OMP_NUM_THREADS.

Prompts are random ids: time does not depend on their values. A round runs every side once, so that the machine's other load
hits all alike, with a reading of the memory bandwidth before and after each; figures are medians over the rounds. Peers in
transformers are timed around their forward passes, without the generation loop that their users would pay for as well. Ratios are
the peer's time over qlm's in the same round, their median: above 1, qlm is faster. The last line printed is JSON.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shared import cpu_name, slug, status_bytes, use_checkout, versions, write_json

# Peers of this environment: the package that each needs besides torch and transformers.
PEERS = {"transformers-bf16": None, "torch-dynamic-int8": None, "bitsandbytes-nf4": "bitsandbytes"}
TIMES = ("prefill_ms", "decode_ms_per_token")
# Bytes that a reading of the bandwidth goes over: far more than any cache holds.
READING = 1 << 30


def worker(peer: str, checkpoint: str, prompt: int, new: int, threads: int, repeats: int) -> None:
    """One run of a peer in this process; prints the medians of its repeats after one round that warms up."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(threads)
    settings: dict[str, Any] = {"dtype": torch.float32 if peer == "torch-dynamic-int8" else torch.bfloat16}
    if peer == "bitsandbytes-nf4":
        settings["device_map"] = "cpu"
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **settings).eval()
    if peer == "torch-dynamic-int8":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in TIMES}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            last = out.logits[:, -1:].argmax(-1)
            middle = time.perf_counter()
            for _ in range(new):
                out = model(last, past_key_values=out.past_key_values, use_cache=True)
                last = out.logits[:, -1:].argmax(-1)
            if repeat:
                times["prefill_ms"].append(1e3 * (middle - start))
                times["decode_ms_per_token"].append(1e3 * (time.perf_counter() - middle) / new)
    found = {name: statistics.median(values) for name, values in times.items()}
    print(json.dumps({**found, "peak_rss_gb": status_bytes("VmHWM") / 1e9}))


class Bandwidth:
    """GB/s at which the threads read memory and do nothing else, the best of three, by qlm's own kernel."""

    def __init__(self, threads: int) -> None:
        import numpy as np

        from qlm.kernels import cpu

        self.native, self.team = cpu.library(), cpu.Team(threads)
        self.buffer = np.ones(READING, np.uint8)

    def read(self) -> float:
        found, best = ctypes.c_double(), 0.0
        for _ in range(3):
            self.native.qlm_read_bandwidth(
                self.team.handle, self.buffer.ctypes.data, self.buffer.nbytes, ctypes.byref(found)
            )
            best = max(best, found.value)
        return best


def run(command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The JSON that the command prints: all of it, or else its last line that begins like an object."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "QLM_PROMPT": str(options.prompt), "QLM_NEW": str(options.new), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    try:
        found = json.loads(lines[-1] if lines and lines[-1] != "{" else done.stdout)
        if done.returncode == 0 and all(found[name] > 0 for name in TIMES):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise SystemExit(
        f"{shlex.join(command)}: exit code {done.returncode}; expected a line of JSON with {' and '.join(TIMES)}\n"
        f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )


def commands_of(options: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(qlm's sides, peers), each by name."""
    folders = {} if options.checkpoint is None else {"float": str(options.checkpoint)}
    for text in options.variant:
        name, equals, folder = text.partition("=")
        if not equals or name in folders:
            raise SystemExit(f"--variant {text}: expected NAME=FOLDER, every name once")
        folders[name] = folder
    if not folders:
        raise SystemExit("nothing to measure: give --checkpoint or --variant")
    bench = "import sys; sys.path.insert(0, sys.argv.pop(1)); from shared import use_checkout; use_checkout(); from qlm.cli import main; main()"
    sizes = ["--prompt", str(options.prompt), "--new", str(options.new), "--threads", str(options.threads)]
    more = ["--repeats", str(options.repeats), "--json", "-"]
    here = str(Path(__file__).resolve().parent)
    ours = {
        f"qlm-{name}": [sys.executable, "-c", bench, here, "bench", folder, *sizes, *more]
        for name, folder in folders.items()
    }
    peers: dict[str, list[str]] = {}
    if options.checkpoint is not None:
        numbers = [str(n) for n in (options.prompt, options.new, options.threads, options.repeats)]
        for name in options.installed if options.installed is not None else PEERS:
            package = PEERS[name]
            if package is None or importlib.util.find_spec(package) is not None:
                program = [sys.executable, str(Path(__file__).resolve()), "--worker", name]
                peers[name] = [*program, str(options.checkpoint), *numbers]
            else:
                print(f"{name}: not measured, {package} is not installed", flush=True)
    return ours, {**peers, **{command: shlex.split(command) for command in options.peer}}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    ours, peers = commands_of(options)
    bandwidth = Bandwidth(options.threads)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in (*ours, *peers)}
    before = bandwidth.read()
    for number in range(options.rounds):
        # Every other round backwards: what runs later in a round meets no other memory than what runs earlier.
        sides = list({**ours, **peers}.items())
        for side, command in sides if number % 2 == 0 else sides[::-1]:
            found = run(command, options)
            after = bandwidth.read()
            runs[side].append({**found, "gb_per_s_before": before, "gb_per_s_after": after})
            print(
                f"round {number + 1}  {found.get('peer', side)[:40]:40}  prefill {found['prefill_ms']:8.1f} ms   decode "
                f"{found['decode_ms_per_token']:7.2f} ms   memory {before:5.1f} -> {after:5.1f} GB/s",
                flush=True,
            )
            before = after
    names = {side: str(results[0].get("peer", side)) for side, results in runs.items()}
    numbers = {
        names[side]: {
            key: round(statistics.median(result[key] for result in results), 4)
            for key, value in results[0].items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for side, results in runs.items()
    }
    ratios = {
        names[side]: {
            names[peer]: {
                name: round(
                    statistics.median(b[name] / a[name] for a, b in zip(runs[side], runs[peer], strict=True)), 3
                )
                for name in TIMES
            }
            for peer in peers
        }
        for side in ours
    }
    for side, of_peers in ratios.items():
        for peer, ratio in of_peers.items():
            print(
                f"{side} over {peer}: prefill {ratio['prefill_ms']:.2f}, decode {ratio['decode_ms_per_token']:.2f} times as fast"
            )
    return {
        "prompt_tokens": options.prompt, "new_tokens": options.new, "threads": options.threads, "rounds": options.rounds,
        "repeats": options.repeats, "cpu": cpu_name(), "medians": numbers, "times_as_fast": ratios,
        "runs": {names[side]: results for side, results in runs.items()}, "versions": versions(),
    }  # fmt: skip


def main() -> int:
    if len(sys.argv) == 8 and sys.argv[1] == "--worker":
        peer, checkpoint = sys.argv[2:4]
        worker(peer, checkpoint, *map(int, sys.argv[4:8]))
        return 0
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--checkpoint", type=Path, help="a float model folder, for qlm and the installed peers")
    arguments.add_argument(
        "--variant", "--backend", action="append", default=[], metavar="NAME=FOLDER", help="a quantized folder, for qlm"
    )
    arguments.add_argument(
        "--installed", nargs="*", choices=PEERS, help="which peers of this environment; all by default"
    )
    arguments.add_argument("--peer", action="append", default=[], metavar="COMMAND", help="a peer of another one")
    arguments.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    arguments.add_argument("--new", type=int, default=64, help="tokens decoded after it")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=5, help="runs of each side")
    arguments.add_argument(
        "--repeats", type=int, default=3, help="measurements within a run of qlm or an installed peer"
    )
    arguments.add_argument("--name", help="for the result's file; the checkpoint's or the first variant's by default")
    arguments.add_argument("--out", type=Path, help="folder for cpu_speed-NAME.json")
    options = arguments.parse_args()
    use_checkout()
    report = measure(options)
    if options.out is not None:
        name = options.name or Path(options.checkpoint or options.variant[0].partition("=")[2]).name
        write_json(options.out / f"cpu_speed-{slug(name)}.json", report)
    print(json.dumps({key: value for key, value in report.items() if key not in ("runs", "versions")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
