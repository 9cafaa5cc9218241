"""Checkpoints of a run: the same bytes back, complete or absent, two kept, damage passed over, no pickles."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

from qlm.checkpoint import files, strict_json
from qlm.errors import CannotCreate, DataError, UsageError
from qlm.training import state as training_state
from qlm.training.state import TrainingState
from tests.conftest import files_of, names_below

CPU = torch.device("cpu")


class Small(nn.Module):
    """Three trained parameters, one of them 0-dimensional, and a frozen one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(5, 3), nn.Parameter(torch.tensor(0.25))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).square().sum() * self.b + self.frozen.sum()


def names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in training_state.trainable(model).items()}


def trained(steps: int = 3, seed: int = 0, **settings: object) -> tuple[Small, torch.optim.AdamW, object]:
    model = Small(seed)
    optimizer = torch.optim.AdamW(training_state.trainable(model).values(), lr=0.1, fused=True, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    step(model, optimizer, schedule, steps)
    return model, optimizer, schedule


def step(model: Small, optimizer: torch.optim.Optimizer, schedule: object, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).backward()
        optimizer.step()
        schedule.step()


def state_of(model: Small, optimizer: torch.optim.Optimizer, schedule: object, number: int = 3) -> TrainingState:
    return TrainingState(
        step=number,
        parameters={name: p.detach() for name, p in training_state.trainable(model).items()},
        optimizer=training_state.optimizer_state(optimizer, names(model)),
        schedule=schedule.state_dict(),
        scaler={"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
        random=training_state.random_state(CPU),
        metrics=[{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-30}],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


def save(folder: Path, *numbers: int) -> None:
    model, optimizer, schedule = trained()
    for number in numbers:
        training_state.save(folder, state_of(model, optimizer, schedule, number))


def test_a_run_goes_on_with_the_same_bytes(folder: Path) -> None:
    """Parameters, AdamW's state and settings, schedule and random numbers: three steps more are the same as without the detour."""
    model, optimizer, schedule = trained(weight_decay=0.1)
    training_state.save(folder, state_of(model, optimizer, schedule))
    step(model, optimizer, schedule, 3)
    numbers = torch.rand(3), numpy.random.rand(3), random.random()

    other, fresh, fresh_schedule = trained(steps=0, seed=1)
    found = training_state.load_newest(folder)
    assert found is not None
    training_state.set_parameters(other, found.parameters)
    training_state.set_optimizer_state(fresh, names(other), found.optimizer)
    fresh_schedule.load_state_dict(found.schedule)
    training_state.set_random_state(found.random, CPU)
    step(other, fresh, fresh_schedule, 3)

    assert torch.equal(numbers[0], torch.rand(3))
    assert (numbers[1] == numpy.random.rand(3)).all()
    assert numbers[2] == random.random()
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, other.state_dict()[name]), name
    wanted, have = optimizer.state_dict(), fresh.state_dict()
    assert wanted["param_groups"] == have["param_groups"]
    assert isinstance(have["param_groups"][0]["betas"], tuple)
    for number, state in wanted["state"].items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in state.items():
            assert torch.equal(value, have["state"][number][key]), (number, key)
            assert value.dtype == have["state"][number][key].dtype
    assert schedule.state_dict() == fresh_schedule.state_dict()
    assert (found.step, found.scaler["_growth_tracker"]) == (3, 3)
    assert found.metrics == [{"step": 1, "loss": 0.30000000000000004}, {"step": 2, "loss": 1e-30}]


def test_the_same_state_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    model, optimizer, schedule = trained()
    state = state_of(model, optimizer, schedule)
    first = files_of(training_state.save(folder, state))
    (tmp_path / "other").mkdir()
    assert first == files_of(training_state.save(tmp_path / "other", state))
    assert sorted(first) == ["metrics.jsonl", "state.json", "state.safetensors"]
    # Saved again, from what was read.
    found = training_state.load_newest(folder)
    assert found is not None
    assert first == files_of(training_state.save(folder, found))


def test_nothing_in_it_is_a_pickle(folder: Path) -> None:
    save(folder, 3)
    for name, data in files_of(folder / "step-00000003").items():
        assert not data.startswith((b"\x80", b"PK")), name
        if name == "state.json":
            json.loads(data)


def test_two_are_kept(folder: Path) -> None:
    save(folder, 1, 5, 12)
    assert training_state.steps(folder) == [12, 5]
    assert {path.name for path in folder.iterdir()} == {"step-00000005", "step-00000012"}
    assert training_state.steps(folder / "missing") == []


def test_a_checkpoint_of_a_later_step_does_not_outlive_one_that_was_gone_back_to(folder: Path) -> None:
    save(folder, 10, 20)
    save(folder, 15)
    assert training_state.steps(folder) == [15, 10]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "metrics.jsonl"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_one_falls_back_with_one_line(
    name: str, damage: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 10, 20)
    path = folder / "step-00000020" / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": data[:-1], "empty": b""}[damage])
    found = training_state.load_newest(folder)
    assert found is not None
    assert found.step == 10
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert str(path) in lines[0] or "state.json" in lines[0]
    assert lines[0].endswith("; going on from step 10")


def test_the_line_reaches_stderr(folder: Path) -> None:
    import subprocess
    import sys

    save(folder, 10, 20)
    (folder / "step-00000020" / "state.json").unlink()
    code = f"from pathlib import Path; from qlm.training import state as t; print(t.load_newest(Path({str(folder)!r})).step)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "10\n"
    assert done.stderr.splitlines() == [
        f"qlm: note: {folder}/step-00000020/state.json: damaged: missing; going on from step 10"
    ]


def test_all_damaged(folder: Path) -> None:
    save(folder, 10, 20)
    for path in folder.glob("*/state.json"):
        path.write_bytes(b"{}")
    with pytest.raises(DataError, match="--force starts the run over"):
        training_state.load_newest(folder)


def test_another_format_is_refused(folder: Path) -> None:
    """Whole, and by another version of qlm: it is not passed over for an older one, nor called damaged."""
    save(folder, 10, 20)
    path = folder / "step-00000020" / "state.json"
    former = {**json.loads(path.read_text("utf-8")), "format": 1, "position": {"place": 40}}
    former.pop("checksum")
    path.write_bytes(strict_json.dumps({**former, "checksum": sha256(strict_json.dumps(former)).hexdigest()}))
    with pytest.raises(
        UsageError, match=r"step-00000020: a checkpoint of format 1, .* from format 2; finish .*--force"
    ):
        training_state.load_newest(folder)


def test_none_at_all(folder: Path) -> None:
    assert training_state.load_newest(folder) is None


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the operations on the disk; fails that of number `fail`, and all after it, as a full disk does."""
    import errno

    seen = {"count": 0, "fail": -1}

    def operation(kind: str, path: Path) -> None:
        number, seen["count"] = seen["count"], seen["count"] + 1
        if kind in ("create", "write", "sync", "rename") and 0 <= seen["fail"] <= number:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files, "_operation", operation)
    return seen


@contextmanager
def noted(failures: list[str]) -> Iterator[None]:
    try:
        yield
    except CannotCreate as error:
        failures.append(str(error))
        raise


def test_a_full_disk_at_any_moment_leaves_the_former_one(
    folder: Path, tmp_path: Path, operations: dict[str, int]
) -> None:
    """Every operation of a save fails once: one line, nothing half-written, and what was there can be read."""
    model, optimizer, schedule = trained()
    training_state.save(folder, state_of(model, optimizer, schedule, 1))
    operations["count"] = 0
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    training_state.save(copy, state_of(model, optimizer, schedule, 2))
    total = operations["count"]
    assert total > 15
    failures: list[str] = []
    for number in range(total):
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
        operations.update(count=0, fail=number)
        with suppress(CannotCreate), noted(failures):
            training_state.save(copy, state_of(model, optimizer, schedule, 2))
        operations["fail"] = -1
        assert not [name for name in names_below(copy) if name.endswith(".tmp")], number
        found = training_state.load_newest(copy)
        assert found is not None
        assert found.step in (1, 2)
    assert len(failures) > 10
    assert all("No space left on device" in failure for failure in failures)


def test_killed_at_any_moment(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends at any operation, with no clean-up at all, leaves the former checkpoint or the new one."""

    class Killed(BaseException):
        pass

    model, optimizer, schedule = trained()
    training_state.save(folder, state_of(model, optimizer, schedule, 1))
    copy, seen, finished, left = tmp_path / "copy", set(), False, [0]

    def operation(kind: str, path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    for number in range(100):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        left[0] = number
        with monkeypatch.context() as patched:
            patched.setattr(files, "_operation", operation)
            patched.setattr(files.os, "unlink", dead_or(files.os.unlink, left))
            try:
                training_state.save(copy, state_of(model, optimizer, schedule, 2))
                finished = True
            except Killed:
                pass
        found = training_state.load_newest(copy)
        assert found is not None
        seen.add(found.step)
        if finished:
            break
    assert finished
    assert seen == {1, 2}


def dead_or(unlink: Callable[[Path], None], left: list[int]) -> Callable[[Path], None]:
    """A process that is gone tidies nothing up."""
    return lambda path: None if left[0] < 0 else unlink(path)


def test_another_model_is_refused(folder: Path) -> None:
    save(folder, 3)
    found = training_state.load_newest(folder)
    assert found is not None
    other = Small()
    other.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(DataError, match=r"^extra: the checkpoint lacks it"):
        training_state.set_parameters(other, found.parameters)
    other = Small()
    other.a = nn.Linear(5, 4)
    with pytest.raises(DataError, match=r"^a.weight: \[3, 5\] in the checkpoint, \[4, 5\] in the model"):
        training_state.set_parameters(other, found.parameters)
    optimizer = torch.optim.AdamW([other.b])
    with pytest.raises(DataError, match=r"^optimizer: "):
        training_state.set_optimizer_state(optimizer, names(other), found.optimizer)


def test_state_that_its_optimizer_allocates_is_filled(folder: Path) -> None:
    """As bitsandbytes' paged optimizers do: `init_state` makes the tensors, and they stay the same objects."""
    model = Small()

    class Paged(torch.optim.SGD):
        def init_state(self, group: dict, parameter: Tensor, number: int, index: int) -> None:
            self.state[parameter]["state1"] = torch.zeros(parameter.numel(), dtype=torch.uint8)
            self.state[parameter]["step"] = 0
            made.append(self.state[parameter]["state1"])

    made: list[Tensor] = []
    optimizer = Paged(training_state.trainable(model).values(), lr=0.1)
    for parameter in training_state.trainable(model).values():
        optimizer.init_state({}, parameter, 0, 0)
        optimizer.state[parameter]["state1"].fill_(7)
        optimizer.state[parameter]["step"] = 5
    saved = training_state.optimizer_state(optimizer, names(model))
    made.clear()
    fresh = Paged(training_state.trainable(model).values(), lr=0.2)
    training_state.set_optimizer_state(fresh, names(model), saved)
    assert [state["state1"] for state in fresh.state.values()] == made
    assert all(bool((tensor == 7).all()) for tensor in made)
    assert [state["step"] for state in fresh.state.values()] == [5, 5, 5]
    assert fresh.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(("fused", "place"), [(True, "meta"), (None, "cpu")])
def test_steps_are_counted_where_the_optimizer_wants_them(fused: bool | None, place: str) -> None:
    """Fused AdamW on a GPU takes its count of steps from the GPU, the other from the CPU."""
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    saved = {
        "groups": [{**optimizer.param_groups[0], "params": ["a"], "fused": fused}],
        "state": {"a": {"step": torch.tensor(5.0), "exp_avg": torch.ones(3)}},
    }
    training_state.set_optimizer_state(optimizer, {parameter: "a"}, saved)
    found = optimizer.state[parameter]
    assert (found["step"].device.type, found["exp_avg"].device.type) == (place, "meta")
