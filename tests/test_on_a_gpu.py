"""What is asked of a GPU stays there, with one that is pretended (pretend_gpu.py): no operation mixes its tensors with the CPU's, and the results
are the CPU's own. Kernels, and what is only true of a real one, are evals/gpu_check.py's."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qlm
from qlm import plan as plan_module
from qlm import smoothing, static_decoder, stream
from qlm.evaluate import evaluate
from qlm.kernels.ops import float_activations
from qlm.numerics import refine, smooth
from qlm.plan import plan
from qlm.recipe import parse_recipe
from qlm.static_decoder import StaticDecoder
from tests import tiny_models
from tests.conftest import FAMILIES, files_of, recipe_text
from tests.pretend_gpu import MixedDevices, pretend_gpu
from tests.test_generate import PROMPT, TOKENIZERS

Folder = Callable[[str], Path]
LEARNED = {"rounding_steps": 2, "tune_steps": 2}
WAYS: dict[str, dict[str, Any]] = {
    "gptq best": {"backend": "gptq", "bits": 3, "group_size": 32, "quality": "best", **LEARNED},
    "gptq act order": {"backend": "gptq", "order": "act", "quality": "fast", "symmetric": False},
    "nf4 best": {"backend": "nf4", "quality": "best", "tune_steps": 2},
    "int8 best": {"backend": "int8", "quality": "best", "tune_steps": 2},
    "nf4 fast": {"backend": "nf4", "quality": "fast", "double_quant": True},
    "int8 fast": {"backend": "int8", "quality": "fast"},
}
every_family = pytest.mark.parametrize("variant", FAMILIES)


class TestThePretence:
    """What it must see, or the tests below show nothing."""

    def test_devices(self) -> None:
        with pretend_gpu() as gpu:
            here, there = torch.ones(3, 3), torch.ones(3, 3, device="cuda")
            for on_gpu in (there.t(), there[1:], there + 1, torch.nn.Parameter(there), here.to("cuda"), here.cuda(), here.to(there),
                           there.half(), there.new_zeros(2), torch.zeros_like(there), there.view(-1).detach()):  # fmt: skip
                assert on_gpu.device == torch.device("cuda", 0)
                assert on_gpu.is_cuda
            for on_cpu in (here, there.cpu(), there.to("cpu", torch.float16), here + 1, torch.ones(2), there.to(here)):
                assert on_cpu.device == torch.device("cpu")
                assert on_cpu.is_cpu
            assert gpu.operations["move"] >= 5

    @pytest.mark.parametrize(
        "mixed",
        [
            lambda cpu, gpu: cpu @ gpu,
            lambda cpu, gpu: gpu.add_(cpu),
            lambda cpu, gpu: torch.cat([cpu, gpu]),
            lambda cpu, gpu: torch.nn.functional.linear(gpu, torch.nn.Parameter(cpu)),
            lambda cpu, gpu: gpu.numpy(),
            lambda cpu, gpu: torch.randperm(3, device="cuda", generator=torch.Generator()),
            lambda cpu, gpu: torch.rand(3, generator=torch.Generator("cuda")),
        ],
    )
    def test_what_would_fail(self, mixed: Callable[[Any, Any], Any]) -> None:
        with pretend_gpu(), pytest.raises(MixedDevices):
            mixed(torch.ones(3, 3), torch.ones(3, 3, device="cuda"))


@pytest.mark.parametrize(
    ("variant", "way"),
    [
        *((variant, way) for variant in FAMILIES for way in ("gptq best", "gptq act order", "int8 fast")),
        *zip(FAMILIES, ("int8 best", "nf4 best", "nf4 fast"), strict=True),
    ],
)
def test_quantize(variant: str, way: str, folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
    """In bfloat16 on both, as a real one calibrates: the same weights to the byte."""

    def quantized(name: str, device: str) -> dict[str, bytes]:
        recipe = parse_recipe(recipe_text(folder_of(variant), tmp_path / name, text=text_file, **WAYS[way]), "r.yaml")
        result = qlm.quantize(recipe, device=device)
        return {file: data for file, data in files_of(result.output).items() if file.endswith(".safetensors")}

    with pretend_gpu() as gpu:
        there = quantized("there", "cuda")
    assert gpu.operations.total() > 100
    # What goes back to the CPU is what is written and what is chosen by: no value for each column of a matrix.
    columns = sum(m.in_features for m in tiny_models.build(variant).modules() if isinstance(m, torch.nn.Linear))
    assert gpu.operations["item"] < columns
    if "best" not in way:
        # Learning goes through autocast, whose rounding is the device's own.
        assert there == quantized("here", "cpu")


@pytest.mark.parametrize("way", ["gptq", "gptq static", "gptq fast", "int8", "nf4"])
def test_memory(
    way: str, text_file: Path, tokenizer_json: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block, one side's activations and a solver's matrices, whatever the depth; what the plan says, and not much less."""
    # As many tokens for each input as OPT-6.7B has with 128 windows of 2048, so that everything is in proportion.
    for module in (stream, plan_module):
        monkeypatch.setattr(module, "BATCH_TOKENS", 128 if way == "gptq" else 256)
    for module, name in ((refine, "STRENGTH_CHUNK"), (smoothing, "SAMPLE_TOKENS"), (smooth, "MOST_OUTPUTS")):
        monkeypatch.setattr(module, name, 64)
    backend, _, rest = way.partition(" ")
    settings = {"backend": backend, "quality": "fast" if rest == "fast" else "balanced"}
    if backend == "gptq":
        settings |= {"group_size": 32, "order": "static" if rest == "static" else "gar"}
    length, hidden, peaks = 64, 128, []
    for blocks in (1, 2) if way == "gptq" else (1,):
        folder = tmp_path / f"{blocks}-blocks"
        config = transformers.OPTConfig(
            vocab_size=tiny_models.VOCABULARY, hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=blocks,
            num_attention_heads=4, word_embed_proj_dim=hidden, max_position_embeddings=length,
        )  # fmt: skip
        transformers.OPTForCausalLM(config).half().save_pretrained(folder)
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        text = recipe_text(folder, tmp_path / f"out-{blocks}", text=text_file, **settings)
        recipe = parse_recipe(text.replace("samples: 8, length: 32", f"samples: 128, length: {length}"), "r.yaml")
        with pretend_gpu() as gpu:
            planned = plan(recipe, "cuda").gpu_quantize_memory
            gpu.peak_bytes = 0  # a product has been timed
            qlm.quantize(recipe, device="cuda")
        gc.collect()
        assert gpu.bytes == 0
        peaks.append(gpu.peak_bytes)
    assert peaks[-1] == pytest.approx(peaks[0], rel=0.01)
    assert planned is not None
    assert peaks[0] <= planned <= 2 * peaks[0]
    if way == "gptq":
        # For OPT-6.7B's shape: 8 GB.
        assert peaks[0] * (4096 / hidden) ** 2 <= 8e9


@pytest.mark.parametrize("backend", ["float", "int8", "nf4", "gptq"])
@every_family
def test_run(
    variant: str, backend: str, folder_of: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, perplexity, and text from recorded steps."""
    monkeypatch.setattr(StaticDecoder, "_record", lambda self, device: self._forward())
    folder = folder_of(variant)
    if backend != "float":
        recipe = parse_recipe(recipe_text(folder, tmp_path / "out", backend, text_file), "r.yaml")
        folder = qlm.quantize(recipe).output
    here = qlm.load(folder, dtype=torch.float32)
    tokenizer = TOKENIZERS[here.config.model_type]
    ids = torch.arange(2, 66)
    steps: list[int] = []
    true = static_decoder.StaticDecoder.step
    monkeypatch.setattr(StaticDecoder, "step", lambda self, ids: steps.append(1) or true(self, ids))
    with pretend_gpu():
        there = qlm.load(folder, device="cuda", dtype=torch.float32)
        assert {p.device.type for p in (*there.parameters(), *there.buffers())} == {"cuda"}
        logits = there(ids[None].to("cuda")).logits.cpu()
        measured = evaluate(there, ids, length=16, data_sha256="", bos="")
        text = qlm.generate(there, tokenizer, PROMPT, max_new_tokens=20, greedy=True)
    # NF4 on a GPU is bitsandbytes', from floats.
    with float_activations() if backend == "nf4" else nullcontext():
        assert (logits - here(ids[None]).logits).abs().max() < (1e-5 if backend == "nf4" else 1e-9)
        perplexity = evaluate(here, ids, length=16, data_sha256="", bos="").perplexity
        assert measured.perplexity == pytest.approx(perplexity, rel=1e-6)
        assert text == qlm.generate(here, tokenizer, PROMPT, max_new_tokens=20, greedy=True)
    assert steps
