"""Horizontal bars as an SVG, a panel for each group of them below the other, for light and dark pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Color = Literal["first", "second", "grey"]

_BAR, _GAP, _LEFT, _LENGTH, _HEAD, _RIGHT = 12, 14, 250, 270, 40, 60  # pixels; _LENGTH: of the longest bar
_STYLE = """
.paper{fill:#fff}.ink{fill:#1f2328}.soft{fill:#59636e}.first{fill:#56b4e9}.second{fill:#d55e00}.grey{fill:#8c959f}
text{font:11px system-ui,sans-serif}.one{stroke:#59636e;stroke-dasharray:5 4}
@media(prefers-color-scheme:dark){.paper{fill:#0d1117}.ink{fill:#f0f6fc}.soft{fill:#9198a1}}
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar.

    Attributes:
        name: The text on its left.
        value: Its length.
        label: The text on its right.
        color: Bars of one meaning have one colour.
    """

    name: str
    value: float
    label: str
    color: Color


def bar_chart(title: str, panels: Mapping[str, Sequence[Bar]]) -> str:
    """Returns an SVG.

    Args:
        title: What the bars show, for those who hear the page.
        panels: Bars by the panel's heading. A dashed line marks the end of each panel's first bar.
    """
    scale = _LENGTH / max(bar.value for bars in panels.values() for bar in bars)
    width = _LEFT + _LENGTH + _RIGHT
    height = sum(_HEAD + len(bars) * _BAR + _GAP for bars in panels.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>'
    ]
    top = _HEAD
    for heading, bars in panels.items():
        parts.append(f'<text class="ink" x="{_LEFT}" y="{top - 12}" font-weight="600">{escape(heading)}</text>')
        parts += [_bar(bar, top + i * _BAR, scale) for i, bar in enumerate(bars)]
        one, bottom = _LEFT + scale * bars[0].value, top + len(bars) * _BAR
        parts.append(f'<line class="one" x1="{one:.1f}" x2="{one:.1f}" y1="{top}" y2="{bottom}"/>')
        top = bottom + _GAP + _HEAD
    return "".join([*parts, "</svg>\n"])


def _bar(bar: Bar, y: int, scale: float) -> str:
    length = scale * bar.value
    return (
        f'<text class="soft" x="{_LEFT - 6}" y="{y + 9}" text-anchor="end">{escape(bar.name)}</text>'
        f'<rect class="{bar.color}" x="{_LEFT}" y="{y + 1}" width="{length:.1f}" height="{_BAR - 2}"/>'
        f'<text class="ink" x="{_LEFT + length + 4:.1f}" y="{y + 9}">{escape(bar.label)}</text>'
    )
