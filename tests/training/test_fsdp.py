"""FSDP2 on two gloo processes on the CPU, set up by accelerate from the configuration that comes with the recipes: torch's own
`fully_shard`, weights in parts, the same run as one process with twice the accumulation.

accelerate takes no notice of FSDP on CPUs. `ON_CPUS` changes two answers in the launched processes alone: accelerate's about the kind
of machine ("several GPUs", with gloo between them), and qlm's refusal of CPUs. All that follows is what runs on GPUs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from qlm.finetune import finetune
from qlm.kernels.ops import float_activations
from qlm.recipe import FinetuneRecipe
from tests.conftest import files_of
from tests.training.launched import (
    ACCELERATE,
    CONFIGURATIONS,
    NF4,
    launch,
    of_different_lengths,
    said,
    same_adapter,
    same_curve,
    settings,
)
from tests.training.runs import jsonl

ON_CPUS = """
from contextlib import nullcontext
import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from qlm.kernels.ops import float_activations
from qlm.training import job, loop, state

accelerate.state.PartialState._prepare_backend = lambda self, *arguments: ("gloo", DistributedType.MULTI_GPU)
check = job.check_fsdp
job.check_fsdp = lambda device: check(torch.device("cuda"))

make_whole = state.make_whole

def described(model):
    state.split_again(model)
    modules = list(model.modules())
    packed = [module.weight for module in modules if type(module).__name__ == "Nf4Linear"]
    if any(hasattr(p, "full_tensor") for p in state.trainable(model).values()):
        say(
            groups=[type(module).__name__ for module in modules if isinstance(module, FSDPModule)],
            packed=[[str(w.dtype), w.numel(), w.to_local().numel()] for w in packed],
        )
    make_whole(model)

state.make_whole = described

begin_step = loop.TrainingLoop.begin_step

def poisoned(self):
    begin_step(self)
    if "poisoned" in str(self.checkpoints) and self.state.global_step == 2 and self.process.rank == 1:
        name, parameter = sorted((name, p) for p, name in self._names().items())[0]
        parameter.to_local().detach()[0, 0] = float("nan")

loop.TrainingLoop.begin_step = poisoned

run = loop.TrainingLoop.run

def by_bitsandbytes(self, *arguments):
    with float_activations() if "bitsandbytes" in str(self.checkpoints) else nullcontext():
        run(self, *arguments)

loop.TrainingLoop.run = by_bitsandbytes
"""
FSDP2 = (*ACCELERATE, "--config_file", str(CONFIGURATIONS / "fsdp2.yaml"))


def launched(tmp_path: Path, *recipes: Any) -> list[dict[str, Any]]:
    return launch(tmp_path, *recipes, launcher=FSDP2, before=ON_CPUS, ACCELERATE_TORCH_DEVICE="cpu")


def test_four_bit_weights_in_parts(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """The curve, the adapter and what each process holds; with activations computed anew, in bfloat16, with a head in full; stopped and
    gone on with; a value that is not finite in one process alone."""
    model, data = copy_of("opt", dropout=0.0, attention_dropout=0.0), of_different_lengths(tmp_path)
    labelled = jsonl(
        tmp_path / "labelled.jsonl", [{"text": "word and " * (1 + i % 4), "label": i % 2} for i in range(11)]
    )
    variants: dict[str, dict[str, Any]] = {
        "whole": {},
        # Products by bitsandbytes, as on GPUs; the others are by qlm's op for CPUs.
        "bitsandbytes": {"gradient_checkpointing": True, "steps": 3},
        "bfloat16": {"precision": "bfloat16", "steps": 3},
        "head": {
            "task": "sequence-classification", "data": str(labelled), "labels": ["0", "1"], "validation": str(labelled), "steps": 3,
        },
    }  # fmt: skip

    def recipe(output: str, **changes: Any) -> dict[str, Any]:
        return settings(model, tmp_path / output, changes.pop("data", data), quantize=NF4, **changes)

    for name, changes in variants.items():
        with float_activations() if name == "bitsandbytes" else nullcontext():
            finetune(FinetuneRecipe.model_validate(recipe(f"one-{name}", gradient_accumulation=4, **changes)))
    broken = recipe("broken")
    two = [recipe(name, **changes) for name, changes in variants.items()]
    # All in two processes, which come up once: that takes them longer than the runs.
    found = launched(tmp_path, *two, (broken, 3), broken, recipe("poisoned"))
    for name, changes in variants.items():
        assert said(found, name) == [{"steps": changes.get("steps", 8), "resumed": 0}] * 2, name
        same_curve(tmp_path / f"one-{name}", tmp_path / name)
        same_adapter(tmp_path / f"one-{name}", tmp_path / name)

    held = [facts for facts in found if "groups" in facts]
    # Each process at the end of each of the five runs.
    assert len(held) == 10
    for facts in held:
        assert facts["groups"].count("FSDPOPTDecoderLayer") == 2
        assert len(facts["packed"]) == 12
        for dtype, whole, here in facts["packed"]:
            assert (dtype, here) == ("torch.bfloat16", whole // 2)

    (first, second) = said(found, "poisoned")
    assert first["error"].startswith("step 3: the loss is nan: base_model.")
    assert second == first
    assert not (tmp_path / "poisoned").exists()

    assert said(found, "broken") == [{"exit": 143}, {"steps": 8, "resumed": 4}] * 2
    wanted, gone_on = files_of(tmp_path / "whole"), files_of(tmp_path / "broken")
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert gone_on[name] == wanted[name], name


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_configurations(name: str) -> None:
    """As accelerate's own loader reads them, and as its launcher's variables reach qlm."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    path = CONFIGURATIONS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}[name]
    assert (config.mixed_precision, config.use_cpu) == ("no", False)
    assert f"--config_file recipes/qlora/accelerate/{name}.yaml" in path.read_text("utf-8")
    if name == "fsdp2":
        from qlm.training import job

        with pytest.MonkeyPatch.context() as patch:
            for key, value in config.fsdp_config.items():
                patch.setenv(key.upper(), str(value).lower())
            job.check_fsdp(torch.device("cuda"))
