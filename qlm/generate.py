"""Text from a prompt, by transformers' own generation loop with every setting given here.

A model's generation_config (what its folder says about sampling) is set aside for the time of a call: transformers
would fill from it whatever is not set, and add its own defaults (top_k 50) on top. Here an option that is not given
means "off".

What it refuses: a prompt that leaves no room in the model's positions, more new tokens than there is room for, options
that contradict each other, and logits that are NaN or infinite (a sampler would draw from garbage).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qlm.arch import FAMILIES
from qlm.errors import DataError, UsageError
from qlm.evaluate import evaluation_mode, text_ids


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    seed: int | None = None,
    greedy: bool = False,
    stream: Callable[[str], None] | None = None,
) -> list[str]:
    """The texts that the model writes after `prompt`, without the prompt, up to EOS or `max_new_tokens`.

    EOS is the tokenizer's if it has one, else the config's; every id of the config's where it lists several.

    Args:
        model: transformers causal LM of one of the families, float or quantized. Dropout is off during the call.
        tokenizer: the model's; BOS by the family's rule. An empty prompt is allowed where the rule gives a BOS (OPT).
        max_new_tokens: at least 1; prompt and new tokens together fit the model's positions.
        temperature: above 0; divides the logits.
        top_k: draw from the so many most likely tokens only.
        top_p: draw from the fewest most likely tokens only whose probabilities sum to this; above 0, at most 1.
        repetition_penalty: above 0; above 1 makes tokens of prompt and text so far less likely (arXiv:1909.05858).
        num_return_sequences: independent draws, made in one batch.
        seed: 0 to 2^64 - 1: the same seed, options and machine give the same text; torch's global random state is left
            as it was. None: draws from the global random state.
        greedy: always the most likely token. Excludes the options of sampling.
        stream: called with each piece of text as soon as its characters are complete; the pieces joined are the
            result. For one sequence only: several are made at the same time.

    Raises UsageError for options, DataError for a tokenizer or logits that cannot be right.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_return_sequences, seed, greedy)
    if stream is not None and num_return_sequences > 1:
        raise UsageError(f"stream: one sequence can be streamed, and {num_return_sequences} were asked for")
    ids = _prompt_ids(model, tokenizer, prompt, max_new_tokens)
    stop = _stop_ids(model, tokenizer)

    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"temperature": float(temperature), "top_k": top_k or 0, "top_p": top_p or 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        num_return_sequences=num_return_sequences,
        repetition_penalty=float(repetition_penalty),
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,  # fills rows that ended early; cut off again below
        **({} if greedy else sampling),
    )
    device = model.get_input_embeddings().weight.device
    streamer = None if stream is None else _Streamer(tokenizer, stop, stream)
    with evaluation_mode(model), _own_settings_aside(model), _seeded(seed, device):
        batch = torch.tensor([ids], device=device)
        rows = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            generation_config=config,
            logits_processor=[_refuse_not_finite],
            streamer=streamer,
        )
    return [_decode(tokenizer, _until(row[len(ids) :].tolist(), stop)) for row in rows]


def _check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    num_return_sequences: int,
    seed: int | None,
    greedy: bool,
) -> None:
    whole: tuple[tuple[str, object, int], ...] = (
        ("max_new_tokens", max_new_tokens, 1),
        ("num_return_sequences", num_return_sequences, 1),
        ("top_k", 1 if top_k is None else top_k, 1),
        ("seed", 0 if seed is None else seed, 0),
    )
    for name, value, least in whole:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 64:
            raise UsageError(f"{name} {value!r}: expected a whole number of at least {least}")
    real: tuple[tuple[str, object, float, str], ...] = (
        ("temperature", temperature, math.inf, "a number above 0 (for the most likely token, take greedy)"),
        ("repetition_penalty", repetition_penalty, math.inf, "a number above 0 (1 is off)"),
        ("top_p", 1.0 if top_p is None else top_p, 1.0, "a number above 0 and at most 1"),
    )
    for name, value, most, expected in real:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0.0 < value <= most and value < math.inf):  # type: ignore[operator]
            raise UsageError(f"{name} {value!r}: expected {expected}")
    if greedy:
        sampling = {"temperature": temperature != 1.0, "top_k": top_k is not None, "top_p": top_p is not None}
        given = [name for name, is_given in sampling.items() if is_given]
        if given:
            raise UsageError(f"greedy: {', '.join(given)} would have no effect; leave out one or the other")
        if num_return_sequences > 1:
            raise UsageError(f"greedy gives one text; {num_return_sequences} sequences would all be the same")


def _prompt_ids(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> list[int]:
    spec = FAMILIES.get(model.config.model_type)
    if spec is None:
        raise UsageError(f"model type {model.config.model_type!r}: expected one of {', '.join(FAMILIES)}")
    ids: list[int] = text_ids(tokenizer, prompt, spec).tolist()
    if not ids:
        raise UsageError(f"the prompt is empty: a {spec.model_type} model needs at least one token to start from")
    assert not spec.bos_first or ids[0] == spec.bos_id
    positions = int(getattr(model.config, spec.positions))
    if len(ids) >= positions:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, and the model {positions} positions: "
            f"expected at most {positions - 1}, so that there is room for a new one"
        )
    if len(ids) + max_new_tokens > positions:
        raise UsageError(
            f"max_new_tokens {max_new_tokens}: the prompt takes {len(ids)} of the model's {positions} positions; "
            f"at most {positions - len(ids)} are possible"
        )
    vocabulary = int(model.config.vocab_size)
    if max(ids) >= vocabulary:
        raise DataError(f"the prompt has the id {max(ids)}, and the model has {vocabulary}: another model's tokenizer")
    return ids


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = model.config.eos_token_id
    several = list(configured) if isinstance(configured, list) else []
    own = getattr(tokenizer, "eos_token_id", None)
    # A config without the field gets its class's default, which may be an ordinary token of this tokenizer: it
    # comes last.
    first = own if own is not None else None if several else configured
    return list(dict.fromkeys([*([] if first is None else [first]), *several]))


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """The model's generation_config replaced by an empty one inside."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with nullcontext() if seed is None else torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _refuse_not_finite(ids: Tensor, logits: Tensor) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise DataError(
            f"logits are NaN or infinite after {ids.shape[1]} tokens; "
            "float16 may have overflowed: try bfloat16 or float32"
        )
    return logits


def _until(ids: list[int], stop: list[int]) -> list[int]:
    """`ids` before the first of `stop`."""
    return ids[: next((i for i, index in enumerate(ids) if index in stop), len(ids))]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Streamer:
    """What transformers' generation calls with the prompt first, then with each new token; passes text on.

    Byte-level tokens can end inside a character, which decodes to U+FFFD: text that ends so waits for the next
    token. (One that the model wrote itself waits too, until more text or the end.)
    """

    def __init__(self, tokenizer: Any, stop: list[int], write: Callable[[str], None]) -> None:
        self.tokenizer, self.stop, self.write = tokenizer, stop, write
        self.waiting: list[int] = []
        self.prompt_seen = False

    def put(self, ids: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.waiting += _until(ids.flatten().tolist(), self.stop)
        self._pass_on(_decode(self.tokenizer, self.waiting), final=False)

    def end(self) -> None:
        self._pass_on(_decode(self.tokenizer, self.waiting), final=True)

    def _pass_on(self, text: str, *, final: bool) -> None:
        if text and (final or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self.waiting = []
            self.write(text)
