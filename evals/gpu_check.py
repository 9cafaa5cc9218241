"""Does everything compute on a GPU what it computes on the CPU? Needs a CUDA GPU, no network, and a few minutes.

    python evals/gpu_check.py [--only TEXT ...] [--seconds N] [--out FILE]   on a machine with a GPU; exit code 69 where there is none
    python evals/gpu_check.py --device cpu --out F            the same code on the CPU, few checks: tests the script itself
    python evals/gpu_check.py --merge FILE ...                one report of several, of processes that ran side by side with other --only

Random-weight models of every variant of the three families (tests/tiny_models.py), each task class, each backend, each attention
implementation, in float32, bfloat16 and float16, without padding and with some on either side, against the CPU's float32 result of the same
folder with eager attention; the three ops and the backends' modules, forward and backward; the Triton kernels one by one, in every
configuration that may be chosen, twice to the bit and in a CUDA graph; recorded steps, their tokens and what `qlm bench` says of them; two
steps of training an adapter; and GPTQ, NF4 and int8 quantized on the GPU against quantized on the CPU.

A difference is the largest absolute one, in units of the reference's root mean square. The tolerances below say how large it may be
and why. The CPU computes with float activations, as the GPU does, not with the int8 ones of its kernels of 4-bit formats. What cannot
run for want of a package is listed as `not run`, and is no failure.

The order is shuffled, the same every time, but for the kernels' configurations, which take longest to compile and come last: what `--seconds`
allows is a fair sample, and what it does not is listed. The report is written after every check. A check that loses the GPU, or its
process, is a failed one, and the others go on in a fresh process (gpu_cells.py). The last line printed is JSON.
"""

import argparse
import importlib.util
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_cells import (
    AGAIN,
    NO_GPU,
    RENEW,
    Cell,
    NotRun,
    Ran,
    Resumption,
    add_options,
    results_folder,
    run_cells,
    supervised,
    what_the_gpu_says,
)
from shared import (
    ROOT,
    cpu_name,
    driver_version,
    slug,
    status_bytes,
    use_checkout,
    versions,
    write_byte_tokenizer,
)
from torch import Tensor

MIB = 1 << 20

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = ("opt", "neox-parallel-rotary-0.25", "bigcode-multi-query")
BACKENDS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "int8": {"backend": "int8"},
    "nf4": {"backend": "nf4"},
    "nf4-double": {"backend": "nf4", "double_quant": True},
    "gptq-4bit": {"backend": "gptq", "bits": 4},
    "gptq-3bit": {"backend": "gptq", "bits": 3, "group_size": 32, "symmetric": False, "order": "act"},
    "quanto-qint8": {"backend": "quanto", "qtype": "qint8"},
    "quanto-qint4": {"backend": "quanto", "qtype": "qint4"},
}
PACKAGES = {"nf4": "bitsandbytes", "quanto": "optimum.quanto"}

# Two layers of width 128 on either device. float32 differs by the order of sums alone, TF32 being off (2e-6 on one CPU between two
# attention implementations). The 16-bit dtypes round every weight and activation, by half an ulp of 2^-8 and 2^-11: on a CPU the worst of
# 20,000 logits is 0.124 (bfloat16) and 0.013 (float16) away, both without the attention's scaling, and 0.046 and 0.006 elsewhere.
# Room for a factor of two to three.
MODEL_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.04}
# int8 rounds activations to 1/255 of their range: a difference in the last bit moves some of them by a whole step. CPU: 0.076, 0.062.
INT8_MODEL_TOLERANCE = {"float32": 0.1, "bfloat16": 0.25, "float16": 0.2}
# quanto rounds its scales and shifts to the 16-bit dtype as well. CPU, qint4: 0.16, 0.023.
QUANTO_MODEL_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.07}
# One layer from the same 16-bit input: weight and result are rounded, the sum is not. CPU: 0.017 (bfloat16); quanto's qint4 0.034.
LAYER_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.007}
INT8_LAYER_TOLERANCE = {"float32": 0.02, "bfloat16": 0.05, "float16": 0.02}
QUANTO_LAYER_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.015}
# GPTQ lets every column repair the ones before it, so that one code that rounds the other way moves those after it. On one CPU up to 34 % of
# the codes differ when inputs change by one part in a million, 24 % when their products are summed in float64, 28 to 39 % when these are
# rounded to TF32 first, as a GPU does, and 36 to 47 % when blocks compute in bf16 instead of float32, while the KL from the float model
# stays within 5 % (3 and 4 bits alike). So codes may differ; the KL may not grow (relative, plus a floor). With TF32 it alone is asked.
CODES_DIFFER = {"float32": 0.45, "calibration dtype": 0.6}
WITH_TF32 = "float32 with TF32"
KL_GROWTH = 0.2
KL_FLOOR = 1e-4
# Rounding to nearest is the same operations on the same numbers.
CODES_DIFFER_NEAREST = 1e-4


# Of a training step's loss, relative, and of each gradient, by norm. A ReLU that opens where another device leaves it closed, or an
# activation that int8 rounds the other way, moves all gradients before it. CPU, where LayerNorms' weights change by one part in a million:
# 2e-7, 0.003 (OPT; elsewhere 6e-6), and 2e-4, 0.12 with int8; in bfloat16 2e-4, 0.12 (elsewhere 0.014), and 5e-4, 0.16 with int8.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
INT8_LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-3}
GRADIENT_TOLERANCE = {"float32": 0.02, "bfloat16": 0.3}
INT8_GRADIENT_TOLERANCE = {"float32": 0.3, "bfloat16": 0.4}
# Of plain gradient descent, with which a gradient's last bit is not the sign of a step: the second step's loss is visibly lower.
LEARNING_RATE = 1.0


# Tokens of a row that are padding, and their id.
PADDING, PAD = 7, 1
# Tokens that are written where texts are compared.
NEW_TOKENS = 24


class CaptureFailed(Exception):
    """A CUDA graph could not be captured; torch's allocator may not be what it was."""


@dataclass(frozen=True)
class Result:
    difference: float
    tolerance: float
    facts: dict[str, float | str] = field(default_factory=dict)


Check = tuple[str, Callable[[], Result]]


def difference(found: Tensor, reference: Tensor) -> float:
    """Largest absolute difference in units of the reference's root mean square; infinite where a value is not finite."""
    found, reference = found.detach().cpu().double(), reference.detach().cpu().double()
    if found.shape != reference.shape or not bool(found.isfinite().all()):
        return float("inf")
    return ((found - reference).abs().max() / reference.square().mean().sqrt()).item()


def need(name: str) -> None:
    """Raise NotRun where a backend's package is missing."""
    package = PACKAGES.get(name.partition("-")[0])
    if package is None:
        return
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise NotRun(f"the package {package} is not installed")


def need_attention(attention: str, device: str, dtype: str) -> None:
    from qlm.errors import QlmError
    from qlm.load import check_attention

    if attention == "flash_attention_2" and dtype == "float32":
        raise NotRun("flash-attn computes in 16 bits only")
    try:
        check_attention(attention, device)
    except QlmError as error:
        raise NotRun(str(error)) from None


# Checkpoints ----------------------------------------------------------------------------------------------------------


@cache
def tiny_models() -> Any:
    """tests/tiny_models.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("tiny_models", ROOT / "tests" / "tiny_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Checkpoints:
    """Folders of random-weight models, float and quantized on the CPU, made when first asked for; and the CPU's results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[tuple[str, str, str], Tensor] = {}

    def float_folder(self, variant: str, task: str) -> Path:
        from qlm.arch import FAMILIES as SPECS
        from qlm.load import model_class

        task = "causal-lm" if task == "base" else task
        path = self.folder / f"{variant}.{task}"
        if not path.exists():
            model = tiny_models().build(variant)
            spec = SPECS[model.config.model_type]
            if task != "causal-lm":
                # The classes for sequences look for the last token that is no padding.
                model.config.pad_token_id, model.config.num_labels = PAD, 3
                headed = model_class(spec, task)(model.config).eval()  # type: ignore[arg-type]
                headed.load_state_dict(model.state_dict(), strict=False)
                torch.manual_seed(1)
                for name, parameter in headed.named_parameters():
                    if not name.startswith(f"{spec.prefix}."):
                        parameter.data.normal_(0.0, 0.1)
                model = headed
            # Whole or not there: a process that dies here leaves the folder to the next.
            unfinished = path.with_name(f"{path.name}.unfinished")
            model.save_pretrained(unfinished)
            write_byte_tokenizer(unfinished, tiny_models().VOCABULARY, spec.bos_first)
            unfinished.rename(path)
        return path

    def quantized_folder(self, variant: str, task: str, backend: str, device: str = "cpu", suffix: str = "") -> Path:
        from qlm.quantize import quantize
        from qlm.recipe import Recipe

        if BACKENDS[backend] is None:
            return self.float_folder(variant, task)
        need(backend)
        task = "causal-lm" if task == "base" else task
        path = self.folder / f"{variant}.{task}.{backend}{suffix}"
        if not path.exists():
            sections: dict[str, Any] = {
                "model": str(self.float_folder(variant, task)),
                "task": task,
                "quantize": BACKENDS[backend],
                "output": str(path),
            }
            if backend.startswith("gptq"):
                text = str(ROOT / "calibration_data" / "english.txt")
                sections["calibration"] = {"data": text, "samples": 64, "length": tiny_models().POSITIONS}
            quantize(Recipe.model_validate(sections), device=device)
        return path

    def reference(self, variant: str, task: str, backend: str) -> Tensor:
        """The CPU's result in float32, with eager attention."""
        from qlm.load import load

        key = (variant, task, backend)
        if key not in self._references:
            folder = self.quantized_folder(variant, task, backend)
            model = load(folder, task=task, dtype="float32", attn_implementation="eager")  # type: ignore[arg-type]
            self._references[key] = outputs(model, padded=True)
        return self._references[key]


@torch.no_grad()
def outputs(model: Any, rows: int = 2, padded: bool = False) -> Tensor:
    """Every floating-point output of the model for some rows of tokens, as one vector, float32 on the CPU; with `padded` also for the same
    rows with padding on the left of one, and on its right, which no output is taken from."""
    ids = tiny_models().token_ids(batch=rows)
    masks: list[Tensor | None] = [None]
    for kept in (slice(PADDING, None), slice(None, -PADDING)) if padded else ():
        mask = torch.ones_like(ids)
        mask[-1] = 0
        mask[-1, kept] = 1
        masks.append(mask)
    device, found = next(model.parameters()).device, []
    for mask in masks:
        if mask is None:
            result = model(input_ids=ids.to(device), use_cache=False)
        else:
            # Where a sequence ends is told by its ids too, to the classes that classify it.
            given = ids.masked_fill(mask == 0, PAD)
            result = model(input_ids=given.to(device), attention_mask=mask.to(device), use_cache=False)
        for value in result.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.float().cpu()
                of_tokens = mask is not None and value.shape[: mask.ndim] == mask.shape
                found.append((value[mask.bool()] if of_tokens and mask is not None else value).flatten())
    assert found
    return torch.cat(found)


# Checks ---------------------------------------------------------------------------------------------------------------


def check_model(
    checkpoints: Checkpoints, variant: str, task: str, backend: str, attention: str, dtype: str, device: str
) -> Result:
    from qlm.load import load

    need(backend)
    need_attention(attention, device, dtype)
    reference = checkpoints.reference(variant, task, backend)
    folder = checkpoints.quantized_folder(variant, task, backend)
    model = load(folder, task=task, device=device, dtype=dtype, attn_implementation=attention)  # type: ignore[arg-type]
    special = {"int8": INT8_MODEL_TOLERANCE, "quanto": QUANTO_MODEL_TOLERANCE}
    tolerance = special.get(backend.partition("-")[0], MODEL_TOLERANCE)[dtype]
    return Result(difference(outputs(model, padded=True), reference), tolerance)


@torch.no_grad()
def check_text(checkpoints: Checkpoints, variant: str, backend: str, dtype: str, device: str) -> Result:
    """The most likely tokens, by steps of fixed shape, recorded and not, and with a cache that grows; and what `generate` draws twice."""
    from qlm.generate import generate
    from qlm.load import load, load_tokenizer
    from qlm.static_decoder import GrowingDecoder, StaticDecoder

    need(backend)
    folder = checkpoints.quantized_folder(variant, "causal-lm", backend)
    model = load(folder, device=device, dtype=dtype)
    ids = tiny_models().token_ids(batch=2, length=12).to(device)
    (tokens, recorded), (plain, _) = (
        decoded(StaticDecoder(model, 2, 12 + NEW_TOKENS, record), ids) for record in (True, False)
    )
    if not torch.equal(tokens, plain):
        raise ValueError("a recorded step gives other tokens than the same step launched kernel by kernel")
    drawn = [
        generate(model, load_tokenizer(folder), "The", max_new_tokens=NEW_TOKENS, top_p=0.9, num_return_sequences=2, seed=0, graphs=graphs)
        for graphs in (None, None, False)
    ]  # fmt: skip
    if drawn[0] != drawn[1] or drawn[0] != drawn[2]:
        raise ValueError(f"texts of one seed differ: {drawn}")
    _, growing = decoded(GrowingDecoder(model), ids, tokens)
    differ = (growing.argmax(-1) != tokens).float().mean().item()
    found = difference(recorded, growing)
    if dtype == "float32":
        return Result(differ, 0.0, {"logits": found})
    # The masked attention's other order of sums may let the second most likely token come first: only numbers are compared.
    tolerance = INT8_MODEL_TOLERANCE if backend == "int8" else MODEL_TOLERANCE
    return Result(found, tolerance[dtype], {"tokens_differ": differ})


def decoded(decoder: Any, ids: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What is most likely after ids [B, T], token after token, or what is given in its place: tokens [B, N], logits [B, N, V] of each."""
    logits, tokens, found = decoder.prefill(ids), [], []
    for i in range(NEW_TOKENS):
        # The next step writes over a recorded one's.
        found.append(logits.clone())
        tokens.append(logits.argmax(-1) if given is None else given[:, i])
        logits = decoder.step(tokens[-1])
    return torch.stack(tokens, 1), torch.stack(found, 1)


def check_bench(checkpoints: Checkpoints, backend: str, device: str) -> Result:
    """`qlm bench`: that its steps are recorded where there is a GPU, and that its figures can be."""
    from qlm.gpu_bench import gpu_bench

    need(backend)
    folder = checkpoints.quantized_folder(FAMILIES[0], "causal-lm", backend)
    measured = gpu_bench(folder, prompt_tokens=16, new_tokens=8, batch=2, repeats=2, device=device, dtype="float16")
    on_gpu = device.startswith("cuda")
    if measured.recorded != on_gpu:
        raise ValueError(f"recorded: {measured.recorded}")
    if measured.device != (torch.cuda.get_device_name(device) if on_gpu else "cpu"):
        raise ValueError(f"device: {measured.device}")
    figures = {name: value for name, value in asdict(measured).items() if type(value) in (int, float)}
    if not on_gpu:
        # What torch has allocated on a GPU.
        assert figures.pop("peak_gpu_gb") == 0
    wrong = {name: value for name, value in figures.items() if not 0 < value < float("inf")}
    if wrong:
        raise ValueError(f"figures: {wrong}")
    shown = ("prefill_ms", "decode_ms_per_token", "weight_bytes_per_token", "copy_gb_per_s")
    return Result(0.0, 0.0, {name: figures[name] for name in shown})


def check_training(checkpoints: Checkpoints, variant: str, backend: str, dtype: str, device: str) -> Result:
    """Two steps of an adapter over a quantized base, in 16 bits by autocast and with checkpointed activations, against the CPU's in
    float32: the losses, and of each parameter of the adapter its gradient, by the norm of the difference over the CPU's norm."""
    need(backend)
    folder = checkpoints.quantized_folder(variant, "causal-lm", backend)
    (losses, gradients), (expected, reference) = trained(folder, dtype, device), trained(folder, "float32", "cpu")
    if not expected[1] < expected[0]:
        raise ValueError(f"the CPU learns nothing: losses {expected}")
    off = max(abs(a / b - 1) if math.isfinite(a) else float("inf") for a, b in zip(losses, expected, strict=True))
    special = backend == "int8"
    allowed = (INT8_LOSS_TOLERANCE if special else LOSS_TOLERANCE)[dtype]
    if off > allowed:
        raise ValueError(f"losses {losses}, on the CPU {expected}: {off} apart; {allowed} is allowed")
    worst = max((apart(gradients[name], reference[name]), name) for name in reference)
    tolerance = (INT8_GRADIENT_TOLERANCE if special else GRADIENT_TOLERANCE)[dtype]
    return Result(worst[0], tolerance, {"loss": off, "of": worst[1]})


def apart(found: Tensor, reference: Tensor) -> float:
    """The norm of the difference over the reference's; infinite where a value is not finite."""
    if not bool(found.isfinite().all()):
        return float("inf")
    size = reference.norm().item()
    return (found - reference).norm().item() / size if size else float("inf" if bool(found.any()) else 0)


def trained(folder: Path, dtype: str, device: str) -> tuple[list[float], dict[str, Tensor]]:
    """Loss of two steps, and every gradient of either, on the CPU, as qlm.finetune makes them: its model, its adapter, its loss."""
    from qlm.adapters import attach
    from qlm.arch import FAMILIES as SPECS
    from qlm.load import load
    from qlm.recipe import AdapterRecipe
    from qlm.training.language_loss import language_loss
    from qlm.training.state import trainable

    model: Any = load(folder, device=device, dtype=dtype, attn_implementation="sdpa")
    for module in model.modules():
        # No two devices drop the same numbers.
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    adapter = AdapterRecipe.model_validate({"r": 8, "dropout": 0.0})
    model = attach(model, SPECS[model.config.model_type], adapter, "causal-lm", seed=0).train()
    parameters = trainable(model)
    if dtype != "float32":
        # By its name in transformers 5.23; 5.20 called it otherwise.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    ids = tiny_models().token_ids(batch=4).to(device)
    optimizer = torch.optim.SGD(parameters.values(), lr=LEARNING_RATE)
    losses, gradients = list[float](), dict[str, Tensor]()
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, DTYPES[dtype], enabled=dtype != "float32"):
            batch = {"input_ids": ids, "labels": ids, "use_cache": False}
            loss = language_loss(model, batch, DTYPES[dtype]) / ids[:, 1:].numel()
        loss.backward()
        losses.append(loss.item())
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            gradients[f"{name}, step {step + 1}"] = parameter.grad.detach().float().cpu().clone()
        optimizer.step()
    return losses, gradients


def check_flash(checkpoints: Checkpoints, variant: str, dtype: str, device: str) -> Result:
    """Whether SDPA can run on its flash backend alone, without a mask: what transformers hands it in a prompt and in training."""
    from qlm.load import load

    if not device.startswith("cuda") or torch.cuda.get_device_capability(device) < (8, 0):
        raise NotRun("only GPUs from sm_80 on have flash attention")
    model = load(checkpoints.float_folder(variant, "causal-lm"), device=device, dtype=dtype, attn_implementation="sdpa")
    return flash_alone(model, tiny_models().token_ids(batch=2).to(device))


def flash_alone(model: Any, ids: Tensor) -> Result:
    from gpu_measure import chosen_by_sdpa, flash_ran

    ran = flash_ran(model, ids)
    if ran is not True:
        raise ValueError(f"SDPA cannot run on flash alone: {ran}")
    return Result(0.0, 0.0, {"sdpa_backend": chosen_by_sdpa(lambda: model(input_ids=ids, use_cache=False))})


def check_layer(
    run: Callable[[Tensor, str], Tensor], in_features: int, tokens: int, dtype: str, device: str, tolerance: float
) -> Result:
    """`run(x, device)`, forward and backward, against its CPU float32 result from the same rounded input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, in_features, generator=generator).to(DTYPES[dtype])
    results = []
    for place, kind in ((device, DTYPES[dtype]), ("cpu", torch.float32)):
        own = x.detach().to(device=place, dtype=kind).requires_grad_()
        y = run(own, place)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
        y.backward(upstream.to(device=place, dtype=y.dtype))
        assert own.grad is not None
        results.append((y, own.grad))
    (y, gradient), (y_reference, gradient_reference) = results
    forward, backward = difference(y, y_reference), difference(gradient, gradient_reference)
    return Result(max(forward, backward), tolerance, {"forward": forward, "backward": backward})


def int8_op(O: int, I: int, symmetric: bool, x: Tensor, device: str) -> Tensor:
    from qlm.kernels.ops import int8_linear, int8_row_sum

    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-127, 128, (O, I), dtype=torch.int8, generator=generator).to(device)
    scale = (torch.rand(O, 1, generator=generator) * 1e-3 + 1e-4).to(device)
    bias = torch.randn(O, generator=generator).to(device=device, dtype=x.dtype)
    return int8_linear(x, weight, scale, int8_row_sum(weight), bias, symmetric)


def gptq_tensors(O: int, I: int, bits: int, v2: bool, shuffled: bool, group_size: int = 32) -> tuple[Tensor, ...]:
    """qweight, qzeros, scales, g_idx; scattered groups, as act order leaves them, if `shuffled`."""
    from qlm.numerics.packing import encode_zero_points, pack_rows

    generator = torch.Generator().manual_seed(3)
    groups = -(-I // group_size)
    codes = torch.randint(0, 2**bits, (I, O), generator=generator).to(torch.uint8)
    zeros = torch.randint(1, 2**bits, (groups, O), generator=generator).to(torch.int32)
    scales = (torch.rand(groups, O, generator=generator) * 0.02 + 0.002).to(torch.float16)
    g_idx = (torch.randperm(I, generator=generator) if shuffled else torch.arange(I)) // group_size
    qzeros = encode_zero_points(zeros, bits, "gptq_v2" if v2 else "gptq")
    return pack_rows(codes, bits), qzeros, scales, g_idx.to(torch.int32)


def gptq_op(
    O: int, I: int, bits: int, v2: bool, shuffled: bool, x: Tensor, device: str, group_size: int = 32
) -> Tensor:
    from qlm.kernels.ops import gptq_linear

    tensors = gptq_tensors(O, I, bits, v2, shuffled, group_size)
    bias = torch.randn(O, generator=torch.Generator().manual_seed(3)).to(device=device, dtype=x.dtype)
    return gptq_linear(x, *(tensor.to(device) for tensor in tensors), bias, bits=bits, v2=v2)


def nf4_op(O: int, I: int, x: Tensor, device: str) -> Tensor:
    from qlm.kernels.ops import nf4_linear

    generator = torch.Generator().manual_seed(4)
    packed = torch.randint(0, 256, (O * I // 2, 1), generator=generator).to(torch.uint8).to(device)
    absmax = (torch.rand(-(-O * I // 64), generator=generator) * 0.1 + 0.01).to(device)
    bias = torch.randn(O, generator=generator).to(device=device, dtype=x.dtype)
    return nf4_linear(x, packed, absmax, bias, out_features=O, in_features=I)


def backend_module(backend: str, O: int, I: int, x: Tensor, device: str) -> Tensor:
    """A linear quantized on the CPU, run by the backend's own module."""
    from qlm.backends import BACKENDS as REGISTRY
    from qlm.backends import Statistics
    from qlm.recipe import quantize_section, settings_for

    settings = settings_for(quantize_section(BACKENDS[backend] or {}), "layers.0.fc1")
    assert settings is not None
    own = REGISTRY[settings.backend]
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(O, I, generator=generator) * 0.05
    inputs = torch.randn(4 * I, I, generator=generator)
    bias = torch.randn(O, generator=generator)
    (quantized,) = own.quantize({"fc1": weight}, Statistics(inputs.T @ inputs / len(inputs), len(inputs)), settings)
    tensors = {name: tensor.to(device) for name, tensor in quantized.tensors.items()}
    module = own.module(tensors, bias.to(device), (O, I), own.format(settings, torch.float32), x.dtype)
    return module.to(device)(x)


def check_module(backend: str, tokens: int, dtype: str, device: str) -> Result:
    need(backend)
    special = {"int8": INT8_LAYER_TOLERANCE, "quanto": QUANTO_LAYER_TOLERANCE}
    tolerance = special.get(backend.partition("-")[0], LAYER_TOLERANCE)[dtype]
    return check_layer(partial(backend_module, backend, 256, 128), 128, tokens, dtype, device, tolerance)


# The Triton kernels -----------------------------------------------------------------------------------------------------


def the_gpu(device: str) -> Any:
    """What qlm's Triton kernels know of the GPU; fails where the torch reference would compute, unseen."""
    from qlm.kernels import cuda_ops

    if not device.startswith("cuda"):
        raise NotRun("only a GPU has Triton kernels")
    index = torch.device(device).index or 0
    gpu = cuda_ops._gpu(index)
    if gpu is None:
        raise ValueError(f"the torch reference computes here: {cuda_ops.why_not(index)}")
    return gpu


def largest(pairs: dict[str, float], tolerance: float) -> Result:
    """The largest of some differences, and whose it is."""
    name = max(pairs, key=lambda key: pairs[key])
    if pairs[name] > tolerance:
        raise ValueError(f"{name} differs by {pairs[name]}; {tolerance} is allowed")
    return Result(pairs[name], tolerance, {"compared": len(pairs)})


def check_gptq_kernels(bits: int, shuffled: bool, group_size: int, dtype: str, device: str) -> Result:
    """Every configuration of every kernel, of which the op uses one, against a float64 product on the CPU."""
    from qlm.kernels import cuda_ops, ops
    from qlm.kernels.cuda import gptq

    gpu = the_gpu(device)
    tensors = [tensor.to(device) for tensor in gptq_tensors(768, 1024, bits, False, shuffled, group_size)]
    weight = ops.dequantize_gptq(*(tensor.cpu() for tensor in tensors), bits, False).double().t()
    kept = cuda_ops._gptq_layer(*tensors, bits, False, ops._zero_points)
    layer = cuda_ops._in_file_order(kept, tensors[0], tensors[2], tensors[3], bits)
    found = {"dequantize": difference(gptq.dequantize(layer, DTYPES[dtype]), weight)}
    if kept.order is not None:
        layer = gptq.Layer(kept.words, tensors[2], kept.zero_point, kept.g_idx, bits, kept.group_size)
    for rows in (1, 3, 16, 17, 64, 200):
        x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rows)).to(DTYPES[dtype])
        given = x.to(device) if kept.order is None else x.to(device).index_select(1, kept.order)
        ways = [(gptq.matvec, how) for how in gptq.MATVEC] if rows <= cuda_ops.MATVEC_ROWS else []
        if gpu.tensor_cores and dtype != "float32":
            ways += [(gptq.matmul, how) for how in gptq.matmul_configs(rows)]
        for kernel, how in ways:
            y = kernel(given, layer, None, how, gpu.multiprocessors)
            found[f"{kernel.__name__}, {rows} rows, {how}"] = difference(y, x.double() @ weight)
    return largest(found, LAYER_TOLERANCE[dtype])


def check_int8_kernels(symmetric: bool, dtype: str, device: str) -> Result:
    """The same for int8, whose codes, scales and zero points are the CPU's to the bit, and whose outputs are one rounding away."""
    from qlm.kernels import cuda_ops, ops
    from qlm.kernels.cuda import int8

    gpu = the_gpu(device)
    generator = torch.Generator().manual_seed(6)
    weight = torch.randint(-127, 128, (768, 1104), dtype=torch.int8, generator=generator)
    scale, bias = torch.rand(768, 1, generator=generator) * 1e-3, torch.randn(768, generator=generator)
    row_sum = ops.int8_row_sum(weight)
    found = {}
    for rows in (1, 3, 16, 17, 64, 200):
        x = (torch.randn(rows, 1104, generator=generator) * 3).to(DTYPES[dtype])
        expected = ops.int8_linear_reference(x.float(), weight, scale, row_sum, bias, symmetric)
        tokens = int8.quantize(x.to(device), symmetric)
        for ours, theirs in zip(tokens, ops.quantize_activation_per_token(x, symmetric), strict=True):
            if not torch.equal(ours.cpu().flatten(), theirs.flatten()):
                raise ValueError("activations are quantized to other numbers than on the CPU")
        layer = int8.Layer(*(t.to(device) for t in (weight, scale, row_sum, bias)), DTYPES[dtype])
        ways = [(int8.matvec, how) for how in int8.MATVEC] if rows <= cuda_ops.MATVEC_ROWS else []
        if gpu.tensor_cores:
            ways += [(int8.matmul, how) for how in int8.matmul_configs(rows)]
        for kernel, how in ways:
            y = kernel(tokens, layer, how, gpu.multiprocessors)
            found[f"{kernel.__name__}, {rows} rows, {how}"] = difference(y, expected)
    dequantized = int8.dequantize(layer.weight, layer.scale, DTYPES[dtype])
    found["dequantize"] = difference(dequantized, weight.double() * scale.double())
    return largest(found, LAYER_TOLERANCE[dtype])


def check_columns(order: str, device: str) -> Result:
    """GPTQ and its sweeps with the kernels, against the CPU: codes may tip over, the loss may not grow."""
    from qlm.kernels import cuda_ops
    from qlm.numerics.columns import TORCH, Columns
    from qlm.numerics.gptq import factorize_in_order, gptq, row_losses
    from qlm.numerics.refine import refine

    the_gpu(device)
    found = cuda_ops.columns(torch.device("cuda", torch.device(device).index or 0))
    assert found is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    weight, hessian = torch.randn(300, 512, generator=generator), x.T @ x / 2048
    exact = factorize_in_order(hessian, order, 128, 0.01)
    losses = []
    for place, columns in ((device, Columns(*found)), ("cpu", TORCH)):
        W, H = weight.to(place), hessian.to(place)
        factor = factorize_in_order(H, order, 128, 0.01)
        result = gptq(
            W, factor, bits=3, group_size=128, symmetric=True, search=True, static=order == "static", columns=columns
        )  # fmt: skip
        result = refine(W, H, 0.01, result.codes, result.scale, result.zero_point, result.g_idx, 3, 2, columns=columns)
        losses.append(row_losses(weight - result.dequantize().cpu(), exact).sum().item())
    return Result(losses[0] / losses[1] - 1, 0.01)


def check_repeated(
    run: Callable[[Tensor, str], Tensor], in_features: int, tokens: int, dtype: str, device: str
) -> Result:
    """The same bytes twice, and in a CUDA graph that is replayed with another x."""
    the_gpu(device)
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype])
    first, second = run(x, device), run(x * 2, device)
    if not torch.equal(first, run(x, device)):
        raise ValueError("two calls differ")
    given, graph = x.clone(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            captured = run(given, device)
    except Exception as error:
        raise CaptureFailed(str(error)) from error
    given.copy_(x * 2)
    graph.replay()
    return Result(0.0 if torch.equal(captured, second) else float("inf"), 0.0)


def kept_on(op: Callable[..., Tensor], *tensors: Tensor, **settings: Any) -> Callable[[Tensor, str], Tensor]:
    """`run(x, device)` of a layer that is moved once: a graph may not copy from the CPU, and what is kept of a layer hangs on its tensors."""
    moved: list[Tensor] = []

    def run(x: Tensor, device: str) -> Tensor:
        moved.extend(tensor.to(device) for tensor in tensors[len(moved) :])
        return op(x, *moved, **settings)

    return run


def kernel_checks(device: str, dtypes: tuple[str, ...]) -> Iterator[Check]:
    from qlm.kernels.ops import gptq_linear, int8_linear, int8_row_sum

    for order in ("gar", "act", "static"):
        yield f"quantize columns {order}", partial(check_columns, order, device)
    for dtype in dtypes:
        for bits in (2, 3, 4, 8):
            for shuffled, group_size in ((False, 128), (True, 128), (False, 32), (False, 1024), (False, 384)):
                name = f"kernels gptq {bits}-bit group {group_size}{' shuffled' if shuffled else ''} {dtype}"
                yield name, partial(check_gptq_kernels, bits, shuffled, group_size, dtype, device)
        for symmetric in (False, True):
            name = f"kernels int8 {'symmetric' if symmetric else 'asymmetric'} {dtype}"
            yield name, partial(check_int8_kernels, symmetric, dtype, device)
        for tokens in (1, 16, 17, 300):
            for shuffled in (False, True):
                run = kept_on(gptq_linear, *gptq_tensors(768, 1024, 4, False, shuffled, 128), bits=4, v2=False)
                name = f"repeated gptq 4-bit{' shuffled' if shuffled else ''} tokens {tokens} {dtype}"
                yield name, partial(check_repeated, run, 1024, tokens, dtype, device)
            weight = torch.randint(-127, 128, (768, 1024), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
            run = kept_on(int8_linear, weight, torch.full((768, 1), 1e-3), int8_row_sum(weight))
            yield f"repeated int8 tokens {tokens} {dtype}", partial(check_repeated, run, 1024, tokens, dtype, device)


# Quantizing -------------------------------------------------------------------------------------------------------------


def codes_of(folder: Path) -> dict[str, Tensor]:
    """Every code of a quantized folder: name of the linear to int tensor."""
    from qlm.checkpoint.reader import Checkpoint
    from qlm.numerics.packing import unpack_nf4, unpack_rows

    checkpoint = Checkpoint.open(folder)
    assert checkpoint.quantize_config is not None
    codes = {}
    for name, info in checkpoint.tensors.items():
        linear, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            codes[linear] = unpack_rows(checkpoint.read(name), int(checkpoint.quantize_config["bits"]))
        elif leaf == "weight" and info.dtype == "U8":
            codes[linear] = unpack_nf4(checkpoint.read(name))
        elif leaf == "weight" and info.dtype == "I8":
            codes[linear] = checkpoint.read(name)
    assert codes
    return codes


def kl(first: Path, second: Path) -> float:
    """Mean KL(first || second) over the tokens of `outputs`, in nats, both on the CPU in float32."""
    from qlm.load import load

    size = tiny_models().VOCABULARY
    p, q = (torch.log_softmax(outputs(load(f, dtype="float32"), rows=64).view(-1, size), -1) for f in (first, second))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def check_quantize(checkpoints: Checkpoints, variant: str, backend: str, how: str, device: str) -> Result:
    """qlm.quantize on the device against qlm.quantize on the CPU: share of codes that differ, and the KL it costs.

    Args:
        how: "float32": blocks and sums, so that the algorithm is compared; WITH_TF32: as GPUs sum, against the CPU's float32;
            "calibration dtype": as each device does it.
    """
    need(backend)

    def made_on(place: str, how: str) -> Path:
        with ExitStack() as patches:
            if how != "calibration dtype":
                patches.enter_context(mock.patch("qlm.quantize.calibration_dtype", return_value=torch.float32))
            if how == "float32":
                patches.enter_context(without_tf32())
            return checkpoints.quantized_folder(variant, "causal-lm", backend, place, f".made-on-{place}-{slug(how)}")

    here, there = made_on("cpu", "float32" if how == WITH_TF32 else how), made_on(device, how)
    ours, theirs = codes_of(here), codes_of(there)
    differing = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    share = differing / sum(codes.numel() for codes in ours.values())
    base = checkpoints.float_folder(variant, "causal-lm")
    cost = {"kl_made_on_cpu": kl(base, here), "kl_made_here": kl(base, there), "kl_between": kl(here, there)}
    # The device must not quantize worse than the CPU does.
    growth = (cost["kl_made_here"] - KL_FLOOR) / cost["kl_made_on_cpu"] - 1
    if how == WITH_TF32:
        return Result(growth, KL_GROWTH, {**cost, "codes_differ": share})
    if growth > KL_GROWTH:
        raise ValueError(f"the KL from the float model grew: {cost}")
    return Result(share, CODES_DIFFER[how] if backend.startswith("gptq") else CODES_DIFFER_NEAREST, {**cost})


def without_tf32() -> Any:
    """Inside, a GPU sums the statistics of quantizing in float32, as the CPU does."""
    return mock.patch("qlm.stream._tf32", nullcontext)


def check_quantize_model(checkpoints: Checkpoints, variant: str, backend: str, device: str) -> Result:
    """qlm.quantize_model in memory on the device, then run there, against the same on the CPU; float32."""
    from qlm.load import load
    from qlm.quantize import quantize_model

    need(backend)
    folder = checkpoints.float_folder(variant, "causal-lm")
    results = []
    for place in (device, "cpu"):
        model = load(folder, device=place, dtype="float32")
        rows = tiny_models().token_ids(batch=64, length=tiny_models().POSITIONS).to(place)
        with without_tf32():
            quantize_model(model, BACKENDS[backend] or {}, rows if backend.startswith("gptq") else None)
        results.append(outputs(model))
    found = difference(*results)
    if not backend.startswith("gptq"):
        return Result(found, INT8_MODEL_TOLERANCE["float32"])
    # Where codes round the other way, single logits are as far from the CPU's as these are from the float model's: 0.24 and 0.3 on a CPU. What
    # is lost by quantizing, the squares' sum, is the same within 7 %, even with TF32.
    exact = outputs(load(folder, dtype="float32"))
    lost = [(result - exact).square().sum().item() for result in results]
    growth = lost[0] / lost[1] - 1 if found < float("inf") else float("inf")
    return Result(growth, KL_GROWTH, {"difference": found})


def all_checks(checkpoints: Checkpoints, device: str, few: bool) -> Iterator[Check]:
    """Every check by its name. `few` keeps one of each kind."""
    from qlm.arch import FAMILIES as SPECS

    dtypes = ("float32", "bfloat16") if few else tuple(DTYPES)
    # quanto's qint4 compiles an extension when it is first used: a minute, which a test does not need.
    backends = [name for name in BACKENDS if name != "float" and not (few and name == "quanto-qint4")]
    attentions = ("sdpa", "eager", "flash_attention_2")

    for dtype in dtypes:
        for tokens in (33,) if few else (1, 3, 16, 17, 33, 300):
            exact, int8_tolerance = LAYER_TOLERANCE[dtype], INT8_LAYER_TOLERANCE[dtype]
            for O, I in (
                (256, 128),
                (60, 1100),
            ):  # the second has no multiple of 8 out features, and two chunks of sums
                for symmetric in (False, True):
                    run: Any = partial(int8_op, O, I, symmetric)
                    name = f"op int8 {O}x{I} {'symmetric' if symmetric else 'asymmetric'} tokens {tokens} {dtype}"
                    yield name, partial(check_layer, run, I, tokens, dtype, device, int8_tolerance)
            for bits in (2, 3, 4, 8):
                for v2, shuffled, I, size in (
                    (False, False, 128, 32),
                    (True, True, 128, 32),
                    (False, False, 1056, 384),
                ):
                    run = partial(gptq_op, 256, I, bits, v2, shuffled, group_size=size)
                    how = f"{'v2 shuffled' if v2 else 'v1'} group {size}"  # of 384 the last has 288 in features
                    name = f"op gptq {bits}-bit {how} tokens {tokens} {dtype}"
                    yield name, partial(check_layer, run, I, tokens, dtype, device, exact)
            run = partial(nf4_op, 256, 128)
            yield f"op nf4 tokens {tokens} {dtype}", partial(check_layer, run, 128, tokens, dtype, device, exact)
            for backend in backends if tokens in (1, 33) else ():
                name = f"module {backend} tokens {tokens} {dtype}"
                yield name, partial(check_module, backend, tokens, dtype, device)

    yield from kernel_checks(device, dtypes)

    def model(variant: str, task: str, backend: str, attention: str, dtype: str) -> Check:
        name = f"model {variant} {task} {backend} {attention} {dtype}"
        return name, partial(check_model, checkpoints, variant, task, backend, attention, dtype, device)

    for dtype in dtypes:
        for variant in FAMILIES if few else tiny_models().VARIANTS:
            for attention in attentions:
                yield model(variant, "causal-lm", "float", attention, dtype)
        for variant in FAMILIES:
            for backend in backends[:1] if few and variant != FAMILIES[0] else backends:
                for attention in attentions[:1] if few else attentions:
                    yield model(variant, "causal-lm", backend, attention, dtype)
            spec = SPECS[tiny_models().VARIANTS[variant]().config.model_type]
            for task in spec.model_classes:
                if task != "causal-lm":
                    for backend in ["float"] if few else ["float", *backends]:
                        yield model(variant, task, backend, "sdpa", dtype)

    for dtype in dtypes:
        for variant in FAMILIES:
            for backend in ("float",) if few else ("float", "int8", "nf4", "gptq-4bit", "gptq-3bit"):
                name = f"text {variant} {backend} {dtype}"
                yield name, partial(check_text, checkpoints, variant, backend, dtype, device)

    for backend in ("float", "int8", "nf4", "gptq-4bit"):
        yield f"bench {backend}", partial(check_bench, checkpoints, backend, device)

    for dtype in ("float32", "bfloat16"):
        for variant in FAMILIES[:1] if few else FAMILIES:
            for backend in ("nf4", "int8", "gptq-4bit"):
                name = f"train {backend} {variant} {dtype}"
                yield name, partial(check_training, checkpoints, variant, backend, dtype, device)

    for dtype in ("bfloat16",) if few else ("bfloat16", "float16"):
        for variant in FAMILIES:
            yield f"flash {variant} {dtype}", partial(check_flash, checkpoints, variant, dtype, device)

    for variant in FAMILIES[:1] if few else FAMILIES:
        for backend in ("int8", "nf4", "gptq-4bit") if few else ("int8", "nf4", "nf4-double", "gptq-4bit", "gptq-3bit"):
            for how in (*CODES_DIFFER, WITH_TF32) if backend.startswith("gptq") else ("float32",):
                name = f"quantize {variant} {backend} calibrated in {how}"
                yield name, partial(check_quantize, checkpoints, variant, backend, how, device)
        for backend in ("int8", "nf4", "gptq-4bit"):
            name = f"quantize_model {variant} {backend}"
            yield name, partial(check_quantize_model, checkpoints, variant, backend, device)


def in_order(checks: list[Check]) -> list[Check]:
    """Shuffled, the same every time; the kernels' configurations last."""
    shuffled = random.Random(0).sample(checks, len(checks))
    return sorted(shuffled, key=lambda check: check[0].startswith("kernels "))


# The report -------------------------------------------------------------------------------------------------------------


def run_check(check: Check, device: str) -> dict[str, Any]:
    """One row of the report; with `lost` where the GPU does not answer any more."""
    name, run = check
    on_gpu = device.startswith("cuda")
    start = time.perf_counter()
    row: dict[str, Any] = {"name": name}
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        result = run()
        row |= {
            "max_difference": result.difference if result.difference < float("inf") else None,
            "tolerance": result.tolerance, "ok": result.difference <= result.tolerance, **result.facts,
        }  # fmt: skip
    except NotRun as reason:
        row |= {"ok": None, "not_run": f"not run: {reason}"}
    except Exception as error:  # whatever a kernel or a library throws is what this check found; the others still run
        text = str(error).strip()
        row |= {"ok": False, "error": f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"}
    lost = what_the_gpu_says(device)
    if lost is not None:
        row |= {"ok": False, "error": row.get("error") or lost, "lost": True}
    row["seconds"] = round(time.perf_counter() - start, 4)
    if lost is None:
        # On the CPU the resident peak of the whole process so far: there is no smaller one to be had.
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else status_bytes("VmHWM")
        row["peak_mib"] = round(peak / MIB, 1)
    return row


def run_in_cells(check: Callable[[], Any], cell: Cell, device: str) -> Ran:
    row = run_check((cell.name, check), device)
    if row.get("lost"):
        return row, AGAIN
    # What differs, or does not compile, leaves the GPU as it was.
    return row, RENEW if str(row.get("error")).startswith(CaptureFailed.__name__) else None


def say(row: dict[str, Any]) -> None:
    if row["ok"] is False:
        why = row.get("error") or f"difference {row['max_difference']}, tolerance {row['tolerance']}"
        print(f"FAILED  {row['name']}: {why}", flush=True)


class Report:
    """A JSON file that is whole after every check, each on a line of its own. With `resumed` the checks that are in it stay."""

    def __init__(self, path: Path, facts: dict[str, Any], resumed: bool, seconds: float = 0.0) -> None:
        """
        Args:
            facts: `machine` and `versions`. seconds: that went by before.
        """
        self.path, self._facts = path, facts
        self._rows: dict[str, dict[str, Any]] = {}
        self._lines: dict[str, str] = {}
        self._left_out: list[str] = []
        if resumed and path.exists():
            report = json.loads(path.read_text("utf-8"))
            seconds = report["summary"]["seconds"]
            for row in report["checks"]:
                self._enter(row)
        self._start = time.perf_counter() - seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def _enter(self, row: dict[str, Any]) -> None:
        self._rows[row["name"]], self._lines[row["name"]] = row, json.dumps(row)

    def put(self, row: dict[str, Any]) -> None:
        self._enter(row)
        self._write()

    def leave_out(self, names: Sequence[str]) -> None:
        self._left_out = list(names)
        self._write()

    def not_run(self) -> dict[str, int]:
        """How many checks did not run for each reason."""
        return dict(Counter(row["not_run"] for row in self._rows.values() if row["ok"] is None))

    def summary(self) -> dict[str, Any]:
        rows = self._rows.values()
        return {
            "device": self._facts["machine"]["gpu"] or "cpu",
            "checks": len(rows),
            "ok": sum(row["ok"] is True for row in rows),
            "failed": sum(row["ok"] is False for row in rows),
            "not_run": sum(row["ok"] is None for row in rows),
            "left_out": len(self._left_out),
            "seconds": round(time.perf_counter() - self._start, 1),
            "peak_mib": max((row.get("peak_mib", 0) for row in rows), default=0),
        }

    def _write(self) -> None:
        report = {"summary": self.summary(), **self._facts, "not_run": self.not_run(), "left_out": self._left_out}
        # A line a check, from texts that are there already: a thousand checks write it a thousand times.
        head = json.dumps(report, indent=2).removesuffix("\n}")
        checks = ",\n    ".join(self._lines.values())
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        unfinished.write_text(f'{head},\n  "checks": [\n    {checks}\n  ]\n}}\n', "utf-8")
        unfinished.replace(self.path)


def facts_of(device: str) -> dict[str, Any]:
    from qlm.kernels import ops

    on_gpu = device.startswith("cuda")
    machine = {
        "cpu": cpu_name(), "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": driver_version() if on_gpu else None, "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        # Where the kernels cannot run, plain torch computes, and is what was checked.
        "kernels": {op: ops.kernel(op, "cuda" if on_gpu else "cpu") for op in ("gptq_linear", "int8_linear")},
    }  # fmt: skip
    return {"machine": machine, "versions": versions()}


def file_for(device_name: str) -> Path:
    return results_folder(None) / f"gpu_check-{slug(device_name)}.json"


def merge(files: Sequence[Path], out: Path | None) -> int:
    """One report of all files' checks. Machine and versions are those of the first."""
    reports = [json.loads(file.read_text("utf-8")) for file in files]
    facts = {key: reports[0][key] for key in ("machine", "versions")}
    seconds = max(report["summary"]["seconds"] for report in reports)
    merged = Report(out or file_for(facts["machine"]["gpu"] or "cpu"), facts, resumed=False, seconds=seconds)
    done = set[str]()
    for report in reports:
        for row in report["checks"]:
            done.add(row["name"])
            merged.put(row)
    merged.leave_out([name for report in reports for name in report["left_out"] if name not in done])
    return finish(merged)


def finish(report: Report) -> int:
    """Print what there is to say: the exit code."""
    summary = report.summary()
    for reason, count in report.not_run().items():
        print(f"{count} checks {reason}")
    if summary["left_out"]:
        print(f"{summary['left_out']} checks left out, the time being over; the report lists them")
    print(f"written: {report.path}")
    print(json.dumps(json.loads(report.path.read_text("utf-8"))["summary"]))
    return 1 if summary["failed"] or not summary["checks"] else 0


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for few checks without a GPU")
    arguments.add_argument("--out", type=Path, help="JSON report; $OUT or evals/results by default")
    arguments.add_argument("--only", nargs="+", default=[""], help="checks whose name contains one of these texts")
    arguments.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="reports that become one")
    add_options(arguments)
    options = arguments.parse_args()
    if options.merge:
        return merge(options.merge, options.out)
    if options.progress is None:
        # This process has no GPU to lose.
        return supervised(__file__, options.seconds)
    device: str = options.device
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print(
            "gpu_check: torch sees no CUDA GPU here; nothing was checked (--device cpu runs a few checks on the CPU)",
            file=sys.stderr,
        )
        return NO_GPU
    use_checkout()
    import transformers

    from qlm.kernels.ops import float_activations

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # The defaults, said aloud: TF32 would round every float32 product to 11 bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    device_name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    resumption = Resumption.of(options)
    report = Report(options.out or file_for(device_name), facts_of(device), resumed=resumption.after is not None)
    # Beside the file in which `supervise` reads: checkpoints outlive a process that loses its GPU.
    folder = resumption.progress.with_name("checkpoints")
    folder.mkdir(exist_ok=True)
    with float_activations():
        checks = {
            name: check
            for name, check in in_order(list(all_checks(Checkpoints(folder), device, few=not on_gpu)))
            if any(text in name for text in options.only)
        }
        again = run_cells(
            [Cell(name, {}, dict) for name in checks], report, resumption, device=device, until=float(options.until), say=say,
            run=lambda cell, device: run_in_cells(checks[cell.name], cell, device),
        )  # fmt: skip
    if again is not None:
        return again
    resumption.over()
    return finish(report)


if __name__ == "__main__":
    sys.exit(main())
