"""A picture of mixed precision: which linear of which block has how many bits, as a standalone SVG.

Text in, text out; nothing here opens a file or knows what a model is. The picture brings its own background, light or dark as the reader's
system has it, and refers to nothing outside itself, so that it reads the same in a browser, in a README and in a report.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

# Bits to the colour of a cell and of the number in it: the more bits the darker, in an order that colour-blind readers see too. The
# colours are the same on both backgrounds.
COLOURS = {2: ("#fbe3a4", "#1c1c1c"), 3: ("#9fd8a4", "#1c1c1c"), 4: ("#45a3c4", "#1c1c1c"), 8: ("#2c4795", "#ffffff")}
CELL_WIDTH, CELL_HEIGHT, GAP = 96, 30, 2
LEFT, TOP, MARGIN = 52, 130, 16
# Room for "3 bits: 1000 linears" in the legend, and for a letter of the title, in any font.
LEGEND_STEP, TITLE_LETTER = 156, 11
IN_BLOCK = re.compile(r"(?P<before>.*?)\.(?P<block>\d+)\.(?P<linear>.+)")

STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
.paper { fill: #ffffff; }
.ink { fill: #1f2328; }
.faint { fill: #59636e; }
.empty { fill: none; stroke: #59636e; stroke-dasharray: 3 3; }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117; }
  .ink { fill: #f0f6fc; }
  .faint { fill: #9198a1; }
  .empty { stroke: #9198a1; }
}
"""


def bits_figure(
    choice: Mapping[str, tuple[int, int]], *, name: str, average_bits: float, size: int, left_out: Sequence[str] = ()
) -> str:
    """The SVG: a row for each block, a column for each of its linears, in each cell the bits and, smaller, the group size.

    Args:
        choice: path of each quantized linear ("model.decoder.layers.0.fc1") to (bits, group size), in the model's order; a group
            size of -1 is the whole row.
        name: of the model, for the title.
        average_bits: stored bits per weight. size: stored bytes. Of the quantized linears, for the title.
        left_out: paths of linears in blocks that stay in floating point; their cells are empty.
    Raises:
        ValueError: no linear at all, a path without a block's number, or a number of bits that has no colour.
    """
    cells: dict[tuple[int, str], tuple[int, int] | None] = {}
    for path in (*choice, *left_out):
        found = IN_BLOCK.fullmatch(path)
        if found is None:
            raise ValueError(f"{path!r} is no path of a linear in a block")
        if path in choice and choice[path][0] not in COLOURS:
            raise ValueError(f"{path}: {choice[path][0]} bits; expected one of {', '.join(map(str, COLOURS))}")
        cells[int(found["block"]), found["linear"]] = choice.get(path)
    if not choice:
        raise ValueError("there is no quantized linear to draw")
    blocks = sorted({block for block, _ in cells})
    linears = list(dict.fromkeys(linear for _, linear in cells))
    counts = Counter(bits for bits, _ in choice.values())
    wide = (len(linears) * (CELL_WIDTH + GAP) + LEFT, len(counts) * LEGEND_STEP, len(name) * TITLE_LETTER, 400)
    width = max(wide) + 2 * MARGIN
    height = TOP + len(blocks) * (CELL_HEIGHT + GAP) + MARGIN

    size_in_words = f"{average_bits:.2f} bits per weight, {_bytes(size)} in linears"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'role="img" aria-labelledby="title">',
        f'<title id="title">{escape(name)}: {size_in_words}</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="ink" x="{MARGIN}" y="28" font-size="16" font-weight="600">{escape(name)}</text>',
        f'<text class="ink" x="{MARGIN}" y="48" font-size="13">{size_in_words}</text>',
    ]
    lines += _legend(counts)
    for column, linear in enumerate(linears):
        x = LEFT + column * (CELL_WIDTH + GAP) + CELL_WIDTH // 2
        # "mlp.dense_4h_to_h" in two lines, the part of the block above the linear.
        part, _, last = linear.rpartition(".")
        if part:
            lines.append(_text(part, x, TOP - 24, 11, "faint"))
        lines.append(_text(last, x, TOP - 10, 11, "ink"))
    for row, block in enumerate(blocks):
        y = TOP + row * (CELL_HEIGHT + GAP)
        lines.append(_text(str(block), LEFT - 18, y + CELL_HEIGHT // 2 + 4, 12, "faint"))
        for column, linear in enumerate(linears):
            if (block, linear) in cells:
                x = LEFT + column * (CELL_WIDTH + GAP)
                lines += _cell(x, y, f"block {block}, {linear}", cells[block, linear])
    return "\n".join([*lines, "</svg>"]) + "\n"


def _cell(x: int, y: int, where: str, how: tuple[int, int] | None) -> list[str]:
    if how is None:
        box = f'<rect class="empty" x="{x}.5" y="{y}.5" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}" rx="4">'
        return [f"{box}<title>{escape(where)}: not quantized</title></rect>"]
    bits, group_size = how
    fill, ink = COLOURS[bits]
    group = "row" if group_size == -1 else f"g{group_size}"
    described = escape(f"{where}: {bits} bits, group size {group_size}")
    return [
        f'<rect x="{x}" y="{y}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" rx="4" fill="{fill}">'
        f"<title>{described}</title></rect>",
        f'<text x="{x + 40}" y="{y + CELL_HEIGHT // 2 + 5}" text-anchor="end" fill="{ink}" font-size="15" '
        f'font-weight="600">{bits}</text>',
        f'<text x="{x + 48}" y="{y + CELL_HEIGHT // 2 + 5}" fill="{ink}" font-size="11">{group}</text>',
    ]


def _legend(counts: Mapping[int, int]) -> list[str]:
    lines, x = [], MARGIN
    for bits in sorted(counts):
        fill, _ = COLOURS[bits]
        linears = "linear" if counts[bits] == 1 else "linears"
        lines.append(f'<rect x="{x}" y="62" width="14" height="14" rx="3" fill="{fill}"/>')
        lines.append(
            f'<text class="faint" x="{x + 20}" y="73" font-size="12">{bits} bits: {counts[bits]} {linears}</text>'
        )
        x += LEGEND_STEP
    return lines


def _text(text: str, x: int, y: int, size: int, style: str) -> str:
    return f'<text class="{style}" x="{x}" y="{y}" text-anchor="middle" font-size="{size}">{escape(text)}</text>'


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
