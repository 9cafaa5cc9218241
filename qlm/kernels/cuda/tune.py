"""Which of a few configurations of a kernel is the fastest for a shape: timed at the first call on a GPU, then remembered.

The choice changes no int8 result, and no result of a kernel that adds its products in one order whatever its configuration; where sums are
split it may change a float's last bit from one process to the next, never within one. torch.use_deterministic_algorithms(True)
takes the first configuration always.

While a CUDA graph is captured nothing can be timed, and Triton may not even load a kernel: only what has run before is launched then.
"""

from collections.abc import Callable, Hashable
from statistics import median

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from qlm.errors import Unavailable

# A GPU that waited for the compiler has slowed its clocks down: rounds that are not counted, and rounds that are.
_WARM_UP, _REPEATS = 2, 5
# How often a buffer of twice the last-level cache is written between two timed calls: the weights must come from memory, as in a model,
# and the next launch be waiting when its turn comes.
_FLUSHES = 4

_chosen: dict[Hashable, int] = {}
# What has been launched, and so is compiled and loaded: (device, key, variant, which way).
_ran: set[Hashable] = set()


def run(key: Hashable, variant: Hashable, count: int, launch: Callable[[int], Tensor], device: torch.device) -> Tensor:
    """The result of `launch(i)`, one of `count` ways to compute the same; the fastest on this device for everything that `key` stands for.
    The first must fit every GPU.

    Args:
        variant: what Triton compiles kernels anew for, beside the key: exact shapes, dtypes.
    Raises:
        Unavailable: a CUDA graph is being captured, and this has not run before.
    """
    if device.type != "cuda":
        return launch(0)
    alone = count == 1 or torch.are_deterministic_algorithms_enabled()
    choice = 0 if alone else _chosen.get((device.index, key))
    if choice is not None and (device.index, key, variant, choice) in _ran:
        return launch(choice)
    if torch.cuda.is_current_stream_capturing():
        raise Unavailable(
            "a quantized layer meets this shape for the first time while a CUDA graph is captured, which cannot load its kernels: call the "
            "model once with it before capturing"
        )
    if choice is None:
        choice = _chosen[device.index, key] = _fastest(count, launch, device)
    result = launch(choice)
    _ran.add((device.index, key, variant, choice))
    return result


def rows_class(rows: int) -> int:
    """The smallest of 1, 2, 4, 16, 64, ... 4096 that holds so many tokens, at most 4096; these share a choice."""
    if rows <= 2:  # two tokens share what is read and are not yet a tile
        return rows
    most = 4
    while most < min(rows, 4096):
        most *= 4
    return most


def _fastest(count: int, launch: Callable[[int], Tensor], device: torch.device) -> int:
    try:
        flushed = torch.empty(2 * _cache_bytes(device), dtype=torch.int8, device=device)
    except torch.OutOfMemoryError:
        return 0
    times: dict[int, list[float]] = {}
    for i in range(count):
        try:
            launch(i)  # compiles
        except OutOfResources:  # more shared memory than this GPU has
            continue
        times[i] = []
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # In turns, so that a clock that changes changes it for all.
    for turn in range(_WARM_UP + _REPEATS):
        for i, milliseconds in times.items():
            for _ in range(_FLUSHES):
                flushed.zero_()
            start.record()
            launch(i)
            end.record()
            end.synchronize()
            if turn >= _WARM_UP:
                milliseconds.append(start.elapsed_time(end))
    return min(times, key=lambda i: median(times[i]), default=0)


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size
