"""Adapters: on every kind of linear with the right gradients, the same bytes from the same seed, read by plain PEFT and from it, and
nothing taken from a folder that is not exactly what it should be."""

import json
import math
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qlm
from qlm.adapters import apply_adapter, attach, files_of, linear_shapes
from qlm.arch import FAMILIES as SPECS
from qlm.arch import HEADS, FamilySpec
from qlm.backends import BACKENDS
from qlm.backends.gptq import GptqLinear
from qlm.backends.int8 import Int8Linear
from qlm.checkpoint.adapter import CONFIG, WEIGHTS, base_facts, read_adapter
from qlm.errors import DataError, MissingInput, QlmError, UsageError
from qlm.formats.int8 import Int8Format
from qlm.kernels.ops import float_activations
from qlm.recipe import AdapterRecipe, parse_recipe
from tests import tiny_models
from tests.conftest import FAMILIES, change_json, recipe_text

Folder = Callable[[str], Path]
Quantized = Callable[[str, str], Path]
KINDS = ("float", "nf4", "int8", "gptq")
TASKS = [
    (variant, task)
    for variant in FAMILIES
    for task in SPECS[tiny_models.VARIANTS[variant]().config.model_type].model_classes
    if task not in ("causal-lm", "base")
]

# The same products in float32, in another order; logits have a standard deviation of about 1.
LOGITS_TOLERANCE = 1e-5
# Gradients through two layers, relative to the largest of each.
GRADIENT_TOLERANCE = 2e-5


def spec_of(model: Any) -> FamilySpec:
    return SPECS[model.config.model_type]


def adapter_recipe(**values: Any) -> AdapterRecipe:
    return AdapterRecipe.model_validate({"r": 4, "alpha": 12, "dropout": 0.0, **values})


def with_adapter(folder: Path, task: Any = "causal-lm", name: str = "default", **values: Any) -> Any:
    torch.manual_seed(3)
    model = qlm.load(folder, task=task, new_head=True)
    model.config.pad_token_id = 1
    return attach(model, spec_of(model), adapter_recipe(**values), task, 0, name)


def train_b(model: Any, seed: int = 1, name: str = "default") -> Any:
    """The model with random B, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}." in key or f"modules_to_save.{name}." in key:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def write(model: Any, folder: Path, name: str = "default") -> Path:
    tensors, config = files_of(model, "base", name)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    with float_activations():
        out = model.eval()(tiny_models.token_ids())
    return torch.cat([out.start_logits, out.end_logits]) if "start_logits" in out else out.logits


def difference(a: Tensor, b: Tensor) -> float:
    assert a.isfinite().all()
    assert a.std() > 0.01, "a model that says nothing proves nothing"
    return (a - b).abs().max().item()


def plain(folder: Path, task: str = "causal-lm") -> Any:
    """transformers' own class, from the folder, in float32."""
    spec = SPECS[json.loads((folder / "config.json").read_text())["model_type"]]
    model = getattr(transformers, spec.model_classes[task]).from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu, module.compute_dtype = False, torch.float32
    return model


@pytest.fixture(scope="session", name="quantized")
def quantized_fixture(tmp_path_factory: pytest.TempPathFactory, folder_of: Folder, text_file: Path) -> Quantized:
    """The folder of a variant, float or quantized quickly by a backend. Not to be changed."""
    root = tmp_path_factory.mktemp("quantized")

    def folder(variant: str, kind: str) -> Path:
        path = root / f"{variant}-{kind}"
        if kind == "float":
            return folder_of(variant)
        if not path.exists():
            backend, _, bits = kind.partition("-")
            settings: dict[str, Any] = {} if backend == "quanto" else {"quality": "fast"}
            settings |= {"bits": int(bits)} if bits else {}
            qlm.quantize(parse_recipe(recipe_text(folder_of(variant), path, backend, text_file, **settings), "r.yaml"))
        return path

    return folder


@pytest.fixture(scope="session", name="adapter_of")
def adapter_of_fixture(tmp_path_factory: pytest.TempPathFactory, folder_of: Folder) -> Folder:
    """An adapter for a variant that does something. Not to be changed."""
    root = tmp_path_factory.mktemp("adapters")

    def folder(variant: str) -> Path:
        path = root / variant
        return path if path.exists() else write(train_b(with_adapter(folder_of(variant))), path)

    return folder


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """peft must have nothing to complain about where qlm calls it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"peft\..*")
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated")
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", FAMILIES)
class TestAttach:
    def test_all_linears_and_nothing_else(self, variant: str, kind: str, quantized: Quantized) -> None:
        before = qlm.load(quantized(variant, kind))
        model = with_adapter(quantized(variant, kind), dropout=0.1)
        spec = spec_of(before)
        block = [name for stage in spec.stages for group in stage for name in group.linears]
        adapted = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
        assert sorted(adapted) == sorted(linear_shapes(before, spec))
        assert len(adapted) == 2 * len(block)
        expected = {"float": "Linear", "nf4": "Linear4bit"}.get(kind, "LoraOverQuantized")
        assert {type(model.get_base_model().get_submodule(name)).__name__ for name in adapted} == {expected}
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(".lora_" in name for name in learned)
        assert {p.dtype for p in learned.values()} == {torch.float32}
        assert sum(p.numel() for p in learned.values()) == sum(4 * sum(s) for s in linear_shapes(before, spec).values())
        assert not any(module.training for module in model.modules())
        # B is zero, and the base is as it was.
        assert torch.equal(logits(model), logits(before))
        assert torch.equal(logits(train_b(model).get_base_model()), logits(model))
        assert not torch.equal(logits(model), logits(before))

    def test_the_seed_alone_decides(self, variant: str, kind: str, quantized: Quantized) -> None:
        made = []
        for global_seed, seed in ((1, 0), (2, 0), (3, 1)):
            model = qlm.load(quantized(variant, kind), dtype="bfloat16" if global_seed == 2 else "float32")
            torch.manual_seed(global_seed)
            before = torch.random.get_rng_state()
            model = attach(model, spec_of(model), adapter_recipe(), "causal-lm", seed)
            assert torch.equal(torch.random.get_rng_state(), before)
            made.append(files_of(model, "base")[0])
        first, same, other = made
        assert first.keys() == same.keys() == other.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, same[name])
            if "lora_A" in name:
                assert not torch.equal(tensor, other[name])
                # nn.Linear's own: uniform within 1 / sqrt(I).
                bound = 1 / math.sqrt(tensor.shape[1])
                assert 0.9 * bound < tensor.abs().max() <= bound
            else:
                assert not tensor.any()

    def test_gradients_of_each_layer(self, variant: str, kind: str, quantized: Quantized) -> None:
        """Those of y = x (W + s B A)^T + b with W dequantized, by hand; int8's rounding of x passes them straight through."""
        model = train_b(with_adapter(quantized(variant, kind)))
        generator = torch.Generator().manual_seed(0)
        for path, shape in linear_shapes(model, spec_of(model)).items():
            layer = model.get_base_model().get_submodule(path)
            x = torch.randn(3, 5, shape[1], generator=generator, requires_grad=True)
            g = torch.randn(3, 5, shape[0], generator=generator)
            with float_activations():
                layer(x).backward(g)
            w, s = dequantized(layer.base_layer), 12 / 4
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            flat_x, flat_g = x.detach().flatten(0, 1), g.flatten(0, 1)
            close(x.grad, g @ w + s * (g @ b) @ a)
            close(a.grad, s * (flat_g @ b).T @ flat_x)
            close(b.grad, s * flat_g.T @ (flat_x @ a.T))

    def test_gradients_of_the_model(self, variant: str, kind: str, quantized: Quantized) -> None:
        """With checkpointing those without; where activations are not rounded, those of a float model with the same weights too."""
        found = gradients(train_b(with_adapter(quantized(variant, kind))))
        assert (
            len(found) == 2 * len(linear_shapes(with_adapter(quantized(variant, kind)), SPECS[model_type(variant)])) + 1
        )
        for reentrant in (True, False):
            model = train_b(with_adapter(quantized(variant, kind)))
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            again = gradients(model)
            for name, gradient in found.items():
                close(again[name], gradient, name)
        if kind != "int8":
            base = qlm.load(quantized(variant, kind))
            for path in linear_shapes(base, spec_of(base)):
                linear = base.get_submodule(path)
                plain_linear = nn.Linear(linear.in_features, linear.out_features)
                plain_linear.weight.data = dequantized(linear)
                plain_linear.bias.data = linear.bias.data
                base.set_submodule(path, plain_linear)
            same = gradients(train_b(attach(base, spec_of(base), adapter_recipe(), "causal-lm", 0)))
            for name, gradient in found.items():
                close(same[name], gradient, name)


def model_type(variant: str) -> str:
    return tiny_models.VARIANTS[variant]().config.model_type


def close(found: Tensor, expected: Tensor, name: str = "") -> None:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0, name
    assert (found - expected).abs().max() <= GRADIENT_TOLERANCE * expected.abs().max(), name


def dequantized(linear: Any) -> Tensor:
    """fp32 [O, I], by the backends' own dequantize; nf4 by bitsandbytes'."""
    shape = (linear.out_features, linear.in_features)
    if isinstance(linear, Int8Linear):
        return BACKENDS["int8"].dequantize(dict(linear.named_buffers()), shape, Int8Format())
    if isinstance(linear, GptqLinear):
        # Codes and zero points word by word, 8 of 4 bits or 16 of 2 in each, the stored zero point one less than the real one.
        shifts, mask = torch.arange(0, 32, linear.bits), (1 << linear.bits) - 1
        codes = (linear.qweight[:, None, :] >> shifts[None, :, None]).bitwise_and(mask).flatten(0, 1)
        zeros = (linear.qzeros[:, :, None] >> shifts).bitwise_and(mask).flatten(1) + 1
        group = linear.g_idx.long()
        return ((codes - zeros[group]) * linear.scales.float()[group]).T.contiguous()
    if type(linear) is nn.Linear:
        return linear.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    state = linear.weight.quant_state
    state.dtype = torch.float32
    return dequantize_4bit(linear.weight.data, state)


def gradients(model: Any) -> dict[str, Tensor]:
    """Of every adapter parameter and the input embeddings, of a loss that every logit is in."""
    model.train()  # checkpointing happens in training alone; the same seed, the same dropout
    torch.manual_seed(0)
    embedding = model.get_base_model().get_input_embeddings()
    x = embedding(tiny_models.token_ids()).detach().requires_grad_()
    with float_activations():
        model(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
    return {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad and "lora" in n}}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], [0, 1, "self_attn.q_proj"]),
        (["fc*"], [0, 1, "fc1", "fc2"]),
        (["*.layers.1.*fc1"], [1, "fc1"]),
        (["self_attn.[kv]_proj", "fc2"], [0, 1, "self_attn.k_proj", "self_attn.v_proj", "fc2"]),
        (["model.decoder.layers.0.fc1", "fc1"], [0, 1, "fc1"]),
    ],
)
def test_targets(targets: list[str], expected: list[Any], folder_of: Folder, tmp_path: Path) -> None:
    model = train_b(with_adapter(folder_of("opt"), targets=targets))
    blocks = [part for part in expected if isinstance(part, int)]
    wanted = {f"model.decoder.layers.{i}.{name}" for i in blocks for name in expected if isinstance(name, str)}
    folder = write(model, tmp_path / "adapter")
    assert read_adapter(folder).deltas().keys() == wanted
    assert torch.equal(logits(apply_adapter(qlm.load(folder_of("opt")), folder)), logits(model))
    assert (
        difference(logits(peft.PeftModel.from_pretrained(plain(folder_of("opt")), folder)), logits(model))
        < LOGITS_TOLERANCE
    )


@pytest.mark.parametrize("target", ["qproj", "lm_head", "embed_tokens", "self_attn", "layers.2.*"])
def test_targets_that_match_nothing(target: str, folder_of: Folder) -> None:
    with pytest.raises(
        UsageError, match=r"adapter.targets: .* matches none .*layers\.0\.self_attn\.q_proj.* fc2"
    ) as error:
        with_adapter(folder_of("opt"), targets=["fc1", target])
    assert repr(target) in str(error.value)


def test_quanto_takes_no_adapter(quantized: Quantized) -> None:
    with pytest.raises(UsageError, match="q_proj is a QLinear, which takes no adapter; float, nf4, int8 and gptq"):
        with_adapter(quantized("opt", "quanto"))


@pytest.mark.parametrize("kind", ["int8", "gptq"])
def test_quantized_weights_take_no_product_in(kind: str, quantized: Quantized) -> None:
    with pytest.raises(UsageError, match="qlm merge"):
        with_adapter(quantized("opt", kind)).merge_adapter()


class TestSvd:
    @pytest.mark.parametrize("kind", ["gptq-2", "gptq-3"])
    @pytest.mark.parametrize("variant", FAMILIES)
    def test_is_the_nearest_of_its_rank(self, variant: str, kind: str, quantized: Quantized, folder_of: Folder) -> None:
        floats = qlm.load(folder_of(variant))
        model = qlm.load(quantized(variant, kind))
        exact, before = logits(floats), logits(model)
        weight = lambda path: floats.get_submodule(path).weight  # noqa: E731
        asked = adapter_recipe(r=16, alpha=24, initialization="svd")
        model = attach(model, spec_of(model), asked, "causal-lm", 0, float_weight=weight)
        for path in linear_shapes(model, spec_of(model)):
            layer = model.get_base_model().get_submodule(path)
            with torch.no_grad(), float_activations():
                quantized_weight = layer.base_layer(torch.eye(layer.in_features)).T - layer.base_layer.bias[:, None]
            error = (weight(path) - quantized_weight).double()
            product = layer.get_delta_weight("default").double()
            lost = torch.linalg.svdvals(error)[16:].square().sum().sqrt()
            assert (error - product).norm() <= lost * (1 + 1e-4), path
            assert product.norm() > 0.2 * error.norm()
        assert (logits(model) - exact).square().mean() < 0.95 * (before - exact).square().mean()

    def test_what_it_does_not_need_starts_as_standard(self, folder_of: Folder, quantized: Quantized) -> None:
        """Float weights of rank 3 more than the quantized ones: the other ranks learn all the same."""
        model, standard = qlm.load(quantized("opt", "gptq-2")), with_adapter(quantized("opt", "gptq-2"), r=8)
        generator = torch.Generator().manual_seed(0)

        def weight(path: str) -> Tensor:
            low = torch.randn(linear.out_features, 3, generator=generator) @ torch.randn(
                3, linear.in_features, generator=generator
            )
            return dequantized(linear).double() + 0.01 * low.double()

        linear = model.get_submodule("model.decoder.layers.0.fc1")
        model = attach(
            model, spec_of(model), adapter_recipe(r=8, initialization="svd", targets=["*.0.fc1"]), "causal-lm", 0,
            float_weight=weight,
        )  # fmt: skip
        layer = model.get_base_model().get_submodule("model.decoder.layers.0.fc1")
        b = layer.lora_B["default"].weight
        assert (b.abs().amax(0) > 0).tolist() == [True] * 3 + [False] * 5
        assert (layer.lora_A["default"].weight.abs().amax(1) > 0).all()
        assert (
            b.dtype
            == standard.get_base_model().get_submodule("model.decoder.layers.0.fc1").lora_B["default"].weight.dtype
        )

    @pytest.mark.parametrize(
        ("kind", "given", "words"),
        [
            ("float", True, "is not quantized; use standard"),
            ("int8", True, "svd is for 3 bits and less, and .*layers.0.* has 8; use standard"),
            ("nf4", True, "svd is for 3 bits and less, and .*layers.0.* has 4; use standard"),
            ("gptq", True, "svd is for 3 bits and less, and .*layers.0.* has 4; use standard"),
            ("gptq-8", True, "svd is for 3 bits and less, and .*layers.0.* has 8; use standard"),
            ("gptq-3", False, "svd needs the float weights"),
        ],
    )
    def test_refused(self, kind: str, given: bool, words: str, quantized: Quantized, folder_of: Folder) -> None:
        model, floats = qlm.load(quantized("opt", kind)), qlm.load(folder_of("opt"))
        weight = (lambda path: floats.get_submodule(path).weight) if given else None
        with pytest.raises(UsageError, match=words):
            attach(model, spec_of(model), adapter_recipe(initialization="svd"), "causal-lm", 0, float_weight=weight)

    def test_of_another_model(self, quantized: Quantized) -> None:
        model, other = qlm.load(quantized("opt", "gptq-3")), tiny_models.build("opt", seed=9)
        with pytest.raises(
            UsageError, match=r"q_proj differs from the float weight by .*, which is more than all of it"
        ):
            attach(
                model, spec_of(model), adapter_recipe(initialization="svd"), "causal-lm", 0,
                float_weight=lambda path: other.get_submodule(path).weight,
            )  # fmt: skip


@pytest.mark.parametrize("variant", FAMILIES)
class TestPlainPeft:
    @pytest.mark.parametrize("kind", ["float", "nf4"])
    def test_reads_ours(self, variant: str, kind: str, quantized: Quantized, tmp_path: Path) -> None:
        """On transformers' own class: from the float folder, and with bitsandbytes from the nf4 folder."""
        ours = train_b(with_adapter(quantized(variant, kind)))
        folder = write(ours, tmp_path / "adapter")
        theirs = peft.PeftModel.from_pretrained(plain(quantized(variant, kind)), folder)
        assert difference(logits(ours), logits(theirs)) < LOGITS_TOLERANCE
        names = set(load_file(folder / WEIGHTS))
        path = next(iter(linear_shapes(ours, spec_of(ours))))
        assert {f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"} <= names
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)  # which would ask the hub
        assert set(load_file(tmp_path / "theirs" / WEIGHTS)) == names
        written, again = (json.loads((f / CONFIG).read_text()) for f in (folder, tmp_path / "theirs"))
        assert sorted(again.pop("target_modules")) == written.pop("target_modules")
        assert again | {"base_model_name_or_path": "base"} == written

    @pytest.mark.parametrize("kind", KINDS)
    def test_is_read(self, variant: str, kind: str, quantized: Quantized, folder_of: Folder, tmp_path: Path) -> None:
        """What PEFT writes, with the fields that change its scalings; the same delta on every backend."""
        spec = SPECS[model_type(variant)]
        ends = list(spec.lora_targets)
        config = peft.LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=ends,
            rank_pattern={ends[0]: 8},
            alpha_pattern={ends[-1]: 20},
        )
        theirs = train_b(peft.get_peft_model(plain(folder_of(variant)), config))
        theirs.save_pretrained(tmp_path / "theirs")
        assert json.loads((tmp_path / "theirs" / CONFIG).read_text())["auto_mapping"] is not None
        adapter = read_adapter(tmp_path / "theirs")
        assert adapter.task == "causal-lm"
        shapes = linear_shapes(theirs, spec)
        assert adapter.deltas().keys() == shapes.keys()
        for path, delta in adapter.deltas().items():
            expected = theirs.get_base_model().get_submodule(path).get_delta_weight("default")
            torch.testing.assert_close(
                delta.scaling * torch.from_numpy(delta.b @ delta.a), expected.detach(), atol=1e-6, rtol=1e-5
            )
        base = qlm.load(quantized(variant, kind))
        before = logits(base)
        ours = apply_adapter(base, tmp_path / "theirs")
        assert not any(p.requires_grad for p in ours.parameters())
        if kind == "float":
            assert difference(logits(ours), logits(theirs)) < LOGITS_TOLERANCE
        assert difference(logits(ours), before) > 0.1
        layer = ours.get_base_model().get_submodule(path)
        torch.testing.assert_close(
            layer.get_delta_weight("default"), delta.scaling * torch.from_numpy(delta.b @ delta.a), atol=1e-6, rtol=1e-5
        )
        learned = apply_adapter(qlm.load(quantized(variant, kind)), tmp_path / "theirs", trainable=True)
        assert {name for name, p in learned.named_parameters() if p.requires_grad} == {
            f"base_model.model.{path}.lora_{side}.default.weight" for path in shapes for side in "AB"
        }


@pytest.mark.parametrize(("variant", "task"), TASKS, ids=lambda value: value)
class TestHeads:
    @pytest.mark.parametrize("kind", ["float", "nf4"])
    def test_are_trained_in_full_and_saved(
        self, variant: str, task: Any, kind: str, quantized: Quantized, folder_of: Folder, tmp_path: Path
    ) -> None:
        model = with_adapter(quantized(variant, kind), task)
        head = HEADS[task]
        learned = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
        assert learned
        assert all(f"{head}.modules_to_save.default." in name for name in learned)
        train_b(model)
        folder = write(model, tmp_path / "adapter")
        names = {name.rpartition(".")[2] for name in learned}
        read = read_adapter(folder)
        assert read.task == task
        assert read.heads().keys() == {f"{head}.{name}" for name in names}
        ours = apply_adapter(qlm.load(quantized(variant, kind), task=task, new_head=True), folder)
        ours.config.pad_token_id = 1
        assert torch.equal(logits(ours), logits(model))
        base = plain(quantized(variant, kind), task)
        base.config.pad_token_id = 1
        theirs = peft.PeftModel.from_pretrained(base, folder)
        assert difference(logits(ours), logits(theirs)) < LOGITS_TOLERANCE

    def test_plain_transformers_reads_one_in_an_nf4_folder(
        self, variant: str, task: Any, folder_of: Folder, text_file: Path, tmp_path: Path
    ) -> None:
        """Of a model with a head of its own, quantized for that task."""
        kind = getattr(transformers, SPECS[model_type(variant)].model_classes[task])
        config = tiny_models.VARIANTS[variant]().config
        config.pad_token_id = 1
        tiny_models.randomized(kind(config), torch.float16).save_pretrained(tmp_path / "float")
        (tmp_path / "float" / "tokenizer.json").write_bytes((folder_of(variant) / "tokenizer.json").read_bytes())
        text = recipe_text(tmp_path / "float", tmp_path / "nf4", "nf4", text_file, extra=f"task: {task}\n")
        qlm.quantize(parse_recipe(text, "r.yaml"))
        ours = qlm.load(tmp_path / "nf4", task=task)
        assert difference(logits(ours), logits(plain(tmp_path / "nf4", task))) < LOGITS_TOLERANCE

    def test_belong_to_their_task(self, variant: str, task: Any, folder_of: Folder, tmp_path: Path) -> None:
        folder = write(with_adapter(folder_of(variant), task), tmp_path / "adapter")
        with pytest.raises(DataError, match=rf"holds {HEADS[task]}\.\w+, the head of the task {task}.*load it for"):
            apply_adapter(qlm.load(folder_of(variant)), folder)
        tensors = load_file(folder / WEIGHTS)
        name = f"base_model.model.{HEADS[task]}.weight"
        save_file({**tensors, name: torch.zeros(2, 64)}, folder / WEIGHTS)
        with pytest.raises(DataError, match=r"has shape \[2, 64\], the model's is \[2, 128\]"):
            apply_adapter(qlm.load(folder_of(variant), task=task, new_head=True), folder)
        tensors.pop(name)
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(DataError, match=rf"lacks {HEADS[task]}.weight, the head of its task"):
            apply_adapter(qlm.load(folder_of(variant), task=task, new_head=True), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters(kind: str, quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized(FAMILIES[0], kind)
    one = write(train_b(with_adapter(folder), 1), tmp_path / "one")
    two = write(train_b(with_adapter(folder, name="b", r=8, targets=["fc1"]), 2, "b"), tmp_path / "two", "b")
    expected = [logits(apply_adapter(qlm.load(folder), adapter)) for adapter in (one, two)]
    base = logits(qlm.load(folder))
    both = apply_adapter(apply_adapter(qlm.load(folder), one, "one"), two, "two")
    assert torch.equal(logits(both), expected[0])
    both.set_adapter("two")
    assert torch.equal(logits(both), expected[1])
    with both.disable_adapter():
        assert torch.equal(logits(both), base)
    both.set_adapter("one")
    assert torch.equal(logits(both), expected[0])
    with pytest.raises(UsageError, match="has one called 'two' already"):
        apply_adapter(both, two, "two")
    # Each can be written by itself, and a fresh one learned beside them.
    assert files_of(both, "base", "two")[0].keys() == load_file(two / WEIGHTS).keys()
    third = attach(both, spec_of(both.get_base_model()), adapter_recipe(targets=["fc2"]), "causal-lm", 0, "three")
    assert third.active_adapter == "three"
    assert all(".three." in name for name, p in third.named_parameters() if p.requires_grad)
    assert torch.equal(logits(third), base)


# --- bad input ----------------------------------------------------------------------------------------------------------

A = "base_model.model.model.decoder.layers.0.fc1.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


@pytest.fixture
def damaged(adapter_of: Folder, tmp_path: Path) -> Path:
    shutil.copytree(adapter_of("opt"), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder: Path, kind: type[QlmError] = DataError) -> str:
    with pytest.raises(kind) as error:
        read_adapter(folder)
    line = str(error.value)
    assert "\n" not in line
    assert folder.name in line
    return line


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("peft_type", "LOHA", "peft_type is 'LOHA'"),
        ("peft_type", None, "has no peft_type"),
        ("use_dora", True, "use_dora is True, which changes what the adapter computes"),
        ("fan_in_fan_out", True, "fan_in_fan_out is True"),
        ("bias", "all", "bias is 'all'"),
        ("lora_bias", True, "lora_bias is True"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights is 'pissa_niter_4'"),
        ("init_lora_weights", "loftq", "init_lora_weights is 'loftq'"),
        ("layer_replication", [[0, 2], [1, 2]], "layer_replication is"),
        ("trainable_token_indices", [1], "trainable_token_indices is"),
        ("target_parameters", ["x"], "target_parameters is"),
        ("use_qalora", True, "use_qalora is"),
        ("enable_lora", [True, False], "enable_lora is"),
        ("megatron_core", "my.code", "megatron_core is 'my.code'"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens is"),
        ("auto_mapping", {"base_model_class": "X", "parent_library": "os"}, "auto_mapping asks for code"),
        ("auto_mapping", {"parent_library": "transformers.models_of_mine"}, "auto_mapping asks for code"),
        ("task_type", "SEQ_2_SEQ_LM", "task_type is 'SEQ_2_SEQ_LM'; qlm knows"),
        ("a_new_field", 1, "unknown field 'a_new_field'"),
        ("r", 0, "r is 0; expected a whole number"),
        ("r", True, "r is True; expected a whole number"),
        ("r", 8, "lora_A.weight has shape [4, 128]; adapter_config.json implies [8, in features]"),
        ("lora_alpha", -1, "lora_alpha is -1; expected a number above 0"),
        ("lora_alpha", "16", "lora_alpha is '16'"),
        ("lora_dropout", 1.0, "lora_dropout is 1.0"),
        ("use_rslora", 1, "use_rslora is 1"),
        ("target_modules", [1], "target_modules is [1]"),
        ("modules_to_save", "score", "modules_to_save is 'score'"),
        ("rank_pattern", {"fc1": 8}, "adapter_config.json implies [8, in features]"),
        ("rank_pattern", {"(a+)+$": 8}, "rank_pattern is {'(a+)+$': 8}; expected names"),
        ("alpha_pattern", {"fc1": 0}, "alpha_pattern is {'fc1': 0}"),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_something_else(field: str, value: Any, words: str, damaged: Path) -> None:
    change_json(damaged / CONFIG, **{field: value})
    assert words in refused(damaged)


def set_to(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[A].view(-1)[5].fill_(math.nan), f"{A}: 1 of 512 values are NaN or infinite, the first at [0, 5]"),
        (lambda t: t[B].view(-1)[5].fill_(math.inf), f"{B}: 1 of 1024 values are NaN"),
        (lambda t: t.pop(A), "layers.0.fc1 lacks its lora_A.weight"),
        (lambda t: t.pop(B), "layers.0.fc1 lacks its lora_B.weight"),
        (lambda t: t.clear(), "holds no adapter"),
        (set_to(A, torch.zeros(4)), "fc1: lora_A.weight has shape [4]"),
        (set_to(B, torch.zeros(256, 5)), "fc1: lora_B.weight has shape [256, 5]; adapter_config.json implies [out features, 4]"),
        (set_to(A, torch.zeros(4, 128, dtype=torch.int8)), f"{A} is I8; expected BF16 or F16 or F32"),
        (set_to("model.decoder.layers.0.fc1.weight", torch.zeros(2)), "layers.0.fc1.weight is not known"),
        (set_to(A.replace("lora_A.weight", "lora_magnitude_vector"), torch.zeros(2)), "lora_magnitude_vector is not known"),
        (set_to("base_model.model.lm_head.weight", torch.zeros(320, 128)), "lm_head.weight is not known"),
        (set_to("base_model.model.score.weight", torch.zeros(2, 128)), "holds a score, and task_type of adapter_config.json is CAUSAL_LM"),
    ],
)  # fmt: skip
def test_damaged_tensors(change: Callable[[dict[str, Tensor]], Any], words: str, damaged: Path) -> None:
    edit(damaged, change)
    assert words in refused(damaged)


def test_damaged_files(damaged: Path) -> None:
    whole = (damaged / WEIGHTS).read_bytes()
    for name, data, words in (
        (WEIGHTS, whole[:-8], "truncated"),
        (WEIGHTS, whole + b"x", "1 bytes after the last tensor"),
        (WEIGHTS, struct.pack("<Q", 1 << 40) + whole[8:], "header"),
        (WEIGHTS, b"", "too few"),
        (CONFIG, b'{"r": 4, "r": 8}', "appears twice"),
        (CONFIG, b"[]", "expected an object"),
    ):
        before = (damaged / name).read_bytes()
        (damaged / name).write_bytes(data)
        assert words in refused(damaged)
        (damaged / name).write_bytes(before)
    read_adapter(damaged)
    (damaged / "elsewhere").write_bytes(whole)
    (damaged / WEIGHTS).unlink()
    assert "has no adapter_model.safetensors" in refused(damaged, MissingInput)
    (damaged / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert "is a pickle: save it as safetensors" in refused(damaged, MissingInput)
    outside = damaged.parent / "outside"
    outside.write_bytes(whole)
    (damaged / WEIGHTS).symlink_to(outside)
    assert "outside the model's folder" in refused(damaged)
    assert "no such folder" in refused(damaged / "none", MissingInput)
    assert "is a file" in refused(damaged / CONFIG, MissingInput)


def test_for_another_model(adapter_of: Folder, folder_of: Folder, damaged: Path) -> None:
    def line(model: Any, folder: Path) -> str:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(DataError) as error:
            apply_adapter(model, folder)
        assert model.state_dict().keys() == before.keys()
        return str(error.value)

    words = "has an adapter for gpt_neox.layers.0.attention.dense, which this opt does not have (it has model.decoder.layers.0."
    assert words in line(qlm.load(folder_of("opt")), adapter_of(FAMILIES[1]))
    assert "which this gpt_bigcode does not have" in line(qlm.load(folder_of(FAMILIES[2])), adapter_of("opt"))
    assert "layers.1.fc1" in line(tiny_models.opt(num_hidden_layers=1), adapter_of("opt"))
    wider = tiny_models.opt(hidden_size=256, word_embed_proj_dim=256)
    words = (
        "layers.0.fc1: the adapter is for [256, 128] weights, the base has [256, 256] there; it belongs to another base"
    )
    assert words in line(wider, adapter_of("opt"))
    edit(damaged, lambda t: (t.pop(A), t.pop(B)))
    words = "lacks the tensors of model.decoder.layers.0.fc1 (1 linears in all), which target_modules of adapter_config.json names"
    assert words in line(qlm.load(folder_of("opt")), damaged)


def test_facts_of_a_base(folder_of: Folder, quantized: Quantized, tmp_path: Path, text_file: Path) -> None:
    """A float base names itself, a quantized one also what it was made from, and whether its weights were smoothed."""
    floats = base_facts(folder_of("opt"))
    assert floats["float_files"] == {}
    assert {"model.safetensors", "config.json", "tokenizer.json"} == floats["files"].keys()
    for kind in ("nf4", "gptq", "int8"):
        facts = base_facts(quantized("opt", kind))
        assert facts["float_files"] == floats["files"]
        assert facts["files"].keys() >= {"model-00001-of-00003.safetensors", "config.json"}
        assert facts["smoothed"] is False
    text = recipe_text(folder_of("opt"), tmp_path / "smooth", "int8", text_file, quality="balanced")
    assert base_facts(qlm.quantize(parse_recipe(text, "r.yaml")).output)["smoothed"] is True
