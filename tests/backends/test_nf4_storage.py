"""Packed codes held as floats (`bnb_4bit_quant_storage`), in files of bitsandbytes' and, for FSDP2, in memory: the same bytes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlm
from qlm.backends.nf4 import Nf4Backend
from qlm.backends.nf4_linear import as_bytes, hold_as
from qlm.errors import DataError
from qlm.formats import nf4
from qlm.formats.nf4 import Nf4Format
from qlm.kernels.ops import float_activations
from tests.backends.conftest import check_layout, random, same_bytes, settings_of
from tests.tiny_models import token_ids

backend = Nf4Backend()
SHAPE = (96, 192)
# Relative to the largest output: float32 sums of 192 products in another order.
TOLERANCE = 2e-6

nested_or_not = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
STORAGES = pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def theirs(weight: Tensor, double_quant: bool, storage: torch.dtype) -> dict[str, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4", quant_storage=storage)
    return {"weight": packed, **{f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}


@nested_or_not
@STORAGES
def test_what_bitsandbytes_writes(storage: torch.dtype, double_quant: bool) -> None:
    weight = random(*SHAPE)
    (made,) = backend.quantize({"fc1": weight}, None, settings_of("nf4", double_quant=double_quant))
    tensors, how = theirs(weight, double_quant, storage), Nf4Format(double_quant, "float32", name_of(storage))
    check_layout("nf4", tensors, SHAPE, how)
    assert tensors["weight"].dtype == storage
    # 8 bits of exponent are all ones too rarely in so few values of 32.
    assert storage == torch.float32 or not tensors["weight"].float().isfinite().all(), "or this would show little"
    plain = Nf4Format(double_quant, "float32")
    assert torch.equal(backend.dequantize(tensors, SHAPE, how), backend.dequantize(made.tensors, SHAPE, plain))
    state = backend.module(tensors, None, SHAPE, how, torch.float32).state_dict()
    assert same_bytes(state["weight"], made.tensors["weight"])
    arrays = {
        name: tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        for name, tensor in tensors.items()
    }
    found = nf4.unpack(arrays, SHAPE, how).weight
    assert (found.dtype, found.shape) == (np.uint8, (SHAPE[0] * SHAPE[1] // 2, 1))
    assert np.array_equal(found, made.tensors["weight"].numpy())
    assert np.shares_memory(found, arrays["weight"])


def test_configs() -> None:
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    linears = ["model.decoder.layers.0.fc1"]
    for storage in ("uint8", "bfloat16", "float16", "float32"):
        scheme = backend.read({**config, "bnb_4bit_quant_storage": storage}, linears, torch.float16)
        assert scheme == {linears[0]: Nf4Format(False, "float16", storage)}
        # qlm's own files are always bytes.
        written = backend.describe(scheme, [], torch.float16).quantization_config
        assert written is not None
        assert written["bnb_4bit_quant_storage"] == "uint8"
    for storage in ("int8", "float64", "", None, 3, ["bfloat16"]):
        with pytest.raises(DataError, match=r"^quantization_config: bnb_4bit_quant_storage is .*; qlm reads 'uint8', "):
            backend.read({**config, "bnb_4bit_quant_storage": storage}, linears, torch.float16)


def module_of(double_quant: bool) -> Any:
    (made,) = backend.quantize({"fc1": random(*SHAPE)}, None, settings_of("nf4", double_quant=double_quant))
    return backend.module(
        made.tensors, random(SHAPE[0], seed=1), SHAPE, Nf4Format(double_quant, "float32"), torch.float32
    )


@nested_or_not
@STORAGES
def test_held_as_floats(storage: torch.dtype, double_quant: bool) -> None:
    """The same memory, outputs and gradients; back again; in copies too."""
    module = module_of(double_quant)
    before, memory = copy.deepcopy(module), module.weight.data_ptr()
    hold_as(nn.Sequential(module), storage)
    assert type(module.weight) is type(before.weight)
    assert (module.weight.dtype, module.weight.data_ptr(), module.quant_storage) == (storage, memory, storage)
    assert module.weight.shape == (SHAPE[0] * SHAPE[1] // 2 // storage.itemsize, 1)
    assert same_bytes(as_bytes(module.weight.data.as_subclass(Tensor)), before.weight.data.as_subclass(Tensor))
    assert module.activation_format() == before.activation_format()
    for other in (module, copy.deepcopy(module)):
        for around in (float_activations, torch.no_grad):
            x, y = random(3, SHAPE[1], seed=2).requires_grad_(), random(3, SHAPE[1], seed=2).requires_grad_()
            with around():
                found, wanted = other(x), before(y)
            assert torch.equal(found, wanted)
            if found.requires_grad:
                found.square().sum().backward()
                wanted.square().sum().backward()
                assert x.grad is not None
                assert torch.equal(x.grad, y.grad)
    hold_as(module, torch.uint8)
    assert same_bytes(module.state_dict()["weight"], before.state_dict()["weight"])


@nested_or_not
def test_a_weight_that_has_lost_its_state(double_quant: bool) -> None:
    """As FSDP2 puts a plain parameter in the place of bitsandbytes' own, another one in each pass, and its memory comes and goes."""
    module, x = module_of(double_quant), random(3, SHAPE[1], seed=2)
    wanted = module(x)
    hold_as(module, torch.bfloat16)
    packed = module.weight.detach().as_subclass(Tensor)
    state = module.quant_state
    for fill in (packed, packed.clone()):
        module._parameters["weight"] = nn.Parameter(fill, requires_grad=False)
        assert torch.equal(module(x), wanted)
        assert torch.equal(module(x), wanted)
        with float_activations():
            close = module(x)
        assert (close - wanted).abs().max() < 0.05 * wanted.abs().max()
        assert module.quant_state is state


def test_a_folder_that_transformers_wrote(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Loaded, and run by the engine, as the same with plain bytes."""
    from transformers import BitsAndBytesConfig, OPTForCausalLM

    ids = token_ids(1, 9)
    logits, scores = [], []
    for storage in ("uint8", "bfloat16", "float32"):
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage,
            llm_int8_skip_modules=["lm_head"],
        )  # fmt: skip
        made = OPTForCausalLM.from_pretrained(folder_of("opt"), quantization_config=how, device_map="cpu")
        folder = tmp_path / storage
        made.save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes((folder_of("opt") / "tokenizer.json").read_bytes())
        model = qlm.load(folder)
        assert model.model.decoder.layers[0].fc1.weight.dtype == torch.uint8
        with torch.no_grad():
            logits.append(model(ids).logits)
        with qlm.Engine(folder) as engine:
            scores.append(engine.score(ids[0].tolist()))
    for found, score in zip(logits[1:], scores[1:], strict=True):
        assert torch.equal(found, logits[0])
        assert np.array_equal(score, scores[0])
