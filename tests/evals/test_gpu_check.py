"""evals/gpu_check.py: its order, its report while it grows, what becomes of a lost GPU, time that is over. What it finds is in test_drivers.py."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.models.opt.modeling_opt import OPTAttention

import qlm
from qlm.gpu_bench import gpu_bench
from qlm.kernels.ops import float_activations
from qlm.static_decoder import StaticDecoder
from tests import tiny_models
from tests.evals.test_drivers import run

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"machine": {"gpu": "G"}, "versions": {"torch": "1"}}


@pytest.fixture(scope="module")
def evals() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "evals"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("gpu_cells", "gpu_check")})


@pytest.fixture(scope="module")
def names(evals: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of all checks on a GPU."""
    checkpoints = evals.gpu_check.Checkpoints(tmp_path_factory.mktemp("checkpoints"))
    return [name for name, _ in evals.gpu_check.all_checks(checkpoints, "cuda", few=False)]


def test_a_fair_sample_comes_first(evals: SimpleNamespace, names: list[str]) -> None:
    check = evals.gpu_check
    ordered = [name for name, _ in check.in_order([(name, dict) for name in names])]
    assert sorted(ordered) == sorted(names)
    assert len(set(names)) == len(names)
    assert ordered == [name for name, _ in check.in_order([(name, dict) for name in names])]
    last = [name.startswith("kernels ") for name in ordered]
    assert last == sorted(last)
    assert any(last)
    tenth = ordered[: len(names) // 10]
    for kind in ("op int8", "op gptq", "module", "model opt", "model neox", "model bigcode", "quantize", "repeated"):
        assert any(name.startswith(kind) for name in tenth), kind
    assert {name.split()[-1] for name in tenth} >= set(check.DTYPES)


def test_the_session_names_every_check(names: list[str]) -> None:
    script = (ROOT / "evals" / "gpu_session.sh").read_text()
    texts = script.partition("\nchecks=(")[2].partition(")")[0].split('"')[1::2]
    assert [name for name in names if not any(text in name for text in texts)] == []
    assert [text for text in texts if not any(text in name for name in names)] == []
    assert all(variant.startswith(("opt", "neox", "bigcode")) for variant in tiny_models.VARIANTS)


def test_the_report_is_whole_after_every_check(evals: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report = evals.gpu_check.Report(path, FACTS, resumed=False)
    assert json.loads(path.read_text())["checks"] == []
    first = {"name": "a", "ok": True, "max_difference": 0.5, "tolerance": 1.0, "peak_mib": 3.0}
    report.put(first)
    assert json.loads(path.read_text())["checks"] == [first]
    second = {"name": "b", "ok": None, "not_run": "not run: no package"}
    # Another process goes on, after one that died.
    report = evals.gpu_check.Report(path, FACTS, resumed=True)
    report.put({"name": "c", "ok": False, "error": "the process died: signal 9"})
    report.put(second)
    report.leave_out(["d", "e"])
    found = json.loads(path.read_text())
    assert [row["name"] for row in found["checks"]] == ["a", "c", "b"]
    summary = {key: found["summary"][key] for key in ("checks", "ok", "failed", "not_run", "left_out", "peak_mib")}
    assert summary == {"checks": 3, "ok": 1, "failed": 1, "not_run": 1, "left_out": 2, "peak_mib": 3.0}
    assert (found["not_run"], found["left_out"]) == ({"not run: no package": 1}, ["d", "e"])
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text())["machine"] == FACTS["machine"]
    evals.gpu_check.Report(path, FACTS, resumed=False)
    assert json.loads(path.read_text())["checks"] == []


def test_reports_are_merged(
    evals: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    files = [tmp_path / "1.json", tmp_path / "2.json"]
    for file, names, left in zip(files, (["a", "b"], ["b", "c"]), (["c", "d"], []), strict=True):
        report = evals.gpu_check.Report(file, FACTS, resumed=False)
        for name in names:
            report.put({"name": name, "ok": True})
        report.leave_out(left)
    assert evals.gpu_check.merge(files, None) == 0
    found = json.loads((tmp_path / "out" / "gpu_check-g.json").read_text())
    assert [row["name"] for row in found["checks"]] == ["a", "b", "c"]
    assert found["left_out"] == ["d"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found["summary"]


def test_a_lost_gpu_is_a_row(evals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended GPU. A difference leaves the process as it is; a failed capture and an illegal access ask for another."""
    check, cells, answers = evals.gpu_check, evals.gpu_cells, [True]

    def ask(*device: Any) -> int:
        if not answers[0]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
        return 1 << 20

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, ask)

    def code_of(run: Any) -> tuple[dict[str, Any], int | None]:
        row, code = check.run_in_cells(run, cells.Cell("name", {}, dict), "cuda")
        assert row.pop("seconds") >= 0
        return row, code

    def throw(error: Exception) -> Any:
        def run() -> None:
            raise error

        return run

    good, code = code_of(lambda: check.Result(0.5, 1.0, {"forward": 0.25}))
    assert code is None
    assert good == {
        "name": "name", "max_difference": 0.5, "tolerance": 1.0, "ok": True, "forward": 0.25, "peak_mib": 1.0
    }  # fmt: skip
    assert code_of(lambda: check.Result(2.0, 1.0))[1] is None
    assert code_of(throw(ValueError("differs")))[1] is None
    row, code = code_of(throw(check.CaptureFailed("operation not permitted")))
    assert (row["error"], code) == ("CaptureFailed: operation not permitted", cells.RENEW)
    answers[0] = False
    for measure in (lambda: check.Result(0.5, 1.0), throw(check.NotRun("x"))):
        row, code = code_of(measure)
        assert code == cells.AGAIN
        assert row["ok"] is False
        assert row["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
        assert "peak_mib" not in row


def test_texts_and_time(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = run("gpu_check", "--device", "cpu", "--out", out, "--only", "op nf4", "op int8 60x1100", "--seconds", "0")
    summary = json.loads(done.stdout.splitlines()[-1])
    # Nothing was checked, and nothing is no success.
    assert (done.returncode, summary["checks"], summary["left_out"]) == (1, 0, 2 + 4)
    assert "6 checks left out, the time being over" in done.stdout
    report = json.loads(out.read_text())
    assert {name.split()[1] for name in report["left_out"]} == {"nf4", "int8"}


@pytest.mark.filterwarnings("ignore:.*[Ff]lash", "ignore:Both fused")
def test_flash_is_asked_of_newer_gpus_alone(evals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """And fails where SDPA needs another backend: on a CPU flash has no dropout."""
    check = evals.gpu_check
    with pytest.raises(check.NotRun, match="sm_80"):
        check.check_flash(None, "opt", "float16", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(check.NotRun, match="sm_80"):
        check.check_flash(None, "opt", "float16", "cuda")

    def model(dropout: float) -> Any:
        q, attend = torch.randn(1, 2, 8, 16), torch.nn.functional.scaled_dot_product_attention
        return lambda input_ids, use_cache: attend(q, q, q, is_causal=True, dropout_p=dropout)

    found = check.flash_alone(model(0.0), torch.zeros(1, 8))
    assert (found.difference, found.facts) == (0.0, {"sdpa_backend": "FLASH_ATTENTION"})
    with pytest.raises(ValueError, match="SDPA cannot run on flash alone: No available kernel"):
        check.flash_alone(model(0.5), torch.zeros(1, 8))


# What checks find on a CPU that plays the device ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(evals: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return evals.gpu_check.Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("backend", ["float", "int8"])
def test_text_of_wrong_steps(
    backend: str, evals: SimpleNamespace, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits wrong logits fail, tokens may differ; in float32 tokens may not."""
    check, true = evals.gpu_check, StaticDecoder.step

    def found(dtype: str) -> Any:
        return check.check_text(checkpoints, "opt", backend, dtype, "cpu")

    for dtype in ("float32", "bfloat16"):
        good = found(dtype)
        assert good.difference <= good.tolerance < 0.5, dtype
    monkeypatch.setattr(StaticDecoder, "step", lambda self, ids: true(self, ids).roll(1, -1))
    for dtype in ("float32", "bfloat16"):
        wrong = found(dtype)
        assert wrong.difference > wrong.tolerance, dtype
    # The same tokens, other logits.
    monkeypatch.setattr(StaticDecoder, "step", lambda self, ids: true(self, ids) * 1.5)
    wrong = found("bfloat16")
    assert wrong.difference > wrong.tolerance
    assert wrong.facts["tokens_differ"] < 0.2
    # They may differ only where another is nearly as likely.
    monkeypatch.setattr(StaticDecoder, "step", lambda self, ids: true(self, ids) * torch.tensor(float("nan")))
    assert found("bfloat16").difference == float("inf")


def test_decoded_tokens(evals: SimpleNamespace, checkpoints: Any) -> None:
    """Logits are those of the whole row at once, whichever tokens are given."""
    check = evals.gpu_check
    model = qlm.load(checkpoints.float_folder("opt", "causal-lm"), dtype=torch.float32)
    ids = tiny_models.token_ids(batch=2, length=12)
    given = tiny_models.token_ids(batch=2, length=check.NEW_TOKENS, seed=1)
    tokens, logits = check.decoded(StaticDecoder(model, 2, 12 + check.NEW_TOKENS), ids, given)
    assert torch.equal(tokens, given)
    with torch.no_grad():
        whole = model(torch.cat([ids, given], 1)).logits
    torch.testing.assert_close(logits, whole[:, 11:-1], atol=1e-5, rtol=0)


def test_bench_figures(evals: SimpleNamespace, checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check, module = evals.gpu_check, sys.modules["qlm.gpu_bench"]
    monkeypatch.setattr(module, "COPIED_BYTES", 1 << 20)
    good = check.check_bench(checkpoints, "float", "cpu")
    assert (good.difference, good.tolerance) == (0, 0)
    measured = gpu_bench(
        checkpoints.float_folder("opt", "causal-lm"), prompt_tokens=2, new_tokens=2, repeats=1, device="cpu"
    )
    for wrong, why in (
        ({"recorded": True}, "recorded: True"),
        ({"device": "other"}, "device: other"),
        ({"read_gb_per_s": float("nan")}, "figures: {'read_gb_per_s': nan}"),
        ({"prefill_ms": float("inf"), "weight_bytes_per_token": 0}, "figures: .*prefill_ms.*weight_bytes"),
    ):
        monkeypatch.setattr(module, "gpu_bench", lambda *a, wrong=wrong, **k: replace(measured, **wrong))
        with pytest.raises(ValueError, match=why):
            check.check_bench(checkpoints, "float", "cpu")


@pytest.mark.parametrize("backend", ["nf4", "gptq-4bit"])
def test_training(backend: str, evals: SimpleNamespace, checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained: transformers' own loss, and a gradient of every adapter. What fails: a wrong or missing gradient, a wrong loss."""
    check = evals.gpu_check
    folder = checkpoints.quantized_folder("opt", "causal-lm", backend)
    with float_activations():
        losses, gradients = check.trained(folder, "float32", "cpu")
        ids, model = tiny_models.token_ids(batch=4), qlm.load(folder, dtype=torch.float32)
        with torch.no_grad():
            assert losses[0] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-6)
        assert len(gradients) == 2 * 2 * 2 * 6  # of A and B, in two steps, two blocks of six linears
        assert all(bool(g.any()) for name, g in gradients.items() if "lora_B" in name or "step 2" in name)
        forward = OPTAttention.forward
        with mock.patch.object(OPTAttention, "forward", autospec=True, side_effect=forward) as computed:
            good = check.check_training(checkpoints, "opt", backend, "bfloat16", "cpu")
        assert 0 < good.difference <= good.tolerance
        # Two blocks in two steps, each of them again in a backward pass; and the CPU's, which keeps activations.
        assert computed.call_count == 8 + 4

    first = next(name for name in gradients if "lora_A" in name and "step 2" in name)
    for wrong, other in (
        (gradients | {first: -gradients[first]}, losses),
        (gradients | {first: torch.zeros_like(gradients[first])}, losses),
        (gradients | {first: gradients[first] * float("nan")}, losses),
        (gradients, [losses[0], losses[1] * 1.1]),
        (gradients, [float("nan"), losses[1]]),
    ):
        answers = iter([(other, wrong), (losses, gradients)])
        monkeypatch.setattr(check, "trained", lambda *a, answers=answers: next(answers))
        if other is losses:
            found = check.check_training(checkpoints, "opt", backend, "bfloat16", "cpu")
            assert found.difference > found.tolerance
            assert found.facts["of"] == first
        else:
            with pytest.raises(ValueError, match=r"apart; 0\.002 is allowed"):
                check.check_training(checkpoints, "opt", backend, "bfloat16", "cpu")


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """To the nearest of 11 bits, halves to even."""
    mantissa, exponent = torch.frexp(x.float())
    return torch.ldexp((mantissa * 2048).round() / 2048, exponent)


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU rounds of the statistics' factors, here too: one entry for each time."""
    used: list[str] = []
    true = torch.Tensor.addmm_

    @contextmanager
    def emulated(x: torch.Tensor) -> Iterator[None]:
        used.append("tf32")

        def add(self: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return true(self, rounded_to_tf32(a), rounded_to_tf32(b))

        with mock.patch.object(torch.Tensor, "addmm_", add):
            yield

    monkeypatch.setattr("qlm.stream._tf32", emulated)
    monkeypatch.setattr("qlm.kernels.cpu_ops.add_gram_", lambda *a: False)
    return used


def test_quantizing_with_tf32(
    evals: SimpleNamespace, checkpoints: Any, tf32: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is off where codes are compared. Where it is on they differ, and the KL is asked."""
    check = evals.gpu_check

    def found(how: str) -> Any:
        return check.check_quantize(checkpoints, "bigcode-multi-query", "gptq-4bit", how, "cpu")

    plain = found("float32")
    assert (plain.difference, plain.tolerance, tf32) == (0, check.CODES_DIFFER["float32"], [])
    rounded = found(check.WITH_TF32)
    assert tf32
    assert abs(rounded.difference) < 0.05
    assert rounded.tolerance == check.KL_GROWTH
    assert 0.2 < rounded.facts["codes_differ"] < check.CODES_DIFFER["calibration dtype"]

    monkeypatch.setattr(check, "kl", lambda first, second: 2.0 if "tf32" in second.name else 1.0)
    worse = found(check.WITH_TF32)
    assert worse.difference > worse.tolerance
    numbers = iter([1.0, 1.5, 0.5])
    monkeypatch.setattr(check, "kl", lambda first, second: next(numbers))
    with pytest.raises(ValueError, match="the KL from the float model grew"):
        found("float32")


def test_quantizing_in_memory(
    evals: SimpleNamespace, checkpoints: Any, tf32: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where one side loses more: 3 bits for 4."""
    check, module = evals.gpu_check, sys.modules["qlm.quantize"]
    good = check.check_quantize_model(checkpoints, "opt", "gptq-4bit", "cpu")
    assert (good.difference, good.facts["difference"], tf32) == (0, 0, [])
    true, bits = module.quantize_model, iter([3, 4])
    monkeypatch.setattr(
        module, "quantize_model", lambda model, section, rows: true(model, section | {"bits": next(bits)}, rows)
    )
    worse = check.check_quantize_model(checkpoints, "opt", "gptq-4bit", "cpu")
    assert worse.difference > 2 * worse.tolerance


def test_checkpoints_are_whole_or_not_there(
    evals: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = evals.gpu_check.Checkpoints(tmp_path)

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evals.gpu_check, "write_byte_tokenizer", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.float_folder("opt", "causal-lm")
    assert not (tmp_path / "opt.causal-lm").exists()
    assert (checkpoints.float_folder("opt", "causal-lm") / "tokenizer.json").exists()


def test_session_script(tmp_path: Path) -> None:
    """Its commands and their order, with a python that only writes down what it is told; that it parses, and what it refuses."""
    script = str(ROOT / "evals" / "gpu_session.sh")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert subprocess.run(["bash", script, "4"], capture_output=True).returncode == 2
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    fake.chmod(0o755)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("some-1", "optimum_quanto-1"):
        (wheels / f"{name}-py3-none-any.whl").write_text("")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(fake), "STATE": str(tmp_path / "state")}
    calls = {}
    for part in "123":
        (tmp_path / "calls").write_text("")
        own = {**environment, "OUT": str(tmp_path / f"out{part}")}
        done = subprocess.run(["bash", script, part, str(wheels)], capture_output=True, text=True, env=own, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"part {part} is over" in done.stdout
        calls[part] = (tmp_path / "calls").read_text()
        assert (tmp_path / f"out{part}" / f"log-{part}.txt").exists()
        # What a machine brings back.
        assert len(list((tmp_path / f"out{part}").iterdir())) <= 8
    # The machine is the same. What compiles when it is first used is in no process's way.
    assert [calls[part].count("pip install") for part in "123"] == [2, 0, 0]
    site, quanto = (line for line in calls["1"].splitlines() if "pip install" in line)
    assert site.endswith(f"/state/site {wheels}/some-1-py3-none-any.whl")
    assert quanto.endswith(f"/state/quanto {wheels}/optimum_quanto-1-py3-none-any.whl")
    assert calls["1"].count("evals/gpu_check.py") == 19
    first = [calls["1"].index(text) for text in ("tiny-opt --prompt 64", "tiny-opt --prompt The city", "--part goals")]
    assert first == sorted(first)
    assert all("--device cuda" in line for line in calls["1"].splitlines() if "checkpoints/tiny-opt" in line)
    assert "exit code 0" in (tmp_path / "out1" / "log-1.txt").read_text()
    assert "--part goals --seconds 140" in calls["1"]
    assert "finetune_speed.py pythia-1.4b --device cuda" in calls["1"]
    assert calls["2"].count("quantize_speed.py opt-6.7b --device cuda --samples 128 --length 2048") == 2
    assert "evals/gpu_check.py --device cuda --only quanto --seconds 120" in calls["2"]
    order = [calls["3"].index(text) for text in ("gpu_kernels.py", "--part inference", "--part training")]
    assert order == sorted(order)
    assert (tmp_path / "out3" / "quantize-log.txt").exists()


def test_session_on_a_cpu(tmp_path: Path) -> None:
    """The third part for real, with a tiny shape; what an earlier call left is not measured again."""
    environment = {
        "PATH": "/usr/bin:/bin", "DRY": "1", "PYTHON": sys.executable, "STATE": str(tmp_path / "state"), "OUT": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", str(ROOT / "evals" / "gpu_session.sh"), "3", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"no wheels in {tmp_path}/none" in done.stdout
    rows = json.loads((tmp_path / "gpu_tables-cpu.json").read_text())["rows"]
    assert [row["ok"] for row in rows if row["attention"] != "flash_attention_2"] == [True] * 36
    assert "part 3 is over" in (tmp_path / "log-3.txt").read_text()
