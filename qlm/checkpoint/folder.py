"""The one way from a name in a checkpoint to a file on disk: a plain name, a regular file, inside the model's folder.

The cache of the hub client consists of links (`models--org--name/snapshots/<commit>/config.json ->
../../blobs/<hash>`), so links are not refused as such: the rule is that the real path lies in the model's folder or in
the `blobs/` of the same cached repository.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlm.errors import DataError, MissingInput, ReadWriteError, UsageError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PULL_REQUEST = re.compile(r"refs/pr/\d+")


def is_plain_name(name: str) -> bool:
    """Whether `name` names a file in a folder and can mean nothing else on any system: no separator, drive, `..` or
    control character.
    """
    return (
        0 < len(name.encode("utf-8", "replace")) <= 255
        and name not in (".", "..")
        and name.isprintable()
        and not any(c in name for c in '/\\:*?"<>|')
    )


def resolve_model_folder(path: Path, revision: str | None) -> Path:
    """The folder with the model's files: `path` itself, or for the hub client's folder of a repository, the snapshot of
    `revision`.

    Raises:
        MissingInput: nothing is there, or not that revision.
        UsageError: `revision` is given and the folder is no cached repository.
    """
    if not path.is_dir():
        what = "is a file; expected the folder that holds it" if path.exists() else "does not exist"
        raise MissingInput(f"model folder {path} {what}")
    if not (path.name.startswith("models--") and (path / "snapshots").is_dir()):
        if revision is not None and not (is_cached_snapshot(path) and path.name == revision):
            raise UsageError(f"model folder {path}: a revision ({revision!r}) is for hub ids alone; leave it out")
        return path
    wanted = revision or "main"
    commit = wanted
    if not _COMMIT.fullmatch(wanted):
        if not is_plain_name(wanted) and not _PULL_REQUEST.fullmatch(wanted):
            raise UsageError(f"model folder {path}: {wanted!r} is not the name of a revision")
        reference = path / "refs" / wanted
        try:
            commit = reference.read_text(encoding="ascii").strip() if reference.stat().st_size < 200 else ""
        except (OSError, ValueError):
            raise MissingInput(
                f"cached repository {path}: revision {wanted!r} is not in the cache; download it first"
            ) from None
        if not _COMMIT.fullmatch(commit):
            raise DataError(f"{reference}: does not hold the 40 hex digits of a commit")
    snapshot = path / "snapshots" / commit
    if not snapshot.is_dir():
        raise MissingInput(f"cached repository {path}: revision {wanted!r} is not in the cache; download it first")
    return snapshot


def is_cached_snapshot(path: Path) -> bool:
    """Whether the real path of the folder is `.../models--org--name/snapshots/<commit>`."""
    real = path.resolve()
    return real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")


class ModelFolder:
    """A folder whose files are reached by plain names only."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        real = self.folder.resolve()
        self._allowed = [real]
        if is_cached_snapshot(real):
            self._allowed.append(real.parent.parent / "blobs")

    def names(self) -> list[str]:
        """Names of everything in the folder, sorted."""
        try:
            return sorted(os.listdir(self.folder))
        except OSError as error:
            raise ReadWriteError(f"{self.folder}: cannot be listed: {error.strerror}") from None

    def real_path(self, name: str) -> Path | None:
        """Real path of the file, or None when there is none of that name.

        Raises:
            DataError: not a plain name, not a regular file, or a link that leads out of the folder or to nothing.
        """
        if not is_plain_name(name):
            raise DataError(
                f"{self.folder}: the file name {name!r} is not allowed: a plain name of a file in the folder is "
                "expected"
            )
        path = self.folder / name
        if not os.path.lexists(path):
            return None
        try:
            real = path.resolve(strict=True)
            mode = os.stat(real).st_mode
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: a link that leads nowhere ({error}); download the file again") from None
        if not any(real.is_relative_to(allowed) for allowed in self._allowed):
            raise DataError(f"{path}: a link to {real}, outside the model's folder; files outside it are not opened")
        if not stat.S_ISREG(mode):
            raise DataError(f"{path}: not a regular file")
        return real

    def path(self, name: str) -> Path | None:
        """`folder / name` when that file is there and may be opened, else None. Errors as `real_path`."""
        return None if self.real_path(name) is None else self.folder / name

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """File descriptor of the file, for reading. Errors as `real_path`, and MissingInput when there is none."""
        real = self.real_path(name)
        if real is None:
            raise MissingInput(f"{self.folder / name}: no such file")
        try:
            # A path that turned into a link or a pipe since it was checked is not followed and not waited for.
            descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            kind = MissingInput if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM) else ReadWriteError
            raise kind(f"{self.folder / name}: cannot be opened: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DataError(f"{self.folder / name}: not a regular file")
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, name: str, max_bytes: int) -> bytes:
        """The whole file. Errors as `open`, and DataError when it is larger than `max_bytes`."""
        with self.open(name) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > max_bytes:
                raise DataError(f"{self.folder / name}: {size} bytes; at most {max_bytes} are read")
            data = bytearray(size)
            read_into(descriptor, memoryview(data), 0, self.folder / name)
            return bytes(data)


# One system call moves at most 2 GiB on Linux; smaller pieces let Ctrl-C through on slow disks.
_PIECE_BYTES = 64 << 20


def read_into(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill `buffer` (bytes) from position `offset` of the file.

    Raises:
        DataError: the file ends before.
        ReadWriteError: the read failed.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done : done + _PIECE_BYTES]], offset + done)
        except OSError as error:
            raise ReadWriteError(f"{file}: read failed at byte {offset + done}: {error.strerror}") from None
        if count == 0:
            raise DataError(
                f"{file}: ends at byte {offset + done}, expected at least {offset + len(buffer)}; download it again"
            )
        done += count
