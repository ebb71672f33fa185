"""The parts of a report's page, independent of their content."""

from dataclasses import dataclass

from vocabtrim_export.reports.charts import Chart
from vocabtrim_export.reports.lost_tokens import MarkedLine


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell.

    Attributes:
        text: Its text.
        value: The number that the column is sorted by; None sorts by the text.
        is_code: It is shown as code.
    """

    text: str
    value: float | None = None
    is_code: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first cell of each row is its heading."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: The name that links use.
        title: Its heading.
        notes: Its paragraphs.
        charts: Its charts.
        tables: Its tables.
        lines: Lines of text with marked tokens.
    """

    anchor: str
    title: str
    notes: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    lines: tuple[MarkedLine, ...] = ()


def megabytes(count: float) -> str:
    """Returns a number of bytes in words."""
    return f"{count / 1e6:,.1f} MB"
