"""The drivers of fine-tuning in evals/ run: a tiny shape, on the CPU, as the commands that their README gives."""

import json
from pathlib import Path
from typing import Any

import pytest

from evals import shared
from tests.conftest import change_json
from tests.evals.test_drivers import last_line, run

PARAMETERS_PER_RANK = 2 * (4 * (128 + 128) + 2 * (128 + 256))  # two blocks: q, k, v, out_proj; fc1, fc2


def test_finetune_speed(tmp_path: Path) -> None:
    few = ("--steps", "3", "--warm-up", "1", "--rounds", "1", "--length", "32", "--r", "4", "--threads", "1")
    report = last_line(run("finetune_speed", "tiny", *few, "--work", tmp_path / "work", "--out", tmp_path))
    ours, theirs = report["qlm"], report["peer"]
    # The same training: as many parameters, in files of the same size.
    assert ours["trainable_parameters"] == theirs["trainable_parameters"] == 4 * PARAMETERS_PER_RANK
    assert ours["adapter_bytes"] == theirs["adapter_bytes"]
    assert report["step_ratio"] == pytest.approx(ours["step_seconds"] / theirs["step_seconds"], abs=1e-3)
    assert report["peak_ratio"] == pytest.approx(ours["peak_rss_bytes"] / theirs["peak_rss_bytes"], abs=1e-3)

    kept = json.loads((tmp_path / "finetune_speed-tiny-cpu-float32.json").read_text())
    runs = {side: kept["runs"][side][0] for side in ("qlm", "peer")}
    for side, found in runs.items():
        assert len(found["steps"]) == len(found["losses"]) == 3
        assert sorted(found["steps"][1:])[0] <= report[side]["step_seconds"] <= sorted(found["steps"][1:])[1]
    # The same checkpoint and text; rows come in another order, and the adapter starts at nothing.
    assert runs["qlm"]["losses"][0] == pytest.approx(runs["peer"]["losses"][0], abs=0.5)


def test_finetune_kill(tmp_path: Path, folder_of: Any) -> None:
    """One kill, which falls into the making of the base, and what is kept of it."""
    out = tmp_path / "kill.json"
    report = last_line(run("finetune_kill", "--runs", "1", "--steps", "2", "--model", folder_of("opt"), "--out", out))
    assert json.loads(out.read_text()) == report
    (kill,) = report["moments"]
    assert (report["kills"], report["identical"], kill["different"]) == (1, 1, [])
    assert 0 <= kill["seconds"] <= report["usual_base_seconds"] + 0.01 < report["usual_seconds"]
    # Five files of the adapter, and more than the manifest and the config of the base.
    assert report["files"] > 7
    assert report["version"].startswith("qlm ")


def test_versions_follow_imports_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "qlm/__init__.py": "from qlm.everything import x\n",
        "qlm/a.py": "from qlm import b\n\ndef later():\n    from qlm.c.d import y\n",
        "qlm/b.py": "", "qlm/c/__init__.py": "", "qlm/c/d.py": "", "qlm/everything.py": "", "qlm/kernels/cpu/k.cpp": "",
        "recipe.yaml": "",
    }  # fmt: skip
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(shared, "ROOT", tmp_path)

    def version() -> str:
        shared.sources_version.cache_clear()
        return shared.sources_version(("qlm.a",), ("recipe.yaml",), ("qlm.b",))

    before, matter = version(), []
    for name in sources:
        (tmp_path / name).write_text(sources[name] + "# changed\n")
        matter += [name] * (version() != before)
        (tmp_path / name).write_text(sources[name])
    assert matter == ["qlm/a.py", "qlm/c/__init__.py", "qlm/c/d.py", "qlm/kernels/cpu/k.cpp", "recipe.yaml"]


def test_finetune_quality(tmp_path: Path, folder_of: Any) -> None:
    out, text = tmp_path / "quality.json", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {folder_of('opt')}\nquantize: {{backend: nf4}}\nadapter: {{r: 4}}\n"
        f"train: {{data: {text}, steps: 9, batch_size: 2, gradient_accumulation: 1, max_length: 32, learning_rate: 1.0e-2, warmup: 0.0}}\n"
        "output: out/elsewhere\n"
    )
    few = ("--recipes", recipe, "--text", text, "--windows", "4", "--length", "32", "--samples", "4", "--threads", "1")
    command = (*few, "--steps", "6", "--out", out)
    summary = last_line(run("finetune_quality", *command))
    (row,) = json.loads(out.read_text())["rows"]
    cells = row["cells"]
    assert row["steps"] == 6
    assert row["trainable_parameters"] == 4 * PARAMETERS_PER_RANK
    assert cells["nf4 + adapter"]["perplexity"] < 0.8 * cells["nf4"]["perplexity"]
    assert cells["float + adapter"]["perplexity"] < 0.8 * cells["float"]["perplexity"]
    ratio = cells["nf4 + adapter"]["perplexity"] / cells["float + adapter"]["perplexity"]
    assert summary["nf4_over_float"] == {"opt": pytest.approx(ratio, abs=1e-5)}
    # What the NF4 weights stand for, with the adapter in it, is the same model; the float weights are not.
    assert cells["float from nf4"]["kl"] < 0.01 * cells["float from float"]["kl"]
    assert cells["int8 from nf4"]["kl"] < cells["nf4 from nf4"]["kl"]
    for found in row["by_plain_peft"].values():
        assert found["largest_difference"] < 1e-3 < found["largest_change_by_the_adapter"]

    again = run("finetune_quality", *command)
    assert "opt: there already" in again.stdout
    assert last_line(again) == summary
    # Of other sources it is not: it is run again, and fails at what lies where it would write.
    change_json(out, rows=[{**row, "version": "qlm 0, sources 000000000000"}])
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / f"opt-{row['protocol']}").write_text("in the way")
    other = run("finetune_quality", *command, "--work", tmp_path / "work")
    assert (other.returncode, json.loads(other.stdout.splitlines()[-1])["failed"] != []) == (1, True)
    change_json(out, rows=[row])
    table = run("finetune_quality", "--out", out, "--table").stdout
    assert "| NF4 + LoRA over float + LoRA | " in table
    assert table.strip() in again.stdout
