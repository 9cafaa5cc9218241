"""The set of tensors in a checkpoint against the set that its config implies: names, shapes and dtypes, nothing
missing, nothing left over.

Libraries that fill in what is missing give models with zeros or noise in them (vLLM issue 34859, GPTQModel issue 3077).
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Protocol

from qlm.checkpoint.safetensors_header import TensorInfo
from qlm.errors import DataError

SHOWN = 3


class HasTensors(Protocol):
    """What is needed of a checkpoint here."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def source(self) -> str: ...


def check_tensors(
    checkpoint: HasTensors,
    expected: Mapping[str, tuple[tuple[int, ...], frozenset[str]]],
    ignored: Iterable[str] = (),
    *,
    names: Mapping[str, TensorInfo] | None = None,
    prefix: str = "",
) -> None:
    """Compare a checkpoint's tensors with those that its config implies.

    Args:
        expected: for each name its shape (a size of -1 is any) and the dtypes that it may have, by their safetensors names.
        ignored: regular expressions (full match) of names that may be there and are not used.
        names: the tensors under the names to compare, when the caller has renamed them; `checkpoint.tensors` when left
            out.
        prefix: base-model prefix that `ignored` leaves out (`gpt_neox`).

    Raises:
        DataError: naming the first tensors that are missing, left over, or of a wrong shape or dtype, and how many
            there are.
    """
    found = checkpoint.tensors if names is None else names
    patterns = [re.compile(pattern) for pattern in ignored]
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not _is_ignored(name, patterns, prefix)]
    if missing:
        hint = ""
        if close := difflib.get_close_matches(missing[0], extra, n=1, cutoff=0.75):
            hint = f"; the checkpoint has {close[0]!r} instead"
        raise DataError(f"{checkpoint.source}: {_count(missing, 'missing')}{hint}")
    if extra:
        hint = ""
        if close := difflib.get_close_matches(extra[0], expected, n=1, cutoff=0.75):
            hint = f"; {close[0]!r} is expected"
        raise DataError(f"{checkpoint.source}: {_count(extra, 'not expected by its config')}{hint}")
    wrong: list[str] = []
    for name, (shape, dtypes) in expected.items():
        info = found[name]
        if not _fits(info.shape, shape):
            wrong.append(f"{name} has shape {list(info.shape)}, its config implies {list(shape)}")
        elif info.dtype not in dtypes:
            wrong.append(f"{name} is {info.dtype}, expected {' or '.join(sorted(dtypes))}")
    if wrong:
        more = f" (and {len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
        raise DataError(f"{checkpoint.source}: {'; '.join(wrong[:SHOWN])}{more}")


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(found) == len(expected) and all(want in (size, -1) for size, want in zip(found, expected, strict=True))


def _is_ignored(name: str, patterns: list[re.Pattern[str]], prefix: str) -> bool:
    short = name.removeprefix(prefix + ".") if prefix else name
    return any(pattern.fullmatch(name) or pattern.fullmatch(short) for pattern in patterns)


def _count(names: list[str], what: str) -> str:
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {shown}"
