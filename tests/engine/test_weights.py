"""From a checkpoint to the native description: what is mapped, what is made, what is refused."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from qlm.engine.decoder import Decoder
from qlm.engine.weights import Weights
from qlm.errors import DataError, MissingInput, UsageError
from qlm.kernels import cpu
from tests import tiny_models
from tests.conftest import ROOT, change_json
from tests.engine.conftest import exact_logits

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not installed")


def linears(weights: Weights) -> list[cpu.Linear]:
    model = weights.model
    found = []
    for i in range(model.layers):
        block = model.blocks[i]
        qkv = block.qkv[:3] if model.qkv_layout == cpu.QKV_SEPARATE else block.qkv[:1]
        found += [*qkv, block.attention_out, block.up, block.down]
    return found


def is_mapped(weights: Weights, address: int) -> bool:
    return any(0 <= address - file.ctypes.data < file.nbytes for file in weights.checkpoint.mappings())


def floats(address: int, count: int) -> np.ndarray:
    return np.frombuffer((cpu.c_float * count).from_address(address), np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_float_matrices_stay_in_the_file(float_folder: Callable[..., Path], variant: str, dtype: torch.dtype) -> None:
    weights = Weights.open(float_folder(variant, dtype))
    name = str(dtype).removeprefix("torch.")
    for linear in [*linears(weights), weights.model.head]:
        assert linear.format == cpu.FLOAT
        assert is_mapped(weights, linear.weight)
    for linear in linears(weights):
        assert not is_mapped(weights, linear.bias)  # float32, whatever the file has
    assert is_mapped(weights, weights.model.embedding)
    sizes = {tensor: weights.checkpoint.map(tensor).nbytes for tensor in weights.checkpoint.tensors}
    blocks = sum(
        size for tensor, size in sizes.items() if ".weight" in tensor and size > 256 * 4 and "embed" not in tensor
    )
    head = 320 * 128 * dtype.itemsize
    biases = sum(4 * linear.out_features for linear in linears(weights))
    assert weights.facts == {
        "model_type": weights.spec.model_type, "backend": "float", "bits": 8 * dtype.itemsize, "dtype": name,
        "head": name, "activations": "float", "checkpoint_bytes": sum(sizes.values()),
        "bytes_per_token": weights.facts["bytes_per_token"],
    }  # fmt: skip
    tables = sum(size for tensor, size in sizes.items() if tensor.endswith(("wte.weight", "wpe.weight")))
    assert weights.facts["bytes_per_token"] == blocks - tables + head + biases


def test_biases_and_norms_are_the_files_values(float_folder: Callable[..., Path]) -> None:
    folder = float_folder("neox-parallel-rotary-0.25", torch.bfloat16)
    weights = Weights.open(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    block = weights.model.blocks[1]
    for address, name in (
        (block.up.bias, "mlp.dense_h_to_4h.bias"),
        (block.qkv[0].bias, "attention.query_key_value.bias"),
        (block.attention_norm.weight, "input_layernorm.weight"),
        (block.mlp_norm.bias, "post_attention_layernorm.bias"),
    ):
        expected = tensors[f"gpt_neox.layers.1.{name}"].float().numpy()
        assert np.array_equal(floats(address, len(expected)), expected)


@pytest.mark.parametrize(
    ("backend", "settings", "form", "bits"),
    [
        ("int8", {}, cpu.INT8, 8),
        ("nf4", {"double_quant": False}, cpu.NF4, 4),
        ("nf4", {"double_quant": True}, cpu.NF4, 4),
        ("gptq", {"bits": 3, "group_size": 64}, cpu.GPTQ, 3),
        ("gptq", {"bits": 4, "group_size": 32, "order": "act"}, cpu.GPTQ, 4),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, dict)) else "",
)
def test_quantized(
    quantized_folder: Callable[..., Path], backend: str, settings: dict[str, object], form: int, bits: int
) -> None:
    weights = Weights.open(quantized_folder("bigcode-multi-query", backend, **settings))
    for linear in linears(weights):
        assert linear.format == form
        assert bool(linear.order) == (settings.get("order") == "act")
        # GPTQ words are arranged in memory of their own; everything else is read where it lies.
        assert is_mapped(weights, linear.weight) == (backend != "gptq")
    facts = weights.facts
    assert (facts["backend"], facts["bits"], facts["head"], facts["dtype"]) == (backend, bits, "int8", "float16")
    kind = "int8 per token"
    if backend != "int8":
        kind = f"int8 in groups of {settings.get('group_size', 64)}, int8 per token"
    assert facts["activations"] == (f"{kind}, {kind} (head)" if backend == "int8" else f"{kind} (head)")
    weight_bytes = sum(linear.in_features * linear.out_features for linear in linears(weights)) * bits // 8
    assert weight_bytes + 320 * 128 < facts["bytes_per_token"] < 1.35 * (weight_bytes + 320 * 128)


@pytest.mark.parametrize("head", ["float", "int8", "auto"])
def test_head(float_folder: Callable[..., Path], quantized_folder: Callable[..., Path], head: str) -> None:
    for folder, automatic in ((float_folder("opt"), "float32"), (quantized_folder("opt", "int8"), "int8")):
        weights = Weights.open(folder, head=head)
        kind = {"auto": automatic, "int8": "int8"}.get(head, weights.facts["dtype"])
        assert weights.facts["head"] == kind
        assert (weights.model.head.format == cpu.INT8) == (kind == "int8")
        assert is_mapped(weights, weights.model.head.weight) == (kind != "int8")
        assert is_mapped(weights, weights.model.embedding)


def test_head_in_int8_is_the_rows_in_127ths(float_folder: Callable[..., Path]) -> None:
    folder = float_folder("opt", torch.float16)
    weights = Weights.open(folder, head="int8")
    table = safetensors.torch.load_file(folder / "model.safetensors")["model.decoder.embed_tokens.weight"].double()
    head = weights.model.head
    scale = floats(head.scale, 320)
    codes = np.frombuffer((cpu.ctypes.c_int8 * (320 * 128)).from_address(head.weight), np.int8).reshape(320, 128)
    sums = np.frombuffer((cpu.c_int32 * 320).from_address(head.row_sum), np.int32)
    np.testing.assert_allclose(scale, table.abs().amax(1) / 127, rtol=1e-6)
    assert np.abs(codes * scale[:, None] - table.numpy()).max() <= scale.max() * 0.501
    assert np.array_equal(sums, codes.sum(1, dtype=np.int32))


def test_mixed_formats(copy_of: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """Linears that a recipe leaves out, other bits and groups for some, side by side in one block."""
    from qlm.quantize import quantize
    from qlm.recipe import parse_recipe
    from tests.conftest import recipe_text

    for variant, skip, override in (
        ("opt", "*.layers.0.self_attn.v_proj", "*.fc2"),
        ("neox-parallel-rotary-0.25", "*.1.mlp.dense_4h_to_h", "*.dense_h_to_4h"),
    ):
        out = tmp_path / f"{variant}-out"
        recipe = recipe_text(
            copy_of(variant, name=variant), out, "gptq", text_file, group_size=32, skip=[skip],
            overrides={override: {"bits": 8, "group_size": 64}},
        )  # fmt: skip
        quantize(parse_recipe(recipe, "test"))
        ids = tiny_models.token_ids(1, 20)
        weights = Weights.open(out, head="float")
        assert len({(linear.format, linear.bits) for linear in linears(weights)}) == 3
        with Decoder(weights, 2) as decoder:
            exact = exact_logits(out, ids)[0]
            cache = decoder.new_cache()
            rows = [decoder.logits([cache], [ids[0, :19].tolist()])[0], decoder.step([cache], [ids[0, 19:].tolist()])]
        assert np.sqrt(np.square(np.concatenate(rows) - exact).mean()) < 0.025 * exact.std()


@pytest.mark.parametrize("variant", tiny_models.FAMILIES)
def test_int8_weights_whose_inputs_are_not_rounded(quantized_folder: Callable[..., Path], variant: str) -> None:
    """Held as floats; with all of them so, the decoder computes what the file's numbers say."""
    ids = tiny_models.token_ids(1, 20)
    some = [{"opt": "*.fc2", "bigcode-multi-query": "*mlp.c_proj"}.get(variant, "*4h_to_h")]
    for globs in (some, ["*"]):
        folder = quantized_folder(variant, "int8", input_16bit=globs)
        weights = Weights.open(folder, head="float")
        forms = {linear.format for linear in linears(weights)}
        assert forms == ({cpu.FLOAT} if globs == ["*"] else {cpu.FLOAT, cpu.INT8})
        assert weights.facts["bits"] == 8
        assert weights.facts["activations"] == ("float" if globs == ["*"] else "float, int8 per token")
        with Decoder(weights, 1, "float32") as decoder:
            exact = exact_logits(folder, ids)[0]
            cache = decoder.new_cache()
            rows = [decoder.logits([cache], [ids[0, :19].tolist()])[0], decoder.step([cache], [ids[0, 19:].tolist()])]
        error = np.sqrt(np.square(np.concatenate(rows) - exact).mean()) / exact.std()
        # float32 against float64; and int8 activations in the other linears.
        assert error < (1e-5 if globs == ["*"] else 0.025)


def test_shards_and_bin_files(float_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_models.build("bigcode-multi-query")
    ids = tiny_models.token_ids(1, 12).tolist()
    with Decoder(Weights.open(float_folder("bigcode-multi-query")), 1) as decoder:
        expected = decoder.step([decoder.new_cache()], ids)
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].T.contiguous().T  # stored by columns
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    for folder in ("shards", "bin"):
        weights = Weights.open(tmp_path / folder)
        assert is_mapped(weights, weights.model.blocks[0].up.weight) == (folder == "shards")
        with Decoder(weights, 1) as decoder:
            assert np.array_equal(decoder.step([decoder.new_cache()], ids), expected)


def test_the_head_of_a_bin_file_that_is_copied(tmp_path: Path) -> None:
    """Advice about pages of a file must not reach memory that is not in one."""
    model = tiny_models.gpt_neox(vocab_size=2048).eval()
    model.config.save_pretrained(tmp_path)
    tensors = {name.replace("lm_head", "embed_out"): tensor for name, tensor in model.state_dict().items()}
    tensors["embed_out.weight"] = tensors["embed_out.weight"].T.contiguous().T
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    weights = Weights.open(tmp_path, head="int8")
    assert np.array_equal(weights.opened.map("embed_out.weight").array, tensors["embed_out.weight"].detach().numpy())


# What is refused ------------------------------------------------------------------------------------------------------


def test_settings(float_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="head: 'int4'; expected one of auto, int8, float"):
        Weights.open(float_folder("opt"), head="int4")
    with pytest.raises(MissingInput):
        Weights.open(tmp_path / "nothing")


def test_activations_that_the_kernels_do_not_have(copy_of: Callable[..., Path]) -> None:
    for activation in ("silu", "quick_gelu", "tanh"):
        folder = copy_of("opt", name=activation, activation_function=activation)
        with pytest.raises(UsageError, match=f"activation '{activation}': .*--runtime transformers"):
            Weights.open(folder)


@pytest.mark.parametrize("name", ["model.decoder.layers.1.fc1.bias", "model.decoder.final_layer_norm.weight"])
def test_vectors_that_are_not_finite(copy_of: Callable[..., Path], name: str) -> None:
    folder = copy_of("opt")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[name][7] = float("inf")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=rf"{name}: value number 7 is NaN or infinite"):
        Weights.open(folder)


@pytest.mark.parametrize("backend", ["int8", "gptq", "nf4"])
def test_scales_that_are_not_finite(quantized_folder: Callable[..., Path], tmp_path: Path, backend: str) -> None:
    import shutil

    name = {"int8": "weight_scale", "gptq": "scales", "nf4": "weight.absmax"}[backend]
    settings = {"double_quant": False} if backend == "nf4" else {}
    folder = tmp_path / "damaged"
    shutil.copytree(quantized_folder("opt", backend, **settings), folder)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = safetensors.torch.load_file(file)
        for tensor in (t for n, t in tensors.items() if n.endswith(f"0.fc2.{name}")):
            tensor.view(-1)[3] = float("nan")
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DataError, match=rf"layers\.0\.fc2: {name}: value number 3 is NaN or infinite"):
        Weights.open(folder)


def test_quanto_folders(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("opt")
    (folder / "quanto_qmap.json").write_text("{}")
    with pytest.raises(UsageError, match="--runtime transformers"):
        Weights.open(folder)


def test_unknown_quantization(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("opt")
    change_json(folder / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(DataError, match="awq"):
        Weights.open(folder)


def test_neither_torch_nor_transformers_is_needed(float_folder: Callable[..., Path]) -> None:
    """Nor pydantic; and a process that ends with everything open ends well."""
    code = (
        "import sys\n"
        "from qlm.engine.decoder import Decoder\n"
        "from qlm.engine.weights import Weights\n"
        "decoder = Decoder(Weights.open(sys.argv[1], head='int8'), 2)\n"
        "cache = decoder.new_cache()\n"
        "print(decoder.step([cache], [[5, 6, 7]]).shape)\n"
        "print({'torch', 'transformers', 'pydantic', 'safetensors', 'huggingface_hub'} & sys.modules.keys())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(float_folder("opt"))],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 320)\nset()\n", "")
