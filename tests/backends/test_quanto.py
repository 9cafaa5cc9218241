"""quanto: what its own quantize and freeze store, bit for bit; its map; rows that its arithmetic cannot hold."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from qlm.backends.quanto import QUANTO_NAMES, QuantoBackend, QuantoFormat
from qlm.errors import DataError
from qlm.formats import QUANTO_MAP
from tests.backends.conftest import check_gradients, check_layout, random, same_bytes, settings_of

quanto = pytest.importorskip("optimum.quanto")

backend = QuantoBackend()
SHAPE = (96, 256)
# Relative to the largest output: float32 sums of 256 products in another order.
TOLERANCE = 2e-6

QTYPES = pytest.mark.parametrize("qtype", list(QUANTO_NAMES))


@QTYPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_are_quantos(qtype: str, dtype: torch.dtype) -> None:
    weight = random(*SHAPE, dtype=dtype)
    (made,) = backend.quantize({"fc1": weight}, None, settings_of("quanto", qtype=qtype))
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=dtype))
    model[0].weight.data.copy_(weight)
    quanto.quantize(model, weights=quanto.qtypes[QUANTO_NAMES[qtype]])
    quanto.freeze(model)
    expected = model[0].state_dict()
    assert set(made.tensors) == set(expected)
    for name, tensor in expected.items():
        assert same_bytes(made.tensors[name], tensor), name
    check_layout("quanto", made.tensors, SHAPE, QuantoFormat(qtype))
    x = random(5, SHAPE[1], dtype=dtype)
    module = backend.module(made.tensors, None, SHAPE, QuantoFormat(qtype), dtype)
    with torch.no_grad():
        assert torch.equal(module(x), model[0](x))


@QTYPES
def test_forward_gradient_and_state(qtype: str) -> None:
    (made,) = backend.quantize({"fc1": random(*SHAPE)}, None, settings_of("quanto", qtype=qtype))
    how, bias = QuantoFormat(qtype), random(SHAPE[0], seed=1)
    back = backend.dequantize(made.tensors, SHAPE, how)
    module = backend.module(made.tensors, bias, SHAPE, how, torch.float32).eval()
    x = random(5, SHAPE[1], seed=2)
    expected = linear(x.double(), back.double(), bias.double())
    assert ((module(x).double() - expected).abs().max() / expected.abs().max()) < TOLERANCE
    for name, tensor in made.tensors.items():
        assert same_bytes(module.state_dict()[name], tensor), name
    check_gradients(module, back, SHAPE[1])


@QTYPES
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-30])
def test_no_silent_nan(qtype: str, size: float) -> None:
    weight = random(*SHAPE)
    weight[3:9] *= size
    try:
        (made,) = backend.quantize({"layers.0.fc1": weight}, None, settings_of("quanto", qtype=qtype))
    except DataError as error:
        assert "layers.0.fc1" in str(error)  # noqa: PT017
    else:
        assert backend.dequantize(made.tensors, SHAPE, QuantoFormat(qtype)).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_names_its_layer(value: float) -> None:
    weight = random(*SHAPE)
    weight[5, 7] = value
    with pytest.raises(DataError, match=r"^layers\.0\.fc2\.weight: "):
        backend.quantize({"layers.0.fc2": weight}, None, settings_of("quanto"))


LINEARS = ["model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2", "lm_head"]


@QTYPES
def test_describe_and_read(qtype: str) -> None:
    scheme = {LINEARS[0]: QuantoFormat(qtype)}
    description = backend.describe(scheme, LINEARS[1:], torch.float16)
    assert description.quantization_config is None
    assert backend.read(description.files[QUANTO_MAP], LINEARS, torch.float16) == scheme


@pytest.mark.parametrize(
    "config",
    [{"other.fc1": {"weights": "qint8"}}, {LINEARS[0]: None}, {LINEARS[0]: {"weights": "qint2"}}, {LINEARS[0]: {"weights": ["qint8"]}},
     {LINEARS[0]: {"weights": "qint8", "activations": "qint8"}}, {LINEARS[0]: "qint8"}],
    ids=str,
)  # fmt: skip
def test_other_maps_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=QUANTO_MAP):
        backend.read(config, LINEARS, torch.float16)
