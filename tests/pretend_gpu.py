"""A GPU that is not there. Inside `pretend_gpu`, tensors that are put on "cuda" are CPU tensors with a mark, and what would fail on a machine
with a GPU fails here: an operation on tensors of both devices, and a tensor of the GPU where only the CPU's will do. Numbers are the CPU's.

Marks go by storage, so that views and parameters have them. What C++ does by itself, such as a backward pass, is not watched; it computes
on what forward passes have put together.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

GPU = torch.device("cuda", 0)
# They take a tensor of either device beside one of the other: copies, an index on the CPU into a tensor on a GPU, and what puts a module there.
_TAKES_BOTH = {
    "copy_",
    "__getitem__",
    "__setitem__",
    "set_",
    "index_put_",
    "_has_compatible_shallow_copy_type",
    "__set__",
}
# They give Python's or numpy's values of a tensor on the CPU alone.
_CPU_ONLY = {"numpy", "__array__", "__dlpack__"}


class MixedDevices(AssertionError):
    """What torch would refuse on a machine with a GPU."""


class PretendEvent:
    """All is done when it is asked for."""

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class PretendGpu(TorchFunctionMode):
    """Attributes: operations: how often each was done on the GPU; bytes, peak_bytes: what its tensors take now, and took at most. What an
    operation allocates inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes = self.peak_bytes = 0
        self.generators: list[torch.Generator] = []

    def has(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return hasattr(_storage(tensor), "on_pretend_gpu")

    def _mark(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            storage = _storage(tensor)
            if not hasattr(storage, "on_pretend_gpu"):
                storage.on_pretend_gpu = True
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return tensor

    def _count(self, more: int) -> None:
        self.bytes += more
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # Without a GPU, torch has no pinned memory.
        kwargs.pop("pin_memory", None)
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._attribute(func.__self__.__name__, func, args, kwargs)
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        on = [self.has(tensor) for tensor in tensors]
        if name == "register_hook" and self.has(args[0]):
            return func(args[0], self._on_gpu(args[1]))
        if name in ("to", "cpu", "cuda"):
            return self._move(name, func, args, kwargs)
        if any(on) and name in _CPU_ONLY:
            raise MixedDevices(f"{name}: needs the CPU's tensor, found one on the GPU")
        # A number that lies on the CPU goes anywhere.
        if any(on) and name not in _TAKES_BOTH and not all(o or not t.dim() for o, t in zip(on, tensors, strict=True)):
            found = ", ".join(f"{list(t.shape)} on {'cuda' if o else 'cpu'}" for o, t in zip(on, tensors, strict=True))
            raise MixedDevices(f"{name}: {found}")
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type in ("cpu", "cuda"):
            kwargs["device"] = "cpu"
            on = [torch.device(asked).type == "cuda"]
        generator = kwargs.get("generator")
        if generator is not None and any(on) != any(generator is known for known in self.generators):
            raise MixedDevices(f"{name}: a generator of one device draws for a tensor of the other")
        if name in ("copy_", "__setitem__", "set_", "index_put_"):
            on = on[:1]
        result = func(*args, **kwargs)
        if any(on):
            self.operations[name] += 1
            tree_map_only(Tensor, self._mark, result)
        return result

    def _on_gpu(self, hook: Any) -> Any:
        """The hook, which C++ calls with a gradient, watched as well."""

        def watched(gradient: Tensor) -> Any:
            with self:
                return hook(self._mark(gradient))

        return watched

    def _attribute(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        here = self.has(tensor)
        if here and name in ("device", "is_cuda", "is_cpu"):
            return {"device": GPU, "is_cuda": True, "is_cpu": False}[name]
        result = func(*args, **kwargs)
        return self._mark(result) if here and isinstance(result, Tensor) else result

    def _move(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        asked_for = dict(kwargs)
        if name in ("cpu", "cuda"):
            target, rest = torch.device(name), []
            kwargs.pop("device", None)
            func = torch.Tensor.to
        else:
            asked = [
                value for value in (*rest, kwargs.get("device")) if isinstance(value, str | torch.device | int | Tensor)
            ]
            found = asked[0] if asked and not isinstance(asked[0], bool) else None
            if isinstance(found, Tensor):
                target = GPU if self.has(found) else torch.device("cpu")
                rest = [found.dtype if value is found else value for value in rest]
            else:
                target = (GPU if self.has(tensor) else torch.device("cpu")) if found is None else torch.device(found)
                rest = ["cpu" if value is found else value for value in rest] if found is not None else rest
                if kwargs.get("device") is not None:
                    kwargs["device"] = "cpu"
        if target.type not in ("cpu", "cuda"):
            return func(*args, **asked_for)
        result = func(tensor, *rest, **kwargs)
        to_gpu = target.type == "cuda"
        if to_gpu != self.has(tensor):
            with torch._C.DisableTorchFunction():
                shared = _storage(result) is _storage(tensor)
            if shared:
                result = result.clone() if type(result) is Tensor else result.data.clone().as_subclass(type(result))
            self.operations["move"] += 1
        return self._mark(result) if to_gpu else result


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


@contextmanager
def pretend_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[PretendGpu]:
    """Inside, torch has one GPU, which launches no kernels of ours."""
    said: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: capability >= (8, 0),
        "mem_get_info": lambda device=None: (64 << 30, 80 << 30),
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "set_device": lambda device: None,
        "current_stream": lambda device=None: None,
        "Event": PretendEvent,
    }
    autocast, generator, gpu = torch.autocast, torch.Generator, PretendGpu()

    def cast(device_type: str, *args: Any, **more: Any) -> Any:
        return autocast("cpu", *args, **more)

    def draw(device: Any = "cpu") -> torch.Generator:
        made = generator()
        if torch.device(device).type == "cuda":
            gpu.generators.append(made)
        return made

    with (
        mock.patch.multiple(torch.cuda, **said),
        mock.patch.multiple(torch, autocast=cast, Generator=draw),
        mock.patch("qlm.kernels.cuda_ops._gpu", return_value=None),
        gpu,
    ):
        yield gpu
