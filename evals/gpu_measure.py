"""How long a model's steps take on a GPU and what memory they need: decoding, with a cache that grows or by qlm's recorded steps, and training.

What is to be timed is checked first: recorded steps against a growing cache, an attention implementation against eager, and whether SDPA
can run on its flash backend alone; where it can, it is timed so, and what it chooses by itself is recorded beside. Times are medians over
rounds behind one that warms up, the best beside them. A CPU does all of it too, for tests.
"""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from gpu_cells import NotRun, first_line
from random_models import random_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

MIB = 1 << 20
PACKAGES = {"nf4": "bitsandbytes"}

# Largest difference of two logits of the same model, in units of the logits' root mean square: recorded steps from growing caches, or
# another attention from eager. 16 bits round every weight and activation; what rounds activations to int8 as well lets some of them move
# by a whole step. On a CPU, OPT-350m's shape: 0.009 and 0.07 (float16, bfloat16), GPTQ 0.016 and 0.12, int8 0.11 and 0.13; room for what
# other kernels do. A wrong token or position makes nearly all logits others: several units.
DIFFERENCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
INT8_DIFFERENCE = {"float32": 0.1, "float16": 0.5, "bfloat16": 1.0}
CHECKED_STEPS = 8


class Differs(Exception):
    """Two ways to compute the same that do not agree."""


def need(weights: str) -> None:
    package = PACKAGES.get(weights)
    if package is not None and importlib.util.find_spec(package) is None:
        raise NotRun(f"the package {package} is not installed")


def need_attention(attention: str, device: str, loop: str = "growing") -> None:
    from qlm.errors import QlmError
    from qlm.load import check_attention

    if attention == "flash_attention_2" and loop == "recorded":
        raise NotRun("flash-attn takes no mask, and so no cache that is only filled in part")
    try:
        check_attention(attention, device)
    except QlmError as error:
        raise NotRun(str(error)) from None


class Bench:
    """The device, and the model that was used last: building one takes longer than measuring a cell."""

    def __init__(self, device: str) -> None:
        self.device, self.on_gpu = torch.device(device), device.startswith("cuda")
        self.dtype = "float16" if self.on_gpu else "float32"
        self.goal_dtype = "bfloat16" if self.on_gpu else "float32"
        self._key: tuple[str, str] | None = None
        self._model: Any = None

    def build(self, shape: str, weights: str, dtype: str | None = None) -> Any:
        """A model for the caller alone; the one that was kept makes room."""
        need(weights)
        self.clear()
        torch.manual_seed(0)
        return random_model(shape, weights, device=self.device, dtype=getattr(torch, dtype or self.dtype))

    def model(self, shape: str, weights: str, attention: str) -> Any:
        """The model with that attention, in evaluation mode; kept until another is asked for."""
        if self._key != (shape, weights):
            model = self.build(shape, weights)
            self._key, self._model = (shape, weights), model
        self._model.set_attn_implementation(attention)
        return self._model.eval()

    def clear(self) -> None:
        self._key, self._model = None, None
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def finish(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_mib(self) -> float | None:
        """The most that torch had allocated since `reset_peak`."""
        return round(torch.cuda.max_memory_allocated(self.device) / MIB, 1) if self.on_gpu else None

    def ids(self, model: Any, batch: int, tokens: int, seed: int = 0) -> Tensor:
        """Random ones, int64 [batch, tokens]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator).to(self.device)


class GrowingDecoder:
    """transformers' own way to decode, with the face of qlm's StaticDecoder: a plain forward pass over the new tokens, and a cache that grows."""

    graph = None

    def __init__(self, model: Any, batch: int) -> None:
        self.model, self.batch = model, batch

    def prefill(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T]: logits [B, V] of the last."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)
        return self._append(ids)

    def step(self, ids: Tensor) -> Tensor:
        """ids int64 [B]: logits [B, V]."""
        return self._append(ids[:, None])

    @torch.no_grad()
    def _append(self, ids: Tensor) -> Tensor:
        found = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = found.logits[:, -1]
        return logits


def difference(found: Tensor, reference: Tensor) -> float:
    """Largest absolute difference in units of the reference's root mean square; infinite where a value is not finite."""
    found, reference = found.detach().float(), reference.detach().float()
    if found.shape != reference.shape or not bool(found.isfinite().all()):
        return float("inf")
    return ((found - reference).abs().max() / reference.square().mean().sqrt()).item()


def tolerance(weights: str, dtype: str) -> float:
    return (INT8_DIFFERENCE if weights == "int8" else DIFFERENCE)[dtype]


def compare(model: Any, decoder: Any, ids: Tensor, allowed: float, steps: int = CHECKED_STEPS) -> dict[str, Any]:
    """The decoder against a growing cache, token after token of the latter's greedy text.

    Two tokens whose logits are as near as the rounding may change places, and do in models of random weights; then they are counted.

    Raises:
        Differs: the logits differ by more than `allowed`.
    """
    growing = GrowingDecoder(model, decoder.batch)
    worst, others = 0.0, 0
    expected, found = growing.prefill(ids), decoder.prefill(ids)
    for step in range(steps):
        worst = max(worst, difference(found, expected))
        if not worst <= allowed:
            raise Differs(f"token {step + 1}: logits differ by {worst:.3g} of their size, {allowed} is allowed")
        chosen = expected.argmax(-1)
        others += int((found.argmax(-1) != chosen).sum())
        if step + 1 < steps:
            expected, found = growing.step(chosen), decoder.step(chosen)
    return {
        "largest_difference": float(f"{worst:.3g}"),
        "compared_tokens": steps * len(ids),
        "other_greedy_tokens": others,
    }


def flash_ran(model: Any, ids: Tensor) -> str | bool:
    """Whether one forward pass over ids without a mask runs on SDPA's flash backend alone, in the model's mode; else why not."""
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            model(input_ids=ids, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return first_line(error)
    return True


class _Choices(TorchFunctionMode):
    """Asks torch before each call of scaled_dot_product_attention which backend it will choose for these arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            # Its arguments are those of the function, by the same names.
            chosen = torch._fused_sdp_choice(*args, **(kwargs or {}))
            self.names[SDPBackend(chosen).name if chosen >= 0 else "NONE"] = None
        return func(*args, **(kwargs or {}))


@contextmanager
def sdpa_choices() -> Iterator[list[str]]:
    """A list that holds afterwards which backends SDPA chose by itself, each once. FLASH_ATTENTION, EFFICIENT_ATTENTION, CUDNN_ATTENTION, MATH."""
    found: list[str] = []
    with _Choices() as mode:
        yield found
    found.extend(mode.names)


def chosen_by_sdpa(run: Callable[[], object]) -> str:
    """Which backends SDPA chooses in that call, without gradients."""
    with torch.no_grad(), sdpa_choices() as found:
        run()
    return ", ".join(found) or "SDPA was not called"


def prefill_by(decoder: Any, ran: str | bool | None) -> None:
    """Let the decoder read its prompt under `only_flash`; its steps stay free, for what they need may be another backend."""
    plain = decoder.prefill

    def prefill(ids: Tensor) -> Tensor:
        with only_flash(ran):
            logits: Tensor = plain(ids)
        return logits

    decoder.prefill = prefill


def only_flash(ran: str | bool | None) -> Any:
    """A context in which SDPA has no other backend, where it has been seen to need none: so what is timed is what was seen."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if ran is True else nullcontext()


def time_rounds(bench: Bench, decoder: Any, tokens: int, new: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of prefill and of a step in each round, after one that warms up."""
    from qlm.gpu_bench import time_once

    found = [time_once(decoder, tokens, new, bench.device, seed) for seed in range(rounds + 1)][1:]
    return [prefill for prefill, _ in found], [step for _, step in found]


def in_ms(name: str, seconds: list[float]) -> dict[str, float]:
    return {
        f"{name}_ms": float(f"{1e3 * statistics.median(seconds):.5g}"),
        f"{name}_ms_best": float(f"{1e3 * min(seconds):.5g}"),
    }


def measure_inference(
    bench: Bench, shape: str, weights: str, attention: str, loop: str, batch: int, prompt: int, new: int, rounds: int
) -> dict[str, Any]:
    """Times of prefill and of a step, and memory. `loop`: "growing" or "recorded"; `new` tokens are decoded in each round."""
    from qlm.static_decoder import StaticDecoder

    need(weights)
    need_attention(attention, str(bench.device), loop)
    model = bench.model(shape, weights, attention)
    ids = bench.ids(model, batch, prompt)
    facts: dict[str, Any] = {}
    decoder: Any
    if loop == "recorded":
        decoder = StaticDecoder(model, batch, prompt + max(new, CHECKED_STEPS))
        facts = compare(model, decoder, ids, tolerance(weights, bench.dtype))
        facts["graph"] = decoder.graph is not None
    else:
        decoder = GrowingDecoder(model, batch)
    if attention == "sdpa":
        facts["sdpa_backend"] = chosen_by_sdpa(lambda: decoder.prefill(ids))
        # A recorded step does not come by Python any more; what was recorded is this.
        step = decoder._forward if loop == "recorded" else partial(decoder.step, ids[:, -1])
        facts["sdpa_backend_of_a_step"] = chosen_by_sdpa(step)
        facts["flash_in_prefill"] = flash_ran(model, ids)
        prefill_by(decoder, facts["flash_in_prefill"])
    # What the checks needed is no part of it.
    bench.reset_peak()
    prefills, steps = time_rounds(bench, decoder, prompt, new, rounds)
    return {**in_ms("prefill", prefills), **in_ms("step", steps), "peak_mib": bench.peak_mib(), **facts}


def check_attention_agrees(model: Any, ids: Tensor, attention: str, allowed: float) -> dict[str, Any]:
    """Logits of a row against eager attention's; the model then has `attention`."""
    row, logits = ids[:1, :256], []
    with torch.no_grad():
        for name in ("eager", attention):
            model.set_attn_implementation(name)
            logits.append(model(input_ids=row, use_cache=False).logits)
    found = difference(logits[1], logits[0])
    if not found <= allowed:
        raise Differs(f"logits differ from eager attention's by {found:.3g} of their size, {allowed} is allowed")
    return {"largest_difference": float(f"{found:.3g}")}


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter asks for a gradient."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def embedded(model: Any, ids: Tensor) -> Tensor:
    """What the embedding makes of ids, as a leaf that asks for its gradient."""
    with torch.no_grad():
        found: Tensor = model.get_input_embeddings()(ids)
    return found.requires_grad_()


def need_gradient(x: Tensor) -> None:
    """
    Raises:
        Differs: the backward pass did not reach x, or not with numbers.
    """
    if x.grad is None or not bool(x.grad.isfinite().all()):
        raise Differs(f"the gradient of the embedding's output is {'not there' if x.grad is None else 'not finite'}")


def measure_training(
    bench: Bench,
    shape: str,
    attention: str,
    batch: int,
    length: int,
    rounds: int,
    *,
    weights: str = "float",
    base: str = "trained",
    as_page: bool = False,
) -> dict[str, Any]:
    """Time of a forward pass with its loss and a backward pass, and the most memory of both, weights and gradients included; no optimizer.

    Args:
        base: "trained", all weights get a gradient; or "frozen", none does and the backward pass goes through all blocks to the output of
            the input embedding: what every adapter on a frozen base needs at least. Quantized weights have no other.
        as_page: time besides what transformers' page times (opt_page.py): the logits' sum in the place of the loss.
    """
    need(weights)
    need_attention(attention, str(bench.device))
    model = bench.model(shape, weights, attention)
    ids = bench.ids(model, batch, length)
    facts: dict[str, Any] = {}
    if attention != "eager":
        facts = check_attention_agrees(model, ids, attention, tolerance(weights, bench.dtype))

    def forward() -> tuple[Tensor, Tensor | None]:
        # The logits go with the output: the backward pass has no need of them.
        if base == "trained":
            return model(input_ids=ids, labels=ids, use_cache=False).loss, None
        x = embedded(model, ids)
        return model(inputs_embeds=x, labels=ids, use_cache=False).loss, x

    def loss_once() -> float:
        bench.finish()
        began = time.perf_counter()
        loss, x = forward()
        loss.backward()
        model.zero_grad(set_to_none=True)
        bench.finish()
        seconds = time.perf_counter() - began
        facts["loss"] = float(f"{loss.item():.5g}")
        if not facts["loss"] < float("inf"):
            raise ValueError(f"the loss is {loss.item()}")
        if x is not None and "gradient" not in facts:
            need_gradient(x)
            facts["gradient"] = "of the embedding's output"
        return seconds

    kept: list[Any] = []

    def page_once() -> float:
        bench.finish()
        began = time.perf_counter()
        # As there, what the model returned lives until it has returned the next, with its logits, keys and values.
        kept[:] = [model(input_ids=ids)]
        kept[0].logits.sum().backward()
        model.zero_grad(set_to_none=True)
        bench.finish()
        return time.perf_counter() - began

    def timed(once: Callable[[], float]) -> tuple[list[float], float | None]:
        once()
        bench.reset_peak()
        times = [once() for _ in range(rounds + 1)][1:]
        return times, bench.peak_mib()

    try:
        model.train()
        with frozen(model) if base == "frozen" else nullcontext():
            if attention == "sdpa":
                facts["sdpa_backend"] = chosen_by_sdpa(lambda: model(input_ids=ids, use_cache=False))
                facts["flash"] = flash_ran(model, ids)
            with only_flash(facts.get("flash")):
                times, peak = timed(loss_once)
                if as_page:
                    page_times, facts["page_peak_mib"] = timed(page_once)
                    facts |= in_ms("page_batch", page_times)
        return {**in_ms("batch", times), "peak_mib": peak, **facts}
    finally:
        # Also where it did not fit.
        model.zero_grad(set_to_none=True)
        model.eval()
