"""evals/gpu_tables.py and what it is made of, on a CPU with a tiny shape: everything but the GPU's own times and memory."""

import importlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlm.backends import BACKENDS
from qlm.formats.layout import in_block
from qlm.gpu_bench import copy_bandwidth
from qlm.kernels import ops
from qlm.static_decoder import StaticDecoder
from tests.evals.test_drivers import last_line, run

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
SHAPES: dict[str, Any] = {
    "opt": "tiny",
    "gpt_neox": (
        "GPTNeoX",
        {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "gpt_bigcode": (
        "GPTBigCode",
        {"vocab_size": 320, "n_embd": 128, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0,
         "eos_token_id": 0},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def evals() -> Iterator[SimpleNamespace]:
    """The driver's modules, which find each other where the driver lies."""
    names = (
        "finetune_speed",
        "gpu_cells",
        "gpu_goals",
        "gpu_measure",
        "gpu_tables",
        "gpu_tables_page",
        "opt_page",
        "quantize_speed",
        "random_models",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "evals"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The summary of all parts, and the folder."""
    folder = tmp_path_factory.mktemp("tables")
    return last_line(run("gpu_tables", "--device", "cpu", "--shapes", "tiny", "--out", folder)), folder


def test_all_parts(everything: tuple[dict[str, Any], Path]) -> None:
    summary, folder = everything
    report = json.loads((folder / "gpu_tables-cpu.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert summary["cells"] == len(rows)
    assert summary["failed"] == [] == report["left_out"]
    measured = [row for row in rows.values() if row["ok"] is True]
    assert len(measured) == summary["ok"]
    # float by two attentions, three quantized, each by two loops, with two batches; with three lengths too float by two attentions, and
    # four frozen.
    count = {part: sum(row["part"] == part for row in measured) for part in ("goals", "inference", "training")}
    assert count == {"goals": 6, "inference": 20, "training": 36}
    for row in rows.values():
        if row["ok"] is None:
            assert row["attention"] == "flash_attention_2"
            assert "CUDA only" in row["not_run"]
        elif row["part"] == "training":
            # Random weights know nothing.
            assert row["loss"] == pytest.approx(math.log(512), abs=0.2)
            assert 0 < row["batch_ms_best"] <= row["batch_ms"]
            assert (row["base"] == "trained") == (row["weights"] == "float") == (row.get("page_batch_ms", 0) > 0)
            assert (row["base"] == "frozen") == ("gradient" in row)
        elif row["part"] == "inference":
            assert 0 < row["step_ms_best"] <= row["step_ms"]
            assert row["peak_mib"] is None
            assert (row["loop"] == "recorded") == (row.get("compared_tokens") == 8 * row["batch"])
            assert (row["attention"] == "sdpa") == (row.get("sdpa_backend") == "FLASH_ATTENTION")
            assert (row["attention"] == "sdpa") == ("sdpa_backend_of_a_step" in row)
    (run_facts,) = report["runs"]
    assert run_facts["versions"]["torch"] == torch.__version__
    assert run_facts["machine"]["kernels"]["gptq_linear"] == ops.kernel("gptq_linear", "cpu")
    goals = [goal for row in rows.values() for goal in row.get("goals", ())]
    assert len(goals) == 7
    assert [goal["met"] for goal in goals if goal["found"] is None] == [None]  # memory, which a CPU has no peak of


def test_page(everything: tuple[dict[str, Any], Path]) -> None:
    _, folder = everything
    page = (folder / "gpu_tables-cpu.md").read_text()
    assert f"torch {torch.__version__}" in page
    steps = page.partition("inference: ms a step\n\n")[2].splitlines()
    assert steps[0].split(" | ")[2:7] == ["eager", "eager, recorded", "SDPA", "SDPA, recorded", "int8"]
    assert "flash-attn" not in steps[0]
    rows = json.loads((folder / "gpu_tables-cpu.json").read_text())["rows"]
    first = next(row for row in rows if row["name"] == "inference tiny float eager growing batch 1 tokens 16")
    assert steps[2].startswith(f"| 1 | 16 | {first['step_ms']:.3g} | ")
    assert "- float, flash_attention_2: attn_implementation: " in page
    assert "| eager | SDPA | frozen float | int8 | nf4 | gptq-4bit |" in page.partition("training: ms a batch")[2]
    # Another shape than the page's.
    assert "What training is" in page
    assert "Beside" not in page


def test_a_budget_that_is_spent(everything: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    _, folder = everything
    before = (folder / "gpu_tables-cpu.json").read_text()
    (tmp_path / "gpu_tables-cpu.json").write_text(before)
    done = run(
        "gpu_tables", "--device", "cpu", "--shapes", "tiny", "--part", "training", "--seconds", "0", "--out", tmp_path
    )
    assert last_line(done)["left_out"] == 42
    assert "left out, the time being over: training tiny eager batch 1 tokens 16; " in done.stdout
    after = json.loads((tmp_path / "gpu_tables-cpu.json").read_text())
    assert after["rows"] == json.loads(before)["rows"]
    assert len(after["left_out"]) == 42


@NO_GPU
def test_without_a_gpu(
    evals: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run("gpu_tables", "--out", tmp_path)
    assert done.returncode == 69
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA GPU" in done.stderr
    monkeypatch.setattr(sys, "argv", ["quantize_speed.py", "tiny", "--device", "cuda", "--out", str(tmp_path)])
    assert evals.quantize_speed.main() == 69
    assert "no CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["finetune_speed.py", "tiny", "--device", "cuda", "--out", str(tmp_path)])
    assert evals.finetune_speed.main() == 69
    assert "no CUDA GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_a_cell_throws_is_a_row(evals: SimpleNamespace) -> None:
    cells = evals.gpu_cells

    def throwing(error: Exception, cause: Exception | None = None) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            raise error from cause

        row, code = cells.run_cell(cells.Cell("name", {"part": "training"}, measure), "cpu")
        assert code is None  # a CPU does not get lost
        assert (row.pop("name"), row.pop("part")) == ("name", "training")
        assert row.pop("seconds") >= 0
        return row

    assert throwing(ValueError("bad\nand more")) == {"ok": False, "error": "ValueError: bad"}
    assert throwing(cells.NotRun("no such package")) == {"ok": None, "not_run": "no such package"}
    full = torch.OutOfMemoryError("tried 8 GiB\nof 4")
    assert throwing(full) == {"ok": None, "not_run": "out of memory", "why": "tried 8 GiB"}
    assert throwing(RuntimeError("cannot be recorded"), full)["not_run"] == "out of memory"


def test_a_failed_cell_on_a_gpu_asks_for_another_process(
    evals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pretended GPU that answers, and on one that does not any more."""
    cells, answers = evals.gpu_cells, [True]

    def synchronize(device: str) -> None:
        if not answers[0]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def code_of(error: Exception | None, cause: Exception | None = None) -> tuple[int | None, Any]:
        def measure() -> dict[str, Any]:
            if error is not None:
                raise error from cause
            return {"ms": 1}

        row, code = cells.run_cell(cells.Cell("name", {}, measure), "cuda")
        return code, row.get("error")

    full = torch.OutOfMemoryError("full")
    assert code_of(None) == (None, None)
    assert code_of(cells.NotRun("no package")) == (None, None)
    assert code_of(full) == (None, None)
    assert code_of(RuntimeError("while recording"), full) == (cells.RENEW, None)
    assert code_of(ValueError("wrong")) == (cells.RENEW, "ValueError: wrong")
    answers[0] = False
    lost = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert code_of(None) == (cells.AGAIN, lost)
    assert code_of(full) == (cells.AGAIN, lost)
    assert code_of(ValueError("wrong")) == (cells.AGAIN, "ValueError: wrong")


def test_which_backend_sdpa_chooses(evals: SimpleNamespace) -> None:
    """torch's own choice for the arguments of the real calls: on a CPU flash for what it takes, else plain products."""
    measure, attend = evals.gpu_measure, torch.nn.functional.scaled_dot_product_attention
    q = torch.randn(1, 2, 8, 16)
    with measure.sdpa_choices() as found:
        attend(q, q, q, is_causal=True)
        attend(q, q, q, is_causal=True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            attend(q, key=q, value=q, attn_mask=torch.zeros(8, 8), scale=0.5)
    assert found == ["FLASH_ATTENTION", "MATH"]
    assert measure.chosen_by_sdpa(lambda: q @ q.mT) == "SDPA was not called"
    model = measure.Bench("cpu").model("tiny", "float", "sdpa")
    assert measure.chosen_by_sdpa(lambda: model(input_ids=torch.zeros(1, 8, dtype=torch.int64))) == "FLASH_ATTENTION"
    # A decoder whose prompt may be read by flash alone does so, and is free again afterwards.
    decoder = measure.GrowingDecoder(model, 1)
    measure.prefill_by(decoder, True)
    allowed = torch.backends.cuda.math_sdp_enabled
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(allowed()))
    decoder.prefill(torch.zeros(1, 8, dtype=torch.int64))
    decoder.step(torch.zeros(1, dtype=torch.int64))
    assert seen == [False, True]


def test_a_copy_is_timed_by_the_gpus_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretended: tensors stay on the CPU, and events say that each copy takes half a second."""
    stamps: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            stamps.append(500 * len(stamps))
            self.stamp = stamps[-1]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.stamp - self.stamp

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device: zeros(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 20, 8 << 20))
    assert copy_bandwidth(torch.device("cuda"), 3) == 2 * (1 << 20) / 0.5
    assert len(stamps) == 6


def test_results_are_merged(evals: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = evals.gpu_cells.Results(path, {"versions": 1})
    first.put({"name": "a", "ok": True, "ms": 1})
    first.put({"name": "b", "ok": True, "ms": 2})
    first.put({"name": "c", "ok": None, "not_run": "out of memory"})
    # As it was: no run of its own.
    evals.gpu_cells.Results(path, {"versions": 1}).put({"name": "d", "ok": False, "error": "E"})
    second = evals.gpu_cells.Results(path, {"versions": 2}, lambda report: f"{len(report['rows'])} rows")
    second.put({"name": "a", "ok": True, "ms": 3})
    second.put({"name": "b", "ok": None, "not_run": "no package"})
    second.put({"name": "c", "ok": True, "ms": 4})
    second.put({"name": "e", "ok": None, "not_run": "no package"})
    report = json.loads(path.read_text())
    assert report["runs"] == [{"versions": 1}, {"versions": 2}]
    assert {row["name"]: (row["run"], row.get("ms"), row["ok"]) for row in report["rows"]} == {
        "a": (1, 3, True), "b": (0, 2, True), "c": (1, 4, True), "d": (0, None, False), "e": (1, None, None)
    }  # fmt: skip
    assert (tmp_path / "results.md").read_text() == "5 rows"


def test_a_process_that_dies_is_started_again(tmp_path: Path) -> None:
    """One cell is killed, one never ends, one loses the device, one fails: the others are measured, each failure in another process."""
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(
        "import argparse, json, os, sys, time, types\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT / 'evals')!r})\n"
        "import gpu_cells as g\n"
        "g.CELL_SECONDS, g.MOST_STARTS = 2, 4\n"
        "if '--progress' not in sys.argv:\n"
        "    sys.exit(g.supervise([sys.executable, __file__]))\n"
        # All that is asked of torch here, and quicker.
        "sys.modules['torch'] = types.SimpleNamespace(OutOfMemoryError=MemoryError)\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('progress', 'after', 'why'): parser.add_argument('--' + name)\n"
        "o = parser.parse_args()\n"
        "def lose(): raise RuntimeError('an illegal memory access')\n"
        "print('process')\n"
        "codes = {'lost': g.AGAIN, 'failed': g.RENEW, 'failed too': g.RENEW}\n"
        "run = lambda cell, device: (g.run_cell(cell, device)[0], codes.get(cell.name))\n"
        "cells = [g.Cell(name, {'n': n}, measure) for n, (name, measure) in enumerate([\n"
        "    ('first', lambda: {'ms': 1}), ('killed', lambda: os.kill(os.getpid(), 9)), ('second', lambda: {'ms': 2}),\n"
        "    ('endless', lambda: time.sleep(60)), ('lost', lose), ('failed', lose), ('failed too', lose),\n"
        "    ('third', lambda: {'ms': 3})])]\n"
        f"results = g.Results(Path({str(out)!r}), {{}})\n"
        "resumption = g.Resumption.of(o)\n"
        "again = g.run_cells(cells, results, resumption, device='cpu', until=time.time() + 60, run=run,\n"
        "                    say=lambda row: print(row['name']))\n"
        "if again is not None: sys.exit(again)\n"
        "resumption.over()\n"
        "sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["first", "killed", "second", "endless", "lost", "failed", "failed too", "third"]
    # Three are lost, of which four would be too many; those that only fail are not counted.
    assert done.stdout.count("process\n") == 6
    assert [rows[name]["ms"] for name in ("first", "second", "third")] == [1, 2, 3]
    assert rows["killed"] == {
        "name": "killed", "n": 1, "ok": False, "error": "the process died: signal 9", "run": 0
    }  # fmt: skip
    assert rows["endless"]["error"] == "the process died: exit code 1, maybe after 2 s"
    assert rows["lost"]["error"] == "RuntimeError: an illegal memory access"
    assert [line for line in done.stdout.splitlines() if line in rows] == list(rows)


@pytest.mark.parametrize("weights", ["float", "int8", "nf4", "gptq-4bit", "gptq-3bit", "gptq-8bit"])
@pytest.mark.parametrize("family", SHAPES)
def test_random_models(family: str, weights: str, evals: SimpleNamespace) -> None:
    """What a backend's own decoder makes of the random tensors are weights like those of a float model."""
    torch.manual_seed(0)
    model = evals.random_models.random_model(SHAPES[family], weights, device="cpu", dtype=torch.float32)
    assert model.config.model_type == family
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    own = [module for name, module in model.named_modules() if in_block(name) and hasattr(module, "in_features")]
    assert own
    assert all((type(module) is torch.nn.Linear) == (weights == "float") for module in own)
    assert bool(model(input_ids=torch.arange(40)[None]).logits.isfinite().all())
    if weights == "float":
        found = own[0].weight.detach()
    else:
        shape = (256, 128)
        tensors, form = evals.random_models.random_tensors(weights, *shape, torch.device("cpu"), torch.float32)
        found = BACKENDS[weights.partition("-")[0]].dequantize(tensors, shape, form)
        assert found.shape == shape
    # 2^15 values: their deviation is known to half a percent. The middle of an even number of codes is half a step off zero.
    assert found.std().item() == pytest.approx(evals.random_models.STD, rel=0.02)
    assert abs(found.mean().item()) < 0.25 * evals.random_models.STD


def test_compare_finds_a_wrong_decoder(evals: SimpleNamespace) -> None:
    measure = evals.gpu_measure
    bench = measure.Bench("cpu")
    model = bench.model("tiny", "float", "sdpa")
    ids = bench.ids(model, 2, 16)
    decoder = StaticDecoder(model, 2, 32)
    facts = measure.compare(model, decoder, ids, measure.tolerance("float", "float32"))
    assert facts["compared_tokens"] == 16
    assert facts["other_greedy_tokens"] == 0

    class Forgetful(measure.GrowingDecoder):  # type: ignore[misc, name-defined]
        """Feeds each token twice."""

        def step(self, ids: torch.Tensor) -> torch.Tensor:
            super().step(ids)
            return super().step(ids)

    with pytest.raises(measure.Differs, match="token 2: logits differ"):
        measure.compare(model, Forgetful(model, 2), ids, measure.tolerance("float", "float32"))
    nan = torch.full((2, 3), float("nan"))
    assert measure.difference(nan, torch.ones(2, 3)) == float("inf")


def test_the_kept_model_is_built_once(evals: SimpleNamespace) -> None:
    bench = evals.gpu_measure.Bench("cpu")
    first = bench.model("tiny", "float", "sdpa")
    assert bench.model("tiny", "float", "eager") is first
    assert first.config._attn_implementation == "eager"
    second = bench.model("tiny", "int8", "sdpa")
    assert second is not first
    assert bench.model("tiny", "float", "sdpa") is not first


def test_all_shapes_have_the_pages_grid(evals: SimpleNamespace) -> None:
    """And the ends of it first: for all shapes before anything between them."""
    tables, bench = evals.gpu_tables, SimpleNamespace(dtype="float16")
    shapes = ["opt-350m", "pythia-1.4b", "santacoder-1.1b"]
    cells = list(tables.table_cells(bench, ["inference", "training"], shapes))
    assert len({cell.name for cell in cells}) == len(cells)
    # Four batches and four lengths, by five models in two loops and flash-attn in one; or five lengths, by seven.
    assert len(cells) == 3 * (16 * 11 + 20 * 7)
    first, rest = cells[: 3 * 4 * (11 + 7)], cells[3 * 4 * (11 + 7) :]
    longest = {"inference": 1024, "training": 2048}
    assert [cell.keys["shape"] for cell in first] == [shape for shape in shapes for _ in range(72)]
    for cell in cells:
        at_an_end = cell.keys["batch"] in (1, 8) and cell.keys["tokens"] in (128, longest[cell.keys["part"]])
        assert at_an_end == any(cell is one for one in first)
    for part, figures in (("inference", evals.opt_page.INFERENCE), ("training", evals.opt_page.TRAINING)):
        assert {(cell.keys["batch"], cell.keys["tokens"]) for cell in cells if cell.keys["part"] == part} == set(
            figures
        )
    # A model is built once for each half of a shape's part.
    models = [(cell.keys["shape"], cell.keys["part"], cell.keys["weights"], cell.keys["attention"]) for cell in rest]
    assert sum(a != b for a, b in itertools.pairwise(models)) + 1 == len(set(models))


@pytest.mark.filterwarnings("ignore:.*[Ff]lash", "ignore:Both fused")
@pytest.mark.parametrize("weights", ["float", "int8", "nf4", "gptq-4bit"])
@pytest.mark.parametrize("family", SHAPES)
def test_a_frozen_base(family: str, weights: str, evals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the embedding's output is the loss's slope; no weight gets one, and none stays frozen."""
    measure = evals.gpu_measure
    monkeypatch.setitem(
        evals.quantize_speed.SHAPES, "small", SHAPES[family] if family != "opt" else evals.quantize_speed.SHAPES["tiny"]
    )
    bench, seen, embedded = measure.Bench("cpu"), [], measure.embedded

    def kept(model: Any, ids: torch.Tensor) -> torch.Tensor:
        seen.append(embedded(model, ids))
        return seen[-1]

    monkeypatch.setattr(measure, "embedded", kept)
    with ops.float_activations():
        found = measure.measure_training(bench, "small", "sdpa", 2, 16, 1, weights=weights, base="frozen")
        assert found["gradient"] == "of the embedding's output"
        assert "page_batch_ms" not in found
        model = bench.model("small", weights, "sdpa")
        assert all(parameter.grad is None for parameter in model.parameters())
        asking = [parameter.requires_grad for name, parameter in model.named_parameters() if not in_block(name)]
        assert asking
        assert all(asking)
        # Dropout was on there and is off here: another gradient of the same kind.
        ids = bench.ids(model, 2, 16)
        x = embedded(model, ids)
        model(inputs_embeds=x, labels=ids).loss.backward()
        assert x.grad is not None
        if weights != "int8":  # whose rounded inputs make stairs of the loss
            step = 1e-2 * x.grad / x.grad.norm()
            with torch.no_grad():
                up, down = (model(inputs_embeds=x + sign * step, labels=ids).loss.double() for sign in (1, -1))
            assert (up - down).item() / 2e-2 == pytest.approx(x.grad.norm().item(), rel=0.05)
        cosine = torch.nn.functional.cosine_similarity(seen[-1].grad.flatten(), x.grad.flatten(), dim=0)
        assert cosine > 0.2


def test_a_gradient_that_does_not_arrive(evals: SimpleNamespace) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(evals.gpu_measure.Differs, match="is not there"):
        evals.gpu_measure.need_gradient(x)
    (x * float("inf")).sum().backward()
    with pytest.raises(evals.gpu_measure.Differs, match="is not finite"):
        evals.gpu_measure.need_gradient(x)


def test_the_pages_figures(evals: SimpleNamespace) -> None:
    """Its percentages are of unrounded figures: memory's agree with the others to the last digit, times of three digits nearly."""
    page = evals.opt_page
    assert len(page.TRAINING) == 20
    assert len(page.INFERENCE) == 16
    for (batch, tokens), one in (*page.TRAINING.items(), *page.INFERENCE.items()):
        if one.eager_ms is None:
            assert (one.eager_mb, one.faster, one.saved) == (None, None, None)
            assert page.TRAINING[batch, tokens // 2].sdpa_mb == one.sdpa_mb
            assert (batch, tokens) in page.REPEATED
            continue
        assert page.percent(one.eager_mb, one.sdpa_mb) == pytest.approx(one.saved, abs=0.01)
        half = 0.5 if one in page.TRAINING.values() else 0.0005
        low, high = (page.percent(one.eager_ms - s * half, one.sdpa_ms + s * half) for s in (1, -1))
        assert low - 0.01 <= one.faster <= high + 0.01
    # More tokens take no less memory.
    for table in (page.TRAINING, page.INFERENCE):
        for (batch, tokens), one in table.items():
            assert one.sdpa_mb >= table.get((batch, tokens // 2), one).sdpa_mb


def test_beside_the_page(evals: SimpleNamespace) -> None:
    common = {"shape": "opt-350m", "dtype": "float16", "weights": "float", "batch": 1, "ok": True}
    decoded = {**common, "part": "inference", "tokens": 128, "peak_mib": 1000.0}
    trained = {**common, "part": "training", "base": "trained", "tokens": 2048, "batch": 8}
    rows = [
        {**decoded, "attention": "eager", "loop": "growing", "prefill_ms": 10.0, "step_ms": 5.0},
        {**decoded, "attention": "sdpa", "loop": "growing", "prefill_ms": 8.0, "step_ms": 4.0},
        {**decoded, "attention": "sdpa", "loop": "recorded", "prefill_ms": 1.0, "step_ms": 1.0, "peak_mib": None},
        {**trained, "attention": "sdpa", "page_batch_ms": 61.0, "page_peak_mib": 8000.0, "batch_ms": 1.0, "peak_mib": 1.0},
        {**trained, "attention": "eager", "ok": None, "not_run": "out of memory"},
        # None of these is on the page.
        {**decoded, "tokens": 256, "weights": "int8", "attention": "sdpa", "loop": "growing", "prefill_ms": 1.0, "step_ms": 1.0},
        {**decoded, "tokens": 512, "dtype": "float32", "attention": "sdpa", "loop": "growing", "prefill_ms": 1.0, "step_ms": 1.0},
        {**decoded, "tokens": 1024, "shape": "pythia-1.4b", "attention": "sdpa", "loop": "growing", "prefill_ms": 1.0, "step_ms": 1.0},
    ]  # fmt: skip
    text = "\n".join(evals.opt_page.comparison(rows))
    lines = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    # (10 + 99 * 5) / 100 and so on: 5.05, 4.04 and 1; over 11.634 and 8.647.
    assert lines == [
        "| 1 | 128 | 11.6 | 8.65 | 34.5 | 5.05 | 4.04 | 1 | 25 | 0.434 | 0.467 | 0.116 |",
        "| 1 | 128 | 718 | 718 | 0 | 1049 | 1049 | - | 0 | 1.46 | 1.46 | - |",
        "| 8 | 2048 | oom | 122\\* | - | - | 61 | - | - | 0.5 |",
        "| 8 | 2048 | oom | 8821\\* | - | - | 8389 | - | - | 0.951 |",
    ]
    assert evals.opt_page.comparison(rows[5:]) == []


def test_a_finetuning_report_names_the_driver(evals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = evals.finetune_speed
    assert speed.machine_of("cpu") == {"gpu": None, "driver": None, "cuda": None}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "G")
    monkeypatch.setattr(speed, "driver_version", lambda: "580.1")
    assert speed.machine_of("cuda") == {"gpu": "G", "driver": "580.1", "cuda": torch.version.cuda}


def test_goals(evals: SimpleNamespace) -> None:
    goal = evals.gpu_goals.goal
    assert (goal("a", 1.2, 1.5, 0.8)["met"], goal("a", 1.2, 1.5, 0.8)["aim_met"]) == (True, False)
    assert (goal("a", 0.6, 0.5, 0.75, more=True)["met"], goal("a", 0.8, 0.5, 0.75, more=True)["aim_met"]) == (
        True,
        True,
    )
    assert goal("a", 0.4, 0.5, 0.75, more=True)["met"] is False
    assert goal("a", None, 0.5, 0.75)["met"] is None
    say = evals.gpu_cells.say_goal
    assert say(goal("a", 1.2, 1.5, 0.8)) == "a: found 1.2, at least 1.5, aim 0.8, met"
    assert say(goal("a", 1.6, 1.5, 0.8)).endswith("missed")
    assert say(goal("a", None, 1.5, 0.8)) == "a: found None, at least 1.5, aim 0.8, not measured"


def test_goals_of_runs_with_files(evals: SimpleNamespace) -> None:
    """They hold for one shape, whole, on a GPU."""
    whole = {
        "gpu": "G", "shape": "opt-6.7b", "samples": 128, "length": 2048, "bits": 4, "blocks": None, "minutes": 9.0, "peak_gpu_gb": 13.0
    }  # fmt: skip
    goals_of = evals.quantize_speed.goals_of
    assert [(one["goal"], one["aim"], one["met"]) for one in goals_of(whole)] == [(10, 4, True), (12, 8, False)]
    for change in ({"gpu": None}, {"blocks": 2}, {"shape": "opt-1.3b"}, {"bits": 3}, {"samples": 4}):
        assert goals_of({**whole, **change}) == []
    (one,) = evals.finetune_speed.goals_of({"gpu": "G", "shape": "pythia-1.4b", "step_ratio": 0.9})
    assert (one["goal"], one["aim"], one["met"], one["aim_met"]) == (1.0, 0.85, True, False)
    assert evals.finetune_speed.goals_of({"gpu": None, "shape": "pythia-1.4b", "step_ratio": 0.9}) == []


def test_the_page_says_what_failed(evals: SimpleNamespace) -> None:
    common = {"part": "inference", "shape": "s", "dtype": "float16", "weights": "float", "loop": "growing", "run": 0}
    rows = [
        {
            **common,
            "name": "a",
            "attention": "eager",
            "batch": 1,
            "tokens": 8,
            "ok": True,
            "step_ms": 12.345,
            "peak_mib": 1e3,
        },
        {**common, "name": "b", "attention": "eager", "batch": 2, "tokens": 8, "ok": None, "not_run": "out of memory"},
        {**common, "name": "c", "attention": "sdpa", "batch": 1, "tokens": 8, "ok": False, "error": "Differs: token 1"},
        {**common, "name": "d", "attention": "sdpa", "batch": 2, "tokens": 8, "ok": False, "error": "ValueError: x"},
    ]
    machine = {"device": "GPU", "driver": "1", "cuda": "2"}
    report = {"runs": [{"machine": machine, "versions": {"torch": "3"}}], "left_out": ["e", "f"], "rows": rows}
    page = evals.gpu_tables_page.page(report)
    assert "GPU, driver 1, CUDA 2; torch 3." in page
    assert "| 1 | 8 | 12.3 | differs |\n| 2 | 8 | oom | failed |" in page
    assert "| 1 | 8 | 1000 | differs |" in page
    assert "- d: ValueError: x" in page
    assert "2 cells" in page


def test_a_checkpoint_with_fewer_blocks(evals: SimpleNamespace, tmp_path: Path) -> None:
    path = evals.quantize_speed.write_checkpoint(tmp_path, "tiny", "cpu", 1)
    assert path.name == "tiny-1-blocks"
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 1
    whole = evals.quantize_speed.write_checkpoint(tmp_path, "tiny")
    size, all_of_it = ((p / "model.safetensors").stat().st_size for p in (path, whole))
    # Four projections of 128 x 128 and two of 128 x 256, in 16 bits, and some vectors.
    assert 2 * (4 * 128**2 + 2 * 128 * 256) < all_of_it - size < 2.2 * (4 * 128**2 + 2 * 128 * 256)
    for shape in ("gpt_neox", "gpt_bigcode"):
        assert evals.quantize_speed.config_of(SHAPES[shape], 1).num_hidden_layers == 1
