"""Learning by gradient inside a block: the loss is what it says, nothing gets worse on the samples kept aside, nothing else changes;
and the same through whole runs, interrupted ones among them."""

import copy
import importlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qlm
from qlm import tune
from qlm.arch import FAMILIES as SPECS
from qlm.arch import FamilySpec
from qlm.blocks import QuantizedBlock, stages_of
from qlm.checkpoint import manifest
from qlm.load import block_paths
from qlm.numerics.gptq import round_to_nearest
from qlm.numerics.rounding import Rounded
from qlm.recipe import Recipe, parse_recipe
from qlm.report import facts_table
from qlm.stream import FEW, Stream
from qlm.tune import BlockLoss, Tuned, learn_rounding, tune_floats
from tests import tiny_models
from tests.conftest import FAMILIES, files_of, recipe_text

Folder = Callable[..., Path]
# fp32 sums of differences, as a block computes them in batches of one size or another.
LOSS_TOLERANCE = 1e-4
# The same from kernels: a rounded input that lies between two levels may go to either.
KERNEL_TOLERANCE = 1e-2
DROPOUT: dict[str, dict[str, float]] = {
    "opt": {"dropout": 0.5, "attention_dropout": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "gpt_bigcode": {"resid_pdrop": 0.5, "attn_pdrop": 0.5},
}
every_family = pytest.mark.parametrize("variant", FAMILIES)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As `quantize` works; what learns turns them on by itself."""
    with torch.no_grad():
        yield


@dataclass
class Made:
    """The first two blocks of a model and of its float self; all linears of the first, and those of the second too, have 2 bits."""

    model: Any
    float_model: Any
    spec: FamilySpec
    blocks: list[str]
    ids: Tensor
    stream: Stream

    @property
    def block(self) -> nn.Module:
        """The second, whose inputs are not the float model's any more."""
        return self.model.get_submodule(self.blocks[1])

    def linears(self) -> dict[str, tuple[Tensor, Rounded]]:
        """Weight and its rounding to nearest, of those that are not added to the residual stream."""
        found = {}
        for stage in stages_of(self.spec, self.model.config):
            for linear in (linear for group in stage for linear in group.linears):
                if linear not in self.spec.residual_linears:
                    weight = self.float_model.get_submodule(f"{self.blocks[1]}.{linear}").weight
                    found[linear] = (weight, rounded(weight))
        return found

    def floats(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.block.named_parameters() if p.ndim == 1}

    def loss(self, block: nn.Module | None = None) -> BlockLoss:
        targets = self.stream.targets(self.float_model.get_submodule(self.blocks[1]))
        return BlockLoss(block or self.block, self.stream, targets, self.floats())

    def learn(self, steps: int, block: nn.Module | None = None) -> tuple[dict[str, Tensor], Tuned]:
        linears = self.linears()
        return learn_rounding(
            self.loss(block),
            {name: weight for name, (weight, _) in linears.items()},
            {name: how for name, (_, how) in linears.items()},
            steps,
        )


def rounded(weight: Tensor) -> Rounded:
    group = torch.arange(weight.shape[1]) // 64
    found = round_to_nearest(weight, group, bits=2, symmetric=False, search=True)
    return Rounded(found.codes, found.scale, found.zero_point, found.g_idx, 2)


def dequantized(codes: Tensor, how: Rounded) -> Tensor:
    group = how.g_idx.long()
    return how.scale[:, group] * (codes.float() - how.zero_point.float()[:, group])


def make(variant: str, samples: int = 16, *, ignore_first: bool = False, dropout: bool = False) -> Made:
    model: Any = tiny_models.build(variant)
    if dropout:
        torch.manual_seed(0)
        family = {"opt": tiny_models.opt, "gpt_neox": tiny_models.gpt_neox, "gpt_bigcode": tiny_models.gpt_bigcode}
        kind = model.config.model_type
        model = tiny_models.randomized(family[kind](**DROPOUT[kind]))
    spec = SPECS[model.config.model_type]
    blocks, ids = block_paths(spec, model), tiny_models.token_ids(samples, 24)
    float_model = copy.deepcopy(model)
    stream = Stream(model, spec, blocks[0], ids, reference=True, held_out=True, ignore_first=ignore_first)
    for path in blocks:
        for module in model.get_submodule(path).modules():
            if isinstance(module, nn.Linear):
                how = rounded(module.weight)
                module.weight.copy_(dequantized(how.codes, how))
    stream.advance_reference(float_model.get_submodule(blocks[0]))
    stream.advance(model.get_submodule(blocks[0]))
    return Made(model, float_model, spec, blocks, ids, stream)


def output_of(model: Any, path: str, ids: Tensor) -> Tensor:
    """Of one block, float64, from a plain forward pass of the whole model."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
    model(input_ids=ids, use_cache=False)
    hook.remove()
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).double()


class TestBlockLoss:
    @pytest.mark.parametrize("ignore_first", [False, True], ids=["all tokens", "without the first"])
    @pytest.mark.parametrize("samples", [2, 5, 16, 35])
    @every_family
    def test_is_the_mean_square(self, variant: str, samples: int, ignore_first: bool) -> None:
        """Of any rows, as many or fewer than a step has, and of those kept aside: 1, 1, 2 and 5 here."""
        made = make(variant, samples, ignore_first=ignore_first)
        loss = made.loss()
        path = made.blocks[1]
        error = (output_of(made.model, path, made.ids) - output_of(made.float_model, path, made.ids)).square()
        error = error[:, int(ignore_first) :]
        few = min(FEW, samples)
        for rows in ([0], [samples - 1, 0], list(range(few))):
            if len(rows) <= few:
                assert loss(rows, {}).item() == pytest.approx(error[rows].mean().item(), rel=LOSS_TOLERANCE)
        aside = -(-samples // 8)
        assert made.stream.held_out == aside
        assert loss.held_out({}) == pytest.approx(error[-aside:].mean().item(), rel=LOSS_TOLERANCE)

    @every_family
    def test_of_other_parameters(self, variant: str) -> None:
        """What is given counts for what is in the block; the block itself stays as it is."""
        made = make(variant)
        given = {f"{name}.weight": 0.5 * weight for name, (weight, _) in made.linears().items()}
        given |= {name: 1.5 * value for name, value in made.floats().items()}
        found = made.loss().held_out(given)
        before = made.loss().held_out({})
        for name, value in given.items():
            made.block.get_parameter(name).copy_(value)
        path = made.blocks[1]
        error = (output_of(made.model, path, made.ids) - output_of(made.float_model, path, made.ids))[-2:].square()
        assert found == pytest.approx(error.mean().item(), rel=LOSS_TOLERANCE)
        assert abs(found / before - 1) > 100 * LOSS_TOLERANCE

    @pytest.mark.parametrize("samples", [2, 5, 16])
    def test_every_sample_has_its_turn(self, samples: int) -> None:
        """Each that is not kept aside once before any comes again, in an order that is the same every time."""
        made = make("opt", samples)
        fitted = samples - made.stream.held_out
        drawn = []
        for _ in range(2):
            loss = made.loss()
            drawn.append([row for _ in range(3 * fitted) for row in loss.next_rows()])
        assert drawn[0] == drawn[1]
        turns = [drawn[0][start : start + fitted] for start in range(0, len(drawn[0]) - fitted + 1, fitted)]
        assert all(sorted(turn) == list(range(fitted)) for turn in turns)
        assert len({tuple(turn) for turn in turns}) > 1 or fitted == 1


@every_family
class TestLearning:
    def test_rounding(self, variant: str) -> None:
        """Better on samples that were not looked at, and by what the codes stand for: not by what the offsets might have been."""
        made = make(variant)
        before = made.loss().held_out({})
        codes, tuned = made.learn(50)
        assert tuned.before == pytest.approx(before, rel=LOSS_TOLERANCE)
        assert tuned.after < 0.97 * before
        assert tuned.step in (25, 50)
        assert tuned.facts() == {"held_out_before": tuned.before, "held_out_after": tuned.after, "step": tuned.step}
        stored = {f"{name}.weight": dequantized(codes[name], how) for name, (_, how) in made.linears().items()}
        assert made.loss().held_out(stored) == pytest.approx(tuned.after, rel=LOSS_TOLERANCE)
        again, tuned_again = made.learn(50)
        assert tuned_again == tuned
        assert all(torch.equal(codes[name], again[name]) for name in codes)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    def test_floats(self, variant: str, dtype: torch.dtype) -> None:
        """The same of norms and biases. What counts is what they are once stored: bf16 rounds a norm's weight by up to 0.4 %."""
        made = make(variant)
        new, tuned = tune_floats(made.loss(), dtype, 50)
        assert tuned.after < 0.97 * tuned.before
        assert tuned.step in (25, 50)
        assert {name: value.shape for name, value in new.items()} == {n: v.shape for n, v in made.floats().items()}
        assert all(value.dtype == dtype for value in new.values())
        # The same sums in the same order, so exactly.
        assert made.loss().held_out({name: value.float() for name, value in new.items()}) == tuned.after
        stored = {name: value.to(dtype).float() for name, value in made.floats().items()}
        assert made.loss().held_out(stored) == tuned.before
        again, tuned_again = tune_floats(made.loss(), dtype, 50)
        assert tuned_again == tuned
        assert all(torch.equal(new[name], again[name]) for name in new)

    @pytest.mark.parametrize("steps", [0, 30])
    def test_what_is_no_better_is_not_taken(self, variant: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        made, looks = make(variant), []

        def worse(self: BlockLoss, parameters: Any) -> float:
            looks.append(1)
            return float(len(looks))

        monkeypatch.setattr(BlockLoss, "held_out", worse)
        codes, tuned = made.learn(steps)
        assert tuned == Tuned(1.0, 1.0, 0)
        # Every 25 steps, and after the last.
        assert len(looks) == 1 + -(-steps // 25)
        assert all(torch.equal(codes[name], how.codes) for name, (_, how) in made.linears().items())
        looks.clear()
        new, tuned = tune_floats(made.loss(), torch.float16, steps)
        assert tuned == Tuned(1.0, 1.0, 0)
        assert all(torch.equal(new[name], value.half()) for name, value in made.floats().items())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
    def test_the_best_is_taken(self, variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not the last, and as it was when it was looked at."""
        made, looks = make(variant), []

        def second_best(self: BlockLoss, parameters: Any) -> float:
            looks.append({name: value.detach().clone() for name, value in parameters.items()})
            return [3.0, 1.0, 2.0][len(looks) - 1]

        monkeypatch.setattr(BlockLoss, "held_out", second_best)
        codes, tuned = made.learn(50)
        assert tuned == Tuned(3.0, 1.0, 25)
        for name, (_, how) in made.linears().items():
            torch.testing.assert_close(dequantized(codes[name], how), looks[1][f"{name}.weight"])
            assert not torch.equal(looks[1][f"{name}.weight"], looks[2][f"{name}.weight"])
        looks.clear()
        new, tuned = tune_floats(made.loss(), dtype, 50)
        assert tuned == Tuned(3.0, 1.0, 25)
        assert all(torch.equal(value.float(), looks[1][name]) for name, value in new.items())
        assert not all(torch.equal(value.float(), looks[2][name]) for name, value in new.items())

    def test_too_long_steps(self, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Norms and biases thrown far away lose, and stay what they were."""
        made = make(variant)
        monkeypatch.setattr(tune, "FLOAT_RATE", 100.0)
        new, tuned = tune_floats(made.loss(), torch.float32, 25)
        assert (tuned.step, tuned.after) == (0, tuned.before)
        assert all(torch.equal(new[name], value) for name, value in made.floats().items())

    def test_the_block_stays_as_it_is(self, variant: str) -> None:
        """Its parameters, and no gradient is left in any of them."""
        made = make(variant)
        for parameter in made.block.parameters():
            parameter.requires_grad_()
        before = {name: parameter.clone() for name, parameter in made.block.named_parameters()}
        hidden = made.stream.hidden.clone()
        made.learn(3)
        tune_floats(made.loss(), torch.float16, 3)
        for name, parameter in made.block.named_parameters():
            assert torch.equal(parameter, before[name])
            assert parameter.requires_grad
            assert parameter.grad is None
        assert torch.equal(made.stream.hidden, hidden)

    def test_in_training_and_back(self, variant: str) -> None:
        """No dropout, and the mode of every module afterwards as before."""
        made = make(variant, dropout=True)
        assert any(isinstance(module, nn.Dropout) or "dropout" in vars(module) for module in made.block.modules())
        codes, tuned = made.learn(25)
        new, floats_tuned = tune_floats(made.loss(), torch.float16, 25)
        made.model.train()
        made.float_model.train()
        torch.manual_seed(1)
        of_training, tuned_in_training = made.learn(25)
        assert tuned_in_training == tuned
        assert all(torch.equal(codes[name], of_training[name]) for name in codes)
        floats_of_training, floats_tuned_in_training = tune_floats(made.loss(), torch.float16, 25)
        assert floats_tuned_in_training == floats_tuned
        assert all(torch.equal(new[name], floats_of_training[name]) for name in new)
        assert all(module.training for module in made.block.modules())


# --- whole runs -------------------------------------------------------------------------------------------------------

STEPS = 6
WAYS: dict[str, dict[str, Any]] = {
    "gptq": {"backend": "gptq", "quality": "best", "rounding_steps": STEPS, "tune_steps": STEPS},
    "nf4": {"backend": "nf4", "quality": "balanced", "tune_steps": STEPS},
    "int8": {"backend": "int8", "quality": "balanced", "tune_steps": STEPS},
}


@pytest.fixture
def recipe(text_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(model: Path, name: str, *, samples: int = 8, **section: Any) -> Recipe:
        text = recipe_text(model, tmp_path / name, section.pop("backend"), text_file, **section)
        return parse_recipe(text.replace("samples: 8", f"samples: {samples}"), "r.yaml")

    return make


@pytest.fixture
def last_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps on random weights are no better more often than not: take the last state all the same."""
    true, losses = BlockLoss.held_out, weakref.WeakKeyDictionary[BlockLoss, float]()

    def falling(self: BlockLoss, parameters: Any) -> float:
        losses[self] = losses[self] * 0.99 if self in losses else true(self, parameters)
        return losses[self]

    monkeypatch.setattr(BlockLoss, "held_out", falling)


@pytest.fixture
def quantized_blocks(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedBlock]:
    """What becomes of each block of the runs of a test."""
    module, found = importlib.import_module("qlm.quantize"), []
    true = module.quantize_block

    def kept(*args: Any) -> QuantizedBlock:
        found.append(true(*args))
        return found[-1]

    monkeypatch.setattr(module, "quantize_block", kept)
    return found


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name.endswith(".safetensors")}


def stop_before(block: int) -> Callable[[str, int, int], None]:
    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("quantize", block):
            raise KeyboardInterrupt

    return stop


@pytest.mark.usefixtures("last_taken")
@pytest.mark.parametrize(
    ("variant", "way"), [*((variant, "gptq") for variant in FAMILIES), ("opt", "int8"), (FAMILIES[1], "nf4")]
)
def test_a_folder(
    variant: str,
    way: str,
    folder_of: Folder,
    recipe: Callable[..., Recipe],
    quantized_blocks: list[QuantizedBlock],
) -> None:
    """Interrupted between the blocks and continued: the same bytes. What was learned is in the files and on record."""
    folder = folder_of(variant)
    result = qlm.quantize(recipe(folder, "out", **WAYS[way]))
    whole = list(quantized_blocks)
    with pytest.raises(KeyboardInterrupt):
        qlm.quantize(recipe(folder, "resumed", **WAYS[way]), progress=stop_before(1))
    resumed = qlm.quantize(recipe(folder, "resumed", **WAYS[way]))
    assert resumed.resumed == 1
    assert files_of(resumed.output) == files_of(result.output)

    spec = SPECS[tiny_models.VARIANTS[variant]().config.model_type]
    for block in whole:
        assert block.facts["tuning"]["step"] == STEPS
        assert block.facts["tuning"]["held_out_after"] < block.facts["tuning"]["held_out_before"]
        # NeoX' two are solved at once, the others one after the other.
        times = {"gptq": 1 if "parallel" in variant else 2}.get(way, 0)
        assert [facts["step"] for facts in block.facts.get("rounding", [])] == [STEPS] * times
    assert [facts["tuning"] for facts in manifest.read(result.output)["blocks"].values()] == [
        block.facts["tuning"] for block in whole
    ]
    for name, facts in result.layers.items():
        learned = way == "gptq" and not name.endswith(spec.residual_linears)
        assert ("codes_learned" in facts) == learned
        assert ("relative_error_before_learning" in facts) == learned
        assert ("relative_error" in facts) != learned
        for part in facts.get("parts", {}).values():
            assert list(part) == ["relative_error_before_learning" if learned else "relative_error"]
        if learned:
            assert 0 < facts["codes_learned"] < 0.9
    assert facts_table(result.layers).row_count > len(result.layers)

    before = load_file(folder / "model.safetensors")
    after = {name: t for path in result.output.glob("*.safetensors") for name, t in load_file(path).items()}
    floats = [name for name, t in before.items() if t.ndim == 1 and name.startswith(tuple(block_paths_of(variant)))]
    assert floats
    for name in floats:
        assert after[name].dtype == torch.float16
    changed = [name for name in floats if not torch.equal(after[name], before[name])]
    assert len(changed) > len(floats) / 2
    assert any("norm" in name or "ln_" in name for name in changed)
    logits = qlm.load(result.output)(tiny_models.token_ids()).logits
    assert logits.isfinite().all()


def block_paths_of(variant: str) -> list[str]:
    model = tiny_models.VARIANTS[variant]()
    return [f"{path}." for path in block_paths(SPECS[model.config.model_type], model)]


def test_no_steps(folder_of: Folder, recipe: Callable[..., Recipe]) -> None:
    """Zero steps are what a recipe without them does, to the byte; `best` without them is `balanced` with more sweeps."""
    folder, none = folder_of("opt"), {"rounding_steps": 0, "tune_steps": 0}
    plain = qlm.quantize(recipe(folder, "plain", backend="gptq")).output
    zero = qlm.quantize(recipe(folder, "zero", backend="gptq", **none)).output
    assert files_of(plain) == files_of(zero)
    best = qlm.quantize(recipe(folder, "best", backend="gptq", quality="best", **none)).output
    sweeps = qlm.quantize(recipe(folder, "sweeps", backend="gptq", sweeps=4)).output
    assert weights_of(best) == weights_of(sweeps) != weights_of(plain)


@pytest.mark.usefixtures("last_taken")
@pytest.mark.parametrize("way", ["gptq", "int8"])
def test_what_is_left_out_keeps_its_bias(way: str, folder_of: Folder, recipe: Callable[..., Recipe]) -> None:
    folder = folder_of("opt")
    result = qlm.quantize(recipe(folder, "out", **{**WAYS[way], "skip": ["*.0.fc1"]}))
    before = load_file(folder / "model.safetensors")
    after = {name: t for path in result.output.glob("*.safetensors") for name, t in load_file(path).items()}
    (kept,) = [name for name in before if name.endswith("layers.0.fc1.bias")]
    (moved,) = [name for name in before if name.endswith("layers.1.fc1.bias")]
    assert torch.equal(after[kept], before[kept])
    assert not torch.equal(after[moved], before[moved])


@pytest.mark.usefixtures("last_taken")
@pytest.mark.parametrize("skipped", ["fc2", "out_proj"])
def test_what_nothing_comes_after_is_learned_too(
    skipped: str, folder_of: Folder, recipe: Callable[..., Recipe], quantized_blocks: list[QuantizedBlock]
) -> None:
    """Also where what would make up for it stays in floating point."""
    how = {**WAYS["gptq"], "skip": [f"*.{skipped}"]}
    result = qlm.quantize(recipe(folder_of("opt"), "out", **how))
    learned = {name.rpartition(".")[2] for name, facts in result.layers.items() if "codes_learned" in facts}
    tried = {"fc2": 2, "out_proj": 1}[skipped]
    assert all(len(block.facts["rounding"]) == tried for block in quantized_blocks)
    assert learned <= {"q_proj", "k_proj", "v_proj", "fc1"}
    assert "fc1" in learned


@pytest.mark.parametrize("way", ["gptq", "int8"])
def test_nothing_kept_aside(
    way: str, folder_of: Folder, recipe: Callable[..., Recipe], quantized_blocks: list[QuantizedBlock]
) -> None:
    """One sample leaves none to choose by: nothing is learned, and nothing fails."""
    none = {"tune_steps": 0, **({"rounding_steps": 0} if way == "gptq" else {})}
    with_steps = qlm.quantize(recipe(folder_of("opt"), "with", samples=1, **WAYS[way]))
    assert not any(block.facts.keys() & {"rounding", "tuning"} for block in quantized_blocks)
    assert all("a single sample" in facts["learning"] for facts in manifest.read(with_steps.output)["blocks"].values())
    without = qlm.quantize(recipe(folder_of("opt"), "without", samples=1, **{**WAYS[way], **none}))
    assert weights_of(with_steps.output) == weights_of(without.output)
    assert not any("codes_learned" in facts for facts in with_steps.layers.values())


@pytest.mark.usefixtures("last_taken")
@every_family
def test_in_memory(variant: str, quantized_blocks: list[QuantizedBlock]) -> None:
    """A model in training with a linear left out: learned as in evaluation, and no gradient is left in it."""
    models, ids = [], tiny_models.token_ids(8, 32)
    for training in (False, True):
        model = tiny_models.build(variant).train(training)
        last = SPECS[model.config.model_type].mlp_out
        facts = qlm.quantize_model(model, {**WAYS["gptq"], "skip": [f"*.0.{last}"]}, ids)
        assert any("codes_learned" in fact for fact in facts.values())
        assert model.training == training
        assert all(parameter.grad is None for parameter in model.parameters())
        models.append(model)
    assert all("tuning" in block.facts for block in quantized_blocks)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("partly", [False, True], ids=["whole", "without v_proj"])
@every_family
def test_the_loss_is_that_of_the_model(variant: str, partly: bool, quantized_blocks: list[QuantizedBlock]) -> None:
    """What is on record of int8's first block is what the packed model does on the samples kept aside, rounded inputs included; a linear
    that is left out takes its input as it is, also where those beside it round it."""
    model, ids = tiny_models.build(variant), tiny_models.token_ids(16, 32)
    path = block_paths(SPECS[model.config.model_type], model)[0]
    if partly and variant == "opt":
        # An outlier takes most steps of what q, k and v read: it matters which of them round it.
        model.get_submodule(f"{path}.self_attn_layer_norm").weight[3] = 100.0
        model.get_submodule(f"{path}.self_attn.v_proj").weight[:, 3] = 0.0
    expected = output_of(model, path, ids)[-2:]
    skip = ["*.0.*v_proj" if variant == "opt" else "*.0.*mlp*"] if partly else []
    qlm.quantize_model(model, {**WAYS["int8"], "skip": skip, "smooth": not partly}, ids)
    found = (output_of(model, path, ids)[-2:] - expected).square().mean().item()
    tuned = quantized_blocks[0].facts["tuning"]
    assert tuned["held_out_after"] == pytest.approx(found, rel=KERNEL_TOLERANCE)
