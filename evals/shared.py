"""What several drivers need: the machine in words, a tokenizer without training, files written whole, peak memory."""

import ast
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "optimum-quanto", "compressed-tensors", "flash-attn",
    "triton", "numpy", "peft", "accelerate",
)  # fmt: skip


def use_checkout() -> None:
    """Let `import qlm` work from a checkout that is not installed, as on a machine that has a GPU and no network.

    qlm asks for its own version, which only an installed package has: a folder with nothing but that is made for it.

    Raises:
        SystemExit: another qlm is installed, and figures would be of its sources.
    """
    found = importlib.util.find_spec("qlm")
    if found is None or found.origin is None:  # or a folder of that name without the package in it
        sys.path.insert(0, str(ROOT))
    elif Path(found.origin).resolve().parent != ROOT / "qlm":
        raise SystemExit(
            f"qlm is imported from {Path(found.origin).parent}, and not from this checkout, {ROOT}: install this one with pip install -e, or "
            "uninstall the other"
        )
    try:
        importlib.metadata.version("qlm")
    except importlib.metadata.PackageNotFoundError:
        found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
        assert found is not None
        folder = Path(tempfile.mkdtemp(prefix="qlm-metadata-"))
        described = folder / f"qlm-{found[1]}.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: qlm\nVersion: {found[1]}\n", "utf-8")
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def versions() -> dict[str, str | None]:
    """Version of each library that can change a number here; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("qlm", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def sources_version(modules: tuple[str, ...], files: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> str:
    """qlm's version and the first digits of a hash of sources: what figures depend on besides the settings that are kept with them.

    Args:
        modules: of qlm, with all that they import of it, directly or not, and the CPU kernels. files: others, by their paths in the checkout.
        without: modules that are neither taken nor followed, for they change no figure.
    """
    found, left = {ROOT / file for file in files}, list(modules)
    while left:
        module = left.pop()
        path = ROOT / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        # The package itself names everything that there is, for those who use it.
        if module in ("qlm", *without) or not file.exists() or file in found:
            continue
        found.add(file)
        left.append(module.rpartition(".")[0])
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qlm":
                left += [str(node.module), *(f"{node.module}.{name.name}" for name in node.names)]
    found.update(path for path in (ROOT / "qlm" / "kernels" / "cpu").iterdir() if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256()
    for file in sorted(found):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return f"qlm {importlib.metadata.version('qlm')}, sources {digest.hexdigest()[:12]}"


# Of fine-tuning, what plans, draws, shows and waits.
WITHOUT_FIGURES = (
    "qlm.plan", "qlm.training.plan", "qlm.training.report", "qlm.training.line_chart", "qlm.training.signals", "qlm.figure", "qlm.report",
)  # fmt: skip


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def driver_version() -> str | None:
    """NVIDIA's driver, or None where nvidia-smi is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def status_bytes(field: str) -> int:
    """A size from /proc/self/status, in bytes: VmHWM is the peak resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Replace the JSON file's value (None where there is no file) by what `change` makes of it. Processes that do so at the same
    time wait for each other, and nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The folder is locked, not the file, which is another one afterwards.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        value = change(json.loads(path.read_text("utf-8")) if path.exists() else None)
        unfinished = path.with_name(f"{path.name}.unfinished")
        write_json(unfinished, value)
        unfinished.replace(path)
    finally:
        os.close(folder)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_byte_tokenizer(folder: Path, vocab_size: int, bos_first: bool) -> None:
    """tokenizer.json of a byte-level BPE that merges nothing: a token a byte, after the four special ones of OPT.

    The rest of the vocabulary is fillers that no text contains. Enough where only the number of tokens matters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"<filler_{i}>" for i in range(vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos_first:
        tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    write_json(folder / "tokenizer_config.json", described)
