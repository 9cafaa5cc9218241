"""Everything that qlm writes goes through here: whole files and whole folders, complete or not there at all.

A file is written under a temporary name in the same folder, synced, renamed into place, and its folder synced. A folder
is built in `<output>.partial/`:

    identity.json   what is being made: recipe, inputs, versions. A run with another identity does not continue this folder
    progress.json   size, SHA-256 and facts of every finished file
    lock            held (flock) while a process writes here; a lock left by a killed process is no obstacle
    files/          the output itself; `commit` renames it to <output>, which makes all of it visible at once
    old/            the previous output, while `commit` replaces it

The state lies beside `files/` and not in it, so that one rename separates "unfinished" from "finished": at every moment
the output is absent, the old one, or the new one complete. After a kill the same command finds what is finished by its
hash, and redoes the rest.

Each operation on the disk passes through `_operation` first, so that a test can make any one of them fail, or kill the
process there.
"""

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qlm.checkpoint import strict_json
from qlm.checkpoint.folder import is_plain_name
from qlm.errors import CannotCreate, DataError, MissingInput, QlmError, ReadWriteError, UsageError

# At run time torch is not needed to write JSON, and takes seconds to import.
if TYPE_CHECKING:
    import torch

TEMPORARY = ".tmp"
# What marks a folder as one that qlm wrote: --force replaces such a folder (or an empty one) and no other.
MARKER = "manifest.json"
_WRITE_BYTES = 16 << 20
_READ_BYTES = 1 << 20

_CANNOT_CREATE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EFBIG,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    }
)


def _operation(kind: str, path: Path) -> None:
    """Called before every operation on the disk. Does nothing; tests replace it."""


@contextmanager
def _doing(kind: str, path: Path, needed: int = 0) -> Iterator[None]:
    """One operation: the hook first; an OSError comes out as the QlmError that says who must act."""
    try:
        _operation(kind, path)
        yield
    except OSError as error:
        raise _explain(error, kind, path, needed) from error


def _explain(error: OSError, kind: str, path: Path, needed: int) -> QlmError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if kind == "read":
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR)
        return (MissingInput if gone else ReadWriteError)(f"{path}: cannot be read: {reason}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CannotCreate(
            f"{path}: {kind} failed: {reason}: {needed} bytes needed, {_free_bytes(path)} free; make room and run it "
            "again"
        )
    if error.errno in _CANNOT_CREATE:
        return CannotCreate(f"{path}: {kind} failed: {reason}")
    return ReadWriteError(f"{path}: {kind} failed: {reason}")


def _free_bytes(path: Path) -> str:
    for folder in path.parents:
        with suppress(OSError):
            state = os.statvfs(folder)
            return str(state.f_bavail * state.f_frsize)
    return "unknown"


def _write_atomically(path: Path, temporary: Path, data: bytes) -> None:
    """`data` in `path` and on the disk. After an error neither the temporary file nor a part of the file is left."""
    _remove_file(temporary)
    try:
        with _doing("create", path, len(data)):
            # 0o666 less the umask, as any program's files; safetensors' own save_file makes files that only their owner
            # can read.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            view = memoryview(data)
            while len(view):
                with _doing("write", path, len(view)):
                    view = view[os.write(descriptor, view[:_WRITE_BYTES]) :]
            with _doing("sync", path, len(data)):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _rename(old: Path, new: Path) -> None:
    with _doing("rename", new):
        os.rename(old, new)


def _sync_folder(folder: Path) -> None:
    """Make names that were created, renamed or removed in the folder survive a power loss."""
    with _doing("sync", folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if (
                error.errno != errno.EINVAL
            ):  # file systems that cannot sync a folder (some FUSE and network ones) say so
                raise
        finally:
            os.close(descriptor)


def _make_folder(folder: Path) -> bool:
    """Create the folder unless it is there; whether it was created."""
    with _doing("create", folder):
        try:
            os.mkdir(folder)
        except FileExistsError:
            return False
    return True


def _remove_file(path: Path) -> None:
    with _doing("remove", path), suppress(FileNotFoundError):
        os.unlink(path)


def _remove_tree(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all that is in it; nothing there is fine."""
    with _doing("inspect", path):
        if not os.path.lexists(path):
            return
        is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
    if not is_folder:
        _remove_file(path)
        return
    for name in _names(path):
        _remove_tree(path / name)
    with _doing("remove", path):
        os.rmdir(path)


def _names(folder: Path) -> list[str]:
    with _doing("list", folder):
        return sorted(os.listdir(folder))


def _read(path: Path) -> bytes | None:
    """The whole file (a small one of our own), or None when it is not there."""
    with _doing("read", path):
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex.

    Raises:
        MissingInput: it is not there or may not be read.
        ReadWriteError: reading failed.
    """
    return file_facts(path)["sha256"]


def file_facts(path: Path) -> dict[str, Any]:
    """{"bytes": size, "sha256": hex} of a file, from one pass over it."""
    digest, size = hashlib.sha256(), 0
    with _doing("read", path), open(path, "rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_file(path: str | Path, data: bytes | str) -> None:
    """Write one file, replacing what is there, so that a reader sees the old bytes or the new ones and nothing between.

    A link is followed. A pipe or a device (`/dev/stdout`) is written to directly.

    Raises:
        CannotCreate: the folder is missing or not writable, or the disk is full.
        ReadWriteError: the write failed.
    """
    target, temporary = _target(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    if temporary is None:
        with _doing("write", target, len(content)), open(target, "wb", buffering=0) as file:
            view = memoryview(content)
            while len(view):
                view = view[file.write(view) or 0 :]
        return
    _write_atomically(target, temporary, content)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files under a temporary name, sync it, and rename it into place: it is there complete or not at all. One that is
    there already is removed first.

    Raises:
        CannotCreate, ReadWriteError: as `write_file`; nothing of it is left.
    """
    temporary = folder.with_name(folder.name + TEMPORARY)
    _remove_tree(temporary)
    try:
        _make_folder(temporary)
        for name, data in files.items():
            path = temporary / _plain(name)
            _write_atomically(path, path.with_name(name + TEMPORARY), data)
        _remove_tree(folder)
        _rename(temporary, folder)
    except BaseException:
        with suppress(QlmError):
            _remove_tree(temporary)
        raise
    _sync_folder(folder.parent)


def remove_tree(path: Path) -> None:
    """Remove a file or a folder with all that is in it; nothing there is fine. A folder's name goes first, so that no half of it is left."""
    aside = path.with_name(path.name + TEMPORARY)
    _remove_tree(aside)
    if path.is_dir() and not path.is_symlink():
        _rename(path, aside)
        _remove_tree(aside)
    else:
        _remove_tree(path)


def check_file(path: str | Path) -> None:
    """Refuse now what `write_file` would refuse after the work. Leaves nothing, and leaves alone what is there.

    Raises:
        CannotCreate: the folder is missing or not writable, or the disk is full.
    """
    target, temporary = _target(path)
    with _doing("create", target):
        if temporary is None:
            if not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            os.unlink(temporary)


def _target(path: str | Path) -> tuple[Path, Path | None]:
    """The file that a path leads to, and under which name it is written first; None for a pipe or a device."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise CannotCreate(f"{path}: is a folder; expected the name of a file")
    if os.path.lexists(target) and not target.is_file():
        return target, None
    return target, target.with_name(f".{target.name}.qlm{TEMPORARY}")


def check_output(output: Path, force: bool, identity: Mapping[str, Any] | None = None) -> bool:
    """Whether there is an output to replace. Raises CannotCreate for one that may not be replaced.

    Args:
        identity: what is to be made, as `PartialFolder` takes it: an output of qlm that was made from something else is told apart by
            the first part that differs.
    """
    if not os.path.lexists(output):
        return False
    is_folder = output.is_dir() and not output.is_symlink()
    if not is_folder or ((names := _names(output)) and MARKER not in names):
        found = f"it has no {MARKER}" if is_folder else "it is no folder"
        refused = ", so --force does not replace it" if force else ""
        raise CannotCreate(
            f"{output}: exists already and is not an output of qlm ({found}){refused}; give another output, or remove it yourself"
        )
    if not force:
        difference = ""
        if identity is not None:
            former = _made_from(output, identity)
            if threads := _other_threads(former, identity):
                raise CannotCreate(f"{output}: was made with {threads}")
            difference = _difference(former, identity)
        raise CannotCreate(f"{output}: exists already{difference}; give another output, or --force to replace it")
    return True


class PartialFolder:
    """A folder being written. Use it in a `with` statement; without `commit` the output does not appear.

    An error leaves the finished files for the next run, and nothing at all when no file is finished.

    Args:
        output: the folder to make. It must not be there (unless `force`); folders above it are made.
        identity: what is being made, as JSON values: everything that decides the output's bytes.
        force: start over, whatever a former run left, and let `commit` replace an existing output.

    Raises on entering:
        CannotCreate: the output exists (if it is one of qlm's, the first part of its identity that differs is named), another process
            writes it, or its place cannot be written.
        UsageError: a former run with another identity is unfinished; names the first part that differs.
    """

    def __init__(self, output: str | Path, identity: Mapping[str, Any], force: bool = False) -> None:
        self.output = Path(os.path.abspath(output))
        if not self.output.name:
            raise CannotCreate(f"{output}: cannot be an output folder")
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.force = force
        # As it comes back from the file, so that tuples and lists are the same.
        self._identity: dict[str, Any] = strict_json.load_object(strict_json.dumps(dict(identity)), "identity")
        self._files = self.partial / "files"
        self._old = self.partial / "old"
        self._records: dict[str, dict[str, Any]] = {}
        self._checked: set[str] = set()
        self._lock: int | None = None
        self._committed = False
        # Whether the partial folder holds nothing of a former run, so that it can go when this one cannot start.
        self._fresh = False
        self._parents: list[Path] = []
        self._state_folders: list[Path] = []

    def __enter__(self) -> "PartialFolder":
        try:
            self._make_parents()
            self._fresh = self._take_lock()
            self._start()
        except BaseException:
            if self._fresh:
                self._leave_nothing()
            self._remove_parents()
            self._release_lock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            keeps = any(_names(folder) for folder in self._state_folders if folder.exists())
            if kind is not None and not self._committed and not self._records and not keeps:
                self._leave_nothing()
                self._remove_parents()
        finally:
            self._release_lock()

    @property
    def finished_names(self) -> list[str]:
        """Names of the files that have a record, sorted. `finished` says whether the file still agrees with it."""
        return sorted(self._records)

    def path(self, name: str) -> Path:
        """Where the file of the unfinished output lies, for reading it back."""
        return self._files / _plain(name)

    def state_folder(self, name: str) -> Path:
        """A folder beside the files for what the next run needs and the output does not hold, such as checkpoints. As long as it is not
        empty, an error leaves the unfinished output; `commit` removes it.
        """
        path = self.partial / _plain(name)
        _make_folder(path)
        self._state_folders.append(path)
        return path

    def finished(self, name: str) -> bool:
        """Whether the file is there with the size and hash recorded when it was written. Hashed once per run."""
        record = self._records.get(_plain(name))
        if record is None:
            return False
        if name not in self._checked:
            path = self.path(name)
            if (
                not path.is_file()
                or path.is_symlink()
                or file_facts(path) != {key: record[key] for key in ("bytes", "sha256")}
            ):
                return False
            self._checked.add(name)
        return True

    def record(self, name: str) -> Any:
        """The `record` that the file was written with. KeyError when it has none."""
        return self._records[name]["record"]

    def facts(self, names: Collection[str]) -> dict[str, dict[str, Any]]:
        """{name: {"bytes": size, "sha256": hex}} of finished files, for the manifest."""
        return {name: {key: self._records[name][key] for key in ("bytes", "sha256")} for name in sorted(names)}

    def write_bytes(self, name: str, data: bytes, record: Any = None) -> None:
        """Write one file of the output and record it as finished.

        Args:
            record: JSON value to keep with it, for the run that continues this one.
        """
        path = self.path(name)
        self._checked.discard(name)
        # The record as it comes back from the file, so that this run and the next see the same value.
        kept = strict_json.loads(strict_json.dumps(record), "record")
        facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "record": kept}
        _write_atomically(path, path.with_name(name + TEMPORARY), data)
        records = {**self._records, name: facts}
        self._write_state("progress.json", records)
        self._records = records
        self._checked.add(name)

    def write_json(self, name: str, value: object, sort_keys: bool = True, record: Any = None) -> None:
        """Write a JSON file: indented by 2, keys sorted unless their order has a meaning, newline at the end."""
        self.write_bytes(name, strict_json.dumps(value, sort_keys), record)

    def write_tensors(
        self,
        name: str,
        tensors: Mapping[str, "torch.Tensor"],
        metadata: Mapping[str, str] | None = None,
        record: Any = None,
    ) -> None:
        """Write a safetensors file. The tensors must be contiguous and must not share memory.

        Args:
            metadata: at most one entry; {"format": "pt"}, which transformers asks for, when left out.

        Raises:
            ValueError: more than one entry of metadata: safetensors 0.8.0 writes them in a random order, so that the
                same tensors would not give the same bytes.
        """
        import safetensors.torch

        entries = {"format": "pt"} if metadata is None else dict(metadata)
        if len(entries) > 1:
            raise ValueError(
                f"{name}: safetensors writes more than one entry of metadata in a random order: {sorted(entries)}"
            )
        self.write_bytes(name, safetensors.torch.save(dict(tensors), entries), record)

    def commit(self, keep: Collection[str]) -> None:
        """Make the output appear, with exactly the files in `keep`.

        Raises:
            CannotCreate: another file is in the folder, the output exists (without `force`), or is not one that qlm
                wrote.
            ReadWriteError: a file of `keep` is missing or has changed since it was written.
        """
        for name in keep:
            if not self.finished(name):
                raise ReadWriteError(
                    f"{self.path(name)}: is missing or has changed since it was written; run the same command again"
                )
        unexpected = sorted(set(_names(self._files)) - set(keep))
        if unexpected:
            raise CannotCreate(
                f"{self.path(unexpected[0])}: does not belong to the output; remove it and run the same command again"
            )
        _sync_folder(self._files)
        replaces = check_output(self.output, self.force)
        if replaces:
            _rename(self.output, self._old)
        try:
            _rename(self._files, self.output)
        except BaseException:
            if replaces:
                with suppress(OSError):
                    os.rename(self._old, self.output)
            raise
        self._committed = True
        _sync_folder(self.output.parent)
        self._remove_partial()

    def _start(self) -> None:
        """Decide between a new folder and the continuation of a former one."""
        identity = _read(self.partial / "identity.json")
        if not self._fresh and identity is None:
            strangers = [name for name in _names(self.partial) if name not in ("lock", f"identity.json{TEMPORARY}")]
            if strangers:
                raise CannotCreate(
                    f"{self.partial / strangers[0]}: is in the way; qlm needs {self.partial.name} for itself; remove it"
                )
            self._fresh = True
        elif identity is not None and not self.force and not self._files.exists() and os.path.lexists(self.output):
            # A former run was stopped after its output had appeared; all that is left to do is to tidy up.
            self._fresh = True
        check_output(self.output, self.force, self._identity)
        if identity is not None and self.force:
            self._remove_partial(keep_lock=True)
            self._fresh, identity = True, None
        if identity is None:
            self._write_state("identity.json", self._identity)
        else:
            self._check_identity(identity)
        _make_folder(self._files)
        _sync_folder(self.partial)
        _sync_folder(self.partial.parent)
        self._read_progress()

    def _check_identity(self, text: bytes) -> None:
        former = strict_json.load_object(text, str(self.partial / "identity.json"))
        if threads := _other_threads(former, self._identity):
            raise UsageError(f"{self.partial}: was begun with {threads}")
        if difference := _difference(former, self._identity):
            raise UsageError(
                f"{self.partial}: an unfinished run{difference}; run what it was started with, or give --force to start over"
            )

    def _read_progress(self) -> None:
        """The records of a former run; files without one are removed, for they may be incomplete."""
        data = _read(self.partial / "progress.json")
        records = {} if data is None else strict_json.load_object(data, str(self.partial / "progress.json"))
        for name, record in records.items():
            if not isinstance(record, dict) or record.keys() != {"bytes", "sha256", "record"}:
                raise DataError(f"{self.partial / 'progress.json'}: damaged at {name!r}; give --force to start over")
        self._records = records
        for name in _names(self._files):
            if name not in records:
                _remove_tree(self._files / name)

    def _write_state(self, name: str, value: object) -> None:
        path = self.partial / name
        _write_atomically(path, path.with_name(name + TEMPORARY), strict_json.dumps(value))

    def _make_parents(self) -> None:
        """Create the folders above the output that are not there."""
        for folder in reversed(self.output.parents):
            if not folder.exists() and _make_folder(folder):
                self._parents.append(folder)

    def _remove_parents(self) -> None:
        """Remove what `_make_parents` created, as far as it is still empty."""
        for folder in reversed(self._parents):
            with suppress(OSError):
                os.rmdir(folder)

    def _leave_nothing(self) -> None:
        # The error under way says what went wrong; that its remains cannot be removed as well adds nothing.
        with suppress(QlmError):
            self._remove_partial()

    def _take_lock(self) -> bool:
        """Make the folder unless it is there, and lock it; whether it was made."""
        created = False
        try:
            while self._lock is None:
                created = _make_folder(self.partial) or created
                self._lock = self._try_lock(self.partial / "lock")
        except BaseException:
            if created:
                with suppress(OSError):  # not empty: it is another process's by now
                    os.rmdir(self.partial)
            raise
        return created

    def _try_lock(self, path: Path) -> int | None:
        """Descriptor of the locked file; None when the process that was writing has just finished and removed it."""
        with _doing("lock", path):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise CannotCreate(f"{self.output}: another process is writing it; wait for it to end") from None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # removed between the two calls, so that this lock would lock nobody out
            return None

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_partial(self, keep_lock: bool = False) -> None:
        """Remove the folder and all that is in it, the lock last. An old output that stands aside is put back when none
        is in its place.
        """
        if os.path.lexists(self._old) and not os.path.lexists(self.output):
            _rename(self._old, self.output)
        self._records, self._checked = {}, set()
        # identity.json goes late: without it the folder would not be known as qlm's own after an interruption.
        last = ["identity.json", "lock"]
        for name in [*(name for name in _names(self.partial) if name not in last), *last[: 1 if keep_lock else 2]]:
            _remove_tree(self.partial / name)
        if not keep_lock:
            with _doing("remove", self.partial):
                try:
                    os.rmdir(self.partial)
                except OSError as error:
                    # The next writer may already have made its lock in the folder.
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                        raise
            _sync_folder(self.output.parent)


def tidy(output: str | Path) -> None:
    """Remove what a run left beside its output when it was stopped right after the output had appeared."""
    folder = PartialFolder(output, {})
    if os.path.lexists(folder.output) and folder.partial.is_dir() and not os.path.lexists(folder.partial / "files"):
        with suppress(CannotCreate):  # the output exists; what is left of its making goes before that is said
            folder.__enter__()


def _plain(name: str) -> str:
    if not is_plain_name(name) or name.endswith(TEMPORARY):
        raise ValueError(f"{name!r} cannot be the name of a file of an output")
    return name


def _made_from(output: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What an output of qlm was made from, by its manifest; `identity` itself where no manifest says."""
    with suppress(QlmError):
        text = None if output.is_symlink() or not output.is_dir() else _read(output / MARKER)
        if text is not None:
            written = strict_json.load_object(text, str(output / MARKER))
            return {key: written[key] for key in identity if key in written}
    return dict(identity)


def _other_threads(former: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """That two identities differ in the number of threads and in nothing else, in words that go on from "made with"; or empty."""
    before, after = former.get("threads"), now.get("threads")
    if before is None or after is None or before == after or _difference({**former, "threads": after}, now):
        return ""
    plural = "" if before == 1 else "s"
    return f"{before} thread{plural}, and this run has {after}: give --threads {before}, or --force to start over"


def _difference(former: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first part in which two identities differ, in words that go on from what is known of the former one; empty where none does.
    The recipe goes first: that it names another file says more than that the file is another.
    """
    for key in sorted(former.keys() | now.keys(), key=lambda key: (key != "recipe", key)):
        if key == "inputs" and (changed := _changed_file(former.get(key), now.get(key))):
            return f", and {changed}"
        before, after = ({key: each[key]} if key in each else {} for each in (former, now))
        if difference := _first_difference(before, after):
            return f" with another {difference}"
    return ""


def _changed_file(former: Any, now: Any) -> str | None:
    """The first input that both have with other bytes, in words; None where there is none."""
    if not isinstance(former, dict) or not isinstance(now, dict):
        return None
    for name in sorted(former.keys() & now.keys()):
        facts = former[name], now[name]
        if all(isinstance(each, dict) and "sha256" in each for each in facts) and facts[0] != facts[1]:
            then, there = (f"{each['sha256'][:12]}…" for each in facts)
            return f"{name} has changed since (SHA-256 {then} then, {there} now)"
    return None


def _first_difference(former: Any, now: Any, key: str = "") -> str | None:
    """The first field that differs, with both values, in words; None when nothing does."""
    if isinstance(former, dict) and isinstance(now, dict):
        for name in sorted(former.keys() | now.keys()):
            inner = f"{key}.{name}" if key else name
            if name not in former or name not in now:
                return (
                    f"{inner}: it has {_short(former.get(name, _ABSENT))}, now it is {_short(now.get(name, _ABSENT))}"
                )
            if difference := _first_difference(former[name], now[name], inner):
                return difference
        return None
    # type() because 1 == True == 1.0 to Python
    if type(former) is not type(now) or former != now:
        return f"{key}: it has {_short(former)}, now it is {_short(now)}"
    return None


_ABSENT = object()


def _short(value: Any) -> str:
    text = "nothing" if value is _ABSENT else repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
