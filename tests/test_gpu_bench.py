"""`qlm bench --device cuda`, its arithmetic on a CPU: what is counted, what is divided by what, what is refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qlm
from qlm.errors import UsageError
from qlm.gpu_bench import copy_bandwidth, gpu_bench, weight_bytes
from qlm.recipe import parse_recipe
from qlm.static_decoder import StaticDecoder
from tests import tiny_models
from tests.conftest import recipe_text

module = sys.modules["qlm.gpu_bench"]
PREFILL, STEP, COPIED = 0.25, 0.125, 1e9
LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that moves when the decoder computes."""
    now = [100.0]
    for name, seconds in (("prefill", PREFILL), ("step", STEP)):
        true = getattr(StaticDecoder, name)

        def timed(self: Any, ids: Any, true: Any = true, seconds: float = seconds) -> Any:
            now[0] += seconds
            return true(self, ids)

        monkeypatch.setattr(StaticDecoder, name, timed)
    monkeypatch.setattr(module, "copy_bandwidth", lambda device: COPIED)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))


@pytest.mark.usefixtures("clock")
def test_figures(folder_of: Callable[[str], Path]) -> None:
    found = gpu_bench(
        folder_of("opt"), prompt_tokens=7, new_tokens=5, batch=2, repeats=3, device="cpu", dtype="float32"
    )
    assert (found.model, found.batch, found.prompt_tokens, found.new_tokens, found.repeats) == ("opt", 2, 7, 5, 3)
    assert (found.prefill_ms, found.decode_ms_per_token, found.decode_tokens_per_s) == (250.0, 62.5, 16.0)
    assert found.read_gb_per_s == pytest.approx(found.weight_bytes_per_token / STEP / 1e9)
    assert found.copy_share == pytest.approx(found.weight_bytes_per_token / STEP / COPIED)
    assert (found.device, found.dtype, found.recorded, found.peak_gpu_gb) == ("cpu", "float32", False, 0.0)
    assert found.to_json()["decode_ms_per_token"] == 62.5


def test_bytes_of_a_step() -> None:
    """Tied heads are read, embeddings that are no head are not."""
    tied, untied = tiny_models.build("opt"), tiny_models.build("neox-parallel-rotary-0.25")
    everything = {id(p): p.nbytes for p in tied.parameters()}
    positions = tied.model.decoder.embed_positions.weight.nbytes
    assert weight_bytes(tied) == sum(everything.values()) + sum(b.nbytes for b in tied.buffers()) - positions
    whole = sum(t.nbytes for t in (*untied.parameters(), *untied.buffers()))
    assert weight_bytes(untied) == whole - untied.gpt_neox.embed_in.weight.nbytes


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_of_a_step_with_nf4(double_quant: bool, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """By what the files hold: codes, scales of blocks and, with double quantization, scales of scales; no tables."""
    section = {"backend": "nf4", "double_quant": double_quant}
    text = recipe_text(folder_of("opt"), tmp_path / "out", text=None, **section)
    model = qlm.load(qlm.quantize(parse_recipe(text, "r.yaml")).output, dtype=torch.float32)
    linears = {name: m.weight.numel() for name, m in tiny_models.build("opt").named_modules() if name.endswith(LINEARS)}
    assert len(linears) == 2 * len(LINEARS)
    expected = 0
    for weights in linears.values():
        scales = weights // 64
        expected += weights // 2 + (scales + 4 * -(-scales // 256) if double_quant else 4 * scales)
    floats = sum(p.nbytes for p in {id(p): p for p in model.parameters() if p.dtype == torch.float32}.values())
    assert weight_bytes(model) == expected + floats - model.model.decoder.embed_positions.weight.nbytes


def test_a_copy_takes_time() -> None:
    assert 1e7 < copy_bandwidth(torch.device("cpu"), 1) < 1e13


def test_what_does_not_fit(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=r"60 [+] 60 tokens: the model has"):
        gpu_bench(folder_of("opt"), prompt_tokens=60, new_tokens=60, device="cpu")
    with pytest.raises(UsageError, match="batch 0"):
        gpu_bench(folder_of("opt"), batch=0, device="cpu")
    with pytest.raises(UsageError, match="flash_attention_2: recorded steps need sdpa or eager"):
        gpu_bench(folder_of("opt"), device="cpu", attn_implementation="flash_attention_2")
    with pytest.raises(UsageError, match="device: 'foo'"):
        gpu_bench(folder_of("opt"), device="foo")
