"""Which process does what: waits that outlast torch's own limit, and what FSDP leaves to choose."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from qlm.errors import UsageError
from qlm.training.job import LONGEST_WAIT, check_fsdp, choose_optimizer
from tests.training.launched import TORCHRUN

WAITING = """
import datetime, os, time
import torch.distributed
from qlm.training.job import Process

torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
process = Process.here("cpu")

def late(barrier):
    if process.is_main:
        time.sleep(5)
    try:
        barrier()
        return "came"
    except RuntimeError as error:
        return "timed out" if "imeout" in str(error) or "imed out" in str(error) else str(error)

lines = [late(process.wait)]
if process.is_main:
    lines.append("")
    time.sleep(5)
else:
    lines.append(late(torch.distributed.barrier))
os.write(1, (f"{process.rank}: {', '.join(lines)}\\n").encode())
os._exit(0)
"""


def test_waiting_for_one_that_takes_long(tmp_path: Path) -> None:
    """Longer than the limit of the processes' own group, whose barrier gives up here."""
    assert timedelta(hours=24) <= LONGEST_WAIT
    program = tmp_path / "program.py"
    program.write_text(WAITING)
    done = subprocess.run([sys.executable, *TORCHRUN, str(program)], capture_output=True, text=True, timeout=100)
    assert sorted(done.stdout.splitlines()) == ["0: came, ", "1: came, timed out"], done.stderr


def test_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of its own, for waits alone."""
    from qlm.training.job import Process

    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **how: given.update(how) or "group")
    waited = []
    monkeypatch.setattr(torch.distributed, "barrier", waited.append)
    process = Process.here("cpu")
    process.wait()
    assert given == {"backend": "gloo", "timeout": LONGEST_WAIT}
    assert waited == ["group"]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: found 1; allowed here: 2"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "True", "fsdp_activation_checkpointing: found true; allowed here: false"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: found true"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: found true"),
    ],
)
def test_settings_of_fsdp(variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_fsdp(torch.device("cuda"))
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=f"^accelerate's configuration: {words}"):
        check_fsdp(torch.device("cuda"))


def test_the_optimizer_under_fsdp() -> None:
    gpu = torch.device("cuda")
    assert choose_optimizer("auto", gpu) == "paged_adamw_8bit"
    assert choose_optimizer("auto", gpu, sharded=True) == "adamw"
    assert choose_optimizer("adamw", gpu, sharded=True) == "adamw"
    with pytest.raises(UsageError, match=r"^train\.optimizer: found adamw_8bit under FSDP"):
        choose_optimizer("adamw_8bit", gpu, sharded=True)
