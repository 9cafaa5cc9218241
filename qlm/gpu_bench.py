"""How fast a model decodes on a GPU, by recorded steps (static_decoder.py), beside what the GPU's memory allows.

A step reads all weights once; the ceiling is the bandwidth of a copy inside the GPU's memory, reads and writes together, measured in the
same run. Figures are medians over rounds; the best stand beside them. `bench` is the same for the CPU engine.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlm.bench import check_positions, check_sizes, plain
from qlm.errors import UsageError
from qlm.load import check_device, load
from qlm.static_decoder import ATTENTIONS, StaticDecoder

# Far more than the caches of any GPU hold.
COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class GpuBench:
    """The result of `gpu_bench`. GB are 10^9 bytes; times are medians, `_best` the best, of `repeats`.

    Attributes:
        device: its name. dtype: that the model computes in.
        recorded: whether steps are a CUDA graph; not on a CPU.
        prefill_ms: from the prompts' ids to the logits of their last tokens, all `batch` prompts together.
        decode_ms_per_token: of a step over the batch, divided by `batch`; with the choice of the likeliest token.
        weight_bytes_per_token: that a step reads, whatever the batch.
        read_gb_per_s: those over the time of a step. copy_gb_per_s: bytes read and written by a copy, over its time.
        copy_share: the first over the second.
        peak_gpu_gb: that torch has allocated; 0 on a CPU.
    """

    model: str
    device: str
    dtype: str
    attention: str
    recorded: bool
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_ms: float
    prefill_ms_best: float
    decode_ms_per_token: float
    decode_ms_per_token_best: float
    decode_tokens_per_s: float
    weight_bytes_per_token: int
    read_gb_per_s: float
    copy_gb_per_s: float
    copy_share: float
    peak_gpu_gb: float
    load_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain values by field name, floats to five significant digits."""
        return plain(asdict(self))


def gpu_bench(
    model: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch: int = 1,
    repeats: int = 5,
    revision: str | None = None,
    device: str = "cuda",
    dtype: str | None = None,
    attn_implementation: str = "sdpa",
) -> GpuBench:
    """Time prefill and decoding of random token ids; one round more than `repeats` warms up.

    Args:
        model, revision, device, dtype, attn_implementation: as for `load`; "cpu" is there to be compared with.
        prompt_tokens, new_tokens: of each of the `batch` sequences.
    Raises:
        UsageError: sizes below 1 or beyond the model's positions; an attention that needs a growing cache. And what `load` raises.
    """
    check_sizes(prompt=prompt_tokens, new=new_tokens, batch=batch, repeats=repeats)
    check_device(device)
    if attn_implementation not in ATTENTIONS:
        raise UsageError(f"--attention {attn_implementation}: recorded steps need {' or '.join(ATTENTIONS)}")
    where = torch.device(device)
    started = time.perf_counter()
    loaded = load(model, revision=revision, device=device, dtype=dtype, attn_implementation=attn_implementation)
    _finish(where)
    load_s = time.perf_counter() - started
    check_positions(prompt_tokens, new_tokens, int(loaded.config.max_position_embeddings))
    decoder = StaticDecoder(loaded, batch, prompt_tokens + new_tokens)
    times = [time_once(decoder, prompt_tokens, new_tokens, where, seed) for seed in range(repeats + 1)][1:]
    prefill, step = [one for one, _ in times], [one for _, one in times]
    read = weight_bytes(loaded)
    peak = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0
    seconds, copied = statistics.median(step), copy_bandwidth(where)
    return GpuBench(
        model=Path(model).name or Path(model).resolve().name,
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        dtype=str(loaded.config.dtype).removeprefix("torch."),
        attention=attn_implementation,
        recorded=decoder.graph is not None,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        prefill_ms=1e3 * statistics.median(prefill),
        prefill_ms_best=1e3 * min(prefill),
        decode_ms_per_token=1e3 * seconds / batch,
        decode_ms_per_token_best=1e3 * min(step) / batch,
        decode_tokens_per_s=batch / seconds,
        weight_bytes_per_token=read,
        read_gb_per_s=read / seconds / 1e9,
        copy_gb_per_s=copied / 1e9,
        copy_share=read / seconds / copied,
        peak_gpu_gb=peak / 1e9,
        load_s=load_s,
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(
    decoder: StaticDecoder, prompt_tokens: int, new_tokens: int, device: torch.device, seed: int
) -> tuple[float, float]:
    """Seconds of prefill, and of a decode step: the mean over `new_tokens` greedy ones."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(decoder.model.config.vocab_size)
    ids = torch.randint(0, vocabulary, (decoder.batch, prompt_tokens), generator=generator).to(device)
    _finish(device)
    started = time.perf_counter()
    logits = decoder.prefill(ids)
    _finish(device)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        logits = decoder.step(logits.argmax(-1))
    _finish(device)
    return prefilled - started, (time.perf_counter() - prefilled) / new_tokens


def weight_bytes(model: nn.Module) -> int:
    """What a step reads: every parameter and buffer once, but of embeddings that are no head single rows, which do not count, and of
    GPTBigCode's mask (all the models' buffers of bool are masks) nothing."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    looked_up = {
        parameter.data_ptr()
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    } - {head.weight.data_ptr()}
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() not in looked_up and tensor.dtype != torch.bool:
            seen[tensor.data_ptr()] = tensor.nbytes
        # bitsandbytes keeps scales beside the parameter, and those of scales that are quantized too beside them.
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            seen[state.absmax.data_ptr()] = state.absmax.nbytes
            state = state.state2
    return sum(seen.values())


def copy_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second that a copy in the device's memory reads and writes, the best of a few."""
    # An eighth of it on a CPU, which takes long; less on a GPU that the model has nearly filled.
    on_gpu = device.type == "cuda"
    size = min(COPIED_BYTES, torch.cuda.mem_get_info(device)[0] // 4) if on_gpu else COPIED_BYTES // 8
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        if on_gpu:
            # By the GPU's own clock: it takes half a millisecond on the fastest, of which Python's launch and wait would be a part.
            with torch.cuda.device(device):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                target.copy_(source)
                end.record()
                end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - started)
    return 2 * size / min(seconds)
