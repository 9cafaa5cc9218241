"""A recipe's models in words: what validation found wrong, the JSON Schema for editors, the table of the README.

All of it is read off the JSON Schema that pydantic makes of a root model, so that a key is described in one place alone.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from qlm.errors import UsageError
from qlm.recipe.backend_keys import BITS, PRESETS, TAKES, Backend
from qlm.strict_yaml import FLOAT, Document, KeyPath, Mark, dotted, in_words

# Tags of what a source of data may be: pydantic puts them into the path of an error.
FILE, HUB, SHARE = "<file>", "<hub>", "<share>"
_TAGGED = (("calibration", "data"), ("evaluate", "data"), ("train", "data"), ("train", "validation"))
_YAML_1_1_BOOL = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}

Root = TypeVar("Root", bound=BaseModel)


def refused(key: str | KeyPath | None, message: str, instead: str | None = None) -> PydanticCustomError:
    """An error about `key` of the section that is being validated, or the path of one inside it; `message` is "found; allowed".

    Args:
        instead: key of the section that stands in the text where `key`, which is missing, does not.
    """
    path = () if key is None else (key,) if isinstance(key, str) else tuple(key)
    return PydanticCustomError("qlm", "{message}", {"key": path, "message": message, "instead": instead})


def listed(options: Iterable[object], word: str) -> str:
    """ "a, b or c"."""
    words = [str(option) for option in options]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {word} {words[-1]}"


def _close(found: str, options: Iterable[object]) -> str | None:
    """The option that `found` is a near miss of."""
    folded = {str(option).lower().replace("-", "_"): str(option) for option in options}
    close = difflib.get_close_matches(found[:200].lower().replace("-", "_"), folded, n=1)
    return folded[close[0]] if close else None


def _choices(node: Mapping[str, Any]) -> list[Any]:
    """The values that a JSON Schema node lists, if it does."""
    return list(node["enum"]) if "enum" in node else [node["const"]] if "const" in node else []


@dataclass(frozen=True)
class Words(Generic[Root]):
    """What there is to say about recipes of one kind; `root` is the model of the whole recipe."""

    root: type[Root]

    def validated(self, document: Document) -> Root:
        """The recipe that a document holds.

        Raises:
            UsageError: "line:column: key.path: what was found; what is allowed", the first of what is wrong.
        """
        try:
            return self.root.model_validate(document.value)
        except ValidationError as error:
            raise UsageError(self.explain(error, document)) from None

    # --- the schema ---------------------------------------------------------------------------------------------------

    @cached_property
    def _schema(self) -> dict[str, Any]:
        return self.root.model_json_schema()

    def _node(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    def _alternatives(self, node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        node = self._node(node)
        nodes = node.get("anyOf") or node.get("oneOf")
        return [leaf for option in nodes for leaf in self._alternatives(option)] if nodes else [node]

    def _schema_at(self, path: KeyPath) -> Mapping[str, Any] | None:
        """The JSON Schema of the value at `path`, or None where no recipe has one."""
        node: Mapping[str, Any] = self._schema
        for step in path:
            for option in self._alternatives(node):
                child = option.get("items") if isinstance(step, int) else option.get("properties", {}).get(step)
                child = child or (option.get("additionalProperties") if isinstance(step, str) else None)
                if child:
                    node = child
                    break
            else:
                return None
        return node

    def _keys_at(self, path: KeyPath) -> list[str]:
        """The keys of the section at `path`."""
        options = self._alternatives(self._schema_at(path) or {})
        return [key for option in options for key in option.get("properties", ())]

    def _allowed(self, node: Mapping[str, Any]) -> str:
        """The values that a JSON Schema node allows, in words."""
        options = self._alternatives(node)
        if len(options) > 1:
            return listed(
                [choice for option in options for choice in _choices(option) or [self._allowed(option)]], "or"
            )
        node = options[0]
        if _choices(node):
            return listed(_choices(node), "or")
        kind = node.get("type")
        if kind == "integer":
            return f"a whole number from {node['minimum']} to {node['maximum']}"
        if kind == "number":
            if "minimum" in node and "maximum" in node:
                return f"a number from {node['minimum']:g} to {node['maximum']:g}"
            low = f"from {node['minimum']:g}" if "minimum" in node else f"above {node['exclusiveMinimum']:g}"
            high = f"at most {node['maximum']:g}" if "maximum" in node else f"below {node['exclusiveMaximum']:g}"
            return f"a number {low}, {high}"
        if kind == "array":
            items = self._allowed(node["items"]).removeprefix("a ")
            return f"a list of {'one or more ' if node.get('minItems') else ''}{items}s"
        if kind == "object" and "properties" in node:
            return f"a section with {listed(node['properties'], 'and')}"
        if kind == "object":
            return f"a mapping from text to {self._allowed(node['additionalProperties'])}"
        return {"boolean": "true or false", "string": "a text", "null": "null"}[str(kind)]

    # --- errors -------------------------------------------------------------------------------------------------------

    def explain(self, error: ValidationError, document: Document, prefix: KeyPath = ()) -> str:
        """The first of pydantic's errors, by its place in the file, as "line:column: key.path: found; allowed"."""
        complaints: list[tuple[bool, Mark, str]] = []
        for detail in error.errors(include_url=False):
            # A default that depends on a field which is itself wrong: pydantic says so a second time.
            if detail["type"] == "default_factory_not_called":
                continue
            path, value, is_key = _place(detail, document, prefix)
            context = detail.get("ctx", {})
            is_missing = detail["type"] == "missing"
            instead: KeyPath | None = None
            if detail["type"] == "qlm":
                if context["instead"] is not None:
                    instead = (*path, context["instead"])
                if context["key"]:
                    path, is_key = (*path, *context["key"]), True
                message = context["message"]
            elif detail["type"] in ("extra_forbidden", "invalid_key"):
                is_key = True
                message = self._unknown_key(path, document.value)
            elif is_missing:
                message = f"missing; allowed: {self._allowed(self._schema_at(path) or {'type': 'string'})}"
            elif is_key:
                message = f"found {in_words(path[-1])} as a key; allowed: a text of 1 to 256 characters"
            elif detail["type"] in ("string_too_short", "string_too_long"):
                limits = [option.get("maxLength", 0) for option in self._alternatives(self._schema_at(path) or {})]
                message = f"found {in_words(value)}; allowed: a text of 1 to {max(limits)} characters"
            elif detail["type"] == "too_long":
                message = f"found {context['actual_length']} entries; allowed: at most {context['max_length']}"
            else:
                message = self._wrong_value(path, value, document.numbers.get(path))
            mark = document.keys.get(path) if is_key else None
            mark = mark or (None if instead is None else document.keys.get(instead))
            # What is missing has no place of its own; the section that lacks it has.
            for length in range(len(path), -1, -1):
                mark = mark or document.values.get(path[:length])
            # A misspelt key is also a missing one, and says more.
            complaints.append((is_missing, mark or (0, 0), f"{dotted(path)}: {message}"))
        _, (line, column), message = min(complaints, key=lambda complaint: complaint[:2])
        return f"{line}:{column}: {message}" if line else message

    def _unknown_key(self, path: KeyPath, data: Any) -> str:
        name = str(path[-1])
        options = self._keys_at(path[:-1])
        if path[:-1] == ("quantize",):
            backend = data["quantize"].get("backend")
            takes = TAKES.get(backend) if isinstance(backend, str) else None
            options = ["backend", *takes] if takes else options
        message = f"unknown key; allowed: {', '.join(options)}"
        sections = [(key,) for key in self._schema["properties"] if self._keys_at((key,))]
        for home in ((), *sections):
            if home != path[:-1] and name in self._alternatives(self._schema_at(home) or {})[0].get("properties", {}):
                place = f"{name} at the top level" if home == () else dotted((*home, name))
                return f"{message}; did you mean {place}?"
        close = _close(name, options)
        return f"{message}; did you mean {close}?" if close else message

    def _wrong_value(self, path: KeyPath, value: object, number: str | None) -> str:
        node = self._schema_at(path) or {"type": "string"}
        options = [str(choice) for option in self._alternatives(node) for choice in _choices(option)]
        found = f"the number {number}" if number else in_words(value)
        message = f"found {found}; allowed: {self._allowed(node)}"
        kinds = [option.get("type") for option in self._alternatives(node)]
        if isinstance(value, str):
            close = _close(value, options)
            if "boolean" in kinds:
                close = _YAML_1_1_BOOL.get(value.lower()) or _close(value, ("true", "false"))
            elif not close and "string" not in kinds and FLOAT.fullmatch(value.replace("_", "")):
                close = value.replace("_", "")
            if close:
                message += f"; did you mean {close}, without quotes?" if close == value else f"; did you mean {close}?"
            return message
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and {"integer", "number"}.intersection(kinds):
            # It was meant as a number, and is too small or too large.
            return message
        if "string" in kinds and not options and isinstance(value, int | float | None):
            return f"{message}; put it in quotes if it is meant as text"
        return message

    # --- for editors and for the README -------------------------------------------------------------------------------

    def json_schema(self, title: str) -> dict[str, Any]:
        """The JSON Schema (draft 2020-12), a fresh copy: in `quantize`, each backend is allowed its own keys alone."""
        schema = json.loads(json.dumps(self._schema))
        section = schema["$defs"]["QuantizeRecipe"]
        section["allOf"] = [
            {
                "if": {"properties": {"backend": {"const": backend}}, "required": ["backend"]},
                "then": {
                    "properties": {
                        **{key: False for key in section["properties"] if key not in ("backend", *TAKES[backend])},
                        **({"bits": {"enum": sorted(BITS[backend])}} if backend in BITS else {}),
                    }
                },
            }
            for backend in get_args(Backend)
        ]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}

    def table(self, explained: Mapping[str, str] | None = None) -> str:
        """Every key as a Markdown table: key, what is allowed, default, meaning.

        Args:
            explained: sections that another table has, the names of their models to their keys: they get no rows here.
        """
        rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
        expanded = dict(explained or {})

        def add(node: Mapping[str, Any], prefix: str) -> None:
            for name, child in node["properties"].items():
                key = f"{prefix}{name}"
                sections = [option for option in self._alternatives(child) if option.get("type") == "object"]
                inner = self._node(sections[0].get("additionalProperties") or sections[0]) if sections else None
                title = inner["title"] if inner else ""
                allowed = " or ".join(
                    ("a mapping" if option.get("additionalProperties") else "a section")
                    if option.get("type") == "object"
                    else self._allowed(option)
                    for option in self._alternatives(child)
                )
                if title in expanded:
                    allowed = allowed.replace("a section", f"a section like `{expanded[title]}`")
                takers = [backend for backend, keys in TAKES.items() if prefix == "quantize." and name in keys]
                meaning = child.get("description") or self._node(child)["description"]
                if takers and len(takers) < len(TAKES):
                    meaning = f"({', '.join(takers)}) {meaning}"
                if name in node.get("required", ()):
                    default = "required"
                else:
                    by = "by quality" if name in PRESETS["fast"] else "by backend"
                    default = f"`{json.dumps(child['default'])}`" if "default" in child else by
                rows.append(f"| `{key}` | {allowed} | {default} | {meaning} |".replace("\n", " "))
                if inner and title not in expanded:
                    expanded[title] = key
                    add(inner, key + (".<glob>." if sections[0].get("additionalProperties") else "."))

        add(self._schema, "")
        return "\n".join(rows) + "\n"


def _place(detail: Any, document: Document, prefix: KeyPath) -> tuple[KeyPath, Any, bool]:
    """Path of one of pydantic's errors, the value there, and whether the error is about the key rather than the value.

    pydantic mixes notes of its own into the path, such as the alternative of a union that it tried.
    """
    value, path, is_key, tagged = document.value, prefix, False, False
    for step in prefix:
        value = value[step]
    for index, step in enumerate(detail["loc"]):
        if path in _TAGGED and step in (FILE, HUB, SHARE) and not tagged:
            tagged = True
        elif step in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(step, int):
            path, value = (*path, step), value[step]
        elif detail["type"] == "missing" and index == len(detail["loc"]) - 1:
            path, value = (*path, step), None
        else:
            is_key = step == "[key]"
    return path, value, is_key
