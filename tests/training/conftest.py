"""A text to learn from, and a heap that is collected quickly."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest


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
