"""Every operation on the disk fails once, and is the moment of a kill -9 once; nothing is ever lost or mixed.

After the method of SQLite's I/O-error tests (https://www.sqlite.org/testing.html, sections 3.2 and 3.3).
"""

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlm.checkpoint import files
from qlm.checkpoint.files import PartialFolder
from qlm.errors import CannotCreate, MissingInput, QlmError, ReadWriteError

from .test_files import contents

IDENTITY = {"recipe": "a"}
NAMES = ("block-0", "block-1", "manifest.json")


@pytest.fixture
def tmp_path(tmp_path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs take a minute on a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _short_writes(monkeypatch):
    # Every file takes several writes, so that failures and kills also fall between them.
    monkeypatch.setattr(files, "_WRITE_BYTES", 700)


def run(output: Path, force: bool = False) -> None:
    """What `qlm quantize` does: the blocks that are not finished, then the manifest, then the commit."""
    with PartialFolder(output, IDENTITY, force) as folder:
        for number, name in enumerate(NAMES[:2]):
            if not folder.finished(name):
                folder.write_bytes(name, bytes([number]) * 1500, record={"number": number})
        folder.write_json(NAMES[2], folder.facts(NAMES[:2]))
        folder.commit(NAMES)


def make_old_output(output: Path) -> None:
    with PartialFolder(output, {"old": True}) as folder:
        folder.write_json("manifest.json", {"old": True})
        folder.commit(["manifest.json"])


def count_operations(output: Path, force: bool) -> int:
    counter = 0

    def count(kind: str, path: Path) -> None:
        nonlocal counter
        counter += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_operation", count)
        run(output, force)
    return counter


def at_operation(index: int, action: Callable[[Path], None], once: bool = True) -> Callable[[str, Path], None]:
    """A hook that acts at the operation of that index, and at all later ones unless `once`."""
    seen = 0

    def hook(kind: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == index + 1 or (seen > index and not once):
            action(path)

    return hook


def prepare(folder: Path, force: bool) -> tuple[Path, dict[str, bytes]]:
    """The output's path, and what lies there before the run."""
    folder.mkdir()
    if force:
        make_old_output(folder / "out")
    return folder / "out", contents(folder)


@pytest.fixture(params=[False, True], ids=["new", "replace"])
def force(request) -> bool:
    return request.param


@pytest.fixture
def whole(tmp_path, force) -> tuple[dict[str, bytes], int]:
    """The files of an undisturbed run, and its number of operations."""
    output, _ = prepare(tmp_path / "whole", force)
    count = count_operations(output, force)
    assert count > 50
    return contents(output.parent), count


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from qlm.checkpoint import files
assert "torch" not in sys.modules  # a process without it forks in a millisecond
files._WRITE_BYTES = 700
names = ("block-0", "block-1", "manifest.json")
for index in range(int(sys.argv[2]), int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(kind, path):
            global seen
            if seen == index:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
        files._operation = hook
        output = Path(sys.argv[1]) / str(index) / "out"
        with files.PartialFolder(output, {"recipe": "a"}, sys.argv[4] == "True") as folder:
            for number, name in enumerate(names[:2]):
                if not folder.finished(name):
                    folder.write_bytes(name, bytes([number]) * 1500, record={"number": number})
            folder.write_json(names[2], folder.facts(names[:2]))
            folder.commit(names)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
"""


def kill_at_each(folder: Path, first: int, end: int, force: bool) -> None:
    """In `folder/<index>`, for each index: the run in a child process that kills itself at that operation."""
    subprocess.run([sys.executable, "-c", KILLED_RUN, str(folder), str(first), str(end), str(force)], check=True)


def test_kill_at_every_operation_then_the_same_command(tmp_path, whole, force):
    undisturbed, count = whole
    states = set()
    prepared = [prepare(tmp_path / str(index), force) for index in range(count)]
    kill_at_each(tmp_path, 0, count, force)
    for index, (output, before) in enumerate(prepared):
        found = {name: data for name, data in contents(output.parent).items() if name.startswith("out/")}
        # The output is as it was before, or absent, or whole; never anything else.
        assert found in ({}, before, undisturbed), f"operation {index}"
        states.add("absent" if not found else "old" if found == before else "new")
        if found == undisturbed and not force:
            with pytest.raises(CannotCreate, match="exists already"):
                run(output)
        else:
            run(output, force)
        assert contents(output.parent) == undisturbed, f"operation {index}"
    assert states == ({"absent", "old", "new"} if force else {"absent", "new"})


def test_kill_while_replacing_then_continue_without_force(tmp_path, whole, force):
    if not force:
        return
    undisturbed, count = whole
    first, continued = count - 25, 0
    prepared = [prepare(tmp_path / str(index), force) for index in range(first, count)]
    kill_at_each(tmp_path, first, count, force)
    for output, _ in prepared:
        if not output.exists():
            run(output)
            assert contents(output.parent) == undisturbed
            continued += 1
    assert continued


@pytest.mark.parametrize("once", [True, False], ids=["once", "from-then-on"])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_every_operation_fails(tmp_path, whole, force, kind, once):
    undisturbed, count = whole

    def fail(path: Path) -> None:
        raise OSError(kind, os.strerror(kind), str(path))

    expected = ReadWriteError if kind == errno.EIO else (CannotCreate, MissingInput)
    for index in range(count):
        output, before = prepare(tmp_path / str(index), force)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_operation", at_operation(index, fail, once))
            with pytest.raises(QlmError, match=f"{tmp_path}.*{os.strerror(kind)}") as caught:
                run(output, force)
        assert isinstance(caught.value, expected) or "cannot be read" in str(caught.value)
        found = {name: data for name, data in contents(output.parent).items() if name.startswith("out/")}
        assert found in (before, undisturbed), f"operation {index}"
        leftovers = [name for name in contents(output.parent) if name.endswith(".tmp")]
        assert leftovers == []
        if found == undisturbed and not force:
            with pytest.raises(CannotCreate, match="exists already"):
                run(output)
        else:
            run(output, force)
        assert contents(output.parent) == undisturbed, f"operation {index}"


def test_an_error_that_ends_the_first_run_early_leaves_nothing(tmp_path, whole, force):
    """Up to the first finished block, an error that passes leaves the disk as it was."""
    _, count = whole

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "", str(path))

    clean = 0
    for index in range(count):
        output, before = prepare(tmp_path / str(index), force)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_operation", at_operation(index, fail))
            with pytest.raises(QlmError):
                run(output, force)
        if contents(output.parent) != before:
            break
        clean += 1
    assert clean > 20
