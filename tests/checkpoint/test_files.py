"""Folders and files are written whole or not at all, are continued after an interruption, and are never overwritten
unasked.
"""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlm.checkpoint import files
from qlm.checkpoint.files import PartialFolder, check_file, tidy, write_file
from qlm.errors import CannotCreate, QlmError, ReadWriteError, UsageError

IDENTITY = {"recipe": {"quantize": {"bits": 4, "skip": []}}, "inputs": {"a.safetensors": "00"}}
KEEP = ["config.json", "manifest.json", "model-00001.safetensors"]


def write_all(folder: PartialFolder) -> None:
    """A run: every file that is not finished is written, then the folder is committed."""
    if not folder.finished(KEEP[2]):
        folder.write_tensors(KEEP[2], {"b": torch.arange(6).float(), "a": torch.ones(2, 2)}, record={"error": 0.5})
    if not folder.finished(KEEP[0]):
        folder.write_json(KEEP[0], {"model_type": "opt", "a": [1, 2]})
    folder.write_json(KEEP[1], folder.facts(KEEP[::2]))
    folder.commit(KEEP)


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of everything below the folder; folders have a '/' and no bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder)) + "/" * path.is_dir()] = b"" if path.is_dir() else path.read_bytes()
    return found


def test_a_run_makes_the_folder_and_nothing_else(tmp_path):
    with PartialFolder(tmp_path / "out", IDENTITY) as folder:
        write_all(folder)
    assert sorted(contents(tmp_path)) == ["out/", *(f"out/{name}" for name in KEEP)]
    assert torch.equal(load_file(tmp_path / "out" / KEEP[2])["a"], torch.ones(2, 2))
    assert (
        tmp_path / "out" / "config.json"
    ).read_text() == '{\n  "a": [\n    1,\n    2\n  ],\n  "model_type": "opt"\n}\n'


def test_nothing_appears_before_the_commit_and_the_next_run_continues(tmp_path):
    with PartialFolder(tmp_path / "out", IDENTITY) as folder:
        folder.write_tensors(KEEP[2], {"a": torch.zeros(3)}, record={"error": (1, 2)})
        assert folder.record(KEEP[2]) == {"error": [1, 2]}
    assert not (tmp_path / "out").exists()
    with PartialFolder(tmp_path / "out", IDENTITY) as folder:
        assert folder.finished_names == [KEEP[2]]
        assert folder.finished(KEEP[2])
        assert folder.record(KEEP[2]) == {"error": [1, 2]}
        assert not folder.finished("config.json")
        before = folder.path(KEEP[2]).stat().st_mtime_ns
        folder.write_json("config.json", {})
        folder.commit([KEEP[2], "config.json"])
    assert (tmp_path / "out" / KEEP[2]).stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone", "unrecorded", "temporary"])
def test_a_file_that_does_not_agree_with_its_record_is_redone(tmp_path, damage):
    with PartialFolder(tmp_path / "whole", IDENTITY) as folder:
        write_all(folder)
    with PartialFolder(tmp_path / "out", IDENTITY) as folder:
        folder.write_json("config.json", {"model_type": "wrong"})
        folder.write_tensors(KEEP[2], {"a": torch.zeros(3)})
    path = tmp_path / "out.partial" / "files" / KEEP[2]
    data = path.read_bytes()
    if damage == "unrecorded":
        (tmp_path / "out.partial" / "progress.json").unlink()
    elif damage == "gone":
        path.unlink()
    elif damage == "temporary":
        path.rename(path.with_name(path.name + ".tmp"))
    else:
        path.write_bytes(data[:-1] if damage == "shorter" else data[:-1] + b"\1")
    with PartialFolder(tmp_path / "out", IDENTITY) as folder:
        assert not folder.finished(KEEP[2])
        folder.write_json("config.json", {"model_type": "opt", "a": [1, 2]})
        write_all(folder)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_existing_output_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(CannotCreate, match="out: exists already"), PartialFolder(tmp_path / "out", IDENTITY):
        pass
    assert contents(tmp_path) == {"out/": b"", "out/file": b"mine"}


def test_force_replaces_an_output_of_qlm(tmp_path):
    with PartialFolder(tmp_path / "out", IDENTITY) as folder:
        folder.write_json("manifest.json", {"old": True})
        folder.commit(["manifest.json"])
    with PartialFolder(tmp_path / "out", IDENTITY, force=True) as folder:
        folder.write_json("config.json", {})
        assert contents(tmp_path / "out").keys() == {"manifest.json"}  # in place until the new one is whole
        write_all(folder)
    assert sorted(contents(tmp_path)) == ["out/", *(f"out/{name}" for name in KEEP)]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_force_replaces_nothing_that_qlm_did_not_write(tmp_path, what, force):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    output = tmp_path / {"folder": "home", "file": "home/letter.txt", "link": "link"}[what]
    if what == "link":
        output.symlink_to(tmp_path / "home")
    before = contents(tmp_path)
    with pytest.raises(CannotCreate, match="is not an output of qlm") as caught, PartialFolder(output, IDENTITY, force):
        pass
    # Nobody is sent to what would be refused as well.
    assert ("--force" in str(caught.value)) == force
    assert str(caught.value).endswith("; give another output, or remove it yourself")
    assert contents(tmp_path) == before


def test_force_discards_what_another_run_left(tmp_path):
    with PartialFolder(tmp_path / "out", {"recipe": 1}) as folder:
        folder.write_json("config.json", {"stale": True})
        folder.write_json("stale.json", {})
    with PartialFolder(tmp_path / "out", IDENTITY, force=True) as folder:
        assert folder.finished_names == []
        write_all(folder)
    assert sorted(contents(tmp_path)) == ["out/", *(f"out/{name}" for name in KEEP)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": {"quantize": {"bits": 3, "skip": []}}}, "recipe.quantize.bits: it has 4, now it is 3"),
        ({"recipe": {"quantize": {"bits": 4.0, "skip": []}}}, "recipe.quantize.bits: it has 4, now it is 4.0"),
        ({"recipe": {"quantize": {"bits": 4}}}, "recipe.quantize.skip: it has [], now it is nothing"),
        ({"inputs": {"a.safetensors": "01"}}, "inputs.a.safetensors: it has '00', now it is '01'"),
        ({"threads": 2}, "threads: it has nothing, now it is 2"),
    ],
    ids=["value", "type", "absent", "input", "new"],
)
def test_another_identity_does_not_continue(tmp_path, change, words):
    with PartialFolder(tmp_path / "out", IDENTITY) as folder:
        folder.write_json("config.json", {})
    before = contents(tmp_path)
    with pytest.raises(UsageError) as caught, PartialFolder(tmp_path / "out", {**IDENTITY, **change}):
        pass
    assert words in str(caught.value)
    assert "--force" in str(caught.value)
    assert contents(tmp_path) == before
    with PartialFolder(tmp_path / "out", IDENTITY) as folder:
        assert folder.finished("config.json")


def test_other_threads_are_to_be_given_back(tmp_path):
    with PartialFolder(tmp_path / "out", {**IDENTITY, "threads": 3}) as folder:
        folder.write_json("config.json", {})
    words = r"was begun with 3 threads, and this run has 1: give --threads 3, or --force to start over$"
    with pytest.raises(UsageError, match=words), PartialFolder(tmp_path / "out", {**IDENTITY, "threads": 1}):
        pass
    # Not where that would be refused again.
    both = {**IDENTITY, "threads": 1, "versions": {"torch": "0"}}
    with pytest.raises(UsageError, match="unfinished run with another"), PartialFolder(tmp_path / "out", both):
        pass


def test_a_second_writer_is_refused(tmp_path):
    code = (
        "import sys; from qlm.checkpoint.files import PartialFolder\n"
        "from qlm.errors import CannotCreate\n"
        "try:\n"
        "    PartialFolder(sys.argv[1], {}).__enter__()\n"
        "except CannotCreate as error:\n"
        "    print(error)\n"
    )
    with PartialFolder(tmp_path / "out", {}) as folder:
        other = PartialFolder(tmp_path / "out", {}, force=True)
        with pytest.raises(CannotCreate, match="another process is writing it"):
            other.__enter__()
        second = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
        )
        assert "another process is writing it" in second.stdout
        folder.write_json("manifest.json", {})
        folder.commit(["manifest.json"])
    assert sorted(contents(tmp_path)) == ["out/", "out/manifest.json"]


def test_commit_refuses_a_stranger_and_a_missing_file(tmp_path):
    with PartialFolder(tmp_path / "out", {}) as folder:
        folder.write_json("config.json", {})
        with pytest.raises(ReadWriteError, match=r"manifest\.json: is missing"):
            folder.commit(["config.json", "manifest.json"])
        (tmp_path / "out.partial" / "files" / "notes.txt").write_text("mine")
        with pytest.raises(CannotCreate, match=r"notes.txt: does not belong to the output"):
            folder.commit(["config.json"])
    assert not (tmp_path / "out").exists()


def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    for force in (False, True):
        with (
            pytest.raises(CannotCreate, match=r"thesis.tex: is in the way"),
            PartialFolder(tmp_path / "out", {}, force),
        ):
            pass
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "mine"


def test_an_error_before_the_first_finished_file_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), PartialFolder(tmp_path / "out", {}):
        raise ZeroDivisionError
    assert contents(tmp_path) == {}


def test_an_error_later_keeps_what_is_finished(tmp_path):
    def fail_after_the_first_file() -> None:
        with PartialFolder(tmp_path / "out", {}) as folder:
            folder.write_json("config.json", {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_the_first_file()
    with PartialFolder(tmp_path / "out", {}) as folder:
        assert folder.finished("config.json")


def test_folders_above_the_output_are_made_and_an_error_takes_them_away_again(tmp_path):
    with pytest.raises(ZeroDivisionError), PartialFolder(tmp_path / "a" / "b" / "out", {}):
        raise ZeroDivisionError
    assert contents(tmp_path) == {}
    with PartialFolder(tmp_path / "a" / "b" / "out", {}) as folder:
        folder.write_json("manifest.json", {})
        folder.commit(["manifest.json"])
    assert contents(tmp_path).keys() == {"a/", "a/b/", "a/b/out/", "a/b/out/manifest.json"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotCreate, match=r"Not a directory|File exists"):
        PartialFolder(tmp_path / "file" / "out", {}).__enter__()


def test_tidy_removes_what_a_kill_after_the_commit_leaves(tmp_path):
    with PartialFolder(tmp_path / "out", {}) as folder:
        folder.write_json("manifest.json", {})
        folder.commit(["manifest.json"])
    before = contents(tmp_path)
    for names in ([], ["lock"], ["identity.json", "lock"], ["identity.json", "lock", "progress.json"]):
        (tmp_path / "out.partial").mkdir()
        for name in names:
            (tmp_path / "out.partial" / name).write_text("{}")
        tidy(tmp_path / "out")
        assert contents(tmp_path) == before
    tidy(tmp_path / "out")
    (tmp_path / "out.partial" / "files").mkdir(parents=True)  # unfinished: not tidy's business
    tidy(tmp_path / "out")
    assert (tmp_path / "out.partial" / "files").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "x.tmp", "a\nb"])
def test_only_plain_names_are_written(tmp_path, name):
    with PartialFolder(tmp_path / "out", {}) as folder, pytest.raises(ValueError, match="cannot be the name"):
        folder.write_bytes(name, b"")


def test_metadata_with_a_random_order_is_refused(tmp_path):
    with PartialFolder(tmp_path / "out", {}) as folder, pytest.raises(ValueError, match="random order"):
        folder.write_tensors("a.safetensors", {"a": torch.zeros(1)}, {"format": "pt", "made_by": "qlm"})


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_modes_follow_the_umask(tmp_path, mask):
    former = os.umask(mask)
    try:
        with PartialFolder(tmp_path / "out", {}) as folder:
            folder.write_json("manifest.json", {})
            folder.commit(["manifest.json"])
        write_file(tmp_path / "report.json", "{}")
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    for file in (tmp_path / "out" / "manifest.json", tmp_path / "report.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_write_file_replaces_follows_links_and_leaves_nothing_beside(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "new")
    write_file(os.devnull, "gone")
    assert contents(tmp_path) == {"real": b"new", "link": b"new"}
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(CannotCreate, match="is a folder"):
        write_file(tmp_path, "x")
    with pytest.raises(CannotCreate, match="No such file or directory"):
        write_file(tmp_path / "no" / "x", "x")
    with pytest.raises(CannotCreate, match="No space left on device: 1 bytes needed"):
        write_file("/dev/full", "x")


def test_check_file_refuses_what_write_file_would_and_leaves_nothing(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / ".new.qlm.tmp").write_text("of a killed process")
    for name in ("real", "link", "new", os.devnull):
        check_file(tmp_path / name)
    assert contents(tmp_path) == {"real": b"old", "link": b"old"}
    with pytest.raises(CannotCreate, match="is a folder"):
        check_file(tmp_path)
    with pytest.raises(CannotCreate, match=r"no/x: create failed: No such file or directory"):
        check_file(tmp_path / "no" / "x")


def test_a_tmpfs_that_is_too_small(tmp_path):
    """A real full disk where mounting is allowed, else a limit on the file size: the same path through the code."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    ).returncode  # fmt: skip
    code = (
        "import resource, signal, sys; from qlm.checkpoint.files import PartialFolder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "if sys.argv[2] == 'limit': resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "with PartialFolder(sys.argv[1], {}) as folder:\n"
        "    folder.write_bytes('small', bytes(10_000))\n"
        "    folder.write_bytes('large', bytes(200_000))\n"
    )
    try:
        command = [sys.executable, "-c", code, str(disk / "out"), "disk" if mounted else "limit"]
        run = subprocess.run(command, capture_output=True, text=True)
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith("qlm.errors.CannotCreate: ")
        assert "large: write failed" in last
        if mounted:
            assert "bytes needed" in last
            assert "free; make room" in last
        assert sorted(contents(disk / "out.partial" / "files")) == ["small"]
        assert not (disk / "out").exists()
        with PartialFolder(disk / "out", {}) as folder:
            assert folder.finished("small")
            folder.write_json("manifest.json", {})
            folder.commit(["small", "manifest.json"])
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="permission bits are tested for other users below")
def test_a_read_only_mount(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here; the injected EROFS of test_faults covers it")
    try:
        with pytest.raises(CannotCreate, match=r"out\.partial: create failed: Read-only file system"):
            PartialFolder(disk / "out", {}).__enter__()
        with pytest.raises(CannotCreate, match="Read-only file system"):
            write_file(disk / "report", "x")
        with pytest.raises(CannotCreate, match="Read-only file system"):
            check_file(disk / "report")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root; test_faults injects EACCES")
def test_no_write_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(CannotCreate, match=r"out\.partial: create failed: Permission denied"):
        PartialFolder(tmp_path / "out", {}).__enter__()


@pytest.mark.parametrize("kind", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_the_first_operation_fails(tmp_path, monkeypatch, kind):
    def fail(_: str, path: Path) -> None:
        raise OSError(kind, os.strerror(kind), str(path))

    monkeypatch.setattr(files, "_operation", fail)
    with pytest.raises(CannotCreate) as caught:
        PartialFolder(tmp_path / "out", {}).__enter__()
    assert str(tmp_path / "out") in str(caught.value)
    assert os.strerror(kind) in str(caught.value)
    assert contents(tmp_path) == {}


def test_a_damaged_state_is_said_to_be_damaged(tmp_path):
    with PartialFolder(tmp_path / "out", {}) as folder:
        folder.write_json("config.json", {})
    progress = tmp_path / "out.partial" / "progress.json"
    progress.write_text(json.dumps({"config.json": 3}))
    with pytest.raises(QlmError, match=r"progress.json: damaged .* --force"), PartialFolder(tmp_path / "out", {}):
        pass
    with PartialFolder(tmp_path / "out", {}, force=True) as folder:
        assert folder.finished_names == []
