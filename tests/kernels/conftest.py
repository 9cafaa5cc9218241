import pytest

from tests.kernels.probe import ISAS, Probe, build


@pytest.fixture(scope="session", params=ISAS)
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """The inner kernels of each instruction set that this CPU runs."""
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have folders of their own, in one of the session.
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "probe"
    folder.mkdir(exist_ok=True)
    return Probe(build(folder), request.param)
