"""YAML 1.2 as plain values, each with its place in the text, and nothing that could be read in two ways.

The core schema (https://yaml.org/spec/1.2.2/#103-core-schema): `1e-4` is a number, `no` is a text. Refused: duplicate keys,
anchors, aliases, tags, several documents, numbers that are not finite or that YAML 1.1 and 1.2 read differently (`010`), keys
without a value, nesting deeper than 16, texts above 256 KiB. ruamel.yaml splits the text into events; what they mean is
decided here, so that no constructor of a library is reached. Every error is one line: `line:column: key.path: found; allowed`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlm.errors import UsageError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_VALUES = 10_000
MAX_INTEGER = 2**63 - 1

KeyPath = tuple[str | int, ...]
Mark = tuple[int, int]  # line, column; both from 1


@dataclass
class Document:
    """Plain values, and where in the text each key and each value begins."""

    value: Any
    values: dict[KeyPath, Mark] = field(default_factory=dict)
    keys: dict[KeyPath, Mark] = field(default_factory=dict)
    numbers: dict[KeyPath, str] = field(default_factory=dict)  # as they are written


# YAML 1.2.2, section 10.3.2, but for integers with leading zeros, which are sorted out in `_scalar`.
_NULL = re.compile(r"null|Null|NULL|~")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Characters that YAML forbids, and the exotic line ends that editors and parsers count differently.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def position(text: str, index: int) -> Mark:
    lines = re.split(r"\r\n|\r|\n", text[:index])
    return len(lines), len(lines[-1]) + 1


def at(mark: Mark, message: str, path: KeyPath = ()) -> UsageError:
    return UsageError(f"{mark[0]}:{mark[1]}: {dotted(path)}: {message}" if path else f"{mark[0]}:{mark[1]}: {message}")


def read_yaml(text: str) -> Document:
    """One YAML document as plain values with positions.

    The events come from ruamel.yaml; what they mean is decided here, so that no constructor of a library is reached.
    """
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise at((1, 1), f"found more than {MAX_BYTES} bytes; allowed: a recipe of at most that")
    forbidden = _FORBIDDEN.search(text)
    if forbidden:
        mark = position(text, forbidden.start())
        raise at(mark, f"found the character U+{ord(forbidden[0]):04X}; allowed: a recipe, printable text in YAML")
    return _Composer(text).document()


class _Composer:
    """Turns ruamel.yaml's events into a `Document`."""

    def __init__(self, text: str) -> None:
        self.mark: Mark = (1, 1)
        self.count = 0
        self.events = self._events(text)
        self.result = Document(None)

    def _events(self, text: str) -> Iterator[Any]:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError

        try:
            for event in YAML(typ="safe", pure=True).parse(text):
                self.mark = (event.start_mark.line + 1, event.start_mark.column + 1)
                yield event
        except MarkedYAMLError as error:
            problem = str(error.problem or error.context or "cannot be read")
            mark = error.problem_mark or error.context_mark
            if "end of stream" in problem and error.context_mark:
                # An open quote: where it opens helps, the end of the file does not.
                mark, problem = error.context_mark, f"{error.context}, {problem}"
            self.mark = (mark.line + 1, mark.column + 1) if mark else self.mark
            if "'\\t'" in problem:
                problem += "; indent with spaces"
            elif "alias" in str(error.context):
                problem += "; put a text that begins with * in quotes"
            raise at(self.mark, f"found what is not YAML: {' '.join(problem.split())}") from None
        except Exception:
            # ruamel.yaml lets bare ValueError, OverflowError, IndexError and others through on some broken texts
            # ("\UFFFFFFFF", a directive with a huge number); for a recipe they all mean the same.
            raise at(self.mark, "found what is not YAML, here or soon after; allowed: a recipe in YAML") from None

    def document(self) -> Document:
        from ruamel.yaml import events

        next(self.events)  # start of stream
        start = next(self.events)
        if not isinstance(start, events.DocumentStartEvent):
            raise at((1, 1), "found an empty file; allowed: a recipe, with model, quantize and output")
        if start.tags or start.version not in (None, (1, 2)):
            raise at(self.mark, "found a YAML directive; allowed: none but %YAML 1.2")
        self.result.value = self._node(next(self.events), (), 0)
        next(self.events)  # end of document
        if not isinstance(next(self.events), events.StreamEndEvent):
            raise at(self.mark, "found a second document; allowed: one recipe a file")
        if not isinstance(self.result.value, dict):
            found = in_words(self.result.value)
            raise at(self.result.values[()], f"found {found}; allowed: a recipe, with model, quantize and output")
        return self.result

    def _node(self, event: Any, path: KeyPath, depth: int) -> Any:
        from ruamel.yaml import events

        mark = self.result.values[path] = self.mark
        self.count += 1
        if self.count > MAX_VALUES:
            raise at(mark, f"found more than {MAX_VALUES} values; allowed: at most that many", path)
        if isinstance(event, events.AliasEvent):
            alias = in_words("*" + str(event.anchor), "")
            raise at(
                mark, f"found the alias {alias}; allowed: the value (a text that begins with * needs quotes)", path
            )
        if event.anchor is not None:
            raise at(mark, f"found the anchor {in_words('&' + str(event.anchor), '')}; allowed: the value alone", path)
        if event.tag is not None:
            tag = in_words(str(event.tag).replace("tag:yaml.org,2002:", "!!"), "")
            raise at(mark, f"found the tag {tag}; allowed: the value alone", path)
        if isinstance(event, events.ScalarEvent):
            try:
                # "\ud83d\ude00" is one character in JSON, which YAML contains; ruamel.yaml leaves the halves apart.
                text = event.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            except UnicodeDecodeError:
                found = in_words(event.value)
                raise at(mark, f"found half a surrogate pair in {found}; allowed: whole characters", path) from None
            value = self._scalar(text, path, mark) if event.implicit[0] else text
            if isinstance(value, int | float) and not isinstance(value, bool) and len(event.value) <= 60:
                self.result.numbers[path] = event.value
            return value
        if depth == MAX_DEPTH:
            raise at(mark, f"found nesting deeper than {MAX_DEPTH}; allowed: at most that", path[:MAX_DEPTH])
        if isinstance(event, events.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := next(self.events), events.SequenceEndEvent):
                items.append(self._node(item, (*path, len(items)), depth + 1))
            return items
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self.events), events.MappingEndEvent):
            key_mark = self.mark
            key = self._key(event, path)
            if key in mapping:
                first = self.result.keys[(*path, key)]
                raise at(key_mark, f"found a second time, first in line {first[0]}; allowed: once", (*path, key))
            self.result.keys[(*path, key)] = key_mark
            mapping[key] = self._node(next(self.events), (*path, key), depth + 1)
        return mapping

    def _key(self, event: Any, path: KeyPath) -> str:
        from ruamel.yaml import events

        if isinstance(event, events.SequenceStartEvent | events.MappingStartEvent):
            raise at(self.mark, "found a list or a mapping as a key; allowed: text", path)
        if isinstance(event, events.ScalarEvent) and event.value == "" and event.implicit[0]:
            raise at(self.mark, "found a value without a key; allowed: key: value", path)
        position = self.result.values[path]
        key = self._node(event, path, 0)
        self.result.values[path] = position
        if not isinstance(key, str):
            raise at(self.mark, f"found {in_words(key)} as a key; allowed: text (put it in quotes)", path)
        return key

    def _scalar(self, text: str, path: KeyPath, mark: Mark) -> Any:
        """The value of a plain scalar under the core schema."""
        if text == "":
            if not path:
                raise at(mark, "found an empty file; allowed: a recipe, with model, quantize and output")
            # The event stands where the value would begin, often a line further; the key is what the reader looks for.
            raise at(self.result.keys.get(path, mark), "found no value; write one, or remove the key", path)
        if _NULL.fullmatch(text):
            return None
        if match := _BOOL.fullmatch(text):
            return match[1] is not None
        if _INTEGER.fullmatch(text):
            digits = text.lstrip("+-")
            if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
                found = f"found {in_words(text, '')}, which is octal in YAML 1.1 and decimal in 1.2"
                raise at(mark, f"{found}; allowed: no leading zero, or 0o before octal", path)
            # Python refuses to convert texts of more than 4300 digits, and nothing here needs more than 64 bits.
            number = int(text, 0) if len(digits) <= 24 else MAX_INTEGER + 1
            if abs(number) > MAX_INTEGER:
                raise at(mark, f"found {in_words(text, 'the number')}; allowed: whole numbers of at most 63 bits", path)
            return number
        if _NOT_FINITE.fullmatch(text) or (FLOAT.fullmatch(text) and not math.isfinite(float(text))):
            raise at(mark, f"found {in_words(text, '')}; allowed: finite numbers", path)
        if FLOAT.fullmatch(text):
            return float(text)
        return text


def dotted(path: KeyPath) -> str:
    """`quantize.overrides['*.fc2'].bits`, `quantize.skip[0]`."""
    parts: list[str] = []
    for step in path:
        if isinstance(step, int):
            parts.append(f"[{step}]")
        elif re.fullmatch(r"[A-Za-z_][\w-]{0,40}", step):
            parts.append(f".{step}" if parts else step)
        else:
            parts.append(f"[{in_words(step, '')}]")
    return "".join(parts) if len(parts) <= 6 else "".join(parts[:6]) + "…"


def in_words(value: object, kind: str | None = None) -> str:
    """A value in a few words, whatever its size. `kind` stands before a text instead of "the text"."""
    if isinstance(value, str):
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value[:60])
        shown = f"'{shown}…' ({len(value)} characters)" if len(value) > 60 else f"'{shown}'"
        kind = "the text" if kind is None else kind
        return f"{kind} {shown}" if kind else shown
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a Python {type(value).__name__}"
