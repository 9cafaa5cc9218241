"""Triton's interpreter in a process of its own.

It is switched on by TRITON_INTERPRET=1 before Triton is imported, and for good: a test process in which anything has imported Triton, as
transformers does, cannot turn to it, and one that has turned cannot compile. So functions of test modules are called in another
process, one for each that runs tests.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any


def _start() -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    # The interpreter computes with numpy, which warns of every NaN; the tests mean them.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """`call(function, *arguments)`: the function's result from the other process, or what it raised, with its traceback."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=600)
