"""Models of a real shape with random weights, float or quantized, made where they run: no file, no calibration, in seconds.

Speed and memory do not depend on the weights' values, so codes are drawn as they will be stored, with scales that make of them weights of
about N(0, 0.02), as initialised models have them. Nothing can be said about quality here.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from quantize_speed import config_of
from torch import Tensor, nn

STD = 0.02
GROUP_SIZE = 128
# What `random_model` makes of the linears in blocks, by name.
WEIGHTS = ("float", "int8", "nf4", "gptq-4bit", "gptq-3bit", "gptq-8bit")


def random_bytes(count: int, device: torch.device) -> Tensor:
    """uint8 [count]."""
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)


def random_tensors(
    weights: str, O: int, I: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Any]:
    """What a file would hold of a linear [O, I], and its format."""
    if weights == "int8":
        from qlm.formats.int8 import Int8Format

        codes = torch.randint(-127, 128, (O, I), dtype=torch.int8, device=device)
        # Evenly distributed over 255 values.
        scale = torch.full((O, 1), STD * math.sqrt(12) / 255, device=device)
        return {"weight": codes, "weight_scale": scale}, Int8Format()
    if weights == "nf4":
        from qlm.backends.nf4 import pack_state, torch_name
        from qlm.formats.nf4 import BLOCK, STATE, Nf4Format
        from qlm.numerics.nf4 import codebook

        levels = codebook()
        absmax = torch.full((O * I // BLOCK,), STD / levels.square().mean().sqrt().item(), device=device)
        name = torch_name(dtype)
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": name, "shape": [O, I]}
        return {
            "weight": random_bytes(O * I // 2, device).view(-1, 1), "weight.absmax": absmax,
            "weight.quant_map": levels.to(device), STATE: pack_state(state),
        }, Nf4Format(double_quant=False, dtype=name)  # fmt: skip
    from qlm.formats.gptq import GptqFormat
    from qlm.numerics.packing import encode_zero_points

    bits = int(weights.removeprefix("gptq-").removesuffix("bit"))
    groups, middle = I // GROUP_SIZE, 2 ** (bits - 1)
    return {
        "qweight": random_bytes(I * bits // 8 * O, device).view(torch.int32).view(I * bits // 32, O),
        "qzeros": encode_zero_points(torch.full((groups, O), middle, dtype=torch.int32, device=device), bits),
        "scales": torch.full((groups, O), STD * math.sqrt(12 / (4**bits - 1)), dtype=torch.float16, device=device),
        "g_idx": torch.arange(I, dtype=torch.int32, device=device) // GROUP_SIZE,
    }, GptqFormat(bits, GROUP_SIZE)  # fmt: skip


def random_quantized(model: Any, weights: str, device: torch.device, dtype: torch.dtype) -> None:
    """Put random quantized linears, on the device, in the place of all linears of the blocks, which may be without memory."""
    from qlm.backends import BACKENDS
    from qlm.formats.layout import in_block

    backend = BACKENDS[weights.partition("-")[0]]
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not in_block(name):
            continue
        shape = (linear.out_features, linear.in_features)
        tensors, form = random_tensors(weights, *shape, device, dtype)
        bias = None if linear.bias is None else torch.zeros(shape[0], dtype=dtype, device=device).normal_(0.0, STD)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, backend.module(tensors, bias, shape, form, dtype).eval())


def random_model(
    shape: str | tuple[str, Mapping[str, Any]],
    weights: str = "float",
    *,
    device: str | torch.device = "cuda",
    dtype: torch.dtype = torch.float16,
    attention: str = "sdpa",
) -> Any:
    """A causal language model in evaluation mode, from torch's seed, with gradients for what is in floating point.

    Args:
        shape: a name of quantize_speed's SHAPES, or what would stand there: the family and its config's fields.
        weights: of `WEIGHTS`.
    """
    from qlm.arch import FAMILIES
    from qlm.load import set_parameter, skeleton

    where, config = torch.device(device), config_of(shape)
    model = skeleton(FAMILIES[config.model_type], config, "causal-lm", attention)
    if weights != "float":
        random_quantized(model, weights, where, dtype)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            # LayerNorms' weights around 1.
            mean = float(parameter.ndim == 1 and name.endswith(".weight"))
            values = torch.empty(parameter.shape, dtype=dtype, device=where).normal_(mean, STD)
            set_parameter(model, name, values)
    for name, buffer in list(model.named_buffers()):
        if buffer.device != where:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(where)
    model.tie_weights()
    model.config.dtype = dtype
    return model
