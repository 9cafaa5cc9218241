"""Adapters in the CPU engine: against the float64 reference on merged weights, and against PEFT beside the same quantized weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qlm.checkpoint.adapter import CONFIG, PREFIX, WEIGHTS, read_adapter
from qlm.engine.decoder import Decoder
from qlm.engine.engine import Engine
from qlm.engine.weights import Weights
from qlm.errors import DataError, UsageError
from qlm.kernels import cpu
from tests import tiny_models
from tests.conftest import FAMILIES
from tests.engine.conftest import exact_logits
from tests.engine.test_decoder import FLOAT, QUANTIZED, SENSITIVE, ids_of, typical, worst

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not installed")

RANK, ALPHA = 5, 7.5


def adapter_for(linears: Mapping[str, tuple[int, int]], folder: Path, **config: Any) -> Path:
    """An adapter of random matrices for the linears, path to (O, I), large enough to be seen."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for path, (O, I) in linears.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(RANK, I, generator=generator) / I**0.5
        tensors[f"{PREFIX}{path}.lora_B.weight"] = 0.05 * torch.randn(O, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    ends = sorted({path.rpartition(".")[2] for path in linears})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": ends}
    (folder / CONFIG).write_text(json.dumps({**fields, **config}))
    return folder


def linears_of(folder: Path) -> dict[str, tuple[int, int]]:
    opened = Weights.open(folder).opened
    return {path: tuple(shape) for path, shape in opened.linears.items() if any(c.isdigit() for c in path)}


def check(folder: Path, adapter: Path, exact: np.ndarray, tolerance: float, measure: Any) -> None:
    """All tokens at once, ragged prompts side by side, and token by token."""
    ids = ids_of(2)
    with Decoder(Weights.open(folder, head="float", adapter=adapter), 2, cache_dtype="float32") as decoder:
        at_once = decoder.logits([decoder.new_cache(), decoder.new_cache()], ids)
        assert measure(np.stack(at_once), exact) < tolerance
        last = decoder.step([decoder.new_cache(), decoder.new_cache()], [ids[0][:7], ids[1][:29]])
        assert measure(last, exact[[0, 1], [6, 28]]) < tolerance
        cache = decoder.new_cache()
        alone = np.concatenate([decoder.step([cache], [[token]]) for token in ids[0]])
        assert measure(alone, exact[0]) < tolerance


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_float(variant: str, float_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = float_folder(variant)
    adapter = adapter_for(linears_of(folder), tmp_path / "adapter")
    ids = torch.tensor(ids_of(2))
    merged = exact_logits(folder, ids, read_adapter(adapter).deltas())
    assert worst(merged, exact_logits(folder, ids)) > 0.1
    check(folder, adapter, merged, FLOAT, worst)


@pytest.mark.parametrize("how", ["int8", "nf4", "gptq-4", "gptq-4-act"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_quantized(variant: str, how: str, quantized_folder: Callable[..., Path], tmp_path: Path) -> None:
    backend, settings, tolerance = QUANTIZED[how]
    folder = quantized_folder(variant, backend, **settings)
    adapter = adapter_for(linears_of(folder), tmp_path / "adapter")
    exact = exact_logits(folder, torch.tensor(ids_of(2)), read_adapter(adapter).deltas())
    check(folder, adapter, exact, tolerance * SENSITIVE.get(variant, 1.0), typical)


@pytest.mark.parametrize("variant", ["opt", "neox-parallel-rotary-0.25"])
def test_some_linears_alone(variant: str, float_folder: Callable[..., Path], tmp_path: Path) -> None:
    """One of q, k and v, or one of two that share an input; the rest as it is."""
    folder = float_folder(variant)
    chosen = {path: shape for path, shape in linears_of(folder).items() if path.endswith(("k_proj", "dense_h_to_4h"))}
    adapter = adapter_for(chosen, tmp_path / "adapter")
    check(folder, adapter, exact_logits(folder, torch.tensor(ids_of(2)), read_adapter(adapter).deltas()), FLOAT, worst)


@pytest.mark.parametrize("isa", cpu.library().supported if cpu.available() else ())
def test_every_instruction_set(isa: str, float_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = float_folder("neox-parallel-rotary-0.25")
    adapter = adapter_for(linears_of(folder), tmp_path / "adapter")
    exact = exact_logits(folder, torch.tensor(ids_of(2)), read_adapter(adapter).deltas())
    try:
        cpu.library().select_isa(isa)
        check(folder, adapter, exact, FLOAT, worst)
    finally:
        cpu.library().select_isa(None)


def test_the_number_of_threads_changes_no_bit(quantized_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized_folder("opt", "int8")
    weights = Weights.open(folder, adapter=adapter_for(linears_of(folder), tmp_path / "adapter"))
    found = []
    for threads in (1, 2, 3):
        with Decoder(weights, threads) as decoder:
            found.append(decoder.logits([decoder.new_cache()], ids_of(1))[0])
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_engine_says_so(float_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = float_folder("opt")
    adapter = adapter_for(linears_of(folder), tmp_path / "adapter")
    with Engine(folder) as plain, Engine(folder, adapter=adapter) as engine:
        assert "adapter" not in plain.facts
        assert engine.facts["adapter"].startswith("the adapter has no manifest.json")
        added = sum(4 * RANK * (O + I) for O, I in linears_of(folder).values())
        assert engine.facts["bytes_per_token"] == plain.facts["bytes_per_token"] + added
        ids = np.array(ids_of(1)[0], np.int32)
        assert not np.array_equal(engine.score(ids), plain.score(ids))


def test_refuses_what_does_not_fit(float_folder: Callable[..., Path], tmp_path: Path) -> None:
    of_opt = adapter_for(linears_of(float_folder("opt")), tmp_path / "opt")
    with pytest.raises(DataError, match="which this gpt_bigcode does not have"):
        Weights.open(float_folder("bigcode-multi-query"), adapter=of_opt)
    config = json.loads((of_opt / CONFIG).read_text())
    (of_opt / CONFIG).write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    with pytest.raises((UsageError, DataError), match="sequence-classification"):
        Weights.open(float_folder("opt"), adapter=of_opt)
