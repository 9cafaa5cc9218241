"""Generation against a hand-written loop over the reference, options, limits, streaming."""

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from qlm.arch import FAMILIES
from qlm.engine import reference
from qlm.errors import DataError, UsageError
from qlm.evaluate import text_ids
from qlm.generate import generate
from tests import tiny_models
from tests.test_evaluate import make_tokenizer

PROMPT = "The cat sat on the mat"
TOKENIZERS = {model_type: make_tokenizer(model_type) for model_type in FAMILIES}


def pair(variant: str, seed: int = 0) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    model = tiny_models.build(variant, seed)
    return model, TOKENIZERS[model.config.model_type]


def greedy_by_reference(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, tokens: int, penalty: float = 1.0
) -> list[int]:
    """Prompt and new ids by argmax over the reference's logits; stops before EOS."""
    config, tensors = model.config.to_dict(), reference.published_tensors(model)
    ids = text_ids(tokenizer, PROMPT, FAMILIES[model.config.model_type]).tolist()
    start = len(ids)
    for _ in range(tokens):
        logits = reference.logits(model.config.model_type, config, tensors, torch.tensor([ids]))[0, -1]
        seen = torch.tensor(sorted(set(ids)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        index = int(logits.argmax())
        if index == tokenizer.eos_token_id:
            break
        ids.append(index)
    return ids[start:]


@pytest.fixture(params=tiny_models.FAMILIES)
def both(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    return pair(request.param)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
@pytest.mark.parametrize("variant", [*tiny_models.FAMILIES, "opt-350m", "bigcode-multi-head"])
def test_greedy_is_argmax_over_the_reference(variant: str, penalty: float) -> None:
    model, tokenizer = pair(variant)
    expected = greedy_by_reference(model, tokenizer, 20, penalty)
    assert len(expected) > 3
    found = generate(model, tokenizer, PROMPT, max_new_tokens=20, greedy=True, repetition_penalty=penalty)
    assert found == [tokenizer.decode(expected, skip_special_tokens=True)]


def test_seed_reproduces_and_leaves_the_random_state(both: tuple) -> None:
    model, tokenizer = both
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = generate(model, tokenizer, PROMPT, max_new_tokens=20, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(8)
    assert generate(model, tokenizer, PROMPT, max_new_tokens=20, seed=1) == first
    assert generate(model, tokenizer, PROMPT, max_new_tokens=20, seed=2) != first


def test_without_a_seed_the_global_state_counts(both: tuple) -> None:
    model, tokenizer = both
    texts = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        texts += generate(model, tokenizer, PROMPT, max_new_tokens=20)
    assert texts[0] == texts[1] != texts[2]


def test_several_sequences_differ(both: tuple) -> None:
    model, tokenizer = both
    texts = generate(model, tokenizer, PROMPT, max_new_tokens=16, num_return_sequences=4, seed=0)
    assert len(set(texts)) == 4
    assert texts == generate(model, tokenizer, PROMPT, max_new_tokens=16, num_return_sequences=4, seed=0)


def test_top_k_1_and_tiny_top_p_and_low_temperature_are_greedy(both: tuple) -> None:
    model, tokenizer = both
    greedy = generate(model, tokenizer, PROMPT, max_new_tokens=12, greedy=True)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert generate(model, tokenizer, PROMPT, max_new_tokens=12, seed=0, **options) == greedy


def test_no_hidden_top_k() -> None:
    """transformers' own default draws from the 50 most likely tokens; here nothing is cut off unless asked for."""
    model, tokenizer = pair("neox-parallel-rotary-0.25")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # every token equally likely
    ids = set()
    for seed in range(6):
        text = generate(model, tokenizer, "a", max_new_tokens=50, seed=seed)[0]
        ids |= set(tokenizer(text).input_ids)
    assert len(ids) > 60


@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_the_models_own_generation_config_is_set_aside(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = pair(variant)
    expected = generate(model, tokenizer, PROMPT, max_new_tokens=12, seed=0)
    greedy = generate(model, tokenizer, PROMPT, max_new_tokens=12, greedy=True)
    own = GenerationConfig(
        do_sample=True,
        top_k=1,
        temperature=9.0,
        no_repeat_ngram_size=1,
        min_new_tokens=12,
        suppress_tokens=[5],
        max_length=3,
    )
    own.eos_token_id = list(range(300))
    model.generation_config = own
    assert generate(model, tokenizer, PROMPT, max_new_tokens=12, seed=0) == expected
    assert generate(model, tokenizer, PROMPT, max_new_tokens=12, greedy=True) == greedy
    assert model.generation_config is own
    assert not caplog.records


@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_stops_at_eos(variant: str) -> None:
    model, tokenizer = pair(variant)
    ids = greedy_by_reference(model, tokenizer, 20)
    stop = next(i for i in range(2, 20) if ids[i] not in ids[:i])

    model.config.eos_token_id = [ids[stop], 319]  # a list in the config counts, beside the tokenizer's
    pieces: list[str] = []
    found = generate(model, tokenizer, PROMPT, max_new_tokens=20, greedy=True, stream=pieces.append)
    assert found == ["".join(pieces)] == [tokenizer.decode(ids[:stop], skip_special_tokens=True)]

    model.config.eos_token_id = ids[stop]  # one id in the config alone gives way to the tokenizer's
    assert generate(model, tokenizer, PROMPT, max_new_tokens=20, greedy=True) == [tokenizer.decode(ids)]
    without = make_tokenizer(model.config.model_type)
    without.eos_token = None
    assert generate(model, without, PROMPT, max_new_tokens=20, greedy=True) == found


def test_sequences_that_end_early_are_cut_at_eos() -> None:
    model, tokenizer = pair("opt")
    model.config.eos_token_id = list(range(4, 40))  # ends within a few tokens
    texts = generate(model, tokenizer, PROMPT, max_new_tokens=40, num_return_sequences=6, seed=0)
    lengths = [len(text) for text in texts]
    assert min(lengths) < max(lengths)
    ended = {tokenizer.decode([index]) for index in range(4, 40)}
    assert all(not any(piece in text for piece in ended if len(piece) == 1 and piece.isascii()) for text in texts)


@pytest.mark.parametrize("seed", range(4))
def test_stream_joined_is_the_text(both: tuple, seed: int) -> None:
    """Random models write broken UTF-8 all the time, which is the hard case."""
    model, tokenizer = both
    pieces: list[str] = []
    text = generate(model, tokenizer, PROMPT, max_new_tokens=40, seed=seed, stream=pieces.append)[0]
    assert "".join(pieces) == text
    assert pieces
    assert all(pieces)


@pytest.mark.parametrize("streaming", [True, False])
def test_stop_strings(both: tuple, streaming: bool) -> None:
    model, tokenizer = both
    whole = generate(model, tokenizer, PROMPT, max_new_tokens=40, greedy=True)[0]
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    for begin, length in ((3, 1), (6, 4), (0, 2)):
        stop = whole[begin : begin + length]
        pieces: list[str] = []
        found = generate(
            model, tokenizer, PROMPT, max_new_tokens=40, greedy=True, stop=["no such text", stop],
            stream=pieces.append if streaming else None,
        )  # fmt: skip
        assert found == [whole[: whole.index(stop)]]
        assert "".join(pieces) == (found[0] if streaming else "")
    hook.remove()
    assert len(calls) < 3 * 39


def test_each_sequence_ends_at_its_own_stop_string(both: tuple) -> None:
    model, tokenizer = both
    options = {"max_new_tokens": 30, "num_return_sequences": 4, "seed": 3}
    whole = generate(model, tokenizer, PROMPT, **options)
    stop = next(text[i] for text in whole for i in range(5, 20) if sum(text[i] in other for other in whole) < 4)
    cut = generate(model, tokenizer, PROMPT, **options, stop=[stop])
    # A row that goes on after another has ended draws what it drew before: the batch stays whole.
    assert cut == [text.partition(stop)[0] for text in whole]
    assert cut != whole


def test_positions(both: tuple) -> None:
    model, tokenizer = both
    spec = FAMILIES[model.config.model_type]
    prompt = next(
        text for n in range(200) if len(text_ids(tokenizer, text := "9" * n, spec)) == tiny_models.POSITIONS - 2
    )
    assert len(generate(model, tokenizer, prompt, max_new_tokens=2, seed=0)) == 1
    with pytest.raises(
        UsageError, match=r"max_new_tokens 3: the prompt takes 62 of the model's 64 positions; at most 2"
    ):
        generate(model, tokenizer, prompt, max_new_tokens=3)
    with pytest.raises(UsageError, match=r"the prompt has 64 tokens, and the model 64 positions: expected at most 63"):
        generate(model, tokenizer, prompt + "99", max_new_tokens=1)
    with pytest.raises(UsageError, match=r"the prompt has \d{3} tokens, and the model 64 positions"):
        generate(model, tokenizer, prompt * 3, max_new_tokens=1)


def test_empty_prompt() -> None:
    model, tokenizer = pair("opt")
    assert generate(model, tokenizer, "", max_new_tokens=4, seed=0)
    for variant in tiny_models.FAMILIES[1:]:
        with pytest.raises(UsageError, match="the prompt is empty"):
            generate(*pair(variant), "", max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: .* at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5"),
        ({"temperature": 0.0}, "temperature 0.0: .* greedy"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": 0}, "top_k 0: .* at least 1"),
        ({"top_k": True}, "top_k True"),
        ({"top_p": 0.0}, "top_p 0.0: .* at most 1"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"num_return_sequences": 0}, "num_return_sequences 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1 << 64}, "seed 18446744073709551616"),
        ({"greedy": True, "temperature": 0.5, "top_k": 3}, "greedy: temperature, top_k would have no effect"),
        ({"greedy": True, "num_return_sequences": 2}, "greedy gives one text"),
        ({"num_return_sequences": 2, "stream": print}, "one sequence can be streamed, and 2"),
        ({"stop": "end"}, "stop 'end': expected a list of texts"),
        ({"stop": ["a", ""]}, "at least one character"),
    ],
    ids=str,
)
def test_invalid_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        generate(*pair("opt"), PROMPT, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("greedy", [True, False])
def test_not_finite_logits(greedy: bool) -> None:
    model, tokenizer = pair("bigcode-multi-query")
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = float("nan")
    with pytest.raises(DataError, match=r"logits are NaN or infinite after \d+ tokens"):
        generate(model, tokenizer, PROMPT, max_new_tokens=4, greedy=greedy)


def test_another_models_tokenizer() -> None:
    model = tiny_models.opt(vocab_size=100).eval()
    with pytest.raises(DataError, match="another model's tokenizer"):
        generate(model, TOKENIZERS["opt"], "The cat sat", max_new_tokens=4)


def test_dropout_is_off(both: tuple) -> None:
    model, tokenizer = both
    expected = generate(model, tokenizer, PROMPT, max_new_tokens=12, greedy=True)
    model.train()
    assert generate(model, tokenizer, PROMPT, max_new_tokens=12, greedy=True) == expected
    assert model.training
