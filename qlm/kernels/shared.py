"""What the ops of both kinds of device have in common: the choice of kernels, and when something that was made of a tensor is stale."""

import os
from collections.abc import Callable

from torch import Tensor

from qlm.errors import UsageError

# From (qzeros, bits, v2) to the zero points of a GPTQ layer, int32 [G, O].
Decode = Callable[[Tensor, int, bool], Tensor]


def chosen_kernels() -> str:
    """QLM_KERNELS: "native", "reference", or "" for what is there. Raises UsageError for anything else."""
    chosen = os.environ.get("QLM_KERNELS", "")
    if chosen not in ("", "native", "reference"):
        raise UsageError(f"QLM_KERNELS={chosen}: expected 'native' or 'reference'; unset it for what is installed")
    return chosen


def state(tensor: Tensor) -> tuple[int, int]:
    """Changes with the tensor's values. Tensors made in inference mode count no versions: a change of their values in place goes
    unnoticed."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
