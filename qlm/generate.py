"""Text from a prompt, by transformers' own generation loop with every setting given here.

A model's generation_config (what its folder says about sampling) is set aside for the time of a call: transformers
would fill from it whatever is not set, and add its own defaults (top_k 50) on top. Here an option that is not given
means "off".

What it refuses: a prompt that leaves no room in the model's positions, more new tokens than there is room for, options
that contradict each other, and logits that are NaN or infinite (a sampler would draw from garbage).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlm.arch import FAMILIES
from qlm.engine.options import Options
from qlm.engine.text import TextWriter
from qlm.errors import DataError, UsageError
from qlm.evaluate import evaluation_mode, text_ids
from qlm.static_decoder import StaticDecoder, can_decode, decoding_with

# New tokens from which on recording a step, which takes a few steps' time, is worth it.
WORTH_RECORDING = 16


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
    stop: Sequence[str] = (),
    stream: Callable[[str], None] | None = None,
    graphs: bool | None = None,
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
        stop: a text ends before the first of these that the model writes.
        stream: called with each piece of text as soon as its characters are complete; the pieces joined are the
            result. For one sequence only: several are made at the same time.
        graphs: decode in steps of fixed shape, which a GPU runs as a recorded graph (static_decoder.py). None: on a GPU where the
            attention is "sdpa" or "eager" and more than a few tokens are wanted. False: there, the same steps without a graph, so
            that the text is the same.

    Raises UsageError for options, DataError for a tokenizer or logits that cannot be right.
    """
    options = Options(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_return_sequences, seed, greedy, stop
    )  # fmt: skip
    if stream is not None:
        options.check_stream(num_return_sequences)
    ids = _prompt_ids(model, tokenizer, prompt, options)
    ends = _end_ids(model, tokenizer)
    writers = [TextWriter(partial(_decode, tokenizer), ends, stop, stream) for _ in range(num_return_sequences)]

    from transformers import GenerationConfig

    device = model.get_input_embeddings().weight.device
    fixed = graphs or (device.type == "cuda" and max_new_tokens >= WORTH_RECORDING and can_decode(model))
    sampling: dict[str, Any] = {"temperature": float(temperature), "top_k": top_k or 0, "top_p": top_p or 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        num_return_sequences=num_return_sequences,
        repetition_penalty=float(repetition_penalty),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # fills rows that ended early; their writers take no more
        use_cache=not fixed,  # the decoder's own is none of the loop's
        **({} if greedy else sampling),
    )
    with ExitStack() as inside:
        for context in (evaluation_mode(model), _own_settings_aside(model), _seeded(seed)):
            inside.enter_context(context)
        if fixed:
            # PEFT's wrapper calls the model inside, whose linears have the adapter.
            inner = getattr(model, "get_base_model", lambda: model)()
            decoder = StaticDecoder(inner, num_return_sequences, len(ids) + max_new_tokens, graphs is not False)
            inside.enter_context(decoding_with(decoder))
        batch = torch.tensor([ids], device=device)
        model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            generation_config=config,
            logits_processor=[_refuse_not_finite],
            stopping_criteria=[_Watch(writers)],
        )
    return [writer.end() for writer in writers]


def _prompt_ids(model: Any, tokenizer: Any, prompt: str, options: Options) -> list[int]:
    spec = FAMILIES.get(model.config.model_type)
    if spec is None:
        raise UsageError(f"model type {model.config.model_type!r}: expected one of {', '.join(FAMILIES)}")
    ids: list[int] = text_ids(tokenizer, prompt, spec).tolist()
    options.check_prompt(ids, spec, int(getattr(model.config, spec.positions)), int(model.config.vocab_size))
    assert not spec.bos_first or ids[0] == spec.bos_id
    return ids


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
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
def _seeded(seed: int | None) -> Iterator[None]:
    # `manual_seed` is for all GPUs, wherever the model lies.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
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


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Watch:
    """What transformers' generation asks after each token which rows have ended: a `TextWriter` for each row."""

    def __init__(self, writers: list[TextWriter]) -> None:
        self.writers = writers

    def __call__(self, ids: Tensor, scores: Any, **more: Any) -> Tensor:
        for writer, index in zip(self.writers, ids[:, -1].tolist(), strict=True):
            writer.put(index)
        return torch.tensor([writer.ended for writer in self.writers], device=ids.device)
