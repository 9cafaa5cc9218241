"""Opens a recipe's file, and nothing else."""

import difflib
import os
import stat
from pathlib import Path

from qlm.errors import MissingInput, ReadWriteError, UsageError
from qlm.strict_yaml import MAX_BYTES, position


def read_recipe(path: str | Path) -> tuple[str, str]:
    """The text of a recipe file, and its name for errors.

    Raises:
        MissingInput: there is no such file.
        UsageError: it is no regular file, too large, may not be read, or is not UTF-8.
        ReadWriteError: reading failed half-way.
    """
    source = os.fspath(path)
    try:
        # A pipe would block `open` for ever, so the kind is asked first.
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UsageError(f"{source}: found {kind}; allowed: a recipe, a YAML file")
        with open(source, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingInput(f"{source}: no such recipe{_neighbour(source)}") from None
    except PermissionError:
        raise UsageError(f"{source}: may not be read; change its permissions, or name another recipe") from None
    except ValueError:
        raise MissingInput(f"{source}: no such recipe; a file name holds no NUL character") from None
    except OSError as error:
        raise ReadWriteError(f"{source}: the recipe cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{source}:1:1: found {status.st_size} bytes; allowed: a recipe of at most {MAX_BYTES}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        line, column = position(before, len(before))
        raise UsageError(
            f"{source}:{line}:{column}: found byte 0x{raw[error.start]:02x}, which is not UTF-8; "
            "allowed: a recipe, YAML in UTF-8"
        ) from None
    return text, source


def _neighbour(source: str) -> str:
    """A hint at a recipe of nearly the same name in the same folder, or nothing."""
    folder, name = os.path.split(source)
    try:
        names = [entry for entry in os.listdir(folder or ".") if entry.endswith((".yaml", ".yml"))]
    except OSError:
        return ""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {os.path.join(folder, close[0])}?" if close else ""
