"""Other software reads what qlm writes, and qlm reads what other software writes, with the same logits.

For all three families: transformers with bitsandbytes, transformers with compressed-tensors, and (opt-in, `-m gptqmodel`) GPTQModel.
Both sides compute in float32 on the CPU, ours with float activations, so that formats are compared: the CPU kernels' int8 activations
would hide a small difference. What those change is a test of its own.
"""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlm.backends.base import activations_of
from qlm.kernels import cpu_ops
from qlm.kernels.ops import float_activations
from qlm.load import linear_paths, load
from tests import tiny_models
from tests.backends.conftest import FOLDERS
from tests.backends.test_gptq import written_elsewhere

# Logits have a standard deviation of about 1 here.
# The same operations on the same bytes.
SAME = 0.0
# Integer sums here, float32 sums of the dequantized values there: rounding alone, as long as it tips no activation's code over.
INT8_TOLERANCE = 2e-5
# Rounding may tip an activation's code over all the same: a step of 1/255 of a token's range, times a weight, through two layers.
INT8_TIPPED = 0.1
# absmax rounded to bf16, 8 significant bits: 0.4 % at most in each block of weights, through two layers.
BF16_ABSMAX = 0.08
# Linears computed in bf16 all through.
BF16_COMPUTE = 0.15
# float32 products of the same dequantized weight in another order.
GPTQ_TOLERANCE = 2e-5

# KL divergence of int8 from float activations, in nats; measured on trained models in evals/LOG.md.
INT8_ACTIVATIONS_KL = 1e-3

Folders = Callable[[str], Path]
Quantized = Callable[[str, str], Path]
variants = pytest.mark.parametrize("variant", FOLDERS)
LINEARS = {variant: linear_paths(tiny_models.VARIANTS[variant]()) for variant in FOLDERS}
nested_or_not = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    with float_activations():
        return rounded_logits(model)


@torch.no_grad()
def rounded_logits(model: Any) -> Tensor:
    return model.eval()(tiny_models.token_ids()).logits.float()


def difference(a: Tensor, b: Tensor) -> float:
    assert a.isfinite().all()
    assert a.std() > 0.1, "a model that says nothing proves nothing"
    return (a - b).abs().max().item()


def plain_transformers(folder: Path) -> Any:
    """As anybody loads it, in float32. transformers 5.23 leaves fp16 `weight`s of a bitsandbytes folder in fp16 whatever dtype is asked
    for (they might be packed); those are widened here, which loses nothing."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def linears_4bit(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


@pytest.mark.parametrize(
    "section",
    ["backend: nf4", "backend: nf4, double_quant: true", "backend: gptq", "backend: gptq, order: act, group_size: 32"],
)
@variants
def test_what_int8_activations_change(variant: str, section: str, quantized: Quantized) -> None:
    model = load(quantized(variant, section))
    exact, rounded = logits(model).log_softmax(-1), rounded_logits(model).log_softmax(-1)
    with float_activations():
        assert activations_of(model) == "float"
    if cpu_ops.native() is None:
        assert torch.equal(exact, rounded)
        assert activations_of(model) == "float"
    else:
        kinds = {f"int8 in groups of {group}" for group in (32, 64, 128)}
        assert set(activations_of(model).split(", ")) <= kinds
        kl = (exact.exp() * (exact - rounded)).sum(-1).mean().item()
        assert 0 < kl < INT8_ACTIVATIONS_KL


class TestBitsandbytes:
    @nested_or_not
    @variants
    def test_reads_ours(self, variant: str, double_quant: bool, quantized: Quantized) -> None:
        folder = quantized(variant, f"backend: nf4, double_quant: {str(double_quant).lower()}")
        ours, theirs = load(folder), plain_transformers(folder)
        modules = linears_4bit(theirs)
        assert len(modules) == len(linears_4bit(ours)) > 0
        for module in modules:
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = torch.float32  # config.json asks for bf16, which is right on a GPU
        expected = logits(ours)
        assert difference(expected, logits(theirs)) <= SAME

    @variants
    def test_its_own_defaults_differ_by_their_rounding_only(self, variant: str, quantized: Quantized) -> None:
        folder = quantized(variant, "backend: nf4, double_quant: false")
        expected = logits(load(folder))
        theirs = plain_transformers(folder)
        for module in linears_4bit(theirs):
            module.compute_dtype = torch.float32
        packs = any(module.support_avx512bf16_for_cpu for module in linears_4bit(theirs))
        assert difference(expected, logits(theirs)) <= (BF16_ABSMAX if packs else SAME)
        assert difference(expected, logits(plain_transformers(folder))) <= BF16_COMPUTE

    @nested_or_not
    @variants
    def test_we_read_its_own(self, variant: str, double_quant: bool, folders: Folders, tmp_path: Path) -> None:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
        )
        theirs = AutoModelForCausalLM.from_pretrained(folders(variant), dtype=torch.float16, quantization_config=config)
        theirs.save_pretrained(tmp_path)
        for parameter in theirs.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for module in linears_4bit(theirs):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = torch.float32
        ours = load(tmp_path)
        assert len(linears_4bit(ours)) == len(linears_4bit(theirs))
        assert difference(logits(ours), logits(theirs)) <= SAME

    @variants
    def test_both_write_the_same_bytes(
        self, variant: str, quantized: Quantized, folders: Folders, tmp_path: Path
    ) -> None:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "project_in", "project_out"]
        )
        theirs = AutoModelForCausalLM.from_pretrained(folders(variant), dtype=torch.float16, quantization_config=config)
        theirs.save_pretrained(tmp_path)
        expected = load_file(tmp_path / "model.safetensors")
        ours: dict[str, Tensor] = {}
        for shard in quantized(variant, "backend: nf4, double_quant: false").glob("*.safetensors"):
            ours |= load_file(shard)
        # Heads go by the published name in ours; transformers itself writes it that way too, or does not write a tied one.
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor), name


def three_dimensional(model: nn.Module) -> None:
    """OPT flattens the tokens before fc1. compressed-tensors' "token" strategy keeps two leading dimensions whatever they are, so that
    a matrix [T, I] gets one scale for all tokens there. With a dimension more it does per token what the format says."""

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].unsqueeze(1),) if args[0].dim() == 2 else args

    def drop(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.squeeze(1) if out.shape[1] == 1 else out

    for name, module in model.named_modules():
        if name.endswith((".fc1", ".fc2")):
            module.register_forward_pre_hook(add)
            module.register_forward_hook(drop)


def quantized_modules(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }


def same_linear_by_linear(ours: nn.Module, theirs: nn.Module) -> Tensor:
    """Compare each linear on the input that it gets in their model, so that nothing can tip over; returns their logits."""
    differences: list[float] = []

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            mine = ours.get_submodule(name)(args[0])
            differences.append(((mine - out).abs().max() / out.abs().max()).item())

        return hook

    modules = quantized_modules(theirs)
    handles = [module.register_forward_hook(compare(name), prepend=True) for name, module in modules.items()]
    expected = logits(theirs)
    for handle in handles:
        handle.remove()
    assert len(differences) == len(modules)
    assert max(differences) < INT8_TOLERANCE
    return expected


def write_by_compressed_tensors(model: Any, folder: Path, symmetric_input: bool) -> None:
    """W8A8 as llm-compressor leaves it: scales by min-max, compressed by compressed-tensors, its config.json."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": symmetric_input, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"]))
    for module in quantized_modules(model).values():
        low, high = module.weight.amin(1, keepdim=True), module.weight.amax(1, keepdim=True)
        scale, _ = calculate_qparams(low, high, module.quantization_scheme.weights)
        module.weight_scale.data.copy_(scale)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


class TestCompressedTensors:
    @variants
    def test_reads_ours(self, variant: str, quantized: Quantized) -> None:
        folder = quantized(variant, "backend: int8")
        ours, theirs = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        modules = quantized_modules(theirs)
        assert set(modules) == {name for name, module in ours.named_modules() if type(module).__name__ == "Int8Linear"}
        for module in modules.values():
            scheme = module.quantization_scheme.input_activations
            assert (scheme.dynamic, scheme.symmetric, scheme.strategy, scheme.num_bits) == (True, False, "token", 8)
        three_dimensional(theirs)
        expected = same_linear_by_linear(ours, theirs)
        assert difference(logits(ours), expected) <= INT8_TIPPED
        # The weights alone do not explain it: activations really are quantized there.
        for module in modules.values():
            module.quantization_enabled = False
        assert difference(logits(theirs), expected) > 2 * INT8_TOLERANCE

    @pytest.mark.parametrize("globs", [["*.fc2", "*4h_to_h", "*mlp.c_proj"], ["*"]], ids=["some", "all"])
    @variants
    def test_reads_inputs_as_they_are(self, variant: str, globs: list[str], quantized: Quantized) -> None:
        name = [glob for glob in globs if any(fnmatch.fnmatchcase(linear, glob) for linear in LINEARS[variant])]
        folder = quantized(variant, f"backend: int8, input_16bit: {json.dumps(name)}")
        ours, theirs = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        modules = quantized_modules(theirs)
        assert len(modules) == sum(type(module).__name__ == "Int8Linear" for module in ours.modules())
        for path, module in modules.items():
            as_it_is = module.quantization_scheme.input_activations is None
            assert (
                as_it_is
                == ours.get_submodule(path).float_input
                == any(fnmatch.fnmatchcase(path, glob) for glob in name)
            )
        assert activations_of(ours) == ("float" if globs == ["*"] else "float, int8 per token")
        three_dimensional(theirs)
        expected = same_linear_by_linear(ours, theirs)
        assert difference(logits(ours), expected) <= (INT8_TOLERANCE if globs == ["*"] else INT8_TIPPED)

    def test_its_flattened_tokens_in_opt(self, quantized: Quantized) -> None:
        """Without the help above: one scale for all tokens of a batch in fc1 and fc2. If this fails, compressed-tensors has mended it."""
        folder = quantized("opt", "backend: int8")
        found = difference(
            logits(load(folder)), logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        )
        assert INT8_TOLERANCE < found < 0.3

    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
    @variants
    def test_we_read_its_own(self, variant: str, symmetric: bool, tmp_path: Path) -> None:
        model = tiny_models.build(variant)
        write_by_compressed_tensors(model, tmp_path, symmetric)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        three_dimensional(theirs)
        ours = load(tmp_path)
        count = sum(type(module).__name__ == "Int8Linear" for module in ours.modules())
        assert count == len(quantized_modules(theirs)) > 0
        assert difference(logits(ours), same_linear_by_linear(ours, theirs)) <= INT8_TIPPED


def gptq_folder(variant: str, folder: Path, bits: int, v2: bool, permuted: bool, head: str | None = None) -> Any:
    """A GPTQ folder by a writer of the test's own, with AutoGPTQ's config; returns the float model that it stands for."""
    model = tiny_models.build(variant)
    # fp16 values, since files hold those.
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    group_size = 32
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split(".")):
            made, weight = written_elsewhere(
                (module.out_features, module.in_features), bits, group_size, v2, permuted, seed
            )
            module.weight.data = weight.float()
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    if head is not None:
        tensors[head] = tensors.pop("embed_out.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "bits": bits, "group_size": group_size, "desc_act": permuted, "sym": False, "quant_method": "gptq",
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return model


class TestGptqFolders:
    @pytest.mark.parametrize("permuted", [False, True], ids=["groups", "desc_act"])
    @pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("variant", tiny_models.FAMILIES)
    def test_we_read_others(self, variant: str, bits: int, v2: bool, permuted: bool, tmp_path: Path) -> None:
        expected = gptq_folder(variant, tmp_path, bits, v2, permuted)
        assert difference(logits(load(tmp_path)), logits(expected)) <= GPTQ_TOLERANCE

    def test_opt_350m_with_its_projections_left_alone(self, tmp_path: Path) -> None:
        expected = gptq_folder("opt-350m", tmp_path, 4, False, False)
        assert difference(logits(load(tmp_path)), logits(expected)) <= GPTQ_TOLERANCE

    def test_neox_head_under_gptqmodels_name(self, tmp_path: Path) -> None:
        expected = gptq_folder("neox-parallel-rotary-0.25", tmp_path, 4, False, False, head="lm_head.weight")
        assert difference(logits(load(tmp_path)), logits(expected)) <= GPTQ_TOLERANCE

    @pytest.mark.parametrize(
        "section", ["backend: gptq", "backend: gptq, bits: 3, order: act, group_size: 32, symmetric: false"]
    )
    @variants
    def test_ours_is_its_dequantization(self, variant: str, section: str, quantized: Quantized) -> None:
        folder = quantized(variant, section)
        ours, plain = load(folder), tiny_models.build(variant, dtype=torch.float16).float()
        for name, module in ours.named_modules():
            if type(module).__name__ == "GptqLinear":
                eye = torch.eye(module.in_features)
                bias = 0 if module.bias is None else module.bias
                plain.get_submodule(name).weight.data = (module(eye) - bias).detach().T.contiguous()
                if module.bias is not None:  # it may have been corrected
                    plain.get_submodule(name).bias.data = module.bias.detach()
        # Taking the bias off again rounds once more.
        assert difference(logits(ours), logits(plain)) <= 1e-4

    @pytest.mark.parametrize("variant", tiny_models.FAMILIES)
    def test_overrides_and_skips(self, variant: str, quantized: Quantized) -> None:
        last = {"opt": "*fc2", "neox-parallel-rotary-0.25": "*dense_4h_to_h", "bigcode-multi-query": "*mlp.c_proj"}[
            variant
        ]
        section = f'backend: gptq, overrides: {{"{last}": {{bits: 8, group_size: 32}}}}, skip: ["*.0.*"]'
        model = load(quantized(variant, section))
        found = {name: module.bits for name, module in model.named_modules() if type(module).__name__ == "GptqLinear"}
        assert set(found.values()) == {4, 8}
        assert all((bits == 8) == name.endswith(last[1:]) for name, bits in found.items())
        assert not any(".0." in name for name in found)
        assert logits(model).isfinite().all()


class TestTasks:
    @pytest.mark.parametrize("section", ["backend: int8", "backend: nf4", "backend: gptq"])
    @variants
    def test_a_new_head_on_a_quantized_model(self, variant: str, section: str, quantized: Quantized) -> None:
        model = load(quantized(variant, section), task="sequence-classification", new_head=True)
        assert type(model.score) is nn.Linear

    @pytest.mark.parametrize("section", ["backend: int8", "backend: nf4", "backend: gptq"])
    @pytest.mark.parametrize("variant", tiny_models.FAMILIES)
    def test_the_base_model(self, variant: str, section: str, quantized: Quantized) -> None:
        folder = quantized(variant, section)
        base, whole = load(folder, task="base"), load(folder)
        ids = tiny_models.token_ids()
        with torch.no_grad():
            hidden = base(ids).last_hidden_state
            assert torch.equal(hidden, getattr(whole, whole.base_model_prefix)(ids).last_hidden_state)


@pytest.mark.parametrize("section", ["backend: int8", "backend: nf4", 'backend: gptq, skip: ["*.0.fc1"]'])
def test_the_base_model_with_linears_left_out(section: str, quantized: Quantized) -> None:
    assert load(quantized("opt-350m", section), task="base")


# GPTQModel 7.7.0 does not find GPT-NeoX's head under its published name and leaves it uninitialised (logits are garbage or NaN);
# the script puts it in, so that the quantized linears are what is compared. TorchLinear refuses float32 at load: widened afterwards.
GPTQMODEL_CODE = """
import glob, sys, torch, traceback
from gptqmodel import GPTQModel, BACKEND
from safetensors.torch import save_file, load_file
ids = load_file("ids.safetensors")["ids"]
for folder in sys.argv[1:]:
    try:
        model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.float().eval()
        for shard in glob.glob(folder + "/*.safetensors"):
            tensors = load_file(shard)
            if "embed_out.weight" in tensors:
                model.lm_head.weight.data = tensors["embed_out.weight"].float()
        with torch.no_grad():
            save_file({"logits": model(input_ids=ids).logits.float().contiguous()}, folder + ".safetensors")
    except Exception:
        open(folder + ".error", "w").write(traceback.format_exc())
"""
GPTQMODEL_SECTIONS = (
    "backend: gptq", "backend: gptq, symmetric: false", "backend: gptq, bits: 3", "backend: gptq, bits: 8, group_size: 32",
    "backend: gptq, order: act", "backend: gptq, average_bits: 3.5",
)  # fmt: skip
GPTQMODEL_CASES = [(variant, section) for variant in tiny_models.FAMILIES for section in GPTQMODEL_SECTIONS]


@pytest.fixture(scope="module")
def read_by_gptqmodel(quantized: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of each case's folder, and beside it what GPTQModel made of it. One process for all: it starts slowly.

    Runs the Python that QLM_GPTQMODEL_PYTHON names, since GPTQModel brings several GB and a torch of its own.
    """
    python = os.environ.get("QLM_GPTQMODEL_PYTHON", sys.executable)
    root = tmp_path_factory.mktemp("gptqmodel")
    for index, (variant, section) in enumerate(GPTQMODEL_CASES):
        shutil.copytree(quantized(variant, section), root / str(index))
    save_file({"ids": tiny_models.token_ids()}, root / "ids.safetensors")
    command = [python, "-c", GPTQMODEL_CODE, *(str(root / str(index)) for index in range(len(GPTQMODEL_CASES)))]
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=root
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return root


@pytest.mark.gptqmodel
@pytest.mark.parametrize("index", range(len(GPTQMODEL_CASES)), ids=[f"{v}-{s}" for v, s in GPTQMODEL_CASES])
def test_gptqmodel_reads_ours(index: int, read_by_gptqmodel: Path) -> None:
    folder = read_by_gptqmodel / str(index)
    failed = folder.with_suffix(".error")
    if "symmetric: false" in GPTQMODEL_CASES[index][1]:
        # It reads asymmetric v1 files of its own making only (GPTQModel 7.7.0 `models/loader.py`, MIN_VERSION_WITH_V2).
        assert (
            "sym=False model with format=FORMAT.GPTQ is only supported if produced by gptqmodel" in failed.read_text()
        )
        return
    assert not failed.exists(), failed.read_text()[-2000:]
    found = difference(logits(load(folder)), load_file(folder.with_suffix(".safetensors"))["logits"])
    print(f"largest logit difference, {GPTQMODEL_CASES[index]}: {found:.3g}")
    assert found <= GPTQ_TOLERANCE
