"""The library's loader, its instruction sets, teams of threads, and files that shrink while they are mapped."""

import ctypes
import gc
import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from qlm.errors import DataError, MissingInput, QlmError, Unavailable, UsageError
from qlm.kernels import cpu
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not cpu.available(), reason="installed without the CPU kernels")

HEADER = (ROOT / "qlm" / "kernels" / "cpu" / "abi.h").read_text()
# Without comments and preprocessor lines.
DECLARATIONS = re.sub(r"^\s*#.*$", "", re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL), flags=re.MULTILINE)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nothing had been loaded yet."""
    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.delenv("QLM_ISA", raising=False)
    yield
    monkeypatch.undo()
    cpu.library().select_isa(os.environ.get("QLM_ISA") or None)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


# The header and its mirror in Python ----------------------------------------------------------------------------------


def c_type(declaration: str) -> str:
    """ "const float *x" -> "pointer", "int64_t tokens" -> "int64_t"."""
    return "pointer" if "*" in declaration else declaration.replace("const ", "").split()[0]


PYTHON_TYPES = {
    ctypes.c_int: "int",
    ctypes.c_int32: "int32_t",
    ctypes.c_int64: "int64_t",
    ctypes.c_float: "float",
    ctypes.c_double: "double",
    ctypes.c_char_p: "pointer",
    ctypes.c_void_p: "pointer",
    None: "void",
    cpu.STATUS: "int",
    **{structure: name for name, structure in cpu.STRUCTURES.items()},
}


def python_type(kind: object) -> str:
    if isinstance(kind, type) and issubclass(kind, ctypes._Pointer):
        return "pointer"
    if kind == ctypes.c_int32 and ctypes.c_int32 is ctypes.c_int:
        return "int32_t"
    return PYTHON_TYPES[kind]


def test_every_function_of_the_header_is_declared_alike() -> None:
    found = {
        name: (c_type(returns), [c_type(one) for one in arguments.split(",") if one.strip() not in ("", "void")])
        for returns, name, arguments in re.findall(r"QLM_API ([\w\s]+?\*?)\s*(qlm_\w+)\(([^)]*)\);", DECLARATIONS)
    }
    assert found == {
        name: (python_type(returns), [python_type(one) for one in takes])
        for name, (returns, takes) in cpu.FUNCTIONS.items()
    }


@pytest.mark.parametrize("name", cpu.STRUCTURES)
def test_every_field_of_the_header_is_declared_alike(name: str) -> None:
    body = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", DECLARATIONS, re.DOTALL)
    assert body
    fields = []
    for line in body[1].split(";"):
        if not line.strip():
            continue
        *_, first = line.split(",")[0].split()
        kind = line.split(first)[0] + ("*" if "*" in first else "")
        for one in [first, *line.split(",")[1:]]:
            plain, _, count = one.strip().strip("*").partition("[")
            fields.append((plain, c_type(kind + ("*" if "*" in one else "")), int(count.strip("]") or 1)))
    mirrored = []
    for plain, kind, *_ in cpu.STRUCTURES[name]._fields_:
        array = isinstance(kind, type) and issubclass(kind, ctypes.Array)
        mirrored.append((plain, python_type(kind._type_ if array else kind), kind._length_ if array else 1))
    assert mirrored == fields


def test_constants_of_the_header() -> None:
    numbers = {name: int(value) for name, value in re.findall(r"(QLM_\w+) = (\d+)", DECLARATIONS)}
    for name in ("F32", "F16", "BF16", "I8", "FLOAT", "INT8", "GPTQ", "NF4", "NONE", "RELU", "GELU", "GELU_TANH"):
        assert numbers.pop(f"QLM_{name}") == getattr(cpu, name)
    for name in ("QKV_SEPARATE", "QKV_PER_HEAD", "QKV_MULTI_QUERY"):
        assert numbers.pop(f"QLM_{name}") == getattr(cpu, name)
    assert numbers.pop("QLM_OK") == cpu.OK
    assert set(numbers.values()) == cpu.ERRORS.keys()
    assert f"#define QLM_ABI_VERSION {cpu.ABI_VERSION}\n" in HEADER


def test_nothing_else_is_exported() -> None:
    done = subprocess.run(
        ["nm", "-D", "--defined-only", cpu.library().path], capture_output=True, text=True, check=True
    )
    assert {line.split()[-1] for line in done.stdout.splitlines()} == cpu.FUNCTIONS.keys()


# Loading --------------------------------------------------------------------------------------------------------------


def test_import_loads_nothing() -> None:
    done = run_python(
        "import sys; from qlm.kernels import cpu; assert cpu.available(); heavy = {'torch', 'numpy'} & sys.modules.keys();"
        "assert not heavy, heavy; maps = lambda: 'libqlm_cpu' in open('/proc/self/maps').read();"
        "assert not maps(); cpu.library(); assert maps()"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_library_is_loaded_once() -> None:
    assert cpu.library() is cpu.library()
    assert cpu.library().path.is_absolute()


def test_a_function_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="qlm_nothing: not a function of abi"):
        cpu.library().qlm_nothing()


def test_library_that_was_not_built(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QLM_LIBRARY", raising=False)
    monkeypatch.setattr(cpu, "__path__", [str(tmp_path)])
    assert not cpu.available()
    with pytest.raises(Unavailable) as raised:
        cpu.library()
    assert str(raised.value) == cpu.why_not_available()
    assert str(tmp_path) in str(raised.value)
    assert "without QLM_NATIVE=0" in str(raised.value)


def test_library_that_is_named_but_missing(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLM_LIBRARY", str(tmp_path / "nothing.so"))
    assert cpu.available()  # so that the error is seen, instead of a slower kernel
    with pytest.raises(MissingInput, match=r"QLM_LIBRARY=.*nothing.so: no such file"):
        cpu.library()


def test_library_that_is_none(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libqlm_cpu.so"
    path.write_text("not a library")
    monkeypatch.setenv("QLM_LIBRARY", str(path))
    with pytest.raises(Unavailable, match=r"libqlm_cpu.so: cannot be loaded \(.*\); install qlm again"):
        cpu.library()


def test_library_of_something_else(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import _ctypes

    monkeypatch.setenv("QLM_LIBRARY", _ctypes.__file__)
    with pytest.raises(Unavailable, match=r"not the library of this version of qlm .*qlm_error"):
        cpu.library()


def test_library_of_another_version(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    there = cpu.ABI_VERSION
    monkeypatch.setattr(cpu, "ABI_VERSION", 999)
    with pytest.raises(Unavailable, match=rf"version {there} with structures .* but this qlm has version 999"):
        cpu.library()


def test_library_with_other_structures(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.STRUCTURES, "qlm_norm", cpu.Linear)
    with pytest.raises(Unavailable, match="'qlm_norm': 16"):
        cpu.library()


def test_every_status_becomes_its_error() -> None:
    native = cpu.library()
    with pytest.raises(UsageError, match="expected 1 to 256"):
        native.qlm_team_create(0, ctypes.byref(ctypes.c_void_p()))
    for status, error in {**cpu.ERRORS, 99: QlmError}.items():
        with pytest.raises(QlmError) as raised:
            native.check(status)
        assert type(raised.value) is error
    native.check(cpu.OK)


def test_errors_belong_to_threads() -> None:
    native = cpu.library()
    with pytest.raises(UsageError):
        native.qlm_team_create(0, ctypes.byref(ctypes.c_void_p()))
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(native.error()))
    thread.start()
    thread.join()
    assert seen == [""]
    assert "0 threads" in native.error()


# Instruction sets -----------------------------------------------------------------------------------------------------


def test_the_best_instruction_set_is_the_default(fresh: None) -> None:
    native = cpu.library()
    assert native.isa == native.supported[-1]
    assert native.supported[0] == native.compiled[0] == "scalar"
    assert set(native.supported) <= set(native.compiled) <= {"scalar", "avx2", "avxvnni", "avx512vnni"}


def test_what_is_supported_is_what_the_kernel_lists() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))
    needs = {
        "scalar": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
        "avx512vnni": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    }
    native = cpu.library()
    assert native.supported == tuple(name for name in native.compiled if needs[name] <= flags)


def test_selecting_an_instruction_set(fresh: None) -> None:
    native = cpu.library()
    for name in native.supported:
        native.select_isa(name)
        assert native.isa == name
    native.select_isa(None)
    assert native.isa == native.supported[-1]
    with pytest.raises(UsageError, match="instruction set 'sse9': expected one of scalar, avx2, avxvnni, avx512vnni"):
        native.select_isa("sse9")
    with pytest.raises(UsageError, match="instruction set sse9: not one of scalar"):
        native.qlm_isa_select(b"sse9")
    assert native.isa == native.supported[-1]


def test_instruction_set_that_this_machine_lacks(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    native = cpu.library()
    monkeypatch.setattr(native, "supported", ("scalar",))
    monkeypatch.setattr(native, "compiled", ("scalar", "avx2"))
    with pytest.raises(Unavailable, match="'avx2': this machine cannot run it; there are scalar"):
        native.select_isa("avx2")
    with pytest.raises(Unavailable, match=r"'avx512vnni': not compiled into .*libqlm_cpu.so; there are scalar"):
        native.select_isa("avx512vnni")


def test_the_c_side_refuses_what_this_machine_lacks() -> None:
    native = cpu.library()
    for name in set(native.compiled) - set(native.supported):
        with pytest.raises(UsageError, match=f"instruction set {name}: this machine cannot run it"):
            native.qlm_isa_select(name.encode())


def test_environment_chooses_the_instruction_set(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLM_ISA", "scalar")
    assert cpu.library().isa == "scalar"


def test_environment_with_an_unknown_instruction_set(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLM_ISA", "AVX2")
    for _ in range(2):  # not only the first time
        with pytest.raises(UsageError, match="QLM_ISA: instruction set 'AVX2': expected one of scalar, avx2"):
            cpu.library()


# Teams ----------------------------------------------------------------------------------------------------------------


def forward(team: cpu.Team, tokens: int = 3, width: int = 200, rows: int = 333) -> np.ndarray:
    """One float linear layer on random numbers, checked against numpy."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, width), dtype=np.float32)
    x = rng.standard_normal((tokens, width), dtype=np.float32)
    y = np.full((tokens, rows), np.nan, np.float32)
    linear = cpu.Linear(
        in_features=width, out_features=rows, format=cpu.FLOAT, weight=weight.ctypes.data, weight_dtype=cpu.F32
    )
    cpu.library().qlm_linear_forward(
        team.handle, ctypes.byref(linear), tokens, x.ctypes.data, width, y.ctypes.data, rows
    )
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=0, atol=1e-4)
    return y


def workers() -> int:
    """Threads of teams in this process."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it ended meanwhile
            continue
    return names.count("qlm")


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_team(threads: int) -> None:
    before = workers()
    with cpu.Team(threads) as team:
        assert cpu.library().qlm_team_threads(team.handle) == team.threads == threads
        assert workers() == before + threads - 1
        first = forward(team)
        for _ in range(20):
            assert forward(team).tobytes() == first.tobytes()
    assert workers() == before
    with cpu.Team(1) as one:
        assert forward(one).tobytes() == first.tobytes()
    with pytest.raises(UsageError, match="this team of threads is closed"):
        forward(team)
    team.close()  # again: nothing happens


def test_team_ends_with_its_last_owner() -> None:
    before = workers()
    team = cpu.Team(3)
    assert workers() == before + 2
    del team
    gc.collect()
    assert workers() == before


@pytest.mark.parametrize("threads", [0, -1, 257, True, 2.0, "2"])
def test_team_of_an_impossible_size(threads: object) -> None:
    with pytest.raises(UsageError, match=r"threads: .*, expected a whole number from 1 to 256"):
        cpu.Team(threads)  # type: ignore[arg-type]


def test_team_in_a_forked_process() -> None:
    """The child's team starts threads of its own, and the parent's goes on."""
    done = run_python(
        "import os, sys; sys.path.insert(0, '.')\n"
        "from tests.kernels.test_native import cpu, forward, workers\n"
        "team = cpu.Team(3); first = forward(team).tobytes(); started = workers()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    fine = workers() == 0 and forward(team).tobytes() == first and workers() == 2\n"
        "    team.close()\n"
        "    os._exit(0 if fine and workers() == 0 else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert forward(team).tobytes() == first and started == workers() == 2"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_team_serves_threads_one_after_the_other() -> None:
    with cpu.Team(2) as team:
        first = forward(team).tobytes()
        same: list[bool] = []
        callers = [
            threading.Thread(target=lambda: same.extend(forward(team).tobytes() == first for _ in range(10)))
            for _ in range(3)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert same == [True] * 30


def test_default_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for quota, expected in ((float("inf"), 8), (9.0, 8), (3.9, 3), (1.0, 1), (0.2, 1)):
        monkeypatch.setattr(cpu, "_cgroup_cpus", lambda quota=quota: quota)
        assert cpu.default_threads() == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1000)))
    monkeypatch.setattr(cpu, "_cgroup_cpus", lambda: float("inf"))
    assert cpu.default_threads() == cpu.MOST_THREADS


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, float("inf")),
        ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/elsewhere\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a\n", {"a/cpu.max": "what\n"}, float("inf")),
        (
            "5:cpu,cpuacct:/x\n4:memory:/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("5:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
    ],
)
def test_cgroup_quota(
    groups: str, files: dict[str, str], expected: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    monkeypatch.setattr(cpu, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    assert cpu._cgroup_cpus() == expected


# torch's threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="torch without OpenMP")
def test_borrowed_team(torch_threads: Callable[[int], None]) -> None:
    with cpu.Team(1) as one:
        expected = forward(one).tobytes()
    for threads in (1, 2, 3, 2):
        torch_threads(threads)
        team = cpu.borrowed_team()
        assert (team.borrowed, team.threads) == (True, threads)
        before = workers()
        torch.ones(300, 300) @ torch.ones(300, 300)
        assert forward(team).tobytes() == expected
        assert workers() == before
        assert cpu.borrowed_team() is team


def test_borrowed_team_without_torch_and_with_it_later() -> None:
    done = run_python(
        "from qlm.kernels import cpu\n"
        "import os\n"
        "own = cpu.borrowed_team()\n"
        "assert not own.borrowed and own.threads == cpu.default_threads() and cpu.borrowed_team() is own\n"
        "import torch\n"
        "torch.set_num_threads(3)\n"
        "team = cpu.borrowed_team()\n"
        "assert team.borrowed == torch.backends.openmp.is_available()\n"
        "assert not team.borrowed or team.threads == 3"
    )
    assert (done.returncode, done.stderr) == (0, "")


# Files that shrink ----------------------------------------------------------------------------------------------------


def test_a_mapped_file_that_shrinks(tmp_path: Path) -> None:
    """Under pytest's own fault handler: the process lives, and calls that read the file fail until it is let go; others do not."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    native, speed = cpu.library(), ctypes.c_double()
    with path.open("r+b") as file, cpu.Team(2) as team:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        good = np.ones(1 << 20, np.uint8)

        def read(data: np.ndarray) -> float:
            native.qlm_read_bandwidth(team.handle, data.ctypes.data, data.nbytes, ctypes.byref(speed))
            return speed.value

        native.qlm_mapping_register(mapped.ctypes.data, mapped.nbytes)
        try:
            assert read(mapped) > 0
            file.truncate(10_000)
            for _ in range(2):
                with pytest.raises(DataError, match="became shorter"):
                    read(mapped)
                assert read(good) > 0
            with pytest.raises(DataError, match="became shorter"):
                native.qlm_mapping_check(mapped.ctypes.data + 5)
            native.qlm_mapping_check(good.ctypes.data)
        finally:
            native.qlm_mapping_unregister(mapped.ctypes.data)
        native.qlm_mapping_check(mapped.ctypes.data)
