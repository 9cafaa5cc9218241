"""The plan: figures that hold, and refusals that come before anything is written."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qlm
from qlm.errors import CannotCreate, Unavailable, UsageError
from qlm.plan import SMALL_FILES_BYTES, Plan, available_memory, free_disk, plan, refuse_if_too_large
from qlm.recipe import Recipe, parse_recipe
from tests import tiny_models
from tests.conftest import BACKENDS, FAMILIES, ROOT, recipe_text
from tests.pretend_gpu import pretend_gpu

plan_module = importlib.import_module("qlm.plan")
Folder = Callable[..., Path]


@pytest.fixture
def recipe(text_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(model: Path, backend: str = "int8", **more: Any) -> Recipe:
        return parse_recipe(recipe_text(model, tmp_path / "out", backend, text_file, **more), "test.yaml")

    return make


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_disk_is_what_the_output_takes(
    variant: str, backend: str, folder_of: Folder, recipe: Callable[..., Recipe]
) -> None:
    wanted = recipe(folder_of(variant), backend)
    needs = plan(wanted)
    result = qlm.quantize(wanted)
    assert needs.linears == len(result.layers)
    assert needs.disk - SMALL_FILES_BYTES == pytest.approx(result.bytes, rel=0.05)
    assert sum(path.stat().st_size for path in result.output.iterdir()) < needs.disk


MEASURE = """
import sys
import torch
torch.set_num_threads(1)
import qlm
from qlm.plan import plan
from qlm.recipe import load_recipe
from qlm.run import peak_memory, run_recipe
from dataclasses import replace
for path in sys.argv[1:]:
    recipe = load_recipe(path)
    needs = plan(recipe)
    peak_memory(reset=True)
    qlm.quantize(recipe)
    print(needs.quantize_memory, peak_memory(), needs.quantize_seconds)
"""


def test_memory_within_a_factor_of_two(tmp_path: Path, tokenizer_json: str, text_file: Path) -> None:
    """Of a model whose blocks and calibration matter beside the process itself."""
    width = {"hidden_size": 768, "ffn_dim": 3072, "word_embed_proj_dim": 768, "num_attention_heads": 12}
    tiny_models.opt(num_hidden_layers=2, max_position_embeddings=512, **width).half().save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer_json)
    recipes = []
    for backend in BACKENDS:
        recipes.append(tmp_path / f"{backend}.yaml")
        text = recipe_text(
            tmp_path / "model",
            tmp_path / backend,
            backend,
            text_file,
            **({"scale_search": "minmax"} if backend == "gptq" else {}),
        )
        recipes[-1].write_text(text.replace("samples: 8, length: 32", "samples: 24, length: 512"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *recipes],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for backend, line in zip(BACKENDS, done.stdout.splitlines(), strict=True):
        predicted, measured, seconds = map(float, line.split())
        print(f"{backend}: {predicted / 1e6:.0f} MB predicted, {measured / 1e6:.0f} MB measured; {seconds} s predicted")
        assert measured < predicted < 2 * measured


class TestRefusals:
    @staticmethod
    def needs(**changes: Any) -> Plan:
        values: dict[str, Any] = {
            "linears": 1, "quantize_memory": 2_000_000_000, "evaluate_memory": 1_000_000_000, "memory_available": 4_000_000_000,
            "disk": 1_000_000_000, "disk_free": 2_000_000_000, "quantize_seconds": 1.0, "evaluate_seconds": 0.0,
        }  # fmt: skip
        return Plan(**{**values, **changes})

    def test_enough(self, folder_of: Folder, recipe: Callable[..., Recipe]) -> None:
        refuse_if_too_large(recipe(folder_of("opt")), self.needs())
        assert self.needs().memory == 2_000_000_000
        assert self.needs().to_json()["memory"] == 2_000_000_000

    def test_disk(self, folder_of: Folder, recipe: Callable[..., Recipe]) -> None:
        with pytest.raises(CannotCreate, match=r"out needs 1\.00 GB, and 0\.50 GB are free there"):
            refuse_if_too_large(recipe(folder_of("opt")), self.needs(disk_free=500_000_000))

    def test_memory(self, folder_of: Folder, recipe: Callable[..., Recipe]) -> None:
        for need, what in (("quantize_memory", "quantizing"), ("evaluate_memory", "evaluating")):
            with pytest.raises(Unavailable, match=rf"{what} .* needs about 9\.00 GB of memory, and 4\.00 GB are"):
                refuse_if_too_large(recipe(folder_of("opt")), self.needs(**{need: 9_000_000_000}))

    def test_memory_of_a_gpu(self, folder_of: Folder, recipe: Callable[..., Recipe]) -> None:
        there = {"gpu_memory_available": 5_000_000_000}
        refuse_if_too_large(recipe(folder_of("opt")), self.needs(gpu_quantize_memory=4_900_000_000, **there))
        for need, what in (("gpu_quantize_memory", "quantizing"), ("gpu_evaluate_memory", "evaluating")):
            with pytest.raises(
                Unavailable, match=rf"{what} .* needs about 9\.00 GB .* and 5\.00 GB are available on the GPU"
            ):
                refuse_if_too_large(recipe(folder_of("opt")), self.needs(**{need: 9_000_000_000}, **there))

    def test_before_anything_is_written(
        self, folder_of: Folder, recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from qlm.report import Reporter
        from qlm.run import run_recipe

        monkeypatch.setattr(plan_module, "available_memory", lambda: 1000)
        with Reporter(quiet=True).progress("test") as tell, pytest.raises(Unavailable, match="of memory"):
            run_recipe("r.yaml", recipe(folder_of("opt")), tell=tell)
        assert list(tmp_path.iterdir()) == []

    def test_what_quantize_would_refuse(self, folder_of: Folder, recipe: Callable[..., Recipe]) -> None:
        with pytest.raises(UsageError, match="matches none"):
            plan(recipe(folder_of("opt"), skip=["*.nothing"]))
        made = qlm.quantize(recipe(folder_of("opt"))).output
        with pytest.raises(UsageError, match="quantized already"):
            plan(recipe(folder_of("opt")).model_copy(update={"model": str(made)}))


class TestWhatIsThere:
    def test_memory(self) -> None:
        assert 1e8 < available_memory() < 1e14

    def test_of_a_control_group(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Files in the page cache count as used by the group, but are no obstacle."""
        for name, text in {
            "memory.max": "1000000\n", "memory.current": "900000\n",
            "memory.stat": "anon 300000\nfile 600000\ninactive_file 350000\nactive_file 150000\n",
        }.items():  # fmt: skip
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(plan_module, "CONTROL_GROUP", tmp_path)
        assert available_memory() == 600_000
        (tmp_path / "memory.max").write_text("max\n")
        assert available_memory() > 1e8

    def test_disk_counts_what_an_unfinished_run_wrote(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        output = tmp_path / "deep" / "out"
        assert free_disk(output) == 1000
        files = tmp_path / "deep" / "out.partial" / "files"
        files.mkdir(parents=True)
        (files / "model-00001-of-00002.safetensors").write_bytes(bytes(234))
        assert free_disk(output) == 1234


def test_on_a_gpu_blocks_are_in_its_memory(folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
    """The same activations and solvers in another place, but for the float model's stream, which lies in pinned memory: a power of two."""
    text = recipe_text(folder_of("opt"), tmp_path / "out", "gptq", text_file)
    text = text.replace("samples: 8, length: 32", "samples: 80000, length: 64")
    here = plan(parse_recipe(text, "a.yaml"))
    with pretend_gpu():
        there = plan(parse_recipe(text, "a.yaml"), "cuda")
    assert there.gpu_memory_available == 64 << 30
    stream = 80000 * 64 * 128 * torch.bfloat16.itemsize
    assert stream < 1 << 31 < 2 * stream
    assert 1 << 31 <= there.quantize_memory - plan_module.PROCESS_BYTES < 1.05 * (1 << 31)
    # Activations have two or four bytes a number, by what each machine multiplies.
    assert 0.4 < there.gpu_quantize_memory / (here.quantize_memory - plan_module.PROCESS_BYTES) < 1.1
    assert not any("gpu" in name for name in here.to_json())


def test_longer_calibration_needs_more(folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
    text = recipe_text(folder_of("opt"), tmp_path / "out", "gptq", text_file)
    few = plan(parse_recipe(text, "a.yaml"))
    many = plan(parse_recipe(text.replace("samples: 8, length: 32", "samples: 80000, length: 64"), "a.yaml"))
    stream = 80000 * 64 * 128 * torch.bfloat16.itemsize
    assert many.quantize_memory - few.quantize_memory >= stream
    assert many.quantize_seconds > few.quantize_seconds


@pytest.mark.parametrize("key", ["skip", "average_bits"])
def test_the_first_block_may_be_left_out(key: str, folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
    """What a model needs does not depend on which of its blocks stays as it is."""
    folder = folder_of("opt")
    of_all = {"average_bits": 3.5} if key == "average_bits" else {}
    needs = [
        plan(
            parse_recipe(
                recipe_text(folder, tmp_path / "out", "gptq", text_file, skip=[f"*.layers.{index}.*"], **of_all),
                "r.yaml",
            )
        )
        for index in (0, 1)
    ]
    assert (needs[0].quantize_memory, needs[0].disk) == (needs[1].quantize_memory, needs[1].disk)


class TestLearning:
    """What `best` does beside `balanced`. Measured on one block of OPT and of NeoX 768 wide, 8 windows of 512 tokens and 3 of 1,536, five
    steps of each kind: peaks 0.68-0.73 of the plan's, times 0.84-1.16."""

    @staticmethod
    def needs(folder: Path, text_file: Path, tmp_path: Path, samples: int = 64, **section: Any) -> Plan:
        text = recipe_text(folder, tmp_path / "out", section.pop("backend", "gptq"), text_file, **section)
        text = text.replace("samples: 8, length: 32", f"samples: {samples}, length: 64")
        return plan(parse_recipe(text, "r.yaml"))

    @pytest.fixture(autouse=True)
    def one_rate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan_module, "matmul_rate", lambda dtype, device: 1e9)

    @pytest.mark.parametrize("variant", FAMILIES)
    def test_time_grows_with_the_steps(self, variant: str, folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
        def seconds(**section: Any) -> float:
            return self.needs(folder_of(variant), text_file, tmp_path, quality="best", **section).quantize_seconds

        none, rounding, tuning, both = (
            seconds(rounding_steps=r, tune_steps=t) for r, t in ((0, 0), (1000, 0), (0, 1000), (1000, 1000))
        )
        # Forward and backward passes of two blocks over four windows of 64 tokens, and 41 looks at the eight that are kept aside.
        weights = sum(p.numel() for n, p in tiny_models.build(variant).named_parameters() if ".0." in n)
        passes = 2 * (3 * 1000 * 4 + 41 * 8) * 64 * weights / 1e9
        targets = 2 * 64 * 64 * weights / 1e9
        assert tuning - none == pytest.approx(passes + targets, abs=0.21)
        # Before the attention's last linear and before the MLP's, or, where these are solved for together, once.
        times = 1 if "parallel" in variant else 2
        assert both - tuning > times * passes
        assert both - tuning == pytest.approx(rounding - none - targets, abs=0.21)
        assert both < none + 1.5 * (times + 1) * passes

    def test_memory(self, folder_of: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It counts where it is more than the solver takes, and only for what is learned at once: fc1 of OPT's, 256 x 128."""
        monkeypatch.setattr(plan_module, "LEARNED_BYTES", 10_000)
        needs = {
            steps: self.needs(folder_of("opt"), text_file, tmp_path, quality="best", rounding_steps=steps, tune_steps=1)
            for steps in (0, 1)
        }
        grown = needs[1].quantize_memory - needs[0].quantize_memory
        learned = 10_000 * max(3 * 128 * 128, 256 * 128)
        assert 0.9 * learned < grown <= learned

    def test_nothing_to_learn(self, folder_of: Folder, text_file: Path, tmp_path: Path) -> None:
        """One sample leaves none to choose by."""
        one = self.needs(folder_of("opt"), text_file, tmp_path, samples=1, quality="best")
        none = self.needs(
            folder_of("opt"), text_file, tmp_path, samples=1, quality="best", rounding_steps=0, tune_steps=0
        )
        assert one.quantize_seconds == none.quantize_seconds
        assert one.quantize_memory == none.quantize_memory
