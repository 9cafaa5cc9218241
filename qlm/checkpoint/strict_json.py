"""JSON from files that may be hostile: anything that two readers could understand differently is an error.

Refused: duplicate keys, NaN and infinities, numbers that overflow, nesting that exhausts the stack, texts over a size
    limit.
"""

import json
import math
from typing import Any, NoReturn

from qlm.errors import DataError

# Enough for the index of a model with a million tensors; a bound against texts made to fill memory.
MAX_JSON_BYTES = 32 << 20
# Python refuses to convert longer integers (CVE-2020-10735); no number in a checkpoint needs more than 64 bits.
MAX_DIGITS = 20


def loads(data: bytes, source: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value that `data` (UTF-8) encodes. `source` names the text in errors.

    Raises:
        DataError: not JSON, too large, or one of the things that this module refuses.
    """
    if len(data) > max_bytes:
        raise DataError(f"{source}: {len(data)} bytes of JSON; at most {max_bytes} are read")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=lambda pairs: _object(pairs, source),
            parse_constant=lambda text: _refuse(source, f"the number {text}"),
            parse_int=lambda text: _integer(text, source),
            parse_float=lambda text: _float(text, source),
        )
    except RecursionError:
        raise DataError(f"{source}: nested too deeply for a JSON text of a checkpoint") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        # `source` may name a line of a file already, and then there is one line here.
        where = f"line {error.lineno} column {error.colno}" if b"\n" in data.strip() else f"column {error.colno}"
        # Some of Python's messages end with "at" or "starting at" already.
        what = error.msg.removesuffix(" at").removesuffix(" starting")
        raise DataError(f"{source}: not valid JSON: {what} at {where}") from None
    except ValueError as error:
        raise DataError(f"{source}: not valid JSON: {error}") from None


def load_object(data: bytes, source: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Like `loads`, but the value must be a JSON object."""
    value = loads(data, source, max_bytes)
    if not isinstance(value, dict):
        raise DataError(f"{source}: holds a JSON {type(value).__name__}; expected an object")
    return value


def dumps(value: object, sort_keys: bool = True) -> bytes:
    """The one way in which qlm writes JSON: indented by 2, keys sorted, UTF-8, newline at the end; the same value, the
    same bytes.
    """
    text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def _object(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DataError(f"{source}: the key {key!r} appears twice in one object")
            seen.add(key)
    return result


def _integer(text: str, source: str) -> int:
    if len(text) > MAX_DIGITS:
        _refuse(source, f"an integer of {len(text)} digits")
    return int(text)


def _float(text: str, source: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(source, f"the number {text[:40]}, too large for a double")
    return value


def _refuse(source: str, what: str) -> NoReturn:
    raise DataError(f"{source}: holds {what}, which is not allowed here")
