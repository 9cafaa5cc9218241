"""Tables of evals/quality.py: what may be set against what."""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "evals"))


def row(side: str, kl: float, seed: int | None = 0, version: str = "new") -> dict[str, Any]:
    return {
        "checkpoint": "tiny-opt", "side": side, "seed": seed, "version": version, "format": "int8", "who": f"qlm, {side}", "kl": kl,
        "kl_stderr": kl / 100, "perplexity": 20.0, "same_top1": 0.9, "bits_per_weight": 8.1, "bytes": 1000, "seconds": None,
    }  # fmt: skip


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    from quality_table import markdown

    return markdown(rows).splitlines()


class TestAblation:
    def test_is_over_the_seeds_that_both_have(self) -> None:
        rows = [row("qlm-best-int8", 0.002, 0), row("qlm-best-int8", 0.006, 1), row("qlm-best-int8-no-smooth", 0.003, 0)]  # fmt: skip
        assert "| no smooth | 0.00300 (1.500) |" in lines_of(rows)

    def test_of_other_sources_than_best_has_no_ratio(self) -> None:
        rows = [row("qlm-best-int8", 0.002, version="old"), row("qlm-best-int8-no-smooth", 0.003)]
        assert "| no smooth | 0.00300 |" in lines_of(rows)


def test_seeds_of_different_sources_are_marked() -> None:
    same = [row("qlm-best-int8", 0.002, 0), row("qlm-best-int8", 0.002, 1)]
    mixed = [same[0], {**same[1], "version": "old"}]
    assert not any("*:" in line for line in lines_of(same))
    assert any("0.00200 ± 0.00000*" in line for line in lines_of(mixed))
    assert any("different sources" in line for line in lines_of(mixed))


def test_figures_depend_on_what_quantizes_and_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    import quality_sides
    import shared

    asked: list[str] = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: asked.append(str(path.relative_to(shared.ROOT))) or read(path))
    shared.sources_version.cache_clear()
    quality_sides.qlm_version()
    assert {"qlm/numerics/gptq.py", "qlm/tune.py", "qlm/evaluate.py", "qlm/recipe/quantize.py", "qlm/kernels/cpu/gram.cpp"} <= {*asked}  # fmt: skip
    assert not any(name.startswith(("qlm/training/", "qlm/kernels/cuda/", "qlm/cli")) for name in asked)


def test_seconds_are_medians_over_rounds() -> None:
    from quality_seconds import ratios

    rows = [
        {"checkpoint": "tiny-opt", "format": "4bit", "side": side, "seconds": seconds}
        for side, seconds in (("qlm-fast-4bit", 2.0), ("qlm-fast-4bit", 3.0), ("qlm-fast-4bit", 9.0), ("gptqmodel-4bit", 12.0), ("qlm-best-4bit", 99.0))
    ]  # fmt: skip
    (found,) = ratios(rows)
    assert (found["preset"], found["ratio"], found["rounds"]) == ("fast", 0.25, 1)


def test_another_qlm_than_the_checkouts_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shared

    monkeypatch.setattr(shared, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=f"not from this checkout, {tmp_path}"):
        shared.use_checkout()
