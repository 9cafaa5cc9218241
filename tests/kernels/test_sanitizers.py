"""The kernels' C++ tests (tests/kernels/cpp), built with every instruction set under AddressSanitizer and
UndefinedBehaviorSanitizer. A finding of the sanitizers, a wrong number or a touched guard page ends the program."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlm.kernels import cpu
from tests.conftest import ROOT

SOURCES = ROOT / "tests" / "kernels" / "cpp"


def cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def tool(name: str) -> str:
    """cmake and ninja come with the development extras, beside Python."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert found, f"{name} is not installed; pip install -e '.[dev]'"
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    flags = cpu_flags()
    # AVX-VNNI's source runs on CPUs that have the same instructions with AVX-512 only.
    evex = "avx512_vnni" in flags and "avx_vnni" not in flags
    configure = [tool("cmake"), "-S", SOURCES, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    for command in (
        [*configure, f"-DQLM_TEST_AVXVNNI_EVEX={'ON' if evex else 'OFF'}"],
        [tool("cmake"), "--build", folder, "--target", "kernels_test"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return folder / "kernels_test"


@pytest.mark.skipif(not cpu.available(), reason="installed without the CPU kernels")
def test_instruction_sets_share_no_code(program: Path) -> None:
    """The linker keeps one copy of an inline function, and it could be one that this CPU cannot run."""
    for isa in ("avx2", "avxvnni", "avx512vnni"):
        for path in sorted(program.parent.glob(f"kernels/CMakeFiles/qlm_{isa}.dir/*.o")):
            done = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True)
            weak = [line for line in done.stdout.splitlines() if line.split()[1] in "WwVvu"]
            assert [line for line in weak if "__gxx_personality" not in line and f"qlm::{isa}::" not in line] == [], (
                path
            )


@pytest.mark.skipif(not cpu.available(), reason="installed without the CPU kernels")
def test_kernels_under_the_sanitizers(program: Path) -> None:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "halt_on_error=1:detect_stack_use_after_return=1:strict_string_checks=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    tests = ["team", "mapping", "linear", "parts", "decoder"]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [*tests, "instruction sets"]
    # Those that this machine has ran, avxvnni through AVX-512 where it must.
    isas = done.stdout.splitlines()[-1].removeprefix("instruction sets: ").split(",")
    flags = cpu_flags()
    assert isas == ["scalar"] + ["avx2"] * ("avx2" in flags) + ["avxvnni"] * bool(
        {"avx_vnni", "avx512_vnni"} & flags
    ) + (["avx512vnni"] * ("avx512_vnni" in flags))
