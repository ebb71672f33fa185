"""The results of `real_pair.py` as a Markdown table and as a plot."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from real_pair import Row

_BAR, _GAP, _LEFT, _SCALE, _HEAD = 12, 14, 250, 90, 40  # pixels; _SCALE: of a speed-up of 1
_STYLE = """
.paper{fill:#fff}.ink{fill:#1f2328}.soft{fill:#59636e}.fixed{fill:#56b4e9}.adaptive{fill:#d55e00}.alone{fill:#8c959f}
text{font:11px system-ui,sans-serif}.one{stroke:#59636e;stroke-dasharray:5 4}
@media(prefers-color-scheme:dark){.paper{fill:#0d1117}.ink{fill:#f0f6fc}.soft{fill:#9198a1}}
"""


def markdown(rows: Sequence["Row"]) -> str:
    """Speed-ups over the target alone, a column for each domain; in brackets the block efficiency."""
    domains, ways = _names(rows)
    cells = {(row.domain, row.way): row for row in rows}
    lines = [f"| | {' | '.join(domains)} |", f"|---|{'---|' * len(domains)}"]
    for way in ways:
        own = [cells[domain, way] for domain in domains]
        shown = [f"{row.speedup:.2f}× ({row.block_efficiency:.2f})" for row in own]
        differs = "" if all(row.equal_outputs for row in own) else " (outputs differ)"
        lines.append(f"| {way}{differs} | {' | '.join(shown)} |")
    alone = [f"{cells[domain, ways[0]].tokens_per_second:.1f}" for domain in domains]
    lines.append(f"| {ways[0]}, tokens/s | {' | '.join(alone)} |")
    return "\n".join(lines) + "\n"


def svg(rows: Sequence["Row"]) -> str:
    """Bars of the speed-up, a panel for each domain below the other."""
    domains, ways = _names(rows)
    panel = _HEAD + len(ways) * _BAR + _GAP
    width = _LEFT + int(_SCALE * max(row.speedup for row in rows)) + 60
    height = panel * len(domains)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>Speed-up over the target alone</title><style>{_STYLE}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>'
    ]
    for index, domain in enumerate(domains):
        top = index * panel + _HEAD
        parts.append(f'<text class="ink" x="{_LEFT}" y="{top - 12}" font-weight="600">{escape(domain)}</text>')
        own = [row for row in rows if row.domain == domain]
        for i, row in enumerate(own):
            y, length = top + i * _BAR, _SCALE * row.speedup
            kind = "alone" if i == 0 else "adaptive" if "adaptive" in row.way else "fixed"
            parts.append(
                f'<text class="soft" x="{_LEFT - 6}" y="{y + 9}" text-anchor="end">{escape(row.way)}</text>'
                f'<rect class="{kind}" x="{_LEFT}" y="{y + 1}" width="{length:.1f}" height="{_BAR - 2}"/>'
                f'<text class="ink" x="{_LEFT + length + 4:.1f}" y="{y + 9}">{row.speedup:.2f}×</text>'
            )
        one, bottom = _LEFT + _SCALE, top + len(own) * _BAR
        parts.append(f'<line class="one" x1="{one}" x2="{one}" y1="{top}" y2="{bottom}"/>')
    return "".join([*parts, "</svg>\n"])


def _names(rows: Sequence["Row"]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(row.domain for row in rows)), list(dict.fromkeys(row.way for row in rows))
