"""A sweep drawn: speed-up over γ, a panel for each context, a line for each drafter. SVG, for light and dark."""

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.measure.sweep import SweepReport, SweepRow

_WIDTH, _HEIGHT = 420, 300  # a panel's
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 44, 44
_LEGEND = 20  # the height of one line of the legend
# Colour-blind people can tell these apart too (Okabe and Ito); marks differ as well, and a legend names every line.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_STYLE = """
.paper{fill:#fff}.ink{fill:#1f2328}.soft{fill:#59636e}.grid{stroke:#d1d9e0}.one{stroke:#59636e;stroke-dasharray:5 4}
text{font:12px system-ui,sans-serif}
@media(prefers-color-scheme:dark){.paper{fill:#0d1117}.ink{fill:#f0f6fc}.soft{fill:#9198a1}.grid{stroke:#3d444d}
.one{stroke:#9198a1}}
"""


def svg(report: "SweepReport") -> str:
    """Returns the whole SVG file: speed-ups without prefills, over the target alone at the same context."""
    drafted = [row for row in report.rows if row.draft_length]
    contexts = list(dict.fromkeys(row.context for row in drafted))
    names = list(dict.fromkeys(row.drafter for row in drafted))
    lengths = sorted({row.draft_length for row in drafted})
    top = max(1.0, *(row.report.decode_speedup for row in drafted)) * 1.1
    width, height = _WIDTH * len(contexts), _HEIGHT + _LEGEND * (len(names) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>Speed-up over the target alone, by draft length</title><style>{_STYLE}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>'
    ]
    for index, context in enumerate(contexts):
        panel = [row for row in drafted if row.context == context]
        title = "prompts as they are" if context is None else f"{context} tokens of context"
        parts.append(f'<g transform="translate({index * _WIDTH} 0)">{_axes(title, lengths, top)}')
        parts += [_line([row for row in panel if row.drafter == name], i, lengths, top) for i, name in enumerate(names)]
        parts.append("</g>")
    rows_of = {row.drafter: row.head_rows for row in drafted}
    for i, name in enumerate(names):
        y = _HEIGHT + _LEGEND * (i + 0.5)
        rows = f"{rows_of[name]} rows"
        label = escape(name if rows in name else f"{name}, {rows}")
        parts.append(f'{_mark(_LEFT + 6, y, i)}<text class="ink" x="{_LEFT + 18}" y="{y + 4}">{label}</text>')
    return "".join([*parts, "</svg>\n"])


def _x(length: int, lengths: list[int]) -> float:
    """Returns the place of a draft length. All lengths are equally far apart: 1, 2, 4 and 8 need no logarithm."""
    step = (_WIDTH - _LEFT - _RIGHT) / len(lengths)
    return _LEFT + step * (lengths.index(length) + 0.5)


def _y(speedup: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * speedup / top


def _axes(title: str, lengths: list[int], top: float) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    step = next(step for step in (0.25, 0.5, 1, 2, 5, 10, 1e9) if top / step <= 7)
    ticks = [step * i for i in range(int(top / step) + 1)]
    parts = [f'<text class="ink" x="{_LEFT}" y="20" font-weight="600">speed-up, {escape(title)}</text>']
    for tick in ticks:
        y = _y(tick, top)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}×</text>')
    one = _y(1, top)
    parts.append(f'<line class="one" x1="{_LEFT}" x2="{right}" y1="{one:.1f}" y2="{one:.1f}"/>')
    for length in lengths:
        x = _x(length, lengths)
        parts.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{length}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="soft" x="{middle}" y="{bottom + 36}" text-anchor="middle">tokens drafted, γ</text>')
    return "".join(parts)


def _line(rows: "list[SweepRow]", index: int, lengths: list[int], top: float) -> str:
    points = [(_x(row.draft_length, lengths), _y(row.report.decode_speedup, top), row) for row in rows]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    colour = _COLOURS[index % len(_COLOURS)]
    marks = "".join(
        f"<g><title>{escape(row.drafter)}, γ = {row.draft_length}: {row.report.decode_speedup:.2f}×, "
        f"{row.report.decode_tokens_per_second:.1f} tokens/s</title>{_mark(x, y, index)}</g>"
        for x, y, row in points
    )
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{marks}'


def _mark(x: float, y: float, index: int) -> str:
    colour = _COLOURS[index % len(_COLOURS)]
    if index % 3 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if index % 3 == 2 else ""
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"{turn}/>'
