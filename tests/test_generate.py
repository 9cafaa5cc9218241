"""Generation against transformers' own and a hand-written loop over the reference, options, limits, streaming."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import accelerate.hooks
import peft
import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from qlm.arch import FAMILIES
from qlm.engine import reference
from qlm.engine.options import Options
from qlm.engine.text import TextWriter
from qlm.errors import DataError, UsageError
from qlm.evaluate import text_ids
from qlm.generate import _draw, _write, generate
from qlm.static_decoder import GrowingDecoder, StaticDecoder
from tests import tiny_models
from tests.pretend_gpu import PretendEvent, PretendGpu, pretend_gpu
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


def by_transformers(
    model: Any, tokenizer: PreTrainedTokenizerFast, *, tokens: int, seed: int = 0, greedy: bool = False, **given: Any
) -> list[str]:
    """transformers' own loop, with every setting given and none from elsewhere; rows are cut before the first EOS."""
    ids = torch.tensor([text_ids(tokenizer, PROMPT, FAMILIES[model.config.model_type]).tolist()])
    more = model.config.eos_token_id
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *(more if isinstance(more, list) else [])]))
    sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    model.generation_config = GenerationConfig()
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=not greedy, eos_token_id=ends, pad_token_id=ends[0], **{**sampling, **given}
    )
    torch.manual_seed(seed)
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[:, ids.shape[1] :]
    texts = []
    for row in rows.tolist():
        end = min((row.index(index) for index in ends if index in row), default=len(row))
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts


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


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 30},
    {"top_p": 0.8},
    {"temperature": 1.4, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("ends", ["seldom", "often"])
@pytest.mark.parametrize(
    "options",
    [
        {"greedy": True},
        {"greedy": True, "repetition_penalty": 1.7},
        *({**each, "num_return_sequences": rows} for each in SAMPLING for rows in (1, 3)),
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers(both: tuple, options: dict[str, Any], ends: str) -> None:
    model, tokenizer = both
    if ends == "often":
        model.config.eos_token_id = list(range(4, 40))
    wanted = by_transformers(model, tokenizer, tokens=24, seed=4, **options)
    for graphs in (False, True):
        found = generate(model, tokenizer, PROMPT, max_new_tokens=24, graphs=graphs, seed=4, **options)
        assert found == wanted
    if options.get("num_return_sequences") == 3:
        assert (min(map(len, wanted)) < 20) == (ends == "often")


@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_a_model_with_hooks_or_an_adapter(variant: str) -> None:
    """accelerate's hooks carry what a call is given from device to device."""
    model, tokenizer = pair(variant)
    wanted = by_transformers(model, tokenizer, tokens=12)
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    assert generate(model, tokenizer, PROMPT, max_new_tokens=12, seed=0) == wanted

    model, tokenizer = pair(variant)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    found = generate(adapted, tokenizer, PROMPT, max_new_tokens=12, seed=0)
    assert found == by_transformers(adapted, tokenizer, tokens=12)
    assert found != wanted


def test_an_adapter_that_changes_prompts() -> None:
    model, tokenizer = pair("opt")
    learned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UsageError, match=r"adapter: found PROMPT_TUNING, .* expected LoRA"):
        generate(peft.get_peft_model(model, learned), tokenizer, PROMPT, max_new_tokens=4)


def test_an_activated_lora() -> None:
    """PEFT looks for the tokens that activate it outside the model, which the loop calls alone."""
    model, tokenizer = pair("opt")
    activated = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    with pytest.raises(UsageError, match=r"adapter: found an activated LoRA, which looks at prompts; expected LoRA"):
        generate(peft.get_peft_model(model, activated), tokenizer, PROMPT, max_new_tokens=4)


def test_a_draw_is_multinomials() -> None:
    torch.manual_seed(0)
    for scores in torch.randn(50, 4, 300) * 3:
        scores[:, 7] = float("-inf")
        torch.manual_seed(1)
        found, state = _draw(scores), torch.get_rng_state()
        torch.manual_seed(1)
        assert torch.equal(found, torch.multinomial(scores.softmax(-1), 1)[:, 0])
        assert torch.equal(state, torch.get_rng_state())


def test_what_is_done_to_logits_waits_for_nothing() -> None:
    """On a GPU the host waits for the ids alone (`test_a_gpu_computes_while_the_host_reads`), and so may launch the next step."""
    logits = torch.randn(2, 300)
    decoder = SimpleNamespace(prefill=lambda ids: logits, step=lambda ids: logits)
    options = Options(3, 0.7, 20, 0.9, 1.2, 2, None, False, ())
    writers = [TextWriter(str, ()), TextWriter(str, ())]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _write(decoder, torch.ones(2, 4, dtype=torch.int64), options, writers)
    called = {event.key for event in profile.key_averages()}
    assert {"aten::topk", "aten::cumsum", "aten::gather", "aten::exponential_"} <= called
    assert not called & {
        "aten::item",
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::equal",
        "aten::_assert_async",
    }
    assert all(writer.text for writer in writers)


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


def logged(log: list[str], name: str, true: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        log.append(name)
        return true(*args)

    return called


@contextmanager
def watched(device: str) -> Iterator[list[str]]:
    """What is done inside, in order: "begin" a model reads its prompt, "step", "copy" begins to copy ids from the GPU, "wait" for that."""
    log: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for decoder in (GrowingDecoder, StaticDecoder):
            patch.setattr(decoder, "step", logged(log, "step", decoder.step))
        # The fixed cache's prompt is read by one that grows.
        patch.setattr(GrowingDecoder, "prefill", logged(log, "begin", GrowingDecoder.prefill))
        patch.setattr(PretendEvent, "record", logged(log, "copy", PretendEvent.record))
        patch.setattr(PretendEvent, "synchronize", logged(log, "wait", PretendEvent.synchronize))
        with pretend_gpu() if device == "cuda" else nullcontext() as gpu:
            yield log
        if isinstance(gpu, PretendGpu):
            # Nothing else has brought a value to the host.
            assert not gpu.operations.keys() & {"item", "tolist", "__bool__", "__int__", "__float__", "nonzero"}


# Few tokens are not worth a recording, so that their cache grows.
@pytest.mark.parametrize("tokens", [10, 20])
def test_a_gpu_computes_while_the_host_reads(both: tuple, tokens: int) -> None:
    model, tokenizer = both
    ids = greedy_by_reference(model, tokenizer, tokens, penalty=1.7)
    end = next(i for i in range(4, tokens - 1) if ids[i] not in ids[:i])
    options = {"max_new_tokens": tokens, "greedy": True, "repetition_penalty": 1.7, "graphs": False}
    with watched("cuda") as whole:
        assert generate(model.to("cuda"), tokenizer, PROMPT, **options) == [tokenizer.decode(ids)]
    # Never one more than there is room for.
    assert whole == ["begin", *["copy", "step", "wait"] * (tokens - 1), "copy", "wait"]
    model.config.eos_token_id = [ids[end]]
    with watched("cuda") as ended:
        assert generate(model.to("cuda"), tokenizer, PROMPT, **options) == [tokenizer.decode(ids[:end])]
    assert ended == ["begin", *["copy", "step", "wait"] * (end + 1)]


@pytest.mark.parametrize("graphs", [False, True])
def test_a_cpu_makes_no_step_in_vain(both: tuple, graphs: bool) -> None:
    model, tokenizer = both
    ids = greedy_by_reference(model, tokenizer, 20)
    end = next(i for i in range(4, 19) if ids[i] not in ids[:i])
    for ends, steps in ([], 19), ([ids[end]], end):
        model.config.eos_token_id = ends
        with watched("cpu") as log:
            generate(model, tokenizer, PROMPT, max_new_tokens=20, greedy=True, graphs=graphs)
        assert log == ["begin", *["step"] * steps]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_a_reader_that_breaks_off(both: tuple, error: type[BaseException], device: str) -> None:
    model, tokenizer = both
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 4}
    wanted = generate(model, tokenizer, PROMPT, **options)
    model.train()
    own, state = set(vars(model)), torch.get_rng_state()
    pieces: list[str] = []

    def stream(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise error

    with pytest.raises(error), watched(device):
        generate(model.to(device), tokenizer, PROMPT, stream=stream, graphs=False, **options)
    assert model.training
    assert set(vars(model)) == own
    assert torch.equal(state, torch.get_rng_state())
    assert generate(model, tokenizer, PROMPT, **options) == wanted


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_end_being_finite(both: tuple, greedy: bool, device: str) -> None:
    """In one row of several, after some tokens; they are refused before the row's text goes on."""
    model, tokenizer = both
    length = len(text_ids(tokenizer, PROMPT, FAMILIES[model.config.model_type]))
    true, calls = GrowingDecoder.step, []

    def broken(self: GrowingDecoder, ids: torch.Tensor) -> torch.Tensor:
        calls.append(ids)
        logits = true(self, ids)
        if len(calls) == 3:
            logits[-1, 5] = float("nan" if greedy else "-inf")
        return logits

    options: dict[str, Any] = {"greedy": True} if greedy else {"seed": 0, "num_return_sequences": 3, "top_k": 5}
    with mock.patch.object(GrowingDecoder, "step", broken), pytest.raises(DataError) as raised, watched(device):
        generate(model.to(device), tokenizer, PROMPT, max_new_tokens=12, **options)
    assert str(raised.value).startswith(f"logits are NaN or infinite after {length + 3} tokens; ")
    assert len(calls) == (4 if device == "cuda" else 3)


def test_a_temperature_that_floats_cannot_divide_by() -> None:
    with pytest.raises(DataError, match="logits are NaN or infinite"):
        generate(*pair("opt"), PROMPT, max_new_tokens=4, temperature=1e-45, seed=0)
