"""Text from a prompt: a model's logits, options on them, a token of each sequence, and its text, again and again.

Tokens are those of transformers' `model.generate` for the same settings and seed, where the cache grows as theirs does; steps
of fixed shape add up in another order. But an option that is not given means "off": neither a model's generation_config
(what its folder says about sampling) counts, nor transformers' own defaults (top_k 50).

What it refuses: a prompt that leaves no room in the model's positions, more new tokens than there is room for, options
that contradict each other, and logits that are NaN or infinite (a sampler would draw from garbage).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlm.arch import FAMILIES
from qlm.engine.options import Options
from qlm.engine.text import TextWriter
from qlm.errors import DataError, UsageError
from qlm.evaluate import evaluation_mode, text_ids
from qlm.static_decoder import Decoder, GrowingDecoder, StaticDecoder, can_decode

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

    Raises UsageError for options and for adapters that look at prompts, DataError for a tokenizer or logits that cannot be right.
    """
    options = Options(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_return_sequences, seed, greedy, stop
    )  # fmt: skip
    if stream is not None:
        options.check_stream(num_return_sequences)
    ids = _prompt_ids(model, tokenizer, prompt, options)
    ends = _end_ids(model, tokenizer)
    writers = [TextWriter(partial(_decode, tokenizer), ends, stop, stream) for _ in range(num_return_sequences)]

    device = model.get_input_embeddings().weight.device
    fixed = graphs or (device.type == "cuda" and max_new_tokens >= WORTH_RECORDING and can_decode(model))
    inner = _inside(model)
    with evaluation_mode(model), _seeded(seed):
        decoder: Decoder
        if fixed:
            decoder = StaticDecoder(inner, num_return_sequences, len(ids) + max_new_tokens, graphs is not False)
        else:
            decoder = GrowingDecoder(inner)
        _write(decoder, torch.tensor([ids] * num_return_sequences, device=device), options, writers)
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


def _inside(model: Any) -> Any:
    """The model that PEFT's wrapper calls, whose linears have the adapter; one without is itself."""
    if not hasattr(model, "get_base_model"):
        return model
    config = model.active_peft_config
    activated = getattr(config, "alora_invocation_tokens", None)
    if config.is_prompt_learning or activated:
        found = (
            "an activated LoRA, which looks at prompts"
            if activated
            else f"{config.peft_type.value}, which changes prompts"
        )
        raise UsageError(f"adapter: found {found}; expected LoRA or another that changes linears alone")
    return model.get_base_model()


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    # `manual_seed` is for all GPUs, wherever the model lies.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with nullcontext() if seed is None else torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _write(decoder: Decoder, ids: Tensor, options: Options, writers: Sequence[TextWriter]) -> None:
    """What follows ids int64 [B, T], a row for each writer. Rows that have ended are computed on, until all have."""
    changes, cuts = _processors(options)
    # A GPU computes the next step while the host takes this token into its text. Where that ends the last text, the step was
    # in vain; a CPU, which would gain nothing, makes it afterwards.
    ahead = ids.device.type == "cuda"
    logits = decoder.prefill(ids)
    for left in reversed(range(options.max_new_tokens)):
        scores = logits.to(ids.device, torch.float32)
        for change in changes:
            scores = change(ids, scores)
        finite = scores.isfinite().all(dim=-1)
        for cut in cuts:
            scores = cut(ids, scores)
        tokens = scores.argmax(-1) if options.greedy else _draw(scores)
        read = _reading(tokens.masked_fill(~finite, -1))
        if left and ahead:
            logits = decoder.step(tokens)
        found = read()
        if any(index < 0 for index, writer in zip(found, writers, strict=True) if not writer.ended):
            raise DataError(
                f"logits are NaN or infinite after {ids.shape[1]} tokens; "
                "float16 may have overflowed: try bfloat16 or float32"
            )
        for writer, index in zip(writers, found, strict=True):
            writer.put(index)
        if all(writer.ended for writer in writers):
            return
        if left and not ahead:
            logits = decoder.step(tokens)
        ids = torch.cat([ids, tokens[:, None]], dim=1)


def _processors(options: Options) -> tuple[list[Any], list[Any]]:
    """transformers' own, in the order of its `generate`: those that leave finite scores finite, and those that put -inf in the place of what
    is not to be drawn. Each takes ids int64 [B, T] and scores float32 [B, V]."""
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    changes: list[Any] = []
    if options.repetition_penalty != 1.0:
        changes.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.temperature != 1.0:
        changes.append(TemperatureLogitsWarper(float(options.temperature)))
    cuts: list[Any] = []
    if options.top_k is not None:
        cuts.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1.0:
        cuts.append(TopPLogitsWarper(float(options.top_p)))
    return changes, cuts


def _draw(scores: Tensor) -> Tensor:
    """Ids int64 [B] by scores float32 [B, V]; any of them where scores are NaN.

    The index of the largest p / q, with q from Exp(1), is drawn by p. So does torch.multinomial, with the same numbers
    (github.com/pytorch/pytorch/issues/11931); but it also looks for NaN, and finding one on a GPU, it makes that useless to this process.
    """
    p = scores.softmax(-1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def _reading(ids: Tensor) -> Callable[[], list[int]]:
    """Begin to copy ids to the host; what is returned waits for the copy, and for nothing that is launched after it."""
    if ids.device.type != "cuda":
        return ids.tolist
    # To pinned memory: torch takes it for copies that the host does not wait for.
    copy = ids.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(ids.device))

    def read() -> list[int]:
        copied.synchronize()
        found: list[int] = copy.tolist()
        return found

    return read


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
