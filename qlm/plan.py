"""What a recipe will need, before anything starts: memory, disk and time. Nothing but headers and configs is read.

The figures are estimates from shapes. Memory and disk are counted tensor by tensor, as the code allocates them, and err on the high
side; time comes from a matrix product timed here and now, and is good to a factor of two. On a GPU blocks, activations and models are in
its memory; the process itself has a block's tensors on their way to and from the disk, what is known of the samples kept aside, and the
float model's activations.
"""

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlm.backends import BACKENDS, Backend
from qlm.blocks import choose_settings, stages_of
from qlm.calibrate import calibration_dtype, window_length
from qlm.errors import CannotCreate, Unavailable, UsageError
from qlm.formats.dtypes import DTYPES
from qlm.load import block_paths, check_attention, check_device, open_source, resolve_dtype, tied_names
from qlm.recipe import Recipe
from qlm.sensitivity import SLICE_LOGITS, Layer, budget_of, measured_at, names_in
from qlm.stream import BATCH_TOKENS, FEW, HELD_OUT
from qlm.tune import LOOK

# Python, torch, transformers and their thread pools, measured on Linux: 0.45-0.6 GB.
PROCESS_BYTES = 650_000_000
# Matrices as large as a Hessian that a calibrated backend's solver has beside it at once, counted (tests/test_on_a_gpu.py): a damped copy
# and the factor, being permuted; int8 and NF4 make the factor's inverse too, and NF4 keeps both while it sweeps.
HESSIAN_COPIES = {"gptq": 3, "int8": 4, "nf4": 5}
# And of those as large as the weights of a group, in fp32: target, shift, errors, levels.
WEIGHT_COPIES = 7
# Of each weight whose rounding is learned: six numbers in fp32 (base, offset, its gradient, their mean, scale, zero point), the weight
# that they make and its gradient.
LEARNED_BYTES = 32
# Weights that take a step in a second, beside all products.
LEARNED_RATE = 1e8
# Room for tokenizer, config and manifest, and for a file system's own bookkeeping.
SMALL_FILES_BYTES = 16_000_000
CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Plan:
    """Predicted needs, in bytes and seconds, and what is there.

    Attributes:
        quantize_memory, evaluate_memory: peak of the process in each step; evaluating holds the float and the quantized model.
        disk: of the finished output.
        gpu_quantize_memory, gpu_evaluate_memory, gpu_memory_available: the same of the GPU's memory; None on a CPU.
    """

    linears: int
    quantize_memory: int
    evaluate_memory: int
    memory_available: int
    disk: int
    disk_free: int
    quantize_seconds: float
    evaluate_seconds: float
    gpu_quantize_memory: int | None = None
    gpu_evaluate_memory: int | None = None
    gpu_memory_available: int | None = None

    @property
    def memory(self) -> int:
        return max(self.quantize_memory, self.evaluate_memory)

    def to_json(self) -> dict[str, Any]:
        return {**{name: value for name, value in asdict(self).items() if value is not None}, "memory": self.memory}


def available_memory() -> int:
    """Bytes that a new allocation can have without swapping: the smaller of the machine's and the control group's."""
    available = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((CONTROL_GROUP / "memory.current").read_text())
        if limit != "max":
            # Files that were read count as used, and go when somebody needs the room: a checkpoint that was just hashed, say.
            state = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
            available = min(available, int(limit) - used + int(state["inactive_file"]) + int(state["active_file"]))
    except (OSError, ValueError, KeyError):
        pass
    return available


def free_disk(output: Path) -> int:
    """Bytes free where `output` will be, with those that an unfinished run has already filled."""
    folder = output.absolute()
    finished = (folder.with_name(f"{folder.name}.partial") / "files").glob("*")
    written = sum(path.stat().st_size for path in finished)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free + written


def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Multiply-adds per second of a square product here and now; the best of three."""
    on_gpu = torch.device(device).type == "cuda"
    size = 4096 if on_gpu else 768
    a = torch.randn(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return size**3 / best


def plan(recipe: Recipe, device: str = "cpu") -> Plan:
    """Predict what the recipe needs. Raises what `quantize` would raise for a wrong recipe or checkpoint, and for a device that is not
    there."""
    check_device(device)
    check_attention(recipe.attn_implementation, device)
    on_gpu = device.startswith("cuda")
    # Not the recipe's attention: what another machine needs can be asked on one that has no GPU.
    source, model = open_source(recipe.model, revision=recipe.revision, task=recipe.task)
    if source.backend is not None:
        raise UsageError(
            f"model: {recipe.model} is quantized already ({source.backend.name}); give the float checkpoint"
        )
    backend = BACKENDS[recipe.quantize.backend]
    dtype = source.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    layers: list[Layer] | None = None
    budget = 0
    if recipe.quantize.budget_key is not None:
        layers, budget = budget_of(model, source.spec, recipe.quantize, dtype, source.stored_names())
        # Which of its options each will have is not known; all of them together take the budget at most.
        chosen = {name: next(iter(layer.options.values())) for layer in layers for name in layer.names}
        budget = min(budget, sum(max(layer.sizes) for layer in layers))
    else:
        chosen = choose_settings(model, source.spec, recipe.quantize)
    blocks = block_paths(source.spec, model)
    tied = tied_names(source.spec, source.config, recipe.task)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in tied}
    numel = {name: math.prod(shape) for name, shape in shapes.items()}

    stored = {}
    for name in numel:
        path = name.rpartition(".")[0]
        if path in chosen and name.endswith(".weight") and layers is not None:
            stored[name] = math.ceil(budget * numel[name] / sum(numel[f"{linear}.weight"] for linear in chosen))
        elif path in chosen and name.endswith(".weight"):
            rows, columns = shapes[name]
            stored[name] = stored_bytes(backend, (rows, columns), backend.format(chosen[path], dtype))
        else:
            stored[name] = numel[name] * dtype.itemsize
    disk = sum(stored.values()) + SMALL_FILES_BYTES

    # Blocks are alike, but what is left out of them need not be: the one that takes most stands for all.
    block = max(blocks, key=lambda path: sum(numel[f"{name}.weight"] for name in chosen if name.startswith(f"{path}.")))
    first = [name for name in numel if name.startswith(f"{block}.")]
    outside = [name for name in numel if not name.startswith(tuple(f"{b}." for b in blocks))]
    block_weights, outside_weights = sum(numel[n] for n in first), sum(numel[n] for n in outside)
    largest = max((shapes[n] for n in first if len(shapes[n]) == 2), key=lambda s: s[0] * s[1])
    shard = max(sum(stored[n] for n in numel if n.startswith(f"{path}.")) for path in blocks)
    # A shard is serialized in memory before it is written, and the embedding likewise.
    reading = max(3 * shard + 12 * largest[0] * largest[1], 3 * outside_weights * dtype.itemsize)
    quantize_memory: float = reading
    aside = 0
    quantize_seconds = sum(numel.values()) / 2e8
    if recipe.quantize.needs_calibration:
        quantize_memory, quantize_seconds, aside = _calibrated(
            recipe, source, block, chosen, shapes, block_weights, outside_weights, shard, len(blocks), device
        )
    if layers is not None:
        choosing = _choosing(recipe, source, model, shapes, layers, blocks, device)
        quantize_memory, quantize_seconds = max(quantize_memory, choosing[0]), quantize_seconds + choosing[1]
    evaluate_memory = evaluate_seconds = 0.0
    if recipe.evaluate is not None:
        compute = resolve_dtype(None, device, source.spec)
        floats = compute.itemsize * sum(numel.values())
        quantized = compute.itemsize * outside_weights + sum(stored[n] for n in numel if n not in outside)
        evaluate_memory = floats + quantized + 6 * 4 * BATCH_TOKENS * max(largest)
        tokens = (recipe.evaluate.windows or 150) * window_length(recipe.evaluate.length, _positions(source))
        evaluate_seconds = 3 * tokens * sum(numel.values()) / matmul_rate(compute, device)
    on_device: tuple[int, int, int] | tuple[None, None, None] = (None, None, None)
    if on_gpu:
        on_device = int(quantize_memory), int(evaluate_memory), torch.cuda.mem_get_info(device)[0]
        quantize_memory = reading + aside
        evaluate_memory = 3 * 4 * max(numel.values()) if recipe.evaluate is not None else 0
    return Plan(
        linears=len(chosen),
        quantize_memory=int(PROCESS_BYTES + quantize_memory),
        evaluate_memory=int(PROCESS_BYTES + evaluate_memory) if recipe.evaluate is not None else 0,
        memory_available=available_memory(),
        disk=disk,
        disk_free=free_disk(Path(recipe.output)),
        quantize_seconds=round(quantize_seconds, 1),
        evaluate_seconds=round(evaluate_seconds, 1),
        gpu_quantize_memory=on_device[0],
        gpu_evaluate_memory=on_device[1],
        gpu_memory_available=on_device[2],
    )


def stored_bytes(backend: Backend, shape: tuple[int, int], format: Any) -> int:
    """Of a quantized linear [O, I], bias not included."""
    # A size that the layout leaves open belongs to a tensor of a few hundred bytes.
    return sum(
        math.prod(512 if size < 0 else size for size in item.shape) * min(DTYPES[d] for d in item.dtypes)
        for item in backend.layout(shape, format).values()
    )


def _positions(source: Any) -> int:
    return int(getattr(source.config, source.spec.positions))


def _calibrated(
    recipe: Recipe,
    source: Any,
    first: str,
    chosen: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    block_weights: int,
    outside_weights: int,
    shard: int,
    blocks: int,
    device: str,
) -> tuple[float, float, int]:
    """Memory and time of calibrated quantizing: the stream, one block, `first`, the Hessians of one stage, and the solver's copies; and what
    of all that lies on the host where the rest is on a GPU: what is known of the samples kept aside, and the float model's stream."""
    assert recipe.calibration is not None
    compute = calibration_dtype(device)
    length = window_length(recipe.calibration.length, _positions(source))
    tokens = recipe.calibration.samples * length
    hidden = int(getattr(source.config, source.spec.hidden_size))
    sides = 2 if recipe.quantize.follows_float else 1
    stream = tokens * hidden * compute.itemsize
    on_gpu, added = device.startswith("cuda"), set(source.spec.residual_linears)
    # torch pins memory in powers of two.
    on_host = (1 << (stream - 1).bit_length()) if on_gpu and sides == 2 else 0
    aside, statistics, products = 0, 0, 0
    stages = stages_of(source.spec, source.config)
    for stage in stages:
        in_stage = solver = 0
        for group in stage:
            names = [f"{first}.{linear}" for linear in group.linears]
            if any(name in chosen for name in names):
                inputs = shapes[f"{names[0]}.weight"][1]
                rows = sum(shapes[f"{name}.weight"][0] for name in names)
                # Products with itself, and with the float model's inputs or with what its residual stream is ahead.
                others = 0 if sides == 1 else rows if added.intersection(group.linears) else inputs
                in_stage += 4 * inputs * (inputs + others)
                copies = HESSIAN_COPIES[recipe.quantize.backend]
                solver = max(solver, 4 * copies * inputs * inputs + 4 * WEIGHT_COPIES * rows * inputs)
                products += tokens * inputs * inputs + 2 * inputs**3 + 40 * rows * inputs * inputs // 32
        # The same of the samples kept aside, which leave a GPU before anything is solved.
        aside_here = in_stage if recipe.quantize.holds_out else 0
        while_solving = in_stage + solver + (0 if on_gpu else aside_here)
        aside, statistics = max(aside, aside_here), max(statistics, in_stage + aside_here, while_solving)
    widest = max(max(shape) for name, shape in shapes.items() if name.startswith(f"{first}."))
    activations = 8 * compute.itemsize * BATCH_TOKENS * widest + 4 * BATCH_TOKENS * widest
    block = stream * (1 if on_gpu else sides) + sides * block_weights * compute.itemsize + 2 * shard
    learning, learned = _learning(recipe, source, chosen, shapes, first, block_weights, device)
    memory = block + max(statistics + activations, learning)
    # Concatenating the batches holds both for a moment.
    embedding = 2 * outside_weights * compute.itemsize + 2 * stream
    # Each stage runs the block as far as its linears, and a last pass runs all of it.
    forward = sides * tokens * block_weights * (1 + len(stages) / 2)
    # A sweep over the codes costs about as much as the solver.
    solving = sides * products * (1 + recipe.quantize.sweeps / 4)
    seconds = blocks * (solving / matmul_rate(torch.float32, device) + forward / matmul_rate(compute, device) + learned)
    return max(memory, embedding), seconds, aside + on_host


def _learning(
    recipe: Recipe,
    source: Any,
    chosen: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    first: str,
    block_weights: int,
    device: str,
) -> tuple[float, float]:
    """Memory beside the stream and the block, and seconds a block, of what is learned by gradient."""
    assert recipe.calibration is not None
    section, compute = recipe.quantize, calibration_dtype(device)
    samples, length = recipe.calibration.samples, window_length(recipe.calibration.length, _positions(source))
    aside = min(samples - 1, math.ceil(samples / HELD_OUT))
    if not aside or not (section.rounding_steps or section.tune_steps):
        return 0.0, 0.0
    # Together: what has been quantized since the last linears that are added to the residual stream.
    together = [0]
    for stage in stages_of(source.spec, source.config):
        linears = [linear for group in stage for linear in group.linears if f"{first}.{linear}" in chosen]
        if any(linear in source.spec.residual_linears for linear in linears):
            together.append(0)
        else:
            together[-1] += sum(math.prod(shapes[f"{first}.{linear}.weight"]) for linear in linears)
    rounds, most = 0, 0
    if section.rounding_steps:
        rounds, most = sum(weights > 0 for weights in together), max(together)
    widest = max(max(shape) for name, shape in shapes.items() if name.startswith(f"{first}."))
    hidden = int(getattr(source.config, source.spec.hidden_size))
    # What the float block makes of all samples, and what a backward pass finds again of a few, in fp32 for the most part.
    memory = samples * length * hidden * compute.itemsize + 4 * 8 * FEW * length * widest + LEARNED_BYTES * most

    def products(steps: int) -> int:
        # A step is a forward and a backward pass, which costs twice that; a look, a forward pass over what was kept aside.
        return (3 * steps * min(FEW, samples) + (1 + math.ceil(steps / LOOK)) * aside) * length * block_weights

    learned = rounds * products(section.rounding_steps) + (products(section.tune_steps) if section.tune_steps else 0)
    targets = samples * length * block_weights
    return memory, (learned + targets) / matmul_rate(compute, device) + section.rounding_steps * sum(
        together
    ) / LEARNED_RATE


def _choosing(
    recipe: Recipe,
    source: Any,
    model: Any,
    shapes: Mapping[str, tuple[int, ...]],
    layers: Sequence[Layer],
    blocks: Sequence[str],
    device: str,
) -> tuple[float, float]:
    """Memory and time of choosing bits by a budget: the whole float model and gradients; then one block's Hessians and the solver."""
    assert recipe.calibration is not None
    compute = calibration_dtype(device)
    length = window_length(recipe.calibration.length, _positions(source))
    hidden = int(getattr(source.config, source.spec.hidden_size))
    samples = recipe.calibration.samples
    drawn, aside = measured_at(layers, model, (samples, length))
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    # That which most is chosen for stands for all.
    weights = {path: sum(numel[f"{n}.weight"] for n in names_in(layers) if n.startswith(f"{path}.")) for path in blocks}
    block = max(blocks, key=weights.__getitem__)
    first = [name for name in numel if name.startswith(f"{block}.")]
    widest = max(max(shapes[name]) for name in first)
    whole, in_block = sum(numel.values()), sum(numel[name] for name in first)

    outputs, inputs_of_block, hessians, solver, products = 0, 0, 0, 0, 0.0
    for layer in layers:
        rows = sum(shapes[f"{name}.weight"][0] for name in layer.names)
        inputs = shapes[f"{layer.names[0]}.weight"][1]
        outputs += rows
        if layer.names[0].startswith(f"{block}."):
            inputs_of_block += inputs
            hessians += 4 * inputs * inputs
        copies = 4 * HESSIAN_COPIES[recipe.quantize.backend] * inputs * inputs
        solver = max(solver, copies + 4 * WEIGHT_COPIES * rows * inputs + 8 * drawn * rows)
        of_options = len(layer.options) * (
            2 * inputs**3 + (1 + recipe.quantize.sweeps / 4) * 40 * rows * inputs * inputs / 32 + drawn * rows * inputs
        )
        products += samples * length * inputs * inputs + of_options

    gradients = 2 * drawn * outputs
    logits = 5 * 4 * min(length * int(source.config.vocab_size), SLICE_LOGITS)
    backward = compute.itemsize * length * (len(blocks) * hidden + 24 * widest) + logits
    streams = 2 * (samples + aside) * length * hidden * compute.itemsize
    activations = 8 * compute.itemsize * BATCH_TOKENS * widest + 4 * BATCH_TOKENS * widest
    costs = streams + hessians + solver + activations + compute.itemsize * drawn * inputs_of_block
    memory = whole * compute.itemsize + gradients + max(backward, costs)
    # Backward passes compute each block again, and cost twice a forward one; the streams pass through each block twice.
    forward = 4 * aside * length * whole + 2 * (samples + aside) * length * in_block * len(blocks)
    return memory, forward / matmul_rate(compute, device) + products / matmul_rate(torch.float32, device)


def refuse_if_too_large(recipe: Recipe, needs: Plan) -> None:
    """Refuse now what would fail in an hour.

    Raises:
        CannotCreate: the disk is too small. Unavailable: memory is.
    """
    refuse_small_disk(recipe.output, needs.disk, needs.disk_free)
    here = f"on this machine ({os.uname().machine})"
    for what, need, of_gpu, advice in (
        ("quantizing", needs.quantize_memory, needs.gpu_quantize_memory, "use fewer or shorter calibration samples"),
        ("evaluating", needs.evaluate_memory, needs.gpu_evaluate_memory, "remove the evaluate section"),
    ):
        for needed, available, where, other in (
            (need, needs.memory_available, here, "a larger machine"),
            (of_gpu, needs.gpu_memory_available, "on the GPU", "the CPU"),
        ):
            if needed is not None and available is not None and needed > available:
                raise Unavailable(
                    f"{what} {recipe.model} needs about {gigabytes(needed)} of memory, and {gigabytes(available)} are "
                    f"available {where}; {advice}, or use {other}"
                )


def refuse_small_disk(output: str, needed: int, free: int) -> None:
    """Raises CannotCreate. Both in bytes."""
    if needed > free:
        raise CannotCreate(
            f"output: {output} needs {gigabytes(needed)}, and {gigabytes(free)} are free there; free some, or choose another disk"
        )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
