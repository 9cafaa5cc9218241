import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.kernels.interpreted import interpreter
from tests.kernels.probe import ISAS, Probe, build


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Call a function where Triton interprets its kernels on the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with interpreter() as call:
        yield call


@pytest.fixture(scope="session", params=ISAS)
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """The inner kernels of each instruction set that this CPU runs."""
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have folders of their own, in one of the session.
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "probe"
    folder.mkdir(exist_ok=True)
    return Probe(build(folder), request.param)
