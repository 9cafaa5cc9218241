"""Who quantizes in quality.py, and how: qlm with its presets, and other software, each as a function that gives a model to be judged."""

import argparse
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from equivalence import compare, compute_in_float32, logits_of, plain_transformers
from quality_subject import Subject
from quantize_speed import run
from shared import ROOT, sources_version
from torch import Tensor

# What is compared with what: the settings of qlm's backend that the others' formats correspond to.
FORMATS: dict[str, dict[str, Any]] = {
    "4bit": {"backend": "gptq", "bits": 4, "group_size": 128},
    "3bit": {"backend": "gptq", "bits": 3, "group_size": 128},
    "2bit": {"backend": "gptq", "bits": 2, "group_size": 64},
    "mixed": {"backend": "gptq", "average_bits": 3.5},
    "nf4": {"backend": "nf4"},
    "nf4-double": {"backend": "nf4", "double_quant": True},
    "int8": {"backend": "int8"},
}
IN_WORDS = {
    "float": "float", "4bit": "4 bits, groups of 128", "3bit": "3 bits, groups of 128", "2bit": "2 bits, groups of 64",
    "mixed": "bits and groups by layer, 3.5 bits stored; in brackets: over 3 and 4 bits, interpolated in log KL", "nf4": "NF4",
    "nf4-double": "NF4, double quantization", "int8": "int8, activations too",
}  # fmt: skip
PRESETS = ("fast", "balanced", "best")
# Keys of a preset, what switches each off, and the backends that take it.
ABLATIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "scale_search": ("minmax", ("gptq", "nf4")),
    "target_shift": (0.0, ("gptq", "nf4", "int8")),
    "compensate": (False, ("nf4", "int8")),
    "sweeps": (0, ("gptq", "nf4", "int8")),
    "bias_correction": (False, ("gptq", "nf4", "int8")),
    "smooth": (False, ("int8",)),
    "rounding_steps": (0, ("gptq",)),
    "tune_steps": (0, ("gptq", "nf4", "int8")),
}


class LeftOut(Exception):
    """A side that cannot run here; the reason in words."""


@dataclass(frozen=True)
class Made:
    """A quantized model, ready to be judged.

    Attributes:
        bytes: of all weight files; where a side writes none, of its tensors.
        bits_per_weight: of the quantized linears, scales and zero points included; None where nobody can tell.
        seconds: from opening the checkpoint to the last byte written, imports excepted.
        batch_size: windows in one forward pass, where it changes the result.
        facts: further figures for the row.
    """

    model: Any
    bytes: int
    bits_per_weight: float | None
    seconds: float | None = None
    batch_size: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """A way to quantize.

    Attributes:
        format: a key of IN_WORDS. who: who quantizes, for the tables.
        make: from the subject, a seed and a folder that may be written to.
        version: what the result depends on besides the subject's protocol. Raises LeftOut.
        calibrated: whether the seed matters.
    """

    format: str
    who: str
    make: Callable[[Subject, int, Path], Made]
    version: Callable[[], str]
    calibrated: bool = False


def sides(options: argparse.Namespace) -> dict[str, Side]:
    """Every side by its name, in the order of the tables."""
    found: dict[str, Side] = {"float": Side("float", "float", float_model, qlm_version)}
    for name, settings in FORMATS.items():
        if "average_bits" in settings:
            found[f"qlm-balanced-{name}"] = Side(
                name, "qlm, balanced", partial(qlm, settings={**settings, "quality": "balanced"}), qlm_version, True
            )
            continue
        if settings["backend"] == "gptq":
            how = {"bits": settings["bits"], "group_size": settings["group_size"]}
            found[f"rtn-{name}"] = Side(
                name, "round to nearest", partial(round_to_nearest, **how), partial(files_version, NUMERICS)
            )
            for package, who in (("gptqmodel", "GPTQModel"), ("autoround", "AutoRound")):
                python = getattr(options, f"{package}_python")
                found[f"{package}-{name}"] = Side(
                    name, who, partial(PEERS[package], python, options=options, **how), partial(peer_version, package, python), True
                )  # fmt: skip
        elif settings["backend"] == "nf4":
            double = bool(settings.get("double_quant"))
            found[f"bitsandbytes-{name}"] = Side(
                name, "bitsandbytes", partial(bitsandbytes_nf4, double=double), partial(packages_version, ("bitsandbytes", "transformers"))
            )  # fmt: skip
        else:
            for suffix, words, head in (("", "", False), ("-head", ", head too", True)):
                found[f"torch-{name}{suffix}"] = Side(
                    name, f"torch, dynamic{words}", partial(torch_dynamic, head=head), partial(packages_version, ("torch",))
                )  # fmt: skip
        for who, suffix, changes in qlm_changes(settings["backend"]):
            wanted = {**settings, **changes}
            found[f"qlm-{suffix.replace('NAME', name)}"] = Side(
                name, who, partial(qlm, settings=wanted), qlm_version, takes_calibration(wanted)
            )
    return found


def qlm_changes(backend: str) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Who, a name with NAME for the format's, and the recipe's keys, of qlm's own sides."""
    for quality in PRESETS:
        yield f"qlm, {quality}", f"{quality}-NAME", {"quality": quality}
    for key, (off, backends) in ABLATIONS.items():
        if backend in backends:
            yield f"qlm, best, no {key}", f"best-NAME-no-{key}", {"quality": "best", key: off}


def takes_calibration(settings: Mapping[str, Any]) -> bool:
    """Whether a recipe with these settings may have a calibration section."""
    from pydantic import ValidationError

    from qlm.recipe import Recipe

    try:
        Recipe.model_validate(
            {"model": "model", "quantize": dict(settings), "calibration": {"data": "text"}, "output": "output"}
        )
    except ValidationError as error:
        if any(detail["loc"][:1] == ("quantize",) for detail in error.errors()):
            raise
        return False
    return True


# What a side depends on ..............................................................................................

NUMERICS = ("qlm/numerics/gptq.py", "qlm/numerics/affine.py")


@functools.cache
def files_version(files: tuple[str, ...]) -> str:
    """The first digits of a hash of source files, by their paths in the checkout."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.encode() + b"\0" + (ROOT / file).read_bytes())
    return digest.hexdigest()[:12]


def qlm_version() -> str:
    return sources_version(("qlm.quantize", "qlm.load", "qlm.evaluate"))


def packages_version(packages: Sequence[str]) -> str:
    try:
        return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    except importlib.metadata.PackageNotFoundError as error:
        raise LeftOut(f"{error.name} is not installed") from None


@functools.cache
def peer_version(package: str, python: Path | None) -> str:
    if python is None:
        raise LeftOut(f"no --{package}-python")
    code = (
        "import importlib.metadata as m, sys; "
        "print('; '.join(p + ' ' + m.version(p) for p in (sys.argv[1], 'torch', 'transformers')))"
    )
    asked = [str(python), "-c", code, {"autoround": "auto-round"}.get(package, package)]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise LeftOut(f"{python}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return f"{done.stdout.strip()}, script {files_version((f'evals/peer_{package}.py',))}"


# What each does ......................................................................................................


def from_folder(subject: Subject, folder: Path, seconds: float | None, facts: dict[str, Any] | None = None) -> Made:
    """What a side wrote, as qlm reads it."""
    from qlm.checkpoint.reader import Checkpoint
    from qlm.formats.dtypes import DTYPES
    from qlm.load import load

    tensors = Checkpoint.open(folder).tensors
    bits = 0
    for name, info in tensors.items():
        path = next((path for path in subject.linears if name.startswith(f"{path}.")), None)
        if path is not None and name != f"{path}.bias":
            bits += 8 * DTYPES[info.dtype] * math.prod(info.shape)
    size = sum(file.stat().st_size for file in {info.file for info in tensors.values()})
    weights = sum(O * I for O, I in subject.linears.values())
    model = load(folder, dtype="float32", device=subject.device)
    return Made(model, size, bits / weights, seconds, facts=facts or {})


def agreement_with(theirs: Tensor, ours: Any, subject: Subject) -> dict[str, float]:
    """How far the logits of the other program are from those of what qlm reads in its folder."""
    from qlm.kernels.ops import float_activations

    with float_activations():
        return compare(logits_of(ours, subject.few_windows().to(subject.device)).cpu(), theirs.cpu())


def float_model(subject: Subject, seed: int, work: Path) -> Made:
    return Made(subject.baseline, subject.bytes, None)


def qlm(subject: Subject, seed: int, work: Path, settings: dict[str, Any]) -> Made:
    from qlm.quantize import quantize
    from qlm.recipe import Recipe

    sections = {"model": str(subject.folder), "quantize": settings, "output": str(work / "qlm")}
    if takes_calibration(settings):
        sections["calibration"] = {**subject.calibration, "seed": seed}
    recipe = Recipe.model_validate(sections)
    start = time.perf_counter()
    quantize(recipe, device=subject.device)
    return from_folder(subject, work / "qlm", time.perf_counter() - start)


@torch.no_grad()
def round_to_nearest(subject: Subject, seed: int, work: Path, bits: int, group_size: int) -> Made:
    """GPTQ's symmetric grid spanning each group's weights, and every weight on its nearest level: no calibration at all."""
    from qlm.formats.dtypes import DTYPES
    from qlm.formats.gptq import GptqFormat, layout
    from qlm.load import load
    from qlm.numerics.gptq import gptq, unit_factor

    start = time.perf_counter()
    model = load(subject.folder, dtype="float32", device=subject.device)
    stored, replaced = 0, 0
    for path, shape in subject.linears.items():
        weight = model.get_submodule(path).weight
        factor = unit_factor(weight.shape[1], weight.device)
        found = gptq(weight, factor, bits=bits, group_size=group_size, symmetric=True, search=False)
        groups = found.g_idx.long()
        weight.copy_(found.scale[:, groups] * (found.codes - found.zero_point[:, groups]))
        tensors = layout((shape[0], shape[1]), GptqFormat(bits, group_size)).values()
        # Scales may be any float; they are fp16 in what qlm writes.
        stored += sum(math.prod(t.shape) * (4 if "I32" in t.dtypes else DTYPES["F16"]) for t in tensors)
        replaced += weight.numel()
    per_weight = subject.bytes / sum(p.numel() for p in subject.baseline.parameters())
    size = subject.bytes - round(replaced * per_weight) + stored
    return Made(model, size, 8 * stored / replaced, time.perf_counter() - start)


def bitsandbytes_nf4(subject: Subject, seed: int, work: Path, double: bool) -> Made:
    """As its users do it: transformers quantizes while loading, in the checkpoint's own dtype, and saves."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    start = time.perf_counter()
    theirs = AutoModelForCausalLM.from_pretrained(
        subject.folder, dtype="auto", quantization_config=settings, device_map=subject.device
    )
    theirs.save_pretrained(work / "bitsandbytes")
    made = from_folder(subject, work / "bitsandbytes", time.perf_counter() - start)
    if subject.device == "cpu":
        own = compute_in_float32(plain_transformers(work / "bitsandbytes"), repack=False)
        made.facts["agreement"] = agreement_with(logits_of(own, subject.few_windows()), made.model, subject)
    return made


def torch_dynamic(subject: Subject, seed: int, work: Path, head: bool) -> Made:
    """torch.ao.quantization.quantize_dynamic: a scale for each weight matrix, and one for all tokens of a forward pass while running.

    One window a pass, therefore. It writes no files: its bytes are those of its state dict, saved.
    """
    from qlm.load import load

    if subject.device != "cpu":
        raise LeftOut("runs on CPUs only")
    start = time.perf_counter()
    model = load(subject.folder, dtype="float32")
    what: Any = {torch.nn.Linear} if head else set(subject.linears)
    model = torch.ao.quantization.quantize_dynamic(model, what, dtype=torch.qint8)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    facts = {"activations": "int8, a scale for each window"}
    return Made(model, saved.tell(), 8.0, time.perf_counter() - start, batch_size=1, facts=facts)


def outside(
    package: str, python: Path, subject: Subject, seed: int, work: Path, options: argparse.Namespace, arguments: list[str]
) -> dict[str, Any]:  # fmt: skip
    """Let a peer quantize in its own environment; what it says of it."""
    windows = work / "windows.json"
    windows.write_text(json.dumps(subject.calibration_windows(seed).tolist()))
    script = str(ROOT / "evals" / f"peer_{package}.py")
    command = [str(python), script, "quantize", str(subject.folder), str(windows), str(work / package), *arguments]
    return run([*command, "--device", subject.device], options.threads)


def gptqmodel(
    python: Path, subject: Subject, seed: int, work: Path, options: argparse.Namespace, bits: int, group_size: int
) -> Made:
    if options.seconds:
        warm_up_gptqmodel(python, subject.folder, subject.device, options.threads)
    restored = ["--restore-head"] if subject.spec.model_type == "gpt_neox" else []
    arguments = ["--bits", str(bits), "--group-size", str(group_size), *restored]
    says = outside("gptqmodel", python, subject, seed, work, options, arguments)
    made = from_folder(subject, work / "gptqmodel", says["seconds"])
    if seed == options.seeds[0]:
        few, logits = work / "few.json", work / "logits.pt"
        few.write_text(json.dumps(subject.few_windows().tolist()))
        script = str(ROOT / "evals" / "peer_gptqmodel.py")
        run([str(python), script, "logits", str(work / "gptqmodel"), str(few), str(logits)], options.threads)
        made.facts["agreement"] = agreement_with(torch.load(logits, weights_only=True), made.model, subject)
    return made


@functools.cache
def warm_up_gptqmodel(python: Path, folder: Path, device: str, threads: int) -> None:
    """It compiles an extension when it first runs in an environment (42 s on two cores), which no figure should hold."""
    with tempfile.TemporaryDirectory() as name:
        windows = Path(name) / "windows.json"
        windows.write_text(json.dumps([list(range(4, 68))] * 4))
        script = str(ROOT / "evals" / "peer_gptqmodel.py")
        run([str(python), script, "quantize", str(folder), str(windows), f"{name}/output", "--device", device], threads)


def autoround(
    python: Path, subject: Subject, seed: int, work: Path, options: argparse.Namespace, bits: int, group_size: int
) -> Made:
    few, logits = work / "few.json", work / "logits.pt"
    few.write_text(json.dumps(subject.few_windows().tolist()))
    arguments = ["--bits", str(bits), "--group-size", str(group_size), "--logits-of", str(few), str(logits)]
    says = outside("autoround", python, subject, seed, work, options, arguments)
    made = from_folder(subject, work / "autoround", says["seconds"])
    made.facts["agreement"] = agreement_with(torch.load(logits, weights_only=True), made.model, subject)
    return made


PEERS: dict[str, Callable[..., Made]] = {"gptqmodel": gptqmodel, "autoround": autoround}
