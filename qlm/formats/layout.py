"""What is common to the formats: how a tensor in a file is described, and how configs name linears."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlm.errors import DataError


@dataclass(frozen=True)
class TensorLayout:
    """What a file must hold for one tensor. A size of -1 means any; `dtypes` are safetensors names; `optional` tensors
    may be absent.
    """

    shape: tuple[int, ...]
    dtypes: frozenset[str]
    optional: bool = False


def is_head(path: str) -> bool:
    """Whether a linear is the head of its task: heads, unlike all else, lie directly in the model. They stay in
    floating point.
    """
    return "." not in path


def in_block(path: str) -> bool:
    """Whether a path leads into one of the blocks: those are the only lists in these families."""
    return any(part.isdigit() for part in path.split("."))


def names_in(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of module names in a `quantization_config`; empty where there is none. Raises DataError for anything
    else.
    """
    names = config.get(key)
    if names is None:
        return []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise DataError(f"quantization_config: {key!r} is {names!r}; expected a list of module names")
    return list(names)
