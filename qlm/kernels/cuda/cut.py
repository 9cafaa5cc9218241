"""How kernels cut a product into programs: what those of both formats have in common."""

from typing import NamedTuple

import triton


class MatmulConfig(NamedTuple):
    """How `matmul` cuts its work: a program computes `rows` x `columns` outputs, `features` in features at a step; these are
    split among programs until there are `per_sm` for each multiprocessor, or never (0)."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int
    per_sm: int


def split(steps: int, blocks: int, wanted: int) -> tuple[int, int]:
    """Steps along K dealt to as many programs as it takes to have `wanted` of them: (programs, steps of each)."""
    each = triton.cdiv(steps, max(1, min(steps, triton.cdiv(wanted, blocks))))
    return triton.cdiv(steps, each), each


def by_rows(rows: int, *configs: tuple[MatmulConfig, ...]) -> tuple[MatmulConfig, ...]:
    """Of three lists, for few, some and many rows, the one for so many."""
    few, some, many = configs
    return few if rows <= 16 else some if rows <= 64 else many
