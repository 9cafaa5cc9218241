"""What can go wrong, sorted by who must act. Each kind carries the exit code that the command line ends with.

| exit code | class | who must act |
|---|---|---|
| 2 | UsageError | the user: a recipe, an option or an argument is wrong |
| 65 | DataError | whoever made the file: a checkpoint, a tensor or a text is damaged or not what it claims to be |
| 66 | MissingInput | the user: a file, a folder or a model is not there |
| 69 | Unavailable | the user: a package, a device or an amount of memory that this needs is not there |
| 73 | CannotCreate | the user: the output exists already, cannot be written, or the disk is full |
| 74 | ReadWriteError | the machine: a read or a write failed half-way |
| 130, 143 | (signals) | nobody: stopped by Ctrl-C or SIGTERM; the same command continues |

A message is one line: what was found and where, what was expected, what to do. Control characters in names that come from
files are escaped here, so that no file can write to the user's terminal.
"""


def printable(text: str, limit: int = 1000) -> str:
    """`text` on one line: control and other unprintable characters escaped, cut after `limit` characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


class QlmError(Exception):
    """Any error that qlm raises on purpose. Its text is one printable line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UsageError(QlmError):
    exit_code = 2


class DataError(QlmError):
    exit_code = 65


class MissingInput(QlmError):
    exit_code = 66


class Unavailable(QlmError):
    exit_code = 69


class CannotCreate(QlmError):
    exit_code = 73


class ReadWriteError(QlmError):
    exit_code = 74
