"""A model that reads a prompt and then token after token, with its keys and values in a cache: one of fixed size, or one that grows.

With the fixed size a step is the same kernels on the same memory every time: on a GPU it is recorded once as a CUDA graph and replayed,
without the gaps in which a GPU waits for Python to launch the next kernel.

The model is transformers' own and computes what it always computes; only where keys and values lie, and which of them count, is
different (a mask over the whole cache in the place of a cache that grows).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from qlm.errors import Unavailable, UsageError

# Steps before the recording: libraries allocate workspaces and kernels are tuned at their first calls.
WARM_UP = 3
# The cache's size is a multiple of this, to which attention's kernels otherwise fill up their masks.
_UNIT = 16


# flash-attn takes no mask, and so no cache that is only filled in part.
ATTENTIONS = ("sdpa", "eager")


def can_decode(model: Any) -> bool:
    """Whether `StaticDecoder` takes the model: by its attention, and on one device."""
    return model.config._attn_implementation in ATTENTIONS and len({p.device for p in model.parameters()}) == 1


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Inside, SDPA does not take cuDNN's attention. torch prefers it on Hopper GPUs (`sdp_utils.cpp`), and it is built anew for every length
    that keys grow to, which takes longer than a step."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Decoder(Protocol):
    """Sequences of one length side by side, without padding; no gradients."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Begin anew with ids int64 [B, T]: logits [B, V] of the last."""

    def step(self, ids: Tensor) -> Tensor:
        """Append ids int64 [B]: logits [B, V]."""


class GrowingDecoder:
    """A `Decoder` with transformers' cache that grows: any attention, and a model on one device or on several."""

    cache: Any

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, ids: Tensor) -> Tensor:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        return self._append(ids)

    def step(self, ids: Tensor) -> Tensor:
        return self._append(ids[:, None])

    @torch.no_grad()
    def _append(self, ids: Tensor) -> Tensor:
        # Without a mask, where nothing is padded, and with the positions that follow from the cache, which are the model's default.
        with _without_cudnn():
            found = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = found.logits[:, -1]
        return logits


class StaticDecoder:
    """A `Decoder` of `batch` sequences with a cache of fixed size.

    Attributes:
        length: positions that the cache holds, at least those asked for.
        position: of the next token, the same in all sequences.
        graph: the recorded step; None on CPUs, and where it is not wanted.
    """

    @torch.no_grad()
    def __init__(self, model: Any, batch: int, length: int, record: bool = True) -> None:
        """
        Args:
            model: a causal language model in evaluation mode, on one device, with eager or SDPA attention.
            record: a step as a graph, on a GPU; without, it is the same kernels, launched one by one.
        Raises:
            UsageError: another attention, or several devices. Unavailable: a step cannot be recorded.
        """
        attention = model.config._attn_implementation
        if not can_decode(model):
            devices = ", ".join(sorted({str(p.device) for p in model.parameters()}))
            raise UsageError(
                f"attention: found {attention} on {devices}; steps of fixed shape need {' or '.join(ATTENTIONS)}, on one device"
            )
        self.model, self.batch = model, batch
        self.length = -(-length // _UNIT) * _UNIT
        self.position = 0
        self.graph: Any = None
        embedding = model.get_input_embeddings().weight
        device = embedding.device
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._columns = torch.arange(self.length, device=device)
        # What attention adds to the scores. SDPA would make it of true and false anew in each layer.
        self._seen = torch.zeros((), dtype=embedding.dtype, device=device)
        self._unseen = torch.full_like(self._seen, torch.finfo(embedding.dtype).min)
        self._cache = _cache_of(int(model.config.num_hidden_layers), self.length, self._place)
        self._forward()  # makes the cache's tensors
        if record and device.type == "cuda":
            self._record(device)
        self._go_to(0)

    def _record(self, device: torch.device) -> None:
        # A graph is captured on a stream of the current device, which need not be the model's.
        with torch.cuda.device(device):
            stream = _recording_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._go_to(0)
                    self._forward()
            torch.cuda.current_stream(device).wait_stream(stream)
            self._go_to(0)
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, stream=stream):
                    self._logits = self._forward()
            except RuntimeError as error:
                raise Unavailable(
                    f"a step of this model cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); decode without: --no-graphs"
                ) from error

    def _go_to(self, position: int) -> None:
        """In place: a graph knows the tensors by their addresses. What the cache holds from there on counts no more."""
        self.position = position
        self._place.fill_(position)

    def _forward(self) -> Tensor:
        """One step on what lies in `_ids` and `_place`: logits [B, V]."""
        mask = torch.where(self._columns <= self._place, self._seen, self._unseen)
        with _without_cudnn():
            found: Tensor = self.model(
                input_ids=self._ids,
                position_ids=self._place.expand(self.batch, 1),
                attention_mask=mask.expand(self.batch, 1, 1, self.length),
                past_key_values=self._cache,
                use_cache=True,
            ).logits[:, -1]
        self._place.add_(1)
        return found

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Begin anew with ids int64 [B, T]: logits [B, V] of the last.

        Raises:
            UsageError: they do not fit into the cache.
        """
        if ids.shape[1] > self.length:
            raise UsageError(f"{ids.shape[1]} tokens: the cache was made for {self.length}; make a longer one")
        # With a cache that grows the prompt's attention is the fast one, over itself alone and without a mask.
        growing = GrowingDecoder(self.model)
        logits = growing.prefill(ids)
        for fixed, layer in zip(self._cache.layers, growing.cache.layers, strict=True):
            fixed.keys[:, :, : ids.shape[1]] = layer.keys
            fixed.values[:, :, : ids.shape[1]] = layer.values
        self._go_to(ids.shape[1])
        return logits

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Append ids int64 [B]: logits [B, V], which the next step overwrites on a GPU.

        Raises:
            UsageError: the cache is full.
        """
        if self.position >= self.length:
            raise UsageError(f"{self.position} tokens: the cache was made for {self.length}; make a longer one")
        self._ids.copy_(ids[:, None])
        if self.graph is None:
            self._logits = self._forward()
        else:
            self.graph.replay()
        self.position += 1
        return self._logits


def _cache_of(layers: int, length: int, place: Tensor) -> Any:
    """A cache of that many positions; a step writes to `place`, int64 [1]. transformers' own StaticCache counts in each layer by itself."""
    from transformers.cache_utils import Cache, StaticLayer

    class FixedLayer(StaticLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            held: Any = self
            return held.keys.index_copy_(2, place, key_states), held.values.index_copy_(2, place, value_states)

    return Cache(layers=[FixedLayer(max_cache_len=length) for _ in range(layers)])


@functools.cache
def _recording_stream(device: torch.device) -> Any:
    """One for all graphs: cuBLAS keeps a workspace for every stream that it has ever seen."""
    return torch.cuda.Stream(device)
