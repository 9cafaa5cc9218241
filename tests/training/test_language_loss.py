"""The loss without logits, against transformers' own and float64."""

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlm.training import language_loss
from qlm.training.data import NOT_LEARNED
from qlm.training.language_loss import summed_loss
from tests import tiny_models
from tests.conftest import FAMILIES

# fp32 sums in another order, relative to the largest value.
TOLERANCE = 2e-6


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden[:, :-1] @ weight.T
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NOT_LEARNED, reduction="sum")


def close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((found.double() - wanted.double()).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-9))


@given(
    rows=st.integers(1, 4), length=st.integers(1, 9), vocabulary=st.integers(2, 50), at_once=st.integers(1, 400),
    learned=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_value_and_gradient(rows: int, length: int, vocabulary: int, at_once: int, learned: float, seed: int) -> None:
    """In parts of any size, with any share of tokens to learn, none and all among them, against float64 in one piece."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, 6, generator=draw)
    weight = torch.randn(vocabulary, 6, generator=draw)
    labels = torch.randint(0, vocabulary, (rows, length), generator=draw)
    labels[torch.rand(rows, length, generator=draw) >= learned] = NOT_LEARNED
    exact = hidden.double().requires_grad_()
    wanted = plain(exact, weight.double(), labels)
    (3 * wanted).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_loss, "_LOGITS", at_once)
        found = summed_loss(hidden.requires_grad_(), weight, labels, torch.float32)
        (3 * found).backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert hidden.grad is not None
    assert exact.grad is not None
    assert close(hidden.grad, exact.grad, 1e-5) or not exact.grad.any()


def adapted(variant: str) -> Any:
    """With an adapter whose B is not zero."""
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(tiny_models.build(variant), peft.LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return model.eval()


@pytest.mark.parametrize("variant", FAMILIES)
def test_of_a_model(variant: str) -> None:
    """Loss and every gradient as transformers computes them; the head is itself again afterwards."""
    model, ids = adapted(variant), tiny_models.token_ids(3, 12)
    labels = ids.clone()
    labels[0, :7] = NOT_LEARNED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    other = copy.deepcopy(model)
    count = int(labels[:, 1:].ne(NOT_LEARNED).sum())
    wanted = other(**batch).loss
    wanted.backward()
    found = language_loss.language_loss(model, batch, torch.float32) / count
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=TOLERANCE)
    theirs = dict(other.named_parameters())
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned
    for name, parameter in learned.items():
        assert close(parameter.grad, theirs[name].grad, 20 * TOLERANCE), name
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_the_head_comes_back_after_an_error() -> None:
    model, ids = adapted(FAMILIES[0]), tiny_models.token_ids(1, 4)
    with pytest.raises(RuntimeError):
        language_loss.language_loss(model, {"input_ids": ids.float() + 0.5, "labels": ids}, torch.float32)
    assert model(input_ids=ids).logits.shape[-1] == model.config.vocab_size


def test_in_bfloat16() -> None:
    """Products alone are rounded: to 2^-9 of the logits, a percent of the gradient."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 30, 16), torch.randn(40, 16)
    labels = torch.randint(0, 40, (2, 30))
    found, wanted = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = summed_loss(found, weight, labels, torch.bfloat16)
    loss.backward()
    plain(wanted, weight, labels).backward()
    assert loss.dtype == torch.float32
    assert found.grad is not None
    assert wanted.grad is not None
    assert found.grad.dtype == torch.float32
    assert close(found.grad, wanted.grad, 0.02)
    assert not close(found.grad, wanted.grad, 1e-5)


def test_memory_is_that_of_a_part() -> None:
    """Logits of 256 x 5000 in parts of 32 rows: the largest buffer that is asked for is one part's."""
    hidden, weight = torch.randn(1, 257, 8), torch.randn(5000, 8)
    labels = torch.randint(0, 5000, (1, 257))
    with pytest.MonkeyPatch.context() as patch, torch.profiler.profile(profile_memory=True) as profile:
        patch.setattr(language_loss, "_LOGITS", 32 * 5000)
        summed_loss(hidden.requires_grad_(), weight, labels, torch.float32).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 4 * 32 * 5000 <= largest <= 2 * 4 * 32 * 5000
    assert language_loss.logits_bytes(256, 5000, torch.float32) >= 256 * 5000 * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    hidden = torch.randn(1, 8, 4)
    hidden[0, 3, 1] = value
    loss = summed_loss(hidden, torch.randn(9, 4), torch.arange(8)[None], torch.float32)
    assert not loss.isfinite()


def test_a_head_whose_weight_is_there_only_while_it_runs() -> None:
    """As FSDP2 has it: before and after the head is called, its weight is this process's part."""
    model, ids = adapted(FAMILIES[0]), tiny_models.token_ids(2, 6)
    batch = {"input_ids": ids, "labels": ids}
    wanted = language_loss.language_loss(model, batch, torch.float32)
    head = model.get_output_embeddings()
    whole, part = head.weight, torch.nn.Parameter(torch.full_like(head.weight, torch.nan), requires_grad=False)
    head.weight = part
    head.register_forward_pre_hook(lambda module, args: setattr(module, "weight", whole))
    head.register_forward_hook(lambda module, args, output: setattr(module, "weight", part))
    found = language_loss.language_loss(model, batch, torch.float32)
    assert head.weight is part
    assert found.item() == pytest.approx(wanted.item(), rel=TOLERANCE)
    found.backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if "lora" in name)
