"""The picture of mixed precision: well-formed, complete, readable on its own background, and refusing what it cannot draw."""

import re
from itertools import pairwise, product
from xml.etree import ElementTree

import pytest

from qlm.figure import COLOURS, STYLE, bits_figure

SVG = "{http://www.w3.org/2000/svg}"
# WCAG 2.2, success criterion 1.4.3: the least contrast of text with what is behind it.
READABLE = 4.5

OPT = {
    f"model.decoder.layers.{block}.{linear}": (bits, group)
    for (block, linear), (bits, group) in zip(
        product(range(12), ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")),
        [(2, 32), (3, 64), (4, 128), (8, -1), (3, 128)] * 10,
        strict=False,
    )
}


def draw(choice: dict[str, tuple[int, int]] = OPT, **changes: object) -> ElementTree.Element:
    arguments = {"name": "opt", "average_bits": 3.4567, "size": 12_345_678, **changes}
    return ElementTree.fromstring(bits_figure(choice, **arguments))  # type: ignore[arg-type]


def texts(element: ElementTree.Element, tag: str = "text") -> list[str]:
    return ["".join(found.itertext()) for found in element.iter(SVG + tag)]


def test_every_linear_has_its_cell() -> None:
    cells = [text for text in texts(draw(), "title") if text.startswith("block")]
    expected = []
    for path, (bits, group) in OPT.items():
        block, linear = path.removeprefix("model.decoder.layers.").split(".", 1)
        expected.append(f"block {block}, {linear}: {bits} bits, group size {group}")
    assert cells == expected
    in_cells = [text for text in draw().iter(SVG + "text") if text.get("fill")]
    assert [text.text for text in in_cells[::2]] == [str(bits) for bits, _ in OPT.values()]
    assert [text.text for text in in_cells[1::2]] == [
        "row" if group == -1 else f"g{group}" for _, group in OPT.values()
    ]


def test_colour_says_what_the_number_says() -> None:
    drawn = draw()
    numbered = [t for t in drawn.iter(SVG + "text") if t.get("fill")][::2]
    boxes = [r for r in drawn.iter(SVG + "rect") if r.get("fill") and r.get("height") != "14"]
    assert len(boxes) == len(numbered) == len(OPT)
    for box, number in zip(boxes, numbered, strict=True):
        assert (box.get("fill"), number.get("fill")) == COLOURS[int(number.text or "")]
        # The number stands inside its box.
        x, y, w, h = (float(box.get(key, "")) for key in ("x", "y", "width", "height"))
        assert x < float(number.get("x", "")) < x + w
        assert y < float(number.get("y", "")) < y + h


def test_title_and_legend() -> None:
    drawn = draw()
    assert texts(drawn, "title")[0] == "opt: 3.46 bits per weight, 12.35 MB in linears"
    assert ": ".join(texts(drawn)[:2]) == texts(drawn, "title")[0]
    assert {"2 bits: 10 linears", "3 bits: 19 linears"} <= set(texts(drawn))
    assert "1.20 GB" in texts(draw(size=1_200_000_000))[1]
    assert "8 bits: 1 linear" in texts(draw({"h.0.mlp.c_fc": (8, 64)}))


def test_linears_that_are_left_out_are_empty() -> None:
    drawn = draw(left_out=["model.decoder.layers.3.self_attn.k_proj"])
    empty = [r for r in drawn.iter(SVG + "rect") if r.get("class") == "empty"]
    assert [texts(box, "title") for box in empty] == [["block 3, self_attn.k_proj: not quantized"]]
    assert "k_proj" in texts(drawn)


def test_nothing_overlaps_and_nothing_lies_outside() -> None:
    drawn = draw()
    width, height = float(drawn.get("width", "")), float(drawn.get("height", ""))
    boxes = []
    for box in drawn.iter(SVG + "rect"):
        x, y, w, h = (float(box.get(key, "0")) for key in ("x", "y", "width", "height"))
        assert x + w <= width
        assert y + h <= height
        if box.get("class") != "paper":
            boxes.append((x, y, w, h))
    for first, (x, y, w, h) in enumerate(boxes):
        for u, v, p, q in boxes[first + 1 :]:
            assert x + w <= u or u + p <= x or y + h <= v or v + q <= y


def test_there_is_room_for_every_text() -> None:
    """One linear only, a long name, every number of bits: a letter takes 0.6 of its font size."""
    narrow = draw({"h.0.mlp.c_fc": (4, 128)}, name="an-organisation/a-model-with-a-rather-long-name-7b-v1.5")
    for drawn in (narrow, draw({f"h.{i}.mlp.c_fc": (b, 64) for i, b in enumerate([2, 3, 4, 8] * 250)})):
        width = float(drawn.get("width", ""))
        for text in drawn.iter(SVG + "text"):
            if text.get("text-anchor") is None:
                assert float(text.get("x", "")) + 0.6 * float(text.get("font-size", "")) * len(text.text or "") <= width
        legend = [t for t in drawn.iter(SVG + "text") if "linear" in (t.text or "") and t.get("class") == "faint"]
        for one, other in pairwise(legend):
            assert float(one.get("x", "")) + 0.6 * 12 * len(one.text or "") <= float(other.get("x", "")) - 20 + 16


def test_names_are_text() -> None:
    hostile = "<script>\"&'</script>"
    drawn = draw({f"h.0.{hostile}": (4, 128)}, name=hostile)
    assert all(element.tag != SVG + "script" for element in drawn.iter())
    assert texts(drawn)[0].startswith(hostile)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_text_is_readable_on_light_and_dark() -> None:
    for fill, ink in COLOURS.values():
        assert contrast(fill, ink) >= READABLE
    light, dark = STYLE.split("@media")
    for part in (light, dark):
        colour = dict(re.findall(r"\.(\w+) \{ (?:fill: none; )?(?:fill|stroke): (#\w{6});", part))
        for ink in ("ink", "faint"):
            assert contrast(colour["paper"], colour[ink]) >= READABLE
        assert {"paper", "ink", "faint", "empty"} == colour.keys()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "no quantized linear"),
        ({"lm_head": (4, 128)}, "'lm_head' is no path of a linear in a block"),
        ({"h.0.attn.c_attn": (5, 128)}, "5 bits; expected one of 2, 3, 4, 8"),
    ],
)
def test_refuses_what_it_cannot_draw(choice: dict[str, tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(choice)
