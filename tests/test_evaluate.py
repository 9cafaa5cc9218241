"""The protocol against a naive float64 computation, its independence of batching, and what it refuses."""

import importlib
import json
import math
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from qlm.arch import FAMILIES
from qlm.engine import reference
from qlm.errors import DataError, UsageError
from qlm.evaluate import Evaluation, bos_rule, evaluate, text_ids
from tests import tiny_models

# `qlm.evaluate` is the function.
evaluate_module = importlib.import_module("qlm.evaluate")
TEXT = (
    "The cat sat on the mat, and the rat sat on the cat. Ünïcode — 猫 — counts as bytes.\n\nSo does this: 0123456789!\n"
)
# Float32 logits of a few units: each token's log-probability is right to about 1e-6, and the mean is better.
FLOAT32 = 2e-6


def make_tokenizer(model_type: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens by the family's rules; `template` replaces its BOS rule ("{bos} $A")."""
    opt = model_type == "opt"
    special = ["<s>", "<pad>", "</s>", "<unk>"] if opt else ["<|endoftext|>"]
    bos, index = ("</s>", 2) if opt else ("<|endoftext|>", 0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny_models.VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    template = ("{bos} $A" if opt else "$A") if template is None else template
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template.format(bos=bos), special_tokens=[(bos, index)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=bos, model_max_length=16)


def naive(model: torch.nn.Module, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Log-probabilities [windows, length - 1, V] in float64 by the reference, one window at a time."""
    args = model.config.model_type, model.config.to_dict(), reference.published_tensors(model)
    windows = ids[: len(ids) // length * length].view(-1, 1, length)
    logits = torch.cat([reference.logits(*args, window, dtype=torch.float64) for window in windows])
    return logits.log_softmax(-1)[:, :-1]


def measure(model: torch.nn.Module, ids: torch.Tensor, length: int = 16, **options: object) -> Evaluation:
    return evaluate(model, ids, length=length, data_sha256="0" * 64, bos="none added", **options)  # type: ignore[arg-type]


def some_ids(tokens: int = 150) -> torch.Tensor:
    return tiny_models.token_ids(batch=1, length=tokens)[0]


def nudged(variant: str, amount: float = 0.01) -> torch.nn.Module:
    """The variant with noise on its matrices, as quantizing puts there."""
    model = tiny_models.build(variant)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("variant", [*tiny_models.FAMILIES, "opt-350m"])
def test_equals_a_naive_float64_computation(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "SLICE_LOGITS", 7 * tiny_models.VOCABULARY)  # slices end inside windows
    model, baseline, ids, length = nudged(variant), tiny_models.build(variant), some_ids(), 16
    found = measure(model, ids, length, baseline=baseline, batch_size=2)

    q, p = naive(model, ids, length), naive(baseline, ids, length)
    targets = ids[: 9 * length].view(9, length)[:, 1:, None]
    nll, baseline_nll = (-x.gather(-1, targets)[..., 0] for x in (q, p))
    kl = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()

    def stderr(values: torch.Tensor) -> float:
        means = values.mean(1)
        return math.sqrt(float((means - means.mean()).square().sum()) / 8 / 9)

    assert found.windows == 9  # 150 = 9 * 16 + 6: the remainder is dropped
    assert found.tokens == nll.numel() == 9 * 15
    assert found.perplexity == pytest.approx(math.exp(nll.mean()), rel=FLOAT32)
    assert found.perplexity_stderr == pytest.approx(stderr(nll) * math.exp(nll.mean()), rel=1e-4)
    assert found.baseline_perplexity == pytest.approx(math.exp(baseline_nll.mean()), rel=FLOAT32)
    assert found.baseline_perplexity_stderr == pytest.approx(
        stderr(baseline_nll) * math.exp(baseline_nll.mean()), rel=1e-4
    )
    assert found.kl_divergence == pytest.approx(float(kl.mean()), rel=1e-3, abs=FLOAT32)
    assert found.kl_stderr == pytest.approx(stderr(kl), rel=1e-3)
    assert found.same_top1 == pytest.approx(float(same.mean()))
    assert found.same_top1_stderr == pytest.approx(stderr(same))
    assert found.kl_divergence > 1e-4
    assert 0.2 < found.same_top1 < 1.0


@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_independent_of_batch_size(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, baseline, ids = nudged(variant), tiny_models.build(variant), some_ids()
    results = [measure(model, ids, baseline=baseline, batch_size=size) for size in (1, 2, 4, 9, 100, None)]
    monkeypatch.setattr(evaluate_module, "SLICE_LOGITS", 1)  # one row at a time
    results.append(measure(model, ids, baseline=baseline))
    for result in results[1:]:
        assert result.perplexity == pytest.approx(results[0].perplexity, rel=1e-6)
        assert result.kl_divergence == pytest.approx(results[0].kl_divergence, rel=1e-3, abs=1e-6)
        assert (result.tokens, result.windows, result.same_top1) == (results[0].tokens, 9, results[0].same_top1)


def test_logits_exist_a_slice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "SLICE_LOGITS", 7 * tiny_models.VOCABULARY)
    rows: list[int] = []

    class Watch(TorchDispatchMode):
        """Notes the rows of every new tensor as wide as the vocabulary."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] == tiny_models.VOCABULARY:
                rows.append(result.numel() // tiny_models.VOCABULARY)
            return result

    for variant in tiny_models.FAMILIES:
        model, baseline = tiny_models.build(variant), tiny_models.build(variant)
        rows.clear()
        with Watch():
            measure(model, some_ids(), baseline=baseline)
        wide = [n for n in rows if n != 128]  # 128: the head's weight, transposed
        assert max(wide) == 7


@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_a_model_against_itself(variant: str) -> None:
    model = tiny_models.build(variant)
    found = measure(model, some_ids(), baseline=tiny_models.build(variant))
    assert (found.kl_divergence, found.same_top1, found.kl_stderr) == (0.0, 1.0, 0.0)
    assert found.perplexity == found.baseline_perplexity
    assert found.perplexity_stderr == found.baseline_perplexity_stderr


def test_kl_is_from_the_baseline_to_the_model() -> None:
    """KL is not symmetric: exchanging the models gives another value."""
    model, baseline = nudged("opt", 0.1), tiny_models.build("opt")
    forward = measure(model, some_ids(), baseline=baseline).kl_divergence
    backward = measure(baseline, some_ids(), baseline=model).kl_divergence
    assert forward != pytest.approx(backward, rel=1e-2)


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = tiny_models.build("neox-parallel-rotary-0.25")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = measure(model, some_ids())
    assert found.perplexity == pytest.approx(tiny_models.VOCABULARY, rel=FLOAT32)
    assert found.perplexity_stderr == pytest.approx(0.0, abs=1e-4)


def test_windows_limit_one_window_and_json() -> None:
    model, ids = tiny_models.build("opt"), some_ids()
    three = measure(model, ids, windows=3)
    assert three.windows == 3
    assert three.perplexity == pytest.approx(measure(model, ids[:48]).perplexity, rel=1e-9)
    assert measure(model, ids, windows=100).windows == 9
    one = measure(model, ids, windows=1, baseline=model)
    assert one.perplexity_stderr is one.kl_stderr is one.same_top1_stderr is one.baseline_perplexity_stderr is None
    without = json.loads(json.dumps(three.to_json(), allow_nan=False))
    assert without["kl_divergence"] is without["same_top1"] is without["baseline_perplexity"] is None
    wanted = "perplexity perplexity_stderr tokens kl_divergence kl_stderr same_top1 protocol bos data_sha256 seconds"
    assert set(wanted.split()) <= set(without)
    assert without["protocol"].startswith("non-overlapping windows of 16 tokens, 15 predicted")
    assert without["seconds"] > 0
    assert without["activations"] == "float"


def test_progress_counts_windows() -> None:
    calls: list[tuple[int, int]] = []
    measure(
        tiny_models.build("opt"), some_ids(), batch_size=4, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(0, 9), (4, 9), (8, 9), (9, 9)]


def test_dropout_is_off_and_modes_come_back() -> None:
    model = tiny_models.build("opt")
    expected = measure(model, some_ids())
    model.train()
    model.model.decoder.layers[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    assert measure(model, some_ids()).perplexity == expected.perplexity
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    for variant in tiny_models.FAMILIES:
        found = measure(tiny_models.build(variant, dtype=dtype), some_ids(), baseline=tiny_models.build(variant))
        assert found.perplexity == pytest.approx(found.baseline_perplexity, rel=0.02)
        assert 0 < found.kl_divergence < 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["model", "baseline"])
def test_not_finite_logits_name_window_and_position(value: float, side: str) -> None:
    broken, whole, ids = (
        tiny_models.build("neox-parallel-rotary-0.25"),
        tiny_models.build("neox-parallel-rotary-0.25"),
        some_ids(),
    )
    bad = 3  # a token that `some_ids` does not draw; it stands in window 4, position 5
    ids[4 * 16 + 5] = bad
    head = broken.get_output_embeddings()

    class Head(torch.nn.Module):
        """The head, with one bad logit where the hidden state is that of the bad token."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = head(hidden)
            logits[(hidden - mark).abs().amax(-1) < 1e-4, 7] = value
            return logits

    mark = broken.gpt_neox(ids[64:80][None]).last_hidden_state[0, 5].detach()
    broken.lm_head = Head()
    models = {"model": whole, "baseline": whole, side: broken}
    with pytest.raises(DataError, match=rf"^{side}: .* window 4 of 9, position 5; "):
        measure(models["model"], ids, baseline=models["baseline"])
    measure(models["model"], ids, baseline=models["baseline"], windows=4)  # the windows before are fine


def test_overflow_in_float16_is_found() -> None:
    model = tiny_models.build("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.bias.fill_(1e5)
    with pytest.raises(DataError, match="window 0 of 9, position 0; float16"):
        measure(model.half(), some_ids())


def test_refusals() -> None:
    model, ids = tiny_models.build("opt"), some_ids()
    cases = [
        ({"ids": ids[:15]}, r"the text has 15 tokens, and one window needs 16"),
        ({"ids": ids[:0]}, r"the text has 0 tokens, and one window needs 16"),
        ({"length": 65}, r"length 65: the model has 64 positions"),
        ({"length": 1}, r"length 1: .* at least 2"),
        ({"batch_size": 0}, r"batch_size 0"),
        ({"windows": 0}, r"windows 0"),
        ({"windows": True}, r"windows True"),
        ({"ids": ids[None]}, r"expected the whole text as int64 \[N\]"),
        ({"ids": ids.float()}, r"torch.float32"),
        ({"baseline": tiny_models.opt(vocab_size=300)}, r"\[300, 320\] tokens: expected the same vocabulary"),
        ({"baseline": tiny_models.opt(max_position_embeddings=8)}, r"the baseline has 8 positions"),
    ]
    for changes, words in cases:
        with pytest.raises(UsageError, match=words):
            measure(model, **{"ids": ids, **changes})  # type: ignore[arg-type]
    for index in (-1, tiny_models.VOCABULARY):
        with pytest.raises(DataError, match=f"the id {index}"):
            measure(model, torch.cat([ids, torch.full((16,), index)]))


@pytest.mark.parametrize("task", ["base", "sequence-classification", "token-classification", "question-answering"])
@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_models_without_a_language_model_head_are_refused(variant: str, task: str) -> None:
    config = tiny_models.VARIANTS[variant]().config
    name = FAMILIES[config.model_type].model_classes.get(task)  # type: ignore[call-overload]
    if name is None:
        return
    with pytest.raises(UsageError, match="no language-model head"):
        measure(getattr(transformers, name)(config), some_ids())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_text_ids(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    spec, tokenizer = FAMILIES[model_type], make_tokenizer(model_type)
    ids = text_ids(tokenizer, TEXT, spec)
    assert ids.dtype == torch.int64
    assert len(ids) > tokenizer.model_max_length  # nothing cut, and no warning about it
    assert not caplog.records
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert (ids[0] == 2) == spec.bos_first
    assert int((ids == (spec.bos_id if spec.bos_first else tokenizer.bos_token_id)).sum()) == int(spec.bos_first)
    assert text_ids(tokenizer, "", spec).tolist() == ([2] if spec.bos_first else [])
    assert bos_rule(spec) == ("id 2 once at the start of the text" if spec.bos_first else "none added")


def test_text_ids_does_not_depend_on_whether_the_tokenizer_adds_bos() -> None:
    with_bos, without = make_tokenizer("opt"), make_tokenizer("opt", "$A")
    assert torch.equal(text_ids(with_bos, TEXT, FAMILIES["opt"]), text_ids(without, TEXT, FAMILIES["opt"]))


@pytest.mark.parametrize(
    ("model_type", "template"),
    [("opt", "{bos} $A {bos}"), ("opt", "{bos} {bos} $A"), ("gpt_neox", "{bos} $A"), ("gpt_bigcode", "$A {bos}")],
)
def test_text_ids_refuses_other_rules(model_type: str, template: str) -> None:
    with pytest.raises(DataError, match="another family's"):
        text_ids(make_tokenizer(model_type, template), TEXT, FAMILIES[model_type])


def test_text_ids_refuses_another_bos_id() -> None:
    tokenizer = make_tokenizer("opt", "$A")
    tokenizer.bos_token = "<s>"
    with pytest.raises(DataError, match="BOS has id 0, expected 2"):
        text_ids(tokenizer, TEXT, FAMILIES["opt"])
