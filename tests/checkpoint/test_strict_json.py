"""JSON that two readers could understand differently is an error; what qlm writes is always the same bytes."""

import pytest

from qlm.checkpoint.strict_json import dumps, load_object, loads
from qlm.errors import DataError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1, "a": 1}', "the key 'a' appears twice"),
        (b'{"x": {"a": 1, "b": 2, "a": 3}}', "the key 'a' appears twice"),
        (b"[NaN]", "the number NaN"),
        (b"[-Infinity]", "the number -Infinity"),
        (b"[1e400]", "too large for a double"),
        (b"[123456789012345678901]", "21 digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b" " * 200, "at most 100"),
    ],
    ids=range(13),
)
def test_refused(text, words):
    with pytest.raises(DataError) as caught:
        loads(text, "config.json", max_bytes=100_000 if text.startswith(b"[[") else 100)
    assert str(caught.value).startswith("config.json: ")
    assert words in str(caught.value)


def test_says_where():
    for text, words in (
        (b'{"text": "a', "Unterminated string at column 10"),
        (b'{"a": "\t"}', "Invalid control character at column 8"),
    ):
        with pytest.raises(DataError, match=f"^x: not valid JSON: {words}$"):
            loads(text, "x")
    with pytest.raises(DataError, match=r"Expecting ',' delimiter at line 2 column 1$"):
        loads(b'["a"\n"b"]', "x")


def test_an_object_is_asked_for():
    assert load_object(b'{"a": [1, 2.5, null, true, "x"]}', "x") == {"a": [1, 2.5, None, True, "x"]}
    with pytest.raises(DataError, match="holds a JSON list; expected an object"):
        load_object(b"[]", "x")


def test_the_same_value_gives_the_same_bytes():
    assert dumps({"b": 1, "a": "é"}) == dumps({"a": "é", "b": 1}) == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
    assert dumps({"b": 1, "a": 2}, sort_keys=False) == b'{\n  "b": 1,\n  "a": 2\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps(float("nan"))
