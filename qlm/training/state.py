"""Checkpoints of a training run, without pickles: safetensors for tensors, JSON for the rest, a hash of each.

A checkpoint is a folder `step-00000040` of three files; it is there complete or not at all (`files.write_folder`):

    state.safetensors   trainable parameters (`model/<name>`), optimizer state (`optimizer/<name>/<key>`), torch's random states
    metrics.jsonl       the loss log up to this step
    state.json          everything else, and size and SHA-256 of the other two; `checksum` is the SHA-256 of its own text without
                        that field

The newest two are kept. One that is damaged is passed over, with one line on stderr, for the one before it. Parameters go by their
names, and optimizer state by the name of its parameter, so that nothing depends on an order. What a checkpoint belongs to (recipe,
data, base) is not recorded here: it lies in a `PartialFolder`, whose identity says so.
"""

import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from qlm.checkpoint import strict_json
from qlm.checkpoint.files import TEMPORARY, remove_tree, write_folder
from qlm.errors import DataError, ReadWriteError, UsageError

KEPT = 2
# 1 held a position in the data besides, which the step alone decides.
_FORMAT = 2
_TENSORS, _METRICS, _STATE = "state.safetensors", "metrics.jsonl", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_KEYS = frozenset(
    {"format", "step", "optimizer", "schedule", "scaler", "random", "files", "checksum"},
)


@dataclass(frozen=True)
class TrainingState:
    """All that the next step of a run depends on.

    Attributes:
        step: optimizer steps done.
        parameters: name of each trainable parameter to its value.
        optimizer: what `optimizer_state` gives.
        schedule, scaler: state dicts of the learning rate's schedule and of the loss scaler (None where there is none).
        random: what `random_state` gives.
        metrics: the records of the loss log so far, as JSON objects.
    """

    step: int
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    scaler: Mapping[str, Any] | None
    random: Mapping[str, Any]
    metrics: list[dict[str, Any]]


def metrics_lines(metrics: list[dict[str, Any]]) -> bytes:
    """One JSON object a line, keys in their own order; floats in the fewest digits that give the same double."""
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in metrics).encode()


# --- folders ----------------------------------------------------------------------------------------------------------


def save(folder: Path, state: TrainingState) -> Path:
    """Write the checkpoint of this step into `folder`, and remove all but the newest two.

    Raises:
        CannotCreate, ReadWriteError: it could not be written; nothing of it is left, and the former ones are untouched.
    """
    tensors: dict[str, Tensor] = {}
    packed = {
        key: _pack(value, prefix, tensors)
        for key, prefix, value in (
            ("optimizer", "optimizer", state.optimizer),
            ("random", "random", state.random),
            ("schedule", "schedule", state.schedule),
            ("scaler", "scaler", state.scaler),
        )
    }
    for name, value in state.parameters.items():
        tensors[f"model/{name}"] = value
    # Copies of their own: safetensors refuses tensors that share memory, and one that lies on a GPU is read back more slowly.
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    files = {_TENSORS: safetensors.torch.save(whole), _METRICS: metrics_lines(state.metrics)}
    content = {
        "format": _FORMAT,
        "step": state.step,
        **packed,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }
    files[_STATE] = strict_json.dumps({**content, "checksum": _checksum(content)})
    target = folder / f"step-{state.step:08d}"
    write_folder(target, files)
    _rotate(folder, state.step)
    return target


def _rotate(folder: Path, step: int) -> None:
    """Keep the newest two up to this step. Later ones were damaged, or this run would have gone on from them."""
    earlier = [number for number in steps(folder) if number <= step]
    for number in steps(folder):
        if number not in earlier[:KEPT]:
            remove_tree(folder / f"step-{number:08d}")


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in the folder, the newest first; they may be damaged."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((int(found[1]) for name in names if (found := _NAME.fullmatch(name))), reverse=True)


def load_newest(folder: Path) -> TrainingState | None:
    """The newest checkpoint that is whole, or None where there is none at all. One line on stderr for each that is damaged.

    Raises:
        DataError: there are checkpoints, and all of them are damaged. UsageError: the newest is of another version of qlm.
    """
    clear_unfinished(folder)
    found = steps(folder)
    for number, following in zip(found, [*found[1:], None], strict=False):
        path = folder / f"step-{number:08d}"
        try:
            return read(path)
        except (DataError, ReadWriteError) as error:
            if following is None:
                raise DataError(
                    f"{error}; no checkpoint is whole: --force starts the run over, from the beginning"
                ) from None
            logging.getLogger("qlm").warning("qlm: note: %s; going on from step %d", error, following)
    return None


def clear_unfinished(folder: Path) -> None:
    """Remove what a save left that was stopped half-way."""
    if folder.is_dir():
        for name in sorted(os.listdir(folder)):
            if name.endswith(TEMPORARY):
                remove_tree(folder / name)


def read(path: Path) -> TrainingState:
    """The checkpoint in this folder.

    Raises:
        DataError: it is damaged; says which file and how. ReadWriteError: reading failed.
        UsageError: another version of qlm wrote it, in another format.
    """
    text = _bytes(path / _STATE)
    content = strict_json.load_object(text, str(path / _STATE))
    without = {key: value for key, value in content.items() if key != "checksum"}
    if content.get("checksum") != _checksum(without) or strict_json.dumps(content) != text:
        raise DataError(f"{path / _STATE}: damaged: its content does not agree with its checksum")
    if content.get("format") != _FORMAT:
        raise UsageError(
            f"{path}: a checkpoint of format {content.get('format')}, and this version of qlm goes on from format {_FORMAT}; finish the "
            "run with the version that began it, or --force starts it over"
        )
    if content.keys() != _KEYS:
        raise DataError(f"{path / _STATE}: damaged: expected the keys {', '.join(sorted(_KEYS))}")
    data = {}
    for name in (_TENSORS, _METRICS):
        data[name] = _bytes(path / name)
        facts = {"bytes": len(data[name]), "sha256": hashlib.sha256(data[name]).hexdigest()}
        for key, value in facts.items():
            if content["files"][name][key] != value:
                raise DataError(
                    f"{path / name}: damaged: its {key} is {value}, {_STATE} says {content['files'][name][key]}"
                )
    try:
        tensors = safetensors.torch.load(data[_TENSORS])
    except SafetensorError as error:
        raise DataError(f"{path / _TENSORS}: damaged: {error}") from None
    lines = data[_METRICS].decode().splitlines()
    return TrainingState(
        step=content["step"],
        parameters={name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")},
        optimizer=_unpack(content["optimizer"], tensors),
        schedule=_unpack(content["schedule"], tensors),
        scaler=_unpack(content["scaler"], tensors),
        random=_unpack(content["random"], tensors),
        metrics=[json.loads(line) for line in lines],
    )


def _bytes(path: Path) -> bytes:
    try:
        if path.is_symlink():
            raise DataError(f"{path}: damaged: a link in the place of a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: damaged: missing") from None
    except OSError as error:
        raise ReadWriteError(f"{path}: cannot be read: {error.strerror or error}") from None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(dict(content))).hexdigest()


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON: tensors move into `tensors` and leave {"tensor": name}; {"tuple": [...]} keeps tuples apart from lists."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {str(key): _pack(inner, f"{path}/{key}", tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        inner_values = [_pack(inner, f"{path}/{number}", tensors) for number, inner in enumerate(value)]
        return {"tuple": inner_values} if isinstance(value, tuple) else inner_values
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} has no place in a checkpoint")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        if value.keys() == {"tuple"}:
            return tuple(_unpack(inner, tensors) for inner in value["tuple"])
        return {key: _unpack(inner, tensors) for key, inner in value.items()}
    return [_unpack(inner, tensors) for inner in value] if isinstance(value, list) else value


# --- what is saved ----------------------------------------------------------------------------------------------------


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name of each parameter that is trained to the parameter; under DDP without the wrapper's prefix."""
    return {
        name.removeprefix("module."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def set_parameters(model: torch.nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put the saved values into the model's trainable parameters.

    Raises:
        DataError: the names or the shapes are others.
    """
    here = trainable(model)
    for name in sorted(here.keys() ^ values.keys()):
        where = "the checkpoint lacks it" if name in here else "the model has no such trainable parameter"
        raise DataError(f"{name}: {where}; --force starts the run over")
    with torch.no_grad():
        for name, parameter in here.items():
            if parameter.shape != values[name].shape:
                raise DataError(
                    f"{name}: {list(values[name].shape)} in the checkpoint, {list(parameter.shape)} in the model"
                )
            parameter.copy_(_like(values[name], parameter))


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Settings of each group with its parameters by name, and the state of each parameter: tensors and numbers, as they are.

    Args:
        names: of the optimizer's parameters.
    """
    return {
        "groups": [
            {**{k: v for k, v in group.items() if k != "params"}, "params": [names[p] for p in group["params"]]}
            for group in optimizer.param_groups
        ],
        "state": {
            names[p]: {key: full(value) if isinstance(value, Tensor) else value for key, value in state.items()}
            for p, state in optimizer.state.items()
            if p in names
        },
    }


def set_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], saved: Mapping[str, Any]
) -> None:
    """Put a saved state back, to the byte. State that the optimizer allocates in a way of its own (paged memory) is filled, not replaced.

    Raises:
        DataError: the groups hold other parameters.
    """
    for group, former in zip(optimizer.param_groups, saved["groups"], strict=True):
        here = [names[p] for p in group["params"]]
        if here != former["params"]:
            raise DataError(
                "optimizer: the checkpoint holds other parameters than this run trains; --force starts over"
            )
        group.update({key: value for key, value in former.items() if key != "params"})
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            former = saved["state"].get(names[parameter])
            if former is None:
                continue
            # bitsandbytes' optimizers: paged state is allocated by the optimizer alone.
            allocate = getattr(optimizer, "init_state", None)
            if callable(allocate) and not optimizer.state[parameter]:
                allocate(group, parameter, number, index)
            state = optimizer.state[parameter]
            for key, value in former.items():
                known = state.get(key)
                if isinstance(known, Tensor) and isinstance(value, Tensor) and known.dtype == value.dtype:
                    known.copy_(_like(value, known))
                elif isinstance(value, Tensor):
                    # AdamW counts steps on the CPU, wherever the parameter is, unless it is fused.
                    same_shape = value.shape == parameter.shape
                    there = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
                    state[key] = _like(value, parameter) if same_shape else value.to(there, copy=True)
                else:
                    state[key] = value


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process holds a part (FSDP2's DTensor); any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if callable(gather) else tensor


def split_again(model: torch.nn.Module) -> None:
    """Take away the whole weights that FSDP2 has left in a model after a pass, so that its parameters are those that the optimizer knows."""
    for module in model.modules():
        reshard = getattr(type(module), "reshard", None)
        if callable(reshard):
            reshard(module)


def make_whole(model: torch.nn.Module) -> None:
    """Put the whole of each trained parameter in the place of this process's part. Such a model can be saved, and trained no more. Every
    process must make this call."""
    split_again(model)
    for name, parameter in trainable(model).items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(full(parameter.detach()))


def _like(value: Tensor, wanted: Any) -> Tensor:
    """`value` on the device of `wanted`, and split among the processes as that is."""
    value = value.to(wanted.device)
    if hasattr(wanted, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, wanted.device_mesh, wanted.placements)
    return value


def random_state(device: torch.device) -> dict[str, Any]:
    """State of every random generator that a step may draw from: torch's on the CPU and on this GPU, numpy's, Python's."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        **({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}),
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), next_gauss],
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Take up what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, gauss))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
