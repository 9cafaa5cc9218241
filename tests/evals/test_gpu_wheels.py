"""evals/gpu_wheels.py without a network: what it cuts out of a made-up wheel, what it reads from one, what it refuses."""

import base64
import hashlib
import importlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("cpu", "cuda118", "cuda130", "cuda1301", "rocm70", "xpu2025")


@pytest.fixture(scope="module")
def wheels() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "evals"))
        yield importlib.import_module("gpu_wheels")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A package of one module and six libraries, with a true RECORD."""
    path = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    info = "bitsandbytes-1.0.dist-info"
    files = {"bitsandbytes/__init__.py": b"VALUE = 7\n"}
    files |= {f"bitsandbytes/libbitsandbytes_{name}.so": name.encode() * 1000 for name in LIBRARIES}
    files |= {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 1.0\nRequires-Dist: other_core==2.5 ; python_version > '3'\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        for name, data in files.items()
    }
    record = "".join(f"{name},sha256={digests[name]},{len(data)}\r\n" for name, data in files.items())
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\r\n")
    return path


def test_cut(wheels: Any, wheel: Path, tmp_path: Path) -> None:
    small = tmp_path / "cut" / wheel.name
    small.parent.mkdir()
    wheels.cut(wheel, small, "130")
    with zipfile.ZipFile(small) as archive, zipfile.ZipFile(wheel) as whole:
        names = archive.namelist()
        kept = [name for name in names if name.endswith(".so")]
        assert kept == ["bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so"]
        assert all(archive.read(name) == whole.read(name) for name in names if not name.endswith("RECORD"))
        record = archive.read("bitsandbytes-1.0.dist-info/RECORD").decode().splitlines()
    assert {line.partition(",")[0] for line in record} == set(names)
    # pip installs it, from RECORD as it is, and finds nothing to say.
    command = [
        sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(tmp_path / "site"), str(small),
    ]  # fmt: skip
    # Constraints of whoever runs the tests are about other versions.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "site" / "bitsandbytes" / "libbitsandbytes_cuda130.so").read_bytes() == b"cuda130" * 1000


def test_a_cuda_that_it_is_not_for(wheels: Any, wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(wheels.Refused, match=r"no library for CUDA 121; it has 118, 130, 1301: give one of them"):
        wheels.cut(wheel, tmp_path / "small.whl", "121")


def test_versions(wheels: Any, wheel: Path) -> None:
    """By another way to write the name; of what the wheel asks for."""
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"\nruamel.yaml=={wheels.version_of('ruamel-yaml')}\n" in constraints
    assert all(f"\n{name}=={wheels.version_of(name)}\n" in constraints for name in ("bitsandbytes", "optimum-quanto"))
    assert all(wheels.version_of(name) for name in wheels.PACKAGES)
    with pytest.raises(wheels.Refused, match=r"nothing: not in constraints\.txt"):
        wheels.version_of("nothing")
    assert wheels.required(wheel, "other-core") == "2.5"
    with pytest.raises(wheels.Refused, match="asks for no exact version of pydantic_core"):
        wheels.required(wheel, "pydantic_core")


def test_fill_replaces_other_versions(
    wheels: Any, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a pip that copies the made-up wheel: one wheel of the package stays, cut down, and sizes are printed."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "bitsandbytes-0.9-py3-none-any.whl").write_text("old")
    (folder / "other-1-py3-none-any.whl").write_text("other")
    asked = []

    def pip(command: list[str], **others: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    monkeypatch.setattr(sys, "argv", ["gpu_wheels", str(folder), "--cuda", "13.0", "--packages", "bitsandbytes"])
    assert wheels.main() == 0
    assert sorted(path.name for path in folder.iterdir()) == [wheel.name, "other-1-py3-none-any.whl"]
    assert (folder / wheel.name).stat().st_size < wheel.stat().st_size
    assert wheel.name in capsys.readouterr().out
    (command,) = asked
    assert command[-1] == f"bitsandbytes=={wheels.version_of('bitsandbytes')}"
    assert command[command.index("--python-version") + 1] == "3.12"
    assert "manylinux_2_24_x86_64" in command


def test_what_pip_does_not_find(wheels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found for peft==1\n")
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **others: failed)
    with pytest.raises(wheels.Refused, match=r"peft 1 for Python 3\.12: pip: ERROR: No matching distribution"):
        wheels.download("peft", "1", "3.12", tmp_path)
