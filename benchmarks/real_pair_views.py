"""The results of `real_pair.py` as a Markdown table and as a plot."""

from collections.abc import Sequence

from bar_chart import Bar, Color, bar_chart
from real_pair_rows import Row


def markdown(rows: Sequence[Row]) -> str:
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


def svg(rows: Sequence[Row]) -> str:
    """Bars of the speed-up, a panel for each domain below the other."""
    domains, ways = _names(rows)
    panels = {domain: [_bar(row, ways[0]) for row in rows if row.domain == domain] for domain in domains}
    return bar_chart("Speed-up over the target alone", panels)


def _bar(row: Row, alone: str) -> Bar:
    color: Color = "grey" if row.way == alone else "second" if "adaptive" in row.way else "first"
    return Bar(row.way, row.speedup, f"{row.speedup:.2f}×", color)


def _names(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(row.domain for row in rows)), list(dict.fromkeys(row.way for row in rows))
