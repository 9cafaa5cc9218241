"""The run: the same bytes after any interruption, nothing that is not finite goes by, means over tokens, and what is written."""

import gc
import hashlib
import json
import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from qlm import finetune as run
from qlm import training_state
from qlm.checkpoint import files, manifest
from qlm.checkpoint.adapter import read_adapter
from qlm.errors import CannotCreate, DataError, QlmError, UsageError
from qlm.finetune import FinetuneResult, finetune
from qlm.load import load
from qlm.recipe import FinetuneRecipe
from tests.conftest import command, files_of, names_below

STEPS = 40


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> Iterator[None]:
    """accelerate collects garbage at the start of every run, which with all of torch in memory takes longer than the run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def data(text_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text(text_file.read_text("utf-8")[:9000], "utf-8")
    return path


def recipe_of(model: object, output: object, data: object, adapter: Any = None, **more: Any) -> FinetuneRecipe:
    top = {key: more.pop(key) for key in ("task", "quantize", "calibration") if key in more}
    train = {
        "data": str(data), "steps": 4, "batch_size": 2, "gradient_accumulation": 1, "max_length": 16,
        "learning_rate": 1e-2, "save_every": 1000, **more,
    }  # fmt: skip
    return FinetuneRecipe.model_validate(
        {"model": str(model), "output": str(output), "train": train, "adapter": {"r": 2, **(adapter or {})}, **top}
    )


def stop_at(step: int, number: int = signal.SIGINT) -> Callable[[str, int, int], None]:
    """A progress that sends this process a signal once a step has been done."""

    def progress(what: str, done: int, total: int) -> None:
        if (what, done) == ("train", step):
            signal.raise_signal(number)

    return progress


def checkpoint_hashes(output: Path) -> dict[int, dict[str, Any]]:
    """Step to the hashes of what its checkpoint holds, read anew."""
    folder = output.with_name(output.name + ".partial") / run.CHECKPOINTS
    return {
        step: {name: hashlib.sha256(data).hexdigest() for name, data in files_of(folder / f"step-{step:08d}").items()}
        for step in training_state.steps(folder)
    }


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_stopped_at_each_of_40_steps(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """Dropout, accumulation, a schedule, rows of several passes over the data, evaluations: a run that is stopped after every single
    step holds the same parameters, AdamW state, random states and log after each as one that nobody stopped, and ends the same."""
    settings = dict(
        adapter={"dropout": 0.1}, steps=STEPS, gradient_accumulation=2, validation=0.1, evaluate_every=15, warmup=0.2
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    model = folder_of("opt")
    wanted: dict[int, Any] = {}

    def look(what: str, done: int, total: int) -> None:
        wanted.update(checkpoint_hashes(whole))

    finetune(recipe_of(model, whole, data, save_every=1, **settings), progress=look)
    # The last one is taken away with the unfinished folder, and nobody looks in between.
    assert len(wanted) >= STEPS - 1
    for step in range(1, STEPS):
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe_of(model, broken, data, **settings), progress=stop_at(step))
        found = checkpoint_hashes(broken)
        assert max(found) == step
        assert len(found) == min(step, 2)
        if step % 15:
            assert found[step] == wanted[step], step
        else:
            # A measurement is in the log before the save there, and after it here.
            assert found[step]["state.safetensors"] == wanted[step]["state.safetensors"], step
    result = finetune(recipe_of(model, broken, data, **settings))
    assert result.resumed == STEPS - 1
    assert files_of(broken) == files_of(whole)
    assert len([record for record in result.metrics if "loss" in record]) == STEPS
    assert [record["step"] for record in result.metrics if "validation_loss" in record] == [0, 15, 30, 40]


@pytest.mark.parametrize("backend", ["nf4", "int8"])
def test_quantized_bases_go_on_too(backend: str, folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    model = folder_of("neox-parallel-rotary-0.25")
    for name, step in (("whole", None), ("broken", 3)):
        recipe = recipe_of(model, tmp_path / name, data, quantize={"backend": backend}, adapter={"dropout": 0.3})
        if step is not None:
            with pytest.raises(KeyboardInterrupt):
                finetune(recipe, progress=stop_at(step))
        finetune(recipe)
    whole, broken = files_of(tmp_path / "whole"), files_of(tmp_path / "broken")
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert whole[name] == broken[name], name
    assert (tmp_path / "whole-base" / "config.json").is_file()


def test_sigterm_goes_to_whoever_handles_it_after_the_save(
    folder_of: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    class Terminated(BaseException):
        pass

    def handler(number: int, frame: object) -> None:
        raise Terminated

    recipe = recipe_of(folder_of("opt"), tmp_path / "out", data)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Terminated):
            finetune(recipe, progress=stop_at(2, signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert max(checkpoint_hashes(tmp_path / "out")) == 2
    assert finetune(recipe).resumed == 2


def test_sigterm_on_the_command_line(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """Exit code, one line, a checkpoint of the step in hand, and the same command goes on from it."""
    recipe = recipe_of(folder_of("opt"), tmp_path / "out", data, steps=100_000, save_every=5)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.model_dump_json(exclude_unset=True))
    process = command("finetune", "--quiet", file)
    folder = tmp_path / "out.partial" / run.CHECKPOINTS
    while not training_state.steps(folder):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.splitlines()[-1] == "qlm: terminated; the same command continues"
    saved = training_state.steps(folder)
    assert saved
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, progress=stop_at(saved[0] + 2))
    assert training_state.steps(folder)[0] == saved[0] + 2


def test_a_second_signal_is_not_kept() -> None:
    with run._Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_while_measuring(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """Before the first step it ends the run at once; later the run is saved, and measures when it goes on."""
    settings = dict(validation=0.2, evaluate_every=2)
    model, seen = folder_of("opt"), []

    def progress(number: int) -> Callable[[str, int, int], None]:
        def tell(what: str, done: int, total: int) -> None:
            if (what, done) == ("evaluate", 1):
                seen.append(what)
                if len(seen) == number:
                    signal.raise_signal(signal.SIGINT)

        return tell

    finetune(recipe_of(model, tmp_path / "whole", data, **settings))
    for number in (1, 2, 3):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe_of(model, tmp_path / f"broken{number}", data, **settings), progress=progress(number))
        steps = checkpoint_hashes(tmp_path / f"broken{number}")
        assert max(steps, default=0) == 2 * (number - 1)
        result = finetune(recipe_of(model, tmp_path / f"broken{number}", data, **settings))
        assert result.resumed == 2 * (number - 1)
        assert files_of(tmp_path / f"broken{number}") == files_of(tmp_path / "whole")


def test_a_finished_one_is_left_alone(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder_of("opt"), tmp_path / "out", data)
    finetune(recipe)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert finetune(recipe).resumed == 4
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    other = recipe_of(folder_of("opt"), tmp_path / "out", data, seed=1)
    with pytest.raises(CannotCreate, match="--force"):
        finetune(other)
    assert finetune(other, force=True).resumed == 0


@pytest.mark.parametrize("step", [2, 4])
def test_the_newest_checkpoint_is_damaged(
    step: int, folder_of: Callable[[str], Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune(recipe_of(folder_of("opt"), whole, data, steps=5))
    for number in (1, step):
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe_of(folder_of("opt"), broken, data, steps=5), progress=stop_at(number))
    path = tmp_path / "broken.partial" / run.CHECKPOINTS / f"step-{step:08d}" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert finetune(recipe_of(folder_of("opt"), broken, data, steps=5)).resumed == 1
    assert [record.getMessage().endswith("going on from step 1") for record in caplog.records] == [True]
    assert files_of(whole) == files_of(broken)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"learning_rate": 2e-2}, "recipe.train.learning_rate: it has 0.01, now it is 0.02"),
        ({"adapter": {"dropout": 0.5}}, "recipe.adapter.dropout: it has 0.05, now it is 0.5"),
        ({"steps": 5}, "recipe.train.steps: it has 4, now it is 5"),
        ({"gradient_accumulation": 3}, "recipe.train.gradient_accumulation: it has 1, now it is 3"),
        ("data", "inputs.data: data.txt.sha256: it has "),
        ("base", "inputs.model.safetensors.sha256: it has "),
    ],
)
def test_something_else_is_refused(
    change: Any, field: str, copy_of: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    model = copy_of("opt")
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe_of(model, tmp_path / "out", data), progress=stop_at(1))
    if change == "data":
        data.write_text(data.read_text("utf-8").replace("e", "a"), "utf-8")
    elif change == "base":
        path = model / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        finetune(recipe_of(model, tmp_path / "out", data, **(change if isinstance(change, dict) else {})))
    assert field in str(error.value)


def test_what_changes_no_byte_may_change(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe_of(folder_of("opt"), tmp_path / "out", data), progress=stop_at(1))
    assert finetune(recipe_of(folder_of("opt"), tmp_path / "out", data, save_every=1)).resumed == 1


def test_a_full_disk_at_a_save(
    folder_of: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune(recipe_of(folder_of("opt"), whole, data))

    def operation(kind: str, path: Path) -> None:
        if kind == "write" and "step-00000003" in str(path) and path.name == "state.json":
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files, "_operation", operation)
    recipe = recipe_of(folder_of("opt"), broken, data, save_every=1)
    with pytest.raises(CannotCreate, match="No space left on device"):
        finetune(recipe)
    monkeypatch.undo()
    assert sorted(checkpoint_hashes(broken)) == [1, 2]
    assert not [name for name in names_below(tmp_path / "broken.partial") if name.endswith(".tmp")]
    assert finetune(recipe).resumed == 2
    assert files_of(whole) == files_of(broken)


# --- the watchdog -----------------------------------------------------------------------------------------------------


def poison(tensor: torch.Tensor, value: float = math.nan) -> None:
    with torch.no_grad():
        # Near the start: later positions are of no row here.
        tensor.view(-1)[tensor.numel() // 16] = value


def _data(trainer: Any) -> None:
    """A row of the embedding, of a token that every row holds."""
    weight = trainer.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[trainer.job.rows[trainer.job.order[4]]["input_ids"][3], 5] = math.nan


def _named(name: str) -> Callable[[Any], None]:
    def inject(trainer: Any) -> None:
        (tensor,) = [t for n, t in trainer.model.named_parameters() if n.endswith(name)]
        poison(tensor, math.inf)

    return inject


def _gradient(trainer: Any) -> None:
    parameter = next(p for n, p in trainer.model.named_parameters() if "layers.1.fc2.lora_B" in n)
    parameter.register_hook(lambda gradient: gradient * math.nan)


def _loss(trainer: Any) -> None:
    original = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: original(*a, **k) * math.inf


def _state(key: str) -> Callable[[Any], None]:
    def inject(trainer: Any) -> None:
        parameter = next(p for n, p in trainer.model.named_parameters() if "layers.0.self_attn.v_proj.lora_A" in n)
        poison(trainer.optimizer.state[parameter][key])

    return inject


def _output(trainer: Any) -> None:
    def spoil(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * math.nan

    next(m for n, m in trainer.model.named_modules() if n.endswith("layers.1.fc1.base_layer")).register_forward_hook(
        spoil
    )


PLACES = {
    "data": (_data, "the loss is nan: .*embed_tokens.weight"),
    "position": (_named("embed_positions.weight"), "the loss is nan: .*embed_positions.weight"),
    "weight-of-the-base": (_named("layers.0.fc1.base_layer.weight"), "layers.0.fc1.base_layer.weight"),
    "bias-of-the-base": (_named("layers.1.fc2.base_layer.bias"), "layers.1.fc2.base_layer.bias"),
    "norm": (_named("layers.1.final_layer_norm.weight"), "layers.1.final_layer_norm.weight"),
    "adapter-a": (_named("layers.0.self_attn.q_proj.lora_A.default.weight"), "layers.0.self_attn.q_proj.lora_A"),
    "adapter-b": (_named("layers.1.fc1.lora_B.default.weight"), "layers.1.fc1.lora_B.default.weight"),
    "activation": (_output, "the loss is nan: output of .*layers.1.fc1.base_layer"),
    "gradient": (_gradient, "the gradient's norm is nan: .*layers.1.fc2.lora_B.default.weight"),
    "loss": (_loss, "the loss is inf"),
    "first-moment": (_state("exp_avg"), "the optimizer's state is not finite: .*v_proj.lora_A.default.weight: exp_avg"),
    "second-moment": (
        _state("exp_avg_sq"), "the optimizer's state is not finite: .*v_proj.lora_A.default.weight: exp_avg_sq",
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_finite_stops_the_run_before_the_step(
    place: str, folder_of: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected before step 3 of a run that has saved step 2: the step and the place are named, nothing was applied, and the same
    command goes on from step 2 to the end as if nothing had been."""
    inject, expected = PLACES[place]
    recipe = recipe_of(folder_of("opt"), tmp_path / "out", data, save_every=1, adapter={"dropout": 0.0})
    begin, applied = run._Trainer.begin_step, []

    def begin_step(self: Any) -> None:
        begin(self)
        if self.state.global_step == 2:
            inject(self)
            step = self.optimizer.step
            self.optimizer.step = lambda *a, **k: (applied.append(1), step(*a, **k))

    monkeypatch.setattr(run._Trainer, "begin_step", begin_step)
    with pytest.raises(DataError, match=f"^step 3: .*{expected}") as error:
        finetune(recipe)
    monkeypatch.undo()
    assert "this step was not applied, and the checkpoint of step 2 is kept" in str(error.value)
    assert applied == []
    assert max(checkpoint_hashes(tmp_path / "out")) == 2
    result = finetune(recipe)
    assert result.resumed == 2
    assert all(math.isfinite(record["loss"]) for record in result.metrics)


def test_values_that_are_not_finite_are_never_saved(
    folder_of: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong between the check and the save."""
    step = torch.optim.AdamW.step

    def spoil(self: Any, *arguments: Any, **more: Any) -> None:
        step(self, *arguments, **more)
        if self.state[self.param_groups[0]["params"][0]]["step"] == 3:
            poison(self.param_groups[0]["params"][0])

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(DataError, match=r"after 3 steps there are values that are not finite: .*lora_A"):
        finetune(recipe_of(folder_of("opt"), tmp_path / "out", data, save_every=1))
    assert max(checkpoint_hashes(tmp_path / "out")) == 2


# --- what is computed -------------------------------------------------------------------------------------------------


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def uneven(tmp_path: Path, count: int = 8) -> Path:
    """Texts of very different lengths, so that a mean of means is another number than the mean."""
    return jsonl(tmp_path / "uneven.jsonl", [{"text": "word and " * (1 + 5 * (i % 4))} for i in range(count)])


# The models' own dropout, on while training as in any training of theirs, switched off.
STEADY = {
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
    "neox-parallel-rotary-0.25": {"hidden_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0},
    "bigcode-multi-query": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
# fp32 sums in another order.
SAME_SUMS = 2e-6


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
    job = run._Job.open(recipe, str(model), run._Place.here("cpu"))
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
    job = run._Job.open(recipe, recipe.model, run._Place.here("cpu"))
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
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    assert run.choose_precision("auto", torch.device("cuda", 0)) == expected
    assert run.choose_precision("auto", torch.device("cpu")) == "float32"
    if expected == "float16":
        with pytest.raises(QlmError, match="no bfloat16"):
            run.choose_precision("bfloat16", torch.device("cuda", 0))


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_new_head_for_three_labels(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    words = ["good", "bad", "odd"]
    rows = [{"text": f"this is {words[i % 3]}" + " so" * (i % 5), "label": words[i % 3]} for i in range(24)]
    data = jsonl(tmp_path / "labels.jsonl", rows)
    recipe = recipe_of(
        folder_of("opt"), tmp_path / "out", data, task="sequence-classification", labels=words, steps=40, batch_size=8,
        max_length=32, validation=str(data),
    )  # fmt: skip
    result = finetune(recipe)
    measured = result.training["validation"]
    assert measured["after"]["validation_loss"] < measured["before"]["validation_loss"]
    assert measured["after"]["validation_accuracy"] == 1.0
    assert result.training["labels"] == words
    heads = read_adapter(tmp_path / "out").heads()
    assert {name: tuple(tensor.shape) for name, tensor in heads.items()} == {"score.weight": (3, 128)}


def test_heads_weigh_labels(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """Words with labels in rows of different lengths: four batches of 1 are one of 4."""
    variant = "neox-parallel-rotary-0.25"
    rows = [{"tokens": ["word"] * n, "labels": [j % 2 for j in range(n)]} for n in (1, 9, 2, 7)]
    data, model, records = jsonl(tmp_path / "w.jsonl", rows), copy_of(variant, **STEADY[variant]), []
    for batch in (1, 4):
        recipe = recipe_of(
            model, tmp_path / f"out{batch}", data, task="token-classification", batch_size=batch,
            gradient_accumulation=4 // batch, max_length=64, adapter={"dropout": 0.0}, steps=1,
        )  # fmt: skip
        records += finetune(recipe).metrics
    assert [record["tokens"] for record in records] == [19, 19]
    for key in ("loss", "gradient_norm"):
        assert records[0][key] == pytest.approx(records[1][key], rel=10 * SAME_SUMS)


def test_questions(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [
        {"question": "who?", "context": f"it was {n} there", "answer": n, "answer_start": 7} for n in ("Ann", "Bob")
    ]
    recipe = recipe_of(
        folder_of("opt"), tmp_path / "out", jsonl(tmp_path / "q.jsonl", rows), task="question-answering", max_length=32,
        steps=30, validation=str(tmp_path / "q.jsonl"),
    )  # fmt: skip
    measured = finetune(recipe).training["validation"]
    assert measured["after"]["validation_accuracy"] == 1.0
    assert measured["before"]["validation_tokens"] == 4


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_output(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder_of("opt"), tmp_path / "out", data, quantize={"backend": "nf4"}, validation=0.1)
    result: FinetuneResult = finetune(recipe)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json", "metrics.jsonl",
    ]  # fmt: skip
    assert not (tmp_path / "out.partial").exists()
    assert ": 3 files" in manifest.verify(tmp_path / "out")[0]
    written = manifest.read(tmp_path / "out")
    base = {path.name for path in (tmp_path / "out-base").iterdir()}
    assert set(written["base"]["files"]) <= base
    assert "model.safetensors" in written["base"]["float_files"]
    linears = 2 * 2 * (4 * (128 + 128) + 2 * (128 + 256))
    assert result.training["trainable_parameters"] == linears
    assert str(tmp_path) not in json.dumps(written)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert set(json.loads(lines[1])) == {"step", "loss", "learning_rate", "gradient_norm", "tokens"}


def test_progress(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """Every step, and beside it what a bar shows."""

    class Tell:
        def __init__(self) -> None:
            self.notes: dict[str, str] = {}
            self.seen: list[tuple[str, int, int]] = []

        def __call__(self, what: str, done: int, total: int) -> None:
            self.seen.append((what, done, total))

    tell = Tell()
    result = finetune(recipe_of(folder_of("opt"), tmp_path / "out", data), progress=tell)
    assert [(done, total) for what, done, total in tell.seen if what == "train"] == [(i, 4) for i in range(5)]
    assert re.fullmatch(r"loss \d\.\d{4}, \d+ tokens/s, peak \d+\.\d\d GB", tell.notes["train"])
    assert tell.notes["train"].startswith(f"loss {result.metrics[-1]['loss']:.4f},")


def test_tensorboard(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = finetune(recipe_of(folder_of("opt"), tmp_path / "out", data, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "out-tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([record["loss"] for record in result.metrics])


def test_an_error_before_the_first_save_leaves_nothing(
    folder_of: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run._Trainer, "begin_step", lambda self: poison(next(self.model.parameters())))
    with pytest.raises(DataError, match="no checkpoint was written yet"):
        finetune(recipe_of(folder_of("opt"), tmp_path / "out", data))
    assert names_below(tmp_path) == {"data.txt"}
