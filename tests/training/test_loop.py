"""What is computed: means over tokens, schedules, precisions."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from qlm.errors import CannotCreate, QlmError, Unavailable, UsageError
from qlm.finetune import finetune, saved_step
from qlm.load import load
from qlm.training import loop as training_loop
from qlm.training.job import Job, Process, choose_precision
from tests.conftest import change_json, files_of, names_below
from tests.training.runs import SAME_SUMS, STEADY, recipe_of, stop_at, uneven


@pytest.mark.parametrize("variant", ["opt", "neox-parallel-rotary-0.25", "bigcode-multi-query"])
def test_accumulation_weighs_tokens(variant: str, copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """One row at a time, accumulated, is one large batch: loss and gradient norm, before and after the adapter has changed."""
    data, model = uneven(tmp_path), copy_of(variant, **STEADY[variant])
    settings: dict[str, Any] = dict(max_length=48, packing=False, adapter={"dropout": 0.0}, steps=3, warmup=0.0)
    small = finetune(recipe_of(model, tmp_path / "s", data, batch_size=1, gradient_accumulation=8, **settings))
    large = finetune(recipe_of(model, tmp_path / "l", data, batch_size=8, gradient_accumulation=1, **settings))
    for one, other in zip(small.metrics, large.metrics, strict=True):
        assert one["tokens"] == other["tokens"]
        for key in ("loss", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e3 * SAME_SUMS if one["step"] > 1 else 10 * SAME_SUMS)


@pytest.mark.parametrize("variant", ["opt", "bigcode-multi-query"])
def test_loss_is_the_mean_over_target_tokens(variant: str, copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """The first step's loss and the validation loss, computed here row by row from the float model: B is zero at the start."""
    data, model = uneven(tmp_path), copy_of(variant, **STEADY[variant])
    recipe = recipe_of(
        model, tmp_path / "out", data, batch_size=3, gradient_accumulation=2, max_length=48, packing=False,
        validation=str(data), steps=1, adapter={"dropout": 0.0},
    )  # fmt: skip
    result = finetune(recipe)
    job = Job.open(recipe, Process.here("cpu"))
    plain = load(model, dtype=torch.float32)

    def mean(rows: list[dict[str, Any]]) -> tuple[float, int]:
        total, count = 0.0, 0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                logits = plain(input_ids=ids).logits
            total += F.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
        return total / count, count

    before, first, after = result.metrics
    loss, count = mean(job.rows)
    assert (before["validation_loss"], before["validation_tokens"]) == (pytest.approx(loss, rel=SAME_SUMS), count)
    assert before["validation_perplexity"] == pytest.approx(math.exp(loss), rel=1e2 * SAME_SUMS)
    loss, count = mean([job.rows[number] for number in job.order])
    assert (first["loss"], first["tokens"]) == (pytest.approx(loss, rel=SAME_SUMS), count)
    assert after["step"] == 1


def test_it_learns(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder_of("opt"), tmp_path / "out", data, steps=60, validation=0.1, adapter={"r": 8})
    measured = finetune(recipe).training["validation"]
    assert measured["after"]["validation_loss"] < measured["before"]["validation_loss"] - 0.5


def test_epochs_end_with_rows_of_no_weight(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Each row counts once an epoch, also where rows do not fill the last step."""
    data = uneven(tmp_path, 7)
    recipe = recipe_of(
        folder_of("opt"), tmp_path / "out", data, steps=None, epochs=2, batch_size=4, gradient_accumulation=2,
        max_length=48, packing=False,
    )  # fmt: skip
    result = finetune(recipe)
    job = Job.open(recipe, Process.here("cpu"))
    learned = sum(len(row["input_ids"]) - 1 for row in job.rows)
    assert sum(record["tokens"] for record in result.metrics) == 2 * learned
    assert (result.steps, len(job.order), job.order.count(-1)) == (2, 16, 2)
    assert sorted(job.order[:7]) == sorted(job.order[7:14]) == list(range(7))


def test_the_schedule(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """Cosine after a linear warm-up over 20 % of 10 steps."""
    result = finetune(recipe_of(folder_of("opt"), tmp_path / "out", data, steps=10, warmup=0.2))
    wanted = [0.0, 5e-3] + [1e-2 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert [record["learning_rate"] for record in result.metrics] == pytest.approx(wanted)


def test_checkpointing_changes_nothing(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    settings = dict(adapter={"dropout": 0.2})
    for name, value in (("off", False), ("on", True)):
        finetune(recipe_of(folder_of("opt"), tmp_path / name, data, gradient_checkpointing=value, **settings))
    on, off = files_of(tmp_path / "on"), files_of(tmp_path / "off")
    assert on["adapter_model.safetensors"] == off["adapter_model.safetensors"]
    assert on["metrics.jsonl"] == off["metrics.jsonl"]


def test_bfloat16_on_a_cpu(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    results = {
        precision: finetune(recipe_of(folder_of("opt"), tmp_path / precision, data, precision=precision))
        for precision in ("float32", "bfloat16")
    }
    for one, other in zip(results["float32"].metrics, results["bfloat16"].metrics, strict=True):
        # Eight bits of mantissa.
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)
        assert one["loss"] != other["loss"]
    tensors = safetensors.torch.load_file(tmp_path / "bfloat16" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "float16"}, "train.precision: found float16 on a CPU"),
        ({"optimizer": "paged_adamw_8bit"}, "train.optimizer: found paged_adamw_8bit on cpu"),
    ],
)
def test_what_a_cpu_cannot(
    change: dict[str, Any], message: str, folder_of: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(recipe_of(folder_of("opt"), tmp_path / "out", data, **change))
    assert names_below(tmp_path) == {"data.txt"}


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_precision_by_hardware(capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda", 0)) == expected
    assert choose_precision("auto", torch.device("cpu")) == "float32"
    if expected == "float16":
        with pytest.raises(QlmError, match="no bfloat16"):
            choose_precision("bfloat16", torch.device("cuda", 0))


def test_a_trainer_without_a_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of another name would not be called, and the watchdog with it."""
    monkeypatch.delattr(transformers.Trainer, "_clip_grad_norm")
    training_loop.trainer_class.cache_clear()
    with pytest.raises(Unavailable, match="its Trainer has no _clip_grad_norm"):
        training_loop.trainer_class()


def test_a_base_of_other_settings_is_refused_with_what_differs(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    data, model = uneven(tmp_path), copy_of("opt")

    def run(**settings: Any) -> None:
        finetune(recipe_of(model, tmp_path / "out", data, quantize={"backend": "nf4", **settings}, steps=1))
        shutil.rmtree(tmp_path / "out")

    run()
    line = r"out-base \(the base of .*out\): exists already with another recipe\.quantize\.double_quant: it has False, now it is True; give another output"
    with pytest.raises(CannotCreate, match=line):
        run(double_quant=True)
    change_json(model / "config.json", vocab_size=320, activation_function="gelu")
    line = r"out-base \(the base of .*out\): exists already, and config\.json has changed since \(SHA-256 \w{12}… then, \w{12}… now\); give another"
    with pytest.raises(CannotCreate, match=line):
        run()


def test_another_number_of_threads_says_how_to_go_on(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of(folder_of("opt"), tmp_path / "out", uneven(tmp_path), quantize={"backend": "nf4"}, steps=2)
    former = torch.get_num_threads()
    words = r"with 1 thread, and this run has 2: give --threads 1, or --force to start over$"
    try:
        torch.set_num_threads(1)
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe, progress=stop_at(1))
        assert saved_step(recipe) == 1
        torch.set_num_threads(2)
        with pytest.raises(CannotCreate, match=rf"out-base \(the base of .*/out\): was made {words}"):
            finetune(recipe)
        finetune(recipe.model_copy(update={"output": str(tmp_path / "other")}))
        shutil.rmtree(tmp_path / "out-base")
        (tmp_path / "other-base").rename(tmp_path / "out-base")
        with pytest.raises(UsageError, match=rf"out\.partial: was begun {words}"):
            finetune(recipe)
    finally:
        torch.set_num_threads(former)


def test_a_foreign_output_is_refused_before_the_base_is_made(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    recipe = recipe_of(copy_of("opt"), tmp_path / "out", uneven(tmp_path), quantize={"backend": "nf4"}, steps=1)
    with pytest.raises(CannotCreate, match="out: exists already and is not an output of qlm"):
        finetune(recipe)
    assert not (tmp_path / "out-base").exists()


@pytest.mark.parametrize(
    ("optimizer", "precision", "expected"),
    [("adamw", "float32", "adamw_torch_fused"), ("adamw", "float16", "adamw_torch"), ("paged_adamw_8bit", "float16", "paged_adamw_8bit")],
)  # fmt: skip
def test_a_skipped_step_is_seen(optimizer: str, precision: str, expected: str, tmp_path: Path) -> None:
    """Fused AdamW skips a step whose gradients overflow without a word; the schedule and the log would go on."""
    recipe = recipe_of("model", tmp_path / "out", tmp_path / "data.txt")
    job: Any = SimpleNamespace(
        steps=3, optimizer=optimizer, precision=precision, checkpointing=False, validation=[], max_length=16
    )
    found = training_loop.training_arguments(recipe.train, job, Process(torch.device("cpu"), 0, 1), tmp_path)
    assert found.optim == expected


def test_the_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers takes the first."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    recipe = recipe_of("model", tmp_path / "out", tmp_path / "data.txt")
    job: Any = SimpleNamespace(
        steps=3, optimizer="adamw", precision="float32", checkpointing=False, validation=[], max_length=16
    )
    second = torch.device("cuda", 1)
    found = training_loop.training_arguments(recipe.train, job, Process(second, 0, 1), tmp_path)
    assert (found.device, chosen) == (second, [second])
