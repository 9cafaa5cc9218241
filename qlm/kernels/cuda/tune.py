"""Which of a few configurations of a kernel is the fastest for a shape: timed at the first call on a GPU, then remembered.

The choice changes no int8 result, and no result of a kernel that adds its products in one order whatever its configuration; where sums are
split it may change a float's last bit from one process to the next, never within one. torch.use_deterministic_algorithms(True)
takes the first configuration always. So do calls while a CUDA graph is captured, when nothing can be timed, unless an earlier
call has chosen: run a model once before capturing it.
"""

from collections.abc import Callable, Hashable
from statistics import median

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

_REPEATS = 5
# How often a buffer of twice the last-level cache is written between two timed calls: the weights must come from memory, as in a model,
# and the next launch be waiting when its turn comes.
_FLUSHES = 4

_chosen: dict[Hashable, int] = {}


def run(key: Hashable, count: int, launch: Callable[[int], Tensor], device: torch.device) -> Tensor:
    """The result of `launch(i)`, one of `count` ways to compute the same; the fastest on this device for everything that `key` stands for.
    The first must fit every GPU."""
    if count == 1 or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return launch(0)
    choice = _chosen.get((device.index, key))
    if choice is None:
        if torch.cuda.is_current_stream_capturing():
            return launch(0)
        choice = _chosen[device.index, key] = _fastest(count, launch, device)
    return launch(choice)


def rows_class(rows: int) -> int:
    """1, 4, 16, ... 4096: token counts up to this one share a choice."""
    most = 1
    while most < min(rows, 4096):
        most *= 4
    return most


def _fastest(count: int, launch: Callable[[int], Tensor], device: torch.device) -> int:
    try:
        flushed = torch.empty(2 * _cache_bytes(device), dtype=torch.int8, device=device)
    except torch.OutOfMemoryError:
        return 0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = [float("inf")] * count
    for i in range(count):
        try:
            launch(i)  # compiles
        except OutOfResources:  # more shared memory than this GPU has
            continue
        times = []
        for _ in range(_REPEATS):
            for _ in range(_FLUSHES):
                flushed.zero_()
            start.record()
            launch(i)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        seconds[i] = median(times)
    return seconds.index(min(seconds))


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size
